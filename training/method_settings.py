"""The settings of the method: path and times, encoders, alignment and loss; the class slot has its own."""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import AUTO, ENTRY_NAMES, NON_NEGATIVE, TIME_SHIFT, UNIT_INTERVAL, Check, between
from common.cli import Config, adjustable, flag, number_or_auto, setting, settings
from common.errors import InputError
from models.checkpoint import MOST_STEPS
from models.interpolant import PATHS, Interpolant, shift_of_latents
from models.sit_config import PROJECTORS
from training.class_slot_settings import WEIGHTS
from training.randomness import TIME_DISTRIBUTIONS

# Within these bounds, exp(mean + std n) is finite in float32 for all normal numbers n that PyTorch draws.
MOST_OF_TIMES = 10
TIME_MEAN = Check(f"from -{MOST_OF_TIMES} to {MOST_OF_TIMES}", lambda value: -MOST_OF_TIMES <= value <= MOST_OF_TIMES)
TIME_STD = Check(f"greater than 0 and at most {MOST_OF_TIMES}", lambda value: 0 < value <= MOST_OF_TIMES)


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Config):
    """method"""

    path_type: str = setting("linear", "path between data and noise", choices=PATHS)
    prediction: str = setting("v", "what the network predicts: the velocity", choices=("v",))
    weighting: str = setting(
        "uniform",
        "distribution of training times; lognormal: of the noise-to-signal ratio, which are logit-normal times on the "
        "linear path, sigmoid(mean + std n)",
        choices=tuple(TIME_DISTRIBUTIONS),
    )
    time_mean: float = setting(
        0.0, "with --weighting lognormal: mean of the ratio's logarithm; above 0: more noise", check=TIME_MEAN
    )
    time_std: float = setting(
        1.0, "with --weighting lognormal: standard deviation of the ratio's logarithm", check=TIME_STD
    )
    time_shift: float | str = setting(
        1.0,
        "factor s of the time shift t -> s t / (1 + (s - 1) t), for training times and for the steps of all samples; "
        "auto: sqrt(C H W / 4096) for latents (C, H, W); 1: none (Stable Diffusion 3, SR-DiT)",
        check=TIME_SHIFT,
        parse=number_or_auto,
    )
    cfg_prob: float = setting(
        0.1,
        "probability that a label is replaced by the null class; 1: train without labels (in the published code "
        "without effect: always 0.1)",
        check=UNIT_INTERVAL,
    )
    enc_type: str = setting("dinov2-vit-b", "frozen encoders, comma-separated; the first gives the class token")
    enc_weights: str | None = adjustable(None, "local weight files of the encoders, comma-separated; default: the hub")
    cached_tokens: str | None = adjustable(
        None,
        "folders or zips in --data-dir with the tokens of the encoders, comma-separated, in the order of --enc-type "
        "(preprocessing/encode_tokens.py); they are read instead of images, and no encoder runs; only rounding of its "
        "output to float16 changes. Without --enc-type, they name the encoders. --eval-steps loads the first encoder",
        check=ENTRY_NAMES,
    )
    proj_coeff: float = setting(
        WEIGHTS["proj"],
        "weight of the alignment; 0: no projectors, and the checkpoint does not fit the published code",
        check=NON_NEGATIVE,
    )
    projector: str = setting(
        "mlp",
        "projectors of the alignment: the MLP of REPA, or a 3 x 3 convolution on the grid of patch tokens (iREPA)",
        choices=PROJECTORS,
    )
    spatial_norm: float | None = setting(
        None,
        "normalise the targets of patch tokens over the tokens of an image, after subtracting this share of their mean "
        "(iREPA: 0.6); default: not normalised",
        check=UNIT_INTERVAL,
    )
    align_stop_steps: int = setting(
        0,
        "switch the alignment off after N steps (HASTE); then projectors, and encoders that the class slot does not "
        "need, are not computed; 0: never",
        check=between(0, MOST_STEPS),
    )
    cfm_coeff: float = setting(
        WEIGHTS["cfm"],
        "weight of contrastive flow matching: the error for the target of another sample is subtracted (SR-DiT: 0.05); "
        "0: none",
        check=NON_NEGATIVE,
    )

    @property
    def unconditional(self) -> bool:
        """Whether the network is trained without labels; see `models.conditioning`."""
        return self.cfg_prob == 1

    @property
    def time_parameters(self) -> dict[str, float]:
        """Parameters of the distribution of training times."""
        return {"mean": self.time_mean, "std": self.time_std} if self.weighting == "lognormal" else {}

    def path(self, channels: int, size: int) -> Interpolant:
        """Return the path between data and noise for latents (C, H, W) with H = W = `size`."""
        shift = shift_of_latents(channels, size) if self.time_shift == AUTO else self.time_shift
        return Interpolant(self.path_type, shift)

    def check_combination(self) -> None:
        super().check_combination()
        without = "--enc-type none" if self.enc_type == "none" else f"--proj-coeff {self.proj_coeff:g}"
        has_alignment = self.enc_type != "none" and self.proj_coeff > 0
        for name in () if has_alignment else ("projector", "spatial_norm", "align_stop_steps"):
            if (value := getattr(self, name)) != settings(MethodSettings)[name].default:
                raise InputError(f"{flag(name)} {value}: changes the alignment, and {without} means that there is none")

    def check_pairs(self, batch_size: int, processes: int, parts: int) -> None:
        """Raise InputError if contrastive flow matching is on and a micro-batch would not consist of pairs."""
        samples = batch_size // processes // parts
        if self.cfm_coeff and samples % 2:
            raise InputError(
                f"--cfm-coeff {self.cfm_coeff:g}: needs an even number of samples in each micro-batch, but "
                f"--batch-size {batch_size} on {processes} processes in --gradient-accumulation-steps {parts} gives "
                f"{samples}"
            )
