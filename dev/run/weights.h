// The model's weights from and to files: safetensors with the tensor names of the paper's released code.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "../../train_gpt.cu"
#include "safetensors.h"

bool all_finite(const std::vector<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
}

// `count` elements from `offset` on of a flat buffer, as float.
std::vector<float> get_floats(const Flat& f, size_t offset, size_t count) {
    std::vector<float> values(count);
    const void* from = f.at(offset).p;
    if (f.half) {
        std::vector<__nv_bfloat16> raw(count);
        CHECK(cudaMemcpy(raw.data(), from, count * f.width(), cudaMemcpyDeviceToHost));
        std::copy(raw.begin(), raw.end(), values.begin());
    } else {
        CHECK(cudaMemcpy(values.data(), from, count * f.width(), cudaMemcpyDeviceToHost));
    }
    return values;
}

// A unit of a flat buffer, which is cut over the ranks or not, in its own type, empty unless `wanted`; with `cut` all
// ranks must call. Goes through m.logits, which nobody uses between steps.
std::vector<char> get_unit(const Model& m, const Flat& f, bool cut, int unit, bool wanted) {
    const Unit& u = m.table.units[unit];
    const size_t width = f.width();
    std::vector<char> all(wanted ? u.size * width : 0);
    if (!cut) {
        if (wanted) CHECK(cudaMemcpy(all.data(), f.at(u.begin).p, all.size(), cudaMemcpyDeviceToHost));
        return all;
    }
    const Piece mine = m.piece(unit);
    const size_t room = logits_bytes(m) / (width * ranks.size);
    char* passing = reinterpret_cast<char*>(m.logits);
    wait_for_device(m);
    for (size_t at = 0; at < mine.size; at += room) {
        const size_t count = std::min(room, mine.size - at);
        ranks.all_gather(passing, f.at(mine.shard + at).p, count, nccl_type(f), width);
        CHECK(cudaStreamSynchronize(ranks.stream));
        ticks++;
        for (int r = 0; wanted && r < ranks.size; r++)
            CHECK(cudaMemcpy(&all[(m.table.piece(unit, r).whole - u.begin + at) * width], passing + r * count * width,
                             count * width, cudaMemcpyDeviceToHost));
    }
    return all;
}

std::vector<size_t> shape_of(const Tensor& t) {
    return t.cols ? std::vector<size_t>{t.rows, t.cols} : std::vector<size_t>{t.rows};
}

// RoPE's scaling in words, as the option has it: FACTOR,LOW,HIGH,TOKENS or none.
std::string rope_scaling_text(const RopeScaling& r) {
    return r.factor == 1 ? "none" : format("%.9g,%.9g,%.9g,%d", r.factor, r.low, r.high, r.original);
}
RopeScaling parse_rope_scaling(const std::string& text) {
    RopeScaling r;
    int used = 0;
    const bool four = sscanf(text.c_str(), "%f,%f,%f,%d%n", &r.factor, &r.low, &r.high, &r.original, &used) == 4;
    if (text != "none" && !(four && size_t(used) == text.size() && std::isfinite(r.factor + r.high)))
        throw Error("rope-scaling: '" + text + "' is not FACTOR,LOW,HIGH,TOKENS. Llama 3.2's is 32,1,4,8192.");
    return r;
}

// What a file of weights says of its model, and state.json too. What is newer stands there only if it is used, so that
// other builds and older files understand each other.
Fields model_fields(const Config& c) {
    Fields fields = {{"backbone", BACKBONES[int(c.backbone)]},
            {"variant", VARIANTS[int(c.variant)]},
            {"norm", NORMS[c.layernorm]},
            {"dim", std::to_string(c.C)},
            {"layers", std::to_string(c.L)},
            {"heads", std::to_string(c.NH)},
            {"kv_heads", std::to_string(c.NKV)},
            {"hidden", std::to_string(c.F())},
            {"vocab_size", std::to_string(c.V)},
            {"rope_theta", format("%.9g", c.rope_theta)},
            {"norm_eps", format("%.9g", c.norm_eps)},
            {"seq_len", std::to_string(c.T)},
            {"max_seq_len", std::to_string(c.max_T)}};
    if (c.rope_scaling.factor != 1) fields.push_back({"rope_scaling", rope_scaling_text(c.rope_scaling)});
    return fields;
}

// Looks at what names and shapes of tensors do not tell, if the file has an export's metadata: another norm or number
// of heads is refused, another rope_theta, rope_scaling or norm_eps, which one may want to change, is a warning.
void check_metadata(const Safetensors& file, const Config& c) {
    const Json* text = file.metadata.find("config");
    Json config;
    try {
        if (text) config = parse_json(text->string);
    } catch (const Error&) {  // another program's
    }
    for (auto& [key, value] : model_fields(c)) {
        const Json* there = config.find(key);
        const bool number = key == "rope_theta" || key == "norm_eps";
        if (!there || !(number || key == "heads" || key == "norm") || (key == "rope_theta" && !c.gated())) continue;
        const std::string& other = there->string;
        if (number ? strtof(other.c_str(), nullptr) == strtof(value.c_str(), nullptr) : other == value) continue;
        const std::string message = file.path + ": its model has " + key + " " + other + ", this one " + value + ".";
        if (!number) throw Error(message + " Make it " + other + ".");
        if (ranks.rank == 0) warn(message);
    }
    const Json* there = config.find("rope_scaling");
    const std::string other = there ? there->string : "none", mine = rope_scaling_text(c.rope_scaling);
    if (config.find("rope_theta") && c.gated() && other != mine && ranks.rank == 0)
        warn(file.path + ": its model has rope_scaling " + other + ", this one " + mine + ".");
}

