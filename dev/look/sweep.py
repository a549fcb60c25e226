#!/usr/bin/env python3
"""Learning rates x variants x seeds: the paper's claim, tried at the size that one has the hardware for.

    dev/look/sweep.py OUT --lrs 1e-3,3e-3,1e-2 --seeds 1,2,3 -- --model 22M --train-data 'data/*_train_*.bin' ...

What follows `--` goes to the trainer, whatever its options; the sweep adds --variant, --lr, --seed, --out and --resume.
A --min-lr there is that of all rates, and may be no larger than the least; without it cosine's is a tenth of each.
Each run has its folder OUT/VARIANT/lrRATE_seedN. The first seed runs at every rate; the others then at each variant's
best rate and at its largest stable one. Started again, the sweep leaves finished runs alone and goes on with the rest
(a run that was cut goes on from its newest checkpoint if it writes some: --save-every). Ctrl-C stops all of it.

The loss of a run is its last validation loss, or without validation the mean training loss of its last tenth of steps.
A rate is stable where no step was skipped and, above the variant's best rate, no seed's loss is more than --within
above the mean at the best.

Writes OUT/sweep.csv (a row a run), OUT/sweep.md (the table) and OUT/sweep.png; --report only does that. OUT/sweep.json
holds what was asked for: other runs in the same folder are refused, more rates and seeds are welcome.
Exit status 1 if a run failed; its log.txt has what it said.
"""
import argparse
import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import runlog

VARIANTS = {"simplegpt": "SimpleGPT", "prenorm": "pre-norm", "preqknorm": "pre-norm + QK norm"}
OURS = ("--variant", "--lr", "--seed", "--out", "--resume")  # the sweep's own


class Refused(runlog.LogError):
    pass


class Run:
    def __init__(self, out, variant, lr, seed):
        self.variant, self.lr, self.seed = variant, lr, seed
        self.dir = out / variant / f"lr{lr:g}_seed{seed}"

    def read(self):
        """(train, val, skipped): losses by step, validation losses by step, number of skipped steps."""
        try:
            log = runlog.read(self.dir)
        except runlog.LogError as e:
            raise Refused(f"{e} Or remove {self.dir} and sweep again.")
        val = {step: loss for step, loss in zip(log["step"], log["val_loss"]) if not math.isnan(loss)}
        return dict(zip(log["step"], log["loss"])), val, log["note"].count("skipped")

    def done(self):
        return (self.dir / "done").exists()

    def result(self):
        """(loss, skipped steps) of a finished run; loss is inf where it is not finite."""
        train, val, skipped = self.read()
        if val:
            loss = val[max(val)]
        else:
            tail = [train[s] for s in sorted(train)[-math.ceil(len(train) / 10):]]
            loss = sum(tail) / len(tail)
        return (loss if math.isfinite(loss) else math.inf), skipped


def listed(kind):
    def parse(text):
        try:
            values = [kind(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers, 1,2,3")
        return list(dict.fromkeys(values))

    return parse


def parse_options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s OUT [options] -- TRAINER'S OPTIONS")
    p.error = lambda message: sys.exit(f"sweep: {message}. See sweep.py --help.")
    p.add_argument("out", type=Path, help="the sweep's folder")
    # as many digits as the folders' names have
    p.add_argument("--lrs", type=listed(lambda word: float(f"{float(word):g}")), default=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
                   help="peak learning rates (1e-3,3e-3,1e-2,3e-2,1e-1)")
    p.add_argument("--seeds", type=listed(int), default=[1, 2, 3], help="of weights and order of the data (1,2,3)")
    p.add_argument("--variants", default=",".join(VARIANTS), help="(all three)")
    p.add_argument("--all-seeds", action="store_true", help="every seed at every rate")
    p.add_argument("--within", type=float, default=0.1,
                   help="nats above a variant's best that still count as stable (0.1)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time on CPUs, which share the cores (1)")
    p.add_argument("--gpus", type=listed(int), help="numbers of the GPUs, one run each at a time, in place of --jobs")
    p.add_argument("--trainer", default=str(Path(__file__).resolve().parents[2] / "train_gpt"), help="(./train_gpt)")
    p.add_argument("--report", action="store_true", help="only the table and the picture of what is there")
    own, rest = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1:]
    o = p.parse_args(own)
    o.args, o.variants = rest, o.variants.split(",")
    for v in o.variants:
        if v not in VARIANTS:
            raise Refused(f"--variants: '{v}' is none of {', '.join(VARIANTS)}.")
    for a in rest:
        if a.split("=")[0] in OURS:
            raise Refused(f"{a} after --: the sweep sets {', '.join(OURS)} itself. Leave it out.")
    if not o.lrs or min(o.lrs) <= 0 or o.jobs < 1:
        raise Refused("--lrs and --jobs must be positive.")
    return o


def remember(o):
    """The trainer's options of a folder stay the same, so that its runs can be compared."""
    path = o.out / "sweep.json"
    if path.exists():
        try:
            known = json.loads(path.read_text() if path.is_file() else "")["trainer_options"]
            shlex.join([] + known)  # a list of words
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(f"{path}: this is not a sweep's file. Sweep into another folder.")
        if o.args and o.args != known:
            raise Refused(f"{o.out}: holds runs with other options ({shlex.join(known)}). Sweep into another folder.")
        o.args = known
    elif o.report:
        raise Refused(f"{path} is missing: no sweep has run there. Run one, or name its folder.")
    elif not o.args:
        raise Refused("the trainer's options are missing. Give them after --, its --train-data at least.")
    else:
        o.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"trainer_options": o.args}, indent=1) + "\n")


