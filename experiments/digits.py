"""The handwritten digits that scikit-learn carries (1,797 scans of 8 x 8, 10 classes), a data set small enough to try
the whole method in minutes on a laptop (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998).

    python experiments/digits.py images  --dest FOLDER               class folders of PNGs: one half, to train on
    python experiments/digits.py encoder --dest encoder.safetensors  a small vision transformer, in DINOv2's place
    python experiments/digits.py score   --samples FOLDER --encoder encoder.safetensors --dest score.json

The half that training never sees judges: it fits the classifier, and is what generated digits are compared with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import require
from common.images import save_png
from common.io import InputError, atomic_write, check_writable, read_json, run_cli, write_json
from evaluations.metrics import FeatureSums, GaussianStatistics, frechet_distance
from models.encoders import load_encoder

RESOLUTION = 16  # px; the scans are enlarged twice
SPLIT_SEED = 0
# The stand-in encoder: 16 tokens for a digit. train.py is told of it by ENCODER_SPEC.
ENCODER_OPTIONS = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 4}
ENCODER_SPEC = f"timm/vit_tiny_patch16_224:input={RESOLUTION}:mean=0.5:std=0.5:" + ":".join(
    f"{key}={value}" for key, value in ENCODER_OPTIONS.items()
)

Half = tuple[np.ndarray, np.ndarray]


def load_halves() -> tuple[Half, Half]:
    """Return scans (N, 8, 8) uint8 and labels (N,) of the half to train on, then of the half held out."""
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
    """Return scans as preprocessing makes them: RGB (N, 3, R, R), uint8, bicubic."""
    size = (RESOLUTION, RESOLUTION)
    sized = [np.array(Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC)) for scan in scans]
    return torch.from_numpy(np.stack(sized))[:, None].repeat(1, 3, 1, 1)


def write_images(dest: Path) -> None:
    """Write the half to train on as class folders of PNGs, as a raw data set comes."""
    (scans, labels), _ = load_halves()
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        save_png(dest / str(label) / f"{number:04d}.png", Image.fromarray(scan))


def train_encoder(dest: Path, steps: int, batch_size: int = 128) -> None:
    """Train a small vision transformer to read digits by its class token, on one half; write its weights."""
    import timm
    from safetensors.torch import save

    (scans, labels), _ = load_halves()
    images, y = enlarge(scans).float() / 127.5 - 1, torch.from_numpy(labels)
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=RESOLUTION, num_classes=10, **ENCODER_OPTIONS)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in (bar := tqdm(range(steps), desc="training the encoder")):
        rows = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(network(jittered(images[rows])), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with atomic_write(dest) as file:
        file.write(save(network.state_dict()))


def jittered(images: Tensor) -> Tensor:
    """Return images (N, 3, R, R) turned, scaled and shifted a little, each in its own way."""
    n = len(images)
    angle, scale = (torch.rand(n) - 0.5) * 0.5, 1 + (torch.rand(n) - 0.5) * 0.3
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def score(samples: Path, encoder_weights: Path) -> dict[str, float | int | None]:
    """Return how well generated digits, a folder of generate.py, are digits.

    digits_right: share that a classifier, fitted on real digits that training never saw, reads as the class asked for.
    cls_tokens_right: share of generated class tokens nearest to the encoder's centre of that class, or None.
    frechet_distance, ..._of_real, ..._of_noise: to the held-out digits, in the encoder's class tokens, of the generated
    digits, of as many real ones (the half trained on), and of pure noise.
    """
    require("scikit-learn", "judging digits", module="sklearn")
    from sklearn.svm import SVC

    images, labels = read_samples(samples)
    (train, train_labels), (held_out, held_out_labels) = load_halves()
    real, real_labels = enlarge(held_out), torch.from_numpy(held_out_labels)
    encoder = load_encoder(ENCODER_SPEC, RESOLUTION, encoder_weights)

    classifier = SVC(C=10).fit(flat(real), held_out_labels)
    real_tokens = encoder(real).cls_token
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, real.shape, generator=generator, dtype=torch.uint8)
    statistics = {
        name: class_token_statistics(encoder(pixels).cls_token)
        for name, pixels in (("held out", real), ("generated", images), ("real", enlarge(train)), ("noise", noise))
    }
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


def read_samples(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, R, R) uint8 and the labels (N,) asked for, of a folder of generate.py."""
    table = read_json(folder / "images" / "dataset.json")["labels"]
    images = np.stack([np.array(Image.open(folder / "images" / name)) for name, _ in table])
    if images.shape[1:] != (RESOLUTION, RESOLUTION, 3):
        raise InputError(f"{folder}: images of {images.shape[1:]}; digits are ({RESOLUTION}, {RESOLUTION}, 3)")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in table])


def flat(images: Tensor) -> np.ndarray:
    """Return the grey values of images (N, 3, R, R), 0 .. 1, as (N, R R): what the classifier reads."""
    return (images.float().mean(1) / 255).flatten(1).numpy()


def class_token_statistics(tokens: Tensor) -> GaussianStatistics:
    """Return mean and covariance of class tokens (N, D)."""
    sums = FeatureSums(tokens.shape[1])
    sums.update(tokens)
    return sums.statistics()


def print_score(result: dict[str, float | int | None]) -> None:
    """Print a score for people."""
    tokens = result["cls_tokens_right"]
    real = result["digits_right_of_real"]
    print(f"digits read as the class asked for   {result['digits_right']:6.1%}  (real digits: {real:.1%})")
    print("class tokens nearest to their class  " + ("  none" if tokens is None else f"{tokens:6.1%}"))
    print(
        f"Frechet distance to held-out digits  {result['frechet_distance']:6.2f}  "
        f"(real digits: {result['frechet_distance_of_real']:.2f}, noise: {result['frechet_distance_of_noise']:.2f})"
    )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Handwritten digits as a small data set.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("images", help="write the half to train on as class folders of PNGs")
    images.add_argument("--dest", type=Path, required=True, help="folder to write to")
    encoder = commands.add_parser("encoder", help="train the encoder and write its weights")
    encoder.add_argument("--dest", type=Path, required=True, help="file to write, .safetensors")
    encoder.add_argument("--steps", type=int, default=400, help="training steps (%(default)s)")
    commands.add_parser("encoder-spec", help="print what train.py --enc-type is to be given")
    judge = commands.add_parser("score", help="score generated digits")
    judge.add_argument("--samples", type=Path, required=True, help="folder of a set of samples, made by generate.py")
    judge.add_argument("--encoder", type=Path, required=True, help="the encoder's weights")
    judge.add_argument("--dest", type=Path, required=True, help="result file, .json")
    args = parser.parse_args()
    if args.command == "images":
        write_images(args.dest)
    elif args.command == "encoder":
        check_writable(args.dest, "--dest")
        if args.steps < 1:
            raise InputError(f"--steps {args.steps}: must be at least 1")
        train_encoder(args.dest, args.steps)
    elif args.command == "encoder-spec":
        print(ENCODER_SPEC)
    else:
        check_writable(args.dest, "--dest")
        result = score(args.samples, args.encoder)
        write_json(args.dest, result)
        print_score(result)


if __name__ == "__main__":
    run_cli(main)
