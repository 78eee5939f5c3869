"""Data sets in formats that the programs do not read: what they are called, and how to make image files of them."""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

TAR = "tar archive"
# Endings of packed data, and what they are. Longer endings come first.
PACKED = {
    ".tar.gz": TAR, ".tar.bz2": TAR, ".tar.xz": TAR, ".tar.zst": TAR, ".tgz": TAR, ".tbz2": TAR, ".txz": TAR,
    ".tar": TAR,
    ".parquet": "Parquet table", ".arrow": "Arrow table", ".tfrecord": "TFRecord file", ".tfrecords": "TFRecord file",
    ".mdb": "LMDB database", ".lmdb": "LMDB database", ".h5": "HDF5 file", ".hdf5": "HDF5 file", ".beton": "FFCV file",
    ".zip": "zip", ".7z": "7z archive", ".rar": "RAR archive", ".gz": "gzip file",
}  # fmt: skip
SHARD_MEMBERS = 20  # members of a tar that are read to find out whether it is a shard of a WebDataset

_TABLES = """pip install pyarrow
python - <<'END'
import itertools, pathlib
import pyarrow, pyarrow.parquet
number = itertools.count()
for file in sorted(pathlib.Path({source!r}).{glob}):
    for batch in {batches}:
        for row in batch.to_pylist():  # other names of the columns: see batch.schema
            folder = pathlib.Path({dest!r}, f"{{row['label']:06d}}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{{next(number):08d}}.jpg").write_bytes(row["image"]["bytes"])
END"""
_SHARDS = """python - <<'END'
import pathlib, tarfile
for file in sorted(pathlib.Path({source!r}).{glob}):
    with tarfile.open(file) as shard:
        members = {{m.name.partition(".")[::2]: shard.extractfile(m).read() for m in shard if m.isfile()}}
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
        return kind and f"is a {kind}, which is not read; {_advice(kind, path, None)}"
    packed = [name for name in names if packed_kind(name)]
    if not packed:
        tables = any(name.rpartition("/")[2] in ("dataset_infos.json", "dataset_info.json") for name in names)
        return "is a data set of the Hugging Face hub without its tables; download them (*.parquet)" if tables else None
    kind = packed_kind(packed[0])
    count = sum(packed_kind(name) == kind for name in packed)
    return f"contains {count:,} {kind}{'s' if count > 1 else ''}, first {packed[0]}; {_advice(kind, path, packed)}"


def unpack_command(path: Path, first: str) -> str:
    """Return the command that unpacks tar archives of a folder: those in class folders there, others into new folders.

    `first` is the name of one of them below `path`.
    """
    depth, ending = first.count("/"), next(ending for ending in PACKED if first.lower().endswith(ending))
    pattern = f"{shlex.quote(str(path))}/{'*/' * depth}*{ending}"
    folder = '$(dirname "$f")' if depth else f"${{f%{ending}}}"
    return f'for f in {pattern}; do mkdir -p "{folder}" && tar -xf "$f" -C "{folder}"; done'


def _advice(kind: str, path: Path, packed: list[str] | None) -> str:
    """Return how to make image files of a file `path`, or of the files `packed` in a folder `path`."""
    source, dest = str(path if packed else path.parent), f"{path if packed else path.with_suffix('')}-images"
    first = packed[0] if packed else path.name
    files = {"source": source, "dest": dest, "glob": f"rglob({_pattern(packed or [path.name])!r})"}
    then = f"then use {shlex.quote(dest)} as the source"
    if kind == "Parquet table":
        reader = 'pyarrow.parquet.ParquetFile(file).iter_batches(100, columns=["image", "label"])'
        return f"write its images to class folders, {then}:\n{_TABLES.format(batches=reader, **files)}"
    if kind == "Arrow table":
        reader = "pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))"
        return f"write its images to class folders, {then}:\n{_TABLES.format(batches=reader, **files)}"
    if kind == TAR and _is_shard(path / first if packed else path):
        return (
            f"these are shards of a WebDataset; write the images to class folders, {then}:\n{_SHARDS.format(**files)}"
        )
    if kind == TAR and packed:
        return f"unpack them first:\n{unpack_command(path, first)}"
    archives = {
        TAR: f"mkdir -p {shlex.quote(dest)} && tar -xf {shlex.quote(str(path))} -C {shlex.quote(dest)}",
        "zip": f"unzip {shlex.quote(first)} -d {shlex.quote(dest)}",
        "7z archive": f"7z x {shlex.quote(first)} -o{shlex.quote(dest)}",
        "RAR archive": f"unrar x {shlex.quote(first)} {shlex.quote(dest)}/",
    }
    if kind in archives:
        place = f"cd {shlex.quote(source)} && " if packed else ""
        return f"unpack it, {then}:\n{place}{archives[kind]}"
    return "write its images to files in class folders first (CLASS/NAME.png)"


def _pattern(names: list[str]) -> str:
    """Return the pattern of the files to unpack: those of the training set, if there are others as well."""
    base = [name.rpartition("/")[2] for name in names]
    ending = next(ending for ending in (*PACKED, "") if base[0].lower().endswith(ending))
    if len(base) == 1:
        return base[0]
    return f"train*{ending}" if any(name.startswith("train") for name in base) else f"*{ending}"


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False


def _is_shard(path: Path) -> bool:
    """Return whether a tar archive contains labels next to its images (KEY.jpg, KEY.cls), as a WebDataset has them."""
    try:
        with tarfile.open(path) as archive:
            return any(member.name.endswith(".cls") for member, _ in zip(archive, range(SHARD_MEMBERS), strict=False))
    except (OSError, tarfile.TarError, EOFError):
        return False
