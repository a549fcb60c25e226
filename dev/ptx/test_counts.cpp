// Tests of what the machine counts, against counts by hand: kernels of a warp or two in PTX.
//   test_counts [FILTER]
#include <string.h>

#include <functional>

#include "dev/cpu/expect.h"
#include "ptx.h"

static const char HEAD[] = ".version 8.3\n.target sm_90a\n.address_size 64\n";

// the kernel k of these parameters and this body; each instruction on a line of its own
static std::string kernel(const std::string& params, const std::string& body) {
    return std::string(HEAD) + ".visible .entry k(" + params + ")\n{\n" +
           ".reg .pred %p<8>;\n.reg .b32 %r<64>;\n.reg .f32 %f<32>;\n.reg .b64 %rd<16>;\n" +
           ".shared .align 16 .b8 words[8192];\n" + body + "ret;\n}\n";
}
static ptx::Counts run(const std::string& text, ptx::Launch launch, uint64_t seed = 1, size_t sample = 0) {
    ptx::options.counts = true, ptx::options.races = false, ptx::options.seed = seed, ptx::options.sample = sample;
    return ptx::run(*ptx::read(text, "test.ptx"), "k", launch);
}
template <class T>
static ptx::Arg arg(const T& x) {
    return {&x, sizeof x};
}

// one warp's access of shared memory, lanes `stride` words apart
static ptx::Counts shared(const std::string& access, unsigned stride) {
    return run(kernel(".param .u32 k_param_0",
                      "mov.u32 %r1, %tid.x;\nld.param.u32 %r2, [k_param_0];\n"
                      "mul.lo.s32 %r3, %r1, %r2;\nshl.b32 %r4, %r3, 2;\nmov.u32 %r5, words;\n"
                      "add.s32 %r6, %r5, %r4;\n" +
                          access + "\n"),
               {{1, 1, 1}, {32, 1, 1}, 0, {arg(stride)}});
}
// one warp's access of global memory, lanes `stride` words apart, from byte `offset`
static ptx::Counts global(const std::string& access, unsigned stride, unsigned offset = 0) {
    alignas(128) static unsigned char memory[8192];
    const unsigned char* at = memory + offset;
    ptx::allocated(memory, sizeof memory);
    ptx::Counts c =
        run(kernel(".param .u64 k_param_0, .param .u32 k_param_1",
                   "ld.param.u64 %rd1, [k_param_0];\nld.param.u32 %r2, [k_param_1];\nmov.u32 %r1, %tid.x;\n"
                   "mul.lo.s32 %r3, %r1, %r2;\nmul.wide.u32 %rd2, %r3, 4;\nadd.s64 %rd3, %rd1, %rd2;\n" +
                       access + "\n"),
            {{1, 1, 1}, {32, 1, 1}, 0, {arg(at), arg(stride)}});
    ptx::freed(memory);
    return c;
}

static void test_wavefronts() {
    struct {
        const char* access;
        unsigned stride, fronts, needed;
    } cases[] = {
        {"st.shared.u32 [%r6], %r1;", 1, 1, 1},
        {"st.shared.u32 [%r6], %r1;", 2, 2, 1},
        {"st.shared.u32 [%r6], %r1;", 32, 32, 1},
        {"st.shared.u32 [%r6], %r1;", 33, 1, 1},
        {"ld.shared.u32 %r7, [%r6];", 0, 1, 1},
        {"ld.shared.u32 %r7, [%r6];", 4, 4, 1},
        {"ld.shared.v2.u32 {%r7, %r8}, [%r6];", 2, 2, 2},
        {"ld.shared.v2.u32 {%r7, %r8}, [%r6];", 4, 4, 2},
        {"ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r6];", 4, 4, 4},
        {"ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r6];", 36, 4, 4},
        {"ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r6];", 32, 32, 4},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7, %r8, %r9, %r10}, [%r6];", 36, 4, 4},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7, %r8, %r9, %r10}, [%r6];", 64, 32, 4},
    };
    for (auto& t : cases) {
        const ptx::Counts c = shared(t.access, t.stride);
        EXPECT(c.wavefronts == t.fronts && c.wavefronts_needed == t.needed, "%s stride %u: %d wavefronts, %d needed",
               t.access, t.stride, int(c.wavefronts), int(c.wavefronts_needed));
        uint64_t beyond = 0;
        for (auto& line : c.lines) beyond += line[5];
        EXPECT(beyond == t.fronts - t.needed, "%s stride %u: %d beyond need", t.access, t.stride, int(beyond));
        EXPECT(c.sectors == 0 && c.read == 0, "global memory was not asked");
    }
}

