// Tests of the stand-in itself, in both geometries: make build/test_standin_serial build/test_standin_exact, from the
// repository's root; they also pass under -fsanitize=address,undefined.
// Exit code 1 when a test fails. An argument runs one deliberate mistake (see mistake()).
#include "dev/cpu/expect.h"
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cublasLt.h>
#include <sys/time.h>
#include <functional>
#include <random>
#include <vector>

#ifndef WARP_SIZE
#define WARP_SIZE 32
#endif

static const char* program;

static void test(const char* name, std::function<void()> body) {
    why.clear();
    body();
    cudaError_t error = cudaGetLastError();
    EXPECT(error == cudaSuccess, "left a CUDA error: %s", cudaGetErrorString(error));
    if (why.empty()) printf("ok %s\n", name);
    else printf("FAIL %s: %s\n", name, why.c_str());
    (why.empty() ? passed : failed)++;
}

template <class T> struct Device {  // device array, from values or of a size
    T* data;
    size_t size;
    explicit Device(size_t n) : size(n) {
        if (cudaMalloc(&data, n * sizeof(T)) != cudaSuccess) abort();
    }
    Device(const std::vector<T>& v) : Device(v.size()) {
        cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice);
    }
    Device(const Device&) = delete;
    ~Device() { cudaFree(data); }
    operator T*() { return data; }
    std::vector<T> host() const { return {data, data + size}; }
};

static std::vector<float> random_floats(size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> v(n);
    for (float& x : v) x = normal(generator);
    return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

// out[i] = N in[i]; a block does `chunk` elements
template <typename T, int N>
__global__ void scale_kernel(T* out, const T* in, size_t n, int chunk, const float* absent) {
    size_t end = min(n, (size_t)(blockIdx.x + 1) * chunk);
    for (size_t i = (size_t)blockIdx.x * chunk + threadIdx.x; i < end; i += blockDim.x)
        out[i] = absent == nullptr ? in[i] * N : -1;
}

static void check_scaled(Device<float>& out, int n, int factor, int line) {
    for (int i = 0; i < n; i++)
        EXPECT(out[i] == factor * (float)i, "line %d: element %d is %g", line, i, out[i]);
    cudaMemset(out, 0, n * sizeof(float));
}

static void test_launch_forms() {
    std::vector<float> values(1000);
    for (int i = 0; i < 1000; i++) values[i] = i;
    Device<float> in(values), out(1000);
    cudaStream_t stream = nullptr;
    cudaStreamCreate(&stream);
    int n = 1000;
    scale_kernel<float, 2><<<10, 64>>>(out, in, n, 100, nullptr);
    check_scaled(out, n, 2, __LINE__);
    scale_kernel<float, 3> <<<dim3(10), dim3(64, 1), 256>>> (out, in, n, 100, nullptr);
    check_scaled(out, n, 3, __LINE__);
    const int before = __LINE__;
    scale_kernel<float, 2 + 2><<<(n + 99) / 100,
                             64, 0,  // a comment
                             stream>>>(
        out, in, n, 100, nullptr);
    EXPECT(__LINE__ == before + 5, "line numbers moved to %d", __LINE__);
    check_scaled(out, n, 4, __LINE__);
    scale_kernel<float, 2><<<5, 64>>>(out, in, 500, 100, nullptr); scale_kernel<float, 2><<<5, 64, 0, stream>>>(
        out + 500, in + 500, 500, 100, nullptr);
    check_scaled(out, n, 2, __LINE__);
    auto kernel = scale_kernel<float, 5>;
    kernel<<<10, 64>>>(out, in, n, 100, nullptr);
    check_scaled(out, n, 5, __LINE__);
    cudaStreamDestroy(stream);
}

__global__ void whoami_kernel(int* visits, uint3* size) {
    size_t block = ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    size_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    visits[block * blockDim.x * blockDim.y * blockDim.z + thread]++;
    *size = {blockDim.x, blockDim.y, blockDim.z};
}

static void test_grid_3d() {
    int threads = WARP_SIZE == 1 ? 1 : 4 * 3 * 2;
    Device<int> visits(std::vector<int>(5 * 6 * 7 * threads + 1, 0));
    Device<uint3> size(1);
    whoami_kernel<<<dim3(5, 6, 7), dim3(4, 3, 2)>>>(visits, size);
    for (int i = 0; i < 5 * 6 * 7 * threads; i++) EXPECT(visits[i] == 1, "thread %d ran %d times", i, visits[i]);
    EXPECT((int)(size[0].x * size[0].y * size[0].z) == threads, "block of %u threads", size[0].x);
}

__global__ void nothing_kernel() {}

static void test_launch_limits() {
    auto expect = [](cudaError_t want, int line) {
        EXPECT(cudaPeekAtLastError() == want, "line %d: %s", line, cudaGetErrorName(cudaPeekAtLastError()));
        cudaGetLastError();
        EXPECT(cudaGetLastError() == cudaSuccess, "cudaGetLastError does not clear");
    };
    nothing_kernel<<<1, 1024>>>();
    expect(cudaSuccess, __LINE__);
    nothing_kernel<<<0, 32>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<1, 0>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<1, 1025>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<1, dim3(32, 33)>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<1, dim3(1, 1, 65)>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<dim3(1, 65536), 32>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<dim3(1, 1, 65536), 32>>>();
    expect(cudaErrorInvalidConfiguration, __LINE__);
    nothing_kernel<<<1, 32, 50000>>>();
    expect(cudaErrorInvalidValue, __LINE__);
    cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 50000);
    nothing_kernel<<<1, 32, 50000>>>();
    expect(cudaSuccess, __LINE__);
    nothing_kernel<<<1, 32, 50001>>>();
    expect(cudaErrorInvalidValue, __LINE__);
    cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1);
    expect(cudaErrorInvalidValue, __LINE__);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory and reductions

// out[row] = sum of row; out[rows + row] the same through dynamic shared memory. Correct: the seed changes nothing.
template <int SLOTS> __global__ void row_sum_kernel(double* out, const float* in, int C) {
    __shared__ double warps[SLOTS];
    extern __shared__ __align__(16) float row[];
    const float* x = in + (size_t)blockIdx.x * C;
    double sum = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        sum += x[c];
        row[c] = x[c];
    }
    for (int m = WARP_SIZE / 2; m > 0; m /= 2) sum += __shfl_xor_sync(0xffffffff, sum, m);
    if (threadIdx.x % WARP_SIZE == 0) warps[threadIdx.x / WARP_SIZE] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0, again = 0;
        for (int w = 0; w < (int)(blockDim.x + WARP_SIZE - 1) / WARP_SIZE; w++) total += warps[w];
        for (int c = 0; c < C; c++) again += row[c];
        out[blockIdx.x] = total;
        out[gridDim.x + blockIdx.x] = again;
    }
}

static std::vector<double> row_sums(int R, int C) {
    Device<float> in(random_floats((size_t)R * C, 1));
    Device<double> out(2 * R);
    row_sum_kernel<4><<<R, 128, C * sizeof(float)>>>(out, in, C);
    return out.host();
}

static void test_reduction() {
    int R = 37, C = 333;
    auto in = random_floats((size_t)R * C, 1);
    auto out = row_sums(R, C);
    for (int r = 0; r < R; r++) {
        double want = 0;
        for (int c = 0; c < C; c++) want += in[r * C + c];
        EXPECT(fabs(out[r] - want) < 1e-12, "row %d: %.17g, want %.17g", r, out[r], want);
        EXPECT(fabs(out[R + r] - want) < 1e-12, "row %d, dynamic: %.17g, want %.17g", r, out[R + r], want);
    }
}

__global__ void transpose_kernel(float* out, const float* in) {  // (32,32)
    __shared__ float tile[32][33], other[2], one;
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) tile[i / 32][i % 32] = in[i];
    if (threadIdx.x == 0) other[0] = 1, other[1] = 2, one = 1;
    __syncthreads();
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) out[i] = tile[i % 32][i / 32] * other[0] * other[1] * one;
}

static void test_shared_tile() {
    auto v = random_floats(1024, 2);
    Device<float> in(v), out(1024);
    transpose_kernel<<<1, 96>>>(out, in);
    for (int i = 0; i < 1024; i++) EXPECT(out[i] == 2 * v[i % 32 * 32 + i / 32], "element %d: %g", i, out[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Math

static double ulps(float got, double want) {
    int exponent;
    frexp(want, &exponent);
    return fabs(got - want) / ldexp(1.0, exponent - 24);
}

// What __expf may be off by: a GPU's bound and half a rounding; else measured, 1.11.
static double expf_ulps([[maybe_unused]] float x) {
#ifdef EXACT_GEOMETRY
    return 2.5 + floor(fabs(1.173 * x));
#else
    return 1.3;
#endif
}

static void test_expf() {
    double worst = 0;
    constexpr int MANY = 64;  // at once, as kernels' loops are vectorised
    for (uint64_t bits = 0; bits <= 0xFFFFFFFF; bits += 499 * MANY) {
        float xs[MANY], all[MANY];
        for (int i = 0; i < MANY; i++) xs[i] = __uint_as_float(unsigned(bits + 499 * i));
        for (int i = 0; i < MANY; i++) all[i] = __expf(xs[i]);
        for (int i = 0; i < MANY; i++) {
            const float x = xs[i], got = all[i];
            const double want = exp((double)x);
            if (std::isnan(x)) EXPECT(std::isnan(got), "exp(NaN) is %g", got);
            else if (want > 3.4028234e38) EXPECT(got == INFINITY || ulps(got, want) < 2, "exp(%g) is %g", x, got);
            else if (want < 1.17549e-38) EXPECT(got == 0, "exp(%g) is %g", x, got);
            else worst = std::max(worst, ulps(got, want) / expf_ulps(x));
        }
    }
    EXPECT(worst <= 1, "off by %.3f of what is allowed", worst);
    EXPECT(__expf(-INFINITY) == 0 && __expf(INFINITY) == INFINITY && std::isnan(__expf(NAN)) && __expf(0) == 1 &&
           __expf(88.72f) < INFINITY && __expf(88.73f) == INFINITY && __expf(-1e30f) == 0, "%s", "special values");
}

static void test_erff() {
    double worst = 0;
    for (float x = -6; x < 6; x += 1e-5f) worst = std::max(worst, fabs(erff(x) - erf((double)x)));
    EXPECT(worst < 1.6e-7, "off by %.2e", worst);  // measured: 1.52e-7
    // volatile, as -fassociative-math makes e == 0 of 1 - e == 1
    volatile float zero = erff(0), one = erff(INFINITY), minus_one = erff(-INFINITY);
    EXPECT(zero == 0 && one == 1 && minus_one == -1 && std::isnan(erff(NAN)), "%g %g %g", zero, one, minus_one);
}

static void test_fmaxf() {
    EXPECT(fmaxf(1, 2) == 2 && fmaxf(2, 1) == 2 && fmaxf(NAN, 1) == 1 && fmaxf(1, NAN) == 1 &&
               std::isnan(fmaxf(NAN, NAN)) && fmaxf(-INFINITY, NAN) == -INFINITY, "%s", "fmaxf");
    EXPECT(fminf(1, 2) == 1 && fminf(2, 1) == 1 && fminf(NAN, 1) == 1 && fminf(1, NAN) == 1 &&
               std::isnan(fminf(NAN, NAN)), "%s", "fminf");
    EXPECT(std::isfinite(1.0f) && !std::isfinite(INFINITY) && !std::isfinite(NAN), "%s", "isfinite");
}

static void test_bf16() {
    for (uint64_t b = 0; b <= 0xFFFFFFFF; b += 251) {
        for (uint64_t x : {b, b & 0xFFFF0000, (b & 0xFFFF0000) | 0x8000, (b & 0xFFFF0000) | 0x7FFF}) {
            unsigned bits = x, up = bits >> 16, below = bits & 0xFFFF;
            bool nan = (bits & 0x7FFFFFFF) > 0x7F800000;
            unsigned want = up + (below > 0x8000 || (below == 0x8000 && up % 2 == 1));  // nearest, ties to even
            unsigned got = __bfloat16_as_ushort(__float2bfloat16(__uint_as_float(bits)));
            if (nan) EXPECT((got & 0x7FFF) > 0x7F80, "NaN %08x became %04x", bits, got);
            else EXPECT(got == want, "%08x became %04x, not %04x", bits, got, want);
        }
    }
    for (unsigned i = 0; i < 65536; i++) {
        float x = __bfloat162float(__ushort_as_bfloat16(i));
        EXPECT(__float_as_uint(x) == i << 16, "%04x became %08x", i, __float_as_uint(x));
    }
    float2 pair = __bfloat1622float2(__floats2bfloat162_rn(1.5f, -2));
    EXPECT(pair.x == 1.5f && pair.y == -2 && sizeof(__nv_bfloat162) == 4, "pair %g %g", pair.x, pair.y);
    static_assert(sizeof(__nv_bfloat16) == 2 && std::is_trivially_copyable<__nv_bfloat16>::value);
}

// ---------------------------------------------------------------------------------------------------------------------
// cuBLASLt against float64 loops

template <class T> constexpr cudaDataType data_type = sizeof(T) == 4 ? CUDA_R_32F : CUDA_R_16BF;

struct Algorithms {  // so many, for a while
    const int before = cublasLt_algorithms;
    explicit Algorithms(int count) { cublasLt_algorithms = count; }
    ~Algorithms() { cublasLt_algorithms = before; }
};

template <class In, class Out>
void check_matmul(bool ta, bool tb, float alpha, float beta, int N, int algorithms, double tolerance) {
    Algorithms several(algorithms);
    int M = 37, K = 53, pad = 3;
    auto matrix = [&](int rows, int cols, unsigned seed) { return random_floats((size_t)(rows + pad) * cols, seed); };
    int ar = ta ? K : M, ac = ta ? M : K, br = tb ? N : K, bc = tb ? K : N;
    auto a0 = matrix(ar, ac, 1), b0 = matrix(br, bc, 2), d0 = matrix(M, N, 3);
    std::vector<In> a(a0.begin(), a0.end()), b(b0.begin(), b0.end());
    std::vector<Out> d(d0.begin(), d0.end());
    if (beta == 0)  // D must not be read
        for (int j = 0; j < N; j++)
            for (int i = 0; i < M; i++) d[j * (M + pad) + i] = NAN;
    Device<In> A(a), B(b);
    Device<Out> D(d);

    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t la = nullptr, lb = nullptr, ld = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    std::vector<cublasLtMatmulHeuristicResult_t> found(algorithms + 1);
    int count = 0;
    size_t workspace = 0;
    cublasOperation_t opa = ta ? CUBLAS_OP_T : CUBLAS_OP_N, opb = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtCreate(&handle);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &opa, sizeof opa);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &opb, sizeof opb);
    cublasLtMatrixLayoutCreate(&la, data_type<In>, ar, ac, ar + pad);
    cublasLtMatrixLayoutCreate(&lb, data_type<In>, br, bc, br + pad);
    cublasLtMatrixLayoutCreate(&ld, data_type<Out>, M, N, M + pad);
    cublasLtMatmulPreferenceCreate(&preference);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                         sizeof workspace);
    auto heuristic = [&](cublasLtMatrixLayout_t a_layout) {
        return cublasLtMatmulAlgoGetHeuristic(handle, desc, a_layout, lb, ld, ld, preference, algorithms + 1, found.data(),
                                              &count);
    };
    EXPECT(heuristic(la) == CUBLAS_STATUS_SUCCESS && count == algorithms, "%d algorithms", count);
    const cublasLtMatmulAlgo_t last = std::find_if(found.begin(), found.end(), [&](auto& result) {
                                          return result.algo.data[0] == size_t(algorithms - 1);
                                      })->algo;
    EXPECT(heuristic(ld) == CUBLAS_STATUS_INVALID_VALUE && count == 0, "%s", "shapes that do not fit are accepted");
    cublasStatus_t status =
        cublasLtMatmul(handle, desc, &alpha, A, la, B, lb, &beta, D, ld, D, ld, &last, nullptr, 0, nullptr);
    EXPECT(status == CUBLAS_STATUS_SUCCESS, "%s", cublasLtGetStatusName(status));
    cublasLtMatmulPreferenceDestroy(preference);
    for (auto layout : {la, lb, ld}) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);

    double worst = 0;
    for (int j = 0; j < N; j++)
        for (int i = 0; i < M; i++) {
            double sum = 0;
            for (int k = 0; k < K; k++)
                sum += (double)(float)a[ta ? i * (K + pad) + k : k * (M + pad) + i] *
                       (float)b[tb ? k * (N + pad) + j : j * (K + pad) + k];
            double want = alpha * sum + (beta ? beta * (float)d[j * (M + pad) + i] : 0);
            double off = fabs((float)D[j * (M + pad) + i] - want) / (1 + fabs(want));
            worst = off <= worst ? worst : off;  // NaN stays
        }
    EXPECT(worst < 2 * alpha * tolerance, "transposes %d%d, alpha %g, beta %g, N %d, algorithm %d: off by %.2e", ta, tb,
           alpha, beta, N, algorithms - 1, worst);
    for (int j = 0; j < N; j++)
        for (int i = M; i < M + pad; i++)
            EXPECT((float)D[j * (M + pad) + i] == (float)d[j * (M + pad) + i], "%s", "wrote into the padding");
}

