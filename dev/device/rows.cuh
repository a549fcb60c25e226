// Rows, for the kernels that only move memory. A block has a row of W elements, a thread PACKS packs of it in
// registers, 16 bytes each: every byte is read once, whatever the number of passes (but for feed-forward rows of 10
// packs in the backward). Pack p of thread t begins at column (p blockDim + t) PACK. In bf16 rows are multiples of 8
// elements; fp32 takes any width, element by element. In the serial geometry the one thread has one pack, the row where
// it lies.
#pragma once
#include "ptx.cuh"

constexpr int PACK = 16 / int(sizeof(floatX));
constexpr int ROW_THREADS = 384;  // a block's most: 3 warps a quarter of a multiprocessor, 168 registers a thread
constexpr int MAX_ROW = 4 * ROW_THREADS * PACK, MAX_FFN_ROW = 10 * ROW_THREADS * PACK;  // widest rows, elements

// Elements from `at` on are needed soon: in the serial geometry they are asked for, as a core does not see a row's end
// and the next one's begin coming while it waits for sums.
template <typename F>
__device__ inline void expect(const F* at, int elements) {
    for (int i = 0; SERIAL && i < elements; i += 64 / int(sizeof(F))) prefetch(at + i);
}

// f(p, e, c) for each element of this thread's: element e of pack p, column c. Packs in registers need UNROLLED. In the
// serial geometry, with each strip of the row the same strip of the rows `ahead` is expected.
template <int PACKS, bool UNROLLED = true, typename F, typename... Ahead>
__device__ inline void each(int W, F f, Ahead... ahead) {
    if constexpr (SERIAL) {
        const int strip = sizeof...(ahead) > 0 ? 64 : W;
        for (int first = 0; first < W; first += strip) {
            const int end = min(first + strip, W);
            (expect(ahead + first, end - first), ...);
            #pragma GCC ivdep
            for (int c = first; c < end; c++) f(0, c, c);
        }
    } else {
        #pragma unroll(UNROLLED ? PACKS : 1)
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * blockDim.x + threadIdx.x) * PACK;
            if (c >= W) break;
            #pragma unroll
            for (int e = 0; e < PACK; e++)
                if (BF16 || c + e < W) f(p, e, c + e);
        }
    }
}

__device__ inline float unpack(const unsigned* pack, int e) {
    return __uint_as_float(!BF16 ? pack[e] : e % 2 ? pack[e / 2] & 0xffff0000u : pack[e / 2] << 16);
}
__device__ inline void load_pack(unsigned* pack, const floatX* from, int valid) {
    if constexpr (BF16) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        pack[0] = v.x, pack[1] = v.y, pack[2] = v.z, pack[3] = v.w;
    } else {
        #pragma unroll
        for (int e = 0; e < PACK; e++) pack[e] = __float_as_uint(e < valid ? float(from[e]) : 0.0f);
    }
}

// A row held between passes.
template <int PACKS>
struct Row {
    const floatX* x = nullptr;
    unsigned v[SERIAL ? 1 : PACKS][4];
    __device__ void load(const floatX* from, int W) {
        x = from;
        if constexpr (!SERIAL) {
            #pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const int c = (p * blockDim.x + threadIdx.x) * PACK;
                if (c < W) load_pack(v[p], from + c, W - c);
            }
        }
    }
    // from its packs in shared memory
    __device__ void take(const uint4* packs, int W) {
        #pragma unroll
        for (int p = 0; p < PACKS && !SERIAL; p++) {
            const int slot = p * blockDim.x + threadIdx.x;
            if (slot * PACK < W) load_pack(v[p], reinterpret_cast<const floatX*>(packs + slot), PACK);
        }
    }
    __device__ float operator()(int p, int e) const { return SERIAL ? float(x[e]) : unpack(v[p], e); }
};

// What is read or written once, element e at `at`, in the order of e; in bf16 a pack at a time, with its first or last
// element.
struct PackReader {
    unsigned pack[4];
    __device__ float operator()(const floatX* at, int e) {
        if constexpr (SERIAL || !BF16) return float(*at);
        if (e == 0) load_pack(pack, at, PACK);
        return unpack(pack, e);
    }
};
struct PackWriter {
    unsigned pack[4];
    float even = 0.0f;
    __device__ void operator()(floatX* at, int e, float x) {
        if constexpr (SERIAL || !BF16) {
            *at = x;
        } else {
            if (e % 2 == 0) even = x;
            if (e % 2 == 1) pack[e / 2] = pack_bf16(even, x);
            if (e == PACK - 1)  // __stwb: of some plain stores nvcc makes four of 4 bytes
                __stwb(reinterpret_cast<uint4*>(at - (PACK - 1)), make_uint4(pack[0], pack[1], pack[2], pack[3]));
        }
    }
};

// The serial geometry's way to the exponentials of a long row x (n): by one thread, in pieces for the first cache, each
// relative to the largest element up to its end.
struct Exponentials {
    static constexpr int PIECES = 64;
    const int n, piece;
    float top = -3.4e38f;  // not below, as a piece may be all minus infinities
    float tops[PIECES];
    __device__ explicit Exponentials(int n) : n(n), piece(ceil_div(max(n, PIECES * 2048), PIECES * 64) * 64) {}

