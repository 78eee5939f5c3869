"""What the host learns of each training step, without ever making a GPU wait: means over the global batch, whether the
step counted, whether a process was told to stop.

A step's numbers are averaged over the processes and copied to the host beside the computation; they are read some
steps later, when they have long arrived. All processes read the same numbers at the same step, so whatever is decided
by them is decided by all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GPU_LAG = 2  # steps: the GPU always has a whole step queued while the host looks at an older one


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step. `samples`: what was added for each sample of this process, (n,) each, on the device."""

    step: int
    means: dict[str, float]
    wishes: frozenset[str]  # what any process asked for
    samples: dict[str, Tensor]

    @property
    def good(self) -> bool:
        """Whether the weights were updated: they are not where the gradient is not finite."""
        return math.isfinite(self.means["grad_norm"])

    @property
    def finite_loss(self) -> bool:
        """Whether the loss of every sample of the global batch is finite."""
        return math.isfinite(self.means["loss"])


class StepReports:
    """Sends the reports of steps from the device and receives them on the host.

    Args:
        reduce: averages a tensor over the processes.
        device: where the numbers come from.
        wishes: names of what a process can ask all others for.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device, wishes: tuple[str, ...]):
        self.reduce = reduce
        self.device = device
        self.wishes = wishes
        self.lag = GPU_LAG if device.type == "cuda" else 0
        self._parts: list[dict[str, Tensor]] = []
        self._terms: list[str] = []
        # Held for a step, so that gloo's thread is not the last to let go of it: for that it would need Python's lock,
        # and a process that ends meanwhile holds the lock while it waits for that thread, for ever.
        self._reduced: Tensor | None = None
        self._sent: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None, dict[str, Tensor]]] = deque()

    def add(self, terms: dict[str, Tensor], **details: Tensor) -> None:
        """Add what one accumulation part computed: for each of its samples the loss terms, and what else to keep."""
        self._parts.append({name: values.detach() for name, values in {**terms, **details}.items()})
        self._terms = list(terms)

    def send(self, step: int, grad_norm: Tensor, wishes: set[str]) -> None:
        """Complete the report of a step."""
        samples = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        values = [samples[name].float().mean() for name in self._terms] + [grad_norm.detach().float()]
        values += [torch.full((), float(name in wishes), device=self.device) for name in self.wishes]
        vector = self._reduced = self.reduce(torch.stack(values))
        copied = None
        if self.device.type == "cuda":
            vector = torch.empty(vector.shape, pin_memory=True).copy_(vector, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._sent.append((step, [*self._terms, "grad_norm"], vector, copied, samples))

    def receive(self, everything: bool = False) -> list[StepReport]:
        """Return the reports that have arrived by now, oldest first; with `everything`, wait for all."""
        arrived = []
        while len(self._sent) > (0 if everything else self.lag):
            step, names, vector, copied, samples = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            values = vector.tolist()
            asked = {name for name, value in zip(self.wishes, values[len(names) :], strict=True) if value > 0}
            means = dict(zip(names, values[: len(names)], strict=True))
            arrived.append(StepReport(step, means, frozenset(asked), samples))
        return arrived
