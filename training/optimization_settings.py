"""The flags of train.py for the optimizer: a part of `training.config.TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.checks import BELOW_ONE, NON_NEGATIVE, POSITIVE, Check, between
from common.cli import Config, adjustable, setting
from common.errors import InputError
from models.checkpoint import MOST_STEPS

OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("constant", "cosine", "linear")
SEED = Check("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(Config):
    """optimization"""

    max_train_steps: int = adjustable(400_000, "number of training steps", check=between(1, MOST_STEPS))
    epochs: int | None = adjustable(None, "stop after N passes over the data, if this is earlier", check=POSITIVE)
    gradient_accumulation_steps: int | None = adjustable(
        None,
        "micro-batches into which a process divides its samples; --batch-size stays the total of a step (published: "
        "the total is --batch-size times this number). Default: on a GPU the smallest number with which a step fits "
        "the free memory, by an estimate (a resumed run keeps its number if it fits); on the CPU 1",
        check=POSITIVE,
    )
    learning_rate: float = adjustable(
        1e-4, "learning rate of AdamW; a resumed run keeps its own unless this flag is given", check=POSITIVE
    )
    warmup_steps: int = adjustable(
        0,
        "steps in which the learning rates rise linearly to their values; a resumed run keeps its own unless this flag "
        "is given",
        check=between(0, MOST_STEPS),
    )
    lr_schedule: str = adjustable(
        "constant",
        "learning rates after the warm-up: constant, or decaying to 0 at the end of the run along half a cosine or a "
        "line; a resumed run keeps its own unless this flag is given",
        choices=LR_SCHEDULES,
    )
    optimizer: str = setting(
        "adamw",
        "muon: Muon for the matrices of attention, MLPs and --sprint, AdamW for all other parameters (SR-DiT); needs "
        "torch 2.9 or later",
        choices=OPTIMIZERS,
    )
    muon_learning_rate: float = adjustable(
        1e-3,
        "with --optimizer muon: learning rate of Muon; a resumed run keeps its own unless this flag is given",
        check=POSITIVE,
    )
    adam_beta1: float = setting(0.9, "of AdamW", check=BELOW_ONE)
    adam_beta2: float = setting(0.999, "of AdamW", check=BELOW_ONE)
    adam_weight_decay: float = setting(0.0, "of AdamW", check=NON_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "of AdamW", check=NON_NEGATIVE)
    max_grad_norm: float = setting(1.0, "clip the gradient norm to this value", check=POSITIVE)
    seed: int = setting(0, "seed of all random numbers", check=SEED)

    def check_combination(self) -> None:
        super().check_combination()
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise InputError(f"--optimizer muon: needs torch 2.9 or later; installed: torch {torch.__version__}")
