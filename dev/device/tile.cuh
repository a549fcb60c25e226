// Warp tiles: M x N floats held by one warp, and products of them with tiles in shared memory. On a GPU (and lane by
// lane in the exact CPU geometry) the elements lie as mma.sync's accumulators do: of each 16 x 8 elements lane l has
// rows l/4 and l/4 + 8 and columns 2(l%4) and the next. In the serial geometry the one thread has it all.
//   slot s: the s-th row of which this thread has a part; element e: the e-th of its columns
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
// The serial geometry keeps tiles of scores column by column: a column then is the row of a plain product, no product
// has to transpose a tile that changes in the loop, and maxima and sums of rows run down whole vectors.
#pragma once
#include "ptx.cuh"

typedef std::conditional_t<SERIAL, float, floatX> SharedX;  // tiles in shared memory

enum Layout { BY_ROW, BY_COLUMN };  // in the serial geometry
template <int M, int N, Layout layout = BY_ROW>
struct Tile {
    static constexpr int SLOTS = SERIAL ? M : M / 8, PER_ROW = SERIAL ? N : N / 4;
    alignas(16) float v[SLOTS * PER_ROW];
    __device__ static constexpr int index(int s, int e) {
        if (SERIAL) return layout == BY_ROW ? s * N + e : e * M + s;
        return (s / 2 * (N / 8) + e / 2) * 4 + s % 2 * 2 + e % 2;
    }
    __device__ float& at(int s, int e) { return v[index(s, e)]; }
    __device__ float at(int s, int e) const { return v[index(s, e)]; }
    __device__ float* fragment(int i, int j) { return v + (i * (N / 8) + j) * 4; }  // rows 16i.., columns 8j..
    __device__ const float* fragment(int i, int j) const { return v + (i * (N / 8) + j) * 4; }
    __device__ static int row(int s) { return SERIAL ? s : s / 2 * 16 + s % 2 * 8 + lane() / 4; }
    __device__ static int col(int e) { return SERIAL ? e : e / 2 * 8 + lane() % 4 * 2 + e % 2; }
    __device__ void zero() {
        #pragma unroll
        for (float& x : v) x = 0.0f;
    }
};

// the four lanes that share a row
__device__ inline float tile_row_sum(float v) {
    for (int m = SERIAL ? 0 : 2; m > 0; m /= 2) v += __shfl_xor_sync(ALL_LANES, v, m);
    return v;
}
__device__ inline float tile_row_max(float v) {
    for (int m = SERIAL ? 0 : 2; m > 0; m /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, m));
    return v;
}

// Elements e to e + 3 of slot s, times scale, to their places in row (floatX), columns below `end` only. The four lanes
// that share the row exchange what they have of 16 columns, so that each stores four neighbours and fills its sectors.
template <typename T>
__device__ inline void store_columns(floatX* row, const T& tile, int s, int e, float scale, int end) {
    if constexpr (SERIAL) {
        if (tile.col(e) < end) row[tile.col(e)] = scale * tile.at(s, e);
    } else if constexpr (!BF16) {
        for (int i = e; i < e + 4; i += 2)
            if (tile.col(i) < end) store_pair(row + tile.col(i), scale * tile.at(s, i), scale * tile.at(s, i + 1));
    } else {
        const unsigned low = pack_bf16(scale * tile.at(s, e), scale * tile.at(s, e + 1));
        const unsigned high = pack_bf16(scale * tile.at(s, e + 2), scale * tile.at(s, e + 3));
        const bool upper = lane() & 2, odd = lane() & 1;  // lanes 2 and 3 take the second 8 columns
        const unsigned other = __shfl_xor_sync(ALL_LANES, upper ? low : high, 2);
        const unsigned first = upper ? other : low, second = upper ? high : other;  // of lanes 0, 1 and of 2, 3
        const unsigned third = __shfl_xor_sync(ALL_LANES, odd ? first : second, 1);
        const int col = e / 2 * 8 + lane() % 4 * 4;
        const uint2 four = odd ? make_uint2(third, second) : make_uint2(first, third);
        if (col < end) *reinterpret_cast<uint2*>(row + col) = four;
    }
}

