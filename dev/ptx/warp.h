// What runs: blocks, their warps, registers, shared memory, and the checks that each access passes.
#pragma once
#include <algorithm>
#include <deque>
#include <functional>
#include <set>

#include "order.h"

namespace ptx {

struct Group {  // lanes of a warp that are at the same instruction
    int pc;
    uint32_t lanes;
};

struct Barrier {  // bar.sync and bar.arrive
    unsigned expected = 0, arrived = 0;
    std::vector<int> waiting;  // warps
    std::set<int> warps;       // that have come
    int pc = 0;                // where the count is from
    bool of_all = false;       // it has none: the block's threads
    Clock clock;
};

struct Mbarrier {
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;  // that are still expected
    uint64_t phase = 0;
    int agent = 0;
    uint32_t step = 0;             // of its copies
    std::set<uint32_t> under_way;  // their steps
    bool fenced = false;
    Clock arriving, done;  // of this phase, of those that have ended
};

// A bulk copy under way. Its reads and its writes end separately, later.
struct Bulk {
    enum { LOAD, STORE, ADD } kind;
    int warp, lane, pc;
    uint32_t mbarrier = 0;  // loads: where it is
    struct Piece {  // of 16 bytes those that are in the tensor
        uint32_t shared;
        uint64_t global;
        uint8_t first, count;
    };
    std::vector<Piece> pieces;
    uint32_t step = 0;
    std::vector<unsigned char> data;  // once it is read
};

struct Warp;
struct Grid;
struct Block {
    Grid* grid;
    uint32_t id;  // from 1, by its place in the grid
    Dim index;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<unsigned char> shared;   // from SHARED_BASE
    std::vector<unsigned char> written;  // of each byte of it
    Pages pages;
    Barrier barriers[16];
    std::map<uint32_t, Mbarrier> mbarriers;
    std::vector<Bulk> bulks;
    std::vector<std::array<uint64_t, 3>> products[8];  // of each warpgroup, in order: place, descriptors
    std::vector<uint64_t> l1;  // counts: sectors read, 256 sets of 4, the last one first
    int free_registers = 0, left = 0;
};

struct Grid {
    Module& module;
    Kernel& kernel;
    const Launch& launch;
    uint64_t number;  // of the launch
    std::vector<unsigned char> params;
    std::vector<Symbol> shared;
    int registers;  // a thread's at launch
    Counts counts;
    std::vector<std::array<uint64_t, 5>> at;  // by pc: executed, sectors, needed ones, to L2, wavefronts beyond need
    struct Sector {  // touched: by whom first, by others too
        uint32_t block;
        bool read, written, shared;
    };
    std::unordered_map<uint64_t, Sector> sectors;
    uint64_t events = 0;  // somebody may go on
};

extern Pages global_pages;
struct Flag {
    Seen seen;
    uint32_t block;
};
extern std::unordered_map<uint64_t, Flag> flags;  // what st.release has let go
uint32_t draw();                                  // 32 random bits, of the seed

template <class T>
using Cell = std::conditional_t<(sizeof(T) > 4), uint64_t, uint32_t>;
template <class T>
inline T from(Cell<T> cell) {
    if constexpr (sizeof(T) == sizeof(cell))
        return __builtin_bit_cast(T, cell);
    else
        return T(cell);
}
template <class T>
inline Cell<T> cell(T value) {
    if constexpr (sizeof(T) == sizeof(Cell<T>))
        return __builtin_bit_cast(Cell<T>, value);
    else
        return Cell<T>(std::make_unsigned_t<T>(value));
}

struct Warp {
    Block& block;
    int number;
    std::vector<uint64_t> storage;
    unsigned char* file;
    std::vector<uint32_t> poison;  // by register: lanes in which it was never written
    uint32_t live;
    std::vector<Group> groups;
    enum State { RUNS, AT_BARRIER, NO_REGISTERS, LEFT } state = RUNS;
    int pc = 0;                           // of the instruction that runs
    bool yields = false;                  // lets others run
    uint64_t quiet_since = 0, quiet = 0;  // events seen, turns since then in which it only looked for one
    int registers, lacks = 0;             // lacks: NO_REGISTERS, what it waits for
    int looked = -1;                      // counts: where it has looked for an event, maybe in vain
    std::vector<int> since;               // and what was counted since then

