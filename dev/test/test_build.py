#!/usr/bin/env python3
"""Tests of the build: for GPUs the architectures that make chooses, what nvcc, where there is one, says of the sources,
and the build without NCCL; for CPUs that a library which does not know the processor is reported. Standard library
only.

usage: dev/test/test_build.py [--full]

nvcc compiles the trainer in bf16 for sm_80, optimising nothing, and for sm_90a what is Hopper's alone. --full: all of
it for sm_90a, in fp32 too, without NCCL, for the other architectures, and the tests and the bench.
"""
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
FULL = "--full" in sys.argv
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ALONE, TRAINER = "build/train_gpt_alone_fp32", "build/train_gpt_cpu_fp32"
CPU = Path("/proc/cpuinfo").read_text()
# what nvcc --list-gpu-arch knows in CUDA 12.0, and some of what it knows in 13.0
CUDA_12 = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
CUDA_13 = "75 80 86 87 88 89 90 100 110 103 120 121"
PTX = "-gencode=arch=compute_80,code=compute_80"


def make(*words, **env):
    """make's exit status and what it says"""
    done = subprocess.run(["make", "-s", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, **env})
    return done.returncode, done.stdout


def gpu_arch(capabilities, known, *words):
    """GPU_ARCH where nvidia-smi prints the one and nvcc knows the other"""
    with tempfile.TemporaryDirectory() as work:
        for name, text in (("nvidia-smi", capabilities), ("nvcc", "".join(f"compute_{a}\n" for a in known.split()))):
            Path(work, name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
            Path(work, name).chmod(0o755)
        return make("--eval=show:;@echo $(GPU_ARCH)", "show", *words, PATH=work + ":" + os.environ["PATH"])[1].split()


def codes(*names):
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in names]


# each of Hopper's kernels, which the trainer gets with this header
HOPPER = """#include <tuple>
#include "dev/device/attention_hopper.cuh"
auto kernels = std::make_tuple(attention_forward_hopper<64>, attention_forward_hopper<128>,
                               attention_backward_hopper<64>, attention_backward_hopper<128>);
"""


def nvcc(source, archs, *flags, stdin=""):
    """what nvcc complains of, "" if all is well; a product that waits for the one before it is told as information"""
    flags = ["-std=c++17", "-Xcompiler", "-O0,-fopenmp,-pthread,-Wall", "-DPRECISION_BF16", "-I.", *codes(*archs),
             *flags]
    done = subprocess.run([NVCC, *flags, "-c", source, "-o", os.devnull], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, input=stdin)
    return done.stdout if done.returncode or re.search("warning|serialized", done.stdout) else ""


