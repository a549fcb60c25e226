#!/usr/bin/env python3
"""Convert a tokenizer to the file that tokenizer.h reads; its comment has the format.

    convert_tokenizer.py FILE OUT.bin

FILE, told apart by its contents:
  a sentencepiece model of type BPE, unigram or char (.model: Llama 2, Mistral, T5);
  a tiktoken rank file (lines `base64 rank`: GPT-2's r50k, cl100k, o200k, tokenizer.model of Llama 3 and 4,
  qwen.tiktoken). These are known by their number of tokens; of others --preset says whose regular expression and
  special tokens they have;
  a tokenizer.json of Hugging Face: BPE with ByteLevel (GPT-2, Llama 3, OLMo, Qwen, DeepSeek), or with byte_fallback and
  U+2581 for spaces (Llama 2, Gemma);
  a vocab.json with its merges.txt beside it: GPT-2's rules or, with --preset qwen, Qwen's;
  a tekken.json of Mistral.
Needs nothing but Python. Refuses, with one line and exit code 1, what tokenizer.h does not do: other models, unknown
normalisations, regular expressions and decoders.
"""
import argparse
import base64
import json
import math
import os
import re
import signal
import struct
import sys
import unicodedata
from pathlib import Path

from characters import CLASSES, Refused, normal_form, numbers, rules_tables, runs

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
# flags of the file
(DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES, SPACE_AS_SUFFIX, BYTE_FALLBACK, BYTE_LEVEL, LISTED_MERGES, WHOLE_WORDS,
 PREFIX_IF_NONE, CUT_AT_SPACES, DROP_SPACE, HF_BYTES, PREFIX_ONCE, UNIGRAM) = (1 << i for i in range(14))
LSTRIP, RSTRIP, IN_NORMAL_FORM = 8, 16, 32  # with USER_DEFINED
# how words are cut: 1..3, the most digits of a number, and these
(ANY_PREFIX, CASED, CONTRACTION, CONTRACTION_TAIL, ANY_CASE, NEWLINE_TAIL, SLASH_TAIL, NEWLINES, END_SPACES,
 DIGITS_APART) = (1 << i for i in range(2, 12))
BPE, CHARACTERS = 2, 4  # sentencepiece's numbers of them; 1: unigram
SPACE = "\u2581"
NO_UTF8 = (0xc0, 0xc1, *range(0xf5, 256))  # bytes that no text has

GPT2 = CONTRACTION
LLAMA3 = 3 | ANY_PREFIX | CONTRACTION | ANY_CASE | NEWLINE_TAIL | NEWLINES
TEKKEN = 1 | ANY_PREFIX | CASED | NEWLINE_TAIL | SLASH_TAIL | NEWLINES
O200K = TEKKEN | 3 | CONTRACTION_TAIL | ANY_CASE


GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def regexes():
    """regular expression: how it cuts words"""
    any_case, spaces = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s+(?!\S)|\s+"
    words, other = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

    def cased(digits, tail):
        word = r"[^\r\n\p{L}\p{N}]?" + upper
        return rf"{word}*{lower}+{tail}|{word}+{lower}*{tail}|{digits}|{other}[\r\n/]*|\s*[\r\n]+|{spaces}"

    return {
        GPT2_REGEX: GPT2,
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2,
        rf"{any_case}|{words}|\p{{N}}{{1,3}}|{other}[\r\n]*|\s*[\r\n]+|{spaces}": LLAMA3,
        rf"{any_case}|{words}|\p{{N}}|{other}[\r\n]*|\s*[\r\n]+|{spaces}": LLAMA3 - 2,
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
        r"\s*[\r\n]|\s+(?!\S)|\s": LLAMA3 | END_SPACES,
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
        r"\s+(?!\S)|\s+": LLAMA3,
        cased(r"\p{N}{1,3}", any_case + "?"): O200K,
        cased(r"\p{N}", ""): TEKKEN,
    }


# rank files: how words are cut; numbers of tokens by which they are known; behind the last rank: BOS, EOS, how many ids
PRESETS = {
    "gpt2": (GPT2, (50256, 50280), 0, 0, 1),  # its <|endoftext|> takes the first free id
    "cl100k": (LLAMA3 | END_SPACES, (100256,), 1, 1, 21),
    "o200k": (O200K, (199998,), 1, 1, 21),
    "llama3": (LLAMA3, (128000,), 0, 1, 256),
    "llama4": (O200K, (200000,), 0, 1, 2048),
    "qwen": (LLAMA3 - 2, (151643,), 0, 0, 208),
}
NORMAL_FORMS = {"qwen": "NFC"}
QWEN_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>",
       "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")

