// Tests of dataloader.h against plain loops over the tokens, and of every error it tells. No arguments.
#include "dataloader.h"

#include <cstdlib>
#include <functional>
#include <memory>
#include <set>
#include <sys/resource.h>

typedef std::vector<uint32_t> Tokens;

static std::string dir;  // scratch, removed at the end
static int passed = 0, failed = 0;

static std::string text(uint64_t x) { return std::to_string(x); }

static void expect(bool holds, const std::string& what) {
    if (!holds) throw std::logic_error(what);
}

static void test(const char* name, const std::function<void()>& body) {
    if (system(("rm -rf '" + dir + "' && mkdir '" + dir + "'").c_str())) exit(1);  // each test begins with nothing
    try {
        body();
        printf("ok %s\n", name);
        passed++;
    } catch (const std::exception& e) {
        printf("FAIL %s: %s\n", name, e.what());
        failed++;
    }
}

static std::string write(const std::string& name, const std::string& bytes) {
    std::string path = dir + "/" + name;
    FILE* f = fopen(path.c_str(), "wb");
    if (!f || fwrite(bytes.data(), 1, bytes.size(), f) != bytes.size() || fclose(f)) perror(path.c_str()), exit(1);
    return path;
}

static std::string header(int magic, int version, int count) {
    int32_t h[256] = {magic, version, count};
    return std::string((char*)h, sizeof h);
}

static std::string shard(const std::string& name, const Tokens& tokens, int bytes = 2) {
    std::string s = bytes == 2 ? header(20240520, 1, tokens.size()) : header(20240801, 7, tokens.size());
    for (uint32_t t : tokens) s.append((char*)&t, bytes);
    return write(name, s);
}

// n tokens, below V, any V of them in a row all different
static Tokens numbered(size_t n, uint32_t first = 0, uint32_t V = 60000) {
    Tokens t(n);
    for (size_t i = 0; i < n; i++) t[i] = uint32_t((first + i) * 7919 % V);
    return t;
}

static Tokens batch(DataLoader& d, int B, int T) {
    const int32_t* p = d.next();
    return Tokens(p, p + size_t(B) * (T + 1));
}

// What the loader should give: window w of the endless repetition of the whole windows of a stream.
static Tokens window(const Tokens& stream, uint64_t w, int T) {
    const uint64_t windows = stream.size() / (T + 1);
    auto begin = stream.begin() + w % windows * (T + 1);
    return Tokens(begin, begin + T + 1);
}

static void expect_batches(DataLoader& d, const Tokens& stream, uint64_t first, int steps, int B, int T, int rank = 0,
                           int world = 1) {
    for (int step = 0; step < steps; step++) {
        const Tokens got = batch(d, B, T);
        for (int b = 0; b < B; b++) {
            const Tokens want = window(stream, first + uint64_t(step) * B * world + rank * B + b, T);
            expect(std::equal(want.begin(), want.end(), got.begin() + b * (T + 1)),
                   "step " + text(step) + ", row " + text(b) + " differs");
        }
    }
}

static void test_formats() {
    const Tokens narrow = {0, 1, 255, 256, 32767, 32768, 65535, 7};
    const Tokens wide = {0, 1, 65535, 65536, 128255, 2147483645, 2147483646, 7};
    DataLoader a(shard("a.bin", narrow), 2, 3, 65536), b(shard("b.bin", wide, 4), 2, 3, 2147483647);
    expect(batch(a, 2, 3) == narrow, "uint16 tokens differ");
    expect(batch(b, 2, 3) == wide, "uint32 tokens differ");
    expect(a.tokens() == 8 && a.windows() == 2, "counts " + text(a.tokens()) + ", " + text(a.windows()));
}

static void test_streams() {
    // sizes of shards: one token, none, less than a window, many windows; of both widths, so also side by side
    const std::vector<size_t> sizes = {40, 1, 0, 3, 200, 5, 0, 0, 77, 2, 1, 64, 0};
    Tokens stream;
    for (size_t i = 0; i < sizes.size(); i++) {
        const Tokens tokens = numbered(sizes[i], stream.size());
        shard("s" + text(100 + i) + ".bin", tokens, i % 3 == 1 ? 4 : 2);
        stream.insert(stream.end(), tokens.begin(), tokens.end());
    }
    for (int T : {1, 2, 6, 7, 31, 130, 392})
        for (int B : {1, 2, 3, 5, 7}) {
            const uint64_t windows = stream.size() / (T + 1);
            if (windows < uint64_t(B)) continue;
            DataLoader d(dir + "/s*.bin", B, T, 60000);
            expect(d.tokens() == stream.size() && d.windows() == windows, "counts differ");
            expect_batches(d, stream, 0, 3 * windows / B + 2, B, T);  // over three epochs, batches on their borders
        }
}

