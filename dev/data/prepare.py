#!/usr/bin/env python3
"""Turn text into token shards for training: OUT/PREFIX_train_000000.bin, ..., OUT/PREFIX_val_000000.bin, ...

    prepare.py --stdlib                                    # Python's standard library: real text on every machine
    prepare.py book.txt                                    # one document
    prepare.py --glob '*.py' src/                          # a directory, recursively: each file a document
    prepare.py --tokenizer llama2.model articles.jsonl     # each line a document, its text under --jsonl-key

Documents are packed as BOS, tokens, EOS into one stream. A shard is 256 int32 (magic, version, number of tokens, zeros)
and the tokens: magic 20240520, version 1, uint16; or 20240801, version 7, uint32 when V is above 65536. Tokenizer
"bytes" has V = 258: ids 0..255 are the bytes, 256 BOS, 257 EOS. Validation is every k-th document, k = 1/F of
--val-fraction F; of fewer than k documents it is the end of each. OUT/PREFIX_manifest.json has counts and sha256 sums.
The same input gives the same bytes. Older shards of the same OUT and PREFIX are replaced once the new ones are whole.
A document must fit in memory; in directories, hidden files are left out.
"""
import argparse
import fnmatch
import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("prepare: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")

CHUNK = 1 << 22  # tokens handled at a time


class Refused(Exception):
    """`where: what. What to do.`"""


# ---------------------------------------------------------------------------------------------------------------------
# Sources: files, each of one document, or of one a line (JSONL)

def walk(top, pattern):
    """files under the directory top whose name matches; neither hidden ones nor links to directories"""
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [d for d in subdirectories if not d.startswith(".")]
        for name in names:
            path = Path(directory, name)
            if not name.startswith(".") and fnmatch.fnmatchcase(name, pattern) and path.is_file():
                yield path


def stdlib():
    """Python's own .py files, without tests, which not every machine has, and without installed packages"""
    top = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    return sorted(p for p in walk(top, "*.py") if not skip & set(p.relative_to(top).parts))


def find_sources(inputs, pattern):
    sources = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(walk(path, pattern))
            if not found:
                raise Refused(f"{name}: no file in it matches {pattern!r}. Give another --glob.")
            sources += found
        elif path.is_file():
            sources.append(path)
        else:
            raise Refused(f"{name}: there is no such file. Check the path.")
    return sources


def is_jsonl(path):
    return path.suffix in (".jsonl", ".ndjson")


def documents(path, key):
    """(where, text as bytes) of each document in a file that is not empty"""
    try:
        with open(path, "rb") as f:
            if not is_jsonl(path):
                text = f.read()
                if text:
                    yield str(path), text
                return
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                    text = value[key].encode()
                except (ValueError, RecursionError):  # also UnicodeError: broken UTF-8, half of a surrogate pair
                    raise Refused(f"{where}: not valid JSON in UTF-8. Repair or remove the line.") from None
                except (KeyError, TypeError, AttributeError):
                    raise Refused(f"{where}: no text under {key!r}. Give its name with --jsonl-key.") from None
                if text:
                    yield where, text
    except OSError as e:
        raise Refused(f"{path}: {e.strerror}. Check the path and its rights.") from None


def split_end(text, fraction):
    """text cut in two, the second about fraction of it, not within a UTF-8 character"""
    cut = int(len(text) * (1 - fraction))
    for _ in range(3):
        cut += text[cut:cut + 1] >= b"\x80" and text[cut] < 0xc0
    return text[:cut], text[cut:]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: name, V, bos, eos, encode(where, bytes) -> array of ids

class Bytes:
    name, V, bos, eos = "bytes", 258, 256, 257

    def encode(self, where, text):
        return np.frombuffer(text, dtype=np.uint8)


