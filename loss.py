"""The REG loss (arXiv 2507.01467, section 3): velocity of the latents, alignment of hidden tokens (REPA,
arXiv 2410.06940, section 3), velocity of the class token.

    loss = mean (v - v_target)^2 + proj_coeff mean -cos(projected, encoder) + cls_coeff mean (v_cls - v_cls_target)^2

Without a class token this is REPA's loss; without encoder tokens as well, it is SiT's. Contrastive flow matching
(arXiv 2506.05350) subtracts cfm_coeff mean (v - v_target of another sample)^2; it is off by default. If the class token
leads (models/cls_lead.py), each velocity is that of its own stream's time. To add a term, add one entry to `TERMS`: it
is then computed, weighted, logged, plotted in loss.png and shown in the progress bar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cls_lead import stream_times
from models.interpolant import Interpolant

# What the class slot can hold (REG, ablation of the entangled signal): the class token of the first encoder, the mean
# of its patch tokens, the mean of the latents, a learned token that is not denoised, or nothing.
ENTANGLED = ("class", "patch-mean", "latent-mean", "learnable", "none")
FROM_ENCODER = ("class", "patch-mean")
DENOISED = (*FROM_ENCODER, "latent-mean")


class Targets(NamedTuple):
    """What the frozen encoders give for a batch. The class token may be standardised, see models/class_scale.py."""

    cls_token: Tensor | None = None  # (N, D), clean token of the class slot, see `entangled_token`; None without one
    encoder_tokens: Sequence[Tensor] = ()  # one (N, T, width) per encoder, see `alignment_target`; empty: no alignment


class Draws(NamedTuple):
    """All random numbers of a training step, one row per sample. Drawn in `training.randomness` only."""

    t: Tensor  # (N,) in [0, 1]; the time u that both streams follow, see `models.cls_lead`
    noise: Tensor  # (N, C, h, w), standard normal
    latent_noise: Tensor  # (N, C, h, w), standard normal: samples the latents from their moments
    label_drop: Tensor  # (N,) bool: labels replaced by the null class
    cls_noise: Tensor | None = None  # (N, D), standard normal; None without a class token
    route: Tensor | None = None  # (N, 1 + T), uniform: which tokens SPRINT keeps; None without SPRINT
    path_drop: Tensor | None = None  # (N,) bool, equal for all samples of a step: SPRINT's path drop; None without it

    def rows(self, first: int, last: int) -> Draws:
        """Return the draws of samples first .. last - 1."""
        return Draws(*(None if value is None else value[first:last] for value in self))


class Comparison(NamedTuple):
    """What a term of the loss can read: the outputs of the network and what they are compared with."""

    velocity: Tensor  # (N, C, h, w)
    projected: Sequence[Tensor] | None  # one (N, T, width) per encoder at the first depth, then those of the next depth
    cls_velocity: Tensor | None  # (N, D)
    x: Tensor  # clean latents (N, C, h, w)
    targets: Targets
    draws: Draws
    path: Interpolant
    t: Tensor  # (N,), times of the latents
    t_cls: Tensor  # (N,), times of the class token


def velocity_error(at: Comparison) -> Tensor:
    """Return the squared error of the latents' velocity, (N,) (SiT, arXiv 2401.08740, section 2)."""
    return squared_error(at.velocity, at.path.velocity_target(at.x, at.draws.noise, at.t))


def contrastive_error(at: Comparison) -> Tensor:
    """Return minus the squared error of the latents' velocity for the target of another sample, (N,).

    Samples 2k and 2k + 1 of the batch are each other's other sample. A process must have both of each pair; the loss
    then does not depend on how the global batch is divided (contrastive flow matching, arXiv 2506.05350).

    Raises:
        ValueError: the number of samples is odd.
    """
    target = at.path.velocity_target(at.x, at.draws.noise, at.t)
    if len(target) % 2:
        raise ValueError(f"{len(target)} samples do not form pairs; contrastive flow matching needs an even number")
    return -squared_error(at.velocity, target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))


def alignment_error(at: Comparison) -> Tensor | None:
    """Return minus the cosine of projected and encoder tokens, (N,); None without encoder tokens."""
    return alignment(at.projected, at.targets.encoder_tokens) if at.targets.encoder_tokens else None


def cls_velocity_error(at: Comparison) -> Tensor | None:
    """Return the squared error of the class token's velocity, (N,); None without a class token (REG, section 3)."""
    if at.targets.cls_token is None:
        return None
    target = at.path.velocity_target(at.targets.cls_token, at.draws.cls_noise, at.t_cls)
    return squared_error(at.cls_velocity, target)


class Term(NamedTuple):
    """A term of the loss. `compute` returns one float32 value per sample, (N,), or None where it does not apply.

    A term of weight 0 in `TERMS` is computed only if `REGLoss.weights` has another weight for it.
    """

    name: str  # in metrics.jsonl and in the progress bar
    title: str  # of its panel in loss.png
    weight: float  # unless `REGLoss.weights` has another
    compute: Callable[[Comparison], Tensor | None]


TERMS = (
    Term("denoise", "latents: mean (v - target)²", 1.0, velocity_error),
    Term("proj", "alignment: mean -cos", 0.5, alignment_error),
    Term("cls", "class token: mean (v - target)²", 0.03, cls_velocity_error),
    Term("cfm", "contrastive: -mean (v - target of another sample)²", 0.0, contrastive_error),
)


