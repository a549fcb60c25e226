// Properties of every kernel and of the whole model at random shapes, the ugly ones too, against a model in float64
// that knows nothing of the trainer (reference.h). Runs on the CPU stand-in in both geometries.
//   properties [--cases N] [--seconds N] [--seed S] [--filter TEXT] [--case N] [--verbose]
// Cases come by turns from each family whose name holds TEXT, N of each (default 20) or until the time is over; one
// that fails prints its whole configuration and the command that repeats just it.
//
// What holds of a kernel, with d an incoming gradient, B(d) the gradients that it makes of it:
//   it agrees with float64 loops; so do slopes along random directions of the reference's forward with B
//   B(2 d1 - d2) = 2 B(d1) - B(d2)
//   sequences in another order give the same bits in that order; so do two calls with a part each, and gradients of
//   weights that are added up over the two are those of one call
//   the same call again gives the same bits (in the exact geometry the lanes then run in another order)
//   it writes where it should and nowhere else: outputs are NaN before, every buffer lies between guards, inputs stay
#include "../run/agree.h"
#include "../use/generate.h"
#include "../use/probe.h"

#include "dev/test/frame.h"
#include "dev/test/reference.h"

#include <sys/mman.h>
#include <sys/wait.h>

using reference::Tape;
using reference::Var;
using reference::Vec;

#ifdef EXACT_GEOMETRY
constexpr bool EXACT = true;
#else
constexpr bool EXACT = false;
#endif

Gpu gpu;

// ---------------------------------------------------------------------------------------------------------------------
// The frame

struct Random {
    std::mt19937_64 bits;
    double uniform() { return double(bits() >> 11) * 0x1p-53; }
    double normal() { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }
    int between(int least, int most) { return int(least + int64_t(bits() % (uint64_t(most) - least + 1))); }
    bool chance(double p) { return uniform() < p; }
    template <typename T>
    T pick(const std::vector<T>& of) {
        return of[bits() % of.size()];
    }
    // mostly small, else around a multiple of `tile` up to `most`
    int ugly(int small, int tile, int most) {
        if (most <= small || chance(0.6)) return between(1, std::min(small, most));
        return std::max(1, std::min(most, tile * between(1, std::max(1, most / tile)) + between(-1, 2)));
    }
    std::vector<int> permutation(int n) {
        std::vector<int> p(n);
        std::iota(p.begin(), p.end(), 0);
        for (int i = n - 1; i > 0; i--) std::swap(p[i], p[between(0, i)]);
        return p;
    }
    Vec normals(size_t n, double scale = 1, double shift = 0) {
        Vec v(n);
        for (double& x : v) x = shift + scale * normal();
        return v;
    }
};

double worst = 0;  // the largest error over tolerance of the running case, and what it is of
std::string worst_what, configuration;

void expect_close(double error, double tolerance, const std::string& what) {
    if (!(error <= tolerance)) fail(format("%s: error %.2e, tolerance %.1e", what.c_str(), error, tolerance));
    if (error > worst * tolerance) worst = error / tolerance, worst_what = what;
}
// largest difference over largest value; floor: the least scale, where the wanted values may all be 0
double difference(const Vec& got, const Vec& want, double floor = 1e-30) {
    double error = 0, scale = floor;
    if (got.size() != want.size()) return INFINITY;
    for (double w : want) scale = std::max(scale, w == w ? fabs(w) : 0);
    for (size_t i = 0; i < got.size(); i++) {
        const double e = got[i] != got[i] && want[i] != want[i] ? 0 : fabs(got[i] - want[i]) / scale;
        error = e == e ? std::max(error, e) : INFINITY;
    }
    return error;
}
bool same_bits(const Vec& a, const Vec& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(double));
}

enum Kind { F32, B16, F64, I32 };
constexpr Kind X = BF16 ? B16 : F32;
size_t width(Kind k) { return k == B16 ? 2 : k == F64 ? 8 : 4; }

// Device memory between guards. What is not set is NaN; what is set and `fixed` must stay.
struct Buffer {
    static constexpr size_t GUARD = 256;
    static constexpr unsigned char SENTINEL = 0x5A;  // as a float 1.5e16: who reads it shows it
    Kind kind;
    size_t n, bytes;
    char* base = nullptr;
    bool fixed = false;
    std::vector<char> written;

    Buffer(Kind kind, size_t n) : kind(kind), n(n), bytes(n * width(kind)) {
        CHECK(cudaMalloc((void**)&base, bytes + 2 * GUARD));
        CHECK(cudaMemset(base, SENTINEL, bytes + 2 * GUARD));
        CHECK(cudaMemset(data(), 0xFF, bytes));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(base); }
    char* data() const { return base + GUARD; }
    floatX* x() const { return reinterpret_cast<floatX*>(data()); }
    float* f() const { return reinterpret_cast<float*>(data()); }
    float2* f2() const { return reinterpret_cast<float2*>(data()); }
    double* d() const { return reinterpret_cast<double*>(data()); }
    int* i() const { return reinterpret_cast<int*>(data()); }
    Flat flat() const { return kind == B16 ? Flat(reinterpret_cast<__nv_bfloat16*>(data())) : Flat(f()); }

