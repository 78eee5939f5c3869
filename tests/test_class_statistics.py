"""Training on standardised class tokens, and the statistics that it reads."""

import json
import shutil

import numpy as np
import pytest
import torch

import train
from common.errors import InputError
from common.io import read_json
from models.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import ENCODER, reset_accelerate, run_generate, run_training
from tests.option_matrix import linked_data, write_statistics
from tests.test_sync import Waits
from tests.test_sync import start as start_with_batches
from tests.test_train import with_flags
from training.class_statistics import ClassStatistics, read_class_statistics
from training.config import parse_args
from training.summary import network

DIGEST = "ab" * 32
ENCODER_X = {"name": "x", "weights": DIGEST}


def write(folder, content):
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    (folder / "tokens" / "dataset.json").write_text(json.dumps(content))


def read(folder, encoder="x"):
    return read_class_statistics(folder, "tokens", encoder, DIGEST, 3)


def valid(**cls_token):
    return {"encoder": ENCODER_X, "cls_token": {"mean": [0, 1.5, -2], "std": [1, 0.5, 2.0], **cls_token}}


def test_the_statistics_of_a_folder_and_of_a_zip(tmp_path):
    write(tmp_path, valid())
    found = read(tmp_path)
    assert found.mean.tolist() == [0, 1.5, -2] and found.std.tolist() == [1, 0.5, 2]
    assert found.mean.dtype == found.std.dtype == torch.float32
    shutil.make_archive(str(tmp_path / "tokens"), "zip", tmp_path / "tokens")
    with pytest.raises(InputError, match=r"expected one folder or \.zip .* found tokens and tokens\.zip"):
        read(tmp_path)
    shutil.rmtree(tmp_path / "tokens")
    again = read(tmp_path)
    assert again.digest() == found.digest() and len(found.digest()) == 64
    assert ClassStatistics(found.mean, found.std + 1e-6).digest() != found.digest()


def test_constant_channels_are_divided_by_one(tmp_path):
    write(tmp_path, valid(mean=[0, 3, 60000], std=[0, 1e-7, 0.05]))
    assert read(tmp_path).std.tolist() == [1, 1, 1]
    write(tmp_path, valid(mean=[0, 3, 60000], std=[1e-5, 1e-3, 1.0]))
    assert read(tmp_path).std.tolist() == pytest.approx([1e-5, 1e-3, 1.0])


def test_the_name_of_the_encoder_has_its_options(tmp_path):
    write(tmp_path, {**valid(), "encoder": {**ENCODER_X, "name": "webssl-dino300m:tokens=before-norm"}})
    read(tmp_path, "webssl-dino300m:tokens=before-norm")


BAD = {
    "no encoder": ({"cls_token": {}}, r'encoder is None; expected \{"name": \.\.\., "weights": \.\.\.\}'),
    "encoder list": ({**valid(), "encoder": ["x"]}, r"encoder is \['x'\]; expected"),
    "encoder name": ({**valid(), "encoder": {"name": 5}}, r"encoder is \{'name': 5\}; expected"),
    "other encoder": (
        {**valid(), "encoder": {**ENCODER_X, "name": "y"}},
        "the statistics of encoder 'y'; the class token of this run is that of x",
    ),
    "other weights": (
        {**valid(), "encoder": {"name": "x", "weights": "cd" * 32}},
        "the statistics of encoder x with other weights than those of this run",
    ),
    "no weights": ({**valid(), "encoder": {"name": "x"}}, "the statistics of encoder x with other weights"),
    "missing": ({"encoder": ENCODER_X}, r'cls_token is None; expected \{"mean": \[\.\.\.\], "std": \[\.\.\.\]\}'),
    "list": ({"encoder": ENCODER_X, "cls_token": [1, 2, 3]}, r"cls_token is \[1, 2, 3\]; expected"),
    "no std": (valid(std=None), "std of cls_token is None; expected 3, one for"),
    "short": (valid(mean=[0, 0]), "mean of cls_token has 2 numbers; expected 3, one for each channel"),
    "long": (valid(std=[1] * 4), "std of cls_token has 4 numbers; expected 3"),
    "negative": (
        valid(std=[1, -0.5, 1]),
        r"std of cls_token has -0\.5 for channel 1; expected a number from 0 to 65504",
    ),
    "huge": (valid(mean=[0, 0, 1e300]), r"mean of cls_token has 1e\+300 for channel 2; expected a number from -65504"),
    "very long": (valid(std=[10**400, 1, 1]), "std of cls_token has 1000.* for channel 0; expected"),
    "text": (valid(mean=["0", 0, 0]), "mean of cls_token has '0' for channel 0"),
    "truth": (valid(std=[1, True, 1]), "std of cls_token has True for channel 1"),
    "null": (valid(std=[1, 1, None]), "std of cls_token has None for channel 2"),
    "nested": (valid(std=[1, [1], 1]), r"std of cls_token has \[1\] for channel 1"),
}


