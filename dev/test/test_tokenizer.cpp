// Tests of tokenizer.h:  g++ -std=c++17 -O2 -o test_tokenizer dev/test/test_tokenizer.cpp && ./test_tokenizer
//
//   test_tokenizer [DIR]              the tests; DIR: where the fixtures are (dev/test/tokenizer)
//   test_tokenizer encode FILE        ids of stdin, separated by spaces; FILE: tokenizer file or "bytes"
//   test_tokenizer decode FILE        text of such ids
//   test_tokenizer many FILE          stdin: texts, each uint32 size, bytes. stdout for each: uint32 count, int32 ids;
//                                     uint32 size, the ids decoded; uint32 size, the ids decoded backwards between BOS
//                                     and EOS. stderr: CPU seconds spent encoding and decoding
//
// tokenizer_*.expected are lines "text|ids|decoded|backwards", texts in hex, of the library that the tokenizer is from:
// sentencepiece (llama, rules, handmade, unigram), tiktoken (cl100k, o200k), tokenizers (gpt2_json, llama_json,
// deepseek_json).
// tokenizer_vs_libraries.py --fixtures wrote them.
#include "../../tokenizer.h"
#include <ctime>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <unistd.h>

static const std::string NAMES[] = {"llama", "rules", "handmade", "cl100k", "o200k", "gpt2_json", "llama_json",
                                     "unigram", "deepseek_json"};
static int passed = 0, failed = 0;

static void report(const std::string& name, const std::string& why) {
    why.empty() ? passed++ : failed++;
    if (why.empty()) printf("ok %s\n", name.c_str());
    else printf("FAIL %s: %s\n", name.c_str(), why.c_str());
}

static std::string read_file(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    if (!f) throw std::runtime_error(path + ": cannot be read. Run from the repository's root, or give dev/test.");
    return {std::istreambuf_iterator<char>(f), {}};
}

static std::string to_hex(const std::string& s) {
    std::string out;
    char digits[3];
    for (unsigned char c : s) snprintf(digits, sizeof digits, "%02x", c), out += digits;
    return out;
}

static std::string from_hex(const std::string& s) {
    std::string out;
    for (size_t i = 0; i + 1 < s.size(); i += 2) out += (char)std::stoi(s.substr(i, 2), nullptr, 16);
    return out;
}

static std::string join(const std::vector<int>& ids) {
    std::string out;
    for (int id : ids) out += (out.empty() ? "" : " ") + std::to_string(id);
    return out;
}

// ids backwards between BOS and EOS: bytes out of order, spaces at unusual places
static std::vector<int> backwards(const Tokenizer& t, std::vector<int> ids) {
    ids.push_back(t.bos());
    std::reverse(ids.begin(), ids.end());
    ids.push_back(t.eos());
    return ids;
}

static std::string scratch_path() {
    static std::string path = [] {
        char name[] = "/tmp/test_tokenizer.XXXXXX";
        int fd = mkstemp(name);
        if (fd < 0) throw std::runtime_error("/tmp: no scratch file can be made there.");
        close(fd);
        return std::string(name);
    }();
    return path;
}

// what load says of a file with these contents; "" if it takes it
static std::string load_error(const std::string& contents) {
    unlink(scratch_path().c_str());  // a new file is written much faster than an old one over again
    std::ofstream(scratch_path(), std::ios::binary) << contents;
    try {
        Tokenizer t = Tokenizer::load(scratch_path());
        // whatever was taken must work
        t.decode(t.encode("A text, \xe2\x96\x81 \xf0\x9f\x98\x80 \xff <uds> \xef\xac\x81"));
    } catch (const std::runtime_error& e) {
        return e.what();
    }
    return "";
}

