#!/usr/bin/env python3
"""Breaks the sources in many small places and looks whether a test notices each. Standard library only.

usage: dev/test/mutate.py [--count N] [--seed S] [--files GLOB] [--jobs N] [--least SHARE] [--list]
  --count N      how many places (200)
  --seed S       which: the same seed chooses the same places while the sources stay the same (1)
  --files GLOB   only places in files whose path matches, such as 'dev/run/*'
  --jobs N       tests at a time (2)
  --least SHARE  exit status 1 if a smaller share of the mutants is caught, 0 to 1 (0), or if a test fails without any
  --list         print the chosen places and no more; some of them may not compile and are then left out by a run

A mutant is one change: a sign, a factor, a bound, a condition, an index, a barrier or a statement left out. All go into one
copy of the sources in build/mutate/work, each behind a switch, mutant(17), that the environment variable MUTANT=17 turns on; so
each test program is built once. Every test runs without any change first, which says what mutants it reaches; a mutant meets
only those, the fastest first, until one fails, crashes or takes four times its time and 20 s more. Prints a line a mutant: caught
by whom, SURVIVED or not reached. Results go to build/mutate/results-S.csv as they come; the same command goes on from there.
"""
import argparse
import bisect
import collections
import concurrent.futures
import csv
import fcntl
import fnmatch
import glob
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from launch import MPI_ENV

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PYTHON = sys.executable

# name: target, what lists its tests, command of one test, seed of the lanes' order. A source lists them by TEST(name), a command by
# "ok NAME", and None says that the program is one test. NAME stands for a test's name, ^NAME$ for a pattern of just it.
PROGRAMS = {
    "serial_fp32": ("build/test_serial_fp32", "test_gpt.cu", ["build/test_serial_fp32", "--filter", "NAME"], 1),
    "exact_fp32": ("build/test_exact_fp32", "test_gpt.cu", ["build/test_exact_fp32", "--quick", "--filter", "NAME"], 2),
    "exact_bf16": ("build/test_exact_bf16", "test_gpt.cu", ["build/test_exact_bf16", "--quick", "--filter", "NAME"], 3),
    "cli": ("build/train_gpt_cpu_fp32", [PYTHON, "dev/test/test_cli.py", "build/train_gpt_cpu_fp32", "dev/test/golden"],
            [PYTHON, "dev/test/test_cli.py", "build/train_gpt_cpu_fp32", "dev/test/golden", "--filter", "NAME"], 1),
    "generate": ("build/train_gpt_cpu_fp32", [PYTHON, "dev/test/test_generate.py", "build/train_gpt_cpu_fp32"],
                 [PYTHON, "dev/test/test_generate.py", "build/train_gpt_cpu_fp32", "--filter", "NAME"], 1),
    "channel": ("build/test_channel", "dev/test/test_channel.cu", ["build/test_channel", "NAME"], 1),
    "ranks": ("build/train_gpt_cpu_fp32", [PYTHON, "dev/test/test_ranks.py", "build/train_gpt_cpu_fp32"],
              [PYTHON, "dev/test/test_ranks.py", "build/train_gpt_cpu_fp32", "--jobs", "1", "--filter", "^NAME$"], 1),
    "dataloader": ("build/test_dataloader", None, ["build/test_dataloader"], 1),
    "tokenizer": ("build/test_tokenizer", None, ["build/test_tokenizer", "dev/test/tokenizer"], 1),
}
KERNELS = ["serial_fp32", "exact_fp32", "exact_bf16"]
# The programs that must notice a mutant of a file, by the first pattern that matches it.
TABLE = [
    ("tokenizer.h", ["tokenizer", "generate"]),
    ("dataloader.h", ["dataloader", "cli"]),
    ("simplenorm.cuh", KERNELS),
    ("dev/device/*", KERNELS),
    ("dev/use/*", [*KERNELS, "cli", "generate"]),
    ("dev/run/*", [*KERNELS, "cli", "generate", "channel", "ranks"]),
    ("*", [*KERNELS, "cli", "generate", "ranks"]),
]
FILES = ["train_gpt.cu", "simplenorm.cuh", "dataloader.h", "tokenizer.h", "dev/device/*", "dev/run/*", "dev/use/*"]
WAITING = {"channel", "ranks"}  # these watch clocks: what fails there once, perhaps for another job's load, runs again
SANITIZED = {"channel", "dataloader", "tokenizer"}  # which reserve terabytes of addresses, so no limit holds for them

