#!/usr/bin/env python3
"""Plants faults in the PTX of our kernels and looks whether the machine (ptx.h) reports each. Standard library only.

usage: dev/ptx/plant.py [--list] [--filter TEXT] [--seeds N] [--jobs N] [--quick] [--table] [--verbose]
  --list         print the faults and no more
  --filter TEXT  only faults whose kernel or description holds this regular expression
  --seeds N      with each seed from 1 to N: each must end as expected (1)
  --jobs N       runs at a time (1)
  --quick        a few of every sort
  --table        print a table in markdown too
  --verbose      print reports whole, and the seconds of each run

A fault is one small edit of one kernel's text, found by opcode and occurrence. The PTX with it goes to a temporary
file, and the cheapest test that reaches it runs on the machine. That must end with status 1 and a report of an
expected kind, of that kernel, whose place is the edit's: `at`, where the machine stopped, or `other`, the other place
in its line, so many instructions from the edit. Of kind `test` is what the test itself notices by its numbers. What
must run through is a correct variation, kind `none`. Wants build/test_exact_bf16 and build/test_gpt.sm_*.bf16.ptx, as
they are, and makes what is not there; skips where there is no PTX and no nvcc.
"""
import argparse
import collections
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = "build/test_exact_bf16"
PTX = {80: "build/test_gpt.sm_80.bf16.ptx", 90: "build/test_gpt.sm_90a.bf16.ptx"}
KINDS = set("parse launch address alignment poison race proxy phase wgmma barrier stuck registers".split())

# --- A kernel's text

Instr = collections.namedtuple("Instr", "line start end guard opcode operands")
STATEMENT = re.compile(r"(?<![\w.%$:])(?:(@!?%?\w+)\s+)?([a-z]\w*(?:\.[\w:]+)*)((?:\s|\[|\{)[^;]*)?;")
WORDS = {"bra", "ret", "exit", "trap"}


class Failure(Exception):
    pass


def operands_of(text):
    """Split at the commas that are in no bracket."""
    found, depth = [""], 0
    for c in text.strip():
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [o.strip() for o in found]


def mangled(name):
    """The beginning of the symbol of name<arguments>."""
    name, _, arguments = name.rstrip(">").partition("<")
    text = f"_Z{len(name)}{name}"
    if arguments:
        known = {"float": "f", "true": "Lb1E", "false": "Lb0E"}
        each = (known.get(a) or (f"Li{a}E" if a.isdigit() else f"{len(a)}{a}") for a in arguments.split(", "))
        text += "I" + "".join(each) + "E"
    return text


class Kernel:
    """One .entry of a module: its lines, what instructions they hold, edits of them. Lines stay where they are."""

    def __init__(self, lines, name):
        self.lines, begins = list(lines), re.compile(r"\s*(\.visible |\.weak )*\.entry " + re.escape(mangled(name)))
        self.first = next((i for i, line in enumerate(lines) if begins.match(line)), None)
        if self.first is None:
            raise Failure(f"no kernel {name} in the PTX")
        ends = re.compile(r"\s*(\.visible |\.weak )*\.(entry|func|file)\b")
        self.last = next((i for i in range(self.first + 1, len(lines)) if ends.match(lines[i])), len(lines))
        self.read()

    def read(self):
        self.instrs = []
        for i in range(self.first, self.last):
            line = self.lines[i]
            if line.lstrip().startswith(("//", ".loc", ".pragma")):
                continue
            for m in STATEMENT.finditer(line):
                if "." in m[2] or m[2] in WORDS:
                    self.instrs.append(Instr(i, m.start(), m.end(), m[1] or "", m[2], operands_of(m[3] or "")))

    def find(self, place):
        """The number of an instruction: "OPCODE", the first one, "OPCODE#3", the third, "OPCODE#-1", the last; then
        perhaps " > OPCODE", the next one after that, "< OPCODE", the one before. An opcode is a regular expression."""
        at, way = None, None
        for word in place.split():
            if word in "<>":
                way = word
                continue
            opcode, _, n = word.partition("#")
            hits = [i for i, instr in enumerate(self.instrs) if re.fullmatch(opcode, instr.opcode)]
            n = int(n or 1)
            if way == ">":
                hits = [i for i in hits if i > at]
            elif way == "<":
                hits = [i for i in reversed(hits) if i < at]
            if abs(n) > len(hits):
                raise Failure(f"'{place}' is not found: {len(hits)} of {opcode}")
            at = hits[n - 1 if n > 0 else n]
        return at

    def edit(self, place, change):
        """change(Instr) is the new text. Returns the number of the first instruction there."""
        i = self.find(place)
        instr = self.instrs[i]
        line = self.lines[instr.line]
        new = change(instr)
        if line[instr.start:instr.end] == new:
            raise Failure(f"the edit at '{place}' changes nothing")
        self.lines[instr.line] = line[:instr.start] + new + line[instr.end:]
        self.read()
        return self.number(instr.line)

    def number(self, line):
        """Of the first instruction of this line or after."""
        return sum(x.line < line for x in self.instrs)


