#!/usr/bin/env python3
"""Which library multiplies fastest here: sgemm of oneDNN, OpenBLAS (each of its cores that runs here) and BLIS, those
that are installed, at a model's shapes, taking turns in one run.

usage: dev/bench/libraries.py [--threads N] [--rounds N] [--shapes quickstart 60M NxKxM ...] [--results DIR]

Each library is a process of its own with one thread a core, of which each has a part of the result, as in
dev/cpu/include/gemm.h. Prints GFLOP/s, the best of all rounds, of a linear layer's forward (N,K) (M,K)^T, and its
gradients of inputs (N,M) (M,K) and weights (N,M)^T (N,K). Needs numpy.
"""
import argparse
import ctypes
import datetime
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np

# name, N, K, M
SHAPES = {
    "quickstart": [("qkv", 2048, 256, 768), ("o", 2048, 256, 256), ("w13", 2048, 256, 1408), ("w2", 2048, 704, 256)],
    "60M": [("qkv", 2048, 512, 1536), ("o", 2048, 512, 512), ("w13", 2048, 512, 3072), ("w2", 2048, 1536, 512),
            ("head", 524, 512, 32000)],
}
# as tables call it, file, what of the environment chooses
LIBRARIES = [("oneDNN", ("libdnnl.so.2", "libdnnl.so.3"), {}), ("BLIS", ("libblis.so.4",), {})] + [
    (f"OpenBLAS {core}", ("libopenblas.so.0",), {"OPENBLAS_CORETYPE": core})
    for core in ("Prescott", "Haswell", "SkylakeX", "Cooperlake", "NEOVERSEN1", "NEOVERSEV1")] + [
    ("OpenBLAS as it chooses", ("libopenblas.so.0",), {})]


