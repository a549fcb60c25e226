#!/usr/bin/env python3
"""Tests of dev/data/convert_tokenizer.py through its command line: what it writes of small models, what it refuses.
What tokenizer.h makes of some is compared with plain Python where build/test_tokenizer is there."""
import base64
import bisect
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import unicodedata
import unittest

from lines import run_all
from test_prepare import DATA, Case  # which puts dev/data into sys.path

import convert_tokenizer
from characters import FORMS, runs

PROGRAM = DATA.parent.parent / "build" / "test_tokenizer"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
LLAMA3_SPLIT = 3 | 4 | 16 | 64 | 128 | 512
O200K_SPLIT = 3 | 4 | 8 | 32 | 64 | 128 | 256 | 512


def tekken(tokens, special):
    """a tekken.json"""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    word = r"[^\r\n\p{L}\p{N}]?" + upper
    pattern = (rf"{word}*{lower}+|{word}+{lower}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
    config = {"default_vocab_size": special + len(tokens), "default_num_special_tokens": special, "pattern": pattern}
    return {"config": config, "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()}
                                        for i, t in enumerate(tokens)]}


class Written:
    """a tokenizer file, read plainly"""
    def __init__(self, data):
        at = 24

        def take(form):
            nonlocal at
            values = struct.unpack_from("<" + form, data, at)
            at += struct.calcsize("<" + form)
            return values if len(values) > 1 else values[0]

        assert data[:8] in (b"SGPTTOK2", b"SGPTTOK3")
        self.flags, V, self.bos, self.eos = struct.unpack("<IIII", data[8:24])
        for _ in range(3):
            size = take("I")
            at += size
        self.pieces = []
        for _ in range(V):
            _, kind, size = take("fBH")
            self.pieces.append((kind, data[at:at + size]))
            at += size
        self.split = take("I")
        runs = [take("I") for _ in range(take("I"))]
        self.kinds = [(run >> 3, run & 7) for run in runs]
        self.merges = [take("II") for _ in range(take("I"))]
        if data[:8] == b"SGPTTOK3":
            self.form = {}
            for _ in range(take("I")):
                character, size = take("II")
                self.form[character >> 8] = (character & 255, [take("I") for _ in range(size)])
            self.compositions = {take("II"): take("I") for _ in range(take("I"))}
            self.rule_starts = [take("I") for _ in range(take("I"))]
            self.rules = []
            for _ in range(take("I")):
                classes, states = take("II")
                self.rules.append([take(f"{classes}H") for _ in range(states)])
        assert at == len(data)

    def cuts(self, rule, text):
        """of a regular expression's automaton"""
        starts, found, at = [r >> 8 for r in self.rule_starts], [], 0
        while at < len(text):
            state, end = 1, at
            for i in range(at, len(text) + 1):
                kind = self.rule_starts[bisect.bisect(starts, ord(text[i])) - 1] & 255 if i < len(text) else -1
                state, is_match = self.rules[rule][state][kind] >> 1, self.rules[rule][state][kind] & 1
                end = i if is_match else end
                if not state:
                    break
            if end > at:
                found.append(text[at:end])
            at = max(end, at + 1)
        return found

    def kind_of(self, character):
        return [kind for first, kind in self.kinds if first <= ord(character)][-1]


class Convert(Case):
    def convert(self, contents, *args):
        self.run_program("convert_tokenizer", self.file("its.model", contents), self.dir / "m.bin", *args)
        return Written((self.dir / "m.bin").read_bytes())

    def refuses(self, contents, words, *args):
        with self.subTest(words):
            self.refused("convert_tokenizer", self.file("its.model", contents), self.dir / "m.bin", *args, words=words)


