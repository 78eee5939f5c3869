"""best.pt and best.json of a run: the checkpoint with the lowest FID, and its scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import iterate_metrics, read_json, write_json
from training.messages import logger
from training.metrics import finite_or_null
from training.rewind import set_best_aside

MEASURED_BY = ("reference", "num_samples", "num_steps")  # only scores with equal values of these can be compared


def is_best(folder: Path, scores: dict[str, Any]) -> bool:
    """Return whether the FID of new scores is finite and lower than that of the run's best.pt, if there is one.

    A best.pt whose scores were measured in another way is set aside: its FID cannot be compared. If best.json does not
    say the FID of best.pt, the lowest comparable one of earlier rows of metrics.jsonl is taken for it.
    """
    if not math.isfinite(scores["fid"]):
        return False
    path = folder / "checkpoints" / "best.json"
    if not path.exists() and not path.with_suffix(".pt").exists():
        return True
    try:
        before = read_json(path)
    except (InputError, OSError):
        before = None
    if not isinstance(before, dict) or not _is_finite(before.get("fid")):
        logger.warning("%s is missing or damaged: the FIDs in metrics.jsonl are used instead", path)
        return scores["fid"] < _lowest_fid(folder / "metrics.jsonl", scores)
    if _comparable(before, scores):
        return scores["fid"] < before["fid"]
    try:
        place = set_best_aside(folder)
    except OSError as error:
        logger.warning("%s: other reference or settings of evaluation, and it cannot be moved: %s", path, error)
        return False
    logger.warning(
        "the FID of best.pt was measured with another reference (--eval-ref), --eval-samples or --eval-num-steps and "
        "cannot be compared with this one; best.pt is now in %s",
        place,
    )
    return True


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


def _comparable(before: dict[str, Any], scores: dict[str, Any]) -> bool:
    """Return whether two scores were measured in the same way, as far as both say how."""
    return all(before[name] == scores[name] for name in MEASURED_BY if name in before and name in scores)


def _lowest_fid(metrics: Path, scores: dict[str, Any]) -> float:
    try:
        rows = [row for row in iterate_metrics(metrics, "fid") if _is_finite(row["fid"]) and _comparable(row, scores)]
    except OSError:
        return math.inf
    return min((row["fid"] for row in rows if row["step"] < scores["step"]), default=math.inf)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
