#!/usr/bin/env python3
"""Makes the page dev/bench/results/ptx-costs.md of what the machine in dev/ptx has counted. `make ptx-costs` calls it.

usage: dev/bench/ptx_costs.py --ptx FILE.ptx --ptxas FILE.ptxas COUNTS ...

COUNTS are files of CUDA_CPU_PTX_COUNTS, a launch a line, as `bench --part counts` makes launches; FILE.ptx is the PTX
that ran and FILE.ptxas what `ptxas -v` says of it. Prints to standard output.
"""
import argparse
import collections
import json
import re
import sys

# The device: H100 SXM. See RATES for where each is from.
SMS, CLOCK = 132, 1.83e9
FLOPS = 989.4e12  # bf16, dense, wgmma
MMA_SYNC = 0.63   # of it by mma.sync
HBM, L2 = 3.35e12, 6.4e12
WARPS, BLOCKS, REGISTERS, SHARED = 64, 32, 65536, 228 << 10  # a multiprocessor's

# Warp instructions a clock and multiprocessor
PIPES = {"issue": 4, "float": 4, "integer": 2, "special": 0.5, "shuffle": 1, "float64": 2}
RATES = f"""
| resource | rate | from |
|---|--:|---|
| multiprocessors, clock | {SMS}, {CLOCK / 1e6:.0f} MHz | H100 SXM data sheet and white paper |
| issue | 4 warp instructions a clock | one a scheduler, four of them (white paper) |
| float: `add`, `mul`, `fma` of f32 | 128 a clock | CUDA C++ Programming Guide, "Throughput of Native Arithmetic \
Instructions", 9.0 |
| integer: `add`, `mul`, `mad`, shifts, logic, compares, `min`, `max` | 64 a clock | the same |
| special: `ex2`, `rcp`, `rsqrt`, `sqrt`, conversions between integers and floats | 16 a clock | the same |
| shuffle | 32 a clock | the same |
| f64 | 64 a clock | the same |
| f32 to bf16 (`cvt.rn.bf16x2.f32`) | 64 a clock, as integers | assumed |
| wgmma | 4096 FLOP a clock | 989.4 TFLOP/s (data sheet, dense bf16) / {SMS} / {CLOCK / 1e9} GHz |
| mma.sync | {MMA_SYNC:.0%} of that | arXiv 2402.13499, as measured there on an H800 |
| L1 and shared memory | 1 wavefront, or 4 sectors, a clock: 128 bytes | 32 banks of 4 bytes |
| L2 | {L2 / 1e12} TB/s | assumed: about 5.5 TB/s have been measured on the 114 multiprocessors of an H100 PCIe \
(chipsandcheese.com), scaled to {SMS}. With less, kernels that were measured on an H200 would be too fast |
| HBM | {HBM / 1e12} TB/s | data sheet |
"""

# What ptxas makes of an instruction of PTX: none, the first that fits, else one integer instruction
FREE = r"mov|cvta|ld\.param|st\.param|mbarrier\.init|cvt\.(u64\.u32|s64\.s32|u32\.u64|u32\.u16|u16\.u32|u64\.u16)|call"
COSTS = [  # pattern, pipe ("": issue alone), instructions
    (r"(add|sub|neg|setp\.\w+|selp|and|or|xor|min|max|shl|shr|mul\.wide|mad\.wide)\.[sub]64", "integer", 2),
    (r"(mul|mad)\.(lo|hi)\.[su]64", "integer", 4),
    (r"(div|rem)\.[su]32", "integer", 20),
    (r"(div|rem)\.[su]64", "integer", 70),
    (r".*\.f64.*", "float64", 1),
    (r"(add|sub|mul|fma)\.(rn\.)?(f32|bf16x2)", "float", 1),
    (r"div\.approx\.f32", "special", 1),
    (r"(div|sqrt)\.rn\.f32", "float", 9),  # and one special, left out
    (r"(ex2|rcp|rsqrt|sqrt|lg2|sin|cos)\..*", "special", 1),
    (r"cvt\.(rn|rni|rzi|rz)\.(f32\.[su]\d+|[su]\d+\.f32)", "special", 1),
    (r"shfl\..*", "shuffle", 1),
    (r"(ld|st|ldmatrix|stmatrix|cp|atom|red|prefetch|mma|wgmma|bar|barrier|mbarrier|bra|exit|ret|fence|membar|"
     r"setmaxnreg|nanosleep|elect|vote)\b.*", "", 1),
]

