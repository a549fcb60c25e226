// Probe: what the paper's argument rests on, measured between steps on batches that stay the same. How large
// activations are, and how curved the loss is, by eigenvalues of its Hessian H:
//   over all parameters w, the largest, beyond whose inverse (up to a factor that is the optimizer's) a learning rate
//     is too large;
//   over each block's input x (N,C), all tokens of the first batch together, the largest in magnitude. x is displaced
//     between the blocks, so that only what is behind it runs.
// Each iteration takes one product with H by central differences of the gradient g; v_1 is random, v_0 = 0:
//   H v = (g(w + e v) - g(w - e v)) / 2e,   b_k v_k+1 = H v_k - a_k v_k - b_k-1 v_k-1,   a_k = v_k.H v_k
// The v span what the power iteration's H^k v_1 span, and the outer eigenvalues of the tridiagonal matrix of a and b
// are the best estimates in there (Lanczos 1950), also where both ends of the spectrum are of one size, between which
// the plain iteration wavers. The weights come back bit by bit; gradients are what a step's begin overwrites.
#pragma once
#include <numeric>

#include "../../train_gpt.cu"
#include "../run/channel.h"
#include "../run/log.h"

const char ACTIVATIONS_HEADER[] = "step,layer,tensor,rms,max";
const char WEIGHTS_HEADER[] = "step,layer,tensor,weight,gradient,update";
const char CURVATURE_HEADER[] = "step,loss,eigenvalue,error,iterations";
const char INPUTS_HEADER[] = "step,layer,eigenvalue,error,iterations";

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

// Of attention's logits q.k / sqrt(HS), keys up to the query's place: sums[block] of squares, sums[blocks + block] the
// largest magnitude. q (B,NH,T,HS), k (B,NKV,T,HS); PROBE_ROWS queries of a head a block, its threads stride over keys.
__global__ void logit_scale_kernel(double* sums, const floatX* q, const floatX* k, int T, int HS, int group) {
    const int tiles = (T + PROBE_ROWS - 1) / PROBE_ROWS, head = blockIdx.x / tiles;
    const int begin = (blockIdx.x % tiles) * PROBE_ROWS, end = min(begin + PROBE_ROWS, T);
    const float scale = rsqrtf(float(HS));
    double sum = 0.0;
    float most = 0.0f;
    for (int t = begin; t < end; t++) {
        const floatX* a = q + (size_t(head) * T + t) * HS;
        for (int s = threadIdx.x; s <= t; s += blockDim.x) {
            const floatX* b = k + (size_t(head / group) * T + s) * HS;
            float logit = 0.0f;
            for (int i = 0; i < HS; i++) logit += float(a[i]) * float(b[i]);
            logit *= scale;
            sum += double(logit) * logit;
            most = fmaxf(most, fabsf(logit));
        }
    }
    sum = block_sum(sum);
    most = block_max(most);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum, sums[gridDim.x + blockIdx.x] = most;
}

