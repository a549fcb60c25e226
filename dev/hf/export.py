#!/usr/bin/env python3
"""Make a folder for Hugging Face's transformers from weights of ./train_gpt.

    export.py WEIGHTS OUT_DIR [--tokenizer bytes|FILE.model|RANKS|tokenizer.json|DIR] [--dtype fp32|bf16]

WEIGHTS is what --export wrote, a checkpoint's folder, or a run's, which means its newest whole checkpoint. Of a
checkpoint the weights as trained are taken, not the float32 masters: those --resume --export writes. OUT_DIR then holds

    prenorm, rmsnorm, llama        LlamaForCausalLM
    prenorm, layernorm, nanogpt    GPT2LMHeadModel, with GELU by erf and biases of 0
    all others                     SimpleGPTForCausalLM and its code: from_pretrained(DIR, trust_remote_code=True)

A sentencepiece BPE .model, a rank file (Llama 3's tokenizer.model) and a tekken.json become a tokenizer.json with the
same ids. Needs numpy. One tensor is held in memory at a time. import.py is the way back.
"""
import json
import os
import re
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from tokenizer_json import PRESETS, byte_tokenizer, of_file
from weights import LLAMA3, RAW, Parser, Refused, Weights, convert, convert_tokenizer, description, family, \
    file_metadata, our_shapes, read_json, read_whole, run, scaling_numbers, write_json, write_weights

HERE = Path(__file__).resolve().parent
SHARD = 5 * 10**9  # bytes of a file, as transformers' own
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# names of BOS and EOS in use: Llama 2, Llama 3, GPT-2
PAIRS = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>", "<|endoftext|>"))


def open_model(path):
    """weights and the model's description; of a run's folder the newest checkpoint that is whole"""
    steps = [step for step in Path(path).glob("step_*") if re.fullmatch(r"step_\d{8,}", step.name)]
    steps.sort(key=lambda step: int(step.name[5:]))
    if not steps or Path(path, "state.json").exists() or Path(path, "model.safetensors").exists():
        return open_weights(path)
    trouble = []
    for step in reversed(steps):
        try:
            found = open_weights(step)
        except (OSError, Refused) as e:
            trouble.append(f"{e.filename}: {e.strerror}." if isinstance(e, OSError) else str(e))
            continue
        if trouble:
            print(f"export: warning: {trouble[0]} Taking {step} instead.", file=sys.stderr)
        return found
    raise Refused(f"{trouble[0]} No other checkpoint in {path} is whole.")


def open_weights(path):
    weights, state = Weights(path), Path(path, "state.json")
    try:
        manifest = read_json(state) if state.exists() else {"config": json.loads(weights.metadata["config"])}
        words, files = manifest["config"], manifest.get("files", {})
        for name, size in ((name, files[name]["bytes"]) for name in files if name.startswith("model")):
            there = Path(path, name).stat().st_size
            if there != size:
                raise Refused(f"{Path(path, name)}: has {there} bytes, {size} were written. Give another checkpoint.")
    except (AttributeError, KeyError, ValueError, TypeError):
        words = {}
    hint = "Export it again: ./train_gpt --steps 0 --init-from FILE --export NEW, with the model's flags."
    c = description(words, path, hint)
    weights.check(our_shapes(c), hint)
    return weights, c


