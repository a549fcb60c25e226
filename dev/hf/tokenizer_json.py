"""Tokenizers as Hugging Face's tokenizer.json: of bytes, of sentencepiece BPE models, of tiktoken's rank files.

Each is made of what convert_tokenizer.py makes of the file for tokenizer.h, so both refuse the same and have the same
ids. A sentencepiece model alone would not do: transformers 5 makes merges of its own from it, and other ids of spaces.
"""
import base64
import struct

from weights import Refused, convert_tokenizer as convert

PRESETS = convert.PRESETS

# names of BOS and EOS that rank files leave to programs: one token for both; Llama 3 and 4
SPECIAL = {True: ("<|endoftext|>", "<|endoftext|>"), False: ("<|begin_of_text|>", "<|end_of_text|>")}


class File:
    """the fields of a file of convert_tokenizer.py, see tokenizer.h"""

    def __init__(self, data):
        self.flags, self.size, self.bos, self.eos = struct.unpack_from("<IIII", data, 8)
        at, strings = 24, []
        for _ in range(3):
            (length,) = struct.unpack_from("<I", data, at)
            strings.append(data[at + 4:at + 4 + length])
            at += 4 + length
        self.trie, self.strings = strings[1:]
        self.pieces = []  # (bytes, score, kind)
        for _ in range(self.size):
            score, kind, length = struct.unpack_from("<fBH", data, at)
            self.pieces.append((data[at + 7:at + 7 + length], score, kind))
            at += 7 + length
        self.split, classes = struct.unpack_from("<II", data, at)
        at += 8 + 4 * classes
        (merges,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * merges
        self.form = None  # Unicode's normal form, of newer files; of rank files it is NFC
        if data[:8] != b"SGPTTOK2" and any(data[at:at + 4]):
            self.form = {"type": "NFC"}


def byte_tokenizer():
    """prepare.py's bytes: byte-level BPE without a merge"""
    vocab = {character: byte for character, byte in convert.alphabet().items()}
    return whole(vocab, [], ((256, "<s>"), (257, "</s>")), None, byte_level(), byte_level())


def of_file(path, data, preset=None):
    """of the bytes of a sentencepiece model or a rank file: the tokenizer.json, the names of BOS, EOS and what is
    unknown (None: nothing is), the ids of the first two, and how many ids there are"""
    try:
        f = File(convert.convert(data, preset))
        return (*(byte_pairs if f.flags & convert.BYTE_LEVEL else sentencepiece)(f), (f.bos, f.eos), f.size)
    except convert.Refused as e:
        raise Refused(f"{path}: {e}. Give a sentencepiece BPE model, a rank file, a tokenizer.json, its folder, or "
                      "bytes.") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error):
        raise Refused(f"{path}: a field is missing or has the wrong type. Get the file anew.") from None


def byte_pairs(f):
    shown = {byte: character for character, byte in convert.alphabet().items()}
    names = SPECIAL[f.bos == f.eos] if f.bos != 1 else ("<s>", "</s>")  # Mistral's tekken.json
    special = sorted({(f.bos, names[0]), (f.eos, names[1])})
    texts = {i: "".join(shown[b] for b in piece) for i, (piece, _, _) in enumerate(f.pieces) if piece}
    split = {"type": "Split", "pattern": {"Regex": regex(f.split)}, "behavior": "Isolated", "invert": False}
    out = whole({text: i for i, text in texts.items()}, merges(f.pieces, texts), special, f.form,
                {"type": "Sequence", "pretokenizers": [split, byte_level()]}, byte_level())
    out["model"]["ignore_merges"] = bool(f.flags & convert.WHOLE_WORDS)
    return out, (*names, None)


def regex(split):
    """how words are cut, in Oniguruma's syntax: no possessive {1,3}+, and $ is the end of a line"""
    if split == convert.LLAMA3 | convert.END_SPACES:
        return regex(convert.LLAMA3).replace(r"\s*[\r\n]+|\s+(?!\S)|\s+", r"\s+\z|\s*[\r\n]|\s+(?!\S)|\s")
    return next(pattern for pattern, how in convert.regexes().items() if how == split)


