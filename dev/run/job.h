// A run's beginning and end: the options settled, the ranks and the device opened, the folder claimed, the state set,
// the matmuls' algorithms chosen and kept.
#pragma once
#include <sys/file.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

#include "../../tokenizer.h"
#include "checkpoint.h"
#include "options.h"

// The launcher whose ranks MPI can bring together; to another MPI's it starts alone.
#if !defined(USE_MPI)
constexpr const char* BUILT_WITH = "no MPI";
#elif defined(OPEN_MPI)
constexpr const char* BUILT_WITH = "Open MPI";
#else
constexpr const char* BUILT_WITH = "MPICH";  // and what descends from it
#endif

// Settles the model's shape, also by the tokenizer and the files that the options name.
void settle_model(Options& o, std::unique_ptr<Tokenizer>& tokenizer) {
    Config& c = o.config;
    if (!o.tokenizer.empty()) {
        tokenizer.reset(new Tokenizer(Tokenizer::load(o.tokenizer)));
        if (!o.vocab_given) c.V = tokenizer->vocab_size();
        if (tokenizer->vocab_size() > c.V)
            throw Error(
                format("--tokenizer: has %d tokens, --vocab-size is %d. Raise it.", tokenizer->vocab_size(), c.V));
    }
    if (c.backbone == Backbone::nanogpt && !o.init_from.empty() && !o.positions_given) {
        for (const std::string& path : weight_files(o.init_from)) {
            Safetensors file(path);
            auto found = file.entries.find("wpe.weight");
            if (found != file.entries.end() && found->second.shape.size() == 2) c.max_T = int(found->second.shape[0]);
        }
    }
    if (o.seq_len) c.T = o.seq_len;
    as_options([&] { finish(c); });
}

// Settles the learning rate's schedule.
void settle_schedule(Options& o) {
    Schedule& a = o.schedule;
    if (a.warmup > o.steps) throw Error("--warmup: is longer than --steps. Shorten it.");
    if (a.warmup < 0) a.warmup = o.steps / 100;
    const int64_t behind = o.steps - a.warmup;
    if (a.decay == Decay::constant && a.least >= 0)
        throw Error("--min-lr: --schedule constant never falls to it. Leave it out, or choose another schedule.");
    if (a.decay == Decay::constant && a.steps > 0)
        throw Error("--decay-steps: --schedule constant has none. Leave it out, or choose wsd.");
    if (a.decay == Decay::linear && a.steps > 0)
        throw Error(
            "--decay-steps: --schedule linear falls in all steps behind the warm-up. Leave it out, or choose wsd.");
    if (a.least > a.peak) throw Error(format("--min-lr: %g is above --lr, %g. Lower it.", a.least, a.peak));
    if (a.steps > behind)
        throw Error(
            format("--decay-steps: %lld are more than the %lld behind the warm-up. Give fewer, or more --steps.",
                   (long long)a.steps, (long long)behind));
    if (a.least < 0) a.least = a.decay == Decay::cosine ? a.peak / 10 : 0;
    if (a.steps < 0) a.steps = a.decay == Decay::wsd ? std::min(behind, std::max<int64_t>(1, o.steps / 5)) : behind;
}

// Settles what else training needs.
void settle_options(Options& o, const World& world, std::unique_ptr<Tokenizer>& tokenizer) {
    settle_model(o, tokenizer);
    if (o.sample_every && !tokenizer)
        throw Error("--sample-every: needs a tokenizer. Add --tokenizer bytes or the file of the data's tokenizer.");
    if ((o.steps > 0 || o.probe) && o.train_data.empty() && !o.plan)
        throw Error("--train-data: is missing. Give token shards, made by dev/data/prepare.py (dev/doc/data.md).");
    settle_schedule(o);
    if (o.storage.no_master && !BF16) throw Error("--no-master: the fp32 build has none. Leave it out.");
    if (o.storage.half_gradients && !BF16)
        throw Error("--gradients: the fp32 build's are fp32. Leave it out, or make PRECISION=bf16.");
    if (o.val_every > 0 && o.val_data.empty())
        throw Error("--val-every: needs --val-data. Give it, or leave both out.");
    if (o.keep_best && (o.val_data.empty() || o.val_every == 0))
        throw Error("--keep-best: needs --val-data, and --val-every above 0. Give them, or leave it out.");
    if (o.probe && world.size > 1)
        throw Error("--probe: is for one rank. Probe a checkpoint: --init-from DIR --steps 0 --probe 1.");
    o.storage.probe = o.probe > 0;
    if (o.separate && !tokenizer)
        throw Error("--documents: separate needs --tokenizer, whose BOS begins a document. Give the data's.");
    if (o.separate) o.storage.bos = tokenizer->bos();
    if (o.graph && world.size > 1) throw Error("--graph: is for one rank. Leave it out.");
    if (o.val_batches == 0) throw Error("--val-batches: all is for eval. Give a number.");
    if (o.val_batches < 0) o.val_batches = 20;
    o.storage.rank = world.rank, o.storage.ranks = o.plan && o.ranks ? o.ranks : world.size;
    o.adamw.seed = o.seed;
}

