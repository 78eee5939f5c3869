"""Measures how many images and latents per second the training loader reads, from a folder and from zips.

    python benchmarks/data.py DATA [--workers 0 1 2] [--json data.json]

With 0 workers the training process reads the data itself; ratios are relative to the first number of workers. DATA is
measured in its present layout. --pack also writes its images and latents to uncompressed zips in a temporary folder and
measures those in the same run.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import Benchmark, markdown_table, write_result
from common.cli import NON_NEGATIVE, POSITIVE, parse, setting
from common.io import run_cli
from dataset import GlobalBatchSampler, LatentDataset

REQUIRED = 600  # images per second for one GPU, from 8 cores: what training REG-XL/2 on a fast GPU may need


@dataclass(frozen=True, kw_only=True)
class Data(Benchmark):
    """Settings of the benchmark."""

    data: Path = setting(MISSING, "folder of images and latents", flag="data")
    workers: tuple[int, ...] = setting((0, 1, 2), "numbers of loader processes", check=NON_NEGATIVE)
    batch_size: int = setting(64, "images of a batch", check=POSITIVE)
    batches: int = setting(60, "batches to time", check=POSITIVE)
    pack: bool = setting(False, "also write the data to zips in a temporary folder and measure them")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Data, "Measure the speed of the training loader.", argv)
    torch.set_num_threads(1)
    dataset = LatentDataset(config.data)
    print(f"{config.data}: {len(dataset):,} images of {dataset.resolution} px, moments {dataset.moments_shape}\n")
    rows = []
    with tempfile.TemporaryDirectory(dir=config.data.parent) as scratch:
        for each in [dataset, *([LatentDataset(pack(dataset, Path(scratch)))] if config.pack else [])]:
            for workers in config.workers:
                rate = images_per_second(each, workers, config.batch_size, config.batches)
                rows.append(
                    {
                        "layout": "zip" if each.images.is_zip else "folder",
                        "workers": workers,
                        "images_per_s": rate,
                        "ratio": rate / rows[0]["images_per_s"] if rows else 1.0,
                        "by_core": rate / max(workers, 1),
                    }
                )
    line = "{layout} | {workers} | {images_per_s:.0f} | {ratio:.2f} | {by_core:.0f} | {eight:.0f}"
    headings = "layout | workers | images/s | ratio | images/s per core | 8 cores, extrapolated"
    print(markdown_table(headings, [line.format(**row, eight=8 * row["by_core"]) for row in rows]))
    enough = all(8 * row["by_core"] >= REQUIRED for row in rows)
    print(f"\n{REQUIRED} images/s from 8 cores: {'yes' if enough else 'no'}")
    about = {"images": len(dataset), "resolution": dataset.resolution}
    write_result(config.json, {**about, "rows": rows}, torch.device("cpu"))


def pack(dataset: LatentDataset, folder: Path) -> Path:
    """Write images and latents to uncompressed zips in `folder` and return it."""
    for source in (dataset.images, dataset.latents):
        with zipfile.ZipFile(folder / f"{source.path.stem}.zip", "w", zipfile.ZIP_STORED) as archive:
            for name in tqdm(source.names, desc=f"packing {source.path.stem}", unit="file"):
                archive.writestr(name, source.read(name))
    return folder


def images_per_second(dataset: LatentDataset, workers: int, batch_size: int, batches: int) -> float:
    """Return the loader's speed in the shuffled order of training, after the first batch."""
    sampler = GlobalBatchSampler(len(dataset), batch_size, seed=0, steps=range(batches + 1))
    loader = iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))
    next(loader)
    start = time.perf_counter()
    count = sum(len(labels) for _, _, labels in loader)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    run_cli(main)
