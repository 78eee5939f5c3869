"""Convert a folder or zip of photographs to the square images that training reads, with ADM's crop by default.

    python preprocessing/convert.py --source ILSVRC2012/train --dest DATA/images --resolution 256

writes `DATA/images/00000/img00000000.png`, ... (uint8 RGB, resolution x resolution) and a `dataset.json` with their
labels. The order of images and classes is the sorted order of the source's names, for any number of workers. After an
interruption, the same command continues and gives the same bytes as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import POSITIVE, parse, setting
from common.images import decode_rgb
from common.io import InputError, atomic_write, run_cli
from common.sources import FileSource, image_name
from preprocessing.crops import TRANSFORMS, Photograph, decode, to_png
from preprocessing.destination import Destination, InputOutput, explain_write_errors
from preprocessing.listing import Listing, list_images
from preprocessing.parallel import available_cores, chunks, in_workers

SPOT_CHECKS = 20  # at least this many existing images are converted again at a restart and compared; about a second
CHUNK = 50  # images per task of a worker, written together; divides the 1,000 images of an output folder


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(InputOutput):
    """Settings of convert.py."""

    resolution: int = setting(MISSING, "side of the square images, in pixels", check=POSITIVE)
    transform: str = setting(
        "center-crop-dhariwal",
        "how an image becomes square: ADM's crop, the largest centred square, or the full image resized to a square",
        choices=tuple(TRANSFORMS),
    )
    labels: str = setting(
        "auto",
        "source of the labels: auto uses dataset.json if there is one, and existing class folders must match it; "
        "json and folders use only that one",
        choices=("auto", "folders", "json"),
    )
    exif: str = setting(
        "apply", "apply the EXIF orientation of photographs, or ignore it (as ADM)", choices=("apply", "ignore")
    )
    on_error: str = setting(
        "stop", "at a broken image, stop, or skip the image and list it in skipped.txt", choices=("stop", "skip")
    )
    workers: int | None = setting(None, "number of processes (default: all available cores)", check=POSITIVE)


Failure = tuple[int, str]  # of an image that cannot be converted: its position in the listing, and the reason


@dataclass(frozen=True)
class Conversion:
    """Converts images of a listing; each worker process receives it once."""

    source: FileSource
    names: list[str]
    destination: Destination
    resolution: int
    transform: str
    upright: bool

    def __call__(self, chunk: range) -> tuple[list[Failure], int]:
        """Convert images that do not exist yet; return failures and the number of images with an EXIF orientation."""
        warnings.filterwarnings("ignore", module="PIL")  # about unusual but readable files; broken ones raise errors
        contents, failures, rotated = {}, [], 0
        for index in chunk:
            if self.destination.has(image_name(index)):
                continue
            try:
                square = self.square(index)
                contents[image_name(index)] = to_png(square.pixels)
                rotated += square.rotated
            except InputError as error:
                failures.append((index, str(error)))
        self.destination.write_batch(contents)
        return failures, rotated

    def square(self, index: int) -> Photograph:
        """Return the square image made from a photograph. Raises InputError if the photograph cannot be converted."""
        try:
            photograph = decode(self.source.read(self.names[index]), self.upright)
            return photograph._replace(pixels=TRANSFORMS[self.transform](photograph.pixels, self.resolution))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many types of errors
            raise InputError(str(error) or type(error).__name__) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    config = parse(ConvertConfig, __doc__.splitlines()[0], argv)
    source = FileSource(config.source)
    listing = list_images(source, config.labels)
    settings = {"source": str(config.source.resolve()), "listing": listing.digest()}
    settings |= {name: getattr(config, name) for name in ("resolution", "transform", "exif")}
    destination = Destination(config.dest, "convert")
    job = Conversion(source, listing.names, destination, config.resolution, config.transform, config.exif == "apply")
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
        name, is_unchanged = image_name(index), False
        if not job.destination.has(name):
            continue
        with contextlib.suppress(InputError):  # of a file that cannot be decoded any more
            is_unchanged = np.array_equal(decode_rgb(job.destination.read(name)), job.square(index).pixels)
        if not is_unchanged:
            difference = f"its {name} differs from the result of {job.source.describe(job.names[index])}"
            advice = "use another --dest, or remove it to start from scratch"
            raise InputError(f"{job.destination.path}: {difference}, one of the two has changed; {advice}")


def convert(job: Conversion, config: ConvertConfig) -> list[Failure]:
    """Convert all images and return the failures in order. With `--on-error stop`, the first one is an InputError."""
    failures: list[Failure] = []
    rotated, workers = 0, config.workers or available_cores()
    total = len(job.names)
    bar = {"total": total, "desc": f"converting {job.source.path.name}", "unit": "image"}
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
    """Write dataset.json and the list of skipped images."""
    failed = {index for index, _ in failures}
    labels = [[image_name(i), label] for i, label in enumerate(listing.labels) if i not in failed]
    if not labels:
        raise InputError(f"{job.source.path}: none of its {len(failed):,} images can be read")
    skipped = job.destination.folder / "skipped.txt"
    skipped.unlink(missing_ok=True)  # of an earlier run
    if failures:
        with atomic_write(skipped, "w") as file:
            file.writelines(f"{listing.names[index]}\t{reason}\n" for index, reason in failures)
        print(f"{len(failures):,} broken images skipped; {job.destination.path}: skipped.txt lists them")
    names = {"classes": listing.classes} if listing.classes else {}
    job.destination.finish({"labels": labels, **names})
    images, classes = len(labels), len({label for _, label in labels})
    found = f"{images:,} image{'s' if images > 1 else ''}, {classes:,} class{'es' if classes > 1 else ''}"
    print(f"{job.destination.path}: {found}")


if __name__ == "__main__":
    run_cli(main)
