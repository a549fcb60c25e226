#!/usr/bin/python3
"""Draws the log of one or several runs: loss, validation, learning rate, gradient norm, tokens/s.

usage: plot.py RUN_DIR... [--out FILE.png] [--title TEXT] [--baseline NAME=VALUE]...

Reads RUN_DIR/log.csv; marks loss spikes and steps whose update was skipped. Without --out the picture is
RUN_DIR/loss.png of the first run. A baseline is a horizontal line, for example the loss of another model on the same
validation data.
"""
import argparse
import csv
import math
import os
import sys
import textwrap

try:
    import matplotlib
    import numpy as np
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
except ImportError as e:
    sys.exit(f"plot.py: {sys.executable}: {e}. Run dev/setup.sh run, or use another Python.")

COLUMNS = ["step", "loss", "lr", "grad_norm", "tokens_per_s", "val_loss"]
NOTES = {"": 0, "spike": 1, "skipped": 2}  # the column note
COLORS = ["#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#d98200", "#1aa6a6", "#7a5230", "#d65fa6"]
GREY = "#555555"
VALIDATION = {"linewidth": 1.0, "linestyle": "--", "marker": "o", "markersize": 5, "markerfacecolor": "white",
              "markeredgewidth": 1.5, "zorder": 3}
SPIKE = {"linestyle": "none", "marker": "^", "markersize": 6, "zorder": 4}


def fail(message):
    sys.exit(f"plot.py: {message}")