def load(names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    return None


def multiplier(library):
    """sgemm(trans_a, trans_b, m, n, k, a, lda, b, ldb, c, ldc), row-major, on the calling thread alone."""
    size, real, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    if hasattr(library, "dnnl_sgemm"):
        library.dnnl_sgemm.argtypes = [ctypes.c_char] * 2 + [size] * 3 + [real, pointer, size, pointer, size, real,
                                                                          pointer, size]
        return lambda ta, tb, m, n, k, a, lda, b, ldb, c, ldc: library.dnnl_sgemm(
            b"NT"[ta:ta + 1], b"NT"[tb:tb + 1], m, n, k, 1.0, a, lda, b, ldb, 0.0, c, ldc)
    size = ctypes.c_int
    library.cblas_sgemm.argtypes = [size] * 6 + [real, pointer, size, pointer, size, real, pointer, size]
    return lambda ta, tb, m, n, k, a, lda, b, ldb, c, ldc: library.cblas_sgemm(
        101, 111 + ta, 111 + tb, m, n, k, 1.0, a, lda, b, ldb, 0.0, c, ldc)


def serve(names, threads):
    """Answers each shape on standard input by three rates."""
    library = load(names)
    if library is None:
        return
    core = getattr(library, "openblas_get_corename", None)
    if core:
        core.restype = ctypes.c_char_p
    print(core().decode() if core else "there", flush=True)
    sgemm = multiplier(library)
    for line in sys.stdin:
        n, k, m = map(int, line.split())
        random = np.random.default_rng(1)
        x, w, y = (random.standard_normal(shape, dtype=np.float32) for shape in ((n, k), (m, k), (n, m)))
        out, dx, dw = np.empty_like(y), np.empty_like(x), np.empty_like(w)
        rates = []
        for a, ta, b, tb, c, inner in ((x, 0, w, 1, out, k), (y, 0, w, 0, dx, m), (y, 1, x, 0, dw, n)):
            rows, cols = c.shape
            longer = max(rows, cols)
            parts = [(longer * i // threads, longer * (i + 1) // threads) for i in range(threads)]

            def share(begin, end):
                lda, ldb, at_a, at_b, at_c = a.shape[1], b.shape[1], 0, 0, 0
                if rows >= cols:
                    at_a, at_c = begin * (1 if ta else lda), begin * cols
                else:
                    at_b, at_c = begin * (ldb if tb else 1), begin
                sgemm(ta, tb, end - begin if rows >= cols else rows, cols if rows >= cols else end - begin, inner,
                      a.ctypes.data + 4 * at_a, lda, b.ctypes.data + 4 * at_b, ldb, c.ctypes.data + 4 * at_c, cols)

            best = 1e9
            for _ in range(8):
                others = [threading.Thread(target=share, args=part) for part in parts[1:]]
                begin = time.perf_counter()
                for other in others:
                    other.start()
                share(*parts[0])
                for other in others:
                    other.join()
                best = min(best, time.perf_counter() - begin)
            np.testing.assert_allclose(c[::97, ::89], ((a.T if ta else a)[::97] @ (b.T if tb else b)[:, ::89]),
                                       atol=2e-3 * inner ** 0.5)
            rates.append(2 * n * k * m / best / 1e9)
        print(*rates, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="a model's (quickstart, 60M), or NxKxM")
    parser.add_argument("--results", help="write the table there too, as DATE-libraries-DEVICE.md")
    args = parser.parse_args()
    shapes = []
    for name in args.shapes:
        if name in SHAPES:
            shapes += [(f"{name} {shape[0]}", shape[1:]) for shape in SHAPES[name]]
        elif re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}x[1-9]\d{0,5}", name):
            shapes.append(("", tuple(map(int, name.split("x")))))
        else:
            sys.exit(f"libraries.py: --shapes: '{name}' is none of {', '.join(SHAPES)}, nor NxKxM.")
    servers, rates = {}, {}
    outside = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    for name, files, own in LIBRARIES:
        # one thread each: those of the library rest
        env = {**outside, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "BLIS_NUM_THREADS": "1", **own}
        command = [sys.executable, __file__, "serve", str(args.threads), *files]
        server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True)
        core = server.stdout.readline().strip()
        wanted = own.get("OPENBLAS_CORETYPE")
        if core and (wanted is None or core.lower() == wanted.lower()):
            servers[name if core == "there" or wanted else f"{name} ({core})"] = server
    if not servers:
        sys.exit("libraries.py: none of oneDNN, OpenBLAS, BLIS is here. Install one (libdnnl-dev, libopenblas-dev).")
    for _ in range(args.rounds):
        for label, shape in shapes:
            for name, server in servers.items():
                server.stdin.write("%d %d %d\n" % shape)
                server.stdin.flush()
                answer = server.stdout.readline().split()
                if len(answer) != 3:
                    sys.exit(f"libraries.py: {name} gave no right product of {label}. Leave it out of LIBRARIES.")
                best = rates.setdefault((shape, name), [0.0] * 3)
                rates[shape, name] = [max(*pair) for pair in zip(best, map(float, answer))]
    for server in servers.values():
        server.stdin.close()
        server.wait()
    with open("/proc/cpuinfo") as f:
        device = (re.search(r"model name\s*: (.*)", f.read()) or ["", os.uname().machine])[1]
    date = datetime.datetime.now(datetime.timezone.utc)
    lines = [f"{device}, {args.threads} threads, {date:%Y-%m-%d}; GFLOP/s: forward, inputs, weights", "",
             "| N x K x M | " + " | ".join(servers) + " |", "|---|" + "--:|" * len(servers)]
    for label, shape in shapes:
        cells = (" ".join(f"{rate:.0f}" for rate in rates[shape, name]) for name in servers)
        lines.append(f"| {' x '.join(map(str, shape))} {label}".rstrip() + " | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.results:
        slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
        path = os.path.join(args.results, f"{date:%Y-%m-%d}-libraries-{slug}.md")
        with open(path, "w") as f:
            f.write("\n".join(lines) + "\n")
        print(f"\nwritten {path}")


if __name__ == "__main__":
    serve(sys.argv[3:], int(sys.argv[2])) if sys.argv[1:2] == ["serve"] else main()
