"""Image codecs: images to latents and back, through diffusers. The only home of the scale and shift of latents.

Latent diffusion (Rombach et al., arXiv 2112.10752, section 3.1 and appendix G); REG uses Stable Diffusion's codec.
In this project `moments` are mean and STANDARD DEVIATION stacked on the channels, as they lie on the disk; diffusers'
own word means mean and log-variance. `latents` are a sample of them, shifted and scaled: what the network sees.

A codec of one's own is a line in `CODECS`, or a folder (or repository of the hub) as diffusers saves it, whose
config.json says channels, factor, scale and shift.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.io import InputError, read_json
from models.hub import hub_file

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DECODED_PIXELS = 2**21  # at a time, 32 images of 256 px: far more, and activations pass 2^31 values
SD_SCALE = 0.18215  # makes Stable Diffusion's latents about unit variance (arXiv 2112.10752, appendix G)


@dataclasses.dataclass(frozen=True)
class LatentFormat:
    """What latents are: their codec, channels, image pixels per latent pixel, and the map to about unit variance.

    `scale` and `shift` are one number or one for each channel: latents = (sample - shift) * scale.
    """

    codec: str
    channels: int
    factor: int
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        if not all(isinstance(value, int) and value > 0 for value in (self.channels, self.factor)):
            raise InputError(
                f"codec {self.codec}: channels {self.channels!r}, factor {self.factor!r}; allowed: whole numbers from 1"
            )
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise InputError(
                    f"codec {self.codec}: {name} has {len(value)} values for {self.channels} channels; allowed: "
                    f"one number, or one for each channel"
                )
            for number in value if isinstance(value, tuple) else (value,):
                if not _is_finite(number) or (name == "scale" and number == 0):
                    allowed = "finite numbers" + (" other than 0" if name == "scale" else "")
                    raise InputError(f"codec {self.codec}: {name} has the value {number!r}; allowed: {allowed}")

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """Return latents (N, C, h, w) = (mean + std * noise - shift) * scale.

        moments (N, 2C, h, w): mean, then standard deviation; noise (N, C, h, w), standard normal, or None for the mean.
        Raises InputError if the moments have another number of channels.
        """
        if moments.shape[1] != 2 * self.channels:
            raise InputError(
                f"moments have {moments.shape[1]} channels, but codec {self.codec} has {2 * self.channels} "
                f"(mean and standard deviation of {self.channels})"
            )
        mean, std = moments.chunk(2, dim=1)
        latents = mean if noise is None else mean + std * noise
        return (latents - _per_channel(self.shift, latents)) * _per_channel(self.scale, latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return what the codec decodes, (N, C, h, w) = latents / scale + shift: the way back from `sample`."""
        return latents / _per_channel(self.scale, latents) + _per_channel(self.shift, latents)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, for a data set's dataset.json and a run's settings."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any] | None) -> LatentFormat:
        """Return the format that `to_json` wrote; None, as in the published data sets, means Stable Diffusion's.

        Raises InputError, naming them, for fields that are missing or unknown or have impossible values.
        """
        if fields is None:
            return SD_FORMAT
        expected = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != expected:
            raise InputError(f"latent format {fields!r}: must have exactly the fields {', '.join(sorted(expected))}")
        if not isinstance(fields["codec"], str):
            raise InputError(f"latent format {fields!r}: codec must be a name")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """Return a number as it is, and one number for each channel as (C, 1, 1), to broadcast over (N, C, h, w)."""
    return _on_device(value, like.device, like.dtype) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=8)  # copying it to a GPU each time would make each training step wait
def _on_device(value: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, device=device, dtype=dtype)[:, None, None]


SD_FORMAT = LatentFormat(codec="sd-vae-ft-mse", channels=4, factor=8, scale=SD_SCALE, shift=0.0)


@dataclasses.dataclass(frozen=True)
class CodecSpec:
    """Where a codec's files lie, and the scale and shift of its latents where its own config.json does not tell.

    `source` is a repository of the hub, `owner/name` or `owner/name/subfolder`, or a local folder.
    """

    source: str
    scale: float | tuple[float, ...] | None = None
    shift: float | tuple[float, ...] | None = None


