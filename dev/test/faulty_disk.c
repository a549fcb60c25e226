// A disk that fails, for tests: LD_PRELOAD this, and the FAULT_AT-th of the process's calls of open with O_CREAT,
// write, fsync, close, rename and mkdir on paths that FAULT_PATH matches fails.
//   FAULT_PATH     prefixes, with colons between; one that ends in $ is a whole path
//   FAULT_AT       the call, from 1; 0 or not set: none
//   FAULT_ERRNO    ENOSPC (default), EIO, or SHORT: a write takes half of the bytes, the one after it fails with ENOSPC
//                  SLOW: no call fails, every write takes a tenth of a second; HANG: that call never returns
//   FAULT_STICKY   1: all matching calls after that one fail as well
//   FAULT_FOLDERS  the errno of every fsync of a folder
//   FAULT_RANK     only in this rank of MPI's
//   FAULT_LIST     file to which, with .RANK behind its name, each call goes as a line: its name and path
// Build: gcc -shared -fPIC -o X.so faulty_disk.c -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES = 1024 };
static char* path_of[FILES];  // of open files that match; a file is opened and closed by one thread
static atomic_long calls, short_at = -2;
static FILE* list;
static long fault_at;
static int fault_errno = ENOSPC, is_short, is_slow, is_hang, sticky;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int mine(void) {
    const char *rank = getenv("OMPI_COMM_WORLD_RANK"), *only = getenv("FAULT_RANK");
    return !only || strcmp(only, rank ? rank : "0") == 0;
}

__attribute__((constructor)) static void begin(void) {
    const char *at = getenv("FAULT_AT"), *error = getenv("FAULT_ERRNO"), *more = getenv("FAULT_STICKY"),
               *lines = getenv("FAULT_LIST"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    fault_at = at && mine() ? atol(at) : 0;
    if (error && strcmp(error, "EIO") == 0) fault_errno = EIO;
    is_slow = error && strcmp(error, "SLOW") == 0 && mine();
    is_hang = error && strcmp(error, "HANG") == 0;
    is_short = error && strcmp(error, "SHORT") == 0;
    sticky = more && *more == '1';
    if (lines && mine()) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s.%s", lines, rank ? rank : "0");
        list = fopen(path, "w");
    }
}

static int matches(const char* path) {
    for (const char* p = getenv("FAULT_PATH"); p && *p;) {
        const size_t n = strcspn(p, ":"), whole = n > 0 && p[n - 1] == '$';
        if (n > whole && strncmp(path, p, n - whole) == 0 && (!whole || !path[n - 1])) return 1;
        p += n + (p[n] == ':');
    }
    return 0;
}

// Counts a call; true if it is to fail, with errno set.
static int fails(const char* name, const char* path) {
    const long n = ++calls;
    if (list) fprintf(list, "%s %s\n", name, path), fflush(list);
    if (is_slow && strcmp(name, "write") == 0) usleep(100000);
    if (is_slow || !fault_at || n < fault_at) return 0;
    while (is_hang) sleep(1);
    if (n == fault_at && is_short && strcmp(name, "write") == 0) {
        short_at = n;
        return 0;
    }
    if (n > fault_at && !sticky && n != short_at + 1) return 0;
    errno = fault_errno;
    return 1;
}

int open(const char* path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
    va_end(args);
    const int match = matches(path);
    if (match && flags & O_CREAT && fails("open", path)) return -1;
    const int fd = NEXT(open)(path, flags, mode);
    if (match && fd >= 0 && fd < FILES) path_of[fd] = strdup(path);
    return fd;
}
int open64(const char* path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(args, mode_t) : 0;
    va_end(args);
    return open(path, flags, mode);
}

ssize_t write(int fd, const void* data, size_t bytes) {
    const char* path = fd >= 0 && fd < FILES ? path_of[fd] : NULL;
    if (path && fails("write", path)) return -1;
    if (path && short_at == calls && bytes > 1) bytes /= 2;
    return NEXT(write)(fd, data, bytes);
}

int fsync(int fd) {
    const char* folders = getenv("FAULT_FOLDERS");
    struct stat info;
    if (folders && fstat(fd, &info) == 0 && S_ISDIR(info.st_mode)) {
        errno = atoi(folders);
        return -1;
    }
    const char* path = fd >= 0 && fd < FILES ? path_of[fd] : NULL;
    if (path && fails("fsync", path)) return -1;
    return NEXT(fsync)(fd);
}

// A file that could not be closed well is closed.
int close(int fd) {
    char* path = fd >= 0 && fd < FILES ? path_of[fd] : NULL;
    const int bad = path && fails("close", path), error = errno;
    if (path) path_of[fd] = NULL, free(path);
    const int done = NEXT(close)(fd);
    if (bad) errno = error;
    return bad ? -1 : done;
}

int rename(const char* from, const char* to) {
    if ((matches(from) || matches(to)) && fails("rename", from)) return -1;
    return NEXT(rename)(from, to);
}

int mkdir(const char* path, mode_t mode) {
    if (matches(path) && fails("mkdir", path)) return -1;
    return NEXT(mkdir)(path, mode);
}
