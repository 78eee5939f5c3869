"""Samplers (SiT, arXiv 2401.08740, section 2): image and class token together, from noise at t = 1 to data at t = 0.

A sampler takes any function `velocity(x, cls, t) -> (v, v_cls)`. `GuidedVelocity` makes one from a network, with
classifier-free guidance (arXiv 2207.12598) inside an interval of times (arXiv 2404.07724). The state is float64; the
network is called in its own dtype. The source of random numbers is an argument.

If the class token leads (models/cls_lead.py), t is the time u that both streams follow, and a step changes each stream
by the change of its own time.

`cls` is None for networks without a class token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.noise import ImageNoise
from models.cls_lead import moving_parts, stream_times
from models.interpolant import Interpolant

State = tuple[Tensor, "Tensor | None"]  # of the latents (N, C, H, W) and the class token (N, D)
Velocity = Callable[[Tensor, "Tensor | None", Tensor], State]
NoiseSource = Callable[[], State]
Steps = Iterable["tuple[Tensor, Tensor]"]  # times at the start and the end of each step

MODES = ("sde", "ode")
SOLVERS = ("euler", "heun", "dopri5")
SDE_LAST_TIME = 0.04  # start of the SDE's last step, which adds no noise (SiT, appendix; REG uses this value)
SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio; odd, so the low 32 bits of its multiples differ as well
ODE_TOLERANCE = 1e-6  # absolute and relative tolerance of the adaptive solver (SiT, section 4)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: uncond + scale (cond - uncond), where low <= t <= high and `scale` > 1.

    t is the time of the latents that the network is called with, after a time shift of the path.
    Only the image's scale turns guidance on. The class token then uses `cls_scale` in the same formula, or stays
    conditional if `cls_scale` is 0 or less. `cls_scale` None becomes `scale`. With `path_drop`, the unconditional
    branch skips the middle blocks of a network with SPRINT (SR-DiT, arXiv 2512.12386).
    Raises ValueError for a scale below 1, or an interval that is reversed or not inside 0 .. 1.
    """

    scale: float = 1.0
    cls_scale: float | None = None
    low: float = 0.0
    high: float = 1.0
    path_drop: bool = False

    def __post_init__(self) -> None:
        if self.cls_scale is None:
            object.__setattr__(self, "cls_scale", self.scale)
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"guidance scale {self.scale}: must be 1 (no guidance) or greater")
        if not math.isfinite(self.cls_scale):
            raise ValueError(f"guidance scale of the class token {self.cls_scale}: must be a finite number")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"guidance interval {self.low} .. {self.high}: must be 0 <= low <= high <= 1")

    @property
    def ignores_cls_scale(self) -> bool:
        """Whether `cls_scale` asks for guidance and has no effect, because `scale` turns guidance off."""
        return self.scale <= 1 < self.cls_scale

    @property
    def ignores_path_drop(self) -> bool:
        """Whether `path_drop` has no effect, because `scale` turns guidance off."""
        return self.path_drop and self.scale <= 1

    def active(self, t: float) -> bool:
        """Return whether guidance is on at time t. Times equal to `low` or `high` are inside the interval."""
        return self.scale > 1 and self.low <= t <= self.high