// What is kept where, with micro-batches of B sequences.
Storage storage_of(const Options& o, int B) {
    Storage s = o.storage;
    s.zero = s.ranks > 1 ? o.zero : 0;
    const int64_t micro = o.total_batch ? o.total_batch / (int64_t(B) * s.ranks) : o.grad_accum;
    s.whole_gradients = micro > 1 && !o.reduce_each;
    return s;
}

// Plans a training run with micro-batches of B sequences, and room for the keys and values of one sample.
void plan_training(Model& m, const Gpu& gpu, const Options& o, int B) {
    if (o.sample_every) m.cache.sequences = 1, m.cache.room = o.config.T;
    as_options([&] { plan(m, gpu, o.config, B, true, storage_of(o, B)); });
}

// The largest micro-batch, a divisor of a rank's share of --total-batch unless that is 0, whose plan fits into `room`
// bytes; 0 if none.
int largest_batch(const Options& o, const Gpu& gpu, size_t room) {
    int64_t fits = 0, fails = 1;
    auto needs = [&](int64_t B) {
        Model m;
        plan_training(m, gpu, o, int(B));
        return m.arena.used;
    };
    const int64_t share = o.total_batch / o.storage.ranks;
    const int64_t most = std::min<int64_t>(share ? share : 1 << 20, (1 << 30) / o.config.T);
    if (share && needs(most) <= room) return int(most);  // one micro-batch may need less than two
    while (fails <= most && needs(fails) <= room) fits = fails, fails *= 2;
    fails = std::min(fails, most + 1);
    while (fails - fits > 1) {
        const int64_t middle = (fits + fails) / 2;
        (needs(middle) <= room ? fits : fails) = middle;
    }
    while (share && fits > 0 && share % fits) fits--;
    return int(fits);
}

// Bytes of a GPU that --batch-size auto leaves: kernels' code and cuBLASLt's come with their first use, NCCL may take
// more than ranks.open() had it take.
constexpr size_t KEPT_BACK = size_t(1) << 30;

// Settles --batch-size auto, --total-batch and what follows from them; free: the device's free bytes.
void choose_batch(Options& o, const Gpu& gpu, size_t free, bool on_gpu = !SERIAL) {
    const int n = o.storage.ranks;
    const size_t room = free - (on_gpu ? std::min(free, KEPT_BACK) : 0);
    if (o.total_batch % n)
        throw Error(
            format("--total-batch: %d sequences cannot be shared by %d ranks. Choose a multiple.", o.total_batch, n));
    if (o.batch_size == 0)
        o.batch_size = std::max(1, largest_batch(o, gpu, room));  // if not even 1 fits, create() says so
    if (o.total_batch % (int64_t(o.batch_size) * n))
        throw Error(
            format("--total-batch: %d sequences are no multiple of --batch-size %d%s. Choose a divisor, or auto.",
                   o.total_batch, o.batch_size, n > 1 ? format(" on %d ranks", n).c_str() : ""));
    o.storage = storage_of(o, o.batch_size);
    if (o.total_batch) o.grad_accum = o.total_batch / (o.batch_size * n);
}

// Brings the ranks together and opens the device; one rank is alone.
Gpu open_job(const Options& o, const World& world) {
    std::function<void(void*, size_t)> broadcast;
#ifdef USE_MPI
    if (world.size > 1 && strcmp(world.launcher, BUILT_WITH) == 0 && o.rendezvous.empty()) {
        int level = 0, size = 0;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &level);
        MPI_Comm_size(MPI_COMM_WORLD, &size);
        if (size == world.size)
            broadcast = [](void* p, size_t bytes) { MPI_Bcast(p, int(bytes), MPI_BYTE, 0, MPI_COMM_WORLD); };
    }
