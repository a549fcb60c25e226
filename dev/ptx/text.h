// PTX text to instructions. A module is indexed at once, a kernel parsed when it is first launched. Functions are
// parsed into their callers. PTX ISA manual: "PTX Statements", "Directives", "Instruction Operands".
#pragma once
#include <ctype.h>
#include <cxxabi.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <unordered_map>

#include "ptx.h"

namespace ptx {

struct Warp;
struct Instr;
typedef void (*Run)(Warp&, const Instr&, uint32_t lanes);

// A register, or a constant: where its 32 lanes lie in a warp's file (4 or 8 bytes each, even of 16 bits; predicates:
// one word of bits), its number, its bytes (0: a predicate).
struct Slot {
    uint32_t at = 0, id = 0;
    uint8_t bytes = 0;
};

struct Source {  // a file's number and line, and those of the call that was inlined, if it was
    int file = 0, line = 0, in_file = 0, in_line = 0;
};

enum Class : uint8_t { TENSOR, FLOAT, INTEGER, SPECIAL, MEMORY, CONTROL };
enum Meet : uint8_t { ALONE, WHOLE_WARP, BY_MASK };  // whom a lane waits for: nobody, its warp, a mask in s.back()

struct Instr {
    Run run = nullptr;
    std::vector<Slot> s;  // operands as written, vectors and pairs one after the other
    Slot guard;
    bool guarded = false, guard_not = false;
    Class kind = INTEGER;
    Meet meet = ALONE;
    bool rename = false;           // a move: what was in the source is in the target, no arithmetic
    uint8_t outs = 1;              // the first operands that are written
    uint8_t width = 0, count = 1;  // of a memory access: bytes of an element, elements
    bool is_signed = false, strong = false, cached = false;  // cached: in L1
    int64_t offset[3] = {};  // of its addresses, in the order in which they are written
    int addresses = 0;
    int vector = -1;                      // the last operand that is one
    bool pair = false;                    // shfl: d|p
    int trans_a = 0, trans_b = 0;  // of wgmma
    int target = -1;                      // of a branch
    int line = 0;
    Source source;
    std::string op;
};

struct Symbol {
    uint32_t at = 0, bytes = 0;  // in shared memory
};
struct Param {
    uint32_t at, bytes;
};
struct Kernel {
    std::string name, shown;
    std::vector<Instr> code;
    std::vector<std::pair<uint32_t, uint64_t>> constants32, constants64;  // where in the file, value
    uint32_t file_bytes = 0, slots = 1;                                   // number 0: of constants, never poison
    std::vector<std::string> register_names = {"a constant"};
    uint32_t special[16] = {};  // where tid, ntid, ctaid, nctaid (x, y, z each), laneid, warpid lie; 0: not used
    std::vector<Param> params;
    uint32_t param_bytes = 0;
    std::vector<Symbol> shared;
    uint32_t static_bytes = 0, dynamic_at = 0;
    bool wgmma = false;
    unsigned maxntid = 0, minnctapersm = 1;
};

constexpr uint32_t SHARED_BASE = 1024;                // the system's on sm_90
constexpr uint64_t PARAM_BASE = 0x7e00000000000000u;  // generic addresses of kernel parameters

struct Global {
    std::vector<unsigned char> bytes;
};
struct Module {
    std::string text, name;
    struct Entry {
        size_t at;
        int line;
    };
    std::map<std::string, Entry> entries, functions;
    std::map<std::string, std::pair<int, int>> shared;  // bytes (-1: dynamic), alignment
    std::map<std::string, std::unique_ptr<Global>> globals;
    std::map<int, std::string> files;
    std::map<std::string, std::unique_ptr<Kernel>> parsed;
};

inline std::string shown_name(const std::string& mangled) {
    int status;
    char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    std::string name = text ? text : mangled;
    free(text);
    if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
    int depth = 0;  // the arguments are left out
    for (size_t i = 0; i < name.size(); i++) {
        depth += (name[i] == '<') - (name[i] == '>');
        if (name[i] == '(' && depth == 0) name.resize(i);
    }
    return name;
}

void choose(Kernel& kernel, Instr& in, const std::vector<std::string>& parts);  // sets run: opcodes.h

// ---------------------------------------------------------------------------------------------------------------------
// Words of the text

struct Words {
    const std::string& text;
    const std::string& name;
    size_t at;
    int line;