// Weights from safetensors with the paper's names. All must be there, in the model's shapes, and nothing else; all are
// looked at before the first is taken.
void import_weights(Model& m, const std::string& path) {
    std::vector<std::unique_ptr<Safetensors>> files;
    std::map<std::string, Safetensors*> where;
    for (const std::string& file : weight_files(path)) {
        files.emplace_back(new Safetensors(file));
        for (auto& [name, entry] : files.back()->entries)
            if (!where.emplace(name, files.back().get()).second)
                throw Error(file + ": holds " + name + ", which another file of the folder has too. Write it again.");
        check_metadata(*files.back(), m.c);
    }
    if (where.count("model.embed_tokens.weight") || where.count("transformer.wte.weight"))
        throw Error(path + ": has Hugging Face's names of tensors. Convert it first: dev/hf/import.py.");
    std::set<std::string> known;
    for (const Tensor& t : m.table.tensors) {
        known.insert(t.name);
        if (!where.count(t.name))
            throw Error(path + ": lacks the tensor " + t.name + ". Check backbone, variant and layers.");
        const Safetensors& file = *where[t.name];
        const Safetensors::Entry& entry = file.entries.at(t.name);
        if (entry.shape != shape_of(t))
            throw Error(file.path + ": " + t.name + " is " + shape_text(entry.shape) + " there, " +
                        shape_text(shape_of(t)) + " in this model. Check the model's shape.");
        if (entry.dtype != "F32" && entry.dtype != "BF16" && entry.dtype != "F16")
            throw Error(file.path + ": " + t.name + " is " + entry.dtype + ". Only F32, BF16 and F16 can be read.");
    }
    for (auto& [name, file] : where)
        if (!known.count(name))
            throw Error(file->path + ": holds " + name + ", which this model lacks. Check variant and layers.");
    bool warned = false;
    fill_parameters(m, [&](std::vector<float>& values, const Tensor& t, size_t, size_t first, size_t count) {
        const size_t there = first < t.size() ? std::min(count, t.size() - first) : 0;
        values = where[t.name]->floats(t.name, first, there);
        if (ranks.rank == 0 && !warned && !all_finite(values)) {
            warn(where[t.name]->path + ": " + t.name + " holds values that are not finite. Take other weights.");
            warned = true;
        }
        values.resize(count, 0.0f);
    });
}

// The weights (the masters, if there are any), with the paper's names: as float32, or `half` rounded to bf16. All ranks
// call, the first writes.
void export_weights(const Model& m, const std::string& path, bool half) {
    const bool cut = m.master ? m.storage.cut_state() : m.storage.cut_weights();
    const Flat flat = m.master ? Flat(m.master) : Flat(m.params);
    int held = -1;
    std::vector<char> unit;
    wait_for_device(m);
    auto get = [&](int u) {
        if (u != held) unit = get_unit(m, flat, cut, u, ranks.rank == 0), held = u;
    };
    if (ranks.rank > 0) {
        for (int u = 0; cut && u < m.units(); u++) get(u);
        return;
    }
    std::vector<SaveTensor> tensors;
    const size_t width = half ? sizeof(__nv_bfloat16) : sizeof(float);
    for (const Tensor& t : m.table.tensors)
        tensors.push_back({t.name, half ? "BF16" : "F32", shape_of(t), t.size() * width,
                           [&, at = t.offset](char* to, size_t offset, size_t count) {
                               const int u = m.table.unit_of(at);
                               get(u);
                               const size_t first = at - m.table.units[u].begin + offset / width;
                               for (size_t i = 0; i < count / width; i++) {
                                   float x;
                                   __nv_bfloat16 y;
                                   if (flat.half) {
                                       memcpy(&y, &unit[(first + i) * sizeof(y)], sizeof(y));
                                       x = float(y);
                                   } else {
                                       memcpy(&x, &unit[(first + i) * sizeof(x)], sizeof(x));
                                       y = __float2bfloat16_rn(x);
                                   }
                                   half ? memcpy(to + i * width, &y, width) : memcpy(to + i * width, &x, width);
                               }
                           }});
    // "format" is what Hugging Face's readers look for
    save_safetensors(path, tensors, {{"format", "pt"}, {"config", json_text(model_fields(m.c))}});
    const size_t slash = path.rfind('/');
    fsync_dir(slash == std::string::npos ? "." : path.substr(0, slash + 1));
}