def text_of(instr, operands=None, opcode=None, guard=None):
    return f"{instr.guard if guard is None else guard} {opcode or instr.opcode} " \
           f"{', '.join(instr.operands if operands is None else operands)};".lstrip()


def drop(instr):
    return ""


def operand(n, text):
    """Another operand n, {} for the old."""
    def change(instr):
        new = list(instr.operands)
        new[n] = text.replace("{}", new[n])
        return text_of(instr, new)
    return change


def offset(n, by):
    """An address's, so many bytes on."""
    def change(instr):
        m = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?((?:,.*)?)\]", instr.operands[n])
        if not m:
            raise Failure(f"operand {n} of {instr.opcode} is no address but {instr.operands[n]}")
        return operand(n, f"[{m[1]}+{int(m[2] or 0) + by}{m[3]}]")(instr)
    return change


def computed(n, how, type_="b32"):
    """Another operand n: `how` computes `planted` of it, {}."""
    def change(instr):
        old = instr.operands[n]
        new = operand(n, "planted")(instr)
        return f"{{.reg .{type_} planted; {how.replace('{}', old)}; {new}}}"
    return change


def coordinate(n, by):
    """A tensor copy's coordinate n, so many on."""
    def change(instr):
        k = next(i for i, o in enumerate(instr.operands) if "{" in o)
        m = re.fullmatch(r"\[([%\w]+), *\{(.*)\}\]", instr.operands[k])
        c = [x.strip() for x in m[2].split(",")]
        old, c[n] = c[n], "planted"
        new = operand(k, "[" + m[1] + ", {" + ",".join(c) + "}]")(instr)
        return f"{{.reg .b32 planted; add.s32 planted, {old}, {by}; {new}}}"
    return change


def opcode(pattern, new):
    def change(instr):
        return text_of(instr, opcode=re.sub(pattern, new, instr.opcode))
    return change


def before(text):
    """{0} is the first operand, {0.3} the third register of its list."""
    def change(instr):
        return f"{filled(text, instr)} {text_of(instr)}"
    return change


def after(text):
    def change(instr):
        return f"{text_of(instr)} {filled(text, instr)}"
    return change


def instead(text):
    def change(instr):
        return filled(text, instr)
    return change


def filled(text, instr):
    def of(m):
        whole = instr.operands[int(m[1])]
        return whole if m[2] is None else whole.strip("{}").split(",")[int(m[2])].strip()
    return re.sub(r"\{(\d+)(?:\.(\d+))?\}", of, text)


def by_lanes(instr):
    """Only the first 8 lanes."""
    return f"{{.reg .pred planted; .reg .u32 lane; mov.u32 lane, %laneid; setp.lt.u32 planted, lane, 8; " \
           f"{text_of(instr, guard='@planted')}}}"


def unguarded(instr):
    return text_of(instr, guard="")


# --- The faults

# what; kernel; edits: (place, change)..; kinds, one of which must come; where it must be, "at" or "other" or "any",
# within so many instructions of the first edit; PTX, test
Fault = collections.namedtuple("Fault", "what kernel edits kinds where within ptx test quick")
FAULTS = []


def fault(what, kernel, *edits, kinds, where="at", within=0, ptx=90, test="attention", quick=False):
    FAULTS.append(Fault(what, kernel, edits, kinds.split(), where, within, ptx, test, quick))


