#!/usr/bin/env python3
"""Tests of what stands around the trainer for experiments: dev/look/sweep.py, dev/look/plot_probe.py, dev/recipes.

usage: test_experiments.py TRAIN_GPT
"""
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINER = str(Path(sys.argv.pop(1)).resolve()) if len(sys.argv) > 1 else str(ROOT / "train_gpt")

# A trainer whose loss is a formula of variant, rate and seed, in place of the real one
STAND_IN = f"#!{sys.executable} -IS\n" + """import math, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
variant, lr, seed = flags["--variant"], float(flags["--lr"]), int(flags["--seed"])
best = {"simplegpt": 1e-2, "prenorm": 1e-3, "preqknorm": 3e-3}[variant]
loss = 2 + 0.2 * math.log10(lr / best) ** 2 + 0.001 * seed
with open(os.environ["STARTED"], "a") as f:
    f.write(" ".join([variant, f"{lr:g}", str(seed), *os.environ.get("CUDA_VISIBLE_DEVICES", "").split()]) + "\\n")
time.sleep(float(os.environ.get("SLOW", 0)))
if os.environ.get("FAIL") == f"{variant} {lr:g}":
    sys.exit("train_gpt: it broke. Mend it.")
with open(flags["--out"] + "/log.csv", "w") as f:
    f.write("step,loss,lr,grad_norm,tokens_per_s,val_loss,note\\n")
    for step in range(1, 21):
        bad = variant == "prenorm" and lr > 0.05 and step == 7
        f.write(f"{step},{'nan' if bad else loss + 1 / step},{lr},1,100,{loss if step == 20 else ''},{'skipped' if bad else ''}\\n")
"""


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="test_experiments_"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)

    def run_tool(self, *command, status=0, **env):
        r = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           timeout=300, cwd=self.dir, env={**os.environ, **{k: str(v) for k, v in env.items()}})
        self.assertEqual(r.returncode, status, f"{command}: {r.stdout} {r.stderr}")
        return r

    def refused(self, *command, words, **env):
        r = self.run_tool(*command, status=1, **env)
        self.assertEqual(r.stderr.count("\n"), 1, r.stderr)
        for word in words:
            self.assertIn(word, r.stderr)


