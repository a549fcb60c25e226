// Tests of find_world, default_address and Channel: every case forks the ranks of a job with torchrun's environment and
// looks at how all of them ended, at the one line on the job's stderr, and at the time it took.
//   test_channel [TEXT]      only the tests whose name contains TEXT
#include <fcntl.h>

#include <map>

#include "../run/channel.h"

#include "dev/test/frame.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr double SLACK = 2;  // seconds that a loaded, instrumented machine may add
#else
constexpr double SLACK = 1;
#endif

void nap(double s) { std::this_thread::sleep_for(std::chrono::duration<double>(s)); }

// What the processes of a job share: places to meet in, and a place to leave word.
struct Shared {
    std::atomic<int> arrived[4096];
    std::atomic<int> opened, count;
    std::atomic<int> ready;  // of the broadcast
    std::atomic<size_t> sent[4];
    char bytes[4][1 << 20];
    double times[16];
};
Shared* shared;

int free_port() {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in a = {};
    a.sin_family = AF_INET;
    socklen_t n = sizeof(a);
    if (bind(fd, (sockaddr*)&a, n) || getsockname(fd, (sockaddr*)&a, &n)) abort();
    ::close(fd);
    return ntohs(a.sin_port);
}

int listener(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    sockaddr_in a = {};
    a.sin_family = AF_INET;
    a.sin_port = htons(port);
    if (bind(fd, (sockaddr*)&a, sizeof(a)) || listen(fd, 8)) abort();
    return fd;
}


struct Job {
    std::string address = format("127.0.0.1:%d", free_port());
    double limit = 2, begun = now(), took = 0;
    std::map<int, pid_t> pids;       // by a number of the test's choice, mostly the rank
    std::map<int, int> status;       // exit status, or -signal
    std::vector<std::string> lines;  // on stderr of all
    char path[64] = "/tmp/test_channel.XXXXXX";
    int err = mkstemp(path);

