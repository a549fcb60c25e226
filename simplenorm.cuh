// SimpleNorm: Psi(x) = Norm(W x), a norm right behind a linear layer, gain and all; the pre-norms go (arXiv
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
// Only the raw linear outputs and (mean, rstd) of each row are kept for the backward; xh and y are computed again.
// A gain that is null means: no such norm in this variant (y = x), so all variants of the model share these kernels.
//
// Layout of the work: forward one block a row. Backward a few blocks, each walks rows blockIdx.x, + gridDim.x, ... and
// adds dy xh into its own line of `partial` (gridDim.x, width); gain_grad sums the lines in order: no atomics, same
// bits. From train_gpt.cu: floatX, Flat, load/store through float, lane(), warp(), num_warps(), block_sum().
#pragma once

struct Norm {
    float eps;
    bool center;  // false: RMSNorm, true: LayerNorm without bias
};

// mean and rstd of x[0..C), C elements of one row, by the whole block
__device__ inline float2 row_stats(const floatX* x, int C, Norm norm) {
    float mean = 0.0f;
    if (norm.center) {
        float sum = 0.0f;
        for (int c = threadIdx.x; c < C; c += blockDim.x) sum += float(x[c]);
        mean = block_sum(sum) / C;
    }
    float square = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float d = float(x[c]) - mean;
        square += d * d;
    }
    return make_float2(mean, rsqrtf(block_sum(square) / C + norm.eps));
}

// c1 and c2 of the row's backward from this thread's sums of g dy and g dy xh
__device__ inline float2 row_means(float sum_gdy, float sum_gdy_xh, int C, Norm norm) {
    float c2 = block_sum(sum_gdy_xh) / C;
    float c1 = norm.center ? block_sum(sum_gdy) / C : 0.0f;
    return make_float2(c1, c2);
}

__device__ inline float normalize(floatX x, float2 stats) { return (float(x) - stats.x) * stats.y; }

// ---------------------------------------------------------------------------------------------------------------------
// Gain gradient, second stage: dgain[c] += sum_b partial[b, c] for c < W. dgain (W) G, partial (blocks, stride) float.

template <typename G>
__global__ void gain_grad_kernel(G* dgain, const float* partial, int blocks, int W, int stride) {
    constexpr int COLUMNS = 256;  // a block's share, so that the serial geometry has a loop to vectorise
    for (int c = blockIdx.x * COLUMNS + threadIdx.x; c < min(W, int(blockIdx.x + 1) * COLUMNS); c += blockDim.x) {
        float sum = 0.0f;
        for (int b = 0; b < blocks; b++) sum += partial[size_t(b) * stride + c];
        dgain[c] = float(dgain[c]) + sum;
    }
}

