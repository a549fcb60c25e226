// safetensors files, in and out, and the folders of them that Hugging Face has.
#pragma once
#include <functional>
#include <map>
#include <set>

#include "file.h"
#include "json.h"

// safetensors: uint64 length of a JSON header, the header (name: dtype, shape, data_offsets), then the data.
constexpr size_t SAVE_CHUNK = size_t(16) << 20;  // bytes that are read and written at a time

struct SaveTensor {
    std::string name, dtype;
    std::vector<size_t> shape;
    size_t bytes;
    std::function<void(char* to, size_t offset, size_t count)> read;  // gives bytes of the data, from first to last
};

struct FileRecord {
    std::string name;
    uint64_t bytes;
    std::string hash;
};

inline FileRecord save_safetensors(const std::string& path, const std::vector<SaveTensor>& tensors,
                                   const Fields& metadata = {}) {
    std::string header = "{";
    size_t at = 0;
    if (!metadata.empty()) header += "\"__metadata__\":" + json_text(metadata);
    for (const SaveTensor& t : tensors) {
        header += header.size() > 1 ? "," : "";
        header += format("\"%s\":{\"dtype\":\"%s\",\"shape\":[", t.name.c_str(), t.dtype.c_str());
        for (size_t i = 0; i < t.shape.size(); i++) header += format(i ? ",%zu" : "%zu", t.shape[i]);
        header += format("],\"data_offsets\":[%zu,%zu]}", at, at + t.bytes);
        at += t.bytes;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    OutFile out(path);
    uint64_t length = header.size();
    header.insert(0, reinterpret_cast<const char*>(&length), sizeof(length));
    out.write(header);
    std::vector<char> data;
    for (const SaveTensor& t : tensors)
        for (size_t done = 0; done < t.bytes; done += data.size()) {
            data.resize(std::min(t.bytes - done, SAVE_CHUNK));
            t.read(data.data(), done, data.size());
            out.write(data.data(), data.size());
        }
    out.commit();
    return {path.substr(path.rfind('/') + 1), out.hash.total, out.hash.text()};
}

struct Safetensors {
    struct Entry {
        std::string dtype;
        std::vector<size_t> shape;
        size_t begin, bytes, elements;
    };
    std::string path;
    FILE* f = nullptr;
    std::map<std::string, Entry> entries;
    Json metadata;

    explicit Safetensors(const std::string& path) : path(path), f(open_regular(path)) {
        try {
            read_header();
        } catch (const Error& e) {
            fclose(f);
            throw Error(path + ": no safetensors file: " + e.what() + ". Give a file of weights.");
        }
    }
    ~Safetensors() { fclose(f); }
    Safetensors(const Safetensors&) = delete;

    void read_header() {
        struct stat info;
        if (fstat(fileno(f), &info)) throw Error(strerror(errno));
        const uint64_t size = info.st_size;
        uint64_t length = 0;
        if (size < 8 || fread(&length, 8, 1, f) != 1) throw Error("shorter than its header");
        if (length > size - 8 || length > (16u << 20)) throw Error("its header's length is wrong");
        std::string header(length, 0);
        if (length && fread(&header[0], length, 1, f) != 1) throw Error("shorter than its header");
        const uint64_t room = size - 8 - length;
        std::map<size_t, size_t> ranges;  // of the data, begin to end
        for (auto& [name, j] : parse_json(header).fields) {
            if (name == "__metadata__") {
                metadata = j;
                continue;
            }
            const Json *dtype = j.find("dtype"), *shape = j.find("shape"), *offsets = j.find("data_offsets");
            if (!dtype || !shape || !offsets || offsets->items.size() != 2)
                throw Error("its header lacks dtype, shape or data_offsets of " + name);
            Entry e;
            e.dtype = dtype->string;
            e.elements = 1;
            const size_t digits = e.dtype.find_first_of("0123456789");  // F32, BF16, U8, F8_E4M3; none: BOOL
            const size_t bits = digits == std::string::npos ? 8 : strtoul(&e.dtype[digits], nullptr, 10);
            for (const Json& n : shape->items) {
                if (!(n.value >= 0 && n.value <= 1e12 && n.value == floor(n.value)))
                    throw Error("a shape of " + name + " is wrong");
                e.shape.push_back(size_t(n.value));
                if (n.value > 0 && e.elements > room / size_t(n.value)) throw Error(name + " is larger than the file");
                e.elements *= size_t(n.value);
            }
            const double begin = offsets->items[0].value, end = offsets->items[1].value;
            if (!(begin >= 0 && begin <= end && end <= double(room)))
                throw Error("the data of " + name + " lies outside the file; it was cut short");
            e.begin = 8 + length + size_t(begin);
            e.bytes = size_t(end) - size_t(begin);
            if (e.bytes * 8 != e.elements * bits)
                throw Error("the data of " + name + " does not have the size of its shape");
            if (!entries.emplace(name, e).second) throw Error("its header has " + name + " twice");
            if (e.bytes && !ranges.emplace(e.begin, e.begin + e.bytes).second)
                throw Error("the data of " + name + " is also another tensor's");
        }
        size_t at = 8 + length;
        for (auto& [begin, end] : ranges) {
            if (begin != at)
                throw Error(begin < at ? "data of two tensors overlap" : "some of its data is no tensor's");
            at = end;
        }
        if (at != size) throw Error("bytes follow its last tensor");
    }

    void read(const Entry& e, void* data, size_t offset, size_t bytes) {
        if (fseeko(f, e.begin + offset, SEEK_SET) || fread(data, 1, bytes, f) != bytes)
            throw Error(path + ": cannot be read to its end: it was cut short, or the disk fails. Write it again.");
    }
    // `count` elements from `first` on, as float, of a tensor that is F32, BF16 or F16
    std::vector<float> floats(const std::string& name, size_t first, size_t count) {
        const Entry& e = entries.at(name);
        std::vector<float> values(count);
        if (e.dtype == "F32") {
            read(e, values.data(), first * 4, count * 4);
        } else {
            std::vector<uint16_t> raw(count);
            read(e, raw.data(), first * 2, count * 2);
            for (size_t i = 0; i < raw.size(); i++) {
                const uint32_t bits = uint32_t(raw[i]) << 16;
                if (e.dtype == "BF16")
                    memcpy(&values[i], &bits, 4);
                else
                    values[i] = half_value(raw[i]);
            }
        }
        return values;
    }
    // IEEE 754 binary16: sign, 5 bits of exponent biased by 15, 10 of mantissa
    static float half_value(uint16_t bits) {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float size = exponent == 31  ? mantissa ? NAN : INFINITY
                           : exponent == 0 ? ldexpf(float(mantissa), -24)
                                           : ldexpf(float(1024 + mantissa), exponent - 25);
        return bits >> 15 ? -size : size;
    }
};

inline std::string shape_text(const std::vector<size_t>& shape) {
    std::string s = "(";
    for (size_t i = 0; i < shape.size(); i++) s += format(i ? ", %zu" : "%zu", shape[i]);
    return s + ")";
}

// The files with the weights that a path means: itself, or of a folder (a checkpoint's, or one as Hugging Face has
// them) model.safetensors, else those that model.safetensors.index.json names.
inline std::vector<std::string> weight_files(const std::string& path) {
    struct stat info;
    if (stat(path.c_str(), &info) || !S_ISDIR(info.st_mode)) return {path};
    const std::string whole = path + "/model.safetensors", index = whole + ".index.json";
    if (stat(whole.c_str(), &info) == 0) return {whole};
    if (stat(index.c_str(), &info))
        throw Error(path +
                    ": holds neither model.safetensors nor model.safetensors.index.json. Give a file, or a folder "
                    "with one of them.");
    std::set<std::string> files;
    try {
        const Json json = parse_json(read_file(index));
        const Json* map = json.find("weight_map");
        for (auto& [name, file] : map ? map->fields : json.fields) {
            if (!map || file.kind != Json::text || file.string.find('/') != std::string::npos || file.string == ".." ||
                file.string == "." || file.string.empty())
                throw Error("its weight_map is missing or broken");
            files.insert(path + "/" + file.string);
        }
        if (files.empty()) throw Error("it names no files");
    } catch (const Error& e) {
        throw Error(index + ": " + e.what() + ". Fetch or write the folder again.");
    }
    return {files.begin(), files.end()};
}
