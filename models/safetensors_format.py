"""Exported networks: weights as safetensors, and the configuration as JSON.

    NETWORK.safetensors                      one file, with the configuration in its header
    FOLDER/model.safetensors, config.json    two files, as on the Hugging Face hub; vae/: a codec without a name

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
from models.weights_file import unreadable

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CODEC_FOLDER = "vae"  # in an export or a diffusers pipeline; also the name of this codec in an export's configuration
PIPELINE_FILE = "model_index.json"  # of a diffusers pipeline, whose parts are in folders
CLASS_NAME = "SiT"
# The settings of a run that a user of the network needs in addition to its architecture.
KEPT_SETTINGS = ("model", "path_type", "resolution", "enc_type", "exp_name", "codec", "steps", "weights")


def is_exported(path: Path) -> bool:
    """Return whether a path has this format: a .safetensors file or a folder."""
    return path.suffix == ".safetensors" or path.is_dir()


def weights_file(path: Path) -> Path:
    """Return the file with the weights of an exported network."""
    return path / WEIGHTS_FILE if path.is_dir() else path


def export_config(network: SiTConfig, settings: dict[str, Any], classes: dict[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of an export: what is needed to rebuild the network and to decode its latents.

    `settings` are those of the run, and its `steps` and `weights`; `classes` is `ClassSet.to_json()`, or None.
    """
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
    if path.suffix != ".safetensors":
        write_json(path / CONFIG_FILE, config)
        path = path / WEIGHTS_FILE
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[8 + size :])


def read_network(path: str | Path) -> dict[str, Any]:
    """Return an exported network as a checkpoint: `ema`, and what its configuration has of `args`, `steps`, `network`
    and `classes`.

    Raises InputError if a file is missing or damaged, or if the configuration is that of another class.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    config = None
    if path.is_dir():
        config = read_json(_config_file(path))
        _check_class(config, path / CONFIG_FILE)
    path = weights_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; an exported network has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = file.metadata() or {}
        config = config or json.loads(header.get("config", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: {unreadable(path, 'safetensors file')}") from error
    _check_class(config, path)
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
        raise InputError(
            f"{source}: the configuration of another class, {name}; expected an exported network, {CLASS_NAME}"
        )


def class_name(config: Any) -> str | None:
    """Return the class in a config.json of diffusers or transformers, None if it names none."""
    if not isinstance(config, dict):
        return None
    first = config.get("architectures") or [None]
    return config.get("_class_name") or (first[0] if isinstance(first, list) else None) or config.get("model_type")
