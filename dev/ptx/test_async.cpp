// What asynchronous instructions and those of matrices compute: cp.async, mbarriers, bulk and tensor copies, ldmatrix,
// stmatrix, mma and wgmma. Expected values are from the PTX ISA manual 9.0: layouts are written down once more, from
// its figures, as plain loops.
#include "test.h"

using std::vector;

static uint16_t bf16(int x) {  // exact: small integers
    float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    return u >> 16;
}

// 9.7.14 ldmatrix, stmatrix: addresses of rows 0..7 of matrix i are those of lanes 8i..8i+7; a lane holds of each
// matrix the elements 2 (lane % 4) and the next of row lane / 4, of the transposed matrix with .trans
TEST(ldmatrix) {
    const char* body = R"(
	mul.wide.u32 	%rd1, %tx, 16;
	add.s64 	%rd2, %a1, %rd1;
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd2];
	mov.u32 	%r1, room;
	mul.lo.s32 	%r2, %tx, 48;
	add.s32 	%r3, %r1, %r2;
	st.shared.v4.f32 	[%r3+16], {%f1, %f2, %f3, %f4};
	bar.warp.sync 	-1;
	xor.b32  	%r4, %tx, 9;
	mad.lo.s32 	%r5, %r4, 48, %r1;
	add.s32 	%r5, %r5, 16;
	LOAD {%r10,%r11,%r12,%r13}, [%r5];
	add.s64 	%rd3, %a0, %rd1;
	st.global.v4.u32 	[%rd3], {%r10, %r11, %r12, %r13};
	bar.warp.sync 	-1;
	stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r13,%r10,%r12,%r11};
	bar.warp.sync 	-1;
	ld.shared.v4.u32 	{%r20, %r21, %r22, %r23}, [%r3+16];
	st.global.v4.u32 	[%rd3+512], {%r20, %r21, %r22, %r23};)";
    for (bool trans : {false, true}) {
        Text k = {".u64, .u64", body, ".shared .align 16 .b8 room[1600];"};
        k.body.replace(
            k.body.find("LOAD"), 4,
            trans ? "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" : "ldmatrix.sync.aligned.m8n8.x4.shared.b16");
        Buffer<uint16_t> out(512), in(256);
        for (int i = 0; i < 256; i++)
            in[i] = (uint16_t)(i * 257 + 3);  // row r of those that lane r has written: in[8 r]
        ptx::Launch launch;
        launch.block.x = 32;
        launch.args = {out, in};
        if (!runs(module(k), launch)) continue;
        const int from[4] = {3, 0, 2, 1};  // stmatrix stores the registers in this order
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < 4; matrix++)
                for (int half = 0; half < 2; half++) {
                    int row = lane / 4, column = lane % 4 * 2 + half;
                    if (trans) std::swap(row, column);
                    int want = in[((8 * matrix + row) ^ 9) * 8 + column], got = out[(lane * 4 + matrix) * 2 + half];
                    if (got != want)
                        fail(format("lane %d, matrix %d, half %d: %x, not %x", lane, matrix, half, got, want));
                }
        for (int row = 0; row < 8; row++)
            for (int matrix = 0; matrix < 4; matrix++)
                for (int column = 0; column < 8; column++) {
                    int r = row, c = column;
                    if (trans) std::swap(r, c);
                    int want = in[((8 * from[matrix] + r) ^ 9) * 8 + c];
                    int got = out[256 + ((8 * matrix + row) ^ 9) * 8 + column];
                    if (got != want)
                        fail(format("stored matrix %d, %d %d: %x, not %x", matrix, row, column, got, want));
                }
    }
}

// 9.7.14: fragments of mma.m16n8k16 with bf16: group = lane / 4, in it lane % 4
TEST(mma) {
    Text k = {".u64, .u64, .u64", R"(
	mul.wide.u32 	%rd1, %tx, 16;
	add.s64 	%rd2, %a1, %rd1;
	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%rd2];
	ld.global.v4.u32 	{%r5, %r6, %r7, %r8}, [%rd2+512];
	add.s64 	%rd3, %a2, %rd1;
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd3];
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f5,%f6,%f7,%f8}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f1,%f2,%f3,%f4};
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f5,%f6,%f7,%f8}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f5,%f6,%f7,%f8};
	add.s64 	%rd4, %a0, %rd1;
	st.global.v4.f32 	[%rd4], {%f5, %f6, %f7, %f8};)"};
    Buffer<float> out(128), c(128);
    Buffer<uint16_t> in(512);
    int A[16][16], B[16][8], C[16][8];
    Uniform random = {5};
    for (auto& row : A)
        for (int& x : row) x = (int)(random() % 63) - 31;
    for (auto& row : B)
        for (int& x : row) x = (int)(random() % 63) - 31;
    for (auto& row : C)
        for (int& x : row) x = (int)(random() % 1000);
    for (int lane = 0; lane < 32; lane++) {
        int group = lane / 4, in_group = lane % 4;
        for (int i = 0; i < 8; i++) {  // row: group for a0 a1 a4 a5, else 8 more; column: 8 more from a4 on
            int row = group + (i % 4 >= 2 ? 8 : 0), column = in_group * 2 + i % 2 + (i >= 4 ? 8 : 0);
            in[lane * 8 + i] = bf16(A[row][column]);
        }
        for (int i = 0; i < 4; i++)  // row: 2 in_group + i % 2, 8 more for b2 b3; column: group
            in[256 + lane * 8 + i] = bf16(B[in_group * 2 + i % 2 + (i >= 2 ? 8 : 0)][group]);
        for (int i = 0; i < 4; i++) c[lane * 4 + i] = (float)C[group + (i >= 2 ? 8 : 0)][in_group * 2 + i % 2];
    }
    ptx::Launch launch;
    launch.block.x = 32;
    launch.args = {out, in, c};
    if (!runs(module(k), launch)) return;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2, want = C[row][column];
            for (int j = 0; j < 16; j++) want += 2 * A[row][j] * B[j][column];
            if (out[lane * 4 + i] != (float)want)
                fail(format("d%d of lane %d: %g, not %d", i, lane, out[lane * 4 + i], want));
        }
}

