#!/usr/bin/env python3
"""Tests of ./train_gpt generate and ./train_gpt eval through the command line. Standard library only.

usage: test_generate.py TRAIN_GPT [--bf16] [--filter TEXT]
"""
import argparse
import array
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys

import test_cli
from test_cli import HERE, expect, read_log, write_shard

TEXT = "Ein süßer Käse, 20 € das Stück — „gut“, sagt das 😀. The quick brown fox jumps over the lazy dog.\n"
TOKENIZERS = os.path.join(HERE, "tokenizer")
QUESTIONS_MAGIC = 20261125


def write_questions(path, questions, vocab, wrong={}):
    """questions: (label, context, choices), ids all; wrong: numbers of the header that are not as they should be."""
    body = []
    for label, context, choices in questions:
        body += [len(choices), label, len(context), *map(len, choices), *context, *sum(choices, [])]
    header = [QUESTIONS_MAGIC, 1, len(questions), vocab, len(body)] + [0] * 251
    for number, value in wrong.items():
        header[number] = value
    with open(path, "wb") as f:
        array.array("i", header + body).tofile(f)


class Tests(test_cli.Tests):
    shape = ["--dim", 32, "--layers", 2, "--heads", 2, "--kv-heads", 1, "--multiple-of", 16]

    def train(self, name, *more, steps=20, tokenizer="bytes"):
        """A run's folder, made once."""
        out, data = self.path(name), self.path(name + ".bin")
        if os.path.exists(out):
            return out
        rng = random.Random(1)
        if tokenizer == "bytes":
            documents = [[256, *(TEXT * rng.randint(1, 3)).encode(), 257] for _ in range(60)]
        else:
            documents = [[1, *(rng.randrange(3, 200) for _ in range(rng.randint(5, 80))), 2] for _ in range(60)]
        write_shard(data, sum(documents, []))
        self.run(*self.shape, "--tokenizer", tokenizer, "--seq-len", 48, "--batch-size", 4, "--steps", steps,
                 "--lr", 0.01, "--train-data", data, "--val-data", data, "--val-every", steps, "--val-batches", 5,
                 "--save-every", steps // 2, "--out", out, "--export", out + ".st", *more)
        return out

    def outputs(self, *args, limit=60):
        """stdout as bytes, stderr as text, of a run that must succeed."""
        r = subprocess.run([self.args.train_gpt, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           timeout=limit)
        expect(r.returncode == 0, f"exit {r.returncode}: {r.stderr} ({args})")
        return r.stdout, r.stderr.decode()

    def generate(self, *args):
        return self.outputs("generate", *args)[0]

    def eval(self, *args):
        out, err = self.outputs("eval", *args)
        expect(out.count(b"\n") == 1, f"not one line: {out}")
        return json.loads(out), err

    def help(self):
        for command, own, foreign in (("generate", "--temperature", "--val-data"), ("eval", "--choices", "--top-k")):
            text = self.run(command, "--help")
            expect(f"usage: ./train_gpt {command} " in text and own + " " in text and "--checkpoint " in text,
                   f"{command} --help lacks its options")
            expect(foreign + " " not in text and "--lr " not in text, f"{command} --help shows others' options")
            expect(all(len(line) <= 160 for line in text.splitlines()), "a line of --help is too long")
        expect("generate --help" in self.run("--help") and "--top-p" not in self.run("--help"), "--help of training")

    def greedy(self):
        run = self.train("run")
        ask = ["--prompt", "The q", "--max-tokens", 20]
        first = self.generate("--checkpoint", run, *ask, "--temperature", 0)
        expect(first.startswith(b"The q") and first.endswith(b"\n") and len(first) >= 5 + 20 + 1, f"no text: {first}")
        again = self.generate("--checkpoint", run + "/step_00000020", *ask, "--temperature", 0)
        weights = ["--init-from", run + ".st", *self.shape, "--tokenizer", "bytes", "--seq-len", 48]
        other = self.generate(*weights, *ask, "--temperature", 0)
        expect(first == again, "a run's folder and its newest checkpoint write differently")
        expect(self.args.bf16 or first == other, "exported weights write differently")  # bf16 exports float masters
        with open(self.path("prompt.txt"), "w") as f:
            f.write("The q")
        same = self.generate("--checkpoint", run, "--prompt-file", self.path("prompt.txt"), *ask[2:], "--top-k", 1)
        expect(first == same, "top-k 1 from a file is not the greedy text")
        expect(self.generate("--checkpoint", run, "--max-tokens", 3).endswith(b"\n"), "no text without a prompt")

    def seeds(self):
        run = self.train("run")
        def text(*more):
            return self.generate("--checkpoint", run, "--prompt", "dog", "--max-tokens", 15, "--temperature", 2, *more)
        one = text("--seed", 7)
        expect(one == text("--seed", 7) and one != text("--seed", 8), "the seed does not decide")
        three = text("--seed", 7, "--num-samples", 3).split(b"\n---\n")
        expect(len(three) == 3 and three[0] + b"\n" == one, f"the first of three is not that of one: {three}")
        expect(len(set(three)) == 3 and all(t.startswith(b"dog") for t in three), f"no three texts: {three}")

    def whole_characters(self):
        """Whatever bytes are drawn, what arrives is valid UTF-8 at every moment, and it comes piece by piece."""
        run = self.train("run")
        ask = ["generate", "--checkpoint", run, "--prompt", "Käse 😀", "--top-k", "0", "--temperature", "1.5"]
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart, as no pipe does
        p = subprocess.Popen([self.args.train_gpt, *ask, "--max-tokens", "300", "--seq-len", "400"],
                             stdout=its, stderr=subprocess.DEVNULL)
        its.close()
        pieces = []
        while piece := ours.recv(65536):
            pieces.append(piece)
        ours.close()
        expect(p.wait() == 0 and len(pieces) > 3, f"{len(pieces)} pieces")
        for piece in pieces:
            piece.decode()  # throws on half a character
        text = b"".join(pieces).decode()
        expect(text.startswith("Käse 😀"), f"the prompt is broken: {text[:20]}")
        expect("\ufffd" in text, "nothing was repaired: this tests nothing")

    def context(self):
        run = self.train("run")
        ask = ["generate", "--checkpoint", run, "--prompt", "x" * 39, "--max-tokens", 500, "--temperature", 0]
        expect("text: 9 tokens" in (err := self.outputs(*ask)[1]) and "end of the context of 48" in err, err)
        self.bad(["generate", "--checkpoint", run, "--prompt", "x" * 48], "49 tokens", "48", "--seq-len")
        self.generate("--checkpoint", run, "--prompt", "x" * 48, "--max-tokens", 5, "--seq-len", 60)
        nano = self.train("nano", "--backbone", "nanogpt", "--kv-heads", 2, "--max-seq-len", 52)
        self.generate("--checkpoint", nano, "--prompt", "x" * 46, "--max-tokens", 50, "--seq-len", 52)
        self.bad(["generate", "--checkpoint", nano, "--prompt", "x", "--seq-len", 53], "52")

    def damage(self):
        run = self.path("damaged")
        shutil.copytree(self.train("run"), run)
        ask = ["generate", "--checkpoint", run, "--temperature", 1, "--prompt", "a", "--max-tokens", 30]
        whole = self.outputs(*ask)[0]
        before = self.outputs("generate", "--checkpoint", run + "/step_00000010", *ask[3:])[0]
        expect(whole != before, "both checkpoints write the same: this tests nothing")
        os.remove(run + "/step_00000020/optimizer_rank0.safetensors")
        expect(self.outputs(*ask)[0] == whole, "without the optimizer's state it writes differently")
        path = run + "/step_00000020/model.safetensors"
        with open(path, "r+b") as f:
            f.seek(-100, os.SEEK_END)
            f.write(b"\x55")
        out, err = self.outputs(*ask)
        expect(out == before and err.count("warning") == 1 and path in err, f"not the one before: {err}")
        self.bad(["generate", "--checkpoint", run + "/step_00000020"], path, "damaged", "Give another")
        os.remove(run + "/step_00000010/state.json")
        self.bad(ask, path, "No other checkpoint", "Give another")

    def tokenizer(self):
        """A checkpoint names its tokenizer's file and knows its contents."""
        mine, moved = self.path("tok.bin"), self.path("moved.bin")
        shutil.copy(os.path.join(TOKENIZERS, "tokenizer_llama.bin"), mine)
        run = self.train("bpe", tokenizer=mine)
        ask = ["generate", "--checkpoint", run, "--prompt", "the king", "--max-tokens", 12]
        text = self.outputs(*ask)[0]
        expect(text.decode().startswith("the king"), f"no text: {text}")
        os.rename(mine, moved)
        self.bad(ask, mine, "--tokenizer")
        expect(self.outputs(*ask, "--tokenizer", moved)[0] == text, "the moved tokenizer writes differently")
        report, err = self.eval("--checkpoint", run, "--val-data", run + ".bin")
        expect("bits_per_byte" not in report and "loss" in report and err.count("warning") == 1, f"without one: {err}")
        shutil.copy(os.path.join(TOKENIZERS, "tokenizer_rules.bin"), mine)
        self.bad(ask, mine, "not the tokenizer")
        out, err = self.outputs(*ask, "--tokenizer", mine)  # who gives it has the say
        expect(out and err.count("warning") == 1, f"no warning: {err}")
        with open(run + "/step_00000020/state.json") as f:
            state = json.load(f)
        expect(state["tokenizer"] == os.path.realpath(mine), f"state.json names {state['tokenizer']}")
        # bytes: what the pieces of the targets have, the space before a document's first word not
        report, _ = self.eval("--checkpoint", run, "--val-data", run + ".bin", "--tokenizer", moved, "--batch-size", 7)
        expect(0 < report["bytes"] and abs(report["bits_per_byte"] - report["loss"] * report["tokens"] / math.log(2) /
                                           report["bytes"]) < 1e-6, f"bits per byte: {report}")

    def validation(self):
        run, data = self.train("run"), self.train("run") + ".bin"
        logged = float(read_log(run)[-1]["val_loss"])
        report, err = self.eval("--checkpoint", run, "--val-data", data, "--val-batches", 5, "--batch-size", 4)
        # on a GPU the training has timed its matmuls' algorithms, which may round bf16 differently
        expect(abs(report["loss"] - logged) < (1e-3 if self.args.bf16 else 2e-6) * logged,
               f"loss {report['loss']}, while training {logged}")
        with open(data, "rb") as f:
            tokens = array.array("H", f.read()[1024:])
        windows = [tokens[i * 49:i * 49 + 49] for i in range(len(tokens) // 49)]
        def bytes_of(windows):
            return sum(t < 256 for w in windows for t in w[1:])
        expect(report["tokens"] == 20 * 48 and report["bytes"] == bytes_of(windows[:20]), f"counts: {report}")
        expect(abs(report["perplexity"] - math.exp(report["loss"])) < 1e-5 * report["perplexity"], "perplexity")
        whole, err = self.eval("--checkpoint", run, "--val-data", data)
        expect(whole["tokens"] == len(windows) * 48 and whole["bytes"] == bytes_of(windows), f"counts: {whole}")
        bits = whole["loss"] / math.log(2) * whole["tokens"] / whole["bytes"]
        expect(abs(whole["bits_per_byte"] - bits) < 1e-6, f"bits per byte {whole['bits_per_byte']}, not {bits}")
        expect(f"{whole['loss']:.4f} nats" in err and "bits a byte" in err, f"nothing for people: {err}")
        many, _ = self.eval("--checkpoint", run, "--val-data", data, "--batch-size", 64)
        off = abs(many["loss"] - whole["loss"])
        expect(off < (1e-3 if self.args.bf16 else 2e-6), f"the batch size changes the loss by {off}")

    def choices(self):
        run, path = self.train("run"), self.path("questions.bin")
        right, wrong = list(b" quick brown fox"), list(b" zqxj!!")
        context = [256, *b"The"]
        pairs = [(0, context, [right, wrong]), (1, context, [wrong, right]), (1, context, [right, wrong])]
        write_questions(path, pairs, 258)
        report, err = self.eval("--checkpoint", run, "--choices", path)
        expect(report["questions"] == 3 and "accuracy" in err, f"{report} {err}")
        for batch in (1, 9):
            other = self.eval("--checkpoint", run, "--choices", path, "--batch-size", batch)[0]
            expect(other == report, f"batches of {batch}: {other}, not {report}")
        for key in ("acc_per_token", "acc_per_byte"):  # the model has seen the right ones
            expect(abs(report[key] - 2 / 3) < 1e-6, f"{key} is {report[key]}")
            error = report[key + "_stderr"]
            expect(abs(error - math.sqrt(2 / 9 / 2)) < 1e-6, f"{key}_stderr is {error}")
        # likelihoods as they are favour the short
        write_questions(path, [(0, context, [right, right[:2]])], 258)
        report = self.eval("--checkpoint", run, "--choices", path)[0]
        expect(report["acc"] == 0 and report["acc_stderr"] is None, f"one question: {report}")
        # A head of zeros gives every token -log 258. Bytes: 1 of two tokens, as the space in front is none, and 3 of four.
        tensors, _ = test_cli.read_safetensors(run + ".st")
        tensors["output.weight"] = (*tensors["output.weight"][:2], bytes(len(tensors["output.weight"][2])))
        test_cli.write_safetensors(self.path("flat.st"), tensors)
        write_questions(path, [(1, context, [list(b" a"), [*b"bcd", 257]])] * 3, 258)
        report = self.eval("--init-from", self.path("flat.st"), *self.shape, "--tokenizer", "bytes", "--choices", path,
                           "--val-data", run + ".bin", "--seq-len", 48)[0]
        expect(report["acc"] == 0 and report["acc_per_byte"] == 1, f"by bytes: {report}")
        expect(abs(report["loss"] - math.log(258)) < 1e-6, f"loss of a model that knows nothing: {report['loss']}")
        for number, value, words in ((0, 1, ["no file"]), (3, 300, ["300", "258"]), (2, 2, ["question 2"])):
            write_questions(path, [(0, context, [right, wrong])], 258, {number: value})
            self.bad(["eval", "--checkpoint", run, "--choices", path], path, *words)
        write_questions(path, [(0, context, [right, list(range(49))])], 258)
        self.bad(["eval", "--checkpoint", run, "--choices", path], "49 tokens", "48")
        self.bad(["eval", "--checkpoint", run, "--val-data", run + ".bin", "--batch-size", 2**30], "--batch-size", "Give fewer")

    def one_rank(self):
        env = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        error = self.run("generate", "--checkpoint", self.train("run"), ok=False, env=env)
        expect("one rank" in error, error)

    def refused(self, flags, *words):
        self.train("run")
        self.bad(flags, *words)

    def all(self):
        for body in (self.help, self.greedy, self.seeds, self.whole_characters, self.context, self.damage, self.tokenizer,
                     self.validation, self.choices, self.one_rank):
            self.test(body.__name__, body)
        run = self.path("run")
        generate, evaluate = ["generate", "--checkpoint", run], ["eval", "--checkpoint", run]
        for name, flags, words in (
            ("no weights", ["generate", "--prompt", "a"], ["--checkpoint", "missing"]),
            ("two weights", [*generate, "--init-from", run + ".st"], ["--init-from"]),
            ("no such folder", ["generate", "--checkpoint", self.path("no")], [self.path("no")]),
            ("no tokenizer", ["generate", "--init-from", run + ".st", *self.shape, "--vocab-size", 258], ["--tokenizer"]),
            ("tokenizer too large", [*generate, "--tokenizer", os.path.join(TOKENIZERS, "tokenizer_llama.bin")], ["258"]),
            ("a shape beside a checkpoint", [*generate, "--dim", 64], ["--dim"]),
            ("training's option", [*generate, "--lr", 1], ["--lr", "generate"]),
            ("generate's option", ["--top-k=3"], ["--top-k", "training"]),
            ("eval's option", [*generate, "--val-data", "x"], ["--val-data"]),
            ("two prompts", [*generate, "--prompt", "a", "--prompt-file", "b"], ["--prompt-file"]),
            ("no prompt file", [*generate, "--prompt-file", self.path("no")], [self.path("no")]),
            ("greedy samples", [*generate, "--temperature", 0, "--num-samples", 2], ["--num-samples"]),
            ("top-p 0", [*generate, "--top-p", 0], ["--top-p"]), ("top-p 2", [*generate, "--top-p", 2], ["--top-p"]),
            ("temperature", [*generate, "--temperature", -1], ["--temperature"]),
            ("nothing to evaluate", evaluate, ["--val-data", "--choices"]),
            ("batches of nothing", [*evaluate, "--choices", "x", "--val-batches", 3], ["--val-batches"]),
            ("no data", [*evaluate, "--val-data", self.path("no")], [self.path("no")]),
            ("no questions", [*evaluate, "--choices", self.path("no")], [self.path("no")]),
        ):
            self.test("bad: " + name, self.refused, flags, *words)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_gpt")
    parser.add_argument("--bf16", action="store_true", help="the trainer is a bf16 build")
    return test_cli.run_all("test_generate", Tests, parser)


if __name__ == "__main__":
    sys.exit(main())
