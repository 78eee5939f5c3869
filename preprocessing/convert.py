"""Convert a folder or zip of photographs to the square images that training reads, with ADM's crop by default.

    python preprocessing/convert.py --source ILSVRC2012/train --dest DATA/images --resolution 256

writes `DATA/images/00000/img00000000.png`, ... (uint8 RGB, resolution x resolution) and a `dataset.json` with their
labels. The order of images and classes is the sorted order of the source's names, for any number of workers. After an
interruption, the same command continues and gives the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import POSITIVE, WORKERS, Check
from common.cli import parse, setting
from common.errors import InputError, printable, run_cli
from common.image_files import stop_if_incomplete
from common.images import UNREADABLE, decode_rgb, to_png
from common.io import real_path
from common.sources import FileSource, decode_name, image_name
from common.temporary import atomic_write
from preprocessing.crops import TRANSFORMS, Photograph, decode
from preprocessing.destination import Destination, InputOutput, explain_write_errors
from preprocessing.listing import Listing, list_images
from preprocessing.parallel import available_cores, chunks, in_workers

SPOT_CHECKS = 20  # at least this many existing images are converted again at a restart and compared; about a second
CHUNK = 50  # images per task of a worker, written together; divides the 1,000 images of an output folder
MAX_SIDE = 16_384  # px; such an image already takes 805 MB of memory
SIDE = Check(f"from 1 to {MAX_SIDE:,}", lambda value: 1 <= value <= MAX_SIDE)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(InputOutput):
    """Settings of convert.py."""

    resolution: int = setting(MISSING, "side of the square images, in pixels", check=SIDE)
    transform: str = setting(
        "center-crop-dhariwal",
        "how an image becomes square: ADM's crop, the largest centred square, or the full image resized to a square",
        choices=tuple(TRANSFORMS),
    )
    labels: str = setting(
        "auto",
        "source of the labels: auto uses dataset.json if there is one, and existing class folders must match it; "
        "json and folders use only that one; none writes images without labels",
        choices=("auto", "folders", "json", "none"),
    )
    exif: str = setting(
        "apply", "apply the EXIF orientation of photographs, or ignore it (as ADM)", choices=("apply", "ignore")
    )
    on_error: str = setting(
        "stop",
        "at images that cannot be read, links to missing files, and class folders without images: stop, or skip them "
        "and list them in skipped.txt; class folders keep their numbers",
        choices=("stop", "skip"),
    )
    max_images: int | None = setting(None, "convert only the first images, for a trial (default: all)", check=POSITIVE)
    workers: int | None = setting(None, "number of processes (default: all available cores)", check=WORKERS)


Failure = tuple[int, str]  # of an image that cannot be converted: its position in the listing, and the reason


class Squaring(NamedTuple):
    """How an image becomes square: name, side in pixels, and the function that does it (image, side) -> image."""

    name: str
    side: int
    function: Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Conversion:
    """Converts images of a listing; each worker process receives it once."""

    source: FileSource
    names: list[str]
    destination: Destination
    squaring: Squaring
    upright: bool

    def __call__(self, chunk: range) -> tuple[list[Failure], int]:
        """Convert images that do not exist yet; return failures and the number of images with an EXIF orientation."""
        contents, failures, rotated = {}, [], 0
        for index in chunk:
            if self.destination.has(image_name(index)):
                if self.destination.is_older(image_name(index), self.source.changed(self.names[index])):
                    self.compare(index)
                continue
            try:
                square = self.square(index)
                contents[image_name(index)] = to_png(square.pixels)
                rotated += square.rotated
            except InputError as error:
                failures.append((index, str(error)))
        self.destination.write_batch(contents)
        return failures, rotated

    def compare(self, index: int) -> None:
        """Convert an existing image again. Raises InputError if it differs: its photograph may have changed."""
        name, is_unchanged = image_name(index), False
        with contextlib.suppress(InputError):  # of a file that cannot be decoded any more
            is_unchanged = np.array_equal(decode_rgb(self.destination.read(name)), self.square(index).pixels)
        if not is_unchanged:
            difference = f"its {name} differs from the result of {self.source.describe(self.names[index])}"
            advice = "use another --dest, or remove it to start from scratch"
            raise InputError(f"{self.destination.path}: {difference}, one of the two has changed; {advice}")

    def square(self, index: int) -> Photograph:
        """Return the square image made from a photograph. Raises InputError if the photograph cannot be converted."""
        name = self.names[index]
        try:
            photograph = decode(self.source.read(name), self.upright)
            return photograph._replace(pixels=self.squaring.function(photograph.pixels, self.squaring.side))
        except MemoryError:
            raise
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{self.source.describe(name)}: ")) from error
        except Exception as error:  # decoders raise many types of errors
            raise InputError(f"{UNREADABLE}: its data is damaged ({type(error).__name__})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    config = parse(ConvertConfig, __doc__.splitlines()[0], argv)
    source = FileSource(config.source)
    squaring = Squaring(config.transform, config.resolution, TRANSFORMS[config.transform])
    run(config, source, list_images(source, config.labels), squaring)


def run(config: ConvertConfig, source: FileSource, listing: Listing, squaring: Squaring) -> None:
    """Convert the images of a listing and write dataset.json.

    Raises InputError for settings, files or a destination that do not allow it.
    """
    # Say what is not taken, before any work.
    for note in listing.notes:
        print(note)
    if config.on_error == "stop":
        advice = "correct this and start again, or skip it with --on-error skip, which keeps the numbers of the classes"
        stop_if_incomplete(listing.found, listing.bare_classes, advice)
    listing = listing.first(config.max_images)

    # Convert, or continue.
    settings = {"source": decode_name(os.fsencode(real_path(config.source))), "listing": listing.digest()}
    settings |= {"resolution": squaring.side, "transform": squaring.name, "exif": config.exif}
    destination = Destination(config.dest, "convert")
    job = Conversion(source, listing.names, destination, squaring, config.exif == "apply")
    with explain_write_errors(config.dest):
        is_complete = destination.claim(settings)
        check_unchanged(job)
        if is_complete:
            print(f"{config.dest}: already complete")
            return
        finish(job, listing, convert(job, config))


def check_unchanged(job: Conversion) -> None:
    """Convert some existing images again. Raises InputError if one differs: the source may have changed."""
    for index in range(0, len(job.names), max(1, len(job.names) // SPOT_CHECKS)):
        if job.destination.has(image_name(index)):
            job.compare(index)


def convert(job: Conversion, config: ConvertConfig) -> list[Failure]:
    """Convert all images and return the failures in order. With `--on-error stop`, the first one is an InputError."""
    failures: list[Failure] = []
    rotated, workers = 0, config.workers or available_cores()
    total = len(job.names)
    bar = {"total": total, "desc": f"converting {printable(job.source.path.name)}", "unit": "image"}
    for failed, rotated_images in in_workers(job, chunks(total, CHUNK), workers, **bar):
        failures += failed
        rotated += rotated_images
        if failures and config.on_error == "stop":
            index, reason = failures[0]
            advice = "correct it and start again, or skip such images with --on-error skip"
            raise InputError(f"{job.source.describe(job.names[index])}: {reason}; {advice}")
    if rotated:
        print(f"{rotated:,} images have an EXIF orientation: {'rotated upright' if job.upright else 'not rotated'}")
    return sorted(failures)


def finish(job: Conversion, listing: Listing, failures: list[Failure]) -> None:
    """Write dataset.json and the list of what was skipped."""
    failed = {index for index, _ in failures}
    names = {index: image_name(index) for index in range(len(listing.names)) if index not in failed}
    if not names:
        raise InputError(f"{job.source.path}: none of its {len(failed):,} images can be read; first: {failures[0][1]}")
    skipped = [*listing.left_out().items(), *((listing.names[index], reason) for index, reason in failures)]
    skipped_file = job.destination.folder / "skipped.txt"
    skipped_file.unlink(missing_ok=True)  # of an earlier run
    if skipped:
        with atomic_write(skipped_file, "w") as file:
            file.writelines(f"{printable(name)}\t{printable(reason)}\n" for name, reason in sorted(skipped))
        print(f"{len(skipped):,} images or class folders skipped; {job.destination.path}: skipped.txt lists them")
    job.destination.finish(listing.table(names))
    images, classes = len(names), len({listing.labels[index] for index in names})
    labels = f"{classes:,} class{'es' if classes > 1 else ''}" if listing.is_labelled else "no labels"
    print(f"{job.destination.path}: {images:,} image{'s' if images > 1 else ''}, {labels}")


if __name__ == "__main__":
    run_cli(main)