// 9.7.9: bytes beyond src-size are zero; groups are complete in order
TEST(cp_async) {
    Text k = {".u64, .u64, .u32", R"(
	mov.u32 	%r1, room;
	mad.lo.s32 	%r2, %tx, 64, %r1;
	mul.wide.u32 	%rd1, %tx, 64;
	add.s64 	%rd2, %a1, %rd1;
	mov.u32 	%r3, 16;
	mov.u32 	%r4, 4;
	cp.async.cg.shared.global.L2::128B [%r2], [%rd2], 16, %r3;
	add.s32 	%r5, %r2, 16;
	add.s64 	%rd3, %rd2, 16;
	cp.async.cg.shared.global.L2::128B [%r5], [%rd3], 16, %u2;
	cp.async.commit_group;
	add.s32 	%r6, %r2, 32;
	add.s64 	%rd4, %rd2, 32;
	cp.async.ca.shared.global [%r6], [%rd4], 4, %r4;
	add.s32 	%r7, %r2, 36;
	add.s64 	%rd5, %rd2, 36;
	mov.u32 	%r8, 0;
	cp.async.ca.shared.global [%r7], [%rd5], 4, %r8;
	cp.async.commit_group;
	cp.async.commit_group;
	cp.async.wait_group 2;
	add.s64 	%rd6, %a0, %rd1;
	ld.shared.v4.u32 	{%r10, %r11, %r12, %r13}, [%r2];
	st.global.v4.u32 	[%rd6], {%r10, %r11, %r12, %r13};
	ld.shared.v4.u32 	{%r10, %r11, %r12, %r13}, [%r5];
	st.global.v4.u32 	[%rd6+16], {%r10, %r11, %r12, %r13};
	cp.async.wait_group 0;
	bar.sync 	0;
	ld.shared.u32 	%r10, [%r6];
	ld.shared.u32 	%r11, [%r7];
	st.global.v2.u32 	[%rd6+32], {%r10, %r11};)",
              ".shared .align 16 .b8 room[4096];"};
    for (uint32_t bytes : {16, 0, 8, 12}) {
        Buffer<uint32_t> out(64 * 16), in(64 * 16);
        for (uint32_t i = 0; i < in.count; i++) in[i] = i * 0x01010107 + 1;
        ptx::Launch launch;
        launch.block.x = 64;
        launch.args = {out, in, {&bytes, 4}};
        if (!runs(module(k), launch)) continue;
        for (uint32_t i = 0; i < 64 * 16; i++) {
            uint32_t at = i % 16, want = at < 4 || at == 8 ? in[i] : at < 8 && (at - 4) * 4 < bytes ? in[i] : 0;
            if (at < 10 && out[i] != want) fail(format("%u: word %u: %x, not %x", bytes, i, out[i], want));
        }
    }
}

// 9.7.13: two warps hand over a cell several times, by the parity of the phases of two mbarriers. A barrier that
// nobody has arrived at: the wait for parity 1, that of the phase before the first, is over at once.
TEST(mbarriers) {
    Text k = {".u64", R"(
	mov.u32 	%r1, bars;
	add.s32 	%r2, %r1, 8;
	mov.u32 	%r3, 32;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r1], %r3;
	mbarrier.init.shared::cta.b64 [%r2], %r3;
READY:
	bar.sync 	0;
	mov.u32 	%r4, cell;
	shl.b32 	%r5, %lane, 2;
	add.s32 	%r4, %r4, %r5;
	mov.u32 	%r6, 0;
	mov.u32 	%r7, 0;
	mov.u32 	%r8, 0;
	setp.eq.s32 	%p1, %warp, 1;
	@%p1 bra 	CONSUMER;
PRODUCER:
	xor.b32  	%r9, %r7, 1;
	WAIT %r2, %r9;
	mad.lo.s32 	%r10, %r6, 100, %tx;
	st.shared.u32 	[%r4], %r10;
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1];
	xor.b32  	%r7, %r7, 1;
	add.s32 	%r6, %r6, 1;
	setp.lt.s32 	%p2, %r6, 7;
	@%p2 bra 	PRODUCER;
	bra.uni 	END;
