"""Sums over the features of a set of images, from which the metrics are computed, and their cache on the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.io import InputError, atomic_write
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, InceptionOutput
from evaluations.metrics import FeatureSums, InceptionScoreSums, Sums
from evaluations.npz import NpzFile
from models.encoders import EncoderOutput

CACHE_VERSION = 1  # increase it when the same images give other features


class Extraction:
    """Named sums over the features of a set of images and, if `keep`, features of each image.

    `kept` lists the kept features (n, D) of the batches, float32 on the CPU.
    """

    def __init__(self, parts: dict[str, Sums], keep: bool = False):
        self.parts, self.keep = nn.ModuleDict(parts), keep
        self.kept: list[Tensor] = []

    def features(self) -> Tensor:
        """Return the kept features (N, D), float32, on the CPU."""
        return torch.cat(self.kept)


class InceptionExtraction(Extraction):
    """Parts `pool`, `spatial` and `score` of `total` images; pool features can be kept for precision and recall."""

    def __init__(self, total: int, keep: bool, device: torch.device):
        parts = {"pool": FeatureSums(NUM_FEATURES, device), "spatial": FeatureSums(SPATIAL_FEATURES, device)}
        super().__init__({**parts, "score": InceptionScoreSums(total, NUM_CLASSES, device)}, keep)

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


@dataclass(frozen=True)
class FeatureCache:
    """Extractions on the disk, identified by the digest of the images and the name of the network."""

    folder: Path

    def load(self, digest: str, network: str, extraction: Extraction, count: int) -> bool:
        """Fill an empty extraction of `count` images from the cache; return whether it was there."""
        path = self._path(digest, network)
        if not path.exists() or (extraction.keep and "kept" not in NpzFile(path)):
            return False
        npz, empty = NpzFile(path), extraction.parts.state_dict()
        extraction.parts.load_state_dict({name: finite_tensor(npz, name, tuple(t.shape)) for name, t in empty.items()})
        if extraction.keep:
            extraction.kept = [finite_tensor(npz, "kept", (count, NUM_FEATURES), np.float32)]
        return True

    def save(self, digest: str, network: str, extraction: Extraction) -> None:
        """Write an extraction."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in extraction.parts.state_dict().items()}
        if extraction.keep:
            arrays["kept"] = extraction.features().numpy()
        with atomic_write(self._path(digest, network)) as file:
            np.savez(file, **arrays)

    def _path(self, digest: str, network: str) -> Path:
        key = hashlib.sha256(f"{CACHE_VERSION} {digest} {network}".encode()).hexdigest()
        return self.folder / f"features-{key[:32]}.npz"


def finite_tensor(npz: NpzFile, name: str, shape: tuple[int, ...], dtype: type = np.float64) -> Tensor:
    """Return a float array of an .npz as `dtype`. Raises InputError if a number is not finite."""
    array = npz.array(name, shape, "f")
    if not np.isfinite(array).all():
        raise InputError(f"{npz.path}: {name!r} holds numbers that are not finite (NaN or infinity)")
    return torch.from_numpy(array.astype(dtype))
