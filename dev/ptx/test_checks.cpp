// What the machine must report, each beside the right kernel that must run without a word. Lines with + are of the
// right kernel only, those with - of the wrong one; the report must name the lines with //A and //B.
#include "test.h"

using std::vector;

static ptx::Launch launch(unsigned threads, vector<ptx::Arg> args, unsigned blocks = 1, size_t shared = 0) {
    ptx::Launch l;
    l.block.x = threads;
    l.grid.x = blocks;
    l.shared = shared;
    l.args = args;
    return l;
}

static const char* cells = ".shared .align 1024 .b8 cell[4096];";

// %r1 is this lane's word of the first 32, %r2 that of the lane beside it; all are written
static std::string cell(const std::string& body) {
    return R"(
	mov.u32 	%r50, cell;
	shl.b32 	%r51, %tx, 2;
	add.s32 	%r52, %r50, %r51;
	mov.u32 	%r53, 7;
	st.shared.u32 	[%r52], %r53;
	shl.b32 	%r54, %lane, 2;
	add.s32 	%r1, %r50, %r54;
	xor.b32  	%r55, %r54, 4;
	add.s32 	%r2, %r50, %r55;
	mul.wide.u32 	%rd50, %tx, 4;
	add.s64 	%rd1, %a0, %rd50;
	bar.sync 	0;
)" + body;
}

static void shared_pair(const std::string& kinds, const std::string& body, unsigned threads = 64) {
    Buffer<uint32_t> out(threads, 0);
    pair(kinds, {".u64", cell(body), cells}, launch(threads, {out}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Races; chapter 8: conflicting accesses, not both strong, in no order

TEST(race_warps) {
    shared_pair("race", R"(
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	READ;
	st.shared.u32 	[%r1], %tx; //A
READ:
+	bar.sync 	0;
	setp.eq.s32 	%p1, %warp, 0;
	@%p1 bra 	END;
	ld.shared.u32 	%r3, [%r1]; //B
	st.global.u32 	[%rd1], %r3;
END:)");
}

TEST(race_write_after_read) {
    shared_pair("race", R"(
	ld.shared.u32 	%r3, [%r2]; //A
	st.global.u32 	[%rd1], %r3;
+	bar.sync 	0;
	st.shared.u32 	[%r52], %r3; //B
)");
}

TEST(race_lanes) {  // 9.7.13: bar.warp.sync orders the lanes' accesses
    shared_pair("race", R"(
	st.shared.u32 	[%r1], %tx; //A
+	bar.warp.sync 	-1;
	ld.shared.u32 	%r3, [%r2]; //B
	st.global.u32 	[%rd1], %r3;
)",
                32);
}

TEST(race_lanes_shuffle) {  // shfl.sync exchanges registers; it orders no memory
    shared_pair("race", R"(
	mov.u32 	%r10, 1;
	mov.u32 	%r11, 31;
	mov.u32 	%r12, -1;
	st.shared.u32 	[%r1], %tx; //A
	shfl.sync.bfly.b32 	%r4|%p2, %tx, %r10, %r11, %r12;
+	bar.warp.sync 	-1;
	ld.shared.u32 	%r3, [%r2]; //B
	add.s32 	%r3, %r3, %r4;
	st.global.u32 	[%rd1], %r3;
)",
                32);
}

TEST(race_lanes_write) {  // two lanes of one store
    shared_pair("race", R"(
-	and.b32  	%r3, %lane, 30;
+	and.b32  	%r3, %lane, 31;
	shl.b32 	%r4, %r3, 2;
	add.s32 	%r5, %r50, %r4;
	st.shared.u32 	[%r5], %tx; //A
)",
                32);
}

TEST(race_overlap) {  // bytes count, not first addresses
    shared_pair("race", R"(
	mov.u32 	%r6, 4;
	mov.f32 	%f1, 0f3F800000;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	OTHERS;
	st.shared.v2.f32 	[cell], {%f1, %f1}; //A
OTHERS:
	setp.ne.s32 	%p1, %tx, 32;
	@%p1 bra 	END;
-	st.shared.u32 	[cell+4], %r6; //B
+	st.shared.u32 	[cell+8], %r6; //B
END:)");
}

TEST(race_named_barrier) {  // a barrier that the third warp is not of
    shared_pair("race", R"(
	mov.u32 	%r6, 1;
-	mov.u32 	%r7, 64;
+	mov.u32 	%r7, 96;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	NEXT;
	st.shared.u32 	[%r1], %tx; //A
NEXT:
-	setp.eq.s32 	%p2, %warp, 2;
-	@%p2 bra 	READ;
	bar.sync %r6, %r7;
-READ:
	ld.shared.u32 	%r3, [%r1]; //B
	st.global.u32 	[%rd1], %r3;
)",
                96);
}

TEST(race_arrive) {  // bar.arrive does not wait: the one that reads must sync
    shared_pair("race", R"(
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 64;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	SECOND;
	st.shared.u32 	[%r1], %tx; //A
-	bar.sync %r6, %r7;
+	bar.arrive %r6, %r7;
	bra.uni 	END;
SECOND:
-	bar.arrive %r6, %r7;
+	bar.sync %r6, %r7;
	ld.shared.u32 	%r3, [%r1]; //B
	st.global.u32 	[%rd1], %r3;
END:)");
}

TEST(race_after_arrive) {  // what is written after bar.arrive is not what the barrier orders
    shared_pair("race", R"(
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 64;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	SECOND;
-	bar.arrive %r6, %r7;
	st.shared.u32 	[%r1], %tx; //A
+	bar.arrive %r6, %r7;
	bra.uni 	END;
SECOND:
	bar.sync %r6, %r7;
	ld.shared.u32 	%r3, [%r1]; //B
	st.global.u32 	[%rd1], %r3;
END:)");
}

TEST(race_mbarrier) {
    shared_pair("race", R"(
	add.s32 	%r6, %r50, 2048;
	mov.u32 	%r7, 32;
	mov.u32 	%r8, 0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r6], %r7;
READY:
	bar.sync 	0;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	SECOND;
	st.shared.u32 	[%r1], %tx; //A
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r6];
	bra.uni 	END;
SECOND:
+	WAIT %r6, %r8;
	ld.shared.u32 	%r3, [%r2]; //B
	st.global.u32 	[%rd1], %r3;
END:)");
}

TEST(race_mbarrier_lane) {  // one lane waits; the others are ordered behind it by bar.warp.sync only
    shared_pair("race", R"(
	add.s32 	%r6, %r50, 2048;
	mov.u32 	%r7, 32;
	mov.u32 	%r8, 0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r6], %r7;
READY:
	bar.sync 	0;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	SECOND;
	st.shared.u32 	[%r1], %tx; //A
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r6];
	bra.uni 	END;
SECOND:
	setp.ne.s32 	%p1, %lane, 0;
	@%p1 bra 	READ;
	WAIT %r6, %r8;
READ:
+	bar.warp.sync 	-1;
	ld.shared.u32 	%r3, [%r2]; //B
	st.global.u32 	[%rd1], %r3;
END:)");
}

