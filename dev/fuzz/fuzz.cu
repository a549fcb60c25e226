// Coverage-guided fuzzing (libFuzzer) of whatever reads what somebody else wrote: shards, tokenizers, weights,
// checkpoints, tables, questions, the command line, the environment, the ranks' messages. dev/fuzz/run.py builds and runs
// it; the environment variable FUZZ_TARGET names the reader. AddressSanitizer and UndefinedBehaviorSanitizer look at
// every run, and a reader either takes its input or throws an Error that names the file.
#include "../run/log.h"
#include "../use/evaluate.h"
#include "../use/plan.h"

namespace {

using Bytes = std::string;

void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

std::string folder() {  // of this process, in memory where that can be
    static const std::string path = [] {
        std::string name = format("%s/train_gpt_fuzz.XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
        if (!mkdtemp(&name[0])) abort();
        static std::string made = name;
        atexit([] {
            for (const char* sub : {"/step_00000001", ""}) remove_dir(made + sub);
        });
        return name;
    }();
    return path;
}

std::string file(const char* name, const Bytes& bytes) {
    const std::string path = folder() + "/" + name;
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0 || write(fd, bytes.data(), bytes.size()) != ssize_t(bytes.size())) abort();
    close(fd);
    return path;
}

// Runs f. What it throws names `where`.
template <typename F>
void guarded(const std::string& where, F f) {
    try {
        f();
    } catch (const std::runtime_error& e) {
        require(std::string(e.what()).find(where) != std::string::npos, e.what());
    }
}

// The first bytes of an input as numbers; zeros behind its end.
struct Knobs {
    Bytes rest;
    unsigned operator()(unsigned below) {
        const unsigned x = rest.empty() ? 0 : (unsigned char)rest[0];
        if (!rest.empty()) rest.erase(0, 1);
        return x % below;
    }
};

Config tiny() {
    Config c;
    c.C = 16, c.L = 1, c.NH = 1, c.V = 8, c.T = 16, c.multiple_of = 16;
    finish(c);
    return c;
}

void shards(const Bytes& input) {
    Knobs k{input};
    const int B = 1 + k(3), T = 1 + k(9), V = 1 << k(17), world = 1 + k(2);
    const bool shuffle = k(2), two = k(2);
    const size_t half = two ? k.rest.size() / 2 : k.rest.size();
    unlink((folder() + "/shard_2.bin").c_str());
    file("shard_1.bin", k.rest.substr(0, half));
    if (two) file("shard_2.bin", k.rest.substr(half));
    guarded("shard_", [&] {
        DataLoader loader(folder() + "/shard_*.bin", B, T, V, shuffle, 7, world - 1, world);
        auto look = [&] {
            const int32_t* batch = loader.next();
            for (int i = 0; i < B * (T + 1); i++) require(batch[i] >= 0 && batch[i] < V, "a token is out of range");
        };
        for (int i = 0; i < 3; i++) look();
        loader.seek({1, loader.windows() - 1});
        look();
    });
}

void look_at_text(const Tokenizer& tokenizer, const Bytes& text) {
    const std::vector<int> ids = tokenizer.encode(text);
    Tokenizer::Stream stream(tokenizer);
    std::string piecewise;
    size_t bytes = 0;
    for (int id : ids) {
        require(id >= 0 && id < tokenizer.vocab_size(), "an id is out of range");
        stream.put(id, piecewise);
        bytes += tokenizer.text_bytes(id, bytes == 0);
    }
    stream.end(piecewise);
    if (tokenizer.vocab_size() != 258)  // of bytes alone only Stream mends what is no UTF-8
        require(tokenizer.decode(ids) == piecewise, "decode and Stream differ");
}

void tokenizer(const Bytes& input) {
    const std::string path = file("tokenizer.bin", input);
    guarded(path, [&] {
        const Tokenizer loaded = Tokenizer::load(path);
        look_at_text(loaded, " Hello, w\xc3\xb6rld's 1234\n\n\xf0\x9f\x98\x80\xff <0x41> \xe2\x96\x81x");
        look_at_text(loaded, input.substr(0, 512));
        std::string text;
        Tokenizer::Stream stream(loaded);
        for (int id = 0; id < std::min(loaded.vocab_size(), 300); id++) stream.put(id, text);
        stream.end(text);
    });
}

// Text in good tokenizers: those at byte level give it back.
void text(const Bytes& input) {
    static const std::vector<const char*> names = {"llama", "llama_json", "handmade", "rules", "cl100k", "o200k",
                                                   "gpt2_json", "unigram", "deepseek_json"};
    static std::vector<Tokenizer> all = [] {
        std::vector<Tokenizer> loaded;
        loaded.push_back(Tokenizer::bytes());
        for (const char* name : names)
            loaded.push_back(Tokenizer::load(std::string("dev/test/tokenizer/tokenizer_") + name + ".bin"));
        return loaded;
    }();
    bool valid = true;  // as the reference of UTF-8 has it: RFC 3629
    for (size_t i = 0, n; i < input.size() && valid; i += n) {
        const unsigned char c = input[i], d = i + 1 < input.size() ? input[i + 1] : 0;
        n = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
        valid = c < 0x80 || (c >= 0xc2 && c < 0xf5 && i + n <= input.size());
        for (size_t j = 1; valid && j < n; j++) valid = (input[i + j] & 0xc0) == 0x80;
        valid = valid && !(c == 0xe0 && d < 0xa0) && !(c == 0xed && d > 0x9f) && !(c == 0xf0 && d < 0x90) &&
                !(c == 0xf4 && d > 0x8f);
    }
    for (size_t i = 0; i < all.size(); i++) {
        look_at_text(all[i], input);
        if (valid && (i == 0 || all[i].byte_level()))
            require(all[i].decode(all[i].encode(input)) == input, "text does not come back");
    }
}

void weights(const Bytes& input) {
    static Model* m = [] {
        auto* made = new Model;
        plan(*made, open_device(), tiny(), 1, false);
        create(*made);
        return made;
    }();
    const std::string path = file("weights.safetensors", input);
    guarded(path, [&] {
        Safetensors opened(path);
        for (auto& [name, entry] : opened.entries)
            if (entry.dtype == "F32" || entry.dtype == "BF16" || entry.dtype == "F16") {
                const std::vector<float> values = opened.floats(name, 0, entry.elements);
                require(values.size() == entry.elements, "a tensor lacks elements");
            }
    });
    guarded(path, [&] { import_weights(*m, path); });
}

void index(const Bytes& input) {
    file("model.safetensors.index.json", input);
    guarded(folder(), [&] {
        for (const std::string& path : weight_files(folder())) {
            const std::string name = path.substr(folder().size() + 1);
            require(name.find('/') == std::string::npos && name != "..", "a name leads out of its folder");
        }
    });
}

// state.json of a checkpoint, with a checksum that holds, for what comes behind it would never be read else.
void manifest(const Bytes& input) {
    Knobs k{input};
    const bool sealed = k(4) > 0;
    Bytes text = k.rest;
    if (sealed) {
        Hash hash;
        hash.add(text.data(), text.size());
        text += "  \"checksum\": \"" + hash.text() + "\"\n}\n";
    }
    mkdir((folder() + "/step_00000001").c_str(), 0777);
    file("step_00000001/model.safetensors", "the model");
    file("step_00000001/state.json", text);
    const std::string dir = folder() + "/step_00000001";
    guarded(dir, [&] {
        const Manifest read = read_manifest(dir);
        for (const FileRecord& f : read.files)
            require(f.name.find('/') == std::string::npos, "a name leads out of its folder");
        guarded(dir, [&] { plan(*std::make_unique<Model>(), Gpu(), config_of(read, dir), 1, false); });
    });
    guarded(dir, [&] { verify_checkpoint(dir); });
    guarded(folder(), [&] { find_weights(folder()); });
}

void json(const Bytes& input) {
    guarded("JSON", [&] { parse_json(input); });
    Bytes named = input;
    named.erase(std::remove(named.begin(), named.end(), '\0'), named.end());  // has no place in a name
    require(parse_json("{" + json_text(named) + ": " + json_text(named) + "}").find(named)->string == named,
            "text does not come back from JSON");
}

void log_csv(const Bytes& input) {
    Knobs k{input};
    const int64_t step = 1 + k(250);
    const std::string path = file("log.csv", k.rest);
    guarded(path, [&] {
        Log log;
        log.open(path, step);
        log.row(step + 1, 1.0f, 1e-3, 1.0f, 1.0, nullptr, "");
        log.finish();
    });
}

void matmul_txt(const Bytes& input) {
    const std::string machine = "cublasLt 0, CPU, 16 multiprocessors, fp32";
    if (!take_matmul_choices(input, machine)) return;
    const std::string written = matmul_choices(machine);
    matmul.chosen.clear();
    require(take_matmul_choices(written, machine), "what was written cannot be read");
    require(matmul_choices(machine) == written, "what was read is not what was written");
}

void questions(const Bytes& input) {
    Knobs k{input};
    const int V = 1 + k(200), T = 1 + k(40);
    const std::string path = file("questions.bin", k.rest);
    guarded(path, [&] {
        for (const Question& q : read_questions(path, V, T)) {
            require(q.label >= 0 && q.label < int(q.choices.size()), "a label is out of range");
            for (int id : q.context) require(id >= 0 && id < V, "an id is out of range");
        }
    });
}

// Words, one a line, and then the memory plan of what they say.
void command_line(const Bytes& input) {
    std::vector<std::string> words = {"train_gpt"};
    std::istringstream in(input);
    for (std::string word; std::getline(in, word) && words.size() < 64;) words.push_back(word.c_str());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(&word[0]);
    argv.push_back(nullptr);
    guarded("", [&] {
        Options o;
        if (!parse_options(o, int(words.size()), argv.data())) return;
        if (o.device != "") parse_device(o.device);
        finish(o.config);
        if (o.config.L > 100) return;
        Model m;
        plan(m, Gpu(), o.config, std::max(1, o.batch_size), o.command == TRAIN, o.storage);
        speed_of_light(m, 1, DEVICES[0]);
        memory_plan(m);
    });
}

void environment(const Bytes& input) {
    static const char* const names[] = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "PMI_SIZE",
                                        "MPI_LOCALRANKID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                                        "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST",
                                        "SLURM_STEP_NUM_NODES", "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"};
    for (const char* name : names) unsetenv(name);
    std::istringstream in(input);  // a line: the number of a name as a letter, its value
    for (std::string line; std::getline(in, line);)
        if (!line.empty()) setenv(names[(unsigned char)line[0] % std::size(names)], line.c_str() + 1, 1);
    guarded("", [] {
        const World w = find_world();
        require(w.rank >= 0 && w.rank < w.size && w.local >= (w.size > 1 ? -1 : 0), "a rank is out of range");
    });
    guarded("", [] { default_address(); });
}

