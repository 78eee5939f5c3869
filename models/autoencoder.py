"""Image codecs: images to latents and back, through diffusers. `models.latent_format` describes the latents.

Latent diffusion (Rombach et al., arXiv 2112.10752, section 3.1 and appendix G); REG uses Stable Diffusion's codec.
In this project `moments` are mean and STANDARD DEVIATION stacked on the channels, as the files of latents store them;
in diffusers the word means mean and log-variance. `latents` are a sample of the moments, shifted and scaled: the input
of the network.

To add a codec, add a line to `CODECS`, or give a folder or a repository of the Hugging Face hub in diffusers' format,
whose config.json determines channels, factor, scale and shift. If it has no scale, preprocessing/encode.py measures
scale and shift and writes them into the data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InputError, memory_message
from common.io import read_json, real_path
from models.checksums import verify_file
from models.field_checks import check_codec_config
from models.hub import HubName, hub_folder, local_or_hub
from models.latent_format import SD_FORMAT, SD_SCALE, LatentFormat
from models.safetensors_format import CODEC_FOLDER, CONFIG_FILE, PIPELINE_FILE, class_name
from models.tensor_checks import TooLargeError, check_finite, check_weights, parameters_at_most
from models.weights_file import mismatch, read_safetensors, some_of

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
NEEDED = f"the folder of a codec contains {CONFIG_FILE} and {WEIGHTS_FILE}"
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
DECODED_PIXELS = 2**21  # in one call, 32 images of 256 px; far more would need activations of more than 2^31 values
LOCAL_CODEC = "local folder "  # starts the name of a codec in an export that does not contain its files


@dataclasses.dataclass(frozen=True)
class CodecSpec:
    """Source of a codec's files, and scale and shift of its latents if its config.json lacks them.

    `source` is a repository of the hub, `owner/name` or `owner/name/subfolder`, or a local folder.
    """

    source: str
    scale: float | tuple[float, ...] | None = None
    shift: float | tuple[float, ...] | None = None


PUBLISHED_NAMES = {"ema": "sd-vae-ft-ema", "mse": "sd-vae-ft-mse"}  # of codecs, on the published command line
# Channels, factor, and the scale and shift that a line does not give, come from the codec's config.json.
CODECS = {
    # The config.json of these two has no entry for the scale.
    "sd-vae-ft-mse": CodecSpec("stabilityai/sd-vae-ft-mse", scale=SD_SCALE, shift=0.0),
    "sd-vae-ft-ema": CodecSpec("stabilityai/sd-vae-ft-ema", scale=SD_SCALE, shift=0.0),
    "taesd": CodecSpec("madebyollin/taesd", scale=1.0, shift=0.0),  # works on scaled latents
    "sdxl-vae": CodecSpec("stabilityai/sdxl-vae"),
    "sd3-vae": CodecSpec("stabilityai/stable-diffusion-3-medium-diffusers/vae"),  # 16 channels
    "flux-vae": CodecSpec("black-forest-labs/FLUX.1-schnell/vae"),  # 16 channels
    # VA-VAE (arXiv 2501.01423) and IN-VAE: factor 16, 32 channels.
    "va-vae": CodecSpec("REPA-E/vavae-hf"),
    "in-vae": CodecSpec("REPA-E/invae-hf"),
    # Codecs trained end to end with the transformer (REPA-E, arXiv 2504.10483). Factor 16, 32 channels: e2e-vavae and
    # e2e-invae; factor 8: e2e-sdvae with 4 channels, the last two with 16.
    "e2e-sdvae": CodecSpec("REPA-E/e2e-sdvae-hf"),
    "e2e-vavae": CodecSpec("REPA-E/e2e-vavae-hf"),
    "e2e-invae": CodecSpec("REPA-E/e2e-invae-hf", scale=0.3099, shift=0.0),  # as in SR-DiT (arXiv 2512.12386)
    "e2e-flux-vae": CodecSpec("REPA-E/e2e-flux-vae"),
    "e2e-sd3.5-vae": CodecSpec("REPA-E/e2e-sd3.5-vae"),
}


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of a codec's weights on a device; see `Codec`."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _accurate(x: Tensor) -> Tensor:
    """Return the input of a codec's network in a memory format in which it computes accurately."""
    return x if x.device.type == "cuda" else x.contiguous()


