// Shares of work over this process's threads. OpenMP's wait in a spin of milliseconds, which is read from the
// environment before main: beside other work they hold the cores that the thread they wait for needs. These spin for
// SPIN and then sleep; shares are taken as they come, and a thread that comes too late is not waited for.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#if defined __x86_64__
#include <immintrin.h>
#endif

#ifdef __clang__
#define CUDA_FAST
#else
#define CUDA_FAST __attribute__((optimize("O3")))  // also where nothing else is optimised
#endif

// Subnormal numbers are 0 in every thread, as in a GPU's fast paths: a processor computes with them in microcode, a
// hundred times slower. Set before main; a new thread has its maker's setting.
__attribute__((constructor)) inline void cuda_flush_subnormals() {
#if defined __x86_64__
    _mm_setcsr(_mm_getcsr() | 0x8040);  // flush to zero, denormals are zero
#elif defined __aarch64__
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    asm volatile("msr fpcr, %0" : : "r"(control | 1 << 24));
#endif
}

struct CudaThreads {
    static constexpr int MOST = 1024;
    static constexpr auto SPIN = std::chrono::microseconds(20);

    int threads;      // that share, with the one that asks
    int started = 1;  // of them

    CudaThreads() {
        cpu_set_t cores;
        const char* text = getenv("OMP_NUM_THREADS");
        const int asked = text ? atoi(text) : 0;
        threads = asked > 0 ? asked : sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
        threads = std::min(threads, MOST);
    }

    // work(from, to) for parts of 0 .. count, each a multiple of `chunk` long or the last; they begin in order.
    void share(int64_t count, int64_t chunk, void (*work)(void*, int64_t, int64_t), void* context) {
        std::unique_lock<std::mutex> one(asking, std::defer_lock);
        if (threads < 2 || count <= chunk || inside_one || !one.try_lock()) return work(context, 0, count);
        while (started < threads && start()) started++;
        job = {count, chunk, work, context};
        next = 0;
        asker_core = sched_getcpu();
        gate = (number(gate) + 1) * (2 * OPEN) + OPEN;  // nobody is inside
        wake(sleeping, sleeping_workers);
        take();
        if (gate.fetch_and(~OPEN) & (OPEN - 1))
            wait(done, waiting_askers, [&] { return (gate & (OPEN - 1)) == 0; });
    }

private:
    struct Job {
        int64_t count = 0, chunk = 1;
        void (*work)(void*, int64_t, int64_t) = nullptr;
        void* context = nullptr;
    } job;
    // The job's number, whether it is open, and how many workers are inside.
    static constexpr uint64_t OPEN = 1 << 16;
    static uint64_t number(uint64_t gate) { return gate / (2 * OPEN); }
    std::atomic<uint64_t> gate{0};
    std::atomic<int> asker_core{-1};
    std::atomic<int64_t> next{0};
    std::mutex asking, guard;
    std::condition_variable sleeping, done;
    std::atomic<int> sleeping_workers{0}, waiting_askers{0};
    static inline thread_local bool inside_one = false;  // a share that asks for shares does them itself

    // With other work beside, the system may leave two of ours on one core and that work alone on another.
    void move_off(int core) {
        cpu_set_t mine, others;
        if (sched_getcpu() != core || sched_getaffinity(0, sizeof mine, &mine) != 0) return;
        CPU_ZERO(&others);
        CPU_SET(core, &others);
        CPU_XOR(&others, &mine, &others);
        if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof mine, &mine);
    }
    void take() {
        inside_one = true;
        for (int64_t from; (from = next.fetch_add(job.chunk)) < job.count;)
            job.work(job.context, from, std::min(from + job.chunk, job.count));
        inside_one = false;
    }
    template <class F> void wait(std::condition_variable& condition, std::atomic<int>& waiting, F until) {
        const auto end = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 16; i++) {
                if (until()) return;
#if defined __x86_64__
                _mm_pause();
#elif defined __aarch64__
                asm volatile("yield");
#endif
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(guard);
        waiting++;
        condition.wait(lock, until);
        waiting--;
    }
    void wake(std::condition_variable& condition, std::atomic<int>& waiting) {
        if (waiting == 0) return;
        { std::lock_guard<std::mutex> lock(guard); }  // who is on the way to sleep has seen the gate, or sleeps
        condition.notify_all();
    }
    void serve() {
        uint64_t seen = 0, now = 0;
        for (;;) {
            wait(sleeping, sleeping_workers, [&] { return now = gate, (now & OPEN) && number(now) != seen; });
            if (!gate.compare_exchange_strong(now, now + 1)) continue;
            seen = number(now);
            move_off(asker_core);
            take();
            if ((--gate & (2 * OPEN - 1)) == 0) wake(done, waiting_askers);
        }
    }
    bool start() {  // false: no more can be had, those that are there do
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error&) {
            threads = started;
            return false;
        }
    }
};
inline CudaThreads& cuda_threads = *new CudaThreads;  // its threads outlive main's variables

// f(from, to) for parts of 0 .. count, each thread a `chunk` at a time, in order; f(i) for every i.
template <class F> void cuda_share_range(int64_t count, int64_t chunk, F f) {
    cuda_threads.share(count, chunk, [](void* f, int64_t from, int64_t to) { (*(F*)f)(from, to); }, &f);
}
template <class F> void cuda_share(int64_t count, int64_t chunk, F f) {
    cuda_share_range(count, chunk, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) f(i);
    });
}