class Sweep(Case):
    def setUp(self):
        super().setUp()
        self.trainer, self.started = self.dir / "trainer", self.dir / "started"
        self.trainer.write_text(STAND_IN)
        self.trainer.chmod(0o755)
        self.started.touch()
        self.out = self.dir / "out"

    def command(self, *more, args=("--train-data", "x")):
        return [sys.executable, ROOT / "dev/look/sweep.py", self.out, "--trainer", self.trainer, "--jobs", 2, "--lrs",
                "1e-3,3e-3,1e-2,1e-1", *more, *(["--", *args] if args else [])]

    def sweep(self, *more, status=0, args=("--train-data", "x"), **env):
        return self.run_tool(*self.command(*more, args=args), status=status, STARTED=self.started, **env)

    def test_table(self):
        self.sweep()
        runs = self.started.read_text().split("\n")[:-1]
        self.assertEqual(len(runs), len(set(runs)), "a run was started twice")
        first = {f"{v} {lr} 1" for v in ("simplegpt", "prenorm", "preqknorm") for lr in ("0.001", "0.003", "0.01", "0.1")}
        # best rates 1e-2, 1e-3, 3e-3; largest within 0.1 nats of them 1e-2, 3e-3, 1e-2
        more = {f"{vl} {s}" for vl in ("simplegpt 0.01", "prenorm 0.001", "prenorm 0.003", "preqknorm 0.003", "preqknorm 0.01")
                for s in (2, 3)}
        self.assertEqual(set(runs), first | more)
        with open(self.out / "sweep.csv", newline="") as f:
            rows = {(r["variant"], r["lr"], r["seed"]): r for r in csv.DictReader(f)}
        self.assertEqual(len(rows), 22)
        self.assertAlmostEqual(float(rows["prenorm", "0.001", "3"]["loss"]), 2.003, 6)
        self.assertEqual(rows["prenorm", "0.1", "1"]["skipped_steps"], "1")
        table = (self.out / "sweep.md").read_text().splitlines()
        self.assertEqual([line.split("|")[-3:-1] for line in table[2:]],
                         [[" 2.002 at 0.01 (3 seeds) ", " 0.01 "], [" 2.002 at 0.001 (3 seeds) ", " 0.003 "],
                          [" 2.002 at 0.003 (3 seeds) ", " 0.01 "]])
        self.assertIn("2.002 ± 0.001", table[2])
        self.assertIn("*2.201*", table[2])
        self.assertGreater((self.out / "sweep.png").stat().st_size, 10000)

    def test_options(self):
        """Every seed at every rate, each on one of the GPUs; more of the rates are stable where more is forgiven."""
        self.sweep("--all-seeds", "--seeds", "1,2", "--gpus", "4,7", "--variants", "simplegpt", "--within", 0.3)
        runs = [line.split() for line in self.started.read_text().splitlines()]
        self.assertEqual(sorted(r[:3] for r in runs),
                         sorted(["simplegpt", lr, seed] for lr in ("0.001", "0.003", "0.01", "0.1") for seed in "12"))
        self.assertEqual({r[3] for r in runs}, {"4", "7"})
        table = (self.out / "sweep.md").read_text().splitlines()
        self.assertEqual(table[2].split("|")[-2], " at least 0.1 ")

    def test_goes_on(self):
        """Killed, then the same command: finished runs stay, the others run; another rate may be added."""
        child = subprocess.Popen([str(c) for c in self.command("--seeds", 1)], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, cwd=self.dir,
                                 env={**os.environ, "STARTED": str(self.started), "SLOW": "0.3"})
        while len(list(self.out.glob("*/*/done"))) < 3:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=30)
        done = {p.parent: p.stat().st_mtime_ns for p in self.out.glob("*/*/done")}
        self.assertLess(len(done), 12)
        self.started.write_text("")
        self.sweep("--seeds", 1)
        self.assertEqual(len(list(self.out.glob("*/*/done"))), 12)
        self.assertEqual(len(self.started.read_text().splitlines()), 12 - len(done))
        self.assertEqual(done, {d: (d / "done").stat().st_mtime_ns for d in done})
        self.started.write_text("")
        self.sweep("--seeds", 1, "--lrs", "1e-3,3e-2", args=())
        self.assertEqual(len(self.started.read_text().splitlines()), 3)
        self.refused(*self.command(args=("--train-data", "y")), words=["other options", "--train-data x"])

    def test_failure(self):
        r = self.sweep("--seeds", 1, status=1, FAIL="prenorm 0.01")
        self.assertIn("prenorm lr 0.01 seed 1: failed (1): train_gpt: it broke. Mend it.", r.stdout)
        self.assertEqual(len(list(self.out.glob("*/*/done"))), 11)
        self.sweep("--seeds", 1)
        self.assertEqual(len(list(self.out.glob("*/*/done"))), 12)

    def test_stopped_by_another(self):
        """A trainer that somebody has asked to stop ends well, but is not done."""
        how = STAND_IN + "print('asked to stop: saved after step 20 in x; --resume goes on')\n"
        self.trainer.write_text(how)
        r = self.sweep("--seeds", 1, "--variants", "prenorm", "--lrs", "1e-2", status=1)
        self.assertIn("prenorm lr 0.01 seed 1: failed (0): asked to stop", r.stdout)
        self.assertEqual(list(self.out.glob("*/*/done")), [])

    def test_refusals(self):
        sweep = [sys.executable, ROOT / "dev/look/sweep.py", self.out]
        self.refused(*sweep, "--report", words=["sweep.json", "no sweep"])
        self.refused(*sweep, words=["--train-data"])
        self.refused(*sweep, "--variants", "postnorm", "--", "--dim", 3, words=["postnorm"])
        self.refused(*sweep, "--", "--lr", 3, words=["--lr"])
        self.refused(*sweep, "--trainer", self.dir / "none", "--", "--dim", 3, words=["none", "make"])
        self.refused(*sweep, "--jobs", "many", words=["--jobs", "--help"])
        (self.dir / "file").write_text("mine")
        self.refused(sys.executable, ROOT / "dev/look/sweep.py", "file", "--trainer", self.trainer, "--", "--dim", 3,
                     words=["sweep: file: File exists"])
        (self.dir / "file").chmod(0o755)
        self.refused(*sweep, "--trainer", self.dir / "file", "--lrs", 1, "--", "--dim", 3,
                     words=["file: Exec format error"])
        (self.out / "sweep.json").write_text('{"trainer_options": [1]}')
        self.refused(*sweep, "--trainer", self.trainer, words=["sweep.json: this is not a sweep's file"])

    def test_strange(self):
        """A trainer whose words are no UTF-8, folders beside the runs' own, rates that one folder's name means."""
        self.trainer.write_text(STAND_IN.replace("sys.exit(", "sys.stderr.buffer.write(b'\\xff'); sys.exit("))
        command = [*self.command("--seeds", 1, "--variants", "prenorm"), "--x", "y"]
        command[command.index("--lrs") + 1] = "1e-3,1.00000001e-3,1e-2"
        r = self.run_tool(*command, status=1, STARTED=self.started, FAIL="prenorm 0.01")
        self.assertIn("prenorm lr 0.01 seed 1: failed (1): \ufffdtrain_gpt: it broke", r.stdout)
        self.assertEqual(len(self.started.read_text().splitlines()), 2)
        for name in ("lrfast_seed1", "lr0.001_seed1 (copy)", "lr1_seed1_seed2", "lr0.0010_seed1"):
            shutil.copytree(self.out / "prenorm/lr0.001_seed1", self.out / "prenorm" / name)
        self.run_tool(sys.executable, ROOT / "dev/look/sweep.py", self.out, "--report")
        self.assertEqual(len((self.out / "sweep.csv").read_text().splitlines()), 2)

    def test_real_trainer(self):
        self.run_tool(sys.executable, ROOT / "dev/data/prepare.py", ROOT / "tokenizer.h", "--out", self.dir / "data",
                      "--prefix", "text")
        self.run_tool(sys.executable, ROOT / "dev/look/sweep.py", self.out, "--trainer", TRAINER, "--lrs", "1e-3,1e-2",
                      "--seeds", 1, "--variants", "simplegpt,prenorm", "--", "--dim", 32, "--layers", 2, "--heads", 2,
                      "--tokenizer", "bytes", "--train-data", self.dir / "data/text_train_*.bin", "--seq-len", 32,
                      "--batch-size", 2, "--steps", 20, "--val-every", 0)
        with open(self.out / "sweep.csv", newline="") as f:
            losses = [float(r["loss"]) for r in csv.DictReader(f)]
        self.assertEqual(len(losses), 4)
        self.assertTrue(all(2 < x < 6 for x in losses), losses)


