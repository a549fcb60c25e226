#!/usr/bin/env python3
"""Tests of faults from outside: CUDA calls that fail, memory that runs out, files that are not what they should be, links
in the place of checkpoints. dev/doc/faults.md has the table; every test that it names must exist. Standard library only.

usage: test_faults.py TRAIN_GPT [--full] [--bf16] [--filter TEXT] [--jobs N]
"""
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

from launch import (Failure, Job, MPI_ENV, Tests, checkpoint, checkpoints, contents, copy, expect, log_bits, read_safetensors,
                    refuse, run, same_matmuls, verify, WARNING, write_safetensors, write_shard, xxh64)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CALL = re.compile(r"((?:train_gpt|simplenorm|dev/(?:device|run|use)/\w+)\.(?:cu|cuh|h)):\d+: (cuda|cublas|nccl)\w*.*: ")
# Python tools: program, the input that is of another kind, arguments ({}: their folder)
TOOLS = [
    ("look/plot.py", "log.csv", "{}", "--out", "{}/loss.png"),
    ("look/plot_probe.py", "activations.csv", "{}", "--out", "{}/probe.png"),
    ("look/export_log.py", "log.csv", "{}", "--tensorboard", "{}/tb"),
    ("look/sweep.py", "sweep.json", "{}", "--report"),
    ("hf/export.py", "weights.st", "{}/weights.st", "{}/hf"),
    ("hf/import.py", "config.json", "{}", "{}/out.st"),
    ("hf/import.py", "model.safetensors.index.json", "{}", "{}/out.st"),
    ("data/prepare.py", "text.jsonl", "{}/text.jsonl", "--out", "{}/data"),
    ("data/prepare.py", "tokens.model", "{}/good.txt", "--tokenizer", "{}/tokens.model", "--out", "{}/data"),
    ("data/prepare.py", "text_manifest.json", "--verify", "--out", "{}"),
    ("data/hellaswag.py", "q.jsonl", "{}/q.jsonl", "--out", "{}/q.bin"),
    ("data/convert_tokenizer.py", "t.model", "{}/t.model", "{}/t.bin"),
]
KINDS = ["absent", "directory", "pipe", "empty", "garbage", "link to nothing", "link to itself", "unreadable"]


def is_fault(line):
    """Whether a line names the call that failed, or what it was for."""
    return bool(CALL.search(line)) or "device: no CUDA device" in line or "memory: the plan needs" in line


