#!/usr/bin/env python3
"""Builds and runs every test that needs no GPU, two jobs at a time, and adds up. `make test` calls it.

usage: dev/test/run.py [FILTER ...]      only jobs whose name holds one of the words
Each test program ends with `NAME: N passed, M failed`; logs lie in build/log/. Exit status 1 if anything failed.
"""
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import threading
import time

from launch import MPI_ENV

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = "dev/test/golden"
CLI = [sys.executable, "dev/test/test_cli.py"]
GENERATE = [sys.executable, "dev/test/test_generate.py"]
RANKS = [sys.executable, "dev/test/test_ranks.py"]
KILL = [sys.executable, "dev/test/kill.py"]
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none"]

# what nvcc makes of the kernels; without it those in dev/ptx/kernels.ptx
PTX = ["build/test_gpt.sm_90a.bf16.ptx"] if shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") else []

# name: make targets, command, seeds of the lanes' order (one run each); the long ones first
JOBS = {
    # what --quick leaves out: at night
    "exact_fp32": (["build/test_exact_fp32"], ["build/test_exact_fp32", "--quick"], [4]),
    "exact_bf16": (["build/test_exact_bf16"], ["build/test_exact_bf16"], [5]),
    "ptx": (["build/test_exact_bf16", *PTX], [sys.executable, "dev/ptx/check.py", "--quick"], [1]),
    "serial_fp32": (["build/test_serial_fp32"], ["build/test_serial_fp32"], [1]),
    # as users build it (test_serial_bf16): at night
    "serial_bf16": (["build/test_serial_o1_bf16"], ["build/test_serial_o1_bf16"], [1]),
    "cli_fp32": (["build/train_gpt_cpu_fp32"], [*CLI, "build/train_gpt_cpu_fp32", GOLDEN], [1]),
    "cli_bf16": (["build/train_gpt_cpu_bf16"], [*CLI, "build/train_gpt_cpu_bf16", GOLDEN, "--bf16"], [1]),
    "channel": (["build/test_channel"], ["build/test_channel"], [1]),
    "ranks_fp32": (["build/train_gpt_cpu_fp32"], [*RANKS, "build/train_gpt_cpu_fp32"], [1]),
    # damage, signals and cut wires (d, e, f) are the same in both precisions
    "ranks_bf16": (["build/train_gpt_cpu_bf16"],
                   [*RANKS, "build/train_gpt_cpu_bf16", "--bf16", "--filter", "^[abcg] "], [1]),
    "generate_fp32": (["build/train_gpt_cpu_fp32"], [*GENERATE, "build/train_gpt_cpu_fp32"], [1]),
    "generate_bf16": (["build/train_gpt_cpu_bf16"], [*GENERATE, "build/train_gpt_cpu_bf16", "--bf16"], [1]),
    "disk": (["build/train_gpt_cpu_fp32"], [sys.executable, "dev/test/test_disk.py", "build/train_gpt_cpu_fp32"], [1]),
    "kill": (["build/train_gpt_cpu_fp32"], [*KILL, "build/train_gpt_cpu_fp32", "--kills", "6"], [1]),
    "fuzz": ([], [sys.executable, "dev/fuzz/run.py", "--seconds", "10"], [1]),
    "faults": (["build/train_gpt_cpu_fp32"],
               [sys.executable, "dev/test/test_faults.py", "build/train_gpt_cpu_fp32"], [1]),
    "properties_ranks": (["build/train_gpt_cpu_fp32"],
                         [sys.executable, "dev/test/properties_ranks.py", "build/train_gpt_cpu_fp32"], [1]),
    "ptx_machine": (["build/test_ptx"], ["build/test_ptx"], [1]),
    "ptx_tools": (["build/test_exact_bf16", *PTX], [sys.executable, "dev/test/test_ptx.py"], [1]),
    "ptx_plant": (["build/test_exact_bf16", *PTX], [sys.executable, "dev/ptx/plant.py", "--quick"], [1]),
    "counts": (["build/test_counts"], ["build/test_counts"], [1]),
    "standin_exact": (["build/test_standin_exact"], ["build/test_standin_exact"], [1]),
    "standin_serial": (["build/test_standin_serial"], ["build/test_standin_serial"], [1]),
    **{f"nccl_{n}": (["build/test_nccl"], [*MPIRUN, "-n", str(n), "build/test_nccl"], [1]) for n in range(1, 5)},
    "dataloader": (["build/test_dataloader"], ["build/test_dataloader"], [1]),
    "dataloader_tsan": (["build/test_dataloader_tsan"], ["build/test_dataloader_tsan"], [1]),
    "clean_run": (["build/train_gpt_asan_fp32"],
                  [sys.executable, "dev/test/clean_run.py", "build/train_gpt_asan_fp32", "--quick"], [1]),
    "tokenizer": (["build/test_tokenizer"], ["build/test_tokenizer", "dev/test/tokenizer"], [1]),
    "build": (["build/train_gpt_alone_fp32"], [sys.executable, "dev/test/test_build.py"], [1]),
    "sass": ([], [sys.executable, "dev/test/test_sass.py", "--quick"], [1]),
    "bench": (["build/test_bench"], [sys.executable, "dev/test/test_bench.py", "build/test_bench"], [1]),
    "docs": (["build/train_gpt_cpu_fp32"], [sys.executable, "dev/test/test_docs.py", "build/train_gpt_cpu_fp32"], [1]),
    "house": ([], [sys.executable, "dev/test/test_house.py"], [1]),
    "mutate": ([], [sys.executable, "dev/test/test_mutate.py"], [1]),
    "gpu_check": ([], [sys.executable, "dev/test/test_gpu_check.py"], [1]),
    "plot": ([], [sys.executable, "dev/test/test_plot.py"], [1]),
    "experiments": (["build/train_gpt_cpu_fp32"],
                    [sys.executable, "dev/test/test_experiments.py", "build/train_gpt_cpu_fp32"], [1]),
    "claim": (["build/train_gpt_cpu_fp32"],
              [sys.executable, "dev/test/test_claim.py", "build/train_gpt_cpu_fp32"], [1]),
    "hf": (["build/train_gpt_cpu_fp32"], [sys.executable, "dev/test/test_hf.py", "build/train_gpt_cpu_fp32", GOLDEN],
           [1]),
    "prepare": ([], [sys.executable, "dev/test/test_prepare.py"], [1]),
    "convert_tokenizer": (["build/test_tokenizer"], [sys.executable, "dev/test/test_convert_tokenizer.py"], [1]),
}

