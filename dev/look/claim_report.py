"""What claim.py's runs come to: numbers, tables, the picture, in RUNS/claim.md and the project's pages.

The numbers are of one variant's `runs`, {rate: {seed: Result}}, or one model's `table`, {variant: runs}.
"""
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import runlog

VARIANTS = {"simplegpt": "SimpleGPT", "preqknorm": "pre-norm + QK norm", "prenorm": "pre-norm"}
SENSITIVE = 0.3                          # the end of the range of arXiv 2309.14322, which begins at 3e-4
MULTIPLES = [1, 3, 10, 30, 100]
LADDERS = {"sizes": ["size-0.25M", "main", "size-3.7M", "size-10M"],
           "depths": ["depth-4", "main", "depth-16", "depth-32"]}
PLACE = "<!-- claim.sh, {}: begin -->\n", "<!-- claim.sh, {}: end -->\n"  # in a page, for the runs of a folder's name


class Refused(runlog.LogError):
    pass


# ---------------------------------------------------------------------------------------------------------------------
# What results say

def losses(runs, rate):
    return [r.capped for r in runs[rate].values()]


def mean(runs, rate):
    return statistics.fmean(losses(runs, rate))


def spread(runs, rate):
    """Largest minus smallest loss over the seeds; None of one seed."""
    found = losses(runs, rate)
    return max(found) - min(found) if len(found) > 1 else None


def is_lost(runs, rate):
    return any(r.lost_at is not None or not math.isfinite(r.loss) for r in runs[rate].values())


def ranking(runs):
    """Rates, the one with the lowest mean first, those at which a seed was lost last."""
    return sorted(runs, key=lambda rate: (is_lost(runs, rate), mean(runs, rate), rate))


def best(runs):
    return ranking(runs)[0]


def as_good(runs):
    """Rates whose mean is within a spread of the best's, its own included: the seeds do not tell them apart."""
    top = best(runs)
    return sorted(rate for rate in runs if rate == top or not is_lost(runs, rate) and
                  not is_claim(mean(runs, rate) - mean(runs, top), spread(runs, rate), spread(runs, top), one=True))


def is_claim(difference, *spreads, one=False):
    """Is a difference larger than the spreads? None is that of one seed: no claim, or with `one` left out if it may."""
    if one:
        spreads = [s for s in spreads if s is not None] or [0.0]
    return None not in spreads and abs(difference) > max(spreads)


def nearest(rates, wanted):
    """The rate that is wanted up to a fifth: of 3e-4 and 1e-3, three times the first is the second."""
    found = min(rates, key=lambda rate: abs(math.log(rate / wanted)), default=None)
    return found if found and abs(math.log(found / wanted)) < math.log(1.2) else None


def sensitivity(runs, rates):
    """Mean over the rates of min(loss, loss at the start), less the lowest loss there (arXiv 2309.14322)."""
    means = [mean(runs, rate) for rate in rates]
    return statistics.fmean(means) - min(means) if means else math.nan


def at_step(curve, step):
    """The validation loss at a step, on the line between the two beside it; None outside."""
    before = max((s for s in curve if s <= step), default=None)
    after = min((s for s in curve if s >= step), default=None)
    if before is None or after is None:
        return None
    share = (step - before) / (after - before) if after > before else 0.0
    return curve[before] + share * (curve[after] - curve[before])


def mean_curve(results):
    """Mean validation losses, at the steps that all of them have."""
    results = list(results)
    common = set(results[0].curve).intersection(*(r.curve for r in results))
    return {s: statistics.fmean(r.curve[s] for r in results) for s in sorted(common)}


def largest_stable(runs, total):
    """The largest rate at which no seed is lost or ends above what the best rate has after a quarter of the steps."""
    bound = at_step(mean_curve(runs[best(runs)].values()), total / 4)
    good = [rate for rate in runs if not is_lost(runs, rate) and (bound is None or max(losses(runs, rate)) <= bound)]
    return max(good, default=None)


def step_of(curve, target):
    """The first step at which a curve is at or below the target, on the line from the one before; None if never."""
    before = None
    for step in sorted(curve):
        if curve[step] <= target:
            if before is None:
                return float(step)
            return before + (step - before) * (curve[before] - target) / (curve[before] - curve[step])
        before = step
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The report