    void set(const Vec& values, bool stays = false) {
        written.resize(bytes);
        for (size_t i = 0; i < n; i++) {
            const float f = float(values[i]);
            const __nv_bfloat16 h = f;
            const int whole = int(kind == I32 ? values[i] : 0);
            const void* from = kind == F32   ? (const void*)&f
                               : kind == B16 ? (const void*)&h
                               : kind == F64 ? (const void*)&values[i]
                                             : &whole;
            memcpy(&written[i * width(kind)], from, width(kind));
        }
        fixed = stays;
        CHECK(cudaMemcpy(data(), written.data(), bytes, cudaMemcpyHostToDevice));
    }
    Vec get() const {
        std::vector<char> all(bytes);
        CHECK(cudaMemcpy(all.data(), data(), bytes, cudaMemcpyDeviceToHost));
        return numbers(all);
    }
    Vec numbers(const std::vector<char>& all) const {
        Vec v(n);
        for (size_t i = 0; i < n; i++) {
            float f;
            __nv_bfloat16 h;
            int whole;
            const char* from = &all[i * width(kind)];
            if (kind == F32) memcpy(&f, from, 4), v[i] = f;
            if (kind == B16) memcpy(&h, from, 2), v[i] = float(h);
            if (kind == F64) memcpy(&v[i], from, 8);
            if (kind == I32) memcpy(&whole, from, 4), v[i] = whole;
        }
        return v;
    }
    void check(const std::string& what) const {
        std::vector<char> all(bytes + 2 * GUARD);
        CHECK(cudaMemcpy(all.data(), base, all.size(), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < GUARD; i++) {
            if (all[GUARD - 1 - i] != SENTINEL)
                return fail(what + format(": written %zu bytes before its begin", i + 1));
            if (all[GUARD + bytes + i] != SENTINEL) return fail(what + format(": written %zu bytes behind its end", i));
        }
        if (fixed && !std::equal(written.begin(), written.end(), all.begin() + GUARD)) fail(what + ": was changed");
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// What is said of a kernel: the shapes of what goes in and out, how to run it, what it should do

// A buffer of the kernel's: `item` elements for each sequence, or, `shared`, for all of them.
struct Port {
    std::string name;
    bool shared;
    size_t item;
    Kind kind = X;
    double scale = 1, shift = 0;
    bool written = true;   // an output: by the kernel; an input: its gradient is
    bool weighed = true;   // an output: has an incoming gradient
    bool uniform = false;  // which is one number
    Kind gradient = X;     // type of an input's
    Vec values = {};       // given, else normal
    double floor = 1e-30;  // an output's least scale, to which errors are relative
};

struct Run;
struct Kernel {
    std::string what;
    int B;  // sequences (rows, tokens) that have nothing to do with one another
    std::vector<Port> in, out;
    std::function<void(Run&)> run;  // forward and backward
    std::function<std::vector<Var>(Tape&, const std::vector<Var>&)> reference;
    bool backward = true;
    bool bits = true;          // of a sequence are the same wherever it stands
    bool anew = false;         // gradients of what is shared can be made anew, not only added to
    double tolerance, slopes;  // of outputs; of their derivatives
    std::function<void(Random&)> more;
};

// One call for the sequences `which` of a kernel, in that order.
struct Run {
    const Kernel& k;
    std::vector<int> which;
    int B;
    bool add;  // gradients of what is shared are added to
    std::vector<std::unique_ptr<Buffer>> in, dout, out, din, others;

    Buffer& scratch(Kind kind, size_t n) {
        others.push_back(std::make_unique<Buffer>(kind, n));
        return *others.back();
    }
    Buffer& constant(Kind kind, const Vec& values) {
        Buffer& b = scratch(kind, values.size());
        b.set(values, true);
        return b;
    }
};

Vec part(const Vec& all, const Port& p, const std::vector<int>& which) {
    if (p.shared) return all;
    Vec v;
    for (int b : which) v.insert(v.end(), all.begin() + b * p.item, all.begin() + (b + 1) * p.item);
    return v;
}

// Outputs, then gradients. start: what gradients of shared inputs are added to; empty: they are made anew.
struct Results {
    std::vector<Vec> out, din;
};
Results execute(const Kernel& k, const std::vector<int>& which, const std::vector<Vec>& in,
                const std::vector<Vec>& dout, const std::vector<Vec>& start) {
    Run r{k, which, int(which.size()), !start.empty(), {}, {}, {}, {}, {}};
    auto buffers = [&](auto& to, const std::vector<Port>& ports, const std::vector<Vec>* values, bool gradients) {
        for (size_t i = 0; i < ports.size(); i++) {
            const Port& p = ports[i];
            to.push_back(std::make_unique<Buffer>(gradients ? p.gradient : p.kind, p.item * (p.shared ? 1 : r.B)));
            if (values) to.back()->set(part((*values)[i], p, which), true);
            if (gradients && p.shared && r.add) to.back()->set(start[i]);
        }
    };
    buffers(r.in, k.in, &in, false);
    buffers(r.out, k.out, nullptr, false);
    if (k.backward) buffers(r.dout, k.out, &dout, false), buffers(r.din, k.in, nullptr, true);
    k.run(r);
    CHECK(cudaDeviceSynchronize());
    Results got;
    for (size_t i = 0; i < r.in.size(); i++) r.in[i]->check(k.in[i].name);
    for (size_t i = 0; i < r.out.size(); i++) r.out[i]->check(k.out[i].name), got.out.push_back(r.out[i]->get());
    for (size_t i = 0; i < r.dout.size(); i++) r.dout[i]->check("gradient of " + k.out[i].name);
    for (size_t i = 0; i < r.din.size(); i++) r.din[i]->check("d" + k.in[i].name), got.din.push_back(r.din[i]->get());
    for (auto& b : r.others) b->check("scratch or constant");
    return got;
}

// Half a unit in the last place of bf16 just above a power of two is 3.9e-3. Sums over sequences that stay float are
// off by at most 5e-7.
constexpr double TOL_HALF = 4e-3, TOL_SUM = 1e-6;
double slope_tolerance(const Kernel& k, const Port& p) {
    if (p.gradient == B16) return std::max(TOL_HALF, k.slopes);
    return p.shared ? TOL_SUM : k.slopes;
}

void try_kernel(const Kernel& k, Random& r) {
    configuration = k.what;
    std::vector<int> all(k.B);
    std::iota(all.begin(), all.end(), 0);
    std::vector<Vec> in, start;
    auto rounded = [](Kind kind, const Vec& v) {
        Buffer b(kind, v.size());
        b.set(v);
        return b.get();
    };
    for (const Port& p : k.in) {
        const size_t n = p.item * (p.shared ? 1 : k.B);
        in.push_back(rounded(p.kind, p.values.empty() ? r.normals(n, p.scale, p.shift) : p.values));
        start.push_back(p.shared ? rounded(p.gradient, r.normals(n)) : Vec());
    }
    // incoming gradients of few bits, so that 2 d1 - d2 is exact in bf16 too
    std::vector<Vec> d1, d2, combined;
    for (const Port& p : k.out) {
        const size_t n = p.item * (p.shared ? 1 : k.B);
        for (auto* d : {&d1, &d2}) {
            Vec v(n);
            for (double& x : v) x = p.weighed ? std::clamp(round(8 * r.normal()), -31.0, 31.0) / 8 : 0;
            if (p.uniform) std::fill(v.begin(), v.end(), v[0] ? v[0] : 0.5);
            d->push_back(v);
        }
        combined.push_back(d1.back());
        for (size_t i = 0; i < n; i++) combined.back()[i] = 2 * d1.back()[i] - d2.back()[i];
    }

    // agreement
    auto reference = [&](Tape& t, const std::vector<Vec>& at, std::vector<Var>& vars) {
        for (size_t i = 0; i < at.size(); i++) vars.push_back(t.put(1, at[i].size(), at[i]));
        return k.reference(t, vars);
    };
    const Results got = execute(k, all, in, d1, start);
    Tape tape;
    std::vector<Var> vars;
    const std::vector<Var> want = reference(tape, in, vars);
    for (size_t i = 0; i < k.out.size(); i++)
        if (k.out[i].written)
            expect_close(difference(got.out[i], want[i]->v, k.out[i].floor), k.tolerance, k.out[i].name);
    const Results again = execute(k, all, in, d1, start);
    auto compare = [&](const char* what, const Results& a, const Results& b, bool bits) {
        for (size_t i = 0; i < a.out.size(); i++)
            if (bits ? !same_bits(a.out[i], b.out[i])
                     : !(difference(a.out[i], b.out[i], k.out[i].floor) <= 2 * k.tolerance))
                fail(format("%s: %s differs by %.2e", what, k.out[i].name.c_str(), difference(a.out[i], b.out[i])));
        for (size_t i = 0; i < a.din.size(); i++) {
            const Port& p = k.in[i];
            if (!p.written) continue;
            const bool same = bits && !p.shared;
            const double e = difference(a.din[i], b.din[i], 1), most = 2 * slope_tolerance(k, p);
            if (same ? !same_bits(a.din[i], b.din[i]) : !(e <= most))
                fail(format("%s: d%s differs by %.2e", what, p.name.c_str(), e));
        }
    };
    for (size_t i = 0; i < got.out.size(); i++)
        if (!same_bits(got.out[i], again.out[i])) fail("again: other bits of " + k.out[i].name);
    for (size_t i = 0; i < got.din.size(); i++)
        if (!same_bits(got.din[i], again.din[i])) fail("again: other bits of d" + k.in[i].name);

    // another order, and two calls
    const std::vector<int> order = r.permutation(k.B);
    const Results permuted = execute(k, order, in, d1, start);
    auto as_order = [&](const Results& a) {
        Results b = a;
        for (size_t i = 0; i < k.out.size(); i++) b.out[i] = part(a.out[i], k.out[i], order);
        for (size_t i = 0; i < b.din.size(); i++) b.din[i] = part(a.din[i], k.in[i], order);
        return b;
    };
    compare("sequences in another order", permuted, as_order(got), k.bits);
    if (k.B > 1) {
        const int cut = r.between(1, k.B - 1);
        const std::vector<int> first(all.begin(), all.begin() + cut), second(all.begin() + cut, all.end());
        Results a = execute(k, first, in, d1, start);
        Results b = execute(k, second, in, d1, a.din.empty() ? start : a.din);
        for (size_t i = 0; i < k.out.size(); i++) b.out[i].insert(b.out[i].begin(), a.out[i].begin(), a.out[i].end());
        for (size_t i = 0; i < b.din.size(); i++)
            if (!k.in[i].shared) b.din[i].insert(b.din[i].begin(), a.din[i].begin(), a.din[i].end());
        compare(format("cut at %d", cut).c_str(), b, got, k.bits);
    }
    if (k.more) k.more(r);
    if (!k.backward) return;

    // the reference's derivatives, and slopes of its forward along a random direction
    for (size_t i = 0; i < k.out.size(); i++)
        for (size_t j = 0; j < want[i]->v.size(); j++) want[i]->d[j] += k.out[i].weighed ? d1[i][j] : 0;
    tape.backward();
    std::vector<Vec> u;
    double of_kernel = 0, of_reference = 0, size = 0, tolerance = k.slopes;
    for (size_t i = 0; i < in.size(); i++) {
        const Port& p = k.in[i];
        u.push_back(r.normals(in[i].size(), p.scale));
        Vec wanted = vars[i]->d;
        double length = 0, most = 1;
        for (size_t j = 0; j < wanted.size(); j++) {
            if (!p.written) u[i][j] = 0;
            const double begin = p.shared && p.written ? start[i][j] : 0, slope = p.written ? got.din[i][j] - begin : 0;
            of_kernel += slope * u[i][j], of_reference += wanted[j] * u[i][j];
            length += u[i][j] * u[i][j], most = std::max(most, fabs(wanted[j]));
            wanted[j] += begin, most = std::max(most, fabs(wanted[j]));
        }
        size += most * sqrt(length);
        if (!p.written) continue;
        expect_close(difference(got.din[i], wanted, 1), slope_tolerance(k, p), "d" + p.name);
        tolerance = std::max(tolerance, slope_tolerance(k, p));
    }
    const double h = 3e-4;
    double by_difference = 0;
    for (auto [steps, weight] : {std::pair{1, 8.0}, {-1, -8.0}, {2, -1.0}, {-2, 1.0}}) {  // of fourth order
        std::vector<Vec> at = in;
        for (size_t i = 0; i < in.size(); i++)
            for (size_t j = 0; j < in[i].size(); j++) at[i][j] += u[i][j] ? steps * h * u[i][j] : 0;
        Tape t;
        std::vector<Var> there;
        const std::vector<Var> values = reference(t, at, there);
        for (size_t i = 0; i < k.out.size(); i++)
            for (size_t j = 0; j < values[i]->v.size() && k.out[i].weighed; j++)
                by_difference += d1[i][j] * values[i]->v[j] * weight / (12 * h);
    }
    expect_close(fabs(of_reference - by_difference) / std::max(size, 1e-30), 1e-6, "slope of the reference");
    expect_close(fabs(of_kernel - by_difference) / std::max(size, 1e-30), tolerance / 2, "slope");

    // linearity, of gradients that are made anew where they can be, else added to zeros
    std::vector<Vec> zeros;
    for (size_t i = 0; i < in.size() && !k.anew; i++) zeros.push_back(Vec(start[i].size()));
    const Results one = execute(k, all, in, d1, zeros), two = execute(k, all, in, d2, zeros),
                  sum = execute(k, all, in, combined, zeros);
    for (size_t i = 0; i < in.size(); i++) {
        if (!k.in[i].written) continue;
        Vec expected = one.din[i];
        double scale = 1;
        for (size_t j = 0; j < expected.size(); j++) {
            scale = std::max({scale, fabs(2 * one.din[i][j]), fabs(two.din[i][j])});
            expected[j] = 2 * one.din[i][j] - two.din[i][j];
        }
        expect_close(difference(sum.din[i], expected, scale), 2 * slope_tolerance(k, k.in[i]),
                     "linearity of d" + k.in[i].name);
    }
}

// While it lives, a device of few multiprocessors: a block then walks over several rows or tiles.
struct FewBlocks {
    const int sms = gpu.sms;
    explicit FewBlocks(int n) { gpu.sms = n; }
    ~FewBlocks() { gpu.sms = sms; }
};
struct WithDevice {  // with Hopper's kernels or without, with all shared memory or what most cards have
    const bool hopper = gpu.hopper;
    const size_t shared = gpu.shared;
    explicit WithDevice(bool use_hopper, bool small = false) {
        gpu.hopper = use_hopper;
        if (small) gpu.shared = SMALL_SHARED;
    }
    ~WithDevice() { gpu.hopper = hopper, gpu.shared = shared; }
};
int random_head_size(Random& r) { return r.chance(0.6) ? r.pick<int>({16, 32, 64, 72, 128}) : 8 * r.between(1, 32); }

int row_of(int width) { return BF16 ? (width + 7) / 8 * 8 : width; }  // rows in bf16 are multiples of 8

Var as(Var x, size_t rows, size_t cols) {
    x->rows = rows, x->cols = cols;
    return x;
}
Norm random_norm(Random& r) { return {r.pick<float>({1e-5f, 1e-6f, 1e-2f}), r.chance(0.4)}; }
Kind random_gradient(Random& r) { return r.chance(0.25) ? B16 : F32; }

// from (N,H HS) to (B,H,T,HS), or back; N = B T
Var heads_layout(Tape& t, Var x, size_t T, size_t H, size_t HS, bool to_heads) {
    std::vector<size_t> from(x->v.size());
    for (size_t i = 0; i < from.size(); i++) {  // i: in (N,H HS)
        const size_t b = i / (HS * H * T), there = ((b * H + i / HS % H) * T + i / (HS * H) % T) * HS + i % HS;
        to_heads ? from[there] = i : from[i] = there;
    }
    return reference::gather(t, x, from, from.size() / (H * HS), H * HS);
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernels

// norm_residual_forward, norm_backward, gain_grad. `around`: x itself, whose gradient the backward adds.
Kernel norm_kernel(Random& r) {
    const int N = r.ugly(20, 16, 70), C = row_of(r.ugly(70, 128, N < 8 ? 1600 : 300));
    const Norm norm = random_norm(r);
    const bool gain = r.chance(0.85), res = r.chance(0.5), around = r.chance(0.5), in_place = around && r.chance(0.5);
    Kernel k;
    k.what = format("norm N %d C %d eps %g center %d gain %d res %d around %d in_place %d blocks %d", N, C, norm.eps,
                    norm.center, gain, res, around, in_place, gpu.sms);
    k.B = N, k.backward = gain;
    k.tolerance = BF16 ? TOL_HALF : 4e-7, k.slopes = BF16 ? TOL_HALF : 8e-7;
    k.in = {{"x", false, size_t(C), X, 2, 0.5}};
    if (gain) k.in.push_back({"gain", true, size_t(C), X, 0.3, 1});
    if (gain) k.in.back().gradient = random_gradient(r);
    if (res) k.in.push_back({"res", false, size_t(C)}), k.in.back().written = false;
    k.out = {{"out", false, size_t(C)}};
    if (around) k.out.push_back({"around", false, size_t(C)}), k.out.back().written = false;
    k.run = [=](Run& r) {
        floatX* g = gain ? r.in[1]->x() : nullptr;
        float2* stats = r.scratch(F32, 2 * r.B).f2();
        norm_residual_forward(r.out[0]->x(), stats, r.in[0]->x(), res ? r.in.back()->x() : nullptr, g, r.B, C, norm,
                              gpu);
        if (!gain) return;
        float* partial = r.scratch(F32, size_t(row_blocks(r.B, C, gpu)) * C).f();
        if (in_place) CHECK(cudaMemcpy(r.din[0]->x(), r.dout[1]->x(), r.dout[1]->bytes, cudaMemcpyDeviceToDevice));
        norm_backward(r.din[0]->x(), r.din[1]->flat(), partial,
                      in_place ? r.din[0]->x()
                      : around ? r.dout[1]->x()
                               : nullptr,
                      r.dout[0]->x(), r.in[0]->x(), g, stats, r.B, C, norm, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var x = as(in[0], N, C);
        Var y = reference::norm(t, x, gain ? in[1] : nullptr, norm.eps, norm.center);
        if (res) y = reference::add(t, y, as(in.back(), N, C));
        return std::vector<Var>{y, x};
    };
    return k;
}

// qkv_norm_rope_forward and _backward
Kernel qkv_kernel(Random& r) {
    const int HS = random_head_size(r), NKV = r.between(1, 3), NH = NKV * r.between(1, 4);
    const Heads h = {r.between(1, 4), r.ugly(10, 16, 40), NH, NKV, HS};
    const Norm norm = random_norm(r);
    const int gains = r.pick<int>({0, 2, 3}), QKV = h.qkv();
    const bool turned = r.chance(0.7);
    Kernel k;
    k.what = format("qkv B %d T %d NH %d NKV %d HS %d eps %g center %d gains %d rope %d blocks %d", h.B, h.T, NH, NKV,
                    HS, norm.eps, norm.center, gains, turned, gpu.sms);
    k.B = h.B;
    k.tolerance = BF16 ? TOL_HALF : 4e-7, k.slopes = BF16 ? TOL_HALF : 8e-7;
    k.in = {{"raw", false, size_t(h.T) * QKV, X, 2, 0.3}};
    if (gains) {
        k.in.push_back({"gains", true, size_t(gains == 3 ? QKV : h.begin(2)), X, 0.3, 1});
        k.in.back().gradient = random_gradient(r);
    }
    for (int part = 0; part < 3; part++)
        k.out.push_back({std::string(1, "qkv"[part]), false, size_t(h.T) * h.width(part)});
    Vec turns;
    for (int i = 0; i < h.T * HS / 2; i++) {
        const double angle = 3 * r.normal();
        turns.push_back(float(cos(angle))), turns.push_back(float(sin(angle)));
    }
    k.run = [=](Run& r) {
        Heads now = h;
        now.B = r.B;
        floatX* g = gains ? r.in[1]->x() : nullptr;
        const QkvGains gain = {g, gains > 1 ? g + h.begin(1) : nullptr, gains > 2 ? g + h.begin(2) : nullptr};
        const float2* rope = turned ? r.constant(F32, turns).f2() : nullptr;
        float2* stats = r.scratch(F32, size_t(r.B) * h.T * 6).f2();
        float* partial = r.scratch(F32, size_t(row_blocks(r.B * h.T, h.width(0), gpu)) * QKV).f();
        qkv_norm_rope_forward(r.out[0]->x(), r.out[1]->x(), r.out[2]->x(), stats, r.in[0]->x(), gain, rope, now, norm,
                              gpu);
        qkv_norm_rope_backward(r.din[0]->x(), gains ? r.din[1]->flat() : Flat(), partial, r.dout[0]->x(),
                               r.dout[1]->x(), r.dout[2]->x(), r.in[0]->x(), gain, stats, rope, now, norm, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var raw = as(in[0], h.B * h.T, QKV);
        std::vector<Var> out;
        for (int part = 0; part < 3; part++) {
            Var y = reference::columns(t, raw, h.begin(part), h.width(part));
            if (part < gains)
                y = reference::norm(t, y, reference::columns(t, in[1], h.begin(part), h.width(part)), norm.eps,
                                    norm.center);
            if (turned && part < 2) y = reference::rotate(t, y, turns, h.T, HS);
            out.push_back(heads_layout(t, y, h.T, h.width(part) / HS, HS, true));
        }
        return out;
    };
    return k;
}

// ffn_norm_act_forward and _backward
Kernel ffn_kernel(Random& r) {
    const int N = r.ugly(20, 16, 70), F = row_of(r.ugly(70, 128, N < 4 ? 7300 : 300));
    const bool gated = r.chance(0.6), gain = r.chance(0.7);
    const int W = gated ? 2 * F : F;
    const Norm norm = random_norm(r);
    Kernel k;
    k.what = format("ffn N %d F %d gated %d gain %d eps %g center %d blocks %d", N, F, gated, gain, norm.eps,
                    norm.center, gpu.sms);
    k.B = N;
    k.tolerance = BF16 ? TOL_HALF : 4e-7, k.slopes = BF16 ? TOL_HALF : 8e-7;
    k.in = {{"raw", false, size_t(W), X, 2, 0.3}};
    if (gain) k.in.push_back({"gain", true, size_t(W), X, 0.3, 1});
    if (gain) k.in.back().gradient = random_gradient(r);
    k.out = {{"act", false, size_t(F)}};
    k.run = [=](Run& r) {
        floatX* g = gain ? r.in[1]->x() : nullptr;
        float2* stats = r.scratch(F32, size_t(r.B) * (gated ? 4 : 2)).f2();
        float* partial = r.scratch(F32, size_t(row_blocks(r.B, F, gpu)) * W).f();
        ffn_norm_act_forward(r.out[0]->x(), stats, r.in[0]->x(), g, r.B, F, gated, norm, gpu);
        ffn_norm_act_backward(r.din[0]->x(), gain ? r.din[1]->flat() : Flat(), partial, r.dout[0]->x(), r.in[0]->x(), g,
                              stats, r.B, F, gated, norm, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var raw = as(in[0], N, W), parts[2] = {};
        for (int i = 0; i < (gated ? 2 : 1); i++) {
            Var g = gain ? reference::columns(t, in[1], i * F, F) : nullptr;
            parts[i] = reference::norm(t, reference::columns(t, raw, i * F, F), g, norm.eps, norm.center);
        }
        return std::vector<Var>{gated ? reference::swiglu(t, parts[0], parts[1]) : reference::gelu(t, parts[0])};
    };
    return k;
}

// embedding_forward, embedding_backward, position_backward
Kernel embedding_kernel(Random& r) {
    const int B = r.between(1, 5), T = r.ugly(20, 16, 70), C = row_of(r.ugly(70, 128, 400)), V = r.ugly(9, 50, 200);
    const bool learned = r.chance(0.5);
    const Kind gradient = random_gradient(r);
    Kernel k;
    k.what = format("embedding B %d T %d C %d V %d learned %d gradients %d", B, T, C, V, learned, gradient);
    k.B = B;
    k.tolerance = BF16 ? TOL_HALF : 2e-7, k.slopes = TOL_SUM;
    k.in = {{"tok", true, size_t(V) * C}};
    if (learned) k.in.push_back({"pos", true, size_t(T + r.between(0, 2)) * C});
    for (Port& p : k.in) p.gradient = gradient;
    k.out = {{"x", false, size_t(T) * C}};
    std::vector<int> tokens(B * T);
    for (int& t : tokens) t = r.chance(0.3) ? V - 1 : r.between(0, V - 1);
    k.run = [=](Run& r) {
        std::vector<int> mine;
        for (int b : r.which) mine.insert(mine.end(), tokens.begin() + b * T, tokens.begin() + (b + 1) * T);
        const TokenPlaces p = token_places(mine.data(), int(mine.size()));
        auto ints = [&](const std::vector<int>& x) { return r.constant(I32, Vec(x.begin(), x.end())).i(); };
        const int *ids = ints(mine), *places = ints(p.places), *begin = ints(p.begin);
        const int N = int(mine.size());
        embedding_forward(r.out[0]->x(), ids, r.in[0]->x(), learned ? r.in[1]->x() : nullptr, nullptr, N, T, C, gpu);
        embedding_backward(r.din[0]->flat(), learned ? r.din[1]->flat() : Flat(), r.dout[0]->x(), ids, places, begin, nullptr,
                           int(p.begin.size()) - 1, r.B, T, C, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var x = reference::lookup(t, as(in[0], V, C), tokens);
        std::vector<int> positions;
        for (int n = 0; n < B * T; n++) positions.push_back(n % T);
        if (learned) x = reference::add(t, x, reference::lookup(t, as(in[1], in[1]->v.size() / C, C), positions));
        return std::vector<Var>{x};
    };
    return k;
}

// linear_forward, linear_backward. Matmuls may add in another order at another number of rows.
Kernel linear_kernel(Random& r) {
    const int N = r.ugly(20, 16, 70), K = row_of(r.ugly(40, 64, 300)), M = row_of(r.ugly(40, 64, 300));
    const bool around = r.chance(0.5);
    Kernel k;
    k.what = format("linear N %d K %d M %d around %d", N, K, M, around);
    k.B = N, k.bits = false, k.anew = true;
    k.tolerance = BF16 ? TOL_HALF : 1e-6, k.slopes = BF16 ? TOL_HALF : 1.5e-6;
    k.in = {{"x", false, size_t(K)}, {"w", true, size_t(M) * K}};
    k.in[1].gradient = random_gradient(r);
    k.out = {{"out", false, size_t(M)}};
    if (around) k.out.push_back({"around", false, size_t(K)}), k.out.back().written = false;
    k.run = [=](Run& r) {
        linear_forward(r.out[0]->x(), r.in[0]->x(), r.in[1]->x(), r.B, K, M, gpu);
        if (around) CHECK(cudaMemcpy(r.din[0]->x(), r.dout[1]->x(), r.dout[1]->bytes, cudaMemcpyDeviceToDevice));
        linear_backward(r.din[0]->x(), around, r.din[1]->flat(), r.add ? 1.0f : 0.0f, r.dout[0]->x(), r.in[0]->x(),
                        r.in[1]->x(), r.B, K, M, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var x = as(in[0], N, K);
        return std::vector<Var>{reference::linear(t, x, as(in[1], M, K)), x};
    };
    return k;
}

// attention_forward, attention_delta, attention_backward, and Hopper's two. Beyond what holds of all kernels: what
// comes later changes nothing before, neither there nor back; heads in another order give the same bits in that order.
//
// Rows that share a warp are rescaled together, when the largest score of any of them has grown, which moves a rounding
// of the others. The first tile of keys is never rescaled: up to its end what comes later changes no bit, from there on
// nothing but roundings.
int first_tile(int HS) {
    int keys = 0;
    with_tiles(HS, gpu, [&](auto width, auto) { keys = forward_shape(width.value).cols; });
    return keys;
}

Kernel attention_kernel(Random& r) {
    const int NKV = r.between(1, 3), NH = NKV * r.between(1, 3);
    const bool use_hopper = BF16 && (EXACT || gpu.hopper) && r.chance(0.6);
    const bool small = !SERIAL && !use_hopper && r.chance(0.5);
    const int HS = use_hopper ? r.pick<int>({64, 128}) : random_head_size(r);
    const Heads h = {r.between(1, 2), r.ugly(20, 32, r.chance(0.2) ? 260 : 70), NH, NKV, HS};
    const double scale = r.pick<double>({1, 1, 4, 10});
    const size_t wide = size_t(h.T) * h.width(0), narrow = size_t(h.T) * h.width(1);
    Kernel k;
    k.what = format("attention B %d T %d NH %d NKV %d HS %d scale %g hopper %d small %d blocks %d", h.B, h.T, NH, NKV,
                    HS, scale, use_hopper, small, gpu.sms);
    k.B = h.B;
    // an error of scores is one of their exponentials; ds, which multiplies q, is rounded to bf16: measured below
    // 1.35e-2 at scale 1, 3.1e-2 at 4, 4.6e-2 at 10
    k.tolerance = BF16 ? 6e-3 : 1e-6 + 6e-7 * scale;
    k.slopes = !BF16 ? 2e-6 + 1.6e-6 * scale : scale == 1 ? 1.35e-2 : 2.2e-2 + 3e-3 * scale;
    k.in = {{"q", false, wide, X, scale}, {"k", false, narrow}, {"v", false, narrow}};
    k.out = {{"out", false, wide}, {"lse", false, size_t(NH) * h.T, F32}};
    k.out[1].weighed = false;
    k.run = [=](Run& r) {
        WithDevice with(use_hopper, small);
        Heads now = h;
        now.B = r.B;
        attention_forward(r.out[0]->x(), r.out[1]->f(), r.in[0]->x(), r.in[1]->x(), r.in[2]->x(), now, gpu);
        float* scratch = r.scratch(F32, attention_scratch(now)).f();
        attention_backward(r.din[0]->x(), r.din[1]->x(), r.din[2]->x(), scratch, r.dout[0]->x(), r.out[0]->x(),
                           r.in[0]->x(), r.in[1]->x(), r.in[2]->x(), r.out[1]->f(), now, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        Var x[3];
        for (int part = 0; part < 3; part++) x[part] = heads_layout(t, in[part], h.T, h.width(part) / HS, HS, false);
        Vec lse;
        Var out = reference::attention(t, x[0], x[1], x[2], h.T, NH, NKV, &lse);
        return std::vector<Var>{out, t.put(1, lse.size(), lse)};
    };
    k.more = [=](Random& r) {
        std::vector<int> all(h.B);
        std::iota(all.begin(), all.end(), 0);
        std::vector<Vec> in, dout = {r.normals(h.B * wide), Vec(h.B * NH * h.T)};
        for (const Port& p : k.in) in.push_back(r.normals(h.B * p.item, p.scale));
        auto run = [&](const std::vector<Vec>& x) { return execute(k, all, x, dout, {{}, {}, {}}); };
        const int t0 = r.between(0, h.T - 1);  // the last that stays; no gradient comes from behind it
        // f(element, head, position) of the elements of a layout: rows of HS, heads outside (q, k, v) or inside (out)
        auto walk = [&](size_t size, int H, bool inside, auto f) {
            for (size_t i = 0; i < size; i++) {
                const size_t row = i / HS;
                inside ? f(i, int(row % H), int(row / H % h.T)) : f(i, int(row / h.T % H), int(row % h.T));
            }
        };
        walk(dout[0].size(), NH, true, [&](size_t i, int, int t) { dout[0][i] *= t <= t0; });
        const Results before = run(in);
        std::vector<Vec> later = in;
        for (int part = 0; part < 3; part++)
            walk(in[part].size(), part ? NKV : NH, false, [&](size_t i, int, int t) {
                if (t > t0) later[part][i] = 3 * r.normal();
            });
        const Results after = run(later);
        bool zero = true;
        auto unchanged = [&](const Vec& a, const Vec& b, int H, bool inside, double tolerance,
                             const std::string& what) {
            Vec early[2];
            walk(a.size(), H, inside, [&](size_t i, int, int t) {
                if (t <= t0) early[0].push_back(a[i]), early[1].push_back(b[i]);
            });
            const double e = difference(early[1], early[0], 1);
            if (t0 < first_tile(HS) ? !same_bits(early[0], early[1]) : !(e <= tolerance))
                fail(format("changes behind position %d change %s at or before it by %.1e", t0, what.c_str(), e));
        };
        unchanged(before.out[0], after.out[0], NH, true, k.tolerance, "out");
        for (int part = 0; part < 3; part++) {
            unchanged(before.din[part], after.din[part], part ? NKV : NH, false, k.slopes, "d" + k.in[part].name);
            walk(in[part].size(), part ? NKV : NH, false,
                 [&](size_t i, int, int t) { zero &= t <= t0 || after.din[part][i] == 0; });
        }
        if (!zero) fail(format("gradients behind position %d, from where none comes", t0));

        const std::vector<int> order = r.permutation(NKV);
        auto moved = [&](const Vec& x, int H, bool inside) {
            Vec y(x.size());
            walk(x.size(), H, inside, [&](size_t i, int head, int) {
                const int g = H / NKV, other = order[head / g] * g + head % g;
                y[i] = x[i + (ptrdiff_t(other) - head) * ptrdiff_t(inside ? HS : h.T * HS)];
            });
            return y;
        };
        std::vector<Vec> heads = {moved(in[0], NH, false), moved(in[1], NKV, false), moved(in[2], NKV, false)};
        dout[0] = moved(dout[0], NH, true);
        const Results turned = run(heads);
        if (!same_bits(turned.out[0], moved(before.out[0], NH, true)))
            fail("heads in another order: other bits of out");
        for (int part = 0; part < 3; part++)
            if (!same_bits(turned.din[part], moved(before.din[part], part ? NKV : NH, false)))
                fail("heads in another order: other bits of d" + k.in[part].name);
    };
    return k;
}

// attention_forward of T tokens behind others, whose keys and values lie in a cache; behind them it holds NaN.
Kernel past_kernel(Random& r) {
    const int HS = random_head_size(r), NKV = r.between(1, 3), NH = NKV * r.between(1, 3);
    const int T = r.chance(0.6) ? 1 : r.ugly(8, 16, 70), length = T + r.ugly(20, 64, r.chance(0.2) ? 600 : 140) - 1;
    const int past = length - T, room = length + r.between(0, 3);
    const Heads h = {r.between(1, 3), T, NH, NKV, HS, past, room};
    const double scale = r.pick<double>({1, 1, 5, 15});
    const size_t cached = size_t(NKV) * room * HS;
    Kernel k;
    k.what =
        format("past B %d T %d past %d room %d NH %d NKV %d HS %d scale %g", h.B, T, past, room, NH, NKV, HS, scale);
    k.B = h.B, k.backward = false;
    k.tolerance = BF16 ? 5e-3 : scale > 5 ? 1e-5 : 2.5e-6;  // measured 4.3e-3; 6.1e-6, 1.4e-6
    k.in = {{"q", false, size_t(T) * h.width(0), X, scale}, {"keys", false, cached}, {"values", false, cached}};
    for (int i : {1, 2}) {
        k.in[i].values = r.normals(h.B * cached);
        for (size_t j = 0; j < h.B * cached; j++)
            if (int(j / HS % room) >= length) k.in[i].values[j] = NAN;
    }
    k.out = {{"out", false, size_t(T) * h.width(0)}};
    k.run = [=](Run& r) {
        Heads now = h;
        now.B = r.B;
        float* lse = r.scratch(F32, size_t(r.B) * NH * T).f();
        attention_forward(r.out[0]->x(), lse, r.in[0]->x(), r.in[1]->x(), r.in[2]->x(), now, gpu);
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {  // of all tokens, with no queries but the last
        Var rows[2], q = t.put(h.B * length, h.width(0));
        for (int i : {0, 1}) {
            rows[i] = t.put(h.B * length, h.width(1));
            for (int b = 0; b < h.B; b++)
                for (int g = 0; g < NKV; g++)
                    for (int j = 0; j < length; j++)
                        for (int c = 0; c < HS; c++)
                            rows[i]->v[((size_t(b) * length + j) * NKV + g) * HS + c] =
                                in[1 + i]->v[((size_t(b) * NKV + g) * room + j) * HS + c];
        }
        std::vector<int> last;
        for (int b = 0; b < h.B; b++)
            for (int j = 0; j < T; j++) {
                last.push_back(b * length + past + j);
                for (int head = 0; head < NH; head++)
                    for (int c = 0; c < HS; c++)
                        q->v[size_t(last.back()) * q->cols + head * HS + c] =
                            in[0]->v[((size_t(b) * NH + head) * T + j) * HS + c];
            }
        return std::vector<Var>{
            reference::lookup(t, reference::attention(t, q, rows[0], rows[1], length, NH, NKV), last)};
    };
    return k;
}

// cross_entropy, in place, and without gradients, which must leave the logits. Tokens in another order: the same
// losses.
Kernel cross_entropy_case(Random& r) {
    const int N = r.ugly(8, 16, 20), V = r.ugly(70, 64, r.chance(0.2) ? 5000 : 600), Vp = (V + 63) / 64 * 64;
    const double scale = r.pick<double>({1, 5, 20, 60});
    Kernel k;
    k.what = format("cross_entropy N %d V %d scale %g", N, V, scale);
    k.B = N;
    // a logit of 60 has an error of 4e-6 by itself, and so has its difference to the logarithm of the sum
    k.tolerance = 4e-7, k.slopes = BF16 ? TOL_HALF : 2e-6 + 1.3e-7 * scale;
    k.in = {{"logits", false, size_t(Vp), X, scale}};
    k.out = {{"losses", false, 1, F32}};
    k.out[0].uniform = true, k.out[0].floor = scale;
    std::vector<int> targets(N);
    for (int& t : targets) t = r.chance(0.3) ? V - 1 : r.between(0, V - 1);
    k.run = [=](Run& r) {
        Vec mine;
        for (int n : r.which) mine.push_back(targets[n]);
        const int* ids = r.constant(I32, mine).i();
        float* plain = r.scratch(F32, r.B).f();
        cross_entropy(plain, r.in[0]->x(), ids, r.B, V, Vp, 1.0f, false, gpu);
        CHECK(cudaMemcpy(r.din[0]->x(), r.in[0]->x(), r.in[0]->bytes, cudaMemcpyDeviceToDevice));
        const float weight = float(r.dout[0]->get()[0]);
        cross_entropy(r.out[0]->f(), r.din[0]->x(), ids, r.B, V, Vp, weight, true, gpu);
        if (!same_bits(r.others.back()->get(), r.out[0]->get())) fail("losses without gradients are others");
    };
    k.reference = [=](Tape& t, const std::vector<Var>& in) {
        return std::vector<Var>{reference::cross_entropy(t, as(in[0], N, Vp), targets, V)};
    };
    k.more = [=](Random& r) {
        const std::vector<int> order = r.permutation(V);  // token v's column goes to order[v]
        Vec x = r.normals(size_t(N) * Vp, scale), y = r.normals(x.size(), scale), ids[2], losses[2], d[2];
        for (int n = 0; n < N; n++) {
            for (int v = 0; v < V; v++) y[n * Vp + order[v]] = x[n * Vp + v];
            ids[0].push_back(targets[n]), ids[1].push_back(order[targets[n]]);
        }
        for (int i : {0, 1}) {
            Buffer logits(X, x.size()), loss(F32, N), target(I32, N);
            logits.set(i ? y : x), target.set(ids[i], true);
            cross_entropy(loss.f(), logits.x(), target.i(), N, V, Vp, 1.0f, true, gpu);
            losses[i] = loss.get(), d[i] = logits.get();
        }
        Vec back = d[0];
        for (int n = 0; n < N; n++)
            for (int v = 0; v < V; v++) back[n * Vp + v] = d[1][n * Vp + order[v]];
        expect_close(difference(losses[1], losses[0], scale), k.tolerance, "losses of another vocabulary order");
        expect_close(difference(back, d[0], 1), k.slopes, "dlogits of another vocabulary order");
    };
    return k;
}

// ---------------------------------------------------------------------------------------------------------------------
// Flat buffers: gradient norm, AdamW, hashes, sums over micro-batches, the probe's vectors

// AdamW of `count` elements in one call and in several, which must give the same bits, also where it rounds at random.
template <typename G, typename S>
void try_adamw(Random& r, Kind gradient, Kind moment) {
    const size_t count = FOUR * size_t(r.ugly(40, int(CHUNK / FOUR), int(2 * CHUNK / FOUR)));
    const size_t index = size_t(r.between(0, 1 << 20)) * FOUR;
    const bool master = BF16 && r.chance(0.6), random_weights = BF16 && !master;
    AdamW o;
    o.lr = float(r.pick<double>({1e-3, 1e-2, 0.3})), o.beta1 = float(r.pick<double>({0, 0.9, 0.99}));
    o.beta2 = float(r.pick<double>({0.9, 0.95, 0.999})), o.weight_decay = float(r.pick<double>({0, 0.1}));
    o.clip = float(r.pick<double>({0, 0.5, 1e6})), o.eps = float(r.pick<double>({1e-8, 1e-3}));
    const int t = r.between(1, 50);
    configuration = format(
        "adamw count %zu index %zu gradients %d moments %d master %d lr %g betas %g %g decay %g clip %g "
        "eps %g step %d",
        count, index, gradient, moment, master, o.lr, o.beta1, o.beta2, o.weight_decay, o.clip, o.eps, t);
    Vec g = r.normals(count, r.pick<double>({1e-6, 0.1, 10})), w = r.normals(count), m = r.normals(count, 0.1),
        v(count);
    for (double& x : v) x = pow(r.normal(), 2) * 0.1;
    double square = 0, scale = 0, norm = 0;
    Vec first[4];
    for (int pieces : {1, r.between(2, 4)}) {
        Buffer grads(gradient, count), params(X, count), masters(F32, count), m1(moment, count), m2(moment, count);
        Buffer sums(F32, chunks(count)), numbers(I32, sizeof(Numbers) / 4);
        grads.set(g, true), params.set(w), masters.set(w), m1.set(m), m2.set(v);
        const Vec g0 = grads.get(), w0 = master ? masters.get() : params.get(), m0 = m1.get(), v0 = m2.get();
        Numbers n = {};
        n.loss = 2.5f, n.updates = t - 1;
        CHECK(cudaMemcpy(numbers.data(), &n, sizeof(n), cudaMemcpyHostToDevice));
        Numbers* there = reinterpret_cast<Numbers*>(numbers.data());
        square_sum_kernel<G><<<chunks(count), 256>>>(sums.f(), reinterpret_cast<G*>(grads.data()), count);
        numbers_kernel<<<1, 512>>>(there, sums.f(), chunks(count), false);
        decide_kernel<<<1, 1>>>(there, o);
        for (size_t at = 0, end; at < count; at = end) {
            end = pieces == 1 ? count : std::min(count, at + FOUR * size_t(r.between(1, int(count / FOUR))));
            adamw_kernel<G, S><<<chunks(end - at), 256>>>(
                params.x() + at, master ? masters.f() + at : nullptr, reinterpret_cast<S*>(m1.data()) + at,
                reinterpret_cast<S*>(m2.data()) + at, reinterpret_cast<G*>(grads.data()) + at, there, end - at,
                index + at, o, 77);
        }
        CHECK(cudaMemcpy(&n, there, sizeof(n), cudaMemcpyDeviceToHost));
        for (const Buffer* b : {&grads, &params, &masters, &m1, &m2, &sums, &numbers}) b->check("a flat buffer");
        const Vec got[4] = {params.get(), m1.get(), m2.get(), masters.get()};
        if (pieces > 1) {
            for (int i = 0; i < 4; i++)
                if (!same_bits(got[i], first[i])) fail("in pieces: other bits");
            return;
        }
        for (int i = 0; i < 4; i++) first[i] = got[i];
        for (double x : g0) square += x * x;
        norm = sqrt(square), scale = o.clip > 0 ? std::min(1.0, o.clip / (norm + 1e-6)) : 1;
        expect_close(fabs(n.grad_norm / norm - 1), 2e-6, "gradient norm");
        if (n.updates != t || n.skipped || n.skip || n.loss != 2.5f) fail("counts of updates");
        Vec want[3] = {w0, m0, v0}, most[3];  // and the sizes of the sums' terms, to which errors are relative
        for (size_t i = 0; i < count; i++) {
            want[0][i] = reference::adamw(w0[i], want[1][i], want[2][i], g0[i] * scale, o.lr, o.beta1, o.beta2, o.eps,
                                          o.weight_decay, t);
            most[1].push_back(o.beta1 * fabs(m0[i]) + (1 - o.beta1) * fabs(g0[i] * scale));
            most[2].push_back(want[2][i]);
            most[0].push_back(fabs(w0[i]) + o.lr * most[1][i] / (1 - pow(o.beta1, t)) /
                                                (sqrt(want[2][i] / (1 - pow(o.beta2, t))) + o.eps));
        }
        const Vec& weights = master ? got[3] : got[0];
        double off[3] = {};  // relative where values are rounded at random, to one step of bf16
        for (size_t i = 0; i < count; i++)
            for (int j = 0; j < 3; j++) {
                const double e = fabs((j ? got[j] : weights)[i] - want[j][i]), ulp = fabs(want[j][i]) + 1e-6;
                const bool at_random = j ? moment == B16 : random_weights;
                off[j] = std::max(off[j], at_random ? e / (ulp * 0x1p-7 * 1.01) : e / (1e-6 * most[j][i] + 1e-30));
                if (e != e) off[j] = INFINITY;
            }
        for (int j = 0; j < 3; j++) expect_close(off[j], 1, j == 0 ? "weights" : j == 1 ? "first moments" : "second");
        if (master)
            for (size_t i = 0; i < count; i++)
                if (got[0][i] != double(float(floatX(float(got[3][i])))))
                    fail("weights are not their masters, rounded");
    }
}

void adamw_case(Random& r) {
    const Kind gradient = random_gradient(r), moment = random_gradient(r);
    if (gradient == F32 && moment == F32) try_adamw<float, float>(r, gradient, moment);
    if (gradient == F32 && moment == B16) try_adamw<float, __nv_bfloat16>(r, gradient, moment);
    if (gradient == B16 && moment == F32) try_adamw<__nv_bfloat16, float>(r, gradient, moment);
    if (gradient == B16 && moment == B16) try_adamw<__nv_bfloat16, __nv_bfloat16>(r, gradient, moment);
}

// add_kernel, loss_sum_kernel, the weights' hash, the probe's kernels
void flat_case(Random& r) {
    const size_t n = FOUR * size_t(r.ugly(40, int(CHUNK / FOUR), int(2 * CHUNK / FOUR)));
    const size_t odd = std::max<size_t>(1, n - size_t(r.between(0, 3)));
    const int blocks = chunks(odd);
    const Kind kind = random_gradient(r);
    configuration = format("flat n %zu odd %zu sums %d", n, odd, kind);
    const Vec a = r.normals(n), b = r.normals(n), c = r.normals(n);
    Buffer sum(kind, n), other(kind, n);
    sum.set(a), other.set(b, true);
    Vec want = sum.get();
    const Vec more = other.get();
    for (size_t i = 0; i < n; i++) want[i] += more[i];
    if (kind == B16)
        add_kernel<__nv_bfloat16><<<r.between(1, 5), 256>>>(reinterpret_cast<__nv_bfloat16*>(sum.data()),
                                                            reinterpret_cast<__nv_bfloat16*>(other.data()), n);
    else
        add_kernel<float><<<r.between(1, 5), 256>>>(sum.f(), other.f(), n);
    expect_close(difference(sum.get(), want), kind == B16 ? TOL_HALF : 1e-7, "add");
    sum.check("sum"), other.check("added");

    Buffer losses(F32, odd), mean(F32, 1);
    const Vec some(a.begin(), a.begin() + odd);
    losses.set(some, true), mean.set({0.25});
    loss_sum_kernel<<<1, 512>>>(mean.f(), losses.f(), int(odd), 1.0f / odd);
    double total = 0.25, size = 0.25;
    for (double x : losses.get()) total += x / odd, size += fabs(x) / odd;
    expect_close(fabs(mean.get()[0] - total) / size, 2e-7, "mean loss");
    mean.check("mean"), losses.check("losses");

    // the hash is a sum of what each word and its place make, modulo 2^64
    Buffer words(I32, odd), parts(F64, blocks), hash(F64, 1);
    Vec integers(odd);
    for (double& x : integers) x = double(r.between(-(1 << 30), 1 << 30));
    auto hashed = [&] {
        weights_hash_kernel<<<blocks, 256>>>(reinterpret_cast<unsigned long long*>(parts.data()),
                                             reinterpret_cast<unsigned*>(words.data()), odd);
        hash_sum_kernel<<<1, 512>>>(reinterpret_cast<unsigned long long*>(hash.data()),
                                    reinterpret_cast<unsigned long long*>(parts.data()), blocks);
        unsigned long long value = 0;
        CHECK(cudaMemcpy(&value, hash.data(), 8, cudaMemcpyDeviceToHost));
        return value;
    };
    words.set(integers, true);
    unsigned long long by_hand = 0;
    for (size_t i = 0; i < odd; i++) {
        unsigned long long x = (unsigned(int(integers[i])) + 0x9e3779b97f4a7c15ull * (i + 1)) * 0xbf58476d1ce4e5b9ull;
        by_hand += (x ^ (x >> 29)) * 0x94d049bb133111ebull;
    }
    if (hashed() != by_hand) fail("hash");
    words.check("words"), parts.check("parts"), hash.check("hash");
    const int i = r.between(0, int(odd) - 1), j = r.between(0, int(odd) - 1);
    std::swap(integers[i], integers[j]);
    if (integers[i] == integers[j]) integers[i]++;
    words.set(integers, true);
    if (hashed() == by_hand) fail("hash: words changed or exchanged have the same");

    Buffer x(X, odd), y(X, odd), p(F32, odd), q(F32, odd), s(F32, odd), out(F32, odd), noise(F32, odd),
        d(F64, 2 * blocks);
    auto cut = [&](const Vec& v) { return Vec(v.begin(), v.begin() + odd); };
    x.set(cut(a), true), y.set(cut(b), true), p.set(cut(a), true), q.set(cut(b), true), s.set(cut(c));
    const bool minus = r.chance(0.5);
    scale_kernel<<<blocks, 256>>>(d.d(), x.x(), minus ? y.x() : nullptr, odd);
    Vec squares(2 * blocks), dots(blocks), mixed(odd), step(odd);
    const Vec xv = x.get(), yv = y.get(), pv = p.get(), qv = q.get(), sv = s.get();
    for (size_t i = 0; i < odd; i++) {
        const double e = xv[i] - minus * yv[i];
        squares[i / CHUNK] += e * e, squares[blocks + i / CHUNK] = std::max(squares[blocks + i / CHUNK], fabs(e));
        dots[i / CHUNK] += pv[i] * qv[i];
        mixed[i] = 0.5 * pv[i] - 3 * qv[i], step[i] = 2 * qv[i] - 0.25 * pv[i] - 0.75 * sv[i];
    }
    expect_close(difference(d.get(), squares), 1e-6, "scale");
    d.check("sums");
    Buffer products(F64, blocks);
    dot_kernel<<<blocks, 256>>>(products.d(), p.f(), q.f(), odd);
    expect_close(difference(products.get(), dots, 1), 1e-7, "dot");
    combine_kernel<<<blocks, 256>>>(out.f(), 0.5f, p.f(), -3.0f, q.f(), odd);
    expect_close(difference(out.get(), mixed), 4e-7, "combine");
    lanczos_kernel<<<blocks, 256>>>(s.f(), p.f(), q.f(), 2.0f, 0.25f, 0.75f, odd);
    expect_close(difference(s.get(), step), 4e-7, "lanczos");
    random_direction_kernel<<<blocks, 256>>>(noise.f(), odd, 1);
    for (double v : noise.get())
        if (!(v >= -1 && v <= 1)) fail("random direction beyond 1");
    for (const Buffer* b : {&x, &y, &p, &q, &s, &out, &noise, &products}) b->check("a vector of the probe");
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

struct Setup {
    Config c;
    Storage storage;
    AdamW adamw;
    int B = 1, accum = 1, logit_rows = 0;
    bool graphs = false, use_hopper = false;
    std::string text() const {
        return format(
            "%s %s %s C %d L %d NH %d NKV %d F %d V %d T %d max_T %d eps %g theta %g B %d accum %d logit_rows %d "
            "recompute %s gradients %s moments %s master %d graph %d hopper %d lr %g betas %g %g eps %g decay %g "
            "1d %d clip %g",
            c.gated() ? "llama" : "nanogpt",
            c.simple()                      ? "simplegpt"
            : c.variant == Variant::prenorm ? "prenorm"
                                            : "preqknorm",
            c.layernorm ? "layernorm" : "rmsnorm", c.C, c.L, c.NH, c.NKV, c.F(), c.V, c.T, c.max_T, c.norm_eps,
            c.rope_theta, B, accum, logit_rows, RECOMPUTE[int(storage.recompute)].c_str(),
            storage.half_gradients ? "bf16" : "fp32", storage.half_moments ? "bf16" : "fp32", !storage.no_master,
            graphs, use_hopper, adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay, adamw.decay_1d,
            adamw.clip);
    }
};

Setup random_setup(Random& r) {
    Setup s;
    Config& c = s.c;
    c.backbone = r.chance(0.7) ? Backbone::llama : Backbone::nanogpt;
    c.variant = r.pick<Variant>({Variant::simplegpt, Variant::simplegpt, Variant::prenorm, Variant::preqknorm});
    c.layernorm = r.chance(0.3);
    s.use_hopper = BF16 && (EXACT || gpu.hopper) && r.chance(0.3);
    const int HS = s.use_hopper ? r.pick<int>({64, 128}) : r.pick<int>({16, 16, 16, 32, 64, 72, 128, 8, 112, 256});
    c.NKV = r.between(1, HS > 32 ? 1 : 3), c.NH = c.NKV * r.between(1, HS > 64 ? 1 : 3), c.C = c.NH * HS;
    if (!c.gated()) c.NKV = c.NH;
    c.L = r.between(1, 3), c.V = r.chance(0.2) ? 64 * r.between(1, 3) : r.between(2, 150);
    c.multiple_of = BF16 ? 8 * r.between(1, 3) : r.between(1, 20), c.ffn_mult = float(0.2 + 1.3 * r.uniform());
    c.rope_theta = r.pick<float>({100, 1e4f, 5e5f}), c.norm_eps = r.pick<float>({1e-5f, 1e-6f, 1e-3f});
    c.T = r.chance(0.1) ? r.between(62, 68) : r.ugly(12, 16, 34), c.max_T = c.T + r.between(0, 3);
    finish(c);
    s.B = r.between(1, 3), s.accum = r.between(1, 3);
    s.storage.recompute = Recompute(r.between(0, 3));
    s.storage.half_gradients = BF16 && r.chance(0.3), s.storage.half_moments = r.chance(0.2);
    s.storage.no_master = BF16 && r.chance(0.2);
    s.logit_rows = r.between(1, s.B * c.T);
    s.graphs = r.chance(0.3);
    AdamW& o = s.adamw;
    o.lr = float(r.pick<double>({1e-3, 1e-2})), o.beta1 = float(r.pick<double>({0.9, 0.8}));
    o.beta2 = float(r.pick<double>({0.95, 0.99})), o.weight_decay = float(r.pick<double>({0, 0.1, 0.5}));
    o.decay_1d = r.chance(0.7), o.clip = float(r.pick<double>({0, 0.1, 1, 1e4})), o.seed = r.bits();
    return s;
}

void open_model(Model& m, const Setup& s, bool training) {
    plan(m, gpu, s.c, s.B, training, s.storage);
    create(m);
    m.logit_rows = std::min(m.logit_rows, s.logit_rows), m.use_graphs = s.graphs && training;
}

// weights that make the logits depend on everything
std::map<std::string, std::vector<float>> random_weights(Random& r, const Config& c) {
    std::map<std::string, std::vector<float>> all;
    for (const Tensor& t : build_table(c).tensors) {
        std::vector<float>& w = all[t.name];
        const double scale =
            t.name == "wpe.weight" || t.name == "tok_embeddings.weight" ? 1 : 1.2 / sqrt(double(t.cols));
        for (size_t i = 0; i < t.size(); i++) w.push_back(float(t.cols ? scale * r.normal() : 1 + 0.3 * r.normal()));
    }
    return all;
}

reference::Architecture architecture(const Config& c) {
    typedef reference::Architecture A;
    A a;
    a.llama = c.gated(), a.layernorm = c.layernorm;
    a.variant = c.simple() ? A::SIMPLEGPT : c.variant == Variant::prenorm ? A::PRENORM : A::PREQKNORM;
    a.L = c.L, a.NH = c.NH, a.NKV = c.NKV, a.V = c.V, a.eps = c.norm_eps, a.theta = c.rope_theta;
    return a;
}
// The reference's parameters, of the values that the forward reads.
reference::Parameters parameters(Tape& t, const Model& m) {
    reference::Parameters p;
    for (const Tensor& x : m.table.tensors) {
        const std::vector<float> w = get_floats(Flat(m.params), x.offset, x.size());
        p[x.name] = t.put(x.cols ? x.rows : 1, x.cols ? x.cols : x.rows, Vec(w.begin(), w.end()));
    }
    return p;
}

// Of all B accum windows in this order, micro-batches of s.B: gradients, then the loss.
std::vector<float> gradients(Model& m, const Setup& s, const std::vector<int32_t>& windows, float* loss = nullptr) {
    const int W = s.c.T + 1, micro = int(windows.size()) / W / s.B;
    begin_step(m);
    for (int i = 0; i < micro; i++)
        forward_backward(m, &windows[size_t(i) * s.B * W], s.B, s.c.T, 1.0f / micro, i == 0, i + 1 == micro);
    wait_for_device(m);
    if (loss) *loss = read_float(m, m.loss);
    return get_floats(m.grads, 0, m.table.size);
}

// Loss, relative to itself and 1 (measured: fp32 2.6e-7, bf16 3.2e-3); a gradient's difference as a length, each
// tensor's relative to its own and to a twentieth (bf16: a fifth) of its share of all, as some should be zero (2.1e-5,
// 0.11).
constexpr double TOL_MODEL_LOSS = BF16 ? 1e-2 : 5e-7, TOL_GRADIENT = BF16 ? 0.15 : 4e-5;

constexpr double TOL_LOGITS = BF16 ? 4e-2 : 3e-6;  // relative to the largest; measured 1e-6 and 1.9e-2

double length(const Vec& v) {
    double square = 0;
    for (double x : v) square += x * x;
    return sqrt(square);
}
void close_gradients(const Model& m, const std::vector<float>& got, const std::function<Vec(const Tensor&)>& wanted,
                     double tolerance, const std::string& what) {
    double all = 0;
    for (const Tensor& t : m.table.tensors) all += pow(length(wanted(t)), 2);
    for (const Tensor& t : m.table.tensors) {
        const Vec want = wanted(t);
        Vec off(want.size());
        for (size_t i = 0; i < off.size(); i++) off[i] = got[t.offset + i] - want[i];
        const double share = sqrt(all * t.size() / m.table.parameters) * (BF16 ? 0.2 : 0.05);
        expect_close(length(off) / (length(want) + share + 1e-30), tolerance, what + " of " + t.name);
    }
}

// Loss, every gradient and AdamW's step against float64; and the same step done another way.
void model_case(Random& r) {
    const Setup s = random_setup(r);
    const Config& c = s.c;
    configuration = "model " + s.text();
    WithDevice with(s.use_hopper);
    Model m;
    open_model(m, s, true);
    const auto weights = random_weights(r, c);
    auto fill = [&](Model& m) {
        for (const Tensor& t : m.table.tensors) set_parameters(m, t.offset, weights.at(t.name));
    };
    fill(m);
    const int sequences = s.B * s.accum, W = c.T + 1;
    for (int step = 1; step <= 2; step++) {
        std::vector<int32_t> windows(size_t(sequences) * W);
        for (int32_t& x : windows) x = r.chance(0.2) ? c.V - 1 : r.between(0, c.V - 1);
        Tape tape;
        const reference::Parameters p = parameters(tape, m);
        std::vector<int> tokens, targets;
        for (int b = 0; b < sequences; b++)
            for (int t = 0; t < c.T; t++)
                tokens.push_back(windows[b * W + t]), targets.push_back(windows[b * W + t + 1]);
        Var logits = reference::logits(tape, architecture(c), p, tokens, c.T);
        Var losses = reference::cross_entropy(tape, logits, targets, c.V);
        double loss = 0, first_loss = 0;
        for (size_t n = 0; n < losses->v.size(); n++) {
            loss += losses->v[n] / losses->v.size(), losses->d[n] = 1.0 / losses->v.size();
            first_loss += int(n) < s.B * c.T ? losses->v[n] / (s.B * c.T) : 0;
        }
        tape.backward();

        float got_loss;
        const std::vector<float> g = gradients(m, s, windows, &got_loss);
        expect_close(fabs(got_loss - loss) / std::max(loss, 1.0), TOL_MODEL_LOSS, "loss");
        close_gradients(
            m, g, [&](const Tensor& t) { return p.at(t.name)->d; }, TOL_GRADIENT, "gradient");
        std::vector<float> rest = g;
        for (const Tensor& t : m.table.tensors) std::fill_n(rest.begin() + t.offset, t.size(), 0.0f);
        for (float x : rest)
            if (x != 0) fail("gradients of padding are not zero");
        if (step == 1) {
            // another level and way to launch: the same bits. Another order and other micro-batches: up to rounding.
            Setup other = s;
            other.storage.recompute = Recompute((int(s.storage.recompute) + r.between(1, 3)) % 4);
            other.graphs = !s.graphs;
            std::vector<int32_t> turned = windows;
            const bool bits = r.chance(0.5) || s.use_hopper;
            if (!bits) {
                other.B = sequences % 2 == 0 && r.chance(0.5) ? sequences / 2 : r.chance(0.5) ? 1 : sequences;
                const std::vector<int> order = r.permutation(sequences);
                for (int b = 0; b < sequences; b++) std::copy_n(&windows[order[b] * W], W, &turned[size_t(b) * W]);
            }
            Model m2;
            open_model(m2, other, true);
            fill(m2);
            float second_loss;
            std::vector<float> g2 = gradients(m2, other, turned, &second_loss);
            if (bits && (g2 != g || second_loss != got_loss))
                fail(format("recompute %s, graph %d: other bits", RECOMPUTE[int(other.storage.recompute)].c_str(),
                            other.graphs));
            if (!bits) {
                const std::string what = format("with micro-batches of %d, gradient", other.B);
                close_gradients(
                    m, g2, [&](const Tensor& t) { return Vec(&g[t.offset], &g[t.offset] + t.size()); },
                    2 * TOL_GRADIENT, what);
                expect_close(fabs(second_loss - got_loss) / std::max(loss, 1.0), TOL_MODEL_LOSS, "its loss");
            }
            destroy(m2);
            expect_close(fabs(evaluate(m, windows.data(), s.B, c.T) - first_loss) / std::max(loss, 1.0), TOL_MODEL_LOSS,
                         "evaluate's loss");
            // what comes later changes no bit before
            const int t0 = r.between(0, c.T - 1);
            Vec early[2];
            for (int i : {0, 1}) {
                if (i)
                    for (size_t at = 0; at < windows.size(); at++)
                        if (int(at % W) > t0) windows[at] = r.between(0, c.V - 1);
                set_batch(m, windows.data(), s.B, c.T, false);
                forward(m, s.B, c.T);
                wait_for_device(m);
                std::vector<floatX> rows(size_t(s.B) * c.T * c.C);
                CHECK(cudaMemcpy(rows.data(), m.normed, rows.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
                for (size_t at = 0; at < rows.size(); at++)
                    if (int(at / c.C % c.T) <= t0) early[i].push_back(float(rows[at]));
            }
            const double e = difference(early[1], early[0], 1);
            if (t0 < first_tile(c.HS()) ? !same_bits(early[0], early[1]) : !(e <= TOL_LOGITS))
                fail(format("tokens behind position %d change what is before by %.1e", t0, e));
        }

        // AdamW's step from what the trainer has
        auto state = [&](const Flat& f) { return get_floats(f, 0, m.table.size); };
        const Flat master = m.master ? Flat(m.master) : Flat(m.params);
        const std::vector<float> w0 = state(master), m0 = state(m.m), v0 = state(m.v);
        double square = 0;
        for (float x : g) square += double(x) * x;
        update(m, s.adamw, step);
        wait_for_device(m);
        const AdamW& o = s.adamw;
        expect_close(fabs(read_float(m, m.grad_norm) - sqrt(square)) / (sqrt(square) + 1e-30), 2e-6, "gradient norm");
        const double scale = o.clip > 0 ? std::min(1.0, o.clip / (sqrt(square) + 1e-6)) : 1;
        const std::vector<float> w1 = state(master), m1 = state(m.m), v1 = state(m.v);
        Vec off(3);
        for (const Tensor& t : m.table.tensors)
            for (size_t i = t.offset; i < t.offset + t.size(); i++) {
                double want[3] = {w0[i], m0[i], v0[i]};
                want[0] = reference::adamw(want[0], want[1], want[2], g[i] * scale, o.lr, o.beta1, o.beta2, o.eps,
                                           t.cols || o.decay_1d ? o.weight_decay : 0, step);
                const double got[3] = {w1[i], m1[i], v1[i]};
                for (int j = 0; j < 3; j++) {
                    const bool at_random = j ? s.storage.half_moments : s.storage.no_master;
                    const double most = at_random ? 0x1p-7 * 1.01 * (fabs(want[j]) + 1e-6)
                                        : j == 0
                                            ? 1e-6 * (fabs(want[0]) + o.lr)
                                            : 2e-6 * (fabs(want[j]) + (j == 1 ? 0.1 * fabs(g[i] * scale) : 0)) + 1e-30;
                    const double e = fabs(got[j] - want[j]) / most;
                    off[j] = e == e ? std::max(off[j], e) : INFINITY;
                }
            }
        for (int j = 0; j < 3; j++) expect_close(off[j], 1, j == 0 ? "AdamW's weights" : j == 1 ? "its m" : "its v");
    }
    destroy(m);
}

// Texts written on from one prompt with a cache: the logits at every position are those of float64 over the whole text.
void cache_case(Random& r) {
    Setup s = random_setup(r);
    s.storage = Storage(), s.B = r.between(1, 3), s.graphs = false;
    const Config& c = s.c;
    const int P = r.between(1, c.T), sequences = s.B;
    configuration = format("cache prompt %d of ", P) + s.text();
    WithDevice with(s.use_hopper);
    Model m;
    m.cache.sequences = sequences, m.cache.room = c.T;
    open_model(m, s, false);
    const auto weights = random_weights(r, c);
    for (const Tensor& t : m.table.tensors) set_parameters(m, t.offset, weights.at(t.name));
    std::vector<int> tokens(sequences * c.T);
    for (int i = 0; i < sequences * c.T; i++)
        tokens[i] = i >= c.T && i % c.T < P ? tokens[i % c.T] : r.between(0, c.V - 1);
    Tape tape;
    Var logits = reference::logits(tape, architecture(c), parameters(tape, m), tokens, c.T);
    auto compare = [&](int position, const std::vector<float>& rows) {
        for (int b = 0; b < sequences; b++) {
            const float* got = rows.size() > size_t(c.V) ? &rows[size_t(b) * c.V] : rows.data();
            const double* want = &logits->v[(size_t(b) * c.T + position) * logits->cols];
            expect_close(difference(Vec(got, got + c.V), Vec(want, want + c.V), 1), TOL_LOGITS,
                         format("logits of sequence %d at %d", b, position));
        }
    };
    {
        UseCache cache(m);
        forward_tokens(m, tokens.data(), 1, P);
        compare(P - 1, get_logits(m, P - 1, 1));
        cache.share();
        for (m.past = P; m.past < c.T; m.past++) {
            std::vector<int> next;
            for (int b = 0; b < sequences; b++) next.push_back(tokens[b * c.T + m.past]);
            forward_tokens(m, next.data(), sequences, 1);
            compare(m.past, get_logits(m, 0, sequences));
        }
    }
    destroy(m);
}

// ---------------------------------------------------------------------------------------------------------------------

struct Family {
    const char* name;
    std::function<void(Random&)> body;
};
template <typename F>
std::function<void(Random&)> of_kernel(F make) {
    return [=](Random& r) {
        FewBlocks few(r.between(1, 4));
        try_kernel(make(r), r);
    };
}
std::vector<Family> families() {
    std::vector<Family> all = {{"norm", of_kernel(norm_kernel)},
                               {"qkv", of_kernel(qkv_kernel)},
                               {"ffn", of_kernel(ffn_kernel)},
                               {"embedding", of_kernel(embedding_kernel)},
                               {"linear", of_kernel(linear_kernel)},
                               {"attention", of_kernel(attention_kernel)},
                               {"past", of_kernel(past_kernel)},
                               {"cross_entropy", of_kernel(cross_entropy_case)},
                               {"adamw", adamw_case},
                               {"flat", flat_case},
                               {"model", model_case},
                               {"cache", cache_case}};
    return all;
}

// What the process that runs the cases shares with the one that watches it: a case may end it.
struct Shared {
    int next, family, number, passed[32], failed[32];
    double worst[32];
    char what[32][200], running[1000];
};

int main(int argc, char** argv) {
    int cases = 0, only = -1;
    double limit = 1e18;
    uint64_t seed = 1;
    bool verbose = false;
    std::string filter;
    try {
        for (int i = 1; i < argc; i++) {
            const std::string arg = argv[i];
            const char *name = argv[i] + (arg.rfind("--", 0) == 0 ? 2 : 0),
                       *value = i + 1 < argc ? argv[i + 1] : nullptr;
            if (arg == "--verbose") {
                verbose = true;
                continue;
            }
            if (!value)
                throw Error(arg + ": is unknown or lacks its value. The head of properties.cu lists the options.");
            if (arg == "--cases")
                cases = int(parse_integer(name, value, 1, INT_MAX));
            else if (arg == "--seconds")
                limit = parse_number(name, value, 0, 1e9);
            else if (arg == "--seed")
                seed = uint64_t(parse_integer(name, value, 0, INT64_MAX));
            else if (arg == "--case")
                only = int(parse_integer(name, value, 0, INT_MAX));
            else if (arg == "--filter")
                filter = value;
            else
                throw Error(arg + ": is unknown. The head of properties.cu lists the options.");
            i++;
        }
        auto held = [&](const Family& f) { return strstr(f.name, filter.c_str()) != nullptr; };
        const std::vector<Family> all = families();
        if (std::none_of(all.begin(), all.end(), held))
            throw Error("--filter: no family's name holds '" + filter + "'.");
    } catch (const Error& e) {
        return fprintf(stderr, "properties: %s\n", e.what()), 1;
    }
    if (cases == 0) cases = limit < 1e18 ? INT_MAX : 20;
    Shared* shared = (Shared*)mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const double begin = now();
    setvbuf(stdout, nullptr, _IOLBF, 0);
    auto again = [&] {
        return format("%s --filter %s --case %d --seed %llu", argv[0], families()[shared->family].name, shared->number,
                      (unsigned long long)seed);
    };
    auto run_cases = [&] {
        gpu = open_device();
        const std::vector<Family> all = families();
        for (; shared->next / int(all.size()) < cases && now() - begin < limit; shared->next++) {
            const int f = shared->family = shared->next % int(all.size());
            const int number = shared->number = only >= 0 ? only : shared->next / int(all.size());
            if (only >= 0 && shared->next >= int(all.size())) break;
            if (!strstr(all[f].name, filter.c_str())) continue;
            Random r{std::mt19937_64(random_bits(seed, f, number))};
            why.clear(), worst = 0, worst_what.clear(), configuration = all[f].name;
            shared->running[0] = 0;
            const double start = now();
            try {
                all[f].body(r);
            } catch (const std::exception& e) {
                fail(e.what());
            }
            why.empty() ? shared->passed[f]++ : shared->failed[f]++;
            if (worst > shared->worst[f]) {
                shared->worst[f] = worst;
                snprintf(shared->what[f], sizeof(shared->what[f]), "%s, case %d", worst_what.c_str(), number);
            }
            if (!why.empty())
                printf("FAIL %s case %d: %s: %s\n  again: %s\n", all[f].name, number, configuration.c_str(),
                       why.c_str(), again().c_str());
            else if (verbose)
                printf("ok %s case %d (%.2f s, %.2f of the tolerance: %s): %s\n", all[f].name, number, now() - start,
                       worst, worst_what.c_str(), configuration.c_str());
        }
        matmul.close();
    };
    for (bool over = false; !over;) {
        fflush(stdout);
        const pid_t pid = fork();
        if (pid == 0) {
            try {
                run_cases();
            } catch (const std::exception& e) {
                printf("FAIL start: %s\n", e.what());
                exit(1);
            }
            exit(0);
        }
        int status = 0;
        waitpid(pid, &status, 0);
        over = status == 0;
        if (!over) {
            shared->failed[shared->family]++, shared->next++;
            printf("FAIL %s case %d ended the program (status %d)\n  again: %s\n", families()[shared->family].name,
                   shared->number, status, again().c_str());
        }
    }
    int passed = 0, failed = 0;
    const std::vector<Family> all = families();
    for (size_t f = 0; f < all.size(); f++) {
        passed += shared->passed[f], failed += shared->failed[f];
        if (shared->passed[f] + shared->failed[f])
            printf("%-14s %6d passed %4d failed, %.2f of the tolerance (%s)\n", all[f].name, shared->passed[f],
                   shared->failed[f], shared->worst[f], shared->what[f]);
    }
    printf("properties: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