# Channels, factor, and what a line leaves out, come from the codec's own config.json.
CODECS = {
    # Stable Diffusion's configs are older than the entry for the scale.
    "sd-vae-ft-mse": CodecSpec("stabilityai/sd-vae-ft-mse", scale=SD_SCALE, shift=0.0),
    "sd-vae-ft-ema": CodecSpec("stabilityai/sd-vae-ft-ema", scale=SD_SCALE, shift=0.0),
    "taesd": CodecSpec("madebyollin/taesd", scale=1.0, shift=0.0),  # works on latents that are scaled already
    "sdxl-vae": CodecSpec("stabilityai/sdxl-vae"),
    "sd3-vae": CodecSpec("stabilityai/stable-diffusion-3-medium-diffusers/vae"),  # 16 channels
    "flux-vae": CodecSpec("black-forest-labs/FLUX.1-schnell/vae"),  # 16 channels
}
SHORT_NAMES = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}


class Codec(nn.Module):
    """A frozen image codec: uint8 images to moments, latents to uint8 images. `format` says what its latents are."""

    def __init__(self, latent_format: LatentFormat):
        super().__init__()
        self.format = latent_format

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, by the name that diffusers' pipelines ask for; float32 where there are none."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> Codec:
        """Stay in evaluation mode, whatever a parent module is set to."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments (N, 2C, h, w), float32: the mean, then the standard deviation (0 where a codec has none).

        images (N, 3, H, W), uint8, 0-255, enter the network as x/127.5 - 1.
        Raises InputError if H or W is not a multiple of the codec's factor.
        """
        height, width = images.shape[-2:]
        factor = self.format.factor
        if height % factor or width % factor:
            raise InputError(
                f"images of {height} x {width} px: codec {self.format.codec} needs multiples of {factor} px"
            )
        return self._moments((images.float() / 127.5 - 1).to(self.dtype)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, H, W), uint8 = clamp(127.5 x + 127.5, 0, 255) of the decoded latents (N, C, h, w)."""
        at_once = max(1, DECODED_PIXELS // (latents.shape[-2] * latents.shape[-1] * self.format.factor**2))
        return torch.cat([self._pixels(part) for part in latents.float().split(at_once)])

    def _pixels(self, latents: Tensor) -> Tensor:
        pixels = self._image(self.format.unscale(latents).to(self.dtype)).float()
        return self._quantise((127.5 * pixels + 127.5).clamp(0, 255))

    def _moments(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _image(self, unscaled: Tensor) -> Tensor:
        raise NotImplementedError

    def _quantise(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.uint8)  # cut, not rounded: so the published images, and their FID, were made


class KLCodec(Codec):
    """An `AutoencoderKL`: a normal distribution for each latent value."""

    def __init__(self, autoencoder: nn.Module, latent_format: LatentFormat):
        super().__init__(latent_format)
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    def _moments(self, pixels: Tensor) -> Tensor:
        distribution = self.autoencoder.encode(pixels).latent_dist
        return torch.cat([distribution.mean, distribution.std], dim=1)

    def _image(self, unscaled: Tensor) -> Tensor:
        return self.autoencoder.decode(unscaled).sample


class TinyCodec(KLCodec):
    """An `AutoencoderTiny` (TAESD): latents without a variance."""

    def _moments(self, pixels: Tensor) -> Tensor:
        mean = self.autoencoder.encode(pixels).latents
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)


class PixelCodec(Codec):
    """No codec: the image itself, -1..1, is the latent; every one of the 256 levels comes back exactly."""

    def __init__(self) -> None:
        super().__init__(LatentFormat(codec="pixel", channels=3, factor=1))

    def _moments(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels, torch.zeros_like(pixels)], dim=1)

    def _image(self, unscaled: Tensor) -> Tensor:
        return unscaled

    def _quantise(self, pixels: Tensor) -> Tensor:
        # Cutting is the rule for a decoder network's output. Here it would take a level off whatever comes back a
        # rounding error too low: none of the 256 after float32, but half of them after storage as float16.
        return pixels.round().to(torch.uint8)


def load_codec(name: str, device: str | torch.device = "cpu") -> Codec:
    """Return the frozen codec `name`: a line of `CODECS`, `pixel`, a local folder, or a repository of the hub.

    Folder and repository hold config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL or
    AutoencoderTiny. Raises InputError if there is no such codec, its files are not usable, or the hub is out of reach.
    """
    if name == "pixel":
        return PixelCodec().to(device)
    spec = CODECS.get(name, CodecSpec(name))
    folder = _codec_folder(name, spec.source)
    config = read_json(folder / CONFIG_FILE)
    autoencoder = _load_autoencoder(folder, config)
    codec_class = TinyCodec if _class_name(folder, config) == "AutoencoderTiny" else KLCodec
    return codec_class(autoencoder, _latent_format(name, spec, folder, config)).to(device)


def load_decoder(latent_format: LatentFormat, name: str | None = None, device: str | torch.device = "cpu") -> Codec:
    """Return the frozen codec that decodes latents of this format.

    `name` is as for `load_codec`, or "ema", "mse" for Stable Diffusion's. Default: the codec that made the latents,
    except that sd-vae-ft-ema decodes the latents of sd-vae-ft-mse. Raises InputError if the codec has other latents.
    """
    name = SHORT_NAMES.get(name, name)
    if name is None:
        name = "sd-vae-ft-ema" if latent_format.codec == "sd-vae-ft-mse" else latent_format.codec
    codec = load_codec(name, device)
    for what in ("channels", "factor"):
        found, needed = getattr(codec.format, what), getattr(latent_format, what)
        if found != needed:
            raise InputError(f"--vae {name}: its {what} is {found}, but that of the latents is {needed}")
    return codec


def _codec_folder(name: str, source: str) -> Path:
    """Return the local folder of a codec's files; those of a repository of the hub are fetched first."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") not in (1, 2) or source.startswith((".", "/", "~")):
        raise InputError(
            f"codec {name}: no such folder; allowed: pixel, {', '.join(CODECS)}, a local folder holding {CONFIG_FILE} "
            f"and {WEIGHTS_FILE}, or a repository of the hub (owner/name or owner/name/subfolder)"
        )
    owner, repo, *subfolder = source.split("/")
    instead = (
        f"Put {CONFIG_FILE} and {WEIGHTS_FILE} of https://huggingface.co/{owner}/{repo} into a folder and give "
        f"that folder instead of {name}"
    )
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        path = hub_file(f"{owner}/{repo}", "/".join([*subfolder, file]), instead)
    return path.parent


