// SimpleGPT in one file: model, kernels, optimizer, training loop. Trains on GPUs (nvcc) or, unchanged, on a CPU
// through the stand-in in dev/cpu (g++). Read it from top to bottom; every section has a heading of its own:
//
//   errors            configuration     tensor table      device helpers    warp tiles      Hopper instructions
//   rows              SimpleNorm        embedding         matmul            Matmul on Hopper
//   attention         head and loss     ranks             the model         optimizer       channel
//   files             checkpoint        generation        evaluation        the run's log     probe
//   speed of light    command line      main
//
// Shapes: B batch, T sequence length, N = B T tokens, C width, V vocabulary, Vp padded, L layers, NH query heads, NKV
// key/value heads, HS head size, F feed-forward width. Activations are row-major. `d` before a name is its gradient.
#include <arpa/inet.h>
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dirent.h>
#include <fcntl.h>
#include <getopt.h>
#include <ifaddrs.h>
#include <nccl.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "dataloader.h"
#include "tokenizer.h"

// Precision, chosen at build: weights and activations are floatX; master weights are float, gradients and moments too
// unless Storage halves them.
#ifdef PRECISION_BF16
typedef __nv_bfloat16 floatX;
constexpr cudaDataType_t CUDA_FLOATX = CUDA_R_16BF;
constexpr ncclDataType_t NCCL_FLOATX = ncclBfloat16;
constexpr const char *PRECISION = "bf16", *DTYPE = "BF16";  // for people; in safetensors files
#else
typedef float floatX;
constexpr cudaDataType_t CUDA_FLOATX = CUDA_R_32F;
constexpr ncclDataType_t NCCL_FLOATX = ncclFloat32;
constexpr const char *PRECISION = "fp32", *DTYPE = "F32";
#endif
constexpr bool BF16 = sizeof(floatX) == 2;

// =====================================================================================================================
// Errors. Bad input throws Error with "where: what. What to do."; main prints it on one line and exits with 1.

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) std::string format(const char* fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    std::string s(vsnprintf(nullptr, 0, fmt, args), 0);
    vsnprintf(s.data(), s.size() + 1, fmt, again);
    va_end(args);
    va_end(again);
    return s;
}

// On one line, whatever a name out of a file holds.
std::string one_line(std::string text) {
    for (char& c : text) c = (unsigned char)c < ' ' ? ' ' : c;
    return text;
}

void warn(const std::string& text) { fprintf(stderr, "train_gpt: warning: %s\n", one_line(text).c_str()); }

// What an exception tells people.
std::string reason(const std::exception& e) {
    if (dynamic_cast<const std::bad_alloc*>(&e))
        return "memory: the host has no more. Lower --batch-size or --seq-len, use fewer threads, or raise its limit.";
    auto* system = dynamic_cast<const std::system_error*>(&e);
    if (system && system->code() == std::errc::resource_unavailable_try_again)
        return "threads: no more can be started. Raise the limit of processes (ulimit -u) or of memory.";
    return one_line(e.what());
}

// Pieces of long work done on the host, weights set, bytes written: the watch over the ranks (Channel) sees it move.
std::atomic<long long> ticks{0};

// seconds, of a clock that only goes forward
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Asserts that a CUDA call went well; names the call, the file and the line.
inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status != cudaSuccess) throw Error(format("%s:%d: %s: %s", file, line, call, cudaGetErrorString(status)));
}
inline void check_cublas(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw Error(format("%s:%d: %s: %s", file, line, call, cublasLtGetStatusName(status)));
}
#define CHECK(call) check_cuda(call, #call, __FILE__, __LINE__)
#define CHECK_CUBLAS(call) check_cublas(call, #call, __FILE__, __LINE__)
inline void check_nccl(ncclResult_t status, const char* call, const char* file, int line) {
    if (status != ncclSuccess)
        throw Error(
            format("%s:%d: %s: %s: %s", file, line, call, ncclGetErrorString(status), ncclGetLastError(nullptr)));
}
#define CHECK_NCCL(call) check_nccl(call, #call, __FILE__, __LINE__)

// =====================================================================================================================
// Configuration. A flavour is a preset of these numbers; every one of them is also a flag.

// The names are those of flags, checkpoints and exports.
typedef std::vector<std::string> Words;
enum class Backbone { llama, nanogpt };
const Words BACKBONES = {"llama", "nanogpt"};
enum class Variant { simplegpt, prenorm, preqknorm };
const Words VARIANTS = {"simplegpt", "prenorm", "preqknorm"}, NORMS = {"rmsnorm", "layernorm"};

struct Config {
    Backbone backbone = Backbone::llama;
    Variant variant = Variant::simplegpt;
    bool layernorm = false;               // norm: RMSNorm, or LayerNorm without bias
    int C = 256, L = 6, NH = 4, NKV = 0;  // NKV 0: as many as NH
    int V = 32000;
    float ffn_mult = 1.0f;
    int multiple_of = 256;
    int hidden = 0;  // the feed-forward width; 0: by the formula (checkpoints know the width alone)
    float rope_theta = 1e4f;
    float norm_eps = 1e-5f;
    int T = 1024;
    int max_T = 0;  // rows of the learned positions (nanogpt); 0: T

    bool simple() const { return variant == Variant::simplegpt; }
    bool gated() const { return backbone == Backbone::llama; }
    int HS() const { return C / NH; }
    int QKV() const { return (NH + 2 * NKV) * HS(); }
    int Vp() const { return (V + 63) / 64 * 64; }  // rows of embedding and head in memory; the last Vp - V stay zero
    // hidden width: 8/3 C, times ffn_mult, rounded up to a multiple (the paper's code); GPT-2's is 4 C
    int64_t wide_F() const {
        if (hidden) return hidden;
        if (!gated()) return 4 * int64_t(C);
        const int64_t width = int64_t(double(ffn_mult) * double(8 * int64_t(C) / 3));
        return (width + multiple_of - 1) / multiple_of * multiple_of;
    }
    int F() const { return int(wide_F()); }  // finish() looks that it fits
    int FF() const { return gated() ? 2 * F() : F(); }  // outputs of the linear(s) before the activation
};

struct Flavour {
    const char* name;
    int C, L, NH, NKV, V;
    float ffn_mult;
    int multiple_of;
    float rope_theta;
    Backbone backbone;
};

const Flavour FLAVOURS[] = {
    {"20M", 256, 4, 4, 4, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"22M", 256, 6, 4, 4, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"35M", 384, 6, 6, 6, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"39M", 384, 8, 6, 6, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"60M", 512, 8, 8, 8, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"67M", 512, 10, 8, 8, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"102M", 640, 12, 10, 10, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"134M", 768, 12, 12, 12, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"162M", 768, 16, 12, 12, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"271M", 1024, 16, 16, 16, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"297M", 1024, 18, 16, 16, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"360M", 1152, 18, 16, 16, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"1B", 2048, 18, 16, 16, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"7B", 4096, 32, 32, 32, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"13B", 5120, 40, 40, 40, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"26B", 5120, 80, 40, 40, 32000, 1.0f, 256, 1e4f, Backbone::llama},
    {"70B", 8192, 80, 64, 8, 32000, 1.3f, 4096, 1e4f, Backbone::llama},
    {"llama3-8B", 4096, 32, 32, 8, 128256, 1.3f, 1024, 5e5f, Backbone::llama},
    {"llama3-70B", 8192, 80, 64, 8, 128256, 1.3f, 4096, 5e5f, Backbone::llama},
    {"nanogpt-1.4B", 1536, 48, 24, 24, 50257, 1.0f, 256, 1e4f, Backbone::nanogpt},
};

void apply_flavour(Config& c, const std::string& name) {
    for (const Flavour& f : FLAVOURS) {
        if (strcasecmp(f.name, name.c_str())) continue;
        c.backbone = f.backbone;
        c.C = f.C, c.L = f.L, c.NH = f.NH, c.V = f.V;
        c.NKV = f.NKV == f.NH ? 0 : f.NKV;  // 0: as many as --heads may say
        c.ffn_mult = f.ffn_mult, c.multiple_of = f.multiple_of, c.rope_theta = f.rope_theta;
        return;
    }
    throw Error("--model: unknown flavour '" + name + "'. `train_gpt --models` lists them.");
}

// Completes the defaults that depend on other numbers, refuses what cannot be built.
void finish(Config& c) {
    auto positive = [](const char* flag, int64_t value, int64_t most = 1 << 28) {
        if (value < 1 || value > most)
            throw Error(format("%s: %lld is out of range. Give a number from 1 to %lld.", flag, (long long)value,
                               (long long)most));
    };
    positive("--dim", c.C, 1 << 20);
    positive("--layers", c.L, 1 << 16);
    positive("--heads", c.NH, 1 << 16);
    positive("--vocab-size", c.V);
    positive("--seq-len", c.T, 1 << 24);
    positive("--multiple-of", c.multiple_of, 1 << 24);
    if (!(c.ffn_mult > 0 && c.ffn_mult < 1000))
        throw Error("--ffn-mult: must be above 0 and below 1000. 1 keeps the width 8/3 dim.");
    if (c.hidden) positive("hidden", c.hidden);
    positive("--ffn-mult: the feed-forward width", c.wide_F());
    if (c.NKV == 0) c.NKV = c.NH;
    positive("--kv-heads", c.NKV, 1 << 16);
    if (c.max_T == 0 || c.gated()) c.max_T = c.T;  // RoPE has no table to run out of
    positive("--max-seq-len", c.max_T, 1 << 24);
    if (c.max_T < c.T)
        throw Error(format("--max-seq-len: %d positions are fewer than --seq-len %d. Raise it.", c.max_T, c.T));
    if (!(c.norm_eps > 0 && c.norm_eps <= 1))
        throw Error("--norm-eps: must be above 0 and at most 1. The paper uses 1e-5.");
    if (!(c.rope_theta > 0 && c.rope_theta < INFINITY))
        throw Error("--rope-theta: must be above 0. Llama 2 uses 1e4, Llama 3 5e5.");
    if (c.C % c.NH)
        throw Error(format("--dim: %d is not divisible by %d heads. Choose dim = heads x head size.", c.C, c.NH));
    if (c.HS() != 16 && c.HS() != 32 && c.HS() != 64 && c.HS() != 72 && c.HS() != 128)  // 72: the 360M flavour's
        throw Error(
            format("--heads: dim %d over %d heads gives head size %d, which attention lacks. "
                   "Choose a head size of 16, 32, 64, 72 or 128.",
                   c.C, c.NH, c.HS()));
    if (c.NH % c.NKV)
        throw Error(format("--kv-heads: %d heads cannot share %d key/value heads. Choose a divisor.", c.NH, c.NKV));
    if (c.backbone == Backbone::nanogpt && c.NKV != c.NH)
        throw Error("--kv-heads: the nanogpt backbone is multi-head. Leave the flag out or give as many as --heads.");
    const double parameters =
        (2.0 * c.V + c.max_T) * c.C + double(c.L) * c.C * (double(c.QKV()) + c.C + c.FF() + c.F() + 8);
    if (parameters > 1e15)  // sums of sizes then stay far from 2^64
        throw Error(format("--layers: %.2g parameters are too many. Make the model smaller.", parameters));
    if (BF16 && c.F() % 8)
        throw Error(
            format("--multiple-of: hidden width %d is no multiple of 8, which tensor cores need. "
                   "Give a multiple of 8.",
                   c.F()));
}

// What memory is spent on. Recompute: the activations that the forward does not keep and the backward makes again. Each
// level drops more; kept a token and layer of simplegpt, with d = C, k = NKV HS, f = F:
//   none   everything                                                                      7d + 4k + 3f
//   norm   not what norms, RoPE, SwiGLU and residual adds make                             5d + 2k + 2f
//   ffn    nor the outputs of w1 and w3                                                    5d + 2k
//   block  only the block's input and the output of w2, which the norm behind it needs     2d
enum class Recompute { none, norm, ffn, block };
const Words RECOMPUTE = {"none", "norm", "ffn", "block"};

struct Storage {
    Recompute recompute = Recompute::none;
    bool half_gradients = false;  // in bf16: 2 bytes a parameter instead of 4, each micro-batch's sum rounded
    bool half_moments = false;    // AdamW's moments in bf16, rounded at random: 4 bytes a parameter, not 8
    bool no_master = false;       // no float weights beside the bf16 ones, which are rounded at random: 4 bytes less
    bool probe = false;           // room for the probe's direction and copy of the weights
    // ZeRO (Rajbhandari et al. 2020): of `ranks` ranks each keeps 1/ranks of nothing (0), of masters and moments (1),
    // of gradients too (2), of weights too (3).
    int ranks = 1, zero = 0;
    bool whole_gradients = false;  // gradients stay whole even so: summed over micro-batches, then reduced once

    bool cut_state() const { return zero >= 1; }
    bool cut_gradients() const { return zero >= 2 && !whole_gradients; }
    bool cut_weights() const { return zero == 3; }
};

// =====================================================================================================================
// Tensor table. Lists every tensor once; nobody else computes an offset. Parameters, gradients, master weights and both
// moments are flat buffers of this one layout. File names are those of the paper's released code. The order is the
// order in memory: neighbours that are multiplied together lie together (q, k, v; w1, w3; their gains likewise), and
// backward finishes the tensors from the end.
//
// Units are what ranks gather and reduce as one: the embedding, each layer, the final norm with the head. A unit is cut
// by position into as many equal pieces as there are ranks; a rank's pieces of all units, one after another, are its
// shard, 1/ranks of a flat buffer.

enum class Init { normal, truncated, ones };  // truncated: normal, drawn again beyond 3 std

constexpr size_t NONE = SIZE_MAX;  // the offset of a tensor that this variant does not have

struct Tensor {
    std::string name;
    size_t rows, cols;   // cols 0: one-dimensional (a gain)
    size_t padded_rows;  // rows in memory
    size_t offset;       // in elements, from the begin of the flat buffer
    Init init;
    float std;
    size_t size() const { return rows * std::max<size_t>(cols, 1); }
    size_t padded_size() const { return padded_rows * std::max<size_t>(cols, 1); }
};

struct LayerOffsets {
    size_t qkv, o, w13, w2;                      // (QKV,C), (C,C), (FF,C), (C,F); w13 and w2 are fc and proj of nanogpt
    size_t qkv_gain, o_gain, w13_gain, w2_gain;  // (QKV), (C), (FF), (C); of preqknorm only q and k
    size_t norm1, norm2;                         // pre-norms (C)
};

struct Unit {
    size_t begin, size;      // in a flat buffer; both multiples of 64 ranks
    size_t tensor, tensors;  // its first one and their number
};

struct Piece {
    size_t whole, shard, size;  // where it begins in a flat buffer and in a shard
};

struct TensorTable {
    std::vector<Tensor> tensors;
    std::vector<Unit> units;  // embedding, layers, norm and head
    int ranks = 1;
    size_t tok = NONE, pos = NONE, norm = NONE, head = NONE;
    std::vector<LayerOffsets> layers;
    size_t size = 0;        // elements of a flat buffer
    size_t parameters = 0;  // without padding

    size_t add(const std::string& name, size_t rows, size_t cols, Init init, float std, size_t padded_rows = 0) {
        Tensor t{name, rows, cols, std::max(rows, padded_rows), size, init, std};
        size += t.padded_size();
        parameters += t.size();
        tensors.push_back(t);
        return t.offset;
    }
    void align(size_t to = 64) { size = (size + to - 1) / to * to; }  // a matmul's operand begins at 16 bytes at least
    void end_unit() {
        align(64 * size_t(ranks));
        const Unit last = units.empty() ? Unit{0, 0, 0, 0} : units.back();
        const size_t begin = last.begin + last.size, first = last.tensor + last.tensors;
        units.push_back({begin, size - begin, first, tensors.size() - first});
    }
    int unit_of(size_t offset) const {
        auto behind = [](size_t at, const Unit& u) { return at < u.begin; };
        return int(std::upper_bound(units.begin(), units.end(), offset, behind) - units.begin()) - 1;
    }
    Piece piece(int unit, int rank) const {
        const Unit& u = units[unit];
        return {u.begin + u.size / ranks * rank, u.begin / ranks, u.size / ranks};
    }
    size_t shard_size() const { return size / ranks; }
    bool tied() const { return tok == head; }
};

TensorTable build_table(const Config& c, int ranks = 1) {
    TensorTable t;
    t.ranks = ranks;
    const bool llama = c.backbone == Backbone::llama, simple = c.simple();
    const float std = 0.02f;
    const size_t q_width = c.C, kv_width = size_t(c.NKV) * c.HS(), F = c.F(), C = c.C;
    t.tok = t.add(llama ? "tok_embeddings.weight" : "wte.weight", c.V, C, Init::normal, llama ? 1.0f : std, c.Vp());
    t.align();
    if (!llama) t.pos = t.add("wpe.weight", c.max_T, C, Init::normal, std);
    t.end_unit();
    for (int l = 0; l < c.L; l++) {
        const std::string layer = "layers." + std::to_string(l) + ".";
        const std::string attention = layer + (llama ? "attention." : ""), ffn = layer + (llama ? "feed_forward." : "");
        // the name of a linear: llama simplegpt's snX, llama pre-norm's wX, nanogpt's own; its weight and its gain
        auto linear = [&](const char* sn, const char* w, const char* nano) {
            return std::string(!llama ? nano : simple ? sn : w);
        };
        const std::string q = attention + linear("snq", "wq", "q"), k = attention + linear("snk", "wk", "k"),
                          v = attention + linear("snv", "wv", "v"), o = attention + linear("sno", "wo", "o"),
                          w1 = ffn + linear("sn1", "w1", "fc"), w3 = ffn + linear("sn3", "w3", ""),
                          w2 = ffn + linear("sn2", "w2", "proj");
        const char *weight = simple ? ".lin.weight" : ".weight", *gain = ".norm.weight";
        const float deep = std / sqrtf(2.0f * (llama ? l + 1 : c.L));  // o, w2, w3; nanogpt's o and proj
        LayerOffsets at = {NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE};
        auto ones = [&](const std::string& name, size_t rows) { return t.add(name, rows, 0, Init::ones, 0.0f); };

        at.qkv = t.add(q + weight, q_width, C, Init::normal, std);
        t.add(k + weight, kv_width, C, Init::normal, std);
        t.add(v + weight, kv_width, C, Init::normal, std);
        t.align();
        at.o = t.add(o + weight, C, C, Init::normal, deep);
        t.align();
        at.w13 = t.add(w1 + weight, F, C, Init::normal, std);
        if (c.gated()) t.add(w3 + weight, F, C, Init::normal, deep);
        t.align();
        at.w2 = t.add(w2 + weight, C, F, Init::normal, deep);
        t.align();
        if (simple) {
            at.qkv_gain = ones(q + gain, q_width);
            ones(k + gain, kv_width);
            ones(v + gain, kv_width);
            at.o_gain = ones(o + gain, C);
            at.w13_gain = ones(w1 + gain, F);
            if (c.gated()) ones(w3 + gain, F);
            at.w2_gain = ones(w2 + gain, C);
        } else {
            if (c.variant == Variant::preqknorm) {
                at.qkv_gain = ones(attention + "q_norm.weight", q_width);
                ones(attention + "k_norm.weight", kv_width);
            }
            at.norm1 = ones(layer + (llama ? "attention_norm.weight" : "norm1.weight"), C);
            at.norm2 = ones(layer + (llama ? "ffn_norm.weight" : "norm2.weight"), C);
        }
        t.layers.push_back(at);
        t.end_unit();
    }
    t.norm = t.add("norm.weight", C, 0, Init::ones, 0.0f);
    t.align();
    t.head = llama ? t.add("output.weight", c.V, C, Init::truncated, 1.0f / sqrtf(float(C)), c.Vp()) : t.tok;
    t.end_unit();
    return t;
}

// Random numbers by counter (splitmix64's finisher), so that any element's value is known without those before it:
// the same seed gives the same bits on any machine and any number of threads.
inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t i) {
    auto mix = [](uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        return x ^ (x >> 31);
    };
    return mix(mix(mix(seed + 0x9e3779b97f4a7c15ull) + stream) + (i + 1) * 0x9e3779b97f4a7c15ull);
}
inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t i) {  // in (0, 1)
    return ((random_bits(seed, stream, i) >> 11) + 0.5) * 0x1p-53;
}
inline double random_normal(uint64_t seed, uint64_t stream, uint64_t i) {  // Box and Muller
    double u = random_uniform(seed, stream, 2 * i), v = random_uniform(seed, stream, 2 * i + 1);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

// Initial values of `count` elements of a tensor from its `first` on, padding rows zero.
void initial_values(std::vector<float>& out, const Tensor& t, uint64_t seed, uint64_t stream, size_t first,
                    size_t count) {
    out.assign(count, 0.0f);
    #pragma omp parallel for
    for (size_t i = first; i < std::min(first + count, t.size()); i++) {
        if (t.init == Init::ones) {
            out[i - first] = 1.0f;
            continue;
        }
        double z = random_normal(seed, stream, i);
        for (uint64_t again = 1; t.init == Init::truncated && fabs(z) > 3.0; again++)
            z = random_normal(seed, stream + (again << 32), i);
        out[i - first] = float(t.std * z);
    }
}

// =====================================================================================================================
// Device helpers. Kernels are written for any block and warp size: loops stride by blockDim.x or WARP_SIZE, reductions
// loop over halves. The serial CPU geometry is a block of one thread in a warp of one, and all of this folds away.

#ifndef WARP_SIZE
#define WARP_SIZE 32
#endif
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
        if (lane() == 0) part[warp() * K + k] = v[k];
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < K; k++) v[k] = warp_sum(lane() < num_warps() ? part[lane() * K + k] : F(0));
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
    ncclDataType_t nccl() const { return half ? ncclBfloat16 : ncclFloat32; }
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

int device_sms = 0;        // multiprocessors, and
size_t device_shared = 0;  // bytes of shared memory that a block may have: set by open_device

// Threads of a block that strides over C elements: whole warps, at most 512.
inline int row_threads(int C) { return std::min(512, (C + 127) / 128 * 32); }

// =====================================================================================================================
// Warp tiles: M x N floats held by one warp, and products of them with tiles in shared memory. On a GPU (and lane by
// lane in the exact CPU geometry) the elements lie as mma.sync's accumulators do: of each 16 x 8 elements lane l has
// rows l/4 and l/4 + 8 and columns 2(l%4) and the next. In the serial geometry the one thread has it all.
//   slot s: the s-th row of which this thread has a part; element e: the e-th of its columns
// (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
// The serial geometry keeps tiles of scores column by column: a column then is the row of a plain product, no product
// has to transpose a tile that changes in the loop, and maxima and sums of rows run down whole vectors.

constexpr bool SERIAL = WARP_SIZE == 1;
typedef std::conditional_t<SERIAL, float, floatX> SharedX;  // tiles in shared memory

enum Layout { BY_ROW, BY_COLUMN };  // in the serial geometry
template <int M, int N, Layout layout = BY_ROW>
struct Tile {
    static constexpr int SLOTS = SERIAL ? M : M / 8, PER_ROW = SERIAL ? N : N / 4;
    alignas(16) float v[SLOTS * PER_ROW];
    __device__ static constexpr int index(int s, int e) {
        if (SERIAL) return layout == BY_ROW ? s * N + e : e * M + s;
        return (s / 2 * (N / 8) + e / 2) * 4 + s % 2 * 2 + e % 2;
    }
    __device__ float& at(int s, int e) { return v[index(s, e)]; }
    __device__ float at(int s, int e) const { return v[index(s, e)]; }
    __device__ float* fragment(int i, int j) { return v + (i * (N / 8) + j) * 4; }  // rows 16i.., columns 8j..
    __device__ const float* fragment(int i, int j) const { return v + (i * (N / 8) + j) * 4; }
    __device__ static int row(int s) { return SERIAL ? s : s / 2 * 16 + s % 2 * 8 + lane() / 4; }
    __device__ static int col(int e) { return SERIAL ? e : e / 2 * 8 + lane() % 4 * 2 + e % 2; }
    __device__ void zero() {
        #pragma unroll
        for (float& x : v) x = 0.0f;
    }
};

// the four lanes that share a row
__device__ inline float tile_row_sum(float v) {
    for (int m = SERIAL ? 0 : 2; m > 0; m /= 2) v += __shfl_xor_sync(ALL_LANES, v, m);
    return v;
}
__device__ inline float tile_row_max(float v) {
    for (int m = SERIAL ? 0 : 2; m > 0; m /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, m));
    return v;
}

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

// Tiles in shared memory: rows of W elements in 16-byte chunks. ldmatrix reads 8 rows of one chunk at once; they fall
// into different banks, since chunk c of row r lies at c ^ r%8 where a row is a multiple of 128 bytes, and rows are an
// odd number of chunks apart where it is not. Copies run along rows: 8 lanes write 8 chunks in different banks.
constexpr int VEC16 = 16 / int(sizeof(SharedX));
template <int W>
constexpr bool SWIZZLED = W / VEC16 % 8 == 0;
template <int W>
constexpr int STRIDE = SERIAL || SWIZZLED<W> ? W
                       : W / VEC16 % 2       ? W
                                             : W + VEC16;
// Element (row, col + step): with col below 16 and step a constant multiple of 16 one XOR of the row's address.
template <int W>
__device__ inline int shared_at(unsigned row, unsigned col, unsigned step = 0) {
    if (!SERIAL && SWIZZLED<W>)
        return row * W + ((col / VEC16) ^ (row % 8) ^ (step / VEC16 % 8)) * VEC16 + col % VEC16 +
               step / (8 * VEC16) * (8 * VEC16);
    return row * STRIDE<W> + col + step;
}

template <int HS>  // of a head in a tile: mma takes 16 columns at a time, those beyond HS are zero
constexpr int WIDTH = (HS + 15) / 16 * 16;

// What of a score tile is not masked; the serial geometry spares the rest (lanes of a warp would only wait).
enum Part { ALL, LOWER, UPPER };  // LOWER: columns up to the row; UPPER: columns from the row on

// The serial geometry's product: c (M,N) += a b, or = if FRESH; a(r,k) = a[r AR + k AK], b (K,N), in blocks of R rows
// and U vectors that stay in registers. span: which k count for row r: all, up to r, from r on. block: which columns n
// of row r are wanted, likewise; the others become zero, FRESH only.
template <int M, int N, int K, int AR, int AK, bool FRESH>
void serial_mma(float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b, Part span,
                Part block) {
#ifdef __AVX512F__
    constexpr int V = 16, U = N % 32 == 0 ? 2 : N % 80 == 0 ? 5 : 1, R = U == 2 ? 8 : U == 5 ? 4 : 16;
#else
    constexpr int V = 8, U = 2, R = 4;
#endif
    typedef float Vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
    constexpr int W = U * V;
    for (int n0 = 0; n0 < N; n0 += W) {
        for (int r0 = 0; r0 < M; r0 += R) {
            Vec sum[R][U];
            for (int r = 0; r < R; r++)
                for (int u = 0; u < U; u++) sum[r][u] = FRESH ? Vec{} : *(const Vec*)&c[(r0 + r) * N + n0 + u * V];
            int first = span == UPPER ? r0 : 0, last = span == LOWER ? r0 + R : K;
            if ((block == LOWER && n0 >= r0 + R) || (block == UPPER && n0 + W <= r0)) last = first;
            for (int k = first; k < last; k++) {
                Vec row[U];
                for (int u = 0; u < U; u++) row[u] = *(const Vec*)&b[k * N + n0 + u * V];
                for (int r = 0; r < R; r++)
                    for (int u = 0; u < U; u++) sum[r][u] += a[(r0 + r) * AR + k * AK] * row[u];
            }
            for (int r = 0; r < R; r++)
                for (int u = 0; u < U; u++) *(Vec*)&c[(r0 + r) * N + n0 + u * V] = sum[r][u];
        }
    }
}

// M rows of a tile in shared memory as the left operand of mma_nt. KEPT: the fragments stay in registers.
template <int W, int M, bool KEPT>
struct Left {
    const SharedX* tile;
    int first;
    unsigned kept[KEPT ? W / 16 : 1][KEPT ? M / 16 : 1][4];

    // rows first + 16i.., columns k..
    __device__ void load(unsigned* f, int i, int k) const {
        ldmatrix_x4(f, tile + shared_at<W>(first + 16 * i + lane() % 16, lane() / 16 * 8, k));
    }
    __device__ Left(const SharedX* tile, int first) : tile(tile), first(first) {}
    __device__ void keep() {
        if constexpr (KEPT) {
            #pragma unroll
            for (int k = 0; k < W / 16; k++)
                #pragma unroll
                for (int i = 0; i < M / 16; i++) load(kept[k][i], i, 16 * k);
        }
    }
};

// c[r][n] = sum_k a[r][k] b[n][k], k < W: a's rows with the rows of b in shared memory. The serial geometry wants a's
// tile transposed (load_transposed): a is what stays while b changes.
template <int W, int M, int N, bool KEPT>
__device__ inline void mma_nt(Tile<M, N, BY_COLUMN>& c, const Left<W, M, KEPT>& a, const SharedX* b, Part part = ALL) {
    if constexpr (SERIAL) {
        serial_mma<N, M, W, W, 1, true>(c.v, b, a.tile, ALL, part == LOWER ? UPPER : part == UPPER ? LOWER : ALL);
    } else if constexpr (BF16) {
        c.zero();
        #pragma unroll (KEPT ? W / 16 : 2)
        for (int k = 0; k < W; k += 16) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++) {
                if constexpr (KEPT)
                    for (int x = 0; x < 4; x++) fa[i][x] = a.kept[k / 16][i][x];
                else
                    a.load(fa[i], i, k);
            }
            #pragma unroll
            for (int j = 0; j < N / 16; j++) {
                unsigned fb[4];  // k 0-7 and 8-15 of columns 0-7, then of columns 8-15
                ldmatrix_x4(fb, b + shared_at<W>(16 * j + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8, k));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {
        c.zero();
        for (int k = 0; k < W; k++) {
            #pragma unroll
            for (int e = 0; e < c.PER_ROW; e++)
                #pragma unroll
                for (int s = 0; s < c.SLOTS; s++)
                    c.at(s, e) +=
                        float(a.tile[shared_at<W>(a.first + c.row(s), k)]) * float(b[shared_at<W>(c.col(e), k)]);
        }
    }
}

// c[r][n] += sum_k a[r][k] b[k][n], k < K; a a tile, b (K,W) in shared memory
template <int W, int M, int K>
__device__ inline void mma_nn(Tile<M, W>& c, const Tile<M, K, BY_COLUMN>& a, const SharedX* b, Part part = ALL) {
    if constexpr (SERIAL) {
        serial_mma<M, W, K, 1, M, false>(c.v, a.v, b, part, ALL);
    } else if constexpr (BF16) {  // the accumulators of 16 columns are, as bf16, the fragment of a k16 operand
        #pragma unroll
        for (int k = 0; k < K / 16; k++) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++)
                #pragma unroll
                for (int x = 0; x < 4; x++) {
                    const float* from = a.fragment(i, 2 * k + x / 2) + x % 2 * 2;
                    fa[i][x] = pack_bf16(from[0], from[1]);
                }
            #pragma unroll
            for (int j = 0; j < W / 16; j++) {
                unsigned fb[4];  // k 0-7 and 8-15 of columns 0-7, then of columns 8-15
                ldmatrix_x4_trans(fb, b + shared_at<W>(16 * k + lane() % 16, lane() / 16 * 8, 16 * j));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {  // the four lanes of a row have its elements among them
        #pragma unroll
        for (int e = 0; e < a.PER_ROW; e++) {
            for (int owner = 0; owner < 4; owner++) {
                const int k = e / 2 * 8 + owner * 2 + e % 2;
                float row[a.SLOTS];
                #pragma unroll
                for (int s = 0; s < a.SLOTS; s++) row[s] = __shfl_sync(ALL_LANES, a.at(s, e), lane() / 4 * 4 + owner);
                #pragma unroll
                for (int f = 0; f < c.PER_ROW; f++)
                    #pragma unroll
                    for (int s = 0; s < c.SLOTS; s++) c.at(s, f) += row[s] * float(b[shared_at<W>(k, c.col(f))]);
            }
        }
    }
}

// c[r][n] += sum_k a[k][first_row + r] b[k][first_col + n], k < K; a (K,KW) as store_scores left it, b (K,W), both in
// shared memory
template <int KW, int W, int K, int M, int N>
__device__ inline void mma_tn(Tile<M, N>& c, const SharedX* a, int first_row, const SharedX* b, int first_col,
                              Part part = ALL) {
    if constexpr (SERIAL) {
        static_assert(!SERIAL || (M == KW && N == W), "the whole tile");
        serial_mma<M, N, K, K, 1, false>(c.v, a, b, part == LOWER ? UPPER : part == UPPER ? LOWER : ALL, ALL);
    } else if constexpr (BF16) {
        #pragma unroll
        for (int k = 0; k < K; k += 16) {
            unsigned fa[M / 16][4];
            #pragma unroll
            for (int i = 0; i < M / 16; i++)  // rows 0-7, 8-15 of k 0-7, then of k 8-15
                ldmatrix_x4_trans(fa[i], a + shared_at<KW>(k + lane() % 8 + lane() / 16 * 8,
                                                           first_row + 16 * i + lane() / 8 % 2 * 8));
            #pragma unroll
            for (int j = 0; j < N / 16; j++) {
                unsigned fb[4];
                ldmatrix_x4_trans(fb, b + shared_at<W>(k + lane() % 16, first_col + 16 * j + lane() / 16 * 8));
                #pragma unroll
                for (int i = 0; i < M / 16; i++) {
                    mma_m16n8k16(c.fragment(i, 2 * j), fa[i], fb);
                    mma_m16n8k16(c.fragment(i, 2 * j + 1), fa[i], fb + 2);
                }
            }
        }
    } else {
        for (int k = 0; k < K; k++) {
            #pragma unroll
            for (int e = 0; e < c.PER_ROW; e++)
                #pragma unroll
                for (int s = 0; s < c.SLOTS; s++)
                    c.at(s, e) += float(a[shared_at<KW>(k, first_row + c.row(s))]) *
                                  float(b[shared_at<W>(k, first_col + c.col(e))]);
        }
    }
}

// Where load_tile leaves the tile: in dst, but the serial geometry reads whole tiles of fp32 rows where they lie.
template <int HS, int ROWS>
__device__ inline const SharedX* tile_home(const SharedX* dst, const floatX* src, size_t stride, int valid) {
    if constexpr (SERIAL && !BF16 && HS == WIDTH<HS>)
        if (stride == HS && valid >= ROWS) return reinterpret_cast<const SharedX*>(src);
    return dst;
}

// dst (ROWS,WIDTH) in shared memory = src (ROWS,HS) of row stride `stride`; zero in rows from `valid` on and in columns
// from HS on; by the whole block of THREADS. On a GPU the copies are asynchronous: they are there after copy_commit,
// copy_wait and a barrier.
template <int HS, int ROWS, int THREADS>
__device__ inline void load_tile(SharedX* dst, const floatX* src, size_t stride, int valid) {
    constexpr int W = WIDTH<HS>, PER_ROW = W / VEC16;
    if constexpr (SERIAL) {
        if (tile_home<HS, ROWS>(dst, src, stride, valid) != dst) return;
        for (int row = 0; row < ROWS; row++)
            for (int col = 0; col < W; col++)
                dst[row * W + col] = row < valid && col < HS ? float(src[row * stride + col]) : 0.0f;
    } else {
        constexpr int STEP = THREADS / PER_ROW;  // rows at a time; the threads beyond them are idle (HS 72 only)
        const int first = threadIdx.x / PER_ROW, col = threadIdx.x % PER_ROW * VEC16;
        const floatX* from = src + first * stride + col;
        #pragma unroll
        for (int row = first; row - first < ROWS; row += STEP, from += STEP * stride) {
            const bool there = row < valid && col < HS;
            if ((ROWS % STEP == 0 || row < ROWS) && (THREADS % PER_ROW == 0 || first < STEP))
                copy_async<16>(dst + shared_at<W>(row, col), there ? from : src, there);
        }
    }
}

// the same for the left operand of mma_nt, which the serial geometry keeps as (WIDTH,ROWS)
template <int HS, int ROWS, int THREADS>
__device__ inline void load_transposed(SharedX* dst, const floatX* src, size_t stride, int valid) {
    if constexpr (SERIAL) {
        for (int row = 0; row < ROWS; row++)
            for (int col = 0; col < WIDTH<HS>; col++)
                dst[col * ROWS + row] = row < valid && col < HS ? float(src[row * stride + col]) : 0.0f;
    } else {
        load_tile<HS, ROWS, THREADS>(dst, src, stride, valid);
    }
}

// dst (K,N) in shared memory = the warps' score tiles, this one's from row `first` on, for mma_tn
template <int N, int M>
__device__ inline void store_scores(SharedX* dst, int first, const Tile<M, N, BY_COLUMN>& tile) {
    if constexpr (SERIAL) {
        for (int i = 0; i < M * N; i++) dst[i] = tile.v[i];  // (N,K)
    } else {
        #pragma unroll
        for (int s = 0; s < tile.SLOTS; s++)
            #pragma unroll
            for (int e = 0; e < tile.PER_ROW; e += 2)
                store_pair(dst + shared_at<N>(first + tile.row(s), tile.col(e)), tile.at(s, e), tile.at(s, e + 1));
    }
}

// dst (rows,HS) of row stride `stride` = the tile, rows below `valid`, through the warp's own M rows of shared memory
template <int HS, int M>
__device__ inline void store_tile(floatX* dst, size_t stride, int valid, const Tile<M, WIDTH<HS>>& tile, SharedX* own) {
    constexpr int W = WIDTH<HS>, PER_ROW = HS / VEC16;
    if constexpr (SERIAL) {
        for (int row = 0; row < min(M, valid); row++)
            for (int col = 0; col < HS; col++) dst[row * stride + col] = tile.v[row * W + col];
    } else {
        __syncwarp();
        #pragma unroll
        for (int s = 0; s < tile.SLOTS; s++)
            #pragma unroll
            for (int e = 0; e < tile.PER_ROW; e += 2)
                store_pair(own + shared_at<W>(tile.row(s), tile.col(e)), tile.at(s, e), tile.at(s, e + 1));
        __syncwarp();
        for (int i = lane(); i < M * PER_ROW; i += WARP_SIZE) {
            const int row = i / PER_ROW, col = i % PER_ROW * VEC16;
            if (row < valid)
                *reinterpret_cast<uint4*>(dst + row * stride + col) =
                    *reinterpret_cast<const uint4*>(own + shared_at<W>(row, col));
        }
    }
}

// =====================================================================================================================
// Hopper instructions (sm_90a): bulk tensor copies, mbarriers, wgmma, named barriers. Thin wrappers of PTX; on other
// architectures they are empty, and kernels that use them begin with `if (!HOPPER_CODE) return;`. The CPU stand-in
// emulates them (dev/cpu/include/hopper_exact.h).

bool hopper = false;  // the device has them, and so has this build; set by open_device

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
#define REGISTERS_48 TEN() "," TEN(1) "," TEN(2) "," TEN(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_64 TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) ",%60,%61,%62,%63"
#define REGISTERS_80 TEN() "," TEN(1) "," TEN(2) "," TEN(3) "," TEN(4) "," TEN(5) "," TEN(6) "," TEN(7)
#define REGISTERS_96 REGISTERS_80 "," TEN(8) ",%90,%91,%92,%93,%94,%95"
#define REGISTERS_128 \
    REGISTERS_80 "," TEN(8) "," TEN(9) "," TEN(10) "," TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define OUT_32 OUT8(0), OUT8(8), OUT8(16), OUT8(24)
#define OUT_48 OUT_32, OUT8(32), OUT8(40)
#define OUT_64 OUT_48, OUT8(48), OUT8(56)
#define OUT_80 OUT_64, OUT8(64), OUT8(72)
#define OUT_96 OUT_80, OUT8(80), OUT8(88)
#define OUT_128 OUT_96, OUT8(96), OUT8(104), OUT8(112), OUT8(120)
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
    static_assert(N == 64 || N == 96 || N == 128 || N == 160 || N == 192 || N == 256);
    if constexpr (N == 64) WGMMA_SS(64, 32, 32, 33, 34, 35, 36);
    if constexpr (N == 96) WGMMA_SS(96, 48, 48, 49, 50, 51, 52);
    if constexpr (N == 128) WGMMA_SS(128, 64, 64, 65, 66, 67, 68);
    if constexpr (N == 160) WGMMA_SS(160, 80, 80, 81, 82, 83, 84);
    if constexpr (N == 192) WGMMA_SS(192, 96, 96, 97, 98, 99, 100);
    if constexpr (N == 256) WGMMA_SS(256, 128, 128, 129, 130, 131, 132);
}
template <int N, int TRANS_B>
__device__ __forceinline__ void wgmma_rs(float* c, const unsigned* a, uint64_t b, int accumulate) {
    static_assert(N == 64 || N == 96 || N == 128 || N == 160 || N == 192 || N == 256);
    if constexpr (N == 64) WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 96) WGMMA_RS(96, 48, 48, 49, 50, 51, 52, 53, 54);
    if constexpr (N == 128) WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (N == 160) WGMMA_RS(160, 80, 80, 81, 82, 83, 84, 85, 86);
    if constexpr (N == 192) WGMMA_RS(192, 96, 96, 97, 98, 99, 100, 101, 102);
    if constexpr (N == 256) WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, 134);
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

// What is volatile behind this, such as a wait for wgmma, stays behind the arithmetic that gives x, which is never
// negative: the store never happens. (Left alone, ptxas moves the wait above arithmetic that is to run meanwhile.)
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
CUtensorMap tensor_map(const void* base, std::array<int64_t, 4> dims, std::array<int64_t, 3> strides,
                       std::array<int, 4> box) {
    static decltype(&cuTensorMapEncodeTiled) encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
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

// =====================================================================================================================
// Rows, for the kernels that only move memory. A block has a row of W elements, a thread PACKS packs of it in
// registers, 16 bytes each: every byte is read once, whatever the number of passes. Pack p of thread t begins at column
// (p blockDim + t) PACK. In bf16 rows are multiples of 8 elements (finish() sees to it); fp32 takes any width, element
// by element. In the serial geometry the one thread has one pack, the row where it lies.

constexpr int PACK = 16 / int(sizeof(floatX));
constexpr int ROW_THREADS = 384;  // a block's most: 3 warps a quarter of a multiprocessor, 168 registers a thread
constexpr int MAX_ROW = 4 * ROW_THREADS * PACK, MAX_FFN_ROW = 10 * ROW_THREADS * PACK;  // widest rows, elements

// f(p, e, c) for each element of this thread's: element e of pack p, column c. Packs in registers need UNROLLED.
template <int PACKS, bool UNROLLED = true, typename F>
__device__ inline void each(int W, F f) {
    if constexpr (SERIAL) {
        #pragma GCC ivdep
        for (int c = 0; c < W; c++) f(0, c, c);
    } else {
        #pragma unroll (UNROLLED ? PACKS : 1)
        for (int p = 0; p < PACKS; p++) {
            const int c = (p * blockDim.x + threadIdx.x) * PACK;
            if (c >= W) break;
            #pragma unroll
            for (int e = 0; e < PACK; e++)
                if (BF16 || c + e < W) f(p, e, c + e);
        }
    }
}

__device__ inline float unpack(const unsigned* pack, int e) {
    return __uint_as_float(!BF16 ? pack[e] : e % 2 ? pack[e / 2] & 0xffff0000u : pack[e / 2] << 16);
}
__device__ inline void load_pack(unsigned* pack, const floatX* from, int valid) {
    if constexpr (BF16) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        pack[0] = v.x, pack[1] = v.y, pack[2] = v.z, pack[3] = v.w;
    } else {
        #pragma unroll
        for (int e = 0; e < PACK; e++) pack[e] = __float_as_uint(e < valid ? float(from[e]) : 0.0f);
    }
}

// A row held between passes.
template <int PACKS>
struct Row {
    const floatX* x = nullptr;
    unsigned v[SERIAL ? 1 : PACKS][4];
    __device__ void load(const floatX* from, int W) {
        x = from;
        if constexpr (!SERIAL) {
            #pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const int c = (p * blockDim.x + threadIdx.x) * PACK;
                if (c < W) load_pack(v[p], from + c, W - c);
            }
        }
    }
    // from its packs in shared memory
    __device__ void take(const uint4* packs, int W) {
        #pragma unroll
        for (int p = 0; p < PACKS && !SERIAL; p++) {
            const int slot = p * blockDim.x + threadIdx.x;
            if (slot * PACK < W) load_pack(v[p], reinterpret_cast<const floatX*>(packs + slot), PACK);
        }
    }
    __device__ float operator()(int p, int e) const { return SERIAL ? float(x[e]) : unpack(v[p], e); }
};

// What is read or written once, element e at `at`, in the order of e; in bf16 a pack at a time, with its first or last
// element.
struct PackReader {
    unsigned pack[4];
    __device__ float operator()(const floatX* at, int e) {
        if constexpr (SERIAL || !BF16) return float(*at);
        if (e == 0) load_pack(pack, at, PACK);
        return unpack(pack, e);
    }
};
struct PackWriter {
    unsigned pack[4];
    float even = 0.0f;
    __device__ void operator()(floatX* at, int e, float x) {
        if constexpr (SERIAL || !BF16) {
            *at = x;
        } else {
            if (e % 2 == 0) even = x;
            if (e % 2 == 1) pack[e / 2] = pack_bf16(even, x);
            if (e == PACK - 1)
                *reinterpret_cast<uint4*>(at - (PACK - 1)) = make_uint4(pack[0], pack[1], pack[2], pack[3]);
        }
    }
};

// Sums over the rows that a block walks, a column each, in shared memory (in the serial geometry in its line of
// `partial`). A column is always the same thread's. Of the two 16-byte halves of a pack's sums every other four lanes
// take the second first: 8 lanes then reach all banks.
struct ColumnSums {
    float* sum;
    float now[PACK];
    static size_t bytes(int W) { return SERIAL ? 0 : W * sizeof(float); }
    __device__ static int at(int c) { return SERIAL || !BF16 ? c : c ^ c / 32 % 2 * 4; }

    __device__ explicit ColumnSums(float* sum = nullptr) : sum(sum) {}
    // column c, element e of its pack
    __device__ void add(int c, int e, float x) {
        if constexpr (SERIAL || !BF16) {
            sum[at(c)] += x;
        } else {
            float4* half = reinterpret_cast<float4*>(sum + at(c / 4 * 4));
            if (e % 4 == 0) {
                const float4 v = *half;
                now[e] = v.x, now[e + 1] = v.y, now[e + 2] = v.z, now[e + 3] = v.w;
            }
            now[e] += x;
            if (e % 4 == 3) *half = make_float4(now[e - 3], now[e - 2], now[e - 1], now[e]);
        }
    }
    // both by the whole block
    __device__ void zero(int W) {
        for (int c = threadIdx.x; c < W; c += blockDim.x) sum[c] = 0.0f;
        __syncthreads();
    }
    __device__ void write(float* line, int W) const {
        if (SERIAL) return;
        __syncthreads();
        for (int c = threadIdx.x; c < W; c += blockDim.x) line[c] = sum[at(c)];
    }
};

// Packs a thread and threads a block for rows of W elements: 4, 2 or 1 packs, the split with the fewest idle ones; in
// doubt more packs a thread, as then a block's barriers bind fewer warps, and more rows are under way on a
// multiprocessor. Feed-forward rows may be WIDE: 5 packs, or 10. Calls f(std::integral_constant<int, PACKS>, threads).
template <bool WIDE = false, typename F>
void row_shape(int W, F f) {
    if constexpr (SERIAL) {
        f(std::integral_constant<int, 1>(), 1);
    } else {
        const int packs = (W + PACK - 1) / PACK;
        auto threads = [&](int P) { return (packs + 32 * P - 1) / (32 * P) * 32; };
        int best = 0;
        for (int P : {4, 2, 1})
            if (threads(P) <= ROW_THREADS && (!best || threads(P) * P < threads(best) * best)) best = P;
        if (best == 1) f(std::integral_constant<int, 1>(), threads(1));
        if (best == 2) f(std::integral_constant<int, 2>(), threads(2));
        if (best == 4) f(std::integral_constant<int, 4>(), threads(4));
        if constexpr (WIDE) {
            const bool five = threads(5) <= ROW_THREADS;
            if (!best && five) f(std::integral_constant<int, 5>(), threads(5));
            if (!best && !five) f(std::integral_constant<int, 10>(), threads(10));
        }
    }
}

// Blocks of a kernel that walks N rows of W elements and leaves a line of partial sums a block: what is resident at a
// time, ROW_THREADS threads a multiprocessor.
inline int row_blocks(int N, int W) {
    int blocks = 2 * device_sms;
    auto shape = [&](auto, int threads) { blocks = device_sms * std::max(1, ROW_THREADS / threads); };
    if (!SERIAL) row_shape<true>(W, shape);
    return std::min(N, blocks);
}

// =====================================================================================================================
// SimpleNorm: the paper's operator and its fused consumers

#include "simplenorm.cuh"

// =====================================================================================================================
// Embedding: x[n,c] = tok[token[n],c] + pos[t,c]; pos only with learned positions, t = n mod T. One block a token.
// x (N,C) floatX; tok (Vp,C), pos (max_T,C) floatX, pos null for none; tokens (N) int.

template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS)
    embedding_forward_kernel(floatX* x, const int* tokens, const floatX* tok, const floatX* pos, int T, int C) {
    const size_t n = blockIdx.x, token = tokens[n], t = n % T;
    PackReader a, b;
    PackWriter write;
    each<PACKS>(C, [&](int, int e, int c) {
        const float v = a(tok + token * C + c, e);
        write(x + n * C + c, e, pos ? v + b(pos + t * C + c, e) : v);
    });
}

void embedding_forward(floatX* x, const int* tokens, const floatX* tok, const floatX* pos, int N, int T, int C,
                       cudaStream_t stream) {
    row_shape(C, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        embedding_forward_kernel<P><<<N, threads, 0, stream>>>(x, tokens, tok, pos, T, C);
    });
    CHECK(cudaGetLastError());
}

// The places of each token that occurs, made on the host, where the tokens come from: with it a block sums all rows of
// one token in order, and no atomics are needed.
struct TokenPlaces {
    std::vector<int> places;  // (N) positions n, sorted by token, then by n
    std::vector<int> begin;   // (U+1) where the u-th token's places begin
};

TokenPlaces token_places(const int* tokens, int N) {
    TokenPlaces p;
    p.places.resize(N);
    for (int n = 0; n < N; n++) p.places[n] = n;
    std::stable_sort(p.places.begin(), p.places.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    for (int i = 0; i < N; i++)
        if (i == 0 || tokens[p.places[i]] != tokens[p.places[i - 1]]) p.begin.push_back(i);
    p.begin.push_back(N);
    return p;
}

// dtok[token,c] += sum over its places n of dx[n,c]. One block a token that occurs; blocks beyond those have no places.
// dtok (Vp,C) G; dx (N,C) floatX.
template <typename G>
__global__ void embedding_backward_kernel(G* dtok, const floatX* dx, const int* tokens, const int* places,
                                          const int* begin, int C) {
    int first = begin[blockIdx.x], last = begin[blockIdx.x + 1];
    if (first == last) return;
    G* out = dtok + size_t(tokens[places[first]]) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = out[c];
        for (int i = first; i < last; i++) sum += float(dx[size_t(places[i]) * C + c]);
        out[c] = sum;
    }
}

// dpos[t,c] += sum_b dx[b,t,c]. One block a position. dpos (max_T,C) G; dx (B,T,C) floatX.
template <typename G>
__global__ void position_backward_kernel(G* dpos, const floatX* dx, int B, int T, int C) {
    size_t t = blockIdx.x;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = dpos[t * C + c];
        for (int b = 0; b < B; b++) sum += float(dx[(b * size_t(T) + t) * C + c]);
        dpos[t * C + c] = sum;
    }
}

// tokens (N) int; places (N), begin (blocks+1): TokenPlaces on the device, begin filled up with N. blocks: as many as
// tokens occur, or more, so that it need not depend on the batch.
void embedding_backward(Flat dtok, Flat dpos, const floatX* dx, const int* tokens, const int* places, const int* begin,
                        int blocks, int B, int T, int C, cudaStream_t stream) {
    dtok.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        embedding_backward_kernel<G><<<blocks, row_threads(C), 0, stream>>>(d, dx, tokens, places, begin, C);
    });
    CHECK(cudaGetLastError());
    if (!dpos.p) return;
    dpos.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        position_backward_kernel<G><<<T, row_threads(C), 0, stream>>>(d, dx, B, T, C);
    });
    CHECK(cudaGetLastError());
}

// =====================================================================================================================
// Matmul through cuBLASLt (the CPU stand-in's is OpenBLAS): D (m,n) = op(A) op(B) + beta D, all row-major, accumulated
// in float. op(A) is (m,k): A is stored (m,k), or (k,m) if transA;
// op(B) is (k,n): B is stored (k,n), or (n,k) if transB.

constexpr size_t MATMUL_WORKSPACE = size_t(32) << 20;

// Milliseconds of a launch, the least of three after one that warms up; infinite if it returns false.
template <typename Launch>
float least_ms(Launch launch, cudaStream_t stream) {
    cudaEvent_t begin = nullptr, end = nullptr;
    float least = INFINITY;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 4; i++) {
        float ms = 0.0f;
        CHECK(cudaEventRecord(begin, stream));
        if (!launch()) break;
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i > 0) least = std::min(least, ms);
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return least;
}

// Handle, workspace, and one plan a shape, made at the first use. A plan's algorithm is the heuristic's first choice;
// while `timing` is set, the fastest of its first 16. Algorithms differ in the order of their sums, so the choices of a
// run are kept (choices(), take_choices()), and a resumed run has the same bits.
struct Matmul {
    struct Shape {
        int transA, transB, m, n, k, type;  // type: that of D
        bool operator<(const Shape& o) const {
            return std::tie(transA, transB, m, n, k, type) < std::tie(o.transA, o.transB, o.m, o.n, o.k, o.type);
        }
    };
    struct Plan {
        cublasLtMatmulDesc_t desc;
        cublasLtMatrixLayout_t first, second, out;
        std::vector<cublasLtMatmulAlgo_t> algos;  // the first is used; others wait to be timed
    };
    static constexpr int CANDIDATES = 16;
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    bool timing = false;
    std::map<Shape, Plan> plans;
    std::map<Shape, cublasLtMatmulAlgo_t> chosen;  // by timing, here or in an earlier part of the run
    std::map<std::array<int, 3>, int> ways;  // likewise, of the linears (N,K,M) with a norm: see "Matmul on Hopper"

    Plan& plan(Shape shape) {
        const bool transA = shape.transA, transB = shape.transB;
        const int m = shape.m, n = shape.n, k = shape.k;
        const cudaDataType_t type = cudaDataType_t(shape.type);
        auto found = plans.find(shape);
        if (found != plans.end()) return found->second;
        // cuBLAS is column-major: it sees every row-major matrix transposed, so it is asked for D^T = op(B)^T op(A)^T
        Plan p;
        CHECK_CUBLAS(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        cublasOperation_t first = transB ? CUBLAS_OP_T : CUBLAS_OP_N, second = transA ? CUBLAS_OP_T : CUBLAS_OP_N;
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof(first)));
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(p.desc, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof(second)));
        auto layout = [](cublasLtMatrixLayout_t* l, cudaDataType_t t, int rows, int cols) {
            CHECK_CUBLAS(cublasLtMatrixLayoutCreate(l, t, rows, cols, rows));
        };
        transB ? layout(&p.first, CUDA_FLOATX, k, n) : layout(&p.first, CUDA_FLOATX, n, k);
        transA ? layout(&p.second, CUDA_FLOATX, m, k) : layout(&p.second, CUDA_FLOATX, k, m);
        layout(&p.out, type, n, m);
        auto known = chosen.find(shape);
        if (known != chosen.end()) {
            p.algos = {known->second};
            return plans.emplace(shape, p).first->second;
        }
        cublasLtMatmulPreference_t preference = nullptr;
        CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
        CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &MATMUL_WORKSPACE, sizeof(MATMUL_WORKSPACE)));
        cublasLtMatmulHeuristicResult_t results[CANDIDATES];
        int count = 0;
        CHECK_CUBLAS(cublasLtMatmulAlgoGetHeuristic(handle, p.desc, p.first, p.second, p.out, p.out, preference,
                                                    CANDIDATES, results, &count));
        CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
        for (int i = 0; i < count; i++)
            if (results[i].state == CUBLAS_STATUS_SUCCESS) p.algos.push_back(results[i].algo);
        if (p.algos.empty()) throw Error(format("matmul: cuBLASLt has no algorithm for %d x %d x %d.", m, n, k));
        return plans.emplace(shape, p).first->second;
    }

    // Puts the plan's fastest algorithm first and drops the others. `run` multiplies with one of them; D may get any
    // value.
    template <typename Run>
    void choose(Plan& p, Shape shape, cudaStream_t stream, Run run) {
        float best = INFINITY;
        for (const cublasLtMatmulAlgo_t& algo : std::vector<cublasLtMatmulAlgo_t>(p.algos)) {
            const float ms = least_ms([&] { return run(algo) == CUBLAS_STATUS_SUCCESS; }, stream);
            if (ms < best) best = ms, p.algos[0] = algo;
        }
        p.algos.resize(1);
        chosen[shape] = p.algos[0];
    }

    // The choices as text, a line each: shape, then the algorithm, which cuBLASLt lets be stored and loaded again by
    // the same version of itself; the first line names it. Ways: N, K, M, way.
    std::string choices() const {
        std::string text = format("cublasLt %zu\n", cublasLtGetVersion());
        for (auto& [s, algo] : chosen) {
            text += format("algorithm %d %d %d %d %d %d", s.transA, s.transB, s.m, s.n, s.k, s.type);
            for (uint64_t word : algo.data) text += format(" %llx", (unsigned long long)word);
            text += "\n";
        }
        for (auto& [s, way] : ways) text += format("way %d %d %d %d\n", s[0], s[1], s[2], way);
        return text;
    }
    // False, and nothing taken, if the text is another version's or none of ours.
    bool take_choices(const std::string& text) {
        size_t version = 0, at = text.find('\n');
        if (sscanf(text.c_str(), "cublasLt %zu", &version) != 1 || version != cublasLtGetVersion()) return false;
        std::map<Shape, cublasLtMatmulAlgo_t> algorithms;
        std::map<std::array<int, 3>, int> read_ways;
        while (at != std::string::npos && ++at < text.size()) {
            Shape s;
            cublasLtMatmulAlgo_t algo;
            std::array<int, 3> linear;
            int used = 0, way;
            const char* p = text.c_str() + at;
            at = text.find('\n', at);
            if (sscanf(p, "way %d %d %d %d", &linear[0], &linear[1], &linear[2], &way) == 4) {
                if (way < 0 || way > 2) return false;
                read_ways[linear] = way;
                continue;
            }
            if (sscanf(p, "algorithm %d %d %d %d %d %d%n", &s.transA, &s.transB, &s.m, &s.n, &s.k, &s.type, &used) != 6)
                return false;
            for (uint64_t& word : algo.data) {
                unsigned long long bits;
                p += used;
                if (sscanf(p, "%llx%n", &bits, &used) != 1) return false;
                word = bits;
            }
            algorithms[s] = algo;
        }
        chosen = algorithms;
        ways = read_ways;
        return true;
    }

    void forget_plans() {
        for (auto& [key, p] : plans) {
            for (cublasLtMatrixLayout_t l : {p.first, p.second, p.out}) CHECK_CUBLAS(cublasLtMatrixLayoutDestroy(l));
            CHECK_CUBLAS(cublasLtMatmulDescDestroy(p.desc));
        }
        plans.clear();
    }
    void close() {
        forget_plans();
        chosen.clear();
        ways.clear();
        if (handle) CHECK_CUBLAS(cublasLtDestroy(handle));
        handle = nullptr;
    }

    void operator()(void* D, const floatX* A, const floatX* B, bool transA, bool transB, int m, int n, int k,
                    cudaDataType_t type, float beta, cudaStream_t stream) {
        const Shape shape = {transA, transB, m, n, k, int(type)};
        Plan& p = plan(shape);
        const float alpha = 1.0f;
        auto run = [&](const cublasLtMatmulAlgo_t& algo) {
            return cublasLtMatmul(handle, p.desc, &alpha, B, p.first, A, p.second, &beta, D, p.out, D, p.out, &algo,
                                  workspace, MATMUL_WORKSPACE, stream);
        };
        if (timing && p.algos.size() > 1) choose(p, shape, stream, run);
        check_cublas(run(p.algos[0]), "cublasLtMatmul", __FILE__, __LINE__);
    }
} matmul;

// out (N,M) = inp (N,K) w^T, w (M,K) as a linear layer stores it
void linear_forward(floatX* out, const floatX* inp, const floatX* w, int N, int K, int M, cudaStream_t stream) {
    matmul(out, inp, w, false, true, N, M, K, CUDA_FLOATX, 0.0f, stream);
}
// dinp (N,K) = dout (N,M) w, with `add` added to what was there; dw (M,K) = beta dw + dout^T inp
void linear_backward(floatX* dinp, bool add, Flat dw, float beta, const floatX* dout, const floatX* inp,
                     const floatX* w, int N, int K, int M, cudaStream_t stream) {
    matmul(dinp, dout, w, false, false, N, K, M, CUDA_FLOATX, add ? 1.0f : 0.0f, stream);
    matmul(dw.p, dout, inp, true, false, M, K, N, dw.half ? CUDA_R_16BF : CUDA_R_32F, beta, stream);
}

// =====================================================================================================================
// Matmul on Hopper (sm_90a), for SimpleNorm: a linear that leaves what the norm behind it has to know of its rows.
//   out[n,m] = sum_k inp[n,k] w[m,k],   sums[t,n] = sum of out[n,m]^2 over the columns 64 t <= m < 64 (t + 1)
// inp (N,K), w (M,K), out (N,M) bf16, row-major, K and M multiples of 8; sums (ceil(M / 64), N) float, of the outputs
// as they are stored. Every sum has one writer and one order of adding: same bits every run. A column tile's sums lie
// side by side, so that the eight rows of a warp's store and the rows that row_stats reads are whole sectors.
//
// A block stays on its multiprocessor and walks over tiles of ROWS x COLS outputs. Its last warpgroup loads: one thread
// fills a ring of slices, each 64 deep in k, of inp (ROWS,64) and w (COLS,64) by bulk copies with 128-byte swizzle, as
// far ahead as slots are free, also into the next tile while this one is being stored. full[s]: slot s has landed;
// empty[s]: every multiplying warp is done with it. The other two warpgroups multiply BANDS times 64 rows each by all
// columns. Ragged edges: copies read zeros beyond N, K and M, and write nothing there.
//
// Two shapes of tile; which of them is faster, or cuBLASLt, is measured for each shape of matrices. In clocks of the
// tensor cores (4096 FLOP each), a slice's copies from L2 and all traffic of the shared memory's 128 bytes a clock:
//   ROWS x COLS   BANDS  accumulators a thread  wgmma         clocks  L2, bytes a clock      shared, bytes a clock
//   128 x 256     1      128                    m64n256k16    1024    48 (49152 / 1024)      80 read + 48 written
//   256 x 192     2      192                    m64n192k16    1536    37 (57344 / 1536)      85 read + 37 written
// The second strains L2 less, the first leaves less of the last round of tiles empty. A tile's end, some 1400 clocks of
// rounding and storing, is 2% of the first's 64 slices at K 4096. (Two blocks of a cluster that share w by multicast
// would take 32 and 29 bytes a clock from L2.)
constexpr int SUMS_COLS = 64;                           // columns of a partial sum
constexpr int MATMUL_THREADS = 384, MATMUL_LOADER = 2;  // warpgroup 2 loads
constexpr int MATMUL_DEPTH = 64, MATMUL_LINE = 128;     // of a slice; its bytes, a row in shared memory
constexpr int MATMUL_BOX = 16 * MATMUL_LINE;            // bytes of a warp's store, 16 rows of 64 columns
constexpr int MATMUL_GROUP = 2048;                      // rows of the tiles walked together

template <int BANDS, int COLS>
struct MatmulTile {
    static constexpr int ROWS = 128 * BANDS, STAGES = BANDS == 1 ? 4 : 3;
    static constexpr int INP = ROWS * MATMUL_LINE, SLOT = INP + COLS * MATMUL_LINE;                       // bytes
    static constexpr int SMEM = STAGES * SLOT + 8 * 2 * MATMUL_BOX + 2 * STAGES * int(sizeof(uint64_t));  // bytes
};

// Row and column of the t-th tile. Groups of 2048 rows are walked column by column: what 132 multiprocessors have in
// hand at a time is then 2048 rows by about 2112 (3168) columns, and near a square is what needs the fewest bytes of
// inp and w (34 (43) MB at K 4096; L2 holds 50), while the next columns find the group's rows still in L2.
__device__ inline int2 matmul_tile(int t, int tile_rows, int tile_cols, int group_rows) {
    const int first = t / (group_rows * tile_cols) * group_rows, rows = min(tile_rows - first, group_rows);
    const int in_group = t - first * tile_cols;
    return make_int2(first + in_group % rows, in_group / rows);
}

template <int BANDS, int COLS>
__global__ void __launch_bounds__(MATMUL_THREADS, 1)
    matmul_sums_kernel(const __grid_constant__ CUtensorMap inp, const __grid_constant__ CUtensorMap w,
                       const __grid_constant__ CUtensorMap out, float* sums, int N, int K, int M) {
    if (!HOPPER_CODE) return;
    using S = MatmulTile<BANDS, COLS>;
    extern __shared__ __align__(1024) unsigned char matmul_smem[];
    unsigned char* boxes = matmul_smem + S::STAGES * S::SLOT;
    uint64_t *full = reinterpret_cast<uint64_t*>(boxes + 8 * 2 * MATMUL_BOX), *empty = full + S::STAGES;
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::STAGES; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 8);
        mbarrier_fence_init();
    }
    __syncthreads();
    const int tile_rows = (N + S::ROWS - 1) / S::ROWS, tile_cols = (M + COLS - 1) / COLS;
    const int tiles = tile_rows * tile_cols, steps = (K + MATMUL_DEPTH - 1) / MATMUL_DEPTH;
    const int group = __shfl_sync(ALL_LANES, int(threadIdx.x) / 128, 0);  // the compiler sees that a warp agrees
    int stage = 0;
    unsigned phase = 0;
    auto tile_at = [&](int t) { return matmul_tile(t, tile_rows, tile_cols, MATMUL_GROUP / S::ROWS); };
    auto advance = [&] {
        if (++stage == S::STAGES) stage = 0, phase ^= 1;
    };

    if (group == MATMUL_LOADER) {
        registers_less<40>();
        for (int t = threadIdx.x == 128 * MATMUL_LOADER ? blockIdx.x : tiles; t < tiles; t += gridDim.x) {
            const int2 tile = tile_at(t);
            for (int k = 0; k < steps; k++, advance()) {
                mbarrier_wait(empty + stage, phase ^ 1);  // at first, the phase before the first counts as completed
                mbarrier_arrive_expect(full + stage, S::SLOT);
                unsigned char* slot = matmul_smem + stage * S::SLOT;
                tma_load(slot, &inp, full + stage, k * MATMUL_DEPTH, tile.x * S::ROWS);
                tma_load(slot + S::INP, &w, full + stage, k * MATMUL_DEPTH, tile.y * COLS);
            }
        }
        return;
    }

    registers_more<232>();
    unsigned char* const box = boxes + 2 * warp() * MATMUL_BOX;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        float c[BANDS][COLS / 2];
        int before = 0;
        for (int k = 0; k < steps; k++, advance()) {
            mbarrier_wait(full + stage, phase);
            const unsigned char* slot = matmul_smem + stage * S::SLOT;
            const uint64_t a = wgmma_descriptor(slot + group * BANDS * 64 * MATMUL_LINE, 16, 8 * MATMUL_LINE);
            const uint64_t b = wgmma_descriptor(slot + S::INP, 16, 8 * MATMUL_LINE);
            wgmma_fence();
            #pragma unroll
            for (int j = 0; j < MATMUL_DEPTH / 16; j++)  // 16 deep: 32 bytes on
                #pragma unroll
                for (int i = 0; i < BANDS; i++)
                    wgmma_ss<COLS, 0, 0>(c[i], a + (i * 64 * MATMUL_LINE + 32 * j) / 16, b + 2 * j, k > 0 || j > 0);
            wgmma_commit();
            wgmma_wait<1>();  // this step's products run on; those of the one before have read their slot
            if (k > 0 && lane() == 0) mbarrier_arrive(empty + before);
            before = stage;
        }
        wgmma_wait<0>();
        #pragma unroll
        for (int i = 0; i < BANDS; i++) wgmma_registers<COLS / 2>(c[i]);
        if (lane() == 0) mbarrier_arrive(empty + before);

        // Each warp has 16 rows of a band: it rounds them, sums their squares, and stores 64 columns at a time, through
        // two boxes in turn.
        const int2 tile = tile_at(t);
        #pragma unroll
        for (int piece = 0; piece < BANDS * COLS / 64; piece++) {
            const int band = piece / (COLS / 64), m0 = tile.y * COLS + piece % (COLS / 64) * 64;
            const int n0 = tile.x * S::ROWS + (group * BANDS + band) * 64 + warp() % 4 * 16;
            unsigned char* to = box + piece % 2 * MATMUL_BOX;
            float square[2] = {0.0f, 0.0f};        // of rows lane / 4 and lane / 4 + 8
            if (lane() == 0) tma_store_wait<1>();  // the store before the last has left this box
            __syncwarp();
            unsigned r[4][4];  // of 16 columns each: matrices of rows 0-7 and 8-15, then 8 columns on
            round_operand<64>(r, c[band] + piece % (COLS / 64) * 32);
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                const unsigned pair = r[i / 4][i % 4];
                const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
                square[i % 2] += low * low + high * high;
            }
            store_box(to, r);
            fence_async_shared();
            __syncwarp();
            if (lane() == 0) {
                if (n0 < N && m0 < M) tma_store(&out, to, m0, n0);
                tma_store_commit();
            }
            #pragma unroll
            for (int s = 0; s < 2; s++) {
                const int n = n0 + lane() / 4 + 8 * s;
                const float sum = tile_row_sum(square[s]);
                if (sums && lane() % 4 == 0 && n < N && m0 < M) sums[size_t(m0 / SUMS_COLS) * N + n] = sum;
            }
        }
    }
    if (lane() == 0) tma_store_wait<0>();  // shared memory must outlive the stores that read it
}

template <int BANDS, int COLS>
void matmul_sums(floatX* out, float* sums, const floatX* inp, const floatX* w, int N, int K, int M,
                 cudaStream_t stream) {
    using S = MatmulTile<BANDS, COLS>;
    auto map = [](const floatX* x, int64_t rows, int64_t cols, int box_rows) {
        return tensor_map(x, {cols, rows, 1, 1}, {2 * cols, 2 * rows * cols, 2 * rows * cols},
                          {MATMUL_DEPTH, box_rows, 1, 1});
    };
    const CUtensorMap a = map(inp, N, K, S::ROWS), b = map(w, M, K, COLS), d = map(out, N, M, 16);
    const int tiles = (N + S::ROWS - 1) / S::ROWS * ((M + COLS - 1) / COLS), blocks = std::min(tiles, device_sms);
    auto kernel = matmul_sums_kernel<BANDS, COLS>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SMEM));
    matmul_sums_kernel<BANDS, COLS><<<blocks, MATMUL_THREADS, S::SMEM, stream>>>(a, b, d, sums, N, K, M);
    CHECK(cudaGetLastError());
}

// Ways to compute a linear: 0 cuBLASLt, else the kernel above with so many bands.
void linear_way(int way, floatX* out, float* sums, const floatX* inp, const floatX* w, int N, int K, int M,
                cudaStream_t stream) {
    if (way == 0) linear_forward(out, inp, w, N, K, M, stream);
    if (way == 1) matmul_sums<1, 256>(out, sums, inp, w, N, K, M, stream);
    if (way == 2) matmul_sums<2, 192>(out, sums, inp, w, N, K, M, stream);
}

#ifdef __CUDACC__
constexpr int TIMING_TURNS = 3;
#else
constexpr int TIMING_TURNS = 0;  // the CPU stand-in's times say nothing
#endif

// The fastest of them, timed in turns, so that a falling clock is everyone's; 1 without timing.
int choose_linear_way(floatX* out, float* sums, const floatX* inp, const floatX* w, int N, int K, int M,
                      cudaStream_t stream) {
    int best = 1;
    float least = INFINITY;
    for (int turn = 0; turn < TIMING_TURNS; turn++)
        for (int way : {0, 1, 2}) {
            auto launch = [&] { return linear_way(way, out, sums, inp, w, N, K, M, stream), true; };
            const float ms = least_ms(launch, stream);
            if (ms < least) least = ms, best = way;
        }
    return best;
}

// 1 / rms of the columns from .. from + width of row n, by one thread. `from` is a multiple of 64, and so is width
// unless the row ends there.
__device__ inline float rstd_from_sums(const float* sums, int N, int n, int from, int width, float eps) {
    float sum = 0.0f;
    for (int t = from / SUMS_COLS; t * SUMS_COLS < from + width; t++) sum += sums[size_t(t) * N + n];
    return rsqrtf(sum / width + eps);
}

// stats[n,p] = (0, rstd) of part p of row n: what row_stats finds for RMSNorm, in the layout of simplenorm.cuh's
// stats (N,parts) float2. Parts have width0 columns, then width1, then width2. One thread a row and part.
__global__ void row_stats_from_partials_kernel(float2* stats, const float* sums, int N, int width0, int width1,
                                               int width2, float eps) {
    constexpr int ROWS = 128;
    const int p = blockIdx.y, width = p == 0 ? width0 : p == 1 ? width1 : width2;
    const int from = p == 0 ? 0 : p == 1 ? width0 : width0 + width1;
    for (int n = blockIdx.x * ROWS + threadIdx.x; n < min(N, int(blockIdx.x + 1) * ROWS); n += blockDim.x)
        stats[size_t(n) * gridDim.y + p] = make_float2(0.0f, rstd_from_sums(sums, N, n, from, width, eps));
}

// stats (N,parts) float2 from sums, for 1 to 3 parts of a row, side by side: (M), (w1, w3), (q, k, v). All but the last
// have a multiple of 64 columns.
void row_stats_from_partials(float2* stats, const float* sums, int N, const std::vector<int>& widths, float eps,
                             cudaStream_t stream) {
    const int parts = int(widths.size());
    row_stats_from_partials_kernel<<<dim3((N + 127) / 128, parts), 128, 0, stream>>>(
        stats, sums, N, widths[0], parts > 1 ? widths[1] : 0, parts > 2 ? widths[2] : 0, eps);
    CHECK(cudaGetLastError());
}

// out (N,M) = inp (N,K) w^T with a norm behind it, M the sum of its parts' widths. True if stats (N,parts) float2 are
// there too: on Hopper, bf16, RMSNorm, K and M multiples of 8, all parts but the last of 64, and only for shapes that
// were timed (time_matmuls) and found faster than by cuBLASLt. sums: scratch, ceil(M / 64) N floats. With stats null,
// the same product alone, by the same way: out has the same bits.
bool linear_forward_stats(floatX* out, float2* stats, float* sums, const floatX* inp, const floatX* w, int N, int K,
                          const std::vector<int>& widths, Norm norm, cudaStream_t stream) {
    int M = 0;
    bool able = BF16 && hopper && !norm.center && K % 8 == 0;
    for (int width : widths) able = able && M % SUMS_COLS == 0, M += width;
    int way = 0;
    if (able && M % 8 == 0) {
        const std::array<int, 3> shape = {N, K, M};
        if (matmul.timing && !matmul.ways.count(shape))
            matmul.ways[shape] = choose_linear_way(out, sums, inp, w, N, K, M, stream);
        auto found = matmul.ways.find(shape);
        if (found != matmul.ways.end()) way = found->second;
    }
    linear_way(way, out, stats ? sums : nullptr, inp, w, N, K, M, stream);
    if (way == 0 || !stats) return false;
    row_stats_from_partials(stats, sums, N, widths, norm.eps, stream);
    return true;
}

// =====================================================================================================================
// Causal attention, FlashAttention's way (Dao 2023): tiles of the scores live in registers, never in memory.
//   out_i = sum_{j <= i} p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i . k_j,   scale = 1 / sqrt(HS)
//   lse_i = log sum_{j <= i} exp(s_ij)
// q (B,NH,T,HS); k, v (B,NKV,T,HS), query head h reads k/v head h NKV / NH; out (B,T,NH HS); all floatX. lse (B,NH,T)
// float, kept for the backward. Exponentials are powers of 2 of scores times `scale2` = scale log2(e).

constexpr float LOG2E = 1.44269504f;

// Forward: a warp has QUERY_ROWS queries, a block FORWARD_WARPS warps; keys come in tiles of FORWARD_KEYS. With bf16
// two rows of fragments a warp, so that a fragment of k or v, read from shared memory, feeds two mma.
constexpr int QUERY_ROWS = SERIAL ? 64 : BF16 ? 32 : 16, FORWARD_WARPS = SERIAL ? 1 : 4, FORWARD_KEYS = 64;
constexpr int FORWARD_THREADS = FORWARD_WARPS * WARP_SIZE, FORWARD_ROWS = FORWARD_WARPS * QUERY_ROWS;
// Backward: a warp has KEY_ROWS keys, a block BACKWARD_KEYS; queries come in tiles of BACKWARD_QUERIES.
constexpr int KEY_ROWS = SERIAL ? 64 : 16, BACKWARD_WARPS = SERIAL ? 1 : BF16 ? 8 : 4;
constexpr int BACKWARD_THREADS = BACKWARD_WARPS * WARP_SIZE, BACKWARD_KEYS = BACKWARD_WARPS * KEY_ROWS;
constexpr int BACKWARD_QUERIES = SERIAL || BF16 ? 64 : 32;
// Tiles under way while one is worked on: each of the forward's stream k, v, k, v..; each pair of q and dout.
constexpr int FORWARD_AHEAD = SERIAL ? 0 : 2, BACKWARD_AHEAD = SERIAL ? 0 : 1;

// The tile and the head (of all in the batch) of block n: 16 heads at a time, so that what their blocks share stays in
// the L2 cache, tile 0 of each of them, then tile 1..; those in flight at once are neighbours.
struct Place {
    int tile, head;
};
__device__ inline Place attention_place(int n, int heads, int tiles) {
    const int first = n / (16 * tiles) * 16, together = min(16, heads - first);
    n -= first * tiles;
    return {n / together, first + n % together};
}

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The steps of the online softmax on a tile of scores, whose rows are queries. First -infinity wherever the column is
// beyond the row's last visible one, row + diagonal.
template <int M, int N>
__device__ inline void mask_scores(Tile<M, N, BY_COLUMN>& p, int diagonal) {
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) p.at(s, e) = p.col(e) <= p.row(s) + diagonal ? p.at(s, e) : -INFINITY;
}
// p will be taken relative to 2^(scale2 top). What was summed is rescaled to the new maximum only when that has grown
// by more than 2^8, which p bears. True, for the whole warp, if so: `top` is new, and sums so far are to be multiplied
// by `keep`. Column 0 is in everyone's first tile, so the maximum is finite from there on.
template <int M, int N>
__device__ inline bool softmax_top(const Tile<M, N, BY_COLUMN>& p, float* top, float* keep, float scale2) {
    float most[p.SLOTS];
    bool grown = false;
    for (int s = 0; s < p.SLOTS; s++) most[s] = top[s];
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) most[s] = fmaxf(most[s], p.at(s, e));
    #pragma unroll
    for (int s = 0; s < p.SLOTS; s++) {
        most[s] = tile_row_max(most[s]);
        grown |= scale2 * (most[s] - top[s]) > 8.0f;
    }
    grown = __any_sync(ALL_LANES, grown);
    if (grown) {
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) {
            keep[s] = fast_exp2(scale2 * (top[s] - most[s]));
            top[s] = most[s];
        }
    }
    return grown;
}
// p = 2^(scale2 (score - top)) in the scores' place; sum[s] += p over this thread's columns of the row
template <int M, int N>
__device__ inline void softmax_exp(Tile<M, N, BY_COLUMN>& p, const float* top, float* sum, float scale2) {
    float most[p.SLOTS];
    for (int s = 0; s < p.SLOTS; s++) most[s] = scale2 * top[s];
    #pragma unroll
    for (int e = 0; e < p.PER_ROW; e++)
        #pragma unroll
        for (int s = 0; s < p.SLOTS; s++) {
            const float x = fast_exp2(scale2 * p.at(s, e) - most[s]);
            p.at(s, e) = x;
            sum[s] += x;
        }
}

// One block FORWARD_ROWS queries of a head, those with the most keys first.
template <int HS>
__global__ void __launch_bounds__(FORWARD_THREADS, BF16 ? 2 : 1)
    attention_forward_kernel(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, int B, int T,
                             int NH, int NKV, float scale) {
    constexpr int W = WIDTH<HS>, COLS = FORWARD_KEYS, SLOT = COLS * STRIDE<W>;
    constexpr bool KEPT = BF16 && !SERIAL && HS <= 64;  // registers that are left hold q
    extern __shared__ __align__(128) SharedX attention_smem[];
    SharedX *sq = attention_smem, *ring = sq + FORWARD_ROWS * STRIDE<W>;
    const int tiles = ceil_div(T, FORWARD_ROWS);
    const Place place = attention_place(blockIdx.x, B * NH, tiles);
    const int b = place.head / NH, head = place.head % NH, row0 = (tiles - 1 - place.tile) * FORWARD_ROWS;
    const int first = warp() * QUERY_ROWS;  // this warp's rows in the block
    const size_t q_at = size_t(place.head) * T + row0, kv_at = (size_t(b) * NKV + head / (NH / NKV)) * T * HS;
    const int steps = ceil_div(min(row0 + FORWARD_ROWS, T), COLS);

    // tile n of k0, v0, k1, v1, ..: where it comes from, where it lies
    auto source = [&](int n) { return (n % 2 ? v : k) + kv_at + size_t(n / 2 * COLS) * HS; };
    auto slot = [&](int n) { return ring + n % (FORWARD_AHEAD + 1) * SLOT; };
    auto fetch = [&](int n) {
        if (n < 2 * steps) load_tile<HS, COLS, FORWARD_THREADS>(slot(n), source(n), HS, T - n / 2 * COLS);
        copy_commit();
    };
    auto stream = [&](int n) { return tile_home<HS, COLS>(slot(n), source(n), HS, T - n / 2 * COLS); };
    load_transposed<HS, FORWARD_ROWS, FORWARD_THREADS>(sq, q + q_at * HS, HS, T - row0);
    for (int n = 0; n < FORWARD_AHEAD; n++) fetch(n);
    Left<W, QUERY_ROWS, KEPT> rows(sq, first);
    if (KEPT) {
        copy_wait<1>();
        __syncthreads();
        rows.keep();
    }

    typedef Tile<QUERY_ROWS, W> Out;
    typedef Tile<QUERY_ROWS, COLS, BY_COLUMN> Scores;
    const float scale2 = scale * LOG2E;
    Out acc;
    acc.zero();
    float top[Out::SLOTS], sum[Out::SLOTS];  // p are taken relative to 2^(scale2 top)
    for (int s = 0; s < Out::SLOTS; s++) top[s] = -INFINITY, sum[s] = 0.0f;
    for (int step = 0; step < steps; step++) {
        const int diagonal = row0 + first - step * COLS;  // the tile's columns up to row + diagonal are visible
        const bool some = diagonal + QUERY_ROWS > 0, all = diagonal >= COLS - 1;
        const Part part = all ? ALL : LOWER;
        copy_wait<FORWARD_AHEAD / 2>();
        __syncthreads();  // this tile is here, and nobody reads the one before it any more
        fetch(2 * step + FORWARD_AHEAD);
        Scores p;
        if (some) {
            mma_nt(p, rows, stream(2 * step), part);
            if (!all) mask_scores(p, diagonal);
            float keep[Out::SLOTS];
            if (softmax_top(p, top, keep, scale2)) {
                #pragma unroll
                for (int s = 0; s < p.SLOTS; s++) {
                    sum[s] *= keep[s];
                    #pragma unroll
                    for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= keep[s];
                }
            }
            softmax_exp(p, top, sum, scale2);
        }
        copy_wait<FORWARD_AHEAD / 2>();
        __syncthreads();
        fetch(2 * step + 1 + FORWARD_AHEAD);
        if (some) mma_nn(acc, p, stream(2 * step + 1), part);
    }
    #pragma unroll
    for (int s = 0; s < Out::SLOTS; s++) {
        const float total = tile_row_sum(sum[s]);
        #pragma unroll
        for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= 1.0f / total;
        if (acc.col(0) == 0 && row0 + first + acc.row(s) < T)
            lse[q_at + first + acc.row(s)] = scale * top[s] + logf(total);
    }
    store_tile<HS>(out + ((size_t(b) * T + row0 + first) * NH + head) * HS, size_t(NH) * HS, T - row0 - first, acc,
                   sq + first * STRIDE<W>);
}

// Forward on Hopper, head sizes 64 and 128, FlashAttention-3's way (Shah et al. 2024). Blocks stay on their
// multiprocessors and take tiles of ROWS queries of a head, those with the most keys first. The last warpgroup loads:
// one thread fills two places for q (the next tile's comes while this one is worked on) and two rings, for k and for v,
// of tiles of KEYS keys, by bulk copies. Each of the other GROUPS warpgroups has 64 queries:
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
                                    const __grid_constant__ CUtensorMap v, int B, int T, int NH, int NKV, float scale) {
    if (!HOPPER_CODE) return;
    using F = HopperForward<HS>;
    constexpr int KEYS = F::KEYS, LINE = F::LINE, STAGES = F::STAGES;
    extern __shared__ __align__(1024) unsigned char attention_hopper_smem[];
    unsigned char *sq = attention_hopper_smem, *sk = sq + 2 * F::Q, *sv = sk + STAGES * F::TILE;
    uint64_t *q_full = reinterpret_cast<uint64_t*>(sv + STAGES * F::TILE), *q_empty = q_full + 2;
    uint64_t *k_full = q_empty + 2, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES, *v_empty = v_full + STAGES;
    int* place_tile = reinterpret_cast<int*>(v_empty + STAGES);  // which tile's q is in each place
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
            place_tile[buffer] = tile;
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
            for (int n = 0; n < steps; n++, advance()) {
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
        const int tile = place_tile[buffer];
        if (tile >= all_tiles) break;
        const Place place = attention_place(tile, B * NH, tiles);
        const int row0 = first_row(place), steps = steps_of(row0);
        unsigned char* rows = sq + buffer * F::Q + group * 64 * LINE;  // this group's, all columns
        const uint64_t q_rows = wgmma_descriptor(rows, 16, 8 * LINE);

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
        softmax(0);
        round_operand<KEYS>(weights, p.v);
        for (int n = 1; n < steps; n++) {
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

// delta[b,h,t] = sum_d dout[b,t,h,d] out[b,t,h,d]: the softmax backward's row sum. One block a token; DELTA_LANES lanes
// a head, 16 bytes at a time. Zeroes the turns of attention_backward_kernel.
template <int HS>
constexpr int DELTA_LANES = SERIAL           ? 1
                            : HS / PACK >= 8 ? 8
                            : HS / PACK >= 4 ? 4
                                             : 2;

template <int HS>
__global__ void attention_delta_kernel(float* delta, int* turns, const floatX* dout, const floatX* out, int T, int NH) {
    constexpr int LANES = DELTA_LANES<HS>;
    const size_t n = blockIdx.x, b = n / T, t = n % T;
    for (int head0 = 0; head0 < NH; head0 += blockDim.x / LANES) {
        const int head = head0 + threadIdx.x / LANES;
        const size_t at = (n * NH + head) * HS;
        float sum = 0.0f;
        if (head < NH)
            for (int i = threadIdx.x % LANES * PACK; i < HS; i += LANES * PACK) {
                alignas(16) floatX x[PACK], y[PACK];
                *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(dout + at + i);
                *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(out + at + i);
                for (int e = 0; e < PACK; e++) sum += float(x[e]) * float(y[e]);
            }
        for (int m = LANES / 2; m > 0; m /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, m);
        if (head >= NH || threadIdx.x % LANES) continue;
        const size_t row = b * NH + head;
        delta[row * T + t] = sum;
        if (t % BACKWARD_QUERIES == 0) turns[row * ceil_div(T, BACKWARD_QUERIES) + t / BACKWARD_QUERIES] = 0;
    }
}

// dv_j = sum_i p_ij dout_i,  dk_j = sum_i ds_ij q_i,  over the queries i >= j of all heads that share k and v;
// dq_i = sum_{j <= i} ds_ij k_j;   ds_ij = scale p_ij (dout_i . v_j - delta_i)
// One block BACKWARD_KEYS keys of a k/v head; its score tiles are transposed: rows are keys, columns queries. Queries
// come from the last tile down to the keys' own. dk and dv stay in registers. dq, to which every block at or before a
// query adds, is summed in memory in the order of the keys, so that its bits are the same in every run: blocks take
// turns at a query tile, turns[tile] is whose it is. A block waits only for blocks of lower number, which are on the
// machine before it. Heads' first blocks start together, and each later one follows a tile behind, without waiting.
// sum (B NH, query tiles, BACKWARD_QUERIES WIDTH) float, in the order of the threads' registers; turns (B NH, query
// tiles), 0 at the start. In the serial geometry one block does all keys of a head, in order.
template <int HS>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1)
    attention_backward_kernel(floatX* dq, floatX* dk, floatX* dv, float* sum, int* turns, const floatX* dout,
                              const floatX* q, const floatX* k, const floatX* v, const float* lse, const float* delta,
                              int B, int T, int NH, int NKV, float scale) {
    constexpr int W = WIDTH<HS>, LD = STRIDE<W>, KEYS = BACKWARD_KEYS, COLS = BACKWARD_QUERIES, M = KEY_ROWS;
    constexpr int THREADS = BACKWARD_THREADS;
    // dq's tile over the warps: 16 rows, and half of the columns if that is a multiple of 16, else some warps rest
    constexpr int DQ_ROWS = SERIAL ? COLS : 16, DQ_PARTS = SERIAL || W % 32 ? 1 : 2, DQ_COLS = W / DQ_PARTS;
    extern __shared__ __align__(128) SharedX attention_smem[];
    SharedX *sv = attention_smem, *sk = sv + KEYS * LD, *skt = SERIAL ? sk + KEYS * LD : sk;  // skt: k transposed
    SharedX *sds = skt + KEYS * LD, *sq = sds + KEYS * STRIDE<COLS>, *sdo = sq + (BACKWARD_AHEAD + 1) * COLS * LD;
    float* stats = reinterpret_cast<float*>(sdo + (BACKWARD_AHEAD + 1) * COLS * LD);  // lse, delta

    const int group = NH / NKV, blocks = ceil_div(T, KEYS), tiles = ceil_div(T, COLS);
    const Place place = attention_place(blockIdx.x, B * NKV, gridDim.x / (B * NKV));
    const int b = place.head / NKV, head0 = place.head % NKV * group, first = warp() * M;
    const int dq_row = warp() / DQ_PARTS * DQ_ROWS, dq_col = warp() % DQ_PARTS * DQ_COLS;
    const float scale2 = scale * LOG2E;
    for (int block = place.tile; block < (SERIAL ? blocks : place.tile + 1); block++) {
        const int row0 = block * KEYS, last_tiles = tiles - row0 / COLS, steps = group * last_tiles;
        const size_t kv_at = (size_t(place.head) * T + row0) * HS;
        auto step_head = [&](int step) { return size_t(b) * NH + head0 + step / last_tiles; };
        auto step_tile = [&](int step) { return tiles - 1 - step % last_tiles; };
        auto slot = [&](int step) { return step % (BACKWARD_AHEAD + 1) * COLS; };
        auto source_q = [&](int step) { return q + (step_head(step) * T + step_tile(step) * COLS) * HS; };
        auto source_do = [&](int step) {
            return dout + ((size_t(b) * T + step_tile(step) * COLS) * NH + head0 + step / last_tiles) * HS;
        };
        auto fetch = [&](int step) {
            if (step < steps) {
                const int col0 = step_tile(step) * COLS;
                const size_t q_at = step_head(step) * T + col0;
                load_tile<HS, COLS, THREADS>(sq + slot(step) * LD, source_q(step), HS, T - col0);
                load_tile<HS, COLS, THREADS>(sdo + slot(step) * LD, source_do(step), size_t(NH) * HS, T - col0);
                for (int i = threadIdx.x; i < 2 * COLS; i += THREADS) {
                    const bool there = col0 + i % COLS < T;
                    copy_async<4>(stats + 2 * slot(step) + i, (i < COLS ? lse : delta) + q_at + (there ? i % COLS : 0),
                                  there);
                }
            }
            copy_commit();
        };
        load_transposed<HS, KEYS, THREADS>(sv, v + kv_at, HS, T - row0);
        load_transposed<HS, KEYS, THREADS>(skt, k + kv_at, HS, T - row0);
        if (SERIAL) load_tile<HS, KEYS, THREADS>(sk, k + kv_at, HS, T - row0);
        for (int step = 0; step < BACKWARD_AHEAD; step++) fetch(step);
        const SharedX* keys = tile_home<HS, KEYS>(sk, k + kv_at, HS, T - row0);
        Left<W, M, false> k_rows(skt, first), v_rows(sv, first);
        Tile<M, W> acc_k, acc_v;
        acc_k.zero();
        acc_v.zero();
        int* given = nullptr;  // the turn that is to be passed on
        for (int step = 0; step < steps; step++) {
            const int tile = step_tile(step), diagonal = row0 + first - tile * COLS;  // columns from row + diagonal on
            const bool some = diagonal < COLS, all = diagonal <= 1 - M;
            const Part part = all ? ALL : UPPER;
            const SharedX* tile_q = tile_home<HS, COLS>(sq + slot(step) * LD, source_q(step), HS, T - tile * COLS);
            const SharedX* tile_do =
                tile_home<HS, COLS>(sdo + slot(step) * LD, source_do(step), size_t(NH) * HS, T - tile * COLS);
            const float *tile_lse = stats + 2 * slot(step), *tile_delta = tile_lse + COLS;
            copy_wait<0>();
            __syncthreads();  // this tile is here; the last step is over: its tiles are read, its dq is written
            fetch(step + BACKWARD_AHEAD);
            Tile<M, COLS, BY_COLUMN> p, ds;
            if (some) {
                mma_nt(p, k_rows, tile_q, part);
                #pragma unroll
                for (int e = 0; e < p.PER_ROW; e += 2) {
                    const float2 l = *reinterpret_cast<const float2*>(tile_lse + p.col(e));
                    #pragma unroll
                    for (int s = 0; s < p.SLOTS; s++) p.at(s, e) = fast_exp2(scale2 * p.at(s, e) - LOG2E * l.x);
                    #pragma unroll
                    for (int s = 0; s < p.SLOTS; s++) p.at(s, e + 1) = fast_exp2(scale2 * p.at(s, e + 1) - LOG2E * l.y);
                }
                // Queries beyond T have dout and delta 0 and add nothing; keys beyond T are after every query
                if (!all) {
                    #pragma unroll
                    for (int e = 0; e < p.PER_ROW; e++)
                        #pragma unroll
                        for (int s = 0; s < p.SLOTS; s++)
                            p.at(s, e) = p.col(e) >= p.row(s) + diagonal ? p.at(s, e) : 0.0f;
                }
                mma_nn(acc_v, p, tile_do, part);
                mma_nt(ds, v_rows, tile_do, part);
                #pragma unroll
                for (int e = 0; e < p.PER_ROW; e += 2) {
                    const float2 d = *reinterpret_cast<const float2*>(tile_delta + p.col(e));
                    #pragma unroll
                    for (int s = 0; s < p.SLOTS; s++) ds.at(s, e) = p.at(s, e) * (ds.at(s, e) - d.x);
                    #pragma unroll
                    for (int s = 0; s < p.SLOTS; s++) ds.at(s, e + 1) = p.at(s, e + 1) * (ds.at(s, e + 1) - d.y);
                }
            } else {
                ds.zero();
            }
            store_scores(sds, first, ds);
            if (given && threadIdx.x == 0) flag_write(given, block + 1);
            __syncthreads();

            const size_t at = step_head(step) * tiles + tile;
            const bool adds = dq_row < COLS, ends = block == min(tile * COLS + COLS - 1, T - 1) / KEYS;
            float* part_sum = sum + at * COLS * W + size_t(warp()) * DQ_ROWS * DQ_COLS;
            Tile<DQ_ROWS, DQ_COLS> acc;
            acc.zero();
            if (adds && block > 0) {  // early, so that the loads take no time
                if (lane() == 0)
                    while (flag_read(turns + at) != block) flag_pause();
                __syncwarp();
                #pragma unroll
                for (int i = 0; i < int(sizeof(acc.v) / 16); i++)
                    reinterpret_cast<float4*>(acc.v)[i] =
                        __ldcg(reinterpret_cast<const float4*>(part_sum) + i * WARP_SIZE + lane());
            }
            if (some) mma_nn(acc_k, ds, tile_q, part);
            if (adds) {
                mma_tn<COLS, W, KEYS>(acc, sds, dq_row, keys, dq_col, part);
                if (ends) {
                    #pragma unroll
                    for (int s = 0; s < acc.SLOTS; s++) {
                        const int t = tile * COLS + dq_row + acc.row(s);
                        floatX* row = dq + (step_head(step) * T + t) * HS + dq_col;
                        #pragma unroll
                        for (int e = 0; e < acc.PER_ROW; e += 2)
                            if (t < T && dq_col + acc.col(e) < HS)
                                store_pair(row + acc.col(e), scale * acc.at(s, e), scale * acc.at(s, e + 1));
                    }
                } else {
                    #pragma unroll
                    for (int i = 0; i < int(sizeof(acc.v) / 16); i++)
                        __stcg(reinterpret_cast<float4*>(part_sum) + i * WARP_SIZE + lane(),
                               reinterpret_cast<const float4*>(acc.v)[i]);
                }
            }
            given = ends ? nullptr : turns + at;
        }
        __syncthreads();
        if (given && threadIdx.x == 0) flag_write(given, block + 1);
        #pragma unroll
        for (float& x : acc_k.v) x *= scale;
        store_tile<HS>(dk + kv_at + size_t(first) * HS, HS, T - row0 - first, acc_k, sk + first * LD);
        store_tile<HS>(dv + kv_at + size_t(first) * HS, HS, T - row0 - first, acc_v, sv + first * LD);
    }
}

// Backward on Hopper, head sizes 64 and 128: the same sums by blocks of KEYS keys, in the same turns. The last
// warpgroup's first warp loads: k and v once, then a ring of tiles of q, dout (bulk copies), lse and delta. Each of the
// other two groups has 64 of the keys, scores transposed: p (64,QUERIES) = k q^T, dp = v dout^T,
//   dv += p dout,  dk += ds q,  p and ds from registers;  dq = ds^T k over all keys, ds through shared memory
// where a group has half of the columns of dq (head size 128) or half of its queries (64): 64 x 64 in both cases. What
// a block has of dq it leaves in shared memory; two warps of the last group, for every other tile each, wait for the
// turn and add it to `sum`: one bulk addition, so that each element has one order of adding. The last block to add to a
// tile adds in registers, scales and rounds. A tile is 2560 clocks of the tensor cores (4096 FLOP each), loads 32 KB
// and adds 32 KB.
// sum (B NH, query tiles, QUERIES HS) float, in the order of the threads' registers; turns as above.
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
                                     const float* lse, const float* delta, int B, int T, int NH, int NKV, float scale) {
    if (!HOPPER_CODE) return;
    using F = HopperBackward<HS>;
    constexpr int KEYS = F::KEYS, QUERIES = F::QUERIES, LINE = F::LINE, STAGES = F::STAGES;
    extern __shared__ __align__(1024) unsigned char attention_hopper_smem[];
    unsigned char *sk = attention_hopper_smem, *sv = sk + F::KV, *sq = sv + F::KV, *sdo = sq + STAGES * F::TILE;
    unsigned char* sds = sdo + STAGES * F::TILE;
    float* sdq = reinterpret_cast<float*>(sds + STAGES * F::DS);  // two places that are used in turn
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
    // all query heads and tiles that see the block's keys; where their dq is summed; is this block the last to add to
    // it
    auto for_each_tile = [&](auto work) {
        for (int head = first_head; head < end_head; head++)
            for (int tile = tiles - 1; tile >= row0 / QUERIES; tile--) work(head, tile);
    };
    auto sum_at = [&](int head, int tile) { return sum + size_t(head * tiles + tile) * QUERIES * HS; };
    auto turn_of = [&](int head, int tile) { return turns + head * ceil_div(T, BACKWARD_QUERIES) + tile; };
    auto is_last = [&](int tile) { return block == min(tile * QUERIES + QUERIES - 1, T - 1) / KEYS; };
    // dq goes to memory through two places in turn, each with a warp that adds. Named barriers between it and those
    // that multiply:
    auto place_free = [](int place) { return 2 + place; };
    auto place_full = [](int place) { return 4 + place; };
    constexpr int PLACE_THREADS = 256 + WARP_SIZE;
    int stage = 0, next_place = 0;
    unsigned phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (group == 2) {
        registers_less<40>();
        const int adder = warp() % 4 - 1;  // the first warp loads
        if (adder == 0 || adder == 1) {
            float* from = sdq + adder * QUERIES * HS;
            named_barrier_arrive(place_free(adder), PLACE_THREADS);
            for_each_tile([&](int head, int tile) {
                if (is_last(tile)) return;
                const bool mine = next_place == adder;
                next_place ^= 1;
                if (!mine) return;
                int* turn = turn_of(head, tile);
                if (lane() == 0)
                    while (flag_read(turn) != block) flag_pause();
                __syncwarp();
                named_barrier_sync(place_full(adder), PLACE_THREADS);
                if (lane() == 0) {
                    fence_async_global();
                    if (block == 0)
                        bulk_store(sum_at(head, tile), from, F::DQ);
                    else
                        bulk_add(sum_at(head, tile), from, F::DQ);
                    tma_store_commit();
                    tma_store_wait<0>();
                }
                __syncwarp();
                named_barrier_arrive(place_free(adder), PLACE_THREADS);
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
    mbarrier_wait(kv_full, 0);
    for_each_tile([&](int head, int tile) {
        Scores p[PIECES], ds[PIECES];
        unsigned rounded_p[PIECES][4][4], rounded_ds[PIECES][4][4];
        auto piece_at = [&](int i) { return uint64_t((stage * F::TILE + i * 64 * LINE) / 16); };
        mbarrier_wait(full + stage, phase);
        multiply_rows(p[0], k_rows, q_rows + piece_at(0));
        multiply_rows(ds[0], v_rows, do_rows + piece_at(0));
        if constexpr (PIECES == 2) multiply_rows(p[1], k_rows, q_rows + piece_at(1));
        #pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const float *piece_lse = stats + stage * 2 * QUERIES + 64 * i, *piece_delta = piece_lse + QUERIES;
            const int diagonal = row0 + first - tile * QUERIES - 64 * i;  // columns from row + diagonal on
            // behind p are dp and p[1]; at last dv, dk and dp
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
            round_operand<64>(rounded_p[i], p[i].v);
            multiply_columns(acc_v, rounded_p[i], do_columns + piece_at(i));
            // behind dp are p[1] and dv; at last dv
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

        Tile<16, 64> acc;
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            wgmma_ss<64, 1, 1>(acc.v, ds_columns + (stage * F::DS + i * 16 * LINE) / 16, k_columns + i * LINE, i > 0);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_registers<HS / 2>(acc_k.v);
        wgmma_registers<HS / 2>(acc_v.v);
        if (lane() == 0) mbarrier_arrive(empty + stage);
        wgmma_wait<0>();
        wgmma_registers<32>(acc.v);
        const int at = group * 8 * 128 + threadIdx.x % 128;
        if (is_last(tile)) {
            if (block > 0) {
                if (lane() == 0)
                    while (flag_read(turn_of(head, tile)) != block) flag_pause();
                __syncwarp();
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
                for (int e = 0; e < acc.PER_ROW; e += 2)
                    if (t < T) store_pair(row + acc.col(e), scale * acc.at(s, e), scale * acc.at(s, e + 1));
            }
        } else {
            float4* to = reinterpret_cast<float4*>(sdq + next_place * QUERIES * HS) + at;
            named_barrier_sync(place_free(next_place), PLACE_THREADS);
            #pragma unroll
            for (int i = 0; i < 8; i++) to[i * 128] = reinterpret_cast<const float4*>(acc.v)[i];
            fence_async_shared();
            named_barrier_arrive(place_full(next_place), PLACE_THREADS);
            next_place ^= 1;
        }
        advance();
    });
    for (int i = 0; i < 2; i++) named_barrier_sync(place_free(i), PLACE_THREADS);
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

// floats of attention_backward's scratch: the sums of dq in tiles of up to 128 queries, delta, the turns
size_t attention_scratch(Heads h) {
    const size_t rows = size_t(h.B) * h.NH, tiles = ceil_div(h.T, BACKWARD_QUERIES), padded = ceil_div(h.T, 128) * 128;
    return rows * (padded * ((h.HS + 15) / 16 * 16) + h.T + tiles);
}

// The map of x (heads,T,HS) for boxes of `rows` rows and 64 columns; rows beyond T are zero.
CUtensorMap heads_map(const floatX* x, int heads, int T, int HS, int rows) {
    const int64_t row = 2 * HS, head = T * row;
    return tensor_map(x, {HS, T, heads, 1}, {row, head, heads * head}, {64, rows, 1, 1});
}
// the same of x (B,T,NH HS)
CUtensorMap tokens_map(const floatX* x, Heads h, int rows) {
    const int64_t row = 2 * h.NH * h.HS, batch = h.T * row;
    return tensor_map(x, {h.NH * h.HS, h.T, h.B, 1}, {row, batch, h.B * batch}, {64, rows, 1, 1});
}

template <int HS>
void attention_forward_hopper(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                              cudaStream_t stream) {
    using F = HopperForward<HS>;
    const CUtensorMap map_q = heads_map(q, h.B * h.NH, h.T, HS, F::ROWS);
    const CUtensorMap map_k = heads_map(k, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_v = heads_map(v, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_out = tokens_map(out, h, 16);
    const int blocks = std::min(h.B * h.NH * ceil_div(h.T, F::ROWS), device_sms);
    auto kernel = attention_forward_hopper_kernel<HS>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SMEM));
    attention_forward_hopper_kernel<HS><<<blocks, F::THREADS, F::SMEM, stream>>>(
        map_out, lse, map_q, map_k, map_v, h.B, h.T, h.NH, h.NKV, 1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

template <int HS>
void attention_forward_hs(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                          cudaStream_t stream) {
    if constexpr (BF16 && (HS == 64 || HS == 128))
        if (hopper) return attention_forward_hopper<HS>(out, lse, q, k, v, h, stream);
    constexpr int ROWS = FORWARD_ROWS + (FORWARD_AHEAD + 1) * FORWARD_KEYS;
    constexpr int smem = ROWS * STRIDE<WIDTH<HS>> * sizeof(SharedX);
    CHECK(cudaFuncSetAttribute(attention_forward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    attention_forward_kernel<HS><<<h.B * h.NH * ceil_div(h.T, FORWARD_ROWS), FORWARD_THREADS, smem, stream>>>(
        out, lse, q, k, v, h.B, h.T, h.NH, h.NKV, 1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

template <int HS>
void attention_backward_hopper(floatX* dq, floatX* dk, floatX* dv, float* sum, int* turns, const floatX* dout,
                               const floatX* q, const floatX* k, const floatX* v, const float* lse, const float* delta,
                               Heads h, cudaStream_t stream) {
    using F = HopperBackward<HS>;
    const CUtensorMap map_q = heads_map(q, h.B * h.NH, h.T, HS, F::QUERIES);
    const CUtensorMap map_k = heads_map(k, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_v = heads_map(v, h.B * h.NKV, h.T, HS, F::KEYS);
    const CUtensorMap map_dk = heads_map(dk, h.B * h.NKV, h.T, HS, 16);
    const CUtensorMap map_dv = heads_map(dv, h.B * h.NKV, h.T, HS, 16);
    const CUtensorMap map_dout = tokens_map(dout, h, F::QUERIES);
    auto kernel = attention_backward_hopper_kernel<HS>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SMEM));
    attention_backward_hopper_kernel<HS><<<h.B * h.NKV * ceil_div(h.T, F::KEYS), F::THREADS, F::SMEM, stream>>>(
        dq, map_dk, map_dv, sum, turns, map_dout, map_q, map_k, map_v, lse, delta, h.B, h.T, h.NH, h.NKV,
        1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

template <int HS>
void attention_backward_hs(floatX* dq, floatX* dk, floatX* dv, float* scratch, const floatX* dout, const floatX* out,
                           const floatX* q, const floatX* k, const floatX* v, const float* lse, Heads h,
                           cudaStream_t stream) {
    const size_t rows = size_t(h.B) * h.NH;
    float *sum = scratch, *delta = sum + rows * ceil_div(h.T, 128) * 128 * WIDTH<HS>;
    int* turns = reinterpret_cast<int*>(delta + rows * h.T);
    attention_delta_kernel<HS><<<h.B * h.T, std::min(256, (h.NH * DELTA_LANES<HS> + 31) / 32 * 32), 0, stream>>>(
        delta, turns, dout, out, h.T, h.NH);
    CHECK(cudaGetLastError());
    if constexpr (BF16 && (HS == 64 || HS == 128))
        if (hopper) return attention_backward_hopper<HS>(dq, dk, dv, sum, turns, dout, q, k, v, lse, delta, h, stream);
    constexpr int ROWS = (SERIAL ? 3 : 2) * BACKWARD_KEYS + 2 * (BACKWARD_AHEAD + 1) * BACKWARD_QUERIES;
    constexpr int smem = (ROWS * STRIDE<WIDTH<HS>> + BACKWARD_KEYS * STRIDE<BACKWARD_QUERIES>)*sizeof(SharedX) +
                         2 * (BACKWARD_AHEAD + 1) * BACKWARD_QUERIES * sizeof(float);
    CHECK(cudaFuncSetAttribute(attention_backward_kernel<HS>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    const int blocks = h.B * h.NKV * (SERIAL ? 1 : ceil_div(h.T, BACKWARD_KEYS));
    attention_backward_kernel<HS><<<blocks, BACKWARD_THREADS, smem, stream>>>(
        dq, dk, dv, sum, turns, dout, q, k, v, lse, delta, h.B, h.T, h.NH, h.NKV, 1.0f / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

void attention_forward(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                       cudaStream_t stream) {
    switch (h.HS) {
        case 16: return attention_forward_hs<16>(out, lse, q, k, v, h, stream);
        case 32: return attention_forward_hs<32>(out, lse, q, k, v, h, stream);
        case 64: return attention_forward_hs<64>(out, lse, q, k, v, h, stream);
        case 72: return attention_forward_hs<72>(out, lse, q, k, v, h, stream);
        default: return attention_forward_hs<128>(out, lse, q, k, v, h, stream);
    }
}

// scratch attention_scratch(h) floats; dq, dk, dv in the layouts of q, k, v, dout in that of out
void attention_backward(floatX* dq, floatX* dk, floatX* dv, float* scratch, const floatX* dout, const floatX* out,
                        const floatX* q, const floatX* k, const floatX* v, const float* lse, Heads h,
                        cudaStream_t stream) {
    switch (h.HS) {
        case 16: return attention_backward_hs<16>(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, stream);
        case 32: return attention_backward_hs<32>(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, stream);
        case 64: return attention_backward_hs<64>(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, stream);
        case 72: return attention_backward_hs<72>(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, stream);
        default: return attention_backward_hs<128>(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, stream);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one token a sequence to itself and all before it, whose keys and values lie in a cache:
//   out[b,h] = sum_{j < length} p_j v[b,g,j],   p_j = exp(s_j) / sum_i exp(s_i),   s_j = scale q[b,h] . k[b,g,j]
// q (B,NH,HS), out (B,NH HS); k, v (B,NKV,room,HS), of which `length` rows are there; all floatX. g = h NKV / NH.
//
// One block a sequence and query head; neighbours share a key/value head, so that its rows come from the L2 cache.
// DECODE_LANES lanes have a row, 16 bytes each (with HS 72 some have nothing); each such group takes DECODE_KEYS rows
// at a time, all under way at once, and has an online softmax of its own. Groups are put together at the end, first a
// warp's by shuffles, then the warps' in shared memory. In the serial geometry one lane has it all.

constexpr int DECODE_WARPS = SERIAL ? 1 : 16, DECODE_THREADS = DECODE_WARPS * WARP_SIZE;
constexpr int DECODE_KEYS = SERIAL ? 1 : 4;
template <int HS>
constexpr int DECODE_LANES = SERIAL           ? 1
                             : HS / PACK > 16 ? 32
                             : HS / PACK > 8  ? 16
                                              : HS / PACK;

// A lane's part of a head's row.
template <int HS>
struct HeadPart {
    static constexpr int COLS = SERIAL ? HS : PACK;
    const floatX* x = nullptr;
    unsigned v[4] = {};
    __device__ static int begin() { return lane() % DECODE_LANES<HS> * COLS; }
    __device__ void load(const floatX* row, bool there) {
        x = row + begin();
        if (!SERIAL && there && begin() < HS) load_pack(v, x, PACK);
    }
    __device__ float operator()(int e) const { return SERIAL ? float(x[e]) : unpack(v, e); }
};

template <int HS>
__global__ void __launch_bounds__(DECODE_THREADS)
    attention_decode_kernel(floatX* out, const floatX* q, const floatX* k, const floatX* v, int length, int room,
                            int NH, int NKV, float scale2) {
    typedef HeadPart<HS> Part;
    constexpr int LANES = DECODE_LANES<HS>, GROUPS = WARP_SIZE / LANES, COLS = Part::COLS;
    __shared__ float tops[DECODE_WARPS], sums[DECODE_WARPS], parts[DECODE_WARPS][HS];
    const int b = blockIdx.x / NH, h = blockIdx.x % NH;
    const size_t rows = (size_t(b) * NKV + h / (NH / NKV)) * room;
    Part query;
    query.load(q + size_t(blockIdx.x) * HS, true);
    float acc[COLS] = {}, sum = 0.0f, top = -1e30f;  // below any score, and its difference to itself is 0

    for (int begin = 0; begin < length; begin += DECODE_KEYS * DECODE_WARPS * GROUPS) {
        Part key[DECODE_KEYS], value[DECODE_KEYS];
        bool there[DECODE_KEYS];
        float s[DECODE_KEYS], most = top;
        #pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++) {
            const int j = begin + (i * DECODE_WARPS + warp()) * GROUPS + lane() / LANES;
            there[i] = j < length;
            const size_t at = (rows + (there[i] ? j : 0)) * HS;
            key[i].load(k + at, there[i]);
            value[i].load(v + at, there[i]);
        }
        #pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++) {
            s[i] = 0.0f;
            #pragma unroll
            for (int e = 0; e < COLS; e++) s[i] += query(e) * key[i](e);
            for (int m = LANES / 2; m > 0; m /= 2) s[i] += __shfl_xor_sync(ALL_LANES, s[i], m);
            s[i] *= scale2;
            if (there[i]) most = fmaxf(most, s[i]);
        }
        const float keep = fast_exp2(top - most);
        top = most;
        sum *= keep;
        #pragma unroll
        for (int e = 0; e < COLS; e++) acc[e] *= keep;
        #pragma unroll
        for (int i = 0; i < DECODE_KEYS; i++) {
            const float p = there[i] ? fast_exp2(s[i] - top) : 0.0f;
            sum += p;
            #pragma unroll
            for (int e = 0; e < COLS; e++) acc[e] += p * value[i](e);
        }
    }

    for (int m = WARP_SIZE / 2; m >= LANES; m /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, top, m), most = fmaxf(top, other);
        const float keep = fast_exp2(top - most), take = fast_exp2(other - most);
        top = most;
        sum = sum * keep + __shfl_xor_sync(ALL_LANES, sum, m) * take;
        #pragma unroll
        for (int e = 0; e < COLS; e++) acc[e] = acc[e] * keep + __shfl_xor_sync(ALL_LANES, acc[e], m) * take;
    }
    if (lane() == 0) tops[warp()] = top, sums[warp()] = sum;
    if (lane() < LANES && Part::begin() < HS)
        for (int e = 0; e < COLS; e++) parts[warp()][Part::begin() + e] = acc[e];
    __syncthreads();
    for (int w = 0; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w]);
    for (int c = threadIdx.x; c < HS; c += blockDim.x) {
        float total = 0.0f, x = 0.0f;
        for (int w = 0; w < DECODE_WARPS; w++) {
            const float take = fast_exp2(tops[w] - top);
            total += take * sums[w];
            x += take * parts[w][c];
        }
        out[size_t(blockIdx.x) * HS + c] = x / total;
    }
}

template <int HS>
void attention_decode_hs(floatX* out, const floatX* q, const floatX* k, const floatX* v, int length, int room, Heads h,
                         cudaStream_t stream) {
    attention_decode_kernel<HS>
        <<<h.B * h.NH, DECODE_THREADS, 0, stream>>>(out, q, k, v, length, room, h.NH, h.NKV, LOG2E / sqrtf(float(HS)));
    CHECK(cudaGetLastError());
}

void attention_decode(floatX* out, const floatX* q, const floatX* k, const floatX* v, int length, int room, Heads h,
                      cudaStream_t stream) {
    switch (h.HS) {
        case 16: return attention_decode_hs<16>(out, q, k, v, length, room, h, stream);
        case 32: return attention_decode_hs<32>(out, q, k, v, length, room, h, stream);
        case 64: return attention_decode_hs<64>(out, q, k, v, length, room, h, stream);
        case 72: return attention_decode_hs<72>(out, q, k, v, length, room, h, stream);
        default: return attention_decode_hs<128>(out, q, k, v, length, room, h, stream);
    }
}

// T new rows of keys and values, to the cache of B sequences behind the `past` rows that are there:
//   cache[b,g,past+t] = x[b mod h.B,g,t]
// k, v (h.B,NKV,T,HS), h.B either B or 1: a prompt that all sequences share; caches (B,NKV,room,HS); all floatX. Blocks
// (B NKV) by as many as share a head's rows, which lie side by side on both sides.
__global__ void cache_append_kernel(floatX* k_cache, floatX* v_cache, const floatX* k, const floatX* v, int past,
                                    int room, Heads h) {
    const size_t size = size_t(h.T) * h.HS, to = (size_t(blockIdx.x) * room + past) * h.HS,
                 from = blockIdx.x % (h.B * h.NKV) * size;
    for (size_t i = size_t(blockIdx.y) * blockDim.x + threadIdx.x; i < size; i += size_t(gridDim.y) * blockDim.x) {
        k_cache[to + i] = k[from + i];
        v_cache[to + i] = v[from + i];
    }
}

void cache_append(floatX* k_cache, floatX* v_cache, const floatX* k, const floatX* v, int B, int past, int room,
                  Heads h, cudaStream_t stream) {
    const size_t shares = SERIAL ? 1 : std::min<size_t>((size_t(h.T) * h.HS + 255) / 256, 32);
    cache_append_kernel<<<dim3(B * h.NKV, unsigned(shares)), 256, 0, stream>>>(k_cache, v_cache, k, v, past, room, h);
    CHECK(cudaGetLastError());
}

// =====================================================================================================================
// Head and loss. The logits exist for a chunk of rows at a time, in floatX, and turn into their gradient in place:
//   loss[n] = lse - logit[target],   lse = log sum_v exp(logit[v])
//   dlogit[v] = weight (exp(logit[v] - lse) - [v = target])
// logits (rows,Vp) floatX, columns from V on are padding: not in the sum, gradient 0. losses (rows) float.
// One block a row. It reads the row twice, the second time from L2: maximum and sum in one pass, each thread's sum
// relative to its own maximum so far, then the gradient.

__global__ void __launch_bounds__(1024) cross_entropy_kernel(float* losses, floatX* logits, const int* targets, int V,
                                                             int Vp, float weight, bool backward) {
    const size_t n = blockIdx.x;
    floatX* x = logits + n * Vp;
    const int target = targets[n];
    const float target_logit = x[target];   // read by all before the barriers of block_max, so before it is overwritten
    constexpr bool KEPT = SERIAL && !BF16;  // the exponentials, in the logits' place
    float top = -INFINITY, sum = 0.0f;
    if constexpr (SERIAL) {
        float most[16];  // apart, so that the loop vectorises
        for (float& m : most) m = -INFINITY;
        for (int v = 0; v < V / 16 * 16; v += 16)
            for (int j = 0; j < 16; j++) most[j] = fmaxf(most[j], float(x[v + j]));
        for (int v = V / 16 * 16; v < V; v++) most[0] = fmaxf(most[0], float(x[v]));
        for (float m : most) top = fmaxf(top, m);
        for (int v = 0; v < V; v++) {
            const float e = __expf(float(x[v]) - top);
            if (KEPT && backward) x[v] = e;
            sum += e;
        }
    } else {
        for (int v = threadIdx.x * PACK; v < V; v += blockDim.x * PACK) {
            float logit[PACK], highest = top;
            PackReader read;
            #pragma unroll
            for (int e = 0; e < PACK; e++) {  // Vp is a multiple of PACK: beyond V there is padding to read
                logit[e] = read(x + v + e, e);
                if (v + e >= V) logit[e] = -INFINITY;
                highest = fmaxf(highest, logit[e]);
            }
            if (highest > top) sum *= __expf(top - highest), top = highest;
            #pragma unroll
            for (int e = 0; e < PACK; e++) sum += __expf(logit[e] - top);
        }
        const float own = top;
        top = block_max(top);
        sum *= own > -INFINITY ? __expf(own - top) : 0.0f;
    }
    sum = block_sum(sum);
    const float lse = top + logf(sum);
    if (threadIdx.x == 0) losses[n] = lse - target_logit;
    if (!backward) return;
    auto gradient = [&](float logit, int v) { return weight * (__expf(logit - lse) - (v == target ? 1.0f : 0.0f)); };
    if constexpr (KEPT) {
        for (int v = 0; v < V; v++) x[v] = float(x[v]) * (weight / sum);
        for (int v = V; v < Vp; v++) x[v] = 0.0f;
        x[target] = float(x[target]) - weight;
    } else if constexpr (SERIAL) {
        for (int v = 0; v < V; v++) x[v] = gradient(x[v], v);
        for (int v = V; v < Vp; v++) x[v] = 0.0f;
    } else {
        for (int v = threadIdx.x * PACK; v < Vp; v += blockDim.x * PACK) {
            PackReader read;
            PackWriter write;
            #pragma unroll
            for (int e = 0; e < PACK; e++) {
                const float logit = read(x + v + e, e);
                write(x + v + e, e, v + e < V ? gradient(logit, v + e) : 0.0f);
            }
        }
    }
}

void cross_entropy(float* losses, floatX* logits, const int* targets, int rows, int V, int Vp, float weight,
                   bool backward, cudaStream_t stream) {
    const int threads = std::min(1024, (Vp / PACK + 31) / 32 * 32);
    cross_entropy_kernel<<<rows, threads, 0, stream>>>(losses, logits, targets, V, Vp, weight, backward);
    CHECK(cudaGetLastError());
}

// mean[0] += weight sum_n losses[n]; one block, in double, so that a long batch loses nothing
__global__ void loss_sum_kernel(float* mean, const float* losses, int N, float weight) {
    double sum = 0.0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) mean[0] += float(sum * weight);
}

// =====================================================================================================================
// Ranks: processes, each with a GPU, that train one model, each on its part of a step's sequences. NCCL's collectives
// run on a stream beside the model's; the two wait for each other by events. Every rank calls the same collectives in
// the same order. What a rank sends at the least (n ranks, b bytes in the whole buffer), and a ring sends just that:
//   reduce-scatter, all-gather   b (n-1)/n          all-reduce   2 b (n-1)/n

struct Ranks {
    int rank = 0, size = 1;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t moment = nullptr;
    double* values = nullptr;         // (size) on the device, for exchange()
    double sent = 0;                  // bytes, by the formulas above
    std::atomic<long long> calls{0};  // of collectives, by which the watch (Channel) knows who is behind

    // The stream `later` goes on only when all that `earlier` has been given so far is done.
    void order(cudaStream_t later, cudaStream_t earlier) {
        CHECK(cudaEventRecord(moment, earlier));
        CHECK(cudaStreamWaitEvent(later, moment, 0));
    }
    void count(double bytes, int times) {
        calls++;
        sent += times * bytes * (size - 1) / size;
    }

    // p (elements): the sum over ranks, on all of them
    void all_reduce(void* p, size_t elements, ncclDataType_t type, size_t width) {
        count(double(elements) * width, 2);
        CHECK_NCCL(ncclAllReduce(p, p, elements, type, ncclSum, comm, stream));
    }
    // out (piece) = this rank's piece of the sum over ranks of inp (size pieces); in place: out is that piece of inp
    void reduce_scatter(Flat out, Flat inp, size_t piece) {
        count(double(piece) * size * inp.width(), 1);
        CHECK_NCCL(ncclReduceScatter(inp.p, out.p, piece, inp.nccl(), ncclSum, comm, stream));
    }
    // out (size pieces) from every rank's inp (piece); in place: inp is this rank's piece of out
    void all_gather(void* out, const void* inp, size_t piece, ncclDataType_t type, size_t width) {
        count(double(piece) * size * width, 1);
        CHECK_NCCL(ncclAllGather(inp, out, piece, type, comm, stream));
    }

    // Every rank's number, known to all when it returns.
    std::vector<double> exchange(double mine) {
        std::vector<double> all(size, mine);
        if (size == 1) return all;
        CHECK(cudaMemcpyAsync(values + rank, &mine, sizeof(double), cudaMemcpyHostToDevice, stream));
        all_gather(values, values + rank, 1, ncclFloat64, sizeof(double));
        CHECK(cudaMemcpyAsync(all.data(), values, size * sizeof(double), cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        return all;
    }
    double least(double mine) {
        const std::vector<double> all = exchange(mine);
        return *std::min_element(all.begin(), all.end());
    }
    double most(double mine) { return -least(-mine); }

    // id: that of rank 0's ncclGetUniqueId
    void open(const ncclUniqueId& id, int rank_, int size_) {
        int least_priority, priority;
        rank = rank_, size = size_;
        CHECK(cudaDeviceGetStreamPriorityRange(&least_priority, &priority));
        CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority));
        CHECK(cudaEventCreateWithFlags(&moment, cudaEventDisableTiming));
        CHECK(cudaMalloc(&values, size * sizeof(double)));
        CHECK_NCCL(ncclCommInitRank(&comm, size, id, rank));
        // NCCL takes its buffers when a collective is first used: now, so that the free memory is what is left
        const size_t piece = (size_t(32) << 20) / sizeof(float) / size;
        float* buffer = nullptr;
        CHECK(cudaMalloc(&buffer, piece * size * sizeof(float)));
        CHECK(cudaMemsetAsync(buffer, 0, piece * size * sizeof(float), stream));
        all_reduce(buffer, piece * size, ncclFloat32, sizeof(float));
        reduce_scatter(buffer + piece * rank, buffer, piece);
        all_gather(buffer, buffer + piece * rank, piece, ncclFloat32, sizeof(float));
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaFree(buffer));
    }
    void close() {
        if (comm) {
            CHECK_NCCL(ncclCommDestroy(comm));
            CHECK(cudaFree(values));
            CHECK(cudaEventDestroy(moment));
            CHECK(cudaStreamDestroy(stream));
        }
        comm = nullptr, rank = 0, size = 1;
    }
} ranks;

// =====================================================================================================================
// The model: parameters, gradients, activations, and the way through a block, forward and backward.

// What a layer leaves for its backward. N = B T rows each; x is the block's input, h its middle. What the layer does
// not keep (Recompute) lies in a place that all layers share.
struct LayerActivations {
    floatX *x, *h;    // (N,C) residual stream
    floatX *n1, *n2;  // (N,C) outputs of the pre-norms; simplegpt has none, there they are x and h
    floatX *qkv_raw, *o_raw, *w13_raw, *w2_raw;  // (N,QKV) (N,C) (N,FF) (N,C) outputs of the linears
    floatX *q, *k, *v, *att, *act;               // (B,NH,T,HS) (B,NKV,T,HS) twice, (N,C), (N,F)
    float* lse;                                  // (B,NH,T)
    float2 *qkv_stats, *o_stats, *w13_stats, *w2_stats, *n1_stats, *n2_stats;  // (N,3) (N) (N,2) (N) (N) (N)
};

// Hands out pieces of one allocation. The first walk (base null) only adds up, by kind of use, for the memory plan.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    std::vector<std::pair<std::string, size_t>> plan;  // what, bytes

    void section(const std::string& what) { plan.push_back({what, 0}); }
    template <typename F>
    void take(F*& p, size_t count) {
        size_t bytes = (count * sizeof(F) + 255) / 256 * 256;
        if (std::max({count, bytes, used}) > size_t(1) << 60)
            throw Error("memory: the plan passes 2^60 bytes. Choose a smaller model, --seq-len or --batch-size.");
        if (base) p = reinterpret_cast<F*>(base + used);
        used += bytes;
        plan.back().second += bytes;
    }
    void take(Flat& f, size_t count) {
        char* p = nullptr;
        take(p, count * f.width());
        f.p = p;
    }
};

// Pinned host memory for a batch on its way to the device. There are two, so that the host fills one while the other
// may still be read.
struct Staging {
    int* batch = nullptr;  // tokens (N), targets (N), places (N), begin (N+1)
    cudaEvent_t copied = nullptr;
};

// A step's numbers, on the device, the same on all ranks once summed.
struct Numbers {
    float loss, grad_norm;
    int stop;                               // ranks that were asked to stop
    int skip;                               // loss or gradient norm is not finite: no update
    long long updates, skipped;             // so far
    float scale, correction1, correction2;  // of the update: clipping, 1 - beta^updates
    double summed[3];                       // over ranks: loss, square of the gradient norm, stop
};

// What a step tells the host, which need not wait for it: there once `done` has happened.
struct Report {
    Numbers* numbers = nullptr;            // pinned
    unsigned long long* hashes = nullptr;  // (ranks) pinned: of each rank's weights, if this step checks them
    cudaEvent_t done = nullptr;
};

// Where units pass by whose weights or gradients are cut over the ranks: a layer's in one of two by turns, so that the
// next is gathered, or the last reduced, while this one computes; embedding and head share one, but if they are tied.
struct Slot {
    floatX* w = nullptr;
    Flat g;
    int held = -1;                  // unit whose weights are there
    cudaEvent_t reduced = nullptr;  // its gradients have been, it may be overwritten
};
constexpr int SLOTS = 4;  // embedding and head, odd layers, even layers, final norm without a head

// A micro-batch's kernels as one CUDA graph, made the second time it runs: the first makes what capturing must not.
struct Graph {
    float weight = 0.0f;  // the micro-batch's, 0 before the first run
    cudaGraphExec_t exec = nullptr;
};

// Keys and values of the tokens that `sequences` sequences have seen, for writing on: (L,sequences,NKV,room,HS) each.
// With sequences 0 there is none: training, validation.
struct Cache {
    int sequences = 0, room = 0, past = 0;  // past: tokens that are there, of each sequence; the next one's position
    floatX *k = nullptr, *v = nullptr;
};

struct Model {
    Config c;
    Storage storage;
    TensorTable table;
    int B = 0;  // sequences a micro-batch
    bool training = false;
    cudaStream_t stream = nullptr;

    // flat buffers of the table's layout, or this rank's shard of them (Storage); master is null where the parameters
    // are their own masters (fp32, no_master); grads, m, v and master only exist for training
    floatX* params = nullptr;
    Flat grads, m, v;
    float* master = nullptr;
    Slot slots[SLOTS];
    std::vector<floatX*> unit_weights;  // where each unit's are when it computes: in params, grads or in a slot
    std::vector<Flat> unit_grads;
    std::vector<cudaEvent_t> gathered;  // a unit's weights are there

    std::vector<LayerActivations> acts;
    floatX *out = nullptr, *normed = nullptr;  // (N,C) last residual, final norm
    float2* norm_stats = nullptr;              // (N)
    floatX* logits = nullptr;                  // (logit_rows,Vp)
    int logit_rows = 0;
    Cache cache;
    Numbers* numbers = nullptr;
    float *losses = nullptr, *loss = nullptr, *grad_norm = nullptr;  // (N), and two of the numbers
    unsigned long long *hashes = nullptr, *hash_parts = nullptr;     // (ranks), (chunks)
    float *partial = nullptr, *square_sums = nullptr, *row_sums = nullptr;
    float2* rope = nullptr;                                                          // (T,HS/2) cos, sin
    int *tokens = nullptr, *targets = nullptr, *places = nullptr, *begin = nullptr;  // (N) (N) (N) (N+1), neighbours

    // gradients of activations, shared by all layers
    floatX *dres = nullptr, *dbranch = nullptr, *datt = nullptr, *dnormed = nullptr;  // (N,C)
    floatX *dqkv_raw = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;          // (N,QKV), attention's layouts
    floatX *dw13_raw = nullptr, *dact = nullptr;                                      // (N,FF) (N,F)
    float* attention_scratch = nullptr;  // the backward's, see attention_scratch()
    float *direction = nullptr, *previous = nullptr, *kept = nullptr;  // the probe's two directions, and the weights
    double* probe_sums = nullptr;                                      // (chunks) twice

    void* memory = nullptr;
    size_t state_bytes = 0;  // at its begin: weights, gradients, masters, moments, slots
    Arena arena;
    Staging staging[2];
    int next_staging = 0;
    bool use_graphs = false;
    Graph graphs[2];  // 1: of a step's first micro-batch, 0: of the others
    Report reports[2];

    size_t N() const { return size_t(B) * c.T; }
    Norm norm() const { return {c.norm_eps, c.layernorm}; }
    floatX* w(size_t offset) const {
        if (offset == NONE) return nullptr;
        const int u = table.unit_of(offset);
        return unit_weights[u] + (offset - table.units[u].begin);
    }
    Flat g(size_t offset) const {
        if (offset == NONE) return Flat();
        const int u = table.unit_of(offset);
        return unit_grads[u].at(offset - table.units[u].begin);
    }
    Piece piece(int unit) const { return table.piece(unit, ranks.rank); }
    int units() const { return int(table.units.size()); }
    Slot& slot(int unit) {
        if (unit == units() - 1 && table.tied()) return slots[3];
        return slots[unit == 0 || unit == units() - 1 ? 0 : 1 + unit % 2];
    }
};

constexpr size_t CHUNK = 16384;  // elements a block of the flat kernels (norm, AdamW)
inline int chunks(size_t elements) { return int((elements + CHUNK - 1) / CHUNK); }

inline size_t batch_ints(size_t N) { return 4 * N + 1; }  // a batch: tokens, targets, places, begin

// Bytes of the logits' place. Between steps units pass through it on their way to the host (get_unit), with room for
// 256 bytes of each rank's piece at the least.
size_t logits_bytes(const Model& m) {
    return std::max(m.logit_rows * size_t(m.c.Vp()) * sizeof(floatX), 256 * size_t(m.storage.ranks));
}

// The walk over everything on the device, in three parts. plan walks it to add up, create to hand out.
//
// What belongs to the parameters: weights, gradients, masters, moments, and the slots where cut ones pass by.
void lay_out_state(Model& m) {
    const Storage& s = m.storage;
    const size_t P = m.table.size;
    Arena& a = m.arena;
    auto section = [&](const char* what, const char* type, bool cut) {
        a.section(format("%s (%s%s)", what, type, cut ? format(", 1/%d", s.ranks).c_str() : ""));
        return cut ? P / s.ranks : P;
    };
    size_t slot_sizes[SLOTS] = {};
    for (int u = 0; u < m.units(); u++) {
        size_t& size = slot_sizes[&m.slot(u) - m.slots];
        size = std::max(size, m.table.units[u].size);
    }
    a.take(m.params, section("weights", PRECISION, s.cut_weights()));
    if (s.cut_weights()) {
        a.section(format("gathered weights (%s)", PRECISION));
        for (int i = 0; i < SLOTS; i++) a.take(m.slots[i].w, slot_sizes[i]);
    }
    if (m.training) {
        m.grads.half = s.half_gradients;
        a.take(m.grads, section("gradients", m.grads.name(), s.cut_gradients()));
        if (s.cut_gradients()) {
            a.section(format("gradients to be reduced (%s)", m.grads.name()));
            for (int i = 0; i < SLOTS; i++) m.slots[i].g.half = s.half_gradients, a.take(m.slots[i].g, slot_sizes[i]);
        }
        if (BF16 && !s.no_master) a.take(m.master, section("master weights", "fp32", s.cut_state()));
        m.m.half = m.v.half = s.half_moments;
        const size_t state = section("AdamW moments", m.m.name(), s.cut_state());
        a.take(m.m, state);
        a.take(m.v, state);
    }
    m.state_bytes = a.used;
    m.unit_weights.resize(m.units()), m.unit_grads.resize(m.units());
    for (int u = 0; a.base && u < m.units(); u++) {
        const size_t begin = m.table.units[u].begin;
        m.unit_weights[u] = s.cut_weights() ? m.slot(u).w : m.params + begin;
        m.unit_grads[u] = s.cut_gradients() ? m.slot(u).g : m.grads.at(begin);
    }
}

// What a layer leaves for its backward. Each of its tensors is kept for every layer or shared by all; without training
// nothing is kept. Without a norm behind a linear (the other variants) the backward has no use for its raw output, but
// replaying what follows has.
void lay_out_activations(Model& m) {
    const Config& c = m.c;
    const size_t N = m.N(), C = c.C, QKV = c.QKV(), F = c.F(), FF = c.FF(), kv = size_t(c.NKV) * c.HS();
    Arena& a = m.arena;
    using A = LayerActivations;
    using R = Recompute;
    const R level = m.storage.recompute;
    const bool all = level == R::none;
    const LayerOffsets& at = m.table.layers[0];  // which norms there are
    m.acts.assign(c.L, LayerActivations());
    auto keep = [&](auto member, size_t count) {
        for (A& t : m.acts) a.take(t.*member, count);
    };
    std::vector<std::function<void()>> shared;  // taken later, as a section of their own
    auto keep_if = [&](bool kept, auto member, size_t count) {
        if (m.training && kept) return keep(member, count);
        shared.push_back([&m, &a, member, count] {
            for (A& t : m.acts) &t == &m.acts[0] ? a.take(t.*member, count) : void(t.*member = m.acts[0].*member);
        });
    };
    a.section(format("activations (recompute %s)", RECOMPUTE[int(level)].c_str()));
    if (m.training)
        keep(&A::x, N * C);
    else  // the blocks' inputs by turns in two places
        for (int l = 0; l < c.L; l++) l < 2 ? a.take(m.acts[l].x, N * C) : void(m.acts[l].x = m.acts[l - 2].x);
    keep_if(all, &A::h, N * C);
    if (at.norm1 == NONE) {
        for (A& t : m.acts) t.n1 = t.x;
        shared.push_back([&m] {
            for (A& t : m.acts) t.n2 = t.h;
        });
    } else {
        keep_if(all, &A::n1, N * C);
        keep_if(all, &A::n2, N * C);
    }
    keep_if(all ? at.qkv_gain != NONE : level <= R::ffn, &A::qkv_raw, N * QKV);
    keep_if(all, &A::q, N * C);
    keep_if(all, &A::k, N * kv);
    keep_if(all, &A::v, N * kv);
    keep_if(level <= R::ffn, &A::att, N * C);
    keep_if(level <= R::ffn, &A::lse, N * c.NH);
    keep_if(all ? at.o_gain != NONE : level <= R::ffn, &A::o_raw, N * C);
    keep_if(level <= R::norm, &A::w13_raw, N * FF);
    keep_if(all, &A::act, N * F);
    keep_if(at.w2_gain != NONE, &A::w2_raw, N * C);
    keep_if(true, &A::qkv_stats, 3 * N);
    keep_if(true, &A::o_stats, N);
    keep_if(true, &A::w13_stats, 2 * N);
    keep_if(true, &A::w2_stats, N);
    keep_if(true, &A::n1_stats, N);
    keep_if(true, &A::n2_stats, N);
    a.section("activations, one for all layers");
    for (auto& take : shared) take();
    a.take(m.out, N * C);
    a.take(m.normed, N * C);
    a.take(m.norm_stats, N);
}

// Logits, cache, tables and scratch; for training the gradients of activations.
void lay_out_scratch(Model& m) {
    const Config& c = m.c;
    const Storage& s = m.storage;
    const size_t N = m.N(), C = c.C, QKV = c.QKV(), F = c.F(), FF = c.FF(), Vp = c.Vp(), P = m.table.size;
    const size_t kv = size_t(c.NKV) * c.HS();
    Arena& a = m.arena;
    a.section("logits, a chunk of rows");
    m.logit_rows = int(std::min(N, std::max<size_t>(16, (size_t(1) << (BF16 ? 29 : 26)) / (Vp * sizeof(floatX)))));
    char* logits = nullptr;
    a.take(logits, logits_bytes(m));
    m.logits = reinterpret_cast<floatX*>(logits);
    if (m.cache.sequences) {
        a.section(format("key/value cache (%s)", PRECISION));
        if (double(c.L) * m.cache.sequences * m.cache.room * kv > 1e17)  // the product could pass 2^64
            throw Error("memory: the key/value cache is too large. Give less --num-samples or --max-tokens.");
        const size_t count = size_t(c.L) * m.cache.sequences * m.cache.room * kv;
        a.take(m.cache.k, count);
        a.take(m.cache.v, count);
    }
    a.section("batch, tables, scratch");
    a.take(m.losses, N);
    a.take(m.numbers, 1);
    if (a.base) m.loss = &m.numbers->loss, m.grad_norm = &m.numbers->grad_norm;
    a.take(m.tokens, batch_ints(N));
    if (c.gated()) a.take(m.rope, size_t(c.T) * c.HS() / 2);
    char* workspace = nullptr;
    a.take(workspace, MATMUL_WORKSPACE);
    matmul.workspace = workspace;
    if (BF16) a.take(m.row_sums, (std::max({C, QKV, FF}) + SUMS_COLS - 1) / SUMS_COLS * N);
    if (m.training) {
        a.take(m.square_sums, chunks(P) + m.units());
        if (s.ranks > 1) {
            a.take(m.hashes, s.ranks);
            a.take(m.hash_parts, chunks(P));
        }
        size_t partial = 0;
        for (auto [W, lines] : {std::pair{c.C, c.C}, {c.C, c.QKV()}, {c.F(), c.FF()}})
            partial = std::max(partial, row_blocks(int(N), W) * size_t(lines));
        a.take(m.partial, partial);
        a.section("gradients of activations");
        for (floatX** p : {&m.dres, &m.dbranch, &m.datt, &m.dnormed}) a.take(*p, N * C);
        a.take(m.dqkv_raw, N * QKV);
        a.take(m.dq, N * C);
        a.take(m.dk, N * kv);
        a.take(m.dv, N * kv);
        a.take(m.dw13_raw, N * FF);
        a.take(m.dact, N * F);
        a.take(m.attention_scratch, attention_scratch({m.B, c.T, c.NH, c.NKV, c.HS()}));
    }
    if (s.probe) {
        a.section("probe");
        a.take(m.probe_sums, 2 * chunks(std::max(P, N * std::max(C, FF))));
        if (!BF16)
            for (float** p : {&m.direction, &m.previous, &m.kept}) a.take(*p, P);
    }
}

void lay_out(Model& m) {
    m.arena.used = 0;
    m.arena.plan.clear();
    lay_out_state(m);
    lay_out_activations(m);
    lay_out_scratch(m);
}

std::string memory_plan(const Model& m) {
    std::string s = "memory plan\n";
    for (auto& [what, bytes] : m.arena.plan) s += format("  %-32s %10.1f MiB\n", what.c_str(), bytes / 1048576.0);
    return s + format("  %-32s %10.1f MiB\n", "total", m.arena.used / 1048576.0);
}

// Whether the code that the device runs has Hopper's instructions: it lacks them if built for sm_90 without the a.
__global__ void hopper_code_kernel(int* there) { *there = HOPPER_CODE; }

// local: this process's number on its node. It takes the GPU of that number, or the only one it is shown.
void open_device(int local = 0) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
        throw Error("device: no CUDA device is visible. Check nvidia-smi, or build for the CPU: make cpu.");
    if (count > 1 && local >= count)
        throw Error(format("device: local rank %d, but this node shows %d GPUs. Start a process a GPU.", local, count));
    cudaDeviceProp device;
    const int mine = count > 1 ? local : 0;
    CHECK(cudaSetDevice(mine));
    CHECK(cudaGetDeviceProperties(&device, mine));
    device_sms = device.multiProcessorCount;
    device_shared = device.sharedMemPerBlockOptin;
    if (device.major == 9 && device.minor == 0) {
        int code = 0, *there = nullptr;
        CHECK(cudaMalloc((void**)&there, sizeof(int)));
        hopper_code_kernel<<<1, 1>>>(there);
        CHECK(cudaMemcpy(&code, there, sizeof(int), cudaMemcpyDeviceToHost));
        CHECK(cudaFree(there));
        hopper = code;
        if (!hopper)
            fprintf(stderr, "train_gpt: built without sm_90a, so without Hopper's kernels. Build by make gpu.\n");
    }
    if (!matmul.handle) CHECK_CUBLAS(cublasLtCreate(&matmul.handle));
}

// Plans the memory of B sequences of c.T tokens; nothing is allocated yet.
void plan(Model& m, const Config& config, int B, bool training, Storage storage = Storage()) {
    m.c = config;
    m.storage = storage;
    m.B = B;
    m.training = training;
    m.table = build_table(m.c, storage.ranks);
    if (double(B) * m.c.T > double(1 << 30))
        throw Error(format("--batch-size: %d sequences of %d tokens are too many. %s", B, m.c.T,
                           training ? "Use --grad-accum." : "Give less."));
    if (!SERIAL && (m.c.C > MAX_ROW || m.c.F() > MAX_FFN_ROW))
        throw Error(
            format("--dim: width %d and hidden width %d are more than a block of threads holds, %d and %d. "
                   "Choose less.",
                   m.c.C, m.c.F(), MAX_ROW, MAX_FFN_ROW));
    lay_out(m);
}

// The mildest change of options with which the plan fits into `room` bytes, as a sentence: cut more over the ranks,
// recompute more, else fewer sequences, else less precise moments, gradients and weights. Of generation, what its cache
// grows with.
std::string advice(const Model& m, size_t room) {
    if (m.cache.sequences) return "Choose fewer --num-samples or --max-tokens, or a smaller model.";
    const Storage& had = m.storage;
    std::vector<Storage> cuts;
    for (int zero = had.zero; zero <= (had.ranks > 1 ? 3 : had.zero); zero++)
        for (bool whole : {had.whole_gradients, false}) {
            cuts.push_back(had);
            cuts.back().zero = zero, cuts.back().whole_gradients = whole;
        }
    for (int precision = 0; precision <= (m.training ? BF16 ? 3 : 1 : 0); precision++)
        for (int B = m.B; B > 0; B /= 2)
            for (Recompute level = had.recompute; level <= Recompute::block; level = Recompute(int(level) + 1))
                for (Storage s : cuts) {
                    s.recompute = level;
                    s.half_moments |= precision > 0;
                    s.half_gradients |= precision > 1;
                    s.no_master |= precision > 2;
                    Model other;
                    plan(other, m.c, B, m.training, s);
                    if (other.arena.used > room) continue;
                    std::string text = "Give";
                    if (s.zero != had.zero) text += format(" --zero %d", s.zero);
                    if (s.whole_gradients != had.whole_gradients) text += " --reduce each";
                    if (s.recompute != had.recompute) text += " --recompute " + RECOMPUTE[int(s.recompute)];
                    if (B < m.B) text += format(" --batch-size %d", B);
                    if (s.half_gradients != had.half_gradients) text += " --gradients bf16";
                    if (s.half_moments != had.half_moments) text += " --moments bf16";
                    if (s.no_master != had.no_master) text += " --no-master";
                    return text + format(", which needs %.1f GiB.", other.arena.used / 1073741824.0);
                }
    return "Choose a smaller model or --seq-len.";
}

// Allocates what was planned, or refuses with advice.
void create(Model& m) {
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    if (m.arena.used > free || cudaMalloc(&m.memory, m.arena.used) != cudaSuccess) {
        throw Error(format("memory: the plan needs %.1f GiB, the device has %.1f GiB free. %s",
                           m.arena.used / 1073741824.0, free / 1073741824.0,
                           advice(m, std::min(free, m.arena.used - 1)).c_str()));  // what is free may lie in pieces
    }
    m.arena.base = static_cast<char*>(m.memory);
    lay_out(m);
    CHECK(cudaStreamCreate(&m.stream));
    for (Staging& s : m.staging) {
        CHECK(cudaMallocHost(&s.batch, batch_ints(m.N()) * sizeof(int)));
        CHECK(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming));
        CHECK(cudaEventRecord(s.copied, m.stream));
    }
    for (Report& r : m.reports) {
        CHECK(cudaMallocHost(&r.numbers, sizeof(Numbers)));
        CHECK(cudaMallocHost(&r.hashes, m.storage.ranks * sizeof(*r.hashes)));
        CHECK(cudaEventCreateWithFlags(&r.done, cudaEventDisableTiming));
    }
    m.gathered.resize(m.units());
    for (cudaEvent_t& e : m.gathered) CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    for (Slot& s : m.slots) CHECK(cudaEventCreateWithFlags(&s.reduced, cudaEventDisableTiming));
    // padding between tensors and rows beyond V stay zero for good, and so do gradients of what a slot does not hold
    CHECK(cudaMemsetAsync(m.memory, 0, m.state_bytes, m.stream));
    CHECK(cudaMemsetAsync(m.numbers, 0, sizeof(Numbers), m.stream));
    if (m.rope) {  // (cos, sin) of t theta^(-2i/HS), as the paper's code: float32 frequencies
        const int half = m.c.HS() / 2;
        std::vector<float2> rope(size_t(m.c.T) * half);
        for (int i = 0; i < half; i++) {
            float frequency = 1.0f / powf(m.c.rope_theta, float(2 * i) / m.c.HS());
            for (int t = 0; t < m.c.T; t++) {
                double angle = float(t * frequency);
                rope[size_t(t) * half + i] = make_float2(float(cos(angle)), float(sin(angle)));
            }
        }
        CHECK(cudaMemcpy(m.rope, rope.data(), rope.size() * sizeof(float2), cudaMemcpyHostToDevice));
    }
    CHECK(cudaStreamSynchronize(m.stream));
}

void destroy(Model& m) {
    for (Graph& g : m.graphs)
        if (g.exec) CHECK(cudaGraphExecDestroy(g.exec));
    for (Staging& s : m.staging) {
        if (s.batch) CHECK(cudaFreeHost(s.batch));
        if (s.copied) CHECK(cudaEventDestroy(s.copied));
    }
    for (Report& r : m.reports) {
        if (r.numbers) CHECK(cudaFreeHost(r.numbers));
        if (r.hashes) CHECK(cudaFreeHost(r.hashes));
        if (r.done) CHECK(cudaEventDestroy(r.done));
    }
    for (cudaEvent_t e : m.gathered) CHECK(cudaEventDestroy(e));
    for (Slot& s : m.slots)
        if (s.reduced) CHECK(cudaEventDestroy(s.reduced));
    if (m.stream) CHECK(cudaStreamDestroy(m.stream));
    if (m.memory) CHECK(cudaFree(m.memory));
    m = Model();
}

// Calls f(whole, shard, count) for what this rank's pieces hold of the `count` elements from `begin` on.
template <typename F>
void own_parts(const Model& m, size_t begin, size_t count, F f) {
    for (int u = m.table.unit_of(begin); u < m.units() && m.table.units[u].begin < begin + count; u++) {
        const Piece p = m.piece(u);
        const size_t first = std::max(begin, p.whole), last = std::min(begin + count, p.whole + p.size);
        if (first < last) f(first, p.shard + first - p.whole, last - first);
    }
}

// Sets elements of the flat parameters from `begin` on, and their masters, as far as they are here.
void set_parameters(Model& m, size_t begin, const std::vector<float>& values) {
    auto set = [&](auto* to, bool cut) {
        using F = std::decay_t<decltype(*to)>;
        const std::vector<F> rounded(values.begin(), values.end());
        auto copy = [&](size_t whole, size_t at, size_t count) {
            CHECK(cudaMemcpy(to + at, rounded.data() + (whole - begin), count * sizeof(F), cudaMemcpyHostToDevice));
        };
        if (!cut) return copy(begin, begin, values.size());
        own_parts(m, begin, values.size(), copy);
    };
    set(m.params, m.storage.cut_weights());
    if (m.master) set(m.master, m.storage.cut_state());
}

// `count` elements from `offset` on of a flat buffer, as float.
std::vector<float> get_floats(const Flat& f, size_t offset, size_t count) {
    std::vector<float> values(count);
    const void* from = f.at(offset).p;
    if (f.half) {
        std::vector<__nv_bfloat16> raw(count);
        CHECK(cudaMemcpy(raw.data(), from, count * f.width(), cudaMemcpyDeviceToHost));
        std::copy(raw.begin(), raw.end(), values.begin());
    } else {
        CHECK(cudaMemcpy(values.data(), from, count * f.width(), cudaMemcpyDeviceToHost));
    }
    return values;
}

// Waits until all that was launched is done.
void settle(const Model& m) {
    CHECK(cudaStreamSynchronize(m.stream));
    if (m.storage.ranks > 1) CHECK(cudaStreamSynchronize(ranks.stream));
}

// A unit of a flat buffer, which is cut over the ranks or not, in its own type, empty unless `wanted`; with `cut` all
// ranks must call. Passes by where the logits are between steps.
std::vector<char> get_unit(const Model& m, const Flat& f, bool cut, int unit, bool wanted) {
    const Unit& u = m.table.units[unit];
    const size_t width = f.width();
    std::vector<char> all(wanted ? u.size * width : 0);
    if (!cut) {
        if (wanted) CHECK(cudaMemcpy(all.data(), f.at(u.begin).p, all.size(), cudaMemcpyDeviceToHost));
        return all;
    }
    const Piece mine = m.piece(unit);
    const size_t room = logits_bytes(m) / (width * ranks.size);
    char* passing = reinterpret_cast<char*>(m.logits);
    settle(m);
    for (size_t at = 0; at < mine.size; at += room) {
        const size_t count = std::min(room, mine.size - at);
        ranks.all_gather(passing, f.at(mine.shard + at).p, count, f.nccl(), width);
        CHECK(cudaStreamSynchronize(ranks.stream));
        ticks++;
        for (int r = 0; wanted && r < ranks.size; r++)
            CHECK(cudaMemcpy(&all[(m.table.piece(unit, r).whole - u.begin + at) * width], passing + r * count * width,
                             count * width, cudaMemcpyDeviceToHost));
    }
    return all;
}

constexpr size_t HOST_CHUNK = size_t(1) << 22;  // elements that pass through host memory at a time

// Gives every parameter that is kept here its value: f(values, tensor, number, first, count) fills those of a tensor
// from `first` on; beyond t.size() there is padding.
template <typename F>
void fill_parameters(Model& m, F f) {
    std::vector<float> values;
    for (size_t i = 0; i < m.table.tensors.size(); i++) {
        const Tensor& t = m.table.tensors[i];
        for (size_t first = 0; first < t.padded_size(); first += HOST_CHUNK) {
            const size_t count = std::min(HOST_CHUNK, t.padded_size() - first);
            bool here = !m.storage.cut_weights();
            own_parts(m, t.offset + first, count, [&](size_t, size_t, size_t) { here = true; });
            if (!here) continue;
            f(values, t, i, first, count);
            set_parameters(m, t.offset + first, values);
            ticks++;
        }
    }
}

void initialize(Model& m, uint64_t seed) {
    fill_parameters(m, [&](std::vector<float>& values, const Tensor& t, size_t i, size_t first, size_t count) {
        initial_values(values, t, seed, i, first, count);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Units over ranks. With one rank nothing here does anything but begin_gradients.

// Weights cut over ranks: unit u's to its slot, unless they are there or under way. What the model's stream was given
// before has used the slot for the last time.
void gather_weights(Model& m, int u) {
    Slot& s = m.slot(u);
    if (s.held == u) return;
    const Piece p = m.piece(u);
    ranks.order(ranks.stream, m.stream);
    ranks.all_gather(s.w, m.params + p.shard, p.size, NCCL_FLOATX, sizeof(floatX));
    CHECK(cudaEventRecord(m.gathered[u], ranks.stream));
    s.held = u;
}

// Before the model's stream uses unit u's weights: waits until they are there; `next` (-1: none) may come meanwhile.
void need_weights(Model& m, int u, int next) {
    if (m.storage.ranks == 1) return;
    if (m.storage.cut_weights()) gather_weights(m, u);
    CHECK(cudaStreamWaitEvent(m.stream, m.gathered[u], 0));
    if (m.storage.cut_weights() && next >= 0) gather_weights(m, next);
}

// Before unit u's gradients are written. In a step's first micro-batch, and where every micro-batch's are reduced, they
// begin anew: a matmul then overwrites its own (the beta returned is 0), and what is only ever added to is zeroed here,
// gains, embedding and positions. A tied embedding's begins as the head's.
float begin_gradients(Model& m, int u, bool first) {
    if (m.storage.cut_gradients()) {
        CHECK(cudaStreamWaitEvent(m.stream, m.slot(u).reduced, 0));
        first = true;
    }
    if (!first) return 1.0f;
    const Unit& unit = m.table.units[u];
    size_t done = unit.begin;
    auto zero_to = [&](size_t end) {
        if (done < end) CHECK(cudaMemsetAsync(m.g(done).p, 0, (end - done) * m.grads.width(), m.stream));
    };
    for (size_t i = unit.tensor; i < unit.tensor + unit.tensors; i++) {
        const Tensor& t = m.table.tensors[i];
        if (t.cols == 0 || t.offset == m.table.pos || (t.offset == m.table.tok && !m.table.tied())) continue;
        zero_to(t.offset);
        done = t.offset + t.padded_size();
    }
    zero_to(unit.begin + unit.size);
    return 0.0f;
}

// sum[i] += x[i] for i < count, a multiple of FOUR; any number of blocks, which stride over the elements
template <typename G>
__global__ void add_kernel(G* sum, const G* x, size_t count) {
    const size_t stride = size_t(gridDim.x) * blockDim.x * FOUR;
    for (size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * FOUR; i < count; i += stride) {
        Four<G> a = four(sum, i);
        const Four<G> b = four(x, i);
        for (int j = 0; j < FOUR; j++) a.v[j] = float(a.v[j]) + float(b.v[j]);
        four(sum, i) = a;
    }
}

// Unit u's gradients are complete: their sum over ranks, of which each rank needs its piece (zero 0: all of it), is on
// its way while the backward goes on. `first`: the micro-batch is a step's first.
void reduce_gradients(Model& m, int u, bool first) {
    if (m.storage.ranks == 1) return;
    const Piece p = m.piece(u);
    const Unit& unit = m.table.units[u];
    const Flat all = m.g(unit.begin), own = all.at(p.whole - unit.begin), shard = m.grads.at(p.shard);
    ranks.order(ranks.stream, m.stream);
    if (!m.storage.cut_state()) return ranks.all_reduce(all.p, unit.size, all.nccl(), all.width());
    ranks.reduce_scatter(m.storage.cut_gradients() && first ? shard : own, all, p.size);
    if (!m.storage.cut_gradients()) return;
    if (!first)
        shard.visit([&](auto* sum) {
            using G = std::decay_t<decltype(*sum)>;
            const int blocks = std::min(chunks(p.size), 4 * device_sms);
            add_kernel<G><<<blocks, 256, 0, ranks.stream>>>(sum, static_cast<const G*>(own.p), p.size);
            CHECK(cudaGetLastError());
        });
    CHECK(cudaEventRecord(m.slot(u).reduced, ranks.stream));
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward and backward

// B sequences of T tokens; the model may run fewer and shorter ones than it has memory for
Heads heads(const Model& m, int B, int T) { return {B, T, m.c.NH, m.c.NKV, m.c.HS()}; }

QkvGains qkv_gains(const Model& m, const LayerOffsets& at) {
    const floatX* q = m.w(at.qkv_gain);
    if (!q) return {nullptr, nullptr, nullptr};
    const floatX *k = q + m.c.C, *v = k + size_t(m.c.NKV) * m.c.HS();
    return {q, k, m.c.simple() ? v : nullptr};
}

// next = block l of its input a.x. N.. are norms; one that the variant lacks lets its input through:
//   simplegpt  h = x + No Wo A(Nq Wq x, Nk Wk x, Nv Wv x)         y = h + N2 W2( silu(N1 W1 h) * (N3 W3 h) )
//   prenorm    h = x + Wo A(Wq n, Wk n, Wv n),  n = N(x)          y = h + W2( silu(W1 n) * (W3 n) ),  n = N'(h)
//   preqknorm  prenorm with Nq, Nk as in simplegpt
// next null: the backward's replay, which makes again what the forward has not kept.
// With a cache the T tokens of each sequence follow those in it (then T is 1, unless it is empty) and are added to it.
void block_forward(Model& m, int l, floatX* next, int B, int T) {
    const LayerOffsets& at = m.table.layers[l];
    LayerActivations& a = m.acts[l];
    const Norm norm = m.norm();
    const int N = B * T, C = m.c.C, F = m.c.F();
    const Heads h = heads(m, B, T);

    // In the forward everything is missing.
    auto missing = [&](Recompute level) { return next || m.storage.recompute >= level; };
    const bool replay_norm = missing(Recompute::norm), replay_ffn = missing(Recompute::ffn),
               replay_block = missing(Recompute::block);
    // A linear; true if the stats of the norm behind it are there then: left by it or, in a replay, by the forward.
    auto linear = [&](floatX* out, float2* stats, const floatX* inp, size_t w, size_t gain, int K,
                      const std::vector<int>& widths) {
        if (gain != NONE)
            return linear_forward_stats(out, next ? stats : nullptr, m.row_sums, inp, m.w(w), N, K, widths, norm,
                                        m.stream) ||
                   !next;
        linear_forward(out, inp, m.w(w), N, K, std::accumulate(widths.begin(), widths.end(), 0), m.stream);
        return !next;
    };
    bool known = !next;

    if (replay_norm && at.norm1 != NONE)
        norm_residual_forward(a.n1, a.n1_stats, a.x, nullptr, m.w(at.norm1), N, C, norm, m.stream, !next);
    if (replay_block)
        known = linear(a.qkv_raw, a.qkv_stats, a.n1, at.qkv, at.qkv_gain, C, {h.width(0), h.width(1), h.width(2)});
    const Cache& cache = m.cache;
    const float2* rope = m.rope ? m.rope + size_t(cache.past) * h.HS / 2 : nullptr;
    if (replay_norm)
        qkv_norm_rope_forward(a.q, a.k, a.v, a.qkv_stats, a.qkv_raw, qkv_gains(m, at), rope, h, norm, m.stream, known);
    const size_t layer = size_t(l) * cache.sequences * cache.room * h.width(1);
    if (cache.sequences)
        cache_append(cache.k + layer, cache.v + layer, a.k, a.v, cache.sequences, cache.past, cache.room, h, m.stream);
    if (cache.past > 0)
        attention_decode(a.att, a.q, cache.k + layer, cache.v + layer, cache.past + 1, cache.room, h, m.stream);
    else if (replay_block)
        attention_forward(a.att, a.lse, a.q, a.k, a.v, h, m.stream);
    if (replay_block) known = linear(a.o_raw, a.o_stats, a.att, at.o, at.o_gain, C, {C});
    if (replay_norm) norm_residual_forward(a.h, a.o_stats, a.o_raw, a.x, m.w(at.o_gain), N, C, norm, m.stream, known);

    if (replay_norm && at.norm2 != NONE)
        norm_residual_forward(a.n2, a.n2_stats, a.h, nullptr, m.w(at.norm2), N, C, norm, m.stream, !next);
    if (replay_ffn) {
        const std::vector<int> widths = m.c.gated() ? std::vector<int>{F, F} : std::vector<int>{F};
        known = linear(a.w13_raw, a.w13_stats, a.n2, at.w13, at.w13_gain, C, widths);
    }
    if (replay_norm)
        ffn_norm_act_forward(a.act, a.w13_stats, a.w13_raw, m.w(at.w13_gain), N, F, m.c.gated(), norm, m.stream, known);
    if (!next) return;
    known = linear(a.w2_raw, a.w2_stats, a.act, at.w2, at.w2_gain, F, {C});
    norm_residual_forward(next, a.w2_stats, a.w2_raw, a.h, m.w(at.w2_gain), N, C, norm, m.stream, known);
}

// m.dres: on entry the gradient of the block's output, on return that of its input. Gradients of weights are added to
// beta (0 or 1) times what was there, those of gains to what was there.
void block_backward(Model& m, int l, int B, int T, float beta) {
    const LayerOffsets& at = m.table.layers[l];
    LayerActivations& a = m.acts[l];
    const Norm norm = m.norm();
    const int N = B * T, C = m.c.C, F = m.c.F(), FF = m.c.FF();
    const Heads h = heads(m, B, T);
    cudaStream_t stream = m.stream;
    if (m.storage.recompute > Recompute::none && l + 1 < m.c.L)  // the last layer's are still there
        block_forward(m, l, nullptr, B, T);

    // The two ends of a half, y = x + Nout(branch(Nin(x))): the gradient goes through the branch and around it.
    auto into_branch = [&](size_t gain, const floatX* raw, const float2* stats) -> const floatX* {
        if (gain == NONE) return m.dres;
        norm_backward(m.dbranch, m.g(gain), m.partial, nullptr, m.dres, raw, m.w(gain), stats, N, C, norm, stream);
        return m.dbranch;
    };
    // Without a norm in front, the matmul itself adds to m.dres.
    auto out_of_branch = [&](size_t gain, const floatX* x, const float2* stats, const floatX* dout, const floatX* inp,
                             size_t w, int M) {
        const bool add = gain == NONE;
        linear_backward(add ? m.dres : m.dnormed, add, m.g(w), beta, dout, inp, m.w(w), N, C, M, stream);
        if (!add)
            norm_backward(m.dres, m.g(gain), m.partial, m.dres, m.dnormed, x, m.w(gain), stats, N, C, norm, stream);
    };

    // y = h + N2 W2 act
    const floatX* dw2_raw = into_branch(at.w2_gain, a.w2_raw, a.w2_stats);
    linear_backward(m.dact, false, m.g(at.w2), beta, dw2_raw, a.act, m.w(at.w2), N, F, C, stream);
    ffn_norm_act_backward(m.dw13_raw, m.g(at.w13_gain), m.partial, m.dact, a.w13_raw, m.w(at.w13_gain), a.w13_stats, N,
                          F, m.c.gated(), norm, stream);
    out_of_branch(at.norm2, a.h, a.n2_stats, m.dw13_raw, a.n2, at.w13, FF);

    // h = x + No Wo att
    const floatX* do_raw = into_branch(at.o_gain, a.o_raw, a.o_stats);
    linear_backward(m.datt, false, m.g(at.o), beta, do_raw, a.att, m.w(at.o), N, C, C, stream);
    attention_backward(m.dq, m.dk, m.dv, m.attention_scratch, m.datt, a.att, a.q, a.k, a.v, a.lse, h, stream);
    qkv_norm_rope_backward(m.dqkv_raw, m.g(at.qkv_gain), m.partial, m.dq, m.dk, m.dv, a.qkv_raw, qkv_gains(m, at),
                           a.qkv_stats, m.rope, h, norm, stream);
    out_of_branch(at.norm1, a.x, a.n1_stats, m.dqkv_raw, a.n1, at.qkv, m.c.QKV());
}

// Takes B windows of T+1 tokens to the device, without waiting: the first T of each are inputs, the last T targets.
// With `places`, for the embedding's backward, also the TokenPlaces, `begin` filled up with N.
void set_batch(Model& m, const int32_t* windows, int B, int T, bool places) {
    const size_t N = size_t(B) * T;
    Staging& s = m.staging[m.next_staging];
    m.next_staging ^= 1;
    CHECK(cudaEventSynchronize(s.copied));
    int *tokens = s.batch, *targets = tokens + N;
    for (int b = 0; b < B; b++) {
        std::copy_n(windows + b * size_t(T + 1), T, tokens + b * size_t(T));
        std::copy_n(windows + b * size_t(T + 1) + 1, T, targets + b * size_t(T));
    }
    if (places) {
        const TokenPlaces p = token_places(tokens, int(N));
        std::copy(p.places.begin(), p.places.end(), s.batch + 2 * N);
        std::fill(std::copy(p.begin.begin(), p.begin.end(), s.batch + 3 * N), s.batch + batch_ints(N), int(N));
    }
    m.targets = m.tokens + N, m.places = m.targets + N, m.begin = m.places + N;
    CHECK(cudaMemcpyAsync(m.tokens, s.batch, (places ? batch_ints(N) : 2 * N) * sizeof(int), cudaMemcpyHostToDevice,
                          m.stream));
    CHECK(cudaEventRecord(s.copied, m.stream));
}

// Tokens to m.normed, the final norm's output: all but the head. after_block(l) finds layer l's activations all there.
void forward(Model& m, int B, int T, const std::function<void(int)>& after_block = nullptr) {
    const int N = B * T, C = m.c.C, L = m.c.L;
    need_weights(m, 0, 1);
    const floatX* positions = m.w(m.table.pos);
    if (positions) positions += size_t(m.cache.past) * C;
    embedding_forward(m.acts[0].x, m.tokens, m.w(m.table.tok), positions, N, T, C, m.stream);
    for (int l = 0; l < L; l++) {
        need_weights(m, l + 1, l + 2);
        block_forward(m, l, l + 1 < L ? m.acts[l + 1].x : m.out, B, T);
        if (after_block) after_block(l);
    }
    need_weights(m, L + 1, -1);
    norm_residual_forward(m.normed, m.norm_stats, m.out, nullptr, m.w(m.table.norm), N, C, m.norm(), m.stream);
}

// Logits of `rows` rows of m.normed from row0 on, to m.logits; at most m.logit_rows at a time.
void head_forward(Model& m, size_t row0, int rows) {
    linear_forward(m.logits, m.normed + row0 * m.c.C, m.w(m.table.head), rows, m.c.C, m.c.Vp(), m.stream);
}

// Head and loss in chunks of rows; m.loss += weight times the mean loss. With `backward` each chunk's gradient goes
// straight on to m.dnormed and is added to beta (0 or 1) times that of the head's weights.
void loss_forward(Model& m, int B, int T, float weight, bool backward, float beta = 1.0f) {
    const size_t N = size_t(B) * T, C = m.c.C;
    for (size_t row = 0; row < N; row += m.logit_rows) {
        const int rows = int(std::min(N - row, size_t(m.logit_rows)));
        head_forward(m, row, rows);
        cross_entropy(m.losses + row, m.logits, m.targets + row, rows, m.c.V, m.c.Vp(), weight / N, backward, m.stream);
        if (backward)
            linear_backward(m.dnormed + row * C, false, m.g(m.table.head), row == 0 ? beta : 1.0f, m.logits,
                            m.normed + row * C, m.w(m.table.head), rows, C, m.c.Vp(), m.stream);
    }
    loss_sum_kernel<<<1, 512, 0, m.stream>>>(m.loss, m.losses, int(N), weight / N);
    CHECK(cudaGetLastError());
}

// Before a step's first micro-batch, and before an evaluation: the loss begins at 0.
void begin_step(Model& m) { CHECK(cudaMemsetAsync(m.loss, 0, sizeof(float), m.stream)); }

// The kernels of a micro-batch. A unit's gradients are reduced once complete, in a step's last micro-batch, or in each
// where they are cut over ranks.
void launch_micro_batch(Model& m, int B, int T, float weight, bool first, bool last) {
    const int L = m.c.L, top = L + 1;
    auto finished = [&](int unit) {
        if (last || m.storage.cut_gradients()) reduce_gradients(m, unit, first);
    };
    forward(m, B, T);
    float beta = begin_gradients(m, top, first);
    if (m.table.tied()) beta = begin_gradients(m, 0, first);
    loss_forward(m, B, T, weight, true, beta);
    norm_backward(m.dres, m.g(m.table.norm), m.partial, nullptr, m.dnormed, m.out, m.w(m.table.norm), m.norm_stats,
                  B * T, m.c.C, m.norm(), m.stream);
    finished(top);
    for (int l = L - 1; l >= 0; l--) {
        need_weights(m, l + 1, l > 0 ? l : -1);
        block_backward(m, l, B, T, begin_gradients(m, l + 1, first));
        finished(l + 1);
    }
    if (!m.table.tied()) begin_gradients(m, 0, first);
    embedding_backward(m.g(m.table.tok), m.g(m.table.pos), m.dres, m.tokens, m.places, m.begin, B * T, B, T, m.c.C,
                       m.stream);
    finished(0);
}

// One micro-batch of a step, weight 1 / their number on all ranks: adds to m.loss and to the gradients, which the
// `first` begins anew and the `last` sums over ranks.
void forward_backward(Model& m, const int32_t* windows, int B, int T, float weight, bool first, bool last = true) {
    set_batch(m, windows, B, T, true);
    Graph& g = m.graphs[first];
    if (!m.use_graphs || B != m.B || T != m.c.T || g.weight != weight) {
        launch_micro_batch(m, B, T, weight, first, last);
        if (!g.exec) g.weight = weight;
        return;
    }
    if (!g.exec) {
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamBeginCapture(m.stream, cudaStreamCaptureModeThreadLocal));
        launch_micro_batch(m, B, T, weight, first, last);
        CHECK(cudaStreamEndCapture(m.stream, &graph));
        CHECK(cudaGraphInstantiate(&g.exec, graph, 0));
        CHECK(cudaGraphDestroy(graph));
    }
    CHECK(cudaGraphLaunch(g.exec, m.stream));
}

// Runs one micro-batch of arbitrary tokens in which every matmul chooses its algorithm by time. Gradients and loss are
// what a step's begin overwrites or clears.
void time_matmuls(Model& m) {
    std::vector<int32_t> windows(size_t(m.B) * (m.c.T + 1));
    for (size_t i = 0; i < windows.size(); i++) windows[i] = int32_t(random_bits(1, 3, i) % m.c.V);
    matmul.timing = true;
    begin_step(m);
    forward_backward(m, windows.data(), m.B, m.c.T, 1.0f, true);
    matmul.timing = false;
}

float read_float(const Model& m, const float* p) {
    float x;
    CHECK(cudaMemcpyAsync(&x, p, sizeof(x), cudaMemcpyDeviceToHost, m.stream));
    CHECK(cudaStreamSynchronize(m.stream));
    return x;
}

// Mean loss of one batch, no gradients.
float evaluate(Model& m, const int32_t* windows, int B, int T) {
    begin_step(m);
    set_batch(m, windows, B, T, false);
    forward(m, B, T);
    loss_forward(m, B, T, 1.0f, false);
    return read_float(m, m.loss);
}

// =====================================================================================================================
// Optimizer: AdamW with decoupled decay (Loshchilov, Hutter 2019) and torch's clipping of the global gradient norm.
//   g = grad min(1, clip / (norm + 1e-6)),   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
//   w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),   t = 1, 2, ...
// All over the flat buffers, each read and written once, CHUNK elements a block, FOUR a thread at a time. Bytes a
// parameter in bf16: 4 for the norm, 30 for the update (22 with bf16 moments). Over ranks, each takes the norm of its
// pieces and, unless nothing is cut (zero 0), updates only those; the weights are then gathered unit by unit.
//
// A step whose loss or gradient norm is not finite updates nothing and is counted; t counts the updates. The decision
// is the device's, so that the host need not wait.

struct AdamW {
    float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f, clip = 1.0f;  // clip 0: none
    bool decay_1d = true;
    uint64_t seed = 1;  // of the random rounding
};

// 32 bits for element i of update `key` (the finisher of MurmurHash3)
__device__ inline unsigned rounding_bits(size_t i, unsigned key) {
    unsigned x = (unsigned(i) ^ key) + unsigned(i >> 32) * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

// x as F: float as it is, bf16 up or down at the odds that keep its mean, so that steps too small for 8 bits are not
// lost. r: 16 random bits.
__device__ inline void store_randomly(float& to, float x, unsigned) { to = x; }
__device__ inline void store_randomly(__nv_bfloat16& to, float x, unsigned r) {
    const unsigned bits = __float_as_uint(x), up = (bits + (r & 0xffffu)) & 0xffff0000u;
    to = fabsf(x) < INFINITY ? __uint_as_float(up) : x;  // infinities and NaN stay what they are
}

// sums[block] = sum of grads[i]^2 over the block's CHUNK
template <typename G>
__global__ void square_sum_kernel(float* sums, const G* grads, size_t size) {
    size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    float part[FOUR] = {}, sum = 0.0f;
    for (size_t i = begin + threadIdx.x * FOUR; i < end; i += blockDim.x * FOUR) {
        const Four<G> g = four(grads, i);
        for (int j = 0; j < FOUR; j++) part[j] += float(g.v[j]) * float(g.v[j]);
    }
    for (float x : part) sum += x;
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// What the ranks sum: this one's loss, the square of its part of the gradient norm (sums (count), from
// square_sum_kernel), whether it was asked to stop. One block.
__global__ void numbers_kernel(Numbers* n, const float* sums, int count, bool stop) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    n->summed[0] = n->loss, n->summed[1] = sum, n->summed[2] = stop;
}

// What the update needs to know, from the sums over ranks. One thread.
__global__ void decide_kernel(Numbers* n, AdamW o) {
    n->loss = float(n->summed[0]), n->grad_norm = float(sqrt(n->summed[1])), n->stop = int(n->summed[2]);
    n->skip = !(fabsf(n->loss) < INFINITY && n->grad_norm < INFINITY);
    n->skip ? n->skipped++ : n->updates++;
    n->scale = o.clip > 0.0f ? fminf(1.0f, o.clip / (n->grad_norm + 1e-6f)) : 1.0f;
    n->correction1 = float(1.0 - pow(double(o.beta1), double(n->updates)));
    n->correction2 = float(1.0 - pow(double(o.beta2), double(n->updates)));
}

// `count` elements, a multiple of FOUR, CHUNK a block; the first is number `index` in the flat buffers (for the random
// rounding). master null: params are their own masters. G is the gradients' type, S the moments'.
template <typename G, typename S>
__global__ void adamw_kernel(floatX* params, float* master, S* m, S* v, const G* grads, const Numbers* n, size_t count,
                             size_t index, AdamW o, unsigned key) {
    if (n->skip) return;
    const float scale = n->scale, step = o.lr / n->correction1, root2 = rsqrtf(n->correction2),
                keep = 1.0f - o.lr * o.weight_decay;
    size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, count);
    for (size_t i = begin + threadIdx.x * FOUR; i < end; i += blockDim.x * FOUR) {
        const Four<G> g4 = four(grads, i);
        Four<S> m4 = four(m, i), v4 = four(v, i);
        Four<floatX> p4;
        Four<float> w4;
        if (master) {
            w4 = four(master, i);
        } else {
            p4 = four(params, i);
            for (int j = 0; j < FOUR; j++) w4.v[j] = float(p4.v[j]);
        }
        for (int j = 0; j < FOUR; j++) {
            const float g = float(g4.v[j]) * scale;
            const float mj = o.beta1 * float(m4.v[j]) + (1.0f - o.beta1) * g;
            const float vj = o.beta2 * float(v4.v[j]) + (1.0f - o.beta2) * g * g;
            w4.v[j] = w4.v[j] * keep - step * mj / (sqrtf(vj) * root2 + o.eps);
            const unsigned r = sizeof(S) == 2 ? rounding_bits(index + i + j, key) : 0;
            store_randomly(m4.v[j], mj, r);
            store_randomly(v4.v[j], vj, r >> 16);
        }
        if (master) {
            four(master, i) = w4;
            for (int j = 0; j < FOUR; j++) p4.v[j] = w4.v[j];
        } else {
            for (int j = 0; j < FOUR; j++)
                store_randomly(p4.v[j], w4.v[j], BF16 ? rounding_bits(index + i + j, ~key) : 0);
        }
        four(params, i) = p4;
        four(m, i) = m4;
        four(v, i) = v4;
    }
}

// Ends a step, whose number is `step`; `stop`: this rank was asked to stop. All ranks learn of it in m.numbers.
void update(Model& m, const AdamW& o, int64_t step, bool stop = false) {
    const Storage& s = m.storage;
    if (s.ranks > 1) ranks.order(m.stream, ranks.stream);  // the gradients are reduced
    int sums = 0;
    for (int u = 0; u < m.units(); u++) {
        const Piece p = m.piece(u);
        m.grads.at(s.cut_gradients() ? p.shard : p.whole).visit([&](auto* grads) {
            using G = std::decay_t<decltype(*grads)>;
            square_sum_kernel<G><<<chunks(p.size), 256, 0, m.stream>>>(m.square_sums + sums, grads, p.size);
        });
        CHECK(cudaGetLastError());
        sums += chunks(p.size);
    }
    numbers_kernel<<<1, 512, 0, m.stream>>>(m.numbers, m.square_sums, sums, stop);
    CHECK(cudaGetLastError());
    if (s.ranks > 1) {
        ranks.order(ranks.stream, m.stream);
        ranks.all_reduce(m.numbers->summed, 3, ncclFloat64, sizeof(double));
        ranks.order(m.stream, ranks.stream);
    }
    decide_kernel<<<1, 1, 0, m.stream>>>(m.numbers, o);
    CHECK(cudaGetLastError());

    const unsigned key = unsigned(random_bits(o.seed, 2, uint64_t(step)));
    // elements from `begin` on, all of one decay; `at` is where they are in a shard
    auto walk = [&](size_t begin, size_t at, size_t count, float weight_decay) {
        AdamW part = o;
        part.weight_decay = weight_decay;
        const size_t state = s.cut_state() ? at : begin;
        floatX* params = m.params + (s.cut_weights() ? at : begin);
        float* master = m.master ? m.master + state : nullptr;
        m.grads.at(s.cut_gradients() ? at : begin).visit([&](auto* grads) {
            m.m.at(state).visit([&](auto* moments) {
                using G = std::decay_t<decltype(*grads)>;
                using S = std::decay_t<decltype(*moments)>;
                adamw_kernel<G, S><<<chunks(count), 256, 0, m.stream>>>(params, master, moments,
                                                                        static_cast<S*>(m.v.at(state).p), grads,
                                                                        m.numbers, count, begin, part, key);
            });
        });
        CHECK(cudaGetLastError());
    };
    auto decay = [&](size_t i) { return m.table.tensors[i].cols || o.decay_1d ? o.weight_decay : 0.0f; };
    for (int u = 0; u < m.units(); u++) {
        const Unit& unit = m.table.units[u];
        const size_t end = unit.tensor + unit.tensors;
        for (size_t i = unit.tensor, j; i < end; i = j) {  // runs of neighbours of one decay
            for (j = i + 1; j < end && decay(j) == decay(i); j++) {
            }
            const size_t from = m.table.tensors[i].offset;
            const size_t to = j < end ? m.table.tensors[j].offset : unit.begin + unit.size;
            if (!s.cut_state())
                walk(from, from, to - from, decay(i));
            else
                own_parts(m, from, to - from,
                          [&](size_t whole, size_t shard, size_t count) { walk(whole, shard, count, decay(i)); });
        }
        if (s.cut_weights()) {
            m.slot(u).held = -1;
        } else if (s.cut_state()) {
            const Piece p = m.piece(u);
            ranks.order(ranks.stream, m.stream);
            ranks.all_gather(m.params + unit.begin, m.params + p.whole, p.size, NCCL_FLOATX, sizeof(floatX));
            CHECK(cudaEventRecord(m.gathered[u], ranks.stream));
        }
    }
}

// parts[block] = sum of the mixed words of the block's CHUNK of the weights, as they lie in memory, modulo 2^64: the
// same in any order. words (count), parts (chunks(count)).
__global__ void weights_hash_kernel(unsigned long long* parts, const unsigned* words, size_t count) {
    size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, count);
    unsigned long long sum = 0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        unsigned long long x = (words[i] + 0x9e3779b97f4a7c15ull * (i + 1)) * 0xbf58476d1ce4e5b9ull;
        sum += (x ^ (x >> 29)) * 0x94d049bb133111ebull;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
// hash = sum of parts; one block
__global__ void hash_sum_kernel(unsigned long long* hash, const unsigned long long* parts, int count) {
    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *hash = sum;
}

// Each rank's hash of the weights, which must be the same on all, to m.hashes. Not with weights that are cut.
void hash_weights(Model& m) {
    const size_t words = m.table.size * sizeof(floatX) / sizeof(unsigned);
    for (const cudaEvent_t& there : m.gathered) CHECK(cudaStreamWaitEvent(m.stream, there, 0));
    weights_hash_kernel<<<chunks(words), 256, 0, m.stream>>>(m.hash_parts, reinterpret_cast<unsigned*>(m.params),
                                                             words);
    CHECK(cudaGetLastError());
    hash_sum_kernel<<<1, 512, 0, m.stream>>>(m.hashes + ranks.rank, m.hash_parts, chunks(words));
    CHECK(cudaGetLastError());
    ranks.order(ranks.stream, m.stream);
    ranks.all_gather(m.hashes, m.hashes + ranks.rank, 1, ncclUint64, sizeof(*m.hashes));
    ranks.order(m.stream, ranks.stream);
}

// Learning rate of 0-based step s of S: (s+1)/(W+1) of the peak while s < W, then linear to 0 over the other S-W steps.
double learning_rate(double peak, int64_t s, int64_t W, int64_t S) {
    if (s < W) return peak * double(s + 1) / double(W + 1);
    return peak * (1.0 - double(s - W) / double(S - W));
}

// =====================================================================================================================
// Channel: who this process is among the ranks, and connections beside NCCL's by which they meet, watch each other and
// end as one.

struct World {
    int rank = 0, size = 1, local = 0;
    const char* launcher = "";
};

// The value of an environment variable as a number; `fallback` if it is not set.
int64_t environment_number(const char* name, int64_t fallback, int64_t least, int64_t most, const char* what) {
    const char* text = getenv(name);
    if (!text) return fallback;
    char* stop = nullptr;
    errno = 0;
    const long long n = strtoll(text, &stop, 10);
    if (!isdigit((unsigned char)*text) || *stop || errno || n < least || n > most)
        throw Error(format("%s=%s: is no %s, %lld to %lld. Start with the launcher again, or unset it.", name, text,
                           what, (long long)least, (long long)most));
    return n;
}

// The launcher whose ranks MPI can bring together; to another MPI's it starts alone.
#if !defined(USE_MPI)
constexpr const char* BUILT_WITH = "no MPI";
#elif defined(OPEN_MPI)
constexpr const char* BUILT_WITH = "Open MPI";
#else
constexpr const char* BUILT_WITH = "MPICH";  // and what descends from it
#endif

// The first launcher whose variables are all there; without one, a world of one rank.
World find_world() {
    static const char* const launchers[][4] = {
        {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"},
        {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
        {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
        {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"}};  // STEP: srun's, not the batch script's
    World w;
    for (auto& [launcher, rank, size, local] : launchers) {
        if (!getenv(rank) || !getenv(size) || !getenv(local)) continue;
        w.size = int(environment_number(size, 1, 1, 1 << 20, "number of ranks"));
        w.rank = int(environment_number(rank, 0, 0, w.size - 1, "rank of this world"));
        w.local = int(environment_number(local, 0, 0, w.size - 1, "local rank of this world"));
        w.launcher = launcher;
        break;
    }
    return w;
}

// HOST:PORT at which ranks meet if nobody gives an address and there is no MPI.
std::string default_address() {
    auto port = [](int64_t otherwise) { return environment_number("MASTER_PORT", otherwise, 1, 65534, "port"); };
    const char *host = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    if (host && *host) {
        const char* agent = getenv("TORCHELASTIC_USE_AGENT_STORE");  // torchrun itself listens at MASTER_PORT then
        return format("%s:%lld", host, (long long)port(29500) + (agent && !strcmp(agent, "True")));
    }
    if (!nodes) nodes = getenv("SLURM_JOB_NODELIST");
    if (!nodes || !getenv("SLURM_JOB_ID"))
        throw Error("rendezvous: no address. Set MASTER_ADDR and MASTER_PORT, or give --rendezvous HOST:PORT.");
    std::string first;  // node[003-010,012],gpu7: node003
    if (environment_number("SLURM_STEP_NUM_NODES", 0, 0, INT_MAX, "number of nodes") == 1)
        nodes = "127.0.0.1";  // a node's name need not be its host's
    for (const char* p = nodes; *p && *p != ','; p++) {
        if (*p != '[') {
            first += *p;
            continue;
        }
        while (*++p && !strchr("-,]", *p)) first += *p;
        while (*p && *p != ']') p++;
        if (!*p) break;
    }
    // below 32768, where the kernel begins to give ports to outgoing connections; steps of one job can run side by side
    const int64_t job = environment_number("SLURM_JOB_ID", 0, 0, INT64_MAX, "number of a job") % 12768;
    const int64_t step = environment_number("SLURM_STEP_ID", 0, 0, UINT_MAX, "number of a step") % 12768;
    return format("%s:%lld", first.c_str(), (long long)port(20000 + (job + 499 * step) % 12768));
}

std::pair<std::string, int> host_and_port(const std::string& where) {
    const size_t colon = where.rfind(':');
    int port = 0, end = 0;
    if (colon == std::string::npos || !isdigit((unsigned char)where[colon + 1]) || where.size() - colon > 6 ||
        sscanf(&where[colon + 1], "%d%n", &port, &end) != 1 || where[colon + 1 + end] || port < 1 || port > 65535 ||
        colon == 0)
        throw Error("rendezvous: " + where + ": is not HOST:PORT. Give rank 0's host and a free port there.");
    const bool bracketed = where[0] == '[' && where[colon - 1] == ']';  // IPv6
    return {bracketed ? where.substr(1, colon - 2) : where.substr(0, colon), port};
}

// TCP connections of all ranks to rank 0. They carry the rendezvous and its payload (the NCCL id), heartbeats, errors,
// short reports and the goodbye. One thread a process owns the sockets; other threads leave it notes under `mutex`.
// Whatever ends the job, one process says why in one line on stderr, and all end with status 1:
//   a rank k > 0 that fails tells rank 0 and waits for its "stop"; rank 0 collects reasons for a moment, says the best
//   one and stops everyone; without rank 0, its speakers (rank 1; the first rank on another host, since hosts go down
//   whole) say that.
// An Error out of open() goes to fail() like any other: rank 0 still holds connections of ranks that wait for its word.
struct Channel {
    void open(const World& world, const std::string& address, double timeout_s,
              const std::function<void(void*, size_t)>& broadcast, std::string& id) {
        me = world;
        limit = timeout_s;
        beat = std::min(0.5, limit / 10);
        if (me.size == 1) return;
        std::string where = address.empty() && !broadcast ? default_address() : address, cookie = "-";
        std::vector<std::string> hosts;
        int port = 0, listener = -1;
        if (!broadcast) {
            hosts.resize(1);
            std::tie(hosts[0], port) = host_and_port(where);
        }
        if (me.rank == 0) listener = listen_at(port);
        if (broadcast) {
            std::string card = me.rank == 0 ? calling_card(port) : "";
            uint64_t bytes = card.size();
            broadcast(&bytes, sizeof(bytes));
            if (bytes > MOST) throw Error("rendezvous: the broadcast is broken. Start all ranks with one command.");
            card.resize(bytes);
            broadcast(&card[0], bytes);
            std::istringstream in(card);
            in >> port >> cookie;
            for (std::string host; in >> host;) hosts.push_back(host);
            where = format("%s:%d", hosts.empty() ? "?" : hosts[0].c_str(), port);
        }
        me.rank == 0 ? gather(listener, where, cookie, id) : join(hosts, port, where, cookie, id);
        for (Peer& p : peers) p.heard = p.moved = now();
        if (pipe2(wake, O_CLOEXEC | O_NONBLOCK))
            throw Error(format("rendezvous: no pipe: %s. Raise the limit of open files (ulimit -n).", strerror(errno)));
        sigset_t all, before;  // signals are for the main thread
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        thread = std::thread(&Channel::watch, this);
        running = true;  // from here on the thread ends the process
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    // This rank moved. The same words again tell of movement, not of a new place: long work of one rank alone may call
    // this as often as it likes. Otherwise all ranks make the same calls.
    void progress(const char* doing, int64_t step) {
        std::lock_guard<std::mutex> lock(place_mutex);
        const long long stage = step != place.step ? 0 : place.stage + (doing != place.doing);
        place = {place.moves + 1, 0, step, stage, doing};
    }

    // Asked at every heartbeat: words mean that this rank failed so. Returns when the former hook is no longer running.
    void set_check(std::function<std::string()> hook) {
        std::lock_guard<std::mutex> lock(check_mutex);
        check = std::move(hook);
    }

    void report(const std::string& text) {
        if (text.size() > MOST) throw Error("channel: a report of more than 1 MiB. Send less.");
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (me.rank == 0)
                reports.emplace_back(0, text);
            else
                outbox.push_back(text);
        }
        changed.notify_all();
        nudge();
    }

    // Rank 0: the reports that have come and their senders, after at most `seconds` of waiting for one.
    std::vector<std::pair<int, std::string>> take_reports(double seconds) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !reports.empty(); });
        return std::exchange(reports, {});
    }

    [[noreturn]] void fail(const std::string& message) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (!running) end_job(message);
            if (failure.empty()) failure = message.empty() ? "unknown error" : message.substr(0, 1 << 16);
        }
        nudge();
        for (;;) sleep(1000);  // the thread ends the process
    }

    // All ranks come here; none leaves before all have come. A rank that does not come is found by the watch.
    void close() { leave(leaving); }
    ~Channel() { leave(abandoned); }

private:
    enum Kind : uint32_t { GREETING = 1, HELLO, GO, BEAT, FAIL, REPORT, BYE, STOP };
    static constexpr uint32_t MAGIC = 0x53677000, MOST = 1 << 20;  // head of each frame, above its kind; bytes in one
    static constexpr int VERSION = 1;

    struct Place {
        long long moves = 0, calls = 0, step = 0, stage = 0;  // calls of collectives; stage within the step
        std::string doing = "starting";
    };
    struct Peer {
        int fd = -1, rank = -1;
        std::string host, name, in, out, gone;  // gone: why the connection is closed
        double heard = 0, moved = 0;            // when
        Place place;
        bool bye = false, failed = false;
        std::string at() const {
            const std::string call = place.calls ? format(", collective %lld", place.calls) : "";
            return bye ? "the end" : format("step %lld (%s%s)", place.step, place.doing.c_str(), call.c_str());
        }
        void move_to(const Place& to) {
            if (to.moves != place.moves || to.calls != place.calls) moved = now();
            place = to;
        }
        void leave() {  // a goodbye is a move, too
            if (!bye) bye = true, moved = now();
        }
    };

    struct Reason {  // rank 0: why the job ends, when that was first known, which rank said it
        std::string text;
        double time = 0;
        int rank = 0;
        bool death = false;
    };

    World me;
    double limit = 0, beat = 0;
    bool speaks = false;      // says it when rank 0 is lost
    std::vector<Peer> peers;  // on rank 0 by rank, itself included; elsewhere rank 0 alone. The thread's.
    int wake[2] = {-1, -1};
    std::thread thread;
    Reason reason;
    double told = 0;  // the others: when rank 0 was told of a failure
    bool said_bye = false;

    std::mutex mutex;  // of the flags, failure, outbox, reports
    bool running = false, leaving = false, abandoned = false;
    std::string failure;
    std::vector<std::string> outbox;
    std::vector<std::pair<int, std::string>> reports;

    std::condition_variable changed;  // reports came
    std::mutex place_mutex, check_mutex;
    Place place;
    std::function<std::string()> check;

    static std::string list(const std::vector<int>& ranks) {  // "rank 3", "ranks 1, 2, 3, 4 and 59 more"
        std::string s = ranks.size() == 1 ? "rank " : "ranks ";
        for (size_t i = 0; i < ranks.size() && i < 4; i++) s += (i ? ", " : "") + std::to_string(ranks[i]);
        return ranks.size() > 4 ? s + format(" and %zu more", ranks.size() - 4) : s;
    }

    void nudge() {
        if (wake[1] >= 0 && write(wake[1], "", 1) < 0) return;  // full: it will wake anyway
    }

    void leave(bool& how) {
        if (!thread.joinable()) return;
        {
            std::lock_guard<std::mutex> lock(mutex);
            how = true;
        }
        nudge();
        thread.join();
        std::lock_guard<std::mutex> lock(mutex);
        running = false;
        for (Peer& p : peers) drop(p, "closed");
        for (int& fd : wake) ::close(fd), fd = -1;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Frames {kind, length, body} over non-blocking sockets.

    static void drop(Peer& p, const std::string& why) {
        if (p.fd >= 0) ::close(p.fd);
        if (p.gone.empty()) p.gone = why;
        p.fd = -1;
    }

    static void put(Peer& p, Kind kind, const std::string& body = "") {
        const uint32_t head[2] = {MAGIC | kind, uint32_t(body.size())};
        p.out.append(reinterpret_cast<const char*>(head), sizeof(head)).append(body);
    }

    // The next whole frame of p, if there is one. What is no frame ends the connection.
    static bool take(Peer& p, uint32_t& kind, std::string& body) {
        uint32_t head[2];
        if (p.in.size() < sizeof(head)) return false;
        memcpy(head, p.in.data(), sizeof(head));
        if ((head[0] & ~255u) != MAGIC || head[1] > MOST) {
            p.in.clear();
            drop(p, "it sent what is no message");
            return false;
        }
        if (p.in.size() - sizeof(head) < head[1]) return false;
        kind = head[0] & 255;
        body = p.in.substr(sizeof(head), head[1]);
        p.in.erase(0, sizeof(head) + head[1]);
        return true;
    }

    static void flush(Peer& p) {  // a broken connection shows when it is read
        while (p.fd >= 0 && !p.out.empty()) {
            const ssize_t n = send(p.fd, p.out.data(), p.out.size(), MSG_NOSIGNAL);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
            p.out.erase(0, n < 0 ? std::string::npos : size_t(n));
        }
    }

    // Writes and reads what goes without waiting, after at most `seconds` of waiting for it. True: `also` is readable.
    static bool exchange(std::vector<Peer>& who, int also, double seconds) {
        std::vector<pollfd> fds = {{also, POLLIN, 0}};
        for (Peer& p : who) {
            flush(p);
            fds.push_back({p.fd, short(p.out.empty() ? POLLIN : POLLIN | POLLOUT), 0});
        }
        if (poll(fds.data(), fds.size(), int(std::ceil(std::clamp(seconds, 0.0, 60.0) * 1e3))) <= 0) return false;
        static thread_local char buffer[1 << 16];
        for (size_t i = 0; i < who.size(); i++) {
            if (!fds[i + 1].revents) continue;
            flush(who[i]);
            const ssize_t n = recv(who[i].fd, buffer, sizeof(buffer), 0);
            if (n > 0)
                who[i].in.append(buffer, n);
            else if (n == 0)
                drop(who[i], "its connection closed");
            else if (errno != EAGAIN && errno != EINTR)
                drop(who[i], strerror(errno));
        }
        return fds[0].revents != 0;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The rendezvous.

    static int listen_at(int& port) {  // 0: any, and says which
        int fd = -1, on = 1, off = 0, bad = 0;
        sockaddr_in6 any = {};  // as far as it matters here, a sockaddr_in too
        socklen_t size = sizeof(any);
        any.sin6_port = htons(port);
        for (int family : {AF_INET6, AF_INET}) {  // IPv6 takes IPv4 too, where there is IPv6
            fd = socket(any.sin6_family = family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (fd < 0) continue;
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
            if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
            bad = bind(fd, (sockaddr*)&any, family == AF_INET6 ? sizeof(any) : sizeof(sockaddr_in));
            if (!bad || errno == EADDRINUSE || errno == EACCES) break;
            ::close(fd), fd = -1;
        }
        if (fd < 0 || bad || listen(fd, SOMAXCONN)) {
            const int why = errno;
            if (fd >= 0) ::close(fd);
            throw Error(
                format("rendezvous: rank 0 cannot listen at port %d: %s. Choose another by MASTER_PORT or "
                       "--rendezvous HOST:PORT, or end the job that has it.",
                       port, strerror(why)));
        }
        getsockname(fd, (sockaddr*)&any, &size);
        port = ntohs(any.sin6_port);
        return fd;
    }

    static std::string calling_card(int port) {  // port, cookie, addresses of this host
        std::random_device random;
        std::string card = format("%d ", port);
        for (int i = 0; i < 4; i++) card += format("%08x", random());
        ifaddrs* all = nullptr;
        if (getifaddrs(&all) == 0)
            for (ifaddrs* i = all; i; i = i->ifa_next) {
                const auto* a = (sockaddr_in*)i->ifa_addr;
                if (!a || a->sin_family != AF_INET || (i->ifa_flags & (IFF_UP | IFF_LOOPBACK)) != IFF_UP) continue;
                char text[INET_ADDRSTRLEN];
                card += std::string(" ") + inet_ntop(AF_INET, &a->sin_addr, text, sizeof(text));
            }
        if (all) freeifaddrs(all);
        return card + " 127.0.0.1";
    }

    static std::string host_name() {
        char host[64] = "?";
        gethostname(host, sizeof(host) - 1);
        return host;
    }

    // Reads a guest's hello. What is wrong with it goes into `trouble`; a stranger is dropped.
    void admit(Peer& guest, const std::string& body, const std::string& cookie, std::vector<bool>& came,
               const std::vector<Peer>& guests, std::string& trouble) {
        int version = 0, rank = 0, size = 0, pid = 0;
        char key[40] = "", host[65] = "";
        const int n = sscanf(body.c_str(), "%d %39s %d %d %d %64s", &version, key, &rank, &size, &pid, host);
        if (n != 6 || cookie != key) return drop(guest, "a stranger");
        guest.rank = std::max(rank, 0), guest.host = host;
        guest.name = format("rank %d (%s, pid %d)", rank, host, pid);
        std::string wrong;
        if (version != VERSION)
            wrong = " runs another version of train_gpt than rank 0. Start one build everywhere.";
        else if (size != me.size)
            wrong = format(" was started in a world of %d, rank 0 in one of %d. Start all ranks with one command.",
                           size, me.size);
        else if (rank < 1 || rank >= size)
            wrong = format(" is none of the %d ranks. Start all ranks with one command.", size);
        for (const Peer& other : guests)
            if (wrong.empty() && &other != &guest && other.rank == rank)
                wrong = " was started twice, " + other.name + " is here. Start all ranks with one command.";
        if (rank >= 0 && rank < me.size) came[rank] = true;
        if (trouble.empty() && !wrong.empty()) trouble = guest.name + wrong;
    }

    // Rank 0: waits for all. After the first trouble it waits a second more, so that those on their way hear of it too.
    void gather(int listener, const std::string& where, const std::string& cookie, const std::string& id) {
        std::vector<Peer> guests;
        std::vector<bool> came(me.size);
        came[0] = true;
        std::string trouble;
        auto missing = [&] {
            std::vector<int> those;
            for (int r = 0; r < me.size; r++)
                if (!came[r]) those.push_back(r);
            return those;
        };
        double notice = now() + 20;
        for (double end = now() + limit; !missing().empty() && now() < end;) {
            const bool calm = trouble.empty();
            if (now() >= notice && calm)
                warn(format("waiting at %s for %s of %d, until --timeout %g.", where.c_str(), list(missing()).c_str(),
                            me.size, limit));
            if (now() >= notice) notice = end;
            if (exchange(guests, listener, std::min(end, notice) - now())) {
                const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK), on = 1;
                if (fd >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
                    guests.emplace_back();
                    guests.back().fd = fd;
                    put(guests.back(), GREETING);
                } else if ((errno == EMFILE || errno == ENFILE) && trouble.empty()) {
                    trouble =
                        format("rank 0 can take no more connections: %s. Raise the limit of open files (ulimit -n).",
                               strerror(errno));
                }
            }
            uint32_t kind;
            std::string body;
            for (Peer& g : guests) {
                while (g.rank < 0 && take(g, kind, body))
                    kind == HELLO ? admit(g, body, cookie, came, guests, trouble) : drop(g, "a stranger");
                if (g.rank >= 0 && !g.gone.empty() && trouble.empty())
                    trouble = g.name + " died: " + g.gone + ". See its own messages.";
            }
            auto strange = [](const Peer& g) { return g.rank < 0 && g.fd < 0; };
            guests.erase(std::remove_if(guests.begin(), guests.end(), strange), guests.end());
            if (calm && !trouble.empty()) end = std::min(end, now() + 1);
        }
        ::close(listener);
        if (trouble.empty() && !missing().empty())
            trouble = format("%s of %d did not come to %s within %g s. Check that they were started and can reach it.",
                             list(missing()).c_str(), me.size, where.c_str(), limit);
        if (!trouble.empty()) {
            peers = std::move(guests);  // whom fail() stops
            throw Error("rendezvous: " + trouble);
        }
        peers.resize(me.size);
        peers[0].host = host_name();
        peers[0].name = format("rank 0 (%s, pid %d)", peers[0].host.c_str(), int(getpid()));
        for (Peer& g : guests) g.rank > 0 ? std::swap(peers[g.rank], g) : drop(g, "a stranger");
        int second = 1;  // the first rank on another host than rank 0
        while (second < me.size && peers[second].host == peers[0].host) second++;
        for (int r = 1; r < me.size; r++)
            put(peers[r], GO, format("%d %s\n", r == 1 || r == second, peers[0].name.c_str()) + id);
    }

    // The others: try every address of rank 0 until one lets them in.
    void join(const std::vector<std::string>& hosts, int port, const std::string& where, const std::string& cookie,
              std::string& id) {
        std::string why = "no address";
        const double end = now() + limit;
        for (; now() < end; usleep(100000))
            for (const std::string& host : hosts) {
                addrinfo hints = {}, *all = nullptr;
                hints.ai_socktype = SOCK_STREAM;
                const int bad = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &all);
                if (bad) why = host + ": " + gai_strerror(bad);
                bool in = false;
                for (addrinfo* a = all; a && !in; a = a->ai_next) in = knock(*a, port, end, cookie, id, why);
                if (all) freeaddrinfo(all);
                if (in) return;
            }
        throw Error(
            format("rendezvous: rank 0 does not answer at %s within %g s (%s). Check that it was started, that "
                   "this is its host, and that no firewall is between.",
                   where.c_str(), limit, why.c_str()));
    }

    // Rank 0 greets first: whoever does not is somebody else, and hears nothing from us.
    bool knock(const addrinfo& a, int port, double end, const std::string& cookie, std::string& id, std::string& why) {
        std::vector<Peer> door(1);
        Peer& p = door[0];
        p.fd = socket(a.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        int on = 1, refused = p.fd < 0 || (connect(p.fd, a.ai_addr, a.ai_addrlen) && errno != EINPROGRESS);
        if (refused) drop(p, strerror(errno));
        setsockopt(p.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        sockaddr_in6 mine = {};
        socklen_t size = sizeof(mine);
        if (!getsockname(p.fd, (sockaddr*)&mine, &size) && ntohs(mine.sin6_port) == port)
            drop(p, "the kernel gave us that port");  // TCP would connect us to ourselves
        bool greeted = false;
        for (double until = std::min(end, now() + 2); p.gone.empty() && now() < until;) {
            exchange(door, -1, until - now());
            uint32_t kind;
            std::string body;
            while (take(p, kind, body)) {
                if (kind == STOP) _exit(1);  // rank 0 says why
                const size_t line = body.find('\n');
                if (kind == GREETING && !greeted) {
                    greeted = true;
                    put(p, HELLO,
                        format("%d %s %d %d %d %s", VERSION, cookie.c_str(), me.rank, me.size, int(getpid()),
                               host_name().c_str()));
                    until = now() + limit + 2;  // rank 0 decides within its own limit
                } else if (kind == GO && greeted && line != std::string::npos && line >= 2) {
                    speaks = body[0] == '1';
                    p.name = body.substr(2, line - 2);
                    id = body.substr(line + 1);
                    peers = std::move(door);
                    return true;
                } else {
                    drop(p, "it sent what is no message");
                }
            }
        }
        drop(p, "no answer");
        why = p.gone;
        return false;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The watch: the thread.

    // Says the one line, by one write, stops the others and ends this process. They hang up when they have read it; to
    // leave before that could take the message back.
    [[noreturn]] void end_job(const std::string& message) {
        const std::string line = "train_gpt: " + one_line(message) + "\n";
        if (write(2, line.data(), line.size()) < 0) errno = 0;  // nobody is left to be told
        linger(STOP);
        _exit(1);
    }

    void linger(Kind last) {
        for (Peer& p : peers) put(p, last);
        auto open = [](const Peer& p) { return p.fd >= 0; };
        for (double end = now() + 1; now() < end && std::any_of(peers.begin(), peers.end(), open);) {
            exchange(peers, -1, end - now());
            for (Peer& p : peers) p.in.clear();
        }
    }

    // Rank 0 has a reason to end the job; the first counts. A death beats the errors that it causes elsewhere, and what
    // rank 0 says itself needs no "rank k:".
    void blame(int rank, const std::string& why, bool death) {
        if (why.empty()) return;
        if (reason.text.empty())
            reason.time = now();
        else if (!(death && !reason.death) && !(rank == 0 && why == reason.text))
            return;
        reason = {why, reason.time, rank, death};
    }

    void read(Peer& p, uint32_t kind, const std::string& body) {
        p.heard = now();
        if (kind == STOP) _exit(1);  // somebody else has said why
        if (kind == BYE) p.leave();
        if (kind == FAIL && me.rank == 0) p.failed = true, blame(p.rank, body, false);
        if (kind == BEAT) {
            Place to;
            int words = 0;
            if (sscanf(body.c_str(), "%lld %lld %lld %lld %n", &to.moves, &to.calls, &to.step, &to.stage, &words) ==
                    4 &&
                words)
                to.doing = body.substr(words), p.move_to(to);
        }
        if (kind == REPORT && me.rank == 0) {
            std::lock_guard<std::mutex> lock(mutex);
            reports.emplace_back(p.rank, body);
            changed.notify_all();
        }
    }

    std::string death(const Peer& p, double t) const {  // what is wrong with p's connection, or nothing
        if (p.bye || p.failed) return "";
        if (!p.gone.empty())
            return p.name + " died at " + p.at() + ": " + p.gone +
                   ". See its own messages, and its host's system log (out of memory?).";
        if (t - p.heard > limit)
            return p.name + format(" has not been heard of for %g s, last at ", limit) + p.at() +
                   ". See whether its host is up and the process is not stopped.";
        return "";
    }

    // If all ranks stand still, which of them is behind? Those that have left are in front; all make the same calls of
    // collectives, so who has made fewer keeps the others waiting.
    std::string hang(double t) const {
        auto order = [](const Peer& p) {
            return std::make_tuple(p.bye, p.bye ? 0 : p.place.calls, p.bye ? 0 : p.place.step,
                                   p.bye ? 0 : p.place.stage);
        };
        const Peer *last = &peers[0], *first = last;
        for (const Peer& p : peers) {
            if (t - p.moved <= limit) return "";
            if (order(p) < order(*last)) last = &p;
            if (order(*first) < order(p)) first = &p;
        }
        if (last->bye) return "";
        const std::string at = format(" at %s for %g s", last->at().c_str(), limit);
        if (order(*last) == order(*first))
            return "no rank has moved" + at + ": a collective, the storage or a GPU hangs. NCCL_DEBUG=INFO tells more.";
        std::vector<int> behind;
        for (size_t r = 0; r < peers.size(); r++)
            if (order(peers[r]) == order(*last)) behind.push_back(int(r));
        return (behind.size() == 1 ? last->name + " hangs" : list(behind) + " hang") + at + ", the others are at " +
               first->at() + ". Look at the GPU, storage and network there.";
    }

    // What rank 0 makes of the others. True: all have said goodbye, itself too.
    bool judge(double t, const std::string& failed, bool done) {
        if (done) peers[0].leave();
        bool all = true;
        for (int r = 1; r < me.size; r++) {
            const std::string why = death(peers[r], t);
            if (!why.empty()) blame(0, why, true);
            all = all && peers[r].bye;
        }
        if (!failed.empty()) blame(0, failed, false);
        if (reason.text.empty()) blame(0, hang(t), true);
        if (!reason.text.empty() && t >= reason.time + 0.2)  // time for reasons to gather
            end_job(reason.rank ? format("rank %d: ", reason.rank) + reason.text : reason.text);
        return done && all && reason.text.empty();
    }

    // What another rank tells rank 0 and makes of it. True: rank 0 has said goodbye.
    bool follow(double t, const std::string& failed, bool done) {
        if (peers[0].bye) return true;
        if (done && !said_bye) put(peers[0], BYE), said_bye = true;
        if (!failed.empty() && !told) put(peers[0], FAIL, failed), told = t;
        const std::string why = death(peers[0], t);  // then the others leave quietly
        if (!why.empty() && speaks) end_job(why);
        if (!why.empty()) {
            sleep(1);  // a launcher that sees us end would end the speaker
            _exit(1);
        }
        if (told && t - told > 3) end_job(format("rank %d: ", me.rank) + failed);  // rank 0 does not take it
        return false;
    }

    void watch() {
        double next = now(), last = now();
        for (;;) {
            char notes[64];
            const double until = reason.text.empty() ? next : std::min(next, reason.time + 0.2);
            if (exchange(peers, wake[0], until - now()) && ::read(wake[0], notes, sizeof(notes)) < 0) errno = 0;
            const double t = now();
            if (t - last > 4 * beat)  // stopped ourselves (a debugger, a sleeping machine): accuse nobody of that time
                for (Peer& p : peers) p.heard += t - last, p.moved += t - last;
            last = t;
            uint32_t kind;
            std::string body;
            for (Peer& p : peers)
                while (take(p, kind, body)) read(p, kind, body);
            body.clear();
            if (t >= next) {
                next = t + beat;
                send_beat();
                std::lock_guard<std::mutex> lock(check_mutex);
                if (check) body = check();
            }
            std::unique_lock<std::mutex> lock(mutex);
            if (failure.empty()) failure = body;
            const std::string failed = failure;
            const bool done = leaving, abandon = abandoned;
            for (const std::string& text : outbox) put(peers[0], REPORT, text);
            outbox.clear();
            lock.unlock();
            if (abandon) return;
            if (me.rank == 0 ? judge(t, failed, done) : follow(t, failed, done)) {
                if (me.rank == 0) linger(BYE);
                return;
            }
        }
    }

    void send_beat() {
        std::unique_lock<std::mutex> lock(place_mutex);
        Place p = place;
        lock.unlock();
        p.calls = ranks.calls, p.moves += ticks;
        if (me.rank == 0) peers[0].move_to(p);
        const std::string body = format("%lld %lld %lld %lld %s", p.moves, p.calls, p.step, p.stage, p.doing.c_str());
        for (Peer& to : peers)
            if (to.fd >= 0 && to.out.empty()) put(to, BEAT, body);  // one that does not read gets no more
    }
};

Channel job;  // this process's

// =====================================================================================================================
// Files. JSON as far as safetensors headers and our own state need it, safetensors in and out, writing without loss.

struct Json {
    enum Kind { null, boolean, number, text, list, object } kind = null;
    double value = 0;
    std::string string;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> fields;

    const Json* find(const std::string& key) const {
        for (auto& f : fields)
            if (f.first == key) return &f.second;
        return nullptr;
    }
};

struct JsonParser {
    const char *p, *end;
    int depth = 0;

    [[noreturn]] void fail() { throw Error("not valid JSON"); }
    void space() {
        while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    }
    bool take(char c) {
        space();
        if (p < end && *p == c) return p++, true;
        return false;
    }
    std::string text() {
        std::string s;
        if (!take('"')) fail();
        while (p < end && *p != '"') {
            if ((unsigned char)*p < ' ') fail();
            if (*p != '\\') {
                s += *p++;
                continue;
            }
            if (++p >= end) fail();
            char c = *p++;
            if (c == 'u') {  // names and metadata are ASCII in practice; others become '?'
                if (end - p < 4) fail();
                long code = strtol(std::string(p, 4).c_str(), nullptr, 16);
                s += code > 0 && code < 128 ? char(code) : '?';
                p += 4;
            } else {
                s += c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c == 'b' ? '\b' : c == 'f' ? '\f' : c;
            }
        }
        if (p++ >= end) fail();
        return s;
    }
    Json parse() {
        Json j;
        if (++depth > 64) fail();
        space();
        if (p >= end) fail();
        if (*p == '{') {
            p++, j.kind = Json::object;
            if (!take('}')) {
                do {
                    std::string key = text();
                    if (!take(':')) fail();
                    j.fields.emplace_back(key, parse());
                } while (take(','));
                if (!take('}')) fail();
            }
        } else if (*p == '[') {
            p++, j.kind = Json::list;
            if (!take(']')) {
                do j.items.push_back(parse());
                while (take(','));
                if (!take(']')) fail();
            }
        } else if (*p == '"') {
            j.kind = Json::text, j.string = text();
        } else {
            std::string word;
            while (p < end && (isalnum((unsigned char)*p) || *p == '+' || *p == '-' || *p == '.')) word += *p++;
            char* stop = nullptr;
            if (word == "true" || word == "false")
                j.kind = Json::boolean, j.value = word == "true";
            else if (word != "null") {  // strtod would take inf, nan and 0x1p3 as well
                if (word.find_first_not_of("0123456789+-.eE") != std::string::npos) fail();
                j.kind = Json::number, j.value = strtod(word.c_str(), &stop), j.string = word;
                if (word.empty() || *stop || !std::isfinite(j.value)) fail();
            }
        }
        depth--;
        return j;
    }
};

Json parse_json(const std::string& s) {
    JsonParser parser{s.data(), s.data() + s.size()};
    Json j = parser.parse();
    parser.space();
    if (parser.p != parser.end) parser.fail();
    return j;
}

std::string json_text(const std::string& s) {
    std::string out = "\"";
    for (char c : s) {
        if (c == '"' || c == '\\') out += '\\';
        out += (unsigned char)c < ' ' ? format("\\u%04x", c) : std::string(1, c);
    }
    return out + "\"";
}
// null where JSON has no number
std::string json_number(double x) { return std::isfinite(x) ? format("%.9g", x) : "null"; }

// XXH64, as github.com/Cyan4973/xxHash's doc/xxhash_spec.md defines it, seed 0; `xxhsum -H1` gives the same.
struct Hash {
    static constexpr uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9,
                              P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
    uint64_t lanes[4] = {P1 + P2, P2, 0, 0 - P1}, total = 0;
    unsigned char rest[32];

    static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }
    static uint64_t round(uint64_t lane, uint64_t word) { return rotate(lane + word * P2, 31) * P1; }
    template <typename W>
    static W load(const unsigned char* p) {
        W word;
        memcpy(&word, p, sizeof(W));
        return word;
    }
    void block(const unsigned char* p) {
        for (int i = 0; i < 4; i++) lanes[i] = round(lanes[i], load<uint64_t>(p + 8 * i));
    }
    void add(const void* data, size_t bytes) {
        auto* p = static_cast<const unsigned char*>(data);
        const size_t had = total % 32, taken = had ? std::min(bytes, 32 - had) : 0;
        total += bytes;
        memcpy(rest + had, p, taken);
        if (had && had + taken == 32) block(rest);
        p += taken, bytes -= taken;
        for (; bytes >= 32; p += 32, bytes -= 32) block(p);
        if (bytes) memcpy(rest, p, bytes);
    }
    uint64_t value() const {
        uint64_t h = P5;
        if (total >= 32) {
            h = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
            for (uint64_t lane : lanes) h = (h ^ round(0, lane)) * P1 + P4;
        }
        h += total;
        const unsigned char *p = rest, *end = rest + total % 32;
        for (; p + 8 <= end; p += 8) h = rotate(h ^ round(0, load<uint64_t>(p)), 27) * P1 + P4;
        if (p + 4 <= end) h = rotate(h ^ load<uint32_t>(p) * P1, 23) * P2 + P3, p += 4;
        for (; p < end; p++) h = rotate(h ^ *p * P5, 11) * P1;
        h = (h ^ h >> 33) * P2;
        h = (h ^ h >> 29) * P3;
        return h ^ h >> 32;
    }
    std::string text() const { return format("%016llx", (unsigned long long)value()); }
};

[[noreturn]] void refuse_kind(const std::string& path) {
    throw Error(path + ": is a folder, a pipe or a device. Give a file.");
}

// A file being written: to PATH.tmp, fsynced and renamed by commit(); gone if commit is never reached.
struct OutFile {
    std::string path, tmp;
    int fd;
    Hash hash;
    explicit OutFile(const std::string& path) : path(path), tmp(path + ".tmp"), fd(-1) {
        struct stat info;
        if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) refuse_kind(path);
        unlink(tmp.c_str());  // of a run that was killed; a link or a pipe of that name must not take what is written
        fd = open(tmp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0) fail();
    }
    ~OutFile() {
        if (fd >= 0) close(fd), unlink(tmp.c_str());
    }
    OutFile(const OutFile&) = delete;
    [[noreturn]] void fail() {
        throw Error(path + ": cannot be written: " + strerror(errno) + ". Give a place with room and rights.");
    }
    void write(const void* data, size_t bytes) {
        constexpr uint64_t SYNC = 256 << 20;  // so that ticks mean bytes on the disk, and the end is no long wait
        if ((hash.total + bytes) / SYNC > hash.total / SYNC && fdatasync(fd)) fail();
        hash.add(data, bytes);
        ticks++;
        for (auto* p = static_cast<const char*>(data); bytes > 0;) {
            const ssize_t done = ::write(fd, p, bytes);
            if (done < 0 && errno == EINTR) continue;
            if (done < 0) fail();
            p += done, bytes -= done;
        }
    }
    void write(const std::string& text) { write(text.data(), text.size()); }
    void commit() {
        if (fsync(fd)) fail();
        const int done = fd;
        fd = -1;
        if (close(done) || rename(tmp.c_str(), path.c_str())) {
            const int error = errno;
            unlink(tmp.c_str());
            errno = error;
            fail();
        }
    }
};

// A file for reading that is no pipe, on which one could wait for ever, and no directory.
FILE* open_regular(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        const int error = errno;
        const std::string what =
            path + ": cannot be read: " + strerror(error) + ". Check the path and its permissions.";
        // no Error where the process, not the file, is at fault: a checkpoint is not put aside for that
        if (error == EMFILE || error == ENFILE || error == ENOMEM || error == EACCES) throw std::runtime_error(what);
        throw Error(what);
    }
    struct stat info;
    if (fstat(fd, &info) || !S_ISREG(info.st_mode)) {
        ::close(fd);
        refuse_kind(path);
    }
    return fdopen(fd, "rb");
}

// The whole of a file, at most 1 GiB; `any`: also of a pipe or a terminal.
std::string read_file(const std::string& path, bool any = false) {
    FILE* f = any ? fopen(path.c_str(), "rb") : open_regular(path);
    if (!f) throw Error(path + ": cannot be read: " + strerror(errno) + ". Check the path and its permissions.");
    std::string s;
    char buffer[65536];
    constexpr size_t MOST = size_t(1) << 30;
    struct stat info;
    bool large = fstat(fileno(f), &info) == 0 && uint64_t(info.st_size) > MOST;
    for (size_t n; !large && (n = fread(buffer, 1, sizeof(buffer), f)) > 0; large = s.size() > MOST)
        s.append(buffer, n);
    const int error = ferror(f) ? errno : 0;
    fclose(f);
    if (error) throw Error(path + ": cannot be read to its end: " + strerror(error) + ". Check the path and the disk.");
    if (large) throw Error(path + ": is larger than 1 GiB, as no file of its kind is. Check the path.");
    return s;
}

void make_dirs(const std::string& path) {  // with the folders above it
    for (size_t at = path.find('/', 1);; at = path.find('/', at + 1)) {
        const std::string part = path.substr(0, at);
        if (mkdir(part.c_str(), 0777) && errno != EEXIST)
            throw Error(part + ": cannot be made: " + strerror(errno) + ". Choose another folder.");
        if (at == std::string::npos) return;
    }
}

// A name in a folder is on the disk only when the folder is.
void fsync_dir(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool done = fd >= 0 && (fsync(fd) == 0 || errno == EINVAL);  // some file systems have nothing to sync
    const int error = errno;
    if (fd >= 0) close(fd);
    if (!done) throw Error(path + ": cannot be written to the disk: " + strerror(error) + ". Check the disk.");
}

// safetensors: uint64 length of a JSON header, the header (name: dtype, shape, data_offsets), then the data.
struct SaveTensor {
    std::string name, dtype;
    std::vector<size_t> shape;
    size_t bytes;
    std::function<void(char* to, size_t offset, size_t count)> read;  // gives bytes of the data, from first to last
};

struct FileRecord {
    std::string name;
    uint64_t bytes;
    std::string hash;
};

using Fields = std::vector<std::pair<std::string, std::string>>;

std::string json_text(const Fields& fields) {
    std::string json = "{";
    for (auto& [key, value] : fields) json += (json.size() > 1 ? ", " : "") + json_text(key) + ": " + json_text(value);
    return json + "}";
}

FileRecord save_safetensors(const std::string& path, const std::vector<SaveTensor>& tensors,
                            const Fields& metadata = {}) {
    std::string header = "{";
    size_t at = 0;
    if (!metadata.empty()) header += "\"__metadata__\":" + json_text(metadata);
    for (const SaveTensor& t : tensors) {
        header += header.size() > 1 ? "," : "";
        header += format("\"%s\":{\"dtype\":\"%s\",\"shape\":[", t.name.c_str(), t.dtype.c_str());
        for (size_t i = 0; i < t.shape.size(); i++) header += format(i ? ",%zu" : "%zu", t.shape[i]);
        header += format("],\"data_offsets\":[%zu,%zu]}", at, at + t.bytes);
        at += t.bytes;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    OutFile out(path);
    uint64_t length = header.size();
    header.insert(0, reinterpret_cast<const char*>(&length), sizeof(length));
    out.write(header);
    std::vector<char> data;
    for (const SaveTensor& t : tensors)
        for (size_t done = 0; done < t.bytes; done += data.size()) {
            data.resize(std::min(t.bytes - done, HOST_CHUNK * sizeof(float)));
            t.read(data.data(), done, data.size());
            out.write(data.data(), data.size());
        }
    out.commit();
    return {path.substr(path.rfind('/') + 1), out.hash.total, out.hash.text()};
}

struct Safetensors {
    struct Entry {
        std::string dtype;
        std::vector<size_t> shape;
        size_t begin, bytes, elements;
    };
    std::string path;
    FILE* f = nullptr;
    std::map<std::string, Entry> entries;
    Json metadata;

    explicit Safetensors(const std::string& path) : path(path), f(open_regular(path)) {
        try {
            read_header();
        } catch (const Error& e) {
            fclose(f);
            throw Error(path + ": no safetensors file: " + e.what() + ". Give a file that --export wrote.");
        }
    }
    ~Safetensors() { fclose(f); }
    Safetensors(const Safetensors&) = delete;

    void read_header() {
        struct stat info;
        if (fstat(fileno(f), &info)) throw Error(strerror(errno));
        const uint64_t size = info.st_size;
        uint64_t length = 0;
        if (size < 8 || fread(&length, 8, 1, f) != 1) throw Error("shorter than its header");
        if (length > size - 8 || length > (16u << 20)) throw Error("its header's length is wrong");
        std::string header(length, 0);
        if (length && fread(&header[0], length, 1, f) != 1) throw Error("shorter than its header");
        const uint64_t room = size - 8 - length;
        std::map<size_t, size_t> ranges;  // of the data, begin to end
        for (auto& [name, j] : parse_json(header).fields) {
            if (name == "__metadata__") {
                metadata = j;
                continue;
            }
            const Json *dtype = j.find("dtype"), *shape = j.find("shape"), *offsets = j.find("data_offsets");
            if (!dtype || !shape || !offsets || offsets->items.size() != 2)
                throw Error("its header lacks dtype, shape or data_offsets of " + name);
            Entry e;
            e.dtype = dtype->string;
            e.elements = 1;
            const int width = e.dtype == "F64" || e.dtype == "I64" ? 8 : e.dtype == "BF16" || e.dtype == "F16" ? 2 : 4;
            for (const Json& n : shape->items) {
                if (!(n.value >= 0 && n.value <= 1e12 && n.value == floor(n.value)))
                    throw Error("a shape of " + name + " is wrong");
                e.shape.push_back(size_t(n.value));
                if (n.value > 0 && e.elements > room / size_t(n.value)) throw Error(name + " is larger than the file");
                e.elements *= size_t(n.value);
            }
            const double begin = offsets->items[0].value, end = offsets->items[1].value;
            if (!(begin >= 0 && begin <= end && end <= double(room)))
                throw Error("the data of " + name + " lies outside the file; it was cut short");
            e.begin = 8 + length + size_t(begin);
            e.bytes = size_t(end) - size_t(begin);
            if (e.bytes != e.elements * width)
                throw Error("the data of " + name + " does not have the size of its shape");
            if (!entries.emplace(name, e).second) throw Error("its header has " + name + " twice");
            if (e.bytes && !ranges.emplace(e.begin, e.begin + e.bytes).second)
                throw Error("the data of " + name + " is also another tensor's");
        }
        size_t at = 8 + length;
        for (auto& [begin, end] : ranges) {
            if (begin != at)
                throw Error(begin < at ? "data of two tensors overlap" : "some of its data is no tensor's");
            at = end;
        }
        if (at != size) throw Error("bytes follow its last tensor");
    }

    void read(const Entry& e, void* data, size_t offset, size_t bytes) {
        if (fseeko(f, e.begin + offset, SEEK_SET) || fread(data, 1, bytes, f) != bytes)
            throw Error(path + ": cannot be read to its end: it was cut short, or the disk fails. Write it again.");
    }
    // `count` elements from `first` on, as float, of a tensor that is F32, BF16 or F16
    std::vector<float> floats(const std::string& name, size_t first, size_t count) {
        const Entry& e = entries.at(name);
        std::vector<float> values(count);
        if (e.dtype == "F32") {
            read(e, values.data(), first * 4, count * 4);
        } else {
            std::vector<uint16_t> raw(count);
            read(e, raw.data(), first * 2, count * 2);
            for (size_t i = 0; i < raw.size(); i++) {
                const uint32_t bits = uint32_t(raw[i]) << 16;
                if (e.dtype == "BF16")
                    memcpy(&values[i], &bits, 4);
                else
                    values[i] = half_value(raw[i]);
            }
        }
        return values;
    }
    // IEEE 754 binary16: sign, 5 bits of exponent biased by 15, 10 of mantissa
    static float half_value(uint16_t bits) {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float size = exponent == 31  ? mantissa ? NAN : INFINITY
                           : exponent == 0 ? ldexpf(float(mantissa), -24)
                                           : ldexpf(float(1024 + mantissa), exponent - 25);
        return bits >> 15 ? -size : size;
    }
};

std::string shape_text(const std::vector<size_t>& shape) {
    std::string s = "(";
    for (size_t i = 0; i < shape.size(); i++) s += format(i ? ", %zu" : "%zu", shape[i]);
    return s + ")";
}
std::vector<size_t> shape_of(const Tensor& t) {
    return t.cols ? std::vector<size_t>{t.rows, t.cols} : std::vector<size_t>{t.rows};
}

// The files with the weights that a path means: itself, or of a folder (a checkpoint's, or one as Hugging Face has
// them) model.safetensors, else those that model.safetensors.index.json names.
std::vector<std::string> weight_files(const std::string& path) {
    struct stat info;
    if (stat(path.c_str(), &info) || !S_ISDIR(info.st_mode)) return {path};
    const std::string whole = path + "/model.safetensors", index = whole + ".index.json";
    if (stat(whole.c_str(), &info) == 0) return {whole};
    if (stat(index.c_str(), &info))
        throw Error(path +
                    ": holds neither model.safetensors nor model.safetensors.index.json. Give a file, or a folder "
                    "with one of them.");
    std::set<std::string> files;
    try {
        const Json json = parse_json(read_file(index));
        const Json* map = json.find("weight_map");
        for (auto& [name, file] : map ? map->fields : json.fields) {
            if (!map || file.kind != Json::text || file.string.find('/') != std::string::npos || file.string == ".." ||
                file.string == "." || file.string.empty())
                throw Error("its weight_map is missing or broken");
            files.insert(path + "/" + file.string);
        }
        if (files.empty()) throw Error("it names no files");
    } catch (const Error& e) {
        throw Error(index + ": " + e.what() + ". Fetch or write the folder again.");
    }
    return {files.begin(), files.end()};
}

// What a file of weights says of its model, and state.json too.
Fields model_fields(const Config& c) {
    return {{"backbone", BACKBONES[int(c.backbone)]},
            {"variant", VARIANTS[int(c.variant)]},
            {"norm", NORMS[c.layernorm]},
            {"dim", std::to_string(c.C)},
            {"layers", std::to_string(c.L)},
            {"heads", std::to_string(c.NH)},
            {"kv_heads", std::to_string(c.NKV)},
            {"hidden", std::to_string(c.F())},
            {"vocab_size", std::to_string(c.V)},
            {"rope_theta", format("%.9g", c.rope_theta)},
            {"norm_eps", format("%.9g", c.norm_eps)},
            {"seq_len", std::to_string(c.T)},
            {"max_seq_len", std::to_string(c.max_T)}};
}

// Looks at what names and shapes of tensors do not tell, if the file has an export's metadata: another norm or number
// of heads is refused, another rope_theta or norm_eps, which one may want to change, is told.
void check_metadata(const Safetensors& file, const Config& c) {
    const Json* text = file.metadata.find("config");
    Json config;
    try {
        if (text) config = parse_json(text->string);
    } catch (const Error&) {  // another program's
    }
    for (auto& [key, value] : model_fields(c)) {
        const Json* there = config.find(key);
        const bool number = key == "rope_theta" || key == "norm_eps";
        if (!there || !(number || key == "heads" || key == "norm") || (key == "rope_theta" && !c.gated())) continue;
        const std::string& other = there->string;
        if (number ? strtof(other.c_str(), nullptr) == strtof(value.c_str(), nullptr) : other == value) continue;
        const std::string message = file.path + ": its model has " + key + " " + other + ", this one " + value + ".";
        if (!number) throw Error(message + " Give --" + key + " " + other + ".");
        if (ranks.rank == 0) warn(message);
    }
}

// Weights from safetensors with the paper's names. All must be there, in the model's shapes, and nothing else; all are
// looked at before the first is taken.
void import_weights(Model& m, const std::string& path) {
    std::vector<std::unique_ptr<Safetensors>> files;
    std::map<std::string, Safetensors*> where;
    for (const std::string& file : weight_files(path)) {
        files.emplace_back(new Safetensors(file));
        for (auto& [name, entry] : files.back()->entries)
            if (!where.emplace(name, files.back().get()).second)
                throw Error(file + ": holds " + name + ", which another file of the folder has too. Write it again.");
        check_metadata(*files.back(), m.c);
    }
    if (where.count("model.embed_tokens.weight") || where.count("transformer.wte.weight"))
        throw Error(path + ": has Hugging Face's names of tensors. Convert it first: dev/hf/import.py.");
    std::set<std::string> known;
    for (const Tensor& t : m.table.tensors) {
        known.insert(t.name);
        if (!where.count(t.name))
            throw Error(path + ": lacks the tensor " + t.name + ". Check --backbone, --variant and --layers.");
        const Safetensors& file = *where[t.name];
        const Safetensors::Entry& entry = file.entries.at(t.name);
        if (entry.shape != shape_of(t))
            throw Error(file.path + ": " + t.name + " is " + shape_text(entry.shape) + " there, " +
                        shape_text(shape_of(t)) + " in this model. Check the model's flags.");
        if (entry.dtype != "F32" && entry.dtype != "BF16" && entry.dtype != "F16")
            throw Error(file.path + ": " + t.name + " is " + entry.dtype + ". Only F32, BF16 and F16 can be read.");
    }
    for (auto& [name, file] : where)
        if (!known.count(name))
            throw Error(file->path + ": holds " + name + ", which this model lacks. Check --variant and --layers.");
    bool told = false;
    fill_parameters(m, [&](std::vector<float>& values, const Tensor& t, size_t, size_t first, size_t count) {
        const size_t there = first < t.size() ? std::min(count, t.size() - first) : 0;
        values = where[t.name]->floats(t.name, first, there);
        const auto finite = [](float x) { return std::isfinite(x); };
        if (ranks.rank == 0 && !told && !std::all_of(values.begin(), values.end(), finite)) {
            warn(where[t.name]->path + ": " + t.name + " holds values that are not finite. Take other weights.");
            told = true;
        }
        values.resize(count, 0.0f);
    });
}

// The weights (the masters, if there are any), with the paper's names: as float32, or `half` rounded to bf16. All ranks
// call, the first writes.
void export_weights(const Model& m, const std::string& path, bool half) {
    const bool cut = m.master ? m.storage.cut_state() : m.storage.cut_weights();
    const Flat flat = m.master ? Flat(m.master) : Flat(m.params);
    int held = -1;
    std::vector<char> unit;
    settle(m);
    auto get = [&](int u) {
        if (u != held) unit = get_unit(m, flat, cut, u, ranks.rank == 0), held = u;
    };
    if (ranks.rank > 0) {
        for (int u = 0; cut && u < m.units(); u++) get(u);
        return;
    }
    std::vector<SaveTensor> tensors;
    const size_t width = half ? sizeof(__nv_bfloat16) : sizeof(float);
    for (const Tensor& t : m.table.tensors)
        tensors.push_back({t.name, half ? "BF16" : "F32", shape_of(t), t.size() * width,
                           [&, at = t.offset](char* to, size_t offset, size_t count) {
                               const int u = m.table.unit_of(at);
                               get(u);
                               const size_t first = at - m.table.units[u].begin + offset / width;
                               for (size_t i = 0; i < count / width; i++) {
                                   float x;
                                   __nv_bfloat16 y;
                                   if (flat.half) {
                                       memcpy(&y, &unit[(first + i) * sizeof(y)], sizeof(y));
                                       x = float(y);
                                   } else {
                                       memcpy(&x, &unit[(first + i) * sizeof(x)], sizeof(x));
                                       y = __float2bfloat16_rn(x);
                                   }
                                   half ? memcpy(to + i * width, &y, width) : memcpy(to + i * width, &x, width);
                               }
                           }});
    // "format" is what Hugging Face's readers look for
    save_safetensors(path, tensors, {{"format", "pt"}, {"config", json_text(model_fields(m.c))}});
}

// =====================================================================================================================
// Checkpoint: a directory OUT/step_NNNNNNNN. Of n ranks each writes its shard:
//   model.safetensors, or model-0000I-of-0000K.safetensors and an index of them as Hugging Face has it: the weights as
//                                trained, with the paper's names, whole tensors; units are dealt to the ranks
//   optimizer_rankR.safetensors  the shard of the moments and, in bf16, the masters
//   state.json                   step, seed, configuration, the loader's position, counts, the tokenizer's path and
//                                XXH64 if the run had one; size and XXH64 of every other file, and of itself. Random
//                                numbers are functions of seed and step: there is no other state.
// It is the same at every ZeRO level. Files are written to OUT/.step_NNNNNNNN and fsynced; when every rank has told the
// first that its own are there, that one writes state.json and renames: what has the name is complete. What cannot be
// written is given up with a warning, training goes on, and the checkpoints before it stay.

// What a checkpoint and a run must share.
Fields config_fields(const Config& c, const Storage& s) {
    Fields fields = model_fields(c);
    const Fields storage = {{"precision", PRECISION},
                            {"gradients", s.half_gradients ? "bf16" : "fp32"},
                            {"moments", s.half_moments ? "bf16" : "fp32"},
                            {"master", s.no_master ? "none" : "fp32"}};
    fields.insert(fields.end(), storage.begin(), storage.end());
    return fields;
}

struct TrainState {
    int64_t step = 0;  // done
    uint64_t seed = 0;
    LoaderState loader = {0, 0};
    int64_t updates = 0, skipped = 0;  // of the steps
    uint64_t windows = 0;              // of the data; 0: not known
};

std::string checkpoint_name(int64_t step) { return format("step_%08lld", (long long)step); }

// Steps of the complete checkpoints in a directory, ascending.
std::vector<int64_t> list_checkpoints(const std::string& out) {
    std::vector<int64_t> steps;
    DIR* d = opendir(out.c_str());
    if (!d) return steps;
    while (dirent* e = readdir(d)) {
        char* end;
        if (strncmp(e->d_name, "step_", 5)) continue;
        long long step = strtoll(e->d_name + 5, &end, 10);
        if (!*end && checkpoint_name(step) == e->d_name) steps.push_back(step);
    }
    closedir(d);
    std::sort(steps.begin(), steps.end());
    return steps;
}

void remove_dir(const std::string& path) {  // a checkpoint's: files only; of a link the link
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 && errno != ENOENT) unlink(path.c_str());
    if (DIR* d = fd < 0 ? nullptr : fdopendir(fd)) {
        while (dirent* e = readdir(d))
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink((path + "/" + e->d_name).c_str());
        closedir(d);
        rmdir(path.c_str());
    }
}

// A checkpoint loses its name first: cut off in the middle, the removal leaves nothing that looks like one.
void remove_checkpoint(const std::string& out, int64_t step) {
    const std::string name = checkpoint_name(step), old = out + "/.old_" + name;
    remove_dir(old);
    if (rename((out + "/" + name).c_str(), old.c_str()) == 0) remove_dir(old);
}

// What an interrupted save or removal has left.
void remove_leftovers(const std::string& out) {
    std::vector<std::string> found;
    if (DIR* d = opendir(out.c_str())) {
        while (dirent* e = readdir(d))
            if (!strncmp(e->d_name, ".step_", 6) || !strncmp(e->d_name, ".old_step_", 10))
                found.push_back(out + "/" + e->d_name);
        closedir(d);
    }
    for (const std::string& path : found) remove_dir(path);
}

std::vector<std::pair<std::string, Flat>> optimizer_state(const Model& m) {
    std::vector<std::pair<std::string, Flat>> parts = {{"m", m.m}, {"v", m.v}};
    if (m.master) parts.push_back({"master", m.master});
    return parts;
}
std::string optimizer_file(int rank) { return format("optimizer_rank%d.safetensors", rank); }

// The files of weights of a checkpoint: as many as ranks, if there are units enough.
int model_files(const Model& m) { return std::min(ranks.size, m.units()); }
int model_file_of(const Model& m, int unit) { return int(int64_t(unit) * model_files(m) / m.units()); }
std::string model_file(const Model& m, int i) {
    return model_files(m) == 1 ? "model.safetensors" : format("model-%05d-of-%05d.safetensors", i + 1, model_files(m));
}

// Writes checkpoints, in the foreground or, from a copy in host memory, behind the training's back.
struct Saver {
    std::string out;
    int keep = 0;  // the newest that stay, 0: all
    bool background = false;
    std::string tokenizer;  // lines of state.json
    std::string failure;    // why the last save was given up, "" if it was not; the first rank's, after finish()

    // One file of this rank, by name.
    using Files = std::vector<std::pair<std::string, std::vector<SaveTensor>>>;
    std::thread writer;
    std::atomic<bool> written{false};  // this rank's own files are
    int64_t step = 0;                  // that is saved
    char* copy = nullptr;              // pinned, of copy_bytes
    size_t copy_bytes = 0;

    ~Saver() {
        if (writer.joinable()) writer.join();
        if (copy) cudaFreeHost(copy);
    }

    void finish() {
        if (!writer.joinable()) return;
        job.progress(WRITING, step);
        while (!written) usleep(1000);
        job.progress(WAITING, step);
        writer.join();
    }

    // All ranks call, between steps. Returns when the training may go on.
    void save(Model& m, const TrainState& state) {
        finish();
        step = state.step, written = false;
        job.progress(WRITING, step);
        settle(m);
        Files files = own_files(m);
        const std::string head = manifest_head(m, state) + tokenizer;
        const std::vector<std::string> index = weight_index(m);
        if (background && copy_all(files) && start_writer(files, head, index)) return;
        write_own(files);
        job.progress(WAITING, step);
        if (ranks.rank == 0) complete_all(head, index);
    }

private:
    // To the watch, who is at the first of these is behind those that are at the second.
    static constexpr const char *WRITING = "saving", *WAITING = "waiting for all ranks' files";
    std::string report;                                // of this rank, for the first
    std::vector<std::pair<int, std::string>> reports;  // to the first, of saves that others have begun before it

    Files own_files(Model& m) {
        Files files;
        std::vector<SaveTensor> weights, state;
        const bool cut = m.storage.cut_weights();
        for (int u = 0; u < m.units(); u++) {
            std::shared_ptr<std::vector<char>> gathered;
            const bool mine = model_file_of(m, u) == ranks.rank;
            if (cut) gathered.reset(new std::vector<char>(get_unit(m, m.params, true, u, mine)));
            if (!mine) continue;
            const Unit& unit = m.table.units[u];
            for (size_t i = unit.tensor; i < unit.tensor + unit.tensors; i++) {
                const Tensor& t = m.table.tensors[i];
                auto read = [p = m.params + t.offset, gathered, skip = (t.offset - unit.begin) * sizeof(floatX)](
                                char* to, size_t offset, size_t count) {
                    if (gathered) return void(memcpy(to, gathered->data() + skip + offset, count));
                    const char* from = reinterpret_cast<const char*>(p) + offset;
                    CHECK(cudaMemcpy(to, from, count, cudaMemcpyDeviceToHost));
                };
                weights.push_back({t.name, DTYPE, shape_of(t), t.size() * sizeof(floatX), read});
            }
        }
        if (!weights.empty()) files.push_back({model_file(m, ranks.rank), weights});
        for (auto& [part, flat] : optimizer_state(m)) {
            // the shard's bytes from `offset` on: of all that is here, or of the pieces
            auto read = [&m, flat = flat](char* to, size_t offset, size_t count) {
                const size_t width = flat.width(), first = offset / width, end = first + count / width;
                for (int u = 0; u < m.units(); u++) {
                    const Piece p = m.piece(u);
                    const size_t begin = std::max(first, p.shard), stop = std::min(end, p.shard + p.size);
                    if (begin >= stop) continue;
                    const size_t at = m.storage.cut_state() ? begin : p.whole + begin - p.shard;
                    CHECK(cudaMemcpy(to + (begin - first) * width, flat.at(at).p, (stop - begin) * width,
                                     cudaMemcpyDeviceToHost));
                }
            };
            const size_t size = m.table.shard_size();
            state.push_back({part, flat.dtype(), {size}, size * flat.width(), read});
        }
        files.push_back({optimizer_file(ranks.rank), state});
        return files;
    }

    // The device's bytes to host memory, so that the device may go on. False: there is not enough of it.
    bool copy_all(Files& files) {
        size_t bytes = 0;
        for (auto& [name, tensors] : files)
            for (SaveTensor& t : tensors) bytes += t.bytes;
        if (bytes > copy_bytes) {
            if (copy) cudaFreeHost(copy);
            copy = nullptr, copy_bytes = 0;
            if (cudaMallocHost(&copy, bytes) != cudaSuccess) {
                cudaGetLastError();
                warn(format("--save-async: no %.1f GiB of host memory for a copy; saving in the foreground.",
                            bytes / 1073741824.0));
                return background = false;
            }
            copy_bytes = bytes;
        }
        char* at = copy;
        for (auto& [name, tensors] : files)
            for (SaveTensor& t : tensors) {
                for (size_t done = 0; done < t.bytes;) {
                    const size_t count = std::min(t.bytes - done, HOST_CHUNK * sizeof(float));
                    t.read(at + done, done, count);
                    done += count;
                    ticks++;
                }
                t.read = [from = at](char* to, size_t offset, size_t count) { memcpy(to, from + offset, count); };
                at += t.bytes;
            }
        return true;
    }

    // False: no thread can be started.
    bool start_writer(const Files& files, const std::string& head, const std::vector<std::string>& index) {
        try {
            writer = std::thread([this, files, head, index] {
                write_own(files);
                written = true;
                if (ranks.rank == 0) complete_all(head, index);
            });
        } catch (const std::system_error& e) {
            warn(std::string("--save-async: ") + e.what() + "; saving in the foreground.");
            return false;
        }
        return true;
    }

    static std::string manifest_head(const Model& m, const TrainState& s) {
        std::string json =
            format("{\n  \"step\": %lld,\n  \"seed\": %llu,\n  \"updates\": %lld,\n  \"skipped\": %lld,\n",
                   (long long)s.step, (unsigned long long)s.seed, (long long)s.updates, (long long)s.skipped);
        json += format("  \"ranks\": %d,\n  \"loader\": {\"epoch\": %llu, \"window\": %llu, \"windows\": %llu},\n",
                       ranks.size, (unsigned long long)s.loader.epoch, (unsigned long long)s.loader.window,
                       (unsigned long long)s.windows);
        return json + "  \"config\": " + json_text(config_fields(m.c, m.storage)) + ",\n";
    }

    // Lines of Hugging Face's index; none with one file.
    static std::vector<std::string> weight_index(const Model& m) {
        std::vector<std::string> lines;
        if (ranks.rank > 0 || model_files(m) == 1) return lines;
        for (const Tensor& t : m.table.tensors)
            lines.push_back("\"" + t.name + "\": \"" + model_file(m, model_file_of(m, m.table.unit_of(t.offset))) +
                            "\"");
        return lines;
    }

    std::string unfinished() const { return out + "/." + checkpoint_name(step); }

    // Writes this rank's files and tells the first rank how that went, in lines: "saved STEP" and the files, or "failed
    // STEP" and why.
    void write_own(const Files& files) {
        const std::string dir = unfinished();
        report = format("saved %lld\n", (long long)step);
        try {
            if (mkdir(dir.c_str(), 0777) && errno != EEXIST)
                throw Error(dir + ": cannot be made: " + strerror(errno) + ". Give a place with room and rights.");
            for (auto& [file, tensors] : files) {
                const FileRecord r = save_safetensors(dir + "/" + file, tensors);
                report += format("%s %llu %s\n", r.name.c_str(), (unsigned long long)r.bytes, r.hash.c_str());
            }
        } catch (const std::exception& e) {
            report = format("failed %lld\n%s\n", (long long)step, reason(e).c_str());
        }
        if (ranks.rank > 0) job.report(report);
    }

    // The first rank waits for all and completes the checkpoint, or gives it up.
    void complete_all(const std::string& head, const std::vector<std::string>& index) {
        try {
            std::vector<FileRecord> records = gather_reports();
            complete(records, head, index);
            failure = "";
        } catch (const std::exception& e) {
            remove_dir(unfinished());
            failure = reason(e);
            warn(format("no checkpoint of step %lld: %s", (long long)step, failure.c_str()));
        }
    }

    // What all ranks have written; throws what one of them could not, once none writes any more.
    std::vector<FileRecord> gather_reports() {
        std::vector<FileRecord> records;
        std::string error;
        auto step_of = [](const std::string& text) { return strtoll(text.c_str() + text.find(' '), nullptr, 10); };
        auto take = [&](int rank, const std::string& text) {
            char word[16], name[256], hash[32];
            int used = 0, n;
            unsigned long long bytes;
            if (sscanf(text.c_str(), "%15s %*d\n%n", word, &used) != 1) return;
            const char* p = text.c_str() + used;
            if (strcmp(word, "failed") == 0 && error.empty())
                error = (rank ? format("rank %d: ", rank) : "") + std::string(p, strcspn(p, "\n"));
            if (strcmp(word, "saved") == 0)
                for (; sscanf(p, "%255s %llu %31s\n%n", name, &bytes, hash, &n) == 3; p += n)
                    records.push_back({name, bytes, hash});
        };
        take(0, report);
        for (int missing = ranks.size - 1;;) {
            std::vector<std::pair<int, std::string>> later;
            for (auto& [rank, text] : reports) {
                if (step_of(text) == step) take(rank, text), missing--;
                if (step_of(text) > step) later.push_back({rank, text});
            }
            reports = later;
            if (missing == 0) break;
            for (auto& r : job.take_reports(0.5)) reports.push_back(r);  // the watch sees who does not come
        }
        if (!error.empty()) throw Error(error);
        return records;
    }

    void complete(std::vector<FileRecord>& records, const std::string& head, const std::vector<std::string>& index) {
        const std::string dir = unfinished();
        if (!index.empty()) {
            std::string json = "{\"metadata\": {}, \"weight_map\": {\n";
            for (const std::string& line : index) json += line + (&line == &index.back() ? "\n" : ",\n");
            OutFile file(dir + "/model.safetensors.index.json");
            file.write(json + "}}\n");
            file.commit();
            records.push_back({"model.safetensors.index.json", file.hash.total, file.hash.text()});
        }
        std::string json = head + "  \"files\": {";
        std::set<std::string> ours = {"state.json"};
        for (const FileRecord& r : records) {
            json += json.back() == '{' ? "\n" : ",\n";
            json += format("    \"%s\": {\"bytes\": %llu, \"xxh64\": \"%s\"}", r.name.c_str(),
                           (unsigned long long)r.bytes, r.hash.c_str());
            ours.insert(r.name);
        }
        json += "},\n";
        Hash hash;
        hash.add(json.data(), json.size());
        OutFile state(dir + "/state.json");
        state.write(json + "  \"checksum\": \"" + hash.text() + "\"\n}\n");
        state.commit();
        std::vector<std::string> foreign;  // of an earlier try, by other ranks
        if (DIR* d = opendir(dir.c_str())) {
            while (dirent* e = readdir(d))
                if (e->d_name[0] != '.' && !ours.count(e->d_name)) foreign.push_back(dir + "/" + e->d_name);
            closedir(d);
        }
        for (const std::string& path : foreign) unlink(path.c_str());
        fsync_dir(dir);
        const std::string final_dir = out + "/" + checkpoint_name(step);
        remove_checkpoint(out, step);  // of another run's, else this step would not have come again
        if (rename(dir.c_str(), final_dir.c_str()))
            throw Error(final_dir + ": cannot be made: " + strerror(errno) + ". Check --out.");
        fsync_dir(out);
        const std::vector<int64_t> steps = list_checkpoints(out);
        for (size_t i = 0; keep > 0 && i + keep < steps.size(); i++) remove_checkpoint(out, steps[i]);
    }
};

// The hash of a tokenizer's file; that of the bytes has none.
std::string tokenizer_hash(const std::string& path) {
    Hash hash;
    const std::string text = path == "bytes" ? "" : read_file(path);
    hash.add(text.data(), text.size());
    return hash.text();
}

// What state.json says of the tokenizer that --tokenizer names; "" of none.
std::string tokenizer_lines(const std::string& tokenizer) {
    if (tokenizer.empty()) return "";
    const std::unique_ptr<char, decltype(&::free)> path(realpath(tokenizer.c_str(), nullptr), &::free);
    const std::string name = tokenizer == "bytes" || !path ? tokenizer : path.get();
    return "  \"tokenizer\": " + json_text(name) + ",\n  \"tokenizer_xxh64\": \"" + tokenizer_hash(tokenizer) + "\",\n";
}

struct Manifest {
    TrainState state;
    int ranks = 0;
    Json json;
    std::vector<FileRecord> files;
};

Manifest read_manifest(const std::string& dir) {
    const std::string path = dir + "/state.json", text = read_file(path);
    Manifest m;
    try {
        const size_t end = text.rfind("  \"checksum\"");
        Hash hash;
        hash.add(text.data(), std::min(end, text.size()));
        m.json = parse_json(text);
        const Json *checksum = m.json.find("checksum"), *files = m.json.find("files");
        if (end == std::string::npos || !checksum || checksum->string != hash.text())
            throw Error("its checksum is wrong, it was damaged");
        auto number = [](const Json* in, const char* key) {
            const Json* n = in ? in->find(key) : nullptr;
            if (!n || n->kind != Json::number || n->string.find_first_not_of("0123456789") != std::string::npos)
                throw Error(std::string("lacks the whole number ") + key);
            return strtoull(n->string.c_str(), nullptr, 10);
        };
        m.state.step = int64_t(number(&m.json, "step"));
        m.state.seed = number(&m.json, "seed");
        const Json* loader = m.json.find("loader");
        m.state.loader = {number(loader, "epoch"), number(loader, "window")};
        if (loader->find("windows")) m.state.windows = number(loader, "windows");
        m.state.updates = int64_t(number(&m.json, "updates")), m.state.skipped = int64_t(number(&m.json, "skipped"));
        const uint64_t ranks = number(&m.json, "ranks"), most = uint64_t(1) << 50;
        if (ranks < 1 || ranks > 1 << 20 || !files) throw Error("lacks ranks or files");
        if (std::max({uint64_t(m.state.step), uint64_t(m.state.updates), uint64_t(m.state.skipped)}) > most)
            throw Error("counts more steps than a run can have");
        m.ranks = int(ranks);
        for (auto& [name, f] : files->fields) {
            const Json* hash = f.find("xxh64");
            if (!hash || name.find('/') != std::string::npos) throw Error("has a bad entry for " + name);
            m.files.push_back({name, number(&f, "bytes"), hash->string});
        }
    } catch (const Error& e) {
        throw Error(path + ": " + e.what() + ".");
    }
    return m;
}

// Reads this rank's share of a checkpoint's files, or of those with weights, to see that they are as they were written.
// Returns its step.
int64_t verify_checkpoint(const std::string& dir, bool weights_only = false) {
    const Manifest m = read_manifest(dir);
    std::vector<char> data(HOST_CHUNK);
    for (size_t i = ranks.rank; i < m.files.size(); i += ranks.size) {
        if (weights_only && m.files[i].name.compare(0, 5, "model")) continue;
        const std::string path = dir + "/" + m.files[i].name;
        const std::unique_ptr<FILE, decltype(&fclose)> f(open_regular(path), &fclose);
        struct stat info;
        if (fstat(fileno(f.get()), &info) || uint64_t(info.st_size) != m.files[i].bytes)
            throw Error(path + format(": has %llu bytes, %llu were written.", (unsigned long long)info.st_size,
                                      (unsigned long long)m.files[i].bytes));
        Hash hash;
        for (size_t n; (n = fread(data.data(), 1, data.size(), f.get())) > 0; ticks++) hash.add(data.data(), n);
        if (ferror(f.get())) throw Error(path + ": cannot be read to its end: " + strerror(errno) + ".");
        if (hash.text() != m.files[i].hash) throw Error(path + ": its checksum is wrong, it was damaged.");
    }
    return m.state.step;
}

// The checkpoint that a path means, itself or of a run's folder the newest, whose weights are as they were written.
std::string find_weights(const std::string& path) {
    if (access((path + "/state.json").c_str(), F_OK) == 0) {
        try {
            verify_checkpoint(path, true);
        } catch (const Error& e) {
            throw Error(std::string(e.what()) + " Give another checkpoint.");
        }
        return path;
    }
    std::vector<int64_t> steps = list_checkpoints(path);
    if (steps.empty())
        throw Error(path + ": is no checkpoint and holds none. Give a folder that --save-every wrote, or --out's.");
    std::string trouble;
    for (; !steps.empty(); steps.pop_back()) {
        std::string dir = path + "/" + checkpoint_name(steps.back());
        try {
            verify_checkpoint(dir, true);
            if (!trouble.empty()) warn(trouble + " Taking " + dir + ".");
            return dir;
        } catch (const Error& e) {
            if (trouble.empty()) trouble = e.what();
        }
    }
    throw Error(trouble + " No other checkpoint in " + path + " is sound. Give another folder.");
}

// The configuration that a checkpoint was written with; its precision may be another than this build's.
Config config_of(const Manifest& manifest, const std::string& dir) {
    const Json* config = manifest.json.find("config");
    auto text = [&](const char* key) {
        const Json* there = config ? config->find(key) : nullptr;
        if (!there) throw Error(std::string("lacks ") + key + ". Take another checkpoint.");
        return there->string;
    };
    auto integer = [&](const char* key) {
        return int(std::max(-1ll, std::min<long long>(strtoll(text(key).c_str(), nullptr, 10), INT_MAX)));
    };
    auto choice = [&](const char* key, const Words& words) {
        for (size_t i = 0; i < words.size(); i++)
            if (text(key) == words[i]) return int(i);
        throw Error(std::string("has an unknown ") + key + ", " + text(key) + ". Take the build that wrote it.");
    };
    Config c;
    try {
        c.backbone = Backbone(choice("backbone", BACKBONES));
        c.variant = Variant(choice("variant", VARIANTS));
        c.layernorm = choice("norm", NORMS);
        c.C = integer("dim"), c.L = integer("layers"), c.NH = integer("heads"), c.NKV = integer("kv_heads");
        c.hidden = integer("hidden"), c.V = integer("vocab_size");
        c.T = integer("seq_len"), c.max_T = integer("max_seq_len");
        c.rope_theta = strtof(text("rope_theta").c_str(), nullptr);
        c.norm_eps = strtof(text("norm_eps").c_str(), nullptr);
        finish(c);
        const Fields known = config_fields(c, Storage());
        for (auto& [key, value] : config->fields) {
            auto is_key = [&, &key = key](auto& field) { return field.first == key; };
            if (std::none_of(known.begin(), known.end(), is_key))
                throw Error("has " + key + ", which this build does not know. Take the one that wrote it.");
        }
    } catch (const Error& e) {
        throw Error(dir + "/state.json: " + e.what());
    }
    return c;
}

// Takes a checkpoint of any number of ranks.
TrainState load_checkpoint(Model& m, const std::string& dir) {
    const Manifest manifest = read_manifest(dir);
    const Json* config = manifest.json.find("config");
    config_of(manifest, dir);  // refuses what this build does not know
    for (auto& [key, value] : config_fields(m.c, m.storage)) {
        const Json* there = config ? config->find(key) : nullptr;
        if (!there || there->string != value)
            throw Error(dir + "/state.json: the checkpoint has " + key + " " + (there ? there->string : "unknown") +
                        ", this run " + value + ". Resume with the flags of the first run.");
    }
    import_weights(m, dir);

    // Pieces of n ranks from those of as many as there were: within a unit, positions mean the same.
    const TensorTable old = build_table(m.c, manifest.ranks);
    std::vector<char> values;
    for (int r = 0; r < old.ranks; r++) {
        std::unique_ptr<Safetensors> file;
        for (auto& [part, flat] : optimizer_state(m)) {
            for (int u = 0; u < m.units(); u++) {
                const Unit &unit = m.table.units[u], &old_unit = old.units[u];
                const Piece own = m.piece(u), theirs = old.piece(u, r);
                const bool cut = m.storage.cut_state();
                const size_t from = cut ? own.whole - unit.begin : 0, to = from + (cut ? own.size : unit.size);
                const size_t begin = std::max(from, theirs.whole - old_unit.begin);
                const size_t end = std::min(to, theirs.whole - old_unit.begin + theirs.size);
                if (begin >= end) continue;
                if (!file) file.reset(new Safetensors(dir + "/" + optimizer_file(r)));
                auto found = file->entries.find(part);
                if (found == file->entries.end() || found->second.elements != old.shard_size() ||
                    found->second.dtype != flat.dtype())
                    throw Error(file->path + ": lacks the tensor " + part +
                                " or has it in another shape. Delete this checkpoint to resume from the one before.");
                const size_t at = theirs.shard + begin - (theirs.whole - old_unit.begin), width = flat.width();
                values.resize((end - begin) * width);
                file->read(found->second, values.data(), at * width, values.size());
                CHECK(cudaMemcpy(flat.at(cut ? own.shard + begin - from : unit.begin + begin).p, values.data(),
                                 values.size(), cudaMemcpyHostToDevice));
                ticks++;
            }
        }
    }
    Numbers n = {};
    n.updates = manifest.state.updates, n.skipped = manifest.state.skipped;
    CHECK(cudaMemcpy(m.numbers, &n, sizeof(n), cudaMemcpyHostToDevice));
    return manifest.state;
}

// =====================================================================================================================
// Generation: the text that a model writes on.

// How the next token is drawn: the logits are divided by the temperature (0: the likeliest is taken), the top_k
// likeliest tokens stay (0: all), of them the fewest likeliest that have top_p of their probability together.
struct Sampling {
    float temperature = 0.8f;
    int top_k = 50;
    float top_p = 1.0f;
};

struct Candidate {
    int id;
    float logit;
    double p;
};

// The tokens that may come next, with probabilities that sum to 1, of equal logits the lower id first; logits (V),
// finite.
std::vector<Candidate> candidates(const float* logits, int V, const Sampling& s) {
    auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    };
    std::vector<Candidate> all(V);
    for (int v = 0; v < V; v++) all[v] = {v, logits[v], 1.0};
    if (s.temperature == 0.0f) return {*std::min_element(all.begin(), all.end(), likelier)};
    if (s.top_k > 0 && s.top_k < V) {
        std::partial_sort(all.begin(), all.begin() + s.top_k, all.end(), likelier);
        all.resize(s.top_k);
    }
    const double top = std::min_element(all.begin(), all.end(), likelier)->logit;
    double sum = 0.0, mass = 0.0;
    for (Candidate& c : all) sum += c.p = exp((c.logit - top) / s.temperature);
    for (Candidate& c : all) c.p /= sum;
    if (s.top_p >= 1.0f) return all;
    // those below this have less than 1 - top_p together, so they are not needed: few are left to sort
    const double least = (1.0 - s.top_p) / double(all.size());
    all.erase(std::partition(all.begin(), all.end(), [&](const Candidate& c) { return c.p >= least; }), all.end());
    std::sort(all.begin(), all.end(), likelier);
    size_t n = 0;
    while (n < all.size() && mass < s.top_p) mass += all[n++].p;
    all.resize(n);
    for (Candidate& c : all) c.p /= mass;
    return all;
}

// The one where the sum of the probabilities passes u, 0 < u < 1.
int draw(const std::vector<Candidate>& all, double u) {
    for (const Candidate& c : all)
        if ((u -= c.p) <= 0.0) return c.id;
    return all.back().id;
}

// Runs T tokens of each of B sequences, tokens (B,T), behind those in the cache, if there is one.
void forward_tokens(Model& m, const int* tokens, int B, int T) {
    CHECK(cudaMemcpyAsync(m.tokens, tokens, size_t(B) * T * sizeof(int), cudaMemcpyHostToDevice, m.stream));
    forward(m, B, T);
}

// Logits (rows,V) of `rows` rows of m.normed from row0 on.
std::vector<float> get_logits(Model& m, size_t row0, int rows) {
    const size_t V = m.c.V, Vp = m.c.Vp();
    std::vector<float> logits(rows * V);
    std::vector<floatX> raw(std::min(rows, m.logit_rows) * Vp);
    for (int done = 0; done < rows; done += m.logit_rows) {
        const int count = std::min(rows - done, m.logit_rows);
        head_forward(m, row0 + done, count);
        CHECK(cudaMemcpyAsync(raw.data(), m.logits, count * Vp * sizeof(floatX), cudaMemcpyDeviceToHost, m.stream));
        CHECK(cudaStreamSynchronize(m.stream));
        for (int r = 0; r < count; r++) std::copy_n(&raw[r * Vp], V, &logits[(done + r) * V]);
    }
    return logits;
}
bool all_finite(const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
}

// Draws n tokens below `vocabulary` after the prompt's, without a cache: every token runs the last T again. For short
// samples while training, which keeps no memory for a cache. Token i is drawn with random number i of stream 1.
std::vector<int> sample(Model& m, std::vector<int> tokens, int n, int vocabulary, const Sampling& s, uint64_t seed) {
    const size_t prompt = tokens.size();
    for (int i = 0; i < n; i++) {
        ticks++;
        const int T = int(std::min<size_t>(tokens.size(), m.c.T));
        forward_tokens(m, &tokens[tokens.size() - T], 1, T);
        const std::vector<float> logits = get_logits(m, T - 1, 1);
        if (!all_finite(logits)) break;  // no reason to end a training
        tokens.push_back(draw(candidates(logits.data(), vocabulary, s), random_uniform(seed, 1, i)));
    }
    return std::vector<int>(tokens.begin() + prompt, tokens.end());
}

// Writes m.cache.sequences texts on from one prompt, n tokens each or up to and with `eos`: the prompt in one forward,
// then a token of each at a time. Calls got(sequence, token) for each token as it comes. Sequence b draws its token i
// with random number i of stream 1 + b. The cache has room for all but the last token.
template <typename F>
void generate(Model& m, const std::vector<int>& prompt, int n, int vocabulary, const Sampling& s, uint64_t seed,
              int eos, F got) {
    const int B = m.cache.sequences, P = int(prompt.size());
    std::vector<int> last(B, eos);
    std::vector<bool> ended(B);
    m.cache.past = 0;
    forward_tokens(m, prompt.data(), 1, P);
    std::vector<float> logits = get_logits(m, P - 1, 1);
    m.cache.past = P;
    for (int i = 0;; i++) {
        if (!all_finite(logits))
            throw Error("generate: the model's logits are not finite. Take an earlier checkpoint.");
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;  // it goes on as ballast
            const float* row = &logits[i > 0 ? size_t(b) * m.c.V : 0];
            last[b] = draw(candidates(row, vocabulary, s), random_uniform(seed, 1 + b, i));
            ended[b] = last[b] == eos;
            got(b, last[b]);
        }
        if (i + 1 >= n || std::all_of(ended.begin(), ended.end(), [](bool e) { return e; })) return;
        forward_tokens(m, last.data(), B, 1);
        logits = get_logits(m, 0, B);
        m.cache.past++;
    }
}

// =====================================================================================================================
// Evaluation: validation loss, and questions of multiple choice.

struct Validation {
    double nats = 0;  // sum of the losses of all targets
    uint64_t tokens = 0, bytes = 0;
};

// Over the first `windows` windows of the data, read one at a time, evaluated m.B at a time. Bytes: of the text that
// the targets stand for, of which BOS and EOS are none; with a tokenizer only.
Validation validation(Model& m, DataLoader& data, uint64_t windows, const Tokenizer* tokenizer) {
    const int T = m.c.T;
    Validation v;
    std::vector<int32_t> batch;
    for (uint64_t done = 0; done < windows;) {
        const int rows = int(std::min<uint64_t>(m.B, windows - done));
        batch.clear();
        for (int r = 0; r < rows; r++) {
            const int32_t* window = data.next();
            batch.insert(batch.end(), window, window + T + 1);
            for (int t = 1; tokenizer && t <= T; t++)
                v.bytes += tokenizer->text_bytes(window[t], window[t - 1] == tokenizer->bos());
        }
        v.nats += double(evaluate(m, batch.data(), rows, T)) * rows * T;
        v.tokens += uint64_t(rows) * T;
        done += rows;
    }
    return v;
}

// A question: which of several texts goes on behind a context.
struct Question {
    int label;  // of the right one
    std::vector<int> context;
    std::vector<std::vector<int>> choices;
};

// Questions from a file of dev/data/hellaswag.py, little-endian int32: 256 of header (magic 20261125, version 1, number
// of questions, vocabulary size, number of int32 that follow), then for each K, label, n0, n1 .. nK, the n0 ids of the
// context and the ids of the K choices. Ids are below V; a choice fits into T tokens.
std::vector<Question> read_questions(const std::string& path, int V, int T) {
    const std::string bytes = read_file(path);
    auto fail = [&](const std::string& what) {
        throw Error(path + ": " + what + ". Make it again (dev/data/hellaswag.py).");
    };
    std::vector<int32_t> all(bytes.size() / 4);
    if (!all.empty()) memcpy(all.data(), bytes.data(), all.size() * 4);
    if (all.empty() || all[0] != 20261125) fail("is no file of questions");
    if (all.size() < 256 || bytes.size() % 4) fail("was cut short");
    if (all[1] != 1) fail(format("has version %d, known is 1", all[1]));
    if (all[3] > V) fail(format("is for a vocabulary of %d, the model has %d", all[3], V));
    if (all[4] != int64_t(all.size()) - 256)
        fail(format("header promises %d numbers, the file holds %zu", all[4], all.size() - 256));
    if (all[2] < 1) fail(format("header promises %d questions", all[2]));
    size_t at = 256;
    std::vector<Question> questions;
    for (int i = 0; i < all[2]; i++) {
        const std::string name = format("question %d", i + 1);
        // n numbers from least to most
        auto take = [&](int64_t n, int least, int most, const char* what) {
            if (n > int64_t(all.size() - at)) fail(name + " is cut short");
            for (size_t j = at; j < at + n; j++)
                if (all[j] < least || all[j] > most)
                    fail(name + format(": %s %d is not in %d..%d", what, all[j], least, most));
            at += n;
            return std::vector<int>(all.begin() + (at - n), all.begin() + at);
        };
        Question q;
        const int K = take(1, 2, INT_MAX, "number of choices")[0];
        q.label = take(1, 0, K - 1, "label")[0];
        const std::vector<int> lengths = take(int64_t(K) + 1, 1, INT_MAX, "length");
        q.context = take(lengths[0], 0, V - 1, "id");
        for (int k = 1; k <= K; k++) {
            q.choices.push_back(take(lengths[k], 0, V - 1, "id"));
            if (lengths[k] > T)
                throw Error(path + ": " + name +
                            format(" has a choice of %d tokens, the context is %d. Raise --seq-len.", lengths[k], T));
        }
        questions.push_back(std::move(q));
    }
    if (at < all.size()) fail(format("%zu numbers follow the last question", all.size() - at));
    return questions;
}

// log p of each choice given its context, the sum over its tokens; one after another, as they stand in the questions. A
// context that does not fit into T is cut from the left. Texts of like length are run together, as many as the model
// has memory for, the shorter ones filled up behind their end, which what stands before does not see.
std::vector<double> log_likelihoods(Model& m, const std::vector<Question>& questions) {
    struct Text {
        const Question* q;
        const std::vector<int>* choice;
        size_t inputs;  // tokens that are run: all but the last
    };
    std::vector<Text> texts;
    for (const Question& q : questions)
        for (const std::vector<int>& choice : q.choices)
            texts.push_back({&q, &choice, std::min<size_t>(q.context.size() + choice.size() - 1, m.c.T)});
    std::vector<size_t> order(texts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return texts[a].inputs > texts[b].inputs; });
    std::vector<double> scores(texts.size());
    for (size_t done = 0, rows; done < order.size(); done += rows) {
        const size_t T = texts[order[done]].inputs;  // the longest of those that are left
        rows = std::min(order.size() - done, m.N() / T);
        std::vector<int32_t> windows(rows * (T + 1), 0);
        for (size_t r = 0; r < rows; r++) {
            const Text& text = texts[order[done + r]];
            const size_t kept = text.inputs + 1 - text.choice->size();  // of the context
            auto to = std::copy(text.q->context.end() - kept, text.q->context.end(), &windows[r * (T + 1)]);
            std::copy(text.choice->begin(), text.choice->end(), to);
        }
        evaluate(m, windows.data(), int(rows), int(T));
        const std::vector<float> losses = get_floats(Flat(m.losses), 0, rows * T);
        for (size_t r = 0; r < rows; r++) {
            const Text& text = texts[order[done + r]];
            for (size_t t = text.inputs - text.choice->size(); t < text.inputs; t++)
                scores[order[done + r]] -= losses[r * T + t];
        }
    }
    return scores;
}

// Share of the questions whose right choice has the highest score, of equal ones the first; length(choice) divides.
template <typename F>
double accuracy(const std::vector<Question>& questions, const std::vector<double>& scores, F length) {
    size_t at = 0, right = 0;
    for (const Question& q : questions) {
        std::vector<double> score;
        for (const std::vector<int>& choice : q.choices) score.push_back(scores[at++] / length(choice));
        right += std::max_element(score.begin(), score.end()) - score.begin() == q.label;
    }
    return double(right) / double(questions.size());
}

// =====================================================================================================================
// The run's log, OUT/log.csv: a row a step, losses at nine significant digits (exact for float32). Step 1 is the first
// update; its loss is that before the update. val_loss is empty where nothing was validated; note says `skipped` of a
// step without an update and `spike` of a loss far above those before it.

const char LOG_HEADER[] = "step,loss,lr,grad_norm,tokens_per_s,val_loss,note";

// Finds losses that stand out: above the running mean by 5 standard deviations and 3%. Means over about 50 steps.
struct Spikes {
    double mean = 0, variance = 0;
    int64_t seen = 0;
    bool add(float loss) {
        if (!std::isfinite(loss)) return false;
        const double weight = 1.0 / std::min<int64_t>(++seen, 50);
        const double limit = mean + std::max(5 * sqrt(variance), 0.03 * fabs(mean));
        const bool spike = seen > 20 && loss > limit;
        const double off = (spike ? limit : double(loss)) - mean;  // one spike does not hide the next
        mean += weight * off;
        variance = (1 - weight) * (variance + weight * off * off);
        return spike;
    }
};

// A table that grows by rows which begin with their step: begun anew or, after a resume at `step`, going on behind that
// step's row, as later ones will be made again. Returns the rows that stay.
std::string begin_rows(const std::string& path, const std::string& header, int64_t step) {
    std::string kept;
    if (access(path.c_str(), F_OK) == 0) {
        const std::string old = read_file(path);
        if ((step > 0 || !old.empty()) && old.compare(0, header.size() + 1, header + "\n"))
            throw Error(path + ": is no table of this version. Move it away: a new one begins.");
        size_t end = header.size();
        for (size_t at; step > 0 && (at = end + 1, end = old.find('\n', at)) != std::string::npos;) {
            if (strtoll(old.c_str() + at, nullptr, 10) > step) break;
            kept.append(old, at, end + 1 - at);
        }
    }
    OutFile out(path);
    out.write(header + "\n" + kept);
    out.commit();
    return kept;
}

struct Log {
    int fd = -1;
    std::string path, waiting;  // rows that the disk has not taken yet
    Spikes spikes;

    void open(const std::string& path_, int64_t step) {
        path = path_;
        const std::string kept = begin_rows(path, LOG_HEADER, step);
        for (size_t at = 0; at < kept.size(); at = kept.find('\n', at) + 1) {
            const size_t comma = kept.find(',', at);
            spikes.add(comma < kept.size() ? strtof(&kept[comma + 1], nullptr) : NAN);
        }
        fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
        if (fd < 0) throw Error(path + ": cannot be written: " + strerror(errno) + ". Check --out.");
    }
    void row(int64_t step, float loss, double lr, float grad_norm, double tokens_per_s, const float* val_loss,
             const char* note) {
        const bool waited = !waiting.empty();
        waiting += format("%lld,%.9g,%.12g,%.9g,%.6g,", (long long)step, loss, lr, grad_norm, tokens_per_s);
        if (val_loss) waiting += format("%.9g", *val_loss);
        waiting += std::string(",") + note + "\n";
        put();
        if (!waiting.empty() && !waited)  // a full disk does not end a training: the rows are kept and tried again
            warn(path + ": cannot be written: " + strerror(errno) + ". Make room; training goes on.");
    }
    void finish() {  // after the last row
        put();
        if (!waiting.empty())
            warn(path + ": ends too early, the disk does not take its last rows: " + strerror(errno) + ".");
    }
    void put() {
        for (ssize_t done; !waiting.empty() && (done = ::write(fd, waiting.data(), waiting.size())) > 0;)
            waiting.erase(0, done);
    }
    ~Log() {
        if (fd >= 0) close(fd);
    }
};

std::string duration(double seconds) {
    const int64_t s = llround(std::min(seconds, 1e18));
    return s >= 3600 ? format("%lldh%02dm", (long long)s / 3600, int(s / 60 % 60))
           : s >= 60 ? format("%dm%02ds", int(s / 60), int(s % 60))
                     : format("%ds", int(s));
}

// =====================================================================================================================
// Probe (--probe): what the paper's argument rests on, measured between steps on batches that stay the same. How large
// activations are, and how curved the loss is: the largest eigenvalue of its Hessian H over all parameters, beyond
// whose inverse (up to a factor that is the optimizer's) a learning rate is too large. Each iteration takes one product
// with H by central differences of the gradient g; v_1 is random, v_0 = 0:
//   H v = (g(w + e v) - g(w - e v)) / 2e,   b_k v_k+1 = H v_k - a_k v_k - b_k-1 v_k-1,   a_k = v_k.H v_k
// The v span what the power iteration's H^k v_1 span, and the largest eigenvalue of the tridiagonal matrix of a and b
// is the best estimate in there (Lanczos 1950), also where both ends of the spectrum are of one size, between which the
// plain iteration wavers. The weights come back bit by bit; gradients are what a step's begin overwrites.

const char ACTIVATIONS_HEADER[] = "step,layer,tensor,rms,max";
const char CURVATURE_HEADER[] = "step,loss,eigenvalue,error,iterations";

// Of x - minus (null: x), per CHUNK elements: sums[block] of squares, sums[blocks + block] the largest magnitude.
__global__ void scale_kernel(double* sums, const floatX* x, const floatX* minus, size_t size) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    double sum = 0.0;
    float most = 0.0f;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float value = float(x[i]) - (minus ? float(minus[i]) : 0.0f);
        sum += double(value) * value;
        most = fmaxf(most, fabsf(value));
    }
    sum = block_sum(sum);
    most = block_max(most);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum, sums[gridDim.x + blockIdx.x] = most;
}

// Per CHUNK elements: sums[block] of a b.
__global__ void dot_kernel(double* sums, const float* a, const float* b, size_t size) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    double sum = 0.0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += double(a[i]) * double(b[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// out[i] = s x[i] + t y[i], CHUNK elements a block; out may be x or y
__global__ void combine_kernel(float* out, float s, const float* x, float t, const float* y, size_t size) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) out[i] = s * x[i] + t * y[i];
}

// previous[i] = s g[i] - a v[i] - b previous[i], CHUNK elements a block
__global__ void lanczos_kernel(float* previous, const float* v, const float* g, float s, float a, float b,
                               size_t size) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) previous[i] = s * g[i] - a * v[i] - b * previous[i];
}

// uniform in [-1,1)
__global__ void random_direction_kernel(float* v, size_t size, unsigned key) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x)
        v[i] = float(rounding_bits(i, key)) * 0x1p-31f - 1.0f;
}

// The symmetric tridiagonal matrix with diagonal a (n) and b (n) beside it, b[n-1] being the next step's: eigenvalue
// number `index` in ascending order, by bisection over Sturm's count of those below.
double tridiagonal_eigenvalue(const std::vector<double>& a, const std::vector<double>& b, size_t index) {
    double bound = 0.0;
    for (size_t i = 0; i < a.size(); i++) bound = std::max(bound, fabs(a[i]) + b[i] + (i ? b[i - 1] : 0.0));
    double low = -bound, high = bound;
    for (int halving = 0; halving < 60; halving++) {
        const double middle = 0.5 * (low + high);
        size_t below = 0;
        double d = 1.0;
        for (size_t i = 0; i < a.size(); i++) {
            d = a[i] - middle - (i ? b[i - 1] * b[i - 1] / d : 0.0);
            if (d == 0.0) d = 1e-300;
            below += d < 0.0;
        }
        (below > index ? high : low) = middle;
    }
    return 0.5 * (low + high);
}

// How far eigenvalue x of that matrix may be from one of H: b[n-1] times the last component of its eigenvector.
double tridiagonal_error(const std::vector<double>& a, const std::vector<double>& b, double x) {
    double before = 0.0, here = 1.0, sum = 1.0;
    for (size_t i = 0; i + 1 < a.size(); i++) {
        const double next = ((x - a[i]) * here - (i ? b[i - 1] : 0.0) * before) / b[i];
        before = here, here = next, sum += next * next;
        if (sum > 1e200) before *= 1e-100, here *= 1e-100, sum *= 1e-200;
    }
    return b.back() * fabs(here) / sqrt(sum);
}

struct Probe {
    Model& m;
    std::string out;
    int iterations;
    std::vector<std::vector<int32_t>> batches;

    std::vector<double> fetch(int count) {
        std::vector<double> values(count);
        CHECK(cudaGetLastError());
        CHECK(cudaStreamSynchronize(m.stream));
        CHECK(cudaMemcpy(values.data(), m.probe_sums, count * sizeof(double), cudaMemcpyDeviceToHost));
        ticks++;
        return values;
    }
    void combine(float* to, double s, const float* x, double t, const float* y) {
        combine_kernel<<<chunks(m.table.size), 256, 0, m.stream>>>(to, float(s), x, float(t), y, m.table.size);
        CHECK(cudaGetLastError());
    }
    double dot(const float* a, const float* b) {
        const int n = chunks(m.table.size);
        dot_kernel<<<n, 256, 0, m.stream>>>(m.probe_sums, a, b, m.table.size);
        const std::vector<double> parts = fetch(n);
        return std::accumulate(parts.begin(), parts.end(), 0.0);
    }

    void scale(std::string& rows, int64_t step, int layer, const char* name, const floatX* x, const floatX* minus,
               size_t size) {
        const int n = chunks(size);
        scale_kernel<<<n, 256, 0, m.stream>>>(m.probe_sums, x, minus, size);
        const std::vector<double> parts = fetch(2 * n);
        rows += format("%lld,%d,%s,%.6g,%.6g\n", (long long)step, layer, name,
                       sqrt(std::accumulate(parts.begin(), parts.begin() + n, 0.0) / double(size)),
                       *std::max_element(parts.begin() + n, parts.end()));
    }
    // Rows of ACTIVATIONS_HEADER, of the first batch. Branches are what a half of the block adds to the residual
    // stream; layer L is the stream behind the last block.
    std::string activations(int64_t step) {
        const Config& c = m.c;
        const size_t N = m.N(), kv = size_t(c.NKV) * c.HS();
        std::string rows;
        set_batch(m, batches[0].data(), m.B, c.T, false);
        forward(m, m.B, c.T, [&](int l) {
            const LayerActivations& a = m.acts[l];
            auto add = [&](const char* name, const floatX* x, size_t width, const floatX* minus = nullptr) {
                scale(rows, step, l, name, x, minus, N * width);
            };
            add("residual", a.x, c.C);
            add("q", a.q, c.C), add("k", a.k, kv), add("v", a.v, kv);
            add("attention", a.att, c.C);
            add("attention_branch", a.h, c.C, a.x);
            add("w13", a.w13_raw, c.FF());
            add("activation", a.act, c.F());
            add("ffn_branch", l + 1 < c.L ? m.acts[l + 1].x : m.out, c.C, a.h);
        });
        scale(rows, step, c.L, "residual", m.out, nullptr, N * c.C);
        return rows;
    }

    float loss() {
        double sum = 0.0;
        for (auto& b : batches) sum += evaluate(m, b.data(), m.B, m.c.T);
        return float(sum / double(batches.size()));
    }

    struct Curvature {
        double largest = 0.0, error = INFINITY;  // eigenvalue; how far it is at most from one of H
        int iterations = 0;
    };
    Curvature curvature(int64_t step) {
        const size_t P = m.table.size, bytes = P * sizeof(float);
        float *const w = reinterpret_cast<float*>(m.params), *const g = static_cast<float*>(m.grads.p);
        float *v = m.direction, *previous = m.previous;
        CHECK(cudaMemcpyAsync(m.kept, w, bytes, cudaMemcpyDeviceToDevice, m.stream));
        CHECK(cudaMemsetAsync(previous, 0, bytes, m.stream));
        random_direction_kernel<<<chunks(P), 256, 0, m.stream>>>(v, P, 1);
        combine(v, 1.0 / sqrt(dot(v, v)), v, 0.0, v);
        Curvature found;
        std::vector<double> a, b;
        while (found.iterations < iterations) {
            // the loss changes by 2e-6 at most: higher orders do not show then, rounding does not yet
            const double most = std::max(fabs(found.largest), 30.0), e = 0.002 / sqrt(most);
            for (int side : {1, -1}) {  // 2e H v to g: a half of the difference runs with negative weights
                combine(w, 1.0, m.kept, side * e, v);
                for (size_t i = 0; i < batches.size(); i++) {
                    job.progress("probing", step);
                    forward_backward(m, batches[i].data(), m.B, m.c.T, float(side) / float(batches.size()),
                                     side == 1 && i == 0);
                }
            }
            a.push_back(dot(v, g) / (2 * e));
            lanczos_kernel<<<chunks(P), 256, 0, m.stream>>>(previous, v, g, float(0.5 / e), float(a.back()),
                                                            b.empty() ? 0.0f : float(b.back()), P);
            b.push_back(sqrt(dot(previous, previous)));
            found.iterations++;
            if (!std::isfinite(a.back()) || !std::isfinite(b.back())) {
                found.largest = NAN;
                break;
            }
            found.largest = tridiagonal_eigenvalue(a, b, a.size() - 1);
            found.error = tridiagonal_error(a, b, found.largest);
            if (found.error <= 3e-3 * fabs(found.largest) && found.iterations > 2) break;
            std::swap(v, previous);
            combine(v, 1.0 / b.back(), v, 0.0, v);
        }
        CHECK(cudaMemcpyAsync(w, m.kept, bytes, cudaMemcpyDeviceToDevice, m.stream));
        return found;
    }

    void open(int64_t step) const {
        begin_rows(out + "/activations.csv", ACTIVATIONS_HEADER, step);
        if (m.direction) begin_rows(out + "/curvature.csv", CURVATURE_HEADER, step);
    }
    void append(const char* name, const std::string& rows) const {
        const std::string path = out + "/" + name;
        FILE* f = fopen(path.c_str(), "a");
        struct stat before;
        const bool known = f && fstat(fileno(f), &before) == 0;
        const bool written = f && fwrite(rows.data(), 1, rows.size(), f) == rows.size();
        if ((f && fclose(f)) || !written) {
            const int error = errno;
            const bool whole = !f || (known && truncate(path.c_str(), before.st_size) == 0);  // no half of a row stays
            warn(path + ": cannot be written: " + strerror(error) + "." +
                 (whole ? "" : " It may end in half of a row.") + " Make room; training goes on.");
        }
    }
    void run(int64_t step) {
        append("activations.csv", activations(step));
        if (!m.direction || iterations == 0) return;
        const float l = loss();
        const Curvature k = curvature(step);
        append("curvature.csv",
               format("%lld,%.9g,%.6g,%.3g,%d\n", (long long)step, l, k.largest, k.error, k.iterations));
        printf("probe at step %lld: loss %.4f, largest eigenvalue of the Hessian %.4g +- %.2g (%d iterations)\n",
               (long long)step, l, k.largest, k.error, k.iterations);
    }
};

// =====================================================================================================================
// Speed of light: what a step must compute and move at the least, and how long that takes on a device; --plan prints
// it. A matmul takes its FLOPs at the device's matmul rate or its bytes at copy speed, whichever is longer, the rest
// its bytes, every tensor moved once; kinds follow one another. d, k, f as in Recompute, in elements a token and layer:
// simplegpt's norms, RoPE and SwiGLU move 8d + 4k + 3f forward and 9d + 6k + 5f backward.

struct Device {
    std::string name;
    double flops, peak, copy;  // FLOP/s of large matmuls, the datasheet's, bytes/s read plus written
    double memory;             // bytes
    double link, network;      // bytes/s that a rank can send in a ring within a node of eight, and over several
    double ring(int ranks) const { return ranks > 8 ? network : link; }
};
const Device DEVICES[] = {
    // matmul and copy measured with PyTorch 2.11. Links by their datasheets: NVLink, and between nodes an adapter a GPU
    // of 400 (a100: 200) Gbit/s, all eight of which share what the rings send out of a node.
    {"h200", 788e12, 989e12, 4.3e12, 139.0 * (1 << 30), 450e9, 400e9},
    {"h100", 989e12, 989e12, 3.35e12, 79.0 * (1 << 30), 450e9, 400e9},  // SXM5, datasheet: nobody reaches it
    {"a100", 312e12, 312e12, 2.0e12, 79.0 * (1 << 30), 300e9, 200e9},   // SXM4 80 GB, datasheet
    {"2-cores", 215e9, 215e9, 58e9, 16.0 * (1 << 30), 5e9, 5e9},  // an AMD EPYC with AVX-512, fp32, measured but links
};

Device parse_device(const std::string& text) {
    std::string names;
    for (const Device& d : DEVICES) {
        if (d.name == text) return d;
        names += d.name + ", ";
    }
    double tflops, copy, memory, link = 0;
    int used = 0;
    const char* p = text.c_str();
    if (sscanf(p, "%lf,%lf,%lf%n", &tflops, &copy, &memory, &used) == 3) {
        int more = 0;
        if (sscanf(p + used, ",%lf%n", &link, &more) == 1) used += more;
        if (size_t(used) == text.size() && tflops > 0 && copy > 0 && memory > 0 && link >= 0)
            return {text, tflops * 1e12, tflops * 1e12, copy * 1e9, memory * (1 << 30), link * 1e9, link * 1e9};
    }
    throw Error("--device: '" + text + "' is unknown. Give one of " + names +
                "or TFLOP/s,GB/s,GiB[,GB/s]: matmul rate, copy speed, memory, what a rank can send.");
}

struct Work {
    std::string kind;
    double flops, bytes, seconds;
};

// The work of one step of `micro` micro-batches, kind by kind.
std::vector<Work> step_work(const Model& m, int micro, const Device& device) {
    std::vector<Work> work;
    const Config& c = m.c;
    const double N = double(m.N()), C = c.C, QKV = c.QKV(), F = c.F(), FF = c.FF(), Vp = c.Vp(), X = sizeof(floatX);
    const double kv = double(c.NKV) * c.HS(), P = double(m.table.size), G = m.grads.width(), moment = m.m.width();
    const double updated = m.storage.cut_state() ? P / m.storage.ranks : P;
    const Recompute level = m.storage.recompute;
    auto add = [&](const char* kind, double times, double flops, double bytes) {
        if (work.empty() || work.back().kind != kind) work.push_back({kind, 0, 0, 0});
        Work& w = work.back();
        w.flops += times * flops, w.bytes += times * bytes;
        w.seconds += times * std::max(flops / device.flops, bytes / device.copy);
    };
    auto product = [&](const char* kind, double times, double n, double k, double width, double out, double moved = 1) {
        add(kind, times, 2 * n * k * width, X * (n * k + k * width) + moved * out * n * width);
    };
    const std::pair<double, double> linears[] = {{C, QKV}, {C, C}, {C, FF}, {F, C}};  // inputs, outputs
    const double layers = double(c.L) * micro;
    const double pairs = double(m.B) * c.T * (c.T + 1.0) / 2 * c.NH * c.HS();  // times 4 FLOPs forward, 10 backward
    const LayerOffsets& at = m.table.layers[0];
    const double pre = at.norm1 == NONE ? 0 : 2, behind = at.o_gain == NONE ? 0 : 2;  // norms: pre-norms, of o and w2
    const double rows_forward = X * N * (2 * QKV + 3 * C + FF + F + 3 * C + pre * 2 * C);
    // a pre-norm also adds the residual's gradient
    const double rows_backward = X * N * (3 * QKV + 2 * FF + F + behind * 3 * C + pre * 4 * C);

    add("embedding", micro, 0, X * N * 2 * C);
    for (auto [in, out] : linears) product("matmuls, forward", layers, N, in, out, X);
    add("attention, forward", layers, 4 * pairs, X * N * (2 * C + 2 * kv));
    add("norms, RoPE, SwiGLU, forward", layers, 0, rows_forward);
    add("norms, RoPE, SwiGLU, forward", micro, 0, X * N * 2 * C);
    product("head and loss", micro, N, C, Vp, X);
    add("head and loss", micro, 0, X * N * 2 * Vp);
    product("head and loss", micro, N, Vp, C, X);
    product("head and loss", micro, Vp, N, C, G, 2 - 1.0 / micro);
    if (level >= Recompute::norm) add("recomputed", layers, 0, rows_forward - X * N * 3 * C);
    if (level >= Recompute::ffn) product("recomputed", layers, N, C, FF, X);
    if (level >= Recompute::block) {
        product("recomputed", layers, N, C, QKV, X);
        product("recomputed", layers, N, C, C, X);
        add("recomputed", layers, 4 * pairs, X * N * (2 * C + 2 * kv));
    }
    for (auto [in, out] : linears) {
        product("matmuls, backward", layers, N, out, in, X);
        product("matmuls, backward", layers, out, N, in, G, 2 - 1.0 / micro);  // the first micro-batch overwrites
    }
    add("attention, backward", layers, 10 * pairs, X * N * (4 * C + 4 * kv));
    add("norms, RoPE, SwiGLU, backward", layers, 0, rows_backward);
    add("norms, RoPE, SwiGLU, backward", micro, 0, X * N * 3 * C);
    add("embedding, backward", micro, 0, N * C * (X + 2 * G));
    add("gradient norm", 1, 0, P / m.storage.ranks * G);
    add("AdamW", 1, 0, updated * (G + 4 * moment + (BF16 && !m.storage.no_master ? 8 + X : 2 * X)));
    return work;
}

// Bytes that a rank sends in a step of `micro` micro-batches: what Ranks counts, from the sizes alone. With cut weights
// the units that are still in their slots are not gathered again: in a backward the last two layers, in a later
// micro-batch the first two, and what is tied.
double step_sent(const Model& m, int micro) {
    const Storage& s = m.storage;
    const double n = s.ranks, P = double(m.table.size), G = m.grads.width(), X = sizeof(floatX);
    if (s.ranks == 1) return 0;
    double bytes = 2 * sizeof(Numbers::summed);
    bytes += P * G * (s.zero == 0 ? 2 : s.cut_gradients() ? micro : 1);
    if (s.zero == 1 || s.zero == 2) bytes += P * X;
    if (s.cut_weights()) {
        double layers = 0, ends = 0;
        for (int u = 0; u < m.units(); u++)
            (u == 0 || u == m.units() - 1 ? ends : layers) += double(m.table.units[u].size) * X;
        const double again = layers * std::max(0, m.c.L - 2) / m.c.L;
        bytes += layers + ends + again + (micro - 1) * (2 * again + (m.table.tied() ? 0 : ends));
    }
    return bytes * (n - 1) / n;
}

// FLOPs of the model a token, recomputation not counted: 6 for each parameter that is multiplied (not the embedding's),
// and the causal half of attention, 6 L T C.
double model_flops(const Model& m) {
    const Config& c = m.c;
    const double table = m.table.tok == m.table.head ? 0 : double(c.V) * c.C;
    const double positions = m.table.pos == NONE ? 0 : double(c.max_T) * c.C;
    return 6 * (double(m.table.parameters) - table - positions) + 6.0 * c.L * c.T * c.C;
}

// Least seconds of a step: its kernels, or its communication if that takes longer, since they may overlap.
double least_seconds(const Model& m, int micro, const Device& device) {
    double seconds = 0;
    for (const Work& w : step_work(m, micro, device)) seconds += w.seconds;
    const double link = device.ring(m.storage.ranks);
    return std::max(seconds, link > 0 ? step_sent(m, micro) / link : 0);
}

std::string speed_of_light(const Model& m, int micro, const Device& device) {
    const std::vector<Work> work = step_work(m, micro, device);
    const int n = m.storage.ranks;
    const double tokens = double(m.N()) * micro * n, least = least_seconds(m, micro, device);
    Work all = {"step", 0, 0, 0};
    for (const Work& w : work) all.flops += w.flops, all.bytes += w.bytes, all.seconds += w.seconds;
    std::string s =
        format("speed of light on %s: %.4g TFLOP/s of matmul, %.4g GB/s of copy\n  %-32s %10s %10s %10s %7s\n",
               device.name.c_str(), device.flops / 1e12, device.copy / 1e9, n > 1 ? "a step of a rank" : "a step",
               "TFLOP", "GB", "ms", "share");
    auto line = [&](const Work& w) {
        s += format("  %-32s %10.4g %10.4g %10.4g %6.1f%%\n", w.kind.c_str(), w.flops / 1e12, w.bytes / 1e9,
                    w.seconds * 1e3, 100 * w.seconds / all.seconds);
    };
    for (const Work& w : work) line(w);
    line(all);
    if (n > 1) {
        const double sent = step_sent(m, micro), link = device.ring(n);
        s += format("  %-32s %10s %10.4g", format("sent by a rank, ZeRO %d", m.storage.zero).c_str(), "", sent / 1e9);
        s += link > 0 ? format(" %10.4g %6.1f%%  at %.4g GB/s, beside the rest\n", sent / link * 1e3,
                               100 * sent / link / all.seconds, link / 1e9)
                      : std::string("\n");
    }
    const double flops = model_flops(m);
    return s +
           format("  at most %.0f tokens/s, %.1f%% of %.4g TFLOP/s at %.4g GFLOP a token (6 N + causal attention)\n",
                  tokens / least, 100 * flops * tokens / least / n / device.peak, device.peak / 1e12, flops / 1e9);
}

// =====================================================================================================================
// Command line

// What the program is asked to do, and so which options it takes.
enum Command { TRAIN = 1, GENERATE = 2, EVAL = 4, ALL_COMMANDS = TRAIN | GENERATE | EVAL };
const std::map<int, const char*> COMMANDS = {{TRAIN, "training"}, {GENERATE, "generate"}, {EVAL, "eval"}};

struct Options {
    Command command = TRAIN;
    Config config;
    Storage storage;
    AdamW adamw;
    double lr = 1e-3;  // the peak; adamw.lr is that of a step
    int zero = 1, ranks = 0;  // ranks: of --plan
    bool reduce_each = false, save_async = false;
    double timeout = 600;
    std::string rendezvous;
    int64_t check_every = 1000, max_bad_steps = 10;
    std::string train_data, val_data, tokenizer, prompt, init_from, export_to, out = "run";
    bool shuffle = false, resume = false, graph = false, export_half = false;
    int batch_size = 4, grad_accum = 1, total_batch = 0, log_every = 10, val_every = -1, val_batches = 20,
        sample_every = 0, probe_iterations = 50, probe_batches = 1;
    int64_t probe = 0;
    int sample_tokens = 200, keep = 2;
    int64_t steps = 1000, warmup = -1, save_every = 0;
    uint64_t seed = 1;
    bool vocab_given = false, positions_given = false;
    bool plan = false;
    std::string device = BF16 ? "h200" : "2-cores";
    // of generate and eval
    std::vector<const char*> shape;  // options given of the model's shape, which a checkpoint knows
    std::string checkpoint, prompt_file, choices;
    int seq_len = 0, max_tokens = 200, num_samples = 1;  // seq_len 0: the model's
    int64_t eval_batches = 0;                            // 0: all
    Sampling sampling;
};

struct Flag {
    const char* name;  // null: `help` is a heading
    std::string arg;   // "": a switch
    const char* help;
    std::function<void(const char*)> set;
    int commands = 0;  // that take it; 0: those of the heading above it, of which TRAIN alone is the rule
};

double parse_number(const char* flag, const char* text, double least, double most) {
    char* end;
    errno = 0;
    double x = strtod(text, &end);
    if (end == text || *end || errno || !(x >= least && x <= most))
        throw Error(format("--%s: '%s' is not a number from %g to %g.", flag, text, least, most));
    return x;
}
int64_t parse_integer(const char* flag, const char* text, int64_t least, int64_t most) {
    char* end;
    errno = 0;
    long long x = strtoll(text, &end, 10);
    if (end == text || *end || errno || x < least || x > most)
        throw Error(format("--%s: '%s' is not a whole number from %lld to %lld.", flag, text, (long long)least,
                           (long long)most));
    return x;
}

std::vector<Flag> flags(Options& o) {
    std::vector<Flag> all;
    auto heading = [&](const char* text, int commands = TRAIN) {
        all.push_back({nullptr, "", text, nullptr, commands});
    };
    auto toggle = [&](const char* name, const char* help, bool* out, bool value) {
        all.push_back({name, "", help, [=](const char*) { *out = value; }});
    };
    auto text = [&](const char* name, const char* arg, const char* help, std::string* out) {
        all.push_back({name, arg, help, [=](const char* s) { *out = s; }});
    };
    auto integer = [&](const char* name, auto* out, int64_t least, int64_t most, const char* help) {
        all.push_back({name, "N", help, [=](const char* s) {
                           *out = std::decay_t<decltype(*out)>(parse_integer(name, s, least, most));
                       }});
    };
    auto number = [&](const char* name, float* out, double least, double most, const char* help) {
        all.push_back({name, "X", help, [=](const char* s) { *out = float(parse_number(name, s, least, most)); }});
    };
    auto choice = [&](const char* name, const Words& words, const char* help, auto pick) {
        std::string all_words;
        for (const std::string& word : words) all_words += (all_words.empty() ? "" : "|") + word;
        all.push_back({name, all_words, help, [=](const char* s) {
                           auto found = std::find(words.begin(), words.end(), s);
                           if (found == words.end())
                               throw Error(format("--%s: '%s' is none of %s.", name, s, all_words.c_str()));
                           pick(int(found - words.begin()));
                       }});
    };
    const int64_t big = int64_t(1) << 30;
    Config& c = o.config;

    heading("Model (a flavour's numbers, each of which its own flag changes)", ALL_COMMANDS);
    all.push_back({"model", "FLAVOUR",
                   "preset of dim, layers, heads, ... ; --models lists them (default: 256 wide, 6 layers)",
                   [](const char*) {}});  // applied before all others
    all.push_back({"models", "", "list the flavours and their parameter counts, then exit", nullptr});
    choice("backbone", BACKBONES, "llama: RoPE, SwiGLU, own head; nanogpt: learned positions, GELU, tied head (llama)",
           [&c](int i) { c.backbone = Backbone(i); });
    choice("variant", VARIANTS, "norms behind every linear, before each half, or that with QK norm (simplegpt)",
           [&c](int i) { c.variant = Variant(i); });
    choice("norm", NORMS, "layernorm has no bias (rmsnorm)", [&c](int i) { c.layernorm = i; });
    integer("dim", &c.C, 1, 1 << 20, "width of the residual stream (256)");
    integer("layers", &c.L, 1, 1 << 16, "blocks (6)");
    integer("heads", &c.NH, 1, 1 << 16, "query heads of dim / heads = 16, 32, 64, 72 or 128 (4)");
    integer("kv-heads", &c.NKV, 1, 1 << 16, "key/value heads, a divisor of --heads (as many)");
    number("ffn-mult", &c.ffn_mult, 0, 1000, "factor on the feed-forward width 8/3 dim, llama only (1)");
    integer("multiple-of", &c.multiple_of, 1, 1 << 24, "the feed-forward width is rounded up to it, llama only (256)");
    all.push_back({"vocab-size", "N", "tokens (the tokenizer's if --tokenizer is given, else the flavour's, 32000)",
                   [&o](const char* s) {
                       o.config.V = int(parse_integer("vocab-size", s, 1, 1 << 28));
                       o.vocab_given = true;
                   }});
    number("rope-theta", &c.rope_theta, 0, 1e12, "base of RoPE's wavelengths (1e4)");
    number("norm-eps", &c.norm_eps, 0, 1, "added to the mean square in norms (1e-5)");
    integer("seq-len", &c.T, 1, 1 << 24, "tokens of a sequence (1024)");
    all.back().commands = TRAIN;
    all.push_back({"max-seq-len", "N", "learned positions, nanogpt only (those of --init-from, else --seq-len)",
                   [&o](const char* s) {
                       o.config.max_T = int(parse_integer("max-seq-len", s, 1, 1 << 24));
                       o.positions_given = true;
                   }});

    heading("Data");
    text("train-data", "GLOB", "token shards (llm.c's format; dev/data/prepare.py makes them); quote a pattern",
         &o.train_data);
    text("val-data", "GLOB", "token shards to validate on", &o.val_data);
    toggle("shuffle", "windows in an order drawn from --seed, anew each epoch (in order)", &o.shuffle, true);
    text("tokenizer", "bytes|FILE", "for --prompt and samples (dev/data/convert_tokenizer.py makes files)",
         &o.tokenizer);

    heading("Training");
    all.push_back({"batch-size", "N|auto", "sequences of a micro-batch; auto: as many as fit into memory (4)",
                   [&o](const char* s) {
                       o.batch_size = strcmp(s, "auto") ? int(parse_integer("batch-size", s, 1, 1 << 30)) : 0;
                   }});
    integer("grad-accum", &o.grad_accum, 1, big, "micro-batches of a step (1)");
    integer("total-batch", &o.total_batch, 1, big,
            "sequences of a step on all ranks, in place of --grad-accum: sets it");
    integer("steps", &o.steps, 0, int64_t(1) << 50, "updates; 0 only imports and exports (1000)");
    integer("warmup", &o.warmup, 0, int64_t(1) << 50, "steps of rising learning rate (1% of --steps)");
    all.push_back({"lr", "X", "peak learning rate, falling linearly to 0 after the warm-up (1e-3)",
                   [&o](const char* s) { o.lr = parse_number("lr", s, 0, 1e6); }});
    number("weight-decay", &o.adamw.weight_decay, 0, 1e6, "decoupled, on every parameter (0.1)");
    toggle("no-decay-1d", "spare gains from the decay", &o.adamw.decay_1d, false);
    number("beta1", &o.adamw.beta1, 0, 0.999999, "AdamW's first moment (0.9)");
    number("beta2", &o.adamw.beta2, 0, 0.999999, "AdamW's second moment (0.95)");
    number("adam-eps", &o.adamw.eps, 1e-30, 1, "AdamW's epsilon (1e-8)");
    number("clip", &o.adamw.clip, 0, 1e30, "largest gradient norm, 0 for no clipping (1)");
    integer("seed", &o.seed, 0, INT64_MAX, "of weights, shuffling and samples (1)");

    toggle("graph", "launch a micro-batch as one CUDA graph, for small models, whose kernels are short", &o.graph,
           true);

    heading("Many GPUs (one process each, started by mpirun, srun or torchrun: README)");
    choice("zero", {"0", "1", "2", "3"},
           "each rank keeps its part only of: nothing, AdamW's state, gradients too, weights too (1)",
           [&o](int i) { o.zero = i; });
    choice(
        "reduce", {"once", "each"},
        "with --zero 2, 3 and several micro-batches: sum gradients here first, or send each's and keep a part (once)",
        [&o](int i) { o.reduce_each = i; });
    text("rendezvous", "HOST:PORT", "where rank 0 is found by TCP (over MPI, else MASTER_ADDR:MASTER_PORT)",
         &o.rendezvous);
    all.push_back({"timeout", "SECONDS", "until a rank that does not come, dies or hangs ends the job (600)",
                   [&o](const char* s) { o.timeout = parse_number("timeout", s, 0.1, 1e7); }});
    integer("check-every", &o.check_every, 0, int64_t(1) << 50,
            "steps between comparisons of the ranks' weights, --zero 0 to 2; 0 for none (1000)");

    heading("Memory (the plan is printed before anything is allocated)");
    choice("recompute", RECOMPUTE,
           "activations made again in the backward: of norms, RoPE and SwiGLU; of the feed-forward too; of all (none)",
           [&o](int i) { o.storage.recompute = Recompute(i); });
    const Words types = {"fp32", "bf16"};
    choice("moments", types, "AdamW's two moments, bf16 with stochastic rounding (fp32)",
           [&o](int i) { o.storage.half_moments = i; });
    choice("gradients", types, "sums over micro-batches; bf16 rounds at each: for one or few (fp32)",
           [&o](int i) { o.storage.half_gradients = i; });
    toggle("no-master", "no float32 weights beside the bf16 ones, which are rounded stochastically",
           &o.storage.no_master, true);

    heading("Planning");
    toggle("plan", "print parameters, a step's FLOPs, bytes and least time, and the memory plan, then exit", &o.plan,
           true);
    text("device", "NAME",
         "for --plan: h200, h100, a100, 2-cores, or TFLOP/s,GB/s,GiB[,GB/s sent] (h200; of the fp32 build 2-cores)",
         &o.device);
    integer("ranks", &o.ranks, 1, 1 << 20, "for --plan: GPUs (as many as were started)");

    heading("Files");
    text("init-from", "FILE|DIR", "begin with these weights: safetensors with the paper's names; fp32, bf16 or fp16",
         &o.init_from);
    text("export", "FILE", "write the weights of the end there, as safetensors with the paper's names", &o.export_to);
    choice("export-dtype", types, "of --export (fp32)", [&o](int i) { o.export_half = i; });
    text("out", "DIR", "the run's directory: log.csv and checkpoints (run)", &o.out);
    integer("save-every", &o.save_every, 0, int64_t(1) << 50,
            "steps between checkpoints, one at the end too; 0 for none (0)");
    integer("keep", &o.keep, 0, big, "checkpoints that stay, the newest; 0 for all (2)");
    toggle("save-async", "write checkpoints from a copy in host memory while training goes on", &o.save_async, true);
    toggle("resume", "go on from the newest sound checkpoint in --out, or begin if there is none", &o.resume, true);
    integer("max-bad-steps", &o.max_bad_steps, 1, big,
            "steps skipped, as loss or gradient norm is not finite, until the run saves and stops (10)");

    heading("Watching");
    integer("log-every", &o.log_every, 1, big, "steps between lines on the terminal (10)");
    integer("val-every", &o.val_every, 0, big,
            "steps between validations, one at the end too; 0 for none (a tenth of --steps)");
    integer("val-batches", &o.val_batches, 1, big, "batches of a validation on each rank, always the same (20)");
    integer("sample-every", &o.sample_every, 0, big, "steps between samples of text; 0 for none (0)");
    integer("sample-tokens", &o.sample_tokens, 1, 1 << 20, "tokens of a sample (200)");
    integer("probe", &o.probe, 0, int64_t(1) << 50,
            "steps between probes of activations and curvature (DIR/activations.csv, curvature.csv); 0 for none (0)");
    integer("probe-iterations", &o.probe_iterations, 0, big,
            "Hessian-vector products at most, two gradients each; 0: activations only, as in a bf16 build (50)");
    integer("probe-batches", &o.probe_batches, 1, big, "of --val-data, else --train-data, that the probe looks at (1)");
    text("prompt", "TEXT", "what samples begin with (the tokenizer's BOS alone)", &o.prompt);

    heading("Weights", GENERATE | EVAL);
    text("checkpoint", "DIR", "a checkpoint, or a run's folder: the newest sound one in it", &o.checkpoint);
    text("init-from", "FILE|DIR", "instead: safetensors with the paper's names; the model's options say its shape",
         &o.init_from);
    text("tokenizer", "bytes|FILE", "the data's tokenizer (what the checkpoint names)", &o.tokenizer);
    integer("seq-len", &o.seq_len, 1, 1 << 24,
            "tokens of the context (the checkpoint's; else 1024). RoPE allows more, nanogpt its positions");
    heading("Text", GENERATE);
    text("prompt", "TEXT", "what the text begins with, behind BOS (BOS alone)", &o.prompt);
    text("prompt-file", "FILE", "the same from a file, /dev/stdin too", &o.prompt_file);
    integer("max-tokens", &o.max_tokens, 1, 1 << 24,
            "tokens to write; EOS or a full context end the text before (200)");
    integer("num-samples", &o.num_samples, 1, 1 << 16, "texts from the one prompt, --- between them (1)");
    heading("Sampling (in this order)", GENERATE);
    number("temperature", &o.sampling.temperature, 0, 1e6, "logits are divided by it; 0 takes the likeliest (0.8)");
    integer("top-k", &o.sampling.top_k, 0, 1 << 28, "only the N likeliest tokens; 0 for all (50)");
    number("top-p", &o.sampling.top_p, 1e-6, 1,
           "of them the fewest likeliest that have X of their probability together (1)");
    integer("seed", &o.seed, 0, INT64_MAX, "the same seed draws the same text (1)");
    heading("Evaluation (--val-data, --choices or both)", EVAL);
    text("val-data", "GLOB", "token shards, cut into windows of --seq-len + 1 tokens; quote a pattern", &o.val_data);
    all.push_back({"val-batches", "N|all", "the first N batches of --batch-size windows (all)", [&o](const char* s) {
                       o.eval_batches = strcmp(s, "all") ? parse_integer("val-batches", s, 1, 1 << 30) : 0;
                   }});
    text("choices", "FILE", "questions of multiple choice (dev/data/hellaswag.py makes the file)", &o.choices);
    integer("batch-size", &o.batch_size, 1, big, "sequences run at a time (4)");

    heading("Help", ALL_COMMANDS);
    all.push_back({"help", "", "this", nullptr});
    int commands = 0;
    for (Flag& f : all) {
        if (!f.name) commands = f.commands;
        if (!f.commands) f.commands = commands;
    }
    return all;
}

void print_help(const std::vector<Flag>& all, Command command) {
    if (command == GENERATE)
        printf(
            "train_gpt generate: writes text on from a prompt (%s build). Text on stdout, all else on stderr.\n"
            "usage: ./train_gpt generate --checkpoint DIR --prompt TEXT [options]\n",
            PRECISION);
    else if (command == EVAL)
        printf(
            "train_gpt eval: validation loss, and accuracy on questions of multiple choice (%s build).\n"
            "usage: ./train_gpt eval --checkpoint DIR --val-data 'data/*_val_*.bin' [--choices FILE] [options]\n",
            PRECISION);
    else
        printf(
            "train_gpt: trains SimpleGPT and its pre-norm relatives (%s build).\n"
            "usage: ./train_gpt --train-data 'data/*_train_*.bin' [options]\n"
            "       ./train_gpt generate --help           writes text with a trained model\n"
            "       ./train_gpt eval --help               measures one\n",
            PRECISION);
    // the model's options last where a checkpoint has them
    for (bool last : {false, true})
        for (const Flag& f : all) {
            if (!(f.commands & command) || last != (command != TRAIN && f.commands == ALL_COMMANDS)) continue;
            if (!f.name) {
                printf("\n%s\n", f.help);
                continue;
            }
            std::string left = format("  --%s %s", f.name, f.arg.c_str());
            printf("%-40s %s\n", left.c_str(), f.help);
        }
    if (command == EVAL)
        printf(
            "\nvalidation loss: mean over all targets, nats; perplexity: exp of it; bits per byte: the sum of the "
            "losses\n"
            "  / ln 2 / bytes of the text that the targets stand for (BOS and EOS have none)\n"
            "choices: the right one has the highest log-likelihood: as it is, divided by its tokens, or by its bytes\n"
            "  without a leading space; errors are standard errors, sqrt(a (1 - a) / (questions - 1))\n"
            "One line of JSON on stdout, the same for people on stderr.\n");
    if (command == TRAIN)
        printf(
            "\nSeveral GPUs, on one node or many:\n"
            "  mpirun -n 8 ./train_gpt ...                                  Open MPI, MPICH\n"
            "  srun --ntasks-per-node=8 --gpus-per-node=8 ./train_gpt ...   Slurm\n"
            "  torchrun --no-python --nproc-per-node=8 ./train_gpt ...      PyTorch's, as any other starter that sets "
            "RANK,\n"
            "                                                               WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, "
            "MASTER_PORT\n"
            "SIGTERM, SIGINT and SIGUSR1 save a checkpoint and stop after the step; go on with --resume.\n");
    printf("\nDefaults in parentheses. Errors: one line on stderr, exit status 1.\n");
}

void print_flavours() {
    printf("%-14s %6s %7s %6s %9s %7s %7s %15s\n", "flavour", "dim", "layers", "heads", "kv-heads", "hidden", "vocab",
           "parameters");
    for (const Flavour& f : FLAVOURS) {
        Config c;
        apply_flavour(c, f.name);
        finish(c);
        printf("%-14s %6d %7d %6d %9d %7d %7d %15zu\n", f.name, c.C, c.L, c.NH, c.NKV, c.F(), c.V,
               build_table(c).parameters);
    }
    printf("parameters: of the simplegpt variant; nanogpt's with 1024 positions\n");
}

// Reads the command line. False: it asked only for information, which has been printed.
bool parse_options(Options& o, int argc, char** argv) {
    for (auto& [command, name] : COMMANDS)
        if (command != TRAIN && argc > 1 && !strcmp(argv[1], name)) o.command = Command(command);
    if (o.command != TRAIN) argc--, argv++;
    std::vector<Flag> all = flags(o);
    std::vector<option> longs;
    for (size_t i = 0; i < all.size(); i++)
        if (all[i].name && all[i].commands & o.command)
            longs.push_back({all[i].name, all[i].arg.empty() ? no_argument : required_argument, nullptr, int(i) + 256});
    longs.push_back({nullptr, 0, nullptr, 0});
    const std::string help = o.command == TRAIN ? "--help" : format("%s --help", COMMANDS.at(o.command));
    // the flavour first, wherever it stands, then what changes it
    for (int walk = 0; walk < 2; walk++) {
        optind = 0;
        opterr = 0;
        for (int found; (found = getopt_long_only(argc, argv, ":", longs.data(), nullptr)) != -1;) {
            if (found == ':') throw Error(format("%s: needs a value. See %s.", argv[optind - 1], help.c_str()));
            if (found == '?') {
                const std::string word = argv[optind - 1], name = word.substr(0, word.find('='));
                for (const Flag& f : all) {
                    if (!f.name || name != std::string("--") + f.name) continue;
                    if (f.commands & o.command)
                        throw Error(format("--%s: takes no value. See %s.", f.name, help.c_str()));
                    throw Error(
                        format("--%s: is no option of %s. See %s.", f.name, COMMANDS.at(o.command), help.c_str()));
                }
                throw Error(format("%s: unknown option. See %s.", word.c_str(), help.c_str()));
            }
            const Flag& f = all[found - 256];
            if (!strcmp(f.name, "help")) return print_help(all, o.command), false;
            if (!strcmp(f.name, "models")) return print_flavours(), false;
            if (!strcmp(f.name, "model") && walk == 0) apply_flavour(o.config, optarg);
            if (walk == 1) f.set(optarg);
            if (walk == 1 && f.commands == ALL_COMMANDS) o.shape.push_back(f.name);
        }
    }
    if (optind < argc) throw Error(format("%s: is not an option. See %s.", argv[optind], help.c_str()));
    return true;
}

// =====================================================================================================================
// main: options, data, model, the loop.

// Mean loss over the first `batches` batches of all ranks, always the same ones.
float validate(Model& m, DataLoader& data, int batches, int64_t step) {
    double sum = 0.0, total = 0.0;
    data.seek({0, 0});
    for (int i = 0; i < batches; i++) {
        sum += evaluate(m, data.next(), m.B, m.c.T);
        job.progress("validating", step);
    }
    for (double part : ranks.exchange(sum)) total += part;
    return float(total / (double(batches) * ranks.size));
}

void print_sample(Model& m, const Tokenizer& tokenizer, const Options& o, int64_t step) {
    std::vector<int> prompt = tokenizer.encode(o.prompt);
    prompt.insert(prompt.begin(), tokenizer.bos());
    std::vector<int> drawn =
        sample(m, prompt, o.sample_tokens, tokenizer.vocab_size(), Sampling(), o.seed + uint64_t(step));
    auto end = std::find(drawn.begin(), drawn.end(), tokenizer.eos());
    prompt.insert(prompt.end(), drawn.begin(), end);
    prompt.erase(prompt.begin());
    printf("--- sample at step %lld\n%s\n---\n", (long long)step, tokenizer.decode(prompt).c_str());
}

bool happened(cudaEvent_t event) {
    const cudaError_t status = cudaEventQuery(event);
    if (status != cudaErrorNotReady) CHECK(status);
    cudaGetLastError();  // "not ready" is not to be taken for a launch's error later
    return status == cudaSuccess;
}

// Set by SIGTERM, SIGINT (a second one kills) or SIGUSR1, which Slurm sends ahead of a job's end.
volatile sig_atomic_t asked_to_stop = 0;

void catch_signals() {
    struct sigaction action = {};
    action.sa_handler = [](int number) {
        if (number == SIGINT && asked_to_stop == SIGINT) signal(SIGINT, SIG_DFL), raise(SIGINT);
        asked_to_stop = number;
    };
    action.sa_flags = SA_RESTART;
    for (int number : {SIGTERM, SIGINT, SIGUSR1}) sigaction(number, &action, nullptr);
}

// One step, number `step` from 1: the micro-batches, the update, and its report to the host, who does not wait.
void train_step(Model& m, DataLoader& data, const Options& o, int64_t step, bool check) {
    begin_step(m);
    for (int i = 0; i < o.grad_accum; i++) {
        job.progress("computing", step);
        forward_backward(m, data.next(), m.B, m.c.T, 1.0f / (o.grad_accum * float(ranks.size)), i == 0,
                         i == o.grad_accum - 1);
    }
    AdamW adamw = o.adamw;
    adamw.lr = float(learning_rate(o.lr, step - 1, o.warmup, o.steps));
    update(m, adamw, step, asked_to_stop != 0);
    const Report& r = m.reports[step % 2];
    if (check) {
        hash_weights(m);
        CHECK(cudaMemcpyAsync(r.hashes, m.hashes, ranks.size * sizeof(*r.hashes), cudaMemcpyDeviceToHost, m.stream));
    }
    CHECK(cudaMemcpyAsync(r.numbers, m.numbers, sizeof(Numbers), cudaMemcpyDeviceToHost, m.stream));
    CHECK(cudaEventRecord(r.done, m.stream));
}

// The ranks whose weights are not those of the most. Without a majority nobody knows who is wrong.
void compare_hashes(const unsigned long long* hashes, int64_t step) {
    std::map<unsigned long long, int> votes;
    for (int r = 0; r < ranks.size; r++) votes[hashes[r]]++;
    if (votes.size() == 1) return;
    auto fewer = [](auto& a, auto& b) { return a.second < b.second; };
    const auto most = std::max_element(votes.begin(), votes.end(), fewer);
    const bool majority = 2 * most->second > ranks.size;
    std::string others;
    for (int r = 0; r < ranks.size; r++)
        if (!majority || hashes[r] != most->first) others += format(others.empty() ? "%d" : ", %d", r);
    throw Error(
        format("training: the ranks' weights differ after step %lld: %s. Nothing was saved; look for a bad GPU or "
               "network there and resume from the last checkpoint.",
               (long long)step,
               majority ? format("rank %s from the others", others.c_str()).c_str()
                        : format("ranks %s, and no majority tells which is wrong", others.c_str()).c_str()));
}

// Bytes in use: of the device; on a CPU, whose memory processes share, this one's.
double memory_used() {
    if (SERIAL) {
        long pages = 0;
        if (FILE* f = fopen("/proc/self/statm", "r")) {
            if (fscanf(f, "%*d %ld", &pages) != 1) pages = 0;
            fclose(f);
        }
        return double(pages) * double(sysconf(_SC_PAGESIZE));
    }
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    return double(total - free);
}

// Compares the ranks' weights where all ranks are between steps.
void check_weights(Model& m, int64_t step) {
    if (ranks.size == 1 || m.storage.cut_weights()) return;
    std::vector<unsigned long long> hashes(ranks.size);
    hash_weights(m);
    settle(m);
    CHECK(cudaMemcpy(hashes.data(), m.hashes, ranks.size * sizeof(hashes[0]), cudaMemcpyDeviceToHost));
    compare_hashes(hashes.data(), step);
}

// Prints what a rank holds in memory and sends, beside the plan. before: memory_used() of an empty device.
void print_use(const Model& m, double before, double sent, int micro) {
    settle(m);
    const double mib = 1048576.0, used = memory_used() - before;
    const double least = ranks.least(used), most = ranks.most(used);
    printf("memory a rank: plan %.1f MiB, in use %.1f MiB", m.arena.used / mib, least / mib);
    printf(ranks.size > 1 ? " to %.1f MiB\n" : "\n", most / mib);
    if (ranks.size > 1)
        printf("sent by a rank in a step: %.0f bytes, by theory %.0f (ZeRO %d)\n", sent, step_sent(m, micro),
               m.storage.zero);
}

// A step's line on the terminal. rate in tokens/s, left in seconds; val: null if it was not validated.
void print_step(const Options& o, int64_t step, const Numbers& n, double lr, double rate, double left, const float* val,
                bool spike) {
    printf("step %6lld/%lld %5.1f%% | loss %.4f | lr %.2e | norm %.3f | %.0f tokens/s | ETA %s%s%s\n", (long long)step,
           (long long)o.steps, 100.0 * step / o.steps, n.loss, lr, n.grad_norm, rate, duration(left).c_str(),
           val ? format(" | val %.4f", *val).c_str() : "",
           n.skip  ? format(" | skipped, %lld of at most %lld", n.skipped, (long long)o.max_bad_steps).c_str()
           : spike ? " | spike"
                   : "");
}

// The probe with the batches it measures on, of the validation data if there are any. Its tables go on behind `step`;
// at the beginning of a run it measures at once.
Probe open_probe(Model& m, const Options& o, int64_t step) {
    Probe probe = {m, o.out, o.probe_iterations, {}};
    if (!o.probe) return probe;
    DataLoader fixed(o.val_data.empty() ? o.train_data : o.val_data, m.B, m.c.T, m.c.V);
    if (uint64_t(o.probe_batches) > fixed.windows() / m.B)
        throw Error(format("--probe-batches: %d are more than the %llu of its data. Give fewer.", o.probe_batches,
                           (unsigned long long)(fixed.windows() / m.B)));
    for (int i = 0; i < o.probe_batches; i++) {
        const int32_t* windows = fixed.next();
        probe.batches.emplace_back(windows, windows + size_t(m.B) * (m.c.T + 1));
    }
    probe.open(step);
    if (step == 0) probe.run(0);
    return probe;
}

// True: trained to the end; false: asked to stop before it. trouble: "", or why the last checkpoint is missing.
bool train(Model& m, const Options& o, DataLoader& data, DataLoader* val, const Tokenizer* tokenizer, TrainState state,
           double memory_before, std::string& trouble) {
    const int64_t S = o.steps, begun = state.step;
    const double tokens = double(m.N()) * o.grad_accum * ranks.size;
    Log log;
    if (ranks.rank == 0) log.open(o.out + "/log.csv", state.step);
    Saver saver;
    saver.out = o.out, saver.keep = o.keep, saver.background = o.save_async;
    saver.tokenizer = tokenizer_lines(o.tokenizer);
    int64_t marked = state.step;  // step and time since which the line on the terminal counts
    double mark = now(), last = mark;
    double paused = 0.0;  // seconds of validation, samples and checkpoints among them
    double sent = 0.0;    // bytes of the last step
    int64_t end = S;      // the step to stop after
    int64_t suspect = 0;  // a step after a skipped one, which ranks that have gone apart may have caused
    bool stopping = false;
    std::string bad;  // why, if it was not asked to
    auto checked = [&](int64_t step) {
        return ranks.size > 1 && !m.storage.cut_weights() && o.check_every > 0 &&
               (step % o.check_every == 0 || step == begun + 1 || step == suspect);
    };
    auto due = [&](int64_t step, int64_t every) { return every > 0 && (step % every == 0 || step == S); };
    Probe probe = open_probe(m, o, begun);
    // What makes a run stop early is in the numbers of a step, so that all ranks see it there; some have begun the next
    // step by then and some have not, so that one is the last.
    auto stop = [&](int64_t step, const std::string& why) {
        if (!stopping) end = std::min(S, step + 1), stopping = true, bad = why;
    };

    // Waits for a step's numbers, writes them down, and does what is due after it.
    auto report = [&](int64_t step) {
        const Report& r = m.reports[step % 2];
        CHECK(cudaEventSynchronize(r.done));
        const Numbers n = *r.numbers;
        job.progress("reporting", step);
        const double done = now(), lr = learning_rate(o.lr, step - 1, o.warmup, S);
        state.updates = n.updates, state.skipped = n.skipped;
        if (checked(step)) compare_hashes(r.hashes, step);
        const bool validated = val && !n.skip && due(step, o.val_every);
        const float val_loss = validated ? validate(m, *val, o.val_batches, step) : 0.0f;
        const bool spike = log.spikes.add(n.loss);
        if (ranks.rank == 0)
            log.row(step, n.loss, lr, n.grad_norm, tokens / (done - last), validated ? &val_loss : nullptr,
                    n.skip  ? "skipped"
                    : spike ? "spike"
                            : "");
        if (step % o.log_every == 0 || step == S || step == 1 || n.skip || spike || validated) {
            const double seconds = (done - mark - paused) / double(step - marked);
            print_step(o, step, n, lr, tokens / seconds, seconds * double(S - step), validated ? &val_loss : nullptr,
                       spike);
            marked = step, mark = done, paused = 0.0;
        }
        if (n.skip && n.skipped >= o.max_bad_steps)
            stop(step,
                 format("training: loss or gradient norm were not finite in %lld steps, at last in step %lld. Lower "
                        "--lr or raise --warmup; --resume with a larger --max-bad-steps goes on.",
                        n.skipped, (long long)step));
        if (n.skip && suspect <= step) suspect = step + 2;  // no rank has begun it yet
        if (n.stop) stop(step, "");
        if (tokenizer && due(step, o.sample_every)) print_sample(m, *tokenizer, o, step);
        if (due(step, o.probe)) probe.run(step);
        if (due(step, o.save_every) || (stopping && step == end)) {
            check_weights(m, step);
            saver.save(m, state);
        }
        last = now();
        paused += last - done;
        fflush(stdout);
    };

    // The host launches one step ahead of the one it reports, unless it has to do something after it, or it is done.
    for (int64_t reported = state.step; reported < end;) {
        if (state.step < end) {
            const double before = ranks.sent;
            state.step++;
            train_step(m, data, o, state.step, checked(state.step));
            sent = ranks.sent - before;
            state.loader = data.state();
        }
        const bool drain = due(state.step, o.val_every) || due(state.step, o.sample_every) ||
                           due(state.step, o.probe) || due(state.step, o.save_every) || state.step >= end ||
                           happened(m.reports[state.step % 2].done);
        while (reported < state.step - (drain ? 0 : 1)) report(++reported);
    }
    log.finish();
    saver.finish();
    if (!bad.empty()) throw Error(bad);
    if (!saver.failure.empty())
        trouble = format("training: ended after step %lld, but its last checkpoint could not be saved: %s",
                         (long long)end, saver.failure.c_str());
    if (end > begun) print_use(m, memory_before, sent, o.grad_accum);
    if (stopping && trouble.empty())
        printf("asked to stop: saved after step %lld in %s; --resume goes on\n", (long long)end,
               (o.out + "/" + checkpoint_name(end)).c_str());
    return end == S;
}

// What is kept where, with micro-batches of B sequences.
Storage storage_of(const Options& o, int B) {
    Storage s = o.storage;
    s.zero = s.ranks > 1 ? o.zero : 0;
    const int64_t micro = o.total_batch ? o.total_batch / (int64_t(B) * s.ranks) : o.grad_accum;
    s.whole_gradients = micro > 1 && !o.reduce_each;
    return s;
}

// The largest micro-batch, a divisor of a rank's share of --total-batch unless that is 0, whose plan fits into `room`
// bytes; 0 if none.
int largest_batch(const Options& o, size_t room) {
    int64_t fits = 0, fails = 1;
    auto needs = [&](int64_t B) {
        Model m;
        plan(m, o.config, int(B), true, storage_of(o, int(B)));
        return m.arena.used;
    };
    const int64_t share = o.total_batch / o.storage.ranks;
    const int64_t most = std::min<int64_t>(share ? share : 1 << 20, (1 << 30) / o.config.T);
    if (share && needs(most) <= room) return int(most);  // one micro-batch may need less than two
    while (fails <= most && needs(fails) <= room) fits = fails, fails *= 2;
    fails = std::min(fails, most + 1);
    while (fails - fits > 1) {
        const int64_t middle = (fits + fails) / 2;
        (needs(middle) <= room ? fits : fails) = middle;
    }
    while (share && fits > 0 && share % fits) fits--;
    return int(fits);
}

// Settles --batch-size auto, --total-batch and what follows from them; room: the device's free bytes.
void choose_batch(Options& o, size_t room) {
    const int n = o.storage.ranks;
    if (o.total_batch % n)
        throw Error(
            format("--total-batch: %d sequences cannot be shared by %d ranks. Choose a multiple.", o.total_batch, n));
    if (o.batch_size == 0)
        o.batch_size = std::max(1, largest_batch(o, room));  // if not even 1 fits, create() says what would help
    if (o.total_batch % (int64_t(o.batch_size) * n))
        throw Error(
            format("--total-batch: %d sequences are no multiple of --batch-size %d%s. Choose a divisor, or auto.",
                   o.total_batch, o.batch_size, n > 1 ? format(" on %d ranks", n).c_str() : ""));
    o.storage = storage_of(o, o.batch_size);
    if (o.total_batch) o.grad_accum = o.total_batch / (o.batch_size * n);
}

// Has the matmuls' algorithms chosen, unless there is only one. A rank's choices lie in a file beside the log; a run
// takes them from there, resumed or not, if every rank can.
void settle_matmuls(Model& m, const std::string& path, bool resumed) {
    const Config& c = m.c;
    const Matmul::Shape one = {false, true, int(m.N()), c.QKV(), c.C, CUDA_FLOATX};
    if (ranks.most(double(matmul.plan(one).algos.size())) < 2) return;
    const bool there =
        access(path.c_str(), R_OK) == 0 && matmul.take_choices(read_file(path)) && matmul.chosen.count(one);
    if (ranks.least(there)) return matmul.forget_plans();
    matmul.chosen.clear(), matmul.ways.clear();
    if (resumed)
        printf("%s: is missing, or of another cuBLASLt or batch; matmuls are timed again, sums may round differently\n",
               path.c_str());
    const double begin = now();
    time_matmuls(m);
    OutFile file(path);
    file.write(matmul.choices());
    file.commit();
    printf("timed %zu matmuls in %.1f s\n", matmul.chosen.size(), now() - begin);
}

// Bytes of a checkpoint that are a rank's.
double saved_bytes(const Model& m) {
    const double width = sizeof(floatX) + 2 * m.m.width() + (BF16 && !m.storage.no_master ? sizeof(float) : 0);
    return width * double(m.table.shard_size());
}

void print_run(const Model& m, const Options& o) {
    const Config& c = m.c;
    const auto fields = config_fields(c, o.storage);
    printf("%s %s, %s: dim %d, %d layers, %d heads of %d (%d key/value), hidden %d, vocabulary %d, T %d; %s\n",
           fields[0].second.c_str(), fields[1].second.c_str(), fields[2].second.c_str(), c.C, c.L, c.NH, c.HS(), c.NKV,
           c.F(), c.V, c.T, PRECISION);
    const std::string many =
        o.storage.ranks > 1 ? format(" on %d ranks, ZeRO %d", o.storage.ranks, o.storage.zero) : "";
    printf("%zu parameters; %lld steps of %d x %d sequences%s\n%s", m.table.parameters, (long long)o.steps,
           o.grad_accum, o.batch_size, many.c_str(), memory_plan(m).c_str());
    if (o.save_async) printf("  and on the host, for --save-async %10.1f MiB\n", saved_bytes(m) / 1048576.0);
}

void print_plan(Options& o) {
    const Device device = parse_device(o.device);
    device_sms = 132;  // sizes a little scratch; an H200's
    choose_batch(o, size_t(device.memory));
    Model m;
    plan(m, o.config, o.batch_size, true, o.storage);
    print_run(m, o);
    if (double(m.arena.used) > device.memory)
        printf("  does not fit into the %.0f GiB of %s. %s\n", device.memory / (1 << 30), device.name.c_str(),
               advice(m, size_t(device.memory)).c_str());
    printf("%s", speed_of_light(m, o.grad_accum, device).c_str());
    const double seconds = least_seconds(m, o.grad_accum, device) * double(o.steps);
    printf("  %lld steps take at least %s, %.3g %s hours on %d of them; the rate that is reached divides that\n",
           (long long)o.steps, duration(seconds).c_str(), seconds / 3600 * o.storage.ranks, BF16 ? "GPU" : "device",
           o.storage.ranks);
}

// Settles the model's shape, also by the tokenizer and the files that the options name.
void settle_model(Options& o, std::unique_ptr<Tokenizer>& tokenizer) {
    Config& c = o.config;
    if (!o.tokenizer.empty()) {
        tokenizer.reset(new Tokenizer(Tokenizer::load(o.tokenizer)));
        if (!o.vocab_given) c.V = tokenizer->vocab_size();
        if (tokenizer->vocab_size() > c.V)
            throw Error(
                format("--tokenizer: has %d tokens, --vocab-size is %d. Raise it.", tokenizer->vocab_size(), c.V));
    }
    if (c.backbone == Backbone::nanogpt && !o.init_from.empty() && !o.positions_given) {
        for (const std::string& path : weight_files(o.init_from)) {
            Safetensors file(path);
            auto found = file.entries.find("wpe.weight");
            if (found != file.entries.end() && found->second.shape.size() == 2) c.max_T = int(found->second.shape[0]);
        }
    }
    finish(c);
}

// Settles what else training needs.
void settle_options(Options& o, const World& world, std::unique_ptr<Tokenizer>& tokenizer) {
    settle_model(o, tokenizer);
    if (o.sample_every && !tokenizer)
        throw Error("--sample-every: needs a tokenizer. Add --tokenizer bytes or the file of the data's tokenizer.");
    if ((o.steps > 0 || o.probe) && o.train_data.empty() && !o.plan)
        throw Error("--train-data: is missing. Give token shards, made by dev/data/prepare.py (README, Data).");
    if (o.warmup > o.steps) throw Error("--warmup: is longer than --steps. Shorten it.");
    if (o.warmup < 0) o.warmup = o.steps / 100;
    if (o.storage.no_master && !BF16) throw Error("--no-master: the fp32 build has none. Leave it out.");
    if (o.storage.half_gradients && !BF16)
        throw Error("--gradients: the fp32 build's are fp32. Leave it out, or make PRECISION=bf16.");
    if (o.val_every > 0 && o.val_data.empty())
        throw Error("--val-every: needs --val-data. Give it, or leave both out.");
    if (o.probe && world.size > 1)
        throw Error("--probe: is for one rank. Probe a checkpoint: --init-from DIR --steps 0 --probe 1.");
    o.storage.probe = o.probe > 0;
    if (o.graph && world.size > 1) throw Error("--graph: is for one rank. Leave it out.");
    o.storage.ranks = o.plan && o.ranks ? o.ranks : world.size;
    o.adamw.seed = o.seed;
}

// Brings the ranks together and opens the device; one rank is alone.
void open_job(const Options& o, const World& world) {
    std::function<void(void*, size_t)> broadcast;
#ifdef USE_MPI
    if (world.size > 1 && strcmp(world.launcher, BUILT_WITH) == 0 && o.rendezvous.empty()) {
        int level = 0, size = 0;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level);
        MPI_Comm_size(MPI_COMM_WORLD, &size);
        if (size == world.size)
            broadcast = [](void* p, size_t bytes) { MPI_Bcast(p, int(bytes), MPI_BYTE, 0, MPI_COMM_WORLD); };
    }
#endif
    std::string id(sizeof(ncclUniqueId), 0);
    ncclUniqueId nccl = {};
    if (world.size > 1 && world.rank == 0) {
        CHECK_NCCL(ncclGetUniqueId(&nccl));
        memcpy(&id[0], &nccl, sizeof(nccl));
    }
    job.open(world, o.rendezvous, o.timeout, broadcast, id);
    memcpy(&nccl, id.data(), sizeof(nccl));
    job.progress("opening the device", 0);
    open_device(world.local);
    if (world.size == 1) return;
    job.progress("opening NCCL", 0);
    ranks.open(nccl, world.rank, world.size);
    job.set_check([] {
        ncclResult_t status = ncclSuccess;
        ncclCommGetAsyncError(ranks.comm, &status);
        return status == ncclSuccess || status == ncclInProgress
                   ? std::string()
                   : format("NCCL: %s: %s", ncclGetErrorString(status), ncclGetLastError(ranks.comm));
    });
}

void close_job() {
    job.set_check(nullptr);
    ranks.close();
    job.close();
#ifdef USE_MPI
    int begun = 0, done = 0;
    MPI_Initialized(&begun);
    MPI_Finalized(&done);
    if (begun && !done) MPI_Finalize();
#endif
}

// The newest checkpoint whose files are as they were written; -1 if there is none at all. The ranks read a part each.
int64_t find_checkpoint(const std::string& out) {
    std::vector<int64_t> steps = list_checkpoints(out);
    bool any = false;
    if (DIR* d = opendir(out.c_str())) {
        while (dirent* e = readdir(d)) any |= strncmp(e->d_name, "damaged_step_", 13) == 0;
        closedir(d);
    }
    while (true) {
        const int64_t step = int64_t(ranks.exchange(steps.empty() ? any ? -2.0 : -1.0 : double(steps.back()))[0]);
        if (step == -2)
            throw Error(out +
                        ": none of its checkpoints is sound. Give another --out to begin anew, or repair the disk.");
        if (step == -1) return -1;
        const std::string dir = out + "/" + checkpoint_name(step), aside = out + "/damaged_" + checkpoint_name(step);
        std::string trouble;
        try {
            job.progress("verifying a checkpoint", 0);
            const int64_t held = verify_checkpoint(dir);
            if (held != step) throw Error(format("%s: holds step %lld, not its name's.", dir.c_str(), (long long)held));
        } catch (const Error& e) {
            trouble = e.what();
        }
        if (ranks.least(trouble.empty())) return step;
        // a trouble that all have, as with state.json, is told by the first
        const bool common = ranks.exchange(!trouble.empty())[0];
        if (!trouble.empty() && (ranks.rank == 0 || !common))
            warn(trouble + " Trying the checkpoint before it; this one is put aside as " + aside + ".");
        any = true;
        if (ranks.rank == 0) {
            remove_dir(aside);
            if (rename(dir.c_str(), aside.c_str()))
                throw Error(dir + ": cannot be put aside as " + aside + ": " + strerror(errno) + ". Move it away.");
        }
        while (!steps.empty() && steps.back() >= step) steps.pop_back();
    }
}

// One job at a time writes to a folder: two would take each other's unfinished checkpoints for leftovers. The lock is
// the kernel's and goes with the process.
void lock_folder(const std::string& out) {
    const int fd = open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw Error(out + ": cannot be opened: " + strerror(errno) + ". Check --out.");
    for (int tries = 0; flock(fd, LOCK_EX | LOCK_NB); tries++, ticks++) {  // one that is being ended gets ten seconds
        if (errno != EWOULDBLOCK && errno != EINTR) return;                // a file system without locks
        if (tries == 100) throw Error(out + ": another job is writing there. End it, or choose another --out.");
        usleep(100000);
    }
}

// Makes --out the job's own, and tells now what would fail after an hour.
void claim_folder(const Options& o) {
    if (o.out.empty()) throw Error("--out: is empty. Give a folder.");
    make_dirs(o.out);
    if (ranks.rank > 0) return;
    lock_folder(o.out);
    { OutFile probe(o.out + "/log.csv"); }
    if (!o.export_to.empty()) OutFile probe(o.export_to);
    if (!list_checkpoints(o.out).empty() && !o.resume)
        throw Error(o.out +
                    ": holds the checkpoints of an earlier run. Add --resume to continue it, or choose another --out.");
    remove_leftovers(o.out);
}

// Sets weights, AdamW's state and the place in the data (null: none): of the newest checkpoint with --resume, else
// those of the beginning.
TrainState set_state(Model& m, const Options& o, DataLoader* data) {
    TrainState state;
    state.seed = o.seed;
    const int64_t newest = o.resume ? find_checkpoint(o.out) : -1;
    job.progress("setting the weights", 0);
    if (newest < 0) {
        o.init_from.empty() ? initialize(m, o.seed) : import_weights(m, o.init_from);
    } else {
        const std::string dir = o.out + "/" + checkpoint_name(newest);
        state = load_checkpoint(m, dir);
        if (state.seed != o.seed)
            throw Error(
                format("%s: was begun with --seed %llu. Give the same.", dir.c_str(), (unsigned long long)state.seed));
        if (data) data->seek(state.loader);
        if (data && state.windows && state.windows != data->windows() && ranks.rank == 0)
            warn(
                format("%s: its run had %llu windows of data, --train-data has %llu. Give the same files, or windows "
                       "are seen twice or never.",
                       dir.c_str(), (unsigned long long)state.windows, (unsigned long long)data->windows()));
        printf("resumed from %s\n", dir.c_str());
        if (o.steps > 0 && state.step >= o.steps)
            printf("--steps %lld: are done; nothing is left to train, a larger number goes on\n", (long long)o.steps);
    }
    if (data) state.windows = data->windows();
    return state;
}

void run(Options& o, const World& world) {
    const Config& c = o.config;
    std::unique_ptr<Tokenizer> tokenizer;
    // who reads the lines may go before the last save, as tee at Ctrl-C; a limit of file sizes is a full disk
    for (int number : {SIGPIPE, SIGXFSZ}) signal(number, SIG_IGN);
    open_job(o, world);
    settle_options(o, world, tokenizer);
    if (ranks.rank > 0 && !freopen("/dev/null", "w", stdout)) throw Error("/dev/null: cannot be opened.");
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    const double used_before = memory_used();
    // with several ranks a GiB is left to NCCL, which may take more later
    const double reserve = ranks.size > 1 && !SERIAL ? 1 << 30 : 0;
    choose_batch(o, size_t(std::max(0.0, ranks.least(double(free)) - reserve)));

    const int B = o.batch_size, n = ranks.size;
    std::unique_ptr<DataLoader> data, val;
    if (o.steps > 0 || o.probe) data.reset(new DataLoader(o.train_data, B, c.T, c.V, o.shuffle, o.seed, ranks.rank, n));
    if (data && !o.val_data.empty()) val.reset(new DataLoader(o.val_data, B, c.T, c.V, false, 0, ranks.rank, n));
    if (val && o.val_every < 0) o.val_every = int(std::max<int64_t>(1, o.steps / 10));
    claim_folder(o);

    Model m;
    plan(m, c, B, true, o.storage);
    print_run(m, o);
    fflush(stdout);
    job.progress("allocating memory", 0);
    create(m);
    m.use_graphs = o.graph;
    const TrainState state = set_state(m, o, data.get());
    const std::string choices = ranks.rank ? format("/matmul_rank%d.txt", ranks.rank) : "/matmul.txt";
    bool finished = true;
    std::string trouble;
    if (data) {
        settle_matmuls(m, o.out + choices, state.step > 0);
        catch_signals();
        finished = train(m, o, *data, val.get(), tokenizer.get(), state, used_before, trouble);
    }
    job.progress("exporting the weights", o.steps);
    if (finished && !o.export_to.empty()) export_weights(m, o.export_to, o.export_half);
    if (!trouble.empty()) throw Error(trouble);
    destroy(m);
    matmul.close();
    close_job();
}

// ---------------------------------------------------------------------------------------------------------------------
// generate and eval

// The tokenizer that --tokenizer or else the checkpoint names. Eval does without one that is gone.
std::unique_ptr<Tokenizer> open_tokenizer(const Options& o, const Manifest& manifest) {
    const Json *name = manifest.json.find("tokenizer"), *hash = manifest.json.find("tokenizer_xxh64");
    const bool given = !o.tokenizer.empty();
    const std::string path = given ? o.tokenizer : name ? name->string : "";
    std::unique_ptr<Tokenizer> tokenizer;
    std::string trouble;
    if (path.empty()) return tokenizer;
    try {
        tokenizer.reset(new Tokenizer(Tokenizer::load(path)));
        if (hash && hash->string != tokenizer_hash(path)) trouble = path + ": is not the tokenizer that the run had.";
    } catch (const std::runtime_error& e) {
        trouble = e.what();
    }
    if (tokenizer && tokenizer->vocab_size() > o.config.V)
        throw Error(format("%s: has %d tokens, the model %d. Give the data's tokenizer with --tokenizer.", path.c_str(),
                           tokenizer->vocab_size(), o.config.V));
    if (trouble.empty()) return tokenizer;
    if (given ? !tokenizer : o.command == GENERATE)  // one that is given is taken, if it can be
        throw Error(trouble + " Give the data's tokenizer with --tokenizer.");
    warn(trouble + (given ? "" : " Without bits per byte; give the data's tokenizer with --tokenizer."));
    if (!given) tokenizer.reset();
    return tokenizer;
}

// Settles what runs: the model's shape and the tokenizer, as the checkpoint has them or the options say. Returns where
// the weights are.
std::string settle_weights(Options& o, std::unique_ptr<Tokenizer>& tokenizer) {
    Config& c = o.config;
    if (o.checkpoint.empty() == o.init_from.empty())
        throw Error(o.checkpoint.empty() ? "--checkpoint: is missing. Give the folder of a checkpoint or a run, or "
                                           "--init-from with the model's options."
                                         : "--init-from: --checkpoint has weights already. Leave one of them out.");
    if (o.checkpoint.empty()) {
        if (o.seq_len) c.T = o.seq_len;
        settle_model(o, tokenizer);
        return o.init_from;
    }
    if (!o.shape.empty()) throw Error(format("--%s: the checkpoint has its own. Leave it out.", o.shape[0]));
    std::string dir = find_weights(o.checkpoint);
    const Manifest manifest = read_manifest(dir);
    c = config_of(manifest, dir);
    if (o.seq_len && !c.gated() && o.seq_len > c.max_T)
        throw Error(format("--seq-len: the model has %d learned positions. Give at most that.", c.max_T));
    if (o.seq_len) c.T = o.seq_len;
    tokenizer = open_tokenizer(o, manifest);
    return dir;
}

// Memory and weights for what `m` plans; says on stderr what runs.
void open_weights(Model& m, const std::string& weights) {
    create(m);
    import_weights(m, weights);
    const auto fields = config_fields(m.c, m.storage);
    fprintf(stderr, "%s: %s %s, %zu parameters, %s; memory %.1f MiB\n", weights.c_str(), fields[0].second.c_str(),
            fields[1].second.c_str(), m.table.parameters, PRECISION, m.arena.used / 1048576.0);
}

void close_weights(Model& m) {
    destroy(m);
    matmul.close();
}

void put_text(const std::string& text) {  // all that went to stdout has arrived
    if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) || ferror(stdout))
        throw Error(std::string("stdout: cannot be written: ") + strerror(errno) + ".");
}

void run_generate(Options& o) {
    std::unique_ptr<Tokenizer> tokenizer;
    if (!o.prompt.empty() && !o.prompt_file.empty())
        throw Error("--prompt-file: --prompt is the prompt already. Leave one of them out.");
    if (o.sampling.temperature == 0.0f && o.num_samples > 1)
        throw Error(
            "--num-samples: at --temperature 0 all texts are the same. Leave it out, or raise the temperature.");
    const std::string weights = settle_weights(o, tokenizer);
    if (!tokenizer)
        throw Error(weights + ": does not say which tokenizer its data had. Add --tokenizer bytes or its file.");
    const std::string text = o.prompt_file.empty() ? o.prompt : read_file(o.prompt_file, true);
    const std::vector<int> encoded = tokenizer->encode(text);
    std::vector<int> prompt = {tokenizer->bos()};
    prompt.insert(prompt.end(), encoded.begin(), encoded.end());
    const int P = int(prompt.size()), T = o.config.T, B = o.num_samples;
    if (P > T)
        throw Error(format("--prompt: has %d tokens with BOS, the context %d. Shorten it%s.", P, T,
                           o.config.gated() ? ", or raise --seq-len" : ""));
    const int n = std::min(o.max_tokens, T - P + 1);  // the last one is not run

    open_device();
    Model m;
    m.cache.sequences = B, m.cache.room = P + n - 1;
    Config c = o.config;
    c.T = m.cache.room;  // tables and activations need no more
    plan(m, c, ceil_div(B, c.T), false);
    open_weights(m, weights);

    // the first text as it comes, the others when it is complete
    std::vector<std::string> texts(B);
    std::vector<Tokenizer::Stream> streams(B, Tokenizer::Stream(*tokenizer));
    for (int b = 0; b < B; b++)
        for (int id : prompt) streams[b].put(id, texts[b]);
    put_text(texts[0]);
    const double begin = now();
    double first = 0.0;
    int written = 0, ends = 0;
    generate(m, prompt, n, tokenizer->vocab_size(), o.sampling, o.seed, tokenizer->eos(), [&](int b, int id) {
        if (!written++) first = now();
        ends += id == tokenizer->eos();
        if (b == 0) texts[0].clear();
        streams[b].put(id, texts[b]);
        if (b == 0) put_text(texts[0]);
    });
    const double end = now();
    texts[0].clear();
    for (int b = 0; b < B; b++) {
        streams[b].end(texts[b]);
        put_text((b ? "---\n" : "") + texts[b] + "\n");
    }
    fprintf(stderr, "prompt: %d tokens in %.3f s, %.0f tokens/s; text: %d tokens", P, first - begin,
            P / (first - begin), written);
    if (written > B)
        fprintf(stderr, ", %.1f tokens/s", (written - B) / (end - first));  // the first of each came at once
    if (ends < B)
        fprintf(stderr, "; cut off %s",
                n < o.max_tokens ? format("at the end of the context of %d", T).c_str() : "at --max-tokens");
    fprintf(stderr, "\n");
    close_weights(m);
}

void run_eval(Options& o) {
    std::unique_ptr<Tokenizer> tokenizer;
    if (o.val_data.empty() && o.choices.empty())
        throw Error("--val-data: is missing, and so is --choices. Give what to evaluate on.");
    if (o.eval_batches && o.val_data.empty()) throw Error("--val-batches: needs --val-data. Give it.");
    const std::string weights = settle_weights(o, tokenizer);
    const Config& c = o.config;
    std::unique_ptr<DataLoader> data;
    if (!o.val_data.empty()) data.reset(new DataLoader(o.val_data, 1, c.T, c.V));
    std::vector<Question> questions;
    if (!o.choices.empty()) questions = read_questions(o.choices, c.V, c.T);
    open_device();
    Model m;
    plan(m, c, o.batch_size, false);
    open_weights(m, weights);
    std::string json = "{\"weights\": " + json_text(weights) + format(", \"seq_len\": %d", c.T);
    auto put = [&](const char* key, double value) { json += format(", \"%s\": ", key) + json_number(value); };
    if (data) {
        uint64_t windows = data->windows();
        if (o.eval_batches) windows = std::min(windows, uint64_t(o.eval_batches) * m.B);
        const Validation v = validation(m, *data, windows, tokenizer.get());
        const double loss = v.nats / double(v.tokens), bits = v.nats / log(2.0) / double(v.bytes);
        json += format(", \"tokens\": %llu", (unsigned long long)v.tokens);
        put("loss", loss), put("perplexity", exp(loss));
        fprintf(stderr, "validation: loss %.4f nats a token, perplexity %.4g, %llu tokens", loss, exp(loss),
                (unsigned long long)v.tokens);
        if (tokenizer) {
            json += format(", \"bytes\": %llu", (unsigned long long)v.bytes);
            put("bits_per_byte", bits);
            fprintf(stderr, "; %.4f bits a byte, %llu bytes", bits, (unsigned long long)v.bytes);
        }
        fprintf(stderr, "\n");
    }
    if (!questions.empty()) {
        const std::vector<double> scores = log_likelihoods(m, questions);
        const double n = double(questions.size());
        json += format(", \"questions\": %zu", questions.size());
        fprintf(stderr, "choices: %zu questions", questions.size());
        auto report = [&](const std::string& key, const char* name, auto length) {
            const double a = accuracy(questions, scores, length), error = sqrt(a * (1 - a) / (n - 1));
            put(key.c_str(), a), put((key + "_stderr").c_str(), error);
            fprintf(stderr, "; %s %.4f%s", name, a, n > 1 ? format(" +- %.4f", error).c_str() : "");
        };
        using Ids = std::vector<int>;
        report("acc", "accuracy", [](const Ids&) { return 1.0; });
        report("acc_per_token", "by tokens", [](const Ids& ids) { return double(ids.size()); });
        if (tokenizer)
            report("acc_per_byte", "by bytes", [&](const Ids& ids) {
                const std::string text = tokenizer->decode(ids);
                return std::max(1.0, double(text.size()) - (text[0] == ' '));
            });
        fprintf(stderr, "\n");
    }
    put_text(json + "}\n");
    close_weights(m);
}

#ifndef TESTING  // test_gpt.cu has its own
int main(int argc, char** argv) {
    int fd = open("/dev/null", O_RDONLY);  // where 0, 1 or 2 is closed, no file gets its number and what is printed
    while (fd >= 0 && fd <= STDERR_FILENO) fd = open("/dev/null", O_RDONLY);
    if (fd >= 0) close(fd);
    World world;
    Options o;
    try {
        world = find_world();
        if (!parse_options(o, argc, argv)) return put_text(""), 0;
        if (o.command != TRAIN) {
            if (world.size > 1)
                throw Error(format("%s: runs on one rank, %d were started. Start it without %s.",
                                   COMMANDS.at(o.command), world.size, world.launcher));
            o.command == GENERATE ? run_generate(o) : run_eval(o);
            return 0;
        }
        if (o.plan) {
            std::unique_ptr<Tokenizer> tokenizer;
            settle_options(o, world, tokenizer);
            print_plan(o), put_text("");
            return 0;
        }
        if (world.size > 1 && !o.rendezvous.empty()) host_and_port(o.rendezvous);
        if (world.size > 1 && strstr(world.launcher, "MPI") && strcmp(world.launcher, BUILT_WITH) &&
            o.rendezvous.empty() && !getenv("MASTER_ADDR") && !getenv("SLURM_JOB_ID"))
            throw Error(
                format("MPI: started by %s, but built with %s. Take mpicxx and mpirun of one MPI; GPU builds "
                       "can do with --rendezvous HOST:PORT.",
                       world.launcher, BUILT_WITH));
    } catch (const std::exception& e) {  // the same on every rank: one says it
        fflush(stdout);
        if (world.rank == 0) fprintf(stderr, "train_gpt: %s\n", reason(e).c_str());
        return 1;
    }
    try {
        run(o, world);
    } catch (const std::exception& e) {
        fflush(stdout);
        job.fail(reason(e));
    }
    return 0;
}
#endif
