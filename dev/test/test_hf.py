#!/usr/bin/env python3
"""Tests of dev/hf: to Hugging Face's folders and back, beside golden files and ./train_gpt. Needs numpy.

usage: test_hf.py TRAIN_GPT GOLDEN_DIR [--filter TEXT] [--verbose]

What needs torch and transformers (all comparisons of logits) is left out with a line where they are missing.
"""
import argparse
import base64
import collections
import contextlib
import errno
import importlib.util
import inspect
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import types
import unicodedata
import unittest
import unittest.mock
import zipfile
from pathlib import Path

import numpy as np

import lines
import test_convert_tokenizer
from test_cli import (golden_model, golden_run, read_log, read_safetensors, same_matmuls, values, write_safetensors,
                      write_shard)

ROOT = Path(__file__).resolve().parents[2]
HF = ROOT / "dev" / "hf"
sys.dont_write_bytecode = True
sys.path += [str(HF), str(ROOT / "dev" / "reference")]
import tokenizer_json  # noqa: E402  of dev/hf, as weights
import weights  # noqa: E402
import encoders  # noqa: E402  of dev/data

try:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from model import Config, Model  # dev/reference/model.py
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
except ImportError as e:
    torch, missing = None, e.name

ARGS = argparse.Namespace()
LIMIT = 1e-4      # of logits: design of the golden files
LOSS_LIMIT = 5e-5


