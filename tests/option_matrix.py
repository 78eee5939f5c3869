"""The options of REG's successors, each alone and together, as flags of runs that take a fraction of a second."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import train
from models.checkpoint import load_checkpoint
from models.encoders import encoders_digest, load_encoder
from tests.conftest import NUM_CLASSES, ROOT, read_rows, reset_accelerate, write_encoder
from tests.test_factor_16 import save_codec
from training.metrics import RunLog
from training.state import Run

STEPS = 3
SPRINT = "--depth 5 --encoder-depth 2 --sprint --sprint-keep 0.5 --sprint-path-drop 0.5"
NETWORK = f"--norm rms --qk-norm rms --rope --value-residual {SPRINT}"
TIMES = "--weighting lognormal --time-mean -0.2 --time-std 0.8 --time-shift auto"
RECIPE = f"--config {ROOT / 'recipes/train/srdit-muon.json'} --model SiT-S/1 --depth 5 --encoder-depth 2"
OPTIONS = {
    "norm": "--norm rms",
    "qk-norm": "--qk-norm rms",
    "rope": "--rope",
    "value-residual": "--value-residual",
    "sprint": SPRINT,
    "latents": "--model SiT-S/1 --latents-folder vae-in",
    "projector": "--projector conv --spatial-norm 0.6",
    "depths": "--encoder-depth 1,2",
    "align-stop": "--align-stop-steps 2",
    "times": TIMES,
    "cfm": "--cfm-coeff 0.05",
    "cls-lead": "--cls-lead 0.3",
    "without-labels": "--cfg-prob 1",
    "muon": "--optimizer muon",
    "schedule": "--warmup-steps 2 --lr-schedule cosine",
    "encoder-dtype": "--encoder-dtype bf16",
    "standardized": "--standardize-cls tokens",
    "recipe": RECIPE,
    "everything": f"{RECIPE} {NETWORK} --encoder-depth 1,2 --projector conv --spatial-norm 0.6 --align-stop-steps 2 "
    f"{TIMES} --warmup-steps 2 --lr-schedule cosine --encoder-dtype bf16 --gradient-accumulation-steps 2 "
    "--standardize-cls tokens --cls-lead 0.3",
}
WITH_DRAWS = {"latents", "recipe", "everything"}
WITH_MUON = {"muon", "recipe", "everything"}
has_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
CASES = [pytest.param(case, marks=has_muon if case in WITH_MUON else ()) for case in OPTIONS]


def write_draws(folder: Path, resolution: int = 64, count: int = 24) -> Path:
    """Write images of noise, with latents of 32 channels as one draw per image and no record, as SR-DiT has them."""
    rng = np.random.default_rng(0)
    for name, image in (("images", "img{:08d}.png"), ("vae-in", "img-mean-std-{:08d}.npy")):
        (folder / name / "00000").mkdir(parents=True)
        labels = [[f"00000/{image.format(index)}", index % NUM_CLASSES] for index in range(count)]
        for path, _ in labels:
            if name == "images":
                pixels = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / path)
            else:
                np.save(folder / name / path, rng.normal(size=(32, 4, 4)).astype(np.float32))
        (folder / name / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def write_statistics(data: Path, encoder: str, weights: Path) -> Path:
    """Write the statistics of an encoder's class token on the images of a data folder, as encode_tokens.py does."""
    images = np.stack([np.asarray(Image.open(file)) for file in sorted((data / "images").rglob("*.png"))])
    network = load_encoder(encoder, images.shape[1], weights)
    cls_tokens = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].double()
    statistics = {"mean": cls_tokens.mean(0).tolist(), "std": cls_tokens.std(0, correction=0).tolist()}
    (data / "tokens").mkdir()
    described = {"name": encoder, "weights": encoders_digest([network])}
    (data / "tokens" / "dataset.json").write_text(json.dumps({"encoder": described, "cls_token": statistics}))
    return data


