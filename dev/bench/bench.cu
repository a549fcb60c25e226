// How far each kernel of the trainer is from the machine's limits. First the limits are measured, how fast memory is
// copied and matrices are multiplied; then every kernel alone, at the shapes of one flavour. `make bench` builds and
// calls it, on a GPU and on the CPU stand-in.
//   bench --part ceilings|kernels [--model FLAVOUR] [--batch-size B] [--seq-len T] [--filter TEXT] [--results DIR]
//   bench --part bounds --device h200 ...     each kernel's bound on a device that need not be there; measures nothing
//   bench --part counts ...                   what each kernel does, counted by the machine in dev/ptx: make ptx-costs
//
// A kernel's bound is its FLOPs at the measured matmul rate or its bytes at the measured copy speed, whichever takes
// longer; its share is bound over time. Bytes: every tensor read or written once, as in --plan (row statistics left
// out). FLOPs: of attention the causal half. Times are medians of runs whose data is in no cache: before each run a
// copy larger than the caches passes through them, under which also the launch's own cost is hidden.
#include "../use/plan.h"

#include <ctime>
#include <thread>

// =====================================================================================================================
// Data and time

__global__ void copy_kernel(uint4* to, const uint4* from, size_t count) {
    constexpr int SPAN = 1024;  // a block's share: 16 KiB
    const size_t begin = size_t(blockIdx.x) * SPAN, end = min(begin + SPAN, count);
    #pragma unroll 4
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) to[i] = from[i];
}

Gpu gpu;                // of the measurements
bool counting = false;  // on the machine in dev/ptx, which times nothing

void copy(void* to, const void* from, size_t bytes) {
    const size_t count = bytes / sizeof(uint4);
    copy_kernel<<<int((count + 1023) / 1024), 256, 0, gpu.stream>>>(static_cast<uint4*>(to),
                                                                    static_cast<const uint4*>(from), count);
    CHECK(cudaGetLastError());
}

// p[i] = shift + scale z, z standard normal (Box and Muller). Zeros would do for no measurement: a GPU multiplies them
// faster.
template <typename F>
__global__ void normal_kernel(F* p, size_t size, float scale, float shift, unsigned key) {
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float u = (rounding_bits(i, key) >> 8) + 0.5f, v = rounding_bits(i, ~key) >> 8;  // of 2^24
        p[i] = shift + scale * sqrtf(-2.0f * logf(u * 0x1p-24f)) * cosf(v * (6.2831853f * 0x1p-24f));
    }
}

// The same, cheaper: a few numbers again and again, by the host. Where p is too large it keeps its zeros; what kernels
// do there does not depend on them.
template <typename F>
void fill(F* p, size_t count, float scale, float shift, unsigned key) {
    std::mt19937 random(key);
    std::normal_distribution<float> normal;
    std::vector<F> some(std::min(count, size_t(99991)));
    for (F& x : some) x = F(shift + scale * normal(random));
    if (count >= size_t(1) << 28) return;
    for (size_t i = 0; i < count; i += some.size())
        memcpy(p + i, some.data(), std::min(some.size(), count - i) * sizeof(F));
}

// Device memory of one kernel's tensors; freed together.
struct Tensors {
    std::vector<void*> all;
    unsigned key = 0;
    Tensors() = default;
    Tensors(const Tensors&) = delete;
    ~Tensors() {
        for (void* p : all) cudaFree(p);
    }

    template <typename F>
    F* take(size_t count) {
        F* p = nullptr;
        CHECK(cudaMalloc(&p, count * sizeof(F)));
        all.push_back(p);
        return p;
    }
    template <typename F>
    F* zeros(size_t count) {
        F* p = take<F>(count);
        CHECK(cudaMemset(p, 0, count * sizeof(F)));
        return p;
    }
    template <typename F>
    F* normal(size_t count, float scale = 1.0f, float shift = 0.0f) {
        F* p = take<F>(count);
        if (counting) {
            fill(p, count, scale, shift, ++key);
            return p;
        }
        normal_kernel<F><<<chunks(count), 256>>>(p, count, scale, shift, ++key);
        CHECK(cudaGetLastError());
        return p;
    }
    floatX* x(size_t count, float scale = 1.0f) { return normal<floatX>(count, scale); }
    floatX* gain(size_t count) { return normal<floatX>(count, 0.1f, 1.0f); }
    float* floats(size_t count) { return normal<float>(count); }
    float2* stats(size_t count) { return reinterpret_cast<float2*>(normal<float>(2 * count, 0.01f, 1.0f)); }  // rstd > 0
    int* ints(const std::vector<int>& values) {
        int* p = take<int>(values.size());
        CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(int), cudaMemcpyHostToDevice));
        return p;
    }
};

typedef std::function<void()> Launch;

struct Time {
    double ms = 0, spread = 0;  // median; distance of the quartiles over it
};

struct Clock {
    bool quick = false;
    cudaEvent_t begin = nullptr, end = nullptr;
    char* other = nullptr;  // what the caches are filled with
    size_t bytes = 0;       // half of it

