// Files that appear whole or not at all, and what is on the disk when a call returns.
#pragma once
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "error.h"

// XXH64, as github.com/Cyan4973/xxHash's doc/xxhash_spec.md defines it, seed 0; `xxhsum -H1` gives the same.
struct Hash {
    static constexpr uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9,
                              P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
    uint64_t lanes[4] = {P1 + P2, P2, 0, 0 - P1}, total = 0;
    unsigned char rest[32];

    static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }
    static uint64_t round(uint64_t lane, uint64_t word) { return rotate(lane + word * P2, 31) * P1; }
    template <typename W>
    static W load(const unsigned char* p) {
        W word;
        memcpy(&word, p, sizeof(W));
        return word;
    }
    void block(const unsigned char* p) {
        for (int i = 0; i < 4; i++) lanes[i] = round(lanes[i], load<uint64_t>(p + 8 * i));
    }
    void add(const void* data, size_t bytes) {
        auto* p = static_cast<const unsigned char*>(data);
        const size_t had = total % 32, taken = had ? std::min(bytes, 32 - had) : 0;
        total += bytes;
        memcpy(rest + had, p, taken);
        if (had && had + taken == 32) block(rest);
        p += taken, bytes -= taken;
        for (; bytes >= 32; p += 32, bytes -= 32) block(p);
        if (bytes) memcpy(rest, p, bytes);
    }
    uint64_t value() const {
        uint64_t h = P5;
        if (total >= 32) {
            h = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
            for (uint64_t lane : lanes) h = (h ^ round(0, lane)) * P1 + P4;
        }
        h += total;
        const unsigned char *p = rest, *end = rest + total % 32;
        for (; p + 8 <= end; p += 8) h = rotate(h ^ round(0, load<uint64_t>(p)), 27) * P1 + P4;
        if (p + 4 <= end) h = rotate(h ^ load<uint32_t>(p) * P1, 23) * P2 + P3, p += 4;
        for (; p < end; p++) h = rotate(h ^ *p * P5, 11) * P1;
        h = (h ^ h >> 33) * P2;
        h = (h ^ h >> 29) * P3;
        return h ^ h >> 32;
    }
    std::string text() const { return format("%016llx", (unsigned long long)value()); }
};

[[noreturn]] inline void refuse_kind(const std::string& path) {
    throw Error(path + ": is a folder, a pipe or a device. Give a file.");
}

// A file being written: to PATH.tmp, fsynced and renamed by commit(); gone if commit is never reached.
struct OutFile {
    std::string path, tmp;
    int fd;
    Hash hash;
    explicit OutFile(const std::string& path) : path(path), tmp(path + ".tmp"), fd(-1) {
        struct stat info;
        if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) refuse_kind(path);
        unlink(tmp.c_str());  // of a run that was killed; a link or a pipe of that name must not take what is written
        fd = open(tmp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0) fail();
    }
    ~OutFile() {
        if (fd >= 0) close(fd), unlink(tmp.c_str());
    }
    OutFile(const OutFile&) = delete;
    [[noreturn]] void fail() {
        throw Error(path + ": cannot be written: " + strerror(errno) + ". Give a place with room and rights.");
    }
    void write(const void* data, size_t bytes) {
        constexpr uint64_t SYNC = 256 << 20;  // so that ticks mean bytes on the disk, and the end is no long wait
        if ((hash.total + bytes) / SYNC > hash.total / SYNC && fdatasync(fd)) fail();
        hash.add(data, bytes);
        ticks++;
        for (auto* p = static_cast<const char*>(data); bytes > 0;) {
            const ssize_t done = ::write(fd, p, bytes);
            if (done < 0 && errno == EINTR) continue;
            if (done < 0) fail();
            p += done, bytes -= done;
        }
    }
    void write(const std::string& text) { write(text.data(), text.size()); }
    void commit() {
        if (fsync(fd)) fail();
        const int done = fd;
        fd = -1;
        if (close(done) || rename(tmp.c_str(), path.c_str())) {
            const int error = errno;
            unlink(tmp.c_str());
            errno = error;
            fail();
        }
    }
};