static std::string test_bytes() {
    Tokenizer t = Tokenizer::bytes();
    std::string all;
    for (int i = 0; i < 256; i++) all += (char)i;
    std::vector<int> ids = t.encode(all);
    for (int i = 0; i < 256; i++)
        if (ids.at(i) != i) return "byte " + std::to_string(i) + " has id " + std::to_string(ids[i]);
    if (ids.size() != 256 || t.decode(ids) != all) return "no round trip";
    if (t.vocab_size() != 258 || t.bos() != 256 || t.eos() != 257) return "wrong vocabulary";
    if (t.decode({256, 65, 257}) != "A" || t.decode_piece(65) != "A" || !t.decode_piece(256).empty()) return "BOS or EOS";
    if (Tokenizer::load("bytes").encode("ab") != std::vector<int>{97, 98}) return "load(\"bytes\")";
    for (int id : {-1, 258}) {
        try {
            t.decode({id});
            return "decode takes id " + std::to_string(id);
        } catch (const std::runtime_error&) {}
    }
    return "";
}

// file: the tokenizer's own, or the same in another form
static std::string test_expected(const std::string& dir, const std::string& name, const std::string& file) {
    Tokenizer t = Tokenizer::load(file);
    std::istringstream lines(read_file(dir + "/tokenizer_" + name + ".expected"));
    int n = 0;
    for (std::string line; std::getline(lines, line); n++) {
        std::istringstream parts(line);
        std::string text, want_ids, want_text, want_backwards, where = "line " + std::to_string(n + 1) + ": ";
        for (std::string* part : {&text, &want_ids, &want_text, &want_backwards}) std::getline(parts, *part, '|');
        std::vector<int> ids = t.encode(from_hex(text));
        if (join(ids) != want_ids) return where + "ids " + join(ids) + ", expected " + want_ids;
        std::string got = to_hex(t.decode(ids)), got_backwards = to_hex(t.decode(backwards(t, ids)));
        if (got != want_text) return where + "decodes to " + got + ", expected " + want_text;
        if (got_backwards != want_backwards)
            return where + "backwards it is " + got_backwards + ", expected " + want_backwards;
    }
    return n < 100 ? "only " + std::to_string(n) + " lines" : "";
}

// id by id it is the same text, complete UTF-8 at any moment; as pieces the same bytes
// Of bytes: whole characters as soon as they are, U+FFFD for each byte that is none; what stays of a text's bytes.
static std::string test_stream_of_bytes(const std::string& dir) {
    const std::string bad = "\xef\xbf\xbd";
    Tokenizer t = Tokenizer::bytes();
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"a\xc3\xa9", "a\xc3\xa9"}, {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x80"}, {"\xe2\x82", bad + bad},
        {"\xe2\x82z", bad + bad + "z"}, {"\xff\x80z", bad + bad + "z"}, {"\xc3\xc3\xa9", bad + "\xc3\xa9"},
        {"\xe0\x80\x80", bad + bad + bad}, {"\xed\xa0\x80", bad + bad + bad}};  // a surrogate
    for (auto& [raw, want] : cases) {
        Tokenizer::Stream stream(t);
        std::string got;
        for (size_t i = 0; i < raw.size(); i++) {
            stream.put((unsigned char)raw[i], got);
            if (raw[0] == '\xf0' && i < 3 && !got.empty()) return "half a character is out";
        }
        stream.end(got);
        if (got != want) return "bytes " + to_hex(raw) + " became " + to_hex(got);
    }
    for (const char* name : {"llama", "llama_json", "gpt2_json"}) {
        Tokenizer other = Tokenizer::load(dir + "/tokenizer_" + name + ".bin");
        const std::string text = " two  words, caf\xc3\xa9\n";
        size_t bytes = 0;
        bool first = true;
        for (int id : other.encode(text)) bytes += other.text_bytes(id, first), first = false;
        if (bytes != text.size()) return std::string(name) + ": " + std::to_string(bytes) + " bytes of text";
        if (other.text_bytes(other.bos(), true)) return std::string(name) + ": BOS has bytes";
    }
    return "";
}

