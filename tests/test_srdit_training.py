"""Training with the switches of SR-DiT: host syncs and flags. More is in tests/test_option_matrix.py."""

import pytest

import train
from common.errors import InputError
from tests.conftest import run_training
from tests.test_sync import Waits, start
from tests.test_train import with_flags
from training.config import parse_args

SWITCHES = "--norm rms --qk-norm rms --rope --value-residual --sprint --sprint-keep 0.5 --sprint-path-drop 0.5"
FLAGS = ["--depth", "5", "--encoder-depth", "2", *SWITCHES.split()]


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
    "keep": (["--sprint-keep", "2"], "--sprint-keep 2.0: must be from 0 to 1"),
    "drop": (["--sprint-path-drop", "1.1"], "--sprint-path-drop 1.1: must be from 0 to 1"),
}


@pytest.mark.parametrize(("more", "text"), BAD.values(), ids=BAD)
def test_impossible_flags_are_named(train_flags, more, text):
    with pytest.raises(InputError, match=text):
        run_training(with_flags(train_flags, *FLAGS, *more))
