"""A network outside a checkpoint: weights as safetensors, and what rebuilds it as JSON beside or inside them.

    model.safetensors               alone: its header carries the configuration
    FOLDER/model.safetensors, config.json      as on the Hugging Face hub

Both are plain data; reading them runs nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from common.io import InputError, atomic_write, read_json, write_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def is_exported(path: Path) -> bool:
    """Return whether a path is of this format: a .safetensors file, or a folder."""
    return path.suffix == ".safetensors" or path.is_dir()


def weights_file(path: Path) -> Path:
    """Return the file with the weights of an exported network."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def write_network(path: str | Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a network's weights and its configuration: as one file if `path` ends in .safetensors, else as a folder."""
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    # "format" is what the transformers and diffusers libraries look for.
    data = save(tensors, {"format": "pt", "config": json.dumps(config)})
    if path.suffix != ".safetensors":
        write_json(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    with atomic_write(path) as file:
        file.write(data)


def read_network(path: str | Path) -> dict[str, Any]:
    """Return what `write_network` wrote in the form of a checkpoint: `ema`, and `args` if a configuration is there.

    Raises:
        InputError: something is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    config = read_json(path / CONFIG_FILE) if path.is_dir() else None
    path = weights_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            header = file.metadata() or {}
        config = config or json.loads(header.get("config", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: its configuration is a {type(config).__name__}; expected an object")
    content = {"ema": state}
    if config:
        content |= {"args": argparse.Namespace(**config), "steps": config.get("steps", 0)}
    return content