    [[noreturn]] void fail(const std::string& what) const {
        throw Report("parse", name + ":" + std::to_string(line) + ": " + what);
    }
    void space() {
        for (; at < text.size(); at++) {
            if (text[at] == '\n')
                line++;
            else if (text.compare(at, 2, "//") == 0)
                at = text.find('\n', at) - 1;
            else if (!isspace((unsigned char)text[at]))
                return;
        }
    }
    static bool part(char c) { return isalnum((unsigned char)c) || strchr("_$%.:", c); }
    char peek() {
        space();
        return at < text.size() ? text[at] : 0;
    }
    bool take(char c) { return peek() == c ? at++, true : false; }
    void need(char c) {
        if (!take(c)) fail(std::string("'") + c + "' is missing before '" + text.substr(at, 20) + "'");
    }
    std::string word() {  // a name, a number, an opcode; empty: a sign comes
        space();
        size_t begin = at;
        if (at < text.size() && text[at] == '-') at++;
        while (at < text.size() && part(text[at])) {
            if (text[at] == ':' && text.compare(at, 2, "::") != 0) break;  // a label's end
            at += text[at] == ':' ? 2 : 1;
        }
        return text.substr(begin, at - begin);
    }
    void skip_line() { at = std::min(text.size(), text.find('\n', at)); }
    void skip_past(char c) {
        while (at < text.size() && text[at] != c) line += text[at++] == '\n';
        at++;
    }
};

inline int type_bytes(const std::string& type) {
    if (type == "pred") return 0;
    const int bits = atoi(type.c_str() + strcspn(type.c_str(), "0123456789"));
    return bits >= 64 ? 8 : bits > 0 ? bits / 8 : -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// A kernel

struct Parser {
    Module& module;
    Kernel& kernel;
    Words w;
    struct Name {
        Slot slot;
        int bytes;
    };                                               // 0: a predicate
    std::vector<std::map<std::string, Name>> names;  // registers, by scope
    std::vector<int> scopes;                         // of labels: a number for each { }
    int scope_count = 0;
    std::map<std::string, Param> params;
    std::map<std::string, uint64_t> shared_at;
    std::map<std::pair<uint64_t, int>, Slot> constants;
    struct Jump {
        size_t instr;
        std::string label;
        std::vector<int> scopes;
        int line;
    };
    std::vector<Jump> jumps;
    std::map<std::pair<int, std::string>, int> labels;
    Source source;
    int returns = -1;  // in a function: the number of its end's label

    void named(const std::string& name, int bytes) {
        names.back()[name] = {make(bytes), bytes};
        kernel.register_names.resize(kernel.slots);
        kernel.register_names.back() = name;
    }
    Slot make(int bytes) {
        const uint32_t size = bytes == 8 ? 256 : bytes == 0 ? 4 : 128;
        kernel.file_bytes = (kernel.file_bytes + (bytes ? 63 : 3)) & ~(bytes ? 63u : 3u);
        Slot slot = {kernel.file_bytes, kernel.slots++, uint8_t(bytes)};
        kernel.file_bytes += size;
        return slot;
    }
    Slot constant(uint64_t value, int bytes) {
        auto [it, fresh] = constants.insert({{value, bytes == 8 ? 8 : bytes ? 4 : 0}, {}});
        if (fresh) {
            it->second = {make(bytes).at, 0, uint8_t(bytes)};
            (bytes == 8 ? kernel.constants64 : kernel.constants32).push_back({it->second.at, value});
            if (bytes == 0) kernel.constants32.back().second = uint64_t(-(value != 0)) | uint64_t(1) << 63;  // one word
        }
        return it->second;
    }
    const Name* find(const std::string& name) const {
        for (size_t i = names.size(); i-- > 0;)
            if (auto it = names[i].find(name); it != names[i].end()) return &it->second;
        return nullptr;
    }
    void declare_registers() {  // .reg .b32 %r<10>; .reg .pred p, q;
        const int bytes = type_bytes(w.word().substr(1));
        do {
            const std::string name = w.word();
            if (w.take('<')) {
                const int count = atoi(w.word().c_str());
                w.need('>');
                for (int i = 0; i < count; i++) named(name + std::to_string(i), bytes);
            } else {
                named(name, bytes);
            }
        } while (w.take(','));
        w.need(';');
    }
    uint64_t shared_symbol(const std::string& name) {
        auto at = shared_at.find(name);
        if (at != shared_at.end()) return at->second;
        const auto [bytes, align] = module.shared.at(name);
        uint32_t& end = kernel.static_bytes;
        if (bytes < 0) {  // dynamic shared memory begins behind all static: known at the end
            kernel.dynamic_at = std::max(kernel.dynamic_at, uint32_t(align));
            return shared_at[name] = ~0u;
        }
        end = (end + align - 1) / align * align;
        kernel.shared.push_back({SHARED_BASE + end, uint32_t(bytes)});
        shared_at[name] = SHARED_BASE + end;
        end += bytes;
        return shared_at[name];
    }
    // Static shared memory is laid out, and with it dynamic: before the first instruction that asks for an address.
    void lay_shared(size_t begin, size_t end) {
        for (auto& symbol : module.shared) {
            for (size_t at = begin; (at = module.text.find(symbol.first, at)) < end; at += symbol.first.size())
                if (!Words::part(module.text[at - 1]) && !Words::part(module.text[at + symbol.first.size()])) {
                    shared_symbol(symbol.first);
                    break;
                }
        }
        const uint32_t align = std::max(16u, kernel.dynamic_at);
        kernel.dynamic_at = (SHARED_BASE + kernel.static_bytes + align - 1) / align * align;
        for (auto& symbol : shared_at)
            if (symbol.second == ~0u) symbol.second = kernel.dynamic_at;
    }

    static bool number(const std::string& word, uint64_t& value) {
        if (word.empty()) return false;
        const char* text = word.c_str();
        char* end;
        if (text[0] == '0' && strchr("fFdD", text[1]) && text[1])
            value = strtoull(text + 2, &end, 16);
        else if (text[0] == '-' || isdigit((unsigned char)text[0])) {
            value = text[0] == '-' ? uint64_t(strtoll(text, &end, 0)) : strtoull(text, &end, 0);
            if (*end == 'U') end++;
        } else
            return false;
        return *end == 0;
    }
    // special registers lie in the file too, set when a block begins
    bool special(const std::string& name, Slot& slot) {
        static const char* const known[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                            "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                            "%nctaid.y", "%nctaid.z", "%laneid",  "%warpid"};
        for (int i = 0; i < 14; i++) {
            if (name != known[i]) continue;
            if (!kernel.special[i]) kernel.special[i] = make(4).at;
            slot = {kernel.special[i], 0, 4};
            return true;
        }
        return false;
    }
    Slot value(const std::string& word, int bytes) {
        if (const Name* name = find(word)) return name->slot;
        uint64_t number_;
        Slot slot;
        if (number(word, number_))
            return constant(bytes == 8 ? number_ : bytes == 0 ? number_ != 0 : uint32_t(number_), bytes);
        if (special(word, slot)) return slot;
        if (auto at = shared_at.find(word); at != shared_at.end()) return constant(at->second, bytes);
        if (auto global = module.globals.find(word); global != module.globals.end())
            return constant(uint64_t(global->second->bytes.data()), 8);
        if (auto param = params.find(word); param != params.end()) return constant(PARAM_BASE + param->second.at, 8);
        w.fail("unknown name '" + word + "'");
    }
    // [register+offset], [symbol+offset], [param+offset]; bytes: of an address in this space
    void address(Instr& in, int bytes) {
        std::string base = w.word();
        uint64_t number_;
        if (params.count(base) || shared_at.count(base) || find(base) || module.globals.count(base)) {
            in.s.push_back(value(base, bytes));
            if (w.take('+'))
                base = w.word();
            else
                base = w.peek() == '-' ? w.word() : "0";
        } else {
            in.s.push_back(constant(0, bytes));
        }
        if (!number(base, number_)) w.fail("unknown address '" + base + "'");
        if (in.addresses == 3) w.fail("a fourth address");
        in.offset[in.addresses++] = int64_t(number_);
        if (w.take(',')) {  // a tensor's coordinates
            w.need('{');
            do in.s.push_back(value(w.word(), 4));
            while (w.take(','));
            w.need('}');
        }
        w.need(']');
    }

    void label(const std::string& name) { labels[{scopes.back(), name}] = kernel.code.size(); }

    void instruction(std::string op, Instr in) {
        in.op = op;
        std::vector<std::string> parts(1);
        for (size_t i = 0; i < op.size(); i++) {
            if (op[i] == '.')
                parts.emplace_back();
            else
                parts.back() += op[i];
        }
        int bytes = 4;  // of operands that are numbers
        bool predicates = false;
        for (const std::string& part : parts) {
            if (part.size() >= 2 && part.size() <= 4 && strchr("busf", part[0]) && isdigit((unsigned char)part[1]))
                bytes = type_bytes(part);
            predicates |= part == "pred";
        }
        if (parts[0] == "cvta") bytes = 8;
        const bool memory = parts[0] == "ld" || parts[0] == "st" || parts[0] == "atom" || parts[0] == "cp" ||
                            parts[0] == "prefetch" || parts[0] == "ldmatrix" || parts[0] == "stmatrix" ||
                            parts[0] == "mbarrier" || parts[0] == "red";
        const bool shift = parts[0] == "shl" || parts[0] == "shr";
        const bool to_local_param = (parts[0] == "ld" || parts[0] == "st") && parts[1] == "param";
        if (parts[0] == "call") return call();
        if (parts[0] == "bra") {
            jumps.push_back({kernel.code.size(), w.word(), scopes, w.line});
            w.need(';');
        } else if (parts[0] == "ret" || parts[0] == "exit") {
            w.need(';');
            if (returns >= 0) {
                in.op = "bra", parts[0] = "bra";
                jumps.push_back({kernel.code.size(), "<end>", {returns}, w.line});
            }
        } else {
            for (int operand = 0; !w.take(';'); operand++) {
                if (operand) w.need(',');
                if (w.take('[')) {
                    const bool global = parts.size() > 1 && (op.find(".global") != std::string::npos) &&
                                        (op.find(".shared") == std::string::npos || global_operand(parts, operand));
                    if (to_local_param) {
                        const std::string name = w.word();
                        if (const Name* local = find(name)) {  // of a call: a register, really
                            if (w.take('+')) w.word();
                            w.need(']');
                            in.s.push_back(local->slot);
                            in.op = "mov." + parts.back();
                            parts = {"mov", parts.back()};
                            continue;
                        }
                        w.at -= name.size();
                    }
                    const bool generic = parts[0] == "ld" && parts[1] == "param";
                    address(in, global || generic ? 8 : 4);
                } else if (w.take('{')) {
                    do in.s.push_back(operand_value(bytes));
                    while (w.take(','));
                    w.need('}');
                    in.count = operand == 0 ? in.s.size() : in.s.size() - 1;
                    in.vector = operand;
                } else {
                    int width = bytes;
                    if (shift && operand == 2) width = 4;
                    if (parts[0] == "selp" && operand == 3) width = 0;
                    if (predicates) width = 0;
                    if (predicates && parts[0] == "vote" && operand == 2) width = 4;
                    if (memory && (parts[0] != "st" && parts[0] != "atom")) width = 4;
                    if (parts[0] == "cvt") width = type_bytes(parts.back());
                    if (parts[0] == "wgmma") width = 4;
                    if (parts[0] == "mul" && parts[1] == "wide" && operand > 0) width = type_bytes(parts[2]);
                    if (parts[0] == "setmaxnreg" || parts[0] == "bar" || parts[0] == "nanosleep") width = 4;
                    in.s.push_back(operand_value(width));
                    if (w.take('|')) in.s.push_back(value(w.word(), 0)), in.pair = true;
                }
            }
        }
        if (parts[0] == "mov" && in.s.size() == 2) in.rename = true;
        try {
            choose(kernel, in, parts);
        } catch (const char* what) {
            w.fail(std::string(what) + " '" + in.op + "'");
        }
        if (!in.run) w.fail("unknown instruction '" + in.op + "'");
        kernel.code.push_back(std::move(in));
    }
    // of bulk copies between global and shared memory, the operand that is global
    static bool global_operand(const std::vector<std::string>& parts, int operand) {
        size_t global = 0, shared = 0;
        for (size_t i = 0; i < parts.size(); i++) {
            if (parts[i] == "global") global = i;
            if (parts[i].compare(0, 6, "shared") == 0) shared = i;
        }
        return global < shared ? operand == 0 : operand == 1;
    }
    Slot operand_value(int bytes) {
        if (w.peek() == '!') w.fail("a negated operand");
        const std::string word = w.word();
        if (word == "_") return make(8);
        return value(word, bytes);
    }
    void call() {  // call.uni (retval0), name, (param0, param1); the function's text is parsed here
        std::vector<Name> outs, ins;
        auto list = [&](std::vector<Name>& to) {
            do {
                const std::string name = w.word();
                const Name* found = find(name);
                if (!found) w.fail("unknown parameter '" + name + "'");
                to.push_back(*found);
            } while (w.take(','));
            w.need(')');
        };
        std::string name;
        if (w.take('(')) {
            list(outs);
            w.need(',');
        }
        name = w.word();
        if (w.take(',')) {
            w.need('(');
            list(ins);
        }
        w.need(';');
        auto function = module.functions.find(name);
        if (function == module.functions.end()) w.fail("unknown function '" + name + "'");
        const Words back = w;
        const int back_returns = returns;
        const Source back_source = source;
        w.at = function->second.at, w.line = function->second.line;
        names.emplace_back();
        auto formal = [&](std::vector<Name>& actual) {  // (.param .b64 name, ...)
            size_t i = 0;
            do {
                std::string word;
                do word = w.word();
                while (word[0] == '.');
                if (i < actual.size()) names.back()[word] = actual[i++];
            } while (w.take(','));
            w.need(')');
        };
        if (w.take('(')) formal(outs);
        w.word();
        if (w.take('(')) formal(ins);
        while (w.peek() != '{') w.word();
        w.need('{');
        returns = ++scope_count;
        body();
        labels[{returns, "<end>"}] = kernel.code.size();
        names.pop_back();
        w.at = back.at, w.line = back.line;
        returns = back_returns, source = back_source;
    }
    void body() {  // up to the }
        names.emplace_back();
        scopes.push_back(++scope_count);
        while (!w.take('}')) {
            if (w.take('{')) {
                body();
                continue;
            }
            Instr in;
            in.line = w.line, in.source = source;
            if (w.take('@')) {
                in.guarded = true;
                in.guard_not = w.take('!');
                in.guard = value(w.word(), 0);
            }
            const std::string word = w.word();
            in.line = w.line, in.source = source;
            if (word.empty()) w.fail("unknown text '" + w.text.substr(w.at, 20) + "'");
            if (word == ".reg")
                declare_registers();
            else if (word == ".loc") {
                const std::string text = w.text.substr(w.at, w.text.find('\n', w.at) - w.at);
                source = {};
                const size_t inlined = text.find("inlined_at ");
                sscanf(text.c_str(), "%d %d", &source.file, &source.line);
                if (inlined != std::string::npos)
                    sscanf(text.c_str() + inlined, "inlined_at %d %d", &source.in_file, &source.in_line);
                w.skip_line();
            } else if (word == ".param") {  // of a call: a register
                const int bytes = type_bytes(w.word().substr(1));
                named(w.word(), bytes);
                w.need(';');
            } else if (word == ".shared")
                w.skip_past(';');  // the module's index has it
            else if (word == ".pragma")
                w.skip_past(';');
            else if (word[0] == '.')
                w.fail("unknown directive '" + word + "'");
            else if (w.take(':'))
                label(word);
            else
                instruction(word, in);
        }
        names.pop_back();
        scopes.pop_back();
    }
    void parse() {
        const Module::Entry entry = module.entries.at(kernel.name);
        w.at = entry.at, w.line = entry.line;
        w.word();  // the name
        if (w.take('('))
            while (!w.take(')')) {
                uint32_t bytes = 0, align = 0;
                std::string word = w.word();
                if (word != ".param") w.fail("a parameter is not .param but '" + word + "'");
                while ((word = w.word())[0] == '.') {
                    if (word == ".align")
                        align = atoi(w.word().c_str());
                    else if (word != ".ptr")
                        bytes = type_bytes(word.substr(1));
                }
                if (!align) align = bytes;
                if (w.take('[')) {
                    bytes = atoi(w.word().c_str());
                    w.need(']');
                }
                const uint32_t at = (kernel.param_bytes + align - 1) / align * align;
                kernel.params.push_back(params[word] = {at, bytes});
                kernel.param_bytes = at + bytes;
                w.take(',');
            }
        while (w.peek() != '{') {
            const std::string word = w.word();
            if (word == ".maxntid") {
                kernel.maxntid = atoi(w.word().c_str());
                while (w.take(',')) kernel.maxntid *= atoi(w.word().c_str());
            } else if (word == ".minnctapersm")
                kernel.minnctapersm = atoi(w.word().c_str());
            else
                w.word();
        }
        const size_t begin = w.at;
        size_t end = begin;
        for (int depth = 0; end < module.text.size(); end++) {
            depth += (module.text[end] == '{') - (module.text[end] == '}');
            if (depth == 0) break;
        }
        lay_shared(begin, end);
        w.need('{');
        body();
        const int last_line = w.line;
        for (const Jump& jump : jumps) {
            auto found = labels.end();
            for (size_t i = jump.scopes.size(); i-- > 0 && found == labels.end();)
                found = labels.find({jump.scopes[i], jump.label});
            w.line = jump.line;
            if (found == labels.end()) w.fail("unknown label '" + jump.label + "'");
            kernel.code[jump.instr].target = found->second;
        }
        Instr end_;
        end_.op = "exit", end_.line = last_line;
        choose(kernel, end_, {"exit"});
        kernel.code.push_back(end_);
    }
};

inline Kernel& find_kernel(Module& module, const std::string& name) {
    auto& kernel = module.parsed[name];
    if (!kernel) {
        if (!module.entries.count(name))
            throw Report("launch", module.name + " has no kernel " + shown_name(name) + " (" + name + ")");
        auto fresh = std::make_unique<Kernel>();
        fresh->name = name, fresh->shown = shown_name(name);
        Parser{module, *fresh, {module.text, module.name, 0, 0}, {}, {}, 0, {}, {}, {}, {}, {}, {}, -1}.parse();
        kernel = std::move(fresh);
    }
    return *kernel;
}

// ---------------------------------------------------------------------------------------------------------------------
// A module: where its kernels begin, its variables, its source files

inline std::shared_ptr<Module> index_module(const std::string& text, const std::string& name) {
    auto module = std::make_shared<Module>();
    module->text = text, module->name = name;
    size_t end;
    int line = 1;
    for (size_t at = 0; at < text.size(); at = end + 1, line++) {
        end = std::min(text.size(), text.find('\n', at));
        const size_t first = text.find_first_not_of(" \t", at);
        if (first >= end || text[first] != '.') continue;
        Words w = {module->text, module->name, first, line};
        std::string word = w.word();
        while (word == ".visible" || word == ".extern" || word == ".weak") word = w.word();
        if (word == ".entry") {
            const size_t begin = w.at;
            const std::string kernel = w.word();
            module->entries[kernel] = {begin, w.line};
        } else if (word == ".func") {
            const size_t begin = w.at;
            const int begin_line = w.line;
            if (w.take('(')) w.skip_past(')');
            const std::string function = w.word();
            while (w.peek() && w.peek() != ';' && w.peek() != '{') w.at++;
            if (w.peek() == '{') module->functions[function] = {begin, begin_line};
        } else if (word == ".file") {
            const int number = atoi(w.word().c_str());
            w.need('"');
            module->files[number] = text.substr(w.at, text.find('"', w.at) - w.at);
        } else if (word == ".shared" || word == ".global" || word == ".const") {
            const bool shared = word == ".shared";
            int bytes = 0, align = 0;
            while ((word = w.word())[0] == '.') {
                if (word == ".align")
                    align = atoi(w.word().c_str());
                else
                    bytes = type_bytes(word.substr(1));
            }
            const int element = bytes;
            if (!align) align = bytes;
            if (w.take('[')) {
                const std::string count = w.word();
                bytes = count.empty() ? -1 : bytes * atoi(count.c_str());
                w.need(']');
            }
            if (shared) {
                module->shared[word] = {bytes, align};
                continue;
            }
            auto global = std::make_unique<Global>();
            global->bytes.resize(bytes);
            if (w.take('=')) {
                const bool list = w.take('{');
                for (int i = 0; i == 0 || (list && w.take(',')); i++) {
                    uint64_t value;
                    if (!Parser::number(w.word(), value)) w.fail("the value of '" + word + "' is no number");
                    memcpy(global->bytes.data() + i * element, &value, element);
                }
            }
            module->globals[word] = std::move(global);
        }
    }
    return module;
}

}  // namespace ptx
