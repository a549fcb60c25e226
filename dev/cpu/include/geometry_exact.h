// The exact geometry: real grids, blocks and warps of 32, for tests. Each CUDA thread of a block is a fiber with its
// own stack. A thread runs until it waits at a barrier, a shuffle or another warp instruction, then another is picked
// at random, mostly of the same warp (seed: environment CUDA_CPU_SEED, default 1), so a result that changes from
// launch to launch is a race. Two to four blocks are under way at a time; they start in order, the next when one ends.
// All lanes of a warp instruction must meet on the same line with the same mask, all threads of the block at each
// __syncthreads; when nobody can run, a report says who waits where, and the program exits with 1. Shared memory is one
// heap chunk an array, all NaN at the start of a block, so that AddressSanitizer sees overruns. One host thread
// launches.
#pragma once
#include <boost/context/detail/fcontext.hpp>
#include <sys/mman.h>
#include <vector>

#define WARP_SIZE 32

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define CUDA_NO_ASAN __attribute__((no_sanitize_address))
constexpr size_t CUDA_STACK = 512 << 10;
#else
#define CUDA_NO_ASAN
constexpr size_t CUDA_STACK = 128 << 10;
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// A thread of the block. While it waits: for which instruction, where, with which operands. The last lane to arrive
// calls complete(first lane of the warp, mask), which reads all operands and writes all results.
struct CudaClock;
struct CudaPage;
struct CudaHopper;
struct CudaThread {
    boost::context::detail::fcontext_t context;
    char* stack;  // lowest byte
    void* asan_stack;
    uint3 index;
    enum { RUNS, WAITS, LEFT } state;
    const char *op, *file;
    int line;
    unsigned mask;  // 0: the whole block
    const void *in, *in2;
    void* out;
    int arg;
    void (*complete)(CudaThread*, unsigned);
    struct Copy { void* to; const void* from; int bytes; bool valid; };
    std::vector<std::vector<Copy>> copies;  // asynchronous, by group; the last one is not committed
    std::shared_ptr<const CudaClock> clock;  // what it knows of others, and its own step (order_exact.h)
    int step;
    bool op_waits;  // at a named barrier, its warp's lanes having met

    bool meets(const CudaThread& other) const {
        auto same = [](const char* a, const char* b) { return a == b || strcmp(a, b) == 0; };
        return state == WAITS && line == other.line && mask == other.mask && same(op, other.op) &&
               same(file, other.file);
    }
};

struct CudaBlock {
    const char* kernel;
    std::vector<CudaThread> threads;
    std::vector<int> ready[32];  // by warp
    unsigned ready_warps;        // a bit for each that has any
    int current, warp, at_barrier, left;  // warp: that ran last
    uint3 index;
    int slot;                 // among the blocks under way
    std::vector<int> paused;  // threads that wait for a flag
    void (*body)(void*);
    void* body_arg;
    struct Chunk { const void* key; size_t bytes; void* data; };
    std::vector<Chunk> shared;
    void* dynamic;
    size_t dynamic_bytes;
    ptrdiff_t alias;  // if it is watched: to where it lies once more
    CudaPage* pages;  // and what is known of it, page by page
    int first_step;
    CudaHopper* hopper;
    boost::context::detail::fcontext_t scheduler;
    const void* scheduler_stack;
    size_t scheduler_stack_size;
    void* scheduler_asan;

    void make_ready(int thread) {
        ready[thread / 32].push_back(thread);
        ready_warps |= 1u << (thread / 32);
    }
};
inline std::vector<CudaBlock*> cuda_under_way;
inline CudaBlock* cuda_running;
#define cuda_block (*cuda_running)

inline uint64_t cuda_random() {  // xorshift64*
    static uint64_t state = cuda_seed * 0x9E3779B97F4A7C15u | 1;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du >> 32;
}

inline void cuda_seal();

