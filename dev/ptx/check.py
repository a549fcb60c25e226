#!/usr/bin/env python3
"""Runs the tests of the kernels on what nvcc made of them: PTX, on the machine in dev/ptx. `make ptx-check` calls it.

usage: dev/ptx/check.py [--quick] [--save] [--seeds N] [--seed S] [--filter TEXT] [--table FILE] [--jobs N]
  --quick        bf16 for sm_90a and one seed, in one process; what `make test` runs
  --seeds N      of the order of blocks, warps and lanes, a run each (3)
  --seed S       the first of them (1)
  --filter TEXT  only tests whose name holds it
  --table FILE   writes a markdown table: kernel by architecture, the tests that launched it, seeds, reports
  --jobs N       processes at a time (2)
  --save         writes dev/ptx/kernels.ptx anew, and no more
All of test_gpt runs, in both precisions, for sm_80 and sm_90a; a kernel that no test launches is a failure, and so is
one whose PTX in train_gpt.cu is another than in test_gpt.cu. Without nvcc --quick runs only the kernels in
dev/ptx/kernels.ptx as PTX, the rest as in the exact geometry. Where nvcc is of the version that made that file, it must
be what nvcc makes now.
"""
import argparse
import collections
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "dev", "test"))
from launch import MPI_ENV  # noqa: E402

ARCHS = ("sm_90a", "sm_80")
PRECISIONS = ("bf16", "fp32")
SAVED = "dev/ptx/kernels.ptx"
# what is saved: a row kernel, sums over blocks, Hopper's copies and tensor cores
SAVED_KERNELS = ("norm_backward_kernel<1>", "cross_entropy_kernel", "attention_forward_hopper_kernel<64>")
SAVED_TESTS = ("norm_backward", "cross_entropy", "attention")  # which of them the kernels are in

passed = failed = 0


def ok(name, fault=""):
    global passed, failed
    passed, failed = passed + (not fault), failed + bool(fault)
    print(f"FAIL {name}: {fault}" if fault else f"ok {name}", flush=True)


def make(*targets):
    run = subprocess.run(["make", "--no-print-directory", *targets], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True)
    if run.returncode:
        print(run.stdout)
        print(f"FAIL build: {' '.join(targets)}")
        sys.exit(1)


def demangle(names):
    """{mangled: as in the source, without its parameters}"""
    names = list(names)
    out = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    short = {}
    for mangled, text in zip(names, out.splitlines()):
        text = re.sub(r"^void ", "", text).replace("__nv_bfloat16", "bf16").replace(", ", ",")
        depth = 0
        for i, c in enumerate(text):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                text = text[:i]
                break
        short[mangled] = text
    return short


def entries(path):
    """{mangled name: text} of a PTX file's kernels, without what tells where the source is"""
    found, name, lines, previous = {}, None, [], ""
    with open(path) as f:
        for line in f:
            begin = re.match(r"\.visible \.entry (\w+)", line)
            if begin:
                name, lines = begin[1], []
            if name and not re.match(r"\s*(\.loc|//)", line) and line.strip():
                lines.append(re.sub(r"\$L__BB\d+_", "$L__BB_", line.split("//")[0].rstrip()))
            if name and line == "}\n" and not previous:  # that of inline PTX follows a line of text
                found[name], name = "\n".join(lines), None
            previous = line.strip()
    return found


