// Hopper's instructions in the exact geometry, with the names of train_gpt.cu's wrappers. What is asynchronous on the
// device happens here as early or as late as it may, at random (stores as late):
//   bulk copies   between their start and their mbarrier's phase (loads) or the wait for their group (stores); from the
//                 start on a load's destination holds NaN
//   wgmma         between its start and the wait for its group; until then its accumulators hold NaN. Each warp's
//                 quarter runs for itself, and the four warps of a group must issue the same sequence
// Reported: threads that wait for ever, accumulators touched before the wait, operands in shared memory that ordinary
// stores changed without fence_async_shared (the copy engine and wgmma see shared memory as it was at the last fence of
// any thread), mbarriers used before mbarrier_fence_init or with too many arrivals, groups of wgmma without a fence,
// and work still under way when the block ends. An address in shared memory is the offset from the dynamic array's
// begin.
#pragma once
#include <array>
#include <deque>
#include <memory>

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
};
struct CudaMmaWarp {
    std::deque<CudaMma> queue;
    std::vector<std::unique_ptr<CudaAccumulators>> accumulators;
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
};
struct CudaNamedBarrier {
    int threads = 0, arrived = 0;
    std::vector<int> waiting;
};
struct CudaHopper {
    std::vector<CudaCopy> loads, stores;         // under way
    std::map<int, int> store_groups;             // committed by a thread
    std::vector<std::pair<uint64_t*, int>> waiting;  // at an mbarrier: which, which thread
    std::vector<uint64_t*> unfenced;             // mbarriers initialised, not yet fenced
    CudaNamedBarrier named[16];
    CudaMmaWarp warps[32];
    std::vector<uint64_t> sequence[8];           // of wgmma, by warpgroup
    std::vector<char> seen;                      // dynamic shared memory as the copy engine and wgmma see it
    int queued = 0;                              // wgmma not yet run
    int registers[32] = {};                      // a thread, by warp; 0: as at the start
};
inline CudaHopper cuda_hopper;

[[noreturn]] inline void cuda_die_at(const char* op, const char* file, int line, const std::string& what) {
    cuda_die("thread " + std::to_string(cuda_block.current) + " is at " + cuda_where(op, file, line) + ": " + what);
}

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
    CudaMbarrier& m = *(CudaMbarrier*)bar;
    if ((uintptr_t)bar % 8 || m.arrivals == 0 || m.arrivals == 0xFFFFF || m.pending > m.arrivals)
        cuda_die_at(op, file, line, "no mbarrier there");
    for (uint64_t* u : cuda_hopper.unfenced)
        if (u == bar) cuda_die_at(op, file, line, "the mbarrier is used before mbarrier_fence_init");
    return m;
}
// arrivals and bytes expected, or bytes that came
inline void cuda_mbarrier_update(CudaMbarrier& m, unsigned arrivals, int64_t bytes) {
    m.pending -= arrivals;
    m.bytes += bytes;
    if (m.pending != 0 || m.bytes != 0) return;
    m.phase ^= 1;
    m.pending = m.arrivals;
    auto& waiting = cuda_hopper.waiting;
    for (size_t i = waiting.size(); i-- > 0;) {
        if ((CudaMbarrier*)waiting[i].first != &m) continue;
        cuda_wake(waiting[i].second);
        waiting.erase(waiting.begin() + i);
    }
}
inline void cuda_mbarrier_arrive(uint64_t* bar, unsigned bytes, const char* op, const char* file, int line) {
    CudaMbarrier& m = cuda_mbarrier(bar, op, file, line);
    if (m.pending == 0) cuda_die_at(op, file, line, "more arrivals in a phase than the mbarrier counts");
    cuda_mbarrier_update(m, 1, bytes);
}

inline void mbarrier_init(uint64_t* bar, unsigned arrivals, CUDA_HERE) {
    if (arrivals == 0 || arrivals >= 0xFFFFF) cuda_die_at("mbarrier_init", file, line, "arrivals out of range");
    *(CudaMbarrier*)bar = {0, arrivals, arrivals, 0};
    cuda_hopper.unfenced.push_back(bar);
}
inline void mbarrier_fence_init() { cuda_hopper.unfenced.clear(); }
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
}

