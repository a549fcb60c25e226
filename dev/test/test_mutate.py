#!/usr/bin/env python3
"""Tests of mutate.py on a small made-up project. Needs g++, make and git; else standard library only.

usage: dev/test/test_mutate.py
"""
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import mutate
from lines import run_all

SOURCE = r"""#pragma once
#include <vector>
#define TWICE(x) (x + x)  // a + b
#ifdef __CUDACC__
__device__ void only_nvcc(int* x) { x[0] = x[1] + 2; }
#else
inline int only_cpu(int a) { return a * 3; }
#endif
/* a + b; x[i] = 1;
   c * d */
constexpr int TWO = 1 + 1;
struct Pair {
    int a = 1, b = 2;
    bool same() const { return a == b; }
};
inline void __syncthreads() {}
template <class T>
int total(const std::vector<T>& v, int n) {
    int sum = 0;
    const char* text = "a + b; x[i] = 1; // c * d";
    static_assert(sizeof(T) * 2 > 1, "");
    for (int i = 0; i < n; i++) sum += v[i] * 2;
    __syncthreads();
    if (n > 100)
        sum = -sum;
    else
        sum = sum + (n ? 1 : 2);
    asm volatile("" : "+r"(sum) : "r"(n + 1));
    auto later = [&](int m) {
        sum += m;
        return -m;
    };
    later(text[0] - 'a');
    return sum;
}
"""
MAIN = r"""#include "small.h"
#include <stdio.h>
#include <string.h>
#define TEST(name) if (argc < 2 || !strcmp(argv[1], #name)) failed +=
int main(int argc, char** argv) {
    int failed = 0;
TEST(total) total(std::vector<int>{1, 2, 3}, 3) != 13;
TEST(empty) total(std::vector<int>{}, 0) != 2;
    return failed;
}
"""
MAKEFILE = """OPTIMIZE ?= -O1
build/small: main.cpp small.h
\t@mkdir -p build
\tg++ -std=c++17 $(OPTIMIZE) -I. $< -o $@
"""


def places():
    return list(mutate.Source("small.h", SOURCE).places())


def lines_of(operator):
    return [p.before for p in places() if p.operator == operator]