TEST(race_blocks) {
    Buffer<uint32_t> out(64, 0);
    pair("race", {".u64", R"(
-	mul.wide.u32 	%rd1, %tx, 4;
+	mad.lo.s32 	%r1, %bx, 32, %tx;
+	mul.wide.u32 	%rd1, %r1, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %bx; //A
)"},
         launch(32, {out}, 2));
}

TEST(race_blocks_neighbour) {  // half a word each is no race, the same half is
    Buffer<uint32_t> out(64, 0);
    pair("race", {".u64", R"(
	cvt.u16.u32 	%rs1, %bx;
	mul.wide.u32 	%rd1, %tx, 4;
+	mul.wide.u32 	%rd3, %bx, 2;
+	add.s64 	%rd1, %rd1, %rd3;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u16 	[%rd2], %rs1; //A
)"},
         launch(32, {out}, 2));
}

static const char* flag_body = R"(
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	setp.ne.s32 	%p1, %bx, 0;
	@%p1 bra 	SECOND;
	mov.u32 	%r1, 5;
	mov.u32 	%r2, 1;
FIRST
	bra.uni 	END;
SECOND:
	SPIN [%a1];
	setp.ne.s32 	%p3, %r3, 1;
	@%p3 bra 	SECOND;
	ld.global.u32 	%r6, [%a0]; //B
	st.global.u32 	[%a0+4], %r6;
END:)";

static void flag_pair(const char* first, const char* spin) {
    std::string body = flag_body;
    body.replace(body.find("FIRST"), 5, first);
    size_t at = body.find("\tSPIN [%a1];");
    body.replace(at, 12, spin);
    Buffer<uint32_t> data(2, 0), flag(1, 0);
    pair("race", {".u64, .u64", body}, launch(32, {data, flag}, 2));
}

TEST(race_flag_weak) {  // chapter 8: a flag is written by st.release and read by ld.acquire; weak ones race themselves
    const char* data = "\tst.global.u32 \t[%a0], %r1;\n";
    const char* acquire = "+\tld.acquire.gpu.global.s32 %r3, [%a1];\n-\tld.acquire.gpu.global.s32 %r3, [%a1]; //A";
    std::string body = flag_body;
    body.replace(body.find("FIRST"), 5,
                 std::string(data) + "+\tst.release.gpu.global.s32 [%a1], %r2;\n-\tst.global.u32 \t[%a1], %r2; //A");
    body.replace(body.find("\tSPIN [%a1];"), 12, acquire);
    body.replace(body.find(" //B"), 4, "");
    Buffer<uint32_t> out(2, 0), flag(1, 0);
    pair("race", {".u64, .u64", body}, launch(32, {out, flag}, 2));
}

TEST(race_flag_early) {  // data written after the flag
    flag_pair(
        "-\tst.release.gpu.global.s32 [%a1], %r2;\n\tst.global.u32 \t[%a0], %r1; //A\n+\tst.release.gpu.global.s32 "
        "[%a1], %r2;",
        "\tld.acquire.gpu.global.s32 %r3, [%a1];");
}

TEST(race_flag_others) {  // another thread's data, without a barrier before the flag
    Buffer<uint32_t> data(64, 0), flag(1, 0);
    pair("race", {".u64, .u64", R"(
	mov.u32 	%r2, 1;
	mul.wide.u32 	%rd1, %tx, 4;
	add.s64 	%rd2, %a0, %rd1;
	setp.ne.s32 	%p1, %bx, 0;
	@%p1 bra 	SECOND;
	st.global.u32 	[%rd2], %tx; //A
+	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	st.release.gpu.global.s32 [%a1], %r2;
	bra.uni 	END;
SECOND:
	ld.acquire.gpu.global.s32 %r3, [%a1];
	setp.ne.s32 	%p3, %r3, 1;
	@%p3 bra 	SECOND;
	ld.global.u32 	%r6, [%rd2]; //B
	st.global.u32 	[%rd2+128], %r6;
END:)"},
         launch(32, {data, flag}, 2));
}

TEST(race_atomic) {  // atom is strong, a store beside it is not; atomics alone do not race
    Buffer<uint32_t> out(2, 0);
    pair("race", {".u64", R"(
	mov.u32 	%r1, 9;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	setp.eq.s32 	%p1, %bx, 0;
-	@%p1 bra 	FIRST;
	atom.global.inc.u32 	%r2, [%a0], %r1; //A
-	bra.uni 	END;
-FIRST:
-	st.global.u32 	[%a0], %r1; //B
END:)"},
         launch(32, {out}, 2));
}

TEST(race_ticket) {  // places by an atomic counter are one's own
    Buffer<uint32_t> out(8, 0), counter(1, 0);
    pair("race", {".u64, .u64", R"(
	mov.u32 	%r1, 100;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	atom.global.inc.u32 	%r2, [%a1], %r1;
-	shr.u32 	%r2, %r2, 1;
	mul.wide.u32 	%rd1, %r2, 4;
	add.s64 	%rd2, %a0, %rd1;
	st.global.u32 	[%rd2], %bx; //A
END:)"},
         launch(32, {out, counter}, 8));
}

TEST(race_cp_async_others) {  // 9.7.9: a copy's bytes are there for its own thread; for others behind a barrier
    Buffer<uint32_t> out(32, 0), in(32, 5);
    pair("race|phase",
         {".u64, .u64", cell(R"(
	mov.u32 	%r3, 4;
	add.s64 	%rd2, %a1, %rd50;
	cp.async.ca.shared.global [%r1], [%rd2], 4, %r3; //A
	cp.async.commit_group;
	cp.async.wait_group 0;
+	bar.warp.sync 	-1;
	ld.shared.u32 	%r4, [%r2]; //B
	st.global.u32 	[%rd1], %r4;
)"),
          cells},
         launch(32, {out, in}));
}

