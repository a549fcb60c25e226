#!/usr/bin/env python3
"""Compare tokenizer.h with sentencepiece, tiktoken and tokenizers: ids and text of files and thousands of hard strings.

    pip install sentencepiece tiktoken tokenizers
    g++ -std=c++17 -O2 -o test_tokenizer dev/test/test_tokenizer.cpp
    tokenizer_vs_libraries.py ./test_tokenizer TEXT ... [--tokenizer FILE ...]
    tokenizer_vs_libraries.py ./test_tokenizer TEXT --fixtures dev/test/tokenizer       (makes the fixtures anew)
    tokenizer_vs_libraries.py --classes                         (prints the tables of characters.py)

TEXT: text files, or directories of them. FILE: a tokenizer that convert_tokenizer.py converts. Without any, small ones
of every kind are trained on the text: sentencepiece's BPE, unigram and char with normalisation nmt_nfkc and own rules,
no byte fallback, whitespace as suffix, unused and user-defined pieces, and one made by hand; rank files with every
preset; tokenizer.json with ByteLevel, with normal forms, with several families' regular expressions, and with Metaspace;
added tokens of every kind. sentencepiece before 0.2.2 decides ties of unigram otherwise. Text that is no UTF-8 is
compared with sentencepiece only; byte-level tokenizers must give it back as Python's errors="replace" decodes it. Speeds
are of one core, in CPU time.
"""
import argparse
import base64
import io
import itertools
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from pathlib import Path

