"""What is compared, and at which size: the rows of each table as flags of train.py, and the presets with their data."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import uses_cuda
from common.errors import InputError
from common.images import open_image, save_png
from common.sources import FileSource
from experiments import digits
from experiments.judge import load_images, train_judge
from experiments.scoring import Judges, Sampling

if TYPE_CHECKING:
    from experiments.convergence import Convergence

ROOT = Path(__file__).resolve().parents[1]

SIT, REPA, REG = "SiT", "REPA", "REG"
DIGITS_ENCODER_STEPS = (400, 40)  # of the encoder, and of a worse one for the ablation
# A row is a name and the flags that differ from REG.
METHODS = {SIT: "--entangle none --proj-coeff 0", REPA: "--entangle none", REG: ""}
# What SR-DiT (arXiv 2512.12386) combines, as in recipes/train/srdit.json.
SR_DIT = "--norm rms --qk-norm rms --rope --value-residual --sprint --time-shift auto --cfm-coeff 0.05"
ABLATIONS = ("methods", "entangle", "parts", "cls", "depth", "encoder", "switches")


def ablations(
    depths: tuple[int, ...], coefficients: tuple[str, ...], encoders: dict[str, str], steps: int, muon_rate: str
) -> dict[str, dict[str, str]]:
    """Return the rows of each table of the paper, and of the options of REG's successors, by its name in `ABLATIONS`.

    depths, coefficients: aligned blocks and weights of the class token, in addition to those of REG. encoders: values
    of --enc-type by the row's name. steps: length of a run. muon_rate: learning rate of Muon.
    """
    muon = f"--optimizer muon --muon-learning-rate {muon_rate}"
    return {
        "methods": METHODS,
        "entangle": {
            REPA: METHODS[REPA],
            "learnable token": "--entangle learnable",
            "latent mean": "--entangle latent-mean",
            "patch mean": "--entangle patch-mean",
            REG: METHODS[REG],
        },
        "parts": {**METHODS, "not aligned": "--proj-coeff 0"},
        "cls": {**{f"cls {value}": f"--cls {value}" for value in coefficients}, REG: METHODS[REG]},
        "depth": {**{f"depth {block}": f"--encoder-depth {block}" for block in depths}, REG: METHODS[REG]},
        "encoder": {name: f"--enc-type {spec}" for name, spec in encoders.items()},
        "switches": {
            REG: METHODS[REG],
            "norm rms": "--norm rms",
            "qk-norm rms": "--qk-norm rms",
            "rope": "--rope",
            "value-residual": "--value-residual",
            "sprint": "--sprint",
            "time-shift auto": "--time-shift auto",
            "cfm-coeff 0.05": "--cfm-coeff 0.05",
            "all of SR-DiT": SR_DIT,
            "lognormal times": "--weighting lognormal",
            "iREPA": "--projector conv --spatial-norm 0.6 --proj-coeff 1",
            "align stop": f"--align-stop-steps {max(1, steps // 2)}",
            "cosine decay": f"--warmup-steps {steps // 20} --lr-schedule cosine",
            "Muon": muon,
            "all and Muon": f"{SR_DIT} {muon}",
        },
    }


@dataclass(frozen=True)
class Files:
    """What `Preset.prepare` made: training data, what scores depend on, and flags of the encoder ablation's rows."""

    data: Path
    judges: Judges
    other_encoders: dict[str, str]


@dataclass(frozen=True)
class Preset:
    """One size of the comparison.

    Args:
        flags: of train.py, the same for all rows.
        steps: steps whose checkpoints are scored. Training ends at the last.
        seeds: of training.
        sampling: see `Sampling`.
        timing_steps: length of the short runs that measure the time of a step.
        depths, coefficients, muon_rate: of the rows of some ablations, see `ablations`.
        prepare: makes data, encoder and judge in a folder.
        switches_flags: further flags of all rows of the ablation switches.
    """

    flags: str
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    timing_steps: int
    depths: tuple[int, ...]
    coefficients: tuple[str, ...]
    muon_rate: str
    prepare: Callable[[Path, Convergence], Files]
    switches_flags: str = ""


def prepare_digits(folder: Path, config: Convergence) -> Files:
    """Make the digits: one half to train on, with an encoder trained on it; the other with a judge trained on it."""
    _make_data(folder, digits.write_images, digits.RESOLUTION, "pixel")
    good, bad = (folder / f"encoder-{steps}.safetensors" for steps in DIGITS_ENCODER_STEPS)
    for weights, steps in zip((good, bad), DIGITS_ENCODER_STEPS, strict=True):
        if not weights.exists():
            digits.train_encoder(weights, steps)
    judge = _make_judge(folder, digits.RESOLUTION, [32, 64, 64], 600)
    judges = Judges(folder / "held_out" / "images", judge, digits.ENCODER_SPEC, str(good), "pixel", "cpu")
    return Files(folder / "train", judges, {f"encoder of {DIGITS_ENCODER_STEPS[1]} steps": f"--enc-weights {bad}"})


