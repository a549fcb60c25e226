#!/usr/bin/env python3
"""Tests of the programs in dev/data through their command lines. Needs numpy; what needs pyarrow, zstandard,
sentencepiece, tiktoken or tokenizers is skipped where that package is missing."""
import base64
import bz2
import contextlib
import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import random
import runpy
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest
import unittest.mock
import zipfile
from pathlib import Path

sys.dont_write_bytecode = True
DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import common  # noqa: E402
import convert_tokenizer  # noqa: E402
import prepare  # noqa: E402
import reading  # noqa: E402
import shards  # noqa: E402
from lines import run_all  # noqa: E402

BOS, EOS = 256, 257
MODULES = {  # stand-ins for the package sentencepiece
    "wide": """class SentencePieceProcessor:
    def __init__(self, model_proto): self.check = model_proto.index(b"model")
    def vocab_size(self): return 70000
    def bos_id(self): return 1
    def eos_id(self): return 2
    def encode(self, text): return [69000 + ord(c) for c in text]
""",
}


def read_shard(path):
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    code, width = {(20240520, 1): ("H", 2), (20240801, 7): ("I", 4)}[header[:2]]
    tokens = struct.unpack(f"<{(len(data) - 1024) // width}{code}", data[1024:])
    assert header[2] == len(tokens) and not any(header[3:]), header[:5]
    return list(tokens)


def packed(*documents):
    return [token for d in documents for token in [BOS, *d, EOS]]


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.dir = Path(scratch.name)
        self.out = self.dir / "out"

    def file(self, name, contents):
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        return path

    def fork(self, program, args, change=lambda: None, stdin=b""):
        """(status, stdout, stderr) of the program in a copy of this process, which spares it Python's start; change()
        is called in the copy first"""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            sys.stdout.flush()
            child = os.fork()
            if not child:
                status = 70
                try:
                    for n, f in enumerate((given, out, err)):
                        os.dup2(f.fileno(), n)
                    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
                    sys.argv = [program, *map(str, args)]
                    change()
                    if program == "prepare":
                        status = common.run("prepare", prepare.main) or 0
                    else:
                        runpy.run_path(str(DATA / f"{program}.py"), run_name="__main__")
                        status = 0
                except SystemExit as e:
                    status = e.code if isinstance(e.code, int) else 1 if e.code else 0
                    if isinstance(e.code, str):
                        print(e.code, file=sys.stderr)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    with contextlib.suppress(BaseException):
                        sys.stdout.flush()
                        sys.stderr.flush()
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            return status, out.read().decode(), err.read().decode()

    def run_program(self, program, *args, module=None, missing=(), chunk=None, status=0, stdin=b"",
                    environment=None, warned=(), piped=None):
        """what it printed; module: stand-in for sentencepiece; missing: packages; chunk: tokens and bytes at a time;
        warned: words of its warnings, in order, a line each; piped: a file that comes through /dev/fd/63"""
        def change():
            if piped:
                self.writer = subprocess.Popen(["cat", piped], stdout=subprocess.PIPE)
                os.dup2(self.writer.stdout.fileno(), 63)
            os.environ.update(environment or {})
            for name in missing:
                sys.modules[name] = None
            if module:
                self.file("modules/sentencepiece.py", MODULES[module])
                sys.path.insert(0, str(self.dir / "modules"))
            if chunk:
                shards.CHUNK = prepare.BATCH = chunk

        code, out, err = self.fork(program, args, change, stdin)
        self.assertEqual(code, status, err)
        if status == 0:
            self.assertEqual(err.count("\n"), len(warned), err)
            for line, words in zip(err.splitlines(), warned):
                self.assertIn(words, line)
                self.assertTrue(line.startswith(f"{program}: warning: "), line)
        return out if status == 0 else err

    def refused(self, program, *args, words, **options):
        """one line `program: ... words ... .`, nothing written"""
        def written():
            return [p for p in self.dir.rglob("*") if p.suffix in (".bin", ".tmp", ".part")]

        before = written()
        error = self.run_program(program, *args, status=1, **options)
        self.assertRegex(error, rf"^{program}: [^\n]+\n$")
        self.assertIn(words, error)
        self.assertEqual(written(), before)
        return error

    def prepare(self, *args, **options):
        return self.run_program("prepare", *args, "--out", self.out, "--prefix", "x", **options)

    def stream(self, split):
        """tokens of all shards of the split"""
        return [t for path in sorted(self.out.glob(f"x_{split}_*.bin")) for t in read_shard(path)]

    def manifest(self):
        return json.loads((self.out / "x_manifest.json").read_text())


