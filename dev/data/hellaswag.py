#!/usr/bin/env python3
"""Multiple-choice examples, tokenized, for `./train_gpt eval --choices FILE`.

    hellaswag.py --tokenizer llama2.model --out data/hellaswag.bin           # HellaSwag's validation, from the web
    hellaswag.py hellaswag_val.jsonl --tokenizer llama2.model --out data/hellaswag.bin
    hellaswag.py ARC-Easy/test.parquet --tokenizer llama2.model --out data/arc_easy.bin
    hellaswag.py llm.c/hellaswag_val.bin --out data/hellaswag.bin            # GPT-2's ids, as llm.c wrote them

A line of JSONL or a row of parquet is an example, told apart by its fields. Texts are those of lm-evaluation-harness,
so that scores compare (acc is its acc, acc_per_byte its acc_norm, which counts characters):
    HellaSwag  activity_label, ctx_a, ctx_b, endings, label: "LABEL: A B", B capitalised, without [brackets]
    ARC        question, choices with text and label, answerKey: "Question: Q\nAnswer:", then the text of a choice
    MMLU       question, choices, answer, perhaps subject: the question with its choices by letter, then a letter
    others     "ctx" or "query", "endings" or "choices" (at least two texts), "label" or "gold" (the right one, from 0)
The file, little-endian int32:
    header, 256   magic 20261125, version 1, number of examples, V, number of int32 behind the header, zeros
    each example  K choices, label, lengths n0 of the context and n1..nK of the choices, then their n0 + ... + nK ids
The context starts with BOS. A choice is what stands behind as many ids as the context has where both are encoded
together with a space between, or " " + choice encoded alone if that is nothing.
"""
import argparse
import itertools
import re
import struct
import sys
from pathlib import Path

from common import Parser, Refused, package, read_whole, run, write_whole

try:
    import numpy as np
except ImportError:
    sys.exit("hellaswag: the package numpy is missing. apt-get install python3-numpy, or pip install numpy.")

import encoders
from corpora import Downloads, Web
from reading import Reader, Rules, Source, local

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
MAGIC, VERSION = 20261125, 1
LLMC = 20240522


def tidy(text):
    """without the traces of WikiHow's pages"""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag(value):
    context = f"{value['activity_label']}: {value['ctx_a']} {value['ctx_b'].capitalize()}"
    return tidy(context), [tidy(ending) for ending in value["endings"]], value["label"]


def arc(value):
    question, choices = value["question"], value["choices"] if "choices" in value else value["question"]["choices"]
    if isinstance(choices, list):  # as its authors have it, a dictionary for each
        question, choices = question["stem"], {key: [c[key] for c in choices] for key in ("text", "label")}
    return f"Question: {question}\nAnswer:", choices["text"], choices["label"].index(value["answerKey"])


def mmlu(value):
    letters, choices, answer = "ABCDEFGHIJ", value["choices"], value["answer"]
    subject = (value.get("subject") or "").replace("_", " ")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices)]
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    label = letters.index(answer) if isinstance(answer, str) and len(answer) == 1 and answer in letters else answer
    return about + "\n".join([value["question"].strip(), *lines, "Answer:"]), list(letters[:len(choices)]), label


def fields(where, value):
    """(context, choices, label) of a line"""
    def field(*names):
        found = [value[n] for n in names if isinstance(value, dict) and n in value]
        if not found:
            raise Refused(f"{where}: no {' or '.join(names)} in it. Give lines as --help describes.")
        return found[0]

    known = next((f for f, names in ((hellaswag, {"activity_label", "ctx_a", "ctx_b", "endings", "label"}),
                                     (arc, {"question", "answerKey"}), (mmlu, {"question", "choices", "answer"}))
                  if isinstance(value, dict) and names <= set(value)), None)
    if known:
        try:
            context, choices, label = known(value)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Refused(f"{where}: not as {known.__name__} is. Give lines as --help describes.") from None
    else:
        context, choices, label = field("ctx", "query"), field("endings", "choices"), field("label", "gold")
    if not isinstance(context, str) or not isinstance(choices, list) or len(choices) < 2 or \
            not all(isinstance(c, str) and c for c in choices):
        raise Refused(f"{where}: not a context and at least two choices of text. Give lines as --help describes.")
    if isinstance(label, bool) or not str(label).isdecimal() or int(label) >= len(choices):
        raise Refused(f"{where}: label {label!r} is none of 0 to {len(choices) - 1}. Give examples with their answers.")
    return context if known else context.rstrip(), choices, int(label)


