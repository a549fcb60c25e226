// The part of cuBLASLt that the trainer uses, over a CPU's library (gemm.h): D = alpha op(A) op(B) + beta C,
// column-major, C == D. A and B both float or both bfloat16, D either. Products of bfloat16 are exact, sums float;
// where the library has none they pass through float copies.
//
// As on a GPU there can be several algorithms, which round differently: number i, from 0, adds k in i + 1 parts. The
// heuristic names one first that depends on the shape, events call one the fastest that depends on shape and process.
// CUBLASLT_CPU_ALGORITHMS=N: that many; else there is one, in the exact geometry two. An algorithm needs the alignment
// that its preference promised, and only those that the heuristic gives are known: others are refused.
#pragma once
#include <limits.h>
#include <algorithm>
#include <memory>
#include <random>
#include <vector>
#include "cuda_bf16.h"
#include "cuda_runtime.h"
#include "gemm.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 };
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

struct cublasLtMatmulDescOpaque_t { cublasOperation_t transa, transb; };
struct cublasLtMatrixLayoutOpaque_t { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct cublasLtMatmulPreferenceOpaque_t {
    uint64_t max_workspace = 0;
    uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };  // its number, A's to D's alignment, zeros
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};
typedef struct cublasLtContext* cublasLtHandle_t;
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;

inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown cublasStatus_t";
}
inline const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