class Pool:
    """Runs the trainer, as many at a time as there is room for; says a line when a run begins and ends."""

    def __init__(self, o):
        self.o, self.lock, self.stop, self.children = o, Lock(), Event(), set()
        self.places = list(o.gpus) if o.gpus else list(range(o.jobs))
        self.failed, self.finished, self.total = [], 0, 0

    def one(self, run):
        if self.stop.is_set():
            return
        with self.lock:
            place = self.places.pop()
        env = dict(os.environ)
        if self.o.gpus:
            env["CUDA_VISIBLE_DEVICES"] = str(place)
        else:
            env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.o.jobs)))
        run.dir.mkdir(parents=True, exist_ok=True)
        command = [self.o.trainer, *self.o.args, "--variant", run.variant, "--lr", f"{run.lr:g}", "--seed",
                   str(run.seed), "--out", str(run.dir), "--resume"]
        begin = time.time()
        with open(run.dir / "log.txt", "w") as log:
            # a group of its own: Ctrl-C reaches the sweep alone, which passes it on
            child = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            with self.lock:
                self.children.add(child)
                if self.stop.is_set():  # between the look above and here
                    child.send_signal(signal.SIGTERM)
            status = child.wait()
        with self.lock:
            self.children.discard(child)
            self.places.append(place)
            self.finished += 1
            if self.stop.is_set():
                return
            name = f"{run.variant} lr {run.lr:g} seed {run.seed}"
            said = (run.dir / "log.txt").read_text(errors="replace").strip().splitlines()
            if status or said and said[-1].startswith("asked to stop"):  # by somebody else
                self.failed.append(run)
                print(f"[{self.finished}/{self.total}] {name}: failed ({status}): {said[-1] if said else ''}",
                      flush=True)
            else:
                (run.dir / "done").touch()
                print(f"[{self.finished}/{self.total}] {name}: loss {run.result()[0]:.4f}, "
                      f"{time.time() - begin:.0f} s", flush=True)

    def all(self, runs):
        todo = [r for r in runs if not r.done()]
        self.finished, self.total = len(runs) - len(todo), len(runs)
        if not todo:
            return
        print(f"{len(runs)} runs, {self.finished} of them done, {len(self.places)} at a time", flush=True)
        with ThreadPoolExecutor(len(self.places)) as threads:
            try:
                list(threads.map(self.one, todo))
            except BaseException:
                self.stop.set()
                with self.lock:
                    for child in self.children:
                        child.send_signal(signal.SIGTERM)  # saves, if it may, and ends
                raise


class Summary:
    """What the finished runs say: means over seeds, the best and the largest stable rate of each variant."""

    def __init__(self, o):
        self.losses, self.skipped, self.runs = {}, {}, []
        for v in VARIANTS:
            for path in sorted((o.out / v).glob("lr*_seed*")):
                try:
                    lr, seed = path.name[2:].split("_seed")
                    run = Run(o.out, v, float(lr), int(seed))
                except ValueError:  # somebody's own
                    continue
                if run.dir == path and run.done():
                    loss, skipped = run.result()
                    self.losses.setdefault((v, run.lr), {})[run.seed] = loss
                    self.skipped[v, run.lr] = self.skipped.get((v, run.lr), 0) + skipped
                    self.runs.append((run, loss, skipped))
        self.within = o.within
        self.variants = [v for v in VARIANTS if any(k[0] == v for k in self.losses)]

    def rates(self, v):
        return sorted(lr for u, lr in self.losses if u == v)

    def mean(self, v, lr):
        losses = self.losses[v, lr].values()
        return sum(losses) / len(losses)

    def spread(self, v, lr):
        """Standard deviation over seeds, None of one."""
        losses, m = self.losses[v, lr].values(), self.mean(v, lr)
        n = len(losses)
        return math.sqrt(sum((x - m) ** 2 for x in losses) / (n - 1)) if n > 1 and math.isfinite(m) else None

    def best(self, v):
        return min(self.rates(v), key=lambda lr: self.mean(v, lr))

    def stable(self, v, lr):
        best, worst = self.best(v), max(self.losses[v, lr].values())
        return not self.skipped[v, lr] and (lr <= best or worst <= self.mean(v, best) + self.within)

    def limit(self, v):
        return max((lr for lr in self.rates(v) if self.stable(v, lr)), default=self.best(v))


