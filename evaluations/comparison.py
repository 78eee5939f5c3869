"""What samples are compared with: the statistics in a reference file, and notes on how far scores are comparable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from common.io import InputError, sha256_of
from evaluations.inception.layers import NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, Inception
from evaluations.inception.weights import PUBLISHED_NAME
from evaluations.metrics import GaussianStatistics
from evaluations.npz import NpzFile

PUBLISHED_COUNT = 50_000  # samples behind the numbers in papers
STAND_IN = "STAND-IN"  # first word of the note on weights that are not published


@dataclass(frozen=True)
class Reference:
    """The statistics in a reference .npz, and the names of the networks that made them; None where it has none."""

    path: Path
    pool: GaussianStatistics | None = None
    spatial: GaussianStatistics | None = None
    inception: str | None = None
    encoder_cls: GaussianStatistics | None = None
    encoder: str | None = None

    def of_encoder(self, name: str) -> GaussianStatistics | None:
        """Return the statistics of this encoder's class tokens, None if there are none."""
        return self.encoder_cls if self.encoder == name else None


def load_reference(path: str | Path) -> Reference:
    """Return the statistics in a reference: `mu`, `sigma`, `mu_s`, `sigma_s`, as in ADM's files, and our additions.

    `reference.py` adds `num_images`, `inception` (name of the weights), and for an encoder `mu_enc`, `sigma_enc`,
    `encoder`. A folder, a zip, or an .npz of images only has no statistics. Raises InputError for a damaged file.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        return Reference(path)
    npz = NpzFile(path)
    count = int(npz.array("num_images", (), "i")) if "num_images" in npz else None
    inception, encoder = (str(npz.array(key, (), "U")) if key in npz else None for key in ("inception", "encoder"))
    return Reference(
        path,
        _statistics(npz, "", count, NUM_FEATURES),
        _statistics(npz, "_s", count, SPATIAL_FEATURES),
        inception,
        _statistics(npz, "_enc", count),
        encoder,
    )


def _statistics(npz: NpzFile, suffix: str, count: int | None, width: int | None = None) -> GaussianStatistics | None:
    mean, covariance = f"mu{suffix}", f"sigma{suffix}"
    if mean not in npz:
        return None
    width = width or math.prod(npz.header(mean).shape)
    return GaussianStatistics(npz.tensor(mean, (width,)), npz.tensor(covariance, (width, width)), count)


def check_reference(reference: Reference, network: Inception) -> None:
    """Raise InputError if another Inception network than this one made the reference's statistics."""
    made_with = reference.inception or (PUBLISHED_NAME if network.published else None)  # ADM's files do not say
    if reference.pool is not None and made_with not in (None, network.name):
        raise InputError(
            f"{reference.path}: its statistics were made with {made_with}, which cannot be compared with "
            f"{network.name} of {network.path}; make the reference again with reference.py"
        )


def encoder_name(spec: str, weights: str | Path | None) -> str:
    """Return the name of an encoder's features: its specification and the start of the weights file's SHA-256."""
    return f"{spec} {sha256_of(weights)[:16]}" if weights else spec


def weights_notes(inception: Inception) -> list[str]:
    """Return a note if the weights are not the published ones."""
    if inception.published:
        return []
    return [f"{STAND_IN}: {inception.path} is not a published weight file; compare only scores of the same weights"]


def count_notes(count: int) -> list[str]:
    """Return notes on FID and sFID of this number of samples."""
    notes = []
    published = f"published numbers are from {PUBLISHED_COUNT:,}"
    if count != PUBLISHED_COUNT:
        notes.append(f"{count:,} samples; {published}; fewer samples give higher FID and sFID")
    if count <= NUM_FEATURES:
        notes.append("FID, sFID: fewer samples than features, so the covariance is singular; not a meaningful score")
    return notes
