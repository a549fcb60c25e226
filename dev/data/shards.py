"""Token shards in llm.c's format, their manifest, and the state from which an interrupted run goes on.

All that a run writes has names that end in .tmp until everything is whole; then the shards get their names, and last
the manifest. After each whole shard the state file says how far the input was used and how long each file was then; a
later run cuts the files to that length. So what was written after the state was is simply written again.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import re

import numpy as np

from common import Refused, sha256_of, sync, sync_directory, write_whole

CHUNK = 1 << 22  # tokens handled at a time
SPLITS = ("train", "val")
HEADER = 1024  # bytes


def kind(V):
    """magic, version, type of a shard's tokens"""
    return (20240520, 1, "<u2") if V <= 65536 else (20240801, 7, "<u4")


def dump(value):
    return (json.dumps(value, indent=2) + "\n").encode()


class Split:
    """one stream of tokens, cut into files of shard_tokens"""

    def __init__(self, stem, V, shard_tokens):
        self.stem, self.shard_tokens = stem, shard_tokens
        self.magic, self.version, self.dtype = kind(V)
        self.width = np.dtype(self.dtype).itemsize
        self.documents = self.bytes = self.tokens = 0
        self.shards = []   # {"name", "tokens", "bytes", "sha256"} of the whole ones
        self.file, self.filled = None, 0  # the one being written

    def path(self, name):
        return self.stem.parent / name

    def temporary(self, name):
        return self.path(name + ".tmp")

    def open_name(self):
        return f"{self.stem.name}_{len(self.shards):06d}.bin"

    def add(self, ids, documents, size):
        """some documents' ids and the bytes of their texts"""
        self.documents, self.bytes, self.tokens = self.documents + documents, self.bytes + size, self.tokens + len(ids)
        while len(ids):
            if not self.file:
                self.file = open(self.temporary(self.open_name()), "wb")
                self.file.write(bytes(HEADER))
            part = ids[:min(self.shard_tokens - self.filled, CHUNK)]
            self.file.write(part.astype(self.dtype).tobytes())
            self.filled += len(part)
            ids = ids[len(part):]
            if self.filled == self.shard_tokens:
                self.close()

    def close(self):
        """the shard that is being written, now whole"""
        if not self.file:
            return
        header = np.zeros(256, "<i4")
        header[:3] = self.magic, self.version, self.filled
        self.file.seek(0)
        self.file.write(header.tobytes())
        sync(self.file)
        self.file.close()
        name = self.open_name()
        self.shards.append({"name": name, "tokens": self.filled, "bytes": HEADER + self.filled * self.width,
                            "sha256": sha256_of(self.temporary(name))})
        self.file, self.filled = None, 0

    def counts(self):
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens, "shards": self.shards}

    def state(self):
        if self.file:
            sync(self.file)
        return {**self.counts(), "open": self.filled}

    def resume(self, state):
        """takes up the files of an interrupted run"""
        self.documents, self.bytes, self.tokens, self.shards, self.filled = (
            state[key] for key in ("documents", "bytes", "tokens", "shards", "open"))
        for shard in self.shards:
            # the shards may have their names already, if the run ended just before its manifest
            if all(not p.exists() or p.stat().st_size != shard["bytes"]
                   for p in (self.temporary(shard["name"]), self.path(shard["name"]))):
                self.lost(shard["name"])
        if self.filled:
            path, length = self.temporary(self.open_name()), HEADER + self.filled * self.width
            if not path.exists() or path.stat().st_size < length:
                self.lost(self.open_name())
            self.file = open(path, "r+b")
            self.file.truncate(length)
            self.file.seek(length)

    def lost(self, name):
        raise Refused(f"{self.temporary(name)}: the interrupted run's file is gone or too short. Begin anew: "
                      "--restart.")

    def publish(self):
        for shard in self.shards:
            if self.temporary(shard["name"]).exists():
                os.replace(self.temporary(shard["name"]), self.path(shard["name"]))
        new = {s["name"] for s in self.shards}
        for path in numbered(self.stem, ".bin"):
            if path.name not in new:
                path.unlink()

    def stream(self):
        """arrays of the split's ids, in order, after close()"""
        for shard in self.shards:
            path = self.temporary(shard["name"])
            with open(path if path.exists() else self.path(shard["name"]), "rb") as f:
                f.seek(HEADER)
                while len(ids := np.frombuffer(f.read(CHUNK * self.width), self.dtype)):
                    yield ids


def numbered(stem, suffix):
    return sorted(p for p in stem.parent.iterdir()
                  if re.fullmatch(re.escape(stem.name) + r"_\d{6}" + re.escape(suffix), p.name))


