#!/usr/bin/env python3
"""The paper's claim, larger stable learning rates and a lower loss, tried on a CPU: the runs, their table, a picture.

    dev/look/claim.py RUNS --train-data GLOB --val-data GLOB [--hour | --sizes | --depths | --why | --all]

dev/recipes/claim.sh prepares the data and calls this. Runs are variant x peak rate x seed, one thread each, as many at
a time as there are cores, those first that tell most. With no option the whole main table: 2 seeds at every rate, 3 at
each variant's best two. --hour begins no run that would end after 72 minutes. --sizes and --depths run ladders of
models, each at its variant's best rate and the rates beside it. --why runs the main table's model with --probe, at a
small and at a large rate.

A run is finished if its run.json has these options and its log the last step, or one by which the run is lost: the log
tells. Ctrl-C ends all of it with a checkpoint each; the same command goes on. RUNS/claim.md and claim.png are written
after the last run, and of what is there by --report (claim_report.py).
"""
import argparse
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import runlog
from claim_report import LADDERS, VARIANTS, Refused, best, ranking, report

ROOT = Path(__file__).resolve().parents[2]
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
MIDDLE, OUTER = [1e-2, 3e-3, 3e-2, 1e-3, 1e-1], [3e-4, 3e-1, 1.0]  # a best rate is looked for in the middle first
GUESS = {"simplegpt": 1e-3, "preqknorm": 1e-2, "prenorm": 1e-2}  # where the ladders begin without a main table
BASE = {"multiple-of": 32, "tokenizer": "bytes", "seq-len": 128, "batch-size": 32, "steps": 800, "warmup": 40}
SHAPES = {"main": (96, 8, 3), "why": (96, 8, 3),  # dim, layers, heads
          "size-0.25M": (48, 8, 3), "size-3.7M": (192, 8, 6), "size-10M": (320, 8, 10),
          "depth-4": (96, 4, 3), "depth-16": (96, 16, 3), "depth-32": (96, 32, 3)}
WHY, WHY_TIMES = [1e-3, 1e-1], 2.0        # rates, and how long a run takes that probes, in runs that do not
HOUR = 72 * 60  # seconds, behind which no run of --hour shall end


# ---------------------------------------------------------------------------------------------------------------------
# What a log says

