// EXPECT(condition, format, ...) of the tests of the stand-in, and what it counts and keeps.
#pragma once
#include <stdio.h>
#include <string>

static int passed = 0, failed = 0;
static std::string why;  // of the running test: first failure, or empty

#define EXPECT(condition, ...)                                              \
    do {                                                                    \
        if (!(condition) && why.empty()) {                                  \
            char text[400];                                                 \
            snprintf(text, sizeof text, __VA_ARGS__);                       \
            why = "line " + std::to_string(__LINE__) + ": " + text;         \
        }                                                                   \
    } while (0)
