// Channel: who this process is among the ranks, and connections beside NCCL's by which they meet, watch each other and
// end as one.
#pragma once
#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "error.h"

struct World {
    int rank = 0, size = 1, local = 0;  // local: among the ranks of its host; -1: not said, counted when the ranks meet
    const char* launcher = "";
};

// The value of an environment variable as a number; `fallback` if it is not set.
inline int64_t environment_number(const char* name, int64_t fallback, int64_t least, int64_t most, const char* what) {
    const char* text = getenv(name);
    if (!text) return fallback;
    char* stop = nullptr;
    errno = 0;
    const long long n = strtoll(text, &stop, 10);
    if (!isdigit((unsigned char)*text) || *stop || errno || n < least || n > most)
        throw Error(format("%s=%s: is no %s, %lld to %lld. Start with the launcher again, or unset it.", name, text,
                           what, (long long)least, (long long)most));
    return n;
}

// The first launcher whose variables are all there, else the first that says rank and size (Kubeflow's PyTorchJob, old
// MPICH); without one, a world of one rank.
inline World find_world() {
    static const char* const launchers[][4] = {
        {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"},
        {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
        {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
        {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"}};  // STEP: srun's, not the batch script's
    World w;
    for (const bool whole : {true, false})
        for (auto& [launcher, rank, size, local] : launchers) {
            if (!getenv(rank) || !getenv(size) || (whole && !getenv(local))) continue;
            w.size = int(environment_number(size, 1, 1, 1 << 20, "number of ranks"));
            w.rank = int(environment_number(rank, 0, 0, w.size - 1, "rank of this world"));
            w.local = int(environment_number(local, w.size > 1 ? -1 : 0, 0, w.size - 1, "local rank of this world"));
            w.launcher = launcher;
            return w;
        }
    for (auto& [launcher, rank, size, local] : launchers) {  // half of what is needed, where it is not a batch script's
        const char *r = getenv(rank), *n = getenv(size);
        if (n ? strcmp(n, "1") != 0 : r && strcmp(launcher, "Slurm") != 0)
            throw Error(format("%s=%s: is set, %s is not. Set both, or unset it to run alone.", n ? size : rank,
                               n ? n : r, n ? rank : size));
    }
    return w;
}

// HOST:PORT at which ranks meet if nobody gives an address and there is no MPI.
inline std::string default_address() {
    auto port = [](int64_t otherwise) { return environment_number("MASTER_PORT", otherwise, 1, 65534, "port"); };
    const char *host = getenv("MASTER_ADDR"), *nodes = getenv("SLURM_STEP_NODELIST");
    if (host && *host) {
        const char* agent = getenv("TORCHELASTIC_USE_AGENT_STORE");  // torchrun itself listens at MASTER_PORT then
        return format("%s:%lld", host, (long long)port(29500) + (agent && !strcmp(agent, "True")));
    }
    if (!nodes) nodes = getenv("SLURM_JOB_NODELIST");
    if (!nodes || !getenv("SLURM_JOB_ID"))
        throw Error(
            "rendezvous: no address. Set MASTER_ADDR and MASTER_PORT, or give the HOST:PORT of the rendezvous.");
    std::string first;  // node[003-010,012],gpu7: node003
    if (environment_number("SLURM_STEP_NUM_NODES", 0, 0, INT_MAX, "number of nodes") == 1)
        nodes = "127.0.0.1";  // a node's name need not be its host's
    for (const char* p = nodes; *p && *p != ','; p++) {
        if (*p != '[') {
            first += *p;
            continue;
        }
        while (*++p && !strchr("-,]", *p)) first += *p;
        while (*p && *p != ']') p++;
        if (!*p) break;
    }
    // below 32768, where the kernel begins to give ports to outgoing connections; steps of one job can run side by side
    const int64_t job = environment_number("SLURM_JOB_ID", 0, 0, INT64_MAX, "number of a job") % 12768;
    const int64_t step = environment_number("SLURM_STEP_ID", 0, 0, UINT_MAX, "number of a step") % 12768;
    return format("%s:%lld", first.c_str(), (long long)port(20000 + (job + 499 * step) % 12768));
}

inline std::pair<std::string, int> host_and_port(const std::string& where) {
    const size_t colon = where.rfind(':');
    int port = 0, end = 0;
    if (colon == std::string::npos || !isdigit((unsigned char)where[colon + 1]) || where.size() - colon > 6 ||
        sscanf(&where[colon + 1], "%d%n", &port, &end) != 1 || where[colon + 1 + end] || port < 1 || port > 65535 ||
        colon == 0)
        throw Error("rendezvous: " + where + ": is not HOST:PORT. Give rank 0's host and a free port there.");
    const bool bracketed = where[0] == '[' && where[colon - 1] == ']';  // IPv6
    return {bracketed ? where.substr(1, colon - 2) : where.substr(0, colon), port};
}

// TCP connections of all ranks to rank 0. They carry the rendezvous and its payload (the NCCL id), heartbeats, errors,
// short reports and the goodbye. One thread a process owns the sockets; other threads leave it notes under `mutex`.
// Whatever ends the job, one process says why in one line on stderr, and all end with status 1:
//   a rank k > 0 that fails tells rank 0 and waits for its "stop"; rank 0 collects reasons for a moment, says the best
//   one and stops everyone; without rank 0, its speakers (rank 1; the first rank on another host, since hosts go down
//   whole) say that.
// An Error out of open() goes to fail() like any other: rank 0 still holds connections of ranks that wait for its word.
struct Channel {
    void open(const World& world, const std::string& address, double timeout_s,
              const std::function<void(void*, size_t)>& broadcast, std::string& id) {
        me = world;
        limit = timeout_s;
        beat = std::min(0.5, limit / 10);
        if (me.size == 1) return;
        std::string where = address.empty() && !broadcast ? default_address() : address, cookie = "-";
        std::vector<std::string> hosts;
        int port = 0, listener = -1;
        if (!broadcast) {
            hosts.resize(1);
            std::tie(hosts[0], port) = host_and_port(where);
        }
        if (me.rank == 0) listener = listen_at(port);
        if (broadcast) {
            std::string card = me.rank == 0 ? calling_card(port) : "";
            uint64_t bytes = card.size();
            broadcast(&bytes, sizeof(bytes));
            if (bytes > MOST) throw Error("rendezvous: the broadcast is broken. Start all ranks with one command.");
            card.resize(bytes);
            broadcast(&card[0], bytes);
            std::istringstream in(card);
            in >> port >> cookie;
            for (std::string host; in >> host;) hosts.push_back(host);
            where = format("%s:%d", hosts.empty() ? "?" : hosts[0].c_str(), port);
        }
        me.rank == 0 ? gather(listener, where, cookie, id) : join(hosts, port, where, cookie, id);
        for (Peer& p : peers) p.heard = p.moved = now();
        if (pipe2(wake, O_CLOEXEC | O_NONBLOCK))
            throw Error(format("rendezvous: no pipe: %s. Raise the limit of open files (ulimit -n).", strerror(errno)));
        sigset_t all, before;  // signals are for the main thread
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, &before);
        thread = std::thread(&Channel::watch, this);
        running = true;  // from here on the thread ends the process
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    // This rank moved. The same words again tell of movement, not of a new place: long work of one rank alone may call
    // this as often as it likes. Otherwise all ranks make the same calls.
    void progress(const char* doing, int64_t step) {
        std::lock_guard<std::mutex> lock(place_mutex);
        const long long stage = step != place.step ? 0 : place.stage + (doing != place.doing);
        place = {place.moves + 1, 0, step, stage, doing};
    }

    // Asked at every heartbeat: words mean that this rank failed so. Returns when the former hook is no longer running.
    void set_check(std::function<std::string()> hook) {
        std::lock_guard<std::mutex> lock(check_mutex);
        check = std::move(hook);
    }

    void send_report(const std::string& text) {
        if (text.size() > MOST) throw Error("channel: a report of more than 1 MiB. Send less.");
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (me.rank == 0)
                reports.emplace_back(0, text);
            else
                outbox.push_back(text);
        }
        changed.notify_all();
        nudge();
    }

    // Rank 0: the reports that have come and their senders, after at most `seconds` of waiting for one.
    std::vector<std::pair<int, std::string>> take_reports(double seconds) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !reports.empty(); });
        return std::exchange(reports, {});
    }

    [[noreturn]] void fail(const std::string& message) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (!running) end_job(message);
            if (failure.empty()) failure = message.empty() ? "unknown error" : message.substr(0, 1 << 16);
        }
        nudge();
        for (;;) sleep(1000);  // the thread ends the process
    }

    // This rank among those of its host, once they have met.
    int local() const { return me.local; }

    // All ranks come here; none leaves before all have come. A rank that does not come is found by the watch.
    void close() { leave(leaving); }
    ~Channel() { leave(abandoned); }

