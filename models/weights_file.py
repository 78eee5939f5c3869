"""Reading files of weights that PyTorch wrote, and saying what is wrong with one.

Reading never executes code from a file: `torch.load` builds tensors and plain Python values, and the few classes of
`ALLOWED` are replaced by stand-ins that hold data only. PyTorch's own messages advise to load without this protection,
so they are not passed on. The message names what a file holds in addition, and where.
"""

from __future__ import annotations

import argparse
import io
import itertools
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import torch

from common.io import InputError

ALLOWED = "tensors, numbers, text, lists, dicts, Namespaces, paths, and NumPy numbers and dtypes"
NAMES_SHOWN = 4  # of parameters, in one list
OTHER_PROTOCOLS = (3, 4, 5)  # of pickle; PyTorch reads only protocol 2 without executing code
TORCH_MODULES = {"torch", "torch._utils", "torch._tensor", "torch.storage", "torch.serialization", "torch.nn.parameter"}
ARRAY_BUILDERS = {"_reconstruct", "_frombuffer"}  # functions that files name in place of numpy.ndarray
PLAIN = {"collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.bytearray"}


class _Number:
    """In place of a NumPy scalar: the Python number."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        if dtype.lstrip("<>=|")[:1] not in tuple("biufc"):
            raise ValueError(f"a NumPy scalar of dtype {dtype}")
        return np.frombuffer(data, np.dtype(str(dtype)).newbyteorder(dtype.byte_order), count=1)[0].item()


class _Dtype(str):
    """In place of a NumPy dtype: its name, such as "f4"."""

    byte_order = "="

    def __new__(cls, name: str, *_: Any) -> _Dtype:
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


def read_weights_file(path: str | Path) -> Any:
    """Return the content of a file of `torch.save`, with tensors on the CPU. Tensors in a zip are read when used.

    NumPy scalars become Python numbers; paths and NumPy dtypes become text.
    Raises InputError if the file cannot be read, is damaged or of another kind, or holds more than `ALLOWED`.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(list(STAND_INS.values())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol, which the error below names
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise InputError(f"{path}: {_problem(path)}") from error


def _problem(path: Path) -> str:
    """Return why a file cannot be read."""
    if path.is_dir():
        return "is a folder; expected a file of weights"
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return _problem_of_pickle(file) or unreadable(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                saved = f'torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), "weights.pt")'
                return f"a TorchScript program, which is not executed; if you trust it, extract its weights: {saved}"
            content = next((name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), None)
            if content is None:
                return "a zip without weights of PyTorch"
            return _problem_of_pickle(io.BytesIO(archive.read(content))) or unreadable(path)
    except Exception:  # a damaged zip can fail in any way
        return "damaged or truncated, it cannot be read completely"


def unreadable(path: Path, kind: str = "file of weights") -> str:
    """Return what a file is that cannot be read as a file of this kind, as its first bytes show it."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"not a {kind} but a pointer of Git LFS to it; fetch the file by git lfs pull"
    if start.lstrip()[:1] == b"<":
        return f"not a {kind} but a web page; download the file again"
    if start[8:9] == b"{" and path.suffix != ".safetensors":
        return f"not a {kind} of PyTorch; it looks like a safetensors file, which needs the ending .safetensors"
    return f"not a readable {kind}; it is truncated or of another kind"


def _problem_of_pickle(file: IO[bytes]) -> str | None:
    start = file.read(2)
    file.seek(0)
    if found := sorted(_not_allowed(file)):
        kinds = ", ".join(f"{name} ({place})" if place else name for place, name in found[:NAMES_SHOWN])
        more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
        return f"refused, it holds {kinds}{more}; allowed: {ALLOWED}"
    if start[:1] == b"\x80" and len(start) > 1 and start[1] in OTHER_PROTOCOLS:
        return f"refused, it has pickle protocol {start[1]}; allowed: 2, the default of torch.save"
    return None


def _not_allowed(file: IO[bytes]) -> set[tuple[str, str]]:
    """Return place and class name of each object in pickled data that is not in `ALLOWED`. Nothing is executed."""
    try:
        content = _Outline(file).load()
        if isinstance(content, int):  # the format before 2020: a number, a version, facts of the machine, the content
            content = [_Outline(file).load() for _ in range(3)][-1]
    except Exception:  # damaged, in any way
        return set()
    found, waiting, seen = set(), [("", content)], set()
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
            waiting += [(f"{place}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{index}]", item) for index, item in enumerate(value)]
    return found


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


class _Outline(pickle._Unpickler):  # in Python: the C version allocates the sizes that a damaged file states
    """Reads the structure of pickled data, with a `_Placeholder` for every class and function."""

    def find_class(self, module: str, name: str) -> type:
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name == "collections.OrderedDict":
            return dict
        allowed = module in TORCH_MODULES or full_name in PLAIN or full_name in STAND_INS
        shown = "numpy.ndarray" if full_name.startswith("numpy.") and name in ARRAY_BUILDERS else full_name
        return type("Placeholder", (_Placeholder,), {"full_name": shown, "is_allowed": allowed})

    def persistent_load(self, pid: Any) -> Any:  # the memory of a tensor; before 2020, also the class of a module
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else _Placeholder()


def some_of(names: Iterable[str]) -> str:
    """Return the number of names and the first ones, sorted."""
    names = sorted(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} ({', '.join(names[:NAMES_SHOWN])}{more})"


def mismatch(error: Exception) -> str | None:
    """Return what `load_state_dict` found wrong, on one line: parameters missing, unexpected, or of another shape.

    Returns None if the error has another cause.
    """
    text, found = str(error), []
    for what in ("missing", "unexpected"):
        if lists := re.search(rf"{what} key\(s\) in state_dict: (.*)", text, re.IGNORECASE):
            names = re.findall(r'"([^"]*)"', lists[1])
            found.append(f"{what}: {some_of(names)}")
    shapes = re.findall(
        r"size mismatch for (\S+): copying a param with shape (?:torch\.Size\()?(\[.*?\])\)? from checkpoint, "
        r"the shape in current model is (?:torch\.Size\()?(\[.*?\])",
        text,
    )
    if shapes:
        found.append(f"of another shape: {some_of(f'{name} {given} instead of {own}' for name, given, own in shapes)}")
    return "; ".join(found) or None
