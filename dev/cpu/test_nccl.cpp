// Tests of the stand-in's NCCL: mpirun -n K build/test_nccl, K from 1; also without mpirun. Totals are over the ranks.
#include "dev/cpu/expect.h"
#include <nccl.h>
#include <sys/wait.h>
#include <random>
#include <thread>

static int ranks, rank;
static ncclComm_t comm;
static cudaStream_t stream;
#define EXPECT_RESULT(call, want)                                                                              \
    do {                                                                                                       \
        ncclResult_t code = call;                                                                              \
        EXPECT(code == want, "%s is '%s' (%s)", #call, ncclGetErrorString(code), ncclGetLastError(nullptr));   \
    } while (0)

static void test(const char* name, std::function<void()> body) {
    why.clear();
    body();
    if (!why.empty()) printf("FAIL %s, rank %d of %d: %s\n", name, rank, ranks, why.c_str());
    else if (rank == 0) printf("ok %s\n", name);
    (why.empty() ? passed : failed)++;
}

static int environment(const char* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

static ncclUniqueId unique_id(int seed) {  // the same on all ranks without a message
    ncclUniqueId id = {};
    id.internal[5] = seed;
    return id;
}

// ---------------------------------------------------------------------------------------------------------------------
// Values that any rank can make for any other

template <class T> std::vector<T> values(int of_rank, size_t n, int seed) {
    std::mt19937_64 generator(1000 * seed + of_rank);
    std::vector<T> v(n);
    for (T& x : v) {
        const uint64_t bits = generator();
        if constexpr (std::is_integral<T>::value) x = T(bits);
        else x = T((double(bits) / 18446744073709551616.0 - 0.5) * std::ldexp(1.0, bits % 9));  // sums round
    }
    return v;
}

template <class T> struct Accumulator { using type = T; };
template <> struct Accumulator<__nv_bfloat16> { using type = float; };

// A plain loop in the order of the ranks.
template <class T> std::vector<T> reduced(size_t n, int seed, ncclRedOp_t op) {
    using A = typename Accumulator<T>::type;
    std::vector<A> sum;
    for (int r = 0; r < ranks; r++) {
        std::vector<T> v = values<T>(r, n, seed);
        if (r == 0) sum.assign(v.begin(), v.end());
        for (size_t i = 0; i < n && r > 0; i++) {
            volatile A a = sum[i], b = A(v[i]);  // in this order, in this type
            if (op == ncclMax) sum[i] = a < b ? b : a;
            else if (op == ncclMin) sum[i] = b < a ? b : a;
            else if constexpr (std::is_integral<A>::value) sum[i] = A(uint64_t(a) + uint64_t(b));
            else sum[i] = a + b;
        }
    }
    std::vector<T> v(n);
    for (size_t i = 0; i < n; i++) v[i] = T(sum[i]);
    return v;
}

template <class T> void expect_same(const T* got, const T* want, size_t n, const char* what, int line) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(got + i, want + i, sizeof(T)) != 0) {
            EXPECT(false, "line %d, %s of %zu: element %zu is %.17g, want %.17g", line, what, n, i, double(got[i]),
                   double(want[i]));
            return;
        }
}

static void expect_sent(uint64_t before, uint64_t bytes, const char* what, size_t n) {
    EXPECT(nccl_cpu_bytes_sent - before == bytes, "%s of %zu sent %zu bytes, not %zu", what, n,
           size_t(nccl_cpu_bytes_sent - before), size_t(bytes));
}

// ---------------------------------------------------------------------------------------------------------------------
// Every call, one type and operation: results, bytes, in place and not

template <class T> void check_all_reduce(ncclDataType_t type, ncclRedOp_t op, size_t n, bool in_place, int seed) {
    const std::vector<T> mine = values<T>(rank, n, seed), want = reduced<T>(n, seed, op);
    std::vector<T> send = mine, receive(n);
    memset((void*)receive.data(), 0xFF, n * sizeof(T));
    T* result = in_place ? send.data() : receive.data();
    const uint64_t before = nccl_cpu_bytes_sent, calls = nccl_cpu_calls;
    EXPECT_RESULT(ncclAllReduce(send.data(), result, n, type, op, comm, stream), ncclSuccess);
    cudaStreamSynchronize(stream);
    expect_same(result, want.data(), n, "all-reduce", __LINE__);
    if (!in_place) expect_same(send.data(), mine.data(), n, "all-reduce's input", __LINE__);
    const size_t own = n / ranks + (size_t(rank) < n % ranks);
    expect_sent(before, (n - own + own * (ranks - 1)) * sizeof(T), "all-reduce", n);
    EXPECT(nccl_cpu_calls == calls + 1, "%zu calls", size_t(nccl_cpu_calls - calls));
}