INTRODUCTION = """# What nvcc's kernels cost at least

Counted, not timed: every kernel of the trainer, bf16 for sm_90a, as `nvcc -ptx` writes it, run on a CPU by the machine
in `dev/ptx`, which counts instructions, sectors and wavefronts. From the counts and the rates of an H100 SXM follows
for each resource the time that the kernel keeps it busy; the longest of them is the kernel's least time, reached only
if all else runs under it. Beside it the layer's bound: its FLOPs at the data sheet's rate or its bytes at that of HBM,
whichever takes longer (of causal attention half of the scores). `make ptx-costs` makes this page, without a GPU.

The shapes are those of `make bench` (16384 tokens, T 2048). Of row kernels and the like 8 blocks of the grid run,
spread over it, and counts are scaled up. Of attention one head of k and v runs, with its queries, in as many blocks as
take about as many tiles each as in the whole, and counts are multiplied by the heads; its data is random, that of the
others does not matter. *mma.sync* are the kernels that other GPUs get, here on an H100.
"""
CAVEATS = """
What to keep in mind:

- PTX is not what runs. Instructions that ptxas drops (moves, parameters, most conversions of addresses) count nothing
  in the times, 64-bit integer arithmetic 2 or 4, divisions 9 to 70; in the table of instructions all stand as PTX has
  them. ptxas fuses and hoists, and moves integer work to the float pipe: issue and integer are estimates, no bounds.
- How often a warp polls for an event does not count.
- L1 keeps a block's last 1024 sectors read (32 KB) here and knows of no other block's; a store goes to L2 each time.
- Distinct bytes are counted as HBM's, scratch too, though much of it stays in L2 (50 MB). What several blocks of a
  sample read counts once.
- Wavefronts include those of wgmma (128 bytes each; A of 64 rows, B once for the four warps) and of bulk copies. One is
  needed for each 32 words that lanes ask for, a sector for each 32 bytes.
- L2's rate is the least certain of all; where it binds the real bound may be lower.
"""
LOSSES = """## Where it loses

Lines of the source and of the PTX whose sectors or wavefronts are more than their bytes need, those that cost most
first: µs are these at the rates of L1 and L2, beside the least time of the kernel, which they lengthen only where they
bind. A kernel with several shapes is listed with the longest. Stores of 4 bytes a lane where the source has 16 are
those that nvcc did not put together.
"""


def fail(message):
    sys.exit(f"ptx_costs.py: {message}")


def text_of(path):
    try:
        with open(path) as f:
            return f.read()
    except OSError as error:
        fail(f"{path}: cannot be read: {error.strerror}.")


def cost(op):
    """(pipe, instructions) of an opcode"""
    if re.match(rf"({FREE})(\.|$)", op):
        return "", 0
    for pattern, pipe, count in COSTS:
        if re.fullmatch(pattern, op):
            return pipe, count
    return "integer", 1


def read_ptx(text):
    """PTX line: the opcodes on it, and where in the source it is from"""
    files, found, place = {}, {}, ""
    for number, path in re.findall(r'(?m)^\s*\.file\s+(\d+) "([^"]+)"', text):
        files[number] = path.rsplit("/", 1)[-1]
    for n, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        loc = re.match(r"\.loc\s+(\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?", line)
        if loc:
            place = f"{files[loc[1]]}:{loc[2]}"
            if loc[3]:
                place += f" in {files[loc[3]]}:{loc[4]}"
            continue
        ops = []
        for part in re.sub(r"//.*|^\s*[$\w]+:", "", line).split(";"):
            op = re.match(r"[{}\s]*(?:@!?%?\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*", part)
            if op:
                ops.append(op[1])
        if ops:
            found[n] = ops, place
    return found


