#!/usr/bin/env python3
"""Breaks the kernels and the model, one place at a time, and looks whether a test notices. Standard library only.

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
    # Rows
    ("rows: ragged end", MAIN, "if (BF16 || c + e < W) f(p, e, c + e);", "f(p, e, c + e);", "exact_fp32", "norm_residual"),
    ("rows: threads rounded down", MAIN,
     "return (packs + 32 * P - 1) / (32 * P) * 32; };",
     "return std::max(1, packs / (32 * P)) * 32; };",
     "exact_bf16", "norm_residual"),
    ("pack writer: last element", MAIN,
     "pack[e / 2] = pack_bf16(even, x);",
     "pack[e / 2] = pack_bf16(even, e == PACK - 1 ? 0.0f : x);",
     "exact_bf16", "norm_residual"),
    ("column sums: swizzle on one side", MAIN, "line[c] = sum[at(c)];", "line[c] = sum[c];", "exact_bf16", "norm_backward"),
    ("column sums: second half not stored", MAIN,
     "if (e % 4 == 3) *half = make_float4(",
     "if (e == 3) *half = make_float4(",
     "exact_bf16", "norm_backward"),
    ("column sums: last not zeroed", MAIN,
     "for (int c = threadIdx.x; c < W; c += blockDim.x) sum[c] = 0.0f;",
     "for (int c = threadIdx.x; c < W - 1; c += blockDim.x) sum[c] = 0.0f;",
     "exact_fp32", "norm_backward"),
    # SimpleNorm
    ("rmsnorm: eps forgotten", NORM, "square[i] / W[i] + norm.eps", "square[i] / W[i]", "exact_fp32", "norm_residual"),
    ("rmsnorm: last column left out", NORM,
     "each<PACKS>(W[i], [&](int p, int e, int) {\n            const float d",
     "each<PACKS>(W[i] - 1, [&](int p, int e, int) {\n            const float d",
     "exact_fp32", "norm_residual"),
    ("row stats: read where they are not known", NORM, "    if (known) {", "    if (true) {", "exact_fp32", "norm_residual"),
    ("row stats: known ones ignored", NORM, "    if (known) {", "    if (false) {", "serial_fp32", "known_stats"),
    ("row stats: known ones of the first part for all", NORM,
     "s[i] = stats[i];",
     "s[i] = stats[0];",
     "serial_fp32", "known_stats"),
    ("residual: sign", NORM, "res ? add(p, e) + y : y", "res ? add(p, e) - y : y", "exact_fp32", "norm_residual"),
    ("norm backward: c2 sign", NORM,
     "d(p, e) - c1 - normalize(row(p, e), s) * c2);",
     "d(p, e) - c1 + normalize(row(p, e), s) * c2);",
     "exact_fp32", "norm_backward"),
    ("norm backward: c1 forgotten", NORM,
     "c1 = norm.center ? means[0] / C : 0.0f,",
     "c1 = 0.0f,",
     "exact_fp32", "norm_backward"),
    ("gain gradient: last block left out", NORM,
     "b < blocks; b += num_warps()",
     "b < blocks - 1; b += num_warps()",
     "exact_fp32", "norm_backward"),
    ("gain gradient: overwrites", NORM,
     "dgain[c] = float(dgain[c]) + sum;",
     "dgain[c] = sum;",
     "exact_fp32", "norm_backward"),
    ("gain gradient: last warp's sum left out", NORM,
     "w < num_warps(); w++) sum += sums[w]",
     "w < num_warps() - 1; w++) sum += sums[w]",
     "exact_bf16", "norm_backward"),
    ("gain gradient: missing barrier", NORM,
     "    __syncthreads();\n    for (int c = first + threadIdx.x",
     "    for (int c = first + threadIdx.x",
     "exact_bf16", "norm_backward"),
    ("rope: sign", NORM,
     "make_float2(y.x * angle.x - y.y * angle.y,",
     "make_float2(y.x * angle.x + y.y * angle.y,",
     "serial_fp32", "qkv"),
    ("rope: not undone in backward", NORM,
     "rotate(d, make_float2(angle[i].x, -angle[i].y))",
     "rotate(d, angle[i])",
     "serial_fp32", "qkv"),
    ("qkv: v rotated too", NORM,
     "rope && part < 2 ? rope + n % h.T * (h.HS / 2) : nullptr;\n        floatX* out",
     "rope ? rope + n % h.T * (h.HS / 2) : nullptr;\n        floatX* out",
     "serial_fp32", "qkv"),
    ("qkv backward: gain forgotten", NORM,
     "d.x = s.y * (g(gain + c, e) * d.x - c1",
     "d.x = s.y * (d.x - c1",
     "serial_fp32", "qkv"),
    ("qkv backward: next head's row", NORM,
     "from + size_t(c / h.HS) * h.T * h.HS + c % h.HS",
     "from + size_t(c / h.HS) * h.HS + c % h.HS",
     "exact_bf16", "qkv"),
    ("silu: derivative", NORM,
     "v * s * (1.0f + u * (1.0f - s))",
     "v * s * (1.0f - u * (1.0f - s))",
     "exact_fp32", "ffn"),
    ("gelu: derivative", NORM, "cdf + u * 0.39894228f", "cdf - u * 0.39894228f", "exact_fp32", "ffn"),
    ("ffn forward: stats of w1 for w3", NORM,
     "u[i] = normalize(x[i](p, e), s[i]);",
     "u[i] = normalize(x[i](p, e), s[0]);",
     "exact_fp32", "ffn"),
    ("ffn backward: w3's stats", NORM,
     "s[i] = gain ? stats[PARTS * n + i] :",
     "s[i] = gain ? stats[PARTS * n] :",
     "exact_fp32", "ffn"),
    ("ffn backward: staged row taken before it is there", NORM,
     "        if (staged) copy_wait<0>();\n",
     "",
     "exact_bf16", "ffn"),
    ("ffn backward: next row fetched before this one is taken", NORM,
     "        if (staged) copy_wait<0>();\n",
     "        if (staged) copy_wait<0>();\n        fetch(n + gridDim.x);\n",
     "exact_bf16", "ffn"),
    # reductions
    ("block sum: missing barrier", MAIN,
     "        if (lane() == 0) part[warp() * K + k] = v[k];\n    __syncthreads();\n",
     "        if (lane() == 0) part[warp() * K + k] = v[k];\n",
     "exact_fp32", "norm_residual"),
    ("block sum: first barrier missing", MAIN,
     "    __syncthreads();  // the last call's readers are done\n",
     "",
     "exact_fp32", "norm"),
    ("block max: missing barrier", MAIN,
     "    if (lane() == 0) part[warp()] = v;\n"
     "    __syncthreads();\n"
     "    return warp_max(",
     "    if (lane() == 0) part[warp()] = v;\n"
     "    return warp_max(",
     "exact_bf16", "cross_entropy"),
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
    # embedding, loss
    ("embedding backward: last place left out", MAIN,
     "for (int i = first; i < last; i++) sum +=",
     "for (int i = first; i < last - 1; i++) sum +=",
     "serial_fp32", "embedding"),
    ("embedding backward: overwrites", MAIN, "float sum = out[c];", "float sum = 0.0f;", "serial_fp32", "embedding"),
    ("positions: one sequence only", MAIN,
     "for (int b = 0; b < B; b++) sum += float(dx[",
     "for (int b = 0; b < 1; b++) sum += float(dx[",
     "serial_fp32", "embedding"),
    ("cross-entropy: padding in the sum", MAIN,
     "if (v + e >= V) logit[e] = -INFINITY;",
     "if (v + e >= Vp) logit[e] = -INFINITY;",
     "exact_bf16", "cross_entropy"),
    ("cross-entropy: sum not rescaled to a new maximum", MAIN,
     "if (highest > top) sum *= __expf(top - highest), top = highest;",
     "top = highest;",
     "exact_bf16", "cross_entropy"),
    ("cross-entropy: threads' sums not rescaled to the block's maximum", MAIN,
     "sum *= own > -INFINITY ? __expf(own - top) : 0.0f;",
     "sum *= own > -INFINITY ? 1.0f : 0.0f;",
     "exact_bf16", "cross_entropy"),
    ("cross-entropy: target not subtracted", MAIN, "(v == target ? 1.0f : 0.0f)", "0.0f", "exact_fp32", "cross_entropy"),
    # attention, one source for all GPUs
    ("tile: columns of a lane", MAIN,
     "e / 2 * 8 + lane() % 4 * 2 + e % 2; }",
     "e / 2 * 8 + lane() % 4 + e % 2 * 4; }",
     "exact_bf16", "attention"),
    ("tile: layout by column", MAIN, "layout == BY_ROW ? s * N + e : e * M + s;", "s * N + e;", "serial_fp32", "attention"),
    ("mma_nt: halves of k swapped", MAIN,
     "lane() / 16 * 8, lane() / 8 % 2 * 8, k));",
     "lane() / 16 * 8, 8 - lane() / 8 % 2 * 8, k));",
     "exact_bf16", "attention"),
    ("mma_nn: fragments of b swapped", MAIN,
     "shared_at<W>(16 * k + lane() % 16, lane() / 16 * 8, 16 * j));",
     "shared_at<W>(16 * k + lane() % 16, 8 - lane() / 16 * 8, 16 * j));",
     "exact_bf16", "attention"),
    ("store_tile: swizzle on one side", MAIN,
     "*reinterpret_cast<const uint4*>(own + shared_at<W>(row, col));",
     "*reinterpret_cast<const uint4*>(own + row * STRIDE<W> + col);",
     "exact_bf16", "attention"),
    ("load_tile: rows beyond T not zero", MAIN,
     "const bool there = row < valid && col < HS;",
     "const bool there = col < HS;",
     "exact_bf16", "attention"),
    ("attention: mask off by one", MAIN,
     "p.col(e) <= p.row(s) + diagonal ?",
     "p.col(e) <= p.row(s) + diagonal + 1 ?",
     "exact_bf16", "attention"),
    ("attention: sums not rescaled", MAIN,
     "sum[s] *= keep[s];\n                    #pragma unroll",
     "#pragma unroll",
     "serial_fp32", "attention"),
    ("attention: out not rescaled", MAIN,
     "for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= keep[s];\n                }\n            }\n            softmax_exp",
     "for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= 1.0f;\n                }\n            }\n            softmax_exp",
     "serial_fp32", "attention"),
    ("attention: barrier before k's tile is overwritten", MAIN,
     "        __syncthreads();  // this tile is here, and nobody reads the one before it any more\n",
     "",
     "exact_bf16", "attention"),
    ("attention: barrier before v's tile is overwritten", MAIN,
     "        __syncthreads();\n        fetch(2 * step + 1 + FORWARD_AHEAD);",
     "        fetch(2 * step + 1 + FORWARD_AHEAD);",
     "exact_bf16", "attention"),
    ("attention: v's tile not waited for", MAIN,
     "        copy_wait<FORWARD_AHEAD / 2>();\n        __syncthreads();\n        fetch(2 * step + 1",
     "        copy_wait<FORWARD_AHEAD>();\n        __syncthreads();\n        fetch(2 * step + 1",
     "exact_bf16", "attention"),
    ("attention: q not waited for", MAIN,
     "copy_wait<1>();\n        __syncthreads();\n        rows.keep();",
     "copy_wait<2>();\n        __syncthreads();\n        rows.keep();",
     "exact_bf16", "attention"),
    ("attention: wrong k/v head", MAIN,
     "kv_at = (size_t(b) * NKV + head / (NH / NKV)) * T * HS;",
     "kv_at = (size_t(b) * NKV + head % NKV) * T * HS;",
     "serial_fp32", "attention"),
    ("attention backward: delta forgotten", MAIN,
     "ds.at(s, e) = p.at(s, e) * (ds.at(s, e) - d.x);",
     "ds.at(s, e) = p.at(s, e) * ds.at(s, e);",
     "serial_fp32", "attention"),
    ("attention backward: queries before the key", MAIN,
     "p.at(s, e) = p.col(e) >= p.row(s) + diagonal ?",
     "p.at(s, e) = p.col(e) >= p.row(s) + diagonal - 1 ?",
     "exact_bf16", "attention"),
    ("attention backward: one head of the group", MAIN, "steps = group * last_tiles;", "steps = last_tiles;",
     "serial_fp32", "attention"),
    ("attention backward: barrier before q's tile is overwritten", MAIN,
     "            __syncthreads();  // this tile is here; the last step is over: its tiles are read, its dq is written\n",
     "",
     "exact_bf16", "attention"),
    ("attention backward: ds read before it is there", MAIN,
     "            if (given && threadIdx.x == 0) flag_write(given, block + 1);\n            __syncthreads();\n",
     "            if (given && threadIdx.x == 0) flag_write(given, block + 1);\n",
     "exact_bf16", "attention"),
    ("attention backward: turn not passed on", MAIN,
     "given = ends ? nullptr : turns + at;",
     "given = nullptr;",
     "exact_bf16", "attention"),
    ("attention backward: turns not zeroed", MAIN,
     "if (t % BACKWARD_QUERIES == 0) turns[",
     "if (t == 0) turns[",
     "exact_bf16", "attention"),
    # attention on Hopper
    ("Hopper forward: mask off by one", MAIN,
     "mask_scores(p, diagonal);\n            const bool grown",
     "mask_scores(p, diagonal + 1);\n            const bool grown",
     "exact_bf16", "attention"),
    ("Hopper forward: wrong k/v head", MAIN,
     "place.head / NH * NKV + place.head % NH / (NH / NKV);",
     "place.head / NH * NKV + place.head % NH % NKV;",
     "exact_bf16", "attention"),
    ("Hopper forward: k overwritten while it is read", MAIN,
     "                mbarrier_wait(k_empty + stage, phase ^ 1);\n",
     "",
     "exact_bf16", "attention"),
    ("Hopper forward: wrong phase of v", MAIN,
     "mbarrier_wait(v_full + before, before_phase);",
     "mbarrier_wait(v_full + before, phase);",
     "exact_bf16", "attention"),
    ("Hopper forward: out not rescaled", MAIN,
     "release(v_empty + before);\n            if (grown) {",
     "release(v_empty + before);\n            if (false) {",
     "exact_bf16", "attention"),
    ("Hopper forward: out stored without a fence", MAIN,
     "rounded + 4 * c);\n        fence_async_shared();\n",
     "rounded + 4 * c);\n",
     "exact_bf16", "attention"),
    ("Hopper forward: place of q given back before out is stored", MAIN,
     "            tma_store_wait<0>();\n            mbarrier_arrive(q_empty + buffer);",
     "            mbarrier_arrive(q_empty + buffer);",
     "exact_bf16", "attention"),
    ("Hopper forward: lse of rows past T", MAIN,
     "if (lane() % 4 == 0 && t < T) lse[",
     "if (lane() % 4 == 0) lse[",
     "exact_bf16", "attention"),
    ("Hopper forward: counter of tiles does not return to 0", MAIN,
     "atomicInc(&attention_next_tile, all_tiles - 1)",
     "atomicInc(&attention_next_tile, all_tiles)",
     "exact_bf16", "attention"),
    ("Hopper backward: mask off by one", MAIN,
     "Scores::col(e) >= Scores::row(s) + diagonal ?",
     "Scores::col(e) >= Scores::row(s) + diagonal - 1 ?",
     "exact_bf16", "attention"),
    ("Hopper backward: heads of a group", MAIN,
     "const int first_head = place.head * (NH / NKV),",
     "const int first_head = place.head,",
     "exact_bf16", "attention"),
    ("Hopper backward: q overwritten while it is read", MAIN,
     "size_t(head) * T + t0;\n            mbarrier_wait(empty + stage, phase ^ 1);",
     "size_t(head) * T + t0;\n            (void)phase;",
     "exact_bf16", "attention"),
    ("Hopper backward: ds without a fence", MAIN,
     "        fence_async_shared();\n        named_barrier_sync(1, 256);  // ds is there",
     "        named_barrier_sync(1, 256);  // ds is there",
     "exact_bf16", "attention"),
    ("Hopper backward: ds read before it is there", MAIN,
     "        named_barrier_sync(1, 256);  // ds is there, and the last tile's is read\n",
     "",
     "exact_bf16", "attention"),
    ("Hopper backward: dq's sum of the blocks before left out", MAIN,
     "            if (block > 0) {\n                if (lane() == 0)\n                    while (flag_read(turn_of",
     "            if (false) {\n                if (lane() == 0)\n                    while (flag_read(turn_of",
     "exact_bf16", "attention"),
    ("Hopper backward: turn not passed on", MAIN,
     "                    flag_write(turn, block + 1);\n",
     "",
     "exact_bf16", "attention"),
    ("Hopper backward: dq of rows past T", MAIN,
     "if (t < T) store_pair(row + acc.col(e), scale",
     "store_pair(row + acc.col(e), scale",
     "exact_bf16", "attention"),
    # matmul on Hopper
    ("matmul: slot not waited for", MAIN,
     "            mbarrier_wait(full + stage, phase);\n            const unsigned char* slot",
     "            const unsigned char* slot",
     "exact_bf16", "matmul_sums"),
    ("matmul: slot filled before it is given back", MAIN,
     "mbarrier_wait(empty + stage, phase ^ 1);  // at first, the phase before the first counts as completed\n"
     "                mbarrier_arrive_expect(full + stage, S::SLOT);",
     "mbarrier_arrive_expect(full + stage, S::SLOT);",
     "exact_bf16", "matmul_sums"),
    ("matmul: box written before its last store has left", MAIN,
     "if (lane() == 0) tma_store_wait<1>();  // the store",
     "// the store",
     "exact_bf16", "matmul_sums"),
    ("matmul: box stored without a fence", MAIN,
     "            fence_async_shared();\n            __syncwarp();\n            if (lane() == 0) {\n                if (n0 < N",
     "            __syncwarp();\n            if (lane() == 0) {\n                if (n0 < N",
     "exact_bf16", "matmul_sums"),
    ("matmul: sums of the wrong rows", MAIN, "square[i % 2] += low", "square[i / 2] += low", "exact_bf16", "matmul_sums"),
    ("matmul: sums of rows past N", MAIN,
     "lane() % 4 == 0 && n < N && m0 < M) sums[",
     "lane() % 4 == 0 && m0 < M) sums[",
     "exact_bf16", "matmul_sums"),
    ("matmul: sums of the wrong columns", MAIN,
     "p == 1 ? width0 : width0 + width1;",
     "p == 1 ? width0 : width1;",
     "exact_bf16", "matmul_sums"),
    ("matmul: rows of the last group of tiles", MAIN,
     "rows = min(tile_rows - first, group_rows);",
     "rows = group_rows;",
     "exact_bf16", "matmul_sums"),
    # the model
    ("linear: stats that are not there", MAIN,
     "if (way == 0 || !stats) return false;",
     "if (way == 0 || !stats) return true;",
     "serial_fp32", "golden"),
    ("block: residual of the wrong half", MAIN,
     "norm_residual_forward(next, a.w2_stats, a.w2_raw, a.h,",
     "norm_residual_forward(next, a.w2_stats, a.w2_raw, a.x,",
     "serial_fp32", "golden"),
    ("block backward: gradient around the branch lost", MAIN,
     "norm_backward(m.dres, m.g(gain), m.partial, m.dres, m.dnormed, x,",
     "norm_backward(m.dres, m.g(gain), m.partial, nullptr, m.dnormed, x,",
     "serial_fp32", "golden"),
    ("block backward: gradient around the branch lost in the matmul", MAIN,
     "linear_backward(add ? m.dres : m.dnormed, add,",
     "linear_backward(add ? m.dres : m.dnormed, false,",
     "serial_fp32", "golden"),
    ("replay: the block's middle left out", MAIN,
     "if (replay_norm) norm_residual_forward(a.h,",
     "if (next) norm_residual_forward(a.h,",
     "serial_fp32", "recompute"),
    ("replay: attention left out", MAIN,
     "if (replay_block) attention_forward",
     "if (next) attention_forward",
     "serial_fp32", "recompute"),
    ("replay: w1 and w3 left out", MAIN, "    if (replay_ffn) {", "    if (replay_block) {", "serial_fp32", "recompute"),
    ("loss: later chunks of the head overwrite", MAIN, "row == 0 ? beta : 1.0f", "beta", "serial_fp32", "golden"),
    ("loss: targets of the first chunk for all", MAIN,
     "m.logits, m.targets + row, rows",
     "m.logits, m.targets, rows",
     "serial_fp32", "golden"),
    ("step: first micro-batch adds", MAIN, "return 0.0f;\n}\n\n// sum[i]", "return 1.0f;\n}\n\n// sum[i]", "serial_fp32", "anew"),
    ("step: embedding's gradient not zeroed", MAIN,
     "t.offset == m.table.pos || (t.offset == m.table.tok && !m.table.tied())) continue;",
     "t.offset == m.table.pos) continue;",
     "serial_fp32", "anew"),
    ("step: what is not finite counts", MAIN, "if (n->skip) return;", "", "serial_fp32", "bad_steps"),
    ("step: an update that was not counts", MAIN, "n->skip ? n->skipped++ : n->updates++;",
     "n->skipped += n->skip, n->updates++;", "serial_fp32", "bad_steps"),
    ("units: of a number of ranks only one", MAIN, "align(64 * size_t(ranks));", "align(64);", "serial_fp32", "units"),
    ("hash: a lane lost", MAIN, "for (uint64_t lane : lanes) h =", "for (uint64_t lane : {lanes[0], lanes[1], lanes[2]}) h =",
     "serial_fp32", "hash"),
    ("graph: of another weight", MAIN, " || g.weight != weight) {", ") {", "serial_fp32", "graph"),
    # optimizer
    ("AdamW: correction forgotten", MAIN, "root2 = rsqrtf(n->correction2)", "root2 = 1.0f", "exact_fp32", "adamw"),
    ("AdamW: last chunk left out", MAIN,
     "size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, count);\n    for (size_t i = begin + threadIdx.x * FOUR;",
     "size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, count - 64);\n    for (size_t i = begin + threadIdx.x * FOUR;",
     "exact_fp32", "adamw"),
    ("AdamW: rounding always down", MAIN,
     "up = (bits + (r & 0xffffu)) & 0xffff0000u;",
     "up = (bits + (r & 0u)) & 0xffff0000u;",
     "serial_fp32", "random_rounding"),
    ("clipping: wrong way", MAIN, "fminf(1.0f, o.clip /", "fmaxf(1.0f, o.clip /", "exact_fp32", "adamw"),
    ("gradient norm: one chunk", MAIN,
     "for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];",
     "for (int i = threadIdx.x; i < 1; i += blockDim.x) sum += sums[i];",
     "exact_fp32", "adamw"),
]


def passes(work, build, test):
    """Builds a test in `work` and runs it, exact ones with three lane orders. None: it does not build. (Of the serial tests
    those that sum over long rows need -O3's order of adding for their tolerances: here they run in the exact geometry.)"""
    quiet = dict(cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = "build/test_" + build
    if subprocess.run(["make", "-s", target, "OPTIMIZE=-O1"], **quiet).returncode:
        return None
    command = ["./" + target, "--quick", "--filter", test]
    for seed in ("1",) if "serial" in build else ("1", "2", "3"):
        env = {**os.environ, "CUDA_CPU_SEED": seed, "OMP_NUM_THREADS": "1"}
        try:
            if subprocess.run(command, env=env, timeout=300, **quiet).returncode:
                return False
        except subprocess.TimeoutExpired:  # who waits for ever has failed
            return False
    return True


def main():
    words = sys.argv[1:]
    survived = stale = caught = 0
    with tempfile.TemporaryDirectory() as work:
        for name in ("Makefile", "train_gpt.cu", "simplenorm.cuh", "test_gpt.cu", "dataloader.h", "tokenizer.h"):
            shutil.copy(os.path.join(ROOT, name), work)
        shutil.copytree(os.path.join(ROOT, "dev", "cpu"), os.path.join(work, "dev", "cpu"))
        shutil.copytree(os.path.join(ROOT, "dev", "test", "golden"), os.path.join(work, "dev", "test", "golden"))
        shutil.copy(os.path.join(ROOT, "dev", "test", "frame.h"), os.path.join(work, "dev", "test"))
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
