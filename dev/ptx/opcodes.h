// Arithmetic, memory and a warp's own instructions: what each does to the lanes that run it. PTX ISA manual:
// "Instruction Set", by the names of the instructions.
#pragma once
#include <math.h>

#include "warp.h"

namespace ptx {

#define EACH_LANE(l) for (int l = 0; l < 32; l++) if (lanes >> l & 1)

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic on all lanes: D = F(S...)

template <class F, class D, class... S, size_t... I>
inline void compute_lanes(Warp& w, const Instr& in, uint32_t lanes, std::index_sequence<I...>) {
    Cell<D>* d = w.reg<D>(in.s[0]);
    const auto from_all = [&](int l) { return cell<D>(F()(from<S>(w.reg<S>(in.s[I + 1])[l])...)); };
    if (lanes == ~0u) {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) d[l] = from_all(l);
    } else {
        EACH_LANE(l) d[l] = from_all(l);
    }
    w.spread(in, lanes);
}
template <class F, class D, class... S> void compute(Warp& w, const Instr& in, uint32_t lanes) {
    compute_lanes<F, D, S...>(w, in, lanes, std::index_sequence_for<S...>());
}
// a predicate of F(A, A)
template <class F, class A> void compare(Warp& w, const Instr& in, uint32_t lanes) {
    const Cell<A>*a = w.reg<A>(in.s[1]), *b = w.reg<A>(in.s[2]);
    uint32_t bits = 0;
    for (int l = 0; l < 32; l++) bits |= uint32_t(F()(from<A>(a[l]), from<A>(b[l]))) << l;
    uint32_t& p = w.pred(in.s[0]);
    p = (p & ~lanes) | (bits & lanes);
    w.spread(in, lanes);
}

template <class T> constexpr bool floating = std::is_floating_point_v<T>;
template <class T> inline T canonical(T x) {  // of f32 operations a NaN is 0x7fffffff
    if constexpr (std::is_same_v<T, float>) return x != x ? __builtin_bit_cast(float, 0x7fffffffu) : x;
    return x;
}
template <class T>  // of integers the unsigned type, which wraps
using Bits = std::conditional_t<floating<T>, T, std::make_unsigned_t<std::conditional_t<floating<T>, int, T>>>;