F64, F128 = "attention_forward_hopper_kernel<64>", "attention_forward_hopper_kernel<128>"
B64, B128 = "attention_backward_hopper_kernel<64>", "attention_backward_hopper_kernel<128>"
F16, B16 = "attention_forward_kernel<16, 4, 32, 64>", "attention_backward_kernel<16, 8, 16, 64>"
NORM4, NORM_BACK1 = "norm_residual_forward_kernel<4>", "norm_backward_kernel<1>"
NORM1, B32, LOSS = "norm_residual_forward_kernel<1>", "attention_backward_kernel<32, 8, 16, 64>", "cross_entropy_kernel"
WGMMA, TRY_WAIT = "wgmma.mma_async.*", "mbarrier.try_wait.*"
FENCE, COMMIT, WAIT = "wgmma.fence.*", "wgmma.commit_group.*", "wgmma.wait_group.*"
ARRIVE, EXPECT = "mbarrier.arrive.release.*", "mbarrier.arrive.expect_tx.*"
LOAD, STORE = "cp.async.bulk.tensor.4d.shared.*", "cp.async.bulk.tensor.4d.global.*"
FENCE_SHARED = "fence.proxy.async.shared::cta"

# Hopper: fences between the proxies
fault("both fences after mbarrier.init dropped", F64, ("fence.mbarrier_init.*", drop), ("fence.proxy.async", drop),
      kinds="proxy", within=80)
fault("fence.proxy.async before out's bulk store dropped", F64, (FENCE_SHARED, drop), kinds="proxy", within=15)
fault("fence.proxy.async before wgmma reads ds dropped", B128, (FENCE_SHARED + "#2", drop), kinds="proxy",
      where="other", within=20)
fault("the same, head size 64", B64, (FENCE_SHARED + "#2", drop), kinds="proxy", where="other", within=20,
      quick=True)
fault("fence.proxy.async before dq's bulk copy dropped", B128, (FENCE_SHARED, drop), kinds="proxy",
      where="other", within=20)
fault("fence.proxy.async before dk's and dv's bulk stores dropped", B128, (FENCE_SHARED + "#-1", drop), kinds="proxy",
      within=20)
fault("fence.proxy.async.global before dq's bulk addition dropped", B128, ("fence.proxy.async.global", drop),
      kinds="proxy", within=10)
# mbarriers
fault("arrivals of q_empty's init one more", F64, ("mbarrier.init.*#2", operand(1, "13")), kinds="stuck", where="any",
      within=200)
fault("arrivals of q_empty's init one fewer", F64, ("mbarrier.init.*#2", operand(1, "11")), kinds="barrier race phase",
      where="any", within=200)
fault("arrivals of full's init one fewer", B128, ("mbarrier.init.*#2", operand(1, "32")), kinds="barrier race phase",
      where="any", within=400)
fault("parity of the wait for q flipped", F64, (TRY_WAIT + "#-1", computed(2, "xor.b32 planted, {}, 1")),
      kinds="phase race stuck", where="any", within=60)
fault("parity of the wait for k flipped", F64, (f"bar.arrive#1 > {TRY_WAIT}#2", computed(2, "xor.b32 planted, {}, 1")),
      kinds="stuck phase wgmma", where="any", within=20)
fault("parity of the loader's wait for an empty stage flipped", F64, (TRY_WAIT + "#2", computed(2,
      "xor.b32 planted, {}, 1")), kinds="stuck race", where="any", within=5)
fault("expect_tx of k 16 bytes short", F64, (EXPECT + "#2", computed(2, "sub.u32 planted, {}, 16")),
      kinds="stuck phase", where="any", within=400)
fault("expect_tx of k 16 bytes long", F64, (EXPECT + "#2", computed(2, "add.u32 planted, {}, 16")), kinds="stuck phase",
      where="any", within=400)
fault("expect_tx of k and v one box short", B128, (EXPECT, computed(2, "sub.u32 planted, {}, 16384")), kinds="phase",
      where="any", within=30)
fault("arrive at k_empty dropped", F64, (f"bar.arrive#2 > {ARRIVE}", drop), kinds="stuck", where="any", within=120)
fault("arrive.expect_tx dropped", F64, (EXPECT + "#2", drop), kinds="stuck phase barrier", where="any", within=120)
fault("arrive at empty before the last wgmma is waited for", B128, (f"{WAIT}#-1 < {WAIT}", drop), kinds="race wgmma",
      where="any", within=120)
