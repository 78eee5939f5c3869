"""One-step estimates of clean image and class token, and curves of what they show, as functions of the time.

From a state x_t and the network's velocity follows an estimate of the clean data, the mean of all data that fit the
state (`Interpolant.data_from_velocity`). Its class says what the network has decided at this time.

Times are those of the sampler, from 1, noise, to 0, data. If the class token leads, both streams have other times of
their own, see `models.cls_lead`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cls_lead import stream_times
from models.interpolant import Interpolant
from samplers import NoiseSource, State, Velocity, sample


class Estimates(NamedTuple):
    """Estimates of N clean latents and class tokens at T times, float32. The last time is 0, with the clean data."""

    times: list[float]  # T, descending
    x: Tensor  # (T, N, C, h, w)
    cls: Tensor  # (T, N, D)


class Recorder:
    """A velocity for the samplers that keeps the one-step estimates of its calls in `found`, by time."""

    def __init__(self, velocity: Velocity, interpolant: Interpolant, cls_lead: float):
        self.velocity, self.interpolant, self.cls_lead = velocity, interpolant, cls_lead
        self.found: dict[float, State] = {}

    def __call__(self, x: Tensor, cls: Tensor, t: Tensor) -> State:
        """Return the velocities of x (N, C, H, W) and cls (N, D) at time `t`, a scalar on the CPU."""
        velocities = self.velocity(x, cls, t)
        streams = zip(velocities, (x, cls), stream_times(t, self.cls_lead), strict=True)
        # Heun's method calls the velocity twice at a time: first at its prediction, then at the state, which is kept.
        self.found[t.item()] = tuple(self.interpolant.data_from_velocity(*stream).float() for stream in streams)
        return velocities


def while_sampling(
    velocity: Velocity,
    noise: NoiseSource,
    interpolant: Interpolant,
    solver: str,
    num_steps: int,
    cls_lead: float = 0.0,
) -> Estimates:
    """Return the estimates at each step of the ODE, see `samplers.sample`; at time 0, the final samples."""
    recorder = Recorder(velocity, interpolant, cls_lead)
    final = sample(recorder, noise, interpolant, "ode", solver, num_steps, cls_lead=cls_lead)
    return _stacked(recorder, final)


def of_noised_data(
    velocity: Velocity,
    data: State,
    noise: State,
    interpolant: Interpolant,
    times: list[float],
    cls_lead: float = 0.0,
) -> Estimates:
    """Return the estimates for clean data (N, ...), mixed with noise at each of some times; at time 0, the data."""
    recorder = Recorder(velocity, interpolant, cls_lead)
    for t in torch.tensor([t for t in times if t > 0], dtype=torch.float64):
        streams = zip(data, noise, stream_times(t, cls_lead), strict=True)
        recorder(*(interpolant.interpolate(*stream) for stream in streams), t)
    return _stacked(recorder, data)


def _stacked(recorder: Recorder, clean: State) -> Estimates:
    found = {**recorder.found, 0.0: tuple(part.float() for part in clean)}
    x, cls = (torch.stack(parts) for parts in zip(*found.values(), strict=True))
    return Estimates(list(found), x, cls)


def nearest(tokens: Tensor, others: Tensor) -> Tensor:
    """Return the numbers (...) of those of other tokens (K, D) that have the largest cosine with tokens (..., D).

    The number of a row of NaN, such as the mean of a class without images, is never returned.
    """
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(others, dim=-1).to(tokens).T
    return cosines.nan_to_num(-torch.inf).argmax(-1)


class Explained:
    """Share of the variance of clean data that their estimates explain, from sums over batches.

    At each time it is 1 - (mean squared error of the estimates) / (variance of the clean data): 1 if the estimates are
    the clean data, 0 if they are equally good as the mean of the data.
    """

    def __init__(self) -> None:
        self.errors: Tensor | float = 0.0  # (T,)
        self.clean: list[Tensor] = []

    def update(self, estimates: Tensor) -> None:
        """Add estimates (T, N, ...), the last of which are the clean data."""
        clean = estimates[-1].double()
        self.errors = self.errors + (estimates - clean).flatten(1).square().sum(1).cpu()
        self.clean.append(clean.cpu())

    def curve(self) -> list[float]:
        """Return the share at each time, T numbers of at most 1."""
        clean = torch.cat(self.clean)
        return (1 - self.errors / (clean - clean.mean(0)).square().sum()).tolist()


def time_above(times: list[float], curve: list[float], level: float) -> float | None:
    """Return the time from which on a curve is at or above a level until time 0; None if its end is below.

    times: descending. Between two times the curve is interpolated linearly.
    """
    below = [i for i, value in enumerate(curve) if value < level]
    if not below:
        return times[0]
    if (last := below[-1]) == len(curve) - 1:
        return None
    share = (level - curve[last]) / (curve[last + 1] - curve[last])
    return times[last] + share * (times[last + 1] - times[last])
