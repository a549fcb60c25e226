#!/usr/bin/env python3
"""Tests of dev/ci/gpu_check.py, without a GPU: it runs in a folder whose programs are small scripts that do as `faults`
says. Standard library only.

usage: dev/test/test_gpu_check.py
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "dev" / "ci"))
import gpu_check  # noqa: E402

FIRST = ["build", "tests", "train", "steps", "kernels", "sanitize"]
NAP = "61.5437"  # seconds of what hangs, by which its process is known

# of every script: `faulty WORDS` if there is such a line in `faults`; what it was called with goes to `calls`
HEAD = f"""#!/bin/sh
echo "$(basename "$0") $*" >>calls
faulty() {{ if [ "$1" = hang ]; then grep -qsx "$*" faults && sleep {NAP}; else grep -qsx "$*" faults; fi; }}
"""
FILES = {
    "bin/nvidia-smi": """
faulty no gpu && exit 9
memory=81559
faulty small && memory=8192
echo "NVIDIA H100 80GB HBM3, 9.0, $memory, 580.1, Default"
faulty two gpus && echo "NVIDIA H100 80GB HBM3, 9.0, $memory, 580.1, Default"
true
""",
    "bin/nvcc": "echo release 13.0, V13.0.48",
    "bin/compute-sanitizer": r"""
version=2025.3
faulty new sanitizer && version=2026.3
[ "$1" = --version ] && echo "Version $version.0.0 (build 1)" && exit
tool=$2
shift 4
for name; do :; done
echo "========= COMPUTE-SANITIZER"
"$@" || exit
count=0
report() {
    count=$((count + 1))
    echo "========= Error: Race reported between Write access at void $1<(int)64>(float *)+0x100"
    echo "=========     and Read access at void $2<(int)64>(float *)+0x200 [32 hazards]"
    echo "========="
}
faulty $tool $name died && exit 0
faulty $tool $name hopper && report attention_forward_hopper_kernel attention_forward_hopper_kernel
faulty $tool $name race && report norm_backward_kernel norm_backward_kernel
faulty $tool $name mixed && report attention_forward_hopper_kernel norm_backward_kernel
faulty $tool $name hidden && count=$((count + 7))
case $tool in
racecheck) echo "========= RACECHECK SUMMARY: $count hazards displayed ($count errors, 0 warnings)" ;;
*) echo "========= ERROR SUMMARY: $count errors" ;;
esac
""",
    "fake/test": """
[ "$1" = --list ] && { faulty no list && exit 1; echo norm attention; exit; }
for name; do :; done
faulty hang $name $(basename "$0")
faulty slow && sleep 0.5
faulty $name segfault && kill -SEGV $$
faulty $name none && { echo "test_gpt: 0 passed, 0 failed"; exit; }
faulty $name illegal && { echo "FAIL $name: test_gpt.cu:7: an illegal memory access was encountered"; exit 1; }
echo "ok $name (0.1 s, 0.37 of the tolerance)"
echo "test_gpt: 1 passed, 0 failed"
""",
    "fake/train_gpt": r"""
case "$*" in
*"--model 162M"*) mib=5000 ;;
*"--model 1B"*"--batch-size 64"*) mib=90000 ;;
*"--model 1B"*) mib=60000 ;;
*) mib=70000 ;;
esac
case "$*" in *--plan*) echo "  total    $mib MiB"; exit ;; esac
faulty training && { echo "train_gpt: the loss is not finite" >&2; exit 1; }
faulty rank $RANK && exit 1
echo "40 steps, loss 2.5"
""",
    "fake/bench": r"""
faulty bench && { echo "bench: CUDA error: out of memory" >&2; exit 1; }
for results; do :; done
k() {
    echo "{\"kind\": \"\", \"name\": \"$1\", \"shape\": \"s\", \"times\": $2, \"ms\": $3,"
    echo "\"bound_ms\": 1, \"flops\": 1, \"bytes\": 1}"
}
echo "{\"date\": \"$(date -u +%Y-%m-%dT%H:%MZ)\", \"device\": \"G\", \"part\": \"kernels\", \"model\": \"1B\",
\"precision\": \"bf16\", \"batch_size\": 8, \"seq_len\": 2048, \"matmul_tflops\": 700, \"copy_gb_s\": 3000,
\"kernels\": [$(k fast 10 1.1), $(k slow 2 3)]}" >$results/kernels.json
""",
}
PYTHON = {
    "dev/test/test_cli.py": """
