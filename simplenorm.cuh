// SimpleNorm: Psi(x) = Norm(W x), a norm right behind a linear layer, with its gain; there are no pre-norms (arXiv
// 2602.01212). W x is a plain matmul. This file is the rest: the norm of each row of W x, fused with what must read
// that row anyway,
//
//   linear     forward                                             backward, one pass
//   q, k, v    norm, RoPE on q and k, split into heads             un-rotate, norm backward, merge the heads
//   o, w2      norm, residual add                                  norm backward
//   w1, w3     two norms, silu, product (fc: one norm, GELU)       product, activation, norm backward
//
// With C the length of a row and g the gain,
//   xh = (x - mean) rstd,   y = g xh,   rstd = 1 / sqrt(mean_c (x - mean)^2 + eps)
//   RMSNorm: mean = 0.  LayerNorm without bias: mean = mean_c x.
//   dx = rstd (g dy - c1 - xh c2),   c2 = mean_c(g dy xh),   c1 = mean_c(g dy) for LayerNorm, 0 for RMSNorm
//   dg = sum over the rows of dy xh
// A norm's backward reads only the linear's raw output and (mean, rstd) of each row; xh and y are computed again.
// A gain that is null means: no such norm in this variant (y = x), so all variants of the model share these kernels.
//
// Layout of the work (dev/device/rows.cuh): forward one block a row, a thread its packs of it, which stay in
// registers between the passes.
// Backward as many blocks as fit on the device, each walks rows blockIdx.x, + gridDim.x, ... and adds dy xh into its
// own line of `partial` (gridDim.x, width); gain_grad sums the lines in a fixed order: no atomics, same bits.
//
// The words: a Row is a thread's part of a row, in packs of 16 bytes; each(W, f) calls f(p, e, c) for element e of pack
// p, column c. PackReader and PackWriter read and write at a column c, a pack at its element e = 0 or its last.
// ColumnSums are the block's line of `partial` while it lies in shared memory. part 0, 1, 2: q, k, v. Read
// norm_residual_forward and norm_backward first; the others are the same with what is fused. What is `staged` or `HELD`
// there is for speed alone.
#pragma once
#include "dev/device/heads.cuh"
#include "dev/device/rows.cuh"

struct Norm {
    float eps;
    bool center;  // false: RMSNorm, true: LayerNorm without bias
};

__device__ inline float normalize(float x, float2 stats) { return (x - stats.x) * stats.y; }

// s[i] = stats[i] = mean and rstd of row i, W[i] elements, by the whole block
template <int PACKS, int ROWS>
__device__ inline void row_stats(float2 (&s)[ROWS], float2* stats, const Row<PACKS> (&rows)[ROWS], const int (&W)[ROWS],
                                 Norm norm) {
    float mean[ROWS] = {}, square[ROWS] = {};
    if (norm.center) {
        #pragma unroll
        for (int i = 0; i < ROWS; i++) each<PACKS>(W[i], [&](int p, int e, int) { mean[i] += rows[i](p, e); });
        block_sums(mean);
    }
    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float m = mean[i] = mean[i] / W[i];
        float sum = 0.0f;
        each<PACKS>(W[i], [&](int p, int e, int) {
            const float d = rows[i](p, e) - m;
            sum += d * d;
        });
        square[i] = sum;
    }
    block_sums(square);
    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        s[i] = make_float2(mean[i], rsqrtf(square[i] / W[i] + norm.eps));
        if (threadIdx.x == 0) stats[i] = s[i];
    }
}

// What a block may ask for beside block_sums' own: two arrays at most, of two floats for each of 32 warps.
inline size_t dynamic_room(const Gpu& gpu) { return gpu.shared - 2 * 32 * 2 * sizeof(float); }

