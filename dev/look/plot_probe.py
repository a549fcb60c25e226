#!/usr/bin/env python3
"""Draws what --probe has measured: the curvature of the loss over parameters and over the blocks' inputs, how large
activations are by layer, and gradients and updates.

usage: plot_probe.py RUN... [--out FILE.png] [--step N]

RUN is the folder of a run or NAME=FOLDER, with the activations.csv, weights.csv, curvature.csv and curvature_inputs.csv that
train_gpt --probe writes. What is by layer is that of --step, else of the last probe; over training, curvature over the blocks'
inputs and attention logits are the largest of all blocks. Eigenvalues over inputs are drawn by magnitude, those below 0
hollow. A layer's gradients and updates are those of its linears together. Runs of one variant have one colour, the second
dashed. Without --out the picture is probe.png in the first run's folder. Prints a table of the largest of all blocks and
probed steps.
"""
import argparse
import csv
import io
import math
import re
import sys
from pathlib import Path

import runlog
from plot import COLORS, MARKERS, VARIANTS, picture, plt, save

PANELS = (("residual", "residual stream, RMS"), ("attention_branch", "what attention adds, RMS"),
          ("ffn_branch", "what the feed-forward adds, RMS"), ("activation", "activation of the feed-forward, RMS"),
          ("attention_logit", "largest attention logit"))
TABLE = ("", "attention logit", "a linear's output, RMS", "residual stream, RMS", "gradient's norm", "update's share",
         "Hessian over inputs, first", "largest", "last")


def fail(message):
    sys.exit(f"plot_probe.py: {message}")


def read(path, names, optional=False):
    """Rows of a table as dictionaries; the columns `names` must be there. optional: there may be no rows, or no table."""
    try:
        runlog.refuse_pipe(path)
        with open(path, newline="") as f:
            text = f.read()
        rows = list(csv.DictReader(io.StringIO(text[:text.rfind("\n") + 1])))  # the last may be half-written
    except FileNotFoundError:
        if optional:
            return []
        fail(f"{path}: is missing. Train with --probe N.")
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        fail(f"{path}: cannot be read: {getattr(e, 'strerror', e)}. Train with --probe N.")
    if optional and text and not rows:
        return []
    if not rows or not set(names) <= rows[0].keys():
        fail(f"{path}: holds no rows of {', '.join(names)}. Train with --probe N.")
    try:
        return [{n: r[n] if n == "tensor" else float(r[n]) for n in names} for r in rows]
    except (TypeError, ValueError):
        fail(f"{path}: holds something else than numbers. Train with --probe N anew.")


def of_linears(path):
    """(step, layer) -> the gradient's norm and the update's share, of a block's linears together."""
    sums = {}
    for r in read(path, ("step", "layer", "tensor", "weight", "gradient", "update"), optional=True):
        if r["layer"] >= 0 and not re.search(r"norm\d?\.weight$|^(output|wte)", r["tensor"]):
            here = sums.setdefault((r["step"], r["layer"]), [0, 0, 0])
            for i, x in enumerate((r["weight"], r["gradient"], r["weight"] * r["update"])):
                here[i] += x * x
    return {at: (math.sqrt(g), math.sqrt(u / w) if w else math.nan) for at, (w, g, u) in sums.items()}


