// The command line: every option once, with what it sets, its help, and the commands that take it.
#pragma once
#include <getopt.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>

#include "../../train_gpt.cu"
#include "../use/sampling.h"
#include "weights.h"

// What the program is asked to do, and so which options it takes.
enum Command { TRAIN = 1, GENERATE = 2, EVAL = 4, ALL_COMMANDS = TRAIN | GENERATE | EVAL };
const std::map<int, const char*> COMMANDS = {{TRAIN, "training"}, {GENERATE, "generate"}, {EVAL, "eval"}};

struct Options {
    Command command = TRAIN;
    Config config;
    Storage storage;
    AdamW adamw;
    Schedule schedule;        // of adamw.lr
    int zero = 1, ranks = 0;  // ranks: of --plan
    bool reduce_each = false, save_async = false;
    double timeout = 600;  // seconds
    std::string rendezvous;
    int64_t check_every = 1000, max_bad_steps = 10;
    std::string train_data, val_data, tokenizer, prompt, init_from, export_to, out = "run";
    bool shuffle = false, resume = false, graph = false, export_half = false, keep_best = false,
         separate = false;
    int seq_len = 0;           // 0: 1024, or the checkpoint's
    int batch_size = 4;        // 0: as many as fit
    int64_t val_batches = -1;  // 0: all; -1: 20 in training, all in eval
    int grad_accum = 1, total_batch = 0, log_every = 10, val_every = -1, sample_every = 0, sample_tokens = 200,
        probe_iterations = 50, probe_batches = 1, keep = 2;
    int64_t steps = 1000, save_every = 0, probe = 0;
    uint64_t seed = 1;
    bool vocab_given = false, positions_given = false, plan = false;
    std::string device = BF16 ? "h200" : "2-cores";
    // of generate and eval
    std::vector<const char*> shape;  // options given of the model's shape, which a checkpoint knows
    std::string checkpoint, prompt_file, choices;
    int max_tokens = 200, num_samples = 1;
    Sampling sampling;
};

struct Flag {
    const char* name;  // null: `help` is a heading
    std::string arg;   // "": a switch
    const char* help;
    std::function<void(const char*)> set;
    int commands = 0;    // that take it; 0: those of the heading above it
    bool shape = false;  // of the model: a checkpoint knows it
};

inline double parse_number(const char* flag, const char* text, double least, double most) {
    char* end;
    errno = 0;
    double x = strtod(text, &end);
    if (end == text || *end || errno || !(x >= least && x <= most))
        throw Error(format("--%s: '%s' is not a number from %g to %g.", flag, text, least, most));
    return x;
}
inline int64_t parse_integer(const char* flag, const char* text, int64_t least, int64_t most) {
    char* end;
    errno = 0;
    long long x = strtoll(text, &end, 10);
    if (end == text || *end || errno || x < least || x > most)
        throw Error(format("--%s: '%s' is not a whole number from %lld to %lld.", flag, text, (long long)least,
                           (long long)most));
    return x;
}

// Calls f, whose errors name numbers of the model: here they are options. "memory: ..." names none.
template <typename F>
void as_options(F f) {
    try {
        f();
    } catch (const Error& e) {
        const std::string what = e.what();
        throw Error(what.compare(0, 8, "memory: ") ? "--" + what : what);
    }
}

