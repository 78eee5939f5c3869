"""The ADM evaluation (arXiv 2105.05233): Inception Score, FID, sFID, precision and recall of a batch of samples, and
the Frechet distance in the features of any vision encoder.

    python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz

--ref_batch and --sample_batch name the same two files. Several processes share the work:
`accelerate launch evaluations/evaluator.py ...`.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate import Accelerator

from common.cli import Config, parse, setting, settings
from common.distributed import long_collective_timeout, start_processes
from common.errors import InputError, run_cli
from common.identity import own_json
from common.io import check_writable, read_json, real_path, write_json
from evaluations.batches import ImageBatch, NpzImages, open_images
from evaluations.comparison import Reference, check_reference, count_notes, load_reference, weights_notes
from evaluations.features import Extraction, ExtractionConfig, Extractor
from evaluations.inception.network import Inception, full_precision
from evaluations.metrics import (
    INCEPTION_SCORE_SPLIT,
    NEAREST_NEIGHBOURS,
    FeatureSums,
    GaussianStatistics,
    frechet_distance,
    precision_recall,
)

LINES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
OWN_RESULT = own_json("a result of this program", "metrics", "notes", "samples", "reference")


@dataclass(frozen=True, kw_only=True)
class BatchesConfig(Config):
    """Images to compare."""

    ref: str | None = setting(None, "reference: an .npz, or a folder or zip of images", flag="ref")
    sample: str | None = setting(None, "samples: an .npz, or a folder or zip of images", flag="sample")
    ref_batch: str | None = setting(None, "the reference, instead of the first file", flag="--ref_batch")
    sample_batch: str | None = setting(None, "the samples, instead of the second file", flag="--sample_batch")
    save_path: str | None = setting(
        None,
        "result file (.json), or folder of it; default: the folder of the samples (ADM's script: prefix of a .txt)",
        flag="--save_path",
    )
    cache: str | None = setting(None, "folder in which features are stored, and found again for the same images")


@dataclass(frozen=True, kw_only=True)
class RecordedConfig(Config):
    """Recorded in the result; without effect on the numbers."""

    labels: str | None = setting(None, "how the samples' labels were drawn", choices=("random", "balanced", "none"))
    step: int | None = setting(None, "training step of the checkpoint")
    num_steps: int | None = setting(None, "sampling steps", flag="--num_steps")
    cfg: float | None = setting(None, "guidance scale of the image")
    cls_cfg: float | None = setting(None, "guidance scale of the class token", flag="--cls_cfg")
    gh: float | None = setting(None, "upper end of the guidance interval")
    cfg_cond: str | None = setting(None, "whether guidance was used, as the sampling script says it", flag="--cfg_cond")


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig(BatchesConfig, ExtractionConfig, RecordedConfig):
    """Settings of evaluator.py."""

    @property
    def batches(self) -> tuple[str, str]:
        """Reference and samples, however they are given."""
        return self.ref or self.ref_batch, self.sample or self.sample_batch

    def check_combination(self) -> None:
        """Raise InputError unless reference and samples are given once, both as files or both as flags."""
        super().check_combination()
        files, flags = (self.ref, self.sample), (self.ref_batch, self.sample_batch)
        if any(files) and any(flags):
            given = " ".join(filter(None, files))
            raise InputError(f"{given}: reference and samples are also given by flags; expected one of both")
        if not all(files) and not all(flags):
            what = "reference and samples" if not any(files + flags) else "one of reference and samples"
            raise InputError(f"{what} not given; expected REFERENCE SAMPLES, each an .npz, a folder or a zip of images")
        if self.save_path and Path(self.save_path).suffix == ".txt":
            raise InputError(f"--save_path {self.save_path}: the result is JSON; allowed: a .json file, or a folder")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    config = parse(EvaluatorConfig, "Score samples against a reference as the ADM evaluation does.", argv)
    started = time.perf_counter()
    ref_path, sample_path = config.batches
    path = result_path(config.save_path, Path(sample_path))

    # Open images and reference
    samples, statistics = open_images(sample_path), load_reference(ref_path)
    reference = open_reference_images(statistics)
    sampling = read_sampling(samples.path)
    inputs = (samples.path, statistics.path, reference and reference.path, config.inception, config.enc_weights)
    check_writable(path, "--save_path", inputs, OWN_RESULT)
    if config.cache:
        check_writable(Path(config.cache) / "features.npz", "--cache", inputs)
    accelerator = start_processes("cpu" if config.cpu else "auto", kwargs_handlers=[long_collective_timeout()])

    with Extractor(accelerator, config, samples.height, config.cache) as extractor:
        # Extract features, with all processes
        encoder = extractor.encoder
        check_reference(statistics, extractor.inception)
        found = extractor.inception_features(samples, keep=True)
        expected = None if reference is None else extractor.inception_features(reference, keep=True)
        comparisons = {
            "fid": (statistics.pool, found.parts["pool"], expected and expected.parts["pool"]),
            "sfid": (statistics.spatial, found.parts["spatial"], expected and expected.parts["spatial"]),
        }
        if encoder is not None:
            ref = encoder_statistics(statistics, extractor, samples, reference)
            tokens = extractor.encoder_features(samples).parts["cls"] if ref or reference else None
            expected_tokens = extractor.encoder_features(reference).parts["cls"] if reference and not ref else None
            comparisons["encoder_fd"] = (ref, tokens, expected_tokens)
        if not accelerator.is_main_process:
            return

        # Compute the metrics
        notes = general_notes(extractor.inception, samples, reference)
        metrics: dict[str, float | None] = dict.fromkeys(LINES)
        metrics["inception_score"] = found.parts["score"].score()
        for name, sides in comparisons.items():
            metrics[name] = distance(name.replace("encoder_fd", "FD"), *sides, notes)
        metrics["precision"], metrics["recall"] = precision_and_recall(found, expected, extractor.device, notes)

        # Report
        recorded = {name: getattr(config, name) for name in settings(RecordedConfig)}
        result = {
            "metrics": metrics,
            "notes": notes,
            "labels": recorded.pop("labels") or (sampling or {}).get("label_sampling", "unknown"),
            "settings": recorded,
            "samples": {**describe(extractor, samples), "sampling": sampling},
            "reference": {"path": str(statistics.path), **describe(extractor, reference, statistics)},
            "inception": {name: getattr(extractor.inception, name) for name in ("name", "path", "sha256")},
            "encoder": encoder and {"name": extractor.encoder_name, "input_size": encoder.input_size},
            "machine": machine(accelerator),
            "seconds": round(time.perf_counter() - started, 2),
        }
    report(result, path)


def open_reference_images(statistics: Reference) -> ImageBatch | None:
    """Return the reference's images; None for an .npz of statistics only."""
    if statistics.npz is None:
        return open_images(statistics.path)
    without_images = statistics.pool is not None and "arr_0" not in statistics.npz
    return None if without_images else NpzImages(statistics.npz)