static void test_epochs() {
    const Tokens stream = numbered(5 * 4 + 3);  // 5 windows of T+1 = 4, batches of 3
    DataLoader d(shard("a.bin", stream), 3, 3, 60000);
    const LoaderState want[] = {{0, 0}, {0, 3}, {1, 1}, {1, 4}, {2, 2}, {3, 0}, {3, 3}};
    for (const LoaderState& w : want) {
        const LoaderState s = d.state();
        expect(s.epoch == w.epoch && s.window == w.window, "epoch " + text(s.epoch) + ", window " + text(s.window) +
                                                               "; want " + text(w.epoch) + ", " + text(w.window));
        expect_batches(d, stream, w.epoch * 5 + w.window, 1, 3, 3);
    }
}

static void test_seek() {
    const Tokens stream = numbered(11 * 6 + 1);
    shard("a.bin", Tokens(stream.begin(), stream.begin() + 40));
    shard("b.bin", Tokens(stream.begin() + 40, stream.end()));
    for (bool shuffle : {false, true}) {
        DataLoader d(dir + "/?.bin", 4, 5, 60000, shuffle, 3), other(dir + "/?.bin", 4, 5, 60000, shuffle, 3);
        std::vector<LoaderState> states;
        std::vector<Tokens> batches;
        for (int i = 0; i < 12; i++) states.push_back(d.state()), batches.push_back(batch(d, 4, 5));
        for (int i = 11; i >= 0; i--) {  // back in the same loader; and in another, as a resumed run does
            d.seek(states[i]);
            expect(batch(d, 4, 5) == batches[i], "batch " + text(i) + " differs after a seek back");
            other.seek(states[i]);
            for (int j = i; j < 12; j++)
                expect(batch(other, 4, 5) == batches[j], "batch " + text(j) + " differs from position " + text(i));
        }
        for (int i = 0; i < 500; i++) {  // seeks while the thread reads; the last of them counts
            d.seek(states[i % 12]);
            if (i % 3 == 0) d.seek(states[i * 5 % 12]);
            const int at = i % 3 == 0 ? i * 5 % 12 : i % 12;
            if (i % 2 == 0) expect(batch(d, 4, 5) == batches[at], "batch " + text(at) + " differs after many seeks");
        }
    }
}

// The windows of epochs [0, epochs) in the order in which they come. Every window begins with its number.
static std::vector<std::vector<uint32_t>> orders(const std::string& path, int windows, int epochs, uint64_t seed) {
    DataLoader d(path, 1, 1, 60000, true, seed);
    std::vector<std::vector<uint32_t>> all(epochs);
    for (auto& order : all)
        for (int i = 0; i < windows; i++) order.push_back(d.next()[0]);
    return all;
}

