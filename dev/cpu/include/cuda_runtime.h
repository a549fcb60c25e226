// The part of the CUDA runtime that the trainer uses, for g++ and no GPU. Device memory is host memory, streams run at
// once (tests can put them out of step), kernels are functions. Geometries run them, chosen at compile time:
//   geometry_serial.h  one thread a block, warp size 1, threads share the blocks: fast, the default
//   geometry_exact.h   real blocks and warps, each CUDA thread a fiber, everything checked: -DEXACT_GEOMETRY
//   geometry_ptx.h     with -DUSE_PTX too: what nvcc made of the kernels instead, if the environment names it
// Sources pass through ../rewrite.sed first. Template arguments of a kernel are given at its launch, not deduced.
#pragma once
#include <errno.h>
#include <math.h>
#include <atomic>
#include <malloc.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define CUDA_CPU  // there is no GPU
#define CUDART_VERSION 13000
#define __CUDA_ARCH_LIST__ 800, 900  // as if built for these

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

// ---------------------------------------------------------------------------------------------------------------------
// Vector types

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __align__(8) float2 { float x, y; };
struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------------------------------
// Device functions. Those a kernel calls for every element are inline, without branches, so that gcc vectorises them.

using std::max;
using std::min;

inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
#ifdef EXACT_GEOMETRY
inline void cuda_global_read(const void* at, size_t bytes, const char* file, int line);
template <class T> T __ldcg(const T* p, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_global_read(p, sizeof(T), file, line);
    return *p;
}
#else
template <class T> T __ldcg(const T* p) { return *p; }
#endif
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> void __stwb(T* p, T value) { *p = value; }
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }  // not to L1
inline unsigned atomicInc(unsigned* p, unsigned most) {
    unsigned old = *p;
    while (!__atomic_compare_exchange_n(p, &old, old < most ? old + 1 : 0, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

inline float __frcp_rn(float x) { return 1.0f / x; }

// Of a NaN and a number, the number. (libm's, which gcc calls, do not vectorise, nor do branches.)
inline float cuda_cpu_fmaxf(float a, float b) { return ((b > a) | (a != a)) ? b : a; }
inline float cuda_cpu_fminf(float a, float b) { return ((b < a) | (a != a)) ? b : a; }

#ifdef EXACT_GEOMETRY
// A GPU's functions are off by units in the last place, at most by as many as the CUDA C++ Programming Guide says
// (Mathematical Functions; of ex2.approx the PTX ISA). So are these, in another way with each CUDA_CPU_SEED: a part of
// the error is the same for all arguments, the rest depends on the argument.

inline const uint64_t cuda_seed = [] {
    const char* seed = getenv("CUDA_CPU_SEED");
    return seed ? strtoull(seed, nullptr, 10) : 1;
}();

// 32 bits of the seed and of what they are for: splitmix64
inline uint32_t cuda_draw(uint64_t what) {
    what += (cuda_seed + 1) * 0x9E3779B97F4A7C15u;
    what = (what ^ what >> 30) * 0xBF58476D1CE4E5B9u;
    what = (what ^ what >> 27) * 0x94D049BB133111EBu;
    return uint32_t((what ^ what >> 31) >> 32);
}
inline float cuda_inexact(double exact, double ulps, uint64_t function, uint64_t argument) {
    const float y = float(exact);
    if (y == 0 || !std::isfinite(y)) return y;
    auto part = [](uint64_t what) { return cuda_draw(what) / 2147483647.5 - 1; };
    const double common = part(function), own = part(function << 48 ^ argument);
    const double most = ulps * (y - nextafterf(y, 0));
    const float off = float(y + most * (common + (1 - fabs(common)) * own));
    return fabs(double(off) - y) > fabs(most) ? nextafterf(off, y) : off;  // above, floats may be further apart
}
inline float rsqrtf(float x) { return cuda_inexact(1 / sqrt((double)x), 2, 1, __float_as_uint(x)); }
inline float __fdividef(float x, float y) {
    const float divisor = fabsf(y) > 0x1p126f ? INFINITY : y;
    return cuda_inexact((double)x / divisor, 2, 2, __float_as_uint(x) * 0x9E3779B1u + __float_as_uint(y));
}
inline float cuda_cpu_logf(float x) { return cuda_inexact(log((double)x), 1, 3, __float_as_uint(x)); }
inline float cuda_cpu_erff(float x) {
    const float e = cuda_inexact(erf((double)x), 2, 4, __float_as_uint(x));
    return fabsf(e) > 1 ? copysignf(1, e) : e;
}
inline float cuda_exponential(double exact, double ulps, uint64_t function, float x) {
    if (exact < 0x1p-126) return 0;
    return x == 0 ? 1 : cuda_inexact(exact, ulps, function, __float_as_uint(x));
}
inline float cuda_cpu_expf(float x) { return cuda_exponential(exp((double)x), 2 + floor(fabs(1.173 * x)), 5, x); }
inline float fast_exp2(float x) { return cuda_exponential(exp2((double)x), 2, 6, x); }
#define logf cuda_cpu_logf
#else
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }

// a b + c, rounded once, or nearly so where the processor has no such instruction: libm's fmaf takes 50 times as long.
inline float cuda_fmaf(float a, float b, float c) {
#if defined __FMA__ || defined __aarch64__
    return fmaf(a, b, c);
#else
    return float(double(a) * b + c);
#endif
}

// e^x to 1.2 ulp from -87.3 to 88.7: x = n ln2 + f, |f| <= ln2/2, e^f by a polynomial, n added to the exponent's bits.
// What must not be reordered is in cuda_fmaf: gcc forgets barriers and parentheses where it vectorises.
inline float cuda_cpu_exp_within(float x) {
    const float round = 0x1.8p23f;  // a float of this size has the integer n in its lowest bits
    const float t = cuda_fmaf(x, 1.44269504f, round), n = t - round;
    const float f = cuda_fmaf(n, 2.12194440e-4f, cuda_fmaf(n, -0.693359375f, x)), s = f * f;  // ln2 in two parts
    float p = cuda_fmaf(1.38145371e-3f, s, cuda_fmaf(8.36874638e-3f, f, 4.16683927e-2f));
    p = cuda_fmaf(p, s, cuda_fmaf(1.66665211e-1f, f, 0.5f));
    p = cuda_fmaf(p, s, f) + 1.0f;
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(t) << 23));
}
// of any x; results below the smallest normal number are 0
inline float cuda_cpu_expf(float x) {
    const float e = x < -87.3365448f ? 0.0f : cuda_cpu_exp_within(x);
    return x <= 88.7228391f ? e : x + INFINITY;  // NaN stays
}