def encoder_statistics(
    statistics: Reference, extractor: Extractor, samples: ImageBatch, reference: ImageBatch | None
) -> GaussianStatistics | None:
    """Return the reference's statistics of the encoder; None without those of the same network and input size.

    An older reference does not record the input size. It is that of the stored images then.
    """
    if statistics.encoder_input is None and reference is not None and reference.height != samples.height:
        return None
    return statistics.of_encoder(extractor.encoder_name, extractor.encoder.input_size)


def read_sampling(samples: Path) -> dict[str, Any] | None:
    """Return the sampler's settings from the .json file next to the samples. InputError if it is not an object."""
    path = real_path(samples).with_suffix(".json")  # a link to samples.npz may have another name
    if not path.is_file():
        return None
    sampling = read_json(path)
    if not isinstance(sampling, dict):
        raise InputError(f"{path}: expected a JSON object, the settings with which {samples.name} was sampled")
    try:
        json.dumps(sampling, indent=2)  # as it is written to the result
    except RecursionError as error:
        raise InputError(f"{path}: its objects are nested too deeply; remove it, or write it again") from error
    return sampling


def distance(
    name: str, ref: GaussianStatistics | None, found: FeatureSums | None, expected: FeatureSums | None, notes: list[str]
) -> float | None:
    """Return the Frechet distance of features, or None after adding the reason to `notes`.

    ref: the reference's statistics; without them, those of `expected`, the sums over its images, are used.
    """
    if ref is None and expected is None:
        needed = "statistics of this encoder and input size" if name == "FD" else "statistics for it"
        notes.append(f"{name}: not computed, the reference has neither {needed} nor images")
        return None
    if found.count < 2 or (ref is None and expected.count < 2):
        notes.append(f"{name}: not computed, a covariance needs at least 2 images on both sides")
        return None
    if name == "FD" and ref is None:
        images = f"its {int(expected.count):,} images, not from a full data set"
        notes.append(f"FD: the reference has no statistics of this encoder and input size; computed from {images}")
    try:
        return frechet_distance(ref or expected.statistics(), found.statistics())
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def precision_and_recall(
    found: Extraction, expected: Extraction | None, device: torch.device, notes: list[str]
) -> tuple[float | None, float | None]:
    """Return precision and recall, or twice None after adding the reason to `notes`."""
    if expected is None:
        notes.append("precision, recall: not computed, the reference has no images (arr_0)")
        return None, None
    pools = expected.features(), found.features()
    if min(map(len, pools)) <= NEAREST_NEIGHBOURS:
        notes.append(f"precision, recall: not computed, they need more than {NEAREST_NEIGHBOURS} images on both sides")
        return None, None
    with full_precision(device):
        return precision_recall(*(pool.to(device) for pool in pools))


