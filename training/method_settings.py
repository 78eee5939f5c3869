"""The settings of train.py that select the method: path, times, encoders, class slot, alignment, loss weights."""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import BELOW_ONE, NON_NEGATIVE, UNIT_INTERVAL, between
from common.cli import Config, adjustable, flag, setting, settings
from common.errors import InputError
from loss import ENTANGLED, TERMS
from models.checkpoint import MOST_STEPS
from models.interpolant import PATHS
from models.sit_config import PROJECTORS
from training.randomness import TIME_DISTRIBUTIONS

WEIGHTS = {term.name: term.weight for term in TERMS}


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Config):
    """method"""

    path_type: str = setting("linear", "path between data and noise", choices=PATHS)
    prediction: str = setting("v", "what the network predicts: the velocity", choices=("v",))
    weighting: str = setting("uniform", "distribution of training times", choices=tuple(TIME_DISTRIBUTIONS))
    cfg_prob: float = setting(
        0.1,
        "probability that a label is replaced by the null class (in the published code without effect: always 0.1)",
        check=BELOW_ONE,
    )
    enc_type: str = setting("dinov2-vit-b", "frozen encoders, comma-separated; the first gives the class token")
    enc_weights: str | None = adjustable(None, "local weight files of the encoders, comma-separated; default: the hub")
    entangle: str | None = setting(
        None,
        "what the class slot holds, denoised with the latents: the class token of the first encoder (default), the "
        "mean of its patch tokens, or the mean of the latents; or a learned token, not denoised; or no slot. In each "
        "case the slot is aligned with the class token",
        choices=ENTANGLED,
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
    cls: float = setting(WEIGHTS["cls"], "weight of the class token's velocity", check=NON_NEGATIVE)

    def check_alignment(self) -> None:
        """Raise InputError for settings of an alignment that does not take place."""
        without = "--enc-type none" if self.enc_type == "none" else f"--proj-coeff {self.proj_coeff:g}"
        if self.enc_type != "none" and self.proj_coeff > 0:
            return
        for name in ("projector", "spatial_norm", "align_stop_steps"):
            if (value := getattr(self, name)) != settings(MethodSettings)[name].default:
                raise InputError(f"{flag(name)} {value}: changes the alignment, and {without} means that there is none")
