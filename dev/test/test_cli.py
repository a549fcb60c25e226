#!/usr/bin/env python3
"""Tests of ./train_gpt through its command line: golden files, checkpoints, bad input. Standard library only.

usage: test_cli.py TRAIN_GPT [GOLDEN_DIR ...] [--bf16] [--filter TEXT]

A golden file (../reference/golden.py writes them) holds a configuration, start weights, tokens, and what the paper's
code makes of them: losses, learning rates, gradient norms, end weights. Here they become --init-from and --train-data.
"""
import argparse
import array
import glob
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CURVATURE = os.path.join(HERE, "curvature")


def read_safetensors(path):
    """name -> (dtype, shape, bytes), metadata."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
        data = f.read()
    metadata = header.pop("__metadata__", {})
    return {n: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for n, t in header.items()}, metadata


def write_safetensors(path, tensors, metadata=None):
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def values(tensor):
    return array.array({"F32": "f", "F64": "d", "I32": "i"}[tensor[0]], tensor[2])


def write_shard(path, tokens, wide=False):
    header = [0] * 256
    header[:3] = [20240801, 7, len(tokens)] if wide else [20240520, 1, len(tokens)]
    with open(path, "wb") as f:
        array.array("i", header).tofile(f)
        array.array("I" if wide else "H", tokens).tofile(f)


def distance(got, want):
    """Relative, in the norm over the tensor."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(got, want)) / max(sum(b * b for b in want), 1e-30))


def read_rows(path):
    with open(path) as f:
        names = f.readline().strip().split(",")
        return [dict(zip(names, line.strip().split(","))) for line in f]


def read_log(out):
    return read_rows(os.path.join(out, "log.csv"))


def golden_model(c):
    """flags of a golden file's `config`"""
    return ["--backbone", c["backbone"], "--variant", c["variant"], "--norm", c["norm_type"], "--dim", c["dim"],
            "--layers", c["n_layers"], "--heads", c["n_heads"], "--kv-heads", c["n_kv_heads"] or c["n_heads"],
            "--vocab-size", c["vocab_size"], "--multiple-of", c["multiple_of"],
            "--ffn-mult", c["ffn_dim_multiplier"] or 1, "--rope-theta", c["rope_theta"], "--norm-eps", c["norm_eps"]]


def golden_run(o):
    """and of its `optimizer`"""
    return ["--seq-len", o["T"], "--batch-size", o["B"], "--grad-accum", o["accum"], "--steps", o["steps"],
            "--warmup", o["warmup"], "--lr", o["lr"], "--weight-decay", o["wd"], "--beta1", o["beta1"],
            "--beta2", o["beta2"], "--adam-eps", o["eps"], "--clip", o["clip"]]


def same_matmuls(source, target):
    """A run to come to `target` takes the matmul algorithms that one to `source` has timed, of ranks without a file those
    of the first: else each run times its own, which round otherwise."""
    os.makedirs(target, exist_ok=True)
    for rank in range(4):
        names = [f"matmul_rank{rank}.txt", "matmul.txt"]
        there = [name for name in names if os.path.exists(os.path.join(source, name))]
        if there:
            shutil.copy(os.path.join(source, there[0]), os.path.join(target, names[rank == 0]))


class Failure(Exception):
    pass


def expect(condition, message):
    if not condition:
        raise Failure(message)


