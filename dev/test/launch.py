"""What the tests of many ranks share: trainers that are started, alone or under mpirun, and always ended; traces;
checkpoints seen from outside. Standard library only."""
import argparse
import concurrent.futures
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time

from test_cli import (Failure, expect, read_log, read_safetensors, same_matmuls, values, write_safetensors,  # noqa: F401
                      write_shard)

MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"]
# mpirun asks to be told that root may run it; ranks share the cores, so that one that waits must let the others work. One
# thread a rank, and a job of `make test`, of which two run at a time. -gl: Open MPI else looks for X displays, and waits
# for the name server where /etc/hosts has no localhost
MPI_ENV = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
           "OMPI_MCA_mpi_yield_when_idle": "1", "HWLOC_COMPONENTS": "-gl"}
WARNING = "train_gpt: warning: "


def session_of(pid):
    """The session that a process is in; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[3])
    except (OSError, IndexError):
        return None


class Job:
    """A trainer's processes, in a session of their own: ranks 0 is one without mpirun."""

    def __init__(self, trainer, flags, ranks=0, env=None, mpi=()):
        self.trainer = os.path.abspath(trainer)
        launcher = [*MPIRUN, *mpi, "-n", str(ranks)] if ranks else []
        self.command = [*launcher, self.trainer, *map(str, flags)]
        self.files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
        self.begin = time.monotonic()
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.files[0],
                                        stderr=self.files[1], env={**os.environ, **MPI_ENV, **(env or {})},
                                        start_new_session=True)

    def members(self):
        return [int(p) for p in os.listdir("/proc") if p.isdigit() and session_of(p) == self.process.pid]

    def pids(self):
        """rank -> pid of the trainers that run now"""
        found = {}
        for pid in self.members():
            try:
                with open(f"/proc/{pid}/cmdline") as f, open(f"/proc/{pid}/environ") as e:
                    if f.read().split("\0")[0] == self.trainer:
                        rank = re.search(r"(?:^|\0)(?:OMPI_COMM_WORLD_)?RANK=(\d+)\0", e.read())
                        found[int(rank.group(1)) if rank else 0] = pid
            except OSError:
                pass  # gone meanwhile
        return found

    def kill(self):
        """All of it, by SIGKILL."""
        end = time.monotonic() + 20
        while True:
            for pid in self.members():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if self.process.poll() is not None and not self.members():
                return
            if time.monotonic() > end:
                raise Failure(f"processes {self.members()} do not die")
            time.sleep(0.01)

    def wait(self, limit=120):
        try:
            self.status = self.process.wait(limit)
            self.seconds = time.monotonic() - self.begin
            end = time.monotonic() + 10  # mpirun's children end a little later than it
            while self.members() and time.monotonic() < end:
                time.sleep(0.02)
            left = self.members()
            expect(not left, f"{len(left)} processes were left behind: {self.text()}")
        except subprocess.TimeoutExpired:
            raise Failure(f"did not end within {limit} s: {self.text()}")
        finally:
            self.kill()
        self.out, self.err = (self.read(f) for f in self.files)
        return self

    def read(self, file):
        file.seek(0)
        return file.read()

    def text(self):
        return f"{self.read(self.files[1])[-1500:]} ({' '.join(self.command)})"

    def lines(self):
        """What the trainer, not mpirun, said on stderr, but for warnings."""
        mine = [line for line in self.err.splitlines() if line.startswith("train_gpt: ")]
        return [line for line in mine if not line.startswith(WARNING)]

    def warnings(self):
        return [line for line in self.err.splitlines() if line.startswith(WARNING)]


def run(trainer, flags, ranks=0, env=None, mpi=(), limit=120):
    """A run that must end well."""
    job = Job(trainer, flags, ranks, env, mpi).wait(limit)
    expect(job.status == 0, f"exit {job.status}: {job.text()}")
    return job


