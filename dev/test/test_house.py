#!/usr/bin/env python3
"""Tests of the rooms: what a file may take from where. Standard library only.

usage: dev/test/test_house.py [--full]

Each header compiles alone, with the stand-in and clang++, or g++ where that is missing (--full: with g++ in any case,
and with nvcc, where it is, those that need the whole model a minute each); it includes no room above its own; options
are named by the command line alone; the main file stays short enough to be read.
"""
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from lines import run_all

ROOT = Path(__file__).resolve().parent.parent.parent
FULL = "--full" in sys.argv
# clang++ is done in three quarters of g++'s time
COMPILERS = ["clang++"] * bool(shutil.which("clang++"))
COMPILERS += ["g++"] * (FULL or not COMPILERS)
CXX = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function",
       "-I" + str(ROOT / "dev/cpu/include"), "-I" + str(ROOT / "build/src"), "-x", "c++"]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
MODEL = "train_gpt.cu"  # who includes it knows the model

TOP = ["simplenorm.cuh", "dataloader.h", "tokenizer.h"]
ROOMS = {room: sorted(str(p.relative_to(ROOT)) for p in (ROOT / "dev" / room).iterdir() if p.suffix in (".h", ".cuh"))
         for room in ("device", "run", "use")}
HEADERS = TOP + sum(ROOMS.values(), [])
# in dev/run, what knows the model: weights and checkpoints, the ranks' agreement on them, the options, the job
KNOWING = {"dev/run/" + name for name in ("weights.h", "checkpoint.h", "agree.h", "options.h", "job.h")}
# the command line: what may name an option
COMMAND_LINE = {"dev/run/options.h", "dev/run/job.h"} | set(ROOMS["use"])


def text(path):
    return (ROOT / path).read_text()


def model():
    """the main file as those see it who include it: without the loop and main"""
    return text(MODEL).split("#endif  // TRAIN_GPT\n")[0]


def includes(path):
    """the files of the project that a file includes itself"""
    for name in re.findall(r'(?m)^#include "([^"]+)"', model() if path == MODEL else text(path)):
        yield os.path.normpath(os.path.join(os.path.dirname(path), name))


def all_includes(path, seen=None):
    seen = set() if seen is None else seen
    for name in includes(path):
        if name not in seen:
            seen.add(name)
            all_includes(name, seen)
    return seen


def compiles(command, header, suffix):
    """Compiles a file that includes just the header; what the compiler says, "" if all is well."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / ("alone" + suffix)
        source.write_text(f'#include "{header}"\n')
        done = subprocess.run([*command, str(source)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=work)
    return done.stdout if done.returncode or "warning:" in done.stdout else ""


class House(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        subprocess.run(["make", "-s", "sources", "build/src/dev/test/properties.cu"], cwd=ROOT, check=True)

    def test_each_header_compiles_alone(self):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for compiler in COMPILERS:
                said = pool.map(lambda h: compiles([compiler, *CXX], h, ".cpp"), HEADERS)
                for header, complaint in zip(HEADERS, said):
                    with self.subTest(header, compiler=compiler):
                        self.assertEqual(complaint, "")

    def test_what_only_the_night_builds_compiles(self):
        self.assertEqual(compiles([COMPILERS[0], *CXX, "-DEXACT_GEOMETRY", "-I" + str(ROOT)],
                                  str(ROOT / "build/src/dev/test/properties.cu"), ".cpp"), "")

    @unittest.skipUnless(NVCC and FULL, "is for --full, with nvcc")
    def test_each_header_compiles_alone_with_nvcc(self):
        command = [NVCC, "-std=c++17", "-ptx", "-gencode=arch=compute_90a,code=compute_90a", "-DPRECISION_BF16",
                   "-I" + str(ROOT), "-o", os.devnull]
        nccl = subprocess.run(["make", "-s", "nccl"], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for header, complaint in zip(HEADERS, pool.map(lambda h: compiles(command + nccl, h, ".cu"), HEADERS)):
                with self.subTest(header):
                    self.assertEqual(complaint, "")

    def test_no_room_includes_one_above_it(self):
        for header in ROOMS["device"] + ["simplenorm.cuh"]:
            for name in all_includes(header):
                with self.subTest(header, name=name):
                    self.assertTrue(name.startswith("dev/device/") or name == "dev/run/error.h")
        for header in ("dataloader.h", "tokenizer.h"):
            self.assertEqual(list(includes(header)), [], header)
        for header in ROOMS["run"]:
            with self.subTest(header):
                self.assertEqual(MODEL in all_includes(header), header in KNOWING)
                above = {n for n in all_includes(header) if n.startswith("dev/use/")} - {"dev/use/sampling.h"}
                self.assertEqual(above, set())

    def test_options_are_named_by_the_command_line_alone(self):
        """in no string of another file; of the main file, only behind the model"""
        for path in [MODEL] + [h for h in HEADERS if h not in COMMAND_LINE]:
            source = model() if path == MODEL else text(path)
            for string in re.findall(r'"(?:[^"\\\n]|\\.)*"', re.sub(r"(?m)^\s*//.*$", "", source)):
                with self.subTest(path, string=string):
                    self.assertIsNone(re.search(r"(?<![\w-])--[a-z]", string))

    def test_a_person_can_read_it(self):
        self.assertLessEqual(text(MODEL).count("\n"), 2450)
        for path in [MODEL] + HEADERS:
            for i, line in enumerate(text(path).splitlines(), 1):
                self.assertLessEqual(len(line), 120, f"{path}:{i}")


if __name__ == "__main__":
    sys.exit(run_all("test_house"))
