#!/usr/bin/env python3
"""Draws the log of one or several runs: loss, validation, learning rate, gradient norm, tokens/s.

usage: plot.py RUN... [--out FILE.png] [--x step|tokens|time] [--log-x] [--panels LIST] [--paper 7B]
               [--baseline NAME=VALUE]... [--title TEXT] [--ylim LOW:HIGH] [--dark]

RUN is the folder of a run or NAME=FOLDER. Marks loss spikes and steps whose update was skipped. Without --out the
picture is loss.png in the first run's folder. A baseline is a horizontal line, for example the loss of another model on
the same validation data.
"""
import argparse
import math
import os
import sys
import textwrap

import runlog

os.environ["MPLBACKEND"] = "Agg"
try:
    import matplotlib
    import numpy as np
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as e:
    sys.exit(f"plot.py: {sys.executable}: {e}. Run dev/ci/setup.sh run, or use another Python.")

PANELS = {"loss": "loss (nats a token)", "val_loss": "validation loss (nats a token)", "lr": "learning rate",
          "grad_norm": "gradient norm before clipping", "tokens_per_s": "tokens/s"}
VARIANTS = {"simplegpt": 0, "prenorm": 1, "preqknorm": 2}  # place in COLORS
# The first three after Okabe and Ito; all differ by 9 (CIE76) or more to the colour-blind too. In grey print a run is
# known by its marker.
COLORS = {False: ["#0072b2", "#d55e00", "#009e73", "#970dff", "#1a1a1a", "#752f0d", "#d884b8", "#8c8c8c"],
          True: ["#56b4e9", "#ff8c42", "#3cd28c", "#c678ff", "#f2f2f2", "#b08968", "#ff9ed2", "#8a8a8a"]}
MARKERS = "osDvPXph"
THEMES = {  # ground, text, ticks and baselines, grid
    False: ("#ffffff", "#222222", "#555555", "#e6e6e6"), True: ("#0d1117", "#e6edf3", "#a0a8b2", "#272e38")}
# Training loss at the end of runs of so many steps (arXiv 2602.01212): each point is a run of its own.
PAPER = {"7B": {"steps": [20000, 40000, 60000],
                "prenorm": ("LLaMA2", [4.115, 2.345, 2.311]),
                "preqknorm": ("LLaMA2 with QK norm", [2.393, 2.320, 2.290]),
                "simplegpt": ("SimpleGPT", [2.331, 2.243, 2.208])}}
CAME_APART = 3.0  # a loss of the paper above this is no measure for an axis
VALIDATION = {"linewidth": 1.0, "linestyle": "--", "markersize": 5, "markeredgewidth": 1.4, "zorder": 3}
SPIKE = {"linestyle": "none", "marker": "^", "markersize": 6, "zorder": 4}
SKIPPED = {"linewidth": 1.0, "linestyle": (0, (1, 3)), "zorder": 1}
STAR = {"linestyle": "none", "marker": "*", "markersize": 11, "zorder": 5}


def fail(message):
    sys.exit(f"plot.py: {message}")


class Run:
    """The log of one run as arrays, its place on the x axis, and how it looks."""

    def __init__(self, name, folder, x):
        log = runlog.read(folder)
        self.name = shorten(name)
        self.note = np.array(log["note"])
        self.columns = {column: np.array(log[column], dtype=float) for column in runlog.COLUMNS}
        self.variant = runlog.config(folder).get("variant")
        words = {"qk": "preqknorm", "simple": "simplegpt", "prenorm": "prenorm", "llama": "prenorm"}
        if not self.variant:  # no checkpoint tells
            self.variant = next((variant for word, variant in words.items() if word in name.lower()), None)
        self.x = self["step"]
        if x != "step":
            tokens = runlog.tokens_per_step(folder)
            if not tokens:
                fail(f"{folder}: without a checkpoint nothing tells the tokens of a step. Use --x step.")
            seconds = np.nan_to_num(tokens / np.maximum(self["tokens_per_s"], 1e-9))
            self.x = tokens * self["step"] if x == "tokens" else np.cumsum(seconds)

    def __getitem__(self, column):
        return self.columns[column]


def shorten(name):
    return name if len(name) <= 40 else name[:19] + "…" + name[-20:]


