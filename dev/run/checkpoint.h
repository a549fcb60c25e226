// Checkpoint: a directory OUT/step_NNNNNNNN. Of n ranks each writes its shard:
//   model.safetensors, or model-0000I-of-0000K.safetensors and an index of them as Hugging Face has it: the weights as
//                                trained, with the paper's names, whole tensors; units are dealt to the ranks
//   optimizer_rankR.safetensors  the shard of the moments and, in bf16, the masters
//   state.json                   step, seed, configuration, schedule, the loader's position, counts, the tokenizer's
//                                path and XXH64 if the run had one; size and XXH64 of every other file, and of itself.
//                                Random numbers are functions of seed and step: there is no other state.
// It is the same at every ZeRO level. Files are written to OUT/.step_NNNNNNNN and fsynced; when every rank has told the
// first that its own are there, that one writes state.json and renames: what has the name is complete. What cannot be
// written is given up with a warning, training goes on, and the checkpoints before it stay.
#pragma once
#include <thread>

#include "../../dataloader.h"
#include "channel.h"
#include "weights.h"

// What a checkpoint and a run must share.
Fields config_fields(const Config& c, const Storage& s) {
    Fields fields = model_fields(c);
    const Fields storage = {{"precision", PRECISION},
                            {"gradients", s.half_gradients ? "bf16" : "fp32"},
                            {"moments", s.half_moments ? "bf16" : "fp32"},
                            {"master", s.no_master ? "none" : "fp32"}};
    fields.insert(fields.end(), storage.begin(), storage.end());
    return fields;
}

struct TrainState {
    int64_t step = 0;  // done
    uint64_t seed = 0;
    LoaderState loader = {0, 0};
    int64_t updates = 0, skipped = 0;  // of the steps
    uint64_t windows = 0;              // of the data
    Schedule schedule;
    int64_t steps = -1;     // of the run; -1: unknown, as is the schedule
    Fields training = {};   // what else the steps so far depend on, under the options' names
    int64_t best_step = 0;  // with the lowest validation loss, of --keep-best; 0: none
    double best_loss = INFINITY;
};

// What a checkpoint says of the schedule, which a resume may change, under the options' names.
Fields schedule_fields(const Schedule& a, int64_t steps) {
    auto number = [](double x) {
        const std::string text = format("%.15g", x);
        return strtod(text.c_str(), nullptr) == x ? text : format("%.17g", x);
    };
    Fields fields = {{"schedule", SCHEDULES[int(a.decay)]},
                     {"steps", std::to_string(steps)},
                     {"warmup", std::to_string(a.warmup)},
                     {"lr", number(a.peak)}};
    if (a.decay != Decay::constant) fields.push_back({"min_lr", number(a.least)});
    if (a.decay == Decay::cosine || a.decay == Decay::wsd) fields.push_back({"decay_steps", std::to_string(a.steps)});
    return fields;
}
// And back; nothing where it is missing, as in an earlier build's, or unknown.
void read_schedule(const Json* fields, TrainState& state) {
    auto text = [&](const char* key) {
        const Json* there = fields ? fields->find(key) : nullptr;
        return there ? there->string : std::string();
    };
    auto integer = [&](const char* key) { return int64_t(strtoll(text(key).c_str(), nullptr, 10)); };
    const auto name = std::find(SCHEDULES.begin(), SCHEDULES.end(), text("schedule"));
    if (name == SCHEDULES.end() || text("steps").empty()) return;
    Schedule& a = state.schedule;
    a.decay = Decay(name - SCHEDULES.begin()), state.steps = integer("steps"), a.warmup = integer("warmup");
    a.peak = strtod(text("lr").c_str(), nullptr), a.least = strtod(text("min_lr").c_str(), nullptr);
    a.steps = a.decay == Decay::linear ? state.steps - a.warmup : integer("decay_steps");
}

std::string checkpoint_name(int64_t step) { return format("step_%08lld", (long long)step); }