// A file for reading that is no pipe, on which one could wait for ever, and no directory.
inline FILE* open_regular(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        const int error = errno;
        const std::string what =
            path + ": cannot be read: " + strerror(error) + ". Check the path and its permissions.";
        // no Error where the process, not the file, is at fault: a checkpoint is not put aside for that
        if (error == EMFILE || error == ENFILE || error == ENOMEM || error == EACCES) throw std::runtime_error(what);
        throw Error(what);
    }
    struct stat info;
    if (fstat(fd, &info) || !S_ISREG(info.st_mode)) {
        ::close(fd);
        refuse_kind(path);
    }
    return fdopen(fd, "rb");
}

// The whole of a file, at most 1 GiB; with `any` also of a pipe or a terminal.
inline std::string read_file(const std::string& path, bool any = false) {
    FILE* f = any ? fopen(path.c_str(), "rb") : open_regular(path);
    if (!f) throw Error(path + ": cannot be read: " + strerror(errno) + ". Check the path and its permissions.");
    std::string s;
    char buffer[65536];
    constexpr size_t MOST = size_t(1) << 30;
    struct stat info;
    bool large = fstat(fileno(f), &info) == 0 && uint64_t(info.st_size) > MOST;
    for (size_t n; !large && (n = fread(buffer, 1, sizeof(buffer), f)) > 0; large = s.size() > MOST)
        s.append(buffer, n);
    const int error = ferror(f) ? errno : 0;
    fclose(f);
    if (error) throw Error(path + ": cannot be read to its end: " + strerror(error) + ". Check the path and the disk.");
    if (large) throw Error(path + ": is larger than 1 GiB, as no file of its kind is. Check the path.");
    return s;
}

inline void make_dirs(const std::string& path) {  // with the folders above it
    for (size_t at = path.find('/', 1);; at = path.find('/', at + 1)) {
        const std::string part = path.substr(0, at);
        if (mkdir(part.c_str(), 0777) && errno != EEXIST)
            throw Error(part + ": cannot be made: " + strerror(errno) + ". Choose another folder.");
        if (at == std::string::npos) return;
    }
}

// A name in a folder is on the disk only when the folder is. Some file systems (FUSE, NFS) cannot say when: told once.
inline void fsync_dir(const std::string& path) {
    static std::atomic<bool> told{false};
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const int error = fd >= 0 && fsync(fd) == 0 ? 0 : errno;
    if (fd >= 0) close(fd);
    if (!error) return;
    if (fd < 0 || (error != EINVAL && error != ENOTSUP && error != EOPNOTSUPP))
        throw Error(path + ": cannot be written to the disk: " + strerror(error) + ". Check the disk.");
    if (!told.exchange(true))
        warn(path + ": its file system cannot sync a folder (" + strerror(error) +
             "). A loss of power just now could undo the renaming of the files.");
}

// The names in a folder, in no order; none if it cannot be read.
inline std::vector<std::string> names_in(const std::string& path) {
    std::vector<std::string> names;
    if (DIR* d = opendir(path.c_str())) {
        while (dirent* e = readdir(d)) names.push_back(e->d_name);
        closedir(d);
    }
    return names;
}

// A folder and the files in it, not the folders in it; of a link the link alone.
inline void remove_dir(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 && errno != ENOENT) unlink(path.c_str());
    if (DIR* d = fd < 0 ? nullptr : fdopendir(fd)) {
        while (dirent* e = readdir(d))
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink((path + "/" + e->d_name).c_str());
        closedir(d);
        rmdir(path.c_str());
    }
}

// To stdout, all of which has arrived when this returns.
inline void put_text(const std::string& text) {
    if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) || ferror(stdout))
        throw Error(std::string("stdout: cannot be written: ") + strerror(errno) + ".");
}