static void test_sectors() {
    struct {
        const char* access;
        unsigned stride, offset, sectors, needed, bytes, distinct;
    } cases[] = {
        {"ld.global.u32 %r7, [%rd3];", 1, 0, 4, 4, 128, 128},
        {"ld.global.u32 %r7, [%rd3];", 1, 16, 5, 4, 128, 160},
        {"ld.global.u32 %r7, [%rd3];", 2, 0, 8, 4, 128, 256},
        {"ld.global.u32 %r7, [%rd3];", 8, 0, 32, 4, 128, 1024},
        {"ld.global.u32 %r7, [%rd3];", 0, 0, 1, 1, 4, 32},
        {"ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%rd3];", 4, 0, 16, 16, 512, 512},
        {"ld.global.v4.u32 {%r7, %r8, %r9, %r10}, [%rd3];", 8, 0, 32, 16, 512, 1024},
        {"st.global.u32 [%rd3], %r1;", 8, 0, 32, 4, 128, 1024},
        {"st.global.u16 [%rd3], %r1;", 8, 0, 32, 2, 64, 1024},
    };
    for (auto& t : cases) {
        const ptx::Counts c = global(t.access, t.stride, t.offset);
        const bool store = t.access[0] == 's';
        EXPECT(c.sectors == t.sectors && c.sectors_needed == t.needed, "%s stride %u: %d sectors, %d needed", t.access,
               t.stride, int(c.sectors), int(c.sectors_needed));
        EXPECT((store ? c.written : c.read) == t.bytes && (store ? c.read : c.written) == 0, "%s: bytes", t.access);
        EXPECT((store ? c.written_distinct : c.read_distinct) == t.distinct, "%s: distinct bytes", t.access);
        EXPECT(c.wavefronts == 0 && c.to_l2 == t.sectors, "shared memory was not asked, and L1 is empty");
    }
    const ptx::Counts again = global("ld.global.u32 %r7, [%rd3];\nld.global.v2.f32 {%f1, %f2}, [%rd3];", 2);
    EXPECT(again.sectors == 16 && again.to_l2 == 8, "the second from L1: %d to L2", int(again.to_l2));
    const ptx::Counts past = global("ld.global.u32 %r7, [%rd3];\nld.global.cg.u32 %r8, [%rd3];", 2);
    EXPECT(past.sectors == 16 && past.to_l2 == 16, ".cg goes past L1: %d to L2", int(past.to_l2));
    const ptx::Counts written = global("st.global.u32 [%rd3], %r1;\nst.global.u32 [%rd3], %r1;", 1);
    EXPECT(written.to_l2 == 8 && written.written_distinct == 128, "each write goes to L2: %d", int(written.to_l2));
}

// a row of 128 floats in each of two warps: sums, over the lanes, and lane 0 writes
static void test_row() {
    alignas(128) static float x[256], sums[2];
    for (int i = 0; i < 256; i++) x[i] = float(i);
    const float *in = x, *out = sums;
    ptx::allocated(x, sizeof x), ptx::allocated(sums, sizeof sums);
    std::string body =
        "ld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_1];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, "
        "%ctaid.x;\n"
        "mul.wide.u32 %rd3, %r2, 512;\nmul.wide.u32 %rd4, %r1, 16;\nadd.s64 %rd5, %rd1, %rd3;\nadd.s64 %rd6, %rd5, "
        "%rd4;\n"
        "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd6];\nadd.f32 %f5, %f1, %f2;\nadd.f32 %f6, %f3, %f4;\n"
        "add.f32 %f7, %f5, %f6;\n";
    for (int m = 16; m > 0; m /= 2)
        body += "mov.b32 %r3, %f7;\nshfl.sync.bfly.b32 %r4|%p1, %r3, " + std::to_string(m) +
                ", 31, -1;\nmov.b32 %f8, %r4;\nadd.f32 %f7, %f7, %f8;\n";
    body +=
        "ex2.approx.f32 %f9, %f1;\nbar.sync 0;\nsetp.ne.s32 %p2, %r1, 0;\n@%p2 bra END;\nmul.wide.u32 %rd7, %r2, 4;\n"
        "add.s64 %rd8, %rd2, %rd7;\nst.global.f32 [%rd8], %f7;\nEND:\n";
    const ptx::Counts c = run(kernel(".param .u64 k_param_0, .param .u64 k_param_1", body),
                              {{2, 1, 1}, {32, 1, 1}, 0, {arg(in), arg(out)}});
    ptx::freed(x), ptx::freed(sums);
    EXPECT(sums[0] == 127 * 64 && sums[1] == sums[0] + 128 * 128, "the sums are %g, %g", double(sums[0]),
           double(sums[1]));
    EXPECT(c.blocks == 2 && c.warps == 2, "%d blocks of %d warps", int(c.blocks), int(c.warps));
    EXPECT(c.floats == 2 * 8 && c.special == 2, "%d floats, %d special", int(c.floats), int(c.special));
    EXPECT(c.memory == 2 * (2 + 1 + 5 + 1), "%d memory", int(c.memory));  // parameters, load, shuffles, store
    EXPECT(c.integers == 2 * (2 + 4 + 10 + 1 + 2), "%d integers", int(c.integers));
    // bar, bra, and ret twice: by the lanes that jump, and by lane 0, unless they meet before
    EXPECT(c.control >= 2 * 3 && c.control <= 2 * 4, "%d control", int(c.control));
    EXPECT(c.barriers == 2 && c.tensor == 0, "%d barriers", int(c.barriers));
    EXPECT(c.read == 1024 && c.written == 8, "%d bytes read, %d written", int(c.read), int(c.written));
    EXPECT(c.read_distinct == 1024 && c.written_distinct == 32, "%d, %d distinct", int(c.read_distinct),
           int(c.written_distinct));
    EXPECT(c.shared_distinct == 32, "the sums of both blocks lie in a sector: %d", int(c.shared_distinct));
    EXPECT(c.sectors == 2 * (16 + 1) && c.sectors_needed == c.sectors, "%d sectors", int(c.sectors));
}

