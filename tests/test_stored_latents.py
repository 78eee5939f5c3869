"""Latents of a data folder as moments or as one draw, in folders of any name, with and without a record."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch

from common.errors import InputError
from dataset import LatentDataset
from evaluations import coherence
from evaluations.coherence import CoherenceReport
from models.autoencoder import codec_format
from models.latent_format import SD_FORMAT, LatentFormat
from preprocessing import verify
from tests.conftest import ENCODER, NUM_CLASSES, RESOLUTION, run_training
from training.config import parse_args

INVAE = LatentFormat("e2e-invae", channels=32, factor=16, scale=0.3099)


def record(data, folder="vae-sd", **changes):
    """Change the record of the latents; None removes an entry."""
    path = data / folder / "dataset.json"
    table = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))


def store(data, shape):
    """Replace all latents by noise of this shape."""
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, np.random.default_rng(0).normal(size=shape).astype(np.float32))


@pytest.fixture
def draws(data):
    """A data set whose latents are one draw per image: the means, for the pixel codec."""
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, np.load(path)[:3])
    return data


@pytest.mark.parametrize("recorded", ["draw", None])
def test_draws_are_read_with_and_without_a_record(draws, shared_data, recorded):
    record(draws, latents=recorded)
    found, moments = LatentDataset(draws), LatentDataset(shared_data)
    assert (found.stored, found.stored_shape, moments.stored) == ("draw", (3, 16, 16), "moments")
    found.check()
    form, noise = found.latent_format, torch.randn(1, 3, 16, 16)
    assert torch.equal(form.sample(found[5][1][None], noise), form.sample(moments[5][1][None], noise))
    assert found.digest() != moments.digest()


def test_published_draws_need_the_codec_by_flag(data, monkeypatch):
    """32 channels can be a draw of a codec with 32 channels and moments of one with 16."""
    store(data, (32, 1, 1))
    record(data, codec=None)
    (data / "vae-sd").rename(data / "vae-in")
    advice = r"vae-in/dataset\.json names no codec: add it there, or name it by --latents-codec"
    allowed = r"shape \(32, 1, 1\); allowed for codec sd-vae-ft-mse: \(8, h, h\), moments"
    with pytest.raises(InputError, match=f"{allowed}; .*{advice}"):
        LatentDataset(data, latents_folder="vae-in")
    moments = LatentFormat("other", channels=16, factor=16, scale=0.5)
    monkeypatch.setattr("dataset.codec_format", {"e2e-invae": INVAE, "other": moments}.__getitem__)
    found = LatentDataset(data, latents_folder="vae-in", latents_codec="e2e-invae")
    assert (found.stored, found.latent_size, found.names_codec) == ("draw", 1, True)
    latents = found[3][1][None]
    torch.testing.assert_close(found.latent_format.sample(latents, None), latents * 0.3099)
    assert LatentDataset(data, latents_folder="vae-in", latents_codec="other").stored == "moments"
    record(data, "vae-in", codec=INVAE.to_json())
    monkeypatch.setattr("dataset.codec_format", None)  # the codec's files are not needed if dataset.json names it
    assert LatentDataset(data, latents_folder="vae-in", latents_codec="e2e-invae").latent_format == INVAE


@pytest.mark.parametrize(
    ("changes", "assumed", "message"),
    [
        ({"latents": "moments"}, None, r"shape \(3, 16, 16\); allowed for codec pixel: \(6, h, h\), moments$"),
        ({"latents": "both"}, None, r"dataset\.json: latents is 'both'; allowed: moments, draw"),
        ({}, SD_FORMAT, r"dataset\.json: the latents are of codec pixel, but --latents-codec is sd-vae-ft-mse"),
        ({"codec": None}, INVAE, r"shape \(3, 16, 16\); .* e2e-invae: \(64, h, h\), moments or \(32, h, h\), draw$"),
        ({"codec": None, "latents": "draw"}, None, r"codec sd-vae-ft-mse: \(4, h, h\), draw; .* names no codec"),
        ({"codec": None}, LatentFormat("x", 3, 1, None), "codec x has no statistics"),
        ({"codec": LatentFormat("x", 3, 1, None).to_json()}, None, r"dataset\.json: codec x: scale has the value null"),
    ],
)
def test_latents_that_fit_neither_are_refused(draws, changes, assumed, message):
    record(draws, **changes)
    with pytest.raises(InputError, match=message):
        LatentDataset(draws, latents_codec=assumed)


@pytest.mark.parametrize("folder", ["../vae-sd", "a\0b", "x" * 10_000, "vae-in", None])
def test_the_folder_that_a_checkpoint_names_is_used_only_if_the_data_have_it(data, folder):
    shutil.copytree(data / "vae-sd", data.parent / "vae-sd")
    assert coherence._open_data(data, {"latents_folder": folder}).latents.path == data / "vae-sd"


def test_folders_of_other_names(data, train_flags):
    shutil.move(data / "vae-sd", data / "vae-in")
    others = r"found none; folders of other names: vae-in; choose one by --latents-folder"
    with pytest.raises(InputError, match=rf"in one folder or \.zip of vae-sd, latents; {others}"):
        LatentDataset(data)
    with pytest.raises(InputError, match=rf"in one folder or \.zip of vae-xy; {others}"):
        verify.main([str(data), "--latents-folder", "vae-xy"])
    shutil.make_archive(str(data / "zipped"), "zip", data / "vae-in")
    folder, archive = (LatentDataset(data, latents_folder=name) for name in ("vae-in", "zipped"))
    assert folder.digest() == archive.digest() and archive.latents.is_zip
    with pytest.raises(InputError, match=r"--latents-folder \.\./data: must be a name, without a path"):
        parse_args(["--exp-name", "run", "--latents-folder", "../data"])
    flags = [*train_flags, "--data-dir", str(data), "--latents-folder", "vae-in", "--max-train-steps", "1"]
    args = json.loads((run_training([*flags, "--exp-name", "run"]) / "args.json").read_text())
    assert args["latents_folder"] == "vae-in" and args["codec"]["codec"] == "pixel"


def test_coherence_reads_the_folder_of_the_run(data, encoder_weights):
    settings = {"entangle": "class", "enc_type": ENCODER, "enc_weights": str(encoder_weights)}
    settings |= {"num_classes": NUM_CLASSES, "resolution": RESOLUTION, "latents_folder": "vae-in"}
    checkpoint = {"args": argparse.Namespace(**settings)}
    for name in ("vae-sd", "vae-in"):  # data of today's names are found as well
        (data / "vae-sd").rename(data / name)
        assert CoherenceReport(checkpoint, data).data.latents.path.name == name


def test_draws_are_verified(draws, capsys):
    verify.main([str(draws), "--workers", "1"])
    assert "mean inf dB" in capsys.readouterr().out  # the pixel codec is exact
    latents = draws / "vae-sd/00000/img-mean-std-00000003.npy"
    values = np.load(latents)
    values[0, 0, 0] = np.nan
    np.save(latents, values)
    with pytest.raises(InputError, match="number of errors"):
        verify.main([str(draws), "--workers", "1"])
    assert "img-mean-std-00000003.npy: has values that are not finite" in capsys.readouterr().err


def test_training_draws_equal_training_moments(draws, shared_data, train_flags):
    """The pixel codec has no variance: a draw is the mean."""
    rows = []
    for name, data in (("moments", shared_data), ("draw", draws)):
        run = run_training([*train_flags, "--data-dir", str(data), "--exp-name", name, "--max-train-steps", "2"])
        rows.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_the_codec_of_the_flag_is_read_from_its_config(tmp_path):
    from tests.test_factor_16 import save_codec

    with pytest.raises(InputError, match=r"no such file or folder; allowed: pixel, .*e2e-invae"):
        codec_format("nonsense")
    form = codec_format(str(save_codec(tmp_path)))
    assert (form.channels, form.factor, form.scale) == (32, 16, None)
