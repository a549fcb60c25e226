// Text to token ids and back: bytes, or sentencepiece-style BPE with exactly the ids of the sentencepiece library.
// Plain C++17, usable alone. dev/data/convert_tokenizer.py writes the file from a sentencepiece .model.
//
// Tokenizer file, little-endian, nothing padded:
//   char[8] "SGPTTOK1"
//   uint32  flags    1 add_dummy_prefix, 2 remove_extra_whitespaces, 4 escape_whitespaces,
//                    8 treat_whitespace_as_suffix, 16 byte_fallback
//   uint32  V, bos, eos
//   uint32  size of the unknown piece's surface, then its bytes (what an unknown id decodes to)
//   uint32  size of the trie, then its uint32 units: a double array from text to offsets into the strings that follow
//   uint32  size of the strings, then the strings that replace text, each ending in a zero byte (no trie: 0 and 0)
//   V times: float score, uint8 type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte), uint16 size,
//            the piece's bytes
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/stat.h>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are read as they lie in memory");

class Tokenizer {
public:
    // V = 258: ids 0..255 are the bytes, 256 is BOS, 257 EOS
    static Tokenizer bytes() { return Tokenizer(); }

    // path: a file of convert_tokenizer.py, or "bytes". Throws std::runtime_error "path: what. What to do."
    static Tokenizer load(const std::string& path) {
        Tokenizer t;
        if (path != "bytes") t.read(path);
        return t;
    }

    int vocab_size() const { return bpe_ ? (int)pieces_.size() : 258; }
    int bos() const { return bos_; }
    int eos() const { return eos_; }

    // ids of text, any bytes, without BOS and EOS; invalid UTF-8 becomes U+FFFD, byte by byte, unless V = 258
    std::vector<int> encode(std::string_view text) const {
        std::vector<int> ids;
        if (!bpe_) {
            for (char c : text) ids.push_back((unsigned char)c);
            return ids;
        }
        if (text.size() > (1u << 28))
            throw std::runtime_error("tokenizer: one text of more than 256 MiB. Split it into documents.");
        std::string normalized = normalize(text);
        bool after_unknown = false;
        Merges merges(*this, normalized);
        for (auto [piece, id] : merges.result) {
            bool unknown = type_[id] == UNKNOWN;
            if (unknown && byte_id_[0] >= 0)
                for (char c : piece) ids.push_back(byte_id_[(unsigned char)c]);
            else if (!unknown || !after_unknown)  // a run of unknown pieces is one unknown id
                ids.push_back(id);
            after_unknown = unknown;
        }
        return ids;
    }

    // Text of ids; BOS, EOS and other control ids are nothing. Throws std::runtime_error on an id that is not in [0,V).
    // BPE as the library does it: the dummy prefix is dropped, bytes that are no UTF-8 become U+FFFD.
    std::string decode(const std::vector<int>& ids) const {
        std::string text;
        Stream stream(*this);
        for (int id : ids) text += bpe_ ? stream.add(id) : decode_piece(id);
        return text + stream.end();
    }

    // The text of ids that come one by one, as decode() has it, in whole characters: one of which bytes are missing is
    // held back. Also of V = 258 bytes that are no UTF-8 become U+FFFD.
    class Stream {
    public:
        explicit Stream(const Tokenizer& tokenizer) : t(tokenizer) {}

        // the text that is certain now
        std::string add(int id) {
            std::string piece = t.decode_piece(id), text;
            if (!t.bpe_ || t.type_[id] == BYTE) {
                raw += piece;
                return flush(false);
            }
            text = flush(true);
            if (dropped) at_start = false;
            dropped = false;
            if (at_start && t.has_dummy_prefix(id)) {
                piece.erase(0, 1);
                dropped = !(t.flags_ & REMOVE_SPACES);  // with REMOVE_SPACES all leading spaces go
            }
            if (!piece.empty()) at_start = false;
            return text + piece;
        }

        // what was held back
        std::string end() { return flush(true); }

    private:
        const Tokenizer& t;
        std::string raw;                        // bytes that may become a character
        bool at_start = true, dropped = false;  // dropped: the piece before this one lost its dummy prefix