// Back from the current thread to the scheduler.
inline void cuda_yield(bool leaves) {
    cuda_seal();
    CudaBlock& b = cuda_block;
    CudaThread& me = b.threads[b.current];
    __sanitizer_start_switch_fiber(leaves ? nullptr : &me.asan_stack, b.scheduler_stack, b.scheduler_stack_size);
    b.scheduler = boost::context::detail::jump_fcontext(b.scheduler, nullptr).fctx;
    __sanitizer_finish_switch_fiber(me.asan_stack, &b.scheduler_stack, &b.scheduler_stack_size);
}

CUDA_NO_ASAN inline void cuda_thread_main(boost::context::detail::transfer_t from) {
    CudaBlock& b = cuda_block;
    b.scheduler = from.fctx;
    __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
    b.body(b.body_arg);
    b.threads[b.current].state = CudaThread::LEFT;
    b.left++;
    cuda_yield(true);
}

inline void cuda_resume(int i) {
    CudaBlock& b = cuda_block;
    CudaThread& t = b.threads[i];
    b.current = i;
    threadIdx = t.index;
    __sanitizer_start_switch_fiber(&b.scheduler_asan, t.stack, CUDA_STACK);
    t.context = boost::context::detail::jump_fcontext(t.context, nullptr).fctx;
    __sanitizer_finish_switch_fiber(b.scheduler_asan, nullptr, nullptr);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reports

[[noreturn]] inline void cuda_die(const std::string& what) {
    fprintf(stderr, "cuda: kernel %s, block (%u,%u,%u) of %zu threads: %s\n", cuda_block.kernel, blockIdx.x, blockIdx.y,
            blockIdx.z, cuda_block.threads.size(), what.c_str());
    fflush(nullptr);
    _exit(1);  // not exit: this may be a fiber's stack
}

inline std::string cuda_where(const char* op, const char* file, int line) {
    return std::string(op) + " " + file + ":" + std::to_string(line);
}

[[noreturn]] inline void cuda_die_at(const char* op, const char* file, int line, const std::string& what) {
    cuda_die("thread " + std::to_string(cuda_block.current) + " is at " + cuda_where(op, file, line) + ": " + what);
}

// "96 threads (32-127) wait at __syncthreads train_gpt.cu:123, but 32 threads (0-31) have left the kernel"
[[noreturn]] inline void cuda_report_stuck() {
    std::vector<CudaThread>& threads = cuda_block.threads;
    std::string waiting, left;
    std::vector<bool> told(threads.size());
    for (size_t i = 0; i < threads.size(); i++) {
        if (told[i]) continue;
        const CudaThread& t = threads[i];
        std::string ranges;
        int count = 0;
        size_t first = 0;
        bool in = false;
        for (size_t j = i; j <= threads.size(); j++) {
            bool same = j < threads.size() && (t.state == CudaThread::LEFT ? threads[j].state == CudaThread::LEFT
                                                                           : threads[j].meets(t));
            if (same) told[j] = true, count++;
            if (same && !in) first = j;
            if (!same && in)
                ranges += (ranges.empty() ? "" : ",") + std::to_string(first) +
                          (j - 1 > first ? "-" + std::to_string(j - 1) : "");
            in = same;
        }
        bool one = count == 1;
        std::string who = std::to_string(count) + (one ? " thread (" : " threads (") + ranges + ") ";
        if (t.state == CudaThread::LEFT) {
            left = who + (one ? "has" : "have") + " left the kernel";
            continue;
        }
        char mask[32] = "";
        if (t.mask) snprintf(mask, sizeof mask, " with mask %08x", t.mask);
        waiting += (waiting.empty() ? "" : ", ") + who + (one ? "waits" : "wait") + " at " +
                   cuda_where(t.op, t.file, t.line) + mask;
    }
    cuda_die(waiting + (left.empty() ? "" : ", but " + left));
}

#include "order_exact.h"

// ---------------------------------------------------------------------------------------------------------------------
// Meeting points

// The current thread waits until the lanes of mask (0: all threads of the block) are here.
inline void cuda_meet(const char* op, unsigned mask, const char* file, int line, const void* in = nullptr,
                      const void* in2 = nullptr, void* out = nullptr, int arg = 0,
                      void (*complete)(CudaThread*, unsigned) = nullptr) {
    CudaBlock& b = cuda_block;
    int n = b.threads.size(), me = b.current, warp = mask ? me / 32 * 32 : 0, end = mask ? warp + 32 : n;
    CudaThread& t = b.threads[me];
    t.op = op, t.file = file, t.line = line, t.mask = mask;
    t.in = in, t.in2 = in2, t.out = out, t.arg = arg, t.complete = complete;
    t.state = CudaThread::WAITS;
    auto member = [&](int i) { return mask == 0 || mask >> (i - warp) & 1; };
    if (mask && !member(me))
        cuda_die("thread " + std::to_string(me) + " is at " + cuda_where(op, file, line) + ", but not in its mask");

    bool all = mask || ++b.at_barrier == n;
    for (int i = warp; i < end && all; i++)
        if (member(i)) all = i < n && b.threads[i].meets(t);
    if (all) {
        cuda_seal();
        if (complete) complete(&b.threads[warp], mask);
        for (int i = warp; i < end; i++)
            if (member(i)) b.threads[i].state = CudaThread::RUNS, b.make_ready(i);
        if (!mask) b.at_barrier = 0;
    }
    cuda_yield(false);
}

#define CUDA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_HERE) {
    cuda_meet("__syncthreads", 0, file, line, nullptr, nullptr, nullptr, 0, cuda_join);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_HERE) {
    cuda_meet("__syncwarp", mask, file, line, nullptr, nullptr, nullptr, 0, cuda_join);
}