# wgmma
fault("wgmma.fence before acc += p v dropped", F64, (FENCE + "#-1", drop), kinds="wgmma", within=15)
fault("wgmma.fence before q k^T dropped", F64, (FENCE, drop), kinds="wgmma", within=15)
fault("wgmma.fence before dv += p dout dropped", B128, (FENCE + "#4", drop), kinds="wgmma", within=15)
fault("commit of q k^T dropped", F64, (COMMIT, drop), kinds="wgmma", within=20, quick=True)
fault("wait_group after q k^T dropped", F64, (WAIT, drop), kinds="wgmma", within=20)
fault("wait_group 1 raised to 2", F64, (WAIT + "#2", operand(0, "2")), kinds="wgmma", within=40)
fault("the last wait_group raised from 0 to 1", F64, (WAIT + "#-1", operand(0, "1")), kinds="wgmma", within=100)
fault("wait_group 1 raised to 2", B128, (WAIT + "#2", operand(0, "2")), kinds="wgmma", within=40)
fault("accumulator read before its wait", F64,
      (WGMMA, after("{.reg .f32 planted; add.f32 planted, {0.5}, 0f00000000;}")), kinds="wgmma")
fault("A's register overwritten under way", F64, (f"{FENCE}#3 > {WGMMA}", after("mov.b32 {1.2}, 0;")), kinds="wgmma",
      within=1)
fault("a move onto an accumulator under way", F64, (f"{FENCE}#3 > {WGMMA}", after("mov.f32 {0.2}, {0.3};")),
      kinds="wgmma", within=1)
fault("descriptor of k 16 bytes on", F64, (WGMMA, computed(2, "add.s64 planted, {}, 1", "b64")), kinds="test")
fault("descriptor of v 1024 bytes back", F64, (f"{FENCE}#3 > {WGMMA}", computed(2, "sub.s64 planted, {}, 64", "b64")),
      kinds="poison test phase race", within=1200)
fault("descriptor's stride doubled", F64, (WGMMA, computed(2, "add.s64 planted, {}, 274877906944", "b64")),
      kinds="poison test phase race address", within=300)
fault("descriptor's leading dimension one line off, MN-major", F128,
      (f"{FENCE}#3 > {WGMMA}", computed(2, "add.s64 planted, {}, 524288", "b64")), kinds="test race phase address")
fault("descriptor's swizzle 64 bytes", F64, (WGMMA, computed(2, "xor.b64 planted, {}, -4611686018427387904", "b64")),
      kinds="wgmma")
fault("descriptor not the same in all lanes", F64,
      (WGMMA, computed(2, ".reg .b32 t; .reg .b64 u; mov.u32 t, %tid.x; and.b32 t, t, 1; cvt.u64.u32 u, t; "
                          "add.s64 planted, {}, u", "b64")), kinds="wgmma")
# bulk copies
fault("wait_group.read before q's buffer is given back dropped", F64, ("cp.async.bulk.wait_group.read", drop),
      kinds="race", where="any", within=40, quick=True)
fault("wait_group.read raised from 0 to 1", F64, ("cp.async.bulk.wait_group.read", operand(0, "1")), kinds="race",
      where="any", within=40)
fault("wait_group.read of dq's buffer dropped", B128, ("cp.async.bulk.wait_group.read", drop), kinds="race",
      where="other", within=20)
fault("wait_group before dq's flag dropped", B128, ("cp.async.bulk.wait_group", drop), kinds="race phase", where="any",
      within=30)
fault("wait_group before dq's flag only .read", B128, ("cp.async.bulk.wait_group", opcode("$", ".read")),
      kinds="race phase", where="any", within=30)
fault("bulk commit before dq's flag dropped", B128, ("cp.async.bulk.commit_group", drop), kinds="race phase",
      where="any", within=30)
fault("shared address of a bulk copy 8 bytes on", B128, ("cp.async.bulk.global.*", offset(1, 8)), kinds="alignment")
fault("a bulk addition's size 16 bytes more", B128, ("cp.reduce.async.bulk.*", computed(2, "add.u32 planted, {}, 16")),
      kinds="race address poison", where="any")