// Lets a kernel have this many bytes of dynamic shared memory; returns them.
template <typename Kernel>
size_t dynamic_shared(Kernel* kernel, size_t bytes, const Gpu& gpu) {
    if (bytes > dynamic_room(gpu))
        throw Error(format(
            "norm backward: the sums of a row's columns need %zu bytes of shared memory, of which a block has %zu "
            "here. Choose a narrower model.",
            bytes, dynamic_room(gpu)));
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gain gradient, second stage: dgain[c] += sum_b partial[b, c] for c < W. dgain (W) G, partial (blocks, stride) float.
// A block has 32 columns; each of its 8 warps sums every 8th line, a lane a column, then the first sums the 8 sums. (In
// the serial geometry one warp has 256 columns, so that there is a loop to vectorise.)

constexpr int GAIN_COLUMNS = SERIAL ? 256 : 32;

template <typename G>
__global__ void gain_grad_kernel(G* dgain, const float* partial, int blocks, int W, int stride) {
    constexpr int OWN = GAIN_COLUMNS / WARP_SIZE;  // columns of a lane
    __shared__ float sums[8][GAIN_COLUMNS];
    const int first = blockIdx.x * GAIN_COLUMNS, end = min(W, first + GAIN_COLUMNS);
    float sum[OWN] = {};
    for (int b = warp(); b < blocks; b += num_warps())
        #pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int c = first + i * WARP_SIZE + lane();
            if (c < end) sum[i] += partial[size_t(b) * stride + c];
        }
    #pragma unroll
    for (int i = 0; i < OWN; i++) sums[warp()][i * WARP_SIZE + lane()] = sum[i];
    __syncthreads();
    for (int c = first + threadIdx.x; c < end; c += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < num_warps(); w++) sum += sums[w][c - first];
        dgain[c] = float(dgain[c]) + sum;
    }
}

void gain_grad(Flat dgain, const float* partial, int blocks, int W, int stride, const Gpu& gpu) {
    dgain.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        gain_grad_kernel<G>
            <<<(W + GAIN_COLUMNS - 1) / GAIN_COLUMNS, 256, 0, gpu.stream>>>(d, partial, blocks, W, stride);
    });
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Norm of a row, then the residual: out[n,c] = res[n,c] + y[n,c]. The o and w2 linears. With res null the plain norm
// (pre-norms, final norm). out, x, res (N,C) floatX; gain (C) floatX or null; stats (N) float2, written if gain.

template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS)
    norm_residual_forward_kernel(floatX* out, float2* stats, const floatX* x, const floatX* res, const floatX* gain,
                                 int C, Norm norm) {
    const size_t n = blockIdx.x;
    Row<PACKS> row[1], add, g;
    row[0].load(x + n * C, C);
    if (res) add.load(res + n * C, C);
    if (gain) g.load(gain, C);
    float2 s[1] = {make_float2(0.0f, 1.0f)};
    if (gain) row_stats<PACKS, 1>(s, stats + n, row, {C}, norm);
    out += n * C;
    PackWriter write;
    each<PACKS>(C, [&](int p, int e, int c) {
        const float y = gain ? g(p, e) * normalize(row[0](p, e), s[0]) : row[0](p, e);
        write(out + c, e, res ? add(p, e) + y : y);
    });
}

void norm_residual_forward(floatX* out, float2* stats, const floatX* x, const floatX* res, const floatX* gain, int N,
                           int C, Norm norm, const Gpu& gpu) {
    row_shape(C, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        norm_residual_forward_kernel<P><<<N, threads, 0, gpu.stream>>>(out, stats, x, res, gain, C, norm);
    });
    CHECK(cudaGetLastError());
}

// The plain norm, out[n,c] = y[n,c]. A norm that the variant lacks has out == x and costs nothing.
void norm_forward(floatX* out, float2* stats, const floatX* x, const floatX* gain, int N, int C, Norm norm,
                  const Gpu& gpu) {
    if (gain) norm_residual_forward(out, stats, x, nullptr, gain, N, C, norm, gpu);
}

// A row's dx by the formula at the top, W elements of which d(p, e, c) are dy; given to write(p, e, c, dx). `ahead` are
// rows that are needed soon.
template <int PACKS, typename D, typename Write, typename... Ahead>
__device__ inline void norm_backward_row(const Row<PACKS>& x, const floatX* gain, float2 s, ColumnSums& dg, int W,
                                         Norm norm, D d, Write write, Ahead... ahead) {
    PackReader g;
    float sum_gd = 0.0f, sum_gdx = 0.0f;
    each<PACKS>(W, [&](int p, int e, int c) {
        const float xh = normalize(x(p, e), s), gd = g(gain + c, e) * d(p, e, c);
        sum_gd += gd;
        sum_gdx += gd * xh;
        dg.add(c, e, d(p, e, c) * xh);
    });
    float means[2] = {sum_gd, sum_gdx};
    block_sums(means);
    const float c1 = norm.center ? means[0] / W : 0.0f, c2 = means[1] / W;
    auto gradient = [&](int p, int e, int c) {
        write(p, e, c, s.y * (g(gain + c, e) * d(p, e, c) - c1 - normalize(x(p, e), s) * c2));
    };
    each<PACKS>(W, gradient, ahead...);
}

