#!/usr/bin/env python3
"""Tests of the tools around the machine that runs PTX: what they say, and what a person who errs is told. Standard
library only; wants build/test_exact_bf16.

usage: dev/test/test_ptx.py
"""
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from launch import MPI_ENV
from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "build/test_exact_bf16"
PTX = "build/test_gpt.sm_90a.bf16.ptx"
SAVED = "dev/ptx/kernels.ptx"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def run(*command, **env):
    return subprocess.run([*command], cwd=ROOT, env={**os.environ, **MPI_ENV, **env}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, errors="replace")


def check(*options, **env):
    return run(sys.executable, "dev/ptx/check.py", *options, **env)


class Ptx(unittest.TestCase):
    def test_without_nvcc_the_saved_kernels_run(self):
        done = check("--quick", "--filter", "norm_backward", NVCC="")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertIn(f"skip nvcc is missing: only the kernels in {SAVED} run as PTX", done.stdout)
        self.assertIn("ptx: 1 passed, 0 failed", done.stdout)
        self.assertRegex(done.stdout, r"million warp instructions, .* a second")

    def test_all_of_it_needs_nvcc(self):
        with tempfile.TemporaryDirectory() as folder:
            done = check("--seeds", "1", "--seed", "2", "--jobs", "1", "--table", folder + "/table.md", NVCC="")
            self.assertEqual((done.returncode, os.listdir(folder)), (1, []))
        self.assertEqual(done.stdout, "check.py: nvcc is missing. Install the CUDA Toolkit, or run: "
                                      "dev/ptx/check.py --quick\n")

    @unittest.skipUnless(NVCC, "needs nvcc")
    def test_saved_kernels_are_written_as_they_are(self):
        before = (ROOT / SAVED).read_bytes()
        done = check("--save")
        after = (ROOT / SAVED).read_bytes()
        (ROOT / SAVED).write_bytes(before)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertEqual(after, before)

    def test_a_file_that_is_none(self):
        with tempfile.NamedTemporaryFile(suffix=".ptx") as empty:
            for path, why in (("nowhere.ptx", "No such file or directory"), (empty.name, "empty")):
                done = run(PROGRAM, "--only", "tridiagonal", CUDA_CPU_PTX=path)
                self.assertEqual((done.returncode, done.stdout),
                                 (1, f"cuda: {path}: {why}. CUDA_CPU_PTX must be a file of PTX.\n"))

    def test_a_kernel_that_is_not_there_and_an_unknown_instruction(self):
        done = run(PROGRAM, "--only", "norm_residual", CUDA_CPU_PTX=SAVED)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"kernels.ptx has no kernel norm_residual_forward_kernel<\d> \(_Z")
        text = (ROOT / SAVED).read_text().replace("fma.rn.f32", "fma.rm.f32")
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
            f.write(text)
            f.flush()
            done = run(PROGRAM, "--only", "cross_entropy", CUDA_CPU_PTX=f.name, CUDA_CPU_PTX_PART="1")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"\.ptx:\d+: unknown instruction 'fma.rm.f32'")

    def test_without_nvcc_no_faults_are_planted(self):
        with tempfile.TemporaryDirectory() as folder:  # in which there is no PTX
            (Path(folder) / "dev/ptx").mkdir(parents=True)
            shutil.copy(ROOT / "dev/ptx/plant.py", folder + "/dev/ptx")
            done = run(sys.executable, folder + "/dev/ptx/plant.py", "--quick", NVCC="")
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout, r"^skip plant: there is no .* and no nvcc to make it\nplant: 0 passed, 0 failed\n$")

    @unittest.skipUnless(NVCC, "needs nvcc")
    def test_planted_faults_are_listed_and_found(self):
        plant = [sys.executable, "dev/ptx/plant.py", "--filter", "norm_backward", "--jobs", "1"]
        listed = run(*plant, "--list")
        self.assertEqual(listed.returncode, 0, listed.stdout)
        self.assertGreater(len(listed.stdout.splitlines()), 1)
        done = run(*plant, "--quick", "--seeds", "1", "--verbose", "--table")
        self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == "__main__":
    sys.exit(run_all("test_ptx"))
