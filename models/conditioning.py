"""Whether a network was trained with labels: the fact about a run that decides which labels samples may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_unconditional(settings: Mapping[str, Any]) -> bool:
    """Return whether a network was trained without labels: `--cfg-prob 1` replaced each one by the null class.

    Such a network has one useful label, its null class, and cannot be guided. `settings` are those of its run, see
    `models.checkpoint.saved_settings`. In published files, which name no codec, `cfg_prob` had no effect.
    """
    return _cfg_prob(settings) == 1


def has_null_class(settings: Mapping[str, Any]) -> bool:
    """Return whether the null class of a network was trained: not with `--cfg-prob 0`. The settings are as above."""
    return _cfg_prob(settings) != 0


def _cfg_prob(settings: Mapping[str, Any]) -> Any:
    return settings.get("cfg_prob") if settings.get("codec") else None
