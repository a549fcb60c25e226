// JSON, as far as safetensors headers and our own state need it: read whole, written as text.
#pragma once
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

struct Json {
    enum Kind { null, boolean, number, text, list, object } kind = null;
    double value = 0;
    std::string string;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> fields;

    const Json* find(const std::string& key) const {
        for (auto& f : fields)
            if (f.first == key) return &f.second;
        return nullptr;
    }
};

struct JsonParser {
    const char *p, *end;
    int depth = 0;

    [[noreturn]] void fail() { throw Error("not valid JSON"); }
    void space() {
        while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    }
    bool take(char c) {
        space();
        if (p < end && *p == c) return p++, true;
        return false;
    }
    std::string text() {
        std::string s;
        if (!take('"')) fail();
        while (p < end && *p != '"') {
            if ((unsigned char)*p < ' ') fail();
            if (*p != '\\') {
                s += *p++;
                continue;
            }
            if (++p >= end) fail();
            char c = *p++;
            if (c == 'u') {  // names and metadata are ASCII in practice; others become '?'
                if (end - p < 4) fail();
                long code = strtol(std::string(p, 4).c_str(), nullptr, 16);
                s += code > 0 && code < 128 ? char(code) : '?';
                p += 4;
            } else {
                s += c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c == 'b' ? '\b' : c == 'f' ? '\f' : c;
            }
        }
        if (p++ >= end) fail();
        return s;
    }
    Json parse() {
        Json j;
        if (++depth > 64) fail();
        space();
        if (p >= end) fail();
        if (*p == '{') {
            p++, j.kind = Json::object;
            if (!take('}')) {
                do {
                    std::string key = text();
                    if (!take(':')) fail();
                    j.fields.emplace_back(key, parse());
                } while (take(','));
                if (!take('}')) fail();
            }
        } else if (*p == '[') {
            p++, j.kind = Json::list;
            if (!take(']')) {
                do j.items.push_back(parse());
                while (take(','));
                if (!take(']')) fail();
            }
        } else if (*p == '"') {
            j.kind = Json::text, j.string = text();
        } else {
            std::string word;
            while (p < end && (isalnum((unsigned char)*p) || *p == '+' || *p == '-' || *p == '.')) word += *p++;
            char* stop = nullptr;
            if (word == "true" || word == "false")
                j.kind = Json::boolean, j.value = word == "true";
            else if (word != "null") {  // strtod would take inf, nan and 0x1p3 as well
                if (word.find_first_not_of("0123456789+-.eE") != std::string::npos) fail();
                j.kind = Json::number, j.value = strtod(word.c_str(), &stop), j.string = word;
                if (word.empty() || *stop || !std::isfinite(j.value)) fail();
            }
        }
        depth--;
        return j;
    }
};

inline Json parse_json(const std::string& s) {
    JsonParser parser{s.data(), s.data() + s.size()};
    Json j = parser.parse();
    parser.space();
    if (parser.p != parser.end) parser.fail();
    return j;
}

inline std::string json_text(const std::string& s) {
    std::string out = "\"";
    for (char c : s) {
        if (c == '"' || c == '\\') out += '\\';
        out += (unsigned char)c < ' ' ? format("\\u%04x", c) : std::string(1, c);
    }
    return out + "\"";
}
// null where JSON has no number
inline std::string json_number(double x) { return std::isfinite(x) ? format("%.9g", x) : "null"; }

using Fields = std::vector<std::pair<std::string, std::string>>;

inline std::string json_text(const Fields& fields) {
    std::string json = "{";
    for (auto& [key, value] : fields) json += (json.size() > 1 ? ", " : "") + json_text(key) + ": " + json_text(value);
    return json + "}";
}
