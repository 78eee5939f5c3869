"""From photographs to latents, timed as a user runs it: images per second and peak memory of convert.py and encode.py.

    python benchmarks/preprocess.py --source imagenette.zip --vae FOLDER [--images 1000] [--json preprocess.json]

Each figure is one run of the program. What a second run of the same command takes, which finds everything done, is
start-up and is subtracted. Memory is that of the program's largest process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import parse_with_json, run_measured, write_result
from common.io import InputError, run_cli
from common.sources import FileSource
from preprocessing.listing import list_images
from preprocessing.parallel import available_cores

REPOSITORY = Path(__file__).resolve().parents[1]


def take(source: FileSource, names: list[str], path: Path) -> Path:
    """Write some of a source's images to a zip and return it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(name, source.read(name))
    return path


def run_once(program: str, flags: list[object], threads: int) -> tuple[float, float]:
    """Return the seconds that a program takes and the memory of its largest process in GB."""
    command = [sys.executable, REPOSITORY / "preprocessing" / program, *flags]
    return run_measured(command, {"OMP_NUM_THREADS": str(threads)})


def measure(label: str, program: str, flags: list[object], images: int, threads: int) -> dict[str, object]:
    """Run a program twice, print and return images per second without start-up (None if that was all) and memory."""
    seconds, memory = run_once(program, flags, threads)
    startup, _ = run_once(program, flags, threads)
    rate = images / (seconds - startup) if seconds > startup else None
    shown = "too few images" if rate is None else f"{rate:.2f}"
    print(f"| {label} | {images:,} | {shown} | {startup:.1f} | {memory:.2f} |", flush=True)
    return {"run": label, "images": images, "images_per_s": rate, "startup_s": startup, "memory_gb": memory}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder or zip of photographs")
    parser.add_argument("--vae", required=True, help="codec for encode.py: a name or a folder")
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops (%(default)s)")
    parser.add_argument("--images", type=int, help="take only so many, spread over the source (default: all)")
    parser.add_argument("--encode-images", type=int, help="encode only so many of them (default: all)")
    workers, batches = [1, available_cores()], [1, 16]
    parser.add_argument("--workers", type=int, nargs="+", default=workers, help="processes, threads (%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batches, help="of encode.py (%(default)s)")
    args = parse_with_json(parser)
    numbers = [args.resolution, args.images, args.encode_images, *args.workers, *args.batch_sizes]
    if min(number for number in numbers if number is not None) < 1:
        raise InputError("--resolution, --images, --encode-images, --workers and --batch-sizes must be at least 1")
    source = FileSource(args.source)
    names = list_images(source).names
    names = names[:: max(1, len(names) // (args.images or len(names)))][: args.images]
    to_encode = names[:: max(1, len(names) // (args.encode_images or len(names)))][: args.encode_images]
    print("| run | images | images/s | start-up, s | memory, GB |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        all_images, few = take(source, names, work / "all.zip"), take(source, to_encode, work / "few.zip")
        common = ["--resolution", args.resolution]
        for workers in args.workers:
            flags = ["--source", all_images, "--dest", work / f"images{workers}", *common, "--workers", workers]
            rows.append(measure(f"convert, {workers} workers", "convert.py", flags, len(names), 1))
        run_once("convert.py", ["--source", few, "--dest", work / "few", *common], 1)
        for threads in args.workers:
            for size in args.batch_sizes:
                dest = work / f"latents-{threads}-{size}"
                flags = ["--source", work / "few", "--dest", dest, "--vae", args.vae, "--batch-size", size]
                label = f"encode, batch {size}, {threads} threads"
                rows.append(measure(label, "encode.py", flags, len(to_encode), threads))
    if args.json:
        write_result(
            args.json, {"cores": available_cores(), "resolution": args.resolution, "rows": rows}, torch.device("cpu")
        )


if __name__ == "__main__":
    run_cli(main)
