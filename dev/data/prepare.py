#!/usr/bin/env python3
"""Turn text into token shards for training: OUT/PREFIX_train_000000.bin, ..., OUT/PREFIX_val_000000.bin, ...

    prepare.py --stdlib                                    # Python's standard library: real text on every machine
    prepare.py --glob '*.py' src/                          # a directory, recursively: each file a document
    prepare.py --tokenizer llama2.model articles.jsonl.zst # each line a document, its text under --field
    prepare.py --corpus c4 --tokenizer llama2.model --out data/c4        # fetched from the web ...
    prepare.py --corpus c4 --from downloads/ --tokenizer llama2.model    # ... or by other means before
    prepare.py --verify --out data/c4                      # are the shards still as they were written?

Inputs are text (UTF-8, or UTF-16 that begins with its mark), JSON (a record a line, or one array of them) and parquet,
compressed (gzip, bzip2, xz, zstd) or not, in tar and zip archives too, through pipes too; - is the standard input. What
a file is, its first bytes tell, whatever its name. Of a directory or an archive the files of one kind are taken, that
with the most bytes, and the others named. Of X and X.gz side by side the first is taken.

Documents are packed as BOS, tokens, EOS into one stream (as BOS, tokens where one token is both). A shard is 256 int32
(magic, version, number of tokens, zeros) and the tokens: magic 20240520, version 1, uint16; or 20240801, version 7,
uint32 when V is above 65536.

Validation is the corpus's own where it has files for it (c4, tinystories), else every k-th document, k = 1/F of
--val-fraction F; of fewer than k documents it is the end of each. OUT/PREFIX_manifest.json has the counts and each
shard's size and sha256; OUT/PREFIX_tokenizer.bin is the tokenizer for `./train_gpt --tokenizer` (bytes need none). The
same input gives the same bytes, whatever --processes. Older shards of the same OUT and PREFIX are replaced once the new
ones are whole. A run that was cut off goes on behind its last whole shard when the same command is given again.

Memory: 200 MB, 120 MB a process, and the largest document 10 times with bytes, 15 with tiktoken, 40 with sentencepiece,
125 with tokenizers; an array of JSON counts as a document. Disk, beside the shards: two files of the corpus, where it
is fetched; in $TMPDIR a copy of an archive or parquet that comes through a pipe, or of parquet in an archive. Hidden
files of directories and archives are left out.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

from common import Parser, Refused, in_range, run, warn

try:
    import numpy as np
except ImportError:
    sys.exit("prepare: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")

import corpora
import encoders
from reading import FORMATS, MOST_BAD, Counts, Reader, Rules, bare, find, stdlib
from shards import Output, bigram_loss, verify

BATCH = 1 << 18   # bytes of text that a process is given at a time
SMALL = 16 << 20  # bytes of input below which more processes would not pay


# ---------------------------------------------------------------------------------------------------------------------
# Documents, their splits, and batches of them

def split_end(text, fraction):
    """text cut in two, the second about fraction of it, not within a UTF-8 character"""
    cut = int(len(text) * (1 - fraction))
    for _ in range(3):
        cut += text[cut:cut + 1] >= b"\x80" and text[cut] < 0xc0
    return text[:cut], text[cut:]


@dataclasses.dataclass
class Batch:
    documents: list  # (where, text)
    splits: list     # of each
    position: dict   # of the input behind the batch
    done: int        # bytes of the sources, for the progress bar


class Input:
    """All documents of the sources from a position on, with the split of each."""

    def __init__(self, sources, rules, fraction, downloads, position):
        self.sources, self.rules, self.fraction, self.downloads = sources, rules, fraction, downloads
        self.every = round(1 / fraction) if fraction else 0
        self.val_full = False  # set by the writer: no more of a corpus's own validation files
        self.number = 0        # documents seen
        self.first, self.records, self.crc = 0, 0, 0
        self.counts, self.before = Counts(), None  # of all records; of those in the sources before this one
        if position:
            self.first, self.records, self.crc = (position[k] for k in ("source", "records", "crc32"))
            self.number, self.cut = position["documents"], position["cut"]
            self.counts = Counts(*position.get("counts", ()))
            now = [[s.name, s.size] for s in sources[:self.first]]
            for (name, size), before in itertools.zip_longest(now, position["used"], fillvalue=("no file", 0)):
                if [name, size] != before:
                    raise Refused(f"{name}: has {size} bytes; the interrupted run had read {before[0]} with "
                                  f"{before[1]} in its place. Give the same input, or begin anew: --restart.")
        else:
            self.cut = self.few()

    def few(self):
        """are there fewer than k documents to split?"""
        if not self.every or self.sources[0].split:
            return False
        if self.downloads or any(s.kind for s in self.sources):  # not to be read twice: decided by what it is
            return len(self.sources) == 1 and Reader(self.sources[0], self.rules).whole()
        documents = (d for source in self.sources for d in Reader(source, self.rules))
        return sum(1 for _ in itertools.islice(documents, self.every)) < self.every

    def position(self, i, records, crc):
        return {"source": i, "records": records, "crc32": crc, "documents": self.number, "cut": self.cut,
                "used": [[s.name, s.size] for s in self.sources[:i]], "counts": self.before,
                "counts_now": dataclasses.astuple(self.counts)}

    def end(self):
        """the position behind all"""
        self.counts.check(0)
        self.before = dataclasses.astuple(self.counts)
        return self.position(len(self.sources), 0, 0)

    def pieces(self, source, where, text):
        self.number += 1
        if source.split:
            return [(where, text, source.split)]
        if self.cut:
            parts = zip(split_end(text, self.fraction), ("train", "val"))
            return [(where, part, split) for part, split in parts if part]
        return [(where, text, "val" if self.every and self.number % self.every == 0 else "train")]

    def batches(self):
        waiting, size, before = [], 0, 0

        def batch(position, done):
            return Batch([w[:2] for w in waiting], [w[2] for w in waiting], position, done)

        for i, source in enumerate(self.sources):
            if i >= self.first and not (source.split == "val" and self.val_full):
                if self.downloads:
                    source = self.downloads.get(i)
                skip, expected = (self.records, self.crc) if i == self.first else (0, 0)
                reader, records, crc = Reader(source, self.rules, self.counts), 0, 0
                self.before = dataclasses.astuple(self.counts)
                for where, text in reader:
                    records, crc = records + 1, zlib.crc32(text, crc)
                    if records <= skip:
                        if records == skip and crc != expected:
                            self.changed(source)
                        continue
                    waiting += self.pieces(source, where, text)
                    size += len(text)
                    if size >= BATCH:
                        yield batch(self.position(i, records, crc), before + reader.done)
                        waiting, size = [], 0
                        if source.split == "val" and self.val_full:
                            break
                if records < skip:
                    self.changed(source)
                if self.downloads:
                    self.downloads.release(i)
            before += source.size
        if waiting:
            yield batch(self.end(), before)

    @staticmethod
    def changed(source):
        raise Refused(f"{source.name}: has changed where the interrupted run had read it. Give the same input, or "
                      "begin anew: --restart.")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing, in this process or in others

def start_worker(options):
    global encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    parent = os.getppid()

    def watch():  # a killed parent cannot tell
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    encoder = encoders.load(*options)


def work(documents):
    return encoder.pack(documents)


def encoded(batches, tokenizer, options, processes):
    """(batch, ids, lengths) in the order of the batches"""
    if processes == 1:
        for batch in batches:
            yield batch, *tokenizer.pack(batch.documents)
        return
    context = multiprocessing.get_context("spawn")  # forks would copy the threads' locks
    with concurrent.futures.ProcessPoolExecutor(processes, context, start_worker, (options,)) as pool:
        waiting = collections.deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(work, batch.documents)))
                if len(waiting) > 2 * processes:
                    yield waiting[0][0], *waiting[0][1].result()
                    waiting.popleft()
            while waiting:
                yield waiting[0][0], *waiting[0][1].result()
                waiting.popleft()
        except concurrent.futures.process.BrokenProcessPool:
            raise Refused("--processes: one of them died, perhaps for want of memory. Give fewer.") from None
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """on stderr: a bar if that is a terminal, else a line now and then"""

    def __init__(self, total, splits, limit):
        self.total, self.splits, self.limit = total, splits, limit
        self.terminal, self.shown, self.began = sys.stderr.isatty(), False, time.monotonic()
        self.last, self.first = self.began, None

    def show(self, done):
        now = time.monotonic()
        documents, size, tokens = (sum(getattr(split, key) for split in self.splits)
                                   for key in ("documents", "bytes", "tokens"))
        if self.first is None:  # of a run that goes on, what was there before is no speed
            self.first = size, self.part(done)
            self.began = now
        if now - self.last < (0.2 if self.terminal else 10) or now == self.began:
            return
        self.last, seconds, part = now, now - self.began, self.part(done)
        line = f"{documents:,} documents  {tokens:,} tokens  {(size - self.first[0]) / seconds / 1e6:.1f} MB/s"
        if part > self.first[1]:
            left = int(seconds * (1 - part) / (part - self.first[1]))
            line = f"{100 * part:5.1f}%  {line}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            if self.terminal:
                line = f"[{'#' * int(part * 30):<30}]{line}"
        self.shown = True
        print(f"\r\033[K{line}" if self.terminal else f"prepare: {line}", end="" if self.terminal else "\n",
              file=sys.stderr, flush=True)

    def part(self, done):
        """of the work, 0 to 1"""
        return min(max(done / (self.total or math.inf), self.splits[0].tokens / (self.limit or math.inf)), 1)

    def end(self):
        if self.shown and self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------

def prepare(args, out, prefix):
    """returns the manifest"""
    corpus = corpora.CORPORA.get(args.corpus)
    rules = dataclasses.replace(corpus.rules) if corpus else Rules()
    rules.format, rules.field = args.format or rules.format, args.field or rules.field
    rules.separator = unescaped(args.separator) if args.separator else rules.separator
    rules.skip_bad = args.skip_bad
    if corpus and rules.format == "text" and not args.format:
        rules.format = None  # tinystories: its files are text or parquet
    fraction = args.val_fraction if args.val_fraction is not None else corpus.fraction if corpus else 0.1
    subset = corpus.subset(args.subset)[0] if corpus else None
    limits = {"train": args.limit_tokens, "val": args.limit_tokens and max(args.limit_tokens // 10, 1)}

    # what is given first, then the tokenizer, so that a wrong path is told at once
    if corpus and not args.files:
        web = corpora.Web(args.corpus)
    else:
        sources = stdlib() if args.stdlib else corpora.from_files(args.corpus, args.files) if corpus else \
            find(args.inputs, args.glob, rules)
    options = encoders.from_options(args)
    tokenizer = encoders.load(*options)
    converted = None if args.without_generate else encoders.converted(tokenizer, *options)
    out.mkdir(parents=True, exist_ok=True)
    identity = {"corpus": args.corpus, "subset": subset, "tokenizer": tokenizer.name,
                "tokenizer_sha256": tokenizer.checksum, "vocab_size": tokenizer.V, "bos": tokenizer.bos,
                "eos": tokenizer.eos, "preset": args.preset, "shard_tokens": args.shard_tokens,
                "val_fraction": fraction, "limit_tokens": args.limit_tokens, "format": rules.format, "field": rules.field,
                "separator": rules.separator and rules.separator.decode(errors="backslashreplace"),
                "skip_bad": rules.skip_bad or None}
    output = Output(out, prefix, tokenizer.V, args.shard_tokens, identity, args.restart)
    train, val = output.splits["train"], output.splits["val"]
    downloads, progress, whole, resumed = None, None, False, bool(output.position)
    try:
        revision = output.position and output.position["revision"]
        if corpus and not args.files:
            sources, revision = corpora.from_web(web, args.corpus, args.subset, revision)
            downloads = corpora.Downloads(web, out / f"{prefix}_download", sources, revision)
        total = sum(s.size for s in sources)
        processes = args.processes or (1 if tokenizer.name == "bytes" or 0 < total < SMALL else
                                       len(os.sched_getaffinity(0)))
        source_input = Input(sources, rules, fraction, downloads, output.position)
        progress = Progress(total, [train, val], args.limit_tokens)
        saved, position = len(train.shards) + len(val.shards), output.position
        for batch, ids, lengths in encoded(source_input.batches(), tokenizer, options, processes):
            ends = np.cumsum(lengths)
            for (_, text), name, end, length in zip(batch.documents, batch.splits, ends, lengths):
                if not limits[name] or output.splits[name].tokens < limits[name]:
                    output.splits[name].add(ids[end - length:end], 1, len(text))
            position = {**batch.position, "revision": revision}
            if len(train.shards) + len(val.shards) > saved:
                output.save(position)
                saved = len(train.shards) + len(val.shards)
            progress.show(batch.done)
            source_input.val_full = bool(args.limit_tokens) and val.tokens >= limits["val"]
            if args.limit_tokens and train.tokens >= args.limit_tokens:
                break
        else:
            position = {**source_input.end(), "revision": revision}
        if not train.documents or (fraction and not val.documents):
            raise Refused(f"{sources[0].name}: too little text in all inputs, {train.bytes + val.bytes} bytes. Give "
                          "more.")
        for split in (train, val):
            split.close()
        output.save(position)
        own, counts = any(s.split == "val" for s in sources), Counts(*position["counts_now"])
        manifest = {"corpus": args.corpus, "subset": subset, "revision": revision} if corpus else {}
        manifest |= {key: identity[key] for key in ("tokenizer", "tokenizer_sha256", "vocab_size", "bos", "eos")}
        manifest |= {
            "sources": len(sources), "documents": position["documents"] if source_input.cut else
            train.documents + val.documents, "val_fraction": fraction,
            "validation": "the corpus's own" if own else "none" if not fraction else "the end of each document"
            if source_input.cut else f"every document whose number is a multiple of {source_input.every}",
            "field": rules.field, "separator": identity["separator"], "limit_tokens": args.limit_tokens,
            "bad_records": counts.bad,
            "shard_tokens": args.shard_tokens, "train": train.counts(), "val": val.counts()}
        if tokenizer.name == "bytes" and val.tokens:
            manifest["bigram_val_loss"] = round(bigram_loss(train, val, tokenizer.V), 6)
        output.publish(manifest, converted)
        if args.separator and not rules.parted and not resumed:
            warn(r"--separator: it stands in no text that was read, so each text file is one document. Windows' lines "
                 r"end with \r\n.")
        if counts.bad:
            warn(f"{counts.bad:,} of {counts.seen:,} records are bad and left out. The first: {counts.first}")
        whole = True
        return manifest
    except Refused as e:
        if not output.position:
            raise
        raise Refused(f"{e} The {len(train.shards) + len(val.shards)} whole shards stay: the same command goes on "
                      "from there.") from None
    finally:
        if progress:
            progress.end()
        if not output.position:
            output.discard()
        if downloads:
            downloads.end(keep=not whole)


def check(out, prefix):
    manifests = sorted(out.glob(f"{prefix or '*'}_manifest.json"))
    if not manifests:
        raise Refused(f"{out}: no manifest is there. Give the directory with --out.")
    bad = 0
    for path in manifests:
        wrong, count = verify(path)
        for line in wrong:
            print(f"prepare: {line}", file=sys.stderr)
        bad += len(wrong)
        if not wrong:
            print(f"{path}: {count} shards are as they were written")
    return 1 if bad else 0


def of_input(name):
    """a prefix from the name that is given, whatever it links to"""
    last = Path(bare(os.path.basename(os.path.abspath(name)))).stem
    return "stdin" if name == "-" else "pipe" if last.isdigit() and Path(name).is_fifo() else last  # /dev/fd/63


def unescaped(text):
    """the bytes of an argument in which \\n is a line break, \\t a tab, \\xHH a byte, \\\\ a backslash"""
    known = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"0": b"\0", b"\\": b"\\"}
    return re.sub(rb"\\(?:x([0-9a-fA-F]{2})|([ntr0\\]))",
                  lambda found: bytes.fromhex(found[1].decode()) if found[1] else known[found[2]], os.fsencode(text))


def main():
    parser = Parser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files, directories, or - for the standard input")
    parser.add_argument("--stdlib", action="store_true", help="take the sources of Python's standard library")
    parser.add_argument("--corpus", choices=list(corpora.CORPORA),
                        help="; ".join(f"{name}: {c.about}" for name, c in corpora.CORPORA.items()))
    parser.add_argument("--subset", help="part of the corpus (c4: en; fineweb-edu: sample-10BT, or sample-100BT, "
                        "sample-350BT, default, CC-MAIN-...)")
    parser.add_argument("--from", dest="files", nargs="+", metavar="PATH",
                        help="the corpus's files, or directories with them, instead of the web")
    parser.add_argument("--glob", default="*", metavar="PATTERN", help="names to take in directories (*)")
    parser.add_argument("--format", choices=FORMATS,
                        help="of all inputs, whatever their bytes (what these tell)")
    parser.add_argument("--field", "--jsonl-key", "--column", metavar="NAME", help="where a record of JSON or a row of "
                        "parquet has its text; NAME.NAME is a field within a field (text)")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out records that are no JSON, lack the text or hold half of a surrogate pair, and "
                        f"count them in the manifest; stops when more than {MOST_BAD * 100:.0f}%% of all records are "
                        "bad (the first one stops it)")
    parser.add_argument("--separator", metavar="TEXT",
                        help=r"what stands between the documents of a text file, with \n, \t, \r, \0, \xHH and \\ for "
                        r"\; white space around it goes (a file is one document)")
    encoders.add_options(parser)
    parser.add_argument("--without-generate", action="store_true", help="take a tokenizer that the trainer cannot use: "
                        "shards alone, for training without samples, generate and bits per byte")
    parser.add_argument("--out", default="data", metavar="DIR", help="where the shards go; made if missing (data)")
    parser.add_argument("--prefix", help="how their names start (the corpus, or the first input without its suffix)")
    parser.add_argument("--val-fraction", type=float, metavar="F",
                        help="part for validation, 0 to 0.5; 0: none (0.1; fineweb-edu 0.001, openwebtext 0.0005)")
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="end with the document that fills N tokens of "
                        "training; of a corpus's own validation, N/10")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a shard (100000000)")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="that tokenize (as many as cores; 1 for bytes and for small inputs)")
    parser.add_argument("--restart", action="store_true", help="forget what an interrupted run has left")
    parser.add_argument("--verify", action="store_true", help="check the shards in --out against their manifests")
    args = parser.parse_args()
    if args.verify:
        return check(Path(args.out), args.prefix)
    if bool(args.inputs) + args.stdlib + bool(args.corpus) != 1:
        raise Refused("INPUT: give files or directories, or --stdlib, or --corpus. --help has examples.")
    if (args.files or args.subset) and not args.corpus:
        raise Refused("--from, --subset: go with --corpus. --help has examples.")
    in_range("--val-fraction", args.val_fraction, 0, 0.5)
    in_range("--val-fraction", args.val_fraction or None, 1e-9, 0.5)
    in_range("--shard-tokens", args.shard_tokens, 1, 2**31 - 1)
    in_range("--limit-tokens", args.limit_tokens, 1, 2**62)
    in_range("--processes", args.processes, 1, 1024)
    prefix = args.prefix or args.corpus or ("stdlib" if args.stdlib else of_input(args.inputs[0]))
    if "/" in prefix:
        raise Refused(f"--prefix: {prefix} is no file name. Give the directory with --out.")
    out = Path(args.out)
    manifest = prepare(args, out, prefix)
    for split in ("train", "val"):
        s = manifest[split]
        print(f"{split:5} {s['tokens']:,} tokens of {s['documents']:,} documents in {len(s['shards'])} shards "
              f"{out / (prefix + '_' + split)}_*.bin")
    if "tokenizer_file" in manifest:
        print(f"for ./train_gpt: --tokenizer {out / manifest['tokenizer_file']['name']}")
    if "bigram_val_loss" in manifest:
        print(f"bigram model: validation loss {manifest['bigram_val_loss']:.4f} nats a token; training should beat it")
    return 0


if __name__ == "__main__":
    sys.exit(run("prepare", main))