def _class_name(folder: Path, config: Any) -> str:
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise InputError(
            f"{folder / CONFIG_FILE}: _class_name is {class_name!r}; allowed: AutoencoderKL, AutoencoderTiny"
        )
    return class_name


def _load_autoencoder(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Return diffusers' module with the folder's weights, every one of which must find its place."""
    class_name = _class_name(folder, config)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; a codec's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    import diffusers
    from safetensors import SafetensorError

    diffusers.logging.set_verbosity_error()  # it warns of what is checked below
    try:
        autoencoder, report = getattr(diffusers, class_name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise InputError(f"{weights}: cannot be loaded as {class_name} of {CONFIG_FILE} beside it ({error})") from error
    problems = {kind: keys for kind, keys in report.items() if keys}
    if problems:
        raise InputError(f"{weights}: does not fit {class_name} of {CONFIG_FILE} beside it: {problems}")
    return autoencoder


def _latent_format(name: str, spec: CodecSpec, folder: Path, config: dict[str, Any]) -> LatentFormat:
    """Return the format that config.json tells, in diffusers' convention, where the codec's line does not overrule it.

    scale = scaling_factor / latents_std, shift = shift_factor or latents_mean (one number, or one for each channel).
    """
    is_tiny = config["_class_name"] == "AutoencoderTiny"
    std, mean = config.get("latents_std"), config.get("latents_mean")
    # Stable Diffusion's first configs leave the factor out; statistics for each channel leave nothing for it to do.
    scale = config.get("scaling_factor") or (1.0 if is_tiny or std else SD_SCALE)
    shift = config.get("shift_factor") or 0.0
    if std:
        scale = tuple(scale / value for value in std)
    if mean:
        shift = tuple(mean)
    stages = config.get("num_encoder_blocks" if is_tiny else "block_out_channels")
    if not stages or not config.get("latent_channels"):
        raise InputError(f"{folder / CONFIG_FILE}: latent_channels and the numbers of the encoder's blocks are missing")
    is_local = spec.source == name and Path(name).is_dir()
    return LatentFormat(
        codec=str(folder.resolve()) if is_local else name,  # written into data sets, which are read from anywhere
        channels=config["latent_channels"],
        factor=2 ** (len(stages) - 1),  # the resolution halves between one stage and the next
        scale=scale if spec.scale is None else spec.scale,
        shift=shift if spec.shift is None else spec.shift,
    )