import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
from convert_tokenizer import (BYTE, CONTROL, NORMAL, NORMAL_FORMS, PRESETS, UNKNOWN, UNUSED,  # noqa: E402
                               USER_DEFINED, alphabet, convert, fields)

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
RULES_OF = {  # as their tokenizer.json have them
    "deepseek": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
                 r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
                 r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""),
    "deepseek_coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"),
    "deepseek_llm": ("[\r\n]", "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba]+",
                     "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", CJK, r"\p{N}"),
    "nanochat": (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
                 r"\s+(?!\S)|\s+",),
    "bloom": (" ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",),
}
FIXTURES = ("llama", "rules", "handmade", "cl100k", "o200k", "gpt2_json", "llama_json", "unigram", "deepseek_json")
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
             "two\u2581words", "the", "them", "then the", "0123456789", "1e-5", "http://a.b/c?d=e&f", "  \n  \n",
             "'" * 300, "'s" * 100, "it's IT'S we'll WE'LL I'm i'M x'\u017f '\u017f", "don't'd've", "'", "a'", " 's",
             "'st", "1" * 2000, "1 22 333 4444 55555", "\u0663\u0664\u0665\u0666", "\r\n" * 500, " \r\n \r \n",
             "a  \n  b  \n ",
             "HelloWorld ABCdef ABC abcDEF", "ABC\u0301DEF", "\u0301Q", "\u0301ABC", "\u0301\u0301a", " \u0301A\u0301",
             "A\u05d0B",
             "\u01c5\u02b0A", "!\u0301!", "!!\n/\n//a", " /\r\n/ ", "\u00a0\u00a0a", "\u3000\u3000", "a\u2028\u2028 b",
             "\t\ta\t\t", "\x1c\x1d\x1e\x1f\x85", "<|endoftext|>", "a<|begin_of_text|>b", " zqzq zqzq",
             "\u216b\u00b2\u00bd"]
    out = [s.encode() for s in fixed]
    out += [b"\x80", b"\xff", b"\xc3", b"\xc3(", b"\xe2\x96", b"\xe2\x96\x81\x81", b"\xf0\x9f\x98", b"\xf0\x9f\x98a",
            b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xff" * 100,
            b"a\xffb \xfe c", b"\xf0\x80\x80\x80", b"\xf5\x80\x80\x80", b" \xff ", b"\xef\xbf\xbe", b"\xef\xbf\xbd"]
    out += [bytes([i]) for i in range(256)] + [b"a" + bytes([i]) + b" b" for i in range(256)]
    alphabets = [" ", " a", " ab\n", "ab ", ["<0x41>", "<s>", "<uds>a", "\u00e9!", " "], "the ",
                 "\u2581 a", "aeiou tnsrh", "<uds>2", "\ufb01\u2460\u3000A\u030a\u200bQu ",
                 "\u00e9\u4f60\u0645\U0001f600 x", "\0\t\r\n \x7f\x85\u00a0\u2028",
                 "'stdmlrevSTDMLREV \u017f", "Aa\u0301\u4f60\u01c5\u02b01' ", " \r\n/!a1", "0123456789\u0663 ,.", " \n"]
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
    options = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0,
               "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.decode().splitlines()), model_writer=buffer,
                                             minloglevel=2, num_threads=1, **options)
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
    yield "unigram", train(text, model_type="unigram", vocab_size=500, user_defined_symbols=uds,
                           character_coverage=0.999)
    yield "unigram_nmt_nfkc", train(text, model_type="unigram", vocab_size=4000, byte_fallback=False,
                                    normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    yield "unigram_suffix", with_unused(train(text, model_type="unigram", vocab_size=4000, split_by_whitespace=False,
                                              treat_whitespace_as_suffix=True, user_defined_symbols=uds), 3)
    yield "char", train(text, model_type="char", vocab_size=500, user_defined_symbols=uds)
    yield "whole_lines", train(text, vocab_size=2000, split_by_whitespace=False, unk_surface="<?>", byte_fallback=False)


def byte_level(texts, vocab_size, pre_tokenizer, ignore_merges=False, added=(), normalizer=None, normalized=False):
    """a tokenizer.json with ByteLevel; trained without cutting words, so that a word cut wrongly has other ids"""
    t = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(texts, trainer)
    t.pre_tokenizer = pre_tokenizer
    if normalizer:
        t.normalizer = normalizer
    t.add_tokens([a if isinstance(a, tokenizers.AddedToken) else tokenizers.AddedToken(a, normalized=normalized)
                  for a in added])
    return t.to_str().encode()


def regex(*patterns):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def rank_file(model):
    """a tiktoken rank file of the tokens of a tokenizer.json, in order of their merges; one more that no merge gives,
    and some that words cut rightly never hold"""
    letters, vocab = alphabet(), json.loads(model)["model"]["vocab"]
    tokens = [bytes(letters[c] for c in t) for t in sorted(vocab, key=vocab.get) if not t.startswith("<|")]
    more = [t.encode() for t in (" zqzq", "\n ", "\u0301", "\u0301Q", "\u05d0", "\u05d0B", "\u017f", "'\u017f",
                                 "x'\u017f", "\n/")]
    tokens += [t for t in more if t not in tokens]
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


def metaspace(text, vocab_size, normalizer=None, pre_tokenizer=None, strip=True, added=()):
    """a tokenizer.json in the manner of Llama 2"""
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        t.normalizer = normalizer
    # training wants words, with their spaces before them
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=tokens, show_progress=False, limit_alphabet=80)
    t.train_from_iterator(text.decode().splitlines(keepends=True), trainer)
    model = json.loads(t.to_str())
    model["added_tokens"] = [a for a in model["added_tokens"] if a["content"] in special]
    t = tokenizers.Tokenizer.from_str(json.dumps({**model, "pre_tokenizer": None}))
    if pre_tokenizer:
        t.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    t.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    t.add_tokens(list(added))
    return t.to_str().encode()


