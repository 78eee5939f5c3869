"""What a run says at its start."""

from types import SimpleNamespace

import pytest

from training.summary import averages


def notes(decay, last_step, step=0, init_from=None):
    return averages(SimpleNamespace(step=step, config=SimpleNamespace(ema_decay=decay, init_from=init_from)), last_step)


@pytest.mark.parametrize(
    "decay, last_step, share, advice",
    [(0.9999, 60, "99%", 0.92), (0.9999, 10_000, "37%", 0.9995), (0.9999, 1, "100%", 0.5)],
)
def test_a_run_that_is_short_for_its_ema_decay_is_told_a_smaller_one(decay, last_step, share, advice):
    (note,) = notes(decay, last_step)
    assert f"at step {last_step}, {share} of" in note and note.endswith(f"use about {advice:g}")
    assert not notes(advice, last_step) or last_step == 1


def test_runs_that_are_long_enough_or_do_not_start_from_scratch_have_no_such_note():
    assert not notes(0.9999, 400_000) and not notes(0, 1)
    assert not notes(0.9999, 60, step=30) and not notes(0.9999, 60, init_from="0400000.pt")