fault("global address of a bulk addition 4 bytes on", B128, ("cp.reduce.async.bulk.*", offset(0, 4)), kinds="alignment")
fault("k's bulk load 128 bytes on in shared memory", F64, (LOAD + "#2", offset(0, 128)), kinds="poison race phase",
      where="any", within=500)
fault("k's bulk load at an address that is no multiple of 128", F64, (LOAD + "#2", offset(0, 16)), kinds="alignment")
fault("coordinate of k one row on", F64, (LOAD + "#2", coordinate(1, 1)), kinds="test")
fault("coordinate of k a box before the tensor", F64, (LOAD + "#2", coordinate(1, -128)), kinds="test poison")
fault("coordinate of out 16 rows on", F64, (STORE, coordinate(1, 16)), kinds="test race")
fault("map of a load is no map", F64, (LOAD + "#2", offset(1, 64)), kinds="address")
# named barriers, registers
fault("count of a turn 32 short", F64, ("bar.sync#2", operand(1, "224")), kinds="barrier stuck", where="any")
fault("count of a turn no multiple of 32", F64, ("bar.sync#2", operand(1, "250")), kinds="barrier")
fault("number of a turn's barrier off", F64, ("bar.sync#2", operand(0, "9")), kinds="stuck barrier", where="any",
      within=40)
fault("bar.arrive of a turn dropped", F64, ("bar.arrive#2", drop), kinds="stuck", where="any", within=200)
fault("bar.arrive's count 32 more", B128, ("bar.arrive#2", operand(1, "320")), kinds="barrier", where="any")
fault("bar.sync between ds and its wgmma dropped", B128, ("bar.sync#4", drop), kinds="poison race proxy wgmma",
      where="any", within=800)
fault("setmaxnreg.inc beyond the block's registers", B128, ("setmaxnreg.inc.*", operand(0, "240")), kinds="registers",
      where="any")
fault("setmaxnreg.inc beyond the block's registers", F64, ("setmaxnreg.inc.*", operand(0, "168")), kinds="registers",
      where="any")
fault("setmaxnreg.dec to no multiple of 8", B128, ("setmaxnreg.dec.*", operand(0, "42")), kinds="registers")
# flags between blocks
fault("ld.acquire of the flag a plain ld", B128, ("ld.acquire.*#1", opcode(".acquire.gpu", "")),
      ("ld.acquire.*#1", opcode(".acquire.gpu", "")), kinds="race", where="any", within=20)
fault("ld.acquire of the flag only volatile", B128, ("ld.acquire.*#1", opcode(".acquire.gpu", ".volatile")),
      ("ld.acquire.*#1", opcode(".acquire.gpu", ".volatile")), kinds="race phase", where="any", within=40)
fault("st.release of the flag a plain st", B128, ("st.release.*", opcode(".release.gpu", "")), kinds="race",
      where="any")
fault("wait for the flag dropped", B128, ("ld.acquire.*#1 > bra", unguarded), kinds="race phase poison", where="any",
      within=40)
fault("atom.inc of the next tile a plain load and store", F64,
      ("atom.global.inc.*", instead("{.reg .u32 planted; ld.global.u32 {0}, {1}; add.u32 planted, {0}, 1; "
                                    "st.global.u32 {1}, planted;}")), kinds="race test", where="any")

# mma.sync: cp.async, barriers, shared memory
fault("cp.async.wait_group 1 raised to 2", F16, ("cp.async.wait_group#2", operand(0, "2")), kinds="phase", where="any",
      within=80, ptx=80, quick=True)
fault("cp.async.wait_group 0 raised to 1", B16, ("cp.async.wait_group", operand(0, "1")), kinds="phase", where="any",
      within=300, ptx=80)
fault("cp.async.commit_group dropped", F16, ("cp.async.commit_group#1", drop), kinds="phase", where="any", within=80,
      ptx=80)
fault("cp.async.wait_group before q is kept dropped", F16, ("cp.async.wait_group#1", drop), kinds="phase", where="any",
      within=30, ptx=80)
fault("bar.sync before q is kept dropped", F16, ("bar.sync#1", drop), kinds="race phase", where="any", within=30,
      ptx=80)
