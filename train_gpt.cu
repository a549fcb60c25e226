// SimpleGPT: the model, its kernels, the optimizer, the training loop. Trains on GPUs (nvcc) or, unchanged, on a CPU
// through the stand-in in dev/cpu (g++). Read it from top to bottom; every section has a heading of its own:
//
//   configuration   tensor table   embedding   matmul      attention       head and loss
//   the model       memory         weights     ranks       the block       forward and backward
//   optimizer       training       main
//
// SimpleNorm itself is in simplenorm.cuh. What makes kernels fast lies in dev/device/, what a long run needs (files,
// checkpoints, options, the ranks' meeting) in dev/run/, what one does with a model (text, evaluation, plans) in
// dev/use/.
//
// Shapes: B batch, T sequence length, N = B T tokens, C width, V vocabulary, Vp padded, L layers, NH query heads, NKV
// key/value heads, HS head size, F feed-forward width; QKV = (NH + 2 NKV) HS, FF = 2 F (nanogpt: F). Activations are
// row-major. `d` before a name is its gradient.
//
// Whoever needs the model includes this file; what stands behind TRAIN_GPT's #endif is compiled only if this file
// itself is what is compiled.
#ifndef TRAIN_GPT
#define TRAIN_GPT
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dev/device/attention_hopper.cuh"
#include "dev/device/batch.cuh"
#include "dev/device/gpu.cuh"
#include "dev/run/ranks.h"
#include "simplenorm.cuh"

// =====================================================================================================================
// Configuration. A flavour is a preset of these numbers; each has an option (dev/run/options.h).

// The words are the values of options, and what checkpoints and exports store; the enum is their index.
typedef std::vector<std::string> Words;
enum class Backbone { llama, nanogpt };
const Words BACKBONES = {"llama", "nanogpt"};
enum class Variant { simplegpt, prenorm, preqknorm };
const Words VARIANTS = {"simplegpt", "prenorm", "preqknorm"}, NORMS = {"rmsnorm", "layernorm"};

// RoPE stretched to contexts longer than those it was trained on, as Llama 3.1 and 3.2 have it. Factor 1: it is not.
struct RopeScaling {
    float factor = 1.0f, low = 1.0f, high = 4.0f;
    int original = 8192;  // tokens of the contexts before
};

struct Config {
    Backbone backbone = Backbone::llama;
    Variant variant = Variant::simplegpt;
    bool layernorm = false;               // norm: RMSNorm, or LayerNorm without bias
    int C = 256, L = 6, NH = 4, NKV = 0;  // dim, layers, heads, kv-heads (0: as many as heads)
    int V = 32000;                        // vocab-size
    float ffn_mult = 1.0f;
    int multiple_of = 256;
    int hidden = 0;  // the feed-forward width; 0: by the formula (checkpoints know the width alone)
    float rope_theta = 1e4f;
    RopeScaling rope_scaling;
    float norm_eps = 1e-5f;
    int T = 1024;   // seq-len
    int max_T = 0;  // max-seq-len: rows of the learned positions (nanogpt); 0: T

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
    int F() const { return int(wide_F()); }             // finish() checks that it fits
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
    // name, C, L, NH, NKV, V, ffn_mult, multiple_of, rope_theta, backbone
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
        c.NKV = f.NKV == f.NH ? 0 : f.NKV;  // 0: as many as heads, also where these are changed
        c.ffn_mult = f.ffn_mult, c.multiple_of = f.multiple_of, c.rope_theta = f.rope_theta;
        return;
    }
    std::string names;
    for (const Flavour& f : FLAVOURS) names += (names.empty() ? "" : ", ") + std::string(f.name);
    throw Error("model: unknown flavour '" + name + "'. Known are " + names + ".");
}

// Completes the defaults that depend on other numbers, refuses what cannot be built: "name: what. What to do."
void finish(Config& c) {
    auto positive = [](const char* name, int64_t value, int64_t most = 1 << 28) {
        if (value < 1 || value > most)
            throw Error(format("%s: %lld is out of range. Give a number from 1 to %lld.", name, (long long)value,
                               (long long)most));
    };
    positive("dim", c.C, 1 << 20);
    positive("layers", c.L, 1 << 16);
    positive("heads", c.NH, 1 << 16);
    positive("vocab-size", c.V);
    positive("seq-len", c.T, 1 << 24);
    positive("multiple-of", c.multiple_of, 1 << 24);
    if (!(c.ffn_mult > 0 && c.ffn_mult < 1000))
        throw Error("ffn-mult: must be above 0 and below 1000. 1 keeps the width 8/3 dim.");
    if (c.hidden) positive("hidden", c.hidden);
    positive("ffn-mult: the feed-forward width", c.wide_F());
    if (c.NKV == 0) c.NKV = c.NH;
    positive("kv-heads", c.NKV, 1 << 16);
    if (c.max_T == 0 || c.gated()) c.max_T = c.T;  // RoPE has no table to run out of
    positive("max-seq-len", c.max_T, 1 << 24);
    if (c.max_T < c.T)
        throw Error(format("max-seq-len: %d positions are fewer than seq-len %d. Raise it.", c.max_T, c.T));
    if (!(c.norm_eps > 0 && c.norm_eps <= 1))
        throw Error("norm-eps: must be above 0 and at most 1. The paper uses 1e-5.");
    if (!(c.rope_theta > 0 && c.rope_theta < INFINITY))
        throw Error("rope-theta: must be above 0. Llama 2 uses 1e4, Llama 3 5e5.");
    const RopeScaling& r = c.rope_scaling;
    if (!(r.factor >= 1 && r.low > 0 && r.low < r.high && r.original > 0) || (r.factor > 1 && !c.gated()))
        throw Error("rope-scaling: is for the llama backbone, FACTOR >= 1, 0 < LOW < HIGH, TOKENS >= 1. Change it.");
    if (c.C % c.NH)
        throw Error(format("dim: %d is not divisible by %d heads. Choose dim = heads x head size.", c.C, c.NH));
    if (c.HS() % 8 || c.HS() > 256)
        throw Error(
            format("heads: dim %d over %d heads gives head size %d, which attention lacks. "
                   "Choose a multiple of 8 up to 256.",
                   c.C, c.NH, c.HS()));
    if (c.NH % c.NKV)
        throw Error(format("kv-heads: %d heads cannot share %d key/value heads. Choose a divisor.", c.NH, c.NKV));
    if (c.backbone == Backbone::nanogpt && c.NKV != c.NH)
        throw Error("kv-heads: the nanogpt backbone is multi-head. Give as many as heads, or leave it out.");
    const double parameters =
        (2.0 * c.V + c.max_T) * c.C + double(c.L) * c.C * (double(c.QKV()) + c.C + c.FF() + c.F() + 8);
    if (parameters > 1e15)  // sums of sizes then stay far from 2^64
        throw Error(format("layers: %.2g parameters are too many. Make the model smaller.", parameters));
    if (BF16 && c.F() % 8)
        throw Error(
            format("multiple-of: hidden width %d is no multiple of 8, which tensor cores need. "
                   "Give a multiple of 8.",
                   c.F()));
}

// By how much RoPE turns pair i from token to token: theta^(-2i/HS), in float32 as the paper's code. Scaled, waves
// longer than original / low tokens turn 1/factor as fast, shorter than original / high as before, others between that.
float rope_frequency(const Config& c, int i) {
    const RopeScaling& r = c.rope_scaling;
    const float f = 1.0f / powf(c.rope_theta, float(2 * i) / c.HS()), wave = float(2 * M_PI) / f;
    const float kept = std::clamp((r.original / wave - r.low) / (r.high - r.low), 0.0f, 1.0f);
    return r.factor == 1 ? f : (1.0f - kept) * f / r.factor + kept * f;
}

// What memory is spent on. Recompute: the activations that the forward does not keep and the backward makes again. Each
// level drops more; kept a token and layer of simplegpt, with d = C, k = NKV HS, f = F:
//   none   everything                                                                      7d + 4k + 3f
//   norm   not what norms, RoPE, SwiGLU and the residual add in the middle make            5d + 2k + 2f
//   ffn    nor the outputs of w1 and w3                                                    5d + 2k
//   block  only the block's input and the output of w2, which the norm behind it needs     2d
// The few floats a row (stats of norms; lse, but at block) are kept beside that.
enum class Recompute { none, norm, ffn, block };
const Words RECOMPUTE = {"none", "norm", "ffn", "block"};

struct Storage {
    Recompute recompute = Recompute::none;
    bool half_gradients = false;  // in bf16: 2 bytes a parameter instead of 4, each micro-batch's sum rounded
    bool half_moments = false;    // AdamW's moments in bf16, rounded at random: 4 bytes a parameter, not 8
    bool no_master = false;       // no float weights beside the bf16 ones, which are rounded at random: 4 bytes less
    int bos = -1;                 // of --documents separate, else -1
    bool probe = false;           // room for the probe's directions and copies of what it displaces
    // ZeRO (Rajbhandari et al. 2020): of `ranks` ranks each keeps 1/ranks of nothing (0), of masters and moments (1),
    // of gradients too (2), of weights too (3).
    int rank = 0, ranks = 1, zero = 0;  // as planned: ranks.rank and ranks.size are those of the running job
    bool whole_gradients = false;       // gradients stay whole even so: summed over micro-batches, then reduced once

