#!/usr/bin/env python3
"""Compare tokenizer.h with the sentencepiece library: ids and decoded text of files and of thousands of hard strings.

    pip install sentencepiece mistral-common           (the second carries free .model files of 32000 and 32768 words)
    g++ -std=c++17 -O2 -o test_tokenizer dev/test/test_tokenizer.cpp
    tokenizer_vs_sentencepiece.py ./test_tokenizer TEXT [--model FILE.model ...]
    tokenizer_vs_sentencepiece.py ./test_tokenizer TEXT --fixtures dev/test     (makes tokenizer_*.bin, .expected anew)

TEXT: a text file, or a directory of them; small models of other kinds are trained on it: normalisation nmt_nfkc and
own rules, no byte fallback, whitespace as suffix, unused and user-defined pieces. One more is made by hand.
"""
import argparse
import glob
import importlib.util
import io
import itertools
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from convert_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, convert, fields  # noqa: E402

# text and what replaces it
RULES = [("\ufb01", "fi"), ("\u2460", " 1 "), ("\u3000", " "), ("A\u030a", "\u00c5"), ("\u200b", ""), ("Qu", "kw"),
         ("Quee", "Q")]


def hard_strings(text, count, seed=0):
    """bytes of `count` strings made to be awkward, after a fixed list; text: bytes to draw from"""
    rng = random.Random(seed)
    fixed = ["", " ", "  ", "   a", "a   ", " a  b ", "\n", "\n\n\n", "\t", "\0", "a\0b", "\u2581", " \u2581 ",
             "\u2581\u2581a\u2581", "<uds>a", "a b a b ab ab", "a\u00e9!", "     a", "<s>", "</s>", "<unk>", "<0x41>",
             "<0x0A>", "[INST] hi [/INST]", "\ufffd", "\ufeffa", "e\u0301", "\ufb01", "\u2460\u2461", "\u3000",
             "\u3000a\u3000", "A\u030aA", "\u200b", "a\u200b b", " \u200b a", "Qu Quee", "\U0001f600",
             "\u0645\u0631\u062d", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u4f60\u597d", "\uac00\u1100\u1161",
             "\U0010ffff", "\ud7ff\ue000", "a" * 3000, " " * 3000, "ab" * 1000, "\n" * 1000, "\U0001f600" * 300,
             "<uds>", "x<uds>y", "<uds><uds>2", "<uds", " <uds> ", "<<uds>", "two words", "atwo wordsb",
             "two\u2581words", "the", "them", "then the", "0123456789", "1e-5", "http://a.b/c?d=e&f", "  \n  \n"]
    out = [s.encode() for s in fixed]
    out += [b"\x80", b"\xff", b"\xc3", b"\xc3(", b"\xe2\x96", b"\xe2\x96\x81\x81", b"\xf0\x9f\x98", b"\xf0\x9f\x98a",
            b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xff" * 100,
            b"a\xffb \xfe c", b"\xf0\x80\x80\x80", b"\xf5\x80\x80\x80", b" \xff ", b"\xef\xbf\xbe", b"\xef\xbf\xbd"]
    out += [bytes([i]) for i in range(256)] + [b"a" + bytes([i]) + b" b" for i in range(256)]
    alphabets = [" ", " a", " ab\n", "ab ", ["<0x41>", "<s>", "<uds>a", "\u00e9!", " "], "the ",
                 "\u2581 a", "aeiou tnsrh", "<uds>2", "\ufb01\u2460\u3000A\u030a\u200bQu ",
                 "\u00e9\u4f60\u0645\U0001f600 x", "\0\t\r\n \x7f\x85\u00a0\u2028"]
    words = text.decode(errors="ignore").split()
    while len(out) < count:
        kind = rng.randrange(6)
        n = int(rng.expovariate(1 / 30)) + 1
        if kind == 0:
            out.append(rng.randbytes(n))
        elif kind == 1:
            out.append("".join(rng.choices(rng.choice(alphabets), k=n)).encode())
        elif kind == 2:
            at = rng.randrange(len(text))
            out.append(text[at:at + 5 * n])
        elif kind == 3:
            code = [rng.choice([rng.randrange(1, 0x250), rng.randrange(0x250, 0xd800), rng.randrange(0xe000, 0x110000),
                                rng.randrange(0x1f300, 0x1f700), 32]) for _ in range(n)]
            out.append("".join(map(chr, code)).encode())
        elif kind == 4:
            out.append((rng.choice([" ", "  ", "", "\n", "<uds>"]).join(rng.choices(words, k=n))).encode())
        else:  # broken text
            s = bytearray(rng.choice(out))
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(s) + 1)
                s[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            out.append(bytes(s))
    return out


def train(text, **options):
    """bytes of a small BPE model"""
    buffer = io.BytesIO()
    options = {"byte_fallback": True, "character_coverage": 1.0, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.decode().splitlines()), model_writer=buffer,
                                             model_type="bpe", minloglevel=2, num_threads=1, **options)
    return buffer.getvalue()