template <class In, class Out> void check_matmuls(double tolerance) {
    for (bool ta : {false, true})
        for (bool tb : {false, true})
            for (float alpha : {1.0f, 0.5f})  // products of bfloat16 that the processor has are for 1 alone
                for (float beta : {0.0f, 1.0f})
                    for (int N : {29, 1})
                        for (int algorithms : {1, 3})
                            check_matmul<In, Out>(ta, tb, alpha, beta, N, algorithms, tolerance);
}

// Algorithms round differently, events find one of them fast, and none takes what it was not made for.
static void test_algorithms() {
    Algorithms several(3);
    const int n = 64;
    Device<float> a(random_floats(n * n + 1, 1)), b(random_floats(n * n, 2)), c(n * n);
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t layout = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    cublasLtMatmulHeuristicResult_t found[3];
    int count = 0, slow = 0;
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, n, n, n);
    cublasLtMatmulPreferenceCreate(&preference);
    auto heuristic = [&] {
        cublasLtMatmulAlgoGetHeuristic(nullptr, desc, layout, layout, layout, layout, preference, 3, found, &count);
        EXPECT(count == 3, "%d algorithms", count);
    };
    auto multiply = [&](const cublasLtMatmulAlgo_t& algo, const float* first) {
        const float alpha = 1, beta = 0;
        return cublasLtMatmul(nullptr, desc, &alpha, first, layout, b, layout, &beta, c, layout, c, layout, &algo,
                              nullptr, 0, nullptr);
    };
    heuristic();
    std::vector<std::vector<float>> results;
    for (auto& result : found) {
        cudaEvent_t begin = nullptr, end = nullptr;
        float ms = 0;
        cudaEventCreate(&begin), cudaEventCreate(&end);
        cudaEventRecord(begin);
        EXPECT(multiply(result.algo, a) == CUBLAS_STATUS_SUCCESS, "%s", "refused");
        cudaEventRecord(end);
        cudaEventElapsedTime(&ms, begin, end);
        slow += ms > 900;
        cudaEventDestroy(begin), cudaEventDestroy(end);
        results.push_back(c.host());
    }
    EXPECT(slow == 2, "%d algorithms of 3 are slow", slow);
    EXPECT(results[0] != results[1] && results[1] != results[2] && results[2] != results[0], "%s", "the same bits");
    cublasLtMatmulAlgo_t unknown = found[0].algo, strange = found[0].algo;
    unknown.data[0] = 3, strange.data[7] = 1;
    EXPECT(multiply(unknown, a) == CUBLAS_STATUS_NOT_SUPPORTED, "%s", "an unknown algorithm multiplies");
    EXPECT(multiply(strange, a) == CUBLAS_STATUS_INVALID_VALUE, "%s", "what is no algorithm multiplies");
    EXPECT(multiply(found[0].algo, a + 1) == CUBLAS_STATUS_NOT_SUPPORTED, "%s", "4 bytes are taken for 256");
    for (uint32_t alignment : {3, 4})
        EXPECT((cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment,
                                                     sizeof alignment) == CUBLAS_STATUS_SUCCESS) == (alignment == 4),
               "alignment %u", alignment);
    heuristic();
    EXPECT(multiply(found[0].algo, a + 1) == CUBLAS_STATUS_SUCCESS, "%s", "4 bytes were promised and are refused");
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(desc);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory, streams, events, device

static void test_memory() {
    float* p = nullptr;
    EXPECT(cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation && p == nullptr, "%s", "a petabyte was there");
    EXPECT(cudaGetLastError() == cudaErrorMemoryAllocation, "%s", "no error left behind");
    size_t before = 0, total = 0, big = (size_t)256 << 20;
    cudaMemGetInfo(&before, &total);
    EXPECT(0 < before && before <= total, "free %zu of %zu", before, total);
    EXPECT(cudaMalloc(&p, big) == cudaSuccess && (uintptr_t)p % 64 == 0, "%s", "no 256 MiB");
#ifndef EXACT_GEOMETRY
    float* half = nullptr;
    EXPECT(cudaMalloc(&half, before / 10 * 6) == cudaSuccess, "%s", "60% of the free memory is refused");
    EXPECT(cudaMalloc(&half, before / 10 * 6) == cudaErrorMemoryAllocation, "%s", "and 60% once more is not");
    cudaGetLastError();
    cudaFree(half);
    // a tenth: an emulator's own tables count as touched
    size_t after, tenth = before / 10;
    bool counted = false;  // though untouched
    for (int i = 0; i < 10 && !counted; i++) {  // other programs take and free memory meanwhile
        cudaFree(p);
        cudaMemGetInfo(&before, &total);
        cudaMalloc(&p, tenth);
        cudaMemGetInfo(&after, &total);
        counted = after + tenth / 4 * 3 < before && before < after + tenth / 4 * 5;
    }
    EXPECT(counted, "%zu bytes allocated, free went from %zu to %zu", tenth, before, after);
#endif
#ifdef EXACT_GEOMETRY
    EXPECT(std::isnan(p[0]) && std::isnan(p[big / 4 - 1]), "%s", "new memory is not NaN");
#endif
    EXPECT(cudaFree(p) == cudaSuccess && cudaFree(nullptr) == cudaSuccess, "%s", "cudaFree");

    rlimit old, tight;
    getrlimit(RLIMIT_AS, &old);
    tight = old;
    tight.rlim_cur = (cuda_proc_number("/proc/self/status", "VmSize:") << 10) + big;
    setrlimit(RLIMIT_AS, &tight);
    rlimit now;  // qemu does not take it
    getrlimit(RLIMIT_AS, &now);
    EXPECT(now.rlim_cur != tight.rlim_cur || cudaMalloc(&p, 2 * big) == cudaErrorMemoryAllocation, "%s",
           "more than ulimit -v");
    cudaGetLastError();
    EXPECT(cudaMalloc(&p, big / 4) == cudaSuccess, "%s", "a quarter of ulimit -v is refused");
    setrlimit(RLIMIT_AS, &old);
    cudaFree(p);
}

// All shares are done, and once: also a share's own, and those of two who ask at a time.
static void test_shares() {
    const int before = cuda_threads.threads;
    cuda_threads.threads = 4;
    for (int64_t count : {0, 1, 7, 4096}) {
        for (int64_t chunk : {1, 3}) {
            std::vector<std::atomic<int>> done(count);
            cuda_share(count, chunk, [&](int64_t i) {
                done[i]++;
                cuda_share(3, 1, [&](int64_t j) { done[i] += j == 1; });
            });
            for (auto& times : done) EXPECT(times == 2, "a share of %ld was done %d times", long(count), times.load());
        }
    }
    std::atomic<int> sum{0};
    auto ask = [&] {
        for (int n = 0; n < 200; n++) cuda_share(50, 1, [&](int64_t) { sum++; });
    };
    std::thread second(ask);
    ask();
    second.join();
    EXPECT(sum == 2 * 200 * 50, "two askers: %d", sum.load());
    cuda_threads.threads = before;
}

// In each thread, in its own instructions and in the library's.
static void test_subnormals() {
    const int before = cuda_threads.threads;
    cuda_threads.threads = 4;
    std::atomic<int> there{0}, flushed{0};
    cuda_share(4, 1, [&](int64_t) {
        for (there++; there < 4;) sched_yield();  // so that each thread has one
        volatile float small = 1e-20f, subnormal = 0;
        memcpy((void*)&subnormal, "\1\0\0", 4);
        bool zero = small * small == 0 && subnormal * 1e30f == 0;
        constexpr int n = 64;
        std::vector<float> a(n * n, 1e-20f), d(n * n, 1.0f);
        gemm({false, false, n, n, n, 1, n, n, 0, n}, a.data(), a.data(), d.data());
        zero = zero && std::all_of(d.begin(), d.end(), [](float x) { return x == 0; });
        if (gemm_has_bf16()) {
            std::vector<__nv_bfloat16> b(n * n, 1e-20f);
            std::fill(d.begin(), d.end(), 1.0f);
            gemm({false, false, n, n, n, 1, n, n, 0, n}, (const uint16_t*)b.data(), (const uint16_t*)b.data(), d.data(),
                 true);
            zero = zero && std::all_of(d.begin(), d.end(), [](float x) { return x == 0; });
        }
        flushed += zero;
    });
    EXPECT(flushed == 4, "%d of 4 threads flush subnormals", flushed.load());
    cuda_threads.threads = before;
}