    bool has_master() const { return BF16 && !no_master; }
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
    size_t qkv, o, w13, w2;  // (QKV,C), (C,C), (FF,C), (C,F); w13 and w2 are fc and proj of nanogpt
    size_t qkv_gain, v_gain, o_gain, w13_gain, w2_gain;  // (QKV) from q's on, v's among them, (C), (FF), (C)
    size_t norm1, norm2;                                 // pre-norms (C)
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
    void align(size_t to = 64) { size = (size + to - 1) / to * to; }
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
        LayerOffsets at = {NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE};
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
        // here, and only here, the variants differ: everything else asks which of these there are
        if (simple) {
            at.qkv_gain = ones(q + gain, q_width);
            ones(k + gain, kv_width);
            at.v_gain = ones(v + gain, kv_width);
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
// Embedding: x[n,c] = tok[token[n],c] + pos[t,c]; pos only with learned positions, t = n mod T. One block a token,
// a thread its packs of the row (dev/device/rows.cuh).
// x (N,C) floatX; tok (Vp,C), pos (max_T,C) floatX, pos null for none; tokens (N) int.

template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS)
    embedding_forward_kernel(floatX* x, const int* tokens, const floatX* tok, const floatX* pos, const int2* spans,
                             int T, int C) {
    const size_t n = blockIdx.x, token = tokens[n], t = n % T - (spans ? spans[n].x : 0);
    if (SERIAL && n + 2 < gridDim.x) expect(tok + size_t(tokens[n + 2]) * C, C);
    PackReader a, b;
    PackWriter write;
    each<PACKS>(C, [&](int, int e, int c) {
        const float v = a(tok + token * C + c, e);
        write(x + n * C + c, e, pos ? v + b(pos + t * C + c, e) : v);
    });
}

void embedding_forward(floatX* x, const int* tokens, const floatX* tok, const floatX* pos, const int2* spans, int N,
                       int T, int C, const Gpu& gpu) {
    row_shape(C, [&](auto packs, int threads) {
        constexpr int P = packs.value;
        embedding_forward_kernel<P><<<N, threads, 0, gpu.stream>>>(x, tokens, tok, pos, spans, T, C);
    });
    CHECK(cudaGetLastError());
}

// dtok[token,c] += sum over its places n of dx[n,c]. One block a token that occurs; blocks beyond those have no places.
// dtok (Vp,C) G; dx (N,C) floatX; tokens, places (N), begin (blocks+1) int. Threads stride over the columns.
template <typename G>
__global__ void embedding_backward_kernel(G* dtok, const floatX* dx, const int* tokens, const int* places,
                                          const int* begin, int C) {
    int first = begin[blockIdx.x], last = begin[blockIdx.x + 1];
    if (first == last) return;
    G* out = dtok + size_t(tokens[places[first]]) * C;
    if (const size_t soon = places[min(last + 1, begin[gridDim.x] - 1)]; SERIAL)
        expect(dx + soon * C, C), expect(dtok + size_t(tokens[soon]) * C, C);
    constexpr int OWN = SERIAL ? 64 : 1;  // columns at a time, to be vectorised
    for (int c = threadIdx.x * OWN; c < C; c += blockDim.x * OWN) {
        float sum[OWN] = {};
        const int columns = min(OWN, C - c);
        for (int j = 0; j < columns; j++) sum[j] = out[c + j];
        for (int i = first; i < last; i++)
            for (int j = 0; j < columns; j++) sum[j] += float(dx[size_t(places[i]) * C + c + j]);
        for (int j = 0; j < columns; j++) out[c + j] = sum[j];
    }
}

// dpos[t,c] += sum_b dx[b,t,c]; with spans over all tokens that are the t-th of their document. One block a position,
// threads stride over the columns. dpos (max_T,C) G; dx (B,T,C).
template <typename G>
__global__ void position_backward_kernel(G* dpos, const floatX* dx, const int2* spans, int B, int T, int C) {
    const int t = blockIdx.x;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = dpos[size_t(t) * C + c];
        for (int n = t; n < B * T; n += spans ? 1 : T)
            if (!spans || n % T - spans[n].x == t) sum += float(dx[size_t(n) * C + c]);
        dpos[size_t(t) * C + c] = sum;
    }
}

// tokens (N) int; places (N), begin (blocks+1): TokenPlaces on the device, begin filled up with N. blocks: as many as
// tokens occur, or more, so that it need not depend on the batch.
void embedding_backward(Flat dtok, Flat dpos, const floatX* dx, const int* tokens, const int* places, const int* begin,
                        const int2* spans, int blocks, int B, int T, int C, const Gpu& gpu) {
    dtok.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        embedding_backward_kernel<G><<<blocks, row_threads(C), 0, gpu.stream>>>(d, dx, tokens, places, begin, C);
    });
    CHECK(cudaGetLastError());
    if (!dpos.p) return;
    dpos.visit([&](auto* d) {
        using G = std::decay_t<decltype(*d)>;
        position_backward_kernel<G><<<T, row_threads(C), 0, gpu.stream>>>(d, dx, spans, B, T, C);
    });
    CHECK(cudaGetLastError());
}

// =====================================================================================================================
// Matmul through cuBLASLt (on a CPU oneDNN or OpenBLAS): D (m,n) = op(A) op(B) + beta D, all row-major, accumulated
// in float. op(A) is (m,k): A is stored (m,k), or (k,m) if transA;
// op(B) is (k,n): B is stored (k,n), or (n,k) if transB.

constexpr cudaDataType_t CUDA_FLOATX = BF16 ? CUDA_R_16BF : CUDA_R_32F;
constexpr size_t MATMUL_WORKSPACE = size_t(32) << 20;
constexpr uint32_t MATMUL_ALIGNMENT = 16;  // bytes, of every operand: the least is a row of C, which is a multiple of 8

inline void check_cublas(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw Error(format("%s:%d: %s: %s", file, line, call, cublasLtGetStatusName(status)));
}
#define CHECK_CUBLAS(call) check_cublas(call, #call, __FILE__, __LINE__)

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
// while `timing` is set, the fastest of its first 16, unless one is known already. Algorithms differ in the order of
// their sums, so a run keeps its choices (dev/run/job.h), and a resumed one has the same bits.
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
    int timed = 0;  // shapes, so far
    std::map<Shape, Plan> plans;
    std::map<Shape, cublasLtMatmulAlgo_t> chosen;  // by timing, here or in an earlier part of the run

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
        p.algos = known == chosen.end() ? candidates(p, shape) : std::vector<cublasLtMatmulAlgo_t>{known->second};
        return plans.emplace(shape, p).first->second;
    }

    // What the heuristic proposes, the best first.
    std::vector<cublasLtMatmulAlgo_t> candidates(const Plan& p, const Shape& shape) {
        cublasLtMatmulPreference_t preference = nullptr;
        CHECK_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
            CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof(value)));
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, MATMUL_WORKSPACE);
        // where k is split, the parts are added in float, not in D's type
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        for (auto operand : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(operand, MATMUL_ALIGNMENT);
        cublasLtMatmulHeuristicResult_t results[CANDIDATES];
        int count = 0;
        CHECK_CUBLAS(cublasLtMatmulAlgoGetHeuristic(handle, p.desc, p.first, p.second, p.out, p.out, preference,
                                                    CANDIDATES, results, &count));
        CHECK_CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
        std::vector<cublasLtMatmulAlgo_t> algos;
        for (int i = 0; i < count; i++)
            if (results[i].state == CUBLAS_STATUS_SUCCESS) algos.push_back(results[i].algo);
        if (algos.empty())
            throw Error(format("matmul: cuBLASLt has no algorithm for %d x %d x %d.", shape.m, shape.n, shape.k));
        return algos;
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
        timed++;
    }

    void open() {
        if (handle) return;
        CHECK_CUBLAS(cublasLtCreate(&handle));
        CHECK(cudaMalloc(&workspace, MATMUL_WORKSPACE));
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
        if (!handle) return;
        CHECK(cudaFree(workspace));
        CHECK_CUBLAS(cublasLtDestroy(handle));
        handle = nullptr;
    }

    void operator()(void* D, const floatX* A, const floatX* B, bool transA, bool transB, int m, int n, int k,
                    cudaDataType_t type, float beta, const Gpu& gpu) {
        const Shape shape = {transA, transB, m, n, k, int(type)};
        Plan& p = plan(shape);
        const float alpha = 1.0f;
        auto run = [&](const cublasLtMatmulAlgo_t& algo) {
            return cublasLtMatmul(handle, p.desc, &alpha, B, p.first, A, p.second, &beta, D, p.out, D, p.out, &algo,
                                  workspace, MATMUL_WORKSPACE, gpu.stream);
        };
        if (timing && p.algos.size() > 1) choose(p, shape, gpu.stream, run);
        cublasStatus_t status = run(p.algos[0]);
        const bool refused = status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE;
        if (refused && chosen.erase(shape)) {  // one from a file
            p.algos = candidates(p, shape);
            if (timing) choose(p, shape, gpu.stream, run);
            status = run(p.algos[0]);
        }
        check_cublas(status, "cublasLtMatmul", __FILE__, __LINE__);
    }
};
inline Matmul matmul;

// out (N,M) = inp (N,K) w^T, w (M,K) as a linear layer stores it
void linear_forward(floatX* out, const floatX* inp, const floatX* w, int N, int K, int M, const Gpu& gpu) {
    matmul(out, inp, w, false, true, N, M, K, CUDA_FLOATX, 0.0f, gpu);
}
// dinp (N,K) = dout (N,M) w, with `add` added to what was there; dw (M,K) = beta dw + dout^T inp
void linear_backward(floatX* dinp, bool add, Flat dw, float beta, const floatX* dout, const floatX* inp,
                     const floatX* w, int N, int K, int M, const Gpu& gpu) {
    matmul(dinp, dout, w, false, false, N, K, M, CUDA_FLOATX, add ? 1.0f : 0.0f, gpu);
    matmul(dw.p, dout, inp, true, false, M, K, N, dw.half ? CUDA_R_16BF : CUDA_R_32F, beta, gpu);
}

// =====================================================================================================================
// Causal attention, FlashAttention's way (Dao 2023): tiles of the scores live in registers, never in memory.
//   out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = scale q_i . k_j,   scale = 1 / sqrt(HS)
//   lse_i = log sum_j exp(s_ij),   over the keys j from 0, or with h.spans from i's document's first, to past + i
// q (B,NH,T,HS); k, v (B,NKV,room,HS), query head h reads k/v head h NKV / NH; out (B,T,NH HS); all floatX. lse
// (B,NH,T) float, kept for the backward. `past` keys are those of tokens before these (a cache, in generation); the
// backward knows none. Exponentials are powers of 2 of scores times `scale2` = scale log2(e). On Hopper, bf16 and head
// sizes 64 and 128 have kernels of their own (dev/device/attention_hopper.cuh). Heads lie in tiles of W >= HS columns,
// zero from HS on; W and the shapes of blocks are chosen in dev/device/attention.cuh.