class ProbePicture(Case):
    def probed(self, name):
        run = self.dir / name
        run.mkdir()
        with open(run / "curvature.csv", "w") as f:
            f.write("step,loss,eigenvalue,error,iterations\n0,5,1000,3,20\n50,3,120,0.3,20\n")
        with open(run / "curvature_inputs.csv", "w") as f:
            f.write("step,layer,eigenvalue,error,iterations\n0,0,-0.1,1e-4,9\n0,1,0.2,1e-4,9\n50,0,0.3,1e-4,9\n50,1,nan,nan,1\n")
        with open(run / "weights.csv", "w") as f:
            f.write("step,layer,tensor,weight,gradient,update\n50,-1,wte.weight,9,1,0.1\n50,0,fc.lin.weight,3,1,0.01\n"
                    "50,0,fc.norm.weight,1,1,0.5\n50,1,fc.lin.weight,4,1,0.02\n50,2,norm.weight,1,1,0.01\n")
        with open(run / "activations.csv", "w") as f:
            f.write("step,layer,tensor,rms,max\n")
            for step in (0, 50):
                for layer in range(3):
                    for tensor in ("residual", "attention_branch", "ffn_branch", "activation", "attention_logit"):
                        f.write(f"{step},{layer},{tensor},{1 + layer + step / 100},9\n")
        return run

    def test_picture(self):
        a, b = self.probed("simplegpt"), self.probed("prenorm")
        tool = ROOT / "dev/look/plot_probe.py"
        said = self.run_tool(sys.executable, tool, a, f"B={b}", "--out", "probe.png").stdout
        self.assertIn("| simplegpt | 9 |  | 3.5 | 1 | 0.02 | 0.2 | 0.3 | 0.3 |", said)
        self.assertGreater((self.dir / "probe.png").stat().st_size, 10000)
        with open(b / "curvature.csv", "w") as f:  # of a run that came apart
            f.write("step,loss,eigenvalue,error,iterations\n0,nan,nan,nan,2\n")
        with open(b / "activations.csv", "a") as f:  # and goes on
            f.write("75,0,resi")
        self.run_tool(sys.executable, tool, b)
        self.refused(sys.executable, tool, b, "--out", "probe.gif", words=["probe.gif"])
        (b / "curvature_inputs.csv").write_text("step,layer\n0,1\n")
        self.refused(sys.executable, tool, b, words=["curvature_inputs.csv", "eigenvalue"])
        for table in ("curvature.csv", "curvature_inputs.csv"):  # as of a bf16 build
            (b / table).unlink()
        (b / "weights.csv").unlink()  # of an older version
        self.run_tool(sys.executable, tool, b, "--step", 0)
        for table in ("curvature.csv", "curvature_inputs.csv", "weights.csv"):  # --probe-iterations 0, --steps 0
            header = (a / table).read_text().splitlines(True)[0]
            (b / table).write_text(header)
        self.run_tool(sys.executable, tool, b, "--step", 0)
        self.refused(sys.executable, tool, a, "--step", 7, words=["step 7", "0, 50"])
        (a / "activations.csv").write_text("step,layer\n1,2\n")
        self.refused(sys.executable, tool, a, words=["activations.csv", "tensor"])
        self.refused(sys.executable, tool, self.dir / "nowhere", words=["nowhere", "--probe"])