    // The larger of `top` and the largest of x (n), NaN left out: in 64 parts, as gcc vectorises neither 1 nor 16.
    __device__ static float largest(const floatX* x, int n, float top) {
        float most[64];
        for (float& m : most) m = top;
        for (int i = 0; i < n / 64 * 64; i += 64)
            for (int j = 0; j < 64; j++) most[j] = float(x[i + j]) > most[j] ? float(x[i + j]) : most[j];
        for (int i = n / 64 * 64; i < n; i++) most[0] = fmaxf(most[0], float(x[i]));
        for (int half = 32; half > 0; half /= 2)
            for (int j = 0; j < half; j++) most[j] = most[j + half] > most[j] ? most[j + half] : most[j];
        return most[0];
    }
    // the sum of exp(x - top), all n; with `keep` x becomes the exponentials, as they are
    __device__ float sum(floatX* x, bool keep) {
        float sum = 0.0f;
        for (int first = 0; first < n; first += piece) {
            const float before = top;
            tops[first / piece] = top = largest(x + first, min(piece, n - first), top);
            float of_piece = 0.0f;  // whatever a compiler makes of the loop, not too many are added one by one
            for (int i = first; i < min(first + piece, n); i++) {
                const float e = __expf(float(x[i]) - top);
                if (keep) x[i] = e;
                of_piece += e;
            }
            sum = sum * __expf(before - top) + of_piece;
        }
        return sum;
    }
    // x, which was kept, becomes factor exp(x - top)
    __device__ void scale(floatX* x, float factor) const {
        for (int first = 0; first < n; first += piece) {
            const float f = factor * __expf(tops[first / piece] - top);
            for (int i = first; i < min(first + piece, n); i++) x[i] = float(x[i]) * f;
        }
    }
};

// Sums over the rows that a block walks, a column each, in shared memory (in the serial geometry in its line of
// `partial`). A column is always the same thread's. Of the two 16-byte halves of a pack's sums every other four lanes
// take the second first: 8 lanes then reach all banks. (The serial geometry keeps a row in this room, between passes.)
struct ColumnSums {
    float* sum;
    float now[PACK];
    static size_t bytes(int W) { return W * sizeof(float); }
    __device__ static int at(int c) { return SERIAL || !BF16 ? c : c ^ c / 32 % 2 * 4; }

    __device__ explicit ColumnSums(float* sum = nullptr) : sum(sum) {}
    // column c, element e of its pack
    __device__ void add(int c, int e, float x) {
        if constexpr (SERIAL || !BF16) {
            sum[at(c)] += x;
        } else {
            float4* half = reinterpret_cast<float4*>(sum + at(c / 4 * 4));
            if (e % 4 == 0) {
                const float4 v = *half;
                now[e] = v.x, now[e + 1] = v.y, now[e + 2] = v.z, now[e + 3] = v.w;
            }
            now[e] += x;
            if (e % 4 == 3) *half = make_float4(now[e - 3], now[e - 2], now[e - 1], now[e]);
        }
    }
    // both by the whole block
    __device__ void zero(int W) {
        for (int c = threadIdx.x; c < W; c += blockDim.x) sum[c] = 0.0f;
        __syncthreads();
    }
    __device__ void write(float* line, int W) const {
        if (SERIAL) return;
        __syncthreads();
        for (int c = threadIdx.x; c < W; c += blockDim.x) line[c] = sum[at(c)];
    }
};

// Packs a thread and threads a block for rows of W elements: 4, 2 or 1 packs, the split with the fewest idle ones; in
// doubt more packs a thread, as then a block's barriers bind fewer warps, and more rows are under way on a
// multiprocessor. Feed-forward rows may be WIDE: 5 packs, or 10. Calls f(std::integral_constant<int, PACKS>, threads).
template <bool WIDE = false, typename F>
void row_shape(int W, F f) {
    if constexpr (SERIAL) {
        f(std::integral_constant<int, 1>(), 1);
    } else {
        const int packs = (W + PACK - 1) / PACK;
        auto threads = [&](int P) { return (packs + 32 * P - 1) / (32 * P) * 32; };
        int best = 0;
        for (int P : {4, 2, 1})
            if (threads(P) <= ROW_THREADS && (!best || threads(P) * P < threads(best) * best)) best = P;
        if (best == 1) f(std::integral_constant<int, 1>(), threads(1));
        if (best == 2) f(std::integral_constant<int, 2>(), threads(2));
        if (best == 4) f(std::integral_constant<int, 4>(), threads(4));
        if constexpr (WIDE) {
            const bool five = threads(5) <= ROW_THREADS;
            if (!best && five) f(std::integral_constant<int, 5>(), threads(5));
            if (!best && !five) f(std::integral_constant<int, 10>(), threads(10));
        }
    }
}

// A kernel that walks rows and leaves a line of partial sums a block has so many times ROW_THREADS threads resident on
// a multiprocessor, by its __launch_bounds__: with few packs a thread twice, since then registers allow it.
template <int PACKS>
constexpr int ROW_RESIDENT = PACKS <= 2 ? 2 : 1;

// Rows of N that such a kernel's block walks: on a GPU every gridDim.x-th, in the serial geometry neighbours, so that
// memory is read in order.
struct BlockRows {
    size_t first, end, step;
    __device__ explicit BlockRows(size_t N)
        : first(SERIAL ? N * blockIdx.x / gridDim.x : blockIdx.x),
          end(SERIAL ? N * (blockIdx.x + 1) / gridDim.x : N),
          step(SERIAL ? 1 : gridDim.x) {}
};

// Blocks of such a kernel over N rows of W elements: what is resident at a time.
inline int row_blocks(int N, int W, const Gpu& gpu) {
    int blocks = 2 * gpu.sms;
    auto shape = [&](auto packs, int threads) {
        blocks = gpu.sms * std::max(1, ROW_RESIDENT<packs.value> * ROW_THREADS / threads);
    };
    if (!SERIAL) row_shape<true>(W, shape);
    return std::min(N, blocks);
}
