"""The description of a network, from which it is built: its sizes and switches (SR-DiT's, arXiv 2512.12386)."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from common.checks import Check
from common.errors import InputError
from models.field_checks import Share, check_fields

# Depth, width and heads (DiT, table 1).
PRESETS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (1, 2, 4, 8)
# The projectors read the output of this block, counted from 1 (REPA, section 4; REG, table 5 for B).
ENCODER_DEPTHS = {"S": 4, "B": 4, "L": 8, "XL": 8}
FIRST_ENCODER = -1  # value of `cls_token_dim`: the width of the first encoder

NORMS = ("layer", "rms")
QK_NORMS = ("none", "layer", "rms")
OUTER_BLOCKS = 2  # with SPRINT, the blocks before and after the routed blocks, which all tokens go through
SPRINT_ENCODER_DEPTH = OUTER_BLOCKS  # default with SPRINT: the last block before the routed blocks
PROJECTORS = ("mlp", "conv")  # REPA's, and that of iREPA (arXiv 2512.10794)


def qk_norm_name(value: Any) -> Any:
    """Return the name, one of `QK_NORMS`, of a value of `qk_norm` in a file; False and True are none and layer."""
    return {False: "none", True: "layer"}[value] if type(value) is bool else value


def depths_as_setting(encoder_depth: int | tuple[int, ...]) -> int | str:
    """Return an `encoder_depth` as settings have it: a number, or a text such as 2,4 for several."""
    return encoder_depth if isinstance(encoder_depth, int) else ",".join(map(str, encoder_depth))


def depths_of_setting(value: Any) -> Any:
    """Return the `encoder_depth` that `depths_as_setting` converted; other values are returned as they are."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value):
        return tuple(map(int, value.split(",")))
    return value


def parse_depths(text: str) -> int | str:
    """Return the value of a flag --encoder-depth, to be checked by `DEPTHS`."""
    text = text.replace(" ", "")
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def _are_depths(value: int | str) -> bool:
    depths = depths_of_setting(str(value))
    return isinstance(depths, tuple) and depths[0] > 0 and list(depths) == sorted(set(depths))


DEPTHS = Check("a block number from 1, or several different ones, ascending and separated by commas", _are_depths)


def default_encoder_depth(size: str, sprint: bool) -> int:
    """Return the block that the projectors of a preset, a key of `PRESETS`, read."""
    return SPRINT_ENCODER_DEPTH if sprint else ENCODER_DEPTHS[size]


