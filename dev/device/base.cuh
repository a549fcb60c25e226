// What every kernel stands on: the precision, checked CUDA calls, the device that launches go to, sums over a warp and
// a block, flat buffers. Kernels are written for any block and warp size: loops stride by blockDim.x or WARP_SIZE,
// reductions loop over halves. The serial CPU geometry is a block of one thread in a warp of one, and all of this folds
// away.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../run/error.h"

// Precision, chosen at build: weights and activations are floatX; master weights are float, gradients and moments too
// unless Storage halves them.
#ifdef PRECISION_BF16
typedef __nv_bfloat16 floatX;
constexpr const char *PRECISION = "bf16", *DTYPE = "BF16";  // for people; in safetensors files
#else
typedef float floatX;
constexpr const char *PRECISION = "fp32", *DTYPE = "F32";
#endif
constexpr bool BF16 = sizeof(floatX) == 2;

// Asserts that a CUDA call went well; names the call, the file and the line.
inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status != cudaSuccess) throw Error(format("%s:%d: %s: %s", file, line, call, cudaGetErrorString(status)));
}
#define CHECK(call) check_cuda(call, #call, __FILE__, __LINE__)

// Where kernels are launched: what launchers must know of a device, and a stream on it, the default one until create()
// makes the model's.
struct Gpu {
    int sms = 0;          // multiprocessors
    size_t shared = 0;    // bytes of shared memory that a block may have
    bool hopper = false;  // it has Hopper's instructions, and so has this build
    cudaStream_t stream = nullptr;
};

#ifndef WARP_SIZE
#define WARP_SIZE 32
#endif
constexpr bool SERIAL = WARP_SIZE == 1;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % WARP_SIZE; }
__device__ inline int warp() { return threadIdx.x / WARP_SIZE; }
__device__ inline int num_warps() { return blockDim.x / WARP_SIZE; }

template <typename F>
__device__ inline F warp_sum(F v) {
    for (int m = WARP_SIZE / 2; m > 0; m /= 2) v += __shfl_xor_sync(ALL_LANES, v, m);
    return v;
}
__device__ inline float warp_max(float v) {
    for (int m = WARP_SIZE / 2; m > 0; m /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, m));
    return v;
}

// The block's sums or maximum, to all its threads. Every thread must call it; blocks of up to 32 warps.
template <int K, typename F>
__device__ inline void block_sums(F (&v)[K]) {
    __shared__ F part[32 * K];
    #pragma unroll
    for (F& x : v) x = warp_sum(x);
    if (WARP_SIZE == 1) return;
    __syncthreads();  // the last call's readers are done
    #pragma unroll
    for (int k = 0; k < K; k++)
        if (lane() == 0) part[k * 32 + warp()] = v[k];
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < K; k++) v[k] = warp_sum(lane() < num_warps() ? part[k * 32 + lane()] : F(0));
}
template <typename F>
__device__ inline F block_sum(F v) {
    F sums[1] = {v};
    block_sums(sums);
    return sums[0];
}
__device__ inline float block_max(float v) {
    __shared__ float part[32];
    v = warp_max(v);
    if (WARP_SIZE == 1) return v;
    __syncthreads();
    if (lane() == 0) part[warp()] = v;
    __syncthreads();
    return warp_max(lane() < num_warps() ? part[lane()] : -INFINITY);
}

// Where gradients and moments lie, in float or in bf16 as the run chose: a flat buffer or a piece of one.
struct Flat {
    void* p = nullptr;
    bool half = false;
    Flat() = default;
    Flat(float* p) : p(p) {}
    Flat(__nv_bfloat16* p) : p(p), half(true) {}
    size_t width() const { return half ? 2 : 4; }
    const char* dtype() const { return half ? "BF16" : "F32"; }
    const char* name() const { return half ? "bf16" : "fp32"; }
    Flat at(size_t element) const {  // null stays null
        char* there = p ? static_cast<char*>(p) + element * width() : nullptr;
        return half ? Flat(reinterpret_cast<__nv_bfloat16*>(there)) : Flat(reinterpret_cast<float*>(there));
    }
    // calls f with the pointer of its type
    template <typename F>
    void visit(F f) const {
        half ? f(static_cast<__nv_bfloat16*>(p)) : f(static_cast<float*>(p));
    }
};

constexpr int FOUR = WARP_SIZE == 1 ? 16 : 4;  // neighbours a thread loads at once: 16 bytes of floats (serial: 64)
template <typename F>
struct alignas(FOUR * sizeof(F)) Four {
    F v[FOUR];
};
template <typename F>
__device__ inline Four<F>& four(F* p, size_t i) {
    return *reinterpret_cast<Four<F>*>(p + i);
}
template <typename F>
__device__ inline const Four<F>& four(const F* p, size_t i) {
    return *reinterpret_cast<const Four<F>*>(p + i);
}

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Threads of a block that strides over C elements: whole warps, at most 512.
inline int row_threads(int C) { return std::min(512, (C + 127) / 128 * 32); }