static std::string test_stream(const std::string& dir) {
    const std::string text = "First Citizen:  caf\xc3\xa9 \xf0\x9f\x98\x80\n", broken = "a\xff \xe2\x96 b\xf0\x9f\x98";
    Tokenizer gpt2 = Tokenizer::load(dir + "/tokenizer_gpt2_json.bin");
    for (const std::string& name : NAMES) {
        Tokenizer t = Tokenizer::load(dir + "/tokenizer_" + name + ".bin");
        std::vector<int> ids = t.encode(text + broken);
        for (const std::vector<int>& some : {ids, backwards(t, ids)}) {
            std::string streamed;
            Tokenizer::Stream stream(t);
            for (int id : some) {
                stream.put(id, streamed);
                if (gpt2.decode(gpt2.encode(streamed)) != streamed) return name + " stops in " + to_hex(streamed);
            }
            stream.end(streamed);
            if (streamed != t.decode(some)) return name + " streamed '" + streamed + "'";
        }
        std::string pieces;
        for (int id : ids) pieces += t.decode_piece(id);
        if (name == "llama" && pieces.find(" " + text) != 0) return "llama's pieces are '" + pieces + "'";
        if (name == "cl100k" && pieces != text + broken) return "cl100k's are '" + pieces + "'";
    }
    Tokenizer t = Tokenizer::load(dir + "/tokenizer_cl100k.bin");
    for (int i = 0; i < 2; i++) {  // a character comes with its last byte
        std::string got;
        Tokenizer::Stream stream(t);
        for (char c : std::string("\xf0\x9f\x98\x80").substr(0, 4 - i)) {
            if (!got.empty()) return "half a character came";
            stream.put(t.encode(std::string(1, c)).at(0), got);
        }
        stream.end(got);
        if (got != (i ? "\xef\xbf\xbd" : "\xf0\x9f\x98\x80")) return "got " + to_hex(got);
    }
    std::string got;
    Tokenizer::Stream stream(t);
    for (int id : t.encode("\xff" "ab")) stream.put(id, got);
    if (got != "\xef\xbf\xbd" "ab") return "a broken byte holds up what follows";
    return "";
}

// at byte level nothing is lost, whatever the bytes
static std::string test_lossless(const std::string& dir) {
    uint32_t random = 1;
    for (const char* name : {"cl100k", "o200k", "gpt2_json", "deepseek_json"}) {
        Tokenizer t = Tokenizer::load(dir + "/tokenizer_" + name + ".bin");
        for (int n = 0; n < 300; n++) {
            std::string text, back;
            for (int i = 0; i < n; i++) {
                random = random * 1664525 + 1013904223;
                text += "' sAa1\n\xcc\x81\xe4\xbd\xa0\xf0\x9f\x98\x80"[(random >> 24) % 16];
                if (random >> 28 == 0) text.back() = (char)(random >> 16);
            }
            for (int id : t.encode(text)) back += t.decode_piece(id);
            if (back != text) return std::string(name) + ": " + to_hex(text) + " becomes " + to_hex(back);
        }
    }
    const std::string path = dir + "/tokenizer_gpt2_json.bin";
    const Tokenizer gpt2 = Tokenizer::load(path);
    std::string prefixing = read_file(path);
    prefixing[8] |= 1;  // ByteLevel with add_prefix_space
    if (!load_error(prefixing).empty()) return "add_prefix_space is refused";
    const Tokenizer t = Tokenizer::load(scratch_path());
    for (const char* text : {"two words", " two words"})
        if (t.encode(text) != gpt2.encode(" two words")) return "add_prefix_space does more or less than a space in front";
    return "";
}

