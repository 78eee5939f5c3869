"""Settings of generate.py, their checks, and the labels that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from common import cli
from common.checks import AUTO, BATCH_SIZE, GUIDANCE_SCALE, NON_NEGATIVE, TIME_SHIFT, UNIT_INTERVAL, Check
from common.classes import ClassSet
from common.cli import Config, adjustable, batch_size, number_or_auto, setting
from common.errors import InputError
from models.autoencoder import LatentFormat
from models.checkpoint import is_legacy, saved_settings
from models.conditioning import has_null_class, is_unconditional
from models.inference import NETWORK_DTYPES
from models.interpolant import PATHS, Interpolant, shift_of_latents
from models.sit import SiTConfig
from models.sit_config import DEPTHS, PRESETS, QK_NORMS, depths_as_setting, parse_depths
from samplers import MODES, SOLVERS, Guidance, derive_seed

LABEL_STREAM = 2  # first part of the key of a label's seed: no other draw from the global seed uses it
DEFAULT_COUNT = 64  # images; FID needs 50,000
STEPS = Check("from 1 to 100,000", lambda value: 1 <= value <= 100_000)  # 250 are usual; more take days
COUNT = Check("from 1 to 10,000,000", lambda value: 1 <= value <= 10_000_000)
WITHOUT_EFFECT = ("encoder_depth", "legacy")  # of the settings known from the checkpoint, those that change no image


@dataclass(frozen=True, kw_only=True)
class FileSettings(Config):
    """files"""

    ckpt: str = adjustable(MISSING, "checkpoint, ours or published; a run's folder: its newest; or an exported network")
    weights: str = setting("ema", "which weights of the checkpoint", choices=("ema", "model"))
    sample_dir: str = adjustable("samples", "folder that contains the folders of all sample sets")
    name: str | None = adjustable(None, "folder of this set in --sample-dir; default: from the settings")
    npz: bool = adjustable(True, "also write samples.npz")
    save_cls: bool = setting(False, "also write the generated class tokens, cls_tokens.npy (N, D)")
    coherence: str | None = adjustable(
        None, "training data; also write how well the class tokens match their images, coherence.json"
    )
    enc_weights: str | None = adjustable(None, "encoder weights for --coherence; default: the run's")


@dataclass(frozen=True, kw_only=True)
class ContentSettings(Config):
    """what to generate"""

    num_fid_samples: int | None = adjustable(
        None,
        f"number of images, for FID 50000; default: {DEFAULT_COUNT}, or as many as before to complete a set",
        check=COUNT,
    )
    label_sampling: str = setting(
        "random",
        "how labels are chosen; none: the null class for each image, as always if the network was trained without "
        "labels",
        choices=("random", "balanced", "none"),
    )
    classes: str | None = setting(
        None,
        "only these classes: numbers, ranges, and names of the training data's class folders "
        '("207,360-365,n01440764"); default: all of the training data',
    )
    global_seed: int = setting(0, "seed of noise and labels", check=NON_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(Config):
    """sampler"""

    mode: str = setting("sde", "SDE (Euler-Maruyama) or probability-flow ODE", choices=MODES)
    num_steps: int = setting(250, "number of solver steps", check=STEPS)
    solver: str = setting("euler", "solver of the ODE; dopri5 chooses its step sizes itself", choices=SOLVERS)
    heun: bool = setting(False, "same as --solver heun; needs --mode ode (the published script ignores it with sde)")
    cfg_scale: float = setting(1.0, "guidance scale of the image; above 1, guidance is on", check=GUIDANCE_SCALE)
    cls_cfg_scale: float | None = setting(None, "guidance scale of the class token; 0: none; default: --cfg-scale")
    guidance_low: float = setting(
        0.0,
        "lowest time that is guided, as the network gets it for the latents, after a time shift; time 0 is data",
        check=UNIT_INTERVAL,
    )
    guidance_high: float = setting(
        1.0, "highest time that is guided, after a time shift; time 1 is noise", check=UNIT_INTERVAL
    )
    path_drop_guidance: bool = setting(
        False, "with guidance, the unconditional velocity skips the middle blocks of a network with SPRINT (SR-DiT)"
    )
    time_shift: float | str | None = setting(
        None,
        "factor s of the time shift t -> s t / (1 + (s - 1) t) of the solver steps; auto: sqrt(C H W / 4096) for "
        "latents (C, H, W); default: that of the checkpoint, or 1, no shift; without effect on --solver dopri5",
        check=TIME_SHIFT,
        parse=number_or_auto,
    )

    @property
    def guidance(self) -> Guidance:
        """Scales and interval of the guidance."""
        interval = (self.guidance_low, self.guidance_high)
        return Guidance(self.cfg_scale, self.cls_cfg_scale, *interval, self.path_drop_guidance)

    @property
    def chosen_solver(self) -> str:
        """The solver, with --heun taken into account."""
        return "heun" if self.heun else self.solver


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Config):
    """machine"""

    per_proc_batch_size: int | str = adjustable(
        32,
        "images per batch on each process; auto: as many as fit into the GPU's memory",
        check=BATCH_SIZE,
        parse=batch_size,
    )
    mixed_precision: str = setting(
        "no",
        "autocast of the network; default: as accelerate's configuration says",
        choices=("no", "fp16", "bf16"),
        environment="ACCELERATE_MIXED_PRECISION",
    )
    network_dtype: str = setting(
        "float32", "dtype of the network; the sampler uses float64", choices=tuple(NETWORK_DTYPES)
    )
    compile: bool = setting(False, "compile the network's blocks; the first batch takes about a minute longer")
    cuda_graphs: bool = setting(False, "replay network calls as CUDA graphs; useful for small batches")
    tf32: bool = setting(True, "TF32 in CUDA matrix products and convolutions")
    fused_attn: bool = adjustable(True, "attention by scaled_dot_product_attention")
    device: str = adjustable("auto", "auto: CUDA if it is available", choices=("auto", "cpu", "cuda"))
    local_rank: int | None = adjustable(None, "GPU of this process; passed by old launchers")


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Config):
    """known from the checkpoint; if given, they are compared with it"""

    model: str | None = setting(None, "network preset, such as SiT-XL/2")
    num_classes: int | None = setting(None, "number of classes")
    encoder_depth: int | str | None = setting(
        None, "blocks whose output the projectors read; without effect on images", parse=parse_depths, check=DEPTHS
    )
    resolution: int | None = setting(None, "image size in pixels")
    qk_norm: str | None = setting(
        None, "norm of queries and keys; without a value: layer", choices=QK_NORMS, bare=("layer", "none")
    )
    projector_embed_dims: str | None = setting(None, "widths of the aligned encoders, comma-separated")
    cls: int | None = setting(None, "width of the class token; 0: no class token")
    path_type: str | None = setting(None, "path between data and noise", choices=PATHS)
    legacy: bool | None = setting(None, "the older REPA layout; without effect on images")
    vae: str | None = setting(
        None, "codec that decodes; ema, mse: Stable Diffusion's; default: that of the latents (Stable Diffusion: ema)"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(FileSettings, ContentSettings, SamplerSettings, MachineSettings, CheckpointSettings):
    """Settings of generate.py. docs/published-flags.md compares them with the published flags."""

    recorded = frozenset({"steps", "checkpoint_sha256", "drawn_labels"})  # in samples.json

    @property
    def with_cls_tokens(self) -> bool:
        """Whether class tokens are written; --coherence reads them."""
        return self.save_cls or self.coherence is not None

    def check_combination(self) -> None:
        """Raise InputError for settings that exclude each other, and a name that leaves the folder of all sets."""
        if self.name and (Path(self.name).is_absolute() or ".." in Path(self.name).parts):
            raise InputError(f"--name {self.name}: allowed: a folder in --sample-dir, which sets another place")
        if self.label_sampling == "none" and self.classes is not None:
            raise InputError(f"--label-sampling none contradicts --classes {self.classes}; give one of them")
        if self.label_sampling == "none" and self.cfg_scale > 1:
            why = "guidance needs the labels of the images"
            raise InputError(f"--label-sampling none with --cfg-scale {self.cfg_scale:g}: {why}; allowed: 1")
        if self.guidance_low > self.guidance_high:
            raise InputError(f"--guidance-low {self.guidance_low} is above --guidance-high {self.guidance_high}")
        if self.heun and self.solver == "dopri5":
            raise InputError("--heun contradicts --solver dopri5")
        if self.mode == "sde" and self.chosen_solver != "euler":
            raise InputError(f"--solver {self.chosen_solver} is a solver of the ODE; add --mode ode")
        on_cuda = cli.uses_cuda(self.device)
        for name, full in (("mixed_precision", "no"), ("network_dtype", "float32")):
            if getattr(self, name) == "fp16" and not on_cuda:
                raise InputError(f"{cli.flag(name)} fp16 needs a CUDA device; allowed on the CPU: {full}, bf16")
        if self.cuda_graphs and not on_cuda:
            raise InputError("--cuda-graphs needs a CUDA device")
        if self.mixed_precision != "no" and (self.network_dtype != "float32" or self.cuda_graphs):
            other = "--cuda-graphs" if self.cuda_graphs else f"--network-dtype {self.network_dtype}"
            raise InputError(f"--mixed-precision {self.mixed_precision} excludes {other}; allowed with it: no")


def choose_label_sampling(config: GenerateConfig, saved: dict[str, Any]) -> GenerateConfig:
    """Return the settings for a checkpoint: with one of a network trained without labels, labels are not sampled.

    `saved` are the settings in the checkpoint. Raises InputError for a setting that needs labels, if the network was
    trained without any, and for no labels, if its null class was not trained.
    """
    if config.label_sampling == "none" and not has_null_class(saved):
        why = "was trained with --cfg-prob 0, so it has not learnt the null class"
        raise InputError(f"--label-sampling none: {config.ckpt} {why}; allowed: random, balanced")
    if not is_unconditional(saved):
        return config
    why = f"{config.ckpt} was trained without labels (--cfg-prob 1)"
    if config.label_sampling == "balanced":
        raise InputError(f"--label-sampling balanced: {why}; allowed: none, and random, which means none here")
    if config.classes is not None:
        raise InputError(f"--classes {config.classes}: {why}, so it has no classes to choose from")
    if config.cfg_scale > 1:
        raise InputError(f"--cfg-scale {config.cfg_scale:g}: {why}, so it has no guidance; allowed: 1")
    return cli.changed(config, label_sampling="none")


def label_pool(config: GenerateConfig, classes: ClassSet, num_classes: int) -> tuple[int, ...]:
    """Return the labels to draw from: those of --classes, or all that occur in the training data, or the null class.

    Raises InputError if --classes names something that the network does not have.
    """
    if config.label_sampling == "none":
        return (num_classes,)
    if config.classes is None:
        return classes.labels
    try:
        return classes.select(config.classes, num_classes)
    except InputError as error:
        raise InputError(f"--classes {error}") from error


def image_labels(config: GenerateConfig, pool: Sequence[int]) -> list[int]:
    """Return the label of each image, drawn from `pool`. It depends on the image's number, not on their total."""
    numbers = range(config.num_fid_samples)
    if config.label_sampling == "balanced":
        return [pool[number % len(pool)] for number in numbers]
    return [pool[derive_seed(config.global_seed, LABEL_STREAM, number) % len(pool)] for number in numbers]


