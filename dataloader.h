// Token shards to batches: reads llm.c's format, one batch ahead, in order or shuffled, on one or many ranks.
// Plain C++17, usable alone (link with -pthread). Errors are std::runtime_error, "path: what. What to do."
//
// Shard, little-endian: 256 int32 of header, then the tokens.
//   header[0], [1]   magic 20240520, version 1: tokens are uint16; magic 20240801, version 7: uint32
//   header[2]        number of tokens; the file ends with the last of them
#pragma once
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <glob.h>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

// The next window to be read: all there is to resume.
struct LoaderState {
    uint64_t epoch, window;
};

// The shards, sorted by name, are one stream of tokens, cut into windows of T+1 tokens, stride T+1. A window may cross
// from a shard into the next; what is left at the end is not used. A batch that reaches the last window goes on with
// the next epoch's first, so nothing is skipped. Of several sources each is such a stream with epochs of its own, and
// their windows take turns by weight. One thread at a time may call.
class DataLoader {
public:
    // data: a path or a pattern for glob(3), or several with a weight each, "GLOB:WEIGHT,GLOB:WEIGHT". A global batch
    // is world*B windows, and rank gets the rank-th B of them: what a step sees depends on world*B only. Every epoch is
    // a permutation of the windows drawn from (seed, source, epoch) if shuffle, else their order in the stream. Checks
    // all headers; tokens are checked against vocab_size when read.
    DataLoader(const std::string& data, int B, int T, int vocab_size, bool shuffle = false, uint64_t seed = 0,
               int rank = 0, int world = 1)
        : data_(data), B_(B), width_(uint64_t(T) + 1), vocab_size_(vocab_size), shuffle_(shuffle), seed_(seed),
          rank_(rank), world_(world) {
        auto at_least_1 = [](const char* name, int value) {
            if (value < 1)
                throw std::runtime_error(std::string("data: ") + name + " is " + std::to_string(value) +
                                         ". Give at least 1.");
        };
        at_least_1("B", B), at_least_1("T", T);
        at_least_1("the vocabulary size", vocab_size), at_least_1("world", world);
        if (rank < 0 || rank >= world)
            throw std::runtime_error("data: rank " + std::to_string(rank) + " of " + std::to_string(world) +
                                     ". Ranks count from 0.");
        split(data);
        for (Source& source : sources_) {
            for (const std::string& path : find(source.glob)) add_shard(source, path);
            source.windows = source.tokens / width_;
            while ((source.windows >> 2 * source.half_bits) > 0) source.half_bits++;
            windows_ += source.windows, tokens_ += source.tokens;
            // a source among others may be smaller than a batch, and is then seen several times in one
            const uint64_t least = sources_.size() == 1 ? B_ * world_ : 1;
            if (source.windows >= least) continue;
            char needed[64];  // this product alone can pass 2^64
            snprintf(needed, sizeof needed, "%.0Lf", (long double)least * width_);
            fail(source.glob, std::to_string(source.tokens) + " tokens, but one " + (least == 1 ? "window" : "batch") +
                                  " needs " + needed + " (" + std::to_string(least) + " windows of T+1 = " +
                                  std::to_string(width_) + "). Give more data, a smaller batch or a smaller T.");
        }
        take_turns();
        ahead_.resize(B_ * width_), current_.resize(B_ * width_);
        thread_ = std::thread(&DataLoader::read_ahead, this);
    }

    ~DataLoader() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
        if (fd_ >= 0) close(fd_);
    }

    DataLoader(const DataLoader&) = delete;
    DataLoader& operator=(const DataLoader&) = delete;

    // The next batch, (B,T+1) row-major, valid until the following next(). An error of the thread that reads ahead is
    // thrown here, when its batch is due; the position stays.
    const int32_t* next() {
        {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [&] { return ready_; });
            if (!error_.empty()) throw std::runtime_error(error_);
            std::swap(ahead_, current_);
            state_ = plus(state_, B_ * world_);
            ready_ = false;
        }
        changed_.notify_all();
        return current_.data();
    }

    // The position after the batches handed out, whatever was read ahead; the same on all ranks.
    LoaderState state() const { return state_; }

    // Goes to s and forgets what was read ahead.
    void seek(LoaderState s) {
        if (s.window >= epoch_)
            fail(data_, "has " + std::to_string(windows_) + " windows of T+1 = " + std::to_string(width_) +
                            " tokens, the position to go to is window " + std::to_string(s.window) +
                            ". Give the data and T that the run was begun with.");
        {
            std::lock_guard<std::mutex> lock(mutex_);
            state_ = s;
            ready_ = false;
        }
        changed_.notify_all();
    }

    uint64_t windows() const { return windows_; }  // of one epoch, of all sources
    uint64_t tokens() const { return tokens_; }    // in all shards

    // What a position has seen: of each source the pattern, its share of the windows, and its epochs.
    struct Seen {
        std::string glob;
        double share, epochs;
    };
    std::vector<Seen> seen(LoaderState at) const {
        std::vector<Seen> all;
        for (const Source& s : sources_) {
            const uint64_t n = at.epoch * epoch_ + at.window;
            all.push_back(
                {s.glob, double(s.share) / double(turns_.size()), double(handed_out(s, n)) / double(s.windows)});
        }
        return all;
    }

