"""Steps that do not count: whose gradient is not finite.

The optimiser leaves them out by itself, so weights and averages stay clean. Here they are counted, their causes told
apart and what went into them written down; too many in a row end the run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from common.io import InputError
from dataset import GlobalBatchSampler, LatentDataset
from training.metrics import RunLog, StepReport

ADVICE = {
    "samples": "The files named there are at fault: look at them, or make them anew (preprocessing/encode.py).",
    "weights": "Every sample is affected, so it is not the data. Go on from an earlier checkpoint (--resume-step) with "
    "--mixed-precision bf16 or no; if it comes back, begin anew with --qk-norm or a smaller --learning-rate.",
    "gradient": "The losses are finite and the gradient is not. Look for absurd losses there (latents or images out "
    "of all proportion); go on with --mixed-precision bf16 or no; if it comes back, begin anew with --qk-norm.",
    "overflow": "fp16 overflows at any loss scale. Go on with --mixed-precision bf16; or begin anew with --qk-norm.",
}


class BadSteps:
    """Takes note of the steps of a run that do not count.

    Args:
        log: counts them, and gets their samples as bad_steps.jsonl.
        gather: joins the processes' tensors in their order; called on all processes at the same steps.
        names: of the samples of a step's global batch.
        limit: so many in a row end the run.
        precision: "fp16" has a loss scaler, for which an overflow now and then is its way of working.
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
        self.in_a_row = 0

    def note(self, report: StepReport) -> None:
        """Take note of a step's report.

        Raises:
            InputError: it is the last of too many steps in a row that did not count; the text says what to try.
        """
        if report.good:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        enough = self.in_a_row >= self.limit
        overflow = self.scaled and report.finite_loss
        self.log.count("overflow_steps" if overflow else "bad_steps")
        if overflow and not enough:
            return
        kind, samples = self._samples(report, overflow)
        self.log.write_line(
            "bad_steps.jsonl", {"step": report.step, "kind": kind, "means": report.means, "samples": samples}
        )
        where = self.log.folder / "bad_steps.jsonl"
        if enough:
            raise InputError(
                f"the last {self.in_a_row} steps, to step {report.step}, had no finite gradient: the run stops. The "
                f"checkpoints are good. What went into them: {where}. {ADVICE[kind]}"
            )
        if self.log.main:
            what = "loss" if not report.finite_loss else "gradient"
            print(f"warning: step {report.step} left out, its {what} is not finite; see {where}", file=sys.stderr)

    def _samples(self, report: StepReport, overflow: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return what ADVICE to give, and the samples whose loss is not finite, or all if it is the gradient."""
        columns = {name: values.tolist() for name, values in self.gather(report.samples).items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        samples = [{"file": name, **row} for name, row in zip(self.names(report.step), rows, strict=True)]
        broken = [sample for sample in samples if not math.isfinite(sample["loss"])]
        if not broken:
            return ("overflow" if overflow else "gradient"), samples
        return ("samples" if len(broken) < len(samples) else "weights"), broken


def sample_names(args: argparse.Namespace, data: LatentDataset, step: int) -> Iterator[str]:
    """Return the files of the latents that made up a step's global batch, in its order."""
    sampler = GlobalBatchSampler(len(data), args.batch_size, args.seed, range(step, step + 1), flip=args.flip)
    return (data.latent_path(i) for indices in sampler for i in indices)