class Recipes(Case):
    RECIPES = ("1b", "nanogpt-1.4b", "7b", "8b")

    def setUp(self):
        super().setUp()
        self.tree = self.dir / "tree"  # recipes work beside ./train_gpt
        shutil.copytree(ROOT / "dev/recipes", self.tree / "dev/recipes")
        (self.tree / "train_gpt").symlink_to(TRAINER)

    def recipe(self, name):
        return self.tree / f"dev/recipes/{name}.sh"

    def test_plans(self):
        parameters = {"1b": 1056305152, "nanogpt-1.4b": 1438387200, "7b": 6739513344, "8b": 8031375360}
        for name in self.RECIPES:
            text = self.run_tool(self.recipe(name), "--plan", "--device", "h200").stdout
            self.assertIn(f"{parameters[name]} parameters", text)
            rates = "cosine, steps: 2000 to 0.0018, 98000 from 0.0018 to 0.00018"
            self.assertIn(f"learning rate, {rates if name == 'nanogpt-1.4b' else 'linear'}", text)
            self.assertRegex(text, r"steps take at least .* hours on 8 of them")
            text = self.run_tool(self.recipe(name), "--plan", SIZE="small", VARIANT="preqknorm").stdout
            self.assertTrue(20e6 <= int(text.split(" parameters")[0].split()[-1]) <= 162e6, text)
        text = self.run_tool(self.recipe("7b"), "--plan", "--device", "h200", STEPS=20000, VARIANT="prenorm").stdout
        self.assertIn("20000 steps", text)

    def test_trains(self):
        self.run_tool(sys.executable, ROOT / "dev/data/prepare.py", ROOT / "tokenizer.h", "--out", self.tree / "data/x",
                      "--prefix", "text")
        self.run_tool(self.recipe("1b"), "--dim", 64, "--layers", 2, "--heads", 2, "--warmup", 1, SIZE="small", STEPS=3,
                      DATA=self.tree / "data/x")
        log = (self.tree / "runs/1b-small-simplegpt-3/log.csv").read_text().splitlines()
        self.assertEqual(len(log), 4)

    def test_tokenizer_of_the_data(self):
        (self.tree / "train_gpt").unlink()
        (self.tree / "train_gpt").write_text('#!/bin/sh\necho "$@"\n')
        (self.tree / "train_gpt").chmod(0o755)
        (self.tree / "data/c4").mkdir(parents=True)
        (self.tree / "data/c4/c4_train_000000.bin").touch()
        self.assertNotIn("--tokenizer", self.run_tool(self.recipe("1b"), GPUS=1).stdout)
        (self.tree / "data/c4/c4_tokenizer.bin").touch()
        self.assertIn("--tokenizer data/c4/c4_tokenizer.bin", self.run_tool(self.recipe("1b"), GPUS=1).stdout)

    def test_refusals(self):
        self.refused(self.recipe("7b"), words=["data/c4", "prepare.py"])
        self.refused(self.recipe("7b"), words=["postnorm", "simplegpt"], VARIANT="postnorm")
        self.refused(self.recipe("7b"), words=["tiny", "small"], SIZE="tiny")
        text = self.run_tool(self.recipe("8b"), "--help").stdout
        self.assertIn("8B on C4", text)
        self.assertIn("VARIANT", text)
        (self.tree / "train_gpt").unlink()
        self.refused(self.recipe("1b"), words=["train_gpt", "make"])


if __name__ == "__main__":
    result = unittest.main(exit=False, verbosity=0).result
    bad = len(result.failures) + len(result.errors)
    for test, _ in result.failures + result.errors:
        print(f"FAIL {test.id()}")
    print(f"test_experiments: {result.testsRun - bad} passed, {bad} failed")
    sys.exit(1 if bad else 0)