// 2^x to 1 ulp for x below 128; from 2^-126 down it stays 2^-126. x = n + f, |f| <= 1/2, as in cuda_cpu_expf.
inline float fast_exp2(float x) {
    float y = x < -126.0f ? -126.0f : x;  // NaN stays
    float n = rintf(y), f = y - n;
    float p = 1.5345812e-4f;
    p = p * f + 1.3399932e-3f;
    p = p * f + 9.6184891e-3f;
    p = p * f + 5.5503286e-2f;
    p = p * f + 2.4022646e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return __uint_as_float(__float_as_uint(p) + ((unsigned)(int)n << 23));
}

// erf, absolute error below 2e-7: x P(x^2) up to 1, then 1 - e^Q(|x|), the polynomials fitted by minimax. The choice is
// one of bits: gcc would make a branch of it and not vectorise.
inline float cuda_cpu_erff(float x) {
    const float t = fabsf(x) < 4.0f ? fabsf(x) : 4.0f, s = t * t, s2 = s * s;
    float p = cuda_fmaf(cuda_fmaf(7.8891151e-5f, s, -8.0208400e-4f), s2, cuda_fmaf(5.1895352e-3f, s, -2.6854445e-2f));
    p = cuda_fmaf(p, s2, cuda_fmaf(1.1283600e-1f, s, -3.7612627e-1f));
    p = cuda_fmaf(p, s, 1.1283792f);
    float q = cuda_fmaf(1.3316268e-4f, s, cuda_fmaf(-2.4018248e-3f, t, 1.9578741e-2f));
    q = cuda_fmaf(q, s, cuda_fmaf(-9.8264091e-2f, t, -6.4382650e-1f));
    q = cuda_fmaf(q, s, cuda_fmaf(-1.1236224f, t, -1.2026743e-3f));
    const unsigned near = __float_as_uint(t * p), far = __float_as_uint(1.0f - cuda_cpu_exp_within(q));
    const unsigned mask = -unsigned(t < 1.0f), sign = __float_as_uint(x) & 0x80000000u;
    return x != x ? x : __uint_as_float((near & mask) | (far & ~mask) | sign);
}
#endif

#define erff cuda_cpu_erff
#define fmaxf cuda_cpu_fmaxf
#define fminf cuda_cpu_fminf
#define __expf cuda_cpu_expf  // macros: libm declares these names too
#define __logf logf
#define __powf powf
#define __sinf sinf
#define __cosf cosf

// ---------------------------------------------------------------------------------------------------------------------
// Errors

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureUnjoined = 904,
    cudaErrorStreamCaptureIsolation = 905,
    cudaErrorCapturedEvent = 907,
};

inline cudaError_t cuda_last_error = cudaSuccess;

inline cudaError_t cuda_fail(cudaError_t error) { return cuda_last_error = error; }
inline cudaError_t cudaPeekAtLastError() { return cuda_last_error; }
inline cudaError_t cudaGetLastError() {
    cudaError_t error = cuda_last_error;
    cuda_last_error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
        case cudaErrorUnsupportedPtxVersion: return "cudaErrorUnsupportedPtxVersion";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotReady: return "cudaErrorNotReady";
        case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
        case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
        case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    }
    return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorInvalidDeviceFunction: return "invalid device function";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    }
    return "unrecognized error code";
}