inline void cuda_named_barrier(int id, int threads, bool waits, const char* op, const char* file, int line) {
    if (id < 1 || id > 15 || threads <= 0 || threads % 32) cuda_die_at(op, file, line, "no such barrier");
    CudaNamedBarrier& n = cuda_hopper.named[id];
    if (n.arrived && n.threads != threads) cuda_die_at(op, file, line, "others gave another number of threads");
    n.threads = threads;
    if (waits) n.waiting.push_back(cuda_block.current);
    if (++n.arrived == threads) {
        for (int thread : n.waiting) cuda_wake(thread);
        n.arrived = 0;
        n.waiting.clear();
        if (waits) cuda_yield(false);
    } else if (waits) {
        cuda_wait(op, file, line);
    }
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
inline void fence_async_shared() {
    memcpy(cuda_hopper.seen.data(), cuda_block.dynamic, cuda_block.dynamic_bytes);
}
inline void fence_async_global() {}
// n bytes at an address; all of them were there when a thread last said fence_async_shared
inline const char* cuda_seen(size_t address, size_t n, const char* op, const char* file, int line) {
    if (address + n > cuda_block.dynamic_bytes) cuda_die(cuda_where(op, file, line) + " reads beyond shared memory");
    const char* p = &cuda_hopper.seen[address];
    if (memcmp(p, (const char*)cuda_block.dynamic + address, n) != 0)
        cuda_die(cuda_where(op, file, line) + " reads shared memory at " + std::to_string(address) +
                 " that was written without fence_async_shared, or while it was being read");
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bulk tensor copies: a box of rows of 128 bytes, of which row r's 16-byte chunk i lies at chunk i XOR r % 8

inline size_t cuda_copy_rows(const CUtensorMap& map) { return size_t(map.box[1]) * map.box[2] * map.box[3]; }

inline CudaCopy cuda_copy(bool load, const CUtensorMap* map, const void* smem, int c0, int c1, int c2, int c3,
                          const char* file, int line) {
    const char* op = load ? "tma_load" : "tma_store";
    size_t offset = cuda_shared_offset(smem, op, file, line);
    if (map->made != CUDA_TENSOR_MAP_MADE) cuda_die_at(op, file, line, "no tensor map");
    if (offset % 1024) cuda_die_at(op, file, line, "the tile is not aligned to 1024 bytes");
    if (offset + cuda_copy_rows(*map) * 128 > cuda_block.dynamic_bytes)
        cuda_die_at(op, file, line, "the box leaves shared memory");
    return {load, *map, (char*)smem, {c0, c1, c2, c3}, nullptr, cuda_block.current, 0};
}

inline void cuda_run_copy(const CudaCopy& copy) {
    if (copy.to) {
        const char* op = copy.add ? "bulk_add" : "bulk_store";
        const float* from = (const float*)cuda_seen(copy.smem - (char*)cuda_block.dynamic, copy.bytes, op, "", 0);
        for (int i = 0; i < copy.bytes / 4; i++) copy.to[i] = (copy.add ? copy.to[i] : 0.0f) + from[i];
        return;
    }
    const CUtensorMap& m = copy.map;
    char* shared = (char*)cuda_block.dynamic;
    const size_t base = copy.smem - shared;
    for (size_t row = 0; row < cuda_copy_rows(m); row++) {
        const int64_t at[4] = {copy.at[0], copy.at[1] + int64_t(row % m.box[1]),
                               copy.at[2] + int64_t(row / m.box[1] % m.box[2]),
                               copy.at[3] + int64_t(row / m.box[1] / m.box[2])};
        bool inside = true;
        for (int d = 1; d < 4; d++) inside &= at[d] >= 0 && at[d] < (int64_t)m.dims[d];
        char* global = m.base + at[1] * (int64_t)m.strides[1] + at[2] * (int64_t)m.strides[2] +
                       at[3] * (int64_t)m.strides[3];
        for (int i = 0; i < 64; i++) {
            const int64_t x = at[0] + i;
            const size_t address = cuda_swizzle(base + row * 128 + i * 2);
            const bool valid = inside && x >= 0 && x < (int64_t)m.dims[0];
            if (copy.load) {
                if (valid) memcpy(shared + address, global + x * 2, 2);
                else memset(shared + address, 0, 2);
                memcpy(&cuda_hopper.seen[address], shared + address, 2);
            } else if (valid) {
                memcpy(global + x * 2, cuda_seen(address, 2, "tma_store", "", 0), 2);
            }
        }
    }
    if (copy.load)
        cuda_mbarrier_update(*(CudaMbarrier*)copy.bar, 0, -(int64_t)(cuda_copy_rows(m) * 128));
}

inline void tma_load(void* smem, const CUtensorMap* map, uint64_t* bar, int c0, int c1, int c2 = 0, int c3 = 0,
                     CUDA_HERE) {
    CudaCopy copy = cuda_copy(true, map, smem, c0, c1, c2, c3, file, line);
    cuda_mbarrier(bar, "tma_load", file, line);
    copy.bar = bar;
    size_t bytes = cuda_copy_rows(*map) * 128;
    memset(smem, 0xFF, bytes);
    memset(&cuda_hopper.seen[(char*)smem - (char*)cuda_block.dynamic], 0xFF, bytes);
    cuda_hopper.loads.push_back(copy);
}
inline void tma_store(const CUtensorMap* map, const void* smem, int c0, int c1, int c2 = 0, int c3 = 0, CUDA_HERE) {
    CudaCopy copy = cuda_copy(false, map, smem, c0, c1, c2, c3, file, line);
    copy.group = cuda_hopper.store_groups[copy.thread];
    cuda_hopper.stores.push_back(copy);
}
inline void cuda_bulk(float* to, const float* from, int bytes, bool add, const char* file, int line) {
    const char* op = add ? "bulk_add" : "bulk_store";
    if ((cuda_shared_offset(from, op, file, line) | (uintptr_t)to | bytes) % 16)
        cuda_die_at(op, file, line, "an address or the size is not a multiple of 16");
    CudaCopy copy{false, {}, (char*)from, {}, nullptr, cuda_block.current, 0, to, bytes, add};
    copy.group = cuda_hopper.store_groups[copy.thread];
    cuda_hopper.stores.push_back(copy);
}
inline void bulk_store(float* to, const float* from, int bytes, CUDA_HERE) {
    cuda_bulk(to, from, bytes, false, file, line);
}
inline void bulk_add(float* to, const float* from, int bytes, CUDA_HERE) {
    cuda_bulk(to, from, bytes, true, file, line);
}
inline void tma_store_commit() { cuda_hopper.store_groups[cuda_block.current]++; }
template <int N> void tma_store_wait() {
    auto& copies = cuda_hopper.stores;
    const int me = cuda_block.current, done = cuda_hopper.store_groups[me] - N;  // groups
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].thread != me || copies[i].group >= done) {
            i++;
            continue;
        }
        cuda_run_copy(copies[i]);
        copies.erase(copies.begin() + i);
    }
}
template <int N> void tma_store_wait_written() { tma_store_wait<N>(); }

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

