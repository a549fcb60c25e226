"""Files to documents: text, JSONL and parquet, also as .gz and .zst, one document at a time."""
import dataclasses
import fnmatch
import gzip
import io
import json
import os
import sys
import sysconfig
import zlib
from pathlib import Path

from common import BLOCK, Refused, package

COMPRESSED = (".gz", ".zst")
FORMATS = ("text", "jsonl", "parquet")


@dataclasses.dataclass
class Source:
    name: str            # in messages; "-" is the standard input
    size: int            # bytes, 0 if unknown
    path: Path = None    # None until it has been fetched
    split: str = None    # of a corpus with splits of its own
    url: str = None
    sha256: str = None


@dataclasses.dataclass
class Rules:
    """how files become documents"""
    format: str = None       # None: by the name
    field: str = "text"      # of a JSONL line or a parquet row
    separator: bytes = None  # between the documents of a text file


def bare(name):
    """the name without a suffix for compression"""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSED else name


def walk(top, patterns):
    """files under the directory top whose name (or the compressed file's within) matches; neither hidden ones nor links
    to directories"""
    for directory, subdirectories, names in os.walk(top):
        subdirectories[:] = [d for d in subdirectories if not d.startswith(".")]
        for name in names:
            path = Path(directory, name)
            if not name.startswith(".") and path.is_file() and \
                    any(fnmatch.fnmatchcase(n, p) for n in (name, bare(name)) for p in patterns):
                yield path


def local(path, split=None):
    return Source(str(path), path.stat().st_size, path, split)


def stdlib():
    """Python's own .py files, without tests, which not every machine has, and without installed packages"""
    top = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    found = sorted(p for p in walk(top, ["*.py"]) if not skip & set(p.relative_to(top).parts))
    if not found:
        raise Refused("--stdlib: this Python came without its library's sources. Run another one.")
    return [local(path) for path in found]


def find(inputs, pattern):
    sources = []
    for name in inputs:
        path = Path(name)
        if name == "-":
            if not sys.stdin or "-" in [source.name for source in sources]:
                raise Refused("-: the standard input is closed, or stands there twice. Give it once.")
            sources.append(Source("-", 0, path))
        elif path.is_dir():
            found = sorted(walk(path, [pattern]))
            if not found:
                raise Refused(f"{name}: no file in it matches {pattern!r}. Give another --glob.")
            sources += map(local, found)
        elif path.is_file():
            sources.append(local(path))
        else:
            raise Refused(f"{name}: there is no such file. Check the path.")
    return sources


class Zstd(io.RawIOBase):
    """a file of zstd frames; unlike the package's reader it notices where one is cut short"""

    def __init__(self, raw, name):
        self.raw, self.package = raw, package("zstandard", name)
        self.frame, self.waiting, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.waiting = self.waiting or self.raw.read(1 << 14)
            if not self.waiting:
                if self.frame:
                    raise EOFError("the last frame is cut short")
                return 0
            self.frame = self.frame or self.package.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.ready = self.frame.decompress(self.waiting)
            self.waiting = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