// Tiles in shared memory: rows of W elements in 16-byte chunks. ldmatrix reads 8 rows of one chunk at once; they fall
// into different banks, since chunk c of row r lies at c ^ r%8 where a row has 8 chunks or a power of 2 times that, and
// rows are an odd number of chunks apart where it has not. Copies run along rows: 8 lanes write 8 chunks in different
// banks.
constexpr int VEC16 = 16 / int(sizeof(SharedX));
__host__ __device__ constexpr bool tile_swizzled(int W) { return !SERIAL && W / VEC16 >= 8 && (W & (W - 1)) == 0; }
constexpr int tile_stride(int W) { return SERIAL || tile_swizzled(W) || W / VEC16 % 2 ? W : W + VEC16; }
template <int W>
constexpr int STRIDE = tile_stride(W);
// Element (row, col + step): with col below 16 and step a constant multiple of 16 one XOR of the row's address.
template <int W>
__device__ inline int shared_at(unsigned row, unsigned col, unsigned step = 0) {
    if (tile_swizzled(W))
        return row * W + ((col / VEC16) ^ (row % 8) ^ (step / VEC16 % 8)) * VEC16 + col % VEC16 +
               step / (8 * VEC16) * (8 * VEC16);
    return row * STRIDE<W> + col + step;
}

// What of a score tile is not masked; the serial geometry spares the rest (lanes of a warp would only wait).
enum Part { ALL, LOWER, UPPER };  // LOWER: columns up to the row; UPPER: columns from the row on

// The serial geometry's product: c (M,N) += a b, or = if FRESH; a(r,k) = a[r AR + k AK], b (K,N), in blocks of R rows
// and U vectors that stay in registers. span: which k count for row r: all, up to r, from r on. block: which columns n
// of row r are wanted, likewise; the others become zero, FRESH only.
template <int M, int N, int K, int AR, int AK, bool FRESH>
void serial_mma(float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b, Part span,
                Part block) {
#ifdef __AVX512F__
    constexpr int V = 16, U = N % 32 == 0 ? 2 : N % 80 == 0 ? 5 : 1, R = U == 2 ? 8 : U == 5 ? 4 : 16;
#else
    constexpr int V = 8, U = 2, R = 4;
#endif
    typedef float Vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
    constexpr int W = U * V;
    for (int n0 = 0; n0 < N; n0 += W) {
        for (int r0 = 0; r0 < M; r0 += R) {
            Vec sum[R][U];
            for (int r = 0; r < R; r++)
                for (int u = 0; u < U; u++) sum[r][u] = FRESH ? Vec{} : *(const Vec*)&c[(r0 + r) * N + n0 + u * V];
            int first = span == UPPER ? r0 : 0, last = span == LOWER ? r0 + R : K;
            if ((block == LOWER && n0 >= r0 + R) || (block == UPPER && n0 + W <= r0)) last = first;
            for (int k = first; k < last; k++) {
                Vec row[U];
                for (int u = 0; u < U; u++) row[u] = *(const Vec*)&b[k * N + n0 + u * V];
                for (int r = 0; r < R; r++)
                    for (int u = 0; u < U; u++) sum[r][u] += a[(r0 + r) * AR + k * AK] * row[u];
            }
            for (int r = 0; r < R; r++)
                for (int u = 0; u < U; u++) *(Vec*)&c[(r0 + r) * N + n0 + u * V] = sum[r][u];
        }
    }
}

// M rows of a tile in shared memory as the left operand of mma_nt. KEPT: the fragments stay in registers.
template <int W, int M, bool KEPT>
struct Left {
    const SharedX* tile;
    int first;
    unsigned kept[KEPT ? W / 16 : 1][KEPT ? M / 16 : 1][4];

    // rows first + 16i.., columns k..
    __device__ void load(unsigned* f, int i, int k) const {
        ldmatrix_x4(f, tile + shared_at<W>(first + 16 * i + lane() % 16, lane() / 16 * 8, k));
    }
    __device__ Left(const SharedX* tile, int first) : tile(tile), first(first) {}
    __device__ void keep() {
        if constexpr (KEPT) {
            #pragma unroll
            for (int k = 0; k < W / 16; k++)
                #pragma unroll
                for (int i = 0; i < M / 16; i++) load(kept[k][i], i, 16 * k);
        }
    }
};