    Job() {
        fcntl(err, F_SETFL, O_APPEND);
        shared = (Shared*)mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    }
    ~Job() {
        ::close(err), unlink(path);
        munmap(shared, sizeof(Shared));
    }
    void start(int number, int rank, int size, const std::function<void(const World&)>& body) {
        if ((pids[number] = fork())) return;
        dup2(err, 2);
        setenv("RANK", std::to_string(rank).c_str(), 1);
        setenv("WORLD_SIZE", std::to_string(size).c_str(), 1);
        setenv("LOCAL_RANK", std::to_string(rank).c_str(), 1);
        try {
            body(find_world());
        } catch (const std::exception& e) {
            channel.fail(e.what());
        }
        _exit(0);
    }
    void start(int size, const std::function<void(const World&)>& body) {
        for (int r = 0; r < size; r++) start(r, r, size, body);
    }
    // Opens the channel; the payload must arrive.
    void open(const World& w) const {
        std::string id = w.rank == 0 ? std::string("\0\n id", 5) + std::string(123, 'x') : "";
        channel.open(w, address, limit, nullptr, id);
        if (id.size() != 128 || id[0] != 0 || id[1] != '\n' || id[127] != 'x') throw Error("the id did not arrive");
        shared->opened++;
    }
    // Steps with a collective each, until the last or for ever.
    static void step(const World& w, int s) {
        channel.progress("forward", s);
        nap(0.01);
        channel.progress("reduce", s);
        shared->arrived[s]++;
        while (shared->arrived[s] < w.size) nap(0.001);
    }
    static void steps(const World& w, int n = 4000) {
        for (int s = 1; s <= n; s++) step(w, s);
    }
    bool all_open(int n) {
        for (double end = now() + 10; shared->opened < n; nap(0.005))
            if (now() > end) return fail("the ranks do not meet"), false;
        return true;
    }
    // Waits for all processes but `stopped`, which is woken only then.
    void wait(double most, int stopped = -1) {
        auto reap = [&](int number, double until) {
            int s = 0;
            pid_t got;
            while ((got = waitpid(pids[number], &s, WNOHANG)) == 0 && now() < until) nap(0.002);
            if (got == 0) {
                fail(format("process %d did not end", number));
                kill(pids[number], SIGKILL);
                kill(pids[number], SIGCONT);
                waitpid(pids[number], &s, 0);
            }
            status[number] = WIFEXITED(s) ? WEXITSTATUS(s) : -WTERMSIG(s);
        };
        begun = now();
        for (auto& [number, pid] : pids)
            if (number != stopped) reap(number, begun + most + SLACK);
        took = now() - begun;
        if (stopped >= 0) {
            kill(pids[stopped], SIGCONT);
            reap(stopped, now() + 1 + SLACK);
        }
        FILE* f = fopen(path, "r");
        char line[4096];
        while (fgets(line, sizeof(line), f)) lines.push_back(line);
        fclose(f);
    }
    // All ended with status 1, but `killed`, and there is one line, with all of `words`.
    void expect_line(const std::vector<std::string>& words, int killed = -1) {
        for (auto& [number, s] : status)
            if (s != (number == killed ? -SIGKILL : 1)) fail(format("process %d ended with %d", number, s));
        std::string all;
        for (auto& l : lines) all += l;
        if (lines.size() != 1) return fail(format("%zu lines: ", lines.size()) + all);
        if (lines[0].rfind("train_gpt: ", 0) || lines[0].back() != '\n') fail("line: " + all);
        for (auto& w : words)
            if (all.find(w) == std::string::npos) fail("no '" + w + "' in: " + all);
        if (getenv("SHOW")) printf("    %s", all.c_str());
    }
    void expect_clean() {
        for (auto& [number, s] : status)
            if (s) fail(format("process %d ended with %d, ", number, s) + (lines.empty() ? "" : lines[0]));
        if (!lines.empty()) fail("stderr: " + lines[0]);
    }
    std::string who(int rank, int number = -1) {
        char host[64] = "";
        gethostname(host, sizeof(host));
        return format("rank %d (%s, pid %d)", rank, host, pids[number < 0 ? rank : number]);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Environment

typedef std::map<std::string, std::string> Env;
const char* const VARIABLES[] = {"RANK",
                                 "WORLD_SIZE",
                                 "LOCAL_RANK",
                                 "OMPI_COMM_WORLD_RANK",
                                 "OMPI_COMM_WORLD_SIZE",
                                 "OMPI_COMM_WORLD_LOCAL_RANK",
                                 "PMI_RANK",
                                 "PMI_SIZE",
                                 "MPI_LOCALRANKID",
                                 "SLURM_PROCID",
                                 "SLURM_STEP_NUM_TASKS",
                                 "SLURM_LOCALID",
                                 "SLURM_NTASKS",
                                 "MASTER_ADDR",
                                 "MASTER_PORT",
                                 "TORCHELASTIC_USE_AGENT_STORE",
                                 "SLURM_STEP_NODELIST",
                                 "SLURM_STEP_NUM_NODES",
                                 "SLURM_STEP_ID",
                                 "SLURM_JOB_NODELIST",
                                 "SLURM_JOB_ID"};
void set(const Env& env) {
    for (const char* v : VARIABLES) unsetenv(v);
    for (auto& [name, value] : env) setenv(name.c_str(), value.c_str(), 1);
}
std::string world(const Env& env) {
    set(env);
    try {
        World w = find_world();
        return format("%d/%d/%d %s", w.rank, w.size, w.local, w.launcher);
    } catch (const Error& e) {
        return std::string("! ") + e.what();
    }
}
std::string meeting(const Env& env) {
    set(env);
    try {
        return default_address();
    } catch (const Error& e) {
        return std::string("! ") + e.what();
    }
}

TEST(find_world) {
    EXPECT(world({}) == "0/1/0 ");
    EXPECT(world({{"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}}) == "5/8/1 torchrun");
    EXPECT(world({{"RANK", "5"}, {"WORLD_SIZE", "8"}}) == "5/8/-1 torchrun");
    EXPECT(world({{"RANK", "0"}, {"WORLD_SIZE", "1"}}) == "0/1/0 torchrun");
    EXPECT(world({{"RANK", "5"}}) == "! RANK=5: is set, WORLD_SIZE is not. Set both, or unset it to run alone.");
    EXPECT(world({{"RANK", "0"}, {"LOCAL_RANK", "0"}}).rfind("! RANK=0: is set, WORLD_SIZE is not.", 0) == 0);
    EXPECT(world({{"WORLD_SIZE", "2"}}).rfind("! WORLD_SIZE=2: is set, RANK is not.", 0) == 0);
    EXPECT(world({{"WORLD_SIZE", "1"}}) == "0/1/0 ");
    Env ompi = {{"OMPI_COMM_WORLD_RANK", "2"}, {"OMPI_COMM_WORLD_SIZE", "3"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "0"}};
    EXPECT(world(ompi) == "2/3/0 Open MPI");
    ompi["RANK"] = "7";  // incomplete
    EXPECT(world(ompi) == "2/3/0 Open MPI");
    ompi["WORLD_SIZE"] = "8";
    EXPECT(world(ompi) == "2/3/0 Open MPI");
    EXPECT(world({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}}) == "1/2/1 MPICH");
    EXPECT(world({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}) == "1/2/-1 MPICH");
    EXPECT(world({{"PMI_RANK", "1"}}).rfind("! PMI_RANK=1: is set, PMI_SIZE is not.", 0) == 0);
    Env slurm = {{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_LOCALID", "0"}};  // a batch script
    EXPECT(world(slurm) == "0/1/0 ");
    slurm["SLURM_STEP_NUM_TASKS"] = "4", slurm["SLURM_PROCID"] = "3", slurm["SLURM_LOCALID"] = "2";
    EXPECT(world(slurm) == "3/4/2 Slurm");
    slurm["PMI_RANK"] = "3", slurm["PMI_SIZE"] = "4";  // srun --mpi=pmi2
    EXPECT(world(slurm) == "3/4/2 Slurm");
    for (auto& [rank, size] : std::map<std::string, std::string>{
             {"4", "4"}, {"-1", "4"}, {"x", "4"}, {"", "4"}, {"1x", "4"}, {" 1", "4"}, {"99999999999999999999", "4"}})
        EXPECT(world({{"RANK", rank}, {"WORLD_SIZE", size}, {"LOCAL_RANK", "0"}}).rfind("! RANK=" + rank + ": ", 0) ==
               0);
    for (const char* size : {"0", "-2", "four", ""})
        EXPECT(world({{"RANK", "0"}, {"WORLD_SIZE", size}, {"LOCAL_RANK", "0"}})
                   .rfind(format("! WORLD_SIZE=%s: ", size), 0) == 0);
    EXPECT(world({{"RANK", "1"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "-1"}}).rfind("! LOCAL_RANK=-1: ", 0) == 0);
    set({});
}

TEST(default_address) {
    EXPECT(meeting({{"MASTER_ADDR", "h"}}) == "h:29500");
    EXPECT(meeting({{"MASTER_ADDR", "h"}, {"MASTER_PORT", "1234"}}) == "h:1234");
    EXPECT(meeting({{"MASTER_ADDR", "h"}, {"MASTER_PORT", "1234"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}) ==
           "h:1235");
    EXPECT(meeting({{"MASTER_ADDR", "h"}, {"MASTER_PORT", "1234"}, {"TORCHELASTIC_USE_AGENT_STORE", "False"}}) ==
           "h:1234");
    EXPECT(meeting({{"MASTER_ADDR", "h"}, {"MASTER_PORT", "p"}}).rfind("! MASTER_PORT=p: ", 0) == 0);
    EXPECT(meeting({{"SLURM_STEP_NODELIST", "node[003-010,012],gpu7"}, {"SLURM_JOB_ID", "5"}}) == "node003:20005");
    Env step = {{"SLURM_STEP_NODELIST", "a[1-2]"}, {"SLURM_STEP_NUM_NODES", "2"}, {"SLURM_JOB_ID", "5"}};
    step["SLURM_STEP_ID"] = "0";
    EXPECT(meeting(step) == "a1:20005");
    step["SLURM_STEP_ID"] = "1";  // beside the other
    EXPECT(meeting(step) == "a1:20504");
    step["SLURM_STEP_NUM_NODES"] = "1";
    EXPECT(meeting(step) == "127.0.0.1:20504");
    EXPECT(meeting({{"SLURM_JOB_NODELIST", "gpu7,node1"}, {"SLURM_JOB_ID", "12769"}}) == "gpu7:20001");
    EXPECT(meeting({{"SLURM_JOB_NODELIST", "r[1-2]n[07,9]x,a"}, {"SLURM_JOB_ID", "5"}}) == "r1n07x:20005");
    EXPECT(meeting({{"SLURM_JOB_NODELIST", "n[4]"}, {"SLURM_JOB_ID", "5"}, {"MASTER_PORT", "77"}}) == "n4:77");
    EXPECT(meeting({}).rfind("! rendezvous: no address", 0) == 0);
    set({});
}

// ---------------------------------------------------------------------------------------------------------------------
// Rendezvous

void meet(int n, double apart) {
    Job job;
    job.start(n, [&](const World& w) {
        nap(apart * w.rank);
        job.open(w);
        job.steps(w, 20);
        channel.close();
    });
    job.wait(3);
    job.expect_clean();
    EXPECT(shared->opened == n);
}
TEST(two_meet) { meet(2, 0); }
TEST(four_meet) { meet(4, 0); }
TEST(four_meet_late) { meet(4, 0.2); }
TEST(rank_0_is_late) {
    Job job;
    job.start(3, [&](const World& w) {
        if (w.rank == 0) nap(1);
        job.open(w);
        channel.close();
    });
    job.wait(3);
    job.expect_clean();
    EXPECT(shared->opened == 3);
}
TEST(local_ranks) {  // counted among the lower ranks of a host by those whose launcher did not say theirs
    Job job;
    job.start(5, [&](const World& w) {
        const std::string host = w.rank % 2 ? "odd" : "even";
        if (unshare(CLONE_NEWUTS) || sethostname(host.c_str(), host.size())) _exit(77);  // not root
        if (w.rank != 3) unsetenv("LOCAL_RANK");
        job.open(find_world());
        if (channel.local() != (w.rank == 3 ? 3 : w.rank / 2)) throw Error(format("local rank %d", channel.local()));
        channel.close();
    });
    job.wait(3);
    if (job.status[0] == 77) return (void)puts("local_ranks: left out, needs root");
    job.expect_clean();
    EXPECT(shared->opened == 5);
}
TEST(one_rank_alone) {
    Job job;
    job.start(0, 0, 1, [&](const World& w) {
        std::string id = "id";
        channel.open(w, "", 1, nullptr, id);
        channel.progress("forward", 1);
        channel.send_report("alone");
        auto got = channel.take_reports(1);
        if (id != "id" || got.size() != 1 || got[0].second != "alone" || got[0].first) throw Error("no report");
        channel.close();
        throw Error("over");
    });
    job.wait(1);
    job.expect_line({"train_gpt: over\n"});
}

TEST(ranks_never_come) {
    Job job;
    job.limit = 1;
    for (int r : {0, 1}) job.start(r, r, 4, [&](const World& w) { job.open(w); });
    job.wait(1.5);
    job.expect_line({"train_gpt: rendezvous: ranks 2, 3 of 4 did not come to 127.0.0.1:", " within 1 s."});
    EXPECT(job.took > 0.9);
}
TEST(many_ranks_never_come) {
    Job job;
    job.limit = 1;
    job.start(0, 0, 64, [&](const World& w) { job.open(w); });
    job.wait(1.5);
    job.expect_line({"rendezvous: ranks 1, 2, 3, 4 and 59 more of 64 did not come to "});
}
TEST(wrong_world_size) {
    Job job;
    job.limit = 3;
    for (int r : {0, 1, 3}) job.start(r, r, 4, [&](const World& w) { nap(0.1 * w.rank), job.open(w); });
    job.start(2, 2, 3, [&](const World& w) { job.open(w); });
    job.wait(2);
    job.expect_line({"train_gpt: rendezvous: " + job.who(2) +
                     " was started in a world of 3, rank 0 in one of 4. Start all ranks with one command.\n"});
}
TEST(duplicate_rank) {
    Job job;
    job.limit = 3;
    for (int r : {0, 1}) job.start(r, r, 3, [&](const World& w) { job.open(w); });
    job.start(9, 1, 3, [&](const World& w) { nap(0.3), job.open(w); });
    job.wait(2);
    job.expect_line({"train_gpt: rendezvous: " + job.who(1, 9) + " was started twice, " + job.who(1) + " is here. "});
}
TEST(dies_in_rendezvous) {
    Job job;
    job.limit = 5;
    for (int r : {0, 1, 2}) job.start(r, r, 4, [&](const World& w) { job.open(w); });
    nap(0.4);
    kill(job.pids[2], SIGKILL);
    job.wait(1.5);
    job.expect_line({"rendezvous: " + job.who(2) + " died: "}, 2);
}
TEST(strangers) {  // garbage, silence, a hasty one, a frame that promises too much, a hello of nonsense
    Job job;
    const int port = atoi(job.address.c_str() + 10);
    for (int r : {0, 1}) job.start(r, r, 3, [&](const World& w) { job.open(w), job.steps(w, 10), channel.close(); });
    sockaddr_in a = {};
    a.sin_family = AF_INET, a.sin_port = htons(port), a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    std::vector<int> fds;
    std::string nothing("\0\0\0\0\0\0\0\0", 8), big("\1\160\147\123\377\377\377\377", 8),
        hello("\2\160\147\123\3\0\0\0abc", 11);
    for (const std::string& words : {std::string("GET / HTTP/1.1\r\n\r\n"), std::string(), std::string("x"), nothing,
                                     std::string(100000, 'z'), big, hello}) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        for (int i = 0; i < 400 && connect(fd, (sockaddr*)&a, sizeof(a)); i++) nap(0.005);
        (void)!send(fd, words.data(), words.size(), MSG_NOSIGNAL);
        if (words == "x")
            ::close(fd);
        else
            fds.push_back(fd);
    }
    nap(0.2);
    char c[16];
    EXPECT(recv(fds[0], c, 8, 0) == 8 || errno == ECONNRESET);             // the greeting,
    EXPECT(recv(fds[0], c, 8, MSG_DONTWAIT) == 0 || errno == ECONNRESET);  // and the door
    job.start(2, 2, 3, [&](const World& w) { job.open(w), job.steps(w, 10), channel.close(); });
    job.wait(3);
    job.expect_clean();
    for (int fd : fds) ::close(fd);
}
TEST(no_more_files) {  // rank 0 has room for its listener alone; rank 1, which it does not hear, gives up later
    Job job;
    job.start(2, [&](const World& w) {
        const int next = dup(0);
        ::close(next);
        const rlimit few = {rlim_t(next) + 1, rlim_t(next) + 1};
        if (w.rank == 0) setrlimit(RLIMIT_NOFILE, &few), job.limit = 100;
        job.open(w);
    });
    job.wait(2.5);
    EXPECT(job.status[0] == 1 && job.status[1] == 1);
    EXPECT(job.lines.size() == 2 && job.lines[0].find("no more connections: Too many open files.") < 100);
}
TEST(port_in_use) {
    Job job;
    const int port = atoi(job.address.c_str() + 10), fd = listener(port);
    job.start(0, 0, 2, [&](const World& w) { job.open(w); });
    job.wait(0.5);
    job.expect_line({format("rendezvous: rank 0 cannot listen at port %d: Address already in use.", port)});
    ::close(fd);
}
TEST(nobody_there) {
    Job job;
    job.limit = 1;
    job.start(1, 1, 2, [&](const World& w) { job.open(w); });
    job.wait(1.5);
    job.expect_line(
        {"train_gpt: rendezvous: rank 0 does not answer at 127.0.0.1:", " within 1 s (Connection refused). "});
}
TEST(somebody_silent_there) {  // takes the connection and says nothing
    Job job;
    job.limit = 1;
    const int fd = listener(atoi(job.address.c_str() + 10));
    job.start(1, 1, 2, [&](const World& w) { job.open(w); });
    job.wait(1.5);
    job.expect_line({"rendezvous: rank 0 does not answer at 127.0.0.1:"});
    ::close(fd);
}
TEST(unknown_host) {
    Job job;
    job.limit = 1;
    job.address = "no-such-host.invalid:29500";
    job.start(1, 1, 2, [&](const World& w) { job.open(w); });
    job.wait(2);
    job.expect_line(
        {"rendezvous: rank 0 does not answer at no-such-host.invalid:29500 within 1 s (no-such-host.invalid: "});
}
TEST(bad_address) {
    for (const char* address : {"localhost", "localhost:", "localhost:x", "localhost:0", "localhost:70000", ":29500"}) {
        Job job;
        job.address = address;
        job.start(1, 1, 2, [&](const World& w) { job.open(w); });
        job.wait(0.5);
        job.expect_line({format("rendezvous: %s: is not HOST:PORT. ", address)});
    }
}
TEST(address_from_environment) {
    Job job;
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", job.address.c_str() + 10, 1);
    job.address = "";
    job.start(2, [&](const World& w) { job.open(w), channel.close(); });
    set({});
    job.wait(2);
    job.expect_clean();
}
TEST(ipv6) {
    Job job;
    job.address = "[::1]:" + job.address.substr(10);
    job.start(2, [&](const World& w) { job.open(w), channel.close(); });
    job.wait(2);
    job.expect_clean();
}

// A collective broadcast by shared memory.
struct Broadcast {
    int turn = 0;
    int rank;
    void operator()(void* data, size_t bytes) {
        if (rank == 0) {
            memcpy(shared->bytes[turn], data, bytes);
            shared->sent[turn] = bytes;
            shared->ready = turn + 1;
        }
        while (shared->ready <= turn) nap(0.001);
        if (shared->sent[turn] != bytes) throw Error("the broadcasts do not fit");
        if (rank) memcpy(data, shared->bytes[turn], bytes);
        turn++;
    }
};
void open_by_broadcast(const World& w, double limit) {
    std::string id = w.rank == 0 ? "the id" : "";
    Broadcast b;
    b.rank = w.rank;
    channel.open(
        w, "", limit, [&](void* data, size_t bytes) { b(data, bytes); }, id);
    if (id != "the id") throw Error("the id did not arrive");
}
TEST(broadcast) {
    Job job;
    job.start(4, [&](const World& w) {
        nap(0.1 * w.rank);
        open_by_broadcast(w, 2);
        job.steps(w, 10);
        channel.close();
    });
    job.wait(3);
    job.expect_clean();
}
TEST(broadcast_cookie) {  // one without the cookie is a stranger, even with a good hello
    Job job;
    job.limit = 1;
    job.start(0, 0, 2, [&](const World& w) { open_by_broadcast(w, 1); });
    while (shared->ready < 2) nap(0.002);
    job.start(1, 1, 2, [&](const World& w) {
        job.address = format("127.0.0.1:%d", atoi(shared->bytes[1]));
        dup2(open("/dev/null", O_WRONLY), 2);
        job.open(w);
    });
    job.wait(2.5);
    job.expect_line({"rendezvous: rank 1 of 2 did not come to "});
}

// ---------------------------------------------------------------------------------------------------------------------
// Watching

void killed(int n, int k) {
    Job job;
    job.start(n, [&](const World& w) { job.open(w), job.steps(w); });
    if (job.all_open(n)) nap(0.5);
    kill(job.pids[k], SIGKILL);
    job.wait(k ? 0.5 : 1.5);
    job.expect_line({"train_gpt: " + job.who(k) + " died at step ", ": its connection closed. See "}, k);
}
TEST(kill_rank_1_of_2) { killed(2, 1); }
TEST(kill_rank_2_of_4) { killed(4, 2); }
TEST(kill_rank_0_of_2) { killed(2, 0); }
TEST(kill_rank_0_of_4) { killed(4, 0); }

void stopped(int n, int k) {
    Job job;
    job.start(n, [&](const World& w) { job.open(w), job.steps(w); });
    if (job.all_open(n)) nap(0.5);
    kill(job.pids[k], SIGSTOP);
    job.wait(job.limit + 1.2, k);
    job.expect_line({"train_gpt: " + job.who(k) + " has not been heard of for 2 s, last at step "});
    EXPECT(job.took > job.limit - 0.5);
}
TEST(stop_rank_1_of_2) { stopped(2, 1); }
TEST(stop_rank_2_of_4) { stopped(4, 2); }
TEST(stop_rank_0_of_2) { stopped(2, 0); }
TEST(stop_rank_0_of_4) { stopped(4, 0); }

TEST(host_of_rank_0_goes_down) {  // with rank 1 on it: the first rank elsewhere says it
    Job job;
    job.start(4, [&](const World& w) {
        const std::string host = w.rank < 2 ? "left" : "right";
        if (unshare(CLONE_NEWUTS) || sethostname(host.c_str(), host.size())) _exit(77);  // not root
        job.open(w), job.steps(w);
    });
    nap(0.7);
    int stopped = 0;
    kill(job.pids[1], SIGSTOP);  // both must be silent at once: its threads stop some time after the call
    waitpid(job.pids[1], &stopped, WUNTRACED);
    kill(job.pids[0], SIGKILL), kill(job.pids[1], SIGKILL);
    job.wait(1.5);
    if (job.status[2] == 77) return (void)puts("host_of_rank_0_goes_down: left out, needs root");
    EXPECT(WIFSTOPPED(stopped));
    EXPECT(job.status[0] == -SIGKILL && job.status[1] == -SIGKILL);
    job.status.erase(0), job.status.erase(1);
    job.expect_line({format("train_gpt: rank 0 (left, pid %d) died at step ", job.pids[0])});
}
TEST(stop_all_for_a_while) {  // a suspended job goes on
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) { job.open(w), job.steps(w, 200), channel.close(); });
    if (job.all_open(3)) nap(0.3);
    for (auto& p : job.pids) kill(p.second, SIGSTOP);
    nap(2);
    for (auto& p : job.pids) kill(p.second, SIGCONT);
    job.wait(8);
    job.expect_clean();
}

void hangs(int n, int k) {
    Job job;
    job.limit = 1.5;
    job.start(n, [&](const World& w) {
        job.open(w);
        job.steps(w, 16);
        if (w.rank == k)
            channel.progress("data", 17);
        else
            job.step(w, 17);
        nap(100);
    });
    job.all_open(n);
    job.wait(job.limit + 1.5);
    job.expect_line(
        {"train_gpt: " + job.who(k) + " hangs at step 17 (data) for 1.5 s, the others are at step 17 (reduce). "});
    EXPECT(job.took > job.limit - 0.1);
}
TEST(hang_of_rank_1_of_2) { hangs(2, 1); }
TEST(hang_of_rank_2_of_4) { hangs(4, 2); }
TEST(hang_of_rank_0_of_4) { hangs(4, 0); }
TEST(hang_of_two) {
    Job job;
    job.limit = 1;
    job.start(4, [&](const World& w) { job.open(w), channel.progress("forward", w.rank % 2 ? 6 : 7), nap(100); });
    job.wait(2.5);
    job.expect_line({"train_gpt: ranks 1, 3 hang at step 6 (forward) for 1 s, the others are at step 7 (forward). "});
}
TEST(hang_of_all) {
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) {
        job.open(w);
        job.steps(w, 5);
        for (int i = 0; i < 5 * (w.rank == 0); i++) channel.progress("reduce", 5);  // these do not bring it ahead
        nap(100);
    });
    job.wait(3);
    job.expect_line({"train_gpt: no rank has moved at step 5 (reduce) for 1 s: "});
}
TEST(hang_before_a_collective) {  // at the same place as the others, which wait for it in a collective
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) {
        job.open(w);
        channel.progress("computing", 5);
        collectives = w.rank == 2 ? 47 : 48;
        nap(100);
    });
    job.wait(3);
    job.expect_line({"train_gpt: " + job.who(2) +
                     " hangs at step 5 (computing, collective 47) for 1 s, the others are at "
                     "step 5 (computing, collective 48). "});
}
TEST(hang_in_long_work) {  // its many words for one place do not bring it ahead
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) {
        job.open(w);
        for (int i = 0; i < (w.rank ? 1 : 9); i++) channel.progress("checkpoint", 5);
        if (w.rank) channel.progress("reduce", 5);
        nap(100);
    });
    job.wait(3);
    job.expect_line(
        {"train_gpt: " + job.who(0) + " hangs at step 5 (checkpoint) for 1 s, the others are at step 5 (reduce). "});
}
TEST(goodbye_is_a_move) {
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) { job.open(w), nap(w.rank == 2 ? 1.5 : 0.75), channel.close(); });
    job.wait(3);
    job.expect_clean();
}
TEST(one_never_says_goodbye) {
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) {
        job.open(w);
        job.steps(w, 5);
        if (w.rank != 2) channel.close();
        nap(100);
    });
    job.wait(3);
    job.expect_line({"train_gpt: " + job.who(2) + " hangs at step 5 (reduce) for 1 s, the others are at the end. "});
}
TEST(long_work_of_one_rank) {  // the others wait in a collective three times the limit
    Job job;
    job.limit = 1;
    job.start(3, [&](const World& w) {
        job.open(w);
        for (int i = 0; i < 30 && w.rank == 1; i++) channel.progress("checkpoint", 1), nap(0.1);
        job.step(w, 2);
        channel.close();
    });
    job.wait(5);
    job.expect_clean();
    EXPECT(job.took > 2.5);
}

