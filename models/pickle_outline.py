"""What a pickle holds, found without building any of it.

PyTorch's safe loader calls only functions from a list, but with any arguments: `bytearray(10**10)` takes 10 GB, and a
tuple that holds the same tuple twice, 60 levels deep, is never hashed to the end if it is the key of a dict. So each
file is examined first. Everything that is not in `ALLOWED` is refused, with its name and its place in the file.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import pickle
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import IO, Any, ClassVar

import numpy as np

ALLOWED = "tensors, numbers, text, lists, dicts, Namespaces, paths, and NumPy numbers and dtypes"
MOST_BYTES = 2**24  # of a pickle; a checkpoint of SiT-XL/2 with its optimizer has less than 2**19
LONGEST_KEY = 16  # numbers and texts in a tuple, or in tuples in it, that is the key of a dict
TORCH_MODULES = {"torch", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter"}
REBUILD = "torch._utils."  # the module of the functions that build tensors
ORDINARY_TENSORS = {
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state"
}  # fmt: skip
SPECIAL_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values (device meta)",
}
ARRAY_BUILDERS = {"_reconstruct", "_frombuffer"}  # functions that files name in place of numpy.ndarray
ENCODE, BYTEARRAY = "_codecs.encode", "builtins.bytearray"  # how protocol 2 has bytes and a bytearray
HASHING = ("collections.OrderedDict", "collections.Counter", "builtins.set")
PLAIN = {*HASHING, ENCODE, BYTEARRAY, "builtins.complex"}
SCALARS = (str, bytes, int, float, type(None))


class _Number:
    """In place of a NumPy scalar: the Python number."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        if not isinstance(dtype, _Dtype) or not re.fullmatch(r"[<>=|]?[biufc]\d{1,2}", dtype):
            raise ValueError("a NumPy scalar of another dtype")
        return np.frombuffer(data, np.dtype(str(dtype)).newbyteorder(dtype.byte_order), count=1)[0].item()


class _Dtype(str):
    """In place of a NumPy dtype: its name, such as "f4"."""

    byte_order = "="

    def __new__(cls, name: str, *_: Any) -> _Dtype:
        if not isinstance(name, str):
            raise TypeError("the name of a dtype must be text")
        return super().__new__(cls, name)

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = {"<": "<", ">": ">"}.get(state[1], "=")


def _path(kind: type) -> type:
    """Return a class in place of a path: its text."""
    return type("Path", (), {"__new__": lambda cls, *parts: str(kind(*parts))})


def _stand_ins() -> dict[str, type]:
    """Return the classes that are built in place of those in a file, by the names that files have."""
    stand_ins = {
        "types.SimpleNamespace": argparse.Namespace,
        "numpy.dtype": _Dtype,
        "numpy.core.multiarray.scalar": _Number,
        "numpy._core.multiarray.scalar": _Number,
    }
    for module, kind in itertools.product(("pathlib", "pathlib._local"), (PurePosixPath, PureWindowsPath)):
        name = f"{module}.{kind.__name__}"  # _local: Python 3.13
        stand_ins |= {name: _path(kind), name.replace("Pure", ""): _path(kind)}
    named = {"argparse.Namespace": argparse.Namespace}
    for full_name, base in stand_ins.items():
        module, _, name = full_name.rpartition(".")
        named[full_name] = type(name, (base,), {"__module__": module, "__qualname__": name})
    return named


STAND_INS = _stand_ins()


def not_allowed(file: IO[bytes]) -> list[tuple[str, str]]:
    """Return place and class name of each object in pickled data that is not in `ALLOWED`. Nothing is executed.

    Raises an error of any type if the data is damaged or larger than `MOST_BYTES`.
    """
    data = io.BytesIO(file.read(MOST_BYTES))
    contents = [_Outline(data).load()]
    if isinstance(contents[0], int):  # the format before 2020: a number, a version, facts of the machine, the content,
        contents = [_Outline(data).load() for _ in range(4)]  # and the names of the tensors' memory
    found, waiting, seen = set(), [("", content) for content in contents], set()
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        is_class = isinstance(value, type) and issubclass(value, _Placeholder)
        if (is_class or isinstance(value, _Placeholder)) and not value.is_allowed:
            found.add((place, value.full_name))
        elif isinstance(value, _Placeholder):
            value = value.state
        if isinstance(value, dict):
            waiting += [(f"{place}.{str(key)[:80]}".lstrip(".")[-200:], item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{index}]"[-200:], item) for index, item in enumerate(value)]
    return sorted(found)


class _Placeholder:
    """Stands for an object of any class while a file is examined. It ignores what is done with it."""

    full_name, is_allowed = "", True
    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        pass

    extend = add = append


class _Map(dict):
    """In place of an OrderedDict, which files may call with pairs of keys and values."""

    full_name, is_allowed = HASHING[0], True


@functools.lru_cache(maxsize=1024)  # a class takes 1 KB; files name the same few classes again and again
def _placeholder(full_name: str, is_allowed: bool) -> type:
    return type("Placeholder", (_Placeholder,), {"full_name": full_name, "is_allowed": is_allowed})


class _Outline(pickle._Unpickler):  # in Python: the C version allocates the sizes that a damaged file states
    """Reads the structure of pickled data, with a `_Placeholder` for every class and function."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    for opcode in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET):  # protocol 2 does not use these
        del dispatch[opcode[0]]

    def find_class(self, module: str, name: str) -> type:
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name == HASHING[0]:
            return _Map
        allowed = module in TORCH_MODULES or full_name in PLAIN or full_name in STAND_INS
        if full_name.startswith(REBUILD):
            allowed, full_name = name in ORDINARY_TENSORS, SPECIAL_TENSORS.get(name, full_name)
        if full_name.startswith("numpy.") and name in ARRAY_BUILDERS:
            full_name = "numpy.ndarray"
        return _placeholder(full_name[:200], allowed)

    def persistent_load(self, pid: Any) -> Any:  # the memory of a tensor; before 2020, also the class of a module
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else _Placeholder()

    def load_reduce(self) -> None:
        """Call a function, after looking at its arguments; files that torch.save writes pass."""
        args, function = self.stack[-1], getattr(self.stack[-2], "full_name", None)
        is_odd_text = function == ENCODE and args[1:] not in (("latin1",), ("latin-1",))
        is_odd_array = function == BYTEARRAY and args and getattr(args[0], "full_name", None) != ENCODE
        if is_odd_text or is_odd_array:
            raise pickle.UnpicklingError("a call that torch.save does not write")
        if function in HASHING and args:
            for item in args[0]:
                is_pair = function == HASHING[0] and isinstance(item, list | tuple) and len(item) == 2
                _check_key(item[0] if is_pair else item)
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems


def _check_key(key: Any) -> None:
    """Raise an error if a key would take long to hash."""
    parts = [key]
    for part in parts:  # the list grows
        if isinstance(part, tuple) and len(part) + len(parts) <= 2 * LONGEST_KEY:
            parts += part
        elif not isinstance(part, (*SCALARS, _Placeholder, type)):
            raise pickle.UnpicklingError("a key of another type")
