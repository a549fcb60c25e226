// The model in float64, written from the paper's equations (arXiv 2602.01212) and knowing nothing of the trainer:
// matrices, a handful of operations with their derivatives, the block, AdamW. Plain loops, for tests.
#pragma once
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace reference {

typedef std::vector<double> Vec;

// A matrix (rows,cols), row-major, and the derivative of the result by it.
struct Matrix {
    size_t rows, cols;
    Vec v, d;
};
typedef Matrix* Var;

// All that was computed, in order, so that derivatives go back through it.
struct Tape {
    std::deque<Matrix> all;
    std::vector<std::function<void()>> steps;
    Var put(size_t rows, size_t cols, Vec v) {
        all.push_back({rows, cols, std::move(v), Vec(rows * cols)});
        return &all.back();
    }
    Var put(size_t rows, size_t cols) { return put(rows, cols, Vec(rows * cols)); }
    void backward() {
        for (size_t i = steps.size(); i-- > 0;) steps[i]();
    }
};

// out (N,M) = x (N,K) w^T, w (M,K)
inline Var linear(Tape& t, Var x, Var w) {
    const size_t N = x->rows, K = x->cols, M = w->rows;
    Var out = t.put(N, M);
    for (size_t n = 0; n < N; n++)
        for (size_t m = 0; m < M; m++)
            for (size_t k = 0; k < K; k++) out->v[n * M + m] += x->v[n * K + k] * w->v[m * K + k];
    t.steps.push_back([=] {
        for (size_t n = 0; n < N; n++)
            for (size_t m = 0; m < M; m++)
                for (size_t k = 0; k < K; k++) {
                    x->d[n * K + k] += out->d[n * M + m] * w->v[m * K + k];
                    w->d[m * K + k] += out->d[n * M + m] * x->v[n * K + k];
                }
    });
    return out;
}

// Of each row y = g z r, z = x - mean (0 for RMSNorm), r = (mean z^2 + eps)^(-1/2). No gain: no norm.
// By the chain rule dz = g dy r - z r^3 mean(g dy z), and dx = dz - mean(dz) where the mean was taken off.
inline Var norm(Tape& t, Var x, Var g, double eps, bool layernorm) {
    if (!g) return x;
    const size_t N = x->rows, C = x->cols;
    Var out = t.put(N, C), z = t.put(N, C);
    auto r = std::make_shared<Vec>(N);
    for (size_t n = 0; n < N; n++) {
        double mean = 0, square = 0;
        for (size_t c = 0; c < C && layernorm; c++) mean += x->v[n * C + c] / C;
        for (size_t c = 0; c < C; c++) z->v[n * C + c] = x->v[n * C + c] - mean;
        for (size_t c = 0; c < C; c++) square += z->v[n * C + c] * z->v[n * C + c] / C;
        (*r)[n] = 1 / std::sqrt(square + eps);
        for (size_t c = 0; c < C; c++) out->v[n * C + c] = g->v[c] * z->v[n * C + c] * (*r)[n];
    }
    t.steps.push_back([=] {
        for (size_t n = 0; n < N; n++) {
            const double *dy = &out->d[n * C], *zn = &z->v[n * C], rn = (*r)[n];
            double along = 0, mean = 0;
            Vec dz(C);
            for (size_t c = 0; c < C; c++) along += g->v[c] * dy[c] * zn[c] / C;
            for (size_t c = 0; c < C; c++) {
                g->d[c] += dy[c] * zn[c] * rn;
                dz[c] = g->v[c] * dy[c] * rn - zn[c] * rn * rn * rn * along;
                mean += layernorm ? dz[c] / C : 0;
            }
            for (size_t c = 0; c < C; c++) x->d[n * C + c] += dz[c] - mean;
        }
    });
    return out;
}

// f of each pair of elements, with its derivatives by both: f(a, b, da, db); b may be null
template <typename F>
Var each(Tape& t, Var a, Var b, F f) {
    Var out = t.put(a->rows, a->cols);
    auto slope = std::make_shared<Vec>(2 * a->v.size());
    for (size_t i = 0; i < a->v.size(); i++)
        out->v[i] = f(a->v[i], b ? b->v[i] : 0.0, (*slope)[2 * i], (*slope)[2 * i + 1]);
    t.steps.push_back([=] {
        for (size_t i = 0; i < a->v.size(); i++) {
            a->d[i] += out->d[i] * (*slope)[2 * i];
            if (b) b->d[i] += out->d[i] * (*slope)[2 * i + 1];
        }
    });
    return out;
}
inline Var add(Tape& t, Var a, Var b) {
    return each(t, a, b, [](double x, double y, double& dx, double& dy) { return dx = dy = 1, x + y; });
}
// silu(u) v, silu(u) = u / (1 + e^-u)
inline Var swiglu(Tape& t, Var u, Var v) {
    return each(t, u, v, [](double x, double y, double& dx, double& dy) {
        const double s = 1 / (1 + std::exp(-x));
        dx = y * (s + x * s * (1 - s)), dy = x * s;
        return x * s * y;
    });
}
// u Phi(u), Phi the normal distribution
inline Var gelu(Tape& t, Var u) {
    return each(t, u, nullptr, [](double x, double, double& dx, double&) {
        const double phi = (1 + std::erf(x / std::sqrt(2.0))) / 2;
        dx = phi + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        return x * phi;
    });
}

// out[i] = x[from[i]]: rows that are looked up, columns that are taken apart, layouts that are changed
inline Var gather(Tape& t, Var x, const std::vector<size_t>& from, size_t rows, size_t cols) {
    Var out = t.put(rows, cols);
    for (size_t i = 0; i < from.size(); i++) out->v[i] = x->v[from[i]];
    t.steps.push_back([=] {
        for (size_t i = 0; i < from.size(); i++) x->d[from[i]] += out->d[i];
    });
    return out;
}
inline Var columns(Tape& t, Var x, size_t begin, size_t count) {
    std::vector<size_t> from;
    for (size_t n = 0; n < x->rows; n++)
        for (size_t c = 0; c < count; c++) from.push_back(n * x->cols + begin + c);
    return gather(t, x, from, x->rows, count);
}
inline Var lookup(Tape& t, Var table, const std::vector<int>& rows) {
    std::vector<size_t> from;
    for (int row : rows)
        for (size_t c = 0; c < table->cols; c++) from.push_back(row * table->cols + c);
    return gather(t, table, from, rows.size(), table->cols);
}

// Pairs (a, b) of neighbours turn to (a cos - b sin, a sin + b cos); turns (T,HS/2) of (cos, sin), row n has position
// n mod T, all heads alike.
inline Var rotate(Tape& t, Var x, const Vec& turns, size_t T, size_t HS) {
    Var out = t.put(x->rows, x->cols);
    auto walk = [=](auto f) {
        for (size_t i = 0; i < x->v.size(); i += 2) {
            const double* turn = &turns[(i / x->cols % T * HS + i % x->cols % HS)];
            f(i, turn[0], turn[1]);
        }
    };
    walk([=](size_t i, double c, double s) {
        out->v[i] = x->v[i] * c - x->v[i + 1] * s, out->v[i + 1] = x->v[i] * s + x->v[i + 1] * c;
    });
    t.steps.push_back([=] {
        walk([=](size_t i, double c, double s) {
            x->d[i] += out->d[i] * c + out->d[i + 1] * s, x->d[i + 1] += -out->d[i] * s + out->d[i + 1] * c;
        });
    });
    return out;
}
// The turns of position t and pair i, t theta^(-2i/HS); frequencies and angles in float32, as in the paper's code.
inline Vec rope(int T, int HS, float theta) {
    Vec turns;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < HS / 2; i++) {
            const float angle = float(t) * (1.0f / std::pow(theta, float(2 * i) / float(HS)));
            turns.push_back(std::cos(double(angle))), turns.push_back(std::sin(double(angle)));
        }
    return turns;
}