// ---------------------------------------------------------------------------------------------------------------------
// The trace, for tests. CUDA_CPU_TRACE=PREFIX: what the host issues and what then runs, a line each, in PREFIX.RANK:
//   issue STREAM WORK     kernel NAME, memcpy BYTES, memset BYTES, matmul ROWS COLUMNS INNER, graph, record EVENT,
//                         wait EVENT, allreduce|reducescatter|allgather BYTES SENT (the buffer; to other ranks)
//   capture STREAM WORK   in place of issue, for what goes into a graph
//   run STREAM WORK       when the work begins
// Streams and events are numbers from 1, in order of creation; the null stream is 0.

inline FILE* cuda_trace = [] {
    const char *prefix = getenv("CUDA_CPU_TRACE"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!prefix) return (FILE*)nullptr;
    std::string path = std::string(prefix) + "." + (rank ? rank : "0");
    FILE* file = fopen(path.c_str(), "w");
    if (!file) {
        fprintf(stderr, "cuda: %s: %s. CUDA_CPU_TRACE must be a path that can be written to.\n", path.c_str(),
                strerror(errno));
        exit(1);
    }
    return file;
}();

// The text of a line's WORK; empty without a trace, so that nothing is formatted for nobody.
template <class... A> std::string cuda_label(const char* format, A... args) {
    if (__builtin_expect(cuda_trace == nullptr, 1)) return {};
    char text[512];
    snprintf(text, sizeof text, format, args...);
    return text;
}
inline std::string cuda_label(const char* text) { return cuda_trace ? text : ""; }
inline void cuda_trace_line(const char* what, int stream, const std::string& work) {
    fprintf(cuda_trace, "%s %d %s\n", what, stream, work.c_str());
    fflush(cuda_trace);
}

// ---------------------------------------------------------------------------------------------------------------------
// Work of streams. By default it is done when the call returns. For tests of who waits for whom, CUDA_CPU_STREAMS makes
// streams queues, as far out of step as their waits allow:
//   late    the first stream works at once, the others only when somebody needs them: the host, the null stream, or a
//           wait of a stream that works at once
//   early   the first stream works only when it must, the others at once
// The first stream is one that is made while there is no other. Asynchronous copies read and write the host's memory
// when they run, as from page-locked memory. The null stream waits for all streams but the non-blocking ones.

enum CudaStreams { CUDA_STREAMS_IN_STEP, CUDA_STREAMS_LATE, CUDA_STREAMS_EARLY };
inline CudaStreams cuda_streams = [] {  // read when a stream is made; tests may set it
    const char* mode = getenv("CUDA_CPU_STREAMS");
    if (!mode || !*mode) return CUDA_STREAMS_IN_STEP;
    if (strcmp(mode, "late") == 0) return CUDA_STREAMS_LATE;
    if (strcmp(mode, "early") == 0) return CUDA_STREAMS_EARLY;
    fprintf(stderr, "cuda: CUDA_CPU_STREAMS is '%s'. It must be late or early, or not set.\n", mode);
    exit(1);
}();

struct CudaQueue {
    bool lazy = false;
    std::deque<std::function<void()>> work;
    uint64_t put = 0, done = 0;  // entries ever; of a queue that is not lazy none
};
struct CUstream_st : CudaQueue {
    int id;  // from 1, in order of creation
    bool non_blocking;
    uint64_t nodes = 0;  // in the graph that is being captured
    bool captured = false;
};
typedef CUstream_st* cudaStream_t;

inline std::vector<cudaStream_t> cuda_all_streams;
inline int cuda_detours = cuda_trace != nullptr;  // reasons not to do work at once: trace, capture, each lazy stream

// A graph's entry: work of a stream, or a wait until another stream is past an entry, counted from 1.
struct CudaNode {
    int stream;
    bool lazy;
    std::function<void()> work;
    int other = 0;
    uint64_t entry = 0;
};
struct CUgraph_st {
    int id;  // from 1
    cudaStream_t origin;
    std::vector<CudaNode> nodes;
};
typedef CUgraph_st* cudaGraph_t;
inline cudaGraph_t cuda_capture = nullptr;  // under way

template <class F> void cuda_put(CudaQueue& queue, const F& work) {
    if (!queue.lazy) return work();
    queue.work.push_back(work);
    queue.put++;
}

// Runs the queue until `entry` entries are done. An entry that waits for another queue runs that one; in circles it
// cannot go, as an entry waits for older ones only.
inline void cuda_run_until(CudaQueue& queue, uint64_t entry) {
    while (queue.done < entry && !queue.work.empty()) {
        std::function<void()> work = std::move(queue.work.front());
        queue.work.pop_front();
        work();
        queue.done++;
    }
}
inline CudaQueue* cuda_find_stream(int id) {  // null: gone, and all its work done
    for (cudaStream_t s : cuda_all_streams)
        if (s->id == id) return s;
    return nullptr;
}
inline void cuda_run_until(int stream, uint64_t entry) {
    if (CudaQueue* queue = cuda_find_stream(stream)) cuda_run_until(*queue, entry);
}
inline void cuda_drain(bool non_blocking_too) {
    for (cudaStream_t s : cuda_all_streams)
        if (non_blocking_too || !s->non_blocking) cuda_run_until(*s, s->put);
}

