// What the attention kernels share, those for every GPU (train_gpt.cu) and Hopper's (attention_hopper.cuh): the order
// of the blocks, the turns of the backward, the online softmax.
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