def read_ptxas(text):
    """kernel: registers, static shared bytes, spilled bytes"""
    found = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        used = re.search(r"Used (\d+) registers", part)
        smem = re.search(r"(\d+) bytes smem", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        if used:
            found[part.split("'")[0]] = int(used[1]), int(smem[1]) if smem else 0, int(spilled[1]) if spilled else 0
    return found


def shown(mangled):
    """the kernel's name and the numbers that its template has"""
    name = re.match(r"_Z(\d+)(\w+)", mangled)
    if not name:
        return mangled
    end = int(name[1])
    args = name[2][end:].split("EvP")[0] if name[2][end:].startswith("I") else ""
    numbers = re.findall(r"L[ib](\d+)E", args + "E")
    return name[2][:end].removesuffix("_kernel") + (f"<{','.join(numbers)}>" if numbers else "")


class Launch:
    def __init__(self, record, ptx, ptxas):
        self.__dict__.update(record)
        self.record, self.name = record, shown(self.kernel)
        threads = self.block[0] * self.block[1] * self.block[2]
        self.threads, self.block_warps = threads, (threads + 31) // 32
        self.all_blocks = self.grid[0] * self.grid[1] * self.grid[2]
        self.scale = self.all_blocks / self.blocks * self.parts  # of what was counted
        self.whole_grid = self.all_blocks * self.parts
        if self.kernel not in ptxas:
            fail(f"{self.kernel} is not in what ptxas says.")
        self.registers, static, self.spilled = ptxas[self.kernel]
        self.smem = self.shared + static
        a_warp = -(-self.registers * 32 // 256) * 256
        self.resident = min(BLOCKS, WARPS // self.block_warps, REGISTERS // a_warp // self.block_warps,
                            SHARED // (-(-self.smem // 128) * 128 + 1024))
        sms = min(SMS, self.whole_grid)
        # what several blocks of a sample touch, all will: it grows with the parts alone
        own = self.read_distinct + self.written_distinct - self.shared_distinct
        self.distinct = own * self.scale + self.shared_distinct * self.parts
        pipes, seen = collections.Counter(), collections.Counter()
        self.losses = []
        direct = 0  # sectors that pass between L1 and registers
        for line, executed, sectors, needed, to_l2, fronts in self.lines:
            ops, place = ptx[line]
            op = ops[seen[line] % len(ops)]
            seen[line] += 1
            pipe, count = cost(op)
            pipes["issue"] += executed * count
            if pipe:
                pipes[pipe] += executed * count
            if op.startswith(("ld.", "st.")):
                direct += sectors
            if sectors > needed or fronts:
                # written ones all go on to L2; of those read, what L1 keeps is lost in L1 alone
                beyond = sectors - needed
                self.losses.append((line, op, place, executed, beyond, min(beyond, max(0, to_l2 - needed)), fronts))
        of_sm = self.scale / sms / CLOCK
        self.wgmma = any("wgmma.mma_async" in op for line in self.lines for op in ptx[line[0]][0])
        self.ms = {pipe: 1e3 * pipes[pipe] / rate * of_sm for pipe, rate in PIPES.items()}
        self.ms["tensor"] = 1e3 * self.tensor_flops / (FLOPS / SMS / CLOCK * (1 if self.wgmma else MMA_SYNC)) * of_sm
        self.ms["L1"] = 1e3 * (self.wavefronts + direct / 4) * of_sm
        self.ms["L2"] = 1e3 * self.to_l2 * 32 * self.scale / L2
        self.ms["HBM"] = 1e3 * self.distinct / HBM
        self.bound = max(self.ms, key=self.ms.get)
        self.least = self.ms[self.bound]

    def a_warp(self, what):
        return self.record[what] / self.warps


def table(heads, rows, left=1):
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * left + "--:|" * (len(heads) - left))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def number(x):
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def against(done, needed, unit):
    """'12.3' or '12.3, 4.1 needed'"""
    a, b = number(done / unit), number(needed / unit)
    return a if a == b else f"{a} ({b})"


def model_tables(cases):
    rows, kernels, counts = [], [], []
    for (case, shape), launches in cases.items():
        first = launches[0]
        by_flops, by_bytes = 1e3 * first.flops / FLOPS, 1e3 * first.bytes / HBM
        layer = max(by_flops, by_bytes)
        least = sum(x.least for x in launches)
        by = ", ".join(dict.fromkeys(x.bound for x in launches if x.least > 0.05 * least))
        rows.append((least / layer if layer else 0,
                     [case, shape, number(layer), "FLOPs" if by_flops > by_bytes else "bytes", number(least), by,
                      f"{least / layer:.2f}"]))
        for i, x in enumerate(launches):
            if x.least < 0.01 * least:
                continue
            label = f"{case}: {x.name}"
            kernels.append([label, f"{x.whole_grid:.0f} x {x.threads}", str(x.registers) + ("!" if x.spilled else ""),
                            f"{x.smem / 1024:.1f}", f"{x.resident} ({x.resident * x.block_warps})",
                            f"{x.whole_grid / SMS / x.resident:.2f}"] +
                           [f"**{number(x.ms[p])}**" if p == x.bound else number(x.ms[p]) if x.ms[p] >= 5e-4 else ""
                            for p in ("issue", "float", "integer", "special", "shuffle", "float64", "tensor", "L1",
                                      "L2", "HBM")])
            counts.append([label] + [number(x.a_warp(c)) for c in
                                     ("tensor", "floats", "integers", "special", "memory", "control")] +
                          [number(x.a_warp("uncovered")) if "hopper" in x.name else "", number(x.a_warp("barriers")),
                           against(x.tensor_flops * x.scale, x.flops, 1e9) if x.tensor_flops else "",
                           against(x.sectors * x.scale, x.sectors_needed * x.scale, 1e6),
                           number(x.to_l2 * x.scale / 1e6),
                           against(x.wavefronts * x.scale, x.wavefronts_needed * x.scale, 1e6) if x.wavefronts else "",
                           number(x.read * x.scale / 1e6), number(x.written * x.scale / 1e6),
                           number(x.distinct / 1e6),
                           number(x.bytes / 1e6) if i == 0 else ""])
    print("How far each is at best from its layer's bound, the farthest first:\n")
    table(["kernel", "shape", "layer's bound, ms", "by", "least, ms", "bound by", "least / layer's"],
          [row for _, row in sorted(rows, key=lambda pair: -pair[0])], 2)
    print("Least times by resource, ms (the largest is bold); blocks and warps are those that a multiprocessor has "
          "room for, waves how often the grid fills them all; registers with ! spill some:\n")
    table(["kernel", "grid", "registers", "shared, KB", "blocks (warps)", "waves", "issue", "float", "integer",
           "special", "shuffle", "f64", "tensor", "L1", "L2", "HBM"], kernels)
    print("PTX instructions a warp by class, of Hopper's the memory instructions, barriers and fences that "
          "run while no product of their warp is under way, barriers a warp, and over the whole launch, with what is "
          "needed in brackets where it differs; MB asked for, and each byte once:\n")
    table(["kernel", "tensor", "float", "integer", "special", "memory", "control", "alone", "barriers", "GFLOP (needed)",
           "M sectors (needed)", "to L2", "M wavefronts (free of conflicts)", "MB read", "written", "distinct",
           "the layer's MB"], counts)


def loss_table(launches):
    """Lines that fetch more than they need, by what that costs of their kernel's least time."""
    found = {}
    for x in launches:
        of_sm = 1e3 * x.scale / min(SMS, x.whole_grid) / CLOCK
        for line, op, place, executed, sectors, to_l2, fronts in x.losses:
            old = found.setdefault((x.name, place, op), {})
            if old and (old["x"].least > x.least or old["x"] is not x and old["x"].least == x.least):
                continue  # of several launches the longest
            if not old or old["x"] is not x:
                old.update(x=x, lines=set(), executed=0, sectors=0, to_l2=0, fronts=0, l1_ms=0, l2_ms=0)
            old["lines"].add(line)
            for name, value in (("executed", executed), ("sectors", sectors), ("to_l2", to_l2), ("fronts", fronts),
                                ("l1_ms", (sectors / 4 + fronts) * of_sm), ("l2_ms", 1e3 * to_l2 * 32 * x.scale / L2)):
                old[name] += value
    rows = []
    for (name, place, op), f in sorted(found.items(), key=lambda f: -max(f[1]["l1_ms"], f[1]["l2_ms"])):
        ms, least, n = max(f["l1_ms"], f["l2_ms"]), f["x"].least, f["executed"]
        if ms < 0.002 * least:
            continue
        some = sorted(f["lines"])
        more = f" and {len(some) - 1} more" if some[1:] else ""
        rows.append([f"{name} ({f['x'].model})", place, f"`{op}`",
                     f"{some[0]}{more}", number(n * f["x"].scale / 1e3)] +
                    [f"{f[c] / n:.2f}" if f[c] else "" for c in ("sectors", "to_l2", "fronts")] +
                    [number(1e3 * f["l1_ms"]), number(1e3 * f["l2_ms"]), f"{100 * ms / least:.1f}%"])
    table(["kernel", "source", "instruction", "PTX line", "executed, K", "sectors beyond need, each", "of them to L2",
           "wavefronts beyond need, each", "µs of L1", "µs of L2", "of the kernel's least"], rows, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", metavar="COUNTS")
    parser.add_argument("--ptx", required=True, metavar="FILE.ptx")
    parser.add_argument("--ptxas", required=True, metavar="FILE.ptxas")
    args = parser.parse_args()
    ptx, ptxas = read_ptx(text_of(args.ptx)), read_ptxas(text_of(args.ptxas))
    launches = []
    for path in args.counts:
        for n, line in enumerate(text_of(path).splitlines(), 1):
            try:
                record = json.loads(line)
                record["case"], record["lines"]
            except (ValueError, KeyError):
                fail(f"{path}:{n}: is no line of CUDA_CPU_PTX_COUNTS by bench --part counts.")
            launches.append(Launch(record, ptx, ptxas))
    # attention's backward is counted on one head, this kernel of it apart, on all
    launches = [x for x in launches if x.parts == 1 or not x.name.startswith("attention_delta")]
    print(INTRODUCTION + RATES + CAVEATS)
    by_model = collections.defaultdict(lambda: collections.defaultdict(list))
    for x in launches:
        by_model[x.model, x.batch_size, x.seq_len][x.case, x.shape].append(x)
    for (model, B, T), cases in by_model.items():
        print(f"## {model}, B {B}, T {T}, bf16\n")
        model_tables(cases)
    print(LOSSES)
    loss_table(launches)


if __name__ == "__main__":
    main()
