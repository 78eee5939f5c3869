"""Exported networks: weights as safetensors, and the configuration as JSON.

    NETWORK.safetensors                      one file, with the configuration in its header
    FOLDER/model.safetensors, config.json    two files, as on the Hugging Face hub; vae/, the codec, if it is in no hub

The configuration contains the fields of `SiTConfig`, and the classes and the codec of the training data. Both files are
plain data; reading them never executes code.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.io import InputError, atomic_write, read_json, write_json
from models.sit import SiTConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CODEC_FOLDER = "vae"  # in the folder of an export; also the name of this codec in the configuration


def is_exported(path: Path) -> bool:
    """Return whether a path has this format: a .safetensors file or a folder."""
    return path.suffix == ".safetensors" or path.is_dir()


def weights_file(path: Path) -> Path:
    """Return the file with the weights of an exported network."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def write_network(path: str | Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write weights and configuration of a network, to one file if `path` ends in .safetensors, else to a folder."""
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    # The transformers and diffusers libraries require the entry "format".
    data = save(tensors, {"format": "pt", "config": json.dumps(config)})
    if path.suffix != ".safetensors":
        write_json(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    with atomic_write(path) as file:
        file.write(data)


def read_network(path: str | Path) -> dict[str, Any]:
    """Return an exported network as a checkpoint: `ema`, and what its configuration has of `args`, `steps`, `network`
    and `classes`.

    Raises InputError if a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    config = read_json(path / CONFIG_FILE) if path.is_dir() else None
    path = weights_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = file.metadata() or {}
        config = config or json.loads(header.get("config", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: its configuration is a {type(config).__name__}; expected an object")
    content = {"ema": state}
    codec = config.get("codec")
    if isinstance(codec, dict) and codec.get("codec") == CODEC_FOLDER:
        config = {**config, "codec": {**codec, "codec": str(path.parent.resolve() / CODEC_FOLDER)}}
    if config:
        content |= {"args": argparse.Namespace(**config), "steps": config.get("steps", 0)}
    names = {field.name for field in dataclasses.fields(SiTConfig)}
    if config.keys() >= names:  # the oldest exports lack a field
        content["network"] = {name: config[name] for name in names}
    if "classes" in config:
        content["classes"] = config["classes"]
    return content
