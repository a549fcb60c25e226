#!/usr/bin/env python3
"""Writes dev/test/curvature: tiny models with the largest eigenvalues of their exact Hessians, for --probe to be compared.

    curvature.py DIR

Each file holds the weights (the paper's names), `tokens` (B, T+1) and the metadata `config` and `largest`: of the eigenvalues
of the Hessian of the mean loss over all parameters, by automatic differentiation twice in float64, a row a parameter.
Needs PyTorch and safetensors.
"""
import json
import sys
from dataclasses import asdict

import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import Config, Model

SIZES = dict(dim=16, n_layers=2, n_heads=1, vocab_size=19, multiple_of=8, ffn_dim_multiplier=0.3, max_seq_len=12)
MODELS = {
    "simplegpt": dict(),
    "prenorm": dict(variant="prenorm"),
    "preqknorm": dict(variant="preqknorm"),
    "nanogpt": dict(backbone="nanogpt", n_layers=1),
}


def hessian(model, windows):
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(model.loss(windows), parameters, create_graph=True)
        gradient = torch.cat([g.flatten() for g in gradient])
        rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, parameters, retain_graph=True)]) for g in gradient]
    return torch.stack(rows)


def main():
    torch.set_num_threads(1)
    for seed, (name, changes) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        c = Config(**{**SIZES, **changes})
        model = Model(c)
        model.init_weights()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        windows = torch.randint(0, c.vocab_size, (3, 13))
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(10):  # somewhere on the way, where both signs of curvature are there
            adam.zero_grad()
            model.loss(windows).backward()
            adam.step()
        tensors = {n: p.detach().clone().contiguous() for n, p in model.named_parameters()}
        values = torch.linalg.eigvalsh(hessian(model.double(), windows))
        print(f"{name}: {len(values)} parameters, loss {model.loss(windows):.4f}, eigenvalues from {values[0]:.6g} to "
              f"{values[-1]:.6g}, the next {values[1]:.6g} and {values[-2]:.6g}")
        save_file({**tensors, "tokens": windows.int()}, f"{sys.argv[1]}/{name}.safetensors",
                  {"config": json.dumps(asdict(c)), "largest": repr(values[-1].item())})


if __name__ == "__main__":
    main()
