"""The format of latents, and the map between a codec's latents and the input of the network.

Latents are stored as moments, mean and STANDARD DEVIATION stacked on the channels (in diffusers the word means mean and
log-variance), or as one draw from them. Scale and shift are applied only here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError, shown
from models.field_checks import LARGEST_CODEC_SIZE
from models.tensor_checks import LONGEST_NAME

LARGEST = 1e12  # of a scale's or shift's size: beyond, latents overflow or vanish in float32
SCALES = f"numbers whose size is from {1 / LARGEST:g} to {LARGEST:g}"
SD_SCALE = 0.18215  # gives Stable Diffusion's latents about unit variance (arXiv 2112.10752, appendix G)


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """Format of latents: codec, channels, image pixels per latent pixel, and the map to about unit variance.

    `scale` and `shift` are one number, or one number for each channel: latents = (sample - shift) * scale. A `scale` of
    None means that they are not known: the codec's files do not contain them, and they have to be measured.
    Raises InputError, naming the field, for impossible values.
    """

    codec: str
    channels: int
    factor: int
    scale: float | tuple[float, ...] | None = 1.0
    shift: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        codec, channels = f"codec {self.codec}", self.channels
        if not all(type(value) is int and 0 < value <= LARGEST_CODEC_SIZE for value in (channels, self.factor)):
            given = f"channels {shown(channels)}, factor {shown(self.factor)}"
            raise InputError(f"{codec}: {given}; allowed: whole numbers from 1 to {LARGEST_CODEC_SIZE}")
        for name, allowed in (("scale", SCALES), ("shift", f"numbers from -{LARGEST:g} to {LARGEST:g}")):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != channels:
                count = f"{name} has {len(value)} values for {channels} channels"
                raise InputError(f"{codec}: {count}; allowed: one number, or one for each channel")
            if name == "scale" and value is None:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                is_number = isinstance(number, int | float) and not isinstance(number, bool)
                if not is_number or not (1 / LARGEST if name == "scale" else 0) <= abs(number) <= LARGEST:
                    raise InputError(f"{codec}: {name} has the value {shown(number)}; allowed: {allowed}")

    @property
    def is_per_channel(self) -> bool:
        """Whether each channel has its own scale or shift."""
        return isinstance(self.scale, tuple) or isinstance(self.shift, tuple)

    def check_statistics(self) -> None:
        """Raise InputError if scale and shift are not known."""
        if self.scale is None:
            raise InputError(
                f"codec {self.codec} has no statistics: neither its config.json (scaling_factor, latents_std) nor the "
                "data state the scale and shift of its latents; preprocessing/encode.py measures and records them"
            )

    def sample(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Return latents (N, C, h, w) = (mean + std * noise - shift) * scale; for stored draws, (draw - shift) * scale.

        stored: moments (N, 2C, h, w), mean, then standard deviation; or one draw of each image, (N, C, h, w).
        noise (N, C, h, w): standard normal; None for the mean. It is not used for stored draws.
        Raises InputError for another number of channels, and if the codec has no statistics.
        """
        self.check_statistics()
        if stored.shape[1] == self.channels:
            latents = stored
        elif stored.shape[1] == 2 * self.channels:
            mean, std = stored.chunk(2, dim=1)
            latents = mean if noise is None else mean + std * noise
        else:
            needed = f"{2 * self.channels} (mean and standard deviation of {self.channels}) or {self.channels} (a draw)"
            raise InputError(f"moments have {stored.shape[1]} channels, but codec {self.codec} has {needed}")
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return the input of the codec's decoder, (N, C, h, w) = latents / scale + shift: the inverse of `sample`.

        Raises InputError if the codec has no statistics.
        """
        self.check_statistics()
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, for dataset.json and for the settings of a run."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any] | None) -> LatentFormat:
        """Return the format that `to_json` wrote. None, as in the published data sets, means Stable Diffusion's format.

        Raises InputError, naming the fields, if some are missing or unknown, or have impossible values.
        """
        if fields is None:
            return SD_FORMAT
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != expected:
            raise InputError(
                f"latent format {shown(fields)}: must have exactly the fields {', '.join(sorted(expected))}"
            )
        if not isinstance(fields["codec"], str) or len(fields["codec"]) > LONGEST_NAME:
            raise InputError(f"latent format {shown(fields)}: codec must be a name")
        if fields["scale"] is None:
            raise InputError(f"codec {fields['codec']}: scale has the value null; allowed: {SCALES}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """Return one number unchanged, and numbers for each channel as (C, 1, 1), to broadcast over (N, C, h, w)."""
    return _on_device(value, like.device, like.dtype) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=8)  # a copy to a GPU in each training step would synchronise with it
def _on_device(value: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, device=device, dtype=dtype)[:, None, None]


SD_FORMAT = LatentFormat(codec="sd-vae-ft-mse", channels=4, factor=8, scale=SD_SCALE, shift=0.0)