@pytest.mark.parametrize(("content", "text"), BAD.values(), ids=BAD)
def test_impossible_statistics_are_named(tmp_path, content, text):
    write(tmp_path, content)
    with pytest.raises(InputError, match=rf"tokens/dataset\.json: {text}"):
        read(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    write(tmp_path, valid())
    file = tmp_path / "tokens" / "dataset.json"
    file.write_text(file.read_text().replace("1.5", number))
    with pytest.raises(InputError, match=rf"dataset\.json: not valid JSON: the number {number} is not finite"):
        read(tmp_path)


def test_a_folder_without_statistics_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--standardize-cls tokens: expected one folder .*; found none; .*encode_tok"):
        read(tmp_path)
    (tmp_path / "tokens").mkdir()
    with pytest.raises(InputError, match=r"dataset\.json: encoder is None"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../tokens", " ", ".", "a/b"])
def test_the_flag_is_a_name(name):
    with pytest.raises(InputError, match=r"--standardize-cls .*: must be a name, without a path"):
        parse_args(["--exp-name", "x", "--standardize-cls", name])


@pytest.fixture
def flags(train_flags, shared_data, encoder_weights, tmp_path):
    data = write_statistics(linked_data(shared_data, tmp_path / "data"), ENCODER, encoder_weights)
    return with_flags(train_flags, "--data-dir", str(data), "--checkpointing-steps", "2", "--no-background-save")


def start(flags, *more):
    reset_accelerate()
    return train.set_up(train.parse_args([*flags, *more]))


ON = ("--standardize-cls", "tokens")


def test_the_target_has_mean_zero_and_variance_one_and_the_alignment_is_unchanged(flags):
    plain, run = start(flags, "--exp-name", "plain"), start(flags, *ON)
    images = torch.stack([run.data.image(i) for i in range(len(run.data))]).to(run.accelerator.device)
    x = torch.zeros(len(images), 3, 16, 16, device=run.accelerator.device)
    expected, found = train.encode_tokens(plain, [images], x), train.encode_tokens(run, [images], x)
    assert found.cls_token.dtype == torch.float32
    assert found.cls_token.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(found.cls_token.var(0, correction=0), torch.ones_like(found.cls_token[0]))
    assert expected.cls_token.var(0, correction=0).sub(1).abs().max() > 0.1
    torch.testing.assert_close(run.ema.cls_scale.restore(found.cls_token), expected.cls_token)
    assert torch.equal(found.encoder_tokens[0], expected.encoder_tokens[0])
    for network_of_run in (run.ema, run.accelerator.unwrap_model(run.model)):
        assert torch.equal(network_of_run.cls_scale.mean.cpu(), run.facts.cls_statistics.mean)
    assert "class slot (--entangle class, standardised by tokens)" in network(run)
    assert "standardised" not in network(plain)


def test_a_step_reads_nothing_from_the_device(flags):
    run, batches = start_with_batches([*flags, *ON])
    with Waits() as waits:
        train.training_step(run, batches)
    assert waits.found == []


def test_generated_tokens_are_in_the_units_of_the_encoder(flags, tmp_path, monkeypatch):
    """Untrained, the network's velocity is 0: generated tokens are noise with the encoder's mean and deviation."""
    run = run_training([*flags, *ON, "--learning-rate", "1e-12", "--max-train-steps", "1"])
    checkpoint = load_checkpoint(run / "checkpoints" / "0000001.pt")
    assert checkpoint["network"]["standardized_cls"] is True and checkpoint["args"].standardize_cls == "tokens"
    options = ["--ckpt", str(run), "--sample-dir", str(tmp_path), "--name", "set", "--num-fid-samples", "64"]
    options += ["--mode", "ode", "--num-steps", "1", "--device", "cpu", "--save-cls"]
    run_generate(options, monkeypatch)
    tokens = np.concatenate([np.load(file) for file in sorted((tmp_path / "set").rglob("*.npy"))])
    recorded = read_json(tmp_path / "data" / "tokens" / "dataset.json")["cls_token"]
    mean, std = np.array(recorded["mean"]), np.array(recorded["std"])
    assert tokens.shape == (64, 32)
    assert np.abs((tokens.mean(0) - mean) / std).max() < 5 / 8
    assert np.abs(tokens.std(0) / std - 1).max() < 0.5


def test_a_run_keeps_its_statistics(flags, tmp_path):
    run = run_training([*flags, *ON])
    again = [*flags, "--resume-step", "2"]
    folder = tmp_path / "data" / "tokens"
    shutil.copytree(folder, folder.with_name("renamed"))
    assert start(again, "--standardize-cls", "renamed", "--dry-run").step == 2  # another name of the same statistics

    entry = read_json(folder / "dataset.json")
    entry["cls_token"]["std"][3] *= 1.01
    (folder / "dataset.json").write_text(json.dumps(entry))
    text = "--standardize-cls tokens: these are not the statistics of the class token .*--allow-changed-data"
    with pytest.raises(InputError, match=text):
        start(again, *ON)
    with pytest.raises(InputError, match=r"its network has standardized_cls True; by the flags it is False"):
        start(again)

    changed = start(again, *ON, "--allow-changed-data")  # continues with those of the checkpoint
    saved = load_checkpoint(run / "checkpoints" / "0000002.pt")["model"]["cls_scale.std"]
    assert torch.equal(changed.ema.cls_scale.std.cpu(), saved)
    noted = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert noted["changed"] == ["cls_digest"]


def test_a_run_without_statistics_is_not_resumed_with_them(flags):
    run_training(flags)
    with pytest.raises(InputError, match=r"its network has standardized_cls False; by the flags it is True"):
        start(flags, *ON, "--resume-step", "2")


def test_a_damaged_checkpoint_is_not_resumed(flags):
    run = run_training([*flags, *ON])
    file = run / "checkpoints" / "0000004.pt"
    saved = load_checkpoint(file)
    saved["model"]["cls_scale.std"] = -saved["model"]["cls_scale.std"]
    save_checkpoint(file, saved)
    with pytest.raises(InputError, match=r"0000004\.pt: model: cls_scale\.std contains -.*; expected numbers above 0"):
        start(flags, *ON, "--resume-step", "4")