// A warp has M queries, a block ROWS of one head, those with the most keys first; what a thread has of a tile says
// dev/device/tile.cuh.
template <int W, int WARPS, int M, int COLS>
__global__ void __launch_bounds__(WARPS* WARP_SIZE, BF16 ? 2 : 1)
    attention_forward_kernel(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                             float scale) {
    constexpr int ROWS = WARPS * M, SLOT = COLS * STRIDE<W>, THREADS = WARPS * WARP_SIZE;
    constexpr bool KEPT = BF16 && !SERIAL && W <= 64;  // registers that are left hold q
    extern __shared__ __align__(128) SharedX attention_smem[];
    SharedX *sq = attention_smem, *ring = sq + ROWS * STRIDE<W>;
    const int T = h.T, HS = h.HS, keys = h.past + T, tiles = ceil_div(T, ROWS);
    const Place place = attention_place(blockIdx.x, h.B * h.NH, tiles);
    const int b = place.head / h.NH, head = place.head % h.NH, row0 = (tiles - 1 - place.tile) * ROWS;
    const int first = warp() * M;  // this warp's rows in the block
    const size_t q_at = size_t(place.head) * T + row0,
                 kv_at = (size_t(b) * h.NKV + head / (h.NH / h.NKV)) * h.room * HS;
    auto document = [&](int t) { return h.spans ? h.spans[b * T + min(t, T - 1)].x : 0; };  // its first token
    const int begin = document(row0) / COLS, steps = ceil_div(min(h.past + row0 + ROWS, keys), COLS);

    // tile n of k0, v0, k1, v1, ..: where it comes from, where it lies
    auto source = [&](int n) { return (n % 2 ? v : k) + kv_at + size_t(n / 2 * COLS) * HS; };
    auto slot = [&](int n) { return ring + n % (FORWARD_AHEAD + 1) * SLOT; };
    auto fetch = [&](int n) {
        if (n < 2 * steps) load_tile<W, COLS, THREADS>(slot(n), source(n), HS, HS, keys - n / 2 * COLS);
        copy_commit();
    };
    auto stream = [&](int n) { return tile_home<W, COLS>(slot(n), source(n), HS, HS, keys - n / 2 * COLS); };
    load_transposed<W, ROWS, THREADS>(sq, q + q_at * HS, HS, HS, T - row0);
    for (int n = 0; n < FORWARD_AHEAD; n++) fetch(2 * begin + n);
    Left<W, M, KEPT> rows(sq, first);
    if (KEPT) {
        copy_wait<1>();
        __syncthreads();
        rows.keep();
    }

    typedef Tile<M, W> Out;
    typedef Tile<M, COLS, BY_COLUMN> Scores;
    const float scale2 = scale * LOG2E;
    Out acc;
    acc.zero();
    float top[Out::SLOTS], sum[Out::SLOTS];  // p are taken relative to 2^(scale2 top)
    for (int s = 0; s < Out::SLOTS; s++) top[s] = -INFINITY, sum[s] = 0.0f;
    for (int step = begin; step < steps; step++) {
        const int diagonal =
            h.past + row0 + first - step * COLS;  // the tile's columns up to row + diagonal are visible
        const bool some_visible = diagonal + M > 0 && document(row0 + first) < (step + 1) * COLS;
        const bool all_visible = diagonal >= COLS - 1;
        const Part part = diagonal > 0 ? ALL : LOWER;
        copy_wait<FORWARD_AHEAD / 2>();
        __syncthreads();  // this tile is here, and nobody reads the one before it any more
        fetch(2 * step + FORWARD_AHEAD);
        Scores p;
        if (some_visible) {
            mma_nt(p, rows, stream(2 * step), part);
            if (!all_visible) mask_scores(p, diagonal);
            if (document(row0 + first + M - 1) > step * COLS)
                mask_documents(p, h.spans + b * T, row0 + first, T, step * COLS);
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
        if (some_visible) mma_nn<W>(acc, p, stream(2 * step + 1), 0, part);
    }
    #pragma unroll
    for (int s = 0; s < Out::SLOTS; s++) {
        const float total = tile_row_sum(sum[s]);
        #pragma unroll
        for (int e = 0; e < acc.PER_ROW; e++) acc.at(s, e) *= 1.0f / total;
        if (acc.col(0) == 0 && row0 + first + acc.row(s) < T)
            lse[q_at + first + acc.row(s)] = scale * top[s] + logf(total);
    }
    store_tile(out + ((size_t(b) * T + row0 + first) * h.NH + head) * HS, size_t(h.NH) * HS, T - row0 - first, HS, acc,
               sq + first * STRIDE<W>);
}

// delta[b,h,t] = sum_d dout[b,t,h,d] out[b,t,h,d]: the softmax backward's row sum. One block a token; DELTA_LANES lanes
// a head, 16 bytes at a time. dout, out (B,T,NH HS) floatX; delta (B,NH,T) float. Zeroes the turns of the backward,
// here and on Hopper.
template <int W>
constexpr int DELTA_LANES = SERIAL          ? 1
                            : W / PACK >= 8 ? 8
                            : W / PACK >= 4 ? 4
                                            : 2;

template <int W>
__global__ void attention_delta_kernel(float* delta, int* turns, const floatX* dout, const floatX* out, Heads h) {
    constexpr int LANES = DELTA_LANES<W>;
    const int T = h.T, NH = h.NH, HS = h.HS;
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
        if (t % 16 == 0)
            for (int i = 0; i < 2; i++) turns[row * head_turns(T) + t / 16 * 2 + i] = 0;
    }
}

template <int W>
void attention_delta(float* delta, int* turns, const floatX* dout, const floatX* out, Heads h, const Gpu& gpu) {
    const int threads = std::min(256, (h.NH * DELTA_LANES<W> + 31) / 32 * 32);
    attention_delta_kernel<W><<<h.B * h.T, threads, 0, gpu.stream>>>(delta, turns, dout, out, h);
    CHECK(cudaGetLastError());
}

template <int W>
constexpr int BACKWARD_PARTS = SERIAL || W <= 128 ? 1 : 2;