fault("bar.sync before k is read dropped", F16, ("bar.sync#2", drop), kinds="race phase", where="any", within=80,
      ptx=80)
fault("bar.sync before v is read dropped", F16, ("bar.sync#3", drop), kinds="race phase", where="any", within=80,
      ptx=80)
fault("bar.sync before a step's tiles are read dropped", B16, ("bar.sync#1", drop), kinds="race phase", where="any",
      within=300, ptx=80)
fault("bar.sync between ds and its product dropped", B16, ("bar.sync#2", drop), kinds="race", where="any", within=400,
      ptx=80)
fault("bar.warp.sync before out is read back dropped", F16, ("bar.warp.sync#-1", drop), kinds="race", where="any",
      within=30, ptx=80)
fault("bar.warp.sync after the wait for the flag dropped", B32, ("ld.acquire.*#-1 > bar.warp.sync", drop), kinds="race",
      where="any", within=20, ptx=80)
fault("ld.acquire of the flag a plain ld", B32, ("ld.acquire.*#1", opcode(".acquire.gpu", "")),
      ("ld.acquire.*#1", opcode(".acquire.gpu", "")), kinds="race", where="any", within=20, ptx=80)
fault("st.release of the flag a plain st", B32, ("st.release.*", opcode(".release.gpu", "")), kinds="race", where="any",
      ptx=80)
fault("wait for the flag dropped", B32, ("ld.acquire.*#1 > bra", unguarded), kinds="race poison", where="any",
      within=20, ptx=80)
fault("ldmatrix address 8 bytes on", F16, ("ldmatrix.*#3", offset(1, 8)), kinds="alignment", ptx=80, quick=True)
fault("ldmatrix address a row on", F16, ("ldmatrix.*#3", offset(1, 48)), kinds="test race poison phase", where="any",
      ptx=80)
fault("cp.async 8 bytes on in shared memory", F16, ("cp.async.cg.*", offset(0, 8)), kinds="alignment", ptx=80)
fault("k's tiles a row on in shared memory, beyond its end", F16, ("bar.sync#2 > cp.async.cg.*", offset(0, 48)),
      ("bar.sync#3 > cp.async.cg.*", offset(0, 48)), kinds="phase race address test", where="any", within=200, ptx=80)
fault("delta's last element one too far", B16, ("cp.async.ca.*#1", offset(0, 1024)), kinds="address race", where="any",
      ptx=80)
fault("accumulator's zero dropped", F16, ("setp.le.*#1 < mov.f32", drop), kinds="poison", where="any", within=2000,
      ptx=80)

# rows
fault("bar.sync before block_sums' parts are read dropped", NORM4, ("bar.sync#2", drop), kinds="race poison",
      where="any", within=20, test="norm_residual", quick=True)
fault("bar.sync after block_sums' parts are read dropped", NORM4, ("bar.sync#3", drop), kinds="race", where="any",
      within=20, test="norm_residual")
fault("bar.sync before the maximum's parts are read dropped", LOSS, ("bar.sync#2", drop), kinds="race poison",
      where="any", within=20, test="cross_entropy")
fault("bar.sync between the columns' sums and their reader dropped", "gain_grad_kernel<float>", ("bar.sync", drop),
      kinds="race poison", where="any", within=60, test="norm_backward")
fault("a row's bound one too far", NORM1, ("setp.ge.s32#1", opcode("ge", "gt")), kinds="address", where="any",
      within=12, test="norm_residual")
fault("loop bound of the zeroes one too far", NORM_BACK1, ("st.shared.u32 > setp.lt.s32", opcode("lt", "le")),
      kinds="address", where="any", within=5, test="norm_backward")
fault("loop bound of the sums' line one too far", NORM_BACK1, ("st.global.f32 > setp.lt.s32", opcode("lt", "le")),
      kinds="address race poison", where="any", within=20, test="norm_backward")
fault("a row's bound one too far", "embedding_forward_kernel<1>", ("setp.ge.s32", opcode("ge", "gt")),
      kinds="address race", where="any", within=140, test="embedding", quick=True)
fault("vector load 2 bytes on", NORM4, ("ld.global.v4.u32", offset(1, 2)), kinds="alignment", test="norm_residual")
fault("vector load 16 bytes on, beyond the allocation", NORM1, ("ld.global.v4.u32", offset(1, 16)), kinds="address",
      test="norm_residual")