// Steps of the complete checkpoints in a directory, ascending.
std::vector<int64_t> list_checkpoints(const std::string& out) {
    std::vector<int64_t> steps;
    for (const std::string& name : names_in(out)) {
        if (name.compare(0, 5, "step_")) continue;
        const int64_t step = strtoll(name.c_str() + 5, nullptr, 10);
        if (checkpoint_name(step) == name) steps.push_back(step);
    }
    std::sort(steps.begin(), steps.end());
    return steps;
}

// A checkpoint loses its name first: cut off in the middle, the removal leaves nothing that looks like one.
void remove_checkpoint(const std::string& out, int64_t step) {
    const std::string name = checkpoint_name(step), old = out + "/.old_" + name;
    remove_dir(old);
    if (rename((out + "/" + name).c_str(), old.c_str()) == 0) remove_dir(old);
}

// What an interrupted save or removal has left.
void remove_leftovers(const std::string& out) {
    for (const std::string& name : names_in(out))
        if (!name.compare(0, 6, ".step_") || !name.compare(0, 10, ".old_step_")) remove_dir(out + "/" + name);
}

std::vector<std::pair<std::string, Flat>> optimizer_state(const Model& m) {
    std::vector<std::pair<std::string, Flat>> parts = {{"m", m.m}, {"v", m.v}};
    if (m.master) parts.push_back({"master", m.master});
    return parts;
}
std::string optimizer_file(int rank) { return format("optimizer_rank%d.safetensors", rank); }

// The files of weights of a checkpoint: as many as ranks, if there are units enough.
int model_files(const Model& m) { return std::min(ranks.size, m.units()); }
int model_file_of(const Model& m, int unit) { return int(int64_t(unit) * model_files(m) / m.units()); }
std::string model_file(const Model& m, int i) {
    return model_files(m) == 1 ? "model.safetensors" : format("model-%05d-of-%05d.safetensors", i + 1, model_files(m));
}

// Writes checkpoints, in the foreground or, from a copy in host memory, behind the training's back.
struct Saver {
    std::string out;
    int keep = 0;      // the newest that stay, 0: all
    int64_t best = 0;  // stays too
    bool background = false;
    std::string tokenizer;  // lines of state.json
    std::string failure;    // why the last save was given up, "" if it was not; the first rank's, after finish()

    // One file of this rank, by name.
    using Files = std::vector<std::pair<std::string, std::vector<SaveTensor>>>;
    std::thread writer;
    std::atomic<bool> written{false};  // this rank's own files are
    int64_t step = 0;                  // that is saved
    char* copy = nullptr;              // pinned, of copy_bytes
    size_t copy_bytes = 0;

    ~Saver() {
        if (writer.joinable()) writer.join();
        if (copy) cudaFreeHost(copy);
    }

    void finish() {
        if (!writer.joinable()) return;
        channel.progress(WRITING, step);
        while (!written) usleep(1000);
        channel.progress(WAITING, step);
        writer.join();
    }

    // All ranks call, between steps. Returns when the training may go on.
    void save(Model& m, const TrainState& state) {
        finish();
        step = state.step, best = state.best_step, written = false;
        channel.progress(WRITING, step);
        wait_for_device(m);
        Files files = own_files(m);
        const std::string head = manifest_head(m, state) + tokenizer;
        const std::vector<std::string> index = weight_index(m);
        if (background && copy_all(files) && start_writer(files, head, index)) return;
        write_own(files);
        channel.progress(WAITING, step);
        if (ranks.rank == 0) complete_all(head, index);
    }

private:
    // To the watch, who is at the first of these is behind those that are at the second.
    static constexpr const char *WRITING = "saving", *WAITING = "waiting for all ranks' files";
    std::string report;                                // of this rank, for the first
    std::vector<std::pair<int, std::string>> reports;  // to the first, of saves that others have begun before it