TEST(races_off) {  // without options.races only the rest is looked for
    if (!write_to.empty()) return;
    Buffer<uint32_t> out(64, 0);
    Text k = {".u64", "\tmul.wide.u32 \t%rd1, %tx, 4;\n\tadd.s64 \t%rd2, %a0, %rd1;\n\tst.global.u32 \t[%rd2], %bx;"};
    ptx::options.races = false;
    runs(module(k), launch(32, {out}, 2));
    k.body += "\n\tst.global.u32 \t[%rd2+512], %bx; //A";
    reports("address", module(k), launch(32, {out}, 2));
    ptx::options.races = true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies that are under way

TEST(phase_cp_async) {
    Buffer<uint32_t> out(64, 0), in(64, 5);
    pair("phase",
         {".u64, .u64", cell(R"(
	mov.u32 	%r3, 4;
	add.s64 	%rd2, %a1, %rd50;
	cp.async.ca.shared.global [%r1], [%rd2], 4, %r3; //A
	cp.async.commit_group;
+	cp.async.wait_group 0;
	ld.shared.u32 	%r4, [%r1]; //B
	st.global.u32 	[%rd1], %r4;
)"),
          cells},
         launch(32, {out, in}));
}

TEST(phase_cp_async_second) {  // wait_group 1 leaves the latest group under way
    Buffer<uint32_t> out(64, 0), in(64, 5);
    pair("phase",
         {".u64, .u64", cell(R"(
	mov.u32 	%r3, 4;
	add.s64 	%rd2, %a1, %rd50;
	add.s32 	%r5, %r1, 512;
	cp.async.ca.shared.global [%r1], [%rd2], 4, %r3;
	cp.async.commit_group;
	cp.async.ca.shared.global [%r5], [%rd2], 4, %r3; //A
	cp.async.commit_group;
-	cp.async.wait_group 1;
+	cp.async.wait_group 0;
	ld.shared.u32 	%r4, [%r5]; //B
	st.global.u32 	[%rd1], %r4;
)"),
          cells},
         launch(32, {out, in}));
}

TEST(phase_cp_async_uncommitted) {  // what no commit_group has put in a group, no wait_group waits for
    Buffer<uint32_t> out(64, 0), in(64, 5);
    pair("phase",
         {".u64, .u64", cell(R"(
	mov.u32 	%r3, 4;
	add.s64 	%rd2, %a1, %rd50;
	cp.async.ca.shared.global [%r1], [%rd2], 4, %r3; //A
+	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.u32 	%r4, [%r1]; //B
	st.global.u32 	[%rd1], %r4;
)"),
          cells},
         launch(32, {out, in}));
}

struct alignas(64) Map {
    void* base;
    uint64_t dims[4], strides[4];
    uint32_t box[4];
    int made;
};

static Map rows(void* base, uint64_t count, uint32_t box) {  // of 64 bf16
    return {base, {64, count, 1, 1}, {2, 128, 1 << 20, 1 << 20}, {64, box, 1, 1}, 0x54414d50};
}

// Thread 0 has two mbarriers of count 1 (in %r10, %r11); the map is in %rd2, two tiles of 8 rows at %r1 and %r2
static std::string copies(const std::string& body) {
    return R"(
	mov.b64 	%rd1, tried_param_1;
	cvta.param.u64 	%rd2, %rd1;
	mov.u32 	%r1, cell;
	add.s32 	%r2, %r1, 1024;
	add.s32 	%r10, %r1, 2048;
	add.s32 	%r11, %r1, 2056;
	mov.u32 	%r12, 0;
	mov.u32 	%r13, 1;
	mov.u32 	%r14, 1024;
	mov.u32 	%r15, 8;
	shl.b32 	%r16, %tx, 2;
	add.s32 	%r17, %r1, %r16;
	mul.wide.u32 	%rd3, %tx, 4;
	add.s64 	%rd4, %a0, %rd3;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r10], %r13;
	mbarrier.init.shared::cta.b64 [%r11], %r13;
	fence.mbarrier_init.release.cluster;
READY:
	bar.sync 	0;
)" + body;
}

#define EXPECT_TX(bar, bytes) "\tmbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [" bar "], " bytes ";"
#define LOAD(to, row, bar)                                                                                      \
    "\tcp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [" to "], [%rd2, {%r12," row \
    ",%r12,%r12}], [" bar "];"
#define STORE(row, from) \
    "\tcp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd2, {%r12," row ",%r12,%r12}], [" from "];"

static void copies_pair(const std::string& kinds, const std::string& body, unsigned threads = 64) {
    Buffer<uint32_t> out(64, 0);
    Buffer<uint16_t> tensor(64 * 32, 0x3f80);
    Map map = rows(tensor.at, 32, 8);
    pair(kinds, {".u64, .align 64 .b8 [128]", copies(body), cells}, launch(threads, {out, {&map, sizeof map}}));
}