// Norm backward: dx[n,c] = plus[n,c] + (dx of the formula at the top). dx, dy, x, plus (N,C) floatX, plus null
// for nothing, may be dx itself; gain (C) floatX, stats (N); dgain (C), added to; partial (row_blocks(N, C), C) float
// scratch.
template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS, ROW_RESIDENT<PACKS>)
    norm_backward_kernel(floatX* dx, float* partial, const floatX* plus, const floatX* dy, const floatX* x,
                         const floatX* gain, const float2* stats, int N, int C, Norm norm) {
    extern __shared__ __align__(16) float column_sums[];
    partial += size_t(blockIdx.x) * C;
    ColumnSums dg(SERIAL ? partial : column_sums);
    dg.zero(C);
    const BlockRows rows(N);
    for (size_t n = rows.first; n < rows.end; n += rows.step) {
        Row<PACKS> row, d, add;
        row.load(x + n * C, C);
        d.load(dy + n * C, C);
        if (plus) add.load(plus + n * C, C);
        floatX* out = dx + n * C;
        PackWriter write;
        norm_backward_row(
            row, gain, stats[n], dg, C, norm, [&](int p, int e, int) { return d(p, e); },
            [&](int p, int e, int c, float v) { write(out + c, e, plus ? add(p, e) + v : v); });
    }
    dg.write(partial, C);
}

void norm_backward(floatX* dx, Flat dgain, float* partial, const floatX* plus, const floatX* dy, const floatX* x,
                   const floatX* gain, const float2* stats, int N, int C, Norm norm, const Gpu& gpu) {
    const int blocks = row_blocks(N, C, gpu);
    row_shape(C, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        const size_t shared = dynamic_shared(norm_backward_kernel<P>, ColumnSums::bytes(C), gpu);
        norm_backward_kernel<P>
            <<<blocks, threads, shared, gpu.stream>>>(dx, partial, plus, dy, x, gain, stats, N, C, norm);
    });
    CHECK(cudaGetLastError());
    gain_grad(dgain, partial, blocks, C, C, gpu);
}

// ---------------------------------------------------------------------------------------------------------------------
// q, k, v: norm of each over its full width (all heads together), RoPE on q and k, split into heads.
//   raw (B,T,QKV) floatX, QKV = (NH + 2 NKV) HS: the outputs of the three linears side by side
//   q (B,NH,T,HS), k, v (B,NKV,room,HS) floatX: the layout of attention (dev/device/heads.cuh); new rows of k and v go
//   behind the `past` ones that are there
//   RoPE on adjacent pairs, (a, b) -> (a cos - b sin, a sin + b cos), angle t theta^(-2i/HS) of pair i at position t
// rope (past + T,HS/2) float2 of (cos, sin), null for none; stats (B,T,3) float2, written if there are norms,
// v's too where only q and k have one.

struct QkvGains {
    const floatX *q, *k, *v;  // (NH HS), (NKV HS), (NKV HS), each null if the variant has no such norm
    __host__ __device__ const floatX* of(int part) const { return part == 0 ? q : part == 1 ? k : v; }
};

__device__ inline float2 rotate(float2 y, float2 angle) {
    return make_float2(y.x * angle.x - y.y * angle.y, y.x * angle.y + y.y * angle.x);
}

// The angles of a pack's pairs, 16 bytes at a time: the `i`-th of a head is that of the elements from e on of a pack.
struct AngleReader {
    float4 v[PACK / 4];
    __device__ float2 operator()(const float2* angles, int i, int e) {
        if constexpr (SERIAL) return angles[i];
        if (e == 0) {
            #pragma unroll
            for (int j = 0; j < PACK / 4; j++) v[j] = reinterpret_cast<const float4*>(angles + i)[j];
        }
        return e % 4 == 0 ? make_float2(v[e / 4].x, v[e / 4].y) : make_float2(v[e / 4].z, v[e / 4].w);
    }
};

