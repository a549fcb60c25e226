#!/usr/bin/env python3
"""Times whole training steps of ./train_gpt, every variant, beside its PyTorch twin, in one run.

usage: dev/bench/step.py [--model 162M 1B 7B llama3-8B] [--variant simplegpt prenorm preqknorm] [--minutes 8.5]
                         [--torch compile eager] [--device cpu|cuda] [--bench build/bench_...] [--results DIR] ...

One step: forward, backward, clipping, AdamW on random tokens, in the trainer's precision; the twin (dev/reference) in
bf16 by autocast, with fused AdamW and, on a GPU, flash attention; for models whose float32 weights and moments would fill the GPU
wholly in bf16, which spares it the masters that the trainer keeps. They take turns, as many as the minutes allow; what
finds no time or memory is named in the table, and if it is the trainer, the exit status is 1. The twin has the
trainer's batch, or the largest half, quarter, .. of it that fits.

Per line: tokens/s; MFU, the share of the datasheet's peak at 6 FLOPs a parameter and token and causal attention's; the
same of the matmul rate that --bench measures now; memory; and the least time that --plan gives for that rate, over the
time. The numbers go to DIR as JSON, one file a model; dev/bench/report.py makes Markdown of them. Torch is only needed
for the twin.
"""
import argparse
import array
import datetime
import json
import os
import queue
import random
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VARIANTS = ["simplegpt", "prenorm", "preqknorm"]

# sequences of a micro-batch, tokens of a sequence, the trainer's other options, the twin's weights: what suits 139 GiB,
# and two cores
LARGE = ("auto", 2048, "--recompute norm --moments bf16", "bf16")
SETTINGS = {
    "cuda": {"162M": ("32", 1024, "", "fp32"), "1B": ("64", 512, "", "fp32"), "7B": LARGE, "llama3-8B": LARGE},
    "cpu": {"60M": ("4", 512, "", "fp32")},
}
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, datasheets
WARM_UP = {"cuda": 3, "cpu": 2}                        # steps of a turn that are not counted


def fail(message):
    sys.exit(f"step.py: {message}")


def output(*command):
    """What a command prints, "" if it fails or is not there."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device):
    if device == "cuda":
        return output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    with open("/proc/cpuinfo") as f:
        return re.search(r"model name\s*: (.*)", f.read())[1]


def precision(trainer, model):
    """The trainer's, fp32 or bf16."""
    found = re.search("; (fp32|bf16)$", output(trainer, "--plan", "--model", model, "--batch-size", "1"), re.M)
    return found[1] if found else fail(f"--trainer: {trainer} does not say its precision. Build it anew: make.")


def gpu_mib():
    used = output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
    return int(used[0]) if used and used[0].isdigit() else 0


def flavour(trainer, name):
    """A flavour's numbers as the trainer itself lists them."""
    for line in output(trainer, "--models").splitlines():
        word = line.split()
        if word and word[0].lower() == name.lower():
            dim, layers, heads, kv, hidden, vocab = map(int, word[1:7])
            backbone = "nanogpt" if word[0].startswith("nanogpt") else "llama"
            return dict(backbone=backbone, dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv, vocab_size=vocab,
                        multiple_of=hidden)  # which the twin rounds 8/3 dim up to
    fail(f"--model: the trainer knows no flavour '{name}'. {trainer} --models lists them.")


def measured_ceilings(bench):
    """Copy speed (GB/s) and matmul rate (TFLOP/s) as the benchmark's program finds them now."""
    with tempfile.TemporaryDirectory() as work:
        done = subprocess.run([bench, "--part", "ceilings", "--results", work], stdout=sys.stderr)
        if done.returncode:
            fail(f"{bench} failed with status {done.returncode}.")
        with open(os.path.join(work, os.listdir(work)[0])) as f:
            return json.load(f)


# ----------------------------------------------------------------------------------------------------------------------
# The trainer


