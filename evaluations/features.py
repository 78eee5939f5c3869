"""Features of a set of images: sums over them, from which the metrics are computed, and their cache on the disk.

All processes of a program run the feature networks over the images.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.checks import AUTO, BATCH_SIZE
from common.cli import Config, batch_size, setting
from common.distributed import broadcast_from_main, check_same_files, largest_batch
from common.errors import InputError
from common.identity import Unchanged
from common.progress import progress_bar
from common.temporary import atomic_write, clear_leftovers
from evaluations.batches import ImageBatch
from evaluations.comparison import encoder_name, local_weights
from evaluations.inception.layers import NUM_CLASSES, NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, InceptionOutput, full_precision, load_inception
from evaluations.metrics import FeatureSums, InceptionScoreSums, Sums
from evaluations.npz import NpzFile
from models.encoders import EncoderOutput, load_encoder

CACHE_VERSION = 2  # increase it when the same images give other features
CPU_BATCH = 32
LARGEST_BATCH = 512  # of --batch-size auto; more does not make any GPU faster
FEATURES = {"pool": "pool", "spatial": "spatial", "score": "logits", "cls": "cls_token"}  # field of a network's output


class Extraction:
    """Sums over the features of a set of images: `pool`, `spatial` and `score` of Inception, or `cls` of an encoder.

    With `keep`, `kept` lists the pool features (n, 2048) of the batches, float32 on the CPU.
    """

    def __init__(self, parts: dict[str, Sums], keep: bool = False):
        self.parts, self.keep = nn.ModuleDict(parts), keep
        self.kept: list[Tensor] = []

    def update(self, output: InceptionOutput | EncoderOutput, first: int) -> None:
        """Add the network's output for the images number `first`, `first` + 1, ..."""
        for name, sums in self.parts.items():
            numbers = (first,) if name == "score" else ()  # the Inception Score needs the numbers for its splits
            sums.update(getattr(output, FEATURES[name]), *numbers)
        if self.keep:
            self.kept.append(output.pool.cpu())

    def features(self) -> Tensor:
        """Return the kept features (N, D), float32, on the CPU."""
        return torch.cat(self.kept)

    def load(self, path: Path, count: int, key: str) -> bool:
        """Fill this empty extraction of `count` images from a file of `save`; return whether that was possible.

        It is not if the file is missing, damaged, or was written for another `key` or number of images.
        """
        try:
            npz = NpzFile(path)
            found = {name: npz.tensor(name, tuple(like.shape)) for name, like in self.parts.state_dict().items()}
            counts = {float(found[name].sum()) for name in found if name.rpartition(".")[2] in ("count", "counts")}
            if npz.text("key") != key or counts != {count}:
                return False
            if self.keep:
                self.kept = [npz.tensor("kept", (count, NUM_FEATURES), np.float32)]
        except InputError:
            return False
        self.parts.load_state_dict(found)
        return True

    def save(self, path: Path, key: str) -> None:
        """Write the sums and the kept features. `key` stands for all that decides them."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.parts.state_dict().items()}
        arrays["key"] = np.array(key)
        if self.keep:
            arrays["kept"] = self.features().numpy()
        clear_leftovers(path.parent)  # those of a killed program may have another key
        with atomic_write(path) as file:
            np.savez(file, **arrays)


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig(Config):
    """Feature extraction."""

    inception: str | None = setting(None, "Inception weights, .pb or PyTorch port; default: downloaded once")
    encoder: str | None = setting(None, "add the Frechet distance of this encoder's class tokens, e.g. dinov2-vit-l")
    enc_weights: str | None = setting(None, "weights file of --encoder; default: the encoder's own download")
    batch_size: int | str = setting(
        32, "images per batch and process; auto: as many as fit into GPU memory", check=BATCH_SIZE, parse=batch_size
    )
    cpu: bool = setting(False, "use the CPU even if there is a GPU")

    def check_combination(self) -> None:
        if self.enc_weights and not self.encoder:
            raise InputError(f"--enc-weights {self.enc_weights}: needs --encoder, the encoder that has these weights")


def fingerprint(network: nn.Module) -> str:
    """Return a SHA-256 of a network: its tensors, also those that are not saved, its layers, and their numbers.

    The numbers are attributes such as an encoder's input size and the epsilon of a norm.
    """
    digest = hashlib.sha256(repr(network).encode())
    for name, module in network.named_modules():
        numbers = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | tuple)}
        digest.update(repr((name, sorted(numbers.items()))).encode())
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Extractor:
    """Extracts features with all processes; only the main process gets the complete result.

    The main process hashes the images in the background.

    Args:
        accelerator: of the program.
        config: networks and batch size.
        resolution: of the images, in px; the encoder is built for it.
        cache: folder of the feature cache, or None.
    """

    def __init__(self, accelerator: Accelerator, config: ExtractionConfig, resolution: int, cache: str | None = None):
        self.accelerator, self.batch_size = accelerator, config.batch_size
        self.device = accelerator.device
        self.encoder = self.encoder_name = None
        with accelerator.local_main_process_first():  # one process per machine downloads, the others find the file
            self.inception = load_inception(config.inception, self.device)
            if config.encoder:
                weights = Unchanged([local_weights(config.enc_weights)] if config.enc_weights else [])
                self.encoder = load_encoder(config.encoder, resolution, config.enc_weights, self.device)
                self.encoder_name = encoder_name(config.encoder, config.enc_weights)
                weights.check()
        self._cache = cache or None
        self._background = ThreadPoolExecutor(1)
        self._digests: dict[ImageBatch, Future[str]] = {}
        self._fingerprints: dict[nn.Module, str] = {}

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._background.shutdown(cancel_futures=True)

    def digest(self, images: ImageBatch) -> str:
        """Return the SHA-256 of the images' file or folder, after their features were extracted by the main process."""
        return self._digests[images].result()

    def inception_features(self, images: ImageBatch, keep: bool) -> Extraction:
        """Return the Inception features of all images; with `keep`, also the pool features of each image."""
        parts = {"pool": FeatureSums(NUM_FEATURES, self.device), "spatial": FeatureSums(SPATIAL_FEATURES, self.device)}
        parts["score"] = InceptionScoreSums(images.count, NUM_CLASSES, self.device)
        return self._extract(self.inception, self.inception.name, images, Extraction(parts, keep))

    def encoder_features(self, images: ImageBatch) -> Extraction:
        """Return the sums over the class tokens of all images."""
        extraction = Extraction({"cls": FeatureSums(self.encoder.width, self.device)})
        return self._extract(self.encoder, self.encoder_name, images, extraction)

    def _extract(self, network: nn.Module, name: str, images: ImageBatch, extraction: Extraction) -> Extraction:
        is_main = self.accelerator.is_main_process
        if is_main and images not in self._digests:
            self._digests[images] = self._background.submit(images.digest)
        if self._cache is not None and broadcast_from_main(
            self.accelerator, lambda: extraction.load(*self._cached(images, network, name))
        ):
            self._check_unchanged(images)
            return extraction
        self._run(network, images, extraction)
        if not all(tensor.isfinite().all() for tensor in extraction.parts.state_dict().values()):
            raise InputError(f"{images.path}: the network gives features that are not finite (NaN or infinity)")
        self._check_unchanged(images)
        if self._cache is not None and is_main:
            path, _, key = self._cached(images, network, name)
            extraction.save(path, key)
        return extraction

    def _check_unchanged(self, images: ImageBatch) -> None:
        """Raise InputError if the files are not those that were opened. The digest is then that of the features."""
        broadcast_from_main(self.accelerator, lambda: self.digest(images))
        check_same_files(images.path, images.opened, images.state())

    def _cached(self, images: ImageBatch, network: nn.Module, name: str) -> tuple[Path, int, str]:
        """Return the cache file of the features, the number of images, and the key: all that decides the features."""
        if network not in self._fingerprints:
            self._fingerprints[network] = fingerprint(network)
        decides = {
            "version": CACHE_VERSION,
            "images": self.digest(images),
            "network": [name, self._fingerprints[network]],
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "libraries": {package: importlib.metadata.version(package) for package in ("torch", "timm")},
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return Path(self._cache, f"features-{key[:32]}.npz"), images.count, key

    def _run(self, network: nn.Module, images: ImageBatch, extraction: Extraction) -> None:
        """Add the features of all images: each process runs the network on consecutive images, so they are in order."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        start, stop = images.count * process // processes, images.count * (process + 1) // processes
        size = self._find_batch_size(network, images) if self.batch_size == AUTO else self.batch_size
        bar = progress_bar(total=stop - start, desc=images.path.name, unit="image", main=process == 0, lines=True)
        with bar, full_precision(self.device):
            for first, batch in images.batches(start, stop, size):
                extraction.update(network(batch.to(self.device)), first)
                bar.update(len(batch))
        if processes > 1:
            extraction.parts.load_state_dict(self.accelerator.reduce(extraction.parts.state_dict(), "sum"))
            if extraction.keep:
                extraction.kept = gather_object(extraction.kept)

    def _find_batch_size(self, network: nn.Module, images: ImageBatch) -> int:
        if self.device.type != "cuda":
            return CPU_BATCH

        def attempt(count: int) -> None:
            network(torch.zeros(count, 3, images.height, images.width, dtype=torch.uint8, device=self.device))

        with full_precision(self.device):
            return largest_batch(attempt, min(LARGEST_BATCH, images.count))