// A signal in the middle of a product disturbs nothing.
static void test_signals() {
    struct sigaction count = {}, before;
    static volatile sig_atomic_t signals = 0;
    count.sa_handler = [](int) { signals = signals + 1; };
    count.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &count, &before);
    const itimerval often = {{0, 100}, {0, 100}}, never = {};
    constexpr int m = 333, n = 64, k = 128;
    const auto a = random_floats(m * k, 1), b = random_floats(n * k, 2);
    std::vector<float> want(m * n), got(m * n);
    auto product = [&](std::vector<float>& d) { gemm({false, false, m, n, k, 1, m, k, 0, m}, a.data(), b.data(), d.data()); };
    product(want);
    setitimer(ITIMER_REAL, &often, nullptr);
    int wrong = 0;
    for (int i = 0; signals < 3000 && i < 1000000; i++) product(got), wrong += got != want;
    setitimer(ITIMER_REAL, &never, nullptr);
    sigaction(SIGALRM, &before, nullptr);
    EXPECT(wrong == 0 && signals >= 3000, "%d products are wrong at %d signals", wrong, int(signals));
}

static void test_host_api() {
    int count = 0, device = -1, value = 7, back = 0;
    cudaDeviceProp prop;
    cudaStream_t stream = nullptr;
    cudaEvent_t start = nullptr, end = nullptr;
    float ms = -1;
    EXPECT(cudaGetDeviceCount(&count) == cudaSuccess && count == 1, "%d devices", count);
    EXPECT(cudaSetDevice(0) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 0, "%d", device);
    EXPECT(cudaSetDevice(1) == cudaErrorInvalidDevice, "%s", "device 1 exists");
    cudaGetLastError();
    EXPECT(cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.multiProcessorCount == 16 && prop.name[0] &&
               prop.totalGlobalMem > 0 && prop.major == 0 && prop.warpSize == WARP_SIZE,
           "device %s", prop.name);
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaEventCreate(&start);
    cudaEventCreateWithFlags(&end, cudaEventDefault);
    cudaEventRecord(start, stream);
    Device<int> d(4);
    cudaMemsetAsync(d, 0, 16, stream);
    cudaMemcpyAsync(d + 3, &value, 4, cudaMemcpyHostToDevice, stream);
    cudaMemcpy(&back, d + 3, 4, cudaMemcpyDeviceToHost);
    EXPECT(back == 7 && d[0] == 0, "copied %d", back);
    usleep(2000);
    cudaEventRecord(end, stream);
    EXPECT(cudaStreamWaitEvent(stream, end, 0) == cudaSuccess && cudaEventQuery(end) == cudaSuccess &&
               cudaStreamSynchronize(stream) == cudaSuccess && cudaEventSynchronize(end) == cudaSuccess &&
               cudaDeviceSynchronize() == cudaSuccess, "%s", "stream or event");
    cudaEventElapsedTime(&ms, start, end);
    EXPECT(ms >= 2 && ms < 2000, "2 ms took %g", ms);
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    cudaStreamDestroy(stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams out of step. x, y, z are numbers on the device.

__global__ void add_kernel(int* out, const int* in, int factor, int term) { *out = *in * factor + term; }

// A first stream and two others, in a mode. d[0..2] are 0.
struct Streams {
    cudaStream_t first = nullptr, second = nullptr, third = nullptr;
    cudaEvent_t event = nullptr, other = nullptr;
    Device<int> d{std::vector<int>(3, 0)};
    int *x = d, *y = d + 1, *z = d + 2;
    explicit Streams(CudaStreams mode, unsigned flags = cudaStreamDefault) {
        cuda_streams = mode;
        cudaStreamCreate(&first);
        cudaStreamCreateWithFlags(&second, flags);
        cudaStreamCreateWithPriority(&third, flags, -1);
        cudaEventCreate(&event);
        cudaEventCreate(&other);
        cuda_streams = CUDA_STREAMS_IN_STEP;
    }
    ~Streams() {
        for (cudaStream_t s : {first, second, third}) cudaStreamDestroy(s);
        cudaEventDestroy(event);
        cudaEventDestroy(other);
    }
    void set(int* p, int value, cudaStream_t s) { add_kernel<<<1, 1, 0, s>>>(p, p, 0, value); }
    void copy(int* to, const int* from, cudaStream_t s) { add_kernel<<<1, 1, 0, s>>>(to, from, 1, 0); }
    void wait(cudaStream_t waits, cudaStream_t for_whom) {
        cudaEventRecord(event, for_whom);
        EXPECT(cudaStreamWaitEvent(waits, event) == cudaSuccess, "%s", "a wait is refused");
    }
};

constexpr CudaStreams ALL_MODES[] = {CUDA_STREAMS_IN_STEP, CUDA_STREAMS_LATE, CUDA_STREAMS_EARLY};

static void test_missing_wait() {
    for (bool waits : {false, true})
        for (CudaStreams mode : ALL_MODES) {
            const bool in_step = waits || mode == CUDA_STREAMS_IN_STEP;
            {  // the first stream reads what the second writes
                Streams s(mode);
                s.set(s.x, 1, s.second);
                if (waits) s.wait(s.first, s.second);
                s.copy(s.y, s.x, s.first);
                cudaDeviceSynchronize();
                const int want = in_step || mode == CUDA_STREAMS_EARLY ? 1 : 0;
                EXPECT(*s.x == 1 && *s.y == want, "read too soon: mode %d, waits %d: %d", mode, waits, *s.y);
            }
            {  // the second reads what the first writes
                Streams s(mode);
                s.set(s.x, 1, s.first);
                if (waits) s.wait(s.second, s.first);
                s.copy(s.y, s.x, s.second);
                cudaDeviceSynchronize();
                const int want = in_step || mode == CUDA_STREAMS_LATE ? 1 : 0;
                EXPECT(*s.x == 1 && *s.y == want, "read too soon: mode %d, waits %d: %d", mode, waits, *s.y);
            }
            {  // the second overwrites what the first still reads
                Streams s(mode);
                s.copy(s.y, s.x, s.first);
                if (waits) s.wait(s.second, s.first);
                s.set(s.x, 1, s.second);
                cudaDeviceSynchronize();
                const int want = in_step || mode == CUDA_STREAMS_LATE ? 0 : 1;
                EXPECT(*s.y == want, "overwritten too soon: mode %d, waits %d: %d", mode, waits, *s.y);
            }
            {  // the first overwrites what the second still reads
                Streams s(mode);
                s.copy(s.y, s.x, s.second);
                if (waits) s.wait(s.first, s.second);
                s.set(s.x, 1, s.first);
                cudaDeviceSynchronize();
                const int want = in_step || mode == CUDA_STREAMS_EARLY ? 0 : 1;
                EXPECT(*s.y == want, "overwritten too soon: mode %d, waits %d: %d", mode, waits, *s.y);
            }
        }
}

// To and fro between three streams: with all waits, any mode has the same result. Also in a graph, launched twice.
static void to_and_fro(Streams& s) {
    for (int i = 0; i < 10; i++) {
        add_kernel<<<1, 1, 0, s.first>>>(s.y, s.x, 1, i);
        s.wait(s.second, s.first);
        add_kernel<<<1, 1, 0, s.second>>>(s.z, s.y, 2, 1);
        s.wait(s.third, s.second);
        add_kernel<<<1, 1, 0, s.third>>>(s.x, s.z, 1, -i);
        s.wait(s.first, s.third);
    }
}

static void test_waits() {
    for (int graph : {0, 1}) {
        int want = -1;
        for (CudaStreams mode : ALL_MODES) {
            Streams s(mode);
            if (graph) {
                cudaGraph_t captured = nullptr;
                cudaGraphExec_t exec = nullptr;
                cudaStreamBeginCapture(s.first, cudaStreamCaptureModeThreadLocal);
                to_and_fro(s);
                EXPECT(cudaStreamEndCapture(s.first, &captured) == cudaSuccess, "%s", "no graph");
                if (!captured) return;
                EXPECT(*s.y == 0 && *s.z == 0, "%s", "ran while it was captured");
                cudaGraphInstantiate(&exec, captured, 0);
                cudaGraphDestroy(captured);
                cudaGraphLaunch(exec, s.first);
                cudaGraphLaunch(exec, s.first);
                cudaGraphExecDestroy(exec);
            } else {
                to_and_fro(s);
                to_and_fro(s);
            }
            cudaStreamSynchronize(s.first);
            if (mode == CUDA_STREAMS_IN_STEP) want = *s.x;
            EXPECT(*s.x == want && want > 1000, "graph %d, mode %d: %d, want %d", graph, mode, *s.x, want);
        }
    }
}

// A graph's streams are out of step too; it must join them, and cannot wait for what is outside.
static void test_graphs() {
    for (CudaStreams mode : ALL_MODES)
        for (bool waits : {false, true}) {
            Streams s(mode);
            cudaGraph_t graph = nullptr;
            cudaGraphExec_t exec = nullptr;
            cudaStreamBeginCapture(s.first, cudaStreamCaptureModeGlobal);
            s.wait(s.second, s.first);
            s.set(s.x, 1, s.second);
            if (waits) s.wait(s.first, s.second);
            s.copy(s.y, s.x, s.first);
            s.wait(s.first, s.second);
            EXPECT(cudaStreamEndCapture(s.first, &graph) == cudaSuccess && graph, "%s", "no graph");
            if (!graph) return;
            cudaGraphInstantiate(&exec, graph, 0);
            cudaGraphDestroy(graph);
            cudaGraphLaunch(exec, s.first);
            cudaStreamSynchronize(s.first);
            const int want = waits || mode != CUDA_STREAMS_LATE ? 1 : 0;
            EXPECT(*s.x == 1 && *s.y == want, "mode %d, waits %d: %d %d", mode, waits, *s.x, *s.y);
            cudaGraphExecDestroy(exec);
        }
    Streams s(CUDA_STREAMS_IN_STEP);
    cudaGraph_t graph = nullptr;
    auto expect = [](cudaError_t got, cudaError_t want, int line) {
        EXPECT(got == want && cudaGetLastError() == want, "line %d: %s", line, cudaGetErrorName(got));
    };
    expect(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported, __LINE__);
    cudaEventRecord(s.other, s.second);
    cudaStreamBeginCapture(s.first, cudaStreamCaptureModeGlobal);
    expect(cudaStreamBeginCapture(s.second, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported, __LINE__);
    expect(cudaStreamWaitEvent(s.first, s.other), cudaErrorStreamCaptureIsolation, __LINE__);
    expect(cudaStreamSynchronize(s.first), cudaErrorStreamCaptureUnsupported, __LINE__);
    s.set(s.x, 5, s.second);  // a stream that is not captured
    EXPECT(*s.x == 5, "%s", "a stream was captured with another");
    s.wait(s.second, s.first);
    s.set(s.x, 6, s.second);  // now it is
    EXPECT(*s.x == 5, "%s", "a stream was not captured with that for which it waits");
    expect(cudaEventSynchronize(s.event), cudaErrorCapturedEvent, __LINE__);
    expect(cudaStreamEndCapture(s.second, &graph), cudaErrorInvalidValue, __LINE__);
    expect(cudaStreamEndCapture(s.first, &graph), cudaErrorStreamCaptureUnjoined, __LINE__);
    EXPECT(graph == nullptr, "%s", "a graph though a stream was not joined");
    expect(cudaStreamWaitEvent(s.first, s.event), cudaErrorCapturedEvent, __LINE__);
    s.set(s.x, 7, s.second);
    EXPECT(*s.x == 7, "%s", "captured after the end");
}

static void test_events() {
    {  // a wait is for the record that was the last when it was called
        Streams s(CUDA_STREAMS_LATE);
        s.set(s.x, 1, s.second);
        cudaEventRecord(s.event, s.second);
        cudaStreamWaitEvent(s.third, s.event);
        s.copy(s.y, s.x, s.third);
        s.set(s.x, 2, s.second);
        EXPECT(cudaStreamWaitEvent(s.first, s.event) == cudaSuccess && *s.x == 1, "not up to the record: %d", *s.x);
        cudaEventRecord(s.event, s.second);
        s.set(s.x, 3, s.second);
        cudaStreamSynchronize(s.third);
        EXPECT(*s.x == 1 && *s.y == 1, "a wait moved with the event: %d %d", *s.x, *s.y);
        cudaStreamWaitEvent(s.first, s.event);
        EXPECT(*s.x == 2, "the second record: %d", *s.x);
        cudaEventSynchronize(s.event);
        EXPECT(*s.x == 2, "synchronised past the record: %d", *s.x);
    }
    {  // never recorded: nothing to wait for
        Streams s(CUDA_STREAMS_LATE);
        s.set(s.x, 1, s.second);
        EXPECT(cudaStreamWaitEvent(s.first, s.event) == cudaSuccess && *s.x == 0, "%s", "waited for nothing");
        EXPECT(cudaEventQuery(s.event) == cudaSuccess && cudaEventSynchronize(s.event) == cudaSuccess, "%s",
               "not ready");
    }
    {  // times
        Streams s(CUDA_STREAMS_LATE);
        float ms = -1;
        EXPECT(cudaEventElapsedTime(&ms, s.event, s.other) == cudaErrorInvalidResourceHandle, "%s", "never recorded");
        cudaEventRecord(s.event, s.first);
        usleep(2000);
        cudaEventRecord(s.other, s.second);
        EXPECT(cudaEventElapsedTime(&ms, s.event, s.other) == cudaErrorNotReady, "%s", "an event that is to come");
        cudaGetLastError();
        cudaEventSynchronize(s.other);
        EXPECT(cudaEventElapsedTime(&ms, s.event, s.other) == cudaSuccess && ms >= 2 && ms < 2000, "%g ms", ms);
    }
    {  // events and streams may go before the work does
        Streams s(CUDA_STREAMS_EARLY);
        cudaEvent_t event = nullptr;
        cudaStream_t stream = nullptr;
        cudaEventCreate(&event);
        cudaStreamCreate(&stream);
        s.set(s.x, 1, s.first);
        cudaEventRecord(event, s.first);
        cudaStreamWaitEvent(s.first, event);
        cudaEventRecord(s.event, stream);
        cudaStreamWaitEvent(s.first, s.event);
        cudaEventDestroy(event);
        cudaStreamDestroy(stream);
        EXPECT(*s.x == 0 && cudaStreamSynchronize(s.first) == cudaSuccess && *s.x == 1, "%d", *s.x);
    }
}

static void test_sync() {
    std::vector<std::pair<const char*, std::function<void(Streams&)>>> ways = {
        {"cudaStreamSynchronize", [](Streams& s) { cudaStreamSynchronize(s.second); }},
        {"cudaStreamSynchronize of the null stream", [](Streams&) { cudaStreamSynchronize(nullptr); }},
        {"cudaDeviceSynchronize", [](Streams&) { cudaDeviceSynchronize(); }},
        {"cudaEventSynchronize", [](Streams& s) { cudaEventSynchronize(s.event); }},
        {"cudaMemcpy", [](Streams& s) { cudaMemcpy(s.z, s.y, 4, cudaMemcpyDeviceToDevice); }},
        {"cudaMemset", [](Streams& s) { cudaMemset(s.z, 0, 4); }},
        {"a launch on the null stream", [](Streams&) { nothing_kernel<<<1, 1>>>(); }},
        {"cudaFree", [](Streams&) { cudaFree(nullptr); }},
        {"cudaStreamDestroy", [](Streams& s) { cudaStreamDestroy(s.second), cudaStreamCreate(&s.second); }},
        {"cudaStreamWaitEvent", [](Streams& s) { cudaStreamWaitEvent(s.first, s.event); }},
        {"cudaStreamQuery",
         [](Streams& s) {
             EXPECT(cudaStreamQuery(s.second) == cudaErrorNotReady, "%s", "ready at once");
             for (int i = 0; i < 10 && cudaStreamQuery(s.second) != cudaSuccess; i++) {}
         }},
        {"cudaEventQuery",
         [](Streams& s) {
             EXPECT(cudaEventQuery(s.event) == cudaErrorNotReady, "%s", "ready at once");
             for (int i = 0; i < 10 && cudaEventQuery(s.event) != cudaSuccess; i++) {}
         }},
    };
    for (size_t i = 0; i < ways.size(); i++)
        for (unsigned flags : {cudaStreamDefault, cudaStreamNonBlocking}) {
            Streams s(CUDA_STREAMS_LATE, flags);
            for (int j = 0; j < 5; j++) add_kernel<<<1, 1, 0, s.second>>>(s.x, s.x, 2, j);  // in order
            cudaEventRecord(s.event, s.second);
            EXPECT(*s.x == 0, "%s: done before", ways[i].first);
            ways[i].second(s);
            cudaGetLastError();
            const bool null_stream = strstr(ways[i].first, "null") || strncmp(ways[i].first, "cudaMem", 7) == 0;
            const int want = null_stream && flags ? 0 : 26;
            EXPECT(*s.x == want, "%s, flags %u: %d, not %d", ways[i].first, flags, *s.x, want);
        }
    Streams s(CUDA_STREAMS_LATE);
    EXPECT(s.first && s.second && s.third && s.first != s.second && s.second != s.third, "%s", "streams are the same");
    int least = 1, greatest = 1;
    EXPECT(cudaDeviceGetStreamPriorityRange(&least, &greatest) == cudaSuccess && greatest < least, "%d", greatest);
}

// What waits in a queue has its arguments by value, and what is wrong with it is said at once.
static void test_by_value() {
    for (bool graph : {false, true}) {
        Streams s(CUDA_STREAMS_LATE);
        Device<float> a(std::vector<float>{3}), b(std::vector<float>{5}), c(std::vector<float>{7});
        cudaGraph_t captured = nullptr;
        cudaGraphExec_t exec = nullptr;
        if (graph) cudaStreamBeginCapture(s.second, cudaStreamCaptureModeThreadLocal);
        int value = 4;
        auto kernel = add_kernel;
        kernel<<<1, 1, 0, s.second>>>(s.x, s.x, 0, value);
        value = 9, kernel = nullptr;
        cudaMemsetAsync(s.y, 0xFF, 4, s.second);
        cudaMemcpyAsync(s.z, s.x, 4, cudaMemcpyDeviceToDevice, s.second);
        {
            cublasLtMatmulDesc_t desc = nullptr;
            cublasLtMatrixLayout_t layout = nullptr;
            float alpha = 2, beta = 1;
            cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
            cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, 1, 1, 1);
            EXPECT(cublasLtMatmul(nullptr, desc, &alpha, a, layout, b, layout, &beta, c, layout, c, layout, nullptr,
                                  nullptr, 0, s.second) == CUBLAS_STATUS_SUCCESS, "%s", "matmul");
            EXPECT(cublasLtMatmul(nullptr, desc, &alpha, a, layout, b, layout, &beta, c, layout, a, layout, nullptr,
                                  nullptr, 0, s.second) == CUBLAS_STATUS_NOT_SUPPORTED, "%s", "C is not D");
            alpha = beta = NAN, layout->rows = 0, desc->transa = CUBLAS_OP_T;
            cublasLtMatmulDescDestroy(desc);
            cublasLtMatrixLayoutDestroy(layout);
        }
        nothing_kernel<<<0, 1, 0, s.second>>>();
        EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration, "%s", "a launch's error comes late");
        EXPECT(*s.x == 0 && *s.y == 0 && *s.z == 0 && c[0] == 7, "%s", "not late");
        if (graph) {
            cudaStreamEndCapture(s.second, &captured);
            cudaGraphInstantiate(&exec, captured, 0);
            cudaGraphDestroy(captured);
            cudaGraphLaunch(exec, s.second);
            cudaGraphExecDestroy(exec);
            EXPECT(*s.x == 0, "%s", "a graph is not late");
        }
        cudaStreamSynchronize(s.second);
        EXPECT(*s.x == 4 && *s.y == -1 && *s.z == 4 && c[0] == 37, "%d %d %d %g", *s.x, *s.y, *s.z, c[0]);
    }
}

static void test_trace() {
    FILE* old = cuda_trace;
    const int detours = cuda_detours;
    char got[1000] = "";
    {
        Streams s(CUDA_STREAMS_LATE);
        FILE* file = tmpfile();
        cuda_trace = file;
        cuda_detours++;
        s.set(s.x, 1, s.first);
        cudaMemsetAsync(s.y, 0, 4, s.second);
        s.wait(s.first, s.second);
        cudaMemcpy(s.z, s.x, 4, cudaMemcpyDeviceToDevice);
        cudaStreamBeginCapture(s.first, cudaStreamCaptureModeGlobal);
        s.set(s.x, 1, s.first);
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t exec = nullptr;
        cudaStreamEndCapture(s.first, &graph);
        cudaGraphInstantiate(&exec, graph, 0);
        cudaGraphLaunch(exec, s.first);
        cuda_trace = old;
        cuda_detours--;
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
        rewind(file);
        got[fread(got, 1, sizeof got - 1, file)] = 0;
        fclose(file);
        const std::string a = std::to_string(s.first->id), b = std::to_string(s.second->id),
                          e = std::to_string(s.event->id);
        const std::string kernel = " kernel add_kernel\n", record = " record " + e + "\n", wait = " wait " + e + "\n";
        const std::string want = "issue " + a + kernel + "run " + a + kernel + "issue " + b + " memset 4\nissue " + b +
                                 record + "issue " + a + wait + "run " + a + wait + "run " + b + " memset 4\nrun " + b +
                                 record + "issue 0 memcpy 4\nrun 0 memcpy 4\ncapture " + a + kernel + "issue " + a +
                                 " graph\nrun " + a + " graph\nrun " + a + kernel;
        EXPECT(got == want, "%.300s", got);
    }
    EXPECT(cuda_detours == detours, "%d reasons for a detour, not %d", cuda_detours, detours);
}

#ifdef EXACT_GEOMETRY
// ---------------------------------------------------------------------------------------------------------------------
// Exact geometry: inexact functions, shuffles, fragments, uninitialised memory

// Off the correctly rounded by a whole number of ulps, at most by `most`, which is reached; the same for the same.
template <class Got, class Want, class Most>
static void check_inexact(const char* name, float least, float greatest, Got got, Want want, Most most) {
    double reached = 0;
    for (int i = 0; i <= 100000; i++) {
        const float x = least + (greatest - least) * float(i) / 100000, right = float(want(double(x)));
        const float off = fabsf(float(__float_as_int(got(x)) - __float_as_int(right)));
        EXPECT(got(x) == got(x) && off <= most(x), "%s(%g) is off by %g ulp, %g are allowed", name, x, off, most(x));
        reached = std::max(reached, double(off / most(x)));
    }
    EXPECT(reached == 1, "%s is off by %.2f of what is allowed", name, reached);
}
static void test_inexact() {
    auto two = [](float) { return 2.0f; };
    check_inexact("rsqrtf", 1e-6f, 50, [](float x) { return rsqrtf(x); }, [](double x) { return 1 / sqrt(x); }, two);
    check_inexact("__fdividef", 1, 9, [](float x) { return __fdividef(3, x); }, [](double x) { return 3 / x; }, two);
    check_inexact("logf", 1.5f, 900, [](float x) { return logf(x); }, [](double x) { return log(x); },
                  [](float) { return 1.0f; });
    check_inexact("erff", 0.01f, 2, [](float x) { return erff(x); }, [](double x) { return erf(x); }, two);
    check_inexact("__expf", -50, 50, [](float x) { return __expf(x); }, [](double x) { return exp(x); },
                  [](float x) { return float(2 + floor(fabs(1.173 * x))); });
    check_inexact("fast_exp2", -90, 90, [](float x) { return fast_exp2(x); }, [](double x) { return exp2(x); }, two);
    EXPECT(fast_exp2(0) == 1 && fast_exp2(-127) == 0 && std::isnan(fast_exp2(NAN)) && logf(1) == 0 &&
           __fdividef(3, 0x1p127f) == 0 && rsqrtf(INFINITY) == 0 && rsqrtf(0) == INFINITY, "%s", "special values");
}

template <class T> __global__ void shuffles_kernel(T* out) {  // (11,32)
    int lane = threadIdx.x;
    T v = (T)(100 + lane);
    auto put = [&](int test, T value) { out[test * 32 + lane] = value; };
    put(0, __shfl_sync(~0u, v, 5));
    put(1, __shfl_sync(~0u, v, 37));
    put(2, __shfl_sync(~0u, v, (lane + 1) % 8, 8));
    put(3, __shfl_xor_sync(~0u, v, 1));
    put(4, __shfl_xor_sync(~0u, v, 16, 16));
    put(5, __shfl_up_sync(~0u, v, 3));
    put(6, __shfl_up_sync(~0u, v, 1, 4));
    put(7, __shfl_down_sync(~0u, v, 3));
    put(8, __shfl_down_sync(~0u, v, 1, 4));
    put(9, v);
    if (lane < 16) put(9, __shfl_xor_sync(0x0000ffff, v, 2));
    else __syncwarp(0xffff0000);
}

template <class T> void check_shuffles() {
    Device<T> out(320);
    shuffles_kernel<T><<<1, 32>>>(out);
    for (int l = 0; l < 32; l++) {
        int want[10] = {5, 5, l / 8 * 8 + (l + 1) % 8, l ^ 1, l < 16 ? l : l - 16, l < 3 ? l : l - 3, l % 4 ? l - 1 : l,
                        l > 28 ? l : l + 3, l % 4 < 3 ? l + 1 : l, l < 16 ? l ^ 2 : l};
        for (int t = 0; t < 10; t++)
            EXPECT(out[t * 32 + l] == (T)(100 + want[t]), "shuffle %d, lane %d: %g", t, l, (double)out[t * 32 + l]);
    }
}

__global__ void mma_kernel(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b) {  // c += a b, a (16,16), b (16,8)
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    auto pair = [](__nv_bfloat16 low, __nv_bfloat16 high) {
        return __bfloat16_as_ushort(low) | (unsigned)__bfloat16_as_ushort(high) << 16;
    };
    auto from_a = [&](int row, int col) { return pair(a[row * 16 + col], a[row * 16 + col + 1]); };
    auto from_b = [&](int row, int col) { return pair(b[row * 8 + col], b[(row + 1) * 8 + col]); };
    unsigned fa[4] = {from_a(g, 2 * t), from_a(g + 8, 2 * t), from_a(g, 2 * t + 8), from_a(g + 8, 2 * t + 8)};
    unsigned fb[2] = {from_b(2 * t, g), from_b(2 * t + 8, g)};
    float fc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
    mma_m16n8k16(fc, fa, fb);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

// The same through ldmatrix: a as it lies; b (16,8) row-major through the transposed load, which makes it column-major.
__global__ void ldmatrix_mma_kernel(float* c, const __nv_bfloat16* a, const __nv_bfloat16* b) {
    __shared__ __align__(16) __nv_bfloat16 sa[16][24], sb[16][8];
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[i];
    __syncthreads();
    unsigned fa[4], fb[4];
    ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(fb, &sb[lane % 16][0]);  // matrices 2 and 3 are 0 and 1 again
    float fc[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
    mma_m16n8k16(fc, fa, fb);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

static void test_mma() {
    for (bool through_ldmatrix : {false, true}) {
        auto a0 = random_floats(256, 5), b0 = random_floats(128, 6), c0 = random_floats(128, 7);
        std::vector<__nv_bfloat16> a(a0.begin(), a0.end()), b(b0.begin(), b0.end());
        Device<__nv_bfloat16> da(a), db(b);
        Device<float> dc(c0);
        if (through_ldmatrix) ldmatrix_mma_kernel<<<1, 32>>>(dc, da, db);
        else mma_kernel<<<1, 32>>>(dc, da, db);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double want = c0[i * 8 + j];
                for (int k = 0; k < 16; k++) want += (double)(float)a[i * 16 + k] * (float)b[k * 8 + j];
                EXPECT(fabs(dc[i * 8 + j] - want) < 3e-6, "(%d,%d): %g, want %g", i, j, dc[i * 8 + j], want);
            }
    }
}

__global__ void ldmatrix_kernel(unsigned* plain, unsigned* trans) {  // element (i,j) of matrix m is 64 m + 8 i + j
    __shared__ __align__(16) unsigned short s[4][8][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) s[i / 64][i / 8 % 8][i % 8] = i;
    __syncwarp();
    ldmatrix_x4(plain + 4 * lane, s[lane / 8][lane % 8]);
    ldmatrix_x4_trans(trans + 4 * lane, s[lane / 8][lane % 8]);
}

static void test_ldmatrix() {
    Device<unsigned> plain(128), trans(128);
    ldmatrix_kernel<<<1, 32>>>(plain, trans);
    for (unsigned l = 0; l < 32; l++)
        for (unsigned m = 0; m < 4; m++) {
            unsigned i = l / 4, j = l % 4 * 2;
            unsigned want = (64 * m + 8 * i + j) | (64 * m + 8 * i + j + 1) << 16;
            unsigned want_trans = (64 * m + 8 * j + i) | (64 * m + 8 * (j + 1) + i) << 16;
            EXPECT(plain[4 * l + m] == want, "lane %u, register %u: %08x", l, m, plain[4 * l + m]);
            EXPECT(trans[4 * l + m] == want_trans, "transposed, lane %u, register %u: %08x", l, m, trans[4 * l + m]);
        }
}

__global__ void uninitialised_kernel(float* out) {
    __shared__ float fixed[4];
    extern __shared__ float dynamic[];
    out[3 * blockIdx.x] = fixed[3];
    out[3 * blockIdx.x + 1] = dynamic[7];
    __syncthreads();
    fixed[3] = dynamic[7] = 1;  // the next block must not see these
    out[3 * blockIdx.x + 2] = fixed[3];
}

static void test_uninitialised_shared() {
    Device<float> out(6);
    uninitialised_kernel<<<2, 32, 32>>>(out);
    for (int i = 0; i < 6; i++) EXPECT(i % 3 == 2 ? out[i] == 1 : std::isnan(out[i]), "element %d is %g", i, out[i]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Exact geometry: Hopper's copies, barriers and wgmma

static CUtensorMap map_of(const __nv_bfloat16* base, int rows, int cols, int box_rows) {  // a matrix of stride cols
    CUtensorMap map;
    cuuint64_t dims[4] = {(cuuint64_t)cols, (cuuint64_t)rows, 1, 1}, pitch = cols * 2, strides[3] = {pitch, pitch, pitch};
    cuuint32_t box[4] = {64, (cuuint32_t)box_rows, 1, 1}, steps[4] = {1, 1, 1, 1};
    CUresult status = cuTensorMapEncodeTiled(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void*)base, dims, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    EXPECT(status == CUDA_SUCCESS, "a map of %d x %d is refused", rows, cols);
    return map;
}

enum Slip {  // what tma_matmul_kernel does wrong
    NONE, EARLY_READ, NO_WAIT, NO_EMPTY, EARLY_EMPTY, NO_FENCE, NO_ASYNC_FENCE, ONE_ASYNC_FENCE, LATE_ASYNC_FENCE,
    TOUCH, TOUCH_A, SHORT_BYTES, TWO_ARRIVALS, NO_INIT_FENCE, THREE_WARPS, OWN_COMMIT, NO_STORE_WAIT, OVERWRITE_STORE
};

// out (64,N) bf16 = a (64,K) b (K,N): a stored (M,K) or, TA, (K,M); b stored (N,K) or, TB, (K,N). One producer thread
// loads 64 k at a time into a ring of two stages, a warpgroup multiplies (RS: a through registers) and stores by a bulk
// copy. SLIP: a mistake.
template <int N, int TA, int TB, int RS, int SLIP>
__global__ void tma_matmul_kernel(const __grid_constant__ CUtensorMap out, const __grid_constant__ CUtensorMap a,
                                  const __grid_constant__ CUtensorMap b, int K) {
    extern __shared__ __align__(1024) char tma_smem[];
    constexpr int A_BYTES = 64 * 128, B_BYTES = (N + 63) / 64 * 64 * 128, STAGE = A_BYTES + B_BYTES;
    char* result = tma_smem + 2 * STAGE;  // (64,N) in columns of 64
    uint64_t *full = (uint64_t*)(result + B_BYTES), *empty = full + 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], 128);
        }
        if (SLIP != NO_INIT_FENCE) mbarrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x > 128) return;
        for (int k = 0, i = 0; k < K; k += 64, i++) {
            char *sa = tma_smem + i % 2 * STAGE, *sb = sa + A_BYTES;
            if (SLIP != NO_EMPTY) mbarrier_wait(&empty[i % 2], i / 2 % 2 ^ 1);
            mbarrier_arrive_expect(&full[i % 2], SLIP == SHORT_BYTES ? STAGE + 16 : STAGE);
            if (SLIP == TWO_ARRIVALS) mbarrier_arrive(&full[i % 2]);
            tma_load(sa, &a, &full[i % 2], TA ? 0 : k, TA ? k : 0);
            for (int n = 0; n < N; n += 64) tma_load(sb + n * 128, &b, &full[i % 2], TB ? n : k, TB ? k : n);
        }
        return;
    }
    const int w = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float c[N / 2];
    unsigned fa[4][4];
    for (int k = 0, i = 0; k < K; k += 64, i++) {
        char *sa = tma_smem + i % 2 * STAGE, *sb = sa + A_BYTES;
        if (SLIP != NO_WAIT) mbarrier_wait(&full[i % 2], i / 2 % 2);
        uint64_t da = wgmma_descriptor(sa, A_BYTES, 1024), db = wgmma_descriptor(sb, 64 * 128, 1024);
        for (int e = 0; RS && e < 16; e++) {  // element (row, col) of the swizzled tile
            int j = e / 4, r = e % 4, row = 16 * w + g + r % 2 * 8, byte = (16 * j + r / 2 * 8 + 2 * t) * 2;
            memcpy(&fa[j][r], sa + row * 128 + (byte ^ row % 8 * 16), 4);
        }
        if (SLIP != NO_FENCE) wgmma_fence();  // behind it no register of a wgmma may be touched
        for (int j = 0; j < 4; j++) {
            const int step_a = TA ? 2048 : 32, step_b = TB ? 2048 : 32;
            if (SLIP == THREE_WARPS && w == 3 && k + 64 >= K && j == 3) continue;
            if (RS) wgmma_rs<N, TB>(c, fa[j], db + (j * step_b >> 4), k + j > 0);
            else wgmma_ss<N, TA, TB>(c, da + (j * step_a >> 4), db + (j * step_b >> 4), k + j > 0);
        }
        wgmma_commit();
        if (SLIP == OWN_COMMIT && w == 3) wgmma_commit();
        if (SLIP == TOUCH) c[3] = 0;
        if (SLIP == TOUCH_A) fa[2][1]++;
        if (SLIP == EARLY_EMPTY) mbarrier_arrive(&empty[i % 2]);
        if (SLIP != EARLY_READ || k + 64 < K) wgmma_wait<0>();
        wgmma_registers<N / 2>(c);
        if (SLIP != EARLY_EMPTY) mbarrier_arrive(&empty[i % 2]);
    }
    for (int e = 0; e < N / 2; e += 2) {
        int row = 16 * w + g + e / 2 % 2 * 8, col = e / 4 * 8 + 2 * t, byte = col % 64 * 2 ^ row % 8 * 16;
        __nv_bfloat162 pair = __floats2bfloat162_rn(c[e], c[e + 1]);
        memcpy(result + col / 64 * 8192 + row * 128 + byte, &pair, 4);
    }
    if (SLIP == EARLY_READ) wgmma_wait<0>();
    if (SLIP == ONE_ASYNC_FENCE ? threadIdx.x == 0 : SLIP != NO_ASYNC_FENCE && SLIP != LATE_ASYNC_FENCE)
        fence_async_shared();
    named_barrier_sync(1, 128);
    if (threadIdx.x > 0) return;
    if (SLIP == LATE_ASYNC_FENCE) fence_async_shared();  // no mistake: it is behind all writes
    for (int n = 0; n < N; n += 64) tma_store(&out, result + n * 128, n, 0);
    tma_store_commit();
    if (SLIP == OVERWRITE_STORE) memset(result, 0, 64);
    if (SLIP != NO_STORE_WAIT) tma_store_wait<0>();
}

