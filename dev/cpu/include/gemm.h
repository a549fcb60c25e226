// What multiplies matrices on a CPU, a thread's share of D (m,n) = alpha op(A) op(B) + beta D, all column-major:
//   oneDNN    (USE_ONEDNN: on x86) makes its code for the features that the processor has, and knows bfloat16
//   OpenBLAS  goes by lists of models: of one that is younger than itself it may use a quarter of the width
#pragma once
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <array>
#include <map>
#include <string>
#include <vector>
#include "threads.h"
#ifdef USE_ONEDNN
#include <oneapi/dnnl/dnnl.hpp>
extern "C" int omp_get_max_threads();
extern "C" void omp_set_num_threads(int);
#else
#include <cblas.h>
#endif

struct Gemm {
    bool ta, tb;
    int64_t m, n, k;
    float alpha;
    int64_t lda, ldb;
    float beta;
    int64_t ldd;
};

// Whether so much memory is left. The libraries do not ask: where they get none oneDNN writes to address 0, OpenBLAS
// waits for ever.
inline bool gemm_room(size_t bytes) {
    void* room = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return room != MAP_FAILED && munmap(room, bytes) == 0;
}

#ifdef USE_ONEDNN

constexpr size_t GEMM_ROOM = 24 << 20, GEMM_THREAD_ROOM = 16 << 20;  // the code it makes; a thread's

// oneDNN takes one thread in here, its own are not wanted. And no signal's handler runs, as 2.6's AVX-512 code for
// small matrices keeps what it needs below the stack's pointer.
struct GemmAlone {
    const int threads = omp_get_max_threads();
    sigset_t before;
    GemmAlone() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        omp_set_num_threads(1);
    }
    ~GemmAlone() {
        omp_set_num_threads(threads);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
};

// All of these return false if there is no memory.
inline bool gemm(const Gemm& g, const float* a, const float* b, float* d) {  // row-major D^T = op(B)^T op(A)^T
    GemmAlone alone;
    return dnnl_success ==
           dnnl_sgemm(g.tb ? 'T' : 'N', g.ta ? 'T' : 'N', g.n, g.m, g.k, g.alpha, b, g.ldb, a, g.lda, g.beta, d, g.ldd);
}

inline std::string gemm_features() {
    const unsigned features = unsigned(dnnl::get_effective_cpu_isa());
    for (auto [bits, name] : std::initializer_list<std::pair<dnnl::cpu_isa, const char*>>{
             {dnnl::cpu_isa::avx512_core_amx, "AMX"}, {dnnl::cpu_isa::avx512_core_bf16, "AVX-512 with bfloat16"},
             {dnnl::cpu_isa::avx512_core, "AVX-512"}, {dnnl::cpu_isa::avx2, "AVX2"}, {dnnl::cpu_isa::avx, "AVX"},
             {dnnl::cpu_isa::sse41, "SSE4.1"}})
        if ((features & unsigned(bits)) == unsigned(bits)) return name;
    return "plain loops";
}

// A product of bfloat16 matrices with sums in float; D is float or bfloat16, alpha 1. Each thread has its own,
// made once for a shape.
struct GemmBf16 {
    using type = dnnl::memory::data_type;
    static inline const dnnl::engine cpu{dnnl::engine::kind::cpu, 0};
    dnnl::memory left, right, out;
    dnnl::primitive product;

