// Ranks: processes, each with a GPU, that train one model, each on its part of a step's sequences. NCCL's collectives
// run on a stream beside the model's; the two wait for each other by events. Every rank calls the same collectives in
// the same order. What a rank sends at the least (n ranks, b bytes in the whole buffer), and a ring sends just that:
//   reduce-scatter, all-gather   b (n-1)/n          all-reduce   2 b (n-1)/n
#pragma once
#ifndef NO_NCCL
#include <nccl.h>
#endif

#include <algorithm>
#include <vector>

#include "../device/base.cuh"

#ifndef NO_NCCL
constexpr bool HAS_NCCL = true;
#else  // this build is for one GPU: check_start refuses several ranks, so that none of these is called
constexpr bool HAS_NCCL = false;
enum ncclResult_t { ncclSuccess, ncclInProgress, ncclInvalidUsage };
enum ncclDataType_t { ncclUint64, ncclFloat32, ncclFloat64, ncclBfloat16 };
enum ncclRedOp_t { ncclSum };
struct ncclUniqueId { char internal[1]; };
typedef void* ncclComm_t;
template <class... A>
ncclResult_t no_nccl(A&&...) {
    return ncclInvalidUsage;
}
#define ncclGetUniqueId no_nccl
#define ncclCommInitRank no_nccl
#define ncclCommGetAsyncError no_nccl
#define ncclCommDestroy no_nccl
#define ncclAllReduce no_nccl
#define ncclReduceScatter no_nccl
#define ncclAllGather no_nccl
inline const char* ncclGetErrorString(ncclResult_t) { return "this build has no NCCL"; }
inline const char* ncclGetLastError(ncclComm_t) { return "none"; }
#endif

constexpr ncclDataType_t NCCL_FLOATX = BF16 ? ncclBfloat16 : ncclFloat32;

inline void check_nccl(ncclResult_t status, const char* call, const char* file, int line) {
    if (status != ncclSuccess)
        throw Error(
            format("%s:%d: %s: %s: %s", file, line, call, ncclGetErrorString(status), ncclGetLastError(nullptr)));
}
#define CHECK_NCCL(call) check_nccl(call, #call, __FILE__, __LINE__)

inline ncclDataType_t nccl_type(const Flat& f) { return f.half ? ncclBfloat16 : ncclFloat32; }

struct Ranks {
    int rank = 0, size = 1;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    cudaEvent_t moment = nullptr;
    double* values = nullptr;  // (size) on the device, for exchange()
    double sent = 0;           // bytes, by the formulas above

    // The stream `later` goes on only when all that `earlier` has been given so far is done.
    void order(cudaStream_t later, cudaStream_t earlier) {
        CHECK(cudaEventRecord(moment, earlier));
        CHECK(cudaStreamWaitEvent(later, moment, 0));
    }
    void count(double bytes, int times) {
        collectives++;
        sent += times * bytes * (size - 1) / size;
    }

    // p (elements): the sum over ranks, on all of them
    void all_reduce(void* p, size_t elements, ncclDataType_t type, size_t width) {
        count(double(elements) * width, 2);
        CHECK_NCCL(ncclAllReduce(p, p, elements, type, ncclSum, comm, stream));
    }
    // out (piece) = this rank's piece of the sum over ranks of inp (size pieces); in place: out is that piece of inp
    void reduce_scatter(Flat out, Flat inp, size_t piece) {
        count(double(piece) * size * inp.width(), 1);
        CHECK_NCCL(ncclReduceScatter(inp.p, out.p, piece, nccl_type(inp), ncclSum, comm, stream));
    }
    // out (size pieces) from every rank's inp (piece); in place: inp is this rank's piece of out
    void all_gather(void* out, const void* inp, size_t piece, ncclDataType_t type, size_t width) {
        count(double(piece) * size * width, 1);
        CHECK_NCCL(ncclAllGather(inp, out, piece, type, comm, stream));
    }

    // Every rank's number, known to all when it returns.
    std::vector<double> exchange(double mine) {
        std::vector<double> all(size, mine);
        if (size == 1) return all;
        CHECK(cudaMemcpyAsync(values + rank, &mine, sizeof(double), cudaMemcpyHostToDevice, stream));
        all_gather(values, values + rank, 1, ncclFloat64, sizeof(double));
        CHECK(cudaMemcpyAsync(all.data(), values, size * sizeof(double), cudaMemcpyDeviceToHost, stream));
        CHECK(cudaStreamSynchronize(stream));
        return all;
    }
    double least(double mine) {
        const std::vector<double> all = exchange(mine);
        return *std::min_element(all.begin(), all.end());
    }
    double most(double mine) { return -least(-mine); }

    // id: that of rank 0's ncclGetUniqueId
    void open(const ncclUniqueId& id, int rank_, int size_) {
        int least_priority, priority;
        rank = rank_, size = size_;
        CHECK(cudaDeviceGetStreamPriorityRange(&least_priority, &priority));
        CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority));
        CHECK(cudaEventCreateWithFlags(&moment, cudaEventDisableTiming));
        CHECK(cudaMalloc(&values, size * sizeof(double)));
        CHECK_NCCL(ncclCommInitRank(&comm, size, id, rank));
        // NCCL takes its buffers when a collective is first used: now, so that the free memory is what is left
        const size_t piece = (size_t(32) << 20) / sizeof(float) / size;
        float* buffer = nullptr;
        CHECK(cudaMalloc(&buffer, piece * size * sizeof(float)));
        CHECK(cudaMemsetAsync(buffer, 0, piece * size * sizeof(float), stream));
        all_reduce(buffer, piece * size, ncclFloat32, sizeof(float));
        reduce_scatter(buffer + piece * rank, buffer, piece);
        all_gather(buffer, buffer + piece * rank, piece, ncclFloat32, sizeof(float));
        CHECK(cudaStreamSynchronize(stream));
        CHECK(cudaFree(buffer));
    }
    void close() {
        if (comm) {
            CHECK_NCCL(ncclCommDestroy(comm));
            CHECK(cudaFree(values));
            CHECK(cudaEventDestroy(moment));
            CHECK(cudaStreamDestroy(stream));
        }
        comm = nullptr, rank = 0, size = 1;
    }
};
inline Ranks ranks;  // this process among them