class SentencePiece:
    def __init__(self, path):
        try:
            import sentencepiece
        except ImportError:
            raise Refused(f"{path}: the package sentencepiece is missing. pip install sentencepiece") from None
        try:
            self.name = Path(path).name
            self.model = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        except OSError as e:
            raise Refused(f"{path}: {e.strerror}. Give 'bytes' or a sentencepiece model.") from None
        except RuntimeError:
            raise Refused(f"{path}: not a sentencepiece model. Give 'bytes' or a sentencepiece model.") from None
        self.V, self.bos, self.eos = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        if self.bos < 0 or self.eos < 0:
            raise Refused(f"{path}: the model has no BOS or no EOS. Give one that has both.")

    def encode(self, where, text):
        try:
            return np.array(self.model.encode(text.decode()), dtype=np.uint32)
        except UnicodeDecodeError as e:
            raise Refused(f"{where}: not UTF-8 at byte {e.start}. Repair it, or use --tokenizer bytes.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Shards

class Shards:
    """One split: writes its stream to temporary files, a shard each; counts documents, bytes and token pairs."""

    def __init__(self, stem, V, shard_tokens, count_pairs):
        self.stem, self.V, self.shard_tokens = stem, V, shard_tokens
        self.magic, self.version, self.dtype = (20240520, 1, "<u2") if V <= 65536 else (20240801, 7, "<u4")
        self.pairs = np.zeros(V * V, np.int64) if count_pairs else None
        self.pending, self.waiting = [], 0  # arrays of ids that are not written yet, their sum of lengths
        self.last = None       # the last token written
        self.shards = []       # {"name", "tokens", "sha256"}
        self.file, self.room = None, 0
        self.documents = self.bytes = self.tokens = 0

    def temporary(self, name):
        return self.stem.parent / (name + ".tmp")

    def add_document(self, tokenizer, where, text):
        if not text:
            return
        self.documents += 1
        self.bytes += len(text)
        ids = tokenizer.encode(where, text)
        for part in [[tokenizer.bos], *(ids[i:i + CHUNK] for i in range(0, len(ids), CHUNK)), [tokenizer.eos]]:
            self.pending.append(part)
            self.waiting += len(part)
            if self.waiting >= CHUNK:
                self.write()

    def write(self):
        """what is pending, into shards"""
        if not self.pending:
            return
        ids = np.concatenate(self.pending).astype(np.int64)
        self.pending, self.waiting = [], 0
        if self.pairs is not None:
            stream = ids if self.last is None else np.concatenate(([self.last], ids))
            self.pairs += np.bincount(stream[:-1] * self.V + stream[1:], minlength=self.V * self.V)
            self.last = ids[-1]
        self.tokens += len(ids)
        while len(ids):
            if not self.room:
                self.close()
                name = f"{self.stem.name}_{len(self.shards):06d}.bin"
                self.shards.append({"name": name, "tokens": 0})
                self.file = open(self.temporary(name), "wb")
                self.file.write(bytes(1024))
                self.room = self.shard_tokens
            part = ids[:self.room]
            self.file.write(part.astype(self.dtype).tobytes())
            self.shards[-1]["tokens"] += len(part)
            self.room -= len(part)
            ids = ids[len(part):]

    def close(self):
        """the shard that is being written"""
        if not self.file:
            return
        header = np.zeros(256, "<i4")
        header[:3] = self.magic, self.version, self.shards[-1]["tokens"]
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.close()
        self.file, digest = None, hashlib.sha256()
        with open(self.temporary(self.shards[-1]["name"]), "rb") as f:
            while block := f.read(CHUNK):
                digest.update(block)
        self.shards[-1]["sha256"] = digest.hexdigest()

    def publish(self):
        new = [s["name"] for s in self.shards]
        for name in new:
            os.replace(self.temporary(name), self.stem.parent / name)
        for path in list(self.stem.parent.iterdir()):
            if re.fullmatch(re.escape(self.stem.name) + r"_\d{6}\.bin", path.name) and path.name not in new:
                path.unlink()

    def discard(self):
        if self.file:
            self.file.close()
        for shard in self.shards:
            self.temporary(shard["name"]).unlink(missing_ok=True)


def bigram_loss(train, val, V):
    """Mean cross-entropy over val's pairs of tokens, nats a token: p(b|a) = (n(a,b) + 1) / (n(a) + V), n from train."""
    n = train.pairs.reshape(V, V)
    p = (n + 1) / (n.sum(axis=1, keepdims=True) + V)
    return float(-(val.pairs.reshape(V, V) * np.log(p)).sum() / val.pairs.sum())


# ---------------------------------------------------------------------------------------------------------------------

class Progress:
    """a bar on stderr, if that is a terminal"""

    def __init__(self, total):
        self.total, self.shown = max(total, 1), -1

    def show(self, done):
        percent = min(100 * done // self.total, 100)
        if percent != self.shown and sys.stderr.isatty():
            self.shown = percent
            bar = "#" * (percent * 4 // 10)
            print(f"\r[{bar:<40}] {percent:3d}%  {done / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)

    def end(self):
        if self.shown >= 0:
            self.shown = -1
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def prepare(sources, tokenizer, args, out, prefix):
    """returns the manifest"""
    fraction = args.val_fraction
    every = round(1 / fraction) if fraction else 0
    first = itertools.islice((d for path in sources for d in documents(path, args.jsonl_key)), every)
    cut_each = sum(1 for _ in first) < every
    count_pairs = tokenizer.name == "bytes"
    train, val = (Shards(out / f"{prefix}_{split}", tokenizer.V, args.shard_tokens, count_pairs)
                  for split in ("train", "val"))
    temporary = out / f"{prefix}_manifest.json.tmp"
    progress = Progress(sum(p.stat().st_size for p in sources))
    done = number = 0
    try:
        for path in sources:
            before = train.bytes + val.bytes
            for where, text in documents(path, args.jsonl_key):
                number += 1
                if cut_each:
                    start, end = split_end(text, fraction)
                    train.add_document(tokenizer, where, start)
                    val.add_document(tokenizer, where, end)
                else:
                    (val if every and number % every == 0 else train).add_document(tokenizer, where, text)
                progress.show(done + train.bytes + val.bytes - before)
            done += path.stat().st_size
        if not train.documents or (every and not val.documents):
            raise Refused(f"{sources[0]}: too little text in all inputs, {train.bytes + val.bytes} bytes. Give more.")
        manifest = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.V, "bos": tokenizer.bos, "eos": tokenizer.eos,
                    "sources": len(sources), "documents": number, "val_fraction": fraction}
        for split, shards in (("train", train), ("val", val)):
            shards.write()
            shards.close()
            manifest[split] = {"documents": shards.documents, "bytes": shards.bytes, "tokens": shards.tokens,
                               "shards": shards.shards}
        if count_pairs and every:
            manifest["bigram_val_loss"] = round(bigram_loss(train, val, tokenizer.V), 6)
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
        train.publish()
        val.publish()
        os.replace(temporary, out / f"{prefix}_manifest.json")
        return manifest
    finally:
        progress.end()
        train.discard()
        val.discard()
        temporary.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"prepare: {message}. --help lists the options.")


def main():
    parser = Parser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="text files, .jsonl files, directories")
    parser.add_argument("--stdlib", action="store_true", help="take the sources of Python's standard library")
    parser.add_argument("--glob", default="*", metavar="PATTERN", help="names to take in directories (*)")
    parser.add_argument("--jsonl-key", default="text", metavar="KEY", help="where a JSONL line has its text (text)")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE", help="bytes, or a sentencepiece .model")
    parser.add_argument("--out", default="data", metavar="DIR", help="where the shards go; made if missing (data)")
    parser.add_argument("--prefix", help="how their names start (the first input's name without its suffix)")
    parser.add_argument("--val-fraction", type=float, default=0.1, metavar="F",
                        help="part for validation, 0 to 0.5; 0: none (0.1)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard (100000000)")
    args = parser.parse_args()
    try:
        if bool(args.inputs) == args.stdlib:
            raise Refused("INPUT: give files or directories, or --stdlib. --help has examples.")
        if not 0 <= args.val_fraction <= 0.5:
            raise Refused(f"--val-fraction: {args.val_fraction} is out of range. Give a number from 0 to 0.5.")
        if not 1 <= args.shard_tokens < 2**31:
            raise Refused(f"--shard-tokens: {args.shard_tokens} is out of range. Give a number from 1 to {2**31 - 1}.")
        prefix = args.prefix or ("stdlib" if args.stdlib else Path(args.inputs[0]).resolve().stem)
        if "/" in prefix:
            raise Refused(f"--prefix: {prefix} is no file name. Give the directory with --out.")
        sources = stdlib() if args.stdlib else find_sources(args.inputs, args.glob)
        if not sources:
            raise Refused("--stdlib: this Python came without its library's sources. Run another one.")
        tokenizer = Bytes() if args.tokenizer == "bytes" else SentencePiece(args.tokenizer)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        manifest = prepare(sources, tokenizer, args, out, prefix)
    except Refused as e:
        sys.exit(f"prepare: {e}")
    except OSError as e:
        sys.exit(f"prepare: {e.filename or args.out}: {e.strerror}. Check the path, its rights and the disk's room.")
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted. Run it again.")
    for split in ("train", "val"):
        s = manifest[split]
        print(f"{split:5} {s['tokens']:,} tokens of {s['documents']:,} documents in {len(s['shards'])} shards "
              f"{out / (prefix + '_' + split)}_*.bin")
    if "bigram_val_loss" in manifest:
        print(f"bigram model: validation loss {manifest['bigram_val_loss']:.4f} nats a token; training should beat it")


if __name__ == "__main__":
    main()
