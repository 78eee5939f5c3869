"""The handwritten digits of scikit-learn (1,797 scans of 8 x 8 px): data and encoder of a convergence study.

    python experiments/digits.py images  --dest FOLDER                 the half to train on, a folder for each class
    python experiments/digits.py encoder --dest encoder.safetensors
    python experiments/digits.py encoder-spec                          the value for train.py --enc-type

One half is for training, the other for scores. Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits,
UCI, 1998.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import POSITIVE
from common.cli import Config, parse, require, setting
from common.errors import InputError, run_cli
from common.images import save_png
from common.io import check_writable
from experiments import encoder

RESOLUTION = 16  # px; twice that of the scans
SPLIT_SEED = 0
# The encoder has 16 tokens for a digit.
ENCODER_SPEC = (
    f"timm/vit_tiny_patch16_224:input={RESOLUTION}:mean=0.5:std=0.5:patch_size=4:embed_dim=96:depth=4:num_heads=4"
)

COMMANDS = ("images", "encoder", "encoder-spec")

Half = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Digits(Config):
    """Settings of all commands."""

    command: str = setting("", ", ".join(COMMANDS), flag="command")
    dest: Path | None = setting(None, "folder (images) or .safetensors file (encoder) to write")
    steps: int = setting(400, "encoder: training steps", check=POSITIVE)

    def check_combination(self) -> None:
        if self.command not in COMMANDS:
            raise InputError(f"command {self.command!r}: allowed: {', '.join(COMMANDS)}")
        if self.command != "encoder-spec" and self.dest is None:
            raise InputError(f"the command {self.command} requires --dest")
        if self.command == "encoder":
            check_writable(self.dest, "--dest", own=encoder.own_encoder(ENCODER_SPEC, RESOLUTION))
        if self.command == "images":
            encoder.check_own_pictures(self.dest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands images, encoder and encoder-spec."""
    config = parse(Digits, "Write the digits, or an encoder for them.", argv)
    if config.command == "images":
        write_images(config.dest)
    elif config.command == "encoder":
        train_encoder(config.dest, config.steps)
    else:
        print(ENCODER_SPEC)


def load_halves() -> tuple[Half, Half]:
    """Return scans (N, 8, 8) uint8 and labels (N,) of the half to train on, then of the held-out half."""
    require("scikit-learn", "reading the digits", module="sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = np.round(digits.images / 16 * 255).astype(np.uint8)
    train, held_out, train_labels, held_out_labels = train_test_split(
        scans, digits.target, test_size=0.5, random_state=SPLIT_SEED, stratify=digits.target
    )
    return (train, train_labels), (held_out, held_out_labels)


def enlarge(scans: np.ndarray) -> Tensor:
    """Return scans as preprocessing makes them: RGB (N, 3, R, R), uint8, by bicubic interpolation."""
    size = (RESOLUTION, RESOLUTION)
    sized = [np.array(Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC)) for scan in scans]
    return torch.from_numpy(np.stack(sized))[:, None].repeat(1, 3, 1, 1)


def write_images(dest: Path, half: int = 0) -> None:
    """Write one half (0: to train on, 1: held out) as class folders of PNGs, the layout of a raw data set."""
    for number, (scan, label) in enumerate(zip(*load_halves()[half], strict=True)):
        save_png(dest / str(label) / f"{number:04d}.png", Image.fromarray(scan))


def train_encoder(dest: Path, steps: int) -> None:
    """Train a small vision transformer on one half to classify digits by its class token; write its weights."""
    (scans, labels), _ = load_halves()
    encoder.train_encoder(dest, ENCODER_SPEC, enlarge(scans), torch.from_numpy(labels), steps)


if __name__ == "__main__":
    run_cli(main)
