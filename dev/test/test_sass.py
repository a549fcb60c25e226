#!/usr/bin/env python3
"""Tests of the machine code that nvcc makes of the trainer's kernels: tensor cores are used and their products run
together, registers suffice, rows move 16 bytes at a time. Standard library only; takes nvcc and nvdisasm, no GPU.

usage: dev/test/test_sass.py [--quick] [--table] [--fetch] [--source DIR]
  --quick       bf16 for sm_90a alone, else fp32 and sm_80 too
  --table       prints registers, shared memory, stack and spills of each kernel (bytes)
  --fetch       nvdisasm from pip, to build/sass, where no toolkit has it; it is found there later
  --source DIR  another tree than this one, e.g. a copy with a fault

Without nvcc or nvdisasm there is a line that says so, and no test. What is made lies in build/sass.
"""
import collections
import glob
import os
import re
import shutil
import subprocess
import sys
import unittest
import zipfile
from pathlib import Path

from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(sys.argv[sys.argv.index("--source") + 1] if "--source" in sys.argv else ROOT).resolve()
WORK = ROOT / "build/sass"
BUILDS = [("bf16", "90a"), ("bf16", "80"), ("fp32", "90a"), ("fp32", "80")]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

HOPPER = "attention_(forward|backward)_hopper_kernel<"
ATTENTION = "attention_(forward|backward)_kernel<"
# Kernels that may keep a little outside registers: most bytes of stack, and why. The others have none.
SPILLS = {
    ATTENTION: (128, "tiles take all 255 registers; left over are a few numbers that are needed once a tile"),
    "qkv_norm_rope_forward_kernel<4>": (8, "two registers, once a row, fp32 for sm_80 alone"),
}
SELDOM = 100  # instructions between two accesses of a thread to the same of these, at least

# What moves rows or flat buffers: how often, at least, it loads and stores 16 bytes and 8 (those in bf16 of FOUR
# neighbours), and what else it may load and store (bytes): statistics, angles, sums of columns, tokens, numbers.
Moves = collections.namedtuple("Moves", "load store other_loads other_stores load8 store8", defaults=(0, 0))


def moves(name, bf16):
    """the Moves of a kernel, None if it is of another kind"""
    kind, _, rest = name.partition("_kernel")
    words = re.findall(r"\w+", rest)
    if kind in ("add", "square_sum", "adamw"):
        half = [w == "bf16" for w in words]
        if kind == "adamw":  # gradients, two moments, master and params; without a master params are loaded
            moments, params = 2 * half[1], int(bf16)
            wide, narrow = 3 - moments, moments + params
            return Moves(wide + (not half[0]) + (not bf16), wide + (not bf16), {8, 4}, {8},
                         narrow + half[0], narrow)
        loads, stores = (2, 1) if kind == "add" else (1, 0)
        other = set() if kind == "add" else {4}
        return Moves(0, 0, {8}, {8} | other, loads, stores) if half[0] else Moves(loads, stores, set(), other)
    if kind == "attention_delta":
        return Moves(2, 0, set(), {4})
    if not bf16 or kind not in ROW_KERNELS:
        return None  # in fp32 rows have any width and move element by element
    packs = int(words[0]) if words else 1
    parts = 2 if words[1:] == ["true"] else 1
    rolled = kind == "ffn_norm_act_backward" and packs == 10  # this loop over the packs is one in the machine code too
    row = {
        "norm_residual_forward": Moves(3, 1, set(), {8}),  # x, res, gain; out
        "norm_backward": Moves(4, 1, {8}, {4}),  # x, dy, plus, gain; dx
        "qkv_norm_rope_forward": Moves(6, 3, {8}, {8}),  # x and gain of each part; q, k, v
        "qkv_norm_rope_backward": Moves(3, 1, {8}, {4}),  # x, dy, gain; draw, in a loop over the parts
        "ffn_norm_act_forward": Moves(2 * parts, 1, set(), {8}),  # x and gain of each part; out
        "ffn_norm_act_backward": Moves(2 * parts + 1, parts, {8}, {4}),  # those and dy; draw
        "embedding_forward": Moves(2, 1, {4}, set()),  # tok, pos; x
        "cross_entropy": Moves(2, 1, {4, 2}, {4}),  # the logits twice; their gradient
    }[kind]
    return row if rolled else row._replace(load=row.load * packs, store=row.store * packs)