private:
    enum Kind : uint32_t { GREETING = 1, HELLO, GO, BEAT, FAIL, REPORT, BYE, STOP };
    static constexpr uint32_t MAGIC = 0x53677000, MOST = 1 << 20;  // head of each frame, above its kind; bytes in one
    static constexpr int VERSION = 2;

    struct Place {
        long long moves = 0, calls = 0, step = 0, stage = 0;  // calls of collectives; stage within the step
        std::string doing = "starting";
    };
    struct Peer {
        int fd = -1, rank = -1;
        std::string host, name, in, out, gone;  // gone: why the connection is closed
        double heard = 0, moved = 0;            // when
        Place place;
        bool bye = false, failed = false;
        std::string at() const {
            const std::string call = place.calls ? format(", collective %lld", place.calls) : "";
            return bye ? "the end" : format("step %lld (%s%s)", place.step, place.doing.c_str(), call.c_str());
        }
        void move_to(const Place& to) {
            if (to.moves != place.moves || to.calls != place.calls) moved = now();
            place = to;
        }
        void leave() {  // a goodbye is a move, too
            if (!bye) bye = true, moved = now();
        }
    };

    struct Reason {  // rank 0: why the job ends, when that was first known, which rank said it
        std::string text;
        double time = 0;
        int rank = 0;
        bool death = false;
    };

    World me;
    double limit = 0, beat = 0;
    bool speaks = false;      // says it when rank 0 is lost
    std::vector<Peer> peers;  // on rank 0 by rank, itself included; elsewhere rank 0 alone. The thread's.
    int wake[2] = {-1, -1};
    std::thread thread;
    Reason reason;
    double failed_at = 0;  // the others: when they told rank 0 of a failure
    bool said_bye = false;

    std::mutex mutex;  // of the flags, failure, outbox, reports
    bool running = false, leaving = false, abandoned = false;
    std::string failure;
    std::vector<std::string> outbox;
    std::vector<std::pair<int, std::string>> reports;

    std::condition_variable changed;  // reports came
    std::mutex place_mutex, check_mutex;
    Place place;
    std::function<std::string()> check;

    static std::string list(const std::vector<int>& ranks) {  // "rank 3", "ranks 1, 2, 3, 4 and 59 more"
        std::string s = ranks.size() == 1 ? "rank " : "ranks ";
        for (size_t i = 0; i < ranks.size() && i < 4; i++) s += (i ? ", " : "") + std::to_string(ranks[i]);
        return ranks.size() > 4 ? s + format(" and %zu more", ranks.size() - 4) : s;
    }

    void nudge() {
        if (wake[1] >= 0 && write(wake[1], "", 1) < 0) return;  // full: it will wake anyway
    }

    void leave(bool& how) {
        if (!thread.joinable()) return;
        {
            std::lock_guard<std::mutex> lock(mutex);
            how = true;
        }
        nudge();
        thread.join();
        std::lock_guard<std::mutex> lock(mutex);
        running = false;
        for (Peer& p : peers) drop(p, "closed");
        for (int& fd : wake) ::close(fd), fd = -1;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Frames {kind, length, body} over non-blocking sockets.

    static void drop(Peer& p, const std::string& why) {
        if (p.fd >= 0) ::close(p.fd);
        if (p.gone.empty()) p.gone = why;
        p.fd = -1;
    }

    static void put(Peer& p, Kind kind, const std::string& body = "") {
        const uint32_t head[2] = {MAGIC | kind, uint32_t(body.size())};
        p.out.append(reinterpret_cast<const char*>(head), sizeof(head)).append(body);
    }

    // The next whole frame of p, if there is one. What is no frame ends the connection.
    static bool take(Peer& p, uint32_t& kind, std::string& body) {
        uint32_t head[2];
        if (p.in.size() < sizeof(head)) return false;
        memcpy(head, p.in.data(), sizeof(head));
        if ((head[0] & ~255u) != MAGIC || head[1] > MOST) {
            p.in.clear();
            drop(p, "it sent what is no message");
            return false;
        }
        if (p.in.size() - sizeof(head) < head[1]) return false;
        kind = head[0] & 255;
        body = p.in.substr(sizeof(head), head[1]);
        p.in.erase(0, sizeof(head) + head[1]);
        return true;
    }

    static void flush(Peer& p) {  // a broken connection shows when it is read
        while (p.fd >= 0 && !p.out.empty()) {
            const ssize_t n = send(p.fd, p.out.data(), p.out.size(), MSG_NOSIGNAL);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
            p.out.erase(0, n < 0 ? std::string::npos : size_t(n));
        }
    }

    // Writes and reads what goes without waiting, after at most `seconds` of waiting for it. True: `also` is readable.
    static bool exchange(std::vector<Peer>& who, int also, double seconds) {
        std::vector<pollfd> fds = {{also, POLLIN, 0}};
        for (Peer& p : who) {
            flush(p);
            fds.push_back({p.fd, short(p.out.empty() ? POLLIN : POLLIN | POLLOUT), 0});
        }
        if (poll(fds.data(), fds.size(), int(std::ceil(std::clamp(seconds, 0.0, 60.0) * 1e3))) <= 0) return false;
        static thread_local char buffer[1 << 16];
        for (size_t i = 0; i < who.size(); i++) {
            if (!fds[i + 1].revents) continue;
            flush(who[i]);
            const ssize_t n = recv(who[i].fd, buffer, sizeof(buffer), 0);
            if (n > 0)
                who[i].in.append(buffer, n);
            else if (n == 0)
                drop(who[i], "its connection closed");
            else if (errno != EAGAIN && errno != EINTR)
                drop(who[i], strerror(errno));
        }
        return fds[0].revents != 0;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The rendezvous.

    static int listen_at(int& port) {  // 0: any, and says which
        int fd = -1, on = 1, off = 0, bad = 0;
        sockaddr_in6 any = {};  // as far as it matters here, a sockaddr_in too
        socklen_t size = sizeof(any);
        any.sin6_port = htons(port);
        for (int family : {AF_INET6, AF_INET}) {  // IPv6 takes IPv4 too, where there is IPv6
            fd = socket(any.sin6_family = family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (fd < 0) continue;
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
            if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
            bad = bind(fd, (sockaddr*)&any, family == AF_INET6 ? sizeof(any) : sizeof(sockaddr_in));
            if (!bad || errno == EADDRINUSE || errno == EACCES) break;
            ::close(fd), fd = -1;
        }
        if (fd < 0 || bad || listen(fd, SOMAXCONN)) {
            const int why = errno;
            if (fd >= 0) ::close(fd);
            throw Error(
                format("rendezvous: rank 0 cannot listen at port %d: %s. Choose another by MASTER_PORT or the "
                       "rendezvous's HOST:PORT, or end the job that has it.",
                       port, strerror(why)));
        }
        getsockname(fd, (sockaddr*)&any, &size);
        port = ntohs(any.sin6_port);
        return fd;
    }

    static std::string calling_card(int port) {  // port, cookie, addresses of this host
        std::random_device random;
        std::string card = format("%d ", port);
        for (int i = 0; i < 4; i++) card += format("%08x", random());
        ifaddrs* all = nullptr;
        if (getifaddrs(&all) == 0)
            for (ifaddrs* i = all; i; i = i->ifa_next) {
                const auto* a = (sockaddr_in*)i->ifa_addr;
                if (!a || a->sin_family != AF_INET || (i->ifa_flags & (IFF_UP | IFF_LOOPBACK)) != IFF_UP) continue;
                char text[INET_ADDRSTRLEN];
                card += std::string(" ") + inet_ntop(AF_INET, &a->sin_addr, text, sizeof(text));
            }
        if (all) freeifaddrs(all);
        return card + " 127.0.0.1";
    }

    static std::string host_name() {
        char host[64] = "?";
        gethostname(host, sizeof(host) - 1);
        return host;
    }

    // Reads a guest's hello. What is wrong with it goes into `trouble`; a stranger is dropped.
    void admit(Peer& guest, const std::string& body, const std::string& cookie, std::vector<bool>& came,
               const std::vector<Peer>& guests, std::string& trouble) {
        int version = 0, rank = 0, size = 0, pid = 0;
        char key[40] = "", host[65] = "";
        const int n = sscanf(body.c_str(), "%d %39s %d %d %d %64s", &version, key, &rank, &size, &pid, host);
        if (n != 6 || cookie != key) return drop(guest, "a stranger");
        guest.rank = std::max(rank, 0), guest.host = host;
        guest.name = format("rank %d (%s, pid %d)", rank, host, pid);
        std::string wrong;
        if (version != VERSION)
            wrong = " runs another version of train_gpt than rank 0. Start one build everywhere.";
        else if (size != me.size)
            wrong = format(" was started in a world of %d, rank 0 in one of %d. Start all ranks with one command.",
                           size, me.size);
        else if (rank < 1 || rank >= size)
            wrong = format(" is none of the %d ranks. Start all ranks with one command.", size);
        for (const Peer& other : guests)
            if (wrong.empty() && &other != &guest && other.rank == rank)
                wrong = " was started twice, " + other.name + " is here. Start all ranks with one command.";
        if (rank >= 0 && rank < me.size) came[rank] = true;
        if (trouble.empty() && !wrong.empty()) trouble = guest.name + wrong;
    }

    // Rank 0: waits for all. After the first trouble it waits a second more, so that those on their way hear of it too.
    void gather(int listener, const std::string& where, const std::string& cookie, const std::string& id) {
        std::vector<Peer> guests;
        std::vector<bool> came(me.size);
        came[0] = true;
        std::string trouble;
        auto missing = [&] {
            std::vector<int> those;
            for (int r = 0; r < me.size; r++)
                if (!came[r]) those.push_back(r);
            return those;
        };
        double notice = now() + 20;
        for (double end = now() + limit; !missing().empty() && now() < end;) {
            const bool calm = trouble.empty();
            if (now() >= notice && calm)
                warn(format("waiting at %s for %s of %d, for %g s at most.", where.c_str(), list(missing()).c_str(),
                            me.size, limit));
            if (now() >= notice) notice = end;
            if (exchange(guests, listener, std::min(end, notice) - now())) {
                const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK), on = 1;
                if (fd >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
                    guests.emplace_back();
                    guests.back().fd = fd;
                    put(guests.back(), GREETING);
                } else if ((errno == EMFILE || errno == ENFILE) && trouble.empty()) {
                    trouble =
                        format("rank 0 can take no more connections: %s. Raise the limit of open files (ulimit -n).",
                               strerror(errno));
                }
            }
            uint32_t kind;
            std::string body;
            for (Peer& g : guests) {
                while (g.rank < 0 && take(g, kind, body))
                    kind == HELLO ? admit(g, body, cookie, came, guests, trouble) : drop(g, "a stranger");
                if (g.rank >= 0 && !g.gone.empty() && trouble.empty())
                    trouble = g.name + " died: " + g.gone + ". See its own messages.";
            }
            auto strange = [](const Peer& g) { return g.rank < 0 && g.fd < 0; };
            guests.erase(std::remove_if(guests.begin(), guests.end(), strange), guests.end());
            if (calm && !trouble.empty()) end = std::min(end, now() + 1);
        }
        ::close(listener);
        if (trouble.empty() && !missing().empty())
            trouble = format("%s of %d did not come to %s within %g s. Check that they were started and can reach it.",
                             list(missing()).c_str(), me.size, where.c_str(), limit);
        if (!trouble.empty()) {
            peers = std::move(guests);  // whom fail() stops
            throw Error("rendezvous: " + trouble);
        }
        peers.resize(me.size);
        peers[0].host = host_name();
        peers[0].name = format("rank 0 (%s, pid %d)", peers[0].host.c_str(), int(getpid()));
        for (Peer& g : guests) g.rank > 0 ? std::swap(peers[g.rank], g) : drop(g, "a stranger");
        int second = 1;  // the first rank on another host than rank 0
        while (second < me.size && peers[second].host == peers[0].host) second++;
        std::map<std::string, int> lower;  // ranks so far on a host
        if (me.local < 0) me.local = 0;
        lower[peers[0].host] = 1;
        for (int r = 1; r < me.size; r++)
            put(peers[r], GO,
                format("%d %d %s\n", r == 1 || r == second, lower[peers[r].host]++, peers[0].name.c_str()) + id);
    }

    // The others: try every address of rank 0 until one lets them in.
    void join(const std::vector<std::string>& hosts, int port, const std::string& where, const std::string& cookie,
              std::string& id) {
        std::string why = "no address";
        const double end = now() + limit;
        for (; now() < end; usleep(100000))
            for (const std::string& host : hosts) {
                addrinfo hints = {}, *all = nullptr;
                hints.ai_socktype = SOCK_STREAM;
                const int bad = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &all);
                if (bad) why = host + ": " + gai_strerror(bad);
                bool in = false;
                for (addrinfo* a = all; a && !in; a = a->ai_next) in = knock(*a, port, end, cookie, id, why);
                if (all) freeaddrinfo(all);
                if (in) return;
            }
        throw Error(
            format("rendezvous: rank 0 does not answer at %s within %g s (%s). Check that it was started, that "
                   "this is its host, and that no firewall is between.",
                   where.c_str(), limit, why.c_str()));
    }

    // Rank 0 greets first: whoever does not is somebody else, and hears nothing from us.
    bool knock(const addrinfo& a, int port, double end, const std::string& cookie, std::string& id, std::string& why) {
        std::vector<Peer> door(1);
        Peer& p = door[0];
        p.fd = socket(a.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        int on = 1, refused = p.fd < 0 || (connect(p.fd, a.ai_addr, a.ai_addrlen) && errno != EINPROGRESS);
        if (refused) drop(p, strerror(errno));
        setsockopt(p.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
        sockaddr_in6 mine = {};
        socklen_t size = sizeof(mine);
        if (!getsockname(p.fd, (sockaddr*)&mine, &size) && ntohs(mine.sin6_port) == port)
            drop(p, "the kernel gave us that port");  // TCP would connect us to ourselves
        bool greeted = false;
        for (double until = std::min(end, now() + 2); p.gone.empty() && now() < until;) {
            exchange(door, -1, until - now());
            uint32_t kind;
            std::string body;
            while (take(p, kind, body)) {
                if (kind == STOP) _exit(1);  // rank 0 says why
                const size_t line = body.find('\n');
                int speaker = 0, local = 0, name = 0;
                if (kind == GREETING && !greeted) {
                    greeted = true;
                    put(p, HELLO,
                        format("%d %s %d %d %d %s", VERSION, cookie.c_str(), me.rank, me.size, int(getpid()),
                               host_name().c_str()));
                    until = now() + limit + 2;  // rank 0 decides within its own limit
                } else if (kind == GO && greeted && line != std::string::npos &&
                           sscanf(body.c_str(), "%d %d %n", &speaker, &local, &name) == 2 && name &&
                           size_t(name) <= line && local >= 0) {
                    speaks = speaker;
                    if (me.local < 0) me.local = local;
                    p.name = body.substr(name, line - name);
                    id = body.substr(line + 1);
                    peers = std::move(door);
                    return true;
                } else {
                    drop(p, "it sent what is no message");
                }
            }
        }
        drop(p, "no answer");
        why = p.gone;
        return false;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The watch: the thread.

    // Says the one line, by one write, stops the others and ends this process. They hang up when they have read it; to
    // leave before that could take the message back.
    [[noreturn]] void end_job(const std::string& message) {
        const std::string line = "train_gpt: " + one_line(message) + "\n";
        if (write(2, line.data(), line.size()) < 0) errno = 0;  // nobody is left to hear it
        linger(STOP);
        _exit(1);
    }

    void linger(Kind last) {
        for (Peer& p : peers) put(p, last);
        auto open = [](const Peer& p) { return p.fd >= 0; };
        for (double end = now() + 1; now() < end && std::any_of(peers.begin(), peers.end(), open);) {
            exchange(peers, -1, end - now());
            for (Peer& p : peers) p.in.clear();
        }
    }

    // Rank 0 has a reason to end the job; the first counts. A death beats the errors that it causes elsewhere, and what
    // rank 0 says itself needs no "rank k:".
    void blame(int rank, const std::string& why, bool death) {
        if (why.empty()) return;
        if (reason.text.empty())
            reason.time = now();
        else if (!(death && !reason.death) && !(rank == 0 && why == reason.text))
            return;
        reason = {why, reason.time, rank, death};
    }

    void read(Peer& p, uint32_t kind, const std::string& body) {
        p.heard = now();
        if (kind == STOP) _exit(1);  // somebody else has said why
        if (kind == BYE) p.leave();
        if (kind == FAIL && me.rank == 0) p.failed = true, blame(p.rank, body, false);
        if (kind == BEAT) {
            Place to;
            int words = 0;
            if (sscanf(body.c_str(), "%lld %lld %lld %lld %n", &to.moves, &to.calls, &to.step, &to.stage, &words) ==
                    4 &&
                words)
                to.doing = body.substr(words), p.move_to(to);
        }
        if (kind == REPORT && me.rank == 0) {
            std::lock_guard<std::mutex> lock(mutex);
            reports.emplace_back(p.rank, body);
            changed.notify_all();
        }
    }

    std::string death(const Peer& p, double t) const {  // what is wrong with p's connection, or nothing
        if (p.bye || p.failed) return "";
        if (!p.gone.empty())
            return p.name + " died at " + p.at() + ": " + p.gone +
                   ". See its own messages, and its host's system log (out of memory?).";
        if (t - p.heard > limit)
            return p.name + format(" has not been heard of for %g s, last at ", limit) + p.at() +
                   ". See whether its host is up and the process is not stopped.";
        return "";
    }

    // If all ranks stand still, which of them is behind? Those that have left are in front; all make the same calls of
    // collectives, so who has made fewer keeps the others waiting.
    std::string hang(double t) const {
        auto order = [](const Peer& p) {
            return std::make_tuple(p.bye, p.bye ? 0 : p.place.calls, p.bye ? 0 : p.place.step,
                                   p.bye ? 0 : p.place.stage);
        };
        const Peer *last = &peers[0], *first = last;
        for (const Peer& p : peers) {
            if (t - p.moved <= limit) return "";
            if (order(p) < order(*last)) last = &p;
            if (order(*first) < order(p)) first = &p;
        }
        if (last->bye) return "";
        const std::string at = format(" at %s for %g s", last->at().c_str(), limit);
        if (order(*last) == order(*first))
            return "no rank has moved" + at + ": a collective, the storage or a GPU hangs. NCCL_DEBUG=INFO tells more.";
        std::vector<int> behind;
        for (size_t r = 0; r < peers.size(); r++)
            if (order(peers[r]) == order(*last)) behind.push_back(int(r));
        return (behind.size() == 1 ? last->name + " hangs" : list(behind) + " hang") + at + ", the others are at " +
               first->at() + ". Look at the GPU, storage and network there.";
    }

    // What rank 0 makes of the others. True: all have said goodbye, itself too.
    bool judge(double t, const std::string& failed, bool done) {
        if (done) peers[0].leave();
        bool all = true;
        for (int r = 1; r < me.size; r++) {
            const std::string why = death(peers[r], t);
            if (!why.empty()) blame(0, why, true);
            all = all && peers[r].bye;
        }
        if (!failed.empty()) blame(0, failed, false);
        if (reason.text.empty()) blame(0, hang(t), true);
        if (!reason.text.empty() && t >= reason.time + 0.2)  // time for reasons to gather
            end_job(reason.rank ? format("rank %d: ", reason.rank) + reason.text : reason.text);
        return done && all && reason.text.empty();
    }

    // What another rank tells rank 0 and makes of it. True: rank 0 has said goodbye.
    bool follow(double t, const std::string& failed, bool done) {
        if (peers[0].bye) return true;
        if (done && !said_bye) put(peers[0], BYE), said_bye = true;
        if (!failed.empty() && !failed_at) put(peers[0], FAIL, failed), failed_at = t;
        const std::string why = death(peers[0], t);  // then the others leave quietly
        if (!why.empty() && speaks) end_job(why);
        if (!why.empty()) {
            sleep(1);  // a launcher that sees us end would end the speaker
            _exit(1);
        }
        if (failed_at > 0 && t - failed_at > 3)
            end_job(format("rank %d: ", me.rank) + failed);  // rank 0 does not take it
        return false;
    }

    void watch() {
        double next = now(), last = now();
        for (;;) {
            char notes[64];
            const double until = reason.text.empty() ? next : std::min(next, reason.time + 0.2);
            if (exchange(peers, wake[0], until - now()) && ::read(wake[0], notes, sizeof(notes)) < 0) errno = 0;
            const double t = now();
            if (t - last > 4 * beat)  // stopped ourselves (a debugger, a sleeping machine): accuse nobody of that time
                for (Peer& p : peers) p.heard += t - last, p.moved += t - last;
            last = t;
            uint32_t kind;
            std::string body;
            for (Peer& p : peers)
                while (take(p, kind, body)) read(p, kind, body);
            body.clear();
            if (t >= next) {
                next = t + beat;
                send_beat();
                std::lock_guard<std::mutex> lock(check_mutex);
                if (check) body = check();
            }
            std::unique_lock<std::mutex> lock(mutex);
            if (failure.empty()) failure = body;
            const std::string failed = failure;
            const bool done = leaving, abandon = abandoned;
            for (const std::string& text : outbox) put(peers[0], REPORT, text);
            outbox.clear();
            lock.unlock();
            if (abandon) return;
            if (me.rank == 0 ? judge(t, failed, done) : follow(t, failed, done)) {
                if (me.rank == 0) linger(BYE);
                return;
            }
        }
    }

    void send_beat() {
        std::unique_lock<std::mutex> lock(place_mutex);
        Place p = place;
        lock.unlock();
        p.calls = collectives, p.moves += ticks;
        if (me.rank == 0) peers[0].move_to(p);
        const std::string body = format("%lld %lld %lld %lld %s", p.moves, p.calls, p.step, p.stage, p.doing.c_str());
        for (Peer& to : peers)
            if (to.fd >= 0 && to.out.empty()) put(to, BEAT, body);  // one that does not read gets no more
    }
};

inline Channel channel;  // this process's
