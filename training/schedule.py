"""The learning rate of each step: warm-up and decay as a function of the step, and the rates of a resumed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.cli import changed, flag
from common.errors import InputError
from models.checkpoint import saved_settings
from training.config import TrainConfig
from training.messages import logger
from training.record import DamagedError, same_value
from training.restore import describe, optimizer_groups, saved_learning_rate

# What a resumed run keeps unless its flag is given, with its name in messages.
KEPT = {
    "learning_rate": "the learning rate",
    "muon_learning_rate": "the learning rate of Muon",
    "warmup_steps": "the number of warm-up steps",
    "lr_schedule": "the schedule of the learning rate",
}


def rate_factor(config: TrainConfig, step: int, last_step: int) -> float:
    """Return the factor of the learning rates in the step that follows `step` steps.

    It rises linearly to 1 at the end of the warm-up, and from there decays to 0 at `last_step`, where a run ends. It
    depends on nothing else, so a resumed run has the factors of a run that was never stopped.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = min((step - config.warmup_steps) / max(last_step - config.warmup_steps, 1), 1.0)
    return 1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def varies(config: TrainConfig) -> bool:
    """Return whether the learning rate changes during the run."""
    return config.warmup_steps > 0 or config.lr_schedule != "constant"


def kept_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that determine the learning rates; of Muon's and of the schedule only those that are on."""
    off = {"muon_learning_rate"} if config.optimizer == "adamw" else set()
    off |= set() if varies(config) else {"warmup_steps", "lr_schedule"}
    return {name: getattr(config, name) for name in KEPT if name not in off}


def choose_rates(config: TrainConfig, checkpoint: dict[str, Any] | None, path: Path | None) -> TrainConfig:
    """Return the settings with the learning rates and the schedule of the run, and say what changes.

    They are those of the checkpoint unless their flags are given. Raises DamagedError if the checkpoint has wrong ones.
    """
    if checkpoint is None:
        return config
    saved, groups = saved_settings(checkpoint, path), optimizer_groups(checkpoint, config.optimizer)
    before = {
        name: saved_learning_rate(group, saved, name, name in config.given)
        for name, group in zip(KEPT, groups, strict=False)
    }
    for name in ("warmup_steps", "lr_schedule"):
        before[name] = saved.get(name, getattr(TrainConfig, name))  # older runs have none
        if type(before[name]) is not type(getattr(config, name)):
            raise DamagedError(f"its {flag(name)} is {describe(before[name])}")
    kept = {name: value for name, value in before.items() if name not in config.given}
    try:
        chosen = changed(config, **kept)
    except InputError as error:
        raise DamagedError(f"its settings have {error}") from error
    for name, value in before.items():
        say_change(name, value, config, checkpoint["steps"] + 1)
    for name in ("max_train_steps", "epochs") if chosen.lr_schedule != "constant" else ():
        if name in saved and not same_value(saved[name], now := getattr(config, name)):
            end = f"now has {flag(name)} {now}, before {describe(saved[name])}"
            logger.info(f"note: the {chosen.lr_schedule} decay of the learning rate ends with the run, which {end}")
    return chosen


def say_change(name: str, before: float | str, config: TrainConfig, first: int) -> None:
    """Say whether a setting of the learning rate is that of the flag or of the checkpoint, if they differ."""
    now = getattr(config, name)
    if before == now:
        return
    now, before = (value[:40] if isinstance(value, str) else f"{value:g}" for value in (now, before))
    if name in config.given:
        logger.info(f"note: {KEPT[name]} is {now} from step {first}, as {flag(name)} says; before {before}")
    else:
        logger.info(f"note: {KEPT[name]} is {before}, that of the checkpoint; {flag(name)} changes it")