void gain_grad(Flat dgain, const float* partial, int blocks, int W, int stride, cudaStream_t stream) {
    dgain.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        gain_grad_kernel<G><<<(W + 255) / 256, 256, 0, stream>>>(d, partial, blocks, W, stride);
    });
    CHECK(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------------
// Norm of a row, then the residual: out[n,c] = res[n,c] + y[n,c]. The o and w2 linears; with res null the plain norm
// (pre-norms, final norm). out, x, res (N,C) floatX; gain (C) floatX or null; stats (N) float2, written if gain.

__global__ void norm_residual_forward_kernel(floatX* out, float2* stats, const floatX* x, const floatX* res,
                                             const floatX* gain, int C, Norm norm) {
    size_t n = blockIdx.x;
    x += n * C;
    out += n * C;
    if (res) res += n * C;
    if (!gain) {
        for (int c = threadIdx.x; c < C; c += blockDim.x) out[c] = float(x[c]) + (res ? float(res[c]) : 0.0f);
        return;
    }
    float2 s = row_stats(x, C, norm);
    if (threadIdx.x == 0) stats[n] = s;
    if (res) {
        for (int c = threadIdx.x; c < C; c += blockDim.x) out[c] = float(res[c]) + float(gain[c]) * normalize(x[c], s);
    } else {
        for (int c = threadIdx.x; c < C; c += blockDim.x) out[c] = float(gain[c]) * normalize(x[c], s);
    }
}

void norm_residual_forward(floatX* out, float2* stats, const floatX* x, const floatX* res, const floatX* gain, int N,
                           int C, Norm norm, cudaStream_t stream) {
    norm_residual_forward_kernel<<<N, row_threads(C), 0, stream>>>(out, stats, x, res, gain, C, norm);
    CHECK(cudaGetLastError());
}

// Norm backward: dx[n,c] = sum_to[n,c] + (dx of the formula at the top). dx, dy, x, sum_to (N,C) floatX, sum_to null
// for nothing, may be dx itself; dgain (C), added to; partial (row_blocks(N), C) float scratch.
__global__ void norm_backward_kernel(floatX* dx, float* partial, const floatX* sum_to, const floatX* dy,
                                     const floatX* x, const floatX* gain, const float2* stats, int N, int C,
                                     Norm norm) {
    partial += size_t(blockIdx.x) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) partial[c] = 0.0f;  // a column stays with one thread throughout
    for (size_t n = blockIdx.x; n < size_t(N); n += gridDim.x) {
        const floatX *xn = x + n * C, *dyn = dy + n * C;
        float2 s = stats[n];
        float sum1 = 0.0f, sum2 = 0.0f;
        for (int c = threadIdx.x; c < C; c += blockDim.x) {
            float xh = normalize(xn[c], s), d = float(dyn[c]), gd = float(gain[c]) * d;
            sum1 += gd;
            sum2 += gd * xh;
            partial[c] += d * xh;
        }
        float2 m = row_means(sum1, sum2, C, norm);
        floatX* out = dx + n * C;
        if (sum_to) {
            const floatX* add = sum_to + n * C;
            for (int c = threadIdx.x; c < C; c += blockDim.x)
                out[c] = float(add[c]) + s.y * (float(gain[c]) * float(dyn[c]) - m.x - normalize(xn[c], s) * m.y);
        } else {
            for (int c = threadIdx.x; c < C; c += blockDim.x)
                out[c] = s.y * (float(gain[c]) * float(dyn[c]) - m.x - normalize(xn[c], s) * m.y);
        }
    }
}