CONSUMER:
	WAIT %r1, %r7;
	xor.b32  	%r11, %r4, 124;
	ld.shared.u32 	%r12, [%r11];
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2];
	mad.lo.s32 	%r8, %r8, 3, %r12;
	xor.b32  	%r7, %r7, 1;
	add.s32 	%r6, %r6, 1;
	setp.lt.s32 	%p2, %r6, 7;
	@%p2 bra 	CONSUMER;
	mul.wide.u32 	%rd1, %lane, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %r8;
END:)",
              ".shared .align 8 .b8 bars[16];\n.shared .align 128 .b8 cell[128];"};
    Buffer<uint32_t> out(32);
    ptx::Launch launch;
    launch.block.x = 64;
    launch.args = {out};
    for (int seed = 1; seed < 9; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (uint32_t t = 0; t < 32; t++) {
            uint32_t want = 0;
            for (uint32_t i = 0; i < 7; i++) want = want * 3 + i * 100 + 31 - t;
            if (out[t] != want) fail(format("seed %d, lane %u: %u, not %u", seed, t, out[t], want));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensor copies: the map is an opaque parameter of 128 bytes; 9.7.9, swizzle 5.5

struct alignas(64) Map {  // as dev/cpu/include/cuda.h fills it
    void* base;
    uint64_t dims[4], strides[4];  // elements; bytes
    uint32_t box[4];
    int made;
};
static_assert(sizeof(Map) == 128);

static Map tensor_map(void* base, vector<uint64_t> dims, vector<uint64_t> strides, vector<uint32_t> box) {
    Map map = {base, {}, {2}, {}, 0x54414d50};
    for (int i = 0; i < 4; i++) map.dims[i] = dims[i], map.box[i] = box[i];
    for (int i = 1; i < 4; i++) map.strides[i] = strides[i - 1];
    return map;
}

// A row of 128 bytes has eight chunks of 16; chunk i of row r (of eight) lies where i ^ r says.
static size_t swizzle(size_t byte) { return byte ^ ((byte >> 7 & 7) << 4); }

static const char* load_body = R"(
	mov.b64 	%rd1, tried_param_1;
	cvta.param.u64 	%rd2, %rd1;
	mov.u32 	%r1, tile;
	mov.u32 	%r2, bars;
	mov.u32 	%r3, 1;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r2], %r3;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], %u2;
	cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2, {%u3,%u4,%u5,%u6}], [%r2];
READY:
	bar.sync 	0;
	mov.u32 	%r4, 0;
	WAIT %r2, %r4;
	shl.b32 	%r5, %tx, 2;
COPY:
	add.s32 	%r6, %r1, %r5;
	ld.shared.u32 	%r7, [%r6];
	cvt.u64.u32 	%rd3, %r5;
	add.s64 	%rd4, %a0, %rd3;
	st.global.u32 	[%rd4], %r7;
	add.s32 	%r5, %r5, 256;
	setp.lt.u32 	%p2, %r5, %u2;
	@%p2 bra 	COPY;)";

