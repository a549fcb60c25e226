#!/usr/bin/env python3
"""Fuzzes every reader of dev/fuzz/fuzz.cu with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.

usage: dev/fuzz/run.py [--target NAME ...] [--seconds N | --runs N] [--jobs N] [--corpus DIR]

Begins with dev/fuzz/seeds/TARGET. Prints a line a target: runs, runs a second, edges covered, inputs that the corpus has then,
and what was found. A finding's input stays in build/fuzz-findings/, with the command that repeats it; exit status 1. Needs
clang++ with its runtime (Debian: clang, libclang-rt-dev); where it is missing everything is left out, with a line. Standard
library only.
"""
import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEEDS = os.path.join(ROOT, "dev", "fuzz", "seeds")
FINDINGS = os.path.join(ROOT, "build", "fuzz-findings")
TARGETS = sorted(os.listdir(SEEDS))
# An input has a few KB. Larger allocations are only those that do not depend on it (the trainer's workspace).
LIMITS = ["-malloc_limit_mb=48", "-rss_limit_mb=2048", "-timeout=10", "-max_len=32768"]


def can_build():
    """Whether clang++ is here and links libFuzzer with both sanitizers."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "empty.cpp")
        with open(source, "w") as f:
            f.write('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n')
        command = ["clang++", "-fsanitize=fuzzer,address,undefined", source, "-lgomp", "-o", os.path.join(folder, "empty")]
        return bool(shutil.which("clang++")) and subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def fuzz(target, args, seconds):
    """Returns (target, line for people, found)."""
    corpus = os.path.join(args.corpus, target) if args.corpus else tempfile.mkdtemp(prefix="fuzz_corpus_")
    os.makedirs(corpus, exist_ok=True)
    os.makedirs(FINDINGS, exist_ok=True)
    seeds = [os.path.join(SEEDS, target)]
    prefix = os.path.join(FINDINGS, target + "-")
    if target == "tokenizer":  # those of the tests are good beginnings, too
        fixtures = os.path.join(ROOT, "dev", "test", "tokenizer")
        for name in sorted(os.listdir(fixtures)):
            if name.endswith(".bin"):
                shutil.copy(os.path.join(fixtures, name), corpus)
    limit = [f"-runs={args.runs}"] if args.runs else [f"-max_total_time={max(1, round(seconds))}"]
    try:
        env = {**os.environ, "FUZZ_TARGET": target, "OMP_NUM_THREADS": "1"}
        run = subprocess.run([os.path.join(ROOT, "build", "fuzz"), *limit, *LIMITS, "-print_final_stats=1", "-close_fd_mask=1",
                              f"-artifact_prefix={prefix}", corpus, *seeds], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, errors="replace")
    finally:
        if not args.corpus:
            shutil.rmtree(corpus, ignore_errors=True)
    runs = re.search(r"number_of_executed_units:\s*(\d+)", run.stderr)
    speed = re.search(r"average_exec_per_sec:\s*(\d+)", run.stderr)
    last = re.findall(r"cov: (\d+).*?corp: (\d+)", run.stderr)
    number = [m.group(1) if m else "?" for m in (runs, speed)] + list(last[-1] if last else ("?", "?"))
    line = f"{target:12} {number[0]:>10} runs {number[1]:>8} a second {number[2]:>6} edges {number[3]:>6} inputs"
    if run.returncode == 0:
        return target, line + "   nothing found", False
    why = re.search(r"^(fuzz: .*|.*runtime error: .*|.*ERROR: .*)$", run.stderr, re.M)
    kept = re.search(r"Test unit written to (\S+)", run.stderr)
    line += f"   FOUND {why.group(1).strip() if why else f'exit status {run.returncode}'}"
    if kept:
        line += f"\n    FUZZ_TARGET={target} build/fuzz {os.path.relpath(kept.group(1), ROOT)}"
    return target, line, True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may stand several times")
    parser.add_argument("--seconds", type=float, default=60, help="in all, the same for each target (60)")
    parser.add_argument("--runs", type=int, help="of each target, in place of --seconds")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (1)")
    parser.add_argument("--corpus", metavar="DIR", help="keep what is learnt there, and begin with it the next time")
    args = parser.parse_args()
    if not can_build():
        print("left out: no clang++ with libFuzzer. apt-get install clang libclang-rt-dev\nfuzz: 0 passed, 0 failed")
        return 0
    make = subprocess.run(["make", "--no-print-directory", "build/fuzz"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if make.returncode:
        sys.exit("run.py: build/fuzz does not build:\n" + make.stdout)
    targets = args.target or TARGETS
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        seconds = args.seconds * min(args.jobs, len(targets)) / len(targets)
        try:
            for done in concurrent.futures.as_completed([pool.submit(fuzz, t, args, seconds) for t in targets]):
                target, line, found = done.result()
                failed += found
                print(("FAIL " if found else "") + line, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise
    print(f"fuzz: {len(targets) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
