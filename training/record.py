"""What a run records about itself, in args.json and in its checkpoints, and the comparison of a resumed run with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.checks import AUTO
from common.classes import ClassSet, label_ranges
from common.cli import fixed_settings, flag, settings
from common.errors import InputError
from models.checkpoint import checkpoint_classes
from models.encoders import AFTER_NORM, name_with_tokens
from models.layouts import plain_names
from models.sit import SiTConfig
from models.sit_config import depths_as_setting, qk_norm_name
from models.switches import switches_of_weights
from training.config import DERIVED, DIGESTS, NONE_MEANS, RunFacts, TrainConfig

# Settings that runs of earlier versions did not record; they had the default.
ADDED = (
    "norm", "rope", "value_residual", "sprint", "projector", "align_stop_steps", "optimizer", "time_mean", "time_std",
    "time_shift", "cfm_coeff", "cls_lead",
)  # fmt: skip


class DamagedError(InputError):
    """A part of a checkpoint that cannot be restored. The message has no path; `training.restore.restoring` adds it."""


def saved_args(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    """Return the settings as a checkpoint's `args` and args.json hold them: the flags, completed by the facts."""
    network = facts.network
    return {
        **asdict(config),
        "enc_type": name_with_tokens(config.enc_type),
        "qk_norm": network.to_json()["qk_norm"],
        "encoder_depth": depths_as_setting(network.encoder_depth),
        "entangle": config.slot,
        "time_shift": facts.path.time_shift,
        "cls_token": config.slot != "none",
        "mixed_precision": config.precision,
        "gradient_accumulation_steps": facts.micro_batches,
        "resolution": facts.resolution,
        "codec": facts.latent_format.to_json(),
        "latent_size": network.input_size,
        **facts.digests,
        "z_dims": list(network.z_dims),
        **{
            name: getattr(network, name)
            for name in (
                "depth", "hidden_size", "num_heads", "num_classes", "in_channels", "cls_token_dim",
            )
        },
    }  # fmt: skip


def run_record(config: TrainConfig, facts: RunFacts) -> dict[str, Any]:
    """Return the content of args.json: `saved_args`, and which settings the data, the model and others determined."""
    saved = saved_args(config, facts)
    derived = [name for name in settings(TrainConfig) if getattr(config, name) is None and saved[name] is not None]
    return {**saved, DERIVED: derived}


def check_same_run(current: dict[str, Any], saved: dict[str, Any], source: str | Path) -> None:
    """Raise InputError, naming both values, where settings contradict those that a run was started with.

    Args:
        current: settings as `saved_args` returns them, or those of a `TrainConfig` alone.
        saved: what the run recorded.
        source: named in the error.
    """
    known_flags = settings(TrainConfig).keys()
    changeable = known_flags - fixed_settings(TrainConfig) | DIGESTS.keys()
    for name, value in current.items():
        before = saved.get(name)
        if name == "enc_type" and isinstance(value, str) and isinstance(before, str):
            value, before = name_with_tokens(value), name_with_tokens(before, AFTER_NORM)
        if name in ADDED and "codec" in saved:  # published files do not show what these were
            before = saved.get(name, settings(TrainConfig)[name].default)
        if name == "time_shift" and value == AUTO:  # compared when the size of the latents is known
            continue
        if name == "qk_norm":
            value, before = qk_norm_name(value), qk_norm_name(before)
        known = name in NONE_MEANS or (value is not None and before is not None)
        if name not in changeable and known and not same_value(value, before):
            now, then = (NONE_MEANS[name] if one is None else f"{one}"[:200] for one in (value, before))
            raise InputError(
                f"{flag(name) if name in known_flags else name} is {now}, but {source} was started with {then}, and a "
                "run keeps this setting. To start another run from its weights: a new --exp-name and --init-from "
                "CHECKPOINT"
            )


def same_value(value: Any, before: Any) -> bool:
    """Return whether a value from a file, of any type, equals a setting. Tensors, whose == is a tensor, never do."""
    try:
        return bool(value == before)
    except (RuntimeError, TypeError, ValueError):
        return False


def check_same_inputs(config: TrainConfig, facts: RunFacts, saved: dict[str, Any]) -> list[str]:
    """Return which digests of what a run reads, names of `DIGESTS`, are not those that it recorded in `saved`.

    Older runs recorded none. Raises InputError if one differs and --allow-changed-data is not given.
    """
    changed = []
    for name, (field, what) in DIGESTS.items():
        before, now = saved.get(name), facts.digests.get(name)
        field = "cached_tokens" if field == "enc_weights" and config.cached_tokens else field
        if before is not None and now is not None and not same_value(now, before):
            changed.append(name)
            if not config.allow_changed_data:
                raise InputError(
                    f"{flag(field)} {getattr(config, field)}: {what}. To resume in spite of this: --allow-changed-data"
                )
    return changed


def check_same_network(
    checkpoint: dict[str, Any], facts: RunFacts, data_classes: ClassSet | None, source: str | Path
) -> None:
    """Raise InputError if a checkpoint describes another network, or other classes than the data have.

    Published and older files have no description; their weights show which switches are on, and their weights and
    settings are compared in any case. `data_classes`: None if the data may have changed.
    """
    if (entry := checkpoint.get("network")) is not None:
        try:
            saved = asdict(SiTConfig.from_json(entry))
        except InputError as error:
            raise DamagedError(str(error)) from error
    else:
        saved = switches_of_weights(plain_names(checkpoint["model"]) if isinstance(checkpoint["model"], dict) else {})
    for name, held in saved.items():
        if not same_value(own := getattr(facts.network, name), held):
            raise DamagedError(f"its network has {name} {held!r:.60}; by the flags it is {own}")
    classes = checkpoint_classes(checkpoint, facts.network.num_classes, source)
    if checkpoint.get("classes") is not None and data_classes is not None and classes.labels != data_classes.labels:
        held = f"{len(classes.labels)} classes ({label_ranges(classes.labels)[:60]})"
        now = f"{len(data_classes.labels)} ({label_ranges(data_classes.labels)[:60]})"
        raise InputError(
            f"--data-dir: {source} was trained on {held}, the data have {now}; allowed: the data of the run, or "
            "--allow-changed-data"
        )
