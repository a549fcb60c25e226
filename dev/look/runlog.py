"""Reads what a run leaves in its folder: log.csv, a row a step, and the state.json of its checkpoints.

Standard library only. All tools of this folder stand on it.
"""
import bisect
import errno
import json
import math
import os
import re
import signal
import stat
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while a tool loads its modules; then run() tells it

COLUMNS = ["step", "loss", "lr", "grad_norm", "tokens_per_s", "val_loss"]  # the numbers of a log; behind them note


class LogError(Exception):
    """One line: which file, what is wrong with it, what to do."""


class NoRows(LogError):
    """There is no log, or none with a row: both may still come."""


def run(name, main):
    """main(), whose result is the exit status; what a user can cause is told in one line, status 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may be of any bytes
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except LogError as e:
        sys.exit(f"{name}: {e}")
    except OSError as e:
        if not e.filename:  # the end of the program is not to try it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"{name}: {e.filename or 'stdout'}: {e.strerror or e}. "
                 "Check the path, its rights and the disk's room.")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted. Run it again.")


def refuse_pipe(path):
    """One would wait for it without end."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is a pipe")


def value_of(text):
    """A field's value, NaN of an empty one. A run's are float32 and what is made of them: others would overflow."""
    value = float(text or "nan")
    if 1e200 < abs(value) < math.inf or 0 < abs(value) < 1e-200:
        raise ValueError
    return value


class Log:
    """The rows of RUN/log.csv by column: log["loss"] is a list with a number a row, steps ascending.

    An empty field is NaN; step is an int; note is text (empty, "spike" or "skipped").
    """

    def __init__(self, run):
        self.path = os.path.join(run, "log.csv")
        self.changed = 0.0  # when, in seconds since 1970
        self.forget()

    def forget(self):
        self.header, self.columns, self.lines = [], {}, 0  # lines read
        self.end, self.last = 0, b""  # bytes read, and the last of them

    def __getitem__(self, column):
        return self.columns[column]

    def __len__(self):
        return len(self.columns.get("step", ()))

    def update(self):
        """Reads what came since the last time; true if there was something. Begins anew if the file was replaced."""
        try:
            refuse_pipe(self.path)
            with open(self.path, "rb") as f:
                self.changed = os.fstat(f.fileno()).st_mtime
                f.seek(self.end - len(self.last))
                data = f.read()
                replaced = not data.startswith(self.last)
                if replaced:
                    self.forget()
                    f.seek(0)
                    data = f.read()
        except FileNotFoundError:
            self.forget()
            raise NoRows(f"{self.path}: is not there. Give the folder of a run (--out of train_gpt).") from None
        except OSError as e:
            raise LogError(f"{self.path}: cannot be read: {e.strerror}. Give the folder of a run.") from None
        data = data[:data.rfind(b"\n") + 1]  # the last row may be half-written: the run goes on
        new = data[len(self.last):]
        self.add(new)
        self.end += len(new)
        self.last = data[-256:]
        if not len(self):
            raise NoRows(f"{self.path}: has no rows yet. Wait for the first step.")
        return replaced or len(new) > 0

    def add(self, data):
        lines = data.splitlines()
        header = self.header
        if not header and lines:
            header = lines.pop(0).decode(errors="replace").split(",")
            missing = [name for name in [*COLUMNS, "note"] if name not in header]
            if missing:
                raise LogError(f"{self.path}: has no column {', '.join(missing)}. Give the log.csv of a run.")
        rows = []
        for number, line in enumerate(lines, self.lines + (1 if self.header else 2)):
            try:
                texts = line.decode().split(",")
                if len(texts) != len(header):
                    raise ValueError
                fields = dict(zip(header, texts))
                note = fields.pop("note")
                step = int(fields.pop("step"))
                if not 0 <= step <= 1 << 50:
                    raise ValueError
                rows.append({**{name: value_of(text) for name, text in fields.items()}, "step": step, "note": note})
            except ValueError:
                raise LogError(f"{self.path}: line {number} is not {len(header)} fields of a step. Delete that line, "
                               "or give another run.") from None
        # all or nothing: what could not be read is met again
        if not self.header and header:
            self.header, self.columns = header, {name: [] for name in header}
            self.lines = 1
        for row in rows:
            if len(self) and row["step"] <= self["step"][-1]:  # made again after a resume
                kept = bisect.bisect_left(self["step"], row["step"])
                for values in self.columns.values():
                    del values[kept:]
            for name, values in self.columns.items():
                values.append(row[name])
        self.lines += len(rows)