def read_log(path):
    """Column name -> array, one value a step; an empty field is NaN, a note its number."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        fail(f"{path}: cannot be read: {reason}. Give the folder of a run (--out of train_gpt).")
    lines = text.splitlines()
    header = next(csv.reader(lines[:1]), [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        fail(f"{path}: has no column {', '.join(missing)}. Give the log.csv of a run.")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            fields = next(csv.reader([line]), [])
            if len(fields) != len(header):
                raise ValueError
            row = [float(NOTES[value]) if name == "note" else float(value) if value else math.nan
                   for name, value in zip(header, fields)]
            if not math.isfinite(row[header.index("step")]):
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, csv.Error):
            if number < len(lines):  # the last row may be half-written: the run goes on
                fail(f"{path}: line {number} is not {len(header)} numbers. Delete it, or give another run.")
    if text and not text.endswith("\n") and len(lines) - 1 == len(rows):
        rows.pop()  # a number of it may be cut short
    if not rows:
        fail(f"{path}: has no rows yet. Wait for the first step.")
    log = dict(zip(header, np.array(rows).T))
    order = np.argsort(log["step"], kind="stable")
    return {name: values[order] for name, values in log.items()}


def shorten(name):
    return name if len(name) <= 40 else name[:19] + "…" + name[-20:]


def smooth(values):
    """Mean over the 2% of the steps around each, over fewer where the curve begins and falls fast; NaN is left out."""
    i = np.arange(len(values))
    half = np.minimum(len(values) // 100, i // 4)
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    low, high = i - half, np.minimum(i + half + 1, len(values))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)


def set_limits(axes, curves, values=()):
    """Room for the smoothed curves, the values and most of the raw points; a spike is cut off at the edge."""
    raw = np.concatenate(curves)
    raw = raw[np.isfinite(raw)]
    shown = np.concatenate([*map(smooth, curves), values, np.percentile(raw, [0.5, 99.0]) if len(raw) else []])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        margin = 0.05 * np.ptp(shown) or 0.1 * abs(shown[0]) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)


def draw(names, logs, baselines, title, out):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
                         "axes.labelcolor": "#222222", "xtick.color": GREY, "ytick.color": GREY, "axes.grid": True,
                         "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.titlesize": 10,
                         "text.parse_math": False})  # a run may be called $1
    figure = plt.figure(figsize=(11, 7.5), constrained_layout={"w_pad": 0.1, "h_pad": 0.1})
    grid = figure.add_gridspec(2, 3, height_ratios=[2.6, 1])
    main = figure.add_subplot(grid[0, :])
    panels = [figure.add_subplot(grid[1, i], sharex=main) for i in range(3)]
    main.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))  # of the panels too
    main.xaxis.set_major_formatter(EngFormatter(sep=""))

    for i, (name, log) in enumerate(zip(names, logs)):
        color, step = COLORS[i % len(COLORS)], log["step"]

        label = f"{shorten(name)}: training {smooth(log['loss'])[-1]:.3f}"
        val = np.isfinite(log["val_loss"])
        if val.any():
            label += f", validation {log['val_loss'][val][-1]:.3f}"
            main.plot(step[val], log["val_loss"][val], color=color, **VALIDATION)
        spikes, skipped = (step[log["note"] == NOTES[n]] if "note" in log else [] for n in ("spike", "skipped"))
        if len(spikes):
            main.plot(spikes, log["loss"][np.isin(step, spikes)], color=color, **SPIKE)
        for x in skipped:
            main.axvline(x, color=color, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
        for axes, column in zip([main, *panels], ["loss", "lr", "grad_norm", "tokens_per_s"]):
            axes.plot(step, log[column], color=color, alpha=0.25, linewidth=0.8)
            axes.plot(step, log["lr"] if column == "lr" else smooth(log[column]), color=color, linewidth=1.8,
                      label=label, marker="o" if len(step) == 1 else None)  # a line of one point cannot be seen

    values = np.concatenate([[value for _, value in baselines], *(log["val_loss"] for log in logs)])
    set_limits(main, [log["loss"] for log in logs], values)
    place = -math.inf
    for name, value in sorted(baselines, key=lambda b: b[1]):
        place = max(value, place + 0.04 * np.ptp(main.get_ylim()))  # labels in the margin, one above the other
        main.axhline(value, color=GREY, linewidth=1.2, linestyle=":")
        main.annotate(f"{shorten(name)} {value:.3f}", (1, place), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", color=GREY, fontsize=9)
    main.set_ylabel("loss (nats a token)")
    main.set_xlabel("step")
    figure.suptitle(textwrap.fill(title, 90), fontsize=13)
    # the legend is above the curves, where it hides nothing
    handles, labels = main.get_legend_handles_labels()
    if np.isfinite(values[len(baselines):]).any():
        handles, labels = [*handles, Line2D([], [], color=GREY, **VALIDATION)], [*labels, "validation"]
    noted = {note: any((log.get("note", np.zeros(1)) == NOTES[note]).any() for log in logs) for note in NOTES}
    if noted["spike"]:
        handles, labels = [*handles, Line2D([], [], color=GREY, **SPIKE)], [*labels, "spike"]
    if noted["skipped"]:
        handles, labels = [*handles, Line2D([], [], color=GREY, linestyle=(0, (1, 3)))], [*labels, "update skipped"]
    columns = max(1, int(10 / (0.6 + 0.075 * max(map(len, labels)))))  # inches
    main.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncol=columns, frameon=False, fontsize=9)

    for axes, heading in zip(panels, ["learning rate", "gradient norm before clipping", "tokens/s"]):
        axes.set_title(heading, loc="left")
        axes.set_xlabel("step")
    set_limits(panels[1], [log["grad_norm"] for log in logs])
    set_limits(panels[2], [log["tokens_per_s"] for log in logs])
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    panels[2].yaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(out, dpi=130, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the folder of a run, which holds log.csv")
    parser.add_argument("--out", metavar="FILE.png", help="the picture (loss.png in the first run's folder)")
    parser.add_argument("--title", metavar="TEXT", help="the heading (the run's name)")
    parser.add_argument("--baseline", metavar="NAME=VALUE", action="append", default=[],
                        help="a horizontal line at a loss; may be given again")
    parser.error = lambda message: fail(f"{message}. See plot.py --help.")
    options = parser.parse_args()
    baselines = []
    for text in options.baseline:
        name, _, value = text.rpartition("=")
        try:
            baselines.append((name.strip(), float(value)))
            if not baselines[-1][0] or not math.isfinite(baselines[-1][1]):
                raise ValueError
        except ValueError:
            fail(f"--baseline: '{text}' is not NAME=VALUE. Give a name and a loss, as llama=3.21.")
    logs = [read_log(os.path.join(run, "log.csv")) for run in options.runs]
    names = [os.path.basename(os.path.abspath(run)) for run in options.runs]
    if len(set(names)) < len(names):
        names = options.runs
    out = options.out or os.path.join(options.runs[0], "loss.png")
    part = out + ".part"
    try:
        draw(names, logs, baselines, options.title or (names[0] if len(names) == 1 else ""), part)
        os.replace(part, out)
    except OSError as e:
        if os.path.exists(part):
            os.remove(part)
        fail(f"{out}: cannot be written: {e.strerror}. Choose another --out.")
    print(out)


if __name__ == "__main__":
    main()
