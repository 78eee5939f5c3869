"""Frozen vision encoders, through timm. They give the class token that REG denoises and the tokens of the alignment.

REPA (Yu et al., arXiv 2410.06940, section 3) aligns with the patch tokens; REG (arXiv 2507.01467, section 3) adds the
class token. Each encoder has its own input size and normalization; the output is always a class token and patch tokens.

The class token is taken after the network's last norm, as REG does with DINOv2 (section 3). The patch tokens are taken
where REPA takes them: before the last norm for CLIP (its ln_post) and MAE, after it for the others. The option `tokens`
of a name selects the other: `clip-vit-L:tokens=after-norm`.

To add an encoder, add a line to `ENCODERS` in encoder_table.py, or name any timm model: `timm/<model name>`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError, memory_message
from models.checksums import read_open, verify
from models.encoder_table import AFTER_NORM, BEFORE_NORM, ENCODERS, EncoderSpec, parse_options
from models.hub import hub_file, local_or_hub, url_file
from models.layouts import plain_names
from models.tensor_checks import TooLargeError, check_finite, check_weights, dtype_name, parameters_at_most
from models.weights_file import mismatch, read_safetensors, read_weights_file

Device = str | torch.device
# Functions of timm.models.efficientnet that accept `channel_multiplier`, which the models with a name fix.
WIDTH_GENERATORS = {"mobilenetv1": "_gen_mobilenet_v1", "mobilenetv2": "_gen_mobilenet_v2"}
MOST_PARAMETERS = 2**34  # of an encoder with random weights; the largest of timm have 2**33
POSITION_VALUES = 2**26  # of a table of positions, which is resampled: 16,384 tokens of width 4096
CLIP_PROJECTION = "visual.proj"  # to the space shared with texts, the classifier in OpenAI's layout
BASE_RESOLUTION = 256  # images of this size are resized to an encoder's `input_size`, other images in proportion


class EncoderOutput(NamedTuple):
    """cls_token (N, D): the class token or the pooled features; patch_tokens (N, T, D), row-major. Both float32."""

    cls_token: Tensor
    patch_tokens: Tensor


class Encoder(nn.Module):
    """A frozen vision encoder: images to class token and patch tokens.

    The class token is taken after the network's last norm, the patch tokens before or after it, as `tokens` says.

    Attributes: `name`, as given; `width` D; `num_tokens` T; `input_size`, height and width of its input in px; `dtype`
    of the network, float32 at first.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        input_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        tokens: str = AFTER_NORM,
    ):
        super().__init__()
        self.name = name
        self.input_size = input_size
        self.dtype = torch.float32
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.num_prefix_tokens = getattr(network, "num_prefix_tokens", 0)  # class token, then registers
        self.has_class_token = self.num_prefix_tokens > 0 and getattr(network, "cls_token", None) is not None
        # In some networks timm applies the final norm after the pooling; the tokens need it as well.
        moved = isinstance(getattr(network, "norm", None), nn.Identity)
        self.final_norm = getattr(network, "fc_norm", nn.Identity()) if moved else nn.Identity()
        self.takes_before_norm = tokens == BEFORE_NORM
        self.norm_is_separate = self.takes_before_norm and not moved
        if self.norm_is_separate:
            if not hasattr(network, "norm"):
                raise InputError(f"encoder {name}: tokens={tokens}, but the network has no norm after its last block")
            self.final_norm, network.norm = network.norm, nn.Identity()
        features = self._probe()
        if self.takes_before_norm and features.ndim == 4:
            raise InputError(f"encoder {name}: tokens={tokens}, but the network has a feature map and no tokens")
        # Convolutions are faster in this format, on CPUs and in half precision on GPUs; GroupNorm is inaccurate in it.
        if features.ndim == 4 and not any(isinstance(module, nn.GroupNorm) for module in network.modules()):
            self.network.to(memory_format=torch.channels_last)
        _, self.num_tokens, self.width = self._tokens(features)[:, self.num_prefix_tokens :].shape

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode if a parent module is set to training mode."""
        return super().train(False)

    def convert(self, dtype: torch.dtype) -> Encoder:
        """Convert the network to `dtype` in place and return this encoder. Its inputs and outputs do not change.

        In another dtype than float32, autocast has no effect on it. Raises InputError if a weight is too large for
        `dtype`; float16 ends at 65504.
        """
        self.dtype = dtype
        self.network.to(dtype)
        self.final_norm.to(dtype)
        check_finite(self.state_dict(), f"encoder {self.name}: weights converted to {dtype_name(dtype)}")
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> EncoderOutput:
        """Return class token (N, D) and patch tokens (N, T, D), float32, of images (N, 3, H, W), uint8, 0-255.

        Pixels are divided by 255, normalized, and THEN resized to `input_size` (bicubic without antialias), which is
        the order of the published recipe. This is done in float32, whatever the dtype of the network.
        """
        pixels = (images.float() / 255 - self.mean) / self.std
        if pixels.shape[-2:] != (self.input_size, self.input_size):
            pixels = F.interpolate(pixels, (self.input_size, self.input_size), mode="bicubic", align_corners=False)
        if self.dtype == torch.float32:
            return self._encode(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # it would cast to its own dtype
            return self._encode(pixels.to(self.dtype))

    def _encode(self, pixels: Tensor) -> EncoderOutput:
        """Return the output of `forward` for normalized pixels (N, 3, S, S) in the network's dtype."""
        features = self.network.forward_features(pixels)
        sequence = self._tokens(features)
        tokens = self.final_norm(sequence)
        pooled_from = tokens if self.norm_is_separate else features
        cls_token = tokens[:, 0] if self.has_class_token else self._pooled(pooled_from, tokens)
        patch_tokens = (sequence if self.takes_before_norm else tokens)[:, self.num_prefix_tokens :]
        return EncoderOutput(cls_token.float(), patch_tokens.float())

    def _tokens(self, features: Tensor) -> Tensor:
        """Return all tokens (N, prefix + T, D) of a sequence or of a map (channels first or last)."""
        if features.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", None) == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return features

    def _pooled(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return (N, D), pooled as in timm (attention pool or mean), or the mean if the head changes the width."""
        pooled = self.network.forward_head(features, pre_logits=True)
        same_width = pooled.shape == (tokens.shape[0], tokens.shape[-1])
        return pooled if same_width else tokens[:, self.num_prefix_tokens :].mean(dim=1)

    def _probe(self) -> Tensor:
        """Return the features of one blank image. Raises InputError if the network has no tokens."""
        blank = torch.zeros(1, len(self.mean), self.input_size, self.input_size, device=self.mean.device)
        try:
            with torch.no_grad():
                features = self.network.forward_features(blank)
        except (RuntimeError, AssertionError, ValueError) as error:
            refused = f"does not accept an input of {self.input_size} px ({_brief(error)})"
            raise InputError(f"encoder {self.name}: it {refused}") from error
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise InputError(f"encoder {self.name}: the network has neither tokens nor a feature map")
        return features


def load_encoders(
    specs: str, resolution: int, weights: str | None = None, num_tokens: int | None = None, device: Device = "cpu"
) -> list[Encoder]:
    """Return the encoders of a comma-separated list, each as `load_encoder` returns it.

    `weights`: one file for each encoder, comma-separated; an empty name means the hub. `num_tokens`: the number of
    latent tokens. Raises InputError, naming both numbers, if an encoder has another number of tokens.
    """
    names = [name.strip() for name in specs.split(",")]
    files = [file.strip() for file in weights.split(",")] if weights else [""] * len(names)
    if len(files) != len(names):
        counts = f"{len(files)} files for {len(names)} encoders"
        raise InputError(f"--enc-weights {weights}: {counts} ({specs}); one for each")
    encoders = [load_encoder(name, resolution, file, device) for name, file in zip(names, files, strict=True)]
    for encoder in encoders:
        if num_tokens not in (None, encoder.num_tokens):
            pixels = encoder.input_size / math.sqrt(encoder.num_tokens)  # of a token's side
            if not hasattr(encoder.network, "patch_embed"):  # convolutions may pad; strides are powers of 2
                pixels = 2 ** round(math.log2(pixels))
            fitting = pixels * math.sqrt(num_tokens)
            hint = f"append :input={fitting:.0f} to its name" if fitting.is_integer() else "choose another encoder"
            tokens = f"{encoder.num_tokens} tokens from an input of {encoder.input_size} px"
            rule = f"there are {num_tokens} latent tokens, and the numbers must be equal"
            raise InputError(f"encoder {encoder.name}: {tokens}, but {rule}: {hint}, or change the latents")
    return encoders


def load_encoder(spec: str, resolution: int, weights: str | Path | None = None, device: Device = "cpu") -> Encoder:
    """Return the frozen encoder for images of `resolution` px, with weights from a local file or from the hub.

    spec: a name of `ENCODERS` or `timm/<model name>`, optionally followed by options `:key=value`. `input` is the input
    size in px (default: that of the encoder, times resolution/256); `mean` and `std` are the normalization (one number,
    or three numbers separated by slashes); `tokens` is before-norm or after-norm, where the patch tokens are taken;
    the others in `OPTIONS` are arguments of the timm model that describe its architecture.
    weights: a safetensors or PyTorch file in the layout of timm or of the authors (DINOv2, MAE, MoCo v3, I-JEPA, CLIP),
    local or on the hub (`owner/name/file`). Position tables are resampled to the grid.
    Raises InputError if the encoder or an option is unknown, the weights do not fit, or the hub is unreachable.
    """
    line, input_size = _resolve(spec, resolution)
    weights = weights or _hub_weights(spec, line)
    return _build(spec, line, input_size, _read_weights(weights, line), weights).to(device)


def encoders_digest(encoders: Iterable[Encoder]) -> str:
    """Return the SHA-256 of the weights of encoders.

    Tables of positions are skipped: they are resampled, and their last bits depend on the version of PyTorch.
    """
    digest = hashlib.sha256()
    for encoder in encoders:
        for name, value in encoder.state_dict().items():
            if "pos" not in name:
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def untrained_encoder(spec: str, resolution: int, device: Device = "cpu") -> Encoder:
    """Return the encoder of `load_encoder` with random weights, for measurements of speed and memory."""
    return _build(spec, *_resolve(spec, resolution)).to(device)


def _resolve(spec: str, resolution: int) -> tuple[EncoderSpec, int]:
    """Return the description of an encoder with its options applied, and its input size in px."""
    name, *options = spec.split(":")
    if name in ENCODERS:
        line = ENCODERS[name]
    elif name.startswith("timm/"):
        import timm

        line = EncoderSpec(name.removeprefix("timm/"))
        known = timm.list_models(pretrained=True) + timm.list_models()
        if line.model not in known:
            hint = _suggestion(line.model, known)
            raise InputError(f"encoder {name!r}: timm {timm.__version__} has no such model{hint}")
    else:
        allowed = ", ".join((*ENCODERS, "timm/<model name>"))
        raise InputError(f"encoder {name!r}: unknown{_suggestion(name, ENCODERS)}; allowed: {allowed}")
    given = parse_options(spec, options)
    fixed_input = given.pop("input", None)
    fields = {key: given.pop(key) for key in ("mean", "std", "tokens") if key in given}
    line = dataclasses.replace(line, **fields, options={**line.options, **given})
    if fixed_input is not None:
        return line, fixed_input
    input_size = line.input_size or _pretrained_cfg(line.model).input_size[-1]
    if input_size * resolution % BASE_RESOLUTION:
        size = f"an input of {input_size} px for images of {BASE_RESOLUTION} px"
        problem = f"is not a whole number of px at resolution {resolution}; set it with :input="
        raise InputError(f"encoder {spec}: {size} {problem}")
    return line, input_size * resolution // BASE_RESOLUTION


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint at the names nearest to an unknown one; of equally near names, those that `known` has first."""
    text = name.lower()
    nearness = {other: difflib.SequenceMatcher(None, text, other.lower()).ratio() for other in known}
    near = sorted((other for other in nearness if nearness[other] >= 0.6), key=nearness.__getitem__, reverse=True)[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def name_with_tokens(specs: str, default: str | None = None) -> str:
    """Return names of encoders with the option `tokens` where `ENCODERS` has before-norm. Runs record these names.

    `default` is the value for a name without the option; None: that of `ENCODERS`. A record without the option is older
    than the option: its tokens were taken after the norm, so it has to be read with `default=AFTER_NORM`.
    """
    names = [name.strip() for name in specs.split(",")]
    for index, name in enumerate(names):
        base, *options = name.split(":")
        tokens = ENCODERS[base].tokens if base in ENCODERS else AFTER_NORM
        if tokens == BEFORE_NORM and not any(option.startswith("tokens=") for option in options):
            names[index] = f"{name}:tokens={default or tokens}"
    return ",".join(names)


def _pretrained_cfg(model: str) -> Any:
    """Return timm's settings of a model: input size, mean, std, classifier, and address of its weights."""
    import timm

    return timm.get_pretrained_cfg(model)


def _hub_weights(spec: str, line: EncoderSpec) -> Path:
    """Return the local copy of a model's weights, which are downloaded from the address in timm's settings."""
    cfg = _pretrained_cfg(line.model)
    instead = "Download that file on another machine and give it by --enc-weights"
    if line.local_only or not (cfg.hf_hub_id or cfg.url):
        raise InputError(f"encoder {spec}: its weights are not on the hub; give a local file by --enc-weights")
    if not cfg.hf_hub_id:
        return url_file(cfg.url, instead)
    return hub_file(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors", instead)


def _read_weights(name: str | Path, line: EncoderSpec) -> dict[str, Any]:
    """Return the parameters of a file without the classifier, in the file's layout. Code in a file is never run."""
    path = local_or_hub(name, "a safetensors or PyTorch file, local or on the hub (owner/name/file)", "--enc-weights")
    if not isinstance(path, Path):
        instead = f"There is no local file {name} either"
        path = hub_file(path.repo, path.inside or "model.safetensors", instead)
    if path.is_dir():
        raise InputError(f"--enc-weights {path}: is a folder; allowed: a safetensors or PyTorch file")
    try:
        checkpoint = read_open(path, lambda file: _content(path, file))
    except InputError as error:
        raise InputError(f"--enc-weights {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    checkpoint = {str(key): value for key, value in checkpoint.items()} if isinstance(checkpoint, dict) else {}
    if any(key.startswith(line.prefix) for key in checkpoint):
        checkpoint = {k.removeprefix(line.prefix): v for k, v in checkpoint.items() if k.startswith(line.prefix)}
    checkpoint = {name: value for name, value in plain_names(checkpoint).items() if name != CLIP_PROJECTION}
    classifier = _pretrained_cfg(line.model).classifier or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in checkpoint.items() if not key.startswith(heads)}
    if not state:
        raise InputError(f"--enc-weights {path}: holds no parameters of a network without its classifier")
    check_weights(state, f"--enc-weights {path}", floats_only=False)
    return state


def _content(path: Path, file: IO[bytes]) -> Any:
    """Return what an open file of weights holds, after comparing it with its checksum if there is one."""
    has_sum = verify(file, path) is not None
    return (
        read_safetensors(path, file)[0] if path.suffix == ".safetensors" else read_weights_file(path, file, not has_sum)
    )


def _build(
    spec: str, line: EncoderSpec, input_size: int, state: dict[str, Any] | None = None, source: str | Path = ""
) -> Encoder:
    """Return the encoder with the parameters `state` of the file `source`; without `state`, with random parameters."""
    import timm

    cfg = _pretrained_cfg(line.model)
    options: dict[str, Any] = {"num_classes": 0, **line.options}
    if cfg.fixed_input_size:
        options.setdefault("img_size", input_size)
    # timm converts the authors' layouts and resamples position tables if it gets the parameters in this way. Because
    # the number of classes in file and network is the same, it raises an error for missing and unexpected parameters.
    options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": options["num_classes"]}
    create, model = timm.create_model, line.model
    if "channel_multiplier" in options and (generator := WIDTH_GENERATORS.get(model.split("_")[0])):
        create = getattr(timm.models.efficientnet, generator)
        model, _, tag = model.partition(".")
        options["pretrained_cfg"] = tag or None
    try:
        with parameters_at_most(_limit(state)):
            network = create(model, pretrained=state is not None, **options)
    except TooLargeError as error:
        whose = f"the file {source} has weights for" if state else "are allowed"
        raise InputError(f"encoder {spec}: its options describe more parameters than {whose}") from error
    except Exception as error:  # timm's models do not agree on the errors that they raise
        if memory_message(error):
            raise
        culprit = f"--enc-weights {source}: does not fit encoder {spec}" if state else f"encoder {spec}"
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        why = f"this model has no option {unknown[1]}" if unknown else "its options do not fit this model"
        raise InputError(f"{culprit}: {mismatch(error) or why}") from error
    network.pretrained_cfg["state_dict"] = None  # a second copy of all parameters
    if state:
        check_finite(network.state_dict(), f"--enc-weights {source}")
    return Encoder(spec, network, input_size, line.mean or cfg.mean, line.std or cfg.std, line.tokens)


def _limit(state: dict[str, Any] | None) -> int:
    """Return how many parameters a network may have. Tables of positions may be larger than in the file."""
    return MOST_PARAMETERS if state is None else 2 * sum(value.numel() for value in state.values()) + POSITION_VALUES


def _brief(error: Exception) -> str:
    """Return the text of an error on one line, shortened."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