inline void cuda_detour(cudaStream_t stream, const std::string& label, std::function<void()> work) {
    const bool captured = stream && stream->captured;
    if (cuda_trace && !label.empty()) {
        const int id = stream ? stream->id : 0;
        cuda_trace_line(captured ? "capture" : "issue", id, label);
        work = [=] {
            cuda_trace_line("run", id, label);
            work();
        };
    }
    if (captured) {
        stream->nodes++;
        cuda_capture->nodes.push_back({stream->id, stream->lazy, work});
    } else if (stream) {
        cuda_put(*stream, work);
    } else {
        cuda_drain(false);
        work();
    }
}

// All work of streams passes here. It may run later: what it needs it holds by value.
template <class F> void cuda_enqueue(cudaStream_t stream, const std::string& label, F work) {
    if (__builtin_expect(cuda_detours == 0, 1)) work();
    else cuda_detour(stream, label, work);
}

// Its streams are as far out of step as outside.
inline void cuda_run_graph(const std::vector<CudaNode>& nodes) {
    std::map<int, CudaQueue> queues;
    for (const CudaNode& node : nodes) {
        CudaQueue &queue = queues[node.stream], &other = queues[node.other];
        queue.lazy = node.lazy;
        if (node.other) cuda_put(queue, [&other, entry = node.entry] { cuda_run_until(other, entry); });
        else cuda_put(queue, node.work);
    }
    for (auto& queue : queues) cuda_run_until(queue.second, queue.second.put);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches: the geometry runs the blocks, here are the limits that hold for any

constexpr size_t CUDA_SHARED_DEFAULT = 48 << 10;   // bytes a block may have without asking
// and after cudaFuncSetAttribute; CUDA_CPU_SHARED=bytes takes another device's
inline size_t cuda_shared_optin = [] {
    const char* text = getenv("CUDA_CPU_SHARED");
    return text ? strtoull(text, nullptr, 10) : 227 << 10;
}();

// A tensor map (cuda.h encodes it): where a box of the bulk tensor copies lies in memory.
constexpr int CUDA_TENSOR_MAP_MADE = 0x54414d50;
struct __align__(64) CUtensorMap_st {  // as CUDA calls it: kernels' names hold it
    char* base;
    uint64_t dims[4], strides[4];  // elements; bytes
    uint32_t box[4];
    int made;
};
typedef CUtensorMap_st CUtensorMap;

#include "threads.h"
#ifdef EXACT_GEOMETRY
#include "geometry_exact.h"
#include "geometry_ptx.h"
#else
#include "geometry_serial.h"
#endif

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline std::map<const void*, size_t> cuda_shared_limit;  // kernels that asked for more than the default

template <class T> cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || (size_t)bytes > cuda_shared_optin) return cuda_fail(cudaErrorInvalidValue);
    cuda_shared_limit[(const void*)kernel] = bytes;
    return cudaSuccess;
}

inline cudaError_t cuda_check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared) {
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024 || grid.x == 0 ||
        grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (shared <= CUDA_SHARED_DEFAULT) return cudaSuccess;
    auto limit = cuda_shared_limit.find(kernel);
    return limit != cuda_shared_limit.end() && shared <= limit->second ? cudaSuccess : cudaErrorInvalidValue;
}