def logged_rates(log):
    """tokens/s of the steps that a run has logged so far."""
    if not os.path.exists(log):
        return []
    with open(log) as f:
        column = f.readline().strip().split(",").index("tokens_per_s")
        return [float(line.split(",")[column]) for line in f if line.endswith("\n")]


class Trainer:
    """Runs of one variant at one shape."""

    def __init__(self, args, model, variant, batch, seq_len, options):
        self.name = f"train_gpt {variant}"
        self.cuda, self.warm_up, self.batch, self.seq_len = args.device == "cuda", WARM_UP[args.device], batch, seq_len
        self.command = [args.trainer, "--model", model, "--variant", variant, "--seq-len", str(seq_len), *options]
        self.seconds, self.error, self.memory_gib = [], None, 0.0

    def turn(self, tokens, steps, limit):
        """Times `steps` steps after the warm-up, as many of them as end within `limit` seconds."""
        deadline, late, ended = time.monotonic() + limit, False, 0
        before = gpu_mib() if self.cuda else 0
        with tempfile.TemporaryDirectory() as work, open(os.path.join(work, "output"), "w+") as out:
            log = os.path.join(work, "run", "log.csv")
            run = subprocess.Popen([*self.command, "--batch-size", self.batch, "--train-data", tokens, "--steps",
                                    str(self.warm_up + steps), "--out", os.path.dirname(log)], stdout=out, stderr=out)
            while not ended:
                late = time.monotonic() > deadline
                if late:
                    run.kill()
                elif self.cuda and len(logged_rates(log)) < self.warm_up:  # then nothing more is allocated
                    self.memory_gib = max(self.memory_gib, (gpu_mib() - before) / 1024)
                time.sleep(0.5)
                ended, status, usage = os.wait4(run.pid, os.WNOHANG)
            run.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            text, rates = out.read(), logged_rates(log)[self.warm_up:]
        if run.returncode and not late:
            self.error = text.strip().split("\n")[-1] or f"ended with status {run.returncode}"
            return
        if not self.cuda:
            self.memory_gib = max(self.memory_gib, usage.ru_maxrss / 2**20)
        batch = re.search(r"steps of \d+ x (\d+) sequences", text)
        if batch:
            self.batch = batch[1]  # what auto is here
        self.seconds += [int(self.batch) * self.seq_len / rate for rate in rates]
        if not self.seconds:
            self.error = f"no step within {limit:.0f} s"

    def plan(self, ceilings):
        """FLOPs a token, least seconds of a step, planned GiB, at the measured ceilings if there are some."""
        device = ["--device", f"{ceilings['matmul_tflops']:.6g},{ceilings['copy_gb_s']:.6g},1000"] if ceilings else []
        text = output(*self.command, "--plan", "--batch-size", self.batch, *device)
        flops = re.search(r"at ([\d.e+]+) GFLOP a token", text)
        least = re.search(r"^  step +\S+ +\S+ +(\S+) ", text, re.M)
        total = re.search(r"^  total +(\S+) MiB", text, re.M)
        return {"flops_per_token": float(flops[1]) * 1e9, "plan_s": float(least[1]) / 1e3,
                "plan_gib": float(total[1]) / 1024}

    def close(self):
        """Nothing stays between turns."""


def write_tokens(path, vocabulary, windows, seq_len):
    """A shard of random tokens; the loader begins again at its end."""
    count = windows * (seq_len + 1)
    with open(path, "wb") as f:
        array.array("i", [20240801, 7, count] + 253 * [0]).tofile(f)
        array.array("I", random.Random(1).choices(range(vocabulary), k=count)).tofile(f)


# ----------------------------------------------------------------------------------------------------------------------
# The twin, in a process of its own: what it took of the GPU is free again when it ends