def lost(steps, losses, skipped, total, warmup, above=math.inf):
    """The step at which a run is lost, or None. w: a fortieth of all steps; "mean": over the last w losses.

    After the warm-up: the mean is not below the loss at the start; or it has for an eighth of the steps been more than
    0.5 above the lowest mean so far; or half of the steps are done, it is above `above`, and the lowest mean has not
    fallen by 0.05 in an eighth of the steps (at a small rate it has); or 10 steps were skipped, after which the trainer
    ends.
    """
    w, eighth, low, lows, risen = max(1, total // 40), max(1, total // 8), math.inf, {}, None
    for i in range(w - 1, len(steps)):
        window = [x for x in losses[i - w + 1:i + 1] if math.isfinite(x)]
        mean, step = (sum(window) / len(window) if window else math.inf), steps[i]
        low = lows[step] = min(low, mean)
        risen = (risen or step) if mean > low + 0.5 else None
        if step >= warmup + w and (mean >= losses[0] or risen and step - risen >= eighth):
            return step
        if 2 * step >= total and mean > above and low > lows.get(step - eighth, math.inf) - 0.05:
            return step
    return steps[-1] if skipped >= 10 else None


class Result:
    """A finished run: its loss at the end, or when it was lost; the loss at the start; validation losses by step."""

    def __init__(self, loss, start, curve=(), lost_at=None):
        self.loss, self.start, self.curve, self.lost_at = loss, start, dict(curve), lost_at

    @property
    def capped(self):
        return min(self.loss, self.start) if math.isfinite(self.loss) else self.start


def result_of(log, total, warmup, above=math.inf):
    """The Result of a log, or None of a run that is not finished."""
    at = lost(log["step"], log["loss"], log["note"].count("skipped"), total, warmup, above)
    curve = {s: x for s, x in zip(log["step"], log["val_loss"]) if not math.isnan(x)}
    start = log["loss"][0]
    if at is not None:
        w = max(1, total // 40)
        i = log["step"].index(at)
        window = [x for x in log["loss"][max(0, i - w + 1):i + 1] if math.isfinite(x)]
        return Result(sum(window) / len(window) if window else math.inf, start, curve, at)
    if log["step"][-1] < total:
        return None
    return Result(curve.get(total, math.inf), start, curve)


# ---------------------------------------------------------------------------------------------------------------------
# Which runs, in which order

def wanted(group, table, centres):
    """(variant, rate, seed) of a group, what tells most first. table: {variant: {rate: {seed: Result}}} so far.

    Of main: seed 1 at the rates in the middle, seed 2 at the best of them, seed 1 at the others; then seed 2 at each
    variant's best rate and its second, seed 3 there, seed 2 at the others; seed 3 at the best two of both seeds, if
    they are others than those of one.
    Of a ladder's model: seed 1 at the variant's rate in `centres` and those beside it, further if the best is at an
    edge; then seed 2 at its best.
    """
    if group == "why":
        return [(v, rate, 1) for rate in WHY for v in VARIANTS]

    def first(v):
        return {r: {1: seeds[1]} for r, seeds in table.get(v, {}).items() if 1 in seeds}

    order = [(v, rate, 1) for rate in MIDDLE for v in VARIANTS]
    if all(rate in first(v) for v, rate, _ in order):
        order += [(v, best({r: first(v)[r] for r in MIDDLE}), 2) for v in VARIANTS]
    order += [(v, rate, 1) for rate in OUTER for v in VARIANTS]
    if group != "main":
        order = []
        for v in VARIANTS:
            at = RATES.index(centres[v])
            low, high = max(0, at - 1), min(len(RATES) - 1, at + 1)
            runs = first(v)
            while set(RATES[low:high + 1]) <= set(runs):
                at = RATES.index(best({r: runs[r] for r in RATES[low:high + 1]}))
                if at == low > 0:
                    low -= 1
                elif at == high < len(RATES) - 1:
                    high += 1
                else:
                    break
            order += [(v, rate, 1) for rate in RATES[low:high + 1]]
        order.sort(key=lambda run: abs(RATES.index(run[1]) - RATES.index(centres[run[0]])))
    if any(rate not in first(v) for v, rate, _ in order):
        return order  # seeds are given when the rates are known
    ranks = {v: ranking(first(v)) for v in VARIANTS}
    tops = [(0, 2)] if group != "main" else [(0, 2), (1, 2), (0, 3), (1, 3), *((i, 2) for i in range(2, len(RATES)))]
    order += [(v, ranks[v][place], seed) for place, seed in tops for v in VARIANTS]
    order = list(dict.fromkeys(order))
    if group == "main" and all(seed in table[v].get(rate, {}) for v, rate, seed in order):
        both = {v: ranking({r: {1: s[1], 2: s[2]} for r, s in table[v].items()}) for v in VARIANTS}
        order += [(v, both[v][place], 3) for place in (0, 1) for v in VARIANTS if both[v][place] not in ranks[v][:2]]
    return order


def duration(seconds):
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def makespan(seconds, jobs):
    """How long runs of these lengths take, begun in this order, `jobs` at a time."""
    ends = [0.0] * jobs
    for s in seconds:
        ends[ends.index(min(ends))] += s
    return max(ends)


def fitting(seconds, jobs, limit):
    """How many runs of `seconds` each end before the limit, `jobs` at a time."""
    return jobs * int(limit / seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def last_line(folder):
    """What a trainer said at its end."""
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing."


def machine():
    """The processor's name, and the cores that this program may use."""
    try:
        found = re.search(r"(?m)^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        found = None
    return f"{len(os.sched_getaffinity(0))} cores of {found.group(1).strip() if found else platform.machine()}"


class Run:
    def __init__(self, o, group, variant, lr, seed):
        self.o, self.group, self.key = o, group, (variant, lr, seed)
        self.name = f"{group} {variant} lr {lr:g} seed {seed}"
        self.dir = o.runs / group / variant / f"lr{lr:g}_seed{seed}"
        self.options = [*o.options(group), "--variant", variant, "--lr", f"{lr:g}", "--seed", str(seed)]
        self.child, self.log, self.begin = None, runlog.Log(self.dir), 0.0
        self.checked, self.stopped = 0, False

    def facts(self):
        """What run.json says: options and, of a finished run, seconds; {} without one."""
        path = self.dir / "run.json"
        if not path.exists():
            return {}
        try:
            facts = json.loads(path.read_text() if path.is_file() else "")
            known = facts["options"]
            if not isinstance(facts["seconds"], (int, float)) or not isinstance(facts["machine"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(f"{path}: is not a run's. Remove {self.dir}, or choose another folder (--runs).") from None
        if known != self.options:
            raise Refused(f"{self.dir}: was run with other options. Choose another folder (--runs).")
        return facts

    def remember(self, **more):
        part = self.dir / "run.json.part"
        part.write_text(json.dumps({"options": self.options, **more}, indent=1) + "\n")
        part.replace(self.dir / "run.json")

    def result(self):
        """The Result of a finished run, else None."""
        if not self.facts():
            return None
        try:
            return result_of(runlog.read(self.dir), self.o.steps, self.o.warmup, self.o.lost_above)
        except runlog.NoRows:
            return None
        except runlog.LogError as e:
            raise Refused(f"{e} Or remove {self.dir} and start again.") from None

    def start(self):
        self.earlier = self.facts().get("seconds", 0.0)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.remember(seconds=self.earlier, machine=machine())
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [self.o.trainer, *self.options, "--out", str(self.dir), "--resume", "--keep", "1", "--save-every",
                   str(max(1, self.o.steps // 4))]
        with open(self.dir / "log.txt", "w") as text:
            # a group of its own: Ctrl-C reaches this program alone, which passes it on. It holds the lock while it runs
            self.child = subprocess.Popen(command, env=env, stdout=text, stderr=text, start_new_session=True,
                                          pass_fds=[self.o.lock])
        self.begin = time.time()

    def look(self):
        """Ends a run that is lost; True if it has ended."""
        status = self.child.poll()
        try:
            if status is None and self.log.update() and len(self.log) > self.checked:
                self.checked = len(self.log)
                at = result_of(self.log, self.o.steps, self.o.warmup, self.o.lost_above)
                if at and at.lost_at is not None and not self.stopped:
                    self.stop()
        except runlog.LogError:  # nothing there yet; what is wrong is told at its end
            pass
        return status is not None

    def stop(self):
        self.stopped = True
        self.child.send_signal(signal.SIGTERM)  # saves and ends

    def end(self):
        """After its end: the Result, whose checkpoints go; None if it failed or was stopped."""
        self.child.wait()
        self.remember(seconds=self.earlier + time.time() - self.begin, machine=machine())
        result = self.result()
        if result and self.stopped and result.loss == math.inf:  # stopped in its last validation, which no resume has
            shutil.rmtree(self.dir)
            return None
        if result:
            for path in self.dir.glob("step_*"):
                shutil.rmtree(path, ignore_errors=True)
        return result

    def progress(self):
        return f"{self.name} step {self.log['step'][-1]}" if len(self.log) else f"{self.name} begins"


class Experiment:
    """Begins runs while there are cores for them, and says how it goes."""

    def __init__(self, o):
        self.o, self.running, self.failed = o, [], []
        self.machines, self.table, self.seconds = set(), {}, {}  # by group: Results; times of whole runs
        for group in SHAPES:
            self.table[group], self.seconds[group] = {}, []
            for path in sorted((o.runs / group).glob("*/lr*_seed*")):
                try:
                    lr, seed = path.name[2:].split("_seed")
                    run = Run(o, group, path.parent.name, float(lr), int(seed))
                except ValueError:  # somebody's own
                    continue
                if run.dir == path and run.key[0] in VARIANTS:
                    result = run.result()
                    if result:
                        self.add(run, result)

    def add(self, run, result):
        variant, lr, seed = run.key
        self.table[run.group].setdefault(variant, {}).setdefault(lr, {})[seed] = result
        facts = run.facts()
        self.machines.add(facts["machine"])
        if result.lost_at is None:
            self.seconds[run.group].append(facts["seconds"])

    def spent(self):
        """Seconds of core that main's runs have taken so far, also in earlier calls."""
        return sum(Run(self.o, "main", v, lr, seed).facts().get("seconds", 0.0)
                   for v in VARIANTS for lr in RATES for seed in (1, 2, 3))

    def estimate(self, group):
        """Seconds of a whole run: as those of its kind took, else main's, in proportion to the layers' products."""
        if self.seconds[group]:
            return statistics.median(self.seconds[group])
        dim, layers, _ = self.o.shape(group)
        base_dim, base_layers, _ = self.o.shape("main")
        base = statistics.median(self.seconds["main"]) if self.seconds["main"] else self.o.measured
        return base * (WHY_TIMES if group == "why" else layers * dim * dim / (base_layers * base_dim * base_dim))

    def measure(self):
        """Seconds of a run of main, from a few steps of as many trainers as will run side by side."""
        if self.seconds["main"]:
            return
        print(f"measuring: {self.o.measure_steps} steps, {self.o.jobs} at a time", flush=True)
        places = [self.o.runs / "measure" / str(i) for i in range(self.o.jobs)]
        options = [*self.o.options("main"), "--variant", "simplegpt", "--steps", str(self.o.measure_steps),
                   "--warmup", "0", "--val-every", "0"]
        children = []
        try:
            for place in places:
                place.mkdir(parents=True, exist_ok=True)
                with open(place / "log.txt", "w") as text:
                    children.append(subprocess.Popen(
                        [self.o.trainer, *options, "--out", str(place)], stdout=text, stderr=text,
                        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            for child, place in zip(children, places):
                if child.wait():
                    raise Refused(f"the trainer failed ({child.returncode}): {last_line(place)}")
        finally:
            for child in children:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        rates = [x for place in places for x in runlog.read(place)["tokens_per_s"][1:] or [math.nan]]
        each = self.o.tokens / statistics.median(rates)
        self.o.measured = each * self.o.steps * 1.06  # validation: 16 forwards behind every eighth
        if not math.isfinite(self.o.measured):
            raise Refused(f"{places[0]}: has no second step. Measure more (--measure-steps).")

    def open(self, group):
        """The runs of a group that are neither finished nor running nor failed."""
        centres = {v: best(runs) if (runs := self.table["main"].get(v)) else GUESS[v] for v in VARIANTS}
        order = wanted(group, self.table[group], centres)
        busy = {(r.group, *r.key) for r in self.running + self.failed}
        return [(v, rate, seed) for v, rate, seed in order
                if seed not in self.table[group].get(v, {}).get(rate, {}) and (group, v, rate, seed) not in busy]

    def expected(self, groups):
        """How many runs the groups still have, those included whose place is not known yet."""
        whole = {"main": 16 * len(VARIANTS) + 2 * len(VARIANTS), "why": 0}
        return [(g, max(len(self.open(g)), whole.get(g, 4 * len(VARIANTS)) - self.count(g)
                        - sum(r.group == g for r in self.running + self.failed))) for g in groups]

    def folder(self, *run):
        return Run(self.o, *run).dir

    def count(self, group):
        return sum(len(seeds) for runs in self.table[group].values() for seeds in runs.values())

    def left(self, groups):
        """Seconds until all is done."""
        rest = [max(0.0, self.estimate(r.group) - r.earlier - (time.time() - r.begin)) for r in self.running]
        for group, n in self.expected(groups):
            rest += [self.estimate(group)] * n
        return makespan(rest, self.o.jobs)

    def next(self, groups):
        """The run to begin now, or None: nothing is left, or it waits for others, or there is no time. The main table
        before the ladders, whose models take turns, each variant's run at its first rate before any at its second."""
        found = []
        for place, group in enumerate(groups):
            if self.o.deadline and time.time() + self.estimate(group) > self.o.deadline:
                continue
            todo = self.open(group)
            begun = self.count(group) + sum(r.group == group for r in self.running + self.failed)
            if todo:
                found.append((group != "main", begun // len(VARIANTS), place, Run(self.o, group, *todo[0])))
        return min(found)[-1] if found else None

    def all(self, groups):
        begin = told = time.time()
        done = 0
        try:
            while True:
                while len(self.running) < self.o.jobs and (run := self.next(groups)):
                    run.start()
                    self.running.append(run)
                if not self.running:
                    return
                time.sleep(self.o.poll)
                for run in [r for r in self.running if r.look()]:
                    self.running.remove(run)
                    result = run.end()
                    done += 1
                    if not result:
                        self.failed.append(run)
                        print(f"{run.name}: failed ({run.child.returncode}): {last_line(run.dir)}", flush=True)
                        continue
                    self.add(run, result)
                    what = f"lost at step {result.lost_at}, at" if result.lost_at is not None else "loss"
                    print(f"{run.name}: {what} {result.loss:.4f}, {time.time() - run.begin:.0f} s; {done} runs in "
                          f"{duration(time.time() - begin)}, {self.rest(groups)}", flush=True)
                    told = time.time()
                if time.time() - told > 300:
                    told = time.time()
                    print(f"{'; '.join(r.progress() for r in self.running)}; {self.rest(groups)}", flush=True)
        except BaseException:
            for run in self.running:
                run.stop()
            for run in self.running:
                run.end()
            raise

    def rest(self, groups):
        left = self.left(groups)
        if self.o.deadline:
            left = min(left, max(0.0, self.o.deadline - time.time()))
        return f"at most {duration(left)} left"


# ---------------------------------------------------------------------------------------------------------------------
# The command

def positive(kind):
    def parse(text):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = "number above 0"
    return parse


def parse_options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s RUNS [options] [-- TRAINER'S OPTIONS]", allow_abbrev=False)
    p.error = lambda message: sys.exit(f"claim: {message}. See claim.sh --help.")
    p.add_argument("default", nargs="?", type=Path, metavar="RUNS", help="the experiment's folder")
    p.add_argument("--runs", type=Path, help="the folder, in place of RUNS")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--hour", action="store_true", help="of the main table what ends within 72 minutes")
    what.add_argument("--sizes", action="store_true", help="the ladder of sizes, without the main table")
    what.add_argument("--depths", action="store_true", help="the ladder of depths, without the main table")
    what.add_argument("--why", action="store_true", help="runs at a small and a large rate, probed, and no others")
    what.add_argument("--all", action="store_true", help="all of it")
    what.add_argument("--report", action="store_true", help="only the table and the picture of what is there")
    p.add_argument("--doc", nargs="?", type=Path, const=ROOT, metavar="DIR",
                   help="also writes the report into DIR/dev/doc/results.md, and its beginning into DIR/README.md, "
                   "between marks with the name of RUNS' folder (the project)")
    p.add_argument("--train-data", default="", help="shards to train on")
    p.add_argument("--val-data", default="", help="shards to validate on")
    p.add_argument("--lost-above", type=positive(float), default=math.inf, metavar="LOSS",
                   help="a run still above it after half of its steps is lost (none; claim.sh: a bigram model's + 0.5)")
    p.add_argument("--jobs", type=positive(int), default=len(os.sched_getaffinity(0)),
                   help="runs at a time, of one thread each (the cores)")
    p.add_argument("--minutes", type=positive(float), metavar="N",
                   help="begin no run that would end later; --hour counts what it took before too (of --hour 72)")
    p.add_argument("--measure-steps", type=positive(int), default=12, help="to know the time of a run before (12)")
    p.add_argument("--trainer", default=str(ROOT / "train_gpt"), help="(./train_gpt)")
    p.add_argument("--poll", type=positive(float), default=2.0, help="seconds between looks at the runs (2)")
    own, more = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1:]
    o = p.parse_args(own)
    o.runs = o.runs or o.default
    if not o.runs:
        p.error("RUNS is missing: give the experiment's folder")
    settle(o, more)
    return o


def settle(o, more):
    """What follows from the options: those of a group's runs, their steps and tokens."""
    base = {**BASE, **dict(zip(("dim", "layers", "heads"), SHAPES["main"]))}
    given = {name: str(value) for name, value in base.items()}
    if len(more) % 2 or not all(name.startswith("--") for name in more[::2]):
        raise Refused("behind -- there are pairs only, --name value. Leave switches out.")
    changed = {name[2:]: value for name, value in zip(more[::2], more[1::2])}
    for name in ("variant", "lr", "seed", "out", "resume", "val-every", "save-every", "keep",
                 "probe", "train-data", "val-data"):
        if name in changed:
            raise Refused(f"--{name} behind --: the experiment sets it itself. Leave it out.")
    given.update(changed)
    names = ("dim", "layers", "heads", "steps", "warmup", "seq-len", "batch-size")
    try:
        numbers = {name: int(given[name]) for name in names}
    except ValueError:
        raise Refused(f"behind --: {', '.join(names)} are whole numbers. Give such.") from None
    o.steps, o.warmup = max(1, numbers["steps"]), numbers["warmup"]
    o.tokens = numbers["seq-len"] * numbers["batch-size"]
    shapes = {**SHAPES, **dict.fromkeys(("main", "why"), (numbers["dim"], numbers["layers"], numbers["heads"]))}
    o.shape = shapes.get
    fixed = [f"--{name}={value}" for name, value in given.items() if name not in ("dim", "layers", "heads")]
    fixed += ["--shuffle", f"--val-every={max(1, o.steps // 8)}"]
    fixed += [] if "val-batches" in given else ["--val-batches=16"]
    fixed += [f"--{name}={path}" for name, path in (("train-data", o.train_data), ("val-data", o.val_data))]

    def options(group):
        dim, layers, heads = shapes[group]
        probed = [f"--probe={max(1, o.steps // 4)}"] if group == "why" else []
        return [f"--dim={dim}", f"--layers={layers}", f"--heads={heads}", *fixed, *probed]

    o.options = options
    o.deadline, o.measured = None, math.nan


def take_lock(o):
    """One at a time in a folder; the runs hold the lock too, so that none is begun twice."""
    o.runs.mkdir(parents=True, exist_ok=True)
    o.lock = os.open(o.runs / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(o.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused(f"{o.runs}: another claim.sh, or a run that one has left, is at work. Wait for it.") from None


def main():
    o = parse_options()
    if o.report:
        report(o, Experiment(o))
        return 0
    if not o.train_data or not o.val_data:
        raise Refused("--train-data and --val-data are missing. dev/recipes/claim.sh gives them.")
    if not os.access(o.trainer, os.X_OK):
        raise Refused(f"{o.trainer} is missing. Build it: make.")
    take_lock(o)
    groups = [] if o.sizes or o.depths or o.why else ["main"]
    if o.all or o.why:
        groups.append("why")
    for name in LADDERS:
        if o.all or getattr(o, name):
            groups += [g for g in LADDERS[name] if g != "main"]
    experiment = Experiment(o)
    experiment.measure()
    each, begin = experiment.estimate(groups[0]), time.time()
    print(f"a run of {groups[0]} takes about {each / 60:.1f} minutes, {o.jobs} at a time; "
          f"all of it {duration(experiment.left(groups))} at most", flush=True)
    if o.minutes and not o.hour:
        o.deadline = begin + 60 * o.minutes
    if o.hour:
        rest = max(0.0, (60 * o.minutes if o.minutes else HOUR) - experiment.spent() / o.jobs)
        o.deadline = begin + rest
        if not experiment.count("main") and not fitting(each, o.jobs, rest):
            raise Refused("--hour: here not one run ends in that time. Leave --hour out.")
        print(f"--hour: {duration(rest)}, which is {fitting(each, o.jobs, rest)} whole runs of "
              f"{experiment.expected(groups)[0][1]}; a run that is lost ends earlier", flush=True)
    experiment.all(groups)
    report(o, experiment)
    return 1 if experiment.failed else 0


def stoppable():
    try:
        return main()
    except KeyboardInterrupt:
        print("claim: stopped. The same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runlog.run("claim", stoppable)