if faulty("cli", words[-2] if words[-1] == "--bf16" else words[-1]): sys.exit("FAIL golden: loss is off by 2.0e-01")
print("    a {'loss': '1.0e-03'}\\ntest_cli: 1 passed, 0 failed")
""",
    "dev/test/test_generate.py": """print("test_generate: 9 passed, 0 failed")""",
    "dev/data/prepare.py": """
os.makedirs("data/gpu", exist_ok=True)
open("data/gpu/text_manifest.json", "w").close()
""",
    "dev/bench/step.py": """
if faulty("hang", "step"): time.sleep(%s)
out = os.path.join(words[words.index("--results") + 1], "steps.json")
if faulty("torn"):
    open(out, "w").write("{")
    print("train_gpt simplegpt    64   0.4   91085\\ntrain_gpt prenorm      64  no step within 9 s\\ntwin   64")
    sys.exit(1)
run = lambda name, speed: {"name": name, "batch_size": "32", "error": None, "tokens_per_s": speed, "mfu": 0.5,
                           "seconds_per_step": 1 / speed, "of_matmul_rate": 0.7, "memory_gib": 9}
json.dump({"date": time.strftime("%%Y-%%m-%%dT%%H:%%MZ", time.gmtime()), "device": "G", "part": "steps", "model": "1B",
           "seq_len": 512, "options": [], "matmul_tflops": 700, "copy_gb_s": 3000, "peak_tflops": 989,
           "runs": [run("train_gpt simplegpt", 900), run("torch.compile simplegpt", 600)]}, open(out, "w"))
""" % NAP,
}
MAKEFILE = """build/%:
	@mkdir -p build
	@! grep -qsx 'build $*' faults || { echo 'train_gpt.cu(7): error: identifier "x" is undefined'; exit 2; }
	@echo "make $(GPU_ARCH)" >>calls
	@cp fake/$(firstword $(subst _gpu_, ,$*)) $@
