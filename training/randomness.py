"""Everything random in a training step, drawn in one place for the global batch.

The draws of step s come from (seed, s) only, and each process takes its rows of them. So a step is the same for any
number of processes and after a resume. To add a distribution of training times, add one entry to `TIME_DISTRIBUTIONS`;
`--weighting` then offers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loss import Draws
from models.interpolant import Interpolant
from samplers import derive_seed

TRAINING_STREAM = 1  # separates the draws of training from others that come from the same seed


def uniform_times(count: int, path: Interpolant, generator: torch.Generator) -> Tensor:
    """Return times (count,) from U(0, 1)."""
    return torch.rand(count, generator=generator, device=generator.device)


def lognormal_times(
    count: int, path: Interpolant, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Return times (count,) of the noise-to-signal ratio exp(N(mean, std^2)) (EDM, arXiv 2206.00364, section 5).

    On the linear path these are logit-normal times, sigmoid(mean + std N(0, 1)) (SD3, arXiv 2403.03206, section 3.1).
    """
    ratio = (mean + std * torch.randn(count, generator=generator, device=generator.device)).exp()
    return ratio / (1 + ratio) if path.path_type == "linear" else 2 / math.pi * torch.atan(ratio)


#: Distributions of training times by the name that `--weighting` gives them; each returns (count,) float32 in [0, 1].
TIME_DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_times,
    "lognormal": lognormal_times,
}


@dataclass(frozen=True)
class StepRandomness:
    """The source of a run's draws.

    Args:
        seed: of the run.
        batch_size: samples of the global batch.
        latent_shape: of one image, (C, h, w).
        cls_token_dim: width of the class token; None without one.
        path: the path between data and noise.
        weighting: distribution of times, a key of `TIME_DISTRIBUTIONS`; then the path shifts the times.
        time_parameters: further arguments of that distribution.
        cfg_prob: probability that a label is replaced by the null class.
        sprint_tokens: tokens of an image, class slot included, for SPRINT's choice of tokens; 0 without SPRINT.
        sprint_path_drop: probability of SPRINT's path drop in a step.
        device: of the draws.
    """

    seed: int
    batch_size: int
    latent_shape: tuple[int, int, int]
    cls_token_dim: int | None
    path: Interpolant
    weighting: str
    cfg_prob: float
    sprint_tokens: int = 0
    sprint_path_drop: float = 0.0
    time_parameters: Mapping[str, float] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    def draw(self, step: int) -> Draws:
        """Return the draws of a step for the global batch, float32, on the device."""
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.seed, TRAINING_STREAM, step))
        source = {"generator": generator, "device": generator.device}
        n = self.batch_size
        draws = Draws(
            t=self.path.shift(TIME_DISTRIBUTIONS[self.weighting](n, self.path, generator, **self.time_parameters)),
            noise=torch.randn(n, *self.latent_shape, **source),
            latent_noise=torch.randn(n, *self.latent_shape, **source),
            label_drop=torch.rand(n, **source) < self.cfg_prob,
            # Drawn last, so that all other draws are the same with and without a class token.
            cls_noise=torch.randn(n, self.cls_token_dim, **source) if self.cls_token_dim else None,
        )
        if not self.sprint_tokens:
            return draws
        # Drawn after all others, so that the others are the same with and without SPRINT.
        route = torch.rand(n, self.sprint_tokens, **source)
        path_drop = (torch.rand(1, **source) < self.sprint_path_drop).expand(n)  # one decision for all samples
        return draws._replace(route=route, path_drop=path_drop)
