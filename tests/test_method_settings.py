"""Runs with a time shift, logit-normal times, a lead of the class token and contrastive flow matching."""

import json
import math

import numpy as np
import pytest

import train
from common.errors import InputError
from models.checkpoint import load_checkpoint
from samplers import Guidance, sample_images
from tests.conftest import read_rows, reset_accelerate, run_generate, run_training
from tests.test_sync import Waits
from tests.test_sync import start as start_with_batches
from tests.test_train import terms, with_flags
from training import sampling
from training.config import parse_args
from training.record import check_same_run

SHIFT = "1.4142135623730951"
TIMES = ["--weighting", "lognormal", "--time-mean", "-0.2", "--time-std", "0.8"]
OPTIONS = [*TIMES, "--cls-lead", "0.3", "--cfm-coeff", "0.05", "--time-shift"]
NAMES = ("loss", "denoise", "proj", "cls", "cfm", "grad_norm")


def start(flags):
    reset_accelerate()
    return train.set_up(train.parse_args(flags))


def test_the_total_of_a_row_subtracts_the_contrastive_term_and_parts_do_not_change_it(train_flags):
    flags = with_flags(train_flags, *OPTIONS, SHIFT, "--max-train-steps", "2")
    one = run_training([*flags, "--exp-name", "one"])
    parts = run_training([*flags, "--exp-name", "parts", "--gradient-accumulation-steps", "4"])
    np.testing.assert_allclose(terms(one, *NAMES), terms(parts, *NAMES), rtol=1e-5, atol=1e-6)
    rows = read_rows(one)
    assert all(row["cfm"] < 0 for row in rows) and (one / "loss.png").stat().st_size > 1000
    for row in rows:
        total = row["denoise"] + 0.5 * row["proj"] + 0.03 * row["cls"] + 0.05 * row["cfm"]
        assert row["loss"] == pytest.approx(total, abs=1e-5)


def test_the_shift_is_recorded_and_used_by_grids_scores_and_generated_images(train_flags, tmp_path, monkeypatch):
    run = start(with_flags(train_flags, "--time-shift", "auto"))
    network = run.facts.network
    shift = math.sqrt(network.in_channels * network.input_size**2 / 4096)
    asked = []
    monkeypatch.setattr(sampling, "sample_images", lambda *given, **more: asked.append(more["interpolant"]))
    sampling.draw_latents(run, run.ema, range(2), 2, Guidance())
    assert asked[0].time_shift == run.randomness.path.time_shift == shift != 1
    train.train(run)
    assert json.loads((run.folder / "args.json").read_text())["time_shift"] == shift
    path = run.folder / "checkpoints" / "0000004.pt"
    assert vars(load_checkpoint(path)["args"])["time_shift"] == shift

    used = []

    def sampler(model, labels, seeds, path, *more, **settings):
        used.append(path.time_shift)
        return sample_images(model, labels, seeds, path, *more, **settings)

    monkeypatch.setattr("generate.sample_images", sampler)
    flags = ["--ckpt", str(path), "--sample-dir", str(tmp_path / "samples"), "--num-fid-samples", "2"]
    flags += ["--num-steps", "2", "--device", "cpu"]
    run_generate([*flags, "--name", "a"], monkeypatch)
    run_generate([*flags, "--name", "b", "--time-shift", "auto"], monkeypatch)
    run_generate([*flags, "--name", "c", "--time-shift", "1"], monkeypatch)
    assert used == [shift, shift, 1]
    made = [np.load(tmp_path / "samples" / name / "samples.npz")["arr_0"] for name in "abc"]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])
    assert json.loads((tmp_path / "samples" / "a" / "samples.json").read_text())["time_shift"] == shift
    with pytest.raises(InputError, match=r"contains images made with --time-shift .*, not .*; choose another --name"):
        run_generate([*flags, "--name", "a", "--time-shift", "2"], monkeypatch)


def test_a_step_reads_nothing_from_the_device(train_flags):
    run, batches = start_with_batches([*train_flags, *OPTIONS, "auto"])
    with Waits() as waits:
        train.training_step(run, batches)
    assert waits.found == []


