#!/usr/bin/env python3
"""Tests of dev/look: runlog.py, plot.py, export_log.py and watch.py. Needs numpy and matplotlib; what needs tensorboard
or wandb is skipped without them."""
import contextlib
import io
import json
import math
import os
import shutil
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from lines import run_all

os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
LOOK = Path(__file__).resolve().parent.parent / "look"
sys.path.insert(0, str(LOOK))
import export_log  # noqa: E402
import plot  # noqa: E402
import runlog  # noqa: E402
import watch  # noqa: E402

HEADER = "step,loss,lr,grad_norm,tokens_per_s,val_loss,note\n"


def rate(step, total, warmup, peak=1e-3):
    """The trainer's learning rate in step 1, 2, ..."""
    s = step - 1
    return peak * (s + 1) / (warmup + 1) if s < warmup else peak * (1 - (s - warmup) / (total - warmup))


def row(step, loss=3.0, total=200, note="", val="", speed=1000):
    """A row as train_gpt prints it."""
    return f"{step},{loss:.9g},{rate(step, total, total // 100):.12g},{loss / 4:.9g},{speed:.6g},{val},{note}\n"


def rows(n, total=200):
    """Falls from 5 to 1; validated every 10 steps; a spike in step 30, step 40 skipped."""
    def one(step):
        loss, note = 1 + 4 / step, ""
        if step == 30:
            loss, note = 9.0, "spike"
        if step == 40:
            loss, note = math.nan, "skipped"
        return row(step, loss, total, note, f"{1.5 + 1 / step:.9g}" if step % 10 == 0 else "")
    return "".join(map(one, range(1, n + 1)))


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.dir = Path(scratch.name)

    def run_folder(self, name, text, config=None, steps=(), window=4):
        """A run's folder with a log and checkpoints of steps, each of window sequences of 32 tokens a step."""
        folder = self.dir / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.csv").write_text(HEADER + text)
        for step in steps:
            state = {"step": step, "loader": {"epoch": 0, "window": window * step},
                     "config": {"variant": "simplegpt", "seq_len": "32", "norm_eps": "1.5e-06", **(config or {})}}
            (folder / f"step_{step:08d}").mkdir()
            (folder / f"step_{step:08d}" / "state.json").write_text(json.dumps(state))
        return str(folder)

    def refused(self, error, words, call, *args):
        with self.assertRaises(error) as caught, contextlib.redirect_stderr(io.StringIO()):
            call(*args)
        message = str(caught.exception)
        self.assertIn(words, message)
        self.assertNotIn("\n", message)


