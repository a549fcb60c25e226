// Who knows what of whom: clocks of warps and asynchronous agents, and the last accesses to each place of memory. PTX
// ISA manual: "Memory Consistency Model", "Proxies"; of each instruction its own words on what it orders.
#pragma once
#include <bitset>

#include "text.h"

namespace ptx {

// Agents of a block, whose steps are counted: its warps, and what works on by itself for them.
enum : int { WARPS = 0, COPIES = 32, BULK_READS = 64, BULK_WRITES = 96, PRODUCTS = 128, ARRIVALS = 160, AGENTS = 224 };

// What is known of an agent: all its accesses up to step `all`, and of some lanes those up to a later step. Of lanes at
// more than two such steps some are taken to be further than they are: then a race may be missed, none is invented.
struct Known {
    uint32_t all = 0;
    struct Part {
        uint32_t step, lanes;
    } part[2] = {};
    Known() = default;
    Known(uint32_t all, uint32_t step = 0, uint32_t lanes = 0) : all(all), part{{step, lanes}, {}} {}
    void merge(const Known& k) {
        all = std::max(all, k.all);
        for (Part& p : part)
            if (p.step <= all) p = {};
        for (const Part& p : k.part)
            if (p.step > all) add(p);
    }
    void add(Part p) {
        for (Part& mine : part) {
            if (mine.step == p.step || mine.step == 0) {
                mine = {p.step, mine.lanes | p.lanes};
                return;
            }
            if (mine.step > p.step)
                p.lanes &= ~mine.lanes;
            else if ((mine.lanes & ~p.lanes) == 0)
                mine = p, p.lanes = 0;
            if (p.lanes == 0) return;
        }
        Part& next = part[part[1].step < part[0].step];
        next = {std::max(next.step, p.step), next.lanes | p.lanes};
    }
    bool covers(uint32_t step, int lane) const {
        if (step <= all) return true;
        for (const Part& p : part)
            if (step <= p.step && p.lanes >> lane & 1) return true;
        return false;
    }
};
struct Clock;
typedef std::shared_ptr<const Clock> Seen;
struct Clock {
    Known of[AGENTS];              // of this block
    Known shared[32], global[32];  // of the warps' ordinary accesses, what a proxy fence stands behind
    struct Other {
        Seen seen, fenced;
    };
    std::map<uint32_t, Other> others;  // of other blocks
    void merge(const Clock& c) {
        for (int i = 0; i < AGENTS; i++) of[i].merge(c.of[i]);
        for (int i = 0; i < 32; i++) shared[i].merge(c.shared[i]), global[i].merge(c.global[i]);
        for (auto& other : c.others) learn(other.first, other.second);
    }
    // of block b, what c knows: the newest is kept, as who hears of a block again hears it from a later clock
    void learn(uint32_t b, const Other& c) {
        auto later = [](Seen& mine, const Seen& theirs) {
            if (!theirs || mine == theirs) return;
            if (!mine)
                mine = theirs;
            else {
                auto both = std::make_shared<Clock>(*mine);
                for (int i = 0; i < AGENTS; i++) both->of[i].merge(theirs->of[i]);
                mine = both;
            }
        };
        Other& mine = others[b];
        later(mine.seen, c.seen);
        later(mine.fenced, c.fenced);
    }
};

// An access: by whom, when, where in the PTX. 16 bytes.
struct Access {
    uint32_t block = 0, step = 0, pc = 0;
    uint8_t agent = 0, lane = 0;
    bool async = false, strong = false;
    bool none() const { return step == 0; }
};
struct Place {
    Access write, read, read2;  // the last write, the last reads of two agents
};

// A page of memory in cells of 16 bytes, or fewer where accesses are smaller.
struct Page {
    int shift = 4;  // a cell's bytes, as a power of 2
    uint64_t launch = 0;
    std::vector<Place> cells;
    static constexpr int BITS = 10;
    void refine(int to) {
        std::vector<Place> finer(size_t(1) << (BITS - to));
        for (size_t i = 0; i < finer.size(); i++) finer[i] = cells[i >> (shift - to)];
        cells.swap(finer);
        shift = to;
    }
};
struct Pages {
    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
    uint64_t last = ~0ull;
    Page* last_page = nullptr;
    Page& at(uint64_t address, uint64_t launch) {
        const uint64_t number = address >> Page::BITS;
        if (number != last) {
            auto& page = pages[number];
            if (!page) page = std::make_unique<Page>();
            last = number, last_page = page.get();
        }
        Page& page = *last_page;
        if (page.launch != launch) {
            page.launch = launch, page.shift = 4;
            page.cells.assign(size_t(1) << (Page::BITS - 4), {});
        }
        return page;
    }
    void clear() { pages.clear(), last = ~0ull; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Allocations of global memory

struct Allocations {
    std::map<uint64_t, uint64_t> ends;  // by beginning
    // the one that holds `at`, as [begin, end); empty if none does
    std::pair<uint64_t, uint64_t> find(uint64_t at) const {
        auto it = ends.upper_bound(at);
        if (it == ends.begin() || (--it)->second <= at) return {1, 0};
        return *it;
    }
};
inline Allocations allocations;

}  // namespace ptx