static void test_shuffle() {
    for (int windows : {1, 2, 3, 4, 5, 15, 16, 17, 100, 1000, 4097}) {
        Tokens stream;
        for (int i = 0; i < windows; i++) stream.insert(stream.end(), {uint32_t(i), 1});
        const std::string path = shard(text(windows) + ".bin", stream);
        const auto first = orders(path, windows, 3, 1);
        for (auto& order : first)
            expect(std::set<uint32_t>(order.begin(), order.end()).size() == order.size(),
                   "no permutation of " + text(windows) + " windows");
        expect(first == orders(path, windows, 3, 1), "the same seed gives another order");
        if (windows < 15) continue;  // small ones may agree by chance
        expect(first[0] != first[1] && first[1] != first[2], "two epochs are alike");
        expect(first[0] != orders(path, windows, 1, 2)[0], "two seeds are alike");
    }
    // Places and neighbours are as of chance: chi-square over 12 windows and 6000 epochs.
    const int W = 12, epochs = 6000;
    double places[W][W] = {}, neighbours[W][W] = {}, chi_places = 0, chi_neighbours = 0;
    Tokens stream;
    for (uint32_t i = 0; i < W; i++) stream.insert(stream.end(), {i, 1});
    for (auto& order : orders(shard("12.bin", stream), W, epochs, 5))
        for (int i = 0; i < W; i++) {
            places[i][order[i]]++;
            if (i) neighbours[order[i - 1]][order[i]]++;
        }
    const double expected = epochs / double(W);  // of W^2 places; of W (W-1) pairs too, W-1 an epoch
    for (int i = 0; i < W; i++)
        for (int j = 0; j < W; j++) {
            chi_places += (places[i][j] - expected) * (places[i][j] - expected) / expected;
            if (i != j) chi_neighbours += (neighbours[i][j] - expected) * (neighbours[i][j] - expected) / expected;
        }
    // 121 and 131 are expected, with a deviation of 16; five of them above
    expect(chi_places < 201, "places are not even: chi-square " + text(chi_places));
    expect(chi_neighbours < 211, "neighbours are not even: chi-square " + text(chi_neighbours));
}

// Three sources whose windows begin with their source and its window's number: shares over every prefix, epochs of each,
// shuffled or not; positions; ranks.
static void test_mixtures() {
    const int sizes[] = {7, 50, 3};
    const double weights[] = {0.3, 0.6, 0.1};
    std::string data;
    for (int i = 0; i < 3; i++) {
        Tokens stream;
        for (int w = 0; w < sizes[i]; w++) stream.insert(stream.end(), {uint32_t(i), uint32_t(w), 9});
        data += (i ? "," : "") + shard("s" + text(i) + ".bin", stream) + ":" + (i == 0 ? "3" : i == 1 ? "6" : "1.0");
    }
    for (bool shuffle : {false, true}) {
        DataLoader d(data, 1, 2, 60000, shuffle, 3);
        expect(d.windows() == 60 && d.tokens() == 180, "counts differ");
        std::vector<std::vector<uint32_t>> seen(3);
        std::vector<Tokens> batches;
        std::vector<LoaderState> states;
        for (int n = 1; n <= 1000; n++) {
            states.push_back(d.state());
            batches.push_back(batch(d, 1, 2));
            seen[batches.back()[0]].push_back(batches.back()[1]);
            for (int i = 0; i < 3; i++)
                expect(std::abs(double(seen[i].size()) - n * weights[i]) < 2, "source " + text(i) + " has " +
                                                                                  text(seen[i].size()) + " of " + text(n));
        }
        for (int i = 0; i < 3; i++) {
            expect(std::abs(d.seen(d.state())[i].share - weights[i]) < 1e-9, "share differs");
            expect(d.seen(d.state())[i].epochs == double(seen[i].size()) / sizes[i], "epochs differ");
            for (size_t begin = 0; begin + sizes[i] <= seen[i].size(); begin += sizes[i]) {
                std::vector<uint32_t> epoch(seen[i].begin() + begin, seen[i].begin() + begin + sizes[i]);
                if (shuffle) std::sort(epoch.begin(), epoch.end());
                for (int w = 0; w < sizes[i]; w++) expect(epoch[w] == uint32_t(w), "an epoch lacks a window");
            }
        }
        DataLoader other(data, 1, 2, 60000, shuffle, 3);
        for (int at : {999, 500, 0, 37}) {
            other.seek(states[at]);
            expect(batch(other, 1, 2) == batches[at], "batch differs from position " + text(at));
        }
        for (int rank : {0, 1}) {  // two ranks of 2 see, together, what one with 4 sees
            DataLoader part(data, 2, 2, 60000, shuffle, 3, rank, 2);
            for (int step = 0; step < 20; step++) {
                const Tokens got = batch(part, 2, 2);
                for (int b = 0; b < 2; b++)
                    expect(Tokens(got.begin() + b * 3, got.begin() + b * 3 + 3) == batches[step * 4 + rank * 2 + b],
                           "a rank's window differs");
            }
        }
    }
    DataLoader one(dir + "/s0.bin:0.2", 1, 2, 60000), plain(dir + "/s0.bin", 1, 2, 60000);
    for (int n = 0; n < 20; n++) expect(batch(one, 1, 2) == batch(plain, 1, 2), "one source's weight changes it");
    expect(one.state().epoch == 2 && one.seen(one.state())[0].epochs == 20.0 / 7, "one source's epochs");
    shard("a,b:c.bin", numbered(9));  // without weights it is a name
    DataLoader(dir + "/a,b:c.bin", 1, 2, 60000);
    shard("s9:1", numbered(9));  // and a file's name is a name
    DataLoader(dir + "/s9:1", 1, 2, 60000);
}

