// A machine that executes PTX text, as nvcc -ptx writes it, on a CPU, and says what a GPU would not. Written from
// NVIDIA's PTX ISA manual (version 9.0); it knows nothing of the trainer. Its own state: one machine a process, one
// host thread.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What it found: one line with the kernel, the line of the PTX and of the source, the thread, and the other place if
// there is one. kind: parse (text that it does not know, an opcode too), launch, address (outside of every allocation),
// alignment, poison (what was never written reached an address, a branch or memory), race, proxy (a race that only a
// proxy fence would mend), phase (read before its mbarrier or copy group has let it), wgmma (a register of a wgmma
// under way is touched), barrier (counts or lanes that do not fit), stuck (nobody can go on), registers (setmaxnreg).
struct Report : std::runtime_error {
    std::string kind;
    Report(const std::string& kind, const std::string& text) : std::runtime_error(text), kind(kind) {}
};

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
struct Arg {  // a kernel's argument: the bytes of the C++ object
    const void* data;
    size_t bytes;
};
struct Launch {
    Dim grid, block;
    size_t shared = 0;  // dynamic, bytes
    std::vector<Arg> args;
};

struct Options {
    uint64_t seed = 1;    // of the order of blocks and warps, of what approximate functions are off by
    bool races = true;    // looks for races and poison
    bool counts = false;  // counts, see Counts
    size_t sample = 0;    // runs this many blocks only, spread over the grid (0: all)
    int under_way = 4;    // blocks at a time, at most; they begin in order
    int registers = 0;    // a thread's, at launch, as ptxas -v says (0: from .maxntid and .minnctapersm)
};
extern Options options;

// What a launch did, of the blocks that ran; all but the first line only with options.counts.
struct Counts {
    uint64_t blocks = 0, warps = 0, instructions = 0;                                     // of warps
    uint64_t tensor = 0, floats = 0, integers = 0, special = 0, memory = 0, control = 0;  // instructions, a warp each
    uint64_t tensor_flops = 0;
    uint64_t uncovered = 0;  // of warps with wgmma: memory instructions, barriers and fences while no product is under way
    uint64_t sectors = 0, sectors_needed = 0;          // of 32 bytes: that requests fetch, that their bytes would fill
    uint64_t to_l2 = 0;                                // of the former those that L1 lets through: all but reads of one
                                                       // among the last 1024 or so that the block has read
    uint64_t wavefronts = 0, wavefronts_needed = 0;    // shared memory's: as they are, without a bank conflict; wgmma's
                                                       // and bulk copies' too, 128 bytes each
    uint64_t barriers = 0;                             // a warp each
    uint64_t read = 0, written = 0;                    // bytes of global memory asked for, copies' too
    uint64_t read_distinct = 0, written_distinct = 0;  // the same, each byte once (in sectors of 32)
    uint64_t shared_distinct = 0;                      // of both, what several blocks touch
    // PTX line, executed, sectors, needed ones, those to L2, wavefronts beyond need
    std::vector<std::array<uint64_t, 6>> lines;
};

struct Module;
// Reads PTX text; name stands in reports. Kernels are parsed when they are first launched.
std::shared_ptr<Module> read(const std::string& text, const std::string& name);
std::vector<std::string> kernels(const Module& module);  // mangled names
bool has(const Module& module, const std::string& kernel);

// Global memory: kernels may touch what lies in these, and the module's own variables. Addresses are the host's.
void allocated(const void* at, size_t bytes);
void freed(const void* at);

Counts run(Module& module, const std::string& kernel, const Launch& launch);  // throws Report

}  // namespace ptx