template <class T> void check_reduce_scatter(ncclDataType_t type, ncclRedOp_t op, size_t n, bool in_place, int seed) {
    const std::vector<T> mine = values<T>(rank, n * ranks, seed), want = reduced<T>(n * ranks, seed, op);
    std::vector<T> send = mine, receive(n);
    T* result = in_place ? send.data() + rank * n : receive.data();
    uint64_t before = nccl_cpu_bytes_sent;
    EXPECT_RESULT(ncclReduceScatter(send.data(), result, n, type, op, comm, stream), ncclSuccess);
    cudaStreamSynchronize(stream);
    expect_same(result, want.data() + rank * n, n, "reduce-scatter", __LINE__);
    for (int r = 0; r < ranks; r++)
        if (!in_place || r != rank) expect_same(&send[r * n], &mine[r * n], n, "reduce-scatter's input", __LINE__);
    expect_sent(before, (ranks - 1) * n * sizeof(T), "reduce-scatter", n);

    // gathered, it is the all-reduce, bit for bit
    std::vector<T> gathered(n * ranks), all(n * ranks);
    T* from = in_place ? gathered.data() + rank * n : result;
    if (in_place) std::copy(result, result + n, from);
    before = nccl_cpu_bytes_sent;
    EXPECT_RESULT(ncclAllGather(from, gathered.data(), n, type, comm, stream), ncclSuccess);
    cudaStreamSynchronize(stream);
    expect_sent(before, (ranks - 1) * n * sizeof(T), "all-gather", n);
    EXPECT_RESULT(ncclAllReduce(mine.data(), all.data(), n * ranks, type, op, comm, stream), ncclSuccess);
    cudaStreamSynchronize(stream);
    expect_same(gathered.data(), all.data(), n * ranks, "reduce-scatter and all-gather", __LINE__);
}

template <class T> void check_type(ncclDataType_t type) {
    const size_t chunk = NCCL_CHUNK / sizeof(T);
    int seed = 0;
    for (size_t n : {size_t(0), size_t(1), size_t(2), size_t(7), size_t(1023), size_t(100003), 2 * chunk + 5})
        for (bool in_place : {false, true})
            for (ncclRedOp_t op : {ncclSum, ncclMax, ncclMin}) {
                if (op != ncclSum && n > 2000) continue;
                seed++;
                check_all_reduce<T>(type, op, n, in_place, seed);
                check_reduce_scatter<T>(type, op, n, in_place, seed);
            }
    check_all_reduce<T>(type, ncclSum, ranks * chunk, true, 99);  // pieces of exactly a chunk
    check_all_reduce<T>(type, ncclSum, ranks * chunk + 1, false, 98);
}

// ---------------------------------------------------------------------------------------------------------------------

static void test_errors() {
    float x = 1;
    const uint64_t calls = nccl_cpu_calls;
    ncclComm_t none = (ncclComm_t)&x;
    EXPECT_RESULT(ncclCommInitRank(&none, 2, unique_id(1), 2), ncclInvalidArgument);
    EXPECT_RESULT(ncclCommInitRank(nullptr, 1, unique_id(1), 0), ncclInvalidArgument);
    EXPECT_RESULT(ncclAllReduce(&x, &x, 1, ncclFloat, ncclSum, nullptr, stream), ncclInvalidArgument);
    EXPECT_RESULT(ncclAllReduce(&x, nullptr, 1, ncclFloat, ncclSum, comm, stream), ncclInvalidArgument);
    EXPECT_RESULT(ncclAllReduce(&x, &x, 1, ncclDataType_t(6), ncclSum, comm, stream), ncclInvalidArgument);
    EXPECT(strstr(ncclGetLastError(comm), "allreduce: data type 6"), "%s", ncclGetLastError(comm));
    EXPECT_RESULT(ncclReduceScatter(&x, &x, 1, ncclFloat, ncclRedOp_t(1), comm, stream), ncclInvalidArgument);
    EXPECT_RESULT(ncclGroupEnd(), ncclInvalidUsage);
    EXPECT_RESULT(ncclCommAbort(nullptr), ncclInvalidArgument);
    EXPECT_RESULT(ncclCommDestroy(nullptr), ncclInvalidArgument);
    ncclResult_t error = ncclInternalError;
    EXPECT_RESULT(ncclCommGetAsyncError(comm, &error), ncclSuccess);
    EXPECT(error == ncclSuccess, "%s", ncclGetErrorString(error));
    EXPECT(nccl_cpu_calls == calls, "%s", "a refused call counts");
    EXPECT_RESULT(ncclAllReduce(&x, &x, 1, ncclFloat, ncclSum, comm, stream), ncclSuccess);  // all goes on
    EXPECT(x == ranks, "%g", x);
}

