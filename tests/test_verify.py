"""verify.py finds each kind of error, and none in a correct data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from models.autoencoder import SD_FORMAT, LatentFormat, load_codec
from preprocessing import encode_tokens, verify
from preprocessing.destination import write_dataset_json
from tests.conftest import ENCODER, reset_accelerate
from tests.test_autoencoder import photographs
from tests.test_crops import header_only_png
from tests.test_encode import make_images
from tests.test_encode import run as run_encode

ASSETS = os.environ.get("REG_ASSETS")
LATENT = "vae-sd/00000/img-mean-std-00000003.npy"


@pytest.fixture
def data(tmp_path):
    """Return a data set of seven pairs in pixel space, with mirrored latents."""
    run_encode(make_images(tmp_path / "images"), tmp_path / "vae-sd", "pixel", "--flip")
    return tmp_path


def run(data, *flags):
    verify.main([str(data), "--workers", "1", *flags])


@pytest.mark.parametrize(
    "counts, text",
    [((7,), "1 class"), ((60, 60), "2 classes of 60 pairs each"), ((1, 1300), "2 classes of 1 to 1,300 pairs each")],
)
def test_classes_are_described(counts, text):
    assert verify.describe_classes(np.array(counts)) == text


def test_a_data_set_without_errors(data, capsys):
    run(data)
    said = capsys.readouterr().out
    assert "7 pairs, 3 classes of 2 to 3 pairs each, images 16 px" in said and "no errors found" in said
    assert "mean inf dB" in said  # the pixel codec is exact
    checksums = dict(reversed(line.split("  ")) for line in (data / "checksums.sha256").read_text().splitlines())
    assert len(checksums) == 3 * 7 + 2
    assert checksums[LATENT] == hashlib.sha256((data / LATENT).read_bytes()).hexdigest()
    sheet = Image.open(data / "verify.png")
    assert sheet.size[0] > 7 * 16
    run(data)
    assert "23 files, 0 differ" in capsys.readouterr().out


def test_the_contact_sheet_shows_image_above_reconstruction(tmp_path):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 64, 64)
    verify.contact_sheet(tmp_path / "sheet.png", images, images + 100)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))[32::66, 32::66, 0]
    assert sheet.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [100, 101, 102, 103, 104, 105, 106, 107],
        [8, 9, 255, 255, 255, 255, 255, 255],
        [108, 109, 255, 255, 255, 255, 255, 255],
    ]


def spoil_moments(change):
    def spoil(data):
        moments = np.load(data / LATENT)
        np.save(data / LATENT, change(moments))

    return spoil


def set_value(moments, position, value):
    moments[position] = value
    return moments


def cut_image(data):
    path = data / "images/00000/img00000003.png"
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit_of_the_pixels(data):
    path = data / "images/00000/img00000003.png"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)


def append_to_image(data):
    with open(data / "images/00000/img00000003.png", "ab") as file:
        file.write(b"x")


def lose_flip(data):
    (data / "vae-sd/00000/img-mean-std-flip-00000003.npy").unlink()


def lose_latents(data):
    (data / LATENT).unlink()


def huge_image(data):
    (data / "images/00000/img00000003.png").write_bytes(header_only_png(30_000, 30_000))


def save_as_npz(data):
    np.savez(data / "moments.npz", np.zeros((6, 16, 16), np.float32))
    (data / "moments.npz").rename(data / LATENT)


def grey_image(data):
    Image.new("L", (16, 16)).save(data / "images/00000/img00000003.png")


def change_label(data):
    dataset = json.loads((data / "images/dataset.json").read_text())
    dataset["labels"][3][1] = 2
    write_dataset_json(data / "images/dataset.json", dataset)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_image, r"img00000003.png: not an image that can be read: the file is truncated"),
        (huge_image, r"img00000003.png: not an image that can be read: 900,000,000 pixels"),
        (flip_a_bit_of_the_pixels, r"img00000003.png: .*a checksum of the PNG does not match"),
        (append_to_image, r"img00000003.png: has data after the end of the PNG"),
        (save_as_npz, r"00000003.npy: broken latents"),
        (grey_image, r"img00000003.png: 16 x 16 pixels of mode L"),
        (lose_flip, r"flip-00000003.npy: cannot be read"),
        (spoil_moments(lambda m: set_value(m, (0, 0, 0), np.nan)), "00000003.npy: has values that are not finite"),
        (
            spoil_moments(lambda m: set_value(m, (0, 0, 0), -1e5)),
            r"00000003.npy: has a value of 1e\+05; allowed",
        ),
        (spoil_moments(lambda m: set_value(m, (4, 0, 0), -0.5)), "00000003.npy: has a negative standard deviation"),
        (spoil_moments(lambda m: m[:, 1:]), r"00000003.npy: shape \(6, 15, 16\); allowed: \(2 C, h, h\)"),
        (spoil_moments(lambda m: m[:, ::2, ::2]), r"00000003.npy: shape \(6, 8, 8\); expected \(6, 16, 16\)"),
        (spoil_moments(lambda m: m.astype(np.int32)), "00000003.npy: dtype int32; allowed: float32, float16"),
    ],
)
def test_a_damaged_file_is_named(spoil, message, data, capsys):
    spoil(data)
    with pytest.raises(InputError, match="number of errors: 1;"):
        run(data)
    assert re.search(message, capsys.readouterr().err)
    assert not (data / "checksums.sha256").exists()


@pytest.mark.parametrize(
    ("spoil", "message"), [(lose_latents, "have no partner"), (change_label, "index 3 has label 2 in .* and 0 in")]
)
def test_missing_partners_and_contradicting_labels(spoil, message, data):
    spoil(data)
    with pytest.raises(InputError, match=message):
        run(data)


def test_a_change_since_the_checksums(data, capsys):
    run(data)
    spoil_moments(lambda m: set_value(m, (0, 0, 0), 0.25))(data)
    with pytest.raises(InputError, match="number of errors: 1;"):
        run(data)
    assert f"{LATENT}: differs from checksums.sha256" in capsys.readouterr().err
    run(data, "--update-checksums")
    run(data)


@pytest.mark.parametrize("content", ["x", "0" * 64 + "  a", "0" * 63 + "  a\n", "a\n" * 1000])
def test_other_files_under_the_name_of_the_checksums_are_refused(content, tmp_path):
    (tmp_path / "c").write_text(content)
    with pytest.raises(InputError, match="c: not a complete checksum file; remove it"):
        verify.read_checksums(tmp_path / "c")
    with pytest.raises(InputError, match="cannot be read"):
        verify.read_checksums(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="fifo: is not a regular file"):
        verify.read_checksums(tmp_path / "fifo")


def test_cached_tokens_are_checked(data, encoder_weights, capsys):
    place = ["--source", data / "images", "--dest", data / "tokens", "--enc-weights", encoder_weights]
    reset_accelerate()
    encode_tokens.main([str(word) for word in (*place, "--enc-type", ENCODER, "--workers", 0, "--flip")])
    run(data, "--cached-tokens", "tokens", "--reconstruct", "0")
    assert sum(name.startswith("tokens/") for name in verify.read_checksums(data / "checksums.sha256")) == 15
    capsys.readouterr()
    path = data / "tokens/00000/img-tokens-flip-00000003.npy"
    tokens = np.load(path)
    tokens[0, 0] = np.inf
    np.save(path, tokens)
    with pytest.raises(InputError, match="number of errors: 2"):
        run(data, "--cached-tokens", "tokens", "--reconstruct", "0")
    errors = capsys.readouterr().err
    assert f"{path}: has values that are not finite" in errors and "flip-00000003.npy: differs from" in errors


def test_checksums_of_names_with_unusual_characters(tmp_path):
    name = "images/a\u2028\x0b  b\x85/img00000000.png"
    (tmp_path / "c").write_text(f"{'0' * 64}  {name}\n")
    assert verify.read_checksums(tmp_path / "c") == {name: "0" * 64}


def test_latents_of_other_images(data, capsys):
    first, last = data / "vae-sd/00000/img-mean-std-00000000.npy", data / "vae-sd/00000/img-mean-std-00000006.npy"
    first.write_bytes(last.read_bytes())
    for index in range(1, 7):
        (data / f"vae-sd/00000/img-mean-std-{index:08d}.npy").write_bytes(first.read_bytes())
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(data / "images/00000/img00000006.png")
    with pytest.raises(InputError, match="number of errors: 1;"):
        run(data)
    assert "do not show the images" in capsys.readouterr().err


def test_files_in_folders_of_their_own(data):
    (data / "vae-sd/elsewhere").mkdir()
    for name in ("img-mean-std-00000003.npy", "img-mean-std-flip-00000003.npy"):
        (data / "vae-sd/00000" / name).rename(data / "vae-sd/elsewhere" / name)
    run(data, "--reconstruct", "0")


def test_statistics_equal_those_of_sampled_latents():
    rng = np.random.default_rng(0)
    moments = np.stack([rng.normal(1, 2, (1, 100, 100)), np.full((1, 100, 100), 0.5)], axis=1)[0]
    found = verify.Findings(count=10_000, sums=np.array([[moments[0].sum()], [(moments**2).sum()]]))
    latent_format = LatentFormat("x", channels=1, factor=8, scale=0.5, shift=0.2)
    mean, std = verify.latent_statistics(found, latent_format)
    drawn = latent_format.sample(torch.tensor(moments)[None], torch.tensor(rng.normal(size=(1, 1, 100, 100))))
    np.testing.assert_allclose(mean, drawn.mean(), atol=0.02)
    np.testing.assert_allclose(std, drawn.std(), atol=0.02)


class Latents(dict):
    """Stands for the files of latents with a dataset.json, or without."""

    path = "vae-sd"

    def describe(self, name):
        return f"vae-sd/{name}"


def magnitude_errors(moments, latent_format, files=("dataset.json",)):
    found = verify.Findings()
    for one in moments:
        found.add_latents(np.asarray(one), "moments")
    dataset = SimpleNamespace(latent_format=latent_format, latents=Latents.fromkeys(files))
    return verify.check_magnitude(*verify.latent_statistics(found, latent_format), dataset)


TAESD_FORMAT = LatentFormat("taesd", channels=4, factor=8)


@pytest.mark.parametrize(
    ("latent_format", "std", "is_right"),
    [
        (TAESD_FORMAT, 0.78, True),
        (SD_FORMAT, 0.78, False),  # TAESD's, read as Stable Diffusion's
        (SD_FORMAT, 1.6, False),  # the same for black images
        (SD_FORMAT, 0.8 / 0.18215, True),
        (SD_FORMAT, 1.1 / 0.18215, True),
        (TAESD_FORMAT, 1 / 0.18215, False),  # Stable Diffusion's, read as TAESD's
        (LatentFormat("pixel", channels=4, factor=1), 0.0, True),  # black images of digits
        (LatentFormat("pixel", channels=4, factor=1), 0.5, True),
        (LatentFormat("pixel", channels=4, factor=1), 1.5, False),
        (LatentFormat("pixel", channels=4, factor=1, scale=(3.0,) * 4), 0.35, True),  # measured statistics
    ],
)
def test_the_magnitude_of_latents_is_that_of_their_codec(latent_format, std, is_right):
    mean = np.random.default_rng(0).normal(0, std, (3, 4, 64, 64))
    errors = magnitude_errors([np.concatenate([one, np.zeros_like(one)]) for one in mean], latent_format)
    assert len(errors) == (0 if is_right else 1)
    if errors:
        assert "vae-sd/dataset.json says codec" in errors[0] and "is its scale right?" in errors[0]


def test_latents_of_a_wrong_scale_are_a_problem(data, capsys):
    content = json.loads((data / "vae-sd/dataset.json").read_text())
    content["codec"] = {**content["codec"], "codec": "taesd", "scale": 0.18215}
    write_dataset_json(data / "vae-sd/dataset.json", content)
    with pytest.raises(InputError, match="number of errors: 1;"):
        run(data, "--reconstruct", "0")
    said = capsys.readouterr().err
    assert re.search(r"root mean square 0\.1\d*, but the scaled latents of taesd have .* of 0\.4 to 2\.5", said)


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS, reason="REG_ASSETS is not set")
def test_the_magnitude_of_real_latents():
    """Photographs and flat images encoded by TAESD; read as Stable Diffusion's, each of them is found."""
    codec = load_codec(str(Path(ASSETS) / "taesd"))
    flat = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    for images in (photographs(6)[..., ::2, ::2], *flat.split(1)):
        moments = codec.encode(images).numpy()
        assert magnitude_errors(moments, codec.format) == []
        assert "has no dataset.json, which means codec sd-vae-ft-mse" in magnitude_errors(moments, SD_FORMAT, ())[0]


