"""The folder of a data set: where in it images and latents are, and what to do if they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from common.errors import InputError
from common.image_files import encode_command, has_images, preparation
from common.io import real_path
from common.packed import explain_packed
from common.sources import FileSource

IMAGE_FOLDERS = ("images", "imagenet_256_vae", "imagenet_512_vae")
LATENT_FOLDERS = ("vae-sd", "latents")
TOKEN_FILES = "*/img-tokens-*"  # of a folder of cached tokens


def places_of(data_dir: str | Path, names: Iterable[str]) -> list[Path]:
    """Return the existing folders and zips of these names in a data folder. A zip is named without its ending."""
    places = [Path(data_dir) / file for name in names for file in (name, f"{name}.zip")]
    return [path for path in places if os.path.lexists(path)]


def find_part(data_dir: Path, names: tuple[str, ...], what: str) -> FileSource:
    """Return the folder or zip whose name is among `names`. Raises InputError unless there is exactly one."""
    found = places_of(data_dir, names)
    if len(found) != 1:
        state = " and ".join(path.name for path in found) or "none"
        other_latents = _other_latents(data_dir) if what == "latents" else ""
        advice = "" if found else other_latents or _advice(data_dir)
        raise InputError(
            f"{data_dir}: {what} expected in one folder or .zip of {', '.join(names)}; found {state}{advice}"
        )
    return FileSource(found[0])


def _other_latents(data_dir: Path) -> str:
    """Return by which flag latents in folders of other names are read, "" if there are none."""
    folders = (path for path in sorted(data_dir.iterdir()) if path.stem not in IMAGE_FOLDERS)
    found = [path.name for path in folders if (path / "dataset.json").exists() and not any(path.glob(TOKEN_FILES))]
    return f"; folders of other names: {', '.join(found)}; choose one by --latents-folder" if found else ""


def _advice(data_dir: Path) -> str:
    """Return what to do about a data folder without images or without latents, "" if its content gives no hint."""
    path, own_names = real_path(data_dir), (*IMAGE_FOLDERS, *LATENT_FOLDERS)
    if path.name in own_names and ((path / "dataset.json").exists() or (path / "00000").exists()):
        return f"; this is {path.name} itself, use the folder above it: {path.parent}"
    if parts := [folder for folder in sorted(path.iterdir()) if any((folder / name).exists() for name in own_names)]:
        return f"; use {' or '.join(str(data_dir / folder.name) for folder in parts[:2])}"
    if images := next((path / name for name in IMAGE_FOLDERS if (path / name).exists()), None):
        return f"; encode the images first:\n{encode_command(images)}"
    names = FileSource(path).names
    if has_images(names):
        return preparation(path)
    packed = explain_packed(path, names)
    return f"; it {packed}" if packed else ""
