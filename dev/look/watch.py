#!/usr/bin/env python3
"""Shows in the terminal how runs go on: step, loss and its curve, validation, learning rate, gradient norm, tokens/s,
time left, spikes and skipped steps. Standard library only; Ctrl-C ends it.

usage: watch.py RUN... [--every SECONDS] [--steps N] [--once]

RUN is the folder of a run or NAME=FOLDER; it may come into being later. The number of steps is found from the learning
rate as soon as that falls linearly to 0, else from the first checkpoint, or given with --steps. --once prints one
picture and ends, as it is where no terminal is.
"""
import argparse
import math
import os
import shutil
import signal
import sys
import time

import runlog

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor; and back
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
BARS = "▁▂▃▄▅▆▇█"
SILENT = 60  # seconds without a row that are told


def fail(message):
    sys.exit(f"watch.py: {message}")


def duration(seconds):
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // small:.0f} {small_unit}"
    return f"{seconds:.0f} s"


def short(number):
    """15321 as 15.3k"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def curve(values, width, bars=BARS):
    """The means of width equal parts as bars, from the least to the most of the later 95%: the first fall is cut off.

    A part without a finite value is a blank.
    """
    n = len(values)
    width = min(width, n)
    parts = [[v for v in values[i * n // width:(i + 1) * n // width] if math.isfinite(v)] for i in range(width)]
    means = [math.fsum(part) / len(part) if part else None for part in parts]
    later = [mean for mean in means[width // 20:] if mean is not None]
    if not later:
        return " " * width
    low, high = min(later), max(later)
    scale = (len(bars) - 1) / (high - low or 1)
    return "".join(" " if m is None else bars[round((min(max(m, low), high) - low) * scale)] for m in means)


class Run:
    """A run's log, and what is to be seen of it."""

    def __init__(self, name, folder, steps):
        self.name = "".join(c if c.isprintable() else "?" for c in name)
        self.folder, self.log, self.steps, self.trouble = folder, runlog.Log(folder), steps, ""
        self.seen = []  # (time, step) at updates with new rows

    def update(self):
        try:
            before = self.log["step"][-1] if len(self.log) else 0
            if self.log.update():
                step = self.log["step"][-1]
                if step <= before:  # begun anew
                    self.seen = []
                self.seen = [*self.seen, (time.time(), step)][-200:]
            self.trouble = ""
        except runlog.NoRows as e:
            self.trouble, self.seen = f"waiting: {str(e).split('. ')[0]}", []
        except runlog.LogError as e:
            self.trouble = str(e)

    def total(self):
        return self.steps or runlog.total_steps(self.log, self.folder)

    def left(self):
        """Seconds to the last step, at the pace seen here or else at the logged one; None if not known."""
        total, step = self.total(), self.log["step"][-1]
        if not total:
            return None
        if len(self.seen) > 2:  # the first may have come late
            (t0, s0), (t1, s1) = self.seen[1], self.seen[-1]
            if t1 - t0 >= 10:
                return (total - step) * (t1 - t0) / (s1 - s0)
        tokens = runlog.tokens_per_step(self.folder)
        speeds = [v for v in self.log["tokens_per_s"][-50:] if v > 0]
        if not tokens or not speeds:
            return None
        return (total - step) * tokens * math.fsum(1 / v for v in speeds) / len(speeds)

    def facts(self):
        """name -> text"""
        log, total, step = self.log, self.total(), self.log["step"][-1]
        facts = {"step": f"{step}/{total} {100 * step // total}%" if total else str(step)}
        facts["loss"] = f"{log['loss'][-1]:.4f}"
        validated = [i for i in range(len(log) - 1, -1, -1) if not math.isnan(log["val_loss"][i])][:1]
        facts["val"] = f"{log['val_loss'][validated[0]]:.4f}" if validated else "-"
        facts["lr"], facts["norm"] = f"{log['lr'][-1]:.3g}", f"{log['grad_norm'][-1]:.3g}"
        facts["tokens/s"] = short(log["tokens_per_s"][-1])
        left, age = self.left(), time.time() - log.changed
        facts["left"] = "done" if total and step >= total else duration(left) if left is not None else "-"
        notes = []  # as (text, more of it where there is room)
        for note, name in (("spike", "spikes"), ("skipped", "skipped")):
            steps = [s for s, n in zip(log["step"], log["note"]) if n == note]
            if steps:
                notes.append((f"{len(steps)} {name if len(steps) > 1 else note}", f" (last {steps[-1]})"))
        if age > SILENT and facts["left"] != "done":
            notes.append((f"silent for {duration(age)}", ""))
        facts["notes"] = ", ".join(text for text, _ in notes)
        facts["long notes"] = ", ".join(text + more for text, more in notes)
        return facts


