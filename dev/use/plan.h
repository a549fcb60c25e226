// Plans: what fits, and the speed of light: what a step must compute and move at the least, and how long that takes on
// a device; --plan prints it. A matmul takes its FLOPs at the device's matmul rate or its bytes at copy speed,
// whichever is longer, the rest its bytes, every tensor moved once; kinds follow one another. d, k, f as in Recompute,
// in elements a token and layer: simplegpt's norms, RoPE and SwiGLU move 8d + 4k + 3f forward and 9d + 6k + 5f
// backward.
#pragma once
#include "../run/job.h"
#include "../run/log.h"

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
    add("AdamW", 1, 0, updated * (G + 4 * moment + (m.storage.has_master() ? 8 + X : 2 * X)));
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

// The mildest change of options with which the plan fits into `room` bytes, as a sentence: cut more over the ranks,
// recompute more, else fewer sequences, else less precise moments, gradients and weights. Of generation, what its cache
// grows with. o: of a training, else null.
inline std::string advice(const Model& m, size_t room, const Options* o = nullptr) {
    if (!m.training && m.cache.sequences) return "Choose fewer --num-samples or --max-tokens, or a smaller model.";
    const Storage& had = m.storage;
    const int share = o ? o->total_batch / had.ranks : 0;
    auto smaller = [&](int B) {  // micro-batches divide a rank's share
        if (!share) return B / 2;
        while (--B > 0 && share % B) {}
        return B;
    };
    for (int precision = 0; precision <= (m.training ? BF16 ? 3 : 1 : 0); precision++)
        for (int B = m.B; B > 0; B = smaller(B))
            for (Recompute level = had.recompute; level <= Recompute::block; level = Recompute(int(level) + 1))
                for (int zero = had.zero; zero <= (had.ranks > 1 ? 3 : had.zero); zero++)
                    for (bool each : {false, true}) {
                        const bool whole = (o ? storage_of(*o, B) : had).whole_gradients;
                        if (each && !whole) continue;
                        Storage s = had;
                        s.zero = zero, s.whole_gradients = whole && !each;
                        s.recompute = level;
                        s.half_moments |= precision > 0;
                        s.half_gradients |= precision > 1;
                        s.no_master |= precision > 2;
                        Model other;
                        other.cache = m.cache;
                        plan(other, m.gpu, m.c, B, m.training, s);
                        if (other.arena.used > room) continue;
                        std::string text = "Give";
                        if (s.zero != had.zero) text += format(" --zero %d", s.zero);
                        if (each) text += " --reduce each";
                        if (s.recompute != had.recompute) text += " --recompute " + RECOMPUTE[int(s.recompute)];
                        if (B < m.B) text += format(" --batch-size %d", B);
                        if (s.half_gradients != had.half_gradients) text += " --gradients bf16";
                        if (s.half_moments != had.half_moments) text += " --moments bf16";
                        if (s.no_master != had.no_master) text += " --no-master";
                        return text + format(", which needs %.1f GiB.", other.arena.used / 1073741824.0);
                    }
    return "Choose a smaller model or --seq-len.";
}

// create(), which where memory does not suffice says what options would help.
inline void create_or_advise(Model& m, const Options* o = nullptr) {
    try {
        create(m);
    } catch (const OutOfMemory& e) {
        throw Error(e.what() + (" " + advice(m, e.free, o)));
    }
}

inline void print_plan(Options& o) {
    const Device device = parse_device(o.device);
    Gpu gpu;
    gpu.sms = 132;  // sizes a little scratch; an H200's
    choose_batch(o, gpu, size_t(device.memory), true);
    Model m;
    plan_training(m, gpu, o, o.batch_size);
    print_run(m, o);
    if (double(m.arena.used) > device.memory)
        printf("  does not fit into the %.0f GiB of %s. %s\n", device.memory / (1 << 30), device.name.c_str(),
               advice(m, size_t(device.memory), &o).c_str());
    printf("%s", speed_of_light(m, o.grad_accum, device).c_str());
    const double seconds = least_seconds(m, o.grad_accum, device) * double(o.steps);
    printf("  %lld steps take at least %s, %.3g %s hours on %d of them; the rate that is reached divides that\n",
           (long long)o.steps, duration(seconds).c_str(), seconds / 3600 * o.storage.ranks, BF16 ? "GPU" : "device",
           o.storage.ranks);
}

// Prints what a rank holds in memory and sends, beside the plan. before: memory_used() of an empty device.
inline void print_use(const Model& m, double before, double sent, int micro) {
    wait_for_device(m);
    const double mib = 1048576.0, used = memory_used() - before;
    const double least = ranks.least(used), most = ranks.most(used);
    printf("memory a rank: plan %.1f MiB, in use %.1f MiB", m.arena.used / mib, least / mib);
    printf(ranks.size > 1 ? " to %.1f MiB\n" : "\n", most / mib);
    if (ranks.size > 1)
        printf("sent by a rank in a step: %.0f bytes, by theory %.0f (ZeRO %d)\n", sent, step_sent(m, micro),
               m.storage.zero);
}
