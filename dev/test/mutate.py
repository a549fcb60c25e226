#!/usr/bin/env python3
"""Breaks the kernels, one line at a time, and looks whether a test notices. Standard library only.

usage: dev/test/mutate.py [FILTER ...]     only mutations whose name holds one of the words

Each mutation changes one place of a copy of the sources, builds the test of a geometry and precision and runs the named
tests. Prints caught or SURVIVED; exit status 1 if one survived, 2 if a mutation no longer fits the source. The sources as they
are must pass the same tests first, or every verdict would be worthless.
"""
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NORM, MAIN = "simplenorm.cuh", "train_gpt.cu"

# name, file, old, new, build, test filter; an old text must stand in the file exactly once
MUTATIONS = [
    ("rmsnorm: eps forgotten", NORM,
     "block_sum(square) / C + norm.eps",
     "block_sum(square) / C",
     "serial_fp32", "norm_residual"),
    ("rmsnorm: last column left out", NORM,
     "    for (int c = threadIdx.x; c < C; c += blockDim.x) {\n"
     "        float d = float(x[c]) - mean;",
     "    for (int c = threadIdx.x; c < C - 1; c += blockDim.x) {\n"
     "        float d = float(x[c]) - mean;",
     "serial_fp32", "norm_residual"),
    ("residual: sign", NORM,
     "out[c] = float(res[c]) + float(gain[c]) * normalize",
     "out[c] = float(res[c]) - float(gain[c]) * normalize",
     "serial_fp32", "norm_residual"),
    ("norm backward: c2 sign", NORM,
     "out[c] = s.y * (float(gain[c]) * float(dyn[c]) - m.x - normalize(xn[c], s) * m.y);\n"
     "        }\n"
     "    }\n"
     "}\n"
     "\n"
     "void norm_backward",
     "out[c] = s.y * (float(gain[c]) * float(dyn[c]) - m.x + normalize(xn[c], s) * m.y);\n"
     "        }\n"
     "    }\n"
     "}\n"
     "\n"
     "void norm_backward",
     "serial_fp32", "norm_backward"),
    ("norm backward: c1 forgotten", NORM,
     "float c1 = norm.center ? block_sum(sum_gdy) / C : 0.0f;",
     "float c1 = 0.0f;",
     "serial_fp32", "norm_backward"),
    ("gain gradient: last block left out", NORM,
     "b < blocks; b++) sum +=",
     "b < blocks - 1; b++) sum +=",
     "serial_fp32", "norm_backward"),
    ("gain gradient: overwrites", NORM, "dgain[c] += sum;", "dgain[c] = sum;", "serial_fp32", "norm_backward"),
    ("rope: sign", NORM,
     "make_float2(y.x * angle.x - y.y * angle.y,",
     "make_float2(y.x * angle.x + y.y * angle.y,",
     "serial_fp32", "qkv"),
    ("rope: not undone in backward", NORM,
     "rotate(d, make_float2(angle[i].x, -angle[i].y))",
     "rotate(d, angle[i])",
     "serial_fp32", "qkv"),
    ("qkv: v rotated too", NORM,
     "const float2* angle = rope && part < 2 ? rope + size_t(t) * (h.HS / 2) : nullptr;\n"
     "        for",
     "const float2* angle = rope ? rope + size_t(t) * (h.HS / 2) : nullptr;\n"
     "        for",
     "serial_fp32", "qkv"),
    ("qkv backward: gain forgotten", NORM,
     "d.x = s.y * (float(gain[c]) * d.x - m.x",
     "d.x = s.y * (d.x - m.x",
     "serial_fp32", "qkv"),
    ("qkv backward: first row's gain gradient", NORM,
     "bool first = n == blockIdx.x;",
     "bool first = false;",
     "exact_fp32", "qkv"),
    ("silu: derivative", NORM,
     "v * s * (1.0f + u * (1.0f - s))",
     "v * s * (1.0f - u * (1.0f - s))",
     "serial_fp32", "ffn"),
    ("gelu: derivative", NORM, "cdf + u * 0.39894228f", "cdf - u * 0.39894228f", "serial_fp32", "ffn"),
    ("ffn backward: w3's stats", NORM, "s3 = GATED ? stats[PARTS * n + 1] : s1;", "s3 = s1;", "serial_fp32", "ffn"),
    ("ffn forward: stats of w1 for w3", NORM,
     "if (GATED) s3 = row_stats(x + F, F, norm);",
     "if (GATED) s3 = s1;",
     "serial_fp32", "ffn"),
    ("block sum: missing barrier", MAIN,
     "    if (lane() == 0) part[warp()] = v;\n"
     "    __syncthreads();\n"
     "    return warp_sum(",
     "    if (lane() == 0) part[warp()] = v;\n"
     "    return warp_sum(",
     "exact_fp32", "norm_residual"),
    ("block sum: first barrier missing", MAIN,
     "    __syncthreads();  // the last call's readers are done\n",
     "",
     "exact_fp32", ""),
    ("block max: missing barrier", MAIN,
     "    if (lane() == 0) part[warp()] = v;\n"
     "    __syncthreads();\n"
     "    return warp_max(",
     "    if (lane() == 0) part[warp()] = v;\n"
     "    return warp_max(",
     "exact_fp32", "cross_entropy"),
    ("warp sum: half of the lanes", MAIN,
     "for (int m = WARP_SIZE / 2; m > 0; m /= 2) v += __shfl_xor_sync(ALL_LANES, v, m);\n"
     "    return v;\n"
     "}\n"
     "__device__ inline float warp_max",
     "for (int m = WARP_SIZE / 4; m > 0; m /= 2) v += __shfl_xor_sync(ALL_LANES, v, m);\n"
     "    return v;\n"
     "}\n"
     "__device__ inline float warp_max",
     "exact_fp32", "norm_residual"),
    ("tile: columns of a lane", MAIN,
     "e / 2 * 8 + lane() % 4 * 2 + e % 2; }",
     "e / 2 * 8 + lane() % 4 + e % 2 * 4; }",
     "exact_bf16", "attention"),
    ("mma_nt: halves of k swapped", MAIN,
     "k + i / 2 * 8 + t2], 4);",
     "k + (1 - i / 2) * 8 + t2], 4);",
     "exact_bf16", "attention"),
    ("mma_nn: fragments of b swapped", MAIN,
     "mma_m16n8k16(c.v + 8 * j + 4, fa, fb + 2);",
     "mma_m16n8k16(c.v + 8 * j + 4, fa, fb);",
     "exact_bf16", "attention"),
    ("attention: mask off by one", MAIN,
     "float score = p.col(e) <= visible ?",
     "float score = p.col(e) < visible + (visible == 0) ?",
     "serial_fp32", "attention"),
    ("attention: no rescaling", MAIN, "acc.at(s, e) *= keep;", "acc.at(s, e) *= 1.0f;", "serial_fp32", "attention"),
    ("attention: barrier before the tile is overwritten", MAIN,
     "        __syncthreads();\n"
     "        load_tile<HS>(sk, LD, k + size_t(col0) * HS",
     "        load_tile<HS>(sk, LD, k + size_t(col0) * HS",
     "exact_bf16", "attention"),
    ("attention: barrier after the tile is loaded", MAIN,
     "        load_tile<HS>(sv, LD, v + size_t(col0) * HS, HS, COLS, T - col0);\n"
     "        __syncthreads();",
     "        load_tile<HS>(sv, LD, v + size_t(col0) * HS, HS, COLS, T - col0);",
     "exact_bf16", "attention"),
    ("attention: wrong k/v head", MAIN,
     "const size_t q_head = size_t(b) * NH + head, kv_head = size_t(b) * NKV + head / (NH / NKV);",
     "const size_t q_head = size_t(b) * NH + head, kv_head = size_t(b) * NKV + head % NKV;",
     "serial_fp32", "attention"),
    ("attention backward: delta forgotten", MAIN,
     "(ds.at(s, e) - row_delta[s])",
     "ds.at(s, e)",
     "serial_fp32", "attention"),
    ("attention backward: queries before the key", MAIN, "i >= from ?", "true ?", "serial_fp32", "attention"),
    ("attention backward: one head of the group", MAIN,
     "head < int(blockIdx.y + 1) * group; head++",
     "head < int(blockIdx.y) * group + 1; head++",
     "serial_fp32", "attention"),
    ("load_tile: rows beyond T not zero", MAIN,
     "if (row < valid && col < HS) x =",
     "if (col < HS) x =",
     "sanitized_fp32", "attention"),
    ("embedding backward: last place left out", MAIN,
     "for (int i = first; i < last; i++) {",
     "for (int i = first; i < last - 1; i++) {",
     "serial_fp32", "embedding"),
    ("positions: one sequence only", MAIN,
     "for (int b = 0; b < B; b++)\n"
     "        for (int c = threadIdx.x; c < C; c += blockDim.x) dpos",
     "for (int b = 0; b < 1; b++)\n"
     "        for (int c = threadIdx.x; c < C; c += blockDim.x) dpos",
     "serial_fp32", "embedding"),
    ("cross-entropy: padding in the sum", MAIN,
     "for (int v = threadIdx.x; v < V; v += blockDim.x) sum +=",
     "for (int v = threadIdx.x; v < Vp; v += blockDim.x) sum +=",
     "serial_fp32", "cross_entropy"),
    ("cross-entropy: target not subtracted", MAIN,
     "(__expf(target_logit - lse) - 1.0f)",
     "(__expf(target_logit - lse))",
     "serial_fp32", "cross_entropy"),
    ("cross-entropy: target read after it is overwritten", MAIN,
     "    __syncthreads();  // everyone has read the target's logit\n",
     "",
     "exact_fp32", "cross_entropy"),
    ("AdamW: correction forgotten", MAIN, "root2 = rsqrtf(correction2)", "root2 = 1.0f", "serial_fp32", "adamw"),
    ("AdamW: last chunk left out", MAIN,
     "size_t begin = first + blockIdx.x * CHUNK, end = min(begin + CHUNK, last);",
     "size_t begin = first + blockIdx.x * CHUNK, end = min(begin + CHUNK, last - 64);",
     "serial_fp32", "adamw"),
    ("clipping: wrong way", MAIN, "fminf(1.0f, o.clip /", "fmaxf(1.0f, o.clip /", "serial_fp32", "adamw"),
    ("gradient norm: one chunk", MAIN,
     "for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];",
     "for (int i = threadIdx.x; i < 1; i += blockDim.x) sum += sums[i];",
     "serial_fp32", "adamw"),
    ("block: residual of the wrong half", MAIN,
     "norm_residual_forward(next, a.w2_stats, a.w2_raw, a.h,",
     "norm_residual_forward(next, a.w2_stats, a.w2_raw, a.x,",
     "serial_fp32", "golden"),
    ("block backward: gradient around the branch lost", MAIN,
     "norm_backward(m.dres, m.g(gain), m.partial, m.dres, m.dnormed, x,",
     "norm_backward(m.dres, m.g(gain), m.partial, nullptr, m.dnormed, x,",
     "serial_fp32", "golden"),
    ("tied head: embedding gradient overwrites", MAIN,
     "out[c] += float(row[c]);",
     "out[c] = float(row[c]);",
     "serial_fp32", "golden"),
]


