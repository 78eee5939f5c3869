"""The files in recipes/: settings of train.py and generate.py, and the networks that they give."""

import json

import pytest
import torch

from common.cli import parse
from generation.config import GenerateConfig
from models.autoencoder import SD_FORMAT, LatentFormat
from models.sit import SiT
from tests.conftest import ROOT
from training.config import TrainConfig, find_facts

REG = 139_028_496
CLASS_SLOT = 768 + 2 * (768 * 768 + 768) + 2 * 768  # position, cls_projectors2 and linear_cls, wg_norm
PROJECTOR = 7_344_896
PARAMETERS = {
    "reg": REG,
    "repa": REG - CLASS_SLOT,
    "sit": REG - CLASS_SLOT - PROJECTOR,
    "srdit": 140_235_051,
    "srdit-muon": 140_235_051,
}
FACTOR_16 = LatentFormat("e2e-invae", channels=32, factor=16)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch 2.9")
ALL = [pytest.param(name, marks=needs_muon if name == "srdit-muon" else ()) for name in PARAMETERS]


def path(program, name):
    return ROOT / "recipes" / program / f"{name}.json"


def train_settings(name):
    return parse(TrainConfig, "", ["--exp-name", "x", "--device", "cpu", "--config", str(path("train", name))])


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_gives_the_published_network(name):
    config = train_settings(name)
    latent_format = FACTOR_16 if name.startswith("srdit") else SD_FORMAT
    widths = [] if config.enc_type == "none" else [768]
    network = find_facts(config, 256, 256 // latent_format.factor, 1000, latent_format, widths).network
    with torch.device("meta"):
        model = SiT(network)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert network.tokens == 256 + (network.cls_token_dim is not None)


@pytest.mark.parametrize("name", PARAMETERS)
def test_samples_have_the_labels_of_the_published_number(name):
    config = parse(GenerateConfig, "", ["--ckpt", "x.pt", "--config", str(path("generate", name))])
    labels = "balanced" if name.startswith("srdit") else "random"
    assert (config.label_sampling, config.mode, config.num_steps) == (labels, "sde", 250)


def test_programs_have_the_same_recipes():
    for program in ("train", "generate"):
        assert {file.stem for file in (ROOT / "recipes" / program).iterdir()} == set(PARAMETERS)


def test_reg_is_the_default_of_train_py_for_a_smaller_network():
    given = ["--model", "SiT-B/2", "--enc-type", "dinov2-vit-b", "--batch-size", "256", "--max-train-steps", "400000"]
    config = parse(TrainConfig, "", ["--exp-name", "x", "--device", "cpu", *given])
    assert config == train_settings("reg") and config.given == train_settings("reg").given


def test_a_recipe_with_muon_differs_in_the_optimizer_only():
    plain, muon = (json.loads(path("train", name).read_text()) for name in ("srdit", "srdit-muon"))
    assert muon == {**plain, "optimizer": "muon"}