TEST(phase_tensor_load) {
    copies_pair("phase", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //A
NEXT:
	bar.sync 	0;
+	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17]; //B
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(phase_parity) {  // the phase before the first is over: parity 1 lets through at once
    copies_pair("phase", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //A
NEXT:
	bar.sync 	0;
-	WAIT %r10, %r13;
+	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17]; //B
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(phase_parity_second) {  // and parity 0 once more in the second phase
    copies_pair("phase", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	WAIT %r10, %r12;
	bar.sync 	0;
	@%p1 bra 	AGAIN;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r15", "%r10") R"( //A
AGAIN:
	bar.sync 	0;
-	WAIT %r10, %r12;
+	WAIT %r10, %r13;
	ld.shared.u32 	%r3, [%r17]; //B
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(phase_other_barrier) {  // a wait for the other tile's barrier
    copies_pair("phase", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //A
)" EXPECT_TX("%r11", "%r14") "\n" LOAD("%r2", "%r15", "%r11") R"(
NEXT:
	bar.sync 	0;
	WAIT %r11, %r12;
+	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17]; //B
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(phase_without_expect) {  // an arrive without expect_tx: the phase may be over before the bytes are there
    copies_pair("phase|stuck", R"(
	@%p1 bra 	NEXT;
-	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r10];
+)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	bar.sync 	0;
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(stuck_expect_more) {
    copies_pair("stuck", R"(
	@%p1 bra 	NEXT;
-	add.s32 	%r14, %r14, 16;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	bar.sync 	0;
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(stuck_expect_less) {
    copies_pair("stuck|phase", R"(
	@%p1 bra 	NEXT;
-	sub.s32 	%r14, %r14, 16;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	bar.sync 	0;
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(stuck_outside_counts) {  // the whole box counts, also what lies outside of the tensor
    copies_pair("stuck|phase", R"(
	mov.u32 	%r18, 28;
	@%p1 bra 	NEXT;
-	shr.u32 	%r14, %r14, 1;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r18", "%r10") R"(
NEXT:
	bar.sync 	0;
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(stuck_no_load) {
    copies_pair("stuck", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n+" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	bar.sync 	0;
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)");
}

TEST(stuck_mbarrier_count) {  // one arrival of two
    shared_pair("stuck", R"(
	add.s32 	%r6, %r50, 2048;
-	mov.u32 	%r7, 2;
+	mov.u32 	%r7, 1;
	mov.u32 	%r8, 0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	READY;
	mbarrier.init.shared::cta.b64 [%r6], %r7;
	mbarrier.arrive.release.cta.shared::cta.b64 _, [%r6];
READY:
	bar.sync 	0;
	WAIT %r6, %r8;
)");
}

TEST(overwritten_slot) {  // the next load into a tile that others still read
    copies_pair("race|proxy|phase", R"(
	@%p1 bra 	NEXT;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
NEXT:
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17]; //B
	st.global.u32 	[%rd4], %r3;
+	fence.proxy.async.shared::cta;
+	bar.sync 	0;
	@%p1 bra 	END;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r15", "%r10") R"( //A
	WAIT %r10, %r13;
END:)");
}

TEST(overwritten_written) {  // a generic write to a tile that a load is under way to
    copies_pair("race|proxy|phase", R"(
	@%p1 bra 	END;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //A
+	WAIT %r10, %r12;
	st.shared.u32 	[%r17], %r12; //B
-	WAIT %r10, %r12;
END:)");
}

TEST(overwritten_source) {  // 9.7.9: a store's bytes may be written again behind wait_group.read
    copies_pair("race|proxy|phase", R"(
	@%p1 bra 	END;
	st.shared.u32 	[cell], %r13;
	fence.proxy.async.shared::cta;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"(
	WAIT %r10, %r12;
)" STORE("%r15", "%r1") R"( //A
	cp.async.bulk.commit_group;
+	cp.async.bulk.wait_group.read 0;
	st.shared.u32 	[cell+64], %r13; //B
-	cp.async.bulk.wait_group.read 0;
END:)");
}

TEST(overwritten_bulk_source) {  // and that of a bulk copy, by another thread, which a barrier puts behind the wait
    Buffer<uint32_t> out(32, 0);
    pair("race|proxy|phase",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	NEXT;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //A
	cp.async.bulk.commit_group;
+	cp.async.bulk.wait_group.read 0;
NEXT:
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 33;
	@%p1 bra 	END;
	st.shared.u32 	[cell+64], %r3; //B
END:
	bar.sync 	0;
-	setp.ne.s32 	%p1, %tx, 0;
-	@%p1 bra 	DONE;
-	cp.async.bulk.wait_group.read 0;
-DONE:)"),
          cells},
         launch(64, {out}));
}

TEST(bulk_result) {  // wait_group.read waits for the reads alone; behind wait_group the written bytes are there
    Buffer<uint32_t> out(64, 0);
    pair("race|proxy|phase",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //A
	cp.async.bulk.commit_group;
-	cp.async.bulk.wait_group.read 0;
+	cp.async.bulk.wait_group 0;
	ld.global.u32 	%r4, [%a0]; //B
	st.global.u32 	[%a0+128], %r4;
END:)"),
          cells},
         launch(64, {out}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Proxies; 9.7.13 fence.proxy: what the generic proxy wrote is not yet what the async proxy reads

TEST(proxy_bulk) {
    Buffer<uint32_t> out(32, 0);
    pair("proxy",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	st.shared.u32 	[%r52], %tx; //A
+	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //B
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)"),
          cells},
         launch(64, {out}));
}

TEST(proxy_bulk_same_thread) {
    Buffer<uint32_t> out(32, 0);
    pair("proxy",
         {".u64", cell(R"(
	mov.u32 	%r3, 16;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	st.shared.u32 	[cell+4], %r3; //A
+	fence.proxy.async.shared::cta;
	cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%a0], [%r50], %r3; //B
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)"),
          cells},
         launch(64, {out}));
}

TEST(proxy_all_lanes) {  // that all lanes of a warp execute a fence does not order them among themselves
    Buffer<uint32_t> out(32, 0);
    pair("race|proxy",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	st.shared.u32 	[%r52], %tx; //A
	fence.proxy.async.shared::cta;
+	bar.warp.sync 	-1;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //B
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)"),
          cells},
         launch(32, {out}));
}

TEST(proxy_without_barrier) {  // a fence of its own orders nothing between threads
    Buffer<uint32_t> out(32, 0);
    pair("race|proxy",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 40;
	@%p1 bra 	NEXT;
	st.shared.u32 	[cell+64], %r3; //A
	fence.proxy.async.shared::cta;
NEXT:
+	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //B
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)"),
          cells},
         launch(64, {out}));
}

TEST(proxy_tensor_store) {
    copies_pair("proxy", R"(
	add.s32 	%r18, %r17, 0;
STORED:
	st.shared.u32 	[%r18], %tx; //A
	add.s32 	%r18, %r18, 256;
	add.s32 	%r19, %r1, 1024;
	setp.lt.u32 	%p2, %r18, %r19;
	@%p2 bra 	STORED;
+	fence.proxy.async.shared::cta;
	bar.sync 	0;
	@%p1 bra 	END;
)" STORE("%r15", "%r1") R"( //B
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)");
}

TEST(proxy_tensor_load_global) {  // global memory that the kernel itself has written
    Buffer<uint32_t> out(64, 0);
    Buffer<uint16_t> tensor(64 * 32, 0x3f80);
    Map map = rows(tensor.at, 32, 8);
    for (const char* fence : {"fence.proxy.async.global;", "fence.proxy.async;"})
        pair("proxy",
             {".u64, .align 64 .b8 [128], .u64", copies(std::string(R"(
	@%p1 bra 	NEXT;
	st.global.u32 	[%a2+64], %r12; //A
+	)") + fence + "\n" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //B
NEXT:
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)"),
              cells},
             launch(64, {out, {&map, sizeof map}, tensor}));
}

TEST(proxy_other_space) {  // a fence of shared memory is none of global memory
    Buffer<uint32_t> out(64, 0);
    Buffer<uint16_t> tensor(64 * 32, 0x3f80);
    Map map = rows(tensor.at, 32, 8);
    pair("proxy",
         {".u64, .align 64 .b8 [128], .u64", copies(R"(
	@%p1 bra 	NEXT;
	st.global.u32 	[%a2+64], %r12; //A
-	fence.proxy.async.shared::cta;
+	fence.proxy.async.global;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //B
NEXT:
	WAIT %r10, %r12;
	ld.shared.u32 	%r3, [%r17];
	st.global.u32 	[%rd4], %r3;
)"),
          cells},
         launch(64, {out, {&map, sizeof map}, tensor}));
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma; 9.7.15

static std::string registers(const char* prefix, int from, int n) {
    std::string list = "{";
    for (int i = 0; i < n; i++) list += (i ? "," : "") + std::string(prefix) + std::to_string(from + i);
    return list + "}";
}

// All of 32 KiB is written and fenced, then `body`. Tiles of 64 x 64, K-major: descriptors in %rd10, %rd11; A's
// registers are %r20 to %r23, the accumulator's %f10 to %f41. MMA and MMA_REGISTERS stand for the instruction.
static std::string matrices(const std::string& body) {
    std::string out = R"(
	mov.u32 	%r1, tile;
	shl.b32 	%r2, %tx, 2;
	mov.u32 	%r3, 1065369472;
FILL:
	add.s32 	%r4, %r1, %r2;
	st.shared.u32 	[%r4], %r3;
	add.s32 	%r2, %r2, 512;
	setp.lt.s32 	%p1, %r2, 32768;
	@%p1 bra 	FILL;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	shl.b32 	%r6, %tx, 2;
	add.s32 	%r7, %r1, %r6;
	and.b32  	%r4, %r1, 262143;
	shr.u32 	%r5, %r4, 4;
	cvt.u64.u32 	%rd3, %r5;
	add.s64 	%rd10, %rd3, DESCRIPTOR;
	add.s64 	%rd11, %rd10, 512;
	mov.u32 	%r20, %r3;
	mov.u32 	%r21, %r3;
	mov.u32 	%r22, %r3;
	mov.u32 	%r23, %r3;
	mov.u32 	%r10, 1;
	mul.wide.u32 	%rd1, %tx, 4;
	add.s64 	%rd2, %a0, %rd1;
)";
    uint64_t descriptor = (uint64_t)1 << 62 | (uint64_t)64 << 32 | 1 << 16;
    for (int i = 0; i < 32; i++) out += format("\tmov.f32 \t%%f%d, 0f00000000;\n", 10 + i);
    out += body;
    auto replace = [&](const char* what, const std::string& by) {
        for (size_t at = out.find(what); at != std::string::npos; at = out.find(what, at + by.size()))
            out.replace(at, strlen(what), by);
    };
    std::string head =
        "\t{.reg .pred p; setp.ne.b32 p, %r10, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " +
        registers("%f", 10, 32);
    replace("DESCRIPTOR", std::to_string(descriptor));
    replace("MMA_REGISTERS", head + ", " + registers("%r", 20, 4) + ", %rd11, p, 1, 1, 0;}");
    replace("MMA", head + ", %rd10, %rd11, p, 1, 1, 0, 0;}");
    return out;
}

static void wgmma_pair(const std::string& kinds, const std::string& body, unsigned threads = 128) {
    Buffer<float> out(threads, 0);
    pair(kinds, {".u64", matrices(body), ".shared .align 1024 .b8 tile[32768];"}, launch(threads, {out}));
}

TEST(wgmma_result) {
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
+	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f41; //B
-	wgmma.wait_group.sync.aligned 0;
)");
}

TEST(wgmma_result_group) {  // the second of two groups
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA
	wgmma.commit_group.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
-	wgmma.wait_group.sync.aligned 1;
+	wgmma.wait_group.sync.aligned 0;
	add.f32 	%f1, %f10, %f11; //B
	st.global.f32 	[%rd2], %f1;
-	wgmma.wait_group.sync.aligned 0;
)");
}

TEST(wgmma_warps) {  // "the same wgmma.mma_async instruction" by the four warps, with the same descriptors
    wgmma_pair("wgmma", R"(
-	cvt.u64.u32 	%rd4, %warp;
-	shl.b64 	%rd4, %rd4, 6;
-	add.s64 	%rd11, %rd11, %rd4;
	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f41;
)");
    wgmma_pair("wgmma", R"(
-	setp.eq.s32 	%p1, %warp, 2;
-	@%p1 bra 	END;
	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f41;
END:
)");
}

TEST(wgmma_uncommitted) {
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA //A
+	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f10; //B
)");
}

TEST(wgmma_accumulator_changed) {  // written while under way
    wgmma_pair("wgmma", R"(
	mov.f32 	%f1, 0f3F800000;
	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
+	wgmma.wait_group.sync.aligned 0;
	add.f32 	%f20, %f1, %f1; //B
-	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_a_changed) {  // A's registers are read while under way
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA_REGISTERS //A
	wgmma.commit_group.sync.aligned;
+	wgmma.wait_group.sync.aligned 0;
	add.s32 	%r22, %r3, 1; //B
-	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_first_fence) {  // a fence is wanted before the first, for registers that were written
    wgmma_pair("wgmma", R"(
+	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_fence_again) {  // and after A's registers were written anew
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA_REGISTERS
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	add.s32 	%r21, %r3, 1;
+	wgmma.fence.sync.aligned;
MMA_REGISTERS //A
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_fence_accumulator) {  // and after the accumulator was scaled; without one between multiplications alone
    wgmma_pair("wgmma", R"(
	wgmma.fence.sync.aligned;
MMA
MMA
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	add.f32 	%f33, %f33, %f33;
+	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_proxy) {  // shared memory that was written by ordinary stores
    wgmma_pair("proxy", R"(
	mov.u32 	%r8, 0;
	st.shared.u32 	[%r7], %r8; //A
+	fence.proxy.async.shared::cta;
	bar.sync 	0;
	wgmma.fence.sync.aligned;
MMA //B
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_proxy_b) {  // B's bytes, of another warp
    wgmma_pair("proxy", R"(
	mov.u32 	%r8, 0;
	setp.ne.s32 	%p1, %warp, 3;
	@%p1 bra 	NEXT;
	st.shared.u32 	[%r7+8192], %r8; //A
+	fence.proxy.async;
NEXT:
	bar.sync 	0;
	wgmma.fence.sync.aligned;
MMA_REGISTERS //B
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_overwritten) {  // shared memory is read until the wait
    wgmma_pair("race|proxy|wgmma", R"(
	mov.u32 	%r8, 0;
	wgmma.fence.sync.aligned;
MMA //A
	wgmma.commit_group.sync.aligned;
+	wgmma.wait_group.sync.aligned 0;
+	bar.sync 	0;
	st.shared.u32 	[%r7], %r8; //B
-	wgmma.wait_group.sync.aligned 0;
	st.global.f32 	[%rd2], %f20;
)");
}

TEST(wgmma_phase) {  // a tile that the copy engine brings, multiplied before the wait
    Buffer<float> out(128, 0);
    Buffer<uint16_t> tensor(64 * 32, 0x3f80);
    Map map = rows(tensor.at, 32, 8);
    pair("phase",
         {".u64, .align 64 .b8 [128]", matrices(R"(
	mov.b64 	%rd20, tried_param_1;
	cvta.param.u64 	%rd2, %rd20;
	add.s32 	%r30, %r1, 24576;
	mov.u32 	%r12, 0;
	mov.u32 	%r14, 1024;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	NEXT;
	mbarrier.init.shared::cta.b64 [%r30], %r10;
	fence.mbarrier_init.release.cluster;
)" EXPECT_TX("%r30", "%r14") "\n" LOAD("%r1", "%r12", "%r30") R"( //A
NEXT:
	bar.sync 	0;
+	WAIT %r30, %r12;
	wgmma.fence.sync.aligned;
MMA //B
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
-	WAIT %r30, %r12;
	add.s64 	%rd2, %a0, %rd1;
	st.global.f32 	[%rd2], %f20;
)"),
          ".shared .align 1024 .b8 tile[32768];"},
         launch(128, {out, {&map, sizeof map}}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and registers

TEST(barrier_missing) {  // nobody else comes
    shared_pair("stuck|barrier", R"(
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 64;
-	setp.ne.s32 	%p1, %warp, 0;
-	@%p1 bra 	END;
	bar.sync %r6, %r7;
END:)");
}

TEST(barrier_counts) {  // 9.7.13: the same count of all
    shared_pair("barrier|stuck", R"(
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 64;
-	mad.lo.s32 	%r7, %warp, 32, 32;
-	max.s32 	%r7, %r7, 64;
	setp.eq.s32 	%p1, %warp, 3;
	@%p1 bra 	END;
-	bar.sync %r6, %r7; //A
+	shr.u32 	%r8, %warp, 1;
+	add.s32 	%r6, %r6, %r8;
+	setp.eq.s32 	%p1, %warp, 2;
+	@%p1 bra 	END;
+	bar.sync %r6, %r7;
END:)",
                128);
}

TEST(barrier_multiple) {  // and a multiple of a warp
    shared_pair("barrier", R"(
	mov.u32 	%r6, 1;
-	mov.u32 	%r7, 40;
+	mov.u32 	%r7, 64;
	bar.sync %r6, %r7; //A
)");
}

TEST(barrier_number) {  // of sixteen
    shared_pair("barrier", R"(
-	mov.u32 	%r6, 16;
+	mov.u32 	%r6, 15;
	mov.u32 	%r7, 64;
	bar.sync %r6, %r7; //A
)");
}

TEST(barrier_divergent) {  // bar.sync is .aligned: all threads of a warp execute the same one
    shared_pair("barrier|stuck", R"(
	setp.gt.u32 	%p1, %lane, 15;
-	@%p1 bra 	UPPER;
-	bar.sync 	0;
-	bra.uni 	END;
-UPPER:
	bar.sync 	0;
END:)");
}

TEST(barrier_twice) {  // a warp arrives twice at a barrier that waits for another
    shared_pair("barrier|stuck", R"(
	mov.u32 	%r6, 1;
	mov.u32 	%r7, 96;
	setp.ne.s32 	%p1, %warp, 0;
	@%p1 bra 	SECOND;
	bar.arrive %r6, %r7;
-	bar.arrive %r6, %r7;
	bra.uni 	END;
SECOND:
+	bar.sync %r6, %r7;
-	setp.eq.s32 	%p1, %warp, 1;
-	@%p1 bra 	END;
-	bar.arrive %r6, %r7;
-	bar.sync %r6, %r7;
END:)",
                96);
}

TEST(registers_inc) {  // 9.7.19: inc blocks until the block's pool has enough
    Buffer<uint32_t> out(64, 0);
    for (int registers : {128, 168}) {
        ptx::options.registers = registers == 168 ? 0 : registers;  // 168: what .maxntid 384 leaves of 65536
        bool three = registers == 168;
        std::string body = R"(
	setp.gt.u32 	%p1, %tx, 127;
	@%p1 bra 	OTHERS;
	setmaxnreg.dec.sync.aligned.u32 24;
	bra.uni 	END;
OTHERS:
-	setmaxnreg.inc.sync.aligned.u32 MORE; //A
+	setmaxnreg.inc.sync.aligned.u32 MOST;
END:
	bar.sync 	0;)";
        body.replace(body.find("MORE"), 4, three ? "248" : "240");
        body.replace(body.find("MOST"), 4, three ? "240" : "232");
        pair("stuck|registers",
             {".u64", body, "", three ? ".maxntid 384, 1, 1\n.minnctapersm 1" : ".maxntid 256, 1, 1\n.minnctapersm 1"},
             launch(three ? 384 : 256, {out}));
    }
    ptx::options.registers = 0;
}

static void registers_pair(const std::string& kinds, const std::string& body) {
    Buffer<uint32_t> out(64, 0);
    ptx::options.registers = 128;
    pair(kinds, {".u64", body, "", ".maxntid 256, 1, 1\n.minnctapersm 1"}, launch(256, {out}));
    ptx::options.registers = 0;
}

TEST(registers_no_dec) {
    registers_pair("stuck|registers", R"(
	setp.gt.u32 	%p1, %tx, 127;
	@%p1 bra 	OTHERS;
+	setmaxnreg.dec.sync.aligned.u32 40;
	bra.uni 	END;
OTHERS:
	setmaxnreg.inc.sync.aligned.u32 216;
END:
	bar.sync 	0;)");
}

TEST(registers_dec_to_more) {  // dec to more than there are is undefined, so is inc to fewer
    registers_pair("registers", R"(
-	setmaxnreg.dec.sync.aligned.u32 160; //A
+	setmaxnreg.dec.sync.aligned.u32 104; //A
)");
}

TEST(registers_inc_to_less) {
    registers_pair("registers", R"(
	setp.gt.u32 	%p1, %tx, 127;
	@%p1 bra 	OTHERS;
	setmaxnreg.dec.sync.aligned.u32 40;
	bra.uni 	END;
OTHERS:
-	setmaxnreg.inc.sync.aligned.u32 120; //A
+	setmaxnreg.inc.sync.aligned.u32 136; //A
END:)");
}

TEST(registers_warp_alone) {  // all warps of the four execute it
    registers_pair("registers|stuck|barrier", R"(
-	setp.ne.s32 	%p1, %warp, 1;
-	@%p1 bra 	END;
	setmaxnreg.dec.sync.aligned.u32 40;
END:)");
}

// ---------------------------------------------------------------------------------------------------------------------
// Addresses

static void global_pair(const std::string& kinds, const std::string& body, size_t words = 32, unsigned threads = 32) {
    Buffer<uint32_t> out(words, 3);
    pair(kinds,
         {".u64", "\tmul.wide.u32 \t%rd1, %tx, 4;\n\tadd.s64 \t%rd2, %a0, %rd1;\n\tmov.f32 \t%f1, 0f3F800000;\n" + body,
          cells},
         launch(threads, {out}));
}

TEST(address_store) {
    global_pair("address", R"(
-	st.global.u32 	[%rd2+4], %tx; //A
+	st.global.u32 	[%rd2], %tx; //A
)");
}

TEST(address_load) {
    global_pair("address", R"(
-	ld.global.u32 	%r1, [%rd2+-4]; //A
+	ld.global.u32 	%r1, [%rd2]; //A
)");
}

TEST(address_tail) {  // the last bytes of a vector
    global_pair("address", R"(
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	st.global.v4.f32 	[%a0+96], {%f1, %f1, %f1, %f1}; //A
+	st.global.v2.f32 	[%a0+96], {%f1, %f1}; //A
END:)",
                26);
}

TEST(address_null) {
    global_pair("address", R"(
	mov.u64 	%rd3, 0;
-	ld.global.u32 	%r1, [%rd3]; //A
)");
}

TEST(address_guarded) {  // a lane that its guard holds back touches nothing
    global_pair("address", R"(
+	setp.lt.s32 	%p1, %tx, 16;
+	@!%p1 bra 	END;
	st.global.u32 	[%rd2], %tx; //A
END:)",
                16);
}

TEST(address_shared) {  // beyond what the block has
    global_pair("address", R"(
	mov.u32 	%r1, cell;
	shl.b32 	%r2, %tx, 7;
	add.s32 	%r3, %r1, %r2;
-	st.shared.u32 	[%r3+128], %tx; //A
+	st.shared.u32 	[%r3+124], %tx; //A
)");
}

TEST(address_dynamic) {  // launched with too few bytes
    Buffer<uint32_t> out(32, 0);
    Text k = {".u64",
              "\tmov.u32 \t%r1, dynamic;\n\tshl.b32 \t%r2, %tx, 4;\n\tadd.s32 \t%r3, %r1, %r2;\n\tst.shared.u32 "
              "\t[%r3+12], %tx; //A",
              ".extern .shared .align 16 .b8 dynamic[];"};
    reports("address", module(k), launch(32, {out}, 1, 508));
    runs(module(k), launch(32, {out}, 1, 512));
}

TEST(address_freed) {
    if (!write_to.empty()) return;
    void* stale;
    std::string text = module({".u64", "\tst.global.u32 \t[%a0], %tx; //A"});
    {
        Buffer<uint32_t> out(32, 0);
        stale = out.at;
        runs(text, launch(1, {out}));
    }
    reports("address", text, launch(1, {{&stale, sizeof stale}}));
}

TEST(address_copies) {  // those of asynchronous copies, read and written
    Buffer<uint32_t> out(32, 0);
    pair("address",
         {".u64", cell(R"(
	mov.u32 	%r3, 4;
-	cp.async.ca.shared.global [%r1], [%rd1+64], 4, %r3; //A
+	cp.async.ca.shared.global [%r1], [%rd1], 4, %r3; //A
	cp.async.commit_group;
	cp.async.wait_group 0;
)"),
          cells},
         launch(32, {out}));
    pair("address",
         {".u64", cell(R"(
	mov.u32 	%r3, 128;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	cp.async.bulk.global.shared::cta.bulk_group [%a0+16], [%r50], %r3; //A
+	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //A
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)"),
          cells},
         launch(32, {out}));
}

TEST(address_source_size) {  // bytes beyond src-size are not read
    Buffer<uint32_t> out(32, 0);
    pair("address",
         {".u64", cell(R"(
-	mov.u32 	%r3, 4;
+	mov.u32 	%r3, 0;
	cp.async.ca.shared.global [%r1], [%rd1+4096], 4, %r3; //A
	cp.async.commit_group;
	cp.async.wait_group 0;
)"),
          cells},
         launch(32, {out}));
}

TEST(address_tensor) {  // a map of more rows than the allocation has
    if (!write_to.empty()) return;
    Buffer<uint32_t> out(64, 0);
    Buffer<uint16_t> tensor(64 * 32, 0x3f80);
    for (uint64_t count : {32, 28}) {
        Map map = rows(tensor.at, count + 4, 8);
        std::string text =
            module({".u64, .align 64 .b8 [128]",
                    copies("\tmov.u32 \t%r18, 26;\n\t@%p1 bra \tEND;\n" EXPECT_TX("%r10", "%r14") "\n" LOAD(
                        "%r1", "%r18", "%r10") " //A\n\tWAIT %r10, %r12;\nEND:"),
                    cells});
        if (count == 32)
            reports("address", text, launch(64, {out, {&map, sizeof map}}));
        else
            runs(text, launch(64, {out, {&map, sizeof map}}));
    }
}

// 6.4: an access is aligned to its size
TEST(alignment_vector) {
    global_pair("alignment", R"(
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%a0+8]; //A
+	ld.global.v4.u32 	{%r1, %r2, %r3, %r4}, [%a0+16]; //A
END:)");
}

TEST(alignment_word) {
    global_pair("alignment", R"(
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	st.global.u32 	[%a0+2], %tx; //A
+	st.global.u32 	[%a0+4], %tx; //A
END:)");
}

TEST(alignment_shared) {
    global_pair("alignment", R"(
	mov.u32 	%r1, cell;
	shl.b32 	%r2, %tx, 3;
	add.s32 	%r3, %r1, %r2;
-	st.shared.v2.f32 	[%r3+4], {%f1, %f1}; //A
+	st.shared.v2.f32 	[%r3+8], {%f1, %f1}; //A
)");
}

TEST(alignment_cp_async) {
    Buffer<uint32_t> out(32, 0);
    pair("alignment",
         {".u64", R"(
	mov.u32 	%r1, cell;
	mov.u32 	%r3, 16;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	cp.async.cg.shared.global.L2::128B [%r1], [%a0+8], 16, %r3; //A
+	cp.async.cg.shared.global.L2::128B [%r1], [%a0+16], 16, %r3; //A
	cp.async.commit_group;
	cp.async.wait_group 0;
END:)",
          cells},
         launch(32, {out}));
}

TEST(alignment_ldmatrix) {  // rows are of 16 bytes
    shared_pair("alignment", R"(
	mul.lo.s32 	%r3, %lane, 16;
-	add.s32 	%r4, %r50, 8;
+	add.s32 	%r4, %r50, 0;
	add.s32 	%r4, %r4, %r3;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10,%r11,%r12,%r13}, [%r4]; //A
)",
                256);
}

TEST(alignment_mbarrier) {
    global_pair("alignment", R"(
	mov.u32 	%r1, cell;
-	add.s32 	%r1, %r1, 4;
	mov.u32 	%r2, 1;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
	mbarrier.init.shared::cta.b64 [%r1], %r2; //A
END:)");
}

TEST(alignment_tensor) {  // 5: shared addresses of tensor copies, 128 bytes
    copies_pair("alignment", R"(
-	add.s32 	%r1, %r1, 16;
	@%p1 bra 	END;
)" EXPECT_TX("%r10", "%r14") "\n" LOAD("%r1", "%r12", "%r10") R"( //A
	WAIT %r10, %r12;
END:)");
}

TEST(alignment_bulk) {  // sizes and addresses of 16 bytes
    Buffer<uint32_t> out(32, 0);
    for (bool size : {false, true}) {
        std::string body = R"(
	mov.u32 	%r3, 16;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	setp.ne.s32 	%p1, %tx, 0;
	@%p1 bra 	END;
-	add.s32 	%rXX, %rXX, 8;
	cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r50], %r3; //A
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
END:)";
        for (size_t at = body.find("XX"); at != std::string::npos; at = body.find("XX"))
            body.replace(at, 2, size ? "3" : "50");
        pair("alignment", {".u64", cell(body), cells}, launch(64, {out}));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What was never written

TEST(poison_register) {
    global_pair("poison", R"(
+	mov.u32 	%r9, 4;
	st.global.u32 	[%rd2], %r9; //A
)");
}

TEST(poison_branch) {
    global_pair("poison", R"(
+	mov.u32 	%r9, 4;
	setp.eq.s32 	%p1, %r9, 4;
	@%p1 bra 	END; //A
	st.global.u32 	[%rd2], %tx;
END:)");
}

TEST(poison_address) {
    global_pair("poison", R"(
+	mov.u32 	%r9, 0;
	mul.wide.u32 	%rd3, %r9, 4;
	add.s64 	%rd4, %rd2, %rd3;
	ld.global.u32 	%r1, [%rd4]; //A
)");
}

TEST(poison_path) {  // written by one branch only
    global_pair("poison", R"(
	setp.lt.s32 	%p1, %tx, 20;
	@%p1 bra 	NEXT;
	mov.u32 	%r9, 4;
-	bra.uni 	JOIN;
NEXT:
+	mov.u32 	%r9, 5;
-JOIN:
	st.global.u32 	[%rd2], %r9; //A
)");
}

TEST(poison_shared) {
    global_pair("poison", R"(
	mov.u32 	%r1, cell;
	shl.b32 	%r2, %tx, 2;
	add.s32 	%r3, %r1, %r2;
+	st.shared.u32 	[%r3], %tx;
	ld.shared.u32 	%r4, [%r3];
	add.s32 	%r5, %r4, 1;
	st.global.u32 	[%rd2], %r5; //A
)");
}

TEST(poison_shared_part) {  // half of a vector
    Buffer<uint32_t> out(64, 0);
    pair("poison",
         {".u64", R"(
	mul.wide.u32 	%rd1, %tx, 8;
	add.s64 	%rd2, %a0, %rd1;
	mov.u32 	%r1, cell;
	shl.b32 	%r2, %tx, 3;
	add.s32 	%r3, %r1, %r2;
	st.shared.u32 	[%r3], %tx;
+	st.shared.u32 	[%r3+4], %tx;
	ld.shared.v2.f32 	{%f1, %f2}, [%r3];
	st.global.v2.f32 	[%rd2], {%f1, %f2}; //A
)",
          cells},
         launch(32, {out}));
}

