// Attention on Hopper (sm_90a), bf16, head sizes 64 and 128: the results of train_gpt.cu's attention, faster.
#pragma once
#include "attention.cuh"
#include "heads.cuh"
#include "hopper.cuh"
#include "tile.cuh"

// The map of x (heads,T,HS) for boxes of `rows` rows and 64 columns; rows beyond T are zero.
inline CUtensorMap heads_map(const floatX* x, int heads, int T, int HS, int rows) {
    const int64_t row = 2 * HS, head = T * row;
    return tensor_map(x, {HS, T, heads, 1}, {row, head, heads * head}, {64, rows, 1, 1});
}
// the same of x (B,T,NH HS)
inline CUtensorMap tokens_map(const floatX* x, Heads h, int rows) {
    const int64_t row = 2 * h.NH * h.HS, batch = h.T * row;
    return tensor_map(x, {h.NH * h.HS, h.T, h.B, 1}, {row, batch, h.B * batch}, {64, rows, 1, 1});
}

// Forward on Hopper, head sizes 64 and 128, FlashAttention-3's way (Shah et al. 2024). Blocks stay on their
// multiprocessors and take tiles of ROWS queries of a head, those with the most keys first. The last warpgroup loads:
// one thread fills two buffers for q (the next tile's comes while this one is worked on) and two rings, for k and for
// v, of tiles of KEYS keys, by bulk copies. Each of the other GROUPS warpgroups has 64 queries, a warp 16 of them:
//   p = q k_n^T, both from shared memory;  acc += p v_{n-1}, p from registers;  meanwhile the softmax of k_n's scores
// and the groups take turns at starting their products, so that one's softmax runs under the others' products.
// In shared memory tiles are rows of 64 columns, 128 bytes, swizzled; head size 128 is two such halves one after the
// other. full: a tile has landed; empty: every multiplying warp is done with it. In clocks of the tensor cores (4096
// FLOP each) a step of 64 queries by 128 keys takes 8 HS, its exponentials take 512 at 16 a clock.
template <int HS>
struct HopperForward {
    static constexpr int GROUPS = HS == 64 ? 3 : 2, ROWS = 64 * GROUPS, KEYS = 128, STAGES = HS == 64 ? 4 : 2;
    static constexpr int THREADS = 128 * (GROUPS + 1);
    static constexpr int REGISTERS = HS == 64 ? 160 : 240, LOADER_REGISTERS = HS == 64 ? 32 : 24;
    static constexpr int LINE = 128, HALVES = HS / 64;  // LINE and below: bytes
    static constexpr int Q = ROWS * HS * 2, TILE = KEYS * HS * 2;
    static constexpr int SMEM = 2 * Q + 2 * STAGES * TILE + (4 + 4 * STAGES) * 8 + 2 * 4;  // mbarriers, tile numbers
};

// The tile after those that blocks begin with. Counts up to the number of tiles and wraps to 0, as often as there are
// tiles, so that every launch finds it at 0; launches must not overlap.
__device__ unsigned attention_next_tile = 0;

