"""best.pt and best.json of a run: the checkpoint with the lowest FID, and its scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import iterate_metrics, read_json, write_json
from training.messages import logger
from training.metrics import finite_or_null


def is_best(folder: Path, step: int, fid: float) -> bool:
    """Return whether the FID of a step is finite and lower than that of the run's best.pt, if there is one.

    If best.json does not say the FID of best.pt, the lowest one of earlier rows of metrics.jsonl is taken for it.
    """
    if not math.isfinite(fid):
        return False
    path = folder / "checkpoints" / "best.json"
    if not path.exists() and not path.with_suffix(".pt").exists():
        return True
    try:
        before = read_json(path)["fid"]
    except (InputError, OSError, LookupError, TypeError):
        before = None
    if not _is_finite(before):
        logger.warning("%s is missing or damaged: the FIDs in metrics.jsonl are used instead", path)
        before = _lowest_fid(folder / "metrics.jsonl", step)
    return fid < before


def write_best(folder: Path, scores: dict[str, Any]) -> None:
    """Write the scores of best.pt; if that is impossible, remove those of the previous best.pt, with a warning."""
    path = folder / "checkpoints" / "best.json"
    try:
        write_json(path, finite_or_null(scores))
    except OSError as error:
        logger.warning("%s cannot be written, training continues: %s", path, error)
        try:
            path.unlink(missing_ok=True)
        except OSError:
            logger.warning("%s has the scores of an earlier best.pt", path)


def _lowest_fid(metrics: Path, step: int) -> float:
    try:
        rows = list(iterate_metrics(metrics, "fid"))
    except OSError:
        return math.inf
    return min((row["fid"] for row in rows if row["step"] < step and _is_finite(row["fid"])), default=math.inf)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