class Reader:
    """The documents of a source. `done`: how many of its bytes, as they lie on disk, are read."""

    def __init__(self, source, rules):
        self.source, self.rules, self.done = source, rules, 0
        suffix = os.path.splitext(bare(source.name))[1]
        lines = suffix in (".jsonl", ".ndjson") or (suffix == ".json" and bare(source.name) != source.name)
        self.format = rules.format or ("jsonl" if lines else "parquet" if suffix == ".parquet" else "text")

    def __iter__(self):
        """(where, text as bytes) of each document that is not empty"""
        return self.parquet() if self.format == "parquet" else \
            self.opened(self.lines if self.format == "jsonl" else self.texts)

    def whole(self):
        """is the file one document?"""
        return self.format == "text" and not self.rules.separator

    def opened(self, items):
        """items(stream), of the file's contents; with what is wrong in them as a line"""
        name = self.source.name
        try:
            with sys.stdin.buffer if name == "-" else open(self.source.path, "rb") as raw:
                head = raw.peek(64)[:64]
                if head.startswith(b"version https://git-lfs"):
                    raise Refused(f"{name}: only Git LFS's pointer to the file. Fetch the file itself.")
                if not head and (self.format == "jsonl" or bare(name) != name):
                    raise Refused(f"{name}: the file is empty. Fetch it again, or leave it out.")
                self.raw, self.at, stream = raw, name, raw
                if name.endswith(".gz"):
                    stream = gzip.GzipFile(fileobj=raw)
                elif name.endswith(".zst"):
                    stream = io.BufferedReader(Zstd(raw, name), BLOCK)
                try:
                    yield from items(stream)
                except (EOFError, gzip.BadGzipFile, zlib.error, *self.zstd_errors(name)) as e:
                    raise Refused(f"{self.at}: damaged or cut short from here on ({e}). Fetch it again.") from None
        except OSError as e:
            raise Refused(f"{name}: {e.strerror or e}. Check the path and its rights.") from None

    @staticmethod
    def zstd_errors(name):
        return [package("zstandard", name).ZstdError] if name.endswith(".zst") else []

    def progress(self):
        if self.source.size:
            self.done = self.raw.tell()

    def values(self, stream):
        """(where, value) of each line of JSON"""
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{self.source.name}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # also UnicodeError: broken UTF-8
                self.not_json(where)
            self.at = f"{self.source.name}:{number + 1}"
            self.progress()
            yield where, value

    @staticmethod
    def not_json(where):
        raise Refused(f"{where}: not valid JSON in UTF-8. Repair or remove the line.") from None

    def lines(self, stream):
        for where, value in self.values(stream):
            try:
                text = value[self.rules.field].encode()
            except UnicodeError:  # half of a surrogate pair
                self.not_json(where)
            except (KeyError, TypeError, AttributeError, IndexError):
                raise Refused(f"{where}: no text under {self.rules.field!r}. Give its name with --field.") from None
            if text:
                yield where, text

    def texts(self, stream):
        name, separator = self.source.name, self.rules.separator
        if not separator:
            text = stream.read()
            self.progress()
            if text:
                yield name, text
            return
        rest, number = b"", 1
        while True:
            block = stream.read(BLOCK)
            # the rest holds no whole separator: one may begin in its end only
            start = max(len(rest) - len(separator) + 1, 0)
            rest += block
            while (cut := rest.find(separator, start)) >= 0 or (not block and rest):
                text, rest = (rest[:cut], rest[cut + len(separator):]) if cut >= 0 else (rest, b"")
                start = 0
                if text := text.strip():
                    self.progress()
                    yield f"{name}: document {number}", text
                number += 1
                self.at = f"{name}: document {number}"
            if not block:
                return

    def parquet(self):
        name, field = self.source.name, self.rules.field
        pq, pa = package("pyarrow.parquet", name), package("pyarrow", name)
        row = 0
        try:
            with pq.ParquetFile(self.source.path) as file:
                if field not in file.schema_arrow.names:
                    raise Refused(f"{name}: it has no column {field!r}, but {', '.join(file.schema_arrow.names)}. "
                                  "Give one with --field.")
                kind = file.schema_arrow.field(field).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
                    raise Refused(f"{name}: column {field!r} holds {kind}, no text. Give another with --field.")
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                    for text in batch.column(0).cast(pa.large_binary()).to_pylist():  # UTF-8 is checked later
                        row += 1
                        if text is None:
                            raise Refused(f"{name}: row {row}: no text under {field!r}. Repair or remove the row.")
                        self.done = self.source.size * row // rows
                        if text:
                            yield f"{name}: row {row}", text
        except (pa.ArrowException, OSError) as e:
            what = " ".join(str(e).split())[:120]
            raise Refused(f"{name}: row {row + 1}: damaged or cut short ({what}). Fetch the file again.") from None