class Output:
    """The shards of both splits in one directory. identity: all that decides the tokens, to compare with a state's."""

    def __init__(self, out, prefix, V, shard_tokens, identity, restart):
        self.out, self.prefix, self.identity = out, prefix, identity
        self.splits = {name: Split(out / f"{prefix}_{name}", V, shard_tokens) for name in SPLITS}
        self.state_path, self.manifest_path = out / f"{prefix}_state.json", out / f"{prefix}_manifest.json"
        self.position = None  # of the input, as the last state has it
        self.lock()
        if restart:
            self.discard()
        elif self.state_path.exists():
            self.resume()
        else:
            self.discard()  # a run's that was killed before its first state

    def lock(self):
        """one run at a time; the lock ends with the process, however it ends"""
        self.locked = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{self.out}: another prepare.py is writing there. Wait, or give another --out.") from None
        except OSError:
            pass  # a file system without locks

    def resume(self):
        try:
            state = json.loads(self.state_path.read_bytes())
            before, position, splits = state["identity"], state["position"], state["splits"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(f"{self.state_path}: the state is damaged. Begin anew: --restart.") from None
        for key, value in self.identity.items():
            if before.get(key) != value:
                raise Refused(f"{self.state_path}: an interrupted run with {key} {before.get(key)}, now {value}. Give "
                              "the same options to finish it, another --prefix, or --restart to begin anew.")
        for name, split in self.splits.items():
            split.resume(splits[name])
        self.position = position

    def save(self, position):
        """position: what the reader needs to go on behind all that was added"""
        state = {"identity": self.identity, "position": position,
                 "splits": {name: split.state() for name, split in self.splits.items()}}
        write_whole(self.state_path, [dump(state)])
        self.position = position

    def publish(self, manifest, converted=None):
        """the shards get their names, then the tokenizer's file, unless it is None, and the manifest appear"""
        for split in self.splits.values():
            split.publish()
        path = self.out / f"{self.prefix}_tokenizer.bin"
        if converted is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, [converted])
            manifest["tokenizer_file"] = {"name": path.name, "sha256": hashlib.sha256(converted).hexdigest()}
        sync_directory(self.out)
        write_whole(self.manifest_path, [dump(manifest)])
        self.state_path.unlink(missing_ok=True)

    def discard(self):
        """all of an unfinished run"""
        for split in self.splits.values():
            if split.file:
                with contextlib.suppress(OSError):  # what it still holds may not fit
                    split.file.close()
        self.state_path.unlink(missing_ok=True)
        for name in SPLITS:
            for path in numbered(self.out / f"{self.prefix}_{name}", ".bin.tmp"):
                path.unlink()


def pairs(stream, V):
    """how often id b follows id a, (V,V)"""
    n, last = np.zeros(V * V, np.int64), None
    for ids in stream:
        ids = ids.astype(np.int64)
        ids = ids if last is None else np.concatenate(([last], ids))
        n += np.bincount(ids[:-1] * V + ids[1:], minlength=V * V)
        last = ids[-1]
    return n.reshape(V, V)


def bigram_loss(train, val, V):
    """Mean cross-entropy over val's pairs of tokens, nats a token: p(b|a) = (n(a,b) + 1) / (n(a) + V), n from train."""
    n, seen = pairs(train.stream(), V), pairs(val.stream(), V)
    p = (n + 1) / (n.sum(axis=1, keepdims=True) + V)
    return float(-(seen * np.log(p)).sum() / seen.sum())


def verify(path):
    """what is wrong with the shards of a manifest, a line each; and how many shards it has"""
    try:
        manifest = json.loads(path.read_bytes() if path.is_file() else b"")
        splits = [(name, manifest[name]["tokens"], manifest[name]["shards"]) for name in SPLITS]
        magic, version, dtype = kind(manifest["vocab_size"])
        file = manifest.get("tokenizer_file")
        file = file and (path.with_name(file["name"]), file["sha256"])
        entries = [(path.with_name(s["name"]), int(s["tokens"]), s["sha256"])
                   for _, _, shards in splits for s in shards]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return [f"{path}: not a manifest of prepare.py. Prepare the data again."], 0
    wrong = []
    for shard, tokens, sha256 in entries:
        size = HEADER + tokens * np.dtype(dtype).itemsize
        if not shard.is_file():
            wrong.append(f"{shard}: is missing. Prepare the data again.")
        elif shard.stat().st_size != size:
            wrong.append(f"{shard}: has {shard.stat().st_size} bytes, not {size}. Prepare the data again.")
        elif sha256_of(shard) != sha256:
            wrong.append(f"{shard}: its sha256 is not the manifest's. Prepare the data again.")
        else:
            with open(shard, "rb") as f:
                header = np.frombuffer(f.read(12), "<i4").tolist()
            if header != [magic, version, tokens]:
                wrong.append(f"{shard}: its header is not the manifest's. Prepare the data again.")
    if file and (not file[0].is_file() or sha256_of(file[0]) != file[1]):
        wrong.append(f"{file[0]}: is missing, or not as it was written. Prepare the data again.")
    prefix = path.name[:-len("_manifest.json")]
    for split, tokens, shards in splits:
        if sum(s["tokens"] for s in shards) != tokens:
            wrong.append(f"{path}: {split} tokens do not add up. Prepare the data again.")
        for stray in numbered(path.with_name(f"{prefix}_{split}"), ".bin"):
            if stray.name not in {s["name"] for s in shards}:
                wrong.append(f"{stray}: is not in the manifest, but a loader would read it. Remove it.")
    return wrong, len(entries)
