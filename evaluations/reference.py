"""Make a reference .npz for the evaluator from any data set: statistics of all its images, and some of the images.

    python evaluations/reference.py --source DATA/images --dest reference.npz

It contains the same arrays as ADM's references (mu, sigma, mu_s, sigma_s over all images; arr_0, up to 10,000 images,
for precision and recall), the name of the network, and on request an encoder's statistics. Several processes share the
work: `accelerate launch evaluations/reference.py ...`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.checks import NON_NEGATIVE, POSITIVE
from common.cli import Config, parse, setting
from common.distributed import long_collective_timeout, start_processes
from common.errors import InputError, run_cli
from common.identity import changed_error
from common.io import OwnFile, check_writable
from common.temporary import atomic_write
from evaluations.batches import open_images
from evaluations.features import ExtractionConfig, Extractor
from evaluations.npz import NpzFile, write_npz


@dataclass(frozen=True, kw_only=True)
class FilesConfig(Config):
    """Files."""

    source: str = setting(MISSING, "images of one size: a folder, a zip, or an .npz with arr_0")
    dest: str = setting(MISSING, "reference file to write (.npz)")
    num_images: int = setting(10_000, "maximum number of images stored in it", check=POSITIVE)
    seed: int = setting(0, "selects the stored images", check=NON_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(FilesConfig, ExtractionConfig):
    """Settings of reference.py."""

    def check_combination(self) -> None:
        super().check_combination()
        if not self.dest.endswith(".npz"):
            raise InputError(f"--dest {self.dest}: the name of a reference must end in .npz")


def is_reference(path: Path) -> bool:
    """Return whether a file is a reference that this program wrote. Those of ADM do not name their network."""
    try:
        npz = NpzFile(path)
        return all(name in npz for name in ("mu", "sigma", "num_images", "inception"))
    except InputError:
        return False


OWN_REFERENCE = OwnFile("a reference of this program", is_reference)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the reference that the command line describes."""
    config = parse(ReferenceConfig, "Make a reference .npz for evaluator.py from a data set.", argv)
    images = open_images(config.source)
    check_writable(config.dest, "--dest", (images.path, config.inception, config.enc_weights), OWN_REFERENCE)
    if images.count < 2:
        raise InputError(f"{config.source}: {images.count} image; a covariance needs at least 2")
    accelerator = start_processes("cpu" if config.cpu else "auto", kwargs_handlers=[long_collective_timeout()])
    for note in images.notes:
        accelerator.print(note)

    # Extract features, with all processes
    with Extractor(accelerator, config, images.height) as extractor:
        features = extractor.inception_features(images, keep=False)
        tokens = None if extractor.encoder is None else extractor.encoder_features(images)
    if not accelerator.is_main_process:
        return

    # Write statistics and images
    network = extractor.inception.name
    pool, spatial = features.parts["pool"].statistics(), features.parts["spatial"].statistics()
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays |= {"num_images": np.array(images.count), "inception": np.array(network)}
    if tokens is not None:
        cls = tokens.parts["cls"].statistics()
        arrays |= {"mu_enc": cls.mean, "sigma_enc": cls.covariance, "encoder": np.array(extractor.encoder_name)}
        arrays |= {"encoder_input": np.array(extractor.encoder.input_size)}
    selected = select(images.count, config.num_images, config.seed)
    kept = (images.read(number, number + 1) for number in selected)
    with atomic_write(config.dest) as file:
        write_npz(file, kept, (len(selected), images.height, images.width, 3), arrays)
        if images.state() != images.opened:  # the stored images were read for the second time
            raise changed_error(images.path)
    print(f"{config.dest}: statistics of {images.count:,} images, network {network}")


def select(count: int, wanted: int, seed: int) -> np.ndarray:
    """Return the numbers of the images to store, in ascending order: at most `wanted` of `count`, drawn by seed."""
    return np.sort(np.random.default_rng(seed).choice(count, size=min(wanted, count), replace=False))


if __name__ == "__main__":
    run_cli(main)