// the largest error
template <int N, int TA, int TB, int RS, int SLIP> double tma_matmul(int K) {
    auto bf16s = [](size_t n, unsigned seed) {
        auto f = random_floats(n, seed);
        return std::vector<__nv_bfloat16>(f.begin(), f.end());
    };
    auto a = bf16s(64 * K, 20), b = bf16s(N * K, 21);
    Device<__nv_bfloat16> da(a), db(b), out(64 * N);
    constexpr int BOX = (N + 63) / 64 * 64;
    const size_t smem = 2 * (64 + BOX) * 128 + BOX * 128 + 64;
    cudaFuncSetAttribute(tma_matmul_kernel<N, TA, TB, RS, SLIP>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    tma_matmul_kernel<N, TA, TB, RS, SLIP><<<1, 160, smem>>>(
        map_of(out, 64, N, 64), TA ? map_of(da, K, 64, 64) : map_of(da, 64, K, 64),
        TB ? map_of(db, K, N, 64) : map_of(db, N, K, 64), K);
    double worst = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < N; j++) {
            double want = 0;
            for (int k = 0; k < K; k++) want += (double)(float)a[TA ? k * 64 + i : i * K + k] * (float)b[TB ? k * N + j : j * K + k];
            double off = fabs((float)out[i * N + j] - want) / (1 + fabs(want));
            worst = off <= worst ? worst : off;  // NaN stays
        }
    return worst;
}

