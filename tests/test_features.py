"""Cached features belong to the images, the network and its settings; another file is never used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from common.errors import InputError
from evaluations import features
from evaluations.batches import open_images
from evaluations.features import Extraction, ExtractionConfig, Extractor, fingerprint
from evaluations.metrics import FeatureSums, InceptionScoreSums
from models.encoders import untrained_encoder
from tests.conftest import ENCODER, reset_accelerate

KEY = "0" * 64


def extraction(count: int = 4, seed: int = 0, keep: bool = False) -> Extraction:
    """Return the sums of random features of `count` images, 0: an empty one for 4 images."""
    found = Extraction({"cls": FeatureSums(3), "score": InceptionScoreSums(4, 5)}, keep)
    if count:
        torch.manual_seed(seed)
        found.parts["cls"].update(torch.randn(count, 3))
        found.parts["score"].update(torch.randn(count, 5), 0)
        found.kept = [torch.randn(count, 2048)]
    return found


def test_saved_features_are_loaded(tmp_path: Path) -> None:
    saved, loaded = extraction(keep=True), extraction(0, keep=True)
    saved.save(tmp_path / "c.npz", KEY)
    assert loaded.load(tmp_path / "c.npz", 4, KEY) and torch.equal(loaded.features(), saved.features())
    for name, value in saved.parts.state_dict().items():
        assert torch.equal(loaded.parts.state_dict()[name], value)
    extraction().save(tmp_path / "without.npz", KEY)
    assert not extraction(0, keep=True).load(tmp_path / "without.npz", 4, KEY)
    assert not extraction(0).load(tmp_path / "missing.npz", 4, KEY)


def test_other_or_damaged_features_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    extraction().save(path, KEY)
    complete = path.read_bytes()
    assert extraction(0).load(path, 4, KEY)
    assert not extraction(0).load(path, 4, "1" * 64) and not extraction(0).load(path, 5, KEY)
    damaged = bytearray(complete)
    damaged[complete.index(b"cls.products") + 170] ^= 1
    for content in (damaged, complete[:-30], b""):
        path.write_bytes(content)
        assert not extraction(0).load(path, 4, KEY)


def test_a_fingerprint_follows_all_that_decides_the_features() -> None:
    def fingerprint_of(options: str = "", resolution: int = 16) -> str:
        torch.manual_seed(0)
        return fingerprint(untrained_encoder(ENCODER + options, resolution))

    default = fingerprint_of()
    assert fingerprint_of() == default
    assert len({default, fingerprint_of(":mean=0.25"), fingerprint_of(":tokens=before-norm")}) == 3
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(layer.state_dict())
    assert fingerprint(layer) == fingerprint(other)
    other.bias.data[0] += 1e-6
    assert fingerprint(layer) != fingerprint(other)


class Pixels(nn.Module):
    """An encoder whose class token depends on its input size, which is in no parameter."""

    width = 3

    def __init__(self, input_size: int):
        super().__init__()
        self.input_size = input_size

    def forward(self, images: torch.Tensor) -> features.EncoderOutput:
        small = nn.functional.interpolate(images.float(), (self.input_size, self.input_size))
        return features.EncoderOutput(small.flatten(2).std(2), small)


@pytest.fixture
def extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that returns the mean of an encoder's tokens, with a common cache."""
    monkeypatch.setattr(features, "load_inception", lambda *_: nn.Identity())
    monkeypatch.setattr(features, "load_encoder", lambda spec, resolution, *_: Pixels(resolution))
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))

    def run(resolution: int = 8, path: str = "s.npz") -> torch.Tensor:
        reset_accelerate()
        config = ExtractionConfig(encoder="pixels", cpu=True)
        with Extractor(Accelerator(cpu=True), config, resolution, str(tmp_path / "cache")) as extractor:
            return extractor.encoder_features(open_images(tmp_path / path)).parts["cls"].total

    return run


def test_a_cache_of_another_input_size_is_not_used(extract, monkeypatch: pytest.MonkeyPatch) -> None:
    at_8, at_4 = extract(8), extract(4)
    assert not torch.equal(at_8, at_4)
    monkeypatch.setattr(Pixels, "forward", None)  # from the cache now
    assert torch.equal(extract(8), at_8) and torch.equal(extract(4), at_4)


def test_damaged_samples_have_no_features(extract, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[-3000] ^= 1  # not in the part that is read with the header
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"s\.npz: 'arr_0' is damaged: its checksum does not match"):
        extract()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_images_that_change_meanwhile_have_no_features(extract, tmp_path: Path, monkeypatch, kind: str) -> None:
    path = tmp_path / "s.npz"
    if kind == "folder":
        path = tmp_path / "images/1.png"
        path.parent.mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, 0, 9)).save(path.with_name(f"{number}.png"))

    def change_and_run(self: Pixels, images: torch.Tensor) -> features.EncoderOutput:
        path.write_bytes(path.read_bytes())  # the same bytes, written again
        return forward(self, images)

    forward = Pixels.forward
    monkeypatch.setattr(Pixels, "forward", change_and_run)
    with pytest.raises(InputError, match="was replaced or changed while it was read"):
        extract(path="s.npz" if kind == "npz" else "images")


def test_the_digest_of_an_encoder_is_that_of_the_loaded_file(
    extract, tmp_path: Path, monkeypatch, encoder_weights: Path
) -> None:
    weights = tmp_path / "encoder.safetensors"
    weights.write_bytes(encoder_weights.read_bytes())

    def load_and_replace(spec: str, resolution: int, *_: object) -> Pixels:
        weights.write_bytes(weights.read_bytes()[:-1])
        return Pixels(resolution)

    monkeypatch.setattr(features, "load_encoder", load_and_replace)
    config = ExtractionConfig(encoder="pixels", enc_weights=str(weights), cpu=True)
    reset_accelerate()
    with pytest.raises(InputError, match=r"encoder\.safetensors: was replaced or changed"):
        Extractor(Accelerator(cpu=True), config, 8)