// Lane l gets the value of lane arg; NaN bytes if that one takes no part.
template <class T> T cuda_shuffle(const char* op, unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    T result;
    cuda_meet(op, mask, file, line, &value, nullptr, &result, source, [](CudaThread* warp, unsigned mask) {
        for (int l = 0; l < 32; l++) {
            if (!(mask >> l & 1)) continue;
            int from = warp[l].arg;
            if (mask >> from & 1) memcpy(warp[l].out, warp[from].in, sizeof(T));
            else memset(warp[l].out, 0xFF, sizeof(T));
        }
    });
    return result;
}
// As PTX's shfl: within the lane's segment of `width` lanes; who would leave it gets its own value.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HERE) {
    int lane = cuda_block.current % 32, first = lane & -width;
    return cuda_shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_HERE) {
    int lane = cuda_block.current % 32, from = lane ^ bits;
    return cuda_shuffle("__shfl_xor_sync", mask, value, from < (lane & -width) + width ? from : lane, file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HERE) {
    int lane = cuda_block.current % 32, from = lane - (int)delta;
    return cuda_shuffle("__shfl_up_sync", mask, value, from >= (lane & -width) ? from : lane, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HERE) {
    int lane = cuda_block.current % 32, from = lane + (int)delta;
    return cuda_shuffle("__shfl_down_sync", mask, value, from < (lane & -width) + width ? from : lane, file, line);
}

inline int __any_sync(unsigned mask, int value, CUDA_HERE) {
    int result;
    cuda_meet("__any_sync", mask, file, line, &value, nullptr, &result, 0, [](CudaThread* warp, unsigned mask) {
        int any = 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) any |= *(const int*)warp[l].in != 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) *(int*)warp[l].out = any;
    });
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Asynchronous copies (cp.async), done as late as allowed: at the wait. Until then the target is NaN, so that who reads
// it too early, or still reads what was there, sees it.

template <int BYTES> void copy_async(void* to, const void* from, bool valid, CUDA_HERE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    if ((uintptr_t)to % BYTES || (uintptr_t)from % BYTES)
        cuda_die("thread " + std::to_string(cuda_block.current) + " is at " + cuda_where("copy_async", file, line) +
                 " with an address that is not a multiple of " + std::to_string(BYTES));
    auto& copies = cuda_block.threads[cuda_block.current].copies;
    if (copies.empty()) copies.emplace_back();
    copies.back().push_back({to, from, BYTES, valid});
    memset(to, 0xFF, BYTES);
}
inline void copy_commit() {
    auto& copies = cuda_block.threads[cuda_block.current].copies;
    if (copies.empty()) copies.emplace_back();
    copies.emplace_back();
}
// Until at most the N newest committed groups are under way.
template <int N> void copy_wait() {
    auto& copies = cuda_block.threads[cuda_block.current].copies;
    while ((int)copies.size() > N + 1) {
        for (auto& c : copies.front())
            if (c.valid) memcpy(c.to, c.from, c.bytes);
            else memset(c.to, 0, c.bytes);
        copies.erase(copies.begin());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Flags between blocks. Who waits for one looks again when any has been written.

inline int flag_read(const int* flag) {
    cuda_flag_read(flag);
    return *flag;
}
inline void flag_write(int* flag, int value) {
    cuda_flag_written(flag);
    *flag = value;
    for (CudaBlock* b : cuda_under_way) {
        for (int thread : b->paused) b->threads[thread].state = CudaThread::RUNS, b->make_ready(thread);
        b->paused.clear();
    }
}
inline void flag_pause(CUDA_HERE) {
    CudaThread& t = cuda_me();
    t.op = "flag_read", t.file = file, t.line = line, t.mask = 0;
    t.state = CudaThread::WAITS;
    cuda_block.paused.push_back(cuda_block.current);
    cuda_yield(false);
}

// ---------------------------------------------------------------------------------------------------------------------
// Warp instructions of the tensor cores

inline float cuda_half_word(const unsigned* registers, int i) {  // bfloat16 number i of a fragment, two a register
    return __builtin_bit_cast(float, (registers[i / 2] >> (i % 2 * 16) & 0xFFFF) << 16);
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, c += a b, a (16,16), b (16,8), c (16,8). A lane holds, with
// g = lane / 4 and t = lane % 4 (PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type"):
//   a0..a7, two a register: row g for i in {0,1,4,5}, else g + 8; column 2t + i%2, + 8 for i >= 4
//   b0..b3, two a register: row 2t + i%2, + 8 for i >= 2; column g
//   c0..c3:                 row g for i < 2, else g + 8; column 2t + i%2
inline void mma_m16n8k16(float* c, const unsigned* a, const unsigned* b, CUDA_HERE) {
    cuda_meet("mma_m16n8k16", ~0u, file, line, a, b, c, 0, [](CudaThread* warp, unsigned) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, t = l % 4;
            for (int i = 0; i < 8; i++)
                A[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = cuda_half_word((const unsigned*)warp[l].in, i);
            for (int i = 0; i < 4; i++)
                B[2 * t + i % 2 + i / 2 * 8][g] = cuda_half_word((const unsigned*)warp[l].in2, i);
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                float sum = 0.0f;
                for (int k = 0; k < 16; k++) sum += A[l / 4 + i / 2 * 8][k] * B[k][2 * (l % 4) + i % 2];
                ((float*)warp[l].out)[i] += sum;
            }
    });
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: four 8 x 8 matrices of 16-bit elements. Lane l gives the address of
// row l%8 of matrix l/8. Register m of lane l gets of matrix m, in its lower and upper half, the elements
// (l/4, 2(l%4)) and (l/4, 2(l%4)+1); with .trans those of the transposed matrix.
template <bool trans> void cuda_ldmatrix(const char* op, unsigned* r, const void* row, const char* file, int line) {
    if ((uintptr_t)row % 16)
        cuda_die("thread " + std::to_string(cuda_block.current) + " is at " + cuda_where(op, file, line) +
                 " with an address that is not 16-byte aligned");
    cuda_meet(op, ~0u, file, line, row, nullptr, r, 0, [](CudaThread* warp, unsigned) {
        auto element = [&](int m, int i, int j) -> unsigned {
            return ((const unsigned short*)warp[8 * m + (trans ? j : i)].in)[trans ? i : j];
        };
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++)
                ((unsigned*)warp[l].out)[m] = element(m, l / 4, l % 4 * 2) | element(m, l / 4, l % 4 * 2 + 1) << 16;
    });
}
inline void ldmatrix_x4(unsigned* r, const void* row, CUDA_HERE) {
    cuda_ldmatrix<false>("ldmatrix_x4", r, row, file, line);
}
inline void ldmatrix_x4_trans(unsigned* r, const void* row, CUDA_HERE) {
    cuda_ldmatrix<true>("ldmatrix_x4_trans", r, row, file, line);
}

// stmatrix.sync.aligned.m8n8.x4.shared.b16: the same the other way, without .trans
inline void stmatrix_x4(void* row, const unsigned* r, CUDA_HERE) {
    if ((uintptr_t)row % 16)
        cuda_die("thread " + std::to_string(cuda_block.current) + " is at " + cuda_where("stmatrix_x4", file, line) +
                 " with an address that is not 16-byte aligned");
    cuda_meet("stmatrix_x4", ~0u, file, line, r, row, nullptr, 0, [](CudaThread* warp, unsigned) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++)
                cuda_store((char*)warp[8 * m + l / 4].in2 + l % 4 * 4, (const unsigned*)warp[l].in + m, warp[l]);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

inline void* cuda_shared_chunk(size_t bytes) {
    if (bytes == 0) return nullptr;
    void* data = memalign(1024, bytes);
    if (data == nullptr) cuda_die("no memory for shared arrays");
    return memset(data, 0xFF, bytes);
}
inline void* cuda_dynamic_shared() { return cuda_block.dynamic; }

// The block's array for this declaration (of this instance of a template): made by the first thread that passes.
inline void* cuda_static_shared(const void* key, size_t bytes) {
    for (auto& chunk : cuda_block.shared)
        if (chunk.key == key) return chunk.data;
    size_t all = cuda_block.dynamic_bytes + bytes;
    for (auto& chunk : cuda_block.shared) all += chunk.bytes;
    if (all > cuda_shared_optin)
        cuda_die("dynamic and static shared memory are " + std::to_string(all) + " bytes, of which a block has " +
                 std::to_string(cuda_shared_optin));
    cuda_block.shared.push_back({key, bytes, cuda_shared_chunk(bytes)});
    return cuda_block.shared.back().data;
}
#define CUDA_SHARED(name, dims, ...)               \
    using name##_shared_type = __VA_ARGS__ dims;   \
    static char name##_shared_key;                 \
    name##_shared_type& name =                     \
        *(name##_shared_type*)cuda_static_shared(&name##_shared_key, sizeof(name##_shared_type))

#include "hopper_exact.h"

// ---------------------------------------------------------------------------------------------------------------------
// The grid

constexpr int CUDA_UNDER_WAY = 4;  // blocks at a time, at most

inline char* cuda_new_stack() {  // below it a page that may not be touched
    size_t page = 4096;
    char* p = (char*)mmap(nullptr, CUDA_STACK + page, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) cuda_die("no memory for the threads' stacks");
    return p + page;
}

// The block that is next begins, with threads that have not run.
inline void cuda_begin_block(int slot, uint3 index, size_t shared) {
    CudaBlock& b = cuda_block;
    static std::vector<char*> all_stacks[CUDA_UNDER_WAY];
    std::vector<char*>& stacks = all_stacks[slot];
    int n = b.threads.size();
    while ((int)stacks.size() < n) stacks.push_back(cuda_new_stack());
    b.slot = slot, b.index = index;
    b.current = b.warp = b.at_barrier = b.left = 0;
    b.alias = 0;
    b.dynamic_bytes = shared;
    b.dynamic = cuda_order.on ? cuda_watched_shared(slot, shared) : cuda_shared_chunk(shared);
    b.first_step = cuda_order.step;
    static const auto nothing = std::make_shared<const CudaClock>();
    for (int i = 0; i < n; i++) {
        CudaThread& t = b.threads[i];
        t = {};
        t.stack = stacks[i];
        t.context = boost::context::detail::make_fcontext(t.stack + CUDA_STACK, CUDA_STACK, cuda_thread_main);
        t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        t.clock = nothing;
        t.step = ++cuda_order.step;
        b.make_ready(i);
    }
    b.hopper = new CudaHopper;
}
inline void cuda_end_block() {
    CudaBlock& b = cuda_block;
    cuda_hopper_end();
    delete b.hopper;
    if (!cuda_order.on) free(b.dynamic);
    for (auto& chunk : b.shared) free(chunk.data);
    b.shared.clear();
}

// Mostly a lane of the warp that ran last, so that one warp gets far ahead of the others, up to the next barrier; now
// and then another warp. With lanes picked evenly warps go in step, and races between them stay hidden. Bulk copies and
// wgmma go on meanwhile: one step now and then, or when all threads wait. Blocks are picked as warps are.
inline void cuda_run_some() {
    CudaBlock& b = cuda_block;
    do {
        if (cuda_hopper_pending() && (b.ready_warps ? cuda_random() % 16 == 0 : b.left < (int)b.threads.size()))
            cuda_hopper_step();
        if (b.ready_warps == 0) return;
        if (!(b.ready_warps >> b.warp & 1) || cuda_random() % 256 == 0)
            do b.warp = cuda_random() % 32;
            while (!(b.ready_warps >> b.warp & 1));
        std::vector<int>& lanes = b.ready[b.warp];
        std::swap(lanes[cuda_random() % lanes.size()], lanes.back());
        int i = lanes.back();
        lanes.pop_back();
        if (lanes.empty()) b.ready_warps &= ~(1u << b.warp);
        cuda_resume(i);
    } while (cuda_random() % 256);
}

// maps: among the kernel's parameters
template <class F>
void cuda_run_blocks(const char* kernel, dim3 grid, dim3 block, size_t shared, const std::vector<CUtensorMap>& maps,
                     F body) {
    static CudaBlock blocks[CUDA_UNDER_WAY];
    const size_t all = (size_t)grid.x * grid.y * grid.z, most = 2 + cuda_random() % (CUDA_UNDER_WAY - 1);
    gridDim = grid;
    blockDim = block;
    cuda_running = blocks;
    cuda_order_begin(maps, block.x * block.y * block.z);
    std::vector<CudaBlock*>& way = cuda_under_way;
    for (size_t next = 0; next < all || !way.empty();) {
        for (int slot = 0; way.size() < most && next < all; slot++) {
            cuda_running = blocks + slot;
            if (std::find(way.begin(), way.end(), cuda_running) != way.end()) continue;
            cuda_block.kernel = kernel;
            cuda_block.threads.resize(block.x * block.y * block.z);
            cuda_block.body = [](void* f) { (*(F*)f)(); };
            cuda_block.body_arg = &body;
            blockIdx = {unsigned(next % grid.x), unsigned(next / grid.x % grid.y), unsigned(next / grid.x / grid.y)};
            cuda_begin_block(slot, blockIdx, shared);
            way.push_back(cuda_running);
            next++;
        }
        auto can_run = [&](size_t i) { return way[i]->ready_warps || cuda_hopper_pending(*way[i]); };
        size_t pick = cuda_random() % way.size();
        for (size_t i = 1; i < way.size() && !can_run(pick); i++) pick = (pick + 1) % way.size();
        const bool stuck = !can_run(pick);
        cuda_running = way[stuck ? 0 : pick];
        blockIdx = cuda_block.index;
        if (stuck) cuda_report_stuck();
        cuda_run_some();
        if (cuda_block.left < (int)cuda_block.threads.size()) continue;
        cuda_end_block();
        way.erase(way.begin() + pick);
    }
    cuda_order_end();
}
