"""Check a data set completely: decode every image, read all latents, compare checksums, and decode some latents.

    python preprocessing/verify.py DATA

checks that images and latents form pairs and that their labels match, decodes every image, and reads all latents
(shape, finite values, standard deviation not negative), and with --cached-tokens all tokens of encoders. It writes
`DATA/checksums.sha256` or compares with the existing file. It compares the magnitude of the scaled latents with that of
their codec, decodes some latents, prints their PSNR against the images, and saves the pairs as a picture,
DATA/verify.png.
The exit status is 2 if there is an error.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checks import ENTRY_NAME, ENTRY_NAMES, WORKERS, Check
from common.cli import Config, parse, setting
from common.errors import InputError, printable, run_cli
from common.identity import OWN_PNG, Unchanged
from common.images import decode_rgb, image_grid, save_png
from common.io import OwnFile, check_writable, read_file, sha256_of
from common.progress import progress_bar
from common.sources import FileSource, decode_name
from common.temporary import atomic_write
from dataset import LATENT_FOLDERS, PNG_END, LatentDataset, decode_latents
from models.autoencoder import Codec, LatentFormat, load_decoder
from models.cached_tokens import open_tokens
from preprocessing.latent_statistics import latent_sums, mean_and_deviation, mean_and_std
from preprocessing.parallel import available_cores, chunks, in_workers

DECODED = Check("from 0 to 10,000", lambda value: 0 <= value <= 10_000)  # all are in memory together
CHUNK = 200  # items per task of a worker
ERRORS_SHOWN = 20
SHEET_COLUMNS = 8
CHECKSUM_FILE = "checksums.sha256"
CHECKSUM = re.compile(r"([0-9a-f]{64})  (.+)", re.DOTALL)  # a line of it
# Root mean square of all scaled latents. Correct ones of TAESD: 0.77 for photographs, 0.58 for grey images, 1.63 for
# black ones; at Stable Diffusion's scale, 0.18215, they have 0.11 to 0.30. Those of Stable Diffusion have 0.8 to 1.1,
# and 5 without their scale. Pixels are from -1 to 1, and their magnitude depends on the images only.
MAGNITUDE, PIXEL_MAGNITUDE = (0.4, 2.5), (0.0, 1.001)
MAX_MOMENT = 1000.0  # of the moments of one image; those of all codecs here stay below 100, damaged numbers rarely do
MIN_PSNR = 15.0  # dB; the weakest codec here (TAESD) reaches 23.7, latents of other images about 9


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """Settings of verify.py."""

    data: Path = setting(MISSING, "folder with images and latents, as train.py reads it", flag="data")
    latents_folder: str | None = setting(
        None,
        f"name of the latents' folder or zip in the data; default: {' or '.join(LATENT_FOLDERS)}",
        check=ENTRY_NAME,
    )
    latents_codec: str | None = setting(
        None, "codec of latents whose dataset.json names none (default: sd-vae-ft-mse, as in the published data)"
    )
    cached_tokens: str | None = setting(
        None,
        "folders or zips in the data with cached tokens of encoders, comma-separated; they are checked as well",
        check=ENTRY_NAMES,
    )
    vae: str | None = setting(None, "codec that decodes (default: the one named in the latents' dataset.json)")
    reconstruct: int = setting(16, "number of latents to decode", check=DECODED)
    sheet: Path | None = setting(None, "path of the picture (default: DATA/verify.png)")
    update_checksums: bool = setting(False, f"write {CHECKSUM_FILE} again instead of comparing with it")
    workers: int | None = setting(None, "number of processes (default: all available cores)", check=WORKERS)
    device: str = setting("auto", "device that decodes: auto (cuda if available, else cpu), cpu, cuda, cuda:1, ...")

    def check_combination(self) -> None:
        gpus = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        allowed = ("auto", "cpu", *(gpus if torch.cuda.is_available() else ()))
        if self.device not in allowed:
            raise InputError(f"--device {self.device}: not available; allowed here: {', '.join(allowed)}")

    @property
    def picture(self) -> Path:
        return self.sheet or self.data / "verify.png"

    @property
    def torch_device(self) -> str:
        return self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Findings:
    """Results of checking some items of the data set."""

    errors: list[str] = field(default_factory=list)  # messages about broken files
    checksums: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file that is not in a zip
    count: int = 0  # number of latent pixels
    sums: np.ndarray | float = 0.0  # over all latent pixels, of the mean and of mean^2 + std^2, (2, C)

    def add(self, other: Findings) -> None:
        """Add the results of other items."""
        self.errors += other.errors
        self.checksums |= other.checksums
        self.count += other.count
        self.sums = self.sums + other.sums

    def add_latents(self, latents: np.ndarray, stored: str) -> None:
        """Add the sums of moments (2 C, h, w), or of a draw (C, h, w), as `stored` says.

        Raises InputError for values that are not finite or not possible.
        """
        if not np.isfinite(latents).all():
            raise InputError("has values that are not finite")
        if (largest := np.abs(latents).max()) > MAX_MOMENT:
            raise InputError(f"has a value of {largest:.3g}; allowed: up to {MAX_MOMENT:g}")
        mean, std = mean_and_std(latents, stored)
        if (smallest := std.min()) < 0:
            raise InputError(f"has a negative standard deviation ({smallest:.3g}); its second half may be log-variance")
        self.count += mean[0].size
        self.sums = self.sums + latent_sums(mean, std)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    # Check counts, pairs, labels and shapes: LatentDataset raises an error at the first that is wrong.
    config = parse(VerifyConfig, __doc__.splitlines()[0], argv)
    tokens = open_tokens(config.data, config.cached_tokens)
    dataset = LatentDataset(
        config.data, latents_folder=config.latents_folder, latents_codec=config.latents_codec, tokens=tokens
    )
    if config.reconstruct:
        inputs = [source.path for source in sources_of(dataset)]
        check_writable(config.picture, "--sheet", inputs, OWN_PNG)
    codec = decoding_codec(config, dataset.latent_format) if config.reconstruct else None
    checksum_file = config.data / CHECKSUM_FILE
    has_checksums = checksum_file.exists() and not config.update_checksums
    if not has_checksums:
        check_writable(checksum_file, "--update-checksums" if config.update_checksums else "checksums:", (), OWN_SUMS)
    counts = np.bincount(dataset.labels)
    print(
        f"{config.data}: {len(dataset):,} pairs, {describe_classes(counts[counts > 0])}, images {dataset.resolution} "
        f"px, latents {dataset.stored_shape} of {dataset.latent_format.codec}"
    )
    for one in dataset.tokens:
        print(f"{one.source.path}: tokens {one.format.shape} of {one.format.name}")

    report_other_files(dataset)
    before = read_checksums(checksum_file) if has_checksums else {}

    # Read every file.
    found = check_files(dataset, config.workers or available_cores())
    errors = found.errors
    if has_checksums:
        changes = compare_checksums(before, found.checksums)
        errors += changes
        print(f"checksums: {len(found.checksums):,} files, {len(changes):,} differ from {checksum_file}")
    elif not errors:
        with atomic_write(checksum_file, "w") as file:
            file.writelines(f"{digest}  {name}\n" for name, digest in sorted(found.checksums.items()))
        print(f"checksums: {len(found.checksums):,} files, written to {checksum_file}")
    if found.count:
        mean, std = latent_statistics(found, dataset.latent_format)
        print(f"scaled latents by channel: mean {np.round(mean, 3)}, standard deviation {np.round(std, 3)}")
        errors += check_magnitude(mean, std, dataset)

    # Decode some latents, and report.
    if codec is not None and not errors:
        errors += report_reconstruction(config, dataset, codec)
    for error in errors[:ERRORS_SHOWN]:
        print(error, file=sys.stderr)
    if errors:
        raise InputError(f"{config.data}: number of errors: {len(errors):,}; the first {ERRORS_SHOWN} are listed above")
    print(f"{config.data}: no errors found")


def describe_classes(counts: np.ndarray) -> str:
    """Return how many classes there are, and how many pairs each has, from the number of pairs of each class."""
    number = f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}"
    least, most = counts.min(), counts.max()
    return number if len(counts) == 1 else f"{number} of {least:,}{f' to {most:,}' if most > least else ''} pairs each"


def sources_of(dataset: LatentDataset) -> list[FileSource]:
    """Return images, latents and cached tokens of a data set."""
    return [dataset.images, dataset.latents, *(one.source for one in dataset.tokens)]


def report_other_files(dataset: LatentDataset) -> None:
    """Print how many files next to images and latents are not read in training."""
    listed = [(dataset.images, dataset.image_names), (dataset.latents, dataset.latent_names)]
    for source, names in listed + [(one.source, one.files) for one in dataset.tokens]:
        read = {"dataset.json", "skipped.txt", *map(decode_name, names)}
        if others := [name for name in source.names if name not in read and "-flip-" not in name]:
            files = f"{len(others):,} other file{'s' if len(others) > 1 else ''}"
            print(f"{source.path}: {files}, which training does not read; first {printable(others[0])}")


def check_files(dataset: LatentDataset, workers: int) -> Findings:
    """Return the results of reading, decoding and hashing every file."""
    found, total = Findings(), len(dataset)
    sources = sources_of(dataset)
    hashed_later = Unchanged(source.path if source.is_zip else source.path / "dataset.json" for source in sources)
    job, bar = functools.partial(check_chunk, dataset), {"total": total, "desc": "checking", "unit": "item"}
    for part in in_workers(job, chunks(total, CHUNK), workers, **bar):
        found.add(part)
    for source in sources:
        if source.is_zip:
            found.checksums[source.path.name] = sha256_of(source.path)
        elif "dataset.json" in source:
            found.checksums[f"{source.path.name}/dataset.json"] = sha256_of(source.path / "dataset.json")
    hashed_later.check()
    return found


def check_chunk(dataset: LatentDataset, chunk: range) -> Findings:
    """Return the results of reading, decoding and hashing the files of some items."""
    found = Findings()

    def check(source: FileSource, name: str, read: Callable[[bytes], Any]) -> None:
        try:
            data = source.read(name)
            if not source.is_zip:  # a zip is hashed as one file
                found.checksums[f"{source.path.name}/{name}"] = hashlib.sha256(data).hexdigest()
            read(data)
        except InputError as error:
            place = f"{source.describe(name)}: "  # which errors of reading contain
            found.errors.append(place + str(error).removeprefix(place))

    def check_image(data: bytes) -> None:
        decode_rgb(data, dataset.resolution)
        if not data.endswith(PNG_END):
            raise InputError("has data after the end of the PNG")

    for i in chunk:
        check(dataset.images, dataset.image_file(i), check_image)
        for mirrored in (False, True) if dataset.has_mirrored else (False,):
            check(
                dataset.latents,
                dataset.latents_file(i, mirrored),
                lambda data: found.add_latents(decode_latents(data, dataset.stored_shape), dataset.stored),
            )
        for one in dataset.tokens:
            for mirrored in (False, True) if one.has_mirrored else (False,):
                check(one.source, one.file(i, mirrored), one.decode)
    return found


def read_checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of files by name from a checksum file, which has the format of `sha256sum -c`."""
    try:
        lines = read_file(path).decode("utf-8", "surrogateescape").split("\n")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    matches = [CHECKSUM.fullmatch(line) for line in lines[:-1]]  # after the last line end is nothing
    if not all(matches) or lines[-1]:
        raise InputError(f"{path}: not a complete checksum file; remove it, and a new one is written")
    return {match[2]: match[1] for match in matches}