# raised by malformed files
BROKEN = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError, struct.error)
MOST = 1 << 24  # ids
SETTLED = "its BOS and EOS follow from what it is: leave out --bos and --eos"


def no_token(missing):
    """of bytes, in words"""
    ranges = []
    for byte in missing:
        if ranges and byte == ranges[-1][1] + 1:
            ranges[-1][1] = byte
        else:
            ranges.append([byte, byte])
    shown = ", ".join(f"0x{a:02x}" + (f"-0x{b:02x}" if b > a else "") for a, b in ranges[:20])
    more = f" and more, {len(missing)} in all," if len(ranges) > 20 else ""
    return (f"it has no token for the bytes {shown}{more} and text with them would be lost; train it with all 256 "
            "(initial_alphabet=pre_tokenizers.ByteLevel.alphabet() at byte level)")


def check(flags, pieces):
    """what tokenizer.h asks of the pieces, so that it takes whatever is written here"""
    taken = {}
    for i, (piece, score, kind) in enumerate(pieces):
        if len(piece) > 65535 or not piece and kind != CONTROL or not math.isfinite(score) or \
                not NORMAL <= kind <= BYTE:
            raise Refused(f"piece {i} is broken")
        if kind == BYTE and (not flags & BYTE_FALLBACK or not re.fullmatch(b"<0x[0-9A-F]{2}>", piece)):
            raise Refused(f"piece {i} is of the type byte, but not of the form <0x41>, or there is no byte_fallback")
        if kind not in (UNKNOWN, CONTROL):
            key = NORMAL if kind == UNUSED else kind, piece
            if taken.setdefault(key, i) != i:
                raise Refused(f"the pieces {taken[key]} and {i} are the same, {piece.decode(errors='replace')!r}")
    kinds = [kind for _, _, kind in pieces]
    if kinds.count(UNKNOWN) > 1:
        raise Refused("two pieces are of the type unknown")
    if not flags & (BYTE_LEVEL | BYTE_FALLBACK) and UNKNOWN not in kinds:
        raise Refused("it has neither byte_fallback nor a piece for what is unknown")
    tokens = [(NORMAL, bytes([b])) for b in range(256)] if flags & BYTE_LEVEL else \
        [(BYTE, b"<0x%02X>" % b) for b in range(256)] if flags & BYTE_FALLBACK else []
    missing = [b for b, (kind, token) in enumerate(tokens) if (kind, token) not in taken
               and (kind == BYTE or (USER_DEFINED, token) not in taken and b not in NO_UTF8)]
    if missing:
        raise Refused(no_token(missing))


def lost(model):
    """what of a text the model of a tokenizer.json leaves out without a trace, in words"""
    bpe = model["model"]
    if bpe.get("type", "BPE") != "BPE" or bpe.get("unk_token") is not None:
        return None
    level = any(p["type"] == "ByteLevel" for key in ("normalizer", "pre_tokenizer") for p in parts(model.get(key)))
    tokens = {b: c for c, b in alphabet().items()} if level else [f"<0x{b:02X}>" for b in range(256)]
    missing = [b for b in range(256) if tokens[b] not in bpe["vocab"] and b not in NO_UTF8]
    if not level and not bpe.get("byte_fallback"):
        return "characters that it does not know would be lost; train it with an unk_token, or at byte level"
    return no_token(missing) if missing else None