def message(*values):
    """protobuf: (number, int, float or bytes) of each field"""
    def varint(x):
        return bytes([x & 127 | 128]) + varint(x >> 7) if x > 127 else bytes([x])

    out = b""
    for number, value in values:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            out += varint(number << 3) + varint(value)
    return out


def with_unused(model, every):
    """the model with every n-th of its longer normal pieces marked as unused"""
    out, seen = b"", 0
    for number, value in fields(model):
        if number == 1:
            piece = dict(fields(value))
            if 3 not in piece and len(piece[1]) > 1:
                seen += 1
                if seen % every == 0:
                    value += message((3, UNUSED))  # the last value of a field counts
        out += message((number, value))
    return out


def handmade():
    """what training does not give: spaces inside pieces, pieces that start with a user-defined one, merges that would
    give a control or byte piece, a merge of a character that is no piece, a control piece that is a character"""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256)),
              ("<uds>", USER_DEFINED), ("<uds>2", USER_DEFINED), ("t", CONTROL)]
    pieces += [(p, NORMAL) for p in ("<uds>a", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "a\u2581b", "ab", "\u2581ab",
                                     "ab\u2581ab", "<s", ">", "<0", "x4", "1>", "<0x4", "\u00e9!", "a", "b", "\u2581")]
    pieces = [(1, message((1, text.encode()), (2, -float(i)), (3, kind))) for i, (text, kind) in enumerate(pieces)]
    return message(*pieces, (2, message((3, 2), (35, 1))), (3, message((1, b"identity"), (4, 0))))


