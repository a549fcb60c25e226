#!/usr/bin/env python3
"""Makes Markdown tables of what dev/bench/bench.cu and dev/bench/step.py wrote, and holds the plan against it.

usage: dev/bench/report.py [FILE.json ...] [--results DIR] [--trainer ./train_gpt] [--map]

Without files: the newest of each part, device and model in DIR (dev/bench/results). With --trainer also --plan's least
time of a step, kind by kind at the measured ceilings, beside the sum of the kernels' own times; the trainer must be of
the measured precision. With --map the one page of where a step's time goes, kernel by kernel, instead of the tables
(dev/bench/results/costs.md is that of the results beside it). Prints to standard output.
"""
import argparse
import glob
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


PARTS = ("ceilings", "kernels", "bounds", "steps")


def fail(message):
    sys.exit(f"report.py: {message}")


def load(path):
    try:
        with open(path) as f:
            record = json.load(f)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read: {error}.")
    if not isinstance(record, dict) or record.get("part") not in PARTS:
        return None
    record.setdefault("precision", "bf16" if "NVIDIA" in record["device"] else "fp32")  # older steps do not say
    return record


def newest(results):
    """Of all results the last of each part, device, model and precision; names begin with the date."""
    found = {}
    for path in sorted(glob.glob(os.path.join(results, "*.json"))):
        record = load(path)
        if record:
            found[record["part"], record["device"], record["model"], record["precision"]] = record
    return list(found.values())