def tokenizer_file(flags, bos, eos, pieces, split=0, merges=(), surface=b"", trie=b"", strings=b"", form=None,
                   rules=()):
    """pieces: (bytes, score, kind); merges: (left id, right id); form: name of Unicode's normal form; rules: regular
    expressions. What the second version of the format can say is written in it, so that a tokenizer's file stays the
    same."""
    kinds = {kind for _, _, kind in pieces}
    third = form or rules or flags & (PREFIX_ONCE | UNIGRAM) or max(kinds) > 7 or \
        USER_DEFINED in kinds and flags & HF_BYTES
    check(flags, [(piece, score, kind & 7) for piece, score, kind in pieces])
    out = [b"SGPTTOK3" if third else b"SGPTTOK2", numbers((flags, len(pieces), bos, eos))]
    for data in (surface, trie, strings):
        out += [numbers((len(data),)), data]
    out += [struct.pack("<fBH", score, kind, len(piece)) + piece for piece, score, kind in pieces]
    strips = any(kind & (LSTRIP | RSTRIP) for kind in kinds)
    classes = runs(CLASSES) if flags & BYTE_LEVEL and not rules or strips else []
    out += [numbers((split, len(classes), *classes, len(merges))), *(numbers(m) for m in merges)]
    if third:
        # rank files have ids by tiktoken, which is given text in Python's normal form
        out.append(normal_form(form, not flags & LISTED_MERGES) if form else numbers((0, 0)))
        out.append(rules_tables(rules) if rules else numbers((0, 0)))
    return b"".join(out)


def fields(data):
    """(number, value) of each field of a protobuf message: an int, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise Refused("this is not a sentencepiece model")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 2: None, 5: 4}.get(wire, -1)
        if size is None:
            size = varint()
        if size < 0 or at + size > len(data):
            raise Refused("this is not a sentencepiece model")
        yield key >> 3, data[at:at + size]
        at += size


def sentencepiece(model, bos, eos):
    pieces, trainer, normalizer, denormalizer = [], {}, {}, {}
    for number, value in fields(model):
        if number in (1, 2, 3, 5) and not isinstance(value, bytes):
            raise Refused("this is not a sentencepiece model")
        if number == 1:
            piece = dict(fields(value))
            pieces.append((piece.get(1, b""), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number in (2, 3, 5):
            {2: trainer, 3: normalizer, 5: denormalizer}[number].update(fields(value))
    if not pieces:
        raise Refused("this is not a sentencepiece model")
    algorithm = trainer.get(3, 1)
    if algorithm not in (1, BPE, CHARACTERS):
        raise Refused("the model is of type word; tokenizer.h knows BPE, unigram and char")
    if denormalizer.get(2):
        raise Refused("the model has a denormalizer, which tokenizer.h does not know")
    for i, (piece, _, kind) in enumerate(pieces):
        if not piece or b"\0" in piece or kind not in range(NORMAL, BYTE + 1):
            raise Refused(f"piece {i} is broken")

    def control(name):
        found = [i for i, (piece, _, kind) in enumerate(pieces) if piece == name and kind == CONTROL]
        if not found:
            raise Refused(f"the model has no control piece {name.decode(errors='replace')}")
        return found[0]

    bos = control(bos.encode() if bos else trainer.get(46) or b"<s>")
    eos = control(eos.encode() if eos else trainer.get(47) or b"</s>")
    flags = sum(bit for bit, on in (
        (DUMMY_PREFIX, normalizer.get(3, 1)), (REMOVE_SPACES, normalizer.get(4, 1)),
        (ESCAPE_SPACES, normalizer.get(5, 1)), (SPACE_AS_SUFFIX, trainer.get(24, 0)),
        (BYTE_FALLBACK, trainer.get(35, 0)), (UNIGRAM, algorithm == 1),
        (LISTED_MERGES, algorithm == CHARACTERS)) if on)
    charsmap = normalizer.get(2, b"")
    trie = strings = b""
    if charsmap:
        size = int.from_bytes(charsmap[:4], "little")
        trie, strings = charsmap[4:4 + size], charsmap[4 + size:]
        if size % 4 or not strings.endswith(b"\0"):
            raise Refused("the model's normalisation table is broken")
    surface = trainer.get(44, " \u2047 ".encode())
    return tokenizer_file(flags, bos, eos, pieces, surface=surface, trie=trie, strings=strings)


def by_rank(ranks, offset=0):
    """pieces of {bytes: rank}, whose ids are offset + rank; what has no rank is control"""
    pieces = [(b"", 0, CONTROL)] * (offset + max(ranks.values()) + 1)
    for piece, rank in ranks.items():
        pieces[offset + rank] = (piece, -float(rank), NORMAL)
    return pieces


def rank_table(data, preset):
    """({bytes: rank}, preset, BOS, EOS, V) of a rank file"""
    ranks = {}
    for n, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise Refused(f"line {n} is not `base64 rank`")
        if not 0 <= rank < MOST or token in ranks:
            raise Refused(f"line {n} has a rank out of range or a token that was there before")
        ranks[token] = rank
    preset = preset or next((name for name, (_, known, *_) in PRESETS.items() if len(ranks) in known), None)
    if not preset:
        raise Refused(f"{len(ranks)} tokens are of no known tokenizer: --preset must say how it splits text")
    taken = set(ranks.values())
    if len(taken) < len(ranks):
        raise Refused("two tokens have the same rank")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise Refused(no_token(missing))
    _, _, bos, eos, more = PRESETS[preset]
    free = next(i for i in range(len(ranks) + 1) if i not in taken) if preset == "gpt2" else max(taken) + 1
    return ranks, preset, free + bos, free + eos, max(free + more, max(taken) + 1)


def rank_file(data, preset):
    ranks, preset, bos, eos, V = rank_table(data, preset)
    pieces = by_rank(ranks)
    pieces += [(b"", 0, CONTROL)] * (V - len(pieces))
    return tokenizer_file(BYTE_LEVEL | WHOLE_WORDS, bos, eos, pieces, PRESETS[preset][0],
                          form=NORMAL_FORMS.get(preset))


def tekken_table(model):
    """({bytes: rank}, regular expression, first id of a rank) of Mistral's tekken.json"""
    config = model["config"]
    first = config["default_num_special_tokens"]
    tokens = model["vocab"][:config["default_vocab_size"] - first]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in tokens}
    if len(set(ranks.values())) < len(tokens):
        raise Refused("two tokens have the same rank")
    if min(first, *ranks.values()) < 0 or max(first, *ranks.values()) >= MOST:
        raise Refused("it has a rank out of range")
    return ranks, config["pattern"], first


