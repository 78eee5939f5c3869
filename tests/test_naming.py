"""The names of a sample set."""

import argparse
from pathlib import Path

import pytest
import torch

from generation.naming import default_name, published_name
from models.autoencoder import SD_FORMAT, LatentFormat
from models.sit import SiT_models
from tests.test_generation_config import settings_of
from tests.test_sit import small

LINE = "--ckpt exps/reg/0400000.pt --cfg-scale 2.3 --guidance-high 0.85 --cls-cfg-scale 2.3 --mode sde"


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """The files that the command lines name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for file in (Path("exps/reg/0400000.pt"), Path("reg.pt")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def codec(name):
    return LatentFormat(name, SD_FORMAT.channels, SD_FORMAT.factor)


@pytest.mark.parametrize(
    ("more", "decoder", "name"),
    [
        ("", "sd-vae-ft-ema", "SiT-XL-2-0400000-size-256-vae-ema-cfg-2.3-seed-0-sde-0.85-2.3"),
        ("--vae mse", "sd-vae-ft-mse", "SiT-XL-2-0400000-size-256-vae-mse-cfg-2.3-seed-0-sde-0.85-2.3"),
        ("--ckpt reg.pt", "/data/taesd", "SiT-XL-2-reg-size-256-vae-taesd-cfg-2.3-seed-0-sde-0.85-2.3"),
        ("--ckpt owner/reg-v1.0", "sd-vae-ft-ema", "SiT-XL-2-reg-v1.0-size-256-vae-ema-cfg-2.3-seed-0-sde-0.85-2.3"),
        (
            "--mode ode --cfg-scale 1 --guidance-high 1 --global-seed 3 --cls-cfg-scale 1.5",
            "owner/name/vae",
            "SiT-XL-2-0400000-size-256-vae-vae-cfg-1.0-seed-3-ode-1.0-1.5",
        ),
    ],
)
def test_the_published_name(more, decoder, name, checkpoints):
    with torch.device("meta"):
        network = SiT_models["SiT-XL/2"]().config
    config = settings_of([*LINE.split(), *more.split()])
    assert published_name(config, {"args": argparse.Namespace()}, network, codec(decoder)) == name


@pytest.mark.parametrize(("model", "begins"), [("SiT-S/4", "SiT-S-4-"), ("../../evil", "SiT-0")])
def test_a_checkpoint_does_not_choose_where_to_link(model, begins, checkpoints):
    checkpoint = {"args": argparse.Namespace(model=model)}
    name = published_name(settings_of(LINE.split()), checkpoint, small().config, codec("pixel"))
    assert name.startswith(begins) and "/" not in name


def test_the_name_tells_path_drop_guidance_from_the_other():
    line = ["--ckpt", "a/0012.pt", "--path-drop-guidance"]
    guided, plain = (default_name(settings_of([*line, *more]), {}) for more in (["--cfg-scale", "2"], []))
    assert "-cfg-2-cls-2-at-0-1-path-drop-" in guided and "-no-cfg-random-" in plain


@pytest.mark.parametrize(
    ("exp_name", "begins"),
    [
        ("reg", "reg-0000012-ema-sde"),
        ("../../evil", "evil-0000012"),
        ("/evil", "evil-0"),
        ("..", "..-0"),
        (7, "0012-0"),
    ],
)
def test_a_checkpoint_does_not_choose_where_to_write(exp_name, begins):
    checkpoint = {"args": argparse.Namespace(exp_name=exp_name), "steps": 12}
    name = default_name(settings_of(["--ckpt", "a/0012.pt"]), checkpoint)
    assert name.startswith(begins) and "/" not in name


@pytest.mark.parametrize(("labels", "text"), [("random", "random-labels"), ("none", "no-labels")])
def test_the_folder_says_how_labels_were_drawn(labels, text):
    config = settings_of(["--ckpt", "x.pt", "--label-sampling", labels])
    assert default_name(config, {"args": argparse.Namespace()}) == f"x-0000000-ema-sde-250-no-cfg-{text}-seed-0"