def small_tokenizers(text, strings, directory):
    """(name, file, preset)"""
    sentencepieces = [(name, model, None) for name, model in small_models(text, directory)]
    texts = [s.decode() for s in strings if is_utf8(s) and len(s) < 400]
    texts += 10 * texts[:200] + text[:1000000].decode(errors="ignore").splitlines(keepends=True)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = rank_file(byte_level(texts, 700, gpt2))
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    yield from sentencepieces
    yield "cl100k", ranks, "cl100k"
    yield "o200k", ranks, "o200k"
    yield "gpt2_json", byte_level(texts, 600, gpt2), None
    yield "llama_json", metaspace(text, 600, spaces), None
    for preset in ("gpt2", "llama3", "llama4", "qwen"):
        yield preset, ranks, preset
    yield "llama3_json", byte_level(texts, 3000, regex(LLAMA3), True), None
    yield "one_digit_json", byte_level(texts, 3000, regex(LLAMA3.replace("{1,3}", ""))), None
    yield "o200k_json", byte_level(texts, 3000, regex(library_pattern("o200k_base"))), None
    for name, expressions in RULES_OF.items():
        yield f"{name}_json", byte_level(texts, 800, regex(*expressions)), None
    yield "signs_json", byte_level(texts, 3000, pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(False), gpt2])), None
    yield "digits_json", byte_level(texts, 3000, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2])), None
    yield "added_json", byte_level(texts, 3000, pre_tokenizers.ByteLevel(add_prefix_space=True), True,
                                   ["<uds>", "<uds>2", "  ", "   "]), None
    for scheme, split in itertools.product(("first", "never"), (True, False)):
        pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
        yield f"metaspace_{scheme}_{split}", metaspace(text, 2000, None, pre_tokenizer, scheme == "first"), None
    for form in (normalizers.NFC(), normalizers.NFKC()):
        for normalized in (False, True):
            yield (f"{type(form).__name__}_{normalized}", byte_level(
                texts, 3000, gpt2, normalizer=form, normalized=normalized,
                added=["<uds>", "<uds>2", "  ", "   ", "q", "\u0301"][:None if normalized else 4]), None)
    for flags in ({"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}):
        added = [tokenizers.AddedToken(t, normalized=False, **flags) for t in ("<uds>", "<uds>2", "two")]
        yield "added_" + "_".join(flags), byte_level(texts, 3000, gpt2, added=added), None
        yield "metaspace_" + "_".join(flags), metaspace(text, 2000, None, pre_tokenizers.Metaspace(
            prepend_scheme="first"), False, added), None
        yield "llama_" + "_".join(flags), metaspace(text, 2000, spaces, None, True, added), None
    yield "gemma_json", metaspace(text, 2000, normalizers.Replace(" ", "\u2581"), None, False), None


def library_pattern(encoding):
    """tiktoken's regular expression, without its rank files"""
    public = tiktoken_ext.openai_public
    public.load_tiktoken_bpe = public.data_gym_to_mergeable_bpe_ranks = lambda *_, **__: {}
    return getattr(public, encoding)()["pat_str"]


class SentencePiece:
    def __init__(self, data, _):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.bos, self.eos = self.model.bos_id(), self.model.eos_id()

    def encode(self, text):
        return self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids).encode()


class Tiktoken:
    """a rank file, or Mistral's tekken.json; its special tokens are left out"""
    def __init__(self, data, preset):
        self.first, self.form = 0, None
        if data[:1] == b"{":
            model = json.loads(data)
            config, self.first = model["config"], model["config"]["default_num_special_tokens"]
            tokens = model["vocab"][:config["default_vocab_size"] - self.first]
            ranks, pattern = {base64.b64decode(t["token_bytes"]): t["rank"] for t in tokens}, config["pattern"]
        else:
            ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, data.splitlines())}
            preset = preset or next(name for name, p in PRESETS.items() if len(ranks) in p[1])
            self.form = NORMAL_FORMS.get(preset)
            pattern = {"llama3": LLAMA3, "qwen": LLAMA3.replace("{1,3}", ""),
                       "gpt2": library_pattern("r50k_base"), "cl100k": library_pattern("cl100k_base"),
                       "o200k": library_pattern("o200k_base"), "llama4": library_pattern("o200k_base")}[preset]
        self.model = tiktoken.Encoding("it", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.bos = self.eos = None

    def encode(self, text):
        text = text.decode()
        if self.form:
            text = unicodedata.normalize(self.form, text)
        ids = self.model.encode_ordinary(text)
        return [i + self.first for i in ids] if self.first else ids

    def decode(self, ids):
        return self.model.decode([i - self.first for i in ids]).encode()


class HuggingFace:
    def __init__(self, data, _):
        self.model = tokenizers.Tokenizer.from_str(data.decode())
        self.model.encode_special_tokens = True
        self.bos = self.eos = None

    def encode(self, text):
        return self.model.encode(text.decode(), add_special_tokens=False).ids

    def decode(self, ids):
        return self.model.decode(ids).encode()


def library_of(data, preset):
    if data[:1] == b"{":
        return (Tiktoken if b'"config"' in data[:100] else HuggingFace)(data, preset)
    return (Tiktoken if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", data) else SentencePiece)(data, preset)


def is_utf8(text):
    try:
        return text.decode() is not None
    except UnicodeDecodeError:
        return False


def timed(function, values):
    """results and CPU seconds"""
    start = time.process_time()
    results = [function(v) for v in values]
    return results, time.process_time() - start


def expected(library, texts):
    """ids, their text, and their text backwards between BOS and EOS, of each text; CPU seconds of the first two"""
    ids, encoding = timed(library.encode, texts)
    back, decoding = timed(library.decode, ids)
    ends = ([library.bos], [library.eos]) if library.bos is not None else ([], [])
    return (ids, back, [library.decode([*ends[0], *i[::-1], *ends[1]]) for i in ids]), (encoding, decoding)


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
    return results, [float(x) for x in done.stderr.split()]


def compare(program, name, data, preset, texts, files, directory):
    """prints ok or FAIL; returns whether all is equal"""
    path = directory / (name + ".bin")
    path.write_bytes(convert(data, preset))
    library = library_of(data, preset)
    problem, compared = "", 0
    for what, group in (("strings", texts), ("files", files)):
        normal = re.search(rb'"type": *"NF', data)
        if isinstance(library, Tiktoken) and not library.form or b'"ByteLevel"' in data and not normal:
            broken = [t for t in group if not is_utf8(t)]
            for text, back in zip(broken, ours(program, path, broken)[0][1]):
                want = text.decode(errors="replace").encode()
                if back.replace(b" ", b"") != want.replace(b" ", b""):  # added tokens may get spaces
                    problem = f"{text[:60]!r} becomes {back[:60]!r}"
        group = [t for t in group if isinstance(library, SentencePiece) or is_utf8(t)]
        compared += sum(map(len, group))
        results, my_seconds = ours(program, path, group)
        wanted, library_seconds = expected(library, group)
        for kind, mine, theirs in zip(("ids", "text", "backwards"), results, wanted):
            bad = [i for i in range(len(group)) if mine[i] != theirs[i]]
            if bad and not problem:
                i = min(bad, key=lambda i: len(group[i]))
                problem = (f"{len(bad)} of {len(group)} {what}: {kind} of {group[i][:60]!r}: "
                           f"{mine[i][:20]}, library {theirs[i][:20]}")
    mine, theirs = ([sum(map(len, group)) / 1e6 / s for s in pair] for pair in (my_seconds, library_seconds))
    print(f"FAIL {name}: {problem}" if problem else
          f"ok {name}: {compared / 1e6:.1f} MB equal; encodes {mine[0]:.1f} MB/s (library {theirs[0]:.1f}), "
          f"decodes {mine[1]:.1f} MB/s (library {theirs[1]:.1f})", flush=True)
    return not problem


def print_table(name, kinds):
    """kinds: of code points, where they are not 0; as convert_tokenizer.py's runs() reads it"""
    packed, first, last = bytearray(), 0, 0
    for code in range(0x110000):
        kind = kinds.get(code, 0)
        if kind == last:
            continue
        value, first, last = code - first << 3 | kind, code, kind
        while value > 127:
            packed.append(value & 127 | 128)
            value >>= 7
        packed.append(value)
    packed = base64.b85encode(zlib.compress(bytes(packed), 9)).decode()
    print(f"{name} = (")
    for at in range(0, len(packed), 112):
        print(f'    b"{packed[at:at + 112]}"')
    print(")")


def matched(every, *patterns):
    """code point: number, from 1, of the pattern that matches it, for tiktoken; tokenizers must say the same"""
    text, kinds = "".join(every), {}
    for kind, pattern in enumerate(patterns, 1):
        one = tiktoken.Encoding("it", pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)},
                                special_tokens={})
        found = bytes(one.encode_ordinary(text)).decode()
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        if found != "".join(part for c in range(0, len(text), 4096) for part, _ in
                            split.pre_tokenize_str(text[c:c + 4096])):
            raise SystemExit(f"tokenizer_vs_libraries: tiktoken and tokenizers disagree about {pattern}")
        kinds.update((ord(c), kind) for c in found)
    return kinds