@dataclasses.dataclass(frozen=True)
class SiTConfig:
    """Description of a network, saved in every checkpoint. Raises ValueError if sizes do not fit together."""

    input_size: int = 32  # height and width of the latents
    patch_size: int = 2  # height and width of a patch, in latent pixels
    in_channels: int = 4  # channels of the latents
    hidden_size: int = 1152  # width of the tokens
    depth: int = 28  # number of blocks
    num_heads: int = 16  # attention heads of each block
    mlp_ratio: float = 4.0  # inner width of each block's MLP, divided by hidden_size
    num_classes: int = 1000  # without the null class, which has the index num_classes
    # The projectors read the output of this block, counted from 1, or of these; the projectors of a block come after
    # those of the block before it.
    encoder_depth: int | tuple[int, ...] = 8
    z_dims: tuple[int, ...] = (768,)  # width of each encoder to align with; empty for no projectors
    projector_dim: int = 2048  # inner width of the projectors
    cls_token_dim: int | None = FIRST_ENCODER  # width of the class token; None for no class slot
    qk_norm: str | bool = "none"  # norm of queries and keys, one of `QK_NORMS`; False: none, True: layer
    learnable_token: bool = False  # a learned token in the class slot, not noised and not denoised (REG, an ablation)
    norm: str = "layer"  # norm of the tokens, one of `NORMS`
    rope: bool = False  # rotary positions of queries and keys, see models/rope.py
    value_residual: bool = False  # each block mixes the values of the first block into its own
    sprint: bool = False  # in training, the middle blocks see a part of the tokens, see models/sprint.py
    sprint_keep: Share = 0.25  # SPRINT: this part of the tokens goes through the middle blocks
    sprint_path_drop: Share = 0.05  # SPRINT: probability that the output of the middle blocks is dropped in a step
    projector: str = "mlp"  # kind of the projectors, one of `PROJECTORS`
    standardized_cls: bool = False  # the class token is standardised per channel, see models/class_scale.py
    cls_lead: Share = 0.0  # the class token is denoised ahead of the latents by this time, see models/cls_lead.py

    def __post_init__(self) -> None:
        cls_token_dim = self.cls_token_dim or None
        if cls_token_dim == FIRST_ENCODER:
            cls_token_dim = self.z_dims[0] if self.z_dims and not self.learnable_token else None
        object.__setattr__(self, "cls_token_dim", cls_token_dim)  # the way to set a field of a frozen dataclass
        object.__setattr__(self, "z_dims", tuple(self.z_dims))
        object.__setattr__(self, "qk_norm", qk_norm_name(self.qk_norm))
        depths = self.encoder_depths
        object.__setattr__(self, "encoder_depth", depths[0] if len(depths) == 1 else depths)
        if self.learnable_token and cls_token_dim:
            raise ValueError(f"cls_token_dim {cls_token_dim} and learnable_token: there is one slot for one of them")
        size, patch = self.input_size, self.patch_size
        if not 1 <= patch <= size or size % patch:
            raise ValueError(f"latents of {size} x {size} do not divide into patches of {patch}")
        if self.num_heads < 1 or self.hidden_size % math.lcm(self.num_heads, 4):  # 4: parts of the position table
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads} and of 4")
        if not depths or list(depths) != sorted(set(depths)):
            raise ValueError(f"encoder_depth {list(depths)}: must be different numbers in ascending order")
        for number in depths if self.z_dims else ():
            if not 1 <= number <= self.depth:
                raise ValueError(f"encoder_depth {number} is outside 1 .. {self.depth}, the number of blocks")
        self._check_switches()

    def _check_switches(self) -> None:
        for name, allowed in (("norm", NORMS), ("qk_norm", QK_NORMS), ("projector", PROJECTORS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} {value}: allowed: {', '.join(allowed)}")
        if self.standardized_cls and not self.cls_token_dim:
            raise ValueError("standardized_cls: there is no class token, cls_token_dim is null")
        if self.rope and self.head_size % 4:
            raise ValueError(f"rope: the width of a head, {self.head_size}, is not a multiple of 4")
        if not 0 <= self.cls_lead <= 1:
            raise ValueError(f"cls_lead {self.cls_lead}: must be from 0 to 1")
        if self.cls_lead and not self.cls_token_dim:
            raise ValueError(f"cls_lead {self.cls_lead}: needs a class token that is denoised, and there is none")
        if not self.sprint:
            return
        if self.depth <= 2 * OUTER_BLOCKS:
            raise ValueError(f"sprint with a depth of {self.depth} blocks: needs {2 * OUTER_BLOCKS + 1} or more")
        if self.z_dims and (wrong := [number for number in self.encoder_depths if number in self.routed_blocks]):
            first, last = self.routed_blocks[0], self.routed_blocks[-1]
            raise ValueError(
                f"encoder_depth {wrong[0]} is one of the routed blocks {first} .. {last} of sprint, which see some of "
                f"the tokens; allowed: 1, 2, {last + 1}, {last + 2}"
            )
        for name in ("sprint_keep", "sprint_path_drop"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {value}: must be from 0 to 1")
        if self.kept_tokens < 1:
            raise ValueError(f"sprint_keep {self.sprint_keep} of {self.tokens} tokens keeps none")

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches in a row and in a column."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image: its patches, and the class slot if there is one."""
        return self.grid_size**2 + (1 if self.cls_token_dim or self.learnable_token else 0)

    @property
    def kept_tokens(self) -> int:
        """Tokens of an image that go through the routed blocks in training."""
        return int(self.tokens * self.sprint_keep)

    @property
    def encoder_depths(self) -> tuple[int, ...]:
        """Numbers of the blocks whose output the projectors read, ascending and counted from 1."""
        return (self.encoder_depth,) if isinstance(self.encoder_depth, int) else tuple(self.encoder_depth)

    @property
    def least_depth(self) -> int:
        """Smallest number of blocks of a network with these switches and as many encoder depths."""
        return max(2 * OUTER_BLOCKS + 1 if self.sprint else 1, len(self.encoder_depths) if self.z_dims else 1)

    def with_depth(self, depth: int) -> SiTConfig:
        """Return this description with another number of blocks, and as many encoder depths at its first blocks.

        With SPRINT, they are at the first blocks that are not routed.
        """
        first = [number for number in range(1, depth + 1) if number not in self._routed(depth)]
        return dataclasses.replace(self, depth=depth, encoder_depth=tuple(first[: len(self.encoder_depths)]))

    @property
    def routed_blocks(self) -> range:
        """Numbers of the routed blocks of SPRINT, counted from 1; empty without SPRINT."""
        return self._routed(self.depth)

    def _routed(self, depth: int) -> range:
        return range(OUTER_BLOCKS + 1, depth - OUTER_BLOCKS + 1) if self.sprint else range(0)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, the same as before for a network without the added switches.

        `z_dims` and several encoder depths are lists. `qk_norm` is false, true for LayerNorm, or "rms". Switches that
        are off are not written.
        """
        fields = {**dataclasses.asdict(self), "z_dims": list(self.z_dims)}
        if isinstance(self.encoder_depth, tuple):
            fields["encoder_depth"] = list(self.encoder_depth)
        fields["qk_norm"] = {"none": False, "layer": True}.get(self.qk_norm, self.qk_norm)
        off = {name for name, default in self.added_fields().items() if fields[name] == default}
        return {name: value for name, value in fields.items() if name not in off}

    @classmethod
    def added_fields(cls) -> dict[str, Any]:
        """Return the defaults of the fields that a description in a file may lack: those of the added switches."""
        sprint = ("sprint", "sprint_keep", "sprint_path_drop")
        names = ("norm", "rope", "value_residual", *sprint, "projector", "standardized_cls", "cls_lead")
        return {field.name: field.default for field in dataclasses.fields(cls) if field.name in names}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SiTConfig:
        """Return the configuration that `to_json` wrote.

        Raises InputError, naming the fields, if some are missing, unknown, of a wrong type, or do not fit together.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        if wrong := set(cls.added_fields() | fields if isinstance(fields, dict) else ()) ^ set(kinds):
            names = ", ".join(sorted(map(str, wrong)))
            raise InputError(f"network: missing or unknown fields {names}; expected {', '.join(kinds)}")
        check_fields(fields, {name: kinds[name] for name in fields})
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"network: {error}") from error
