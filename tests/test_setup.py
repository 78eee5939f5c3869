"""What a start of training checks, says and takes: the codec, the learning rate, the folder; dry runs and trials."""

import json
import os
import re

import numpy as np
import pytest
import torch

import train
from common.errors import InputError
from common.io import read_json
from models.checkpoint import load_checkpoint
from tests.conftest import read_rows, reset_accelerate, run_training
from tests.processes import Training
from tests.test_train import terms, with_flags
from training.config import DERIVED, RECORDED, parse_args
from training.limits import USABLE_SHARE
from training.setup import set_up


def start(flags):
    """Set up a run inside this process without training."""
    reset_accelerate()
    return set_up(parse_args(flags))


def without(flags, name):
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2 :]]


def no_codec(*_):
    raise InputError("codec sd-vae-ft-ema: the hub cannot be reached")


def test_a_codec_that_cannot_be_loaded_ends_the_start_only_if_a_flag_asks_for_it(train_flags, monkeypatch, capsys):
    monkeypatch.setattr("training.setup.load_decoder", no_codec)
    plain = with_flags(without(train_flags, "--sampling-steps"))
    run = run_training([*plain, "--max-train-steps", "1"])
    assert (
        "warning: there will be no sample grids, because the codec cannot be loaded: codec sd"
        in capsys.readouterr().err
    )
    assert not (run / "samples").exists()
    for more in (["--sampling-steps", "10000"], ["--vae", "ema"]):
        with pytest.raises(InputError, match="the hub cannot be reached"):
            start([*plain, *more, "--exp-name", "other"])


def starts(run):
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def test_the_learning_rate_changes_on_resume_only_by_its_flag(train_flags, capsys):
    flags = with_flags(train_flags, "--checkpointing-steps", "2")
    run = run_training([*flags, "--max-train-steps", "2"])
    plain = with_flags(without(train_flags, "--learning-rate"), "--resume", "latest", "--max-train-steps", "3")
    run_training(plain)
    assert "note: the learning rate is 0.001, that of the checkpoint" in capsys.readouterr().out
    run_training([*plain, "--learning-rate", "1e-30", "--max-train-steps", "4"])
    assert (
        "note: the learning rate is 1e-30 from step 4, as --learning-rate says; before 0.001" in capsys.readouterr().out
    )
    assert [line["learning_rate"] for line in starts(run)] == [0.001, 0.001, 1e-30] and read_json(run / "args.json")[
        "learning_rate"
    ] == 1e-30
    third, fourth = (load_checkpoint(run / "checkpoints" / f"000000{step}.pt") for step in (3, 4))
    assert all(torch.allclose(value, fourth["model"][key], 0, 1e-25) for key, value in third["model"].items())
    undisturbed = run_training([*flags, "--exp-name", "undisturbed", "--max-train-steps", "3"])
    assert terms(undisturbed) == terms(run)[:3]


def test_a_dry_run_leaves_nothing(train_flags, tmp_path, capsys, monkeypatch):
    flags = with_flags(train_flags, "--dry-run", "--report-to", "tensorboard")
    for resumed in ([], ["--resume", "latest"]):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        reset_accelerate()
        monkeypatch.setattr("sys.argv", ["train.py", *flags, *resumed])
        train.main()
        said = capsys.readouterr().out
        assert "  data     " in said and "dry run: 2 steps of 8 images done; the first took" in said
        assert re.search(r"  memory +estimated 0\.0 GB on each process: weights, .*activations 0\.0 GB\n", said)
        assert re.search(r"; peak memory [\d.]+ GB, estimated 0\.0 GB; nothing was written to ", said)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert bool(resumed) == (tmp_path / "exps").exists()
        run_training(with_flags(train_flags, "--resume", "latest"))