inline float cuda_wgmma_element(uint64_t descriptor, int trans, int mn, int k, const CudaMma& op) {
    const size_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
    const size_t address = trans ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                 : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
    uint16_t bits;
    memcpy(&bits, cuda_seen(cuda_swizzle(address), 2, "wgmma", op.file, op.line), 2);
    return __builtin_bit_cast(float, (unsigned)bits << 16);
}

__attribute__((optimize("O3"))) inline void cuda_wgmma_product(float* c, const float* a, const float* b, int n) {
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
    float a[16 * 16];
    std::vector<float> b(16 * op.n), c(16 * op.n);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            // lane and number of the element in the A fragment of mma.m16n8k16
            int lane = i % 8 * 4 + k % 8 / 2, e = k / 8 * 4 + i / 8 * 2 + k % 2;
            a[i * 16 + k] = op.from_registers ? cuda_half_word(op.registers[lane].data(), e)
                                              : cuda_wgmma_element(op.a, op.trans_a, warp % 4 * 16 + i, k, op);
        }
    for (int k = 0; k < 16; k++)
        for (int j = 0; j < op.n; j++) b[k * op.n + j] = cuda_wgmma_element(op.b, op.trans_b, j, k, op);
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
    if ((group + 1) * 128 > (int)cuda_block.threads.size()) die("the block ends within the warpgroup");
    if (!w.fenced) die("no wgmma_fence since the last commit or wait");
    if ((!op.from_registers && (op.a >> 62 != 1 || op.a >> 49 & 7)) || op.b >> 62 != 1 || op.b >> 49 & 7)
        die("not a descriptor of a 128-byte swizzled tile");
    uint64_t sum = op.line;
    for (uint64_t x : {(uint64_t)op.n, op.from_registers ? 0 : op.a, op.b, (uint64_t)(op.accumulate != 0)})
        sum = (sum ^ x) * 0x9E3779B97F4A7C15u;
    if (w.issued == h.sequence[group].size()) h.sequence[group].push_back(sum);
    else if (h.sequence[group][w.issued] != sum) die("another warp of the group has another wgmma here");
    w.issued++;

    CudaAccumulators* found = nullptr;
    for (int l = 0; l < 32; l++) {
        const CudaMmaArguments& x = *(const CudaMmaArguments*)lanes[l].in;
        if (x.op.a != op.a || x.op.b != op.b || x.op.accumulate != op.accumulate) die("the lanes disagree");
        if (op.from_registers) memcpy(op.registers[l].data(), x.registers, 16);
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
    cuda_wgmma<N>({N, TRANS_A, TRANS_B, accumulate, 0, false, a, b, {}, nullptr, file, line}, c, nullptr, "wgmma_ss");
}
template <int N, int TRANS_B> void wgmma_rs(float* c, const unsigned* a, uint64_t b, int accumulate, CUDA_HERE) {
    cuda_wgmma<N>({N, 0, TRANS_B, accumulate, 0, true, 0, b, {}, nullptr, file, line}, c, a, "wgmma_rs");
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

// Checked at the block's end: all together no more than the block got when it started.
template <int R> void registers_more() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    cuda_hopper.registers[cuda_block.current / 32] = R;
}
template <int R> void registers_less() { registers_more<R>(); }