#endif
    std::string id(sizeof(ncclUniqueId), 0);
    ncclUniqueId nccl = {};
    if (world.size > 1 && world.rank == 0) {
        CHECK_NCCL(ncclGetUniqueId(&nccl));
        memcpy(&id[0], &nccl, sizeof(nccl));
    }
    channel.open(world, o.rendezvous, o.timeout, broadcast, id);
    memcpy(&nccl, id.data(), sizeof(nccl));
    channel.progress("opening the device", 0);
    const Gpu gpu = open_device(channel.local());
    if (world.size == 1) return gpu;
    channel.progress("opening NCCL", 0);
    ranks.open(nccl, world.rank, world.size);
    channel.set_check([] {
        ncclResult_t status = ncclSuccess;
        ncclCommGetAsyncError(ranks.comm, &status);
        return status == ncclSuccess || status == ncclInProgress
                   ? std::string()
                   : format("NCCL: %s: %s", ncclGetErrorString(status), ncclGetLastError(ranks.comm));
    });
    return gpu;
}

void close_job() {
    channel.set_check(nullptr);
    ranks.close();
    channel.close();
#ifdef USE_MPI
    int begun = 0, done = 0;
    MPI_Initialized(&begun);
    MPI_Finalized(&done);
    if (begun && !done) MPI_Finalize();
#endif
}

// The newest checkpoint whose files are as they were written; -1 if there is none at all. The ranks read a part each.
int64_t find_checkpoint(const std::string& out) {
    std::vector<int64_t> steps = list_checkpoints(out);
    bool any = false;
    for (const std::string& name : names_in(out)) any |= name.compare(0, 13, "damaged_step_") == 0;
    while (true) {
        const int64_t step = int64_t(ranks.exchange(steps.empty() ? any ? -2.0 : -1.0 : double(steps.back()))[0]);
        if (step == -2)
            throw Error(out +
                        ": none of its checkpoints is sound. Give another --out to begin anew, or repair the disk.");
        if (step == -1) return -1;
        const std::string dir = out + "/" + checkpoint_name(step), aside = out + "/damaged_" + checkpoint_name(step);
        std::string trouble;
        try {
            channel.progress("verifying a checkpoint", 0);
            const int64_t held = verify_checkpoint(dir);
            if (held != step) throw Error(format("%s: holds step %lld, not its name's.", dir.c_str(), (long long)held));
        } catch (const Error& e) {
            trouble = e.what();
        }
        if (ranks.least(trouble.empty()) != 0) return step;
        // a trouble that all have, as with state.json, is told by the first
        const bool common = ranks.exchange(!trouble.empty())[0];
        if (!trouble.empty() && (ranks.rank == 0 || !common))
            warn(trouble + " Trying the checkpoint before it; this one is put aside as " + aside + ".");
        any = true;
        if (ranks.rank == 0) {
            remove_dir(aside);
            if (rename(dir.c_str(), aside.c_str()))
                throw Error(dir + ": cannot be put aside as " + aside + ": " + strerror(errno) + ". Move it away.");
        }
        while (!steps.empty() && steps.back() >= step) steps.pop_back();
    }
}

// One job at a time writes to a folder: two would take each other's unfinished checkpoints for leftovers. The lock is
// the kernel's and goes with the process.
void lock_folder(const std::string& out) {
    const int fd = open(out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) throw Error(out + ": cannot be opened: " + strerror(errno) + ". Check --out.");
    for (int tries = 0; flock(fd, LOCK_EX | LOCK_NB); tries++, ticks++) {  // one that is being ended gets ten seconds
        if (errno != EWOULDBLOCK && errno != EINTR) return;                // a file system without locks
        if (tries == 100) throw Error(out + ": another job is writing there. End it, or choose another --out.");
        usleep(100000);
    }
}

// Makes --out the job's own, and tells now what would fail after an hour.
void claim_folder(const Options& o) {
    if (o.out.empty()) throw Error("--out: is empty. Give a folder.");
    make_dirs(o.out);
    if (ranks.rank > 0) return;
    lock_folder(o.out);
    { OutFile probe(o.out + "/log.csv"); }
    if (!o.export_to.empty()) OutFile probe(o.export_to);
    if (!list_checkpoints(o.out).empty() && !o.resume)
        throw Error(o.out +
                    ": holds the checkpoints of an earlier run. Add --resume to continue it, or choose another --out.");
    remove_leftovers(o.out);
}