class ReadTest(Case):
    def test_values(self):
        log = runlog.read(self.run_folder("a", rows(40)))
        self.assertEqual(len(log), 40)
        self.assertEqual(log["step"], list(range(1, 41)))
        self.assertEqual(log["loss"][:4], [5.0, 3.0, 2.33333333, 2.0])
        self.assertEqual(log["lr"][1], 0.000666666666667)
        self.assertEqual(log["note"][28:30] + log["note"][39:], ["", "spike", "skipped"])
        self.assertEqual([s for s, v in zip(log["step"], log["val_loss"]) if not math.isnan(v)], [10, 20, 30, 40])
        self.assertTrue(math.isnan(log["loss"][39]) and math.isnan(log["grad_norm"][39]))
        turned = self.dir / "turned"  # columns in another order
        turned.mkdir()
        (turned / "log.csv").write_text("val_loss,loss,note,step,lr,grad_norm,tokens_per_s\n,2.5,,7,1,2,3\n")
        log = runlog.read(str(turned))
        self.assertEqual((log["step"], log["loss"], log["note"]), ([7], [2.5], [""]))

    def test_follows(self):
        folder = self.run_folder("a", row(1) + row(2)[:9])
        path, log = Path(folder) / "log.csv", runlog.Log(folder)
        self.assertTrue(log.update())
        self.assertEqual(log["step"], [1])  # the half of a row waits for its end
        self.assertFalse(log.update())
        path.write_text(path.read_text() + row(2)[9:] + row(3))
        self.assertTrue(log.update())
        self.assertEqual(log["step"], [1, 2, 3])
        path.write_text(HEADER + row(1, 7.0) + row(2, 8.0) + row(3, 9.0) + row(4, 9.5))  # another run, a longer log
        self.assertTrue(log.update())
        self.assertEqual(log["loss"], [7.0, 8.0, 9.0, 9.5])
        path.write_text(HEADER + row(1, 7.0))
        self.assertTrue(log.update())
        self.assertEqual(log["loss"], [7.0])
        path.write_text(HEADER)
        self.assertRaises(runlog.NoRows, log.update)
        path.unlink()
        self.assertRaises(runlog.NoRows, log.update)
        path.write_text(HEADER + row(5))
        self.assertTrue(log.update())
        self.assertEqual(log["step"], [5])

    def test_strange_states(self):
        """A state.json that is none of ours is left out, whatever it is."""
        good = {"step": 7, "loader": {"epoch": 0, "window": 28}, "config": {"variant": "prenorm", "seq_len": "32"}}
        for change in ({"config": []}, {"config": None}, {"config": {"seq_len": 32}}, {"config": {"seq_len": {}}},
                       {"schedule": None}, {"schedule": ["linear"]}, {"schedule": {"steps": 200}},
                       {"loader": None}, {"loader": [1]}, {"loader": {"epoch": "a", "window": "b"}}, {"step": None},
                       [], None, "[" * 100000, b"\xff", "pipe"):
            with self.subTest(str(change)[:40]):
                shutil.rmtree(self.dir / "a", ignore_errors=True)
                folder = self.run_folder("a", rows(8), steps=(4,))
                path = Path(folder) / "step_00000008" / "state.json"
                path.parent.mkdir()
                if change == "pipe":
                    os.mkfifo(path)
                elif isinstance(change, (str, bytes)):
                    path.write_bytes(change if isinstance(change, bytes) else change.encode())
                else:
                    path.write_text(json.dumps({**good, **change} if isinstance(change, dict) else change))
                self.assertEqual([s["step"] for s in runlog.states(folder)], [4])
                self.assertEqual((runlog.config(folder)["variant"], runlog.tokens_per_step(folder)), ("simplegpt", 128))
        folder = self.run_folder("b", rows(8), {"seq_len": "long"}, steps=(4,))
        self.assertIsNone(runlog.tokens_per_step(folder))

    def test_made_again(self):
        text = "".join(row(s, 3.0) for s in range(1, 8)) + "".join(row(s, 2.0) for s in range(5, 7))
        log = runlog.read(self.run_folder("a", text))
        self.assertEqual((log["step"], log["loss"]), ([1, 2, 3, 4, 5, 6], [3.0] * 4 + [2.0] * 2))
        self.assertEqual({len(log[name]) for name in [*runlog.COLUMNS, "note"]}, {6})

    def test_refusals(self):
        good = row(1)
        for text, words in (
            (good + "2,3.1,0.1\n" + row(3), "log.csv: line 3 is not 7 fields of a step"),
            (good + row(2).replace("1000", "fast"), "line 3"), (good + "\n", "line 3"),
            (good + "\0" * 30 + "\n", "line 3"),
            (good + row(2).replace("2", "2.5", 1), "line 3"), (good + row(2, 1e308), "line 3"),
            (good + row(2, 1e-320), "line 3"), (good + row(-2), "line 3"),
            (good + row(10**400, total=10**400), "line 3"), (good * 2 + row(2)[3:], "line 4"),
            ("", "has no rows yet"), (row(1)[:-1], "has no rows yet"),
        ):
            with self.subTest(words):
                self.refused(runlog.LogError, words, runlog.read, self.run_folder("a", text))
        # damage is found again, and behind what could be read
        log = runlog.Log(self.run_folder("a", good))
        log.update()
        with open(log.path, "a") as f:
            f.write(row(2) + "x\n")
        for _ in range(2):
            self.refused(runlog.LogError, "line 4", log.update)
        self.refused(runlog.NoRows, "none/log.csv: is not there. Give the folder", runlog.read, str(self.dir / "none"))
        self.refused(runlog.LogError, "cannot be read: Not a directory", runlog.read, str(self.dir / "a" / "log.csv"))
        (self.dir / "a" / "log.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" * 10)
        self.refused(runlog.LogError, "has no column step, loss", runlog.read, str(self.dir / "a"))

    def test_names(self):
        (self.dir / "x=1").mkdir()
        given = ["runs/a", "b=runs/c", str(self.dir / "x=1"), "none/lr=3", "p/s", "q/s"]
        self.assertEqual(runlog.named(given), [("a", "runs/a"), ("b", "runs/c"), ("x=1", given[2]),
                                               ("lr=3", "none/lr=3"), ("p/s", "p/s"), ("q/s", "q/s")])
        with mock.patch.object(os.path, "isdir", "y=1".__eq__):
            self.assertEqual(runlog.named(["y=1", "z=1"]), [("y=1", "y=1"), ("z", "1")])

    def test_end_of_fall(self):
        for total, warmup in ((200, 2), (60000, 600), (1000, 0)):
            logged = [float(f"{rate(s, total, warmup):.12g}") for s in range(1, total + 1)]
            for upto in (warmup + 3, warmup + 4, total // 2, total):
                log = {"step": list(range(1, upto + 1)), "lr": logged[:upto]}
                self.assertEqual(runlog.end_of_fall(log), total, (total, upto))
            for upto in (1, warmup, warmup + 2):
                self.assertIsNone(runlog.end_of_fall({"step": list(range(1, upto + 1)), "lr": logged[:upto]}), upto)
        bent = [rate(s, 200, 2) for s in range(1, 101)]
        bent[40:60] = [1.01 * r for r in bent[40:60]]
        self.assertIsNone(runlog.end_of_fall({"step": list(range(1, 101)), "lr": bent}))
        steps = list(range(1, 2000))
        cosine = [0.5 * (1 + math.cos(math.pi * s / 60000)) for s in steps]
        for rates in ([1e-3] * 1999, cosine, steps):
            self.assertIsNone(runlog.end_of_fall({"step": steps, "lr": rates}))

    def test_total(self):
        """From the rates where they fall to 0, else as the newest checkpoint has planned."""
        def total(rates, **schedule):
            folder = self.run_folder("total", rows(3))
            (Path(folder) / "step_00000003").mkdir(exist_ok=True)
            state = {"step": 3, "schedule": {k: str(v) for k, v in schedule.items()}}
            (Path(folder) / "step_00000003" / "state.json").write_text(json.dumps(state))
            return runlog.total_steps({"step": list(range(1, len(rates) + 1)), "lr": rates}, folder)

        linear, flat = [rate(s, 200, 2) for s in range(1, 101)], [1e-3] * 100
        cosine = [1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * s / 300)) for s in range(100)]
        above = [1e-4 + 9e-4 * (1 - s / 180) for s in range(100)]  # a line that would be 0 behind step 200
        self.assertEqual(runlog.end_of_fall({"step": list(range(1, 101)), "lr": above}), 200)
        self.assertEqual(total(above, schedule="linear", steps=180, min_lr="0.0001"), 180)
        self.assertEqual(total(linear), 200)
        self.assertEqual(total(linear, schedule="linear", steps=150, min_lr="0"), 200)  # prolonged since
        self.assertEqual(total(cosine, schedule="cosine", steps=300, min_lr="0.0001"), 300)
        for schedule in ({"schedule": "constant"}, {"schedule": "wsd", "min_lr": "0"}):
            self.assertEqual(total(flat, steps=250, **schedule), 250)
            self.assertIsNone(total(flat, steps=99, **schedule))
        self.assertIsNone(total(flat))
        self.assertIsNone(total(flat, schedule="constant", steps="many"))

    def test_checkpoints(self):
        folder = self.run_folder("a", rows(20), {"dim": "64"}, steps=(5, 10))
        self.assertEqual(runlog.config(folder), {"variant": "simplegpt", "seq_len": 32, "norm_eps": 1.5e-6, "dim": 64})
        self.assertEqual(runlog.tokens_per_step(folder), 4 * 32)
        state = Path(folder) / "step_00000010" / "state.json"
        epoch = json.loads(state.read_text())
        epoch["loader"] = {"epoch": 1, "window": 60}
        state.write_text(json.dumps(epoch))
        self.assertEqual(runlog.tokens_per_step(folder), 4 * 32)  # by the checkpoint before it
        state.write_text(state.read_text()[:40])
        self.assertEqual([s["step"] for s in runlog.states(folder)], [5])
        epoch["schedule"] = {"schedule": "cosine", "lr": "0.001", "min_lr": "1e-04", "steps": "200"}
        state.write_text(json.dumps(epoch))
        self.assertEqual(runlog.config(folder), {"variant": "simplegpt", "seq_len": 32, "norm_eps": 1.5e-6, "dim": 64,
                                                 "schedule": "cosine", "lr": 1e-3, "min_lr": 1e-4, "steps": 200})
        nothing = self.run_folder("b", rows(20))
        self.assertEqual((runlog.config(nothing), runlog.tokens_per_step(nothing)), ({}, None))