def shade(color, share):
    """The colour itself at 0, lighter up to 1, darker down to -1."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    return matplotlib.colors.to_hex(rgb + (1 - rgb) * share if share > 0 else rgb * (1 + share))


def dress(runs, dark):
    """Gives each run its colour, by its variant if the runs differ in that, and its marker."""
    palette = COLORS[dark]
    one = len({run.variant for run in runs}) == 1
    for i, run in enumerate(runs):
        run.marker = MARKERS[i % len(MARKERS)]
        same = [other for other in runs if other.variant == run.variant]
        at, base = same.index(run), VARIANTS.get(run.variant, 0 if one else len(VARIANTS))
        if one:  # the variant's colour, then those of no variant
            order = [base, *range(len(VARIANTS), len(palette)), *(v for v in VARIANTS.values() if v != base)]
            run.color = palette[order[at % len(order)]]
        else:  # its colour, then in turn lighter and darker ones
            run.color = shade(palette[base], (0.6 if at % 2 else -0.5) * at / len(same))


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


def set_limits(axes, curves, values=(), log=False):
    """Room for the smoothed curves, the values and most of the raw points; a spike is cut off at the edge."""
    raw = np.concatenate(curves)
    raw = raw[np.isfinite(raw)]
    shown = np.concatenate([*map(smooth, curves), values, np.percentile(raw, [0.5, 99.0]) if len(raw) else []])
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return
    low, high = shown.min(), shown.max()
    if log and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.05 * (high - low) or 0.1 * abs(low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def spread(values, gap):
    """Places for labels that want to stand at the values: in their order, at least a gap apart."""
    places, order = np.array(values, dtype=float), np.argsort(values, kind="stable")
    for before, after in zip(order, order[1:]):
        places[after] = max(places[after], places[before] + gap)
    return places


def draw_curves(axes, column, runs, validation, log_x):
    """One panel's curves; validation: as points in the panel of the loss."""
    validation = column == "val_loss" or (validation and column == "loss")
    for run in runs:
        points = np.isfinite(run["val_loss"])
        if validation and points.any():
            every = math.ceil(points.sum() / 16)  # a marker, from the last one
            axes.plot(run.x[points], run["val_loss"][points], color=run.color, marker=run.marker,
                      markevery=((points.sum() - 1) % every, every), markerfacecolor=axes.get_facecolor(), **VALIDATION)
        if column != "val_loss":
            curve = run[column]
            if column != "lr":
                axes.plot(run.x, curve, color=run.color, alpha=0.25 if len(runs) == 1 else 0.15, linewidth=0.8)
                curve = smooth(curve)
            axes.plot(run.x, curve, color=run.color, linewidth=1.8)
            axes.plot(run.x[-1:], curve[-1:], color=run.color, marker=run.marker, markersize=5, zorder=3)
    # runs are compared behind the fall from their first loss, which leaves the picture at the top
    begin = 0 if len(runs) == 1 or column != "loss" or log_x else 0.05 * max(run["step"][-1] for run in runs)
    curves = [run[column][run["step"] >= min(begin, run["step"][-1])] for run in runs]
    points = np.concatenate([run["val_loss"] for run in runs]) if validation else []
    set_limits(axes, curves, points, log=column == "grad_norm")


def mark_notes(axes, runs):
    """Spikes at their loss, or at the edge that cuts them off; skipped steps as lines."""
    low, high = axes.get_ylim()
    for run in runs:
        spikes = run.note == "spike"
        if spikes.any():
            at = np.clip(run["loss"][spikes], low, high - 0.015 * (high - low))
            axes.plot(run.x[spikes], at, color=run.color, **SPIKE)
        for x in run.x[run.note == "skipped"]:
            axes.axvline(x, color=run.color, **SKIPPED)


def draw_baselines(axes, baselines, grey):
    """Horizontal lines, named in the margin one above the other."""
    values = [value for _, value in baselines]
    for (name, value), place in zip(baselines, spread(values, 0.05 * np.ptp(axes.get_ylim()))):
        axes.axhline(value, color=grey, linewidth=1.2, linestyle=":")
        axes.annotate(f"{shorten(name)} {value:.3f}", (1, place), xycoords=("axes fraction", "data"), xytext=(4, 0),
                      textcoords="offset points", va="center", color=grey, fontsize=9)


