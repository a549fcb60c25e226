#!/usr/bin/env python3
"""Convert a sentencepiece BPE model (.model) to the tokenizer file that tokenizer.h reads; its comment has the format.

    convert_tokenizer.py FILE.model OUT.bin

Needs nothing but Python. Refuses, with one line and exit code 1, what tokenizer.h does not do: unigram, word and
character models, a denormalizer, a model without <s> and </s>.
"""
import argparse
import math
import os
import struct
import sys
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


class Refused(Exception):
    pass


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


def convert(model):
    """model: bytes of a .model file; returns bytes of the tokenizer file."""
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
    if trainer.get(3, 1) != BPE:
        raise Refused("the model is not of type BPE, the only one that tokenizer.h knows")
    if denormalizer.get(2):
        raise Refused("the model has a denormalizer, which tokenizer.h does not know")
    for i, (piece, score, kind) in enumerate(pieces):
        if not 0 < len(piece) < 65536 or b"\0" in piece or math.isnan(score) or kind not in range(NORMAL, BYTE + 1):
            raise Refused(f"piece {i} is broken")

    def control(name):
        found = [i for i, (piece, _, kind) in enumerate(pieces) if piece == name and kind == CONTROL]
        if not found:
            raise Refused(f"the model has no control piece {name.decode(errors='replace')}")
        return found[0]

    bos, eos = control(trainer.get(46) or b"<s>"), control(trainer.get(47) or b"</s>")
    flags = sum(bit for bit, on in ((1, normalizer.get(3, 1)), (2, normalizer.get(4, 1)), (4, normalizer.get(5, 1)),
                                    (8, trainer.get(24, 0)), (16, trainer.get(35, 0))) if on)
    charsmap = normalizer.get(2, b"")
    trie = strings = b""
    if charsmap:
        size = int.from_bytes(charsmap[:4], "little")
        trie, strings = charsmap[4:4 + size], charsmap[4 + size:]
        if size % 4 or not strings.endswith(b"\0"):
            raise Refused("the model's normalisation table is broken")

    def sized(data):
        return struct.pack("<I", len(data)) + data

    out = [b"SGPTTOK1", struct.pack("<IIII", flags, len(pieces), bos, eos),
           sized(trainer.get(44, " \u2047 ".encode())), sized(trie), sized(strings)]
    for piece, score, kind in pieces:
        out.append(struct.pack("<fBH", score, kind, len(piece)) + piece)
    return b"".join(out)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"convert_tokenizer: {message}. --help lists the options.")


def main():
    parser = Parser(prog="convert_tokenizer", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="sentencepiece model, e.g. tokenizer.model of LLaMA 2")
    parser.add_argument("out", help="tokenizer file to write")
    args = parser.parse_args()
    where = args.model
    try:
        with open(args.model, "rb") as f:
            data = convert(f.read())
        where = args.out
        temporary = Path(args.out + ".tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, args.out)
        finally:
            temporary.unlink(missing_ok=True)
    except Refused as e:
        sys.exit(f"convert_tokenizer: {where}: {e}. Give a sentencepiece BPE model.")
    except OSError as e:
        sys.exit(f"convert_tokenizer: {where}: {e.strerror}. Check the path.")
    except (AttributeError, TypeError, struct.error):
        sys.exit(f"convert_tokenizer: {where}: a field has the wrong type. Give a sentencepiece BPE model.")


if __name__ == "__main__":
    main()