def small_models(text, directory):
    """name, model; the first three are the fixtures"""
    rules = directory / "rules.tsv"
    rules.write_text("".join("\t".join(" ".join(f"{ord(c):X}" for c in part) for part in rule) + "\n"
                             for rule in RULES))
    uds = ["<uds>", "<uds>2", "two words"]
    yield "llama", train(text + b"\n    a  b" * 9999, vocab_size=450, user_defined_symbols=uds, split_digits=True,
                         allow_whitespace_only_pieces=True)
    yield "rules", with_unused(train(text, vocab_size=200, byte_fallback=False, normalization_rule_name="",
                                     normalization_rule_tsv=str(rules), remove_extra_whitespaces=True,
                                     treat_whitespace_as_suffix=True, user_defined_symbols=uds), 7)
    yield "handmade", handmade()
    yield "nmt_nfkc", train(text, vocab_size=1000, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    yield "nfkc_cf", train(text, vocab_size=1000, normalization_rule_name="nfkc_cf", byte_fallback=False)
    yield "no_prefix", with_unused(train(text, vocab_size=2000, add_dummy_prefix=False), 3)
    yield "whole_lines", train(text, vocab_size=2000, split_by_whitespace=False, unk_surface="<?>", byte_fallback=False)


def library(processor, texts):
    """ids, their text, and their text backwards between BOS and EOS, of each text"""
    ids = [processor.encode(t) for t in texts]
    backwards = [[processor.bos_id(), *i[::-1], processor.eos_id()] for i in ids]
    return ids, [processor.decode(i).encode() for i in ids], [processor.decode(i).encode() for i in backwards]


def ours(program, path, texts):
    data = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    done = subprocess.run([program, "many", path], input=data, capture_output=True, check=True)
    out, at, results = done.stdout, 0, ([], [], [])
    for _ in texts:
        for into, width in zip(results, (4, 1, 1)):
            n = struct.unpack_from("<I", out, at)[0]
            part = out[at + 4:at + 4 + n * width]
            into.append(list(struct.unpack(f"<{n}i", part)) if width == 4 else part)
            at += 4 + n * width
    return results, float(done.stderr)


def compare(program, name, model, texts, files, directory):
    """prints ok or FAIL; returns whether all is equal"""
    path = directory / (name + ".bin")
    path.write_bytes(convert(model))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    problem = ""
    for what, group in (("strings", texts), ("files", files)):
        start = time.time()
        for text in group:
            processor.encode(text)
        seconds = time.time() - start
        expected = library(processor, group)
        results, my_seconds = ours(program, path, group)
        for kind, mine, theirs in zip(("ids", "text", "backwards"), results, expected):
            bad = [i for i in range(len(group)) if mine[i] != theirs[i]]
            if bad and not problem:
                i = min(bad, key=lambda i: len(group[i]))
                problem = (f"{len(bad)} of {len(group)} {what}: {kind} of {group[i][:60]!r}: "
                           f"{mine[i][:20]}, library {theirs[i][:20]}")
    size = sum(map(len, files)) / 1e6
    print(f"FAIL {name}: {problem}" if problem else
          f"ok {name}: {processor.vocab_size()} pieces, {len(texts)} strings, {size:.2f} MB of files at "
          f"{size / my_seconds:.1f} MB/s (library: {size / seconds:.1f})", flush=True)
    return not problem


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="compiled test_tokenizer.cpp")
    parser.add_argument("text", type=Path, help="text file or directory of text files")
    parser.add_argument("--model", action="append", default=[], help="a sentencepiece BPE model (mistral-common's)")
    parser.add_argument("--strings", type=int, default=6000, help="number of hard strings a model (6000)")
    parser.add_argument("--fixtures", type=Path, help="write the fixtures of test_tokenizer.cpp to this directory")
    args = parser.parse_args()
    paths = sorted(p for p in args.text.rglob("*") if p.is_file()) if args.text.is_dir() else [args.text]
    files = [p.read_bytes() for p in paths]
    text = b"".join(files)[:4000000].decode(errors="ignore").encode()
    strings = hard_strings(text, args.strings)
    models = args.model
    package = importlib.util.find_spec("mistral_common")
    if not models and package:
        models = sorted(glob.glob(os.path.join(package.submodule_search_locations[0], "data", "*.model*")))
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        if args.fixtures:
            for name, model in itertools.islice(small_models(text, directory), 3):
                (args.fixtures / f"tokenizer_{name}.bin").write_bytes(convert(model))
                texts = [s for s in strings[:80] + strings[80::60] if len(s) < 80]
                lines = zip(texts, *library(sentencepiece.SentencePieceProcessor(model_proto=model), texts))
                (args.fixtures / f"tokenizer_{name}.expected").write_text("".join(
                    f"{t.hex()}|{' '.join(map(str, i))}|{d.hex()}|{b.hex()}\n" for t, i, d, b in lines))
            return 0
        passed = [compare(args.program, Path(m).name, Path(m).read_bytes(), strings, files, directory) for m in models]
        passed += [compare(args.program, name, model, strings, files, directory)
                   for name, model in small_models(text, directory)]
    print(f"tokenizer_vs_sentencepiece: {sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
