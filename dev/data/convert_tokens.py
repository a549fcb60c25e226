#!/usr/bin/env python3
"""Turn tokens that another trainer has prepared into token shards: OUT/PREFIX_train_000000.bin, ...

    convert_tokens.py owt/train.bin --val owt/val.bin --out data/owt   # nanoGPT: uint16 without a header
    convert_tokens.py corpus_text_document.idx --out data/mine         # Megatron: an index beside its .bin

What begins as Megatron's index, or has one beside it (X.idx beside X.bin), is that pair, whose index says where
documents end and which type its tokens have; any other file is tokens of --dtype without a header. Tokens are copied as
they are, in order; no BOS or EOS is added. Validation is --val, else every k-th document, k = 1/F of --val-fraction F;
without an index, or of fewer than k documents, it is the end. Shards and manifest are as prepare.py's, whose --verify
checks them; the manifest's vocab_size is --vocab-size, or the largest token and 1. Older shards of the same OUT and
PREFIX are replaced once the new ones are whole. Memory: 100 MB, and 100 bytes a document of an index.
"""
import argparse
import dataclasses
import os
import struct
import sys
from pathlib import Path

from common import Parser, Refused, in_range, read_whole, run, warn

try:
    import numpy as np
except ImportError:
    sys.exit("convert_tokens: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")

from reading import FORMATS, HEAD, LFS, UNPACK, kind_of, told
from shards import CHUNK, Output

MAGIC, HEADER = b"MMIDIDX\0\0", struct.Struct("<9sQBQQ")  # version, type, number of sequences, of documents and 1
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
MOST = 1 << 24  # tokens of any vocabulary
NO_TOKENS = (*FORMATS, *UNPACK, "tar", "zip", "a Numpy file", "a shard of tokens")


@dataclasses.dataclass
class Tokens:
    path: Path
    dtype: np.dtype
    ends: np.ndarray  # of the documents, in tokens; the last is their number

    def __len__(self):
        return int(self.ends[-1])

    def part(self, begin, end):
        """arrays of the tokens from begin to end"""
        with open(self.path, "rb") as f:
            f.seek(begin * self.dtype.itemsize)
            while begin < end:
                ids = np.fromfile(f, self.dtype, min(end - begin, CHUNK))
                if not len(ids):
                    raise Refused(f"{self.path}: ends before token {begin} of {end}; it was cut short. Fetch it again.")
                yield ids
                begin += len(ids)

    def largest(self):
        most = at = 0
        for ids in self.part(0, len(self)):
            if ids.min() < 0:
                raise Refused(f"{self.path}: token {at + int(ids.argmin())} is {ids.min()}. Give ids of tokens.")
            most, at = max(most, int(ids.max())), at + len(ids)
        return most


