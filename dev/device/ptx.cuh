// Instructions of every architecture from sm_80 on that C++ has no name for: tensor cores, matrices to and from shared
// memory, asynchronous copies, flags between blocks.
#pragma once
#include "base.cuh"

#ifdef __CUDACC__  // else the CPU stand-in emulates them
// c (16x8 float) += a (16x16 bf16) b (16x8 bf16)
__device__ inline void mma_m16n8k16(float* c, const unsigned* a, const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// four 8x8 matrices of 16-bit values; lane l points at row l%8 of matrix l/8 in shared memory, 16 bytes
__device__ inline void ldmatrix_x4(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row))));
}
// the same, each matrix transposed
__device__ inline void ldmatrix_x4_trans(unsigned* r, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(unsigned(__cvta_generic_to_shared(row))));
}
// BYTES (4 or 16) from global to shared memory, later; zeros if not valid
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from, bool valid) {
    const unsigned shared = unsigned(__cvta_generic_to_shared(to));
    const size_t global = __cvta_generic_to_global(from);
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                     "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
                     : "memory");
}
// what this thread copied since the last commit is a group; copy_wait returns when all but its newest N groups are here
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// the memory at `at` comes to L2
__device__ inline void prefetch(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
}
// 2^x to 2 ulp, x below 128; results below the smallest normal number are 0
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// a flag in global memory: what its writer (and whom it met at a barrier) wrote before, the reader sees after
__device__ inline int flag_read(const int* flag) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
    return value;
}
__device__ inline void flag_write(int* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}
__device__ inline void flag_pause() { __nanosleep(32); }
#endif

// two floats rounded to bf16, the first in the lower half
__device__ inline unsigned pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// two neighbours, in one store
__device__ inline void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
__device__ inline void store_pair(__nv_bfloat16* to, float x, float y) {
    *reinterpret_cast<unsigned*>(to) = pack_bf16(x, y);
}