static void test_ranks() {
    const Tokens stream = numbered(17 * 5 + 2);
    const std::string path = shard("a.bin", stream);
    for (bool shuffle : {false, true}) {
        DataLoader whole(path, 6, 4, 60000, shuffle, 9);
        std::vector<Tokens> want;
        for (int step = 0; step < 10; step++) want.push_back(batch(whole, 6, 4));
        for (int world : {1, 2, 3, 6}) {
            const int B = 6 / world;
            std::vector<std::unique_ptr<DataLoader>> ranks;
            for (int r = 0; r < world; r++) ranks.emplace_back(new DataLoader(path, B, 4, 60000, shuffle, 9, r, world));
            for (int step = 0; step < 10; step++) {
                Tokens got;
                for (auto& rank : ranks) {
                    const Tokens part = batch(*rank, B, 4);
                    got.insert(got.end(), part.begin(), part.end());
                }
                expect(got == want[step], "step " + text(step) + " of " + text(world) + " ranks differs");
            }
            for (auto& rank : ranks)
                expect(rank->state().epoch == whole.state().epoch && rank->state().window == whole.state().window,
                       "position of a rank of " + text(world) + " differs");
        }
    }
}

static void test_names() {
    for (const char* name : {"b.bin", "a10.bin", "a9.bin", "B.bin"})
        shard(name, {uint32_t(name[0]), uint32_t(name[1])});
    DataLoader d(dir + "/*.bin", 4, 1, 200);
    const int32_t* p = d.next();
    expect(p[0] == 'B' && p[2] == 'a' && p[3] == '1' && p[5] == '9' && p[6] == 'b', "not in the order of bytes");
    shard("[ab].bin", {5, 6});
    DataLoader brackets(dir + "/[ab].bin", 1, 1, 200);
    expect(brackets.next()[0] == 5, "a file whose name is a pattern is not found");
}

// More shards than the process may have open, in order and shuffled.
static void test_many_shards() {
    Tokens stream;
    for (uint32_t i = 0; i < 100; i++) {
        shard("s" + text(100 + i) + ".bin", {2 * i, 2 * i + 1});
        stream.insert(stream.end(), {2 * i, 2 * i + 1});
    }
    struct rlimit old, low;
    getrlimit(RLIMIT_NOFILE, &old);
    low = old, low.rlim_cur = 32;
    setrlimit(RLIMIT_NOFILE, &low);
    DataLoader d(dir + "/s*.bin", 3, 3, 200), shuffled(dir + "/s*.bin", 50, 3, 200, true);
    expect_batches(d, stream, 0, 60, 3, 3);
    Tokens all = batch(shuffled, 50, 3);
    std::sort(all.begin(), all.end());
    expect(all == stream, "shuffled windows are not all windows");
    setrlimit(RLIMIT_NOFILE, &old);
}

// More than 2^32 tokens, and offsets beyond 2^32, in files of holes.
static void test_large() {
    const int64_t count = 2147483647;
    const uint32_t last[] = {11, 12, 13};
    for (const char* name : {"a.bin", "b.bin", "c.bin"}) {
        const std::string path = write(name, header(20240801, 7, count));
        if (truncate(path.c_str(), 1024 + 4 * count)) throw std::logic_error("no room for files of holes");
        int fd = open(path.c_str(), O_WRONLY);
        expect(pwrite(fd, last, sizeof last, 1024 + 4 * (count - 3)) == sizeof last, "pwrite");
        close(fd);
    }
    DataLoader d(dir + "/?.bin", 1, 6, 100);  // 3 count = 6442450941 = 7 x 920350134 + 3: three tokens are left
    expect(d.tokens() == 6442450941 && d.windows() == 920350134, "counts differ");
    const uint64_t second = (2 * uint64_t(count) - 3) / 7, at = (2 * uint64_t(count) - 3) % 7;
    d.seek({0, second});
    Tokens got = batch(d, 1, 6);
    Tokens next = batch(d, 1, 6);
    got.insert(got.end(), next.begin(), next.end());
    Tokens want(14, 0);
    std::copy(last, last + 3, want.begin() + at);
    expect(got == want, "the end of the second shard differs");
    DataLoader shuffled(dir + "/?.bin", 1, 6, 100, true);
    for (int i = 0; i < 100; i++) shuffled.next();
}