ROW_KERNELS = {"norm_residual_forward", "norm_backward", "qkv_norm_rope_forward", "qkv_norm_rope_backward",
               "ffn_norm_act_forward", "ffn_norm_act_backward", "embedding_forward", "cross_entropy"}
FLAT_KERNELS = {"add", "square_sum", "adamw", "attention_delta"}


def find_nvdisasm():
    """the toolkit's, a Python package's (pip's own or triton's), or what was fetched"""
    packages = [found for folder in sys.path for package in ("nvidia/cu*", "triton/backends/nvidia")
                for found in glob.glob(os.path.join(glob.escape(folder or "."), package, "bin/nvdisasm"))]
    beside = [str(Path(NVCC).with_name("nvdisasm"))] if NVCC else []
    for name in ["nvdisasm", *beside, *packages, str(WORK / "nvdisasm")]:
        if shutil.which(name):
            return shutil.which(name)
    return None


def fetch_nvdisasm():
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    subprocess.run(["python3", "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-cache-dir",
                    "--no-deps", "-d", WORK / "wheel", "nvidia-cuda-nvdisasm==13.5.37"], check=True)
    with zipfile.ZipFile(next((WORK / "wheel").glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith("/bin/nvdisasm"))
        (WORK / "nvdisasm").write_bytes(wheel.read(name))
    (WORK / "nvdisasm").chmod(0o755)
    shutil.rmtree(WORK / "wheel")


def run(*command, cwd=ROOT):
    """what it prints; raises with it where it fails"""
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:80]}: {done.stdout[-2000:]}")
    return done.stdout


# one instruction: labels before it, its predicate ("" for none), opcode, operands
Instruction = collections.namedtuple("Instruction", "labels predicate opcode operands")


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