class Codec(nn.Module):
    """A frozen image codec: uint8 images to moments, latents to uint8 images. `format` describes its latents.

    Subclasses define `_moments(pixels)` and `_image(unscaled)`, with pixels from -1 to 1 and latents before scaling.

    Weights are channels_last on CUDA, where convolutions are faster in this format. On other devices weights and inputs
    are contiguous: on a CPU, PyTorch's GroupNorm is inaccurate in channels_last if the mean of a group is much larger
    than its standard deviation.
    """

    def __init__(self, latent_format: LatentFormat):
        super().__init__()
        self.format = latent_format

    @property
    def is_tiny(self) -> bool:
        """Whether the codec is an AutoencoderTiny, which takes the scaled latents of the codec that it imitates."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, float32 without any; diffusers' pipelines read this attribute."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the parameters, the CPU without any; diffusers' pipelines read this attribute."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def to(self, *args: Any, **kwargs: Any) -> Codec:
        """Move the codec as `nn.Module.to` does, and give it the memory format of its device."""
        super().to(*args, **kwargs)
        return super().to(memory_format=memory_format(self.device))

    def train(self, mode: bool = True) -> Codec:
        """Stay in eval mode if a parent module is set to training mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return moments (N, 2C, h, w), float32: the mean, then the standard deviation (0 if a codec has none).

        images (N, 3, H, W), uint8, 0-255; the input of the codec's network is x/127.5 - 1.
        Raises InputError if H or W is not a multiple of the codec's factor.
        """
        height, width = images.shape[-2:]
        factor = self.format.factor
        if height % factor or width % factor:
            needed = f"codec {self.format.codec} needs multiples of {factor} px"
            raise InputError(f"images of {height} x {width} px: {needed}")
        return self._moments(_accurate((images.float() / 127.5 - 1).to(self.dtype))).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, H, W), uint8 = clamp(127.5 x + 127.5, 0, 255) of the decoded latents (N, C, h, w)."""
        at_once = max(1, DECODED_PIXELS // (latents.shape[-2] * latents.shape[-1] * self.format.factor**2))
        parts = _accurate(latents.float()).split(at_once)
        unscaled = (self.format.unscale(part).to(self.dtype) for part in parts)
        return torch.cat([self._quantise((127.5 * self._image(x).float() + 127.5).clamp(0, 255)) for x in unscaled])

    def _quantise(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.uint8)  # truncated, not rounded, as for the published images and their FID


class KLCodec(Codec):
    """An `AutoencoderKL`, or an `AutoencoderTiny` (TAESD), whose latents have no variance."""

    def __init__(self, autoencoder: nn.Module, latent_format: LatentFormat):
        super().__init__(latent_format)
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @property
    def is_tiny(self) -> bool:
        return type(self.autoencoder).__name__ == "AutoencoderTiny"

    def _moments(self, pixels: Tensor) -> Tensor:
        encoded = self.autoencoder.encode(pixels)
        if hasattr(encoded, "latents"):  # of an AutoencoderTiny
            return torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)

    def _image(self, unscaled: Tensor) -> Tensor:
        return self.autoencoder.decode(unscaled).sample


class PixelCodec(Codec):
    """No codec: the latents are the image itself, from -1 to 1. All 256 levels are decoded exactly."""

    def __init__(self) -> None:
        super().__init__(LatentFormat(codec="pixel", channels=3, factor=1))

    def _moments(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels, torch.zeros_like(pixels)], dim=1)

    def _image(self, unscaled: Tensor) -> Tensor:
        return unscaled

    def _quantise(self, pixels: Tensor) -> Tensor:
        # Truncation is the rule for the output of a decoder network. Here it would lower a level by one if a rounding
        # error makes it slightly too small: no level after storage as float32, but half of them after float16.
        return pixels.round().to(torch.uint8)


def load_decoder(latent_format: LatentFormat, name: str | None = None, device: str | torch.device = "cpu") -> Codec:
    """Return the codec that decodes latents of a format.

    It is the codec `name` ("ema" and "mse" are the published names of Stable Diffusion's), or else the latents' own
    codec. Latents of sd-vae-ft-mse are decoded by sd-vae-ft-ema, as in the published sampling.

    Its format has the latents' scale and shift if it is their own codec, has no statistics, or they are per channel
    (measured, for example). Any other codec keeps its own, as TAESD does, whose latents are Stable Diffusion's scaled.
    Raises InputError, naming --vae, if the channels or the factor of the codec are not those of the latents, or if the
    codec cannot decode them with their scale and shift.
    """
    if name is None:
        name = "ema" if latent_format.codec == SD_FORMAT.codec else latent_format.codec
    if name.startswith(LOCAL_CODEC):
        where = f"the {name} of the machine where the network was trained, is not part of the export"
        raise InputError(f"the latents' codec, {where}; name its folder here with --vae")
    name = PUBLISHED_NAMES.get(name, name)
    codec = load_codec(name, device)
    for what in ("channels", "factor"):
        ours, needed = getattr(codec.format, what), getattr(latent_format, what)
        if ours != needed:
            raise InputError(f"--vae {name} has {what} {ours}, but latents of {latent_format.codec} have {needed}")
    is_own = name == latent_format.codec
    if not is_own and latent_format.is_per_channel and codec.is_tiny:
        problem = f"takes scaled latents, but those of {latent_format.codec} have a scale and shift per channel"
        raise InputError(f"--vae {name}: {problem}; allowed: their own codec, or another AutoencoderKL")
    if is_own or latent_format.is_per_channel or codec.format.scale is None:
        codec.format = dataclasses.replace(codec.format, scale=latent_format.scale, shift=latent_format.shift)
    codec.format.check_statistics()
    return codec