def config_json(c, name, dtype, bos, eos):
    config = {"architectures": [name], "torch_dtype": NAMES[dtype], "vocab_size": c["vocab_size"], "bos_token_id": bos,
              "eos_token_id": eos, "initializer_range": 0.02, "use_cache": True}
    if name == "GPT2LMHeadModel":
        return {
            **config, "model_type": "gpt2", "n_positions": c["max_seq_len"], "n_embd": c["dim"], "n_layer": c["layers"],
            "n_head": c["heads"], "n_inner": c["hidden"], "activation_function": "gelu",
            "layer_norm_epsilon": c["norm_eps"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
            "tie_word_embeddings": True
        }
    config.update({"hidden_size": c["dim"], "intermediate_size": c["hidden"], "num_hidden_layers": c["layers"],
                   "num_attention_heads": c["heads"], "num_key_value_heads": c["kv_heads"],
                   "head_dim": c["dim"] // c["heads"], "max_position_embeddings": c["max_seq_len"],
                   "rope_theta": c["rope_theta"], "tie_word_embeddings": False})
    scaling = scaling_numbers(c) if "rope_scaling" in c else None
    if name == "LlamaForCausalLM":
        return {
            **config, "model_type": "llama", "rms_norm_eps": c["norm_eps"],
            "rope_scaling": scaling and dict(zip(LLAMA3, scaling), rope_type="llama3"), "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1
        }
    return {**config, "model_type": "simplegpt", "backbone": c["backbone"], "variant": c["variant"], "norm": c["norm"],
            "norm_eps": c["norm_eps"], "rope_llama3": scaling,
            "auto_map": {"AutoConfig": "configuration_simplegpt.SimpleGPTConfig",
                         "AutoModelForCausalLM": "modeling_simplegpt.SimpleGPTForCausalLM"}}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

def fast_tokenizer(path, tokenizer, settings):
    """ids of BOS and EOS, and how many tokens there are"""
    try:
        ids = {**tokenizer["model"]["vocab"]} if isinstance(tokenizer["model"]["vocab"], dict) else \
            {piece[0]: i for i, piece in enumerate(tokenizer["model"]["vocab"])}
        ids.update({t["content"]: t["id"] for t in tokenizer["added_tokens"]})
        named = []
        for key in ("bos_token", "eos_token"):
            token = settings.get(key)
            named.append(token["content"] if isinstance(token, dict) else token)
        if named[1] is None:
            named = next((pair for pair in PAIRS if pair[0] in ids and pair[1] in ids), (None, None))
        return [ids.get(name) for name in named], named, max(ids.values()) + 1
    except (KeyError, TypeError, ValueError, IndexError):
        raise Refused(f"{path}: not a tokenizer.json as transformers has it. Give one.") from None


def tokenizer_files(given, preset, out, c):
    """writes them; the ids of BOS and EOS, None if unknown"""
    if given is None:
        return None, None
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": c["max_seq_len"],
                "tokenizer_class": "PreTrainedTokenizerFast"}
    path, written, there = Path(given), None, {}
    if given == "bytes":
        written, named, ids, size = byte_tokenizer(), ("<s>", "</s>", None), (256, 257), 258
    elif path.is_dir():
        found = [name for name in TOKENIZER_FILES if (path / name).is_file()]
        if "tokenizer.json" not in found:
            raise Refused(f"--tokenizer: {path} holds no tokenizer.json. Give one, a sentencepiece .model, a rank "
                          "file, or bytes.")
        for name in found:
            shutil.copyfile(path / name, out / name)
        there = read_json(path / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
        ids, named, size = fast_tokenizer(path / "tokenizer.json", read_json(path / "tokenizer.json"), there)
    elif convert_tokenizer.is_json(data := read_whole(path, "Give the tokenizer of the data.")) and \
            not convert_tokenizer.is_tekken(data):
        ids, named, size = fast_tokenizer(path, read_json(path), {})
        (out / "tokenizer.json").write_bytes(data)
    else:
        written, named, ids, size = of_file(path, data, preset)
        if not written["pre_tokenizer"]:  # sentencepiece's, which other programs want
            (out / "tokenizer.model").write_bytes(data)
    if written:
        write_json(out / "tokenizer.json", written)
    if not there:
        keys = ("bos_token", "eos_token", "unk_token")
        write_json(out / "tokenizer_config.json",
                   {**settings, **{key: name for key, name in zip(keys, named) if name is not None}})
    if size > c["vocab_size"]:
        raise Refused(f"--tokenizer: has {size} tokens, the model {c['vocab_size']}. Give the tokenizer of its data.")
    return ids


def main():
    parser = Parser(prog="export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="file of --export, or folder of a checkpoint or a run")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--tokenizer", metavar="WHAT",
                        help="bytes, sentencepiece .model, rank file (Llama 3's), tokenizer.json, its folder, tekken.json")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="whose rules a rank file has, if its size does not tell")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights (as they are)")
    parser.add_argument("--shard-size", type=float, default=SHARD, metavar="BYTES", help="of a file, at most (5e9)")
    args = parser.parse_args()
    weights, c = open_model(args.weights)
    name, rows = family(c)
    if args.out.exists():
        raise Refused(f"{args.out}: exists already. Remove it, or choose another folder.")
    wanted = {"fp32": "F32", "bf16": "BF16", None: None}[args.dtype]

    def tensor(row):
        dtype = wanted or weights.dtype(row.ours[0] if row.ours else "norm.weight")
        from_ = [weights.dtype(our) for our in row.ours]

        def values():
            return row.theirs([convert(weights.read(our), old, dtype) for our, old in zip(row.ours, from_)], RAW[dtype])
        return row.name, dtype, row.shape, values

    tensors = [tensor(row) for row in rows(c)]
    unfinished = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        bos, eos = tokenizer_files(args.tokenizer, args.preset, unfinished, c)
        write_json(unfinished / "config.json", config_json(c, name, tensors[0][1], bos, eos))
        write_json(unfinished / "generation_config.json",
                   {key: value for key, value in (("bos_token_id", bos), ("eos_token_id", eos)) if value is not None})
        if name == "SimpleGPTForCausalLM":
            for code in ("configuration_simplegpt.py", "modeling_simplegpt.py"):
                shutil.copyfile(HERE / code, unfinished / code)
        write_weights(unfinished / "model.safetensors", tensors,
                      file_metadata(c) if name == "SimpleGPTForCausalLM" else {"format": "pt"}, args.shard_size)
        os.rename(unfinished, args.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    own_code = ", trust_remote_code=True" if name == "SimpleGPTForCausalLM" else ""
    print(f"{name}, {NAMES[tensors[0][1]]}: AutoModelForCausalLM.from_pretrained('{args.out}'{own_code})")


if __name__ == "__main__":
    run("export", main)