// A row (W) that is split into heads: as a Row, but columns of the next head lie h.T rows further.
template <int PACKS>
struct HeadRow : Row<PACKS> {
    __device__ void load(const floatX* from, int W, Heads h) {
        this->x = from;
        if constexpr (!SERIAL) {
            #pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const int c = (p * blockDim.x + threadIdx.x) * PACK;
                if (c < W) load_pack(this->v[p], from + size_t(c / h.HS) * h.T * h.HS + c % h.HS, PACK);
            }
        }
    }
    // element e of pack p, which is the `at`-th from the row's begin
    __device__ float operator()(int p, int e, size_t at) const {
        return SERIAL ? float(this->x[at]) : unpack(this->v[p], e);
    }
};

// Calls f(p, e, c, at, i) for each of this thread's pairs in a part's row:
//   p, e   the pack, and the pair's first element in it      c   its first column
//   at     where it lies in memory that is split into heads, from the row's begin
//   i      its number within the head
// What is needed soon: row_ahead a row, split_ahead one that is split into heads.
template <int PACKS, typename F>
__device__ inline void each_pair(int part, Heads h, F f, const floatX* row_ahead = nullptr,
                                 const floatX* split_ahead = nullptr) {
    const int W = h.width(part);
    const size_t next = size_t(h.rows(part)) * h.HS;
    if constexpr (SERIAL) {
        for (int head = 0; head < W / h.HS; head++) {
            expect(row_ahead + head * h.HS, h.HS);
            expect(split_ahead + head * next, h.HS);
            #pragma GCC ivdep
            for (int i = 0; i < h.HS / 2; i++) {
                const int c = head * h.HS + 2 * i;
                f(0, c, c, head * next + 2 * i, i);
            }
        }
    } else {
        #pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * blockDim.x + threadIdx.x) * PACK, head = c / h.HS, first = c % h.HS;
            if (c >= W) break;
            #pragma unroll
            for (int e = 0; e < PACK; e += 2) f(p, e, c + e, head * next + first + e, first / 2 + e / 2);
        }
    }
}

template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS)
    qkv_norm_rope_forward_kernel(floatX* q, floatX* k, floatX* v, float2* stats, const floatX* raw, QkvGains gains,
                                 const float2* rope, Heads h, Norm norm) {
    const size_t n = blockIdx.x;
    const int W[3] = {h.width(0), h.width(1), h.width(2)};
    Row<PACKS> x[3];
    #pragma unroll
    for (int part = 0; part < 3; part++) x[part].load(raw + n * h.qkv() + h.begin(part), W[part]);
    float2 s[3];
    if (gains.q) row_stats<PACKS, 3>(s, stats + 3 * n, x, W, norm);
    #pragma unroll
    for (int part = 0; part < 3; part++) {
        const floatX* gain = gains.of(part);
        const float2* angle = rope && part < 2 ? rope + (h.past + n % h.T) * (h.HS / 2) : nullptr;
        floatX* out = (part == 0 ? q : part == 1 ? k : v) + h.at(part, n);
        PackReader g;
        AngleReader turn;
        PackWriter write;
        auto pair = [&](int p, int e, int c, size_t at, int i) {
            float2 y = make_float2(x[part](p, e), x[part](p, e + 1));
            if (gain) {
                y.x = g(gain + c, e) * normalize(y.x, s[part]);
                y.y = g(gain + c + 1, e + 1) * normalize(y.y, s[part]);
            }
            if (angle) y = rotate(y, turn(angle, i, e));
            write(out + at, e, y.x);
            write(out + at + 1, e + 1, y.y);
        };
        each_pair<PACKS>(part, h, pair, x[part].x + h.qkv(), out + h.HS);
    }
}