private:
    static constexpr int HEADER_BYTES = 256 * sizeof(int32_t);

    struct Shard {
        std::string path;
        uint64_t begin, count;  // its place in the stream, in tokens
        int bytes;              // of a token
    };

    struct Source {
        std::string glob;
        double weight;
        std::vector<Shard> shards = {};
        uint64_t tokens = 0, windows = 0;
        int half_bits = 1;                  // 4^half_bits > windows
        uint64_t share = 0;                 // its turns in a round
        std::vector<uint16_t> before = {};  // its turns before each of a round
    };

    const std::string data_;
    const uint64_t B_, width_;
    const uint32_t vocab_size_;
    const bool shuffle_;
    const uint64_t seed_, rank_, world_;
    std::vector<Source> sources_;
    std::vector<uint16_t> turns_;  // the source of each window of a round, after which the next round is the same
    uint64_t tokens_ = 0, windows_ = 0;
    uint64_t epoch_ = 0;  // windows after which the position's epoch ends; of several sources never

    // Under the mutex, but for ahead_ while !ready_: then it is the thread's. State_ is written by the caller only.
    std::mutex mutex_;
    std::condition_variable changed_;
    LoaderState state_ = {0, 0};
    bool ready_ = false, stop_ = false;  // ready: ahead_ holds the batch at state_, or error_ says why not
    std::string error_;
    std::vector<int32_t> ahead_, current_;

    // The thread's own: the shard it has open. One at a time, since there may be more shards than a process may open.
    const Shard* open_shard_ = nullptr;
    int fd_ = -1;
    std::vector<uint16_t> narrow_;
    std::thread thread_;

    [[noreturn]] static void fail(const std::string& path, const std::string& what) {
        throw std::runtime_error(path + ": " + what);
    }

    [[noreturn]] static void fail_broken(const std::string& path, const std::string& what) {
        fail(path, what + ". Prepare it again (dev/data/prepare.py).");
    }

    static std::vector<std::string> find(const std::string& pattern) {
        struct stat st;
        if (stat(pattern.c_str(), &st) == 0) return {pattern};  // a name may have brackets
        if (errno != ENOENT && errno != ENOTDIR)
            fail(pattern, std::string("cannot be reached: ") + strerror(errno) + ". Check the path.");
        glob_t found;
        const int rc = glob(pattern.c_str(), GLOB_ERR | GLOB_NOSORT, nullptr, &found), error = errno;
        std::vector<std::string> paths;
        if (rc == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
        globfree(&found);
        if (rc == GLOB_NOMATCH) fail(pattern, "no such file. Prepare the data first (dev/data/prepare.py).");
        if (rc != 0) fail(pattern, std::string("cannot be searched: ") + strerror(error) + ". Check its folders.");
        std::sort(paths.begin(), paths.end());  // by byte, in every locale
        return paths;
    }

    // "GLOB" or "GLOB:WEIGHT,GLOB:WEIGHT"; without any weight it is one pattern, whatever is in it.
    void split(const std::string& data) {
        struct stat st;
        if (stat(data.c_str(), &st) == 0) return sources_.push_back({data, 1});
        size_t weighted = 0;
        for (size_t begin = 0, end; begin <= data.size(); begin = end + 1) {
            end = std::min(data.find(',', begin), data.size());
            const std::string part = data.substr(begin, end - begin);
            const size_t colon = part.rfind(':');
            const char* number = colon == std::string::npos ? "" : part.c_str() + colon + 1;
            char* rest = nullptr;
            const double weight = strtod(number, &rest);
            const bool given = rest != number && !*rest;
            weighted += given;
            if (given && !(weight > 0 && weight < 1e9))
                fail(data, "the weight " + std::string(number) +
                               " is not above 0 and below 1e9. Leave that source out, or weigh all otherwise.");
            sources_.push_back({given ? part.substr(0, colon) : part, weight});
        }
        if (weighted == sources_.size()) return;
        if (weighted > 0) fail(data, "some sources have a weight and some have none. Give each one, as GLOB:0.5.");
        sources_.clear();
        sources_.push_back({data, 1});
    }

    // Shares of ROUND turns, of the turns dealt to whom most is owed: of every n windows in a row each source has its
    // share, to one or two. Whole numbers, so that it is the same everywhere.
    void take_turns() {
        const int64_t ROUND = 10000;  // weights to 0.01%
        double sum = 0;
        uint64_t round = 0;
        for (const Source& s : sources_) sum += s.weight;
        for (Source& s : sources_) {
            s.share = sources_.size() == 1 ? 1 : std::max<int64_t>(1, std::llround(s.weight / sum * ROUND));
            round += s.share;
        }
        if (round > 60000) fail(data_, "are too many sources. Give fewer.");
        std::vector<int64_t> owed(sources_.size());
        while (turns_.size() < round) {
            size_t most = 0;
            for (size_t i = 0; i < sources_.size(); i++) {
                const uint64_t turn = turns_.size();
                sources_[i].before.push_back(turn == 0 ? 0 : sources_[i].before.back() + (turns_.back() == i));
                owed[i] += int64_t(sources_[i].share);
                if (owed[i] > owed[most]) most = i;
            }
            owed[most] -= int64_t(round);
            turns_.push_back(uint16_t(most));
        }
        epoch_ = sources_.size() == 1 ? windows_ : uint64_t(1) << 62;
    }

    // How many of the first n windows are the source's.
    uint64_t handed_out(const Source& s, uint64_t n) const {
        return n / turns_.size() * s.share + s.before[n % turns_.size()];
    }

    void add_shard(Source& source, const std::string& path) {
        struct Fd {
            int fd;
            ~Fd() { close(fd); }
        } file{open(path)};
        int32_t header[256] = {};
        const int64_t size = read(file.fd, header, HEADER_BYTES, 0, path);
        if (size == 0) fail_broken(path, "is empty");
        const int64_t magic = header[0], version = header[1], count = header[2];
        if (magic != 20240520 && magic != 20240801)
            fail(path, "is no token shard, but " + describe((const char*)header, size) + "." +
                           " Turn text into shards with dev/data/prepare.py.");
        if (size < HEADER_BYTES) fail_broken(path, "ends within the header; it was cut short");
        const int bytes = magic == 20240520 ? 2 : 4, known = magic == 20240520 ? 1 : 7;
        if (version != known)
            fail_broken(path, "has version " + std::to_string(version) + ", known is " + std::to_string(known));
        if (count < 0) fail_broken(path, "header promises " + std::to_string(count) + " tokens");
        const int64_t held = lseek(file.fd, 0, SEEK_END) - HEADER_BYTES, surplus = held - count * bytes;
        const std::string promise = "header promises " + std::to_string(count) + " tokens, ";
        if (surplus < 0)
            fail_broken(path, promise + "the file holds " + std::to_string(held / bytes) + "; it was cut short");
        if (surplus > 0) fail_broken(path, promise + "but " + std::to_string(surplus) + " bytes follow them");
        source.shards.push_back({path, source.tokens, uint64_t(count), bytes});
        source.tokens += count;
    }

    // What the first bytes of a foreign file, or zeros, tell about it.
    static std::string describe(const char* start, size_t size) {
        static const std::pair<std::string, const char*> known[] = {{"version https://git-lfs", "a Git LFS pointer"},
                                                                    {"SGPTTOK", "a tokenizer"},
                                                                    {"\x93NUMPY", "a NumPy array"},
                                                                    {"PAR1", "a Parquet file"},
                                                                    {"PK\3\4", "a zip archive"},
                                                                    {"\x1f\x8b", "compressed by gzip"},
                                                                    {"\x28\xb5\x2f\xfd", "compressed by zstd"}};
        for (auto& [magic, what] : known)
            if (std::string(start, std::min(size, magic.size())) == magic) return what;
        uint64_t length;  // of a safetensors header, which is JSON
        memcpy(&length, start, 8);
        if (length < (1u << 27) && start[8] == '{') return "a safetensors file";
        auto printable = [](unsigned char c) { return (c >= ' ' && c != 127) || memchr("\t\n\r\f", c, 4); };
        if (std::all_of(start, start + size, printable)) return "text";
        int32_t magic;
        memcpy(&magic, start, 4);
        if (magic == 20240326) return "a model of llm.c";
        if (magic == 20240328) return "a tokenizer of llm.c";
        if (magic == 20240522) return "an evaluation file of llm.c";
        return "something else (magic " + std::to_string(magic) + ", not 20240520 or 20240801)";
    }

    static int open(const std::string& path) {
        int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not hang
        if (fd < 0)
            fail(path, std::string("cannot be opened: ") + strerror(errno) + ". Check the path and its permissions.");
        struct stat st;
        if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) return fd;
        close(fd);
        if (S_ISDIR(st.st_mode)) fail(path, "is a folder. Give its files, as \"" + path + "/*.bin\".");
        fail(path, "is not a regular file. Write the tokens to a file.");
    }

    // Reads up to n bytes; fewer at the end of the file only. Not mmap: a file cut short meanwhile would be a SIGBUS.
    static size_t read(int fd, void* to, size_t n, uint64_t offset, const std::string& path) {
        size_t done = 0;
        while (done < n) {
            ssize_t got = pread(fd, (char*)to + done, n - done, offset + done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail(path, std::string("cannot be read: ") + strerror(errno) + ". Check the disk.");
            if (got == 0) break;
            done += got;
        }
        return done;
    }

    LoaderState plus(LoaderState s, uint64_t n) const {
        return {s.epoch + (s.window + n) / epoch_, (s.window + n) % epoch_};
    }

    // A bijection of 64-bit numbers that mixes them well (splitmix64's).
    static uint64_t mix(uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }

    // The window at place i of a source's shuffled epoch. A Feistel network permutes [0, 4^half_bits) whatever its
    // round function is; going on along its cycles to the next number below `windows` makes that a permutation of
    // [0, windows), with no table.
    uint64_t shuffled(const Source& source, uint64_t epoch, uint64_t i) const {
        const uint64_t number = &source - sources_.data(), seed = seed_ + (number + 1) * 0x9e3779b97f4a7c15;
        const uint64_t key = mix(mix(seed) + epoch), mask = (uint64_t(1) << source.half_bits) - 1;
        do {
            uint64_t left = i >> source.half_bits, right = i & mask;
            for (int round = 0; round < 8; round++) {
                left ^= mix(key + 8 * right + round) & mask;
                std::swap(left, right);
            }
            i = left << source.half_bits | right;
        } while (i >= source.windows);
        return i;
    }

    void read_ahead() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] { return stop_ || !ready_; });
            if (stop_) return;
            const LoaderState at = state_;
            lock.unlock();
            std::string error;
            try {
                for (uint64_t b = 0; b < B_; b++) {
                    LoaderState s = plus(at, rank_ * B_ + b);
                    const Source& source = sources_[turns_[s.window % turns_.size()]];
                    if (sources_.size() > 1) {
                        const uint64_t n = handed_out(source, s.window);
                        s = {n / source.windows, n % source.windows};
                    }
                    read_window(&ahead_[b * width_], source, shuffle_ ? shuffled(source, s.epoch, s.window) : s.window);
                }
            } catch (const std::exception& e) {
                error = e.what();
            }
            lock.lock();
            error_ = error;
            ready_ = at.epoch == state_.epoch && at.window == state_.window;  // else a seek came between
            changed_.notify_all();
        }
    }

    void read_window(int32_t* to, const Source& source, uint64_t window) {
        const uint64_t end = (window + 1) * width_;
        for (uint64_t at = window * width_; at < end;) {
            // The last shard that begins at or before `at`; it is not empty, since then the next would begin there too.
            auto before = [](uint64_t a, const Shard& s) { return a < s.begin; };
            const Shard& shard = *std::prev(std::upper_bound(source.shards.begin(), source.shards.end(), at, before));
            const uint64_t n = std::min(end, shard.begin + shard.count) - at;
            read_tokens(to, shard, at - shard.begin, n);
            to += n, at += n;
        }
    }

    // Tokens [first, first + n) of a shard.
    void read_tokens(int32_t* to, const Shard& shard, uint64_t first, uint64_t n) {
        if (open_shard_ != &shard) {
            if (fd_ >= 0) close(fd_);
            fd_ = -1, open_shard_ = nullptr;
            fd_ = open(shard.path), open_shard_ = &shard;
        }
        if (shard.bytes == 2) narrow_.resize(n);
        void* raw = shard.bytes == 2 ? (void*)narrow_.data() : to;
        const uint64_t got = read(fd_, raw, n * shard.bytes, HEADER_BYTES + first * shard.bytes, shard.path);
        if (got < n * shard.bytes)
            fail_broken(shard.path, "ends before token " + std::to_string(first + got / shard.bytes) + " of " +
                                        std::to_string(shard.count) + "; it was cut short during the run");
        if (shard.bytes == 2) std::copy(narrow_.begin(), narrow_.end(), to);
        uint32_t largest = 0;  // first a pass without branches, which vectorises
        for (uint64_t i = 0; i < n; i++) largest = std::max(largest, uint32_t(to[i]));
        if (largest < vocab_size_) return;
        const uint64_t bad = std::find_if(to, to + n, [&](int32_t t) { return uint32_t(t) >= vocab_size_; }) - to;
        fail(shard.path, "token " + std::to_string(first + bad) + " is " + std::to_string(uint32_t(to[bad])) +
                             ", the vocabulary has " + std::to_string(vocab_size_) +
                             ". Give shards made with the model's tokenizer, or a larger vocabulary.");
    }
};