// A job that is not the one MPI has started, ids that differ: all ranks say so.
static void test_wrong_job() {
    ncclComm_t other = comm;
    std::string want = "MPI started " + std::to_string(ranks) + (ranks == 1 ? " process, " : " processes, ");
#ifndef USE_MPI
    want = "this CPU build has no MPI, so one rank only";
#else
    if (!nccl_launched_by_mpi()) want = "did not start them: start with its mpirun -n 3";
#endif
    EXPECT_RESULT(ncclCommInitRank(&other, ranks + 2, unique_id(1), rank), ncclInvalidUsage);
    EXPECT(other == nullptr && strstr(ncclGetLastError(nullptr), want.c_str()), "%s", ncclGetLastError(nullptr));
    if (ranks == 1) return;
    EXPECT_RESULT(ncclCommInitRank(&other, ranks, unique_id(1), ranks - 1 - rank), ncclInvalidUsage);
    EXPECT(strstr(ncclGetLastError(nullptr), "MPI's rank of this process is "), "%s", ncclGetLastError(nullptr));
    EXPECT_RESULT(ncclCommInitRank(&other, ranks, unique_id(rank == ranks - 1), rank), ncclInvalidArgument);
    EXPECT(strstr(ncclGetLastError(nullptr), "unique ids differ"), "%s", ncclGetLastError(nullptr));
}

static void test_group() {
    std::vector<float> a = values<float>(rank, 1000, 1), b = values<float>(rank, 10, 2);
    const uint64_t calls = nccl_cpu_calls;
    EXPECT_RESULT(ncclGroupStart(), ncclSuccess);
    EXPECT_RESULT(ncclGroupStart(), ncclSuccess);
    EXPECT_RESULT(ncclAllReduce(a.data(), a.data(), 1000, ncclFloat, ncclSum, comm, stream), ncclSuccess);
    EXPECT_RESULT(ncclAllReduce(b.data(), b.data(), 10, ncclFloat, ncclMax, comm, stream), ncclSuccess);
    EXPECT_RESULT(ncclGroupEnd(), ncclSuccess);
    EXPECT(nccl_cpu_calls == calls, "%s", "a group began before its end");
    EXPECT_RESULT(ncclGroupEnd(), ncclSuccess);
    cudaStreamSynchronize(stream);
    EXPECT(nccl_cpu_calls == calls + 2, "%zu calls", size_t(nccl_cpu_calls - calls));
    expect_same(a.data(), reduced<float>(1000, 1, ncclSum).data(), 1000, "all-reduce", __LINE__);
    expect_same(b.data(), reduced<float>(10, 2, ncclMax).data(), 10, "all-reduce", __LINE__);
}

// NaN in a sum is NaN for all; max and min take the number.
static void test_nan() {
    float x[2] = {rank == ranks - 1 ? NAN : 1.0f, INFINITY}, sum[2], most[2];
    EXPECT_RESULT(ncclAllReduce(x, sum, 2, ncclFloat, ncclSum, comm, stream), ncclSuccess);
    EXPECT_RESULT(ncclAllReduce(x, most, 2, ncclFloat, ncclMax, comm, stream), ncclSuccess);
    cudaStreamSynchronize(stream);
    EXPECT(std::isnan(sum[0]) && sum[1] == INFINITY, "sums %g %g", sum[0], sum[1]);
    EXPECT((ranks == 1 ? std::isnan(most[0]) : most[0] == 1) && most[1] == INFINITY, "most %g %g", most[0], most[1]);
}