// What else a run's steps depend on: the data's order, and AdamW.
Fields training_fields(const Options& o) {
    auto word = [](bool on) { return std::string(on ? "on" : "off"); };
    auto number = [](float x) { return format("%.7g", x); };
    return {{"train_data", o.train_data},
            {"shuffle", word(o.shuffle)},
            {"documents", o.separate ? "separate" : "joined"},
            {"total_batch", std::to_string(int64_t(o.batch_size) * o.grad_accum * o.storage.ranks)},
            {"weight_decay", number(o.adamw.weight_decay)},
            {"no_decay_1d", word(!o.adamw.decay_1d)},
            {"beta1", number(o.adamw.beta1)},
            {"beta2", number(o.adamw.beta2)},
            {"adam_eps", number(o.adamw.eps)},
            {"clip", number(o.adamw.clip)}};
}

// The fields that are not as they were, as options; one that was not written down was `missing`, null: the same.
std::string changes(const Fields& now, const Fields& before, const char* missing) {
    auto shown = [](const std::string& value) {  // a tenth of 3e-4 as 3e-05
        char* end;
        const double x = strtod(value.c_str(), &end);
        return end != value.c_str() && !*end ? format("%.15g", x) : value;
    };
    std::string found;
    for (auto& [key, value] : now) {
        std::string option = "--" + key;
        const std::string* was = nullptr;
        std::replace(option.begin(), option.end(), '_', '-');
        for (auto& field : before)
            if (field.first == key) was = &field.second;
        if (was ? *was == value : !missing) continue;
        found +=
            (found.empty() ? "" : ", ") + option + " " + shown(value) + " (was " + (was ? shown(*was) : missing) + ")";
    }
    return found;
}

// Tells what a resume changes, in one line. It is a warning where steps that are done had something else than they
// would have now; of the learning rate they had the same if the change lies ahead: a wsd prolonged, a fall behind a
// constant.
void compare_options(const Options& o, const TrainState& had, uint64_t windows, const std::string& dir) {
    if (had.step >= o.steps) return;  // nothing is left to train
    std::string all = changes(training_fields(o), had.training, nullptr), past;
    if (windows != had.windows)
        all += format("%s%llu windows of data (was %llu)", all.empty() ? "" : ", ", (unsigned long long)windows,
                      (unsigned long long)had.windows);
    if (!all.empty()) past = format("steps 1 to %lld were trained with what they were", (long long)had.step);
    const std::string rates =
        had.steps < 0 ? ""
                      : changes(schedule_fields(o.schedule, o.steps), schedule_fields(had.schedule, had.steps), "none");
    if (!rates.empty()) {
        all += (all.empty() ? "" : ", ") + rates;
        int64_t first = 0, last = 0;  // of the steps that differ
        for (int64_t s = 0; s < had.step; s++) {
            if (learning_rate(o.schedule, s, o.steps) == learning_rate(had.schedule, s, had.steps)) continue;
            if (!first) first = s + 1;
            last = s + 1;
        }
        if (last && past.empty())
            past = format("steps %lld to %lld were trained with other learning rates than a run with these options has",
                          (long long)first, (long long)last);
    }
    if (all.empty()) return;
    if (past.empty())
        printf("changed with the resume: %s\n", all.c_str());
    else if (ranks.rank == 0)
        warn(format("%s: changed with the resume: %s; %s. Give its own options, unless that is meant.", dir.c_str(),
                    all.c_str(), past.c_str()));
}

// Sets weights, AdamW's state and the place in the data (null: none): of the newest checkpoint with --resume, else
// those of the beginning.
TrainState set_state(Model& m, const Options& o, DataLoader* data) {
    TrainState state;
    state.seed = o.seed;
    const int64_t newest = o.resume ? find_checkpoint(o.out) : -1;
    channel.progress("setting the weights", 0);
    if (newest < 0) {
        o.init_from.empty() ? initialize(m, o.seed) : import_weights(m, o.init_from);
    } else {
        const std::string dir = o.out + "/" + checkpoint_name(newest);
        state = load_checkpoint(m, dir);
        if (state.seed != o.seed)
            throw Error(
                format("%s: was begun with --seed %llu. Give the same.", dir.c_str(), (unsigned long long)state.seed));
        if (data) data->seek(state.loader);
        printf("resumed from %s\n", dir.c_str());
        compare_options(o, state, data ? data->windows() : state.windows, dir);
        if (o.steps > 0 && state.step >= o.steps)
            printf("--steps %lld: are done; nothing is left to train, a larger number goes on\n", (long long)o.steps);
    }
    if (data) state.windows = data->windows();
    state.schedule = o.schedule, state.steps = o.steps, state.training = training_fields(o);
    return state;
}

