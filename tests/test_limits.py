"""Sizes that no machine has the memory for are refused before memory is taken."""

import time

import pytest

from common.cli import flag, settings
from common.errors import InputError
from models.sit import SiT, SiTConfig
from training.config import MOST_BLOCKS, MOST_CLASSES, MOST_STEPS, MOST_WIDTH, TrainConfig, parse_args
from training.limits import check_memory, parameter_count

SMALL = {
    "input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "encoder_depth": 2, "projector_dim": 16,
    "num_classes": 5, "z_dims": (8, 12), "qk_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"sprint": True, "value_residual": True, "depth": 7}])
def test_the_number_of_parameters_is_that_of_the_network(more):
    config = SiTConfig(**SMALL | more)
    assert parameter_count(config) == sum(p.numel() for p in SiT(config).parameters())


def test_a_network_that_is_too_large_is_refused_at_once():
    sizes = {"hidden_size": MOST_WIDTH, "depth": MOST_BLOCKS, "projector_dim": MOST_WIDTH, "num_classes": MOST_CLASSES}
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


def test_every_number_has_an_upper_bound():
    numbers = [flag(name) for name, field in settings(TrainConfig).items() if "int" in field.type]
    assert len(numbers) > 25
    for name in numbers:
        with pytest.raises(InputError, match=rf"{name} 1000000000000000000000000000000: must be "):
            parse_args(["--exp-name", "x", name, str(10**30)])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max-train-steps", MOST_STEPS + 1), ("--num-workers", 10**6), ("--depth", 10**4), ("--hidden-size", 10**5),
     ("--eval-samples", 10**8), ("--eval-batch-size", 10**6), ("--num-classes", 10**7), ("--grid-num-steps", 10**7)],
)  # fmt: skip
def test_numbers_that_take_memory_or_time_have_bounds_of_their_own(flag, value):
    with pytest.raises(InputError, match=rf"{flag} {value}: must be from [01] to "):
        parse_args(["--exp-name", "x", flag, str(value)])