@dataclass(frozen=True)
class GuidedVelocity:
    """The velocity of a network with guidance, as a function for the samplers.

    Args:
        model: the network, see `SiT.forward`; it gets one time (of each stream, with a lead of the class token) for the
            full batch and computes no projectors.
        y: labels (N,) int64.
        null_class: the label that means "no class".
        guidance: scales and interval.
        dtype: dtype of x and cls in the network call. The time stays float32: half precision cannot tell neighbouring
            times of 250 steps apart.
        cls_lead: the lead of the class token, that of the network.
    """

    model: Callable[..., tuple]
    y: Tensor
    null_class: int
    guidance: Guidance = Guidance()
    dtype: torch.dtype = torch.float32
    cls_lead: float = 0.0

    def __call__(self, x: Tensor, cls: Tensor | None, t: Tensor) -> State:
        """Return the velocities of x (N, C, H, W) and cls (N, D), float64, at time `t`, a float64 scalar on the CPU."""
        t, t_cls = stream_times(t, self.cls_lead)
        guided = self.guidance.active(t.item())
        times = {"t": t, "t_cls": t_cls} if self.cls_lead else {"t": t}
        times = {name: torch.full((1,), at.item(), dtype=torch.float32, device=x.device) for name, at in times.items()}
        x, cls = _each(lambda part: part.to(self.dtype), (x, cls))
        if not guided:
            return self._call(x, cls, self.y, **times)
        if self.guidance.path_drop:  # the branches go through different blocks, so each is a call
            conditional = self._call(x, cls, self.y, **times)
            unconditional = self._call(x, cls, self._null_labels, **times, skip_middle=True)
        else:
            both = self._call(*_each(lambda part: torch.cat([part, part]), (x, cls)), self._both_labels, **times)
            conditional = _each(lambda v: v.chunk(2)[0], both)
            unconditional = _each(lambda v: v.chunk(2)[1], both)
        v, v_cls = conditional
        v = _guide(v, unconditional[0], self.guidance.scale)
        if v_cls is not None and self.guidance.cls_scale > 0:
            v_cls = _guide(v_cls, unconditional[1], self.guidance.cls_scale)
        return v, v_cls

    @cached_property
    def _null_labels(self) -> Tensor:
        """N times the null class, (N,)."""
        return torch.full_like(self.y, self.null_class)

    @cached_property
    def _both_labels(self) -> Tensor:
        """The labels, then N times the null class, (2 N,)."""
        return torch.cat([self.y, self._null_labels])

    def _call(self, x: Tensor, cls: Tensor | None, y: Tensor, t: Tensor, **options: Any) -> State:
        v, _, v_cls = self.model(x, t, y, cls_token=cls, project=False, **options)
        return _each(Tensor.double, (v, v_cls))


def _each(function: Callable[..., Tensor], *states: tuple) -> State:
    """Return `function` of the states' latents, and of their class tokens, which are None without a class token.

    The first argument is a state; others may be pairs of other values, such as the times of both streams.
    """
    x, cls = zip(*states, strict=True)
    return function(*x), None if cls[0] is None else function(*cls)


def _step(state: State, direction: State, t: Tensor, t_next: Tensor, lead: float) -> State:
    """Return state + direction * size, where size is the change of each stream's own time from t to t_next."""
    times = stream_times(t, lead), stream_times(t_next, lead)
    return _each(lambda x, v, t, t_next: x + v * (t_next - t), state, direction, *times)


def _guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional)


def sde_times(num_steps: int, last_time: float = SDE_LAST_TIME) -> Tensor:
    """Return the times of the SDE sampler: `num_steps` times from 1 to 0.04, then 0; (num_steps + 1,) float64."""
    intervals = max(num_steps - 1, 1)
    hundredths = 100 * intervals - (100 - 100 * last_time) * torch.arange(num_steps, dtype=torch.float64)
    return torch.cat([hundredths / (100 * intervals), torch.zeros(1).double()])


def ode_times(num_steps: int) -> Tensor:
    """Return the times of the ODE samplers: from 1 to 0 in `num_steps` equal steps; (num_steps + 1,) float64.

    Each time, here and in `sde_times`, is one division of integers, so it equals the literal of its decimal fraction:
    0.3, not 0.30000000000000004. A time equal to a bound of the guidance interval is therefore inside the interval.
    """
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps


def diffusion(t: Tensor) -> Tensor:
    """Return w_t = 2 t, the squared noise strength of the SDE. REG uses sigma_t of the linear path for both paths."""
    return 2 * t


def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    cls: Tensor | None,
    noise: NoiseSource,
    interpolant: Interpolant,
    steps: Steps,
    cls_lead: float = 0.0,
) -> State:
    """Return x and cls at t = 0 by Euler-Maruyama on the reverse SDE (SiT, section 2). One network call per step.

    x (N, C, H, W) and cls (N, D) or None are the state at t = 1, float64. `noise` is called at each step except the
    last and returns standard normals of these shapes. `steps` are the pairs of neighbouring times of `sde_times`, which
    may be shifted; the last step is the one to t = 0. The step in which a stream's own time becomes 0 adds no noise to
    it, and later steps do not change it.
    """

    def step(x: Tensor, v: Tensor, drawn: Tensor | None, t: Tensor, t_next: Tensor) -> Tensor:
        if t_next == t:
            return x
        drift = v - diffusion(t) / 2 * interpolant.score_from_velocity(v, x, t)
        x = x + drift * (t_next - t)
        return x + drawn * (diffusion(t) * (t - t_next)).sqrt() if t_next > 0 else x

    state = (x, cls)
    for t, t_next in steps:
        v = velocity(*state, t)
        drawn = noise() if t_next > 0 else (None, None)
        state = _each(step, state, v, drawn, stream_times(t, cls_lead), stream_times(t_next, cls_lead))
    return state


