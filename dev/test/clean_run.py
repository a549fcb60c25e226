#!/usr/bin/env python3
"""Whole lives of tiny models, watched: train (loader's thread, saves beside training, validation, samples, probe),
kill, stop, resume, export, import, generate, eval, bad files; then 2 ranks under mpirun. The build or valgrind does the
watching: any report of theirs fails, as does a byte that differs from the undisturbed run. Standard library only.

usage: clean_run.py TRAIN_GPT [--valgrind] [--bf16] [--quick] [--alone]  a life of each variant and backbone
       clean_run.py TRAIN_GPT --leak 10000 [--ranks 2]    a long run: memory, files, threads must stay as they were

`make build/train_gpt_asan_fp32`, _tsan_fp32, _valgrind_fp32 and their _bf16 build the trainers.
"""
import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time

from launch import Failure, Job, checkpoint, checkpoints, contents, copy, expect, log_bits, same_matmuls, write_shard
from test_cli import run_all

FOUND = re.compile(r"^.*(?:Sanitizer|runtime error:|^==\d+==).*$", re.M)
WATCH = {
    "ASAN_OPTIONS": "exitcode=99:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=99",
}
VALGRIND = ["valgrind", "-q", "--error-exitcode=99", "--leak-check=${LEAK_CHECK-full}",
            "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
STEPS = 24
# each life tries other options
LIVES = {
    "llama simplegpt": ["--kv-heads", 1, "--recompute", "norm", "--shuffle"],
    "llama prenorm": ["--norm", "layernorm", "--recompute", "block", "--grad-accum", 2],
    "llama preqknorm": ["--recompute", "ffn", "--moments", "bf16", "--graph"],
    "nanogpt simplegpt": ["--graph"],
    "nanogpt prenorm": ["--recompute", "block", "--norm", "layernorm", "--shuffle"],
    "nanogpt preqknorm": ["--recompute", "norm", "--grad-accum", 2],
}
# KiB that a rank's resident memory may grow from the second tenth of a long run to its last: measured are 8 (10000
# steps on one rank) and 0 (3000 on two); 10 bytes lost a step would be 80 in 10000
GROWTH = 64


class Lives:
    def __init__(self, args):
        if args.valgrind and not shutil.which("valgrind"):
            sys.exit("clean_run: valgrind is missing. Install it: sudo apt-get install valgrind")
        self.args, self.dir, self.passed, self.failed = args, tempfile.mkdtemp(prefix="clean_run_"), 0, 0
        self.trainer = os.path.abspath(args.train_gpt)
        if args.valgrind:
            self.trainer = self.path("watched")
            with open(self.trainer, "w") as f:
                f.write(f'#!/bin/sh\nexec {" ".join(VALGRIND)} {os.path.abspath(args.train_gpt)} "$@"\n')
            os.chmod(self.trainer, 0o755)
        for name, seed in (("train_0", 1), ("train_1", 2), ("val", 3)):
            text = b"".join(b"def f%d(x): return %d * x\n" % (i, i * seed) for i in range(160))
            write_shard(self.path(name + ".bin"), [256, *text, 257])

    def path(self, name):
        return os.path.join(self.dir, name)

    def start(self, *flags, ranks=0, ends=False):
        # MPI keeps memory of its own to the end, and an error ends the process (`ends`) with all that it holds
        leaks = {"ASAN_OPTIONS": WATCH["ASAN_OPTIONS"] + ":detect_leaks=0", "LEAK_CHECK": "no"} if ranks or ends else {}
        return Job(self.trainer, flags, ranks, {**WATCH, **leaks})

    def end(self, job, status=0):
        job.wait(600)
        found = FOUND.search(job.err + job.out)
        expect(not found, f"{found and found.group()}\n{job.err[-4000:]} ({' '.join(job.command)})")
        expect(job.status == status, f"exit {job.status} where {status} was due: {job.text()}")
        return job

    def run(self, *flags, ranks=0, status=0):
        return self.end(self.start(*flags, ranks=ranks, ends=status == 1), status)

    def model(self, life):
        backbone, variant = life.split()
        return ["--backbone", backbone, "--variant", variant, "--dim", 32, "--layers", 2, "--heads", 2, "--multiple-of",
                16, "--vocab-size", 258, *LIVES[life]]

    def flags(self, life, name, *more):
        probe = ["--probe-iterations", 0 if self.args.bf16 else 3]
        return [*self.model(life), "--seq-len", 24, "--batch-size", 2, "--steps", STEPS, "--lr", 3e-3, "--train-data",
                self.path("train_*.bin"), "--val-data", self.path("val.bin"), "--val-every", 6, "--val-batches", 2,
                "--tokenizer", "bytes", "--sample-every", 8, "--sample-tokens", 8, "--prompt", "def ", "--probe", 12,
                *probe, "--save-every", 2, "--out", self.path(name), "--export", self.path(name + ".st"), *more]

    def cut(self, life, name, step, number, *more):
        """A life that is cut by a signal once it has saved `step`."""
        before = self.path("before")
        shutil.rmtree(before, ignore_errors=True)
        if os.path.isdir(self.path(name)):
            copy(self.path(name), before)
        for _ in range(5):  # a busy machine may look too late
            job = self.start(*self.flags(life, name, "--save-async", "--resume", *more))
            while job.process.poll() is None and (checkpoints(self.path(name)) or [0])[-1] < step:
                time.sleep(0.001)
            for pid in job.members():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            self.end(job, -signal.SIGKILL if number == signal.SIGKILL and job.process.wait() else 0)
            if (checkpoints(self.path(name)) or [0])[-1] < STEPS:
                return
            shutil.rmtree(self.path(name))
            if os.path.isdir(before):
                copy(before, self.path(name))
        raise Failure("always ended before the signal came")

    def life(self, life):
        for name in os.listdir(self.dir):
            if os.path.isdir(self.path(name)):
                shutil.rmtree(self.path(name))
        self.run(*self.flags(life, "calm"))
        same_matmuls(self.path("calm"), self.path("run"))
        self.cut(life, "run", 4, signal.SIGKILL)
        self.cut(life, "run", 8, signal.SIGTERM)
        state = os.path.join(checkpoint(self.path("run"), checkpoints(self.path("run"))[-1]), "model.safetensors")
        with open(state, "r+b") as f:  # so that it takes the one before
            f.seek(-100, os.SEEK_END)
            f.write(b"\x55\xaa")
        job = self.run(*self.flags(life, "run", "--resume", "--save-async"))
        expect(len(job.warnings()) == 1, f"not one warning of the damaged checkpoint: {job.err}")
        weights = contents(self.path("calm.st"))
        expect(contents(self.path("run.st")) == weights, "the weights differ from the undisturbed run's")
        expect(log_bits(self.path("run")) == log_bits(self.path("calm")), "the logs differ")

        self.run(*self.model(life), "--seq-len", 24, "--init-from", self.path("calm.st"), "--steps", 0, "--train-data",
                 self.path("train_*.bin"), "--out", self.path("import"), "--export", self.path("import.st"))
        expect(self.args.bf16 or contents(self.path("import.st")) == weights, "import and export change the weights")
        for more in (["--temperature", 0], ["--top-k", 5, "--top-p", 0.9, "--seed", 3]):
            text = self.run("generate", "--checkpoint", self.path("run"), "--prompt", "def f", "--max-tokens", 12,
                            *more)
            expect(text.out.startswith("def f"), f"generate wrote {text.out!r}")
        measured = self.run("eval", "--checkpoint", self.path("run"), "--val-data", self.path("val.bin"))
        expect('"loss"' in measured.out, f"eval wrote {measured.out!r}")

        with open(self.path("short.st"), "wb") as f:
            f.write(weights[:-100])
        with open(self.path("short.bin"), "wb") as f:
            f.write(contents(self.path("train_0.bin"))[:-100])
        for flags in (["--init-from", self.path("short.st")], ["--train-data", self.path("short.bin")], ["--dim", 33]):
            job = self.run(*self.flags(life, "bad", *flags), status=1)
            expect(len(job.lines()) == 1, f"not one line: {job.err}")

    def ranks(self, zero):
        flags = ["--zero", zero, "--check-every", 5, "--timeout", 120, "--probe", 0]
        for name in ("calm", "run"):
            shutil.rmtree(self.path(name), ignore_errors=True)
        self.run(*self.flags("llama simplegpt", "calm", *flags), ranks=2)
        same_matmuls(self.path("calm"), self.path("run"))
        job = self.start(*self.flags("llama simplegpt", "run", "--save-async", *flags), ranks=2)
        while job.process.poll() is None and len(checkpoints(self.path("run"))) < 2:
            time.sleep(0.001)
        job.process.send_signal(signal.SIGUSR1)  # mpirun passes it on
        self.end(job)
        self.run(*self.flags("llama simplegpt", "run", "--resume", *flags), ranks=2)
        expect(contents(self.path("run.st")) == contents(self.path("calm.st")), "the weights differ")

    def leak(self, steps, ranks):
        """Looks at each rank while it trains, and prints how it stood on the way."""
        out = self.path("long")
        job = self.start(*self.flags("llama simplegpt", "long", "--steps", steps, "--log-every", steps, "--val-every",
                                     50, "--sample-every", 100, "--save-every", 25, "--save-async",
                                     "--probe", 0 if ranks > 1 else 200),
                         ranks=ranks if ranks > 1 else 0)
        seen, pids = [], {}
        try:
            while job.process.poll() is None:
                time.sleep(0.1)
                try:
                    with open(os.path.join(out, "log.csv"), "rb") as f:
                        step = f.read().count(b"\n") - 1
                    pids = pids if len(pids) == max(ranks, 1) else job.pids()
                    seen += [(step, rank, *look(pid)) for rank, pid in pids.items()]
                except (OSError, AttributeError):
                    pass  # not begun yet, or gone
        finally:
            self.end(job)
        for rank in sorted(pids):
            rows = [(step, *what) for step, of, *what in seen if of == rank]
            part = lambda a, b: [row for row in rows if steps * a <= row[0] <= steps * b]
            print(f"rank {rank}:  step   VmRSS KiB   files   threads")
            for mark in (0.05, 0.1, 0.2, 0.5, 0.8, 1):
                step, *what = max((row for row in rows if row[0] <= steps * mark), default=rows[0])
                print(f"      {step:8} {what[0]:11} {what[1]:7} {what[2]:9}")
            early, late = part(0.1, 0.2), part(0.9, 1)
            expect(len(early) > 10 and len(late) > 10, "ended too soon to look at")
            most = lambda rows, column: max(row[column] for row in rows)
            growth = most(late, 1) - most(early, 1)
            print(f"      from the second tenth to the last: {growth} KiB")
            expect(growth <= GROWTH, f"rank {rank}: its memory grew by {growth} KiB")
            expect(most(late, 2) <= most(early, 2), f"rank {rank}: more open files at the end than before")
            expect(most(late, 3) <= most(early, 3), f"rank {rank}: more threads at the end than before")

    def test(self, name, body, *rest):
        if self.args.filter not in name:
            return
        begin = time.monotonic()
        try:
            body(*rest)
            self.passed += 1
            print(f"ok {name} ({time.monotonic() - begin:.0f} s)", flush=True)
        except Exception as e:
            self.failed += 1
            print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)

    def all(self):
        if self.args.leak:
            self.test("leak", self.leak, self.args.leak, self.args.ranks)
            return
        for life in list(LIVES)[:1 if self.args.quick else None]:
            self.test(life, self.life, life)
        if not self.args.alone and not self.args.quick:
            for zero in range(4):
                self.test(f"2 ranks, --zero {zero}", self.ranks, zero)


def look(pid):
    """Resident KiB, open files, threads"""
    with open(f"/proc/{pid}/status") as f:
        status = f.read()
    number = lambda key: int(re.search(rf"^{key}:\s+(\d+)", status, re.M).group(1))
    return number("VmRSS"), len(os.listdir(f"/proc/{pid}/fd")), number("Threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_gpt")
    parser.add_argument("--valgrind", action="store_true", help="run it under valgrind's memcheck")
    parser.add_argument("--bf16", action="store_true", help="it is a bf16 build")
    parser.add_argument("--quick", action="store_true", help="one life only")
    parser.add_argument("--alone", action="store_true", help="without mpirun")
    parser.add_argument("--leak", type=int, default=0, metavar="STEPS")
    parser.add_argument("--ranks", type=int, default=1, help="of --leak")
    return run_all("clean_run", Lives, parser)


if __name__ == "__main__":
    sys.exit(main())