class PlotTest(Case):
    def draw(self, *arguments):
        options = plot.parse(list(map(str, arguments)))
        runs = [plot.Run(name, folder, options.x) for name, folder in runlog.named(options.runs)]
        figure = plot.draw(runs, options)
        self.addCleanup(plot.plt.close, figure)
        return figure, figure.axes, runs

    def assertData(self, line, x, y):
        plot.np.testing.assert_allclose(line.get_xdata(), x, err_msg="x")
        plot.np.testing.assert_allclose(line.get_ydata(), y, err_msg="y")

    def find(self, axes, **properties):
        found = [line for line in axes.lines if all(getattr(line, "get_" + k)() == v for k, v in properties.items())]
        self.assertEqual(len(found), 1, properties)
        return found[0]

    def test_series(self):
        folder = self.run_folder("a", rows(100), steps=(100,))
        _, axes, (run,) = self.draw(folder, "--baseline", "other model=1.25", "--title", "$1")
        self.assertEqual([a.get_title(loc="left") for a in axes[1:]],
                         ["learning rate", "gradient norm before clipping", "tokens/s"])
        main, steps = axes[0], list(range(1, 101))
        log = runlog.read(folder)
        self.assertData(self.find(main, linewidth=0.8), steps, log["loss"])
        self.assertData(self.find(main, linewidth=1.8), steps, plot.smooth(plot.np.array(log["loss"])))
        tens = range(10, 101, 10)
        self.assertData(self.find(main, linestyle="--", marker="o"), tens, [1.5 + 1 / s for s in tens])
        spike, (low, high) = self.find(main, marker="^"), main.get_ylim()
        self.assertEqual(spike.get_xdata(), [30])
        self.assertTrue(high - 0.02 * (high - low) < spike.get_ydata()[0] < high)  # its loss, 9, is above the picture
        self.assertEqual([line.get_xdata()[0] for line in main.lines if len(set(line.get_xdata())) == 1 and
                          line.get_linewidth() == 1.0], [40])
        self.assertData(self.find(main, linestyle=":", linewidth=1.2), [0, 1], [1.25, 1.25])
        self.assertEqual([text.get_text() for text in main.texts], ["other model 1.250"])
        self.assertData(self.find(axes[1], linewidth=1.8), steps, log["lr"])
        self.assertData(self.find(axes[2], linewidth=0.8), steps, log["grad_norm"])
        self.assertData(self.find(axes[3], linewidth=0.8), steps, log["tokens_per_s"])
        self.assertEqual([text.get_text() for text in main.get_legend().get_texts()],
                         ["a: training 1.040, validation 1.510", "validation", "spike", "update skipped"])
        self.assertEqual(len({a.get_xlim() for a in axes}), 1)
        self.assertTrue(low < 1.04 and 5 < high < 9, (low, high))

    def test_smooth(self):
        values = plot.np.array([math.nan if i == 500 else float(i) for i in range(1000)])
        smooth = plot.smooth(values)
        self.assertEqual((smooth[0], smooth[600]), (0.0, 600.0))
        self.assertAlmostEqual(smooth[505], (sum(range(495, 516)) - 500) / 20)
        self.assertTrue(all(math.isnan(v) for v in plot.smooth(plot.np.full(5, math.nan))))

    def test_axes(self):
        folder = self.run_folder("a", rows(50), steps=(50,))
        _, axes, _ = self.draw(folder, "--x", "tokens", "--log-x", "--panels", "grad_norm,val_loss")
        self.assertEqual([a.get_xscale() for a in axes], ["log", "log"])
        self.assertEqual([text.get_text()[:2] for text in axes[0].get_legend().get_texts()], ["a:"])  # no marks: no loss
        self.assertEqual((axes[0].get_ylabel(), axes[0].get_xlabel()), ("gradient norm before clipping", "tokens"))
        self.assertEqual(list(self.find(axes[1], linestyle="--").get_xdata()), [128 * s for s in range(10, 51, 10)])
        _, axes, _ = self.draw(folder, "--x", "time", "--ylim", "1:2")
        self.assertIn("seconds of training", axes[0].get_xlabel())
        seconds = self.find(axes[0], linewidth=1.8).get_xdata()
        plot.np.testing.assert_allclose(seconds, [0.128 * s for s in range(1, 51)])
        self.assertEqual(axes[0].get_ylim(), (1, 2))
        # a short run, whose one point would not be seen as a line
        _, axes, _ = self.draw(self.run_folder("one", row(1)))
        self.assertEqual(self.find(axes[0], marker="o").get_xydata().tolist(), [[1, 3]])
        self.draw(self.run_folder("nan", row(1, math.nan, note="skipped")), folder, "--paper", "7B")

    def test_colors(self):
        folders = [self.run_folder(name, rows(20), {"variant": variant}, (20,)) for name, variant in
                   (("a", "prenorm"), ("b", "simplegpt"), ("c", "preqknorm"), ("d", "simplegpt"))]
        colors = plot.COLORS[False]
        _, _, runs = self.draw(*folders)
        self.assertEqual([run.color for run in runs[:3]], [colors[1], colors[0], colors[2]])
        self.assertEqual(len({run.color for run in runs}), 4)
        self.assertEqual(len({run.marker for run in runs}), 4)
        _, _, runs = self.draw(folders[0])
        self.assertEqual(runs[0].color, colors[1])
        _, axes, runs = self.draw(*(self.run_folder(f"llama-{i}", rows(20)) for i in range(8)), "--dark")
        self.assertEqual(runs[0].color, plot.COLORS[True][1])
        self.assertEqual({run.color for run in runs}, set(plot.COLORS[True]))
        self.assertEqual(axes[0].get_facecolor(), plot.matplotlib.colors.to_rgba("#0d1117"))

    def test_paper(self):
        text = "".join(row(s, 2.2 + 8 / s ** 0.4, 60000) for s in range(100, 60001, 100))
        figure, (main, rates), _ = self.draw(self.run_folder("simplegpt", text), "--paper", "7B", "--panels", "loss,lr",
                                             "--baseline", "x=2.3", "--baseline", "y=2.301")
        self.assertEqual(main.get_xlim(), rates.get_xlim())
        stars = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in main.lines if line.get_marker() == "*")
        self.assertEqual(stars, [(20000, 2.331), (20000, 2.393), (20000, 4.115), (40000, 2.243), (40000, 2.320),
                                 (40000, 2.345), (60000, 2.208), (60000, 2.290), (60000, 2.311)])
        self.assertTrue(2.393 < main.get_ylim()[1] < 3, main.get_ylim())
        above = [text for text in main.texts if "4.115" in text.get_text()]
        self.assertEqual([text.get_text() for text in above], ["LLaMA2 4.115"])
        self.assertEqual(above[0].xy, (20000, main.get_ylim()[1]))
        self.assertIsNotNone(above[0].arrow_patch)
        self.assertEqual({text.get_text() for text in main.texts} - {"LLaMA2 4.115", "x 2.300", "y 2.301"},
                         {f"{loss:.3f}" for _, loss in stars if loss < 4})
        figure.draw_without_rendering()
        boxes = [plot.matplotlib.text.Text.get_window_extent(text) for text in main.texts]
        for i, box in enumerate(boxes):
            self.assertFalse(any(box.overlaps(other) for other in boxes[:i]), main.texts[i].get_text())

    def test_command(self):
        folder = self.run_folder("a", rows(50))
        out = self.dir / "picture.png"
        command = [sys.executable, LOOK / "plot.py", folder, "--out", out, "--baseline", "bigram model=2.4369"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, f"{out}\n", ""))
        self.assertEqual(out.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", out.read_bytes()[16:24])
        self.assertTrue(width > 1000 and height > 700)
        self.assertEqual(sorted(os.listdir(self.dir)), ["a", "picture.png"])

    def test_whole(self):
        """A picture that cannot be written leaves the old one as it was, and nothing beside it."""
        figure, out = mock.Mock(), self.dir / "a.png"
        out.write_text("mine")

        def half(path, **_):
            Path(path).write_text("half")
            raise OSError(28, "No space left on device")
        figure.savefig = half
        self.refused(runlog.LogError, "a.png: cannot be written: No space left", plot.save, figure, str(out), 9)
        self.assertEqual((out.read_text(), os.listdir(self.dir)), ("mine", ["a.png"]))
        os.mkfifo(self.dir / "b.png")
        self.refused(runlog.LogError, "b.png: is a folder, a pipe", plot.save, figure, str(self.dir / "b.png"), 9)

    def test_refusals(self):
        for arguments, words in ((["a", "--baseline", "x"], "'x' is not NAME=VALUE"),
                                 (["a", "--ylim", "3:2"], "'3:2' is not LOW:HIGH"),
                                 (["a", "--panels", "lr,lr"], "'lr,lr' is not a list of loss"),
                                 (["a", "--panels", "lr", "--paper", "7B"], "about the loss"),
                                 (["a", "--x", "time", "--paper", "7B"], "numbers of steps"),
                                 (["a", "--out", "x.gif"], "'x.gif' is no .png"),
                                 (["a", "--out", ".png"], "'.png' is no .png"), ([], "RUN")):
            with self.subTest(arguments):
                self.refused(SystemExit, words, plot.parse, arguments)
        self.refused(SystemExit, "without a checkpoint", plot.Run, "a", self.run_folder("a", rows(3)), "tokens")


class WatchTest(Case):
    def once(self, *arguments, columns=90):
        done = subprocess.run([sys.executable, LOOK / "watch.py", "--once", *arguments], capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout.splitlines()

    def test_once(self):
        folder = self.run_folder("a", rows(60) + row(61)[:-5], steps=(60,))  # cut in the middle of a row
        none = self.dir / "none"
        lines = self.once(folder, f"later={none}", columns=30)
        self.assertEqual(lines[0], "a   step 60/200 30%   left 18")
        self.assertEqual(lines[1], "  loss 1.0667  " + watch.curve(runlog.read(folder)["loss"], 15))
        lines = self.once(folder, f"later={none}")
        self.assertEqual(lines[0], "a   step 60/200 30%   left 18 s")  # 140 steps of 128 tokens, 1000 a second
        self.assertEqual(lines[2:6], ["  val 1.5167   lr 0.000712   norm 0.267   1k tokens/s",
                                      "  1 spike (last 30), 1 skipped (last 40)", "", "later"])
        self.assertEqual(lines[6], f"  waiting: {none}/log.csv: is not there"[:90])
        os.utime(Path(folder) / "log.csv", (0, 0))
        self.assertIn("silent for", self.once(folder)[3])
        self.assertEqual(self.once(self.run_folder("b", rows(5)), "--steps", "5")[0], "b   step 5/5 100%   done")

    def test_stdout(self):
        """Full, without a reader or closed: one line, or none; a name of any bytes can be printed."""
        folder = self.run_folder("a\udcff", rows(9))
        read, gone = os.pipe()
        os.close(read)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        ask = [sys.executable, LOOK / "watch.py", "--once", folder]
        for out, close, words in ((os.open("/dev/full", os.O_WRONLY), (), "No space left"), (gone, (), "Broken pipe"),
                                  (os.open("/dev/null", os.O_WRONLY), (1,), "")):
            done = subprocess.run(ask, stdout=out, stderr=subprocess.PIPE, text=True, env=env,
                                  preexec_fn=lambda: [os.close(fd) for fd in close])
            os.close(out)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (bool(words), bool(words)), done.stderr)
            self.assertIn(f"watch.py: stdout: {words}" if words else "", done.stderr)

    def test_curve(self):
        self.assertEqual(watch.curve([8, 7, 6, 5, 4, 3, 2, 1], 20), "█▇▆▅▄▃▂▁")
        self.assertEqual(watch.curve([1, 3, 2, 2, math.nan, math.nan, 9, 9], 4, "0123456789"), "00 9")
        fall = watch.curve([100.0, 99.0, *range(38, 0, -1)], 40)
        self.assertEqual((len(fall), fall[:3], fall[-1]), (40, "███", "▁"))
        self.assertEqual(watch.curve([math.nan] * 3, 3), "   ")
        self.assertEqual(watch.curve([1.0, *[7.0, 8.0] * 20], 41)[:3], "▁▁█")  # the first is the lowest
        self.assertEqual((watch.short(15321), watch.short(999700), watch.short(87)), ("15.3k", "1M", "87"))
        self.assertEqual((watch.duration(59.4), watch.duration(3700), watch.duration(200000)),
                         ("59 s", "1 h 1 min", "2 d 7 h"))

    def test_table(self):
        runs = [watch.Run(f"run{i}", self.run_folder(f"run{i}", rows(50 + i)), None) for i in range(4)]
        lines = watch.frame(runs, 110, 8)
        self.assertEqual(" ".join(lines[0].split()), "run step loss curve val lr norm tokens/s left notes")
        self.assertEqual(lines[2].split()[:4], ["run1", "51/200", "25%", "1.0784"])
        self.assertTrue(lines[1].endswith("1 spike, 1 skipped"))
        self.assertEqual(watch.frame(runs, 45, 8)[0].split(), ["run", "step", "loss", "notes"])
        self.assertTrue(all(len(line) <= 20 for line in watch.frame(runs, 20, 8)))
        self.assertEqual(watch.frame(runs, 100, 4)[-1], "and 2 more; a taller terminal shows them")

    def test_goes_on(self):
        folder = self.dir / "a"
        run = watch.Run("a", str(folder), None)
        self.assertEqual(watch.frame([run], 200, 9)[1], f"  waiting: {folder}/log.csv: is not there")
        for text, line in ((rows(50), "a   step 50/200 25%"), (rows(51)[:-9], "a   step 50/200 25%"),
                           (rows(1), "a   step 1"), ("", f"  waiting: {folder}/log.csv: has no rows yet"),
                           (row(1) + "x\n", "line 3 is not 7 fields"), (rows(90, 1000), "a   step 90/1000 9%")):
            self.run_folder("a", text)
            lines = watch.frame([run], 200, 9)
            self.assertIn(line, lines[1] if run.trouble else lines[0])
        with mock.patch.object(watch.time, "time", side_effect=[100, 120, 140, 140, 140]):  # ten steps in 20 s each
            run.seen = []
            for n in (100, 110, 120):
                self.run_folder("a", rows(n, 1000))
                run.update()
            self.assertEqual(run.left(), 880 * 2)
        self.run_folder("a", rows(30, 1000))  # begun anew: its pace too
        run.update()
        self.assertEqual(len(run.seen), 1)

    def test_terminal(self):
        folder = self.run_folder("a", rows(50))
        main, side = pty.openpty()
        command = [sys.executable, LOOK / "watch.py", folder, "--every", "60"]
        process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side)
        os.close(side)
        self.addCleanup(os.close, main)
        self.addCleanup(process.kill)

        def read_to(end):
            text = b""
            while end not in text:
                self.assertTrue(select.select([main], [], [], 60)[0], text)
                text += os.read(main, 4096)
            return text.decode()
        self.assertIn("a   step 50/200 25%", read_to(watch.CLEAR_BELOW.encode()))
        self.run_folder("a", rows(60))
        process.send_signal(signal.SIGWINCH)  # as a new size does: at once, not in 60 seconds
        self.assertIn("a   step 60/200 30%", read_to(watch.CLEAR_BELOW.encode()))
        process.send_signal(signal.SIGINT)
        self.assertIn(watch.LEAVE + "a   step 60/200 30%", read_to(b"tokens/s"))
        self.assertEqual(process.wait(60), 0)


