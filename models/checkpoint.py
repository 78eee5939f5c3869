"""Checkpoints: saving, safe loading, and rebuilding the network from a file alone.

The format is the published one, a dict with
    model, ema   state dicts of the network and of its average
    opt          AdamW's state, by index of the parameter
    args         the run's settings, an `argparse.Namespace`
    steps        optimiser steps done
and what else the writer adds. A file is data: nothing in it is ever executed. Beside 0050000.pt lies 0050000.pt.sha256,
as `sha256sum --check` reads it; a file without one, such as the published ones, is checked by the sums inside the zip.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from common.io import InputError, atomic_write, sha256_of
from models.interpolant import PATHS
from models.safetensors_format import is_exported, read_network, weights_file
from models.sit import ENCODER_DEPTHS, PRESETS, SiT

CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")
OLD_BLOCKS = "decoder_blocks."  # older REPA checkpoints name the blocks behind the projectors so
BLOCK_WEIGHT = re.compile(r"(?:decoder_)?blocks\.(\d{1,6})\.(.+)")


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its checksum; it appears under its name only when it is complete.

    Raises:
        OSError: it cannot be written; a file that was there before is still there.
    """
    path = Path(path)
    with atomic_write(path) as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)
        # From here to the end the file stands without a checksum, never beside that of another.
        checksum_path(path).unlink(missing_ok=True)
    with atomic_write(checksum_path(path), "w") as file:
        file.write(f"{hashing.digest.hexdigest()}  {path.name}\n")


def checksum_path(path: Path) -> Path:
    """Return where the checksum of a checkpoint lies."""
    return path.with_name(path.name + ".sha256")


def verify_checkpoint(path: str | Path) -> None:
    """Read a checkpoint through and compare it with its checksum, or a zip without one with the sums inside it.

    Raises:
        InputError: there is no such file, or its bytes are not those that were written.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        if checksum_path(path).exists():
            expected = _recorded_sum(path)
            found = sha256_of(path)
            if found != expected:
                raise InputError(
                    f"{path}: damaged; its SHA-256 is {found}, not {expected} as {checksum_path(path)} says"
                )
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (name := archive.testzip()) is not None:
                    raise InputError(f"{path}: damaged; the checksum of {name} in it is wrong")
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged or truncated, it cannot be read through ({error})") from error


def checkpoint_digest(path: str | Path) -> str:
    """Return the SHA-256 of the file with a network's weights: which network it is, wherever the file lies.

    Args:
        path: as `load_checkpoint` takes it, verified: the checksum beside a checkpoint is believed.
    """
    path = Path(path)
    if is_exported(path):
        return sha256_of(weights_file(path))
    return _recorded_sum(path) if checksum_path(path).exists() else sha256_of(path)


def _recorded_sum(path: Path) -> str:
    return checksum_path(path).read_text(encoding="utf-8", errors="replace").split(" ")[0]


def load_checkpoint(path: str | Path, verify: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors on the CPU and, where the format allows, read only when used.

    Args:
        path: of this or of the published code; or what export.py wrote, a .safetensors file or a folder.
        verify: whether to compare the file with its checksum first, see `verify_checkpoint`.

    Raises:
        InputError: no such file, damaged, truncated, of another kind, or holding anything but tensors, plain Python
            values and `argparse.Namespace`.
    """
    path = Path(path)
    if is_exported(path):
        return read_network(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    if verify:
        verify_checkpoint(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: refused, it holds more than weights, or is no checkpoint ({reason})") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint; truncated or of another kind ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dict with model, ema, opt, args, steps")
    return content


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the `{step:07d}.pt` files of a folder, in the order of their steps."""
    found = [path for path in Path(folder).glob("*.pt") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def saved_settings(checkpoint: dict[str, Any], source: str | Path = "checkpoint") -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint, {} if it holds none.

    Raises:
        InputError: they are no settings, or name a path between data and noise that is unknown here.
    """
    settings = checkpoint.get("args")
    if settings is None:
        return {}
    if not isinstance(settings, argparse.Namespace | dict):
        raise InputError(f"{source}: args is a {type(settings).__name__}; expected an argparse.Namespace")
    settings = settings if isinstance(settings, dict) else vars(settings)
    path_type = settings.get("path_type", PATHS[0])
    if path_type not in PATHS:
        raise InputError(f"{source}: its path_type {path_type!r} is unknown; allowed: {', '.join(PATHS)}")
    return settings


def steps_done(checkpoint: dict[str, Any], source: str | Path = "checkpoint") -> int:
    """Return the optimiser steps of a checkpoint, 0 if it does not say. Raises InputError for anything but a number."""
    steps = checkpoint.get("steps", 0)
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"{source}: its steps are {steps!r}; expected a whole number from 0")
    return steps