class Run:
    """One process: some tests of one precision on one PTX file."""

    def __init__(self, ptx, precision, seed, arguments, part=False):
        self.ptx, self.precision, self.seed, self.arguments, self.part = ptx, precision, seed, arguments, part
        self.kernels = {}  # mangled name: launches, instructions, seconds

    def __call__(self):
        with tempfile.NamedTemporaryFile("r") as log:
            env = {**os.environ, **MPI_ENV, "CUDA_CPU_PTX": self.ptx, "CUDA_CPU_SEED": str(self.seed),
                   "CUDA_CPU_PTX_LOG": log.name, **({"CUDA_CPU_PTX_PART": "1"} if self.part else {})}
            begin = time.time()
            run = subprocess.run([f"build/test_exact_{self.precision}", *self.arguments], env=env, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
            self.seconds, self.output, self.status = time.time() - begin, run.stdout, run.returncode
            for line in log:
                name, *numbers = line.rstrip("\n").split("\t")
                self.kernels[name] = [float(n) for n in numbers]
        return self

    def fault(self):
        lines = [line for line in self.output.splitlines() if line.startswith(("ptx:", "FAIL", "cuda:"))]
        return "" if self.status == 0 else (lines or [f"ended with status {self.status}"])[0]


def tests_of(precision):
    run = subprocess.run([f"build/test_exact_{precision}", "--list"], stdout=subprocess.PIPE, text=True, check=True)
    return run.stdout.split()


def speed(runs, seconds, jobs):
    """what the machine did, in a line"""
    instructions = sum(k[1] for run in runs for k in run.kernels.values())
    inside = sum(k[2] for run in runs for k in run.kernels.values())
    return (f"{instructions / 1e6:.0f} million warp instructions, {inside:.0f} s in the machine "
            f"({instructions / max(inside, 1e-9) / 1e6:.2f} million a second), {seconds:.0f} s in all, {jobs} at a time")


def quick(options, nvcc):
    if nvcc:
        ptx = "build/test_gpt.sm_90a.bf16.ptx"
        make(ptx, "build/test_exact_bf16")
        with open(SAVED) as f, open(ptx) as g:
            saved, fresh = f.read(), g.read()
        compiler = re.compile(r"// Cuda compilation tools.*")
        if compiler.search(saved)[0] == compiler.search(fresh)[0]:
            names = demangle(re.findall(r"\.visible \.entry (\w+)", fresh))
            ok("saved_kernels", "" if saved == chosen(ptx, names) else
               f"{SAVED} is not what nvcc makes of the sources. Write it anew: dev/ptx/check.py --save")
        runs = [Run(ptx, "bf16", options.seed, ["--quick", "--filter", options.filter])]
    else:
        print(f"skip nvcc is missing: only the kernels in {SAVED} run as PTX")
        make("build/test_exact_bf16")
        runs = [Run(SAVED, "bf16", options.seed, ["--quick", "--only", test], part=True)
                for test in SAVED_TESTS if options.filter in test]
    for run in runs:
        for line in run().output.splitlines():
            if line.startswith("ok "):
                ok(line.split()[1])
        if run.fault():
            ok("tests", run.fault())
    if not nvcc and not options.filter:
        launched = {kernel for run in runs for kernel in run.kernels}
        ok("saved_kernels_were_launched", " ".join(sorted(demangle(set(entries(SAVED)) - launched).values())))
    print(speed(runs, sum(run.seconds for run in runs), 1))


def chosen(ptx, names):
    """the text of the saved kernels, with what stands before the first one"""
    with open(ptx) as f:
        text = f.read()
    head = text[:text.index(".visible .entry")]
    head = re.sub(r"\.func .*?\n;\n", "", head, flags=re.S)
    kept = []
    for body in re.findall(r"\.visible \.entry .*?\n\n}\n", text, re.S):
        shown = names[re.match(r"\.visible \.entry (\w+)", body)[1]]
        if shown in SAVED_KERNELS:
            body = re.sub(r"(?m)^\s*(\.loc .*|// .*|)\n", "", body)
            body = re.sub(r"(?m)[ \t]*//.*$", "", body)
            kept.append(re.sub(r"\$L__BB\d+_", "$L__BB_", body))
    return re.sub(r"(?m)^\s*// \.globl.*\n", "", head) + "\n".join(kept)


def full(options):
    targets = [f"build/{program}.{arch}.{p}.ptx"
               for program in ("test_gpt", "train_gpt") for arch in ARCHS for p in PRECISIONS]
    make("-j", str(options.jobs), *targets, *(f"build/test_exact_{p}" for p in PRECISIONS))
    begin = time.time()
    runs = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {}
        for seed in range(options.seed, options.seed + options.seeds):
            for arch in ARCHS:
                for precision in PRECISIONS:
                    for test in tests_of(precision):
                        if options.filter in test:
                            # once at the sizes of the exact geometry, else at the quick ones
                            size = [] if seed == options.seed else ["--quick"]
                            ptx = f"build/test_gpt.{arch}.{precision}.ptx"
                            run = Run(ptx, precision, seed, [*size, "--only", test])
                            waiting[pool.submit(run)] = (arch, precision, test, seed)
        for done in concurrent.futures.as_completed(waiting):
            arch, precision, test, seed = waiting[done]
            run = done.result()
            run.where = waiting[done]
            runs.append(run)
            ok(f"{arch} {precision} {test} seed {seed} ({run.seconds:.1f} s)", run.fault())
    rows = collections.defaultdict(dict)
    for arch in ARCHS:
        for precision in PRECISIONS:
            of_tests, of_trainer = (entries(f"build/{program}.{arch}.{precision}.ptx")
                                    for program in ("test_gpt", "train_gpt"))
            names = demangle(of_tests)
            other = [names[k] for k in of_trainer if of_trainer[k] != of_tests.get(k)]
            ok(f"{arch} {precision} train_gpt.cu and test_gpt.cu have the same kernels", " ".join(other))
            for kernel in of_tests:
                here = [r for r in runs if r.where[:2] == (arch, precision) and kernel in r.kernels]
                rows[names[kernel]][arch, precision] = here
                # Hopper's kernels are empty for sm_80, and never launched
                if not here and not options.filter and not ("hopper" in kernel and arch == "sm_80"):
                    ok(f"{arch} {precision} {names[kernel]}", "no test launches it")
    did = speed(runs, time.time() - begin, options.jobs)
    print(did)
    if options.table:
        with open(options.table, "w") as f:
            f.write(table(rows, options, runs, did))


def table(rows, options, runs, did):
    columns = [(a, p) for p in PRECISIONS for a in ARCHS]
    reports = sum(r.fault().startswith("ptx:") for r in runs)
    out = ["# The compiled kernels, as the tests ran them", "",
           f"Written by `dev/ptx/check.py --seeds {options.seeds} --table {options.table}` (`make ptx-check`): the PTX that nvcc",
           "makes of test_gpt.cu, on the machine in dev/ptx. A cell is *tests that launched the kernel / runs (tests by seeds) /",
           f"reports*; - is no such kernel. {len(runs)} runs, {reports} reports, "
           f"{sum(bool(r.fault()) for r in runs)} failures;", did + ".", "",
           "| kernel | " + " | ".join(f"{p} {a}" for a, p in columns) + " |", "|---|" + "--:|" * len(columns)]
    for name in sorted(rows):
        cells = []
        for column in columns:
            here = rows[name].get(column)
            found = sum(r.fault().startswith("ptx:") for r in here or [])
            cells.append("-" if here is None else f"{len({r.where[2] for r in here})} / {len(here)} / {found}")
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--filter", default="")
    parser.add_argument("--table", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    os.chdir(ROOT)
    nvcc = os.environ.get("NVCC", shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"))
    if options.save:
        ptx = "build/test_gpt.sm_90a.bf16.ptx"
        make(ptx)
        with open(ptx) as f:
            names = demangle(re.findall(r"\.visible \.entry (\w+)", f.read()))
        with open(SAVED, "w") as f:
            f.write(chosen(ptx, names))
        return 0
    if options.quick:
        quick(options, nvcc)
    elif nvcc:
        full(options)
    else:
        print("check.py: nvcc is missing. Install the CUDA Toolkit, or run: dev/ptx/check.py --quick", file=sys.stderr)
        return 1
    print(f"ptx: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