def fixed_step_ode(
    velocity: Velocity,
    x: Tensor,
    cls: Tensor | None,
    steps: Steps,
    second_order: bool = False,
    cls_lead: float = 0.0,
) -> State:
    """Return x and cls at t = 0 on the probability-flow ODE by Euler's or, if `second_order`, by Heun's method.

    Euler calls the network once per step, Heun twice, except in the last step (EDM, arXiv 2206.00364, algorithm 1).
    Each call is guided if its own time is inside the guidance interval or equal to a bound: the second call of Heun's
    method by the time at the end of the step. REPA's sampler uses the time at the start of the step for both calls, so
    its images differ from these in the steps that cross a bound. `x` and `cls` are as in `euler_maruyama`; `steps` are
    the pairs of neighbouring times of `ode_times`.
    """
    state = (x, cls)
    for t, t_next in steps:
        v = velocity(*state, t)
        if second_order and t_next > 0:
            w = velocity(*_step(state, v, t, t_next, cls_lead), t_next)
            # A stream whose own time becomes 0 is not corrected either.
            v = _each(lambda v, w, end: (v + w) / 2 if end > 0 else v, v, w, stream_times(t_next, cls_lead))
        state = _step(state, v, t, t_next, cls_lead)
    return state


def dopri5(
    velocity: Velocity, x: Tensor, cls: Tensor | None, tolerance: float = ODE_TOLERANCE, cls_lead: float = 0.0
) -> State:
    """Return x and cls at t = 0 by the adaptive Dormand-Prince method on the probability-flow ODE.

    The step size is chosen for the full batch, so a sample depends on the rest of its batch, within the tolerance.
    There is no grid of times, so a time shift has no effect here. If the class token leads, the parts in which both
    streams, or one of them, move are integrated one after the other.
    """
    from torchdiffeq import odeint

    def field(t: Tensor, state: tuple[Tensor, ...], rates: tuple[float, float]) -> tuple[Tensor, ...]:
        v = velocity(*state, *no_cls, t.cpu())
        return _each(lambda v, rate: v * rate, v, rates)[: len(state)]

    state, no_cls = ((x,), (None,)) if cls is None else ((x, cls), ())  # odeint does not accept None
    for first, last, rates in moving_parts(cls_lead):
        times = torch.tensor([first, last], dtype=torch.float64, device=x.device)
        how = {"rtol": tolerance, "atol": tolerance, "method": "dopri5"}
        if cls_lead:  # no step beyond the part, where the rates are others
            how["options"] = {"step_t": times[1:]}
        path = odeint(partial(field, rates=rates), state, times, **how)
        state = tuple(values[-1] for values in path)
    return (*state, *no_cls)


def derive_seed(*key: int) -> int:
    """Return a 64-bit generator seed for `key`, integers from 0. Seeds of different keys are independent.

    The key's length is part of the entropy, because NumPy pads keys with zeros: (0, 1) and (0, 1, 0) would be equal.
    """
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])


def image_seeds(seed: int, numbers: Iterable[int]) -> list[int]:
    """Return the generator seeds of the images with these numbers, for a global seed.

    No two images below number 2^32 have the same noise. PyTorch's CPU generator uses only the low 32 bits of a seed;
    among 50,000 random seeds, two would have equal low bits in about every fourth set. These seeds never do.
    """
    first = derive_seed(seed)
    return [(first + number * SEED_STEP) % 2**64 for number in numbers]