    // order: its step, that at which all lanes last met, what it knows, and what single lanes know beyond that
    uint32_t step = 1, synced = 0;
    Clock clock;
    std::map<int, Clock> own;
    uint32_t copy_step = 1, bulk_step = 1, product_step = 1;
    std::vector<uint32_t> copies[32];  // cp.async: the last step of each committed group of a lane
    uint32_t copies_open[32] = {};
    std::vector<uint32_t> bulk_groups[32];  // the same of bulk stores: the last step of each
    uint32_t bulk_open[32] = {};
    // what of these a lane has waited for; the others know it once they have met it
    struct Waited {
        uint32_t copies, reads, writes;
    } waited[32] = {};
    // wgmma: groups committed and waited for; by register, the group that writes it or reads it; when last touched
    size_t products = 0;  // executed
    uint64_t product_group = 1, product_done = 0, moment = 0, fence = 0;
    std::vector<uint64_t> writes, reads, touched;
    std::vector<uint32_t> product_pc;  // of the wgmma
    bool fenced = false;
    std::vector<int> changes;             // by setmaxnreg
    std::vector<uint32_t> product_steps;  // of the committed groups

    Warp(Block& block, int number) : block(block), number(number) {}

    template <class T>
    Cell<T>* reg(Slot s) {
        return reinterpret_cast<Cell<T>*>(file + s.at);
    }
    uint32_t& pred(Slot s) { return *reinterpret_cast<uint32_t*>(file + s.at); }
    const Instr& instr() const { return block.grid->kernel.code[pc]; }

    // the result is poison where a source is
    void spread(const Instr& in, uint32_t lanes, size_t outs = 1) {
        uint32_t p = 0;
        for (size_t i = outs; i < in.s.size(); i++) p |= poison[in.s[i].id];
        for (size_t i = 0; i < outs; i++) set_poison(in.s[i], p, lanes);
    }
    void set_poison(Slot s, uint32_t p, uint32_t lanes) { poison[s.id] = (poison[s.id] & ~lanes) | (p & lanes); }

    // ------------------------------------------------------------------------------------------------ reports

    std::string place(int at_pc) const {
        const Grid& g = *block.grid;
        const Instr& in = g.kernel.code[at_pc];
        std::string text = in.op + " " + g.module.name + ":" + std::to_string(in.line);
        auto show = [&](int file, int line, const char* before) {
            auto found = g.module.files.find(file);
            if (found == g.module.files.end()) return false;
            text += before + found->second.substr(found->second.rfind('/') + 1) + ":" + std::to_string(line);
            return true;
        };
        if (!show(in.source.file, in.source.line, " (")) return text;
        show(in.source.in_file, in.source.in_line, " in ");
        return text + ")";
    }
    static std::string show(Dim d) {
        return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
    }
    Dim index_of(uint32_t id) const {
        const Dim g = block.grid->launch.grid;
        return {(id - 1) % g.x, (id - 1) / g.x % g.y, (id - 1) / g.x / g.y};
    }
    [[noreturn]] void report(const char* kind, int lane, const std::string& what) const {
        throw Report(kind, "ptx: kernel " + block.grid->kernel.shown + ", block " + show(block.index) + ", thread " +
                               std::to_string(number * 32 + lane) + " at " + place(pc) + ": " + kind + ": " + what);
    }
    std::string who(const Access& a) const {
        const int agent = a.agent % 32, thread = agent * 32 + a.lane;
        std::string name = a.agent < COPIES       ? "thread " + std::to_string(thread)
                           : a.agent < BULK_READS ? "a copy of thread " + std::to_string(thread)
                           : a.agent < ARRIVALS   ? "an asynchronous access of warp " + std::to_string(agent)
                                                  : "a bulk copy";
        if (a.block != block.id) name += " of block " + show(index_of(a.block));
        return name + " at " + place(a.pc);
    }
    void need(uint32_t lanes, Slot s, const char* what) const {  // reports poison
        const uint32_t bad = poison[s.id] & lanes;
        if (bad) report("poison", __builtin_ctz(bad), std::string(what) + " comes from what was never written");
    }