def prepare_photographs(folder: Path, config: Convergence) -> Files:
    """Split photographs, class folders in a folder or zip, into halves; convert both, and make latents and judge."""
    if not config.source:
        raise InputError("--source is missing: photographs, class folders in a folder or zip")
    write_half = functools.partial(_extract_half, Path(config.source), limit=config.images)
    _make_data(folder, write_half, 256, config.vae)
    device = "cuda" if uses_cuda(config.device) else "cpu"
    judge = _make_judge(folder, 96, [32, 64, 128, 256], config.judge_steps, device)
    judges = Judges(folder / "held_out" / "images", judge, config.enc_type, config.enc_weights, config.vae, device)
    return Files(folder / "train", judges, {})


def _make_data(folder: Path, write_half: Callable[[Path, int], None], resolution: int, vae: str) -> None:
    """Make the images of both halves, and the latents of the first, on which networks are trained."""
    for half, name in enumerate(("train", "held_out")):
        raw, images = folder / "raw" / name, folder / name / "images"
        if not (images / "dataset.json").exists():
            write_half(raw, half)
            size = ["--resolution", str(resolution)]
            run(["preprocessing/convert.py", "--source", str(raw), "--dest", str(images), *size])
    images, latents = folder / "train" / "images", folder / "train" / "vae-sd"
    if not (latents / "dataset.json").exists():
        run(["preprocessing/encode.py", "--source", str(images), "--dest", str(latents), "--vae", vae])


def _extract_half(source: Path, dest: Path, half: int, limit: int | None) -> None:
    """Write every second photograph of each class, starting at `half` and at most `limit` per class, as PNGs."""
    files = FileSource(source)
    classes: dict[str, list[str]] = {}
    for name in files.names:
        if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png"):
            classes.setdefault(Path(name).parent.name, []).append(name)
    for label, names in classes.items():
        for name in names[half::2][:limit]:
            path = dest / label / Path(name).with_suffix(".png").name
            if not path.exists():
                save_png(path, open_image(files.read(name)).convert("RGB"))


def _make_judge(folder: Path, size: int, widths: list[int], steps: int, device: str = "cpu") -> Path:
    if not (folder / "judge.pt").exists():
        train_judge(folder / "judge.pt", *load_images(folder / "held_out" / "images"), size, widths, steps, device)
    return folder / "judge.pt"


def run(command: list[str], folder: Path | None = None, threads: int | None = None) -> None:
    """Run a program of this repository. Raises InputError if it fails.

    folder: of the program's results; its output is appended to a file next to it instead of being shown.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    program = [sys.executable, str(ROOT / command[0]), *command[1:]]
    log = folder and folder.with_name(f"{folder.name}.log")
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") if log else contextlib.nullcontext() as output:
        done = subprocess.run(program, env=environment, stdout=output, stderr=output)
    if done.returncode:
        raise InputError(f"{' '.join(command)} failed with status {done.returncode}" + (f"; see {log}" if log else ""))


PRESETS = {
    "digits": Preset(
        flags="--model SiT-S/4 --depth 4 --hidden-size 128 --num-heads 4 --encoder-depth 2 --projector-dim 256 "
        "--batch-size 32 --learning-rate 2e-3 --ema-decay 0.99 --num-workers 0",
        steps=(400, 600, 800, 1000, 1200, 1600, 2000, 2400),
        seeds=(0, 1, 2),
        sampling=Sampling(images=600, num_steps=8, batch_size=300),
        timing_steps=60,
        depths=(1, 3, 4),
        coefficients=("0.003", "0.01", "0.1", "0.3"),
        muon_rate="2e-2",  # ten times the rate of AdamW, as in SR-DiT
        prepare=prepare_digits,
        switches_flags="--depth 6",  # SPRINT needs 5 blocks or more
    ),
    "imagenette": Preset(
        flags="--model SiT-S/2 --batch-size 64 --learning-rate 3e-4 --ema-decay 0.999 --num-workers 12",
        steps=(500, 1000, 1500, 2000, 3000, 4000),
        seeds=(0,),
        sampling=Sampling(images=2000, num_steps=12, batch_size=200),
        timing_steps=100,
        depths=(2, 6, 8),
        coefficients=("0.01", "0.02", "0.05", "0.1"),
        muon_rate="3e-3",
        prepare=prepare_photographs,
    ),
}