static void test_mma() {
    std::string zeros;
    for (int i = 0; i < 4; i++)
        zeros += "mov.b32 %f" + std::to_string(i) + ", 0f00000000;\nmov.b32 %r" + std::to_string(i) + ", 0;\n";
    const ptx::Counts c =
        run(kernel("", zeros + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, "
                               "{%r0, %r1, %r2, %r3}, {%r0, %r1}, {%f0, %f1, %f2, %f3};\n"),
            {{3, 1, 1}, {64, 1, 1}, 0, {}});
    EXPECT(c.tensor == 6 && c.tensor_flops == 6 * 2 * 16 * 8 * 16, "%d mma, %d FLOPs", int(c.tensor),
           int(c.tensor_flops));
}

// a block polls a flag that the one before it sets: how often is not counted
static void test_polls() {
    static unsigned flag;
    const unsigned* at = &flag;
    ptx::allocated(&flag, sizeof flag);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        flag = 0;
        const ptx::Counts c = run(kernel(".param .u64 k_param_0",
                                         "ld.param.u64 %rd1, [k_param_0];\nmov.u32 %r1, %ctaid.x;\nmov.u32 %r4, 0;\n"
                                         "setp.eq.s32 %p1, %r1, 0;\n@%p1 bra SET;\nPOLL:\n"
                                         "ld.acquire.gpu.global.s32 %r2, [%rd1];\nsetp.ne.s32 %p2, %r2, 0;\n"
                                         "@%p2 bra END;\nnanosleep.u32 32;\nbra.uni POLL;\nSET:\nadd.s32 %r4, %r4, 1;\n"
                                         "setp.lt.s32 %p3, %r4, 300;\n@%p3 bra SET;\nmov.u32 %r3, 1;\n"
                                         "st.release.gpu.global.s32 [%rd1], %r3;\nEND:\n"),
                                  {{2, 1, 1}, {1, 1, 1}, 0, {arg(at)}}, seed);
        EXPECT(c.integers == 2 * 3 + 1 + 2 * 300 + 1, "seed %d: %d integers", int(seed), int(c.integers));
        EXPECT(c.control == 2 * 2 + 1 + 300, "seed %d: %d control", int(seed), int(c.control));
        EXPECT(c.memory == 2 + 2 && c.sectors == 2 && c.read == 4, "seed %d: %d memory, %d sectors", int(seed),
               int(c.memory), int(c.sectors));
    }
    ptx::freed(&flag);
}

static void test_sample() {
    const std::string text = kernel("", "bar.sync 0;\n");
    const ptx::Counts all = run(text, {{100, 1, 1}, {64, 1, 1}, 0, {}}),
                      some = run(text, {{100, 1, 1}, {64, 1, 1}, 0, {}}, 1, 4);
    EXPECT(all.blocks == 100 && all.barriers == 200, "%d blocks", int(all.blocks));
    EXPECT(some.blocks == 4 && some.barriers == 8 && some.warps == 8, "%d blocks of the sample", int(some.blocks));
}

int main(int argc, char** argv) {
    const std::pair<const char*, void (*)()> tests[] = {
        {"wavefronts", test_wavefronts}, {"sectors", test_sectors}, {"row", test_row}, {"mma", test_mma},
        {"polls", test_polls},           {"sample", test_sample}};
    for (auto& test : tests) {
        if (argc > 1 && !strstr(test.first, argv[1])) continue;
        why.clear();
        try {
            test.second();
        } catch (const std::exception& e) {
            if (why.empty()) why = e.what();
        }
        why.empty() ? passed++ : failed++;
        if (!why.empty()) printf("FAIL %s: %s\n", test.first, why.c_str());
    }
    printf("test_counts: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