"""


class GpuCheck(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self.addCleanup(folder.cleanup)
        self.dir = Path(folder.name)
        for name, text in FILES.items():
            self.put(name, HEAD + text).chmod(0o755)
        for name, text in PYTHON.items():
            self.put(name, "import json, os, sys, time\nwords = sys.argv[1:]\n"
                     "open('calls', 'a').write(' '.join([os.path.basename(__file__), *words]) + '\\n')\n"
                     "faults = open('faults').read().split('\\n') if os.path.exists('faults') else []\n"
                     "faulty = lambda *words: ' '.join(words) in faults\n" + text)
        for name in ("dev/ci/gpu_check.py", "dev/bench/report.py"):
            self.put(name, (ROOT / name).read_text())
        self.put("Makefile", MAKEFILE)
        for name in ("a", "b"):
            self.put(f"dev/test/golden/{name}.safetensors", "")

    def put(self, name, text):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def start(self, *stages, faults=(), patience="0.05"):
        self.put("faults", "\n".join(faults) + "\n")
        return subprocess.Popen([sys.executable, "dev/ci/gpu_check.py", *stages], cwd=self.dir, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "PATH": f"{self.dir}/bin:{os.environ['PATH']}", "NVCC": "nvcc",
                                     "PATIENCE": patience, "RESULTS": "results"})

    def check(self, *stages, status=0, **more):
        """Runs it; (what, stage, name, line) of each case."""
        run = self.start(*stages, **more)
        self.out, self.err = run.communicate(timeout=60)
        self.assertEqual(run.returncode, status, self.out + self.err)
        return re.findall(r"^(ok|FAIL|skipped|not reached) +(\w+) +(.*?) \([\d.]+ s\): (.*)$", self.out, re.M)

    def page(self):
        path, = (self.dir / "results").glob("[0-9]*-[0-9]*-[0-9]*-nvidia-h100-80gb-hbm3.md")
        return path.read_text()

    def first(self):
        """the list of what to look at first"""
        return re.findall(r"(?m)^\d+\. (.*)$", self.page())

    def sleepers(self):
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                found += [pid] * (NAP in Path("/proc", pid, "cmdline").read_text(errors="replace").split("\0"))
            except OSError:
                pass
        return found

    def bad(self, cases):
        return {f"{stage} {name}" for what, stage, name, _ in cases if what == "FAIL"}

    def test_all_is_well(self):
        self.put("results/old.json", "{}")
        cases = self.check(*FIRST, "cli", "models", "ranks", faults=["racecheck attention hopper"])
        self.assertEqual({c[0] for c in cases}, {"ok", "skipped"})
        self.assertEqual([c for c in cases if c[0] == "skipped"],
                         [("skipped", "ranks", "ranks", "there is one GPU")])
        count = {stage: sum(c[1] == stage for c in cases) for stage in gpu_check.STAGES}
        self.assertEqual(count, {"build": 5, "tests": 4, "train": 4, "steps": 1, "kernels": 2, "cli": 4, "models": 6,
                                 "sanitize": 3 * len(gpu_check.SANITIZED), "ranks": 1, "bench": 0})
        page = self.page()
        for words in ("sm_90a", "CUDA 13.0", "compute-sanitizer 2025.3", "attention bf16: 0.37 of the tolerance",
                      "a fp32: {'loss': '1.0e-03'}", "### Kernels at the shapes of 1B", "### Training steps of 1B",
                      "racecheck attention: 1 reports, all known to be false", "compute-sanitizer/ReleaseNotes"):
            self.assertIn(words, page)
        self.assertNotIn("under way", page)
        self.assertEqual(self.first(), [
            "kernels 1B: slow s is at 33.3% of its limit, 4 ms of a step above it",
            "kernels 1B: fast s is at 90.9% of its limit, 1 ms of a step above it",
            "steps 1B: train_gpt simplegpt is 1.500 times as fast as torch.compile simplegpt"])
        calls = (self.dir / "calls").read_text()
        self.assertIn("make -gencode=arch=compute_90a,code=sm_90a\n", calls)
        self.assertRegex(calls, r"step\.py .*--model 1B .*--batch-size 32 ")  # of 64 the plan does not fit
        # what it calls knows the options
        for name, sources in (("step.py", ["dev/bench/step.py"]), ("test_cli.py", ["dev/test/test_cli.py"]),
                              ("bench_gpu_bf16", ["dev/bench/bench.cu"]), ("test_gpu_bf16", ["test_gpt.cu"]),
                              ("prepare.py", ["dev/data/prepare.py"]),
                              ("train_gpt_gpu_bf16", ["dev/run/options.h", "dev/run/job.h", "dev/use/plan.h"])):
            source = "".join((ROOT / s).read_text() for s in sources)
            options = set(re.findall(r" --([\w-]+)", " ".join(re.findall(rf"(?m)^{name} .*", calls))))
            self.assertTrue(options, name)
            self.assertEqual([o for o in options if not re.search(rf'"(--)?{o}"', source)], [], name)

    def test_no_failure_hides_what_comes_after_it(self):
        self.check("build")  # old programs, which must not run where new ones do not build
        cases = self.check(*FIRST, "cli", "models", status=1, faults=[
            "build bench_gpu_bf16", "hang norm test_gpu_bf16", "attention illegal", "cli golden b.safetensors", "torn",
            "memcheck linear race", "cli dev/test/golden", "training"])
        self.assertEqual(self.bad(cases), {
            "build bench_gpu_bf16", "tests norm bf16", "tests attention bf16", "tests attention fp32", "train b bf16",
            "train b fp32", "steps bench_gpu_bf16", "kernels bench_gpu_bf16", "cli cli bf16", "cli cli fp32",
            "sanitize memcheck linear", "sanitize memcheck attention", "sanitize racecheck attention",
            "sanitize synccheck attention", "models 162M", "models 1B", "models nanogpt-1.4B", "models 7B",
            "models llama3-8B"})
        ok = [c[1] for c in cases if c[0] == "ok"]
        self.assertEqual([ok.count(s) for s in (*FIRST, "cli", "models")],
                         [4, 1, 2, 0, 0, 3 * len(gpu_check.SANITIZED) - 4, 2, 1])
        said = "\n".join(self.first())
        for words in ('build: bench_gpu_bf16**: status 2: train_gpt.cu(7): error: identifier "x"',
                      "tests: norm bf16**: no end within 3 s", "attention bf16**: FAIL attention: test_gpt.cu:7: an",
                      "train: b bf16**: FAIL golden: loss is off by 2.0e-01", "steps: bench_gpu_bf16**: is not built",
                      "memcheck linear**: 1 reports: Error: Race reported between Write access at void norm_backward",
                      "models: 1B**: train_gpt: the loss is not finite"):
            self.assertIn(words, said)
        self.assertEqual(self.sleepers(), [])
        order = [list(gpu_check.STAGES).index(line[2:line.index(":")]) for line in self.first() if line[:2] == "**"]
        self.assertEqual(order, sorted(order))

    def test_steps_that_fail_or_hang_and_a_torn_result(self):
        self.check("build")
        cases = self.check("steps", "kernels", status=1, faults=["hang step"], patience="0.02")
        self.assertEqual([c[0] for c in cases], ["FAIL", "ok", "ok"])
        self.assertRegex(cases[0][3], r"no end within [56](\.\d+)? s")  # what is left of the stage's
        self.assertIn("slow s is at 33.3%", self.page())
        self.assertEqual(self.sleepers(), [])
        cases = self.check("steps", "kernels", status=1, faults=["torn"])
        self.assertEqual([c[0] for c in cases], ["FAIL", "ok", "FAIL"])  # the map of all results names the torn one
        self.assertEqual(cases[0][3], "train_gpt prenorm 64 no step within 9 s")
        self.assertIn("slow s is at 33.3%", self.page())
        cases = self.check("kernels", status=1, faults=["bench"])
        self.assertIn(("FAIL", "kernels", "kernels 1B", "bench: CUDA error: out of memory"), cases)

    def test_deaths_and_empty_runs(self):
        self.check("build")
        cases = self.check("tests", "train", status=1, faults=["norm segfault", "attention none"])
        self.assertEqual([c for c in cases if c[1] == "train" and c[0] != "ok"], [])
        said = {name: line for _, _, name, line in cases}
        self.assertRegex(said["norm bf16"], "^status -11")
        self.assertEqual(said["attention bf16"], "no test ran")
        cases = self.check("tests", "train", status=1, faults=["no list"])
        self.assertEqual({c[3] for c in cases if c[1] == "tests"}, {"lists no tests"})
        shutil.rmtree(self.dir / "dev/test/golden")  # a stage that cannot even say what it would run
        cases = self.check("train", "tests", status=1)
        self.assertIn("FileNotFoundError", cases[0][3])
        self.assertEqual([c[0] for c in cases], ["FAIL"] + 4 * ["ok"])

    def test_a_stage_ends_in_time(self):
        self.check("build")
        begun = False
        for _ in range(3):  # beside much other work none may have begun when the time is over
            begin = time.monotonic()
            cases = self.check("sanitize", "cli", status=1, faults=["slow"], patience="0.01")
            self.assertLess(time.monotonic() - begin, 12)
            left = [c for c in cases if c[0] == "not reached"]
            self.assertGreater(len(left), 4)
            self.assertEqual({c[1] for c in left}, {"sanitize"})
            begun = begun or "the stage's time was over after 0." in "".join(c[3] for c in left)
            if begun:
                break
        self.assertTrue(begun)
        self.assertEqual([c[0] for c in cases if c[1] == "cli"], 4 * ["ok"])
        self.assertEqual(len(cases), 3 * len(gpu_check.SANITIZED) + 4)
        self.assertIn("sanitize: not reached in time", "\n".join(self.first()))

    def test_what_does_not_fit_is_skipped(self):
        cases = self.check("build", "steps", "kernels", "models", faults=["small"])
        self.assertEqual({f"{c[1]} {c[2]}" for c in cases if c[0] == "skipped"},
                         {"steps steps 1B", "models 1B", "models nanogpt-1.4B", "models 7B", "models llama3-8B"})
        self.assertIn("bench_gpu_bf16 --part kernels --model 162M ", (self.dir / "calls").read_text())
        self.assertIn("steps 1B: does not fit into the 8 GiB of this device", self.page())

    def test_known_false_reports(self):
        def said(tool, *faults):
            self.put("faults", "\n".join(faults) + "\n")
            program = self.dir / "fake/test"
            run = subprocess.run([self.dir / "bin/compute-sanitizer", "--tool", tool, "--print-limit", "9", program,
                                  "--only", "attention"], cwd=self.dir, stdout=subprocess.PIPE, text=True)
            return gpu_check.sanitizer_judge(tool, (2025, 3))(run.returncode, run.stdout)

        self.assertEqual(said("racecheck"), ("ok", "no reports"))
        self.assertEqual(said("racecheck", "racecheck attention hopper"), ("ok", "1 reports, all known to be false"))
        for faults in (["mixed"], ["hopper", "race"], ["hidden"], ["died"]):
            what, line = said("racecheck", *("racecheck attention " + fault for fault in faults))
            self.assertEqual(what, "FAIL", faults)
        self.assertEqual(line, "no summary: test_gpt: 1 passed, 0 failed")
        self.assertEqual(said("racecheck", "attention illegal")[0], "FAIL")
        self.assertEqual(said("racecheck", "attention none"), ("FAIL", "no test ran"))
        self.assertEqual(said("memcheck", "memcheck attention hopper")[0], "FAIL")
        # from the release on that mends them they count
        self.check("build")
        cases = self.check("sanitize", status=1, faults=["racecheck attention hopper", "new sanitizer"])
        self.assertEqual(self.bad(cases), {"sanitize racecheck attention"})
        (self.dir / "bin/compute-sanitizer").unlink()
        if not shutil.which("compute-sanitizer"):
            self.assertEqual(self.check("sanitize")[0][3], "is missing; it comes with the CUDA Toolkit")

    def test_several_gpus(self):
        self.check("build")
        cases = self.check("ranks", faults=["two gpus"])
        self.assertEqual([c[2] for c in cases], ["data", "zero 0", "zero 1", "zero 2", "zero 3"])
        self.assertEqual((self.dir / "calls").read_text().count(" --zero 3 "), 2)
        cases = self.check("ranks", status=1, faults=["two gpus", "rank 0"])
        self.assertEqual([c[0] for c in cases], 4 * ["FAIL"])

    def test_a_later_call_adds_its_stages(self):
        self.check("build", "tests")
        self.check("train")
        self.assertRegex(self.page(), r"(?s)\| build.*\| tests.*\| train")
        kept = self.dir / "build/log/gpu_check.json"
        before = json.loads(kept.read_text())
        kept.write_text(json.dumps({**before, "commit": before["commit"] + "-dirty"}))  # by costs.md, which it writes
        self.check("train")
        self.assertRegex(self.page(), r"(?s)\| build.*\| tests.*\| train")
        self.check("build")
        self.assertNotIn("| tests", self.page())
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "commit": "another"}))
        self.check("train")
        self.assertNotIn("| build", self.page())

    def test_what_is_cut_off_leaves_its_page(self):
        self.check("build")
        run = self.start("train", "tests", faults=["hang norm test_gpu_bf16"], patience="1")
        for _ in range(200):
            if self.sleepers() and "tests: each" in self.page():
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=10)
        self.assertEqual(run.returncode, 143)
        self.assertIn("under way: tests", self.page())
        self.assertIn("a bf16: {'loss'", self.page())
        self.assertEqual(self.sleepers(), [])

    def test_refusals(self):
        for more, words in (((["nonsense"], {}), "'nonsense' is no stage. There are build, tests, "),
                            (([], {"patience": "much"}), "PATIENCE: 'much' is no number."),
                            (([], {"faults": ["no gpu"]}), "no GPU is visible to nvidia-smi.")):
            self.check(*more[0], status=1, **more[1])
            self.assertEqual(self.err.count("\n"), 1, self.err)
            self.assertIn("gpu_check: " + words, self.err)

    def test_what_it_names_is_there(self):
        self.assertEqual(list(gpu_check.STAGES)[:6], FIRST)
        self.assertLessEqual(sum(gpu_check.STAGES[s][0] for s in FIRST), 25 * 60)
        tests = re.findall(r"(?m)^TEST\((\w+)\)", (ROOT / "test_gpt.cu").read_text())
        self.assertEqual(set(gpu_check.SANITIZED) - set(tests), set())
        for target in (*gpu_check.TESTS, *gpu_check.TRAINERS, gpu_check.BENCH):
            with self.subTest(target):
                made = subprocess.run(["make", "-nB", "NVCC=nvcc", "NCCL=/n", "GPU_ARCH=-arch=this", target], cwd=ROOT,
                                      stdout=subprocess.PIPE, text=True)
                self.assertRegex(made.stdout, rf"nvcc .* -arch=this .*-o {target}")


if __name__ == "__main__":
    sys.exit(run_all("test_gpu_check"))
