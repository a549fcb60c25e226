// The part of cuBLASLt that the trainer uses, over OpenBLAS: D = alpha op(A) op(B) + beta C, column-major, C == D.
// A and B both float or both bfloat16, D either. bfloat16 passes through float copies: products are exact, sums float.
#pragma once
#include <cblas.h>
#include <limits.h>
#include <omp.h>
#include <sys/mman.h>
#include <algorithm>
#include <memory>
#include <vector>
#include "cuda_bf16.h"
#include "cuda_runtime.h"

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
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

struct cublasLtMatmulDescOpaque_t { cublasOperation_t transa, transb; };
struct cublasLtMatrixLayoutOpaque_t { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct cublasLtMatmulPreferenceOpaque_t { uint64_t max_workspace; };
struct cublasLtMatmulAlgo_t { uint64_t data[8]; };
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
// Algorithms to choose from: there is one, but tests have two of the same kind.
#ifdef EXACT_GEOMETRY
constexpr int CUBLASLT_ALGORITHMS = 2;
#else
constexpr int CUBLASLT_ALGORITHMS = 1;
#endif
// OpenBLAS waits for ever where it gets no memory for its buffers, 128 MiB of address space a thread. So they are asked
// for here: there is none, or the threads have theirs.
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    const size_t bytes = size_t(omp_get_max_threads()) * (size_t(136) << 20);
    void* room = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return CUBLAS_STATUS_ALLOC_FAILED;
    munmap(room, bytes);
    #pragma omp parallel
    {
        constexpr int n = 128;  // smaller ones do without a buffer
        std::vector<float> a(n * n), b(n * n);
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1.0f, a.data(), n, a.data(), n, 0.0f, b.data(), n);
    }
    return *handle = nullptr, CUBLAS_STATUS_SUCCESS;
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
    *preference = new cublasLtMatmulPreferenceOpaque_t{0};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t bytes) {
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)  // nothing is split here
        return value && bytes == sizeof(uint32_t) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
    if (value == nullptr || bytes != sizeof preference->max_workspace) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&preference->max_workspace, value, bytes);
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

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
                                                     cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
                                                     cublasLtMatmulPreference_t, int requested,
                                                     cublasLtMatmulHeuristicResult_t* results, int* returned) {
    if (requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    const cublasStatus_t state = cublasLt_check(desc, A, B, C, D);
    *returned = state != CUBLAS_STATUS_SUCCESS ? 0 : std::min(requested, CUBLASLT_ALGORITHMS);
    for (int i = 0; i < *returned; i++) {
        results[i] = {};
        results[i].algo.data[0] = i;
    }
    return state;
}

// A float view of a matrix: itself, or a copy of its bfloat16 with the same leading dimension.
inline const float* cublasLt_float(std::unique_ptr<float[]>& copy, const void* data, cublasLtMatrixLayout_t x,
                                   bool filled = true) {
    if (x->type == CUDA_R_32F) return (const float*)data;
    copy.reset(new (std::nothrow) float[x->cols * x->ld]);
    const __nv_bfloat16* from = (const __nv_bfloat16*)data;
    float* to = copy.get();
    if (to == nullptr || !filled) return to;
    #pragma omp parallel for
    for (uint64_t col = 0; col < x->cols; col++)
        for (uint64_t row = 0; row < x->rows; row++) to[col * x->ld + row] = from[col * x->ld + row];
    return to;
}

// Descriptions and scalars are copies: they may be gone when the work runs.
inline cublasStatus_t cublasLt_run(cublasLtMatmulDescOpaque_t desc, float alpha, const void* A,
                                   cublasLtMatrixLayoutOpaque_t Adesc, const void* B,
                                   cublasLtMatrixLayoutOpaque_t Bdesc, float beta, void* D,
                                   cublasLtMatrixLayoutOpaque_t Ddesc) {
    bool ta = desc.transa != CUBLAS_OP_N, tb = desc.transb != CUBLAS_OP_N;
    std::unique_ptr<float[]> a_copy, b_copy, d_copy;
    const float* a = cublasLt_float(a_copy, A, &Adesc);
    const float* b = cublasLt_float(b_copy, B, &Bdesc);
    float* d = (float*)cublasLt_float(d_copy, D, &Ddesc, beta != 0.0f);  // beta 0: D is not read
    if (!a || !b || !d) return CUBLAS_STATUS_ALLOC_FAILED;
    // One thread's OpenBLAS is faster than its own threads at a model's shapes (7% of a step of 60M on two cores), so
    // each thread has a block of D, cut along its longer side. (OpenBLAS with threads other than OpenMP's cannot know.)
    const int64_t rows = Ddesc.rows, cols = Ddesc.cols;
    const bool by_cols = cols >= rows;
    const int threads = openblas_get_parallel() == OPENBLAS_OPENMP ? omp_get_max_threads() : 1;
    const int64_t share = ((by_cols ? cols : rows) + 16 * threads - 1) / (16 * threads) * 16;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        const int64_t row = by_cols ? 0 : t * share, col = by_cols ? t * share : 0;
        const int64_t m = by_cols ? rows : std::min(share, rows - row), n = by_cols ? std::min(share, cols - col) : cols;
        if (m <= 0 || n <= 0) continue;
        if (cols == 1) {  // a matrix times a vector, for which sgemm would copy the matrix first
            const int64_t k = ta ? Adesc.rows : Adesc.cols;
            if (beta == 0.0f) std::fill_n(d + row, m, 0.0f);
            cblas_sgemv(CblasColMajor, ta ? CblasTrans : CblasNoTrans, ta ? k : m, ta ? m : k, alpha,
                        a + (ta ? row * Adesc.ld : row), Adesc.ld, b, tb ? Bdesc.ld : 1, beta, d + row, 1);
            continue;
        }
        cblas_sgemm(CblasColMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n,
                    ta ? Adesc.rows : Adesc.cols, alpha, a + (ta ? row * Adesc.ld : row), Adesc.ld,
                    b + (tb ? col : col * Bdesc.ld), Bdesc.ld, beta, d + row + col * Ddesc.ld, Ddesc.ld);
    }
    if (Ddesc.type == CUDA_R_32F) return CUBLAS_STATUS_SUCCESS;
    __nv_bfloat16* out = (__nv_bfloat16*)D;
    #pragma omp parallel for
    for (uint64_t col = 0; col < Ddesc.cols; col++)
        for (uint64_t row = 0; row < Ddesc.rows; row++) out[col * Ddesc.ld + row] = d[col * Ddesc.ld + row];
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLt_status = CUBLAS_STATUS_SUCCESS;  // of the matmul that ran last

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* A,
                                     cublasLtMatrixLayout_t Adesc, const void* B, cublasLtMatrixLayout_t Bdesc,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t Cdesc, void* D,
                                     cublasLtMatrixLayout_t Ddesc, const cublasLtMatmulAlgo_t*, void*, size_t,
                                     cudaStream_t stream) {
    cublasStatus_t status = cublasLt_check(desc, Adesc, Bdesc, Cdesc, Ddesc);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (C != D) return CUBLAS_STATUS_NOT_SUPPORTED;
    auto label = cuda_label("matmul %zu %zu %zu", size_t(Ddesc->rows), size_t(Ddesc->cols),
                            size_t(desc->transa != CUBLAS_OP_N ? Adesc->rows : Adesc->cols));
    cuda_enqueue(stream, label, [=, desc = *desc, alpha = *(const float*)alpha, Adesc = *Adesc, Bdesc = *Bdesc,
                                 beta = *(const float*)beta, Ddesc = *Ddesc] {
        cublasLt_status = cublasLt_run(desc, alpha, A, Adesc, B, Bdesc, beta, D, Ddesc);
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
