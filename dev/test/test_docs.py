#!/usr/bin/env python3
"""Tests that README.md, dev/README.md, dev/doc and --help say what the sources hold. Standard library only.

usage: dev/test/test_docs.py TRAIN_GPT

Names, files and options that the texts put in backticks exist, and so does what they link; each page is linked from
README.md, which is short; commands in their code blocks take the options given;
each diff of dev/doc/tour.md applies to the tree as it is, one after another; each option has a test.
"""
import errno
import functools
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
TRAINER = str(Path(sys.argv[1] if len(sys.argv) > 1 else "build/train_gpt_cpu_fp32").resolve())
PAGES = sorted("dev/doc/" + p.name for p in (ROOT / "dev/doc").glob("*.md"))
TEXTS = ["README.md", "dev/README.md", *PAGES]
LONGEST = {"README.md": 250, "dev/README.md": 25}  # lines
CODE = {".cu", ".cuh", ".h", ".cpp", ".c", ".py", ".sh", ".sed"}

# Options of srun, sbatch, scancel and torchrun
FOREIGN = {"--gpus-per-node", "--mpi", "--nnodes", "--no-python", "--nproc-per-node", "--ntasks-per-node",
           "--rdzv-endpoint", "--shutdown-timeout", "--signal"}
# Words in backticks that are nobody's names here
WORDS = {"SBATCH", "scancel", "JOB", "USR1", "pmi2", "tensorboard"}
# Tools whose options have no test: they measure or search for minutes, and `make test` does not run them
UNTESTED = {"dev/bench/step.py", "dev/fuzz/run.py"}


@functools.lru_cache(None)
def files():
    """path below the root: its text, "" of what is no text"""
    skip = {".git", "build", "runs", "data", "__pycache__"}
    found = {}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and parts[0] not in skip and "__pycache__" not in parts:
            text = path.read_text(errors="replace") if path.suffix in CODE or path.name == "Makefile" else ""
            found["/".join(parts)] = text
    return found


def sources():
    """texts of the code but for this file, without what is behind // in C++"""
    for path, text in files().items():
        if path != "dev/test/test_docs.py" and text:
            yield re.sub(r"(?m)^\s*//.*$", "", text) if path.endswith((".cu", ".cuh", ".h")) else text


@functools.lru_cache(None)
def words():
    return set(re.findall(r"\w+", " ".join(sources())))


@functools.lru_cache(None)
def trainer_options(command=""):
    text = subprocess.run([TRAINER, *command.split(), "--help"], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"(?m)^  (--[a-z0-9-]+)", text))


def all_trainer_options():
    return trainer_options() | trainer_options("generate") | trainer_options("eval")


def literal_options(text):
    """options that a program compares with or gives to argparse"""
    return set(re.findall(r"""["'](--[a-z][a-z0-9-]*)["']""", text)) | {"--help"}


def tool_options(path):
    """of a Python tool: those that it defines, itself or by a function of a module beside it"""
    text = files()[path]
    for module in re.findall(r"(?m)^(?:from|import) (\w+)", text):
        beside = str(Path(path).parent / (module + ".py"))
        text += files().get(beside, "")
    return set(re.findall(r"""add_argument\(\s*["'](--[a-z][a-z0-9-]*)["']""", text)) | {"--help"}


def tools():
    return [p for p, text in files().items() if p.startswith("dev/") and not p.startswith("dev/test/")
            and p.endswith(".py") and "add_argument" in text]


@functools.lru_cache(None)
def tests():
    """what runs as a test, without its own options; not this file, what breaks sources or compares with libraries"""
    apart = {"test_docs.py", "mutate.py", "test_mutate.py", "tokenizer_vs_libraries.py"}
    text = "\n".join(text for path, text in files().items()
                     if path.startswith("dev/test/") and path.endswith(".py") and Path(path).name not in apart)
    return re.sub(r"""add_argument\(\s*["'].*""", "", text)