class Mutate(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="test_mutate_")
        self.addCleanup(shutil.rmtree, self.dir)
        for name, text in (("small.h", SOURCE), ("main.cpp", MAIN), ("Makefile", MAKEFILE), (".gitignore", "/build/\n")):
            self.write(name, text)
        subprocess.run(["git", "init", "-q", self.dir], check=True)
        before = {name: getattr(mutate, name) for name in ("ROOT", "FILES", "PROGRAMS", "TABLE")}
        self.addCleanup(lambda: [setattr(mutate, name, value) for name, value in before.items()])
        mutate.ROOT, mutate.FILES, mutate.TABLE = self.dir, ["small.h"], [("*", ["small"])]
        mutate.PROGRAMS = {"small": ("build/small", "main.cpp", ["build/small", "NAME"], 1)}

    def write(self, name, text):
        with open(os.path.join(self.dir, name), "w") as f:
            f.write(text)

    def run_tool(self, *words):
        """(status, lines)"""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = mutate.run([*words, "--jobs", "1"])
        return status, out.getvalue().splitlines()

    def compile(self, text, *flags):
        self.write("small.h", text)
        self.write("mutant.h", mutate.SWITCH)
        return subprocess.run(["g++", "-std=c++17", "-I.", "main.cpp", *flags], cwd=self.dir, stderr=subprocess.PIPE, text=True)

    def test_operators(self):
        for operator, wanted in (
                ("arithmetic", ["for (int i = 0; i < n; i++) sum += v[i] * 2;", "sum = sum + (n ? 1 : 2);", "sum += m;",
                                "later(text[0] - 'a');"]),
                ("factor", ["inline int only_cpu(int a) { return a * 3; }", "for (int i = 0; i < n; i++) sum += v[i] * 2;"]),
                ("bound", ["for (int i = 0; i < n; i++) sum += v[i] * 2;"] * 2),
                ("comparison", ["bool same() const { return a == b; }", "if (n > 100)", "sum = sum + (n ? 1 : 2);"]),
                ("index", ["for (int i = 0; i < n; i++) sum += v[i] * 2;", "later(text[0] - 'a');"]),
                ("barrier", ["__syncthreads();"]),
                ("statement", ["for (int i = 0; i < n; i++) sum += v[i] * 2;", "sum = -sum;", "sum = sum + (n ? 1 : 2);",
                               "sum += m;", "later(text[0] - 'a');"]),
                ("sign", ["inline int only_cpu(int a) { return a * 3; }", "sum = -sum;", "return -m;", "return -m;",
                          "return sum;"])):
            with self.subTest(operator):
                self.assertEqual(lines_of(operator), wanted)

    def test_after(self):
        after = [p.after for p in places()]
        for line in ("for (int i = 0; i < n - 1; i++) sum += v[i] * 2;", "for (int i = 0; i < n; i++) sum += v[(i) + 1] * 2;",
                     "if (bool(n > 100) != true)", "sum = sum + -1 * (n ? 1 : 2);", "sum = sum + (bool(n) != true ? 1 : 2);",
                     "inline int only_cpu(int a) { return a * 2 * 3; }", "for (int i = 0; i < n; i++) {}"):
            with self.subTest(line):
                self.assertIn(line, after)

    def test_nothing_in_comments_strings_asm_and_what_only_nvcc_sees(self):
        lines = SOURCE.splitlines()
        for place in places():
            with self.subTest(place.before):
                self.assertNotRegex(lines[place.line - 1], r"asm|static_assert|constexpr|#define|only_nvcc|const char|c \* d \*/")

    def test_the_seed_chooses(self):
        self.assertEqual(mutate.order_of(places(), 3), mutate.order_of(places(), 3))
        self.assertGreater(len({str(mutate.order_of(places(), seed)) for seed in range(8)}), 4)
        order = mutate.order_of(places(), 3)
        self.assertEqual(len({p.line for p in order}), len(order))
        self.assertEqual(len({p.operator for p in order[:8]}), 8)

    def test_each_place_compiles_keeps_its_line_and_is_off(self):
        every = list(enumerate(places(), 1))
        woven = mutate.weave("small.h", SOURCE, every)
        self.assertEqual(len(woven.splitlines()), len(SOURCE.splitlines()) + 2)
        for number, place in every:
            self.assertEqual(self.compile(mutate.weave("small.h", SOURCE, [(number, place)]), "-fsyntax-only").stderr, "", place)
        self.assertEqual(self.compile(mutate.weave("small.h", SOURCE, [p for p in every if p[1].operator != "sign"]),
                                      "-o", "a.out").stderr, "")
        self.assertEqual(subprocess.run(["./a.out"], cwd=self.dir).returncode, 0)

    def test_a_run_and_its_resume(self):
        status, lines = self.run_tool()
        self.assertEqual(status, 0)
        verdicts = [line for line in lines if line.startswith(("caught", "SURVIVED", "not reached"))]
        self.assertIn("caught by small total", "\n".join(verdicts))
        self.assertTrue(any(v.startswith("SURVIVED") and "__syncthreads();" in v for v in verdicts), verdicts)
        self.assertTrue(any(v.startswith("not reached") and "only_cpu" in v for v in verdicts), verdicts)
        self.assertRegex(lines[-1], r"^mutate: \d+ mutants, \d+ caught, \d+ survived, \d+ not reached: [\d.]+%$")
        results = os.path.join(self.dir, "build", "mutate", "results-1.csv")
        with open(results) as f:
            rows = f.readlines()
        self.assertEqual(len(rows), len(verdicts) + 1)
        with open(results, "w") as f:
            f.writelines(rows[:-2])  # as if it had been killed before the last two
        again = self.run_tool()[1]
        self.assertEqual(len([line for line in again if line.startswith(("caught", "SURVIVED", "not reached"))]), 2)
        self.assertEqual(again[-1], lines[-1])
        self.assertEqual(self.run_tool("--least", "1")[0], 1)
        self.write("main.cpp", MAIN.replace("TEST(empty)", "TEST(nothing)"))  # another tree: nothing is known of it
        self.assertEqual(len([line for line in self.run_tool("--count", "4")[1] if " small.h:" in line]), 4)

    def test_what_does_not_compile_is_left_out(self):
        self.write("small.h", SOURCE + "inline std::vector<int> list(int n) {\n    return std::vector<int>(n);\n}\n")
        lines = self.run_tool()[1]
        self.assertIn("1 other places did not compile", "\n".join(lines))
        self.assertNotIn("return std::vector<int>(n);", "\n".join(lines))

    def test_errors(self):
        for words, error in ((["--files", "none"], "--files 'none': nothing to break there"), (["--what"], "--what"),
                             (["--count", "x"], "--count")):
            with self.subTest(words):
                self.assertRaisesRegex(mutate.Failure, error, self.run_tool, *words)
        self.write("main.cpp", MAIN.replace("!= 13", "!= 14"))
        status, lines = self.run_tool("--count", "2")
        self.assertEqual(status, 1)
        self.assertIn("small total fails without any mutation and is left out. Mend that first", lines)
        self.write("main.cpp", "nonsense")
        self.assertRaisesRegex(mutate.Failure, "does not build", self.run_tool, "--count", "2")

    def test_list(self):
        lines = self.run_tool("--list", "--count", "5")[1]
        self.assertEqual(len(lines), 6)
        self.assertFalse(os.path.exists(os.path.join(self.dir, "build")))


if __name__ == "__main__":
    sys.exit(run_all("test_mutate"))
