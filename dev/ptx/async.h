// Barriers, matrices, and what works on by itself: copies, mbarriers, wgmma. PTX ISA manual: "Parallel Synchronization
// and Communication Instructions", "Data Movement and Conversion Instructions: Asynchronous copy", "Tensors", "Warp
// Level Matrix Instructions", "Asynchronous Warpgroup Level Matrix Instructions", "Stack/Miscellaneous Instructions".
#pragma once
#include "opcodes.h"

namespace ptx {

inline uint32_t uniform(Warp& w, uint32_t lanes, Slot s, const char* what) {  // the value that all lanes have
    w.need(lanes, s, what);
    const uint32_t* x = w.reg<uint32_t>(s);
    const uint32_t first = x[__builtin_ctz(lanes)];
    EACH_LANE(l) if (x[l] != first) w.report("launch", l, std::string(what) + " is not the same in all lanes");
    return first;
}

// ---------------------------------------------------------------------------------------------------------------------
// bar.sync, bar.arrive: counts in threads, a warp counts whole

inline void barrier_check(Block& block,
                          Barrier& b) {  // whether all have come; without a count those that have left are
    if (b.arrived == 0 || b.arrived + (b.of_all ? 32 * block.left : 0) < b.expected) return;
    for (int i : b.waiting) {
        Warp& other = *block.warps[i];
        other.state = Warp::RUNS;
        if (options.races) other.acquire(other.live, [&](Clock& clock) { clock.merge(b.clock); });
    }
    b = {};
    block.grid->events++;
}
template <bool SYNC>
void barrier(Warp& w, const Instr& in, uint32_t lanes) {
    Block& block = w.block;
    const uint32_t id = uniform(w, lanes, in.s[0], "the barrier");
    const uint32_t all = uint32_t(block.warps.size()) * 32;
    const uint32_t count = in.s.size() > 1 ? uniform(w, lanes, in.s[1], "the barrier's count") : all;
    const int l = __builtin_ctz(lanes);
    if (id > 15) w.report("barrier", l, "barrier " + std::to_string(id) + "; there are 0 to 15");
    if (count % 32 || count == 0 || count > all)
        w.report("barrier", l,
                 "a count of " + std::to_string(count) + " threads; the block has " + std::to_string(all));
    Barrier& b = block.barriers[id];
    if (b.arrived == 0) b.expected = count, b.pc = w.pc, b.of_all = in.s.size() == 1;
    if (b.expected != count)
        w.report("barrier", l,
                 "barrier " + std::to_string(id) + " with a count of " + std::to_string(count) + ", but at " +
                     w.place(b.pc) + " with " + std::to_string(b.expected));
    if (!b.warps.insert(w.number).second)
        w.report("barrier", l, "the warp comes to barrier " + std::to_string(id) + " again before it is complete");
    block.grid->counts.barriers += options.counts;
    if (options.races) w.meet(), b.clock.merge(w.clock);
    b.arrived += 32;
    if (SYNC) b.waiting.push_back(w.number), w.state = Warp::AT_BARRIER;
    barrier_check(block, b);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrices in registers. "Matrix Fragments for mma.m16n8k16", "ldmatrix"

inline float half_word(uint32_t x, int i) { return __builtin_bit_cast(float, i ? x & 0xffff0000u : x << 16); }

// rows 16 of A, in registers a, two numbers each; bad: rows with poison
inline void fragment_a(Warp& w, const Slot* a, float (*A)[16], uint32_t& bad) {
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < 2; h++)
                A[l / 4 + i % 2 * 8][l % 4 * 2 + h + i / 2 * 8] = half_word(w.reg<uint32_t>(a[i])[l], h);
    for (int i = 0; i < 4; i++)
        for (uint32_t p = w.poison[a[i].id], l = 0; p; p >>= 1, l++)
            if (p & 1) bad |= 1u << (l / 4 + i % 2 * 8);
}
// d (16,N) = A (16,16) B (16,N) + c; bad rows and columns of A and B make poison
template <int N>
void product(Warp& w, const Slot* d, const Slot* c, const float (*A)[16], const float (*B)[N], uint32_t bad_rows,
             const std::bitset<N>& bad_columns) {
    float D[16][N];
    uint32_t poison[N / 2];
    for (int j = 0; j < N / 2; j++)
        for (int l = 0; l < 32; l++)
            D[l / 4 + j / 2 % 2 * 8][j / 4 * 8 + l % 4 * 2 + j % 2] = c ? from<float>(w.reg<float>(c[j])[l]) : 0.0f;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            const float x = A[i][k];
            for (int j = 0; j < N; j++) D[i][j] += x * B[k][j];
        }
    for (int j = 0; j < N / 2; j++) {
        poison[j] = c ? w.poison[c[j].id] : 0;
        if (bad_rows || bad_columns.any())
            for (int l = 0; l < 32; l++)
                if ((bad_rows >> (l / 4 + j / 2 % 2 * 8) & 1) || bad_columns[j / 4 * 8 + l % 4 * 2 + j % 2])
                    poison[j] |= 1u << l;
    }
    for (int j = 0; j < N / 2; j++) {
        for (int l = 0; l < 32; l++)
            w.reg<float>(d[j])[l] = cell(canonical(D[l / 4 + j / 2 % 2 * 8][j / 4 * 8 + l % 4 * 2 + j % 2]));
        w.set_poison(d[j], poison[j], ~0u);
    }
    if (options.counts) w.block.grid->counts.tensor_flops += 2 * 16 * 16 * N;
}
inline void mma(Warp& w, const Instr& in, uint32_t) {  // m16n8k16
    float A[16][16], B[16][8];
    uint32_t bad = 0;
    std::bitset<8> columns;
    fragment_a(w, &in.s[4], A, bad);
    for (int i = 0; i < 2; i++)
        for (int l = 0; l < 32; l++) {
            for (int h = 0; h < 2; h++) B[l % 4 * 2 + h + i * 8][l / 4] = half_word(w.reg<uint32_t>(in.s[8 + i])[l], h);
            if (w.poison[in.s[8 + i].id] >> l & 1) columns[l / 4] = true;
        }
    product<8>(w, &in.s[0], &in.s[10], A, B, bad, columns);
}