// Causal attention of B sequences of T rows: q (N,NH HS), k, v (N,NKV HS); query head h reads head h / (NH / NKV).
// lse, where given, (B,NH,T): the logarithms of the softmaxes' sums.
inline Var attention(Tape& t, Var q, Var k, Var v, size_t T, size_t NH, size_t NKV, Vec* lse = nullptr) {
    const size_t N = q->rows, HS = q->cols / NH, KV = k->cols;
    const double scale = 1 / std::sqrt(double(HS));
    Var out = t.put(N, q->cols), p = t.put(N * NH, T);
    if (lse) lse->assign(N * NH, 0);
    // of query row n, head h and key j: where q, k, p are
    auto walk = [=](auto f) {
        for (size_t n = 0; n < N; n++)
            for (size_t h = 0; h < NH; h++)
                f(n, h, n * NH * HS + h * HS, (n - n % T) * KV + h / (NH / NKV) * HS, &p->v[(n * NH + h) * T]);
    };
    walk([=](size_t n, size_t h, size_t at, size_t kv, double* row) {
        double top = -INFINITY, sum = 0;
        for (size_t j = 0; j <= n % T; j++) {
            for (size_t c = 0; c < HS; c++) row[j] += scale * q->v[at + c] * k->v[kv + j * KV + c];
            top = std::max(top, row[j]);
        }
        for (size_t j = 0; j <= n % T; j++) sum += row[j] = std::exp(row[j] - top);
        for (size_t j = 0; j <= n % T; j++) {
            row[j] /= sum;
            for (size_t c = 0; c < HS; c++) out->v[at + c] += row[j] * v->v[kv + j * KV + c];
        }
        if (lse) (*lse)[(n / T * NH + h) * T + n % T] = top + std::log(sum);
    });
    t.steps.push_back([=] {
        walk([=](size_t n, size_t, size_t at, size_t kv, double* row) {
            Vec dp(n % T + 1);
            double mean = 0;
            for (size_t j = 0; j < dp.size(); j++) {
                for (size_t c = 0; c < HS; c++) {
                    dp[j] += out->d[at + c] * v->v[kv + j * KV + c];
                    v->d[kv + j * KV + c] += row[j] * out->d[at + c];
                }
                mean += row[j] * dp[j];
            }
            for (size_t j = 0; j < dp.size(); j++)
                for (size_t c = 0; c < HS; c++) {
                    const double ds = scale * row[j] * (dp[j] - mean);
                    q->d[at + c] += ds * k->v[kv + j * KV + c];
                    k->d[kv + j * KV + c] += ds * q->v[at + c];
                }
        });
    });
    return out;
}