def tekken(model):
    ranks, pattern, first = tekken_table(model)
    split = regexes().get(pattern)
    if split is None:
        raise Refused(f"the regular expression {pattern!r} is none that tokenizer.h knows")
    return tokenizer_file(BYTE_LEVEL | WHOLE_WORDS, 1, 2, by_rank(ranks, first), split)


def parts(part):
    """list of the steps of a normalizer, pre_tokenizer or decoder"""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [p for key in ("normalizers", "pretokenizers", "decoders") for q in part.get(key, ()) for p in parts(q)]


def pattern(part):
    """("Regex" or "String", text) of a Split or Replace"""
    (kind, text), = part["pattern"].items()
    return kind, text.replace("\r", r"\r").replace("\n", r"\n") if kind == "Regex" else text


def unknown(what, part):
    return Refused(f"the {what} {json.dumps(part, ensure_ascii=False)[:300]} is none that tokenizer.h knows")


def byte_level_split(model):
    """flags, split and rules of a pre_tokenizer that ends with ByteLevel"""
    *before, last = parts(model["pre_tokenizer"])
    flags, expressions = BYTE_LEVEL, []
    if last.get("add_prefix_space", True):
        if before:
            raise Refused("the pre_tokenizer ByteLevel with add_prefix_space behind another one is not supported")
        flags |= DUMMY_PREFIX | PREFIX_IF_NONE
    for part in before:
        how = part.get("behavior", "Isolated"), part.get("invert", False)
        if part["type"] == "Split":
            kind, text = pattern(part)
            expression = text if kind == "Regex" else re.sub(r"(\W)", r"\\\1", text)
            known = len(before) == 1 and how == ("Removed", True) and text in regexes()  # which leave nothing between
        elif part["type"] == "Digits":
            expression, known = r"\p{N}" if part.get("individual_digits") else r"\p{N}+", False
        elif part["type"] == "Punctuation":
            expression, known = r"[!-/:-@\[-`{-~\p{P8}]", False
        else:
            raise unknown("pre_tokenizer", part)
        if how != ("Isolated", False) and not known:
            raise unknown("pre_tokenizer", part)
        expressions.append(expression)
    if last.get("use_regex", True):
        expressions.append(GPT2_REGEX)
    if not expressions:
        raise unknown("pre_tokenizer", last)
    if [d["type"] for d in parts(model.get("decoder"))] != ["ByteLevel"]:
        raise unknown("decoder", model.get("decoder"))
    if expressions == [r"\p{N}", GPT2_REGEX]:
        return flags, GPT2 | DIGITS_APART, ()
    # {1,3}+ is possessive to tiktoken, and any number to tokenizers
    if len(expressions) == 1 and expressions[0] in regexes() and "3}+" not in expressions[0]:
        return flags, regexes()[expressions[0]], ()
    return flags, 0, expressions


