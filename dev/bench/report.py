#!/usr/bin/env python3
"""Makes Markdown tables of what dev/bench/bench.cu and dev/bench/step.py wrote, and holds the plan against it.

usage: dev/bench/report.py [FILE.json ...] [--results DIR] [--trainer ./train_gpt]

Without files: the newest of each part, device and model in DIR (dev/bench/results). With --trainer also --plan's least
time of a step, kind by kind at the measured ceilings, beside the sum of the kernels' own times; the trainer must be of
the measured precision. Prints to standard output.
"""
import argparse
import glob
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def fail(message):
    sys.exit(f"report.py: {message}")


def load(path):
    try:
        with open(path) as f:
            record = json.load(f)
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read: {error}.")
    return record if isinstance(record, dict) and record.get("part") in ("ceilings", "kernels", "steps") else None


def newest(results):
    """Of all results the last of each part, device and model; names begin with the date."""
    found = {}
    for path in sorted(glob.glob(os.path.join(results, "*.json"))):
        record = load(path)
        if record:
            found[record["part"], record["device"], record["model"]] = record
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
        library = f"{k['of_library']:.3f}" if k["of_library"] else ""
        rows.append([k["name"], k["shape"], f"{k['ms']:.4g}", rate, percent(k["bound_ms"] / k["ms"]), library])
    table(["kernel", "shape", "ms", "rate", "of the ceiling", "x cuBLASLt"], rows)


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


def steps(record):
    title(record, f"Training steps of {record['model']}, T {record['seq_len']} {' '.join(record['options'])}".rstrip())
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
    args = parser.parse_args()
    records = [load(path) for path in args.files] if args.files else newest(args.results)
    if not records:
        fail("no results yet. `make bench` writes them.")
    if None in records:
        fail(f"{args.files[records.index(None)]}: was written by neither bench nor step.py.")
    for record in records:
        {"ceilings": ceilings, "kernels": kernels, "steps": steps}[record["part"]](record)
        if record["part"] == "kernels" and args.trainer:
            plan_check(record, os.path.abspath(args.trainer))


if __name__ == "__main__":
    main()