inline size_t cublasLtGetVersion() { return 0; }
#ifdef EXACT_GEOMETRY
constexpr int CUBLASLT_ALGORITHMS = 2;
#else
constexpr int CUBLASLT_ALGORITHMS = 1;
#endif
inline int cublasLt_algorithms = [] {  // tests may set it
    const char* text = getenv("CUBLASLT_CPU_ALGORITHMS");
    const int count = text && *text ? atoi(text) : CUBLASLT_ALGORITHMS;
    if (count >= 1 && count <= 16) return count;
    fprintf(stderr, "cublasLt: CUBLASLT_CPU_ALGORITHMS is '%s'. It must be 1 to 16, or not set.\n", text);
    exit(1);
}();
inline const unsigned cublasLt_luck = cublasLt_algorithms > 1 ? std::random_device()() : 0;  // this process's

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = nullptr;
    return gemm_get_room(cuda_threads.threads) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = new cublasLtMatmulDescOpaque_t{CUBLAS_OP_N, CUBLAS_OP_N};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    return delete desc, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                     size_t bytes) {
    if (value == nullptr || bytes != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(attribute == CUBLASLT_MATMUL_DESC_TRANSA ? &desc->transa : &desc->transb, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                 uint64_t cols, int64_t ld) {
    *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete layout, CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new cublasLtMatmulPreferenceOpaque_t;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t bytes) {
    uint32_t number;
    if (value == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        if (bytes != sizeof preference->max_workspace) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(&preference->max_workspace, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    if (bytes != sizeof number) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&number, value, bytes);
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return CUBLAS_STATUS_SUCCESS;  // all add in float
    if (number == 0 || (number & (number - 1))) return CUBLAS_STATUS_INVALID_VALUE;
    preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES] = number;
    return CUBLAS_STATUS_SUCCESS;
}

// The shapes fit: op(A) (M,K), op(B) (K,N), C and D (M,N), and each leading dimension holds its column.
inline cublasStatus_t cublasLt_check(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                     cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D) {
    bool ta = desc->transa != CUBLAS_OP_N, tb = desc->transb != CUBLAS_OP_N;
    if ((ta ? A->cols : A->rows) != D->rows || (tb ? B->rows : B->cols) != D->cols ||
        (ta ? A->rows : A->cols) != (tb ? B->cols : B->rows) || C->rows != D->rows || C->cols != D->cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (auto x : {A, B, C, D})
        if (x->rows == 0 || x->cols == 0 || x->cols > INT_MAX || x->ld > INT_MAX || x->ld < (int64_t)x->rows)
            return CUBLAS_STATUS_INVALID_VALUE;
    return A->type == B->type && C->type == D->type && C->ld == D->ld ? CUBLAS_STATUS_SUCCESS
                                                                       : CUBLAS_STATUS_NOT_SUPPORTED;
}

// One of the algorithms, by the shape and a seed.
inline int cublasLt_pick(uint64_t seed, cublasLtMatmulDescOpaque_t desc, cublasLtMatrixLayoutOpaque_t A,
                         cublasLtMatrixLayoutOpaque_t D) {
    for (uint64_t x : {uint64_t(desc.transa), uint64_t(desc.transb), A.rows, A.cols, D.rows, D.cols})
        seed = ((seed ^ x) + 1) * 0x9E3779B97F4A7C15, seed ^= seed >> 29;
    return int(seed % cublasLt_algorithms);
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                                     cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t* results, int* returned) {
    if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    const cublasStatus_t state = cublasLt_check(desc, A, B, C, D);
    const int first = cublasLt_pick(0, *desc, *A, *D);
    *returned = state != CUBLAS_STATUS_SUCCESS ? 0 : std::min(requested, cublasLt_algorithms);
    for (int i = 0; i < *returned; i++) {
        results[i] = {};
        results[i].algo.data[0] = (first + i) % cublasLt_algorithms;
        std::copy_n(preference->alignment, 4, results[i].algo.data + 1);
    }
    return state;
}

// What keeps an algorithm from multiplying these operands.
inline cublasStatus_t cublasLt_check(const cublasLtMatmulAlgo_t& algo, std::initializer_list<const void*> operands) {
    if (std::any_of(algo.data + 5, std::end(algo.data), [](uint64_t word) { return word != 0; }))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (algo.data[0] >= uint64_t(cublasLt_algorithms)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const uint64_t* alignment = algo.data + 1;
    for (const void* p : operands) {
        if (*alignment == 0) return CUBLAS_STATUS_INVALID_VALUE;
        if (uintptr_t(p) % *alignment++) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}

// A float view of a matrix: itself, or a copy of its bfloat16 with the same leading dimension.
inline const float* cublasLt_float(std::unique_ptr<float[]>& copy, const void* data, cublasLtMatrixLayout_t x,
                                   bool filled = true) {
    if (x->type == CUDA_R_32F) return (const float*)data;
    copy.reset(new (std::nothrow) float[x->cols * x->ld]);
    const __nv_bfloat16* from = (const __nv_bfloat16*)data;
    float* to = copy.get();
    if (to == nullptr || !filled) return to;
    cuda_share(x->cols, 16, [=, rows = x->rows, ld = x->ld](int64_t col) {
        for (uint64_t row = 0; row < rows; row++) to[col * ld + row] = from[col * ld + row];
    });
    return to;
}

// Descriptions and scalars are copies: they may be gone when the work runs.
inline cublasStatus_t cublasLt_run(cublasLtMatmulDescOpaque_t desc, float alpha, const void* A,
                                   cublasLtMatrixLayoutOpaque_t Adesc, const void* B,
                                   cublasLtMatrixLayoutOpaque_t Bdesc, float beta, void* D,
                                   cublasLtMatrixLayoutOpaque_t Ddesc, int parts) {
    const bool ta = desc.transa != CUBLAS_OP_N, tb = desc.transb != CUBLAS_OP_N;
    const int64_t rows = Ddesc.rows, cols = Ddesc.cols, inner = ta ? Adesc.rows : Adesc.cols;
#ifdef EXACT_GEOMETRY  // more of them by the shape, as a GPU's algorithms have
    parts += int(inner / (8 << cuda_draw(uint64_t(rows * 0x10001 + cols) << 24 ^ inner) % 6));
#endif
    const int64_t piece = (inner + parts - 1) / parts;
    const bool halves = Adesc.type == CUDA_R_16BF && alpha == 1.0f && gemm_has_bf16();
    const bool in_float = Ddesc.type == CUDA_R_32F || piece < inner || !halves;
    std::unique_ptr<float[]> a_copy, b_copy, d_copy;
    const float* a = halves ? (const float*)A : cublasLt_float(a_copy, A, &Adesc);
    const float* b = halves ? (const float*)B : cublasLt_float(b_copy, B, &Bdesc);
    float* d = in_float ? (float*)cublasLt_float(d_copy, D, &Ddesc, beta != 0.0f) : (float*)D;  // beta 0: not read
    if (!a || !b || !d) return CUBLAS_STATUS_ALLOC_FAILED;
    // Each thread takes blocks of D, cut along its longer side: first one large one each, then small ones, so that
    // nobody waits long for a thread whose core is lent to other work.
    const int64_t threads = cuda_threads.threads, side = std::max(rows, cols), blocks = threads > 1 ? 3 * threads : 1;
    const int64_t unit = threads > 1 ? (side + 64 * threads - 1) / (64 * threads) * 16 : side;
    std::atomic<bool> done{true};
    cuda_share(blocks, 1, [=, &done](int64_t i) {
        const int64_t from = unit * (i + std::min(i, threads)), count = threads > 1 && i < threads ? 2 * unit : unit;
        const int64_t row = cols >= rows ? 0 : from, col = cols >= rows ? from : 0;
        Gemm g = {ta, tb, cols >= rows ? rows : std::min(count, rows - row),
                  cols >= rows ? std::min(count, cols - col) : cols, 0, alpha, Adesc.ld, Bdesc.ld, beta, Ddesc.ld};
        if (g.m <= 0 || g.n <= 0) return;
        for (int64_t at = 0; at < inner; at += piece, g.beta = 1.0f) {
            g.k = std::min(piece, inner - at);
            const int64_t left = ta ? row * g.lda + at : row + at * g.lda, out = row + col * g.ldd;
            const int64_t right = tb ? col + at * g.ldb : col * g.ldb + at;
            void* to = in_float ? (void*)(d + out) : (uint16_t*)D + out;
            if (!(halves ? gemm(g, (const uint16_t*)A + left, (const uint16_t*)B + right, to, in_float)
                         : gemm(g, a + left, b + right, d + out)))
                done = false;
        }
    });
    if (!done) return CUBLAS_STATUS_ALLOC_FAILED;
    if (!in_float || Ddesc.type == CUDA_R_32F) return CUBLAS_STATUS_SUCCESS;
    __nv_bfloat16* out = (__nv_bfloat16*)D;
    cuda_share(cols, 16, [=, ld = Ddesc.ld](int64_t col) {
        for (int64_t row = 0; row < rows; row++) out[col * ld + row] = d[col * ld + row];
    });
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLt_status = CUBLAS_STATUS_SUCCESS;  // of the matmul that ran last

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* A,
                                     cublasLtMatrixLayout_t Adesc, const void* B, cublasLtMatrixLayout_t Bdesc,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t Cdesc, void* D,
                                     cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t* algo, void*,
                                     size_t, cudaStream_t stream) {
    cublasStatus_t status = cublasLt_check(desc, Adesc, Bdesc, Cdesc, Ddesc);
    if (status == CUBLAS_STATUS_SUCCESS && algo) status = cublasLt_check(*algo, {A, B, C, D});
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (C != D) return CUBLAS_STATUS_NOT_SUPPORTED;
    const size_t m = Ddesc->rows, n = Ddesc->cols, k = desc->transa != CUBLAS_OP_N ? Adesc->rows : Adesc->cols;
    const int number = algo ? int(algo->data[0]) : 0;
    const bool slow = number != cublasLt_pick(cublasLt_luck, *desc, *Adesc, *Ddesc);
    auto label = cuda_label("matmul %zu %zu %zu", m, n, k);
    cuda_enqueue(stream, label, [=, desc = *desc, alpha = *(const float*)alpha, Adesc = *Adesc, Bdesc = *Bdesc,
                                 beta = *(const float*)beta, Ddesc = *Ddesc] {
        cublasLt_status = cublasLt_run(desc, alpha, A, Adesc, B, Bdesc, beta, D, Ddesc, number + 1);
        if (slow) cuda_late += std::chrono::seconds(1);
    });
    return cublasLt_status;
}

// faults, as cuda_runtime.h has them
#define CUBLASLT_MAY_FAIL(call) (cuda_fault_due() ? CUBLAS_STATUS_EXECUTION_FAILED : (call))
#define cublasLtCreate(...) CUBLASLT_MAY_FAIL(cublasLtCreate(__VA_ARGS__))
#define cublasLtDestroy(...) CUBLASLT_MAY_FAIL(cublasLtDestroy(__VA_ARGS__))
#define cublasLtMatmulDescCreate(...) CUBLASLT_MAY_FAIL(cublasLtMatmulDescCreate(__VA_ARGS__))
#define cublasLtMatmulDescDestroy(...) CUBLASLT_MAY_FAIL(cublasLtMatmulDescDestroy(__VA_ARGS__))
#define cublasLtMatmulDescSetAttribute(...) CUBLASLT_MAY_FAIL(cublasLtMatmulDescSetAttribute(__VA_ARGS__))
#define cublasLtMatrixLayoutCreate(...) CUBLASLT_MAY_FAIL(cublasLtMatrixLayoutCreate(__VA_ARGS__))
#define cublasLtMatrixLayoutDestroy(...) CUBLASLT_MAY_FAIL(cublasLtMatrixLayoutDestroy(__VA_ARGS__))
#define cublasLtMatmulPreferenceCreate(...) CUBLASLT_MAY_FAIL(cublasLtMatmulPreferenceCreate(__VA_ARGS__))
#define cublasLtMatmulPreferenceDestroy(...) CUBLASLT_MAY_FAIL(cublasLtMatmulPreferenceDestroy(__VA_ARGS__))
#define cublasLtMatmulPreferenceSetAttribute(...) CUBLASLT_MAY_FAIL(cublasLtMatmulPreferenceSetAttribute(__VA_ARGS__))
#define cublasLtMatmulAlgoGetHeuristic(...) CUBLASLT_MAY_FAIL(cublasLtMatmulAlgoGetHeuristic(__VA_ARGS__))
#define cublasLtMatmul(...) CUBLASLT_MAY_FAIL(cublasLtMatmul(__VA_ARGS__))