inline std::vector<Flag> flags(Options& o) {
    std::vector<Flag> all;
    bool shape = false;
    auto add = [&](const char* name, const std::string& arg, const char* help, std::function<void(const char*)> set) {
        all.push_back({name, arg, help, std::move(set), 0, shape});
    };
    auto heading = [&](const char* text, int commands = TRAIN) {
        all.push_back({nullptr, "", text, nullptr, commands});
    };
    auto only = [&](int commands) { all.back().commands = commands; };  // of the option before
    auto toggle = [&](const char* name, const char* help, bool* out, bool value) {
        add(name, "", help, [=](const char*) { *out = value; });
    };
    auto text = [&](const char* name, const char* arg, const char* help, std::string* out) {
        add(name, arg, help, [=](const char* s) { *out = s; });
    };
    auto integer = [&](const char* name, auto* out, int64_t least, int64_t most, const char* help) {
        add(name, "N", help,
            [=](const char* s) { *out = std::decay_t<decltype(*out)>(parse_integer(name, s, least, most)); });
    };
    auto integer_or = [&](const char* name, const char* word, auto* out, int64_t most, const char* help) {  // 0: word
        add(name, format("N|%s", word), help, [=](const char* s) {
            *out = std::decay_t<decltype(*out)>(strcmp(s, word) ? parse_integer(name, s, 1, most) : 0);
        });
    };
    auto number = [&](const char* name, float* out, double least, double most, const char* help) {
        add(name, "X", help, [=](const char* s) { *out = float(parse_number(name, s, least, most)); });
    };
    auto choice = [&](const char* name, const Words& words, const char* help, auto pick) {
        std::string all_words;
        for (const std::string& word : words) all_words += (all_words.empty() ? "" : "|") + word;
        add(name, all_words, help, [=](const char* s) {
            auto found = std::find(words.begin(), words.end(), s);
            if (found == words.end()) throw Error(format("--%s: '%s' is none of %s.", name, s, all_words.c_str()));
            pick(int(found - words.begin()));
        });
    };
    const int64_t big = int64_t(1) << 30;
    const Words types = {"fp32", "bf16"};
    Config& c = o.config;

    heading("Model (a flavour's numbers, each of which its own flag changes)", ALL_COMMANDS);
    shape = true;
    add("model", "FLAVOUR", "preset of dim, layers, heads, ... ; --models lists them (default: 256 wide, 6 layers)",
        [](const char*) {});  // applied before all others
    add("models", "", "list the flavours and their parameter counts, then exit", nullptr);
    choice("backbone", BACKBONES, "llama: RoPE, SwiGLU, own head; nanogpt: learned positions, GELU, tied head (llama)",
           [&c](int i) { c.backbone = Backbone(i); });
    choice("variant", VARIANTS, "norms behind every linear, before each half, or that with QK norm (simplegpt)",
           [&c](int i) { c.variant = Variant(i); });
    choice("norm", NORMS, "layernorm has no bias (rmsnorm)", [&c](int i) { c.layernorm = i; });
    integer("dim", &c.C, 1, 1 << 20, "width of the residual stream (256)");
    integer("layers", &c.L, 1, 1 << 16, "blocks (6)");
    integer("heads", &c.NH, 1, 1 << 16, "query heads of dim / heads columns, a multiple of 8 up to 256 (4)");
    integer("kv-heads", &c.NKV, 1, 1 << 16, "key/value heads, a divisor of --heads (as many)");
    number("ffn-mult", &c.ffn_mult, 0, 1000, "factor on the feed-forward width 8/3 dim, llama only (1)");
    integer("multiple-of", &c.multiple_of, 1, 1 << 24, "the feed-forward width is rounded up to it, llama only (256)");
    add("vocab-size", "N", "tokens (the tokenizer's if --tokenizer is given, else the flavour's, 32000)",
        [&o](const char* s) {
            o.config.V = int(parse_integer("vocab-size", s, 1, 1 << 28));
            o.vocab_given = true;
        });
    number("rope-theta", &c.rope_theta, 0, 1e12, "base of RoPE's wavelengths (1e4)");
    add("rope-scaling", "FACTOR,LOW,HIGH,TOKENS|none",
        "stretch RoPE's waves, those beyond TOKENS / LOW, not those below TOKENS / HIGH; Llama 3.2: 32,1,4,8192 (none)",
        [&c](const char* s) { as_options([&] { c.rope_scaling = parse_rope_scaling(s); }); });
    number("norm-eps", &c.norm_eps, 0, 1, "added to the mean square in norms (1e-5)");
    add("max-seq-len", "N", "learned positions, nanogpt only (those of --init-from, else --seq-len)",
        [&o](const char* s) {
            o.config.max_T = int(parse_integer("max-seq-len", s, 1, 1 << 24));
            o.positions_given = true;
        });
    shape = false;

    heading("Weights", ALL_COMMANDS);
    text("checkpoint", "DIR", "a checkpoint, or a run's folder: the newest sound one in it", &o.checkpoint);
    only(GENERATE | EVAL);
    text("init-from", "FILE|DIR",
         "begin with these weights: safetensors with the paper's names, fp32, bf16 or fp16, of the shape above",
         &o.init_from);
    text("export", "FILE", "write the weights of the end there, as safetensors with the paper's names", &o.export_to);
    only(TRAIN);
    choice("export-dtype", types, "of --export (fp32)", [&o](int i) { o.export_half = i; });
    only(TRAIN);

    heading("Data", ALL_COMMANDS);
    text("train-data", "GLOB[:WEIGHT,...]",
         "token shards (llm.c's format; dev/data/prepare.py makes them); quote a pattern. Several take turns by weight",
         &o.train_data);
    only(TRAIN);
    text("val-data", "GLOB", "token shards to validate on, cut into windows of --seq-len + 1 tokens", &o.val_data);
    only(TRAIN | EVAL);
    integer_or("val-batches", "all", &o.val_batches, big,
               "the first N batches of --val-data, in training on each rank (20, of eval all)");
    only(TRAIN | EVAL);
    text("tokenizer", "bytes|FILE",
         "the data's, for text (what the checkpoint names; dev/data/convert_tokenizer.py makes files)", &o.tokenizer);
    integer("seq-len", &o.seq_len, 1, 1 << 24,
            "tokens of a sequence (1024, or the checkpoint's; RoPE allows more, nanogpt its positions)");
    integer_or("batch-size", "auto", &o.batch_size, big,
               "sequences run at a time, a micro-batch; auto, in training: as many as fit into memory (4)");
    only(TRAIN | EVAL);
    choice("documents", {"joined", "separate"},
           "attention across the documents of a window, as the paper's code, or within each only (needs --tokenizer, "
           "whose BOS begins one)",
           [&o](int i) { o.separate = i; });
    only(TRAIN);
    toggle("shuffle", "windows in an order drawn from --seed, anew each epoch (in order)", &o.shuffle, true);
    only(TRAIN);
    integer("seed", &o.seed, 0, INT64_MAX, "of weights, order of the data, and text (1)");
    only(TRAIN | GENERATE);

    heading("Training");
    integer("grad-accum", &o.grad_accum, 1, big, "micro-batches of a step (1)");
    integer("total-batch", &o.total_batch, 1, big,
            "sequences of a step on all ranks, in place of --grad-accum: sets it");
    integer("steps", &o.steps, 0, int64_t(1) << 50, "updates; 0 only imports and exports (1000)");
    integer("warmup", &o.schedule.warmup, 0, int64_t(1) << 50, "steps of rising learning rate (1% of --steps)");
    add("lr", "X", "peak learning rate, where the warm-up ends (1e-3)",
        [&o](const char* s) { o.schedule.peak = parse_number("lr", s, 0, 1e6); });
    choice("schedule", SCHEDULES,
           "its fall: linear, the paper's; cosine, nanoGPT's; wsd: linear, late (arXiv 2405.18392); none (linear)",
           [&o](int i) { o.schedule.decay = Decay(i); });
    add("min-lr", "X", "learning rate at the end of its fall (0, of cosine a tenth of --lr)",
        [&o](const char* s) { o.schedule.least = parse_number("min-lr", s, 0, 1e6); });
    integer("decay-steps", &o.schedule.steps, 1, int64_t(1) << 50,
            "steps of its fall: of cosine the first behind the warm-up (all), of wsd the last (a fifth of --steps)");
    number("weight-decay", &o.adamw.weight_decay, 0, 1e6, "decoupled, on every parameter (0.1)");
    toggle("no-decay-1d", "spare gains from the decay", &o.adamw.decay_1d, false);
    number("beta1", &o.adamw.beta1, 0, 0.999999, "AdamW's first moment (0.9)");
    number("beta2", &o.adamw.beta2, 0, 0.999999, "AdamW's second moment (0.95)");
    number("adam-eps", &o.adamw.eps, 1e-30, 1, "AdamW's epsilon (1e-8)");
    number("clip", &o.adamw.clip, 0, 1e30, "largest gradient norm, 0 for no clipping (1)");
    toggle("graph", "launch a micro-batch as one CUDA graph, for small models, whose kernels are short", &o.graph,
           true);

    heading("Many GPUs (one process each, started by mpirun, srun or torchrun)");
    choice("zero", {"0", "1", "2", "3"},
           "each rank keeps its part only of: nothing, AdamW's state, gradients too, weights too (1)",
           [&o](int i) { o.zero = i; });
    choice(
        "reduce", {"once", "each"},
        "with --zero 2, 3 and several micro-batches: sum gradients here first, or send each's and keep a part (once)",
        [&o](int i) { o.reduce_each = i; });
    text("rendezvous", "HOST:PORT", "where rank 0 is found by TCP (over MPI, else MASTER_ADDR:MASTER_PORT)",
         &o.rendezvous);
    add("timeout", "SECONDS", "until a rank that does not come, dies or hangs ends the job (600)",
        [&o](const char* s) { o.timeout = parse_number("timeout", s, 0.1, 1e7); });
    integer("check-every", &o.check_every, 0, int64_t(1) << 50,
            "steps between comparisons of the ranks' weights, --zero 0 to 2; 0 for none (1000)");

    heading("Memory (the plan is printed before anything is allocated)");
    choice("recompute", RECOMPUTE,
           "activations made again in the backward: of norms, RoPE and SwiGLU; of the feed-forward too; of all (none)",
           [&o](int i) { o.storage.recompute = Recompute(i); });
    choice("moments", types, "AdamW's two moments, bf16 with stochastic rounding (fp32)",
           [&o](int i) { o.storage.half_moments = i; });
    choice("gradients", types, "sums over micro-batches; bf16 rounds at each: for one or few (fp32)",
           [&o](int i) { o.storage.half_gradients = i; });
    toggle("no-master", "no float32 weights beside the bf16 ones, which are rounded stochastically",
           &o.storage.no_master, true);

    heading("Planning");
    toggle("plan", "print parameters, a step's FLOPs, bytes and least time, and the memory plan, then exit", &o.plan,
           true);
    text("device", "NAME",
         "for --plan: h200, h100, a100, 2-cores, or TFLOP/s,GB/s,GiB[,GB/s sent] (h200; of the fp32 build 2-cores)",
         &o.device);
    integer("ranks", &o.ranks, 1, 1 << 20, "for --plan: GPUs (as many as were started)");

    heading("The run's folder");
    text("out", "DIR", "log.csv and checkpoints (run)", &o.out);
    integer("save-every", &o.save_every, 0, int64_t(1) << 50,
            "steps between checkpoints, one at the end too; 0 for none (0)");
    integer("keep", &o.keep, 0, big, "checkpoints that stay, the newest; 0 for all (2)");
    toggle("keep-best", "save where the validation loss is the lowest so far; the best stays, beside --keep's",
           &o.keep_best, true);
    toggle("save-async", "write checkpoints from a copy in host memory while training goes on", &o.save_async, true);
    toggle("resume", "go on from the newest sound checkpoint in --out, or begin if there is none", &o.resume, true);
    integer("max-bad-steps", &o.max_bad_steps, 1, big,
            "steps skipped, as loss or gradient norm is not finite, until the run saves and stops (10)");

    heading("Watching");
    integer("log-every", &o.log_every, 1, big, "steps between lines on the terminal (10)");
    integer("val-every", &o.val_every, 0, big,
            "steps between validations, one at the end too; 0 for none (a tenth of --steps)");
    integer("probe", &o.probe, 0, int64_t(1) << 50,
            "steps between probes of activations, gradients, updates, and curvature over parameters and blocks' inputs "
            "(DIR/activations.csv, weights.csv, curvature.csv, curvature_inputs.csv); 0 for none (0)");
    integer("probe-iterations", &o.probe_iterations, 0, big,
            "Hessian-vector products an eigenvalue at most, two gradients each; 0: no curvature, as in bf16 (50)");
    integer("probe-batches", &o.probe_batches, 1, big, "of --val-data, else --train-data, that the probe looks at (1)");

    heading("Text", TRAIN | GENERATE);
    text("prompt", "TEXT", "what it begins with, behind BOS (BOS alone)", &o.prompt);
    integer("sample-every", &o.sample_every, 0, big, "steps between samples of text; 0 for none (0)");
    only(TRAIN);
    integer("sample-tokens", &o.sample_tokens, 1, 1 << 20, "tokens of a sample, as far as --seq-len goes (200)");
    only(TRAIN);
    text("prompt-file", "FILE", "the prompt from a file, /dev/stdin too", &o.prompt_file);
    only(GENERATE);
    integer("max-tokens", &o.max_tokens, 1, 1 << 24,
            "tokens to write; EOS or a full context end the text before (200)");
    only(GENERATE);
    integer("num-samples", &o.num_samples, 1, 1 << 16, "texts from the one prompt, --- between them (1)");
    only(GENERATE);
    heading("Sampling (in this order)", GENERATE);
    number("temperature", &o.sampling.temperature, 0, 1e6, "logits are divided by it; 0 takes the likeliest (0.8)");
    integer("top-k", &o.sampling.top_k, 0, 1 << 28, "only the N likeliest tokens; 0 for all (50)");
    number("top-p", &o.sampling.top_p, 1e-6, 1,
           "of them the fewest likeliest that have X of their probability together (1)");
    heading("Questions", EVAL);
    text("choices", "FILE", "of multiple choice (dev/data/hellaswag.py makes the file)", &o.choices);

    heading("Help", ALL_COMMANDS);
    add("help", "", "this", nullptr);
    int commands = 0;
    for (Flag& f : all) {
        if (!f.name) commands = f.commands;
        if (!f.commands) f.commands = commands;
    }
    return all;
}