def load_codec(name: str, device: str | torch.device = "cpu") -> Codec:
    """Return the frozen codec `name`: a line of `CODECS`, `pixel`, a local folder, or a repository of the hub.

    Folder and repository contain config.json and diffusion_pytorch_model.safetensors of an AutoencoderKL or an
    AutoencoderTiny, or are a diffusers pipeline that has such a codec in its folder vae.
    Raises InputError if there is no such codec, its files are not usable, or the hub is unreachable.
    """
    if name == "pixel":
        return PixelCodec().to(device)
    folder, config, latent_format = _described(name)
    return KLCodec(_load_autoencoder(folder, class_name(config)), latent_format).to(device)


def network_format(
    recorded: dict[str, Any] | None, channels: int, name: str | None, source: str | Path
) -> LatentFormat:
    """Return the format of the latents that a network of some channels makes.

    It is the `codec` of its run's settings. Published checkpoints record none: they have Stable Diffusion's latents if
    their network has 4 channels, else those of the codec `name`. `source` is the checkpoint, for the error.
    Raises InputError if then no name is given, or that codec has other channels.
    """
    if recorded is not None or channels == SD_FORMAT.channels:
        return LatentFormat.from_json(recorded)
    if name is None:
        raise InputError(f"{source}: names no codec for its network of {channels} channels; name it with --vae")
    found = codec_format(PUBLISHED_NAMES.get(name, name))
    if found.channels != channels:
        raise InputError(f"--vae {name} has channels {found.channels}, but the network of {source} has {channels}")
    return found


def codec_format(name: str) -> LatentFormat:
    """Return the format of the latents of codec `name`, see `load_codec`, from its config.json alone."""
    return PixelCodec().format if name == "pixel" else _described(name)[2]


def _described(name: str) -> tuple[Path, dict[str, Any], LatentFormat]:
    """Return the local folder of a codec's files, its config.json, and the format of its latents."""
    spec = CODECS.get(name, CodecSpec(name))
    folder = _codec_folder(name, spec.source)
    verify_file(folder / CONFIG_FILE)
    config = read_json(folder / CONFIG_FILE)
    found = class_name(config)
    if found not in CLASSES:
        problem = f"the configuration of another class, {found!s:.80}" if found else "names no class"
        raise InputError(f"{folder / CONFIG_FILE}: {problem}; a codec is one of: {', '.join(CLASSES)}")
    check_codec_config(config, folder / CONFIG_FILE)
    try:
        return folder, config, _latent_format(name, spec, folder, config)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: scale, shift or blocks have impossible values") from error


def _codec_folder(name: str, source: str) -> Path:
    """Return the local folder of a codec's files, which are downloaded first if they are on the hub."""
    folder = f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, also as {CODEC_FOLDER}/ of a diffusers pipeline"
    allowed = f"pixel, {', '.join(CODECS)}, {folder}, or that on the hub (owner/name or owner/name/subfolder)"
    owner, _, rest = source.partition("/")
    if name in CODECS and not os.path.exists(source):
        place = HubName(f"{owner}/{rest.partition('/')[0]}", rest.partition("/")[2])
    else:
        place = local_or_hub(source, allowed, "codec (--vae)")
    if isinstance(place, Path):
        return _local_codec(place)
    instead = "" if name in CODECS else f"There is no local folder {source} either. "
    instead += f"Put {CONFIG_FILE} and {WEIGHTS_FILE} of {place.repo} into a folder and give that folder by --vae"
    files, part = (WEIGHTS_FILE, CONFIG_FILE), HubName(place.repo, f"{place.inside}/{CODEC_FOLDER}".lstrip("/"))
    try:
        return hub_folder(place, files, instead)
    except InputError:
        with contextlib.suppress(InputError):
            return hub_folder(part, files, instead)
        raise


