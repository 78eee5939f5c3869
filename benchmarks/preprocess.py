"""Measures preprocessing from photographs to latents: images per second and peak memory of convert.py and encode.py.

    python benchmarks/preprocess.py --source imagenette.zip --vae FOLDER [--images 1000] [--json preprocess.json]

Each row is one run of a program. The same command is run a second time, when no work is left; the time of that run is
the start-up time and is subtracted. Memory is that of the program's largest process.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.timing import Benchmark, run_measured, write_result
from common.cli import POSITIVE, parse, setting
from common.io import run_cli
from common.sources import FileSource
from preprocessing.listing import list_images
from preprocessing.parallel import available_cores


@dataclass(frozen=True, kw_only=True)
class Preprocess(Benchmark):
    """Settings of the benchmark."""

    source: Path = setting(MISSING, "folder or zip of photographs")
    vae: str = setting(MISSING, "codec for encode.py: a name or a folder")
    resolution: int = setting(256, "side of the crops, px", check=POSITIVE)
    images: int | None = setting(None, "use this many images, spread over the source; default: all", check=POSITIVE)
    encode_images: int | None = setting(None, "encode this many of them; default: all", check=POSITIVE)
    workers: tuple[int, ...] = setting(
        (1, available_cores()), "processes of convert.py, threads of encode.py", check=POSITIVE
    )
    batch_sizes: tuple[int, ...] = setting((1, 16), "batch sizes of encode.py", check=POSITIVE)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    config = parse(Preprocess, "Measure preprocessing from photographs to latents.", argv)
    source = FileSource(config.source)
    names = spread(list_images(source).names, config.images)
    to_encode = spread(names, config.encode_images)
    print("| run | images | images/s | start-up, s | memory, GB |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        all_images, few = take(source, names, work / "all.zip"), take(source, to_encode, work / "few.zip")
        common = ["--resolution", config.resolution]
        for workers in config.workers:
            flags = ["--source", all_images, "--dest", work / f"images{workers}", *common, "--workers", workers]
            rows.append(measure(f"convert, {workers} workers", "convert.py", flags, len(names), 1))
        run_once("convert.py", ["--source", few, "--dest", work / "few", *common], 1)
        for threads in config.workers:
            for size in config.batch_sizes:
                dest = work / f"latents-{threads}-{size}"
                flags = ["--source", work / "few", "--dest", dest, "--vae", config.vae, "--batch-size", size]
                label = f"encode, batch {size}, {threads} threads"
                rows.append(measure(label, "encode.py", flags, len(to_encode), threads))
    about = {"cores": available_cores(), "resolution": config.resolution}
    write_result(config.json, {**about, "rows": rows}, torch.device("cpu"))


def spread(names: list[str], count: int | None) -> list[str]:
    """Return `count` names at equal distances, or all for None."""
    return names[:: max(1, len(names) // (count or len(names)))][:count]


def take(source: FileSource, names: list[str], path: Path) -> Path:
    """Write some of a source's images to a zip and return its path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(name, source.read(name))
    return path


def run_once(program: str, flags: list[object], threads: int) -> tuple[float, float]:
    """Return the seconds that a program takes, and the memory of its largest process in GB."""
    command = [sys.executable, ROOT / "preprocessing" / program, *flags]
    return run_measured(command, {"OMP_NUM_THREADS": str(threads)})


def measure(label: str, program: str, flags: list[object], images: int, threads: int) -> dict[str, object]:
    """Run a program twice; print and return its images per second without the start-up, and its memory.

    The rate is None if the program takes no longer than its start-up.
    """
    seconds, memory = run_once(program, flags, threads)
    startup, _ = run_once(program, flags, threads)
    rate = images / (seconds - startup) if seconds > startup else None
    shown = "too few images" if rate is None else f"{rate:.2f}"
    print(f"| {label} | {images:,} | {shown} | {startup:.1f} | {memory:.2f} |", flush=True)
    return {"run": label, "images": images, "images_per_s": rate, "startup_s": startup, "memory_gb": memory}


if __name__ == "__main__":
    run_cli(main)