// The message of what `body` throws, with the scratch folder taken out.
static std::string message(const std::function<void()>& body) {
    try {
        body();
    } catch (const std::runtime_error& e) {
        std::string s = e.what();
        for (size_t at; (at = s.find(dir + "/")) != std::string::npos;) s.erase(at, dir.size() + 1);
        return s;
    }
    return "nothing was thrown";
}

static void expect_error(const std::string& want, const std::function<void()>& body) {
    const std::string got = message(body);
    expect(got == want, "\"" + got + "\", want \"" + want + "\"");
}

static void expect_open_error(const std::string& path, const std::string& want, int B = 2, int T = 3) {
    expect_error(want, [&] { DataLoader(path, B, T, 100); });
}

static void test_errors_of_arguments() {
    const std::string path = shard("a.bin", numbered(8, 0, 100));
    expect_open_error(path, "data: B is 0. Give at least 1.", 0, 3);
    expect_open_error(path, "data: T is -5. Give at least 1.", 2, -5);
    expect_error("data: the vocabulary size is 0. Give at least 1.", [&] { DataLoader(path, 1, 1, 0); });
    expect_error("data: world is 0. Give at least 1.", [&] { DataLoader(path, 1, 1, 9, false, 0, 0, 0); });
    for (int rank : {-1, 2})
        expect_error("data: rank " + std::to_string(rank) + " of 2. Ranks count from 0.",
                     [&] { DataLoader(path, 1, 1, 9, false, 0, rank, 2); });
    expect_open_error(path, "a.bin: 8 tokens, but one batch needs 12 (3 windows of T+1 = 4). Give more data, a smaller "
                            "batch or a smaller T.", 3, 3);
    expect_error("a.bin: 8 tokens, but one batch needs 12 (6 windows of T+1 = 2). Give more data, a smaller batch or a "
                 "smaller T.", [&] { DataLoader(path, 2, 1, 100, false, 0, 0, 3); });
    const std::string huge = message([&] { DataLoader(path, INT32_MAX, INT32_MAX, 100, false, 0, 0, INT32_MAX); });
    expect(huge.find("a.bin: 8 tokens, but one batch needs 9903520305059670") == 0, huge);  // about 2^93
    const std::string two = path + ":1," + shard("one.bin", {1});
    expect_error("a.bin:1,one.bin: some sources have a weight and some have none. Give each one, as GLOB:0.5.",
                 [&] { DataLoader(two, 1, 3, 100); });
    expect_error("a.bin:1,one.bin:0: the weight 0 is not above 0 and below 1e9. Leave that source out, or weigh all otherwise.",
                 [&] { DataLoader(two + ":0", 1, 3, 100); });
    expect_error("one.bin: 1 tokens, but one window needs 4 (1 windows of T+1 = 4). Give more data, a smaller batch or a "
                 "smaller T.", [&] { DataLoader(two + ":1e-9", 1, 3, 100); });
    DataLoader d(path, 1, 3, 100);
    expect_error("a.bin: has 2 windows of T+1 = 4 tokens, the position to go to is window 2. Give the data and T that "
                 "the run was begun with.", [&] { d.seek({0, 2}); });
    expect(batch(d, 1, 3) == window(numbered(8, 0, 100), 0, 3), "a refused seek has moved the position");
}