SWITCH = """// Written by mutate.py: mutant(k) is 1 in the mutant k, else 0, and notes in a file that somebody asked.
#pragma once
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
inline int mutant_on = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0;
inline char mutant_nobody[1 << 16];
inline char* mutant_asked = [] {  // a mapped file: the note stays whatever the process dies of, and forks share it
    const char* path = getenv("MUTANT_ASKED");
    const int file = path ? open(path, O_RDWR) : -1;
    if (file < 0) return mutant_nobody;
    void* p = mmap(nullptr, sizeof mutant_nobody, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return p == MAP_FAILED ? mutant_nobody : (char*)p;
}();
inline int mutant(int k) {
    __atomic_store_n(mutant_asked + k, char(1), __ATOMIC_RELAXED);
    return k == mutant_on;
}
"""


class Failure(Exception):
    pass


# --- Where a source can be broken. All operators only insert text, so that lines stay and several fit into one file

TOKEN = re.compile(r"""
    (?P<space>\s+|\\\n|//(?:\\\n|[^\n])*|/\*.*?\*/)
  | (?P<string>(?:u8|[uUL])?R"(?P<end>[^()\s\\]{0,16})\(.*?\)(?P=end)"|(?:u8|[uUL])?"(?:\\.|[^"\\\n])*")
  | (?P<number>'(?:\\.|[^'\\\n])+'|\.?\d(?:[eEpP][+-]|'(?=\w)|[\w.])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<mark><<<|>>>|<<=|>>=|\.\.\.|::|->|\+\+|--|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|<<|>>|.)""", re.S | re.X)
Token = collections.namedtuple("Token", "kind text start end")
Place = collections.namedtuple("Place", "file line column operator edits last before after")

KEYWORDS = {"return", "case", "else", "do", "new", "delete", "throw", "goto", "break", "continue", "sizeof", "if", "for", "while",
            "switch", "try", "catch", "default", "operator", "public", "private", "protected", "asm", "__asm__", "static_assert"}
DECLARING = {"const", "auto", "static", "unsigned", "signed", "inline", "extern", "volatile", "typename", "struct", "class",
             "union", "enum", "using", "typedef", "template", "constexpr", "friend", "virtual", "explicit", "namespace"}
FIXED = {"constexpr", "static_assert", "template", "using", "typedef", "enum", "asm", "__asm__", "case", "__shared__", "goto"}
SCOPES = {"struct", "class", "union", "enum", "namespace", "extern"}
ASSIGNING = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=", "++", "--"}
BARRIER = re.compile(r"__sync\w+|\w*fence\w*|mbarrier_\w+|copy_(wait|commit)\w*|wgmma_\w+|named_barrier_\w+")
EMPTY = {"wgmma_registers"}  # for nvcc's eyes only; nothing on a CPU, so no test could miss it


