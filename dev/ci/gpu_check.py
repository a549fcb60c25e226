#!/usr/bin/env python3
"""Everything that needs a GPU, what tells most first; `make gpu-check` calls it. Standard library only.

usage: dev/ci/gpu_check.py [STAGE ...]      the stages and their limits are below; all of them, in that order

A case is one command: it ends by itself or by its limit, and whatever becomes of it, the next one runs. After each case
the page RESULTS/DATE-DEVICE.md is written anew: what failed and what to look at first, how far kernels and steps are
from their limits, what passed. `build` begins a page; a later call without it adds its stages to the same one. Logs lie
in build/log/. Exit status 1 if something failed or was not reached.

Environment: NVCC; RESULTS (dev/bench/results); PATIENCE (1): all limits times this, for a device slower than an H100.
"""
import collections
import concurrent.futures
import contextlib
import datetime
import glob
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "dev", "bench"))
import report  # noqa: E402

TRAINER, BENCH, LOGS = "build/train_gpt_gpu_bf16", "build/bench_gpu_bf16", "build/log"
TRAINERS, TESTS = (TRAINER, "build/train_gpt_gpu_fp32"), ("build/test_gpu_bf16", "build/test_gpu_fp32")
# name: seconds at most, cases at a time, programs, what it is. The first six take 25 minutes at most
STAGES = {
    "build": (240, 5, (), "the programs, for this device alone"),
    "tests": (240, 4, TESTS, "each test of test_gpt in a process of its own"),
    "train": (120, 4, TRAINERS, "a few steps of every variant on both backbones against golden files"),
    "steps": (330, 1, (TRAINER, BENCH), "whole steps of 1B beside PyTorch"),
    "kernels": (150, 1, (TRAINER, BENCH), "each kernel at the shapes of 1B beside the device's limits"),
    "sanitize": (420, 4, TESTS[:1], "compute-sanitizer over the kernels' tests"),
    "cli": (900, 2, TRAINERS, "the command line and generated text"),
    "models": (900, 1, TRAINERS[:1], "short trainings of 162M to 8B on real text"),
    "ranks": (420, 1, TRAINERS[:1], "every ZeRO level over all GPUs, where there are several"),
    "bench": (1900, 1, (TRAINER, BENCH), "kernels of 7B; whole steps of 162M, 7B and llama3-8B"),
}
GOLDEN, LARGE = "dev/test/golden", ("--recompute", "norm", "--moments", "bf16")
SANITIZED = """attention norm_residual norm_backward qkv_norm_rope ffn_norm_act cross_entropy embedding adamw
               attention_past qkv_into_cache linear probe_kernels logit_scale update_scale random_rounding
               bad_steps""".split()
# false reports that are not counted: tool, kernel, the version from which on they count, source. 60 on an H200, 2025.3
KNOWN = [("racecheck", r"\battention_\w+_hopper_kernel\b", (2026, 3),
          "shared memory that mbarriers hand over between bulk copies and warpgroups. The release notes "
          "(docs.nvidia.com/compute-sanitizer/ReleaseNotes) name false positives of racecheck as fixed in 2025.4 "
          "(mbarrier usage), 2026.1 (warpgroups on Hopper) and 2026.3 (mbarrier complete-tx)")]
RANKS = """for rank in $(seq 0 $(({gpus} - 1))); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE={gpus} MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 {command} & pids="$pids $!"
done
for pid in $pids; do wait $pid || exit 1; done"""

Case = collections.namedtuple("Case", "name command limit judge", defaults=(None, None))  # limit None: the stage's
Result = collections.namedtuple("Result", "what name seconds said")
OK, FAIL, SKIP, LEFT = "ok", "FAIL", "skipped", "not reached"


def fail(message):
    sys.exit(f"gpu_check: {message}")


