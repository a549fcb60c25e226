#!/usr/bin/env python3
"""Make weights for ./train_gpt --init-from from a folder of Hugging Face's transformers, and print the flags.

    import.py HF_DIR OUT.safetensors

Reads LlamaForCausalLM (Llama 1 to 3.2, TinyLlama, ...), MistralForCausalLM, GPT2LMHeadModel without biases and with
GELU by erf, and what export.py makes of all variants, from safetensors files or pytorch_model.bin. A head that is tied
to the embedding becomes one of its own. What the trainer's models cannot express is refused: RoPE scaled otherwise than
Llama 3.1's, biases, quantised weights. Dtypes stay as they are (F32, BF16, F16). Needs numpy.
"""
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from weights import LLAMA3, Parser, Refused, Weights, description, family, flags, read_json, run, simplegpt_rows, \
    write_ours

IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # buffers that older versions stored


def their_description(path):
    config = read_json(path)

    def take(*keys, **default):
        for key in keys:
            if config.get(key) is not None:
                return config[key]
        if default:
            return default["default"]
        raise Refused(f"{path}: lacks {keys[0]}. Fetch the folder again.")

    def must(what, holds, why):
        if not holds:
            raise Refused(f"{path}: {what}, {why}. Take another model.")

    kind = take("model_type")
    must("the weights are quantised", "quantization_config" not in config, "and --init-from needs them whole")
    if kind == "gpt2":
        activation = take("activation_function", default="gelu_new")
        must(f"it is of GPT-2's own kind, with biases and activation_function {activation}", activation == "gelu",
             "the trainer has no biases, and GELU by erf")
        must("its head is not the embedding", take("tie_word_embeddings", default=True), "the nanogpt backbone's is")
        must("attention is scaled otherwise", take("scale_attn_weights", default=True) and
             not take("scale_attn_by_inverse_layer_idx", default=False), "the trainer scales by 1 / sqrt(head size)")
        dim, positions = take("n_embd"), take("n_positions")
        words = {
            "backbone": "nanogpt", "variant": "prenorm", "norm": "layernorm", "dim": dim, "layers": take("n_layer"),
            "heads": take("n_head"), "kv_heads": take("n_head"), "hidden": take("n_inner", default=4 * dim),
            "vocab_size": take("vocab_size"), "rope_theta": 1e4, "seq_len": positions, "max_seq_len": positions,
            "norm_eps": take("layer_norm_epsilon", default=1e-5)
        }
        must(f"n_inner is {words['hidden']}", words["hidden"] == 4 * dim, "the trainer's is 4 n_embd")
        return words
    must(f"model_type is {kind}", kind in ("llama", "mistral", "simplegpt"),
         "the trainer knows llama, mistral, gpt2 and simplegpt")
    # transformers 5 has RoPE's settings in rope_parameters; before, its scaling, or null, was in rope_scaling
    rope = take("rope_parameters", "rope_scaling", default={})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    must(f"RoPE is scaled ({scaling})", scaling in ("default", "llama3"), "the trainer knows llama3's way alone")
    must("RoPE turns a part of each head only", rope.get("partial_rotary_factor", 1) == 1, "the trainer's turns all")
    dim, heads = take("hidden_size"), take("num_attention_heads")
    positions = take("max_position_embeddings", default=2048)
    eps, usual = ("norm_eps", 1e-5) if kind == "simplegpt" else ("rms_norm_eps", 1e-6)
    words = {
        "backbone": take("backbone", default="llama"), "variant": take("variant", default="prenorm"),
        "norm": take("norm", default="rmsnorm"), "dim": dim, "layers": take("num_hidden_layers"), "heads": heads,
        "kv_heads": take("num_key_value_heads", default=heads), "hidden": take("intermediate_size"),
        "vocab_size": take("vocab_size"), "seq_len": positions, "max_seq_len": positions,
        "rope_theta": rope.get("rope_theta", take("rope_theta", default=1e4)), "norm_eps": take(eps, default=usual)
    }
    must("head_dim is not hidden_size / num_attention_heads", take("head_dim", default=dim // heads) * heads == dim,
         "the trainer's is")
    scaled = [rope.get(name) for name in LLAMA3] if scaling == "llama3" else config.get("rope_llama3")
    if scaled:
        words["rope_scaling"] = ",".join(map(str, scaled))
    window = config.get("sliding_window", 4096) if kind == "mistral" else None
    if window and window < positions:  # within it, tokens see all before them
        words["seq_len"] = words["max_seq_len"] = window
        note(f"its tokens see {window} before them, the trainer's all: --seq-len is {window}")
    if kind != "simplegpt":
        activation = take("hidden_act", default="silu")
        must(f"hidden_act is {activation}", activation == "silu", "the trainer's is silu")
        must("it has biases", not config.get("attention_bias") and not config.get("mlp_bias"), "the trainer has none")
    return words


def note(text):
    print(f"import: warning: {text}.", file=sys.stderr)


def main():
    parser = Parser(prog="import", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with config.json and model*.safetensors or pytorch_model*.bin")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    args = parser.parse_args()
    if args.folder.is_file():
        raise Refused(f"{args.folder}: is a file. Give the folder that it lies in; a file of torch.save alone "
                      "is for from_torch.py.")
    path = args.folder / "config.json"
    try:
        words = their_description(path)
    except (AttributeError, TypeError, ZeroDivisionError):  # a list for an object, text for a number
        words = {}
    c = description({key: str(value) for key, value in words.items()}, path, "Fetch the folder again.")
    rows = list((simplegpt_rows if read_json(path)["model_type"] == "simplegpt" else family(c)[1])(c))
    weights = Weights(args.folder)
    for name in [name for name in weights.entries if name.endswith(IGNORED)]:
        if name not in {row.name for row in rows}:
            del weights.entries[name]
    if c["backbone"] == "nanogpt":
        weights.entries.pop("lm_head.weight", None)  # the embedding once more
    elif read_json(path).get("tie_word_embeddings") and "model.embed_tokens.weight" in weights.entries:
        note("its head is tied to the embedding; written as a tensor of its own, which trains apart from it")
        weights.entries["lm_head.weight"] = weights.entries["model.embed_tokens.weight"]
    weights.check({row.name: row.shape for row in rows if row.ours or row.name in weights.entries},
                  "Only models that config.json describes in full can be read.")
    for row in rows:
        if not row.ours and row.name in weights.entries and weights.read(row.name).any():
            raise Refused(f"{args.folder}: {row.name} is not zero, the trainer has no biases. Take another model.")

    write_ours(args.out, c, rows, weights)
    print(f"./train_gpt {flags(c)} --init-from {args.out}")


if __name__ == "__main__":
    run("import", main)