def tokens_of(text):
    """Of what a CPU build compiles: no comments, no preprocessor lines, nothing that is only for nvcc."""
    found, at, fresh, branches = [], 0, True, []  # branches: of each open #if, (asks for nvcc, counts)
    while at < len(text):
        t = TOKEN.match(text, at)
        at = t.end()
        if t.lastgroup == "space":
            fresh = fresh or "\n" in t.group()
        elif fresh and t.group() == "#":
            line = re.compile(r"(?:\\\n|/\*.*?\*/|[^\n])*", re.S).match(text, at)
            at = line.end()
            word, _, rest = line.group().strip().partition(" ")
            if word.startswith("if"):
                nvcc = bool(re.match(r"(defined\W*)?__CUDA", rest.strip()))
                branches.append((nvcc, not nvcc or word == "ifndef"))
            elif word == "else" and branches:  # of any other condition both sides count
                branches[-1] = (branches[-1][0], not (branches[-1][0] and branches[-1][1]))
            elif word == "endif" and branches:
                branches.pop()
        else:
            fresh = False
            if all(counts for _, counts in branches):
                kind = "string" if t.group("string") else t.lastgroup
                found.append(Token(kind, t.group(), t.start(), at))
    return found


class Source:
    """The tokens of a text, their brackets, and of each token where its statement begins and whether a function holds it."""

    def __init__(self, path, text):
        self.path, self.text = path, text
        self.t = tokens_of(text) + [Token("end", "", len(text), len(text))] * 4  # so that one can look ahead
        self.words = [x.text for x in self.t]
        self.lines = [0] + [m.end() for m in re.finditer("\n", text)]
        self.pair, self.begin, self.function = {}, [], []
        stack, start = [], 0  # of open brackets: index, kind, where the statement around began, the function around
        for i, w in enumerate(self.words):
            owner = stack[-1][3] if stack else None  # where the head of the function begins
            self.begin.append(start)
            self.function.append(owner)
            if w in ("(", "["):
                stack.append((i, w, start, owner))
            elif w == "{":
                kind = self.brace(i, start, stack)
                if kind == "scope":
                    owner = None
                elif kind == "code" and not self.control(i):
                    owner = start
                stack.append((i, kind, start, owner))
                start = start if kind == "init" else i + 1
            elif w in (")", "]", "}") and stack:
                opened, kind, around, _ = stack.pop()
                self.pair[opened], self.pair[i] = i, opened
                if w == "}" and kind != "init":  # a lambda in brackets: its statement goes on
                    start = around if stack and stack[-1][1] in ("(", "[", "init") else i + 1
                elif w == ")" and self.words[opened - 1] in ("if", "for", "while", "switch", "constexpr"):
                    start = i + 1
            elif w in ("else", "do") or w == ";" and (not stack or stack[-1][1] in ("code", "scope")):
                start = i + 1

    def brace(self, i, start, stack):
        """What { opens: code, the scope of a type or namespace, or values"""
        before = self.words[i - 1] if i else ";"
        if before in (")", "else", "do", "try", "const", "noexcept", "override", "mutable", "]"):
            return "code"
        if before in (";", "{", "}", ":"):
            return "init" if stack and stack[-1][1] == "init" else "code" if stack and stack[-1][1] == "code" else "scope"
        if SCOPES & set(self.words[start:i]):
            return "scope"
        j = i - 1
        while j > start and (self.t[j].kind == "word" or self.words[j] in ("::", "<", ">", "*", "&", ",")):
            j -= 1
        return "code" if self.words[j] == "->" and self.words[j - 1] == ")" else "init"

    def control(self, i):
        """whether the { belongs to if, for and the like, or stands alone, and so to the function around"""
        if self.words[i - 1] != ")":
            return self.words[i - 1] in ("else", "do", "try", ";", "{", "}", ":")
        return self.words[self.pair[i - 1] - 1] in ("if", "for", "while", "switch", "constexpr", "catch")

    def inside(self, first, last):
        """indices from first to before last, at this depth: of brackets only the opening one"""
        i = first
        while i < last:
            yield i
            i = self.pair.get(i, i) + 1 if self.words[i] in ("(", "[", "{") else i + 1

    def declares(self, i):
        if self.words[i] in DECLARING:
            return True
        if self.t[i].kind != "word" or self.words[i] in KEYWORDS:
            return False
        while self.words[i + 1] == "::":
            i += 2
        i += 1
        if self.words[i] == "<":
            depth = 0
            for i in self.inside(i, len(self.t)):
                depth += {"<": 1, ">": -1, ">>": -2}.get(self.words[i], 0)
                if self.words[i] in (";", "{", ")", "&&", "||", ""):  # less than, no template
                    return False
                if depth <= 0:
                    break
            i += 1
        while self.words[i] in ("*", "&", "&&", "const"):
            i += 1
        return i < len(self.t) and self.t[i].kind == "word"

    def line(self, offset):
        return bisect.bisect_right(self.lines, offset)

    def places(self):
        """Everything that can be broken; @ stands for the mutant's number."""
        for i, x in enumerate(self.t):
            start = self.begin[i]
            if self.function[i] is None or x.kind == "end" or FIXED & set(self.words[start:start + 4]):
                continue
            for operator, edits in self.at(i, x):
                first, last = self.line(edits[0][0]), self.line(edits[-1][0])
                begin = self.lines[first - 1]
                end = self.text.find("\n", begin) % (len(self.text) + 1)
                after = self.text[begin:end]
                for offset, more in reversed(edits):
                    if offset <= end:
                        after = after[:offset - begin] + more + after[offset - begin:]
                after = after.replace("-(1 - 2 * mutant(@)) * ", "").replace("(1 - 2 * mutant(@)) *", "-1 *")
                after = after.replace("(1 + mutant(@)) *", "2 *")
                after = after.replace("(1 + mutant(@)) /", "2 /").replace("bool(mutant(@))", "true")
                after = re.sub(r"\{ if \(!mutant\(@\)\) \{ .* \} \}", "{}", after).replace("mutant(@)", "1")
                yield Place(self.path, first, edits[0][0] - begin + 1, operator, edits, last,
                            self.text[begin:end].strip(), after.strip())

    def at(self, i, x):
        """(operator, edits) of what can be broken at a token; an edit is (offset, text to insert)"""
        t, words, w = self.t, self.words, x.text
        before = words[i - 1]
        value = t[i - 1].kind == "number" or t[i - 1].kind == "word" and before not in KEYWORDS or before in (")", "]")
        spaced = self.text[x.start - 1].isspace() and self.text[x.end:x.end + 1].isspace() and t[i + 1].kind != "string"
        if w in ("+", "-") and value and spaced or w in ("+=", "-=") and t[i + 1].kind != "string":
            yield "arithmetic", [(x.end, " (1 - 2 * mutant(@)) *")]
        elif w in ("*", "/") and value and spaced:
            yield "factor", [(x.end, f" (1 + mutant(@)) {w}")]
        elif w == "-" and not value and before not in ("/", "%", "-") and t[i - 1].kind != "string":
            yield "sign", [(x.end, "(1 - 2 * mutant(@)) * ")]
        elif w == "return":
            yield from self.returned(i)
        elif w == "for" and words[i + 1] == "(":
            yield from self.loop(i + 1)
        elif w in ("if", "while") and words[i + 1] == "(":
            close = self.pair[i + 1]
            if not self.declares(i + 2) and ";" not in words[i + 2:close]:
                yield "comparison", [(t[i + 2].start, "bool("), (t[close].start, ") != bool(mutant(@))")]
        elif w == "?":
            j = i - 1
            while j >= self.begin[i] and words[j] not in {"(", "[", "{", ",", ":", "?", "return", "<<"} | ASSIGNING:
                j = self.pair[j] - 1 if words[j] in (")", "]", "}") else j - 1
            if j + 1 < i and not self.declares(j + 1):
                yield "comparison", [(t[j + 1].start, "bool("), (t[i - 1].end, ") != bool(mutant(@))")]
        elif w == "[" and value and before not in DECLARING and words[i - 2] != "new":
            yield from self.indexed(i)
        if i == self.begin[i]:
            yield from self.statement(i)

    def returned(self, i):
        t, words = self.t, self.words
        end = next((j for j in self.inside(i + 1, len(t)) if words[j] == ";"), i + 1)
        top = {words[j] for j in self.inside(i + 1, end) if words[j] not in "<>" or self.text[t[j].end] == " "}
        if end == i + 1 or t[i + 1].kind == "string" or words[i + 1] in ("{", "[", "nullptr"):
            return
        if end == i + 2 and re.fullmatch(r"0(\.0*)?f?", words[i + 1]):  # -0 is 0
            return
        edges = t[i + 1].start, t[end - 1].end
        head = words[self.function[i]:self.function[i] + 4]
        if "?" not in top and ("bool" in head or top & {"==", "!=", "<", ">", "<=", ">=", "&&", "||", "!", "true", "false"}):
            yield "comparison", [(edges[0], "bool("), (edges[1], ") != bool(mutant(@))")]
        elif "bool" not in head:
            yield "sign", [(edges[0], "(1 - 2 * mutant(@)) * ("), (edges[1], ")")]

    def loop(self, opened):
        t, words = self.t, self.words
        ends = [j for j in self.inside(opened + 1, self.pair[opened]) if words[j] == ";"]
        if len(ends) != 2:
            return
        first = [words[j] for j in self.inside(opened + 1, ends[0])]
        second = [words[j] for j in self.inside(ends[0] + 1, ends[1])]
        if "=" in first:
            yield "bound", [(t[ends[0] - 1].end, " + mutant(@)")]
        if ("<" in second or "<=" in second) and not {"&&", "||", "?", ","} & set(second):
            yield "bound", [(t[ends[1] - 1].end, " - mutant(@)")]

    def indexed(self, i):
        t, words, start, close = self.t, self.words, self.begin[i], self.pair[i]
        content = list(self.inside(i + 1, close))
        declared = self.declares(start) and not {"=", "(", "{"} & set(words[start:i])
        if content and not declared and all(words[j] != "," and t[j].kind != "string" for j in content):
            yield "index", [(t[i + 1].start, "("), (t[close - 1].end, ") + mutant(@)")]

    def statement(self, i):
        """a whole one, on one line: an assignment or a call"""
        t, words = self.t, self.words
        if words[i] in KEYWORDS | EMPTY or not (t[i].kind == "word" or words[i] in ("*", "++", "--")) or self.declares(i):
            return
        top = list(self.inside(i, len(t)))[:200]
        end = next((j for j in top if words[j] in (";", "}", "{")), None)
        if end is None or words[end] != ";" or "{" in words[i:end] or self.line(t[i].start) != self.line(t[end].start):
            return
        if words[end - 1] == ")" or ASSIGNING & {words[j] for j in top if j < end}:
            operator = "barrier" if BARRIER.fullmatch(words[i]) else "statement"
            yield operator, [(t[i].start, "{ if (!mutant(@)) { "), (t[end].end, " } }")]


