#!/usr/bin/env python3
"""Make weights for ./train_gpt --init-from from a checkpoint of the paper's released PyTorch code, or of nanoGPT, and
print the flags.

    from_torch.py CHECKPOINT OUT.safetensors --heads N [--norm layernorm] [--rope-theta X] [--norm-eps X] [--seq-len N]
    from_torch.py ckpt.pt OUT.safetensors                  # nanoGPT's, trained with bias=False

CHECKPOINT is a state_dict that torch.save wrote (alone, or under "model"), or a folder of torch.distributed.checkpoint
as torchtitan writes it. Names are ours or nanoGPT's; what wrappers put before them goes, and so does optimizer state.
Everything but the given numbers is seen from the tensors. Needs numpy, for such a folder torch too.
"""
import inspect
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from weights import Parser, Refused, Weights, description, flags, gpt2_rows, run, simplegpt_rows, torch_entries, \
    write_ours

WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")


def open_folder(path):
    """tensors of torch.distributed.checkpoint"""
    try:
        import torch
        import torch.distributed.checkpoint as dcp
    except ImportError:
        raise Refused(f"{path}: reading such a folder needs the package torch, which is missing. pip install torch") \
            from None
    warnings.filterwarnings("ignore", module="torch.distributed")  # that there is one process only
    if not (path / ".metadata").exists():
        raise Refused(
            f"{path}: holds no .metadata of torch.distributed.checkpoint. Give such a folder, or a .pt file.")
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    alone = {"no_dist": True} if "no_dist" in inspect.signature(dcp.load).parameters else {}  # older ones see it
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

    def reader(name, meta):
        def read():
            tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
            dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(path), **alone)
            return tensor.view(torch.int16).numpy().view("u2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
        return read
    return {name: (dtypes.get(meta.properties.dtype, str(meta.properties.dtype)), tuple(meta.size), reader(name, meta))
            for name, meta in stored.items() if hasattr(meta, "size") and hasattr(meta, "properties")}


def own_names(tensors, path):
    """those of the model, without what stands before their names"""
    plain = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    ends = ("tok_embeddings.weight", "wte.weight")
    roots = sorted((name for name in plain if name.endswith(ends) and "optim" not in name), key=len)
    if not roots:
        raise Refused(f"{path}: holds no {ends[0]} and no {ends[1]}. Give a checkpoint of the paper's code or of "
                      "nanoGPT.")
    prefix = re.sub(r"(tok_embeddings|wte)\.weight$", "", roots[0])
    found = {name[len(prefix):]: t for name, t in plain.items() if name.startswith(prefix)}
    if "h.0.attn.c_attn.weight" in found:  # nanoGPT's
        known = re.compile(r"(h\.\d+\..*(?<!\.attn)|ln_f|wte|wpe)\.(weight|bias)$")  # attn.bias: a mask
        bias = next((name for name in found if name.endswith(".bias") and known.match(name)), None)
        if bias:
            raise Refused(f"{path}: holds {bias}. GPT-2 has biases, and nanoGPT with bias=True, the trainer has none. "
                          "Take a model of nanoGPT with bias=False.")
        return {"transformer." + name: t for name, t in found.items() if known.match(name)}
    known = re.compile(r"(layers\.\d+\..*|norm|output|tok_embeddings|wte|wpe)\.weight$")
    return {name: t for name, t in found.items() if known.match(name)}


def words_of(tensors, heads, args):
    def shape(name):
        if name not in tensors:
            raise Refused(f"{args.checkpoint}: lacks the tensor {name}. Give a whole checkpoint.")
        return tensors[name][1]

    def count(prefix):
        numbers = [int(name.split(".")[prefix.count(".")]) for name in tensors if name.startswith(prefix)]
        return 1 + max(numbers, default=-1)

    llama, nanogpt = "tok_embeddings.weight" in tensors, "transformer.wte.weight" in tensors
    vocab, dim = shape("tok_embeddings.weight" if llama else "transformer.wte.weight" if nanogpt else "wte.weight")
    positions = args.seq_len if llama else shape("transformer.wpe.weight" if nanogpt else "wpe.weight")[0]
    if heads < 1 or dim % heads:
        raise Refused(f"--heads: {heads} do not divide the width {dim}. Give the number of the checkpoint's model.")
    words = {"backbone": "llama" if llama else "nanogpt", "dim": dim, "heads": heads, "vocab_size": vocab,
             "rope_theta": args.rope_theta, "norm_eps": args.norm_eps, "seq_len": min(args.seq_len, positions),
             "max_seq_len": positions}
    if nanogpt:
        return {**words, "variant": "prenorm", "norm": "layernorm", "layers": count("transformer.h."),
                "kv_heads": heads, "hidden": shape("transformer.h.0.mlp.c_fc.weight")[0]}
    att, ffn = ("attention.", "feed_forward.") if llama else ("", "")
    simple = any(".lin." in name for name in tensors)
    qknorm = f"layers.0.{att}q_norm.weight" in tensors
    key, first = ("snk.lin" if simple else "wk") if llama else ("k.lin" if simple else "k"), "fc"
    if llama:
        first = "sn1" if simple else "w1"
    return {
        **words, "norm": args.norm, "layers": count("layers."),
        "variant": "simplegpt" if simple else "preqknorm" if qknorm else "prenorm",
        "kv_heads": shape(f"layers.0.{att}{key}.weight")[0] // (dim // heads),
        "hidden": shape(f"layers.0.{ffn}{first}{'.lin' if simple else ''}.weight")[0]
    }


def main():
    parser = Parser(prog="from_torch", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pt file, or folder of torch.distributed.checkpoint")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    parser.add_argument("--heads", type=int, help="query heads, which tensors do not tell (nanoGPT's file does)")
    parser.add_argument("--norm", choices=("rmsnorm", "layernorm"), default="rmsnorm", help="(rmsnorm)")
    parser.add_argument("--rope-theta", type=float, default=1e4, help="(1e4)")
    parser.add_argument("--norm-eps", type=float, default=1e-5, help="(1e-5)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence (2048)")
    args = parser.parse_args()
    if args.checkpoint.is_dir():
        entries, tree = open_folder(args.checkpoint), {}
    else:
        entries, tree = torch_entries(args.checkpoint)
    theirs = tree.get("model_args")
    heads = theirs.get("n_head") if args.heads is None and isinstance(theirs, dict) else args.heads
    if not isinstance(heads, int):
        raise Refused("--heads: is missing. Give the number of query heads, which tensors do not tell.")
    weights = Weights(args.checkpoint, own_names(entries, args.checkpoint))
    words = {key: str(value) for key, value in words_of(weights.entries, heads, args).items()}
    hint = "Check --heads, or give a whole checkpoint of the paper's code or nanoGPT's."
    c = description(words, args.checkpoint, hint)
    rows = list(gpt2_rows(c, True) if "transformer.wte.weight" in weights.entries else simplegpt_rows(c))
    weights.check({row.name: row.shape for row in rows}, hint)
    write_ours(args.out, c, rows, weights)
    print(f"./train_gpt {flags(c)} --init-from {args.out}")


if __name__ == "__main__":
    run("from_torch", main)