// Each warp writes its 16 rows of a, 64 x 16 times a K-major unit matrix in b. BARRIER: and waits for the others.
template <int BARRIER> __global__ void own_rows_kernel(float* out, const __grid_constant__ CUtensorMap) {
    extern __shared__ __align__(1024) char rows_smem[];
    for (int i = threadIdx.x; i < 64 * 64; i += 128) {
        const int row = i / 64, byte = i % 64 * 2 ^ row % 8 * 16;
        const __nv_bfloat16 one(row == i % 64 ? 1.0f : 0.0f);
        memcpy(rows_smem + 8192 + row * 128 + byte, &one, 2);
    }
    fence_async_shared();
    __syncthreads();
    for (int i = threadIdx.x % 32; i < 16 * 64; i += 32) {
        const int row = threadIdx.x / 32 * 16 + i / 64, byte = i % 64 * 2 ^ row % 8 * 16;
        const __nv_bfloat16 x(row + i % 64 / 64.0f);
        memcpy(rows_smem + row * 128 + byte, &x, 2);
    }
    fence_async_shared();
    if (BARRIER) named_barrier_sync(1, 128);
    else __syncwarp();
    float c[32];
    wgmma_fence();
    wgmma_ss<64, 0, 0>(c, wgmma_descriptor(rows_smem, 16, 1024), wgmma_descriptor(rows_smem + 8192, 16, 1024), 0);
    wgmma_commit();
    wgmma_wait<0>();
    out[threadIdx.x] = c[0];  // row 16 warp + lane / 4, column 2 (lane % 4)
}
template <int BARRIER> std::vector<float> own_rows() {
    Device<float> out(128);
    Device<__nv_bfloat16> none(64);
    own_rows_kernel<BARRIER><<<1, 128, 16384>>>(out, map_of(none, 1, 64, 1));
    return out.host();
}

