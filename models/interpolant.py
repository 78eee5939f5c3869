"""Paths between data and noise: the stochastic interpolant of SiT (arXiv 2401.08740, section 2), with reversed time:
t = 0 is data, t = 1 is noise.

    x_t = alpha_t x + sigma_t noise,    velocity = d x_t / d t = d_alpha_t x + d_sigma_t noise

The loss and the samplers take alpha and sigma from here. All functions accept images (N, C, H, W) and class tokens
(N, D).

A path also has a time shift (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2), which moves training times and the
steps of a sampler towards noise for large latents. The velocity at a given time does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checks import MOST_TIME_SHIFT

PATHS = ("linear", "cosine")
REFERENCE_SIZE = 4096  # values of the latents that need no shift: Stable Diffusion's at 256 px, 4 x 32 x 32


class Coefficients(NamedTuple):
    """alpha_t, sigma_t and their derivatives with respect to t, each with the shape and dtype of t."""

    alpha_t: Tensor
    sigma_t: Tensor
    d_alpha_t: Tensor
    d_sigma_t: Tensor


class Interpolant:
    """One path between data and noise.

    `path_type` is "linear" (alpha = 1 - t, sigma = t) or "cosine" (alpha = cos(pi t/2), sigma = sin(pi t/2)).
    `time_shift` is the factor s of `shift`; 1: no shift.
    Raises ValueError if the path is unknown, or the factor is not a number above 0 and at most `MOST_TIME_SHIFT`.
    """

    def __init__(self, path_type: str = "linear", time_shift: float = 1.0):
        if path_type not in PATHS:
            raise ValueError(f"path_type {path_type!r} is unknown; allowed: {', '.join(PATHS)}")
        if type(time_shift) not in (int, float) or not 0 < time_shift <= MOST_TIME_SHIFT:
            raise ValueError(f"time_shift {time_shift!r:.80}: must be a number above 0, at most {MOST_TIME_SHIFT}")
        self.path_type, self.time_shift = path_type, time_shift

    @classmethod
    def of_run(cls, settings: Mapping[str, Any]) -> Interpolant:
        """Return the path of a run from its settings, see `models.checkpoint.saved_settings`; they may lack both."""
        return cls(settings.get("path_type", PATHS[0]), settings.get("time_shift") or 1.0)

    def shift(self, t: Tensor) -> Tensor:
        """Return s t / (1 + (s - 1) t) for times of any shape (SD3, equation 23). Times 0 and 1 stay as they are."""
        if self.time_shift == 1:
            return t
        shifted = self.time_shift * t
        return shifted / (shifted + (1 - t))  # in this form, time 1 stays exactly 1

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return alpha_t, sigma_t, d_alpha_t, d_sigma_t at times `t` in [0, 1] of any shape (SiT, section 2)."""
        if self.path_type == "linear":
            one = torch.ones_like(t)
            return Coefficients(1 - t, t, -one, one)
        angle = t * (math.pi / 2)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha_t x + sigma_t noise for x and noise (N, ...), t (N,) or a scalar."""
        at = self.coefficients(_match(t, x))
        return at.alpha_t * x + at.sigma_t * noise

    def velocity_target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the network's target (SiT, section 2), d x_t / d t = d_alpha_t x + d_sigma_t noise, (N, ...)."""
        at = self.coefficients(_match(t, x))
        return at.d_alpha_t * x + at.d_sigma_t * noise

    def score_from_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the score, grad log p_t(x_t), of a velocity (SiT, section 2). It exists only for t > 0.

        With r = alpha_t / d_alpha_t it is (r velocity - x_t) / (sigma_t^2 - r d_sigma_t sigma_t). Here numerator and
        denominator are multiplied by d_alpha_t, which is 0 at t = 0 on the cosine path.

        Shapes: velocity and x_t (N, ...), t (N,) or a scalar.
        """
        at = self.coefficients(_match(t, x_t))
        numerator = at.alpha_t * velocity - at.d_alpha_t * x_t
        return numerator / (at.sigma_t * (at.d_alpha_t * at.sigma_t - at.alpha_t * at.d_sigma_t))

    def data_from_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the clean data x of a velocity at x_t: x_t - t velocity on the linear path, (N, ...).

        It is the solution of the equations for x_t and the velocity: (d_sigma_t x_t - sigma_t velocity) / (alpha_t
        d_sigma_t - d_alpha_t sigma_t). For the velocity of a network, which is a mean over all data that fit x_t, it is
        the mean of these data, the network's one-step estimate. Shapes: velocity and x_t (N, ...), t (N,) or a scalar.
        """
        at = self.coefficients(_match(t, x_t))
        numerator = at.d_sigma_t * x_t - at.sigma_t * velocity
        return numerator / (at.alpha_t * at.d_sigma_t - at.d_alpha_t * at.sigma_t)


def shift_of_latents(channels: int, size: int) -> float:
    """Return the time shift for latents (C, H, W) with H = W = `size`: sqrt(C H W / 4096) (SD3, section 5.3.2)."""
    return math.sqrt(channels * size**2 / REFERENCE_SIZE)


def _match(t: Tensor, like: Tensor) -> Tensor:
    """Return t (N,) as (N, 1, ..., 1), which broadcasts over `like` of any rank. A scalar is returned unchanged."""
    return t if t.ndim == 0 else t.view(-1, *[1] * (like.ndim - 1))