def function_body(name, path):
    """of the one definition in a file, without comments, strings and lambdas; name may be Struct::function"""
    text, indent = files()[path], ""
    for outer in name.split("::")[:-1]:
        (text,) = re.findall(rf"(?ms)^struct {outer} {{\n(.*?)^}};", text)
        indent = "    "
    function = name.split("::")[-1]
    (body,) = re.findall(rf"(?ms)^{indent}\w[\w ]*\b{function}\([^;{{]*\) {{\n(.*?)^{indent}}}", text)
    body = re.sub(r"//.*", "", re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', body))
    body = re.sub(rf"(?m)^{indent}    auto \w+ = \[.*}};$", "", body)
    return re.sub(rf"(?ms)^{indent}    auto \w+ = \[.*?^{indent}    }};$", "", body)


def called(body):
    """the names of a body's calls and launches, in the order in which they begin to work: what is an argument first"""
    calls = []
    for found in re.finditer(r"\b(\w+)(?:<\w+>)?(?:\(|<<<)", body):
        depth, end = int(body[found.end() - 1] == "("), found.end()
        while depth > 0:
            depth += {"(": 1, ")": -1}.get(body[end], 0)
            end += 1
        calls.append((end, found.group(1)))
    return [name for _, name in sorted(calls)]


def defines(path, name):
    """whether a file of C++ defines a function, a struct or a class, perhaps within one: Struct::function"""
    text = re.sub(r"(?m)^ *//.*$", "", files()[path])
    for outer in name.split("::")[:-1]:
        found = re.search(rf"(?ms)^(?:struct|class) {outer} {{\n(.*?)^}};", text)
        text = found.group(1) if found else ""
    name = name.split("::")[-1]
    function = rf"(?m)^[\w:<>,*& ]*(?<![\w:]){name}\((?:[^;{{}}]|{{}})*\)(?: const)? {{"
    return re.search(rf"{function}|^(?:struct|class) {name} {{", text) is not None


def tour_rows():
    """of the tables of dev/doc/tour.md: number, cell of functions, the names in it that are functions, files"""
    rows = []
    for number, cell, where in re.findall(r"(?m)^\| (\d+) \| (.*?) \| (.*?) \|", (ROOT / "dev/doc/tour.md").read_text()):
        names = [n for n in re.findall(r"`([^`]+)`", cell) if re.fullmatch(r"(?:[A-Z]\w+::)?\w+", n)]
        rows.append((int(number), names, re.findall(r"`([^`]+)`", where)))
    return rows


@functools.lru_cache(None)
def said():
    """the string literals of the programs, those side by side joined, and what the system says of errors"""
    found = [os.strerror(n) for n in errno.errorcode]
    for path, text in files().items():
        if not path.startswith("dev/test/") and path != "test_gpt.cu":
            found += re.findall(r'"((?:[^"\\\n]|\\.)*)"', re.sub(r'"\s*\n\s*f?"', "", text))
    return "\n".join(found)


def mentions(text, option):
    return re.search(re.escape(option) + r"(?![a-z0-9-])", text)


def prose(text):
    return re.sub(r"(?ms)^```.*?^```", "", text)


def links(path):
    """paths below the root of what a text links and shows"""
    found = re.findall(r"\]\(([^)#\s]+)", prose((ROOT / path).read_text()))
    return [os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in found if "://" not in name]


def blocks(text, kind):
    return re.findall(rf"(?ms)^```{kind}\n(.*?)^```", text)


def apply(diff, tree):
    """Applies a unified diff to tree, path: text. A hunk's old lines must stand in the file exactly once."""
    for part in re.split(r"(?m)^diff --git .*\n", diff)[1:]:
        path = re.search(r"(?m)^\+\+\+ b/(.+)$", part).group(1)
        for hunk in re.split(r"(?m)^@@ .*\n", part)[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            times = tree[path].count(old)
            if times != 1:
                raise AssertionError(f"{path}: these lines stand there {times} times: {old}")
            tree[path] = tree[path].replace(old, new)


class Docs(unittest.TestCase):
    def test_names_in_backticks_exist(self):
        for path in TEXTS:
            for span in re.findall(r"`([^`]+)`", prose((ROOT / path).read_text())):
                span = " ".join(span.split())
                for word in re.findall(r"(?<![\w-])[A-Za-z_]\w{2,}", span):
                    named = {word, word.rstrip("0123456789")} & (words() | WORDS) or any(word in p for p in files())
                    with self.subTest(path, span=span, word=word):
                        self.assertTrue(named, "stands in no source")

    def test_files_in_backticks_exist(self):
        endings = "|".join(sorted(e[1:] for e in CODE | {".md"}))
        for path in TEXTS:
            for span in re.findall(r"`([^`]+)`", prose((ROOT / path).read_text())):
                for name in re.findall(rf"(?<![\w./*-])(?:[\w-]+/)*[\w-]+\.(?:{endings})\b|(?<![\w/])dev/[\w./-]+", span):
                    if re.search(r"\b[A-Z]+\.", name):  # NAME.sh: any of them
                        continue
                    there = any(("/" + p).endswith("/" + name) or p.startswith(name.rstrip("/") + "/") for p in files())
                    with self.subTest(path, span=span, name=name):
                        self.assertTrue(there, "no such file")

    def test_options_in_backticks_exist(self):
        known = all_trainer_options() | FOREIGN
        for text in files().values():
            known |= literal_options(text)
        for path in TEXTS:
            for span in re.findall(r"`([^`]+)`", prose((ROOT / path).read_text())):
                for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span):
                    with self.subTest(path, span=span, option=option):
                        self.assertIn(option, known)

    def test_commands_take_their_options(self):
        """of each program in code blocks and backticks, a line each, that it knows the options behind its name"""
        program = re.compile(r"(?:\./train_gpt(?: (generate|eval))?|(dev/[\w/-]+\.(?:py|sh)))\b")
        checked = 0
        for path in TEXTS:
            text = (ROOT / path).read_text()
            lines = re.sub(r"\\\n\s*", "", "\n".join(blocks(text, "") + re.findall(r"`([^`]+)`", prose(text))))
            for line in lines.splitlines():
                found = program.search(line)
                if not found:
                    continue
                command, tool = found.groups()
                mine, _, passed_on = line[found.end():].partition(" -- ")
                mine = re.split(r"\s\s|#|\.\.\.", mine)[0]  # then comes what is said of it
                known = trainer_options(command or "")
                if tool and tool.endswith(".py") and tool in files():
                    known = tool_options(tool)
                elif tool in files():  # a script passes them to the trainer, or to the tool that it starts
                    for starts in re.findall(r"(?m)^exec .*?(dev/[\w/]+\.py)", files()[tool]):
                        known = tool_options(starts)
                for options, of in ((mine, known), (passed_on, trainer_options())):
                    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", options):
                        checked += 1
                        with self.subTest(path, line=line, option=option):
                            self.assertIn(option, of)
        self.assertGreater(checked, 60)

    def test_links_lead_somewhere(self):
        self.assertGreater(len(links("README.md")), 10)
        for path in TEXTS:
            for name in links(path):
                with self.subTest(path, link=name):
                    self.assertTrue((ROOT / name).is_file(), "no such file")

    def test_the_readme_links_every_page(self):
        self.assertLessEqual(set(PAGES), set(links("README.md")))

    def test_short_texts_are_short(self):
        for path, most in LONGEST.items():
            with self.subTest(path):
                self.assertLessEqual(len((ROOT / path).read_text().splitlines()), most, "lines")

    def test_the_map_of_dev_names_its_rooms(self):
        rooms = re.findall(r"(?m)^\| `(\w+)/` \|", (ROOT / "dev/README.md").read_text())
        self.assertEqual(sorted(rooms), sorted({p.split("/")[1] for p in files() if re.match("dev/.*/", p)}))

    def test_diffs_of_the_tour_apply(self):
        tree = dict(files())
        diffs = blocks((ROOT / "dev/doc/tour.md").read_text(), "diff")
        self.assertEqual(len(diffs), 4)
        for i, diff in enumerate(diffs):
            with self.subTest(diff=i + 1):
                apply(diff, tree)

    def test_the_words_of_the_faults_are_the_programs(self):
        """of each message in the second column, what stands between names, numbers and punctuation"""
        checked = 0
        for line in re.findall(r"(?m)^\| .*", (ROOT / "dev/doc/faults.md").read_text()):
            for span in re.findall(r"`([^`]*: [^`]*)`", line.split("|")[2]):
                for clause in re.split(r"[.:;,]+(?:\s|$)|\.\.\.", span):
                    for words_ in re.split(r"(?:^|\s)\S*[\d/.=\"()]\S*(?=\s|$)", clause):
                        if " " in words_.strip():
                            checked += 1
                            with self.subTest(message=span):
                                self.assertIn(words_.strip(), said())
        self.assertGreater(checked, 100)

    def test_every_option_has_a_test(self):
        for command in ("", "generate", "eval"):
            for option in trainer_options(command):
                with self.subTest(command=command, option=option):
                    self.assertTrue(mentions(tests(), option), "no test in dev/test gives it")

    def test_every_option_of_a_tool_has_help_and_a_test(self):
        self.assertGreater(len(tools()), 12)
        for path in tools():
            if path in UNTESTED:
                continue
            for option in tool_options(path) - {"--help"}:
                with self.subTest(path, option=option):
                    self.assertTrue(mentions(tests(), option), "no test in dev/test gives it")

    def test_make_help_and_the_readme_name_the_same(self):
        makefile, readme = files()["Makefile"], (ROOT / "README.md").read_text()
        targets = set(re.findall(r"(?m)^([a-z-]+):.*## ", makefile))
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", readme, re.M))
        self.assertLessEqual(named, targets)
        self.assertLessEqual(targets - named, {"all", "clean"})
        variables = set(re.findall(r"([A-Z]+)=", "".join(re.findall(r"(?m)^#   .*$", makefile))))
        self.assertLessEqual({"PRECISION", "TEXT", "PART", "MODEL"}, variables)
        for name in variables:
            self.assertIn(name + "=", readme)

    def test_the_tour_calls_in_the_sources_order(self):
        """What a function calls once and the tour's tables name once stands in the same order in both."""
        named = [name.split("::")[-1] for _, names, _ in tour_rows() for name in names]
        for path, function, least in (
                ("train_gpt.cu", "main", 3), ("train_gpt.cu", "run", 8), ("train_gpt.cu", "Training::run", 2),
                ("train_gpt.cu", "train_step", 3), ("train_gpt.cu", "forward_backward", 1),
                ("train_gpt.cu", "launch_micro_batch", 3),
                ("train_gpt.cu", "forward", 2), ("train_gpt.cu", "block_forward", 3), ("train_gpt.cu", "loss_forward", 3),
                ("train_gpt.cu", "block_backward", 4), ("train_gpt.cu", "block_replay", 3), ("train_gpt.cu", "update", 4),
                ("dev/run/checkpoint.h", "Saver::save", 6), ("dev/run/checkpoint.h", "Saver::complete_all", 2)):
            calls = called(function_body(function, path))
            once = [n for n in named if named.count(n) == 1 and calls.count(n) == 1 and n != function]
            with self.subTest(function):
                self.assertGreaterEqual(len(once), least, f"too few to compare: {once}")
                self.assertEqual(once, sorted(once, key=calls.index))

    def test_the_tour_names_every_kernel_on_the_way(self):
        text = (ROOT / "dev/doc/tour.md").read_text()
        for function in ("forward", "loss_forward", "launch_micro_batch", "block_forward", "block_backward", "update"):
            for name in called(function_body(function, "train_gpt.cu")):
                if re.search("_(forward|backward|kernel|replay)$|(begin|reduce)_gradients", name):
                    with self.subTest(function, call=name):
                        self.assertIn(f"`{name}`", text)

    def test_the_tour_says_where_its_functions_are(self):
        rows = tour_rows()
        self.assertEqual([number for number, _, _ in rows], list(range(1, len(rows) + 1)))
        for number, names, paths in rows:
            found = {path: [name for name in names if defines(path, name)] for path in paths}
            with self.subTest(row=number, names=names, paths=paths):
                self.assertTrue(names and paths)
                self.assertEqual(set(names), {name for there in found.values() for name in there})
                self.assertTrue(all(found.values()), "a file has none of them")


if __name__ == "__main__":
    sys.exit(run_all("test_docs"))
