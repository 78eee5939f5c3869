"""Prove that a data set is whole: every file decoded and checked, checksums, pictures decoded back from their latents.

    python preprocessing/verify.py DATA

checks that images and latents pair and agree with their labels, decodes every image and reads every latent (shape,
finite, deviation not negative), writes `DATA/checksums.sha256` or compares with the one there, decodes some latents and
reports their PSNR against the images, and leaves the pairs as a picture, `DATA/verify.png`. Ends with status 2 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.images import decode_rgb, image_grid, save_png
from common.io import InputError, atomic_write, check_writable, run_cli, sha256_of
from common.sources import FileSource, decode_name, mirrored_name, read_dataset_json
from dataset import LatentDataset, decode_moments
from models.autoencoder import Codec, LatentFormat, load_codec
from preprocessing.parallel import available_cores, in_workers

ITEMS_A_PIECE = 200
PROBLEMS_SHOWN = 20
SHEET_COLUMNS = 8
CHECKSUM_FILE = "checksums.sha256"
# Half of what the weakest codec here (TAESD, 23.7 dB) leaves of the error; latents of another image give about 9 dB.
MIN_PSNR = 15.0


@dataclass
class Findings:
    """What checking a piece of the data set showed; findings add up.

    `mean_sum`, `square_sum` (C,): sums over all latent pixels of the mean, and of mean^2 + std^2.
    """

    problems: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    count: int = 0
    mean_sum: np.ndarray | float = 0.0
    square_sum: np.ndarray | float = 0.0

    def add(self, other: Findings) -> None:
        """Take in the findings of another piece."""
        self.problems += other.problems
        self.checksums |= other.checksums
        self.count += other.count
        self.mean_sum = self.mean_sum + other.mean_sum
        self.square_sum = self.square_sum + other.square_sum


@dataclass(frozen=True)
class FileCheck:
    """The work of one process on one piece: read every file once, check it and hash it."""

    dataset: LatentDataset
    has_flips: bool

    def __call__(self, piece: range) -> Findings:
        """Check the images and latents of a range of the data set's positions."""
        found = Findings()
        images, latents = self.dataset.images, self.dataset.latents
        for i in piece:
            latent_file = decode_name(self.dataset.latent_names[i])
            for source, name, check in self._files(images, latents, i, latent_file):
                try:
                    data = source.read(name)
                    if not source.is_zip:  # a zip is hashed as one file
                        found.checksums[f"{source.path.name}/{name}"] = hashlib.sha256(data).hexdigest()
                    check(data, found)
                except InputError as error:
                    found.problems.append(f"{source.describe(name)}: {error}")
        return found

    def _files(self, images: FileSource, latents: FileSource, i: int, latent_file: str) -> Iterator[tuple]:
        yield images, decode_name(self.dataset.image_names[i]), self._check_image
        yield latents, latent_file, self._check_moments
        if self.has_flips:
            yield latents, mirrored_name(latent_file), self._check_moments

    def _check_image(self, data: bytes, found: Findings) -> None:
        decode_rgb(data, self.dataset.resolution)

    def _check_moments(self, data: bytes, found: Findings) -> None:
        moments = decode_moments(data)
        if moments.shape != self.dataset.moments_shape or moments.dtype not in (np.float32, np.float16):
            raise InputError(f"{moments.dtype} of shape {moments.shape}, not {self.dataset.moments_shape} as the first")
        moments = moments.astype(np.float64)
        if not np.isfinite(moments).all():
            raise InputError("has values that are not finite")
        mean, std = np.split(moments, 2)
        if std.min() < 0:
            raise InputError(
                f"has a negative standard deviation ({std.min():.3g}); its second half may be log-variance"
            )
        found.count += mean[0].size
        found.mean_sum = found.mean_sum + mean.sum(axis=(1, 2))
        found.square_sum = found.square_sum + (mean**2 + std**2).sum(axis=(1, 2))