def sample(
    velocity: Velocity,
    noise: NoiseSource,
    interpolant: Interpolant,
    mode: str = "sde",
    solver: str = "euler",
    num_steps: int = 250,
    progress: Callable[[list], Iterable] = iter,
    cls_lead: float = 0.0,
) -> State:
    """Return generated latents (N, C, H, W) and class tokens (N, D) or None, float64.

    Args:
        velocity: see `GuidedVelocity`.
        noise: returns standard normals; the first ones are the state at t = 1.
        interpolant: the path; its time shift applies to all times of `sde_times` and `ode_times`.
        mode: "sde" (Euler-Maruyama) or "ode".
        solver: solver of the ODE: "euler", "heun" or "dopri5", which chooses its step sizes itself.
        num_steps: number of steps, at least 1; not used by dopri5.
        progress: wraps the list of steps, for example `tqdm.tqdm`; not used by dopri5.
        cls_lead: the lead of the class token, see `models.cls_lead`; 0: none.

    Raises ValueError for an unknown mode or solver, a solver of the ODE in mode "sde", or `num_steps` below 1.
    """
    for name, value, allowed in (("mode", mode, MODES), ("solver", solver, SOLVERS)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is unknown; allowed: {', '.join(allowed)}")
    if mode == "sde" and solver != "euler":
        raise ValueError(f"solver {solver!r} is a solver of the ODE; allowed with mode 'sde': euler")
    if not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; allowed: whole numbers from 1")
    x, cls = _each(Tensor.double, noise())
    if mode == "ode" and solver == "dopri5":
        return dopri5(velocity, x, cls, cls_lead=cls_lead)
    last_time = SDE_LAST_TIME / (1 + cls_lead)  # the time of the latents is then `SDE_LAST_TIME`, without a time shift
    times = interpolant.shift(sde_times(num_steps, last_time) if mode == "sde" else ode_times(num_steps))
    steps = progress(list(pairwise(times)))
    if mode == "sde":
        return euler_maruyama(velocity, x, cls, noise, interpolant, steps, cls_lead)
    return fixed_step_ode(velocity, x, cls, steps, solver == "heun", cls_lead)


def sample_images(
    model: torch.nn.Module,
    labels: list[int],
    seeds: list[int],
    interpolant: Interpolant,
    guidance: Guidance = Guidance(),
    mode: str = "sde",
    solver: str = "euler",
    num_steps: int = 250,
    network: Callable[..., tuple] | None = None,
    rows: int = 1,
    progress: Callable[[list], Iterable] = iter,
) -> State:
    """Return latents (N, C, H, W) and class tokens (N, D) or None, float64, for images given by label and seed.

    Class tokens are in the units of the encoder, also if the network denoises standardised ones.

    Args:
        model: a `SiT`; the result is on its device.
        labels: one for each image, 0 .. num_classes.
        seeds: one for each image, see `image_seeds`. An image does not depend on the rest of the batch.
        interpolant: the path the model was trained on.
        guidance, mode, solver, num_steps, progress: see `GuidedVelocity` and `sample`.
        network: called instead of the model, see `models.inference.fast_network`.
        rows: smallest batch that the network is called with. A smaller batch is padded with copies of its last image,
            which are not returned.

    Raises ValueError for a label that the network does not have, for unequal numbers of labels and seeds, for path drop
    in guidance of a network without SPRINT, and as `sample` does.
    """
    if guidance.path_drop and not model.config.sprint:
        raise ValueError("path drop in guidance: needs a network with SPRINT, and this network has none")
    if wrong := [label for label in labels if not 0 <= label <= model.null_class]:
        allowed = f"0 .. {model.null_class - 1}, and {model.null_class} for no class"
        raise ValueError(f"label {wrong[0]}: the network does not have it; allowed: {allowed}")
    if len(labels) != len(seeds):
        raise ValueError(f"{len(labels)} labels and {len(seeds)} seeds; each image needs one of both")
    count, padding = len(labels), rows - len(labels)  # a negative number adds nothing below
    labels, seeds = ([*part, *[*part[-1:]] * padding] for part in (labels, seeds))
    device = next(model.parameters()).device
    # Pinned, because a copy from pageable memory waits for the previous batch.
    y = torch.tensor(labels, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = ImageNoise(seeds, shape, model.cls_token_dim, device)
    lead = model.config.cls_lead
    velocity = GuidedVelocity(network or model, y, model.null_class, guidance, model.dtype, lead)
    with torch.inference_mode():
        x, cls = sample(velocity, noise, interpolant, mode, solver, num_steps, progress, lead)
        if model.cls_scale is not None:
            cls = model.cls_scale.restore(cls)
        return _each(lambda part: part[:count], (x, cls))