fault("vector store 16 bytes on, beyond the allocation", "embedding_forward_kernel<1>", ("st.global.wb.v4.u32#-1",
      offset(0, 16)), kinds="address race", test="embedding")
fault("a sum's zero dropped", NORM4, ("bar.sync#2 > mov.f32", drop), kinds="poison", where="any", within=2000,
      test="norm_residual")
fault("a maximum's beginning dropped", LOSS, ("bar.sync#2 > mov.f32", drop), kinds="poison", where="any", within=2000,
      test="cross_entropy")
fault("store of a part to shared memory dropped", NORM4, ("st.shared.f32#1", drop), kinds="poison", where="any",
      within=2000, test="norm_residual")
fault("a column's zero dropped", NORM_BACK1, ("st.shared.u32", drop), kinds="poison", where="any", within=2000,
      test="norm_backward")
fault("shuffle's mask half of the warp", NORM4, ("shfl.sync.bfly.b32#1", operand(4, "65535")), kinds="barrier",
      test="norm_residual", quick=True)
fault("shuffle by part of a warp, its mask the whole", NORM4, ("shfl.sync.bfly.b32#1", by_lanes), kinds="barrier",
      test="norm_residual")
fault("shuffle by 16 becomes one by 1", NORM4, ("shfl.sync.bfly.b32#1", operand(2, "1")), kinds="test",
      test="norm_residual")
fault("bar.sync by part of a warp", LOSS, ("bar.sync#2", by_lanes), kinds="barrier", test="cross_entropy")

# correct variations
fault("wait_group 1 lowered to 0", F64, (WAIT + "#2", operand(0, "0")), kinds="none")
fault("fence.mbarrier_init alone", F64, ("fence.proxy.async", drop), kinds="none")
fault("fence.proxy.async alone", F64, ("fence.mbarrier_init.*", drop), kinds="none")
fault("fence.proxy.async of all memory instead of shared", B128, (FENCE_SHARED, opcode("[.]shared::cta", "")),
      kinds="none")
fault("wgmma.fence dropped, no register touched since the one before", F64, (FENCE + "#3", drop), kinds="none")
fault("leading dimension of an MN-major descriptor, one repeat wide", B128,
      (f"bar.sync#3 > {WGMMA}", computed(1, "add.s64 planted, {}, 524288", "b64")), kinds="none")
fault("bulk wait_group instead of .read", F64, ("cp.async.bulk.wait_group.read", opcode(".read", "")), kinds="none")
fault("cp.async.wait_group 1 lowered to 0", F16, ("cp.async.wait_group#2", operand(0, "0")), kinds="none", ptx=80)
fault("one more bar.sync", NORM4, ("bar.sync#2", after("bar.sync 0;")), kinds="none", test="norm_residual")
fault("leading dimension of a K-major descriptor, which no one reads", F64,
      (WGMMA, computed(2, "add.s64 planted, {}, 65536", "b64")), kinds="none")

# --- Runs


class Result:
    def __init__(self, kinds, line, where="", text=""):
        self.kinds, self.ok, self.line, self.where, self.text = kinds, not line, line, where, text


