"""An independent twin of the model in plain PyTorch: both backbones, all variants. Written from the paper and the released
code's tensor names, not from train_gpt.cu; golden.py checks it against golden files and writes new ones.

    simplegpt   h = x + No Wo A(Nq Wq x, Nk Wk x, Nv Wv x)    y = h + N2 W2( silu(N1 W1 h) * (N3 W3 h) )
    prenorm     h = x + Wo A(Wq n, Wk n, Wv n), n = N(x)      y = h + W2( silu(W1 n) * (W3 n) ), n = N'(h)
    preqknorm   prenorm with a norm on the whole q row and on the whole k row, before RoPE
The nanogpt backbone has learned positions instead of RoPE, gelu(fc) and proj instead of w1, w3, w2, and a tied head.
"""
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:  # the fields of a golden file's `config`
    backbone: str = "llama"
    variant: str = "simplegpt"
    dim: int = 64
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: Optional[int] = None
    vocab_size: int = 512
    multiple_of: int = 32
    ffn_dim_multiplier: Optional[float] = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 64
    norm_type: str = "rmsnorm"


class Norm(nn.Module):
    def __init__(self, width, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.center = c.norm_eps, c.norm_type == "layernorm"

    def forward(self, x):
        if self.center:
            return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class SimpleNorm(nn.Module):  # Psi(x) = Norm(W x)
    def __init__(self, inputs, outputs, c):
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.norm = Norm(outputs, c)

    def forward(self, x):
        return self.norm(self.lin(x))


def linear(inputs, outputs, c):
    return SimpleNorm(inputs, outputs, c) if c.variant == "simplegpt" else nn.Linear(inputs, outputs, bias=False)


def rotate(x, theta):  # x (B,T,H,HS): adjacent pairs (2i, 2i+1) as complex numbers, turned by t theta^(-2i/HS)
    B, T, H, HS = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, HS, 2, device=x.device).float() / HS)
    angles = torch.outer(torch.arange(T, device=x.device).float(), frequencies)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    a, b = x.float().unflatten(-1, (HS // 2, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def attend(q, k, v):  # (B,T,NH,HS), (B,T,NKV,HS) twice -> (B,T,NH HS)
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) if group > 1 else t for t in (k, v))
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    NAMES = {"simplegpt": ("snq", "snk", "snv", "sno"), "llama": ("wq", "wk", "wv", "wo"), "nanogpt": ("q", "k", "v", "o")}

    def __init__(self, c):
        super().__init__()
        self.c, self.hs = c, c.dim // c.n_heads
        kv = (c.n_kv_heads or c.n_heads) * self.hs
        self.names = self.NAMES["nanogpt" if c.backbone == "nanogpt" else
                                "simplegpt" if c.variant == "simplegpt" else "llama"]
        for name, width in zip(self.names, (c.dim, kv, kv, c.dim)):
            setattr(self, name, linear(c.dim, width, c))
        if c.variant == "preqknorm":
            self.q_norm, self.k_norm = Norm(c.dim, c), Norm(kv, c)

    def forward(self, x):
        wq, wk, wv, wo = (getattr(self, n) for n in self.names)
        q, k, v = wq(x), wk(x), wv(x)
        if self.c.variant == "preqknorm":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.hs)) for t in (q, k, v))
        if self.c.backbone == "llama":
            q, k = rotate(q, self.c.rope_theta), rotate(k, self.c.rope_theta)
        return wo(attend(q, k, v))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden = int(2 * 4 * c.dim / 3)
        if c.ffn_dim_multiplier is not None:
            hidden = int(c.ffn_dim_multiplier * hidden)
        hidden = c.multiple_of * math.ceil(hidden / c.multiple_of)
        self.names = ("sn1", "sn2", "sn3") if c.variant == "simplegpt" else ("w1", "w2", "w3")
        for name, (i, o) in zip(self.names, ((c.dim, hidden), (hidden, c.dim), (c.dim, hidden))):
            setattr(self, name, linear(i, o, c))

    def forward(self, x):
        w1, w2, w3 = (getattr(self, n) for n in self.names)
        return w2(F.silu(w1(x)) * w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.pre = c.variant != "simplegpt"
        if self.pre:
            self.attention_norm, self.ffn_norm = Norm(c.dim, c), Norm(c.dim, c)

    def forward(self, x):
        h = x + self.attention(self.attention_norm(x) if self.pre else x)
        return h + self.feed_forward(self.ffn_norm(h) if self.pre else h)


class NanoBlock(Attention):  # nanogpt's tensors lie flat in the layer
    def __init__(self, c):
        super().__init__(c)
        self.pre = c.variant != "simplegpt"
        if self.pre:
            self.norm1, self.norm2 = Norm(c.dim, c), Norm(c.dim, c)
        self.fc, self.proj = linear(c.dim, 4 * c.dim, c), linear(4 * c.dim, c.dim, c)

    def forward(self, x):
        h = x + super().forward(self.norm1(x) if self.pre else x)
        return h + self.proj(F.gelu(self.fc(self.norm2(h) if self.pre else h)))


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.llama = c.backbone == "llama"
        if self.llama:
            self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
            self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        else:
            self.wte, self.wpe = nn.Embedding(c.vocab_size, c.dim), nn.Embedding(c.max_seq_len, c.dim)
        self.layers = nn.ModuleList([(LlamaBlock if self.llama else NanoBlock)(c) for _ in range(c.n_layers)])
        self.norm = Norm(c.dim, c)

    def forward(self, tokens):  # (B,T) -> logits (B,T,V)
        if self.llama:
            x = self.tok_embeddings(tokens)
        else:
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.output.weight if self.llama else self.wte.weight)

    def loss(self, windows):  # (B,T+1): mean cross-entropy
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1).float(), windows[:, 1:].flatten().long())

    def init_weights(self):
        c = self.c
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
                continue
            layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
            part = name.removeprefix(f"layers.{layer}.").split(".")
            if self.llama:
                if part[0] == "tok_embeddings":
                    nn.init.normal_(p)
                elif part[0] == "output":
                    std = c.dim ** -0.5
                    nn.init.trunc_normal_(p, 0, std, -3 * std, 3 * std)
                else:
                    deep = part[1] in ("sno", "wo", "sn2", "w2", "sn3", "w3")
                    nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * (layer + 1)) if deep else 0.02)
            else:
                nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * c.n_layers) if part[0] in ("o", "proj") else 0.02)

