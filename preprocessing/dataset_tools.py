"""The published command line for preparing data, which calls convert.py and encode.py.

    python preprocessing/dataset_tools.py convert --source=... --dest=... --resolution=256x256 \\
        --transform=center-crop-dhariwal
    python preprocessing/dataset_tools.py encode --source=... --dest=... [--model-url=stabilityai/sd-vae-ft-mse]

`convert` has the published defaults: without --transform, images are resized to the resolution with Lanczos, which
changes their aspect ratio; without --resolution, they keep their size; a zip and a single folder have no labels unless
they contain a dataset.json; photographs are not rotated by their EXIF orientation. All other flags are those of
convert.py and encode.py.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from PIL import Image

from common.cli import parse, setting
from common.errors import InputError, run_cli
from common.sources import FileSource, read_dataset_json
from preprocessing import convert
from preprocessing.convert import Squaring
from preprocessing.crops import TRANSFORMS, center_crop_wide, decode
from preprocessing.listing import Listing, list_images

WIDE = "center-crop-wide"
VAE = "stabilityai/sd-vae-ft-mse"


def width_and_height(resolution: str) -> tuple[int, int]:
    """Return the two sizes of a resolution: 256x256, 256,256 or 256. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"0*([1-9]\d*)(?:[x,]0*([1-9]\d*))?", resolution)
    if match is None:
        raise argparse.ArgumentTypeError(f"{resolution!r} is not WIDTHxHEIGHT, such as 256x256")
    return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True, kw_only=True)
class PublishedConvertConfig(convert.ConvertConfig):
    """Settings of dataset_tools.py convert."""

    resolution: tuple[int, int] | None = setting(
        None, "WIDTHxHEIGHT, such as 256x256 (default: the size of the images)", parse=width_and_height
    )
    transform: str | None = setting(
        None,
        "how an image becomes square (default: the full image is resized, which changes its aspect ratio)",
        choices=("center-crop", WIDE, "center-crop-dhariwal"),
    )
    exif: str = setting(
        "ignore", "apply the EXIF orientation of photographs, or ignore it (as ADM)", choices=("apply", "ignore")
    )

    def check_combination(self) -> None:
        super().check_combination()
        if self.resolution is None and self.transform:
            raise InputError(f"--transform={self.transform}: needs --resolution=WIDTHxHEIGHT")
        width, height = self.resolution or (1, 1)
        if max(width, height) > convert.MAX_SIDE:
            raise InputError(f"--resolution={width}x{height}: must be at most {convert.MAX_SIDE:,} per side")
        if width != height and not (self.transform == WIDE and width > height):
            allowed = f"256x256; with --transform={WIDE} also WIDTH > HEIGHT, such as 256x192"
            raise InputError(f"--resolution={width}x{height}: must be square, such as {allowed}")


def keep_size(image: Image.Image, side: int) -> Image.Image:
    """Return the image. Raises InputError if it is not a square with this side."""
    if image.size != (side, side):
        problem = f"{image.width} x {image.height} pixels; without --resolution all images must have one square size"
        raise InputError(f"{problem}, here {side} x {side}; add --resolution=WIDTHxHEIGHT")
    return image


def run_convert(argv: Sequence[str]) -> None:
    """Convert images with the published defaults."""
    config = parse(PublishedConvertConfig, "Convert images with the published defaults.", argv)
    source = FileSource(config.source)
    listing = published_listing(source, config.labels)
    if config.resolution is None:
        squaring = Squaring("original size", first_side(source, listing), keep_size)
    elif config.transform == WIDE:
        width, height = config.resolution
        squaring = Squaring(f"{WIDE} {width}x{height}", width, functools.partial(center_crop_wide, height=height))
    else:
        name = config.transform or "resize"
        squaring = Squaring(name, config.resolution[0], TRANSFORMS[name])
    convert.run(config, source, listing, squaring)


def published_listing(source: FileSource, labels: str) -> Listing:
    """Return the images of a source. A zip or a single folder has labels only if it contains a dataset.json."""
    if labels != "auto" or "dataset.json" in source:
        return list_images(source, labels)
    read_dataset_json(source)  # refuses one that is not at the top
    listing = list_images(source, "none" if source.is_zip else "auto")
    if listing.classes and len(listing.classes) > 1:
        return listing
    note = f"{source.path}: no labels (a zip or a single folder without dataset.json); convert.py reads class folders"
    return replace(
        listing, labels=[0] * len(listing.names), classes=None, is_labelled=False, notes=[*listing.notes, note]
    )


def first_side(source: FileSource, listing: Listing) -> int:
    """Return the side of the first image that can be read. Raises InputError if it is not square."""
    for name in listing.names:
        try:
            width, height = decode(source.read(name), upright=False).pixels.size
        except InputError:  # reported when the images are converted
            continue
        if width != height:
            problem = f"{width} x {height} pixels, not square; add --resolution=WIDTHxHEIGHT, such as 256x256"
            raise InputError(f"{source.describe(name)}: {problem}")
        return width
    raise InputError(f"{source.path}: none of its {len(listing.names):,} images can be read")


def run_encode(argv: Sequence[str]) -> None:
    """Encode images, with the codec of --model-url."""
    from preprocessing.encode import main  # imported here: cropping does not need PyTorch and starts faster without it

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--model-url", default=VAE, nargs="?", help=f"the codec's repository or folder (default: {VAE})"
    )
    args, rest = parser.parse_known_args(argv)
    if not args.model_url:
        raise InputError("--model-url: needs a value")
    if not {"-h", "--help"}.isdisjoint(rest):  # encode.py then prints its own help after this one
        parser.print_help()
        print("\nAll other options are those of encode.py:\n")
    main(["--vae", args.model_url.removeprefix("stabilityai/"), *rest])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command, rest = "".join(arguments[:1]), arguments[1:]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        COMMANDS[command](rest)
    else:
        raise InputError(f"{command or 'no command'}: allowed: convert, encode; --help explains them")


COMMANDS = {"convert": run_convert, "encode": run_encode}

if __name__ == "__main__":
    run_cli(main)