    GemmBf16(const Gemm& g, bool out_float) {
        auto matrix = [&](int64_t rows, int64_t cols, bool transposed, int64_t ld, type t) {
            const dnnl::memory::dims strides = transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1};
            return dnnl::memory::desc({rows, cols}, t, strides);
        };
        const auto b = matrix(g.n, g.k, g.tb, g.ldb, type::bf16), a = matrix(g.k, g.m, g.ta, g.lda, type::bf16);
        const auto d = matrix(g.n, g.m, false, g.ldd, out_float ? type::f32 : type::bf16);
        dnnl::primitive_attr attributes;
        dnnl::post_ops after;
        if (g.beta != 0) after.append_sum(g.beta);
        attributes.set_post_ops(after);
#if DNNL_VERSION_MAJOR < 3
        const dnnl::matmul::primitive_desc chosen({b, a, d}, attributes, cpu);
#else
        const dnnl::matmul::primitive_desc chosen(cpu, b, a, d, attributes);
#endif
        left = dnnl::memory(b, cpu, nullptr), right = dnnl::memory(a, cpu, nullptr);
        out = dnnl::memory(d, cpu, nullptr);
        product = dnnl::matmul(chosen);
    }
};
inline bool gemm_has_bf16() {
    static const unsigned need = unsigned(dnnl::cpu_isa::avx512_core_bf16);
    static const bool has = (unsigned(dnnl::get_effective_cpu_isa()) & need) == need;
    return has;
}
inline bool gemm(const Gemm& g, const uint16_t* a, const uint16_t* b, void* d, bool out_float) try {
    thread_local std::map<std::array<int64_t, 10>, GemmBf16> made;
    thread_local dnnl::stream stream(GemmBf16::cpu);
    GemmAlone alone;
    const std::array<int64_t, 10> shape = {g.ta, g.tb, g.m, g.n, g.k, g.lda, g.ldb, g.ldd, g.beta != 0, out_float};
    if (made.find(shape) == made.end() && !gemm_room(GEMM_THREAD_ROOM)) return false;
    GemmBf16& p = made.try_emplace(shape, g, out_float).first->second;
    p.left.set_data_handle(const_cast<uint16_t*>(b));
    p.right.set_data_handle(const_cast<uint16_t*>(a));
    p.out.set_data_handle(d);
    p.product.execute(stream, {{DNNL_ARG_SRC, p.left}, {DNNL_ARG_WEIGHTS, p.right}, {DNNL_ARG_DST, p.out}});
    return true;
} catch (const std::exception&) {
    return false;
}

// oneDNN's version and what it uses of the processor; what to do where that is little, "": nothing.
inline std::string gemm_library() {
    const dnnl_version_t* version = dnnl_version();
    return "oneDNN " + std::to_string(version->major) + "." + std::to_string(version->minor) + " " + gemm_features();
}
inline std::string gemm_remedy() { return "Unset ONEDNN_MAX_CPU_ISA and DNNL_MAX_CPU_ISA, or take a newer oneDNN"; }

#else

inline bool gemm(const Gemm& g, const float* a, const float* b, float* d) {
    const CBLAS_TRANSPOSE ta = g.ta ? CblasTrans : CblasNoTrans, tb = g.tb ? CblasTrans : CblasNoTrans;
    if (g.n > 1) {
        cblas_sgemm(CblasColMajor, ta, tb, g.m, g.n, g.k, g.alpha, a, g.lda, b, g.ldb, g.beta, d, g.ldd);
        return true;
    }
    // a matrix times a vector, for which sgemm would copy the matrix first
    if (g.beta == 0.0f) std::fill_n(d, g.m, 0.0f);
    cblas_sgemv(CblasColMajor, ta, g.ta ? g.k : g.m, g.ta ? g.m : g.k, g.alpha, a, g.lda, b, g.tb ? g.ldb : 1, g.beta,
                d, 1);
    return true;
}
inline bool gemm_has_bf16() { return false; }
inline bool gemm(const Gemm&, const uint16_t*, const uint16_t*, void*, bool) { abort(); }

inline std::string gemm_library() {
    const std::string config = openblas_get_config();  // OpenBLAS 0.3.21 NO_LAPACKE ...
    return config.substr(0, config.find(' ', config.find(' ') + 1)) + " " + openblas_get_corename();
}
inline std::string gemm_remedy() {
#if defined __x86_64__
    const std::string core = __builtin_cpu_supports("avx512f") ? "SkylakeX"
                             : __builtin_cpu_supports("avx2")  ? "Haswell"
                                                               : "Nehalem";
    if (core == openblas_get_corename()) return "";
    return "Install oneDNN (libdnnl-dev) and make again, or set OPENBLAS_CORETYPE=" + core;
#else
    if (strcmp(openblas_get_corename(), "armv8") != 0) return "";  // it knows the model
    return "Set OPENBLAS_CORETYPE to a model of this kind (NEOVERSEN1), or take a newer OpenBLAS";
#endif
}
constexpr size_t GEMM_ROOM = 0, GEMM_THREAD_ROOM = size_t(136) << 20;  // a thread's buffers
inline const int gemm_threads = (openblas_set_num_threads(1), 1);      // they are ours