    void open(bool is_quick) {
        quick = is_quick;
        bytes = quick ? size_t(1) << 20 : SERIAL ? size_t(256) << 20 : size_t(128) << 20;
        CHECK(cudaStreamCreate(&gpu.stream));
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        CHECK(cudaMalloc(&other, 2 * bytes));
        CHECK(cudaMemset(other, 0, 2 * bytes));
    }
    void close() {
        CHECK(cudaFree(other));
        CHECK(cudaEventDestroy(begin));
        CHECK(cudaEventDestroy(end));
        CHECK(cudaStreamDestroy(gpu.stream));
    }

    // The first run, not counted, loads the kernel and lets a matmul choose its algorithm.
    Time operator()(const Launch& launch) {
        launch();
        CHECK(cudaStreamSynchronize(gpu.stream));
        std::vector<float> ms;
        const double start = now();
        const size_t least = quick ? 3 : 5, most = quick ? 3 : 100;
        while (ms.size() < least || (ms.size() < most && now() - start < 0.5)) {
            copy(other, other + bytes, bytes);
            CHECK(cudaEventRecord(begin, gpu.stream));
            launch();
            CHECK(cudaEventRecord(end, gpu.stream));
            CHECK(cudaEventSynchronize(end));
            ms.emplace_back();
            CHECK(cudaEventElapsedTime(&ms.back(), begin, end));
        }
        std::sort(ms.begin(), ms.end());
        const size_t n = ms.size();
        return {ms[n / 2], (ms[n * 3 / 4] - ms[n / 4]) / ms[n / 2]};
    }
};

// =====================================================================================================================
// Ceilings

struct Ceiling {
    std::string what;
    Time time;
    double amount;  // FLOPs or bytes
    double rate() const { return amount / time.ms * 1e3; }
};

struct Ceilings {
    std::vector<Ceiling> copies, matmuls;
    static double best(const std::vector<Ceiling>& all, const char* but = "-") {
        double rate = 0;
        for (const Ceiling& c : all)
            if (c.what.find(but) == std::string::npos) rate = std::max(rate, c.rate());
        return rate;
    }
    double copy() const { return best(copies); }                        // bytes/s, read plus written
    double copy_elsewhere() const { return best(copies, "in place"); }  // where what is written was not read
    double matmul() const { return best(matmuls); }                     // FLOP/s
};

// outputs (N,M) = inputs (N,K) times weights (M,K)
struct Linear {
    const char* name;
    int N, K, M;
    bool residual;  // its inputs' gradient is added to the residual's
};

std::vector<Linear> linears(const Config& c, int N, int logit_rows) {
    return {{"qkv", N, c.C, c.QKV(), c.simple()},
            {"o", N, c.C, c.C, false},
            {c.gated() ? "w13" : "fc", N, c.C, c.FF(), c.simple()},
            {c.gated() ? "w2" : "proj", N, c.F(), c.C, false},
            {"head", logit_rows, c.C, c.Vp(), false}};
}

Ceilings measure_ceilings(Clock& clock, const Config& c, int N, int logit_rows) {
    Ceilings found;
    {
        Tensors t;
        const size_t bytes = clock.quick ? 1 << 20 : SERIAL ? size_t(512) << 20 : size_t(2) << 30;
        char *to = reinterpret_cast<char*>(t.floats(bytes / 4)), *from = reinterpret_cast<char*>(t.floats(bytes / 4));
        auto add = [&](const char* what, const Launch& launch, double moved) {
            found.copies.push_back({what, clock(launch), moved});
        };
        add("a kernel", [=] { copy(to, from, bytes); }, 2.0 * bytes);
        // a CPU's cache reads a line before it is written, which is free only if the line was to be read anyway
        add("a kernel, in place", [=] { copy(from, from, bytes); }, 2.0 * bytes);
        add("cudaMemcpyAsync",
            [=] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, gpu.stream)); }, 2.0 * bytes);
        const size_t norm = sizeof(floatX) * size_t(N) * c.C;  // short: no limit, but what a norm may hope for
        add("a kernel, as large as a norm's", [=] { copy(to, from, std::min(bytes, norm)); },
            2.0 * std::min(bytes, norm));
    }
    const int side = clock.quick ? 128 : SERIAL ? 2048 : 8192;
    std::vector<Linear> all = linears(c, N, logit_rows);
    all.insert(all.begin(), {"square", side, side, side, false});
    for (const Linear& l : all) {
        Tensors t;
        floatX *out = t.x(size_t(l.N) * l.M), *inp = t.x(size_t(l.N) * l.K), *w = t.x(size_t(l.M) * l.K, 0.02f);
        const Time time = clock([=] { linear_forward(out, inp, w, l.N, l.K, l.M, gpu); });
        found.matmuls.push_back(
            {format("%s %d x %d x %d", l.name, l.N, l.K, l.M), time, 2.0 * l.N * double(l.K) * l.M});
    }
    return found;
}

// =====================================================================================================================
// The kernels: one table of how each is called, with what it must compute and move

struct Case {
    std::string name, shape;
    std::string kind;  // of --plan's table, "" for what a simplegpt step does not run
    double times;      // how often a step of simplegpt runs it, nothing recomputed
    double flops, bytes;
    std::function<Launch(Tensors&)> prepare;
    bool in_place = false;  // writes nothing but what it has read: on a CPU that is less work (see the ceilings)
    double parts = 1;       // the launch does one of so many, where it only counts
};

