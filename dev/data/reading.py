"""Files to documents: text, JSON and parquet, compressed, in archives and through pipes, one document at a time. What a
file is, its first bytes tell; its name only makes it stricter: what is called .jsonl is never read as text."""
import bz2
import codecs
import collections
import contextlib
import dataclasses
import errno
import fnmatch
import gzip
import io
import itertools
import json
import lzma
import os
import re
import stat
import struct
import sys
import sysconfig
import tarfile
import tempfile
import typing
import zipfile
import zlib
from pathlib import Path

from common import BLOCK, Refused, package, warn

COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
FORMATS = ("text", "jsonl", "parquet")
HEAD = 1 << 16  # bytes by which a file is known
MOST_BAD = 0.1  # of all records, with --skip-bad

KINDS = [(kind, re.compile(pattern, re.DOTALL)) for kind, pattern in (
    ("gzip", rb"\x1f\x8b\x08"), ("bzip2", rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    ("xz", rb"\xfd7zXZ\0|\x5d\0\0[^\0]\0(?:\xff{8}|.{5}\0{3})\0"),  # or the older lzma
    ("zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    ("tar", rb".{257}ustar|.{100}[0-7 \0]{48}[0-7 ]{6}\0[ \0]"),  # or as before POSIX
    ("an office document or e-book", rb"PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|docProps/|mimetype)"),
    ("a PyTorch file", rb"PK\x03\x04.{26}[^/]{1,200}/(?:data\.pkl|\.format_version)"),
    ("an ar archive", rb"!<arch>\n"), ("a cpio archive", rb"07070[127][0-9a-fA-F]{70}"),
    ("zip", rb"PK(?:\x03\x04|\x05\x06)"), ("parquet", rb"PAR1"), ("utf-32", rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    ("utf-16", rb"\xff\xfe|\xfe\xff"), ("a PDF", rb"%PDF-"), ("a rich text file", rb"\{\\rtf"),
    ("a picture", rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP"), ("a program", rb"\x7fELF"),
    ("an Arrow file", rb"ARROW1\0\0|\xff\xff\xff\xff.{4}\x10\0\0\0"), ("a Numpy file", rb"\x93NUMPY"),
    ("a 7z archive", rb"7z\xbc\xaf"), ("a rar archive", rb"Rar!\x1a"), ("an lz4 file", rb"\x04\x22\x4d\x18"),
    ("an SQLite database", rb"SQLite format 3\0"), ("an HDF5 file", rb"\x89HDF"), ("a GGUF model", rb"GGUF.\0\0\0"),
    ("Megatron's index of tokens", rb"MMIDIDX\0\0"),
    ("a shard of tokens", b"|".join(re.escape(struct.pack("<i", magic)) for magic in (20240520, 20240801))))]
ADVICE = {"a shard of tokens": "Give it to the trainer: --train-data.",
          "Megatron's index of tokens": "Turn it into shards: dev/data/convert_tokens.py.",
          "an Arrow file": "Write it as parquet or JSON lines: datasets' to_parquet(), to_json().",
          "binary": "Leave it out, or convert it to text; --format text takes it as it is; tokens without a header: "
                    "dev/data/convert_tokens.py."}
CONTROL = bytes({*range(9), *range(16, 27), *range(28, 32), 127})  # hardly in a text, a tenth of any other bytes
STRING = rb'"(?:[^"\\\n]|\\.)*"'
RECORDS = re.compile(rb"\s*(?:(?:\[\s*)?\{\s*%b\s*:|\[\s*%b\s*(?:,\s*\"|]\s*\Z))" % (STRING, STRING))  # how JSON begins
RECORD = re.compile(rb"\s*\{\s*%b\s*:" % STRING)  # and how a line of it
MANY_LINES = re.compile(rb"\s*(?:\[\s*[]{\"]|\{[ \t\r]*\n)")  # one JSON value
CARD, CARDS = "a data set's card", ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")  # and README.md
LFS = b"version https://git-lfs"


@dataclasses.dataclass
class Source:
    name: str            # in messages; "-" is the standard input
    size: int            # bytes, 0 if unknown
    path: Path = None    # None until it has been fetched
    split: str = None    # of a corpus with splits of its own
    url: str = None
    sha256: str = None
    file: typing.Any = None  # open already: a pipe, or a copy of one
    kind: str = None     # of a pipe, which can be read but once; None: any number of times
    takes: set = None    # of an archive, the names of its members that are documents

    def open(self):
        if not self.file:
            return open(self.path, "rb")
        if not self.kind:
            self.file.seek(0)
        return contextlib.nullcontext(self.file)


@dataclasses.dataclass
class Rules:
    """how files become documents"""
    format: str = None       # None: by the bytes
    field: str = "text"      # of a record of JSON or a parquet row
    separator: bytes = None  # between the documents of a text file
    skip_bad: bool = None    # leave out bad records, and count them; None: not by this program
    parted: bool = False     # has the separator been met?


@dataclasses.dataclass
class Leaf:
    """a file, or one within an archive, free of its compression"""
    name: str
    kind: str
    head: bytes
    stream: typing.Any
    size: int


@dataclasses.dataclass
class Counts:
    """of records"""
    seen: int = 0
    bad: int = 0
    first: str = None  # what is wrong with the first bad one

    def check(self, least=1000):
        if self.bad > MOST_BAD * max(self.seen, least):
            raise Refused(f"{self.first} {self.bad} of {self.seen} records are bad, --skip-bad leaves out "
                          f"{MOST_BAD:.0%} at most.")


def bare(name):
    """the name without a suffix for compression"""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSED else name


def named(name):
    """the format that a name promises"""
    suffix = os.path.splitext(bare(name))[1].lower()
    return "jsonl" if suffix in (".jsonl", ".ndjson", ".json") else "parquet" if suffix == ".parquet" else None


# ---------------------------------------------------------------------------------------------------------------------
# Bytes: what they are, and what is within

class Blocks(io.RawIOBase):
    """a file of the bytes that an iterator gives"""

    def __init__(self, blocks):
        self.blocks, self.ready = blocks, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.ready = memoryview(block)
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def readall(self):
        rest, self.ready = self.ready, memoryview(b"")
        return b"".join([rest, *self.blocks])


def blocks_of(stream):
    return iter(lambda: stream.read1(BLOCK), b"")  # read1: what comes before damage is not lost with it


def stream_of(blocks):
    return io.BufferedReader(Blocks(blocks), BLOCK)


def zstd(stream, name):
    """blocks of a file of zstd frames; unlike the package's reader it notices where one is cut short"""
    made, frame = package("zstandard", name), None
    try:
        for waiting in blocks_of(stream):
            while waiting:
                frame = frame or made.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(waiting)
                waiting = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except made.ZstdError as e:
        raise EOFError(e) from None
    if frame:
        raise EOFError("the last frame is cut short")


def frames(stream, make):
    """blocks of bzip2's or xz's streams, one behind another; unlike the library's readers it notices a damaged head of
    one that is not the first"""
    frame = None
    for waiting in blocks_of(stream):
        while waiting := waiting if frame else waiting.lstrip(b"\0"):  # zeros may stand between
            frame = frame or make()
            yield frame.decompress(waiting, BLOCK)
            while not (frame.eof or frame.needs_input):
                yield frame.decompress(b"", BLOCK)
            waiting = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("its end is missing")


def utf8(stream, name, encoding):
    """blocks of a text in another encoding, which begins with its mark"""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in itertools.chain(blocks_of(stream), [b""]):
            yield decoder.decode(block, not block).encode()
    except UnicodeError:
        raise Refused(f"{name}: begins as {encoding.upper()}, but is not. Convert it to UTF-8.") from None


UNPACK = {"gzip": lambda stream, name: gzip.GzipFile(fileobj=stream),
          "bzip2": lambda stream, name: stream_of(frames(stream, bz2.BZ2Decompressor)),
          "xz": lambda stream, name: stream_of(frames(stream, lzma.LZMADecompressor)),
          "zstd": lambda stream, name: stream_of(zstd(stream, name)),
          "utf-16": lambda stream, name: stream_of(utf8(stream, name, "utf-16")),
          "utf-32": lambda stream, name: stream_of(utf8(stream, name, "utf-32"))}
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


def damage(error):
    """also what gzip and bz2 raise, and a jump that a damaged zip archive leads to"""
    return isinstance(error, DAMAGE) or (isinstance(error, OSError) and error.errno in (None, errno.EINVAL))


@contextlib.contextmanager
def told(name, at=None):
    """what is wrong with a file as a line; at: says where"""
    try:
        yield
    except NotImplementedError as e:
        raise Refused(f"{at() if at else name}: this Python cannot unpack it ({e}). Unpack it first.") from None
    except (*DAMAGE, OSError) as e:
        if damage(e):
            raise Refused(f"{at() if at else name}: damaged or cut short from here on ({e}). Fetch it again.") from None
        raise Refused(f"{name}: {e.strerror or e}. Check the path and its rights.") from None


def on_disk(stream):
    """is it a file, to jump to and fro in?"""
    return isinstance(getattr(stream, "raw", None), io.FileIO) and stream.seekable()


def spool(stream):
    """a copy on the disk"""
    copy = tempfile.TemporaryFile()
    for block in blocks_of(stream):
        try:
            copy.write(block)
            copy.flush()
        except OSError as e:
            raise Refused(f"{tempfile.gettempdir()}: {e.strerror}. A pipe or a part of an archive is copied there: "
                          "name a folder with room in TMPDIR.") from None
    copy.seek(0)
    return copy


def peek(stream):
    """(the first bytes, a stream of all)"""
    if on_disk(stream):
        at = stream.tell()
        head = stream.read(HEAD)
        stream.seek(at)
        return head, stream
    blocks, head, failed = blocks_of(stream), b"", []
    try:
        while len(head) < HEAD and (block := next(blocks, None)):
            head += block
    except (*DAMAGE, OSError) as e:
        if not head:
            raise
        failed.append(e)

    def whole():
        yield head
        for error in failed:
            raise error
        yield from blocks

    return head[:HEAD], stream_of(whole())


def strange(head):
    """more than 2% of it is in no text"""
    return (len(head) - len(head.translate(None, CONTROL))) * 50 > len(head)


def kind_of(name, head):
    """one of FORMATS, a key of UNPACK, tar or zip, CARD, or words for what is no text"""
    for kind, pattern in KINDS:
        if pattern.match(head):
            return kind
    if strange(head):
        wide = any(head[i::2].count(0) * 4 > len(head) and not strange(head[1 - i::2]) for i in (0, 1))
        return "UTF-16 without its mark" if wide else "binary"
    last = os.path.basename(name).lower()
    if last in CARDS or (last == "readme.md" and re.match(rb"---\r?\n", head)):
        return CARD
    lines = [line for line in head.split(b"\n") if line.strip()] if b"{" in head else []
    if RECORDS.match(head) or sum(map(bool, map(RECORD.match, lines))) * 2 > len(lines):
        return "jsonl"
    return named(name) or "text"


def unwrap(name, stream):
    """(kind, first bytes, stream) of what is within the compression"""
    head, stream = peek(stream)
    if not head and (named(name) or bare(name) != name):
        raise Refused(f"{name}: the file is empty. Fetch it again, or leave it out.")
    while (kind := kind_of(name, head)) in UNPACK:
        head, stream = peek(UNPACK[kind](stream, name))
    if head.startswith(LFS):
        raise Refused(f"{name}: only Git LFS's pointer to the file. Fetch the file itself.")
    if head.startswith(codecs.BOM_UTF8):
        stream.read(3)
        kind, head = kind_of(name, head[3:]), head[3:]
    return kind, head, stream


class Header(tarfile.TarInfo):
    """a header that is damaged ends no archive"""
    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.SubsequentHeaderError) as e:
            raise EOFError(e) from None


def visible(name):
    return not any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def leaves(name, stream, size):
    """what a file holds: itself, or all that its archive does"""
    kind, head, stream = unwrap(name, stream)
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK, tarinfo=Header,
                          ignore_zeros=True) as archive:  # there may be another behind its end
            while member := archive.next():
                archive.members.clear()  # it would keep them all
                if member.isreg() and visible(member.name):
                    yield from leaves(f"{name}/{member.name}", archive.extractfile(member), member.size)
    elif kind == "zip":
        with zipfile.ZipFile(stream if on_disk(stream) else spool(stream)) as archive:
            for member in archive.infolist():
                if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16) or not visible(member.filename):
                    continue
                within = f"{name}/{member.filename}"
                if member.flag_bits & 1:
                    raise Refused(f"{within}: is encrypted. Unpack the archive first.")
                with archive.open(member) as opened:
                    yield from leaves(within, opened, member.file_size)
    else:
        yield Leaf(name, kind, head, stream, size)


# ---------------------------------------------------------------------------------------------------------------------
# Which files

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


def choose(place, found, format):
    """The names of the files that are taken of a folder or an archive: those of the format, or of the kind with the
    most bytes, and of X and X.gz the first. found: (name, kind, bytes) of each; says which are left out."""
    sizes = collections.Counter()
    for _, kind, size in found:
        if kind in FORMATS or kind == "archive":
            sizes[kind] += size + 1
    most = max(sizes, key=lambda kind: (sizes[kind], kind), default=None)
    kinds = {None: {most}, "text": {"text", "jsonl", CARD, "archive"}}.get(format, {format, "archive"})
    first, left, names = {}, [], set()
    for name, kind, _ in found:
        if kind not in kinds:
            left.append((name, kind))
        elif first.setdefault(bare(name), name) != name:
            left.append((name, f"{os.path.basename(first[bare(name)])} is there"))
        else:
            names.add(name)
    listed = ", ".join(f"{name.removeprefix(place.rstrip('/') + '/')} ({why})" for name, why in left[:5])
    listed += f" and {len(left) - 5} more" if len(left) > 5 else ""
    if not names:
        raise Refused(f"{place}: no file in it is {format or 'text, JSON or parquet'}: {listed}. Give others.")
    if left:
        warn(f"{place}: left out are {listed}. Taken are {len(names)} files: {', '.join(sorted(kinds & set(sizes)))}.")
    return names


def folder(name, pattern, rules):
    paths = sorted(walk(Path(name), [pattern]))
    if not paths:
        raise Refused(f"{name}: no file in it matches {pattern!r}. Give another --glob.")
    found = []
    for path in paths:
        with told(str(path)), open(path, "rb") as raw:
            kind = unwrap(str(path), raw)[0]
            found.append((str(path), "archive" if kind in ("tar", "zip") else kind, path.stat().st_size))
    names = choose(name, found, rules.format)
    return [local(path) for path in paths if str(path) in names]


def taken(source, rules):
    """the names of an archive's members that are documents"""
    if source.takes is None:
        with source.open() as raw:
            found = [(f.name, f.kind, f.size) for f in leaves(source.name, raw, 0)]
        source.takes = choose(source.name, found, rules.format)
    return source.takes


def pipe(name, rules):
    """a source that can be read but once, or a copy of what has to be read twice or out of order"""
    with told(name):
        kind, _, stream = unwrap(name, sys.stdin.buffer if name == "-" else open(name, "rb"))
        if kind not in ("tar", "zip", "parquet"):
            return Source(name, 0, file=stream, kind=kind)
        source = Source(name, 0, file=spool(stream))
        if kind != "parquet":
            taken(source, rules)  # now: a copy has one position
        return source


def one_each(sources):
    """of X and X.gz the first"""
    first = {}
    for source in sources:
        before = first.setdefault(bare(source.name), source.name)
        if before == source.name:
            yield source
        else:
            warn(f"{source.name}: is left out, {before} is there.")


def find(inputs, pattern, rules):
    sources, pipes = [], set()
    for name in inputs:
        path = Path(name)
        try:
            info = os.fstat(sys.stdin.fileno()) if name == "-" else os.stat(path)
        except (AttributeError, ValueError, OSError) as e:
            if name == "-":
                raise Refused("-: the standard input is closed. Give it, or a file.") from None
            what = "there is no such file" if isinstance(e, FileNotFoundError) else getattr(e, "strerror", e)
            raise Refused(f"{name}: {what}. Check the path.") from None
        if name == "-" or not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
            if (info.st_dev, info.st_ino) in pipes:
                raise Refused(f"{name}: stands there twice, and can be read but once. Give it once.")
            pipes.add((info.st_dev, info.st_ino))
            sources.append(pipe(name, rules))
        elif stat.S_ISDIR(info.st_mode):
            sources += folder(name, pattern, rules)
        else:
            sources.append(local(path))
    return list(one_each(sources))


# ---------------------------------------------------------------------------------------------------------------------
# Documents

def under(value, field):
    """value[field], or of "a.b" value["a"]["b"]"""
    if field in value:
        return value[field]
    for key in field.split("."):
        value = value[key]
    return value


class Reader:
    """The documents of a source. `done`: how many of its bytes, as they lie on disk, are read."""

    def __init__(self, source, rules, counts=None):
        self.source, self.rules, self.counts, self.done = source, rules, counts or Counts(), 0

    def __iter__(self):
        """(where, text as bytes) of each document that is not empty"""
        items = {"text": self.texts, "jsonl": self.lines, "parquet": self.rows}
        return self.opened(lambda leaf: items[leaf.kind](leaf))

    def whole(self):
        """is a source that cannot be read twice one document?"""
        kind = self.rules.format or self.source.kind or named(self.source.name) or "text"
        return kind in ("text", CARD) and not self.rules.separator

    def opened(self, items):
        """items(leaf) of each leaf that is taken; with what is wrong in it as a line"""
        source = self.source
        self.at = source.name
        with told(source.name, lambda: self.at):
            with source.open() as raw:
                self.raw = raw
                for leaf in leaves(source.name, raw, source.size):
                    if leaf.name == source.name:
                        if not self.rules.format and leaf.kind not in (*FORMATS, CARD):
                            raise Refused(f"{leaf.name}: {leaf.kind}, no text. " + ADVICE.get(
                                leaf.kind, "Leave it out, or convert it to text."))
                    elif leaf.name not in taken(source, self.rules):
                        continue
                    leaf.kind = self.rules.format or ("text" if leaf.kind == CARD else leaf.kind)
                    self.at = leaf.name
                    yield from items(leaf)

    def progress(self):
        if self.source.size:
            self.done = self.raw.tell()

    def bad(self, where, what, advice):
        if not self.rules.skip_bad:
            raise Refused(f"{where}: {what}. {advice}") from None
        self.counts.bad, self.counts.first = self.counts.bad + 1, self.counts.first or f"{where}: {what}."
        self.counts.check()

    def not_json(self, where):
        self.bad(where, "not valid JSON in UTF-8", "Repair or remove the line" + (
            "." if self.rules.skip_bad is None else
            ", or leave it out with --skip-bad; --format text if it is no JSON."))

    def values(self, leaf):
        """(where, value) of each record of JSON, a line or an element of an array"""
        if MANY_LINES.match(leaf.head):
            yield from self.elements(leaf)
            return
        for number, line in enumerate(leaf.stream, 1):
            if not line.strip():
                continue
            self.counts.seen += 1
            where = f"{leaf.name}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # also UnicodeError: broken UTF-8
                self.not_json(where)
                continue
            self.at = f"{leaf.name}:{number + 1}"
            self.progress()
            yield where, value

    def elements(self, leaf):
        try:
            value = json.loads(leaf.stream.read())
        except (ValueError, RecursionError) as e:
            where = f"{leaf.name}:{e.lineno}" if isinstance(e, json.JSONDecodeError) else leaf.name
            raise Refused(f"{where}: not valid JSON in UTF-8. Repair it, or give a record a line.") from None
        self.progress()
        for number, element in enumerate(value if isinstance(value, list) else [value], 1):
            self.counts.seen += 1
            yield f"{leaf.name}: record {number}", element

    def lines(self, leaf):
        for where, value in self.values(leaf):
            try:
                text = under(value, self.rules.field).encode()
            except UnicodeError:  # half of a surrogate pair
                self.not_json(where)
                continue
            except (KeyError, TypeError, AttributeError, IndexError):
                self.bad(where, f"no text under {self.rules.field!r}",
                         "Give its name with --field, or leave it out with --skip-bad.")
                continue
            if text:
                yield where, text

    def texts(self, leaf):
        name, stream, separator = leaf.name, leaf.stream, self.rules.separator
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
                self.rules.parted |= cut >= 0
                text, rest = (rest[:cut], rest[cut + len(separator):]) if cut >= 0 else (rest, b"")
                start = 0
                if text := text.strip():
                    self.progress()
                    yield f"{name}: document {number}", text
                number += 1
                self.at = f"{name}: document {number}"
            if not block:
                return

    def rows(self, leaf):
        """of parquet"""
        name, field, row = leaf.name, self.rules.field, 0
        pq, pc, pa = (package(module, name) for module in ("pyarrow.parquet", "pyarrow.compute", "pyarrow"))
        try:
            with pq.ParquetFile(leaf.stream if on_disk(leaf.stream) else spool(leaf.stream)) as file:
                path, kind = self.column(name, file, pa)
                rows = max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                    column = batch.column(batch.schema.get_field_index(path[0]))
                    for part in path[1:]:
                        column = pc.struct_field(column, part)
                    for text in column.cast(pa.large_binary()).to_pylist():  # UTF-8 is checked later
                        row += 1
                        self.counts.seen += 1
                        if leaf.name == self.source.name:
                            self.done = self.source.size * row // rows
                        if text is None:
                            self.bad(f"{name}: row {row}", f"no text under {field!r}",
                                     "Repair or remove the row, or leave it out with --skip-bad.")
                        elif text:
                            yield f"{name}: row {row}", text
        except (pa.ArrowException, OSError) as e:
            what = " ".join(str(e).split())[:120]
            if "Unrecognized type" in what:
                raise Refused(f"{name}: its types are newer than the package pyarrow {pa.__version__}. "
                              "pip install -U pyarrow") from None
            raise Refused(f"{name}: row {row + 1}: damaged or cut short ({what}). Fetch the file again.") from None

    def column(self, name, file, pa):
        """(path, type) of the field"""
        field, schema = self.rules.field, file.schema_arrow
        path = [field] if field in schema.names else field.split(".")
        try:
            kind = schema.field(path[0]).type
            for part in path[1:]:
                kind = kind.field(part).type
        except (KeyError, TypeError, AttributeError):  # no such name, or no struct
            columns = [file.schema.column(i).path for i in range(len(file.schema))]
            raise Refused(f"{name}: it has no column {field!r}, but {', '.join(columns)}. Give one with "
                          "--field.") from None
        of = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not re.fullmatch(r"(?:large_)?(?:string|binary)(?:_view)?", str(of)):
            raise Refused(f"{name}: column {field!r} holds {kind}, no text. Give another with --field.")
        return path, kind