// A kernel with its parameters' types, to which a launch converts its arguments, and a way to call it that inlines.
template <class F, class... P> struct CudaKernel {
    const char* name;
    void (*address)(P...);
    F call;
};
template <class F, class... P> CudaKernel<F, P...> cuda_kernel(const char* name, void (*address)(P...), F call) {
    return {name, address, call};
}
#define CUDA_KERNEL(...) \
    cuda_kernel(#__VA_ARGS__, __VA_ARGS__, [=](auto&... args) { __VA_ARGS__(args...); })

inline void cuda_add_map(std::vector<CUtensorMap>& maps, const CUtensorMap& map) { maps.push_back(map); }
template <class T> void cuda_add_map(std::vector<CUtensorMap>&, const T&) {}

template <class F, class... P>
auto cuda_launch(CudaKernel<F, P...> kernel, dim3 grid, dim3 block, size_t shared = 0,
                 cudaStream_t stream = 0) {
    return [=](P... args) {
        cudaError_t error = cuda_check_launch((const void*)kernel.address, grid, block, shared);
        if (error != cudaSuccess) {
            cuda_fail(error);
            return;
        }
        cuda_enqueue(stream, cuda_label("kernel %s", kernel.name), [=]() mutable {
#ifdef USE_PTX
            if (cuda_ptx && cuda_ptx_run((const void*)kernel.address, kernel.name, grid, block, shared,
                                         {{&args, sizeof args}...}))
                return;
#endif
            std::vector<CUtensorMap> maps;
            (cuda_add_map(maps, args), ...);
            cuda_run_blocks(kernel.name, grid, block, shared, maps, [&] { kernel.call(args...); });
        });
    };
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// The number after `key` in a file of the kernel's, or 0; the file's first number when key is "".
inline size_t cuda_proc_number(const std::string& path, const char* key) {
    size_t number = 0;
    char line[512];
    FILE* file = fopen(path.c_str(), "r");
    if (file == nullptr) return 0;
    while (fgets(line, sizeof line, file) && !(strncmp(line, key, strlen(key)) == 0 &&
                                               sscanf(line + strlen(key), "%zu", &number) == 1)) {}
    fclose(file);
    return number;
}

inline size_t cuda_allocated = 0;  // bytes of cudaMalloc and cudaMallocHost now held

// Ranks on this machine, which share its memory and cores. Slurm names the first node's first: 4(x2),3.
inline size_t cuda_local_ranks() {
    for (const char* name : {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_TASKS_PER_NODE"})
        if (const char* value = getenv(name)) return std::max(1, atoi(value));
    return 1;
}

// Bytes that can still be had: this rank's share of what the machine and the cgroup leave, less what has been allocated
// here and not touched yet; at most what the address space limit (ulimit -v) leaves.
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    size_t free = cuda_proc_number("/proc/meminfo", "MemAvailable:") << 10;
    size_t total = cuda_proc_number("/proc/meminfo", "MemTotal:") << 10;
    auto limit = [&](size_t most, size_t used) {
        total = std::min(total, most);
        free = std::min(free, most > used ? most - used : 0);
    };
    std::string cgroup = "/sys/fs/cgroup";
    char line[512];
    if (FILE* file = fopen("/proc/self/cgroup", "r")) {
        while (fgets(line, sizeof line, file))
            if (strncmp(line, "0::/", 4) == 0 && line[4] != '\n') cgroup.append(line + 3, strcspn(line, "\n") - 3);
        fclose(file);
    }
    if (size_t most = cuda_proc_number(cgroup + "/memory.max", "")) {  // "max" is no number: no limit
        size_t used = cuda_proc_number(cgroup + "/memory.current", "");
        limit(most, used - std::min(used, cuda_proc_number(cgroup + "/memory.stat", "inactive_file ")));
    }
    total /= cuda_local_ranks();
    free /= cuda_local_ranks();
    size_t untouched = cuda_allocated - std::min(cuda_allocated, cuda_proc_number("/proc/self/status", "VmRSS:") << 10);
    free -= std::min(free, untouched);
    rlimit space;
    if (getrlimit(RLIMIT_AS, &space) == 0 && space.rlim_cur != RLIM_INFINITY)
        limit(space.rlim_cur, cuda_proc_number("/proc/self/status", "VmSize:") << 10);
    *free_bytes = free;
    *total_bytes = total;
    return cudaSuccess;
}

template <class T> cudaError_t cudaMalloc(T** pointer, size_t bytes) {
    size_t free, total;
    void* memory = nullptr;
    cudaMemGetInfo(&free, &total);
    const size_t huge = size_t(2) << 20;  // bytes of a large page; the system may have none
    if (bytes > free || (bytes > 0 && posix_memalign(&memory, bytes < 2 * huge ? 256 : huge, bytes) != 0))
        return cuda_fail(cudaErrorMemoryAllocation);
    if (bytes >= 2 * huge) madvise(memory, bytes, MADV_HUGEPAGE);
    if (memory) cuda_allocated += malloc_usable_size(memory);
#ifdef EXACT_GEOMETRY
    if (memory) cuda_ptx_allocated(memory, bytes);
#endif
    *pointer = (T*)memory;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
    cuda_drain(true);  // as CUDA's, which waits for the device
    if (pointer) cuda_allocated -= malloc_usable_size(pointer);
#ifdef EXACT_GEOMETRY
    cuda_ptx_freed(pointer);
#endif
    free(pointer);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocHost(T** pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
inline cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }

enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
constexpr int64_t CUDA_COPY = 1 << 20;  // bytes that a thread copies at a time
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream = 0) {
    if (bytes > 0)
        cuda_enqueue(stream, cuda_label("memcpy %zu", bytes), [=] {
            cuda_share_range(bytes, CUDA_COPY, [=](int64_t i, int64_t end) {
                memcpy((char*)to + i, (const char*)from + i, end - i);
            });
        });
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = 0) {
    if (bytes > 0)
        cuda_enqueue(stream, cuda_label("memset %zu", bytes), [=] {
            cuda_share_range(bytes, CUDA_COPY, [=](int64_t i, int64_t end) { memset((char*)to + i, value, end - i); });
        });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes); }

// ---------------------------------------------------------------------------------------------------------------------
// Streams, graphs and events

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };

inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    static int created = 0;
    const bool first = cuda_all_streams.empty();
    *stream = new CUstream_st;
    (*stream)->id = ++created;
    (*stream)->non_blocking = flags & cudaStreamNonBlocking;
    (*stream)->lazy = cuda_streams != CUDA_STREAMS_IN_STEP && first == (cuda_streams == CUDA_STREAMS_EARLY);
    cuda_detours += (*stream)->lazy;
    cuda_all_streams.push_back(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cuda_drain(true), cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream && stream->captured) return cuda_fail(cudaErrorStreamCaptureUnsupported);
    if (stream) cuda_run_until(*stream, stream->put);
    else cuda_drain(false);
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream == nullptr) return cuda_fail(cudaErrorInvalidResourceHandle);
    cuda_run_until(*stream, stream->put);
    cuda_all_streams.erase(std::find(cuda_all_streams.begin(), cuda_all_streams.end(), stream));
    cuda_detours -= stream->lazy;
    return delete stream, cudaSuccess;
}
// Each question moves the stream on by an entry, so that asking ends.
inline cudaError_t cuda_ask(CudaQueue* queue, uint64_t entry) {
    if (!queue || queue->done >= entry) return cudaSuccess;
    cuda_run_until(*queue, queue->done + 1);
    return cuda_fail(cudaErrorNotReady);
}
inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream ? cuda_ask(stream, stream->put) : cudaStreamSynchronize(stream);
}

