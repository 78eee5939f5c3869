"""Checkpoints: saving, safe loading, and rebuilding the network from a file alone.

The format is the published one, a dict with
    model, ema   state dicts of the network and of its average
    opt          AdamW's state, by index of the parameter
    args         settings of the run, an `argparse.Namespace`
    steps        number of optimizer steps done
    network      description of the network, `SiTConfig.to_json()`; published files do not have this entry
    classes      labels that occur in the training data, `ClassSet.to_json()`; older files do not have this entry
and any further entries of the writer. Loading a file never executes code from it. The checksum of 0050000.pt is in
0050000.pt.sha256, in the format of `sha256sum --check`. A file without it, such as a published one, is checked by the
checksums inside the zip.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.checks import MOST_TIME_SHIFT, TIME_SHIFT
from common.classes import ClassSet
from common.errors import InputError, shown
from common.temporary import atomic_write
from models.autoencoder import LatentFormat
from models.checksums import HashingFile, checksum_path, digest_of, read_open, verify, write_checksum
from models.exported_codec import hub_export
from models.field_checks import LARGEST_SIZE
from models.hub import hub_file, local_or_hub
from models.interpolant import PATHS
from models.layouts import check_layout, from_sit, plain_names
from models.safetensors_format import is_exported, read_network
from models.sit import SiT, SiTConfig
from models.sit_config import ENCODER_DEPTHS, PRESETS, SPRINT_ENCODER_DEPTH, depths_of_setting
from models.switches import contradiction, switches_of_weights
from models.tensor_checks import check_finite, check_weights
from models.weights_file import mismatch, read_weights_file

CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")
OLD_BLOCKS = "decoder_blocks."  # name of the blocks after the projectors in older REPA checkpoints
OLD_BLOCK = re.compile(r"^decoder_blocks\.(\d+)\.")
BLOCK_WEIGHT = re.compile(r"(?:decoder_)?blocks\.\d{1,6}\..+")
MOST_STEPS = 10**9  # of a run: 10 years of 3 steps a second, 250 times the longest published run
MOST_SHOWN = 6  # names in an error
# Settings of a run that programs read from a checkpoint, with their type. They may be missing.
SETTING_KINDS = {
    "resolution": (int, "a whole number of px"),
    **dict.fromkeys(("model", "enc_type", "enc_weights", "entangle", "latents_folder", "latents_codec"), (str, "text")),
}
PLACES = "a checkpoint file, a run's folder, an exported network, or a repository of the hub (owner/name[/file.pt])"


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its checksum. The file gets its name only when it is complete.

    Raises OSError if the file cannot be written; an existing file of that name is kept.
    """
    path = Path(path)
    with atomic_write(path) as file:
        hashing = HashingFile(file)
        torch.save(content, hashing)
        # Remove the checksum of the old file before the new file gets its name.
        checksum_path(path).unlink(missing_ok=True)
    write_checksum(path, hashing.digest.hexdigest())