std::vector<Case> norm_cases(const Config& c, int B) {
    std::vector<Case> all;
    const int T = c.T, N = B * T, C = c.C, QKV = c.QKV(), F = c.F(), FF = c.FF(), L = c.L;
    const Norm norm = {c.norm_eps, c.layernorm};
    const Heads h = {B, T, c.NH, c.NKV, c.HS()};
    const bool gated = c.gated();
    const double X = sizeof(floatX) * double(N);
    const char *forward = "norms, RoPE, SwiGLU, forward", *backward = "norms, RoPE, SwiGLU, backward";
    const std::string rows = format("N %d, C %d", N, C), heads = format("N %d, QKV %d, HS %d", N, QKV, h.HS),
                      ffn = format("N %d, F %d", N, F);
    auto add = [&](const char* name, const std::string& shape, const char* kind, double times, double bytes,
                   std::function<Launch(Tensors&)> prepare) {
        all.push_back({name, shape, kind, times, 0.0, bytes, std::move(prepare)});
    };
    const size_t NC = size_t(N) * C, kv = size_t(N) * h.width(1);

    add("norm_residual_forward", rows, forward, 2 * L, X * 3 * C, [=](Tensors& t) -> Launch {
        floatX *out = t.x(NC), *x = t.x(NC), *res = t.x(NC), *gain = t.gain(C);
        float2* stats = t.stats(N);
        return [=] { norm_residual_forward(out, stats, x, res, gain, N, C, norm, gpu); };
    });
    add("norm_residual_forward, norm only", rows, forward, 1, X * 2 * C, [=](Tensors& t) -> Launch {
        floatX *out = t.x(NC), *x = t.x(NC), *gain = t.gain(C);
        float2* stats = t.stats(N);
        return [=] { norm_residual_forward(out, stats, x, nullptr, gain, N, C, norm, gpu); };
    });
    add("norm_residual_forward, residual only", rows, "", 0, X * 3 * C, [=](Tensors& t) -> Launch {
        floatX *out = t.x(NC), *x = t.x(NC), *res = t.x(NC);
        return [=] { norm_residual_forward(out, nullptr, x, res, nullptr, N, C, norm, gpu); };
    });
    auto norm_back = [=](bool residual) {
        return [=](Tensors& t) -> Launch {
            floatX *dx = t.x(NC), *dy = t.x(NC), *x = t.x(NC), *sum_to = residual ? t.x(NC) : nullptr,
                   *gain = t.gain(C);
            float2* stats = t.stats(N);
            float *dgain = t.floats(C), *partial = t.floats(size_t(row_blocks(N, C, gpu)) * C);
            return [=] { norm_backward(dx, dgain, partial, sum_to, dy, x, gain, stats, N, C, norm, gpu); };
        };
    };
    add("norm_backward", rows, backward, 2 * L + 1, X * 3 * C, norm_back(false));
    add("norm_backward, to the residual", rows, "", 0, X * 4 * C, norm_back(true));

    auto qkv_gains = [=](Tensors& t, bool normed) -> QkvGains {
        if (!normed) return {nullptr, nullptr, nullptr};
        const floatX* q = t.gain(QKV);
        return {q, q + h.width(0), q + h.width(0) + h.width(1)};
    };
    auto rope_of = [=](Tensors& t) { return gated ? t.stats(size_t(T) * h.HS / 2) : nullptr; };
    auto qkv_forward = [=](bool normed) {
        return [=](Tensors& t) -> Launch {
            floatX *q = t.x(NC), *k = t.x(kv), *v = t.x(kv), *raw = t.x(size_t(N) * QKV);
            float2 *stats = t.stats(3 * size_t(N)), *rope = rope_of(t);
            const QkvGains gains = qkv_gains(t, normed);
            return [=] { qkv_norm_rope_forward(q, k, v, stats, raw, gains, rope, h, norm, gpu); };
        };
    };
    auto qkv_backward = [=](bool normed) {
        return [=](Tensors& t) -> Launch {
            floatX *draw = t.x(size_t(N) * QKV), *dq = t.x(NC), *dk = t.x(kv), *dv = t.x(kv),
                   *raw = t.x(size_t(N) * QKV);
            float2 *stats = t.stats(3 * size_t(N)), *rope = rope_of(t);
            const QkvGains gains = qkv_gains(t, normed);
            float *partial = t.floats(size_t(row_blocks(N, C, gpu)) * QKV), *sums = t.floats(QKV);
            const Flat dgain = normed ? Flat(sums) : Flat();
            return [=] {
                qkv_norm_rope_backward(draw, dgain, partial, dq, dk, dv, raw, gains, stats, rope, h, norm, gpu);
            };
        };
    };
    add("qkv_norm_rope_forward", heads, forward, L, X * 2 * QKV, qkv_forward(true));
    add("qkv_norm_rope_forward, RoPE only", heads, "", 0, X * 2 * QKV, qkv_forward(false));
    add("qkv_norm_rope_backward", heads, backward, L, X * 3 * QKV, qkv_backward(true));
    add("qkv_norm_rope_backward, RoPE only", heads, "", 0, X * 2 * QKV, qkv_backward(false));

    auto ffn_forward = [=](bool normed) {
        return [=](Tensors& t) -> Launch {
            floatX *out = t.x(size_t(N) * F), *raw = t.x(size_t(N) * FF), *gain = normed ? t.gain(FF) : nullptr;
            float2* stats = t.stats(2 * size_t(N));
            return [=] { ffn_norm_act_forward(out, stats, raw, gain, N, F, gated, norm, gpu); };
        };
    };
    auto ffn_backward = [=](bool normed) {
        return [=](Tensors& t) -> Launch {
            floatX *draw = t.x(size_t(N) * FF), *dout = t.x(size_t(N) * F), *raw = t.x(size_t(N) * FF),
                   *gain = normed ? t.gain(FF) : nullptr;
            float2* stats = t.stats(2 * size_t(N));
            float *dgain = t.floats(FF), *partial = t.floats(size_t(row_blocks(N, F, gpu)) * FF);
            return [=] { ffn_norm_act_backward(draw, dgain, partial, dout, raw, gain, stats, N, F, gated, norm, gpu); };
        };
    };
    add("ffn_norm_act_forward", ffn, forward, L, X * (FF + F), ffn_forward(true));
    add("ffn_norm_act_forward, no norm", ffn, "", 0, X * (FF + F), ffn_forward(false));
    add("ffn_norm_act_backward", ffn, backward, L, X * (2 * FF + F), ffn_backward(true));
    add("ffn_norm_act_backward, no norm", ffn, "", 0, X * (2 * FF + F), ffn_backward(false));

    const int blocks = row_blocks(N, F, gpu);  // part of each backward above
    add("gain_grad", format("%d x %d", blocks, FF), "", 0, 4.0 * FF * (blocks + 2), [=](Tensors& t) -> Launch {
        float *dgain = t.floats(FF), *partial = t.floats(size_t(blocks) * FF);
        return [=] { gain_grad(dgain, partial, blocks, FF, FF, gpu); };
    });
    return all;
}

