// The run's log, OUT/log.csv: a row a step, losses at nine significant digits (exact for float32). Step 1 is the first
// update; its loss is that before the update. val_loss is empty where nothing was validated; note says `skipped` of a
// step without an update and `spike` of a loss far above those before it.
#pragma once
#include <algorithm>
#include <cmath>

#include "file.h"

const char LOG_HEADER[] = "step,loss,lr,grad_norm,tokens_per_s,val_loss,note";

// Finds losses that stand out: above the running mean by 5 standard deviations and 3%. Means over about 50 steps.
struct Spikes {
    double mean = 0, variance = 0;
    int64_t seen = 0;
    bool add(float loss) {
        if (!std::isfinite(loss)) return false;
        const double weight = 1.0 / std::min<int64_t>(++seen, 50);
        const double limit = mean + std::max(5 * sqrt(variance), 0.03 * fabs(mean));
        const bool spike = seen > 20 && loss > limit;
        const double off = (spike ? limit : double(loss)) - mean;  // one spike does not hide the next
        mean += weight * off;
        variance = (1 - weight) * (variance + weight * off * off);
        return spike;
    }
};

// A table that grows by rows which begin with their step: begun anew or, after a resume at `step`, going on behind that
// step's row, as later ones will be made again. Returns the rows that stay.
inline std::string begin_rows(const std::string& path, const std::string& header, int64_t step) {
    std::string kept;
    if (access(path.c_str(), F_OK) == 0) {
        const std::string old = read_file(path);
        if ((step > 0 || !old.empty()) && old.compare(0, header.size() + 1, header + "\n"))
            throw Error(path + ": is no table of this version. Move it away: a new one begins.");
        size_t end = header.size();
        for (size_t at; step > 0 && (at = end + 1, end = old.find('\n', at)) != std::string::npos;) {
            if (strtoll(old.c_str() + at, nullptr, 10) > step) break;
            kept.append(old, at, end + 1 - at);
        }
    }
    OutFile out(path);
    out.write(header + "\n" + kept);
    out.commit();
    return kept;
}

struct Log {
    int fd = -1;
    std::string path, waiting;  // rows that the disk has not taken yet
    Spikes spikes;

    void open(const std::string& path_, int64_t step) {
        path = path_;
        const std::string kept = begin_rows(path, LOG_HEADER, step);
        for (size_t at = 0; at < kept.size(); at = kept.find('\n', at) + 1) {
            const size_t comma = kept.find(',', at);
            spikes.add(comma < kept.size() ? strtof(&kept[comma + 1], nullptr) : NAN);
        }
        fd = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
        if (fd < 0) throw Error(path + ": cannot be written: " + strerror(errno) + ". Check the run's folder.");
    }
    void row(int64_t step, float loss, double lr, float grad_norm, double tokens_per_s, const float* val_loss,
             const char* note) {
        const bool waited = !waiting.empty();
        waiting += format("%lld,%.9g,%.12g,%.9g,%.6g,", (long long)step, loss, lr, grad_norm, tokens_per_s);
        if (val_loss) waiting += format("%.9g", *val_loss);
        waiting += std::string(",") + note + "\n";
        put();
        if (!waiting.empty() && !waited)  // a full disk does not end a training: the rows are kept and tried again
            warn(path + ": cannot be written: " + strerror(errno) + ". Make room; training goes on.");
    }
    void finish() {  // after the last row
        put();
        if (!waiting.empty())
            warn(path + ": ends too early, the disk does not take its last rows: " + strerror(errno) + ".");
    }
    void put() {
        for (ssize_t done; !waiting.empty() && (done = ::write(fd, waiting.data(), waiting.size())) > 0;)
            waiting.erase(0, done);
    }
    ~Log() {
        if (fd >= 0) close(fd);
    }
};

// 59s, 59m59s or 59h59m
inline std::string duration(double seconds) {
    const int64_t s = llround(std::min(seconds, 1e18));
    return s >= 3600 ? format("%lldh%02dm", (long long)s / 3600, int(s / 60 % 60))
           : s >= 60 ? format("%dm%02ds", int(s / 60), int(s % 60))
                     : format("%ds", int(s));
}