static void test_errors_of_files() {
    const std::string none = ": no such file. Prepare the data first (dev/data/prepare.py).";
    expect_open_error(dir + "/*.bin", "*.bin" + none);
    expect_open_error(dir + "/a.bin", "a.bin" + none);
    mkdir((dir + "/sub").c_str(), 0700);
    expect_open_error(dir + "/sub", "sub: is a folder. Give its files, as \"sub/*.bin\".");
    mkfifo((dir + "/pipe").c_str(), 0600);
    expect_open_error(dir + "/pipe", "pipe: is not a regular file. Write the tokens to a file.");
    expect_open_error("/dev/null", "/dev/null: is not a regular file. Write the tokens to a file.");
    if (symlink("nothing", (dir + "/link*").c_str())) throw std::logic_error("symlink");
    expect_open_error(dir + "/l*",
                      "link*: cannot be opened: No such file or directory. Check the path and its permissions.");
    expect_open_error(dir + "/" + std::string(300, 'x'),
                      std::string(300, 'x') + ": cannot be reached: File name too long. Check the path.");

    const std::string closed = shard("closed.bin", numbered(8, 0, 100));
    mkdir((dir + "/closed").c_str(), 0);
    chmod(closed.c_str(), 0), chmod(dir.c_str(), 0755);
    const bool root = geteuid() == 0;  // to whom nothing is closed
    if (root && seteuid(65534)) throw std::logic_error("seteuid");
    const std::string file = message([&] { DataLoader(closed, 2, 3, 100); });
    const std::string folder = message([&] { DataLoader(dir + "/closed/*", 2, 3, 100); });
    if (root && seteuid(0)) throw std::logic_error("seteuid");
    expect(file == "closed.bin: cannot be opened: Permission denied. Check the path and its permissions.", file);
    expect(folder == "closed/*: cannot be reached: Permission denied. Check the path.", folder);
}

static void test_errors_of_headers() {
    const std::string again = ". Prepare it again (dev/data/prepare.py).", none(8, '\0');
    expect_open_error(write("a", ""), "a: is empty" + again);
    expect_open_error(write("a", header(20240520, 1, 0).substr(0, 1023)),
                      "a: ends within the header; it was cut short" + again);
    expect_open_error(write("a", header(20240520, 1, 0).substr(0, 4)),
                      "a: ends within the header; it was cut short" + again);
    expect_open_error(write("a", header(20240520, 2, 8) + none), "a: has version 2, known is 1" + again);
    expect_open_error(write("a", header(20240801, 1, 8) + none), "a: has version 1, known is 7" + again);
    expect_open_error(write("a", header(20240520, 1, -1) + none), "a: header promises -1 tokens" + again);
    expect_open_error(write("a", header(20240520, 1, INT32_MIN) + none),
                      "a: header promises -2147483648 tokens" + again);
    const std::string cut = " tokens, the file holds 4; it was cut short" + again;
    expect_open_error(write("a", header(20240520, 1, 5) + none), "a: header promises 5" + cut);
    expect_open_error(write("a", header(20240520, 1, 5) + none + "x"), "a: header promises 5" + cut);
    expect_open_error(write("a", header(20240801, 7, INT32_MAX) + none + none), "a: header promises 2147483647" + cut);
    expect_open_error(write("a", header(20240520, 1, 4) + none + "x"),
                      "a: header promises 4 tokens, but 1 bytes follow them" + again);
    expect_open_error(write("a", header(20240801, 7, 0) + none),
                      "a: header promises 0 tokens, but 8 bytes follow them" + again);
    expect_open_error(write("a", header(20240520, 1, 0)), "a: 0 tokens, but one batch needs 8 (2 windows of T+1 = 4). "
                                                          "Give more data, a smaller batch or a smaller T.");
    // the second of several files
    shard("b1", numbered(20, 0, 100)), write("b2", header(20240520, 3, 0));
    expect_open_error(dir + "/b?", "b2: has version 3, known is 1" + again);
}

static void test_errors_of_foreign_files() {
    const std::string zeros(2000, '\0'), json("\x40\0\0\0\0\0\0\0{\"a\":", 13);
    const std::pair<std::string, std::string> cases[] = {
        {"x", "text"},
        {"Die Katze, \xc3\xbc" "ber\r\n\tdie Mauer" + std::string(3000, '.'), "text"},
        {"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"},
        {"SGPTTOK1" + zeros, "a tokenizer"},
        {"\x93NUMPY" + zeros, "a NumPy array"},
        {"PAR1" + zeros, "a Parquet file"},
        {"PK\3\4" + zeros, "a zip archive"},
        {"\x1f\x8b\x08" + zeros, "compressed by gzip"},
        {"\x28\xb5\x2f\xfd" + zeros, "compressed by zstd"},
        {json + zeros, "a safetensors file"},
        {header(20240326, 3, 1024), "a model of llm.c"},
        {header(20240328, 2, 50257), "a tokenizer of llm.c"},
        {header(20240522, 1, 1), "an evaluation file of llm.c"},
        {zeros, "something else (magic 0, not 20240520 or 20240801)"},
        {zeros.substr(0, 3), "something else (magic 0, not 20240520 or 20240801)"},
        {header(-5, 1, 1), "something else (magic -5, not 20240520 or 20240801)"},
    };
    for (auto& [bytes, what] : cases)
        expect_open_error(write("a", bytes),
                          "a: is no token shard, but " + what + ". Turn text into shards with dev/data/prepare.py.");
}

