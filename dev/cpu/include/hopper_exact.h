// Hopper's instructions in the exact geometry, with the names of train_gpt.cu's wrappers. What is asynchronous on the
// device happens here as early or as late as it may, at random (stores as late):
//   bulk copies   loads between their start and their mbarrier's phase, from the start on their destination holds NaN;
//                 stores read at the wait for their group, and write at tma_store_wait_written or the block's end
//   wgmma         between its start and the wait for its group; until then its accumulators hold NaN. Each warp's
//                 quarter runs for itself, and the four warps of a group must issue the same sequence
// Reported: threads that wait for ever, accumulators or A's registers touched before the wait, what copies and wgmma
// touch without an order (order_exact.h), a load over what a wgmma reads that was not waited for, mbarriers used before
// mbarrier_fence_init, with too many arrivals or with a phase that nobody waited for, groups of wgmma without a fence,
// and work still under way when the block ends. An address in shared memory is the offset from the dynamic array's
// begin.
#pragma once
#include <array>
#include <deque>

struct CudaAccumulators {  // of one warp: where they belong, and their values until the wait
    int n;                 // columns
    float* c[32];
    std::vector<float> v;  // (32, n/2)
    int last;              // the group that uses them last
};
struct CudaMma {
    int n, trans_a, trans_b, accumulate, group;
    bool from_registers;
    uint64_t a, b;
    std::array<unsigned, 4> registers[32];
    CudaAccumulators* c;
    const char* file;
    int line;
    std::vector<std::shared_ptr<const CudaClock>> clocks;  // the lanes', each once
};
struct CudaRegisters {  // of A, in use by a group of wgmma
    int group;
    const unsigned* at[32];
    std::array<unsigned, 4> values[32];
    const char* file;
    int line;
};
struct CudaMmaWarp {
    std::deque<CudaMma> queue;
    std::vector<std::unique_ptr<CudaAccumulators>> accumulators;
    std::vector<CudaRegisters> registers;
    int committed = 0;  // groups
    bool fenced = false;
    size_t issued = 0;
};
struct CudaCopy {
    bool load;
    CUtensorMap map;
    char* smem;
    int at[4];
    uint64_t* bar;
    int thread, group;
    float* to = nullptr;  // bulk_store and bulk_add, which have no map
    int bytes = 0;
    bool add = false;
    CudaWriter writer = {};                            // a load's: its mbarrier and the phase
    std::shared_ptr<const CudaClock> clock = nullptr;  // the thread's
    std::vector<char> data = {};                       // a store's, once read
    const char* file = "";
    int line = 0;
};
struct CudaNamedBarrier {
    int threads = 0, arrived = 0;
    unsigned warps = 0;  // that have come
    std::vector<int> waiting;
    CudaClock clock;
};
struct CudaBar {  // what those who arrive at an mbarrier have seen, and what who waits for it then sees
    int component, phase = 0, waited = 0;  // phases that have ended, and those whose end somebody has seen
    CudaWriter made;
    CudaClock arrived, done;
    CudaLast last;
};
struct CudaSource {  // read when the thread that stores has waited
    size_t end;
    CudaWriter reader;
};
struct CudaHopper {
    std::vector<CudaCopy> loads, stores;         // under way
    std::map<const void*, CudaBar> bars;
    std::map<size_t, std::array<int, 32>> reads;  // of each 1024 bytes: the last group of a warp's wgmma, from 1
    std::map<size_t, CudaSource> sources;         // of stores, by their offset
    std::map<int, int> store_groups;             // committed by a thread
    std::vector<std::pair<uint64_t*, int>> waiting;  // at an mbarrier: which, which thread
    std::vector<uint64_t*> unfenced;             // mbarriers initialised, not yet fenced
    CudaNamedBarrier named[16];
    CudaMmaWarp warps[32];
    std::vector<uint64_t> sequence[8];           // of wgmma, by warpgroup
    int queued = 0;                              // wgmma not yet run
    int registers[32] = {};                      // a thread, by warp; 0: as at the start
};
#define cuda_hopper (*cuda_block.hopper)

// ---------------------------------------------------------------------------------------------------------------------
// Waiting

inline void cuda_wait(const char* op, const char* file, int line) {
    CudaThread& t = cuda_block.threads[cuda_block.current];
    t.op = op, t.file = file, t.line = line, t.mask = 0;
    t.state = CudaThread::WAITS;
    cuda_yield(false);
}
inline void cuda_wake(int thread) {
    cuda_block.threads[thread].state = CudaThread::RUNS;
    cuda_block.make_ready(thread);
}

struct CudaMbarrier {  // the 64 bits of an mbarrier; all ones (fresh shared memory) is none
    uint64_t phase : 1, pending : 20, arrivals : 20;
    int64_t bytes : 23;  // still to come in this phase, less those that came before they were expected
};
static_assert(sizeof(CudaMbarrier) == 8);

