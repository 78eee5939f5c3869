"""The settings of a training run: the flags of train.py, and what set-up finds out about the run.

A field of `TrainConfig` is the only place that states a flag's default, allowed values, help, and whether a resumed run
may change it (`changeable`). What the data and the encoders determine is in `RunFacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from common.checks import BELOW_ONE, ENTRY_NAME, GUIDANCE_SCALE, NON_NEGATIVE, POSITIVE, UNIT_INTERVAL, Check, between
from common.cli import Config, adjustable, flag, parse, setting, settings, uses_cuda
from common.errors import InputError
from dataset import LATENT_FOLDERS
from loss import FROM_ENCODER
from models.autoencoder import LatentFormat
from models.checkpoint import MOST_STEPS
from models.inference import NETWORK_DTYPES
from models.interpolant import Interpolant
from models.sit import SiT_models, SiTConfig
from models.sit_config import DEPTHS, NORMS, PRESETS, QK_NORMS, default_encoder_depth, depths_of_setting, parse_depths
from training.class_slot_settings import ClassSlotSettings
from training.class_statistics import ClassStatistics
from training.limits import Estimate
from training.method_settings import MethodSettings
from training.optimization_settings import OptimizationSettings

MINUTES_PER_YEAR = 525_600
TIMEOUT = Check(f"greater than 0 and at most a year, {MINUTES_PER_YEAR}", lambda value: 0 < value <= MINUTES_PER_YEAR)
MODEL = Check(f"one of {', '.join(SiT_models)}", lambda value: value in SiT_models)
# In args.json: facts about the run that are not settings, and the names of the settings that follow from others.
DERIVED = "derived"
# Digests of what a run reads: the setting that names it, and what a resumed run says if it differs.
DIGESTS = {
    "data_digest": (
        "data_dir",
        "these are not the data of the run: names, labels, images or latents have changed (moved folders and zips of "
        "the same files are allowed)",
    ),
    "encoder_digest": ("enc_weights", "these are not the encoder weights of the run"),
    "cls_digest": (
        "standardize_cls",
        "these are not the statistics of the class token with which the run was started, which it keeps",
    ),
    "encoder_digests": ("enc_weights", "these are not the encoder weights of the run"),  # one for each of several
}
RECORDED = frozenset({"codec", "latent_size", "z_dims", "in_channels", "cls_token_dim", *DIGESTS, DERIVED})
# Another run does not take these from args.json.
OF_ONE_RUN = ("exp_name", "resume", "resume_step", "allow_changed_data", "dry_run")
# Settings of a run for which None is a value, not one that is determined later: the name of that value in errors.
NONE_MEANS = {"max_images": "all", "spatial_norm": "off"}
# Settings that are parameters of a value of another setting, and without effect without it.
PARAMETERS = {
    "sprint_keep": ("sprint", True),
    "sprint_path_drop": ("sprint", True),
    "muon_learning_rate": ("optimizer", "muon"),
    "time_mean": ("weighting", "lognormal"),
    "time_std": ("weighting", "lognormal"),
}
# Bounds of numbers, so that a slip of the keyboard is an error and not a machine without memory.
MOST_WORKERS = 1024  # each is a process; more than any machine has cores
MOST_BLOCKS = 1000  # 36 times those of SiT-XL
MOST_WIDTH = 65_536  # of a network and of its projectors; 57 times that of SiT-XL
MOST_CLASSES = 1_000_000  # as many labels as data may have
MOST_GRID_SAMPLES = 10_000  # a grid of 100 x 100 images
MOST_EVAL_SAMPLES = 10_000_000  # 200 times the usual 50,000
MOST_EVAL_BATCH = 65_536  # images of 256 px decoded by one process: 50 GB
MOST_SOLVER_STEPS = 1_000_000  # 4000 times the usual 250
FOLDER_NAME = Check("the name of a folder", lambda value: bool(value.strip(". ")))


@dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """run"""

    output_dir: str = adjustable("exps", "folder of all runs")
    exp_name: str = adjustable(MISSING, "name of this run; its folder in --output-dir", check=FOLDER_NAME)
    logging_dir: str = adjustable("logs", "folder of the tracker, inside the run's folder (published: OUTPUT_DIR/logs)")
    report_to: str = adjustable(
        "none",
        "tracker to use in addition to metrics.jsonl; one that fails is a warning",
        choices=("none", "wandb", "tensorboard"),
    )
    log_steps: int = adjustable(100, "steps between two rows of metrics.jsonl", check=POSITIVE)
    checkpointing_steps: int = adjustable(50_000, "steps between two checkpoints", check=POSITIVE)
    checkpointing_minutes: float = adjustable(
        30,
        "minutes after which a checkpoint is written in addition, to be removed when the next one is complete; 0: none",
        check=NON_NEGATIVE,
    )
    keep_last: int = adjustable(
        0, "keep the N newest checkpoints, those by minutes not counted; 0: all", check=NON_NEGATIVE
    )
    keep_every: int = adjustable(0, "in addition, keep the checkpoints of every N-th step; 0: none", check=NON_NEGATIVE)
    background_save: bool = adjustable(True, "write checkpoints in the background, from a copy")
    retry_steps: int = adjustable(100, "steps until a failed checkpoint is tried again", check=POSITIVE)
    max_bad_steps: int = adjustable(20, "stop after N consecutive steps whose gradient is not finite", check=POSITIVE)
    timeout_minutes: float = adjustable(30, "how long processes wait for one that does not answer", check=TIMEOUT)
    resume_step: int = adjustable(
        0,
        "resume this run from its checkpoint of this step; what is later is moved to RUN/set-aside/N. With --resume "
        "latest, this flag decides. A restart by torchrun or SLURM continues after the step that the run has reached. "
        "0: no such step",
        check=between(0, MOST_STEPS),
    )
    resume: str | None = adjustable(
        None,
        "resume from 'latest', the newest checkpoint of this run (a new run if there is none), or from a checkpoint "
        "file: of this run as --resume-step does, of another run only if --exp-name is a new run",
    )
    allow_changed_data: bool = adjustable(
        False,
        "resume although the data (names, labels, images or latents) or the weights of the encoders differ from those "
        "of the run",
    )
    init_from: str | None = adjustable(
        None,
        "checkpoint whose averaged weights initialize a new run; weights that do not fit (other classes, encoders, "
        "resolution) are initialized as usual",
    )
    legacy: bool | None = adjustable(
        None,
        "whether the checkpoint to resume from has the older REPA layout; detected if not given. The published switch "
        "of this name drops labels twice: --cfg-prob 0.19",
    )
    device: str = adjustable("auto", "where to train; auto: CUDA if available", choices=("auto", "cpu", "cuda"))
    dry_run: bool = adjustable(False, "check everything, do two steps, show their time and memory, and write nothing")


@dataclass(frozen=True, kw_only=True)
class GridSettings(Config):
    """sample grids"""

    sampling_steps: int = adjustable(
        10_000,
        "steps between two grids; 0: none, no codec needed. Without this flag and --vae, a codec that cannot be loaded "
        "is a warning, and there are no grids",
        check=NON_NEGATIVE,
    )
    vae: str | None = adjustable(
        None, "codec that decodes samples; default: that of the latents (for sd-vae-ft-mse: sd-vae-ft-ema)"
    )
    grid_samples: int = adjustable(
        36, "images in a grid; up to 12 classes: fewer, full rows", check=between(1, MOST_GRID_SAMPLES)
    )
    grid_num_steps: int = adjustable(50, "SDE steps for a grid", check=between(1, MOST_SOLVER_STEPS))
    grid_cfg_scale: float = adjustable(1.0, "guidance scale of a grid", check=GUIDANCE_SCALE)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Config):
    """evaluation during training"""

    eval_steps: int = adjustable(0, "steps between two evaluations of EMA samples; 0: none", check=NON_NEGATIVE)
    eval_ref: str | None = adjustable(None, "reference .npz: ADM's, or one made by evaluations/reference.py")
    eval_samples: int = adjustable(10_000, "samples of an evaluation", check=between(1, MOST_EVAL_SAMPLES))
    eval_num_steps: int = adjustable(250, "SDE steps of these samples", check=between(1, MOST_SOLVER_STEPS))
    eval_batch_size: int = adjustable(64, "samples at a time on each process", check=between(1, MOST_EVAL_BATCH))
    eval_inception: str | None = adjustable(None, "Inception weights; default: the published ones, downloaded once")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Config):
    """network"""

    model: str = setting("SiT-XL/2", "preset, SiT-{S,B,L,XL}/{1,2,4,8}", check=MODEL)
    depth: int | None = setting(None, "number of blocks; default: the preset's", check=between(1, MOST_BLOCKS))
    hidden_size: int | None = setting(None, "width; default: the preset's", check=between(1, MOST_WIDTH))
    num_heads: int | None = setting(None, "attention heads; default: the preset's", check=POSITIVE)
    projector_dim: int = setting(2048, "inner width of the projectors", check=between(1, MOST_WIDTH))
    num_classes: int | None = setting(
        None,
        "number of classes, at least that of the data; default: that of the data. Only a network of 1000 classes fits "
        "the published code",
        check=between(1, MOST_CLASSES),
    )
    encoder_depth: int | str | None = setting(
        None,
        "align after this block, from 1, or after several blocks, such as 2,4; default: 4 for S and B, 8 for L and XL "
        "(published: 8), with --sprint 2",
        parse=parse_depths,
        check=DEPTHS,
    )
    fused_attn: bool = adjustable(True, "attention through scaled_dot_product_attention")
    norm: str = setting("layer", "norm of the tokens: LayerNorm or RMSNorm (SR-DiT)", choices=NORMS)
    qk_norm: str = setting(
        "none",
        "norm of queries and keys; without a value: layer (SR-DiT: rms)",
        choices=QK_NORMS,
        bare=("layer", "none"),
    )
    rope: bool = setting(False, "rotary positions of queries and keys (SR-DiT)")
    value_residual: bool = setting(False, "each block mixes the values of the first block into its own (SR-DiT)")
    sprint: bool = setting(
        False, "in training, the blocks between the first two and the last two see a part of the tokens (SR-DiT)"
    )
    sprint_keep: float = setting(0.25, "with --sprint: part of the tokens that these blocks see", check=UNIT_INTERVAL)
    sprint_path_drop: float = setting(
        0.05, "with --sprint: probability that the output of these blocks is dropped in a step", check=UNIT_INTERVAL
    )
    ops_head: int | None = adjustable(None, "accepted and ignored: the published code has it and does not use it")
    ema_decay: float = setting(0.9999, "decay of the averaged weights", check=BELOW_ONE)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    """data"""

    data_dir: str = adjustable("data/imagenet256", "folder with images and latents")
    latents_folder: str | None = adjustable(
        None,
        f"name of the latents' folder or zip in --data-dir, such as vae-in; default: {' or '.join(LATENT_FOLDERS)}",
        check=ENTRY_NAME,
    )
    latents_codec: str | None = adjustable(
        None, "codec of latents whose dataset.json names none; default: sd-vae-ft-mse, as in the published data"
    )
    resolution: int | None = setting(None, "image size in px; read from the data, this only checks it")
    max_images: int | None = setting(
        None, "train on N images only, equally many of each class, for a trial", check=POSITIVE
    )
    batch_size: int = setting(
        256, "samples of an optimizer step, over all processes and micro-batches (published default: 8)", check=POSITIVE
    )
    num_workers: int = adjustable(4, "loader processes of each training process", check=between(0, MOST_WORKERS))
    flip: bool = setting(False, "mirror half of the images (needs preprocessing/encode.py --flip)")
    check_data: bool = adjustable(True, "check every file for truncation before training")


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(Config):
    """precision"""

    allow_tf32: bool = adjustable(True, "TF32 in matrix products on CUDA")
    mixed_precision: str | None = adjustable(
        None,
        "autocast; default: fp16 or bf16 if accelerate's configuration says so, else fp16 on CUDA, no on the CPU",
        choices=("no", "fp16", "bf16"),
        environment="ACCELERATE_MIXED_PRECISION",
    )
    encoder_dtype: str = adjustable(
        "float32",
        "dtype of the frozen encoders; fp16, bf16: half of their memory, and no casts of their weights by autocast in "
        "each step; only rounding of the targets changes. float32: autocast applies to them",
        choices=tuple(NETWORK_DTYPES),
    )


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Config):
    """speed and memory"""

    compile: bool = adjustable(False, "compile network, loss and encoders; only rounding changes")
    activation_checkpointing: bool = adjustable(
        False, "less memory, more time, the same gradients: the backward pass recomputes the blocks"
    )
    fsdp: bool = adjustable(
        False,
        "shard weights, averages and optimizer state over the processes (FSDP), for networks that do not fit one GPU",
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings, GridSettings, EvaluationSettings, NetworkSettings, DataSettings, PrecisionSettings, SpeedSettings,
    OptimizationSettings, ClassSlotSettings, MethodSettings,
):  # fmt: skip
    """The settings of train.py. docs/published-flags.md compares them with the published flags."""

    example = "python train.py --exp-name NAME --data-dir DATA --model SiT-B/2"
    recorded = RECORDED

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Return the settings in args.json of a run, for another run: without its name, and without what follows."""
        skipped = {*cls.recorded, *OF_ONE_RUN, *(record.get(DERIVED) or ())}
        return {name: value for name, value in record.items() if name not in skipped}

    def check_combination(self) -> None:
        super().check_combination()
        for name, (other, needed) in PARAMETERS.items():
            value, held, default = getattr(self, name), getattr(self, other), settings(TrainConfig)[name].default
            if held != needed and value != default:
                on, off = (flag(other), "it is off") if needed is True else (f"{flag(other)} {needed}", f"it is {held}")
                raise InputError(f"{flag(name)} {value:g}: has no effect without {on}, and {off}; allowed: {default:g}")
        if self.eval_steps and not self.eval_ref:
            raise InputError(f"--eval-steps {self.eval_steps}: needs --eval-ref, the reference .npz")
        if self.enc_type == "none" and self.slot in FROM_ENCODER:
            raise InputError("--enc-type none: the class slot needs an encoder; add --no-cls-token to train SiT")
        if self.unconditional and self.grid_cfg_scale > 1:
            why = "--cfg-prob 1 trains without labels, and guidance compares samples with and without"
            raise InputError(f"--grid-cfg-scale {self.grid_cfg_scale:g}: {why}; allowed: 1")
        if self.cached_tokens and not self.reads_encoder:
            raise InputError(f"--cached-tokens {self.cached_tokens}: neither class slot nor alignment reads an encoder")
        if self.value_residual and self.depth == 1:
            raise InputError("--value-residual with --depth 1: one block has no values of another; needs 2 or more")
        if self.resume not in (None, "latest") and self.resume_step:
            raise InputError(f"--resume {self.resume} and --resume-step {self.resume_step}: give one of them")
        if self.keep_every and not self.keep_last:
            raise InputError(f"--keep-every {self.keep_every}: extends --keep-last; give --keep-last as well")
        if self.precision == "fp16" and not uses_cuda(self.device):
            who = "--mixed-precision fp16, by this flag or by accelerate's configuration,"
            raise InputError(f"{who} needs a CUDA device; allowed on the CPU: --mixed-precision no or bf16")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the loss terms, by the names in `loss.TERMS`."""
        return {"proj": self.proj_coeff, "cls": self.cls, "cfm": self.cfm_coeff}

    @property
    def reads_encoder(self) -> bool:
        """Whether class slot or alignment need the output of an encoder."""
        return self.enc_type != "none" and (self.slot in FROM_ENCODER or self.proj_coeff > 0)

    @property
    def precision(self) -> str:
        """Autocast precision: no, fp16 or bf16."""
        return self.mixed_precision or ("fp16" if uses_cuda(self.device) else "no")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir) / self.exp_name


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of a command line of train.py. Raises InputError for settings that no run can have."""
    return parse(TrainConfig, "Train REG, REPA or SiT.", argv)


