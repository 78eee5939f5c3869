"""The REG loss (arXiv 2507.01467, section 3): velocity of the latents, alignment of hidden tokens (REPA,
arXiv 2410.06940, section 3), velocity of the class token.

    loss = mean (v - v_target)^2 + proj_coeff mean -cos(projected, encoder) + cls_coeff mean (v_cls - v_cls_target)^2

Without a class token it is REPA's loss; without encoder tokens too, SiT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from models.interpolant import Interpolant

# What can be entangled with the latents (REG, the ablation of the entangled signal): the first encoder's class token,
# the mean of its patch tokens, the mean of the latents, a learnt token that is not denoised, nothing.
ENTANGLED = ("class", "patch-mean", "latent-mean", "learnable", "none")
FROM_ENCODER = ("class", "patch-mean")


@dataclass(frozen=True)
class LossTerms:
    """The terms of each sample, (N,) float32, unweighted; a term that does not apply is None."""

    denoise: Tensor
    proj: Tensor | None
    cls: Tensor | None
    total: Tensor  # weighted sum, (N,)

    def named(self) -> dict[str, Tensor]:
        """Return the terms that apply, by the names they are logged under."""
        terms = {"loss": self.total, "denoise": self.denoise, "proj": self.proj, "cls": self.cls}
        return {name: term for name, term in terms.items() if term is not None}


@dataclass
class REGLoss:
    """The loss with its coefficients. What it computes before and after the network stands in `mix` and `compare`.

    Args:
        interpolant: the path.
        proj_coeff: weight of the alignment (paper: 0.5).
        cls_coeff: weight of the class token's velocity (paper: 0.03).
        weighting: how times are drawn where none are given, see `Interpolant.sample_time`.
    """

    interpolant: Interpolant
    proj_coeff: float = 0.5
    cls_coeff: float = 0.03
    weighting: str = "uniform"

    def __call__(
        self,
        model: Callable[..., tuple],
        x: Tensor,
        y: Tensor,
        cls_token: Tensor | None = None,
        encoder_tokens: Sequence[Tensor] = (),
        t: Tensor | None = None,
        noise: Tensor | None = None,
        cls_noise: Tensor | None = None,
        label_drop: Tensor | None = None,
    ) -> LossTerms:
        """Return the loss terms of each sample.

        Args:
            model: the network, see `SiT.forward`.
            x: clean latents (N, C, H, W).
            y: labels (N,) int64.
            cls_token: the encoder's class token (N, D), as it comes; None without a class slot.
            encoder_tokens: targets of the alignment, (N, tokens of the network, width) for each encoder: see
                `alignment_target`. Empty for no alignment.
            t: times (N,); drawn by `weighting` where not given.
            noise: (N, C, H, W); standard normal where not given.
            cls_noise: (N, D), a noise of its own; standard normal where not given.
            label_drop: (N,) bool, see `SiT.drop_labels`.
        """
        t = self.interpolant.sample_time(len(x), self.weighting, device=x.device) if t is None else t
        noise = torch.randn_like(x) if noise is None else noise
        if cls_token is not None and cls_noise is None:
            cls_noise = torch.randn_like(cls_token)
        x_t, cls_t = self.mix(x, noise, cls_token, cls_noise, t)
        velocity, projected, cls_velocity = model(
            x_t, t, y, cls_token=cls_t, label_drop=label_drop, project=bool(encoder_tokens)
        )
        return LossTerms(
            *self.compare(velocity, projected, cls_velocity, x, noise, cls_token, cls_noise, encoder_tokens, t)
        )

    def mix(
        self, x: Tensor, noise: Tensor, cls_token: Tensor | None, cls_noise: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the network gets to see, noisy latents (N, C, H, W) and the noisy class token (N, D) or None."""
        x_t = self.interpolant.interpolate(x, noise, t)
        cls_t = None if cls_token is None else self.interpolant.interpolate(cls_token, cls_noise, t)
        return x_t, cls_t

    def compare(
        self,
        velocity: Tensor,
        projected: Sequence[Tensor] | None,
        cls_velocity: Tensor | None,
        x: Tensor,
        noise: Tensor,
        cls_token: Tensor | None,
        cls_noise: Tensor | None,
        encoder_tokens: Sequence[Tensor],
        t: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return the fields of `LossTerms`, from the network's three outputs and what they should have been."""
        denoise = squared_error(velocity, self.interpolant.velocity_target(x, noise, t))
        proj = alignment(projected, encoder_tokens) if encoder_tokens else None
        cls = None
        if cls_token is not None:
            cls = squared_error(cls_velocity, self.interpolant.velocity_target(cls_token, cls_noise, t))
        total = denoise
        if proj is not None:
            total = total + self.proj_coeff * proj
        if cls is not None:
            total = total + self.cls_coeff * cls
        return denoise, proj, cls, total


@dataclass(frozen=True)
class TrainingNoise:
    """All that one training step draws at random, for every sample of the global batch.

    Drawn as a whole and then cut to a process's rows, a step is the same for any number of processes.
    """

    t: Tensor  # (B,) in [0, 1]
    noise: Tensor  # (B, C, h, w)
    latent_noise: Tensor  # (B, C, h, w), draws the latents from their moments
    label_drop: Tensor  # (B,) bool
    cls_noise: Tensor | None  # (B, D)

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        batch_size: int,
        latent_shape: tuple[int, int, int],
        cls_token_dim: int | None,
        interpolant: Interpolant,
        weighting: str = "uniform",
        label_drop_prob: float = 0.1,
    ) -> TrainingNoise:
        """Return the random numbers of `batch_size` samples, float32, on the generator's device."""
        on = {"generator": generator, "device": generator.device}
        return cls(
            t=interpolant.sample_time(batch_size, weighting, **on),
            noise=torch.randn(batch_size, *latent_shape, **on),
            latent_noise=torch.randn(batch_size, *latent_shape, **on),
            label_drop=torch.rand(batch_size, **on) < label_drop_prob,
            # Drawn last: with and without a class slot, everything else is the same.
            cls_noise=torch.randn(batch_size, cls_token_dim, **on) if cls_token_dim else None,
        )

    def rows(self, first: int, last: int) -> TrainingNoise:
        """Return the part that belongs to samples first .. last - 1 of the global batch."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        return TrainingNoise(**{name: None if value is None else value[first:last] for name, value in cut.items()})


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (N,) float32, of two tensors (N, ...)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def alignment(projected: Sequence[Tensor], encoder_tokens: Sequence[Tensor]) -> Tensor:
    """Return minus the cosine of projected and encoder tokens, mean over tokens and encoders, (N,) in [-1, 1].

    Normalised in float32: in float16 the squares of large features overflow (REPA, section 3).

    Shapes: one (N, T, width) in each list for each encoder.

    Raises:
        ValueError: the lists, or the shapes in them, do not match.
    """
    if len(projected) != len(encoder_tokens):
        raise ValueError(f"{len(projected)} projectors, but tokens of {len(encoder_tokens)} encoders")
    cosines = []
    for ours, theirs in zip(projected, encoder_tokens, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"projected tokens are {tuple(ours.shape)}, the encoder's {tuple(theirs.shape)}")
        ours, theirs = F.normalize(ours.float(), dim=-1), F.normalize(theirs.float(), dim=-1)
        cosines.append((ours * theirs).sum(dim=-1).mean(dim=1))
    return -torch.stack(cosines).mean(dim=0)


def alignment_target(cls_token: Tensor, patch_tokens: Tensor, with_cls: bool) -> Tensor:
    """Return what the network's tokens are aligned with: patch tokens (N, T, D), the class token (N, D) put first
    where the network has a slot, (N, 1 + T, D) (REG, section 3).

    Whatever the slot holds, its target is the class token: the entangled signals of the paper's ablation then differ in
    nothing else.
    """
    return torch.cat([cls_token.unsqueeze(1), patch_tokens], dim=1) if with_cls else patch_tokens


def entangled_token(kind: str, encoded: tuple[Tensor, Tensor] | None, x: Tensor | None) -> Tensor | None:
    """Return the clean token (N, D) float32 that is denoised with the latents; None for a kind that has none.

    Args:
        kind: of `ENTANGLED`.
        encoded: class token (N, D) and patch tokens (N, T, D) of the first encoder; needed for `FROM_ENCODER`.
        x: clean latents (N, C, h, w); their mean over positions has D = C.
    """
    if kind == "class":
        return encoded[0].float()
    if kind == "patch-mean":
        return encoded[1].float().mean(dim=1)
    return x.float().mean(dim=(2, 3)) if kind == "latent-mean" else None