// A quadratic encoder takes minutes for these.
static std::string test_linear(const std::string& dir) {
    std::string words;
    while (words.size() < 300000) words += "the king and " + std::to_string(words.size()) + "\n";
    for (const char* name : {"llama", "cl100k", "o200k", "gpt2_json", "llama_json", "unigram", "deepseek_json"}) {
        Tokenizer t = Tokenizer::load(dir + "/tokenizer_" + name + ".bin");
        for (const std::string& text : {words, std::string(words.size(), 'e'), std::string(words.size(), ' ')}) {
            clock_t start = clock();
            size_t n = t.encode(text).size();
            double s = double(clock() - start) / CLOCKS_PER_SEC;
            if (s > 10) return std::string(name) + ": " + std::to_string(s) + " s for 0.3 MB";
            if (n < 1000) return "too few ids";
        }
    }
    return "";
}

static std::string test_cut_short(const std::string& dir) {
    for (const char* name : {"rules", "handmade", "cl100k", "gpt2_json", "unigram", "deepseek_json"}) {
        std::string whole = read_file(dir + "/tokenizer_" + name + ".bin");
        if (!load_error(whole).empty()) return "the whole file is refused";
        size_t step = whole.size() / 300;
        for (size_t n = 0; n < whole.size(); n += n < 60 || n + 60 > whole.size() ? 1 : step) {
            std::string error = load_error(whole.substr(0, n));
            if (error.empty()) return "accepted with " + std::to_string(n) + " bytes";
            if (error.find(scratch_path() + ": ") != 0 || error.find('\n') != error.npos) return "unclear: " + error;
        }
        if (load_error(whole + "x").empty()) return "accepted with a byte too many";
    }
    return "";
}

// A byte changed to anything: an error or a tokenizer that works; the sanitizers watch.
static std::string test_changed_bytes(const std::string& dir) {
    for (const char* name : {"rules", "handmade", "llama_json", "cl100k", "gpt2_json", "unigram", "deepseek_json"}) {
        std::string whole = read_file(dir + "/tokenizer_" + name + ".bin");
        uint32_t random = 1;
        for (size_t i = 0; i < whole.size(); i += i < 40 ? 1 : 1 + random % (whole.size() / 150)) {
            std::string changed = whole;
            random = random * 1664525 + 1013904223;
            changed[i] ^= (char)(1 + (random >> 24) % 255);
            load_error(changed);
        }
    }
    return "";
}

static std::string le(uint32_t x) { return std::string((char*)&x, 4); }

static std::string piece(const std::string& text, int type, float score = 0) {
    uint16_t size = (uint16_t)text.size();
    return std::string((char*)&score, 4) + (char)type + std::string((char*)&size, 2) + text;
}