inline CudaMbarrier& cuda_mbarrier(uint64_t* bar, const char* op, const char* file, int line) {
    CudaMbarrier& m = *(CudaMbarrier*)cuda_alias(bar);
    if ((uintptr_t)bar % 8 || m.arrivals == 0 || m.arrivals == 0xFFFFF || m.pending > m.arrivals)
        cuda_die_at(op, file, line, "no mbarrier there");
    for (uint64_t* u : cuda_hopper.unfenced)
        if (u == bar) cuda_die_at(op, file, line, "the mbarrier is used before mbarrier_fence_init");
    if (!cuda_order.on) return m;
    const auto found = cuda_hopper.bars.find(bar);
    if (found == cuda_hopper.bars.end()) cuda_die_at(op, file, line, "no mbarrier there");
    if (!cuda_ordered(found->second.made, *cuda_me().clock, cuda_block.current, CUDA_GENERIC))
        cuda_die_at(op, file, line, "that the mbarrier is initialised was not passed on to the thread");
    return m;
}
// arrivals and bytes expected, or bytes that came
inline void cuda_mbarrier_update(uint64_t* bar, unsigned arrivals, int64_t bytes) {
    CudaMbarrier& m = *(CudaMbarrier*)cuda_alias(bar);
    m.pending -= arrivals;
    m.bytes += bytes;
    if (m.bytes >= 1 << 20 || m.bytes <= -(1 << 20)) cuda_die("an mbarrier has more than 2^20 - 1 bytes to come");
    if (m.pending != 0 || m.bytes != 0) return;
    m.phase ^= 1;
    m.pending = m.arrivals;
    if (cuda_order.on) {
        CudaBar& b = cuda_hopper.bars.at(bar);
        cuda_set(b.arrived.seen, b.component, ++b.phase);
        b.done = b.arrived;
        b.last = {};
    }
    auto& waiting = cuda_hopper.waiting;
    for (size_t i = waiting.size(); i-- > 0;) {
        if (waiting[i].first != bar) continue;
        cuda_wake(waiting[i].second);
        waiting.erase(waiting.begin() + i);
    }
}
inline void cuda_mbarrier_arrive(uint64_t* bar, unsigned bytes, const char* op, const char* file, int line) {
    CudaMbarrier& m = cuda_mbarrier(bar, op, file, line);
    if (m.pending == 0) cuda_die_at(op, file, line, "more arrivals in a phase than the mbarrier counts");
    cuda_seal();
    if (cuda_order.on) {
        CudaBar& b = cuda_hopper.bars.at(bar);
        if (b.waited < b.phase) cuda_die_at(op, file, line, "nobody has waited for the phase before");
        cuda_release(b.arrived, cuda_block.current);
    }
    cuda_mbarrier_update(bar, 1, bytes);
}

inline void mbarrier_init(uint64_t* bar, unsigned arrivals, CUDA_HERE) {
    if (arrivals == 0 || arrivals >= 0xFFFFF) cuda_die_at("mbarrier_init", file, line, "arrivals out of range");
    CudaHopper& h = cuda_hopper;
    if (h.bars.count(bar)) cuda_die_at("mbarrier_init", file, line, "there is an mbarrier already");
    *(CudaMbarrier*)cuda_alias(bar) = {0, arrivals, arrivals, 0};
    h.unfenced.push_back(bar);
    if (!cuda_order.on) return;
    const int number = h.bars.size();
    if (number == CUDA_OTHERS - 32) cuda_die_at("mbarrier_init", file, line, "more mbarriers than can be watched");
    CudaBar& b = h.bars[bar];
    b.component = cuda_component(cuda_block.threads.size() + number);
    b.made = {cuda_component(cuda_block.current), cuda_me().step};
}
inline void mbarrier_fence_init() {
    cuda_hopper.unfenced.clear();
    if (cuda_order.on) cuda_fence(true, true);
}
inline void mbarrier_arrive(uint64_t* bar, CUDA_HERE) { cuda_mbarrier_arrive(bar, 0, "mbarrier_arrive", file, line); }
inline void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes, CUDA_HERE) {
    cuda_mbarrier_arrive(bar, bytes, "mbarrier_arrive_expect", file, line);
}
// As on the device a thread that is slow misses a phase that is followed by the next: it looks again when it runs.
inline void mbarrier_wait(uint64_t* bar, unsigned parity, CUDA_HERE) {
    if (parity > 1) cuda_die_at("mbarrier_wait", file, line, "the parity is neither 0 nor 1");
    while (cuda_mbarrier(bar, "mbarrier_wait", file, line).phase == parity) {
        cuda_hopper.waiting.push_back({bar, cuda_block.current});
        cuda_wait("mbarrier_wait", file, line);
    }
    if (!cuda_order.on) return;
    CudaBar& b = cuda_hopper.bars.at(bar);
    b.waited = b.phase;
    cuda_acquire(cuda_me(), b.done, b.last);
}

