// Hopper instructions (sm_90a): bulk tensor copies, mbarriers, wgmma, named barriers. Thin wrappers of PTX; on other
// architectures they are empty, and kernels that use them begin with `if (!HOPPER_CODE) return;`. The CPU stand-in
// emulates them (dev/cpu/include/hopper_exact.h).
#pragma once
#include <cuda.h>

#include <array>

#include "ptx.cuh"

#ifdef __CUDACC__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_ASM(...) asm volatile(__VA_ARGS__)
constexpr bool HOPPER_CODE = true;
#else
#define HOPPER_ASM(...)
constexpr bool HOPPER_CODE = false;
#endif

__device__ inline unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// mbarriers. One thread initialises, then mbarrier_fence_init and __syncthreads. A phase ends when `arrivals` threads
// have arrived and the expected bytes have come; the phases' parities are 0, 1, 0, ...
__device__ inline void mbarrier_init(uint64_t* bar, unsigned arrivals) {
    HOPPER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_fence_init() {
    HOPPER_ASM("fence.mbarrier_init.release.cluster;" ::: "memory");
    HOPPER_ASM("fence.proxy.async;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* bar) {
    HOPPER_ASM("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes) {
    HOPPER_ASM("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
// until the phase of this parity has ended; at once with parity 1 on a new mbarrier
__device__ inline void mbarrier_wait(uint64_t* bar, unsigned parity) {
    HOPPER_ASM(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
}

// this thread's ordinary writes to shared memory, before bulk copies and wgmma that read them
__device__ inline void fence_async_shared() { HOPPER_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// what this thread knows to be in global memory, before its bulk copies that add to it
__device__ inline void fence_async_global() { HOPPER_ASM("fence.proxy.async.global;" ::: "memory"); }

// id 1 to 15; threads: of all warps that sync or arrive
__device__ inline void named_barrier_sync(int id, int threads) {
    HOPPER_ASM("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
    HOPPER_ASM("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// four 8x8 matrices of 16-bit values, held as mma's accumulators are, to shared memory; lane l points at row l%8 of
// matrix l/8
__device__ inline void stmatrix_x4(void* row, const unsigned* r) {
    HOPPER_ASM("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Bulk tensor copies, by one thread: the box of a tensor_map at element (c0, c1, c2, c3), c0 innermost. In shared
// memory the box is rows of 128 bytes from an address aligned to 1024, the 16-byte chunk i of row r at chunk i XOR r %
// 8. A load's bytes (always those of the whole box) count on the mbarrier; a store is waited for in groups, until its
// shared memory may be written again.
__device__ inline void tma_load(void* smem, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2 = 0,
                                int c3 = 0) {
    HOPPER_ASM(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
        "[%2];" ::"r"(shared_address(smem)),
        "l"(map), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ inline void tma_store(const CUtensorMap* map, const void* smem, int c0, int c1, int c2 = 0, int c3 = 0) {
    HOPPER_ASM("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map),
               "r"(shared_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ inline void tma_store_commit() { HOPPER_ASM("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>  // until at most the last N groups of this thread still read
__device__ inline void tma_store_wait() {
    HOPPER_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>  // until all but the last N groups of this thread are written, too
__device__ inline void tma_store_wait_written() {
    HOPPER_ASM("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// The same without a map, of floats side by side: to = from, or to += from. Both aligned to 16 bytes, bytes a multiple.
__device__ inline void bulk_store(float* to, const float* from, int bytes) {
    HOPPER_ASM("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_add(float* to, const float* from, int bytes) {
    HOPPER_ASM("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

// wgmma: c (64,N) += a (64,16) b (16,N), bf16, by the 128 threads of a warpgroup. Warp w has rows 16w + lane/4 and 8
// further, columns 8j + 2(lane%4) and the next: c[4j + 2 (which row) + (which column)]; a in registers lies as the A
// operand of mma.m16n8k16. Each group of wgmma begins with wgmma_fence and ends with wgmma_commit; wgmma_wait<N> waits
// for all but the last N groups; wgmma_registers after it keeps the compiler from reading c before.
// A tile in shared memory is as the copies lay it. Its descriptor: K-major (row m or n, 64 k each; trans 0): stride
// bytes from 8 rows to the next 8 (1024), a step of 16 k adds 32 bytes. MN-major (row k, 64 m or n each; trans 1):
// stride from 8 rows to the next 8 (1024), leading from 64 columns to the next 64, a step of 16 k adds 2048 bytes.
// Bytes are added to a descriptor as (bytes >> 4).
__device__ inline uint64_t wgmma_descriptor(const void* smem, int leading_bytes, int stride_bytes) {
    return uint64_t((shared_address(smem) & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
           uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;  // 1: 128-byte swizzle
}
__device__ inline void wgmma_fence() { HOPPER_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { HOPPER_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wgmma_wait() {
    HOPPER_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void wgmma_registers(float* c) {
    #pragma unroll
    for (int i = 0; i < COUNT; i++) HOPPER_ASM("" : "+f"(c[i])::"memory");
}

// asm operands: "%0,...,%9" by tens, and eight accumulators
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define OUT8(i)                                                                                                 \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
        "+f"(c[i + 7])
#define REGISTERS_32 TEN() "," TEN(1) "," TEN(2) ",%30,%31"
#define REGISTERS_64 TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) ",%60,%61,%62,%63"
#define OUT_32 OUT8(0), OUT8(8), OUT8(16), OUT8(24)
#define OUT_64 OUT_32, OUT8(32), OUT8(40), OUT8(48), OUT8(56)
// i0, i1, ..: the numbers of the operands after the accumulators
#define WGMMA_SS(n, count, i0, i1, i2, i3, i4)                                                                \
    HOPPER_ASM("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n              \
               "k16.f32.bf16.bf16 {" REGISTERS_##count "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";}" \
               : OUT_##count                                                                                  \
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANS_A), "n"(TRANS_B))
#define WGMMA_RS(n, count, i0, i1, i2, i3, i4, i5, i6)                                                   \
    HOPPER_ASM("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0; wgmma.mma_async.sync.aligned.m64n" #n         \
               "k16.f32.bf16.bf16 {" REGISTERS_##count "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 \
                                                       ", p, 1, 1, %" #i6 ";}"                           \
               : OUT_##count                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANS_B))
// accumulate 0: c is written over
template <int N, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma_ss(float* c, uint64_t a, uint64_t b, int accumulate) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64) WGMMA_SS(64, 32, 32, 33, 34, 35, 36);
    if constexpr (N == 128) WGMMA_SS(128, 64, 64, 65, 66, 67, 68);
}
template <int N, int TRANS_B>
__device__ __forceinline__ void wgmma_rs(float* c, const unsigned* a, uint64_t b, int accumulate) {
    static_assert(N == 64 || N == 128);
    if constexpr (N == 64) WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 128) WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
}

// The warpgroup takes or gives back registers, R a thread from here on. The kernel needs __launch_bounds__(threads, 1);
// what it has to share out is 65536 / threads, rounded down to a multiple of 8, times the threads. Who asks for more
// waits for ever.
template <int R>
__device__ inline void registers_more() {
    HOPPER_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
__device__ inline void registers_less() {
    HOPPER_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}
#else
constexpr bool HOPPER_CODE = true;
#endif

// A wait for wgmma that follows this call stays behind the arithmetic that gives x. (Left alone, ptxas moves the wait
// up, above arithmetic that is to run under the products.) x is never negative, so the store never happens.
__device__ inline void keep_after(float x, volatile float* shared) {
    if (x < 0.0f) *shared = x;
}

// 16 columns of a warp's accumulators at a time, rounded: c (16,N) as the A operand of a product over N
template <int N>
__device__ inline void round_operand(unsigned (*a)[4], const float* c) {
    #pragma unroll
    for (int i = 0; i < N / 4; i++) a[i / 4][i % 4] = pack_bf16(c[2 * i], c[2 * i + 1]);
}
// 64 columns of such an operand to a box of a bulk store, 16 rows. The 8 rows of a matrix fall into 8 different sets of
// 4 banks.
__device__ inline void store_box(unsigned char* to, const unsigned (*a)[4]) {
    const int row = lane() % 16;  // where this lane's 16 bytes of an stmatrix go
    #pragma unroll
    for (int j = 0; j < 4; j++) stmatrix_x4(to + row * 128 + ((2 * j + lane() / 16) ^ row % 8) * 16, a[j]);
}

// The map of a bf16 tensor for the copies above, dims in elements from the innermost, strides in bytes of dims 1 to 3
// (multiples of 16), box in elements, its first 64. Reads outside give zero, writes outside are dropped. Kernels take
// it by value as `const __grid_constant__ CUtensorMap`. Throws where the driver refuses.
inline CUtensorMap tensor_map(const void* base, std::array<int64_t, 4> dims, std::array<int64_t, 3> strides,
                              std::array<int, 4> box) {
    static decltype(&cuTensorMapEncodeTiled) encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else  // which does not know it
        CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
        if (found != cudaDriverEntryPointSuccess)
            throw Error("device: the driver has no cuTensorMapEncodeTiled. Update it to one of CUDA 12 or later.");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    CUtensorMap map;
    const cuuint64_t size[4] = {cuuint64_t(dims[0]), cuuint64_t(dims[1]), cuuint64_t(dims[2]), cuuint64_t(dims[3])};
    const cuuint64_t stride[3] = {cuuint64_t(strides[0]), cuuint64_t(strides[1]), cuuint64_t(strides[2])};
    const cuuint32_t boxes[4] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2]), cuuint32_t(box[3])};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(base), size, stride, boxes,
                             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw Error(format("tensor_map: the driver refuses a map of %lld x %lld x %lld x %lld elements, status %d",
                           (long long)dims[0], (long long)dims[1], (long long)dims[2], (long long)dims[3], status));
    return map;
}