def output(*command):
    """What a command prints, "" if it fails, hangs or is not there."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
                              timeout=30, cwd=ROOT).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def python_with(module):
    """The first Python that has it, or this one, which then says so."""
    find = f"import importlib.util as u, sys; sys.exit(not u.find_spec('{module}'))"
    for python in (sys.executable, "python3", "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if not subprocess.run([python, "-c", find]).returncode:
                return python
    return sys.executable


def last(text):
    """The last line of an output."""
    return " ".join(text.rstrip().split("\n")[-1].split())[:200]


def complaint(text):
    """The line of a failed command's output that says why: the first that names an error (in the table of steps a
    variant without numbers), or the last."""
    named = re.search(r"^(FAIL .*|.*\berror\b[: ].*|train_gpt \w+ +\w+ {2,}[a-z].*)$", text, re.M)
    return " ".join(named[0].split())[:300] if named else last(text) or "it said nothing"


def judge(status, text):
    """A command that counts its tests, or not: what became of it, and a line."""
    if status:
        return FAIL, (f"status {status}: " if status != 1 else "") + complaint(text)
    if re.search(r"^\S+: 0 passed, 0 failed$", text, re.M):
        return FAIL, "no test ran"
    worst = re.search(r"\{'loss'.*\}|[\d.]+ of the tolerance", text)  # how near to its limit
    return OK, worst[0] if worst else last(text)


def sanitizer_judge(tool, version):
    def reports_of(text):
        """Each report's lines; its head stands behind one blank, the rest behind more."""
        lines = "\n".join(line[10:] for line in text.splitlines() if line.startswith("========= "))
        return [block.split("\n") for block in re.split(r"\n(?=\S)", lines)]

    def known(block):
        accesses = [line for line in block if "ccess at " in line]
        return bool(accesses) and any(tool == t and version and version < until and
                                      all(re.search(kernel, line) for line in accesses)
                                      for t, kernel, until, _ in KNOWN)

    def judged(status, text):
        total = re.search(r"SUMMARY: (\d+) (?:error|hazard)", text)
        if not total:
            return FAIL, "no summary: " + complaint(text)
        blocks = [b for b in reports_of(text) if "SUMMARY" not in b[0] and b[0] != "COMPUTE-SANITIZER"]
        false = sum(map(known, blocks))
        if int(total[1]) > false:
            first = next((b for b in blocks if not known(b)), ["none is shown"])
            return FAIL, f"{int(total[1]) - false} reports: {' '.join(' '.join(first[:2]).split())[:250]}"
        what, said = judge(status, text)
        return what, said if what == FAIL else f"{false} reports, all known to be false" if false else "no reports"

    return judged