def read(run):
    """The log of a run's folder, with at least one row; LogError if it cannot be had."""
    log = Log(run)
    log.update()
    return log


def named(arguments):
    """(name, folder) of each argument, which is a folder or NAME=FOLDER; names are unlike each other."""
    runs = []
    for text in arguments:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or "/" in name or os.path.isdir(text):
            name, folder = "", text
        runs.append((name or os.path.basename(os.path.abspath(folder)), folder, bool(name)))
    names = [name for name, _, _ in runs]
    return [(name if given or names.count(name) == 1 else folder, folder) for name, folder, given in runs]


def of_a_run(state):
    """Whether a state.json has what is read here, each of its kind."""
    if not isinstance(state, dict):
        return False
    loader, words = state.get("loader", {}), (state.get("config", {}), state.get("schedule", {}))
    return (isinstance(state.get("step"), int) and all(isinstance(part, dict) for part in (loader, *words)) and
            all(isinstance(n, int) for n in loader.values()) and
            all(isinstance(w, str) for part in words for w in part.values()))


def states(run):
    """The state.json of a run's checkpoints, the newest last; what cannot be read is left out."""
    found = []
    try:
        folders = sorted(name for name in os.listdir(run) if re.fullmatch(r"step_\d{8,}", name))
    except OSError:
        return found
    for folder in folders:
        try:
            path = os.path.join(run, folder, "state.json")
            refuse_pipe(path)
            with open(path, encoding="utf-8") as f:
                found.append(json.load(f))
        except (OSError, ValueError, RecursionError):
            pass
    return sorted(filter(of_a_run, found), key=lambda s: s["step"])


def config(run):
    """The model's configuration and the schedule in the newest checkpoint, numbers as numbers; {} without one."""
    fields, state = {}, (states(run) or [{}])[-1]
    for key, value in {**state.get("config", {}), **state.get("schedule", {})}.items():
        try:
            fields[key] = float(value) if re.search(r"[.e]", value) else int(value)
        except ValueError:
            fields[key] = value
    return fields


def tokens_per_step(run):
    """From the loader's positions in the two newest checkpoints of one epoch, or the begin and one; None without."""
    points = [(0, 0, 0)]
    for state in states(run):
        loader = state.get("loader", {})
        points.append((state["step"], loader.get("epoch"), loader.get("window")))
    length = config(run).get("seq_len")
    for (s0, e0, w0), (s1, e1, w1) in reversed(list(zip(points, points[1:]))):
        if e0 == e1 is not None and s1 > s0 and w1 > w0 and (w1 - w0) % (s1 - s0) == 0 and isinstance(length, int):
            return (w1 - w0) // (s1 - s0) * length
    return None


def total_steps(log, run):
    """The step at which the run will end, None if that is not known: from its learning rate where that falls linearly
    to 0, as by default, else from the schedule in its newest checkpoint."""
    planned = config(run)
    steps = planned.get("steps")
    if not isinstance(steps, int) or steps < log["step"][-1]:  # an older build's, or prolonged since
        steps = None
    return (None if planned.get("min_lr") else end_of_fall(log)) or steps


def end_of_fall(log):
    """The last step before a learning rate that falls linearly is 0.

    None before three steps of the fall, or if the newest rows are on no such line.
    """
    steps, rates = log["step"][-100:], log["lr"][-100:]
    first = max(range(len(rates)), key=lambda i: rates[i] if rates[i] == rates[i] else -1, default=0)
    middle, last = (first + len(rates)) // 2, len(rates) - 1
    if not first < middle < last:
        return None
    slope = (rates[first] - rates[last]) / (steps[last] - steps[first])
    off = rates[first] - slope * (steps[middle] - steps[first]) - rates[middle]
    if not slope > 0 or abs(off) > 1e-9 * rates[first]:
        return None
    total = steps[last] - 1 + rates[last] / slope
    return round(total) if abs(total - round(total)) < 0.1 else None
