"""What a reader of scores has to know of how they came about; the same words wherever scores are written."""

from __future__ import annotations

from evaluations.inception.graph import NUM_FEATURES
from evaluations.inception.network import Inception

PUBLISHED_COUNT = 50_000  # samples behind the numbers that papers print
STAND_IN = "STAND-IN"  # how the note on other weights begins


def weights_notes(inception: Inception) -> list[str]:
    """Return a note if the weights are not the published ones."""
    if inception.published:
        return []
    return [f"{STAND_IN}: {inception.path} is not a published weight file; compare only with its own numbers"]


def count_notes(count: int) -> list[str]:
    """Return notes on what FID and sFID of that many samples are worth."""
    notes = []
    if count != PUBLISHED_COUNT:
        notes.append(f"{count:,} samples; published numbers are of {PUBLISHED_COUNT:,}; fewer raise FID and sFID")
    if count <= NUM_FEATURES:
        notes.append("FID, sFID: fewer samples than features, so the covariance is singular; not a meaningful score")
    return notes