    // ------------------------------------------------------------------------------------------------ order

    Clock& known(int lane) {
        auto it = own.find(lane);
        return own.empty() || it == own.end() ? clock : it->second;
    }
    // All lanes meet: what one has done and knows, all know.
    void meet() {
        for (auto& lane : own) clock.merge(lane.second);
        own.clear();
        tell(~0u, clock);
        clock.of[number].all = synced = step++;
    }
    void tell(uint32_t lanes, Clock& to) const {  // what they have waited for
        for (int l = 0; l < 32; l++) {
            if (!(lanes >> l & 1)) continue;
            const Waited& w = waited[l];
            if (w.copies) to.of[COPIES + number].merge({0, w.copies, 1u << l});
            if (w.reads) to.of[BULK_READS + number].merge({0, w.reads, 1u << l});
            if (w.writes) to.of[BULK_WRITES + number].merge({0, w.writes, 1u << l});
        }
    }
    // What these lanes have done and know goes to `to`. Among themselves they have not met.
    void release(uint32_t lanes, Clock& to) {
        bool plain = false;
        for (int l = 0; l < 32; l++)
            if (lanes >> l & 1) {
                if (own.count(l))
                    to.merge(own.at(l));
                else
                    plain = true;
            }
        if (plain) to.merge(clock);
        tell(lanes, to);
        to.of[number].merge({synced, step, lanes});
        step++;
    }
    template <class F>
    void acquire(uint32_t lanes, F change) {  // change(Clock&)
        if (lanes == live) {
            change(clock);
            for (auto& lane : own) change(lane.second);
            return;
        }
        for (int l = 0; l < 32; l++)
            if (lanes >> l & 1) change(own.insert({l, clock}).first->second);
    }
    bool before(const Access& a, int lane, bool async, bool is_shared, bool& fence_only) {
        if (a.block == block.id) {
            if (a.agent == number && !async && (a.lane == lane || a.step <= synced)) return true;
            const Clock& k = known(lane);
            Known seen = k.of[a.agent];
            if (a.agent == number) seen.merge({synced, step, 1u << lane});
            const Waited& w = waited[lane];
            if (a.lane == lane && a.step <= (a.agent == COPIES + number        ? w.copies
                                             : a.agent == BULK_READS + number  ? w.reads
                                             : a.agent == BULK_WRITES + number ? w.writes
                                                                               : 0))
                return true;
            if (!seen.covers(a.step, a.lane)) return false;
            if (!async || a.async || a.agent >= COPIES) return true;
            fence_only = true;
            return (is_shared ? k.shared : k.global)[a.agent].covers(a.step, a.lane);
        }
        const Clock& k = known(lane);
        auto other = k.others.find(a.block);
        if (other == k.others.end() || !other->second.seen || !other->second.seen->of[a.agent].covers(a.step, a.lane))
            return false;
        // between blocks an asynchronous access after an asynchronous one wants the fence too: proxy-preserved order
        // has "the same proxy" only within a thread block
        if (!async) return true;
        fence_only = true;
        return (other->second.fenced && other->second.fenced->of[a.agent].covers(a.step, a.lane)) ||
               (a.agent < COPIES && other->second.seen->global[a.agent].covers(a.step, a.lane));
    }
    // An access is checked against earlier ones and noted. me: agent, lane, step, pc and kind are set. Two writes of
    // one instruction may meet in the same value: same.
    void touch(Pages& pages, bool is_shared, uint64_t at, uint32_t bytes, bool write, Access me, bool same = false) {
        Page& page = pages.at(at, block.grid->number);
        while (page.shift > 1 && ((at | bytes) & ((1u << page.shift) - 1))) page.refine(page.shift - 1);
        const uint64_t end = at + bytes, page_end = ((at >> Page::BITS) + 1) << Page::BITS;
        if (end > page_end) {
            touch(pages, is_shared, page_end, uint32_t(end - page_end), write, me, same);
            bytes = uint32_t(page_end - at);
        }
        const uint32_t mask = (1u << Page::BITS) - 1, first = uint32_t(at & mask) >> page.shift;
        const uint32_t last_ = uint32_t((at & mask) + bytes - 1) >> page.shift;
        for (uint32_t i = first; i <= last_; i++) {
            Place& c = page.cells[i];
            check(c.write, me, is_shared, write ? "writes" : "reads", "wrote", at, same);
            if (write) {
                check(c.read, me, is_shared, "writes", "reads", at, same);
                check(c.read2, me, is_shared, "writes", "reads", at, same);
                c.write = me;
                c.read = c.read2 = {};
            } else {
                if (!c.read.none() && (c.read.agent != me.agent || c.read.block != me.block)) c.read2 = c.read;
                c.read = me;
            }
        }
    }
    void check(const Access& a, const Access& me, bool is_shared, const char* does, const char* did, uint64_t at,
               bool same) {
        if (a.none() || (a.strong && me.strong)) return;
        if (same && a.block == me.block && a.agent == me.agent && a.step == me.step && a.pc == me.pc) return;
        bool fence_only = false;
        const bool reads_first = *did == 'r';  // an asynchronous write after ordinary reads needs no proxy fence
        if (before(a, me.lane, me.async && !reads_first, is_shared, fence_only)) return;
        char address[40];
        snprintf(address, sizeof address, "%s %s%llx", does, is_shared ? "shared " : "",
                 (unsigned long long)(is_shared ? at - SHARED_BASE : at));
        const bool waits = !reads_first && (a.agent >= ARRIVALS || (a.agent >= COPIES && a.agent < BULK_READS));
        const char* kind = fence_only                                  ? "proxy"
                           : waits                                     ? "phase"
                           : a.agent >= PRODUCTS && a.agent < ARRIVALS ? "wgmma"
                                                                       : "race";
        report(kind, me.lane,
               std::string(address) + ", which " + who(a) + " " + did +
                   (fence_only ? ", without a proxy fence between"
                    : waits    ? ", and whose end was not waited for"
                               : ", without anything that orders the two"));
    }

