// What instructions compute: expected bits are from the PTX ISA manual 9.0 (its sections are named) or from plain
// loops. The checks' tests are in test_checks.cpp, those of asynchronous instructions in test_async.cpp.
#include "test.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

using std::vector;

typedef uint64_t u64;

static u64 bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static u64 bits(double x) {
    u64 u;
    memcpy(&u, &x, 8);
    return u;
}
static float as_float(u64 u) {
    uint32_t low = (uint32_t)u;
    float x;
    memcpy(&x, &low, 4);
    return x;
}
static double as_double(u64 u) {
    double x;
    memcpy(&x, &u, 8);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// One instruction over rows of operands, a thread each. Text has $R for the result and $A, $B, $C for operands; types
// are the registers': h 16 bits, r 32, d 64, f float, D double, the result's first.

struct Row {
    u64 want, a, b = 0, c = 0;
};

static std::string reg(char type, int i) {
    const char* name = type == 'h' ? "%rs" : type == 'r' ? "%r" : type == 'd' ? "%rd" : type == 'f' ? "%f" : "%fd";
    return name + std::to_string(i);
}
static const char* suffix(char type) {
    return type == 'h' ? "u16" : type == 'r' ? "u32" : type == 'd' ? "u64" : type == 'f' ? "f32" : "f64";
}

// The results, or nothing if it did not run.
static vector<u64> evaluate(const std::string& text, const char* types, const vector<Row>& rows, int seed = 1) {
    Text k = {".u64, .u64",
              "\tmul.wide.u32 \t%rd30, %tx, 8;\n\tadd.s64 \t%rd31, %a0, %rd30;\n"
              "\tmul.wide.u32 \t%rd30, %tx, 24;\n\tadd.s64 \t%rd32, %a1, %rd30;\n"};
    for (size_t i = 1; i < strlen(types); i++)
        k.body +=
            format("\tld.global.%s \t%s, [%%rd32+%d];\n", suffix(types[i]), reg(types[i], i).c_str(), (int)i * 8 - 8);
    for (char c : "\t" + text) {
        size_t i = k.body.empty() || k.body.back() != '$' ? 4 : std::string("RABC").find(c);
        if (i < 4) k.body.pop_back();
        k.body += i < 4 ? reg(types[i], i) : std::string(1, c);
    }
    k.body += format("\n\tst.global.%s \t[%%rd31], %s;\n", suffix(types[0]), reg(types[0], 0).c_str());
    Buffer<u64> out(rows.size()), in(rows.size() * 3);
    for (size_t i = 0; i < rows.size(); i++)
        in[3 * i] = rows[i].a, in[3 * i + 1] = rows[i].b, in[3 * i + 2] = rows[i].c;
    ptx::Launch launch;
    launch.block.x = rows.size();
    launch.args = {out, in};
    if (!runs(module(k), launch, seed)) return {};
    return vector<u64>(out.at, out.at + rows.size());
}

static void table(const std::string& text, const char* types, const vector<Row>& rows) {
    vector<u64> got = evaluate(text, types, rows);
    for (size_t i = 0; i < got.size(); i++) {
        bool same = got[i] == rows[i].want;
        if (types[0] == 'D' && std::isnan(as_double(rows[i].want))) same = std::isnan(as_double(got[i]));
        if (!same)
            fail(format("%s of %llx %llx %llx: %llx, not %llx", text.c_str(), (long long)rows[i].a,
                        (long long)rows[i].b, (long long)rows[i].c, (long long)got[i], (long long)rows[i].want));
    }
}

// 9.7.1 Integer arithmetic
TEST(integers) {
    table("add.s32 $R, $A, $B;", "rrr",
          {{0x80000000, 0x7fffffff, 1}, {0, 0xffffffff, 1}, {0xfffffffe, 0xffffffff, 0xffffffff}});
    table("add.s32 $R, $A, -7;", "rr", {{0xfffffff9, 0}, {0x7ffffff9, 0x80000000}});
    table("sub.s32 $R, $A, $B;", "rrr", {{0x7fffffff, 0x80000000, 1}, {0xffffffff, 0, 1}, {5, 12, 7}});
    table("add.s64 $R, $A, $B;", "ddd", {{0, ~0ull, 1}, {0x100000000, 0xffffffff, 1}});
    table("sub.s64 $R, $A, $B;", "ddd", {{~0ull, 0, 1}, {0xffffffff, 0x100000000, 1}});
    table("sub.s16 $R, $A, $B;", "hhh", {{0xffff, 0, 1}, {0x7fff, 0x8000, 1}, {3, 10, 7}});
    // mul: .lo and .hi keep a half of the product, .wide all of it
    table(
        "mul.lo.s32 $R, $A, $B;", "rrr",
        {{0xfffffffe, 0xffffffff, 2}, {0, 0x10000, 0x10000}, {1, 0xffffffff, 0xffffffff}, {0x80000000, 0x80000000, 3}});
    table("mul.hi.s32 $R, $A, $B;", "rrr",
          {{0xffffffff, 0xffffffff, 1}, {0x40000000, 0x80000000, 0x80000000}, {0, 0x7fffffff, 2},
           {0xffffffff, 0x80000000, 1}, {0, 0xffffffff, 0xffffffff}, {0x3fffffff, 0x7fffffff, 0x7fffffff}});
    table("mul.wide.s32 $R, $A, $B;", "drr",
          {{0xfffffffffffffffe, 0xffffffff, 2}, {0x4000000000000000, 0x80000000, 0x80000000},
           {0xffffffff80000000, 0x80000000, 1}});
    table("mul.wide.u32 $R, $A, $B;", "drr",
          {{0x1fffffffe, 0xffffffff, 2}, {0xfffffffe00000001, 0xffffffff, 0xffffffff}});
    table("mul.wide.u16 $R, $A, $B;", "rhh", {{0xfffe0001, 0xffff, 0xffff}, {0x10000, 0x8000, 2}});
    table("mul.lo.s16 $R, $A, $B;", "hhh", {{0xfffe, 0xffff, 2}, {0, 0x100, 0x100}, {0x8000, 0x8000, 3}});
    table("mul.lo.s64 $R, $A, $B;", "ddd",
          {{~1ull, ~0ull, 2}, {0, 1ull << 32, 1ull << 32}, {0xfffffffe00000001, 0xffffffff, 0xffffffff}});
    table("mad.lo.s32 $R, $A, $B, $C;", "rrrr",
          {{0xfffffffb, 0xfffffffe, 3, 1}, {0xffffffff, 0x10000, 0x10000, 0xffffffff}});
    // div and rem by zero are unspecified; a negative remainder's sign depends on how div rounds
    table("div.u32 $R, $A, $B;", "rrr", {{0x7fffffff, 0xffffffff, 2}, {1, 0xffffffff, 0xfffffffe}, {0, 3, 5}});
    table("div.s32 $R, $A, $B;", "rrr",
          {{0xfffffffd, 0xfffffff9, 2}, {0xfffffffd, 7, 0xfffffffe}, {3, 0xfffffff9, 0xfffffffe},
           {0x80000000, 0x80000000, 1}});
    table("div.u64 $R, $A, $B;", "ddd", {{0x7fffffffffffffff, ~0ull, 2}, {0x100000000, 1ull << 63, 1ull << 31}});
    table("rem.u32 $R, $A, $B;", "rrr", {{1, 0xffffffff, 2}, {5, 0xffffffff, 10}, {3, 3, 5}});
    table("rem.u64 $R, $A, $B;", "ddd", {{15, ~0ull, 16}, {5, ~0ull, 10}});
    table("rem.s32 $R, $A, $B;", "rrr", {{1, 7, 2}, {3, 3, 5}, {0, 0x7fffffff, 0x7fffffff}});
    table("div.s32 %r10, $A, $B;\n\trem.s32 %r11, $A, $B;\n\tmad.lo.s32 $R, %r10, $B, %r11;", "rrr",
          {{0xfffffff9, 0xfffffff9, 2}, {7, 7, 0xfffffffe}, {0x80000001, 0x80000001, 1000}});
    table("min.s32 $R, $A, $B;", "rrr", {{0xffffffff, 0xffffffff, 1}, {0x80000000, 0x7fffffff, 0x80000000}});
    table("max.s32 $R, $A, $B;", "rrr", {{1, 0xffffffff, 1}, {0x7fffffff, 0x7fffffff, 0x80000000}});
    table("min.u64 $R, $A, $B;", "ddd", {{1, ~0ull, 1}, {0x7fffffffffffffff, 0x7fffffffffffffff, 1ull << 63}});
}

// 9.7.8 Logic and shift, 9.7.1 bfi, 9.7.9 prmt
TEST(logic) {
    table("and.b32 $R, $A, $B;", "rrr", {{0x0c, 0x3c, 0x0f}});
    table("or.b32 $R, $A, $B;", "rrr", {{0x3f, 0x3c, 0x0f}});
    table("xor.b32 $R, $A, $B;", "rrr", {{0x33, 0x3c, 0x0f}, {0xfffffffe, 0xffffffff, 1}});
    table("xor.b32 $R, $A, -2147483648;", "rr", {{0x80000000, 0}, {1, 0x80000001}});
    table("not.b32 $R, $A;", "rr", {{0xffffffff, 0}, {0x0f0f0f0f, 0xf0f0f0f0}});
    table("and.b64 $R, $A, $B;", "ddd", {{0xff00000000, 0xffffffffff, 0xff0000000000ull | 0xff00000000}});
    table("and.b64 $R, $A, -16;", "dd", {{~15ull, ~0ull}, {16, 31}});
    table("or.b64 $R, $A, $B;", "ddd", {{0x8000000000000001, 1, 1ull << 63}});
    table("xor.b64 $R, $A, $B;", "ddd", {{~1ull, ~0ull, 1}});
    table("and.b16 $R, $A, $B;", "hhh", {{0x0c, 0x3c, 0x0f}, {0x8000, 0xffff, 0x8000}});
    table("or.b16 $R, $A, $B;", "hhh", {{0x3f, 0x3c, 0x0f}});
    // shift amounts are unsigned; those beyond the width are clamped to it: 0, or the sign
    table("shl.b32 $R, $A, $B;", "rrr",
          {{0x80000000, 1, 31}, {0, 1, 32}, {0, 1, 33}, {0, 0xffffffff, 0xffffffff}, {0xf0, 0xf, 4}, {0, 3, 256}});
    table("shr.u32 $R, $A, $B;", "rrr",
          {{1, 0x80000000, 31}, {0, 0x80000000, 32}, {0, 0xffffffff, 0xffffffff}, {0, 7, 64}});
    table("shr.s32 $R, $A, $B;", "rrr",
          {{0xffffffff, 0x80000000, 31}, {0xffffffff, 0x80000000, 32}, {0, 0x7fffffff, 32},
           {0xffffffff, 0xfffffff0, 0xffffffff}, {0xf8000000, 0x80000000, 4}, {0xffffffff, 0x80000000, 288}});
    table("shl.b64 $R, $A, $B;", "ddr",
          {{1ull << 63, 1, 63}, {0, 1, 64}, {0, ~0ull, 0xffffffff}, {0x100000000, 1, 32}});
    table("shr.u64 $R, $A, $B;", "ddr",
          {{1, 1ull << 63, 63}, {0, ~0ull, 64}, {0, ~0ull, 96}, {0x7fffffff, ~0ull >> 1, 32}});
    table("shl.b16 $R, $A, $B;", "hhr", {{0x8000, 1, 15}, {0, 1, 16}, {0, 0xffff, 32}, {0xff00, 0xffff, 8}});
    // bfi f, a, b, position, length: what goes beyond the most significant bit is dropped
    table("bfi.b32 $R, $A, $B, 3, 29;", "rrr", {{0xfffffff8, 0xffffffff, 0}, {0x0000000f, 1, 7}, {7, 0xe0000000, 7}});
    table("bfi.b32 $R, $A, $B, 9, 2;", "rrr", {{0x600, 0xffffffff, 0}, {0xfffff9ff, 0, 0xffffffff}, {0x400, 6, 0x200}});
    table("bfi.b32 $R, $A, $B, 8, 0;", "rrr", {{0x1234, 0xffffffff, 0x1234}});
    table("bfi.b32 $R, $A, $B, 32, 4;", "rrr", {{0x1234, 0xffffffff, 0x1234}});
    table("bfi.b32 $R, $A, $B, 28, 8;", "rrr", {{0xf0001234, 0xff, 0x1234}});
    // prmt: a nibble a byte from the lowest, 0..3 of a and 4..7 of b; with 8 the byte's sign
    table("prmt.b32 $R, $A, $B, 8452;", "rrr", {{0x33221155, 0x44332211, 0x88776655}});
    table("prmt.b32 $R, $A, $B, $C;", "rrrr",
          {{0x44332211, 0x44332211, 0x88776655, 0x3210}, {0x88776655, 0x44332211, 0x88776655, 0x7654},
           {0x00ff00ff, 0x80018001, 0, 0xba98 ^ 0x1111}, {0x88112211, 0x44332211, 0x88776655, 0x7010}});
}

// 9.7.9 cvt: truncation and extension by the source's type; to floating point by .rn; floats to integers saturate
TEST(conversions) {
    table("cvt.s64.s32 $R, $A;", "dr",
          {{~0ull, 0xffffffff}, {0xffffffff80000000, 0x80000000}, {0x7fffffff, 0x7fffffff}});
    table("cvt.u64.u32 $R, $A;", "dr", {{0xffffffff, 0xffffffff}, {0x80000000, 0x80000000}});
    table("cvt.u32.u64 $R, $A;", "rd", {{0x89abcdef, 0x0123456789abcdef}});
    table("cvt.u16.u32 $R, $A;", "hr", {{0xcdef, 0x89abcdef}});
    table("cvt.u64.u16 $R, $A;", "dh", {{0xffff, 0xffff}});
    table("cvt.u32.u16 $R, $A;", "rh", {{0xffff, 0xffff}, {0x8000, 0x8000}});
    table("cvt.rn.f64.s16 $R, $A;", "Dh", {{bits(-1.0), 0xffff}, {bits(-32768.0), 0x8000}, {bits(7.0), 7}});
    table("cvt.rn.f64.s64 $R, $A;", "Dd",
          {{0x43e0000000000000, 0x7fffffffffffffff}, {0xc3e0000000000000, 1ull << 63},
           {0x4340000000000000, (1ull << 53) + 1}, {0x4340000000000002, (1ull << 53) + 3}, {bits(-5.0), (u64)-5}});
    table("cvt.rn.f32.s32 $R, $A;", "fr",
          {{0x4b800000, 16777217}, {0x4b800002, 16777219}, {0xbf800000, 0xffffffff}, {0xcf000000, 0x80000000},
           {0x4f000000, 0x7fffffff}, {0, 0}});
    table("cvt.rn.f32.u32 $R, $A;", "fr",
          {{0x4f800000, 0xffffffff}, {0x4f000000, 0x80000000}, {0x4f7fffff, 0xffffff00}});
    // a tie in f32's last bit goes to even; the largest half ulp beyond the largest float is infinite; subnormals stay
    table("cvt.rn.f32.f64 $R, $A;", "fD",
          {{0x3f800000, 0x3ff0000010000000}, {0x3f800001, 0x3ff0000010000001}, {0x3f800002, 0x3ff0000030000000},
           {0x7f800000, 0x47effffff0000000}, {0x7f7fffff, 0x47efffffefffffff}, {0x80000000, 1ull << 63},
           {0, 0x3690000000000000}, {1, 0x3690000000000001}, {2, bits(0x1.8p-149)}});
    table(
        "cvt.f64.f32 $R, $A;", "Df",
        {{0x36a0000000000000, 1}, {0x7ff0000000000000, 0x7f800000}, {1ull << 63, 0x80000000}, {bits(1.5), bits(1.5f)}});
    table("cvt.rzi.f64.f64 $R, $A;", "DD",
          {{bits(2.0), bits(2.7)}, {bits(-2.0), bits(-2.7)}, {1ull << 63, bits(-0.5)}, {0, bits(0.5)},
           {bits(0x1p60), bits(0x1p60)}, {bits(-INFINITY * 1.0), bits(-INFINITY * 1.0)}});
    table("cvt.rzi.s32.f64 $R, $A;", "rD",
          {{2, bits(2.9)}, {0xfffffffe, bits(-2.9)}, {0x7fffffff, bits(1e10)}, {0x80000000, bits(-1e10)},
           {0x7fffffff, 0x7ff0000000000000}, {0, bits(-0.9)}});
    // ties to even; the largest floats overflow; NaN becomes 0x7fff
    const vector<Row> bf16 = {{0x3f80, 0x3f800000}, {0x3f80, 0x3f808000}, {0x3f82, 0x3f818000}, {0x3f81, 0x3f808001},
                              {0x3f80, 0x3f807fff}, {0x7f80, 0x7f7fffff}, {0x7f7f, 0x7f7f7fff}, {0x7f80, 0x7f7f8000},
                              {0xff80, 0xff800000}, {0x7fff, 0x7fc00000}, {0x7fff, 0xffc12345}, {0x7fff, 0x7f800001},
                              {0x8000, 0x80000000}, {0, 0x8000},          {2, 0x18000},         {1, 0x8001},
                              {0xbf80, 0xbf800000}};
    table("{  cvt.rn.bf16.f32 $R, $A;}", "hf", bf16);
    vector<Row> pairs;  // the first operand goes to the upper half
    for (const Row& a : bf16)
        for (const Row& b : {bf16[1], bf16[6], bf16[10]}) pairs.push_back({a.want << 16 | b.want, a.a, b.a});
    table("{ cvt.rn.bf16x2.f32 $R, $A, $B;}", "rff", pairs);
    table("{ cvt.f32.bf16 $R, $A;}", "fh",
          {{0x3f800000, 0x3f80}, {0x80000000, 0x8000}, {0x10000, 1}, {0xff800000, 0xff80}, {0x7f7f0000, 0x7f7f}});
    table("{ mov.b32 $R, {0,$A};}", "fh",
          {{0x3f800000, 0x3f80}, {0x80010000, 0x8001}});  // 9.7.9 mov: the first is lowest
    table(
        "mov.b32 {%rs10, %rs11}, $A;\n\tmul.wide.u16 %r10, %rs11, 2;\n\tcvt.u32.u16 %r11, %rs10;\n\tsub.s32 $R, %r10, "
        "%r11;",
        "rr", {{2 * 0x8123 - 0x4567, 0x81234567}});
    table("mov.b64 {%r10,%r11}, $A;\n\tmov.b64 $R, {%r11,%r10};", "dD", {{0x89abcdef01234567, 0x0123456789abcdef}});
    table("{\n\t.reg .b32 %temp;\n\tmov.b64 {%temp, $R}, $A;\n\t}", "rD", {{0x01234567, 0x0123456789abcdef}});
    table("{\n\t.reg .b32 %temp;\n\tmov.b64 {$R, %temp}, $A;\n\t}", "rD", {{0x89abcdef, 0x0123456789abcdef}});
    table("mov.b32 $R, $A;", "rf", {{0x7f812345, 0x7f812345}});
    table("mov.b32 $R, $A;", "fr", {{0xff812345, 0xff812345}});
    table("mov.b64 $R, $A;", "dD", {{0x7ff0000000000001, 0x7ff0000000000001}});
}

// 9.7.9 cvt, of NaN to integers: zero if the source is not .f64 and the destination not of 64 bits, else 1 << (width -
// 1)
TEST(conversion_of_nan) {
    table("cvt.rzi.s32.f64 $R, $A;", "rD", {{0x80000000, 0x7ff8000000000000}, {0x80000000, 0xfff8000000000001}});
}

// 9.7.3 Floating point: rounded to nearest even, subnormals kept without .ftz, single precision gives the canonical NaN
// 0x7fffffff
TEST(floats) {
    const u64 nan = 0x7fffffff, inf = 0x7f800000, one = 0x3f800000, minus = 0x80000000;
    table("add.f32 $R, $A, $B;", "fff",
          {{one, one, 0x33800000}, {0x3f800001, one, 0x33800001}, {0x3f800002, 0x3f800001, 0x33800000},
           {nan, inf, inf | minus}, {nan, 0x7fc00001, one}, {nan, one, 0xffc00000}, {2, 1, 1},
           {inf, 0x7f7fffff, 0x7f7fffff}, {minus, minus, minus}, {0, one, one | minus},
           {0x007fffff, 0x00800000, 0x80000001}});
    table("sub.f32 $R, $A, $B;", "fff",
          {{nan, inf, inf}, {0, one, one}, {0x33800000, one, 0x3f7fffff}, {0x80000001, 1, 2}, {minus, minus, 0}});
    table("mul.f32 $R, $A, $B;", "fff",
          {{0x00400000, 0x00800000, 0x3f000000}, {nan, 0, inf}, {minus, minus, one},
           {inf | minus, 0x7f000000, 0xff000000}, {0, 1, 0x3f000000}, {2, 3, 0x3f000000}, {1, 1, 0x3f000001},
           {0x40c00000, 0x40000000, 0x40400000}});
    // fma rounds once: (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24
    table("fma.rn.f32 $R, $A, $B, $C;", "ffff",
          {{0x33800000, 0x3f800800, 0x3f800800, 0xbf801000}, {0x40e00000, 0x40000000, 0x40400000, one},
           {nan, inf, 0, one}, {nan, inf, one, inf | minus}, {nan, one, one, 0x7fc00123}, {0, one, one, one | minus},
           {minus, minus, one, minus}, {1, 1, one, 0}, {0x00800000, 0x00400000, 0x40000000, 0}});
    // max, min: of one NaN the other operand, of two the canonical one; +0 is more than -0
    table("max.f32 $R, $A, $B;", "fff",
          {{one, 0x7fc00000, one}, {one | minus, one | minus, 0xffffffff}, {nan, 0x7fc00001, 0xffc00002}, {0, minus, 0},
           {0, 0, minus}, {2, 1, 2}, {inf, inf, one}, {0x80000001, 0x80000001, 0x80000002}});
    table("min.f32 $R, $A, $B;", "fff",
          {{one, 0x7fc00000, one}, {one, one, 0x7f800001}, {nan, 0x7fffffff, 0x7fffffff}, {minus, 0, minus},
           {minus, minus, 0}, {1, 1, 2}, {inf | minus, one, inf | minus}});
    table("abs.f32 $R, $A;", "ff", {{0, minus}, {inf, inf | minus}, {1, 0x80000001}, {one, one}});
    table("neg.f32 $R, $A;", "ff", {{0, minus}, {minus, 0}, {inf, inf | minus}, {0x80000001, 1}});
    table("copysign.f32 $R, $A, $B;", "fff",
          {{0xc0000000, one | minus, 0x40000000}, {0x40000000, one, 0xc0000000}, {minus, minus, 0},
           {inf, 0, inf | minus}});
    table("div.rn.f32 $R, $A, $B;", "fff",
          {{0x3eaaaaab, one, 0x40400000}, {nan, 0, 0}, {inf, one, 0}, {inf | minus, one, minus},
           {0x00400000, 0x00800000, 0x40000000}, {0, one, inf}, {nan, inf, inf}, {one, 3, 3},
           {0x00400000, 0x3f800000, 0x7f000000}});
    table("rcp.rn.f32 $R, $A;", "ff",
          {{0x3eaaaaab, 0x40400000}, {inf, 0}, {inf | minus, minus}, {0, inf}, {minus, inf | minus},
           {0x00400000, 0x7f000000}, {nan, 0x7fc00000}, {inf, 1}});
    table("sqrt.rn.f32 $R, $A;", "ff",
          {{0x3fb504f3, 0x40000000}, {nan, one | minus}, {minus, minus}, {0, 0}, {inf, inf}, {nan, inf | minus},
           {nan, 0x80000001}, {0x1a3504f3, 1}});
    Uniform random = {7};
    for (const char* op :
         {"add.f32 $R, $A, $B;", "sub.f32 $R, $A, $B;", "mul.f32 $R, $A, $B;", "fma.rn.f32 $R, $A, $B, $C;",
          "div.rn.f32 $R, $A, $B;", "rcp.rn.f32 $R, $A;", "sqrt.rn.f32 $R, $A;"}) {
        vector<Row> rows;
        for (int i = 0; i < 512; i++) {
            u64 a = random() >> 32, b = random() >> 32, c = random() >> 32;
            if (i % 2) b = (a + (random() >> 62) * 0x00800000 + (random() >> 62)) & 0xffffffff;
            if (i % 3 == 0)
                a = (a & 0x80ffffff) | 0x3f000000, b = (b & 0x80ffffff) | 0x3f000000, c = (c & 0x80ffffff) | 0x3f000000;
            volatile float x = as_float(a), y = as_float(b), z = as_float(c), r = 0;
            r = op[0] == 'a'   ? x + y
                : op[0] == 'm' ? x * y
                : op[0] == 'f' ? std::fma(x, y, z)
                : op[0] == 'd' ? x / y
                : op[0] == 'r' ? 1 / x
                : op[1] == 'u' ? x - y
                               : std::sqrt(x);
            rows.push_back({std::isnan(r) ? nan : bits(r), a, b, c});
        }
        table(op, op[0] == 'f' ? "ffff" : op[0] == 'r' || op[1] == 'q' ? "ff" : "fff", rows);
    }
}

TEST(doubles) {
    const u64 nan = 0x7ff8000000000000, inf = 0x7ff0000000000000, one = 0x3ff0000000000000, minus = 1ull << 63;
    table("add.f64 $R, $A, $B;", "DDD",
          {{one, one, 0x3ca0000000000000}, {one + 1, one, 0x3ca0000000000001}, {nan, inf, inf | minus}, {2, 1, 1}});
    table("add.rn.f64 $R, $A, $B;", "DDD",
          {{one, one, 0x3ca0000000000000}, {0x4008000000000000, one, 0x4000000000000000}});
    table("sub.f64 $R, $A, $B;", "DDD", {{0, one, one}, {minus, minus, 0}, {bits(-1.0), one, 0x4000000000000000}});
    table("mul.f64 $R, $A, $B;", "DDD",
          {{nan, 0, inf}, {bits(6.0), bits(2.0), bits(3.0)}, {0x0008000000000000, 0x0010000000000000, bits(0.5)}});
    table("mul.rn.f64 $R, $A, $B;", "DDD", {{bits(6.0), bits(2.0), bits(3.0)}, {bits(-0.0), bits(-0.0), one}});
    // (1 + 2^-30)^2 - (1 + 2^-29) is 2^-60
    table("fma.rn.f64 $R, $A, $B, $C;", "DDDD",
          {{bits(0x1p-60), bits(1 + 0x1p-30), bits(1 + 0x1p-30), bits(-1 - 0x1p-29)}, {nan, inf, 0, one}});
    table("neg.f64 $R, $A;", "DD", {{minus, 0}, {bits(-1.5), bits(1.5)}});
    table("abs.f64 $R, $A;", "DD", {{0, minus}, {bits(1.5), bits(-1.5)}, {inf, inf | minus}});
    table("sqrt.rn.f64 $R, $A;", "DD",
          {{0x3ff6a09e667f3bcd, bits(2.0)}, {minus, minus}, {nan, bits(-1.0)}, {inf, inf}});
    Uniform random = {11};
    for (const char* op :
         {"add.f64 $R, $A, $B;", "mul.f64 $R, $A, $B;", "fma.rn.f64 $R, $A, $B, $C;", "sqrt.rn.f64 $R, $A;"}) {
        vector<Row> rows;
        for (int i = 0; i < 256; i++) {
            u64 a = random(), b = random(), c = random(), near = 0x3fe0000000000000, kept = 0x801fffffffffffff;
            if (i % 2) a = (a & kept) | near, b = (b & kept) | near, c = (c & kept) | near;
            volatile double x = as_double(a), y = as_double(b), z = as_double(c), r = 0;
            r = op[0] == 'a' ? x + y : op[0] == 'm' ? x * y : op[0] == 'f' ? std::fma(x, y, z) : std::sqrt(x);
            rows.push_back({std::isnan(r) ? nan : bits(r), a, b, c});
        }
        table(op, op[0] == 'f' ? "DDDD" : op[0] == 's' ? "DD" : "DDD", rows);
    }
}

TEST(ex2_of_subnormals) {  // +1.0 by the table of ex2
    for (const char* op : {"ex2.approx.f32 $R, $A;", "ex2.approx.ftz.f32 $R, $A;"})
        table(op, "ff",
              {{0x3f800000, 0x80000001}, {0x3f800000, 1}, {0x3f800000, 0x007fffff}, {0x3f800000, 0x807fffff}});
}

// 9.7.3, approximate functions: special values as the manual's tables have them, others within its errors, with several
// seeds. div: 2 ulp for 2^-126 <= |b| <= 2^126, beyond it 0, or NaN of infinity. rsqrt: relative 2^-22.4. ex2: relative
// 2^-22, which every edition's bound is within. rcp.approx.ftz.f64 takes the upper 32 bits and gives as many, so 20
// bits of mantissa.
static void within(const char* op, const char* types, const vector<Row>& rows, double relative) {
    for (int seed = 1; seed < 4; seed++) {
        vector<u64> got = evaluate(op, types, rows, seed);  // want: the exact result as a double
        for (size_t i = 0; i < got.size(); i++) {
            double exact = as_double(rows[i].want), x = types[0] == 'f' ? as_float(got[i]) : as_double(got[i]);
            if (!(std::fabs(x - exact) <= relative * std::fabs(exact)))
                fail(format("%s of %llx %llx: %.17g, not %.17g", op, (long long)rows[i].a, (long long)rows[i].b, x,
                            exact));
        }
    }
}

TEST(approximate) {
    const u64 nan = 0x7fffffff, inf = 0x7f800000, one = 0x3f800000, minus = 0x80000000;
    for (const char* op : {"ex2.approx.f32 $R, $A;", "ex2.approx.ftz.f32 $R, $A;"})
        table(op, "ff",
              {{0, inf | minus}, {one, minus}, {one, 0}, {inf, inf}, {nan, 0x7fc00000},
               {inf, 0x43000000}, {0, 0xc3960000}});
    table("ex2.approx.ftz.f32 $R, $A;", "ff", {{0, 0xc3020000}, {0, 0xc3110000}});  // 2^-130 and 2^-145 are subnormal
    table("rsqrt.approx.f32 $R, $A;", "ff",
          {{nan, inf | minus}, {nan, one | minus}, {inf | minus, minus}, {inf, 0}, {0, inf}, {nan, 0x7fc00000}});
    table("div.approx.f32 $R, $A, $B;", "fff",
          {{0, one, 0x7f000000}, {nan, inf, 0x7f000000}, {0, 0, one}, {inf, inf, one}, {nan, 0x7fc00000, one}});
    table("rcp.approx.ftz.f64 $R, $A;", "DD",
          {{1ull << 63, 0xfff0000000000000}, {0xfff0000000000000, 0x8000000000000001}, {0xfff0000000000000, 1ull << 63},
           {0x7ff0000000000000, 0}, {0x7ff0000000000000, 1}, {0, 0x7ff0000000000000},
           {0x7ff8000000000000, 0x7ff8000000000000}});
    Uniform random = {3};
    vector<Row> exponents, roots, quotients, reciprocals, cut;
    for (int i = 0; i < 1000; i++) {
        float x = (float)((double)(random() >> 11) * 0x1p-53 * 250 - 125);
        if (i < 8) x = (float)i - 4;
        if (i >= 8 && i < 40) x = as_float(0x3f800000 + i - 24);
        exponents.push_back({bits(std::exp2((double)x)), bits(x)});
        u64 r = random() % 0x7f7fffff + 1;
        roots.push_back({bits(1 / std::sqrt((double)as_float(r))), r});
        u64 a = (random() & 0x80ffffff) | 0x3f000000, b = (random() & 0x80ffffff) | 0x3f000000;
        if (i % 2)
            b = 0x00800000 + random() % 0x7e000000, a = (a & 0x80ffffff) | (b & 0x7f000000);  // the quotient is near 1
        quotients.push_back({bits((double)as_float(a) / (double)as_float(b)), a, b});
        u64 y = (random() & 0x800fffffffffffff) | ((random() % 1800 + 100) << 52);
        reciprocals.push_back({bits(1 / as_double(y)), y});
        cut.push_back({0, y});
    }
    roots[0] = {bits(1 / std::sqrt(0x1p-149)), 1};
    within("ex2.approx.f32 $R, $A;", "ff", exponents, 0x1p-22);
    within("ex2.approx.ftz.f32 $R, $A;", "ff", exponents, 0x1p-22);
    within("ex2.approx.f32 $R, $A;", "ff", {{bits(0x1p-130), 0xc3020000}, {bits(0x1p-140), 0xc30c0000}}, 0x1p-8);
    within("rsqrt.approx.f32 $R, $A;", "ff", roots, 0x1.83p-23);
    within("div.approx.f32 $R, $A, $B;", "fff", quotients, 0x1p-22);
    within("rcp.approx.ftz.f64 $R, $A;", "DD", reciprocals, 0x1p-18);
    table("rcp.approx.ftz.f64 %fd10, $A;\n\tmov.b64 {$R, %r10}, %fd10;", "rD", cut);  // the lower 32 bits are zero
    for (Row& row : reciprocals) row.c = row.a, row.a |= 0xffffffff, row.b = row.c & ~0xffffffffull;
    table("rcp.approx.ftz.f64 %fd10, $A;\n\trcp.approx.ftz.f64 %fd11, $B;\n\tsub.f64 $R, %fd10, %fd11;", "DDD", [&] {
        for (Row& row : reciprocals) row.want = 0;  // those of the operand are ignored
        return reciprocals;
    }());
}

// 9.7.6 setp: ordered comparisons are false of a NaN, those with u true; selp; logic of predicates
TEST(comparisons) {
    struct {
        const char* name;
        int less, equal, more, unordered;
    } ops[] = {{"eq", 0, 1, 0, 0},  {"ne", 1, 0, 1, 0},  {"lt", 1, 0, 0, 0},  {"le", 1, 1, 0, 0},
               {"gt", 0, 0, 1, 0},  {"ge", 0, 1, 1, 0},  {"equ", 0, 1, 0, 1}, {"neu", 1, 0, 1, 1},
               {"ltu", 1, 0, 0, 1}, {"leu", 1, 1, 0, 1}, {"gtu", 0, 0, 1, 1}, {"geu", 0, 1, 1, 1}};
    for (auto& op : ops) {
        u64 l = op.less, e = op.equal, m = op.more, u = op.unordered, minus = 1ull << 63;
        std::string after = format(" %%p1, $A, $B;\n\tselp.u32 $R, 1, 0, %%p1;"), name = format("setp.%s", op.name);
        const vector<Row> floats = {{l, bits(1.f), bits(2.f)},
                                    {e, bits(2.f), bits(2.f)}, {m, bits(3.f), bits(2.f)}, {u, 0x7fc00000, 0},
                                    {u, 0, 0xffffffff}, {u, 0x7fc00000, 0x7fc00000}, {e, 0, 0x80000000},
                                    {l, bits(-1.f), 0}, {m, 0x7f800000, bits(1.f)}, {l, 1, 2}, {m, 1, 0}};
        table(name + ".f32" + after, "rff", floats);
        vector<Row> doubles = {{l, bits(1.0), bits(2.0)},
                               {e, bits(2.0), bits(2.0)}, {m, bits(3.0), bits(2.0)}, {u, 0x7ff8000000000000, 0},
                               {e, 0, minus}, {u, 0, 0xfff8000000000000}, {l, bits(-1.0), bits(-0.5)}};
        table(name + ".f64" + after, "rDD", doubles);
        if (strlen(op.name) != 2) continue;
        table(name + ".s32" + after, "rrr", {{l, 0xffffffff, 1}, {e, 5, 5}, {m, 1, 0x80000000}});
        table(name + ".u32" + after, "rrr", {{m, 0xffffffff, 1}, {e, 5, 5}, {l, 1, 0x80000000}});
        table(name + ".s64" + after, "rdd", {{l, ~0ull, 1}, {e, 5, 5}, {m, 1, minus}, {l, 0xffffffff, 1ull << 32}});
        table(name + ".u64" + after, "rdd", {{m, ~0ull, 1}, {e, 5, 5}, {l, 1, minus}, {l, 0xffffffff, 1ull << 32}});
        table(name + ".s16" + after, "rhh", {{l, 0xffff, 1}, {e, 5, 5}, {m, 1, 0x8000}});
    }
    table("setp.ne.b32 %p1, $A, 0;\n\tselp.u32 $R, 1, 0, %p1;", "rr", {{0, 0}, {1, 5}});
    std::string two = "setp.ne.s32 %p1, $A, 0;\n\tsetp.ne.s32 %p2, $B, 0;\n\t", end = "\n\tselp.b32 $R, $B, 7, %p3;";
    table(two + "and.pred %p3, %p1, %p2;" + end, "rrr", {{7, 0, 0}, {7, 0, 1}, {7, 1, 0}, {1, 1, 1}});
    table(two + "or.pred %p3, %p1, %p2;" + end, "rrr", {{7, 0, 0}, {1, 0, 1}, {0, 1, 0}, {1, 1, 1}});
    table(two + "not.pred %p3, %p1;" + end, "rrr", {{0, 0, 0}, {7, 1, 1}});
    table(two + "mov.pred %p3, %p2;" + end, "rrr", {{7, 0, 0}, {1, 0, 1}});
    table("setp.gt.u32 %p1, $A, 1;\n\tselp.f32 $R, $B, 0f80000001, %p1;", "frf", {{0x80000001, 0, 2}, {2, 2, 2}});
    table("setp.gt.u32 %p1, $A, 1;\n\tselp.f64 $R, $B, 0d3FE0000000000000, %p1;", "DrD",
          {{bits(0.5), 0, 2}, {2, 2, 2}});
    table("setp.gt.u32 %p1, $A, 1;\n\tselp.b64 $R, $B, -1, %p1;", "drd", {{~0ull, 0, 2}, {2, 2, 2}});
    // 7. a guard; the register keeps its value where it is false
    table("setp.gt.u32 %p1, $A, 1;\n\tmov.u32 $R, 5;\n\t@%p1 mov.u32 $R, 6;\n\t@!%p1 add.s32 $R, $R, $A;", "rr",
          {{5, 0}, {6, 1}, {6, 2}});
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// Every form of load and store, bytes as they were. 9.7.9 ld, st
TEST(widths) {
    struct {
        const char *load, *store, *regs;
        int bytes;
    } forms[] = {{"u16", "u16", "%rs1", 2},
                 {"u32", "u32", "%r1", 4},
                 {"s32", "u32", "%r1", 4},
                 {"f32", "f32", "%f1", 4},
                 {"u64", "u64", "%rd1", 8},
                 {"f64", "f64", "%fd1", 8},
                 {"v2.f32", "v2.f32", "{%f1, %f2}", 8},
                 {"v4.f32", "v4.f32", "{%f1, %f2, %f3, %f4}", 16},
                 {"v4.u32", "v4.u32", "{%r1, %r2, %r3, %r4}", 16},
                 {"v4.u16", "v4.u16", "{%rs1, %rs2, %rs3, %rs4}", 8},
                 {"v2.u32", "v2.u32", "{%r1, %r2}", 8},
                 {"cg.v4.f32", "cg.v4.f32", "{%f1, %f2, %f3, %f4}", 16}};
    for (auto& form : forms)
        for (bool shared : {false, true}) {
            if (shared && strncmp(form.load, "cg", 2) == 0) continue;
            Text k = {".u64, .u64", format("\tmul.wide.u32 \t%%rd10, %%tx, %d;\n\tadd.s64 \t%%rd11, %%a0, "
                                           "%%rd10;\n\tadd.s64 \t%%rd12, %%a1, %%rd10;\n"
                                           "\tadd.s64 \t%%rd12, %%rd12, 64;\n\tld.global.%s \t%s, [%%rd12+-64];\n",
                                           form.bytes, form.load, form.regs)};
            if (shared) {
                k.before = "\t.shared .align 16 .b8 room[1024];";
                k.body += format(
                    "\tmov.u32 \t%%r20, room;\n\tmad.lo.s32 \t%%r21, %%tx, %d, %%r20;\n\tst.shared.%s \t[%%r21+32], "
                    "%s;\n"
                    "\tld.shared.%s \t%s, [%%r21+32];\n",
                    form.bytes, form.store, form.regs, form.load, form.regs);
            }
            k.body += format("\tst.global.%s \t[%%rd11], %s;", form.store, form.regs);
            Buffer<uint8_t> out(33 * form.bytes, 0xee), in(33 * form.bytes);
            for (int i = 0; i < 33 * form.bytes; i++) in[i] = (uint8_t)(i * 37 + 0x85);
            ptx::Launch launch;
            launch.block.x = 33;
            launch.args = {out, in};
            if (runs(module(k), launch) && memcmp(out.at, in.at, out.count) != 0)
                fail(format("%s, shared %d", form.load, shared));
        }
}

TEST(parameters) {  // 5: structs by value, all widths, at offsets
    Text k = {".u64, .align 8 .b8 [40], .f32, .f64, .s32, .u8, .align 8 .b8 [16]", R"(
	ld.param.v4.u8 	{%rs1, %rs2, %rs3, %rs4}, [tried_param_1+4];
	cvt.u32.u16 %r1, %rs1;
	cvt.u32.u16 %r2, %rs2;
	cvt.u32.u16 %r3, %rs3;
	cvt.u32.u16 %r4, %rs4;
	st.global.v4.u32 	[%a0], {%r1, %r2, %r3, %r4};
	ld.param.v2.f32 	{%f1, %f2}, [tried_param_1+8];
	st.global.v2.f32 	[%a0+16], {%f1, %f2};
	ld.param.u64 	%rd1, [tried_param_1+16];
	st.global.u64 	[%a0+24], %rd1;
	ld.param.f32 	%f3, [tried_param_2];
	st.global.f32 	[%a0+32], %f3;
	ld.param.s32 	%r5, [tried_param_4];
	st.global.u32 	[%a0+36], %r5;
	ld.param.f64 	%fd1, [tried_param_3];
	st.global.f64 	[%a0+40], %fd1;
	ld.param.s8 	%rs5, [tried_param_5];
	st.global.u16 	[%a0+48], %rs5;
	ld.param.s8 	%r6, [tried_param_5];
	st.global.u32 	[%a0+52], %r6;
	ld.param.u32 	%r7, [tried_param_6+12];
	st.global.u32 	[%a0+56], %r7;
	mov.u32 	%r8, %ntid.x;
	st.global.u32 	[%a0+60], %r8;
	mov.u32 	%r9, %nctaid.x;
	st.global.u32 	[%a0+64], %r9;)"};
    struct {
        int skip;
        uint8_t bytes[4];
        float f[2];
        u64 whole, rest[2];
    } one = {1, {0x81, 2, 0xff, 4}, {1.5f, -2.5f}, 0x0123456789abcdef, {0, 0}};
    static_assert(sizeof one == 40);
    float f = 3.5f;
    double d = -1.25;
    int s = -9;
    int8_t c = -3;
    uint32_t tail[4] = {1, 2, 3, 0xabcdef01};
    Buffer<uint8_t> out(68);
    ptx::Launch launch;
    launch.args = {out, {&one, sizeof one}, {&f, 4}, {&d, 8}, {&s, 4}, {&c, 1}, {tail, 16}};
    if (!runs(module(k), launch)) return;
    uint32_t want[17] = {0x81,
                         2,
                         0xff,
                         4,
                         (uint32_t)bits(1.5f),
                         (uint32_t)bits(-2.5f),
                         0x89abcdef,
                         0x01234567,
                         (uint32_t)bits(3.5f),
                         (uint32_t)-9,
                         0,
                         (uint32_t)(bits(-1.25) >> 32),
                         0xfffd,
                         0xfffffffd,
                         0xabcdef01,
                         1,
                         1};
    for (int i = 0; i < 17; i++) {
        uint32_t got;
        memcpy(&got, out.at + 4 * i, 4);
        if (i == 12) got &= 0xffff;
        if (got != want[i]) fail(format("word %d: %x, not %x", i, got, want[i]));
    }
}

// Two variables of shared memory, one of them dynamic, and one of global memory; chapter 5
TEST(variables) {
    Text k = {".u64", R"(
	shl.b32 	%r1, %tx, 2;
	mov.u32 	%r2, first;
	add.s32 	%r3, %r2, %r1;
	st.shared.u32 	[%r3], %tx;
	mov.u32 	%r4, dynamic;
	add.s32 	%r5, %r4, %r1;
	add.s32 	%r6, %tx, 100;
	st.shared.u32 	[%r5+64], %r6;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	SKIP;
	mov.f32 	%f1, 0f3FC00000;
	st.volatile.shared.f32 	[second], %f1;
	st.shared.u32 	[second+4], %bx;
SKIP:
	bar.sync 	0;
	xor.b32  	%r1, %r1, 124;
	add.s32 	%r3, %r2, %r1;
	ld.shared.u32 	%r7, [%r3];
	add.s32 	%r5, %r4, %r1;
	ld.shared.u32 	%r8, [%r5+64];
	ld.shared.f32 	%f2, [second];
	ld.shared.u32 	%r9, [second+4];
	mov.b32 	%r10, %f2;
	mov.u64 	%rd1, tickets;
	mov.u32 	%r12, 5;
	atom.global.inc.u32 	%r11, [%rd1], %r12;
	and.b32  	%r13, %r5, 1023;
	sub.s32 	%r13, %r13, %r1;
	mad.lo.s32 	%r14, %bx, 32, %tx;
	mul.wide.u32 	%rd2, %r14, 32;
	add.s64 	%rd3, %a0, %rd2;
	st.global.v4.u32 	[%rd3], {%r7, %r8, %r9, %r10};
	st.global.v2.u32 	[%rd3+16], {%r11, %r13};)",
              ".global .align 4 .u32 tickets;\n.shared .align 4 .b8 first[128];\n.shared .align 8 .b8 "
              "second[8];\n.extern .shared .align 1024 .b8 dynamic[];"};
    Buffer<uint32_t> out(64 * 8);
    ptx::Launch launch;
    launch.block.x = 32;
    launch.grid.x = 2;
    launch.shared = 64 + 128;
    launch.args = {out};
    if (!runs(module(k), launch)) return;
    vector<int> tickets(6);
    for (uint32_t i = 0; i < 64; i++) {
        const uint32_t *got = out.at + 8 * i, back = 31 - i % 32;
        if (got[0] != back || got[1] != back + 100 || got[2] != i / 32 || got[3] != bits(1.5f) || got[5] != 0)
            return fail(format("thread %u: %u %u %u %x %u", i, got[0], got[1], got[2], got[3], got[5]));
        if (got[4] > 5) return fail("inc beyond its limit");
        tickets[got[4]]++;
    }
    // 9.7.13 inc: d = old >= limit ? 0 : old + 1, from zero: 0..5, ten times and four more
    for (int i = 0; i < 6; i++)
        if (tickets[i] != (i < 4 ? 11 : 10)) fail(format("ticket %d came %d times", i, tickets[i]));
}

TEST(variables_stay) {  // a module's variable keeps its value from one launch to the next
    if (!write_to.empty()) return;
    Text k = {".u64",
              "\tmov.u64 \t%rd1, tickets;\n\tmov.u32 \t%r1, 1000;\n\tatom.global.inc.u32 \t%r2, [%rd1], "
              "%r1;\n\tst.global.u32 \t[%a0], %r2;",
              ".global .align 4 .u32 tickets;"};
    Buffer<uint32_t> out(1);
    ptx::Launch launch;
    launch.args = {out};
    auto loaded = ptx::read(module(k), "tests");
    if (ptx::kernels(*loaded) != vector<std::string>{"tried"} || !ptx::has(*loaded, "tried") ||
        ptx::has(*loaded, "tired"))
        fail("names");
    for (uint32_t i = 0; i < 3; i++) {
        try {
            ptx::run(*loaded, "tried", launch);
        } catch (const ptx::Report& report) {
            return fail(report.what());
        }
        if (out[0] != i) fail(format("launch %u: %u", i, out[0]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Control and warps

// Each lane loops as often as its number, in nested branches; then all are together again (shfl with all lanes)
TEST(divergence) {
    Text k = {".u64", R"(
	mov.u32 	%r1, 0;
	mov.u32 	%r2, 0;
	setp.eq.s32 	%p1, %tx, 0;
	@%p1 bra 	$L__BB0_6;
	bra.uni 	$L__BB0_2;

$L__BB0_2:
	.pragma "nounroll";
	and.b32  	%r3, %r1, 1;
	setp.eq.s32 	%p2, %r3, 0;
	@!%p2 bra 	$L__BB0_4;
	add.s32 	%r2, %r2, %r1;
	bra.uni 	$L__BB0_5;

$L__BB0_4:
	sub.s32 	%r2, %r2, 1;

$L__BB0_5:
	add.s32 	%r1, %r1, 1;
	setp.lt.s32 	%p3, %r1, %tx;
	@%p3 bra 	$L__BB0_2;

$L__BB0_6:
	mov.u32 	%r10, 31;
	mov.u32 	%r11, -1;
	mov.u32 	%r12, 1;
	shfl.sync.bfly.b32 	%r4|%p4, %r2, %r12, %r10, %r11;
	mul.wide.u32 	%rd1, %tx, 8;
	add.s64 	%rd2, %a0, %rd1;
	st.global.v2.u32 	[%rd2], {%r2, %r4};)"};
    Buffer<int> out(64);
    ptx::Launch launch;
    launch.block.x = 32;
    launch.args = {out};
    for (int seed = 1; seed < 4; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (int t = 0; t < 32; t++) {
            int want[2] = {0, 0};
            for (int side = 0; side < 2; side++)
                for (int i = 0; i < (side ? t ^ 1 : t); i++) want[side] += i % 2 ? -1 : i;
            if (out[2 * t] != want[0] || out[2 * t + 1] != want[1])
                fail(format("lane %d: %d %d", t, out[2 * t], out[2 * t + 1]));
        }
    }
}

// 9.7.9 shfl.sync: the source lane and the predicate as its text computes them
TEST(shuffles) {
    const std::string body = R"(
	add.s32 	%r1, %tx, 1000;
	mov.u32 	%r5, -1;
	shfl.sync.MODE.b32 	%r2|%p1, %r1, %u1, %u2, %r5;
	selp.u32 	%r3, 1, 0, %p1;
	mul.wide.u32 	%rd1, %tx, 8;
	add.s64 	%rd2, %a0, %rd1;
	st.global.v2.u32 	[%rd2], {%r2, %r3};)";
    for (std::string mode : {"bfly", "idx"})
        for (uint32_t b : {0, 1, 2, 4, 8, 16, 31, 33, 7})
            for (uint32_t c : {31u, 0x1c1fu, 0x1f1fu, 15u, 0x101fu, 0x1807u, 3u}) {
                Text k = {".u64, .u32, .u32", body};
                k.body.replace(k.body.find("MODE"), 4, mode);
                Buffer<uint32_t> out(64);
                ptx::Launch launch;
                launch.block.x = 32;
                launch.args = {out, {&b, 4}, {&c, 4}};
                if (!write_to.empty() && (b || c != 31)) continue;
                if (!runs(module(k), launch)) continue;
                for (uint32_t lane = 0; lane < 32; lane++) {
                    uint32_t bval = b & 31, clamp = c & 31, mask = c >> 8 & 31, most = (lane & mask) | (clamp & ~mask);
                    uint32_t j = mode == "bfly" ? lane ^ bval : (lane & mask) | (bval & ~mask), in = j <= most;
                    if (!in) j = lane;
                    if (out[2 * lane] != j + 1000 || out[2 * lane + 1] != in)
                        fail(format("%s %x %x, lane %u: %u %u", mode.c_str(), b, c, lane, out[2 * lane],
                                    out[2 * lane + 1]));
                }
            }
}

// 9.7.13 vote.sync.any; masks of half a warp in two branches
TEST(votes) {
    Text k = {".u64, .u32", R"(
	setp.eq.s32 	%p1, %tx, %u1;
	mov.u32 	%r1, -1;
	vote.sync.any.pred 	%p2, %p1, %r1;
	selp.u32 	%r2, 1, 0, %p2;
	setp.gt.u32 	%p3, %tx, 15;
	@%p3 bra 	UPPER;
	mov.u32 	%r3, 65535;
	vote.sync.any.pred 	%p4, %p1, %r3;
	mov.u32 	%r6, 3;
	mov.u32 	%r7, 31;
	shfl.sync.idx.b32 	%r5|%p5, %tx, %r6, %r7, %r3;
	bra.uni 	JOIN;
UPPER:
	mov.u32 	%r3, -65536;
	vote.sync.any.pred 	%p4, %p1, %r3;
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 31;
	shfl.sync.bfly.b32 	%r5|%p5, %tx, %r6, %r7, %r3;
JOIN:
	bar.warp.sync 	-1;
	selp.u32 	%r4, 1, 0, %p4;
	mul.wide.u32 	%rd1, %tx, 16;
	add.s64 	%rd2, %a0, %rd1;
	st.global.v4.u32 	[%rd2], {%r2, %r4, %r5, %r1};)"};
    for (uint32_t who : {3u, 20u, 77u}) {
        Buffer<uint32_t> out(128);
        ptx::Launch launch;
        launch.block.x = 32;
        launch.args = {out, {&who, 4}};
        for (int seed = 1; seed < 4; seed++) {
            if (!runs(module(k), launch, seed)) continue;
            for (uint32_t t = 0; t < 32; t++)
                if (out[4 * t] != (who < 32) || out[4 * t + 1] != (who < 32 && who / 16 == t / 16) ||
                    out[4 * t + 2] != (t < 16 ? 3 : t ^ 1))
                    fail(format("%u, lane %u: %u %u %u", who, t, out[4 * t], out[4 * t + 1], out[4 * t + 2]));
        }
    }
}

// 9.7.12 call with parameters and a result, twice
TEST(calls) {
    Text k = {".u64", R"(
	cvt.rn.f32.s32 	%f1, %tx;
	cvt.f64.f32 	%fd1, %f1;
	mov.f64 	%fd2, 0d3FE0000000000000;
	{ // callseq 0, 0
	.reg .b32 temp_param_reg;
	.param .b64 param0;
	st.param.f64 	[param0+0], %fd1;
	.param .b64 param1;
	st.param.f64 	[param1+0], %fd2;
	.param .b64 retval0;
	call.uni (retval0), 
	power, 
	(
	param0, 
	param1
	);
	ld.param.f64 	%fd3, [retval0+0];
	} // callseq 0
	{ // callseq 1, 0
	.reg .b32 temp_param_reg;
	.param .b64 param0;
	st.param.f64 	[param0+0], %fd3;
	.param .b64 param1;
	st.param.f64 	[param1+0], %fd1;
	.param .b64 retval0;
	call.uni (retval0), 
	power, 
	(
	param0, 
	param1
	);
	ld.param.f64 	%fd4, [retval0+0];
	} // callseq 1
	mul.wide.u32 	%rd1, %tx, 8;
	add.s64 	%rd2, %a0, %rd1;
	st.global.f64 	[%rd2], %fd4;)",
              R"(
.func  (.param .b64 func_retval0) power
(
	.param .b64 power_param_0,
	.param .b64 power_param_1
)
;
.func  (.param .b64 func_retval0) power(
	.param .b64 power_param_0,
	.param .b64 power_param_1
)
{
	.reg .pred 	%p<2>;
	.reg .f64 	%fd<10>;

	ld.param.f64 	%fd1, [power_param_0];
	ld.param.f64 	%fd2, [power_param_1];
	setp.gt.f64 	%p1, %fd1, 0d4010000000000000;
	@%p1 bra 	$L__BB0_2;

	mul.f64 	%fd3, %fd1, %fd2;
	st.param.f64 	[func_retval0+0], %fd3;
	ret;

$L__BB0_2:
	sub.f64 	%fd4, %fd1, %fd2;
	st.param.f64 	[func_retval0+0], %fd4;
	ret;

})"};
    Buffer<double> out(32);
    ptx::Launch launch;
    launch.block.x = 32;
    launch.args = {out};
    if (!runs(module(k), launch)) return;
    auto power = [](double a, double b) { return a > 4 ? a - b : a * b; };
    for (int t = 0; t < 32; t++)
        if (out[t] != power(power(t, 0.5), t)) fail(format("thread %d: %g", t, out[t]));
}

// 9.7.13 barriers: producer and consumer with bar.arrive, over several rounds
TEST(barriers) {
    Text k = {".u64", R"(
	mov.u32 	%r1, cell;
	shl.b32 	%r2, %lane, 2;
	add.s32 	%r1, %r1, %r2;
	mov.u32 	%r3, 0;
	mov.u32 	%r4, 0;
	mov.u32 	%r5, 1;
	mov.u32 	%r6, 2;
	mov.u32 	%r7, 64;
	setp.eq.s32 	%p1, %warp, 2;
	@%p1 bra 	JOIN;
	setp.eq.s32 	%p1, %warp, 1;
	@%p1 bra 	CONSUMER;
PRODUCER:
	mul.lo.s32 	%r8, %r3, %r3;
	add.s32 	%r8, %r8, %tx;
	st.shared.u32 	[%r1], %r8;
	bar.arrive %r5, %r7;
	bar.sync %r6, %r7;
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p2, %r3, 6;
	@%p2 bra 	PRODUCER;
	bra.uni 	JOIN;
CONSUMER:
	bar.sync %r5, %r7;
	xor.b32  	%r9, %r1, 124;
	ld.shared.u32 	%r8, [%r9];
	bar.arrive %r6, %r7;
	mad.lo.s32 	%r4, %r4, 3, %r8;
	add.s32 	%r3, %r3, 1;
	setp.lt.s32 	%p2, %r3, 6;
	@%p2 bra 	CONSUMER;
	mul.wide.u32 	%rd1, %lane, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %r4;
JOIN:
	bar.sync 	0;)",
              ".shared .align 128 .b8 cell[128];"};
    Buffer<uint32_t> out(32);
    ptx::Launch launch;
    launch.block.x = 96;
    launch.args = {out};
    for (int seed = 1; seed < 9; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (uint32_t t = 0; t < 32; t++) {
            uint32_t want = 0;
            for (uint32_t i = 0; i < 6; i++) want = want * 3 + i * i + (31 - t);
            if (out[t] != want) fail(format("lane %u: %u, not %u", t, out[t], want));
        }
    }
}

// 9.7.13 barrier: it waits for the non-exited threads of the warps that take part
TEST(barriers_without_exited) {
    Text k = {".u64", R"(
	setp.eq.s32 	%p1, %warp, 2;
	@%p1 bra 	GONE;
	bar.sync 	0;
	mul.wide.u32 	%rd1, %tx, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %tx;
GONE:)"};
    Buffer<uint32_t> out(64, 7);
    ptx::Launch launch;
    launch.block.x = 96;
    launch.args = {out};
    for (int seed = 1; seed < 9; seed++)
        if (runs(module(k), launch, seed) && (out[0] != 0 || out[63] != 63)) fail("not stored");
}

// A flag between blocks: 8, release and acquire; the second block waits, asleep in between
TEST(flags) {
    Text k = {".u64, .u64", R"(
	setp.ne.s32 	%p1, %bx, 0;
	@%p1 bra 	SECOND;
	mad.lo.s32 	%r1, %tx, %tx, 5;
	mul.wide.u32 	%rd1, %tx, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %r1;
	bar.sync 	0;
	setp.ne.s32 	%p2, %tx, 0;
	@%p2 bra 	END;
	mov.u32 	%r2, 1;
	st.release.gpu.global.s32 [%a1], %r2;
	bra.uni 	END;
SECOND:
	setp.ne.s32 	%p2, %tx, 0;
	@%p2 bra 	READY;
SPIN:
	ld.acquire.gpu.global.s32 %r3, [%a1];
	setp.eq.s32 	%p3, %r3, 1;
	@%p3 bra 	READY;
	mov.u32 	%r4, 64;
	nanosleep.u32 %r4;
	bra.uni 	SPIN;
READY:
	bar.sync 	0;
	sub.s32 	%r5, 63, %tx;
	mul.wide.u32 	%rd1, %r5, 4;
	add.s64 	%rd2, %a0, %rd1;
	ld.global.u32 	%r6, [%rd2];
	mul.wide.u32 	%rd1, %tx, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2+256], %r6;
END:)"};
    Buffer<uint32_t> out(128), flag(1);
    ptx::Launch launch;
    launch.block.x = 64;
    launch.grid.x = 2;
    launch.args = {out, flag};
    for (int seed = 1; seed < 9; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (uint32_t t = 0; t < 64; t++)
            if (out[64 + t] != (63 - t) * (63 - t) + 5) fail(format("seed %d, thread %u: %u", seed, t, out[64 + t]));
    }
}

TEST(many_blocks) {  // all of a grid run, each once, and again in another order
    Text k = {".u64",
              "\tmov.u32 \t%r1, %ntid.x;\n\tmad.lo.s32 \t%r2, %bx, %r1, %tx;\n\tmul.wide.s32 \t%rd1, %r2, "
              "4;\n\tadd.s64 \t%rd2, %a0, %rd1;\n"
              "\tld.global.u32 \t%r3, [%rd2];\n\tadd.s32 \t%r3, %r3, %r2;\n\tst.global.u32 \t[%rd2], %r3;"};
    Buffer<uint32_t> out(40 * 50, 3);
    ptx::Launch launch;
    launch.block.x = 40;
    launch.grid.x = 50;
    launch.args = {out};
    for (int seed = 1; seed < 4; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (uint32_t i = 0; i < out.count; i++)
            if (out[i] != i + 3) return fail(format("%u: %u", i, out[i]));
    }
}

static void hangs(int) {
    printf("FAIL %s: no end after a minute\n", current.c_str());
    fflush(stdout);
    _exit(1);
}

int main(int argc, char** argv) {
    const char* only = nullptr;
    for (int i = 1; i + 1 < argc; i += 2)
        if (strcmp(argv[i], "--only") == 0)
            only = argv[i + 1];
        else if (strcmp(argv[i], "--write") == 0)
            write_to = argv[i + 1];
        else
            return fprintf(stderr, "usage: %s [--only NAME] [--write FOLDER]\n", argv[0]), 2;
    int passed = 0, failed = 0;
    signal(SIGALRM, hangs);
    for (const Test& test : tests()) {
        if (only && strcmp(only, test.name) != 0) continue;
        why.clear();
        current = test.name;
        written = 0;
        alarm(60);
        try {
            test.body();
        } catch (const std::exception& error) {
            fail(std::string("threw ") + error.what());
        }
        why.empty() ? passed++ : failed++;
        if (!why.empty()) printf("FAIL %s: %s\n", test.name, why.c_str());
        fflush(stdout);
    }
    printf("test_ptx: %d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0;
}