def linked_data(data: Path, folder: Path) -> Path:
    """Return a new folder with links to the images and latents of a data folder."""
    folder.mkdir()
    for part in data.iterdir():
        (folder / part.name).symlink_to(part)
    return folder


class Matrix:
    """Flags of each case, and its run in one process, which is done once."""

    def __init__(self, folder: Path, data: Path, encoder: str, encoder_weights: Path):
        data = write_statistics(linked_data(data, folder / "data"), encoder, encoder_weights)
        self.folder, self.plain = folder, (data, encoder, encoder_weights)
        wide = encoder.replace("input=16", "input=64").replace("patch_size=4", "patch_size=16")
        weights = write_encoder(folder / "wide.safetensors", resolution=64, patch_size=16)
        self.with_draws = (write_statistics(write_draws(folder / "draws"), wide, weights), wide, weights)
        self.codec = save_codec(folder / "codec", scaling_factor=0.3099)
        self.runs: dict[str, Run] = {}

    def flags(self, case: str, name: str, *more: str) -> list[str]:
        """Return the flags of a run of a case; `name` is added to the name of the run.

        The epsilon of AdamW is large, so that it does not enlarge the rounding of gradients near 0.
        """
        draws = case in WITH_DRAWS
        data, encoder, weights = self.with_draws if draws else self.plain
        codec = ["--latents-codec", str(self.codec)] if draws else []
        flags = f"""--output-dir {self.folder / "exps"} --exp-name {case}-{name} --data-dir {data} --device cpu
            --enc-type {encoder} --enc-weights {weights} --model SiT-S/4 --depth 2 --hidden-size 32 --num-heads 2
            --projector-dim 16 --encoder-depth 1 --batch-size 8 --num-workers 0 --log-steps 1 --sampling-steps 0
            --ema-decay 0.9 --learning-rate 0.001 --max-grad-norm 1e6 --adam-epsilon 1e-4
            --checkpointing-steps 1 --no-background-save --max-train-steps {STEPS}"""
        return [*flags.split(), *OPTIONS[case].split(), *codec, *more]

    def alone(self, case: str) -> Run:
        """Return the completed run of a case in one process."""
        if case not in self.runs:
            self.runs[case] = trained(self.flags(case, "alone"))
        return self.runs[case]

    def file(self, case: str, name: str, step: int = STEPS) -> Path:
        return self.folder / "exps" / f"{case}-{name}" / "checkpoints" / f"{step:07d}.pt"


def save_time(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Have the runs of this process draw no curves, and list timm's models once."""
    patch(RunLog, "draw", lambda self: None)
    patch(timm, "list_models", functools.cache(timm.list_models))


def trained(flags: list[str]) -> Run:
    """Return the run of these flags after its last step."""
    reset_accelerate()
    run = train.set_up(train.parse_args(flags))
    train.train(run)
    return run


def losses(file: Path, *skipped: str) -> list[dict[str, float]]:
    """Return, for each row of metrics.jsonl of a checkpoint's run, what the steps computed."""
    left_out = {"images_per_second", "data_wait", "seconds", *skipped}
    return [{name: value for name, value in row.items() if name not in left_out} for row in read_rows(file.parents[1])]


def tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and value of everything that a resumed run continues with: weights, averages, optimizer."""
    checkpoint = load_checkpoint(file)
    for part in ("model", "ema"):
        yield from ((f"{part} {name}", value) for name, value in checkpoint[part].items())
    for index, state in checkpoint["opt"]["state"].items():
        yield from ((f"opt {index} {name}", value) for name, value in state.items())


def without_description(file: Path) -> dict[str, Any]:
    """Return a checkpoint without its entry that describes the network."""
    checkpoint = dict(load_checkpoint(file))
    del checkpoint["network"]
    return checkpoint | {"args": argparse.Namespace(**vars(checkpoint["args"]))}
