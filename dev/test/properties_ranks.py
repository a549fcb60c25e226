#!/usr/bin/env python3
"""Random configurations through the command line: the training of one rank is that of 2, 3 and 4 at every ZeRO level
and of other micro-batches, up to rounding; levels among themselves, and levels of recomputation, give the same bits.
Standard library, g++'s trainer and mpirun only.

usage: properties_ranks.py TRAIN_GPT [--cases N] [--seed S] [--case N] [--full] [--bf16] [--jobs N]

A case runs, beside one rank alone and one with other micro-batches, 2, 3 and 4 ranks at one level each, with --full at
all. One that fails prints its flags and the command that repeats just it.
"""
import math
import random
import sys

from launch import Tests, contents, expect, log_bits, losses, read_safetensors, run, same_matmuls, values
from test_cli import distance

TOTAL, STEPS = 12, 4  # sequences of a step, which 1 to 4 ranks share
# Of losses near 5, and of weights relative to their length. Measured in fp32 over 60 configurations 5e-5 and 1.6e-4,
# with rounding at random 1.1e-4 and 1.3e-4; in bf16 over 25 4.9e-3 and 4.9e-3. (AdamW makes a gradient that is nothing
# but rounding a step of full size.)
TOLERANCE = {"fp32": (1e-4, 3e-4), "bf16": (1e-2, 1e-2), "random": (2e-4, 3e-4)}


def configuration(r, bf16):
    """Flags of a small model and its training."""
    llama, size = r.random() < 0.7, r.choice([8, 16, 16, 32, 64, 72, 128, 256])
    kv = r.randint(1, 2 if size > 64 else 3)
    heads = kv * r.randint(1, 2) if llama else kv
    flags = ["--backbone", "llama" if llama else "nanogpt",
             "--variant", r.choice(["simplegpt", "prenorm", "preqknorm"]),
             "--norm", r.choice(["rmsnorm", "rmsnorm", "layernorm"]), "--dim", heads * size, "--heads", heads,
             "--layers", r.randint(1, 4), "--vocab-size", r.randint(61, 200), "--seq-len", r.randint(1, 24),
             "--norm-eps", r.choice([1e-5, 1e-6]), "--recompute", r.choice(["none", "norm", "ffn", "block"])]
    if llama:
        flags += ["--kv-heads", kv, "--multiple-of", 8 * r.randint(1, 3) if bf16 else r.randint(1, 20),
                  "--ffn-mult", round(r.uniform(0.3, 1.3), 2), "--rope-theta", r.choice([1e4, 5e5])]
    else:
        flags += ["--max-seq-len", 24 + r.randint(0, 3)]
    flags += ["--lr", r.choice([1e-3, 3e-3]), "--clip", r.choice([0, 0.5, 1]), "--weight-decay", r.choice([0, 0.1]),
              "--warmup", r.randint(0, 2), "--seed", r.randint(0, 99), "--moments", r.choice(["fp32", "fp32", "bf16"])]
    flags += r.choice([[], ["--shuffle"]]) + r.choice([[], ["--no-decay-1d"]])
    if bf16:
        flags += r.choice([[], ["--no-master"]])
    return flags


class Properties(Tests):
    @staticmethod
    def arguments(parser):
        parser.add_argument("--cases", type=int, default=2, help="configurations (2)")
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument("--case", type=int, help="only this one")
        parser.set_defaults(jobs=1)

    def all(self):
        numbers = range(self.args.cases) if self.args.case is None else [self.args.case]
        for number in numbers:
            self.test(f"case {number}", self.case, number)

    def case(self, number):
        r = random.Random(self.args.seed * 1000003 + number)
        flags = configuration(r, self.args.bf16)
        try:
            self.compare(r, flags, f"case{number}_")
        except Exception as e:
            repeat = f"{sys.argv[0]} {self.args.train_gpt} --case {number} --seed {self.args.seed}"
            repeat += " --full" * self.full + " --bf16" * self.args.bf16
            raise type(e)(f"{e}\n  flags: {' '.join(map(str, flags))}\n  again: {repeat}") from None

    def trained(self, name, flags, micro, ranks, *more):
        """Losses, bits of log and weights, weights. ranks 0: without mpirun."""
        out, export = self.path(name), self.path(name + ".st")
        run(self.exe, [*flags, "--total-batch", TOTAL, "--batch-size", micro, "--steps", STEPS, "--train-data",
                       self.path("tokens.bin"), "--out", out, "--export", export, "--check-every", 0, *more], ranks)
        tensors = read_safetensors(export)[0]
        return losses(out), (log_bits(out), contents(export)), {n: values(t) for n, t in tensors.items()}

    def close(self, got, want, what, flags):
        expect(len(got[0]) == STEPS and all(map(math.isfinite, got[0])), f"{what}: losses {got[0]}")
        at_random = "--no-master" in flags or flags[flags.index("--moments") + 1] == "bf16"
        kind = "bf16" if self.args.bf16 else "random" if at_random else "fp32"
        off = (max(abs(a - b) for a, b in zip(got[0], want[0])),
               distance(sum(map(list, got[2].values()), []), sum(map(list, want[2].values()), [])))
        for name, value, most in zip(("loss", "weights"), off, TOLERANCE[kind]):
            self.note(f"{name}, {kind}", value)
            expect(value <= most, f"{what}: the {name} off by {value:.2e}, more than {most:.0e}")

    def compare(self, r, flags, name):
        whole = self.trained(name + "1", flags, TOTAL, 0)
        level = r.choice([x for x in ("none", "norm", "ffn", "block") if x not in flags])
        other = [level if f in ("none", "norm", "ffn", "block") else f for f in flags]
        same_matmuls(self.path(name + "1"), self.path(name + "r"))
        expect(self.trained(name + "r", other, TOTAL, 0)[1] == whole[1], f"--recompute {level} gives other bits")
        split = r.choice([1, 2, 3, 4, 6])
        self.close(self.trained(name + "s", flags, split, 0), whole, f"micro-batches of {split}", flags)
        for ranks in (2, 3, 4):
            micro = r.choice([m for m in range(1, TOTAL // ranks + 1) if TOTAL // ranks % m == 0])
            first = None
            for zero in range(4) if self.full else [r.randint(0, 3)]:
                what = f"{ranks} ranks, --zero {zero}, micro-batches of {micro}"
                same_matmuls(self.path(f"{name}{ranks}_0"), self.path(f"{name}{ranks}_{zero}"))
                got = self.trained(f"{name}{ranks}_{zero}", flags, micro, ranks, "--zero", zero)
                self.close(got, whole, what, flags)
                first = first or got
                expect(got[1] == first[1], f"{what}: other bits than --zero 0")
            if self.full and micro < TOTAL // ranks:
                got = self.trained(f"{name}{ranks}_each", flags, micro, ranks, "--zero", r.choice([2, 3]),
                                   "--reduce", "each")
                self.close(got, whole, f"{ranks} ranks, --reduce each, micro-batches of {micro}", flags)


if __name__ == "__main__":
    sys.exit(Properties.main("properties_ranks", __doc__))
