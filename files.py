"""Files, as every program here treats them: written whole or not at all, read from a folder and a zip alike, and
complained about by name.

Three rules of the project live here, so that no program has to remember them:
a file appears under its final name only when it is complete (`atomic_write`);
a data set may be a folder or a zip (`open_source`);
bad input ends a program with one clear line, not with a traceback (`InputError`, `run_cli`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


class InputError(ValueError):
    """Bad input: a file, a flag or a value that the caller can mend. The text names it and says what is allowed."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point's `main`; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under `path` only once it is complete and on the disk.

    Written beside the target, flushed, synced, renamed. An error inside the block leaves the old file, if there was
    one, untouched. `mode` is "wb" or "w"; the folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: on POSIX the entry lives in the folder, which has to reach the disk as well."""
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises InputError, naming the file, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


class FileSource:
    """The files of a folder or of a zip, by relative name with forward slashes. Hidden files do not count.

    Safe to hand to worker processes: the zip is opened anew in each.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.is_zip = self.path.is_file()
        self._archive: zipfile.ZipFile | None = None
        self._archive_pid = -1
        if self.is_zip:
            self._sizes = {i.filename: i.file_size for i in self._zip().infolist() if _is_visible_file(i.filename)}
        elif self.path.is_dir():
            self._sizes = dict(_walk(self.path))
        else:
            raise InputError(f"{self.path}: no such folder or zip file")

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def size(self, name: str) -> int:
        """Return the file's length in bytes (uncompressed, in a zip)."""
        return self._sizes[name]

    def describe(self, name: str) -> str:
        """Return the name as an error message should show it: a path, or archive.zip:member."""
        return f"{self.path}:{name}" if self.is_zip else str(self.path / name)

    def read(self, name: str) -> bytes:
        """Return the file's bytes. Raises InputError, naming the file, if it cannot be read."""
        try:
            return self._zip().read(name) if self.is_zip else (self.path / name).read_bytes()
        except (OSError, KeyError, zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted
            raise InputError(f"{self.describe(name)}: cannot be read ({error})") from error

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive_pid != os.getpid():  # a forked worker must not share the file offset
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise InputError(f"{self.path}: not a readable zip file ({error})") from error
            self._archive_pid = os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_archive_pid": -1}


def open_source(path: str | Path) -> FileSource:
    """Return the files of a folder or zip. Raises InputError if there is neither at `path`."""
    return FileSource(path)


def read_dataset_json(source: FileSource) -> dict[str, Any]:
    """Return the content of a data set's dataset.json, {} if it has none. Raises InputError if it is not an object."""
    if "dataset.json" not in source:
        return {}
    where = source.describe("dataset.json")
    try:
        content = json.loads(source.read("dataset.json"))
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f'{where}: must be a JSON object, {{"labels": [[name, label], ...]}}')
    return content


def _is_visible_file(name: str) -> bool:
    return not name.endswith("/") and not any(part.startswith(".") for part in name.split("/"))


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    for folder, subfolders, _ in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        prefix = "" if prefix == "." else prefix.replace(os.sep, "/") + "/"
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file():
                    yield prefix + entry.name, entry.stat().st_size
