#!/usr/bin/env python3
"""A run that is killed by SIGKILL again and again, many times while it saves, and restarted with --resume each time:
after each kill every checkpoint is whole and the newest is none older than before; at the end log and weights are, bit
for bit, those of a run that nobody disturbed. It trains on the sources of Python's standard library and needs no more.

usage: kill.py TRAIN_GPT [--kills 200] [--ranks 2] [--seed N]
"""
import argparse
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time

from launch import (MPI_ENV, Failure, Job, checkpoint, checkpoints, contents, expect, log_bits, read_log, run,
                    same_matmuls, verify, write_shard)


def write_text(path, size=300000):
    """Bytes as tokens, a document after 256 and before 257, as prepare.py --tokenizer bytes has them."""
    tokens, top = [], sysconfig.get_path("stdlib")
    for name in sorted(os.listdir(top)):
        if name.endswith(".py") and len(tokens) < size:
            tokens += [256, *contents(os.path.join(top, name)), 257]
    write_shard(path, tokens[:size])


class Kills:
    def __init__(self, args, directory):
        self.args, self.dir, self.random = args, directory, random.Random(args.seed)
        self.ranks = args.ranks if args.ranks > 1 else 0
        self.steps = 6 * min(args.kills, 100) + 6
        self.kills = self.hits = self.starts = self.lives = self.rounds = self.orphaned = 0
        self.kinds = {"all processes": 0, "one rank": 0, "mpirun": 0}
        write_text(self.path("text.bin"))
        MPI_ENV["OMPI_MCA_btl_vader_backing_directory"] = directory  # killed jobs leave their shared memory behind

    def path(self, name):
        return os.path.join(self.dir, name)

    def flags(self, name, *more):
        return ["--dim", 48, "--layers", 2, "--heads", 3, "--vocab-size", 258, "--multiple-of", 16, "--seq-len", 64,
                "--total-batch", 4, "--batch-size", 4 // max(self.ranks, 1), "--steps", self.steps, "--lr", 3e-3,
                "--zero", self.random.randrange(4), "--shuffle", "--train-data", self.path("text.bin"),
                "--out", self.path(name), "--export", self.path(name + ".st"), "--log-every", 1000000,
                "--timeout", 60, "--save-every", 3, *more]

    def saving(self):
        names = os.listdir(self.out) if os.path.isdir(self.out) else []
        return any(n.startswith((".step_", ".old_step_")) for n in names)

    def rows(self):
        try:
            return contents(os.path.join(self.out, "log.csv")).count(b"\n")
        except OSError:
            return 0

    def moment(self, job, before):
        """Waits for a random moment to kill: half of them within a save, some before the first step."""
        draw = self.random.random()
        end = time.monotonic() + 60
        alive = lambda: job.process.poll() is None and time.monotonic() < end
        self.members, self.pids = [], []
        if draw < 0.1:
            time.sleep(self.random.uniform(0, 0.8))
            return
        newest = before
        for _ in range(self.random.choice((1, 1, 1, 2))):  # a new checkpoint first, so that the run comes to its end
            while alive() and (checkpoints(self.out) or [0])[-1] <= newest:
                time.sleep(0.001)
            newest = (checkpoints(self.out) or [0])[-1]
        self.members, self.pids = job.members(), sorted(job.pids().values())
        if draw < 0.3:
            time.sleep(self.random.uniform(0, 0.05))
            return
        while alive() and not self.saving():
            time.sleep(0.0002)
        time.sleep(self.random.choice((0, 0.001, self.random.uniform(0, 0.015))))

    def kill(self, job, kind, members, ranks):
        """members, ranks: pids, looked up before the moment came, so that it does not pass meanwhile"""
        try:
            if kind == "mpirun":
                os.kill(job.process.pid, signal.SIGKILL)
                step, end = self.rows(), time.monotonic() + 30
                while time.monotonic() < end and job.pids():  # the ranks see that it is gone
                    time.sleep(0.01)
                expect(not job.pids(), "ranks train on without mpirun")
                self.orphaned = max(self.orphaned, self.rows() - step)
            else:
                for pid in [self.random.choice(ranks)] if kind == "one rank" else members:
                    os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if kind != "one rank":
            job.kill()
        self.kinds[kind] += 1

    def life(self, undisturbed):
        """Starts the run, kills it. True: it came to its end before."""
        before = (checkpoints(self.out) or [0])[-1]
        more = ["--save-async"] if self.random.random() < 0.4 else []
        job = Job(self.args.train_gpt, self.flags("run", "--resume", *more), self.ranks)
        self.lives += 1
        kill = self.kills < self.args.kills
        try:
            if kill:
                kind = self.random.choice(("all processes", "all processes", "one rank", "mpirun") if self.ranks else
                                          ("all processes",))
                self.moment(job, before)
            ended = job.process.poll() is not None
            if kill and not ended:
                self.kill(job, kind if self.pids else "all processes", self.members or job.members(), self.pids)
        finally:
            try:
                job.wait(300)
            except Failure:
                job.kill()
                raise
        expect(not job.warnings(), f"warnings: {job.text()}")
        resumed = re.search(r"resumed from \S+step_(\d+)", job.out)
        if self.rows() and resumed:
            expect(int(resumed.group(1)) == before, f"resumed from {resumed.group(1)}, the newest was {before}")
        there = checkpoints(self.out)
        newest = (there or [0])[-1]
        expect(newest >= before, f"the newest checkpoint was of step {before}, now it is of {newest}")
        for step in there:
            expect(verify(checkpoint(self.out, step))["step"] == step, f"{step} is another step")
        if not kill or ended:
            expect(job.status == 0, f"exit {job.status}: {job.text()}")
            return True
        self.kills += 1
        hit = self.saving()
        self.hits += hit
        self.starts += not resumed
        rows = log_bits(self.out) if self.rows() > 1 else []
        expect(rows == undisturbed[:len(rows)], "a row of the log is not that of the undisturbed run")
        return False

    def all(self):
        begin = said = time.monotonic()
        run(self.args.train_gpt, self.flags("calm"), self.ranks, limit=600)
        log, weights = log_bits(self.path("calm")), contents(self.path("calm.st"))
        self.out = self.path("run")
        while self.kills < self.args.kills or not self.rounds:
            shutil.rmtree(self.out, ignore_errors=True)
            same_matmuls(self.path("calm"), self.out)
            while not self.life(log):
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    print(f"{self.kills} kills, {self.hits} within a save, step {(checkpoints(self.out) or [0])[-1]} "
                          f"of {self.steps}, {said - begin:.0f} s", flush=True)
            self.rounds += 1
            expect(len(read_log(self.out)) == self.steps and log_bits(self.out) == log, "the logs differ")
            expect(contents(self.path("run.st")) == weights, "the weights differ")
        kinds = ", ".join(f"{n} of {k}" for k, n in self.kinds.items())
        print(f"{self.kills} kills ({kinds}) in {self.lives} lives of {self.rounds} runs of {self.steps} steps on "
              f"{self.args.ranks} ranks: {self.hits} within a save, {self.starts} before it had resumed; at most "
              f"{self.orphaned} steps without mpirun; the same bits as undisturbed; {time.monotonic() - begin:.0f} s, "
              f"seed {self.args.seed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_gpt")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="1: without mpirun")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="kill_")
    failed = 0
    try:
        Kills(args, directory).all()
    except Exception as e:
        failed = 1
        print(f"FAIL kill: {type(e).__name__}: {e}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"kill: {1 - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
