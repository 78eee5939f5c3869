"""Sizes that no machine has the memory for are refused before memory is taken."""

import time

import pytest
import torch

from common.errors import InputError
from models.sit import SiT, SiT_models, SiTConfig
from training.config import MOST_STEPS, parse_args
from training.limits import check_memory, parameter_count

SMALL = {
    "input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "encoder_depth": 1, "projector_dim": 16,
    "num_classes": 5,
}  # fmt: skip
NETWORKS = {
    "REG": {},
    "several encoders": {"z_dims": (8, 12)},
    "REPA": {"cls_token_dim": None},
    "SiT": {"cls_token_dim": None, "z_dims": ()},
    "latent mean": {"cls_token_dim": 4, "z_dims": ()},
    "learned token": {"cls_token_dim": None, "learnable_token": True},
    "qk norm": {"qk_norm": True},
    "wide": {"mlp_ratio": 2.5, "patch_size": 4, "in_channels": 16},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_number_of_parameters_is_that_of_the_network(name):
    config = SiTConfig(**SMALL | NETWORKS[name])
    assert parameter_count(config) == sum(p.numel() for p in SiT(config).parameters())


@pytest.mark.parametrize(("model", "count"), [("B", 139_028_496), ("L", 467_533_328), ("XL", 685_017_360)])
def test_the_published_networks_have_the_published_numbers_of_parameters(model, count):
    with torch.device("meta"):
        assert parameter_count(SiT_models[f"SiT-{model}/2"]().config) == count


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9},
        {"depth": 10**9},
        {"projector_dim": 10**9},
        {"num_classes": 10**12},
        {"input_size": 10**9},
    ],
)
def test_a_network_that_is_too_large_is_refused_at_once(sizes):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"has [\d,]+ parameters, whose weights, .*--hidden-size.*--num-classes"):
        check_memory(SiTConfig(**SMALL | sizes), 8, 1, False, 10**12)
    assert time.monotonic() - started < 1


def test_a_batch_that_is_too_large_is_refused_and_shards_are_counted():
    with pytest.raises(InputError, match=r"--batch-size 1000000000000: the noise of a batch takes [\d,.]+ GB"):
        check_memory(SiTConfig(**SMALL), 10**12, 1, False, 10**12)
    config = SiTConfig()
    check_memory(config, 256, 1, False, 16 * parameter_count(config))
    with pytest.raises(InputError, match="has 685,017,360 parameters"):
        check_memory(config, 256, 1, False, 10 * 10**9)
    check_memory(config, 256, 2, True, 10 * 10**9)


@pytest.mark.parametrize(
    "flag",
    ["--max-train-steps", "--num-workers", "--batch-size", "--resolution", "--num-classes", "--hidden-size", "--depth",
     "--projector-dim", "--grid-samples", "--grid-num-steps", "--eval-samples", "--eval-num-steps", "--resume-step",
     "--log-steps", "--epochs", "--max-images", "--gradient-accumulation-steps", "--keep-last"],
)  # fmt: skip
def test_every_number_has_an_upper_bound(flag):
    with pytest.raises(InputError, match=rf"{flag} 1000000000000000000000000000000: must be "):
        parse_args(["--exp-name", "x", flag, str(10**30)])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-train-steps", MOST_STEPS + 1), ("--num-workers", 10**6), ("--grid-samples", 10**5),
     ("--eval-samples", 10**8), ("--eval-batch-size", 10**6), ("--eval-num-steps", 10**7), ("--grid-num-steps", 10**7)],
)  # fmt: skip
def test_numbers_that_take_memory_or_time_have_bounds_of_their_own(flag, value):
    with pytest.raises(InputError, match=rf"{flag} {value}: must be from [01] to "):
        parse_args(["--exp-name", "x", flag, str(value)])