def figures(rows, linears, inputs):
    """A row of TABLE behind the run's name: the largest of all blocks and probed steps."""
    def most(values):
        return f"{max(values):.2g}" if values else ""

    outer = {}  # step: the largest eigenvalue over inputs, in magnitude
    for r in inputs:
        outer[r["step"]] = max(outer.get(r["step"], 0), abs(r["eigenvalue"]))
    return [most([r["max"] for r in rows if r["tensor"] == "attention_logit"]),
            most([r["rms"] for r in rows if r["tensor"] in ("qkv", "o", "w13", "w2")]),
            most([r["rms"] for r in rows if r["tensor"] == "residual"]),
            most([gradient for gradient, _ in linears.values()]), most([share for _, share in linears.values()]),
            *(most([outer[at]] if outer else []) for at in (min(outer, default=0), max(outer, key=outer.get, default=0),
                                                            max(outer, default=0)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", type=picture)
    parser.add_argument("--step", type=int)
    parser.error = lambda message: fail(f"{message}. See plot_probe.py --help.")
    args = parser.parse_args()
    runs = runlog.named(args.runs)
    fig, grid = plt.subplots(3, 4, figsize=(17, 10.5))
    fig.subplots_adjust(left=0.04, right=0.99, bottom=0.1, top=0.97, wspace=0.2, hspace=0.35)
    weights, over_steps, over_layers, *others, logits, gradients, updates, updates_over_steps = axes = list(grid.flat)
    colors, seen, table = COLORS[False], [], []
    for i, (name, folder) in enumerate(runs):
        folder = Path(folder)
        variant = next((v for v in sorted(VARIANTS, key=len, reverse=True) if v in f"{name} {folder}"), None)
        color = colors[VARIANTS[variant]] if variant else colors[len(VARIANTS) + i % (len(colors) - len(VARIANTS))]
        look = {"color": color, "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.2,
                "linestyle": "--" if color in seen else "-"}
        seen.append(color)
        linears, inputs = {}, []
        rows = read(folder / "activations.csv", ("step", "layer", "tensor", "rms", "max"))
        steps = {r["step"] for r in rows}
        step = max(steps) if args.step is None else args.step
        if step not in steps:
            fail(f"{folder}: has no probe at step {step}, but at {', '.join(f'{s:.0f}' for s in sorted(steps))}.")
        for axis, (tensor, _) in zip(others, PANELS):
            here = [r for r in rows if r["step"] == step and r["tensor"] == tensor]
            axis.plot([r["layer"] for r in here], [r["max" if tensor == "attention_logit" else "rms"] for r in here],
                      label=f"{name}, step {step:.0f}", **look)
        most = {s: max((r["max"] for r in rows if (r["step"], r["tensor"]) == (s, "attention_logit")), default=math.nan)
                for s in sorted(steps)}
        logits.plot(most.keys(), most.values(), **look)
        linears = of_linears(folder / "weights.csv")
        if linears:  # older runs have no table, and no row is of step 0
            here = sorted((layer, gradient, update) for (s, layer), (gradient, update) in linears.items() if s == step)
            gradients.plot([x[0] for x in here], [x[1] for x in here], **look)
            updates.plot([x[0] for x in here], [x[2] for x in here], **look)
            shares = {s: max(x[1] for (other, _), x in linears.items() if other == s) for s, _ in sorted(linears)}
            updates_over_steps.plot(shares.keys(), shares.values(), **look)
        # without rows: a bf16 build, --probe-iterations 0, a run that came apart
        found = read(folder / "curvature.csv", ("step", "eigenvalue", "error"), optional=True)
        found = [r for r in found if r["eigenvalue"] > 0 <= r["error"] < math.inf]  # a log scale has no others
        if found:
            weights.errorbar([r["step"] for r in found], [r["eigenvalue"] for r in found],
                             [r["error"] for r in found], label=name, capsize=2, **look)
        inputs = read(folder / "curvature_inputs.csv", ("step", "layer", "eigenvalue"), optional=True)
        if inputs:
            inputs = [r for r in inputs if 0 < abs(r["eigenvalue"]) < math.inf]
            largest = [max((r for r in inputs if r["step"] == s), key=lambda r: abs(r["eigenvalue"]))
                       for s in sorted({r["step"] for r in inputs})]
            for axis, x, points in ((over_steps, "step", largest),
                                    (over_layers, "layer", [r for r in inputs if r["step"] == step])):
                axis.plot([r[x] for r in points], [abs(r["eigenvalue"]) for r in points], **look)
                below = [r for r in points if r["eigenvalue"] < 0]
                axis.plot([r[x] for r in below], [-r["eigenvalue"] for r in below],
                          **{**look, "linestyle": "none", "markerfacecolor": "white", "zorder": 3})
        table.append([name, *figures(rows, linears, inputs)])
    weights.set(title="Hessian over parameters, largest eigenvalue", xlabel="step", yscale="log")
    over_steps.set(title="Hessian over inputs of blocks, largest", xlabel="step", yscale="log")
    over_layers.set(title="Hessian over inputs of blocks (<0: hollow)", xlabel="layer", yscale="log")
    for axis, (_, title) in zip(others, PANELS):
        axis.set(title=title, xlabel="layer", ylim=(0, None))
    logits.set(title="largest attention logit of all blocks", xlabel="step", yscale="log")
    gradients.set(title="norm of the gradient of a block's linears", xlabel="layer", yscale="log")
    updates.set(title="update's share of a block's linears", xlabel="layer", yscale="log")
    updates_over_steps.set(title="update's share, largest of all blocks", xlabel="step", yscale="log")
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = others[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="lower center", ncols=min(4, len(runs)), frameon=False)
    save(fig, args.out or str(Path(runs[0][1]) / "probe.png"), 90)
    for row in [TABLE, ["---"] + ["--:"] * (len(TABLE) - 1), *table]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    runlog.run("plot_probe.py", main)
