"""The encoders that have a name, and the options `:key=value` that may follow an encoder's name.

Names also come from files: a checkpoint and a data set record theirs. So an option is one of `OPTIONS`, which describe
the architecture. timm has further arguments, for example to load a file, which are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from common.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BEFORE_NORM, AFTER_NORM = TOKENS = ("before-norm", "after-norm")  # where patch tokens are taken: at the last norm
LARGEST_INPUT = 2048  # px; 16,384 tokens with patches of 16 px
LARGEST_GRID = 256  # patches in a row, where `patch_size` is given
# Arguments of timm's models: the highest number, several times that of the largest published encoders; or the texts.
WHOLE = {
    "patch_size": 1024, "embed_dim": 16384, "depth": 256, "num_heads": 1024, "attn_head_dim": 16384, "reg_tokens": 1024,
    "img_size": LARGEST_INPUT, "window_size": 64, "output_stride": 1024, "num_classes": 100_000,
}  # fmt: skip
REAL = {"mlp_ratio": 64, "channel_multiplier": 64, "bn_eps": 1, "init_values": 100}
FLAGS = (
    "class_token", "qkv_bias", "qk_norm", "scale_attn_norm", "pre_norm", "final_norm", "fc_norm", "no_embed_class",
    "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "use_fc_norm", "use_rot_pos_emb", "use_abs_pos_emb",
)  # fmt: skip
TEXTS = {
    "global_pool": ("avg", "avgmax", "max", "token", "map"),
    "pad_type": ("same", "valid"),
    "act_layer": ("relu", "relu6", "gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "hard_swish", "mish", "elu"),
}
OPTIONS = ("input", "mean", "std", "tokens", *WHOLE, *REAL, *FLAGS, *TEXTS)


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """One encoder: the name of its timm model, its input size in px for images of 256 px, and differences from timm.

    `mean` and `std` default to those of the timm model. `prefix` precedes the parameter names in checkpoints of the
    original authors. `local_only` encoders have no weights on the hub and need a file. `tokens` says where the patch
    tokens are taken. `options` are arguments of `timm.create_model`.
    """

    model: str
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    prefix: str = ""
    local_only: bool = False
    tokens: str = AFTER_NORM
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Checkpoints of MoCo v3 contain two networks and a predictor.
MOCO = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "prefix": "module.base_encoder.", "local_only": True}
# input_size gives 16 x 16 tokens for images of 256 px: 224 with patches of 14 px, 256 with patches of 16 px.
# The first names are suggested first.
ENCODERS = {
    "dinov2-vit-b": EncoderSpec("vit_base_patch14_dinov2.lvd142m", 224),  # the encoder of the paper
    "dinov2-vit-s": EncoderSpec("vit_small_patch14_dinov2.lvd142m", 224),
    "dinov2-vit-l": EncoderSpec("vit_large_patch14_dinov2.lvd142m", 224),
    "dinov2-vit-g": EncoderSpec("vit_giant_patch14_dinov2.lvd142m", 224),
    "dinov2reg-vit-s": EncoderSpec("vit_small_patch14_reg4_dinov2.lvd142m", 224),
    "dinov2reg-vit-b": EncoderSpec("vit_base_patch14_reg4_dinov2.lvd142m", 224),
    "dinov2reg-vit-l": EncoderSpec("vit_large_patch14_reg4_dinov2.lvd142m", 224),
    "dinov2reg-vit-g": EncoderSpec("vit_giant_patch14_reg4_dinov2.lvd142m", 224),
    "dinov3-vit-s": EncoderSpec("vit_small_patch16_dinov3.lvd1689m", 256),
    "dinov3-vit-b": EncoderSpec("vit_base_patch16_dinov3.lvd1689m", 256),
    "dinov3-vit-l": EncoderSpec("vit_large_patch16_dinov3.lvd1689m", 256),
    "dinov1-vit-b": EncoderSpec("vit_base_patch16_224.dino", 256),
    # OpenAI trained with QuickGELU; timm's model without `quickgelu` uses another GELU with the same weights.
    "clip-vit-b": EncoderSpec("vit_base_patch16_clip_quickgelu_224.openai", 256, tokens=BEFORE_NORM),
    "clip-vit-L": EncoderSpec("vit_large_patch14_clip_quickgelu_224.openai", 224, tokens=BEFORE_NORM),
    "mae-vit-b": EncoderSpec("vit_base_patch16_224.mae", 256, tokens=BEFORE_NORM),
    "mae-vit-l": EncoderSpec("vit_large_patch16_224.mae", 256, tokens=BEFORE_NORM),
    "mocov3-vit-s": EncoderSpec("vit_small_patch16_224", 256, **MOCO, options={"num_heads": 12}),  # heads of 32
    "mocov3-vit-b": EncoderSpec("vit_base_patch16_224", 256, **MOCO),
    "mocov3-vit-l": EncoderSpec("vit_large_patch16_224", 256, **MOCO),
    "jepa-vit-h": EncoderSpec("vit_huge_patch14_gap_224.in1k_ijepa", 224),
    "siglip-vit-b": EncoderSpec("vit_base_patch16_siglip_256.webli", 256),
    "siglip2-vit-b": EncoderSpec("vit_base_patch16_siglip_256.v2_webli", 256),
}


def parse_options(spec: str, texts: list[str]) -> dict[str, Any]:
    """Return the options `key=value` that follow the name of an encoder, with values of the right type.

    `input` is a whole number, `mean` and `std` are three numbers, `tokens` is one of `TOKENS`; the others are arguments
    of the timm model. Raises InputError, naming the allowed keys or values, for anything else.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"encoder {spec}: option {text!r}; allowed: key=value")
        if key not in OPTIONS:
            raise InputError(f"encoder {spec}: option {key!r} is unknown; allowed: {', '.join(OPTIONS)}")
        if key in options:
            raise InputError(f"encoder {spec}: option {key} is given twice")
        options[key] = _parse_value(spec, key, value)
    size, patch = options.get("input", 0), options.get("patch_size", LARGEST_INPUT)
    if size > patch * LARGEST_GRID:
        raise InputError(f"encoder {spec}: an input of {size} px has more than {LARGEST_GRID} patches in a row")
    return options


def _parse_value(spec: str, key: str, text: str) -> Any:
    """Return the value of an option. Raises InputError, which says what is allowed."""
    if key in ("mean", "std"):
        return _three_numbers(spec, key, text)
    if key == "input":
        return _number(spec, key, text, int, 1, LARGEST_INPUT, "a whole number of px")
    if key in WHOLE:
        return _number(spec, key, text, int, 0, WHOLE[key], "a whole number")
    if key in REAL:
        return _number(spec, key, text, float, 0, REAL[key], "a number")
    allowed = TOKENS if key == "tokens" else TEXTS.get(key, ("true", "false"))
    value = text.lower() if key in FLAGS else text
    if value not in allowed:
        raise InputError(f"encoder {spec}: {key}={text}; allowed: {', '.join(allowed)}")
    return value == "true" if key in FLAGS else value


def _number(spec: str, key: str, text: str, kind: type, low: float, high: float, what: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"encoder {spec}: {key}={text}; allowed: {what} from {low} to {high}")
    return value


def _three_numbers(spec: str, key: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split("/"))
    except ValueError:
        numbers = ()
    is_allowed = all(map(math.isfinite, numbers)) and (key == "mean" or all(number > 0 for number in numbers))
    if len(numbers) not in (1, 3) or not is_allowed:
        raise InputError(f"encoder {spec}: {key}={text}; allowed: one number, or three with slashes (std above 0)")
    return numbers * (3 // len(numbers))
