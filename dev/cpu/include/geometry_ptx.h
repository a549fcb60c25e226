// The third geometry, of programs built with -DUSE_PTX, in the exact one: with CUDA_CPU_PTX=FILE a launch runs not what
// g++ made of a kernel but what nvcc did, the kernel of the same mangled name in this PTX file, on the machine in
// dev/ptx. CUDA_CPU_SEED is its seed too. What it finds wrong ends the program with status 1.
//   CUDA_CPU_PTX_PART=1    FILE holds some kernels only, the others run as in the exact geometry
//   CUDA_CPU_PTX_LOG=FILE  at the end a line a kernel: name, launches, warp instructions, seconds, tab-separated
#pragma once
#ifdef USE_PTX
#include <dlfcn.h>

#include "../../ptx/ptx.h"

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
    return ptx::read(text, strrchr(path, '/') ? strrchr(path, '/') + 1 : path);
}();
inline const bool cuda_ptx_part = getenv("CUDA_CPU_PTX_PART") != nullptr;

struct CudaPtxLog {
    struct Line { uint64_t launches = 0, instructions = 0; double seconds = 0; };
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

inline void cuda_ptx_allocated(const void* at, size_t bytes) { ptx::allocated(at, bytes); }
inline void cuda_ptx_freed(const void* at) { ptx::freed(at); }

// false: it is not among some
inline bool cuda_ptx_run(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared,
                         const std::vector<ptx::Arg>& args) {
    Dl_info info;
    try {
        if (!dladdr(kernel, &info) || !info.dli_sname)
            throw ptx::Report("launch", std::string("cuda: kernel ") + name + " has no name to look for. Link with -rdynamic.");
        if (cuda_ptx_part && !ptx::has(*cuda_ptx, info.dli_sname)) return false;
        const auto begin = std::chrono::steady_clock::now();
        const ptx::Counts did =
            ptx::run(*cuda_ptx, info.dli_sname, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, args});
        CudaPtxLog::Line& line = cuda_ptx_log.lines[info.dli_sname];
        line.launches++, line.instructions += did.instructions;
        line.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        return true;
    } catch (const ptx::Report& report) {
        fprintf(stderr, "%s\n", report.what());
        fflush(nullptr);
        _exit(1);
    }
}
#else
inline void cuda_ptx_allocated(const void*, size_t) {}
inline void cuda_ptx_freed(const void*) {}
#endif