def network_name(network: SiTConfig, saved: dict[str, Any]) -> str:
    """Return the preset of a network, such as SiT-XL/2, or else how the run's settings name or describe it."""
    size = (network.depth, network.hidden_size)
    preset = next((f"SiT-{name}/{network.patch_size}" for name in PRESETS if PRESETS[name][:2] == size), None)
    return preset or saved.get("model") or f"depth {size[0]}, width {size[1]}, patch {network.patch_size}"


def check_against_checkpoint(
    config: GenerateConfig, checkpoint: dict[str, Any], network: SiTConfig, latent_format: LatentFormat
) -> list[str]:
    """Return warnings about settings that contradict the checkpoint without an effect on the images.

    Raises InputError, with both values in its text, for any other setting that contradicts the checkpoint.
    """
    saved, warnings = saved_settings(checkpoint, config.ckpt), []
    found = {
        "model": network_name(network, saved),
        "num_classes": network.num_classes,
        "encoder_depth": depths_as_setting(network.encoder_depth) if network.z_dims else None,
        "resolution": network.input_size * latent_format.factor,
        "qk_norm": network.qk_norm,
        "projector_embed_dims": ",".join(map(str, network.z_dims)),
        "cls": network.cls_token_dim or 0,
        "path_type": saved.get("path_type"),
        "legacy": is_legacy(checkpoint),
    }
    for name, value in found.items():
        given = getattr(config, name)
        if given is not None and value is not None and given != value:
            contradiction = f"{cli.flag(name)} is {given}, but {config.ckpt} has {value}"
            if name not in WITHOUT_EFFECT:
                raise InputError(contradiction)
            warnings.append(f"{contradiction}; without effect on the images")
    if config.with_cls_tokens and network.cls_token_dim is None:
        raise InputError(f"--save-cls: {config.ckpt} has no class token")
    if config.path_drop_guidance and not network.sprint:
        raise InputError(
            f"--path-drop-guidance: {config.ckpt} is a network without SPRINT; only one trained with --sprint has "
            "blocks to skip"
        )
    return warnings


