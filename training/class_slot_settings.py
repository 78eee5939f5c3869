"""The settings of the class slot: what it holds, and how that is denoised."""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import ENTRY_NAME, NON_NEGATIVE, UNIT_INTERVAL
from common.cli import Config, adjustable, setting
from common.errors import InputError
from loss import DENOISED, ENTANGLED, TERMS

WEIGHTS = {term.name: term.weight for term in TERMS}  # of the terms of the loss, by default


@dataclass(frozen=True, kw_only=True)
class ClassSlotSettings(Config):
    """class slot"""

    cls_token: bool | None = setting(None, "class slot: REG with it, REPA without (--entangle none)")
    entangle: str | None = setting(
        None,
        "what the class slot holds, denoised with the latents: the class token of the first encoder (default), the "
        "mean of its patch tokens, or the mean of the latents; or a learned token, not denoised; or no slot. In each "
        "case the slot is aligned with the class token",
        choices=ENTANGLED,
    )
    standardize_cls: str | None = adjustable(
        None,
        "standardise each channel of the class token, (token - mean) / std, before noise is added; alignment targets "
        "are not standardised, and generated class tokens are in the encoder's units. Mean and std are in the "
        "dataset.json of this folder or zip in --data-dir, which preprocessing/encode_tokens.py writes; a run keeps "
        "them. Default: not standardised, as published",
        check=ENTRY_NAME,
    )
    cls_lead: float = setting(
        0.0,
        "denoise the class token ahead of the latents by this time d: at time u, the latents have the time "
        "min(1, u (1 + d)) and the class token max(0, u (1 + d) - d), in training and in all samplers; 0: equal times "
        "(REG)",
        check=UNIT_INTERVAL,
    )
    cls: float = setting(WEIGHTS["cls"], "weight of the class token's velocity", check=NON_NEGATIVE)

    def check_combination(self) -> None:
        super().check_combination()
        if self.entangle and self.cls_token is not None and self.cls_token != (self.entangle != "none"):
            given = "--cls-token" if self.cls_token else "--no-cls-token"
            raise InputError(f"--entangle {self.entangle} contradicts {given}; give one of them")
        if self.standardize_cls and self.slot != "class":
            which = f"--standardize-cls {self.standardize_cls}: standardises the class token of an encoder"
            raise InputError(f"{which}, and the class slot holds {self.slot}; allowed: --entangle class")
        if self.cls_lead and self.slot not in DENOISED:
            allowed = f"allowed: --entangle {', '.join(DENOISED)}"
            raise InputError(
                f"--cls-lead {self.cls_lead:g}: no token is denoised with --entangle {self.slot}; {allowed}"
            )

    @property
    def slot(self) -> str:
        """What the class slot holds, one of `loss.ENTANGLED`."""
        return self.entangle or ("none" if self.cls_token is False else "class")