// ---------------------------------------------------------------------------------------------------------------------
// What the scheduler calls

inline void cuda_hopper_begin() {
    cuda_hopper = CudaHopper();
    cuda_hopper.seen.assign((const char*)cuda_block.dynamic, (const char*)cuda_block.dynamic + cuda_block.dynamic_bytes);
}
inline bool cuda_hopper_pending() { return !cuda_hopper.loads.empty() || cuda_hopper.queued > 0; }

// One thing under way happens. When no thread can run, loads go on until one can.
inline void cuda_hopper_step() {
    CudaHopper& h = cuda_hopper;
    do {
        size_t n = h.loads.size(), pick = cuda_random() % (n + (h.queued > 0));
        if (pick < n) {
            CudaCopy copy = h.loads[pick];
            h.loads.erase(h.loads.begin() + pick);
            cuda_run_copy(copy);
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
            cuda_die("thread " + std::to_string(copy.thread) + " left without waiting for its " +
                     (copy.load ? "tma_load" : "tma_store"));
    for (size_t warp = 0; warp * 32 < cuda_block.threads.size(); warp++) {
        if (!h.warps[warp].accumulators.empty())
            cuda_die("warp " + std::to_string(warp) + " left without waiting for its wgmma");
        if (h.warps[warp].issued != h.sequence[warp / 4].size())
            cuda_die("warp " + std::to_string(warp) + " left out a wgmma of its warpgroup");
    }
    const int warps = cuda_block.threads.size() / 32, at_start = std::min(65536 / 32 / std::max(warps, 1) / 8 * 8, 255);
    int registers = 0;
    for (int warp = 0; warp < warps; warp++) registers += h.registers[warp] ? h.registers[warp] : at_start;
    if (registers > warps * at_start)
        cuda_die("the warps ask for " + std::to_string(registers) + " registers together, a thread of each, of " +
                 std::to_string(warps * at_start));
    for (int id = 1; id < 16; id++)
        if (h.named[id].arrived)
            cuda_die("named barrier " + std::to_string(id) + " was left with " + std::to_string(h.named[id].arrived) +
                     " of " + std::to_string(h.named[id].threads) + " threads");
}