def load(name):
    spec = importlib.util.spec_from_file_location(f"hf_{name}", HF / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_numpy(tensor):
    dtype, shape, data = tensor
    return np.frombuffer(data, {**weights.RAW, "F64": np.float64, "I32": np.int32}[dtype]).reshape(shape)


def as_tensors(arrays):
    return {name: ("F32", list(a.shape), np.ascontiguousarray(a, np.float32).tobytes()) for name, a in arrays.items()}


def longs(tokens):
    return tokens if torch.is_tensor(tokens) else torch.as_tensor(np.array(tokens, np.int64))


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.dir = Path(scratch.name)

    def tool(self, name, *args):
        """runs a script of dev/hf in this process; what it printed"""
        argv, sys.argv = sys.argv, [name, *map(str, args)]
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                weights.run(name, load(name).main)
        finally:
            sys.argv = argv
        return out.getvalue()

    def refused(self, name, *args, words):
        there = sorted(self.dir.rglob("*"))
        with self.assertRaises(SystemExit) as e:
            self.tool(name, *args)
        message = str(e.exception.code)
        self.assertTrue(message.startswith(name + ": ") and "\n" not in message and words in message, message)
        self.assertEqual(sorted(self.dir.rglob("*")), there, "it left something behind")

    def train(self, *flags):
        r = subprocess.run([ARGS.train_gpt, *map(str, flags)], capture_output=True, text=True)
        self.assertEqual((r.returncode, r.stderr), (0, ""))
        return r.stdout

    def golden(self, name):
        """tensors, configuration, recipe, and the start weights as ./train_gpt exports them"""
        tensors, metadata = read_safetensors(Path(ARGS.golden, name + ".safetensors"))
        c, o = json.loads(metadata["config"]), json.loads(metadata["optimizer"])
        raw, path = self.dir / "raw.st", self.dir / f"{name}.safetensors"
        write_safetensors(raw, {n[6:]: t for n, t in tensors.items() if n.startswith("param/")})
        self.train(*golden_model(c), "--seq-len", o["T"], "--init-from", raw, "--export", path, "--steps", 0, "--out",
                   self.dir / "run")
        return tensors, c, o, path

    def each_golden(self, body):
        for file in sorted(Path(ARGS.golden).glob("*.safetensors")):
            with self.subTest(file.stem):
                body(file.stem)

    def same(self, path, other):
        a, b = (read_safetensors(p)[0] for p in (path, other))
        self.assertEqual(a.keys(), b.keys())
        self.assertEqual([name for name in a if a[name] != b[name]], [], "tensors differ")


    def same_model(self, path, other):
        """the descriptions too, but for the length of sequences, of which a folder knows the largest only"""
        a, b = (weights.description(json.loads(read_safetensors(p)[1]["config"]), p, "") for p in (path, other))
        self.assertEqual({**a, "seq_len": 0}, {**b, "seq_len": 0})


class Convert(Case):
    def test_round_trips(self):
        """official names, Hugging Face's, official names: the same bits, in both dtypes, in one file and in several"""
        families = set()
        def body(name):
            _, c, o, path = self.golden(name)
            half, folder, back = self.dir / "half.st", self.dir / "hf", self.dir / "back.safetensors"
            self.train(*golden_model(c), "--seq-len", o["T"], "--init-from", path, "--export", half, "--export-dtype",
                       "bf16", "--steps", 0, "--out", self.dir / "run")
            for source, flags, want in ((path, [], path), (half, ["--shard-size", 20000], half),
                                        (path, ["--dtype", "bf16", "--shard-size", 5000], half)):
                shutil.rmtree(folder, ignore_errors=True)
                self.tool("export", source, folder, *flags)
                printed = self.tool("import", folder, back)
                self.same(want, back)
                config = json.loads((folder / "config.json").read_text())
                self.assertEqual(config["torch_dtype"], "float32" if want == path else "bfloat16")
                families.add(config["architectures"][0])
                several = "--shard-size" in flags
                self.assertEqual((folder / "model.safetensors.index.json").exists(), several)
                # the flags that it prints are those of this model
                self.train(*printed.split()[1:], "--export", self.dir / "again.st", "--steps", 0, "--out",
                           self.dir / "run")
                if want == path:
                    self.same(path, self.dir / "again.st")
            self.same_model(path, self.dir / "again.st")
        self.each_golden(body)
        self.assertEqual(families, {"LlamaForCausalLM", "GPT2LMHeadModel", "SimpleGPTForCausalLM"})

    def test_training_goes_on(self):
        """a run from weights that went through Hugging Face's folder has the bits of one from those that did not, and
        the golden file's losses"""
        for name in ("prenorm_hs128", "nanogpt_prenorm", "nanogpt_simplegpt", "simplegpt_gqa_hs32", "preqknorm_gqa"):
            with self.subTest(name):
                tensors, c, o, path = self.golden(name)
                self.tool("export", path, self.dir / name)
                printed = self.tool("import", self.dir / name, self.dir / "back.safetensors").split()[1:]
                shard, ends = self.dir / "tokens.bin", []
                write_shard(shard, values(tensors["tokens"]))
                for flags in ([*golden_model(c), "--init-from", path], printed):
                    out, end = self.dir / f"run{len(ends)}", self.dir / f"end{len(ends)}.st"
                    shutil.rmtree(out, ignore_errors=True)
                    if ends:
                        same_matmuls(self.dir / "run0", out)
                    self.train(*flags, *golden_run(o), "--train-data", shard, "--export", end, "--out", out)
                    ends.append(read_safetensors(end)[0])
                    losses = [float(row["loss"]) for row in read_log(out)]
                    np.testing.assert_allclose(losses, values(tensors["loss"]), rtol=0, atol=LOSS_LIMIT)
                self.assertEqual(ends[0], ends[1])

    def test_rotary(self):
        """scores of q and k turned in adjacent pairs by ours, and in halves by Llama's, from the permuted weights"""
        random = np.random.default_rng(1)
        for hs in (8, 16, 64, 72, 128, 256):
            c = dict(dim=4 * hs, heads=4, kv_heads=2, hidden=8, vocab_size=3, layers=1)
            rows = {row.ours[0]: row for row in weights.llama_rows(c)}
            x = random.normal(size=(5, 4 * hs))
            angle = np.arange(5)[:, None, None] * 1e4 ** (-np.arange(0, hs, 2) / hs)
            heads = {}
            for key in ("q", "k"):
                row = rows[f"layers.0.attention.w{key}.weight"]
                w = random.normal(size=row.shape)
                theirs = row.theirs([w], np.float64)
                self.assertTrue(np.array_equal(row.our(theirs)[0], w) and not np.array_equal(theirs, w))
                a, b = np.moveaxis((x @ w.T).reshape(5, -1, hs // 2, 2), -1, 0)
                c_, d = np.moveaxis((x @ theirs.T).reshape(5, -1, 2, hs // 2), 2, 0)
                turned = [
                    np.concatenate((u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)), -1)
                    for u, v in ((a, b), (c_, d))
                ]
                heads[key] = turned
            ours, theirs = (np.einsum("thi,shi->hts", heads["q"][i], heads["k"][i].repeat(2, 1)) for i in (0, 1))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(ours).max())

    def test_rounding(self):
        """to bf16 as the trainer's bf16 export: nearest, ties to even, infinity, NaN"""
        bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x80008000, 0x7F7FFFFF, 0xFF800000, 0x7FFFFFFF,
                         0xFF800001], np.uint32)
        want = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x8000, 0x7F80, 0xFF80, 0x7FFF, 0x7FFF], np.uint16)
        self.assertEqual(weights.convert(bits.view(np.float32), "F32", "BF16").tolist(), want.tolist())
        every = np.arange(65536, dtype=np.uint16)
        wide = weights.convert(every, "BF16", "F32")
        numbers = ~np.isnan(wide)
        self.assertTrue(np.array_equal(weights.convert(wide, "F32", "BF16")[numbers], every[numbers]))
        self.assertTrue(np.array_equal(weights.convert(every.view(np.float16), "F16", "F32")[:31744],
                                       every.view(np.float16)[:31744].astype(np.float32)))
        self.assertEqual(weights.convert(np.float32([1, -0.5]), "F32", "F16").tolist(), [1, -0.5])

    def test_checkpoint(self):
        """a checkpoint's folder, in one file and as several ranks write it, is what --export writes"""
        _, c, o, path = self.golden("simplegpt_hs16")
        write_shard(self.dir / "tokens.bin", list(range(61)) * 40)
        self.train(*golden_model(c), *golden_run(o), "--train-data", self.dir / "tokens.bin", "--init-from", path,
                   "--out", self.dir / "steps", "--save-every", 6, "--export", self.dir / "end.st")
        checkpoint = self.dir / "steps" / "step_00000006"
        for several in (False, True):
            if several:
                tensors = [(n, t[0], tuple(t[1]), lambda t=t: as_numpy(t))
                           for n, t in read_safetensors(checkpoint / "model.safetensors")[0].items()]
                os.remove(checkpoint / "model.safetensors")
                weights.write_weights(checkpoint / "model.safetensors", tensors, {}, 10000)
                state = json.loads((checkpoint / "state.json").read_text())
                state["files"] = {p.name: {"bytes": p.stat().st_size} for p in checkpoint.glob("model*")}
                (checkpoint / "state.json").write_text(json.dumps(state))
            self.tool("export", checkpoint, self.dir / f"hf{several}")
            self.tool("import", self.dir / f"hf{several}", self.dir / "back.safetensors")
            self.same(self.dir / "end.st", self.dir / "back.safetensors")

    def test_run(self):
        """a run's folder: its newest checkpoint, or the one before with a warning where that is damaged"""
        _, c, o, path = self.golden("simplegpt_hs16")
        write_shard(self.dir / "tokens.bin", list(range(61)) * 40)
        run = self.dir / "steps"
        self.train(*golden_model(c), *golden_run(o), "--train-data", self.dir / "tokens.bin", "--init-from", path,
                   "--out", run, "--save-every", 3)
        steps = sorted(run.glob("step_*"))
        (run / "step_old").mkdir()
        self.assertEqual(len(steps), 2)

        def exported(want, warning):
            shutil.rmtree(self.dir / "hf", ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.tool("export", run, self.dir / "hf")
            said = said.getvalue()
            self.assertTrue(warning in said and said.count("\n") == bool(warning), said)
            self.tool("import", self.dir / "hf", self.dir / "back.safetensors")
            self.same(want / "model.safetensors", self.dir / "back.safetensors")
        exported(steps[1], "")
        model, state = steps[1] / "model.safetensors", steps[1] / "state.json"
        whole, words = model.read_bytes(), state.read_text()
        for broken in (whole[:-4], whole + b"1234", whole[:90], b""):
            model.write_bytes(broken)
            exported(steps[0], "model.safetensors: ")
        model.write_bytes(whole)
        for broken in (words[:90], "[]", "{}", words.replace("simplegpt", "gpt")):
            state.write_text(broken)
            exported(steps[0], "step_00000006")
        model.unlink()
        exported(steps[0], "step_00000006")
        (steps[0] / "state.json").write_text("")
        self.refused("export", run, self.dir / "hf2", words="No other checkpoint in")

    def as_arrays(self, path):
        return {name: as_numpy(t).copy() for name, t in read_safetensors(path)[0].items()}

    def test_torch_files(self):
        """files of torch.save without torch: the paper's code's with all that may lie beside, nanoGPT's, a folder's"""
        file, out = self.dir / "a.pt", self.dir / "out.safetensors"
        _, c, o, path = self.golden("simplegpt_gqa_hs32")
        state = self.as_arrays(path)
        flags = ["--heads", c["n_heads"], "--seq-len", o["T"], "--rope-theta", c["rope_theta"]]
        flat = np.concatenate([a.reshape(-1) for a in state.values()])  # as FSDP holds them
        ends = np.cumsum([a.size for a in state.values()])
        views = {name: flat[end - a.size:end].reshape(a.shape) for (name, a), end in zip(state.items(), ends)}
        turned = {name: np.asfortranarray(a) for name, a in state.items()}
        beside = {"optimizer": {"state": {0: {"step": np.zeros(()), "exp_avg": np.ones(3)}}, "lr": 1e-3},
                  "args": argparse.Namespace(dim=3, path=Path("x")), "rng": np.arange(9), "more": [{1, 2}, None, 1j],
                  "evil": Caller(self.dir / "made")}
        for tree in (state, {"model": views, **beside}, {"state_dict": {"module." + n: a for n, a in turned.items()}}):
            torch_save(file, tree)
            self.tool("from_torch", file, out, *flags)
            self.same(path, out)
        self.assertFalse((self.dir / "made").exists())
        whole = file.read_bytes()
        at = whole.index(state["output.weight"].T.tobytes()[:64])
        for broken in (whole[:at] + b"\1" + whole[at + 1:], whole[:-9], b"", b"PK\3\4" + bytes(99), b"no checkpoint"):
            file.write_bytes(broken)
            self.refused("from_torch", file, self.dir / "b.st", *flags, words="a.pt: ")
        file.write_bytes(pickle.dumps(0x1950a86a20f9469cfc6c, 2))
        self.refused("from_torch", file, self.dir / "b.st", *flags, words="from before 1.6")
        itself = {}
        itself["model"] = itself
        for words, tree in (("holds no state_dict", [1]), ("no tok_embeddings", itself),
                            ("no tok_embeddings", {"a": state["norm.weight"]}),
                            ("is Double", {n: a.astype("f8") for n, a in state.items()}),
                            ("norm.weight is (32,) there", {**state, "norm.weight": state["norm.weight"][::2]})):
            torch_save(file, tree)
            self.refused("from_torch", file, self.dir / "b.st", *flags, words=words)
        torch_save(file, state)
        self.refused("from_torch", file, self.dir / "b.st", words="--heads: is missing")
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(self.dir / "short.pt", "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, data[:-4] if "/data/" in name else data)
        self.refused("from_torch", self.dir / "short.pt", self.dir / "b.st", *flags, words="are not whole")

    def test_nanogpt_files(self):
        """nanoGPT's ckpt.pt; its biases are refused by name"""
        file, out = self.dir / "ckpt.pt", self.dir / "out.safetensors"
        _, c, o, path = self.golden("nanogpt_prenorm")
        state, words = self.as_arrays(path), json.loads(read_safetensors(path)[1]["config"])
        rows = weights.gpt2_rows(weights.description(words, path, ""), True)
        theirs = {row.name: np.ascontiguousarray(row.theirs([state[our] for our in row.ours], None)) for row in rows}
        dim = c["dim"]
        shapes = [theirs[f"transformer.h.0.{n}.weight"].shape for n in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")]
        self.assertEqual(shapes, [(3 * dim, dim), (4 * dim, dim), (dim, 4 * dim)])
        theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
        theirs["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), np.float32))
        saved = {"model": {"_orig_mod." + name: a for name, a in theirs.items()}, "iter_num": 5,
                 "config": {"bias": False}, "model_args": {"n_layer": c["n_layers"], "n_head": c["n_heads"]},
                 "best_val_loss": np.zeros((), np.float32), "optimizer": {"state": {0: {"exp_avg": np.ones(3)}}}}
        torch_save(file, saved)
        printed = self.tool("from_torch", file, out)
        self.same(path, out)
        self.train(*printed.split()[1:], "--export", self.dir / "again.st", "--steps", 0, "--out", self.dir / "run")
        self.same(path, self.dir / "again.st")
        torch_save(file, theirs)
        self.tool("from_torch", file, out, "--heads", c["n_heads"])
        self.same(path, out)
        torch_save(file, {**theirs, "transformer.h.0.attn.c_attn.bias": np.zeros(3 * dim, np.float32)})
        self.refused("from_torch", file, self.dir / "b.st", "--heads", c["n_heads"],
                     words="holds h.0.attn.c_attn.bias. GPT-2 has biases")

    def test_bin_folders(self):
        """pytorch_model.bin, in one file and in several; a tied head; Mistral's window"""
        _, _, _, path = self.golden("prenorm_hs128")
        folder, out = self.dir / "hf", self.dir / "out.safetensors"
        self.tool("export", path, folder)
        state, config = self.as_arrays(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        (folder / "model.safetensors").unlink()
        self.refused("import", folder, out, words="holds neither model.safetensors nor")
        torch_save(folder / "pytorch_model.bin", state)
        self.tool("import", folder, out)
        self.same(path, out)
        (folder / "pytorch_model.bin").unlink()
        names = sorted(state)
        for i in (0, 1):
            torch_save(folder / f"pytorch_model-{i}.bin", {n: state[n] for n in names[i::2]})
        index = {"weight_map": {n: f"pytorch_model-{i}.bin" for i in (0, 1) for n in names[i::2]}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        self.tool("import", folder, out)
        self.same(path, out)

        def changed(**change):
            (folder / "config.json").write_text(json.dumps({**config, **change}))
            with contextlib.redirect_stderr(io.StringIO()) as said:
                printed = self.tool("import", folder, out)
            return printed, said.getvalue(), read_safetensors(out)[0]
        _, said, tensors = changed(tie_word_embeddings=True)
        self.assertEqual(tensors["output.weight"], tensors["tok_embeddings.weight"])
        self.assertTrue(said.count("\n") == 1 and "tied to the embedding" in said, said)
        for window, length, told in ((None, 4096, ""), (5, 5, "--seq-len is 5"), (5000, 4096, "")):
            printed, said, _ = changed(model_type="mistral", sliding_window=window, max_position_embeddings=4096)
            self.assertTrue(f"--seq-len {length} " in printed and told in said and bool(told) == bool(said), said)
        scaling = {"rope_type": "llama3", "factor": 7.9, "low_freq_factor": 1, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}
        printed, said, _ = changed(rope_scaling=scaling)
        self.assertTrue("--rope-scaling 7.9000001,1,4,8192" in printed and not said, printed)
        self.train(*printed.split()[1:], "--seq-len", 9, "--steps", 0, "--export", self.dir / "end.st", "--out",
                   self.dir / "run")
        self.tool("export", self.dir / "end.st", self.dir / "again")
        self.assertEqual(json.loads((self.dir / "again" / "config.json").read_text())["rope_scaling"], scaling)

    def test_unsynced_folders(self):
        """on a file system that cannot sync a folder (FUSE, NFS) all is written, with one warning"""
        _, _, _, path = self.golden("simplegpt_hs16")
        sync = os.fsync

        def fsync(fd):
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(error, os.strerror(error))
            sync(fd)
        for error in (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO):
            folder, back = self.dir / f"hf{error}", self.dir / "back.safetensors"
            with unittest.mock.patch("os.fsync", fsync), contextlib.redirect_stderr(io.StringIO()) as said:
                if error == errno.EIO:
                    self.refused("export", path, folder, words="Input/output error")
                    continue
                self.tool("export", path, folder)
                self.tool("import", folder, back)
            told = [line for line in said.getvalue().splitlines() if "cannot sync a folder" in line]
            self.assertTrue(len(told) == len(said.getvalue().splitlines()) == 2, told)  # one a folder
            self.same(path, back)

    def test_hidden_flags(self):
        for dim, hidden in ((4096, 11008), (4096, 14336), (8192, 28672), (2048, 5632), (3200, 8640), (64, 8),
                            (64, 1000)):
            multiple, factor = weights.hidden_flags(dim, hidden)
            got = -(-int(np.float64(np.float32(factor)) * (2 * 4 * dim // 3)) // multiple) * multiple
            self.assertEqual(got, hidden)

    def tokenizer(self, *what, name="simplegpt_hs64", words=None):
        path = self.golden(name)[3]
        if words:
            self.refused("export", path, self.dir / "bad", "--tokenizer", *what, words=words)
            return None
        shutil.rmtree(self.dir / "hf", ignore_errors=True)
        self.tool("export", path, self.dir / "hf", "--tokenizer", *what)
        ids = json.loads((self.dir / "hf" / "generation_config.json").read_text())
        config = json.loads((self.dir / "hf" / "config.json").read_text())
        self.assertEqual(ids, {k: config[k] for k in ("bos_token_id", "eos_token_id") if config[k] is not None})
        return config["bos_token_id"], config["eos_token_id"]

    def test_tokenizers(self):
        self.tokenizer("bytes", words="258 tokens")
        fast = {"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}],
                "model": {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}}}
        file = self.dir / "tokenizer.json"
        file.write_text(json.dumps(fast))
        named = self.dir / "tokenizer"
        for kind in (file, shutil.copy(file, named)):  # by what is in it
            self.assertEqual(self.tokenizer(kind), (1, 2))
        named.unlink()
        self.assertEqual((self.dir / "hf" / "tokenizer.json").read_text(), file.read_text())
        self.assertEqual(json.loads((self.dir / "hf" / "tokenizer_config.json").read_text())["eos_token"], "</s>")
        folder = self.dir / "tokenizer"
        folder.mkdir()
        self.tokenizer(folder, words="no tokenizer.json")
        shutil.copy(file, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "a"}, "eos_token": "<s>"}))
        self.assertEqual(self.tokenizer(folder), (3, 1))
        piece = test_convert_tokenizer.SentencePiece("test_fields")
        model = self.dir / "a.model"
        # control pieces are not merged
        texts = enumerate((b"ab", b"a", b"b", b"<", b"s>", b"ba"), 1)
        model.write_bytes(piece.model(pieces=[((1, text), (2, -float(score))) for score, text in texts]))
        self.assertEqual(self.tokenizer(model), (1, 2))
        self.assertEqual((self.dir / "hf" / "tokenizer.model").read_bytes(), model.read_bytes())
        written = json.loads((self.dir / "hf" / "tokenizer.json").read_text())
        self.assertEqual(list(written["model"]["vocab"]), ["<unk>", "<s>", "</s>", "ab", "a", "b", "<", "s>", "ba"])
        self.assertEqual((written["model"]["merges"], written["model"]["byte_fallback"]), (["a b", "b a"], False))
        kept = json.loads((self.dir / "hf" / "tokenizer_config.json").read_text())
        self.assertEqual([kept[key] for key in ("tokenizer_class", "bos_token", "eos_token", "unk_token")],
                         ["PreTrainedTokenizerFast", "<s>", "</s>", "<unk>"])
        for words, broken in (("space as a suffix", piece.model(trainer=((3, 2), (24, 1)))),
                              ("unused pieces", piece.model(pieces=[((1, b"a"), (3, 5))])),
                              ("spaces that stay", piece.model(normalizer=((5, 0),))),
                              ("user-defined pieces", piece.model(pieces=[((1, b"a"), (3, 4))]))):
            model.write_bytes(broken)
            self.tokenizer(model, words=words)
        ranks = self.dir / "ranks"
        ranks.write_bytes(rank_lines([bytes([b]) for b in range(256)] + [b"ab", b"abab"]))
        self.tokenizer(ranks, words="--preset must say")
        model.write_bytes(piece.model(trainer=((3, 1),)))
        self.tokenizer(model, words="a.model: the model is not of type BPE")
        self.tokenizer(self.dir / "none.model", words="none.model: No such file")
        file.write_text("{}")
        self.tokenizer(file, words="not a tokenizer.json")
        file.write_text("{")
        self.tokenizer(file, words="not valid JSON")


    def test_merges(self):
        """all pairs that give a piece, the best piece first; of one piece, the pair that lies further to the left"""
        ranks = [bytes([b]) for b in range(256)] + [b"ab", b"ba", b"aba", b"abab"]
        (self.dir / "ranks").write_bytes(rank_lines(ranks))
        out, names, ids, size = tokenizer_json.of_file("ranks", (self.dir / "ranks").read_bytes(), "llama3")
        self.assertEqual(out["model"]["merges"], ["a b", "b a", "ab a", "a ba", "ab ab", "aba b"])
        self.assertEqual((names[:2], ids, size), (tokenizer_json.SPECIAL[False], (260, 261), 516))
        names, ids, size = tokenizer_json.of_file("ranks", (self.dir / "ranks").read_bytes(), "gpt2")[1:]
        self.assertEqual((names[:2], ids, size), (tokenizer_json.SPECIAL[True], (260, 260), 261))


class Refusals(Case):
    def test_export(self):
        path, out = self.golden("prenorm_hs128")[3], self.dir / "hf"
        tensors, metadata = read_safetensors(path)
        bad = self.dir / "bad.st"
        out.mkdir()
        self.refused("export", path, out, words="exists already")
        out.rmdir()

        def written(change, words, also=None):
            edited, more = dict(tensors), dict(metadata)
            change(edited, more)
            write_safetensors(bad, edited, more)
            self.refused("export", bad, out, words=words)
        written(lambda t, m: m.pop("config"), "description of the model")
        written(lambda t, m: m.update(config="{"), "description of the model")
        written(lambda t, m: m.update(config=m["config"].replace("prenorm", "postnorm")), "description of the model")
        written(lambda t, m: m.update(config=m["config"].replace("{", '{"rope_scale": "2", ', 1)), "has rope_scale")
        for scaling in ("2", "8,4,1,32", "a,1,4,32", "8,1,4,32.5"):
            written(lambda t, m: m.update(config=m["config"].replace("{", f'{{"rope_scaling": "{scaling}", ', 1)),
                    "description of the model")
        written(lambda t, m: m.update(config=m["config"].replace('"heads": "1"', '"heads": "3"')),
                "description of the model")
        written(lambda t, m: t.pop("norm.weight"), "lacks the tensor norm.weight")
        written(lambda t, m: t.update(more=("F32", [1], bytes(4))), "holds more")
        written(lambda t, m: t.update({"norm.weight": ("I32", [128], bytes(512))}), "norm.weight is I32")
        written(lambda t, m: t.update({"norm.weight": ("F32", [64], bytes(256))}), "norm.weight is (64,)")
        whole = path.read_bytes()
        for cut in (b"", whole[:7], whole[:100], whole[:-4], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
            bad.write_bytes(cut)
            self.refused("export", bad, out, words="bad.st")
        self.refused("export", self.dir / "none.st", out, words="none.st: No such file")
        (self.dir / "empty").mkdir()
        self.refused("export", self.dir / "empty", out, words="neither model.safetensors nor")
        self.refused("export", path, out, "--dtype", "fp16", words="invalid choice")

    def test_import(self):
        def changed(name, words, **change):
            folder = self.dir / name
            if not folder.exists():
                self.tool("export", self.golden(name)[3], folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **change}))
            self.refused("import", folder, self.dir / "out.safetensors", words=words)
            (folder / "config.json").write_text(json.dumps(config))
        for words, change in (
            ("description", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            ("RoPE is scaled (linear)", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
            ("RoPE is scaled (yarn)", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
            ("a part of each head", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            ("biases", {"attention_bias": True}),
            ("biases", {"mlp_bias": True}),
            ("hidden_act is gelu", {"hidden_act": "gelu"}),
            ("head_dim", {"head_dim": 64}),
            ("quantised", {"quantization_config": {"bits": 4}}),
            ("model_type is opt", {"model_type": "opt"}),
            ("lacks hidden_size", {"hidden_size": None}),
            ("layers.1", {"num_hidden_layers": 2}),
            ("description", {"num_hidden_layers": "x"}), ("description", {"num_hidden_layers": 10**30}),
            ("description", {"num_attention_heads": 0}),
            ("description", {"rope_parameters": [1]}),
            ("embed_tokens", {"vocab_size": 34}),
        ):
            changed("prenorm_hs128", words, **change)
        for words, change in (("GPT-2's own kind, with biases", {"activation_function": "gelu_new"}),
                              ("n_inner", {"n_inner": 64}), ("head", {"tie_word_embeddings": False}),
                              ("attention is scaled", {"scale_attn_by_inverse_layer_idx": True})):
            changed("nanogpt_prenorm", words, **change)
        file = self.dir / "nanogpt_prenorm" / "model.safetensors"
        tensors, _ = read_safetensors(file)
        bias = "transformer.h.0.mlp.c_fc.bias"
        write_safetensors(file, {**tensors, bias: ("F32", [128], struct.pack("<128f", *[0.0] * 127, 0.5))})
        self.refused("import", self.dir / "nanogpt_prenorm", self.dir / "out.safetensors", words=bias + " is not zero")
        (self.dir / "nanogpt_prenorm" / "list").mkdir()
        (self.dir / "nanogpt_prenorm" / "list" / "config.json").write_text("[]")
        self.refused("import", self.dir / "nanogpt_prenorm" / "list", self.dir / "out.st", words="description")
        # as older versions write them: the head once more, buffers, no biases of zero
        extra = {
            "lm_head.weight": tensors["transformer.wte.weight"], "transformer.h.0.attn.bias": ("F32", [1], bytes(4))
        }
        write_safetensors(file, {**{n: t for n, t in tensors.items() if not n.endswith(".bias")}, **extra})
        self.tool("import", self.dir / "nanogpt_prenorm", self.dir / "out.safetensors")
        self.same(self.dir / "nanogpt_prenorm.safetensors", self.dir / "out.safetensors")
        self.refused("import", self.dir / "none", self.dir / "out2.st", words="config.json: No such file")
        self.refused("import", __file__, self.dir / "out2.st", words="test_hf.py: is a file. Give the folder")

    def test_programs(self):
        """status and stream of the programs themselves, and packages that are missing"""
        def status(program, *args, module=None):
            env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
            if module:
                (self.dir / "modules").mkdir(exist_ok=True)
                (self.dir / "modules" / f"{module}.py").write_text("raise ImportError")
                env["PYTHONPATH"] = str(self.dir / "modules")
            r = subprocess.run([sys.executable, HF / program, *map(str, args)], env=env, cwd=self.dir,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            return r.returncode, r.stdout, r.stderr
        self.assertEqual(status("import.py", "none", "out.st"),
                         (1, "", "import: none/config.json: No such file or directory. "
                                 "Check the path, its rights and the disk's room.\n"))
        for program in ("import.py", "export.py"):
            code, out, _ = status(program, "--help")
            self.assertTrue(code == 0 and "Needs numpy" in out)
            code, _, error = status(program, "a", "b", module="numpy")
            self.assertTrue(code == 1 and error.count("\n") == 1 and "pip install numpy" in error, error)
            (self.dir / "modules" / "numpy.py").unlink()
        code, _, error = status("from_torch.py", self.dir, "b", module="torch")
        self.assertTrue(code == 1 and error.count("\n") == 1 and "pip install torch" in error, error)


def torch_save(path, tree):
    """what torch.save writes, of numpy's arrays for tensors (of uint16 for bfloat16); views stay views"""
    torch_, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def rebuild(*_):
        pass

    rebuild.__module__, rebuild.__qualname__, utils._rebuild_tensor_v2 = "torch._utils", "_rebuild_tensor_v2", rebuild
    kinds = {"f4": "Float", "f2": "Half", "u2": "BFloat16", "f8": "Double", "i8": "Long"}
    for kind in kinds.values():
        setattr(torch_, kind + "Storage", type(kind + "Storage", (), {"__module__": "torch"}))
    storages = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Held):
                return None
            kind = getattr(torch_, kinds[value.array.dtype.str[1:]] + "Storage")
            return "storage", kind, str(value.key), "cpu", value.array.size

        def reducer_override(self, value):
            if not isinstance(value, np.ndarray):
                return NotImplemented
            base = value
            while isinstance(base.base, np.ndarray):
                base = base.base
            key = next((i for i, held in enumerate(storages) if held is base), len(storages))
            if key == len(storages):
                storages.append(base)
            offset = (value.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // value.itemsize
            return rebuild, (Held(base, key), offset, value.shape, tuple(s // value.itemsize for s in value.strides),
                             False, collections.OrderedDict())

    Held = collections.namedtuple("Held", "array key")
    out = io.BytesIO()
    with unittest.mock.patch.dict(sys.modules, {"torch": torch_, "torch._utils": utils}):
        Pickler(out, 2).dump(tree)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"archive/data/{key}", array.tobytes("A"))


class Caller:
    """pickled so that whoever reads it as pickle does by itself runs a command"""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def rank_lines(tokens):
    """a rank file"""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def code_and_prose(size=1 << 20):
    """text that every machine has: half Python's library, half these pages, and what tokenizers stumble over"""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:99]
    code = "".join(p.read_text(errors="replace") for p in modules)[:size // 2]
    prose = "".join(p.read_text() for p in sorted((ROOT / "dev" / "doc").glob("*.md")))
    odd = ("hello  world   x\n\n\n\t\t\u00e4 \u4e16\u754c\u00a0\U0001f642 e\u0301 \ufb01 don't DON'T 1234567 --- "
           "aaaaaaa  \n ")
    return odd + code + (prose * (size // 2 // len(prose) + 1))[:size // 2] + odd


def random_weights(c, seed):
    random = np.random.default_rng(seed)
    scale = {"tok_embeddings.weight": 1.0, "wpe.weight": 0.3}
    return {name: random.normal(1, 0.1, shape) if len(shape) == 1 else
            random.normal(0, scale.get(name, shape[1] ** -0.5), shape) for name, shape in weights.our_shapes(c).items()}


def sweep():
    """every variant, norm and backbone; head sizes, groups, odd vocabularies and widths"""
    shapes = itertools.cycle(((16, 6, 3), (32, 4, 4), (64, 2, 1), (128, 2, 2), (72, 1, 1), (16, 3, 1), (32, 8, 2),
                              (64, 3, 3)))
    k = 0
    for backbone, norm, variant in itertools.product(*(weights.WORDS[key] for key in ("backbone", "norm", "variant"))):
        for _ in range(2 if backbone == "llama" else 1):
            hs, heads, kv = next(shapes)
            dim, kv = hs * heads, kv if backbone == "llama" else heads
            hidden = 4 * dim if backbone == "nanogpt" else (24, 56, 200)[k % 3]
            scaling = ("8,1,4,64", "3.5,0.5,2,100")[k // 2 % 2]
            scaled = {"rope_scaling": scaling} if backbone == "llama" and k % 2 else {}
            yield dict(scaled, backbone=backbone, variant=variant, norm=norm, dim=dim, layers=1 + k // 2 % 3,
                       heads=heads, kv_heads=kv, hidden=hidden, vocab_size=(37, 101, 257, 64, 83)[k % 5],
                       rope_theta=(1e4, 5e5)[k % 2], norm_eps=(1e-5, 1e-6)[k // 3 % 2], seq_len=(33, 70)[k // 2 % 2],
                       max_seq_len=75)
            k += 1


class Transformers(Case):
    worst = {}

    @classmethod
    def setUpClass(cls):
        if torch is None:
            raise unittest.SkipTest(f"the package {missing} is missing")

    @classmethod
    def tearDownClass(cls):
        if ARGS.verbose:
            print("   ", f"torch {torch.__version__}, transformers {transformers.__version__}:",
                  {" ".join(k): f"{v:.1e}" for k, v in sorted(cls.worst.items())})

    def close(self, what, model, got, want, limit):
        error = float(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max())
        key = what, type(model).__name__
        self.worst[key] = max(self.worst.get(key, 0), error)
        self.assertLessEqual(error, limit, what)

    def load(self, folder, dtype="float32"):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                                 torch_dtype=getattr(torch, dtype)).eval()

    def logits(self, model, tokens):
        with torch.no_grad():
            return model(longs(tokens), use_cache=False).logits.float().numpy()

    def generates(self, model, prompt, count=12):
        """greedy with a cache, with a static one, with padding on the left: as by whole forwards"""
        prompt = longs(prompt)
        want = prompt
        for _ in range(count):
            next_ = self.logits(model, want)[:, -1:].argmax(-1)
            want = torch.cat([want, torch.as_tensor(next_)], 1)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        seen, padding = torch.ones_like(prompt), torch.zeros_like(prompt[:, :5])
        for ids, mask, more in ((prompt, seen, {}), (prompt, seen, {"use_cache": False}),
                                (prompt, seen, {"cache_implementation": "static"}),
                                (torch.cat([padding, prompt], 1), torch.cat([padding, seen], 1), {})):
            got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, **more)
            self.assertTrue(torch.equal(got[:, -want.shape[1]:], want),
                            f"generate {more}: {got[:, -count:]} {want[:, -count:]}")

    def test_golden(self):
        """logits and losses of the paper's code; generate; loss from labels"""
        def body(name):
            tensors, c, o, path = self.golden(name)
            self.tool("export", path, self.dir / name)
            model = self.load(self.dir / name)
            tokens = as_numpy(tensors["tokens"])
            self.close("golden logits", model, self.logits(model, tokens[0, 0, :, :-1]), as_numpy(tensors["logits"]),
                       LIMIT)
            losses = []
            for window in longs(tokens[0]):
                labels = torch.cat([torch.full_like(window[:, :1], -100), window[:, 1:]], 1)
                if c["backbone"] == "llama" or window.shape[1] <= c["max_seq_len"]:
                    with torch.no_grad():
                        losses.append(model(window, labels=labels).loss.item())
            if losses:
                self.close("golden loss", model, np.mean(losses), as_numpy(tensors["loss"])[0], LOSS_LIMIT)
            self.generates(model, tokens[0, 0, :, :9])
            if type(model).__name__ == "SimpleGPTForCausalLM":  # its tensors have the names of the golden file
                for windows in longs(tokens[0]):
                    logits = model(windows[:, :-1]).logits.flatten(0, 1)
                    torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()).div(len(tokens[0])).backward()
                for n, p in model.named_parameters():
                    want = as_numpy(tensors["grad/" + n])
                    relative = (p.grad.numpy() - want) / np.linalg.norm(want)
                    self.close("golden gradients, relative", model, np.linalg.norm(relative), 0, 1e-4)
        self.each_golden(body)

    def test_sweep(self):
        """random weights: logits of the PyTorch twin, losses of ./train_gpt window by window, and the way back"""
        for i, c in enumerate(sweep()):
            with self.subTest(c):
                path = self.dir / f"{i}.st"
                arrays = random_weights(c, i)
                write_safetensors(path, as_tensors(arrays), weights.file_metadata(c))
                self.tool("export", path, self.dir / str(i))
                model, back = self.load(self.dir / str(i)), self.dir / "back.safetensors"
                model.save_pretrained(self.dir / "saved")
                for folder in (self.dir / "saved", self.dir / str(i)):
                    printed = self.tool("import", folder, back).split()[1:]
                    self.same(path, back)
                    self.same_model(path, back)
                shutil.rmtree(self.dir / "saved")
                windows = np.random.default_rng(i).integers(0, c["vocab_size"], (4, c["seq_len"] + 1))
                got = self.logits(model, windows[:, :-1])
                multiple, factor = weights.hidden_flags(c["dim"], c["hidden"])
                self.close("trainer loss", model, self.losses(got, windows), self.trainer_losses(printed, windows),
                           LOSS_LIMIT)
                self.generates(model, windows[:2, :7])
                if "rope_scaling" in c:  # which the twin has not
                    continue
                twin = Model(Config(c["backbone"], c["variant"], c["dim"], c["layers"], c["heads"], c["kv_heads"],
                                    c["vocab_size"], multiple, float(np.float32(factor)), c["norm_eps"],
                                    c["rope_theta"], c["max_seq_len"], c["norm"]))
                twin.load_state_dict({n: torch.as_tensor(a, dtype=torch.float32) for n, a in arrays.items()})
                self.close("twin logits", model, got, self.logits_of(twin, windows[:, :-1]), LIMIT)

    @staticmethod
    def losses(logits, windows):
        """mean over each window"""
        return torch.nn.functional.cross_entropy(torch.as_tensor(logits).transpose(1, 2), longs(windows[:, 1:]),
                                                 reduction="none").mean(1)

    def trainer_losses(self, flags, windows):
        """the same by ./train_gpt: steps of one window at a learning rate of 0"""
        write_shard(self.dir / "tokens.bin", windows.reshape(-1).tolist())
        shutil.rmtree(self.dir / "run", ignore_errors=True)
        self.train(*flags, "--seq-len", windows.shape[1] - 1, "--batch-size", 1, "--steps", len(windows), "--lr", 0,
                   "--train-data", self.dir / "tokens.bin", "--out", self.dir / "run")
        return [float(row["loss"]) for row in read_log(self.dir / "run")]

    @staticmethod
    def logits_of(twin, tokens):
        with torch.no_grad():
            return twin(torch.as_tensor(tokens)).numpy()

    def test_own_names(self):
        """what save_pretrained writes of modeling_simplegpt.py is read by --init-from"""
        for name in ("simplegpt_layernorm", "preqknorm_gqa", "nanogpt_simplegpt"):
            with self.subTest(name):
                _, c, o, path = self.golden(name)
                self.tool("export", path, self.dir / name)
                saved = self.dir / f"{name}_saved"
                self.load(self.dir / name).save_pretrained(saved, max_shard_size="50KB")
                self.train(*golden_model(c), "--seq-len", o["T"], "--init-from", saved, "--export", self.dir / "own.st",
                           "--steps", 0, "--out", self.dir / "run")
                self.same(path, self.dir / "own.st")

    def test_their_own(self):
        """models that transformers makes: logits after import, export; losses of ./train_gpt after import"""
        torch.manual_seed(1)
        llama = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=2, vocab_size=203,
                     max_position_embeddings=64)
        rope, scaling = {"rope_theta": 5e5}, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        scaled = {**rope, "rope_scaling": scaling}
        if not transformers.__version__.startswith("4."):
            scaled = {"rope_parameters": {**rope, **scaling}}
            rope = {"rope_parameters": {"rope_type": "default", **rope}}
        mistral = {**llama, "num_attention_heads": 4, "num_key_value_heads": 2}
        gpt2 = transformers.GPT2Config(vocab_size=203, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                                       activation_function="gelu")
        for model in (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **rope, num_attention_heads=4,
                                                                   num_key_value_heads=2, rms_norm_eps=1e-6)),
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, num_attention_heads=8)),
            # as Llama 3.2
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **scaled, num_attention_heads=4,
                                                                   tie_word_embeddings=True)),
            transformers.MistralForCausalLM(transformers.MistralConfig(**mistral, sliding_window=None)),
            transformers.MistralForCausalLM(transformers.MistralConfig(
                **{**mistral, "max_position_embeddings": 100}, sliding_window=64)),
            transformers.GPT2LMHeadModel(gpt2),
        ):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.dim() == 2:
                        p.normal_(0, p.shape[1] ** -0.5)
                    elif name.endswith("weight"):
                        p.normal_(1, 0.1)
            model.eval().save_pretrained(self.dir / "theirs", max_shard_size="100KB")
            with contextlib.redirect_stderr(io.StringIO()):
                printed = self.tool("import", self.dir / "theirs", self.dir / "ours.safetensors").split()[1:]
            self.bin_file(model, printed)
            windows = np.random.default_rng(1).integers(0, 203, (4, 65))
            logits = self.logits(model, windows[:, :-1])
            self.close("trainer loss, theirs", model, self.losses(logits, windows),
                       self.trainer_losses(printed, windows), LOSS_LIMIT)
            self.train(*printed, "--steps", 0, "--export", self.dir / "end.st", "--out", self.dir / "run")
            self.tool("export", self.dir / "end.st", self.dir / "again")
            again = self.load(self.dir / "again")
            self.assertEqual(type(again).__name__, type(model).__name__.replace("Mistral", "Llama"))
            same = type(again) is type(model)
            self.close("logits there and back", model, self.logits(again, windows[:, :-1]), logits,
                       0 if same else LIMIT)
            for folder in ("theirs", "again"):
                shutil.rmtree(self.dir / folder)

    def bin_file(self, model, printed):
        """of the same model gives the same tensors; of GPT-2 also nanoGPT's"""
        state = {name: t for name, t in model.state_dict().items()}
        (self.dir / "bin").mkdir(exist_ok=True)
        shutil.copy(self.dir / "theirs" / "config.json", self.dir / "bin")
        torch.save(state, self.dir / "bin" / "pytorch_model.bin")
        with contextlib.redirect_stderr(io.StringIO()):
            self.tool("import", self.dir / "bin", self.dir / "bin.safetensors")
        self.same(self.dir / "ours.safetensors", self.dir / "bin.safetensors")
        if "transformer.wte.weight" in state:
            theirs = {name: t.T if t.dim() == 2 and ".h." in name else t for name, t in state.items()
                      if not name.endswith(".bias")}
            torch.save({"model": theirs, "model_args": {"n_head": model.config.n_head}}, self.dir / "ckpt.pt")
            self.tool("from_torch", self.dir / "ckpt.pt", self.dir / "bin.safetensors")
            self.same(self.dir / "ours.safetensors", self.dir / "bin.safetensors")

    def test_bf16(self):
        for name in ("prenorm_hs128", "simplegpt_gqa_hs32", "nanogpt_preqknorm"):
            with self.subTest(name):
                tensors, _, _, path = self.golden(name)
                self.tool("export", path, self.dir / name, "--dtype", "bf16", "--shard-size", 30000)
                model = self.load(self.dir / name, "bfloat16")
                self.assertEqual({p.dtype for p in model.parameters()}, {torch.bfloat16})
                got = self.logits(model, as_numpy(tensors["tokens"])[0, 0, :, :-1])
                self.close("bf16 logits", model, got, as_numpy(tensors["logits"]), 0.15)

    def test_bytes_tokenizer(self):
        c = dict(backbone="llama", variant="simplegpt", norm="rmsnorm", dim=16, layers=1, heads=1, kv_heads=1, hidden=8,
                 vocab_size=258, rope_theta=1e4, norm_eps=1e-5, seq_len=64, max_seq_len=64)
        write_safetensors(self.dir / "a.st", as_tensors(random_weights(c, 1)), weights.file_metadata(c))
        self.tool("export", self.dir / "a.st", self.dir / "hf", "--tokenizer", "bytes")
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.dir / "hf", trust_remote_code=True)
        for text in ("abc", "Grüße, 世界!\n\tx  y", "\u00ad\u007f\u00a0 don't", "".join(map(chr, range(256)))):
            self.assertEqual(tokenizer(text)["input_ids"], [256, *text.encode()])
            self.assertEqual(tokenizer.decode(list(text.encode())), text)
        self.assertEqual((tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)), (256, 257, 258))

    def same_ids(self, file, *flags):
        """of the folder's tokenizer and of the library whose file it is, on 1 MB"""
        try:
            encoder = encoders.load(str(file), *flags)
        except encoders.Refused as e:
            self.skipTest(str(e))
        c = dict(backbone="llama", variant="simplegpt", norm="rmsnorm", dim=16, layers=1, heads=1, kv_heads=1, hidden=8,
                 vocab_size=encoder.V, rope_theta=1e4, norm_eps=1e-5, seq_len=64, max_seq_len=64)
        write_safetensors(self.dir / "a.st", as_tensors(random_weights(c, 1)), weights.file_metadata(c))
        shutil.rmtree(self.dir / "hf", ignore_errors=True)
        self.tool("export", self.dir / "a.st", self.dir / "hf", "--tokenizer", file,
                  *(["--preset", *flags] if flags else []))
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.dir / "hf", trust_remote_code=True)
        text = code_and_prose()
        for part in (text, *text.splitlines()[:300], "", " ", "  a"):
            got, want = tokenizer(part)["input_ids"], [encoder.bos, *encoder.ids("text", part.encode())]
            if got != want:
                at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
                after = tokenizer.decode(want[:at])[-20:]
                self.fail(f"{flags}: {got[at:at + 5]} for {want[at:at + 5]} after {after!r}")
        self.assertEqual((tokenizer.bos_token_id, tokenizer.eos_token_id), (encoder.bos, encoder.eos))
        return tokenizer, encoder.ids("text", text.encode()), text

    def test_sentencepiece(self):
        """models as Llama 2's, as spm_train makes them without options, as Gemma's"""
        try:
            import sentencepiece
        except ImportError:
            self.skipTest("the package sentencepiece is missing")
        (self.dir / "text").write_text(code_and_prose(1 << 18))
        for name, options in (
            ("llama", dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
                           split_digits=True, allow_whitespace_only_pieces=True)),
            ("plain", {}),
            ("gemma", dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
                           add_dummy_prefix=False, user_defined_symbols=["\u2581" * 2, "\u2581" * 4, "\n", "def"])),
        ):
            with self.subTest(name):
                sentencepiece.SentencePieceTrainer.train(
                    input=str(self.dir / "text"), model_prefix=str(self.dir / name), model_type="bpe", vocab_size=1200,
                    character_coverage=0.999, minloglevel=2, num_threads=1, **options)
                tokenizer, ids, text = self.same_ids(self.dir / f"{name}.model")
                if name != "plain":  # which loses spaces
                    self.assertEqual(tokenizer.decode(ids), text)

    def test_rank_files(self):
        """every family's way to cut words; ids with a hole before EOS (cl100k, o200k)"""
        import tokenizers
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator([code_and_prose(1 << 18)], tokenizers.trainers.BpeTrainer(
            vocab_size=1500, show_progress=False, initial_alphabet=alphabet))
        shown = tokenizer_json.convert.alphabet()
        vocab = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
        (self.dir / "ranks").write_bytes(rank_lines([bytes(shown[character] for character in text) for text in vocab]))
        for preset in tokenizer_json.PRESETS:
            with self.subTest(preset):
                tokenizer, ids, text = self.same_ids(self.dir / "ranks", preset)
                self.assertIn(tokenizer.decode(ids), (text, unicodedata.normalize("NFC", text)))  # Qwen's normalises
        model = test_convert_tokenizer.tekken([bytes(shown[character] for character in text) for text in vocab], 5)
        (self.dir / "tekken.json").write_text(json.dumps(model))
        tokenizer, ids, text = self.same_ids(self.dir / "tekken.json")
        self.assertEqual((tokenizer.decode(ids), tokenizer.bos_token), (text, "<s>"))

    def test_from_torch(self):
        """what the paper's code saves: a state_dict, plain, nested, wrapped; a folder of distributed checkpoint"""
        import torch.distributed.checkpoint as dcp
        file, folder, out = self.dir / "a.pt", self.dir / "dcp", self.dir / "out.safetensors"

        def body(name):
            tensors, o, path, state, flags = self.state_dict(name)
            inner = "layers.0._checkpoint_wrapped_module."
            wrapped = {"_orig_mod." + n.replace("layers.0.", inner): t for n, t in state.items()}
            shutil.rmtree(folder, ignore_errors=True)
            dcp.save({"model": state, "optimizer": {"state": {n + ".exp_avg": t for n, t in state.items()}},
                      "train_state": {"step": torch.tensor(5)}}, checkpoint_id=folder,
                     **({"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}))
            for source, save in (
                (file, lambda: torch.save(state, file)), (folder, lambda: None),
                (file, lambda: torch.save({"model": wrapped, "optimizer": {"state": {}}}, file)),
                (file, lambda: torch.save({**state, "freqs_cis": torch.zeros(4, 8, dtype=torch.complex64)}, file)),
            ):
                save()
                printed = self.tool("from_torch", source, out, *flags)
                self.same(path, out)
            # training goes on from it: the golden file's losses
            write_shard(self.dir / "tokens.bin", values(tensors["tokens"]))
            shutil.rmtree(self.dir / "run", ignore_errors=True)
            self.train(*printed.split()[1:], *golden_run(o), "--train-data", self.dir / "tokens.bin", "--out",
                       self.dir / "run")
            losses = [float(row["loss"]) for row in read_log(self.dir / "run")]
            np.testing.assert_allclose(losses, values(tensors["loss"]), rtol=0, atol=LOSS_LIMIT)
        self.each_golden(body)

    def state_dict(self, name):
        tensors, c, o, path = self.golden(name)
        state = {n: torch.as_tensor(as_numpy(t).copy()) for n, t in read_safetensors(path)[0].items()}
        return tensors, o, path, state, [
            "--heads", c["n_heads"], "--norm", c["norm_type"], "--rope-theta", c["rope_theta"], "--seq-len", o["T"]
        ]

    def test_from_torch_edges(self):
        _, _, _, state, flags = self.state_dict("simplegpt_layernorm")
        file, out = self.dir / "a.pt", self.dir / "out.safetensors"
        torch.save({n: t.bfloat16() for n, t in state.items()}, file)
        self.tool("from_torch", file, out, *flags)
        got = read_safetensors(out)[0]
        for n, t in state.items():
            self.assertEqual((got[n][0], got[n][2]), ("BF16", t.bfloat16().view(torch.int16).numpy().tobytes()))
        refusals = [("lacks the tensor", {"tok_embeddings.weight": state["norm.weight"][None]}),
                    ("no tok_embeddings", {}),
                    ("lacks the tensor norm.weight", {n: t for n, t in state.items() if n != "norm.weight"}),
                    ("holds layers.0.more", {**state, "layers.0.more.weight": state["norm.weight"]}),
                    ("is Double", {n: t.double() for n, t in state.items()})]
        for words, broken in refusals:
            torch.save(broken, file)
            self.refused("from_torch", file, self.dir / "b.st", *flags, words=words)
        file.write_bytes(b"no checkpoint")
        self.refused("from_torch", file, self.dir / "b.st", *flags, words="no whole file of torch.save")
        torch.save(state, file)
        for heads in (0, 7):
            self.refused("from_torch", file, self.dir / "b.st", "--heads", heads, words="--heads")
        self.refused("from_torch", self.dir / "none.pt", self.dir / "b.st", "--heads", 7, words="none.pt: No such file")
        self.refused("from_torch", self.dir / "run", self.dir / "b.st", "--heads", 7, words="no .metadata")


class Lines(lines.Lines):
    def addSkip(self, test, reason):
        print("skip", str(test).split("(")[-1].rstrip(")").split(".")[-1] + ":", reason, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_gpt", type=os.path.abspath)
    parser.add_argument("golden", help="folder of golden files")
    parser.add_argument("--filter", default="", help="only tests whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="print the largest differences and the versions")
    parser.parse_args(namespace=ARGS)
    suite, result = unittest.TestSuite(), Lines()
    for case in (Convert, Refusals, Transformers):
        chosen = [t for t in unittest.defaultTestLoader.loadTestsFromTestCase(case) if ARGS.filter in t.id()]
        suite.addTest(unittest.TestSuite(chosen))
    suite.run(result)
    print(f"test_hf: {result.passed} passed, {len(result.failures)} failed")
    return bool(result.failures)


if __name__ == "__main__":
    sys.exit(main())
