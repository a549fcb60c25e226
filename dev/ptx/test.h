// The frame of the machine's tests: kernels as text, launched over several seeds; what must be reported is.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>

#include "ptx.h"

inline std::string format(const char* text, ...) {
    char line[1000];
    va_list list;
    va_start(list, text);
    vsnprintf(line, sizeof line, text, list);
    va_end(list);
    return line;
}

#include "../test/frame.h"

// Global memory. Before every run all buffers are again as they were before the first.
struct Memory {
    Memory();
    virtual ~Memory();
    virtual void reset() = 0;
};
inline std::vector<Memory*>& memories() {
    static std::vector<Memory*> all;
    return all;
}
inline Memory::Memory() { memories().push_back(this); }
inline Memory::~Memory() {
    for (size_t i = 0; i < memories().size(); i++)
        if (memories()[i] == this) memories().erase(memories().begin() + i), i--;
}

template <class T>
struct Buffer : Memory {
    size_t count;
    char* block;  // what lies around the buffer is of no allocation
    T* at;
    std::vector<T> before;
    explicit Buffer(size_t count, T fill = T()) : count(count) {
        block = (char*)aligned_alloc(1024, (count * sizeof(T) + 3 * 1024) / 1024 * 1024);
        at = (T*)(block + 1024);
        for (size_t i = 0; i < count; i++) at[i] = fill;
        ptx::allocated(at, count * sizeof(T));
    }
    ~Buffer() override {
        ptx::freed(at);
        free(block);
    }
    Buffer(const Buffer&) = delete;
    void operator=(const Buffer&) = delete;
    void reset() override {
        if (before.empty()) before.assign(at, at + count);
        std::copy(before.begin(), before.end(), at);
    }
    T& operator[](size_t i) { return at[i]; }
    operator ptx::Arg() { return {&at, sizeof at}; }
};

struct Uniform {  // random numbers, the same everywhere
    uint64_t state;
    uint64_t operator()() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        uint64_t x = state ^ (state >> 29);
        x *= 0xbf58476d1ce4e5b9u;
        return x ^ (x >> 32);
    }
};

// A kernel named tried. Parameters are `.u64, .u32, .align 64 .b8 [128]` and so on; before the body those of .u64 are
// in %a<i> as global addresses, those of .u32 in %u<i>, and %tx, %bx, %warp and %lane are there. `WAIT bar, parity` in
// a body is the loop that waits for an mbarrier. Lines count from some thousand, so that a report names no other
// number.
struct Text {
    std::string params, body, before{}, tuning{};
};

inline std::vector<std::string> split(const std::string& text, char at) {
    std::vector<std::string> parts(1);
    for (char c : text)
        if (c == at)
            parts.emplace_back();
        else
            parts.back() += c;
    return parts;
}

inline std::string module(const Text& text, const char* target = "sm_90a") {
    std::string out = ".version 9.0\n.target " + std::string(target) + "\n.address_size 64\n" + std::string(4000, '\n');
    std::string declared, loads;
    std::vector<std::string> params;
    if (!text.params.empty()) params = split(text.params, ',');
    for (size_t i = 0; i < params.size(); i++) {
        std::string p = params[i], name = format("tried_param_%zu", i);
        p.erase(0, p.find_first_not_of(' '));
        size_t array = p.find('[');
        declared += (i ? ",\n" : "") + ("\t.param " + p.substr(0, array)) + " " + name;
        if (array != std::string::npos) declared.erase(declared.rfind(" " + name)), declared += name + p.substr(array);
        if (p == ".u64")
            loads += format("\tld.param.u64 \t%%a%zu, [%s];\n\tcvta.to.global.u64 \t%%a%zu, %%a%zu;\n", i, name.c_str(),
                            i, i);
        if (p == ".u32") loads += format("\tld.param.u32 \t%%u%zu, [%s];\n", i, name.c_str());
    }
    out += text.before + "\n.visible .entry tried(\n" + declared + "\n)\n" + text.tuning + "\n{\n";
    for (const char* reg :
         {".pred \t%p<40>", ".b16 \t%rs<40>", ".b32 \t%r<100>", ".f32 \t%f<300>", ".b64 \t%rd<60>", ".f64 \t%fd<40>",
          ".b64 \t%a<10>", ".b32 \t%u<10>", ".b32 \t%tx", ".b32 \t%bx", ".b32 \t%warp", ".b32 \t%lane"})
        out += "\t.reg " + std::string(reg) + ";\n";
    out += loads +
           "\tmov.u32 \t%tx, %tid.x;\n\tmov.u32 \t%bx, %ctaid.x;\n\tshr.u32 \t%warp, %tx, 5;\n"
           "\tand.b32  \t%lane, %tx, 31;\n";
    for (std::string line : split(text.body, '\n')) {
        size_t wait = line.find("WAIT ");
        if (wait != std::string::npos) {
            std::string bar = line.substr(wait + 5, line.find(',') - wait - 5);
            std::string parity = line.substr(line.find(',') + 1, line.find(';') - line.find(',') - 1);
            line = "\t{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [" + bar +
                   "], " + parity + ";\n@!done bra again;\n}" + line.substr(line.find(';') + 1);
        }
        out += line + "\n";
    }
    return out + "\tret;\n}\n";
}