static std::string test_malformed() {
    const std::string behind_pieces = le(0) + le(0) + le(0);  // no split, no classes, no merges
    std::string magic = "SGPTTOK2", unk = piece("<unk>", 2), s = piece("<s>", 3), end = piece("</s>", 3);
    auto header = [&](uint32_t flags, uint32_t V, uint32_t bos, uint32_t eos) {
        return magic + le(flags) + le(V) + le(bos) + le(eos);
    };
    std::string none = le(0) + le(0) + le(0), three = unk + s + end, good = header(7, 4, 1, 2) + none + three;
    if (std::string why = load_error(good + piece("a", 1) + behind_pieces); !why.empty())
        return "a good file is refused: " + why;
    // a user-defined piece comes before a normal one of its text, wherever it stands
    if (std::string why = load_error(header(7, 5, 1, 2) + none + three + piece("a", 1) + piece("a", 4) + behind_pieces); !why.empty())
        return "a user-defined piece behind a normal one is refused: " + why;
    if (Tokenizer::load(scratch_path()).encode("a").back() != 4) return "the normal piece is taken";
    struct { const char* why; std::string contents; } cases[] = {
        {"not a tokenizer", "SGPTTOK4" + good.substr(8) + piece("a", 1)},
        {"newer version", header(4096, 3, 1, 2) + none + three},
        {"cut short", header(7, 0xffffffff, 1, 2) + none + three},
        {"cut short", header(7, 3, 1, 2) + le(0xffffffff) + le(0) + le(0) + three},
        {"cut short", header(7, 3, 1, 2) + le(0) + le(0xfffffffc) + le(0) + three},
        {"cut short", header(7, 3, 1, 2) + le(0) + le(0) + le(0xffffffff) + three},
        {"multiple of 4", header(7, 3, 1, 2) + le(0) + le(2) + "ab" + le(1) + std::string(1, 0) + three},
        {"do not fit", header(7, 3, 1, 2) + le(0) + le(4) + "abcd" + le(0) + three},
        {"do not fit", header(7, 3, 1, 2) + le(0) + le(4) + "abcd" + le(1) + "x" + three},
        {"is empty", good + piece("", 1)},
        {"no known type", good + piece("a", 0)},
        {"no known type", good + piece("a", 7)},
        {"no number", good + piece("a", 1, std::stof("nan"))},
        {"there twice", header(7, 5, 1, 2) + none + three + piece("a", 1) + piece("a", 5)},
        {"there twice", header(7, 5, 1, 2) + none + three + piece("a", 4) + piece("a", 4)},
        {"second unknown", good + piece("a", 2)},
        {"cannot be a byte", good + piece("<0x41>", 6)},
        {"cannot be a byte", header(23, 4, 1, 2) + none + three + piece("<0x4g>", 6)},
        {"some byte", header(23, 4, 1, 2) + none + three + piece("<0x00>", 6)},
        {"no unknown", header(7, 2, 0, 1) + none + s + end},
        {"BOS or EOS", header(7, 3, 0, 2) + none + three},
        {"BOS or EOS", header(7, 3, 1, 3) + none + three},
        {"behind its end", header(7, 3, 1, 2) + none + three + behind_pieces},
    };
    for (auto& c : cases) {
        std::string error = load_error(c.contents + behind_pieces);
        if (error.find(c.why) == error.npos) return std::string("expected '") + c.why + "', got '" + error + "'";
    }

    // byte level, with merges listed
    std::string all = piece("", 3);
    for (int i = 0; i < 256; i++) all += piece(std::string(1, (char)i), 1);
    all += piece("ab", 1) + piece("c", 3);
    const int a = 1 + 'a', b = 1 + 'b', last = 258;
    auto file = [&](const std::string& behind) { return header(96, 259, 0, last) + none + all + behind; };
    std::string classes = le(16) + le(2) + le('a' << 3 | 2) + le('c' << 3);
    good = file(classes + le(1) + le(a) + le(b));
    if (!load_error(good).empty()) return "a good file is refused: " + load_error(good);
    if (Tokenizer::load(scratch_path()).encode("aab") != std::vector<int>{a, 257}) return "merge";
    if (Tokenizer::load(scratch_path()).encode(" ") != std::vector<int>{1 + ' '}) return "a space of no class";
    std::string bytes_gone = good;
    bytes_gone.replace(good.find(piece("z", 1)), 8, piece("z", 3));
    struct { const char* why; std::string contents; } more[] = {
        {"newer version", header(4096, 259, 0, last) + none + all + classes + le(0)},
        {"some byte", bytes_gone},
        {"cut short", file("")},
        {"cut short", file(le(16))},
        {"cut short", file(le(16) + le(0xffffffff))},
        {"cut short", file(classes)},
        {"cut short", file(classes + le(0xffffffff) + le(a) + le(b))},
        {"cut short", file(classes + le(2) + le(a) + le(b))},
        {"classes are damaged", file(le(16) + le(2) + le('c' << 3) + le('b' << 3) + le(0))},
        {"classes are damaged", file(le(16) + le(1) + le(0x110000u << 3) + le(0))},
        {"classes are damaged", file(le(16) + le(1) + le(7) + le(0))},
        {"classes are damaged", header(0, 3, 1, 2) + none + three + le(0) + le(1) + le(1) + le(0)},
        {"by classes, and has none", header(0, 3, 1, 2) + none + three + le(16) + le(0) + le(0)},
        {"not of two pieces", file(classes + le(1) + le(a) + le(259))},
        {"gives no piece", file(classes + le(1) + le(b) + le(a))},
        {"not of two pieces", file(classes + le(1) + le(0) + le(last))},
        {"behind its end", good + "x"},
    };
    for (auto& c : more) {
        std::string error = load_error(c.contents);
        if (error.find(c.why) == error.npos) return std::string("expected '") + c.why + "', got '" + error + "'";
    }
    // the third version: flags of pieces, normal form, rules, unigram
    const std::string third = "SGPTTOK3", nothing = le(0) + le(0), plain = classes + le(0);
    auto file3 = [&](uint32_t flags, const std::string& pieces, const std::string& behind) {
        return third + le(flags) + le(259) + le(0) + le(last) + none + pieces + behind;
    };
    // U+00E9 of class 0 is e, U+0301 of class 230; they become U+00E9 again
    const std::string form = le(2) + le(0xe9 << 8) + le(2) + le('e') + le(0x301) + le(0x301 << 8 | 230) + le(0);
    const std::string composed = le(1) + le('e') + le(0x301) + le(0xe9);
    // of letters 1, of all else 0; a rule that matches one letter
    const std::string letters = le(3) + le(0) + le('a' << 8 | 1) + le(('z' + 1) << 8);
    auto rule = [](std::vector<uint16_t> next) {
        return le(3) + le((uint32_t)next.size() / 3) + std::string((char*)next.data(), 2 * next.size());
    };
    const std::string one = le(1) + rule({0, 0, 0, 0, 4, 0, 1, 1, 1});
    good = file3(96, all, classes + le(1) + le(a) + le(b) + form + composed + letters + one);
    if (!load_error(good).empty()) return "a good third file is refused: " + load_error(good);
    if (Tokenizer::load(scratch_path()).encode("abe\xcc\x81") != std::vector<int>{a, b, 1 + 0xc3, 1 + 0xa9})
        return "normal form or rule";  // the rule leaves a and b apart
    std::string flagged = all;
    flagged.replace(flagged.find(piece("ab", 1)), 9, piece("ab", 1 | 8));
    struct { const char* why; std::string contents; } thirds[] = {
        {"newer version", file3(16384, all, plain + nothing + nothing)},
        {"no known type", file3(96, flagged, plain + nothing + nothing)},
        {"cut short", file3(96, all, plain)},
        {"cut short", file3(96, all, plain + nothing)},
        {"normal form is damaged", file3(96, all, plain + le(1) + le('a' << 8) + le(0) + le(0) + nothing)},
        {"normal form is damaged", file3(96, all, plain + le(1) + le(0x110000u << 8) + le(0) + le(0) + nothing)},
        {"normal form is damaged", file3(96, all, plain + le(1) + le(0xe9 << 8) + le(33) + le(0) + nothing)},
        {"normal form is damaged", file3(96, all, plain + le(0) + composed + nothing)},
        {"normal form is damaged", file3(96, all, plain + form + le(1) + le('e') + le('x') + le(0xe9) + nothing)},
        {"rules are damaged", file3(96, all, plain + nothing + le(2) + le('b' << 8) + le('a' << 8) + one)},
        {"rules are damaged", file3(96, all, plain + nothing + le(0) + one)},
        {"rules are damaged", file3(96, all, plain + nothing + letters + le(1) + le(2) + le(2) + le(0) + le(0))},
        {"rules are damaged", file3(96, all, plain + nothing + letters + le(1) + rule({0, 0, 0, 4, 0, 0}))},
        {"rules are damaged", file3(96, all, plain + nothing + letters + le(1) + rule({0, 0, 0}))},
        {"cut short", file3(96, all, plain + nothing + letters + le(1) + le(3) + le(2))},
        {"unigram, and has merges", file3(96 | 8192, all, plain + nothing + nothing)},
        {"not at byte level", third + le(0) + le(3) + le(1) + le(2) + none + three + le(0) + le(0) + le(0) + nothing +
                                  letters + one},
        {"behind its end", good + "x"},
    };
    for (auto& c : thirds) {
        std::string error = load_error(c.contents);
        if (error.find(c.why) == error.npos) return std::string("expected '") + c.why + "', got '" + error + "'";
    }
    for (std::string path : {"/", "/nowhere/tokenizer.bin", "/dev/zero"}) {
        try {
            Tokenizer::load(path);
            return path + " is taken";
        } catch (const std::runtime_error& e) {
            std::string why = e.what();
            if (why.find("cannot be read") == why.npos && why.find("not a file") == why.npos) return why;
        }
    }
    return "";
}