std::vector<Case> embedding_and_loss_cases(const Config& c, int B, int logit_rows) {
    std::vector<Case> all;
    const int T = c.T, N = B * T, C = c.C, V = c.V, Vp = c.Vp();
    const bool gated = c.gated();
    std::vector<int> tokens(N);
    for (int i = 0; i < N; i++) tokens[i] = int(random_bits(1, 3, i) % V);
    const TokenPlaces p = token_places(tokens.data(), N);
    const int unique = int(p.begin.size()) - 1;
    const double positions = gated ? 0 : double(T) * C;
    all.push_back({"embedding_forward", format("N %d, C %d", N, C), "embedding", 1, 0,
                   sizeof(floatX) * (double(N + unique) * C + positions), [=](Tensors& t) -> Launch {
                       floatX *x = t.x(size_t(N) * C), *tok = t.x(size_t(Vp) * C),
                              *pos = gated ? nullptr : t.x(size_t(T) * C);
                       int* at = t.ints(tokens);
                       return [=] { embedding_forward(x, at, tok, pos, nullptr, N, T, C, gpu); };
                   }});
    all.push_back({"embedding_backward", format("N %d, C %d", N, C), "embedding, backward", 1, 0,
                   sizeof(floatX) * double(N) * C * (gated ? 1 : 2) + 8.0 * (double(unique) * C + positions),
                   [=](Tensors& t) -> Launch {
                       float *dtok = t.floats(size_t(Vp) * C), *dpos = gated ? nullptr : t.floats(size_t(T) * C);
                       floatX* dx = t.x(size_t(N) * C);
                       int *at = t.ints(tokens), *places = t.ints(p.places), *begin = t.ints(p.begin);
                       return [=] {
                           embedding_backward(dtok, gated ? Flat() : Flat(dpos), dx, at, places, begin, nullptr, unique, B, T, C,
                                              gpu);
                       };
                   },
                   true});
    all.push_back({"cross_entropy", format("rows %d, V %d", logit_rows, V), "head and loss", double(N) / logit_rows, 0,
                   sizeof(floatX) * 2.0 * logit_rows * Vp, [=](Tensors& t) -> Launch {
                       floatX* logits = t.x(size_t(logit_rows) * Vp);
                       float* losses = t.floats(logit_rows);
                       int* targets = t.ints(std::vector<int>(tokens.begin(), tokens.begin() + logit_rows));
                       return [=] { cross_entropy(losses, logits, targets, logit_rows, V, Vp, 1.0f / N, true, gpu); };
                   },
                   true});
    return all;
}

