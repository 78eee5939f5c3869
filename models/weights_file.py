"""Reading files of weights: those of PyTorch and safetensors.

Reading never executes code from a file: `torch.load` builds tensors and plain Python values, and a few classes are
replaced by stand-ins that hold data only. Before that, `pickle_outline` finds what a file holds in addition, and where,
and the entries of the zip are compared with the file's size. PyTorch's own messages advise to load without this
protection, so they are not passed on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.errors import InputError
from models.checksums import read_open
from models.pickle_outline import ALLOWED, MOST_BYTES, STAND_INS, not_allowed
from models.tensor_checks import LONGEST_NAME, check_tensor

NAMES_SHOWN = 4  # of parameters, in one list
OTHER_PROTOCOLS = (3, 4, 5)  # of pickle; PyTorch reads only protocol 2 without executing code
# Limits of one file. A checkpoint of SiT-XL/2 with its optimizer has 1,800 tensors, 10,000 values and 5 levels.
MOST_ENTRIES = 100_000  # tensors
DIRECTORY_SIZE = 5  # index in the record at the end of a zip: bytes of the list of its entries
MOST_VALUES = 1_000_000
MOST_CONTAINERS = 100_000  # lists, dicts and others, each counted as often as the content leads to it
DEEPEST = 50
LARGEST_HEADER = 2**24  # bytes, of a safetensors file
STORED_TWICE = 2  # tensors of one dict may share memory, but together they are at most twice as large as the file


def read_weights_file(path: str | Path, file: IO[bytes] | None = None, check_crc: bool = True) -> Any:
    """Return the content of a file of `torch.save`, with tensors on the CPU. Tensors in a zip are read when used.

    NumPy scalars become Python numbers; paths and NumPy dtypes become text. `file` is the file if it is open already,
    and `path` is then its name in errors. With `check_crc`, the checksums inside a zip are compared first.
    Raises InputError if the file cannot be read, is damaged or of another kind, holds more than `ALLOWED`, or would
    take more memory than its size accounts for.
    """
    path = Path(path)
    if file is None:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; expected a file of weights")
        return read_open(path, lambda opened: read_weights_file(path, opened, check_crc))
    try:
        is_zip = zipfile.is_zipfile(file)
        _check_pickle(file, path, is_zip, check_crc)
        file.seek(0)
        with torch.serialization.safe_globals(list(STAND_INS.values())), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = open_path(file) if is_zip else file
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise InputError(f"{path}: {unreadable(path, file)}") from error
    _check_values(content, path, os.fstat(file.fileno()).st_size)
    return content


def open_path(file: IO[bytes]) -> str:
    """Return a path of an open file, which stays valid if another file gets its name."""
    path = f"/proc/self/fd/{file.fileno()}"
    return path if os.path.exists(path) else str(file.name)


def _check_pickle(file: IO[bytes], path: Path, is_zip: bool, check_crc: bool) -> None:
    """Raise InputError if a file of `torch.save` holds what is not allowed or larger than the file."""
    file.seek(0)
    if not is_zip:
        return _check_objects(file, path)
    if zipfile._EndRecData(file)[DIRECTORY_SIZE] > 100 * MOST_ENTRIES:  # ZipFile takes 1 KB of memory for each entry
        raise InputError(f"{path}: has too many entries; allowed: at most {MOST_ENTRIES}")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if any(name.endswith("/constants.pkl") for name in names):
            saved = f'torch.save(torch.jit.load("{path.name}", map_location="cpu").state_dict(), "weights.pt")'
            how = f"if you trust it, extract its weights: {saved}"
            raise InputError(f"{path}: a TorchScript program, which is not executed; {how}")
        pickles = [member for member in members if member.filename.split("/")[-1] == "data.pkl"]
        if not pickles:
            raise InputError(f"{path}: a zip without weights of PyTorch")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError(f"{path}: its entries are compressed; torch.save stores them uncompressed")
        are_clear = len(pickles) == 1 and len(set(names)) == len(names) and len({n.split("/")[0] for n in names}) == 1
        if not are_clear or sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise InputError(f"{path}: damaged; its entries are not those that torch.save writes")
        if pickles[0].file_size > MOST_BYTES:
            raise InputError(f"{path}: {pickles[0].filename} has {pickles[0].file_size} bytes; allowed: {MOST_BYTES}")
        if check_crc and (name := archive.testzip()) is not None:
            raise InputError(f"{path}: damaged; the checksum of {name} in it is wrong")
        return _check_objects(io.BytesIO(archive.read(pickles[0])), path)


def _check_objects(file: IO[bytes], path: Path) -> None:
    """Raise InputError if a pickle has objects that are not allowed or another protocol than that of torch.save."""
    start = file.read(2)
    file.seek(0)
    try:
        found = not_allowed(file)
    except Exception as error:  # damaged, in any way
        if start[:1] == b"\x80" and start[1:] and start[1] in OTHER_PROTOCOLS:
            found = []
        else:
            raise InputError(f"{path}: {unreadable(path, file)}") from error
    if found:
        kinds = ", ".join(f"{name} ({place})" if place else name for place, name in found[:NAMES_SHOWN])
        more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
        raise InputError(f"{path}: refused, it holds {kinds}{more}; allowed: {ALLOWED}")
    if start[:1] == b"\x80" and start[1] in OTHER_PROTOCOLS:
        raise InputError(f"{path}: refused, it has pickle protocol {start[1]}; allowed: 2, the default of torch.save")


def _check_values(content: Any, path: Path, size: int) -> None:
    """Raise InputError if the content is too deep or too long, or has tensors larger than the file of `size` bytes."""
    waiting, count, containers = [("", content, 0)], 0, 0
    while waiting:
        place, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            check_tensor(value, place or "its content", path)
            continue
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            if any(isinstance(key, str) and len(key) > LONGEST_NAME for key in value):
                raise InputError(f"{path}: a name in {place or 'it'} has more than {LONGEST_NAME} letters")
        elif not isinstance(value, list | tuple | set | frozenset):
            continue
        count, containers = count + len(value), containers + 1
        if count > MOST_VALUES or containers > MOST_CONTAINERS or depth > DEEPEST:
            limits = f"allowed: {MOST_VALUES} values, {DEEPEST} levels"
            raise InputError(f"{path}: holds too many values, or values inside each other too deeply; {limits}")
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        if sum(item.nbytes for _, item in items if isinstance(item, Tensor)) > STORED_TWICE * size:
            raise InputError(f"{path}: the tensors of {place or 'it'} are larger than the file, {size} bytes")
        waiting += [
            (f"{place}.{key}".lstrip(".")[-200:], item, depth + 1)
            for key, item in items
            if isinstance(item, Tensor | dict | list | tuple | set | frozenset | argparse.Namespace)
        ]


def read_safetensors(path: str | Path, file: IO[bytes] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and the texts in its header.

    `file` is the file if it is open already, and `path` is then its name in errors.
    Raises InputError if it is damaged or of another kind, or its header is larger than `LARGEST_HEADER`.
    """
    from safetensors import safe_open

    path = Path(path)
    if file is None:
        return read_open(path, lambda opened: read_safetensors(path, opened))
    _check_header(path, file)
    try:
        with safe_open(open_path(file), "pt") as archive:
            state = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 (not a dict)
            return state, archive.metadata() or {}
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise InputError(f"{path}: {unreadable(path, file, 'safetensors file')}") from error