def test_a_dry_run_checks_the_folder(train_flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output-dir .*file is not a writable folder"):
        start(with_flags(train_flags, "--dry-run", "--output-dir", str(tmp_path / "file")))


def test_a_trial_takes_equally_many_images_of_each_class_and_stays_one(train_flags):
    flags = with_flags(train_flags, "--max-images", "7")
    run = start(flags)
    assert len(run.data) == 7 and sorted(run.data.labels.tolist()) == [0, 0, 0, 1, 1, 2, 2]
    assert run.data.latent_path(3).endswith("img-mean-std-00000003.npy") and run.facts.network.num_classes == 3
    folder = run_training(flags)
    assert read_json(folder / "args.json")["max_images"] == 7
    assert read_rows(folder)[-1]["epoch"] == pytest.approx(4 * 8 / 7)
    with pytest.raises(InputError, match=r"--max-images is 8, but .* was started with 7"):
        start([*flags, "--resume", "latest", "--max-images", "8"])
    with pytest.raises(InputError, match=r"--max-images is all, but .* was started with 7"):
        start(with_flags(train_flags, "--resume", "latest"))


def test_a_trial_with_fewer_images_than_classes_knows_which_classes_it_has(train_flags):
    data = start(with_flags(train_flags, "--max-images", "2")).data
    assert data.classes.labels == (0, 1) and data.num_classes == 3


def test_a_start_that_left_no_row_is_repeated_with_other_settings(train_flags, capsys):
    run = start(with_flags(train_flags))
    assert read_json(run.folder / "args.json")["seed"] == 0
    for flags in (["--seed", "1"], ["--seed", "2", "--resume", "latest"]):
        start(with_flags(train_flags, *flags))
        assert "ended before its first row; its args.json is replaced" in capsys.readouterr().out
        assert read_json(run.folder / "args.json")["seed"] == int(flags[1])


def test_a_run_with_rows_and_no_checkpoint_keeps_its_settings(train_flags):
    run = run_training(with_flags(train_flags))
    (run / "checkpoints" / "0000004.pt").unlink()
    with pytest.raises(InputError, match="already holds a run"):
        start(with_flags(train_flags, "--seed", "1"))
    with pytest.raises(InputError, match=r"--seed is 1, but .* was started with 0"):
        start(with_flags(train_flags, "--seed", "1", "--resume", "latest"))
    (run / "args.json").unlink()
    start(with_flags(train_flags, "--seed", "1", "--resume", "latest"))


def test_an_indivisible_batch_takes_no_folder(train_flags, tmp_path):
    with pytest.raises(InputError, match=r"--batch-size 8 .* is not divisible"):
        start(with_flags(train_flags, "--gradient-accumulation-steps", "3"))
    assert not (tmp_path / "exps").exists()


def test_legacy_is_refused_on_a_new_run_and_checked_on_resume(train_flags):
    for more in ([], ["--resume", "latest"]):
        with pytest.raises(InputError, match=r"--legacy: the published switch.*--cfg-prob 0\.19"):
            start(with_flags(train_flags, "--legacy", *more))
    run_training(with_flags(train_flags, "--no-legacy"))
    for more in (["--resume", "latest"], ["--resume-step", "4"]):
        with pytest.raises(InputError, match=r"--legacy True, but .*0000004\.pt has legacy layout False"):
            start(with_flags(train_flags, "--legacy", *more))


def test_flags_with_another_meaning_than_published_are_told(train_flags, capsys):
    start(with_flags(train_flags, "--gradient-accumulation-steps", "2", "--ops-head", "16"))
    text = capsys.readouterr().out
    assert (
        "takes 8 images in total, 2 micro-batches on each process; the published program would take 8 x 2 = 16" in text
    )
    assert "--ops-head 16 is accepted and ignored" in text


def test_args_json_of_a_run_starts_another_run(train_flags, tmp_path):
    run = run_training(with_flags(train_flags, "--seed", "3"))
    content = read_json(run / "args.json")
    assert {"resolution", "num_classes", "entangle", "cls_token", "mixed_precision"} <= set(content[DERIVED])
    assert not {"depth", "seed", "encoder_depth"} & set(content[DERIVED])
    assert content.keys() >= RECORDED - {"encoder_digests"}  # of several encoders only
    file = ["--config", str(run / "args.json")]
    with pytest.raises(InputError, match="--exp-name is required"):
        parse_args(file)
    again = run_training([*file, "--exp-name", "again"])
    assert terms(again) == terms(run)
    config = parse_args([*file, "--exp-name", "other", "--model", "SiT-B/2", "--no-cls-token"])
    assert (config.model, config.num_classes, config.slot, config.seed, config.resume) == (
        "SiT-B/2",
        None,
        "none",
        3,
        None,
    )
    with pytest.raises(InputError, match="already holds a run"):
        run_training([*file, "--exp-name", "run"])


def test_a_file_of_settings_may_name_the_run(train_flags, tmp_path):
    (tmp_path / "a.json").write_text('{"exp_name": "x", "resume": "latest", "device": "cpu"}')
    config = parse_args(["--config", str(tmp_path / "a.json")])
    assert (config.exp_name, config.resume) == ("x", "latest")


@pytest.mark.parametrize(
    ("value", "flags", "precision"),
    [("bf16", [], "bf16"), ("bf16", ["--mixed-precision", "no"], "no"), ("no", [], "no")],
)
def test_accelerates_precision_counts_if_no_flag_is_given(monkeypatch, value, flags, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    assert parse_args(["--exp-name", "x", "--device", "cpu", *flags]).precision == precision


def test_a_batch_is_divided_to_fit_the_free_memory(train_flags, monkeypatch, capsys):
    """A resumed run keeps the number if it fits; a given number is taken; another run chooses its own."""
    plain = run_training(with_flags(train_flags, "--exp-name", "plain"))
    facts = start(with_flags(train_flags, "--dry-run")).facts
    assert facts.micro_batches == 1 and starts(plain)[0]["micro_batches"] == 1
    assert "estimated_memory" not in starts(plain)[0]  # of a run on the CPU
    monkeypatch.setattr("training.setup.free_memory", lambda device: free)

    free = facts.memory.total / USABLE_SHARE - 1
    flags = with_flags(train_flags, "--checkpointing-steps", "2")
    run = run_training([*flags, "--max-train-steps", "2"])
    said = capsys.readouterr().out
    assert "1 process x 4 samples x 2 accumulation steps = 8 samples per step, chosen to fit the memory" in said
    assert "published program would" not in said
    free = 10**12
    run_training([*flags, "--resume", "latest"])
    assert "note: 2 micro-batches, as before; 1 would fit" in capsys.readouterr().out
    assert [line["micro_batches"] for line in starts(run)] == [2, 2] and starts(run)[0]["estimated_memory"] > 10**5
    assert np.allclose(terms(run), terms(plain), rtol=1e-4, atol=1e-6)

    content = read_json(run / "args.json")
    assert content["gradient_accumulation_steps"] == 2 and "gradient_accumulation_steps" in content[DERIVED]
    free = 1
    given = start(with_flags(train_flags, "--exp-name", "given", "--gradient-accumulation-steps", "4"))
    assert given.facts.micro_batches == given.accelerator.gradient_accumulation_steps == 4
    assert "warning: a step in micro-batches of 2 takes" in capsys.readouterr().err


def differing_memory():
    """Let the second process have less memory than the first."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("training.setup.free_memory", lambda device: 1 if os.environ["RANK"] == "1" else 10**12)


def test_processes_divide_a_batch_equally(train_flags, tmp_path):
    flags = with_flags(train_flags)
    training = Training(flags, tmp_path / "output.txt", processes=2, prepare=differing_memory)
    assert training.wait() == 0, training.text()
    assert "2 processes x 1 samples x 4 accumulation steps = 8 samples per step" in training.text()
    assert starts(tmp_path / "exps" / "run")[0]["micro_batches"] == 4