static void test_errors_of_tokens() {
    const std::string advice = ", the vocabulary has 100. Give shards made with the model's tokenizer, or a larger "
                               "vocabulary.";
    Tokens tokens = numbered(40, 0, 100);
    shard("a1.bin", tokens);
    tokens[26] = 99, tokens[27] = 100;
    shard("a2.bin", tokens);
    DataLoader d(dir + "/a?.bin", 2, 4, 100);  // the bad token is in the window that is the 14th, step 6
    for (int i = 0; i < 6; i++) d.next();
    const LoaderState before = d.state();
    for (int i = 0; i < 2; i++) expect_error("a2.bin: token 27 is 100" + advice, [&] { d.next(); });
    expect(d.state().window == before.window && before.window == 12, "the position has moved");
    d.seek({0, 0});
    expect(batch(d, 1, 4) == window(tokens, 0, 4), "a seek does not end the error");

    DataLoader wide(shard("wide.bin", {1, 2, 4294967295, 3}, 4), 1, 3, 100);
    expect_error("wide.bin: token 2 is 4294967295" + advice, [&] { wide.next(); });
}

static void test_cut_short_during_the_run() {
    const Tokens stream = numbered(4000);
    for (int bytes : {2, 4}) {
        const std::string path = shard("a.bin", stream, bytes);
        DataLoader d(path, 2, 9, 60000);
        expect_batches(d, stream, 0, 10, 2, 9);
        if (truncate(path.c_str(), 1024 + 1005 * bytes + 1)) throw std::logic_error("truncate");
        expect_batches(d, stream, 20, 40, 2, 9);
        for (int i = 0; i < 2; i++)
            expect_error("a.bin: ends before token 1005 of 4000; it was cut short during the run. Prepare it again "
                         "(dev/data/prepare.py).", [&] { d.next(); });
        expect(d.state().window == 100, "the position has moved");
        shard("a.bin", stream, bytes);
        d.seek(d.state());
        expect_batches(d, stream, 100, 10, 2, 9);
    }
    shard("b1.bin", numbered(20)), shard("b2.bin", numbered(20));
    DataLoader d(dir + "/b?.bin", 1, 4, 60000);
    d.next();
    unlink((dir + "/b2.bin").c_str());
    for (int i = 0; i < 3; i++) d.next();
    expect_error("b2.bin: cannot be opened: No such file or directory. Check the path and its permissions.",
                 [&] { d.next(); });
}

int main(int argc, char**) {
    if (argc != 1) return fprintf(stderr, "test_dataloader: takes no arguments. Run it alone.\n"), 1;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    char name[] = "/tmp/test_dataloader_XXXXXX";
    if (!mkdtemp(name)) return perror(name), 1;
    dir = name;
    test("formats", test_formats);
    test("streams", test_streams);
    test("epochs", test_epochs);
    test("seek", test_seek);
    test("shuffle", test_shuffle);
    test("mixtures", test_mixtures);
    test("ranks", test_ranks);
    test("names", test_names);
    test("many_shards", test_many_shards);
    test("large", test_large);
    test("errors_of_arguments", test_errors_of_arguments);
    test("errors_of_files", test_errors_of_files);
    test("errors_of_headers", test_errors_of_headers);
    test("errors_of_foreign_files", test_errors_of_foreign_files);
    test("errors_of_tokens", test_errors_of_tokens);
    test("cut_short_during_the_run", test_cut_short_during_the_run);
    if (system(("rm -rf '" + dir + "'").c_str())) failed++;
    printf("test_dataloader: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