def passes(work, build, test):
    """Builds a test in `work` and runs it, exact ones with three lane orders. None: it does not build."""
    quiet = dict(cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = "build/test_" + build
    if subprocess.run(["make", "-s", target, "OPTIMIZE=-O1"], **quiet).returncode:
        return None
    command = ["./" + target, "--quick", "--filter", test]
    seeds = ("1",) if "serial" in build else ("1", "2", "3")
    return not any(subprocess.run(command, env={**os.environ, "CUDA_CPU_SEED": seed, "OMP_NUM_THREADS": "1"}, **quiet)
                   .returncode for seed in seeds)


def main():
    words = sys.argv[1:]
    survived = stale = caught = 0
    with tempfile.TemporaryDirectory() as work:
        for name in ("Makefile", "train_gpt.cu", "simplenorm.cuh", "test_gpt.cu", "dataloader.h", "tokenizer.h"):
            shutil.copy(os.path.join(ROOT, name), work)
        shutil.copytree(os.path.join(ROOT, "dev", "cpu"), os.path.join(work, "dev", "cpu"))
        shutil.copytree(os.path.join(ROOT, "dev", "test", "golden"), os.path.join(work, "dev", "test", "golden"))
        chosen = [m for m in MUTATIONS if not words or any(w in m[0] for w in words)]
        for build, test in sorted({m[4:] for m in chosen}):
            if not passes(work, build, test):
                print(f"mutate.py: {build} {test}: fails without any mutation. Mend that first.", file=sys.stderr)
                return 1
        for name, file, old, new, build, test in chosen:
            source = open(os.path.join(ROOT, file)).read()
            if source.count(old) != 1:
                print(f"STALE    {name}: its text stands {source.count(old)} times in {file}", flush=True)
                stale += 1
                continue
            with open(os.path.join(work, file), "w") as f:
                f.write(source.replace(old, new))
            verdict = {None: "NOBUILD", True: "SURVIVED", False: "caught"}[passes(work, build, test)]
            caught += verdict == "caught"
            survived += verdict != "caught"
            print(f"{verdict:8} {name} ({build})", flush=True)
            shutil.copy(os.path.join(ROOT, file), work)
    print(f"{caught} caught, {survived} survived, {stale} stale")
    return 1 if survived else 2 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