class Kernel:
    """One kernel's PTX, machine code and resources."""

    def __init__(self, ptx):
        self.ptx, self.code, self.resources = ptx, [], {}

    def count(self, opcode):
        return sum(1 for i in self.code if re.match(opcode, i.opcode))

    def requests(self, opcode):
        """bytes a thread: how often such loads or stores occur"""
        sizes = collections.Counter()
        for i in self.code:
            if i.opcode.split(".")[0] == opcode:
                size = re.search(r"\.(128|64|U16|S16|U8|S8)\b", i.opcode)
                sizes[int(size[1].strip("US")) // 8 if size else 4] += 1
        return sizes

    def next_of(self):
        """for each instruction those that may come next; a called function's code stands for itself"""
        at = {label: n for n, i in enumerate(self.code) for label in i.labels}
        following = []
        for n, i in enumerate(self.code):
            targets = re.findall(r"\.L_x_\d+", i.operands) if re.match("BRA|BRX|JMP|JMX", i.opcode) else []
            to = [at[t] for t in targets if t in at]
            always = i.opcode in ("BRA", "JMP") and i.operands.startswith("`")
            leaves = not i.predicate and (always or re.match("EXIT|RET|BRX|JMX", i.opcode))
            if not leaves and n + 1 < len(self.code):
                to.append(n + 1)
            following.append(to)
        return following

    def recurs(self, n, following):
        """instructions until the n-th can be executed again, by the shortest way; None if it is in no loop"""
        seen, ring, steps = set(), [n], 0
        while ring:
            steps += 1
            ring = {to for at in ring for to in following[at]} - seen
            if n in ring:
                return steps
            seen |= ring
        return None

    def ptx_groups(self):
        """sizes of the groups of wgmma, and how many groups each wait leaves under way, both sorted"""
        sizes, waits, size = [], [], 0
        for what, left in re.findall(r"wgmma\.(mma_async|commit_group|wait_group)\S*\s*(\d*)", self.ptx):
            size += what == "mma_async"
            if what == "commit_group":
                sizes.append(size)
                size = 0
            if what == "wait_group":
                waits.append(int(left))
        return sorted(sizes), sorted(waits)

    def groups(self):
        """the same of the machine code, where the last product of a group says gsb0"""
        sizes, waits, size = [], [], 0
        for i in self.code:
            if i.opcode.startswith("HGMMA"):
                size += 1
                if "gsb0" in i.operands:
                    sizes.append(size)
                    size = 0
            if i.opcode.startswith("WARPGROUP.DEPBAR"):
                waits.append(int(i.operands.split()[-1], 16))
        return sorted(sizes), sorted(waits)


class Build:
    """One cubin of the trainer: `said`, what the compilers had to say, and its kernels by name."""

    def __init__(self, precision, arch):
        WORK.mkdir(parents=True, exist_ok=True)
        to = WORK / f"{precision}_{arch}"
        ptx, cubin = to.with_suffix(".ptx"), to.with_suffix(".cubin")
        flags = run("make", "-s", f"--eval=show:;@echo $(NVCCFLAGS) $({precision}) $(GPU_INC)", "show",
                    f"GPU_ARCH=-arch=sm_{arch}", f"NVCC={NVCC}", cwd=SOURCE).split()
        self.said = run(NVCC, *flags, "-ptx", "train_gpt.cu", "-o", ptx, cwd=SOURCE)
        said = run(NVCC, "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", ptx, "-o", cubin)
        text = ptx.read_text()
        entries = re.split(r"(?m)^\.visible \.entry (\w+)", text)[1:]
        mangled = dict(zip(entries[::2], entries[1::2]))
        names = run("c++filt", *mangled).splitlines()
        short = {m: re.sub("^void ", "", name).split("(")[0].replace("__nv_bfloat16", "bf16")
                 for m, name in zip(mangled, names)}
        self.kernels = {short[m]: Kernel(body) for m, body in mangled.items()}
        kernel = None
        for line in said.splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)'", line):
                kernel = self.kernels[short[entry[1]]]
            elif (stack := re.match(r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)) and kernel:
                for what, n in zip(("stack", "stored", "loaded"), stack.groups()):  # of what it calls, too
                    kernel.resources[what] = max(kernel.resources.get(what, 0), int(n))
            elif used := re.search(r"Used (\d+) registers(?:.* (\d+) bytes smem)?", line):
                kernel.resources.update(registers=int(used[1]), shared=int(used[2] or 0))
            elif not re.search(r"Function properties|Compile time|bytes (gmem|cmem)", line):
                self.said += line + "\n"
        self.read(run(NVDISASM, "-c", cubin), short)

    def read(self, text, short):
        kernel, labels = None, []
        for line in text.splitlines():
            if section := re.match(r"\.text\.(\w+):", line):
                kernel, labels = self.kernels.get(short.get(section[1])), []
            elif label := re.match(r"(\.L_x_\d+|\$\S+):", line):
                labels.append(label[1])
            elif kernel and (i := INSTRUCTION.match(line)):
                kernel.code.append(Instruction(labels, i[1] or "", i[2], i[3]))
                labels = []

    def table(self, title):
        print(f"{title:44} registers shared stack spilled: stored loaded")
        for name, k in sorted(self.kernels.items()):
            r = k.resources
            print(f"{name:44} {r['registers']:9} {r['shared']:6} {r['stack']:5} {r['stored']:15} {r['loaded']:6}")


