#!/usr/bin/env python3
"""Writes dev/test/curvature: tiny models with the largest eigenvalues of their exact Hessians, for --probe to be compared.

    curvature.py DIR

Each file holds the weights (the paper's names), `tokens` (B, T+1) and the metadata `config`, `largest` and `inputs`. largest:
of the eigenvalues of the Hessian of the mean loss over all parameters. inputs: for each block's input, all tokens together,
the eigenvalue that is largest in magnitude. By automatic differentiation twice, a row a parameter or element, in float64 but for
RoPE's angles and the loss, which the model has in float32.
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


def hessian(loss, of):
    """Of a loss over the tensors `of`, flat one after another."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, of, create_graph=True)])
    return torch.stack([torch.cat([r.flatten() for r in torch.autograd.grad(g, of, retain_graph=True)]) for g in gradient])


def eigenvalues(model, windows):
    """Those over the parameters, and those over each block's input, in ascending order."""
    inputs = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in model.layers]
    with sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(windows)
        found = [torch.linalg.eigvalsh(hessian(loss, of)) for of in (list(model.parameters()), *([x] for x in inputs))]
    for hook in hooks:
        hook.remove()
    return found[0], found[1:]


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
        values, inputs = eigenvalues(model.double(), windows)
        print(f"{name}: {len(values)} parameters, loss {model.loss(windows):.4f}, eigenvalues from {values[0]:.6g} to "
              f"{values[-1]:.6g}, the next {values[1]:.6g} and {values[-2]:.6g}")
        for layer, x in enumerate(inputs):
            print(f"  over the {len(x)} elements of block {layer}'s input from {x[0]:.6g} to {x[-1]:.6g}, "
                  f"the next {x[1]:.6g} and {x[-2]:.6g}")
        outermost = [max(x[0].item(), x[-1].item(), key=abs) for x in inputs]
        save_file({**tensors, "tokens": windows.int()}, f"{sys.argv[1]}/{name}.safetensors",
                  {"config": json.dumps(asdict(c)), "largest": repr(values[-1].item()), "inputs": json.dumps(outermost)})


if __name__ == "__main__":
    main()