// dv_j = sum_i p_ij dout_i,  dk_j = sum_i ds_ij q_i,  over the queries i that see j, of all heads that share k and v;
// dq_i = sum_j ds_ij k_j;   ds_ij = scale p_ij (dout_i . v_j - delta_i)
// One block KEYS keys of a k/v head; its score tiles are transposed: rows are keys, columns queries. Queries come from
// the last tile that sees them down to their own. dk and dv stay in registers, which have no room for more than 128
// columns: two blocks share wider ones, and both compute p and ds. dq, to which a block adds that its query sees, is in
// memory, summed in the order of the keys, so that all runs give the same bits: blocks take turns at a query tile,
// turns[PARTS tile + part] is whose it is. A block waits only for blocks of lower number, which are on the machine
// before it. Heads' first blocks start together, and each later one follows a tile behind, without waiting. sum (B NH,
// query tiles, COLS W) float, in the order of the threads' registers; turns (B NH, head_turns(T)), 0 at the start; the
// others in the forward's layouts, delta in that of lse. A warp has M of the keys. In the serial geometry one block
// does all keys of a head, in order.
template <int W, int WARPS, int M, int COLS>
__global__ void __launch_bounds__(WARPS* WARP_SIZE, 1)
    attention_backward_kernel(floatX* dq, floatX* dk, floatX* dv, float* sum, int* turns, const floatX* dout,
                              const floatX* q, const floatX* k, const floatX* v, const float* lse, const float* delta,
                              Heads h, float scale) {
    constexpr int LD = STRIDE<W>, KEYS = WARPS * M, THREADS = WARPS * WARP_SIZE;
    constexpr int PARTS = BACKWARD_PARTS<W>, OUT = W / PARTS;
    // dq's tile over the warps: 16 rows, and half of the columns if that is a multiple of 16, else some warps rest
    constexpr int DQ_ROWS = SERIAL ? COLS : 16, DQ_PARTS = SERIAL || OUT % 32 || KEYS <= COLS ? 1 : 2;
    constexpr int DQ_COLS = OUT / DQ_PARTS;
    extern __shared__ __align__(128) SharedX attention_smem[];
    SharedX *sv = attention_smem, *sk = sv + KEYS * LD, *skt = SERIAL ? sk + KEYS * LD : sk;  // skt: k transposed
    SharedX *sds = skt + KEYS * LD, *sq = sds + KEYS * STRIDE<COLS>, *sdo = sq + (BACKWARD_AHEAD + 1) * COLS * LD;
    float* stats = reinterpret_cast<float*>(sdo + (BACKWARD_AHEAD + 1) * COLS * LD);  // lse, delta

    const int T = h.T, HS = h.HS, NH = h.NH, NKV = h.NKV, group = NH / NKV;
    const int blocks = ceil_div(T, KEYS), tiles = ceil_div(T, COLS), places = h.B * NKV * PARTS;
    const Place place = attention_place(blockIdx.x, places, gridDim.x / places);
    const int kv_head = place.head / PARTS, out_part = place.head % PARTS, out_col = out_part * OUT;
    const int b = kv_head / NKV, head0 = kv_head % NKV * group, first = warp() * M;
    const int dq_row = warp() / DQ_PARTS * DQ_ROWS, dq_col = out_col + warp() % DQ_PARTS * DQ_COLS;
    const float scale2 = scale * LOG2E;
    for (int block = place.tile; block < (SERIAL ? blocks : place.tile + 1); block++) {
        const int row0 = block * KEYS;
        // the last tile of queries that see the last key
        const int last_tile = h.spans ? (h.spans[b * T + min(row0 + KEYS, T) - 1].y - 1) / COLS : tiles - 1;
        const int last_tiles = last_tile + 1 - row0 / COLS, steps = group * last_tiles;
        const size_t kv_at = (size_t(kv_head) * T + row0) * HS;
        auto step_head = [&](int step) { return size_t(b) * NH + head0 + step / last_tiles; };
        auto step_tile = [&](int step) { return last_tile - step % last_tiles; };
        auto slot = [&](int step) { return step % (BACKWARD_AHEAD + 1) * COLS; };
        auto source_q = [&](int step) { return q + (step_head(step) * T + step_tile(step) * COLS) * HS; };
        auto source_do = [&](int step) {
            return dout + ((size_t(b) * T + step_tile(step) * COLS) * NH + head0 + step / last_tiles) * HS;
        };
        auto fetch = [&](int step) {
            if (step < steps) {
                const int col0 = step_tile(step) * COLS;
                const size_t q_at = step_head(step) * T + col0;
                load_tile<W, COLS, THREADS>(sq + slot(step) * LD, source_q(step), HS, HS, T - col0);
                load_tile<W, COLS, THREADS>(sdo + slot(step) * LD, source_do(step), HS, size_t(NH) * HS, T - col0);
                for (int i = threadIdx.x; i < 2 * COLS; i += THREADS) {
                    const bool there = col0 + i % COLS < T;
                    copy_async<4>(stats + 2 * slot(step) + i, (i < COLS ? lse : delta) + q_at + (there ? i % COLS : 0),
                                  there);
                }
            }
            copy_commit();
        };
        load_transposed<W, KEYS, THREADS>(sv, v + kv_at, HS, HS, T - row0);
        load_transposed<W, KEYS, THREADS>(skt, k + kv_at, HS, HS, T - row0);
        if (SERIAL) load_tile<W, KEYS, THREADS>(sk, k + kv_at, HS, HS, T - row0);
        for (int step = 0; step < BACKWARD_AHEAD; step++) fetch(step);
        const SharedX* keys = tile_home<W, KEYS>(sk, k + kv_at, HS, HS, T - row0);
        Left<W, M, false> k_rows(skt, first), v_rows(sv, first);
        Tile<M, OUT> acc_k, acc_v;
        acc_k.zero();
        acc_v.zero();
        int* turn_to_pass = nullptr;
        for (int step = 0; step < steps; step++) {
            const int tile = step_tile(step), diagonal = row0 + first - tile * COLS;  // columns from row + diagonal on
            const int document = h.spans ? h.spans[b * T + tile * COLS].x : 0;  // the first query's, its first token
            const bool some_visible = diagonal < COLS && document < row0 + first + M;
            const bool all_visible = diagonal <= 1 - M;
            const Part part = all_visible ? ALL : UPPER;
            const int there = T - tile * COLS;
            const SharedX* tile_q = tile_home<W, COLS>(sq + slot(step) * LD, source_q(step), HS, HS, there);
            const SharedX* tile_do =
                tile_home<W, COLS>(sdo + slot(step) * LD, source_do(step), HS, size_t(NH) * HS, there);
            const float *tile_lse = stats + 2 * slot(step), *tile_delta = tile_lse + COLS;
            copy_wait<0>();
            __syncthreads();  // this tile is here; the last step is over: its tiles are read, its dq is written
            fetch(step + BACKWARD_AHEAD);
            Tile<M, COLS, BY_COLUMN> p, ds;
            if (some_visible) {
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
                if (!all_visible) {
                    #pragma unroll
                    for (int e = 0; e < p.PER_ROW; e++)
                        #pragma unroll
                        for (int s = 0; s < p.SLOTS; s++)
                            p.at(s, e) = p.col(e) >= p.row(s) + diagonal ? p.at(s, e) : 0.0f;
                }
                if (h.spans && h.spans[b * T + min(tile * COLS + COLS, T) - 1].x > row0 + first)
                    mask_queries(p, h.spans + b * T, tile * COLS, T, row0 + first);
                mma_nn<W>(acc_v, p, tile_do, out_col, part);
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
            if (turn_to_pass && threadIdx.x == 0) flag_write(turn_to_pass, block + 1);
            __syncthreads();

            int* turn = turns + step_head(step) * head_turns(T) + tile * PARTS + out_part;
            const bool adds = dq_row < COLS, ends = block == min(tile * COLS + COLS - 1, T - 1) / KEYS;
            float* part_sum = sum + ((step_head(step) * tiles + tile) * PARTS + out_part) * COLS * OUT +
                              size_t(warp()) * DQ_ROWS * DQ_COLS;
            Tile<DQ_ROWS, DQ_COLS> acc;
            acc.zero();
            if (adds && block > document / KEYS) {  // early, so that the loads take no time
                wait_for_turn(turn, block);
                #pragma unroll
                for (int i = 0; i < int(sizeof(acc.v) / 16); i++)
                    reinterpret_cast<float4*>(acc.v)[i] =
                        __ldcg(reinterpret_cast<const float4*>(part_sum) + i * WARP_SIZE + lane());
            }
            if (some_visible) mma_nn<W>(acc_k, ds, tile_q, out_col, part);
            if (adds) {
                mma_tn<COLS, W, KEYS>(acc, sds, dq_row, keys, dq_col, part);
                if (ends) {
                    #pragma unroll
                    for (int s = 0; s < acc.SLOTS; s++) {
                        const int t = tile * COLS + dq_row + acc.row(s);
                        floatX* row = dq + (step_head(step) * T + t) * HS + dq_col;
                        #pragma unroll
                        for (int e = 0; e < acc.PER_ROW; e += SERIAL ? 1 : 4)
                            store_columns(row, acc, s, e, scale, t < T ? HS - dq_col : 0);
                    }
                } else {
                    #pragma unroll
                    for (int i = 0; i < int(sizeof(acc.v) / 16); i++)
                        __stcg(reinterpret_cast<float4*>(part_sum) + i * WARP_SIZE + lane(),
                               reinterpret_cast<const float4*>(acc.v)[i]);
                }
            }
            turn_to_pass = ends ? nullptr : turn;
        }
        __syncthreads();
        if (turn_to_pass && threadIdx.x == 0) flag_write(turn_to_pass, block + 1);
        #pragma unroll
        for (float& x : acc_k.v) x *= scale;
        const size_t to = kv_at + size_t(first) * HS + out_col;
        store_tile(dk + to, HS, T - row0 - first, HS - out_col, acc_k, sk + first * LD);
        store_tile(dv + to, HS, T - row0 - first, HS - out_col, acc_v, sv + first * LD);
    }
}

void attention_forward(floatX* out, float* lse, const floatX* q, const floatX* k, const floatX* v, Heads h,
                       const Gpu& gpu) {
    if constexpr (BF16)
        if (gpu.hopper && h.room == h.T) {
            if (h.HS == 64) return attention_forward_hopper<64>(out, lse, q, k, v, h, gpu);
            if (h.HS == 128) return attention_forward_hopper<128>(out, lse, q, k, v, h, gpu);
        }
    with_tiles(h.HS, gpu, [&](auto width, auto) {
        constexpr int W = width.value;
        constexpr BlockShape shape = forward_shape(W);
        auto launch = [&](auto rows) {
            constexpr int M = rows.value, WARPS = shape.warps, COLS = shape.cols;
            constexpr int smem = forward_bytes(W, {WARPS, M, COLS}), tokens = WARPS * M;
            auto kernel = attention_forward_kernel<W, WARPS, M, COLS>;
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
            attention_forward_kernel<W, WARPS, M, COLS>
                <<<h.B * h.NH * ceil_div(h.T, tokens), WARPS * WARP_SIZE, smem, gpu.stream>>>(
                    out, lse, q, k, v, h, 1.0f / sqrtf(float(h.HS)));
            CHECK(cudaGetLastError());
        };
        // The serial geometry computes all rows of a tile, so few queries, a token in generation, get one of few rows.
        if constexpr (SERIAL)
            if (h.T <= 16) return launch(Constant<16>());
        launch(Constant<shape.rows>());
    });
}

// floats of attention_backward's scratch: the sums of dq in tiles of up to 128 queries, delta, the turns
size_t attention_scratch(Heads h) {
    size_t floats = 0;
    with_tiles(h.HS, Gpu(), [&](auto width, auto) {
        floats = size_t(h.B) * h.NH * (size_t(ceil_div(h.T, 128)) * 128 * width.value + h.T + head_turns(h.T));
    });
    return floats;
}

// scratch attention_scratch(h) floats; dq, dk, dv in the layouts of q, k, v, dout in that of out; no past
void attention_backward(floatX* dq, floatX* dk, floatX* dv, float* scratch, const floatX* dout, const floatX* out,
                        const floatX* q, const floatX* k, const floatX* v, const float* lse, Heads h, const Gpu& gpu) {
    with_tiles(h.HS, gpu, [&](auto width, auto shared) {
        constexpr int W = width.value;
        const size_t rows = size_t(h.B) * h.NH;
        float *sum = scratch, *delta = sum + rows * ceil_div(h.T, 128) * 128 * W;
        int* turns = reinterpret_cast<int*>(delta + rows * h.T);
        attention_delta<W>(delta, turns, dout, out, h, gpu);
        if constexpr (BF16 && (W == 64 || W == 128))
            if (gpu.hopper && h.HS == W)
                return attention_backward_hopper<W>(dq, dk, dv, sum, turns, dout, q, k, v, lse, delta, h, gpu);
        constexpr BlockShape shape = backward_shape(W, shared.value);
        constexpr int WARPS = shape.warps, M = shape.rows, COLS = shape.cols, smem = backward_bytes(W, shape);
        auto kernel = attention_backward_kernel<W, WARPS, M, COLS>;
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        const int blocks = h.B * h.NKV * BACKWARD_PARTS<W> * (SERIAL ? 1 : ceil_div(h.T, WARPS * M));
        attention_backward_kernel<W, WARPS, M, COLS><<<blocks, WARPS * WARP_SIZE, smem, gpu.stream>>>(
            dq, dk, dv, sum, turns, dout, q, k, v, lse, delta, h, 1.0f / sqrtf(float(h.HS)));
        CHECK(cudaGetLastError());
    });
}

// =====================================================================================================================
// Head and loss. The logits exist for a chunk of rows at a time, in floatX, and turn into their gradient in place:
//   loss[n] = lse - logit[target],   lse = log sum_v exp(logit[v])
//   dlogit[v] = weight (exp(logit[v] - lse) - [v = target])
// logits (rows,Vp) floatX, columns from V on are padding: not in the sum, gradient 0. losses (rows) float,
// targets (rows) int.
// One block a row, its threads stride over packs of 16 bytes. It reads the row twice, the second time from L2: maximum
// and sum in one pass, each thread's sum relative to its own maximum so far, then the gradient.

__global__ void __launch_bounds__(1024) cross_entropy_kernel(float* losses, floatX* logits, const int* targets, int V,
                                                             int Vp, float weight, bool backward) {
    const size_t n = blockIdx.x;
    floatX* x = logits + n * Vp;
    const int target = targets[n];
    const float target_logit = x[target];   // read by all before the barriers of block_max, so before it is overwritten
    constexpr bool KEPT = SERIAL && !BF16;  // the exponentials, in the logits' place
    Exponentials serial(V);
    float top = -INFINITY, sum = 0.0f;
    if constexpr (SERIAL) {
        sum = serial.sum(x, KEPT && backward);
        top = serial.top;
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
        serial.scale(x, weight / sum);
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
                   bool backward, const Gpu& gpu) {
    const int threads = std::min(1024, (Vp / PACK + 31) / 32 * 32);
    cross_entropy_kernel<<<rows, threads, 0, gpu.stream>>>(losses, logits, targets, V, Vp, weight, backward);
    CHECK(cudaGetLastError());
}

// mean[0] += weight sum_n losses[n], losses (N) float; one block, threads stride over n; in double, so that a long
// batch loses nothing
__global__ void loss_sum_kernel(float* mean, const float* losses, int N, float weight) {
    double sum = 0.0;
    for (int n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    sum = block_sum(sum);
    if (threadIdx.x == 0) mean[0] += float(sum * weight);
}

// =====================================================================================================================
// The model: parameters, gradients, activations, and all that they need on the device.

// What a layer leaves for its backward. N = B T rows each; x is the block's input, h its middle. What the layer does
// not keep (Recompute) lies in a place that all layers share.
struct LayerActivations {
    floatX *x, *h;                               // (N,C) residual stream
    floatX *n1, *n2;                             // (N,C) outputs of the pre-norms; x and h where the variant has none
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
            throw Error("memory: the plan passes 2^60 bytes. Choose a smaller model, shorter or fewer sequences.");
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
    int* batch = nullptr;  // tokens (N), targets (N), spans (N) of two, places (N), begin (N+1)
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

// Room for one unit whose weights or gradients are cut over the ranks. Layers use two slots in turn, so that the next
// layer is gathered, or the last one reduced, while this one computes; embedding and head share one unless they are
// tied.
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

// Room for keys and values of what `sequences` sequences have seen, for writing on: (L,sequences,NKV,room,HS) each.
// With sequences 0 there is none.
struct Cache {
    int sequences = 0, room = 0;
    floatX *k = nullptr, *v = nullptr;
};

struct Model {
    Config c;
    Storage storage;
    TensorTable table;
    int B = 0;  // sequences a micro-batch
    bool training = false;
    Gpu gpu;

    // flat buffers of the table's layout, or this rank's shard of them (Storage); master is null where the parameters
    // are their own masters (fp32, no_master); grads, m, v and master only exist for training
    floatX* params = nullptr;
    Flat grads, m, v;
    float* master = nullptr;
    Slot slots[SLOTS];
    std::vector<floatX*> unit_weights;  // where each unit's are when it computes: in params or a slot
    std::vector<Flat> unit_grads;       // and its gradients: in grads or a slot
    std::vector<cudaEvent_t> gathered;  // a unit's weights are there

    std::vector<LayerActivations> acts;
    floatX *out = nullptr, *normed = nullptr;  // (N,C) last residual, final norm
    float2* norm_stats = nullptr;              // (N)
    floatX* logits = nullptr;                  // (logit_rows,Vp)
    int logit_rows = 0;
    Cache cache;
    int past = 0, room = 0;  // of Heads, where a.k and a.v of the layers are the cache's; room 0: T
    Numbers* numbers = nullptr;
    float *losses = nullptr, *loss = nullptr, *grad_norm = nullptr;  // (N), and two of the numbers
    unsigned long long *hashes = nullptr, *hash_parts = nullptr;     // (ranks), (chunks)
    float *partial = nullptr, *square_sums = nullptr;
    float2* rope = nullptr;                                                          // (T,HS/2) cos, sin
    int *tokens = nullptr, *targets = nullptr, *places = nullptr, *begin = nullptr;  // (N) (N) (N) (N+1), neighbours,
    int2* spans = nullptr;                                                           // behind targets (N)

    // gradients of activations, shared by all layers
    floatX *dres = nullptr, *dbranch = nullptr, *datt = nullptr, *dnormed = nullptr;  // (N,C)
    floatX *dqkv_raw = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;          // (N,QKV), attention's layouts
    floatX *dw13_raw = nullptr, *dact = nullptr;                                      // (N,FF) (N,F)
    float* attention_scratch = nullptr;  // the backward's, see attention_scratch()
    // the probe's two directions, and a copy of the weights, or of a block's input with room for one more
    float *direction = nullptr, *previous = nullptr, *kept = nullptr;
    double* probe_sums = nullptr;  // (chunks) three times

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
    Piece piece(int unit) const { return table.piece(unit, storage.rank); }
    int units() const { return int(table.units.size()); }
    Slot& slot(int unit) {
        if (unit == units() - 1 && table.tied()) return slots[3];
        return slots[unit == 0 || unit == units() - 1 ? 0 : 1 + unit % 2];
    }
};

constexpr size_t CHUNK = 16384;  // elements a block of the flat kernels (norm, AdamW)
constexpr int PROBE_ROWS = 64;   // queries a block of the probe's
inline int chunks(size_t elements) { return int((elements + CHUNK - 1) / CHUNK); }

inline size_t batch_ints(size_t N) { return 6 * N + 1; }  // a batch: tokens, targets, spans, places, begin

// Bytes of the logits' place. Between steps units pass through it on their way to the host (get_unit), with room for
// 256 bytes of each rank's piece at the least.
size_t logits_bytes(const Model& m) {
    return std::max(m.logit_rows * size_t(m.c.Vp()) * sizeof(floatX), 256 * size_t(m.storage.ranks));
}

// =====================================================================================================================
// Memory: one walk over everything on the device, in three parts. plan() walks it to add up, create() to hand out.

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
        if (s.has_master()) a.take(m.master, section("master weights", "fp32", s.cut_state()));
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

// A tensor of LayerActivations: every layer has its own, or all share one place.
struct ActivationRow {
    std::function<void(Arena&, LayerActivations&)> take;
    std::function<void(LayerActivations&, const LayerActivations&)> share;
    bool kept;
    template <typename F>
    ActivationRow(F* LayerActivations::*tensor, size_t count, bool keep)
        : take([=](Arena& a, LayerActivations& l) { a.take(l.*tensor, count); }),
          share([=](LayerActivations& l, const LayerActivations& first) { l.*tensor = first.*tensor; }), kept(keep) {}
};

// What a layer leaves for its backward; without training nothing is kept. The last column is Recompute's table. A
// linear's raw output is kept at level none if a norm's backward reads it (other variants have none there), at the
// others since the replay begins with it.
void lay_out_activations(Model& m) {
    const Config& c = m.c;
    const size_t N = m.N(), C = c.C, QKV = c.QKV(), F = c.F(), FF = c.FF(), kv = size_t(c.NKV) * c.HS();
    const Recompute level = m.storage.recompute;
    // kept at level none only; up to norm; up to ffn
    const bool at_none = level == Recompute::none, to_norm = level <= Recompute::norm, to_ffn = level <= Recompute::ffn;
    const LayerOffsets& at = m.table.layers[0];  // which norms there are
    const bool pre_norms = at.norm1 != NONE;
    using A = LayerActivations;
    // clang-format off
    const ActivationRow rows[] = {
        // tensor        elements                 kept
        {&A::h,          N * C,                   at_none},                               // the stream in the middle
        {&A::n1,         pre_norms ? N * C : 0,   at_none},                               // pre-norms
        {&A::n2,         pre_norms ? N * C : 0,   at_none},
        {&A::qkv_raw,    N * QKV,                 at_none ? at.qkv_gain != NONE : to_ffn},// linear
        {&A::q,          N * C,                   at_none},                               // attention
        {&A::k,          N * kv,                  at_none},
        {&A::v,          N * kv,                  at_none},
        {&A::att,        N * C,                   to_ffn},
        {&A::lse,        N * c.NH,                to_ffn},
        {&A::o_raw,      N * C,                   at_none ? at.o_gain != NONE : to_ffn},  // linear
        {&A::w13_raw,    N * FF,                  to_norm},                               // linear
        {&A::act,        N * F,                   at_none},                               // w2's input
        {&A::w2_raw,     N * C,                   at.w2_gain != NONE},                    // linear
        {&A::qkv_stats,  3 * N,                   true},                                  // mean and rstd of rows
        {&A::o_stats,    N,                       true},
        {&A::w13_stats,  2 * N,                   true},
        {&A::w2_stats,   N,                       true},
        {&A::n1_stats,   N,                       true},
        {&A::n2_stats,   N,                       true},
    };
    // clang-format on
    Arena& a = m.arena;
    m.acts.assign(c.L, A());
    a.section(format("activations (recompute %s)", RECOMPUTE[int(level)].c_str()));
    for (int l = 0; l < c.L; l++)  // the blocks' inputs; without training by turns in two places
        if (m.training || l < 2)
            a.take(m.acts[l].x, N * C);
        else
            m.acts[l].x = m.acts[l - 2].x;
    for (const ActivationRow& row : rows)
        for (A& layer : m.acts)
            if (m.training && row.kept) row.take(a, layer);
    a.section("activations, one for all layers");
    for (const ActivationRow& row : rows) {
        if (m.training && row.kept) continue;
        row.take(a, m.acts[0]);
        for (A& layer : m.acts) row.share(layer, m.acts[0]);
    }
    for (A& layer : m.acts)
        if (!pre_norms) layer.n1 = layer.x, layer.n2 = layer.h;
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
    // 512 MiB of logits, of fp32 64
    m.logit_rows = int(std::min(N, std::max<size_t>(16, (size_t(1) << (BF16 ? 29 : 26)) / (Vp * sizeof(floatX)))));
    char* logits = nullptr;
    a.take(logits, logits_bytes(m));
    m.logits = reinterpret_cast<floatX*>(logits);
    if (m.cache.sequences) {
        a.section(format("key/value cache (%s)", PRECISION));
        if (double(c.L) * m.cache.sequences * m.cache.room * kv > 1e17)  // the product could pass 2^64
            throw Error("memory: the key/value cache is too large. Give fewer or shorter texts.");
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
    if (m.training) {
        a.take(m.square_sums, chunks(P) + m.units());
        if (s.ranks > 1) {
            a.take(m.hashes, s.ranks);
            a.take(m.hash_parts, chunks(P));
        }
        size_t partial = 0;
        for (auto [W, line_width] : {std::pair{c.C, c.C}, {c.C, c.QKV()}, {c.F(), c.FF()}})
            partial = std::max(partial, row_blocks(int(N), W, m.gpu) * size_t(line_width));
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
        const size_t tiles = m.B * size_t(c.NH) * ((c.T + PROBE_ROWS - 1) / PROBE_ROWS);
        a.take(m.probe_sums, std::max(2 * tiles, 3 * size_t(chunks(std::max(P, N * std::max(C, FF))))));
        if (!BF16) {
            for (float** p : {&m.direction, &m.previous}) a.take(*p, std::max(P, N * C));
            a.take(m.kept, std::max(P, 2 * N * C));
        }
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

// The GPU of number `local`, ready for matmuls.
Gpu open_device(int local = 0) {
    const Gpu gpu = find_device(local);
    matmul.open();
    return gpu;
}

// Plans the memory of B sequences of c.T tokens; nothing is allocated yet.
void plan(Model& m, const Gpu& gpu, const Config& config, int B, bool training, Storage storage = Storage()) {
    m.gpu = gpu;
    m.c = config;
    m.storage = storage;
    m.B = B;
    m.training = training;
    m.table = build_table(m.c, storage.ranks);
    if (double(B) * m.c.T > double(1 << 30))
        throw Error(format("batch-size: %d sequences of %d tokens are too many. Give fewer%s.", B, m.c.T,
                           training ? ", and more micro-batches" : ""));
    if (!SERIAL && (m.c.C > MAX_ROW || m.c.F() > MAX_FFN_ROW))
        throw Error(
            format("dim: width %d and hidden width %d are more than a block of threads holds, %d and %d. "
                   "Choose less.",
                   m.c.C, m.c.F(), MAX_ROW, MAX_FFN_ROW));
    lay_out(m);
}

struct OutOfMemory : Error {
    size_t free;
    OutOfMemory(size_t needed, size_t free)
        : Error(format("memory: the plan needs %.1f GiB, the device has %.1f GiB free.", needed / 1073741824.0,
                       free / 1073741824.0)),
          free(free) {}
};

// Allocates what was planned, or throws OutOfMemory.
void create(Model& m) {
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    if (m.arena.used > free || cudaMalloc(&m.memory, m.arena.used) != cudaSuccess)
        throw OutOfMemory(m.arena.used, std::min(free, m.arena.used - 1));  // what is free may lie in pieces
    m.arena.base = static_cast<char*>(m.memory);
    lay_out(m);
    CHECK(cudaStreamCreate(&m.gpu.stream));
    for (Staging& s : m.staging) {
        CHECK(cudaMallocHost(&s.batch, batch_ints(m.N()) * sizeof(int)));
        CHECK(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming));
        CHECK(cudaEventRecord(s.copied, m.gpu.stream));
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
    CHECK(cudaMemsetAsync(m.memory, 0, m.state_bytes, m.gpu.stream));
    CHECK(cudaMemsetAsync(m.numbers, 0, sizeof(Numbers), m.gpu.stream));
    if (m.rope) {  // (cos, sin) of t times the pair's frequency, a float
        const int half = m.c.HS() / 2;
        std::vector<float2> rope(size_t(m.c.T) * half);
        for (int i = 0; i < half; i++) {
            const float frequency = rope_frequency(m.c, i);
            for (int t = 0; t < m.c.T; t++) {
                double angle = float(t * frequency);
                rope[size_t(t) * half + i] = make_float2(float(cos(angle)), float(sin(angle)));
            }
        }
        CHECK(cudaMemcpy(m.rope, rope.data(), rope.size() * sizeof(float2), cudaMemcpyHostToDevice));
    }
    CHECK(cudaStreamSynchronize(m.gpu.stream));
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
    if (m.gpu.stream) CHECK(cudaStreamDestroy(m.gpu.stream));
    if (m.memory) CHECK(cudaFree(m.memory));
    m = Model();
}

// =====================================================================================================================
// Weights and where they are: flat, cut over the ranks or not.

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

// Waits until all that was launched is done.
void wait_for_device(const Model& m) {
    CHECK(cudaStreamSynchronize(m.gpu.stream));
    if (m.storage.ranks > 1) CHECK(cudaStreamSynchronize(ranks.stream));
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

// =====================================================================================================================
// Units over ranks. With one rank nothing here does anything but begin_gradients.

// Weights cut over ranks: unit u's to its slot, unless they are there or under way. The gather waits for the kernels
// that were launched before, the last readers of the slot's old unit.
void gather_weights(Model& m, int u) {
    Slot& s = m.slot(u);
    if (s.held == u) return;
    const Piece p = m.piece(u);
    ranks.order(ranks.stream, m.gpu.stream);
    ranks.all_gather(s.w, m.params + p.shard, p.size, NCCL_FLOATX, sizeof(floatX));
    CHECK(cudaEventRecord(m.gathered[u], ranks.stream));
    s.held = u;
}

// Before the model's stream uses unit u's weights: waits until they are there; `next` (-1: none) may come meanwhile.
void need_weights(Model& m, int u, int next) {
    if (m.storage.ranks == 1) return;
    if (m.storage.cut_weights()) gather_weights(m, u);
    CHECK(cudaStreamWaitEvent(m.gpu.stream, m.gathered[u], 0));
    if (m.storage.cut_weights() && next >= 0) gather_weights(m, next);
}

// Before unit u's gradients are written. In a step's first micro-batch, and where every micro-batch's are reduced, they
// begin anew: a matmul then overwrites its own (the beta returned is 0), and what is only ever added to is zeroed here,
// gains, embedding and positions. A tied embedding's gradient is begun before the head's backward, not at its own.
float begin_gradients(Model& m, int u, bool first) {
    if (m.storage.cut_gradients()) {
        CHECK(cudaStreamWaitEvent(m.gpu.stream, m.slot(u).reduced, 0));
        first = true;
    }
    if (!first) return 1.0f;
    const Unit& unit = m.table.units[u];
    size_t done = unit.begin;
    auto zero_to = [&](size_t end) {
        if (done < end) CHECK(cudaMemsetAsync(m.g(done).p, 0, (end - done) * m.grads.width(), m.gpu.stream));
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
    ranks.order(ranks.stream, m.gpu.stream);
    if (!m.storage.cut_state()) return ranks.all_reduce(all.p, unit.size, nccl_type(all), all.width());
    // the first micro-batch's sum goes straight to the shard; later ones to this rank's piece of the slot, and are
    // added
    ranks.reduce_scatter(m.storage.cut_gradients() && first ? shard : own, all, p.size);
    if (!m.storage.cut_gradients()) return;
    if (!first)
        shard.visit([&](auto* sum) {
            using G = std::decay_t<decltype(*sum)>;
            const int blocks = std::min(chunks(p.size), 4 * m.gpu.sms);
            add_kernel<G><<<blocks, 256, 0, ranks.stream>>>(sum, static_cast<const G*>(own.p), p.size);
            CHECK(cudaGetLastError());
        });
    CHECK(cudaEventRecord(m.slot(u).reduced, ranks.stream));
}

// =====================================================================================================================
// The block.

// The spans of the documents in set_batch's tokens, null if they are not kept apart.
const int2* spans(const Model& m) { return m.storage.bos < 0 || m.room ? nullptr : m.spans; }
// B sequences of T tokens; the model may run fewer and shorter ones than it has memory for
Heads heads(const Model& m, int B, int T) {
    return {B, T, m.c.NH, m.c.NKV, m.c.HS(), m.past, m.room ? m.room : T, spans(m)};
}

QkvGains qkv_gains(const Model& m, const LayerOffsets& at) {
    const floatX* q = m.w(at.qkv_gain);
    return {q, q ? q + m.c.C : nullptr, m.w(at.v_gain)};
}

// next = block l of its input a.x. N.. are norms; one that the variant lacks lets its input through:
//   simplegpt  h = x + No Wo A(Nq Wq x, Nk Wk x, Nv Wv x)         y = h + N2 W2( silu(N1 W1 h) * (N3 W3 h) )
//   prenorm    h = x + Wo A(Wq n, Wk n, Wv n),  n = N(x)          y = h + W2( silu(W1 n) * (W3 n) ),  n = N'(h)
//   preqknorm  prenorm with Nq, Nk as in simplegpt
void block_forward(Model& m, int l, floatX* next, int B, int T) {
    const LayerOffsets& at = m.table.layers[l];
    const LayerActivations& a = m.acts[l];
    const Heads h = heads(m, B, T);
    const Norm norm = m.norm();
    const Gpu& gpu = m.gpu;
    const int N = B * T, C = m.c.C, QKV = m.c.QKV(), F = m.c.F(), FF = m.c.FF();

    norm_forward(a.n1, a.n1_stats, a.x, m.w(at.norm1), N, C, norm, gpu);
    linear_forward(a.qkv_raw, a.n1, m.w(at.qkv), N, C, QKV, gpu);
    qkv_norm_rope_forward(a.q, a.k, a.v, a.qkv_stats, a.qkv_raw, qkv_gains(m, at), m.rope, h, norm, gpu);
    attention_forward(a.att, a.lse, a.q, a.k, a.v, h, gpu);
    linear_forward(a.o_raw, a.att, m.w(at.o), N, C, C, gpu);
    norm_residual_forward(a.h, a.o_stats, a.o_raw, a.x, m.w(at.o_gain), N, C, norm, gpu);

    norm_forward(a.n2, a.n2_stats, a.h, m.w(at.norm2), N, C, norm, gpu);
    linear_forward(a.w13_raw, a.n2, m.w(at.w13), N, C, FF, gpu);
    ffn_norm_act_forward(a.act, a.w13_stats, a.w13_raw, m.w(at.w13_gain), N, F, m.c.gated(), norm, gpu);
    linear_forward(a.w2_raw, a.act, m.w(at.w2), N, F, C, gpu);
    norm_residual_forward(next, a.w2_stats, a.w2_raw, a.h, m.w(at.w2_gain), N, C, norm, gpu);
}

// Before block l's backward: what block_forward made and did not keep, made again with the same bits.
//   recompute norm    what moves memory alone: norms, RoPE, SwiGLU, the first residual
//             ffn     also w1 and w3
//             block   also q, k, v, attention and o
void block_replay(Model& m, int l, int B, int T) {
    const LayerOffsets& at = m.table.layers[l];
    const LayerActivations& a = m.acts[l];
    const Heads h = heads(m, B, T);
    const Norm norm = m.norm();
    const Gpu& gpu = m.gpu;
    const int N = B * T, C = m.c.C, F = m.c.F();
    const bool redo_all = m.storage.recompute == Recompute::block, redo_ffn = m.storage.recompute >= Recompute::ffn;

    norm_forward(a.n1, a.n1_stats, a.x, m.w(at.norm1), N, C, norm, gpu);
    if (redo_all) linear_forward(a.qkv_raw, a.n1, m.w(at.qkv), N, C, m.c.QKV(), gpu);
    qkv_norm_rope_forward(a.q, a.k, a.v, a.qkv_stats, a.qkv_raw, qkv_gains(m, at), m.rope, h, norm, gpu);
    if (redo_all) attention_forward(a.att, a.lse, a.q, a.k, a.v, h, gpu);
    if (redo_all) linear_forward(a.o_raw, a.att, m.w(at.o), N, C, C, gpu);
    norm_residual_forward(a.h, a.o_stats, a.o_raw, a.x, m.w(at.o_gain), N, C, norm, gpu);

    norm_forward(a.n2, a.n2_stats, a.h, m.w(at.norm2), N, C, norm, gpu);
    if (redo_ffn) linear_forward(a.w13_raw, a.n2, m.w(at.w13), N, C, m.c.FF(), gpu);
    ffn_norm_act_forward(a.act, a.w13_stats, a.w13_raw, m.w(at.w13_gain), N, F, m.c.gated(), norm, gpu);
}

// m.dres: on entry the gradient of the block's output, on return that of its input. Gradients of weights are added to
// beta (0 or 1) times what was there, those of gains to what was there.
void block_backward(Model& m, int l, int B, int T, float beta) {
    const LayerOffsets& at = m.table.layers[l];
    LayerActivations& a = m.acts[l];
    const Norm norm = m.norm();
    const int N = B * T, C = m.c.C, F = m.c.F(), FF = m.c.FF();
    const Heads h = heads(m, B, T);
    const Gpu& gpu = m.gpu;
    // not the last layer's: the forward ended there, so the places that all layers share still hold its activations
    if (m.storage.recompute > Recompute::none && l + 1 < m.c.L) block_replay(m, l, B, T);

    // The two ends of a half, y = x + Nout(branch(Nin(x))): the gradient goes through the branch and around it. First
    // through Nout; at last through the first linear and Nin, and is added to that of the way around, m.dres.
    auto into_branch = [&](size_t gain, const floatX* raw, const float2* stats) -> const floatX* {
        if (gain == NONE) return m.dres;
        norm_backward(m.dbranch, m.g(gain), m.partial, nullptr, m.dres, raw, m.w(gain), stats, N, C, norm, gpu);
        return m.dbranch;
    };
    // Without a norm in front, the matmul itself adds to m.dres.
    auto out_of_branch = [&](size_t gain, const floatX* x, const float2* stats, const floatX* dout, const floatX* inp,
                             size_t w, int M) {
        const bool add = gain == NONE;
        linear_backward(add ? m.dres : m.dnormed, add, m.g(w), beta, dout, inp, m.w(w), N, C, M, gpu);
        if (!add) norm_backward(m.dres, m.g(gain), m.partial, m.dres, m.dnormed, x, m.w(gain), stats, N, C, norm, gpu);
    };

    // y = h + N2 W2 act
    const floatX* dw2_raw = into_branch(at.w2_gain, a.w2_raw, a.w2_stats);
    linear_backward(m.dact, false, m.g(at.w2), beta, dw2_raw, a.act, m.w(at.w2), N, F, C, gpu);
    ffn_norm_act_backward(m.dw13_raw, m.g(at.w13_gain), m.partial, m.dact, a.w13_raw, m.w(at.w13_gain), a.w13_stats, N,
                          F, m.c.gated(), norm, gpu);
    out_of_branch(at.norm2, a.h, a.n2_stats, m.dw13_raw, a.n2, at.w13, FF);

    // h = x + No Wo att
    const floatX* do_raw = into_branch(at.o_gain, a.o_raw, a.o_stats);
    linear_backward(m.datt, false, m.g(at.o), beta, do_raw, a.att, m.w(at.o), N, C, C, gpu);
    attention_backward(m.dq, m.dk, m.dv, m.attention_scratch, m.datt, a.att, a.q, a.k, a.v, a.lse, h, gpu);
    qkv_norm_rope_backward(m.dqkv_raw, m.g(at.qkv_gain), m.partial, m.dq, m.dk, m.dv, a.qkv_raw, qkv_gains(m, at),
                           a.qkv_stats, m.rope, h, norm, gpu);
    out_of_branch(at.norm1, a.x, a.n1_stats, m.dqkv_raw, a.n1, at.qkv, m.c.QKV());
}

// =====================================================================================================================
// Forward and backward of a micro-batch.

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
    if (m.storage.bos >= 0) document_spans(reinterpret_cast<int2*>(targets + N), tokens, B, T, m.storage.bos);
    if (places) {
        const TokenPlaces p = token_places(tokens, int(N));
        std::copy(p.places.begin(), p.places.end(), s.batch + 4 * N);
        std::fill(std::copy(p.begin.begin(), p.begin.end(), s.batch + 5 * N), s.batch + batch_ints(N), int(N));
    }
    m.targets = m.tokens + N, m.spans = reinterpret_cast<int2*>(m.targets + N);
    m.places = m.targets + 3 * N, m.begin = m.places + N;
    CHECK(cudaMemcpyAsync(m.tokens, s.batch, (places ? batch_ints(N) : 4 * N) * sizeof(int), cudaMemcpyHostToDevice,
                          m.gpu.stream));
    CHECK(cudaEventRecord(s.copied, m.gpu.stream));
}

constexpr int EMBEDDING = -1;  // where a forward begins and a backward ends, else the block whose input is given

// Tokens to m.normed, the final norm's output: all but the head. after_block(l) finds layer l's activations all there.
// With `from` not from the tokens, but from what is in that block's x.
void forward(Model& m, int B, int T, const std::function<void(int)>& after_block = nullptr, int from = EMBEDDING) {
    const int N = B * T, C = m.c.C, L = m.c.L;
    need_weights(m, 0, 1);
    const floatX* positions = m.w(m.table.pos);
    if (positions) positions += size_t(m.past) * C;
    if (from == EMBEDDING)
        embedding_forward(m.acts[0].x, m.tokens, m.w(m.table.tok), positions, spans(m), N, T, C, m.gpu);
    for (int l = std::max(from, 0); l < L; l++) {
        need_weights(m, l + 1, l + 2);
        block_forward(m, l, l + 1 < L ? m.acts[l + 1].x : m.out, B, T);
        if (after_block) after_block(l);
    }
    need_weights(m, L + 1, -1);
    norm_forward(m.normed, m.norm_stats, m.out, m.w(m.table.norm), N, C, m.norm(), m.gpu);
}

// Logits of `rows` rows of m.normed from row0 on, to m.logits; at most m.logit_rows at a time.
void head_forward(Model& m, size_t row0, int rows) {
    linear_forward(m.logits, m.normed + row0 * m.c.C, m.w(m.table.head), rows, m.c.C, m.c.Vp(), m.gpu);
}

// Head and loss in chunks of rows; m.loss += weight times the mean loss. With `backward` each chunk's gradient goes
// straight on to m.dnormed and is added to beta (0 or 1) times that of the head's weights.
void loss_forward(Model& m, int B, int T, float weight, bool backward, float beta = 1.0f) {
    const size_t N = size_t(B) * T, C = m.c.C;
    for (size_t row = 0; row < N; row += m.logit_rows) {
        const int rows = int(std::min(N - row, size_t(m.logit_rows)));
        head_forward(m, row, rows);
        cross_entropy(m.losses + row, m.logits, m.targets + row, rows, m.c.V, m.c.Vp(), weight / N, backward, m.gpu);
        if (backward)
            linear_backward(m.dnormed + row * C, false, m.g(m.table.head), row == 0 ? beta : 1.0f, m.logits,
                            m.normed + row * C, m.w(m.table.head), rows, C, m.c.Vp(), m.gpu);
    }
    loss_sum_kernel<<<1, 512, 0, m.gpu.stream>>>(m.loss, m.losses, int(N), weight / N);
    CHECK(cudaGetLastError());
}

// Before a step's first micro-batch, and before an evaluation: the loss begins at 0.
void begin_step(Model& m) { CHECK(cudaMemsetAsync(m.loss, 0, sizeof(float), m.gpu.stream)); }

// The kernels of a micro-batch. A unit's gradients are reduced once complete, in a step's last micro-batch, or in each
// where they are cut over ranks. With `from` only what is behind that block's x, whose gradient is then in m.dres.
void launch_micro_batch(Model& m, int B, int T, float weight, bool first, bool last, int from = EMBEDDING) {
    const int L = m.c.L, top = L + 1;
    auto finished = [&](int unit) {
        if (last || m.storage.cut_gradients()) reduce_gradients(m, unit, first);
    };
    forward(m, B, T, nullptr, from);
    float beta = begin_gradients(m, top, first);
    if (m.table.tied()) beta = begin_gradients(m, 0, first);
    loss_forward(m, B, T, weight, true, beta);
    norm_backward(m.dres, m.g(m.table.norm), m.partial, nullptr, m.dnormed, m.out, m.w(m.table.norm), m.norm_stats,
                  B * T, m.c.C, m.norm(), m.gpu);
    finished(top);
    for (int l = L - 1; l >= std::max(from, 0); l--) {
        need_weights(m, l + 1, l > 0 ? l : -1);
        beta = begin_gradients(m, l + 1, first);
        block_backward(m, l, B, T, beta);
        finished(l + 1);
    }
    if (from != EMBEDDING) return;
    if (!m.table.tied()) begin_gradients(m, 0, first);
    embedding_backward(m.g(m.table.tok), m.g(m.table.pos), m.dres, m.tokens, m.places, m.begin, spans(m), B * T, B, T,
                       m.c.C, m.gpu);
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
        CHECK(cudaStreamBeginCapture(m.gpu.stream, cudaStreamCaptureModeThreadLocal));
        launch_micro_batch(m, B, T, weight, first, last);
        CHECK(cudaStreamEndCapture(m.gpu.stream, &graph));
        CHECK(cudaGraphInstantiate(&g.exec, graph, 0));
        CHECK(cudaGraphDestroy(graph));
    }
    CHECK(cudaGraphLaunch(g.exec, m.gpu.stream));
}

// Runs one micro-batch of arbitrary tokens in which every matmul whose algorithm is not known chooses it by time.
// Gradients and loss are what a step's begin overwrites or clears.
void time_matmuls(Model& m) {
    std::vector<int32_t> windows(size_t(m.B) * (m.c.T + 1));
    for (size_t i = 0; i < windows.size(); i++) windows[i] = int32_t(random_bits(1, 3, i) % m.c.V);
    matmul.timing = true;
    begin_step(m);
    forward_backward(m, windows.data(), m.B, m.c.T, 1.0f, true);
    matmul.timing = false;
}

float read_float(const Model& m, const float* p) {
    float x = 0;
    CHECK(cudaMemcpyAsync(&x, p, sizeof(x), cudaMemcpyDeviceToHost, m.gpu.stream));
    CHECK(cudaStreamSynchronize(m.gpu.stream));
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

// sums[block] = sum of grads[i]^2 over the block's CHUNK, a thread FOUR neighbours at a time; grads (size) G
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
// square_sum_kernel), whether it was asked to stop. One block, threads stride over the sums.
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
// rounding), `key` this step's. master null: params are their own masters. G is the gradients' type, S the moments'.
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
    if (s.ranks > 1) ranks.order(m.gpu.stream, ranks.stream);  // the gradients are reduced
    int sums = 0;
    for (int u = 0; u < m.units(); u++) {
        const Piece p = m.piece(u);
        m.grads.at(s.cut_gradients() ? p.shard : p.whole).visit([&](auto* grads) {
            using G = std::decay_t<decltype(*grads)>;
            square_sum_kernel<G><<<chunks(p.size), 256, 0, m.gpu.stream>>>(m.square_sums + sums, grads, p.size);
        });
        CHECK(cudaGetLastError());
        sums += chunks(p.size);
    }
    numbers_kernel<<<1, 512, 0, m.gpu.stream>>>(m.numbers, m.square_sums, sums, stop);
    CHECK(cudaGetLastError());
    if (s.ranks > 1) {
        ranks.order(ranks.stream, m.gpu.stream);
        ranks.all_reduce(m.numbers->summed, 3, ncclFloat64, sizeof(double));
        ranks.order(m.gpu.stream, ranks.stream);
    }
    decide_kernel<<<1, 1, 0, m.gpu.stream>>>(m.numbers, o);
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
                adamw_kernel<G, S><<<chunks(count), 256, 0, m.gpu.stream>>>(params, master, moments,
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
            ranks.order(ranks.stream, m.gpu.stream);
            ranks.all_gather(m.params + unit.begin, m.params + p.whole, p.size, NCCL_FLOATX, sizeof(floatX));
            CHECK(cudaEventRecord(m.gathered[u], ranks.stream));
        }
    }
}

// How the learning rate falls behind its warm-up: linear, the paper's, over all steps; cosine, nanoGPT's get_lr, over
// the first of them; wsd (warm-up, stable, decay: arXiv 2404.06395, with the linear fall of 2405.18392) over the run's
// last, so that those before them have the same rates however long the run; constant never.
enum class Decay { linear, cosine, wsd, constant };
const Words SCHEDULES = {"linear", "cosine", "wsd", "constant"};

struct Schedule {
    Decay decay = Decay::linear;
    double peak = 1e-3, least = -1;   // -1, below too: to be settled
    int64_t warmup = -1, steps = -1;  // steps of rise and of fall
};

// Learning rate of 0-based step s of S: (s+1)/(W+1) of the peak while s < W, the warm-up; in the t-th part of the fall
// least + (peak - least) (1 - t), of cosine least + (peak - least) (1 + cos(pi t)) / 2, behind it the least.
double learning_rate(const Schedule& a, int64_t s, int64_t S) {
    if (s < a.warmup) return a.peak * double(s + 1) / double(a.warmup + 1);
    const int64_t begin = a.decay == Decay::wsd ? S - a.steps : a.warmup;
    if (s < begin || a.decay == Decay::constant) return a.peak;
    const double t = s < begin + a.steps ? double(s - begin) / double(a.steps) : 1.0;
    return a.least + (a.peak - a.least) * (a.decay == Decay::cosine ? 0.5 * (1.0 + cos(M_PI * t)) : 1.0 - t);
}

#endif  // TRAIN_GPT

#if __INCLUDE_LEVEL__ == 0  // this file is the program
#include "dev/run/agree.h"
#include "dev/run/log.h"
#include "dev/use/evaluate.h"
#include "dev/use/generate.h"
#include "dev/use/plan.h"
#include "dev/use/probe.h"

// =====================================================================================================================
// Training: the loop, and what is done between its steps.

// val_loss: the mean over the first `batches` batches of all ranks, always the same ones. False: one was asked to stop.
bool validate(float& val_loss, Model& m, DataLoader& data, int64_t batches, int64_t step) {
    double sum = 0.0, total = 0.0;
    data.seek({0, 0});
    // with weights that are cut a forward is a collective: all ranks leave at the same batch
    auto asked = [&] { return (m.storage.cut_weights() ? ranks.most(asked_to_stop) : asked_to_stop) != 0; };
    for (int64_t i = 0; i < batches && !asked(); i++) {
        sum += evaluate(m, data.next(), m.B, m.c.T);
        channel.progress("validating", step);
    }
    for (double part : ranks.exchange(sum)) total += part;
    val_loss = float(total / (double(batches) * ranks.size));
    return ranks.most(asked_to_stop != 0) == 0;
}

bool happened(cudaEvent_t event) {
    const cudaError_t status = cudaEventQuery(event);
    if (status != cudaErrorNotReady) CHECK(status);
    cudaGetLastError();  // "not ready" is not to be taken for a launch's error later
    return status == cudaSuccess;
}

// AdamW's settings at step `step` from 1.
AdamW adamw_of(const Options& o, int64_t step) {
    AdamW adamw = o.adamw;
    adamw.lr = float(learning_rate(o.schedule, step - 1, o.steps));
    return adamw;
}

// One step, number `step` from 1: the micro-batches, the update, and its report to the host, who does not wait.
void train_step(Model& m, DataLoader& data, const Options& o, int64_t step, bool check) {
    begin_step(m);
    for (int i = 0; i < o.grad_accum; i++) {
        channel.progress("computing", step);
        forward_backward(m, data.next(), m.B, m.c.T, 1.0f / (o.grad_accum * float(ranks.size)), i == 0,
                         i == o.grad_accum - 1);
    }
    update(m, adamw_of(o, step), step, asked_to_stop != 0);
    const Report& r = m.reports[step % 2];
    if (check) {
        hash_weights(m);
        CHECK(
            cudaMemcpyAsync(r.hashes, m.hashes, ranks.size * sizeof(*r.hashes), cudaMemcpyDeviceToHost, m.gpu.stream));
    }
    CHECK(cudaMemcpyAsync(r.numbers, m.numbers, sizeof(Numbers), cudaMemcpyDeviceToHost, m.gpu.stream));
    CHECK(cudaEventRecord(r.done, m.gpu.stream));
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
    if (step == 0) probe.run(0, {});
    return probe;
}

// A run between its first step and its last.
struct Training {
    Model& m;
    const Options& o;
    DataLoader& data;
    DataLoader* val;  // null: none, as the tokenizer
    const Tokenizer* tokenizer;
    TrainState state;  // of the newest step that was launched
    const int64_t begun = state.step;
    int64_t end = o.steps;  // the step to stop after
    bool stopping = false;
    std::string bad;      // why, if it was not asked to
    int64_t suspect = 0;  // the second step after a skipped one, in which ranks may have gone apart
    const double tokens = double(m.N()) * o.grad_accum * ranks.size;  // of a step
    double sent = 0;                                                  // bytes, of the last step
    double last = now();                                              // of the last report
    int64_t marked = begun;                                           // the step of the terminal's last line,
    double mark = last, paused = 0;  // its time, and seconds of validation, samples, checkpoints since then
    Log log;
    Saver saver;
    Probe probe = open_probe(m, o, begun);

    Training(Model& m, const Options& o, DataLoader& data, DataLoader* val, const Tokenizer* tokenizer,
             const TrainState& state)
        : m(m), o(o), data(data), val(val), tokenizer(tokenizer), state(state) {}

    bool due(int64_t step, int64_t every) const { return every > 0 && (step % every == 0 || step == o.steps); }
    bool checked(int64_t step) const {  // are the ranks' weights compared after it
        return ranks.size > 1 && !m.storage.cut_weights() && o.check_every > 0 &&
               (step % o.check_every == 0 || step == begun + 1 || step == suspect);
    }
    // The host launches one step ahead of the one it reports, unless something is due after that step, or the step has
    // ended already.
    bool drained(int64_t step) const {
        return due(step, o.val_every) || due(step, o.sample_every) || due(step, o.probe) || due(step, o.save_every) ||
               step >= end || happened(m.reports[step % 2].done);
    }
    // What makes a run stop early is in the numbers of a step, so that all ranks see it there; some have begun the next
    // step by then and some have not, so that one is the last.
    void stop(int64_t step, const std::string& why) {
        if (!stopping) end = std::min(o.steps, step + 1), stopping = true, bad = why;
    }

    // The same, where no rank has begun the next step.
    void stop_here(int64_t step) { end = step, stopping = true; }

    void launch(int64_t step) {
        const double before = ranks.sent;
        train_step(m, data, o, step, checked(step));
        sent = ranks.sent - before;
        state.step = step, state.loader = data.state();
    }

    // Waits for a step's numbers and writes them down: a row of the log, perhaps a line on the terminal.
    Numbers report(int64_t step) {
        const Report& r = m.reports[step % 2];
        CHECK(cudaEventSynchronize(r.done));
        const Numbers n = *r.numbers;
        channel.progress("reporting", step);
        const double done = now(), lr = learning_rate(o.schedule, step - 1, o.steps);
        if (checked(step)) compare_hashes(r.hashes, step);
        bool validated = val && !n.skip && due(step, o.val_every);
        float val_loss = 0.0f;
        if (validated && !validate(val_loss, m, *val, o.val_batches, step)) validated = false, stop_here(step);
        if (validated && o.keep_best && val_loss < state.best_loss) state.best_loss = val_loss, state.best_step = step;
        const bool spike = log.spikes.add(n.loss);
        const char* what = n.skip ? "skipped" : spike ? "spike" : "";
        if (ranks.rank == 0)
            log.row(step, n.loss, lr, n.grad_norm, tokens / (done - last), validated ? &val_loss : nullptr, what);
        if (step % o.log_every == 0 || step == o.steps || step == 1 || n.skip || spike || validated) {
            const double seconds = (done - mark - paused) / double(step - marked);
            std::string note = validated ? format(" | val %.4f", val_loss) : "";
            if (n.skip) note += format(" | skipped, %lld of at most %lld", n.skipped, (long long)o.max_bad_steps);
            if (spike) note += " | spike";
            printf("step %6lld/%lld %5.1f%% | loss %.4f | lr %.2e | norm %.3f | %.0f tokens/s | ETA %s%s\n",
                   (long long)step, (long long)o.steps, 100.0 * step / o.steps, n.loss, lr, n.grad_norm,
                   tokens / seconds, duration(seconds * double(o.steps - step)).c_str(), note.c_str());
            marked = step, mark = done, paused = 0.0;
        }
        last = done;
        return n;
    }

    // What is due after a step.
    void follow_up(int64_t step, const Numbers& n) {
        state.updates = n.updates, state.skipped = n.skipped;
        if (n.skip && n.skipped >= o.max_bad_steps)
            stop(step,
                 format("training: loss or gradient norm were not finite in %lld steps, at last in step %lld. Lower "
                        "--lr or raise --warmup; --resume with a larger --max-bad-steps goes on.",
                        n.skipped, (long long)step));
        if (n.skip && suspect <= step) suspect = step + 2;  // no rank has begun it yet
        if (n.stop) stop(step, "");
        if (tokenizer && due(step, o.sample_every) && !stopping) print_sample(m, *tokenizer, o, step);
        if (due(step, o.probe) && !stopping) probe.run(step, adamw_of(o, step));
        if (due(step, o.probe) && asked_to_stop) stop_here(step);  // there is one rank
        if (due(step, o.save_every) || (stopping && step == end) || (step > begun && step == state.best_step)) {
            check_weights(m, step);
            saver.save(m, state);
        }
        paused += now() - last;
        last = now();
        fflush(stdout);
    }

    // True: trained to the end; false: asked to stop before it. trouble: "", or why the last checkpoint is missing.
    bool run(std::string& trouble, double memory_before) {
        if (ranks.rank == 0) log.open(o.out + "/log.csv", begun);
        saver.out = o.out, saver.keep = o.keep, saver.background = o.save_async;
        saver.tokenizer = tokenizer_lines(o.tokenizer);
        last = mark = now();  // behind the first probe
        for (int64_t reported = begun; reported < end;) {
            if (state.step < end) launch(state.step + 1);
            const int64_t ready = state.step - (drained(state.step) ? 0 : 1);
            while (reported < ready) {
                reported++;
                follow_up(reported, report(reported));
            }
        }
        log.finish();
        saver.finish();
        if (!bad.empty()) throw Error(bad);
        if (!saver.failure.empty())
            trouble = format("training: ended after step %lld, but its last checkpoint could not be saved: %s",
                             (long long)end, saver.failure.c_str());
        if (end > begun) print_use(m, memory_before, sent, o.grad_accum);
        if (o.keep_best && state.best_step > 0)
            printf("lowest validation loss %.4f, in %s/%s\n", state.best_loss, o.out.c_str(),
                   checkpoint_name(state.best_step).c_str());
        if (stopping && end < o.steps && trouble.empty())
            printf("asked to stop: saved after step %lld in %s; --resume goes on\n", (long long)end,
                   (o.out + "/" + checkpoint_name(end)).c_str());
        return end == o.steps;
    }
};

// `train_gpt`: everything from the options to the exported weights.
void run(Options& o, const World& world) {
    const Config& c = o.config;
    std::unique_ptr<Tokenizer> tokenizer;
    // who reads the lines may go before the last save, as tee at Ctrl-C; a limit of file sizes is a full disk
    for (int number : {SIGPIPE, SIGXFSZ}) signal(number, SIG_IGN);
    const Gpu gpu = open_job(o, world);
    settle_options(o, world, tokenizer);
    if (ranks.rank > 0 && !freopen("/dev/null", "w", stdout)) throw Error("/dev/null: cannot be opened.");
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    const double used_before = memory_used();
    choose_batch(o, gpu, size_t(ranks.least(double(free))));

    const int B = o.batch_size, n = ranks.size;
    std::unique_ptr<DataLoader> data, val;
    if (o.steps > 0 || o.probe) data.reset(new DataLoader(o.train_data, B, c.T, c.V, o.shuffle, o.seed, ranks.rank, n));
    if (data && !o.val_data.empty()) val.reset(new DataLoader(o.val_data, B, c.T, c.V, false, 0, ranks.rank, n));
    if (val && o.val_every < 0) o.val_every = int(std::max<int64_t>(1, o.steps / 10));
    claim_folder(o);

    Model m;
    plan_training(m, gpu, o, B);
    print_run(m, o);
    if (data) print_mixture(*data, o);
    fflush(stdout);
    channel.progress("allocating memory", 0);
    create_or_advise(m, &o);
    if (ranks.rank == 0) print_matmul();
    m.use_graphs = o.graph;
    const TrainState state = set_state(m, o, data.get());
    const std::string choices = ranks.rank ? format("/matmul_rank%d.txt", ranks.rank) : "/matmul.txt";
    bool finished = true;
    std::string trouble;
    if (data) {
        settle_matmuls(m, o.out + choices, state.step > 0);
        catch_signals();
        Training training(m, o, *data, val.get(), tokenizer.get(), state);
        finished = training.run(trouble, used_before);
    }
    channel.progress("exporting the weights", o.steps);
    if (finished && !o.export_to.empty()) export_weights(m, o.export_to, o.export_half);
    if (!trouble.empty()) throw Error(trouble);
    destroy(m);
    matmul.close();
    close_job();
}

// =====================================================================================================================
// main

// What can be said before the ranks meet; false: there is no more to do.
bool prepare(Options& o, const World& world, int argc, char** argv) {
    if (!parse_options(o, argc, argv)) return put_text(""), false;
    if (o.command != TRAIN) {
        if (world.size > 1)
            throw Error(format("%s: runs on one rank, %d were started. Start it without %s.", COMMANDS.at(o.command),
                               world.size, world.launcher));
        o.command == GENERATE ? run_generate(o) : run_eval(o);
        return false;
    }
    if (o.plan) {
        std::unique_ptr<Tokenizer> tokenizer;
        settle_options(o, world, tokenizer);
        print_plan(o), put_text("");
        return false;
    }
    check_start(o, world);
    return true;
}

int main(int argc, char** argv) {
    int fd = open("/dev/null", O_RDONLY);  // where 0, 1 or 2 is closed, no file gets its number and what is printed
    while (fd >= 0 && fd <= STDERR_FILENO) fd = open("/dev/null", O_RDONLY);
    if (fd >= 0) close(fd);
    World world;
    Options o;
    try {
        world = find_world();
        if (!prepare(o, world, argc, argv)) return 0;
    } catch (const std::exception& e) {  // the same on every rank: one says it
        fflush(stdout);
        if (world.rank == 0) fprintf(stderr, "train_gpt: %s\n", reason(e).c_str());
        return 1;
    }
    try {
        run(o, world);
    } catch (const std::exception& e) {
        fflush(stdout);
        channel.fail(reason(e));
    }
    return 0;
}
#endif