static std::string all_of_stdin() { return {std::istreambuf_iterator<char>(std::cin), {}}; }

static void many(const Tokenizer& t) {
    auto write_sized = [](const void* p, size_t count, size_t width) {
        uint32_t n = (uint32_t)count;
        fwrite(&n, 4, 1, stdout);
        if (count) fwrite(p, width, count, stdout);  // p of an empty vector may be null
    };
    double seconds[2] = {};
    uint32_t n;
    while (fread(&n, 4, 1, stdin) == 1) {
        std::string text(n, 0);
        if (fread(&text[0], 1, n, stdin) != n) throw std::runtime_error("stdin: a text is cut short.");
        clock_t start = clock();
        std::vector<int> ids = t.encode(text);
        clock_t middle = clock();
        std::string back = t.decode(ids);
        seconds[0] += double(middle - start) / CLOCKS_PER_SEC;
        seconds[1] += double(clock() - middle) / CLOCKS_PER_SEC;
        write_sized(ids.data(), ids.size(), 4);
        for (const std::string& decoded : {back, t.decode(backwards(t, ids))})
            write_sized(decoded.data(), decoded.size(), 1);
    }
    fprintf(stderr, "%.6f %.6f\n", seconds[0], seconds[1]);
}

int main(int argc, char** argv) try {
    std::string command = argc > 2 ? argv[1] : "";
    if (command == "encode") {
        puts(join(Tokenizer::load(argv[2]).encode(all_of_stdin())).c_str());
    } else if (command == "decode") {
        std::istringstream words(all_of_stdin());
        std::vector<int> ids{std::istream_iterator<int>(words), {}};
        std::cout << Tokenizer::load(argv[2]).decode(ids);
    } else if (command == "many") {
        many(Tokenizer::load(argv[2]));
    } else {
        std::string dir = argc > 1 ? argv[1] : "dev/test/tokenizer";
        auto test = [](const std::string& name, auto body) {
            std::string why;
            try {
                why = body();
            } catch (const std::exception& e) {
                why = e.what();
            }
            report(name, why);
        };
        test("bytes", [] { return test_bytes(); });
        for (const std::string& name : NAMES)
            test("expected_" + name, [&] { return test_expected(dir, name, dir + "/tokenizer_" + name + ".bin"); });
        test("stream", [&] { return test_stream(dir); });
        test("stream of bytes", [&] { return test_stream_of_bytes(dir); });
        test("lossless", [&] { return test_lossless(dir); });
        test("linear_time", [&] { return test_linear(dir); });
        test("malformed", [] { return test_malformed(); });
        test("cut_short", [&] { return test_cut_short(dir); });
        test("changed_bytes", [&] { return test_changed_bytes(dir); });
        unlink(scratch_path().c_str());
        printf("test_tokenizer: %d passed, %d failed\n", passed, failed);
        return failed > 0;
    }
} catch (const std::exception& e) {
    fprintf(stderr, "test_tokenizer: %s\n", e.what());
    return 1;
}