inline void print_help(std::vector<Flag> all, Command command) {
    if (command == GENERATE)
        printf(
            "train_gpt generate: writes text on from a prompt (%s build). Text on stdout, all else on stderr.\n"
            "usage: ./train_gpt generate --checkpoint DIR --prompt TEXT [options]\n",
            PRECISION);
    else if (command == EVAL)
        printf(
            "train_gpt eval: validation loss, and accuracy on questions of multiple choice (%s build).\n"
            "usage: ./train_gpt eval --checkpoint DIR --val-data 'data/*_val_*.bin' [--choices FILE] [options]\n",
            PRECISION);
    else
        printf(
            "train_gpt: trains SimpleGPT and its pre-norm relatives (%s build).\n"
            "usage: ./train_gpt --train-data 'data/*_train_*.bin' [options]\n"
            "       ./train_gpt generate --help           writes text with a trained model\n"
            "       ./train_gpt eval --help               measures one\n",
            PRECISION);
    if (command != TRAIN)  // the model's options last where a checkpoint has them
        std::rotate(all.begin(), std::find_if(all.begin() + 1, all.end(), [](const Flag& f) { return !f.name; }),
                    all.end());
    for (const Flag& f : all) {
        if (!(f.commands & command)) continue;
        if (f.name)
            printf("%-40s %s\n", format("  --%s %s", f.name, f.arg.c_str()).c_str(), f.help);
        else
            printf("\n%s\n", f.help);
    }
    if (command == EVAL)
        printf(
            "\nvalidation loss: mean over all targets, nats; perplexity: exp of it; bits per byte: the sum of the "
            "losses\n"
            "  / ln 2 / bytes of the text that the targets stand for (BOS and EOS have none)\n"
            "choices: the right one has the highest log-likelihood: as it is, divided by its tokens, or by its bytes\n"
            "  without a leading space; errors are standard errors, sqrt(a (1 - a) / (questions - 1))\n"
            "One line of JSON on stdout, the same for people on stderr.\n");
    if (command == TRAIN)
        printf(
            "\nSeveral GPUs, on one node or many:\n"
            "  mpirun -n 8 ./train_gpt ...                                  Open MPI, MPICH\n"
            "  srun --ntasks-per-node=8 --gpus-per-node=8 ./train_gpt ...   Slurm\n"
            "  torchrun --no-python --nproc-per-node=8 ./train_gpt ...      PyTorch's, as any other starter that sets "
            "RANK,\n"
            "                                                               WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, "
            "MASTER_PORT\n"
            "SIGTERM, SIGINT and SIGUSR1 save a checkpoint and stop after the step; go on with --resume.\n");
    printf("\nDefaults in parentheses. Errors: one line on stderr, exit status 1.\n");
}