class Build(unittest.TestCase):
    def test_architectures(self):
        """those of the GPUs that are there; else all that nvcc knows of those we build for, and PTX"""
        everything, of_12 = codes("80", "90a", "100", "120") + [PTX], codes("80", "90a") + [PTX]
        for capabilities, known, want in (
            ("9.0\n9.0\n", CUDA_13, codes("90a")), ("8.0\n", CUDA_12, codes("80")), ("12.1\n", CUDA_13, codes("121")),
            ("8.9\n8.6\n", CUDA_13, codes("86", "89")), ("10.3\n", CUDA_13, codes("103")),
            ("7.5\n8.0\n", CUDA_13, codes("80")),  # what no kernel runs on is left out
            ("", CUDA_13, everything), ("", CUDA_12, of_12), ("7.5\n", CUDA_13, everything), ("10.0\n", CUDA_12, of_12),
            ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", CUDA_13, everything),
        ):
            with self.subTest(capabilities=capabilities, known=known):
                self.assertEqual(gpu_arch(capabilities, known), want)
        self.assertEqual(gpu_arch("9.0\n", CUDA_13, "GPU_ARCH=-arch=sm_86"), ["-arch=sm_86"])

    def train(self, trainer, **env):
        """Two steps of a small model."""
        with tempfile.TemporaryDirectory() as work:
            shard = Path(work, "tokens.bin")
            tokens = bytes([1, 0] * 500)
            shard.write_bytes(b"".join(n.to_bytes(4, "little") for n in [20240520, 1, 500] + [0] * 253) + tokens)
            options = "--dim 32 --layers 1 --heads 2 --vocab-size 8 --seq-len 16 --batch-size 2 --steps 2 --lr 1e-3"
            command = [str(ROOT / trainer), *options.split(), "--out", "run", "--train-data", str(shard)]
            return subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, **env})

    def test_without_nccl(self):
        """one rank trains; several are refused, in one line"""
        self.assertEqual(make(ALONE)[0], 0)
        for ranks, status in ((1, 0), (2, 1)):
            done = self.train(ALONE, RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT="1")
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertEqual(done.stderr.count("\n"), status)
        self.assertRegex(done.stderr, "^train_gpt: .*lacks NCCL.* Install it .*build again")

    @unittest.skipUnless(platform.machine() == "x86_64" and " avx2 " in CPU, "this processor has no AVX2")
    def test_slow_library(self):
        """one that takes this processor for an old one is named, its remedy helps; so is oneDNN, told to be old"""
        self.assertEqual(make(ALONE)[0], 0)
        old = self.train(ALONE, OPENBLAS_CORETYPE="Prescott")  # what it takes where it does not know the model
        self.assertIn("\nmatmul: OpenBLAS ", old.stdout)
        remedy = re.fullmatch(
            r"train_gpt: warning: matmul: OpenBLAS \S+ Prescott reaches \d+% of the processor's rate. "
            r"Install oneDNN \(libdnnl-dev\) and make again, or set (\w+)=(\w+).\n", old.stderr)
        self.assertTrue(remedy, old.stderr)
        self.assertEqual(self.train(ALONE, **{remedy[1]: remedy[2]}).stderr, "")
        if (ROOT / TRAINER).exists() and "oneDNN" in (done := self.train(TRAINER)).stdout:
            self.assertRegex(done.stdout, "\nmatmul: oneDNN .* AVX.*, [1-9][0-9]* thread")
            self.assertEqual(done.stderr, "")
            old = self.train(TRAINER, ONEDNN_MAX_CPU_ISA="SSE41")
            self.assertRegex(old.stderr, "matmul: oneDNN .* SSE4.1 reaches .*% of the processor's rate. Unset ONEDNN")

    @unittest.skipUnless(NVCC, "there is no nvcc")
    def test_nvcc_takes_the_trainer(self):
        fast = ["-Xcicc", "-O0", "-Xptxas", "-O0"]
        self.assertEqual(nvcc("train_gpt.cu", ["80"], *fast, *make("nccl")[1].split()), "")
        self.assertEqual(nvcc("-", ["90a"], "-x", "cu", stdin=HOPPER), "")

    @unittest.skipUnless(NVCC and FULL, "is for --full")
    def test_nvcc_takes_all(self):
        flags = make("nccl")[1].split()
        for source in ("train_gpt.cu", "test_gpt.cu", "dev/bench/bench.cu"):
            self.assertEqual(nvcc(source, ["80", "90a"], *flags), "")
        self.assertEqual(nvcc("train_gpt.cu", ["80", "90a"], "-UPRECISION_BF16", *flags), "")
        self.assertEqual(nvcc("train_gpt.cu", ["80"], *make("nccl", "NCCL=")[1].split()), "")
        known = subprocess.run([NVCC, "--list-gpu-arch"], stdout=subprocess.PIPE, text=True).stdout
        later = [a for a in ("86", "89", "100", "120") if f"compute_{a}\n" in known]
        self.assertEqual(nvcc("train_gpt.cu", later, *flags), "")


if __name__ == "__main__":
    sys.exit(run_all("test_build"))