// ---------------------------------------------------------------------------------------------------------------------
// Failing

void one_fails(int n, int k) {
    Job job;
    job.start(n, [&](const World& w) {
        job.open(w);
        job.steps(w, 10);
        if (w.rank == k) throw Error("data/x.bin: was cut\nshort.");
        job.steps(w);
    });
    job.all_open(n);
    job.wait(1.5);
    job.expect_line({std::string("train_gpt: ") + (k ? format("rank %d: ", k) : "") + "data/x.bin: was cut short.\n"});
}
TEST(rank_0_fails) { one_fails(4, 0); }
TEST(rank_3_fails) { one_fails(4, 3); }
TEST(rank_1_of_2_fails) { one_fails(2, 1); }

void all_fail(double apart) {  // rank 0 last
    Job job;
    job.start(4, [&](const World& w) {
        job.open(w);
        job.step(w, 1);
        nap(apart * (3 - w.rank));
        channel.fail("data/x.bin: was cut short.");
    });
    job.all_open(4);
    job.wait(1.5);
    job.expect_line({"train_gpt: data/x.bin: was cut short.\n"});
}
TEST(all_fail) {
    for (int i = 0; i < 5; i++) all_fail(0);
}
TEST(all_fail_apart) { all_fail(0.03); }
TEST(all_but_0_fail) {
    Job job;
    job.start(4, [&](const World& w) {
        job.open(w);
        job.step(w, 1);
        if (w.rank) channel.fail("disk full.");
        nap(100);
    });
    job.all_open(4);
    job.wait(1.5);
    job.expect_line({": disk full.\n", "train_gpt: rank "});
}
TEST(two_threads_fail) {
    Job job;
    job.start(2, [&](const World& w) {
        job.open(w);
        std::thread one([] { channel.fail("disk full."); });
        channel.fail("disk full.");
    });
    job.all_open(2);
    job.wait(1.5);
    job.expect_line({"train_gpt: disk full.\n"});
}
TEST(death_beats_its_echo) {  // the others' NCCL reports a lost peer before rank 0 knows of the death
    Job job;
    job.start(4, [&](const World& w) {
        job.open(w);
        job.step(w, 1);
        if (w.rank == 2) nap(0.05), kill(getpid(), SIGKILL);
        channel.fail("NCCL: remote process exited.");
    });
    job.all_open(4);
    job.wait(1.5);
    job.expect_line({"train_gpt: " + job.who(2) + " died at step "}, 2);
}
TEST(fails_then_is_killed) {  // its word counts, not its end
    Job job;
    job.start(3, [&](const World& w) {
        job.open(w);
        job.step(w, 1);
        if (w.rank == 1) {
            std::thread([] { nap(0.1), kill(getpid(), SIGKILL); }).detach();
            channel.fail("disk full.");
        }
        nap(100);
    });
    job.all_open(3);
    job.wait(1.5);
    job.expect_line({"train_gpt: rank 1: disk full.\n"}, 1);
}
TEST(fails_while_rank_0_is_stopped) {
    Job job;
    job.limit = 20;
    job.start(2, [&](const World& w) {
        job.open(w);
        while (!shared->count) nap(0.01);
        if (w.rank) channel.fail("disk full.");
        nap(100);
    });
    job.all_open(2);
    kill(job.pids[0], SIGSTOP);
    shared->count = 1;
    job.wait(4.2, 0);
    job.expect_line({"train_gpt: rank 1: disk full.\n"});
}
void no_thread(int k) {  // a limit of processes, which holds all but root
    Job job;
    job.start(2, [&](const World& w) {
        const rlimit one = {1, 1};
        if (w.rank == k && (getuid() || setuid(65534) == 0)) setrlimit(RLIMIT_NPROC, &one);
        job.open(w);
        nap(100);
    });
    job.wait(job.limit);
    job.expect_line({"train_gpt: Resource temporarily unavailable\n"});
}
TEST(no_thread) {
    for (int k : {0, 1}) no_thread(k);
}
TEST(hook) {
    Job job;
    job.start(3, [&](const World& w) {
        job.open(w);
        if (w.rank == 1)
            channel.set_check([] { return std::string(++shared->count > 3 ? "NCCL: unhandled system error" : ""); });
        nap(100);
    });
    job.all_open(3);
    job.wait(2);
    job.expect_line({"train_gpt: rank 1: NCCL: unhandled system error\n"});
}
TEST(leaves_without_goodbye) {  // an Error that nobody told the channel of, or exit() somewhere
    Job job;
    job.start(3, [&](const World& w) {
        job.open(w);
        job.step(w, 1);
        if (w.rank == 2) exit(1);
        nap(100);
    });
    job.all_open(3);
    job.wait(1.5);
    job.expect_line({"train_gpt: " + job.who(2) + " died at step ", ": its connection closed."});
}