// Per CHUNK elements: sums[block] of squares of weights before AdamW's last update, [blocks + block] of gradients,
// [2 blocks + block] of the update, from the moments that it left. G is the gradients' type, S the moments'.
template <typename G, typename S>
__global__ void update_scale_kernel(double* sums, const floatX* params, const float* master, const S* m, const S* v,
                                    const G* grads, const Numbers* n, size_t size, AdamW o) {
    const float step = o.lr / n->correction1, root2 = rsqrtf(n->correction2), keep = 1.0f - o.lr * o.weight_decay;
    const size_t begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, size);
    double weights = 0.0, gradients = 0.0, updates = 0.0;
    for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const float after = master ? master[i] : float(params[i]), g = float(grads[i]);
        const float change = n->skip ? 0.0f : step * float(m[i]) / (sqrtf(float(v[i])) * root2 + o.eps);
        const float before = n->skip ? after : (after + change) / keep, update = change + (1.0f - keep) * before;
        weights += double(before) * before, gradients += double(g) * g;
        if (!n->skip) updates += double(update) * update;
    }
    weights = block_sum(weights), gradients = block_sum(gradients), updates = block_sum(updates);
    if (threadIdx.x > 0) return;
    sums[blockIdx.x] = weights, sums[gridDim.x + blockIdx.x] = gradients, sums[2 * gridDim.x + blockIdx.x] = updates;
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
        CHECK(cudaStreamSynchronize(m.gpu.stream));
        CHECK(cudaMemcpy(values.data(), m.probe_sums, count * sizeof(double), cudaMemcpyDeviceToHost));
        ticks++;
        return values;
    }
    void combine(float* to, double s, const float* x, double t, const float* y, size_t size) {
        combine_kernel<<<chunks(size), 256, 0, m.gpu.stream>>>(to, float(s), x, float(t), y, size);
        CHECK(cudaGetLastError());
    }
    double dot(const float* a, const float* b, size_t size) {
        const int n = chunks(size);
        dot_kernel<<<n, 256, 0, m.gpu.stream>>>(m.probe_sums, a, b, size);
        const std::vector<double> parts = fetch(n);
        return std::accumulate(parts.begin(), parts.end(), 0.0);
    }
    void keep(float* to, const float* from, size_t size) {
        CHECK(cudaMemcpyAsync(to, from, size * sizeof(float), cudaMemcpyDeviceToDevice, m.gpu.stream));
    }

    void scale(std::string& rows, int64_t step, int layer, const char* name, const floatX* x, const floatX* minus,
               size_t size) {
        const int n = chunks(size);
        scale_kernel<<<n, 256, 0, m.gpu.stream>>>(m.probe_sums, x, minus, size);
        add_scale(rows, step, layer, name, n, double(size));
    }
    // A row of what `n` blocks left in m.probe_sums, of `size` elements.
    void add_scale(std::string& rows, int64_t step, int layer, const char* name, int n, double size) {
        const std::vector<double> parts = fetch(2 * n);
        rows += format("%lld,%d,%s,%.6g,%.6g\n", (long long)step, layer, name,
                       sqrt(std::accumulate(parts.begin(), parts.begin() + n, 0.0) / size),
                       *std::max_element(parts.begin() + n, parts.end()));
    }
    // Rows of ACTIVATIONS_HEADER, of the first batch. qkv, o, w13 and w2 are what linears make, before norm and RoPE;
    // branches what a half of the block adds to the residual stream; layer L is the stream behind the last block.
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
            add("qkv", a.qkv_raw, c.QKV());
            add("q", a.q, c.C), add("k", a.k, kv), add("v", a.v, kv);
            const int n = m.B * c.NH * ((c.T + PROBE_ROWS - 1) / PROBE_ROWS);
            logit_scale_kernel<<<n, 256, 0, m.gpu.stream>>>(m.probe_sums, a.q, a.k, c.T, c.HS(), c.NH / c.NKV);
            add_scale(rows, step, l, "attention_logit", n, double(m.B) * c.NH * c.T * (c.T + 1.0) / 2.0);
            add("attention", a.att, c.C);
            add("o", a.o_raw, c.C);
            add("attention_branch", a.h, c.C, a.x);
            add("w13", a.w13_raw, c.FF());
            add("activation", a.act, c.F());
            add("w2", a.w2_raw, c.C);
            add("ffn_branch", l + 1 < c.L ? m.acts[l + 1].x : m.out, c.C, a.h);
        });
        scale(rows, step, c.L, "residual", m.out, nullptr, N * c.C);
        return rows;
    }

    // Rows of WEIGHTS_HEADER, of the last step: norms of a tensor and of its gradient before clipping, and the update's
    // norm by the tensor's. Layer -1 is the embedding, L the final norm and the head.
    std::string updates(int64_t step, const AdamW& o) {
        std::string rows;
        for (const Tensor& t : m.table.tensors) {
            const int layer = m.table.unit_of(t.offset) - 1, n = chunks(t.padded_size());
            AdamW own = o;
            if (!t.cols && !o.decay_1d) own.weight_decay = 0.0f;
            m.grads.at(t.offset).visit([&](auto* grads) {
                m.m.at(t.offset).visit([&](auto* moments) {
                    using G = std::decay_t<decltype(*grads)>;
                    using S = std::decay_t<decltype(*moments)>;
                    update_scale_kernel<G, S><<<n, 256, 0, m.gpu.stream>>>(
                        m.probe_sums, m.params + t.offset, m.master ? m.master + t.offset : nullptr, moments,
                        static_cast<const S*>(m.v.at(t.offset).p), grads, m.numbers, t.padded_size(), own);
                });
            });
            const std::vector<double> parts = fetch(3 * n);
            double norms[3];
            for (int i = 0; i < 3; i++)
                norms[i] = sqrt(std::accumulate(parts.begin() + i * n, parts.begin() + (i + 1) * n, 0.0));
            const std::string prefix = format("layers.%d.", layer);
            const bool inside = t.name.compare(0, prefix.size(), prefix) == 0;
            rows += format("%lld,%d,%s,%.6g,%.6g,%.6g\n", (long long)step, layer,
                           t.name.c_str() + (inside ? prefix.size() : 0), norms[0], norms[1], norms[2] / norms[0]);
        }
        return rows;
    }

    float loss() {
        double sum = 0.0;
        for (size_t i = 0; i < batches.size() && !asked_to_stop; i++) sum += evaluate(m, batches[i].data(), m.B, m.c.T);
        return float(sum / double(batches.size()));
    }

    struct Curvature {
        double eigenvalue = 0.0, error = INFINITY;  // the outermost; how far it is at most from one of H
        int iterations = 0;
    };
    // The largest eigenvalue of a symmetric H of `size` rows, if `both` of the two outermost the larger in magnitude.
    // product(v, found) leaves 2e H v at g and returns e, which it chooses by the eigenvalue found so far.
    Curvature lanczos(size_t size, const float* g, bool both, std::function<double(const float*, double)> product) {
        float *v = m.direction, *previous = m.previous;
        CHECK(cudaMemsetAsync(previous, 0, size * sizeof(float), m.gpu.stream));
        random_direction_kernel<<<chunks(size), 256, 0, m.gpu.stream>>>(v, size, 1);
        combine(v, 1.0 / sqrt(dot(v, v, size)), v, 0.0, v, size);
        Curvature found;
        std::vector<double> a, b;
        while (found.iterations < iterations && !asked_to_stop) {
            const double e = product(v, found.eigenvalue);
            a.push_back(dot(v, g, size) / (2 * e));
            lanczos_kernel<<<chunks(size), 256, 0, m.gpu.stream>>>(previous, v, g, float(0.5 / e), float(a.back()),
                                                                   b.empty() ? 0.0f : float(b.back()), size);
            b.push_back(sqrt(dot(previous, previous, size)));
            found.iterations++;
            if (!std::isfinite(a.back()) || !std::isfinite(b.back())) {
                found.eigenvalue = NAN;
                break;
            }
            const double least = tridiagonal_eigenvalue(a, b, 0), most = tridiagonal_eigenvalue(a, b, a.size() - 1);
            found.eigenvalue = both && -least > most ? least : most;
            found.error = tridiagonal_error(a, b, found.eigenvalue);
            if (found.error <= 3e-3 * fabs(found.eigenvalue) && found.iterations > 2) break;
            std::swap(v, previous);
            combine(v, 1.0 / b.back(), v, 0.0, v, size);
        }
        return found;
    }
    Curvature over_parameters(int64_t step) {
        const size_t P = m.table.size;
        float *const w = reinterpret_cast<float*>(m.params), *const g = static_cast<float*>(m.grads.p);
        keep(m.kept, w, P);
        const bool graphs = m.use_graphs;
        m.use_graphs = false;  // a graph is of one weight, and training's is another
        const Curvature found = lanczos(P, g, false, [&](const float* v, double eigenvalue) {
            // the loss changes by 2e-6 at most: higher orders do not show then, rounding does not yet
            const double e = 0.002 / sqrt(std::max(fabs(eigenvalue), 30.0));
            for (int side : {1, -1}) {  // a half of the difference runs with negative weights
                combine(w, 1.0, m.kept, side * e, v, P);
                for (size_t i = 0; i < batches.size() && !asked_to_stop; i++) {
                    channel.progress("probing", step);
                    forward_backward(m, batches[i].data(), m.B, m.c.T, float(side) / float(batches.size()),
                                     side == 1 && i == 0);
                }
            }
            return e;
        });
        keep(w, m.kept, P);
        m.use_graphs = graphs;
        return found;
    }
    // Of each block, in order. From the last one on, as what runs behind an input overwrites later ones.
    std::vector<Curvature> over_inputs(int64_t step) {
        const size_t N = m.N(), size = N * m.c.C;
        float *const kept = m.kept, *const difference = m.kept + size, *const g = reinterpret_cast<float*>(m.dres);
        std::vector<Curvature> found(m.c.L);
        set_batch(m, batches[0].data(), m.B, m.c.T, false);
        forward(m, m.B, m.c.T);
        for (int l = m.c.L - 1; l >= 0; l--) {
            float* const x = reinterpret_cast<float*>(m.acts[l].x);
            keep(kept, x, size);
            const double length = sqrt(dot(x, x, size) / double(N));  // of a token
            found[l] = lanczos(size, difference, true, [&](const float* v, double eigenvalue) {
                // A token moves by 6e-4 of its length, or along that eigenvector changes its loss by 5e-7, at most: in
                // trained models of 8 layers higher orders then are 2e-3 of the eigenvalue, rounding is 1e-3.
                const double e = std::min(6e-4 * length, 1e-3 / sqrt(double(N) * fabs(eigenvalue)));
                for (int side : {1, -1}) {
                    channel.progress("probing", step);
                    combine(x, 1.0, kept, side * e, v, size);
                    launch_micro_batch(m, m.B, m.c.T, 1.0f, true, true, l);
                    combine(difference, side, g, side == 1 ? 0.0 : 1.0, side == 1 ? g : difference, size);
                }
                return e;
            });
        }
        return found;
    }

    void open(int64_t step) const {
        begin_rows(out + "/activations.csv", ACTIVATIONS_HEADER, step);
        begin_rows(out + "/weights.csv", WEIGHTS_HEADER, step);
        if (!m.direction) return;
        begin_rows(out + "/curvature.csv", CURVATURE_HEADER, step);
        begin_rows(out + "/curvature_inputs.csv", INPUTS_HEADER, step);
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
    // Behind a step that `o` updated, whose gradients are still there; step 0: there was none.
    void run(int64_t step, const AdamW& o) {
        if (step > 0) append("weights.csv", updates(step, o));
        append("activations.csv", activations(step));
        if (!m.direction || iterations == 0) return;
        const float mean = loss();
        const Curvature w = over_parameters(step);
        auto left_off = [&] {  // what was not finished is not written down
            if (asked_to_stop) printf("asked to stop: the probe of step %lld was left off\n", (long long)step);
            return asked_to_stop != 0;
        };
        if (left_off()) return;
        append("curvature.csv",
               format("%lld,%.9g,%.6g,%.3g,%d\n", (long long)step, mean, w.eigenvalue, w.error, w.iterations));
        printf("probe at step %lld: loss %.4f, largest eigenvalue of the Hessian %.4g +- %.2g (%d iterations)\n",
               (long long)step, mean, w.eigenvalue, w.error, w.iterations);
        const std::vector<Curvature> inputs = over_inputs(step);
        if (left_off()) return;
        std::string rows;
        for (int l = 0; l < m.c.L; l++) {
            const Curvature& x = inputs[l];
            rows += format("%lld,%d,%.6g,%.3g,%d\n", (long long)step, l, x.eigenvalue, x.error, x.iterations);
        }
        append("curvature_inputs.csv", rows);
        printf("  largest in magnitude over the input of block 0: %.3g, of block %d: %.3g\n", inputs[0].eigenvalue,
               m.c.L - 1, inputs.back().eigenvalue);
    }
};