// Where it only counts, of one head of k and v and its queries: blocks wait for others of their head.
void add_attention(std::vector<Case>& all, Heads whole, double times) {
    Heads h = whole;
    const double parts = counting ? h.B * h.NKV : 1;
    if (counting) h = {1, h.T, h.NH / h.NKV, 1, h.HS};
    const size_t NC = size_t(h.B) * h.T * h.NH * h.HS, kv = size_t(h.B) * h.T * h.NKV * h.HS,
                 rows = size_t(h.B) * h.NH * h.T;
    const double pairs = parts * h.B * h.NH * h.T * (h.T + 1.0) / 2 * h.HS, X = parts * sizeof(floatX);
    const std::string shape = format("B %d, T %d, %d heads (%d kv) of %d", whole.B, h.T, whole.NH, whole.NKV, h.HS);
    all.push_back({"attention_forward", shape, times > 0 ? "attention, forward" : "", times, 4 * pairs,
                   X * (2.0 * NC + 2.0 * kv),
                   [=](Tensors& t) -> Launch {
                       floatX *out = t.x(NC), *q = t.x(NC), *k = t.x(kv), *v = t.x(kv);
                       float* lse = t.floats(rows);
                       return [=] { attention_forward(out, lse, q, k, v, h, gpu); };
                   },
                   false, parts});
    all.push_back({"attention_backward", shape, times > 0 ? "attention, backward" : "", times, 10 * pairs,
                   X * (4.0 * NC + 4.0 * kv),
                   [=](Tensors& t) -> Launch {
                       floatX *out = t.x(NC), *q = t.x(NC), *k = t.x(kv), *v = t.x(kv), *dout = t.x(NC), *dq = t.x(NC),
                              *dk = t.x(kv), *dv = t.x(kv);
                       float *lse = t.floats(rows), *scratch = t.floats(attention_scratch(h));
                       if (!counting) attention_forward(out, lse, q, k, v, h, gpu);
                       return [=] { attention_backward(dq, dk, dv, scratch, dout, out, q, k, v, lse, h, gpu); };
                   },
                   false, parts});
    if (times == 0) return;
    const size_t all_rows = size_t(whole.B) * whole.NH * h.T;  // part of the backward above
    all.push_back(
        {"attention_delta", shape, "", 0, 0, all_rows * (2.0 * sizeof(floatX) * h.HS + 4), [=](Tensors& t) -> Launch {
             floatX *out = t.x(all_rows * h.HS), *dout = t.x(all_rows * h.HS);
             float* delta = t.floats(all_rows);
             int* turns = t.zeros<int>(size_t(whole.B) * whole.NH * head_turns(h.T));
             return [=] {
                 with_tiles(h.HS, gpu, [&](auto width, auto) {
                     attention_delta<width.value>(delta, turns, dout, out, whole, gpu);
                 });
             };
         }});
}

// The flavour's own attention, then head sizes 64 and 128 over lengths, all of the same number of tokens and width.
std::vector<Case> attention_cases(const Config& c, int B, bool quick) {
    std::vector<Case> all;
    const Heads own = {B, c.T, c.NH, c.NKV, c.HS()};
    add_attention(all, own, c.L);
    const std::vector<int> sizes = {64, 128}, lengths = quick      ? std::vector<int>{64}
                                                        : counting ? std::vector<int>{c.T}
                                                                   : std::vector<int>{512, 1024, 2048};
    for (int HS : sizes)
        for (int T : lengths) {
            const int NH = std::max(1, c.C / HS);
            const Heads h = {std::max(1, B * c.T / T), T, NH, NH, HS};
            if (std::tie(h.B, h.T, h.NH, h.NKV, h.HS) != std::tie(own.B, own.T, own.NH, own.NKV, own.HS))
                add_attention(all, h, 0);
        }
    return all;
}

std::vector<Case> matmul_cases(const Config& c, int B, int logit_rows) {
    std::vector<Case> all;
    const double X = sizeof(floatX);
    for (const Linear& l : linears(c, B * c.T, logit_rows)) {
        const int N = l.N, K = l.K, M = l.M;
        const bool head = !strcmp(l.name, "head");
        const size_t NK = size_t(N) * K, NM = size_t(N) * M, MK = size_t(M) * K;
        const double times = head ? double(B) * c.T / N : c.L, flops = 2.0 * N * double(K) * M;
        const std::string shape = format("%s %d x %d x %d", l.name, N, K, M);
        const char *forward = head ? "head and loss" : "matmuls, forward",
                   *backward = head ? "head and loss" : "matmuls, backward";
        const float beta = l.residual ? 1.0f : 0.0f;
        all.push_back({"linear_forward", shape, forward, times, flops, X * (NK + NM + MK), [=](Tensors& t) -> Launch {
                           floatX *out = t.x(NM), *inp = t.x(NK), *w = t.x(MK, 0.02f);
                           return [=] { linear_forward(out, inp, w, N, K, M, gpu); };
                       }});
        all.push_back(
            {"linear_backward, inputs", shape, backward, times, flops, X * (NK + NM + MK), [=](Tensors& t) -> Launch {
                 floatX *dinp = t.x(NK), *dout = t.x(NM, 1e-3f), *w = t.x(MK, 0.02f);
                 return [=] { matmul(dinp, dout, w, false, false, N, K, M, CUDA_FLOATX, beta, gpu); };
             }});
        all.push_back({"linear_backward, weights", shape, backward, times, flops, X * (NK + NM) + 4.0 * MK,
                       [=](Tensors& t) -> Launch {
                           float* dw = t.floats(MK);
                           floatX *dout = t.x(NM, 1e-3f), *inp = t.x(NK);
                           return [=] { matmul(dw, dout, inp, true, false, M, K, N, CUDA_R_32F, 0.0f, gpu); };
                       }});
    }
    return all;
}

