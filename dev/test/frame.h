// The frame of the tests that include the trainer: TEST(name) { EXPECT(...); }. Each program has a main of its own, which
// runs tests() and counts those that leave `why` empty.
#pragma once
#include <string>
#include <vector>

struct Test {
    const char* name;
    void (*body)();
};
inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
struct Register {
    Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};
#define TEST(name)                                \
    void test_##name();                           \
    Register register_##name(#name, test_##name); \
    void test_##name()

inline std::string why;  // the first failed expectation of the running test

inline void fail(const std::string& message) {
    if (why.empty()) why = message;
}
#define EXPECT(condition) \
    if (!(condition)) fail(format("line %d: %s", __LINE__, #condition))
