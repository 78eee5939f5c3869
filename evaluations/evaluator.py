"""The ADM evaluation (arXiv 2105.05233): Inception Score, FID, sFID, precision and recall of a batch of samples, and
the Frechet distance in the features of any vision encoder.

    python evaluations/evaluator.py --ref_batch VIRTUAL_imagenet256_labeled.npz --sample_batch samples.npz

Several processes share the work: `accelerate launch evaluations/evaluator.py ...`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate import Accelerator

from common.cli import batch_size, check_batch_size
from common.distributed import long_collective_timeout
from common.io import InputError, check_writable, read_json, run_cli, write_json
from evaluations.batches import ImageBatch, open_images
from evaluations.extract import Extractor
from evaluations.features import (
    EncoderExtraction,
    InceptionExtraction,
    Reference,
    check_reference,
    encoder_name,
    load_reference,
)
from evaluations.inception.network import Inception, full_precision, load_inception
from evaluations.metrics import INCEPTION_SCORE_SPLIT, NEAREST_NEIGHBOURS, frechet_distance, precision_recall
from evaluations.notes import count_notes, weights_notes
from evaluations.npz import NpzFile
from models.encoders import Encoder, load_encoder

LINES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
SETTINGS = ("step", "num_steps", "cfg", "cls_cfg", "gh", "cfg_cond")


def main() -> None:
    args = parse_args()
    check_args(args)
    started = time.perf_counter()
    accelerator = Accelerator(cpu=args.cpu, kwargs_handlers=[long_collective_timeout()])
    samples, statistics = open_images(args.sample_batch), load_reference(args.ref_batch)
    reference = open_reference_images(statistics)
    sampling = read_sampling(samples.path)
    with accelerator.local_main_process_first():  # one process of a machine downloads, the others find the file
        inception = load_inception(args.inception, accelerator.device)
        encoder = None
        if args.encoder:
            encoder = load_encoder(args.encoder, samples.height, args.enc_weights, accelerator.device)
    check_reference(statistics, inception)

    with Extractor(accelerator, args.batch_size, args.cache) as extractor:
        metrics, notes = inception_metrics(extractor, inception, samples, reference, statistics)
        if encoder is not None:
            name = encoder_name(args.encoder, args.enc_weights)
            metrics["encoder_fd"], more = encoder_metric(extractor, encoder, name, samples, reference, statistics)
            notes += more
        if not accelerator.is_main_process:
            return
        result = {
            "metrics": metrics,
            "notes": [*general_notes(inception, samples, reference), *notes],
            "labels": args.labels or (sampling or {}).get("label_sampling", "unknown"),
            "settings": {name: getattr(args, name) for name in SETTINGS},
            "samples": {**describe(extractor, samples), "sampling": sampling},
            "reference": {"path": str(statistics.path), **describe(extractor, reference)},
            "inception": {"name": inception.name, "path": inception.path, "sha256": inception.sha256},
            "encoder": {"name": name, "input_size": encoder.input_size} if encoder is not None else None,
            "machine": machine(accelerator),
            "seconds": round(time.perf_counter() - started, 2),
        }
    report(result, result_path(args.save_path, samples.path))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    batches = parser.add_argument_group("what is compared")
    batches.add_argument("--ref_batch", required=True, help="reference: an .npz, or a folder or zip of images")
    batches.add_argument("--sample_batch", required=True, help="samples: an .npz (arr_0), or a folder or zip of images")
    batches.add_argument("--save_path", help="result file (.json), or folder for it (default: beside the samples)")
    networks = parser.add_argument_group("feature networks")
    networks.add_argument("--inception", help="Inception weights, .pb or PyTorch port (default: downloaded once)")
    networks.add_argument("--encoder", help="also the Frechet distance in this encoder's class tokens (dinov2-vit-l)")
    networks.add_argument("--enc-weights", help="weights file of --encoder (default: the encoder's own download)")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size",
        type=batch_size,
        default=32,
        help="images at a time and process (default: 32); auto: as many as the GPU's memory holds",
    )
    running.add_argument("--cache", help="folder in which features are kept, and found again for the same images")
    running.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    recorded = parser.add_argument_group("recorded with the result; they change no number")
    recorded.add_argument("--labels", choices=("random", "balanced"), help="how the samples' labels were drawn")
    recorded.add_argument("--step", type=int, help="training step of the checkpoint")
    recorded.add_argument("--num_steps", type=int, help="sampling steps")
    recorded.add_argument("--cfg", type=float, help="guidance scale of the image")
    recorded.add_argument("--cls_cfg", type=float, help="guidance scale of the class token")
    recorded.add_argument("--gh", type=float, help="upper end of the guidance interval")
    recorded.add_argument("--cfg_cond", help="whether guidance was on, as the sampling script names it")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot be meant, and for places where nothing can be written."""
    check_batch_size("--batch-size", args.batch_size)
    if args.enc_weights and not args.encoder:
        raise InputError(f"--enc-weights {args.enc_weights}: needs --encoder, which says whose weights they are")
    check_writable(result_path(args.save_path, Path(args.sample_batch)), "--save_path")
    if args.cache:
        check_writable(Path(args.cache) / "features.npz", "--cache")


def open_reference_images(statistics: Reference) -> ImageBatch | None:
    """Return the reference's images; None for an .npz of statistics alone."""
    if statistics.pool is not None and "arr_0" not in NpzFile(statistics.path):
        return None
    return open_images(statistics.path)