class SentencePiece(Convert):
    def message(self, *fields):
        """a protobuf message of (number, int, float or bytes)"""
        out = b""
        for number, value in fields:
            if isinstance(value, bytes):
                out += bytes([number % 16 << 3 | 2] if number < 16 else [number << 3 & 127 | 130, number >> 4])
                out += bytes([len(value)]) + value
            elif isinstance(value, float):
                out += bytes([number << 3 | 5]) + struct.pack("<f", value)
            else:
                out += bytes([number << 3] if number < 16 else [number << 3 & 127 | 128, number >> 4]) + bytes([value])
        return out

    def model(self, trainer=((3, 2),), normalizer=(), pieces=(), more=b""):
        every = [((1, b"<unk>"), (3, 2)), ((1, b"<s>"), (3, 3)), ((1, b"</s>"), (3, 3)), *pieces]
        return b"".join(self.message((1, self.message(*p))) for p in every) + \
            self.message((2, self.message(*trainer)), (3, self.message(*normalizer))) + more

    def test_fields(self):
        model = self.model([(3, 2), (24, 1), (44, b"?")], [(3, 0), (2, struct.pack("<I", 4) + b"trie" + b"x\0")],
                           [((1, b"ab"), (2, -1.5))])
        self.run_program("convert_tokenizer", self.file("m.model", model), self.dir / "m.bin")
        want = b"SGPTTOK2" + struct.pack("<IIII", 2 | 4 | 8, 4, 1, 2)
        for s in (b"?", b"trie", b"x\0"):
            want += struct.pack("<I", len(s)) + s
        for s, score, kind in ((b"<unk>", 0, 2), (b"<s>", 0, 3), (b"</s>", 0, 3), (b"ab", -1.5, 1)):
            want += struct.pack("<fBH", score, kind, len(s)) + s
        self.assertEqual((self.dir / "m.bin").read_bytes(), want + bytes(12))  # no split, classes, merges

    def test_algorithms(self):
        for kind, flags in (((3, 1), 8192), ((3, 2), 0), ((3, 4), 64), ((24, 0), 8192)):
            w = self.convert(self.model([kind], pieces=[((1, b"ab"), (2, -1.5))]))
            self.assertEqual(w.flags, 1 | 2 | 4 | flags)

    @unittest.skipUnless(PROGRAM.exists(), "make build/test_tokenizer")
    def test_unigram(self):
        """the best cut of texts, against all ways to the end of each character, in float32"""
        rng, add = random.Random(1), lambda a, b: struct.unpack("f", struct.pack("f", a + b))[0]
        known = {"".join(rng.choices("abc\u00e9\u2581", k=rng.randrange(1, 5))) for _ in range(60)} | {"a", "\u2581"}
        known = {p: -rng.randrange(1, 64) / 4 for p in sorted(known)}  # many are equal
        # in "xab" xa and b win over an unknown x, whose score is 10 below the least, and ab
        known.update({"xa": -11., "b": -11., "ab": -0.25, "cc": -15.75})
        pieces = [((1, p.encode()), (2, s)) for p, s in known.items()] + [((1, b"ab!"), (3, 4))]
        names = [*known, "ab!"]
        self.convert(self.model([(3, 1)], [(3, 0), (4, 0)], pieces))
        unknown, scores = min(known.values()) - 10, {**known, "ab!": struct.unpack("f", struct.pack("f", 0.2))[0]}
        for n in range(200):
            text = "".join(rng.choices("abc\u00e9\u2581!x", k=rng.randrange(1, 40)))
            best = [(0, [])]
            for end in range(1, len(text) + 1):
                ways = []
                for start in range(max(end - 4, 0), end):
                    piece = text[start:end]
                    if piece in scores or len(piece) == 1:
                        score = add(best[start][0], scores.get(piece, unknown))
                        i = names.index(piece) + 3 if piece in scores else 0
                        ways.append((score, -start, best[start][1] + [i]))
                score, _, ids = max(ways)
                best.append((score, ids))
            ids = [i for n, i in enumerate(best[-1][1]) if i or not n or best[-1][1][n - 1]]  # a run of unknown is one
            out = subprocess.run([PROGRAM, "encode", self.dir / "m.bin"], input=text.encode(), capture_output=True)
            self.assertEqual([int(i) for i in out.stdout.split()], ids, text)

    def test_refusals(self):
        broken = self.message((3, self.message((2, struct.pack("<I", 400) + b"trie"))))
        for model, words in (
            (b"", "not a sentencepiece model"), (b"\xff" * 40, "not a sentencepiece model"),
            (self.model(trainer=((3, 2), (44, b"surface")))[:-5], "not a sentencepiece model"),
            (self.model()[:-3], "not a sentencepiece model"), (self.model(trainer=((3, 3),)), "of type word"),
            (self.model(more=broken), "table is broken"),
            (self.model(more=self.message((5, self.message((2, b"abcd"))))), "denormalizer"),
            (self.model(trainer=((3, 2), (46, b"<bos>"))), "no control piece <bos>"),
            (self.model(pieces=[((1, b""),)]), "piece 3 is broken"),
            (self.model(pieces=[((1, b"a"), (3, 9))]), "piece 3 is broken"),
            (self.model(pieces=[((1, b"a"), (2, math.nan))]), "piece 3 is broken"),
            (self.model(pieces=[((1, 7),)]), "wrong type"),
            (self.model(more=self.message((2, 1))), "not a sentencepiece"),
            # what tokenizer.h would send back here
            (self.model(trainer=((3, 2), (35, 1)), pieces=[((1, b"<0x41>"), (3, 6))]),
             "no token for the bytes 0x00-0x40, 0x42-0xff"),
            (self.model(pieces=[((1, b"<0x41>"), (3, 6))]), "there is no byte_fallback"),
            (self.model(pieces=[((1, b"a"),), ((1, b"a"), (3, 5))]), "the pieces 3 and 4 are the same, 'a'"),
            (self.model(pieces=[((1, b"a"), (3, 2))]), "two pieces are of the type unknown"),
        ):
            with self.subTest(words):
                self.refuses(model, words)
        self.refused("convert_tokenizer", self.dir / "none.model", self.dir / "m.bin", words="none.model: No such file")
        (self.dir / "folder").mkdir()
        self.refused("convert_tokenizer", self.file("m.model", self.model()), self.dir / "folder", words="is a folder")
        os.mkfifo(self.dir / "pipe")
        self.refused("convert_tokenizer", self.file("m.model", self.model()), self.dir / "pipe", words="a pipe")
        self.assertTrue((self.dir / "pipe").is_fifo())
        self.refused("convert_tokenizer", words="required")


