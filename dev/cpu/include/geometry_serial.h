// The serial geometry: a block is one thread, a warp one lane, and both are compile-time constants. Loops that stride
// by blockDim.x or by the warp size become plain loops over the row, which gcc vectorises; reductions over lanes fold
// away. The launch's block size is not used. Threads share the blocks.
#pragma once
#include "threads.h"

#define WARP_SIZE 1

static constexpr uint3 threadIdx{0, 0, 0};
static constexpr dim3 blockDim{1, 1, 1};
static thread_local uint3 blockIdx;
static thread_local dim3 gridDim;

// Shared memory belongs to the thread that runs the block.
#define CUDA_SHARED(name, dims, ...) alignas(64) static thread_local __VA_ARGS__ name dims

static thread_local struct { void* data; size_t bytes; } cuda_dynamic;
inline void* cuda_dynamic_shared() { return cuda_dynamic.data; }

inline void __syncthreads() {}
inline void __syncwarp(unsigned = ~0u) {}
inline bool __any_sync(unsigned, bool value) { return value; }
template <class T> T __shfl_sync(unsigned, T value, int, int = WARP_SIZE) { return value; }
template <class T> T __shfl_xor_sync(unsigned, T value, int, int = WARP_SIZE) { return value; }
template <class T> T __shfl_up_sync(unsigned, T value, unsigned, int = WARP_SIZE) { return value; }
template <class T> T __shfl_down_sync(unsigned, T value, unsigned, int = WARP_SIZE) { return value; }

// Whole-warp instructions need a warp; kernels that use them have a plain loop for this geometry.
inline void mma_m16n8k16(float*, const unsigned*, const unsigned*) { abort(); }
inline void ldmatrix_x4(unsigned*, const void*) { abort(); }
inline void ldmatrix_x4_trans(unsigned*, const void*) { abort(); }

// So do Hopper's.
inline void mbarrier_init(uint64_t*, unsigned) { abort(); }
inline void mbarrier_fence_init() { abort(); }
inline void mbarrier_arrive(uint64_t*) { abort(); }
inline void mbarrier_arrive_expect(uint64_t*, unsigned) { abort(); }
inline void mbarrier_wait(uint64_t*, unsigned) { abort(); }
inline void fence_async_shared() { abort(); }
inline void fence_async_global() { abort(); }
inline void stmatrix_x4(void*, const unsigned*) { abort(); }
inline void named_barrier_sync(int, int) { abort(); }
inline void named_barrier_arrive(int, int) { abort(); }
inline void tma_load(void*, const CUtensorMap*, uint64_t*, int, int, int = 0, int = 0) { abort(); }
inline void tma_store(const CUtensorMap*, const void*, int, int, int = 0, int = 0) { abort(); }
inline void bulk_store(float*, const float*, int) { abort(); }
inline void bulk_add(float*, const float*, int) { abort(); }
inline void tma_store_commit() { abort(); }
template <int N> void tma_store_wait() { abort(); }
template <int N> void tma_store_wait_written() { abort(); }
inline uint64_t wgmma_descriptor(const void*, int, int) { abort(); }
inline void wgmma_fence() { abort(); }
inline void wgmma_commit() { abort(); }
template <int N> void wgmma_wait() { abort(); }
template <int COUNT> void wgmma_registers(float*) { abort(); }
template <int N, int TRANS_A, int TRANS_B> void wgmma_ss(float*, uint64_t, uint64_t, int) { abort(); }
template <int N, int TRANS_B> void wgmma_rs(float*, const unsigned*, uint64_t, int) { abort(); }
template <int R> void registers_more() { abort(); }
template <int R> void registers_less() { abort(); }

// Asynchronous copies are done at once.
template <int BYTES> void copy_async(void* to, const void* from, bool valid) {
    if (valid) memcpy(to, from, BYTES);
    else memset(to, 0, BYTES);
}
inline void copy_commit() {}
template <int N> void copy_wait() {}

// Flags between blocks. Blocks start in order, so the one that is waited for runs or has run.
inline int flag_read(const int* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline void flag_write(int* flag, int value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline void flag_pause() {}

template <class F>
void cuda_run_blocks(const char*, dim3 grid, dim3, size_t shared, const std::vector<CUtensorMap>&, F body) {
    const int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
    // small chunks, as causal rows differ in work
    cuda_share_range(blocks, std::max<int64_t>(1, blocks / (64 * cuda_threads.threads)), [&](int64_t from, int64_t to) {
        gridDim = grid;
        if (cuda_dynamic.bytes < shared) {
            free(cuda_dynamic.data);
            if (posix_memalign(&cuda_dynamic.data, 64, shared) != 0) abort();
            cuda_dynamic.bytes = shared;
        }
        for (int64_t i = from; i < to; i++) {
            blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
            body();
        }
    });
}