void norm_backward(floatX* dx, Flat dgain, float* partial, const floatX* sum_to, const floatX* dy, const floatX* x,
                   const floatX* gain, const float2* stats, int N, int C, Norm norm, cudaStream_t stream) {
    int blocks = row_blocks(N);
    norm_backward_kernel<<<blocks, row_threads(C), 0, stream>>>(dx, partial, sum_to, dy, x, gain, stats, N, C, norm);
    CHECK(cudaGetLastError());
    gain_grad(dgain, partial, blocks, C, C, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// q, k, v: norm of each over its full width (all heads together), RoPE on q and k, split into heads.
//   raw (B,T,QKV) floatX, QKV = (NH + 2 NKV) HS: the outputs of the three linears side by side
//   q (B,NH,T,HS), k, v (B,NKV,T,HS) floatX: the layout of attention
//   RoPE on adjacent pairs, (a, b) -> (a cos - b sin, a sin + b cos), angle t theta^(-2i/HS) of pair i at position t
// rope (T,HS/2) float2 of (cos, sin), null for none; stats (B,T,3) float2.

struct Heads {
    int B, T, NH, NKV, HS;
    __host__ __device__ int width(int part) const { return (part == 0 ? NH : NKV) * HS; }  // part 0: q, 1: k, 2: v
    __host__ __device__ int qkv() const { return (NH + 2 * NKV) * HS; }
};

struct QkvGains {
    const floatX *q, *k, *v;  // (NH HS), (NKV HS), (NKV HS), each null if the variant has no such norm
    __host__ __device__ const floatX* of(int part) const { return part == 0 ? q : part == 1 ? k : v; }
};

__device__ inline float2 rotate(float2 y, float2 angle) {
    return make_float2(y.x * angle.x - y.y * angle.y, y.x * angle.y + y.y * angle.x);
}

// where row (b, t) of a head begins in (B,H,T,HS)
__device__ inline size_t head_row(int b, int head, int t, int H, Heads h) {
    return ((size_t(b) * H + head) * h.T + t) * h.HS;
}

__global__ void qkv_norm_rope_forward_kernel(floatX* q, floatX* k, floatX* v, float2* stats, const floatX* raw,
                                             QkvGains gains, const float2* rope, Heads h, Norm norm) {
    size_t n = blockIdx.x;
    int b = n / h.T, t = n % h.T;
    const floatX* x = raw + n * h.qkv();
    for (int part = 0; part < 3; part++) {
        int W = h.width(part), H = W / h.HS;
        const floatX* gain = gains.of(part);
        float2 s = gain ? row_stats(x, W, norm) : make_float2(0.0f, 1.0f);
        if (threadIdx.x == 0) stats[3 * n + part] = s;
        const float2* angle = rope && part < 2 ? rope + size_t(t) * (h.HS / 2) : nullptr;
        for (int head = warp(); head < H; head += num_warps()) {  // one warp a head, a lane a pair
            floatX* out = (part == 0 ? q : part == 1 ? k : v) + head_row(b, head, t, H, h);
            const floatX* in = x + head * h.HS;
            const floatX* g = gain ? gain + head * h.HS : nullptr;
            for (int i = lane(); i < h.HS / 2; i += WARP_SIZE) {
                float2 y = make_float2(normalize(in[2 * i], s), normalize(in[2 * i + 1], s));
                if (g) y = make_float2(float(g[2 * i]) * y.x, float(g[2 * i + 1]) * y.y);
                if (angle) y = rotate(y, angle[i]);
                out[2 * i] = y.x;
                out[2 * i + 1] = y.y;
            }
        }
        x += W;
    }
}

void qkv_norm_rope_forward(floatX* q, floatX* k, floatX* v, float2* stats, const floatX* raw, QkvGains gains,
                           const float2* rope, Heads h, Norm norm, cudaStream_t stream) {
    qkv_norm_rope_forward_kernel<<<h.B * h.T, row_threads(h.width(0)), 0, stream>>>(q, k, v, stats, raw, gains, rope, h,
                                                                                    norm);
    CHECK(cudaGetLastError());
}

// The gradient of pair i of a head before the rotation: turned back by the same angle.
__device__ inline float2 unrotate(const floatX* dy, int i, const float2* angle) {
    float2 d = make_float2(float(dy[2 * i]), float(dy[2 * i + 1]));
    return angle ? rotate(d, make_float2(angle[i].x, -angle[i].y)) : d;
}

// draw (B,T,QKV) floatX from dq (B,NH,T,HS), dk, dv (B,NKV,T,HS); partial (blocks, QKV) float.
__global__ void qkv_norm_rope_backward_kernel(floatX* __restrict__ draw, float* __restrict__ partial,
                                              const floatX* __restrict__ dq, const floatX* __restrict__ dk,
                                              const floatX* __restrict__ dv, const floatX* __restrict__ raw,
                                              QkvGains gains, const float2* __restrict__ stats,
                                              const float2* __restrict__ rope, Heads h, Norm norm) {
    const size_t QKV = h.qkv();
    partial += blockIdx.x * QKV;
    for (size_t n = blockIdx.x; n < size_t(h.B) * h.T; n += gridDim.x) {
        int b = n / h.T, t = n % h.T;
        bool first = n == blockIdx.x;
        const floatX* x = raw + n * QKV;
        floatX* dx = draw + n * QKV;
        float* dg = partial;
        for (int part = 0; part < 3; part++) {
            int W = h.width(part), H = W / h.HS;
            const floatX* gain = gains.of(part);
            const floatX* dout = part == 0 ? dq : part == 1 ? dk : dv;
            const float2* angle = rope && part < 2 ? rope + size_t(t) * (h.HS / 2) : nullptr;
            float2 s = stats[3 * n + part], m = make_float2(0.0f, 0.0f);
            if (gain) {  // the row's sums and the gain's gradient; a column is always the same thread's
                float sum1 = 0.0f, sum2 = 0.0f;
                for (int head = warp(); head < H; head += num_warps()) {
                    const floatX* dy = dout + head_row(b, head, t, H, h);
                    for (int i = lane(); i < h.HS / 2; i += WARP_SIZE) {
                        int c = head * h.HS + 2 * i;
                        float2 d = unrotate(dy, i, angle);
                        float2 xh = make_float2(normalize(x[c], s), normalize(x[c + 1], s));
                        float2 gd = make_float2(float(gain[c]) * d.x, float(gain[c + 1]) * d.y);
                        sum1 += gd.x + gd.y;
                        sum2 += gd.x * xh.x + gd.y * xh.y;
                        dg[c] = (first ? 0.0f : dg[c]) + d.x * xh.x;
                        dg[c + 1] = (first ? 0.0f : dg[c + 1]) + d.y * xh.y;
                    }
                }
                m = row_means(sum1, sum2, W, norm);
            }
            for (int head = warp(); head < H; head += num_warps()) {
                const floatX* dy = dout + head_row(b, head, t, H, h);
                for (int i = lane(); i < h.HS / 2; i += WARP_SIZE) {
                    int c = head * h.HS + 2 * i;
                    float2 d = unrotate(dy, i, angle);
                    if (gain) {
                        d.x = s.y * (float(gain[c]) * d.x - m.x - normalize(x[c], s) * m.y);
                        d.y = s.y * (float(gain[c + 1]) * d.y - m.x - normalize(x[c + 1], s) * m.y);
                    }
                    dx[c] = d.x;
                    dx[c + 1] = d.y;
                }
            }
            x += W;
            dx += W;
            dg += W;
        }
    }
}

// dgain added to: the gradients of the gains there are, side by side from q's on, null if there are none.
// partial (row_blocks(B T), QKV) float scratch.
void qkv_norm_rope_backward(floatX* draw, Flat dgain, float* partial, const floatX* dq, const floatX* dk,
                            const floatX* dv, const floatX* raw, QkvGains gains, const float2* stats,
                            const float2* rope, Heads h, Norm norm, cudaStream_t stream) {
    int blocks = row_blocks(h.B * h.T);
    qkv_norm_rope_backward_kernel<<<blocks, row_threads(h.width(0)), 0, stream>>>(draw, partial, dq, dk, dv, raw, gains,
                                                                                  stats, rope, h, norm);
    CHECK(cudaGetLastError());
    if (!dgain.p) return;
    int W = h.width(0) + h.width(1) + (gains.v ? h.width(2) : 0);
    gain_grad(dgain, partial, blocks, W, h.qkv(), stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Feed-forward activation of the normed linears.
//   gated (SwiGLU): raw (N,2F) = w1 x | w3 x,  out[n,f] = silu(u) v,  u = No(w1 x), v = No(w3 x)
//   else (GELU):    raw (N,F) = fc x,          out[n,f] = gelu(u),    u = No(fc x), gelu(u) = u/2 (1 + erf(u/sqrt 2))
// out (N,F) floatX; gain (2F) or (F) floatX or null; stats (N,2) or (N,1) float2, written if gain.

// one value of the activation and its two derivatives: f(u, v), df/du, df/dv
struct Activation {
    float f, du, dv;
};

__device__ inline Activation swiglu(float u, float v) {
    float s = 1.0f / (1.0f + __expf(-u));
    return {u * s * v, v * s * (1.0f + u * (1.0f - s)), u * s};
}

__device__ inline Activation gelu(float u) {
    float cdf = 0.5f * (1.0f + erff(u * 0.70710678f));
    return {u * cdf, cdf + u * 0.39894228f * __expf(-0.5f * u * u), 0.0f};
}

// u and v of column f
template <bool GATED>
__device__ inline float2 ffn_inputs(const floatX* x, const floatX* gain, int f, int F, float2 s1, float2 s3) {
    float u = normalize(x[f], s1), v = GATED ? normalize(x[F + f], s3) : 0.0f;
    if (gain) {
        u *= float(gain[f]);
        if (GATED) v *= float(gain[F + f]);
    }
    return make_float2(u, v);
}

template <bool GATED>
__global__ void ffn_norm_act_forward_kernel(floatX* __restrict__ out, float2* stats, const floatX* __restrict__ raw,
                                            const floatX* __restrict__ gain, int F, Norm norm) {
    constexpr int PARTS = GATED ? 2 : 1;
    size_t n = blockIdx.x;
    const floatX* x = raw + n * PARTS * F;
    float2 s1 = make_float2(0.0f, 1.0f), s3 = s1;
    if (gain) {
        s1 = row_stats(x, F, norm);
        if (GATED) s3 = row_stats(x + F, F, norm);
        if (threadIdx.x == 0) {
            stats[PARTS * n] = s1;
            if (GATED) stats[PARTS * n + 1] = s3;
        }
    }
    for (int f = threadIdx.x; f < F; f += blockDim.x) {
        float2 uv = ffn_inputs<GATED>(x, gain, f, F, s1, s3);
        out[n * F + f] = GATED ? swiglu(uv.x, uv.y).f : gelu(uv.x).f;
    }
}

void ffn_norm_act_forward(floatX* out, float2* stats, const floatX* raw, const floatX* gain, int N, int F, bool gated,
                          Norm norm, cudaStream_t stream) {
    if (gated)
        ffn_norm_act_forward_kernel<true><<<N, row_threads(F), 0, stream>>>(out, stats, raw, gain, F, norm);
    else
        ffn_norm_act_forward_kernel<false><<<N, row_threads(F), 0, stream>>>(out, stats, raw, gain, F, norm);
    CHECK(cudaGetLastError());
}

// draw like raw, from dout (N,F); partial (blocks, 2F) or (blocks, F) float.
template <bool GATED>
__global__ void ffn_norm_act_backward_kernel(floatX* __restrict__ draw, float* __restrict__ partial,
                                             const floatX* __restrict__ dout, const floatX* __restrict__ raw,
                                             const floatX* __restrict__ gain, const float2* __restrict__ stats, int N,
                                             int F, Norm norm) {
    constexpr int PARTS = GATED ? 2 : 1;
    partial += size_t(blockIdx.x) * PARTS * F;
    if (gain)
        for (int c = threadIdx.x; c < F; c += blockDim.x) {
            partial[c] = 0.0f;
            if (GATED) partial[F + c] = 0.0f;
        }
    for (size_t n = blockIdx.x; n < size_t(N); n += gridDim.x) {
        const floatX *x = raw + n * PARTS * F, *dy = dout + n * F;
        floatX* dx = draw + n * PARTS * F;
        if (!gain) {
            float2 identity = make_float2(0.0f, 1.0f);
            for (int f = threadIdx.x; f < F; f += blockDim.x) {
                float2 uv = ffn_inputs<GATED>(x, nullptr, f, F, identity, identity);
                Activation a = GATED ? swiglu(uv.x, uv.y) : gelu(uv.x);
                dx[f] = float(dy[f]) * a.du;
                if (GATED) dx[F + f] = float(dy[f]) * a.dv;
            }
            continue;
        }
        float2 s1 = stats[PARTS * n], s3 = GATED ? stats[PARTS * n + 1] : s1;
        float sum_u = 0.0f, sum_ux = 0.0f, sum_v = 0.0f, sum_vx = 0.0f;
        for (int f = threadIdx.x; f < F; f += blockDim.x) {
            float2 uv = ffn_inputs<GATED>(x, gain, f, F, s1, s3);
            Activation a = GATED ? swiglu(uv.x, uv.y) : gelu(uv.x);
            float xh = normalize(x[f], s1), du = float(dy[f]) * a.du;
            partial[f] += du * xh;
            sum_u += float(gain[f]) * du;
            sum_ux += float(gain[f]) * du * xh;
            if (GATED) {
                float xh3 = normalize(x[F + f], s3), dv = float(dy[f]) * a.dv;
                partial[F + f] += dv * xh3;
                sum_v += float(gain[F + f]) * dv;
                sum_vx += float(gain[F + f]) * dv * xh3;
            }
        }
        float2 m1 = row_means(sum_u, sum_ux, F, norm), m3 = m1;
        if (GATED) m3 = row_means(sum_v, sum_vx, F, norm);
        for (int f = threadIdx.x; f < F; f += blockDim.x) {
            float2 uv = ffn_inputs<GATED>(x, gain, f, F, s1, s3);
            Activation a = GATED ? swiglu(uv.x, uv.y) : gelu(uv.x);
            float d = float(dy[f]);
            dx[f] = s1.y * (float(gain[f]) * d * a.du - m1.x - normalize(x[f], s1) * m1.y);
            if (GATED) dx[F + f] = s3.y * (float(gain[F + f]) * d * a.dv - m3.x - normalize(x[F + f], s3) * m3.y);
        }
    }
}

// dgain (2F) or (F), added to, null with gain null; partial (row_blocks(N), 2F) or (.., F) float scratch.
void ffn_norm_act_backward(floatX* draw, Flat dgain, float* partial, const floatX* dout, const floatX* raw,
                           const floatX* gain, const float2* stats, int N, int F, bool gated, Norm norm,
                           cudaStream_t stream) {
    int blocks = row_blocks(N), W = gated ? 2 * F : F;
    if (gated)
        ffn_norm_act_backward_kernel<true>
            <<<blocks, row_threads(F), 0, stream>>>(draw, partial, dout, raw, gain, stats, N, F, norm);
    else
        ffn_norm_act_backward_kernel<false>
            <<<blocks, row_threads(F), 0, stream>>>(draw, partial, dout, raw, gain, stats, N, F, norm);
    CHECK(cudaGetLastError());
    if (gain) gain_grad(dgain, partial, blocks, W, W, stream);
}
