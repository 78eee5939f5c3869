"""encode_tokens.py gives the same tokens for any number of processes and after interruptions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from models.cached_tokens import TokenFormat
from preprocessing import encode_tokens
from preprocessing.batches import Batch
from preprocessing.destination import Destination
from tests.conftest import ENCODER, RESOLUTION, contents, reset_accelerate, run_program, write_encoder

SHAPE = (17, 32)


def flags_of(data, weights, *flags, dest="tokens"):
    place = ["--source", data / "images", "--dest", data / dest, "--enc-type", ENCODER, "--enc-weights", weights]
    return [str(argument) for argument in (*place, "--workers", 0, *flags)]


def write_tokens(data, weights, *flags, dest="tokens"):
    reset_accelerate()
    encode_tokens.main(flags_of(data, weights, *flags, dest=dest))
    return contents(data / dest)


def test_dataset_json(data, encoder_weights):
    write_tokens(data, encoder_weights, "--flip", "--batch-size", 5)
    content = json.loads((data / "tokens" / "dataset.json").read_text())
    assert content["labels"][4] == ["00000/img-tokens-00000004.npy", 1] and content["flip"] is True
    form = TokenFormat.from_json(content["encoder"])
    assert (form.name, form.resolution, form.input_size, form.shape) == (ENCODER, RESOLUTION, RESOLUTION, SHAPE)
    files = sorted((data / "tokens").rglob("img-tokens-0*.npy"))
    tokens = np.stack([np.load(file)[0] for file in files]).astype(np.float64)
    assert len(tokens) == 24 and all(file.stat().st_size == 128 + 2 * 17 * 32 for file in files)
    np.testing.assert_allclose(content["cls_token"]["mean"], tokens.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(content["cls_token"]["std"], tokens.std(0), rtol=1e-9)


def test_statistics_of_a_constant_channel(tmp_path):
    values = np.array([[1000.5, 0.0], [1000.5, 2.0]], np.float16)
    for i, value in enumerate(values):
        np.save(tmp_path / f"{i}.npy", np.stack([value, value + 1]))
    mean, std = encode_tokens.class_token_statistics(tmp_path, ["0.npy", "1.npy"])
    assert mean.tolist() == [1000.5, 1.0] and std.tolist() == [0.0, 1.0]


def test_an_interrupted_run_gives_the_same_bytes(data, encoder_weights, monkeypatch):
    expected = write_tokens(data, encoder_weights, "--batch-size", 5, "--flip", dest="expected")
    write, calls = Destination.write_batch, []

    def interrupted(self, files):
        calls.append(files)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(self, files)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Destination, "write_batch", interrupted)
        write_tokens(data, encoder_weights, "--batch-size", 5, "--flip")
    assert not (data / "tokens/dataset.json").exists()
    (data / "tokens/00000/img-tokens-00000002.npy").unlink()
    assert write_tokens(data, encoder_weights, "--batch-size", 5, "--flip") == expected


def test_a_replaced_image_is_encoded_again(data, encoder_weights, capsys):
    """Even if its size stays."""
    before, image = write_tokens(data, encoder_weights), data / "images/00000/img00000001.png"
    size, other = image.stat().st_size, io.BytesIO()
    Image.fromarray(np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)).save(other, "PNG")
    image.write_bytes(other.getvalue().ljust(size, b"\0"))
    after = write_tokens(data, encoder_weights)
    assert {name for name in before if before[name] != after[name]} == {
        "00000/img-tokens-00000001.npy",
        "dataset.json",
    }
    assert "img00000001.png or others were changed after their tokens were written" in capsys.readouterr().out


def test_other_weights_and_settings_on_the_same_destination(data, encoder_weights, tmp_path):
    write_tokens(data, encoder_weights)
    with pytest.raises(InputError, match="flip was False, is now True"):
        write_tokens(data, encoder_weights, "--flip")
    other = write_encoder(tmp_path / "other.safetensors", mlp_ratio=2)
    with pytest.raises(InputError, match=r"encoder was 'timm/.*'; encoder weights was '\w{64}', is now '\w{64}'"):
        write_tokens(data, other, "--enc-type", f"{ENCODER}:mlp_ratio=2")


def test_bad_input(data, encoder_weights, tmp_path):
    with pytest.raises(InputError, match="--enc-type a,b: must be the name of one encoder, without a comma"):
        write_tokens(data, encoder_weights, "--enc-type", "a,b")
    with pytest.raises(InputError, match="encoder 'dino': unknown"):
        write_tokens(data, encoder_weights, "--enc-type", "dino")
    with pytest.raises(InputError, match="--batch-size 0: must be from 1 to 100,000, or auto"):
        write_tokens(data, encoder_weights, "--batch-size", 0)
    (data / "images/00000/img00000003.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"img00000003\.png: not an image"):
        write_tokens(data, encoder_weights)
    assert not (data / "tokens/dataset.json").exists()


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e5])
def test_tokens_must_be_finite_in_float16(tmp_path, value):
    batch = Batch(("a.png",), ("00000/a.npy",), False)
    tokens = torch.tensor([[[1.0, value]]]).half()
    with pytest.raises(
        InputError, match=r"a\.png: its tokens are not finite as float16; are the weights of --enc-type"
    ):
        encode_tokens.save(Destination(tmp_path / "out", "encode_tokens"), batch, tokens)
    assert not list(tmp_path.rglob("*.npy"))


def test_two_processes_give_the_same_files(data, encoder_weights):
    expected = write_tokens(data, encoder_weights, "--batch-size", 4, "--flip")
    flags = flags_of(data, encoder_weights, "--batch-size", 4, "--flip", dest="two")
    done = run_program("preprocessing/encode_tokens.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(data / "two") == expected