def order_of(places, seed):
    """The places in the order in which they are taken: the operators take turns, one place a line."""
    turns, used, order = collections.defaultdict(list), set(), []
    for place in places:
        turns[place.operator].append(place)
    chance = random.Random(seed)
    for operator in sorted(turns):
        chance.shuffle(turns[operator])
    while any(turns.values()):
        for operator in sorted(turns):
            while turns[operator]:
                place = turns[operator].pop()
                if (place.file, place.line) not in used:
                    used.add((place.file, place.line))
                    order.append(place)
                    break
    return order


def weave(path, text, numbered):
    """The text with the places (number, place) behind switches; lines keep their numbers."""
    edits = []
    for number, place in numbered:
        for j, (offset, more) in enumerate(place.edits):
            edits.append((offset, j == 0, more.replace("@", str(number))))  # at one offset what closes comes first
    for offset, _, more in sorted(edits, reverse=True):
        text = text[:offset] + more + text[offset:]
    return f'#include "mutant.h"\n#line 1 "{path}"\n{text}' if edits else text


# --- The copy of the sources, and its programs

def tracked():
    """path: bytes, of the working tree"""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if listed.returncode:
        raise Failure(f"{ROOT} is no git repository. Run it in a clone.")
    found = {}
    for path in sorted(set(listed.stdout.decode().split("\0")) - {""}):
        if os.path.isfile(os.path.join(ROOT, path)):
            with open(os.path.join(ROOT, path), "rb") as f:
                found[path] = f.read()
    return found


