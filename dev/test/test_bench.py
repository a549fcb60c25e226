#!/usr/bin/env python3
"""Tests of dev/bench/bench.cu (its --quick run), report.py and ptx_costs.py through their command lines. Standard
library only.

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
COSTS = os.path.join(ROOT, "dev", "bench", "ptx_costs.py")
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
        self.assertEqual({k["name"] for k in record["kernels"]},
                         {"attention_forward", "attention_backward", "attention_delta"})

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

    # what ptx_costs.py reads: lanes write every 8th word of shared and of global memory, in a loop of 10
    PTX = """.version 8.3
.file 1 "/src/copy.cu"
.file 2 "/src/lane.cuh"
.visible .entry _Z11copy_kernelILi4EEvPf(.param .u64 p)
{
.loc 1 7 1
$L1:
st.shared.f32 [%r1], %f1;
.loc 2 9 3, function_name $L__info_string1, inlined_at 1 8 3
@%p1 st.global.f32 [%rd1], %f1;
{ ex2.approx.f32 %f1, %f1; add.f32 %f1, %f1, %f1;}
mov.b32 %f2, %f1;
add.s64 %rd1, %rd1, 4;
@%p1 bra $L1;
ret;
}
"""
    PTXAS = """ptxas info    : Compiling entry function '_Z11copy_kernelILi4EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z11copy_kernelILi4EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem
"""
    COUNTS = {"kernel": "_Z11copy_kernelILi4EEvPf", "grid": [1320, 1, 1], "block": [256, 1, 1], "model": "1B",
              "batch_size": 8, "seq_len": 2048, "case": "copy", "shape": "N 5", "flops": 0, "bytes": 3.35e9, "parts": 1,
              "shared": 28672, "blocks": 4, "warps": 32, "tensor": 0, "floats": 320, "integers": 640, "special": 320,
              "memory": 640, "control": 352, "tensor_flops": 0, "sectors": 10240, "sectors_needed": 1280,
              "to_l2": 10240, "wavefronts": 2560, "wavefronts_needed": 320, "barriers": 32, "read": 0, "written": 40960,
              "read_distinct": 0, "written_distinct": 327680, "shared_distinct": 0, "uncovered": 0,
              "lines": [[8, 320, 0, 0, 0, 2240], [10, 320, 10240, 1280, 10240, 0], [11, 320, 0, 0, 0, 0],
                        [11, 320, 0, 0, 0, 0], [12, 320, 0, 0, 0, 0], [13, 320, 0, 0, 0, 0], [14, 320, 0, 0, 0, 0],
                        [15, 32, 0, 0, 0, 0]]}

    def costs(self, *lines, ptxas=PTXAS):
        for name, text in (("k.ptx", self.PTX), ("k.ptxas", ptxas), ("counts", "".join(line + "\n" for line in lines))):
            with open(os.path.join(self.dir.name, name), "w") as f:
                f.write(text)
        at = os.path.join(self.dir.name, "")
        return run(sys.executable, COSTS, "--ptx", at + "k.ptx", "--ptxas", at + "k.ptxas", at + "counts")

    def test_ptx_costs_are_those_by_hand(self):
        done = self.costs(json.dumps(self.COUNTS))
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| copy")]
        self.assertEqual(len(rows), 5)
        # 330 times what was counted, on 132 multiprocessors of 1.83 GHz; HBM's 3.35e9 bytes take 1 ms
        issue = 1e3 * (320 * (1 + 1 + 1 + 1 + 2 + 1) + 32) / 4 * 330 / 132 / 1.83e9
        l1 = 1e3 * (2560 + 10240 / 4) * 330 / 132 / 1.83e9
        l2 = 1e3 * 10240 * 32 * 330 / 6.4e12
        hbm = 1e3 * 327680 * 330 / 3.35e12
        number = "{:.3g}".format
        self.assertEqual(rows[0], ["copy", "N 5", "1", "bytes", number(hbm), "HBM", f"{hbm:.2f}"])
        # 228 KB hold 6 blocks of 28 + 4 and the system's 1; warps allow 8, 40 registers 6
        self.assertEqual(rows[1][:7], ["copy: copy<4>", "1320 x 256", "40", "32.0", "6 (48)", "1.67", number(issue)])
        self.assertEqual(rows[1][-3:], [number(l1), number(l2), f"**{number(hbm)}**"])
        self.assertEqual(rows[2][1:9], ["0", "10", "20", "10", "20", "11", "", "1"])
        self.assertEqual(rows[2][10:], ["3.38 (0.422)", "3.38", "0.845 (0.106)", "0", "13.5", "108", "3350"])
        beyond = f"{1e6 * 8960 * 32 * 330 / 6.4e12:.3g}"
        self.assertEqual(rows[3][:8], ["copy<4> (1B)", "lane.cuh:9 in copy.cu:8", "`st.global.f32`", "10", "106",
                                       "28.00", "28.00", ""])
        self.assertEqual(rows[3][9], beyond)
        self.assertEqual(rows[4][:8], ["copy<4> (1B)", "copy.cu:7", "`st.shared.f32`", "8", "106", "", "", "7.00"])

    def test_ptx_costs_refuse_what_they_do_not_know(self):
        self.refused(self.costs("{}"), "counts:1:")
        self.refused(self.costs(json.dumps(self.COUNTS), ptxas=""), "_Z11copy_kernelILi4EEvPf", "ptxas")
        self.refused(run(sys.executable, COSTS, "--ptx", "x", "--ptxas", "y", "z"), "x: cannot be read")

    def test_bad_input_is_one_line(self):
        self.refused(run(BENCH, "--part", "bounds"), "--device", "--part bounds")
        self.refused(run(BENCH, "--part", "bounds", "--device", "abacus"), "--device", "abacus")
        self.refused(run(BENCH, "--part", "some"), "--part", "some")
        self.refused(run(BENCH, "--part", "counts"), "--part", "make ptx-costs")
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
