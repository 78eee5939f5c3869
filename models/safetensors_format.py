"""Exported networks: weights as safetensors, and the configuration as JSON.

    NETWORK.safetensors                      one file, with the configuration in its header
    FOLDER/model.safetensors, config.json    two files, as on the Hugging Face hub; vae/: a codec without a name

Their SHA-256 is in NETWORK.safetensors.sha256, or in FOLDER/checksums.sha256, and is compared when they are read.

The configuration contains the fields of `SiTConfig`, and the classes and the codec of the training data. Both files are
plain data; reading them never executes code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from common.errors import InputError, shown
from common.io import parse_json, read_json, real_path, write_json
from common.temporary import atomic_write
from models.checksums import (
    FOLDER_CHECKSUMS,
    HashingFile,
    checksum_path,
    digest_of,
    read_open,
    verify,
    verify_file,
    write_checksum,
    write_folder_checksums,
)
from models.sit import SiTConfig
from models.weights_file import read_safetensors

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CODEC_FOLDER = "vae"  # in an export or a diffusers pipeline; also the name of this codec in an export's configuration
PIPELINE_FILE = "model_index.json"  # of a diffusers pipeline, whose parts are in folders
CLASS_NAME = "SiT"
# The settings of a run that a user of the network needs in addition to its architecture.
KEPT_SETTINGS = (
    "model", "path_type", "time_shift", "resolution", "enc_type", "exp_name", "codec", "latents_folder",
    "latents_codec", "steps", "weights", "cfg_prob",
)  # fmt: skip


def is_exported(path: Path) -> bool:
    """Return whether a path has this format: a .safetensors file or a folder."""
    return path.suffix == ".safetensors" or path.is_dir()


def weights_file(path: Path) -> Path:
    """Return the file with the weights of an exported network."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def export_config(network: SiTConfig, settings: dict[str, Any], classes: dict[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of an export: what is needed to rebuild the network and to decode its latents.

    `settings` are those of the run, and its `steps` and `weights`; `classes` is `ClassSet.to_json()`, or None. A time
    shift of 1 is not written, so that the file is the same as before this setting existed; `cfg_prob` is given, and
    written, only for a network trained without labels.
    """
    settings = {name: value for name, value in settings.items() if (name, value) != ("time_shift", 1)}
    return {
        "_class_name": CLASS_NAME,
        **network.to_json(),
        **{name: settings[name] for name in KEPT_SETTINGS if settings.get(name) is not None},
        **({"classes": classes} if classes else {}),
    }


def write_network(path: str | Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and configuration of a network, to one file if `path` ends in .safetensors, else to a folder."""
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    # The transformers and diffusers libraries require the entry "format".
    data = save(tensors, {"format": "pt", "config": json.dumps(config)})
    # The library writes the entries of the header in random order; sorted, equal networks give equal files.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    folder = None if path.suffix == ".safetensors" else path
    if folder:
        (folder / FOLDER_CHECKSUMS).unlink(missing_ok=True)  # of files that are replaced now
        write_json(folder / CONFIG_FILE, config)
        path = folder / WEIGHTS_FILE
    with atomic_write(path) as file:
        hashing = HashingFile(file)
        hashing.write(len(header).to_bytes(8, "little") + header)
        hashing.write(memoryview(data)[8 + size :])
        checksum_path(path).unlink(missing_ok=True)
    if folder:
        codec = sorted(f"{CODEC_FOLDER}/{file.name}" for file in (folder / CODEC_FOLDER).glob("*") if file.is_file())
        write_folder_checksums(folder, [CONFIG_FILE, WEIGHTS_FILE, *codec])
    else:
        write_checksum(path, hashing.digest.hexdigest())


