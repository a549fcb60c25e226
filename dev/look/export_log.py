#!/usr/bin/env python3
"""Writes the logs of runs for TensorBoard or Weights & Biases, without a network.

usage: export_log.py RUN... --tensorboard DIR     then: tensorboard --logdir DIR
       export_log.py RUN... --wandb DIR [--project NAME]     then: wandb sync DIR/wandb/offline-run-*

RUN is the folder of a run or NAME=FOLDER. Steps and values are log.csv's (TensorBoard's are float32); a note becomes a
1 under `spike` or `skipped`; the model's configuration comes from the run's newest checkpoint if there is one. A second
export to the same TensorBoard folder replaces the first; wandb gets a new run each time.
"""
import argparse
import math
import os
import sys
import tempfile

import runlog

VALUES = [name for name in runlog.COLUMNS if name != "step"]


def fail(message):
    sys.exit(f"export_log.py: {message}")


def rows(log):
    """(step, {name: value}) of each row; an empty val_loss is left out, a loss that was not finite is not."""
    for i, step in enumerate(log["step"]):
        values = {name: log[name][i] for name in VALUES if name != "val_loss" or not math.isnan(log[name][i])}
        if log["note"][i]:
            values[log["note"][i]] = 1.0
        yield step, values


def times(log, folder):
    """Seconds since 1970 of each row: back from the last change of the log, where a step's tokens are known."""
    end, tokens = log.changed, runlog.tokens_per_step(folder)
    seconds = [tokens / speed if tokens and speed > 0 else 0.0 for speed in log["tokens_per_s"]]
    left = math.fsum(seconds)
    for spent in seconds:
        left -= spent
        yield end - left


def to_tensorboard(name, folder, log, out):
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as e:
        fail(f"{e}. Install it: {sys.executable} -m pip install tensorboard")
    place = os.path.join(out, name)
    os.makedirs(place, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".") as part:
        writer = EventFileWriter(part)
        config = runlog.config(folder)
        if config:
            writer.add_event(Event(summary=hparams_pb(config), wall_time=log.changed))
        for time, (step, values) in zip(times(log, folder), rows(log)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            writer.add_event(Event(step=step, wall_time=time, summary=summary))
        writer.close()
        (file,) = os.listdir(part)
        os.replace(os.path.join(part, file), os.path.join(place, "events.out.tfevents.log"))
    return place


def to_wandb(name, folder, log, out, project):
    try:
        import wandb
    except ImportError as e:
        fail(f"{e}. Install it: {sys.executable} -m pip install wandb")
    os.makedirs(out, exist_ok=True)
    run = wandb.init(mode="offline", dir=out, project=project, name=name, config=runlog.config(folder),
                     settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"))
    for step, values in rows(log):
        run.log(values, step=step)
    place = os.path.dirname(run.dir)
    run.finish()
    return place


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run (it holds log.csv), or NAME=FOLDER")
    parser.add_argument("--tensorboard", metavar="DIR", help="write event files to DIR/NAME")
    parser.add_argument("--wandb", metavar="DIR", help="write offline runs to DIR/wandb")
    parser.add_argument("--project", metavar="NAME", default="simplegpt", help="wandb's project (simplegpt)")
    parser.error = lambda message: fail(f"{message}. See export_log.py --help.")
    options = parser.parse_args()
    if not options.tensorboard and not options.wandb:
        parser.error("neither --tensorboard nor --wandb is given")
    runs = [(name, folder, runlog.read(folder)) for name, folder in runlog.named(options.runs)]
    places = [name.strip("./") for name, _, _ in runs]  # below DIR
    for place in places:
        if not place or places.count(place) > 1 or ".." in place.split("/"):
            fail(f"{place or '.'}: is no name of one run's folder. Name the runs: A=FOLDER B=FOLDER.")
    written = []
    try:
        for place, (name, folder, log) in zip(places, runs):
            if options.tensorboard:
                written.append(to_tensorboard(place, folder, log, options.tensorboard))
            if options.wandb:
                written.append(to_wandb(name, folder, log, options.wandb, options.project))
    except UnicodeError:
        fail(f"{folder}: its name is no UTF-8. Name the run: A=FOLDER.")
    except OSError as e:
        where = e.filename or options.tensorboard or options.wandb
        fail(f"{where}: cannot be written: {e.strerror}. Choose another folder.")
    print("\n".join(written))


if __name__ == "__main__":
    runlog.run("export_log.py", main)