// One capture at a time: a stream's work, and that of streams which wait for its events, is written down, not done.
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
typedef struct CUgraphExec_st { std::shared_ptr<std::vector<CudaNode>> nodes; }* cudaGraphExec_t;

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    static int captures = 0;
    if (stream == nullptr || cuda_capture) return cuda_fail(cudaErrorStreamCaptureUnsupported);
    cuda_capture = new CUgraph_st{++captures, stream, {}};
    stream->captured = true;
    cuda_detours++;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    if (!cuda_capture || stream != cuda_capture->origin) return cuda_fail(cudaErrorInvalidValue);
    // backwards: how many of each stream's entries the origin has waited for
    std::map<int, uint64_t> left, waited;
    for (cudaStream_t s : cuda_all_streams) left[s->id] = s->nodes;
    waited[stream->id] = stream->nodes;
    for (auto node = cuda_capture->nodes.rbegin(); node != cuda_capture->nodes.rend(); node++)
        if (left[node->stream]-- <= waited[node->stream] && node->other)
            waited[node->other] = std::max(waited[node->other], node->entry);
    bool joined = true;
    for (cudaStream_t s : cuda_all_streams) {
        if (s->captured) joined = joined && waited[s->id] == s->nodes;
        s->captured = false, s->nodes = 0;
    }
    *graph = cuda_capture;
    cuda_capture = nullptr;
    cuda_detours--;
    if (joined) return cudaSuccess;
    delete *graph;
    *graph = nullptr;
    return cuda_fail(cudaErrorStreamCaptureUnjoined);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long = 0) {
    return *exec = new CUgraphExec_st{std::make_shared<std::vector<CudaNode>>(graph->nodes)}, cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    cuda_enqueue(stream, cuda_label("graph"), [nodes = exec->nodes] { cuda_run_graph(*nodes); });
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// A place in a stream, as last recorded; the time is shared with the stream's entry.
struct CUevent_st {
    int id;  // from 1, in order of creation
    int stream = 0;
    uint64_t entry = 0;
    int capture = 0;  // recorded while that was captured, 0: not so
    std::shared_ptr<std::chrono::steady_clock::time_point> time;
};
typedef CUevent_st* cudaEvent_t;

inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
    static int created = 0;
    *event = new CUevent_st;
    (*event)->id = ++created;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }

inline std::chrono::seconds cuda_late{0};  // that work pretended to have taken, as events see it

inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0) {
    const bool captured = stream && stream->captured;
    event->capture = captured ? cuda_capture->id : 0;
    event->stream = stream ? stream->id : 0;
    event->time = std::make_shared<std::chrono::steady_clock::time_point>();
    cuda_enqueue(stream, cuda_label("record %d", event->id),
                 [time = event->time] { *time = std::chrono::steady_clock::now() + cuda_late; });
    event->entry = captured ? stream->nodes : stream ? stream->put : 0;
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    if (!event->time) return cudaSuccess;  // never recorded
    if (stream && cuda_capture && event->capture == cuda_capture->id) {
        stream->captured = true;
        stream->nodes++;
        cuda_capture->nodes.push_back({stream->id, stream->lazy, {}, event->stream, event->entry});
        if (cuda_trace) cuda_trace_line("capture", stream->id, cuda_label("wait %d", event->id));
        return cudaSuccess;
    }
    if (event->capture) return cuda_fail(cudaErrorCapturedEvent);
    if (stream && stream->captured) return cuda_fail(cudaErrorStreamCaptureIsolation);
    cuda_enqueue(stream, cuda_label("wait %d", event->id),
                 [other = event->stream, entry = event->entry] { cuda_run_until(other, entry); });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (event->capture) return cuda_fail(cudaErrorCapturedEvent);
    return cuda_run_until(event->stream, event->entry), cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->capture) return cuda_fail(cudaErrorCapturedEvent);
    return cuda_ask(cuda_find_stream(event->stream), event->entry);
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    for (cudaEvent_t event : {start, end}) {
        if (event->capture || !event->time) return cuda_fail(cudaErrorInvalidResourceHandle);
        const CudaQueue* queue = cuda_find_stream(event->stream);
        if (queue && queue->done < event->entry) return cuda_fail(cudaErrorNotReady);
    }
    *ms = std::chrono::duration<float, std::milli>(*end->time - *start->time).count();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// The device: one, the CPU. For tests of what can be amiss with another, CUDA_CPU_DEVICE: none; driver=11040, its