TEST(tensor_load) {
    const uint64_t d[4] = {96, 11, 3, 2};  // elements; rows of 104, so that strides are not dims
    Buffer<uint16_t> in(104 * 11 * 3 * 2);
    for (size_t i = 0; i < in.count; i++) in[i] = (uint16_t)(i + 1);
    Text k = {".u64, .align 64 .b8 [128], .u32, .u32, .u32, .u32, .u32", load_body,
              ".extern .shared .align 1024 .b8 tile[];\n.shared .align 8 .b8 bars[8];"};
    struct {
        vector<uint32_t> box;
        int at[4];
    } cases[] = {{{64, 8, 1, 1}, {0, 0, 0, 0}},  {{64, 8, 1, 1}, {0, 3, 1, 1}},   {{64, 8, 1, 1}, {32, 2, 2, 0}},
                 {{64, 8, 1, 1}, {64, 5, 1, 1}}, {{64, 16, 1, 1}, {40, 0, 2, 1}}, {{64, 4, 2, 2}, {0, 2, 0, 0}},
                 {{64, 2, 3, 1}, {8, 9, 1, 1}},  {{64, 8, 1, 1}, {-8, -3, 0, 1}}, {{64, 8, 1, 1}, {0, 20, 0, 0}},
                 {{64, 3, 2, 1}, {0, 0, -1, 1}}, {{64, 5, 1, 2}, {63, 1, 2, 1}}};
    for (auto& c : cases) {
        Map map = tensor_map(in.at, {d[0], d[1], d[2], d[3]}, {208, 208 * 11, 208 * 33}, c.box);
        uint32_t bytes = 2 * c.box[0] * c.box[1] * c.box[2] * c.box[3];
        Buffer<uint16_t> out(bytes / 2, 0xeeee);
        ptx::Launch launch;
        launch.block.x = 64;
        launch.shared = bytes;
        launch.args = {out,           {&map, sizeof map}, {&bytes, 4},  {&c.at[0], 4},
                       {&c.at[1], 4}, {&c.at[2], 4},      {&c.at[3], 4}};
        for (int seed = 1; seed < 4; seed++) {
            if (!runs(module(k), launch, seed)) break;
            size_t element = 0;
            for (uint32_t i3 = 0; i3 < c.box[3]; i3++)
                for (uint32_t i2 = 0; i2 < c.box[2]; i2++)
                    for (uint32_t i1 = 0; i1 < c.box[1]; i1++)
                        for (uint32_t i0 = 0; i0 < 64; i0++, element++) {
                            int64_t x[4] = {c.at[0] + (int)i0, c.at[1] + (int)i1, c.at[2] + (int)i2, c.at[3] + (int)i3};
                            int want = in[0] * 0;  // out of bounds: zero
                            if (x[0] >= 0 && x[1] >= 0 && x[2] >= 0 && x[3] >= 0 && x[0] < 96 && x[1] < 11 &&
                                x[2] < 3 && x[3] < 2)
                                want = in[x[0] + 104 * (x[1] + 11 * (x[2] + 3 * x[3]))];
                            int got = out[swizzle(2 * element) / 2];
                            if (got != want)
                                fail(format("at %d %d %d %d, element %zu: %d, not %d", c.at[0], c.at[1], c.at[2],
                                            c.at[3], element, got, want));
                        }
        }
    }
}

TEST(tensor_store) {
    Text k = {".u64, .align 64 .b8 [128], .u32, .u32, .u32, .u32, .u32", R"(
	mov.b64 	%rd1, tried_param_1;
	cvta.param.u64 	%rd2, %rd1;
	mov.u32 	%r1, tile;
	shl.b32 	%r5, %tx, 2;
COPY:
	add.s32 	%r6, %r1, %r5;
	cvt.u64.u32 	%rd3, %r5;
	add.s64 	%rd4, %a0, %rd3;
	ld.global.u32 	%r7, [%rd4];
	st.shared.u32 	[%r6], %r7;
	add.s32 	%r5, %r5, 256;
	setp.lt.u32 	%p2, %r5, %u2;
	@%p2 bra 	COPY;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd2, {%u3,%u4,%u5,%u6}], [%r1];
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)",
              ".extern .shared .align 1024 .b8 tile[];"};
    struct {
        vector<uint32_t> box;
        int at[4];
    } cases[] = {{{64, 8, 1, 1}, {0, 0, 0, 0}},
                 {{64, 8, 1, 1}, {48, 5, 2, 1}},
                 {{64, 3, 2, 2}, {8, 1, 1, 0}},
                 {{64, 8, 1, 1}, {-16, -2, 1, 1}}};
    for (auto& c : cases) {
        Buffer<uint16_t> out(104 * 11 * 3 * 2, 0xeeee);
        Map map = tensor_map(out.at, {96, 11, 3, 2}, {208, 208 * 11, 208 * 33}, c.box);
        uint32_t bytes = 2 * c.box[0] * c.box[1] * c.box[2] * c.box[3];
        Buffer<uint16_t> in(bytes / 2);
        for (size_t i = 0; i < in.count; i++) in[i] = (uint16_t)(i + 1);
        vector<uint16_t> want(out.count, 0xeeee);
        size_t element = 0;
        for (int i3 = 0; i3 < (int)c.box[3]; i3++)
            for (int i2 = 0; i2 < (int)c.box[2]; i2++)
                for (int i1 = 0; i1 < (int)c.box[1]; i1++)
                    for (int i0 = 0; i0 < 64; i0++, element++) {
                        int x[4] = {c.at[0] + i0, c.at[1] + i1, c.at[2] + i2, c.at[3] + i3};
                        if (x[0] >= 0 && x[1] >= 0 && x[2] >= 0 && x[3] >= 0 && x[0] < 96 && x[1] < 11 && x[2] < 3 &&
                            x[3] < 2)
                            want[x[0] + 104 * (x[1] + 11 * (x[2] + 3 * x[3]))] = in[swizzle(2 * element) / 2];
                    }
        ptx::Launch launch;
        launch.block.x = 64;
        launch.shared = bytes;
        launch.args = {in, {&map, sizeof map}, {&bytes, 4}, {&c.at[0], 4}, {&c.at[1], 4}, {&c.at[2], 4}, {&c.at[3], 4}};
        for (int seed = 1; seed < 4; seed++)
            if (runs(module(k), launch, seed) && memcmp(out.at, want.data(), 2 * out.count) != 0)
                fail(format("at %d %d %d %d", c.at[0], c.at[1], c.at[2], c.at[3]));
    }
}

