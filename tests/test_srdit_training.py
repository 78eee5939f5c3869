"""Training with the switches of SR-DiT: resumed runs, several processes, shards, flags."""

import numpy as np
import pytest
import torch

import train
from common.errors import InputError
from models.checkpoint import load_checkpoint, load_model
from tests.conftest import run_training
from tests.processes import Training
from tests.test_sync import Waits, start
from tests.test_train import terms, with_flags
from training.config import parse_args

SWITCHES = "--norm rms --qk-norm rms --rope --value-residual --sprint --sprint-keep 0.5 --sprint-path-drop 0.5"
FLAGS = ["--depth", "5", "--encoder-depth", "2", *SWITCHES.split()]


def test_a_resumed_run_equals_one_never_stopped_and_its_network_is_rebuilt(train_flags):
    undisturbed = run_training(with_flags(train_flags, *FLAGS, "--exp-name", "undisturbed"))
    flags = with_flags(train_flags, *FLAGS, "--checkpointing-steps", "2")
    run_training([*flags, "--max-train-steps", "2"])
    resumed = run_training([*flags, "--resume", "latest"])
    a, b = (load_checkpoint(run / "checkpoints" / "0000004.pt") for run in (undisturbed, resumed))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert terms(undisturbed) == terms(resumed)
    network = load_model(resumed / "checkpoints" / "0000004.pt")
    config = network.config
    assert (config.norm, config.qk_norm, config.rope, config.value_residual, config.sprint) == (
        "rms",
        "rms",
        *[True] * 3,
    )
    assert (config.sprint_keep, config.sprint_path_drop) == (0.5, 0.5) and config.kept_tokens == 8
    moved = network.mask_token.abs().max(), (network.blocks[1].attn.v1_lambda - 0.5).abs()
    assert all(change > 1e-5 for change in moved)
    with pytest.raises(InputError, match=r"--rope is False, but .* was started with True"):
        run_training([*(flag for flag in flags if flag != "--rope"), "--resume", "latest"])


def test_two_processes_with_shards_give_the_losses_of_one(train_flags, tmp_path):
    if not (torch.cuda.is_available() or hasattr(torch.cpu.Stream, "record_event")):
        pytest.skip("this torch shards on GPUs only")
    one = run_training(with_flags(train_flags, *FLAGS, "--exp-name", "one"))
    flags = with_flags(train_flags, *FLAGS, "--exp-name", "two", "--fsdp", "--activation-checkpointing")
    training = Training(flags, tmp_path / "output.txt", processes=2)
    assert training.wait() == 0, training.text()
    two = one.parent / "two"
    np.testing.assert_allclose(terms(one), terms(two), rtol=1e-5, atol=1e-6)
    a, b = (load_checkpoint(run / "checkpoints" / "0000004.pt") for run in (one, two))
    for key, value in a["ema"].items():
        torch.testing.assert_close(value, b["ema"][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", ["", "--mixed-precision bf16"])
def test_a_step_reads_nothing_from_the_device(train_flags, more):
    run, batches = start([*train_flags, *FLAGS, *more.split()])
    with Waits() as waits:
        train.training_step(run, batches)
    assert waits.found == []


def test_the_norm_of_queries_is_a_switch_or_a_name(tmp_path):
    def parsed(*flags):
        return parse_args(["--exp-name", "x", *flags]).qk_norm

    assert [parsed(), parsed("--no-qk-norm"), parsed("--qk-norm", "none")] == ["none"] * 3
    assert [parsed("--qk-norm"), parsed("--qk-norm", "--norm", "rms"), parsed("--qk-norm=layer")] == ["layer"] * 3
    assert parsed("--qk-norm", "rms") == "rms" and parsed("--qk-norm", "--no-qk-norm") == "none"
    for text, expected in (("true", "layer"), ("false", "none"), ('"rms"', "rms"), ("null", "none")):
        (tmp_path / "args.json").write_text(f'{{"qk_norm": {text}}}')
        assert parsed("--config", str(tmp_path / "args.json")) == expected
    with pytest.raises(InputError, match="--qk-norm batch: allowed: none, layer, rms"):
        parsed("--qk-norm", "batch")


BAD = {
    "few blocks": (["--depth", "4"], "sprint with a depth of 4 blocks: needs 5 or more"),
    "depth of the projectors": (["--encoder-depth", "3"], r"encoder_depth 3 is one of the routed blocks 3 \.\. 3 of"),
    "few tokens": (["--sprint-keep", "0.01"], "sprint_keep 0.01 of 17 tokens keeps none"),
    "keep": (["--sprint-keep", "2"], "--sprint-keep 2.0: must be from 0 to 1"),
    "drop": (["--sprint-path-drop", "1.1"], "--sprint-path-drop 1.1: must be from 0 to 1"),
}


@pytest.mark.parametrize(("more", "text"), BAD.values(), ids=BAD)
def test_impossible_flags_are_named(train_flags, more, text):
    with pytest.raises(InputError, match=text):
        run_training(with_flags(train_flags, *FLAGS, *more))