class FaultTests(Tests):
    def flags(self, name, *more, steps=4, ranks=1):
        return ["--dim", 32, "--layers", 1, "--heads", 2, "--vocab-size", 258, "--tokenizer", "bytes", "--multiple-of", 16,
                "--seq-len", 16, "--total-batch", 4, "--batch-size", 4 // ranks, "--steps", steps, "--lr", 1e-3,
                "--train-data", self.path("tokens.bin"), "--val-data", self.path("tokens.bin"), "--val-every", 2,
                "--val-batches", 1, "--save-every", 1, "--keep", 0, "--out", self.path(name), *more]

    def begun(self, ranks=0):
        """A run of 4 steps that was killed behind step 2, and the log and weights of one that was not."""
        def make():
            calm, half = self.path(f"calm{ranks}"), self.path(f"half{ranks}")
            run(self.exe, self.flags(f"calm{ranks}", ranks=max(1, ranks)), ranks)
            copy(calm, half)
            for step in (3, 4):
                shutil.rmtree(checkpoint(half, step))
            return half, log_bits(calm), self.weights(calm)
        return self.once(("begun", ranks), make)

    def weights(self, out):
        folder = checkpoint(out, 4)
        return [contents(os.path.join(folder, f)) for f in sorted(os.listdir(folder)) if f.startswith("model")]

    # --- CUDA, cuBLASLt and NCCL: every call in turn

    def calls(self, flags, prepare, ranks=0, **env):
        """How many calls a run makes: the first number that no call has, which ends well."""
        def well(n):
            prepare()
            return Job(self.exe, flags, ranks, {"CUDA_CPU_FAIL": str(n), **env}).wait().status == 0
        high = 64
        while not well(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if well(middle) else (middle, high)
        return low

    def training(self, number, how, mode, ranks=0, rank=None):
        """Call `number` fails while training goes on from step 2."""
        half, log, weights = self.begun(ranks)
        name = f"fault{ranks}_{number}_{how}{mode}"
        out = copy(half, self.path(name))
        old = {s: {f: contents(os.path.join(checkpoint(out, s), f)) for f in os.listdir(checkpoint(out, s))} for s in (1, 2)}
        flags = self.flags(name, "--resume", *(["--save-async"] if mode else []), ranks=max(1, ranks))
        env = {"CUDA_CPU_FAIL": f"{number},once" if how == "once" else str(number)}
        if rank is not None:
            env["CUDA_CPU_FAIL_RANK"] = str(rank)
        job = Job(self.exe, flags, ranks, env).wait()
        what = f"call {number} {how}: "
        # a checkpoint that cannot be copied from the device is given up with a warning, as on a full disk
        if job.status == 0:
            expect(how == "once" and not job.lines(), f"{what}exit 0: {job.text()}")
            expect(all(CALL.search(w) or "saving in the foreground" in w for w in job.warnings()), f"{what}{job.text()}")
        else:
            expect(job.status == 1 or ranks, f"{what}exit {job.status}: {job.text()}")
            expect(len(job.lines()) == 1 and is_fault(job.lines()[0]), f"{what}not one line that names it: {job.text()}")
            expect("Give," not in job.lines()[0], f"{what}advice without an option: {job.text()}")
            if rank:
                expect(f"rank {rank}" in job.lines()[0], f"{what}the rank is not named: {job.text()}")
        for s, files in old.items():
            for f, data in files.items():
                expect(contents(os.path.join(checkpoint(out, s), f)) == data, f"{what}{f} of step {s} was changed")
        for s in checkpoints(out):
            expect(verify(checkpoint(out, s))["step"] == s, f"{what}checkpoint {s} is not whole")
        run(self.exe, self.flags(name, "--resume", ranks=max(1, ranks)), ranks)
        expect(log_bits(out) == log and self.weights(out) == weights, f"{what}resumed, the run ends otherwise")
        shutil.rmtree(out)

    def training_calls(self, how, mode, every, phase):
        half = self.begun()[0]
        name = f"count_{how}{mode}{phase}"
        flags = self.flags(name, "--resume", *(["--save-async"] if mode else []))
        prepare = lambda: (shutil.rmtree(self.path(name), ignore_errors=True), copy(half, self.path(name)))
        last = self.once(("calls", mode), lambda: self.calls(flags, prepare))
        expect(last > 300, f"only {last} calls were counted")
        self.each(range(1 + phase, last + 1, every), lambda n: self.training(n, how, mode))

    def ranks_calls(self, every):
        half = self.begun(2)[0]
        prepare = lambda: (shutil.rmtree(self.path("count2"), ignore_errors=True), copy(half, self.path("count2")))
        flags = self.flags("count2", "--resume", ranks=2)
        last = self.calls(flags, prepare, 2, CUDA_CPU_FAIL_RANK="1") if self.full else 700
        self.each(range(30, last, every), lambda n: self.training(n, "on", "", 2, n % 2))

    def each(self, numbers, body):
        broken = []
        for n in numbers:
            try:
                body(n)
            except Failure as e:
                broken.append(str(e))
        expect(not broken, f"{len(broken)} of {len(numbers)}: " + "; ".join(broken[:3]))

    def generating_calls(self, every):
        ask = ["generate", "--checkpoint", self.begun()[0], "--prompt", "a", "--max-tokens", 3, "--temperature", 0]
        last = self.calls(ask, lambda: None)
        expect(last > 60, f"only {last} calls were counted")

        def one(n):
            for how in ("", ",once"):
                job = Job(self.exe, ask, 0, {"CUDA_CPU_FAIL": f"{n}{how}"}).wait()
                expect(job.status == 1 or how, f"call {n}: exit {job.status}: {job.text()}")
                if job.status:
                    expect(job.status == 1 and len(job.lines()) == 1 and is_fault(job.lines()[0]), f"call {n}: {job.text()}")
        self.each(range(1, last + 1, every), one)

    # --- memory

    def host_memory(self, every):
        """Address space that is too small, from where the program can begin at all."""
        train = [self.exe, *map(str, self.flags("tight"))]
        env = {**os.environ, **MPI_ENV, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

        def limited(mib, ask=train):
            def limit():
                resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            shutil.rmtree(self.path("tight"), ignore_errors=True)
            return subprocess.run(ask, preexec_fn=limit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  errors="replace", env=env, timeout=60)

        refused = 0
        begins = next(mib for mib in range(32, 2000, 4) if limited(mib, [self.exe, "--help"]).returncode == 0)
        for mib in range(begins, 2000, every):
            done = limited(mib)
            if done.returncode == 0:
                break
            mine = [line for line in done.stderr.splitlines() if line.startswith("train_gpt: ")]
            expect("bad_alloc" not in done.stderr, f"{mib} MiB: {done.stderr[-300:]}")
            mine = [line for line in mine if not line.startswith(WARNING)]  # of checkpoints, as on a full disk
            expect(done.returncode == 1 and len(mine) == 1, f"{mib} MiB: exit {done.returncode}: {done.stderr[-300:]}")
            expect(re.search("memory|ALLOC_FAILED|threads: no more", mine[0]), f"{mib} MiB: {mine[0]}")
            refused += 1
        expect(refused > 0, "memory never ran out")

    def no_thread(self):
        """A limit of processes that leaves none to a thread: the loader's is the first."""
        line = self.refused_as_nobody(self.flags("never"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)))
        expect(line.startswith("train_gpt: threads: no more can be started"), line)
        if os.geteuid():
            return  # who has other processes already
        # two loaders' fit beside main's, the writer's does not: it saves in the foreground
        os.mkdir(self.path("crowded"))
        os.chmod(self.path("crowded"), 0o777)
        done = self.as_nobody(self.flags("crowded/run", "--save-async"), user=64999,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NPROC, (3, 3)))
        expect(done.returncode == 0 and checkpoints(self.path("crowded/run")) == [1, 2, 3, 4], done.stderr)
        expect(done.stderr.count("saving in the foreground") == 4 == done.stderr.count("\n"), done.stderr)

    def device_memory(self):
        line = refuse(self.exe, self.flags("large", "--dim", 8192, "--layers", 2000, "--heads", 64))
        expect("memory: the plan needs" in line and ("Give" in line or "smaller model" in line), line)

    def device(self, what, *words):
        """A device that cannot be used is named before anything is made."""
        line = refuse(self.exe, self.flags("no_device"), env={"CUDA_CPU_DEVICE": what})
        expect(all(word in line for word in words) and not os.path.exists(self.path("no_device")), line)

    # --- files

    def make(self, kind, path, good):
        """What stands at `path` instead of a good file."""
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        if kind == "directory":
            os.mkdir(path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "empty":
            open(path, "w").close()
        elif kind == "garbage":
            with open(path, "wb") as f:
                f.write(bytes(i * 151 % 256 for i in range(3000)))
        elif kind == "nested":
            with open(path, "w") as f:
                f.write("[" * 100000)
        elif kind == "device":
            os.symlink("/dev/null", path)
        elif kind == "link to nothing":
            os.symlink("nowhere", path)
        elif kind == "link to itself":
            os.symlink(os.path.basename(path), path)
        elif kind == "unreadable":
            shutil.copyfile(good, path)
            os.chmod(path, 0)

    def file(self, kind, what):
        """A file that a flag names is of some other kind: one line names it, at once, and nothing begins."""
        good = os.path.join(checkpoint(self.begun()[0], 2), "model.safetensors")
        path = self.path(f"{kind.replace(' ', '_')}_{what[0].lstrip('-')}")
        self.make(kind, path, good)
        flags = [*what[1], what[0], path] if what[1] else self.flags("never", what[0], path)
        os.makedirs(self.path("never"), exist_ok=True)
        os.chmod(self.path("never"), 0o777)
        line = self.refused_as_nobody(flags) if kind == "unreadable" else refuse(self.exe, flags, limit=20)
        expect(os.path.basename(path) in line, line)
        expect(not os.path.exists(self.path("never/log.csv")), "the run has begun")

    def as_nobody(self, flags, user=65534, **more):
        """A run without root's rights."""
        exe = self.exe
        if os.geteuid() == 0:
            exe = self.path("as_nobody")
            more.update(user=user, group=65534, extra_groups=[])
            if not os.path.exists(exe):
                shutil.copy(self.exe, exe)
                os.chmod(exe, 0o755)
                os.chmod(self.dir, 0o755)
        return subprocess.run([exe, *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, **MPI_ENV, "OPENBLAS_NUM_THREADS": "1"}, **more)

    def refused_as_nobody(self, flags, **more):
        """Its one line."""
        done = self.as_nobody(flags, **more)
        lines = done.stderr.splitlines()
        expect(done.returncode == 1 and len(lines) == 1, f"exit {done.returncode}: {done.stderr}")
        return lines[0]

    def checkpoint_file(self, kind, name):
        """A file of the newest checkpoint is of some other kind: it is put aside, the one before it is taken."""
        half, log, weights = self.begun()
        run_name = f"kind_{kind.replace(' ', '_')}_{name}"
        out = copy(half, self.path(run_name))
        path = os.path.join(checkpoint(out, 2), name)
        self.make(kind, path, path)
        job = run(self.exe, self.flags(run_name, "--resume"), limit=30)
        expect(len(job.warnings()) == 1 and name in job.warnings()[0] and "put aside" in job.warnings()[0], job.text())
        expect(log_bits(out) == log and self.weights(out) == weights, "the run ends otherwise")
        expect(os.path.isdir(os.path.join(out, "damaged_step_00000002")), "it was not put aside")

    def table_file(self, kind, name):
        """log.csv or matmul.txt of a run that goes on is no file of ours."""
        out = copy(self.begun()[0], self.path(f"table_{kind.replace(' ', '_')}_{name}"))
        self.make(kind, os.path.join(out, name), "")
        line = refuse(self.exe, self.flags(os.path.basename(out), "--resume"), limit=20)
        expect(name in line, line)

    def names(self):
        """state.json with names that lead elsewhere, sealed with a checksum that holds: nothing there is touched."""
        for bad in ("../outside", "/etc/passwd", "..", "sub/file"):
            out = copy(self.begun()[0], self.path("names"))
            with open(self.path("outside"), "w") as f:
                f.write("mine")
            path = os.path.join(checkpoint(out, 2), "state.json")
            text = contents(path).decode()
            head = text[:text.rindex('  "checksum"')].replace('"model.safetensors"', json.dumps(bad))
            with open(path, "w") as f:
                f.write(f'{head}  "checksum": "{xxh64(head.encode()):016x}"\n}}\n')
            job = run(self.exe, self.flags("names", "--resume"), limit=30)
            expect(len(job.warnings()) == 1 and "put aside" in job.warnings()[0], job.text())
            expect(contents(self.path("outside")) == b"mine" and os.path.exists("/etc/passwd"), "it was touched")
            shutil.rmtree(out)

    def linked_checkpoint(self):
        """A checkpoint moved away and linked is read through the link; pruning takes the link, never what it names."""
        out = copy(self.begun()[0], self.path("linked"))
        away = self.path("archive")
        os.rename(checkpoint(out, 2), away)
        os.symlink(away, checkpoint(out, 2))
        flags = self.flags("linked", "--resume")
        flags[flags.index("--keep") + 1] = 1
        job = run(self.exe, flags)
        expect(f"resumed from {checkpoint(out, 2)}" in job.out, job.out)
        expect(checkpoints(out) == [4], f"{checkpoints(out)} are left")
        expect(verify(away)["step"] == 2, "what the link named was pruned")

    def linked_leftover(self):
        out = copy(self.begun()[0], self.path("leftover"))
        os.mkdir(self.path("precious"))
        open(self.path("precious/file"), "w").close()
        os.symlink(self.path("precious"), os.path.join(out, ".step_00000003"))
        run(self.exe, self.flags("leftover", "--resume"))
        expect(os.path.exists(self.path("precious/file")), "what a leftover link named was emptied")

    def misleading_weights(self, name, header, data, words):
        path = self.path(name + ".st")
        text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
        with open(path, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + data)
        line = refuse(self.exe, self.flags("never", "--init-from", path), limit=20)
        for word in [name + ".st", *words]:
            expect(word in line, f"'{word}' is missing in: {line}")

    def linked_files(self):
        """Weights are read through links, as in a cache of downloads; pruning takes the links and leaves what they name."""
        out, away, folder = copy(self.begun()[0], self.path("links")), self.path("away.st"), self.path("cache")
        os.rename(os.path.join(checkpoint(out, 2), "model.safetensors"), away)
        os.symlink(away, os.path.join(checkpoint(out, 2), "model.safetensors"))
        flags = self.flags("links", "--resume")
        flags[flags.index("--keep") + 1] = 1
        before = contents(away)
        job = run(self.exe, flags)
        expect(f"resumed from {checkpoint(out, 2)}" in job.out and not job.warnings(), job.text())
        expect(checkpoints(out) == [4] and contents(away) == before, "what the link named was touched")
        os.mkdir(folder)
        os.symlink(away, os.path.join(folder, "model.safetensors"))
        run(self.exe, self.flags("from_links", "--init-from", folder, steps=1))

    def damaged_twice(self):
        """A damaged checkpoint is not thrown away where it cannot be put aside."""
        out = copy(self.begun()[0], self.path("twice"))
        os.makedirs(os.path.join(out, "damaged_step_00000002", "notes"))
        self.make("empty", os.path.join(checkpoint(out, 2), "model.safetensors"), "")
        there = sorted(os.listdir(checkpoint(out, 2)))
        line = refuse(self.exe, self.flags("twice", "--resume"))
        expect("step_00000002: cannot be put aside" in line and "Directory not empty" in line, line)
        expect(sorted(os.listdir(checkpoint(out, 2))) == there, "it lost files")

    def other_data(self):
        copy(self.begun()[0], self.path("other"))
        write_shard(self.path("other.bin"), [i % 60 for i in range(3000)])
        flags = self.flags("other", "--resume")
        flags[flags.index("--train-data") + 1] = self.path("other.bin")
        job = run(self.exe, flags)
        expect(len(job.warnings()) == 1 and f"{self.path('other.bin')} (was" in job.warnings()[0] and
               "), 176 windows of data (was 3529); steps 1 to 2 were" in job.warnings()[0], job.text())

    def not_readable(self):
        """A checkpoint that this user may not read is not damaged: the run ends, and it keeps its name."""
        out = copy(self.begun()[0], self.path("not_readable"))
        for path in (out, os.path.join(out, "log.csv"), checkpoint(out, 1), checkpoint(out, 2)):
            os.chmod(path, 0o777)
        os.chmod(os.path.join(checkpoint(out, 2), "model.safetensors"), 0)
        line = self.refused_as_nobody(self.flags("not_readable", "--resume"))
        expect("step_00000002/model.safetensors: cannot be read: Permission denied" in line, line)
        expect(checkpoints(out) == [1, 2], f"checkpoints {checkpoints(out)}")

    def other_step(self):
        """A checkpoint under another step's name would outlive all that are saved after it: it is put aside."""
        out = copy(self.begun()[0], self.path("other_step"))
        os.rename(checkpoint(out, 2), checkpoint(out, 9))
        flags = self.flags("other_step", "--resume")
        flags[flags.index("--keep") + 1] = 1
        job = run(self.exe, flags)
        expect(len(job.warnings()) == 1 and "step_00000009: holds step 2" in job.warnings()[0], job.text())
        expect(checkpoints(out) == [4] and self.weights(out) == self.begun()[2], f"{checkpoints(out)} are left")

    def two_lines(self):
        """A folder whose name has a line break does not make two lines of a warning."""
        out = copy(self.begun()[0], self.path("two\nlines"))
        os.truncate(os.path.join(checkpoint(out, 2), "model.safetensors"), 9)
        job = run(self.exe, self.flags("two\nlines", "--resume"))
        expect(job.err.count("\n") == 1 and job.err.startswith(WARNING), job.err)

    def own_table(self):
        """A log.csv that is somebody's own is not written over by a new run."""
        os.mkdir(self.path("own"))
        with open(self.path("own/log.csv"), "w") as f:
            f.write("my,table\n1,2\n")
        line = refuse(self.exe, self.flags("own"))
        expect("own/log.csv: is no table of this version" in line, line)
        expect(contents(self.path("own/log.csv")) == b"my,table\n1,2\n", "it was written over")

    def threads(self):
        ask = ["generate", "--checkpoint", self.begun()[0], "--max-tokens", 1]
        run(self.exe, ask, env={"OMP_NUM_THREADS": "100000"})

    def weights_not_finite(self, value):
        good = os.path.join(checkpoint(self.begun()[0], 2), "model.safetensors")
        tensors, metadata = read_safetensors(good)
        dtype, shape, data = tensors["norm.weight"]
        tensors["norm.weight"] = (dtype, shape, struct.pack("<f", value) + data[4:])
        path = self.path(f"{value}.st")
        write_safetensors(path, tensors, metadata)
        line = refuse(self.exe, self.flags(f"weights_{value}", "--init-from", path, "--max-bad-steps", 2))
        expect("not finite in 2 steps" in line, line)
        job = Job(self.exe, self.flags(f"weights_{value}_again", "--init-from", path, "--max-bad-steps", 2)).wait()
        expect(len(job.warnings()) == 1 and f"{path}: norm.weight holds values" in job.warnings()[0], job.text())
        shape = self.flags("")[:12]
        job = Job(self.exe, ["generate", "--init-from", path, *shape, "--prompt", "a", "--max-tokens", 3]).wait()
        expect(job.status == 1 and "logits are not finite" in job.lines()[-1], job.text())

    def shard_during_run(self, kind):
        """A shard that is there when the run begins and then is not what it was. It holds the later half of the data."""
        name = f"shard_{kind}"
        for part in (0, 1):
            write_shard(self.path(f"{name}_{part}.bin"), [i * i % 60 for i in range(3000)])
        flags = self.flags(name, steps=10**7)
        for flag, value in (("--train-data", self.path(f"{name}_*.bin")), ("--save-every", 10**6), ("--val-every", 10**6)):
            flags[flags.index(flag) + 1] = value
        job = Job(self.exe, flags)
        self.appears(f"{name}/log.csv")
        path = self.path(f"{name}_1.bin")
        os.rename(path, path + ".old")
        if kind == "shorter":
            write_shard(path, [1] * 30)
        elif kind != "absent":
            self.make(kind, path, "")
        job.wait(60)
        expect(job.status == 1 and len(job.lines()) == 1 and path in job.lines()[0], f"{job.status}: {job.text()}")
        expect("Illegal" not in job.lines()[0], job.text())

    def full_table(self):
        """A limit of file sizes is a full disk to the probe's tables, which end with whole rows."""
        self.begun()
        same_matmuls(self.path("calm0"), self.path("table"))
        flags = self.flags("table", "--probe", 1, "--probe-batches", 1, "--probe-iterations", 0)
        flags[flags.index("--save-every") + 1] = 0
        ask = [self.exe, *map(str, flags)]
        done = subprocess.run(ask, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **MPI_ENV},
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)))
        lines = done.stderr.splitlines()
        expect(done.returncode == 0 and lines, f"exit {done.returncode}: {done.stderr}")
        said = r"warning.*/(activations|weights).csv: cannot be written: File too large"
        expect(all(re.search(said, line) for line in lines), done.stderr)
        for table in ("activations", "weights"):
            rows = contents(self.path(f"table/{table}.csv"))
            expect(0 < len(rows) <= 600 and rows.endswith(b"\n"), f"{table} ends with {rows[-80:]!r}")

    def matmul_file(self):
        """Choices of algorithms that are not there, not whole, refused or another machine's are made again, with a line;
        the others stay."""
        several, name = {"CUBLASLT_CPU_ALGORITHMS": "3"}, "algorithms"
        file = self.path(name + "/matmul.txt")

        def lacks(step, *more):
            said = run(self.exe, self.flags(name, *more, steps=step), env=several).out
            return [int(n) for n in re.findall(r"matmul.txt: lacks (\d+) matmuls of this run on this machine", said)]

        def without(key):
            return {line for line in contents(file).splitlines() if not line.startswith(key)}

        expect(lacks(1) == [], "a new run lacks choices")
        good = contents(file)
        machine, first, *rest = good.splitlines(True)
        words = first.split()  # "algorithm", the shape's six, the algorithm's eight
        every, key = 1 + len(rest), b" ".join(words[:7]) + b" "
        unknown, strange = (b" ".join([*words[:7 + i], b"f", *words[8 + i:]]) + b"\n" for i in (0, 7))
        others = [machine.replace(a, b) for a, b in ((b" 0,", b" 1,"), (b", 16 ", b", 17 "), (b"\n", b"16\n"),
                                                     (b"fp32", b"bf16") if b"fp32" in machine else (b"bf16", b"fp32"))]
        others.append(machine[:12] + b"x" + machine[12:])  # another name
        for step, (text, most) in enumerate([
                (good, 0), (None, every), (b"", every), (good[:-9], every), (machine + b"".join(rest), 1),
                (machine + unknown + b"".join(rest), 1), (machine + strange + b"".join(rest), 1),
                *((other + first + b"".join(rest), every) for other in others)], 2):
            what = f"step {step}, {text and text[:400]}: "
            if text is None:
                os.remove(file)
            else:
                with open(file, "wb") as f:
                    f.write(text)
            found = lacks(step, "--resume")
            expect(found == [most] * (most > 0), f"{what}lacks {found}, not {most}")
            expect(contents(file).startswith(machine) and contents(file).count(b"\n") == 1 + every, f"{what}{contents(file)}")
            if most == 1:
                expect(without(key) == set((machine + b"".join(rest)).splitlines()), f"{what}others were chosen again")
            if most == 0:
                expect(contents(file) == good, "it was written again")

    def export_kind(self, kind):
        """What is no file is not replaced by one."""
        path = self.path(f"export_{kind}.st")
        self.make(kind, path, "")
        before = os.lstat(path)
        line = refuse(self.exe, self.flags("never", "--export", path))
        expect(f"{path}: is a folder, a pipe or a device" in line, line)
        expect(os.lstat(path).st_ino == before.st_ino and not os.path.exists(path + ".tmp"), "it was touched")
        expect(not os.path.exists(self.path("never/log.csv")), "the run has begun")

    def export_beside(self, kind):
        """What has the name under which an export is written is not written to."""
        path, other = self.path(f"beside_{kind}.st"), self.path("other.txt")
        with open(other, "w") as f:
            f.write("mine")
        self.make("pipe", path + ".tmp", "") if kind == "pipe" else os.symlink(other, path + ".tmp")
        run(self.exe, self.flags(f"beside_{kind}", "--export", path, steps=1), limit=60)
        with open(other) as f:
            expect(f.read() == "mine", "a link was followed")
        expect(read_safetensors(path)[0] and not os.path.lexists(path + ".tmp"), "no export")

    def huge_file(self, name):
        """A file of a checkpoint that has grown to 1 TiB, sparse: seen by its size, without reading it."""
        out = copy(self.begun()[0], self.path("huge_" + name))
        os.truncate(os.path.join(checkpoint(out, 2), name), 1 << 40)
        begun = time.monotonic()
        job = run(self.exe, self.flags("huge_" + name, "--resume"))
        expect(time.monotonic() - begun < 30, "it was read")
        expect(len(job.warnings()) == 1 and f"step_00000002/{name}: " in job.warnings()[0], job.text())
        expect(("is larger than 1 GiB" if name == "state.json" else "has 1099511627776 bytes") in job.warnings()[0], job.text())
        shutil.rmtree(out)

    def prompt_file(self):
        line = refuse(self.exe, ["generate", "--checkpoint", self.begun()[0], "--prompt-file", self.dir])
        expect(f"{self.dir}: cannot be read to its end: Is a directory" in line, line)

    def full_stdout(self, name, ask, status):
        """Text that does not arrive is an error of who is asked for text; a training goes on."""
        self.begun()
        with open("/dev/full", "w") as full:
            done = subprocess.run([self.exe, *map(str, ask)], stdout=full, stderr=subprocess.PIPE, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("train_gpt: ")]
        expect(done.returncode == status and len(lines) == status, f"{done.returncode}: {done.stderr}")
        expect(not status or lines[0] == "train_gpt: stdout: cannot be written: No space left on device.", done.stderr)

    def closed(self, which):
        """Of stdin, stdout and stderr, the ones in `which` are closed: no file gets their numbers, and what is printed."""
        name = "closed" + "".join(map(str, which))

        def close():
            for fd in which:
                os.close(fd)
        flags = self.flags(name, steps=10**7)
        flags[flags.index("--save-every") + 1] = 10**6
        process = subprocess.Popen([self.exe, *map(str, flags)], preexec_fn=close, stdout=subprocess.DEVNULL,
                                   env={**os.environ, **MPI_ENV})
        try:
            self.appears(f"{name}/log.csv")
            files = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in which]
            process.terminate()
            expect(process.wait(30) == 0, f"exit {process.returncode}")
        finally:
            process.kill()
            process.wait()
        expect(files == ["/dev/null"] * len(which), f"the numbers {which} are those of {files}")
        expect(len(checkpoints(self.path(name))) == 1, "nothing was saved")

    def reader_gone(self):
        """Who read the lines is gone, as tee at Ctrl-C: training does not end by that."""
        _, log, weights = self.begun()
        same_matmuls(self.path("calm0"), self.path("gone"))
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run([self.exe, *map(str, self.flags("gone"))], stdout=write, stderr=write,
                                  env={**os.environ, **MPI_ENV})
        finally:
            os.close(write)
        expect(done.returncode == 0, f"exit {done.returncode}")
        expect(log_bits(self.path("gone")) == log and self.weights(self.path("gone")) == weights, "the run ends otherwise")

    def appears(self, name):
        end = time.monotonic() + 30
        while not os.path.exists(self.path(name)) and time.monotonic() < end:
            time.sleep(0.01)

    # --- the tools

    def tool(self, kind, number):
        """A Python tool whose input is of some other kind: one line, at once, without a traceback."""
        program, name, *ask = TOOLS[number]
        folder = self.path(f"tool_{number}_{kind.replace(' ', '_')}")
        os.mkdir(folder)
        with open(os.path.join(folder, "good.txt"), "w") as f:
            f.write("a text\n")
        self.make(kind, os.path.join(folder, name), "")
        done = subprocess.run([sys.executable, os.path.join(ROOT, "dev", program), *(a.format(folder) for a in ask)],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              cwd=self.dir, timeout=30)
        lines = done.stderr.splitlines()
        expect(done.returncode == 1 and len(lines) == 1, f"exit {done.returncode}: {done.stderr}")
        expect(folder in lines[0], lines[0])

    def interrupted(self, program, module):
        """Ctrl-C while a tool waits, for a module that loads or for a file: it ends at once, without a traceback."""
        folder = self.path("interrupted_" + program.replace("/", "_"))
        os.mkdir(folder)
        pipe = os.path.join(folder, "pipe")
        os.mkfifo(pipe)
        if module:
            with open(os.path.join(folder, module + ".py"), "w") as f:
                f.write(f"open({pipe!r}).read()\n")
        ask = [sys.executable, os.path.join(ROOT, "dev", program), pipe, os.path.join(folder, "out")]
        process = subprocess.Popen(ask, env={**os.environ, "PYTHONPATH": folder}, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # once it reads
                break
            except OSError:
                time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        try:
            error = process.communicate(timeout=20)[1]
        finally:
            process.kill()
            os.close(fd)
        expect(process.returncode == -signal.SIGINT and not error, f"{process.returncode}: {error}")

    def out_without_rights(self):
        os.makedirs(self.path("locked"), exist_ok=True)
        os.chmod(self.path("locked"), 0o555)
        line = self.refused_as_nobody(self.flags("locked/run"))
        expect("locked/run" in line and "Permission denied" in line, line)

    def table(self):
        """dev/doc/faults.md names tests that are there."""
        with open(os.path.join(ROOT, "dev", "doc", "faults.md")) as f:
            named = re.findall(r"`(\w+\.(?:py|cu|cpp))(?: ([^`]+))?`", f.read())
        expect(len(named) > 30, f"only {len(named)} tests are named")
        for file, test in named:
            where = [os.path.join(ROOT, d, file) for d in ("", "dev/test", "dev/cpu", "dev/fuzz")]
            there = [p for p in where if os.path.exists(p)]
            expect(there, f"{file} is not there")
            expect(not test or test in contents(there[0]).decode(), f"{file} has no {test}")

    def all(self):
        every = 1 if self.full else 61
        for i, (how, mode) in enumerate([("on", ""), ("once", ""), ("once", "async")]):
            for phase in range(8 if self.full else 1):
                step = 8 if self.full else every
                self.test(f"training_calls {how} {mode}{phase}", self.training_calls, how, mode, step,
                          phase if self.full else 3 * i)
        self.test("ranks_calls", self.ranks_calls, 7 if self.full else 280)
        self.test("generating_calls", self.generating_calls, 1 if self.full else 17)
        self.test("host_memory", self.host_memory, 1 if self.full else 4)
        self.test("no_thread", self.no_thread)
        self.test("device_memory", self.device_memory)
        for what, *words in (
            ("none", "no CUDA-capable device is detected; the driver is of CUDA 13.0, this build of CUDA 13.0. Check nvidia-smi"),
            ("driver=11040", "driver version is insufficient", "the driver is of CUDA 11.4, this build of CUDA 13.0. Update"),
            ("driver=0", "; there is no driver, this build of CUDA 13.0. Check nvidia-smi"),
            ("sm=75", " is sm_75, the kernels need sm_80 or newer. Build for the CPU: make cpu."),
            ("sm=100", " is sm_100, this build is for sm_80, sm_90. ", "GPU_ARCH=-arch=sm_100"),
        ):
            self.test(f"device {what}", self.device, what, *words)
        generate = ["generate", "--checkpoint"]
        flags = [("--train-data", []), ("--val-data", []), ("--tokenizer", []), ("--init-from", []),
                 ("--choices", ["eval", *generate[1:]]), ("--checkpoint", ["generate"])]
        for kind in KINDS:
            for name, command in flags:
                command = [*command, self.path("half0")] if "--checkpoint" in command else command
                self.test(f"file {kind} {name}", self.named_file, kind, name, command)
            for name in ("state.json", "model.safetensors", "optimizer_rank0.safetensors"):
                if kind != "unreadable":  # root reads it, and nobody could not write there
                    self.test(f"checkpoint_file {kind} {name}", self.checkpoint_file, kind, name)
        for kind in ("directory", "pipe", "garbage"):
            self.test(f"table_file {kind} log.csv", self.table_file, kind, "log.csv")
        for body in (self.names, self.linked_checkpoint, self.linked_leftover, self.linked_files, self.damaged_twice,
                     self.matmul_file, self.other_data, self.full_table, self.prompt_file, self.reader_gone,
                     self.out_without_rights, self.not_readable, self.other_step, self.two_lines, self.own_table,
                     self.threads, self.table):
            self.test(body.__name__, body)
        for program, module in (("look/plot.py", "matplotlib"), ("look/plot_probe.py", "matplotlib"),
                                ("hf/export.py", "numpy"), ("hf/import.py", "numpy"), ("data/prepare.py", "numpy"),
                                ("data/hellaswag.py", "numpy"), ("data/convert_tokenizer.py", None)):
            self.test(f"interrupted {program}", self.interrupted, program, module)
        for value in (math.nan, math.inf):
            self.test(f"weights_not_finite {value}", self.weights_not_finite, value)
        for kind in ("pipe", "directory", "device"):
            self.test(f"export_kind {kind}", self.export_kind, kind)
        for kind in ("pipe", "link"):
            self.test(f"export_beside {kind}", self.export_beside, kind)
        for name in ("state.json", "model.safetensors"):
            self.test(f"huge_file {name}", self.huge_file, name)
        for kind in ("absent", "shorter", "pipe", "directory"):
            self.test(f"shard_during_run {kind}", self.shard_during_run, kind)
        half = self.path("half0")
        for name, ask, status in (
            ("generate", ["generate", "--checkpoint", half, "--prompt", "a", "--max-tokens", 3], 1),
            ("eval", ["eval", "--checkpoint", half, "--val-data", self.path("tokens.bin"), "--val-batches", 1], 1),
            ("--help", ["--help"], 1), ("--models", ["--models"], 1), ("--plan", self.flags("never", "--plan"), 1),
            ("training", self.flags("full"), 0),
        ):
            self.test(f"full_stdout {name}", self.full_stdout, name, ask, status)
        for which in ((0,), (1,), (0, 1), (0, 1, 2)):
            self.test(f"closed {which}", self.closed, which)
        for i, kind in enumerate([*KINDS[:-1], "nested"]):
            for j, (program, name, *_) in enumerate(TOOLS):
                waits = kind == "pipe" and program == "data/convert_tokenizer.py"  # as it may: <(command)
                if not waits and (self.full or (i + j) % 4 == 0):
                    self.test(f"tool {kind} {program} {name}", self.tool, kind, j)
        one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        for name, header, data, words in (
            ("overlap", {"a": one, "b": {**one, "data_offsets": [4, 12]}}, bytes(12), ["overlap"]),
            ("hole", {"a": one, "b": {**one, "data_offsets": [12, 20]}}, bytes(20), ["no tensor's"]),
            ("same_data", {"a": one, "b": one}, bytes(8), ["another tensor's"]),
            ("tail", {"a": one}, bytes(12), ["follow its last"]),
            ("twice", '{"a":%s,"a":%s}' % (json.dumps(one), json.dumps({**one, "data_offsets": [8, 16]})), bytes(16), ["twice"]),
            ("half_a_row", {"a": {**one, "shape": [2.5]}}, bytes(8), ["shape"]),
            ("product", {"a": {**one, "shape": [2**32, 2**32]}}, bytes(8), ["larger than the file"]),
            ("negative", {"a": {**one, "data_offsets": [-8, 0]}}, bytes(8), ["outside the file"]),
            ("huge", {"a": {**one, "data_offsets": [0, 1e300]}}, bytes(8), ["outside the file"]),
            ("nested", "[" * 100000, b"", ["not valid JSON"]),
            ("nan", '{"a":{"dtype":"F32","shape":[nan],"data_offsets":[0,8]}}', bytes(8), ["not valid JSON"]),
            ("two_lines", {"a\nb": {**one, "shape": [3]}}, bytes(8), ["a b"]),
        ):
            self.test(f"misleading_weights {name}", self.misleading_weights, name, header, data, words)

    def named_file(self, kind, name, command):
        self.begun()
        if kind == "absent" or name != "--checkpoint" or kind != "directory":
            return self.file(kind, (name, command))
        path = self.path("empty_folder")  # a folder is right there, but it holds nothing
        os.makedirs(path, exist_ok=True)
        expect("empty_folder" in refuse(self.exe, [*command, name, path]), "the folder is not named")


if __name__ == "__main__":
    sys.exit(FaultTests.main("test_faults", __doc__))