def check_files(dataset: LatentDataset, workers: int) -> Findings:
    """Return what reading, decoding and hashing every file showed."""
    total = len(dataset)
    pieces = [range(start, min(start + ITEMS_A_PIECE, total)) for start in range(0, total, ITEMS_A_PIECE)]
    has_flips = bool(read_dataset_json(dataset.latents).get("flip"))
    found = Findings()
    with tqdm(total=total, desc="checking", unit="item") as progress:
        for part in in_workers(FileCheck(dataset, has_flips), pieces, workers):
            found.add(part)
            progress.update(min(ITEMS_A_PIECE, total - progress.n))
    for source in (dataset.images, dataset.latents):
        if source.is_zip:
            found.checksums[source.path.name] = sha256_of(source.path)
        elif "dataset.json" in source:
            name = f"{source.path.name}/dataset.json"
            found.checksums[name] = hashlib.sha256(source.read("dataset.json")).hexdigest()
    return found


def compare_checksums(path: Path, now: dict[str, str]) -> list[str]:
    """Return how files differ from a checksum file, in the form that `sha256sum -c` reads."""
    try:
        entries = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        before = {name: digest for digest, name in entries}
    except ValueError as error:
        raise InputError(f"{path}: not a checksum file ({error}); remove it to write it anew") from error
    states = {name: (before.get(name), now.get(name)) for name in sorted({*before, *now})}
    return [
        f"{name}: {'is new since' if old is None else 'is gone since' if new is None else 'differs from'} {path.name}"
        for name, (old, new) in states.items()
        if old != new
    ]


def write_checksums(path: Path, checksums: dict[str, str]) -> None:
    """Write checksums in the form that `sha256sum -c` reads."""
    with atomic_write(path, "w") as file:
        file.writelines(f"{checksums[name]}  {name}\n" for name in sorted(checksums))