// By warps, whose lanes all come (bar.sync and bar.arrive are .aligned).
struct CudaNamedArguments {
    int id, threads;
    bool waits;
};
inline void cuda_named_arrive(CudaThread* lanes, unsigned) {
    const CudaNamedArguments& a = *(const CudaNamedArguments*)lanes[0].in;
    const int first = lanes - &cuda_block.threads[0];
    CudaNamedBarrier& n = cuda_hopper.named[a.id];
    auto die = [&](const char* what) { cuda_die_at(lanes[0].op, lanes[0].file, lanes[0].line, what); };
    if (n.arrived && n.threads != a.threads) die("others gave another number of threads");
    if (n.warps >> first / 32 & 1) die("the warp comes again before the barrier is complete");
    n.threads = a.threads, n.warps |= 1u << first / 32;
    for (int l = 0; l < 32; l++) {
        const CudaNamedArguments& x = *(const CudaNamedArguments*)lanes[l].in;
        if (x.id != a.id || x.threads != a.threads) die("the lanes disagree");
        if (cuda_order.on) cuda_release(n.clock, first + l);
        *(bool*)lanes[l].out = a.waits;
        if (a.waits) n.waiting.push_back(first + l);
    }
    if ((n.arrived += 32) < a.threads) return;
    const auto all = std::make_shared<const CudaClock>(n.clock);
    for (int thread : n.waiting) {
        CudaThread& t = cuda_block.threads[thread];
        if (cuda_order.on) t.clock = all;
        *(bool*)t.out = false;
        if (thread / 32 != first / 32 && t.op_waits) cuda_wake(thread);
    }
    n = CudaNamedBarrier();
}
inline void cuda_named_barrier(int id, int threads, bool waits, const char* op, const char* file, int line) {
    if (id < 1 || id > 15 || threads <= 0 || threads % 32) cuda_die_at(op, file, line, "no such barrier");
    CudaNamedArguments a{id, threads, waits};
    volatile bool more;  // to wait for
    cuda_meet(op, ~0u, file, line, &a, nullptr, (void*)&more, 0, cuda_named_arrive);
    if (!more) return;
    cuda_me().op_waits = true;
    cuda_wait(op, file, line);
    cuda_me().op_waits = false;
}
inline void named_barrier_sync(int id, int threads, CUDA_HERE) {
    cuda_named_barrier(id, threads, true, "named_barrier_sync", file, line);
}
inline void named_barrier_arrive(int id, int threads, CUDA_HERE) {
    cuda_named_barrier(id, threads, false, "named_barrier_arrive", file, line);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory as the copy engine and wgmma see it

inline size_t cuda_swizzle(size_t address) { return address ^ (address >> 7 & 7) << 4; }

inline size_t cuda_shared_offset(const void* p, const char* op, const char* file, int line) {
    size_t offset = (const char*)p - (const char*)cuda_block.dynamic;
    if (offset >= cuda_block.dynamic_bytes) cuda_die_at(op, file, line, "not in dynamic shared memory");
    return offset;
}
inline void cuda_must_be_watched(const char* op, const char* file, int line) {
    if (!cuda_order.on) cuda_die_at(op, file, line, "the kernel is not watched: no tensor map among its parameters");
}
inline void fence_async_shared(CUDA_HERE) {
    cuda_must_be_watched("fence_async_shared", file, line);
    cuda_fence(true, false);
}
inline void fence_async_global(CUDA_HERE) {
    cuda_must_be_watched("fence_async_global", file, line);
    cuda_fence(false, true);
}

// Thread i writes there: what wgmma and stores read must be behind it, and what loads write.
inline void cuda_written_over(size_t offset, size_t bytes, int i, const char* op, const char* file, int line) {
    CudaHopper& h = cuda_hopper;
    const CudaClock& c = *cuda_block.threads[i].clock;
    auto die = [&](const std::string& other, const char* does = " reads") {
        cuda_block.current = i;
        cuda_die_at(op, file, line, "it writes to shared memory at " + std::to_string(offset) + " that " + other +
                                        does + ", which was not waited for or not passed on to it");
    };
    // another block's mbarriers change too, with a copy of it, and lie elsewhere
    for (size_t at = offset; at < std::min(offset + bytes, cuda_block.dynamic_bytes); at += 4) {
        const CudaWriter w = cuda_shared_writer(at);
        if (w.who >= 0 && w.who & CUDA_ASYNC && cuda_at(c.seen, w.who & ~CUDA_ASYNC) < w.when)
            die("a bulk copy", " writes");
    }
    for (auto r = h.reads.lower_bound(offset / 1024); r != h.reads.end() && r->first * 1024 < offset + bytes; r++)
        for (int warp = 0; warp < 32; warp++)
            if (r->second[warp] > cuda_at(c.seen, cuda_component(cuda_order.stride - 32 + warp)))
                die("a wgmma of warp " + std::to_string(warp));
    for (auto& [from, source] : h.sources)
        if (from < offset + bytes && offset < source.end && !cuda_ordered(source.reader, c, i, CUDA_GENERIC))
            die("a bulk copy of thread " + std::to_string(source.reader.who % cuda_order.stride));
}

// ---------------------------------------------------------------------------------------------------------------------
// Bulk tensor copies: a box of rows of 128 bytes, of which row r's 16-byte chunk i lies at chunk i XOR r % 8

inline size_t cuda_copy_rows(const CUtensorMap& map) { return size_t(map.box[1]) * map.box[2] * map.box[3]; }

inline CudaCopy cuda_copy(bool load, const CUtensorMap* map, const void* smem, int c0, int c1, int c2, int c3,
                          const char* file, int line) {
    const char* op = load ? "tma_load" : "tma_store";
    cuda_must_be_watched(op, file, line);
    cuda_seal();
    size_t offset = cuda_shared_offset(smem, op, file, line);
    if (map->made != CUDA_TENSOR_MAP_MADE) cuda_die_at(op, file, line, "no tensor map");
    if (offset % 1024) cuda_die_at(op, file, line, "the tile is not aligned to 1024 bytes");
    if (offset + cuda_copy_rows(*map) * 128 > cuda_block.dynamic_bytes)
        cuda_die_at(op, file, line, "the box leaves shared memory");
    CudaCopy copy{load, *map, (char*)smem, {c0, c1, c2, c3}, nullptr, cuda_block.current, 0};
    copy.clock = cuda_me().clock, copy.file = file, copy.line = line;
    return copy;
}

// f(row, memory, first, end): the row's elements from `first` to before `end` are within the tensor, the first there
template <class F> void cuda_copy_each_row(const CudaCopy& copy, F f) {
    const CUtensorMap& m = copy.map;
    for (size_t row = 0; row < cuda_copy_rows(m); row++) {
        const int64_t at[4] = {copy.at[0], copy.at[1] + int64_t(row % m.box[1]),
                               copy.at[2] + int64_t(row / m.box[1] % m.box[2]),
                               copy.at[3] + int64_t(row / m.box[1] / m.box[2])};
        bool inside = true;
        for (int d = 1; d < 4; d++) inside &= at[d] >= 0 && at[d] < (int64_t)m.dims[d];
        const int64_t first = std::clamp<int64_t>(-at[0], 0, 64);
        const int64_t end = std::clamp<int64_t>(m.dims[0] - at[0], first, 64);
        char* global = m.base + at[1] * (int64_t)m.strides[1] + at[2] * (int64_t)m.strides[2] +
                       at[3] * (int64_t)m.strides[3] + (at[0] + first) * 2;
        f(row, global, (int)first, inside ? (int)end : (int)first);
    }
}
// in memory, of a tensor's box or of floats side by side
template <class F> void cuda_copy_each_piece(const CudaCopy& copy, F f) {
    if (copy.to) return f((char*)copy.to, (size_t)copy.bytes);
    cuda_copy_each_row(copy, [&](size_t, char* global, int first, int end) {
        if (first < end) f(global, size_t(end - first) * 2);
    });
}
inline const char* cuda_copy_name(const CudaCopy& copy) {
    return copy.load ? "tma_load" : !copy.to ? "tma_store" : copy.add ? "bulk_add" : "bulk_store";
}
inline void cuda_copy_touches(const CudaCopy& copy, const void* at, size_t bytes, CudaProxy proxy) {
    cuda_touch(at, bytes, *copy.clock, copy.thread, proxy, cuda_copy_name(copy), copy.file, copy.line);
}

inline void cuda_run_load(const CudaCopy& copy) {
    const size_t base = copy.smem - (char*)cuda_block.dynamic, bytes = cuda_copy_rows(copy.map) * 128;
    cuda_copy_each_row(copy, [&](size_t row, char* global, int first, int end) {
        if (first < end) cuda_copy_touches(copy, global, size_t(end - first) * 2, CUDA_GLOBAL);
        char line[128] = {};
        memcpy(line + first * 2, global, size_t(end - first) * 2);
        char* shared = (char*)cuda_block.dynamic + cuda_block.alias;
        for (int i = 0; i < 8; i++) memcpy(shared + cuda_swizzle(base + row * 128 + i * 16), line + i * 16, 16);
    });
    cuda_mark(copy.smem, bytes, copy.writer);
    cuda_mbarrier_update(copy.bar, 0, -(int64_t)bytes);
}
inline void cuda_run_read(CudaCopy& copy) {
    const size_t bytes = copy.to ? copy.bytes : cuda_copy_rows(copy.map) * 128;
    cuda_copy_touches(copy, copy.smem, bytes, CUDA_SHARED_ASYNC);
    copy.data.assign(copy.smem, copy.smem + bytes);
    cuda_hopper.sources[copy.smem - (char*)cuda_block.dynamic].reader.when = cuda_block.threads[copy.thread].step;
}
inline void cuda_run_write(const CudaCopy& copy) {
    if (copy.to) {
        const float* from = (const float*)copy.data.data();
        for (int i = 0; i < copy.bytes / 4; i++) copy.to[i] = (copy.add ? copy.to[i] : 0.0f) + from[i];
        return;
    }
    const size_t base = copy.smem - (char*)cuda_block.dynamic;
    cuda_copy_each_row(copy, [&](size_t row, char* global, int first, int end) {
        for (int i = first; i < end; i++)
            memcpy(global + (i - first) * 2, &copy.data[cuda_swizzle(base + row * 128 + i * 2) - base], 2);
    });
}

inline void tma_load(void* smem, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2 = 0, int c3 = 0,
                     CUDA_HERE) {
    CudaCopy copy = cuda_copy(true, map, smem, c0, c1, c2, c3, file, line);
    cuda_mbarrier(bar, "tma_load", file, line);
    copy.bar = bar;
    const size_t bytes = cuda_copy_rows(*map) * 128;
    CudaHopper& h = cuda_hopper;
    const CudaBar& b = h.bars.at(bar);
    copy.writer = {b.component | CUDA_ASYNC, b.phase + 1};
    cuda_copy_touches(copy, smem, bytes, CUDA_SHARED_ASYNC);
    cuda_written_over((char*)smem - (char*)cuda_block.dynamic, bytes, copy.thread, "tma_load", file, line);
    memset(cuda_alias((char*)smem), 0xFF, bytes);
    cuda_mark(smem, bytes, copy.writer);
    h.loads.push_back(copy);
}
inline void cuda_issue_store(CudaCopy& copy, size_t bytes) {
    const size_t from = copy.smem - (char*)cuda_block.dynamic;
    cuda_hopper.sources[from] = {from + bytes, {cuda_component(copy.thread), CUDA_NEVER}};
    cuda_copy_each_piece(copy, [&](char* global, size_t bytes) {
        cuda_watch(global, bytes);
        cuda_copy_touches(copy, global, bytes, CUDA_GLOBAL);
        cuda_mark(global, bytes, {cuda_component(copy.thread) | CUDA_ASYNC, CUDA_NEVER});
    });
    copy.group = cuda_hopper.store_groups[copy.thread];
    cuda_hopper.stores.push_back(copy);
}
inline void tma_store(const CUtensorMap* map, const void* smem, int c0, int c1, int c2 = 0, int c3 = 0, CUDA_HERE) {
    CudaCopy copy = cuda_copy(false, map, smem, c0, c1, c2, c3, file, line);
    cuda_issue_store(copy, cuda_copy_rows(*map) * 128);
}
inline void cuda_bulk(float* to, const float* from, int bytes, bool add, const char* file, int line) {
    const char* op = add ? "bulk_add" : "bulk_store";
    cuda_must_be_watched(op, file, line);
    cuda_seal();
    if ((cuda_shared_offset(from, op, file, line) | (uintptr_t)to | bytes) % 16)
        cuda_die_at(op, file, line, "an address or the size is not a multiple of 16");
    CudaCopy copy{false, {}, (char*)from, {}, nullptr, cuda_block.current, 0, to, bytes, add};
    copy.clock = cuda_me().clock, copy.file = file, copy.line = line;
    cuda_issue_store(copy, bytes);
}
inline void bulk_store(float* to, const float* from, int bytes, CUDA_HERE) {
    cuda_bulk(to, from, bytes, false, file, line);
}
inline void bulk_add(float* to, const float* from, int bytes, CUDA_HERE) {
    cuda_bulk(to, from, bytes, true, file, line);
}
inline void tma_store_commit() { cuda_hopper.store_groups[cuda_block.current]++; }
// All but the newest N groups of the thread have been read, and, if that is asked for, written.
inline void cuda_store_wait(int newest, bool written) {
    auto& copies = cuda_hopper.stores;
    const int me = cuda_block.current, done = cuda_hopper.store_groups[me] - newest;
    for (size_t i = 0; i < copies.size();) {
        CudaCopy& copy = copies[i];
        const bool waited_for = copy.thread == me && copy.group < done;
        if (waited_for && copy.data.empty()) cuda_run_read(copy);
        if (!waited_for || !written) {
            i++;
            continue;
        }
        cuda_run_write(copy);
        cuda_copy_each_piece(copy, [&](char* global, size_t bytes) {
            cuda_mark(global, bytes, {cuda_component(me) | CUDA_ASYNC, cuda_me().step});
        });
        copies.erase(copies.begin() + i);
    }
}
template <int N> void tma_store_wait() {
    cuda_seal();
    cuda_store_wait(N, false);
}
template <int N> void tma_store_wait_written() {
    cuda_seal();
    cuda_store_wait(N, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: c (64,N) += a (64,16) b (16,N). Warp w of the group has rows 16w + lane/4 and 8 further, columns 8j +
// 2(lane%4) and the next; c[4j + 2 half + odd]. Matrices in shared memory, from a descriptor (PTX ISA, "Matrix
// descriptor"): bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 49-51 base offset, 62-63
// swizzle (1: 128 B).
//   K-major:   rows of 128 bytes, 8 rows an atom, the next 8 rows `stride` further
//   MN-major:  64 rows (of a; columns of b) in 128 bytes, 8 k an atom, the next 8 k `stride`, the next 64 rows
// `leading`
//              further
// and then bits 4-6 of the address are XORed with bits 7-9.

inline uint64_t wgmma_descriptor(const void* smem, int leading_bytes, int stride_bytes, CUDA_HERE) {
    size_t address = cuda_shared_offset(smem, "wgmma_descriptor", file, line);
    if (address % 1024) cuda_die_at("wgmma_descriptor", file, line, "the tile is not aligned to 1024 bytes");
    return address >> 4 | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 62;
}

inline size_t cuda_wgmma_address(uint64_t descriptor, int trans, int mn, int k) {
    const size_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
    return trans ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                 : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
}
// The matrix's element, which all lanes' clocks must let the warp read; `last`: the writer before this one
inline float cuda_wgmma_element(uint64_t descriptor, int trans, int mn, int k, const CudaMma& op, int warp,
                                CudaWriter& last) {
    const size_t address = cuda_swizzle(cuda_wgmma_address(descriptor, trans, mn, k));
    const char* p = (const char*)cuda_block.dynamic + address;
    if (address + 2 > cuda_block.dynamic_bytes)
        cuda_die(cuda_where("wgmma", op.file, op.line) + " reads beyond shared memory");
    const CudaWriter w = cuda_shared_writer(address);
    if (w != last)
        for (auto& clock : op.clocks) cuda_touch(p, 2, *clock, warp * 32, CUDA_SHARED_ASYNC, "wgmma", op.file, op.line);
    last = w;
    uint16_t bits;
    memcpy(&bits, p, 2);
    return __builtin_bit_cast(float, (unsigned)bits << 16);
}

CUDA_FAST inline void cuda_wgmma_product(float* c, const float* a, const float* b, int n) {
    for (int row = 0; row < 16; row++)
        for (int j = 0; j < n; j++) {
            float sum = 0.0f;
            for (int k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * n + j];
            c[row * n + j] = sum;
        }
}

// the oldest wgmma of a warp
inline void cuda_run_wgmma(int warp) {
    CudaMmaWarp& w = cuda_hopper.warps[warp];
    CudaMma& op = w.queue.front();
    CudaWriter last{-2};
    float a[16 * 16];
    std::vector<float> b(16 * op.n), c(16 * op.n);
    // the rows of the other warps must be there too: who reads what is not said
    for (int i = 0; i < 64 && !op.from_registers; i++)
        for (int k = 0; k < 16 && i / 16 != warp % 4; k++) cuda_wgmma_element(op.a, op.trans_a, i, k, op, warp, last);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            // lane and number of the element in the A fragment of mma.m16n8k16
            int lane = i % 8 * 4 + k % 8 / 2, e = k / 8 * 4 + i / 8 * 2 + k % 2;
            a[i * 16 + k] = op.from_registers
                                ? cuda_half_word(op.registers[lane].data(), e)
                                : cuda_wgmma_element(op.a, op.trans_a, warp % 4 * 16 + i, k, op, warp, last);
        }
    for (int k = 0; k < 16; k++)
        for (int j = 0; j < op.n; j++) b[k * op.n + j] = cuda_wgmma_element(op.b, op.trans_b, j, k, op, warp, last);
    cuda_wgmma_product(c.data(), a, b.data(), op.n);
    for (int l = 0; l < 32; l++)
        for (int e = 0; e < op.n / 2; e++) {
            float& v = op.c->v[l * (op.n / 2) + e];
            v = (op.accumulate ? v : 0.0f) + c[(l / 4 + e / 2 % 2 * 8) * op.n + e / 4 * 8 + l % 4 * 2 + e % 2];
        }
    w.queue.pop_front();
    cuda_hopper.queued--;
}

struct CudaMmaArguments {
    CudaMma op;
    const unsigned* registers;
    float* c;
};

// issued by a warp; op: what all lanes agree on
inline void cuda_wgmma_issue(CudaThread* lanes, unsigned) {
    CudaHopper& h = cuda_hopper;
    CudaMma op = ((const CudaMmaArguments*)lanes[0].in)->op;
    const int warp = (lanes - &cuda_block.threads[0]) / 32, group = warp / 4;
    CudaMmaWarp& w = h.warps[warp];
    auto die = [&](const std::string& what) { cuda_die_at("wgmma", op.file, op.line, what); };
    cuda_must_be_watched("wgmma", op.file, op.line);
    if ((group + 1) * 128 > (int)cuda_block.threads.size()) die("the block ends within the warpgroup");
    if (!w.fenced) die("no wgmma_fence since the last commit or wait");
    if ((!op.from_registers && (op.a >> 62 != 1 || op.a >> 49 & 7)) || op.b >> 62 != 1 || op.b >> 49 & 7)
        die("not a descriptor of a 128-byte swizzled tile");
    uint64_t sum = op.line + ((uint64_t)w.committed << 32);
    for (uint64_t x : {(uint64_t)op.n, op.from_registers ? 0 : op.a, op.b, (uint64_t)(op.accumulate != 0)})
        sum = (sum ^ x) * 0x9E3779B97F4A7C15u;
    if (w.issued == h.sequence[group].size()) h.sequence[group].push_back(sum);
    else if (h.sequence[group][w.issued] != sum) die("another warp of the group has another wgmma here");
    w.issued++;

    for (int k = 0; k < 16; k += 8) {
        auto reads = [&](uint64_t descriptor, int trans, int mn) {
            h.reads[cuda_wgmma_address(descriptor, trans, mn, k) / 1024][warp] = w.committed + 1;
        };
        // of a all rows: whose rows a warp reads is not said
        for (int mn = 0; !op.from_registers && mn < 64; mn += 8) reads(op.a, op.trans_a, mn);
        for (int mn = 0; mn < op.n; mn += 8) reads(op.b, op.trans_b, mn);
    }
    if (op.from_registers) w.registers.push_back({w.committed, {}, {}, op.file, op.line});
    CudaAccumulators* found = nullptr;
    for (int l = 0; l < 32; l++) {
        if (op.clocks.empty() || op.clocks.back() != lanes[l].clock) op.clocks.push_back(lanes[l].clock);
        const CudaMmaArguments& x = *(const CudaMmaArguments*)lanes[l].in;
        if (x.op.a != op.a || x.op.b != op.b || x.op.accumulate != op.accumulate) die("the lanes disagree");
        if (op.from_registers) {
            memcpy(op.registers[l].data(), x.registers, 16);
            w.registers.back().at[l] = x.registers, w.registers.back().values[l] = op.registers[l];
        }
        for (auto& acc : w.accumulators) {
            if (x.c + op.n / 2 <= acc->c[l] || acc->c[l] + acc->n / 2 <= x.c) continue;
            if (x.c != acc->c[l] || op.n != acc->n || (l && found != acc.get()))
                die("accumulators overlap those of another wgmma under way");
            found = acc.get();
        }
        if (l && found && found->c[l] != x.c) die("accumulators overlap those of another wgmma under way");
    }
    if (!found) {
        w.accumulators.emplace_back(found = new CudaAccumulators{op.n, {}, {}, 0});
        for (int l = 0; l < 32; l++) {
            float* c = found->c[l] = ((const CudaMmaArguments*)lanes[l].in)->c;
            found->v.insert(found->v.end(), c, c + op.n / 2);
            memset((void*)c, 0xFF, op.n / 2 * sizeof(float));
        }
    }
    found->last = op.group = w.committed;
    op.c = found;
    w.queue.push_back(op);
    h.queued++;
}

template <int N> void cuda_wgmma(const CudaMma& op, float* c, const unsigned* a, const char* name) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    CudaMmaArguments x{op, a, c};
    cuda_meet(name, ~0u, op.file, op.line, &x, nullptr, nullptr, 0, cuda_wgmma_issue);
}
template <int N, int TRANS_A, int TRANS_B> void wgmma_ss(float* c, uint64_t a, uint64_t b, int accumulate, CUDA_HERE) {
    cuda_wgmma<N>({N, TRANS_A, TRANS_B, accumulate, 0, false, a, b, {}, nullptr, file, line, {}}, c, nullptr,
                  "wgmma_ss");
}
template <int N, int TRANS_B> void wgmma_rs(float* c, const unsigned* a, uint64_t b, int accumulate, CUDA_HERE) {
    cuda_wgmma<N>({N, 0, TRANS_B, accumulate, 0, true, 0, b, {}, nullptr, file, line, {}}, c, a, "wgmma_rs");
}
inline void wgmma_fence(CUDA_HERE) {
    cuda_meet("wgmma_fence", ~0u, file, line, nullptr, nullptr, nullptr, 0, [](CudaThread* lanes, unsigned) {
        cuda_hopper.warps[(lanes - &cuda_block.threads[0]) / 32].fenced = true;
    });
}
inline void wgmma_commit(CUDA_HERE) {
    cuda_meet("wgmma_commit", ~0u, file, line, nullptr, nullptr, nullptr, 0, [](CudaThread* lanes, unsigned) {
        CudaMmaWarp& w = cuda_hopper.warps[(lanes - &cuda_block.threads[0]) / 32];
        w.committed++;
        w.fenced = false;
    });
}
template <int N> void wgmma_wait(CUDA_HERE) {
    cuda_meet("wgmma_wait", ~0u, file, line, nullptr, nullptr, nullptr, N, [](CudaThread* lanes, unsigned) {
        const int warp = (lanes - &cuda_block.threads[0]) / 32;
        CudaMmaWarp& w = cuda_hopper.warps[warp];
        const int done = w.committed - lanes[0].arg;  // groups
        while (!w.queue.empty() && w.queue.front().group < done) cuda_run_wgmma(warp);
        w.fenced = false;
        for (size_t i = w.registers.size(); i-- > 0;) {
            const CudaRegisters& r = w.registers[i];
            if (r.group >= done) continue;
            for (int l = 0; l < 32; l++)
                if (memcmp(r.at[l], r.values[l].data(), 16) != 0)
                    cuda_die_at("wgmma_rs", r.file, r.line, "the registers of A were written to before the wait");
            w.registers.erase(w.registers.begin() + i);
        }
        if (cuda_order.on) {
            CudaClock waited;
            cuda_set(waited.seen, cuda_component(cuda_order.stride - 32 + warp), done);
            CudaLast last;
            for (int l = 0; l < 32; l++) cuda_acquire(lanes[l], waited, last);
        }
        for (size_t i = w.accumulators.size(); i-- > 0;) {
            CudaAccumulators& acc = *w.accumulators[i];
            if (acc.last >= done) continue;
            for (int l = 0; l < 32; l++)
                for (int e = 0; e < acc.n / 2; e++) {
                    if (__float_as_uint(acc.c[l][e]) != ~0u)
                        cuda_die_at("wgmma_wait", lanes[0].file, lanes[0].line,
                                    "the accumulators were written to before the wait");
                    acc.c[l][e] = acc.v[l * (acc.n / 2) + e];
                }
            w.accumulators.erase(w.accumulators.begin() + i);
        }
    });
}
template <int COUNT> void wgmma_registers(float*) {}

inline int cuda_registers_at_start() {
    return std::min<int>(65536 / std::max<int>(cuda_block.threads.size(), 32) / 8 * 8, 255);
}
// Not less than the warp has, or not more. Checked at the block's end: the same in a warpgroup, and all together no
// more than the block got when it started.
inline void cuda_set_registers(const char* op, int registers, bool more, const char* file, int line) {
    cuda_meet(op, ~0u, file, line, nullptr, nullptr, nullptr, more ? registers : -registers,
              [](CudaThread* lanes, unsigned) {
                  int& now = cuda_hopper.registers[(lanes - &cuda_block.threads[0]) / 32];
                  const int from = now ? now : cuda_registers_at_start(), to = abs(lanes[0].arg);
                  if (lanes[0].arg > 0 ? to < from : to > from)
                      cuda_die_at(lanes[0].op, lanes[0].file, lanes[0].line,
                                  "from " + std::to_string(from) + " registers a thread to " + std::to_string(to));
                  now = to;
              });
}
template <int R> void registers_more(CUDA_HERE) {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    cuda_set_registers("registers_more", R, true, file, line);
}
template <int R> void registers_less(CUDA_HERE) {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    cuda_set_registers("registers_less", R, false, file, line);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the scheduler calls

inline bool cuda_hopper_pending(const CudaBlock& b) { return !b.hopper->loads.empty() || b.hopper->queued > 0; }
inline bool cuda_hopper_pending() { return cuda_hopper_pending(cuda_block); }

// One thing under way happens. When no thread can run, loads go on until one can.
inline void cuda_hopper_step() {
    CudaHopper& h = cuda_hopper;
    do {
        size_t n = h.loads.size(), pick = cuda_random() % (n + (h.queued > 0));
        if (pick < n) {
            CudaCopy copy = h.loads[pick];
            h.loads.erase(h.loads.begin() + pick);
            cuda_run_load(copy);
        } else {
            int warp = cuda_random() % 32;
            while (h.warps[warp].queue.empty()) warp = (warp + 1) % 32;
            cuda_run_wgmma(warp);
        }
    } while (cuda_block.ready_warps == 0 && cuda_hopper_pending());
}

inline void cuda_hopper_end() {
    CudaHopper& h = cuda_hopper;
    for (auto* copies : {&h.loads, &h.stores})
        for (const CudaCopy& copy : *copies)
            if (copy.data.empty())
                cuda_die("thread " + std::to_string(copy.thread) + " left without waiting for its " +
                         cuda_copy_name(copy));
    for (const CudaCopy& copy : h.stores) {
        cuda_run_write(copy);
        cuda_copy_each_piece(copy, [&](char* global, size_t bytes) {
            cuda_mark(global, bytes, {cuda_component(copy.thread) | CUDA_ASYNC, CUDA_NEVER});
        });
    }
    for (size_t warp = 0; warp * 32 < cuda_block.threads.size(); warp++) {
        if (!h.warps[warp].accumulators.empty())
            cuda_die("warp " + std::to_string(warp) + " left without waiting for its wgmma");
        if (h.warps[warp].issued != h.sequence[warp / 4].size())
            cuda_die("warp " + std::to_string(warp) + " left out a wgmma of its warpgroup");
    }
    const int warps = cuda_block.threads.size() / 32, at_start = cuda_registers_at_start();
    int registers = 0;
    for (int warp = 0; warp < warps; warp++) {
        registers += h.registers[warp] ? h.registers[warp] : at_start;
        if (h.registers[warp] != h.registers[warp / 4 * 4])
            cuda_die("warp " + std::to_string(warp) + " has other registers than its warpgroup's first warp");
    }
    if (registers > warps * at_start)
        cuda_die("the warps ask for " + std::to_string(registers) + " registers together, a thread of each, of " +
                 std::to_string(warps * at_start));
    for (int id = 1; id < 16; id++)
        if (h.named[id].arrived)
            cuda_die("named barrier " + std::to_string(id) + " was left with " + std::to_string(h.named[id].arrived) +
                     " of " + std::to_string(h.named[id].threads) + " threads");
}