// Collectives are work of their stream: out of step, one that does not wait reads what was there before. Those of one
// communicator run in the order of issue on whatever streams.
static void test_streams() {
    cudaStreamDestroy(stream);  // "first" is a stream beside which there is no other
    for (CudaStreams mode : {CUDA_STREAMS_IN_STEP, CUDA_STREAMS_LATE, CUDA_STREAMS_EARLY})
        for (bool waits : {false, true}) {
            cudaStream_t compute, a, b;
            cudaEvent_t ready, done;
            cuda_streams = mode;
            for (cudaStream_t* s : {&compute, &a, &b}) cudaStreamCreateWithFlags(s, cudaStreamNonBlocking);
            cuda_streams = CUDA_STREAMS_IN_STEP;
            for (cudaEvent_t* e : {&ready, &done}) cudaEventCreate(e);
            int32_t x[2] = {0, 0}, ones = 0x01010101, seen = -1;
            const uint64_t calls = nccl_cpu_calls;
            cudaMemsetAsync(x, 1, sizeof x, compute);
            cudaEventRecord(ready, compute);
            if (waits) cudaStreamWaitEvent(a, ready);
            EXPECT_RESULT(ncclAllReduce(x, x, 2, ncclInt, ncclSum, comm, a), ncclSuccess);
            EXPECT_RESULT(ncclAllReduce(x, x, 2, ncclInt, ncclMax, comm, b), ncclSuccess);  // waits for a's
            EXPECT(nccl_cpu_calls == calls + (mode == CUDA_STREAMS_LATE ? 0 : 2), "mode %d: %zu calls", mode,
                   size_t(nccl_cpu_calls - calls));
            cudaEventRecord(done, b);
            if (waits) cudaStreamWaitEvent(compute, done);
            cudaMemcpyAsync(&seen, x, sizeof seen, cudaMemcpyDeviceToDevice, compute);
            cudaDeviceSynchronize();
            int want = waits || mode == CUDA_STREAMS_IN_STEP ? ranks * ones : ones;
            EXPECT(seen == want, "mode %d, waits %d: %x, not %x", mode, waits, seen, want);
            EXPECT(nccl_cpu_calls == calls + 2, "%zu calls", size_t(nccl_cpu_calls - calls));
            for (cudaStream_t s : {compute, a, b}) cudaStreamDestroy(s);
            for (cudaEvent_t e : {ready, done}) cudaEventDestroy(e);
        }
    cudaStreamCreate(&stream);
}

static void test_faults() {
    auto at_next_call = [](int of_rank, decltype(NcclFault::kind) kind) {
        nccl_cpu_fault.rank = of_rank, nccl_cpu_fault.call = nccl_cpu_calls + 1, nccl_cpu_fault.kind = kind;
    };
    const std::vector<float> ones(1001, 1);
    std::vector<float> got(1001);
    auto sum = [&] {
        EXPECT_RESULT(ncclAllReduce(ones.data(), got.data(), 1001, ncclFloat, ncclSum, comm, stream), ncclSuccess);
        cudaStreamSynchronize(stream);
    };
    at_next_call(ranks - 1, NcclFault::FLIP);
    sum();
    for (int i = 0; i < 1001; i++)
        EXPECT((got[i] != ranks) == (rank == ranks - 1 && i == 500), "flip: element %d is %g", i, got[i]);
    at_next_call(0, NcclFault::NAN_);
    sum();
    for (int i = 0; i < 1001; i++)
        EXPECT(std::isnan(got[i]) == (rank == 0 && i == 0), "nan: element %d is %g", i, got[i]);
    sum();
    for (int i = 0; i < 1001; i++) EXPECT(got[i] == ranks, "once more: element %d is %g", i, got[i]);
    if (ranks > 1) return;

    // each in a process of its own; MPI must not run yet
    auto child = [&](decltype(NcclFault::kind) kind) {
        pid_t pid = fork();
        if (pid == 0) {
            std::thread([] { usleep(300000), _exit(7); }).detach();  // other threads go on
            at_next_call(0, kind);
            sum();
            _exit(got[500] == 1 ? 0 : 3);
        }
        return pid;
    };
    int status = 0;
    waitpid(child(NcclFault::KILL), &status, 0);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "kill: status %x", status);
    waitpid(child(NcclFault::HANG), &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 7, "hang: status %x", status);
    pid_t stopped = child(NcclFault::STOP);
    waitpid(stopped, &status, WUNTRACED);
    EXPECT(WIFSTOPPED(status), "stop: status %x", status);
    kill(stopped, SIGCONT);
    waitpid(stopped, &status, 0);
    EXPECT(WIFEXITED(status), "stop: status %x after SIGCONT", status);
}