class Tests:
    def __init__(self, args):
        self.args, self.passed, self.failed = args, 0, 0
        self.dir = tempfile.mkdtemp(prefix="test_cli_")

    def path(self, name):
        return os.path.join(self.dir, name)

    def run(self, *flags, ok=True, limit=300, **more):
        """Runs the trainer; with ok=False it must exit with 1 and say why in one line, which is returned."""
        command = [self.args.train_gpt, *map(str, flags)]
        r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           errors="replace", timeout=limit, **more)
        if ok:
            expect(r.returncode == 0, f"exit {r.returncode}: {r.stderr.strip()} ({' '.join(command)})")
            return r.stdout
        expect(r.returncode == 1, f"exit {r.returncode} where 1 was due: {r.stderr.strip()} ({' '.join(command)})")
        expect(r.stderr.count("\n") == 1 and r.stderr.startswith("train_gpt: "), f"not one line: {r.stderr!r}")
        return r.stderr.strip()

    def test(self, name, body, *rest):
        if self.args.filter and self.args.filter not in name:
            return
        try:
            body(*rest)
            self.passed += 1
            print(f"ok {name}", flush=True)
        except Exception as e:  # whatever it is, this test failed and the next one runs
            self.failed += 1
            print(f"FAIL {name}: {type(e).__name__}: {e}", flush=True)

    # --- golden files

    def golden(self, path):
        tensors, metadata = read_safetensors(path)
        c, o = json.loads(metadata["config"]), json.loads(metadata["optimizer"])
        shard, init, export, out = (self.path(n) for n in ("golden.bin", "init.st", "export.st", "golden"))
        shutil.rmtree(out, ignore_errors=True)
        write_shard(shard, values(tensors["tokens"]))
        write_safetensors(init, {n[6:]: t for n, t in tensors.items() if n.startswith("param/")})
        self.run(*golden_model(c), *golden_run(o), "--train-data", shard, "--init-from", init, "--export", export,
                 "--out", out)
        rows = read_log(out)
        losses, lrs, norms = (values(tensors[n]) for n in ("loss", "lr", "grad_norm"))
        expect(len(rows) == len(losses), f"{len(rows)} rows in the log, {len(losses)} steps")
        worst = {"loss": 0.0, "lr": 0.0, "grad_norm": 0.0, "after": 0.0}
        for row, loss, lr, norm in zip(rows, losses, lrs, norms):
            got = float(row["loss"])
            expect(math.isfinite(got), "the loss is not finite")
            worst["loss"] = max(worst["loss"], abs(got - loss) / (loss if self.args.bf16 else 1))
            worst["lr"] = max(worst["lr"], abs(float(row["lr"]) - lr) / max(lr, 1e-12))
            worst["grad_norm"] = max(worst["grad_norm"], abs(float(row["grad_norm"]) - norm) / norm)
        exported, _ = read_safetensors(export)
        after = {n[6:]: t for n, t in tensors.items() if n.startswith("after/")}
        expect(exported.keys() == after.keys(), f"exported names differ: {exported.keys() ^ after.keys()}")
        for name, tensor in after.items():
            expect(exported[name][:2] == tensor[:2], f"{name} is {exported[name][:2]}, not {tensor[:2]}")
            worst["after"] = max(worst["after"], distance(values(exported[name]), values(tensor)))
        # design of the fixtures: fp32 as the code itself in float64 differs, with a margin; bf16 2% of the loss
        limits = {"loss": 0.02, "lr": 1e-10} if self.args.bf16 else {"loss": 5e-5, "lr": 1e-10, "grad_norm": 1e-4, "after": 1e-4}
        for key, limit in limits.items():
            expect(worst[key] <= limit, f"{key} is off by {worst[key]:.2e}, more than {limit:.0e}")
        if self.args.verbose:
            print("   ", os.path.basename(path), {k: f"{v:.1e}" for k, v in worst.items()})

    # --- the probe

    def curvature(self, path):
        """Against the exact Hessians of ../reference/curvature.py."""
        tensors, metadata = read_safetensors(path)
        c = json.loads(metadata["config"])
        tokens = tensors.pop("tokens")
        B, windows = tokens[1]
        shard, init, out = (self.path(n) for n in ("curvature.bin", "curvature.st", "curvature"))
        shutil.rmtree(out, ignore_errors=True)
        write_shard(shard, values(tokens))
        write_safetensors(init, tensors)
        self.run(*golden_model(c), "--seq-len", windows - 1, "--batch-size", B, "--steps", 0, "--train-data", shard,
                 "--init-from", init, "--probe", 1, "--probe-iterations", 200, "--out", out)
        activations = read_rows(out + "/activations.csv")
        expect([r["layer"] for r in activations if r["tensor"] == "residual"] == [str(i) for i in range(c["n_layers"] + 1)],
               "no residual stream of each layer")
        expect(len(activations) == 13 * c["n_layers"] + 1, f"{len(activations)} rows of activations")
        for r in activations:
            expect(0 < float(r["rms"]) <= float(r["max"]) < 1e3, f"rms and max of {r}")
        if self.args.bf16:  # weights too coarse for differences of gradients
            expect(not glob.glob(out + "/curvature*"), "a bf16 build measured curvature")
            return
        (row,) = read_rows(out + "/curvature.csv")
        got, exact = float(row["eigenvalue"]), float(metadata["largest"])
        if self.args.verbose:
            print(f"    {os.path.basename(path)}: {got}, exactly {exact}, {abs(got / exact - 1):.1e} off")
        # measured 1e-4 at most
        expect(abs(got / exact - 1) < 3e-4, f"the largest eigenvalue is {got}, exactly {exact}")
        rows, inputs = read_rows(out + "/curvature_inputs.csv"), json.loads(metadata["inputs"])
        expect([r["layer"] for r in rows] == [str(i) for i in range(len(inputs))], f"no row a block: {rows}")
        for row, exact in zip(rows, inputs):
            got = float(row["eigenvalue"])
            if self.args.verbose:
                print(f"    over the input of block {row['layer']}: {got}, exactly {exact}, {abs(got / exact - 1):.1e} off, "
                      f"{row['iterations']} iterations")
            # measured 2e-4 at most
            expect(abs(got / exact - 1) < 6e-4, f"over the input of block {row['layer']} it is {got}, exactly {exact}")

    def probe(self):
        """Looks without touching: same bits with it; rows go on over a resume."""
        more = ("--save-every", 6, "--val-data", self.path("tokens.bin"), "--val-every", 0)
        plain, probed = self.path("unprobed.st"), self.path("probed.st")
        self.run(*self.small("unprobed", *more, "--export", plain))
        self.same_matmuls("unprobed", "probed")
        said = self.run(*self.small("probed", *more, "--export", probed, "--probe", 4, "--probe-iterations", 3))
        expect(open(plain, "rb").read() == open(probed, "rb").read(), "a probed run ends with other weights")
        steps = [r["step"] for r in read_rows(self.path("probed/activations.csv")) if r["tensor"] == "v"]
        expect(steps == [s for s in ("0", "4", "8", "12") for _ in range(2)], f"probed after steps {steps}")
        expect(self.args.bf16 or said.count("probe at step") == 4, "no line a probe")
        tables = [self.path(os.path.join("probed", name + ".csv"))
                  for name in ("activations", "curvature", "curvature_inputs")[:1 if self.args.bf16 else 3]]
        before = [open(table).read() for table in tables]
        shutil.rmtree(self.path("probed/step_00000012"))
        self.run(*self.small("probed", *more, "--probe", 4, "--probe-iterations", 3, "--resume"))
        expect([open(table).read() for table in tables] == before, "rows differ after a resume")

    # --- a small run to build on

    def small(self, out, *more, steps=12, data="tokens.bin"):
        if not os.path.exists(self.path("tokens.bin")):
            state, tokens = 1, []
            for _ in range(20000):
                state = (state * 1103515245 + 12345) % 2**31
                tokens.append(state // 65536 % 64 if len(tokens) % 3 else 7)
            write_shard(self.path("tokens.bin"), tokens)
        return ["--dim", 32, "--layers", 2, "--heads", 2, "--vocab-size", 65, "--multiple-of", 16, "--seq-len", 33,
                "--batch-size", 3, "--steps", steps, "--train-data", self.path(data), "--out", self.path(out), *more]

    def same_matmuls(self, run, *others):
        for name in others:
            same_matmuls(self.path(run), self.path(name))

    def same_twice(self):
        exports = []
        for i in range(2):
            out = self.path(f"twice{i}.st")
            if i:
                self.same_matmuls("twice0", "twice1")
            self.run(*self.small(f"twice{i}", "--grad-accum", 2, "--export", out))
            exports.append(open(out, "rb").read())
        expect(exports[0] == exports[1], "two runs of the same command gave different weights")

    def loss_falls(self):
        self.run(*self.small("falls", "--val-data", self.path("tokens.bin"), "--val-every", 20, "--lr", 0.01, steps=60))
        rows = read_log(self.path("falls"))
        expect(float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"]), "the loss did not fall by a fifth")
        expect([i for i, r in enumerate(rows) if r["val_loss"]] == [19, 39, 59], "validated at the wrong steps")

    def resume(self):
        """Killed at whatever moment, resumed: the same bits as never stopped."""
        self.run(*self.small("whole", "--shuffle", "--export", self.path("whole.st"), steps=40))
        self.same_matmuls("whole", "cut")
        flags = self.small("cut", "--shuffle", "--export", self.path("cut.st"), "--save-every", 5, "--resume", steps=40)
        for delay in (0.15, 0.3, 0.5, 0.7):
            p = subprocess.Popen([self.args.train_gpt, *map(str, flags)], stdout=subprocess.DEVNULL)
            time.sleep(delay)
            p.send_signal(signal.SIGKILL)
            p.wait()
        self.run(*flags)
        expect(open(self.path("whole.st"), "rb").read() == open(self.path("cut.st"), "rb").read(), "weights differ")
        strip = [[(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in read_log(self.path(n))] for n in ("whole", "cut")]
        expect(strip[0] == strip[1], "the logs differ")

    def told(self, out, *flags, steps):
        """Resumes; what is said of a changed schedule on the terminal, and in warnings."""
        command = [self.args.train_gpt, *map(str, self.small(out, "--resume", *flags, steps=steps))]
        r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=300)
        expect(r.returncode == 0 and "resumed from" in r.stdout, f"exit {r.returncode}: {r.stderr.strip()}")
        return [line for line in r.stdout.splitlines() if line.startswith("changed")], r.stderr.splitlines()

    def schedules(self):
        """The log has each schedule's rates, --plan its phases."""
        def fall(t):
            return 1 - t

        def cosine(t):
            return math.cos(math.pi * t / 2) ** 2

        rise = [0.02 / 3, 0.04 / 3]
        for flags, behind, said in (
            ([], [0.02 * fall(s / 10) for s in range(10)], "linear, steps: 2 to 0.02, 10 from 0.02 to 0"),
            (["--schedule", "linear", "--min-lr", 0.01], [0.01 + 0.01 * fall(s / 10) for s in range(10)],
             "linear, steps: 2 to 0.02, 10 from 0.02 to 0.01"),
            (["--schedule", "cosine"], [0.002 + 0.018 * cosine(s / 10) for s in range(10)],
             "cosine, steps: 2 to 0.02, 10 from 0.02 to 0.002"),
            (["--schedule", "cosine", "--min-lr", 0, "--decay-steps", 7],
             [0.02 * cosine(s / 7) for s in range(7)] + [0] * 3,
             "cosine, steps: 2 to 0.02, 7 from 0.02 to 0, 3 of 0"),
            (["--schedule", "wsd"], [0.02] * 9 + [0.01], "wsd, steps: 2 to 0.02, 8 of 0.02, 2 from 0.02 to 0"),
            (["--schedule", "wsd", "--min-lr", 0.02, "--decay-steps", 10], [0.02] * 10,
             "wsd, steps: 2 to 0.02, 10 from 0.02 to 0.02"),
            (["--schedule", "constant"], [0.02] * 10, "constant, steps: 2 to 0.02, 10 of 0.02"),
        ):
            flags = self.small("rates", "--lr", 0.02, "--warmup", 2, *flags)
            self.run(*flags)
            got, want = [float(r["lr"]) for r in read_log(self.path("rates"))], rise + behind
            close = len(got) == 12 and all(abs(a - b) <= 1e-11 * 0.02 for a, b in zip(got, want))
            expect(close, f"{said}: {got}, not {want}")
            expect(f"learning rate, {said}\n" in self.run(*flags, "--plan"), f"--plan does not say '{said}'")

    def prolonged(self):
        """A wsd run that goes on from before its fall is the one that was planned so from the start."""
        wsd = ("--warmup", 2, "--schedule", "wsd", "--min-lr", 1e-5)
        self.run(*self.small("planned", *wsd, "--decay-steps", 6, "--save-every", 8, "--keep", 0, steps=20))
        self.same_matmuls("planned", "longer")
        self.run(*self.small("longer", *wsd, "--decay-steps", 4, "--save-every", 8, "--keep", 0, steps=12))

        def rows(out):
            return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in read_log(self.path(out))]

        def weights(out, step):
            with open(self.path(f"{out}/step_{step:08d}/model.safetensors"), "rb") as f:
                return f.read()

        expect(rows("longer")[:9] == rows("planned")[:9], "the logs differ before the shorter run's fall")
        expect(rows("longer")[9] != rows("planned")[9], "the shorter run did not fall")
        expect(weights("longer", 8) == weights("planned", 8), "the weights differ before the shorter run's fall")
        fallen = self.path("fallen")
        shutil.copytree(self.path("longer"), fallen)
        shutil.rmtree(self.path("longer/step_00000012"))
        said = self.told("longer", *wsd, "--decay-steps", 6, "--save-every", 8, "--keep", 0, steps=20)
        expect(said == (["changed with the resume: --steps 20 (was 12), --decay-steps 6 (was 4)"], []), f"said {said}")
        expect(rows("longer") == rows("planned") and weights("longer", 20) == weights("planned", 20),
               "prolonged, it is not the run that was planned so")
        # from behind its fall it is another run
        lines, (warning,) = self.told("fallen", *wsd, "--decay-steps", 6, steps=20)
        expect(not lines and "--steps 20 (was 12), --decay-steps 6 (was 4); steps 10 to 12 were" in warning, warning)

    def changed_schedules(self):
        """A resume names what it changes of the schedule: warning where the rates of steps done are others."""
        self.run(*self.small("linear", "--warmup", 2, "--save-every", 12))
        flat = ("--warmup", 2, "--schedule", "constant")
        self.run(*self.small("flat", *flat, "--save-every", 12))
        copy = self.path("copy")

        def told(run, *flags, steps=12):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self.path(run), copy)
            return self.told("copy", *flags, steps=steps)

        for run, flags, steps, changes, first, last in (
            ("linear", ["--warmup", 2], 20, "--steps 20 (was 12)", 4, 12),
            ("linear", ["--warmup", 3], 20, "--steps 20 (was 12), --warmup 3 (was 2)", 1, 12),
            ("linear", ["--warmup", 2, "--min-lr", 1e-4], 13, "--steps 13 (was 12), --min-lr 0.0001 (was 0)", 4, 12),
            ("linear", ["--warmup", 2, "--lr", 3e-4, "--schedule", "cosine", "--decay-steps", 9], 13,
             "--schedule cosine (was linear), --steps 13 (was 12), --lr 0.0003 (was 0.001), --min-lr 3e-05 (was 0), "
             "--decay-steps 9 (was none)", 1, 12),
            ("flat", ["--warmup", 2, "--schedule", "cosine"], 20,
             "--schedule cosine (was constant), --steps 20 (was 12), --min-lr 0.0001 (was none), "
             "--decay-steps 18 (was none)", 4, 12),
            ("flat", ["--warmup", 2, "--schedule", "wsd", "--decay-steps", 8], 20,
             "--schedule wsd (was constant), --steps 20 (was 12), --min-lr 0 (was none), "
             "--decay-steps 8 (was none)", 0, 0),
            ("flat", flat, 20, "--steps 20 (was 12)", 0, 0),
            ("flat", [*flat, "--shuffle", "--weight-decay", 0.2, "--no-decay-1d", "--beta2", 0.99, "--clip", 2], 20,
             "--shuffle on (was off), --weight-decay 0.2 (was 0.1), --no-decay-1d on (was off), "
             "--beta2 0.99 (was 0.95), --clip 2 (was 1), --steps 20 (was 12)", 1, 12),
            ("flat", [*flat, "--grad-accum", 2], 13, "--total-batch 6 (was 3), --steps 13 (was 12)", 1, 12),
            ("flat", [*flat, "--train-data", self.path("tokens.bin") + ":1"], 13,
             f"--train-data {self.path('tokens.bin')}:1 (was {self.path('tokens.bin')}), --steps 13 (was 12)", 1, 12),
        ):
            lines, warnings = told(run, *flags, steps=steps)
            if last:
                words = f"step_00000012: changed with the resume: {changes}; steps {first} to {last} were trained with"
                expect(not lines and len(warnings) == 1 and words in warnings[0], f"{changes}: {lines} {warnings}")
            else:
                want = [f"changed with the resume: {changes}"]
                expect((lines, warnings) == (want, []), f"{changes}: {lines} {warnings}")
        for run, flags in (("linear", ["--warmup", 2]), ("flat", flat)):
            expect(told(run, *flags) == ([], []), "something is said of an unchanged schedule")

    def stopped_in(self, out, *more):
        """SIGTERM while something long goes on behind step 6: the run ends at once, with a checkpoint of that step."""
        command = [self.args.train_gpt, *map(str, self.small(out, "--log-every", 1, *more))]
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in p.stdout:
            if line.startswith("step      5/12"):
                break
        time.sleep(1)  # step 6 takes milliseconds
        begin = time.time()
        p.send_signal(signal.SIGTERM)
        said, error = p.communicate(timeout=100)
        seconds = time.time() - begin
        expect(p.returncode == 0 and "asked to stop: saved after step 6" in said, f"{p.returncode}: {said} {error}")
        expect(seconds < 10, f"it took {seconds:.1f} s")  # else it would be minutes
        expect([r["val_loss"] for r in read_log(self.path(out))] == [""] * 6, "the log")
        rows = self.run(*self.small(out, "--log-every", 1, "--resume", "--val-every", 0)).count("step  ")
        expect(rows == 6, f"resumed, it took {rows} steps")

    def stopped_in_validation(self):
        self.stopped_in("stopped_val", "--val-data", self.path("tokens.bin"), "--val-every", 6, "--val-batches", 10**6)

    def stopped_in_probe(self):
        self.stopped_in("stopped_probe", "--probe", 6, "--probe-batches", 190)
        expect(len(read_rows(self.path("stopped_probe/curvature.csv"))) == 1, "rows of a probe that did not finish")

    def keep_best(self):
        """Data that the first steps learn and the others spoil: the best is none of the last."""
        write_shard(self.path("easy.bin"), [7] * 3000)
        state, hard = 1, []
        for _ in range(20000):
            state = (state * 1103515245 + 12345) % 2**31
            hard.append(state // 65536 % 64)
        write_shard(self.path("mixed.bin"), [7] * 612 + hard)  # 18 windows of 34: 6 steps
        flags = ("--val-data", self.path("easy.bin"), "--val-every", 2, "--val-batches", 5, "--keep-best", "--lr", 0.03,
                 "--save-every", 2, "--keep", 2)
        said = self.run(*self.small("best", *flags, steps=16, data="mixed.bin"))
        rows = {int(r["step"]): float(r["val_loss"]) for r in read_log(self.path("best")) if r["val_loss"]}
        best = min(rows, key=rows.get)
        expect(2 < best < 12, f"the best step is {best}: {rows}")
        there = sorted(n for n in os.listdir(self.path("best")) if n.startswith("step_"))
        expect(there == [f"step_{s:08d}" for s in (best, 14, 16)], f"kept {there}, the best is {best}")
        expect(f"lowest validation loss {rows[best]:.4f}, in {self.path('best')}/step_{best:08d}" in said, said)
        # resumed, without validating anew what was the best
        self.run(*self.small("best", *flags, "--resume", steps=20, data="mixed.bin"))
        there = sorted(n for n in os.listdir(self.path("best")) if n.startswith("step_"))
        expect(there == [f"step_{s:08d}" for s in (best, 18, 20)], f"then kept {there}")
        # without --save-every it is saved when it comes
        self.run(*self.small("best2", *flags, "--save-every", 0, steps=16, data="mixed.bin"))
        there = sorted(n for n in os.listdir(self.path("best2")) if n.startswith("step_"))
        expect(f"step_{best:08d}" in there and len(there) <= 3, f"kept {there}")

    def mixtures(self):
        """Two sources by weight, said with their epochs; resumed, the same bits."""
        write_shard(self.path("few.bin"), [3] * 340)  # 10 windows
        self.small("x")
        data = f"{self.path('tokens.bin')}:0.75,{self.path('few.bin')}:0.25"
        said = self.run(*self.small("mix", "--train-data", data, "--shuffle", steps=40))
        self.same_matmuls("mix", "mix2")
        expect(f"data: 75.00% {self.path('tokens.bin')}, 0.153 epochs in all" in said, said)
        expect(f"data: 25.00% {self.path('few.bin')}, 3 epochs in all" in said, said)
        self.run(*self.small("mix2", "--train-data", data, "--shuffle", "--save-every", 20, "--keep", 0, steps=40))
        shutil.rmtree(self.path("mix2/step_00000040"))
        self.run(*self.small("mix2", "--train-data", data, "--shuffle", "--resume", steps=40))
        losses = [[r["loss"] for r in read_log(self.path(n))] for n in ("mix", "mix2")]
        expect(losses[0] == losses[1], "the logs differ")

    def documents(self):
        """Kept apart they give other losses, but where a window is one document the same bits; it is said, and kept."""
        tokens = [256 if i % 20 == 0 else i * 7 % 97 for i in range(3400)]
        write_shard(self.path("many.bin"), tokens)
        write_shard(self.path("long.bin"), [256 if i % 34 == 0 else t % 97 for i, t in enumerate(tokens)])
        losses = {}
        for data in ("many.bin", "long.bin"):
            for how in ("joined", "separate"):
                flags = ("--vocab-size", 258, "--tokenizer", "bytes", "--documents", how, "--save-every", 12)
                said = self.run(*self.small(data + how, *flags, data=data))
                if how == "joined":
                    self.same_matmuls(data + how, data + "separate", "val")
                expect(("documents: separate, each begins with token 256" in said) == (how == "separate"), said)
                losses[data, how] = [r["loss"] for r in read_log(self.path(data + how))]
        expect(losses["long.bin", "joined"] == losses["long.bin", "separate"], "windows of one document differ")
        expect(losses["many.bin", "joined"] != losses["many.bin", "separate"], "windows of several do not")
        # eval does as the training did
        val = ("--val-data", self.path("many.bin"), "--val-batches", 33)
        got = json.loads(self.run("eval", "--checkpoint", self.path("many.binseparate"), "--batch-size", 3, *val))
        self.run(*self.small("val", *flags, *val, "--val-every", 12, data="many.bin"))
        (loss,) = [float(r["val_loss"]) for r in read_log(self.path("val")) if r["val_loss"]]
        expect(abs(got["loss"] - loss) < 1e-5, f"eval has {got['loss']}, the training {loss}")
        (warning,) = self.told("many.binseparate", "--vocab-size", 258, "--tokenizer", "bytes", "--train-data",
                               self.path("many.bin"), steps=13)[1]
        expect("--documents joined (was separate), --steps 13" in warning, warning)

    def keep(self):
        self.run(*self.small("keep", "--save-every", 3, "--keep", 2))
        there = sorted(n for n in os.listdir(self.path("keep")) if "step" in n)
        expect(there == ["step_00000009", "step_00000012"], f"kept {there}")
        error = self.run(*self.small("keep", "--save-every", 3), ok=False)
        expect("--resume" in error, error)
        error = self.run(*self.small("keep", "--resume", "--dim", 64), ok=False)
        expect("dim 32" in error and "64" in error, error)
        out = self.run(*self.small("keep", "--resume"))
        expect("--steps 12: are done; nothing is left to train" in out, out)

    def import_export(self):
        self.run(*self.small("seed", "--export", self.path("seed.st"), steps=0))
        self.run(*self.small("again", "--init-from", self.path("seed.st"), "--export", self.path("again.st"), steps=0))
        expect(open(self.path("seed.st"), "rb").read() == open(self.path("again.st"), "rb").read(), "round trip differs")

    def seed_tensors(self):
        if not os.path.exists(self.path("seed.st")):
            self.import_export()
        return read_safetensors(self.path("seed.st"))

    def passed_through(self, weights, *flags):
        """what the trainer exports of weights that it only imports"""
        out = self.path("through.st")
        self.run(*self.small("through", "--init-from", weights, "--export", out, *flags, steps=0))
        return read_safetensors(out)

    def export_dtype(self):
        """bf16: rounded to nearest, ties to even; what is bf16 stays as it is, in and out."""
        tensors, _ = self.seed_tensors()
        # ties up and down, beside them, subnormal, -0, the largest float (rounds to infinity), infinity
        bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF828000, 0xBF838000, 0x00008000, 0x00018000,
                0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000]
        bits += [0x3F800000 + 0x1357 * i for i in range(32 - len(bits))]
        tensors["norm.weight"] = ("F32", [32], struct.pack("<32I", *bits))
        write_safetensors(self.path("ties.st"), tensors)
        half, _ = self.passed_through(self.path("ties.st"), "--export-dtype", "bf16")
        for name, (dtype, shape, data) in tensors.items():
            words = array.array("I", data)
            want = array.array("H", [(w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words]).tobytes()
            expect(half[name] == ("BF16", shape, want), f"{name} is not rounded to nearest even")
        with open(self.path("through.st"), "rb") as f:
            first = f.read()
        os.rename(self.path("through.st"), self.path("half.st"))
        self.passed_through(self.path("half.st"), "--export-dtype", "bf16")
        expect(open(self.path("through.st"), "rb").read() == first, "bf16 passes through with other bits")
        wide, _ = self.passed_through(self.path("half.st"))
        for name, (_, shape, data) in half.items():
            want = array.array("I", [h << 16 for h in array.array("H", data)]).tobytes()
            expect(wide[name] == ("F32", shape, want), f"{name} changes when bf16 becomes fp32")

    def import_halves(self):
        tensors, _ = self.seed_tensors()
        halves, want = {}, {}
        for name, tensor in tensors.items():
            numbers = list(values(tensor))
            if name == "norm.weight":
                numbers[:8] = 0.0, -0.0, 2.0 ** -24, -3.0 * 2.0 ** -24, 2.0 ** -14, 65504.0, math.inf, -math.inf
            data = struct.pack(f"<{len(numbers)}e", *numbers)
            halves[name] = ("F16", tensor[1], data)
            want[name] = ("F32", tensor[1], struct.pack(f"<{len(numbers)}f", *struct.unpack(f"<{len(numbers)}e", data)))
        write_safetensors(self.path("f16.st"), halves)
        expect(self.passed_through(self.path("f16.st"))[0] == want, "fp16 is not read as it is")

    def metadata(self):
        """An export says what its tensors do not, and it is looked at."""
        tensors, metadata = self.seed_tensors()
        config = json.loads(metadata["config"])
        want = dict(backbone="llama", variant="simplegpt", norm="rmsnorm", dim="32", layers="2", heads="2",
                    kv_heads="2", hidden="96", vocab_size="65", rope_theta="10000", seq_len="33", max_seq_len="33")
        expect(metadata["format"] == "pt" and {k: config[k] for k in want} == want, f"metadata is {metadata}")
        expect(abs(float(config["norm_eps"]) - 1e-5) < 1e-12, "norm_eps is not 1e-5")
        for flag, value, words in (("--norm", "layernorm", ["norm rmsnorm", "Make it rmsnorm"]),
                                   ("--heads", 1, ["heads 2", "Make it 2"])):
            self.bad(self.small("bad", "--init-from", self.path("seed.st"), flag, value), "seed.st", *words)
        flags = self.small("theta", "--init-from", self.path("seed.st"), "--rope-theta", 5e5, steps=0)
        r = subprocess.run([self.args.train_gpt, *map(str, flags)], capture_output=True, text=True)
        told = r.stderr.count("\n") == 1 and "warning" in r.stderr and "rope_theta 10000" in r.stderr
        expect(r.returncode == 0 and told, f"another rope_theta is not told, or not only told: {r.stderr!r}")
        for strange in ({"config": "}"}, {"config": "[1]"}, {"more": "x"}):
            write_safetensors(self.path("strange.st"), tensors, strange)  # another program's metadata is no trouble
            expect(self.passed_through(self.path("strange.st"))[0] == tensors, f"not imported with metadata {strange}")

    def rope_scaling(self):
        """RoPE stretched is another model: checkpoint and export name it, and so must who goes on from them."""
        scaling, data, weights = "4,1,4,16", self.path("tokens.bin"), self.path("scaled.st")
        plain = self.small("unscaled", "--save-every", 12)
        flags = self.small("scaled", "--rope-scaling", scaling, "--save-every", 12, "--export", weights)
        self.run(*plain)
        for text in (self.run(*flags), self.run(*flags, "--plan")):
            expect(", T 33, RoPE scaled 4,1,4,16; " in text, f"the plan does not say it: {text[:300]}")
        runs = ("unscaled", "scaled")
        losses = [read_log(self.path(run))[0]["loss"] for run in runs]
        expect(losses[0] != losses[1], "the first loss is the same with scaled RoPE")
        configs = [json.load(open(self.path(f"{run}/step_00000012/state.json")))["config"] for run in runs]
        expect([c.get("rope_scaling") for c in configs] == [None, scaling], f"checkpoints have {configs}")
        expect(json.loads(read_safetensors(weights)[1]["config"])["rope_scaling"] == scaling, "the export has it not")
        self.bad([*plain, "--resume", "--rope-scaling", scaling], "has rope_scaling none, this run 4,1,4,16. Resume")
        self.bad(self.small("scaled", "--rope-scaling", "none", "--resume"), "has rope_scaling 4,1,4,16, this run none.")
        self.run(*flags, "--resume")

        def evaluated(*more):
            command = [self.args.train_gpt, "eval", *map(str, more), "--val-data", data, "--val-batches", "3"]
            r = subprocess.run(command, capture_output=True, text=True)
            expect(r.returncode == 0, r.stderr)
            return json.loads(r.stdout)["loss"], r.stderr

        shape = flags[:flags.index("--batch-size")]
        loss, said = evaluated("--checkpoint", self.path("scaled"))
        again, told = evaluated("--init-from", weights, *shape, "--rope-scaling", scaling)
        expect("warning" not in said + told and (self.args.bf16 or loss == again), f"{loss}, {again}, {said}{told}")
        other, told = evaluated("--init-from", weights, *shape)
        expect(other != loss and "its model has rope_scaling 4,1,4,16, this one none." in told, f"{other}, {told}")
        for value in ("8", "8,1,4", "8,1,4,32x", "x,1,4,32", "inf,1,4,32", "nan,1,4,32"):
            self.bad([*plain, "--rope-scaling", value], "--rope-scaling: ", "32,1,4,8192")
        for value in ("0.5,1,4,32", "8,0,4,32", "8,4,4,32", "8,1,4,0"):
            self.bad([*plain, "--rope-scaling", value], "--rope-scaling: ", "0 < LOW < HIGH")
        self.bad([*plain, "--rope-scaling", scaling, "--backbone", "nanogpt"], "--rope-scaling: ", "llama backbone")

    def folders(self):
        """Weights in several files, as Hugging Face has them."""
        tensors, _ = self.seed_tensors()
        folder = self.path("folder")
        os.mkdir(folder)
        names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        parts = [dict(list(tensors.items())[i::3]) for i in range(3)]
        for name, part in zip(names, parts):
            write_safetensors(os.path.join(folder, name), part)
        index = os.path.join(folder, "model.safetensors.index.json")
        flags = self.small("bad", "--init-from", folder)

        def write_index(text):
            with open(index, "w") as f:
                f.write(text)

        weight_map = {t: name for name, part in zip(names, parts) for t in part}
        self.bad(flags, "folder", "model.safetensors.index.json")
        write_index(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
        write_safetensors(os.path.join(folder, "model-00001-of-00002.safetensors"), parts[0])  # of an earlier export
        expect(self.passed_through(folder)[0] == tensors, "several files are read as other weights")
        for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
                     '{"weight_map": {"a": "../b"}}'):
            write_index(text)
            self.bad(flags, "index.json")
        write_index(json.dumps({"weight_map": {**weight_map, "norm.weight": "model-00004-of-00003.safetensors"}}))
        self.bad(flags, "model-00004-of-00003.safetensors")
        write_index(json.dumps({"weight_map": {**weight_map, "x": "model-00001-of-00002.safetensors"}}))
        self.bad(flags, "another file of the folder")
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors)  # the one whole file is preferred
        expect(self.passed_through(folder)[0] == tensors, "model.safetensors of a folder is not read")

    def sample(self):
        text = self.run(*self.small("sample", "--tokenizer", "bytes", "--vocab-size", 258, "--sample-every", 6,
                                    "--sample-tokens", 40, "--prompt", "abc"))
        expect(text.count("--- sample at step") == 2 and "\nabc" in text, "no two samples that begin with the prompt")

    def no_decay_1d(self):
        """One update with and without it: 1-D tensors differ by what was decayed, the others not at all."""
        ends = []
        for more in ([], ["--no-decay-1d"]):
            self.run(*self.small("decay", "--lr", 0.01, "--weight-decay", 10, "--export", self.path("decay.st"), *more, steps=1))
            ends.append(read_safetensors(self.path("decay.st"))[0])
        for name, tensor in ends[0].items():
            decayed, spared = values(tensor), values(ends[1][name])
            if len(tensor[1]) > 1:
                expect(decayed == spared, f"{name} is not 1-D and differs")
            else:  # gains begin as 1; bf16 masters are exported as they are
                worst = max(abs(b - a - 0.1) for a, b in zip(decayed, spared))
                expect(worst < (5e-3 if self.args.bf16 else 1e-6), f"{name} is off by {worst:.1e}")

    def log_every(self):
        """On the terminal; the file has every step."""
        text = self.run(*self.small("lines", "--log-every", 5))
        said = [int(line.split()[1].split("/")[0]) for line in text.splitlines() if line.startswith("step ")]
        expect(said == [1, 5, 10, 12], f"--log-every 5 says steps {said}")
        expect(len(read_log(self.path("lines"))) == 12, "the log lacks steps")

    def probe_updates(self):
        """weights.csv against the weights before and after a step, and the log's gradient norm."""
        begin, end = self.path("before.st"), self.path("after.st")
        self.run(*self.small("before", "--export", begin, steps=0))
        self.run(*self.small("after", "--init-from", begin, "--export", end, "--probe", 1, "--probe-iterations", 0,
                             "--no-decay-1d", "--weight-decay", 0.3, steps=1))
        before, after = ({n: values(t) for n, t in read_safetensors(path)[0].items()} for path in (begin, end))
        rows = read_rows(self.path("after/weights.csv"))
        expect(len(rows) == len(before) and all(r["step"] == "1" for r in rows), f"{len(rows)} rows: {rows[:1]}")
        norm = math.hypot(*(float(r["gradient"]) for r in rows))
        logged = float(read_log(self.path("after"))[0]["grad_norm"])
        expect(abs(norm / logged - 1) < 1e-5, f"gradients of norm {norm}, the log says {logged}")
        worst = 0
        for r in rows:
            layer = int(r["layer"])
            name = f"layers.{layer}.{r['tensor']}" if 0 <= layer < 2 else r["tensor"]
            weight = math.hypot(*before[name])
            update = math.hypot(*(b - a for a, b in zip(before[name], after[name]))) / weight
            expect(abs(float(r["weight"]) / weight - 1) < (1e-3 if self.args.bf16 else 1e-5), f"{name}: {weight} and {r}")
            worst = max(worst, abs(float(r["update"]) / update - 1))
        if self.args.verbose:
            print(f"    updates {worst:.1e} off")
        expect(worst < 5e-5, f"updates are {worst:.1e} off")  # measured 1.1e-5, of weights about 1

    def probe_batches(self):
        """The curvature of two batches is that of one that is as large as both, and not the first one's."""
        found = []
        for batches, size in ((2, 3), (1, 6), (1, 3)):
            out = f"probe{batches}x{size}"
            self.run(*self.small(out, "--probe", 1, "--probe-batches", batches, "--batch-size", size, steps=0))
            found.append(float(read_rows(self.path(out + "/curvature.csv"))[0]["eigenvalue"]))
        two, large, first = found
        expect(abs(two / large - 1) < 3e-4 and abs(first / large - 1) > 1e-2, f"eigenvalues {found}")

    def help(self):
        text = self.run("--help")
        for flag in ("--model", "--variant", "--train-data", "--grad-accum", "--resume", "--prompt"):
            expect(flag + " " in text, f"--help lacks {flag}")
        models = self.run("--models")
        expect("llama3-8B" in models and "nanogpt-1.4B" in models, "--models lacks flavours")

    def plan(self):
        text = self.run("--plan", "--model", "7B", "--seq-len", 2048, "--batch-size", "auto", "--total-batch", 8,
                        "--recompute", "block", "--moments", "bf16", "--device", "700,4000,1000")
        for words in ("6739513344 parameters", "1 x 8 sequences", "memory plan", "AdamW moments (bf16)", "activations (recompute block)",
                      "matmuls, forward", "recomputed", "tokens/s"):
            expect(words in text, f"--plan lacks '{words}'")
        expect("does not fit" in self.run("--plan", "--model", "13B"), "13B is said to fit")
        hours = self.run("--plan", "--model", "7B", "--steps", 2**50).rpartition("take at least ")[2].partition("h")[0]
        expect(int(hours) > 2**31 / 3600, f"2^50 steps take {hours} hours")
        many = self.run("--plan", "--model", "1B", "--ranks", 8, "--zero", 3)
        expect("on 8 ranks, ZeRO 3" in many and "sent by a rank, ZeRO 3" in many, "--plan --ranks 8 says nothing of ranks")

    def memory_options(self):
        """Every recompute level, graphs and a total batch train the same weights; moments in bf16 nearly the same."""
        def export(name, *flags):
            self.run(*self.small(name, "--export", self.path(name + ".st"), *flags))
            return open(self.path(name + ".st"), "rb").read(), read_log(self.path(name))
        weights, log = export("plain", "--grad-accum", 2)
        self.same_matmuls("plain", "norm", "ffn", "block", "total")
        for name, flags in (("norm", ["--recompute", "norm"]), ("ffn", ["--recompute", "ffn"]),
                            ("block", ["--recompute", "block", "--graph"])):
            expect(export(name, "--grad-accum", 2, *flags)[0] == weights, f"--recompute {name} changes the weights")
        batch = self.small("x")[self.small("x").index("--batch-size") + 1]
        expect(export("total", "--total-batch", 2 * int(batch))[0] == weights, "--total-batch is not --grad-accum")
        more = ["--no-master", "--gradients", "bf16"] if self.args.bf16 else []
        rough = export("rough", "--grad-accum", 2, "--moments", "bf16", *more)[1]
        expect(abs(float(rough[-1]["loss"]) / float(log[-1]["loss"]) - 1) < 0.02, "bf16 moments train worse")
        whole = export("rough2", "--grad-accum", 2, "--moments", "bf16", "--save-every", 5, *more)[0]
        shutil.rmtree(self.path("rough2/step_00000012"))
        expect(export("rough2", "--grad-accum", 2, "--moments", "bf16", "--save-every", 5, "--resume", *more)[0] == whole,
               "a resume with bf16 moments has other bits")

    # --- bad input: one line, exit 1

    def bad(self, flags, *words):
        error = self.run(*flags, ok=False)
        for word in words:
            expect(word in error, f"'{word}' is missing in: {error}")

    def bad_shard(self, name, data, *words):
        path = self.path(name)
        with open(path, "wb") as f:
            f.write(data)
        self.small("x")  # the good shard, for comparison
        self.bad(self.small("bad", data=name), name, *words)

    def bad_weights(self, name, edit, *words):
        seed = self.path("seed.st")
        if not os.path.exists(seed):
            self.import_export()
        path = self.path(name)
        edit(seed, path)
        self.bad(self.small("bad", "--init-from", path), name, *words)

    def all(self):
        for d in self.args.golden:
            for name in sorted(os.listdir(d)):
                if name.endswith(".safetensors"):
                    self.test("golden " + name, self.golden, os.path.join(d, name))
        for body in (self.help, self.same_twice, self.loss_falls, self.resume, self.schedules, self.prolonged,
                     self.changed_schedules, self.keep, self.keep_best, self.mixtures, self.documents,
                     self.stopped_in_validation, self.import_export, self.export_dtype, self.import_halves,
                     self.metadata, self.rope_scaling, self.folders, self.sample, self.plan, self.memory_options,
                     self.probe, self.probe_updates, self.no_decay_1d, self.log_every):
            self.test(body.__name__, body)
        if not self.args.bf16:  # whose probe leaves curvature out
            self.test("stopped_in_probe", self.stopped_in_probe)
            self.test("probe_batches", self.probe_batches)
        for name in sorted(os.listdir(CURVATURE)):
            self.test("curvature " + name, self.curvature, os.path.join(CURVATURE, name))

        small = self.small
        header = lambda *h: struct.pack("<256i", *h, *[0] * (256 - len(h)))
        for name, flags, words in (
            ("unknown option", ["--nonsense"], ["--nonsense"]),
            ("missing value", ["--lr"], ["--lr"]),
            ("not a number", small("bad", "--lr", "fast"), ["--lr", "fast"]),
            ("stray argument", small("bad", "stray"), ["stray"]),
            ("unknown flavour", small("bad", "--model", "9B"), ["9B", "llama3-8B"]),
            ("unknown variant", small("bad", "--variant", "postnorm"), ["postnorm"]),
            ("dim over heads", small("bad", "--dim", 33), ["33", "2 heads"]),
            ("head size", small("bad", "--dim", 24), ["head size 12", "multiple of 8"]),
            ("feed-forward width", small("bad", "--dim", 2**20, "--ffn-mult", 999), ["--ffn-mult"]),
            ("kv heads", small("bad", "--dim", 96, "--heads", 6, "--kv-heads", 4), ["6", "4"]),
            ("warmup", small("bad", "--warmup", 100), ["--warmup"]),
            ("schedule", small("bad", "--schedule", "exp"), ["--schedule", "exp", "linear|cosine|wsd|constant"]),
            ("least rate above the peak", small("bad", "--lr", 1e-3, "--min-lr", 2e-3),
             ["--min-lr: 0.002", "--lr, 0.001"]),
            ("least rate of constant", small("bad", "--schedule", "constant", "--min-lr", 0), ["--min-lr", "constant"]),
            ("fall of constant", small("bad", "--schedule", "constant", "--decay-steps", 3),
             ["--decay-steps", "constant"]),
            ("fall of linear", small("bad", "--decay-steps", 3), ["--decay-steps", "linear", "wsd"]),
            ("fall of no step", small("bad", "--schedule", "wsd", "--decay-steps", 0), ["--decay-steps: '0'"]),
            ("fall longer than the run", small("bad", "--schedule", "wsd", "--warmup", 2, "--decay-steps", 11),
             ["--decay-steps: 11", "10"]),
            ("one dash", small("bad", "-nonsense"), ["-nonsense: unknown option"]),
            ("documents without BOS", small("bad", "--documents", "separate"), ["--documents", "--tokenizer"]),
            ("best without validation", small("bad", "--keep-best"), ["--keep-best", "--val-data"]),
            ("value of a switch", small("bad", "--shuffle=1"), ["--shuffle: takes no value"]),
            ("epsilon of 0", small("bad", "--adam-eps", 0), ["--adam-eps"]),  # 0/0 where a token was not seen yet
            ("more batches than data", small("bad", "--probe", 1, "--probe-batches", 10**9),
             ["--probe-batches", "196 of"]),
            ("out is empty", small("bad", "--out", ""), ["--out: is empty"]),
            ("no data", ["--out", self.path("bad")], ["--train-data"]),
            ("missing shard", small("bad", data="nowhere*.bin"), ["nowhere"]),
            ("vocabulary", small("bad", "--vocab-size", 20), ["tokens.bin", "20"]),
            ("too few tokens", small("bad", "--batch-size", 600), ["tokens.bin"]),
            ("sample without tokenizer", small("bad", "--sample-every", 2), ["--tokenizer"]),
            ("missing tokenizer", small("bad", "--tokenizer", self.path("nowhere.bin")), ["nowhere.bin"]),
            ("out is a file", small("tokens.bin"), ["tokens.bin"]),
            ("out below a file", small("tokens.bin/x"), ["tokens.bin/x"]),
            ("validation without data", small("bad", "--val-every", 2), ["--val-data"]),
            ("export without parent", small("bad", "--export", self.path("no/file.st")), ["no/file.st"]),
            ("too little memory", small("bad", "--dim", 4096, "--layers", 8000, "--heads", 32), ["memory", "smaller model"]),
            ("too little memory, with samples", small("bad", "--dim", 4096, "--layers", 8000, "--heads", 32, "--sample-every",
                                                      2, "--tokenizer", "bytes", "--vocab-size", 258),
             ["memory", "smaller model or --seq-len"]),
            ("unknown device", ["--plan", "--device", "h300"], ["h300", "h200"]),
            ("total batch", small("bad", "--batch-size", 4, "--total-batch", 6), ["--total-batch", "6", "4"]),
            ("recompute", small("bad", "--recompute", "all"), ["--recompute", "all"]),
            ("export dtype", small("bad", "--export-dtype", "fp16"), ["--export-dtype", "fp16"]),
            ("missing weights", small("bad", "--init-from", self.path("nowhere.st")), ["nowhere.st"]),
        ):
            self.test("bad: " + name, self.bad, flags, *words)

        tokens = array.array("H", range(60)).tobytes() * 50
        for name, data, words in (
            ("empty.bin", b"", []), ("short.bin", b"abc" * 100, []),
            ("truncated.bin", header(20240520, 1, 10**6) + tokens, ["1000000", "3000"]),
            ("negative.bin", header(20240520, 1, -5) + tokens, []),
            ("foreign.bin", b"PK\3\4" + tokens, []), ("version.bin", header(20240520, 9, 3000) + tokens, ["9"]),
            ("few.bin", header(20240520, 1, 60) + tokens[:120], ["60"]),
        ):
            self.test("bad: shard " + name, self.bad_shard, name, data, *words)

        def edited(change):
            def edit(source, target):
                tensors, _ = read_safetensors(source)
                change(tensors)
                write_safetensors(target, tensors)
            return edit

        def raw(change):
            def edit(source, target):
                with open(source, "rb") as f, open(target, "wb") as g:
                    g.write(change(f.read()))
            return edit

        def reshape(t):
            t["output.weight"] = ("F32", t["output.weight"][1][::-1], t["output.weight"][2])

        for name, edit, words in (
            ("missing.st", edited(lambda t: t.pop("norm.weight")), ["norm.weight"]),
            ("extra.st", edited(lambda t: t.update(more=("F32", [1], b"abcd"))), ["more"]),
            ("shape.st", edited(reshape), ["output.weight is (32, 65) there, (65, 32) in this model"]),
            ("int.st", edited(lambda t: t.update({"norm.weight": ("I32", [32], bytes(128))})), ["norm.weight", "I32"]),
            ("byte.st", edited(lambda t: t.update({"norm.weight": ("U8", [32], bytes(32))})), ["norm.weight is U8"]),
            ("foreign.st", edited(lambda t: t.update({"model.embed_tokens.weight": t.pop("tok_embeddings.weight")})),
             ["Hugging Face", "dev/hf/import.py"]),
            ("cut.st", raw(lambda b: b[:-10]), ["cut short"]), ("json.st", raw(lambda b: b[:20] + b"}}" + b[22:]), []),
            ("length.st", raw(lambda b: b"\xff" * 8 + b[8:]), ["length"]), ("empty.st", raw(lambda b: b""), []),
        ):
            self.test("bad: weights " + name, self.bad_weights, name, edit, *words)


def run_all(name, tests_of, parser):
    """Runs a class of tests with the parser's options and --filter; prints the total, returns the exit status."""
    parser.add_argument("--filter", default="", help="only tests whose name holds this")
    args = parser.parse_args()
    args.train_gpt = os.path.abspath(args.train_gpt)
    tests = tests_of(args)
    try:
        tests.all()
    finally:
        shutil.rmtree(tests.dir, ignore_errors=True)
    print(f"{name}: {tests.passed} passed, {tests.failed} failed")
    return 1 if tests.failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_gpt")
    parser.add_argument("golden", nargs="*", help="folders of golden files")
    parser.add_argument("--bf16", action="store_true", help="the trainer is a bf16 build: losses within 2%%, no more")
    parser.add_argument("--verbose", action="store_true", help="print the errors of golden files")
    return run_all("test_cli", Tests, parser)


if __name__ == "__main__":
    sys.exit(main())