    // ------------------------------------------------------------------------------------------------ memory

    void shared_range(int lane, uint64_t at, uint32_t bytes, uint32_t align) const {
        if (at % align) misaligned(lane, at, align);
        for (const Symbol& s : block.grid->shared)
            if (at >= s.at && at + bytes <= s.at + s.bytes) return;
        char text[120];
        snprintf(text, sizeof text, "%u bytes at shared %#llx lie outside of every array", bytes,
                 (unsigned long long)(at - SHARED_BASE));
        std::string what = text;
        for (const Symbol& s : block.grid->shared)
            what +=
                " [" + std::to_string(s.at - SHARED_BASE) + "," + std::to_string(s.at - SHARED_BASE + s.bytes) + ")";
        report("address", lane, what);
    }
    [[noreturn]] void misaligned(int lane, uint64_t at, uint32_t bytes) const {
        char text[100];
        snprintf(text, sizeof text, "address %#llx is not a multiple of %u", (unsigned long long)at, bytes);
        report("alignment", lane, text);
    }
    void global_range(int lane, uint64_t at, uint32_t bytes, uint32_t align) {
        if (at % align) misaligned(lane, at, align);
        if (at >= allocation.first && at + bytes <= allocation.second) return;
        allocation = allocations.find(at);
        if (at >= allocation.first && at + bytes <= allocation.second) return;
        for (auto& global : block.grid->module.globals) {
            const uint64_t begin = uint64_t(global.second->bytes.data());
            if (at >= begin && at + bytes <= begin + global.second->bytes.size()) return;
        }
        char text[200];
        auto next = allocations.ends.upper_bound(at);
        const bool has_before = next != allocations.ends.begin();
        snprintf(text, sizeof text, "%u bytes at %#llx lie outside of every allocation", bytes, (unsigned long long)at);
        std::string what = text;
        if (has_before) {
            --next;
            snprintf(text, sizeof text, "; the one before has %llu bytes, this is byte %llu from its begin",
                     (unsigned long long)(next->second - next->first), (unsigned long long)(at - next->first));
            what += text;
        }
        report("address", lane, what);
    }
    std::pair<uint64_t, uint64_t> allocation = {1, 0};  // the last one that was found