// The last rank stays away; a second thread ends the wait of the others.
static void test_abort() {
    ncclComm_t doomed;
    std::vector<float> x(1 << 20);
    EXPECT_RESULT(ncclCommInitRank(&doomed, ranks, unique_id(3), rank), ncclSuccess);
    if (ranks > 1 && rank != ranks - 1) {
        std::thread watch([&] {
            usleep(100000);
            ncclCommAbort(doomed);
        });
        EXPECT_RESULT(ncclAllReduce(x.data(), x.data(), x.size(), ncclFloat, ncclSum, doomed, stream), ncclRemoteError);
        watch.join();
        ncclResult_t error = ncclSuccess;
        ncclCommGetAsyncError(doomed, &error);
        EXPECT(error == ncclRemoteError, "%s", ncclGetErrorString(error));
    } else {
        ncclCommAbort(doomed);
    }
    EXPECT_RESULT(ncclAllReduce(x.data(), x.data(), 1, ncclFloat, ncclSum, doomed, stream), ncclInvalidUsage);
    float one = 1;  // the other communicator is well
    EXPECT_RESULT(ncclAllReduce(&one, &one, 1, ncclFloat, ncclSum, comm, stream), ncclSuccess);
    EXPECT(one == ranks, "%g", one);
    EXPECT_RESULT(ncclCommDestroy(doomed), ncclSuccess);
}

static void test_memory_share() {
    size_t free, total, shared_free, shared_total;
    const char* local = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    EXPECT(cuda_local_ranks() == size_t(ranks), "%zu", cuda_local_ranks());
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "100000", 1);
    cudaSetDevice(0);
    EXPECT(getenv("OMP_NUM_THREADS") || cuda_threads.threads == 1, "%d threads", cuda_threads.threads);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1", 1);
    cudaMemGetInfo(&free, &total);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 1);
    cudaMemGetInfo(&shared_free, &shared_total);
    EXPECT(shared_total == total / 4 && shared_free < free / 3 && shared_free > 0, "%zu of %zu, shared %zu of %zu",
           free, total, shared_free, shared_total);
    if (local) setenv("OMPI_COMM_WORLD_LOCAL_SIZE", std::to_string(ranks).c_str(), 1);
    else unsetenv("OMPI_COMM_WORLD_LOCAL_SIZE");
}

static void speed() {
    std::vector<float> x(8 << 20, 1);
    for (int i = 0; i < 2; i++) {
        auto begin = std::chrono::steady_clock::now();
        ncclAllReduce(x.data(), x.data(), x.size(), ncclFloat, ncclSum, comm, stream);
        cudaStreamSynchronize(stream);
        double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (rank == 0 && i == 1 && ranks > 1)
            printf("   all-reduce of 32 MiB over %d: %.2f GB/s of the buffer\n", ranks, 0.0336 / s);
    }
}

int main() {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    ranks = environment("OMPI_COMM_WORLD_SIZE", environment("PMI_SIZE", 1));  // Open MPI's, MPICH's
    rank = environment("OMPI_COMM_WORLD_RANK", environment("PMI_RANK", 0));
    cudaStreamCreate(&stream);
    ncclUniqueId id = {}, next = {};
    test("init", [&] {
        EXPECT_RESULT(ncclCommInitRank(&comm, ranks, unique_id(1), rank), ncclSuccess);
        EXPECT_RESULT(ncclGetUniqueId(&id), ncclSuccess);
        EXPECT_RESULT(ncclGetUniqueId(&next), ncclSuccess);
        EXPECT(memcmp(&id, &next, sizeof id) != 0, "%s", "the unique id is not unique");
    });
    if (comm == nullptr) return 1;
    test("faults", test_faults);
    test("int8", [] { check_type<int8_t>(ncclInt8); });
    test("uint8", [] { check_type<uint8_t>(ncclUint8); });
    test("int32", [] { check_type<int32_t>(ncclInt32); });
    test("uint32", [] { check_type<uint32_t>(ncclUint32); });
    test("int64", [] { check_type<int64_t>(ncclInt64); });
    test("uint64", [] { check_type<uint64_t>(ncclUint64); });
    test("float32", [] { check_type<float>(ncclFloat32); });
    test("float64", [] { check_type<double>(ncclFloat64); });
    test("bfloat16", [] { check_type<__nv_bfloat16>(ncclBfloat16); });
    test("nan", test_nan);
    test("streams", test_streams);
    test("group", test_group);
    test("errors", test_errors);
    test("wrong_job", test_wrong_job);
    test("abort", test_abort);
    test("memory_share", test_memory_share);
    speed();
    int64_t totals[2] = {passed, failed};
    ncclResult_t counted = ncclAllReduce(totals, totals, 2, ncclInt64, ncclSum, comm, stream);
    cudaStreamSynchronize(stream);
    if (counted != ncclSuccess || ncclCommDestroy(comm) != ncclSuccess) return 1;
    if (rank == 0) printf("test_nccl: %d passed, %d failed\n", int(totals[0]), int(totals[1]));
    return totals[1] > 0;
}