def refuse(trainer, flags, ranks=0, env=None, mpi=(), limit=60):
    """A run that must end with a status other than 0 (alone: 1) and one line, which is returned."""
    job = Job(trainer, flags, ranks, env, mpi).wait(limit)
    expect(job.status == 1 or (ranks and job.status), f"exit {job.status} where 1 was due: {job.text()}")
    expect(len(job.lines()) == 1, f"{len(job.lines())} lines where one was due: {job.text()}")
    return job.lines()[0]


def contents(path):
    with open(path, "rb") as f:
        return f.read()


def log_bits(out):
    """The log but for what a clock says."""
    return [tuple(v for k, v in row.items() if k != "tokens_per_s") for row in read_log(out)]


def losses(out):
    return [float(row["loss"]) for row in read_log(out)]


def checkpoints(out):
    """Steps of what has a checkpoint's name, ascending."""
    return sorted(int(n[5:]) for n in os.listdir(out) if re.fullmatch(r"step_\d{8,}", n)) if os.path.isdir(out) else []


def checkpoint(out, step):
    return os.path.join(out, f"step_{step:08d}")


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def xxh64(data):
    """XXH64 with seed 0, after github.com/Cyan4973/xxHash's doc/xxhash_spec.md; not the trainer's code."""
    mask = (1 << 64) - 1
    p1, p2, p3, p4, p5 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                          0x27D4EB2F165667C5)

    def rotate(x, by):
        return (x << by | x >> (64 - by)) & mask

    def merge(acc, lane):
        return ((acc ^ rotate(lane * p2 & mask, 31) * p1 & mask) * p1 + p4) & mask

    stripes = len(data) // 32
    if stripes:
        lanes = []
        words = struct.unpack_from(f"<{4 * stripes}Q", data)
        for i, lane in enumerate((p1 + p2 & mask, p2, 0, -p1 & mask)):
            for word in words[i::4]:
                lane = lane + word * p2 & mask
                lane = (lane << 31 | lane >> 33) * p1 & mask
            lanes.append(lane)
        h = sum(rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18))) & mask
        for lane in lanes:
            h = merge(h, lane)
    else:
        h = p5
    h = h + len(data) & mask
    at = 32 * stripes
    while at + 8 <= len(data):
        h = (rotate(h ^ rotate(struct.unpack_from("<Q", data, at)[0] * p2 & mask, 31) * p1 & mask, 27) * p1 + p4) & mask
        at += 8
    if at + 4 <= len(data):
        h = (rotate(h ^ struct.unpack_from("<I", data, at)[0] * p1 & mask, 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ byte * p5 & mask, 11) * p1 & mask
    h = (h ^ h >> 33) * p2 & mask
    h = (h ^ h >> 29) * p3 & mask
    return h ^ h >> 32


def verify(directory):
    """Whether a checkpoint is whole: every file of its manifest as written, and no others. Returns state.json."""
    text = contents(os.path.join(directory, "state.json"))
    state = json.loads(text)
    head = text[:text.rindex(b'  "checksum"')]
    expect(state["checksum"] == f"{xxh64(head):016x}", f"{directory}/state.json: wrong checksum")
    for name, record in state["files"].items():
        data = contents(os.path.join(directory, name))
        expect(len(data) == record["bytes"], f"{directory}/{name}: {len(data)} bytes, not {record['bytes']}")
        expect(f"{xxh64(data):016x}" == record["xxh64"], f"{directory}/{name}: wrong checksum")
    more = set(os.listdir(directory)) - {"state.json", *state["files"]}
    expect(not more, f"{directory}: holds {more}")
    return state


class Trace:
    """What CUDA_CPU_TRACE wrote of one rank: (stream, words) of all that was issued and all that ran, in order."""

    def __init__(self, path):
        self.issued, self.ran = [], []
        with open(path) as f:
            for line in f:
                what, stream, *work = line.split(" ")
                work[-1] = work[-1].rstrip("\n")
                {"issue": self.issued, "run": self.ran}.get(what, []).append((int(stream), work))

    @staticmethod
    def is_collective(work):
        return work[0] in ("allreduce", "reducescatter", "allgather")

    def collectives(self):
        """[(name, bytes, sent)] in the order in which NCCL_CPU_FAULT counts them, from 1"""
        return [(w[0], int(w[1]), int(w[2])) for _, w in self.issued if self.is_collective(w)]

    def step(self, number, ran=False):
        """The work between the sum of step `number`'s numbers and that of the next step, with the latter."""
        work = self.ran if ran else self.issued
        sums = [i for i, (_, w) in enumerate(work) if w[:2] == ["allreduce", "24"]]
        return work[sums[number - 1] + 1:sums[number] + 1]


class Tests:
    """Tests that run a few at a time, since much of each is waiting; `all` of a class lists them by test()."""

    def __init__(self, args):
        self.args, self.passed, self.failed = args, 0, 0
        self.exe, self.full = os.path.abspath(args.train_gpt), args.full
        self.dir = tempfile.mkdtemp(prefix="train_gpt_")
        MPI_ENV["OMPI_MCA_btl_vader_backing_directory"] = self.dir  # killed jobs leave their shared memory behind
        self.made, self.lock, self.worst, self.todo = {}, threading.Lock(), {}, []
        state, tokens = 1, []
        for _ in range(60000):
            state = (state * 1103515245 + 12345) % 2**31
            tokens.append(state // 65536 % 60 if len(tokens) % 3 else 7)
        write_shard(self.path("tokens.bin"), tokens)

    def path(self, name):
        return os.path.join(self.dir, name)

    def once(self, key, make):
        """make()'s result, made by whoever asks first."""
        with self.lock:
            mine = key not in self.made
            if mine:
                self.made[key] = concurrent.futures.Future()
        future = self.made[key]
        if mine:
            try:
                future.set_result(make())
            except BaseException as e:
                future.set_exception(e)
        return future.result()

    def timed(self, *flags):
        """The folder of a run of one step of this shape, for same_matmuls()."""
        out = self.path("timed " + " ".join(map(str, flags)))
        self.once(out, lambda: run(self.exe, [*flags, "--steps", 1, "--train-data", self.path("tokens.bin"), "--out",
                                              out]))
        return out

    def test(self, name, body, *rest):
        if re.search(self.args.filter, name):
            self.todo.append((name, body, rest))

    def note(self, what, value):
        """Keeps the worst of what is measured, for the summary."""
        with self.lock:
            self.worst[what] = max(self.worst.get(what, 0.0), value)

    def perform(self):
        def one(name, body, rest):
            begin = time.monotonic()
            try:
                body(*rest)
                ok, line = True, f"ok {name}"
            except Exception as e:  # whatever it is, this test failed and the others run
                ok, line = False, f"FAIL {name}: {type(e).__name__}: {e}"
            with self.lock:
                self.passed, self.failed = self.passed + ok, self.failed + (not ok)
                print(line if not self.args.verbose else f"{line} ({time.monotonic() - begin:.1f} s)", flush=True)

        with concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            for future in [pool.submit(one, *t) for t in self.todo]:
                future.result()

    def report(self):
        for what, value in sorted(self.worst.items()):
            print(f"worst {what}: {value:.3g}")

    @staticmethod
    def arguments(parser):
        """Adds a program's own options."""

    @classmethod
    def main(cls, program, about):
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("train_gpt")
        parser.add_argument("--full", action="store_true", help="every combination")
        parser.add_argument("--bf16", action="store_true", help="the trainer is a bf16 build")
        parser.add_argument("--filter", default="", help="only tests whose name holds this regular expression")
        parser.add_argument("--jobs", type=int, default=3, help="tests at a time (3)")
        parser.add_argument("--verbose", action="store_true", help="print the seconds of each test")
        cls.arguments(parser)
        tests = cls(parser.parse_args())
        try:
            tests.all()
            tests.perform()
            tests.report()
        finally:
            shutil.rmtree(tests.dir, ignore_errors=True)
        print(f"{program}: {tests.passed} passed, {tests.failed} failed")
        return 1 if tests.failed else 0