// losses (N,1): -log of the target's share of e^logit, columns from V on apart
inline Var cross_entropy(Tape& t, Var logits, const std::vector<int>& targets, size_t V) {
    const size_t N = logits->rows, W = logits->cols;
    Var losses = t.put(N, 1), p = t.put(N, V);
    for (size_t n = 0; n < N; n++) {
        double top = -INFINITY, sum = 0;
        for (size_t v = 0; v < V; v++) top = std::max(top, logits->v[n * W + v]);
        for (size_t v = 0; v < V; v++) sum += p->v[n * V + v] = std::exp(logits->v[n * W + v] - top);
        for (size_t v = 0; v < V; v++) p->v[n * V + v] /= sum;
        losses->v[n] = top + std::log(sum) - logits->v[n * W + targets[n]];
    }
    t.steps.push_back([=] {
        for (size_t n = 0; n < N; n++) {
            for (size_t v = 0; v < V; v++) logits->d[n * W + v] += losses->d[n] * p->v[n * V + v];
            logits->d[n * W + targets[n]] -= losses->d[n];
        }
    });
    return losses;
}

struct Architecture {
    bool llama = true, layernorm = false;
    enum { SIMPLEGPT, PRENORM, PREQKNORM } variant = SIMPLEGPT;
    int L = 1, NH = 1, NKV = 1, V = 2;
    double eps = 1e-5;
    float theta = 1e4f;
};

