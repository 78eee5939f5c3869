"""The handwritten digits of scikit-learn (1,797 scans of 8 x 8 px, 10 classes): a small data set for CPUs.

    python experiments/digits.py images  --dest FOLDER               one half, as class folders of PNGs, to train on
    python experiments/digits.py encoder --dest encoder.safetensors  a small vision transformer, in place of DINOv2
    python experiments/digits.py encoder-spec                        the value for train.py --enc-type
    python experiments/digits.py score   --samples FOLDER --encoder encoder.safetensors --dest score.json

Training uses one half only. The other half is used for scores: a classifier is fitted to it, and generated digits are
compared with it. Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
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
from common.cli import POSITIVE, Config, parse, require, setting
from common.images import save_png
from common.io import InputError, atomic_write, check_writable, run_cli, write_json
from evaluations.metrics import FeatureSums, frechet_distance
from experiments.judge import load_images, train_classifier
from models.encoders import load_encoder

RESOLUTION = 16  # px; twice that of the scans
SPLIT_SEED = 0
# The encoder has 16 tokens for a digit. ENCODER_SPEC describes it to train.py.
ENCODER_OPTIONS = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4}
ENCODER_SPEC = f"timm/vit_tiny_patch16_224:input={RESOLUTION}:mean=0.5:std=0.5:" + ":".join(
    f"{key}={value}" for key, value in ENCODER_OPTIONS.items()
)

Half = tuple[np.ndarray, np.ndarray]


REQUIRED_FLAGS = {"images": ["dest"], "encoder": ["dest"], "encoder-spec": [], "score": ["samples", "encoder", "dest"]}


@dataclass(frozen=True, kw_only=True)
class Digits(Config):
    """Settings of all commands."""

    command: str = setting("", "images, encoder, encoder-spec or score", flag="command")
    dest: Path | None = setting(None, "folder (images) or file (encoder: .safetensors, score: .json) to write")
    steps: int = setting(400, "encoder: training steps", check=POSITIVE)
    samples: Path | None = setting(None, "score: folder of a set of samples, made by generate.py")
    encoder: Path | None = setting(None, "score: weights of the encoder")

    def check_combination(self) -> None:
        if self.command not in REQUIRED_FLAGS:
            raise InputError(f"command {self.command!r}: allowed: {', '.join(REQUIRED_FLAGS)}")
        for name in REQUIRED_FLAGS[self.command]:
            if getattr(self, name) is None:
                raise InputError(f"the command {self.command} requires --{name}")
        if self.command in ("encoder", "score"):
            check_writable(self.dest, "--dest")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the commands images, encoder, encoder-spec and score."""
    config = parse(Digits, "Make the data and the encoder of the demo, or score its samples.", argv)
    if config.command == "images":
        write_images(config.dest)
    elif config.command == "encoder":
        train_encoder(config.dest, config.steps)
    elif config.command == "encoder-spec":
        print(ENCODER_SPEC)
    else:
        write_score(config.samples, config.encoder, config.dest)


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
    import timm
    from safetensors.torch import save

    (scans, labels), _ = load_halves()
    images = enlarge(scans).float() / 127.5 - 1
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=RESOLUTION, num_classes=10, **ENCODER_OPTIONS)
    train_classifier(network.parameters(), network, images, torch.from_numpy(labels), steps, "encoder")
    with atomic_write(dest) as file:
        file.write(save(network.state_dict()))


def score(samples: Path, encoder_weights: Path) -> dict[str, float | int | None]:
    """Return scores of generated digits, a folder of generate.py.

    digits_right: share that a classifier, fitted to the held-out half, assigns to the requested class.
    cls_tokens_right: share of generated class tokens whose nearest class mean of the encoder's tokens is that of the
        requested class, or None.
    frechet_distance, ..._of_real, ..._of_noise: to the held-out digits, in the encoder's class tokens, of the generated
        digits, of the half trained on, and of uniform noise.
    """
    require("scikit-learn", "judging digits", module="sklearn")
    from sklearn.svm import SVC

    images, labels = load_images(samples / "images", RESOLUTION)
    (train, train_labels), (held_out, held_out_labels) = load_halves()
    real, real_labels = enlarge(held_out), torch.from_numpy(held_out_labels)
    encoder = load_encoder(ENCODER_SPEC, RESOLUTION, encoder_weights)

    classifier = SVC(C=10).fit(flat(real), held_out_labels)
    real_tokens = encoder(real).cls_token
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, real.shape, generator=generator, dtype=torch.uint8)
    statistics = {}
    for name, pixels in (("held out", real), ("generated", images), ("real", enlarge(train)), ("noise", noise)):
        sums = FeatureSums(encoder.width)
        sums.update(encoder(pixels).cls_token)
        statistics[name] = sums.statistics()
    tokens_right = None
    if (samples / "cls_tokens.npy").exists():
        tokens = torch.from_numpy(np.load(samples / "cls_tokens.npy", allow_pickle=False))
        centres = torch.stack([real_tokens[real_labels == label].mean(0) for label in range(10)])
        tokens_right = float((torch.cdist(tokens, centres).argmin(1) == labels).float().mean())
    return {
        "images": len(images),
        "digits_right": float((classifier.predict(flat(images)) == labels.numpy()).mean()),
        "digits_right_of_real": float((classifier.predict(flat(enlarge(train))) == train_labels).mean()),
        "cls_tokens_right": tokens_right,
        "frechet_distance": frechet_distance(statistics["generated"], statistics["held out"]),
        "frechet_distance_of_real": frechet_distance(statistics["real"], statistics["held out"]),
        "frechet_distance_of_noise": frechet_distance(statistics["noise"], statistics["held out"]),
    }


def flat(images: Tensor) -> np.ndarray:
    """Return the grey values 0-1 of images (N, 3, R, R) as (N, R R), the input of the classifier."""
    return (images.float().mean(1) / 255).flatten(1).numpy()


def write_score(samples: Path, encoder_weights: Path, dest: Path) -> None:
    """Write the scores of generated digits to a file and print them."""
    result = score(samples, encoder_weights)
    write_json(dest, result)
    tokens, real = result["cls_tokens_right"], result["digits_right_of_real"]
    print(f"digits classified as requested       {result['digits_right']:6.1%}  (real digits: {real:.1%})")
    print("class tokens nearest to their class  " + ("  none" if tokens is None else f"{tokens:6.1%}"))
    print(
        f"Frechet distance to held-out digits  {result['frechet_distance']:6.2f}  "
        f"(real digits: {result['frechet_distance_of_real']:.2f}, noise: {result['frechet_distance_of_noise']:.2f})"
    )


if __name__ == "__main__":
    run_cli(main)
