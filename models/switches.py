"""The switches of a network, such as those of SR-DiT (arXiv 2512.12386), as weights and settings in a file show them.

A published file has no description of its network. The names of its weights show which switches are on.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from models.sit_config import NORMS, PRESETS, QK_NORMS, SiTConfig


def switches_of_weights(names: Container[str]) -> dict[str, Any]:
    """Return the fields of `SiTConfig` for the switches that the names of the weights determine.

    `norm` is missing without a class slot, `value_residual` with a single block.
    """

    def kind(norm: str) -> str | None:
        return ("layer" if f"{norm}.bias" in names else "rms") if f"{norm}.weight" in names else None

    switches = {
        "norm": kind("wg_norm"),
        "qk_norm": kind("blocks.0.attn.q_norm") or "none",
        "rope": "feat_rope.freqs_cos" in names,
        "value_residual": "blocks.1.attn.v1_lambda" in names if "blocks.1.attn.qkv.weight" in names else None,
        "sprint": "mask_token" in names or "fusion_proj.weight" in names,
        "standardized_cls": "cls_scale.mean" in names,
    }
    return {name: value for name, value in switches.items() if value is not None}


def contradiction(settings: Mapping[str, Any], network: SiTConfig) -> tuple[str, Any, Any] | None:
    """Return the first setting of a run that contradicts its network: its name, its value, and the network's value.

    Settings of other types than this project's are skipped, because other code may use their names differently. In
    published files `qk_norm` is true for each kind of norm. None: there is no contradiction.
    """
    for name, allowed in (("norm", NORMS), ("qk_norm", QK_NORMS)):
        value = settings.get(name)
        if type(value) is str and value in allowed and value != getattr(network, name):
            return name, value, getattr(network, name)
    if type(value := settings.get("qk_norm")) is bool and value != (network.qk_norm != "none"):
        return "qk_norm", value, network.qk_norm
    for name in ("rope", "value_residual", "sprint"):
        if type(value := settings.get(name)) is bool and value != getattr(network, name):
            return name, value, getattr(network, name)
    if type(value := settings.get("cls_lead")) in (int, float) and value != network.cls_lead:
        return "cls_lead", value, network.cls_lead
    return _other_preset(settings, network)


def _other_preset(settings: Mapping[str, Any], network: SiTConfig) -> tuple[str, Any, Any] | None:
    preset = re.fullmatch(r"SiT-([A-Z]+)/([0-9]{1,9})", str(settings.get("model")))
    if preset is None or preset[1] not in PRESETS:
        return None
    size, patch_size = PRESETS[preset[1]][:2], int(preset[2])
    if settings.get("depth") or settings.get("hidden_size"):  # they replace the size of the preset
        size = (network.depth, network.hidden_size)
    if (*size, patch_size) == (network.depth, network.hidden_size, network.patch_size):
        return None
    return "model", preset[0], f"depth {network.depth}, width {network.hidden_size}, patch {network.patch_size}"