typedef std::map<std::string, Var> Parameters;  // by the names of the files

// The logits (N,V) of sequences of T tokens.
//   simplegpt  h = x + No Wo A(Nq Wq x, Nk Wk x, Nv Wv x)      y = h + N2 W2( silu(N1 W1 h) * (N3 W3 h) )
//   prenorm    h = x + Wo A(Wq n, Wk n, Wv n),  n = N(x)       y = h + W2( silu(W1 n) * (W3 n) ),  n = N'(h)
//   preqknorm  prenorm with Nq and Nk
inline Var logits(Tape& t, const Architecture& a, const Parameters& all, const std::vector<int>& tokens, size_t T) {
    const bool simple = a.variant == Architecture::SIMPLEGPT;
    auto w = [&](const std::string& name) { return all.at(name); };
    auto gain = [&](bool there, const std::string& name) { return there ? all.at(name) : nullptr; };
    auto normed = [&](Var x, Var g) { return norm(t, x, g, a.eps, a.layernorm); };
    Var x = lookup(t, w(a.llama ? "tok_embeddings.weight" : "wte.weight"), tokens);
    if (!a.llama) {
        std::vector<int> positions;
        for (size_t n = 0; n < tokens.size(); n++) positions.push_back(int(n % T));
        x = add(t, x, lookup(t, w("wpe.weight"), positions));
    }
    for (int l = 0; l < a.L; l++) {
        const std::string layer = "layers." + std::to_string(l) + ".", attn = layer + (a.llama ? "attention." : ""),
                          ffn = layer + (a.llama ? "feed_forward." : "");
        // a linear by its name in each family of files, and the norm behind it where there is one
        auto psi = [&](Var in, const std::string& room, const char* sn, const char* plain, const char* nano,
                       const char* qk_norm = nullptr) {
            const std::string name = room + (!a.llama ? nano : simple ? sn : plain);
            Var out = linear(t, in, w(name + (simple ? ".lin.weight" : ".weight")));
            if (qk_norm && a.variant == Architecture::PREQKNORM) return normed(out, w(attn + qk_norm));
            return normed(out, gain(simple, name + ".norm.weight"));
        };
        Var n = normed(x, gain(!simple, layer + (a.llama ? "attention_norm.weight" : "norm1.weight")));
        Var q = psi(n, attn, "snq", "wq", "q", "q_norm.weight"), k = psi(n, attn, "snk", "wk", "k", "k_norm.weight"),
            v = psi(n, attn, "snv", "wv", "v");
        if (a.llama) {
            const int HS = int(q->cols) / a.NH;
            const Vec turns = rope(int(T), HS, a.theta);
            q = rotate(t, q, turns, T, HS), k = rotate(t, k, turns, T, HS);
        }
        Var h = add(t, x, psi(attention(t, q, k, v, T, a.NH, a.NKV), attn, "sno", "wo", "o"));
        n = normed(h, gain(!simple, layer + (a.llama ? "ffn_norm.weight" : "norm2.weight")));
        Var u = psi(n, ffn, "sn1", "w1", "fc");
        u = a.llama ? swiglu(t, u, psi(n, ffn, "sn3", "w3", "")) : gelu(t, u);
        x = add(t, h, psi(u, ffn, "sn2", "w2", "proj"));
    }
    return linear(t, normed(x, w("norm.weight")), w(a.llama ? "output.weight" : "wte.weight"));
}

// AdamW with decoupled decay: one element's step number t from 1 on, g already clipped
inline double adamw(double w, double& m, double& v, double g, double lr, double beta1, double beta2, double eps,
                    double decay, int t) {
    m = beta1 * m + (1 - beta1) * g;
    v = beta2 * v + (1 - beta2) * g * g;
    const double step = m / (1 - std::pow(beta1, t)) / (std::sqrt(v / (1 - std::pow(beta2, t))) + eps);
    return w * (1 - lr * decay) - lr * step;
}

}  // namespace reference