def draw_paper(axes, size, palette):
    """The paper's points with their values; what is above the axis is told at its edge. Returns the legend's part."""
    paper, (low, high) = PAPER[size], axes.get_ylim()
    text = {"textcoords": "offset points", "va": "center", "fontsize": 9, "zorder": 6,
            "bbox": {"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.5}}
    for i, step in enumerate(paper["steps"]):
        at = {variant: paper[variant][1][i] for variant in VARIANTS}
        inside = [variant for variant in VARIANTS if low <= at[variant] <= high]
        places = dict(zip(inside, spread([at[variant] for variant in inside], 0.05 * (high - low))))
        for variant, value in at.items():
            color = palette[VARIANTS[variant]]
            axes.plot(step, value, color=color, markeredgecolor=axes.get_facecolor(), **STAR)
            if variant in inside:
                axes.annotate(f"{value:.3f}", (step, places[variant]), xytext=(9, 0), color=color, **text)
            elif value > high:
                axes.annotate(f"{paper[variant][0]} {value:.3f}", (step, high), xytext=(0, -30), ha="center",
                              color=color, arrowprops={"arrowstyle": "->", "color": color}, **text)
    axes.set_xlim(right=max(axes.get_xlim()[1], 1.1 * paper["steps"][-1]))
    return [Line2D([], [], color=palette[VARIANTS[v]], label=f"the paper's {paper[v][0]} {size}, ends of runs", **STAR)
            for v in VARIANTS]


def limit_loss(axes, runs, options):
    """The range of the loss that is shown: that of the curves, the baselines and the paper, or what was asked for."""
    low, high = axes.get_ylim()
    losses = []
    if options.paper:
        losses = [loss for v in VARIANTS for loss in PAPER[options.paper][v][1] if loss < CAME_APART]
        curves = [smooth(run["loss"]) for run in runs]
        ends = [curve[-1] for curve in curves if curve[-1] < CAME_APART]
        if ends:  # there is something to compare: the fall from the first loss leaves the picture at the top
            least, most = min(*losses, np.nanmin(np.concatenate(curves))), max(*losses, *ends)
            low, high = least - 0.15 * (most - least), most + 0.8 * (most - least)
    margin = 0.05 * (high - low)
    for value in losses + [value for _, value in options.baseline]:
        low, high = min(low, value - margin), max(high, value + margin)
    axes.set_ylim(options.ylim or (low, high))


def legend_of(axes, runs, validation, marks, grey):
    """A line of text for each run, then what the marks mean."""
    handles = []
    for run in runs:
        label = f"{run.name}: training {smooth(run['loss'])[-1]:.3f}"
        points = run["val_loss"][np.isfinite(run["val_loss"])]
        if len(points):
            label += f", validation {points[-1]:.3f}"
        handles.append(Line2D([], [], color=run.color, marker=run.marker, markersize=5, linewidth=1.8, label=label))
    if validation and any(np.isfinite(run["val_loss"]).any() for run in runs):
        handles.append(Line2D([], [], color=grey, marker=MARKERS[0], markerfacecolor=axes.get_facecolor(),
                              label="validation", **VALIDATION))
    notes = {note for run in runs for note in run.note if marks}
    if "spike" in notes:
        handles.append(Line2D([], [], color=grey, label="spike", **SPIKE))
    if "skipped" in notes:
        handles.append(Line2D([], [], color=grey, label="update skipped", **SKIPPED))
    return handles


def set_x(runs, kind):
    """The name of the x axis; time gets the unit that suits the longest run."""
    if kind != "time":
        return kind
    longest = max(run.x[-1] for run in runs)
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, seconds in units.items() if longest > 2 * seconds), "seconds")
    for run in runs:
        run.x = run.x / units[unit]
    return f"{unit} of training (validation and checkpoints not counted)"