def open_tokens(name, dtype):
    path = Path(name)
    if path.is_fifo():
        raise Refused(f"{name}: is a pipe, and is read twice. Give a file.")
    with told(name), open(path, "rb") as f:
        head = f.read(HEAD)
    beside = path.with_suffix(".idx")
    if head.startswith(MAGIC[:7]):
        return megatron(path, path.with_suffix(".bin"))
    if path.suffix == ".bin" and beside.is_file():
        return megatron(beside, path)
    kind = kind_of(name, head)
    if kind in NO_TOKENS or head.startswith(LFS):
        raise Refused(f"{name}: {kind}, no tokens without a header. Unpack it; for text there is prepare.py.")
    words = np.frombuffer(head[:len(head) // 4 * 4], "<u2").reshape(-1, 2)
    if dtype == "uint16" and len(words) > 64 and words[:, 1].max() < 256 <= words[:, 0].max():
        raise Refused(f"{name}: every second number of 16 bits is below 256, as in tokens of 32. Give --dtype uint32.")
    dtype, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size
    if not size or size % dtype.itemsize:
        raise Refused(f"{name}: {size} bytes are no tokens of {dtype.itemsize}. Give their type: --dtype.")
    return Tokens(path, dtype, np.array([size // dtype.itemsize]))


def megatron(index, path):
    """The index: HEADER, then of each sequence its tokens (int32) and its byte in .bin (int64), then the number of
    sequences before each document, and before the end (int64)"""
    advice, data = "Write the pair again, or fetch it whole.", read_whole(index, "Give both files of the pair.")
    magic, version, code, sequences, documents = HEADER.unpack(data[:HEADER.size].ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in TYPES:
        raise Refused(f"{index}: is no index of Megatron's version 1 with tokens of a type of integers. {advice}")
    promised = HEADER.size + 12 * sequences + 8 * documents
    if len(data) not in (promised, promised + sequences):  # with the kind of each sequence behind them
        raise Refused(f"{index}: has {len(data)} bytes, its header promises {promised}. {advice}")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size).astype(np.int64)
    places = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    firsts = np.frombuffer(data, "<i8", documents, HEADER.size + 12 * sequences)
    dtype, ends = np.dtype(TYPES[code]), np.concatenate(([0], np.cumsum(lengths)))
    if not ends[-1] or lengths.min() < 0 or (places != ends[:-1] * dtype.itemsize).any():
        raise Refused(f"{index}: its sequences are empty, or do not lie one behind the other. {advice}")
    if documents < 2 or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise Refused(f"{index}: its documents are not made of its sequences, in order. {advice}")
    with told(str(path)):
        size = path.stat().st_size
    if size != ends[-1] * dtype.itemsize:
        raise Refused(f"{path}: has {size} bytes, {index.name} promises {ends[-1] * dtype.itemsize}. {advice}")
    return Tokens(path, dtype, np.unique(ends[firsts][ends[firsts] > 0]))  # without empty documents


def run_together(tokens):
    """do the first documents end with different tokens?"""
    last = {int(next(tokens.part(end - 1, end))[0]) for end in map(int, tokens.ends[:100])}
    return len(last) > 1


def parts(tokens, fraction):
    """(split, first token, end, documents): every k-th document is for validation, or the end"""
    bounds, n, every = [0, *map(int, tokens.ends)], len(tokens.ends), round(1 / fraction) if fraction else 0
    if n < every:
        cut = int(len(tokens) * (1 - fraction))
        return [("train", 0, cut, n), ("val", cut, len(tokens), 1)]
    cuts, every = [], every or n + 1
    for begin in range(0, n, every):
        end = min(begin + every, n + 1) - 1
        cuts.append(("train", bounds[begin], bounds[end], end - begin))
        if end < n:
            cuts.append(("val", bounds[end], bounds[end + 1], 1))
    return cuts


def main():
    parser = Parser(prog="convert_tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="TOKENS", help="a file of tokens, or one of Megatron's pair")
    parser.add_argument("--val", metavar="TOKENS", help="another one, for validation")
    parser.add_argument("--dtype", choices=("uint16", "uint32"), default="uint16",
                        help="of tokens without a header (uint16)")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="all ids are below N (the largest and 1)")
    parser.add_argument("--out", default="data", metavar="DIR", help="where the shards go; made if missing (data)")
    parser.add_argument("--prefix", help="how their names start (the input without its suffix)")
    parser.add_argument("--val-fraction", type=float, metavar="F",
                        help="part for validation, 0 to 0.5; 0: none (0.1; with --val 0)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard (100000000)")
    args = parser.parse_args()
    fraction = (0 if args.val else 0.1) if args.val_fraction is None else args.val_fraction
    if args.val and fraction:
        raise Refused("--val-fraction: --val is all of the validation. Give one of them.")
    in_range("--val-fraction", fraction or None, 1e-9, 0.5)
    in_range("--vocab-size", args.vocab_size, 1, 2**31)
    in_range("--shard-tokens", args.shard_tokens, 1, 2**31 - 1)
    inputs = [open_tokens(name, args.dtype) for name in (args.input, args.val) if name]
    most = max(tokens.largest() for tokens in inputs)
    if most >= MOST:
        raise Refused(f"{args.input}: has token {most}, which is of no vocabulary. Give their type: --dtype.")
    V = args.vocab_size or most + 1
    if most >= V:
        raise Refused(f"{args.input}: has token {most}, --vocab-size is {V}. Give the vocabulary's size.")
    out, prefix = Path(args.out), args.prefix or Path(os.path.abspath(args.input)).stem
    if "/" in prefix:
        raise Refused(f"--prefix: {prefix} is no file name. Give the directory with --out.")
    if (out / f"{prefix}_state.json").exists():
        raise Refused(f"{out}: prepare.py was interrupted there. Let it end, or give another --out or --prefix.")
    out.mkdir(parents=True, exist_ok=True)
    output = Output(out, prefix, V, args.shard_tokens, {}, restart=True)
    try:
        for tokens, name in zip(inputs, ("train", "val")):
            if len(tokens.ends) > 1 and run_together(tokens):
                warn(f"{tokens.path}: its documents end with different tokens (made without --append-eod), so nothing "
                     "parts them in the shards.")
            for split, begin, end, documents in parts(tokens, fraction):
                split = output.splits[split if name == "train" else name]
                for ids in tokens.part(begin, end):
                    split.add(ids, 0, 0)
                split.documents += documents
        if not output.splits["train"].tokens or (fraction and not output.splits["val"].tokens):
            raise Refused(f"{args.input}: too few tokens. Give more, or --val-fraction 0.")
        for split in output.splits.values():
            split.close()
        output.publish({
            "tokenizer": None, "tokenizer_sha256": None, "vocab_size": V, "bos": None, "eos": None,
            "sources": len(inputs), "documents": sum(len(tokens.ends) for tokens in inputs),
            "shard_tokens": args.shard_tokens, **{name: split.counts() for name, split in output.splits.items()}})
    except BaseException:
        output.discard()
        raise
    for name, split in output.splits.items():
        print(f"{name:5} {split.tokens:,} tokens of {split.documents:,} documents in {len(split.shards)} shards "
              f"{split.stem}_*.bin")
    return 0


if __name__ == "__main__":
    sys.exit(run("convert_tokens", main))