def is_checksum_file(path: Path) -> bool:
    """Return whether a file has the format of `sha256sum -c`."""
    try:
        return bool(read_checksums(path)) or path.stat().st_size == 0
    except InputError:
        return False


OWN_SUMS = OwnFile("a checksum file", is_checksum_file)


def compare_checksums(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a message for each file whose checksum differs from that of the checksum file."""
    states = {name: (before.get(name), now.get(name)) for name in sorted({*before, *now})}
    return [
        f"{name}: {'not in' if old is None else 'missing, but in' if new is None else 'differs from'} {CHECKSUM_FILE}"
        for name, (old, new) in states.items()
        if old != new
    ]


def latent_statistics(found: Findings, latent_format: LatentFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (C,) of scaled latents as training samples them."""
    scale, shift = np.asarray(latent_format.scale), np.asarray(latent_format.shift)
    mean, deviation = mean_and_deviation(found.sums, found.count)
    return (mean - shift) * scale, deviation * scale


def check_magnitude(mean: np.ndarray, std: np.ndarray, dataset: LatentDataset) -> list[str]:
    """Return an error if scaled latents of this mean and standard deviation (C,) cannot be those of their codec."""
    codec, magnitude = dataset.latent_format, float(np.sqrt(np.mean(mean**2 + std**2)))
    low, high = PIXEL_MAGNITUDE if codec.codec == "pixel" and not codec.is_per_channel else MAGNITUDE
    if low <= magnitude <= high:
        return []
    expected = f"the scaled latents of {codec.codec} have a root mean square of {low:g} to {high:g}"
    question = "is that the codec that made them, and is its scale right?"
    named = f"{dataset.latents.describe('dataset.json')} says codec {codec.codec}, scale {codec.scale}"
    if "dataset.json" not in dataset.latents:
        named = f"{dataset.latents.path} has no dataset.json, which means codec {codec.codec}, scale {codec.scale}"
    return [f"{dataset.latents.path}: root mean square {magnitude:.3g}, but {expected}: {question} {named}"]


def decoding_codec(config: VerifyConfig, latent_format: LatentFormat) -> Codec:
    """Return the codec of --vae, or the latents' own. Raises InputError if it cannot be loaded or has other shapes."""
    try:
        return load_decoder(latent_format, config.vae or latent_format.codec, config.torch_device)
    except InputError as error:
        raise InputError(f"{error}; choose another with --vae, or decode nothing with --reconstruct 0") from error


def report_reconstruction(config: VerifyConfig, dataset: LatentDataset, codec: Codec) -> list[str]:
    """Print the PSNR of some decoded latents, and save the picture. Return an error if they do not show the images."""
    # Decode latents at regular distances in the data set.
    positions = np.linspace(0, len(dataset) - 1, min(config.reconstruct, len(dataset))).astype(int)
    originals, reconstructions = [], []
    for i in progress_bar(positions, desc="decoding", unit="image"):
        stored = torch.from_numpy(dataset.read_latents(i))
        latents = dataset.latent_format.sample(stored[None].to(config.torch_device), noise=None)
        originals.append(dataset.image(i))
        reconstructions.append(codec.decode(latents)[0].cpu())
    images, decoded = torch.stack(originals), torch.stack(reconstructions)  # both (N, 3, R, R) uint8

    # Compare them with their images.
    squared_error = (images.double() - decoded.double()).square().mean(dim=(1, 2, 3))
    psnr = 10 * torch.log10(255**2 / squared_error)  # infinite if the images are equal
    contact_sheet(config.picture, images, decoded)
    values = f"mean {psnr.mean():.2f} dB, minimum {psnr.min():.2f} dB"
    print(f"PSNR of {len(images)} decoded images: {values}; {config.picture}")
    if psnr.mean() >= MIN_PSNR:
        return []
    problem = f"decoded latents do not show the images (see {config.picture}); is the codec right?"
    return [f"{dataset.latents.path}: {problem}"]


def contact_sheet(path: Path, images: Tensor, decoded: Tensor) -> None:
    """Write a picture in which a row of images and the row of their reconstructions alternate."""
    columns = min(SHEET_COLUMNS, len(images))
    blank = torch.full((-len(images) % columns, *images.shape[1:]), 255, dtype=torch.uint8)
    pairs = torch.stack([torch.cat([part, blank]) for part in (images, decoded)])
    tiles = pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)
    save_png(path, image_grid(tiles.permute(0, 2, 3, 1).numpy(), columns))


if __name__ == "__main__":
    run_cli(main)