    Files own_files(Model& m) {
        Files files;
        std::vector<SaveTensor> weights, state;
        const bool cut = m.storage.cut_weights();
        for (int u = 0; u < m.units(); u++) {
            std::shared_ptr<std::vector<char>> gathered;
            const bool mine = model_file_of(m, u) == ranks.rank;
            if (cut) gathered.reset(new std::vector<char>(get_unit(m, m.params, true, u, mine)));
            if (!mine) continue;
            const Unit& unit = m.table.units[u];
            for (size_t i = unit.tensor; i < unit.tensor + unit.tensors; i++) {
                const Tensor& t = m.table.tensors[i];
                auto read = [p = m.params + t.offset, gathered, skip = (t.offset - unit.begin) * sizeof(floatX)](
                                char* to, size_t offset, size_t count) {
                    if (gathered) return void(memcpy(to, gathered->data() + skip + offset, count));
                    const char* from = reinterpret_cast<const char*>(p) + offset;
                    CHECK(cudaMemcpy(to, from, count, cudaMemcpyDeviceToHost));
                };
                weights.push_back({t.name, DTYPE, shape_of(t), t.size() * sizeof(floatX), read});
            }
        }
        if (!weights.empty()) files.push_back({model_file(m, ranks.rank), weights});
        for (auto& [part, flat] : optimizer_state(m)) {
            // the shard's bytes from `offset` on: of all that is here, or of the pieces
            auto read = [&m, flat = flat](char* to, size_t offset, size_t count) {
                const size_t width = flat.width(), first = offset / width, end = first + count / width;
                for (int u = 0; u < m.units(); u++) {
                    const Piece p = m.piece(u);
                    const size_t begin = std::max(first, p.shard), stop = std::min(end, p.shard + p.size);
                    if (begin >= stop) continue;
                    const size_t at = m.storage.cut_state() ? begin : p.whole + begin - p.shard;
                    CHECK(cudaMemcpy(to + (begin - first) * width, flat.at(at).p, (stop - begin) * width,
                                     cudaMemcpyDeviceToHost));
                }
            };
            const size_t size = m.table.shard_size();
            state.push_back({part, flat.dtype(), {size}, size * flat.width(), read});
        }
        files.push_back({optimizer_file(ranks.rank), state});
        return files;
    }

    // The device's bytes to host memory, so that the device may go on. False: there is not enough of it.
    bool copy_all(Files& files) {
        size_t bytes = 0;
        for (auto& [name, tensors] : files)
            for (SaveTensor& t : tensors) bytes += t.bytes;
        if (bytes > copy_bytes) {
            if (copy) cudaFreeHost(copy);
            copy = nullptr, copy_bytes = 0;
            if (cudaMallocHost(&copy, bytes) != cudaSuccess) {
                cudaGetLastError();
                warn(format("checkpoint: no %.1f GiB of host memory for a copy; saving in the foreground.",
                            bytes / 1073741824.0));
                return background = false;
            }
            copy_bytes = bytes;
        }
        char* at = copy;
        for (auto& [name, tensors] : files)
            for (SaveTensor& t : tensors) {
                for (size_t done = 0; done < t.bytes;) {
                    const size_t count = std::min(t.bytes - done, SAVE_CHUNK);
                    t.read(at + done, done, count);
                    done += count;
                    ticks++;
                }
                t.read = [from = at](char* to, size_t offset, size_t count) { memcpy(to, from + offset, count); };
                at += t.bytes;
            }
        return true;
    }

    // False: no thread can be started.
    bool start_writer(const Files& files, const std::string& head, const std::vector<std::string>& index) {
        try {
            writer = std::thread([this, files, head, index] {
                write_own(files);
                written = true;
                if (ranks.rank == 0) complete_all(head, index);
            });
        } catch (const std::system_error& e) {
            warn(std::string("checkpoint: ") + e.what() + "; saving in the foreground.");
            return false;
        }
        return true;
    }

    static std::string manifest_head(const Model& m, const TrainState& s) {
        std::string json =
            format("{\n  \"step\": %lld,\n  \"seed\": %llu,\n  \"updates\": %lld,\n  \"skipped\": %lld,\n",
                   (long long)s.step, (unsigned long long)s.seed, (long long)s.updates, (long long)s.skipped);
        json += format("  \"ranks\": %d,\n  \"loader\": {\"epoch\": %llu, \"window\": %llu, \"windows\": %llu},\n",
                       ranks.size, (unsigned long long)s.loader.epoch, (unsigned long long)s.loader.window,
                       (unsigned long long)s.windows);
        json += "  \"config\": " + json_text(config_fields(m.c, m.storage)) + ",\n";
        json += "  \"schedule\": " + json_text(schedule_fields(s.schedule, s.steps)) + ",\n";
        if (s.best_step > 0)
            json += format("  \"best\": {\"step\": %lld, \"val_loss\": %.9g},\n", (long long)s.best_step, s.best_loss);
        return json + "  \"training\": " + json_text(s.training) + ",\n";
    }

