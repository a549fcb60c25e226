#!/usr/bin/env python3
"""Tests of dev/bench/bench.cu (its --quick run) and report.py through their command lines. Standard library only.

usage: dev/test/test_bench.py BENCH
"""
import json
import os
import subprocess
import sys
import tempfile
import unittest

from lines import run_all

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
REPORT = os.path.join(ROOT, "dev", "bench", "report.py")
BENCH = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "build", "bench_cpu_fp32")
KERNELS = ["norm_residual_forward", "norm_backward", "qkv_norm_rope_forward", "qkv_norm_rope_backward",
           "ffn_norm_act_forward", "ffn_norm_act_backward", "gain_grad", "embedding_forward", "embedding_backward",
           "cross_entropy", "attention_forward", "attention_backward", "linear_forward", "linear_backward, inputs",
           "linear_backward, weights", "gradient norm", "AdamW"]


def run(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Bench(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.addCleanup(self.dir.cleanup)

    def quick(self, *flags):
        done = run(BENCH, "--quick", "--results", self.dir.name, *flags)
        self.assertEqual(done.returncode, 0, done.stderr)
        path, = (os.path.join(self.dir.name, name) for name in os.listdir(self.dir.name))
        with open(path) as f:
            return path, json.load(f), done.stdout

    def refused(self, done, *words):
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def test_every_kernel_has_a_time_and_a_bound(self):
        path, record, out = self.quick()
        self.assertEqual({k["name"] for k in record["kernels"]} & set(KERNELS), set(KERNELS))
        for kernel in record["kernels"]:
            self.assertGreater(kernel["ms"], 0)
            self.assertGreater(kernel["bound_ms"], 0)
            self.assertIn(kernel["name"], out)
        for key in ("date", "device", "precision"):
            self.assertTrue(record[key])
        self.assertGreater(record["copy_gb_s"], 0)
        self.assertGreater(record["matmul_tflops"], 0)
        report = run(sys.executable, REPORT, path)
        self.assertEqual(report.returncode, 0, report.stderr)
        for kernel in record["kernels"]:
            self.assertIn(f"| {kernel['name']} | {kernel['shape']} |", report.stdout)

    def test_a_filter_leaves_the_others_out(self):
        _, record, _ = self.quick("--filter", "attention")
        self.assertEqual({k["name"] for k in record["kernels"]}, {"attention_forward", "attention_backward"})

    def test_ceilings_alone(self):
        _, record, _ = self.quick("--part", "ceilings")
        self.assertFalse(record.get("kernels"))
        self.assertGreater(record["matmul_tflops"], 0)

    def test_bounds_are_of_a_device_that_is_not_there(self):
        _, record, _ = self.quick("--part", "bounds", "--device", "100,1000,80")
        self.assertEqual({k["name"] for k in record["kernels"]} & set(KERNELS), set(KERNELS))
        for kernel in record["kernels"]:
            self.assertEqual(kernel["ms"], 0)
            least = 1e3 * max(kernel["flops"] / 100e12, kernel["bytes"] / 1000e9)
            self.assertAlmostEqual(kernel["bound_ms"], least, delta=1e-4 * least)

    def test_map_has_a_steps_kernels_by_cost(self):
        path, record, _ = self.quick("--filter", "norm")
        page = run(sys.executable, REPORT, "--map", path).stdout
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and " N 64" in line]
        self.assertEqual(len(rows), sum(k["times"] > 0 and k["shape"].startswith("N 64") for k in record["kernels"]))
        cost = [float(row[4]) for row in rows]
        self.assertEqual(cost, sorted(cost, reverse=True))
        for row in rows:
            kernel, = (k for k in record["kernels"] if k["name"] == row[0][2:])
            self.assertEqual(row[4], f"{kernel['times'] * kernel['ms']:.4g}")
            self.assertEqual(row[6], f"{100 * kernel['bound_ms'] / kernel['ms']:.1f}%")

    def test_committed_map_is_that_of_the_committed_results(self):
        with open(os.path.join(ROOT, "dev", "bench", "results", "costs.md")) as f:
            self.assertEqual(f.read(), run(sys.executable, REPORT, "--map").stdout)

    def test_libraries_that_are_here_are_compared(self):
        tool = [sys.executable, os.path.join(ROOT, "dev", "bench", "libraries.py")]
        done = run(*tool, *"--rounds 1 --threads 2 --shapes 96x64x32 --results".split(), self.dir.name)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"OpenBLAS .*\n.*\n\| 96 x 64 x 32( \| [0-9]+ [0-9]+ [0-9]+)+ \|\n")
        (path,) = os.listdir(self.dir.name)
        with open(os.path.join(self.dir.name, path)) as f:
            self.assertTrue(done.stdout.startswith(f.read()))
        self.refused(run(*tool, "--shapes", "96x64"), "libraries.py: --shapes: '96x64' is none of", "nor NxKxM")

    def test_bad_input_is_one_line(self):
        self.refused(run(BENCH, "--part", "bounds"), "--device", "--part bounds")
        self.refused(run(BENCH, "--part", "bounds", "--device", "abacus"), "--device", "abacus")
        self.refused(run(BENCH, "--part", "some"), "--part", "some")
        self.refused(run(BENCH, "--model", "1T"), "--model", "1T")
        self.refused(run(BENCH, "--wrong"), "--wrong", "--help")
        self.refused(run(BENCH, "--seq-len"), "--seq-len", "needs a value")
        self.refused(run(BENCH, "--quick", "--results", __file__ + "/x"), "test_bench.py")
        bad = os.path.join(self.dir.name, "bad.json")
        self.refused(run(sys.executable, REPORT, bad), "bad.json")
        with open(bad, "w") as f:
            f.write("{")
        self.refused(run(sys.executable, REPORT, bad), "bad.json")


if __name__ == "__main__":
    sys.exit(run_all("test_bench"))