__global__ void unwritten_kernel(float* out, const __grid_constant__ CUtensorMap) {
    extern __shared__ __align__(1024) char unwritten_smem[];
    float c[32];
    const uint64_t tile = wgmma_descriptor(unwritten_smem, 16, 1024);
    wgmma_fence();
    wgmma_ss<64, 0, 0>(c, tile, tile, 0);
    wgmma_commit();
    wgmma_wait<0>();
    out[threadIdx.x] = c[0];
}

static void test_tma_wgmma() {  // 200: the last box is half outside
    auto close = [](double error, int line) { EXPECT(error < 4e-3, "line %d: off by %.2e", line, error); };
    for (int K : {64, 128, 200, 456}) {
        close(tma_matmul<64, 0, 0, 0, NONE>(K), __LINE__);
        close(tma_matmul<64, 1, 0, 0, NONE>(K), __LINE__);
        close(tma_matmul<128, 0, 1, 0, NONE>(K), __LINE__);
        close(tma_matmul<192, 1, 1, 0, NONE>(K), __LINE__);
        close(tma_matmul<96, 0, 0, 0, NONE>(K), __LINE__);
        close(tma_matmul<96, 0, 1, 0, NONE>(K), __LINE__);
        close(tma_matmul<160, 0, 0, 1, NONE>(K), __LINE__);
        close(tma_matmul<256, 0, 1, 1, NONE>(K), __LINE__);
        close(tma_matmul<64, 0, 0, 0, LATE_ASYNC_FENCE>(K), __LINE__);
    }
    Device<float> nothing(std::vector<float>(128, 0));
    Device<__nv_bfloat16> none(64);
    unwritten_kernel<<<1, 128, 8192>>>(nothing, map_of(none, 1, 64, 1));
    for (int i = 0; i < 128; i++) EXPECT(std::isnan(nothing[i]), "of what nobody wrote thread %d got %g", i, nothing[i]);
    const std::vector<float> rows = own_rows<1>();
    for (int i = 0; i < 128; i++) {
        const __nv_bfloat16 want(i / 32 * 16 + i % 32 / 4 + i % 4 * 2 / 64.0f);
        EXPECT(rows[i] == float(want), "thread %d: %g, want %g", i, rows[i], float(want));
    }
}

// Loads: outside the tensor zero, also at negative coordinates; the swizzle; four dimensions. Stores drop what is
// outside.
__global__ void tma_box_kernel(unsigned short* out, const __grid_constant__ CUtensorMap in,
                               const __grid_constant__ CUtensorMap back, int c0, int c1, int c2, int c3) {
    extern __shared__ __align__(1024) char tma_smem[];
    uint64_t* bar = (uint64_t*)(tma_smem + 12 * 128);
    if (threadIdx.x > 0) return;
    mbarrier_init(bar, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(bar, 12 * 128);
    tma_load(tma_smem, &in, bar, c0, c1, c2, c3);
    mbarrier_wait(bar, 0);
    for (int i = 0; i < 12 * 64; i++) out[i] = ((unsigned short*)tma_smem)[i];
    tma_store(&back, tma_smem, c0, c1, c2, c3);
    tma_store_commit();
    tma_store_wait<0>();
}

// out (64) = 2 threadIdx.x, by a store and an addition of floats side by side
__global__ void bulk_kernel(float* out, const __grid_constant__ CUtensorMap) {
    extern __shared__ __align__(1024) float bulk_smem[];
    bulk_smem[threadIdx.x] = threadIdx.x;
    fence_async_shared();
    __syncthreads();
    if (threadIdx.x > 0) return;
    bulk_store(out, bulk_smem, 64 * 4);
    tma_store_commit();
    tma_store_wait_written<0>();
    bulk_add(out, bulk_smem, 64 * 4);
    tma_store_commit();
    tma_store_wait_written<0>();
}

enum TurnSlip {  // what turns_kernel does wrong
    RIGHT, NO_TURN, NO_READ_WAIT, PLAIN_FLAG, FLAG_BEFORE, READ_WAIT, NO_GLOBAL_FENCE, SHARED_FENCE, WRITE_AFTER_FENCE, ONE_FENCE,
    SHUFFLE
};

// Blocks of 32 threads add 1 to data (32), one after the other; the first writes there; the last gives what is there.
template <int SLIP>
__global__ void turns_kernel(float* out, float* data, int* turn, const __grid_constant__ CUtensorMap) {
    extern __shared__ __align__(1024) float turns_smem[];
    const int block = blockIdx.x;
    turns_smem[threadIdx.x] = 1;
    if (SLIP != ONE_FENCE || threadIdx.x == 3) fence_async_shared();
    if (SLIP == SHUFFLE) __shfl_sync(~0u, 0, 0);
    else __syncwarp();
    if (threadIdx.x == 0 && SLIP != NO_TURN)
        while (flag_read(turn) != block) flag_pause();
    if (SLIP != SHUFFLE) __syncwarp();
    if (threadIdx.x == 0) {
        if (SLIP == SHARED_FENCE) fence_async_shared();
        else if (SLIP != NO_GLOBAL_FENCE) fence_async_global();
        if (SLIP == WRITE_AFTER_FENCE) data[5]++;
        if (block == 0) bulk_store(data, turns_smem, 32 * 4);
        else bulk_add(data, turns_smem, 32 * 4);
        tma_store_commit();
        if (SLIP == FLAG_BEFORE) flag_write(turn, block + 1);
        if (SLIP == NO_READ_WAIT) turns_smem[7] = 2;
        if (SLIP == READ_WAIT) tma_store_wait<0>();
        else tma_store_wait_written<0>();
        if (SLIP == PLAIN_FLAG) *turn = block + 1;
        else if (SLIP != FLAG_BEFORE) flag_write(turn, block + 1);
    }
    __syncwarp();
    if (block == (int)gridDim.x - 1) out[threadIdx.x] = __ldcg(data + threadIdx.x);
}
template <int SLIP> std::vector<float> turns() {
    Device<float> out(32), data(random_floats(32, 30));
    Device<int> turn(std::vector<int>(1, 0));
    turns_kernel<SLIP><<<7, 32, 32 * 4>>>(out, data, turn, map_of((__nv_bfloat16*)data.data, 1, 64, 1));
    return out.host();
}

// out: what a thread of another warp wrote to the tensor's begin, through a bulk copy
template <int FENCED>
__global__ void global_write_kernel(int* out, int* data, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) int global_smem[];
    uint64_t* bar = (uint64_t*)(global_smem + 32);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_fence_init();
    }
    if (threadIdx.x == 40) {
        data[0] = 77;
        if (FENCED) fence_async_global();
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    mbarrier_arrive_expect(bar, 128);
    tma_load(global_smem, &map, bar, 0, 0);
    mbarrier_wait(bar, 0);
    *out = global_smem[0];
}
template <int FENCED> int global_write() {
    Device<int> out(1), data(std::vector<int>(32, 0));
    global_write_kernel<FENCED><<<1, 64, 256>>>(out, data, map_of((__nv_bfloat16*)data.data, 1, 64, 1));
    return *out.data;
}

// A thread writes where a bulk copy puts something: behind its phase or, EARLY, before; by stmatrix or not.
template <int EARLY, int MATRIX>
__global__ void written_copy_kernel(int* out, const __grid_constant__ CUtensorMap map) {
    extern __shared__ __align__(1024) int written_smem[];
    uint64_t* bar = (uint64_t*)(written_smem + 256);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect(bar, 8 * 128);
        tma_load(written_smem, &map, bar, 0, 0);
    }
    __syncthreads();
    if (!EARLY) mbarrier_wait(bar, 0);
    const unsigned r[4] = {3, 3, 3, 3};
    if (MATRIX) stmatrix_x4(written_smem + threadIdx.x * 4, r);
    else written_smem[threadIdx.x] = 3;
    __syncthreads();
    if (EARLY) mbarrier_wait(bar, 0);
    if (threadIdx.x == 0) *out = written_smem[0];
}
template <int EARLY, int MATRIX> int written_copy() {
    Device<int> out(1);
    Device<__nv_bfloat16> data(8 * 64);
    written_copy_kernel<EARLY, MATRIX><<<1, 32, 1032>>>(out, map_of(data, 8, 64, 8));
    return *out.data;
}

// A store is late: after the wait for its read the memory may still be as it was.
__global__ void late_kernel(float* out, float* data, const __grid_constant__ CUtensorMap) {
    extern __shared__ __align__(1024) float late_smem[];
    for (int i = 0; i < 4; i++) late_smem[i] = 5;
    fence_async_shared();
    bulk_store(data, late_smem, 16);
    tma_store_commit();
    tma_store_wait<0>();
    late_smem[2] = 6;  // it has been read
    out[0] = data[2];
    tma_store_wait_written<0>();
    out[1] = data[2];
}

static void test_order() {
    for (float x : turns<RIGHT>()) EXPECT(x == 7, "seven turns of 1 gave %g", x);
    EXPECT(global_write<1>() == 77, "a bulk copy read %d", global_write<1>());
    EXPECT((written_copy<0, 0>()) == 3, "%s", "what was written over a bulk copy is lost");
    EXPECT((written_copy<0, 1>()) == 3, "%s", "what stmatrix wrote over a bulk copy is lost");
    Device<float> out(2), data(std::vector<float>(32, 1));
    late_kernel<<<1, 1, 16>>>(out, data, map_of((__nv_bfloat16*)data.data, 1, 64, 1));
    EXPECT(out[0] == 1 && out[1] == 5, "before and after the wait for the write %g and %g", out[0], out[1]);
}

// Blocks are under way together: what one writes between another's read and write is lost.
__global__ void lost_kernel(int* count) {
    const int before = *count;
    __syncthreads();
    if (threadIdx.x == 0) *count = before + 1;
}
// The first block waits for the second.
__global__ void backward_flag_kernel(int* flag) {
    if (blockIdx.x == 0)
        while (flag_read(flag) != 1) flag_pause();
    else flag_write(flag, 1);
}
__global__ void never_kernel(int* flag) {
    if (threadIdx.x == 9)
        while (flag_read(flag) != 1) flag_pause();
}
__global__ void half_warps_kernel() {
    if (threadIdx.x % 32 < 16) named_barrier_sync(3, 32);
}
__global__ void unwatched_kernel() { fence_async_shared(); }

static void test_blocks_together() {
    Device<int> count(std::vector<int>(2, 0));
    lost_kernel<<<500, 32>>>(count);
    EXPECT(0 < count[0] && count[0] < 500, "500 blocks counted %d", count[0]);
    backward_flag_kernel<<<2, 32>>>(count + 1);
}

__global__ void registers_kernel() {  // of 504 for a thread of each group 512
    if (threadIdx.x < 128) registers_less<32>();
    else registers_more<240>();
}

__global__ void wrong_way_kernel() { registers_less<240>(); }  // of 168
__global__ void one_lane_kernel() {
    if (threadIdx.x % 32 == 0) registers_less<32>();
}
__global__ void three_of_four_kernel() {
    if (threadIdx.x < 96) registers_less<32>();
}

static void test_bulk() {
    Device<float> out(std::vector<float>(65, NAN));
    Device<__nv_bfloat16> none(64);
    bulk_kernel<<<1, 64, 64 * 4>>>(out, map_of(none, 1, 64, 1));
    for (int i = 0; i < 64; i++) EXPECT(out[i] == 2 * i, "%d: %g", i, out[i]);
    EXPECT(std::isnan(out[64]), "written beyond the end");
}