    // Lines of Hugging Face's index; none with one file.
    static std::vector<std::string> weight_index(const Model& m) {
        std::vector<std::string> lines;
        if (ranks.rank > 0 || model_files(m) == 1) return lines;
        for (const Tensor& t : m.table.tensors)
            lines.push_back("\"" + t.name + "\": \"" + model_file(m, model_file_of(m, m.table.unit_of(t.offset))) +
                            "\"");
        return lines;
    }

    std::string unfinished() const { return out + "/." + checkpoint_name(step); }

    // Writes this rank's files and tells the first rank how that went, in lines: "saved STEP" and the files, or "failed
    // STEP" and why.
    void write_own(const Files& files) {
        const std::string dir = unfinished();
        report = format("saved %lld\n", (long long)step);
        try {
            if (mkdir(dir.c_str(), 0777) && errno != EEXIST)
                throw Error(dir + ": cannot be made: " + strerror(errno) + ". Give a place with room and rights.");
            for (auto& [file, tensors] : files) {
                const FileRecord r = save_safetensors(dir + "/" + file, tensors);
                report += format("%s %llu %s\n", r.name.c_str(), (unsigned long long)r.bytes, r.hash.c_str());
            }
        } catch (const std::exception& e) {
            report = format("failed %lld\n%s\n", (long long)step, reason(e).c_str());
        }
        if (ranks.rank > 0) channel.send_report(report);
    }

    // The first rank waits for all and completes the checkpoint, or gives it up.
    void complete_all(const std::string& head, const std::vector<std::string>& index) {
        try {
            std::vector<FileRecord> records = gather_reports();
            complete(records, head, index);
            failure = "";
        } catch (const std::exception& e) {
            remove_dir(unfinished());
            failure = reason(e);
            warn(format("no checkpoint of step %lld: %s", (long long)step, failure.c_str()));
        }
    }

    // What all ranks have written; throws what one of them could not, once none writes any more.
    std::vector<FileRecord> gather_reports() {
        std::vector<FileRecord> records;
        std::string error;
        auto step_of = [](const std::string& text) { return strtoll(text.c_str() + text.find(' '), nullptr, 10); };
        auto take = [&](int rank, const std::string& text) {
            char word[16], name[256], hash[32];
            int used = 0, n;
            unsigned long long bytes;
            if (sscanf(text.c_str(), "%15s %*d\n%n", word, &used) != 1) return;
            const char* p = text.c_str() + used;
            if (strcmp(word, "failed") == 0 && error.empty())
                error = (rank ? format("rank %d: ", rank) : "") + std::string(p, strcspn(p, "\n"));
            if (strcmp(word, "saved") == 0)
                for (; sscanf(p, "%255s %llu %31s\n%n", name, &bytes, hash, &n) == 3; p += n)
                    records.push_back({name, bytes, hash});
        };
        take(0, report);
        for (int missing = ranks.size - 1;;) {
            std::vector<std::pair<int, std::string>> later;
            for (auto& [rank, text] : reports) {
                if (step_of(text) == step) take(rank, text), missing--;
                if (step_of(text) > step) later.push_back({rank, text});
            }
            reports = later;
            if (missing == 0) break;
            for (auto& r : channel.take_reports(0.5)) reports.push_back(r);  // the watch sees who does not come
        }
        if (!error.empty()) throw Error(error);
        return records;
    }

