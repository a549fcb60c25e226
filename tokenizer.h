// Text to token ids and back: bytes, or byte-pair encoding and unigram models with exactly the ids of sentencepiece,
// tiktoken or Hugging Face's tokenizers. Plain C++17, usable alone. dev/data/convert_tokenizer.py writes the file from
// the libraries' own.
//
// Special tokens (BOS, EOS, ...) are ids only: their names in a text are ordinary text (tiktoken's encode_ordinary,
// encode_special_tokens of tokenizers), and decode() leaves them out.
//
// Tokenizer file, little-endian, nothing padded:
//   char[8] "SGPTTOK2", or "SGPTTOK3" of a file that has the parts so marked
//   uint32  flags    1 add_dummy_prefix, 2 remove_extra_whitespaces, 4 escape_whitespaces,
//                    8 treat_whitespace_as_suffix, 16 byte_fallback (these as in sentencepiece)
//                    32 byte level: text is cut into words by `split`, which begin as bytes; no normalisation
//                    64 merges are listed, 128 a word that is a piece is not merged
//                    256 the dummy prefix only where the text starts with no space, 512 each space starts a word,
//                    1024 decoded text loses one leading space, 2048 a run of bytes is all UTF-8 or all U+FFFD
//                    3: 4096 the dummy prefix only at the very start, 8192 unigram, not BPE
//   uint32  V, bos, eos
//   uint32  size of the unknown piece's surface, then its bytes (what an unknown id decodes to)
//   uint32  size of the trie, then its uint32 units: a double array from text to offsets into the strings that follow
//   uint32  size of the strings, then the strings that replace text, each ending in a zero byte (no trie: 0 and 0)
//   V times: float score, uint8 type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; 3: and of what
//            is user-defined 8 takes the spaces before it, 16 behind it, 32 is found in the normal form), uint16 size,
//            the piece's bytes
//   uint32  split    how words are cut, see enum Split
//   uint32  number of runs of code points of one class, then for each uint32 first << 3 | class, see enum Class: in the
//           file, so that a newer Unicode needs no newer program
//   uint32  number of merges, then for each uint32 left, right: ids of pieces whose concatenation is a piece, in order
//           of precedence. Not listed: any two pieces whose concatenation is a piece, by its score.
//   3: uint32 number of characters of Unicode's normal form, then for each uint32 code point << 8 | combining class,
//           uint32 number of code points that it is decomposed into, these (none: itself)
//   3: uint32 number of compositions, then for each uint32 first, second, the code point that they become. Hangul
//           needs no entries. Neither characters nor compositions: no normal form.
//   3: uint32 number of runs of code points of one class of the rules, then for each uint32 first << 8 | class
//   3: uint32 number of rules, which cut text instead of `split`, each what the one before it has cut; for each uint32
//           number of classes and one for the end of the text, uint32 number of states, then for each state and class
//           uint16, see struct Rule
#pragma once
#include <algorithm>
#include <bitset>
#include <cerrno>
#include <cfloat>
#include <climits>
#include <cmath>
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

// encode() keeps its workspace in the object: one thread at a time for each.
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

    int vocab_size() const { return V_; }
    int bos() const { return bos_; }
    int eos() const { return eos_; }

    // ids of text, any bytes, without BOS and EOS. A byte that is no UTF-8 is, at byte level, encoded as it is, a
    // character that is no letter, digit or space; else, and where no piece has such a byte, it is taken for U+FFFD.
    std::vector<int> encode(std::string_view text) const {
        std::vector<int> ids;
        if (!bpe_) {
            for (char c : text) ids.push_back((unsigned char)c);
            return ids;
        }
        if (text.size() > (1u << 28))
            throw std::runtime_error("tokenizer: one text of more than 256 MiB. Split it into documents.");
        if (unused_) work_.split.assign(pieces_.size(), {-1, -1});
        ids.reserve(text.size() / 3);
        work_.total = 0;
        if (flags_ & (BYTE_LEVEL | HF_BYTES))  // tokenizers cut first, and bring each part to its normal form
            cut(text, false, ids, [&](std::string_view part) {
                const std::string normal = !byte_level() ? normalize(part, part.data() == text.data()) :
                                           form_.empty() ? std::string() : normal_form(part);
                cut(byte_level() && form_.empty() ? part : normal, true, ids,
                    [&](std::string_view s) { encode_part(s, ids); });
            });
        else if (flags_ & UNIGRAM)
            encode_part(normalize(text, true), ids);
        else
            cut(normalize(text, true), false, ids, [&](std::string_view s) { encode_part(s, ids); });
        return ids;
    }

    // text of ids, as the library decodes it without special tokens: UTF-8, U+FFFD for what is none. V = 258: the bytes
    // as they are. Throws std::runtime_error on an id that is not in [0,V).
    std::string decode(const std::vector<int>& ids) const {
        std::string text;
        Stream stream(*this);
        for (int id : ids)
            if (bpe_)
                stream.put(id, text);
            else
                text += decode_piece(id);
        stream.end(text);
        return text;
    }

    // decode(), id by id: text grows by what is certain, an unfinished character waits for the ids that follow. Also of
    // V = 258 a byte that is no UTF-8 becomes U+FFFD.
    class Stream {
    public:
        explicit Stream(const Tokenizer& tokenizer) : t_(tokenizer) {}

        void put(int id, std::string& text) {
            std::string piece = t_.decode_piece(id);
            const uint8_t type = t_.bpe_ ? t_.type_[id] : uint8_t(BYTE);
            if (type == CONTROL && t_.flags_ & (BYTE_LEVEL | HF_BYTES)) return;
            const size_t before = text.size();
            if (type == BYTE || t_.byte_level()) {
                bytes_ += piece;
                release(text, false);
            } else {
                release(text, true);
                // sentencepiece drops the dummy prefix of the first piece, with REMOVE_SPACES all leading spaces
                if (dropped_ || started_ || text.size() > before) at_start_ = false;
                dropped_ = false;
                if (at_start_ && type != CONTROL && type != UNKNOWN && !(t_.flags_ & HF_BYTES) &&
                    t_.flags_ & (DUMMY_PREFIX | REMOVE_SPACES) && starts(t_.pieces_[id], SPACE)) {
                    piece.erase(0, 1);
                    dropped_ = !(t_.flags_ & REMOVE_SPACES);
                }
                text += piece;
            }
            begin(text, before);
        }

        void end(std::string& text) {
            const size_t before = text.size();
            release(text, true);
            begin(text, before);
        }

    private:
        const Tokenizer& t_;
        std::string bytes_;  // of characters that are not complete
        bool at_start_ = true, dropped_ = false, started_ = false;

        void begin(std::string& text, size_t before) {
            if (started_ || text.size() == before) return;
            started_ = true;
            if (t_.flags_ & DROP_SPACE && text[before] == ' ') text.erase(before, 1);
        }

        // Appends the bytes' characters. U+FFFD stands for what will be none: each byte, or at byte level each
        // beginning of a character that ends early. What may still become one waits, unless `all`.
        void release(std::string& text, bool all) {
            std::string_view s = bytes_;
            const bool hf = t_.flags_ & HF_BYTES;
            if (hf && !all) return;
            for (bool broken = false; !s.empty();) {
                auto [n, whole] = utf8(s);
                if (!whole && n == s.size() && !all) break;
                if (!whole && hf && !broken) {
                    broken = true;
                    text.resize(text.size() - (bytes_.size() - s.size()));
                    s = bytes_;
                }
                if (broken || (!whole && !t_.byte_level())) n = 1;
                text += whole && !broken ? s.substr(0, n) : REPLACEMENT;
                s.remove_prefix(n);
            }
            bytes_.erase(0, bytes_.size() - s.size());
        }
    };

    // bytes of a text that an id stands for; at_start: its first, whose dummy prefix is none of it
    size_t text_bytes(int id, bool at_start) const {
        const size_t size = decode_piece(id).size();
        if (!bpe_ || type_[id] == CONTROL) return bpe_ ? 0 : size;
        const bool prefix = at_start && size && flags_ & (DUMMY_PREFIX | REMOVE_SPACES | DROP_SPACE) &&
                            (type_[id] == NORMAL || type_[id] == USER_DEFINED) && starts(pieces_[id], SPACE);
        return size - prefix;
    }

    // text of one id as it is: all its spaces, a byte id's byte, part of a character; nothing for a control id
    std::string decode_piece(int id) const {
        if (id < 0 || id >= V_)
            throw std::runtime_error("tokenizer: id " + std::to_string(id) + " is not in [0, " + std::to_string(V_) +
                                     "). Use the tokenizer that made the data.");
        if (!bpe_) return id < 256 ? std::string(1, (char)id) : std::string();
        if (type_[id] == CONTROL) return {};
        if (type_[id] == UNKNOWN) return unknown_surface_;
        if (type_[id] == BYTE) return std::string(1, (char)byte_value(pieces_[id]));
        if (byte_level()) return std::string(pieces_[id]);
        std::string text;
        for (std::string_view s = pieces_[id]; !s.empty();) {
            bool space = starts(s, SPACE);
            text += space ? ' ' : s[0];
            s.remove_prefix(space ? SPACE.size() : 1);
        }
        return text;
    }

