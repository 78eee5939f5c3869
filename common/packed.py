"""Data sets in formats that the programs do not read: what they are called, and how to make image files of them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from common.errors import printable
from common.io import open_regular

TAR = "tar archive"
# Endings of packed data, and what they are. Longer endings come first.
PACKED = {
    ".tar.gz": TAR, ".tar.bz2": TAR, ".tar.xz": TAR, ".tar.zst": TAR, ".tgz": TAR, ".tbz2": TAR, ".txz": TAR,
    ".tar": TAR,
    ".parquet": "Parquet table", ".arrow": "Arrow table", ".tfrecord": "TFRecord file", ".tfrecords": "TFRecord file",
    ".mdb": "LMDB database", ".lmdb": "LMDB database", ".h5": "HDF5 file", ".hdf5": "HDF5 file", ".beton": "FFCV file",
    ".zip": "zip", ".7z": "7z archive", ".rar": "RAR archive", ".gz": "gzip file",
}  # fmt: skip
# Members, and bytes, of a tar that are read to find out whether it is a shard of a WebDataset.
SHARD_MEMBERS, SHARD_HEAD = 20, 1 << 26
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by the first bytes of a file
UNPACK = {
    TAR: "mkdir -p {folder} && tar -xf {file} -C {folder}",
    "zip": "unzip -q {file} -d {folder}",
    "7z archive": "7z x {file} -o{folder}",
}
READERS = {  # of the batches of a table
    "Parquet table": 'pyarrow.parquet.ParquetFile(file).iter_batches(100, columns=["image", "label"])',
    "Arrow table": "pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))",
}

_TABLES = """pip install pyarrow
python - <<'END'
import itertools, pathlib
import pyarrow, pyarrow.parquet
number = itertools.count()
for file in sorted(pathlib.Path({source!r}).rglob({pattern!r})):
    for batch in {batches}:
        for row in batch.to_pylist():  # other names of the columns: see batch.schema
            folder = pathlib.Path({dest!r}, f"{{row['label']:06d}}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{{next(number):08d}}.jpg").write_bytes(row["image"]["bytes"])
END"""
_SHARDS = """python - <<'END'
import pathlib, tarfile
for file in sorted(pathlib.Path({source!r}).rglob({pattern!r})):
    with tarfile.open(file) as shard:
        files = [m for m in shard if m.isfile()]
        members = {{m.name.removeprefix("./").partition(".")[::2]: shard.extractfile(m).read() for m in files}}
    for (key, ending), data in members.items():
        if ending in ("jpg", "jpeg", "png", "webp"):  # label: a number in KEY.cls
            folder = pathlib.Path({dest!r}, f"{{int(members[key, 'cls']):06d}}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{{file.stem}}-{{key.replace('/', '-')}}.{{ending}}").write_bytes(data)
END"""


def packed_kind(name: str) -> str | None:
    """Return what a file is by the ending of its name, None if its ending is not one of packed data."""
    return next((kind for ending, kind in PACKED.items() if name.lower().endswith(ending)), None)


def explain_packed(path: Path, names: Sequence[str] | None = None) -> str | None:
    """Return what a source of packed data is and the commands that make image files of it; None for other sources.

    `path` is a file, or a folder or zip that contains the files `names`.
    """
    if names is None:
        kind = packed_kind(path.name) or (TAR if _is_tar(path) else None)
        return kind and f"is a {kind}, which is not read; {_advice(kind, path.parent, [path.name], path)}"
    packed = [name for name in names if packed_kind(name)]
    if not packed:
        return None
    kind = packed_kind(packed[0])
    count = sum(packed_kind(name) == kind for name in packed)
    found = f"{count:,} {kind}{'s' if count > 1 else ''}, first {printable(packed[0])}"
    return f"contains {found}; {_advice(kind, path, packed)}"


def unpack_command(folder: Path, first: str, unpack: str = UNPACK[TAR]) -> str:
    """Return the command that unpacks the archives of a folder, each into a folder of its own.

    The archive of a class folder is unpacked there. `first` is the name of one archive below `folder`.
    """
    depth, ending = first.count("/"), next(ending for ending in PACKED if first.lower().endswith(ending))
    pattern = f"{shlex.quote(str(folder))}/{'*/' * depth}*{ending}"
    target = '$(dirname "$f")' if depth else f"${{f%{ending}}}"
    command = unpack.format(file='"$f"', folder=f'"{target}"')
    return f"for f in {pattern}; do {command}; done"


def _advice(kind: str, folder: Path, packed: list[str], file: Path | None = None) -> str:
    """Return how to make image files of the files `packed` in a folder, or of one `file`."""
    dest = f"{file.with_suffix('') if file else folder}-images"
    then = f"then use {shlex.quote(dest)} as the source"
    code = {"source": str(folder), "dest": dest, "pattern": _pattern(packed)}
    if kind in READERS:
        return f"write its images to class folders, {then}:\n{_TABLES.format(batches=READERS[kind], **code)}"
    endings = _endings(folder / packed[0]) if kind == TAR else set()
    if "cls" in endings:
        is_shards = "these are shards of a WebDataset; write the images to class folders"
        return f"{is_shards}, {then}:\n{_SHARDS.format(**code)}"
    if kind not in UNPACK:
        return "write its images to files in class folders first (CLASS/NAME.png)"
    if file:
        command = UNPACK[kind].format(file=shlex.quote(str(file)), folder=shlex.quote(dest))
        return f"unpack it, {then}:\n{command}"
    labels = "" if endings.isdisjoint(("json", "txt")) else " (no labels, KEY.cls: then use convert.py --labels none)"
    return f"unpack them first{labels}:\n{unpack_command(folder, packed[0], UNPACK[kind])}"


def _pattern(names: list[str]) -> str:
    """Return the pattern of the files to unpack: those of the training set, if there are others as well."""
    if len(names) == 1:
        return names[0].rpartition("/")[2]
    ending = next(ending for ending in PACKED if names[0].lower().endswith(ending))
    for pattern in (f"train*{ending}", f"train*/*{ending}"):
        if any(PurePosixPath(name).match(pattern) for name in names):
            return pattern
    return f"*{ending}"


def _is_tar(path: Path) -> bool:
    return bool(_first_members(path))


def _endings(path: Path) -> set[str]:
    """Return the endings of the first files in a tar archive; shards of a WebDataset have KEY.jpg and KEY.cls."""
    return {name.rpartition(".")[2] for name in _first_members(path)}


def _first_members(path: Path) -> list[str]:
    """Return the names of the first members of a tar archive, [] if it is none. Only its first MiB are unpacked."""
    names: list[str] = []
    try:
        with open_regular(path) as file:
            opener = next((o for magic, o in UNPACKERS.items() if file.peek(8).startswith(magic)), None)
            with opener(file) if opener else file as unpacked:
                head = io.BytesIO(unpacked.read(SHARD_HEAD))
        with tarfile.open(fileobj=head, mode="r:") as archive:
            names += (member.name for member, _ in zip(archive, range(SHARD_MEMBERS), strict=False))
    except Exception:  # of files that are not tars, and of the incomplete last member
        return names
    return names