// Bytes from a rank's socket, as rank 0 takes them: before the rendezvous and after it. (-fno-access-control)
void frames(const Bytes& input) {
    Channel c;
    c.me.size = 3, c.limit = 1;
    Knobs k{input};
    const bool met = k(2);
    std::vector<Channel::Peer> peers(3);
    for (int r = 0; r < 3; r++) peers[r].rank = met ? r : -1;
    std::vector<bool> came(3);
    std::string trouble, body;
    Channel::Peer& p = peers[1];
    uint32_t kind;
    while (!k.rest.empty()) {
        const size_t n = std::min<size_t>(1 + k(64), k.rest.size());
        p.in += k.rest.substr(0, n);
        k.rest.erase(0, n);
        while (Channel::take(p, kind, body)) {
            if (met && kind != Channel::STOP) c.read(p, kind, body);
            if (!met && p.rank < 0) c.admit(p, body, "cookie", came, peers, trouble);
        }
    }
    c.peers = peers;
    c.hang(1e9);
    c.death(p, 1e9);
}

const std::map<std::string, void (*)(const Bytes&)> TARGETS = {
    {"shards", shards}, {"tokenizer", tokenizer}, {"text", text}, {"weights", weights}, {"index", index},
    {"manifest", manifest}, {"json", json}, {"log", log_csv}, {"matmul", matmul_txt}, {"questions", questions},
    {"options", command_line}, {"environment", environment}, {"channel", frames}};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const auto target = [] {
        const char* name = getenv("FUZZ_TARGET");
        const auto found = TARGETS.find(name ? name : "");
        if (found != TARGETS.end()) return found->second;
        for (auto& [known, f] : TARGETS) fprintf(stderr, "%s\n", known.c_str());
        fprintf(stderr, "fuzz: FUZZ_TARGET is none of these.\n");
        exit(1);
    }();
    target(Bytes(reinterpret_cast<const char*>(data), size));
    return 0;
}