    void looks() {
        if (options.counts) looked = pc, since = {pc};
    }
    Access access(int lane, bool strong = false) const {
        return {block.id, step, uint32_t(pc), uint8_t(number), uint8_t(lane), false, strong};
    }
    unsigned char* shared_at(uint64_t at) { return block.shared.data() + (at - SHARED_BASE); }
    bool shared_written(uint64_t at, uint32_t bytes) const {
        for (uint32_t i = 0; i < bytes; i++)
            if (!block.written[at - SHARED_BASE + i]) return false;
        return true;
    }

    // ------------------------------------------------------------------------------------------------ counts

    // 32-byte sectors that a request of these addresses fetches, and those that its bytes would fill
    void count_global(const uint64_t* at, uint32_t lanes, uint32_t bytes, bool write) {
        uint64_t sector[64], where[32];
        int n = 0, m = 0;
        for (int l = 0; l < 32; l++)
            if (lanes >> l & 1) {
                where[m++] = at[l];
                sector[n++] = at[l] / 32;
            }
        std::sort(where, where + m);
        m = int(std::unique(where, where + m) - where);
        std::sort(sector, sector + n);
        n = int(std::unique(sector, sector + n) - sector);
        count_sectors(sector, n, uint64_t(m) * bytes, write);
    }
    void count_sectors(const uint64_t* sector, int n, uint64_t bytes, bool write) {
        Grid& g = *block.grid;
        const uint64_t needed = (bytes + 31) / 32;
        g.counts.sectors += n, g.counts.sectors_needed += needed;
        (write ? g.counts.written : g.counts.read) += bytes;
        g.at[pc][1] += n, g.at[pc][2] += needed;
        uint64_t to_l2 = n;
        for (int i = 0; i < n; i++) {
            Grid::Sector& s = g.sectors.insert({sector[i], {block.id, false, false, false}}).first->second;
            (write ? s.written : s.read) = true, s.shared |= s.block != block.id;
            to_l2 -= !write && instr().cached && in_l1(sector[i]);
        }
        g.counts.to_l2 += to_l2, g.at[pc][3] += to_l2;
    }
    bool in_l1(uint64_t sector) {  // from here on it is
        if (block.l1.empty()) block.l1.resize(1024);
        uint64_t* set = &block.l1[sector % 256 * 4];
        uint64_t* place = std::find(set, set + 3, sector);
        const bool there = *place == sector;
        std::rotate(set, place, place + 1);
        set[0] = sector;
        return there;
    }
    // Wavefronts: 32 banks of 4 bytes; lanes go in groups whose elements fill them, and a word is fetched once.
    void count_shared(const uint32_t* at, uint32_t lanes, uint32_t bytes) {
        const int together = bytes <= 4 ? 32 : 128 / bytes;
        std::set<uint32_t> all;
        uint64_t fronts = 0;
        for (int first = 0; first < 32; first += together) {
            int banks[32] = {};
            int most = 0;
            for (int l = first; l < first + together; l++)
                if (lanes >> l & 1)
                    for (uint32_t word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; word++)
                        if (all.insert(word).second) most = std::max(most, ++banks[word % 32]);
            fronts += most;
        }
        const uint64_t needed = (all.size() + 31) / 32;
        Grid& g = *block.grid;
        g.counts.wavefronts += fronts, g.counts.wavefronts_needed += needed;
        g.at[pc][4] += fronts - std::min(fronts, needed);
    }
};

}  // namespace ptx