// ---------------------------------------------------------------------------------------------------------------------
// Reports and the end

TEST(reports) {
    Job job;
    job.start(4, [&](const World& w) {
        job.open(w);
        for (int i = 0; i < 20; i++) channel.send_report(format("%d:%d", w.rank, i) + std::string(i * 3000, '.'));
        int next[4] = {}, all = 0;
        if (w.rank == 0) {
            while (all < 80)
                for (auto& [from, text] : channel.take_reports(5)) {
                    if (text != format("%d:%d", from, next[from]) + std::string(next[from] * 3000, '.'))
                        throw Error("wrong report");
                    next[from]++, all++;
                }
            const double t = now();
            if (!channel.take_reports(0.2).empty() || now() - t < 0.19) throw Error("one too many");
            if (!channel.take_reports(0).empty() || now() - t > 1) throw Error("waited");
        }
        if (w.rank == 3) nap(1), channel.send_report("last words");
        channel.close();
        if (w.rank == 0) {
            auto rest = channel.take_reports(0);
            if (rest.size() != 1 || rest[0].first != 3 || rest[0].second != "last words") throw Error("no last words");
        }
    });
    job.all_open(4);
    job.wait(4);
    job.expect_clean();
}
TEST(large_report) {
    Job job;
    job.start(2, [&](const World& w) {
        job.open(w);
        if (w.rank)
            channel.send_report(std::string(1 << 20, 'r'));
        else if (channel.take_reports(5).at(0).second != std::string(1 << 20, 'r'))
            throw Error("wrong");
        channel.close();
        if (w.rank) {
            try {
                channel.send_report(std::string((1 << 20) + 1, 'r'));
            } catch (const Error&) {
                return;
            }
            throw Error("took it");
        }
    });
    job.all_open(2);
    job.wait(3);
    job.expect_clean();
}
void ends_apart(int late) {
    Job job;
    job.start(4, [&](const World& w) {
        job.open(w);
        for (int i = 0; i < 15 && w.rank == late; i++) channel.progress("export", i), nap(0.1);
        channel.close();
        shared->times[w.rank] = now();
    });
    job.all_open(4);
    const double t = now();
    job.wait(4);
    job.expect_clean();
    for (int r = 0; r < 4; r++) EXPECT(shared->times[r] > t + 1.4);
    EXPECT(job.took < 1.9 + SLACK / 2);
}
TEST(rank_2_ends_late) { ends_apart(2); }
TEST(rank_0_ends_late) { ends_apart(0); }
TEST(dies_while_others_end) {
    Job job;
    job.start(3, [&](const World& w) {
        job.open(w);
        if (w.rank != 1) channel.close();
        nap(0.5);
        kill(getpid(), SIGKILL);
    });
    job.all_open(3);
    job.wait(2);
    job.expect_line({"train_gpt: " + job.who(1) + " died at step 0 (starting): "}, 1);
}

int main(int argc, char** argv) {
    int passed = 0, failed = 0;
    setvbuf(stdout, nullptr, _IONBF, 0);
    set({});
    for (const Test& t : tests()) {
        if (argc > 1 && !strstr(t.name, argv[1])) continue;
        why.clear();
        const double begun = now();
        t.body();
        why.empty() ? passed++ : failed++;
        if (!why.empty() || getenv("SHOW"))
            printf("%s %s (%.1f s)%s%s\n", why.empty() ? "ok  " : "FAIL", t.name, now() - begun,
                   why.empty() ? "" : ": ", why.c_str());
    }
    printf("test_channel: %d passed, %d failed\n", passed, failed);
    return failed > 0;
}
