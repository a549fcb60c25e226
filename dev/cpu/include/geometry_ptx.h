// The third geometry, of programs built with -DUSE_PTX, in the exact one: with CUDA_CPU_PTX=FILE a launch runs not what
// g++ made of a kernel but what nvcc did, the kernel of the same mangled name in this PTX file, on the machine in
// dev/ptx. CUDA_CPU_SEED is its seed too. What it finds wrong ends the program with status 1.
//   CUDA_CPU_PTX_PART=1    FILE holds some kernels only, the others run as in the exact geometry
//   CUDA_CPU_PTX_LOG=FILE  at the end a line a kernel: name, launches, warp instructions, seconds, tab-separated
//   CUDA_CPU_PTX_COUNTS=FILE  it looks for no races but counts: each launch adds a line of JSON to FILE, the kernel, the
//                          launch, ptx::Counts and what the program has put in cuda_ptx_work. Allocations are then zero,
//                          not NaN, and take no memory before they are touched. It may set ptx::options.sample.
#pragma once
#ifdef USE_PTX
#include <dlfcn.h>

#include "../../ptx/ptx.h"

constexpr int CUDA_PTX_LAZY = 1 << 16;
inline FILE* cuda_ptx_counts = [] {
    const char* path = getenv("CUDA_CPU_PTX_COUNTS");
    FILE* file = path && *path ? fopen(path, "a") : nullptr;
    if (path && *path && !file) {
        fprintf(stderr, "cuda: %s: %s. CUDA_CPU_PTX_COUNTS must be a file to write.\n", path, strerror(errno));
        exit(1);
    }
    if (file) mallopt(M_MMAP_THRESHOLD, CUDA_PTX_LAZY);  // so that these come fresh from the system
    return file;
}();
inline std::string cuda_ptx_work;  // members of a JSON object, ""

inline void cuda_ptx_count(const char* kernel, const ptx::Launch& launch, const ptx::Counts& c) {
    auto add = [&](const char* name, uint64_t n) {
        fprintf(cuda_ptx_counts, ", \"%s\": %llu", name, (unsigned long long)n);
    };
    const ptx::Dim &g = launch.grid, &b = launch.block;
    fprintf(cuda_ptx_counts, "{\"kernel\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u]", kernel, g.x, g.y,
            g.z, b.x, b.y, b.z);
    if (!cuda_ptx_work.empty()) fprintf(cuda_ptx_counts, ", %s", cuda_ptx_work.c_str());
    add("shared", launch.shared), add("blocks", c.blocks), add("warps", c.warps), add("tensor", c.tensor);
    add("floats", c.floats), add("integers", c.integers), add("special", c.special), add("memory", c.memory);
    add("control", c.control), add("tensor_flops", c.tensor_flops), add("sectors", c.sectors);
    add("sectors_needed", c.sectors_needed), add("to_l2", c.to_l2), add("wavefronts", c.wavefronts);
    add("wavefronts_needed", c.wavefronts_needed), add("barriers", c.barriers), add("read", c.read);
    add("written", c.written), add("read_distinct", c.read_distinct), add("written_distinct", c.written_distinct);
    add("shared_distinct", c.shared_distinct), add("uncovered", c.uncovered);
    fprintf(cuda_ptx_counts, ", \"lines\": [");
    for (const auto& l : c.lines)
        for (size_t i = 0; i < l.size(); i++)
            fprintf(cuda_ptx_counts, "%s%s%llu%s", i || &l == c.lines.data() ? "" : ", ", i ? ", " : "[",
                    (unsigned long long)l[i], i + 1 < l.size() ? "" : "]");
    fprintf(cuda_ptx_counts, "]}\n");
    fflush(cuda_ptx_counts);
}

inline std::shared_ptr<ptx::Module> cuda_ptx = [] {
    const char* path = getenv("CUDA_CPU_PTX");
    if (!path || !*path) return std::shared_ptr<ptx::Module>();
    FILE* file = fopen(path, "r");
    std::string text;
    char part[1 << 16];
    if (file)
        for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) text.append(part, n);
    if (!file || fclose(file) != 0 || text.empty()) {
        fprintf(stderr, "cuda: %s: %s. CUDA_CPU_PTX must be a file of PTX.\n", path, file ? "empty" : strerror(errno));
        exit(1);
    }
    ptx::options.seed = cuda_seed;
    if (cuda_ptx_counts) ptx::options.counts = true, ptx::options.races = false;
    return ptx::read(text, strrchr(path, '/') ? strrchr(path, '/') + 1 : path);
}();
inline const bool cuda_ptx_part = getenv("CUDA_CPU_PTX_PART") != nullptr;

struct CudaPtxLog {
    struct Line {
        uint64_t launches = 0, instructions = 0;
        double seconds = 0;
    };
    std::map<std::string, Line> lines;
    ~CudaPtxLog() {
        const char* path = getenv("CUDA_CPU_PTX_LOG");
        FILE* file = path ? fopen(path, "w") : nullptr;
        if (!file) return;
        for (auto& l : lines)
            fprintf(file, "%s\t%llu\t%llu\t%.3f\n", l.first.c_str(), (unsigned long long)l.second.launches,
                    (unsigned long long)l.second.instructions, l.second.seconds);
        fclose(file);
    }
};
inline CudaPtxLog cuda_ptx_log;

inline void cuda_ptx_allocated(void* at, size_t bytes) {
    ptx::allocated(at, bytes);
    if (!cuda_ptx_counts)
        memset(at, 0xFF, bytes);  // NaN in any type
    else if (bytes < CUDA_PTX_LAZY)
        memset(at, 0, bytes);
}
inline void cuda_ptx_freed(const void* at) { ptx::freed(at); }

// false: it is not among some
inline bool cuda_ptx_run(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared,
                         const std::vector<ptx::Arg>& args) {
    Dl_info info;
    try {
        if (!dladdr(kernel, &info) || !info.dli_sname)
            throw ptx::Report("launch",
                              std::string("cuda: kernel ") + name + " has no name to look for. Link with -rdynamic.");
        if (cuda_ptx_part && !ptx::has(*cuda_ptx, info.dli_sname)) return false;
        const auto begin = std::chrono::steady_clock::now();
        const ptx::Launch launch = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, args};
        const ptx::Counts did = ptx::run(*cuda_ptx, info.dli_sname, launch);
        CudaPtxLog::Line& line = cuda_ptx_log.lines[info.dli_sname];
        line.launches++, line.instructions += did.instructions;
        line.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (cuda_ptx_counts) cuda_ptx_count(info.dli_sname, launch, did);
        return true;
    } catch (const ptx::Report& report) {
        fprintf(stderr, "%s\n", report.what());
        fflush(nullptr);
        _exit(1);
    }
}
#else
inline void cuda_ptx_allocated(void* at, size_t bytes) { memset(at, 0xFF, bytes); }  // NaN in any type
inline void cuda_ptx_freed(const void*) {}
#endif
