"""The codec of an exported network: files in the export, or a name that means the same on every machine.

A run records a codec that is a local folder by its path, which other machines do not have. An export in a folder
therefore contains a copy of such a codec, vae/ (335 MB for the size of Stable Diffusion's, 10 MB for TAESD).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import read_json
from common.temporary import atomic_write
from models.autoencoder import CODECS, CONFIG_FILE, LOCAL_CODEC, NEEDED, WEIGHTS_FILE, LatentFormat
from models.checksums import verify_file
from models.hub import HubName, hub_folder
from models.safetensors_format import CODEC_FOLDER
from models.safetensors_format import WEIGHTS_FILE as NETWORK_FILE

CODEC_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def export_codec(latent_format: LatentFormat, dest: Path) -> dict[str, Any]:
    """Return the entry `codec` of an export to `dest`, after copying a codec that is a local folder into it.

    If `dest` is a single file, or the folder is not on this machine, the entry only says that the codec has to be
    given, and a warning on stderr says so too. Raises InputError if a file is missing.
    """
    name, codec = latent_format.codec, latent_format.to_json()
    folder = Path(name)
    if name in ("pixel", *CODECS) or not (folder.is_dir() or name.startswith(("/", ".", "~"))):
        return codec
    if dest.suffix == ".safetensors" or not folder.is_dir():
        reason = "one file cannot contain it" if folder.is_dir() else "it is not on this machine"
        advice = "--vae, or `vae` of the pipeline, has to name it when images are generated"
        print(f"warning: codec {name} is not exported, because {reason}; {advice}", file=sys.stderr)
        return {**codec, "codec": f"{LOCAL_CODEC}{folder.name}"}
    for file in CODEC_FILES:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: no such file; {NEEDED}")
        verify_file(folder / file)
    for file in CODEC_FILES:
        with open(folder / file, "rb") as source, atomic_write(dest / CODEC_FOLDER / file) as copy:
            shutil.copyfileobj(source, copy)
    return {**codec, "codec": CODEC_FOLDER}


def hub_export(place: HubName) -> Path:
    """Return the local folder of an export on the hub, with its codec if the export contains one.

    Raises InputError if a file is neither in the local cache nor downloadable.
    """
    instead = (
        f"There is no local file or folder {'/'.join(filter(None, place))} either. Download both files of {place.repo} "
        "into a folder and give that folder, or give owner/name/FILE"
    )
    folder = hub_folder(place, (CONFIG_FILE, NETWORK_FILE), instead)
    content = read_json(folder / CONFIG_FILE)
    codec = content.get("codec") if isinstance(content, dict) else None
    if isinstance(codec, dict) and codec.get("codec") == CODEC_FOLDER:
        files = [f"{CODEC_FOLDER}/{file}" for file in CODEC_FILES]
        hub_folder(place, files, f"Put the folder {CODEC_FOLDER} next to {CONFIG_FILE}, and give the folder of both")
    return folder
