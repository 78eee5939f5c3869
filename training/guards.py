"""Guards against steps whose gradient is not finite ("bad steps").

The optimizer skips such a step, so weights and averages stay finite. The step is counted, its cause is determined and
its samples are written to bad_steps.jsonl; too many consecutive bad steps end the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.errors import InputError
from models.checkpoint import list_checkpoints
from models.ema import local_parameters
from training.messages import logger
from training.metrics import RunLog, StepReport
from training.optimizers import MuonWithAdamW

ADVICE = {
    "samples": "The cause is in the files named there: inspect them, or create them again (preprocessing/encode.py).",
    "weights": "Every sample is affected, so the data is not the cause. Resume from an earlier checkpoint "
    "(--resume-step) with --mixed-precision bf16 or no; if it happens again, start a new run with --qk-norm or a "
    "smaller --learning-rate.",
    "gradient": "The losses are finite and the gradient is not. Look for very large losses there (latents or images "
    "out of range); resume with --mixed-precision bf16 or no; if it happens again, start a new run with --qk-norm.",
    "overflow": "fp16 overflows at any loss scale. Resume with --mixed-precision bf16, or start a new run with "
    "--qk-norm.",
}


ADVICE_WEIGHTS = (
    "Use a smaller --learning-rate, or --mixed-precision bf16 or no. If --adam-epsilon is 0 or very small, start a new "
    "run with 1e-8: a weight whose gradients are all 0 becomes 0 / 0."
)

# Optimizers whose fused form skips a step on the device if `found_inf` is 1, and leaves its state untouched. (Fused SGD
# skips too, but if the first step is skipped, its momentum starts from uninitialized memory.)
SKIP_ON_DEVICE = (torch.optim.Adam, torch.optim.AdamW)


class GuardedOptimizer:
    """An optimizer that applies a step only if the gradient is finite.

    `MuonWithAdamW` and the optimizers of `SKIP_ON_DEVICE` do so without a host sync. For all others, each step reads
    the gradient norm on the host.

    Args:
        optimizer: prepared by accelerate.
        tell: is given one line at the start if steps need a host sync.
    """

    def __init__(self, optimizer: AcceleratedOptimizer, tell: Callable[[str], object] = print):
        self.optimizer = optimizer
        inner = optimizer.optimizer
        is_fused = isinstance(inner, SKIP_ON_DEVICE) and bool(inner.defaults.get("fused"))
        self.skips_on_device = is_fused or isinstance(inner, MuonWithAdamW)
        if not self.skips_on_device:
            tell(
                f"note: {type(inner).__name__} does not honour found_inf: each step waits for the gradient norm, so "
                "that steps with a gradient that is not finite can be skipped"
            )

    def step(self, grad_norm: Tensor, rate_factor: float = 1.0) -> Tensor:
        """Update the weights if the norm of the gradient is finite; return 1.0 if so, else 0.0, on the device.

        `rate_factor` multiplies the learning rates in this step; the optimizer, and so a checkpoint, keeps the rates.
        """
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * rate_factor
        good = grad_norm.isfinite().float()
        if self.skips_on_device:
            self.optimizer.optimizer.found_inf = 1 - good
        if self.skips_on_device or self.optimizer.scaler is not None or good.item():  # a loss scaler skips by itself
            self.optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        return good

    def zero_grad(self) -> None:
        """Release the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer state, by index of the parameter."""
        return self.optimizer.state_dict()

    def moments(self) -> list[Tensor]:
        """Return the tensors of the optimizer state, or this process's shards of them; without the counts of steps."""
        values = (value for state in self.optimizer.optimizer.state.values() for value in state.values())
        found = (value.to_local() if isinstance(value, DTensor) else value for value in values)
        return [value for value in found if isinstance(value, Tensor) and value.ndim and value.is_floating_point()]


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return 1.0 if all numbers are finite, else 0.0, a scalar on the device of the tensors, without a host sync.

    Numbers so large that their sum overflows count as not finite.
    """
    # Sums keep NaN and infinity. On a GPU few kernels compute all norms; on the CPU plain sums are four times faster.
    on_gpu = tensors[0].device.type == "cuda"
    sums = torch._foreach_norm(tensors, 1) if on_gpu else [tensor.sum() for tensor in tensors]
    return torch.stack(sums).isfinite().all().float()


@dataclass
class FiniteWeights:
    """Ends a run whose weights are not finite, which a finite gradient does not exclude: see ADVICE_WEIGHTS.

    Such weights are never saved, sampled or scored. All processes end at the same step.
    """

    model: nn.Module
    average: nn.Module
    optimizer: GuardedOptimizer
    reduce: Callable[[Tensor], Tensor]  # averages a tensor over the processes
    checkpoints: Path  # folder
    known_at: int  # step at which they were finite

    @torch.no_grad()
    def flag(self) -> Tensor:
        """Return 1.0 if weights and averages of this process are finite, else 0.0, without a host sync."""
        return all_finite(local_parameters(self.model) + local_parameters(self.average))

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Check weights, averages and the optimizer's moments after a step. Waits for the device.

        Raises:
            InputError: they are not finite.
        """
        moments = self.optimizer.moments()
        flag = self.flag() * all_finite(moments) if moments else self.flag()
        self.record(step, self.reduce(flag).item() == 1)

    def record(self, step: int, finite: bool) -> None:
        """Record whether the weights were finite on all processes after a step; raise InputError if they were not."""
        if finite:
            self.known_at = step
            return
        good = [path for path in list_checkpoints(self.checkpoints) if int(path.stem) <= self.known_at]
        newest = f"{good[-1]}: resume from it by --resume-step {int(good[-1].stem)}" if good else "none: start again"
        raise InputError(
            f"the weights, their averages or the optimizer's moments are not finite at step {step}; at step "
            f"{self.known_at} they were finite. The run ends without saving them. Newest good checkpoint: {newest}. "
            f"{ADVICE_WEIGHTS}"
        )