@dataclass(frozen=True)
class RunFacts:
    """What set-up finds out about a run: the data's resolution and latents, and the network that follows from them."""

    resolution: int
    latent_format: LatentFormat
    network: SiTConfig
    digests: dict[str, str] = field(default_factory=dict)  # by the names in DIGESTS
    micro_batches: int = 1  # of a step on each process
    memory: Estimate | None = None  # of a step with these micro-batches; None if it is not estimated
    path: Interpolant = field(default_factory=Interpolant)  # with the time shift that the size of the latents gives
    cls_statistics: ClassStatistics | None = None  # with --standardize-cls


def find_facts(
    config: TrainConfig, resolution: int, latent_size: int, num_classes: int, latent_format: LatentFormat,
    encoder_widths: Sequence[int], digests: dict[str, str] | None = None,
    cls_statistics: ClassStatistics | None = None,
) -> RunFacts:  # fmt: skip
    """Return the facts of a run from its data, the widths of its encoders, and statistics of the class token.

    Raises:
        InputError: the sizes of the network do not fit together.
    """
    size, patch_size = config.model.removeprefix("SiT-").split("/")
    depth, hidden_size, num_heads = PRESETS[size]
    cls_token_dim = None
    if config.slot in FROM_ENCODER:
        cls_token_dim = encoder_widths[0]
    elif config.slot == "latent-mean":
        cls_token_dim = latent_format.channels
    try:
        network = SiTConfig(
            input_size=latent_size,
            patch_size=int(patch_size),
            in_channels=latent_format.channels,
            hidden_size=config.hidden_size or hidden_size,
            depth=config.depth or depth,
            num_heads=config.num_heads or num_heads,
            num_classes=config.num_classes or num_classes,
            encoder_depth=depths_of_setting(config.encoder_depth) or default_encoder_depth(size, config.sprint),
            z_dims=tuple(encoder_widths) if config.proj_coeff > 0 else (),
            projector_dim=config.projector_dim,
            cls_token_dim=cls_token_dim,
            qk_norm=config.qk_norm,
            norm=config.norm,
            rope=config.rope,
            value_residual=config.value_residual,
            sprint=config.sprint,
            sprint_keep=config.sprint_keep,
            sprint_path_drop=config.sprint_path_drop,
            projector=config.projector,
            learnable_token=config.slot == "learnable",
            standardized_cls=cls_statistics is not None,
            cls_lead=config.cls_lead,
        )
    except ValueError as error:
        raise InputError(f"--model {config.model} with the given sizes: {error}") from error
    if config.spatial_norm is not None and network.grid_size == 1:
        raise InputError(f"--spatial-norm {config.spatial_norm:g}: needs several patch tokens; the latents are 1 patch")
    path = config.path(latent_format.channels, latent_size)
    digests = (digests or {}) | ({"cls_digest": cls_statistics.digest()} if cls_statistics else {})
    return RunFacts(resolution, latent_format, network, digests, path=path, cls_statistics=cls_statistics)
