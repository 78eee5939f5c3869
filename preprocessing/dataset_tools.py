"""The published command line for preparing data, which calls convert.py and encode.py.

    python preprocessing/dataset_tools.py convert --source=... --dest=... --resolution=256x256 \\
        --transform=center-crop-dhariwal
    python preprocessing/dataset_tools.py encode --source=... --dest=... [--model-url=stabilityai/sd-vae-ft-mse]

As in ADM, photographs are not rotated by their EXIF orientation (`--exif ignore` is the default here). All other
options are those of convert.py and encode.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.io import InputError, run_cli


def square_side(resolution: str) -> str:
    """Return the side of a square resolution, "256x256" or "256". Raises InputError for any other."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", resolution)
    if match is None or match[2] not in (None, match[1]):
        raise InputError(f"--resolution={resolution}: must be square, such as 256x256")
    return match[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="crop photographs (convert.py)", add_help=False)
    convert.add_argument("--resolution", help="WIDTHxHEIGHT, which must be equal, such as 256x256; required")
    encode = commands.add_parser("encode", help="encode images to latents (encode.py)", add_help=False)
    vae = "stabilityai/sd-vae-ft-mse"
    encode.add_argument("--model-url", default=vae, help=f"the codec's repository or folder (default: {vae})")
    args, rest = parser.parse_known_args(argv)
    if not {"-h", "--help"}.isdisjoint(rest):  # the programs then print their own help after this one
        commands.choices[args.command].print_help()
        exif = "; here, the default of --exif is ignore" if args.command == "convert" else ""
        print(f"\nAll other options are those of {args.command}.py{exif}:\n")
    # Imported here: cropping does not need PyTorch, and its worker processes start faster without it.
    if args.command == "convert":
        from preprocessing.convert import main as run

        size = ["--resolution", square_side(args.resolution)] if args.resolution else []
        run(["--exif", "ignore", *size, *rest])
    else:
        from preprocessing.encode import main as run

        run(["--vae", args.model_url.removeprefix("stabilityai/"), *rest])


if __name__ == "__main__":
    run_cli(main)
