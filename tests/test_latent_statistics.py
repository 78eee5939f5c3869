"""Measured statistics of latents equal a plain computation, for any division of the work and after interruptions."""

import json
import zipfile

import numpy as np
import pytest
import torch

from common.errors import InputError
from dataset import LatentDataset
from models.autoencoder import load_codec
from models.latent_format import LatentFormat
from preprocessing import encode
from preprocessing.latent_statistics import measured_format, spread
from tests.conftest import contents
from tests.test_encode import make_images, run
from tests.test_factor_16 import save_codec


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory):
    """A codec of factor 16 with 32 channels, whose config.json has no scale."""
    return save_codec(tmp_path_factory.mktemp("codec"))


def record(folder):
    return json.loads((folder / "dataset.json").read_text())


def all_latents(data):
    return np.stack([data[i][1].numpy() for i in range(len(data))]).astype(np.float64)


def test_statistics_are_those_of_a_plain_computation(tmp_path, codec_folder):
    make_images(tmp_path / "images", resolution=32)
    run(tmp_path / "images", tmp_path / "vae-sd", codec_folder)
    data = LatentDataset(tmp_path)
    mean, std = np.split(all_latents(data), 2, axis=1)
    expected_mean = mean.mean(axis=(0, 2, 3))
    variance = (mean - expected_mean[:, None, None]).__pow__(2).mean(axis=(0, 2, 3)) + (std**2).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(data.latent_format.shift, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(data.latent_format.scale, 1 / np.sqrt(variance), rtol=1e-10)
    assert record(tmp_path / "vae-sd")["statistics_images"] == 7 and "latents" not in record(tmp_path / "vae-sd")
    noise = torch.randn(200, 7, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    moments = torch.tensor(all_latents(data), dtype=torch.float32)
    drawn = torch.stack([data.latent_format.sample(moments, one) for one in noise])
    assert drawn.mean(dim=(0, 1, 3, 4)).abs().max() < 0.05 and (drawn.std(dim=(0, 1, 3, 4)) - 1).abs().max() < 0.05


def test_statistics_of_draws_and_of_some_images(tmp_path, codec_folder):
    make_images(tmp_path / "images", resolution=32)
    flags = ("--store", "draw", "--statistics-images", 3)
    run(tmp_path / "images", tmp_path / "vae-sd", codec_folder, *flags)
    data = LatentDataset(tmp_path)
    assert data.stored == "draw" and data.stored_shape == (32, 2, 2) and spread(7, 3) == [0, 2, 4]
    chosen = all_latents(data)[[0, 2, 4]]
    np.testing.assert_allclose(data.latent_format.shift, chosen.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.latent_format.scale, 1 / chosen.std(axis=(0, 2, 3)), rtol=1e-10)
    assert record(tmp_path / "vae-sd") | {"statistics_images": 3, "latents": "draw"} == record(tmp_path / "vae-sd")


def test_a_draw_is_mean_plus_std_times_the_noise_of_the_image(tmp_path, codec_folder):
    """The noise depends on image and mirroring only, and training gets from both files the same latents."""
    make_images(tmp_path / "images", resolution=32)
    for store in ("moments", "draw"):
        run(tmp_path / "images", tmp_path / store, codec_folder, "--store", store, "--flip")
    moments, draws = (LatentDataset(tmp_path, True, store) for store in ("moments", "draw"))
    codec = load_codec(str(codec_folder))
    noises = []
    for i in range(14):
        mean, std = moments[i][1].chunk(2)
        batch = encode.Batch((f"00000/img{i % 7:08d}.png",), ("",), flip=i >= 7)
        noise = encode.draw(torch.cat([torch.zeros_like(mean), torch.ones_like(mean)])[None], batch)
        assert torch.equal(draws[i][1], (mean + std * noise[0]))
        stored = [torch.as_tensor(data[i][1])[None] for data in (moments, draws)]
        form = moments.latent_format
        assert torch.equal(form.sample(stored[0], noise), form.sample(stored[1], torch.zeros_like(noise)))
        noises.append(noise)
    assert len({noise.numpy().tobytes() for noise in noises}) == 14 and codec.format.scale is None
    assert abs(torch.cat(noises).std() - 1) < 0.1


@pytest.mark.parametrize("store", ["moments", "draw"])
def test_batches_and_an_interruption_change_nothing(tmp_path, monkeypatch, store):
    images, flags = make_images(tmp_path / "images"), ("--store", store, "--statistics-images", 5)
    run(images, tmp_path / "one", "pixel", *flags)
    run(images, tmp_path / "three", "pixel", "--batch-size", 3, *flags)
    written = []

    def save_some(*args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(args)
        return save(*args)

    save = encode.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode, "save", save_some)
        run(images, tmp_path / "again", "pixel", *flags)
    assert not (tmp_path / "again/dataset.json").exists()
    run(images, tmp_path / "again", "pixel", *flags)
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "again")
    run(images, tmp_path / "packed.zip", "pixel", *flags)
    with zipfile.ZipFile(tmp_path / "packed.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == contents(tmp_path / "one")


def test_what_is_refused(tmp_path, codec_folder):
    images = make_images(tmp_path / "images", 2, resolution=32)
    with pytest.raises(InputError, match=r"--statistics-images 0: codec .* has no scale and shift .*; allowed: from 1"):
        run(images, tmp_path / "out", codec_folder, "--statistics-images", 0)
    assert not (tmp_path / "out").exists()
    run(images, tmp_path / "out", "pixel")
    for flags, changed in ((("--store", "draw"), "store was None, is now 'draw'"),
                           (("--statistics-images", 2), "statistics_images was None, is now 2")):  # fmt: skip
        with pytest.raises(InputError, match=changed):
            run(images, tmp_path / "out", "pixel", *flags)
    run(images, tmp_path / "draw", "pixel", "--store", "draw")
    with pytest.raises(InputError, match="store was 'draw', is now None"):
        run(images, tmp_path / "draw", "pixel")


def test_a_constant_channel_has_no_scale():
    latents = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    latents[1] = 0.3
    with pytest.raises(InputError, match=r"codec some: the latents of 2 images have the same value .* in channel 1"):
        measured_format(LatentFormat("some", 3, 8, None), ["a", "b"], lambda name: latents, "draw")