// version; sm=75, a capability for which this build has no code.

struct CudaCpuDevice {
    int count = 1, driver = CUDART_VERSION, sm = 0;
    bool image = true;  // there is code for it
};
inline CudaCpuDevice cuda_cpu_device = [] {
    CudaCpuDevice device;
    const char* text = getenv("CUDA_CPU_DEVICE");
    if (!text) return device;
    if (strcmp(text, "none") == 0) device.count = 0;
    else if (sscanf(text, "sm=%d", &device.sm) == 1) device.image = false;
    else if (sscanf(text, "driver=%d", &device.driver) != 1) {
        fprintf(stderr, "cuda: CUDA_CPU_DEVICE is '%s'. It must be none, driver=N or sm=N.\n", text);
        exit(1);
    }
    return device;
}();
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock;
};
// these two do not fail after an illegal access either
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = cuda_cpu_device.driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = cuda_cpu_device.count;
    if (cuda_cpu_device.driver < CUDART_VERSION) return cuda_fail(cudaErrorInsufficientDriver);
    return *count ? cudaSuccess : cuda_fail(cudaErrorNoDevice);
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

// Ranks that are bound to no cores share them out: each with a thread a core they wait for each other.
inline cudaError_t cudaSetDevice(int device) {
    const long share = sysconf(_SC_NPROCESSORS_ONLN) / long(cuda_local_ranks());
    if (!getenv("OMP_NUM_THREADS")) cuda_threads.threads = std::max(1, std::min(cuda_threads.threads, int(share)));
    return device == 0 ? cudaSuccess : cuda_fail(cudaErrorInvalidDevice);
}

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int device) {
    if (device != 0) return cuda_fail(cudaErrorInvalidDevice);
    size_t free;
    const int sm = cuda_cpu_device.sm;
    *prop = {"CPU", 0, CUDA_SHARED_DEFAULT, cuda_shared_optin, sm / 10, sm % 10, 0, WARP_SIZE, 1024};
    prop->multiProcessorCount = 16;  // any machine's, so that grids, and with them results, are the same on all
    cudaMemGetInfo(&free, &prop->totalGlobalMem);
    char line[512];
    if (FILE* file = fopen("/proc/cpuinfo", "r")) {
        while (fgets(line, sizeof line, file) && sscanf(line, "model name : %255[^\n]", prop->name) != 1) {}
        fclose(file);
    }
    return cudaSuccess;
}

struct cudaFuncAttributes {
    int ptxVersion, binaryVersion;
};
template <class T> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
    if (!cuda_cpu_device.image) return cuda_fail(cudaErrorNoKernelImageForDevice);
    *attributes = {cuda_cpu_device.sm, cuda_cpu_device.sm};
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults, for tests of who looks at what a call returns. CUDA_CPU_FAIL=N: call number N of this process, of CUDA's,
// cuBLASLt's or NCCL's functions, does nothing but fail, and so do all after it, as on a GPU after a kernel's illegal
// access; N,once: it alone. CUDA_CPU_FAIL_RANK=R: only of rank R. Must stand behind the functions themselves.

struct CudaFault {
    uint64_t call = 0;
    bool once = false;
};
inline CudaFault cuda_cpu_fault = [] {
    CudaFault fault;
    const char *text = getenv("CUDA_CPU_FAIL"), *only = getenv("CUDA_CPU_FAIL_RANK");
    const char* rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!text || (only && atoi(only) != (rank ? atoi(rank) : 0))) return fault;
    unsigned long long call = 0;
    char once[6] = "";
    const int n = sscanf(text, "%llu,%5s", &call, once);
    if (n < 1 || call == 0 || (n == 2 && strcmp(once, "once") != 0)) {
        fprintf(stderr, "cuda: CUDA_CPU_FAIL is '%s'. It must be N or N,once.\n", text);
        exit(1);
    }
    fault.call = call, fault.once = n == 2;
    return fault;
}();
inline std::atomic<uint64_t> cuda_cpu_calls{0};
inline bool cuda_fault_due() {
    if (__builtin_expect(cuda_cpu_fault.call == 0, 1)) return false;
    const uint64_t call = ++cuda_cpu_calls;
    return cuda_cpu_fault.once ? call == cuda_cpu_fault.call : call >= cuda_cpu_fault.call;
}

