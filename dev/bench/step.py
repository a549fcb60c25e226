#!/usr/bin/env python3
"""Times training steps of ./train_gpt against the PyTorch twin, eager and compiled, in one run, taking turns.

usage: dev/bench/step.py [--model 60M] [--batch-size 4] [--seq-len 512] [--device cpu|cuda] [--skip-compile] ...

One step: forward, backward, clipping, AdamW on random tokens. CPU in fp32, GPU in bf16 (autocast, fused AdamW). Prints a
table with ratios and writes it as JSON with date, device and command into --results. Needs torch and numpy.
"""
import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(ROOT, "dev", "reference"))
from model import Config, Model  # noqa: E402


def flavour(trainer, name):
    """A flavour's numbers as the trainer itself lists them."""
    for line in subprocess.run([trainer, "--models"], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines():
        word = line.split()
        if word and word[0].lower() == name.lower():
            dim, layers, heads, kv, hidden, vocab = map(int, word[1:7])
            return dict(dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv, vocab_size=vocab), hidden
    sys.exit(f"step.py: the trainer knows no flavour '{name}'. ./train_gpt --models lists them.")


def run_trainer(args, vocab, steps, work):
    shard = os.path.join(work, "tokens.bin")
    count = (steps + 1) * args.batch_size * (args.seq_len + 1)
    header = np.zeros(256, np.int32)
    header[:3] = (20240801, 7, count)
    with open(shard, "wb") as f:
        f.write(header.tobytes() + np.random.default_rng(1).integers(0, vocab, count, np.uint32).tobytes())
    out = os.path.join(work, "run")
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([args.trainer, "--model", args.model, "--variant", args.variant, "--train-data", shard, "--batch-size",
                    str(args.batch_size), "--seq-len", str(args.seq_len), "--steps", str(steps), "--out", out],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "log.csv")) as f:
        column = f.readline().strip().split(",").index("tokens_per_s")
        rates = [float(line.split(",")[column]) for line in f]
    return [args.batch_size * args.seq_len / r for r in rates]


class Twin:
    def __init__(self, args, config, hidden, compiled):
        torch.manual_seed(1)
        self.args, self.cuda = args, args.device == "cuda"
        model = Model(Config(**config, variant=args.variant, multiple_of=hidden, max_seq_len=args.seq_len))
        model.init_weights()
        model.to(args.device)
        self.adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=self.cuda)
        self.model, self.loss = model, torch.compile(model.loss) if compiled else model.loss

    def steps(self, count):
        seconds = []
        for _ in range(count):
            tokens = torch.randint(0, self.model.c.vocab_size, (self.args.batch_size, self.args.seq_len + 1),
                                   device=self.args.device)
            begin = time.perf_counter()
            self.adamw.zero_grad()
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.cuda):
                loss = self.loss(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.adamw.step()
            if self.cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        return re.search(r"model name\s*: (.*)", f.read())[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default=os.path.join(ROOT, "train_gpt"))
    parser.add_argument("--model", default="60M")
    parser.add_argument("--variant", default="simplegpt")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn, after two to warm up")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--results", default=os.path.join(ROOT, "dev", "bench", "results"))
    args = parser.parse_args()
    args.trainer = os.path.abspath(args.trainer)
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    config, hidden = flavour(args.trainer, args.model)

    seconds = {"train_gpt": [], "torch eager": []}
    if not args.skip_compile:
        seconds["torch.compile"] = []
    twins = {}
    with tempfile.TemporaryDirectory() as work:
        for turn in range(args.turns):
            for name, all_seconds in seconds.items():
                print(f"turn {turn + 1}: {name} ...", file=sys.stderr)
                if name == "train_gpt":
                    all_seconds += run_trainer(args, config["vocab_size"], args.steps + 2, work)[2:]
                else:
                    if name not in twins:
                        twins[name] = Twin(args, config, hidden, name == "torch.compile")
                    all_seconds += twins[name].steps(args.steps + 2)[2:]

    tokens = args.batch_size * args.seq_len
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    print(f"{args.model} {args.variant}, B {args.batch_size}, T {args.seq_len}, {args.device}, {args.threads} threads")
    print(f"{'':16}{'s/step':>10}{'tokens/s':>12}{'train_gpt is':>16}")
    for name, median in medians.items():
        print(f"{name:16}{median:10.3f}{tokens / median:12.0f}{median / medians['train_gpt']:13.2f} x")
    given = {n: v for n, v in vars(args).items() if v != parser.get_default(n) and n not in ("trainer", "results")}
    command = " ".join(["dev/bench/step.py", *(f"--{n.replace('_', '-')}" + (f" {v}" if v is not True else "")
                                             for n, v in given.items())])
    record = {"date": datetime.date.today().isoformat(), "device": device_name(args.device), "threads": args.threads,
              "torch": torch.__version__, "command": command,
              "tokens_per_step": tokens,
              "seconds_per_step": medians, "tokens_per_s": {n: tokens / m for n, m in medians.items()}, "all_seconds": seconds}
    os.makedirs(args.results, exist_ok=True)
    path = os.path.join(args.results, f"{record['date']}-step-{args.device}-{args.model}-{args.variant}.json")
    with open(path, "w") as f:
        json.dump(record, f, indent=1)
    print("written", os.path.relpath(path))


if __name__ == "__main__":
    main()