TEST(poison_unused) {  // what is not used may be unwritten
    Buffer<uint32_t> out(32, 0);
    runs(module({".u64",
                 "\tmov.u32 \t%r1, cell;\n\tshl.b32 \t%r2, %tx, 2;\n\tadd.s32 \t%r3, %r1, %r2;\n\tld.shared.u32 \t%r4, "
                 "[%r3];\n"
                 "\tadd.s32 \t%r5, %r4, %r9;\n\tmul.wide.u32 \t%rd1, %tx, 4;\n\tadd.s64 \t%rd2, %a0, "
                 "%rd1;\n\tst.global.u32 \t[%rd2], %tx;",
                 cells}),
         launch(32, {out}));
}

TEST(poison_shuffled) {  // through a shuffle from another lane
    global_pair("poison", R"(
	mov.u32 	%r10, 1;
	mov.u32 	%r11, 31;
	mov.u32 	%r12, -1;
	setp.eq.s32 	%p1, %tx, 5;
+	mov.u32 	%r9, 1;
-	@%p1 bra 	NEXT;
	mov.u32 	%r9, 4;
-NEXT:
	shfl.sync.bfly.b32 	%r4|%p2, %r9, %r10, %r11, %r12;
	setp.ne.s32 	%p3, %tx, 4;
	@%p3 bra 	END;
	st.global.u32 	[%rd2], %r4; //A
END:)");
}