#define CUDA_MAY_FAIL(call) (cuda_fault_due() ? cuda_fail(cudaErrorIllegalAddress) : (call))
#define cudaGetLastError(...) CUDA_MAY_FAIL(cudaGetLastError(__VA_ARGS__))
#define cudaFuncSetAttribute(...) CUDA_MAY_FAIL(cudaFuncSetAttribute(__VA_ARGS__))
#define cudaFuncGetAttributes(...) CUDA_MAY_FAIL(cudaFuncGetAttributes(__VA_ARGS__))
#define cudaMemGetInfo(...) CUDA_MAY_FAIL(cudaMemGetInfo(__VA_ARGS__))
#define cudaMalloc(...) CUDA_MAY_FAIL(cudaMalloc(__VA_ARGS__))
#define cudaFree(...) CUDA_MAY_FAIL(cudaFree(__VA_ARGS__))
#define cudaMallocHost(...) CUDA_MAY_FAIL(cudaMallocHost(__VA_ARGS__))
#define cudaFreeHost(...) CUDA_MAY_FAIL(cudaFreeHost(__VA_ARGS__))
#define cudaMemcpyAsync(...) CUDA_MAY_FAIL(cudaMemcpyAsync(__VA_ARGS__))
#define cudaMemcpy(...) CUDA_MAY_FAIL(cudaMemcpy(__VA_ARGS__))
#define cudaMemsetAsync(...) CUDA_MAY_FAIL(cudaMemsetAsync(__VA_ARGS__))
#define cudaMemset(...) CUDA_MAY_FAIL(cudaMemset(__VA_ARGS__))
#define cudaStreamCreateWithPriority(...) CUDA_MAY_FAIL(cudaStreamCreateWithPriority(__VA_ARGS__))
#define cudaStreamCreateWithFlags(...) CUDA_MAY_FAIL(cudaStreamCreateWithFlags(__VA_ARGS__))
#define cudaStreamCreate(...) CUDA_MAY_FAIL(cudaStreamCreate(__VA_ARGS__))
#define cudaDeviceGetStreamPriorityRange(...) CUDA_MAY_FAIL(cudaDeviceGetStreamPriorityRange(__VA_ARGS__))
#define cudaDeviceSynchronize(...) CUDA_MAY_FAIL(cudaDeviceSynchronize(__VA_ARGS__))
#define cudaStreamSynchronize(...) CUDA_MAY_FAIL(cudaStreamSynchronize(__VA_ARGS__))
#define cudaStreamDestroy(...) CUDA_MAY_FAIL(cudaStreamDestroy(__VA_ARGS__))
#define cudaStreamQuery(...) CUDA_MAY_FAIL(cudaStreamQuery(__VA_ARGS__))
#define cudaStreamBeginCapture(...) CUDA_MAY_FAIL(cudaStreamBeginCapture(__VA_ARGS__))
#define cudaStreamEndCapture(...) CUDA_MAY_FAIL(cudaStreamEndCapture(__VA_ARGS__))
#define cudaGraphInstantiate(...) CUDA_MAY_FAIL(cudaGraphInstantiate(__VA_ARGS__))
#define cudaGraphLaunch(...) CUDA_MAY_FAIL(cudaGraphLaunch(__VA_ARGS__))
#define cudaGraphDestroy(...) CUDA_MAY_FAIL(cudaGraphDestroy(__VA_ARGS__))
#define cudaGraphExecDestroy(...) CUDA_MAY_FAIL(cudaGraphExecDestroy(__VA_ARGS__))
#define cudaEventCreate(...) CUDA_MAY_FAIL(cudaEventCreate(__VA_ARGS__))
#define cudaEventCreateWithFlags(...) CUDA_MAY_FAIL(cudaEventCreateWithFlags(__VA_ARGS__))
#define cudaEventDestroy(...) CUDA_MAY_FAIL(cudaEventDestroy(__VA_ARGS__))
#define cudaEventRecord(...) CUDA_MAY_FAIL(cudaEventRecord(__VA_ARGS__))
#define cudaStreamWaitEvent(...) CUDA_MAY_FAIL(cudaStreamWaitEvent(__VA_ARGS__))
#define cudaEventSynchronize(...) CUDA_MAY_FAIL(cudaEventSynchronize(__VA_ARGS__))
#define cudaEventQuery(...) CUDA_MAY_FAIL(cudaEventQuery(__VA_ARGS__))
#define cudaEventElapsedTime(...) CUDA_MAY_FAIL(cudaEventElapsedTime(__VA_ARGS__))
#define cudaGetDeviceCount(...) CUDA_MAY_FAIL(cudaGetDeviceCount(__VA_ARGS__))
#define cudaGetDevice(...) CUDA_MAY_FAIL(cudaGetDevice(__VA_ARGS__))
#define cudaSetDevice(...) CUDA_MAY_FAIL(cudaSetDevice(__VA_ARGS__))
#define cudaGetDeviceProperties(...) CUDA_MAY_FAIL(cudaGetDeviceProperties(__VA_ARGS__))