// 9.7.9: bulk copies and reductions of shared to global memory; three blocks add to the same floats
TEST(bulk) {
    const std::string body = R"(
	mov.u32 	%r1, room;
	mad.lo.s32 	%r2, %tx, 4, %r1;
	add.s32 	%r3, %tx, %bx;
	cvt.rn.f32.s32 	%f1, %r3;
	st.shared.f32 	[%r2], %f1;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	mov.u32 	%r4, 240;
	mul.wide.u32 	%rd1, %bx, STEP;
	add.s64 	%rd2, %a0, %rd1;
	add.s32 	%r5, %r1, 16;
	OPERATION [%rd2], [%r5], %r4;
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group 0;
END:)";
    for (bool add : {false, true}) {
        Text k = {".u64", body, ".shared .align 128 .b8 room[256];"};
        k.body.replace(k.body.find("STEP"), 4, add ? "0" : "256");
        k.body.replace(k.body.find("OPERATION"), 9,
                       add ? "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
                           : "cp.async.bulk.global.shared::cta.bulk_group");
        Buffer<float> out(192, 0.5f);
        ptx::Launch launch;
        launch.block.x = 64;
        launch.grid.x = 3;
        launch.args = {out};
        for (int seed = 1; seed < 6; seed++) {
            if (!runs(module(k), launch, seed)) break;
            for (int i = 0; i < 192; i++) {
                int in = i % 64 < 60, block = i / 64;
                float want = 0.5f;
                if (in && !add) want = (float)(i % 64 + 4 + block);
                if (in && add && block == 0) want = 0.5f + (float)(3 * (i + 4) + 3);
                if (out[i] != want) fail(format("add %d, float %d: %g, not %g", add, i, out[i], want));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: 9.7.15.5.1, with the 128 byte swizzle, canonical layouts in units of bf16 (T = 8):
// K-major ((8,m),(8,2k)):((64,SBO),(1,8)), MN-major ((8,8,m),(8,k)):((1,8,LBO),(64,SBO)).
// Fields of a descriptor: bits 0-13 the start address >> 4, 16-29 LBO >> 4, 32-45 SBO >> 4, 62-63 the swizzle (1)

static uint64_t descriptor(size_t offset, size_t lbo, size_t sbo) {  // the kernel adds the address of the image
    return (uint64_t)1 << 62 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)(lbo >> 4) << 16 | offset >> 4;
}

struct Operand {
    bool mn_major;
    size_t offset, lbo, sbo;
    // byte of an element in the image
    size_t at(size_t mn, size_t k) const {
        size_t byte = mn_major ? 2 * (mn % 64 + 64 * (k % 8)) + mn / 64 * lbo + k / 8 * sbo
                               : 2 * (k + 64 * (mn % 8)) + mn / 8 * sbo;
        return swizzle(offset + byte);
    }
    // the descriptor of 16 k from a step on: K-major 32 bytes on, MN-major two groups of eight rows on
    uint64_t at_step(int step) const { return descriptor(offset + (mn_major ? step * 2 * sbo : step * 32), lbo, sbo); }
};

static std::string registers(const char* prefix, int from, int n) {
    std::string list = "{";
    for (int i = 0; i < n; i++) list += (i ? "," : "") + std::string(prefix) + std::to_string(from + i);
    return list + "}";
}

// Copies the image to shared memory (at tile, aligned to 1024); the address >> 4 is in %rd3
static std::string image_body(int bytes, int threads = 128) {
    return format(R"(
	mov.u32 	%%r1, tile;
	mul.lo.s32 	%%r2, %%tx, 16;
IMAGE:
	add.s32 	%%r3, %%r1, %%r2;
	cvt.u64.u32 	%%rd1, %%r2;
	add.s64 	%%rd2, %%a1, %%rd1;
	ld.global.v4.f32 	{%%f1, %%f2, %%f3, %%f4}, [%%rd2];
	st.shared.v4.f32 	[%%r3], {%%f1, %%f2, %%f3, %%f4};
	add.s32 	%%r2, %%r2, %d;
	setp.lt.s32 	%%p1, %%r2, %d;
	@%%p1 bra 	IMAGE;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	and.b32  	%%r4, %%r1, 262143;
	shr.u32 	%%r5, %%r4, 4;
	cvt.u64.u32 	%%rd3, %%r5;
)",
                  16 * threads, bytes);
}

// D = A B over `steps` of 16 k, of n columns; A in registers or in shared memory
static void multiply(int n, int steps, bool in_registers, Operand a, Operand b, bool keep) {
    const int size = 48 * 1024, depth = 16 * steps;
    static int A[64][64], B[64][128];
    Uniform random = {(uint64_t)n + steps};
    for (auto& row : A)
        for (int& x : row) x = (int)(random() % 17) - 8;
    for (auto& row : B)
        for (int& x : row) x = (int)(random() % 17) - 8;
    Buffer<uint16_t> image(size / 2, bf16(100)), fragments(128 * 8 * 4);
    for (int k = 0; k < depth; k++) {
        for (int m = 0; m < 64 && !in_registers; m++) image[a.at(m, k) / 2] = bf16(A[m][k]);
        for (int i = 0; i < n; i++) image[b.at(i, k) / 2] = bf16(B[k][i]);
    }
    for (int t = 0; t < 128; t++)  // figure 148: as in mma, a warp has 16 rows
        for (int i = 0; i < 8 * steps; i++) {
            int row = t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0),
                column = t % 4 * 2 + i % 2 + (i % 8 >= 4 ? 8 : 0) + i / 8 * 16;
            fragments[t * 32 + i] = bf16(A[row][column]);
        }
    Buffer<float> out(128 * n / 2, -1.f);
    std::string body = image_body(size) + "\tmul.wide.u32 \t%rd4, %tx, 64;\n\tadd.s64 \t%rd5, %a2, %rd4;\n";
    for (int s = 0; s < steps && in_registers; s++)
        body += format("\tld.global.v4.u32 \t{%%r%d, %%r%d, %%r%d, %%r%d}, [%%rd5+%d];\n", 20 + 4 * s, 21 + 4 * s,
                       22 + 4 * s, 23 + 4 * s, 16 * s);
    for (int i = 0; i < n / 2; i++)
        body += format("\tmov.f32 \t%%f%d, %s;\n", 10 + i, keep ? "0f40A00000" : "0f7FC00000");
    body += "\twgmma.fence.sync.aligned;\n";
    for (int s = 0; s < steps; s++) {
        body += format("\tadd.s64 \t%%rd10, %%rd3, %lld;\n\tadd.s64 \t%%rd11, %%rd3, %lld;\n\tmov.u32 \t%%r10, %d;\n",
                       (long long)a.at_step(s), (long long)b.at_step(s), keep || s > 0);
        body += format(
            "\t{.reg .pred p; setp.ne.b32 p, %%r10, 0; wgmma.mma_async.sync.aligned.m64n%dk16.f32.bf16.bf16 %s, ", n,
            registers("%f", 10, n / 2).c_str());
        if (in_registers)
            body += format("%s, %%rd11, p, 1, 1, %d;}\n", registers("%r", 20 + 4 * s, 4).c_str(), b.mn_major);
        else
            body += format("%%rd10, %%rd11, p, 1, 1, %d, %d;}\n", a.mn_major, b.mn_major);
    }
    body += format(
        "\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\tmul.wide.u32 \t%%rd6, %%tx, "
        "%d;\n\tadd.s64 \t%%rd7, %%a0, %%rd6;\n",
        n * 2);
    for (int i = 0; i < n / 2; i++) body += format("\tst.global.f32 \t[%%rd7+%d], %%f%d;\n", 4 * i, 10 + i);
    ptx::Launch launch;
    launch.block.x = 128;
    launch.shared = size;
    launch.args = {out, image, fragments};
    if (!runs(module({".u64, .u64, .u64", body, ".extern .shared .align 1024 .b8 tile[];"}), launch)) return;
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < n / 2; i++) {  // figure 149
            int row = t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + t % 4 * 2 + i % 2, want = 0;
            for (int k = 0; k < depth; k++) want += A[row][k] * B[k][column];
            want += keep ? 5 : 0;
            if (out[t * n / 2 + i] != (float)want)
                return fail(format("n %d, %d steps, registers %d, majors %d %d: d%d of thread %d: %g, not %d", n, steps,
                                   in_registers, a.mn_major, b.mn_major, i, t, out[t * n / 2 + i], want));
        }
}