# of each target: two makes at once would write the same file, one while the other's job runs it
BUILDING = {targets[0]: threading.Lock() for targets, _, _ in JOBS.values() if targets}


def job(name):
    """Builds, runs, returns (name, passed, failed, seconds, what failed or was skipped)."""
    targets, command, seeds = JOBS[name]
    begin = time.time()
    log = os.path.join("build", "log", name + ".txt")
    passed, bad, skipped = 0, [], []
    with open(log, "w") as f:
        if targets:
            with BUILDING[targets[0]]:
                make = subprocess.run(["make", "--no-print-directory", *targets], stdout=f, stderr=f)
            if make.returncode:
                return name, 0, 1, time.time() - begin, [f"FAIL {name} did not build"]
        for seed in seeds:
            # bf16 jobs as a CPU is, the others as a GPU: with algorithms to choose from, which round differently
            algorithms = "" if name.endswith("bf16") else "3"
            env = {**MPI_ENV, "CUBLASLT_CPU_ALGORITHMS": algorithms, **os.environ, "CUDA_CPU_SEED": str(seed)}
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, errors="replace")
            f.write(run.stdout)
            total = re.findall(r"^\S+: (\d+) passed, (\d+) failed$", run.stdout, re.M)
            passed += int(total[-1][0]) if total else 0
            fails = [line for line in run.stdout.splitlines() if line.startswith("FAIL")]
            skipped += [line for line in run.stdout.splitlines() if line.startswith("skip") and "--full" not in line]
            if run.returncode and not fails:
                fails = [f"FAIL {name} ended with status {run.returncode}, seed {seed}"]
            elif not total:
                fails.append(f"FAIL {name} did not count its tests")
            bad += fails
    return name, passed, len(bad), time.time() - begin, bad[:20] + skipped


def main():
    os.chdir(ROOT)
    os.makedirs("build/log", exist_ok=True)
    names = [n for n in JOBS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])]
    # what several jobs share is made once, before they start
    shared = ["sources", "build/src/test_gpt.cu", "build/cpu.flags"]
    shared += ["build/test_nccl"] * any(n.startswith("nccl") for n in names)
    subprocess.run(["make", "--no-print-directory", *shared], check=True, stdout=subprocess.DEVNULL)
    passed = failed = 0
    # these wait most of their time, so they go beside the two
    waits = ("channel", "gpu_check")
    with concurrent.futures.ThreadPoolExecutor(2) as pool, concurrent.futures.ThreadPoolExecutor(1) as waiting:
        for done in concurrent.futures.as_completed([(waiting if n in waits else pool).submit(job, n) for n in names]):
            name, ok, bad, seconds, lines = done.result()
            passed, failed = passed + ok, failed + bad
            print(f"{name:16} {ok:5} passed {bad:4} failed {seconds:7.1f} s", flush=True)
            for line in lines:
                print(f"    {line}   (build/log/{name}.txt)")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
