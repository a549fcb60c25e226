"""Files that torch.save writes, read without torch: a zip with a pickle of everything but the tensors' values.

A pickle can call anything. Here it gets dictionaries, lists, numbers, text and tensors; what else it names (an
optimizer's class, a config's) becomes an object that does nothing.
"""
import collections
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
from common import Refused

DTYPES = {"Float": ("F32", np.float32), "BFloat16": ("BF16", np.uint16), "Half": ("F16", np.float16)}  # bf16 as bits
MAGICS = b"PK\x03\x04", b"\x80\x02\x8a\x0a"  # of today's, and from before 1.6
AGAIN = "Fetch it again, or save it again with torch.save."


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        if not isinstance(storage, Storage):
            raise ValueError
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)
        self.dtype, self.raw = DTYPES.get(storage.kind, (storage.kind, None))


class Storage(collections.namedtuple("Storage", "kind key")):
    pass


class Inert:
    def __init__(self, *_, **__):
        pass

    def ignore(self, *_, **__):
        pass

    __setstate__ = __setitem__ = append = extend = add = update = ignore

    def __new__(cls, *_, **__):
        return super().__new__(cls)


class Unpickler(pickle.Unpickler):
    KNOWN = {("collections", "OrderedDict"): collections.OrderedDict,
             ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: Tensor(
                 storage, offset, shape, strides),
             ("torch._utils", "_rebuild_parameter"): lambda data, *_: data}

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return name[:-len("Storage")]
        return self.KNOWN.get((module, name), Inert)

    def persistent_load(self, pid):
        word, kind, key, *_ = pid
        return Storage(kind if isinstance(kind, str) else "untyped", key) if word == "storage" else None


def load(path):
    """what was saved, its tensors as Tensor; and what reads one of these: its raw values"""
    if Path(path).is_fifo():
        raise Refused(f"{path}: is a pipe. Give a file.")
    try:
        archive = zipfile.ZipFile(path)
        (root,) = (name[:-len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl"))
        if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
            raise Refused(f"{path}: was written on a big-endian machine. Save it again on another.")
        with archive.open(root + "data.pkl") as f:
            tree = Unpickler(f).load()
    except OSError:
        raise
    except Refused:
        raise
    except Exception:  # a broken pickle raises anything
        with open(path, "rb") as f:
            old = f.read(4) == MAGICS[1]
        raise Refused(f"{path}: is in torch's format from before 1.6. Save it again with torch.save." if old else
                      f"{path}: is no whole file of torch.save. {AGAIN}") from None

    def read(tensor):
        try:
            shape, strides = tensor.shape, tensor.strides
            data = np.frombuffer(archive.read(f"{root}data/{tensor.storage.key}"), tensor.raw)
            last = tensor.offset + sum((size - 1) * step for size, step in zip(shape, strides))
            if len(shape) != len(strides) or min((tensor.offset, *shape, *strides)) < 0 or \
                    math.prod(shape) and last >= data.size:
                raise ValueError
            return np.lib.stride_tricks.as_strided(data[tensor.offset:], shape, [s * data.itemsize for s in strides])
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError):
            raise Refused(f"{path}: the values of a tensor are not whole. {AGAIN}") from None
    return tree, read


def tensors(tree):
    """name: Tensor, of a state_dict, which may lie under "model" or "state_dict"; None if there is none"""
    for _ in range(8):  # one may hold itself
        if isinstance(tree, dict) and isinstance(tree.get("model", tree.get("state_dict")), dict):
            tree = tree.get("model", tree.get("state_dict"))
    if not isinstance(tree, dict):
        return None
    return {name: t for name, t in tree.items() if isinstance(t, Tensor) and isinstance(name, str)}