class ExportTest(Case):
    def export(self, *arguments):
        with mock.patch.object(sys, "argv", ["export_log.py", *map(str, arguments)]), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            export_log.main()
        return out.getvalue().splitlines()

    def wanted(self, folder):
        """tag -> [(step, value)]: log.csv, read without runlog.py"""
        header, *lines = (Path(folder) / "log.csv").read_text().splitlines()
        series = {}
        for line in lines:
            fields = dict(zip(header.split(","), line.split(",")))
            step, note = int(fields.pop("step")), fields.pop("note")
            for tag, value in [*fields.items(), *([(note, "1")] if note else [])]:
                if value:
                    series.setdefault(tag, []).append((step, float(value)))
        return series

    def test_rows(self):
        folder = self.run_folder("a", rows(60), steps=(60,))
        log, series = runlog.read(folder), {}
        for step, values in export_log.rows(log):
            for tag, value in values.items():
                series.setdefault(tag, []).append((step, value))
        self.assertEqual(repr(series), repr({tag: self.wanted(folder)[tag] for tag in series}))  # NaN is unlike itself
        self.assertEqual(set(series), set(self.wanted(folder)))
        times = list(export_log.times(log, folder))
        self.assertAlmostEqual(times[-1], log.changed, 3)
        self.assertAlmostEqual(times[-1] - times[0], 59 * 0.128, 3)

    def test_tensorboard(self):
        try:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        except ImportError:
            self.skipTest("needs tensorboard")
        folder = self.run_folder("a", rows(60), {"dim": "64"}, steps=(60,))
        self.run_folder("b", rows(20))
        for _ in range(2):  # the second replaces the first
            printed = self.export(folder, self.dir / "b", "--tensorboard", self.dir / "tb")
        self.assertEqual(printed, [str(self.dir / "tb" / name) for name in "ab"])
        self.assertEqual(os.listdir(printed[0]), ["events.out.tfevents.log"])
        events = EventAccumulator(printed[0], size_guidance={"scalars": 0})
        events.Reload()
        wanted = self.wanted(folder)
        self.assertEqual(set(events.Tags()["scalars"]), set(wanted))
        for tag, series in wanted.items():
            got = [(e.step, float(e.value)) for e in events.Scalars(tag)]
            self.assertEqual(repr(got), repr([(step, float(plot.np.float32(value))) for step, value in series]))
        self.assertIn("hparams", events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name)
        self.assertIn(b"dim", events.summary_metadata["_hparams_/session_start_info"].plugin_data.content)

    def test_wandb(self):
        try:
            from wandb.proto.wandb_internal_pb2 import Record
        except ImportError:
            self.skipTest("needs wandb")
        folder = self.run_folder("a", rows(60), {"dim": "64"}, steps=(60,))
        # by a process, at whose end wandb's own one has written everything
        done = subprocess.run([sys.executable, LOOK / "export_log.py", f"name={folder}", "--wandb", self.dir / "wb",
                               "--project", "paper"],
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        place = done.stdout.strip()
        (file,) = Path(place).glob("*.wandb")
        data, at, part, series, config, projects = file.read_bytes(), 7, b"", {}, {}, set()
        while at + 7 <= len(data):  # LevelDB's log: blocks of 32 KiB, records of CRC, length, kind, bytes
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = struct.unpack("<HB", data[at + 4:at + 7])
            part += data[at + 7:at + 7 + length]
            at += 7 + length
            if kind not in (1, 4):  # a record's last piece has not come
                continue
            record, part = Record.FromString(part), b""
            projects.add(record.run.project)
            config.update({u.key: json.loads(u.value_json) for u in record.run.config.update})
            values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for tag, value in values.items():
                if not tag.startswith("_"):
                    series.setdefault(tag, []).append((values["_step"], float(value)))
        self.assertEqual(repr(series), repr({tag: self.wanted(folder)[tag] for tag in series}))
        self.assertEqual(set(series), set(self.wanted(folder)))
        self.assertEqual(config["dim"], 64)
        self.assertIn("paper", projects)

    def test_refusals(self):
        folder, out = self.run_folder("a", rows(3)), self.dir / "out"
        for package in ("tensorboard", "wandb"):
            absent = [name for name in sys.modules if name.split(".")[0] == package] + [package]
            with mock.patch.dict(sys.modules, dict.fromkeys(absent)):
                self.refused(SystemExit, f"pip install {package}", self.export, folder, f"--{package}", out)
        self.assertFalse(out.exists())
        self.refused(SystemExit, "neither --tensorboard nor --wandb", self.export, folder)
        self.refused(runlog.NoRows, "none/log.csv: is not there", self.export, self.dir / "none", "--wandb", out)
        for names in (["a", "./a"], ["..=a"]):  # one would replace the other, or lie outside of DIR
            here = os.getcwd()
            self.addCleanup(os.chdir, here)
            os.chdir(self.dir)
            self.refused(SystemExit, "is no name of one run's folder", self.export, *names, "--tensorboard", out)
            os.chdir(here)


if __name__ == "__main__":
    sys.exit(run_all("test_plot"))