def _check_header(path: Path, file: IO[bytes]) -> None:
    """Raise InputError if the header of a safetensors file is too large, not JSON, or has a name twice."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > os.fstat(file.fileno()).st_size - 8:
        raise InputError(f"{path}: {unreadable(path, file, 'safetensors file')}")
    if length > LARGEST_HEADER:
        raise InputError(f"{path}: its header has {length} bytes; allowed: at most {LARGEST_HEADER}")
    try:
        pairs = json.loads(file.read(length), object_pairs_hook=lambda pairs: pairs)
        names = Counter(name for name, _ in pairs)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: {unreadable(path, file, 'safetensors file')}") from error
    if len(names) > MOST_ENTRIES or any(len(name) > LONGEST_NAME for name in names):
        raise InputError(f"{path}: allowed: at most {MOST_ENTRIES} tensors, with names of {LONGEST_NAME} letters")
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise InputError(f"{path}: damaged; its header names {twice} twice")


def unreadable(path: Path, file: IO[bytes], kind: str = "file of weights") -> str:
    """Return what a file is that cannot be read as a file of this kind, as its first bytes show it."""
    file.seek(0)
    start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"not a {kind} but a pointer of Git LFS to it; fetch the file by git lfs pull"
    if start.lstrip()[:1] == b"<":
        return f"not a {kind} but a web page; download the file again"
    if start[8:9] == b"{" and path.suffix != ".safetensors":
        return f"not a {kind} of PyTorch; it looks like a safetensors file, which needs the ending .safetensors"
    return f"not a readable {kind}; it is truncated or of another kind"


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