def unicode_form(model):
    """name of the normal form that a ByteLevel tokenizer brings text to; None: as it is"""
    steps = parts(model.get("normalizer"))
    for step in steps:
        if step["type"] not in ("NFC", "NFKC") or len(steps) > 1:
            raise unknown("normalizer", step)
    return steps[0]["type"] if steps else None


def metaspace_flags(model):
    """flags of a tokenizer that writes spaces as U+2581"""
    flags = BYTE_FALLBACK | HF_BYTES
    for step in parts(model.get("normalizer")):
        if step["type"] == "Prepend" and step["prepend"] == SPACE and not flags & ESCAPE_SPACES:
            flags |= DUMMY_PREFIX
        elif step["type"] == "Replace" and pattern(step) == ("String", " ") and step["content"] == SPACE:
            flags |= ESCAPE_SPACES
        else:
            raise unknown("normalizer", step)
    for step in parts(model.get("pre_tokenizer")):
        if step["type"] == "Split" and pattern(step) == ("String", " ") and flags & ESCAPE_SPACES:
            continue  # there is none left
        if step["type"] != "Metaspace" or step.get("replacement") != SPACE or flags & (ESCAPE_SPACES | DUMMY_PREFIX):
            raise unknown("pre_tokenizer", step)
        flags |= ESCAPE_SPACES
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if scheme != "never":
            flags |= DUMMY_PREFIX | PREFIX_IF_NONE | (PREFIX_ONCE if scheme == "first" and plain_tokens(model) else 0)
        if step.get("split", True):
            flags |= CUT_AT_SPACES
    if not flags & ESCAPE_SPACES:
        raise Refused("neither its pre_tokenizer is ByteLevel nor spaces become U+2581")
    steps = parts(model.get("decoder"))
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if steps[:3] != [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]:
        raise unknown("decoder", model.get("decoder"))
    if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
        flags |= DROP_SPACE
    elif steps[3:]:
        raise unknown("decoder", steps[3])
    return flags


def plain_tokens(model):
    """the added tokens that text is searched for: special ones are ids only"""
    return [t for t in model.get("added_tokens", []) if not t["special"]]


def found_as(token, model, form):
    """an added token as text is searched for it: a normalized one in its normal form"""
    text = token["content"]
    if not token["normalized"]:
        return text
    for step in parts(model.get("normalizer")):
        if form:
            text = unicodedata.normalize(form, text)
        else:  # see metaspace_flags()
            text = SPACE + text if step["type"] == "Prepend" else text.replace(" ", SPACE)
    return text


def added_piece(token, model, form, byte_level):
    """a plain one as a piece, with how it is found"""
    written, text, letters = token["content"], found_as(token, model, form), alphabet()
    if token["single_word"]:
        raise Refused(f"the added token {written!r} is to be found as a whole word only, which tokenizer.h does not "
                      "know")
    if byte_level and all(c in letters for c in written) and bytes(letters[c] for c in written) != text.encode() or \
            not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", text) or form and text != written:
        raise Refused(f"the added token {written!r} does not decode to itself")
    # without a normalizer these too are searched for after the others; alone, it makes no difference
    later = token["normalized"] and (model.get("normalizer") or
                                     byte_level and any(not t["normalized"] for t in plain_tokens(model)))
    return text.encode(), 0, USER_DEFINED | sum(bit for bit, on in (
        (LSTRIP, token["lstrip"]), (RSTRIP, token["rstrip"]), (IN_NORMAL_FORM, later)) if on)


def begins_within(names, within):
    """of the names one that, in a text, can begin within one of the others but not before it, and that one"""
    sizes, begins = {len(n) for n in names}, {n[:size]: n for n in names for size in range(1, len(n) + 1)}
    for other in within:
        for at in range(len(other)):
            rest = other[at:]
            found = next((rest[:n] for n in sizes if rest[:n] in names), begins.get(rest) if at else None)
            if found:
                return found, other
    return None