// ---------------------------------------------------------------------------------------------------------------------
// Text and launches

static void wrong_text(const char* body, const char* named, const char* kinds = "parse") {
    Buffer<uint32_t> out(32, 0);
    std::string text = module({".u64", body});
    reports(kinds, text, launch(32, {out}), false, 1);
    if (!write_to.empty()) return;
    Outcome outcome = attempt(text, launch(32, {out}), 1);
    if (outcome.text.find(named) == std::string::npos)
        fail(format("'%s' is not named: %.500s", named, outcome.text.c_str()));
}

TEST(parse_opcode) { wrong_text("\tfrobnicate.u32 \t%r1, %r2; //A", "frobnicate"); }
TEST(parse_qualifier) { wrong_text("\tadd.s77 \t%r1, %r2, %r3; //A", "s77"); }
TEST(parse_register) { wrong_text("\tadd.s32 \t%r1, %zz2, %r3; //A", "%zz2"); }
TEST(parse_label) { wrong_text("\tbra \tNOWHERE; //A", "NOWHERE"); }
TEST(parse_symbol) { wrong_text("\tmov.u32 \t%r1, nothing_here; //A", "nothing_here"); }
TEST(parse_unknown_known) {  // of PTX, but not of what is known here
    wrong_text("\tsin.approx.f32 \t%f1, %f2; //A", "sin.approx.f32");
}