private:
    enum {
        DUMMY_PREFIX = 1, REMOVE_SPACES = 2, ESCAPE_SPACES = 4, SPACE_AS_SUFFIX = 8, BYTE_FALLBACK = 16,
        BYTE_LEVEL = 32, LISTED_MERGES = 64, WHOLE_WORDS = 128, PREFIX_IF_NONE = 256, CUT_AT_SPACES = 512,
        DROP_SPACE = 1024, HF_BYTES = 2048, PREFIX_ONCE = 4096, UNIGRAM = 8192
    };
    enum Type : uint8_t { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };
    enum { LSTRIP = 8, RSTRIP = 16, IN_NORMAL_FORM = 32 };  // with USER_DEFINED in a file
    enum { CHANGES = 1, JOINS = 2 };  // of a character, in a normal form: alone, what is before it
    // all else; Lu and Lt, Ll, Lm and Lo, M, N of Unicode; \s
    enum Class : uint8_t { OTHER, UPPER, LOWER, LETTER, MARK, NUMBER, WHITE };
    enum Split {
        DIGITS = 3,             // most digits of a number; 0: any, and a space before them
        ANY_PREFIX = 4,         // a word takes one character before it, no letter, digit, \r or \n; else only a space
        CASED = 8,              // upper case after lower starts a word; marks are letters
        CONTRACTION = 16,       // 's 't 're 've 'm 'll 'd are words
        CONTRACTION_TAIL = 32,  // they belong to the word before them
        ANY_CASE = 64,          // also in capitals
        NEWLINE_TAIL = 128,     // \r and \n belong to the punctuation before them
        SLASH_TAIL = 256,       // and so does /
        NEWLINES = 512,         // spaces up to the last \r or \n among them are a word
        END_SPACES = 1024,      // spaces that end the text are one word
        DIGITS_APART = 2048     // the text is first cut before and behind each digit
    };
    static constexpr std::string_view SPACE = "\xe2\x96\x81", REPLACEMENT = "\xef\xbf\xbd";  // U+2581, U+FFFD
    static constexpr size_t NOTHING = SIZE_MAX;
    static constexpr uint32_t NEVER = UINT32_MAX, CODES = 0x110000;  // CODES is also what is no UTF-8

    struct Merge {
        uint64_t key;   // left id << 32 | right id
        uint32_t rank;  // lowest first; NEVER: an empty slot
        int id;         // what the two become
    };
    struct Symbol {
        int id, start, prev, next;  // prev, next < 0: none
        uint32_t rank;              // of its merge with the next one; NEVER: none, or merged into the one before
        int merged;                 // id of that merge
    };
    struct CachedWord {
        uint8_t size, count;
        char word[22];
        int ids[9];
        float margin;  // unigram: by how much its cut is better than any other
    };
    struct Node {
        uint32_t child;  // the first one
        int id;          // of the piece that ends here; < 0: none
    };
    struct Path {  // unigram: the best way to cut up to here
        float score, second;  // and the score of the next best
        int id;               // of its last piece; < 0: unknown
        uint32_t from;        // where that begins; NEVER: there is no way yet
    };
    // A regular expression as an automaton. next[state * classes + class of the next character], the last class
    // standing for the end of the text: the next state << 1, and 1 where what has been read by now is a match, the best
    // so far. In state 0 none follows; 1 is the first.
    struct Rule {
        uint32_t classes;
        std::vector<uint16_t> next;
    };
    static_assert(sizeof(CachedWord) == 64, "a cache line");
    struct Work {
        std::vector<CachedWord> cache;
        std::vector<Symbol> symbols;
        std::vector<uint64_t> queue;  // rank << 32 | index of the left symbol: a heap, lowest first
        std::vector<int> ids;
        std::vector<std::pair<int, int>> split;  // of an unused piece: what it was last made of; -1: nothing
        std::vector<Path> paths;
        float total = 0;  // unigram: score of the text so far
    };
    struct Added {                    // the user-defined pieces of a kind
        std::vector<size_t> lengths;  // longest first
        std::bitset<65536> starts;    // by their first two bytes
        std::unordered_map<std::string_view, int> ids;
    };

    // The views in here point into file_'s heap buffer; a vector keeps that when it is moved, and copies are refused.
    Tokenizer() = default;
    bool bpe_ = false, unused_ = false;
    int V_ = 258, bos_ = 256, eos_ = 257, unknown_ = -1;
    uint32_t flags_ = 0, split_ = 0;
    std::vector<char> file_;
    std::vector<std::string_view> pieces_;  // behind V_: characters that are no piece, but part of one
    std::vector<float> score_;
    std::vector<uint8_t> type_;
    size_t words_ = 0;                      // in slots_
    std::vector<int> slots_;                // hash table of what text can be: no unknown, control and byte pieces
    std::vector<Merge> merges_;             // hash table by key
    std::vector<Node> nodes_;               // unigram: the trie by depth, so that children are in a row; and an end
    std::vector<uint8_t> labels_;           // of each node: the byte that leads there
    float unknown_score_ = 0, reach_ = 0;   // unigram: reach_ is more than any path's score within a cached word
    std::vector<Rule> rules_;
    std::vector<uint8_t> rule_class_;       // of each code point
    std::vector<std::bitset<256>> joined_;  // [a][b]: some piece has such characters side by side, see step()
    std::vector<uint8_t> class_;            // of each code point
    Added added_[2];                        // found in the text as it is, in its normal form
    std::vector<uint8_t> added_flags_;      // of each piece
    std::vector<uint8_t> form_, order_;     // of each code point: what the normal form does, combining class
    std::unordered_map<uint32_t, std::vector<uint32_t>> decomposed_;
    std::unordered_map<uint64_t, uint32_t> composed_;  // by first << 32 | second
    bool plain_[128] = {};                  // an ASCII character that normalisation leaves as it is
    int first_id_[256] = {};                // id of a one-byte piece
    int byte_id_[256] = {};                 // byte_id_[0] < 0: no byte fallback
    std::string unknown_surface_;
    std::vector<uint32_t> trie_;
    std::string_view replacements_;
    mutable Work work_;