template <int HS>
__global__ void __launch_bounds__(HopperForward<HS>::THREADS, 1)
    attention_forward_hopper_kernel(const __grid_constant__ CUtensorMap out, float* lse,
                                    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                                    const __grid_constant__ CUtensorMap v, int B, int T, int NH, int NKV,
                                    const int2* spans, float scale) {
    if (!HOPPER_CODE) return;
    using F = HopperForward<HS>;
    constexpr int KEYS = F::KEYS, LINE = F::LINE, STAGES = F::STAGES;
    extern __shared__ __align__(1024) unsigned char attention_hopper_smem[];
    unsigned char *sq = attention_hopper_smem, *sk = sq + 2 * F::Q, *sv = sk + STAGES * F::TILE;
    uint64_t *q_full = reinterpret_cast<uint64_t*>(sv + STAGES * F::TILE), *q_empty = q_full + 2;
    uint64_t *k_full = q_empty + 2, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES, *v_empty = v_full + STAGES;
    int* buffer_tile = reinterpret_cast<int*>(v_empty + STAGES);  // which tile's q is in each buffer
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(q_full + i, 1), mbarrier_init(q_empty + i, 4 * F::GROUPS);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(k_full + i, 1), mbarrier_init(k_empty + i, 4 * F::GROUPS);
            mbarrier_init(v_full + i, 1), mbarrier_init(v_empty + i, 4 * F::GROUPS);
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    const int tiles = ceil_div(T, F::ROWS), all_tiles = B * NH * tiles;
    const int group = __shfl_sync(ALL_LANES, int(threadIdx.x) / 128, 0);  // the compiler sees that a warp agrees
    auto first_row = [&](const Place& place) { return (tiles - 1 - place.tile) * F::ROWS; };
    auto steps_of = [&](int row0) { return ceil_div(min(row0 + F::ROWS, T), KEYS); };
    // the first token of the document of query t of a head
    auto document = [&](int head, int t) { return spans ? spans[size_t(head / NH) * T + min(t, T - 1)].x : 0; };
    int stage = 0;  // of k's ring, and of v's in the same step
    unsigned phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (group == F::GROUPS) {
        registers_less<F::LOADER_REGISTERS>();
        if (threadIdx.x % 128) return;
        // columns 0-63, then 64-127, of `rows` rows from row t of a head
        auto load = [&](unsigned char* to, const CUtensorMap* map, uint64_t* full, int rows, int t, int head) {
            mbarrier_arrive_expect(full, rows * HS * 2);
            #pragma unroll
            for (int i = 0; i < F::HALVES; i++) tma_load(to + i * rows * LINE, map, full, 64 * i, t, head);
        };
        int tile = blockIdx.x;
        for (int i = 0;; i++) {
            const int buffer = i % 2;
            mbarrier_wait(q_empty + buffer, i / 2 % 2 ^ 1);  // at first, the phase before the first counts as completed
            buffer_tile[buffer] = tile;
            if (tile >= all_tiles) {
                mbarrier_arrive(q_full + buffer);
                return;
            }
            const int next = gridDim.x + atomicInc(&attention_next_tile, all_tiles - 1);  // here while the copies run
            const Place place = attention_place(tile, B * NH, tiles);
            const int row0 = first_row(place), steps = steps_of(row0);
            const int kv_head = place.head / NH * NKV + place.head % NH / (NH / NKV);
            load(sq + buffer * F::Q, &q, q_full + buffer, F::ROWS, row0, place.head);
            #pragma unroll 1
            for (int n = document(place.head, row0) / KEYS; n < steps; n++, advance()) {
                mbarrier_wait(k_empty + stage, phase ^ 1);
                load(sk + stage * F::TILE, &k, k_full + stage, KEYS, n * KEYS, kv_head);
                mbarrier_wait(v_empty + stage, phase ^ 1);
                load(sv + stage * F::TILE, &v, v_full + stage, KEYS, n * KEYS, kv_head);
            }
            tile = next;
        }
    }

    registers_more<F::REGISTERS>();
    // Turns: barrier 1 + group is waited at by the group and arrived at by the one before it.
    auto turn_wait = [&] { named_barrier_sync(1 + group, 256); };
    auto turn_pass = [&] { named_barrier_arrive(1 + (group + 1) % F::GROUPS, 256); };
    auto release = [&](uint64_t* empty) {
        if (lane() == 0) mbarrier_arrive(empty);
    };
    const float scale2 = scale * LOG2E;
    const int first = group * 64 + warp() % 4 * 16;  // this warp's rows in the tile
    const uint64_t k_tiles = wgmma_descriptor(sk, 16, 8 * LINE), v_tiles = wgmma_descriptor(sv, KEYS * LINE, 8 * LINE);
    if (group == F::GROUPS - 1) turn_pass();
    for (int i = 0;; i++) {
        const int buffer = i % 2;
        mbarrier_wait(q_full + buffer, i / 2 % 2);
        const int tile = buffer_tile[buffer];
        if (tile >= all_tiles) break;
        const Place place = attention_place(tile, B * NH, tiles);
        const int row0 = first_row(place), steps = steps_of(row0);
        unsigned char* rows = sq + buffer * F::Q + group * 64 * LINE;  // this group's, all columns
        const uint64_t q_rows = wgmma_descriptor(rows, 16, 8 * LINE);
        const int begin = document(place.head, row0) / KEYS, last_document = document(place.head, row0 + first + 15);

        Tile<16, KEYS, BY_COLUMN> p;
        Tile<16, HS> acc;
        unsigned weights[KEYS / 16][4];  // p as the A operand of acc's product
        acc.zero();
        float top[2], sum[2], keep[2];  // p are taken relative to 2^(scale2 top)
        for (int s = 0; s < 2; s++) top[s] = -INFINITY, sum[s] = 0.0f;
        auto multiply_keys = [&](int stage) {  // p = q k^T
            wgmma_fence();
            #pragma unroll
            for (int c = 0; c < HS / 16; c++)  // 16 columns: 32 bytes on, or in the next half
                wgmma_ss<KEYS, 0, 0>(p.v, q_rows + (c / 4 * F::ROWS * LINE + c % 4 * 32) / 16,
                                     k_tiles + (stage * F::TILE + c / 4 * KEYS * LINE + c % 4 * 32) / 16, c > 0);
            wgmma_commit();
        };
        auto multiply_values = [&](int stage) {  // acc += p v
            wgmma_fence();
            #pragma unroll
            for (int j = 0; j < KEYS / 16; j++)
                wgmma_rs<HS, 1>(acc.v, weights[j], v_tiles + (stage * F::TILE + j * 16 * LINE) / 16, 1);
            wgmma_commit();
        };
        auto softmax = [&](int n) {  // true: sums before are to be multiplied by keep
            const int diagonal = row0 + first - n * KEYS;
            if (diagonal < KEYS - 1) mask_scores(p, diagonal);
            if (last_document > n * KEYS)
                mask_documents(p, spans + size_t(place.head / NH) * T, row0 + first, T, n * KEYS);
            const bool grown = softmax_top(p, top, keep, scale2);
            for (int s = 0; s < 2 && grown; s++) sum[s] *= keep[s];
            softmax_exp(p, top, sum, scale2);
            return grown;
        };

        mbarrier_wait(k_full + stage, phase);
        turn_wait();
        multiply_keys(stage);
        turn_pass();
        wgmma_wait<0>();
        wgmma_registers<KEYS / 2>(p.v);
        release(k_empty + stage);
        softmax(begin);
        round_operand<KEYS>(weights, p.v);
        for (int n = begin + 1; n < steps; n++) {
            const int before = stage;
            const unsigned before_phase = phase;
            advance();
            mbarrier_wait(k_full + stage, phase);
            turn_wait();
            multiply_keys(stage);
            mbarrier_wait(v_full + before, before_phase);
            multiply_values(before);
            turn_pass();
            wgmma_wait<1>();
            wgmma_registers<KEYS / 2>(p.v);
            release(k_empty + stage);
            const bool grown = softmax(n);
            keep_after(sum[0] + sum[1], reinterpret_cast<float*>(sq));
            wgmma_wait<0>();
            wgmma_registers<HS / 2>(acc.v);
            release(v_empty + before);
            if (grown) {
                #pragma unroll
                for (int s = 0; s < 2; s++)
                    #pragma unroll
                    for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= keep[s];
            }
            round_operand<KEYS>(weights, p.v);
        }
        mbarrier_wait(v_full + stage, phase);
        multiply_values(stage);
        wgmma_wait<0>();
        wgmma_registers<HS / 2>(acc.v);
        release(v_empty + stage);
        advance();

        #pragma unroll
        for (int s = 0; s < 2; s++) {
            const float total = tile_row_sum(sum[s]);
            const int t = row0 + first + acc.row(s);
            #pragma unroll
            for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= 1.0f / total;
            if (lane() % 4 == 0 && t < T) lse[size_t(place.head) * T + t] = scale * top[s] + logf(total);
        }
        // out goes through the rows that q had: nobody in the group reads them any more
        named_barrier_sync(1 + F::GROUPS + group, 128);
        unsigned char* own = rows + warp() % 4 * 16 * LINE;
        unsigned rounded[HS / 16][4];
        round_operand<HS>(rounded, acc.v);
        #pragma unroll
        for (int c = 0; c < F::HALVES; c++) store_box(own + c * F::ROWS * LINE, rounded + 4 * c);
        fence_async_shared();
        __syncwarp();
        if (lane() == 0) {
            for (int c = 0; c < F::HALVES; c++)
                if (row0 + first < T)
                    tma_store(&out, own + c * F::ROWS * LINE, place.head % NH * HS + 64 * c, row0 + first,
                              place.head / NH);
            tma_store_commit();
            tma_store_wait<0>();
            mbarrier_arrive(q_empty + buffer);
        }
    }
    if (group == 0) turn_wait();  // what the last group passed on
}

