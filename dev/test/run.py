#!/usr/bin/env python3
"""Builds and runs every test that needs no GPU, two jobs at a time, and adds up. `make test` calls it.

usage: dev/test/run.py [FILTER ...]      only jobs whose name holds one of the words
Each test program ends with `NAME: N passed, M failed`; logs lie in build/log/. Exit status 1 if anything failed.
"""
import concurrent.futures
import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GOLDEN = "dev/test/golden"

# name: make targets, command, environment; the long ones first
JOBS = {
    "exact_fp32": (["build/test_exact_fp32"], ["build/test_exact_fp32"], {"CUDA_CPU_SEED": "1"}),
    "exact_bf16": (["build/test_exact_bf16"], ["build/test_exact_bf16"], {"CUDA_CPU_SEED": "2"}),
    "sanitized_fp32": (["build/test_sanitized_fp32"], ["build/test_sanitized_fp32", "--quick"], {"CUDA_CPU_SEED": "3"}),
    "sanitized_bf16": (["build/test_sanitized_bf16"], ["build/test_sanitized_bf16", "--quick"], {"CUDA_CPU_SEED": "4"}),
    "serial_fp32": (["build/test_serial_fp32"], ["build/test_serial_fp32"], {}),
    "serial_bf16": (["build/test_serial_bf16"], ["build/test_serial_bf16"], {}),
    "cli_fp32": (["build/train_gpt_cpu_fp32"], [sys.executable, "dev/test/test_cli.py", "build/train_gpt_cpu_fp32", GOLDEN], {}),
    "cli_bf16": (["build/train_gpt_cpu_bf16"], [sys.executable, "dev/test/test_cli.py", "build/train_gpt_cpu_bf16", GOLDEN, "--bf16"], {}),
    "standin_exact": (["build/test_standin_exact"], ["build/test_standin_exact"], {}),
    "standin_serial": (["build/test_standin_serial"], ["build/test_standin_serial"], {}),
    "dataloader": (["build/test_dataloader"], ["build/test_dataloader"], {}),
    "tokenizer": (["build/test_tokenizer"], ["build/test_tokenizer"], {}),
    "prepare": ([], [sys.executable, "dev/test/test_prepare.py"], {}),
}


def job(name):
    """Builds, runs, returns (name, passed, failed, seconds, last words)."""
    targets, command, env = JOBS[name]
    begin = time.time()
    log = os.path.join("build", "log", name + ".txt")
    with open(log, "w") as f:
        built = not targets or subprocess.run(["make", "--no-print-directory", *targets], stdout=f, stderr=f).returncode == 0
        if built:
            env = {"OMP_NUM_THREADS": "1", **os.environ, **env}  # two jobs at a time have a core each
            status = subprocess.run(command, stdout=f, stderr=f, env=env).returncode
    with open(log, errors="replace") as f:
        text = f.read()
    total = re.findall(r"^\S+: (\d+) passed, (\d+) failed$", text, re.M)
    passed, failed = (int(n) for n in total[-1]) if total else (0, 0)
    if not built or not total or (status != 0 and failed == 0):
        failed += 1
        text += f"\nFAIL {name} " + ("did not build" if not built else f"ended with status {status}")
    bad = [line for line in text.splitlines() if line.startswith("FAIL")] if failed else []
    return name, passed, failed, time.time() - begin, bad


def main():
    os.chdir(ROOT)
    os.makedirs("build/log", exist_ok=True)
    # what several jobs share is made once, before they start
    subprocess.run(["make", "--no-print-directory", "build/src/train_gpt.cu", "build/src/simplenorm.cuh",
                    "build/src/test_gpt.cu"], check=True, stdout=subprocess.DEVNULL)
    names = [n for n in JOBS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])]
    passed = failed = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in concurrent.futures.as_completed([pool.submit(job, n) for n in names]):
            name, ok, bad, seconds, lines = done.result()
            passed, failed = passed + ok, failed + bad
            print(f"{name:16} {ok:5} passed {bad:4} failed {seconds:7.1f} s", flush=True)
            for line in lines[:20]:
                print(f"    {line}   (build/log/{name}.txt)")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
