#!/usr/bin/env python3
"""Golden files: what a configuration makes of start weights and tokens, step by step. Needs PyTorch and safetensors.

  golden.py check FILE...       run the twin from each file's weights, print the largest errors, exit 1 beyond the limits
  golden.py write OUT [flags]   a new file from the twin (see write --help)
  golden.py fixtures DIR        the small files of dev/test/golden, the same every time

A file holds `param/NAME`, `tokens` (steps, micro-batches, B, T+1), `logits` of the first micro-batch, `grad/NAME` of the
first step before clipping, `loss`, `lr`, `grad_norm` of each step and `after/NAME`; metadata `config`, `optimizer`.
"""
import argparse
import json
import math
import sys
from dataclasses import asdict, fields

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import Config, Model

LIMITS = {"logits": 1e-4, "loss": 5e-5, "lr": 1e-9, "grad_norm": 1e-4, "grad": 1e-4, "after": 1e-4}


def learning_rate(o, s):
    if s < o["warmup"]:
        return o["lr"] * (s + 1) / (o["warmup"] + 1)
    return o["lr"] * (1 - (s - o["warmup"]) / (o["total"] - o["warmup"]))


def train(model, tokens, o):
    """The recipe over tokens (steps, micro-batches, B, T+1). Returns a golden file's tensors but for `param/`."""
    adamw = torch.optim.AdamW(model.parameters(), lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"],
                              weight_decay=o["wd"])
    out = {"loss": [], "lr": [], "grad_norm": []}
    for s, step in enumerate(tokens):
        adamw.zero_grad()
        loss = 0.0
        for windows in step:
            if "logits" not in out:
                with torch.no_grad():
                    out["logits"] = model(windows[:, :-1]).contiguous()
            part = model.loss(windows) / len(step)
            part.backward()
            loss += part.item()
        if s == 0:
            out.update({"grad/" + n: p.grad.clone() for n, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"]).item()
        adamw.param_groups[0]["lr"] = learning_rate(o, s)
        adamw.step()
        for key, value in (("loss", loss), ("lr", learning_rate(o, s)), ("grad_norm", norm)):
            out[key].append(value)
    out.update({k: torch.tensor(out[k], dtype=torch.float64) for k in ("loss", "lr", "grad_norm")})
    out.update({"after/" + n: p.detach().clone() for n, p in model.named_parameters()})
    return out


def check(path):
    with safe_open(path, "pt") as f:
        metadata, want = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    model = Model(Config(**json.loads(metadata["config"])))
    model.load_state_dict({k[6:]: v for k, v in want.items() if k.startswith("param/")})
    got = train(model, want["tokens"], json.loads(metadata["optimizer"]))
    worst = dict.fromkeys(LIMITS, 0.0)
    for key, value in got.items():
        kind = key.split("/")[0]
        difference = (value.double() - want[key].double()).abs()
        if kind in ("grad", "after"):
            error = difference.norm() / want[key].double().norm().clamp_min(1e-12)
        else:
            error = (difference / want[key].abs()).max() if kind in ("lr", "grad_norm") else difference.max()
        worst[kind] = max(worst[kind], error.nan_to_num(nan=math.inf).item())
    print(path, " ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    return all(worst[k] <= LIMITS[k] for k in LIMITS)


def write(path, c, o):
    torch.manual_seed(o["seed"])
    model = Model(c)
    model.init_weights()
    with torch.no_grad():  # gains off 1, so that a kernel that forgets one is found out
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    start = {"param/" + n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.randint(0, c.vocab_size, (o["steps"], o["accum"], o["B"], o["T"] + 1), dtype=torch.int32)
    tokens[..., 1::2] = (tokens[..., 0:-1:2] * 7 + 3)[..., : tokens[..., 1::2].shape[-1]] % c.vocab_size  # to be learned
    tensors = {**start, "tokens": tokens, **train(model, tokens, o)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path,
              {"config": json.dumps(asdict(c)), "optimizer": json.dumps(o)})


OPTIMIZER = {"seed": 1, "steps": 6, "accum": 1, "B": 2, "T": 37, "lr": 2e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
             "wd": 0.1, "warmup": 2, "total": 6, "clip": 1.0}

# name: configuration, optimizer; between them every variant, backbone, norm, head size, odd T and V, accumulation
FIXTURES = {
    "simplegpt_hs16": (dict(dim=32, n_heads=2, vocab_size=61, ffn_dim_multiplier=0.3), dict(accum=3)),
    "simplegpt_gqa_hs32": (dict(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=67, ffn_dim_multiplier=0.6,
                                multiple_of=8, rope_theta=5e5), dict(T=70, B=1)),
    "simplegpt_layernorm": (dict(dim=48, n_layers=1, n_heads=3, n_kv_heads=1, vocab_size=61, norm_type="layernorm",
                                 ffn_dim_multiplier=0.3), dict(T=33)),
    "simplegpt_hs64": (dict(dim=64, n_layers=1, n_heads=1, vocab_size=65, ffn_dim_multiplier=0.2), dict(T=65, B=1)),
    "simplegpt_hs72": (dict(dim=72, n_layers=1, n_heads=1, vocab_size=64, ffn_dim_multiplier=0.2, multiple_of=8),
                       dict(T=67, B=1)),
    "prenorm_hs128": (dict(variant="prenorm", dim=128, n_layers=1, n_heads=1, vocab_size=33, ffn_dim_multiplier=0.2,
                           multiple_of=8), dict(T=66, B=1)),
    "prenorm_layernorm": (dict(variant="prenorm", dim=32, n_layers=1, n_heads=2, vocab_size=71, norm_type="layernorm",
                               ffn_dim_multiplier=0.3), dict(accum=2)),
    "preqknorm_gqa": (dict(variant="preqknorm", dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=77,
                           ffn_dim_multiplier=0.2), dict(T=49)),
    "nanogpt_simplegpt": (dict(backbone="nanogpt", dim=32, n_layers=1, n_heads=2, vocab_size=57, max_seq_len=50), dict()),
    "nanogpt_prenorm": (dict(backbone="nanogpt", variant="prenorm", dim=32, n_layers=1, n_heads=1, vocab_size=65,
                             max_seq_len=37, norm_type="layernorm"), dict(accum=2)),
    "nanogpt_preqknorm": (dict(backbone="nanogpt", variant="preqknorm", dim=32, n_layers=1, n_heads=2, vocab_size=70,
                               max_seq_len=37), dict()),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("files", nargs="+")
    commands.add_parser("fixtures").add_argument("dir")
    writer = commands.add_parser("write", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    writer.add_argument("out")
    for f in fields(Config):
        kind = type(f.default) if f.default is not None else float if "mult" in f.name else int
        writer.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default)
    for name, default in OPTIMIZER.items():
        writer.add_argument("--" + name, type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine
    if args.command == "check":
        return 0 if all([check(path) for path in args.files]) else 1
    if args.command == "fixtures":
        for seed, (name, (c, o)) in enumerate(FIXTURES.items()):
            write(f"{args.dir}/{name}.safetensors", Config(**c), {**OPTIMIZER, **o, "seed": seed + 1})
        return 0
    write(args.out, Config(**{f.name: getattr(args, f.name) for f in fields(Config)}),
          {name: getattr(args, name) for name in OPTIMIZER})
    return 0


if __name__ == "__main__":
    sys.exit(main())
