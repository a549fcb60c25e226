"""What export.py, import.py and from_torch.py share: safetensors files, a model's description and its tensors' names.

A description is a dict with the words of state.json and of an export's metadata: backbone, variant, norm, dim, layers,
heads, kv_heads, hidden, vocab_size, rope_theta, norm_eps, seq_len, max_seq_len, and rope_scaling where RoPE is scaled.
Tensors pass one at a time.
"""
import functools
import json
import os
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
import convert_tokenizer  # noqa: E402,F401: the programs here use all of these
from common import Parser, Refused, read_whole, run, write_whole  # noqa: E402,F401

try:
    import numpy as np
except ImportError:
    sys.exit(
        f"{Path(sys.argv[0]).stem}: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")
import torch_file  # noqa: E402

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2}
RAW = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}  # bf16 as its bits, numpy has no such type


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: uint64 length of a JSON header, the header (name: dtype, shape, data_offsets), then the data

class Weights:
    """The tensors of a file, or of a folder's model.safetensors, or of those that its index names; of pytorch_model.bin
    where there is no safetensors file. entries: name: (dtype, shape, function that gives the raw values)"""

    def __init__(self, path, entries=None):
        self.path, self.metadata, self.entries = path, {}, {}
        if entries is not None:
            self.entries = entries
            return
        for file in self.files(Path(path)):
            refuse_pipe(file)
            with open(file, "rb") as f:
                saved = f.read(4) in torch_file.MAGICS
            for name, entry in torch_entries(file)[0].items() if saved else self.header(file):
                if name in self.entries:
                    raise Refused(f"{file}: holds {name}, which another file of the folder has too. Write it again.")
                self.entries[name] = entry

    @staticmethod
    def files(path):
        if not path.is_dir():
            return [path]
        for name in ("model.safetensors", "pytorch_model.bin"):
            whole, index = path / name, path / f"{name}.index.json"
            if whole.exists():
                return [whole]
            if index.exists():
                break
        else:
            raise Refused(f"{path}: holds neither model.safetensors nor model.safetensors.index.json, and no "
                          "pytorch_model.bin. Give a file, or a folder with one of them.")
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            if not all(name and "/" not in name and name not in (".", "..") for name in names):
                raise TypeError
        except (AttributeError, KeyError, TypeError):
            raise Refused(f"{index}: its weight_map is missing or broken. Fetch the folder again.") from None
        return [path / name for name in names]

    def header(self, file):
        size = os.path.getsize(file)
        try:
            with open(file, "rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                if length > size - 8:
                    raise ValueError
                header = json.loads(f.read(length))
            self.metadata.update(header.pop("__metadata__", {}))
            for name, t in header.items():
                begin, end = t["data_offsets"]
                count = int(np.prod(t["shape"], dtype=np.int64))
                if not 0 <= begin <= end <= size - 8 - length or end - begin != count * WIDTHS.get(t["dtype"], 0) \
                        and t["dtype"] in WIDTHS:
                    raise Refused(f"{file}: the data of {name} lies outside the file or has the wrong size. "
                                  "It was cut short: fetch or write it again.")
                shape, at = tuple(t["shape"]), 8 + length + begin
                yield name, (t["dtype"], shape, functools.partial(read_raw, file, at, t["dtype"], shape))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error):
            raise Refused(f"{file}: no safetensors file. Give one, or a folder that holds some.") from None

    def shape(self, name):
        return self.entries[name][1]

    def dtype(self, name):
        return self.entries[name][0]

    def read(self, name):
        return self.entries[name][2]()

    def check(self, shapes, hint):
        """names and shapes are those expected, and no others; dtypes are known"""
        for name, shape in shapes.items():
            if name not in self.entries:
                raise Refused(f"{self.path}: lacks the tensor {name}. {hint}")
            if self.shape(name) != shape:
                raise Refused(f"{self.path}: {name} is {self.shape(name)} there, {shape} by the configuration. {hint}")
            if self.dtype(name) not in WIDTHS:
                raise Refused(f"{self.path}: {name} is {self.dtype(name)}. Only F32, BF16 and F16 can be read.")
        for name in self.entries:
            if name not in shapes:
                raise Refused(f"{self.path}: holds {name}, which such a model lacks. {hint}")


def read_raw(file, at, dtype, shape):
    with open(file, "rb") as f:
        f.seek(at)
        return np.fromfile(f, RAW[dtype], int(np.prod(shape, dtype=np.int64))).reshape(shape)