#endif

// Before the first product: there is no memory for it, or the threads have theirs.
inline bool gemm_get_room(int threads) {
    if (!gemm_room(GEMM_ROOM + threads * GEMM_THREAD_ROOM)) return false;
    cuda_share(threads, 1, [](int64_t) {
        constexpr int n = 128;
        std::vector<float> a(n * n), b(n * n);
        for (int m : {n, 8})  // there is other code for few rows; OpenBLAS does without a buffer
            for (bool t : {false, true}) gemm({t, !t, m, n, n, 1, n, n, 0, n}, a.data(), a.data(), b.data());
    });
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Is it as fast as the processor lets expect?

// nanoseconds that this thread has run: other work on the machine does not count
inline double gemm_clock() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

// GFLOP/s of one core that multiplies and adds in registers as wide as this build's target has them.
CUDA_FAST inline double gemm_peak() {
#if defined __AVX512F__
    constexpr int WIDTH = 16;
#elif defined __AVX__
    constexpr int WIDTH = 8;
#else
    constexpr int WIDTH = 4;
#endif
    typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));
    constexpr int TURNS = 5000;
    const double begin = gemm_clock();
    Vector f = Vector{} + 0.5f, a = f, b = f, c = f, d = f, e = f, g = f, h = f, j = f, k = f, l = f;
    for (int turn = 0; turn < TURNS; turn++) {
        a = a * f + f, b = b * f + f, c = c * f + f, d = d * f + f, e = e * f + f;
        g = g * f + f, h = h * f + f, j = j * f + f, k = k * f + f, l = l * f + f;
#if defined __x86_64__
        asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e));
        asm volatile("" : "+x"(g), "+x"(h), "+x"(j), "+x"(k), "+x"(l));
#elif defined __aarch64__
        asm volatile("" : "+w"(a), "+w"(b), "+w"(c), "+w"(d), "+w"(e));
        asm volatile("" : "+w"(g), "+w"(h), "+w"(j), "+w"(k), "+w"(l));
#endif
    }
    return 2.0 * 10 * WIDTH * TURNS / (gemm_clock() - begin);
}

// For people, and a warning, "" if all is well.
inline std::string gemm_about() {
    const int threads = cuda_threads.threads;
    return gemm_library() + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}
inline std::string gemm_warning() {
    constexpr int n = 320;
    const std::string remedy = gemm_remedy();
    if (remedy.empty()) return "";
    std::vector<float> a(n * n, 0.5f), b(n * n, 0.5f), d(n * n);
    double rate = 0, peak = 0;
    const auto start = std::chrono::steady_clock::now(), end = start + std::chrono::milliseconds(150);
    const auto most = start + std::chrono::seconds(2);  // under an emulator
    auto begin = start;
    for (int tries = 0; (tries < 20 && begin < most) || begin < end;
         tries++, begin = std::chrono::steady_clock::now()) {
        const double before = gemm_clock();
        gemm({true, false, n, n, n, 1, n, n, 0, n}, a.data(), b.data(), d.data());
        rate = std::max(rate, 2.0 * n * n * n / (gemm_clock() - before));
        peak = std::max(peak, gemm_peak());
        if (rate > 0.6 * peak) break;  // beside other work it takes more tries
    }
    if (rate >= 0.5 * peak) return "";
    char text[256];
    snprintf(text, sizeof text, "matmul: %s reaches %.0f%% of the processor's rate. %s.", gemm_library().c_str(),
             100 * rate / peak, remedy.c_str());
    return text;
}