        std::string flush(bool all) {
            std::string text;
            std::string_view s = raw;
            while (!s.empty() && (all || !unfinished(s))) {
                size_t n = utf8_length(s);
                text += n ? s.substr(0, n) : REPLACEMENT;
                s.remove_prefix(n ? n : 1);
            }
            raw.erase(0, raw.size() - s.size());
            if (!text.empty()) at_start = false;
            return text;
        }
    };

    // bytes of text that an id stands for; at_start: the first of a text, whose dummy prefix is none of it
    size_t text_bytes(int id, bool at_start) const {
        return decode_piece(id).size() - (bpe_ && at_start && has_dummy_prefix(id));
    }

    // text of one id, for printing while sampling: all its spaces, a byte id's byte as it is, nothing for a control id
    std::string decode_piece(int id) const {
        if (id < 0 || id >= vocab_size())
            throw std::runtime_error("tokenizer: id " + std::to_string(id) + " is not in [0, " +
                                     std::to_string(vocab_size()) + "). Use the tokenizer that made the data.");
        if (!bpe_) return id < 256 ? std::string(1, (char)id) : std::string();
        if (type_[id] == CONTROL) return {};
        if (type_[id] == UNKNOWN) return unknown_surface_;
        if (type_[id] == BYTE) return std::string(1, (char)byte_value(pieces_[id]));
        std::string text;
        for (std::string_view s = pieces_[id]; !s.empty();) {
            bool space = starts(s, SPACE);
            text += space ? ' ' : s[0];
            s.remove_prefix(space ? SPACE.size() : 1);
        }
        return text;
    }

private:
    enum { DUMMY_PREFIX = 1, REMOVE_SPACES = 2, ESCAPE_SPACES = 4, SPACE_AS_SUFFIX = 8, BYTE_FALLBACK = 16 };
    enum Type : uint8_t { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };
    static constexpr std::string_view SPACE = "\xe2\x96\x81", REPLACEMENT = "\xef\xbf\xbd";  // U+2581, U+FFFD

    // The views in here point into file_'s heap buffer; a vector keeps that when it is moved, and copies are refused.
    Tokenizer() = default;
    bool bpe_ = false;
    int bos_ = 256, eos_ = 257, unknown_ = -1;
    uint32_t flags_ = 0;
    std::vector<char> file_;
    std::vector<std::string_view> pieces_;
    std::vector<float> score_;
    std::vector<uint8_t> type_;
    std::unordered_map<std::string_view, int> normal_;  // what text can be: not the unknown, control and byte pieces
    size_t longest_ = 0;                 // bytes of the longest piece in normal_
    bool words_ = true;                  // no piece has a space behind another character
    std::vector<size_t> user_lengths_;   // sizes of the user-defined pieces, longest first
    bool user_first_[256] = {};          // their first bytes
    int byte_id_[256] = {};              // byte_id_[0] < 0: no byte fallback
    std::string unknown_surface_;
    std::vector<uint32_t> trie_;
    std::string_view replacements_;

public:
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;
    Tokenizer(Tokenizer&&) = default;
    Tokenizer& operator=(Tokenizer&&) = default;

private:
    static bool starts(std::string_view s, std::string_view prefix) { return s.substr(0, prefix.size()) == prefix; }
    static bool ends(std::string_view s, std::string_view suffix) {
        return s.size() >= suffix.size() && s.substr(s.size() - suffix.size()) == suffix;
    }

    // size that the first byte of a UTF-8 character announces
    static int character_size(unsigned char first) {
        return first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    }

