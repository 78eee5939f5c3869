"""From images to what the metrics need: what one pass of a network over a batch leaves, kept for the next time if so
wished, and the reference statistics that samples are compared with.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.io import InputError, atomic_write, sha256_of
from evaluations.inception.graph import NUM_CLASSES, NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, Inception, InceptionOutput
from evaluations.inception.weights import PUBLISHED_NAME
from evaluations.metrics import FeatureSums, GaussianStatistics, InceptionScoreSums, Sums
from evaluations.npz import NpzFile
from models.encoders import EncoderOutput

CACHE_VERSION = 1  # to be raised when the same images give other features


class Extraction:
    """Named sums over the features of a set of images, and one kind of the features themselves.

    `kept` lists the features (n, D) of each batch, float32 on the CPU; it stays empty where they are not wanted.
    """

    def __init__(self, parts: dict[str, Sums], keep: bool = False):
        self.parts, self.keep = parts, keep
        self.kept: list[Tensor] = []

    def features(self) -> Tensor:
        """Return the kept features (N, D), float32, on the CPU."""
        return torch.cat(self.kept)

    def state(self) -> dict[str, Tensor]:
        """Return all sums as `part.name`."""
        return {f"{part}.{name}": tensor for part, sums in self.parts.items() for name, tensor in sums.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over sums named as `state` names them."""
        for part, sums in self.parts.items():
            sums.load({name: state[f"{part}.{name}"] for name in sums.state()})

    def statistics(self, part: str) -> GaussianStatistics:
        """Return mean and covariance of a part's features."""
        return self.parts[part].statistics()


class InceptionExtraction(Extraction):
    """Parts `pool`, `spatial` and `score` of `total` images; the pool features are kept for precision and recall."""

    def __init__(self, total: int, keep: bool, device: torch.device):
        pool, spatial = FeatureSums(NUM_FEATURES, device), FeatureSums(SPATIAL_FEATURES, device)
        score = InceptionScoreSums(total, NUM_CLASSES, device)
        super().__init__({"pool": pool, "spatial": spatial, "score": score}, keep)

    def update(self, output: InceptionOutput, first: int) -> None:
        """Add the network's output for the images number `first`, `first` + 1, ..."""
        self.parts["pool"].update(output.pool)
        self.parts["spatial"].update(output.spatial)
        self.parts["score"].update(output.logits, first)
        if self.keep:
            self.kept.append(output.pool.cpu())


class EncoderExtraction(Extraction):
    """Part `cls`: the class tokens of a vision encoder."""

    def __init__(self, width: int, device: torch.device):
        super().__init__({"cls": FeatureSums(width, device)})

    def update(self, output: EncoderOutput, first: int) -> None:
        """Add the encoder's output for a batch of images."""
        self.parts["cls"].update(output.cls_token)


class FeatureCache:
    """Extractions on the disk, by the digest of the images and the name of the network."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def load(self, digest: str, network: str, extraction: Extraction, count: int) -> bool:
        """Fill an empty extraction of `count` images with the kept one; return whether there was one."""
        path = self._path(digest, network)
        if not path.exists():
            return False
        npz = NpzFile(path)
        if extraction.keep and "kept" not in npz:
            return False
        empty = extraction.state()
        extraction.load({name: _tensor(npz, name, tuple(like.shape)).to(like.device) for name, like in empty.items()})
        if extraction.keep:
            extraction.kept = [_tensor(npz, "kept", (count, NUM_FEATURES))]
        return True

    def save(self, digest: str, network: str, extraction: Extraction) -> None:
        """Keep an extraction."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in extraction.state().items()}
        if extraction.keep:
            arrays["kept"] = extraction.features().numpy()
        with atomic_write(self._path(digest, network)) as file:
            np.savez(file, **arrays)

    def _path(self, digest: str, network: str) -> Path:
        key = hashlib.sha256(f"{CACHE_VERSION} {digest} {network}".encode()).hexdigest()
        return self.folder / f"features-{key[:32]}.npz"


@dataclass(frozen=True)
class Reference:
    """The statistics that a reference .npz carries; None where it has none. Networks by name, None if not recorded."""

    path: Path
    pool: GaussianStatistics | None = None
    spatial: GaussianStatistics | None = None
    inception: str | None = None
    encoder_cls: GaussianStatistics | None = None
    encoder: str | None = None


def load_reference(path: str | Path) -> Reference:
    """Return the statistics in a reference: `mu`, `sigma`, `mu_s`, `sigma_s` as ADM's files have them, and ours.

    Ours (`reference.py`) adds `num_images`, `inception` (name of the weights), and for an encoder `mu_enc`,
    `sigma_enc`, `encoder`. A folder, a zip, or an .npz of images alone has no statistics. Raises InputError for a
    damaged file.
    """
    path = Path(path)
    if path.suffix != ".npz":
        return Reference(path)
    npz = NpzFile(path)
    count = int(npz.array("num_images", (), "i")) if "num_images" in npz else None
    inception, encoder = (str(npz.array(key, (), "U")) if key in npz else None for key in ("inception", "encoder"))
    return Reference(
        path,
        _statistics(npz, "mu", "sigma", count, NUM_FEATURES),
        _statistics(npz, "mu_s", "sigma_s", count, SPATIAL_FEATURES),
        inception,
        _statistics(npz, "mu_enc", "sigma_enc", count),
        encoder,
    )


def check_reference(reference: Reference, network: Inception) -> None:
    """Raise InputError if the reference's statistics are of another Inception network than this one."""
    made_with = reference.inception or (PUBLISHED_NAME if network.published else None)  # ADM's files do not say
    if reference.pool is not None and made_with not in (None, network.name):
        raise InputError(
            f"{reference.path}: its statistics were made with {made_with}, which cannot be compared with "
            f"{network.name} of {network.path}; make the reference anew with reference.py"
        )


def encoder_name(spec: str, weights: str | Path | None) -> str:
    """Return what to call an encoder's features: the specification and the start of the weights file's SHA-256."""
    return f"{spec} {sha256_of(weights)[:16]}" if weights else spec


def _statistics(
    npz: NpzFile, mean: str, covariance: str, count: int | None, width: int | None = None
) -> GaussianStatistics | None:
    if mean not in npz:
        return None
    if width is None:
        shape = npz.header(mean).shape
        if len(shape) != 1:
            raise InputError(f"{npz.path}: {mean!r} has shape {shape}, expected (features,)")
        width = shape[0]
    return GaussianStatistics(_tensor(npz, mean, (width,)), _tensor(npz, covariance, (width, width)), count)


def _tensor(npz: NpzFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a float array; float64, except kept features. Raises InputError if a number is not finite."""
    array = npz.array(name, shape, "f")
    if not np.isfinite(array).all():
        raise InputError(f"{npz.path}: {name!r} holds numbers that are not finite (NaN or infinity)")
    return torch.from_numpy(array.astype(np.float32 if name == "kept" else np.float64))
