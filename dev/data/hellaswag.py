#!/usr/bin/env python3
"""Multiple-choice examples, tokenized, for `./train_gpt eval --choices FILE`.

    hellaswag.py --tokenizer llama2.model --out data/hellaswag.bin           # HellaSwag's validation, from the web
    hellaswag.py hellaswag_val.jsonl --tokenizer llama2.model --out data/hellaswag.bin
    hellaswag.py mine.jsonl.gz --out data/mine.bin

A line of the JSONL is an example: "ctx" or "query", "endings" or "choices" (at least two texts), "label" or "gold"
(which of them is right, from 0). The file, little-endian int32:
    header, 256   magic 20261125, version 1, number of examples, V, number of int32 behind the header, zeros
    each example  K choices, label, lengths n0 of the context and n1..nK of the choices, then their n0 + ... + nK ids
The context starts with BOS. A choice is what follows the context's ids where both are encoded together with a space
between; where the tokens do not part there, it is " " + choice encoded alone.
"""
import argparse
import itertools
import sys
from pathlib import Path

from common import Parser, Refused, run, write_whole

try:
    import numpy as np
except ImportError:
    sys.exit("hellaswag: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")

import encoders
from corpora import Downloads, Web
from reading import Reader, Rules, Source, local

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
MAGIC, VERSION = 20261125, 1


def fields(where, value):
    """(context, choices, label) of a line"""
    def field(*names):
        found = [value[n] for n in names if isinstance(value, dict) and n in value]
        if not found:
            raise Refused(f"{where}: no {' or '.join(names)} in it. Give lines as --help describes.")
        return found[0]

    context, choices, label = field("ctx", "query"), field("endings", "choices"), field("label", "gold")
    if not isinstance(context, str) or not isinstance(choices, list) or len(choices) < 2 or \
            not all(isinstance(c, str) and c for c in choices):
        raise Refused(f"{where}: not a context and at least two choices of text. Give lines as --help describes.")
    if isinstance(label, bool) or not str(label).isdecimal() or int(label) >= len(choices):
        raise Refused(f"{where}: label {label!r} is none of 0 to {len(choices) - 1}. Give examples with their answers.")
    return context.rstrip(), choices, int(label)


def example(encoder, where, value):
    context, choices, label = fields(where, value)

    def ids(text):
        try:
            return list(encoder.ids(where, text.encode()))
        except UnicodeEncodeError:  # half of a surrogate pair
            raise Refused(f"{where}: not valid JSON in UTF-8. Repair or remove the line.") from None

    prompt = ids(context)
    parts = [[encoder.bos, *prompt]]
    for choice in choices:
        both = ids(f"{context} {choice}")
        parts.append(both[len(prompt):] if both[:len(prompt)] == prompt else ids(" " + choice))
    return np.array([len(choices), label, *map(len, parts), *itertools.chain(*parts)], "<i4")


def main():
    parser = Parser(prog="hellaswag", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", metavar="INPUT.jsonl", help="also .gz or .zst (HellaSwag's, from the web)")
    encoders.add_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    args = parser.parse_args()
    out, downloads = Path(args.out), None
    if args.limit is not None and args.limit < 1:
        raise Refused(f"--limit: {args.limit} is out of range. Give at least 1.")
    if args.input and not Path(args.input).is_file():
        raise Refused(f"{args.input}: there is no such file. Check the path.")
    encoder = encoders.load(*encoders.from_options(args))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.input:
            source = local(Path(args.input))
        else:
            downloads = Downloads(Web("HellaSwag", "give them by name"), out.with_name(out.name + "_download"),
                                  [Source(URL.split("/")[-1], 0, url=URL)])
            source = downloads.get(0)
        reader = Reader(source, Rules("jsonl"))
        examples = [example(encoder, where, value)
                    for where, value in itertools.islice(reader.opened(reader.values), args.limit)]
    finally:
        if downloads:
            downloads.end(keep=False)
    if not examples:
        raise Refused(f"{source.name}: no example is in it. Give another file.")
    header = np.zeros(256, "<i4")
    header[:5] = MAGIC, VERSION, len(examples), encoder.V, sum(map(len, examples))
    write_whole(out, [header.tobytes(), *(e.tobytes() for e in examples)])
    print(f"{out}: {len(examples):,} examples, {header[4]:,} int32, tokenizer {encoder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run("hellaswag", main))