def check_added(model, form, byte_level):
    """refuses added tokens that tokenizer.h would not give where the library does"""
    vocab, given = model["model"]["vocab"], {}
    for token in model.get("added_tokens", []):
        text = token["content"]
        i = vocab.get(text, max(len(vocab), 1 + max(given.values(), default=-1)))
        if text in given or i != token["id"]:
            raise Refused(f"the added token {text!r} has the id {token['id']}, but the library gives it "
                          f"{given.get(text, i)}")
        given[text] = i

    def names(special, normalized):
        return {found_as(t, model, form) for t in model.get("added_tokens", [])
                if bool(t["special"]) == special and bool(t["normalized"]) == normalized}

    for normalized in (False, True):  # the names of special ones are found, and both skipped
        clash = begins_within(names(False, normalized), names(True, normalized))
        if clash:
            raise Refused("the added token {!r} begins within the special {!r}".format(*clash))
    if not byte_level and not model.get("normalizer"):  # all are searched for at once
        clash = begins_within(names(False, False), names(False, True))
        if clash or names(False, True) and any(
                t["lstrip"] or t["rstrip"] for t in plain_tokens(model) if not t["normalized"]):
            raise Refused("it has added tokens that are normalized and some that are not, which overlap")


def alphabet():
    """character: byte, as ByteLevel writes bytes"""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def tokenizer_json(model, bos, eos):
    bpe = model["model"]
    kind = bpe.get("type", "BPE" if "merges" in bpe else "unknown")
    if kind != "BPE":
        raise Refused(f"the model is of type {kind}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if bpe.get(option):
            raise Refused(f"the model's {option} is not supported")
    steps = parts(model.get("pre_tokenizer"))
    byte_level = bool(steps) and steps[-1]["type"] == "ByteLevel"
    flags, split, rules = byte_level_split(model) if byte_level else (metaspace_flags(model), 0, ())
    form = unicode_form(model) if byte_level else None
    check_added(model, form, byte_level)
    flags |= LISTED_MERGES
    if bpe.get("ignore_merges"):
        if not byte_level:
            raise Refused("ignore_merges without ByteLevel is not supported")
        flags |= WHOLE_WORDS

    if not byte_level and not bpe.get("byte_fallback"):
        raise Refused("a model without ByteLevel and without byte_fallback is not supported")
    vocab, added, letters = bpe["vocab"], model.get("added_tokens", []), alphabet()
    ids = [*vocab.values(), *(t["id"] for t in added)]
    if min(ids) < 0 or max(ids) >= MOST or len(set(vocab.values())) < len(vocab):
        raise Refused("it has an id out of range, or two tokens with one id")
    pieces = [(b"", 0, CONTROL)] * (max(ids) + 1)
    known = {t["content"] for t in added}
    for text, i in vocab.items():
        if text in known:
            continue
        if not byte_level:
            is_byte = re.fullmatch("<0x[0-9A-F]{2}>", text)
            pieces[i] = (text.encode(), 0, BYTE if is_byte else NORMAL)
        elif all(c in letters for c in text):
            pieces[i] = (bytes(letters[c] for c in text), 0, NORMAL)
        else:
            raise Refused(f"the token {text!r} has characters that ByteLevel does not write")
    special = {}
    for token in added:
        text, i = token["content"], token["id"]
        if token["special"]:
            special[text] = i
            # a byte that is called special, as training with these names does, is a byte all the same
            is_byte = not byte_level and vocab.get(text) == i and re.fullmatch("<0x[0-9A-F]{2}>", text)
            pieces[i] = (text.encode(), 0, BYTE if is_byte else CONTROL)
            continue
        pieces[i] = added_piece(token, model, form, byte_level)
    # what is added is cut out before any merge, but may arise again in a normal form
    arises = form or not byte_level
    taken = {piece for piece, _, kind in pieces if not arises and kind & 7 == USER_DEFINED}
    normal = {piece for piece, _, kind in pieces if kind == NORMAL or arises and kind & 7 == USER_DEFINED}
    merges = {}
    for rank, merge in enumerate(bpe["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pair = vocab.get(left), vocab.get(right)
        texts = [pieces[i][0] for i in pair if i is not None]
        texts.append(b"".join(texts))
        if len(texts) == 3 and not taken.isdisjoint(texts):
            continue
        if len(texts) < 3 or texts[2] not in normal:
            raise Refused(f"merge {rank} ({left!r}, {right!r}) is not of tokens or gives none")
        merges[pair] = rank  # the last one of equals counts
    ends = []
    for option, given, names in (("--bos", bos, BOS), ("--eos", eos, EOS)):
        name = next((n for n in ([given] if given else names) if n in special), None)
        if name is None:
            raise Refused(f"no special token is {given or ' or '.join(names)}: {option} must name one of them")
        ends.append(special[name])
    return tokenizer_file(flags, *ends, pieces, split, sorted(merges, key=merges.get), form=form, rules=rules)


def is_json(data):
    return data.lstrip()[:1] == b"{"


def is_rank_file(data):
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data)


def is_tekken(data):
    if is_json(data) and b'"token_bytes"' in data:
        try:
            model = json.loads(data)
            return "config" in model and "vocab" in model
        except (ValueError, RecursionError):
            pass
    return False


def with_merges(data, path, preset):
    """of a vocab.json with the merges.txt beside it the tokenizer.json that they are; any other file as it is"""
    try:
        vocab = json.loads(data) if is_json(data) else {}
    except (ValueError, RecursionError):
        return data
    if not vocab or not all(isinstance(i, int) for i in vocab.values()):
        return data
    path = Path(path)
    merges = path.with_name(path.name.replace("vocab", "merges")).with_suffix(".txt")
    if merges.name == path.name or not merges.is_file():
        raise Refused(f"it is a vocabulary, whose merges, {merges.name}, are not beside it")
    if preset not in ("gpt2", "qwen") and not (preset is None and len(vocab) == 50257):
        raise Refused("it is a vocabulary: --preset gpt2 or qwen must say how it splits text")
    lines = merges.read_bytes().decode().split("\n")
    lines = lines[lines[0].startswith("#version"):]
    ends = [(t, i) for t, i in vocab.items() if t in (*BOS, *EOS)] or [("<|endoftext|>", max(vocab.values()) + 1)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": preset != "qwen"}
    split = {"type": "Split", "pattern": {"Regex": QWEN_REGEX}, "behavior": "Isolated", "invert": False}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": level,
        "normalizer": {"type": "NFC"} if preset == "qwen" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]} if preset == "qwen" else level,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for t, i in ends],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [line.rstrip("\r") for line in lines if line.strip()]}}).encode()