def number(runs, rate):
    """A cell: mean, half the spread over seeds; a rate at which a seed was lost in italics, with the step."""
    if rate is None or rate not in runs:
        return ""
    half = spread(runs, rate)
    text = f"{mean(runs, rate):.3f}" + (f" ± {half / 2:.3f}" if half is not None else "")
    if is_lost(runs, rate):
        steps = [r.lost_at for r in runs[rate].values() if r.lost_at is not None]
        text = f"*lost: {text}{f' at {min(steps)}' if steps else ''}*"
    return text


def rows(head, body):
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def compared(a, b):
    """The difference of two variants' best losses, and whether the seeds' spread leaves a claim of it."""
    x, y = best(a), best(b)
    difference = mean(a, x) - mean(b, y)
    claim = is_claim(difference, spread(a, x), spread(b, y))
    return f"{difference:+.3f}" + ("" if claim else " (no claim)")


def span(rates):
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"


def main_tables(o, table):
    """The main table, {variant: {rate: {seed: Result}}}: losses; what can be claimed; the rest."""
    here = [v for v in VARIANTS if v in table]
    rates = sorted({rate for v in here for rate in table[v]})
    common = [rate for rate in rates if all(rate in table[v] for v in here)]
    ranges = [common, [rate for rate in common if rate <= SENSITIVE]]
    ranges = ranges[:1] if ranges[0] == ranges[1] else ranges
    by_rate = "Loss at the end by peak rate:\n\n"
    by_rate += rows(["", *(f"{rate:g}" for rate in rates)],
                    [[VARIANTS[v], *(number(table[v], rate) for rate in rates)] for v in here])
    target = mean(table["prenorm"], best(table["prenorm"])) if "prenorm" in here else None
    body = []
    for v in here:
        runs = table[v]
        top, stable = best(runs), largest_stable(runs, o.steps)
        seeds = len(runs[top])
        reached = None
        if target is not None:
            reached = o.steps if v == "prenorm" else step_of(mean_curve(runs[top].values()), target)
        body.append([
            VARIANTS[v], f"{number(runs, top)} ({seeds} seed{'s' * (seeds > 1)})", f"{top:g}", span(as_good(runs)),
            "none" if stable is None else ("at least " if stable == max(runs) else "") + f"{stable:g}",
            *(f"{sensitivity(runs, over):.3f}" for over in ranges),
            "never" if reached is None else f"{reached * o.tokens / 1e6:.2f}M"])
    text = "\n" + rows(["", "best loss", "at rate", "as good", "largest stable rate",
                         *(f"sensitivity, {span(over) if over else 'no rates'}" for over in ranges),
                         "tokens to pre-norm's loss"], body)
    text += "\nLoss at multiples of each variant's own best rate:\n\n"
    head = ["", *(f"x {n}" for n in MULTIPLES)]
    text += rows(head, [[VARIANTS[v], *(number(table[v], nearest(table[v], n * best(table[v]))) for n in MULTIPLES)]
                        for v in here])
    if "prenorm" in here:
        base = best(table["prenorm"])
        text += f"\nLoss at multiples of pre-norm's best rate, {base:g}:\n\n"
        text += rows(head, [[VARIANTS[v], *(number(table[v], nearest(table[v], n * base)) for n in MULTIPLES)]
                            for v in here])
    claims, pairs = "", [(a, b) for i, a in enumerate(here) for b in here[i + 1:]]
    if pairs:
        claims = "\nWhat of it can be claimed:\n\n"
        body = []
        for a, b in pairs:
            mine, other = as_good(table[a]), as_good(table[b])
            seeds = None not in (spread(table[a], best(table[a])), spread(table[b], best(table[b])))
            apart = seeds and (mine[-1] < other[0] or other[-1] < mine[0])
            factor = best(table[a]) / best(table[b])
            stables = [largest_stable(table[v], o.steps) for v in (a, b)]
            body.append([f"{VARIANTS[a]} against {VARIANTS[b]}", compared(table[a], table[b]),
                         f"{factor:.2g}" + ("" if apart else " (no claim)"),
                         f"{stables[0] / stables[1]:.2g}" if None not in stables else ""])
        claims += rows(["", "best loss, difference", "best rate, factor", "largest stable rate, factor"], body)
    return by_rate, claims, text