def print_classes():
    """what the regular expressions of tiktoken and tokenizers, and tokenizers' normal forms know of Unicode"""
    every = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    print_table("CLASSES", matched(every, r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"[\p{Lm}\p{Lo}]", r"\p{M}", r"\p{N}", r"\s"))
    signs, known_to = matched(every, r"\p{P}", r"\p{S}"), pre_tokenizers.Punctuation("isolated")
    for c in every:
        kind = signs.get(ord(c), 0)
        if not c.isascii() and (len(known_to.pre_tokenize_str("a" + c)) == 2) != (kind == 1):
            signs[ord(c)] = {1: 3, 2: 4}.get(kind, 5)
    print_table("SIGNS", signs)
    nfd, nfkd = normalizers.NFD(), normalizers.NFKD()

    def known(c):
        """has a decomposition, or is put in order with others as Python does it"""
        if nfd.normalize_str(c) != c or nfkd.normalize_str(c) != c:
            return not "\uac00" <= c <= "\ud7a3"
        return unicodedata.combining(c) and all(
            nfd.normalize_str(s) == unicodedata.normalize("NFD", s)
            for other in "\u0334\u0315\u0301\u0323\u05b0\u3099" for s in (f"a{c}{other}", f"a{other}{c}"))

    print_table("FORMS", {ord(c): 1 for c in every if known(c)})