    void complete(std::vector<FileRecord>& records, const std::string& head, const std::vector<std::string>& index) {
        const std::string dir = unfinished();
        if (!index.empty()) {
            std::string json = "{\"metadata\": {}, \"weight_map\": {\n";
            for (const std::string& line : index) json += line + (&line == &index.back() ? "\n" : ",\n");
            OutFile file(dir + "/model.safetensors.index.json");
            file.write(json + "}}\n");
            file.commit();
            records.push_back({"model.safetensors.index.json", file.hash.total, file.hash.text()});
        }
        std::string json = head + "  \"files\": {";
        std::set<std::string> ours = {"state.json"};
        for (const FileRecord& r : records) {
            json += json.back() == '{' ? "\n" : ",\n";
            json += format("    \"%s\": {\"bytes\": %llu, \"xxh64\": \"%s\"}", r.name.c_str(),
                           (unsigned long long)r.bytes, r.hash.c_str());
            ours.insert(r.name);
        }
        json += "},\n";
        Hash hash;
        hash.add(json.data(), json.size());
        OutFile state(dir + "/state.json");
        state.write(json + "  \"checksum\": \"" + hash.text() + "\"\n}\n");
        state.commit();
        for (const std::string& name : names_in(dir))  // of an earlier try, by other ranks
            if (name[0] != '.' && !ours.count(name)) unlink((dir + "/" + name).c_str());
        fsync_dir(dir);
        const std::string final_dir = out + "/" + checkpoint_name(step);
        remove_checkpoint(out, step);  // of another run's, else this step would not have come again
        if (rename(dir.c_str(), final_dir.c_str()))
            throw Error(final_dir + ": cannot be made: " + strerror(errno) + ". Check the run's folder.");
        fsync_dir(out);
        std::vector<int64_t> steps = list_checkpoints(out);
        steps.erase(std::remove(steps.begin(), steps.end(), best), steps.end());
        for (size_t i = 0; keep > 0 && i + keep < steps.size(); i++) remove_checkpoint(out, steps[i]);
    }
};

// The hash of a tokenizer's file; that of the bytes has none.
std::string tokenizer_hash(const std::string& path) {
    Hash hash;
    const std::string text = path == "bytes" ? "" : read_file(path);
    hash.add(text.data(), text.size());
    return hash.text();
}

// What state.json says of the tokenizer of the data; "" of none.
std::string tokenizer_lines(const std::string& tokenizer) {
    if (tokenizer.empty()) return "";
    const std::unique_ptr<char, decltype(&::free)> path(realpath(tokenizer.c_str(), nullptr), &::free);
    const std::string name = tokenizer == "bytes" || !path ? tokenizer : path.get();
    return "  \"tokenizer\": " + json_text(name) + ",\n  \"tokenizer_xxh64\": \"" + tokenizer_hash(tokenizer) + "\",\n";
}

struct Manifest {
    TrainState state;
    int ranks = 0;
    Json json;
    std::vector<FileRecord> files;
};

Manifest read_manifest(const std::string& dir) {
    const std::string path = dir + "/state.json", text = read_file(path);
    Manifest m;
    try {
        const size_t end = text.rfind("  \"checksum\"");
        Hash hash;
        hash.add(text.data(), std::min(end, text.size()));
        m.json = parse_json(text);
        const Json *checksum = m.json.find("checksum"), *files = m.json.find("files");
        if (end == std::string::npos || !checksum || checksum->string != hash.text())
            throw Error("its checksum is wrong, it was damaged");
        auto number = [](const Json* in, const char* key) {
            const Json* n = in ? in->find(key) : nullptr;
            if (!n || n->kind != Json::number || n->string.find_first_not_of("0123456789") != std::string::npos)
                throw Error(std::string("lacks the whole number ") + key);
            return strtoull(n->string.c_str(), nullptr, 10);
        };
        m.state.step = int64_t(number(&m.json, "step"));
        m.state.seed = number(&m.json, "seed");
        const Json* loader = m.json.find("loader");
        m.state.loader = {number(loader, "epoch"), number(loader, "window")};
        m.state.windows = number(loader, "windows");
        read_schedule(m.json.find("schedule"), m.state);
        if (const Json* training = m.json.find("training"))
            for (auto& [key, value] : training->fields) m.state.training.push_back({key, value.string});
        if (const Json* best = m.json.find("best")) {
            m.state.best_step = int64_t(number(best, "step"));
            const Json* loss = best->find("val_loss");
            if (loss && loss->kind == Json::number) m.state.best_loss = strtod(loss->string.c_str(), nullptr);
        }
        m.state.updates = int64_t(number(&m.json, "updates")), m.state.skipped = int64_t(number(&m.json, "skipped"));
        const uint64_t ranks = number(&m.json, "ranks"), most = uint64_t(1) << 50;
        if (ranks < 1 || ranks > 1 << 20 || !files) throw Error("lacks ranks or files");
        if (std::max({uint64_t(m.state.step), uint64_t(m.state.updates), uint64_t(m.state.skipped)}) > most)
            throw Error("counts more steps than a run can have");
        m.ranks = int(ranks);
        for (auto& [name, f] : files->fields) {
            const Json* hash = f.find("xxh64");
            if (!hash || name.find('/') != std::string::npos) throw Error("has a bad entry for " + name);
            m.files.push_back({name, number(&f, "bytes"), hash->string});
        }
    } catch (const Error& e) {
        throw Error(path + ": " + e.what() + ".");
    }
    return m;
}