def run_one(fault, modules, directory, seed, name):
    """One run with the fault: Result, whose line is empty if all is as expected."""
    kernel = Kernel(modules[fault.ptx], fault.kernel)
    edited = None
    for place, change in fault.edits:
        here = kernel.edit(place, change)
        edited = here if edited is None else edited
    path = os.path.join(directory, f"{name}.ptx")
    with open(path, "w") as f:
        f.write("\n".join(kernel.lines))
    env = {**os.environ, "CUDA_CPU_SEED": str(seed), "CUDA_CPU_PTX": path, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run([os.path.join(ROOT, PROGRAM), "--quick", "--only", fault.test], cwd=ROOT, env=env,
                             capture_output=True, text=True, errors="replace", timeout=300)
    except subprocess.TimeoutExpired:
        return Result("timeout", "runs for more than 300 s")
    finally:
        os.remove(path)
    report = next((line for line in run.stderr.splitlines() if line.startswith(("ptx: ", f"{name}.ptx"))), "")
    if not report:
        failed = next((line for line in (run.stdout + run.stderr).splitlines() if line.startswith("FAIL")), "")
        kind = "none" if run.returncode == 0 else "test" if failed else f"status {run.returncode}"
        wrong = "caught by nobody" if kind == "none" else f"not {' or '.join(fault.kinds)}"
        return Result(kind, "" if kind in fault.kinds else wrong, "", failed or run.stderr[-300:])
    stands = r"(\S+) " + re.escape(f"{name}.ptx") + r":(\d+)"
    m = re.match(r"ptx: kernel (.*?), block .*? at " + stands + r".*?: (\w+): (.*)", report)
    if run.returncode != 1 or not m or m[4] not in KINDS:
        return Result("?", f"status {run.returncode}, report not understood", "", report)
    places = [(way, opcode, kernel.number(int(line) - 1) - edited)
              for way, (opcode, line) in [("at", m.group(2, 3))] + [("other", x) for x in re.findall(stands, m[5])]]
    good = [p for p in places if fault.where in ("any", p[0]) and abs(p[2]) <= fault.within]
    why = ""
    if m[4] not in fault.kinds:
        why = f"not {' or '.join(fault.kinds)}"
    elif m[1] != fault.kernel:
        why = f"of kernel {m[1]}"
    elif not good:
        why = f"no place within {fault.within} of the edit: " + ", ".join(f"{w} {o} {n:+d}" for w, o, n in places)
    way, opcode, distance = min(good or places, key=lambda p: abs(p[2]))
    return Result(m[4], why, f"{way} {opcode.split('::')[0]} {distance:+d}", report)


def perform(fault, modules, directory, args, number):
    results, begin = [], time.monotonic()
    for seed in range(1, args.seeds + 1):
        try:
            results.append(run_one(fault, modules, directory, seed, f"plant{number}_{seed}"))
        except Failure as e:
            results.append(Result("", str(e)))
            break
    return results, time.monotonic() - begin


def unique(words):
    return list(dict.fromkeys(w for w in words if w))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--list", "--quick", "--table", "--verbose"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--filter", default="")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    chosen = [f for f in FAULTS if re.search(args.filter, f"{f.kernel}: {f.what}") and (f.quick or not args.quick)]
    if args.list:
        for f in chosen:
            print(f"{f.kernel}: {f.what} ({f.test}; {' or '.join(f.kinds)})")
        return 0
    needed = [PTX[which] for which in sorted({f.ptx for f in chosen})]
    missing = [p for p in needed if not os.path.exists(os.path.join(ROOT, p))]
    if missing and not os.environ.get("NVCC", shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        print(f"skip plant: there is no {missing[0]} and no nvcc to make it\nplant: 0 passed, 0 failed")
        return 0
    make = missing + [p for p in [PROGRAM] if not os.path.exists(os.path.join(ROOT, p))]
    if make:
        subprocess.run(["make", "-s", *make], cwd=ROOT, check=True)
    modules = {}
    for which in {f.ptx for f in chosen}:
        with open(os.path.join(ROOT, PTX[which])) as f:
            modules[which] = f.read().split("\n")
    passed, rows = 0, []
    with tempfile.TemporaryDirectory(prefix="plant_") as directory, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(perform, f, modules, directory, args, i) for i, f in enumerate(chosen)]
        for fault, future in zip(chosen, runs):
            results, seconds = future.result()
            ok = all(r.ok for r in results)
            passed += ok
            kinds, where = " or ".join(unique(r.kinds for r in results)), "; ".join(unique(r.where for r in results))
            why = "; ".join(unique(r.line for r in results))
            print(f"{'ok' if ok else 'FAIL'} {fault.kernel}: {fault.what}: {kinds}{', ' + where if where else ''}"
                  f"{': ' + why if why else ''}{f' ({seconds:.1f} s)' if args.verbose else ''}", flush=True)
            if args.verbose:
                print("\n".join("    " + r.text for r in results if r.text), flush=True)
            rows.append((fault.what, fault.kernel, kinds if ok else f"**{kinds}**", where))
    if args.table:
        print("\n| fault | kernel | kind | place, instructions from the edit |\n|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |")
    print(f"plant: {passed} passed, {len(chosen) - passed} failed")
    return 0 if passed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
