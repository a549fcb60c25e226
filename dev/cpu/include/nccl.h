// The part of NCCL that the trainer uses, over MPI (-DUSE_MPI; without it a job has one rank). Start with mpirun.
// Sums are taken in the order of the ranks, in float for bfloat16, rounded once: all-reduce and reduce-scatter give the
// same bits whatever the sizes, and the same on every rank. One host thread makes the calls; ncclCommGetAsyncError and
// ncclCommAbort may come from another.
//   NCCL_CPU_FAULT="RANK,CALL,KIND"   for tests: in that rank's CALL-th collective (from 1) half of the exchange is
//     done, then kill: SIGKILL; stop: SIGSTOP; hang: the thread sleeps for ever; or, after the collective,
//     flip: the lowest bit of the result's middle element is flipped; nan: its first float becomes NaN
#pragma once
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <unistd.h>
#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>
#include "cuda_bf16.h"
#include "cuda_runtime.h"
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#define NCCL_UNIQUE_ID_BYTES 128
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
    ncclNumResults = 8,
} ncclResult_t;

typedef enum { ncclSum = 0, ncclMax = 2, ncclMin = 3 } ncclRedOp_t;

typedef enum {
    ncclInt8 = 0,
    ncclChar = 0,
    ncclUint8 = 1,
    ncclInt32 = 2,
    ncclInt = 2,
    ncclUint32 = 3,
    ncclInt64 = 4,
    ncclUint64 = 5,
    ncclFloat32 = 7,
    ncclFloat = 7,
    ncclFloat64 = 8,
    ncclDouble = 8,
    ncclBfloat16 = 9,
} ncclDataType_t;

inline uint64_t nccl_cpu_bytes_sent = 0;  // that this rank has passed to MPI's sends
inline uint64_t nccl_cpu_calls = 0;       // collectives that this rank has begun

struct ncclComm {
    int ranks, rank;
    std::atomic<ncclResult_t> error{ncclSuccess};  // the first, stays
    std::atomic<bool> aborted{false};
    uint64_t collectives = 0;  // the same on all ranks
    int last_stream = 0;       // and entry there: the collective issued last. NCCL's run in the order of issue, also
    uint64_t last_entry = 0;   // those of different streams
    bool mpi = false;
#ifdef USE_MPI
    MPI_Comm world = MPI_COMM_NULL;
#endif
};
typedef ncclComm* ncclComm_t;

// ---------------------------------------------------------------------------------------------------------------------
// Errors

inline std::string nccl_last_error;

__attribute__((format(printf, 2, 3))) inline ncclResult_t nccl_fail(ncclResult_t result, const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    nccl_last_error = text;
    return result;
}
inline const char* ncclGetLastError(ncclComm_t) { return nccl_last_error.c_str(); }
inline const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess: return "no error";
        case ncclUnhandledCudaError: return "unhandled cuda error";
        case ncclSystemError: return "unhandled system error";
        case ncclInternalError: return "internal error";
        case ncclInvalidArgument: return "invalid argument";
        case ncclInvalidUsage: return "invalid usage";
        case ncclRemoteError: return "remote process exited or there was a network error";
        case ncclInProgress: return "NCCL operation in progress";
        case ncclNumResults: break;
    }
    return "unknown result code";
}

#ifdef USE_MPI
inline ncclResult_t nccl_check_mpi(int code, const char* call, ncclResult_t result) {
    if (code == MPI_SUCCESS) return ncclSuccess;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return nccl_fail(result, "%s: %s", call, text);
}
#define NCCL_CHECK_MPI(call, name, result)                                        \
    do {                                                                          \
        ncclResult_t checked = nccl_check_mpi(call, name, result);                \
        if (checked != ncclSuccess) return checked;                               \
    } while (0)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Communicators

inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    if (id == nullptr) return nccl_fail(ncclInvalidArgument, "ncclGetUniqueId: no place for the id");
    static uint64_t made = 0;
    const uint64_t parts[3] = {uint64_t(getpid()), ++made,
                               uint64_t(std::chrono::system_clock::now().time_since_epoch().count())};
    *id = {};
    memcpy(id->internal, parts, sizeof parts);
    return ncclSuccess;
}

#ifdef USE_MPI
#ifdef OPEN_MPI  // starts under its own mpirun, or PMIx
#define NCCL_MPI "Open MPI"
#define NCCL_SRUN "srun --mpi=pmix"
inline bool nccl_launched_by_mpi() { return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMIX_RANK"); }
#else
#define NCCL_MPI "MPICH"
#define NCCL_SRUN "srun --mpi=pmi2"
inline bool nccl_launched_by_mpi() { return getenv("PMI_RANK") || getenv("PMIX_RANK"); }
#endif

// Joins the processes that mpirun has started; collective. All fail if one must.
inline ncclResult_t nccl_join(ncclComm* comm, const ncclUniqueId& id) {
    int started = 0, size, rank;
    MPI_Initialized(&started);
    // Without its launcher MPI starts one process, or says so in many lines and exits.
    if (!started && comm->ranks > 1 && !nccl_launched_by_mpi())
        return nccl_fail(ncclInvalidUsage, "the CPU build's ranks talk over MPI, and " NCCL_MPI " did not start them: "
                         "start with its mpirun -n %d, or " NCCL_SRUN, comm->ranks);
    if (!started) {
        int level;
        NCCL_CHECK_MPI(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level), "MPI_Init_thread",
                       ncclSystemError);
        // A process that ends well waits for the others; one that fails does not, and mpirun ends the job.
        on_exit([](int status, void*) {
            int done = 0;
            MPI_Finalized(&done);  // by the program itself, maybe
            if (status == 0 && !done) MPI_Finalize();
        }, nullptr);
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    NCCL_CHECK_MPI(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size", ncclSystemError);
    NCCL_CHECK_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank", ncclSystemError);
    ncclUniqueId first = id;
    NCCL_CHECK_MPI(MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD), "MPI_Bcast", ncclSystemError);
    enum { SIZE = 1, RANK = 2, ID = 4 };
    const int mine = (size != comm->ranks ? SIZE : 0) | (rank != comm->rank ? RANK : 0) |
                     (memcmp(&first, &id, sizeof id) != 0 ? ID : 0);
    int wrong = 0;
    NCCL_CHECK_MPI(MPI_Allreduce(&mine, &wrong, 1, MPI_INT, MPI_BOR, MPI_COMM_WORLD), "MPI_Allreduce",
                   ncclSystemError);
    if (mine & SIZE || (wrong & SIZE && !mine))
        return nccl_fail(ncclInvalidUsage, "MPI started %d process%s, the job has %d rank%s: start the CPU build with "
                         "mpirun -n %d", size, size == 1 ? "" : "es", comm->ranks, comm->ranks == 1 ? "" : "s",
                         comm->ranks);
    if (wrong & RANK)
        return nccl_fail(ncclInvalidUsage, "MPI's rank of this process is %d, the job's is %d%s: leave ranks to mpirun",
                         rank, comm->rank, mine & RANK ? "" : ", others differ");
    if (wrong & ID) return nccl_fail(ncclInvalidArgument, "ncclCommInitRank: the ranks' unique ids differ");
    NCCL_CHECK_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &comm->world), "MPI_Comm_dup", ncclSystemError);
    MPI_Comm_set_errhandler(comm->world, MPI_ERRORS_RETURN);
    comm->mpi = true;
    return ncclSuccess;
}

inline bool nccl_many_processes() {
    int started = 0;
    MPI_Initialized(&started);
    if (started) return true;
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"})
        if (const char* value = getenv(name)) return atoi(value) > 1;
    return false;
}
#endif

inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    if (comm == nullptr || ranks < 1 || rank < 0 || rank >= ranks)
        return nccl_fail(ncclInvalidArgument, "ncclCommInitRank: rank %d of %d", rank, ranks);
    *comm = nullptr;
    std::unique_ptr<ncclComm> made(new ncclComm{ranks, rank});
#ifdef USE_MPI
    if (ranks > 1 || nccl_many_processes()) {  // one rank needs no MPI, which takes long to start
        ncclResult_t result = nccl_join(made.get(), id);
        if (result != ncclSuccess) return result;
    }
#else
    (void)id;
    if (ranks > 1)
        return nccl_fail(ncclInvalidUsage,
                         "this CPU build has no MPI, so one rank only; install Open MPI and build again");
#endif
    *comm = made.release();
    return ncclSuccess;
}

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    if (comm == nullptr || error == nullptr) return nccl_fail(ncclInvalidArgument, "ncclCommGetAsyncError: null");
    *error = comm->error;
    return ncclSuccess;
}

// A collective under way returns with an error. The communicator's memory stays: another thread may be in there.
inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (comm == nullptr) return nccl_fail(ncclInvalidArgument, "ncclCommAbort: no communicator");
    comm->aborted = true;
    return ncclSuccess;
}

inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (comm == nullptr) return nccl_fail(ncclInvalidArgument, "ncclCommDestroy: no communicator");
    cudaDeviceSynchronize();
#ifdef USE_MPI
    if (comm->mpi && comm->error == ncclSuccess && !comm->aborted) MPI_Comm_free(&comm->world);
#endif
    delete comm;
    return ncclSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults

struct NcclFault {
    int rank = -1;
    uint64_t call = 0;
    enum { KILL, HANG, STOP, FLIP, NAN_ } kind = KILL;
};
inline NcclFault nccl_cpu_fault = [] {
    NcclFault fault;
    const char* text = getenv("NCCL_CPU_FAULT");
    if (text == nullptr) return fault;
    char kind[8] = "";
    unsigned long long call = 0;
    const char* kinds[] = {"kill", "hang", "stop", "flip", "nan"};
    bool known = sscanf(text, "%d,%llu,%7s", &fault.rank, &call, kind) == 3 && call > 0;
    auto found = std::find_if(kinds, kinds + 5, [&](const char* k) { return strcmp(k, kind) == 0; });
    if (!known || found == kinds + 5) {
        fprintf(stderr, "nccl: NCCL_CPU_FAULT is '%s'. It must be RANK,CALL,kill|hang|stop|flip|nan.\n", text);
        exit(1);
    }
    fault.call = call;
    fault.kind = decltype(fault.kind)(found - kinds);
    return fault;
}();

inline bool nccl_fault_due(ncclComm_t comm) {
    return nccl_cpu_fault.rank == comm->rank && nccl_cpu_fault.call == nccl_cpu_calls;
}

inline void nccl_fault_during() {
    if (nccl_cpu_fault.kind == NcclFault::KILL) raise(SIGKILL);
    if (nccl_cpu_fault.kind == NcclFault::STOP) raise(SIGSTOP);
    while (nccl_cpu_fault.kind == NcclFault::HANG) sleep(1);
}

inline void nccl_fault_after(void* result, size_t count, size_t width, ncclDataType_t type) {
    if (count == 0) return;
    if (nccl_cpu_fault.kind == NcclFault::FLIP) ((char*)result)[count / 2 * width] ^= 1;
    if (nccl_cpu_fault.kind != NcclFault::NAN_) return;
    if (type == ncclFloat32) *(float*)result = NAN;
    if (type == ncclBfloat16) *(__nv_bfloat16*)result = NAN;
}

// ---------------------------------------------------------------------------------------------------------------------
// The exchange

constexpr size_t NCCL_CHUNK = 1 << 20;  // most bytes of a message, so that the scratch is small and an int holds them

struct NcclMessage {
    int peer;
    void* data;
    size_t bytes;
};

