"""What the programs of this folder share: refusals of one line, files that appear whole or not at all, checksums."""
import argparse
import errno
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while a program loads its modules; then run() tells it
BLOCK = 1 << 20  # bytes read at a time
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of a file system that has nothing to sync in a folder
warned = set()


class Refused(Exception):
    """`where: what. What to do.`"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        sys.exit(f"{self.prog}: {message}. --help lists the options.")


def warn(line):
    """once"""
    if line not in warned:
        warned.add(line)
        print(f"{Path(sys.argv[0]).stem}: warning: {line}", file=sys.stderr)


def run(name, main):
    """main(), with whatever a user can cause told in one line, exit code 1"""
    def interrupt(*_):
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        status = main()
        if sys.stdout:  # not closed
            sys.stdout.flush()
        return status
    except Refused as e:
        sys.exit(f"{name}: {e}")
    except OSError as e:
        if sys.stdout and not e.filename:  # the end of the program is not to try it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"{name}: {e.filename or 'the output'}: {e.strerror or e}. "
                 "Check the path, its rights and the disk's room.")
    except MemoryError:
        sys.exit(f"{name}: there is too little memory for the largest of what is read. Give it in smaller parts.")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted. Run it again.")


def in_range(name, value, low, high):
    if value is not None and not low <= value <= high:
        raise Refused(f"{name}: {value} is out of range. Give a number from {low} to {high}.")


def package(name, wanted_by, least=None):
    """the module, for those who use it only; least: the oldest version that does what is asked of it"""
    try:
        module = __import__(name, fromlist=["_"])
    except ImportError:
        name = name.split(".")[0]
        raise Refused(f"{wanted_by}: the package {name} is missing. pip install {name}") from None
    there, needed = ([int(n) for n in re.findall(r"\d+", version)[:3]]
                     for version in (getattr(module, "__version__", ""), least or ""))
    if there and there < needed:
        raise Refused(f"{wanted_by}: the package {name} is {module.__version__}, {least} or newer is needed. "
                      f"pip install -U {name}")
    return module


def read_whole(path, advice):
    try:
        if Path(path).is_fifo():
            raise Refused(f"{path}: is a pipe. {advice}")
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise Refused(f"{path}: {e.strerror}. {advice}") from None


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(f):
    f.flush()
    try:
        os.fsync(f.fileno())
    except OSError as e:
        e.filename = f.name
        raise


def sync_directory(path):
    """makes renames in it last through a loss of power, where the file system can"""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        e.filename = path
        if e.errno not in UNSYNCED:
            raise
        warn(f"{path}: its file system cannot sync a folder ({e.strerror}). A loss of power just now could undo the "
             "renaming of the files.")
    finally:
        os.close(fd)


def write_whole(path, parts):
    """path appears with all of the parts (bytes) or stays as it was"""
    if path.exists() and not path.is_file():  # /dev/null would be replaced for everybody
        raise Refused(f"{path}: is a folder, a pipe or a device. Give a file.")
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            for part in parts:
                f.write(part)
            sync(f)
        os.replace(beside, path)
        sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)