class RankFile(Convert):
    def ranks(self, *more, without=()):
        tokens = [bytes([i]) for i in range(256) if i not in without] + list(more)
        return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))

    def test_presets(self):
        for preset, split, bos, eos, V in (
            ("gpt2", 16, 258, 258, 259), ("llama3", LLAMA3_SPLIT, 258, 259, 514), ("o200k", O200K_SPLIT, 259, 259, 279),
            ("cl100k", LLAMA3_SPLIT | 1024, 259, 259, 279), ("llama4", O200K_SPLIT, 258, 259, 258 + 2048),
        ):
            w = self.convert(self.ranks(b"ab", b"abc"), "--preset", preset)
            self.assertEqual((w.flags, w.split, w.bos, w.eos, len(w.pieces)), (32 | 128, split, bos, eos, V), preset)
            self.assertEqual(w.pieces[255:258], [(1, b"\xff"), (1, b"ab"), (1, b"abc")])
            self.assertEqual(set(w.pieces[258:]), {(3, b"")})

    def test_known_by_number(self):
        for n, bos, eos, V in ((50256, 50256, 50256, 50257), (128000, 128000, 128001, 128256)):
            w = self.convert(self.ranks(*(b"%d." % i for i in range(n - 256))))
            self.assertEqual((w.bos, w.eos, len(w.pieces)), (bos, eos, V))

    def test_free_id(self):  # as p50k's: <|endoftext|> lies among the ranks
        w = self.convert(self.ranks().replace(b" 255\n", b" 256\n"), "--preset", "gpt2")
        self.assertEqual((w.bos, w.eos, len(w.pieces)), (255, 255, 257))

    def test_classes(self):
        w = self.convert(self.ranks(), "--preset", "gpt2")
        for characters, kind in (
            ("A\u00c9\u01c5", 1), ("z\u00df\u0451", 2), ("\u4f60\u02b0\u05d0\U00031350", 3), ("\u0301\u0903", 4),
            ("0\u00b2\u0663\u216b\u00bd", 5), (" \t\x0b\u0085\u00a0\u3000", 6),
            ("_'\u200b\U0001f600\x1c\U0010ffff\u0378", 0),
        ):
            self.assertEqual([w.kind_of(c) for c in characters], [kind] * len(characters))
        self.assertEqual(w.kinds, sorted(w.kinds))

    def test_refusals(self):
        good = self.ranks()
        self.refuses(good, "--preset must say")
        self.refuses(good + b"YWI= x\n", "line 257 is not `base64 rank`", "--preset", "gpt2")
        self.refuses(good + b"YW= 256\n", "line 257 is not `base64 rank`", "--preset", "gpt2")
        self.refuses(good + b"YWI= 99999999\n", "line 257 has a rank out of range", "--preset", "gpt2")
        self.refuses(good + b"YQ== 256\n", "line 257 has a rank out of range or a token", "--preset", "gpt2")
        self.refuses(good + b"YWI= 255\n", "two tokens have the same rank", "--preset", "gpt2")
        self.refuses(self.ranks(without=[7]), "no token for the bytes 0x07 ", "--preset", "gpt2")
        self.refuses(good, "--preset", "--preset", "gpt5")