TEST(launches) {
    if (!write_to.empty()) return;
    Buffer<uint32_t> out(32, 0);
    int extra = 0;
    std::string text = module({".u64, .u32", "\tst.global.u32 \t[%a0], %u1;", "", ".maxntid 64, 1, 1"});
    ptx::Launch right = launch(1, {out, {&extra, 4}}), wrong;
    runs(text, right);
    wrong = right;
    wrong.args.pop_back();
    reports("launch", text, wrong, true, 1);
    wrong = right;
    wrong.args[1].bytes = 8;
    reports("launch", text, wrong, true, 1);
    wrong = right;
    wrong.block.x = 65;
    reports("launch", text, wrong, true, 1);
    wrong = right;
    wrong.block.x = 0;
    reports("launch", text, wrong, true, 1);
    try {
        ptx::run(*ptx::read(text, "tests"), "untried", right);
        fail("a kernel that is not there ran");
    } catch (const ptx::Report& report) {
        if (report.kind != "launch" || std::string(report.what()).find("untried") == std::string::npos)
            fail(report.kind + ": " + report.what());
    }
}

TEST(source_line) {  // .loc and .file: the report names the source
    Buffer<uint32_t> out(32, 0);
    std::string text = module({".u64", R"(
	.loc	1 7773 3
	add.s32 	%r1, %tx, 1;
	.loc	1 7772 9, function_name $L__info_string0, inlined_at 1 7773 3
	st.global.u32 	[%a0+256], %r1; //A
)"}) + "\t.file\t1 \"/somewhere/looked_at.cu\"\n\t.section\t.debug_str\n\t{\n$L__info_string0:\n.b8 102,0\n\n\t}\n";
    reports("address", text, launch(1, {out}));
    if (!write_to.empty()) return;
    Outcome outcome = attempt(text, launch(1, {out}), 1);
    if (outcome.text.find("looked_at.cu") == std::string::npos || !has_number(outcome.text, 7772))
        fail("no source line: " + outcome.text);
}

TEST(recovers) {  // a report leaves the machine fit for the next launch
    if (!write_to.empty()) return;
    for (int i = 0; i < 3; i++) {
        Buffer<uint32_t> out(64, 0);
        Text k = {".u64",
                  "\tmad.lo.s32 \t%r1, %bx, 32, %tx;\n\tmul.wide.u32 \t%rd1, %r1, 4;\n\tadd.s64 \t%rd2, %a0, "
                  "%rd1;\n\tst.global.u32 \t[%rd2], %r1;\n"};
        runs(module(k), launch(32, {out}, 2));
        k.body += "\tst.global.u32 \t[%a0], %bx; //A";
        reports("race", module(k), launch(32, {out}, 2));
    }
}

// What a launch counts; sectors and wavefronts as ptx.h says
TEST(counts) {
    if (!write_to.empty()) return;
    for (int stride : {1, 2, 8, 32}) {
        Buffer<uint32_t> data(32 * 32 + 8, 1);
        Text k = {".u64, .u32", R"(
	mul.lo.s32 	%r1, %tx, %u1;
	mul.wide.u32 	%rd1, %r1, 4;
	add.s64 	%rd2, %a0, %rd1;
	ld.global.u32 	%r2, [%rd2];
	mov.u32 	%r3, room;
	shl.b32 	%r4, %r1, 2;
	add.s32 	%r5, %r3, %r4;
	st.shared.u32 	[%r5], %r2;
	bar.sync 	0;)",
                  ".shared .align 128 .b8 room[4096];"};
        ptx::options.counts = true;
        ptx::Counts counts;
        try {
            counts = ptx::run(*ptx::read(module(k), "tests"), "tried", launch(32, {data, {&stride, 4}}, 3));
        } catch (const ptx::Report& report) {
            fail(report.what());
        }
        ptx::options.counts = false;
        uint64_t sectors = stride >= 8 ? 32 : 4 * stride, wavefronts = stride;  // a word a bank, 32 banks
        if (counts.blocks != 3 || counts.warps != 3 || counts.barriers != 3 || counts.sectors != 3 * sectors ||
            counts.sectors_needed != 12 || counts.wavefronts != 3 * wavefronts || counts.wavefronts_needed != 3 ||
            counts.read != 3 * 128 || counts.written != 0)
            fail(format("stride %d: blocks %d, warps %d, barriers %d, sectors %d of %d, wavefronts %d of %d, read %d",
                        stride, (int)counts.blocks, (int)counts.warps, (int)counts.barriers, (int)counts.sectors,
                        (int)counts.sectors_needed, (int)counts.wavefronts, (int)counts.wavefronts_needed,
                        (int)counts.read));
    }
}
