"""Names and labels of data sets, and what stands in them by mistake: named before training, and by both readers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.io import InputError
from common.sources import IMAGE_NAME, LATENT_NAME, FileSource, image_name, latents_name, mirrored_name
from dataset import LatentDataset
from models.autoencoder import LatentFormat
from preprocessing.listing import list_converted
from tests.test_crops import header_only_png


def test_names_are_read_as_they_are_written():
    assert image_name(1234) == "00001/img00001234.png"
    assert IMAGE_NAME.fullmatch(image_name(1234))[1] == LATENT_NAME.fullmatch(latents_name(1234))[1] == "00001234"
    assert mirrored_name("img-mean-std-/img-mean-std-00000003.npy") == "img-mean-std-/img-mean-std-flip-00000003.npy"
    assert not LATENT_NAME.fullmatch(mirrored_name(latents_name(1234)))


def describe(data, where, **fields):
    path = data / where / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, "labels is 5; expected a list"),
        ({"00000/img00000000.png": 0}, "labels is {'00000/img"),
        ([5], "label entry 5; expected"),
        ([["00000/img00000000.png", 1, 2]], "label entry .*; expected"),
        ([["00000/img00000000.png", 10**30]], f"has label {10**30}; allowed: whole numbers from 0 to 9,999,999"),
        ([["00000/img00000000.png", 10**9]], "has label 1000000000; allowed"),
        ([["00000/img00000000.png", True]], "has label True; allowed"),
    ],
)
def test_labels_that_cannot_be(labels, message, data):
    describe(data, "images", labels=labels)
    with pytest.raises(InputError, match=rf"images/dataset\.json: .*{message}"):
        LatentDataset(data)
    with pytest.raises(InputError, match=rf"images/dataset\.json: .*{message}"):
        list_converted(FileSource(data / "images"))


def test_two_labels_of_one_index(data):
    describe(data, "vae-sd", labels=[["00000/img-mean-std-00000000.npy", 0], ["00001/img-mean-std-00000000.npy", 1]])
    with pytest.raises(InputError, match="index 0 has labels 0 and 1"):
        LatentDataset(data)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            ("scale", value, "scale has the value")
            for value in (None, "1", [[1]] * 3, 0, float("nan"), True, [10**400] * 3)
        ],
        *[("shift", value, "shift has the value") for value in (["0"] * 3, None, float("inf"))],
        ("codec", 5, "codec must be a name"),
    ],
)
def test_latent_formats_that_cannot_be(field, value, message):
    fields = {"codec": "pixel", "channels": 3, "factor": 1, "scale": 1.0, "shift": 0.0}
    with pytest.raises(InputError, match=message):
        LatentFormat.from_json({**fields, field: value})


def test_files_that_are_something_else(data):
    def save_npz(path):
        np.savez(path.with_suffix(".npz"), np.zeros((6, 16, 16), np.float32))
        path.with_suffix(".npz").rename(path)

    def break_header(path):
        path.write_bytes(path.read_bytes().replace(b"'shape': (6,", b"'shape': ((,"))  # numpy: TokenError

    for spoil in (save_npz, break_header):
        spoil(data / "vae-sd" / latents_name(5))
        with pytest.raises(InputError, match=r"img-mean-std-00000005\.npy: broken latents"):
            LatentDataset(data)[5]
        np.save(data / "vae-sd" / latents_name(5), np.zeros((6, 16, 16), np.float32))
    (data / "images" / image_name(5)).write_bytes(header_only_png(30_000, 30_000))
    with pytest.raises(InputError, match=r"img00000005\.png: broken image \(.*decompression bomb"):
        LatentDataset(data)[5]