def general_notes(inception: Inception, samples: ImageBatch, reference: ImageBatch | None) -> list[str]:
    """Return notes on how far the numbers are comparable with published ones."""
    notes = [*weights_notes(inception), *samples.notes, *(reference.notes if reference else ())]
    sizes = [f"{side.width} x {side.height}" for side in (samples, reference or samples)]
    if sizes[0] != sizes[1]:
        note = f"samples have {sizes[0]} pixels, the reference {sizes[1]}"
        notes.append(f"{note}; both are resized to 299 x 299, as in ADM")
    notes += count_notes(samples.count)
    if samples.count < INCEPTION_SCORE_SPLIT:
        split = f"a single split shorter than {INCEPTION_SCORE_SPLIT:,}"
        notes.append(f"Inception Score: from {split}; not a meaningful score")
    return notes


def describe(extractor: Extractor, images: ImageBatch | None, statistics: Reference | None = None) -> dict[str, Any]:
    """Return path, hash, number and size of images; the hash of the file of `statistics` if there are no images."""
    if images is None:
        return {"count": 0, "sha256": statistics.npz.digest()}
    path, digest = str(images.path), extractor.digest(images)
    return {"path": path, "sha256": digest, "count": images.count, "height": images.height, "width": images.width}


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Return device, number of processes, and library versions."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": accelerator.num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def result_path(save_path: str | None, samples: Path) -> Path:
    """Return the result's path: --save_path if it ends in .json, else a file in that folder or next to the samples."""
    if save_path and save_path.endswith(".json"):
        return Path(save_path)
    folder = Path(save_path) if save_path else real_path(samples).parent
    return folder / f"{samples.stem or real_path(samples).stem}.metrics.json"


def report(result: dict[str, Any], path: Path) -> None:
    """Print ADM's five lines, the encoder's distance and the notes; write the full result as JSON."""
    names = LINES | ({"encoder_fd": f"FD ({result['encoder']['name']})"} if result["encoder"] else {})
    for key, name in names.items():
        value = result["metrics"][key]
        print(f"{name}: {'not computed' if value is None else value}")
    for note in result["notes"]:
        print(f"note: {note}")
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    run_cli(main)