def test_runs_of_earlier_versions_had_none_of_the_options():
    options = {"time_shift": 2.0, "cfm_coeff": 0.05, "time_mean": 1.0, "time_std": 0.5, "align_stop_steps": 5}
    options |= {"cls_lead": 0.3, "norm": "rms", "rope": True, "sprint": True, "projector": "conv", "optimizer": "muon"}
    for setting, value in options.items():
        with pytest.raises(InputError, match=rf"--{setting.replace('_', '-')} is {value}, but run was started with"):
            check_same_run({setting: value}, {"codec": {}}, "run")
        check_same_run({setting: value}, {}, "published")  # published files do not show it
    check_same_run({"time_shift": 1.0, "cfm_coeff": 0.0, "time_mean": 0.0, "time_std": 1.0}, {"codec": {}}, "run")
    check_same_run({"time_shift": "auto"}, {"codec": {}, "time_shift": 2.0}, "run")  # compared with its value later


BAD = {
    "mean": (["--time-mean", "11"], "--time-mean 11.0: must be from -10 to 10"),
    "std": (["--time-std", "0"], "--time-std 0.0: must be greater than 0 and at most 10"),
    "uniform": (
        ["--time-std", "2"],
        "--time-std 2: has no effect without --weighting lognormal, and it is uniform; allowed: 1",
    ),
    "keep": (
        ["--sprint-keep", "0.5"],
        "--sprint-keep 0.5: has no effect without --sprint, and it is off; allowed: 0.25",
    ),
    "drop": (["--sprint-path-drop", "0"], "--sprint-path-drop 0: has no effect without --sprint"),
    "muon": (["--muon-learning-rate", "0.01"], "0.01: has no effect without --optimizer muon, and it is adamw"),
    "shift": (["--time-shift", "0"], "--time-shift 0.0: must be greater than 0 and at most 1000, or auto"),
    "word": (["--time-shift", "big"], "--time-shift: 'big' is not a finite number"),
    "nan": (["--time-shift", "nan"], "--time-shift: 'nan' is not a finite number"),
    "lead": (["--cls-lead", "1.5"], "--cls-lead 1.5: must be "),
    "lead without a token": (
        ["--cls-lead", "0.3", "--no-cls-token"],
        "--cls-lead 0.3: no token is denoised with --entangle none; allowed: --entangle class, patch-mean, latent-mean",
    ),
    "lead of a learned token": (
        ["--cls-lead", "0.3", "--entangle", "learnable"],
        "--cls-lead 0.3: no token is denoised with --entangle learnable",
    ),
    "cfm": (["--cfm-coeff", "-0.05"], "--cfm-coeff -0.05: must be 0 or greater"),
}


@pytest.mark.parametrize(("flags", "text"), BAD.values(), ids=BAD)
def test_impossible_flags_are_named(flags, text):
    with pytest.raises(InputError, match=text):
        parse_args(["--exp-name", "x", *flags])


def test_micro_batches_without_pairs_are_refused():
    config = parse_args(["--exp-name", "x", "--cfm-coeff", "0.1"])
    config.check_pairs(8, 2, 2)
    with pytest.raises(InputError, match="--batch-size 6 on 2 processes in --gradient-accumulation-steps 1 gives 3"):
        config.check_pairs(6, 2, 1)
    parse_args(["--exp-name", "x"]).check_pairs(6, 2, 1)


def test_the_start_names_times_and_terms(train_flags):
    from training.summary import loss

    plain, run = start(with_flags(train_flags)), start(with_flags(train_flags, *OPTIONS, SHIFT))
    assert loss(plain) == "1 denoise + 0.5 proj + 0.03 cls; linear path"
    assert loss(run) == (
        "1 denoise + 0.5 proj + 0.03 cls + 0.05 cfm; linear path, lognormal times (-0.2, 0.8), time shift 1.414, class "
        "token leads by 0.3"
    )