@dataclass
class REGLoss:
    """The loss of a batch.

    Args:
        path: the path between data and noise.
        weights: weights of terms by name, where they differ from `TERMS`.
        cls_lead: that of the network, `SiTConfig.cls_lead`. Samples whose latents are at time 1, or whose class token
            is at time 0, count like all others, although samplers do not move a stream there.
    """

    path: Interpolant
    weights: dict[str, float] = field(default_factory=dict)
    cls_lead: float = 0.0

    def __call__(
        self, network: Callable[..., tuple], x: Tensor, y: Tensor, targets: Targets, draws: Draws
    ) -> dict[str, Tensor]:
        """Return the loss of each sample and its unweighted terms, (N,) float32 each, by name; "loss" is the sum.

        Args:
            network: see `SiT.forward`.
            x: clean latents (N, C, h, w).
            y: labels (N,) int64.
            targets: clean class token and encoder tokens.
            draws: times, noise and dropped labels.
        """
        x_t, cls_t = self.mix(x, targets, draws)
        sprint = {} if draws.route is None else {"route": draws.route, "path_drop": draws.path_drop}
        project = bool(targets.encoder_tokens)
        t, t_cls = stream_times(draws.t, self.cls_lead)
        lead = {"t_cls": t_cls} if self.cls_lead else {}
        output = network(x_t, t, y, cls_token=cls_t, label_drop=draws.label_drop, project=project, **sprint, **lead)
        return self.compare(*output, x, targets, draws)

    def mix(self, x: Tensor, targets: Targets, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Return the input of the network: noisy latents (N, C, h, w) and noisy class token (N, D) or None."""
        t, t_cls = stream_times(draws.t, self.cls_lead)
        x_t = self.path.interpolate(x, draws.noise, t)
        if targets.cls_token is None:
            return x_t, None
        return x_t, self.path.interpolate(targets.cls_token, draws.cls_noise, t_cls)

    def compare(
        self,
        velocity: Tensor,
        projected: Sequence[Tensor] | None,
        cls_velocity: Tensor | None,
        x: Tensor,
        targets: Targets,
        draws: Draws,
    ) -> dict[str, Tensor]:
        """Return what `__call__` returns, from the three outputs of the network."""
        times = stream_times(draws.t, self.cls_lead)
        at = Comparison(velocity, projected, cls_velocity, x, targets, draws, self.path, *times)
        weights = {term.name: self.weights.get(term.name, term.weight) for term in TERMS}
        values = {term.name: term.compute(at) for term in TERMS if term.weight or weights[term.name]}
        values = {name: value for name, value in values.items() if value is not None}
        return {"loss": sum(weights[name] * value for name, value in values.items()), **values}


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample, (N,) float32, of two tensors (N, ...)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def alignment(projected: Sequence[Tensor], encoder_tokens: Sequence[Tensor]) -> Tensor:
    """Return minus the cosine of projected and encoder tokens, mean over tokens, encoders and depths, (N,) in [-1, 1].

    Normalised in float32: in float16 the squares of large features overflow (REPA, section 3).

    Shapes: `encoder_tokens` has one (N, T, width) for each encoder. `projected` has as many for the first depth of the
    network with which they are aligned, then as many for the next depth, and so on.

    Raises:
        ValueError: the lists, or the shapes in them, do not match.
    """
    if not projected or len(projected) % len(encoder_tokens):
        raise ValueError(f"{len(projected)} projectors, but tokens of {len(encoder_tokens)} encoders")
    targets = [F.normalize(tokens.float(), dim=-1) for tokens in encoder_tokens]  # used at each depth
    cosines = []
    for number, ours in enumerate(projected):
        theirs = targets[number % len(targets)]
        if ours.shape != theirs.shape:
            raise ValueError(f"projected tokens are {tuple(ours.shape)}, the encoder's {tuple(theirs.shape)}")
        cosines.append((F.normalize(ours.float(), dim=-1) * theirs).sum(dim=-1).mean(dim=1))
    return -torch.stack(cosines).mean(dim=0)


def alignment_target(
    cls_token: Tensor, patch_tokens: Tensor, with_cls: bool, spatial_norm: float | None = None
) -> Tensor:
    """Return the tokens that the network's tokens are aligned with (REG, section 3).

    These are the patch tokens (N, T, D); for a network with a class slot the class token (N, D) is put first,
    (N, 1 + T, D). Whatever the slot holds, its target is the class token, so the entangled signals of the paper's
    ablation differ in nothing else.

    spatial_norm: share a of the mean over the tokens that is subtracted from the patch tokens z of each image and
        channel, before they are divided by their standard deviation: (z - a mean z) / (std z + 1e-6) (iREPA, arXiv
        2512.10794; there a = 0.6). None: the patch tokens are not normalised.
    """
    if spatial_norm is not None:
        mean, std = patch_tokens.mean(dim=1, keepdim=True), patch_tokens.std(dim=1, keepdim=True)  # each (N, 1, D)
        patch_tokens = (patch_tokens - spatial_norm * mean) / (std + 1e-6)
    return torch.cat([cls_token.unsqueeze(1), patch_tokens], dim=1) if with_cls else patch_tokens


def entangled_token(kind: str, encoded: tuple[Tensor, Tensor] | None, x: Tensor | None) -> Tensor | None:
    """Return the clean token (N, D) float32 that is denoised with the latents; None for a kind that has none.

    Args:
        kind: one of `ENTANGLED`.
        encoded: class token (N, D) and patch tokens (N, T, D) of the first encoder; needed for `FROM_ENCODER`.
        x: clean latents (N, C, h, w); their mean over positions has D = C.
    """
    if kind == "class":
        return encoded[0].float()
    if kind == "patch-mean":
        return encoded[1].float().mean(dim=1)
    return x.float().mean(dim=(2, 3)) if kind == "latent-mean" else None