static void test_tma_boxes() {
    const int D[4] = {72, 5, 4, 3}, BOX[4] = {64, 3, 2, 2};
    const size_t size = 72 * 5 * 4 * 3;
    std::vector<__nv_bfloat16> values(size);
    for (size_t i = 0; i < size; i++) values[i] = __ushort_as_bfloat16(i);
    Device<__nv_bfloat16> in(values), back(size);
    Device<unsigned short> out(12 * 64);
    cuuint64_t dims[4] = {72, 5, 4, 3}, strides[3] = {144, 720, 2880};
    cuuint32_t box[4] = {64, 3, 2, 2}, steps[4] = {1, 1, 1, 1};
    auto encode = [&](CUtensorMap& map, __nv_bfloat16* base) {
        return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, base, dims, strides, box, steps,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUtensorMap map, to;
    EXPECT(encode(map, in + 1) == CUDA_ERROR_INVALID_VALUE, "%s", "a base at 2 bytes is accepted");
    strides[0] = 136;
    EXPECT(encode(map, in) == CUDA_ERROR_INVALID_VALUE, "%s", "a stride of 136 bytes is accepted");
    strides[0] = 144;
    EXPECT(encode(map, in) == CUDA_SUCCESS && encode(to, back) == CUDA_SUCCESS, "%s", "a good map is refused");
    for (auto at : {std::array<int, 4>{0, 0, 0, 0}, {64, 3, 3, 2}, {-8, -1, -1, -1}, {8, 2, 1, 1}}) {
        cudaMemset(back, 0xFF, size * 2);
        tma_box_kernel<<<1, 32, 12 * 128 + 8>>>(out, map, to, at[0], at[1], at[2], at[3]);
        std::vector<bool> touched(size);
        for (int i = 0; i < 12 * 64; i++) {
            int row = i / 64, x[4] = {at[0] + i % 64, at[1] + row % BOX[1], at[2] + row / BOX[1] % BOX[2],
                                      at[3] + row / BOX[1] / BOX[2]};
            bool inside = true;
            for (int d = 0; d < 4; d++) inside = inside && 0 <= x[d] && x[d] < D[d];
            size_t from = inside ? ((x[3] * 4 + x[2]) * 5 + x[1]) * 72 + x[0] : 0;
            if (inside) touched[from] = true;
            unsigned want = inside ? from : 0, got = out[row * 64 + (i % 64 ^ row % 8 * 8)];
            EXPECT(got == want, "element %d: %u, want %u", i, got, want);
        }
        for (size_t i = 0; i < size; i++) {
            unsigned got = __bfloat16_as_ushort(back[i]), want = touched[i] ? i : 0xFFFF;
            EXPECT(got == want, "stored element %zu: %u, want %u", i, got, want);
        }
    }
}

// Producer and consumer warps through named barriers: sync waits for both, arrive does not wait.
__global__ void named_barrier_kernel(int* out) {
    __shared__ int value;
    const bool producer = threadIdx.x < 32;
    for (int i = 0; i < 20; i++) {
        if (producer) {
            named_barrier_sync(1, 64);  // the value has been read
            if (threadIdx.x == 0) value = i;
            named_barrier_arrive(2, 64);
        } else {
            named_barrier_arrive(1, 64);
            named_barrier_sync(2, 64);
            out[i * 32 + threadIdx.x - 32] = value;
        }
    }
}

static void test_named_barriers() {
    Device<int> out(640);
    named_barrier_kernel<<<1, 64>>>(out);
    for (int i = 0; i < 640; i++) EXPECT(out[i] == i / 32, "element %d is %d", i, out[i]);
}

__global__ void mbarrier_stuck_kernel(int arrivals) {  // 31 threads arrive
    __shared__ uint64_t bar;
    if (threadIdx.x == 0) {
        mbarrier_init(&bar, arrivals);
        mbarrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x > 0) mbarrier_arrive(&bar);
    mbarrier_wait(&bar, 0);
}
enum MbarrierSlip { WELL, UNSEEN_INIT, UNSEEN_PHASE, SECOND_INIT, MANY_BYTES };
template <int SLIP> __global__ void mbarrier_kernel(int* out, const __grid_constant__ CUtensorMap) {
    extern __shared__ uint64_t mbarrier_smem[];
    uint64_t* bar = mbarrier_smem;
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        mbarrier_fence_init();
    }
    if (SLIP == UNSEEN_INIT) __shfl_sync(~0u, 0, 0);
    else __syncwarp();
    if (threadIdx.x != 9) return;
    if (SLIP == SECOND_INIT) mbarrier_init(bar, 1);
    if (SLIP == MANY_BYTES) mbarrier_arrive_expect(bar, 1 << 20);
    for (int i = 0; i < 3; i++) {
        mbarrier_arrive(bar);
        if (SLIP != UNSEEN_PHASE) mbarrier_wait(bar, i % 2);
    }
    *out = 3;
}
template <int SLIP> int mbarrier_phases() {
    Device<int> out(std::vector<int>(1, 0));
    Device<__nv_bfloat16> none(64);
    mbarrier_kernel<SLIP><<<1, 32, 8>>>(out, map_of(none, 1, 64, 1));
    return *out.data;
}
__global__ void no_mbarrier_kernel() {
    __shared__ uint64_t bar;
    mbarrier_wait(&bar, 0);
}
__global__ void named_stuck_kernel() {
    if (threadIdx.x < 32) named_barrier_sync(3, 96);
    else named_barrier_arrive(3, 96);
}
__global__ void named_twice_kernel() {  // one warp for two
    if (threadIdx.x >= 32) return;
    named_barrier_arrive(3, 64);
    named_barrier_sync(3, 64);
}

// ---------------------------------------------------------------------------------------------------------------------
// Exact geometry: deliberate mistakes, each in a process of its own

__global__ void race_kernel(int* out) {  // who writes last?
    __shared__ int last;
    last = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) *out = last;
}
__global__ void missing_thread_kernel() {
    if (threadIdx.x < 32) return;
    __syncthreads();
}
__global__ void missing_lane_kernel(float* out) {
    if (threadIdx.x != 40) *out = __shfl_xor_sync(0xffffffff, 1.0f, 1);
    else __syncthreads();
}
__global__ void two_barriers_kernel() {
    if (threadIdx.x == 3) __syncthreads();
    else __syncthreads();
}
__global__ void not_in_mask_kernel() { __syncwarp(0xfffffffe); }
__global__ void short_warp_kernel(float* out) { *out = __shfl_down_sync(0xffffffff, 1.0f, 1); }
__global__ void unaligned_kernel(unsigned* out) {
    __shared__ char s[1024];
    ldmatrix_x4(out + 4 * threadIdx.x, s + 16 * threadIdx.x + 8);
}
__global__ void overrun_kernel() {
    __shared__ float s[33];
    s[threadIdx.x + 1] = 0;
}
__global__ void dynamic_overrun_kernel() {
    extern __shared__ float s[];
    s[threadIdx.x] = 0;
}

static int mistake(const std::string& name) {
    Device<float> f(1024);
    if (name == "race") {
        Device<int> out(1);
        race_kernel<<<1, 128>>>(out);
        printf("%d\n", out[0]);
    }
    if (name == "correct")
        for (double sum : row_sums(5, 77)) printf("%.17g ", sum);
    if (name == "missing_thread") missing_thread_kernel<<<dim3(2, 2), 128>>>();
    if (name == "missing_lane") missing_lane_kernel<<<1, 64>>>(f);
    if (name == "two_barriers") two_barriers_kernel<<<1, 64>>>();
    if (name == "not_in_mask") not_in_mask_kernel<<<1, 32>>>();
    if (name == "short_warp") short_warp_kernel<<<1, 48>>>(f);
    if (name == "unaligned") unaligned_kernel<<<1, 32>>>((unsigned*)f.data);
    if (name == "overrun") overrun_kernel<<<1, 33>>>();
    if (name == "early_read") printf("%g", tma_matmul<64, 0, 0, 0, EARLY_READ>(128));
    if (name == "no_wait") printf("%g", tma_matmul<64, 0, 0, 0, NO_WAIT>(128));
    if (name == "no_empty") printf("%g", tma_matmul<64, 0, 0, 0, NO_EMPTY>(456));
    if (name == "no_fence") tma_matmul<64, 0, 0, 0, NO_FENCE>(128);
    if (name == "no_async_fence") tma_matmul<64, 0, 0, 0, NO_ASYNC_FENCE>(128);
    if (name == "touch") tma_matmul<64, 0, 0, 0, TOUCH>(128);
    if (name == "short_bytes") tma_matmul<64, 0, 0, 0, SHORT_BYTES>(128);
    if (name == "two_arrivals") tma_matmul<64, 0, 0, 0, TWO_ARRIVALS>(128);
    if (name == "no_init_fence") tma_matmul<64, 0, 0, 0, NO_INIT_FENCE>(128);
    if (name == "own_commit") tma_matmul<64, 0, 0, 0, OWN_COMMIT>(128);
    if (name == "three_warps") tma_matmul<64, 0, 0, 0, THREE_WARPS>(128);
    if (name == "no_store_wait") tma_matmul<64, 0, 0, 0, NO_STORE_WAIT>(128);
    if (name == "registers") registers_kernel<<<1, 384>>>();
    if (name == "wrong_way") wrong_way_kernel<<<1, 384>>>();
    if (name == "one_lane") one_lane_kernel<<<1, 384>>>();
    if (name == "three_of_four") three_of_four_kernel<<<1, 384>>>();
    if (name == "overwrite_store") tma_matmul<64, 0, 0, 0, OVERWRITE_STORE>(128);
    if (name == "mbarrier_stuck") mbarrier_stuck_kernel<<<1, 32>>>(32);
    if (name == "unseen_init") mbarrier_phases<UNSEEN_INIT>();
    if (name == "unseen_phase") mbarrier_phases<UNSEEN_PHASE>();
    if (name == "second_init") mbarrier_phases<SECOND_INIT>();
    if (name == "many_bytes") mbarrier_phases<MANY_BYTES>();
    if (name == "no_mbarrier") no_mbarrier_kernel<<<1, 32>>>();
    if (name == "named_stuck") named_stuck_kernel<<<1, 64>>>();
    if (name == "named_twice") named_twice_kernel<<<1, 64>>>();
    if (name == "early_empty") tma_matmul<64, 0, 0, 0, EARLY_EMPTY>(456);
    if (name == "one_async_fence") tma_matmul<64, 0, 0, 0, ONE_ASYNC_FENCE>(128);
    if (name == "touch_a") tma_matmul<160, 0, 0, 1, TOUCH_A>(128);
    if (name == "no_turn") turns<NO_TURN>();
    if (name == "no_read_wait") turns<NO_READ_WAIT>();
    if (name == "plain_flag") turns<PLAIN_FLAG>();
    if (name == "flag_before") turns<FLAG_BEFORE>();
    if (name == "read_wait") turns<READ_WAIT>();
    if (name == "no_global_fence") turns<NO_GLOBAL_FENCE>();
    if (name == "shared_fence") turns<SHARED_FENCE>();
    if (name == "write_after_fence") turns<WRITE_AFTER_FENCE>();
    if (name == "one_fence") turns<ONE_FENCE>();
    if (name == "shuffle") turns<SHUFFLE>();
    if (name == "global_write") global_write<0>();
    if (name == "own_rows") own_rows<0>();
    if (name == "written_copy") written_copy<1, 0>();
    if (name == "written_copy_matrix") written_copy<1, 1>();
    if (name == "never") never_kernel<<<3, 32>>>((int*)f.data);
    if (name == "half_warps") half_warps_kernel<<<1, 64>>>();
    if (name == "unwatched") unwatched_kernel<<<1, 1>>>();
    if (name == "dynamic_overrun") dynamic_overrun_kernel<<<1, 33, 128>>>();
    return 0;
}

struct Result { int code; std::string output; };
static Result run_mistake(const std::string& name, int seed = 1) {
    std::string command = "CUDA_CPU_SEED=" + std::to_string(seed) + " " + program + " " + name + " 2>&1", output;
    FILE* pipe = popen(command.c_str(), "r");
    char text[256];
    while (fgets(text, sizeof text, pipe)) output += text;
    return {WEXITSTATUS(pclose(pipe)), output};
}

static void expect_report(const char* name, std::vector<const char*> parts, int seed = 1) {
    Result r = run_mistake(name, seed);
    EXPECT(r.code == 1, "%s: exit code %d", name, r.code);
    EXPECT(r.output.find('\n') == r.output.size() - 1, "%s: not one line: %s", name, r.output.c_str());
    for (const char* part : parts)
        EXPECT(r.output.find(part) != std::string::npos, "%s: no \"%s\" in: %s", name, part, r.output.c_str());
}