// S: the moments' type
template <typename S>
Launch prepare_adamw(Tensors& t, size_t size) {
    floatX* params = t.x(size, 0.02f);
    float *master = BF16 ? t.normal<float>(size, 0.02f) : nullptr, *grads = t.floats(size);
    Numbers* numbers = t.zeros<Numbers>(1);
    S *m = t.normal<S>(size, 1e-3f), *v = t.normal<S>(size, 1e-8f, 1e-6f);
    return [=] {
        decide_kernel<<<1, 1, 0, gpu.stream>>>(numbers, AdamW());
        adamw_kernel<float, S>
            <<<chunks(size), 256, 0, gpu.stream>>>(params, master, m, v, grads, numbers, size, 0, AdamW(), 1u);
        CHECK(cudaGetLastError());
    };
}

// On a piece of the flat buffers; a step takes as often as pieces make a model.
std::vector<Case> optimizer_cases(const Config& c, bool quick) {
    const size_t all = build_table(c).size, size = std::min(all, size_t(1) << (quick ? 16 : SERIAL ? 26 : 28));
    const double times = double(all) / size, weights = BF16 ? 8 + sizeof(floatX) : 2 * sizeof(floatX);
    const std::string shape = format("%zu parameters", size);
    return {{"gradient norm", shape, "gradient norm", times, 0, 4.0 * size,
             [=](Tensors& t) -> Launch {
                 float *grads = t.floats(size), *sums = t.floats(chunks(size));
                 Numbers* numbers = t.zeros<Numbers>(1);
                 return [=] {
                     square_sum_kernel<float><<<chunks(size), 256, 0, gpu.stream>>>(sums, grads, size);
                     numbers_kernel<<<1, 512, 0, gpu.stream>>>(numbers, sums, chunks(size), false);
                     CHECK(cudaGetLastError());
                 };
             },
             true},
            {"add", shape, "", 0, 0, 12.0 * size,
             [=](Tensors& t) -> Launch {
                 float *sum = t.floats(size), *x = t.floats(size);
                 return [=] {
                     add_kernel<float><<<std::min(chunks(size), 4 * gpu.sms), 256, 0, gpu.stream>>>(sum, x, size);
                     CHECK(cudaGetLastError());
                 };
             },
             true},
            {"AdamW", shape, "AdamW", times, 0, (4.0 + 16 + weights) * size,
             [=](Tensors& t) { return prepare_adamw<float>(t, size); }, true},
            {"AdamW, moments in bf16", shape, "", 0, 0, (4.0 + 8 + weights) * size,
             [=](Tensors& t) { return prepare_adamw<__nv_bfloat16>(t, size); }, true}};
}

// =====================================================================================================================
// Results: a table on the terminal, JSON for report.py

std::string quoted(const std::string& text) {
    std::string s = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') s += '\\';
        s += c;
    }
    return s + "\"";
}

std::string utc(const char* pattern) {
    char text[64];
    const time_t seconds = time(nullptr);
    tm parts;
    strftime(text, sizeof text, pattern, gmtime_r(&seconds, &parts));
    return text;
}

// On a CPU, those that share a kernel's blocks.
int threads() {
#ifdef CUDA_CPU
    return cuda_threads.threads;
#else
    return 1;
#endif
}

// Cores' worth of time that threads which never rest get of the machine.
double free_cores() {
    const double begin = now();
    const clock_t used = clock();
    std::vector<std::thread> all(threads());
    for (std::thread& t : all)
        t = std::thread([=] {
            while (now() - begin < 0.3) {
            }
        });
    for (std::thread& t : all) t.join();
    return double(clock() - used) / CLOCKS_PER_SEC / (now() - begin);
}

struct Result {
    Case test;
    Time time;
    double bound_ms;
};

struct Bench {
    std::string part = "kernels", model = SERIAL ? "60M" : "1B", filter, results;
    int B = 0;  // 0: as many as make 16K tokens, on a CPU 2K
    bool quick = false;
    Config config;
    std::string device;
    double cores = 0;  // that this process gets, where it is the device
    Ceilings ceilings;
    // FLOP/s, bytes/s: the ceilings' best, or a named device's
    double matmul_rate = 0, copy_rate = 0, elsewhere_rate = 0;
    std::vector<Result> rows;

    void print_ceilings(const char* title, const std::vector<Ceiling>& all, const char* unit, double scale) const {
        printf("%-48s %10s %8s %10s\n", title, "ms", "spread", unit);
        for (const Ceiling& c : all)
            printf("%-48s %10.4g %7.1f%% %10.4g\n", c.what.c_str(), c.time.ms, 100 * c.time.spread, c.rate() / scale);
        printf("\n");
    }

    void print_head() const {
        printf("%-50s %-42s %9s %7s %9s %9s %7s\n", "kernel", "shape", "ms", "spread", "GB/s", "TFLOP/s", "share");
    }
    void print(const Result& r) const {
        const Case& c = r.test;
        auto number = [](double x) { return x > 0 ? format("%.4g", x) : std::string(); };
        printf("%-50s %-42s %9.4g %6.1f%% %9.4g %9s %6.1f%%\n", c.name.c_str(), c.shape.c_str(), r.time.ms,
               100 * r.time.spread, c.bytes / r.time.ms / 1e6, number(c.flops / r.time.ms / 1e9).c_str(),
               100 * r.bound_ms / r.time.ms);
        fflush(stdout);
    }