void qkv_norm_rope_forward(floatX* q, floatX* k, floatX* v, float2* stats, const floatX* raw, QkvGains gains,
                           const float2* rope, Heads h, Norm norm, const Gpu& gpu) {
    row_shape(h.width(0), [&](auto packs, int threads) {
        constexpr int P = packs.value;
        qkv_norm_rope_forward_kernel<P>
            <<<h.B * h.T, threads, 0, gpu.stream>>>(q, k, v, stats, raw, gains, rope, h, norm);
    });
    CHECK(cudaGetLastError());
}

// draw (B,T,QKV) floatX from dq (B,NH,T,HS), dk, dv (B,NKV,T,HS), room = T; partial (blocks, QKV) float. dy is dq or dk
// turned back by the angle, or dv; draw is the dx of the formula at the top, dy itself for a part without gain.
template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS, ROW_RESIDENT<PACKS>)
    qkv_norm_rope_backward_kernel(floatX* draw, float* partial, const floatX* dq, const floatX* dk, const floatX* dv,
                                  const floatX* raw, QkvGains gains, const float2* stats, const float2* rope, Heads h,
                                  Norm norm) {
    extern __shared__ __align__(16) float column_sums[];
    const size_t QKV = h.qkv();
    partial += blockIdx.x * QKV;
    float* sums = SERIAL ? partial : column_sums;
    ColumnSums(sums).zero(QKV);
    const BlockRows rows(size_t(h.B) * h.T);
    for (size_t n = rows.first; n < rows.end; n += rows.step)
        for (int part = 0; part < 3; part++) {
            const int W = h.width(part);
            const floatX* gain = gains.of(part);
            const float2* angle = rope && part < 2 ? rope + n % h.T * (h.HS / 2) : nullptr;
            const float2 s = gain ? stats[3 * n + part] : make_float2(0.0f, 1.0f);
            ColumnSums dg(sums + h.begin(part));
            Row<PACKS> x;
            HeadRow<PACKS> dy;
            if (gain) x.load(raw + n * QKV + h.begin(part), W);
            dy.load((part == 0 ? dq : part == 1 ? dk : dv) + h.at(part, n), W, h);
            // the gradient of a pair before the rotation: turned back by the same angle
            AngleReader turned;
            auto gradient = [&](int p, int e, size_t at, int i) {
                const float2 d = make_float2(dy(p, e, at), dy(p, e + 1, at + 1));
                if (!angle) return d;
                const float2 a = turned(angle, i, e);
                return rotate(d, make_float2(a.x, -a.y));
            };
            floatX* out = draw + n * QKV + h.begin(part);
            PackWriter write;
            if (SERIAL && gain) {  // the row is turned once, and then is like any other
                auto turn = [&](int p, int e, int c, size_t at, int i) {
                    const float2 d = gradient(p, e, at, i);
                    column_sums[c] = d.x, column_sums[c + 1] = d.y;
                };
                each_pair<PACKS>(part, h, turn, x.x + QKV, dy.x + h.HS);
                norm_backward_row(
                    x, gain, s, dg, W, norm, [&](int, int, int c) { return column_sums[c]; },
                    [&](int, int e, int c, float v) { write(out + c, e, v); }, out + QKV);
                continue;
            }
            PackReader g;
            float c1 = 0.0f, c2 = 0.0f;
            if (gain) {
                float sum_gd = 0.0f, sum_gdx = 0.0f;
                each_pair<PACKS>(part, h, [&](int p, int e, int c, size_t at, int i) {
                    const float2 d = gradient(p, e, at, i);
                    const float2 xh = make_float2(normalize(x(p, e), s), normalize(x(p, e + 1), s));
                    const float gd0 = g(gain + c, e) * d.x, gd1 = g(gain + c + 1, e + 1) * d.y;
                    sum_gd += gd0 + gd1;
                    sum_gdx += gd0 * xh.x + gd1 * xh.y;
                    dg.add(c, e, d.x * xh.x);
                    dg.add(c + 1, e + 1, d.y * xh.y);
                });
                float means[2] = {sum_gd, sum_gdx};
                block_sums(means);
                c1 = norm.center ? means[0] / W : 0.0f, c2 = means[1] / W;
            }
            auto pair = [&](int p, int e, int c, size_t at, int i) {
                float2 d = gradient(p, e, at, i);
                if (gain) {
                    d.x = s.y * (g(gain + c, e) * d.x - c1 - normalize(x(p, e), s) * c2);
                    d.y = s.y * (g(gain + c + 1, e + 1) * d.y - c1 - normalize(x(p, e + 1), s) * c2);
                }
                write(out + c, e, d.x);
                write(out + c + 1, e + 1, d.y);
            };
            each_pair<PACKS>(part, h, pair, out + QKV, dy.x + h.HS);
        }
    for (int part = 0; part < 3; part++) ColumnSums(sums + h.begin(part)).write(partial + h.begin(part), h.width(part));
}