def sentencepiece(f):
    has = f.flags.__and__
    kinds = {kind for _, _, kind in f.pieces}
    for what, there in (("the model is not of type BPE", f.flags >= 2 * convert.HF_BYTES),
                        ("the model has space as a suffix", has(convert.SPACE_AS_SUFFIX)),
                        ("the model has unused pieces", convert.UNUSED in kinds),
                        ("the model has spaces that stay as they are", not has(convert.ESCAPE_SPACES)),
                        ("the model has user-defined pieces beside a dummy prefix",
                         convert.USER_DEFINED in kinds and has(convert.DUMMY_PREFIX))):
        if there:
            raise convert.Refused(f"{what}, which a tokenizer.json cannot express")
    texts = {i: piece.decode() for i, (piece, _, _) in enumerate(f.pieces)}
    steps = []
    if f.trie:
        charsmap = struct.pack("<I", len(f.trie)) + f.trie + f.strings
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if has(convert.REMOVE_SPACES):
        steps += [replace({"Regex": r"\A +| +\z"}, ""), replace({"Regex": " {2,}"}, " ")]
    if has(convert.DUMMY_PREFIX):
        steps.append({"type": "Prepend", "prepend": convert.SPACE})
    steps.append(replace({"String": " "}, convert.SPACE))
    decoders = [replace({"String": convert.SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if has(convert.DUMMY_PREFIX):
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    of_kind = [[(i, texts[i]) for i, (_, _, kind) in enumerate(f.pieces) if kind in wanted]
               for wanted in ((convert.CONTROL, convert.UNKNOWN), (convert.USER_DEFINED,), (convert.UNKNOWN,))]
    special, defined, unknown = of_kind
    pairs = [] if has(convert.LISTED_MERGES) else merges(f.pieces, texts)  # of characters alone
    out = whole({text: i for i, text in texts.items()}, pairs, special,
                {"type": "Sequence", "normalizers": steps}, None, {"type": "Sequence", "decoders": decoders},
                (f.bos, texts[f.bos]), defined)
    unknown = unknown[0][1] if unknown else None
    out["model"].update(unk_token=unknown, fuse_unk=True, byte_fallback=bool(has(convert.BYTE_FALLBACK)))
    return out, (texts[f.bos], texts[f.eos], unknown)


def merges(pieces, texts):
    """All pairs of pieces whose concatenation is one, by its score, as sentencepiece and tiktoken take any such pair.
    Of the pairs of one piece those come first whose right half begins the piece too: where two of its pairs overlap
    (in ab a ba: ab a, a ba), this is the one further to the left, which both libraries take."""
    usable = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == convert.NORMAL}
    found = []
    for piece, i in usable.items():
        for cut in range(1, len(piece)):
            left, right = usable.get(piece[:cut]), usable.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-pieces[i][1], i, not piece.startswith(piece[cut:]), left, right))
    return [f"{texts[left]} {texts[right]}" for *_, left, right in sorted(found)]


def replace(what, by):
    return {"type": "Replace", "pattern": what, "content": by}


def byte_level():
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def whole(vocab, pairs, special, normalizer, pre_tokenizer, decoder, bos=None, defined=()):
    """special, defined: (id, name) of special tokens and of others that are cut out of a text; bos: the one that stands
    before every text, as in the data, the first of special if not given"""
    bos = bos or special[0]
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": not is_special, "special": is_special}
             for is_special, tokens in ((True, special), (False, defined)) for i, text in tokens]
    begin = [{"SpecialToken": {"id": bos[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]), "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": {"type": "TemplateProcessing", "single": begin,
                               "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {bos[1]: {"id": bos[1], "ids": [bos[0]], "tokens": [bos[1]]}}},
            "decoder": decoder,
            # special tokens too, or ids with holes before them would move up
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {**vocab, **{text: i for i, text in special}}, "merges": pairs}}