def write_tree(work, tree):
    """Only what differs, so that make builds no more than it must."""
    for folder, _, names in os.walk(work):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), work)
            if path not in tree and not path.startswith("build/"):
                os.remove(os.path.join(work, path))
    for path, data in tree.items():
        target = os.path.join(work, path)
        if os.path.isfile(target):
            with open(target, "rb") as f:
                if f.read() == data:
                    continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as f:
            f.write(data)
        if os.path.isfile(os.path.join(ROOT, path)):
            shutil.copymode(os.path.join(ROOT, path), target)


def blame(output, order, chosen):
    """The mutants on the lines of the compiler's errors; of errors elsewhere, on the lines it names beside them."""
    for pattern, near in ((r"(?m)^([^\s:]+):(\d+):(?:\d+:)? (?:fatal )?error:", 0),
                          (r"(?m)^(?:In file included from|\s+from)?\s*([^\s:]+):(\d+)[:,]", 3)):
        at = collections.defaultdict(set)
        for path, line in re.findall(pattern, output):
            at[re.sub(r"^(\./|build/src/)*", "", path)].add(int(line))
        found = {k for k in chosen if any(order[k].line - near <= n <= order[k].last + near for n in at[order[k].file])}
        if found:
            return found
    return set()


def build(work, tree, order, count, targets):
    """Weaves and builds, without the places that do not compile; returns the numbers of the mutants, and how many fell out."""
    bad = set()
    for flags in ("-fsyntax-only", "-O1"):
        while True:
            chosen = [k for k in range(1, len(order)) if k not in bad][:count]
            woven = dict(tree, **{"mutant.h": SWITCH.encode()})
            for path in {order[k].file for k in chosen}:
                text = tree[path].decode()
                woven[path] = weave(path, text, [(k, order[k]) for k in chosen if order[k].file == path]).encode()
            write_tree(work, woven)
            make = subprocess.run(["make", "-k", "--no-print-directory", "OPTIMIZE=" + flags, *targets], cwd=work,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                                  env={**os.environ, "LC_ALL": "C"})
            if make.returncode == 0:
                break
            more = blame(make.stdout, order, chosen)
            if not more:
                error = re.search(r"(?m)^.*(?: error: |\*\*\*).*$", make.stdout)
                raise Failure(f"the copy in {work} does not build: {error.group() if error else make.stdout[-200:]}. "
                              "See whether the sources themselves do.")
            bad |= more
            print(f"{len(bad)} places do not compile and are left out", flush=True)
    return chosen, len(bad)


