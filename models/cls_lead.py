"""The class token leads: it is denoised ahead of the latents, by a lead d (the idea of SFD, arXiv 2512.04926, where
semantic latents lead; for REG's class token it is not published).

Both streams follow one time u, which runs from 1, noise, to 0, data:

    t_img = min(1, u (1 + d)),    t_cls = max(0, u (1 + d) - d)

So the class token is cleaner by d wherever both times are inside (0, 1). It starts at u = 1 and is finished at
u = d / (1 + d); the latents start at u = 1 / (1 + d). With d = 0 both times are u, as in REG.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ROUNDING = 1e-9  # a smaller time of the class token is 0: no step of a sampler must start or end there by rounding


def stream_times(u: Tensor, lead: float) -> tuple[Tensor, Tensor]:
    """Return the times of the latents and of the class token, with the shape and dtype of u, in [0, 1].

    u: times in [0, 1] of any shape, after the time shift of the path. lead: d, from 0 to 1; 0: both times are u.
    """
    if lead == 0:
        return u, u
    # u - d (1 - u) is u (1 + d) - d, in a form that is exactly 1 at u = 1.
    return (u * (1 + lead)).clamp(max=1), F.threshold(u - lead * (1 - u), ROUNDING, 0)


def moving_parts(lead: float) -> list[tuple[float, float, tuple[float, float]]]:
    """Return the parts of u from 1 to 0 in which none of the streams starts or is finished.

    Each is (first u, last u, rates); the rates are the derivatives of t_img and of t_cls with respect to u.
    """
    rate = 1 + lead
    parts = [(1.0, 1 / rate, (0.0, rate)), (1 / rate, lead / rate, (rate, rate)), (lead / rate, 0.0, (rate, 0.0))]
    return [(first, last, rates) for first, last, rates in parts if first > last]