TEST(wgmma) {
    for (int n : {64, 128})
        for (bool in_registers : {false, true}) {
            for (bool a : {false, true})
                for (bool b : {false, true}) {
                    if (in_registers && a) continue;
                    // dense: groups of eight rows 1024 bytes apart; 64 columns of an MN-major tile of 64 k are 8192
                    multiply(n, 4, in_registers, {a, 0, a ? 8192u : 16, 1024}, {b, 8192, b ? 8192u : 16, 1024}, false);
                    multiply(n, 1, in_registers, {a, 2048, 8192, 1024}, {b, 16384, 8192, 1024}, true);
                    // apart: other strides, whatever the leading offset of a K-major tile
                    multiply(n, 2, in_registers, {a, 0, 4096, 2048}, {b, 16384, 1024, 2048}, true);
                }
        }
}

// Two groups of warps, each with its half of B's columns in turn, and two batches under way
TEST(wgmma_groups) {
    const int size = 24 * 1024;
    Operand a = {false, 0, 16, 1024}, b[2] = {{true, 8192, 16, 1024}, {false, 16384, 16, 1024}};
    static int A[64][16], B[2][16][64];
    Uniform random = {9};
    for (auto& row : A)
        for (int& x : row) x = (int)(random() % 17) - 8;
    for (auto& half : B)
        for (auto& row : half)
            for (int& x : row) x = (int)(random() % 17) - 8;
    Buffer<uint16_t> image(size / 2);
    for (int k = 0; k < 16; k++) {
        for (int m = 0; m < 64; m++) image[a.at(m, k) / 2] = bf16(A[m][k]);
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 64; i++) image[b[half].at(i, k) / 2] = bf16(B[half][k][i]);
    }
    Buffer<float> out(256 * 64);
    std::string body = image_body(size, 256);
    for (int i = 0; i < 64; i++) body += format("\tmov.f32 \t%%f%d, 0f00000000;\n", 10 + i);
    body += "\twgmma.fence.sync.aligned;\n\tmov.u32 \t%r10, 1;\n";
    for (int half = 0; half < 2; half++)
        body += format(
            "\tadd.s64 \t%%rd10, %%rd3, %lld;\n\tadd.s64 \t%%rd11, %%rd3, %lld;\n\t{.reg .pred p; setp.ne.b32 p, "
            "%%r10, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 %s, %%rd10, %%rd11, p, 1, 1, 0, "
            "%d;}\n\twgmma.commit_group.sync.aligned;\n",
            (long long)a.at_step(0), (long long)b[half].at_step(0), registers("%f", 10 + 32 * half, 32).c_str(),
            b[half].mn_major);
    body += "\tmul.wide.u32 \t%rd6, %tx, 256;\n\tadd.s64 \t%rd7, %a0, %rd6;\n";
    for (int half = 0; half < 2; half++) {
        body += format("\twgmma.wait_group.sync.aligned %d;\n", 1 - half);
        for (int i = 0; i < 32; i++)
            body += format("\tst.global.f32 \t[%%rd7+%d], %%f%d;\n", 128 * half + 4 * i, 10 + 32 * half + i);
    }
    ptx::Launch launch;
    launch.block.x = 256;
    launch.shared = size;
    launch.args = {out, image};
    for (int seed = 1; seed < 4; seed++) {
        if (!runs(module({".u64, .u64", body, ".extern .shared .align 1024 .b8 tile[];"}), launch, seed)) return;
        for (int t = 0; t < 256; t++)
            for (int i = 0; i < 64; i++) {
                int row = t % 128 / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0),
                    column = i % 32 / 4 * 8 + t % 4 * 2 + i % 2, want = 0;
                for (int k = 0; k < 16; k++) want += A[row][k] * B[i / 32][k][column];
                if (out[t * 64 + i] != (float)want)
                    return fail(format("d%d of thread %d: %g, not %d", i, t, out[t * 64 + i], want));
            }
    }
}

