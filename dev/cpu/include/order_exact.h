// Who has seen what, in the exact geometry: kernels with a tensor map among their parameters are watched, and what the
// asynchronous proxy (bulk copies, wgmma) touches must have been ordered before. The rules (PTX ISA, "Causality
// order", "Async proxy", "membar/fence"):
//   order      a thread's own steps; a barrier, __syncwarp, an mbarrier's phase between who arrived and who waited for
//              it, a flag between its writer and its reader. Shuffles, votes and mma order nothing.
//   generic, then async   a thread's ordinary write, then a proxy fence somewhere on the way (its own, or that of a
//              thread that the write is ordered before), then the bulk copy or wgmma
//   async, then async     in the same block the order is enough, once the first has completed: a load with its
//              mbarrier's phase, a store with tma_store_wait_written. The completion implies a fence to the generic
//              proxy, but the manual orders a proxy's own accesses in one block only: to another block's copies the
//              second's block has a proxy fence of its own.
//   reads, then a write   whoever writes to shared memory that wgmma or a store reads is behind the wait for it.
//   load, then a write    whoever writes to shared memory that a load fills is behind its mbarrier's phase.
//   nobody, then a read   no mistake by itself: it reads NaN.
// A fence counts in its own block only: flags pass on the order, not the fences.
// Each thread has a vector clock. Ordinary writes are found by comparing: pages of shared memory and of the tensors are
// read-only until a thread writes there, then what differs at the thread's next meeting point is that thread's. Not
// seen: writes that change nothing, ordinary reads but __ldcg, and before a bulk copy's first touch what no map covers.
#pragma once
#include <signal.h>

#include <memory>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

constexpr int CUDA_PAGE = 4096, CUDA_OTHERS = 96;  // components beside threads: 64 mbarriers, 32 warps' wgmma
constexpr int CUDA_ASYNC = 1 << 30, CUDA_NEVER = 0x7fffffff;
enum CudaProxy { CUDA_GENERIC, CUDA_SHARED_ASYNC, CUDA_GLOBAL };  // who touches what

// Of each component, up to which step: what is ordered before; what of it has passed a proxy fence. Components are
// those of a resident block, one block after the other; empty: nothing.
struct CudaClock {
    std::vector<int> seen, shared, global;
};
struct CudaWriter {
    int who = -1, when = 0;  // component (CUDA_ASYNC: by a bulk copy) and step, CUDA_NEVER: under way
    bool operator!=(const CudaWriter& w) const { return who != w.who || when != w.when; }
};
struct CudaPage {
    char* at;          // as the kernel sees it
    const char* data;  // the same bytes
    bool open;         // may be written to
    int idle;          // comparisons since something changed
    alignas(64) char before[CUDA_PAGE];
    CudaWriter writers[CUDA_PAGE / 4];
};
struct CudaOrder {  // of a launch
    bool on = false;
    int stride = 0, step = 0;  // components of a block; the last step anybody took
    std::map<const int*, std::vector<int>> flags;  // as their last writers saw
};
inline CudaOrder cuda_order;

inline int cuda_component(int i) { return cuda_block.slot * cuda_order.stride + i; }
inline CudaThread& cuda_me() { return cuda_block.threads[cuda_block.current]; }

// ---------------------------------------------------------------------------------------------------------------------
// Pages. Their table is no part of the heap, which may lie in them.

struct CudaPages {
    static constexpr unsigned SIZE = 1 << 16, MOST = SIZE / 2;
    CudaPage* page;  // (MOST)
    unsigned* table;  // number of the page + 1, by a hash of its address
    unsigned count = 0, opened = 0;
    CudaPage* open[MOST];
    struct sigaction before;