class BadSteps:
    """Counts and describes the bad steps of a run.

    Args:
        log: receives the counts, and the samples as bad_steps.jsonl.
        gather: concatenates the tensors of all processes in order; called on all processes at the same steps.
        names: file names of the samples of a step's global batch.
        limit: number of consecutive bad steps that ends the run.
        precision: "fp16" has a loss scaler, for which an occasional overflow is normal.
    """

    def __init__(
        self,
        log: RunLog,
        gather: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        names: Callable[[int], Iterable[str]],
        limit: int,
        precision: str,
    ):
        self.log = log
        self.gather = gather
        self.names = names
        self.limit = limit
        self.scaled = precision == "fp16"
        self.consecutive = 0

    def record(self, report: StepReport) -> None:
        """Record the report of a step.

        Raises:
            InputError: this is the last of `limit` consecutive bad steps; the message says what to try.
        """
        if report.good:
            self.consecutive = 0
            return
        self.consecutive += 1
        at_limit = self.consecutive >= self.limit
        overflow = self.scaled and report.finite_loss
        self.log.count("overflow_steps" if overflow else "bad_steps")
        if overflow and not at_limit:
            return
        kind, samples = self._samples(report, overflow)
        self.log.write_line(
            "bad_steps.jsonl", {"step": report.step, "kind": kind, "means": report.means, "samples": samples}
        )
        file = self.log.folder / "bad_steps.jsonl"
        if at_limit:
            raise InputError(
                f"the last {self.consecutive} steps, up to step {report.step}, had no finite gradient: the run stops. "
                f"The checkpoints are good. Samples of these steps: {file}. {ADVICE[kind]}"
            )
        what = "loss" if not report.finite_loss else "gradient"
        logger.warning("step %d skipped, its %s is not finite; see %s", report.step, what, file)

    def _samples(self, report: StepReport, overflow: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return a key of ADVICE, and the samples whose loss is not finite, or all if only the gradient is not."""
        columns = {name: values.tolist() for name, values in self.gather(report.samples).items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        samples = [{"file": name, **row} for name, row in zip(self.names(report.step), rows, strict=True)]
        broken = [sample for sample in samples if not math.isfinite(sample["loss"])]
        if not broken:
            return ("overflow" if overflow else "gradient"), samples
        return ("samples" if len(broken) < len(samples) else "weights"), broken