def report(o):
    s = Summary(o)
    if not s.runs:
        raise Refused(f"{o.out}: no run has finished yet. Sweep first.")
    with open(o.out / "sweep.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["variant", "lr", "seed", "loss", "skipped_steps"])
        order = list(VARIANTS)
        for run, loss, skipped in sorted(s.runs, key=lambda r: (order.index(r[0].variant), r[0].lr, r[0].seed)):
            w.writerow([run.variant, f"{run.lr:g}", run.seed, f"{loss:.6f}", skipped])
    rates = sorted({lr for v in s.variants for lr in s.rates(v)})
    lines = ["| | " + " | ".join(f"{lr:g}" for lr in rates) + " | best | largest stable |",
             "|---|" + "--:|" * len(rates) + "---|--:|"]
    for v in s.variants:
        cells = []
        for lr in rates:
            if (v, lr) not in s.losses:
                cells.append("")
                continue
            text = f"{s.mean(v, lr):.3f}" if math.isfinite(s.mean(v, lr)) else "not finite"
            text += f" ± {s.spread(v, lr):.3f}" if s.spread(v, lr) is not None else ""
            cells.append(text if s.stable(v, lr) else f"*{text}*")
        lr, limit = s.best(v), s.limit(v)
        n = len(s.losses[v, lr])
        edge = "at least " if limit == max(s.rates(v)) else ""
        cells += [f"{s.mean(v, lr):.3f} at {lr:g} ({n} seed{'s' if n > 1 else ''})", f"{edge}{limit:g}"]
        lines.append(f"| {VARIANTS[v]} | " + " | ".join(cells) + " |")
    table = "\n".join(lines) + "\n"
    (o.out / "sweep.md").write_text(table)
    print(table)
    draw(o, s)


def draw(o, s):
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib
    except ImportError:
        print("sweep: no picture, as the package matplotlib is missing. pip install matplotlib.", file=sys.stderr)
        return
    import matplotlib.pyplot as plt
    import numpy as np

    import plot

    colours = {v: plot.COLORS[False][place] for v, place in plot.VARIANTS.items()}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    finite = [loss for _, loss, _ in s.runs if math.isfinite(loss)]
    low = min(finite, default=0)
    top = max([x for x in finite if x < 2 * low + 1], default=1)
    top += 0.05 * (top - low) + 0.01
    for v in s.variants:
        rates = s.rates(v)
        left.plot(rates, [min(s.mean(v, lr), top) for lr in rates], "-", color=colours[v], label=VARIANTS[v])
        for run, loss, skipped in s.runs:
            if run.variant == v:
                above = not loss < top
                left.plot(run.lr, top if above else loss, "^" if above else "o", color=colours[v], markersize=4,
                          markerfacecolor=colours[v] if s.stable(v, run.lr) else "white", clip_on=False)
        limit = s.limit(v)
        left.axvline(limit, color=colours[v], linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
    left.set(xscale="log", xlabel="peak learning rate", ylabel="loss at the end, nats a token",
             ylim=(low - 0.05 * (top - low) - 0.01, top))
    left.set_title("filled: stable; dashed: the largest stable rate", fontsize=9)
    left.legend(frameon=False)
    for v in s.variants:
        lr = s.best(v)
        for seed in sorted(s.losses[v, lr]):
            train = Run(o.out, v, lr, seed).read()[0]
            steps = sorted(train)
            first = seed == min(s.losses[v, lr])
            curve = plot.smooth(np.array([train[step] for step in steps]))
            right.plot(steps, curve, color=colours[v], linewidth=1, alpha=0.9 if first else 0.5,
                       label=f"{VARIANTS[v]}, lr {lr:g}" if first else None)
    right.set(xlabel="step", ylabel="training loss, smoothed", yscale="log")
    right.set_title("at each variant's best rate, a line a seed", fontsize=9)
    right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    right.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(o.out / "sweep.png", dpi=110)
    print(f"{o.out / 'sweep.csv'}, {o.out / 'sweep.md'}, {o.out / 'sweep.png'}")


def main():
    o = parse_options()
    remember(o)
    if o.report:
        report(o)
        return 0
    if not os.access(o.trainer, os.X_OK):
        raise Refused(f"{o.trainer} is missing. Build it: make.")
    pool = Pool(o)
    first = o.seeds if o.all_seeds else o.seeds[:1]
    pool.all([Run(o.out, v, lr, seed) for seed in first for lr in o.lrs for v in o.variants])
    if not o.all_seeds and len(o.seeds) > 1 and not pool.failed:
        s = Summary(o)
        for pick in (s.best, s.limit):
            pool.all([Run(o.out, v, pick(v), seed) for seed in o.seeds[1:] for v in o.variants])
    report(o)
    return 1 if pool.failed else 0


def stoppable():
    try:
        return main()
    except KeyboardInterrupt:
        print("sweep: stopped. The same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runlog.run("sweep", stoppable)
