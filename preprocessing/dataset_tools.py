"""The published command line, for scripts and notes that use it: a thin door to convert.py and encode.py.

    python preprocessing/dataset_tools.py convert --source=... --dest=... --resolution=256x256 \\
        --transform=center-crop-dhariwal
    python preprocessing/dataset_tools.py encode --source=... --dest=... [--model-url=stabilityai/sd-vae-ft-mse]

Photographs stay as they lie in the file (`--exif ignore`), as with ADM. Any other option of convert.py
and encode.py is handed on.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.io import InputError, run_cli


def side(resolution: str | None) -> str:
    """Return the side of a square resolution, "256x256" or "256"; raise InputError for any other, and for none."""
    if resolution is None:
        raise InputError("--resolution: is needed, such as 256x256")
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", resolution)
    if match is None or match[2] not in (None, match[1]):
        raise InputError(f"--resolution={resolution}: must be square, such as 256x256")
    return match[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    # Without a help of their own, which would not tell what the programs behind them need.
    convert = commands.add_parser("convert", help="crop photographs (preprocessing/convert.py)", add_help=False)
    convert.add_argument("--resolution", help="WIDTHxHEIGHT, both the same, such as 256x256; needed")
    encode = commands.add_parser("encode", help="encode images to latents (preprocessing/encode.py)", add_help=False)
    encode.add_argument(
        "--model-url",
        default="stabilityai/sd-vae-ft-mse",
        help="the codec's repository or folder (default: stabilityai/sd-vae-ft-mse)",
    )
    args, rest = parser.parse_known_args(argv)
    wants_help = not {"-h", "--help"}.isdisjoint(rest)
    if wants_help:
        commands.choices[args.command].print_help()
        settled = " (--exif is ignore if not given)" if args.command == "convert" else ""
        print(f"\nAll other options are handed on to {args.command}.py{settled}:\n")
    # Imported late: cropping has no use for PyTorch, and its workers start quicker without.
    if args.command == "convert":
        from preprocessing.convert import main as run

        run(rest if wants_help else ["--exif", "ignore", "--resolution", side(args.resolution), *rest])
    else:
        from preprocessing.encode import main as run

        run(["--vae", args.model_url.removeprefix("stabilityai/"), *rest])


if __name__ == "__main__":
    run_cli(main)