def main():
    if sys.argv[1:] == ["--classes"]:
        return print_classes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="compiled test_tokenizer.cpp")
    parser.add_argument("text", type=Path, nargs="+", help="text files or directories of text files")
    parser.add_argument("--glob", default="*", help="which files of directories (*)")
    parser.add_argument("--tokenizer", action="append", default=[], help="a tokenizer's own file")
    parser.add_argument("--strings", type=int, default=6000, help="number of hard strings a tokenizer (6000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the small tokenizers")
    parser.add_argument("--fixtures", type=Path, help="write the fixtures of test_tokenizer.cpp to this directory")
    args = parser.parse_args()
    paths = [p for t in args.text for p in (sorted(t.rglob(args.glob)) if t.is_dir() else [t]) if p.is_file()]
    files = [p.read_bytes() for p in paths]
    text = b"".join(files)[:4000000].decode(errors="ignore").encode()
    strings = hard_strings(text, args.strings)
    rng = random.Random(1)
    codes = [chr(c) for c in range(1, 0x110000) if not 0xd800 <= c < 0xe000]  # every character, in order and at random
    strings += ["".join(codes[i:i + 5000]).encode() for i in range(0, len(codes), 5000)]
    strings += ["".join(rng.choices(codes, k=5000)).encode() for _ in range(50)]
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        if args.fixtures:
            for name, data, preset in small_tokenizers(text, strings, directory):
                if name not in (args.only or FIXTURES):
                    continue
                library = library_of(data, preset)
                (args.fixtures / f"tokenizer_{name}.bin").write_bytes(convert(data, preset))
                texts = [s for s in strings[:130] + strings[130:6000:60] if len(s) < 80]
                texts = [s for s in texts if isinstance(library, SentencePiece) or is_utf8(s)]
                (args.fixtures / f"tokenizer_{name}.expected").write_text("".join(
                    f"{t.hex()}|{' '.join(map(str, i))}|{d.hex()}|{b.hex()}\n"
                    for t, i, d, b in zip(texts, *expected(library, texts)[0])))
            return 0
        tried = [(Path(t).name, Path(t).read_bytes(), None) for t in args.tokenizer]
        tried = tried or (t for t in small_tokenizers(text, strings, directory) if not args.only or t[0] in args.only)
        passed = [compare(args.program, name, data, preset, strings, files, directory) for name, data, preset in tried]
    print(f"tokenizer_vs_libraries: {sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return not all(passed)


if __name__ == "__main__":
    sys.exit(main())