    unsigned* find(const void* p) const {
        const uintptr_t key = (uintptr_t)p / CUDA_PAGE;
        unsigned i = key * 0x9E3779B97F4A7C15u >> 48;
        while (table[i] && (uintptr_t)page[table[i] - 1].at / CUDA_PAGE != key) i = (i + 1) % SIZE;
        return table + i;
    }
};
inline void* cuda_map_memory(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) cuda_die("no memory for watched pages");
    return p;
}
inline CudaPages& cuda_pages = *[] {
    CudaPages* p = new (cuda_map_memory(sizeof(CudaPages))) CudaPages;
    p->page = (CudaPage*)cuda_map_memory(CudaPages::MOST * sizeof(CudaPage));
    p->table = (unsigned*)cuda_map_memory(CudaPages::SIZE * sizeof(unsigned));
    return p;
}();

inline CudaPage* cuda_page(const void* p) {
    const unsigned i = *cuda_pages.find(p);
    return i ? cuda_pages.page + i - 1 : nullptr;
}

// A write to a watched page: it is open from then on. Any other fault is one.
CUDA_NO_ASAN inline void cuda_fault(int, siginfo_t* info, void*) {
    CudaPage* page = cuda_page(info->si_addr);
    if (!page || page->open) {
        sigaction(SIGSEGV, &cuda_pages.before, nullptr);
        return;
    }
    mprotect(page->at, CUDA_PAGE, PROT_READ | PROT_WRITE);
    page->open = true, page->idle = 0;
    cuda_pages.open[cuda_pages.opened++] = page;
}

CUDA_NO_ASAN inline void cuda_copy_page(char* to, const char* from) {
    for (int i = 0; i < CUDA_PAGE / 8; i++) ((uint64_t*)to)[i] = ((const uint64_t*)from)[i];
}
CUDA_NO_ASAN CUDA_FAST inline bool cuda_differ(const char* a, const char* b) {
    uint64_t any = 0;
    for (int i = 0; i < CUDA_PAGE / 8; i++) any |= ((const uint64_t*)a)[i] ^ ((const uint64_t*)b)[i];
    return any != 0;
}

// Nobody has written there yet. `alias`: the same memory, always writable.
CUDA_NO_ASAN inline void cuda_watch(char* at, size_t bytes, const char* alias = nullptr) {
    char *first = at - (uintptr_t)at % CUDA_PAGE, *end = at + bytes;
    for (char* p = first; p < end; p += CUDA_PAGE) {
        unsigned* entry = cuda_pages.find(p);
        if (*entry && !alias) continue;
        if (!*entry) {
            if (cuda_pages.count == CudaPages::MOST) cuda_die("more memory to watch than there is room for");
            *entry = ++cuda_pages.count;
        }
        CudaPage& page = cuda_pages.page[*entry - 1];
        page.at = p, page.data = alias ? alias + (p - first) : p;
        page.open = false;
        cuda_copy_page(page.before, page.data);
        for (CudaWriter& w : page.writers) w = CudaWriter();
        mprotect(p, CUDA_PAGE, PROT_READ);
    }
}

inline void cuda_written_over(size_t offset, size_t bytes, int i, const char* op, const char* file, int line);

// What the current thread has written since somebody last looked is its own.
CUDA_NO_ASAN inline void cuda_look() {
    CudaPages& pages = cuda_pages;
    for (unsigned i = 0; i < pages.opened; i++) {
        CudaPage& page = *pages.open[i];
        if (!cuda_differ(page.data, page.before)) {
            if (++page.idle < 64) continue;
            mprotect(page.at, CUDA_PAGE, PROT_READ);
            page.open = false;
            pages.open[i--] = pages.open[--pages.opened];
            continue;
        }
        page.idle = 0;
        for (int w = 0; w < CUDA_PAGE / 4; w++) {
            const uint32_t now = ((const uint32_t*)page.data)[w];
            if (now == ((uint32_t*)page.before)[w]) continue;
            ((uint32_t*)page.before)[w] = now;
            if (page.data != page.at)  // shared memory
                cuda_written_over(page.at + w * 4 - (char*)cuda_block.dynamic, 4, cuda_block.current, "a store before",
                                  cuda_me().file, cuda_me().line);
            page.writers[w] = {cuda_component(cuda_block.current), cuda_me().step};
        }
    }
}
inline void cuda_seal() {
    if (cuda_pages.opened) cuda_look();
}