// c[r][n] = sum_k a[r][k] b[n][k], k < W: a's rows with the rows of b in shared memory. The serial geometry wants a's
// tile transposed (load_transposed): a is what stays while b changes.
template <int W, int M, int N, bool KEPT>
__device__ inline void mma_nt(Tile<M, N, BY_COLUMN>& c, const Left<W, M, KEPT>& a, const SharedX* b, Part part = ALL) {
    if constexpr (SERIAL) {
        serial_mma<N, M, W, W, 1, true>(c.v, b, a.tile, ALL, part == LOWER ? UPPER : part == UPPER ? LOWER : ALL);
    } else if constexpr (BF16) {
        c.zero();
        #pragma unroll(KEPT ? W / 16 : 2)
        for (int k = 0; k < W; k += 16) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++) {
                if constexpr (KEPT)
                    for (int x = 0; x < 4; x++) fa[i][x] = a.kept[k / 16][i][x];
                else
                    a.load(fa[i], i, k);
            }
            #pragma unroll
            for (int j = 0; j < N / 16; j++) {
                unsigned fb[4];  // k 0-7 and 8-15 of columns 0-7, then of columns 8-15
                ldmatrix_x4(fb, b + shared_at<W>(16 * j + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8, k));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {
        c.zero();
        for (int k = 0; k < W; k++) {
            #pragma unroll
            for (int e = 0; e < c.PER_ROW; e++)
                #pragma unroll
                for (int s = 0; s < c.SLOTS; s++)
                    c.at(s, e) +=
                        float(a.tile[shared_at<W>(a.first + c.row(s), k)]) * float(b[shared_at<W>(c.col(e), k)]);
        }
    }
}

// c[r][n] += sum_k a[r][k] b[k][first_col + n], k < K; a a tile, b (K,W) in shared memory
template <int W, int M, int N, int K>
__device__ inline void mma_nn(Tile<M, N>& c, const Tile<M, K, BY_COLUMN>& a, const SharedX* b, int first_col,
                              Part part = ALL) {
    if constexpr (SERIAL) {
        static_assert(!SERIAL || N == W, "the whole tile");
        serial_mma<M, W, K, 1, M, false>(c.v, a.v, b, part, ALL);
    } else if constexpr (BF16) {  // the accumulators of 16 columns are, as bf16, the fragment of a k16 operand
        #pragma unroll
        for (int k = 0; k < K / 16; k++) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++)
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    const float* from = a.fragment(i, 2 * k + x / 2) + x % 2 * 2;
                    fa[i][x] = pack_bf16(from[0], from[1]);
                }
            #pragma unroll
            for (int j = 0; j < N / 16; j++) {
                unsigned fb[4];  // k 0-7 and 8-15 of columns 0-7, then of columns 8-15
                const unsigned row = 16 * k + lane() % 16, col = lane() / 16 * 8;
                ldmatrix_x4_trans(fb, b + (N == W ? shared_at<W>(row, col, 16 * j)
                                                  : shared_at<W>(row, first_col + col + 16 * j)));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {  // the four lanes of a row have its elements among them
        #pragma unroll
        for (int e = 0; e < a.PER_ROW; e++) {
            for (int owner = 0; owner < 4; owner++) {
                const int k = e / 2 * 8 + owner * 2 + e % 2;
                float row[a.SLOTS];
                #pragma unroll
                for (int s = 0; s < a.SLOTS; s++) row[s] = __shfl_sync(ALL_LANES, a.at(s, e), lane() / 4 * 4 + owner);
                #pragma unroll
                for (int f = 0; f < c.PER_ROW; f++)
                    #pragma unroll
                    for (int s = 0; s < c.SLOTS; s++)
                        c.at(s, f) += row[s] * float(b[shared_at<W>(k, first_col + c.col(f))]);
            }
        }
    }
}

// c[r][n] += sum_k a[k][first_row + r] b[k][first_col + n], k < K; a (K,KW) as store_scores left it, b (K,W), both in
// shared memory
template <int KW, int W, int K, int M, int N>
__device__ inline void mma_tn(Tile<M, N>& c, const SharedX* a, int first_row, const SharedX* b, int first_col,
                              Part part = ALL) {
    if constexpr (SERIAL) {
        static_assert(!SERIAL || (M == KW && N == W), "the whole tile");
        serial_mma<M, N, K, K, 1, false>(c.v, a, b, part == LOWER ? UPPER : part == UPPER ? LOWER : ALL, ALL);
    } else if constexpr (BF16) {
        #pragma unroll
        for (int k = 0; k < K; k += 16) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++)  // rows 0-7, 8-15 of k 0-7, then of k 8-15
                ldmatrix_x4_trans(fa[i], a + shared_at<KW>(k + lane() % 8 + lane() / 16 * 8,
                                                           first_row + 16 * i + lane() / 8 % 2 * 8));
            #pragma unroll
            for (int j = 0; j < N / 16; j++) {
                unsigned fb[4];
                ldmatrix_x4_trans(fb, b + shared_at<W>(k + lane() % 16, first_col + 16 * j + lane() / 16 * 8));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {
        for (int k = 0; k < K; k++) {
            #pragma unroll
            for (int e = 0; e < c.PER_ROW; e++)
                #pragma unroll
                for (int s = 0; s < c.SLOTS; s++)
                    c.at(s, e) += float(a[shared_at<KW>(k, first_row + c.row(s))]) *
                                  float(b[shared_at<W>(k, first_col + c.col(e))]);
        }
    }
}

// Where load_tile leaves the tile: in dst, but the serial geometry reads whole tiles of fp32 rows where they lie.
template <int W, int ROWS>
__device__ inline const SharedX* tile_home(const SharedX* dst, const floatX* src, int HS, size_t stride, int valid) {
    if constexpr (SERIAL && !BF16)
        if (HS == W && stride == W && valid >= ROWS) return reinterpret_cast<const SharedX*>(src);
    return dst;
}

// dst (ROWS,W) in shared memory = src (ROWS,HS) of row stride `stride`; zero in rows from `valid` on and in columns
// from HS on; by the whole block of THREADS. On a GPU the copies are asynchronous: they are there after copy_commit,
// copy_wait and a barrier.
template <int W, int ROWS, int THREADS>
__device__ inline void load_tile(SharedX* dst, const floatX* src, int HS, size_t stride, int valid) {
    constexpr int PER_ROW = W / VEC16;
    if constexpr (SERIAL) {
        if (tile_home<W, ROWS>(dst, src, HS, stride, valid) != dst) return;
        for (int row = 0; row < ROWS; row++) {
            const int there = row < valid ? HS : 0;
            for (int col = 0; col < there; col++) dst[row * W + col] = float(src[row * stride + col]);
            for (int col = there; col < W; col++) dst[row * W + col] = 0.0f;
        }
    } else if constexpr (PER_ROW > THREADS) {  // one warp, rows of 256 floats
        for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
            const int row = i / PER_ROW, col = i % PER_ROW * VEC16;
            const bool there = row < valid && col < HS;
            copy_async<16>(dst + shared_at<W>(row, col), there ? src + row * stride + col : src, there);
        }
    } else {
        constexpr int STEP = THREADS / PER_ROW;  // rows at a time; the threads beyond them are idle
        const int first = threadIdx.x / PER_ROW, col = threadIdx.x % PER_ROW * VEC16;
        const floatX* from = src + first * stride + col;
        #pragma unroll
        for (int row = first; row - first < ROWS; row += STEP, from += STEP * stride) {
            const bool there = row < valid && col < HS;
            if ((ROWS % STEP == 0 || row < ROWS) && (THREADS % PER_ROW == 0 || first < STEP))
                copy_async<16>(dst + shared_at<W>(row, col), there ? from : src, there);
        }
    }
}

// the same for the left operand of mma_nt, which the serial geometry keeps as (W,ROWS)
template <int W, int ROWS, int THREADS>
__device__ inline void load_transposed(SharedX* dst, const floatX* src, int HS, size_t stride, int valid) {
    if constexpr (SERIAL) {
        for (int row = 0; row < ROWS; row++) {
            const int there = row < valid ? HS : 0;
            for (int col = 0; col < there; col++) dst[col * ROWS + row] = float(src[row * stride + col]);
            for (int col = there; col < W; col++) dst[col * ROWS + row] = 0.0f;
        }
    } else {
        load_tile<W, ROWS, THREADS>(dst, src, HS, stride, valid);
    }
}

// dst (K,N) in shared memory = the warps' score tiles, this one's from row `first` on, for mma_tn
template <int N, int M>
__device__ inline void store_scores(SharedX* dst, int first, const Tile<M, N, BY_COLUMN>& tile) {
    if constexpr (SERIAL) {
        for (int i = 0; i < M * N; i++) dst[i] = tile.v[i];  // (N,K)
    } else {
        #pragma unroll
        for (int s = 0; s < tile.SLOTS; s++)
            #pragma unroll
            for (int e = 0; e < tile.PER_ROW; e += 2)
                store_pair(dst + shared_at<N>(first + tile.row(s), tile.col(e)), tile.at(s, e), tile.at(s, e + 1));
    }
}

// dst (rows,cols) of row stride `stride` = the tile's first rows and columns, through the warp's own M rows of N in
// shared memory
template <int M, int N>
__device__ inline void store_tile(floatX* dst, size_t stride, int rows, int cols, const Tile<M, N>& tile,
                                  SharedX* own) {
    if constexpr (SERIAL) {
        for (int row = 0; row < min(M, rows); row++)
            for (int col = 0; col < cols; col++) dst[row * stride + col] = tile.v[row * N + col];
    } else {
        __syncwarp();
        #pragma unroll
        for (int s = 0; s < tile.SLOTS; s++)
            #pragma unroll
            for (int e = 0; e < tile.PER_ROW; e += 2)
                store_pair(own + shared_at<N>(tile.row(s), tile.col(e)), tile.at(s, e), tile.at(s, e + 1));
        __syncwarp();
        for (int i = lane(); i < M * (N / VEC16); i += WARP_SIZE) {
            const int row = i / (N / VEC16), col = i % (N / VEC16) * VEC16;
            if (row < rows && col < cols)
                *reinterpret_cast<uint4*>(dst + row * stride + col) =
                    *reinterpret_cast<const uint4*>(own + shared_at<N>(row, col));
        }
    }
}
