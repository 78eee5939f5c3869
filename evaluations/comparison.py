"""What samples are compared with: the statistics in a reference file, and notes on how far scores are comparable."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.io import sha256_of
from evaluations.inception.layers import NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, Inception
from evaluations.inception.weights import PUBLISHED_NAME
from evaluations.metrics import GaussianStatistics
from evaluations.npz import NpzFile
from models.hub import hub_file, local_or_hub

PUBLISHED_COUNT = 50_000  # samples behind the numbers in papers
SYMMETRY = 1e-6  # largest difference of the two halves of a covariance, relative to its largest number
STAND_IN = "STAND-IN"  # first word of the note on weights that are not published


@dataclass(frozen=True)
class Reference:
    """The statistics in a reference .npz, and the names of the networks that made them; None where it has none.

    `npz` is the open file, None for a folder or zip. `encoder_input` is the encoder's input size in px; None if the
    file does not say.
    """

    path: Path
    npz: NpzFile | None = None
    pool: GaussianStatistics | None = None
    spatial: GaussianStatistics | None = None
    inception: str | None = None
    encoder_cls: GaussianStatistics | None = None
    encoder: str | None = None
    encoder_input: int | None = None

    def of_encoder(self, name: str, input_size: int) -> GaussianStatistics | None:
        """Return the statistics of class tokens of the encoder with this name and input size, None if there are none.

        Those of another input size cannot be compared.
        """
        is_same = self.encoder == name and self.encoder_input in (None, input_size)
        return self.encoder_cls if is_same else None


def load_reference(path: str | Path) -> Reference:
    """Return the statistics in a reference: `mu`, `sigma`, `mu_s`, `sigma_s`, as in ADM's files, and our additions.

    `reference.py` adds `num_images`, `inception` (name of the weights), and for an encoder `mu_enc`, `sigma_enc`,
    `encoder`, `encoder_input`. A folder, a zip, or an .npz of images only has no statistics.
    Raises InputError for a damaged file.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        return Reference(path)
    npz = NpzFile(path)
    count, encoder_input = (_count(npz, key) if key in npz else None for key in ("num_images", "encoder_input"))
    inception, encoder = (npz.text(key) if key in npz else None for key in ("inception", "encoder"))
    return Reference(
        path,
        npz,
        _statistics(npz, "", count, NUM_FEATURES),
        _statistics(npz, "_s", count, SPATIAL_FEATURES),
        inception,
        _statistics(npz, "_enc", count),
        encoder,
        encoder_input,
    )


def _count(npz: NpzFile, key: str) -> int:
    count = int(npz.array(key, (), "i"))
    if count < 1:
        raise InputError(f"{npz.path}: {key!r} is {count}; allowed: 1 or more")
    return count


def _statistics(npz: NpzFile, suffix: str, count: int | None, width: int | None = None) -> GaussianStatistics | None:
    """Return the statistics of one kind of features. Raises InputError for a matrix that is no covariance."""
    mean, covariance = f"mu{suffix}", f"sigma{suffix}"
    if mean not in npz:
        return None
    width = width or math.prod(npz.header(mean).shape)
    if not width:
        raise InputError(f"{npz.path}: {mean!r} is empty")
    found = GaussianStatistics(npz.tensor(mean, (width,)), npz.tensor(covariance, (width, width)), count)
    matrix = found.covariance
    if (matrix - matrix.t()).abs().max() > SYMMETRY * matrix.abs().max():
        raise InputError(f"{npz.path}: {covariance!r} is not symmetric, so it is not a covariance")
    if matrix.diagonal().min() < 0:
        raise InputError(f"{npz.path}: {covariance!r} has negative variances, so it is not a covariance")
    return found


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
    return f"{spec} {sha256_of(local_weights(weights))[:16]}" if weights else spec


def local_weights(name: str | Path) -> Path:
    """Return the file of an encoder's weights, which is given by its path or its name on the hub."""
    place = local_or_hub(name, "a file, local or on the hub (owner/name/file)", "--enc-weights")
    if isinstance(place, Path):
        return place
    return hub_file(place.repo, place.inside or "model.safetensors", f"There is no local file {name} either")


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