public:
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;
    Tokenizer(Tokenizer&&) = default;
    Tokenizer& operator=(Tokenizer&&) = default;

private:
    bool byte_level() const { return flags_ & BYTE_LEVEL; }
    static bool starts(std::string_view s, std::string_view prefix) { return s.substr(0, prefix.size()) == prefix; }
    static bool ends(std::string_view s, std::string_view suffix) {
        return s.size() >= suffix.size() && s.substr(s.size() - suffix.size()) == suffix;
    }

    // size that the first byte of a UTF-8 character announces
    static int announced_size(unsigned char first) {
        return first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    }

    // the bytes at the start of s, at least one, that are a UTF-8 character or begin one; whether it is whole
    static std::pair<size_t, bool> utf8(std::string_view s) {
        unsigned char c = s[0], low = 0x80, high = 0xbf;  // of the second byte: no surrogates, nothing too long or high
        size_t size = c < 0x80 ? 1 : c < 0xc2 ? 0 : c < 0xf5 ? announced_size(c) : 0, n = 1;
        if (c == 0xe0) low = 0xa0;
        if (c == 0xed) high = 0x9f;
        if (c == 0xf0) low = 0x90;
        if (c == 0xf4) high = 0x8f;
        for (; n < size && n < s.size() && (unsigned char)s[n] >= low && (unsigned char)s[n] <= high; n++)
            low = 0x80, high = 0xbf;
        return {n, n == size};
    }

    // "<0x41>" is 0x41; -1: not of that form
    static int byte_value(std::string_view piece) {
        static constexpr std::string_view digits = "0123456789ABCDEF";
        if (piece.size() != 6 || !starts(piece, "<0x") || piece[5] != '>') return -1;
        size_t high = digits.find(piece[3]), low = digits.find(piece[4]);
        return high == digits.npos || low == digits.npos ? -1 : (int)(high << 4 | low);
    }

    static uint64_t mix(uint64_t h) {
        h *= 0x9e3779b97f4a7c15;
        return h ^ h >> 32;
    }

    static uint64_t hash(std::string_view s) {
        uint64_t h = s.size(), w = 0;
        for (; s.size() >= 8; s.remove_prefix(8)) {
            memcpy(&w, s.data(), 8);
            h = mix(h ^ w);
        }
        w = 0;
        for (size_t i = 0; i < s.size(); i++) w = w << 8 | (unsigned char)s[i];
        return mix(h ^ w);
    }

    // where piece is or would be in slots_
    size_t slot(std::string_view piece) const {
        const size_t mask = slots_.size() - 1;
        size_t i = hash(piece) & mask;
        while (slots_[i] >= 0 && pieces_[slots_[i]] != piece) i = (i + 1) & mask;
        return i;
    }
    int find(std::string_view piece) const { return slots_[slot(piece)]; }

    size_t merge_slot(uint64_t key) const {
        const size_t mask = merges_.size() - 1;
        size_t i = mix(mix(key)) & mask;
        while (merges_[i].rank != NEVER && merges_[i].key != key) i = (i + 1) & mask;
        return i;
    }

    static size_t two_bytes(unsigned char first, unsigned char second) { return first << 8 | second; }

    // the longest user-defined piece of a kind that s starts with; < 0: none
    int user_defined(std::string_view s, bool normal = false) const {
        const Added& added = added_[normal];
        if (added.lengths.empty() || !added.starts[two_bytes(s[0], s.size() > 1 ? s[1] : 0)]) return -1;
        for (size_t n : added.lengths) {
            auto found = n > s.size() ? added.ids.end() : added.ids.find(s.substr(0, n));
            if (found != added.ids.end()) return found->second;
        }
        return -1;
    }

    // Cuts text at the user-defined pieces of a kind: their ids to `ids`, what is between them to rest(), in order.
    template <typename Rest>
    void cut(std::string_view text, bool normal, std::vector<int>& ids, Rest rest) const {
        size_t from = added_[normal].lengths.empty() ? text.size() : 0, stop = 0;
        if (from && from == text.size()) return rest(text);
        for (size_t at = 0; at < text.size();) {
            const int id = user_defined(text.substr(at), normal);
            if (id < 0) {
                at++;
                continue;
            }
            size_t start = at, end = at + pieces_[id].size();
            if (added_flags_[id] & LSTRIP)
                for (size_t before = from; before < start;) {  // start: of the white space that reaches up to it
                    const size_t spaces = span(text, before, 1 << WHITE);
                    if (spaces >= start) start = before;
                    else before = spaces + character(text, spaces).size;
                }
            at = end;  // a piece may also be found in the white space that the one before it has taken
            if (added_flags_[id] & RSTRIP) end = stop = span(text, std::max(end, stop), 1 << WHITE);
            if (start > from) rest(text.substr(from, start - from));
            ids.push_back(id);
            from = end;
        }
        if (from < text.size()) rest(text.substr(from));
    }

    // ---- byte level: words

    // the character at `at`, and its size; CODES: a byte that is no UTF-8
    static std::pair<uint32_t, size_t> code_point(std::string_view s, size_t at) {
        unsigned char c = s[at];
        if (c < 0x80) return {c, 1};
        auto [n, whole] = utf8(s.substr(at));
        if (!whole) return {CODES, 1};
        uint32_t code = c & (0x7f >> n);
        for (size_t i = 1; i < n; i++) code = code << 6 | (s[at + i] & 0x3f);
        return {code, n};
    }

    struct Character {
        Class kind;
        size_t size;
    };
    Character character(std::string_view s, size_t at) const {
        auto [code, n] = code_point(s, at);
        return {(Class)class_[code], n};
    }

    // end of the characters from `at` on whose class is in the set of bits
    size_t span(std::string_view s, size_t at, uint32_t set) const {
        while (at < s.size()) {
            Character c = character(s, at);
            if (!(set >> c.kind & 1)) break;
            at += c.size;
        }
        return at;
    }

    // end of 's, 't, 're, ... at `at`; else `at`
    size_t contraction(std::string_view s, size_t at) const {
        if (s[at] != '\'' || at + 1 == s.size()) return at;
        const bool any_case = split_ & ANY_CASE;
        auto letter = [&](size_t i) -> char {
            return i >= s.size() ? 0 : any_case && s[i] >= 'A' && s[i] <= 'Z' ? s[i] + 32 : s[i];
        };
        char a = letter(at + 1), b = letter(at + 2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
        if ((b == 'e' && (a == 'r' || a == 'v')) || (a == 'l' && b == 'l')) return at + 3;
        return any_case && starts(s.substr(at + 1), "\u017f") ? at + 3 : at;  // U+017F is an s to regular expressions
    }

    // end of the letters from `at` on; `at`: none. CASED: of [UPPER LETTER MARK]* [LOWER LETTER MARK]+
    size_t letters(std::string_view s, size_t at) const {
        if (!(split_ & CASED)) return span(s, at, 1 << UPPER | 1 << LOWER | 1 << LETTER);
        size_t caseless = at, i = at;  // what could end the word if nothing of lower case follows
        while (i < s.size()) {
            Character c = character(s, i);
            if (c.kind != UPPER && c.kind != LETTER && c.kind != MARK) break;
            i += c.size;
            if (c.kind != UPPER) caseless = i;
        }
        size_t end = span(s, i, 1 << LOWER | 1 << LETTER | 1 << MARK);
        return end > i ? end : caseless;
    }

    // size of the first word of s, as the tokenizer's regular expression cuts it
    size_t word_size(std::string_view s) const {
        auto newline = [&](size_t i) { return s[i] == '\r' || s[i] == '\n'; };
        const auto [kind, n] = character(s, 0);
        const size_t space = s[0] == ' ';
        if (split_ & CONTRACTION)
            if (size_t end = contraction(s, 0)) return end;

        size_t at = space;
        if (split_ & ANY_PREFIX && (kind == OTHER || kind == MARK || kind == WHITE) && !newline(0)) at = n;
        size_t end = letters(s, at);
        if (end == at && at && kind == MARK) at = 0, end = letters(s, 0);
        if (end == at && split_ & CASED) end = span(s, at, 1 << UPPER);
        if (end > at) return split_ & CONTRACTION_TAIL && end < s.size() ? contraction(s, end) : end;

        if (!(split_ & DIGITS)) {
            end = span(s, space, 1 << NUMBER);
            if (end > space) return end;
        } else if (kind == NUMBER) {
            end = n;
            for (uint32_t i = 1; i < (split_ & DIGITS) && end < s.size(); i++) {
                Character c = character(s, end);
                if (c.kind != NUMBER) break;
                end += c.size;
            }
            return end;
        }

        end = span(s, space, 1 << OTHER | 1 << MARK);
        if (end > space) {
            auto tail = [&](size_t i) {
                return (split_ & NEWLINE_TAIL && newline(i)) || (split_ & SLASH_TAIL && s[i] == '/');
            };
            while (end < s.size() && tail(end)) end++;
            return end;
        }

        end = span(s, 0, 1 << WHITE);
        if (end == 0) return n;  // a space, which the file's classes do not know
        if (end == s.size() && split_ & END_SPACES) return end;
        if (split_ & NEWLINES)
            for (size_t i = end; i > 0; i--)
                if (newline(i - 1)) return i;
        if (end == s.size()) return end;
        size_t last = end - 1;  // spaces leave the last one to the word behind them
        while (last > 0 && (s[last] & 0xc0) == 0x80) last--;
        return last ? last : end;
    }

    // ---- Unicode's normal form

    // Characters of a piece of text, decomposed, in their canonical order, and composed again. None but the first is a
    // beginning that nothing before it changes.
    void compose(std::vector<uint32_t>& codes) const {
        std::vector<uint32_t> all;
        for (uint32_t c : codes) {
            auto found = decomposed_.find(c);
            if (found != decomposed_.end()) {
                all.insert(all.end(), found->second.begin(), found->second.end());
            } else if (const uint32_t s = c - 0xac00; s < 11172) {  // Hangul
                all.insert(all.end(), {0x1100 + s / 588, 0x1161 + s % 588 / 28});
                if (s % 28) all.push_back(0x11a7 + s % 28);
            } else {
                all.push_back(c);
            }
        }
        for (size_t i = 0, end; i < all.size(); i = end + 1) {
            for (end = i; end < all.size() && order_[all[end]]; end++) {}
            std::stable_sort(all.begin() + i, all.begin() + end,
                             [&](uint32_t a, uint32_t b) { return order_[a] < order_[b]; });
        }
        codes.clear();
        size_t starter = SIZE_MAX;  // what the next one may become one with
        for (uint32_t c : all) {
            const bool near = starter + 1 == codes.size() || (starter != SIZE_MAX && order_[codes.back()] < order_[c]);
            if (const uint32_t both = near && !codes.empty() ? composition(codes[starter], c) : 0) {
                codes[starter] = both;
                continue;
            }
            if (!order_[c]) starter = codes.size();
            codes.push_back(c);
        }
    }

    // what a and b become; 0: they stay
    uint32_t composition(uint32_t a, uint32_t b) const {
        if (a - 0x1100 < 19 && b - 0x1161 < 21) return 0xac00 + ((a - 0x1100) * 21 + b - 0x1161) * 28;
        if (a - 0xac00 < 11172 && (a - 0xac00) % 28 == 0 && b - 0x11a8 < 27) return a + b - 0x11a7;
        auto found = composed_.find((uint64_t)a << 32 | b);
        return found == composed_.end() ? 0 : found->second;
    }

    // text in its normal form; what is no UTF-8 stays
    std::string normal_form(std::string_view text) const {
        std::string out;
        out.reserve(text.size());
        std::vector<uint32_t> codes;
        size_t done = 0;  // so much of it is in out
        for (size_t at = 0; at < text.size();) {
            const size_t start = at;
            auto [code, n] = code_point(text, at);
            at += n;
            if (code == CODES || (!form_[code] && (at == text.size() || (unsigned char)text[at] < 0x80))) continue;
            codes.assign(1, code);
            while (at < text.size()) {
                auto [next, size] = code_point(text, at);
                if (!(form_[next] & JOINS)) break;
                codes.push_back(next);
                at += size;
            }
            if (!form_[code] && codes.size() == 1) continue;
            compose(codes);
            out += text.substr(done, start - done);
            done = at;
            for (uint32_t c : codes) append_utf8(c, out);
            check_size(out);
        }
        return out += text.substr(done);
    }

    static void append_utf8(uint32_t c, std::string& out) {
        if (c < 0x80) {
            out += (char)c;
            return;
        }
        const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
        out += (char)((0xf80 >> more) | c >> (6 * more));
        for (int i = more - 1; i >= 0; i--) out += (char)(0x80 | (c >> (6 * i) & 0x3f));
    }

    static void check_size(const std::string& normal) {
        if (normal.size() > INT_MAX / 2)
            throw std::runtime_error("tokenizer: the normal form of one text is over 1 GiB. Split it into documents.");
    }

    // ---- rules

    // End of what the rule matches at `at`; NOTHING: it does not. hopeless: of long ways each 64th place << 16 | state
    // from where no match was found, so that a rule that looks far ahead in vain does it once, not at each character.
    size_t match(const Rule& rule, std::string_view s, size_t at, std::unordered_set<uint64_t>& hopeless) const {
        size_t end = NOTHING;
        for (size_t i = at, state = 1; state; ) {
            const bool more = i < s.size();
            auto [code, n] = more ? code_point(s, i) : std::make_pair(CODES, (size_t)0);
            const uint16_t next = rule.next[state * rule.classes + (more ? rule_class_[code] : rule.classes - 1)];
            if (next & 1) end = i;
            else if (i / 64 > at / 64 + 1 && i % 64 < n && !hopeless.insert(i << 16 | state).second) break;
            if (!more) break;
            state = next >> 1;
            i += n;
        }
        return end;
    }

    // Cuts text by the rules from the n-th on, each within what the one before it has cut: what it matches, and what is
    // between. A match of nothing cuts there too.
    void cut_by_rules(std::string_view s, size_t n, std::vector<int>& ids) const {
        if (n == rules_.size()) return encode_word(s, ids);
        std::unordered_set<uint64_t> hopeless;
        size_t from = 0;
        auto cut_at = [&](size_t at) {
            if (at > from) cut_by_rules(s.substr(from, at - from), n + 1, ids);
            from = at;
        };
        for (size_t at = 0, end; at < s.size(); at = end > at ? end : at + code_point(s, at).second) {
            end = match(rules_[n], s, at, hopeless);
            if (end == NOTHING) end = at;
            else cut_at(at), cut_at(end);
        }
        cut_at(s.size());
    }

    // ---- others: normal form, and parts of it that merge on their own

    // of a unit of the trie: bits 10.., times 256 if bit 9
    static uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 512) >> 6); }

    // how the text starts after normalisation, and the bytes of text that this stands for
    std::pair<std::string_view, size_t> normalize_prefix(std::string_view text) const {
        if ((unsigned char)text[0] < 0x80 && plain_[(unsigned char)text[0]]) return {text.substr(0, 1), 1};
        if (const int id = user_defined(text); id >= 0) return {pieces_[id], pieces_[id].size()};
        // Longest match in the double array. A unit holds a label (bits 0..7, and 31 for a leaf), whether a leaf
        // hangs below (bit 8) and an offset (see offset()); a leaf holds its value in bits 0..30.
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
        auto [n, whole] = utf8(text);
        return whole ? std::make_pair(text.substr(0, n), n) : std::make_pair(REPLACEMENT, (size_t)1);
    }

    // first: text is not what follows a user-defined piece
    std::string normalize(std::string_view text, bool first) const {
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
        if (flags_ & DUMMY_PREFIX && !(flags_ & SPACE_AS_SUFFIX) && (first || !(flags_ & PREFIX_ONCE)) &&
            !(flags_ & PREFIX_IF_NONE && (text[0] == ' ' || starts(text, SPACE))))
            out += space;
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
            check_size(out);
        }
        while (remove && ends(out, space)) out.resize(out.size() - space.size());
        if (flags_ & DUMMY_PREFIX && flags_ & SPACE_AS_SUFFIX) out += space;
        return out;
    }

    // Steps over the character at `at`; false: it is the last one of s. before, after: what joined_ knows of the
    // characters on both sides, their last and first byte, or 255 for a space.
    static bool step(std::string_view s, size_t& at, int& before, int& after) {
        const bool space = starts(s.substr(at), SPACE);
        at += announced_size(s[at]);
        if (at >= s.size()) return false;
        before = space ? 255 : (unsigned char)s[at - 1];
        after = starts(s.substr(at), SPACE) ? 255 : (unsigned char)s[at];
        return true;
    }

    // Size of what merges on its own at the start of s: two characters that no piece has side by side end it. With
    // unused pieces joined_ is empty and text merges as a whole: what they fall apart into depends on all of it.
    size_t part_size(std::string_view s) const {
        int before, after;
        for (size_t at = 0; !joined_.empty() && step(s, at, before, after);)
            if (!joined_[before][after]) return at;
        return s.size();
    }

    // ---- merges

    // ids of what is between user-defined pieces, in its normal form
    void encode_part(std::string_view s, std::vector<int>& ids) const {
        std::string prefixed;
        if (byte_level() && (flags_ & DUMMY_PREFIX) && s[0] != ' ') s = prefixed = " " + std::string(s);
        if (!rules_.empty()) return cut_by_rules(s, 0, ids);
        while (!s.empty()) {
            std::string_view run = s;
            if (split_ & DIGITS_APART) {
                Character c = character(s, 0);
                run = s.substr(0, c.kind == NUMBER ? c.size : span(s, 0, ~(1u << NUMBER)));
            }
            s.remove_prefix(run.size());
            while (!run.empty()) {
                size_t n = byte_level() ? word_size(run) : part_size(run);
                if (flags_ & UNIGRAM) cut_best(run.substr(0, n), ids);
                else encode_word(run.substr(0, n), ids);
                run.remove_prefix(n);
            }
        }
    }

    // the place of a word in the cache, and whether it is there
    std::pair<CachedWord&, bool> cached_word(std::string_view word) const {
        CachedWord& cached = work_.cache[hash(word) & (work_.cache.size() - 1)];
        return {cached, cached.size == word.size() && !memcmp(cached.word, word.data(), word.size())};
    }

    static void keep(CachedWord& cached, std::string_view word, const std::vector<int>& ids, float margin = 0) {
        if (word.size() > sizeof(cached.word) || ids.size() > std::size(cached.ids)) return;
        cached.margin = margin;
        cached.size = (uint8_t)word.size();
        cached.count = (uint8_t)ids.size();
        memcpy(cached.word, word.data(), word.size());
        std::copy(ids.begin(), ids.end(), cached.ids);
    }

    void encode_word(std::string_view word, std::vector<int>& ids) const {
        auto [cached, known] = cached_word(word);
        if (known) return append(cached.ids, cached.count, ids);
        std::vector<int>& result = work_.ids;
        result.clear();
        int id = flags_ & WHOLE_WORDS ? find(word) : -1;
        if (id >= 0)
            result.push_back(id);
        else
            merge(word);
        append(result.data(), result.size(), ids);
        if (!unused_) keep(cached, word, result);
    }

    // a run of unknown pieces is one unknown id
    void append(const int* from, size_t n, std::vector<int>& ids) const {
        for (size_t i = 0; i < n; i++)
            if (unknown_ < 0 || from[i] != unknown_ || ids.empty() || ids.back() != unknown_) ids.push_back(from[i]);
    }

    // Ids of a word to work_.ids: its characters, merged pair by pair; always the merge of lowest rank, the leftmost of
    // equals. n characters make at most 3n entries in the queue, so the time is n log n.
    void merge(std::string_view word) const {
        std::vector<Symbol>& symbols = work_.symbols;
        std::vector<uint64_t>& queue = work_.queue;
        symbols.clear();
        queue.clear();
        for (size_t at = 0; at < word.size();) {
            size_t size = byte_level() ? 1 : std::min<size_t>(announced_size(word[at]), word.size() - at);
            int id = size == 1 ? first_id_[(unsigned char)word[at]] : find(word.substr(at, size));
            int i = (int)symbols.size();
            symbols.push_back({id, (int)at, i - 1, i + 1, NEVER, -1});
            at += size;
        }
        symbols.back().next = -1;
        for (int i = 0; i < (int)symbols.size(); i++)
            if (pair(i)) queue.push_back((uint64_t)symbols[i].rank << 32 | i);
        std::make_heap(queue.begin(), queue.end(), std::greater<>());
        while (!queue.empty()) {
            std::pop_heap(queue.begin(), queue.end(), std::greater<>());
            const int i = (int)queue.back();
            Symbol& a = symbols[i];
            const bool stale = a.rank != queue.back() >> 32;  // one of the two has been merged with another
            queue.pop_back();
            if (stale) continue;
            Symbol& b = symbols[a.next];
            a.id = a.merged;
            a.next = b.next;
            b.rank = NEVER;
            if (a.next >= 0) symbols[a.next].prev = i;
            for (int left : {a.prev, i}) {
                if (left < 0 || !pair(left)) continue;
                queue.push_back((uint64_t)symbols[left].rank << 32 | left);
                std::push_heap(queue.begin(), queue.end(), std::greater<>());
            }
        }
        for (int i = 0, next; i >= 0; i = next) {
            next = symbols[i].next;
            const size_t start = symbols[i].start, end = next < 0 ? word.size() : symbols[next].start;
            emit(symbols[i].id, word.substr(start, end - start));
        }
    }

    // settles the merge of symbol i and the next one; whether there is one
    bool pair(int i) const {
        Symbol& a = work_.symbols[i];
        a.rank = NEVER;
        const int right = a.next < 0 ? -1 : work_.symbols[a.next].id;
        if (a.id < 0 || right < 0) return false;
        const Merge& m = merges_[merge_slot((uint64_t)a.id << 32 | (uint32_t)right)];
        if (m.rank == NEVER) return false;
        a.rank = m.rank;
        a.merged = m.id;
        if (type_[m.id] == UNUSED) work_.split[m.id] = {a.id, right};
        return true;
    }

    // An unused piece may be a step on the way to longer ones; where the merges end with it, it falls apart again, and
    // one that is a character is unknown.
    void emit(int id, std::string_view text) const {
        std::vector<int>& ids = work_.ids;
        if (id >= 0 && type_[id] == UNUSED && work_.split[id].first >= 0) {
            auto [left, right] = work_.split[id];
            size_t n = pieces_[left].size();
            emit(left, text.substr(0, n));
            emit(right, text.substr(n));
        } else if (id >= 0 && type_[id] != UNKNOWN && type_[id] != UNUSED) {
            ids.push_back(id);
        } else if (byte_level()) {
            for (char c : REPLACEMENT) ids.push_back(first_id_[(unsigned char)c]);
        } else if (byte_id_[0] >= 0) {
            for (char c : text) ids.push_back(byte_id_[(unsigned char)c]);
        } else {
            ids.push_back(unknown_);
        }
    }

    // ---- unigram

    // Ids of the pieces of a part, of whose cuts it takes that with the highest sum of scores. As sentencepiece 0.2.2
    // and later do it: a float sum from the text's beginning on, set back to 0 where it passes 100000, the longest last
    // piece of equals. No piece reaches over a part's ends, so the best cut is that of the whole text; and where it is
    // better than the next by more than the sum's rounding can be, it is the same wherever the part stands.
    void cut_best(std::string_view part, std::vector<int>& ids) const {
        constexpr float LIMIT = 100000;
        float& total = work_.total;
        const float rounding = 64 * FLT_EPSILON * (std::fabs(total) + reach_);
        const bool within = std::fabs(total) + reach_ < LIMIT;
        auto [cached, known] = cached_word(part);
        if (known && within && cached.margin > rounding) {
            for (int i = 0; i < cached.count; i++) total += score_[cached.ids[i]];
            return append(cached.ids, cached.count, ids);
        }

        std::vector<Path>& paths = work_.paths;
        paths.assign(part.size() + 1, {0, -FLT_MAX, -1, NEVER});
        paths[0].score = total;
        size_t reached = 0;
        for (size_t start = 0, size; start < part.size(); start += size) {
            size = std::min<size_t>(announced_size(part[start]), part.size() - start);
            if (const float offset = paths[start].score; std::fabs(offset) > LIMIT)
                for (size_t i = start; i <= std::max(start, reached); i++)
                    if (i == start || paths[i].from != NEVER) paths[i].score -= offset;
            auto offer = [&](size_t end, int id, float score) {
                Path& path = paths[end];
                score += paths[start].score;
                reached = std::max(reached, end);
                if (path.from == NEVER) path = {score, -FLT_MAX, id, (uint32_t)start};
                else if (score > path.score) path = {score, path.score, id, (uint32_t)start};
                else path.second = std::max(path.second, score);
            };
            bool one = false;  // the character is a piece
            size_t node = 0;
            for (size_t end = start; end < part.size();) {
                const uint8_t byte = part[end];
                size_t next = nodes_[node].child, behind = nodes_[node + 1].child;
                if (behind - next > 8) {
                    const void* found = memchr(&labels_[next], byte, behind - next);
                    next = found ? (const uint8_t*)found - labels_.data() : behind;
                }
                while (next < behind && labels_[next] != byte) next++;
                if (next == behind) break;
                end++;
                node = next;
                const int id = nodes_[node].id;
                if (id >= 0) offer(end, id, score_[id]);
                one = one || (id >= 0 && end - start == size);
            }
            if (!one) offer(start + size, -1, unknown_score_);
        }

        std::vector<int>& result = work_.ids;
        std::vector<uint64_t>& cuts = work_.queue;
        cuts.clear();
        float margin = FLT_MAX;
        bool all = true;  // are known
        for (size_t at = part.size(); at > 0; at = paths[at].from) {
            cuts.push_back(at);
            margin = std::min(margin, paths[at].score - paths[at].second);
            all = all && paths[at].id >= 0;
        }
        total = paths[part.size()].score;
        result.clear();
        for (size_t i = cuts.size(); i-- > 0;) {
            const Path& path = paths[cuts[i]];
            if (path.id >= 0) result.push_back(path.id);
            else emit(-1, part.substr(path.from, cuts[i] - path.from));
        }
        append(result.data(), result.size(), ids);
        if (all && within) keep(cached, part, result, margin - rounding);
    }

    // the trie of the pieces, and their scores
    void read_trie() {
        std::vector<int> order;
        float least = FLT_MAX, most = 0;
        for (int id = 0; id < V_; id++) {
            if (type_[id] == USER_DEFINED) score_[id] = (float)(0.1 * double(pieces_[id].size() - 1));
            if (type_[id] != NORMAL && type_[id] != USER_DEFINED) continue;
            if (type_[id] == NORMAL) least = std::min(least, score_[id]);
            most = std::max(most, std::fabs(score_[id]));
            order.push_back(id);
        }
        unknown_score_ = least - 10;
        reach_ = (most + std::fabs(unknown_score_)) * (sizeof(CachedWord::word) + 1);
        std::sort(order.begin(), order.end(), [&](int a, int b) { return pieces_[a] < pieces_[b]; });
        struct Range {
            size_t from, to, size;
        };
        std::vector<Range> all = {{0, order.size(), 0}};  // of each node: which pieces begin with it, and its own size
        labels_.assign(1, 0);
        for (size_t node = 0; node < all.size(); node++) {
            auto [from, to, size] = all[node];
            nodes_.push_back({(uint32_t)all.size(), -1});
            for (; from < to && pieces_[order[from]].size() == size; from++) nodes_[node].id = order[from];
            for (size_t end; from < to; from = end) {
                const char byte = pieces_[order[from]][size];
                for (end = from; end < to && pieces_[order[end]][size] == byte; end++) {}
                all.push_back({from, end, size + 1});
                labels_.push_back((uint8_t)byte);
            }
        }
        nodes_.push_back({(uint32_t)all.size(), -1});
    }

    // ---- the file

    void insert(int id) {
        if (2 * ++words_ > slots_.size()) {
            std::vector<int> before(slots_.empty() ? 1024 : 2 * slots_.size(), -1);
            before.swap(slots_);
            for (int other : before)
                if (other >= 0) slots_[slot(pieces_[other])] = other;
        }
        slots_[slot(pieces_[id])] = id;
    }

    // id of a piece that can be part of a merge; a character that is no piece gets an id behind V. < 0: none
    int part(std::string_view text) {
        int id = find(text);
        if (id < 0 && !byte_level() && text.size() <= (size_t)announced_size(text[0])) {
            id = (int)pieces_.size();
            pieces_.push_back(text);
            type_.push_back(UNKNOWN);
            insert(id);
        }
        return id >= 0 && type_[id] == USER_DEFINED ? -1 : id;
    }

    // every two parts that are a piece together; ranks by score, the same for equals
    std::vector<Merge> merges_by_score() {
        std::vector<int> order(V_);
        for (int i = 0; i < V_; i++) order[i] = i;
        std::sort(order.begin(), order.end(), [&](int a, int b) { return score_[a] > score_[b]; });
        std::vector<Merge> all;
        uint32_t rank = 0;
        for (int i = 0; i < V_; i++) {
            const int id = order[i];
            if (i && score_[id] < score_[order[i - 1]]) rank++;
            if (type_[id] != NORMAL && type_[id] != UNUSED) continue;
            const std::string_view piece = pieces_[id];
            auto step = [&](size_t at) -> size_t { return byte_level() ? 1 : announced_size(piece[at]); };
            for (size_t at = step(0); at < piece.size(); at += step(at)) {
                int left = part(piece.substr(0, at)), right = left < 0 ? -1 : part(piece.substr(at));
                if (right >= 0) all.push_back({(uint64_t)left << 32 | (uint32_t)right, rank, id});
            }
        }
        return all;
    }

    // What is left of the file. Every size is checked against that before it is used.
    struct Reader {
        const std::string& path;
        std::string_view rest;

        [[noreturn]] void fail(const std::string& what) const {
            throw std::runtime_error(path + ": " + what + ". Make it with dev/data/convert_tokenizer.py.");
        }
        std::string_view take(size_t n) {
            if (n > rest.size()) fail("the file is cut short");
            std::string_view s = rest.substr(0, n);
            rest.remove_prefix(n);
            return s;
        }
        template <typename Number>
        Number number() {
            Number value;
            memcpy(&value, take(sizeof(value)).data(), sizeof(value));
            return value;
        }
    };

    void read(const std::string& path) {
        Reader in{path, {}};
        struct stat info;
        if (stat(path.c_str(), &info)) in.fail(std::string("cannot be read: ") + strerror(errno));
        if (!S_ISREG(info.st_mode)) in.fail("is a folder, a pipe or a device, not a file");
        if (info.st_size > (1 << 28)) in.fail("this is too large for a tokenizer");
        FILE* f = fopen(path.c_str(), "rb");
        if (!f) in.fail(std::string("cannot be read: ") + strerror(errno));
        file_.resize(info.st_size);
        file_.resize(fread(file_.data(), 1, file_.size(), f));
        fclose(f);
        in.rest = {file_.data(), file_.size()};

        const bool third = starts(in.rest, "SGPTTOK3");
        if (!third && !starts(in.rest, "SGPTTOK2")) in.fail("this is not a tokenizer file");
        in.take(8);
        flags_ = in.number<uint32_t>();
        if (flags_ >= (third ? 16384 : 4096)) in.fail("it has flags of a newer version");
        const uint32_t V = in.number<uint32_t>(), bos = in.number<uint32_t>(), eos = in.number<uint32_t>();
        unknown_surface_ = in.take(in.number<uint32_t>());
        std::string_view trie = in.take(in.number<uint32_t>());
        if (trie.size() % 4) in.fail("the trie's size is no multiple of 4");
        trie_.resize(trie.size() / 4);
        if (!trie.empty()) memcpy(trie_.data(), trie.data(), trie.size());
        replacements_ = in.take(in.number<uint32_t>());
        if (trie_.empty() != replacements_.empty() || (!trie_.empty() && replacements_.back()))
            in.fail("trie and replacements do not fit together");
        read_pieces(in, V, third ? LSTRIP | RSTRIP | IN_NORMAL_FORM : 0);
        if (bos >= V || eos >= V || type_[bos] != CONTROL || type_[eos] != CONTROL)
            in.fail("BOS or EOS is no control piece");
        bos_ = (int)bos;
        eos_ = (int)eos;
        if (byte_level() || third) class_.assign(CODES + 1, OTHER);
        read_classes(in);
        read_merges(in, in.number<uint32_t>(), third);
        if (third) read_normal_form(in), read_rules(in);
        if (!in.rest.empty()) in.fail("there are bytes behind its end");
        prepare(in);
        bpe_ = true;
    }

    void read_pieces(Reader& in, uint32_t V, uint8_t flags) {
        if (V > in.rest.size() / 7) in.fail("the file is cut short");  // a piece takes 7 bytes and its text
        pieces_.reserve(V);
        slots_.assign(1024, -1);
        std::fill(byte_id_, byte_id_ + 256, -1);
        for (V_ = 0; V_ < (int)V; V_++) {
            std::string name = "piece " + std::to_string(V_);
            score_.push_back(in.number<float>());
            const uint8_t byte = in.number<uint8_t>();
            added_flags_.push_back(byte & flags);
            type_.push_back(byte & ~flags);
            pieces_.push_back(in.take(in.number<uint16_t>()));
            std::string_view piece = pieces_.back();
            uint8_t type = type_.back();
            if (piece.empty() && type != CONTROL) in.fail(name + " is empty");
            if (type < NORMAL || type > BYTE || (byte & flags && type != USER_DEFINED))
                in.fail(name + " is of no known type");
            if (score_.back() != score_.back()) in.fail(name + " has no number as its score");
            if (type == NORMAL || type == USER_DEFINED || type == UNUSED) {
                const int other = find(piece);  // where text is merged, a normal piece comes before a user-defined one
                if (other < 0)
                    insert(V_);
                else if (type != USER_DEFINED && type_[other] == USER_DEFINED)
                    slots_[slot(piece)] = V_;
                else if (type != USER_DEFINED)
                    in.fail(name + " is there twice");
            }
            if (type == UNKNOWN) {
                if (unknown_ >= 0) in.fail(name + " is a second unknown piece");
                unknown_ = V_;
            } else if (type == BYTE) {
                if (byte_value(piece) < 0 || !(flags_ & BYTE_FALLBACK)) in.fail(name + " cannot be a byte");
                byte_id_[byte_value(piece)] = V_;
            } else if (type == USER_DEFINED) {
                Added& added = added_[bool(byte & flags & IN_NORMAL_FORM)];
                if (!added.ids.emplace(piece, V_).second) in.fail(name + " is there twice");
                added.lengths.push_back(piece.size());
                for (int second = 0; second < 256; second++)
                    if (piece.size() == 1 || second == (unsigned char)piece[1])
                        added.starts.set(two_bytes(piece[0], (unsigned char)second));
            } else if (type == UNUSED) {
                unused_ = true;
            }
        }
        if (unknown_ < 0 && !(flags_ & (BYTE_LEVEL | BYTE_FALLBACK))) in.fail("there is no unknown piece");
        if (flags_ & BYTE_FALLBACK && std::count(byte_id_, byte_id_ + 256, -1)) in.fail("some byte has no piece");
        for (Added& added : added_) {
            std::sort(added.lengths.begin(), added.lengths.end(), std::greater<size_t>());
            added.lengths.erase(std::unique(added.lengths.begin(), added.lengths.end()), added.lengths.end());
        }
    }

    // how words are split, and the classes of code points: ranges that begin at range >> 3
    void read_classes(Reader& in) {
        split_ = in.number<uint32_t>();
        if (split_ && class_.empty()) in.fail("it splits words by classes, and has none");
        uint32_t at = 0, kind = OTHER;
        for (uint32_t n = in.number<uint32_t>(); n > 0; n--) {
            uint32_t range = in.number<uint32_t>(), next = range >> 3;
            if (next < at || next >= std::min<size_t>(CODES, class_.size()) || (range & 7) > WHITE)
                in.fail("its classes are damaged");
            std::fill(class_.begin() + at, class_.begin() + next, (uint8_t)kind);
            at = next;
            kind = range & 7;
        }
        if (!class_.empty()) std::fill(class_.begin() + at, class_.end() - 1, (uint8_t)kind);
    }

    void read_normal_form(Reader& in) {
        auto code = [&](uint32_t c) {
            if (c < 0x80 || c >= CODES) in.fail("its normal form is damaged");
            return c;
        };
        const uint32_t characters = in.number<uint32_t>();
        if (characters) form_.assign(CODES + 1, 0), order_.assign(CODES + 1, 0);
        for (uint32_t i = 0; i < characters; i++) {
            const uint32_t entry = in.number<uint32_t>(), c = code(entry >> 8);
            order_[c] = entry & 255;
            const uint32_t n = in.number<uint32_t>();
            if (n > 32) in.fail("its normal form is damaged");
            for (uint32_t k = 0; k < n; k++) decomposed_[c].push_back(std::min(in.number<uint32_t>(), CODES - 1));
        }
        for (uint32_t n = in.number<uint32_t>(); n > 0; n--) {
            const uint32_t first = in.number<uint32_t>(), second = code(in.number<uint32_t>());
            if (form_.empty()) in.fail("its normal form is damaged");
            composed_[(uint64_t)first << 32 | second] = code(in.number<uint32_t>());
            form_[second] = JOINS;
        }
        if (form_.empty()) return;
        for (uint32_t c = 0x1161; c < 0x11c3; c++)
            if (c < 0x1176 || c >= 0x11a8) form_[c] = JOINS;
        const std::vector<uint8_t> joins = form_;
        std::vector<uint32_t> alone;
        for (uint32_t c = 0x80; c < CODES; c++) {
            auto found = decomposed_.find(c);
            const uint32_t begins = found == decomposed_.end() ? c : found->second[0];
            if (order_[begins] || joins[begins]) form_[c] |= JOINS;
            if (found == decomposed_.end()) continue;
            alone.assign(1, c);
            compose(alone);
            if (alone.size() != 1 || alone[0] != c) form_[c] |= CHANGES;
        }
    }

    void read_merges(Reader& in, uint32_t listed, bool of_added) {
        if (listed > in.rest.size() / 8) in.fail("the file is cut short");
        if (flags_ & UNIGRAM) {
            if (listed || flags_ & (BYTE_LEVEL | HF_BYTES)) in.fail("it is unigram, and has merges or bytes");
            return read_trie();
        }
        std::vector<Merge> all;
        if (!(flags_ & LISTED_MERGES)) all = merges_by_score();
        for (uint32_t rank = 0; rank < listed; rank++) {
            const uint32_t left = in.number<uint32_t>(), right = in.number<uint32_t>();
            std::string name = "merge " + std::to_string(rank);
            auto merges = [&](int id) {
                return id >= 0 && id < V_ && (type_[id] == NORMAL || (of_added && type_[id] == USER_DEFINED));
            };
            if (!merges((int)left) || !merges((int)right)) in.fail(name + " is not of two pieces");
            int id = find(std::string(pieces_[left]).append(pieces_[right]));
            if (!merges(id)) in.fail(name + " gives no piece");
            all.push_back({(uint64_t)left << 32 | right, rank, id});
        }
        size_t size = 16;
        while (size < 2 * all.size()) size *= 2;
        merges_.assign(size, {0, NEVER, -1});
        for (const Merge& m : all) {
            Merge& slot = merges_[merge_slot(m.key)];
            if (slot.rank == NEVER) slot = m;
        }
    }

    void read_rules(Reader& in) {
        uint32_t at = 0, kind = 0, most = 0;
        for (uint32_t n = in.number<uint32_t>(); n > 0; n--) {
            const uint32_t run = in.number<uint32_t>(), next = run >> 8;
            if (next < at || next >= CODES) in.fail("its rules are damaged");
            rule_class_.resize(CODES + 1);
            std::fill(rule_class_.begin() + at, rule_class_.begin() + next, (uint8_t)kind);
            at = next;
            kind = run & 255;
            most = std::max(most, kind);
        }
        if (!rule_class_.empty()) {
            std::fill(rule_class_.begin() + at, rule_class_.end(), (uint8_t)kind);
            rule_class_[CODES] = rule_class_[0xfffd];
        }
        for (uint32_t n = in.number<uint32_t>(); n > 0; n--) {
            const uint32_t classes = in.number<uint32_t>(), states = in.number<uint32_t>();
            if (rule_class_.empty() || classes < most + 2 || classes > 256 || states < 2 || states > 32768)
                in.fail("its rules are damaged");
            rules_.push_back({classes, std::vector<uint16_t>(size_t(classes) * states)});
            std::vector<uint16_t>& next = rules_.back().next;
            memcpy(next.data(), in.take(2 * next.size()).data(), 2 * next.size());
            for (uint16_t entry : next)
                if (uint32_t(entry >> 1) >= states) in.fail("its rules are damaged");
        }
        if (!rules_.empty() && !byte_level()) in.fail("it has rules, but is not at byte level");
    }

    // tables that follow from what was read
    void prepare(const Reader& in) {
        for (int c = 0; c < 256; c++) {
            char byte = (char)c;
            first_id_[c] = find({&byte, 1});
            if (byte_level() && first_id_[c] < 0 && c != 0xc0 && c != 0xc1 && c < 0xf5)  // those no text has
                in.fail("some byte has no piece");
        }
        for (unsigned c = 0; c < 128; c++) {  // no user-defined piece and no way from the trie's root begins with it
            size_t node = trie_.empty() ? 0 : offset(trie_[0]) ^ c;
            bool user = false;
            for (size_t second = 0; second < 256; second++) user = user || added_[0].starts[two_bytes(c, second)];
            plain_[c] = !user && (trie_.empty() || node >= trie_.size() || (trie_[node] & 0x800000ffu) != c);
        }
        if (!byte_level() && (!unused_ || flags_ & UNIGRAM)) joined_.resize(256);
        for (int i = 0, before, after; i < V_ && !joined_.empty(); i++) {
            const bool text = type_[i] == NORMAL || type_[i] == USER_DEFINED;
            for (size_t at = 0; text && step(pieces_[i], at, before, after);) joined_[before][after] = true;
        }
        if (flags_ & CUT_AT_SPACES)
            for (auto& afters : joined_) afters[255] = false;
        work_.cache.resize(1 << 15);
    }
};