class Prepare(Case):
    def test_one_document_loses_its_tail(self):
        text = bytes(range(256)) * 4
        self.prepare(self.file("a.txt", text), "--val-fraction", "0.25", "--format", "text")
        self.assertEqual(self.stream("train"), packed(text[:768]))
        self.assertEqual(self.stream("val"), packed(text[768:]))

    def test_tail_starts_with_a_character(self):
        for shift in range(4):
            text = "a" * shift + "\U0001f600" * 40
            self.prepare(self.file("a.txt", text))
            for split in ("train", "val"):
                bytes(t for t in self.stream(split) if t < 256).decode()
            self.assertEqual(len(self.stream("train") + self.stream("val")), shift + 160 + 4)

    def test_every_kth_document_of_jsonl(self):
        texts = [f"document {i} \u00e9\U0001f600" for i in range(25)]
        lines = "\n".join(json.dumps({"id": i, "body": t}) for i, t in enumerate(texts)) + "\n\n"
        self.prepare(self.file("a.jsonl", lines), "--jsonl-key", "body", "--val-fraction", "0.2")
        texts = [t.encode() for t in texts]
        self.assertEqual(self.stream("val"), packed(*texts[4::5]))
        self.assertEqual(self.stream("train"), packed(*(t for i, t in enumerate(texts) if i % 5 != 4)))

    def test_directory_sorted_filtered_visible(self):
        for name in ("b/2.py", "b/10.py", "a.py", "c.txt", ".hidden.py", ".git/x.py", "empty.py"):
            self.file("top/" + name, "" if name == "empty.py" else name)
        self.prepare(self.dir / "top", "--glob", "*.py", "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(b"a.py", b"b/10.py", b"b/2.py"))
        self.assertEqual(self.stream("val"), [])
        self.assertEqual(self.manifest()["sources"], 4)
        self.assertEqual(self.manifest()["documents"], 3)

    def test_shards_are_cut(self):
        text = bytes(range(97, 123)) * 10
        self.prepare(self.file("a.txt", text), "--shard-tokens", "100", "--val-fraction", "0")
        shards = [read_shard(p) for p in sorted(self.out.glob("x_train_*.bin"))]
        self.assertEqual([len(s) for s in shards], [100, 100, 62])
        self.assertEqual(sum(shards, []), packed(text))

    def test_same_bytes_again_and_old_shards_go(self):
        path = self.file("a.txt", "some text, " * 100)
        self.prepare(path)
        first = {p.name: p.read_bytes() for p in self.out.iterdir()}
        self.prepare(path, "--shard-tokens", "50")
        self.assertGreater(len(list(self.out.iterdir())), 20)
        self.prepare(path)
        self.assertEqual({p.name: p.read_bytes() for p in self.out.iterdir()}, first)

    def test_manifest(self):
        self.prepare(self.file("a.txt", "some text, " * 100), "--shard-tokens", "500")
        for split in ("train", "val"):
            part = self.manifest()[split]
            names = sorted(p.name for p in self.out.glob(f"x_{split}_*.bin"))
            self.assertEqual([s["name"] for s in part["shards"]], names)
            for s in part["shards"]:
                self.assertEqual(s["sha256"], hashlib.sha256((self.out / s["name"]).read_bytes()).hexdigest())
                self.assertEqual(s["tokens"], len(read_shard(self.out / s["name"])))
            self.assertEqual(part["tokens"], len(self.stream(split)))
            self.assertEqual(part["bytes"], sum(t < 256 for t in self.stream(split)))

    def test_bigram_loss(self):
        path = self.file("a.txt", "the cat sat on the mat. " * 50 + "a dog ate it " * 10)
        said = self.prepare(path)
        train, val, V, n = self.stream("train"), self.stream("val"), 258, {}
        for a, b in zip(train, train[1:]):
            n[a, b] = n.get((a, b), 0) + 1
            n[a] = n.get(a, 0) + 1
        loss = [-math.log((n.get((a, b), 0) + 1) / (n.get(a, 0) + V)) for a, b in zip(val, val[1:])]
        mean = sum(loss) / len(loss)
        self.assertAlmostEqual(self.manifest()["bigram_val_loss"], mean, delta=1e-6)  # rounded to six digits
        self.assertIn(f"{mean:.4f}", said)
        whole = {p.name: p.read_bytes() for p in self.out.iterdir()}
        self.prepare(path, chunk=7)
        self.assertEqual({p.name: p.read_bytes() for p in self.out.iterdir()}, whole)

    def test_stdlib(self):
        self.run_program("prepare", "--stdlib", "--out", self.out, "--prefix", "x")
        self.assertGreater(self.manifest()["train"]["bytes"], 3_000_000)
        self.assertLess(self.manifest()["bigram_val_loss"], 3)

    def test_wide_vocabulary(self):
        model, text = self.file("m.model", "a model"), self.file("a.txt", "h\u00e9")
        self.refused("prepare", text, "--tokenizer", model, "--out", self.out, module="wide",
                     words="m.model: the trainer cannot use it: this is not a sentencepiece model. Give another")
        self.prepare(text, "--tokenizer", model, "--without-generate", "--val-fraction", "0", module="wide")
        self.assertEqual(read_shard(self.out / "x_train_000000.bin"), [1, 69000 + 104, 69000 + 233, 2])
        self.assertEqual((self.out / "x_train_000000.bin").read_bytes()[:4], struct.pack("<i", 20240801))
        self.assertNotIn("bigram_val_loss", self.manifest())

    def test_default_prefix(self):
        self.run_program("prepare", self.file("book.txt", "text " * 100), "--out", self.out)
        self.assertEqual(sorted(p.name for p in self.out.iterdir()),
                         ["book_manifest.json", "book_train_000000.bin", "book_val_000000.bin"])

    def test_refusals(self):
        def refused(*args, words, **options):
            with self.subTest(words):
                self.refused("prepare", *args, "--out", self.out, words=words, **options)

        good, empty = self.file("good.txt", "text " * 100), self.file("empty.txt", "")
        model, latin = self.file("m.model", "a model"), self.file("latin.txt", b"caf\xe9 " * 9)
        refused(words="INPUT")
        refused(good, "--stdlib", words="INPUT")
        refused(good, "--vall", words="--vall")
        refused(self.dir / "nowhere.txt", words="nowhere.txt: there is no such file")
        refused(self.dir, "--glob", "*.none", words="no file in it matches '*.none'")
        refused(empty, words="empty.txt: too little text")
        refused(self.file("one.txt", "x"), words="too little text")
        refused(good, "--val-fraction", "0.6", words="--val-fraction")
        refused(good, "--val-fraction", "nan", words="--val-fraction")
        refused(good, "--val-fraction", "1e-300", words="--val-fraction")
        refused("-", "-", words="-: stands there twice, and can be read but once")
        refused(good, "--shard-tokens", "0", words="--shard-tokens")
        refused(good, "--prefix", "a/b", words="--prefix")
        refused(good, "--tokenizer", model, words="package sentencepiece is missing", missing=["sentencepiece"])
        refused(good, "--tokenizer", self.dir / "none.model", words="none.model: No such file", module="wide")
        refused(latin, "--tokenizer", model, "--without-generate", module="wide",
                words="latin.txt: not UTF-8 at byte 3")
        for line, words in (('{"text": "b"', "not valid JSON"), ('{"text": "\\ud800"}', "not valid JSON in UTF-8"),
                            (b'{"text": "\xff"}', "not valid JSON in UTF-8"), ("[" * 100000, "not valid JSON"),
                            ('{"body": "b"}', "no text under 'text'"), ('{"text": 1}', "no text under 'text'"),
                            ("[1]", "no text under 'text'. Give its name with --field, or leave it out with "
                                     "--skip-bad.")):
            line = line if isinstance(line, bytes) else line.encode()
            refused(self.file("a.jsonl", b'{"text": "a"}\n' * 20 + line + b"\n"), words="a.jsonl:21: " + words, chunk=7)
        self.file("out_is_file", "")
        self.refused("prepare", good, "--out", self.dir / "out_is_file", words="out_is_file")


def needs(package):
    return unittest.skipUnless(importlib.util.find_spec(package), f"the package {package} is missing")


def jsonl(texts, key="text"):
    return "".join(json.dumps({"n": i, key: t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)).encode()


def numbered(n, size=60):
    """n different texts"""
    return [f"{i} \u00e9\U0001f600 " + "words " * (i * 7919 % size) for i in range(n)]


def encoded(texts):
    return [t.encode() for t in texts]


class Corpora(Case):
    """a corpus's files, under their names, from a directory"""
    texts = numbered(45)

    def c4(self, train=(15, 25), val=5):
        """files of C4 with so many documents each, in the directory c4"""
        rest = list(self.texts)
        for split, counts in (("train", train), ("validation", [val] if val else [])):
            for i, n in enumerate(counts):
                self.file(f"c4/en/c4-{split}.{i:05}-of-01024.json.gz", gzip.compress(jsonl(rest[:n])))
                rest = rest[n:]
        return self.dir / "c4"

    def test_c4(self):
        self.file("c4/README.md", "nothing to read")
        self.prepare("--corpus", "c4", "--from", self.c4())
        self.assertEqual(self.stream("train"), packed(*encoded(self.texts[:40])))
        self.assertEqual(self.stream("val"), packed(*encoded(self.texts[40:])))
        manifest = self.manifest()
        self.assertEqual([manifest[k] for k in ("corpus", "subset", "validation", "sources", "documents")],
                         ["c4", "en", "the corpus's own", 3, 45])

    def test_no_validation_files(self):
        """then it is every k-th document, counted over all files"""
        self.prepare("--corpus", "c4", "--from", self.c4(val=0), "--val-fraction", "0.125")
        texts = encoded(self.texts[:40])
        self.assertEqual(self.stream("val"), packed(*texts[7::8]))
        self.assertEqual(self.stream("train"), packed(*(t for i, t in enumerate(texts) if i % 8 != 7)))

    def test_tinystories(self):
        stories = ["one\n\ntwo", "<|endoftext", "three |", "\u00e9nd"]
        text = "\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n\n<|endoftext|>"
        for chunk in (1, 1 << 20):
            with unittest.mock.patch.object(reading, "BLOCK", chunk):
                self.file("ts/TinyStories-train.txt", text)
                self.file("ts/TinyStories-valid.txt", "last")
                self.file("ts/TinyStoriesV2-GPT4-train.txt", "another corpus")
                self.prepare("--corpus", "tinystories", "--from", self.dir / "ts")
                self.assertEqual(self.stream("train"), packed(*encoded(stories)))
                self.assertEqual(self.stream("val"), packed(b"last"))

    def test_tinyshakespeare(self):
        text = bytes(range(97, 123)) * 10
        self.prepare("--corpus", "tinyshakespeare", "--from", self.file("input.txt", text))
        self.assertEqual(self.stream("train") + self.stream("val"), packed(text[:234], text[234:]))

    @needs("pyarrow")
    def test_parquet(self):
        import pyarrow
        import pyarrow.parquet
        texts = self.texts + [""]
        for i, part in enumerate((texts[:30], texts[30:])):
            for name in (f"fw/sample/10BT/00{i}_00000.parquet", f"owt/train-0000{i}-of-00002.parquet"):
                table = pyarrow.table({"id": range(len(part)), "text": part})
                pyarrow.parquet.write_table(table, self.file(name, ""), row_group_size=7)
        for corpus, top in (("fineweb-edu", "fw"), ("openwebtext", "owt")):
            self.prepare("--corpus", corpus, "--from", self.dir / top, "--val-fraction", "0.125")
            self.assertEqual(self.stream("val"), packed(*encoded(self.texts[7::8])))
            self.assertEqual(self.manifest()["documents"], 45)
        path = self.file("a.parquet", "")
        pyarrow.parquet.write_table(pyarrow.table({"body": self.texts + [None], "n": range(46)}), path)
        whole = path.read_bytes()

        def refused(*args, words):
            self.out = self.dir / "refused"
            self.refused("prepare", *args, "--out", self.out, words=words)

        refused(path, words="a.parquet: it has no column 'text', but body, n.")
        refused(path, "--column", "n", words="a.parquet: column 'n' holds int64")
        refused(path, "--column", "body", words="a.parquet: row 46: no text under 'body'")
        refused(self.file("a.parquet", b""), words="a.parquet: the file is empty")
        for damaged in (whole[:-20], b"PAR1", whole[:100] + b"\xff" * (len(whole) - 1000) + whole[-900:]):
            refused(self.file("a.parquet", damaged), "--field", "body", words="a.parquet: row ")

    def test_limit(self):
        """whole documents; of a corpus's own validation a tenth"""
        for chunk in (100, 1 << 20):
            self.prepare("--corpus", "c4", "--from", self.c4((40,), 5), "--limit-tokens", "1000", chunk=chunk)
            for split, limit in (("train", 1000), ("val", 100)):
                texts, some = encoded(self.texts[:40] if split == "train" else self.texts[40:]), []
                while len(packed(*some)) < limit:
                    some.append(texts.pop(0))
                self.assertEqual(self.stream(split), packed(*some))
                self.assertEqual(self.manifest()[split]["documents"], len(some))

    def test_refusals(self):
        def refused(*args, words, **options):
            with self.subTest(words):
                self.refused("prepare", *args, "--out", self.out, words=words, **options)

        c4 = self.c4()
        refused("--corpus", "c4", "--from", self.dir / "none", words="none: there is no such file or directory")
        refused("--corpus", "fineweb-edu", "--from", c4, words="no file of fineweb-edu is there")
        refused("--corpus", "c4", "--subset", "de", "--from", c4, words="--subset: de is none of this corpus")
        refused(c4, "--from", c4, words="--from, --subset: go with --corpus")
        refused("--corpus", "pile", words="invalid choice: 'pile'")
        refused("--corpus", "c4", "--from", c4, "--limit-tokens", "0", words="--limit-tokens: 0 is out of range")
        refused("--corpus", "c4", "--from", c4, "--processes", "0", words="--processes: 0 is out of range")
        for package, name, magic in (("zstandard", "a.jsonl.zst", b"(\xb5/\xfd"), ("pyarrow", "a.parquet", b"PAR1")):
            refused(self.file(name, magic), missing=[package],
                    words=f"{name}: the package {package} is missing. pip install {package}")
        for package, contents in (("tiktoken", "IQ== 0\n"), ("tokenizers", "{}")):
            refused(self.file("a.txt", "text"), "--tokenizer", self.file("tokenizer", contents), missing=[package],
                    words=f"tokenizer: the package {package} is missing. pip install {package}")


class Inputs(Case):
    """compression, the standard input, damage"""
    texts = numbered(60)

    def same(self, *args, **options):
        self.prepare(*args, "--val-fraction", "0", **options)
        self.assertEqual(self.stream("train"), packed(*encoded(self.texts)))

    def test_gzip(self):
        lines = jsonl(self.texts)
        for name in ("a.jsonl.gz", "a.json.gz"):
            self.same(self.file(name, gzip.compress(lines[:999]) + gzip.compress(lines[999:])))
        self.prepare(self.file("b.txt.gz", gzip.compress(b"some text")), "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(b"some text"))
        self.run_program("prepare", self.dir / "b.txt.gz", "--out", self.out)
        self.assertTrue((self.out / "b_manifest.json").exists())

    @needs("zstandard")
    def test_zstd(self):
        import zstandard
        lines, compress = jsonl(self.texts), zstandard.ZstdCompressor(write_content_size=False).compress
        whole = compress(lines[:999]) + compress(lines[999:])
        self.same(self.file("a.jsonl.zst", whole))
        for damaged in (whole[:-1], whole[:len(whole) // 2], whole[:-400] + b"\xff" * 400, whole[:9]):
            with self.subTest(len(damaged)):
                self.refused("prepare", self.file("a.jsonl.zst", damaged), "--out", self.dir / "no", "--prefix", "x",
                             words="damaged or cut short from here on")

    def test_standard_input(self):
        self.same("-", "--format", "jsonl", stdin=jsonl(self.texts))
        self.prepare("-", stdin=b"0123456789")
        self.assertEqual(self.stream("train") + self.stream("val"), packed(b"012345678", b"9"))
        for separator in ("|", os.fsdecode(b"\xff")):  # which need not be text
            self.prepare("-", "--separator", separator, "--val-fraction", "0.5",
                         stdin=b"a|b| c\n|d".replace(b"|", os.fsencode(separator)))
            self.assertEqual(self.stream("train") + self.stream("val"), packed(b"a", b"c", b"b", b"d"))

    def test_damage(self):
        lines = jsonl(self.texts)
        packed_lines = gzip.compress(lines, mtime=0)

        def refused(name, contents, words, *args, **options):
            with self.subTest(words):
                return self.refused("prepare", self.file(name, contents), *args, "--out", self.out, words=words,
                                    **options)

        error = refused("a.jsonl.gz", packed_lines[:-9], "damaged or cut short from here on")
        self.assertRegex(error, r"a\.jsonl\.gz:\d+: ")
        broken = bytearray(packed_lines)
        broken[len(broken) // 2] ^= 255
        refused("a.jsonl.gz", bytes(broken), "a.jsonl.gz:")
        refused("a.jsonl.gz", packed_lines + lines, "a.jsonl.gz:61: damaged or cut short from here on (Not a gzipped")
        refused("a.jsonl.gz", b"", "a.jsonl.gz: the file is empty")
        refused("a.jsonl", b"", "a.jsonl: the file is empty")
        refused("a.jsonl", lines[:-9], "a.jsonl:60: not valid JSON")
        refused("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a.txt: only Git LFS's pointer")
        model = self.file("m.model", "a model")
        refused("a.txt", b"good|caf\xe9|good", "a.txt: document 2: not UTF-8 at byte 3", "--separator", "|",
                "--val-fraction", "0", "--tokenizer", model, "--without-generate", module="wide")
        model.write_bytes(b"SGPTTOK1")
        refused("a.txt", b"good", "m.model: this file is the trainer's", "--tokenizer", model)


def tar(members, compression=""):
    """an archive of (name, bytes)"""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:" + compression) as archive:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return made.getvalue()


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, contents in members:
            archive.writestr(name, contents)
    return made.getvalue()


def zst(data):
    import zstandard
    return zstandard.ZstdCompressor().compress(data)


COMPRESSIONS = {"plain": lambda data: data, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress,
                "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
                "twice": lambda data: bz2.compress(gzip.compress(data))}
if importlib.util.find_spec("zstandard"):
    COMPRESSIONS["zstd"] = zst


class Kinds(Case):
    """What a file is, its bytes tell: under any name, in any compression, as a file and through pipes."""
    texts = numbered(60)
    card = ("README.md", b"---\nlicense: mit\n---\n# Data\n")

    def ways(self, contents, *args, names=("a", "a.txt", "data.json.gz"), want=None, **options):
        """the documents of contents in every compression, by every way"""
        want = packed(*encoded(self.texts)) if want is None else want
        ways = [*zip(COMPRESSIONS, itertools.cycle(names)), ("plain", "-"), ("xz", "-"), ("gzip", "/dev/fd/63")]
        for compression, name in ways:
            with self.subTest(compression=compression, name=name):
                given = self.file(name if name in names else "piped", COMPRESSIONS[compression](contents))
                self.prepare(given if name in names else name, *args, "--val-fraction", "0", **options,
                             stdin=given.read_bytes(), piped=given if name == "/dev/fd/63" else None)
                self.assertTrue(self.stream("train") == want, self.manifest())
                shutil.rmtree(self.out)

    def refused(self, name, contents, words, *args, **options):
        with self.subTest(name, words=words):
            super().refused("prepare", self.file(name, contents), *args, "--out", self.out, words=words, **options)

    def test_lines(self):
        self.ways(jsonl(self.texts), names=("a", "data.json", "a.txt.gz"))

    def test_lines_that_are_long(self):
        texts = ["x" * 100_000 + f" {i}" for i in range(3)]
        self.ways(b"\n" + jsonl(texts), names=("a.json",), want=packed(*encoded(texts)))

    def test_a_bad_first_line(self):
        """makes no text of the others"""
        lines = jsonl(self.texts)
        self.refused("a", b'{"text": "cut\n' + lines, "a:1: not valid JSON")
        self.refused("a", b"null\n" + lines, "a:1: no text under 'text'")
        self.prepare(self.file("a", b"id, text\n" + lines), "--skip-bad", "--val-fraction", "0",
                     warned=[f"1 of 61 records are bad and left out. The first: {self.dir}/a:1: not valid JSON"])
        self.assertEqual(self.stream("train"), packed(*encoded(self.texts)))

    def test_array(self):
        records = [{"n": i, "text": t} for i, t in enumerate(self.texts)]
        for indent in (None, 2):
            self.ways(json.dumps(records, indent=indent).encode(), names=("a.json",))
        self.refused("a.json", json.dumps(records[:9] + [{"n": 1}]), "a.json: record 10: no text under 'text'")
        self.refused("a.json", json.dumps(records, indent=2)[:-30], "a.json:240: not valid JSON")
        self.refused("a", json.dumps({"version": 1, "data": records}, indent=2), "a: record 1: no text under 'text'")
        self.refused("a", b'["one", "two"]', "a: record 1: no text under 'text'")
        self.refused("a.json", b"no JSON", "a.json:1: not valid JSON")

    def test_text(self):
        text = "[Illustration]\n{not: JSON}\n\u00e9\U0001f600 " * 50
        for name in ("a", "a.md", "a.gz", "a.bz2"):
            self.ways(text.encode(), names=(name,), want=packed(text.encode()))
        for start in ("\x0e\x0f" * 9, "PARENTS", "GGUF is", "BZh9 is", "RIFF and", "PK is", "ARROW1 is", "{name}: is",
                      '["a", or so'):
            self.prepare(self.file("a.txt", start), "--val-fraction", "0")
            self.assertEqual(self.stream("train"), packed(start.encode()))
        self.prepare(self.file("a.txt", jsonl(self.texts)), "--format", "text", "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(jsonl(self.texts)))

    def test_marks(self):
        """UTF-8's is no text, UTF-16 and UTF-32 are decoded"""
        text = "caf\u00e9 \U0001f600\r\n" * 9
        want = packed(text.encode())
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            self.ways(text.encode(encoding), names=("a.txt",), want=want)
        self.ways(b"\xfe\xff" + text.encode("utf-16-be"), names=("a.txt",), want=want)
        self.ways(jsonl(self.texts).decode().encode("utf-16"), names=("a.jsonl",))
        self.ways(b"\xef\xbb\xbf" + jsonl(self.texts), names=("a.jsonl",))
        self.refused("a.txt", ("caf\u00e9\r\n" * 9).encode("utf-16-le"), "a.txt: UTF-16 without its mark, no text")
        self.refused("a.txt", b"\xff\xfe" + b"\0\xd8" * 9, "a.txt: begins as UTF-16, but is not. Convert it to UTF-8.")

    def test_binary(self):
        """is refused, with its kind"""
        for contents, words in ((b"%PDF-1.7\ntext", "a PDF"), (b"\x89PNG\r\n", "a picture"), (b"\x7fELF", "a program"),
                                (b"\x93NUMPY\1", "a Numpy file"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
                                (b"ARROW1\0\0", "an Arrow file"), (b"SQLite format 3\0", "an SQLite database"),
                                (struct.pack("<3i", 20240520, 1, 0), "a shard of tokens, no text. Give it to the"),
                                (struct.pack("<200H", *range(200)), "binary, no text"), (bytes(256), "binary"),
                                (b"MMIDIDX\0\0", "Megatron's index of tokens, no text. Turn it into shards"),
                                (zipped([("[Content_Types].xml", b"<xml>")]), "an office document or e-book"),
                                (zipped([("best/data.pkl", b"\x80\2"), ("best/version", b"3\n")]), "a PyTorch file"),
                                (b"!<arch>\na.txt/" + b"text " * 99, "an ar archive"),
                                (b"070701" + b"0" * 104 + b"a.txt\0" + b"text " * 99, "a cpio archive")):
            for name in ("a.txt", "a.bin", "a.jsonl"):
                self.refused(name, contents, f"{name}: {words}")
            self.refused("a.txt", bz2.compress(contents), f"a.txt: {words}")
            super().refused("prepare", "-", "--out", self.out, words=f"-: {words}", stdin=contents)
        short = self.file("short", b"one\0two\0three\0")
        super().refused("prepare", short, "--separator", r"\0", "--out", self.out, words="; --format text takes it as")
        self.prepare(short, "--separator", r"\0", "--format", "text", "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(b"one", b"two", b"three"))

    def test_archives(self):
        """their members in order; neither hidden ones nor those of another kind, which are named"""
        parts = [("d/2.jsonl", jsonl(self.texts[:20])), ("d/1.json.gz", gzip.compress(jsonl(self.texts[20:40]))),
                 ("d/3", lzma.compress(jsonl(self.texts[40:])))]
        left = [("./d/._2.jsonl", b"\0\5\26\7"), ("__MACOSX/d/2.jsonl", b"x"), (".git/config", b"x"), self.card,
                ("a.png", b"\x89PNG")]
        warned = ["left out are README.md (a data set's card), a.png (a picture). Taken are 3 files: jsonl."]
        members = [*left[:3], *parts[:1], *left[3:], *parts[1:]]
        nested = tar([("in.zip", zipped(members[:4])), ("in.tar.bz2", tar(members[4:], "bz2"))])
        self.ways(tar(members), names=("a", "a.tar.gz"), warned=warned)
        self.ways(zipped(members), names=("a.zip",), warned=warned)
        within = warned[0].replace("README.md", "in.tar.bz2/README.md").replace("a.png", "in.tar.bz2/a.png")
        self.ways(nested, names=("a",), warned=[within])
        large = [(name, name.encode() * 1_500_000) for name in "ab"]
        for archive in (tar(large), zipped(large), tar(large, "gz")):
            self.prepare("-", "--val-fraction", "0", stdin=archive)
            self.assertTrue(self.stream("train") == packed(*(text for _, text in large)))
        behind = tar(large[:1]) + tar(large[1:])  # cat a.tar b.tar
        old = tar([("b.txt", b"text " * 20000)])
        old = old[:148] + b" " * 8 + old[156:257] + bytes(243) + old[500:]
        old = old[:148] + b"%06o\0 " % sum(old[:512]) + old[156:]  # as before POSIX
        for archive, want in ((behind, [text for _, text in large]), (old, [b"text " * 20000])):
            for contents in (archive, gzip.compress(archive)):
                self.prepare(self.file("a.txt", contents), "--val-fraction", "0")
                self.assertTrue(self.stream("train") == packed(*want))
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = 0o120777 << 16
        self.prepare(self.file("a.zip", zipped([("a.txt", b"one"), (link, b"a.txt")])), "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(b"one"))
        self.prepare(self.file("a.tar", tar([("a.txt", b"one"), ("b.json", jsonl(["x"])), ("c.txt", b"two")])),
                     "--format", "text", "--val-fraction", "0")
        self.assertEqual(self.stream("train"), packed(b"one", jsonl(["x"]), b"two"))

    def test_damaged_archives(self):
        parts = [(f"{i}.txt", os.urandom(4000).hex().encode()) for i in range(4)]
        whole, stored = tar(parts), zipped(parts, zipfile.ZIP_STORED)
        small, cut = bz2.compress(whole), "damaged or cut short from here on ("
        for name, damaged, words in (
                ("cut member", whole[:12000], cut + "unexpected end"), ("cut header", whole[:8804], cut + "truncated"),
                ("header", whole[:8704] + b"?" * 512 + whole[9216:], cut + "invalid header"),
                ("zip", stored[:5000] + b"?" + stored[5001:], cut + "Bad CRC-32"), ("zip's end", stored[:-40], cut),
                ("gzip", gzip.compress(whole)[:-2000], cut), ("xz", lzma.compress(whole)[:-200], cut),
                ("bzip2", small[:-200], cut), ("bzip2 within", small[:3000] + b"?" * 999 + small[3999:], cut)):
            self.refused(name, damaged, words)
            self.refused(name, damaged, words, "--format", "text")
        for compress in (bz2.compress, lzma.compress):  # in several streams
            one, two = map(compress, (b"one " * 999, b"two"))
            self.refused("a", one + b"XX" + two[2:], "a: " + cut)
            self.prepare(self.file("a", one + bytes(8) + two + bytes(4)), "--val-fraction", "0")
            self.assertEqual(self.stream("train"), packed(b"one " * 999 + b"two"))
            shutil.rmtree(self.out)
        locked = bytearray(stored)
        for at in (6, stored.index(b"PK\1\2") + 8):
            locked[at] |= 1
        self.refused("a.zip", bytes(locked), "a.zip/0.txt: is encrypted. Unpack the archive first.")
        foreign, newer = bytearray(stored), bytearray(stored)
        foreign[8] = foreign[stored.index(b"PK\1\2") + 10] = 9
        newer[stored.index(b"PK\1\2") + 6] = 99
        for contents in (foreign, newer):
            self.refused("a.zip", bytes(contents), "a.zip: this Python cannot unpack it (", "--format", "text")

    def test_no_room_for_a_copy(self):
        def change():
            import resource
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        status, _, error = self.fork("prepare", ["-", "--out", self.out], change, tar([("a", b"text" * 999)]))
        self.assertEqual((status, error.count("\n")), (1, 1), error)
        self.assertIn("File too large. A pipe or a part of an archive is copied there: name a folder with room in",
                      error)

    def test_folder(self):
        """its files of the kind with most bytes; a cloned data set's card is no document"""
        for name, contents in (self.card, ("dataset_infos.json", b'{"default": {"features": 1}}'),
                               ("data/a.jsonl", jsonl(self.texts[:30])),
                               ("data/b", gzip.compress(jsonl(self.texts[30:]))), (".gitattributes", b"x"),
                               ("c.png", b"\x89PNG")):
            self.file("set/" + name, contents)
        top, want = self.dir / "set", packed(*encoded(self.texts))
        warned = [f"{top}: left out are README.md (a data set's card), c.png (a picture), dataset_infos.json "
                  "(a data set's card). Taken are 2 files: jsonl."]
        for args in ([], ["--format", "jsonl"]):
            self.prepare(top, *args, "--val-fraction", "0", warned=warned)
            self.assertEqual(self.stream("train"), want)
            self.assertEqual(self.manifest()["sources"], 2)
        self.file("set/a.txt", "x" * 20000)
        self.prepare(top, "--val-fraction", "0", warned=["Taken are 1 files: text."])
        self.assertEqual(self.stream("train"), packed(b"x" * 20000))
        self.prepare(top, "--format", "text", "--val-fraction", "0",
                     warned=["c.png (a picture). Taken are 5 files: jsonl, text."])
        self.assertEqual(self.manifest()["sources"], 5)
        super().refused("prepare", top, "--glob", "*.png", "--out", self.out,
                        words=f"{top}: no file in it is text, JSON or parquet: c.png (a picture). Give others.")
        super().refused("prepare", top, "--glob", "*.txt", "--format", "parquet", "--out", self.out, words="is parquet")
        self.file("set/d.parquet", b"version https://git-lfs.github.com/spec/v1\n")
        super().refused("prepare", top, "--out", self.out, words="d.parquet: only Git LFS's pointer")

    def test_one_of_two_compressions(self):
        lines = jsonl(self.texts)
        for name, data in (("a.json", lines), ("a.json.gz", gzip.compress(lines)), ("a.json.xz", lzma.compress(lines))):
            self.file("top/" + name, data)
        top = self.dir / "top"
        left = "a.json.gz (a.json is there), a.json.xz (a.json is there)"
        apart = [f"{top}/a.json.{end}: is left out, {top}/a.json is there." for end in ("gz", "xz")]
        archive = self.file("a.tar", tar([("d/a.json.gz", gzip.compress(lines)), ("d/a.json", lines), ("a", lines)]))
        for inputs, warned, times in (([top], [f"{top}: left out are {left}. Taken are 1 files: jsonl."], 1),
                                      (sorted(top.iterdir()), apart, 1),
                                      ([archive], ["are d/a.json (a.json.gz is there). Taken are 2 files"], 2)):
            self.prepare(*inputs, "--val-fraction", "0", warned=warned)
            self.assertEqual(self.stream("train"), packed(*encoded(self.texts)) * times)
        for name, data in (("c4-train.1.json", lines), ("c4-train.1.json.gz", gzip.compress(lines))):
            self.file("c4/" + name, data)
        self.prepare("--corpus", "c4", "--from", self.dir / "c4", warned=["c4-train.1.json.gz: is left out"],
                     status=0, *["--val-fraction", "0"])
        self.assertEqual(self.stream("train"), packed(*encoded(self.texts)))

    @needs("pyarrow")
    def test_columns(self):
        """every type that holds text, and fields of fields"""
        import pyarrow
        from pyarrow.parquet import write_table
        types = ["string", "large_string", "binary", "large_binary"]
        types += [t for t in ("string_view", "binary_view") if hasattr(pyarrow, t)]
        for kind in types:
            texts = encoded(self.texts) if "binary" in kind else self.texts
            table = pyarrow.table({"text": pyarrow.array(texts, getattr(pyarrow, kind)())})
            try:
                write_table(table, self.file(kind, ""))
            except pyarrow.ArrowNotImplementedError:  # an older package
                continue
            self.prepare(self.dir / kind, "--val-fraction", "0")
            self.assertEqual(self.stream("train"), packed(*encoded(self.texts)))
        self.ways((self.dir / "string").read_bytes(), names=("a", "a.jsonl", "a.txt.gz"))
        some = pyarrow.array(self.texts)
        deep = pyarrow.StructArray.from_arrays([pyarrow.StructArray.from_arrays([some], ["c"]), some], ["b", "d"])
        table = pyarrow.table({"text": some.dictionary_encode(), "a": deep, "a.d": [t + "!" for t in self.texts],
                               "n": [1] * 60})
        write_table(table, path := self.file("columns", ""))
        for field in ("text", "a.b.c", "a.d"):
            self.prepare(path, "--field", field, "--val-fraction", "0")
            end = "!" if field == "a.d" else ""  # the column of that name, rather than the field of a field
            self.assertEqual(self.stream("train"), packed(*encoded(t + end for t in self.texts)))
        for field, words in (("a.x", "it has no column 'a.x', but text, a.b.c, a.d, a.d, n"),
                             ("n.x", "no column 'n.x'"), ("a", "'a' holds struct<"), ("n", "holds int64, no text")):
            super().refused("prepare", path, "--field", field, "--out", self.out, words=words)
        self.ways(tar([("x/a.parquet", path.read_bytes()), self.card]), names=("a",),
                  warned=["left out are README.md (a data set's card). Taken are 1 files: parquet."])
        self.ways(zipped([("x/a.parquet", path.read_bytes())]), names=("a",))

    def test_fields_of_fields(self):
        lines = b"".join(json.dumps({"meta": {"text": t, "n": 1}, "a.b": t}).encode() + b"\n" for t in self.texts)
        for field in ("meta.text", "a.b"):
            self.ways(lines, "--field", field, names=("a",))
        for field in ("meta", "meta.n", "meta.text.x", "meta.x", ".", "meta."):
            self.refused("a", lines, f"a:1: no text under '{field}'", "--field", field)


class Bad(Case):
    """records that are bad, with --skip-bad"""
    texts = numbered(60)
    lines = [b'{"text": "cut', b'{"body": "b"}', b'{"text": "\\ud800"}', b'{"text": 1}', b"[1]", b'{"text": "\xff"}']

    def test_lines(self):
        good = jsonl(self.texts).splitlines(True)
        lines = b"".join(good[:9] + [line + b"\n" for line in self.lines] + good[9:])
        for name, data in (("a.jsonl", lines), ("a.gz", gzip.compress(lines)), ("a.tar", tar([("b", lines)]))):
            where = f"{self.dir / name}{'/b' if name == 'a.tar' else ''}:10: not valid JSON"
            self.prepare(self.file(name, data), "--skip-bad", "--val-fraction", "0.1",
                         warned=["6 of 66 records are bad and left out. The first: " + where])
            self.assertEqual(self.stream("train") + self.stream("val"),
                             packed(*encoded([t for i, t in enumerate(self.texts) if i % 10 != 9] + self.texts[9::10])))
            self.assertEqual(self.manifest()["bad_records"], 6)
        self.prepare(self.file("b.jsonl", jsonl(self.texts)), "--skip-bad")
        self.assertEqual(self.manifest()["bad_records"], 0)
        array = json.dumps([{"text": t} for t in self.texts] + [1, {"text": "\ud800"}])
        self.prepare(self.file("c.json", array), "--skip-bad", warned=["2 of 62 records are bad and left out"])

    def test_too_many(self):
        """a tenth is not, more are; of long inputs before their end"""
        for bad, good in ((6, 54), (7, 53)):
            path = self.file("a.jsonl", jsonl(self.texts[:good]) + b"{}\n" * bad)
            if bad == 6:
                self.prepare(path, "--skip-bad", warned=["6 of 60 records are bad"])
            else:
                self.refused("prepare", path, "--skip-bad", "--out", self.dir / "no", words="7 of 60 records are bad, "
                             "--skip-bad leaves out 10% at most")
        self.refused("prepare", self.file("a.jsonl", jsonl(self.texts) + b"{}\n" * 5000), "--skip-bad", "--out",
                     self.dir / "no", words="a.jsonl:61: no text under 'text'. 101 of 161 records are bad")

    @needs("pyarrow")
    def test_rows(self):
        import pyarrow
        from pyarrow.parquet import write_table
        write_table(pyarrow.table({"text": self.texts[:30] + [None] + self.texts[30:]}), path := self.file("a", ""))
        self.prepare(path, "--skip-bad", "--val-fraction", "0", warned=[
            f"1 of 61 records are bad and left out. The first: {path}: row 31: no text under 'text'."])
        self.assertEqual(self.stream("train"), packed(*encoded(self.texts)))


class Names(Case):
    """of inputs, separators; pipes"""

    def test_separator(self):
        for given, between in ((r"\n\n", b"\n\n"), (r"\x1e", b"\x1e"), (r"\t\\\r", b"\t\\\r"), (r"\0", b"\0"),
                               (r"\q", rb"\q"), ("\u00e9\\n", "\u00e9\n".encode())):
            with self.subTest(given):
                self.prepare(self.file("a.txt", between.join([b"one", b"two", b"three" * 50])), "--separator", given,
                             "--val-fraction", "0")
                self.assertEqual(self.stream("train"), packed(b"one", b"two", b"three" * 50))
        for contents, want in ((b"one\r\n\r\ntwo", b"one\r\n\r\ntwo"), (jsonl(["one"]), b"one")):
            self.prepare(self.file("a", contents), "--separator", r"\n\n", "--val-fraction", "0",
                         warned=["--separator: it stands in no text that was read"])
            self.assertEqual(self.stream("train"), packed(want))

    def test_prefix(self):
        """is the given name's, not that of what it links to"""
        self.file("store/0123abcd", "text " * 100)
        (self.dir / "book.txt").symlink_to("store/0123abcd")
        self.file("1984", "text " * 100)
        self.file("here/a.txt", "text " * 100)
        for given, prefix in ((self.dir / "book.txt", "book"), (self.dir / "1984", "1984"), ("/dev/fd/63", "pipe"),
                              (f"{self.dir}/here/.", "here"), (f"{self.dir}/store/../here/", "here"), ("-", "stdin")):
            with self.subTest(given):
                self.run_program("prepare", given, "--out", self.out, stdin=b"text " * 100, piped=self.dir / "1984")
                self.assertTrue((self.out / f"{prefix}_manifest.json").exists(), list(self.out.iterdir()))

    def test_substitution(self):
        """the shell's, and a pipe with a name, together with a file"""
        os.mkfifo(self.dir / "pipe")
        self.file("a.jsonl", jsonl(["a"]))
        self.file("b.jsonl", jsonl(["b"]))
        writer = subprocess.Popen(["sh", "-c", "cat a.jsonl >pipe"], cwd=self.dir)
        done = subprocess.run(["bash", "-c", f"{sys.executable} {prepare.__file__} b.jsonl <(cat b.jsonl) pipe "
                               "--out out --prefix x --val-fraction 0"], cwd=self.dir, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual((done.returncode, writer.wait()), (0, 0), done.stderr)
        self.assertEqual(self.stream("train"), packed(b"b", b"b", b"a"))
        self.refused("prepare", "/dev/fd/63", "/dev/fd/63", "--out", self.out, words="/dev/fd/63: stands there twice",
                     piped=self.dir / "a.jsonl")
        self.refused("prepare", "/dev/null", "--out", self.dir / "no", words="/dev/null: too little text")

    def test_where_standard_input_stands(self):
        """what was read of it before is not read again"""
        status, _, error = self.fork("prepare", ["-", "--out", self.out, "--prefix", "x", "--val-fraction", "0"],
                                     lambda: os.lseek(0, 5, os.SEEK_SET), b"head\none two")
        self.assertEqual((status, self.stream("train")), (0, packed(b"one two")), error)

    def test_too_little_memory(self):
        def change():
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))
        os.truncate(path := self.file("a", ""), 1 << 32)
        status, _, error = self.fork("prepare", [path, "--out", self.out, "--format", "text"], change)
        self.assertEqual((status, error.count("\n")), (1, 1), error)
        self.assertIn("prepare: there is too little memory for the largest of what is read. Give it in", error)

    def test_a_file_before_standard_input(self):
        """which is read once, although it is looked into"""
        self.prepare(self.file("a.txt", "one"), "-", "--val-fraction", "0.5", stdin=b"two")
        self.assertEqual((self.stream("train"), self.stream("val")), (packed(b"one"), packed(b"two")))


class Unsynced(Case):
    """folders that cannot be synced: FUSE, some network file systems"""

    def test_not_synced(self):
        def failing(number):
            def change():
                real = os.fsync

                def fsync(fd):
                    if stat.S_ISDIR(os.fstat(fd).st_mode):
                        raise OSError(number, os.strerror(number))
                    real(fd)
                os.fsync = fsync
            return change

        path = self.file("a.txt", "text " * 100)
        for number in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EIO):
            status, _, error = self.fork("prepare", [path, "--out", self.out, "--prefix", "x"], failing(number))
            self.assertEqual(error.count("\n"), 1, error)
            if number == errno.EIO:
                self.assertEqual((status, f"{self.out}: Input/output error" in error), (1, True), error)
            else:
                self.assertEqual(status, 0)
                self.assertIn(f"warning: {self.out}: its file system cannot sync a folder", error)
                self.assertEqual(len(self.stream("train")), 452)


class Tokens(Case):
    """of other trainers, with convert_tokens.py"""

    def convert(self, *args, **options):
        return self.run_program("convert_tokens", *args, "--out", self.out, "--prefix", "x", **options)

    def megatron(self, documents, code=8, name="m", tokens=b"", **changes):
        """a pair of documents: lists of sequences, which are lists of tokens; changes: of the index's parts"""
        letter = {1: "B", 4: "i", 5: "q", 8: "H"}[code]
        sequences = [s for d in documents for s in d]
        firsts = list(itertools.accumulate((len(d) for d in documents), initial=0))
        places = list(itertools.accumulate((len(s) * struct.calcsize(letter) for s in sequences), initial=0))[:-1]
        parts = {"magic": b"MMIDIDX\0\0", "version": struct.pack("<Q", 1), "type": bytes([code]),
                 "sequences": struct.pack("<Q", len(sequences)), "documents": struct.pack("<Q", len(firsts)),
                 "lengths": struct.pack(f"<{len(sequences)}i", *map(len, sequences)),
                 "places": struct.pack(f"<{len(places)}q", *places),
                 "firsts": struct.pack(f"<{len(firsts)}q", *firsts), "end": b"", **changes}
        flat = [t for s in sequences for t in s]
        self.file(name + ".bin", tokens or struct.pack(f"<{len(flat)}{letter}", *flat))
        return self.file(name + ".idx", b"".join(parts.values()))

    def test_without_a_header(self):
        ids = [i * 7919 % 50257 for i in range(1000)]
        for dtype, letter in (("uint16", "H"), ("uint32", "I")):
            path = self.file("train.bin", struct.pack(f"<1000{letter}", *ids))
            said = self.convert(path, "--dtype", dtype, "--val-fraction", "0.25", "--vocab-size", "50257",
                                "--shard-tokens", "300", chunk=7)
            self.assertIn("train 750 tokens of 1 documents in 3 shards", said)
            self.assertEqual((self.stream("train"), self.stream("val")), (ids[:750], ids[750:]))
            self.assertEqual([len(read_shard(p)) for p in sorted(self.out.glob("*train*.bin"))], [300, 300, 150])
            self.assertEqual(self.manifest()["vocab_size"], 50257)
            self.assertIn("are as they were written", self.run_program("prepare", "--verify", "--out", self.out))
        val = self.file("val.bin", struct.pack("<3H", 5, 6, 7))
        self.convert(self.file("train.bin", struct.pack("<1000H", *ids)), "--val", val)
        self.assertEqual((self.stream("train"), self.stream("val")), (ids, [5, 6, 7]))
        self.assertEqual(self.manifest()["vocab_size"], max(ids) + 1)
        self.convert(self.file("wide.bin", struct.pack("<3I", 1, 70000, 2)), "--dtype", "uint32", "--val-fraction", "0")
        self.assertEqual(self.stream("train"), [1, 70000, 2])
        self.assertEqual(next(self.out.glob("*.bin")).read_bytes()[:4], struct.pack("<i", 20240801))
        self.run_program("convert_tokens", val, "--out", self.out)
        self.assertTrue((self.out / "val_manifest.json").exists())

    def test_megatron(self):
        documents = [[[i % 100, i] * (i % 4), [9]] for i in range(45)]
        flat = [[t for s in d for t in s] for d in documents]
        for code in (8, 1, 4, 5):
            index = self.megatron(documents, code)
            for path in (index, index.with_suffix(".bin")):
                said = self.convert(path, "--val-fraction", "0.125", chunk=7)
                self.assertEqual(self.stream("val"), sum(flat[7::8], []))
                self.assertEqual(self.stream("train"), sum((d for i, d in enumerate(flat) if i % 8 != 7), []))
            self.assertIn("val   35 tokens of 5 documents", said)
        self.convert(self.megatron(documents[:3] + [[], [[]]] + documents[3:], end=bytes(91)), "--val-fraction", "0.02")
        self.assertEqual((self.stream("train") + self.stream("val"), self.manifest()["documents"]), (sum(flat, []), 45))
        self.convert(self.megatron([[[1, 2]], [[3]]]), "--val-fraction", "0", warned=["m.bin: its documents end with "
                                                                                      "different tokens"])
        self.assertEqual(self.stream("train"), [1, 2, 3])

    def test_refusals(self):
        def refused(*args, words, **options):
            with self.subTest(words):
                self.refused("convert_tokens", *args, "--out", self.out, words=words, **options)

        good, documents = self.file("good.bin", struct.pack("<99H", *range(99))), [[[1, 2]], [[3, 4], [5]]]
        for name, contents, words in (
                ("a", b"text " * 99, "a: text, no tokens"), ("a", jsonl(["a"]), "a: jsonl, no tokens"),
                ("a", gzip.compress(good.read_bytes()), "a: gzip"),
                ("a", b"\0" * 99, "a: 99 bytes are no tokens of 2"),
                ("a", b"", "a: text"), ("a", struct.pack("<256i", 20240520, 1, *[0] * 254), "a: a shard of"),
                ("a", b"\x93NUMPY\1\0", "a: a Numpy file"), ("m.idx", b"MMIDIDX\0", "m.idx: is no index of"),
                ("a", b"\7\0", "a: too few tokens. Give more, or --val-fraction 0")):
            refused(self.file(name, contents), words=words)
            (self.dir / name).unlink()
        for changes, words in (({"version": struct.pack("<Q", 2)}, "is no index"), ({"type": b"\7"}, "is no index"),
                               ({"sequences": b"\xff" * 8}, "m.idx: has 94 bytes, its header promises"),
                               ({"firsts": b""}, "m.idx: has 70 bytes, its header promises 94"),
                               ({"lengths": struct.pack("<3i", 2, -2, 1)}, "m.idx: its sequences are empty, or do not"),
                               ({"places": struct.pack("<3q", 0, 6, 8)}, "m.idx: its sequences are empty, or do not"),
                               ({"firsts": struct.pack("<3q", 0, 4, 3)}, "m.idx: its documents are not made of"),
                               ({"tokens": bytes(8)}, "m.bin: has 8 bytes, m.idx promises 10")):
            refused(self.megatron(documents, **changes), words=words)
        refused(self.megatron([[[]]]), words="m.idx: its sequences are empty")
        refused(self.megatron([[[1, -2]]], 4), words="m.bin: token 1 is -2. Give ids of tokens.")
        (self.dir / "m.bin").unlink()
        refused(self.dir / "m.idx", words="m.bin: No such file or directory")
        refused(self.dir / "none", words="none: No such file or directory")
        refused(self.dir, words=f"{self.dir}: Is a directory")
        refused(good, "--vocab-size", "98", words="has token 98, --vocab-size is 98")
        refused("/dev/fd/63", piped=good, words="/dev/fd/63: is a pipe, and is read twice. Give a file.")
        ids = [i * 7919 % 50257 for i in range(100)]  # read as of another type
        refused(self.file("a", struct.pack("<100I", *ids)), words="a: every second number of 16 bits is below 256")
        refused(self.file("a", struct.pack("<100H", *ids)), "--dtype", "uint32", words="which is of no vocabulary.")
        refused(good, "--val", good, "--val-fraction", "0.1", words="--val-fraction: --val is all of the validation")
        refused(good, "--val-fraction", "nan", words="--val-fraction")
        refused(good, "--shard-tokens", "0", words="--shard-tokens")
        refused(good, "--prefix", "a/b", words="--prefix")
        self.file("out/good_state.json", "{}")
        refused(good, words="prepare.py was interrupted there")


class Restart(Case):
    """Runs that are cut off. Whatever happens, the output is that of an undisturbed run."""

    def setUp(self):
        super().setUp()
        texts = numbered(120, 30)
        self.inputs = [self.file(f"in/{i}.jsonl.gz", gzip.compress(jsonl(texts[i::3]))) for i in range(3)]
        self.args = [*self.inputs, "--val-fraction", "0.25", "--shard-tokens", "1500", "--prefix", "x"]

    def files(self, out):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}

    def run_until(self, out, change, *args):
        """status and error of a run in small batches, after change()"""
        def changes():
            prepare.BATCH = 500
            change()
        return self.fork("prepare", [*self.args, "--out", out, *args], changes)[::2]

    def undisturbed(self):
        out = self.dir / "undisturbed"
        self.assertEqual(self.run_until(out, lambda: None), (0, ""))
        whole = self.files(out)
        self.assertGreater(len(whole), 8)
        return whole

    def test_killed_at_every_step(self):
        """before and after each write that is forced to the disk and each rename"""
        want, n, resumed = self.undisturbed(), 0, 0

        def killer(n):
            def change():
                left = [n]

                def deadly(call):
                    def wrapped(*args, **options):
                        for before in (True, False):
                            if left[0] == 0:
                                os.kill(os.getpid(), signal.SIGKILL)
                            left[0] -= 1
                            if before:
                                result = call(*args, **options)
                        return result
                    return wrapped

                os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
                Path.unlink = deadly(Path.unlink)
            return change

        while True:
            out = self.dir / "out"
            shutil.rmtree(out, ignore_errors=True)
            status, error = self.run_until(out, killer(n))
            if status == 0:
                break
            self.assertEqual(status, -signal.SIGKILL, error)
            resumed += (out / "x_state.json").exists()
            self.assertEqual(self.run_until(out, lambda: None), (0, ""), n)
            self.assertEqual(self.files(out), want, n)
            n += 3  # a step of three still meets each kind of place many times
        self.assertGreater(n, 60)
        self.assertGreater(resumed, 15)

    def test_goes_on_from_the_last_whole_shard(self):
        """and does not begin anew: documents before it are not tokenized again"""
        self.undisturbed()
        seen = self.dir / "seen"

        def change():
            pack, save, left = prepare.encoders.Bytes.pack, shards.Output.save, [3]

            def counted(encoder, documents):
                with open(seen, "a") as f:
                    f.write("".join(where + "\n" for where, _ in documents))
                return pack(encoder, documents)

            def dying(*args):
                save(*args)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare.encoders.Bytes.pack, shards.Output.save = counted, dying

        self.assertEqual(self.run_until(self.out, change)[0], -signal.SIGKILL)
        before = seen.read_text().split()
        seen.unlink()
        self.run_until(self.out, change)
        again = seen.read_text().split()
        self.assertEqual(set(before) & set(again), set())
        self.assertGreater(min(len(before), len(again)), 10)

    def test_killed_at_random(self):
        """real processes, some of which tokenize"""
        texts = numbered(4000, 400)
        path = self.file("big.jsonl", jsonl(texts))
        command = [sys.executable, DATA / "prepare.py", path, "--shard-tokens", "200000", "--prefix", "x",
                   "--processes"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        begin = time.monotonic()
        subprocess.run([*command, "1", "--out", self.dir / "one"], check=True, **quiet)
        seconds, kills = time.monotonic() - begin, 0
        while kills < 2:  # those that end before do not count
            run = subprocess.Popen([*command, "2", "--out", self.out], **quiet)
            time.sleep(random.uniform(0.2, 1) * seconds)
            kills += run.poll() is None
            run.kill()
            run.wait()
        subprocess.run([*command, "2", "--out", self.out], check=True, **quiet)
        self.assertEqual(self.files(self.out), self.files(self.dir / "one"))
        self.assertTrue(self.stream("val") == packed(*encoded(texts)[9::10]))

    def test_damaged_file_repaired(self):
        want, last = self.undisturbed(), self.inputs[2].read_bytes()
        self.file("in/2.jsonl.gz", last[:-20])
        status, error = self.run_until(self.out, lambda: None)
        self.assertEqual(status, 1)
        self.assertRegex(error, r"in/2\.jsonl\.gz:\d+: damaged or cut short .* command goes on from there\.\n$")
        self.assertEqual([p for p in self.out.iterdir() if p.suffix not in (".tmp", ".json")], [])
        self.file("in/2.jsonl.gz", gzip.compress(gzip.decompress(last), compresslevel=1))
        self.assertEqual(self.run_until(self.out, lambda: None), (0, ""))
        self.assertEqual(self.files(self.out), want)

    def test_damaged_end_cut_off(self):
        """what the interrupted run had written of it does not stay"""
        last = gzip.decompress(self.inputs[2].read_bytes()).splitlines(True)
        self.inputs[2].write_bytes(gzip.compress(b"".join(last[:30])))
        want = self.undisturbed()
        self.inputs[2].write_bytes(gzip.compress(b"".join(last[:36]) + b"{"))
        self.assertEqual(self.run_until(self.out, lambda: None)[0], 1)
        self.inputs[2].write_bytes(gzip.compress(b"".join(last[:30])))
        self.assertEqual(self.run_until(self.out, lambda: None), (0, ""))
        self.assertEqual(self.files(self.out), want)

    def test_other_options_or_input(self):
        want, (first, _, last) = self.undisturbed(), (p.read_bytes() for p in self.inputs)
        self.file("in/2.jsonl.gz", last[:-20])
        self.run_until(self.out, lambda: None)
        state = (self.out / "x_state.json").read_bytes()

        def refused(words, *args):
            with self.subTest(words):
                status, error = self.run_until(self.out, lambda: None, *args)
                self.assertEqual(status, 1, error)
                self.assertIn(words, error)
                self.assertEqual(error.count("\n"), 1)
                self.assertEqual((self.out / "x_state.json").read_bytes(), state)

        refused("an interrupted run with shard_tokens 1500, now 900", "--shard-tokens", "900")
        self.file("in/0.jsonl.gz", first + gzip.compress(b"\n"))
        refused("0.jsonl.gz: has ")
        self.file("in/0.jsonl.gz", first)
        self.file("in/2.jsonl.gz", gzip.compress(gzip.decompress(last).replace(b"words", b"other")))
        refused("2.jsonl.gz: has changed where the interrupted run had read it")
        self.file("in/2.jsonl.gz", last)
        lost = next(self.out.glob("x_train_000000.bin.tmp"))
        part = lost.read_bytes()
        lost.write_bytes(part[:-1])
        refused("x_train_000000.bin.tmp: the interrupted run's file is gone or too short")
        lost.write_bytes(part)
        self.assertEqual(self.run_until(self.out, lambda: None), (0, ""))
        self.assertEqual(self.files(self.out), want)
        (self.out / "x_state.json").write_text("{")
        state = b"{"
        refused("x_state.json: the state is damaged")
        self.assertEqual(self.run_until(self.out, lambda: None, "--restart"), (0, ""))
        self.assertEqual(self.files(self.out), want)

    def test_one_at_a_time(self):
        self.out.mkdir()
        held = os.open(self.out, os.O_RDONLY)
        self.addCleanup(os.close, held)
        shards.fcntl.flock(held, shards.fcntl.LOCK_SH)
        self.refused("prepare", *self.args, "--out", self.out, words="another prepare.py is writing there")

    def test_every_kind(self):
        """goes on from each state within archives, an array, behind bad records and, the same given again, in a pipe"""
        texts = [numbered(40, 30 + i) for i in range(4)]
        lines = jsonl(texts[0])
        self.args = [
            self.file("a.tar.gz", tar([("1", lines), Kinds.card, ("2.gz", gzip.compress(lines + b"{}\n"))], "gz")),
            self.file("b", zipped([("1", lines + b"{\n"), ("2", bz2.compress(lines))])),
            self.file("c.json", json.dumps([{"text": t} for t in texts[1]] + [None])),
            self.file("d", jsonl(texts[2]).decode().encode("utf-16")), "-", "--val-fraction", "0.25", "--shard-tokens",
            "1500", "--prefix", "x", "--skip-bad"]
        given = tar([("x/1", jsonl(texts[3]) + b"{}\n"), ("x/2.xz", lzma.compress(lines))], "xz")

        def run(saves):
            def change():
                prepare.BATCH, left, save = 500, [saves], shards.Output.save

                def dying(*args):
                    save(*args)
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                shards.Output.save = dying
            return self.fork("prepare", [*self.args, "--out", self.out], change, given)

        status, _, error = run(0)
        self.assertEqual((status, error.count("\n")), (0, 2), error)
        self.assertIn("4 of 324 records are bad and left out. The first: " + str(self.dir / "a.tar.gz/2.gz:41"), error)
        want, saves = self.files(self.out), 1
        while True:
            shutil.rmtree(self.out)
            if run(saves)[0] != -signal.SIGKILL:
                break
            status, _, error = run(0)
            self.assertEqual(status, 0, error)
            self.assertIn("4 of 324 records are bad", error)
            self.assertEqual(self.files(self.out), want, saves)
            saves += 1
        self.assertGreater(saves, 8)

    def test_full_disk(self):
        def full():
            import resource
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        status, error = self.run_until(self.out, full)
        self.assertEqual((status, error.count("\n")), (1, 1))
        self.assertIn("File too large", error)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_verify(self):
        self.run_until(self.out, lambda: None)
        said = self.run_program("prepare", "--verify", "--out", self.out)
        self.assertIn(f"{len(self.files(self.out)) - 1} shards are as they were written", said)
        shard = self.out / "x_train_000001.bin"
        whole = shard.read_bytes()
        for damaged, words in ((whole[:-1], "has 4023 bytes, not 4024"), (whole[:-1] + b"\7", "sha256"),
                               (None, "missing")):
            shard.unlink() if damaged is None else shard.write_bytes(damaged)
            error = self.run_program("prepare", "--verify", "--out", self.out, "--prefix", "x", status=1)
            self.assertEqual(error.count("\n"), 1)
            self.assertIn(f"{shard}: ", error)
            self.assertIn(words, error)
        shard.write_bytes(whole)
        (self.out / "x_val_000100.bin").write_bytes(whole)
        error = self.run_program("prepare", "--verify", "--out", self.out, status=1)
        self.assertIn("x_val_000100.bin: is not in the manifest", error)
        for text in ("[]", json.dumps({"vocab_size": 258, **{split: {"tokens": 1, "shards": [
                {"name": "a", "tokens": math.inf, "sha256": ""}]} for split in ("train", "val")}})):
            self.file("out/x_manifest.json", text)
            self.assertIn("not a manifest", self.run_program("prepare", "--verify", "--out", self.out, status=1))
        self.assertIn("no manifest", self.run_program("prepare", "--verify", "--out", self.dir, status=1))


class Streams(Case):
    def test_streams(self):
        """stdin that is closed, stdout that takes nothing: one line"""
        good = str(self.file("good.txt", "text " * 100))
        for source, fd, words in (("-", 0, "-: the standard input is closed. Give it"), (good, 1, "No space left")):
            with open("/dev/full", "w") as full:
                done = subprocess.run([sys.executable, prepare.__file__, source, "--out", str(self.out)], stdout=full,
                                      stderr=subprocess.PIPE, text=True, preexec_fn=lambda: fd or os.close(fd),
                                      env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"})
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
            self.assertIn(words, done.stderr)


class Hub(http.server.BaseHTTPRequestHandler):
    """the little of the Hugging Face hub that is asked for, with its faults: set in class variables"""
    files, log, faults, newest = {}, [], [], "abc"

    def log_message(self, *args):
        pass

    def reply(self, data, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.log.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        if path == "/api/datasets/allenai/c4/revision/main":
            self.reply(json.dumps({"sha": self.newest}).encode())
        elif path == "/api/datasets/allenai/c4/tree/abc/en":
            names = sorted(self.files)
            page = names[1:] if "cursor" in query else names[:1]
            entries = [{"type": "directory", "path": "en", "size": 0}]
            entries += [{"type": "file", "path": n, "size": len(self.files[n]),
                         "lfs": {"oid": hashlib.sha256(self.files[n]).hexdigest()}} for n in page]
            more = {} if "cursor" in query else {
                "Link": f'<http://{self.headers["Host"]}{path}?recursive=true&cursor=1>; rel="next"'}
            self.reply(json.dumps(entries).encode(), **more)
        elif path.startswith("/datasets/allenai/c4/resolve/abc/"):
            self.reply(b"", 302, Location=f'http://127.0.0.1:{self.server.server_port}/cdn/{path[33:]}')
        elif path.startswith("/cdn/"):
            data = self.files[path[5:]]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            fault = self.faults.pop(0) if self.faults else None
            if fault == "busy":
                self.reply(b"", 503)
            elif fault == "cut":
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                self.wfile.write(data[start:start + 200])
            elif fault == "damaged":
                self.reply(data[start:-1] + bytes([data[-1] ^ 1]), 206 if start else 200)
            elif fault == "no ranges":
                self.reply(data)
            else:
                self.reply(data[start:], 206 if start else 200)
        else:
            self.reply(b"", 404)


class Web(Case):
    def setUp(self):
        super().setUp()
        texts = numbered(60)
        self.want = packed(*encoded(texts[:50])), packed(*encoded(texts[50:]))
        Hub.files = {"en/c4-train.00000-of-01024.json.gz": gzip.compress(jsonl(texts[:20])),
                     "en/c4-train.00001-of-01024.json.gz": gzip.compress(jsonl(texts[20:50])),
                     "en/c4-validation.00000-of-00008.json.gz": gzip.compress(jsonl(texts[50:])),
                     "en/README.md": b"no data"}
        Hub.log, Hub.faults, Hub.newest = [], [], "abc"
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "secret"}

    def fetch(self, status=0, die=False):
        def change():
            os.environ.update(self.environment)
            prepare.corpora.time.sleep = lambda seconds: None
            prepare.BATCH = 500
            if die:
                shards.Output.save, save = lambda *args: (save(*args), os.kill(os.getpid(), 9)), shards.Output.save
        done, _, error = self.fork("prepare", ["--corpus", "c4", "--out", self.out, "--prefix", "x", "--shard-tokens",
                                               "3000"], change)
        self.assertEqual(done, status, error)
        return error

    def test_fetched(self):
        self.fetch()
        self.assertEqual((self.stream("train"), self.stream("val")), self.want)
        self.assertEqual(self.manifest()["revision"], "abc")
        self.assertEqual([p.name for p in self.out.iterdir() if p.suffix not in (".bin", ".json")], [])
        tokens = {token for path, _, token in Hub.log if path.startswith("/cdn")}
        self.assertEqual(tokens, {None})  # the hub's token is not for its storage
        self.assertEqual({token for path, _, token in Hub.log if path.startswith("/api")}, {"Bearer secret"})

    def test_faults(self):
        Hub.faults = ["busy", "cut", "cut", "no ranges", "damaged", "cut", "damaged"]
        self.fetch()
        self.assertEqual((self.stream("train"), self.stream("val")), self.want)
        self.assertIn("bytes=200-", {at for _, at, _ in Hub.log})

    def test_goes_on_with_the_same_revision(self):
        """killed at every state, while the corpus changes"""
        for _ in range(3):
            self.fetch(-signal.SIGKILL, die=True)
            Hub.newest, Hub.log = "def", []
        self.fetch()
        self.assertEqual((self.stream("train"), self.stream("val")), self.want)
        paths = {path for path, *_ in Hub.log}
        self.assertEqual({p for p in paths if p.startswith("/api")}, {"/api/datasets/allenai/c4/tree/abc/en"})
        self.assertNotIn("/cdn/en/c4-validation.00000-of-00008.json.gz", paths)

    def test_given_up(self):
        Hub.faults = ["busy"] * 100
        self.assertRegex(self.fetch(1), r"^prepare: c4: http://.*c4-validation.*: HTTP 503 .*--from\.\n$")

    def test_unreachable(self):
        for environment, words in (({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so nothing is fetched"),
                                   ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9: "),
                                   ({"HF_ENDPOINT": self.environment["HF_ENDPOINT"] + "/none"}, "HTTP 404")):
            begin = time.monotonic()
            error = self.refused("prepare", "--corpus", "c4", "--out", self.out, words=words,
                                 environment={"HF_HUB_OFFLINE": "0", **environment})
            self.assertIn("prepare: c4: ", error)
            self.assertIn("--from", error)
            self.assertLess(time.monotonic() - begin, 5)
        self.refused("hellaswag", "--out", self.dir / "h.bin", words="HF_HUB_OFFLINE is set",
                     environment={"HF_HUB_OFFLINE": "1"})


class Tokenizers(Case):
    """of each sort a small one, made here; ids worked out by hand"""

    def ids(self, text, tokenizer, *args):
        self.prepare(self.file("a.txt", text), "--tokenizer", tokenizer, *args, "--val-fraction", "0")
        manifest = self.manifest()
        self.assertEqual(manifest["tokenizer_sha256"], hashlib.sha256(tokenizer.read_bytes()).hexdigest())
        self.tokens = [manifest[key] for key in ("vocab_size", "bos", "eos")]
        beside = self.out / "x_tokenizer.bin"
        self.assertEqual(beside.exists(), "--without-generate" not in args)
        if beside.exists():  # as convert_tokenizer.py makes it
            self.run_program("convert_tokenizer", tokenizer, self.dir / "its.bin", *args)
            self.assertEqual(beside.read_bytes(), (self.dir / "its.bin").read_bytes())
            self.assertEqual(struct.unpack_from("<III", beside.read_bytes(), 12), tuple(self.tokens))
            self.assertEqual(manifest["tokenizer_file"], {
                "name": beside.name, "sha256": hashlib.sha256(beside.read_bytes()).hexdigest()})
        return self.stream("train")

    def ranks(self, *merged):
        tokens = [bytes([b]) for b in range(256)] + list(merged)
        return self.file("small.tiktoken", b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))

    @needs("tiktoken")
    def test_ranks(self):
        model = self.ranks(b"th", b"the", b" the", b"12", b"123", b"'s", b"'S", b"\n\n", b"23", b"234")
        n = 266
        for kind, bos, end, V in (("gpt2", n, [], n + 1), ("cl100k", n + 1, [], n + 21), ("o200k", n + 1, [], n + 21),
                                  ("llama3", n, [n + 1], n + 256), ("llama4", n, [n + 1], n + 2048),
                                  ("qwen", n, [], n + 208)):
            self.assertEqual(self.ids("the the", model, "--preset", kind), [bos, 257, 258, *end])
            self.assertEqual(self.tokens, [V, bos, end[0] if end else bos])
        # digits in threes, but for GPT-2, whose digits stay together; 's in both cases, but for GPT-2
        self.assertEqual(self.ids("1234'S", model, "--preset", "llama3"), [n, 260, ord("4"), 262, n + 1])
        self.assertEqual(self.ids("1234", model, "--preset", "gpt2"), [n, 260, ord("4")])
        self.assertEqual(self.ids("12e\u0301", model, "--preset", "qwen"), [n, *b"12", *"\u00e9".encode()])
        self.assertEqual(self.ids("<|begin_of_text|>", model, "--preset", "llama3"), [n, *b"<|begin_of_text|>", n + 1])
        self.assertEqual(self.ids(" " * 200000, model, "--preset", "llama3"), [n, *b" " * 200000, n + 1])
        new = "\U00011935\U00011930"  # one character since Unicode 13, which Python 3.9 has
        self.assertEqual(self.ids(new, model, "--preset", "qwen"), [n, *"\U00011938".encode()])
        program = DATA.parent.parent / "build" / "test_tokenizer"
        if program.exists():  # and the file beside the shards brings text to the same form
            out = subprocess.run([program, "encode", self.out / "x_tokenizer.bin"], input=new.encode(),
                                 capture_output=True)
            self.assertEqual([n, *map(int, out.stdout.split())], self.stream("train"))
        text = self.file("a.txt", "the")
        self.refused("prepare", text, "--tokenizer", model, "--preset", "llama3", "--bos", "the", "--out",
                     self.dir / "no", words="small.tiktoken: its BOS and EOS follow from what it is: leave out --bos")
        self.refused("convert_tokenizer", model, self.dir / "its.bin", "--preset", "llama3", "--eos", "the",
                     words="its BOS and EOS follow from what it is")
        self.refused("prepare", text, "--eos", "e", "--out", self.dir / "no", words="bytes: its BOS and EOS follow")
        for words, contents in (("t: 266 tokens are of no known tokenizer: --preset", model.read_bytes()),
                                ("t: line 2 is not `base64 rank`", b"IQ== 0\nIQ=! 1\n"),
                                ("t: 1 tokens are of no known", b"IQ== 0\n")):
            self.refused("prepare", text, "--tokenizer", self.file("t", contents), "--out", self.dir / "no",
                         words=words)
        self.refused("prepare", text, "--tokenizer", self.file("t", b"IQ== 0\n"), "--preset", "gpt2", "--out",
                     self.dir / "no", words="t: it has no token for the bytes 0x00-0x20, 0x22-0xff")

    @needs("tiktoken")
    def test_preset_resumed(self):
        """an interrupted run does not go on with the rules of another preset, whose V and ends are the same"""
        lines = self.file("a.jsonl", b'{"text": "the THE 12345"}\n' * 30000 + b"{\n")
        args = (lines, "--tokenizer", self.ranks(b"th"), "--shard-tokens", "100000")
        self.assertIn("whole shards stay", self.prepare(*args, "--preset", "cl100k", status=1))
        self.refused("prepare", *args, "--out", self.out, "--prefix", "x", "--preset", "o200k",
                     words="an interrupted run with preset cl100k, now o200k")

    @needs("tiktoken")
    def test_tekken(self):
        from test_convert_tokenizer import tekken  # which imports this module
        model = self.file("tekken.json", json.dumps(tekken([*(bytes([b]) for b in range(256)), b"ab", b" ab"], 10)))
        self.assertEqual(self.ids("ab ab12<s>", model), [1, 266, 267, *(10 + b for b in b"12<s>"), 2])
        self.assertEqual(self.tokens, [268, 1, 2])
        broken = self.file("broken.json", '{"config": {}, "vocab": [{"token_bytes": ""}]}')
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", broken, "--out", self.dir / "no",
                     words="broken.json: a field is missing or has the wrong type. Fetch")
        self.assertIn("1 shards", self.run_program("prepare", "--verify", "--out", self.out))
        (self.out / "x_tokenizer.bin").write_bytes(b"other")
        self.assertIn("x_tokenizer.bin: is missing, or not as it was written",
                      self.run_program("prepare", "--verify", "--out", self.out, status=1))

    @needs("tokenizers")
    def test_vocab_and_merges(self):
        plain = {b: c for c, b in convert_tokenizer.alphabet().items()}
        vocab = {plain[b]: b for b in range(256)} | {"ab": 256, "\u0120ab": 257, "12": 258}
        model = self.file("vocab.json", json.dumps(vocab))
        text = self.file("a.txt", "ab")

        def refused(words, *args):
            self.refused("prepare", text, "--tokenizer", model, "--out", self.dir / "no", *args, words=words)
        refused("vocab.json: it is a vocabulary, whose merges, merges.txt, are not beside it")
        self.file("merges.txt", "#version: 0.2\na b\n\u0120 ab\n1 2\n")
        refused("vocab.json: it is a vocabulary: --preset gpt2 or qwen must say how it splits text")
        refused("vocab.json: it is a vocabulary: --preset", "--preset", "llama3")
        for preset, ids in (("gpt2", [258, *"e\u0301".encode()]), ("qwen", [*b"12", *"\u00e9".encode()])):
            self.prepare(self.file("b.txt", "ab ab12e\u0301"), "--tokenizer", model, "--preset", preset,
                         "--val-fraction", "0")
            self.assertEqual(self.stream("train"), [259, 256, 257, *ids])
            self.assertTrue((self.out / "x_tokenizer.bin").exists())

    def test_old_package(self):
        """of a version that takes encode_special_tokens and does nothing with it"""
        self.file("modules/tokenizers.py", '__version__ = "0.15.0"')
        self.refused("prepare", self.file("a.txt", "text"), "--tokenizer", self.file("t.json", "{}"), "--out", self.out,
                     module="wide", words="t.json: the package tokenizers is 0.15.0, 0.15.1 or newer is needed. "
                     "pip install -U tokenizers")

    @needs("tiktoken")
    def test_wide_ranks(self):
        """a vocabulary of Llama 3's size is known by it, and its shards are uint32"""
        model = self.ranks(*(bytes([a, b, c]) for a in range(200, 202) for b in range(256) for c in range(256)))
        model.write_bytes(b"".join(model.read_bytes().splitlines(True)[:128000]))
        self.assertEqual(self.ids("hi", model), [128000, *b"hi", 128001])
        self.assertEqual(self.tokens, [128256, 128000, 128001])

    @needs("tokenizers")
    def test_tokenizer_json(self):
        vocabulary = {"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4, "<|endoftext|>": 5, "?": 6}
        special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                    "special": True} for t, i in vocabulary.items() if 2 < i < 6]
        contents = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
                    "pre_tokenizer": None, "post_processor": None, "decoder": None,
                    "model": {"type": "BPE", "dropout": None, "unk_token": "?", "continuing_subword_prefix": None,
                              "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False,
                              "vocab": vocabulary, "merges": ["a b"]}}
        model, without = self.file("tokenizer.json", json.dumps(contents)), "--without-generate"
        self.refused("prepare", self.file("a.txt", "ab"), "--tokenizer", model, "--out", self.dir / "no",
                     words="tokenizer.json: the trainer cannot use it: neither its pre_tokenizer is ByteLevel nor")
        self.assertEqual(self.ids("abba", model, without), [3, 2, 1, 0, 4])
        self.assertEqual(self.tokens, [7, 3, 4])
        self.assertEqual(self.ids("ab</s>", model, without), [3, 2, 6, 4])  # as text
        self.assertEqual(self.ids("ab", model, without, "--bos", "<|endoftext|>", "--eos", "<|endoftext|>"), [5, 2])
        self.assertEqual(self.ids("ab", model, without, "--bos", "</s>"), [4, 2])
        whole = json.dumps(contents)
        del contents["model"]["unk_token"]  # BPE drops what its vocabulary lacks, then
        lossy = self.file("lossy.json", json.dumps(contents))
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", lossy, "--out", self.dir / "no", without,
                     words="lossy.json: characters that it does not know would be lost")
        contents["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                     "use_regex": True}
        lossy.write_text(json.dumps(contents))  # trained without initial_alphabet
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", lossy, "--out", self.dir / "no", without,
                     words="lossy.json: it has no token for the bytes 0x00-0x3e, 0x40-0x60, 0x63-0xbf, 0xc2-0xf4 and")
        for words, text, args in (("its tokens for BOS and EOS are not known", whole, ["--bos", "x"]),
                                  ("not a tokenizer.json", "{}", [])):
            model.write_text(text)
            self.refused("prepare", self.dir / "a.txt", "--tokenizer", model, *args, "--out", self.dir / "no",
                         words=words)

    @needs("sentencepiece")
    def test_sentencepiece(self):
        pieces = ["\u2581t", "he", "\u2581the", *"\u2581the"]
        from test_convert_tokenizer import SentencePiece  # which imports this module
        model = SentencePiece().model([(3, 2)], [(1, b"identity"), (3, 1), (4, 0), (5, 1)],
                                      [((1, p.encode()), (2, float(-i))) for i, p in enumerate(pieces)])
        model = self.file("small.model", model)
        self.assertEqual(self.ids("the the he", model), [1, 5, 5, 6, 4, 2])
        self.assertEqual(self.tokens, [10, 1, 2])
        self.assertEqual(self.ids("the", model, "--eos", "he", "--without-generate"), [1, 5, 4])
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", model, "--eos", "he", "--out", self.dir / "no",
                     words="small.model: the trainer cannot use it: the model has no control piece he")
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", model, "--eos", "none", "--out", self.dir / "no",
                     words="small.model: the model has no such BOS or EOS")
        self.refused("prepare", self.dir / "a.txt", "--tokenizer", self.file("bad.model", b"\xff" * 50), "--out",
                     self.dir / "no", words="bad.model: not a sentencepiece model")
        # a choice goes on where the context ends: no second mark of a beginning
        self.assertEqual(Choices.made(self, {"ctx": "the", "endings": ["the", "he"], "label": 0}, "--tokenizer",
                                      self.dir / "small.model"), [10, [([1, 5], [[5], [6, 4]], 0)]])


class Choices(Case):
    def made(self, *lines):
        """[V, [(context, choices, label)]] of the file that hellaswag.py makes of lines, with options behind"""
        values = [v for v in lines if isinstance(v, dict)]
        path = self.file("a.jsonl", "".join(json.dumps(v) + "\n" for v in values))
        self.run_program("hellaswag", path, "--out", self.dir / "h.bin", *lines[len(values):])
        data = (self.dir / "h.bin").read_bytes()
        values = struct.unpack(f"<{len(data) // 4}i", data)
        header, rest = values[:256], list(values[256:])
        self.assertEqual((header[0], header[1], header[4], any(header[5:])), (20261125, 1, len(rest), False))
        examples = []
        for _ in range(header[2]):
            K, label = rest[:2]
            lengths, rest = rest[2:3 + K], rest[3 + K:]
            parts = []
            for n in lengths:
                parts.append(rest[:n])
                rest = rest[n:]
            examples.append((parts[0], parts[1:], label))
        self.assertEqual(rest, [])
        return [header[3], examples]

    def test_format(self):
        first = {"ind": 4, "ctx": "A man\u00e9 ", "endings": ["runs.", "sits"], "label": "1"}
        second = {"query": "", "choices": ["a", "b", "c"], "gold": 0}
        want = [([256, *"A man\u00e9".encode()], [list(b" runs."), list(b" sits")], 1),
                ([256], [list(b" a"), list(b" b"), list(b" c")], 0)]
        self.assertEqual(self.made(first, second), [258, want])
        self.assertEqual(self.made(first, second, "--limit", "1"), [258, want[:1]])

    # an example as each has it, and the texts that lm-evaluation-harness makes of it
    HELLASWAG = {"activity_label": "Roof shingles", "ctx_a": "[header] How to  be [title] A man is on a roof.",
                 "ctx_b": "he Ran", "ctx": "...", "label": "1", "endings": ["is [substeps] up.", " starts [step] "]}
    ARC = {"id": "x", "question": "Which?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
    MMLU = {"question": " 1 + 1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3"], "answer": 1}
    TEXTS = (("Roof shingles: How to be. A man is on a roof. He ran", [" is up.", " starts "], 1),
             ("Question: Which?\nAnswer:", [" ice", " fire"], 1),
             ("The following are multiple choice questions (with answers) about abstract algebra.\n\n1 + 1?\nA. 1\nB. 2"
              "\nC. 3\nAnswer:", [" A", " B", " C"], 1))

    def texts(self, *lines):
        examples = self.made(*lines)[1]
        return tuple((bytes(context[1:]).decode(), [bytes(c).decode() for c in choices], label)
                     for context, choices, label in examples)

    def test_families(self):
        """HellaSwag, ARC (its authors' form too), MMLU, by their fields"""
        self.assertEqual(self.texts(self.HELLASWAG, self.ARC, self.MMLU), self.TEXTS)
        authors = {"id": "x", "question": {"stem": "Which?", "choices": [{"text": "ice", "label": "1"}, {
            "text": "fire", "label": "2"}]}, "answerKey": "2"}
        plain = {**self.MMLU, "answer": "B", "subject": ""}
        want = self.TEXTS[1], (self.TEXTS[2][0].split("\n\n")[1], *self.TEXTS[2][1:])
        self.assertEqual(self.texts(authors, plain), want)
        # spaces at a context's end belong to the choice
        self.assertEqual(self.texts({**self.HELLASWAG, "ctx_b": "it is [a]"})[0][:2],
                         ("Roof shingles: How to be. A man is on a roof. It is", ["  is up.", "  starts "]))
        for broken in ({**self.HELLASWAG, "ctx_b": None}, {**self.ARC, "answerKey": "3"}, {**self.ARC, "choices": 3},
                       {**authors, "question": {"stem": 3}}, {**self.MMLU, "question": 1}, {**self.MMLU, "choices": 1}):
            with self.subTest(broken):
                self.refused("hellaswag", self.file("a.jsonl", json.dumps(broken)), "--out", self.dir / "h.bin",
                             words="a.jsonl:1: not as")
        self.refused("hellaswag", self.file("a.jsonl", json.dumps({**self.MMLU, "answer": 3})), "--out",
                     self.dir / "h.bin", words="label 3 is none of 0 to 2")

    def test_parquet(self):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            self.skipTest("the package pyarrow is missing")
        for value, want in zip((self.HELLASWAG, self.ARC, self.MMLU), self.TEXTS):
            pq.write_table(pa.Table.from_pylist([value] * 3), self.dir / "a")
            with unittest.mock.patch.object(self, "file", lambda *_: self.dir / "a"):
                self.assertEqual(self.texts({}), (want,) * 3)
        whole = (self.dir / "a").read_bytes()
        self.refused("hellaswag", self.file("b", whole[:-5]), "--out", self.dir / "h.bin", words="b: row 1: damaged")

    def test_llmc(self):
        """llm.c's file: the ids as they are"""
        def example(i, label, *parts):
            stream = [65535, 0, i, label, len(parts) - 1, *(n for part in parts for n in (len(part), *part))]
            stream[1] = 2 * len(stream)
            return stream
        examples = [example(0, 3, [5, 6], [1], [2, 3], [4], [50256]), example(1, 0, [65534], [1], [2], [3], [4])]
        def file(numbers, version=1):
            header = [20240522, version, 2, 50] + [0] * 252
            return self.file("v.bin", struct.pack(f"<256i{len(numbers)}H", *header, *numbers))

        def made(path, *flags):
            with unittest.mock.patch.object(self, "file", lambda *_: path):
                return self.made({}, *flags)
        self.assertEqual(made(file(sum(examples, []))), [65535, [([5, 6], [[1], [2, 3], [4], [50256]], 3),
                                                                 ([65534], [[1], [2], [3], [4]], 0)]])
        self.assertEqual(made(self.dir / "v.bin", "--limit", "1")[0], 50257)
        good = sum(examples, [])
        for i in (0, 1, 3, 4, 5):
            broken = good[:i] + [good[i] + 1 & 65535] + good[i + 1:]
            self.refused("hellaswag", file(broken), "--out", self.dir / "h.bin", words="example 1 is damaged")
        for broken in (good[:-1], good[:5], []):
            self.refused("hellaswag", file(broken), "--out", self.dir / "h.bin", words="is damaged or cut short")
        self.refused("hellaswag", file(good + [1]), "--out", self.dir / "h.bin", words="does not promise all")
        self.refused("hellaswag", file(good, 2), "--out", self.dir / "h.bin", words="v.bin: ")

    def test_refusals(self):
        good = '{"ctx": "a", "endings": ["b", "c"], "label": 1}\n'
        for line, words in (('{"endings": ["b", "c"], "label": 1}', "a.jsonl:2: no ctx or query"),
                            ('{"ctx": "a", "label": 1}', "a.jsonl:2: no endings or choices"),
                            ("[]", "a.jsonl:2: no ctx"),
                            ('{"ctx": "a", "endings": ["b", "c"]}', "a.jsonl:2: no label or gold"),
                            (good.replace("1", '""'), "label '' is none of 0 to 1"),
                            (good.replace("1", "2"), "label 2 is none"), (good.replace("1", "-1"), "label -1 is none"),
                            (good.replace("1", "true"), "label True"), (good.replace("1", "1.0"), "label 1.0 is none"),
                            (good.replace('"b", ', ""), "at least two choices"),
                            (good.replace('"b"', "3"), "two choices"),
                            (good.replace('"b"', '"\\ud800"'), "a.jsonl:2: not valid JSON in UTF-8"),
                            ('{"ctx"', "a.jsonl:2: not valid JSON in UTF-8. Repair or remove the line.\n")):
            with self.subTest(line):
                self.refused("hellaswag", self.file("a.jsonl", good + line), "--out", self.dir / "h.bin", words=words)
        self.refused("hellaswag", self.file("a.jsonl", "\n"), "--out", self.dir / "h.bin", words="no example is in it")
        self.refused("hellaswag", self.dir / "none", "--out", self.dir / "h.bin", words="none: there is no such file")
        self.refused("hellaswag", "/dev/fd/63", "--out", self.dir / "h.bin", piped=self.dir / "a.jsonl",
                     words="/dev/fd/63: is a folder or a pipe. Give a file.")
        self.refused("hellaswag", self.dir / "a.jsonl", "--out", self.dir / "h.bin", "--limit", "0", words="--limit")
        os.mkfifo(self.dir / "pipe")
        for out in ("", self.dir / "pipe"):
            self.refused("hellaswag", self.file("a.jsonl", good), "--out", out, words="is a folder, a pipe or a device")
        self.assertTrue((self.dir / "pipe").is_fifo())


if __name__ == "__main__":
    sys.exit(run_all("test_prepare"))