struct Add { template <class T> T operator()(T a, T b) { return canonical(T(Bits<T>(a) + Bits<T>(b))); } };
struct Sub { template <class T> T operator()(T a, T b) { return canonical(T(Bits<T>(a) - Bits<T>(b))); } };
struct Mul {
    template <class T> T operator()(T a, T b) {
        if constexpr (floating<T>) return canonical(a * b);
        else return T(uint64_t(a) * uint64_t(b));
    }
};
struct Mad { template <class T> T operator()(T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); } };
struct MulHi {
    template <class T> T operator()(T a, T b) { return T(__int128(a) * __int128(b) >> 8 * sizeof(T)); }
};
template <class D> struct MulWide { template <class T> D operator()(T a, T b) { return D(D(a) * D(b)); } };
struct Div {
    template <class T> T operator()(T a, T b) {
        if constexpr (floating<T>) return canonical(a / b);
        else if (b == 0) return T(-1);
        else if (std::is_signed_v<T> && b == T(-1)) return T(0 - Bits<T>(a));
        else return T(a / b);
    }
};
struct Rem {
    template <class T> T operator()(T a, T b) {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == T(-1)) return 0;
        return T(a % b);
    }
};
struct Fma { template <class T> T operator()(T a, T b, T c) { return canonical(T(std::fma(a, b, c))); } };
struct Min {
    template <class T> T operator()(T a, T b) {
        if constexpr (floating<T>) {
            if (a != a) return canonical(b);
            return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
        } else return a < b ? a : b;
    }
};
struct Max {
    template <class T> T operator()(T a, T b) {
        if constexpr (floating<T>) {
            if (a != a) return canonical(b);
            return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
        } else return a > b ? a : b;
    }
};
struct Abs { template <class T> T operator()(T a) { return std::fabs(a); } };
struct Neg { template <class T> T operator()(T a) { return T(-a); } };
struct CopySign { template <class T> T operator()(T sign, T value) { return std::copysign(value, sign); } };
struct And { template <class T> T operator()(T a, T b) { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) { return a ^ b; } };
struct Not { template <class T> T operator()(T a) { return T(~a); } };
struct Shl { template <class T> T operator()(T a, uint32_t n) { return n >= 8 * sizeof(T) ? 0 : T(a << n); } };
struct Shr {
    template <class T> T operator()(T a, uint32_t n) {
        if (n >= 8 * sizeof(T)) n = std::is_signed_v<T> ? 8 * sizeof(T) - 1 : 0, a = std::is_signed_v<T> ? a : 0;
        return T(a >> n);
    }
};
struct Bfi {
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t at, uint32_t count) {
        at &= 255, count &= 255;
        if (at >= 32 || count == 0) return b;
        const uint32_t ones = uint32_t(count >= 32 ? ~0u : (1u << count) - 1) << at;
        return (b & ~ones) | (a << at & ones);
    }
};
struct Prmt {  // of the 8 bytes of b and a, four; the fourth bit of a choice repeats the byte's sign
    uint32_t operator()(uint32_t a, uint32_t b, uint32_t choice) {
        const uint64_t both = uint64_t(b) << 32 | a;
        uint32_t d = 0;
        for (int i = 0; i < 4; i++) {
            const uint32_t c = choice >> 4 * i, byte = uint32_t(both >> 8 * (c & 7)) & 255;
            d |= (c & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
        }
        return d;
    }
};
struct Sqrt { template <class T> T operator()(T a) { return canonical(std::sqrt(a)); } };
struct Rcp { template <class T> T operator()(T a) { return canonical(T(1) / a); } };
struct Move { template <class T> T operator()(T a) { return a; } };
template <class D> struct Convert {  // integers, and to wider floats
    template <class T> D operator()(T a) { return D(a); }
};
template <class D> struct ConvertRound {  // to the nearest even, the mode that the processor is in
    template <class T> D operator()(T a) { return canonical(D(a)); }
};
template <class D> struct ConvertTruncate {  // floats to integers: saturating
    template <class T> D operator()(T a) {
        if constexpr (floating<D>) return std::trunc(a);
        else {
            if (a != a) return sizeof(T) == 8 || sizeof(D) == 8 ? D(D(1) << (8 * sizeof(D) - 1)) : D(0);
            if (a <= T(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
            if (a >= T(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
            return D(a);
        }
    }
};
inline uint16_t to_bf16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
struct ToBf16 { uint16_t operator()(float a) { return to_bf16(a); } };
struct ToBf16x2 { uint32_t operator()(float a, float b) { return uint32_t(to_bf16(a)) << 16 | to_bf16(b); } };
struct FromBf16 { float operator()(uint16_t a) { return canonical(__builtin_bit_cast(float, uint32_t(a) << 16)); } };

// Approximations are off by what the manual allows, differently with each seed: part of it for all arguments alike, the
// rest by the argument.
inline uint32_t mix(uint64_t what) {  // splitmix64
    what += (options.seed + 1) * 0x9E3779B97F4A7C15u;
    what = (what ^ what >> 30) * 0xBF58476D1CE4E5B9u;
    what = (what ^ what >> 27) * 0x94D049BB133111EBu;
    return uint32_t((what ^ what >> 31) >> 32);
}
inline float inexact(double exact, double most, uint32_t function, uint64_t argument) {  // most: relative
    const float y = float(exact);
    if (y == 0 || !std::isfinite(y)) return canonical(y);
    const double common = mix(function) / 2147483647.5 - 1;
    const double own = mix(uint64_t(function) << 48 ^ argument) / 2147483647.5 - 1;
    const float off = float(exact * (1 + most * (common + (1 - std::fabs(common)) * own)));
    return std::fabs(off - exact) > most * std::fabs(exact) ? y : off;
}
inline uint32_t bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
constexpr double ULP = 0x1p-23;  // of a number just below the next power of two, half of it
struct Ex2 {  // 2 ulp
    float operator()(float a) {
        return std::fabs(a) < 0x1p-126f ? 1.0f : inexact(std::exp2(double(a)), ULP, 1, bits(a));
    }
};
struct Ex2Ftz { float operator()(float a) { return flush(Ex2()(flush(a))); } };
struct RsqrtApprox {  // 2^-22.9 relative
    float operator()(float a) { return inexact(1 / std::sqrt(double(a)), 0x1.1p-23, 2, bits(a)); }
};
struct DivApprox {  // 2 ulp for divisors from 2^-126 to 2^126; beyond, 0 of a finite a
    float operator()(float a, float b) {
        if (std::fabs(b) > 0x1p126f && std::isfinite(b))
            return std::isfinite(a) ? std::copysign(0.0f, a * (b < 0 ? -1 : 1)) : canonical(NAN);
        return inexact(double(a) / b, ULP, 3, uint64_t(bits(a)) << 32 | bits(b));
    }
};
struct RcpApprox64 {  // of the upper half of the number, in the upper half
    double operator()(double a) {
        const double upper = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, a) >> 32 << 32);
        if (std::fabs(upper) < 0x1p-1022) return std::copysign(INFINITY, a);
        const double y = 1 / upper;
        return std::fabs(y) < 0x1p-1022 ? std::copysign(0.0, a)
                                        : __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, y) >> 32 << 32);
    }
};

template <int HOW, bool UNORDERED> struct Compare {  // 0 eq, 1 ne, 2 lt, 3 le, 4 gt, 5 ge
    template <class T> bool operator()(T a, T b) {
        if (floating<T> && (a != a || b != b)) return UNORDERED;
        return HOW == 0 ? a == b : HOW == 1 ? a != b : HOW == 2 ? a < b : HOW == 3 ? a <= b : HOW == 4 ? a > b : a >= b;
    }
};

inline void predicate_not(Warp& w, const Instr& in, uint32_t lanes) {
    uint32_t& d = w.pred(in.s[0]);
    d = (d & ~lanes) | (~w.pred(in.s[1]) & lanes);
    w.spread(in, lanes);
}
inline void predicate_move(Warp& w, const Instr& in, uint32_t lanes) {
    uint32_t& d = w.pred(in.s[0]);
    d = (d & ~lanes) | (w.pred(in.s[1]) & lanes);
    w.spread(in, lanes);
}
template <class F, int SETTLES> void predicate_logic(Warp& w, const Instr& in, uint32_t lanes) {
    const uint32_t a = w.pred(in.s[1]), b = w.pred(in.s[2]), pa = w.poison[in.s[1].id], pb = w.poison[in.s[2].id];
    const uint32_t settled = SETTLES < 0 ? 0 : (~pa & ~(a ^ -uint32_t(SETTLES))) | (~pb & ~(b ^ -uint32_t(SETTLES)));
    uint32_t& d = w.pred(in.s[0]);
    d = (d & ~lanes) | (F()(a, b) & lanes);
    w.set_poison(in.s[0], (pa | pb) & ~settled, lanes);
}
template <class T> void select(Warp& w, const Instr& in, uint32_t lanes) {
    Cell<T>* d = w.reg<T>(in.s[0]);
    const Cell<T>*a = w.reg<T>(in.s[1]), *b = w.reg<T>(in.s[2]);
    const uint32_t p = w.pred(in.s[3]);
    if (lanes == ~0u) {
#pragma GCC ivdep
        for (int l = 0; l < 32; l++) d[l] = p >> l & 1 ? a[l] : b[l];
    } else {
        EACH_LANE(l) d[l] = p >> l & 1 ? a[l] : b[l];
    }
    w.set_poison(in.s[0], (w.poison[in.s[1].id] & p) | (w.poison[in.s[2].id] & ~p) | w.poison[in.s[3].id], lanes);
}
// mov.b64 d, {a, b} and {a, b}, d; of 32 bits too
template <class WIDE, class HALF> void pack(Warp& w, const Instr& in, uint32_t lanes) {
    EACH_LANE(l) {
        const HALF a = from<HALF>(w.reg<HALF>(in.s[1])[l]), b = from<HALF>(w.reg<HALF>(in.s[2])[l]);
        w.reg<WIDE>(in.s[0])[l] = WIDE(a) | WIDE(b) << 8 * sizeof(HALF);
    }
    w.spread(in, lanes);
}
template <class WIDE, class HALF> void unpack(Warp& w, const Instr& in, uint32_t lanes) {
    EACH_LANE(l) {
        const WIDE x = w.reg<WIDE>(in.s[2])[l];
        w.reg<HALF>(in.s[0])[l] = HALF(x);
        w.reg<HALF>(in.s[1])[l] = HALF(x >> 8 * sizeof(HALF));
    }
    w.spread(in, lanes, 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads and stores

// A loaded value to a register, which may be wider than it.
inline void put(Warp& w, Slot s, int lane, uint64_t x, const Instr& in) {
    if (in.is_signed) x = uint64_t(int64_t(x << (64 - 8 * in.width)) >> (64 - 8 * in.width));
    if (s.bytes == 8) w.reg<uint64_t>(s)[lane] = x;
    else w.reg<uint32_t>(s)[lane] = uint32_t(x);
}

inline void load_param(Warp& w, const Instr& in, uint32_t lanes) {
    const Slot base = in.s[in.count];
    EACH_LANE(l) {
        const uint64_t at = w.reg<uint64_t>(base)[l] + in.offset[0] - PARAM_BASE;
        const auto& params = w.block.grid->params;
        if (at + in.width * in.count > params.size()) w.report("address", l, "outside of the parameters");
        for (int i = 0; i < in.count; i++) {
            uint64_t x = 0;
            memcpy(&x, params.data() + at + i * in.width, in.width);
            put(w, in.s[i], l, x, in);
        }
    }
    for (int i = 0; i < in.count; i++) w.set_poison(in.s[i], 0, lanes);
}

template <bool SHARED, bool STORE> void memory(Warp& w, const Instr& in, uint32_t lanes) {
    const Slot base = in.s[STORE ? 0 : in.count];
    const uint32_t bytes = in.width * in.count;
    uint64_t at[32];
    uint32_t at32[32];
    w.need(lanes, base, "the address");
    EACH_LANE(l) {
        at[l] = (SHARED ? w.reg<uint32_t>(base)[l] : w.reg<uint64_t>(base)[l]) + in.offset[0];
        if (SHARED) at[l] = at32[l] = uint32_t(at[l]);
        if (SHARED) w.shared_range(l, at[l], bytes, bytes);
        else w.global_range(l, at[l], bytes, bytes);
    }
    if (STORE && !SHARED)
        for (int i = 0; i < in.count; i++) w.need(lanes, in.s[i + 1], "the value");
    EACH_LANE(l) {
        unsigned char* p = SHARED ? w.shared_at(at[l]) : reinterpret_cast<unsigned char*>(at[l]);
        unsigned char data[16];
        uint32_t bad = 0;
        for (int i = 0; i < in.count; i++) {
            const Slot s = in.s[STORE ? i + 1 : i];
            if (STORE) {
                if (s.bytes == 8) memcpy(data + i * in.width, w.reg<uint64_t>(s) + l, in.width);
                else memcpy(data + i * in.width, w.reg<uint32_t>(s) + l, in.width);
                bad |= w.poison[s.id] >> l & 1;
            }
        }
        if (options.races) {
            const bool same = STORE && memcmp(p, data, bytes) == 0;
            w.touch(SHARED ? w.block.pages : global_pages, SHARED, at[l], bytes, STORE, w.access(l, in.strong), same);
        }
        if (STORE) {
            memcpy(p, data, bytes);
            if (SHARED) memset(w.block.written.data() + (at[l] - SHARED_BASE), !bad, bytes);
            continue;
        }
        for (int i = 0; i < in.count; i++) {
            uint64_t x = 0;
            memcpy(&x, p + i * in.width, in.width);
            put(w, in.s[i], l, x, in);
            w.set_poison(in.s[i], SHARED && !w.shared_written(at[l] + i * in.width, in.width) ? ~0u : 0, 1u << l);
        }
    }
    if (options.counts) {
        if (SHARED) w.count_shared(at32, lanes, bytes);
        else w.count_global(at, lanes, bytes, STORE);
    }
}

// flags between blocks
inline void store_release(Warp& w, const Instr& in, uint32_t lanes) {
    memory<false, true>(w, in, lanes);
    EACH_LANE(l) {
        auto seen = std::make_shared<Clock>();
        w.release(1u << l, *seen);
        flags[w.reg<uint64_t>(in.s[0])[l] + in.offset[0]] = {seen, w.block.id};
    }
    w.block.grid->events++;
}
inline void load_acquire(Warp& w, const Instr& in, uint32_t lanes) {
    memory<false, false>(w, in, lanes);
    w.looks();
    EACH_LANE(l) {
        auto flag = flags.find(w.reg<uint64_t>(in.s[1])[l] + in.offset[0]);
        if (flag == flags.end()) continue;
        const Flag& f = flag->second;
        w.acquire(1u << l, [&](Clock& clock) {
            if (f.block == w.block.id) clock.merge(*f.seen);
            else {
                for (auto& other : f.seen->others)
                    if (other.first != w.block.id) clock.learn(other.first, other.second);
                clock.learn(f.block, {f.seen, nullptr});
            }
        });
    }
}
inline void atomic_inc(Warp& w, const Instr& in, uint32_t lanes) {
    w.need(lanes, in.s[1], "the address");
    w.need(lanes, in.s[2], "the value");
    EACH_LANE(l) {
        const uint64_t at = w.reg<uint64_t>(in.s[1])[l] + in.offset[0];
        w.global_range(l, at, 4, 4);
        if (options.races) w.touch(global_pages, false, at, 4, true, w.access(l, true));
        uint32_t& x = *reinterpret_cast<uint32_t*>(at);
        const uint32_t old = x, most = w.reg<uint32_t>(in.s[2])[l];
        x = old >= most ? 0 : old + 1;
        w.reg<uint32_t>(in.s[0])[l] = old;
    }
    w.set_poison(in.s[0], 0, lanes);
    w.block.grid->events++;
}
inline void nothing(Warp&, const Instr&, uint32_t) {}
inline void leave(Warp&, const Instr&, uint32_t) {}  // the turn does it
inline void sleep(Warp& w, const Instr&, uint32_t) { w.yields = true; }

// ---------------------------------------------------------------------------------------------------------------------
// A warp's lanes among themselves

template <int HOW> void shuffle(Warp& w, const Instr& in, uint32_t lanes) {  // 0 idx, 1 bfly, 2 up, 3 down
    const int first = in.pair ? 2 : 1;
    uint32_t value[32], ok = 0, bad = 0;
    for (int i = 1; i < 4; i++) w.need(lanes, in.s[first + i], "the lane");
    EACH_LANE(l) {
        const uint32_t b = w.reg<uint32_t>(in.s[first + 1])[l] & 31, c = w.reg<uint32_t>(in.s[first + 2])[l];
        const int segment = c >> 8 & 31, most = (l & segment) | (int(c & 31) & ~segment);
        int j = HOW == 0   ? (l & segment) | (int(b) & ~segment)
                : HOW == 1 ? l ^ int(b)
                : HOW == 2 ? l - int(b)
                           : l + int(b);
        const bool in_range = HOW == 2 ? j >= most : j <= most;
        if (!in_range) j = l;
        ok |= uint32_t(in_range) << l;
        const bool there = lanes >> j & 1;
        value[l] = w.reg<uint32_t>(in.s[first])[j];
        bad |= uint32_t(!there || (w.poison[in.s[first].id] >> j & 1)) << l;
    }
    EACH_LANE(l) w.reg<uint32_t>(in.s[0])[l] = value[l];
    w.set_poison(in.s[0], bad, lanes);
    if (in.pair) {
        uint32_t& p = w.pred(in.s[1]);
        p = (p & ~lanes) | (ok & lanes);
        w.set_poison(in.s[1], 0, lanes);
    }
}
template <int HOW> void vote(Warp& w, const Instr& in, uint32_t lanes) {  // 0 any, 1 all
    const uint32_t p = w.pred(in.s[1]) & lanes;
    uint32_t& d = w.pred(in.s[0]);
    d = (d & ~lanes) | ((HOW == 0 ? p != 0 : p == lanes) ? lanes : 0);
    const uint32_t bad = w.poison[in.s[1].id] & lanes;
    w.set_poison(in.s[0], bad ? ~0u : 0, lanes);
}
inline void warp_sync(Warp& w, const Instr&, uint32_t lanes) {
    if (lanes == w.live) return w.meet();
    Clock all;
    w.release(lanes, all);
    w.acquire(lanes, [&](Clock& clock) { clock.merge(all); });
}

}  // namespace ptx