class Twin:
    def __init__(self, args, config, variant, mode, seq_len, weights):
        how = ("torch.compile" if mode == "compile" else "torch eager") + (" bf16" if weights == "bf16" else "")
        self.name = f"{how} {variant}"
        self.job = dict(config=dict(config, variant=variant, max_seq_len=seq_len), mode=mode, seq_len=seq_len,
                        device=args.device, threads=args.threads, attention=args.torch_attention, weights=weights,
                        autocast=args.precision == "bf16" and weights == "fp32")
        self.batch, self.seq_len, self.process, self.lines = "0", seq_len, None, None
        self.seconds, self.error, self.memory_gib, self.version = [], None, 0.0, None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker", json.dumps(dict(self.job, batch=int(self.batch)))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        lines = self.lines = queue.Queue()

        def read(stream):
            for line in stream:
                lines.put(json.loads(line))
            lines.put({"error": "ended without a word"})

        threading.Thread(target=read, args=[self.process.stdout], daemon=True).start()

    def turn(self, batch, steps, limit):
        deadline, warm_up = time.monotonic() + limit, WARM_UP[self.job["device"]]
        if not int(self.batch):
            self.batch = batch
        while True:
            if not self.process:
                self.start()
            seconds = []
            try:
                self.process.stdin.write(f"{warm_up + steps}\n")
                self.process.stdin.flush()
                while len(seconds) < warm_up + steps:
                    said = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
                    self.memory_gib = said.get("memory_gib", self.memory_gib)
                    self.version = said.get("torch", self.version)
                    if "error" in said:
                        raise RuntimeError(said["error"])
                    if "seconds" in said:
                        seconds.append(said["seconds"])
            except queue.Empty:
                self.close()
                if len(seconds) <= warm_up and not self.seconds:
                    self.error = f"no step within {limit:.0f} s"
            except (RuntimeError, OSError) as error:
                self.close()
                if str(error) == "out of memory" and int(self.batch) > 1:
                    self.batch = str(int(self.batch) // 2)
                    continue
                self.error = str(error)
            self.seconds += seconds[warm_up:]
            return

    def close(self):
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def work(job):
    """The twin's process: for each number read, as many steps, a JSON line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    try:
        import torch
        sys.path.insert(0, os.path.join(ROOT, "dev", "reference"))
        from model import Config, Model
    except ImportError as error:
        return say(error=f"not measured: {error}")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    cuda = job["device"] == "cuda"
    backends = {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION],
                "default": [b for b in SDPBackend.__members__.values() if b != SDPBackend.ERROR]}[job["attention"]]
    try:
        say(torch=torch.__version__)
        with torch.device(job["device"]):
            model = Model(Config(**job["config"]))
        model.init_weights()
        if job["weights"] == "bf16":
            model.to(torch.bfloat16)
        autocast = torch.autocast(job["device"], torch.bfloat16, enabled=job["autocast"])
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        loss_of = torch.compile(model.loss) if job["mode"] == "compile" else model.loss
        for line in sys.stdin:
            for _ in range(int(line)):
                tokens = torch.randint(0, job["config"]["vocab_size"], (job["batch"], job["seq_len"] + 1),
                                       device=job["device"])
                begin = time.perf_counter()
                adamw.zero_grad()
                with sdpa_kernel(backends), autocast:
                    loss = loss_of(tokens)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adamw.step()
                if cuda:
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
                memory = (torch.cuda.max_memory_reserved() / 2**30 if cuda else
                          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
                say(seconds=seconds, memory_gib=memory)
    except (torch.OutOfMemoryError, MemoryError):
        say(error="out of memory")
    except Exception as error:  # the table shall name whatever stops PyTorch
        text = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        say(error="out of memory" if "allocate memory" in text else text)  # how PyTorch says it on a CPU


# ----------------------------------------------------------------------------------------------------------------------
# One model: all turns, the table, the file


def measure(args, model, ceilings, deadline):
    config = flavour(args.trainer, model)
    batch, seq_len, options, weights = SETTINGS[args.device].get(model, ("4", 1024, "", "fp32"))
    batch, seq_len = args.batch_size or batch, args.seq_len or seq_len
    options = shlex.split(options if args.options is None else args.options)
    trainers = [Trainer(args, model, variant, batch, seq_len, options) for variant in args.variant]
    twins = [Twin(args, config, args.variant[0], mode, seq_len, args.torch_weights or weights) for mode in args.torch]
    runs = trainers + twins
    weight = {Trainer: 1, Twin: 2}  # of the time: a twin may have to compile
    with tempfile.TemporaryDirectory() as work_dir:
        tokens = os.path.join(work_dir, "tokens.bin")
        windows = max(64, (1 << 23) // seq_len) if batch == "auto" else 4 * int(batch)
        write_tokens(tokens, config["vocab_size"], windows, seq_len)
        for turn in range(args.turns):
            begin = time.monotonic()
            for i, run in enumerate(runs):
                if run is not trainers[0] and trainers[0].batch == "auto":
                    run.error = "not measured: the first has not found its batch"
                if run.error:
                    continue
                if isinstance(run, Trainer):
                    run.batch = trainers[0].batch  # what auto is for the first
                left = sum(weight[type(r)] for r in runs[i:] if not r.error)
                limit = (deadline - time.monotonic()) * weight[type(run)] / left
                print(f"{model}, turn {turn + 1}: {run.name}, {limit:.0f} s at most ...", file=sys.stderr)
                run.turn(tokens if isinstance(run, Trainer) else trainers[0].batch, args.steps, limit)
                if args.device == "cuda":
                    run.close()
            if deadline - time.monotonic() < 1.2 * (time.monotonic() - begin):
                break
        for run in runs:
            run.close()
    # the FLOPs of a token are those of any batch
    flops_per_token = Trainer(args, model, args.variant[0], "1", seq_len, options).plan(ceilings)["flops_per_token"]
    peak = args.peak or next((p for name, p in PEAK_TFLOPS.items() if name in args.device_name), None)
    record = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
              "device": args.device_name, "part": "steps", "precision": args.precision,
              "commit": output("git", "-C", ROOT, "describe", "--always", "--dirty").strip(),
              "model": model, "seq_len": seq_len, "options": options, "threads": args.threads,
              "torch": next((t.version for t in twins if t.version), None), "torch_attention": args.torch_attention,
              "peak_tflops": peak, "matmul_tflops": ceilings and ceilings["matmul_tflops"],
              "copy_gb_s": ceilings and ceilings["copy_gb_s"], "flops_per_token": flops_per_token, "runs": []}
    for run in runs:
        entry = {"name": run.name, "batch_size": run.batch, "memory_gib": run.memory_gib, "error": run.error,
                 "seconds": run.seconds}
        if run.seconds:
            entry["seconds_per_step"] = statistics.median(run.seconds)
            entry["tokens_per_s"] = int(run.batch) * seq_len / entry["seconds_per_step"]
            rate = flops_per_token * entry["tokens_per_s"] / 1e12
            entry["mfu"] = rate / peak if peak else None
            entry["of_matmul_rate"] = rate / ceilings["matmul_tflops"] if ceilings else None
        if isinstance(run, Trainer) and run.batch != "auto":
            entry.update(run.plan(ceilings))
            entry["memory_gib"] = run.memory_gib or entry["plan_gib"]  # nvidia-smi may say nothing
        record["runs"].append(entry)
    return record


def print_table(record):
    def percent(x):
        return f"{100 * x:.1f}%" if x else ""

    first = record["runs"][0]
    options = " ".join(record["options"])
    print(f"\n{record['model']}, {record['precision']}, T {record['seq_len']} {options}; {record['device']}")
    print("MFU: of the datasheet's peak; of rate: of the measured matmul rate; GiB: the most; of plan: least time over "
          "time; first is: as fast")
    print(f"{'':30}{'B':>5}{'s/step':>10}{'tokens/s':>11}{'MFU':>8}{'of rate':>9}{'GiB':>8}{'of plan':>9}"
          f"{'first is':>10}")
    for run in record["runs"]:
        if run["error"]:
            print(f"{run['name']:30}{run['batch_size']:>5}  {run['error']}")
            continue
        of_plan = run["plan_s"] / run["seconds_per_step"] if "plan_s" in run else None
        first_is = "" if first["error"] else f"{first['tokens_per_s'] / run['tokens_per_s']:.3f} x"
        print(f"{run['name']:30}{run['batch_size']:>5}{run['seconds_per_step']:10.3f}{run['tokens_per_s']:11.0f}"
              f"{percent(run['mfu']):>8}{percent(run['of_matmul_rate']):>9}{run['memory_gib']:8.2f}"
              f"{percent(of_plan):>9}{first_is:>10}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default=os.path.join(ROOT, "train_gpt"))
    parser.add_argument("--bench", help="the program that measures copy speed and matmul rate")
    parser.add_argument("--device", default="cpu", choices=list(SETTINGS))
    parser.add_argument("--model", nargs="+", help="flavours (on a GPU 162M 1B 7B llama3-8B, on a CPU 60M)")
    parser.add_argument("--variant", nargs="+", default=VARIANTS, choices=VARIANTS, help="the twin is of the first")
    parser.add_argument("--torch", nargs="+", choices=["compile", "eager", "none"],
                        help="how the twin runs (compile, on a CPU also eager)")
    parser.add_argument("--torch-attention", choices=["flash", "cudnn", "default"],
                        help="the twin's attention (flash, on a CPU default)")
    parser.add_argument("--torch-weights", choices=["fp32", "bf16"],
                        help="the twin's weights, gradients and moments (what suits the model)")
    parser.add_argument("--batch-size", help="sequences, or auto (what suits the model)")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence (what suits the model)")
    parser.add_argument("--options", help="the trainer's others, in one word (what suits the model)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn, after the warm-up (8)")
    parser.add_argument("--turns", type=int, default=2, help="as many as the minutes allow (2)")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything together (8.5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peak", type=float, help="the device's datasheet TFLOP/s, if this script does not know them")
    parser.add_argument("--results", default=os.path.join(ROOT, "dev", "bench", "results"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(json.loads(args.worker))
    deadline = time.monotonic() + 60 * args.minutes
    cpu = args.device == "cpu"
    args.trainer = os.path.abspath(args.trainer)
    if not output(args.trainer, "--models"):
        fail(f"--trainer: {args.trainer} cannot be run. Build it: make.")
    args.model = args.model or list(SETTINGS[args.device])
    args.torch = [mode for mode in args.torch or (["eager", "compile"] if cpu else ["compile"]) if mode != "none"]
    args.torch_attention = args.torch_attention or ("default" if cpu else "flash")
    args.device_name = device_name(args.device)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    for model in args.model:
        flavour(args.trainer, model)  # names are known before the first run
    args.precision = precision(args.trainer, args.model[0])
    ceilings = measured_ceilings(os.path.abspath(args.bench)) if args.bench else None
    os.makedirs(args.results, exist_ok=True)
    failed = False
    for i, model in enumerate(args.model):
        now = time.monotonic()
        record = measure(args, model, ceilings, now + (deadline - now) / (len(args.model) - i))
        name = f"{record['date'][:10]}-steps-{record['device']}-{model}".lower()
        name += "-bf16" if cpu and args.precision == "bf16" else ""
        path = os.path.join(args.results, re.sub(r"[^a-z0-9.-]", "-", name) + ".json")
        with open(path, "w") as f:
            json.dump(record, f, indent=1)
        print("written", os.path.relpath(path))
        print_table(record)
        failed = failed or any(run["error"] for run in record["runs"] if run["name"].startswith("train_gpt"))
    return failed


if __name__ == "__main__":
    sys.exit(main())