def read_sampling(samples: Path) -> dict[str, Any] | None:
    """Return what the sampler wrote about the samples, in a .json file of their name. Raises InputError for a list."""
    path = samples.with_suffix(".json")
    if not path.is_file():
        return None
    sampling = read_json(path)
    if not isinstance(sampling, dict):
        raise InputError(f"{path}: expected a JSON object, the settings that {samples.name} was sampled with")
    return sampling


def inception_metrics(
    extractor: Extractor, network: Inception, samples: ImageBatch, reference: ImageBatch | None, statistics: Reference
) -> tuple[dict[str, float | None], list[str]]:
    """Return ADM's five numbers, None where there are too few images, and notes on what they are worth.

    Only the main process's are filled in.
    """
    device, notes = extractor.device, []
    found = extractor(network, network.name, samples, InceptionExtraction(samples.count, True, device))
    expected = None
    if reference is not None:
        expected = extractor(network, network.name, reference, InceptionExtraction(reference.count, True, device))
    if not extractor.is_main:
        return {}, []
    metrics: dict[str, float | None] = dict.fromkeys(LINES)
    metrics["inception_score"] = found.parts["score"].score()
    for name, part, ready in (("fid", "pool", statistics.pool), ("sfid", "spatial", statistics.spatial)):
        if ready is None and reference is None:
            notes.append(f"{name}: not computed, the reference has neither statistics for it nor images")
        elif samples.count < 2 or (ready is None and reference.count < 2):
            notes.append(f"{name}: not computed, a covariance needs at least 2 images on both sides")
        else:
            metrics[name] = frechet_distance(ready or expected.statistics(part), found.statistics(part))
    if reference is None:
        notes.append("precision, recall: not computed, the reference has no images (arr_0)")
    elif min(samples.count, reference.count) <= NEAREST_NEIGHBOURS:
        notes.append(f"precision, recall: not computed, they need more than {NEAREST_NEIGHBOURS} images on both sides")
    else:
        with full_precision(device):
            pair = precision_recall(expected.features().to(device), found.features().to(device))
        metrics["precision"], metrics["recall"] = pair
    return metrics, notes


def encoder_metric(
    extractor: Extractor,
    encoder: Encoder,
    name: str,
    samples: ImageBatch,
    reference: ImageBatch | None,
    statistics: Reference,
) -> tuple[float | None, list[str]]:
    """Return the Frechet distance of the encoder's class tokens, None if it cannot be had, and notes (main process)."""
    notes = []
    expected = statistics.encoder_cls if statistics.encoder == name else None
    if expected is None and reference is None:
        return None, [f"FD: not computed, the reference has neither statistics of {name} nor images"]
    if samples.count < 2 or (expected is None and reference.count < 2):
        return None, ["FD: not computed, a covariance needs at least 2 images on both sides"]
    found = extractor(encoder, name, samples, EncoderExtraction(encoder.width, extractor.device))
    if expected is None:
        side = extractor(encoder, name, reference, EncoderExtraction(encoder.width, extractor.device))
        notes.append(f"FD: reference statistics from its {reference.count:,} images, not from a whole data set")
    if not extractor.is_main:
        return None, []
    expected = expected or side.statistics("cls")
    return frechet_distance(expected, found.statistics("cls")), notes


def general_notes(inception: Inception, samples: ImageBatch, reference: ImageBatch | None) -> list[str]:
    """Return what a reader of the numbers has to know."""
    notes = weights_notes(inception)
    if reference is not None and (samples.height, samples.width) != (reference.height, reference.width):
        sizes = [f"{side.width} x {side.height}" for side in (samples, reference)]
        notes.append(
            f"samples have {sizes[0]} pixels, the reference {sizes[1]}; both are resized to 299 x 299, as in ADM"
        )
    notes += count_notes(samples.count)
    if samples.count < INCEPTION_SCORE_SPLIT:
        notes.append(
            f"Inception Score: from a single split shorter than {INCEPTION_SCORE_SPLIT:,}; not a meaningful score"
        )
    return notes


def describe(extractor: Extractor, images: ImageBatch | None) -> dict[str, Any]:
    """Return path, hash, number and size of images."""
    if images is None:
        return {"count": 0}
    path, digest = str(images.path), extractor.digest(images)
    return {"path": path, "sha256": digest, "count": images.count, "height": images.height, "width": images.width}


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Return device, processes and library versions."""
    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": accelerator.num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def result_path(save_path: str | None, samples: Path) -> Path:
    """Return where the result goes: --save_path if it ends in .json, else into that folder or beside the samples."""
    if save_path and save_path.endswith(".json"):
        return Path(save_path)
    folder = Path(save_path) if save_path else samples.resolve().parent
    return folder / f"{samples.stem}.metrics.json"


def report(result: dict[str, Any], path: Path) -> None:
    """Print ADM's five lines, the encoder's distance and the notes; write everything as JSON."""
    metrics = result["metrics"]
    names = dict(LINES)
    if result["encoder"]:
        names["encoder_fd"] = f"FD ({result['encoder']['name']})"
    for key, name in names.items():
        print(f"{name}: {'not computed' if metrics[key] is None else metrics[key]}")
    for note in result["notes"]:
        print(f"note: {note}")
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    run_cli(main)