// What a choice of algorithms holds for.
std::string matmul_machine() {
    int number = 0;
    cudaDeviceProp device;
    CHECK(cudaGetDevice(&number));
    CHECK(cudaGetDeviceProperties(&device, number));
    return format("cublasLt %zu, %s, %d multiprocessors, %s", cublasLtGetVersion(), device.name,
                  device.multiProcessorCount, PRECISION);
}

// The matmuls' choices as text: the machine, then a line each: shape and algorithm, which cuBLASLt lets be stored and
// loaded again by the same version of itself.
std::string matmul_choices(const std::string& machine) {
    std::string text = machine + "\n";
    for (auto& [s, algo] : matmul.chosen) {
        text += format("algorithm %d %d %d %d %d %d", s.transA, s.transB, s.m, s.n, s.k, s.type);
        for (uint64_t word : algo.data) text += format(" %llx", (unsigned long long)word);
        text += "\n";
    }
    return text;
}
// False, and nothing taken, if the text is another machine's or none of ours.
bool take_matmul_choices(const std::string& text, const std::string& machine) {
    size_t at = text.find('\n');
    if (text.substr(0, at) != machine) return false;
    std::map<Matmul::Shape, cublasLtMatmulAlgo_t> algorithms;
    while (at != std::string::npos && ++at < text.size()) {
        Matmul::Shape s;
        cublasLtMatmulAlgo_t algo;
        int used = 0;
        const char* p = text.c_str() + at;
        at = text.find('\n', at);
        if (sscanf(p, "algorithm %d %d %d %d %d %d%n", &s.transA, &s.transB, &s.m, &s.n, &s.k, &s.type, &used) != 6)
            return false;
        for (uint64_t& word : algo.data) {
            unsigned long long bits;
            p += used;
            if (sscanf(p, "%llx%n", &bits, &used) != 1) return false;
            word = bits;
        }
        algorithms[s] = algo;
    }
    matmul.chosen = algorithms;
    return true;
}

// Has the matmuls' algorithms chosen, unless there is only one. A rank's choices lie in a file beside the log; a run
// takes them from there, resumed or not, and times what is missing or refused.
void settle_matmuls(Model& m, const std::string& path, bool resumed) {
    const Config& c = m.c;
    const Matmul::Shape one = {false, true, int(m.N()), c.QKV(), c.C, CUDA_FLOATX};
    if (ranks.most(double(matmul.plan(one).algos.size())) < 2) return;
    matmul.forget_plans();
    const double begin = now();
    const std::string machine = matmul_machine();
    const bool there = access(path.c_str(), R_OK) == 0;
    if (there) take_matmul_choices(read_file(path), machine);
    time_matmuls(m);
    const double timed = ranks.most(matmul.timed);
    if (timed == 0) return;
    if (ranks.most(there || resumed) != 0)
        printf(
            "%s%s: lacks %.0f matmuls of this run on this machine (%s); they are timed again, sums may round "
            "differently\n",
            path.c_str(), ranks.size > 1 ? " or another rank's" : "", timed, machine.c_str());
    OutFile file(path);
    file.write(matmul_choices(machine));
    file.commit();
    printf("timed %.0f matmuls in %.1f s\n", timed, now() - begin);
}

// Bytes of a checkpoint that are a rank's.
double saved_bytes(const Model& m) {
    const double width = sizeof(floatX) + 2 * m.m.width() + (m.storage.has_master() ? sizeof(float) : 0);
    return width * double(m.table.shard_size());
}

// The schedule's phases in steps, "10 to 0.001, 790 of 0.001, 200 from 0.001 to 0".
std::string schedule_text(const Schedule& a, int64_t S) {
    std::string text;
    auto phase = [&](int64_t steps, const std::string& rates) {
        if (steps > 0) text += (text.empty() ? "" : ", ") + std::to_string(steps) + rates;
    };
    const int64_t fall = a.decay == Decay::constant ? 0 : a.steps, rest = S - a.warmup - fall;
    phase(a.warmup, format(" to %g", a.peak));
    if (a.decay != Decay::cosine) phase(rest, format(" of %g", a.peak));
    phase(fall, format(" from %g to %g", a.peak, a.least));
    if (a.decay == Decay::cosine) phase(rest, format(" of %g", a.least));
    return text;
}