// The body's lines that begin with + are of the right kernel only, those with - of the wrong one.
inline std::string choose(const std::string& body, char which) {
    std::string out;
    for (std::string line : split(body, '\n'))
        if (line.empty() || (line[0] != '+' && line[0] != '-'))
            out += line + "\n";
        else if (line[0] == which)
            out += line.substr(1) + "\n";
    return out;
}

// Lines with the comment //A, //B and so on: the places that a report must name.
inline std::vector<int> places(const std::string& text) {
    std::vector<int> found;
    std::vector<std::string> lines = split(text, '\n');
    for (size_t i = 0; i < lines.size(); i++)
        if (lines[i].find("//A") != std::string::npos || lines[i].find("//B") != std::string::npos)
            found.push_back(i + 1);
    return found;
}

inline std::string write_to;  // --write FOLDER: only writes the kernels there, for ptxas
inline std::string current;   // test
inline int written;

inline void write_text(const std::string& text, const char* suffix) {
    std::string path = write_to + format("/%s.%d%s.ptx", current.c_str(), written++, suffix);
    FILE* file = fopen(path.c_str(), "w");
    if (!file) fail("no file " + path);
    if (!file) return;
    fputs(text.c_str(), file);
    fclose(file);
}

// One run; the kind and text of what is reported, or nothing.
struct Outcome {
    std::string kind, text;
};
inline Outcome attempt(const std::string& text, const ptx::Launch& launch, uint64_t seed) {
    for (Memory* memory : memories()) memory->reset();
    ptx::options.seed = seed;
    try {
        std::shared_ptr<ptx::Module> module = ptx::read(text, "tests");
        ptx::run(*module, "tried", launch);
    } catch (const ptx::Report& report) {
        return {report.kind, report.what()};
    }
    return {};
}

// Runs without a report, or fails. False as well where kernels are only written.
inline bool runs(const std::string& text, const ptx::Launch& launch, uint64_t seed = 1) {
    if (!write_to.empty()) {
        if (seed == 1) write_text(text, "");
        return false;
    }
    Outcome outcome = attempt(text, launch, seed);
    if (!outcome.kind.empty())
        fail(format("seed %d: %s: %.700s", (int)seed, outcome.kind.c_str(), outcome.text.c_str()));
    return outcome.kind.empty();
}

inline bool has_number(const std::string& text, int number) {
    std::string digits = std::to_string(number);
    for (size_t at = text.find(digits); at != std::string::npos; at = text.find(digits, at + 1)) {
        size_t end = at + digits.size();
        if ((at == 0 || !isdigit((unsigned char)text[at - 1])) &&
            (end == text.size() || !isdigit((unsigned char)text[end])))
            return true;
    }
    return false;
}

// Every seed's run is reported, as one of the kinds (`race|phase`), in one line that names the kernel and the places.
inline void reports(const std::string& kinds, const std::string& text, const ptx::Launch& launch, bool real = true,
                    int seeds = 5) {
    if (!write_to.empty()) return write_text(text, real ? "" : ".unreal");
    for (int seed = 1; seed <= seeds; seed++) {
        Outcome outcome = attempt(text, launch, seed);
        if (outcome.kind.empty()) return fail(format("seed %d: not reported (%s)", seed, kinds.c_str()));
        if (("|" + kinds + "|").find("|" + outcome.kind + "|") == std::string::npos)
            return fail(
                format("seed %d: %s, not %s: %.600s", seed, outcome.kind.c_str(), kinds.c_str(), outcome.text.c_str()));
        bool names = outcome.kind == "parse" || outcome.text.find("tried") != std::string::npos;
        if (!names || outcome.text.find('\n') != std::string::npos)
            return fail(format("seed %d: not one line with the kernel: %.600s", seed, outcome.text.c_str()));
        for (int line : places(text))
            if (!has_number(outcome.text, line))
                return fail(format("seed %d: line %d is not named: %.600s", seed, line, outcome.text.c_str()));
    }
}

// The wrong kernel is reported with every seed, the right one with none.
inline void pair(const std::string& kinds, const Text& text, const ptx::Launch& launch) {
    if (!why.empty()) return;
    Text one = text;
    one.body = choose(text.body, '-');
    reports(kinds, module(one), launch);
    one.body = choose(text.body, '+');
    for (int seed = 1; seed <= 8; seed++)
        if (!runs(module(one), launch, seed) && write_to.empty()) {
            why = "the right kernel, " + why;
            return;
        }
}