// dgain added to: the gradients of the gains there are, side by side from q's on, null if there are none.
// partial (row_blocks(B T, NH HS), QKV) float scratch.
void qkv_norm_rope_backward(floatX* draw, Flat dgain, float* partial, const floatX* dq, const floatX* dk,
                            const floatX* dv, const floatX* raw, QkvGains gains, const float2* stats,
                            const float2* rope, Heads h, Norm norm, const Gpu& gpu) {
    const int blocks = row_blocks(h.B * h.T, h.width(0), gpu);
    row_shape(h.width(0), [&](auto packs, int threads) {
        constexpr int P = packs.value;
        const size_t shared = dynamic_shared(qkv_norm_rope_backward_kernel<P>, ColumnSums::bytes(h.qkv()), gpu);
        qkv_norm_rope_backward_kernel<P>
            <<<blocks, threads, shared, gpu.stream>>>(draw, partial, dq, dk, dv, raw, gains, stats, rope, h, norm);
    });
    CHECK(cudaGetLastError());
    if (!dgain.p) return;
    int W = h.width(0) + h.width(1) + (gains.v ? h.width(2) : 0);
    gain_grad(dgain, partial, blocks, W, h.qkv(), gpu);
}

// ---------------------------------------------------------------------------------------------------------------------
// Feed-forward activation of the normed linears.
//   gated (SwiGLU): raw (N,2F) = w1 x | w3 x,  out[n,f] = silu(u) v,  u = N1(w1 x), v = N3(w3 x)
//   else (GELU):    raw (N,F) = fc x,          out[n,f] = gelu(u),    u = N1(fc x), gelu(u) = u/2 (1 + erf(u/sqrt 2))
// out (N,F) floatX; gain (2F) or (F) floatX or null; stats (N,2) or (N,1) float2, written if gain.

// one value of the activation and its two derivatives: f(u, v), df/du, df/dv
struct Activation {
    float f, du, dv;
};

__device__ inline Activation swiglu(float u, float v) {
    float s = __fdividef(1.0f, 1.0f + __expf(-u));
    return {u * s * v, v * s * (1.0f + u * (1.0f - s)), u * s};
}

__device__ inline Activation gelu(float u) {
    float cdf = 0.5f * (1.0f + erff(u * 0.70710678f));
    return {u * cdf, cdf + u * 0.39894228f * __expf(-0.5f * u * u), 0.0f};
}

template <int PACKS, bool GATED>
__global__ void __launch_bounds__(ROW_THREADS)
    ffn_norm_act_forward_kernel(floatX* out, float2* stats, const floatX* raw, const floatX* gain, int F, Norm norm) {
    constexpr int PARTS = GATED ? 2 : 1;
    const size_t n = blockIdx.x;
    Row<PACKS> x[PARTS];
    int W[PARTS];
    float2 s[PARTS];
    #pragma unroll
    for (int i = 0; i < PARTS; i++) {
        x[i].load(raw + (n * PARTS + i) * F, F);
        W[i] = F, s[i] = make_float2(0.0f, 1.0f);
    }
    if (gain) row_stats<PACKS, PARTS>(s, stats + PARTS * n, x, W, norm);
    out += n * F;
    PackReader g[PARTS];
    PackWriter write;
    auto activate = [&](int p, int e, int f) {
        float u[PARTS];
        #pragma unroll
        for (int i = 0; i < PARTS; i++)
            u[i] = (gain ? g[i](gain + i * F + f, e) : 1.0f) * normalize(x[i](p, e), s[i]);
        write(out + f, e, GATED ? swiglu(u[0], u[PARTS - 1]).f : gelu(u[0]).f);
    };
    each<PACKS>(F, activate, x[0].x + PARTS * F, x[PARTS - 1].x + PARTS * F, out + F);
}