class Sass:
    """The tests of a build; each becomes a class of its own."""
    precision = arch = ""

    @classmethod
    def setUpClass(cls):
        cls.build = Build(cls.precision, cls.arch)
        cls.bf16 = cls.precision == "bf16"
        if "--table" in sys.argv:
            cls.build.table(f"{cls.precision}, sm_{cls.arch}")

    def each(self, pattern, check, least=1):
        """check(name, kernel) for each with such a name, of which there must be some"""
        found = [(n, k) for n, k in sorted(self.build.kernels.items()) if re.match(pattern, n)]
        self.assertGreaterEqual(len(found), least, f"kernels named {pattern}")
        for name, kernel in found:
            with self.subTest(name):
                check(name, kernel)

    def test_all_kernels_are_read(self):
        def check(_, kernel):
            self.assertTrue(kernel.code and "registers" in kernel.resources)
        self.each("", check, 60)

    def test_compilers_say_nothing(self):
        """a product that waits for the one before it, ptxas tells as information"""
        self.assertEqual(self.build.said, "")

    def test_tensor_cores(self):
        def some(_, kernel):
            products = kernel.ptx.count("mma.sync")
            self.assertGreaterEqual(products, 32)
            self.assertGreaterEqual(kernel.count(r"HMMA\.16816\.F32\.BF16"), products)

        def none(_, kernel):  # of fp32 nothing is rounded to TF32
            self.assertEqual(kernel.count(r"\w*MMA\b"), 0)
        self.each(ATTENTION, some if self.bf16 else none, 12)

    def test_registers_suffice(self):
        def check(name, kernel):
            most = next((most for pattern, (most, _) in SPILLS.items() if re.match(pattern, name)), 0)
            local = [n for n, i in enumerate(kernel.code) if re.match("LDL|STL", i.opcode)]
            self.assertLessEqual(kernel.resources["stack"], most, "bytes of stack")
            if not most:
                self.assertEqual((len(local), kernel.resources["stored"], kernel.resources["loaded"]), (0, 0, 0))
            following = kernel.next_of() if local else []
            after = [kernel.recurs(n, following) for n in local]
            self.assertGreaterEqual(min([n for n in after if n] + [SELDOM]), SELDOM, "spilled in a small loop")
        self.each("", check)

    def test_rows_move_in_packs(self):
        def check(name, kernel):
            want = moves(name, self.bf16)
            if not want:
                return
            seen.add(name.partition("_kernel")[0])
            loads, stores, copies = (kernel.requests(x) for x in ("LDG", "STG", "LDGSTS"))
            self.assertGreaterEqual(loads[16], want.load, "loads of 16 bytes")
            self.assertGreaterEqual(loads[8], want.load8, "loads of 8 bytes")
            self.assertLessEqual(set(loads) - {16}, want.other_loads, "bytes of other loads")
            self.assertLessEqual(set(copies), {16}, "bytes of copies to shared memory")
            self.assertGreaterEqual(stores[16], want.store, "stores of 16 bytes")
            self.assertGreaterEqual(stores[8], want.store8, "stores of 8 bytes")
            self.assertLessEqual(set(stores) - {16}, want.other_stores, "bytes of other stores")
        seen = set()
        self.each("", check)
        self.assertEqual(seen, FLAT_KERNELS | (ROW_KERNELS if self.bf16 else set()))


class Hopper(Sass):
    def test_hopper_has_wgmma(self):
        def check(_, kernel):
            products = kernel.ptx.count("wgmma.mma_async")
            self.assertGreaterEqual(products, 24)
            self.assertGreaterEqual(kernel.count(r"HGMMA\.64x\d+x16\.F32\.BF16"), products)
        self.each(HOPPER, check, 4)

    def test_products_run_together(self):
        """As many as the source commits at once, at least the 4 of 64 columns, and no wait but the source's. What ptxas
        serializes has a group, and a wait for it, for each product; a wait within a group ends it."""
        def check(_, kernel):
            sizes, waits = kernel.groups()
            self.assertEqual((sizes, waits), kernel.ptx_groups())
            self.assertGreaterEqual(min(sizes, default=0), 4)
        self.each(HOPPER, check, 4)


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    NVDISASM = find_nvdisasm()
    if NVCC and not NVDISASM and "--fetch" in sys.argv:
        fetch_nvdisasm()
        NVDISASM = find_nvdisasm()
    for p, a in (BUILDS[:1] if "--quick" in sys.argv else BUILDS) if NVCC and NVDISASM else []:
        kind = Hopper if (p, a) == ("bf16", "90a") else Sass
        globals()[f"{p}_{a}"] = type(f"{p}_sm_{a}", (kind, unittest.TestCase), {"precision": p, "arch": a})
    if not (NVCC and NVDISASM):
        print(f"skip all: there is no {'nvdisasm (--fetch takes it from pip)' if NVCC else 'nvcc'}")
    sys.exit(run_all("test_sass"))
