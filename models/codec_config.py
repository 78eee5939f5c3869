"""Whether the config.json of a codec has possible values, before diffusers builds a network from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import InputError, shown

MOST_STAGES = 8  # of an encoder; the factor is 2 to the power of their number minus 1
# The lowest and the highest number of each setting. The highest are several times those of published codecs.
NUMBERS = {
    "in_channels": (3, 3), "out_channels": (3, 3), "latent_channels": (1, 1024), "layers_per_block": (1, 64),
    "norm_num_groups": (1, 1024), "upsampling_scaling_factor": (2, 2),
}  # fmt: skip
LISTS = {
    "block_out_channels": (1, 8192), "encoder_block_out_channels": (1, 8192), "decoder_block_out_channels": (1, 8192),
    "num_encoder_blocks": (1, 64), "num_decoder_blocks": (1, 64),
}  # fmt: skip


def check_codec_config(config: dict[str, Any], path: Path) -> None:
    """Raise InputError, naming the setting, if a configuration has values that are not possible, or is quantized."""
    if config.get("quantization_config") is not None:
        raise InputError(f"{path}: the codec is quantized; allowed: weights of float32, bfloat16 or float16")
    for name, (low, high) in NUMBERS.items():
        value = config.get(name, low)
        if type(value) is not int or not low <= value <= high:
            allowed = low if low == high else f"whole numbers from {low} to {high}"
            raise InputError(f"{path}: {name} is {shown(value)}; allowed: {allowed}")
    for name, (low, high) in LISTS.items():
        values = config.get(name, [low])
        are_numbers = isinstance(values, list) and all(type(value) is int and low <= value <= high for value in values)
        if not are_numbers or not 1 <= len(values) <= MOST_STAGES:
            allowed = f"1 to {MOST_STAGES} whole numbers from {low} to {high}"
            raise InputError(f"{path}: {name} is {shown(values)}; allowed: {allowed}")