// A pipeline as kernels have it: a warp loads tiles into two slots by the copy engine, a group of four multiplies them
TEST(pipeline) {
    const int rounds = 5;
    Buffer<uint16_t> in(64 * 64 * (rounds + 1));  // rounds of A (64 x 64, K-major), then B
    static int A[rounds][64][64], B[64][64];
    Uniform random = {21};
    for (int r = 0; r < rounds; r++)
        for (int i = 0; i < 64; i++)
            for (int j = 0; j < 64; j++) in[(r * 64 + i) * 64 + j] = bf16(A[r][i][j] = (int)(random() % 9) - 4);
    for (int k = 0; k < 64; k++)
        for (int i = 0; i < 64; i++) in[(rounds * 64 + i) * 64 + k] = bf16(B[k][i] = (int)(random() % 9) - 4);
    Map map = tensor_map(in.at, {64, 64u * (rounds + 1), 1, 1}, {128, 1 << 20, 1 << 20}, {64, 64, 1, 1});
    Buffer<float> out(128 * 32);
    std::string body = R"(
	mov.b64 	%rd1, tried_param_1;
	cvta.param.u64 	%rd2, %rd1;
	mov.u32 	%r1, tile;
	mov.u32 	%r2, bars;
	mov.u32 	%r3, 1;
	mov.u32 	%r4, 128;
	mov.u32 	%r5, 8192;
	mov.u32 	%r7, 0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r2], %r3;
	add.s32 	%r6, %r2, 8;
	mbarrier.init.shared::cta.b64 [%r6], %r3;
	add.s32 	%r6, %r2, 16;
	mbarrier.init.shared::cta.b64 [%r6], %r4;
	add.s32 	%r6, %r2, 24;
	mbarrier.init.shared::cta.b64 [%r6], %r4;
	add.s32 	%r6, %r2, 32;
	mbarrier.init.shared::cta.b64 [%r6], %r3;
	fence.mbarrier_init.release.cluster;