class Check:
    def __init__(self, stages):
        gpus = [line.split(", ") for line in output(
            "nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version,compute_mode",
            "--format=csv,noheader,nounits").splitlines()]
        if not gpus:
            fail("no GPU is visible to nvidia-smi. Run it on a machine that has one.")
        name, capability, mib, driver, mode = gpus[0]
        self.gpus, self.arch, self.shared = len(gpus), capability.replace(".", ""), mode != "Exclusive_Process"
        self.arch += "a" * (self.arch == "90")
        self.gib = float(mib) / 1024 if mib.isdigit() else 0
        self.results = os.path.abspath(os.environ.get("RESULTS") or os.path.join(ROOT, "dev", "bench", "results"))
        try:
            self.patience = float(os.environ.get("PATIENCE") or 1)
        except ValueError:
            fail(f"PATIENCE: '{os.environ['PATIENCE']}' is no number.")
        self.nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        beside = os.path.join(os.path.dirname(self.nvcc), "compute-sanitizer")
        self.sanitizer = shutil.which("compute-sanitizer") or beside
        version = re.search(r"Version (\d+)\.(\d+)", output(self.sanitizer, "--version"))
        self.version = (int(version[1]), int(version[2])) if version else None
        toolkit = re.search(r"release ([\d.]+)", output(self.nvcc, "--version"))
        self.state = {
            "device": name, "commit": output("git", "describe", "--always", "--dirty").strip(),
            "begun": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            "machine": f"{self.gpus} x {name}, {self.gib:.1f} GiB, sm_{self.arch}; driver {driver}, CUDA "
                       f"{toolkit[1] if toolkit else 'unknown'}, compute-sanitizer "
                       f"{'.'.join(map(str, self.version)) if version else 'missing'}",
            "stages": {}}
        os.makedirs(os.path.join(ROOT, LOGS), exist_ok=True)
        os.makedirs(self.results, exist_ok=True)
        self.kept = os.path.join(ROOT, LOGS, "gpu_check.json")
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(self.kept) as f:
                before = json.load(f)
            # the check's own page and costs.md make the tree dirty
            same = all(before[key].removesuffix("-dirty") == self.state[key].removesuffix("-dirty")
                       for key in ("device", "commit"))
            if "build" not in stages and same:
                self.state = before
        page = re.sub(r"[^a-z0-9.-]", "-", f"{self.state['begun'][:10]}-{self.state['device']}.md".lower())
        self.page, self.running, self.now = os.path.join(self.results, page), set(), None

    # --- stages: generators of cases, or of results that need none, for those of their programs that are there

    def build(self, _):
        arch = f"GPU_ARCH=-gencode=arch=compute_{self.arch},code=sm_{self.arch}"
        for target in (*TESTS, TRAINER, BENCH, TRAINERS[1]):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(ROOT, target))  # what does not build shall not run
            yield Case(target[6:], ["make", "-s", "--no-print-directory", f"NVCC={self.nvcc}", arch, target])

    def tests(self, programs):
        for p in programs:
            names = output(p, "--list").split()
            if not names:
                yield Result(FAIL, p[6:], 0, "lists no tests")
            yield from (Case(f"{name} {p[-4:]}", [p, "--only", name], 60) for name in names)

    def train(self, programs):
        for p in programs:
            for golden in sorted(os.listdir(os.path.join(ROOT, GOLDEN))):
                yield Case(f"{golden.split('.')[0]} {p[-4:]}",
                           [sys.executable, "dev/test/test_cli.py", p, GOLDEN, "--verbose", "--filter",
                            "golden " + golden, *["--bf16"] * p.endswith("bf16")], 60)

    def batch(self, model, seq_len, batch, *options):
        """The batch, or its largest half, quarter, .. whose plan fits into the device's memory; 0 if none does."""
        while batch:
            plan = output(TRAINER, "--plan", "--model", model, "--seq-len", str(seq_len), "--batch-size", str(batch),
                          *options)
            total = re.search(r"^  total +([\d.]+) MiB", plan, re.M)
            if not total or float(total[1]) / 1024 < self.gib - 1:  # without a plan the run says what is wrong
                break
            batch //= 2
        return batch

    def if_fits(self, name, fits, command, limit=None):
        if not fits:
            return Result(SKIP, name, 0, f"does not fit into the {self.gib:.0f} GiB of this device")
        return Case(name, command, limit)

    def step(self, model, seconds, seq_len, batch, *options):
        """batch 0: as many sequences as fit"""
        fits = self.batch(model, seq_len, batch or 1, *options)
        return self.if_fits("steps " + model, fits, [
            python_with("torch"), "dev/bench/step.py", "--trainer", TRAINER, "--bench", BENCH, "--device", "cuda",
            "--model", model, "--seq-len", str(seq_len), "--batch-size", str(fits) if batch else "auto",
            f"--options={' '.join(options)}", "--minutes", f"{seconds * self.patience / 60:.2f}",
            "--results", self.results], seconds + 25)

    def kernel(self, model):
        # its tensors are some of such a step's
        return self.if_fits("kernels " + model, self.batch(model, 2048, 8) == 8,
                            [BENCH, "--part", "kernels", "--model", model, "--results", self.results])

    def costs(self):
        """The map of all results there, as `make bench` makes it."""
        python, to = shlex.quote(sys.executable), shlex.quote(self.results)
        return Case("costs.md", ["sh", "-c", f"{python} dev/bench/report.py --map --results {to} >{to}/costs.new && "
                                 f"mv {to}/costs.new {to}/costs.md"])

    def steps(self, programs):
        if len(programs) == 2:
            yield self.step("1B", 300, 512, 64)

    def kernels(self, programs):
        if BENCH in programs:
            yield self.kernel("1B" if self.batch("1B", 2048, 8) == 8 else "162M")
            yield self.costs()

    def sanitize(self, programs):
        if not self.version:
            yield Result(SKIP, "compute-sanitizer", 0, "is missing; it comes with the CUDA Toolkit")
            return
        for name in SANITIZED if programs else ():
            for tool in ("memcheck", "synccheck", "racecheck"):
                yield Case(f"{tool} {name}", [self.sanitizer, "--tool", tool, "--print-limit", "10000", *programs,
                                              "--quick", "--only", name], 120, sanitizer_judge(tool, self.version))

    def cli(self, programs):
        for p in programs:
            half = ["--bf16"] * p.endswith("bf16")
            yield Case("cli " + p[-4:], [sys.executable, "dev/test/test_cli.py", p, GOLDEN, *half])
            yield Case("generate " + p[-4:], [sys.executable, "dev/test/test_generate.py", p, *half])

    def training(self, name, model, seq_len, batch, *options):
        """The command of a short run on the sources of Python's library."""
        out = f"build/gpu_run_{name}"
        shutil.rmtree(os.path.join(ROOT, out), ignore_errors=True)
        return [TRAINER, "--train-data", "data/gpu/text_train_*.bin", "--vocab-size", "32000", "--out", out, "--model",
                model, "--seq-len", str(seq_len), "--batch-size", str(batch), *options]

    def data(self):
        if not os.path.exists(os.path.join(ROOT, "data/gpu/text_manifest.json")):
            yield Case("data", [python_with("numpy"), "dev/data/prepare.py", "--stdlib", "--out", "data/gpu",
                                "--prefix", "text"])

    def models(self, programs):
        if programs:
            yield from self.data()
            for model, seq_len, batch, *options in (
                    ("162M", 1024, 16, "--steps", "40"), ("1B", 512, 16, "--steps", "20"),
                    ("nanogpt-1.4B", 1024, 4, "--steps", "20"), ("7B", 2048, 0, "--steps", "4", *LARGE),
                    ("llama3-8B", 2048, 0, "--steps", "4", "--vocab-size", "128256", *LARGE)):
                fits = self.batch(model, seq_len, batch or 1, *options)
                yield self.if_fits(model, fits, self.training(model, model, seq_len, fits if batch else "auto",
                                                              *options), 200)

    def ranks(self, programs):
        if self.gpus < 2:
            yield Result(SKIP, "ranks", 0, "there is one GPU")
        elif programs:
            yield from self.data()
            for zero in "0123":
                command = self.training("ranks", "1B", 512, 16, "--steps", "20", "--zero", zero, "--timeout", "60",
                                        "--check-every", "5")
                yield Case("zero " + zero, ["sh", "-c", RANKS.format(gpus=self.gpus, command=shlex.join(command))], 100)

    def bench(self, programs):
        if len(programs) == 2:
            yield self.kernel("7B")
            yield self.step("162M", 510, 1024, 32)
            yield self.step("7B", 510, 2048, 0, *LARGE)
            yield self.step("llama3-8B", 510, 2048, 0, *LARGE)
            yield self.costs()

    # --- running

    def call(self, command, log, limit, threads):
        """The status of a command, None if it did not end within the limit; what it started ends with it."""
        with open(log, "w") as f:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT,
                                       env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True)
        self.running.add(process.pid)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # the GPU's driver may hold it for a while

    def kill(self, pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.running.discard(pid)

    def perform(self, stage, case, end, threads):
        """The result of a case, whatever becomes of it."""
        begin = time.monotonic()
        own = case.limit * self.patience if case.limit else float("inf")
        limit = min(own, end - begin)
        if limit <= 0:
            return Result(LEFT, case.name, 0, "the stage's time was over")
        log = os.path.join(ROOT, LOGS, re.sub(r"[^\w.-]", "_", f"gpu_{stage}_{case.name}.txt"))
        try:
            status = self.call(case.command, log, limit, threads)
            with open(log, errors="replace") as f:
                text = f.read()
            if status is not None:
                what, said = (case.judge or judge)(status, text)
            elif case.limit and limit < own / 2:
                what, said = LEFT, f"the stage's time was over after {limit:.3g} s of it"
            else:
                what, said = FAIL, f"no end within {limit:.3g} s; last: {last(text) or 'nothing'}"
        except Exception as error:
            what, said = FAIL, f"{type(error).__name__}: {error}"
        return Result(what, case.name, round(time.monotonic() - begin, 1), said)

    def note(self, stage, result):
        self.state["stages"][stage]["results"].append(result)
        print(f"{result.what:11} {stage:8} {result.name} ({result.seconds:.1f} s): {result.said}", flush=True)
        self.write()

    def run(self, stage):
        limit, width, programs, _ = STAGES[stage]
        begin, self.now = time.monotonic(), stage
        width = min(width, os.cpu_count()) if self.shared or stage in ("build", "cli") else 1
        entry = {"results": [], "seconds": 0}
        stages = {**self.state["stages"], stage: entry}
        self.state["stages"] = {name: stages[name] for name in STAGES if name in stages}
        there = [p for p in programs if os.path.exists(os.path.join(ROOT, p))]
        results = [Result(FAIL, p[6:], 0, "is not built") for p in programs if p not in there]
        try:
            results += getattr(self, stage)(there)
        except Exception as error:  # the stage failed, the next one runs
            results.append(Result(FAIL, stage, 0, f"{type(error).__name__}: {error}"))
        with concurrent.futures.ThreadPoolExecutor(width) as pool:
            try:
                end = begin + limit * self.patience
                futures = [pool.submit(self.perform, stage, case, end, os.cpu_count() // width)
                           for case in results if isinstance(case, Case)]
                for result in results:
                    if isinstance(result, Result):
                        self.note(stage, result)
                for future in concurrent.futures.as_completed(futures):
                    entry["seconds"] = round(time.monotonic() - begin)
                    self.note(stage, future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for pid in list(self.running):
                    self.kill(pid)
                raise

    # --- the page

    def of(self, what):
        return [(stage, Result(*r)) for stage, entry in self.state["stages"].items() for r in entry["results"]
                if r[0] == what]

    def records(self):
        """What this check has measured; a file that was cut off is no record."""
        found = {}
        for path in sorted(glob.glob(os.path.join(self.results, "*.json"))):
            with contextlib.suppress(SystemExit, KeyError):
                record = report.load(path)
                if record and record["part"] in ("kernels", "steps") and record["date"] >= self.state["begun"]:
                    found[record["part"], record["model"]] = record
        return list(found.values())

    def look_first(self, records):
        for stage, r in self.of(FAIL):
            yield f"**{stage}: {r.name}**: {r.said}"
        for stage in STAGES:
            left = [r.name for s, r in self.of(LEFT) if s == stage]
            if left:
                yield f"{stage}: not reached in time (PATIENCE=2 gives twice as much): {', '.join(left)}"
        for record in records:
            if record["part"] == "kernels":
                lost = sorted(((k["times"] * (k["ms"] - k["bound_ms"]), k) for k in record["kernels"]),
                              key=lambda pair: -pair[0])
                yield from (f"kernels {record['model']}: {k['name']} {k['shape']} is at "
                            f"{report.percent(k['bound_ms'] / k['ms'])} of its limit, {ms:.3g} ms of a step above it"
                            for ms, k in lost[:5] if ms > 0)
            else:
                first, *others = record["runs"]
                yield from (f"steps {record['model']}: {r['name']}: {r['error']}" for r in record["runs"] if r["error"])
                yield from (f"steps {record['model']}: {first['name']} is "
                            f"{first['tokens_per_s'] / r['tokens_per_s']:.3f} times as fast as {r['name']}"
                            for r in others if not first["error"] and not r["error"])

    def write(self):
        """The page and what it is made of, whole at any time."""
        records, said = self.records(), io.StringIO()
        with contextlib.redirect_stdout(said):
            print(f"# {self.state['device']}, {self.state['begun'][:10]}\n")
            print(f"`{self.state['commit']}` on {self.state['machine']}; begun {self.state['begun']}, written by "
                  f"`dev/ci/gpu_check.py`{f' (**under way: {self.now}**)' if self.now else ''}.\n")
            report.table(["stage", OK, FAIL, LEFT, SKIP, "s", "at most"],
                         [[f"{stage}: {STAGES[stage][3]}",
                           *(str(sum(r[0] == what for r in entry["results"])) for what in (OK, FAIL, LEFT, SKIP)),
                           str(entry["seconds"]), f"{STAGES[stage][0] * self.patience:.0f}"]
                          for stage, entry in self.state["stages"].items()])
            print("## To look at first\n")
            print("\n".join(f"{i}. {line}" for i, line in enumerate(self.look_first(records), 1)) or "Nothing.")
            print()
            for record in records:
                {"kernels": report.kernels, "steps": report.steps}[record["part"]](record)
            print("## What passed, what was skipped\n")
            for what in (OK, SKIP):
                for stage in self.state["stages"]:
                    told = "; ".join(f"{r.name}: {r.said}".rstrip(": ") for s, r in self.of(what) if s == stage)
                    if told:
                        print(f"- **{stage}, {what}**: {told}")
            if "sanitize" in self.state["stages"]:
                print("\nReports of compute-sanitizer that are known to be false and not counted:\n")
                for tool, kernel, until, source in KNOWN:
                    print(f"- {tool} in `{kernel}` before {'.'.join(map(str, until))}: {source}.")
        for path, text in ((self.page, said.getvalue()), (self.kept, json.dumps(self.state, indent=1))):
            with open(path + ".new", "w") as f:
                f.write(text)
            os.replace(path + ".new", path)


def main():
    stages = sys.argv[1:]
    if "-h" in stages or "--help" in stages:
        print(__doc__)
        for name, (seconds, *_, about) in STAGES.items():
            print(f"  {name:9} {seconds:5} s  {about}")
        return 0
    for stage in stages:
        if stage not in STAGES:
            fail(f"'{stage}' is no stage. There are {', '.join(STAGES)}.")
    check = Check(stages or list(STAGES))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    for stage in stages or STAGES:
        check.run(stage)
    check.now = None
    check.write()
    bad = len(check.of(FAIL)), len(check.of(LEFT))
    print(f"gpu_check: {len(check.of(OK))} ok, {bad[0]} failed, {bad[1]} not reached, {len(check.of(SKIP))} skipped; "
          f"{os.path.relpath(check.page)}")
    return 1 if any(bad) else 0


if __name__ == "__main__":
    sys.exit(main())
