// Errors, warnings, and that by which others see that this process moves: ticks, collectives, the time.
//
// Bad input throws Error with "where: what. What to do."; main prints it on one line and exits with 1. A layer's errors
// speak of what that layer knows: options are named by the command line alone.
#pragma once
#include <atomic>
#include <csignal>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) inline std::string format(const char* fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    std::string s(vsnprintf(nullptr, 0, fmt, args), 0);
    vsnprintf(s.data(), s.size() + 1, fmt, again);
    va_end(args);
    va_end(again);
    return s;
}

// On one line, whatever a name out of a file holds.
inline std::string one_line(std::string text) {
    for (char& c : text) c = (unsigned char)c < ' ' ? ' ' : c;
    return text;
}

inline void warn(const std::string& text) { fprintf(stderr, "train_gpt: warning: %s\n", one_line(text).c_str()); }

// What an exception tells people.
inline std::string reason(const std::exception& e) {
    if (dynamic_cast<const std::bad_alloc*>(&e))
        return "memory: the host has no more. Make the batch or the sequences smaller, use fewer threads, or raise its "
               "limit.";
    auto* system = dynamic_cast<const std::system_error*>(&e);
    if (system && system->code() == std::errc::resource_unavailable_try_again)
        return "threads: no more can be started. Raise the limit of processes (ulimit -u) or of memory.";
    return one_line(e.what());
}

// Pieces of long work done on the host: weights set, bytes written. By them the watch over the ranks (channel.h) sees
// that this process moves.
inline std::atomic<long long> ticks{0};
// Set by SIGTERM, SIGINT (a second one kills) or SIGUSR1, which Slurm sends ahead of a job's end.
inline volatile sig_atomic_t asked_to_stop = 0;
// Collectives that this process has begun; by them the watch knows who is behind.
inline std::atomic<long long> collectives{0};

// seconds, of a clock that only goes forward
inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