    std::string json_of(const std::vector<Ceiling>& all, const char* unit, double scale) const {
        std::string s = "[";
        for (const Ceiling& c : all)
            s += format("%s\n  {\"what\": %s, \"ms\": %.6g, \"spread\": %.3f, \"%s\": %.6g}", s.size() > 1 ? "," : "",
                        quoted(c.what).c_str(), c.time.ms, c.time.spread, unit, c.rate() / scale);
        return s + "]";
    }
    std::string json() const {
        std::string s =
            format("{\n \"date\": \"%s\",\n \"device\": %s,\n \"precision\": \"%s\",\n \"threads\": %d,\n",
                   utc("%Y-%m-%dT%H:%MZ").c_str(), quoted(device).c_str(), PRECISION, threads());
        s += format(" \"cores\": %.2f,\n \"part\": \"%s\",\n \"model\": %s,\n \"batch_size\": %d,\n \"seq_len\": %d,\n",
                    cores, part.c_str(), quoted(model).c_str(), B, config.T);
        s += format(" \"copy_gb_s\": %.6g,\n \"matmul_tflops\": %.6g,\n", copy_rate / 1e9, matmul_rate / 1e12);
        s += " \"copies\": " + json_of(ceilings.copies, "gb_s", 1e9) +
             ",\n \"matmuls\": " + json_of(ceilings.matmuls, "tflops", 1e12) + ",\n \"kernels\": [";
        for (size_t i = 0; i < rows.size(); i++) {
            const Case& c = rows[i].test;
            s += format("%s\n  {\"name\": %s, \"shape\": %s, \"kind\": %s, \"times\": %.6g, ", i ? "," : "",
                        quoted(c.name).c_str(), quoted(c.shape).c_str(), quoted(c.kind).c_str(), c.times);
            s += format("\"flops\": %.6g, \"bytes\": %.6g, \"ms\": %.6g, \"spread\": %.3f, \"bound_ms\": %.6g}",
                        c.flops, c.bytes, rows[i].time.ms, rows[i].time.spread, rows[i].bound_ms);
        }
        return s + "]\n}\n";
    }

    // as the trainer cuts the logits (lay_out)
    int logit_rows() const {
        const size_t chunk = (size_t(1) << (BF16 ? 29 : 26)) / (config.Vp() * sizeof(floatX));
        return int(std::min<size_t>(size_t(B) * config.T, std::max<size_t>(16, chunk)));
    }

    template <typename F>
    void for_each_case(F f) const {
        for (const std::vector<Case>& cases :
             {norm_cases(config, B), embedding_and_loss_cases(config, B, logit_rows()),
              attention_cases(config, B, quick), matmul_cases(config, B, logit_rows()), optimizer_cases(config, quick)})
            for (const Case& c : cases)
                if (c.name.find(filter) != std::string::npos) f(c);
    }
    double bound_ms(const Case& c) const {
        return 1e3 * std::max(c.flops / matmul_rate, c.bytes / (c.in_place ? copy_rate : elsewhere_rate));
    }

    void bounds(const Device& on) {
        device = on.name, matmul_rate = on.flops, copy_rate = elsewhere_rate = on.copy;
        printf("%-50s %-42s %9s %9s\n", "kernel", "shape", "a step", "least ms");
        for_each_case([&](const Case& c) {
            rows.push_back({c, Time(), bound_ms(c)});
            printf("%-50s %-42s %9.4g %9.4g\n", c.name.c_str(), c.shape.c_str(), c.times, rows.back().bound_ms);
        });
    }

    void measure() {
        gpu = open_device();
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        device = properties.name;
        if (SERIAL) cores = free_cores();
        if (SERIAL && cores < 0.9 * threads())
            fprintf(stderr, "bench: other work leaves %.1f of %d cores: times are too long.\n", cores, threads());
        matmul.timing = true;
        Clock clock;
        clock.open(quick);
        printf("%s, %s build, %s; %s, B %d, T %d\n\n", device.c_str(), PRECISION, utc("%Y-%m-%d").c_str(),
               model.c_str(), B, config.T);
        ceilings = measure_ceilings(clock, config, B * config.T, logit_rows());
        matmul_rate = ceilings.matmul(), copy_rate = ceilings.copy(), elsewhere_rate = ceilings.copy_elsewhere();
        print_ceilings("copy, bytes read and written", ceilings.copies, "GB/s", 1e9);
        print_ceilings("matmul of random normal numbers", ceilings.matmuls, "TFLOP/s", 1e12);
        if (part == "kernels") print_head();
        for_each_case([&](const Case& c) {
            if (part != "kernels") return;
            Tensors tensors;
            const Time time = clock(c.prepare(tensors));
            rows.push_back({c, time, bound_ms(c)});
            print(rows.back());
        });
        clock.close();
        matmul.close();
    }

#ifdef USE_PTX
    // Every kernel once, as on an H100; attention also without Hopper's kernels. The machine writes what it counts.
    void count() {
        constexpr int SMS = 132;
        gpu.sms = SMS, gpu.shared = 227 << 10;
        for (bool hopper : {true, false})
            for_each_case([&](const Case& c) {
                const bool attention = c.name.compare(0, 9, "attention") == 0,
                           matmul = c.name.compare(0, 6, "linear") == 0;
                if (matmul || (!hopper && (!attention || c.parts == 1))) return;
                gpu.hopper = hopper;
                cuda_ptx_work = format(
                    "\"model\": %s, \"batch_size\": %d, \"seq_len\": %d, \"case\": %s, \"shape\": %s, "
                    "\"flops\": %.17g, \"bytes\": %.17g, \"parts\": %.17g",
                    quoted(model).c_str(), B, config.T, quoted(c.name + (hopper ? "" : ", mma.sync")).c_str(),
                    quoted(c.shape).c_str(), c.flops, c.bytes, c.parts);
                Tensors tensors;
                const Launch launch = c.prepare(tensors);
                // of attention all blocks, as many of them as take as many tiles each as in the whole
                gpu.sms = std::max(1, int(SMS / c.parts + 0.5));
                ptx::options.sample = c.parts == 1 ? 8 : 0;
                const double start = now();
                launch();
                CHECK(cudaDeviceSynchronize());
                gpu.sms = SMS;
                printf("%-50s %-42s %6.1f s\n", c.name.c_str(), c.shape.c_str(), now() - start);
                fflush(stdout);
            });
    }
#endif