def definitions(o):
    above = (f"  after half of the steps above {o.lost_above:.3f}, a bigram model's loss and 0.5, not having fallen "
             "by 0.05 in an eighth; or\n" if math.isfinite(o.lost_above) else "")
    return f"""
- Loss: at the end, on validation data, nats a byte: mean over seeds ± half of the spread, which is the largest less
  the smallest. Without ± there is one seed. `no claim`: the difference is not larger than the larger of both spreads,
  or one of them is of one seed.
- Lost: the mean training loss of a fortieth of the steps is, after the warm-up, not below that at the start, or for an
  eighth of the steps more than 0.5 above its lowest; or
{above}  10 steps were not finite. The run is ended there; it counts with that mean, at most with the loss at the start.
- As good: rates whose loss is no further from the best than the larger of both spreads. A factor of best rates is no
  claim where these ranges meet. The rates are a factor of 3 apart, so a smaller one cannot be seen.
- Largest stable rate: the largest at which no seed is lost or ends above what the variant's best rate has after a
  quarter of the steps.
- Sensitivity: that of Wortsman et al. (arXiv 2309.14322), the mean over the rates of min(loss, loss at the start) less
  the lowest loss; over the rates that every variant has, and over those up to {SENSITIVE:g}, where that paper's end.
- Tokens to pre-norm's loss: where the mean validation curve of the variant's best rate first has the loss with which
  pre-norm's best rate ends, on the line between two validations.
- For comparison: arXiv 2602.01212 reports rates 3 to 10 times larger for SimpleGPT, at 1B to 8B; arXiv 2410.16682, with
  norms behind QKV, projection and FC2 at 830M, 1.5 times larger.
"""


def ladder_table(o, experiment, name):
    body = []
    for group in LADDERS[name]:
        table = experiment.table[group]
        if not all(v in table for v in VARIANTS):
            continue
        dim, layers, _ = o.shape(group)
        cells = [f"{number(table[v], best(table[v]))} at {best(table[v]):g} of {len(table[v])}" for v in VARIANTS]
        body.append([f"dim {dim}, {layers} layers", *cells, compared(table["simplegpt"], table["preqknorm"]),
                     compared(table["simplegpt"], table["prenorm"])])
    if not [g for g in LADDERS[name] if g != "main" and experiment.table[g]] or not body:
        return ""
    return (f"\nThe ladder of {name}, each at the best `of` so many rates, the main table's best and those beside it:"
            "\n\n" + rows(["", *VARIANTS.values(), "SimpleGPT less QK norm", "SimpleGPT less pre-norm"], body))


def why(o, experiment):
    """The probe's table and picture, by plot_probe.py."""
    runs = [(v, rate) for v in VARIANTS for rate in sorted(experiment.table["why"].get(v, {}))]
    if not runs:
        return ""
    named = [f"{VARIANTS[v]}, {rate:g}={experiment.folder('why', v, rate, 1)}" for v, rate in runs]
    done = subprocess.run([sys.executable, Path(__file__).with_name("plot_probe.py"), *named, "--out",
                           o.runs / "why.png"], capture_output=True, text=True)
    if done.returncode:
        print(f"claim: no table of --why: {done.stderr.strip()}", file=sys.stderr)
        return ""
    print(o.runs / "why.png")
    table = "".join(line for line in done.stdout.splitlines(True) if line.startswith("|"))
    return ("\nWhy: what `--probe` measured at a small and at a large rate, the largest of all blocks and probed "
            f"steps:\n\n{table}\n![what --probe measured](why.png)\n")