template <int HS>
void attention_forward_hopper(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                              const Gpu& gpu) {
    using F = HopperForward<HS>;
    const CUtensorMap map_q = heads_map(q, h.B * h.NH, h.T, HS, F::ROWS);
    const CUtensorMap map_k = heads_map(k, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_v = heads_map(v, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_out = tokens_map(out, h, 16);
    const int blocks = std::min(h.B * h.NH * ceil_div(h.T, F::ROWS), gpu.sms);
    auto kernel = attention_forward_hopper_kernel<HS>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SMEM));
    attention_forward_hopper_kernel<HS><<<blocks, F::THREADS, F::SMEM, gpu.stream>>>(
        map_out, lse, map_q, map_k, map_v, h.B, h.T, h.NH, h.NKV, h.spans, 1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

// Backward on Hopper, head sizes 64 and 128: the sums of train_gpt.cu's attention_backward_kernel by blocks of KEYS
// keys, with its turns. The last
// warpgroup's first warp loads: k and v once, then a ring of tiles of q, dout (bulk copies), lse and delta. Each of the
// other two groups has 64 of the keys, scores transposed: p (64,QUERIES) = k q^T, dp = v dout^T,
//   dv += p dout,  dk += ds q,  p and ds from registers;  dq = ds^T k over all keys, ds through shared memory
// where a group has half of the columns of dq (head size 128) or half of its queries (64): 64 x 64 in both cases. It
// leaves while the next tile's first scores are multiplied. What a block has of dq it leaves in shared memory; two
// warps of the last group, for every other tile each, wait for the turn and add it to `sum`: one bulk addition, so that
// each element has one order of adding. The last block to add to a tile adds in registers, scales and rounds. A tile is
// 2560 clocks of the tensor cores (4096 FLOP each), loads 32 KB and adds 32 KB.
// sum (B NH, query tiles, QUERIES HS) float, in the order of the threads' registers; turns (B NH, head_turns(T)), 0 at
// the start, of which a head's first `query tiles` are used. q, k, v, dk, dv (heads,T,HS) and dout (B,T,NH HS) come as
// maps; dq (B,NH,T,HS) floatX; lse, delta (B,NH,T) float.
template <int HS>
struct HopperBackward {
    static constexpr int KEYS = 128, QUERIES = HS == 64 ? 128 : 64, STAGES = 2, THREADS = 384;
    static constexpr int LINE = 128, HALVES = HS / 64;  // LINE and below: bytes
    static constexpr int KV = KEYS * HS * 2, TILE = QUERIES * HS * 2, DS = KEYS * QUERIES * 2;
    static constexpr int STATS = 2 * QUERIES * 4, DQ = QUERIES * HS * 4;
    static constexpr int SMEM = 2 * KV + STAGES * (2 * TILE + DS + STATS) + 2 * DQ + (1 + 2 * STAGES) * 8;
};

template <int HS>
__global__ void __launch_bounds__(HopperBackward<HS>::THREADS, 1)
    attention_backward_hopper_kernel(floatX* dq, const __grid_constant__ CUtensorMap dk,
                                     const __grid_constant__ CUtensorMap dv, float* sum, int* turns,
                                     const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap q,
                                     const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                                     const float* lse, const float* delta, int B, int T, int NH, int NKV,
                                     const int2* spans, float scale) {
    if (!HOPPER_CODE) return;
    using F = HopperBackward<HS>;
    constexpr int KEYS = F::KEYS, QUERIES = F::QUERIES, LINE = F::LINE, STAGES = F::STAGES;
    extern __shared__ __align__(1024) unsigned char attention_hopper_smem[];
    unsigned char *sk = attention_hopper_smem, *sv = sk + F::KV, *sq = sv + F::KV, *sdo = sq + STAGES * F::TILE;
    unsigned char* sds = sdo + STAGES * F::TILE;
    float* sdq = reinterpret_cast<float*>(sds + STAGES * F::DS);  // two buffers that are used in turn
    float* stats = sdq + 2 * QUERIES * HS;                        // lse log2(e), delta
    uint64_t* kv_full = reinterpret_cast<uint64_t*>(stats + STAGES * 2 * QUERIES);
    uint64_t *full = kv_full + 1, *empty = full + STAGES;
    if (threadIdx.x == 0) {
        mbarrier_init(kv_full, 1);
        for (int i = 0; i < STAGES; i++) mbarrier_init(full + i, WARP_SIZE + 1), mbarrier_init(empty + i, 8);
        mbarrier_fence_init();
    }
    __syncthreads();
    const int tiles = ceil_div(T, QUERIES);
    const Place place = attention_place(blockIdx.x, B * NKV, ceil_div(T, KEYS));
    const int block = place.tile, row0 = block * KEYS;
    const int first_head = place.head * (NH / NKV), end_head = first_head + NH / NKV;  // of all in the batch
    const int group = __shfl_sync(ALL_LANES, int(threadIdx.x) / 128, 0);  // the compiler sees that a warp agrees
    // spans are now this sequence's. The last tile of queries that see the last key; the first block to add to a tile
    if (spans) spans += size_t(place.head / NKV) * T;
    const int last_tile = spans ? (spans[min(row0 + KEYS, T) - 1].y - 1) / QUERIES : tiles - 1;
    auto first_block = [&](int tile) { return spans ? spans[tile * QUERIES].x / KEYS : 0; };
    // query heads and tiles that see the block's keys
    auto for_each_tile = [&](auto work) {
        for (int head = first_head; head < end_head; head++)
            for (int tile = last_tile; tile >= row0 / QUERIES; tile--) work(head, tile);
    };
    // where their dq is summed
    auto sum_at = [&](int head, int tile) { return sum + size_t(head * tiles + tile) * QUERIES * HS; };
    auto turn_of = [&](int head, int tile) { return turns + head * head_turns(T) + tile; };
    // whether this block is the last to add there
    auto is_last = [&](int tile) { return block == min(tile * QUERIES + QUERIES - 1, T - 1) / KEYS; };
    // dq goes to memory through two buffers in turn, each with a warp that adds. Named barriers between it and those
    // that multiply:
    auto buffer_free = [](int buffer) { return 2 + buffer; };
    auto buffer_full = [](int buffer) { return 4 + buffer; };
    constexpr int BUFFER_THREADS = 256 + WARP_SIZE;
    int stage = 0, next_buffer = 0;
    unsigned phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (group == 2) {
        registers_less<40>();
        const int adder = warp() % 4 - 1;  // the first warp loads
        if (adder == 0 || adder == 1) {
            float* from = sdq + adder * QUERIES * HS;
            named_barrier_arrive(buffer_free(adder), BUFFER_THREADS);
            for_each_tile([&](int head, int tile) {
                if (is_last(tile)) return;
                const bool mine = next_buffer == adder;
                next_buffer ^= 1;
                if (!mine) return;
                int* turn = turn_of(head, tile);
                if (block > first_block(tile)) wait_for_turn(turn, block);
                named_barrier_sync(buffer_full(adder), BUFFER_THREADS);
                if (lane() == 0) {
                    fence_async_global();
                    if (block == first_block(tile))
                        bulk_store(sum_at(head, tile), from, F::DQ);
                    else
                        bulk_add(sum_at(head, tile), from, F::DQ);
                    tma_store_commit();
                    tma_store_wait<0>();
                }
                __syncwarp();
                named_barrier_arrive(buffer_free(adder), BUFFER_THREADS);
                if (lane() == 0) {
                    tma_store_wait_written<0>();
                    flag_write(turn, block + 1);
                }
            });
        }
        if (adder >= 0) return;
        if (lane() == 0) {
            mbarrier_arrive_expect(kv_full, 2 * F::KV);
            for (int i = 0; i < F::HALVES; i++) {
                tma_load(sk + i * KEYS * LINE, &k, kv_full, 64 * i, row0, place.head);
                tma_load(sv + i * KEYS * LINE, &v, kv_full, 64 * i, row0, place.head);
            }
        }
        auto load = [&](int head, int tile) {
            const int t0 = tile * QUERIES;
            const size_t at = size_t(head) * T + t0;
            mbarrier_wait(empty + stage, phase ^ 1);  // at first, the phase before the first counts as completed
            if (lane() == 0) {
                mbarrier_arrive_expect(full + stage, 2 * F::TILE);
                for (int i = 0; i < F::HALVES; i++) {
                    const int to = stage * F::TILE + i * QUERIES * LINE;
                    tma_load(sq + to, &q, full + stage, 64 * i, t0, head);
                    tma_load(sdo + to, &dout, full + stage, head % NH * HS + 64 * i, t0, head / NH);
                }
            }
            for (int i = lane(); i < QUERIES; i += WARP_SIZE) {
                float* to = stats + stage * 2 * QUERIES + i;
                to[0] = t0 + i < T ? LOG2E * lse[at + i] : 0.0f;
                to[QUERIES] = t0 + i < T ? delta[at + i] : 0.0f;
            }
            mbarrier_arrive(full + stage);
            advance();
        };
        for_each_tile(load);
        return;
    }

    registers_more<232>();
    const float scale2 = scale * LOG2E;
    const int first = group * 64 + warp() % 4 * 16;  // this warp's rows of the keys
    // its rows and columns of dq's tile
    const int dq_row = (HS == 64 ? group * 64 : 0) + warp() % 4 * 16, dq_col = HS == 64 ? 0 : group * 64;
    const uint64_t k_rows = wgmma_descriptor(sk + group * 64 * LINE, 16, 8 * LINE);
    const uint64_t v_rows = wgmma_descriptor(sv + group * 64 * LINE, 16, 8 * LINE);
    const uint64_t k_columns = wgmma_descriptor(sk + dq_col / 64 * KEYS * LINE, KEYS * LINE, 8 * LINE);
    const uint64_t ds_columns = wgmma_descriptor(sds + dq_row / 64 * KEYS * LINE, KEYS * LINE, 8 * LINE);
    const uint64_t q_rows = wgmma_descriptor(sq, 16, 8 * LINE), do_rows = wgmma_descriptor(sdo, 16, 8 * LINE);
    const uint64_t q_columns = wgmma_descriptor(sq, QUERIES * LINE, 8 * LINE);
    const uint64_t do_columns = wgmma_descriptor(sdo, QUERIES * LINE, 8 * LINE);
    // tiles are worked on 64 queries at a time
    typedef Tile<16, 64, BY_COLUMN> Scores;
    constexpr int PIECES = QUERIES / 64;
    Tile<16, HS> acc_k, acc_v;
    acc_k.zero();
    acc_v.zero();
    // c = a b^T over the head: a this group's keys, b queries
    auto multiply_rows = [&](Scores& c, uint64_t a, uint64_t b) {
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < HS / 16; i++)
            wgmma_ss<64, 0, 0>(c.v, a + (i / 4 * KEYS * LINE + i % 4 * 32) / 16,
                               b + (i / 4 * QUERIES * LINE + i % 4 * 32) / 16, i > 0);
        wgmma_commit();
    };
    // c += a b over the queries
    auto multiply_columns = [&](Tile<16, HS>& c, const unsigned(*a)[4], uint64_t b) {
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < 4; i++) wgmma_rs<HS, 1>(c.v, a[i], b + i * LINE, 1);
        wgmma_commit();
    };
    auto piece_at = [&](int i) { return uint64_t((stage * F::TILE + i * 64 * LINE) / 16); };
    // From the scores of a tile, whose p[0] is under way, to dv, dk and ds in shared memory.
    auto add_tile = [&](Scores* p, int tile) {
        Scores ds[PIECES];
        unsigned rounded_p[PIECES][4][4], rounded_ds[PIECES][4][4];
        multiply_rows(ds[0], v_rows, do_rows + piece_at(0));
        if constexpr (PIECES == 2) multiply_rows(p[1], k_rows, q_rows + piece_at(1));
        #pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const float *piece_lse = stats + stage * 2 * QUERIES + 64 * i, *piece_delta = piece_lse + QUERIES;
            const int diagonal = row0 + first - tile * QUERIES - 64 * i;  // columns from row + diagonal on
            // committed behind p[0]: dp[0], and p[1] if there is one; behind p[1]: dv, dk, dp[1]
            i == 0 ? wgmma_wait<PIECES>() : wgmma_wait<3>();
            wgmma_registers<32>(p[i].v);
            #pragma unroll
            for (int e = 0; e < Scores::PER_ROW; e += 2) {
                const float2 l = *reinterpret_cast<const float2*>(piece_lse + Scores::col(e));
                #pragma unroll
                for (int s = 0; s < 2; s++) {
                    p[i].at(s, e) = fast_exp2(scale2 * p[i].at(s, e) - l.x);
                    p[i].at(s, e + 1) = fast_exp2(scale2 * p[i].at(s, e + 1) - l.y);
                }
            }
            // Queries beyond T have dout and delta 0 and add nothing; keys beyond T are after every query
            if (diagonal > -16) {
                #pragma unroll
                for (int e = 0; e < Scores::PER_ROW; e++)
                    #pragma unroll
                    for (int s = 0; s < 2; s++)
                        p[i].at(s, e) = Scores::col(e) >= Scores::row(s) + diagonal ? p[i].at(s, e) : 0.0f;
            }
            const int t = tile * QUERIES + 64 * i;
            if (spans && spans[min(t + 63, T - 1)].x > row0 + first) mask_queries(p[i], spans, t, T, row0 + first);
            round_operand<64>(rounded_p[i], p[i].v);
            multiply_columns(acc_v, rounded_p[i], do_columns + piece_at(i));
            // committed behind dp[0]: p[1] if there is one, dv; behind dp[1]: dv
            i == 0 ? wgmma_wait<PIECES>() : wgmma_wait<1>();
            wgmma_registers<32>(ds[i].v);
            #pragma unroll
            for (int e = 0; e < Scores::PER_ROW; e += 2) {
                const float2 d = *reinterpret_cast<const float2*>(piece_delta + Scores::col(e));
                #pragma unroll
                for (int s = 0; s < 2; s++) {
                    ds[i].at(s, e) = p[i].at(s, e) * (ds[i].at(s, e) - d.x);
                    ds[i].at(s, e + 1) = p[i].at(s, e + 1) * (ds[i].at(s, e + 1) - d.y);
                }
            }
            round_operand<64>(rounded_ds[i], ds[i].v);
            multiply_columns(acc_k, rounded_ds[i], q_columns + piece_at(i));
            if (i + 1 < PIECES) multiply_rows(ds[i + 1], v_rows, do_rows + piece_at(i + 1));
            store_box(sds + stage * F::DS + (i * KEYS + first) * LINE, rounded_ds[i]);
        }
        fence_async_shared();
        named_barrier_sync(1, 256);  // ds is there, and the last tile's is read
        wgmma_wait<0>();
        wgmma_registers<HS / 2>(acc_k.v);
        wgmma_registers<HS / 2>(acc_v.v);
        if (lane() == 0) mbarrier_arrive(empty + stage);
    };
    auto multiply_dq = [&](Tile<16, 64>& acc, int stage) {
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            wgmma_ss<64, 1, 1>(acc.v, ds_columns + (stage * F::DS + i * 16 * LINE) / 16, k_columns + i * LINE, i > 0);
        wgmma_commit();
    };
    auto leave_dq = [&](Tile<16, 64>& acc, int head, int tile) {
        wgmma_registers<32>(acc.v);
        const int at = group * 8 * 128 + threadIdx.x % 128;
        if (is_last(tile)) {
            if (block > first_block(tile)) {
                wait_for_turn(turn_of(head, tile), block);
                #pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float4 before = __ldcg(reinterpret_cast<const float4*>(sum_at(head, tile)) + at + i * 128);
                    acc.v[4 * i] += before.x, acc.v[4 * i + 1] += before.y;
                    acc.v[4 * i + 2] += before.z, acc.v[4 * i + 3] += before.w;
                }
            }
            #pragma unroll
            for (int s = 0; s < 2; s++) {
                const int t = tile * QUERIES + dq_row + acc.row(s);
                floatX* row = dq + (size_t(head) * T + t) * HS + dq_col;
                #pragma unroll
                for (int e = 0; e < acc.PER_ROW; e += 4) store_columns(row, acc, s, e, scale, t < T ? 64 : 0);
            }
        } else {
            float4* to = reinterpret_cast<float4*>(sdq + next_buffer * QUERIES * HS) + at;
            named_barrier_sync(buffer_free(next_buffer), BUFFER_THREADS);
            #pragma unroll
            for (int i = 0; i < 8; i++) to[i * 128] = reinterpret_cast<const float4*>(acc.v)[i];
            fence_async_shared();
            named_barrier_arrive(buffer_full(next_buffer), BUFFER_THREADS);
            next_buffer ^= 1;
        }
    };
    // While a tile's dq leaves, the next tile's scores are multiplied. Nothing is under way where the loop begins anew:
    // ptxas would wait for each product by itself. Before the first tile dq is of what lies there, for nobody.
    mbarrier_wait(kv_full, 0);
    for_each_tile([&](int head, int tile) {
        const bool first_tile = head == first_head && tile == last_tile, next_head = tile == last_tile;
        Tile<16, 64> acc;
        Scores p[PIECES];
        static_assert(STAGES == 2);
        multiply_dq(acc, stage ^ 1);  // the last tile's
        mbarrier_wait(full + stage, phase);
        multiply_rows(p[0], k_rows, q_rows + piece_at(0));
        wgmma_wait<1>();
        if (!first_tile) leave_dq(acc, head - next_head, next_head ? row0 / QUERIES : tile + 1);
        add_tile(p, tile);
        advance();
    });
    Tile<16, 64> acc;
    multiply_dq(acc, stage ^ 1);
    wgmma_wait<0>();
    leave_dq(acc, end_head - 1, row0 / QUERIES);
    for (int i = 0; i < 2; i++) named_barrier_sync(buffer_free(i), BUFFER_THREADS);
    // dk and dv go through the rows that k and v had
    named_barrier_sync(1, 256);
    #pragma unroll
    for (float& x : acc_k.v) x *= scale;
    unsigned rounded[HS / 16][4];
    round_operand<HS>(rounded, acc_k.v);
    for (int c = 0; c < F::HALVES; c++) store_box(sk + (c * KEYS + first) * LINE, rounded + 4 * c);
    round_operand<HS>(rounded, acc_v.v);
    for (int c = 0; c < F::HALVES; c++) store_box(sv + (c * KEYS + first) * LINE, rounded + 4 * c);
    fence_async_shared();
    __syncwarp();
    if (lane() == 0) {
        for (int c = 0; c < F::HALVES; c++) {
            if (row0 + first >= T) break;
            tma_store(&dk, sk + (c * KEYS + first) * LINE, 64 * c, row0 + first, place.head);
            tma_store(&dv, sv + (c * KEYS + first) * LINE, 64 * c, row0 + first, place.head);
        }
        tma_store_commit();
        tma_store_wait<0>();
    }
}

template <int HS>
void attention_backward_hopper(floatX* dq, floatX* dk, floatX* dv, float* sum, int* turns, const floatX* dout,
                               const floatX* q, const floatX* k, const floatX* v, const float* lse, const float* delta,
                               Heads h, const Gpu& gpu) {
    using F = HopperBackward<HS>;
    const CUtensorMap map_q = heads_map(q, h.B * h.NH, h.T, HS, F::QUERIES);
    const CUtensorMap map_k = heads_map(k, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_v = heads_map(v, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_dk = heads_map(dk, h.B * h.NKV, h.T, HS, 16);
    const CUtensorMap map_dv = heads_map(dv, h.B * h.NKV, h.T, HS, 16);
    const CUtensorMap map_dout = tokens_map(dout, h, F::QUERIES);
    auto kernel = attention_backward_hopper_kernel<HS>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SMEM));
    attention_backward_hopper_kernel<HS><<<h.B * h.NKV * ceil_div(h.T, F::KEYS), F::THREADS, F::SMEM, gpu.stream>>>(
        dq, map_dk, map_dv, sum, turns, map_dout, map_q, map_k, map_v, lse, delta, h.B, h.T, h.NH, h.NKV, h.spans,
        1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}