def verify_checkpoint(path: str | Path) -> None:
    """Read the complete file and compare it with its checksum; without one, with the checksums inside the zip.

    Raises InputError if there is no such file, or if it differs from the file that was written.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    read_open(path, lambda file: _read(file, path, verified=True, with_digest=False))


def resolve_checkpoint(name: str | Path) -> Path:
    """Return the file or the export that a name stands for; see `load_checkpoint`.

    Raises InputError if there is no such file or folder, or if a run has no checkpoint.
    """
    place = local_or_hub(name, PLACES)
    if not isinstance(place, Path):
        instead = f"There is no local file {name} either. Download it on another machine and give its path"
        if place.is_file:
            return hub_file(place.repo, place.inside, instead)
        return hub_export(place)
    folder = place / "checkpoints" if (place / "args.json").exists() or (place / "checkpoints").is_dir() else place
    found = list_checkpoints(folder) if place.is_dir() else []
    if not found and folder != place:
        raise InputError(f"{place}: a training run without a checkpoint; allowed: one with {folder}/NNNNNNN.pt")
    if runs := [path.parent.name for path in sorted(place.glob("*/checkpoints"))]:
        raise InputError(f"{place}: contains training runs ({', '.join(runs[:MOST_SHOWN])}); give the folder of one")
    return found[-1] if found else place


def newest_of_run(name: str | Path, path: Path | None = None) -> list[str]:
    """Return the line that says which checkpoint the folder of a run stands for; no line for other names.

    `path` is what `resolve_checkpoint` returned for it; default: it is resolved now.
    """
    path = path or resolve_checkpoint(name)
    is_folder = path.is_file() and os.path.isdir(os.path.expanduser(name))
    return [f"{name}: a training run; its newest checkpoint is {path}"] if is_folder else []


def load_checkpoint(name: str | Path, verify: bool = True, layout: str = "auto") -> dict[str, Any]:
    """Return the content of a checkpoint, with tensors on the CPU. Tensors in a zip are read when they are used.

    `name` is a checkpoint file of this or of the published code; a run's folder or its folder of checkpoints, for the
    newest; an export, which is a .safetensors file or a folder; or one of these on the Hugging Face hub: `owner/name`
    for an export, `owner/name/file.pt` for a file. With `verify`, a file is first compared with its checksum, see
    `verify_checkpoint`. `layout` says whose weights it holds: "sit", SiT's own, which are converted; "reg", those of
    this project, also if the file has nothing that shows it; "auto", those of this project, and others are refused.
    Raises InputError if the file does not exist, is damaged, truncated or of another kind, or contains anything but
    tensors, plain Python values, Namespaces, paths and NumPy scalars.
    """
    return _load(resolve_checkpoint(name), verify, layout)[0]


def load_with_digest(name: str | Path, layout: str = "auto") -> tuple[dict[str, Any], str]:
    """Return what `load_checkpoint` returns, and the SHA-256 of the file with the weights that was read.

    Both belong to one open file, also if another process gives its name to a new file meanwhile.
    """
    return _load(resolve_checkpoint(name), True, layout, with_digest=True)


def _load(path: Path, verified: bool, layout: str, with_digest: bool = False) -> tuple[dict[str, Any], str]:
    """Return the content of a checkpoint or an export, and its SHA-256, "" if that is not needed."""
    if is_exported(path):
        content, digest = read_network(path, verified, with_digest)
    elif not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    else:
        content, digest = read_open(path, lambda file: _read(file, path, verified, with_digest))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dict with model, ema, opt, args, steps")
    if layout == "sit":
        return from_sit(content, path), digest
    check_layout(content, path, layout)
    return content, digest


def _read(file: IO[bytes], path: Path, verified: bool, with_digest: bool) -> tuple[Any, str]:
    digest = verify(file, path) if verified else None
    content = read_weights_file(path, file, check_crc=verified and digest is None)
    return content, digest or (digest_of(file) if with_digest else "")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the `{step:07d}.pt` files of a folder, sorted by step."""
    found = [path for path in Path(folder).glob("*.pt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def saved_settings(checkpoint: dict[str, Any], source: str | Path = "checkpoint") -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint, {} if it has none.

    Raises InputError if `args` is of another type, or if its path between data and noise is unknown or not possible.
    """
    settings = {} if (args := checkpoint.get("args")) is None else args
    if not isinstance(settings, argparse.Namespace | dict):
        raise InputError(f"{source}: args is a {type(settings).__name__}; expected an argparse.Namespace")
    settings = settings if isinstance(settings, dict) else vars(settings)
    path_type = settings.get("path_type", PATHS[0])
    if not isinstance(path_type, str) or path_type not in PATHS:
        raise InputError(f"{source}: its path_type {shown(path_type)} is unknown; allowed: {', '.join(PATHS)}")
    shift = 1.0 if settings.get("time_shift") is None else settings["time_shift"]
    if type(shift) not in (int, float) or not TIME_SHIFT.fits(shift):
        raise InputError(
            f"{source}: its time_shift is {shown(shift)}; expected a number greater than 0, at most {MOST_TIME_SHIFT}"
        )
    if tensor := next((name for name, value in settings.items() if isinstance(value, Tensor)), None):
        raise InputError(f"{source}: the setting {tensor} of its run is a tensor; expected a number or text")
    for name, (kind, expected) in SETTING_KINDS.items():
        if (value := settings.get(name)) is not None and (type(value) is not kind or (kind is int and value < 1)):
            raise InputError(f"{source}: the setting {name} of its run is {shown(value)}; expected {expected}")
    try:
        LatentFormat.from_json(settings.get("codec"))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return settings


def steps_done(checkpoint: dict[str, Any], source: str | Path = "checkpoint") -> int:
    """Return the number of optimizer steps of a checkpoint, 0 if it has none. Raises InputError for other values."""
    steps = checkpoint.get("steps", 0)
    if type(steps) is not int or not 0 <= steps <= MOST_STEPS:
        raise InputError(f"{source}: its steps are {shown(steps)}; expected a whole number from 0 to {MOST_STEPS:,}")
    return steps


def checkpoint_classes(checkpoint: dict[str, Any], num_classes: int, source: str | Path = "checkpoint") -> ClassSet:
    """Return the classes a network was trained on: the entry `classes`, or else all labels 0 .. `num_classes` - 1.

    Raises InputError if the entry is invalid, or contains labels that the network does not have.
    """
    if (entry := checkpoint.get("classes")) is None:
        return ClassSet.of_network(num_classes)
    labels, names = (entry.get("labels"), entry.get("names")) if isinstance(entry, dict) else (None, None)
    are_labels = isinstance(labels, list) and all(type(label) is int and label <= LARGEST_SIZE for label in labels)
    if (
        not are_labels
        or not isinstance(names, list | tuple | None)
        or not all(type(name) is str for name in names or ())
    ):
        raise InputError(f'{source}: its classes are {shown(entry)}; expected {{"labels": [...], "names": [...]}}')
    try:
        classes = ClassSet.from_json(entry)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if classes.labels[-1] >= num_classes:
        allowed = f"the network has labels 0 .. {num_classes - 1}"
        raise InputError(f"{source}: its classes contain label {classes.labels[-1]}, but {allowed}")
    return classes


def network_weights(
    checkpoint: dict[str, Any], weights: str = "ema", source: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """Return the state dict of the network, with `blocks.N` in place of the older REPA names.

    `checkpoint` is what `load_checkpoint` returns, or a state dict; `weights` is "ema", the averaged weights, or
    "model"; `source` is the name of the file in errors.
    Raises InputError if there are no such weights, or they are not those of a SiT.
    """
    state = _stored_weights(checkpoint, weights, source)
    first = _plain_blocks(state)
    state = {OLD_BLOCK.sub(lambda match: f"blocks.{int(match[1]) + first}.", name): state[name] for name in state}
    # The scalars of the value residual have the shape (1,) here, and may have none in files of SR-DiT.
    return {name: value.reshape(-1) if name.endswith(".v1_lambda") else value for name, value in state.items()}


def is_legacy(checkpoint: dict[str, Any]) -> bool:
    """Return whether the weights have the older REPA layout, with `decoder_blocks`."""
    state = next((checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), dict)), checkpoint)
    return any(str(key).startswith(OLD_BLOCKS) for key in state)


def network_config(checkpoint: dict[str, Any], weights: str = "ema", source: str | Path = "checkpoint") -> SiTConfig:
    """Return the description of a checkpoint's network: its entry `network`, compared with the weights.

    Published files and older checkpoints lack the entry. Their network is inferred from the names and shapes of the
    weights; what these do not determine (num_heads, encoder_depth) comes from the settings of the run, or else from the
    preset with the same depth and width. The arguments are those of `network_weights`.
    Raises InputError if the weights are not those of a SiT, the settings are invalid, or the entry contradicts the
    weights.
    """
    known = _fields_of_weights(network_weights(checkpoint, weights, source), source)
    stored = _stored_weights(checkpoint, weights, source)
    if is_legacy(stored) and (first_blocks := _plain_blocks(stored)):  # the projectors read after these
        known["encoder_depth"] = first_blocks
    settings, entry = saved_settings(checkpoint, source), checkpoint.get("network")
    known["z_dims"] = _encoder_widths(known["z_dims"], settings if entry is None else entry)
    try:
        config = SiTConfig.from_json(_complete(known, settings) if entry is None else entry)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    for name, value in known.items():
        if name != "mlp_ratio" and getattr(config, name) != value:  # `load_state_dict` compares the width of the MLPs
            raise InputError(
                f"{source}: network has {name} {shown(getattr(config, name))}, but the weights have {value}"
            )
    if (heads := settings.get("num_heads")) not in (None, config.num_heads):
        raise InputError(f"{source}: network has num_heads {config.num_heads}, but its run had {shown(heads)}")
    if found := contradiction(settings, config):
        name, value, held = found
        raise InputError(f"{source}: the settings of its run have {name} {shown(value)}, but the weights have {held}")
    return config


def build_model(
    checkpoint: dict[str, Any],
    weights: str = "ema",
    device: torch.device | str = "cpu",
    fused_attn: bool = True,
    source: str | Path = "checkpoint",
) -> SiT:
    """Return the network of a loaded checkpoint, frozen, in eval mode and with float32 weights.

    The arguments are those of `network_weights` and `SiT`.
    Raises InputError if the weights are missing, do not fit the network or are not finite.
    """
    config, state = network_config(checkpoint, weights, source), network_weights(checkpoint, weights, source)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about copies to the meta device
            model = SiT(config, fused_attn)
            model.load_state_dict(state, strict=True)  # compares names and shapes before memory is taken
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        why = mismatch(error) or f"sizes that are not possible: {shown(config)}"
        raise InputError(f"{source}: the weights do not fit the network that it describes; {why}") from error
    model.to_empty(device=device).load_state_dict(state, strict=True)
    check_finite(model.state_dict(), source)
    if model.cls_scale is not None:
        model.cls_scale.check(source)
    return model.eval().requires_grad_(False)


def load_model(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> SiT:
    """Return the trained network of a checkpoint file, frozen and in eval mode.

    The arguments and errors are those of `load_checkpoint` and `build_model`: a REG, REPA or SiT checkpoint of this
    project, a published one of REG or REPA, or an export, local or on the hub; "ema", the averaged weights, or "model";
    device of the network.
    """
    return build_model(load_checkpoint(path), weights, device, source=path)


def _stored_weights(checkpoint: dict[str, Any], weights: str, source: str | Path) -> dict[str, Tensor]:
    """Return what `network_weights` returns, under the names in the file."""
    state = checkpoint.get(weights, checkpoint)
    if isinstance(state, dict):
        state = plain_names(state)
    if not isinstance(state, dict) or "x_embedder.proj.weight" not in state or "pos_embed" not in state:
        held = state if isinstance(state, dict) and state else checkpoint
        keys = ", ".join(list(map(str, held))[:MOST_SHOWN]) or "nothing"
        other = "model" if weights == "ema" else "ema"
        hint = f"; --weights {other} takes its {other} weights" if isinstance(checkpoint.get(other), dict) else ""
        raise InputError(f"{source}: no {weights} weights of a SiT in it; it holds {keys}{hint}")
    check_weights(state, source)
    for name in state:
        if name.startswith(("blocks.", OLD_BLOCKS)) and not BLOCK_WEIGHT.fullmatch(name):
            raise InputError(f"{source}: {name} is not a weight of a block; expected blocks.NUMBER.NAME")
    return state


def _fields_of_weights(state: dict[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Return the fields of `SiTConfig` that the names and shapes of `network_weights` determine."""
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        cls_weight, slot_token = state.get("cls_projectors2.weight"), state.get("slot_token")
        patches = state["pos_embed"].shape[1] - (cls_weight is not None or slot_token is not None)
        kind = "conv" if "projectors.0.patches.weight" in state else "mlp"
        last = {"conv": "patches", "mlp": "4"}[kind]  # the layer of a projector with its output width
        count = sum(re.fullmatch(rf"projectors\.\d+\.{last}\.weight", name) is not None for name in state)
        projectors = [state[f"projectors.{k}.{last}.weight"].shape for k in range(count)]  # [(z_dim, ...)]
        fields = {
            "input_size": round(patches**0.5) * patch_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
            "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
            "z_dims": tuple(shape[0] for shape in projectors),
            "cls_token_dim": None if cls_weight is None else cls_weight.shape[1],
            "learnable_token": slot_token is not None,
            **switches_of_weights(state),
        }
        if projectors:
            fields["projector"] = kind
            fields |= {"projector_dim": projectors[0][1]} if kind == "mlp" else {}
        for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):  # their last dimension is a head's width
            if name in state:
                fields.setdefault("num_heads", hidden_size // state[name].shape[-1])
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{source}: not a SiT's weights ({error} is missing or has a wrong shape)") from error
    return fields


def _encoder_widths(widths: tuple[int, ...], described: Any) -> tuple[int, ...]:
    """Return the width of each encoder, from those of all projectors and the description or settings of a network."""
    depths = depths_of_setting(described.get("encoder_depth")) if isinstance(described, dict) else None
    count = len(widths) // len(depths) if isinstance(depths, tuple | list) and depths else len(widths)
    return widths[:count] if widths == widths[:count] * (len(widths) // max(count, 1)) else widths


def _complete(fields: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return all fields of `SiTConfig`, the missing ones taken from the settings of a run or from a preset."""
    depth, hidden_size = fields["depth"], fields["hidden_size"]
    size = next((name for name, (d, width, _) in PRESETS.items() if (d, width) == (depth, hidden_size)), None)
    not_in_weights = ("norm", "sprint_keep", "sprint_path_drop", "cls_lead")
    others = {
        "num_heads": settings.get("num_heads") or (PRESETS[size][2] if size else None),
        "encoder_depth": depths_of_setting(settings.get("encoder_depth")) or ENCODER_DEPTHS.get(size, depth),
        "projector_dim": SiTConfig.projector_dim,
        **{name: settings[name] for name in not_in_weights if settings.get(name) is not None},
    }
    if fields["sprint"] and not isinstance(others["encoder_depth"], tuple):
        others["encoder_depth"] = SPRINT_ENCODER_DEPTH  # of SR-DiT's files, whatever their settings have
    if not (fields := {**others, **fields})["num_heads"]:
        raise InputError(f"depth {depth}, width {hidden_size} fit no preset, and args has no num_heads")
    return fields


def _plain_blocks(state: dict[str, Tensor]) -> int:
    """Return the number of blocks named `blocks.N`."""
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
