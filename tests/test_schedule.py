"""The learning rate of each step against closed forms, and the rates and schedule of a resumed run."""

import math

import pytest

from common.errors import InputError
from models.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import read_rows, run_training
from tests.test_setup import starts
from tests.test_train import with_flags
from training.config import parse_args
from training.schedule import choose_rates, rate_factor, varies

WARMUP, LAST = 4, 12
CLOSED_FORMS = {
    "constant": lambda step: 1.0,
    "linear": lambda step: (LAST - step) / (LAST - WARMUP),
    "cosine": lambda step: math.cos(math.pi / 2 * (step - WARMUP) / (LAST - WARMUP)) ** 2,
}


def settings(*more: str):
    return parse_args(["--exp-name", "x", *more])


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_factors_have_their_closed_form(schedule):
    config = settings("--warmup-steps", str(WARMUP), "--lr-schedule", schedule)
    found = [rate_factor(config, step, LAST) for step in range(LAST + 3)]
    assert found[:WARMUP] == [0.25, 0.5, 0.75, 1.0] and found[WARMUP] == 1.0
    expected = [CLOSED_FORMS[schedule](step) for step in range(WARMUP, LAST + 1)]
    assert found[WARMUP : LAST + 1] == pytest.approx(expected, abs=1e-12)
    assert set(found[LAST:]) == ({1.0} if schedule == "constant" else {0.0})


def test_without_warmup_and_decay_the_rate_is_exactly_the_flag():
    config = settings()
    assert {rate_factor(config, step, LAST) for step in range(LAST)} == {1.0} and not varies(config)


def test_a_run_shorter_than_its_warmup_only_rises():
    config = settings("--warmup-steps", "10", "--lr-schedule", "cosine")
    assert [rate_factor(config, step, 3) for step in range(3)] == [0.1, 0.2, 0.3]


def test_rows_show_the_rate_only_if_it_varies_and_a_resumed_run_keeps_its_schedule(train_flags, capsys):
    flags = with_flags(train_flags, "--checkpointing-steps", "2", "--max-train-steps", "4")
    warm = ["--warmup-steps", "2", "--lr-schedule", "linear"]
    run = run_training([*flags, *warm])
    assert [row["lr"] for row in read_rows(run)] == pytest.approx([0.0005, 0.001, 0.001, 0.0005])
    assert "learning rate 0.001, linear after 2 warm-up steps, EMA decay" in capsys.readouterr().out
    again = [*flags, "--resume-step", "2"]
    assert [row["lr"] for row in read_rows(run_training(again))][2:] == pytest.approx([0.001, 0.0005])
    said = capsys.readouterr().out
    assert "note: the number of warm-up steps is 2, that of the checkpoint; --warmup-steps changes it" in said
    assert "note: the schedule of the learning rate is linear, that of the checkpoint; --lr-schedule changes" in said
    run_training([*again, "--max-train-steps", "6"])
    said = capsys.readouterr().out
    assert (
        "the linear decay of the learning rate ends with the run, which now has --max-train-steps 6, before 4" in said
    )
    assert read_rows(run)[-1]["lr"] == pytest.approx(0.00025)
    run_training([*again, "--lr-schedule", "constant", "--warmup-steps", "0"])
    said = capsys.readouterr().out
    assert (
        "note: the schedule of the learning rate is constant from step 3, as --lr-schedule says; before linear" in said
    )
    assert ["lr" in row for row in read_rows(run)] == [True, True, False, False]
    assert [(line["warmup_steps"], line["lr_schedule"]) for line in starts(run)[:3]] == [(2, "linear")] * 3
    assert "lr_schedule" not in starts(run)[3]
    group = load_checkpoint(run / "checkpoints" / "0000004.pt")["opt"]["param_groups"][0]
    assert group["lr"] == 0.001


@pytest.mark.parametrize(("name", "value"), [("warmup_steps", "2"), ("warmup_steps", -1), ("lr_schedule", "step")])
def test_a_checkpoint_with_a_schedule_that_no_run_has_is_damaged(train_flags, name, value):
    flags = with_flags(train_flags, "--max-train-steps", "1")
    path = run_training(flags) / "checkpoints" / "0000001.pt"
    content = load_checkpoint(path)
    setattr(content["args"], name, value)
    save_checkpoint(path, content)
    with pytest.raises(InputError, match=rf"0000001\.pt: cannot be resumed: its .*{name.replace('_', '-')}.*{value}"):
        run_training([*flags, "--resume-step", "1", "--max-train-steps", "2"])


def test_a_checkpoint_of_before_the_schedule_has_a_constant_rate(said):
    groups = [{"lr": 1e-4}]
    checkpoint = {"args": {"learning_rate": 1e-4}, "opt": {"param_groups": groups}, "steps": 7}
    config = choose_rates(settings("--lr-schedule", "cosine"), checkpoint, None)
    assert config.lr_schedule == "cosine"
    assert any("is cosine from step 8, as --lr-schedule says; before constant" in line for line in said)