def test_a_codec_that_cannot_be_loaded_is_not_needed_without_decoding(data):
    with pytest.raises(InputError, match="--reconstruct 0"):
        run(data, "--vae", "/no/such/folder")
    run(data, "--reconstruct", "0")
    with pytest.raises(InputError, match="--reconstruct -1"):
        run(data, "--reconstruct", "-1")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_unavailable_devices_are_refused(device, data):
    with pytest.raises(InputError, match=f"--device {device}: not available"):
        run(data, "--device", device)


def test_unwritable_outputs_are_refused_before_the_work(data, monkeypatch):
    (data / "file").write_text("")
    monkeypatch.setattr(verify, "check_files", None)
    with pytest.raises(InputError, match=r"--sheet .*file/sheet\.png"):
        run(data, "--sheet", str(data / "file/sheet.png"))
    (data / "checksums.sha256").mkdir()
    with pytest.raises(InputError, match=r"checksums\.sha256: is a folder"):
        run(data, "--reconstruct", "0", "--update-checksums")


def test_files_that_training_does_not_read_are_counted(data, capsys):
    (data / "images" / "00000" / "img00000000 (1).png").write_bytes(b"")
    (data / "vae-sd" / "note.npy").write_bytes(b"")
    run(data, "--reconstruct", "0")
    printed = capsys.readouterr().out
    for text in (
        "images: 1 other file, which training does not read; first 00000/img00000000 (1).png",
        "first note.npy",
    ):
        assert text in printed


def test_the_picture_and_the_checksums_replace_only_their_own(data):
    image = next(iter(sorted((data / "images").rglob("*.png"))))
    before = image.read_bytes()
    (data / "thesis.png").write_text("precious")
    for sheet, problem in (
        (image, "is read by|is in"),
        (data / "images/new.png", "is in"),
        (data / "thesis.png", "PNG picture"),
    ):
        with pytest.raises(InputError, match=f"--sheet .*({problem})"):
            run(data, "--sheet", str(sheet))
    assert image.read_bytes() == before
    (data / "checksums.sha256").write_text("my notes")
    with pytest.raises(InputError, match=r"--update-checksums .*checksums\.sha256: exists and is not a checksum file"):
        run(data, "--update-checksums")
    with pytest.raises(InputError, match="not a complete checksum file"):
        run(data)
    assert (data / "checksums.sha256").read_text() == "my notes"
