#!/usr/bin/env python3
"""Tests of a disk that fails while the trainer writes (faulty_disk.c): whichever call it is, training goes on, the
checkpoint before stays and loads, and nothing half done has a checkpoint's name. Standard library, gcc and mpirun only.

usage: test_disk.py TRAIN_GPT [--full] [--bf16] [--filter TEXT] [--jobs N]
"""
import errno
import os
import shutil
import subprocess
import sys

from launch import (Failure, Job, Tests, checkpoint, checkpoints, contents, copy, expect, log_bits, read_log, refuse,
                    run, same_matmuls, verify)

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = [("ENOSPC", ""), ("EIO", ""), ("SHORT", ""), ("ENOSPC", "1"), ("SHORT", "1")]  # FAULT_ERRNO, FAULT_STICKY


class DiskTests(Tests):
    SHAPE = ["--dim", 32, "--layers", 1, "--heads", 2, "--vocab-size", 65, "--multiple-of", 8, "--seq-len", 16]

    def __init__(self, args):
        super().__init__(args)
        self.failures = 0
        self.library = self.path("faulty_disk.so")
        subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", self.library,
                        os.path.join(HERE, "faulty_disk.c"), "-ldl"], check=True)

    def flags(self, name, ranks, *more):
        """A short run that saves after steps 2, 4 and 6, its last; all on as many ranks with the same algorithms."""
        batch = 4 // max(ranks, 1)
        same_matmuls(self.timed(*self.SHAPE, "--batch-size", batch), self.path(name))
        return [*self.SHAPE, "--total-batch", 4, "--batch-size", batch, "--steps", 6, "--lr", 1e-3, "--train-data",
                self.path("tokens.bin"), "--save-every", 2, "--keep", 0, "--out", self.path(name), "--export",
                self.path(name + ".st"), *more]

    def faults(self, name, log=False, **more):
        out = self.path(name)
        where = [f"{out}/log.csv"] if log else [f"{out}/.step_", f"{out}/step_", f"{out}/.old_step_", f"{out}$"]
        return {"LD_PRELOAD": self.library, "FAULT_PATH": ":".join(where), **{k: str(v) for k, v in more.items()}}

    def calm(self, ranks, rank, log=False):
        """The calls of a run on a good disk by one rank, with its log and weights."""
        def make():
            name = f"calm{ranks}_{rank}{log}"
            run(self.exe, self.flags(name, ranks), ranks,
                self.faults(name, log, FAULT_RANK=rank, FAULT_LIST=self.path(name + ".calls")))
            with open(self.path(f"{name}.calls.{rank}")) as f:
                calls = [line.split() for line in f]
            return calls, log_bits(self.path(name)), contents(self.path(name + ".st"))
        return self.once(("calm", ranks, rank, log), make)

    def calls_of(self, ranks, rank, step):
        """Numbers of the calls of one checkpoint: from its folder's mkdir to before the next one's."""
        calls = self.calm(ranks, rank)[0]
        begins = [i + 1 for i, (name, path) in enumerate(calls) if name == "mkdir" and "/.step_" in path]
        begins.append(len(calls) + 1)
        expect(len(begins) == 4, f"{len(begins) - 1} checkpoints were written, not 3")
        return range(begins[step // 2 - 1], begins[step // 2])

    def checkpoint_fault(self, ranks, rank, step, call, kind, more):
        """Call number `call`, one of those of the checkpoint of `step`, fails."""
        _, log, weights = self.calm(ranks, rank)
        error, sticky = kind
        name = f"fault_{ranks}_{rank}_{call}_{error}{sticky}{len(more)}"
        out = self.path(name)
        job = Job(self.exe, self.flags(name, ranks, *more), ranks,
                  self.faults(name, FAULT_AT=call, FAULT_ERRNO=error, FAULT_STICKY=sticky, FAULT_RANK=rank)).wait()
        what = f"call {call} ({' '.join(self.calm(ranks, rank)[0][call - 1])}): "
        there = checkpoints(out)
        for s in there:
            state = verify(checkpoint(out, s))
            expect(state["step"] == s, f"{what}{checkpoint(out, s)} is of step {state['step']}")
        expect(set(range(2, step, 2)) <= set(there), f"{what}of those before {step} only {there} are left")
        if not sticky:
            expect(set(there) >= {2, 4, 6} - {step}, f"{what}a later checkpoint is missing: {there}")
        expect(log_bits(out) == log, f"{what}the log is not that of a good disk")
        calls, folder = self.calm(ranks, rank)[0], f"/.step_{step:08d}"
        renames = [i + 1 for i, (c, path) in enumerate(calls) if c == "rename" and path.endswith(folder)]
        named = renames[0] if renames else len(calls)
        c, path = calls[call - 1]
        if call <= named and folder in path and (c, path[-len(folder):]) != ("close", folder):  # else nothing is lost
            expect(step not in there, f"{what}{checkpoint(out, step)} has its name")
        last = 6 not in there or (job.status and step == 6)  # what is there but may not be on the disk is missing
        if job.status == 0:
            expect(6 in there and not job.lines(), f"{what}exit 0, checkpoints {there}: {job.text()}")
            expect(contents(self.path(name + ".st")) == weights, f"{what}the weights differ")
        else:
            expect(last or sticky, f"{what}exit {job.status} with checkpoints {there}: {job.text()}")
            expect(len(job.lines()) == 1 and "last checkpoint" in job.lines()[0], f"{what}not one line: {job.text()}")
            if not sticky:  # the weights go elsewhere
                expect(contents(self.path(name + ".st")) == weights, f"{what}the weights were not exported")
        for s in set(range(2, 7, 2)) - set(there):
            expect(any(f"step {s}:" in w for w in job.warnings()), f"{what}no warning of step {s}: {job.text()}")
        for s in there[:1] if not self.full else there:  # goes on from what the fault has left
            again = copy(out, out + "_again")
            for later in there:
                if later > s:
                    shutil.rmtree(checkpoint(again, later))
            run(self.exe, self.flags(name + "_again", ranks, "--resume"), ranks)
            expect(log_bits(again) == log, f"{what}resumed from {s}: the log differs")
            expect(contents(self.path(name + "_again.st")) == weights, f"{what}resumed from {s}: the weights differ")
            left = [n for n in os.listdir(again) if n.startswith(".") and n != ".lock"]
            expect(checkpoints(again) == [2, 4, 6] and not left, f"{what}resumed: {checkpoints(again)}, left: {left}")
        shutil.rmtree(out)
        shutil.rmtree(out + "_again", ignore_errors=True)

    def checkpoint_faults(self, ranks, rank, step, kind, more, every, phase):
        """Every `every`-th call; the number of calls is only known when a good run has been made."""
        broken = []
        calls = list(self.calls_of(ranks, rank, step))
        for call in calls[phase::every]:
            try:
                self.checkpoint_fault(ranks, rank, step, call, kind, more)
            except Failure as e:
                broken.append(str(e))
            with self.lock:
                self.failures += 1
        expect(not broken, f"{len(broken)} of {len(calls[phase::every])}: " + "; ".join(broken[:5]))

    def log_fault(self, call, kind):
        """A row that the disk does not take is kept, and written when there is room again."""
        error, sticky = kind
        calls, log, weights = self.calm(0, 0, True)
        name = f"log_{call}_{error}{sticky}"
        out = self.path(name)
        job = Job(self.exe, self.flags(name, 0), 0,
                  self.faults(name, True, FAULT_AT=call, FAULT_ERRNO=error, FAULT_STICKY=sticky)).wait()
        what = f"call {call} ({' '.join(calls[call - 1])}): "
        rows = [i + 1 for i, (c, path) in enumerate(calls) if c == "write" and path.endswith("log.csv")]
        expect(len(rows) == 6, f"{len(rows)} rows were written, not 6")
        if call < rows[0]:  # the log cannot even begin
            expect(job.status in (0, 1) and len(job.lines()) == job.status, f"{what}exit {job.status}: {job.text()}")
            expect(job.status == 0 or not checkpoints(out), f"{what}trained without a log")
            return
        expect(job.status == 0 and not job.lines(), f"{what}exit {job.status}: {job.text()}")
        expect(contents(self.path(name + ".st")) == weights, f"{what}the weights differ")
        expect(bool(job.warnings()) == (call <= rows[-1]) and len(job.warnings()) <= 2, f"{what}{job.text()}")
        if not sticky:
            expect(log_bits(out) == log, f"{what}the log is not whole")
        else:
            expect(log[:len(read_log(out))] == log_bits(out) or error == "SHORT", f"{what}the log has other rows")
        run(self.exe, self.flags(name, 0, "--resume"), 0)  # is not confused by it

    def log_faults(self, kind):
        broken = []
        for call in range(1, len(self.calm(0, 0, True)[0]) + 1):
            try:
                self.log_fault(call, kind)
            except Failure as e:
                broken.append(str(e))
        expect(not broken, f"{len(broken)}: " + "; ".join(broken[:5]))

    def export_faults(self, kind, every, phase):
        """Whichever call it is, an export that was there stays, or it is the new one; nothing is left beside it."""
        error, sticky = kind
        weights = self.calm(0, 0)[2]
        name = f"export_{error}{sticky}"
        out, target = self.path(name), self.path(name + ".st")
        faults = {**self.faults(name, FAULT_ERRNO=error, FAULT_STICKY=sticky), "FAULT_PATH": target}
        run(self.exe, self.flags(name, 0), 0, {**faults, "FAULT_LIST": self.path(name + ".calls")})
        with open(self.path(name + ".calls.0")) as f:
            calls = [line.split()[0] for line in f]
        expect(calls[-1] == "rename" and len(calls) > 10, f"an export makes the calls {calls}")
        for call in range(1 + phase, len(calls) + 1, every):
            shutil.rmtree(out)
            with open(target, "w") as f:
                f.write("mine")
            job = Job(self.exe, self.flags(name, 0), 0, {**faults, "FAULT_AT": str(call)}).wait()
            what = f"call {call} ({calls[call - 1]}): "
            if job.status:
                expect(len(job.lines()) == 1 and target in job.lines()[0], f"{what}{job.text()}")
            expect(contents(target) == (b"mine" if job.status else weights), f"{what}exit {job.status}: not as it was")
            # the first two calls try the place before the run begins, and a close then loses nothing
            expect(job.status or calls[call - 1] == "close" and call == 2 or (error == "SHORT" and
                   calls[call - 1] != "write"), f"{what}was not noticed")
            expect(not os.path.exists(target + ".tmp"), f"{what}leaves its .tmp")
            expect(call <= 2 or checkpoints(out) == [2, 4, 6], f"{what}checkpoints {checkpoints(out)}")

    def slow(self, what, ranks, more):
        """Every write takes a tenth of a second, all of them longer than --timeout: slow, but no hang. What is written
        while training goes on is the step's that was saved."""
        name = f"slow_{what}_{ranks}{len(more)}"
        where = {"weights": self.path(name + ".st"), "checkpoint": self.path(name) + "/.step_"}[what]
        flags = ["--timeout", 1.2, *more]
        faults = {**self.faults(name, FAULT_ERRNO="SLOW", FAULT_RANK=0), "FAULT_PATH": where}
        job = run(self.exe, self.flags(name, ranks, *flags), ranks, faults)
        self.note("seconds of a run whose disk is slow", job.seconds)
        expect(job.seconds > 1.9, f"{job.seconds:.1f} s: the disk was not slow")
        expect(contents(self.path(name + ".st")) == self.calm(ranks, 0)[2], "the weights differ")
        for step in (2, 4, 6):
            want = checkpoint(self.path(f"calm{ranks}_0False"), step)
            for file in os.listdir(want):
                got = contents(os.path.join(checkpoint(self.path(name), step), file))
                expect(got == contents(os.path.join(want, file)), f"step {step}: {file} differs")

    def hangs(self, rank, more):
        """One rank's disk never answers: the job ends, and says who."""
        call = list(self.calls_of(2, rank, 4))[5]
        name = f"hangs_{rank}{len(more)}"
        error = refuse(self.exe, self.flags(name, 2, "--timeout", 1.5, *more), 2,
                       self.faults(name, FAULT_ERRNO="HANG", FAULT_AT=call, FAULT_RANK=rank), limit=30)
        expect(f"rank {rank} " in error and "hangs at step" in error and "saving" in error, error)
        expect(2 in checkpoints(self.path(name)) and 4 not in checkpoints(self.path(name)), "not the checkpoint of 2")

    def folders(self, error):
        """A file system that cannot sync a folder (FUSE, NFS): one warning; one whose disk fails: no checkpoint."""
        name = f"folders_{error}"
        job = Job(self.exe, self.flags(name, 0), 0, self.faults(name, FAULT_FOLDERS=error)).wait()
        there, warnings = checkpoints(self.path(name)), job.warnings()
        if error == errno.EIO:
            expect(job.status == 1 and not there and len(warnings) == 3, f"{job.status}, {there}: {job.text()}")
            return
        expect(job.status == 0 and there == [2, 4, 6], f"{job.status}, {there}: {job.text()}")
        expect(len(warnings) == 1 and "cannot sync a folder (" + os.strerror(error) in warnings[0], job.text())

    def all(self):
        full, test = self.full, self.test
        modes = (("", ()), (", --save-async", ("--save-async",)))
        times = lambda kind: f"{'from then on' if kind[1] else 'once'} {kind[0]}"
        if full:
            for mode, more in modes:
                for kind in KINDS:
                    for step in (4, 6):
                        for ranks, rank in ((0, 0), (2, 0), (2, 1)) if kind[0] == "ENOSPC" else ((0, 0),):
                            for phase in range(3):  # in pieces, so that they share the cores
                                test(f"step {step}, {times(kind)}, rank {rank} of {max(ranks, 1)}{mode}, part {phase}",
                                     self.checkpoint_faults, ranks, rank, step, kind, more, 3, phase)
        else:  # every call of a checkpoint, in the foreground and not; kinds and steps take turns
            for i, kind in enumerate(KINDS):
                for j, (mode, more) in enumerate(modes):
                    step = (4, 6)[(i + j) % 2]
                    test(f"step {step}, {times(kind)}{mode}", self.checkpoint_faults, 0, 0, step, kind, more, 5,
                         (i + j) % 5)
            late = ("--save-async",)
            for i, (rank, step, more) in enumerate(((0, 4, ()), (0, 6, late), (1, 4, late), (1, 6, ()))):
                test(f"step {step}, rank {rank} of 2, {KINDS[i][0]}", self.checkpoint_faults, 2, rank, step, KINDS[i],
                     more, 16, 5 + i)
        for i, kind in enumerate(KINDS):
            test(f"log.csv, {times(kind)}", self.log_faults, kind)
            test(f"export, {times(kind)}", self.export_faults, kind, 1 if full else 4, 0 if full else i % 4)
        for mode, more in modes:
            test(f"a slow disk, checkpoint{mode}", self.slow, "checkpoint", 2, more)
            for rank in (0, 1):
                test(f"a disk of rank {rank} that hangs{mode}", self.hangs, rank, more)
        test("a slow disk, weights", self.slow, "weights", 2, ())
        for error in (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO):
            test(f"folders, {errno.errorcode[error]}", self.folders, error)

    def report(self):
        super().report()
        print(f"{self.failures} calls failed in checkpoints")


if __name__ == "__main__":
    sys.exit(DiskTests.main("test_disk", __doc__))