def latent_statistics(found: Findings, latent_format: LatentFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (C,) of the scaled latents as training draws them."""
    scale, shift = np.asarray(latent_format.scale), np.asarray(latent_format.shift)
    mean = found.mean_sum / found.count
    deviation = np.sqrt(np.maximum(found.square_sum / found.count - mean**2, 0))
    return (mean - shift) * scale, deviation * scale


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB of uint8 images (N, 3, H, W); infinite where they are equal."""
    error = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def reconstruct(dataset: LatentDataset, codec: Codec, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Return images spread evenly over the data set, and their means decoded: both (N, 3, R, R) uint8."""
    positions = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    images, decoded = [], []
    for i in tqdm(positions, desc="decoding", unit="image"):
        image, moments, _ = dataset[int(i)]
        latents = dataset.latent_format.sample(moments[None].to(device), noise=None)
        images.append(image)
        decoded.append(codec.decode(latents)[0].cpu())
    return torch.stack(images), torch.stack(decoded)


def contact_sheet(path: Path, images: Tensor, decoded: Tensor) -> None:
    """Write a picture: a row of images, below it the row of what their latents decode to, and so on."""
    rows = []
    for start in range(0, len(images), SHEET_COLUMNS):
        for part in (images[start : start + SHEET_COLUMNS], decoded[start : start + SHEET_COLUMNS]):
            blank = torch.full((min(SHEET_COLUMNS, len(images)) - len(part), *part.shape[1:]), 255, dtype=torch.uint8)
            rows += [part, blank]
    tiles = torch.cat(rows).permute(0, 2, 3, 1).numpy()
    save_png(path, image_grid(tiles, columns=min(SHEET_COLUMNS, len(images))))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds images and latents, as train.py reads it")
    parser.add_argument("--vae", help="codec that decodes (default: the one named in the latents' dataset.json)")
    parser.add_argument(
        "--reconstruct", type=int, default=16, help="images to decode back; 0 decodes none (default: 16)"
    )
    parser.add_argument("--sheet", type=Path, help="where the picture goes (default: DATA/verify.png)")
    parser.add_argument(
        "--update-checksums",
        action="store_true",
        help=f"write {CHECKSUM_FILE} anew instead of comparing with it (off by default)",
    )
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes (default: all cores)")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default_device, help="where to decode (default: cuda if there is one, else cpu)"
    )
    args = parser.parse_args(argv)
    for flag, value, least in (("--reconstruct", args.reconstruct, 0), ("--workers", args.workers, 1)):
        if value < least:
            raise InputError(f"{flag} {value}: must be at least {least}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {args.device}: cannot be used here ({reason}); allowed: cpu, cuda, cuda:1, ..."
        ) from error
    args.sheet = args.sheet or args.data / "verify.png"
    if args.reconstruct:
        check_writable(args.sheet, "--sheet")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = parse_arguments(argv)
    dataset = LatentDataset(args.data)  # counts, pairing, labels and geometry; raises at the first that is wrong
    codec = _load_codec(args, dataset.latent_format) if args.reconstruct else None
    checksum_file = args.data / CHECKSUM_FILE
    has_checksums = checksum_file.exists() and not args.update_checksums
    if not has_checksums:
        check_writable(checksum_file, "checksums:")
    counts = np.bincount(dataset.labels)
    print(
        f"{args.data}: {len(dataset):,} pairs, {np.count_nonzero(counts):,} classes of {counts[counts > 0].min():,} to "
        f"{counts.max():,}, images {dataset.resolution} px, latents {dataset.moments_shape} of "
        f"{dataset.latent_format.codec}"
    )
    found = check_files(dataset, args.workers)
    problems = found.problems
    if has_checksums:
        changes = compare_checksums(checksum_file, found.checksums)
        problems += changes
        print(f"checksums: {len(found.checksums):,} files, {len(changes):,} differ from {checksum_file}")
    elif not problems:
        write_checksums(checksum_file, found.checksums)
        print(f"checksums: {len(found.checksums):,} files, written to {checksum_file}")
    if found.count:
        mean, std = latent_statistics(found, dataset.latent_format)
        print(f"scaled latents by channel: mean {np.round(mean, 3)}, standard deviation {np.round(std, 3)}")
    if codec is not None and not problems:
        problems += report_reconstruction(args, dataset, codec)
    for problem in problems[:PROBLEMS_SHOWN]:
        print(problem, file=sys.stderr)
    if problems:
        raise InputError(f"{args.data}: {len(problems):,} problems; the first {PROBLEMS_SHOWN} are listed above")
    print(f"{args.data}: all is well")


def report_reconstruction(args: argparse.Namespace, dataset: LatentDataset, codec: Codec) -> list[str]:
    """Decode some latents, print their PSNR, leave the picture; return a problem if they do not show the images."""
    images, decoded = reconstruct(dataset, codec, args.reconstruct, args.device)
    ratios = psnr(images, decoded)
    contact_sheet(args.sheet, images, decoded)
    print(
        f"PSNR of {len(images)} images decoded back: mean {ratios.mean():.2f} dB, least {ratios.min():.2f} dB; "
        f"{args.sheet}"
    )
    if ratios.mean() >= MIN_PSNR:
        return []
    return [
        f"{dataset.latents.path}: decoded latents do not show the images (see {args.sheet}); other images or codec?"
    ]


def _load_codec(args: argparse.Namespace, latent_format: LatentFormat) -> Codec:
    try:
        codec = load_codec(args.vae or latent_format.codec, args.device)
    except InputError as error:
        raise InputError(f"{error}; or name another with --vae, or leave decoding out with --reconstruct 0") from error
    if (codec.format.channels, codec.format.factor) != (latent_format.channels, latent_format.factor):
        raise InputError(
            f"--vae {args.vae}: has {codec.format.channels} channels and factor {codec.format.factor}, the latents "
            f"{latent_format.channels} and {latent_format.factor}"
        )
    return codec


if __name__ == "__main__":
    run_cli(main)