def block(run, width, bars):
    """Lines of a run that has room: its name first."""
    if run.trouble:
        return [run.name, "  " + run.trouble, ""]
    f = run.facts()
    head = f"  loss {f['loss']}  "
    return [f"{run.name}   step {f['step']}   left {f['left']}".replace("left done", "done").replace("   left -", ""),
            head + curve(run.log["loss"], max(8, width - len(head)), bars),
            f"  val {f['val']}   lr {f['lr']}   norm {f['norm']}   {f['tokens/s']} tokens/s",
            *(["  " + f["long notes"]] if f["notes"] else []), ""]


def table(runs, width, bars):
    """A line a run. What finds no room is left out, the last of `worth` first."""
    worth = ["run", "step", "loss", "notes", "val", "left", "curve", "tokens/s", "norm", "lr"]
    order = ["run", "step", "loss", "curve", "val", "lr", "norm", "tokens/s", "left", "notes"]
    facts = [{"run": run.name} if run.trouble else
             {**run.facts(), "run": run.name, "curve": curve(run.log["loss"], 16, bars)} for run in runs]
    wide = {name: max(len(f.get(name, "")) for f in facts) for name in worth}
    wide = {name: max(most, len(name)) for name, most in wide.items() if most}
    while len(wide) > 3 and sum(wide.values()) + 2 * (len(wide) - 1) > width:
        del wide[next(name for name in reversed(worth) if name in wide)]
    shown = [name for name in order if name in wide]
    lines = ["  ".join(name.ljust(wide[name]) for name in shown)]
    for run, f in zip(runs, facts):
        text = run.trouble or "  ".join(f[name].ljust(wide[name]) for name in shown[1:])
        lines.append(f"{run.name.ljust(wide['run'])}  {text}")
    return lines


def frame(runs, width, height, bars=BARS):
    """The lines to show: some for each run if there is room, else one."""
    for run in runs:
        run.update()
    lines = [line for run in runs for line in block(run, width, bars)][:-1]
    if len(lines) > height:
        lines = table(runs, width, bars)
    if len(lines) > height:
        left_out = len(lines) - height + 1
        lines = [*lines[:height - 1], f"and {left_out} more; a taller terminal shows them"]
    return [line[:width].rstrip() for line in lines]


def live(runs, every, bars):
    """Draws until it is told to end, and leaves the terminal as it was, with the last picture in it."""
    def end(number, _):
        sys.exit(128 + number)

    def pause(*_):  # Ctrl-Z
        os.write(sys.stdout.fileno(), LEAVE.encode())
        os.kill(os.getpid(), signal.SIGSTOP)
        os.write(sys.stdout.fileno(), ENTER.encode())

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    signal.signal(signal.SIGTSTP, pause)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})  # it is waited for: a new size is drawn at once
    lines = []
    try:
        sys.stdout.write(ENTER)
        while True:
            size = os.get_terminal_size(sys.stdout.fileno())
            width, height = size.columns or 80, size.lines or 24  # some terminals do not tell
            lines = frame(runs, width, height - 1, bars)
            picture = [*lines, f"{time.strftime('%H:%M:%S')}, Ctrl-C ends"[:width]]
            sys.stdout.write(HOME + (CLEAR_LINE + "\n").join(picture) + CLEAR_LINE + CLEAR_BELOW)
            sys.stdout.flush()
            signal.sigtimedwait({signal.SIGWINCH}, every)
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(LEAVE + "".join(line + "\n" for line in lines))
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run (it holds log.csv), or NAME=FOLDER")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=2.0, help="time between two pictures (2)")
    parser.add_argument("--steps", metavar="N", type=int, help="the run's last step (found as said above)")
    parser.add_argument("--once", action="store_true", help="print one picture and end")
    parser.error = lambda message: fail(f"{message}. See watch.py --help.")
    options = parser.parse_args()
    if not 0.1 <= options.every <= 86400:
        fail(f"--every: {options.every} is not between 0.1 and 86400 seconds. Give a time as 2.")
    if options.steps is not None and options.steps < 1:
        fail(f"--steps: {options.steps} is no number of steps. Give that of the whole run.")
    runs = [Run(name, folder, options.steps) for name, folder in runlog.named(options.runs)]
    bars = BARS if "utf" in (sys.stdout.encoding or "").lower() else "_.,-~=+*"
    sys.stdout.reconfigure(errors="replace")
    if options.once or not sys.stdout.isatty():
        size = shutil.get_terminal_size((100, 24))
        for line in frame(runs, size.columns, sys.maxsize if not sys.stdout.isatty() else size.lines - 1, bars):
            print(line)
    else:
        live(runs, options.every, bars)


if __name__ == "__main__":
    runlog.run("watch.py", main)
