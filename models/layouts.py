"""Whose weights a file holds: this project's, those of SiT's or DiT's authors, or something else.

SiT (arXiv 2401.08740) and DiT (arXiv 2212.09748) publish bare state dicts with the parameter names of this project, and
with other meanings. SiT counts time from noise to data and predicts the velocity of that direction. DiT predicts noise
at discrete steps. Both predict a variance in addition, so their last layer is twice as wide. `from_sit` converts SiT's
weights exactly. Everything else that is recognised here is refused, with a sentence that says what it is.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, shown
from models.embedders import TimestepEmbedder
from models.sit_config import PRESETS
from models.tensor_checks import check_weights

LAYOUTS = ("auto", "reg", "sit")
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+|\b_orig_mod\.")  # of DistributedDataParallel and torch.compile
WRAPPERS = ("ema", "model", "state_dict", "module")  # entries of a file that hold a state dict
# Neither SiT nor DiT has them.
OWN_PARTS = ("projectors.", "cls_projectors2.", "slot_token", "decoder_blocks.", "fusion_proj.")
# What a file with a parameter of such a name holds, and the flag that takes it.
FOREIGN = (
    (r"\blora_(A|B|up|down)\b|\.lora\.(up|down)\.", "LoRA weights, the change of another network", ""),
    (r"\.mlp\.w12\.", "weights of LightningDiT, whose architecture this project does not have", ""),
    (r"^transformer_blocks\.\d+\.", "weights of a Transformer2DModel of diffusers, with another architecture", ""),
    (r"^(model\.diffusion_model\.)?(down_blocks|input_blocks|middle_block)\.", "weights of a UNet", ""),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|layers\.\d+)\.", "weights of a codec (VAE)", "--vae"),
    (
        r"^(base_encoder\.|visual\.|vision_model\.)|^(backbone\.|encoder\.)?patch_embed\.proj\.|^layer1\.0\.conv1\.",
        "weights of a vision encoder",
        "--enc-weights",
    ),
)
ACCEPTED = (
    "checkpoints of this project, of REG, REPA and SR-DiT, exports, and SiT's own weights by export.py --layout sit"
)


def plain_names(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state dict without the prefixes that wrapped networks have."""
    return {PREFIXES.sub("", name) if isinstance(name, str) else name: value for name, value in state.items()}


def check_layout(content: Mapping[str, Any], source: str | Path, layout: str = "auto") -> None:
    """Raise InputError, which says what the file holds, if its weights do not have this project's meaning.

    Weights of a SiT without projectors, class token and settings may have either direction of time. They are accepted
    with the layout "reg" only.
    """
    if content.keys() >= {"state", "param_groups"}:
        raise InputError(f"{source}: the state of an optimizer, without weights; allowed: {ACCEPTED}")
    state = stored_state(content)
    names = [name for name in state if isinstance(name, str)]
    for pattern, what, flag in FOREIGN:
        if any(re.search(pattern, name) for name in names):
            hint = f"; it belongs to {flag}" if flag else ""
            raise InputError(f"{source}: {what}{hint}; allowed here: {ACCEPTED}")
    if _is_twice_as_wide(state):
        raise InputError(
            f"{source}: its last layer is twice as wide as the latents need, as in the weights that the authors of SiT "
            f"and of DiT publish under the same names. SiT's (t = 0 is noise, and the velocity has the opposite sign) "
            f"are converted by `{export_command(source, 'sit')}`. DiT's predict noise at discrete steps and cannot be "
            "used"
        )
    parts = [content.get(name) for name in ("args", "network")]
    has_settings = any(isinstance(part, argparse.Namespace) or (isinstance(part, dict) and part) for part in parts)
    is_ours = any(name.startswith(OWN_PARTS) for name in names) or has_settings
    if layout != "reg" and not is_ours and "x_embedder.proj.weight" in state:
        raise InputError(
            f"{source}: weights of a SiT without projectors, class token and settings, so the direction of time is "
            f"unknown. If t = 0 is noise, as in SiT's own: `{export_command(source, 'sit')}`. If t = 0 is data, as in "
            f"this project: `{export_command(source, 'reg')}`, or save them as {{'ema': weights, 'args': settings}}"
        )


