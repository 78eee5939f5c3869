"""The output folder or zip of a preprocessing program, which can be killed at any time and started again.

A file appears under its final name only when it is complete and on the disk. A hidden file records the settings, so
that a restart continues only work with the same settings. A lock allows one run at a time. `dataset.json` is written
last and shows that the output is complete. The files of a zip are collected in a hidden folder next to it and packed at
the end; the same files always give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, setting
from common.errors import InputError
from common.io import check_writable, parse_json, read_json, real_path, write_json
from common.locks import LOCK_NAME, lock_folder, unlock_folder
from common.progress import progress_bar
from common.sources import FileSource, changed_at
from common.temporary import atomic_write, is_temporary
from common.zip_files import read_hidden

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # of every file in a zip: the time of packing would change the bytes


@dataclass(frozen=True, kw_only=True)
class InputOutput(Config):
    """Input and output."""

    source: Path = setting(MISSING, "folder or zip of images with dataset.json; convert.py also accepts class folders")
    dest: Path = setting(MISSING, "output folder, or output zip if the name ends in .zip")

    def check_combination(self) -> None:
        source = real_path(self.source)
        for folder in {self.dest, work_folder(self.dest)}:
            place = real_path(folder)
            if place.is_relative_to(source):
                raise InputError(f"--dest {self.dest}: is inside --source {self.source}; allowed: a place outside")
            if source.is_relative_to(place):
                raise InputError(f"--dest {self.dest}: contains --source {self.source}; allowed: another folder")
        if not os.path.isfile(work_folder(self.dest)):  # `claim` says more about it
            check_writable(work_folder(self.dest) / "dataset.json", "--dest")
        data = next((parent for parent in self.dest.absolute().parents if (parent / "dataset.json").exists()), None)
        if data:
            raise InputError(f"--dest {self.dest}: is inside the data set {data}; allowed: a place outside")


def work_folder(dest: Path) -> Path:
    """Return the folder that contains the files during the work: of a zip, a hidden folder next to it."""
    return dest.with_name(f".{dest.name}.parts") if dest.suffix.lower() == ".zip" else dest


class Destination:
    """A folder, or a zip if the name ends in .zip, that one program fills with one set of settings.

    `folder` contains the files during the work. One process calls `claim`. After that, other processes can create their
    own `Destination` and write to it.
    """

    def __init__(self, path: str | Path, program: str):
        self.path = Path(path)
        self.is_zip = self.path.suffix.lower() == ".zip"
        self.folder = work_folder(self.path)
        self._settings_name = f".{program}.json"
        self._packed: FileSource | None = None  # the zip, if it is complete

    def claim(self, settings: Mapping[str, Any], added: Collection[str] = ()) -> bool:
        """Lock the destination for these settings. Return whether it is a complete zip.

        `added` settings are not recorded in destinations of earlier versions.
        Raises InputError if the destination contains other files or was created with other settings, or if another
        process writes to it.
        """
        if self.is_zip and self.folder.is_symlink():
            raise InputError(f"{self.folder}: is a link; remove it, the files of {self.path.name} are collected there")
        if self.is_zip and self.path.exists():
            self._check(self._settings_in_zip(), settings, added)
            if (self.folder / self._settings_name).exists():
                shutil.rmtree(self.folder, ignore_errors=True)  # of a run killed after packing
            self._packed = FileSource(self.path)
            return True
        for folder in {self.path, self.folder}:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder}: is not a folder; --dest must be a new or empty folder, or end in .zip")
        made_with = self.folder / self._settings_name
        others = _other_files(self.folder) if self.folder.exists() else []
        is_started = made_with.exists() and len(others) > 1  # a run that wrote no file may change its settings
        if is_started:
            self._check(read_json(made_with), settings, added)
        elif others and others != [made_with.name]:
            allowed = "--dest must be a new or empty folder, or one where the same command was interrupted"
            raise InputError(f"{self.folder}: contains files that this program did not create; {allowed}")
        lock_folder(self.folder, "writing")  # after the checks, because the lock file would change a foreign folder
        if not is_started:
            write_json(made_with, settings)
        return False

    def is_older(self, name: str, changed: float) -> bool:
        """Return whether an existing file was written before the time `changed`. Those of a zip are not compared."""
        return self._packed is None and changed_at(self.folder / name) < changed

    def has(self, name: str) -> bool:
        """Return whether a file exists; it is then complete."""
        return name in self._packed if self._packed else (self.folder / name).exists()

    def read(self, name: str) -> bytes:
        """Return the bytes of an existing file."""
        return self._packed.read(name) if self._packed else (self.folder / name).read_bytes()

    def write_batch(self, contents: Mapping[str, bytes]) -> None:
        """Write several files, each atomically.

        All are written before the first fsync, and their names reach the disk with the file system's next commit. On
        most file systems this is many times faster than a complete `atomic_write` for each.
        """
        with contextlib.ExitStack() as files:
            for name, content in contents.items():
                file = files.enter_context(atomic_write(self.folder / name, sync_name=False, clear=False))
                file.write(content)

    def finish(self, dataset: Mapping[str, Any]) -> None:
        """Write dataset.json, which shows that the output is complete, and pack the zip if the output is one."""
        write_dataset_json(self.folder / "dataset.json", dataset)
        if self.is_zip:
            _pack(self.folder, self.path)
            shutil.rmtree(self.folder, ignore_errors=True)  # a second run may remove it as well
        unlock_folder(self.folder)

    def _settings_in_zip(self) -> Any:
        try:
            return parse_json(read_hidden(self.path, self._settings_name))
        except (InputError, OSError, zipfile.BadZipFile) as error:
            advice = "remove it, or use another --dest"
            raise InputError(f"{self.path}: exists and was not created by this program; {advice}") from error

    def _check(self, found: Any, wanted: Mapping[str, Any], added: Collection[str]) -> None:
        """Raise InputError if the settings found in the destination are not the wanted ones."""
        if not isinstance(found, dict):
            raise InputError(f"{self.path}: its {self._settings_name} is damaged; use another --dest")
        wanted = json.loads(json.dumps(wanted))  # with the types that JSON has
        known = {*found, *wanted} - (set(added) - found.keys())
        changed = [key for key in sorted(known) if found.get(key) != wanted.get(key)]
        if changed:
            values = {key: f"{key} was {found.get(key)!r}, is now {wanted.get(key)!r}" for key in changed}
            values |= {"listing": "other images or labels"} if "listing" in changed else {}  # checksums
            differences = "; ".join(values.values())
            advice = "use another --dest, or remove it to start from scratch"
            raise InputError(f"{self.path}: was created with other settings ({differences}); {advice}")


def write_dataset_json(path: Path, dataset: Mapping[str, Any]) -> None:
    """Write dataset.json with one label per line, which is readable and half as large as indented JSON."""
    entries = dataset["labels"]
    labels = "null" if entries is None else "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]"
    others = (f",\n{json.dumps(key)}: {json.dumps(value)}" for key, value in dataset.items() if key != "labels")
    with atomic_write(path, "w") as file:
        file.write('{"labels": ' + labels + "".join(others) + "}\n")


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (disk full, no permission, ...) into an InputError."""
    try:
        yield
    except OSError as error:
        state = "all files there are complete, and the same command continues when the cause is removed"
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {state}") from error


def _other_files(folder: Path) -> list[str]:
    """Return the files of a folder other than those which a run leaves if it is killed before its first output."""
    return [name for name in os.listdir(folder) if name != LOCK_NAME and not is_temporary(name)]


def _pack(folder: Path, target: Path) -> None:
    """Write all files of a folder to an uncompressed zip; the same files always give the same bytes."""
    files = (
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not is_temporary(path.name)
    )
    names = sorted(name for name in files if name != LOCK_NAME)  # reading it would release the lock
    with atomic_write(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in progress_bar(names, desc=f"packing {target.name}", unit="file", mininterval=1):
            member = zipfile.ZipInfo(name, _ZIP_TIME)
            member.external_attr = 0o644 << 16
            archive.writestr(member, (folder / name).read_bytes())