def read_network(path: str | Path, verified: bool = True, with_digest: bool = False) -> tuple[dict[str, Any], str]:
    """Return an exported network as a checkpoint, and the SHA-256 of its weights.

    The checkpoint has `ema`, and what the configuration has of `args`, `steps`, `network` and `classes`. With
    `verified`, the files are compared with their checksums, if there are any. Without `with_digest`, the SHA-256 of a
    file without a checksum is not computed, but "".
    Raises InputError if a file is missing or damaged, or if the configuration is that of another class.
    """
    path, config = Path(path), None
    if path.is_dir():
        if verified:
            verify_file(_config_file(path))
        config = read_json(_config_file(path))
        _check_class(config, path / CONFIG_FILE)
    path = weights_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; an exported network has {CONFIG_FILE} and {WEIGHTS_FILE}")
    state, header, digest = read_open(path, lambda file: _read(file, path, verified, with_digest))
    try:
        inner = parse_json(header.get("config", "{}").encode())
    except InputError as error:
        raise InputError(f"{path}: the configuration in its header is {error}") from error
    _check_class(inner, path)
    if config and (other := next((name for name in _described(inner) if inner[name] != config.get(name)), None)):
        given = f"{other} {shown(config.get(other))}, but the header of {WEIGHTS_FILE} has {shown(inner[other])}"
        raise InputError(f"{path.parent / CONFIG_FILE}: has {given}")
    return _as_checkpoint(state, config or inner, path.parent), digest


def _read(file: IO[bytes], path: Path, verified: bool, with_digest: bool) -> tuple[dict, dict, str]:
    """Return tensors and header of an open file, and its SHA-256."""
    digest = verify(file, path) if verified else None
    if with_digest and digest is None:
        digest = digest_of(file)
    return *read_safetensors(path, file), digest or ""


def _described(config: dict[str, Any]) -> list[str]:
    """Return the entries of a configuration that determine what the network computes."""
    names = (*(field.name for field in dataclasses.fields(SiTConfig)), "path_type", "time_shift", "cfg_prob")
    return [name for name in names if name in config]


def _as_checkpoint(state: dict[str, Tensor], config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return weights and configuration of an export in `folder` as a checkpoint."""
    content: dict[str, Any] = {"ema": state}
    codec = config.get("codec")
    if isinstance(codec, dict) and codec.get("codec") == CODEC_FOLDER:
        config = {**config, "codec": {**codec, "codec": str(real_path(folder) / CODEC_FOLDER)}}
    if config:
        content |= {"args": argparse.Namespace(), "steps": config.get("steps", 0)}
        vars(content["args"]).update(config)
    names = {field.name for field in dataclasses.fields(SiTConfig)}
    if config.keys() >= names - SiTConfig.added_fields().keys():  # the oldest exports lack another field
        content["network"] = {name: config[name] for name in names & config.keys()}
    if "classes" in config:
        content["classes"] = config["classes"]
    return content


def _config_file(folder: Path) -> Path:
    """Return the path of a folder's configuration. Raises InputError, which says what the folder is, if it has none."""
    path = folder / CONFIG_FILE
    if path.is_file():
        return path
    if (folder / PIPELINE_FILE).is_file():
        pipeline = read_json(folder / PIPELINE_FILE)
        name = pipeline.get("_class_name") if isinstance(pipeline, dict) else None
        raise InputError(f"{folder}: a diffusers pipeline ({name}) without {CONFIG_FILE} of an exported network")
    raise InputError(f"{path}: no such file; allowed: a run's folder, or the folder of an exported network")


def _check_class(config: Any, source: Path) -> None:
    """Raise InputError, naming the class, if a configuration is that of another network."""
    if not isinstance(config, dict):
        raise InputError(f"{source}: its configuration is a {type(config).__name__}; expected an object")
    if (name := class_name(config)) not in (None, CLASS_NAME):
        expected = f"expected an exported network, {CLASS_NAME}"
        raise InputError(f"{source}: the configuration of another class, {shown(name)}; {expected}")


def class_name(config: Any) -> str | None:
    """Return the class in a config.json of diffusers or transformers, None if it names none."""
    if not isinstance(config, dict):
        return None
    first = config.get("architectures") or [None]
    return config.get("_class_name") or (first[0] if isinstance(first, list) else None) or config.get("model_type")
