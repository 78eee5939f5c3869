"""Sizes that no machine has the memory for are refused before memory is taken; micro-batches are made to fit it."""

import time
from dataclasses import replace

import pytest
import torch

from common.cli import flag, settings
from common.errors import InputError
from models.sit import SiT, SiTConfig
from tests.memory_table import chosen
from training.activations import Activations, Bytes
from training.config import MOST_BLOCKS, MOST_CLASSES, MOST_STEPS, MOST_WIDTH, TrainConfig, parse_args
from training.limits import (
    USABLE_SHARE,
    StepMemory,
    check_memory,
    choose_micro_batches,
    free_memory,
    parameter_count,
    parameter_parts,
)

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


MB = 10**6
# 22 MB for each image: 15 in the blocks, 2 in the rest, 5 for the temporary tensors of a block.
STEP = StepMemory(
    SiTConfig(**SMALL), Activations(3, Bytes(0, 5 * MB), Bytes(0, MB // 2), Bytes(0, 2 * MB)), samples=12, loaded=MB
)


def free_for(micro_batches, memory=STEP):
    """Return how much must be free for a step in a number of micro-batches."""
    return round(memory.estimate(micro_batches).total / USABLE_SHARE) + 1


def test_the_estimate_counts_state_encoders_and_activations():
    parameters = parameter_count(STEP.network)
    assert STEP.estimate(3) == (20 * parameters, MB, 4 * (2 + 3 * 5 + 5) * MB)
    assert STEP.estimate(3).total == 20 * parameters + 89 * MB
    sparing = replace(STEP, checkpointing=True)
    assert sparing.estimate(3).activations == 4 * (2 + 3 // 2 + 5) * MB + 2 * MB
    block, rest = parameter_parts(STEP.network)
    sharded = replace(STEP, sharded=True, processes=2)
    assert sharded.state == 10 * parameters + 8 * (rest + 2 * block) and rest + 3 * block == parameters


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 12])
def test_the_smallest_number_of_micro_batches_that_fits_is_chosen(parts, said):
    assert choose_micro_batches(STEP, None, None, free_for(parts)) == parts
    assert not said


def test_a_given_number_is_taken_and_what_would_fit_is_named(said):
    assert choose_micro_batches(STEP, 3, 6, free_for(3)) == 3 and not said
    assert choose_micro_batches(STEP, 4, None, free_for(1)) == 4 and not said
    several = replace(STEP, processes=2)
    assert choose_micro_batches(several, 1, None, free_for(2)) == 1
    (warning,) = said
    assert warning == (
        "warning: a step in micro-batches of 12 takes 0.3 GB by an estimate; 0.1 GB of the GPU are free, and an "
        "estimate should not exceed 0.1 GB: it fits with --gradient-accumulation-steps 2 or --activation-checkpointing"
    )
    wide = replace(several, network=SiTConfig(), samples=1, loaded=0)
    said.clear()
    assert choose_micro_batches(wide, None, None, free_for(1, replace(wide, sharded=True))) == 1
    assert said[0].endswith("it fits with --fsdp")


def test_if_nothing_fits_micro_batches_have_one_image(said):
    assert choose_micro_batches(STEP, None, None, 10 * MB) == 12
    assert "of 1 takes 0.0 GB" in said[0] and "micro-batches of one image do not fit either" in said[0]


def test_a_resumed_run_keeps_its_number_if_it_fits(said):
    assert choose_micro_batches(STEP, None, 3, free_for(3)) == 3 and not said
    assert choose_micro_batches(STEP, None, 3, free_for(1)) == 3
    assert said == [
        "info: note: 3 micro-batches, as before; 1 would fit, by an estimate: --gradient-accumulation-steps 1"
    ]
    for unfit in (1, 5, 24, 0, -1, True, 2.0, "2", None):
        assert choose_micro_batches(STEP, None, unfit, free_for(2)) == 2


def test_the_memory_of_the_cpu_is_no_limit():
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("model", "resolution", "card", "how", "images"),
    [
        ("SiT-XL/2", 256, "141 GB", {}, 256),
        ("SiT-XL/2", 256, "80 GB", {}, 128),
        ("SiT-XL/2", 256, "80 GB", {"checkpointing": True}, 256),
        ("SiT-L/2", 256, "80 GB", {"compiled": True}, 256),
    ],
)
def test_the_readmes_table_is_what_the_program_chooses(model, resolution, card, how, images):
    assert chosen(model, resolution, card, **how) == images


def test_micro_batches_of_pairs_have_an_even_number_of_images(said):
    """12 images of a process form pairs in 1, 2, 3 or 6 micro-batches, and not in 4 or 12."""
    of_pairs = replace(STEP, multiple=2)
    assert of_pairs.divisors == [1, 2, 3, 6]
    assert choose_micro_batches(of_pairs, None, None, free_for(4)) == 6
    assert choose_micro_batches(of_pairs, None, 4, free_for(2)) == 2  # 4 of before is not possible
    assert not said
    assert choose_micro_batches(of_pairs, None, None, 10 * MB) == 6
    assert "micro-batches of 2 images do not fit either" in said[0]