def table(heads, rows):
    """The first column left, the others right."""
    print("| " + " | ".join(heads) + " |")
    print("|---" + "|--:" * (len(heads) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def percent(x):
    return f"{100 * x:.1f}%" if x else ""


def title(record, what):
    print(f"### {what}\n")
    print(f"{record['device']}, {record['date']}; matmul {record['matmul_tflops']:.4g} TFLOP/s, copy "
          f"{record['copy_gb_s']:.4g} GB/s\n" if record["matmul_tflops"] else f"{record['device']}, {record['date']}\n")


def ceilings(record):
    title(record, "Ceilings")
    rows = [[c["what"], f"{c['ms']:.4g}", f"{c['gb_s']:.4g} GB/s"] for c in record["copies"]]
    rows += [[c["what"], f"{c['ms']:.4g}", f"{c['tflops']:.4g} TFLOP/s"] for c in record["matmuls"]]
    table(["copy (bytes read and written), matmul (random normal numbers)", "ms", "rate"], rows)


def kernels(record):
    title(record, f"Kernels at the shapes of {record['model']}, B {record['batch_size']}, T {record['seq_len']}, "
                  f"{record['precision']}")
    rows = []
    for k in record["kernels"]:
        compute = k["flops"] / record["matmul_tflops"] / 1e12 > k["bytes"] / record["copy_gb_s"] / 1e9
        rate = f"{k['flops'] / k['ms'] / 1e9:.4g} TFLOP/s" if compute else f"{k['bytes'] / k['ms'] / 1e6:.4g} GB/s"
        rows.append([k["name"], k["shape"], f"{k['ms']:.4g}", rate, percent(k["bound_ms"] / k["ms"])])
    table(["kernel", "shape", "ms", "rate", "of the ceiling"], rows)


def plan_check(record, trainer):
    """The plan's kinds of work beside the measured kernels that do it."""
    command = [trainer, "--plan", "--model", record["model"], "--batch-size", str(record["batch_size"]), "--seq-len",
               str(record["seq_len"]), "--device", f"{record['matmul_tflops']:.6g},{record['copy_gb_s']:.6g},1000"]
    try:
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{' '.join(command)}: {error}.")
    if f"; {record['precision']}\n" not in text:
        fail(f"{trainer}: is not the {record['precision']} build that was measured.")
    rows, bound, measured = [], 0.0, 0.0
    for kind, least in re.findall(r"^  (\S.*?) {2,}\S+ +\S+ +(\S+) +[\d.]+%$", text, re.M):
        mine = [k for k in record["kernels"] if k["kind"] == kind]
        if kind == "step" or not mine:
            continue
        ms = sum(k["times"] * k["ms"] for k in mine)
        bound, measured = bound + float(least), measured + ms
        rows.append([kind, least, f"{ms:.4g}", percent(float(least) / ms)])
    rows.append(["together", f"{bound:.4g}", f"{measured:.4g}", percent(bound / measured if measured else 0)])
    print(f"The plan of a simplegpt step of {record['model']}, B {record['batch_size']}, T {record['seq_len']}:\n")
    table(["work", "least ms", "ms of its kernels", "least / measured"], rows)


def bounds(record):
    title(record, f"Bounds at the shapes of {record['model']}, B {record['batch_size']}, T {record['seq_len']}, "
                  f"{record['precision']}")
    table(["kernel", "shape", "least ms"],
          [[k["name"], k["shape"], f"{k['bound_ms']:.4g}"] for k in record["kernels"]])


def cost_map(records):
    """Where a step's time goes: of each device and model its kernels, those that cost most first."""
    print("""# Where the time goes

The kernels of one training step of SimpleGPT (one micro-batch, nothing recomputed), those that cost most first. The limit of
a kernel is its FLOPs at the matmul rate or its bytes at the copy speed (that of a copy in place, or elsewhere, as the kernel
writes), whichever takes longer; *lost* is the time above it, what a perfect kernel would save. Each kernel was timed alone,
with nothing in the caches. `dev/bench/report.py --map` made this page of the results beside it; `make bench` measures them and
makes it anew.
""")
    whole = {(r["device"], r["model"], r["precision"], run["batch_size"], r["seq_len"]): run["seconds_per_step"]
             for r in records if r["part"] == "steps" for run in r["runs"]
             if run["name"] == "train_gpt simplegpt" and not run["error"]}
    on_gpu = {r["model"] for r in records if r["part"] == "kernels" and "NVIDIA" in r["device"]}
    for record in records:
        if record["part"] not in ("kernels", "bounds") or (record["part"] == "bounds" and record["model"] in on_gpu):
            continue
        measured = record["part"] == "kernels"
        what = f"{record['model']}, B {record['batch_size']}, T {record['seq_len']}, {record['precision']}"
        title(record, what if measured else what + ": **limits only, nothing was measured**")
        of_step = [(k["times"] * (k["ms"] if measured else k["bound_ms"]), k) for k in record["kernels"] if k["times"]]
        all_ms = sum(ms for ms, _ in of_step)
        rows, lost = [], 0
        for ms, k in sorted(of_step, key=lambda pair: -pair[0]):
            by = "FLOPs" if k["flops"] / record["matmul_tflops"] / 1e12 > k["bytes"] / record["copy_gb_s"] / 1e9 else "bytes"
            row = [k["name"], k["shape"], by, f"{k['times']:.4g}", f"{ms:.4g}", percent(ms / all_ms)]
            if measured:
                above = ms - k["times"] * k["bound_ms"]
                lost += above
                row += [percent(k["bound_ms"] / k["ms"]), f"{above:.4g}"]
            rows.append(row)
        rows.append(["together", "", "", "", f"{all_ms:.4g}", percent(1)] +
                    ([percent(1 - lost / all_ms), f"{lost:.4g}"] if measured else []))
        table(["kernel", "shape", "limited by", "times", "ms a step" if measured else "least ms a step", "share"] +
              (["of its limit", "ms lost"] if measured else []), rows)
        seconds = whole.get((record["device"], record["model"], record["precision"], record["batch_size"],
                             record["seq_len"]))
        if measured and seconds:
            print(f"The whole step took {1e3 * seconds:.4g} ms; its kernels are {percent(all_ms / seconds / 1e3)} of that.\n")
    if not on_gpu:
        print("On a GPU nothing has been measured yet.")


def steps(record):
    title(record, f"Training steps of {record['model']}, {record['precision']}, T {record['seq_len']} "
                  f"{' '.join(record['options'])}".rstrip())
    first = record["runs"][0]
    rows = []
    for run in record["runs"]:
        if run["error"]:
            rows.append([run["name"], run["batch_size"], run["error"]] + 6 * [""])
            continue
        of_plan = run["plan_s"] / run["seconds_per_step"] if "plan_s" in run else None
        first_is = "" if first["error"] else f"{first['tokens_per_s'] / run['tokens_per_s']:.3f}"
        rows.append([run["name"], run["batch_size"], f"{run['seconds_per_step']:.4g}", f"{run['tokens_per_s']:.0f}",
                     percent(run["mfu"]), percent(run["of_matmul_rate"]), f"{run['memory_gib']:.1f}", percent(of_plan),
                     first_is])
    peak = f"MFU of {record['peak_tflops']:g}" if record["peak_tflops"] else "MFU"
    table(["", "B", "s/step", "tokens/s", peak, "of the measured rate", "GiB", "least time / time",
           f"{first['name']} is x as fast"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.json")
    parser.add_argument("--results", default=os.path.join(ROOT, "dev", "bench", "results"), metavar="DIR")
    parser.add_argument("--trainer", help="compare its --plan with the kernels")
    parser.add_argument("--map", action="store_true", help="the page of where a step's time goes")
    args = parser.parse_args()
    records = [load(path) for path in args.files] if args.files else newest(args.results)
    if not records:
        fail("no results yet. `make bench` writes them.")
    if None in records:
        fail(f"{args.files[records.index(None)]}: was written by neither bench nor step.py.")
    if args.map:
        return cost_map(records)
    for record in records:
        {"ceilings": ceilings, "kernels": kernels, "bounds": bounds, "steps": steps}[record["part"]](record)
        if record["part"] == "kernels" and args.trainer:
            plan_check(record, os.path.abspath(args.trainer))


if __name__ == "__main__":
    main()