// Rounds of messages between all ranks: of one collective, in order, each done before the next begins.
struct NcclExchange {
    ncclComm_t comm;
    int kind;  // collectives of different kinds or numbers never take each other's messages
    size_t rounds;
    size_t round = 0;

    ncclResult_t next(const std::vector<NcclMessage>& receive, const std::vector<NcclMessage>& send) {
        const bool fault = nccl_fault_due(comm) && round == rounds / 2;
        round++;
        if (send.empty()) {
            if (fault) nccl_fault_during();
            return ncclSuccess;
        }
#ifdef USE_MPI
        const int tag = int(comm->collectives % 8192) * 4 + kind;
        std::vector<MPI_Request> requests;
        requests.reserve(receive.size() + send.size());
        for (const NcclMessage& m : receive)
            NCCL_CHECK_MPI(MPI_Irecv(m.data, int(m.bytes), MPI_BYTE, m.peer, tag, comm->world,
                                     &requests.emplace_back()), "MPI_Irecv", ncclRemoteError);
        for (size_t i = 0; i <= send.size(); i++) {
            if (fault && i == send.size() / 2) {
                std::vector<MPI_Request> sends(requests.begin() + receive.size(), requests.end());
                wait(sends, 1.0);
                std::copy(sends.begin(), sends.end(), requests.begin() + receive.size());
                nccl_fault_during();
            }
            if (i == send.size()) break;
            NCCL_CHECK_MPI(MPI_Isend(send[i].data, int(send[i].bytes), MPI_BYTE, send[i].peer, tag, comm->world,
                                     &requests.emplace_back()), "MPI_Isend", ncclRemoteError);
            nccl_cpu_bytes_sent += send[i].bytes;
        }
        return wait(requests, INFINITY);
#else
        (void)receive;
        return ncclInternalError;  // other ranks do not exist
#endif
    }

#ifdef USE_MPI
    // Polls, so that ncclCommAbort is heard.
    ncclResult_t wait(std::vector<MPI_Request>& requests, double seconds) {
        const auto begin = std::chrono::steady_clock::now();
        for (int done = 0;;) {
            NCCL_CHECK_MPI(MPI_Testall(int(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE),
                           "MPI_Testall", ncclRemoteError);
            if (done) return ncclSuccess;
            if (comm->aborted) break;
            const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
            if (waited > seconds) return ncclInProgress;
            if (waited < 1e-3) sched_yield();
            else usleep(100);  // the others may need the core, and one that hangs is waited for long
        }
        for (MPI_Request& r : requests) {
            if (r == MPI_REQUEST_NULL) continue;
            MPI_Cancel(&r);
            MPI_Request_free(&r);
        }
        return nccl_fail(ncclRemoteError, "the communicator was aborted while a collective waited for other ranks");
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Sums

inline size_t nccl_width(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: return 1;
        case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    }
    return 0;
}

// out[i] = in[0][i] op in[1][i] op ..., from the left, in A. out may be one of in.
template <class T, class A, class Op>
void nccl_reduce(void* out, const std::vector<const void*>& in, size_t count, Op op) {
    constexpr size_t TILE = 1024;
    const int64_t tiles = (count + TILE - 1) / TILE;
    cuda_share(tiles, 16, [=, &in](int64_t t) {
        alignas(64) A sum[TILE];
        const size_t begin = t * TILE, n = std::min(TILE, count - begin);
        const T* x = (const T*)in[0] + begin;
        for (size_t i = 0; i < n; i++) sum[i] = A(x[i]);
        for (size_t rank = 1; rank < in.size(); rank++) {
            asm volatile("" : : "r"(sum) : "memory");  // the order of the ranks is not the compiler's to change
            x = (const T*)in[rank] + begin;
            for (size_t i = 0; i < n; i++) sum[i] = op(sum[i], A(x[i]));
        }
        T* to = (T*)out + begin;
        for (size_t i = 0; i < n; i++) to[i] = T(sum[i]);
    });
}

template <class T, class A>
void nccl_reduce_by(ncclRedOp_t op, void* out, const std::vector<const void*>& in, size_t n) {
    // of a NaN and a number the number, as NCCL's
    if (op == ncclMax) nccl_reduce<T, A>(out, in, n, [](A a, A b) { return b > a || a != a ? b : a; });
    else if (op == ncclMin) nccl_reduce<T, A>(out, in, n, [](A a, A b) { return b < a || a != a ? b : a; });
    else if constexpr (std::is_integral<A>::value) {  // wraps around
        using U = typename std::make_unsigned<A>::type;
        nccl_reduce<U, U>(out, in, n, [](U a, U b) { return U(a + b); });
    } else nccl_reduce<T, A>(out, in, n, [](A a, A b) { return a + b; });
}

inline void nccl_reduce_typed(ncclDataType_t type, ncclRedOp_t op, void* out, const std::vector<const void*>& in,
                              size_t count) {
    switch (type) {
        case ncclInt8: return nccl_reduce_by<int8_t, int8_t>(op, out, in, count);
        case ncclUint8: return nccl_reduce_by<uint8_t, uint8_t>(op, out, in, count);
        case ncclInt32: return nccl_reduce_by<int32_t, int32_t>(op, out, in, count);
        case ncclUint32: return nccl_reduce_by<uint32_t, uint32_t>(op, out, in, count);
        case ncclInt64: return nccl_reduce_by<int64_t, int64_t>(op, out, in, count);
        case ncclUint64: return nccl_reduce_by<uint64_t, uint64_t>(op, out, in, count);
        case ncclFloat32: return nccl_reduce_by<float, float>(op, out, in, count);
        case ncclFloat64: return nccl_reduce_by<double, double>(op, out, in, count);
        case ncclBfloat16: return nccl_reduce_by<__nv_bfloat16, float>(op, out, in, count);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives

// A buffer of count elements in a piece a rank; the pieces' sizes differ by at most one.
struct NcclPieces {
    int ranks, rank;
    size_t count, width;

    size_t begin(int r) const { return count / ranks * r + std::min<size_t>(r, count % ranks); }
    size_t size(int r) const { return begin(r + 1) - begin(r); }
    size_t chunk() const { return NCCL_CHUNK / width; }
    size_t rounds() const { return (size(0) + chunk() - 1) / chunk(); }  // the first piece is among the largest
    // what of a piece goes in a round: from where in the buffer, how much
    size_t from(int r, size_t round) const { return begin(r) + std::min(size(r), round * chunk()); }
    size_t part(int r, size_t round) const { return from(r, round + 1) - from(r, round); }

    size_t sent_by_scatter() const { return (count - size(rank)) * width; }
    size_t sent_by_gather() const { return size(rank) * (ranks - 1) * width; }
};

// The sum of all ranks' piece `rank` of send to out. Each rank's part comes straight from that rank.
inline ncclResult_t nccl_scatter(NcclExchange& exchange, NcclPieces p, const void* send, void* out, ncclDataType_t type,
                                 ncclRedOp_t op) {
    std::vector<char> scratch((p.ranks - 1) * std::min(NCCL_CHUNK, p.size(0) * p.width));
    for (size_t round = 0; round < p.rounds(); round++) {
        std::vector<NcclMessage> receives, sends;
        std::vector<const void*> in;
        const size_t part = p.part(p.rank, round);
        for (int r = 0; r < p.ranks; r++) {
            char* mine = (char*)send + p.from(r, round) * p.width;
            if (r == p.rank) {
                in.push_back(mine);
                continue;
            }
            void* theirs = scratch.data() + receives.size() * part * p.width;
            in.push_back(theirs);
            receives.push_back({r, theirs, part * p.width});
            sends.push_back({r, mine, p.part(r, round) * p.width});
        }
        ncclResult_t result = exchange.next(receives, sends);
        if (result != ncclSuccess) return result;
        nccl_reduce_typed(type, op, (char*)out + (p.from(p.rank, round) - p.begin(p.rank)) * p.width, in, part);
    }
    return ncclSuccess;
}

// Every rank's own piece to all, in place.
inline ncclResult_t nccl_gather(NcclExchange& exchange, NcclPieces p, void* buffer) {
    for (size_t round = 0; round < p.rounds(); round++) {
        std::vector<NcclMessage> receives, sends;
        auto message = [&](int peer, int piece) {
            return NcclMessage{peer, (char*)buffer + p.from(piece, round) * p.width, p.part(piece, round) * p.width};
        };
        for (int r = 0; r < p.ranks; r++) {
            if (r == p.rank) continue;
            receives.push_back(message(r, r));
            sends.push_back(message(r, p.rank));
        }
        ncclResult_t result = exchange.next(receives, sends);
        if (result != ncclSuccess) return result;
    }
    return ncclSuccess;
}

enum NcclKind { NCCL_ALL_REDUCE, NCCL_REDUCE_SCATTER, NCCL_ALL_GATHER };

inline int nccl_group_depth = 0;
inline std::vector<std::function<ncclResult_t()>> nccl_group;

// Arguments are checked at once; the work goes to the stream, inside a group at the group's end.
template <class F>
ncclResult_t nccl_collective(NcclKind kind, ncclComm_t comm, const void* send, void* receive, NcclPieces p,
                             ncclDataType_t type, ncclRedOp_t op, size_t sent, size_t rounds, size_t results,
                             cudaStream_t stream, F run) {
    const char* name = kind == NCCL_ALL_REDUCE ? "allreduce" : kind == NCCL_ALL_GATHER ? "allgather" : "reducescatter";
    if (comm == nullptr) return nccl_fail(ncclInvalidArgument, "%s: no communicator", name);
    if (p.width == 0) return nccl_fail(ncclInvalidArgument, "%s: data type %d is not one of this build's", name, type);
    if (op != ncclSum && op != ncclMax && op != ncclMin)
        return nccl_fail(ncclInvalidArgument, "%s: operation %d is not one of this build's", name, op);
    if (p.count > 0 && (send == nullptr || receive == nullptr))
        return nccl_fail(ncclInvalidArgument, "%s: a null buffer", name);
    if (comm->aborted) return nccl_fail(ncclInvalidUsage, "%s: the communicator was aborted", name);
    if (comm->error != ncclSuccess) return comm->error;
    auto issue = [=] {
        const int id = stream ? stream->id : 0;
        const bool captured = stream && stream->captured;
        if (!captured && comm->last_stream != id)
            cuda_enqueue(stream, {}, [other = comm->last_stream, entry = comm->last_entry] {
                cuda_run_until(other, entry);
            });
        cuda_enqueue(stream, cuda_label("%s %zu %zu", name, p.count * p.width, sent), [=] {
            if (comm->error != ncclSuccess) return;
            nccl_cpu_calls++;
            comm->collectives++;
            NcclExchange exchange{comm, kind, std::max<size_t>(rounds, 1)};
            ncclResult_t result = run(exchange);
            if (result == ncclSuccess && exchange.round == 0) result = exchange.next({}, {});  // nothing to send
            if (result == ncclSuccess && nccl_fault_due(comm)) nccl_fault_after(receive, results, p.width, type);
            if (result != ncclSuccess) comm->error = result;
        });
        if (!captured) comm->last_stream = id, comm->last_entry = stream ? stream->put : 0;
        return comm->error.load();
    };
    if (nccl_group_depth == 0) return issue();
    nccl_group.push_back(issue);
    return ncclSuccess;
}

inline ncclResult_t ncclGroupStart() { return nccl_group_depth++, ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (nccl_group_depth == 0) return nccl_fail(ncclInvalidUsage, "ncclGroupEnd: no ncclGroupStart before it");
    if (--nccl_group_depth > 0) return ncclSuccess;
    std::vector<std::function<ncclResult_t()>> group;
    group.swap(nccl_group);
    for (auto& issue : group) {
        ncclResult_t result = issue();
        if (result != ncclSuccess) return result;
    }
    return ncclSuccess;
}

inline NcclPieces nccl_pieces(ncclComm_t comm, size_t count, ncclDataType_t type, bool times_ranks) {
    const int ranks = comm ? comm->ranks : 1;
    return {ranks, comm ? comm->rank : 0, times_ranks ? count * ranks : count, nccl_width(type)};
}

// In place: receive == send.
inline ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm, cudaStream_t stream) {
    const NcclPieces p = nccl_pieces(comm, count, type, false);
    const size_t rounds = p.ranks > 1 && p.width ? 2 * p.rounds() : 0;
    return nccl_collective(NCCL_ALL_REDUCE, comm, send, receive, p, type, op, p.sent_by_scatter() + p.sent_by_gather(),
                           rounds, count, stream, [=](NcclExchange& exchange) {
        if (p.ranks == 1) {
            if (receive != send && count > 0) memcpy(receive, send, count * p.width);
            return ncclSuccess;
        }
        ncclResult_t result = nccl_scatter(exchange, p, send, (char*)receive + p.begin(p.rank) * p.width, type, op);
        return result == ncclSuccess ? nccl_gather(exchange, p, receive) : result;
    });
}

// In place: receive == send + rank * count.
inline ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    const NcclPieces p = nccl_pieces(comm, count, type, true);
    const size_t rounds = p.ranks > 1 && p.width ? p.rounds() : 0;
    return nccl_collective(NCCL_REDUCE_SCATTER, comm, send, receive, p, type, op, p.sent_by_scatter(), rounds, count,
                           stream, [=](NcclExchange& exchange) {
        if (p.ranks > 1) return nccl_scatter(exchange, p, send, receive, type, op);
        if (receive != send && count > 0) memcpy(receive, send, count * p.width);
        return ncclSuccess;
    });
}

// In place: send == receive + rank * count.
inline ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    const NcclPieces p = nccl_pieces(comm, count, type, true);
    const size_t rounds = p.ranks > 1 && p.width ? p.rounds() : 0;
    return nccl_collective(NCCL_ALL_GATHER, comm, send, receive, p, type, ncclSum, p.sent_by_gather(), rounds, p.count,
                           stream, [=](NcclExchange& exchange) {
        char* own = (char*)receive + p.begin(p.rank) * p.width;
        if (own != send && count > 0) memcpy(own, send, count * p.width);
        return p.ranks > 1 ? nccl_gather(exchange, p, receive) : ncclSuccess;
    });
}

// faults, as cuda_runtime.h has them
#define NCCL_MAY_FAIL(call) (cuda_fault_due() ? ncclUnhandledCudaError : (call))
#define ncclGetUniqueId(...) NCCL_MAY_FAIL(ncclGetUniqueId(__VA_ARGS__))
#define ncclCommInitRank(...) NCCL_MAY_FAIL(ncclCommInitRank(__VA_ARGS__))
#define ncclCommGetAsyncError(...) NCCL_MAY_FAIL(ncclCommGetAsyncError(__VA_ARGS__))
#define ncclCommAbort(...) NCCL_MAY_FAIL(ncclCommAbort(__VA_ARGS__))
#define ncclCommDestroy(...) NCCL_MAY_FAIL(ncclCommDestroy(__VA_ARGS__))
#define ncclGroupStart(...) NCCL_MAY_FAIL(ncclGroupStart(__VA_ARGS__))
#define ncclGroupEnd(...) NCCL_MAY_FAIL(ncclGroupEnd(__VA_ARGS__))
#define ncclAllReduce(...) NCCL_MAY_FAIL(ncclAllReduce(__VA_ARGS__))
#define ncclReduceScatter(...) NCCL_MAY_FAIL(ncclReduceScatter(__VA_ARGS__))
#define ncclAllGather(...) NCCL_MAY_FAIL(ncclAllGather(__VA_ARGS__))