def choose_path(config: GenerateConfig, saved: dict[str, Any], network: SiTConfig) -> tuple[Interpolant, list[str]]:
    """Return the path between data and noise, and a warning if its time shift is not that of the checkpoint.

    `saved` are the settings in the checkpoint. Published files do not have the time shift of their training.
    """
    path = Interpolant.of_run({**saved, **({"path_type": config.path_type} if config.path_type else {})})
    if config.time_shift is None:
        return path, []
    shift = config.time_shift
    if shift == AUTO:
        shift = shift_of_latents(network.in_channels, network.input_size)
    held = "records no time shift" if saved.get("time_shift") is None else f"was trained with {path.time_shift:g}"
    warnings = [f"--time-shift is {shift:g}, but {config.ckpt} {held}"] if shift != path.time_shift else []
    return Interpolant(path.path_type, shift), warnings


def unused_guidance(config: GenerateConfig) -> list[str]:
    """Return warnings about settings of guidance without effect. No error: published command lines may contain them."""
    unused = []
    if config.guidance.ignores_cls_scale:
        unused.append(f"--cls-cfg-scale {config.cls_cfg_scale:g}")
    if config.guidance.ignores_path_drop:
        unused.append("--path-drop-guidance")
    reason = f"only --cfg-scale above 1 turns guidance on, and it is {config.cfg_scale:g}"
    return [f"{flag} has no effect: {reason}" for flag in unused]