def record(label, parts):
    """parts: ids of the context and of each choice"""
    return np.array([len(parts) - 1, label, *map(len, parts), *itertools.chain(*parts)], "<i4")


def example(encoder, where, value):
    context, choices, label = fields(where, value)

    def ids(text):
        try:
            return list(encoder.ids(where, text.encode()))
        except UnicodeEncodeError:  # half of a surrogate pair
            raise Refused(f"{where}: not valid JSON in UTF-8. Repair or remove the line.") from None

    prompt = ids(context.rstrip())  # spaces at its end belong to the choice
    return record(label, [[encoder.bos, *prompt],
                          *(ids(f"{context} {choice}")[len(prompt):] or ids(" " + choice) for choice in choices)])


def parquet(source):
    """(where, row) of a file of parquet"""
    pq, pa = package("pyarrow.parquet", source.name), package("pyarrow", source.name)
    row = 0
    try:
        with pq.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for value in batch.to_pylist():
                    row += 1
                    yield f"{source.name}: row {row}", value
    except (pa.ArrowException, OSError) as e:
        what = " ".join(str(e).split())[:120]
        raise Refused(f"{source.name}: row {row + 1}: damaged or cut short ({what}). Fetch the file again.") from None


def llmc(source):
    """examples of a file of llm.c's: 256 int32 of header (magic, version 1, their number), then uint16: 65535, its
    bytes, its number, label, K, and for the context and each choice a length and the ids"""
    data = read_whole(source.path, "Fetch it again.")
    header, numbers = np.frombuffer(data[:1024], "<i4"), np.frombuffer(data[1024:len(data) // 2 * 2], "<u2").tolist()
    examples, at = [], 0
    for i in range(int(header[2]) if len(header) == 256 and header[1] == 1 else 0):
        begin, size, _, label, K = numbers[at:at + 5] if at + 5 <= len(numbers) else (0,) * 5
        first, parts, at = at, [], at + 5
        for _ in range(K + 1):
            n = numbers[at] if at < len(numbers) else 0
            parts.append(numbers[at + 1:at + 1 + n])
            at += 1 + n
        if begin != 65535 or size != 2 * (at - first) or at > len(numbers) or K < 2 or label >= K or not all(parts):
            raise Refused(f"{source.name}: example {i + 1} is damaged or cut short. Fetch the file again.")
        examples.append(record(label, parts))
    if at < len(numbers):
        raise Refused(f"{source.name}: its header does not promise all that it holds. Fetch the file again.")
    return examples


def main():
    parser = Parser(prog="hellaswag", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", metavar="INPUT",
                        help="JSONL, parquet or llm.c's file (HellaSwag's JSONL, from the web)")
    encoders.add_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    args = parser.parse_args()
    out, downloads = Path(args.out), None
    if args.limit is not None and args.limit < 1:
        raise Refused(f"--limit: {args.limit} is out of range. Give at least 1.")
    if args.input and not Path(args.input).is_file():
        raise Refused(f"{args.input}: is a folder or a pipe. Give a file." if Path(args.input).exists() else
                      f"{args.input}: there is no such file. Check the path.")
    encoder = encoders.load(*encoders.from_options(args))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.input:
            source = local(Path(args.input))
        else:
            downloads = Downloads(Web("HellaSwag", "give them by name"), out.with_name(out.name + "_download"),
                                  [Source(URL.split("/")[-1], 0, url=URL)])
            source = downloads.get(0)
        with open(source.path, "rb") as f:
            magic = f.read(4)
        V, name = encoder.V, encoder.name
        if magic == struct.pack("<i", LLMC):
            examples, name = llmc(source)[:args.limit], "GPT-2's, as llm.c wrote it"
            V = max([50257, *(1 + int(e[2 + e[0] + 1:].max()) for e in examples)])
        else:
            reader = Reader(source, Rules("jsonl"))
            rows = parquet(source) if magic == b"PAR1" else reader.opened(reader.values)
            examples = [example(encoder, where, value) for where, value in itertools.islice(rows, args.limit)]
    finally:
        if downloads:
            downloads.end(keep=False)
    if not examples:
        raise Refused(f"{source.name}: no example is in it. Give another file.")
    header = np.zeros(256, "<i4")
    header[:5] = MAGIC, VERSION, len(examples), V, sum(map(len, examples))
    write_whole(out, [header.tobytes(), *(e.tobytes() for e in examples)])
    print(f"{out}: {len(examples):,} examples, {header[4]:,} int32, tokenizer {name}")
    return 0


if __name__ == "__main__":
    sys.exit(run("hellaswag", main))