def _local_codec(place: Path) -> Path:
    """Return the folder with a codec's files: `place`, or the codec's folder in a diffusers pipeline."""
    if not place.is_dir():
        raise InputError(f"codec {place}: is a file; give the folder that has {CONFIG_FILE} and {WEIGHTS_FILE}")
    part, index = place / CODEC_FOLDER, place / PIPELINE_FILE
    if (part / CONFIG_FILE).is_file() and (index.is_file() or not (place / CONFIG_FILE).is_file()):
        return part
    if index.is_file() and not (place / CONFIG_FILE).is_file():
        name = class_name(read_json(index))
        raise InputError(f"codec {place}: a diffusers pipeline ({name}) without a codec in {CODEC_FOLDER}/")
    if not (place / CONFIG_FILE).is_file():
        raise InputError(f"codec {place}: has no {CONFIG_FILE}; {NEEDED}")
    return place


def _load_autoencoder(folder: Path, kind: str) -> nn.Module:
    """Return diffusers' module with the weights of the folder. No weight may be missing or left over."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".safetensors", ".pt"))
        found = f"; the folder has {', '.join(others)}" if others else ""
        raise InputError(f"codec {folder}: has no {WEIGHTS_FILE}; {NEEDED}{found}")
    if (index := folder / f"{WEIGHTS_FILE}.index.json").exists():
        raise InputError(f"{index}: weights in several files; allowed: only {WEIGHTS_FILE}, remove the index")
    import diffusers

    verify_file(weights)
    check_weights(read_safetensors(weights)[0], weights)
    diffusers.logging.set_verbosity_error()  # the check below replaces its warnings
    try:
        with parameters_at_most(weights.stat().st_size):
            autoencoder, report = getattr(diffusers, kind).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except TooLargeError as error:
        raise InputError(f"{folder / CONFIG_FILE}: describes more parameters than {weights} has") from error
    except Exception as error:  # diffusers can raise any for settings that are not possible
        if memory_message(error):
            raise
        why = mismatch(error) or "the settings in that file are not possible"
        raise InputError(f"{weights}: does not fit {kind} of its {CONFIG_FILE}; {why}") from error
    if problems := {what: keys for what, keys in report.items() if keys}:
        why = "; ".join(f"{what.removesuffix('_keys')}: {some_of(map(str, keys))}" for what, keys in problems.items())
        raise InputError(f"{weights}: does not fit {kind} of its {CONFIG_FILE}; {why}")
    check_finite(autoencoder.state_dict(), weights)
    return autoencoder


def _latent_format(name: str, spec: CodecSpec, folder: Path, config: dict[str, Any]) -> LatentFormat:
    """Return the format of config.json, in diffusers' convention, with scale and shift of the codec's line if given.

    scale = scaling_factor / latents_std, shift = shift_factor or latents_mean (one number, or one for each channel).
    The scale is None if the file has none: diffusers writes Stable Diffusion's scaling_factor into the config of every
    AutoencoderKL whose author gave none, so this value counts only for 4 channels, and not next to latents_std.
    """
    is_tiny, is_sd = class_name(config) == "AutoencoderTiny", config.get("latent_channels") == SD_FORMAT.channels
    std, mean = config.get("latents_std"), config.get("latents_mean")
    scale, shift = config.get("scaling_factor") or None, config.get("shift_factor") or 0.0
    if is_tiny or std:
        scale = 1.0 if scale is None or (std and scale == SD_SCALE) else scale
    elif is_sd:
        scale = scale or SD_SCALE  # the first configs, those of Stable Diffusion, have no entry for it
    elif scale == SD_SCALE:
        scale = None
    if std:
        scale = tuple(scale / value for value in std)
    if mean:
        shift = tuple(mean)
    stages = config.get("num_encoder_blocks" if is_tiny else "block_out_channels")
    if not stages or not config.get("latent_channels"):
        raise InputError(f"{folder / CONFIG_FILE}: latent_channels or the numbers of the encoder's blocks are missing")
    is_local = spec.source == name and os.path.isdir(os.path.expanduser(name))
    return LatentFormat(
        codec=str(real_path(folder)) if is_local else name,  # absolute, because data sets store it
        channels=config["latent_channels"],
        factor=2 ** (len(stages) - 1),  # each stage after the first halves the resolution
        scale=scale if spec.scale is None else spec.scale,
        shift=shift if spec.shift is None else spec.shift,
    )