def export_command(source: str | Path, layout: str) -> str:
    """Return the command that exports a file of the given layout."""
    dest = Path(source).name.removesuffix(Path(source).suffix) or "network"
    dest = f"{dest}-export" if Path(dest).exists() else dest
    return f"python export.py --layout {layout} --ckpt {shlex.quote(str(source))} --dest {shlex.quote(dest)}"


def stored_state(content: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the state dict in a file: the first of `WRAPPERS` that is a dict, else the content itself."""
    state = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    return plain_names(state)


def _is_twice_as_wide(state: Mapping[str, Any]) -> bool:
    """Return whether the last layer has two outputs for each value of a patch of latents, p p C."""
    names = ("x_embedder.proj.weight", "final_layer.linear.weight")
    first, last = (getattr(state.get(name), "shape", ()) for name in names)
    return len(first) == 4 and len(last) == 2 and last[0] == 2 * math.prod(first[1:])


def from_sit(content: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Return weights of SiT's authors as a checkpoint of this project: network(x, t) = -theirs(x, 1 - t)[:, :C].

    The last layer keeps the first C of 2 C channels and is negated. Time is reversed in the first matrix of the time
    embedding, whose features are cos(t w) and sin(t w).
    Raises InputError if they are not SiT's, or were not trained on the linear path with velocities.
    """
    state = stored_state(content)
    own_parts = (*OWN_PARTS, "feat_rope.", "blocks.1.attn.v1_lambda")
    own = next((name for name in state if isinstance(name, str) and name.startswith(own_parts)), None)
    if own or content.get("network") is not None:
        what = own or "the entry network"
        raise InputError(f"--layout sit: {source} has {what}, which SiT's own weights do not have; leave --layout out")
    if Path(source).name.lower().startswith("dit"):
        raise InputError(f"--layout sit: {source} is DiT's by its name; DiT predicts noise at discrete steps")
    given = content.get("args")
    given = vars(given) if isinstance(given, argparse.Namespace) else given if isinstance(given, dict) else {}
    for setting, only in (("path_type", "linear"), ("prediction", "velocity")):
        value = given.get(setting, only)
        if not isinstance(value, str) or value.lower() != only:
            raise InputError(f"--layout sit: {source} was trained with {setting} {shown(value)}; allowed: {only}")
    for tensors in (content.get("ema"), content.get("model"), state):
        if isinstance(tensors, dict):
            check_weights({name: value for name, value in tensors.items() if isinstance(value, Tensor)}, source)
    try:
        parts = {name: plain_names(content[name]) for name in ("ema", "model") if isinstance(content.get(name), dict)}
        converted = {name: _reversed(part) for name, part in (parts or {"ema": state}).items()}
        return {**converted, "args": _settings(state), "steps": content.get("steps", 0)}
    except (KeyError, RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"--layout sit: {source} does not hold the weights of a SiT; allowed: {ACCEPTED}") from error


def _reversed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with time and velocity reversed, and without the second half of the output channels."""
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    changed = {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        by_channel = state[name].unflatten(0, (patch_size**2, -1))  # (p p, C or 2 C, ...)
        changed[name] = -by_channel[:, :channels].flatten(0, 1)

    # cos((1 - t) w) = cos(w) cos(t w) + sin(w) sin(t w), and sin((1 - t) w) = sin(w) cos(t w) - cos(w) sin(t w).
    cos_w, sin_w = TimestepEmbedder.features(torch.ones(1), torch.float64).chunk(2, dim=-1)  # each (1, 128)
    weight = state["t_embedder.mlp.0.weight"]
    of_cos, of_sin = weight.double().chunk(2, dim=1)  # each (D, 128)
    reversed_time = [of_cos * cos_w + of_sin * sin_w, of_cos * sin_w - of_sin * cos_w]
    changed["t_embedder.mlp.0.weight"] = torch.cat(reversed_time, dim=1).to(weight.dtype)
    return {**state, **changed}


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of SiT's training that an export keeps; the latents are Stable Diffusion's, of factor 8."""
    hidden_size, _, patch_size, _ = state["x_embedder.proj.weight"].shape
    size = next((name for name, (_, width, _) in PRESETS.items() if width == hidden_size), None)
    resolution = 8 * patch_size * round(state["pos_embed"].shape[1] ** 0.5)
    model = {"model": f"SiT-{size}/{patch_size}"} if size else {}
    return {**model, "path_type": "linear", "resolution": resolution}