def network_weights(
    checkpoint: dict[str, Any], weights: str = "ema", source: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """Return the state dict of the network under today's names.

    Args:
        checkpoint: as `load_checkpoint` returns it, or a bare state dict.
        weights: "ema" or "model".
        source: named in errors.

    Raises:
        InputError: there are no such weights, or they are not a SiT's.
    """
    return _rename_old_blocks(stored_weights(checkpoint, weights, source))


def stored_weights(
    checkpoint: dict[str, Any], weights: str = "ema", source: str | Path = "checkpoint"
) -> dict[str, Tensor]:
    """Return what `network_weights` returns, under the names that the file has."""
    state = checkpoint if "x_embedder.proj.weight" in checkpoint else checkpoint.get(weights)
    if not isinstance(state, dict) or "x_embedder.proj.weight" not in state or "pos_embed" not in state:
        keys = ", ".join(list(map(str, checkpoint))[:6]) or "nothing"
        raise InputError(f"{source}: no {weights} weights of a SiT in it; it holds {keys}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{source}: {name} in its weights is a {type(value).__name__}; expected a tensor")
        if name.startswith(("blocks.", OLD_BLOCKS)) and not BLOCK_WEIGHT.fullmatch(name):
            raise InputError(f"{source}: {name} is no block's weight; expected blocks.NUMBER.NAME")
    return state


def is_legacy(checkpoint: dict[str, Any]) -> bool:
    """Return whether the weights have the older REPA layout, with `decoder_blocks`."""
    state = checkpoint.get("ema") or checkpoint.get("model") or checkpoint
    return any(str(key).startswith(OLD_BLOCKS) for key in state)


def architecture(
    state: dict[str, Tensor], settings: dict[str, Any] | None = None, source: str | Path = "checkpoint"
) -> dict[str, Any]:
    """Return `SiT`'s arguments, read off the names and shapes of `stored_weights`.

    What these do not tell comes from the run's `settings` (num_heads, encoder_depth), or from the preset of the same
    width. In the older REPA layout the projectors stand where the blocks' names change.

    Raises:
        InputError: the shapes are not a SiT's, or the settings are odd.
    """
    settings = settings or {}
    legacy_depth = _plain_blocks(state) if any(name.startswith(OLD_BLOCKS) for name in state) else None
    state = _rename_old_blocks(state)
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        rows = state["pos_embed"].shape[1]
        cls_weight, slot_token = state.get("cls_projectors2.weight"), state.get("slot_token")
        cls_token_dim = None if cls_weight is None else cls_weight.shape[1]
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        count = sum(re.fullmatch(r"projectors\.\d+\.4\.weight", name) is not None for name in state)
        projectors = [state[f"projectors.{k}.4.weight"].shape for k in range(count)]  # [(z_dim, projector_dim)]
        projector_dim = projectors[0][1] if projectors else 2048
        q_norm = state.get("blocks.0.attn.q_norm.weight")
        num_heads = None if q_norm is None else hidden_size // len(q_norm)
        num_classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{source}: not a SiT's weights ({error} is missing or odd)") from error
    grid_size = round((rows - (cls_weight is not None or slot_token is not None)) ** 0.5)
    size = next((name for name, (d, width, _) in PRESETS.items() if (d, width) == (depth, hidden_size)), None)
    num_heads = num_heads or _whole(settings, "num_heads", source) or (PRESETS[size][2] if size else None)
    if num_heads is None:
        raise InputError(f"{source}: depth {depth}, width {hidden_size} fit no preset, and args names no num_heads")
    encoder_depth = legacy_depth or _whole(settings, "encoder_depth", source)
    return {
        "input_size": grid_size * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "num_classes": num_classes,
        "encoder_depth": encoder_depth or (ENCODER_DEPTHS[size] if size else depth),
        "z_dims": [shape[0] for shape in projectors],
        "projector_dim": projector_dim,
        "cls_token_dim": cls_token_dim,
        "qk_norm": q_norm is not None,
        "learnable_token": slot_token is not None,
    }


def _whole(settings: dict[str, Any], name: str, source: str | Path) -> int | None:
    """Return a setting that is a whole number or not there."""
    value = settings.get(name)
    if value is not None and not (isinstance(value, int) and value >= 0):
        raise InputError(f"{source}: its {name} is {value!r}; expected a whole number")
    return value


def build_model(
    checkpoint: dict[str, Any],
    weights: str = "ema",
    device: torch.device | str = "cpu",
    fused_attn: bool = True,
    source: str | Path = "checkpoint",
) -> SiT:
    """Return the network of a loaded checkpoint, in eval mode, float32.

    Args:
        checkpoint: as `load_checkpoint` returns it.
        weights: "ema" or "model".
        device: where to.
        fused_attn: see `SiT`.
        source: named in errors.

    Raises:
        InputError: the weights are missing, or not a SiT's.
    """
    state = network_weights(checkpoint, weights, source)
    settings = architecture(stored_weights(checkpoint, weights, source), saved_settings(checkpoint, source), source)
    try:
        with torch.device("meta"):  # no time spent on random weights
            model = SiT(**settings, fused_attn=fused_attn)
        model.to_empty(device=device).load_state_dict(state, strict=True)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{source}: the weights do not fit the network they describe ({error})") from error
    return model.eval().requires_grad_(False)


def load_model(path: str | Path, weights: str = "ema", device: torch.device | str = "cpu") -> SiT:
    """Return the trained network of a checkpoint file, in eval mode: all one needs in a notebook.

    Args:
        path: a REG, REPA or SiT checkpoint, of this or of the published code, or what export.py wrote.
        weights: "ema", the averaged weights, or "model".
        device: where to.

    Raises:
        InputError: see `load_checkpoint` and `build_model`.
    """
    return build_model(load_checkpoint(path), weights, device, source=path)


def _rename_old_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    first = _plain_blocks(state)

    def rename(name: str) -> str:
        if not name.startswith(OLD_BLOCKS):
            return name
        number, rest = BLOCK_WEIGHT.fullmatch(name).groups()
        return f"blocks.{int(number) + first}.{rest}"

    return {rename(name): value for name, value in state.items()}


def _plain_blocks(state: dict[str, Tensor]) -> int:
    """Return the number of blocks that are not named in the older REPA way."""
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)


class _HashingFile(io.RawIOBase):
    """Hands everything on to a file opened for writing, and takes its SHA-256 in passing."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)