def torch_entries(file):
    """of a file of torch.save; and all that it holds"""
    tree, read = torch_file.load(file)
    tensors = torch_file.tensors(tree)
    if tensors is None:
        raise Refused(f"{file}: holds no state_dict. Save model.state_dict() with torch.save.")
    return {name: (t.dtype, t.shape, functools.partial(read, t)) for name, t in tensors.items()}, tree


def convert(data, old, new):
    """raw values of one dtype as those of another; to bf16 rounded to nearest, ties to even, NaN kept"""
    if old == new:
        return data
    out = np.empty(data.shape, RAW[new])
    parts = np.array_split(data.reshape(-1), data.size // (1 << 22) + 1)
    for part, to in zip(parts, np.array_split(out.reshape(-1), len(parts))):
        values = (part.astype(np.uint32) << 16).view(np.float32) if old == "BF16" else part.astype(np.float32)
        if new != "BF16":
            to[:] = values
        else:
            bits = values.view(np.uint32)
            to[:] = np.where(np.isnan(values), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return out


def write_weights(path, tensors, metadata, limit=None):
    """tensors: (name, dtype, shape, function that gives the raw values). To `path`, or, beyond `limit` bytes, to
    STEM-0000I-of-0000K.safetensors and an index beside it, as Hugging Face has them."""
    def size(t):
        return int(np.prod(t[2], dtype=np.int64)) * WIDTHS[t[1]]

    files, room = [[]], 0
    for t in tensors:
        if limit and files[-1] and room + size(t) > limit:
            files.append([])
            room = 0
        files[-1].append(t)
        room += size(t)
    if len(files) == 1:
        return write_file(path, tensors, metadata, size)
    names = [f"{path.stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for name, part in zip(names, files):
        write_file(path.with_name(name), part, metadata, size)
    write_json(f"{path}.index.json", {"metadata": {"total_size": sum(map(size, tensors))},
                                      "weight_map": {t[0]: name for name, part in zip(names, files) for t in part}})


def write_file(path, tensors, metadata, size):
    header, at = {"__metadata__": metadata}, 0
    for t in tensors:
        header[t[0]] = {"dtype": t[1], "shape": t[2], "data_offsets": [at, at + size(t)]}
        at += size(t)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts():
        yield struct.pack("<Q", len(text)) + text
        for name, dtype, shape, values in tensors:
            data = np.ascontiguousarray(values(), RAW[dtype])
            assert data.size * WIDTHS[dtype] == size((name, dtype, shape)), name
            yield data

    write_whole(path, parts())


def refuse_pipe(path):
    if Path(path).is_fifo():
        raise Refused(f"{path}: is a pipe. Give a file.")


def read_json(path):
    refuse_pipe(path)
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError):
        raise Refused(f"{path}: not valid JSON. Fetch or write it again.") from None


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_ours(path, c, rows, weights):
    """our tensors, of the rows' in `weights`"""
    shapes, held = our_shapes(c), {}

    def tensor(row, i):
        def values():
            if held.get("row") is not row:
                held.update(row=row, values=row.our(weights.read(row.name)))
            return held["values"][i]
        return row.ours[i], weights.dtype(row.name), shapes[row.ours[i]], values

    write_weights(path, [tensor(row, i) for row in rows for i in range(len(row.ours))], file_metadata(c))


# ---------------------------------------------------------------------------------------------------------------------
# The model's description

WORDS = {
    "backbone": ("llama", "nanogpt"), "variant": ("simplegpt", "prenorm", "preqknorm"), "norm": ("rmsnorm", "layernorm")
}
STORAGE = ("precision", "gradients", "moments", "master")  # in state.json beside the model's own
NUMBERS = ("dim", "layers", "heads", "kv_heads", "hidden", "vocab_size", "seq_len", "max_seq_len")


def description(words, where, hint):
    """from an export's metadata or a checkpoint's state.json, where every value is text"""
    try:
        c = {key: words[key] for key in WORDS}
        c.update({key: int(words[key]) for key in NUMBERS})
        # the trainer's are float32: the shortest decimal that means the same, 1e-05 and not 9.99999975e-06
        c.update({key: float(str(np.float32(words[key]))) for key in ("rope_theta", "norm_eps")})
        if words.get("rope_scaling", "none") != "none":
            *three, original = words["rope_scaling"].split(",")
            c["rope_scaling"] = ",".join([*(f"{float(np.float32(x)):.9g}" for x in three), str(int(original))])
            factor, low, high, original = scaling_numbers(c)
            if not factor >= 1 or not 0 < low < high or not 1 <= original < 1 << 31:
                raise ValueError
        known = all(c[key] in WORDS[key] for key in WORDS)
        if not known or min(c[key] for key in NUMBERS) < 1 or c["layers"] > 1 << 16 or c["dim"] % c["heads"]:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise Refused(f"{where}: its description of the model is incomplete or broken. {hint}") from None
    strange = set(words) - {*c, *STORAGE}
    if strange:
        raise Refused(f"{where}: its model has {min(strange)}, which is not known here. Take the tools of its trainer.")
    return c


# RoPE's scaling in the order of --rope-scaling, as transformers calls its numbers
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def scaling_numbers(c):
    *three, original = c["rope_scaling"].split(",")
    return [*(float(str(np.float32(x))) for x in three), int(original)]


def file_metadata(c):
    return {"format": "pt", "config": json.dumps({key: str(value) for key, value in c.items()})}


def flags(c):
    """of ./train_gpt, for this model"""
    multiple, factor = hidden_flags(c["dim"], c["hidden"])
    words = ["--backbone", c["backbone"], "--variant", c["variant"], "--norm", c["norm"], "--dim", c["dim"], "--layers",
             c["layers"], "--heads", c["heads"], "--vocab-size", c["vocab_size"], "--norm-eps", f"{c['norm_eps']:g}",
             "--seq-len", c["seq_len"]]
    if c["backbone"] == "llama":
        words += ["--kv-heads", c["kv_heads"], "--multiple-of", multiple, "--ffn-mult", factor, "--rope-theta",
                  f"{c['rope_theta']:.9g}", *(["--rope-scaling", c["rope_scaling"]] if "rope_scaling" in c else [])]
    else:
        words += ["--max-seq-len", c["max_seq_len"]]
    return " ".join(map(str, words))


def hidden_flags(dim, hidden):
    """--multiple-of and --ffn-mult that give this feed-forward width: the flavours' own if they do"""
    base = 2 * 4 * dim // 3
    for multiple, factor in ((256, 1), (1024, 1.3), (4096, 1.3), (hidden, 1)):
        if -(-int(np.float32(factor) * np.float64(base)) // multiple) * multiple == hidden:
            return multiple, factor
    return hidden, max(hidden * 1000 // base / 1000, 0.001)


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes. Ours are those of the paper's released code; a linear's weight is (outputs, inputs).

def our_shapes(c):
    """name: shape of every tensor, in the trainer's order"""
    dim, kv, hidden = c["dim"], c["dim"] // c["heads"] * c["kv_heads"], c["hidden"]
    simple, qknorm, llama = c["variant"] == "simplegpt", c["variant"] == "preqknorm", c["backbone"] == "llama"
    lin, att, ffn = (".lin" if simple else ""), ("attention." if llama else ""), ("feed_forward." if llama else "")
    sn = ("sn" if simple else "w") if llama else ""
    first, second = (("sn1", "sn3"), "sn2") if simple else (("w1", "w3"), "w2")
    if not llama:
        first, second = ("fc",), "proj"
    norm1, norm2 = ("attention_norm", "ffn_norm") if llama else ("norm1", "norm2")

    shapes = {"tok_embeddings.weight" if llama else "wte.weight": (c["vocab_size"], dim)}
    if not llama:
        shapes["wpe.weight"] = c["max_seq_len"], dim
    for i in range(c["layers"]):
        linears = [(att + sn + "q", dim, dim), (att + sn + "k", kv, dim), (att + sn + "v", kv, dim),
                   (att + sn + "o", dim, dim), *((ffn + name, hidden, dim) for name in first),
                   (ffn + second, dim, hidden)]
        for name, outputs, inputs in linears:
            shapes[f"layers.{i}.{name}{lin}.weight"] = outputs, inputs
            if simple:
                shapes[f"layers.{i}.{name}.norm.weight"] = (outputs,)
        if qknorm:
            shapes[f"layers.{i}.{att}q_norm.weight"], shapes[f"layers.{i}.{att}k_norm.weight"] = (dim,), (kv,)
        if not simple:
            shapes[f"layers.{i}.{norm1}.weight"] = shapes[f"layers.{i}.{norm2}.weight"] = (dim,)
    shapes["norm.weight"] = (dim,)
    if llama:
        shapes["output.weight"] = c["vocab_size"], dim
    return shapes


class Row:
    """A tensor of another program's model and ours that it holds, stacked if several. The shape is theirs; raw values
    pass both ways."""

    def __init__(self, name, shape, ours=(), heads=0, transposed=False):
        self.name, self.shape, self.ours, self.heads, self.transposed = name, tuple(shape), ours, heads, transposed

    def theirs(self, values, raw):
        """values: of our tensors; raw: the numpy type, for what we have not (a bias of zero)"""
        if not values:
            return np.zeros(self.shape, raw)
        if self.heads:
            return self.rotary(values[0], self.shape[0] // self.heads // 2, 2)
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        return whole.T if self.transposed else whole

    def our(self, value):
        if self.heads:
            return [self.rotary(value, 2, self.shape[0] // self.heads // 2)]
        return np.split(value.T if self.transposed else value, len(self.ours))

    def rotary(self, value, slow, fast):
        """RoPE turns rows 2i and 2i+1 of a head here, rows i and i + HS/2 there: (pairs, 2) to (2, pairs), or back"""
        return value.reshape(self.heads, slow, fast, -1).swapaxes(1, 2).reshape(self.shape)


def llama_rows(c):
    """LlamaForCausalLM: prenorm with rmsnorm on the llama backbone"""
    dim, kv, hidden = c["dim"], c["dim"] // c["heads"] * c["kv_heads"], c["hidden"]
    yield Row("model.embed_tokens.weight", (c["vocab_size"], dim), ["tok_embeddings.weight"])
    for i in range(c["layers"]):
        for their, shape, our, heads in (
                ("self_attn.q_proj", (dim, dim), "attention.wq", c["heads"]),
                ("self_attn.k_proj", (kv, dim), "attention.wk", c["kv_heads"]),
                ("self_attn.v_proj", (kv, dim), "attention.wv", 0), ("self_attn.o_proj", (dim, dim), "attention.wo", 0),
                ("mlp.gate_proj", (hidden, dim), "feed_forward.w1", 0),
                ("mlp.up_proj", (hidden, dim), "feed_forward.w3", 0),
                ("mlp.down_proj", (dim, hidden), "feed_forward.w2", 0),
                ("input_layernorm", (dim,), "attention_norm", 0),
                ("post_attention_layernorm", (dim,), "ffn_norm", 0)):
            yield Row(f"model.layers.{i}.{their}.weight", shape, [f"layers.{i}.{our}.weight"], heads)
    yield Row("model.norm.weight", (dim,), ["norm.weight"])
    yield Row("lm_head.weight", (c["vocab_size"], dim), ["output.weight"])


def gpt2_rows(c, nanogpt=False):
    """GPT2LMHeadModel: prenorm with layernorm on the nanogpt backbone. Its linears are stored (inputs, outputs), and it
    has biases, which are 0 here. nanoGPT's own model has the same names, but (outputs, inputs) and no biases."""
    dim, hidden = c["dim"], c["hidden"]
    yield Row("transformer.wte.weight", (c["vocab_size"], dim), ["wte.weight"])
    yield Row("transformer.wpe.weight", (c["max_seq_len"], dim), ["wpe.weight"])
    for i in range(c["layers"]):
        for their, shape, our in (("ln_1", (dim,), ["norm1"]), ("attn.c_attn", (dim, 3 * dim), "qkv"),
                                  ("attn.c_proj", (dim, dim), "o"), ("ln_2", (dim,), ["norm2"]),
                                  ("mlp.c_fc", (dim, hidden), ["fc"]), ("mlp.c_proj", (hidden, dim), ["proj"])):
            ours, linear = [f"layers.{i}.{name}.weight" for name in our], len(shape) == 2
            yield Row(f"transformer.h.{i}.{their}.weight", shape[::-1] if nanogpt else shape, ours,
                      transposed=linear and not nanogpt)
            if not nanogpt:
                yield Row(f"transformer.h.{i}.{their}.bias", shape[-1:])
    yield Row("transformer.ln_f.weight", (dim,), ["norm.weight"])
    if not nanogpt:
        yield Row("transformer.ln_f.bias", (dim,))


def simplegpt_rows(c):
    """modeling_simplegpt.py has our names"""
    for name, shape in our_shapes(c).items():
        yield Row(name, shape, [name])


def family(c):
    """the transformers class that is this model, and its rows"""
    if c["variant"] == "prenorm" and (c["backbone"], c["norm"]) == ("llama", "rmsnorm"):
        return "LlamaForCausalLM", llama_rows
    if c["variant"] == "prenorm" and (c["backbone"], c["norm"]) == ("nanogpt", "layernorm"):
        return "GPT2LMHeadModel", gpt2_rows
    return "SimpleGPTForCausalLM", simplegpt_rows
