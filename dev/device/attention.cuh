// What the attention kernels share, those for every GPU (train_gpt.cu) and Hopper's (attention_hopper.cuh): the order
// of the blocks, the turns of the backward, the online softmax. And the shapes of the former's blocks.
#pragma once
#include "tile.cuh"

constexpr float LOG2E = 1.44269504f;

// The backward sums dq over the blocks of keys in their order: blocks take turns at a tile of queries. A head has room
// for so many: two a tile, which is of 16 queries at least.
__host__ __device__ inline int head_turns(int T) { return 2 * ceil_div(T, 16); }

// A warp waits until it is `block`'s turn; what the block before it has written is then seen.
__device__ inline void wait_for_turn(const int* turn, int block) {
    if (lane() == 0)
        while (flag_read(turn) != block) flag_pause();
    __syncwarp();
}

// The tile and the head (of all in the batch) of block n: 16 heads at a time, so that what their blocks share stays in
// the L2 cache, tile 0 of each of them, then tile 1..; those in flight at once are neighbours.
struct Place {
    int tile, head;
};
__device__ inline Place attention_place(int n, int heads, int tiles) {
    const int first = n / (16 * tiles) * 16, together = min(16, heads - first);
    n -= first * tiles;
    return {n / together, first + n % together};
}

// The steps of the online softmax on a tile of scores, whose rows are queries. First -infinity wherever the column is
// beyond the row's last visible one, row + diagonal.
template <int M, int N>
__device__ inline void mask_scores(Tile<M, N, BY_COLUMN>& p, int diagonal) {
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) p.at(s, e) = p.col(e) <= p.row(s) + diagonal ? p.at(s, e) : -INFINITY;
}
// The same where a column is before the first token of the row's document; rows are tokens t.. of T, col0 is the tile's
// first column. Not -infinity, as a row's first tile may show it nothing: what is summed there is forgotten once
// something is visible, as 2^(scale2 (SMALL - top)) is 0.
constexpr float SMALL = -1e30f;
template <int M, int N>
__device__ inline void mask_documents(Tile<M, N, BY_COLUMN>& p, const int2* spans, int t, int T, int col0) {
    #pragma unroll
    for (int s = 0; s < p.SLOTS; s++) {
        const int hidden = spans[min(t + p.row(s), T - 1)].x - col0;
        #pragma unroll
        for (int e = 0; e < p.PER_ROW; e++) p.at(s, e) = p.col(e) < hidden ? SMALL : p.at(s, e);
    }
}
// The same of the backward, whose columns are queries t.. of T and rows keys from `key` on: 0 there.
template <int M, int N>
__device__ inline void mask_queries(Tile<M, N, BY_COLUMN>& p, const int2* spans, int t, int T, int key) {
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++) {
        const int hidden = spans[min(t + p.col(e), T - 1)].x - key;
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) p.at(s, e) = p.row(s) < hidden ? 0.0f : p.at(s, e);
    }
}
// p will be taken relative to 2^(scale2 top). What was summed is rescaled to the new maximum only when that has grown
// by more than 2^8, which p bears. True, for the whole warp, if so: `top` is new, and sums so far are to be multiplied
// by `keep`. Column 0 is in everyone's first tile, so the maximum is finite from there on.
template <int M, int N>
__device__ inline bool softmax_top(const Tile<M, N, BY_COLUMN>& p, float* top, float* keep, float scale2) {
    float most[p.SLOTS];
    bool grown = false;
    for (int s = 0; s < p.SLOTS; s++) most[s] = top[s];
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) most[s] = fmaxf(most[s], p.at(s, e));
    #pragma unroll
    for (int s = 0; s < p.SLOTS; s++) {
        most[s] = tile_row_max(most[s]);
        grown |= scale2 * (most[s] - top[s]) > 8.0f;
    }
    grown = __any_sync(ALL_LANES, grown);
    if (grown) {
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) {
            keep[s] = fast_exp2(scale2 * (top[s] - most[s]));
            top[s] = most[s];
        }
    }
    return grown;
}
// p = 2^(scale2 (score - top)) in the scores' place; sum[s] += p over this thread's columns of the row
template <int M, int N>
__device__ inline void softmax_exp(Tile<M, N, BY_COLUMN>& p, const float* top, float* sum, float scale2) {
    float most[p.SLOTS];
    for (int s = 0; s < p.SLOTS; s++) most[s] = scale2 * top[s];
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) {
            const float x = fast_exp2(scale2 * p.at(s, e) - most[s]);
            p.at(s, e) = x;
            sum[s] += x;
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and tiles of train_gpt.cu's kernels

// A block has `warps` warps, each `rows` of the queries (forward) or keys (backward), and goes over the other side
// `cols` at a time. With bf16 the forward has two rows of fragments a warp where registers allow, so that a fragment of
// k or v, read from shared memory, feeds two mma.
struct BlockShape {
    int warps, rows, cols;
};
// Tiles under way while one is worked on: each of the forward's stream k, v, k, v..; each pair of q and dout.
constexpr int FORWARD_AHEAD = SERIAL ? 0 : 2, BACKWARD_AHEAD = SERIAL ? 0 : 1;

// bytes of shared memory, with tiles of W columns
constexpr int forward_bytes(int W, BlockShape b) {
    return (b.warps * b.rows + (FORWARD_AHEAD + 1) * b.cols) * tile_stride(W) * int(sizeof(SharedX));
}
constexpr int backward_bytes(int W, BlockShape b) {
    const int keys = b.warps * b.rows, cols = (BACKWARD_AHEAD + 1) * b.cols;
    return (((SERIAL ? 3 : 2) * keys + 2 * cols) * tile_stride(W) + keys * tile_stride(b.cols)) * int(sizeof(SharedX)) +
           2 * cols * int(sizeof(float));
}

// What a block may count on: 99 KB on GeForce cards from the RTX 30 on, A10, L4, L40S; 163 KB on an A100, and the H100
// and B200 have more. The shape is the first that fits; the forward's always fits the smaller, of which an A100 has
// room for two.
constexpr int SMALL_SHARED = 99 << 10, LARGE_SHARED = SERIAL ? 227 << 10 : 163 << 10;
constexpr BlockShape forward_shape(int W) {
    if (SERIAL) return {1, 64, 64};
    for (int cols : {64, 32, 16})
        if (BlockShape b = {4, BF16 && W <= 128 ? 32 : 16, cols}; forward_bytes(W, b) <= SMALL_SHARED) return b;
    return {2, 16, 16};
}
constexpr BlockShape backward_shape(int W, int shared) {
    const BlockShape serial[] = {{1, 64, 64}, {1, 32, 32}};
    const BlockShape half[] = {{8, 16, 64}, {4, 16, 64}, {4, 16, 32}, {2, 16, 32}};
    const BlockShape full[] = {{4, 16, 32}, {2, 16, 32}, {2, 16, 16}, {1, 16, 16}};
    const BlockShape *b = SERIAL ? serial : BF16 ? half : full;
    while (backward_bytes(W, *b) > shared) b++;
    return *b;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f with two constants: the columns of the tiles that heads of HS columns lie in, mma takes 16 at a time; and the
// shared memory that the backward's blocks may count on.
template <typename F>
void with_tiles(int HS, const Gpu& gpu, F f) {
    auto with_width = [&](auto width) {
        if constexpr (!SERIAL)
            if (gpu.shared < LARGE_SHARED) return f(width, Constant<SMALL_SHARED>());
        f(width, Constant<LARGE_SHARED>());
    };
    if (HS <= 16) return with_width(Constant<16>());
    if (HS <= 32) return with_width(Constant<32>());
    if (HS <= 64) return with_width(Constant<64>());
    if (HS <= 80) return with_width(Constant<80>());
    if (HS <= 128) return with_width(Constant<128>());
    with_width(Constant<256>());
}