class TokenizerJson(Convert):
    def byte_level(self, **changes):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
        vocab = {c: i for i, c in enumerate([*letters, "ab", "\u0120ab", "<|endoftext|>"])}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                 "end_of_word_suffix": "", "vocab": vocab, "merges": ["a b", ["\u0120", "ab"]],
                 **changes.pop("model", {})}
        added = [{"id": 258, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": True}]
        pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        return {"normalizer": None, "pre_tokenizer": pre_tokenizer, "decoder": {"type": "ByteLevel"},
                "added_tokens": added, "model": model, **changes}

    def split(self, regex, **changes):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        return {"type": "Sequence", "pretokenizers": [split, level]}

    def metaspace(self, **changes):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "\u2581", "ab", "\u2581ab"]
        model = {"type": "BPE", "byte_fallback": True, "vocab": {t: i for i, t in enumerate(tokens)},
                 "merges": ["a b", "\u2581 ab"], **changes.pop("model", {})}
        added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                  "normalized": False, "special": True} for i in range(3)]
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {
            "type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
        steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
                 {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        return {"normalizer": normalizer, "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": steps},
                "added_tokens": added, "model": model, **changes}

    def test_byte_level(self):
        w = self.convert(json.dumps(self.byte_level()))
        self.assertEqual((w.flags, w.split, w.bos, w.eos, len(w.pieces)), (32 | 64, 16, 258, 258, 259))
        self.assertEqual(sorted(w.pieces[:256]), [(1, bytes([i])) for i in range(256)])
        self.assertEqual(w.pieces[256:], [(1, b"ab"), (1, b" ab"), (3, b"<|endoftext|>")])
        self.assertEqual([tuple(w.pieces[i][1] for i in m) for m in w.merges], [(b"a", b"b"), (b" ", b"ab")])
        digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                        self.byte_level()["pre_tokenizer"]]}
        spaced = {"type": "ByteLevel", "add_prefix_space": True}
        one_digit, removed = LLAMA3.replace("{1,3}", ""), {"behavior": "Removed", "invert": True}
        for pre_tokenizer, flags, split in (
            (self.split(LLAMA3), 0, LLAMA3_SPLIT), (self.split(LLAMA3, **removed), 0, LLAMA3_SPLIT),
            (self.split(one_digit), 0, LLAMA3_SPLIT - 2), (digits, 0, 16 | 2048), (spaced, 1 | 256, 16),
        ):
            for ignore_merges in (False, True):
                model = {"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": ignore_merges}}
                w = self.convert(json.dumps(self.byte_level(**model)))
                self.assertEqual((w.flags, w.split), (flags | 32 | 64 | 128 * ignore_merges, split))

    def test_rules(self):
        """automata of regular expressions, against Python's re"""
        rng = random.Random(1)
        alphabets = ("ab1 ", " \n\r\t", "'sSl\u017fLa ", "a1!\u00e9\u4f60 \n")
        for regex in ("a|ab|abc", "ab?|b+", "(?:a|ab)(?:1|b1)*", "a{2}|a{1,3}b|b{2,}", "(?i:'s|'l)|[a-z]+|[^a-z ]",
                      r"\s+(?!\S)|\s+", r"\s+$", r" ?[^\sa-z1]+[\r\n]*|[1b]{1,2}", "[a-]+|[b]", "(?:a|b)*a",
                      "a(?=b)|b", "a*", "((a)b)?1", "[^\\S ]+"):
            w = self.convert(json.dumps(self.byte_level(pre_tokenizer=self.split(regex))))
            self.assertEqual((w.flags, w.split, len(w.rules)), (32 | 64, 0, 1))
            expected = re.compile(regex.replace("$", r"(?=\n|\Z)"))  # as Oniguruma has them
            for _ in range(60):
                text = "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(12)))
                want = [m[0] for m in expected.finditer(text) if m[0]]
                self.assertEqual(w.cuts(0, text), want, (regex, text))
        steps = [{"type": "Punctuation", "behavior": "Isolated"}, {"type": "Digits", "individual_digits": False},
                 {"type": "Split", "pattern": {"String": "a.b"}, "behavior": "Isolated", "invert": False}]
        w = self.convert(json.dumps(self.byte_level(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            *steps, self.byte_level()["pre_tokenizer"]]})))
        text = "x$!\u3002 12\u0663a.bacb it's"
        self.assertEqual([w.cuts(i, text) for i in range(3)], [["$", "!", "\u3002", ".", "'"], ["12\u0663"], ["a.b"]])
        self.assertEqual(w.cuts(3, " it's  1a"), [" it", "'s", " ", " 1", "a"])
        # Punctuation is of Unicode 8, \\p{P} of Unicode 16
        for character, old, new in (("\u00a1", 1, 1), ("\u2e42", 1, 1), ("\u2e43", 0, 1), ("\u166d", 1, 0),
                                    ("\U000111c9", 1, 0), ("\u20ac", 0, 0), ("\U0001e95f", 0, 1)):
            self.assertEqual(w.cuts(0, character), [character] * old, hex(ord(character)))
            w2 = self.convert(json.dumps(self.byte_level(pre_tokenizer=self.split(r"\p{P}"))))
            self.assertEqual(w2.cuts(0, character), [character] * new, hex(ord(character)))

    def test_metaspace(self):
        w = self.convert(json.dumps(self.metaspace()))
        self.assertEqual((w.flags, w.split, w.bos, w.eos), (1 | 4 | 16 | 64 | 1024 | 2048, 0, 1, 2))
        self.assertEqual(w.pieces[:4], [(3, b"<unk>"), (3, b"<s>"), (3, b"</s>"), (6, b"<0x00>")])
        self.assertEqual(w.pieces[-1], (1, "\u2581ab".encode()))
        model = self.metaspace()  # as a trainer writes them that was given the bytes as special tokens
        model["added_tokens"] += [{**model["added_tokens"][0], "id": i, "content": f"<0x{i - 3:02X}>"}
                                  for i in range(3, 259)]
        self.assertEqual(self.convert(json.dumps(model)).pieces, w.pieces)
        self.assertEqual((w.merges, w.kinds), ([(259, 260), (261, 262)], []))
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        for pre_tokenizer, flags in ((space, 1 | 4 | 256), ({**space, "split": True}, 1 | 4 | 256 | 512),
                                     ({**space, "prepend_scheme": "never"}, 4)):
            w = self.convert(json.dumps(self.metaspace(normalizer=None, pre_tokenizer=pre_tokenizer)))
            self.assertEqual(w.flags, flags | 16 | 64 | 1024 | 2048)

    def test_ends(self):
        model = self.byte_level()
        model["added_tokens"].append({**model["added_tokens"][0], "id": 259, "content": "<start>"})
        w = self.convert(json.dumps(model), "--bos", "<start>")
        self.assertEqual((w.bos, w.eos, w.pieces[259:]), (259, 258, [(3, b"<start>")]))
        (self.dir / "m.bin").unlink()
        self.refuses(json.dumps(model), "no special token is <begin>: --bos", "--bos", "<begin>")
        model["added_tokens"].pop(0)
        model["model"]["vocab"].pop("<|endoftext|>")
        model["added_tokens"][0]["id"] = 258
        self.refuses(json.dumps(model), "no special token is <|begin_of_text|>")

    def test_refusals(self):
        def refuses(words, **changes):
            self.refuses(json.dumps(self.byte_level(**changes)), words)

        for kind in ("Unigram", "WordPiece", "WordLevel"):
            refuses(f"the model is of type {kind}", model={"type": kind})
        refuses('the normalizer {"type": "NFD"}', normalizer={"type": "NFD"})
        refuses('the normalizer {"type": "NFC"}', normalizer={"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Lowercase"}]})
        for regex in (r"\w+|\s+", "a*?", "a??", "^a", "(?<=a)b", "a(?!bc)", "[a&&b]", "[[:alpha:]]", "(?i:\u00e9)",
                      "(a", "a)", "[b-a]", "[a", "[]b]", r"\p{Lu}", r"\p{Greek}", "a{1,3}+", "a{99}", "a{3,1}",
                      "[ab]++b", "[ab]++c?b", "a\\", "*", "(?:a++)a", "(?:a++|b)(?!b)", "(?:|a)+b", "(?=a)+", "(?i:ss)",
                      "(?i:s(?:t))", "(?i:aff)", r"(?i:[\p{Ll}])", "[!-&&a]", "(" * 3000 + "a" + ")" * 3000,
                      next(r for r in convert_tokenizer.regexes() if "{1,3}+" in r)):  # of tiktoken alone
            refuses("the regular expression", pre_tokenizer=self.split(regex))
        refuses("too large an automaton", pre_tokenizer=self.split("((((a{64}){64}){64}){64})"))
        refuses("too large an automaton", pre_tokenizer=self.split("[ab]*a" + "[ab]" * 14))
        refuses("the pre_tokenizer", pre_tokenizer=self.split(LLAMA3, behavior="MergedWithNext"))
        refuses("Punctuation", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"}, self.byte_level()["pre_tokenizer"]]})
        refuses("UnicodeScripts", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "UnicodeScripts"}, self.byte_level()["pre_tokenizer"]]})
        refuses("add_prefix_space behind", pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]})
        refuses("U+2581", pre_tokenizer=None, model={"byte_fallback": True})
        refuses("Whitespace", pre_tokenizer={"type": "Whitespace"})
        refuses("the decoder null", decoder=None)
        refuses("dropout", model={"dropout": 0.1})
        refuses("end_of_word_suffix", model={"end_of_word_suffix": "</w>"})
        refuses("merge 0 ('a', 'c')", model={"merges": ["a c"]})
        refuses("merge 0 ('a', 'zz')", model={"merges": ["a zz"]})
        vocab = self.byte_level()["model"]["vocab"]
        refuses("no token for the bytes 0x61 and text",
                model={"vocab": {t: i for t, i in vocab.items() if t != "a"}, "merges": []})
        refuses("characters that ByteLevel does not write", model={"vocab": {"\u4f60": 0}}, added_tokens=[])
        refuses("missing or has the wrong type", model={"vocab": 7})
        refuses("missing or has the wrong type", added_tokens=[{"content": "x"}])
        ends = self.byte_level()["added_tokens"]
        token = {**ends[0], "id": 259, "content": "<x>", "special": False}
        refuses("the added token '<x>' is to be found as a whole word",
                added_tokens=[*ends, {**token, "single_word": True}])
        refuses("'\u00e9' does not decode to itself", added_tokens=[
            *ends, {**token, "content": "\u00e9", "id": vocab["\u00e9"]}])
        for name in ("text", "|>x"):  # the library finds neither there
            refuses(f"'{name}' begins within the special '<|endoftext|>'",
                    added_tokens=[*ends, {**token, "content": name}])
        w = self.convert(json.dumps(self.byte_level(added_tokens=[*ends, token])))
        self.assertEqual(w.pieces[259], (4, b"<x>"))
        for flags, kind in (({"lstrip": True}, 8), ({"rstrip": True}, 16), ({"normalized": True}, 0)):
            w = self.convert(json.dumps(self.byte_level(added_tokens=[*ends, {**token, **flags}])))
            self.assertEqual(w.pieces[259], (4 | kind, b"<x>"))
        w = self.convert(json.dumps(self.byte_level(added_tokens=[*ends, {**token, "normalized": True}],
                                                    normalizer={"type": "NFC"})))
        self.assertEqual(w.pieces[259], (4 | 32, b"<x>"))
        # normalized ones are searched for after the others
        later = {**token, "content": "<y>", "id": 260, "normalized": True}
        w = self.convert(json.dumps(self.byte_level(added_tokens=[*ends, token, later])))
        self.assertEqual(w.pieces[259:], [(4, b"<x>"), (4 | 32, b"<y>")])
        for i, content, words in ((260, "<x>", "'<x>' has the id 260, but the library gives it 259"),
                                  (261, "<y>", "'<y>' has the id 261, but the library gives it 260"),
                                  (260, "ab", "'ab' has the id 260, but the library gives it 256")):
            refuses(words, added_tokens=[*ends, token, {**later, "id": i, "content": content}])
        for i in (-1, 0, 1 << 30):
            refuses("an id out of range, or two tokens with one id", model={"vocab": {**vocab, "zz": i}})
        token["content"] = " ab"  # found in text before any merge
        w = self.convert(json.dumps(self.byte_level(added_tokens=[*self.byte_level()["added_tokens"], token])))
        self.assertEqual((w.pieces[257], w.pieces[259], len(w.merges)), ((1, b" ab"), (4, b" ab"), 1))
        (self.dir / "m.bin").unlink()

        def refuses_metaspace(words, **changes):
            self.refuses(json.dumps(self.metaspace(**changes)), words)

        refuses_metaspace("without byte_fallback", model={"byte_fallback": False})
        refuses_metaspace("ignore_merges", model={"ignore_merges": True})
        refuses_metaspace('{"type": "Lowercase"}', normalizer={"type": "Lowercase"})
        refuses_metaspace("the decoder", decoder={"type": "Metaspace", "replacement": "\u2581"})
        refuses_metaspace("Metaspace", pre_tokenizer={"type": "Metaspace", "replacement": "\u2581"})
        ends = self.metaspace()["added_tokens"]
        token = {**ends[0], "id": 68, "content": "<0x41>", "special": False}
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
        two = [{**ends[0], "id": 264 + i, "content": text, "special": False, "normalized": not i}
               for i, text in enumerate(("<xy>", "y>z"))]
        refuses_metaspace("which overlap", normalizer=None, pre_tokenizer=space, added_tokens=[*ends, *two])
        w = self.convert(json.dumps(self.metaspace(added_tokens=[*ends, *two])))  # Llama 2's normalizer writes a space
        self.assertEqual(w.pieces[264:], [(4 | 32, "\u2581<xy>".encode()), (4, b"y>z")])
        (self.dir / "m.bin").unlink()
        refuses_metaspace("'<0x41>' does not decode to itself", added_tokens=[*ends, token])
        w = self.convert(json.dumps(self.metaspace(added_tokens=[*ends, {**token, "content": "\u2581ab", "id": 263}])))
        self.assertEqual((w.pieces[263], w.merges), ((4, "\u2581ab".encode()), [(259, 260), (261, 262)]))
        (self.dir / "m.bin").unlink()
        for text, words in (("{", "not valid JSON"), ("{" * 100000, "not valid JSON"), ("{}", "no tokenizer.json"),
                            ('{"model": []}', "no tokenizer.json")):
            self.refuses(text, words)

    @unittest.skipUnless(PROGRAM.exists(), "make build/test_tokenizer")
    def test_bytes_that_no_text_has(self):
        """GPT-NeoX has no tokens for them: in broken text they are U+FFFD"""
        model = self.byte_level()
        plain = convert_tokenizer.alphabet()
        for c in [c for c in model["model"]["vocab"] if plain.get(c) in convert_tokenizer.NO_UTF8]:
            del model["model"]["vocab"][c]
        w = self.convert(json.dumps(model))
        self.assertEqual(sum(kind == 1 for kind, _ in w.pieces), 256 - 13 + 2)
        ids = subprocess.run([PROGRAM, "encode", self.dir / "m.bin"], input=b"a\xff\x80", capture_output=True,
                             check=True).stdout.split()
        self.assertEqual([w.pieces[int(i)][1] for i in ids], [b"a", b"\xef", b"\xbf", b"\xbd", b"\x80"])

    @unittest.skipUnless(PROGRAM.exists(), "make build/test_tokenizer")
    def test_ids(self):
        """of rules that match nothing, and of added tokens that meet, as tokenizers has them"""
        end = self.byte_level()["added_tokens"][0]

        def tokens(*added):
            return [end] + [{**end, "special": False, "id": 259 + i, "content": text, **flags}
                            for i, (text, flags) in enumerate(added)]

        r, later = {"rstrip": True}, {"normalized": True}
        for changes, text, want in (
            ({"pre_tokenizer": self.split("(?=b)")}, "abb", "a b b"),
            ({"pre_tokenizer": self.split("c*")}, "abc", "a b c"),
            ({"pre_tokenizer": self.split("c+|$")}, "abcab", "ab c ab"),
            # what rstrip has taken may hold others, and what is behind these comes again
            ({"added_tokens": tokens(("<x>", r), ("  ", {}))}, "a<x>   b", "a <x> | _ b"),
            ({"added_tokens": tokens(("<x>", r), (" ", r))}, "<x>  b", "<x> | | b"),
            ({"added_tokens": tokens(("xb", later), ("bc", {}))}, "xbcxb", "x bc xb"),
            ({"added_tokens": tokens(("abc", {}), ("bc", later))}, "abcbc", "abc bc"),
        ):
            model = self.byte_level(**changes)
            w = self.convert(json.dumps(model))
            out = subprocess.run([PROGRAM, "encode", self.dir / "m.bin"], input=text.encode(), capture_output=True)
            got = [w.pieces[int(i)][1].decode() for i in out.stdout.split()]
            shown = ["|" if i == b"260" and p.isspace() else "_" if p == " " else p
                     for i, p in zip(out.stdout.split(), got)]
            self.assertEqual(" ".join(shown), want, (changes, text))

    @unittest.skipUnless(PROGRAM.exists(), "make build/test_tokenizer")
    def test_far_ahead(self):
        """rules that look for what never comes, at every character: time grows with the text, not with its square"""
        for rule, text in ((r"\s+$", " " * 100000 + "a"), ("(?:aa)+b", "a" * 100000), ("[^1]+1", "\u00e9" * 100000)):
            self.convert(json.dumps(self.byte_level(pre_tokenizer=self.split(rule))))
            out = subprocess.run([PROGRAM, "encode", self.dir / "m.bin"], input=text.encode(), capture_output=True,
                                 timeout=60)
            self.assertEqual(len(out.stdout.split()), len(text.encode()))

    @unittest.skipUnless(PROGRAM.exists(), "make build/test_tokenizer")
    def test_normal_forms(self):
        """Bytes of text in its normal form, against Python's: every character that it changes or puts in order, and
        these at random among letters, vowels of Hangul and what is no UTF-8"""
        starts = runs(FORMS)
        known = [chr(c) for a, b in zip(starts, starts[1:]) if a & 7 for c in range(a >> 3, b >> 3)]
        self.assertEqual((len(known), "\u0301" in known, "\uf900" in known), (6532, True, True))
        rng = random.Random(1)
        hangul = [chr(c) for c in (0x1100, 0x1112, 0x1161, 0x1175, 0x11a7, 0x11a8, 0x11c2, 0xac00, 0xac01, 0xd7a3)]
        marks = [c for c in known if unicodedata.combining(c)]
        texts = ["".join(known[i:i + 500]) for i in range(0, len(known), 500)]
        texts += ["a".join(known[i:i + 500]) for i in range(0, len(known), 500)]
        for _ in range(500):
            some = [*hangul, *"aeo <x>", *rng.choices(marks, k=20), *rng.choices(known, k=20)]
            texts.append("".join(rng.choices(some, k=40)))
        data = b"".join(struct.pack("<I", len(t)) + t for t in map(str.encode, texts))
        broken = "a\u0301".encode() + b"\xcc" + "\u0301e\u0301".encode()
        for form in ("NFC", "NFKC"):
            self.convert(json.dumps(self.byte_level(normalizer={"type": form}, model={"merges": []})))
            out = subprocess.run([PROGRAM, "many", self.dir / "m.bin"], input=data, capture_output=True,
                                 check=True).stdout
            at = 0
            for text in texts:
                sizes = []
                for width in (4, 1, 1):
                    n = struct.unpack_from("<I", out, at)[0]
                    sizes.append(out[at + 4:at + 4 + n * width])
                    at += 4 + n * width
                self.assertEqual(sizes[1].decode(), unicodedata.normalize(form, text))
            ids = subprocess.run([PROGRAM, "encode", self.dir / "m.bin"], input=broken, capture_output=True)
            back = subprocess.run([PROGRAM, "decode", self.dir / "m.bin"], input=ids.stdout, capture_output=True)
            self.assertEqual(back.stdout.decode(), "\u00e1\ufffd\u0301\u00e9")

    def test_tekken(self):
        model = tekken([*(bytes([i]) for i in range(256)), b"ab", b"beyond"], 10)
        model["config"]["default_vocab_size"] -= 1
        w = self.convert(json.dumps(model))
        self.assertEqual((w.flags, w.split, w.bos, w.eos), (32 | 128, 1 | 4 | 8 | 128 | 256 | 512, 1, 2))
        self.assertEqual((len(w.pieces), w.pieces[9:11], w.pieces[-1]), (267, [(3, b""), (1, b"\0")], (1, b"ab")))
        (self.dir / "m.bin").unlink()
        model["config"]["pattern"] = "x+"
        self.refuses(json.dumps(model), "the regular expression 'x+'")


if __name__ == "__main__":
    sys.exit(run_all("test_convert_tokenizer"))