// four matrices of 8 rows of 16 bytes; lane l has the address of row l % 8 of matrix l / 8
template <bool TRANS>
void ldmatrix(Warp& w, const Instr& in, uint32_t lanes) {
    uint32_t at[32], bad[4] = {};
    uint16_t m[4][8][8];
    bool written[4][8][8];
    w.need(lanes, in.s[4], "the address");
    EACH_LANE(l) {
        at[l] = uint32_t(w.reg<uint32_t>(in.s[4])[l] + in.offset[0]);
        w.shared_range(l, at[l], 16, 16);
        if (options.races) w.touch(w.block.pages, true, at[l], 16, false, w.access(l));
        memcpy(m[l / 8][l % 8], w.shared_at(at[l]), 16);
        for (int j = 0; j < 8; j++) written[l / 8][l % 8][j] = w.shared_written(at[l] + 2 * j, 2);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const int r = l / 4, c = l % 4 * 2;
            const uint32_t low = TRANS ? m[i][c][r] : m[i][r][c], high = TRANS ? m[i][c + 1][r] : m[i][r][c + 1];
            w.reg<uint32_t>(in.s[i])[l] = low | high << 16;
            const bool ok = TRANS ? written[i][c][r] && written[i][c + 1][r] : written[i][r][c] && written[i][r][c + 1];
            bad[i] |= uint32_t(!ok) << l;
        }
    for (int i = 0; i < 4; i++) w.set_poison(in.s[i], bad[i], lanes);
    if (options.counts) w.count_shared(at, lanes, 16);
}
inline void stmatrix(Warp& w, const Instr& in, uint32_t lanes) {
    uint32_t at[32];
    w.need(lanes, in.s[0], "the address");
    EACH_LANE(l) at[l] = uint32_t(w.reg<uint32_t>(in.s[0])[l] + in.offset[0]);
    EACH_LANE(l) w.shared_range(l, at[l], 16, 16);
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 32; l++) {
            const uint32_t to = at[i * 8 + l / 4] + l % 4 * 4, x = w.reg<uint32_t>(in.s[1 + i])[l];
            if (options.races) w.touch(w.block.pages, true, to, 4, true, w.access(l));
            memcpy(w.shared_at(to), &x, 4);
            memset(w.block.written.data() + (to - SHARED_BASE), !(w.poison[in.s[1 + i].id] >> l & 1), 4);
        }
    if (options.counts) w.count_shared(at, lanes, 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// cp.async: here at once, but nobody may look before the wait

inline void copy_async(Warp& w, const Instr& in, uint32_t lanes) {
    const uint32_t bytes = *w.reg<uint32_t>(in.s[2]);
    uint64_t at[32];
    uint32_t to[32];
    w.need(lanes, in.s[0], "the address");
    w.need(lanes, in.s[1], "the address");
    const uint32_t step = w.copy_step++;
    uint32_t reads = 0;
    EACH_LANE(l) {
        to[l] = uint32_t(w.reg<uint32_t>(in.s[0])[l] + in.offset[0]);
        at[l] = w.reg<uint64_t>(in.s[1])[l] + in.offset[1];
        const uint32_t valid = in.s.size() > 3 ? w.reg<uint32_t>(in.s[3])[l] : bytes;
        if (in.s.size() > 3) w.need(1u << l, in.s[3], "the size");
        w.shared_range(l, to[l], bytes, bytes);
        if (at[l] % bytes) w.misaligned(l, at[l], bytes);
        if (valid > bytes) w.report("launch", l, "the source's size is larger than the copy");
        if (valid) w.global_range(l, at[l], valid, 1);
        Access a = w.access(l);
        a.agent = uint8_t(COPIES + w.number), a.step = step;
        if (options.races) {
            w.touch(w.block.pages, true, to[l], bytes, true, a);
            if (valid) w.touch(global_pages, false, at[l], valid, false, a);
        }
        memcpy(w.shared_at(to[l]), reinterpret_cast<const void*>(at[l]), valid);
        memset(w.shared_at(to[l] + valid), 0, bytes - valid);
        memset(w.block.written.data() + (to[l] - SHARED_BASE), 1, bytes);
        w.copies_open[l] = step;
        reads |= uint32_t(valid > 0) << l;
    }
    if (options.counts) {
        w.count_global(at, reads, bytes, false);
        w.count_shared(to, lanes, bytes);
    }
}
inline void copy_commit(Warp& w, const Instr&, uint32_t lanes) { EACH_LANE(l) w.copies[l].push_back(w.copies_open[l]); }
inline void copy_wait(Warp& w, const Instr& in, uint32_t lanes) {
    const uint32_t left = *w.reg<uint32_t>(in.s[0]);
    EACH_LANE(l) {
        if (w.copies[l].size() <= left) continue;
        w.waited[l].copies = std::max(w.waited[l].copies, w.copies[l][w.copies[l].size() - 1 - left]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// mbarriers

inline Mbarrier& mbarrier_at(Warp& w, int lane, uint32_t at) {
    auto it = w.block.mbarriers.find(at);
    if (it == w.block.mbarriers.end())
        w.report("phase", lane, "no mbarrier was initialised at shared " + std::to_string(at - SHARED_BASE));
    return it->second;
}
inline void mbarrier_check(Block& block, Mbarrier& m) {  // whether its phase has ended
    if (m.pending || m.bytes) return;
    m.arriving.of[ARRIVALS + m.agent].all = m.under_way.empty() ? m.step : *m.under_way.begin() - 1;
    m.done.merge(m.arriving);
    m.arriving = {};
    m.phase++;
    m.pending = m.count;
    block.grid->events++;
}
inline void mbarrier_init(Warp& w, const Instr& in, uint32_t lanes) {
    w.need(lanes, in.s[0], "the address");
    w.need(lanes, in.s[1], "the count");
    EACH_LANE(l) {
        const uint32_t at = uint32_t(w.reg<uint32_t>(in.s[0])[l] + in.offset[0]);
        w.shared_range(l, at, 8, 8);
        if (options.races) w.touch(w.block.pages, true, at, 8, true, w.access(l));
        memset(w.block.written.data() + (at - SHARED_BASE), 1, 8);
        Mbarrier m;
        m.count = m.pending = w.reg<uint32_t>(in.s[1])[l];
        m.agent = int(w.block.mbarriers.size()) % (AGENTS - ARRIVALS);
        if (m.count == 0) w.report("barrier", l, "an mbarrier with a count of 0");
        if (w.block.mbarriers.count(at)) w.report("barrier", l, "the mbarrier is initialised already");
        w.block.mbarriers[at] = m;
    }
}
template <bool EXPECT>
void mbarrier_arrive(Warp& w, const Instr& in, uint32_t lanes) {
    w.need(lanes, in.s[1], "the address");
    if (EXPECT) w.need(lanes, in.s[2], "the bytes");
    for (uint32_t left = lanes; left;) {  // lanes at the same one together
        const int first = __builtin_ctz(left);
        const uint32_t at = uint32_t(w.reg<uint32_t>(in.s[1])[first] + in.offset[0]);
        uint32_t same = 0;
        for (int l = first; l < 32; l++)
            if (left >> l & 1 && uint32_t(w.reg<uint32_t>(in.s[1])[l] + in.offset[0]) == at) same |= 1u << l;
        left &= ~same;
        w.shared_range(first, at, 8, 8);
        Mbarrier& m = mbarrier_at(w, first, at);
        if (options.races) {
            w.touch(w.block.pages, true, at, 8, true, w.access(first, true));
            w.release(same, m.arriving);
        }
        for (int l = first; l < 32; l++) {
            if (!(same >> l & 1)) continue;
            if (EXPECT) m.bytes += w.reg<uint32_t>(in.s[2])[l];
            if (m.pending == 0) w.report("barrier", l, "more arrive than the mbarrier's phase expects");
            m.pending--;
        }
        mbarrier_check(w.block, m);
    }
}
inline void mbarrier_try_wait(Warp& w, const Instr& in, uint32_t lanes) {
    w.need(lanes, in.s[1], "the address");
    w.need(lanes, in.s[2], "the parity");
    uint32_t done = 0;
    const bool impatient = draw() % 8 == 0;  // it may give up at any time
    EACH_LANE(l) {
        const uint32_t at = uint32_t(w.reg<uint32_t>(in.s[1])[l] + in.offset[0]);
        w.shared_range(l, at, 8, 8);
        const Mbarrier& m = mbarrier_at(w, l, at);
        if (options.races) w.touch(w.block.pages, true, at, 8, true, w.access(l, true));
        if (impatient || (m.phase & 1) == (w.reg<uint32_t>(in.s[2])[l] & 1)) continue;
        done |= 1u << l;
    }
    uint32_t& p = w.pred(in.s[0]);
    p = (p & ~lanes) | done;
    w.set_poison(in.s[0], 0, lanes);
    if (options.races && done) {
        bool same = done == lanes;  // all at one mbarrier, as mostly
        const uint32_t* at = w.reg<uint32_t>(in.s[1]);
        const int first = __builtin_ctz(done);
        EACH_LANE(l) same = same && at[l] == at[first];
        for (int l = first; l < 32; l++)
            if (done >> l & 1) {
                const Mbarrier& m = mbarrier_at(w, l, uint32_t(at[l] + in.offset[0]));
                w.acquire(same ? lanes : 1u << l, [&](Clock& clock) { clock.merge(m.done); });
                if (same) break;
            }
    }
    if (done != lanes) w.yields = true, w.looks();
}

// ---------------------------------------------------------------------------------------------------------------------
// Proxy fences. What a thread knows of ordinary accesses is from here on in order with asynchronous ones.

template <bool SHARED, bool GLOBAL>
void proxy_fence(Warp& w, const Instr&, uint32_t lanes) {
    if (SHARED)
        for (auto& m : w.block.mbarriers) m.second.fenced = true;
    if (!options.races) return;
    w.acquire(lanes, [&](Clock& c) {
        for (int i = 0; i < 32; i++) {
            Known k = c.of[i];
            if (i == w.number) k.merge({w.synced, w.step, lanes});  // of which a lane knows its own alone
            if (SHARED) c.shared[i].merge(k);
            if (GLOBAL) c.global[i].merge(k);
        }
        if (GLOBAL)
            for (auto& other : c.others) other.second.fenced = other.second.seen;
    });
    w.step++;
}
inline void mbarrier_fence(Warp& w, const Instr&, uint32_t) {
    for (auto& m : w.block.mbarriers) m.second.fenced = true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bulk copies

// the stand-in's CUtensorMap: bf16, 4 dimensions, the innermost box 64 wide, swizzled by 128 bytes
struct TensorMap {
    uint64_t base, dims[4], strides[4];
    uint32_t box[4];
    int made;
};
constexpr int TENSOR_MAP_MADE = 0x54414d50;

// "Swizzling modes", 128B: the 16-byte chunk's number within 128 bytes xor that of the 128 bytes within 1024
inline uint32_t swizzle_128(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void bulk_begin(Warp& w, int lane, Bulk& bulk, uint32_t bytes) {
    Block& block = w.block;
    bulk.warp = w.number, bulk.lane = lane, bulk.pc = w.pc;
    Access smem = w.access(lane), gmem = smem;
    smem.async = gmem.async = true;
    gmem.strong = bulk.kind == Bulk::ADD;  // an addition is relaxed, of the GPU
    if (bulk.kind == Bulk::LOAD) {
        Mbarrier& m = mbarrier_at(w, lane, bulk.mbarrier);
        if (!m.fenced) w.report("proxy", lane, "the mbarrier was initialised without a proxy fence after it");
        bulk.step = smem.step = gmem.step = ++m.step;
        m.under_way.insert(bulk.step);
        smem.agent = gmem.agent = uint8_t(ARRIVALS + m.agent);
    } else {
        bulk.step = smem.step = gmem.step = w.bulk_step++;
        smem.agent = uint8_t(BULK_READS + w.number), gmem.agent = uint8_t(BULK_WRITES + w.number);
        w.bulk_open[lane] = bulk.step;
    }
    std::vector<uint64_t> sectors;
    uint64_t valid = 0;
    for (const Bulk::Piece& p : bulk.pieces) {
        if (p.count) w.global_range(lane, p.global, p.count, 1);
        if (bulk.kind != Bulk::LOAD && !w.shared_written(p.shared, 16) && p.count)
            w.report("poison", lane,
                     "a bulk copy's source at shared " + std::to_string(p.shared - SHARED_BASE) + " was never written");
        if (options.races) {
            w.touch(block.pages, true, p.shared, 16, bulk.kind == Bulk::LOAD, smem);
            if (p.count) w.touch(global_pages, false, p.global, p.count, bulk.kind != Bulk::LOAD, gmem);
        }
        if (options.counts && p.count) sectors.push_back(p.global / 32), valid += p.count;
    }
    if (options.counts) {
        std::sort(sectors.begin(), sectors.end());
        const int n = int(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
        w.count_sectors(sectors.data(), n, valid, bulk.kind != Bulk::LOAD);
        block.grid->counts.wavefronts += bytes / 128, block.grid->counts.wavefronts_needed += bytes / 128;
    }
    block.bulks.push_back(std::move(bulk));
}

template <bool LOAD>
void bulk_tensor(Warp& w, const Instr& in, uint32_t lanes) {
    // load: shared, map, c0..c3, mbarrier; store: map, c0..c3, shared
    const Slot smem = in.s[LOAD ? 0 : 5], map_at = in.s[LOAD ? 1 : 0], *c = &in.s[LOAD ? 2 : 1];
    for (const Slot& s : in.s) w.need(lanes, s, "an operand");
    EACH_LANE(l) {
        uint64_t at = w.reg<uint64_t>(map_at)[l] + in.offset[LOAD ? 1 : 0];
        TensorMap map;
        if (at % 64) w.misaligned(l, at, 64);
        const auto& params = w.block.grid->params;
        if (at >= PARAM_BASE && at - PARAM_BASE + 128 <= params.size())
            memcpy(&map, params.data() + (at - PARAM_BASE), sizeof map);
        else {
            w.global_range(l, at, 128, 64);
            memcpy(&map, reinterpret_cast<const void*>(at), sizeof map);
        }
        if (map.made != TENSOR_MAP_MADE) w.report("address", l, "there is no tensor map");
        const uint32_t to = uint32_t(w.reg<uint32_t>(smem)[l] + in.offset[LOAD ? 0 : 1]);
        const uint32_t bytes = 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3];
        w.shared_range(l, to, bytes, 128);
        int64_t from_[4];
        for (int i = 0; i < 4; i++) from_[i] = int32_t(w.reg<uint32_t>(c[i])[l]);
        Bulk bulk;
        bulk.kind = LOAD ? Bulk::LOAD : Bulk::STORE;
        if (LOAD) bulk.mbarrier = uint32_t(w.reg<uint32_t>(in.s[6])[l] + in.offset[2]);
        uint32_t offset = 0;
        for (uint32_t i3 = 0; i3 < map.box[3]; i3++)
            for (uint32_t i2 = 0; i2 < map.box[2]; i2++)
                for (uint32_t i1 = 0; i1 < map.box[1]; i1++) {
                    const int64_t x[4] = {from_[0], from_[1] + i1, from_[2] + i2, from_[3] + i3};
                    bool inside = true;
                    uint64_t row = map.base;
                    for (int i = 1; i < 4; i++) {
                        inside = inside && x[i] >= 0 && x[i] < int64_t(map.dims[i]);
                        row += uint64_t(x[i]) * map.strides[i];
                    }
                    for (uint32_t i0 = 0; i0 < map.box[0]; i0 += 8, offset += 16) {
                        const int64_t begin = x[0] + i0, low = std::max<int64_t>(begin, 0);
                        const int64_t high = std::min<int64_t>(begin + 8, int64_t(map.dims[0]));
                        const bool some = inside && low < high;
                        bulk.pieces.push_back({swizzle_128(to + offset), some ? row + 2 * low : 0,
                                               uint8_t(some ? 2 * (low - begin) : 0),
                                               uint8_t(some ? 2 * (high - low) : 0)});
                    }
                }
        bulk_begin(w, l, bulk, bytes);
    }
}
template <bool ADD>
void bulk_copy(Warp& w, const Instr& in, uint32_t lanes) {  // global, shared, bytes
    for (const Slot& s : in.s) w.need(lanes, s, "an operand");
    EACH_LANE(l) {
        const uint64_t to = w.reg<uint64_t>(in.s[0])[l] + in.offset[0];
        const uint32_t at = uint32_t(w.reg<uint32_t>(in.s[1])[l] + in.offset[1]), bytes = w.reg<uint32_t>(in.s[2])[l];
        if (bytes % 16 || bytes == 0)
            w.report("alignment", l, "a bulk copy of " + std::to_string(bytes) + " bytes, no multiple of 16");
        w.shared_range(l, at, bytes, 16);
        w.global_range(l, to, bytes, 16);
        Bulk bulk;
        bulk.kind = ADD ? Bulk::ADD : Bulk::STORE;
        for (uint32_t i = 0; i < bytes; i += 16) bulk.pieces.push_back({at + i, to + i, 0, 16});
        bulk_begin(w, l, bulk, bytes);
    }
}
// One step of it; true when it is done.
inline bool bulk_step(Block& block, Bulk& bulk) {
    auto at = [&](uint32_t shared) { return block.shared.data() + (shared - SHARED_BASE); };
    block.grid->events++;
    if (bulk.kind == Bulk::LOAD) {
        for (const Bulk::Piece& p : bulk.pieces) {
            memset(at(p.shared), 0, 16);
            if (p.count) memcpy(at(p.shared) + p.first, reinterpret_cast<const void*>(p.global), p.count);
            memset(block.written.data() + (p.shared - SHARED_BASE), 1, 16);
        }
        Mbarrier& m = block.mbarriers.at(bulk.mbarrier);
        m.under_way.erase(bulk.step);
        m.bytes -= int64_t(bulk.pieces.size()) * 16;
        mbarrier_check(block, m);
        return true;
    }
    if (bulk.data.empty()) {
        for (const Bulk::Piece& p : bulk.pieces) bulk.data.insert(bulk.data.end(), at(p.shared), at(p.shared) + 16);
        return false;
    }
    const unsigned char* data = bulk.data.data();
    for (const Bulk::Piece& p : bulk.pieces) {
        if (bulk.kind == Bulk::ADD)
            for (int i = 0; i < 4; i++)
                reinterpret_cast<float*>(p.global)[i] += reinterpret_cast<const float*>(data)[i];
        else if (p.count)
            memcpy(reinterpret_cast<void*>(p.global), data + p.first, p.count);
        data += 16;
    }
    return true;
}
inline void bulk_commit(Warp& w, const Instr&, uint32_t lanes) {
    EACH_LANE(l) w.bulk_groups[l].push_back(w.bulk_open[l]);
}
template <bool READ>
void bulk_wait(Warp& w, const Instr& in, uint32_t lanes) {
    const uint32_t left = *w.reg<uint32_t>(in.s[0]);
    EACH_LANE(l) {
        auto& groups = w.bulk_groups[l];
        if (groups.size() <= left) continue;
        const uint32_t step = groups[groups.size() - 1 - left];
        for (size_t i = 0; i < w.block.bulks.size(); i++) {  // what it waits for happens now
            Bulk& b = w.block.bulks[i];
            if (b.kind == Bulk::LOAD || b.warp != w.number || b.lane != l || b.step > step) continue;
            if (READ && !b.data.empty()) continue;
            while (!bulk_step(w.block, b) && !READ) {
            }
            if (!READ) w.block.bulks.erase(w.block.bulks.begin() + i--);
        }
        w.waited[l].reads = std::max(w.waited[l].reads, step);
        if (!READ) w.waited[l].writes = std::max(w.waited[l].writes, step);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma. D (64,N) = A (64,16) B (16,N): each warp has 16 rows. It is computed at once, but its registers and shared
// memory may not be touched before the wait.

// Where 8 numbers lie that are neighbours in k (trans 0: K-major) or in m or n (trans 1): chunk `c` of line `line`.
// "Matrix descriptor", "Canonical layouts", 128-byte swizzle.
struct Descriptor {
    uint32_t start, leading, stride;
    Descriptor(Warp& w, uint64_t x)
        : start(uint32_t(x & 0x3fff) << 4), leading(uint32_t(x >> 16 & 0x3fff) << 4),
          stride(uint32_t(x >> 32 & 0x3fff) << 4) {
        if (x >> 62 != 1)
            w.report("wgmma", 0, "a descriptor whose swizzle is not that of 128 bytes, which alone is known");
        if (x >> 49 & 7) w.report("wgmma", 0, "a descriptor with a base offset, which is not known");
    }
    uint32_t chunk(bool trans, uint32_t line, uint32_t c) const {
        if (trans) return swizzle_128(start + line / 8 * stride + line % 8 * 128 + c / 8 * leading + c % 8 * 16);
        return swizzle_128(start + line / 8 * stride + line % 8 * 128 + c * 16);
    }
};
inline bool product_chunk(Warp& w, uint32_t at, uint16_t* to) {  // reads 16 bytes; false: never written
    w.shared_range(0, at, 16, 16);
    Access a = w.access(0);
    a.agent = uint8_t(PRODUCTS + w.number), a.step = w.product_step, a.async = true;
    if (options.races) {  // who of the warp reads it is not said: all must know that they may
        for (const auto& lane : w.own) {
            Access other = a;
            other.lane = uint8_t(lane.first);
            w.touch(w.block.pages, true, at, 16, false, other);
        }
        w.touch(w.block.pages, true, at, 16, false, a);
    }
    memcpy(to, w.shared_at(at), 16);
    return w.shared_written(at, 16);
}
inline float wide(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
inline uint64_t descriptor_of(Warp& w, Slot s) {
    w.need(w.live, s, "the descriptor");
    const uint64_t* x = w.reg<uint64_t>(s);
    for (int l = 1; l < 32; l++)
        if (x[l] != x[0]) w.report("wgmma", l, "the descriptor is not the same in all lanes");
    return x[0];
}
inline const std::string& register_name(Warp& w, Slot s) { return w.block.grid->kernel.register_names[s.id]; }

// A warpgroup's warps execute the same wgmma, one after the other, with the same descriptors.
inline void wgmma_alike(Warp& w, uint64_t a, uint64_t b) {
    Block& block = w.block;
    if (w.number / 4 * 4 + 4 > int(block.warps.size())) w.report("wgmma", 0, "the warpgroup has less than 4 warps");
    auto& products = block.products[w.number / 4];
    const std::array<uint64_t, 3> mine = {uint64_t(w.pc), a, b};
    const size_t n = w.products++;
    if (n == products.size())
        products.push_back(mine);
    else if (products[n][0] != mine[0])
        w.report("wgmma", 0, "another warp of the warpgroup is at " + w.place(int(products[n][0])));
    else if (products[n] != mine)
        w.report("wgmma", 0, "another warp of the warpgroup has other descriptors");
}

template <int N, bool RS>
void wgmma(Warp& w, const Instr& in, uint32_t) {
    const Slot *d = in.s.data(), *a = d + N / 2, b = a[RS ? 4 : 1], scale = a[RS ? 5 : 2];
    w.need(~0u, scale, "the predicate");
    const uint32_t p = w.pred(scale);
    if (p != 0 && p != ~0u) w.report("wgmma", 0, "the predicate is not the same in all lanes");
    float A[16][16], B[16][N];
    uint32_t bad = 0;
    std::bitset<N> columns;
    uint16_t x[8];
    if (RS) {
        fragment_a(w, a, A, bad);
    } else {
        const Descriptor at(w, descriptor_of(w, a[0]));
        const uint32_t first = w.number % 4 * 16;
        for (uint32_t line = 0; line < 16; line++)
            for (uint32_t c = 0; c < 2; c++) {
                const bool ok = product_chunk(
                    w, at.chunk(in.trans_a, in.trans_a ? line : first + line, in.trans_a ? first / 8 + c : c), x);
                for (uint32_t i = 0; i < 8; i++) (in.trans_a ? A[c * 8 + i][line] : A[line][c * 8 + i]) = wide(x[i]);
                if (!ok) bad |= in.trans_a ? 0xffu << c * 8 : 1u << line;
            }
    }
    wgmma_alike(w, RS ? 0 : descriptor_of(w, a[0]), descriptor_of(w, b));
    const Descriptor at(w, descriptor_of(w, b));
    for (uint32_t line = 0; line < (in.trans_b ? 16 : N); line++)
        for (uint32_t c = 0; c < (in.trans_b ? N / 8 : 2); c++) {
            const bool ok = product_chunk(w, at.chunk(in.trans_b, line, c), x);
            for (uint32_t i = 0; i < 8; i++) (in.trans_b ? B[line][c * 8 + i] : B[c * 8 + i][line]) = wide(x[i]);
            if (!ok)
                for (uint32_t i = 0; i < 8; i++) columns[in.trans_b ? c * 8 + i : line] = true;
        }
    if (!w.fenced) w.report("wgmma", 0, "there was no wgmma.fence before");
    auto fresh = [&](Slot s) {
        if (w.touched[s.id] > w.fence)
            w.report("wgmma", 0, "register " + register_name(w, s) + " was touched after the last wgmma.fence");
    };
    for (int j = 0; j < N / 2; j++) {  // d is written, and fenced, without c too
        fresh(d[j]);
        w.writes[d[j].id] = w.product_group, w.touched[d[j].id] = 0, w.product_pc[d[j].id] = w.pc;
    }
    if (RS)
        for (int j = 0; j < 4; j++) {
            fresh(a[j]);
            if (w.writes[a[j].id] > w.product_done)
                w.report("wgmma", 0,
                         "A register " + register_name(w, a[j]) + " is a result of the " +
                             w.place(w.product_pc[a[j].id]) + ", which was not waited for");
            w.reads[a[j].id] = w.product_group, w.product_pc[a[j].id] = w.pc;
        }
    product<N>(w, d, p ? d : nullptr, A, B, bad, columns);
    if (options.counts) {  // its 128-byte lines of shared memory: a warp's rows of A; B once for the four
        const uint64_t fronts = (RS ? 0 : 4) + N / 16;
        w.block.grid->counts.wavefronts += fronts, w.block.grid->counts.wavefronts_needed += fronts;
    }
}
inline void wgmma_fence(Warp& w, const Instr&, uint32_t) { w.fence = w.moment, w.fenced = true; }
inline void wgmma_commit(Warp& w, const Instr&, uint32_t) {
    w.product_steps.push_back(w.product_step++);
    w.product_group++;
}
inline void wgmma_wait(Warp& w, const Instr& in, uint32_t lanes) {
    const uint64_t left = *w.reg<uint32_t>(in.s[0]), committed = w.product_group - 1;
    if (committed <= left || committed - left <= w.product_done) return;
    w.product_done = committed - left;
    w.acquire(lanes, [&](Clock& c) { c.of[PRODUCTS + w.number].merge({w.product_steps[w.product_done - 1]}); });
}
// Of every other instruction, in kernels with wgmma: whether it touches a register of one under way.
inline void watch_registers(Warp& w, const Instr& in) {
    w.moment++;
    if (in.rename) {
        const uint32_t d = in.s[0].id, s = in.s[1].id;
        if (d != s && std::max(w.writes[d], w.reads[d]) > w.product_done)
            w.report("wgmma", 0,
                     "register " + register_name(w, in.s[0]) + " is written, which the " + w.place(w.product_pc[d]) +
                         " uses");
        if (s == 0)
            w.writes[d] = w.reads[d] = 0, w.touched[d] = w.moment;
        else
            w.writes[d] = w.writes[s], w.reads[d] = w.reads[s], w.touched[d] = w.touched[s],
            w.product_pc[d] = w.product_pc[s];
        return;
    }
    for (size_t i = 0; i < in.s.size(); i++) {
        const uint32_t id = in.s[i].id;
        if (id == 0) continue;
        if (w.writes[id] > w.product_done)
            w.report("wgmma", 0,
                     "register " + register_name(w, in.s[i]) + (i < in.outs ? " is written" : " is read") +
                         ", a result of the " + w.place(w.product_pc[id]) + ", which was not waited for");
        w.touched[id] = w.moment;
        if (i >= in.outs) continue;
        if (w.reads[id] > w.product_done)
            w.report("wgmma", 0,
                     "register " + register_name(w, in.s[i]) + " is written, which the " + w.place(w.product_pc[id]) +
                         " still reads");
        w.writes[id] = w.reads[id] = 0;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// setmaxnreg

template <bool MORE>
void set_registers(Warp& w, const Instr& in, uint32_t) {
    const int n = int(*w.reg<uint32_t>(in.s[0])), change = n - w.registers;
    if (n % 8 || n < 24 || n > 256) w.report("registers", 0, std::to_string(n) + " registers a thread");
    if (MORE ? change < 0 : change > 0)
        w.report("registers", 0, "from " + std::to_string(w.registers) + " registers a thread to " + std::to_string(n));
    if (change * 32 > w.block.free_registers) {
        w.state = Warp::NO_REGISTERS, w.lacks = change * 32;
        return;
    }
    w.block.free_registers -= change * 32;
    w.registers = n, w.changes.push_back(n);
    w.state = Warp::RUNS;
    w.block.grid->events++;
}

}  // namespace ptx