static void test_reports() {
    expect_report("missing_thread", {"cuda: kernel missing_thread_kernel, block (0,0,0) of 128 threads: ",
                                     "96 threads (32-127) wait at __syncthreads dev/cpu/test_standin.cu:",
                                     ", but 32 threads (0-31) have left the kernel"});
    expect_report("missing_lane", {"31 threads (32-39,41-63) wait at __shfl_xor_sync dev/cpu/test_standin.cu:",
                                   " with mask ffffffff", "1 thread (40) waits at __syncthreads",
                                   ", but 32 threads (0-31) have left the kernel"});
    expect_report("two_barriers", {"63 threads (0-2,4-63) wait at __sync", "1 thread (3) waits at __syncthreads"});
    expect_report("not_in_mask", {"thread 0 is at __syncwarp ", "not in its mask"});
    expect_report("short_warp", {"16 threads (32-47) wait at __shfl_down_sync", "of 48 threads", "mask ffffffff"});
    expect_report("unaligned", {"is at ldmatrix_x4 ", "not 16-byte aligned"});
}

static void test_hopper_reports() {
    expect_report("mbarrier_stuck", {"32 threads (0-31) wait at mbarrier_wait dev/cpu/test_standin.cu:"});
    expect_report("named_stuck", {"32 threads (0-31) wait at named_barrier_sync", "but 32 threads (32-63) have left"});
    expect_report("named_twice", {"is at named_barrier_sync", "the warp comes again before the barrier is complete"});
    EXPECT(mbarrier_phases<WELL>() == 3, "%s", "a thread did not get through three phases");
    expect_report("unseen_init", {"thread 9 is at mbarrier_arrive", "initialised was not passed on"});
    expect_report("unseen_phase", {"thread 9 is at mbarrier_arrive", "nobody has waited for the phase before"});
    expect_report("second_init", {"thread 9 is at mbarrier_init", "there is an mbarrier already"});
    expect_report("many_bytes", {"more than 2^20 - 1 bytes"});
    expect_report("no_mbarrier", {"is at mbarrier_wait ", "no mbarrier there"});
    expect_report("no_fence", {"no wgmma_fence"});
    expect_report("no_async_fence", {"tma_store", "without fence_async_shared"});
    expect_report("touch_a", {"is at wgmma_rs", "the registers of A were written to before the wait"});
    expect_report("half_warps", {"32 threads (0-15,32-47) wait at named_barrier_sync"});
    expect_report("never", {"1 thread (9) waits at flag_read dev/cpu/test_standin.cu:"});
    expect_report("unwatched", {"the kernel is not watched"});
    for (int seed = 1; seed <= 5; seed++) {  // whatever the order in which threads and copies go on
        expect_report("one_async_fence", {"is at tma_store", "wrote without fence_async_shared on the way"}, seed);
        expect_report("no_wait", {"kernel tma_matmul_kernel"}, seed);  // whichever comes first
        expect_report("no_empty", {": thread 128"}, seed);
        expect_report("early_empty", {"is at tma_load", "that a wgmma of warp"}, seed);
        expect_report("no_turn", {"global memory"}, seed);
        expect_report("no_read_wait", {"shared memory at 28 that a bulk copy of thread 0 reads"}, seed);
        expect_report("plain_flag", {"kernel turns_kernel"}, seed);
        for (const char* name : {"flag_before", "read_wait"}) expect_report(name, {"not waited for"}, seed);
        expect_report("no_global_fence", {"is at bulk_add", "that a bulk copy of another block wrote"}, seed);
        expect_report("shared_fence", {"is at bulk_add", "that a bulk copy of another block wrote"}, seed);
        expect_report("write_after_fence", {"is at bulk_", "that thread 0 wrote without fence_async_global"}, seed);
        expect_report("own_rows", {"kernel own_rows_kernel"}, seed);  // read too early or written too late
        expect_report("written_copy", {"is at a store before", "that a bulk copy writes"}, seed);
        expect_report("written_copy_matrix", {"is at stmatrix_x4", "that a bulk copy writes"}, seed);
        expect_report("global_write", {"is at tma_load", "that thread 40 wrote without fence_async_global"}, seed);
        for (const char* name : {"one_fence", "shuffle"})
            expect_report(name, {"is at bulk_store", "wrote without fence_async_shared"}, seed);
    }
    expect_report("overwrite_store", {"is at a store before", "that a bulk copy of thread 0 reads"});
    expect_report("touch", {"written to before the wait"});
    expect_report("short_bytes", {"wait at mbarrier_wait"});
    expect_report("two_arrivals", {"is at mbarrier_arrive", "more arrivals"});
    expect_report("no_init_fence", {"before mbarrier_fence_init"});
    expect_report("own_commit", {"is at wgmma", "another warp of the group has another wgmma here"});
    expect_report("three_warps", {"warp 3 left out a wgmma"});
    expect_report("wrong_way", {"is at registers_less", "from 168 registers a thread to 240"});
    expect_report("one_lane", {"12 threads (0,32,", "wait at registers_less"});
    expect_report("three_of_four", {"warp 3 has other registers than its warpgroup's first warp"});
    expect_report("registers", {"the warps ask for 2048 registers together", "of 2016"});
    for (const char* name : {"early_read", "no_store_wait"}) {  // a copy may always be in time
        int caught = 0;
        for (int seed = 1; seed <= 5; seed++) {
            Result r = run_mistake(name, seed);
            caught += r.output.find("nan") != std::string::npos || r.code == 1;
        }
        EXPECT(caught > 0, "nobody noticed %s", name);
    }
}

static void test_seeds() {
    std::string race, same = run_mistake("correct", 1).output;
    bool differs = false;
    for (int seed = 1; seed <= 5; seed++) {
        Result r = run_mistake("race", seed), again = run_mistake("race", seed), c = run_mistake("correct", seed);
        EXPECT(r.code == 0 && r.output == again.output, "seed %d gave %s and %s", seed, r.output.c_str(),
               again.output.c_str());
        EXPECT(c.code == 0 && c.output == same && !same.empty(), "a correct kernel changed with seed %d", seed);
        if (!race.empty() && r.output != race) differs = true;
        race = r.output;
    }
    EXPECT(differs, "%s", "a race gave the same result with five seeds");
}

#ifdef __SANITIZE_ADDRESS__
static void test_overruns() {
    for (const char* name : {"overrun", "dynamic_overrun"}) {
        Result r = run_mistake(name);
        EXPECT(r.code != 0 && r.output.find("heap-buffer-overflow") != std::string::npos, "%s: exit code %d, %s", name,
               r.code, r.output.substr(0, 200).c_str());
    }
}
#endif

__global__ void busy_kernel(float* out) {  // 100 meetings
    float v = threadIdx.x;
    for (int i = 0; i < 50; i++) {
        v += __shfl_xor_sync(~0u, v, 1) * 0.5f;
        __syncthreads();
    }
    out[threadIdx.x] = v;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// A kernel as the trainer writes them, large enough to time; the speed is printed, not judged.

static double seconds(std::function<void()> body) {  // best of several
    double best = 1e30;
    for (int i = 0; i < 7; i++) {
        auto start = std::chrono::steady_clock::now();
        body();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

#define RMSNORM_ROW                                                                       \
    const float* row = x + (size_t)blockIdx.x * C;                                        \
    float sum = 0;                                                                        \
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += row[c] * row[c];             \
    for (int m = WARP_SIZE / 2; m > 0; m /= 2) sum += __shfl_xor_sync(0xffffffff, sum, m); \
    float r = rsqrtf(sum / C + 1e-5f);                                                    \
    for (int c = threadIdx.x; c < C; c += blockDim.x) out[(size_t)blockIdx.x * C + c] = g[c] * row[c] * r;

__global__ void rmsnorm_kernel(float* out, const float* x, const float* g, int C) { RMSNORM_ROW }

static void test_rmsnorm() {
    int R = WARP_SIZE == 1 ? 8192 : 256, C = 2048;  // 64 MiB each way in the serial geometry
    auto v = random_floats((size_t)R * C, 10), gain = random_floats(C, 11);
    Device<float> x(v), g(gain), out((size_t)R * C);
    double s = seconds([&] { rmsnorm_kernel<<<R, 32>>>(out, x, g, C); });
    printf("   rmsnorm of (%d,%d): %.1f GB/s read and written\n", R, C, 8.0 * R * C / s * 1e-9);
    double worst = 0;
    for (int r = 0; r < R; r += R / 8) {
        double sum = 0;
        for (int c = 0; c < C; c++) sum += (double)v[r * C + c] * v[r * C + c];
        for (int c = 0; c < C; c++) {
            double want = gain[c] * v[r * C + c] / sqrt(sum / C + 1e-5);
            worst = std::max(worst, fabs(out[r * C + c] - want) / (1 + fabs(want)));
        }
    }
    EXPECT(worst < 7e-7, "off by %.2e", worst);  // measured: 1.2e-7, without vectors 5.3e-7
#ifdef EXACT_GEOMETRY
    Device<float> few(128);
    s = seconds([&] { busy_kernel<<<1, 128>>>(few); });
    printf("   a block of 128 threads with 50 shuffles and 50 barriers: %.2f ms\n", s * 1e3);
#endif
}

// CUDA_CPU_FAIL: the call of that number does nothing but fail; with `once` those after it go on, else none does.
static void test_faults() {
    const CudaFault none = cuda_cpu_fault;
    float* p = nullptr;
    for (bool once : {true, false}) {
        cuda_cpu_calls = 0;
        cuda_cpu_fault = {2, once};
        EXPECT(cudaMalloc(&p, 64) == cudaSuccess, "call 1 fails");
        p[0] = 3.0f;
        EXPECT(cudaMemset(p, 0, 4) == cudaErrorIllegalAddress && p[0] == 3.0f, "call 2 does its work");
        EXPECT((cudaMemset(p, 0, 4) == cudaSuccess) == once, "call 3");
        cublasLtMatmulDesc_t desc = nullptr;
        EXPECT((cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS) == once, "4");
        EXPECT((cudaGetLastError() == cudaErrorIllegalAddress), "what failed is not the last error");
        cuda_cpu_fault = none;
        cudaGetLastError();
        if (desc) cublasLtMatmulDescDestroy(desc);
        cudaFree(p);
    }
}

int main(int argc, char** argv) {
    program = argv[0];
    setvbuf(stdout, nullptr, _IOLBF, 0);
#ifdef EXACT_GEOMETRY
    if (argc == 2) return mistake(argv[1]);
#endif
    if (argc != 1) return fprintf(stderr, "%s: takes no arguments. Run it alone.\n", program), 1;
    test("launch_forms", test_launch_forms);
    test("faults (CUDA_CPU_FAIL)", test_faults);
    test("grid_3d", test_grid_3d);
    test("launch_limits", test_launch_limits);
    test("reduction", test_reduction);
    test("shared_tile", test_shared_tile);
    test("expf", test_expf);
    test("erff", test_erff);
    test("fmaxf", test_fmaxf);
    test("bf16", test_bf16);
    test("matmul_float", [] { check_matmuls<float, float>(2e-6); });
    test("matmul_bf16", [] { check_matmuls<__nv_bfloat16, __nv_bfloat16>(4e-3); });  // half an ulp of bf16: 3.9e-3
    test("matmul_bf16_to_float", [] { check_matmuls<__nv_bfloat16, float>(8e-7); });
    test("algorithms", test_algorithms);
    test("shares", test_shares);
    test("subnormals", test_subnormals);
    test("signals", test_signals);
    test("memory", test_memory);
    test("host_api", test_host_api);
    test("missing_wait", test_missing_wait);
    test("waits", test_waits);
    test("graphs", test_graphs);
    test("events", test_events);
    test("sync", test_sync);
    test("by_value", test_by_value);
    test("trace", test_trace);
    test("rmsnorm", test_rmsnorm);
#ifdef EXACT_GEOMETRY
    test("inexact functions", test_inexact);
    test("shuffles", [] {
        check_shuffles<float>();
        check_shuffles<int>();
        check_shuffles<unsigned>();
        check_shuffles<double>();
    });
    test("mma", test_mma);
    test("ldmatrix", test_ldmatrix);
    test("uninitialised_shared", test_uninitialised_shared);
    test("tma_wgmma", test_tma_wgmma);
    test("tma_boxes", test_tma_boxes);
    test("bulk", test_bulk);
    test("named_barriers", test_named_barriers);
    test("order", test_order);
    test("blocks_together", test_blocks_together);
    test("reports", test_reports);
    test("hopper_reports", test_hopper_reports);
    test("seeds", test_seeds);
#ifdef __SANITIZE_ADDRESS__
    test("overruns", test_overruns);
#endif
#endif
    printf("test_standin: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
