"""Where a preprocessing program puts its files, so that it can be killed at any moment and started again.

The rules: a file appears under its final name only when it is complete and on the disk; the settings that made the
files stand beside them in a hidden file, so that a second start goes on with its own work and touches nobody else's;
one process at a time writes, and holds a lock as long; `dataset.json` comes last and says that all is there. A zip is
collected in a hidden folder beside it and packed at the end, always into the same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.io import LOCK_NAME, InputError, atomic_write, lock_folder, read_json, unlock_folder, write_json
from common.sources import FileSource

_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # what a killed `atomic_write` or `write_batch` leaves behind
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold; the time of packing would change the bytes


class Destination:
    """A folder, or a zip if the name ends in .zip, that one program fills with one set of settings.

    `folder` is where the files lie while the work goes on. Other processes may make their own `Destination` and write
    to it once one of them has called `claim`.
    """

    def __init__(self, path: str | Path, program: str):
        self.path = Path(path)
        self.is_zip = self.path.suffix.lower() == ".zip"
        self.folder = self.path.with_name(f".{self.path.name}.parts") if self.is_zip else self.path
        self._settings_name = f".{program}.json"
        self._packed: FileSource | None = None  # the zip, once it is found complete

    def claim(self, settings: Mapping[str, Any]) -> bool:
        """Take the destination for this process and these settings; return True if it is a zip already complete.

        Raises InputError if it holds anything else (files of someone else, or ours made with other settings), and if
        another process is writing there.
        """
        if self.is_zip and self.path.exists():
            self._check(self._settings_in_zip(), settings)
            shutil.rmtree(self.folder, ignore_errors=True)  # killed between packing and tidying up
            self._packed = FileSource(self.path)
            return True
        for folder in {self.path, self.folder}:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder}: is not a folder; --dest must be a new or empty folder, or end in .zip")
        made_with = self.folder / self._settings_name
        is_begun = made_with.exists()
        if is_begun:
            self._check(read_json(made_with), settings)
        elif self.folder.exists() and not all(_says_nothing(name) for name in os.listdir(self.folder)):
            raise InputError(
                f"{self.folder}: holds files that this program did not make; --dest must be a new or empty folder, "
                "or one where the same command was interrupted"
            )
        lock_folder(self.folder, "writing")  # not before: a lock is a file, and strangers' folders stay as they are
        self._remove_leftovers()
        if not is_begun:
            write_json(made_with, settings)
        return False

    def has(self, name: str) -> bool:
        """Return whether a file is there, which means: complete."""
        return name in self._packed if self._packed else (self.folder / name).exists()

    def read(self, name: str) -> bytes:
        """Return the bytes of a file that is there."""
        return self._packed.read(name) if self._packed else (self.folder / name).read_bytes()

    def write_batch(self, contents: Mapping[str, bytes]) -> None:
        """Write several files so that each appears complete or not at all.

        All are written before the first is synced: the disk then takes them in one go, which on most file systems is
        many times faster than `atomic_write` for each.
        """
        temporary = {name: self.folder / _temporary_name(name) for name in contents}
        try:
            for folder in {path.parent for path in temporary.values()}:
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                opened = [stack.enter_context(open(path, "wb")) for path in temporary.values()]
                for file, content in zip(opened, contents.values(), strict=True):
                    file.write(content)
                    file.flush()
                for file in opened:
                    os.fsync(file.fileno())
            for name, path in temporary.items():
                os.replace(path, self.folder / name)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def finish(self, dataset: Mapping[str, Any]) -> None:
        """Write dataset.json, the sign that all is complete, and pack the zip if it is to be one."""
        write_dataset_json(self.folder / "dataset.json", dataset)
        if self.is_zip:
            _pack(self.folder, self.path)
            shutil.rmtree(self.folder, ignore_errors=True)  # another start may see the zip, and tidy up as well
        unlock_folder(self.folder)

    def _remove_leftovers(self) -> None:
        """Remove what a killed run did not finish."""
        for parent, _, names in os.walk(self.folder):
            for name in names:
                if _LEFTOVER.fullmatch(name):
                    Path(parent, name).unlink()
        if self.is_zip:  # killed while packing
            for leftover in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
                leftover.unlink()

    def _settings_in_zip(self) -> Any:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return json.loads(archive.read(self._settings_name))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self.path}: is there already and was not made by this program; remove it, or give another --dest"
            ) from error

    def _check(self, found: Any, wanted: Mapping[str, Any]) -> None:
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: its {self._settings_name} is damaged; give another --dest")
        wanted = json.loads(json.dumps(wanted))  # as they come back from a file
        changed = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        if changed:
            differences = "; ".join(f"{key} was {found.get(key)!r}, is now {wanted.get(key)!r}" for key in changed)
            raise InputError(
                f"{self.path}: was begun with other settings ({differences}); give another --dest, or "
                "remove it to start anew"
            )


def write_dataset_json(path: Path, dataset: Mapping[str, Any]) -> None:
    """Write dataset.json with one label a line: a million of them stay readable, and half the size of indented JSON."""
    head = {key: value for key, value in dataset.items() if key != "labels"}
    lines = ",\n".join(json.dumps(label) for label in dataset["labels"])
    with atomic_write(path, "w") as file:
        file.write(
            '{"labels": [\n' + lines + "\n]" + "".join(f",\n{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
        )
        file.write("}\n")


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write (disk full, no permission, ...) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); every file there is complete, and the same "
            "command goes on once this is mended"
        ) from error


def _temporary_name(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/.{base}.{os.getpid()}.tmp"


def _says_nothing(name: str) -> bool:
    """Return whether a file may lie in a folder that nobody has begun to fill."""
    return name == LOCK_NAME or _LEFTOVER.fullmatch(name) is not None


def _pack(folder: Path, target: Path) -> None:
    """Write all files of a folder into an uncompressed zip; the same files always give the same bytes."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in files if name != LOCK_NAME)  # to read it would be to give it up
    with atomic_write(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in tqdm(names, desc=f"packing {target.name}", unit="file", mininterval=1):
            member = zipfile.ZipInfo(name, _ZIP_TIME)
            member.external_attr = 0o644 << 16
            archive.writestr(member, (folder / name).read_bytes())