def convert(data, preset=None, bos=None, eos=None, path=""):
    """data: bytes of a tokenizer's file; path: where it is; returns bytes of the tokenizer file."""
    data = with_merges(data, path, preset)
    if (bos or eos) and (is_rank_file(data) or is_tekken(data)):
        raise Refused(SETTLED)
    if is_json(data):
        try:
            model = json.loads(data)
        except (ValueError, RecursionError):
            raise Refused("this is not valid JSON")
        if "config" in model and "vocab" in model:
            return tekken(model)
        if not isinstance(model.get("model"), dict) or "vocab" not in model["model"]:
            raise Refused("this is no tokenizer.json")
        return tokenizer_json(model, bos, eos)
    if is_rank_file(data):
        return rank_file(data, preset)
    return sentencepiece(data, bos, eos)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"convert_tokenizer: {message}. --help lists the options.")


def main():
    parser = Parser(prog="convert_tokenizer", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FILE", help="the tokenizer's own file")
    parser.add_argument("out", metavar="OUT", help="tokenizer file to write")
    parser.add_argument("--preset", choices=PRESETS, help="whose split and special tokens a rank file has")
    parser.add_argument("--bos", metavar="TEXT", help="special token before a document (the usual names are known)")
    parser.add_argument("--eos", metavar="TEXT", help="special token behind a document")
    args = parser.parse_args()
    where = args.model
    try:
        with open(args.model, "rb") as f:
            data = convert(f.read(), args.preset, args.bos, args.eos, args.model)
        where = args.out
        if os.path.exists(where) and not os.path.isfile(where):
            raise Refused("is a folder, a pipe or a device, no file")
        temporary = Path(args.out + ".tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, args.out)
        finally:
            temporary.unlink(missing_ok=True)
    except Refused as e:
        sys.exit(f"convert_tokenizer: {where}: {e}. --help lists what can be converted.")
    except OSError as e:
        sys.exit(f"convert_tokenizer: {where}: {e.strerror}. Check the path.")
    except BROKEN:
        sys.exit(f"convert_tokenizer: {where}: a field is missing or has the wrong type. Get the file anew.")


if __name__ == "__main__":
    main()