void ffn_norm_act_forward(floatX* out, float2* stats, const floatX* raw, const floatX* gain, int N, int F, bool gated,
                          Norm norm, const Gpu& gpu) {
    row_shape<true>(F, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        if (gated)
            ffn_norm_act_forward_kernel<P, true><<<N, threads, 0, gpu.stream>>>(out, stats, raw, gain, F, norm);
        else
            ffn_norm_act_forward_kernel<P, false><<<N, threads, 0, gpu.stream>>>(out, stats, raw, gain, F, norm);
    });
    CHECK(cudaGetLastError());
}

// draw like raw, from dout (N,F): the dy of the formula at the top is dout df/du for w1 or fc, dout df/dv for w3.
// partial (blocks, 2F) or (blocks, F) float.
// The column sums of a wide row leave room for one block on a multiprocessor, so with `staged` the next row is on its
// way to shared memory while this one is worked on: each thread's packs, (3 or 2, PACKS, threads) of 16 bytes behind
// the sums. Rows too wide even for registers (10 packs) are read twice, the second time from L2.
template <int PACKS, bool GATED>
__global__ void __launch_bounds__(ROW_THREADS, ROW_RESIDENT<PACKS>)
    ffn_norm_act_backward_kernel(floatX* draw, float* partial, const floatX* dout, const floatX* raw,
                                 const floatX* gain, const float2* stats, int N, int F, Norm norm, bool staged) {
    constexpr int PARTS = GATED ? 2 : 1;
    constexpr bool HELD = SERIAL || PACKS <= 5;
    extern __shared__ __align__(16) float column_sums[];
    partial += size_t(blockIdx.x) * PARTS * F;
    ColumnSums dg[PARTS];
    #pragma unroll
    for (int i = 0; i < PARTS; i++) dg[i] = ColumnSums((SERIAL ? partial : column_sums) + i * F);
    if (gain) dg[0].zero(PARTS * F);
    auto source = [&](int i, size_t n) { return i < PARTS ? raw + (n * PARTS + i) * F : dout + n * F; };
    uint4* stage = reinterpret_cast<uint4*>(column_sums + PARTS * F);
    auto fetch = [&](size_t n) {
        if (!staged) return;
        for (int i = 0; i <= PARTS && n < size_t(N); i++)
            for (int p = 0; p < PACKS; p++) {
                const int slot = p * blockDim.x + threadIdx.x;
                if (slot * PACK < F)
                    copy_async<16>(stage + i * PACKS * blockDim.x + slot, source(i, n) + slot * PACK, true);
            }
        copy_commit();
    };
    const BlockRows rows(N);
    fetch(rows.first);
    for (size_t n = rows.first; n < rows.end; n += rows.step) {
        Row<PACKS> row[PARTS + 1];  // x of each part, dy
        if (staged) copy_wait<0>();
        #pragma unroll
        for (int i = 0; i <= PARTS && HELD; i++)
            staged ? row[i].take(stage + i * PACKS * blockDim.x, F) : row[i].load(source(i, n), F);
        float2 s[PARTS];
        #pragma unroll
        for (int i = 0; i < PARTS; i++) s[i] = gain ? stats[PARTS * n + i] : make_float2(0.0f, 1.0f);
        PackReader again[PARTS + 1];
        auto value = [&](int i, int p, int e, int f) { return HELD ? row[i](p, e) : again[i](source(i, n) + f, e); };
        PackReader reader[PARTS];
        // xh, g and the gradient of y of both parts at element e of pack p, column f
        struct Point {
            float xh[PARTS], g[PARTS], d[PARTS];
        };
        auto point = [&](int p, int e, int f) {
            Point a;
            float y[PARTS];
            #pragma unroll
            for (int i = 0; i < PARTS; i++) {
                a.xh[i] = normalize(value(i, p, e, f), s[i]);
                a.g[i] = gain ? reader[i](gain + i * F + f, e) : 1.0f;
                y[i] = a.g[i] * a.xh[i];
            }
            const float d = value(PARTS, p, e, f);
            const Activation act = GATED ? swiglu(y[0], y[PARTS - 1]) : gelu(y[0]);
            #pragma unroll
            for (int i = 0; i < PARTS; i++) a.d[i] = d * (i == 0 ? act.du : act.dv);
            return a;
        };
        floatX* out = draw + n * PARTS * F;
        const floatX *x = raw + (n + 1) * PARTS * F, *dy = dout + (n + 1) * F, *next = out + PARTS * F;  // needed soon
        const int last = (PARTS - 1) * F;
        float means[2 * PARTS] = {};  // of g dy and of g dy xh, for each part
        if (gain) {
            float gd[PARTS] = {}, gdx[PARTS] = {};
            auto sum = [&](int p, int e, int f) {
                const Point a = point(p, e, f);
                #pragma unroll
                for (int i = 0; i < PARTS; i++) {
                    gd[i] += a.g[i] * a.d[i];
                    gdx[i] += a.g[i] * a.d[i] * a.xh[i];
                    dg[i].add(f, e, a.d[i] * a.xh[i]);
                    if (SERIAL) column_sums[i * F + f] = a.g[i] * a.d[i];  // kept: an exponential and a division
                }
            };
            each<PACKS, HELD>(F, sum, x, x + last, dy, next, next + last);
            #pragma unroll
            for (int i = 0; i < PARTS; i++) means[2 * i] = gd[i], means[2 * i + 1] = gdx[i];
            block_sums(means);
        }
        if (gain) fetch(n + rows.step);  // this thread's packs of the row have been used: their slots are free
        float c1[PARTS], c2[PARTS];
        #pragma unroll
        for (int i = 0; i < PARTS; i++) c1[i] = norm.center ? means[2 * i] / F : 0.0f, c2[i] = means[2 * i + 1] / F;
        PackWriter write[PARTS];
        auto gradient = [&](int p, int e, int f) {
            const Point a = point(p, e, f);
            #pragma unroll
            for (int i = 0; i < PARTS; i++)
                write[i](out + i * F + f, e, s[i].y * (a.g[i] * a.d[i] - c1[i] - a.xh[i] * c2[i]));
        };
        auto kept_gradient = [&](int p, int e, int f) {
            #pragma unroll
            for (int i = 0; i < PARTS; i++)
                write[i](out + i * F + f, e,
                         s[i].y * (column_sums[i * F + f] - c1[i] - normalize(row[i](p, e), s[i]) * c2[i]));
        };
        if (!SERIAL || !gain) each<PACKS, HELD>(F, gradient, x, x + last, dy, next, next + last);
        else each<PACKS>(F, kept_gradient);
        if (!gain) fetch(n + rows.step);
    }
    if (gain)
        #pragma unroll
        for (int i = 0; i < PARTS; i++) dg[i].write(partial + i * F, F);
}