READY:
	bar.sync 	0;
	mov.u32 	%r8, 0;
	mov.u32 	%r9, 0;
	mov.u32 	%r10, 0;
	setp.lt.u32 	%p1, %tx, 128;
	@%p1 bra 	CONSUMER;
	setp.ne.s32 	%p1, %tx, 128;
	@%p1 bra 	END;
	add.s32 	%r11, %r2, 32;
	mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r11], %r5;
	add.s32 	%r12, %r1, 16384;
	mov.u32 	%r13, ROWS;
	cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd2, {%r7,%r13,%r7,%r7}], [%r11];
PRODUCER:
	shl.b32 	%r14, %r9, 3;
	add.s32 	%r15, %r2, %r14;
	add.s32 	%r16, %r15, 16;
	xor.b32  	%r17, %r10, 1;
	WAIT %r16, %r17;
	mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r15], %r5;
	shl.b32 	%r18, %r9, 13;
	add.s32 	%r19, %r1, %r18;
	shl.b32 	%r20, %r8, 6;
	cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r19], [%rd2, {%r7,%r20,%r7,%r7}], [%r15];
	xor.b32  	%r9, %r9, 1;
	setp.eq.s32 	%p3, %r9, 0;
	selp.u32 	%r21, 1, 0, %p3;
	xor.b32  	%r10, %r10, %r21;
	add.s32 	%r8, %r8, 1;
	setp.lt.s32 	%p2, %r8, ROUNDS;
	@%p2 bra 	PRODUCER;
	bra.uni 	END;
CONSUMER:
	add.s32 	%r11, %r2, 32;
	WAIT %r11, %r7;
ZERO
NEXT:
	shl.b32 	%r14, %r9, 3;
	add.s32 	%r15, %r2, %r14;
	add.s32 	%r16, %r15, 16;
	WAIT %r15, %r10;
	shl.b32 	%r18, %r9, 13;
	add.s32 	%r19, %r1, %r18;
	and.b32  	%r19, %r19, 262143;
	shr.u32 	%r19, %r19, 4;
	cvt.u64.u32 	%rd3, %r19;
	add.s32 	%r20, %r1, 16384;
	and.b32  	%r20, %r20, 262143;
	shr.u32 	%r20, %r20, 4;
	cvt.u64.u32 	%rd4, %r20;
	wgmma.fence.sync.aligned;
MULTIPLY
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r16];
	xor.b32  	%r9, %r9, 1;
	setp.eq.s32 	%p3, %r9, 0;
	selp.u32 	%r21, 1, 0, %p3;
	xor.b32  	%r10, %r10, %r21;
	add.s32 	%r8, %r8, 1;
	setp.lt.s32 	%p2, %r8, ROUNDS;
	@%p2 bra 	NEXT;
	mul.wide.u32 	%rd6, %tx, 128;
	add.s64 	%rd7, %a0, %rd6;
STORE
END:)";
    std::string zero, steps, store;
    for (int i = 0; i < 32; i++) zero += format("\tmov.f32 \t%%f%d, 0f00000000;\n", 10 + i);
    for (int s = 0; s < 4; s++)
        steps += format(
            "\tadd.s64 \t%%rd10, %%rd3, %lld;\n\tadd.s64 \t%%rd11, %%rd4, %lld;\n\t{.reg .pred p; setp.ne.b32 p, %%r3, "
            "0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 %s, %%rd10, %%rd11, p, 1, 1, 0, 0;}\n",
            (long long)descriptor(32 * s, 16, 1024), (long long)descriptor(32 * s, 16, 1024),
            registers("%f", 10, 32).c_str());
    for (int i = 0; i < 32; i++) store += format("\tst.global.f32 \t[%%rd7+%d], %%f%d;\n", 4 * i, 10 + i);
    auto replace = [&](const char* what, const std::string& by) {
        for (size_t at = body.find(what); at != std::string::npos; at = body.find(what, at + by.size()))
            body.replace(at, strlen(what), by);
    };
    replace("ZERO", zero);
    replace("MULTIPLY", steps);
    replace("STORE", store);
    replace("ROWS", std::to_string(64 * rounds));
    replace("ROUNDS", std::to_string(rounds));
    ptx::Launch launch;
    launch.block.x = 160;
    launch.shared = 24 * 1024;
    launch.args = {out, {&map, sizeof map}};
    Text k = {".u64, .align 64 .b8 [128]", body,
              ".extern .shared .align 1024 .b8 tile[];\n.shared .align 8 .b8 bars[40];"};
    for (int seed = 1; seed < 6; seed++) {
        if (!runs(module(k), launch, seed)) return;
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < 32; i++) {
                int row = t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + t % 4 * 2 + i % 2,
                    want = 0;
                for (int r = 0; r < rounds; r++)
                    for (int j = 0; j < 64; j++) want += A[r][row][j] * B[j][column];
                if (out[t * 32 + i] != (float)want)
                    return fail(format("d%d of thread %d: %g, not %d", i, t, out[t * 32 + i], want));
            }
    }
}