def draw(runs, options):
    """The picture: the first panel large, the others in rows beneath it."""
    ground, ink, grey, lines = THEMES[options.dark]
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "figure.facecolor": ground, "axes.facecolor": ground, "text.color": ink,
                         "axes.labelcolor": ink, "axes.edgecolor": grey, "xtick.color": grey, "ytick.color": grey,
                         "axes.grid": True, "grid.color": lines, "axes.axisbelow": True,
                         "text.parse_math": False})  # a run may be called $1
    dress(runs, options.dark)
    x_name = set_x(runs, options.x)
    small = options.panels[1:]
    rows = math.ceil(len(small) / 3)
    across = math.ceil(len(small) / rows) if small else 1
    figure = plt.figure(figsize=(9, 4.4 + 2.0 * rows), constrained_layout={"w_pad": 0.08, "h_pad": 0.08})
    grid = figure.add_gridspec(1 + rows, across, height_ratios=[2.4] + [1] * rows)
    first = figure.add_subplot(grid[0, :])
    axes = [first] + [figure.add_subplot(grid[1 + i // across, i % across]) for i in range(len(small))]

    plain = FuncFormatter(lambda value, _: f"{value:.4g}")
    validation = "val_loss" not in options.panels
    for panel, column in zip(axes, options.panels):
        if options.log_x:
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.xaxis.set_major_locator(MaxNLocator(6 if panel is first else 4, steps=[1, 2, 2.5, 5, 10],
                                                      integer=options.x == "step", min_n_ticks=1))
        draw_curves(panel, column, runs, validation, options.log_x)
        panel.xaxis.set_major_formatter(plain if options.x == "time" else EngFormatter(sep=""))
        panel.yaxis.set_major_formatter(EngFormatter(sep="") if column == "tokens_per_s" else plain)
        panel.set_xlabel(x_name if panel is first else x_name.split(" (")[0])
        if panel is first:
            panel.set_ylabel(PANELS[column])
        else:
            panel.set_title(PANELS[column], loc="left")
    handles = legend_of(first, runs, validation and "loss" in options.panels, "loss" in options.panels, grey)
    if "loss" in options.panels:
        loss = axes[options.panels.index("loss")]
        limit_loss(loss, runs, options)
        if options.paper:
            handles += draw_paper(loss, options.paper, COLORS[options.dark])
        draw_baselines(loss, options.baseline, grey)
        mark_notes(loss, runs)
        for panel in axes:
            panel.set_xlim(loss.get_xlim())
    # the legend is above the curves, where it hides nothing
    columns = max(1, int(8.2 / (0.6 + 0.064 * max(len(h.get_label()) for h in handles))))
    first.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncol=columns, frameon=False, fontsize=9)
    if options.title:
        figure.suptitle(textwrap.fill(options.title, 80), fontsize=12)
    return figure


def baseline(text):
    name, _, value = text.rpartition("=")
    try:
        if name.strip() and math.isfinite(float(value)):
            return name.strip(), float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE. Give a name and a loss, as llama=3.21")


def limits(text):
    try:
        low, high = map(float, text.split(":"))
        if -math.inf < low < high < math.inf:
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is not LOW:HIGH. Give two losses, as 2.2:3")


def picture(text):
    if os.path.splitext(text)[1] in (".png", ".svg", ".pdf"):
        return text
    raise argparse.ArgumentTypeError(f"'{text}' is no .png, .svg or .pdf. Give it such a name")


def panels(text):
    names = text.split(",")
    if len(set(names)) == len(names) and set(names) <= set(PANELS):
        return names
    raise argparse.ArgumentTypeError(f"'{text}' is not a list of {', '.join(PANELS)}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run (it holds log.csv), or NAME=FOLDER")
    parser.add_argument("--out", metavar="FILE", type=picture,
                        help="a .png, .svg or .pdf (loss.png in the first run's folder)")
    parser.add_argument("--title", metavar="TEXT", default="", help="a heading (none)")
    parser.add_argument("--x", choices=["step", "tokens", "time"], default="step",
                        help="the x axis; tokens and time need a checkpoint of the run (step)")
    parser.add_argument("--log-x", action="store_true", help="a logarithmic x axis")
    parser.add_argument("--panels", metavar="LIST", type=panels, default=["loss", "lr", "grad_norm", "tokens_per_s"],
                        help=f"of {', '.join(PANELS)}, the first one large (loss,lr,grad_norm,tokens_per_s; "
                        "validation is then drawn with the loss)")
    parser.add_argument("--ylim", metavar="LOW:HIGH", type=limits, help="the range of the loss that is shown")
    parser.add_argument("--baseline", metavar="NAME=VALUE", type=baseline, action="append", default=[],
                        help="a horizontal line at a loss, as llama=3.21; may be given again")
    parser.add_argument("--paper", choices=sorted(PAPER), help="add the losses that the paper reports of this size")
    parser.add_argument("--dark", action="store_true", help="light on dark")
    parser.error = lambda message: fail(f"{message}. See plot.py --help.")
    options = parser.parse_args(arguments)
    if "loss" not in options.panels and (options.paper or options.baseline or options.ylim):
        fail("--paper, --baseline and --ylim are about the loss. Add it to --panels.")
    if options.paper and options.x != "step":
        fail("--paper: its points are at numbers of steps. Leave --x away.")
    return options


def save(figure, out, dpi):
    """The picture appears whole or not at all."""
    part = out + ".part"
    if os.path.exists(out) and not os.path.isfile(out):
        raise runlog.LogError(f"{out}: is a folder, a pipe or a device. Give a file.")
    try:
        figure.savefig(part, dpi=dpi, format=os.path.splitext(out)[1][1:])
        os.replace(part, out)
    except OSError as e:
        raise runlog.LogError(f"{out}: cannot be written: {e.strerror}. Choose another --out.") from None
    finally:
        if os.path.exists(part):
            os.remove(part)
    print(out)


def main():
    options = parse(None)
    runs = [Run(name, folder, options.x) for name, folder in runlog.named(options.runs)]
    save(draw(runs, options), options.out or os.path.join(runlog.named(options.runs)[0][1], "loss.png"), 150)


if __name__ == "__main__":
    runlog.run("plot.py", main)