void print_run(const Model& m, const Options& o) {
    const Config& c = m.c;
    std::string scaling;
    if (c.rope_scaling.factor != 1) scaling = ", RoPE scaled " + rope_scaling_text(c.rope_scaling);
    printf("%s %s, %s: dim %d, %d layers, %d heads of %d (%d key/value), hidden %d, vocabulary %d, T %d%s; %s\n",
           BACKBONES[int(c.backbone)].c_str(), VARIANTS[int(c.variant)].c_str(), NORMS[c.layernorm].c_str(), c.C, c.L,
           c.NH, c.HS(), c.NKV, c.F(), c.V, c.T, scaling.c_str(), PRECISION);
    const std::string many =
        o.storage.ranks > 1 ? format(" on %d ranks, ZeRO %d", o.storage.ranks, o.storage.zero) : "";
    printf("%zu parameters; %lld steps of %d x %d sequences%s\n", m.table.parameters, (long long)o.steps, o.grad_accum,
           o.batch_size, many.c_str());
    if (o.separate) printf("documents: separate, each begins with token %d\n", o.storage.bos);
    if (o.steps > 0)
        printf("learning rate, %s, steps: %s\n", SCHEDULES[int(o.schedule.decay)].c_str(),
               schedule_text(o.schedule, o.steps).c_str());
    printf("%s", memory_plan(m).c_str());
    if (o.save_async) printf("  and on the host, for --save-async %10.1f MiB\n", saved_bytes(m) / 1048576.0);
}

// Has signals set asked_to_stop.
void catch_signals() {
    struct sigaction action = {};
    action.sa_handler = [](int number) {
        if (number == SIGINT && asked_to_stop == SIGINT) signal(SIGINT, SIG_DFL), raise(SIGINT);
        asked_to_stop = number;
    };
    action.sa_flags = SA_RESTART;
    for (int number : {SIGTERM, SIGINT, SIGUSR1}) sigaction(number, &action, nullptr);
}

// What several sources of data come to in the run.
void print_mixture(const DataLoader& data, const Options& o) {
    const uint64_t windows = uint64_t(o.steps) * uint64_t(o.batch_size) * uint64_t(o.grad_accum * o.storage.ranks);
    const auto sources = data.seen({0, windows});
    for (auto& s : sources)
        if (sources.size() > 1)
            printf("data: %.2f%% %s, %.3g epochs in all\n", 100 * s.share, s.glob.c_str(), s.epochs);
}

// What multiplies; warns if it is slow.
void print_matmul() {
#ifdef CUDA_CPU
    const std::string warning = gemm_warning();
    if (!warning.empty()) warn(warning);
    printf("matmul: %s\n", gemm_about().c_str());
#else
    const size_t version = cublasLtGetVersion();
    printf("matmul: cuBLASLt %zu.%zu.%zu\n", version / 10000, version / 100 % 100, version % 100);
#endif
}

// Bytes in use: of the device; on a CPU, whose memory processes share, this one's.
double memory_used() {
    if (SERIAL) {
        long pages = 0;
        if (FILE* f = fopen("/proc/self/statm", "r")) {
            if (fscanf(f, "%*d %ld", &pages) != 1) pages = 0;
            fclose(f);
        }
        return double(pages) * double(sysconf(_SC_PAGESIZE));
    }
    size_t free = 0, total = 0;
    CHECK(cudaMemGetInfo(&free, &total));
    return double(total - free);
}

// Whether the ranks can come together as they were started.
void check_start(const Options& o, const World& world) {
    if (world.size > 1 && !HAS_NCCL)
        throw Error(
            format("%s: started %d ranks, but this build lacks NCCL, which they need. Install it (libnccl-dev) and "
                   "build again.",
                   world.launcher, world.size));
    if (world.size > 1 && !o.rendezvous.empty()) host_and_port(o.rendezvous);
    if (world.size > 1 && strstr(world.launcher, "MPI") && strcmp(world.launcher, BUILT_WITH) && o.rendezvous.empty() &&
        !getenv("MASTER_ADDR") && !getenv("SLURM_JOB_ID"))
        throw Error(
            format("MPI: started by %s, but built with %s. Take mpicxx and mpirun of one MPI; GPU builds can do with "
                   "--rendezvous HOST:PORT.",
                   world.launcher, BUILT_WITH));
}
