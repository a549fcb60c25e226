#!/usr/bin/env python3
"""Make a folder for Hugging Face's transformers from weights of ./train_gpt.

    export.py WEIGHTS OUT_DIR [--tokenizer bytes|FILE.model|tokenizer.json|DIR] [--dtype fp32|bf16]

WEIGHTS is what --export wrote, or a checkpoint's folder (of which the weights as trained are taken, not the float32
masters: those --resume --export writes). The folder holds

    prenorm, rmsnorm, llama        LlamaForCausalLM
    prenorm, layernorm, nanogpt    GPT2LMHeadModel, with GELU by erf and biases of 0
    all others                     SimpleGPTForCausalLM and its code: from_pretrained(DIR, trust_remote_code=True)

Needs numpy. One tensor is held in memory at a time. import.py is the way back.
"""
import json
import os
import shutil
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from weights import RAW, Parser, Refused, Weights, convert, description, family, file_metadata, our_shapes, read_json, \
    run, write_json, write_weights

HERE = Path(__file__).resolve().parent
SHARD = 5 * 10**9  # bytes of a file, as transformers' own
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# names of BOS and EOS in use: Llama 2, Llama 3, GPT-2
PAIRS = (("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>", "<|endoftext|>"))


def open_model(path):
    """weights and the model's description"""
    weights, state = Weights(path), Path(path, "state.json")
    if state.exists():
        words = read_json(state).get("config", {})
    else:
        try:
            words = json.loads(weights.metadata["config"])
        except (KeyError, ValueError, TypeError):
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
    if name == "LlamaForCausalLM":
        return {
            **config, "model_type": "llama", "rms_norm_eps": c["norm_eps"], "rope_scaling": None, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1
        }
    return {**config, "model_type": "simplegpt", "backbone": c["backbone"], "variant": c["variant"], "norm": c["norm"],
            "norm_eps": c["norm_eps"],
            "auto_map": {"AutoConfig": "configuration_simplegpt.SimpleGPTConfig",
                         "AutoModelForCausalLM": "modeling_simplegpt.SimpleGPTForCausalLM"}}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: what writes files into a folder, the ids of BOS and EOS, and the number of tokens

def byte_tokenizer():
    """prepare.py's bytes as a tokenizer.json: byte-level BPE without a merge. GPT-2's byte-level alphabet shows each
    byte as a printable character: itself if it is one, else the next from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {b: chr(b) for b in printable}
    shown.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, text in enumerate(("<s>", "</s>"))]
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": {"type": "TemplateProcessing", "single": begin,
                               "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}},
            "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {shown[b]: b for b in range(256)}, "merges": []}}


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


def tokenizer_files(given, out, c):
    """writes them; the ids of BOS and EOS, None if unknown"""
    if given is None:
        return None, None
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": c["max_seq_len"]}
    fast = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    path = Path(given)
    if given == "bytes":
        write_json(out / "tokenizer.json", byte_tokenizer())
        write_json(out / "tokenizer_config.json", {**fast, "bos_token": "<s>", "eos_token": "</s>"})
        ids, size = (256, 257), 258
    elif path.is_dir():
        found = [name for name in TOKENIZER_FILES if (path / name).is_file()]
        if "tokenizer.json" not in found:
            raise Refused(f"--tokenizer: {path} holds no tokenizer.json. Give one, a sentencepiece .model, or bytes.")
        for name in found:
            shutil.copyfile(path / name, out / name)
        there = read_json(path / "tokenizer_config.json") if "tokenizer_config.json" in found else {}
        ids, named, size = fast_tokenizer(path / "tokenizer.json", read_json(path / "tokenizer.json"), there)
        if not there:
            write_json(out / "tokenizer_config.json", {**fast, "bos_token": named[0], "eos_token": named[1]})
    elif path.suffix == ".json":
        ids, named, size = fast_tokenizer(path, read_json(path), {})
        shutil.copyfile(path, out / "tokenizer.json")
        write_json(out / "tokenizer_config.json", {**fast, "bos_token": named[0], "eos_token": named[1]})
    else:
        ids, named, size = sentencepiece(path)
        shutil.copyfile(path, out / "tokenizer.model")
        write_json(out / "tokenizer_config.json",
                   {**settings, "tokenizer_class": "LlamaTokenizer", "bos_token": named[0], "eos_token": named[1],
                    "unk_token": named[2], "add_bos_token": True, "add_eos_token": False, "legacy": True})
    if size > c["vocab_size"]:
        raise Refused(f"--tokenizer: has {size} tokens, the model {c['vocab_size']}. Give the tokenizer of its data.")
    return ids


def sentencepiece(path):
    import convert_tokenizer
    try:
        model = path.read_bytes()
        convert_tokenizer.convert(model)  # refuses what the trainer could not have used
        pieces, trainer = [], {}
        for number, value in convert_tokenizer.fields(model):
            if number == 1:
                pieces.append(dict(convert_tokenizer.fields(value)).get(1, b""))
            elif number == 2:
                trainer.update(convert_tokenizer.fields(value))
    except convert_tokenizer.Refused as e:
        raise Refused(f"{path}: {e}. Give a sentencepiece BPE model, a tokenizer.json, a folder, or bytes.") from None
    named = [trainer.get(field) or name for field, name in ((46, b"<s>"), (47, b"</s>"), (45, b"<unk>"))]
    return [pieces.index(name) for name in named[:2]], [name.decode() for name in named], len(pieces)


def main():
    parser = Parser(prog="export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="file of --export, or folder of a checkpoint")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--tokenizer", metavar="WHAT", help="bytes, sentencepiece .model, tokenizer.json, its folder")
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
        bos, eos = tokenizer_files(args.tokenizer, unfinished, c)
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