    // size of the UTF-8 character that s starts with; 0: it is none
    static size_t utf8_length(std::string_view s) {
        unsigned char c = s[0];
        size_t n = c < 0x80 ? 1 : (c & 0xe0) == 0xc0 ? 2 : (c & 0xf0) == 0xe0 ? 3 : (c & 0xf8) == 0xf0 ? 4 : 0;
        if (n < 2 || n > s.size()) return n == 1;
        uint32_t code = c & (0x7f >> n);
        for (size_t i = 1; i < n; i++) {
            if ((s[i] & 0xc0) != 0x80) return 0;
            code = code << 6 | (s[i] & 0x3f);
        }
        static constexpr uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};  // shorter forms exist below
        return code >= least[n] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? n : 0;
    }

    // whether s is the begin of a UTF-8 character whose other bytes may come
    static bool unfinished(std::string_view s) {
        unsigned char c = s[0];
        if (c < 0xc2 || c > 0xf4 || s.size() >= (size_t)character_size(c)) return false;
        return std::all_of(s.begin() + 1, s.end(), [](char next) { return (next & 0xc0) == 0x80; });
    }

    bool has_dummy_prefix(int id) const {
        return type_[id] != CONTROL && type_[id] != UNKNOWN && type_[id] != BYTE &&
               (flags_ & (DUMMY_PREFIX | REMOVE_SPACES)) && starts(pieces_[id], SPACE);
    }

    // "<0x41>" is 0x41; -1: not of that form
    static int byte_value(std::string_view piece) {
        static constexpr std::string_view digits = "0123456789ABCDEF";
        if (piece.size() != 6 || !starts(piece, "<0x") || piece[5] != '>') return -1;
        size_t high = digits.find(piece[3]), low = digits.find(piece[4]);
        return high == digits.npos || low == digits.npos ? -1 : (int)(high << 4 | low);
    }

    // size of the longest user-defined piece that s starts with; 0: none
    size_t user_defined_length(std::string_view s) const {
        if (!user_first_[(unsigned char)s[0]]) return 0;
        for (size_t n : user_lengths_) {
            if (n > s.size()) continue;
            auto it = normal_.find(s.substr(0, n));
            if (it != normal_.end() && type_[it->second] == USER_DEFINED) return n;
        }
        return 0;
    }

    // how the text starts after normalisation, and the bytes of text that this stands for
    std::pair<std::string_view, size_t> normalize_prefix(std::string_view text) const {
        if (size_t n = user_defined_length(text)) return {text.substr(0, n), n};
        // Longest match in the double array. A unit holds a label (bits 0..7, and 31 for a leaf), whether a leaf
        // hangs below (bit 8) and an offset (bits 10.., times 256 if bit 9); a leaf holds its value in bits 0..30.
        auto offset = [](uint32_t unit) { return (unit >> 10) << ((unit & 512) >> 6); };
        size_t length = 0, value = 0;
        size_t node = trie_.empty() ? 0 : offset(trie_[0]);
        for (size_t i = 0; i < text.size(); i++) {
            node ^= (unsigned char)text[i];
            if (node >= trie_.size() || (trie_[node] & 0x800000ffu) != (unsigned char)text[i]) break;
            bool leaf = trie_[node] & 256;
            node ^= offset(trie_[node]);
            if (!leaf) continue;
            if (node >= trie_.size() || (trie_[node] & 0x7fffffffu) >= replacements_.size()) break;
            length = i + 1;
            value = trie_[node] & 0x7fffffffu;
        }
        if (length) {
            std::string_view s = replacements_.substr(value);
            return {s.substr(0, s.find('\0')), length};
        }
        size_t n = utf8_length(text);
        return n ? std::make_pair(text.substr(0, n), n) : std::make_pair(REPLACEMENT, (size_t)1);
    }

    std::string normalize(std::string_view text) const {
        bool remove = flags_ & REMOVE_SPACES;
        std::string_view space = flags_ & ESCAPE_SPACES ? SPACE : std::string_view(" ");
        while (remove && !text.empty()) {  // leading spaces
            auto [s, n] = normalize_prefix(text);
            if (s != " ") break;
            text.remove_prefix(n);
        }
        std::string out;
        if (text.empty()) return out;
        out.reserve(text.size() + text.size() / 2);
        if ((flags_ & DUMMY_PREFIX) && !(flags_ & SPACE_AS_SUFFIX)) out += space;
        bool after_space = remove;
        while (!text.empty()) {
            auto [s, n] = normalize_prefix(text);
            while (after_space && starts(s, " ")) s.remove_prefix(1);
            for (char c : s) {
                if (c == ' ') out += space;
                else out += c;
            }
            if (!s.empty()) after_space = remove && s.back() == ' ';
            text.remove_prefix(n);
            if (out.size() > INT_MAX / 2) throw std::runtime_error("tokenizer: the text's normal form is over 1 GiB.");
        }
        while (remove && ends(out, space)) out.resize(out.size() - space.size());
        if ((flags_ & DUMMY_PREFIX) && (flags_ & SPACE_AS_SUFFIX)) out += space;
        return out;
    }

    // The text's characters, merged pair by pair: always the pair whose piece has the highest score, the leftmost of
    // equals. n bytes make at most 3n entries in the queue, so the time is n log n.
    struct Merges {
        struct Symbol {
            int start, size, prev, next;  // size 0: merged into its left neighbour; prev, next -1: none
            bool fixed;                   // user-defined: never merged
        };
        struct Pair {
            float score;
            int left, size;  // size of both symbols: it changes when either has been merged with another
            bool operator<(const Pair& o) const { return score < o.score || (score == o.score && left > o.left); }
        };
        const Tokenizer& t;
        std::string_view text;
        std::vector<Symbol> symbols;
        std::vector<Pair> pairs;                                    // a heap
        std::unordered_map<std::string_view, int> unused_split;     // size of the left half of an unused piece's merge
        std::vector<std::pair<std::string_view, int>> result;       // pieces and ids

        Merges(const Tokenizer& tokenizer, std::string_view normalized) : t(tokenizer), text(normalized) {
            if (text.empty()) return;
            symbols.reserve(text.size());
            for (size_t at = 0; at < text.size();) {
                size_t user = t.user_defined_length(text.substr(at)), size = user;
                if (!user) size = std::min<size_t>(character_size(text[at]), text.size() - at);
                int i = (int)symbols.size();
                symbols.push_back({(int)at, (int)size, i - 1, i + 1, user > 0});
                at += size;
            }
            // What no piece reaches across merges on its own: a small queue stays in the cache.
            int n = (int)symbols.size();
            for (int i = 1, begin = 0; i <= n; i++) {
                if (i < n && !(t.words_ && starts(text.substr(symbols[i].start), SPACE) &&
                               !ends(text.substr(0, symbols[i].start), SPACE))) continue;
                symbols[begin].prev = symbols[i - 1].next = -1;
                merge(begin, i);
                begin = i;
            }
        }

        void merge(int begin, int end) {
            pairs.clear();
            for (int i = begin; i + 1 < end; i++) push(i);
            std::make_heap(pairs.begin(), pairs.end());
            while (!pairs.empty()) {
                Pair top = pairs.front();
                std::pop_heap(pairs.begin(), pairs.end());
                pairs.pop_back();
                Symbol& a = symbols[top.left];
                if (!a.size || a.next < 0 || a.size + symbols[a.next].size != top.size) continue;
                Symbol& b = symbols[a.next];
                a.size = top.size;
                b.size = 0;
                a.next = b.next;
                if (a.next >= 0) symbols[a.next].prev = top.left;
                for (int left : {a.prev, top.left})
                    if (left >= 0 && push(left)) std::push_heap(pairs.begin(), pairs.end());
            }
            for (int i = begin; i >= 0; i = symbols[i].next) emit(text.substr(symbols[i].start, symbols[i].size));
        }

        // the pair of symbol `left` and the next one, if their concatenation is a piece
        bool push(int left) {
            const Symbol& a = symbols[left];
            if (a.next < 0 || a.fixed || symbols[a.next].fixed) return false;
            int size = a.size + symbols[a.next].size;
            if ((size_t)size > t.longest_) return false;
            std::string_view piece = text.substr(a.start, size);
            auto it = t.normal_.find(piece);
            if (it == t.normal_.end()) return false;
            if (t.type_[it->second] == UNUSED) unused_split[piece] = a.size;
            pairs.push_back({t.score_[it->second], left, size});
            return true;
        }

        // An unused piece may be a step on the way to longer ones; where the merges end with it, it falls apart again.
        void emit(std::string_view piece) {
            int id = t.id(piece);
            auto split = t.type_[id] == UNUSED ? unused_split.find(piece) : unused_split.end();
            if (split == unused_split.end()) {
                result.emplace_back(piece, id);
            } else {
                int n = split->second;
                emit(piece.substr(0, n));
                emit(piece.substr(n));
            }
        }
    };

    int id(std::string_view piece) const {
        auto it = normal_.find(piece);
        return it == normal_.end() ? unknown_ : it->second;
    }

    // Every size in the file is checked against what is left of it before it is used.
    void read(const std::string& path) {
        auto fail = [&](const std::string& what) {
            throw std::runtime_error(path + ": " + what + ". Make it with dev/data/convert_tokenizer.py.");
        };
        struct stat info;
        if (stat(path.c_str(), &info) || !S_ISREG(info.st_mode)) fail("there is no such file");
        if (info.st_size > (1 << 28)) fail("this is too large for a tokenizer");
        FILE* f = fopen(path.c_str(), "rb");
        if (!f) fail("cannot be read");
        file_.resize(info.st_size);
        file_.resize(fread(file_.data(), 1, file_.size(), f));
        fclose(f);
        std::string_view rest(file_.data(), file_.size());

        auto take = [&](size_t n) {
            if (n > rest.size()) fail("the file is cut short");
            std::string_view s = rest.substr(0, n);
            rest.remove_prefix(n);
            return s;
        };
        auto number = [&](auto value) {
            memcpy(&value, take(sizeof(value)).data(), sizeof(value));
            return value;
        };
        if (!starts(rest, "SGPTTOK1")) fail("this is not a tokenizer file");
        take(8);
        flags_ = number(0u);
        uint32_t V = number(0u), bos = number(0u), eos = number(0u);
        unknown_surface_ = take(number(0u));
        std::string_view trie = take(number(0u));
        if (trie.size() % 4) fail("the trie's size is no multiple of 4");
        trie_.resize(trie.size() / 4);
        if (!trie.empty()) memcpy(trie_.data(), trie.data(), trie.size());
        replacements_ = take(number(0u));
        if (trie_.empty() != replacements_.empty() || (!trie_.empty() && replacements_.back()))
            fail("trie and replacements do not fit together");
        if (V > rest.size() / 8) fail("the file is cut short");  // a piece takes 7 bytes and its text

        pieces_.reserve(V);
        std::unordered_set<std::string_view> all;
        std::fill(byte_id_, byte_id_ + 256, -1);
        for (int i = 0; i < (int)V; i++) {
            std::string name = "piece " + std::to_string(i);
            score_.push_back(number(0.0f));
            type_.push_back(number((uint8_t)0));
            pieces_.push_back(take(number((uint16_t)0)));
            std::string_view piece = pieces_.back();
            uint8_t type = type_.back();
            if (piece.empty()) fail(name + " is empty");
            if (type < NORMAL || type > BYTE) fail(name + " is of no known type");
            if (score_.back() != score_.back()) fail(name + " has no number as its score");
            if (!all.insert(piece).second) fail(name + " is there twice");
            if (type == NORMAL || type == USER_DEFINED || type == UNUSED) {
                normal_[piece] = i;
                longest_ = std::max(longest_, piece.size());
                for (size_t at = 1; (at = piece.find(SPACE, at)) != piece.npos; at += SPACE.size())
                    words_ = words_ && ends(piece.substr(0, at), SPACE);
            }
            if (type == UNKNOWN) {
                if (unknown_ >= 0) fail(name + " is a second unknown piece");
                unknown_ = i;
            } else if (type == BYTE) {
                if (byte_value(piece) < 0 || !(flags_ & BYTE_FALLBACK)) fail(name + " cannot be a byte");
                byte_id_[byte_value(piece)] = i;
            } else if (type == USER_DEFINED) {
                user_first_[(unsigned char)piece[0]] = true;
                user_lengths_.push_back(piece.size());
            }
        }
        if (!rest.empty()) fail("there are bytes behind the last piece");
        if (unknown_ < 0) fail("there is no unknown piece");
        if (bos >= V || eos >= V || type_[bos] != CONTROL || type_[eos] != CONTROL)
            fail("BOS or EOS is no control piece");
        if ((flags_ & BYTE_FALLBACK) && std::count(byte_id_, byte_id_ + 256, -1)) fail("some byte has no piece");
        bos_ = (int)bos;
        eos_ = (int)eos;
        std::sort(user_lengths_.begin(), user_lengths_.end(), std::greater<size_t>());
        user_lengths_.erase(std::unique(user_lengths_.begin(), user_lengths_.end()), user_lengths_.end());
        bpe_ = true;
    }
};