def write(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
    print(path)


def report(o, experiment):
    table = experiment.table["main"]
    ladders = "".join(ladder_table(o, experiment, name) for name in LADDERS)
    reasons = why(o, experiment)
    if not table and not ladders and not reasons:
        raise Refused(f"{o.runs}: no run of a table has finished. Run dev/recipes/claim.sh.")
    dim, layers, heads = o.shape("main")
    short = rest = ""
    if table:
        by_rate, claims, rest = main_tables(o, table)
        short = (f"{experiment.count('main')} runs: dim {dim}, {layers} layers, {heads} heads, {o.tokens} tokens a "
                 f"step, {o.steps} steps, of them {o.warmup} of warm-up; {experiment.spent() / 3600:.1f} hours of a "
                 f"core in all ({', '.join(sorted(experiment.machines))}).\n\n{by_rate}{claims}")
    picture = draw(o, experiment) if table else None
    shown = "![loss against the peak learning rate](claim.png)\n\n" if picture else ""
    tables, notes = shown + short + rest + ladders, definitions(o)
    write(o.runs / "claim.md", tables + notes + reasons)
    if o.doc:
        into_pages(o, (tables, notes, reasons), shown + short,
                   [p for p in (picture, reasons and o.runs / "why.png") if p])


def into_pages(o, text, short, pictures):
    """The report into dev/doc/results.md, its beginning into README.md, where they have a place for it. The definitions
    are left out if they stand beside another experiment's tables."""
    name, doc = o.runs.resolve().name, o.doc / "dev/doc"
    begin, end = (mark.format(name) for mark in PLACE)
    for page, folder, whole in ((doc / "results.md", "", True), (o.doc / "README.md", "dev/doc/", False)):
        before, found, rest = page.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            tables, notes, reasons = text
            known = notes.splitlines()[1] in before + after
            what = tables + ("" if known else notes) + reasons if whole else short
            write(page, before + begin + re.sub(r"\]\((\w+\.png)\)", rf"]({folder}{name}-\1)", what) + end + after)
        elif page.parent == doc:
            raise Refused(f"{page}: has no place for the table. Put {begin.strip()} and {end.strip()} there.")
    for picture in pictures:
        shutil.copyfile(picture, doc / f"{name}-{picture.name}")


def draw(o, experiment):
    """The picture's path; None without matplotlib."""
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import matplotlib
    except ImportError:
        print("claim: no picture, as the package matplotlib is missing. pip install matplotlib.", file=sys.stderr)
        return None
    import plot
    plt = plot.plt
    table = experiment.table["main"]
    ladders = [name for name in LADDERS if ladder_table(o, experiment, name)]
    fig, axes = plt.subplots(1, 1 + len(ladders), figsize=(7.5 + 4 * len(ladders), 4.5), layout="constrained",
                             squeeze=False, width_ratios=[1.6] + [1] * len(ladders))
    first = axes[0][0]
    colours = {v: plot.COLORS[False][place] for v, place in plot.VARIANTS.items()}
    means = [mean(runs, rate) for runs in table.values() for rate in runs]
    shown = [mean(runs, rate) for runs in table.values() for rate in runs if not is_lost(runs, rate)]
    low, most = min(means), max(shown or means)
    top = most + 0.1 * (most - low) + 0.02
    for v in [v for v in VARIANTS if v in table]:
        runs, rates = table[v], sorted(table[v])
        look = {"color": colours[v]}
        first.plot(rates, [min(mean(runs, r), top) for r in rates], linewidth=1.6, label=VARIANTS[v], **look)
        first.fill_between(rates, [min(*losses(runs, r), top) for r in rates],
                           [min(max(losses(runs, r)), top) for r in rates], alpha=0.2, linewidth=0, **look)
        for r in rates:
            for result in runs[r].values():
                gone = is_lost({r: {0: result}}, r)
                mark = "x" if gone else "^" if result.capped > top else "o"
                first.plot(r, min(result.capped, top), mark, markersize=5, clip_on=False, **look)
        first.plot(best(runs), mean(runs, best(runs)), "o", markersize=10, markerfacecolor="none", **look)
    first.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss at the end, nats a byte",
              ylim=(low - 0.05 * (top - low), top))
    first.set_title("a point a run, a band from the lowest seed to the highest, a ring at the best;\n"
                    "x: lost, perhaps above the picture; ^: above it", fontsize=9)
    first.legend(frameon=False)
    for axis, name in zip(axes[0][1:], ladders):
        place = 0 if name == "sizes" else 1
        for v in ("preqknorm", "prenorm"):
            groups = [g for g in LADDERS[name] if v in experiment.table[g] and "simplegpt" in experiment.table[g]]
            gaps, errors = [], []
            for g in groups:
                a, b = experiment.table[g][v], experiment.table[g]["simplegpt"]
                gaps.append(mean(a, best(a)) - mean(b, best(b)))
                errors.append(max(spread(a, best(a)) or 0.0, spread(b, best(b)) or 0.0))
            axis.errorbar([o.shape(g)[place] for g in groups], gaps, errors, color=colours[v], marker="o", capsize=3,
                          label=f"{VARIANTS[v]} less SimpleGPT")
        axis.axhline(0, color="#555555", linewidth=0.8)
        axis.set(xscale="log", xlabel="dim" if name == "sizes" else "layers", ylabel="nats a byte")
        ticks = [o.shape(g)[place] for g in LADDERS[name]]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.set_title(f"the gap over {name}, bars: spread", fontsize=9)
        axis.margins(y=0.25)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in axes[0]:
        axis.grid(True, which="major", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = o.runs / "claim.png"
    plot.save(fig, str(path), 110)
    return path
