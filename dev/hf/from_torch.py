#!/usr/bin/env python3
"""Make weights for ./train_gpt --init-from from a checkpoint of the paper's released PyTorch code, and print the flags.

    from_torch.py CHECKPOINT OUT.safetensors --heads N [--norm layernorm] [--rope-theta X] [--norm-eps X] [--seq-len N]

CHECKPOINT is a state_dict that torch.save wrote (alone, or under "model"), or a folder of torch.distributed.checkpoint
as torchtitan writes it. Names are ours already; what wrappers put before them goes, and so does optimizer state.
Everything but the given numbers is seen from the tensors. Needs numpy and torch.
"""
import re
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from weights import Parser, Refused, description, file_metadata, flags, our_shapes, run, write_weights

try:
    import torch
except ImportError:
    sys.exit("from_torch: the package torch is missing. pip install torch.")

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")


def open_checkpoint(path):
    """name: (shape, torch dtype, function that gives the tensor)"""
    if path.is_dir():
        import torch.distributed.checkpoint as dcp
        warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process only
        if not (path / ".metadata").exists():
            raise Refused(
                f"{path}: holds no .metadata of torch.distributed.checkpoint. Give such a folder, or a .pt file.")
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata

        def reader(name, meta):
            def read():
                tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
                dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
                return tensor
            return read
        return {name: (tuple(meta.size), meta.properties.dtype, reader(name, meta)) for name, meta in stored.items()
                if hasattr(meta, "size") and hasattr(meta, "properties")}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as e:  # torch's own are of many kinds
        raise Refused(f"{path}: torch cannot read it as plain tensors ({' '.join(str(e).split())[:80]}). "
                      "Save model.state_dict() with torch.save.") from None
    while isinstance(state, dict) and isinstance(state.get("model", state.get("state_dict")), dict):
        state = state.get("model", state.get("state_dict"))
    if not isinstance(state, dict):
        raise Refused(f"{path}: holds no state_dict. Save model.state_dict() with torch.save.")
    return {name: (tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items() if isinstance(t, torch.Tensor)}


def own_names(tensors, path):
    """those of the model, without what stands before their names"""
    plain = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    ends = ("tok_embeddings.weight", "wte.weight")
    roots = sorted((name for name in plain if name.endswith(ends) and "optim" not in name), key=len)
    if not roots:
        raise Refused(f"{path}: holds no {ends[0]} and no {ends[1]}. Give a checkpoint of the paper's code.")
    prefix = re.sub(r"(tok_embeddings|wte)\.weight$", "", roots[0])
    known = re.compile(r"(layers\.\d+\..*|norm|output|tok_embeddings|wte|wpe)\.weight$")
    found = {name[len(prefix):]: t for name, t in plain.items() if name.startswith(prefix)}
    return {name: t for name, t in found.items() if known.match(name)}


def words_of(tensors, args):
    def shape(name):
        if name not in tensors:
            raise Refused(f"{args.checkpoint}: lacks the tensor {name}. Give a whole checkpoint of the paper's code.")
        return tensors[name][0]

    llama = "tok_embeddings.weight" in tensors
    att, ffn = ("attention.", "feed_forward.") if llama else ("", "")
    simple = any(".lin." in name for name in tensors)
    qknorm = f"layers.0.{att}q_norm.weight" in tensors
    key, first = ("snk.lin" if simple else "wk") if llama else ("k.lin" if simple else "k"), "fc"
    if llama:
        first = "sn1" if simple else "w1"
    vocab, dim = shape("tok_embeddings.weight" if llama else "wte.weight")
    layers = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=-1)
    positions = args.seq_len if llama else shape("wpe.weight")[0]
    if args.heads < 1 or dim % args.heads:
        raise Refused(
            f"--heads: {args.heads} do not divide the width {dim}. Give the number of the checkpoint's model.")
    return {
        "backbone": "llama" if llama else "nanogpt", "norm": args.norm, "dim": dim, "layers": layers,
        "variant": "simplegpt" if simple else "preqknorm" if qknorm else "prenorm", "heads": args.heads,
        "kv_heads": shape(f"layers.0.{att}{key}.weight")[0] // (dim // args.heads), "vocab_size": vocab,
        "hidden": shape(f"layers.0.{ffn}{first}{'.lin' if simple else ''}.weight")[0], "rope_theta": args.rope_theta,
        "norm_eps": args.norm_eps, "seq_len": min(args.seq_len, positions), "max_seq_len": positions
    }


def main():
    parser = Parser(prog="from_torch", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pt file, or folder of torch.distributed.checkpoint")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--heads", type=int, required=True, help="query heads; tensors do not tell")
    parser.add_argument("--norm", choices=("rmsnorm", "layernorm"), default="rmsnorm", help="(rmsnorm)")
    parser.add_argument("--rope-theta", type=float, default=1e4, help="(1e4)")
    parser.add_argument("--norm-eps", type=float, default=1e-5, help="(1e-5)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence (2048)")
    args = parser.parse_args()
    tensors = own_names(open_checkpoint(args.checkpoint), args.checkpoint)
    words = {key: str(value) for key, value in words_of(tensors, args).items()}
    c = description(words, args.checkpoint, "Give a whole checkpoint of the paper's code.")
    shapes = our_shapes(c)
    for name, shape in shapes.items():
        there = tensors.get(name)
        if there is None or there[0] != shape:
            raise Refused(f"{args.checkpoint}: {name} is {there[0] if there else 'missing'}, {shape} was due. "
                          "Check --heads, or give a whole checkpoint.")
        if there[1] not in DTYPES:
            raise Refused(f"{args.checkpoint}: {name} is {there[1]}. Only float32, bfloat16 and float16 can be read.")
    for name in tensors:
        if name not in shapes:
            raise Refused(
                f"{args.checkpoint}: holds {name}, which a {c['variant']} model lacks. Give the paper's code's.")

    def tensor(name):
        _, dtype, read = tensors[name]

        def values():
            t = read().contiguous()
            return t.view(torch.int16).numpy().view("u2") if dtype == torch.bfloat16 else t.numpy()
        return name, DTYPES[dtype], shapes[name], values

    write_weights(args.out, [tensor(name) for name in shapes], file_metadata(c))
    print(f"./train_gpt {flags(c)} --init-from {args.out}")


if __name__ == "__main__":
    run("from_torch", main)