// Reads this rank's share of a checkpoint's files, or of those with weights, to see that they are as they were written.
// Returns its step.
int64_t verify_checkpoint(const std::string& dir, bool weights_only = false) {
    const Manifest m = read_manifest(dir);
    std::vector<char> data(SAVE_CHUNK);
    for (size_t i = ranks.rank; i < m.files.size(); i += ranks.size) {
        if (weights_only && m.files[i].name.compare(0, 5, "model")) continue;
        const std::string path = dir + "/" + m.files[i].name;
        const std::unique_ptr<FILE, int (*)(FILE*)> f(open_regular(path), &fclose);
        struct stat info;
        if (fstat(fileno(f.get()), &info) || uint64_t(info.st_size) != m.files[i].bytes)
            throw Error(path + format(": has %llu bytes, %llu were written.", (unsigned long long)info.st_size,
                                      (unsigned long long)m.files[i].bytes));
        Hash hash;
        for (size_t n; (n = fread(data.data(), 1, data.size(), f.get())) > 0; ticks++) hash.add(data.data(), n);
        if (ferror(f.get())) throw Error(path + ": cannot be read to its end: " + strerror(errno) + ".");
        if (hash.text() != m.files[i].hash) throw Error(path + ": its checksum is wrong, it was damaged.");
    }
    return m.state.step;
}

// The checkpoint that a path means, itself or of a run's folder the newest, whose weights are as they were written.
std::string find_weights(const std::string& path) {
    if (access((path + "/state.json").c_str(), F_OK) == 0) {
        try {
            verify_checkpoint(path, true);
        } catch (const Error& e) {
            throw Error(std::string(e.what()) + " Give another checkpoint.");
        }
        return path;
    }
    std::vector<int64_t> steps = list_checkpoints(path);
    if (steps.empty())
        throw Error(path +
                    ": is no checkpoint and holds none. Give a checkpoint, or the folder of a run that saved some.");
    std::string trouble;
    for (; !steps.empty(); steps.pop_back()) {
        std::string dir = path + "/" + checkpoint_name(steps.back());
        try {
            verify_checkpoint(dir, true);
            if (!trouble.empty()) warn(trouble + " Taking " + dir + ".");
            return dir;
        } catch (const Error& e) {
            if (trouble.empty()) trouble = e.what();
        }
    }
    throw Error(trouble + " No other checkpoint in " + path + " is sound. Give another folder.");
}

