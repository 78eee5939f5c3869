"""What is compared, and at which size: the rows of each table as flags of train.py, and the presets with their data."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.preparation import (
    TOKENS,
    Files,
    Pictures,
    emoji_groups,
    photograph_groups,
    prepare_digits,
    prepare_pictures,
    prepare_solids,
)
from experiments.scoring import Sampling
from training.config import TrainConfig, parse_args

if TYPE_CHECKING:
    from experiments.convergence import Convergence

SIT, REPA, REG = "SiT", "REPA", "REG"
# A row is a name and the flags that differ from REG.
METHODS = {SIT: "--entangle none --proj-coeff 0", REPA: "--entangle none", REG: ""}
LEADS = ("0.1", "0.3")
# What SR-DiT (arXiv 2512.12386) combines, as in recipes/train/srdit.json.
SR_DIT = "--norm rms --qk-norm rms --rope --value-residual --sprint --time-shift auto --cfm-coeff 0.05"
ABLATIONS = ("methods", "entangle", "parts", "cls", "depth", "encoder", "standardized", "lead", "switches")


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
        "standardized": {REG: METHODS[REG], "REG standardized": f"--standardize-cls {TOKENS}"},
        "lead": {REG: METHODS[REG], **{f"lead {lead}": f"--cls-lead {lead}" for lead in LEADS}},
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


def row_flags(common: str, flags: str, reg_flags: str) -> str:
    """Return the flags of a row, with `reg_flags` before them if the row has a class token.

    common: flags of train.py of all rows. Raises InputError if train.py does not accept them.
    """
    if settings_of(f"{common} {flags}").slot == "class":
        flags = f"{reg_flags} {flags}".strip()
        settings_of(f"{common} {flags}")
    return flags


def settings_of(flags: str) -> TrainConfig:
    """Return the settings of train.py with some flags. Raises InputError if it does not accept them."""
    return parse_args(["--exp-name", "row", *shlex.split(flags)])


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


# A network for 64 tokens of an encoder, small enough for a CPU.
SMALL = (
    "--depth 6 --hidden-size 256 --num-heads 4 --encoder-depth 2 --projector-dim 512 "
    "--batch-size 32 --learning-rate 1e-3 --ema-decay 0.99"
)
PRESETS = {
    "digits": Preset(
        flags="--model SiT-S/4 --depth 4 --hidden-size 128 --num-heads 4 --encoder-depth 2 --projector-dim 256 "
        "--batch-size 32 --learning-rate 2e-3 --ema-decay 0.99",
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
    "solids": Preset(
        flags="--model SiT-S/4 --depth 4 --hidden-size 128 --num-heads 4 --encoder-depth 2 --projector-dim 256 "
        "--batch-size 32 --learning-rate 2e-3 --ema-decay 0.99 --proj-coeff 1",
        steps=(500, 1000, 1500, 2000, 2500, 3000, 4000),
        seeds=(0, 1, 2, 3, 4),
        sampling=Sampling(images=500, num_steps=8, batch_size=250),
        timing_steps=60,
        depths=(1, 3, 4),
        coefficients=("0.003", "0.01", "0.1", "0.3"),
        muon_rate="2e-2",
        prepare=prepare_solids,
    ),
    "imagenette": Preset(
        flags=f"--model SiT-S/2 {SMALL}",
        steps=(500, 750, 1000, 1500, 2000, 3000),
        seeds=(0, 1, 2),
        sampling=Sampling(images=1000, num_steps=10, batch_size=250),
        timing_steps=20,
        depths=(1, 3, 4),
        coefficients=("0.01", "0.1", "0.3"),
        muon_rate="1e-2",
        prepare=functools.partial(prepare_pictures, Pictures(photograph_groups, 128, 48, [32, 64, 128], 1000)),
    ),
    "emoji": Preset(
        flags=f"--model SiT-S/1 {SMALL}",
        steps=(500, 750, 1000, 1500, 2000, 3000),
        seeds=(0, 1, 2),
        sampling=Sampling(images=1000, num_steps=10, batch_size=250, proportional=True),
        timing_steps=20,
        depths=(1, 3, 4),
        coefficients=("0.01", "0.1", "0.3"),
        muon_rate="1e-2",
        prepare=functools.partial(prepare_pictures, Pictures(emoji_groups, 64, 48, [32, 64, 128], 1000)),
    ),
}