// dgain (2F) or (F), added to, null with gain null; partial (row_blocks(N, F), 2F) or (.., F) float scratch.
void ffn_norm_act_backward(floatX* draw, Flat dgain, float* partial, const floatX* dout, const floatX* raw,
                           const floatX* gain, const float2* stats, int N, int F, bool gated, Norm norm,
                           const Gpu& gpu) {
    const int blocks = row_blocks(N, F, gpu), W = gated ? 2 * F : F;
    row_shape<true>(F, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        const size_t stage = BF16 && !SERIAL && P <= 5 ? size_t(gated ? 3 : 2) * P * threads * 16 : 0;
        const bool staged = stage > 0 && ColumnSums::bytes(W) + stage <= dynamic_room(gpu);
        auto shared = [&](auto* kernel) {
            return dynamic_shared(kernel, ColumnSums::bytes(W) + (staged ? stage : 0), gpu);
        };
        if (gated)
            ffn_norm_act_backward_kernel<P, true>
                <<<blocks, threads, shared(ffn_norm_act_backward_kernel<P, true>), gpu.stream>>>(
                    draw, partial, dout, raw, gain, stats, N, F, norm, staged);
        else
            ffn_norm_act_backward_kernel<P, false>
                <<<blocks, threads, shared(ffn_norm_act_backward_kernel<P, false>), gpu.stream>>>(
                    draw, partial, dout, raw, gain, stats, N, F, norm, staged);
    });
    CHECK(cudaGetLastError());
    if (gain) gain_grad(dgain, partial, blocks, W, W, gpu);
}