inline void print_flavours() {
    printf("%-14s %6s %7s %6s %9s %7s %7s %15s\n", "flavour", "dim", "layers", "heads", "kv-heads", "hidden", "vocab",
           "parameters");
    for (const Flavour& f : FLAVOURS) {
        Config c;
        apply_flavour(c, f.name);
        finish(c);
        printf("%-14s %6d %7d %6d %9d %7d %7d %15zu\n", f.name, c.C, c.L, c.NH, c.NKV, c.F(), c.V,
               build_table(c).parameters);
    }
    printf("parameters: of the simplegpt variant; nanogpt's with 1024 positions\n");
}

// Reads the command line. False: it asked only for information, which has been printed.
inline bool parse_options(Options& o, int argc, char** argv) {
    for (auto& [command, name] : COMMANDS)
        if (command != TRAIN && argc > 1 && !strcmp(argv[1], name)) o.command = Command(command);
    if (o.command != TRAIN) argc--, argv++;
    std::vector<Flag> all = flags(o);
    std::vector<option> longs;
    for (size_t i = 0; i < all.size(); i++)
        if (all[i].name && all[i].commands & o.command)
            longs.push_back({all[i].name, all[i].arg.empty() ? no_argument : required_argument, nullptr, int(i) + 256});
    longs.push_back({nullptr, 0, nullptr, 0});
    const std::string help = o.command == TRAIN ? "--help" : format("%s --help", COMMANDS.at(o.command));
    // the flavour first, wherever it stands, then what changes it
    for (int walk = 0; walk < 2; walk++) {
        optind = 0;
        opterr = 0;
        for (int found; (found = getopt_long_only(argc, argv, ":", longs.data(), nullptr)) != -1;) {
            if (found == ':') throw Error(format("%s: needs a value. See %s.", argv[optind - 1], help.c_str()));
            if (found == '?') {
                const std::string word = argv[optind - 1], name = word.substr(0, word.find('='));
                for (const Flag& f : all) {
                    if (!f.name || name != std::string("--") + f.name) continue;
                    if (f.commands & o.command)
                        throw Error(format("--%s: takes no value. See %s.", f.name, help.c_str()));
                    throw Error(
                        format("--%s: is no option of %s. See %s.", f.name, COMMANDS.at(o.command), help.c_str()));
                }
                throw Error(format("%s: unknown option. See %s.", word.c_str(), help.c_str()));
            }
            const Flag& f = all[found - 256];
            if (!strcmp(f.name, "help")) return print_help(all, o.command), false;
            if (!strcmp(f.name, "models")) return print_flavours(), false;
            if (!strcmp(f.name, "model") && walk == 0) as_options([&] { apply_flavour(o.config, optarg); });
            if (walk == 1) f.set(optarg);
            if (walk == 1 && f.shape) o.shape.push_back(f.name);
        }
    }
    if (optind < argc) throw Error(format("%s: is not an option. See %s.", argv[optind], help.c_str()));
    return true;
}