// These bytes, where they are watched, are `writer`'s.
CUDA_NO_ASAN inline void cuda_mark(const void* at, size_t bytes, CudaWriter writer) {
    const char *p = (const char*)at, *end = p + bytes;
    while (p < end) {
        CudaPage* page = cuda_page(p);
        const char* stop = std::min(end, p - (uintptr_t)p % CUDA_PAGE + CUDA_PAGE);
        if (page)
            for (int w = (uintptr_t)p % CUDA_PAGE / 4; w <= int((uintptr_t)(stop - 1) % CUDA_PAGE / 4); w++) {
                page->writers[w] = writer;
                ((uint32_t*)page->before)[w] = ((const uint32_t*)page->data)[w];
            }
        p = stop;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clocks

CUDA_FAST inline void cuda_add(std::vector<int>& to, const std::vector<int>& from) {
    if (to.size() < from.size()) to.resize(from.size());
    int *t = to.data(), n = from.size();
    const int* f = from.data();
    for (int i = 0; i < n; i++) t[i] = std::max(t[i], f[i]);
}
inline void cuda_add(CudaClock& to, const CudaClock& from) {
    cuda_add(to.seen, from.seen), cuda_add(to.shared, from.shared), cuda_add(to.global, from.global);
}
inline void cuda_set(std::vector<int>& v, int component, int step) {
    if ((int)v.size() <= component) v.resize(cuda_order.stride * (component / cuda_order.stride + 1));
    v[component] = std::max(v[component], step);
}
inline int cuda_at(const std::vector<int>& v, int component) { return component < (int)v.size() ? v[component] : 0; }

// All that thread i has done and seen goes into `to`.
inline void cuda_release(CudaClock& to, int i) {
    CudaThread& t = cuda_block.threads[i];
    cuda_add(to, *t.clock);
    cuda_set(to.seen, cuda_component(i), t.step);
    t.step = ++cuda_order.step;
}
// Several threads one after the other often know the same: `last` is what was last asked for, and the result.
struct CudaLast {
    std::shared_ptr<const CudaClock> from, to;
};
inline void cuda_acquire(CudaThread& t, const CudaClock& what, CudaLast& last) {
    if (last.from != t.clock) {
        auto both = std::make_shared<CudaClock>(*t.clock);
        cuda_add(*both, what);
        last = {t.clock, both};
    }
    t.clock = last.to;
}
// The members of the mask (0: the whole block) meet; `first` is lane 0, or thread 0.
inline void cuda_join(CudaThread* first, unsigned mask) {
    if (!cuda_order.on) return;
    auto all = std::make_shared<CudaClock>();
    const int base = first - &cuda_block.threads[0], n = mask ? 32 : cuda_block.threads.size();
    const CudaClock* last = nullptr;
    for (int i = 0; i < n; i++) {
        if (mask && !(mask >> i & 1)) continue;
        if (first[i].clock.get() != last) cuda_add(*all, *first[i].clock);
        last = first[i].clock.get();
    }
    for (int i = 0; i < n; i++) {
        if (mask && !(mask >> i & 1)) continue;
        cuda_set(all->seen, cuda_component(base + i), first[i].step);
        first[i].step = ++cuda_order.step;
        first[i].clock = all;
    }
}
// fence.proxy.async by the current thread
inline void cuda_fence(bool shared, bool global) {
    cuda_seal();
    CudaThread& t = cuda_me();
    auto c = std::make_shared<CudaClock>(*t.clock);
    cuda_set(c->seen, cuda_component(cuda_block.current), t.step);
    if (shared) cuda_add(c->shared, c->seen);
    if (global) cuda_add(c->global, c->seen);
    t.step = ++cuda_order.step;
    t.clock = c;
}

// What a flag's writer has seen is ordered before what its reader does.
inline void cuda_flag_written(const int* flag) {
    if (!cuda_order.on) return;
    cuda_seal();
    CudaThread& t = cuda_me();
    std::vector<int>& seen = cuda_order.flags[flag] = t.clock->seen;
    cuda_set(seen, cuda_component(cuda_block.current), t.step);
    t.step = ++cuda_order.step;
}
inline void cuda_flag_read(const int* flag) {
    if (!cuda_order.on) return;
    auto found = cuda_order.flags.find(flag);
    if (found == cuda_order.flags.end()) return;
    auto c = std::make_shared<CudaClock>(*cuda_me().clock);
    cuda_add(c->seen, found->second);
    cuda_me().clock = c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Whether what a writer wrote may be touched by thread i, which knows c

inline bool cuda_ordered(CudaWriter w, const CudaClock& c, int i, CudaProxy proxy) {
    const int who = w.who & ~CUDA_ASYNC;
    if (w.who < 0) return true;
    if (w.when == CUDA_NEVER) return false;
    const bool async = w.who & CUDA_ASYNC;
    if (proxy == CUDA_SHARED_ASYNC) return cuda_at(async ? c.seen : c.shared, who) >= w.when;
    const bool block = who / cuda_order.stride == cuda_block.slot && w.when > cuda_block.first_step;
    if (proxy == CUDA_GENERIC || (async && block))
        return (block && who == cuda_component(i)) || cuda_at(c.seen, who) >= w.when;
    return cuda_at(c.global, who) >= w.when;
}

// Thread i, with what it knew at the start of `op`, touches bytes that may be watched.
inline void cuda_touch(const void* at, size_t bytes, const CudaClock& c, int i, CudaProxy proxy, const char* op,
                       const char* file, int line) {
    const char *p = (const char*)at, *end = p + bytes;
    CudaWriter last{-2};
    while (p < end) {
        const CudaPage* page = cuda_page(p);
        const char* stop = std::min(end, p - (uintptr_t)p % CUDA_PAGE + CUDA_PAGE);
        for (; page && p < stop; p += 4) {
            const CudaWriter w = page->writers[(uintptr_t)p % CUDA_PAGE / 4];
            if (!(w != last)) continue;
            last = w;
            if (cuda_ordered(w, c, i, proxy)) continue;
            cuda_block.current = i;
            const bool global = proxy == CUDA_GLOBAL || proxy == CUDA_GENERIC;
            const int who = w.who & ~CUDA_ASYNC;
            const std::string whose = who / cuda_order.stride == cuda_block.slot ? "" : " of another block";
            std::string what =
                "that a bulk copy" + whose + " wrote, and that was not waited for or not passed on to it";
            if (!(w.who & CUDA_ASYNC))
                what = "that thread " + std::to_string(who % cuda_order.stride) + whose + " wrote without " +
                       (proxy == CUDA_GENERIC ? "a flag or a barrier"
                        : global              ? "fence_async_global"
                                              : "fence_async_shared") +
                       " on the way, or while it was being read";
            cuda_die_at(op, file, line,
                        "it touches " + std::string(global ? "global memory" : "shared memory at ") +
                            (global ? "" : std::to_string(p - (const char*)cuda_block.dynamic)) + " " + what);
        }
        p = stop;
    }
}
// __ldcg: what other blocks may have written
inline void cuda_global_read(const void* at, size_t bytes, const char* file, int line) {
    if (!cuda_order.on) return;
    cuda_seal();
    cuda_touch(at, bytes, *cuda_me().clock, cuda_block.current, CUDA_GENERIC, "__ldcg", file, line);
}

// ---------------------------------------------------------------------------------------------------------------------
// A launch and its blocks

// Shared memory of a watched block: twice in the address space, once for the kernel and once for those who must not be
// noticed. Kept from launch to launch.
struct CudaWatchedShared {
    static constexpr size_t SIZE = 256 << 10;
    char *kernel = nullptr, *alias;
};
inline void* cuda_watched_shared(int slot, size_t bytes) {
    static std::deque<CudaWatchedShared> all;
    while ((int)all.size() <= slot) {
        all.emplace_back();
        const int file = memfd_create("shared", 0);
        if (file < 0 || ftruncate(file, CudaWatchedShared::SIZE) != 0) cuda_die("no memory for shared arrays");
        auto map = [&](int protection) {
            void* p = mmap(nullptr, CudaWatchedShared::SIZE, protection, MAP_SHARED, file, 0);
            if (p == MAP_FAILED) cuda_die("no memory for shared arrays");
            return (char*)p;
        };
        all.back().kernel = map(PROT_NONE), all.back().alias = map(PROT_READ | PROT_WRITE);
        close(file);
    }
    CudaWatchedShared& s = all[slot];
    memset(s.alias, 0xFF, CudaWatchedShared::SIZE);
    cuda_block.alias = s.alias - s.kernel;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(s.kernel, bytes);
    __asan_poison_memory_region(s.kernel + bytes, CudaWatchedShared::SIZE - bytes);
#endif
    for (CudaPage** p = cuda_pages.open; p < cuda_pages.open + cuda_pages.opened;)  // the block before left some open
        if ((*p)->at >= s.kernel && (*p)->at < s.kernel + CudaWatchedShared::SIZE)
            *p = cuda_pages.open[--cuda_pages.opened];
        else p++;
    cuda_watch(s.kernel, bytes, s.alias);
    cuda_block.pages = cuda_page(s.kernel);
    return s.kernel;
}
// The same address where writes are not noticed
template <class T> T* cuda_alias(T* p) {
    CudaBlock& b = cuda_block;
    const size_t offset = (const char*)p - (const char*)b.dynamic;
    return offset < b.dynamic_bytes ? (T*)((char*)p + b.alias) : p;
}

// Of what lies at this offset of watched shared memory
inline CudaWriter cuda_shared_writer(size_t offset) {
    return cuda_block.pages[offset / CUDA_PAGE].writers[offset % CUDA_PAGE / 4];
}
// An instruction's store to shared memory, by one of its lanes
inline void cuda_store(char* to, const unsigned* from, const CudaThread& lane) {
    memcpy(cuda_alias(to), from, 4);
    if (!cuda_order.on) return;
    const int i = &lane - &cuda_block.threads[0];
    cuda_written_over(to - (char*)cuda_block.dynamic, 4, i, lane.op, lane.file, lane.line);
    cuda_mark(to, 4, {cuda_component(i), lane.step});
}

inline void cuda_order_begin(const std::vector<CUtensorMap>& maps, int threads) {
    cuda_order = CudaOrder();
    cuda_order.on = !maps.empty();
    if (!cuda_order.on) return;
    cuda_order.stride = threads + CUDA_OTHERS;
    struct sigaction action = {};
    action.sa_sigaction = cuda_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &cuda_pages.before);
    for (const CUtensorMap& m : maps) {
        uint64_t bytes = m.dims[0] * 2;
        for (int d = 1; d < 4; d++) bytes += (m.dims[d] - 1) * m.strides[d];
        cuda_watch(m.base, bytes);
    }
}
inline void cuda_order_end() {
    if (!cuda_order.on) return;
    for (unsigned i = 0; i < cuda_pages.count; i++) mprotect(cuda_pages.page[i].at, CUDA_PAGE, PROT_READ | PROT_WRITE);
    for (unsigned i = 0; i < cuda_pages.count; i++) cuda_pages.page[i].open = false;
    memset(cuda_pages.table, 0, CudaPages::SIZE * sizeof(unsigned));
    cuda_pages.count = cuda_pages.opened = 0;
    sigaction(SIGSEGV, &cuda_pages.before, nullptr);
    cuda_order.on = false;
}
