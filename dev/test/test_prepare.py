#!/usr/bin/env python3
"""Tests of dev/data/prepare.py through its command line. Needs numpy."""
import hashlib
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
BOS, EOS = 256, 257
MODULES = {  # stand-ins for the package sentencepiece
    "missing": "raise ImportError",
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

    def run_program(self, program, *args, module=None, chunk=None, status=0):
        """what it printed; chunk: prepare.CHUNK"""
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if module:
            self.file("modules/sentencepiece.py", MODULES[module])
            env["PYTHONPATH"] = str(self.dir / "modules")
        script = [DATA / f"{program}.py"]
        if chunk:
            script = ["-c", f"import sys; sys.path.append({str(DATA)!r}); import prepare; prepare.CHUNK = {chunk}; "
                            "prepare.main()"]
        done = subprocess.run([sys.executable, *script, *map(str, args)], env=env, text=True, capture_output=True)
        self.assertEqual(done.returncode, status, done.stderr)
        if status == 0:
            self.assertEqual(done.stderr, "")
        return done.stdout if status == 0 else done.stderr

    def refused(self, program, *args, words, **options):
        """one line `program: ... words ... .`, nothing written"""
        error = self.run_program(program, *args, status=1, **options)
        self.assertRegex(error, rf"^{program}: [^\n]+\n$")
        self.assertIn(words, error)
        self.assertEqual([p for p in self.dir.rglob("*") if p.suffix in (".bin", ".tmp")], [])

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
        self.prepare(self.file("a.txt", text), "--val-fraction", "0.25")
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
        self.prepare(text, "--tokenizer", model, "--val-fraction", "0", module="wide")
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
        refused(good, "--shard-tokens", "0", words="--shard-tokens")
        refused(good, "--prefix", "a/b", words="--prefix")
        refused(good, "--tokenizer", model, words="package sentencepiece is missing", module="missing")
        refused(good, "--tokenizer", self.dir / "none.model", words="none.model: No such file", module="wide")
        refused(latin, "--tokenizer", model, words="latin.txt: not UTF-8 at byte 3", module="wide")
        for line, words in (('{"text": "b"', "not valid JSON"), ('{"text": "\\ud800"}', "not valid JSON in UTF-8"),
                            (b'{"text": "\xff"}', "not valid JSON in UTF-8"), ("[" * 100000, "not valid JSON"),
                            ('{"body": "b"}', "no text under 'text'"), ('{"text": 1}', "no text under 'text'"),
                            ("[1]", "no text under 'text'")):
            line = line if isinstance(line, bytes) else line.encode()
            refused(self.file("a.jsonl", b'{"text": "a"}\n' * 20 + line + b"\n"), words="a.jsonl:21: " + words, chunk=7)
        self.file("out_is_file", "")
        self.refused("prepare", good, "--out", self.dir / "out_is_file", words="out_is_file")


class Lines(unittest.TestResult):
    """ok NAME, or FAIL NAME: why"""
    passed = 0

    def addSuccess(self, test):
        self.passed += 1
        print("ok", test.id().split(".", 1)[1], flush=True)

    def fail(self, test, error):
        super().addFailure(test, error)
        why = " ".join(str(error[1]).split())
        print(f"FAIL {test.id().split('.', 1)[1]}: {error[0].__name__}: {why[:300]}", flush=True)

    addFailure = addError = fail

    def addSubTest(self, test, subtest, error):
        if error:
            self.fail(subtest, error)


if __name__ == "__main__":
    result = Lines()
    unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]).run(result)
    print(f"test_prepare: {result.passed} passed, {len(result.failures)} failed")
    sys.exit(bool(result.failures))
