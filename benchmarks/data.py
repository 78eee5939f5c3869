"""How fast the training loader reads: images + latents per second and core, from folder and zip.

    python benchmarks/data.py DATA [--workers 0 1 2] [--json data.json]

0 workers is the plain form: the training process reads for itself, and ratios are to that.

DATA is measured as it lies there. With --pack an uncompressed zip of images and latents is made beside it and measured
too, so that both come from one run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import parse_with_json, write_result
from common.io import InputError, run_cli
from dataset import GlobalBatchSampler, LatentDataset

WANTED = 600  # images per second and GPU, from 8 cores: what training REG-XL/2 on a fast GPU could ask for


def pack(dataset: LatentDataset, folder: Path) -> Path:
    """Write images and latents as uncompressed zips into `folder` and return it."""
    for source in (dataset.images, dataset.latents):
        with zipfile.ZipFile(folder / f"{source.path.stem}.zip", "w", zipfile.ZIP_STORED) as archive:
            for name in tqdm(source.names, desc=f"packing {source.path.stem}", unit="file"):
                archive.writestr(name, source.read(name))
    return folder


def images_per_second(dataset: LatentDataset, workers: int, batch_size: int, batches: int) -> float:
    """Return the loader's rate in training's shuffled order, once its processes have begun to deliver."""
    sampler = GlobalBatchSampler(len(dataset), batch_size, seed=0, steps=range(batches + 1))
    loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=False))
    next(loader)
    begun = time.perf_counter()
    count = sum(len(labels) for _, _, labels in loader)
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds images and latents")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of reading processes (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch (%(default)s)")
    parser.add_argument("--batches", type=int, default=60, help="batches to time (%(default)s)")
    parser.add_argument("--pack", action="store_true", help="make zips in a temporary folder and measure them too")
    args = parse_with_json(parser)
    if min(args.batch_size, args.batches) < 1 or min(args.workers) < 0:
        raise InputError("--batch-size and --batches must be at least 1, --workers at least 0")
    torch.set_num_threads(1)
    dataset = LatentDataset(args.data)
    print(f"{args.data}: {len(dataset):,} images of {dataset.resolution} px, moments {dataset.moments_shape}\n")
    print(
        "| layout | workers | images/s | ratio | images/s and core | 8 cores, extrapolated |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=args.data.parent) as scratch:
        datasets = [dataset, *([LatentDataset(pack(dataset, Path(scratch)))] if args.pack else [])]
        rows = []
        for each in datasets:
            layout = "zip" if each.images.is_zip else "folder"
            for workers in args.workers:
                rate = images_per_second(each, workers, args.batch_size, args.batches)
                ratio, by_core = rate / rows[0]["images_per_s"] if rows else 1.0, rate / max(workers, 1)
                rows.append(
                    {"layout": layout, "workers": workers, "images_per_s": rate, "ratio": ratio, "by_core": by_core}
                )
                print(f"| {layout} | {workers} | {rate:.0f} | {ratio:.2f} | {by_core:.0f} | {8 * by_core:.0f} |")
    verdict = "yes" if all(8 * row["by_core"] >= WANTED for row in rows) else "no"
    print(f"\n{WANTED} images/s from 8 cores: {verdict}")
    if args.json:
        write_result(
            args.json, {"images": len(dataset), "resolution": dataset.resolution, "rows": rows}, torch.device("cpu")
        )


if __name__ == "__main__":
    run_cli(main)