    void write() const {
        std::string name = utc("%Y-%m-%d") + "-" + part + "-" + device + "-" + model;
        for (char& c : name) c = isalnum((unsigned char)c) || c == '.' || c == '-' ? char(tolower(c)) : '-';
        OutFile file(results + "/" + name + ".json");
        const std::string text = json();
        file.write(text.data(), text.size());
        file.commit();
        printf("\nwritten %s\n", file.path.c_str());
    }
};

const char HELP[] =
    "bench: times every kernel of the trainer beside the machine's limits (%s build).\n"
    "  --part WHAT       ceilings: copy speed and matmul rate; kernels: these and every kernel;\n"
    "                    bounds: the least time of every kernel on --device, nothing is measured (kernels);\n"
    "                    counts: what every kernel does, on the machine in dev/ptx (make ptx-costs)\n"
    "  --device DEVICE   of bounds: as of train_gpt --plan: a name, or TFLOP/s,GB/s,GiB\n"
    "  --model FLAVOUR   whose shapes; train_gpt --models lists them (%s)\n"
    "  --batch-size N    sequences (as many as make %d tokens)\n"
    "  --seq-len N       tokens of a sequence (%d)\n"
    "  --filter TEXT     only kernels with this in their names\n"
    "  --results DIR     write the numbers there too, as DATE-PART-DEVICE-MODEL.json\n"
    "  --quick           tiny shapes, few runs: tests the program, measures nothing\n";

int main(int argc, char** argv) {
    try {
        Bench b;
        b.config.T = SERIAL ? 512 : 2048;
        for (int i = 1; i < argc; i++) {
            const std::string flag = argv[i];
            if (flag == "--help") return printf(HELP, PRECISION, b.model.c_str(), SERIAL ? 2048 : 16384, b.config.T), 0;
            if (flag == "--quick") {
                b.quick = true, b.model = "20M", b.B = 1, b.config.T = 64;
                continue;
            }
            const char* const flags[] = {"--part",    "--device", "--model",  "--batch-size",
                                         "--seq-len", "--filter", "--results"};
            if (std::find(std::begin(flags), std::end(flags), flag) == std::end(flags))
                throw Error(flag + ": unknown option. See --help.");
            if (i + 1 == argc) throw Error(flag + ": needs a value. See --help.");
            const std::string value = argv[++i];
            if (flag == "--part") b.part = value;
            if (flag == "--device") b.device = value;
            if (flag == "--model") b.model = value;
            if (flag == "--batch-size") b.B = int(parse_integer("batch-size", value.c_str(), 1, 1 << 20));
            if (flag == "--seq-len") b.config.T = int(parse_integer("seq-len", value.c_str(), 1, 1 << 20));
            if (flag == "--filter") b.filter = value;
            if (flag == "--results") b.results = value;
        }
        counting = b.part == "counts";
        if (b.part != "ceilings" && b.part != "kernels" && b.part != "bounds" && !counting)
            throw Error("--part: '" + b.part + "' is none of ceilings, kernels, bounds, counts.");
#ifdef USE_PTX
        if (!cuda_ptx || counting != bool(cuda_ptx_counts))
            throw Error(
                "this build is for --part counts with CUDA_CPU_PTX and CUDA_CPU_PTX_COUNTS. Run: make ptx-costs.");
#else
        if (counting) throw Error("--part: counts needs a build with the machine in dev/ptx. Run: make ptx-costs.");
#endif
        if ((b.part == "bounds") == b.device.empty())
            throw Error("--device: says whose bounds are meant. Give it with --part bounds, and only there.");
        as_options([&] { apply_flavour(b.config, b.model); });
        if (double(b.B) * b.config.T > 1 << 24)
            throw Error(format("--batch-size: %d sequences of %d tokens are too many.", b.B, b.config.T));
        as_options([&] { finish(b.config); });
        if (b.B == 0) b.B = std::max(1, (SERIAL && b.part != "bounds" ? 2048 : 16384) / b.config.T);
        if (!b.results.empty()) make_dirs(b.results);
#ifdef USE_PTX
        return b.count(), 0;
#endif
        b.part == "bounds" ? b.bounds(parse_device(b.device)) : b.measure();
        if (!b.results.empty()) b.write();
    } catch (const std::exception& e) {
        fflush(stdout);
        fprintf(stderr, "bench: %s\n", e.what());
        return 1;
    }
    return 0;
}