RUNNING = set()  # process groups of tests


def stop(number, _):
    for group in list(RUNNING):
        os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


class Test:
    def __init__(self, program, name):
        self.program, self.name = program, name
        self.reaches, self.seconds, self.passed = set(), 0.0, False

    def __str__(self):
        return f"{self.program} {self.name}".strip()

    def command(self):
        exact = re.escape(self.name)
        return [exact.join(["^", "$"]) if c == "^NAME$" else self.name if c == "NAME" else c
                for c in PROGRAMS[self.program][2]]

    def run(self, work, limit, more):
        """Whether it passes within so many seconds. Whatever it has started ends with it."""
        scratch = tempfile.mkdtemp(prefix="mutate_")
        env = {**MPI_ENV, **os.environ, "OMP_NUM_THREADS": "1", "CUDA_CPU_SEED": str(PROGRAMS[self.program][3]),
               "TMPDIR": scratch, **more}
        memory = "unlimited" if self.program in SANITIZED else str(8 << 20)  # KiB: a mutant may ask for anything
        p = subprocess.Popen(["sh", "-c", 'ulimit -v "$0"; exec "$@"', memory, *self.command()], cwd=work, env=env,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        RUNNING.add(p.pid)
        begin, done = time.monotonic(), None
        while not done and time.monotonic() < begin + limit:
            done = os.waitid(os.P_PID, p.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0 if done else 0.005)
        if not done:
            os.killpg(p.pid, signal.SIGTERM)  # which mpirun passes on
            time.sleep(1)
        os.killpg(p.pid, signal.SIGKILL)  # before wait(), as long as the number is still its own
        RUNNING.remove(p.pid)
        p.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        for left in glob.glob(f"/tmp/*_{p.pid}_*"):  # of a crash: test_gpt names its files after itself
            if os.path.isdir(left):
                shutil.rmtree(left, ignore_errors=True)
            else:
                os.remove(left)
        return done is not None and p.returncode == 0

    def record(self, work, record):
        """Runs without a mutant: how long it takes, and which mutants' places it comes by."""
        for _ in range(2):  # the first may have failed for another job's load
            with open(record, "wb") as f:
                f.truncate(1 << 16)
            begin = time.monotonic()
            self.passed = self.passed or self.run(work, 1200, {"MUTANT_ASKED": record})
            self.seconds = time.monotonic() - begin
            with open(record, "rb") as f:
                self.reaches |= {k for k, asked in enumerate(f.read()) if asked}
            if self.passed:
                break
        os.remove(record)

    def notices(self, work, number):
        tries = 2 if self.program in WAITING else 1
        return not any(self.run(work, 4 * self.seconds + 20, {"MUTANT": str(number)}) for _ in range(tries))


def tests_of(program, work):
    listing = PROGRAMS[program][1]
    if listing is None:
        return [Test(program, "")]
    if isinstance(listing, str):
        with open(os.path.join(work, listing)) as f:
            return [Test(program, name) for name in re.findall(r"(?m)^TEST\((\w+)\)", f.read())]
    env = {**MPI_ENV, **os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(listing, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True)
    names = re.findall(r"(?m)^(?:ok|FAIL) ([^\n]*)", run.stdout)
    return [Test(program, re.sub(r": (Failure|\w+Error|\w+Expired): .*", "", name)) for name in names]


def programs_of(path):
    return next(programs for pattern, programs in TABLE if fnmatch.fnmatch(path, pattern))


def recorded(programs, work, jobs):
    """After a run of each test without a mutant: those that pass, the fastest first, and whether one fails that must not."""
    tests = [test for program in programs for test in tests_of(program, work)]
    if not tests:
        raise Failure(f"{', '.join(programs)} list no tests. See build/mutate/work.")
    print(f"{len(tests)} tests without a mutant, to see what each reaches", flush=True)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for i, test in enumerate(tests):
            pool.submit(test.record, work, os.path.join(work, f"build/asked_{i}"))
    # -O1 adds in another order than -O3: some tests of long sums fail where blocks have one thread, and pass in the others
    passing = {test.name for test in tests if test.passed}
    failing = [test for test in tests if not test.passed and (not test.name or test.name not in passing)]
    for test in tests:
        if not test.passed:
            print(f"{test} fails without any mutation and is left out{'. Mend that first' * (test in failing)}", flush=True)
    return sorted((test for test in tests if test.passed), key=lambda test: test.seconds), bool(failing)


def verdict(number, place, tests, work):
    """(caught, by whom)"""
    mine = [test for test in tests if test.program in programs_of(place.file) and number in test.reaches]
    by = next((test for test in mine if test.notices(work, number)), None)
    return ("caught", str(by)) if by else ("SURVIVED" if mine else "not reached", "")


def summary(rows):
    def share(some):
        caught = sum(row["verdict"] == "caught" for row in some)
        return f"{caught:5} of {len(some):5} caught, {100 * caught / max(1, len(some)):5.1f}%"

    for key in ("operator", "file"):
        for value in sorted({row[key] for row in rows}):
            print(f"  {value:24} {share([row for row in rows if row[key] == value])}")
    count = collections.Counter(row["verdict"] for row in rows)
    print(f"mutate: {len(rows)} mutants, {count['caught']} caught, {count['SURVIVED']} survived, "
          f"{count['not reached']} not reached: {100 * count['caught'] / max(1, len(rows)):.1f}%")
    return count["caught"] / max(1, len(rows))


FIELDS = ["tree", "file", "line", "column", "operator", "verdict", "by", "before", "after"]


def run(words):
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", default="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.0)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.error = fail
    args = parser.parse_args(words)
    if args.help:
        print(__doc__.strip())
        return 0
    tree = tracked()
    paths = [p for p in tree if any(fnmatch.fnmatch(p, f) for f in FILES) and fnmatch.fnmatch(p, args.files)
             and p.endswith((".cu", ".cuh", ".h"))]
    places = [place for path in paths for place in Source(path, tree[path].decode()).places()]
    if not places:
        raise Failure(f"--files '{args.files}': nothing to break there. Give a pattern such as 'dev/run/*'.")
    order = [None] + order_of(places, args.seed)  # from 1: 0 is no mutant
    order = order[:1 << 16]
    print(f"{len(places)} places in {len(paths)} files", flush=True)
    if args.list:
        for place in order[1:args.count + 1]:
            print(f"{place.file}:{place.line}: {place.operator}: {place.before}  ->  {place.after}")
        return 0
    ours = os.path.join(ROOT, "build", "mutate")
    work = os.path.join(ours, "work")
    os.makedirs(work, exist_ok=True)
    lock = open(os.path.join(ours, "lock"), "w")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Failure(f"another run works in {ours}. Wait for its end.") from None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 30, 16 << 30))  # a mutant may write without end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    programs = [p for p in PROGRAMS if any(p in programs_of(path) for path in {x.file for x in places})]
    chosen, dropped = build(work, tree, order, args.count, sorted({PROGRAMS[p][0] for p in programs}))
    print(f"{len(chosen)} mutants; {dropped} other places did not compile", flush=True)

    code = b"".join(path.encode() + data for path, data in tree.items() if not path.endswith((".md", ".png", ".csv")))
    state, results = hashlib.sha256(code).hexdigest()[:16], os.path.join(ours, f"results-{args.seed}.csv")
    known = {}
    if os.path.exists(results):
        with open(results, newline="") as f:
            known = {(r["file"], r["line"], r["column"], r["operator"]): r for r in csv.DictReader(f) if r["tree"] == state}
    rows, todo = [], []
    for k in chosen:
        row = known.get((order[k].file, str(order[k].line), str(order[k].column), order[k].operator))
        rows.append(row) if row else todo.append(k)
    tests, failing = recorded(programs, work, args.jobs) if todo else ([], False)
    with open(results, "a", newline="") as f, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        out = csv.DictWriter(f, FIELDS)
        if not f.tell():
            out.writeheader()
        waiting = {pool.submit(verdict, k, order[k], tests, work): order[k] for k in todo}
        for done in concurrent.futures.as_completed(waiting):
            place, (what, by) = waiting[done], done.result()
            row = dict(zip(FIELDS, (state, place.file, place.line, place.column, place.operator, what, by, place.before, place.after)))
            out.writerow(row)
            f.flush()
            rows.append(row)
            print(f"{what + ' by ' * bool(by) + by:40} {place.file}:{place.line}: {place.operator}: {place.before}  ->  "
                  f"{place.after}", flush=True)
    return 1 if summary(rows) < args.least or failing else 0


def fail(message):
    raise Failure(f"{message}. See --help.")


def main():
    try:
        return run(sys.argv[1:])
    except Failure as e:
        print(f"mutate.py: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
