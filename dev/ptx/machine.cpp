// The machine: which function runs an instruction, and the turns in which blocks and warps run.
#include <fenv.h>

#include "async.h"

namespace ptx {

Options options;
Pages global_pages;
std::unordered_map<uint64_t, Flag> flags;

static uint64_t random_state = 1;
uint32_t draw() {  // xorshift64*
    random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
    return uint32_t(random_state * 0x2545F4914F6CDD1Du >> 32);
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of instructions

template <class T> struct Type { typedef T type; };
// f(Type<T>) for the type that a name ends with; false: it is none of these
template <class F> static bool by_type(const std::string& t, F f) {
    if (t == "u16" || t == "b16") return f(Type<uint16_t>()), true;
    if (t == "s16") return f(Type<int16_t>()), true;
    if (t == "u32" || t == "b32") return f(Type<uint32_t>()), true;
    if (t == "s32") return f(Type<int32_t>()), true;
    if (t == "u64" || t == "b64") return f(Type<uint64_t>()), true;
    if (t == "s64") return f(Type<int64_t>()), true;
    if (t == "f32") return f(Type<float>()), true;
    if (t == "f64") return f(Type<double>()), true;
    return false;
}
template <class A, class B> constexpr bool same = std::is_same_v<A, B>;

// Two operands of type T, one of type T, three
template <class F> static Run two(const std::string& t) {
    Run run = nullptr;
    by_type(t, [&](auto type) {
        typedef typename decltype(type)::type T;
        if constexpr (std::is_invocable_v<F, T, T>) run = compute<F, T, T, T>;
    });
    return run;
}
#define OF_TYPE(t, condition, ...)                    \
    by_type(t, [&](auto type) {                       \
        typedef typename decltype(type)::type T;      \
        if constexpr (condition) in.run = __VA_ARGS__; \
        (void)type;                                   \
    })

template <int HOW, bool UNORDERED> static Run compare_of(const std::string& t) {
    Run run = nullptr;
    by_type(t, [&](auto type) { run = compare<Compare<HOW, UNORDERED>, typename decltype(type)::type>; });
    return run;
}

// whether these are the parts after the first
static bool is(const std::vector<std::string>& p, std::initializer_list<const char*> words) {
    return p.size() == words.size() + 1 && std::equal(words.begin(), words.end(), p.begin() + 1);
}

static void arithmetic(Instr& in, const std::vector<std::string>& p) {
    const std::string &op = p[0], &t = p.back();
    const bool is_float = t[0] == 'f', plain = p.size() == 2, rn = p.size() == 3 && p[1] == "rn" && is_float;
    in.kind = is_float ? FLOAT : INTEGER;
    if (op == "add" && (plain || rn)) in.run = two<Add>(t);
    else if (op == "sub" && (plain || rn)) in.run = two<Sub>(t);
    else if (op == "mul" && ((plain && is_float) || rn || (p.size() == 3 && p[1] == "lo"))) in.run = two<Mul>(t);
    else if (op == "mul" && p.size() == 3 && p[1] == "hi") OF_TYPE(t, !floating<T>, compute<MulHi, T, T, T>);
    else if (op == "mul" && p.size() == 3 && p[1] == "wide") {
        if (t == "u16") in.run = compute<MulWide<uint32_t>, uint32_t, uint16_t, uint16_t>;
        if (t == "s16") in.run = compute<MulWide<int32_t>, int32_t, int16_t, int16_t>;
        if (t == "u32") in.run = compute<MulWide<uint64_t>, uint64_t, uint32_t, uint32_t>;
        if (t == "s32") in.run = compute<MulWide<int64_t>, int64_t, int32_t, int32_t>;
    } else if (op == "mad" && p.size() == 3 && p[1] == "lo") OF_TYPE(t, !floating<T>, compute<Mad, T, T, T, T>);
    else if (op == "fma" && rn) OF_TYPE(t, floating<T>, compute<Fma, T, T, T, T>);
    else if (op == "div" && is(p, {"approx", "f32"}))
        in.run = compute<DivApprox, float, float, float>, in.kind = SPECIAL;
    else if (op == "div" && ((plain && !is_float) || rn)) in.run = two<Div>(t), in.kind = SPECIAL;
    else if (op == "rem" && plain) OF_TYPE(t, !floating<T>, compute<Rem, T, T, T>), in.kind = SPECIAL;
    else if (op == "min" && plain) in.run = two<Min>(t);
    else if (op == "max" && plain) in.run = two<Max>(t);
    else if (op == "abs" && plain) OF_TYPE(t, floating<T>, compute<Abs, T, T>);
    else if (op == "neg" && plain) OF_TYPE(t, floating<T> || std::is_signed_v<T>, compute<Neg, T, T>);
    else if (op == "copysign" && plain) OF_TYPE(t, floating<T>, compute<CopySign, T, T, T>);
    else if (op == "sqrt" && rn) OF_TYPE(t, floating<T>, compute<Sqrt, T, T>), in.kind = SPECIAL;
    else if (op == "rcp" && rn) OF_TYPE(t, floating<T>, compute<Rcp, T, T>), in.kind = SPECIAL;
    else if (op == "rcp" && is(p, {"approx", "ftz", "f64"}))
        in.run = compute<RcpApprox64, double, double>, in.kind = SPECIAL;
    else if (op == "rsqrt" && is(p, {"approx", "f32"})) in.run = compute<RsqrtApprox, float, float>, in.kind = SPECIAL;
    else if (op == "ex2" && is(p, {"approx", "f32"})) in.run = compute<Ex2, float, float>, in.kind = SPECIAL;
    else if (op == "ex2" && is(p, {"approx", "ftz", "f32"})) in.run = compute<Ex2Ftz, float, float>, in.kind = SPECIAL;
    else if (op == "bfi" && is(p, {"b32"})) in.run = compute<Bfi, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
    else if (op == "prmt" && is(p, {"b32"})) in.run = compute<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>;
    else if (op == "shl" && plain) OF_TYPE(t, !floating<T>, compute<Shl, T, T, uint32_t>);
    else if (op == "shr" && plain) OF_TYPE(t, !floating<T>, compute<Shr, T, T, uint32_t>);
    else if (t == "pred" && plain) {
        if (op == "and") in.run = predicate_logic<And, 0>;
        if (op == "or") in.run = predicate_logic<Or, 1>;
        if (op == "xor") in.run = predicate_logic<Xor, -1>;
        if (op == "not") in.run = predicate_not;
        if (op == "mov") in.run = predicate_move;
    } else if (op == "and" && plain) OF_TYPE(t, !floating<T>, compute<And, T, T, T>);
    else if (op == "or" && plain) OF_TYPE(t, !floating<T>, compute<Or, T, T, T>);
    else if (op == "xor" && plain) OF_TYPE(t, !floating<T>, compute<Xor, T, T, T>);
    else if (op == "not" && plain) OF_TYPE(t, !floating<T>, compute<Not, T, T>);
    else if (op == "selp" && plain) OF_TYPE(t, true, select<Bits<T>>);
    else if (op == "mov" && plain) {
        if (in.s.size() == 2) OF_TYPE(t, true, compute<Move, Bits<T>, Bits<T>>);
        else if (t == "b64" && in.vector == 1) in.run = pack<uint64_t, uint32_t>;
        else if (t == "b64") in.run = unpack<uint64_t, uint32_t>, in.outs = 2;
        else if (t == "b32" && in.vector == 1) in.run = pack<uint32_t, uint16_t>;
        else if (t == "b32") in.run = unpack<uint32_t, uint16_t>, in.outs = 2;
    } else if (op == "cvta" && t == "u64") in.run = compute<Move, uint64_t, uint64_t>;
    else if (op == "setp" && p.size() == 3) {
        const std::string& how = p[1];
        if (how == "eq") in.run = compare_of<0, false>(t);
        if (how == "ne") in.run = compare_of<1, false>(t);
        if (how == "lt" || how == "lo") in.run = compare_of<2, false>(t);
        if (how == "le" || how == "ls") in.run = compare_of<3, false>(t);
        if (how == "gt" || how == "hi") in.run = compare_of<4, false>(t);
        if (how == "ge" || how == "hs") in.run = compare_of<5, false>(t);
        if (!is_float) return;
        if (how == "equ") in.run = compare_of<0, true>(t);
        if (how == "neu") in.run = compare_of<1, true>(t);
        if (how == "ltu") in.run = compare_of<2, true>(t);
        if (how == "leu") in.run = compare_of<3, true>(t);
        if (how == "gtu") in.run = compare_of<4, true>(t);
        if (how == "geu") in.run = compare_of<5, true>(t);
    }
}

static void convert(Instr& in, const std::vector<std::string>& p) {  // cvt[.rn|.rzi].to.from
    const std::string &to = p[p.size() - 2], &from_ = p.back(), how = p.size() == 4 ? p[1] : "";
    in.kind = to[0] == 'f' || to[0] == 'b' || from_[0] == 'f' ? FLOAT : INTEGER;
    if (to == "bf16" && from_ == "f32" && how == "rn") in.run = compute<ToBf16, uint16_t, float>;
    else if (to == "bf16x2" && from_ == "f32" && how == "rn") in.run = compute<ToBf16x2, uint32_t, float, float>;
    else if (to == "f32" && from_ == "bf16" && how.empty()) in.run = compute<FromBf16, float, uint16_t>;
    else
        by_type(to, [&](auto to_type) {
            by_type(from_, [&](auto from_type) {
                typedef typename decltype(to_type)::type D;
                typedef typename decltype(from_type)::type S;
                if constexpr (!floating<D> && !floating<S>) {
                    if (how.empty()) in.run = compute<Convert<D>, D, S>;
                } else if constexpr (floating<D> && floating<S> && sizeof(D) > sizeof(S)) {
                    if (how.empty()) in.run = compute<Convert<D>, D, S>;
                } else if constexpr (floating<D> && (!floating<S> || sizeof(D) < sizeof(S))) {
                    if (how == "rn") in.run = compute<ConvertRound<D>, D, S>;
                } else if constexpr (floating<S>) {
                    if (how == "rzi") in.run = compute<ConvertTruncate<D>, D, S>;
                }
            });
        });
}

static bool memory_instruction(Instr& in, std::vector<std::string> p) {
    const bool store = p[0] == "st";
    in.kind = MEMORY;
    in.outs = store ? 0 : uint8_t(in.count);
    const std::string t = p.back();
    in.is_signed = t[0] == 's';
    in.width = uint8_t(type_bytes(t));
    p.pop_back();
    if (p.back() == "v2" || p.back() == "v4") {
        if (in.count != p.back()[1] - '0') return false;
        p.pop_back();
    } else if (in.vector >= 0) return false;
    if (is(p, {"param"}) && !store) in.run = load_param;
    else if (is(p, {"volatile", "shared"})) in.strong = true, in.run = store ? memory<true, true> : memory<true, false>;
    else if (is(p, {"shared"})) in.run = store ? memory<true, true> : memory<true, false>;
    else if (is(p, {"global"}) || is(p, {"global", "cg"}) || is(p, {"global", "cs"}) || is(p, {"global", "wb"}) ||
             is(p, {"global", "nc"})) {
        in.cached = p.size() == 2 || p[2] == "nc" || p[2] == "wb";
        in.run = store ? memory<false, true> : memory<false, false>;
    } else if (is(p, {"volatile", "global"}))
        in.strong = true, in.run = store ? memory<false, true> : memory<false, false>;
    else if (store && is(p, {"release", "gpu", "global"})) in.strong = true, in.run = store_release;
    else if (!store && is(p, {"acquire", "gpu", "global"})) in.strong = true, in.run = load_acquire;
    return in.width > 0;
}

static int64_t constant(const Kernel& kernel, Slot s) {
    for (auto& c : kernel.constants32)
        if (c.first == s.at) return int64_t(c.second);
    throw "no constant where one must be:";
}

void choose(Kernel& kernel, Instr& in, const std::vector<std::string>& p) {
    const std::string &op = p[0], &whole = in.op;
    auto begins = [&](const char* text) { return whole.compare(0, strlen(text), text) == 0; };
    struct Whole { const char* op; Run run; Class kind; Meet meet; int outs; };
    static const Whole table[] = {
        {"bra", nothing, CONTROL, ALONE, 0},
        {"bra.uni", nothing, CONTROL, ALONE, 0},
        {"exit", leave, CONTROL, ALONE, 0},
        {"ret", leave, CONTROL, ALONE, 0},
        {"bar.sync", barrier<true>, CONTROL, WHOLE_WARP, 0},
        {"bar.arrive", barrier<false>, CONTROL, WHOLE_WARP, 0},
        {"bar.warp.sync", warp_sync, CONTROL, BY_MASK, 0},
        {"shfl.sync.idx.b32", shuffle<0>, MEMORY, BY_MASK, 1},
        {"shfl.sync.bfly.b32", shuffle<1>, MEMORY, BY_MASK, 1},
        {"shfl.sync.up.b32", shuffle<2>, MEMORY, BY_MASK, 1},
        {"shfl.sync.down.b32", shuffle<3>, MEMORY, BY_MASK, 1},
        {"vote.sync.any.pred", vote<0>, CONTROL, BY_MASK, 1},
        {"vote.sync.all.pred", vote<1>, CONTROL, BY_MASK, 1},
        {"nanosleep.u32", sleep, CONTROL, ALONE, 0},
        {"atom.global.inc.u32", atomic_inc, MEMORY, ALONE, 1},
        {"prefetch.global.L2", nothing, MEMORY, ALONE, 0},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", mma, TENSOR, WHOLE_WARP, 4},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", ldmatrix<false>, MEMORY, WHOLE_WARP, 4},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", ldmatrix<true>, MEMORY, WHOLE_WARP, 4},
        {"stmatrix.sync.aligned.m8n8.x4.shared.b16", stmatrix, MEMORY, WHOLE_WARP, 0},
        {"cp.async.ca.shared.global", copy_async, MEMORY, ALONE, 0},
        {"cp.async.cg.shared.global", copy_async, MEMORY, ALONE, 0},
        {"cp.async.cg.shared.global.L2::128B", copy_async, MEMORY, ALONE, 0},
        {"cp.async.commit_group", copy_commit, CONTROL, ALONE, 0},
        {"cp.async.wait_group", copy_wait, CONTROL, ALONE, 0},
        {"mbarrier.init.shared::cta.b64", mbarrier_init, CONTROL, ALONE, 0},
        {"mbarrier.arrive.release.cta.shared::cta.b64", mbarrier_arrive<false>, CONTROL, ALONE, 1},
        {"mbarrier.arrive.expect_tx.release.cta.shared::cta.b64", mbarrier_arrive<true>, CONTROL, ALONE, 1},
        {"mbarrier.try_wait.parity.acquire.cta.shared::cta.b64", mbarrier_try_wait, CONTROL, ALONE, 1},
        {"fence.proxy.async", proxy_fence<true, true>, CONTROL, ALONE, 0},
        {"fence.proxy.async.shared::cta", proxy_fence<true, false>, CONTROL, ALONE, 0},
        {"fence.proxy.async.global", proxy_fence<false, true>, CONTROL, ALONE, 0},
        {"fence.mbarrier_init.release.cluster", mbarrier_fence, CONTROL, ALONE, 0},
        {"cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes", bulk_tensor<true>, MEMORY, ALONE,
         0},
        {"cp.async.bulk.tensor.4d.global.shared::cta.bulk_group", bulk_tensor<false>, MEMORY, ALONE, 0},
        {"cp.async.bulk.global.shared::cta.bulk_group", bulk_copy<false>, MEMORY, ALONE, 0},
        {"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", bulk_copy<true>, MEMORY, ALONE, 0},
        {"cp.async.bulk.commit_group", bulk_commit, CONTROL, ALONE, 0},
        {"cp.async.bulk.wait_group", bulk_wait<false>, CONTROL, ALONE, 0},
        {"cp.async.bulk.wait_group.read", bulk_wait<true>, CONTROL, ALONE, 0},
        {"wgmma.fence.sync.aligned", wgmma_fence, CONTROL, WHOLE_WARP, 0},
        {"wgmma.commit_group.sync.aligned", wgmma_commit, CONTROL, WHOLE_WARP, 0},
        {"wgmma.wait_group.sync.aligned", wgmma_wait, CONTROL, WHOLE_WARP, 0},
        {"setmaxnreg.inc.sync.aligned.u32", set_registers<true>, CONTROL, WHOLE_WARP, 0},
        {"setmaxnreg.dec.sync.aligned.u32", set_registers<false>, CONTROL, WHOLE_WARP, 0},
    };
    for (const Whole& known : table)
        if (whole == known.op) {
            in.run = known.run, in.kind = known.kind, in.meet = known.meet, in.outs = uint8_t(known.outs + in.pair);
            in.cached = op == "cp" && p.size() > 2 && p[2] == "ca";
            return;
        }
    if (begins("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16") ||
        begins("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16")) {
        const size_t n = whole.find("n64") != std::string::npos ? 64 : 128;
        const bool rs = in.s.size() == n / 2 + 9;
        if (!rs && in.s.size() != n / 2 + 7) throw "the operands do not fit";
        in.kind = TENSOR, in.meet = WHOLE_WARP, in.outs = uint8_t(n / 2);
        const size_t after = n / 2 + (rs ? 6 : 3);  // scale-a, scale-b, [trans-a,] trans-b
        for (size_t i = after; i < after + 2; i++)
            if (constant(kernel, in.s[i]) != 1) throw "only scales of 1 are known:";
        if (!rs) in.trans_a = int(constant(kernel, in.s[after + 2]));
        in.trans_b = int(constant(kernel, in.s.back()));
        in.run = n == 64 ? rs ? wgmma<64, true> : wgmma<64, false> : rs ? wgmma<128, true> : wgmma<128, false>;
        kernel.wgmma = true;
    } else if (op == "ld" || op == "st") {
        if (!memory_instruction(in, p)) in.run = nullptr;
    } else if (op == "cvt") {
        convert(in, p);
    } else {
        arithmetic(in, p);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Turns

static bool can_meet(const Warp& w, const Instr& in, const Group& g, uint32_t lanes) {
    if (in.meet == ALONE) return true;
    if (lanes == 0) return true;
    uint32_t needed = w.live;
    if (in.meet == BY_MASK) {
        const uint32_t* masks = reinterpret_cast<const uint32_t*>(w.file + in.s.back().at);
        EACH_LANE(l) if (!(masks[l] >> l & 1)) w.report("barrier", l, "the lane is not in its own mask");
        needed &= masks[__builtin_ctz(lanes)];
    }
    if ((g.lanes & needed) != needed) return false;
    if (in.meet == WHOLE_WARP && in.kind != CONTROL && w.live != ~0u)
        w.report("barrier", __builtin_ctz(lanes), "it is for 32 lanes, of which some have left");
    const uint32_t absent = needed & ~lanes;
    if (absent)
        w.report("barrier", __builtin_ctz(absent), "a lane that it is for does not execute it: its guard is false");
    return true;
}

static void count(Grid& grid, int pc, int64_t times) {
    const Class kind = grid.kernel.code[pc].kind;
    Counts& c = grid.counts;
    grid.at[pc][0] += times;
    (kind == TENSOR ? c.tensor : kind == FLOAT ? c.floats : kind == INTEGER ? c.integers
     : kind == SPECIAL ? c.special : kind == MEMORY ? c.memory : c.control) += times;
}
static bool stalls(const Instr& in) {  // memory, barriers, fences
    return in.kind == MEMORY || in.run == barrier<true> || in.run == barrier<false> || in.run == mbarrier_try_wait ||
           in.op.compare(0, 6, "fence.") == 0;
}
// How often a warp looks for an event in vain is the machine's doing, not the program's: only its last look counts.
static void count(Warp& w, Grid& grid, int pc) {
    const std::vector<Instr>& code = grid.kernel.code;
    Counts& c = grid.counts;
    auto uncovered = [&](int i) { return w.fenced && w.product_group - 1 == w.product_done && stalls(code[i]); };
    if (pc == w.looked)
        for (int i : w.since) {
            count(grid, i, -1);
            c.uncovered -= uncovered(i);
            if (code[i].run != load_acquire) continue;
            c.sectors--, c.sectors_needed--, c.read -= 4, c.to_l2--;
            grid.at[i][1]--, grid.at[i][2]--, grid.at[i][3]--;
        }
    if (pc == w.looked || w.since.size() > 16) w.looked = -1;
    count(grid, pc, 1);
    c.uncovered += uncovered(pc);
    if (w.looked >= 0) w.since.push_back(pc);
}

// Some instructions of a warp. Lanes that are apart go on from the lowest place, so that they meet again, but now and
// then from another.
static void run_warp(Warp& w) {
    Grid& grid = *w.block.grid;
    const std::vector<Instr>& code = grid.kernel.code;
    int turns = 16 + int(draw() % 256);
    const bool watch = grid.kernel.wgmma && options.races, counts = options.counts;
    w.yields = false;
    bool progress = false;
    for (uint32_t refused = 0; turns > 0 && w.state != Warp::LEFT; turns--) {
        size_t pick = 0;
        if (w.groups.size() > 1) {
            if (refused || draw() % 64 == 0) pick = draw() % w.groups.size();
            else
                for (size_t i = 1; i < w.groups.size(); i++)
                    if (w.groups[i].pc < w.groups[pick].pc) pick = i;
        }
        Group& g = w.groups[pick];
        const Instr& in = code[g.pc];
        uint32_t lanes = g.lanes;
        w.pc = g.pc;
        if (in.guarded) {
            w.need(lanes, in.guard, in.target >= 0 ? "a branch" : "a predicate");
            lanes &= in.guard_not ? ~w.pred(in.guard) : w.pred(in.guard);
        }
        if (!can_meet(w, in, g, lanes)) {
            if (++refused > 64) {
                w.yields = true;
                break;
            }
            continue;
        }
        grid.counts.instructions++;
        if (counts) count(w, grid, g.pc);
        if (in.run == leave) {
            w.live &= ~lanes, g.lanes &= ~lanes, g.pc++;
            if (g.lanes == 0) w.groups.erase(w.groups.begin() + pick);
            if (w.live == 0) {
                w.state = Warp::LEFT, w.block.left++, grid.events++;
                for (Barrier& b : w.block.barriers) barrier_check(w.block, b);
                for (int l = 0; l < 32; l++)
                    if (w.bulk_open[l] > w.waited[l].reads)
                        w.report("race", l, "it leaves, but a bulk copy of its may still read shared memory");
            }
            continue;
        }
        if (in.target >= 0) {
            const uint32_t stay = g.lanes & ~lanes;
            if (lanes && stay) {
                g.lanes = stay, g.pc++;
                w.groups.push_back({in.target, lanes});
            } else {
                g.pc = lanes ? in.target : g.pc + 1;
            }
        } else {
            if (lanes) {
                if (watch && (in.run != wgmma<64, true> && in.run != wgmma<64, false> && in.run != wgmma<128, true> &&
                              in.run != wgmma<128, false>)) watch_registers(w, in);
                in.run(w, in, lanes);
            }
            if (w.state == Warp::NO_REGISTERS) {
                if (counts) count(grid, g.pc, -1);
                return;
            }
            g.pc++;
        }
        refused = 0;
        progress = true;
        if (w.groups.size() > 1) {  // who is at the same place goes on together
            for (size_t i = 0; i < w.groups.size(); i++)
                for (size_t j = w.groups.size(); --j > i;)
                    if (w.groups[i].pc == w.groups[j].pc) {
                        w.groups[i].lanes |= w.groups[j].lanes;
                        w.groups.erase(w.groups.begin() + j);
                    }
        }
        if (w.yields && turns > 8) turns = 1 + int(draw() % 8);
        if (w.state == Warp::AT_BARRIER) return;
    }
    if (w.quiet_since != grid.events) w.quiet_since = grid.events, w.quiet = 0;
    if (progress && !w.yields) w.quiet = 0;
    else w.quiet++;
}

static std::unique_ptr<Block> begin_block(Grid& grid, uint64_t number) {
    auto block = std::make_unique<Block>();
    const Dim g = grid.launch.grid, b = grid.launch.block;
    const Kernel& kernel = grid.kernel;
    block->grid = &grid;
    block->id = uint32_t(number + 1);
    block->index = {unsigned(number % g.x), unsigned(number / g.x % g.y), unsigned(number / g.x / g.y)};
    uint32_t shared = 0;
    for (const Symbol& s : grid.shared) shared = std::max(shared, s.at + s.bytes - SHARED_BASE);
    block->shared.assign(shared, 0xFF);
    block->written.assign(shared, 0);
    const unsigned threads = b.x * b.y * b.z;
    for (unsigned first = 0; first < threads; first += 32) {
        auto w = std::make_unique<Warp>(*block, int(first / 32));
        w->live = threads - first >= 32 ? ~0u : (1u << (threads - first)) - 1;
        w->groups = {{0, w->live}};
        w->registers = grid.registers;
        w->storage.resize(kernel.file_bytes / 8 + 9);
        w->file = reinterpret_cast<unsigned char*>((uintptr_t(w->storage.data()) + 63) & ~uintptr_t(63));
        w->poison.assign(kernel.slots, options.races ? ~0u : 0);
        w->poison[0] = 0;
        if (kernel.wgmma) {
            w->writes.assign(kernel.slots, 0);
            w->reads.assign(kernel.slots, 0);
            w->touched.assign(kernel.slots, 0);
            w->product_pc.assign(kernel.slots, 0);
        }
        for (auto& c : kernel.constants32) {
            uint32_t* p = reinterpret_cast<uint32_t*>(w->file + c.first);
            std::fill(p, p + (c.second >> 63 ? 1 : 32), uint32_t(c.second));
        }
        for (auto& c : kernel.constants64) {
            uint64_t* p = reinterpret_cast<uint64_t*>(w->file + c.first);
            std::fill(p, p + 32, c.second);
        }
        for (unsigned l = 0; l < 32; l++) {
            const unsigned t = first + l;
            const unsigned values[14] = {t % b.x, t / b.x % b.y, t / b.x / b.y, b.x, b.y, b.z, block->index.x,
                                         block->index.y, block->index.z, g.x, g.y, g.z, l, first / 32};
            for (int i = 0; i < 14; i++)
                if (kernel.special[i]) reinterpret_cast<uint32_t*>(w->file + kernel.special[i])[l] = values[i];
        }
        block->warps.push_back(std::move(w));
    }
    return block;
}

[[noreturn]] static void report_stuck(Block& block) {
    std::string text;
    const char* kind = "stuck";
    const Warp* some = nullptr;
    for (auto& w : block.warps) {
        if (w->state == Warp::LEFT) continue;
        if (!some) some = w.get();
        if (w->state == Warp::NO_REGISTERS) kind = "registers";
    }
    std::map<std::string, std::string> places;
    for (auto& w : block.warps) {
        if (w->state == Warp::LEFT) places["the kernel's end"] += " " + std::to_string(w->number);
        else
            for (const Group& g : w->groups) {
                const int pc = w->state == Warp::AT_BARRIER ? g.pc - 1 : g.pc;
                places[w->place(pc)] += " " + std::to_string(w->number) + (w->groups.size() > 1 ? "(some lanes)" : "");
            }
    }
    for (auto& place : places) text += "; at " + place.first + " warps" + place.second;
    for (auto& m : block.mbarriers)
        if (m.second.bytes || m.second.pending != m.second.count)
            text += "; the mbarrier at shared " + std::to_string(m.first - SHARED_BASE) + " waits for " +
                    std::to_string(m.second.pending) + " arrivals and " + std::to_string(m.second.bytes) + " bytes";
    for (int i = 0; i < 16; i++)
        if (block.barriers[i].arrived)
            text += "; barrier " + std::to_string(i) + " has " + std::to_string(block.barriers[i].arrived) + " of " +
                    std::to_string(block.barriers[i].expected) + " threads";
    some->report(kind, 0, "nobody can go on" + text);
}

static void end_block(Block& block) {
    while (!block.bulks.empty()) {
        if (block.bulks.front().kind == Bulk::LOAD)
            block.warps[block.bulks.front().warp]->report("phase", block.bulks.front().lane,
                                                          "the block ends while a bulk copy to it is under way");
        while (!bulk_step(block, block.bulks.front())) {}
        block.bulks.erase(block.bulks.begin());
    }
    for (auto& m : block.mbarriers)
        if (m.second.bytes)
            block.warps[0]->report("phase", 0, "the block ends, but the mbarrier at shared " +
                                                   std::to_string(m.first - SHARED_BASE) + " still expects " +
                                                   std::to_string(m.second.bytes) + " bytes");
    for (auto& w : block.warps)
        if (w->products != block.products[w->number / 4].size())
            w->report("wgmma", 0, "it has left, and others of its warpgroup have executed the " +
                                      w->place(int(block.products[w->number / 4][w->products][0])));
        else if (w->changes != block.warps[w->number / 4 * 4]->changes)
            w->report("registers", 0, "its warpgroup's warps have not executed the same setmaxnreg");
    block.grid->counts.blocks++;
    block.grid->counts.warps += block.warps.size();
}

static void run_grid(Grid& grid) {
    const Dim g = grid.launch.grid;
    const uint64_t all = uint64_t(g.x) * g.y * g.z;
    const uint64_t count = options.sample ? std::min<uint64_t>(options.sample, all) : all;
    std::vector<std::unique_ptr<Block>> way;
    const size_t most = options.under_way > 2 ? 2 + draw() % (options.under_way - 1) : options.under_way;
    for (uint64_t next = 0; next < count || !way.empty();) {
        while (way.size() < most && next < count)  // a sample is the middles of equal parts
            way.push_back(begin_block(grid, count == all ? next : (2 * next + 1) * all / (2 * count))), next++;
        const size_t pick = draw() % way.size();
        Block& block = *way[pick];
        bool ran = false;
        for (size_t tries = 1 + draw() % 8, first = draw(); tries > 0; tries--, first = draw()) {
            for (size_t i = 0; i < block.warps.size(); i++) {
                Warp& w = *block.warps[(first + i) % block.warps.size()];
                if (w.state == Warp::LEFT || w.state == Warp::AT_BARRIER) continue;
                if (w.state == Warp::NO_REGISTERS) w.state = Warp::RUNS;
                run_warp(w);
                if (w.state == Warp::NO_REGISTERS) continue;
                ran = true;
                break;
            }
        }
        if (!block.bulks.empty() && (!ran || draw() % 4 == 0)) {
            const size_t i = draw() % block.bulks.size();
            if (bulk_step(block, block.bulks[i])) block.bulks.erase(block.bulks.begin() + i);
        }
        if (block.left == int(block.warps.size())) {
            end_block(block);
            way.erase(way.begin() + pick);
            continue;
        }
        // nobody can go on: all wait for a barrier or for registers, or have looked for an event in vain for long
        bool stuck = true;
        for (auto& b : way) {
            stuck = stuck && b->bulks.empty();
            for (auto& w : b->warps)
                stuck = stuck && (w->state == Warp::LEFT || w->state == Warp::AT_BARRIER || 
                                  (w->state == Warp::NO_REGISTERS && w->lacks > b->free_registers) ||
                                  (w->quiet > 200 && w->quiet_since == grid.events));
            if (!stuck) break;
        }
        if (stuck) report_stuck(*way.front());
    }
}

std::shared_ptr<Module> read(const std::string& text, const std::string& name) { return index_module(text, name); }
std::vector<std::string> kernels(const Module& module) {
    std::vector<std::string> names;
    for (auto& entry : module.entries) names.push_back(entry.first);
    return names;
}
bool has(const Module& module, const std::string& kernel) { return module.entries.count(kernel); }

void allocated(const void* at, size_t bytes) {
    if (bytes) allocations.ends[uint64_t(at)] = uint64_t(at) + bytes;
}
void freed(const void* at) { allocations.ends.erase(uint64_t(at)); }

Counts run(Module& module, const std::string& name, const Launch& launch) {
    static uint64_t launches = 0, seed = ~0ull;
    Kernel& kernel = find_kernel(module, name);
    const Dim b = launch.block;
    const unsigned threads = b.x * b.y * b.z;
    auto fail = [&](const std::string& what) { throw Report("launch", "ptx: kernel " + kernel.shown + ": " + what); };
    if (threads == 0 || threads > 1024) fail(std::to_string(threads) + " threads a block");
    if (kernel.maxntid && threads > kernel.maxntid)
        fail(std::to_string(threads) + " threads a block, .maxntid is " + std::to_string(kernel.maxntid));
    if (launch.args.size() != kernel.params.size())
        fail(std::to_string(launch.args.size()) + " arguments for " + std::to_string(kernel.params.size()) +
             " parameters");
    Grid grid = {module, kernel, launch, ++launches, {}, kernel.shared, 0, {}, {}, {}, 0};
    if (seed != options.seed) seed = options.seed, random_state = (seed + 1) * 0x9E3779B97F4A7C15u | 1;
    grid.params.assign(kernel.param_bytes, 0);
    for (size_t i = 0; i < kernel.params.size(); i++) {
        if (launch.args[i].bytes != kernel.params[i].bytes)
            fail("argument " + std::to_string(i) + " has " + std::to_string(launch.args[i].bytes) +
                 " bytes, the parameter " + std::to_string(kernel.params[i].bytes));
        memcpy(grid.params.data() + kernel.params[i].at, launch.args[i].data, launch.args[i].bytes);
    }
    if (launch.shared) grid.shared.push_back({kernel.dynamic_at, uint32_t(launch.shared)});
    const unsigned most = kernel.maxntid ? 65536 / kernel.maxntid / kernel.minnctapersm / 8 * 8 : 255;
    grid.registers = options.registers ? options.registers : int(std::min(255u, most));
    if (options.counts) grid.at.resize(kernel.code.size());
    flags.clear();
    fenv_t environment;  // subnormals stay: the host's mode may be another
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    try {
        run_grid(grid);
    } catch (...) {
        fesetenv(&environment);
        throw;
    }
    fesetenv(&environment);
    Counts& c = grid.counts;
    for (auto& s : grid.sectors) {
        c.read_distinct += 32 * s.second.read, c.written_distinct += 32 * s.second.written;
        c.shared_distinct += 32 * (s.second.read + s.second.written) * s.second.shared;
    }
    for (size_t i = 0; i < grid.at.size(); i++)
        if (grid.at[i][0])
            c.lines.push_back({uint64_t(kernel.code[i].line), grid.at[i][0], grid.at[i][1], grid.at[i][2],
                               grid.at[i][3], grid.at[i][4]});
    return c;
}

}  // namespace ptx