// The configuration that a checkpoint was written with; its precision may be another than this build's.
Config config_of(const Manifest& manifest, const std::string& dir) {
    const Json* config = manifest.json.find("config");
    auto text = [&](const char* key) {
        const Json* there = config ? config->find(key) : nullptr;
        if (!there) throw Error(std::string("lacks ") + key + ". Take another checkpoint.");
        return there->string;
    };
    auto integer = [&](const char* key) {
        return int(std::max(-1ll, std::min<long long>(strtoll(text(key).c_str(), nullptr, 10), INT_MAX)));
    };
    auto choice = [&](const char* key, const Words& words) {
        for (size_t i = 0; i < words.size(); i++)
            if (text(key) == words[i]) return int(i);
        throw Error(std::string("has an unknown ") + key + ", " + text(key) + ". Take the build that wrote it.");
    };
    Config c;
    try {
        c.backbone = Backbone(choice("backbone", BACKBONES));
        c.variant = Variant(choice("variant", VARIANTS));
        c.layernorm = choice("norm", NORMS);
        c.C = integer("dim"), c.L = integer("layers"), c.NH = integer("heads"), c.NKV = integer("kv_heads");
        c.hidden = integer("hidden"), c.V = integer("vocab_size");
        c.T = integer("seq_len"), c.max_T = integer("max_seq_len");
        c.rope_theta = strtof(text("rope_theta").c_str(), nullptr);
        if (config->find("rope_scaling")) c.rope_scaling = parse_rope_scaling(text("rope_scaling"));
        c.norm_eps = strtof(text("norm_eps").c_str(), nullptr);
        finish(c);
        const Fields known = config_fields(c, Storage());
        for (auto& [key, value] : config->fields) {
            auto is_key = [&, &key = key](auto& field) { return field.first == key; };
            if (std::none_of(known.begin(), known.end(), is_key))
                throw Error("has " + key + ", which this build does not know. Take the one that wrote it.");
        }
    } catch (const Error& e) {
        throw Error(dir + "/state.json: " + e.what());
    }
    return c;
}

// Takes a checkpoint of any number of ranks.
TrainState load_checkpoint(Model& m, const std::string& dir) {
    const Manifest manifest = read_manifest(dir);
    const Json* config = manifest.json.find("config");
    const Config theirs = config_of(manifest, dir);  // refuses what this build does not know
    const std::string scaling = rope_scaling_text(theirs.rope_scaling), mine = rope_scaling_text(m.c.rope_scaling);
    if (scaling != mine)  // which only one of them may name
        throw Error(dir + "/state.json: the checkpoint has rope_scaling " + scaling + ", this run " + mine +
                    ". Resume with the options of the first run.");
    for (auto& [key, value] : config_fields(m.c, m.storage)) {
        const Json* there = config ? config->find(key) : nullptr;
        if (!there || there->string != value)
            throw Error(dir + "/state.json: the checkpoint has " + key + " " + (there ? there->string : "unknown") +
                        ", this run " + value + ". Resume with the options of the first run.");
    }
    import_weights(m, dir);

    // Pieces of n ranks from those of as many as there were: within a unit, positions mean the same.
    const TensorTable old = build_table(m.c, manifest.ranks);
    std::vector<char> values;
    for (int r = 0; r < old.ranks; r++) {
        std::unique_ptr<Safetensors> file;
        for (auto& [part, flat] : optimizer_state(m)) {
            for (int u = 0; u < m.units(); u++) {
                const Unit &unit = m.table.units[u], &old_unit = old.units[u];
                const Piece own = m.piece(u), before = old.piece(u, r);
                const bool cut = m.storage.cut_state();
                const size_t from = cut ? own.whole - unit.begin : 0, to = from + (cut ? own.size : unit.size);
                const size_t begin = std::max(from, before.whole - old_unit.begin);
                const size_t end = std::min(to, before.whole - old_unit.begin + before.size);
                if (begin >= end) continue;
                if (!file) file.reset(new Safetensors(dir + "/" + optimizer_file(r)));
                auto found = file->entries.find(part);
                if (found == file->entries.end() || found->second.elements != old.shard_size() ||
                    found->second.dtype != flat.dtype())
                    throw Error(file->path + ": lacks the tensor " + part +
                                " or has it in another shape. Delete this checkpoint to resume from the one before.");
                const size_t at = before.shard + begin - (before.whole - old_unit.begin), width = flat.width();
                values.resize((end - begin) * width);
                file->read(found->second, values.data(), at * width, values.size());
                CHECK(cudaMemcpy(flat.at(cut ? own.shard + begin - from : unit.begin + begin).p, values.data(),
                                 values.size(), cudaMemcpyHostToDevice));
                ticks++;
            }
        }
    }
    Numbers n = {};
    n.updates = manifest.state.updates, n.skipped = manifest.state.skipped;
    CHECK(cudaMemcpy(m.numbers, &n, sizeof(n), cudaMemcpyHostToDevice));
    return manifest.state;
}
