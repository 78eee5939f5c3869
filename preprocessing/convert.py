"""Crop a folder or zip of photographs into the data set of images that training reads (REG's recipe, from ADM's crop).

    python preprocessing/convert.py --source ILSVRC2012/train --dest DATA/images --resolution 256

makes `DATA/images/00000/img00000000.png`, ... (uint8 RGB, resolution x resolution) and `dataset.json` with their
labels. Order and class numbers follow the sorted names of the source, whatever the number of workers. Killed at any
moment, the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.images import decode_rgb
from common.io import InputError, atomic_write, run_cli
from common.sources import FileSource, image_name
from preprocessing.crops import TRANSFORMS, Photograph, decode, to_png
from preprocessing.destination import Destination, explain_write_errors
from preprocessing.listing import Listing, list_images
from preprocessing.parallel import available_cores, in_workers

SPOT_CHECKS = 20  # so many of the images that are there, or a few more, are made anew at a restart: a second or so
IMAGES_A_PIECE = 50  # work is handed out and synced in such pieces; divides the 1,000 images of an output folder


class Failure(NamedTuple):
    """An image that could not be converted, by its position in the listing, and why."""

    index: int
    reason: str


class PieceResult(NamedTuple):
    """What became of one piece: how many images it holds, which failed, how many carry an EXIF orientation."""

    size: int
    failures: list[Failure]
    tilted: int


@dataclass(frozen=True)
class Conversion:
    """The work of one process on one piece of the listing."""

    source: FileSource
    names: list[str]
    destination: Destination
    resolution: int
    transform: str
    upright: bool

    def __call__(self, piece: range) -> PieceResult:
        """Convert those images of a piece that are not there yet."""
        warnings.filterwarnings("ignore", module="PIL")  # odd but readable files; the unreadable ones raise
        contents, failures, tilted = {}, [], 0
        for index in piece:
            if self.destination.has(image_name(index)):
                continue
            try:
                square = self.square(index)
                contents[image_name(index)] = to_png(square.pixels)
                tilted += square.tilted
            except InputError as error:
                failures.append(Failure(index, str(error)))
        self.destination.write_batch(contents)
        return PieceResult(len(piece), failures, tilted)

    def square(self, index: int) -> Photograph:
        """Return an image as its place in the data set wants it. Raises InputError if it cannot be made of the file."""
        try:
            photograph = decode(self.source.read(self.names[index]), self.upright)
            return photograph._replace(pixels=TRANSFORMS[self.transform](photograph.pixels, self.resolution))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise nearly anything, and it concerns one image
            raise InputError(str(error) or type(error).__name__) from error

    def is_unchanged(self, index: int) -> bool:
        """Return whether the image that is there is still what the source gives."""
        try:
            made = decode_rgb(self.destination.read(image_name(index)))
            return np.array_equal(made, np.asarray(self.square(index).pixels))
        except InputError:
            return False


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser("convert.py", description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder or zip: a folder a class, or a dataset.json")
    parser.add_argument("--dest", type=Path, required=True, help="folder to make, or a zip if it ends in .zip")
    parser.add_argument("--resolution", type=int, required=True, help="side of the square images, in pixels")
    parser.add_argument(
        "--transform",
        choices=TRANSFORMS,
        default="center-crop-dhariwal",
        help="how an image becomes square: ADM's crop (the default), the largest centred square, or squeezed whole",
    )
    parser.add_argument(
        "--labels",
        choices=("auto", "folders", "json"),
        default="auto",
        help="where labels come from: auto (the default) is dataset.json if there is one, and class folders must agree "
        "with it; json or folders let that one rule alone",
    )
    parser.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        default="apply",
        help="turn photographs upright as their EXIF orientation says (the default), or leave them as ADM did",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what a broken image does: stop the run (the default), or be left out and listed in skipped.txt",
    )
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: all cores)")
    args = parser.parse_args(argv)
    if args.resolution < 1:
        raise InputError(f"--resolution {args.resolution}: must be at least 1")
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: must be at least 1")
    if args.dest.resolve().is_relative_to(args.source.resolve()):
        raise InputError(f"--dest {args.dest}: lies inside --source {args.source}; give another place")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    source = FileSource(args.source)
    listing = list_images(source, args.labels)
    settings = {
        "source": str(args.source.resolve()),
        "listing": listing.digest(),
        "resolution": args.resolution,
        "transform": args.transform,
        "exif": args.exif,
    }
    destination = Destination(args.dest, "convert")
    job = Conversion(source, listing.names, destination, args.resolution, args.transform, args.exif == "apply")
    with explain_write_errors(args.dest):
        is_complete = destination.claim(settings)
        check_unchanged(job)
        if is_complete:
            print(f"{args.dest}: complete already")
            return
        failures = convert(job, args.workers, stop_on_error=args.on_error == "stop")
        finish(job, listing, failures)


def check_unchanged(job: Conversion) -> None:
    """Make a few of the images that are there anew: the source may hold other photographs now, of the same names.

    Raises InputError if one comes out otherwise.
    """
    for index in range(0, len(job.names), max(1, len(job.names) // SPOT_CHECKS)):
        if job.destination.has(image_name(index)) and not job.is_unchanged(index):
            raise InputError(
                f"{job.destination.path}: its {image_name(index)} is not what "
                f"{job.source.describe(job.names[index])} gives now, one of the two was changed since; give another "
                "--dest, or remove it to start anew"
            )


def convert(job: Conversion, workers: int, stop_on_error: bool) -> list[Failure]:
    """Do all pieces of a conversion and return the images that failed, in order.

    Raises InputError at the first failure if `stop_on_error`.
    """
    total = len(job.names)
    pieces = [range(start, min(start + IMAGES_A_PIECE, total)) for start in range(0, total, IMAGES_A_PIECE)]
    failures: list[Failure] = []
    tilted = 0
    with tqdm(total=total, desc=f"converting {job.source.path.name}", unit="image") as progress:
        for result in in_workers(job, pieces, workers):
            failures += result.failures
            tilted += result.tilted
            progress.update(result.size)
            if stop_on_error and failures:
                raise InputError(
                    f"{job.source.describe(job.names[failures[0].index])}: {failures[0].reason}; mend it and start "
                    "again, or leave such images out with --on-error skip"
                )
    if tilted:
        print(f"{tilted:,} images carry an EXIF orientation: {'turned upright' if job.upright else 'left as they lie'}")
    return sorted(failures)


def finish(job: Conversion, listing: Listing, failures: list[Failure]) -> None:
    """Write dataset.json and the list of images left out."""
    failed = {failure.index for failure in failures}
    labels = [[image_name(i), label] for i, label in enumerate(listing.labels) if i not in failed]
    if not labels:
        raise InputError(f"{job.source.path}: none of its {len(failed):,} images can be read")
    skipped = job.destination.folder / "skipped.txt"
    skipped.unlink(missing_ok=True)  # of an earlier run, before the images were mended
    if failures:
        with atomic_write(skipped, "w") as file:
            file.writelines(f"{listing.names[index]}\t{reason}\n" for index, reason in failures)
        print(f"{len(failures):,} broken images left out; they are listed in {job.destination.path}: skipped.txt")
    names = {"classes": listing.classes} if listing.classes else {}
    job.destination.finish({"labels": labels, **names})
    classes = len({label for _, label in labels})
    print(
        f"{job.destination.path}: {len(labels):,} image{'s' if len(labels) > 1 else ''}, "
        f"{classes:,} class{'es' if classes > 1 else ''}"
    )


if __name__ == "__main__":
    run_cli(main)
