import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from common.images import save_png
from common.io import write_json
from experiments import digits
from experiments.judge import load_images
from models.encoders import load_encoder


def write_samples(folder, pixels, labels):
    names = [f"{number}.png" for number in range(len(pixels))]
    for name, image in zip(names, pixels, strict=True):
        save_png(folder / "images" / name, Image.fromarray(image))
    write_json(
        folder / "images" / "dataset.json", {"labels": [[n, int(y)] for n, y in zip(names, labels, strict=True)]}
    )
    return folder


def test_the_two_halves_are_different_digits_of_all_classes(tmp_path):
    (scans, labels), (held_out, held_out_labels) = digits.load_halves()
    assert len(scans) + len(held_out) == 1797 and set(labels) == set(held_out_labels) == set(range(10))
    digits.main(["images", "--dest", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*.png"))) == len(scans)
    assert np.array_equal(np.array(Image.open(tmp_path / str(labels[3]) / "0003.png")), scans[3])


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="reading the digits: needs the package scikit-learn"):
        digits.write_images(tmp_path)


def test_the_encoder_is_read_by_its_description(tmp_path, monkeypatch):
    halves = [(scans[:200], labels[:200]) for scans, labels in digits.load_halves()]
    monkeypatch.setattr(digits, "load_halves", lambda: halves)
    digits.main(["encoder", "--dest", str(tmp_path / "encoder.safetensors"), "--steps", "2"])
    encoder = load_encoder(digits.ENCODER_SPEC, digits.RESOLUTION, tmp_path / "encoder.safetensors")
    assert (encoder.num_tokens, encoder.width) == (16, 96)


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "command '': allowed: images, encoder, encoder-spec"), (["encoder"], "the command encoder requires --dest")],
)
def test_commands_are_checked(flags, message):
    with pytest.raises(InputError, match=message):
        digits.main(flags)


def test_images_are_read_in_the_order_of_their_labels_and_faults_are_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    folder = write_samples(tmp_path, pixels, [2, 0, 1]) / "images"
    images, labels = load_images(folder)
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2)) and labels.tolist() == [2, 0, 1]
    with pytest.raises(InputError, match=r"0\.png: 16 x 16 pixels; allowed: 1 to 8 per side"):
        load_images(folder, 8)
    write_json(folder / "dataset.json", {})
    with pytest.raises(InputError, match=r"no dataset\.json with labels"):
        load_images(folder)
