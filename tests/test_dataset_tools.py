"""dataset_tools.py: the published command line, its defaults and its crops."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from common.errors import InputError
from preprocessing import dataset_tools
from tests.conftest import contents
from tests.test_convert import make_source
from tests.test_convert import run as run_convert
from tests.test_crops import encoded, noise, oriented_jpeg


def run(source, dest, *flags):
    dataset_tools.main(["convert", f"--source={source}", f"--dest={dest}", "--workers=1", *flags])


def image(folder, index=0):
    return np.asarray(Image.open(folder / f"00000/img{index:08d}.png"))


def table(folder):
    return json.loads((folder / "dataset.json").read_text())


def test_adms_crop_is_that_of_convert(tmp_path):
    source = make_source(tmp_path / "source")
    (source / "cat/turned.jpg").write_bytes(oriented_jpeg())
    run(source, tmp_path / "out", "--transform=center-crop-dhariwal", "--resolution=16x16")
    run_convert(source, tmp_path / "ours", 16, "--exif", "ignore")
    assert contents(tmp_path / "out") == contents(tmp_path / "ours")


@pytest.mark.parametrize("resolution", ["16x16", "16,16", "16"])
def test_without_a_transform_images_are_resized(resolution, tmp_path):
    source = make_source(tmp_path / "source")
    run(source, tmp_path / "out", f"--resolution={resolution}", "--max-images=4")
    assert [label for _, label in table(tmp_path / "out")["labels"]] == [0, 0, 0, 1]
    photograph = Image.open(source / "cat/0.jpg").convert("RGB")
    across = photograph.resize((16, photograph.height), Image.Resampling.LANCZOS)
    assert np.array_equal(image(tmp_path / "out"), across.resize((16, 16), Image.Resampling.LANCZOS))


def test_without_a_resolution_images_keep_their_size(tmp_path):
    (tmp_path / "source").mkdir()
    pixels = [noise(12, 12, seed) for seed in range(2)]
    for number, values in enumerate(pixels):
        (tmp_path / f"source/{number}.png").write_bytes(encoded(Image.fromarray(values)))
    run(tmp_path / "source", tmp_path / "out")
    assert np.array_equal(image(tmp_path / "out", 1), pixels[1])
    (tmp_path / "source/2.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    with pytest.raises(InputError, match=r"2\.png: 8 x 8 pixels; .* one square size, here 12 x 12; add --resolution"):
        run(tmp_path / "source", tmp_path / "other")
    (tmp_path / "source/0.png").write_bytes(encoded(Image.new("RGB", (8, 6))))
    with pytest.raises(InputError, match=r"0\.png: 8 x 6 pixels, not square; add --resolution"):
        run(tmp_path / "source", tmp_path / "third")


def test_a_wide_crop_is_centred_on_black(tmp_path):
    (tmp_path / "source").mkdir()
    pixels = noise(24, 20)  # width 24, height 20: 13 rows become a picture of 16 x 8
    (tmp_path / "source/a.png").write_bytes(encoded(Image.fromarray(pixels)))
    run(tmp_path / "source", tmp_path / "out", "--transform=center-crop-wide", "--resolution=16x8")
    rows = pixels[(20 - 13) // 2 : (20 + 13) // 2]
    expected = np.zeros((16, 16, 3), np.uint8)
    expected[4:12] = np.asarray(Image.fromarray(rows).resize((16, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(image(tmp_path / "out"), expected)
    with pytest.raises(InputError, match="24 x 20 pixels are too few for center-crop-wide to 32 x 16"):
        run(tmp_path / "source", tmp_path / "other", "--transform=center-crop-wide", "--resolution=32x16")


def test_a_zip_and_a_single_folder_have_no_labels(tmp_path, capsys):
    source = make_source(tmp_path / "source")
    shutil.make_archive(str(tmp_path / "source"), "zip", source)
    for number, path in enumerate((tmp_path / "source.zip", source / "cat")):
        run(path, tmp_path / f"out{number}", "--resolution=16")
        assert table(tmp_path / f"out{number}") == {"labels": None}
        assert "no labels (a zip or a single folder" in capsys.readouterr().out
    run(source, tmp_path / "labelled", "--resolution=16")
    assert table(tmp_path / "labelled")["classes"] == ["cat", "dog"]
    (tmp_path / "nested/images").mkdir(parents=True)
    (tmp_path / "nested/images/dataset.json").write_text('{"labels": []}')
    shutil.make_archive(str(tmp_path / "nested"), "zip", tmp_path / "nested")
    with pytest.raises(InputError, match=r"images/dataset\.json: found"):
        run(tmp_path / "nested.zip", tmp_path / "never", "--resolution=16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution=16x32"], "--resolution=16x32: must be square"),
        (
            ["--resolution=16x8"],
            "must be square, such as 256x256; with --transform=center-crop-wide also WIDTH > HEIGHT",
        ),
        (["--resolution=big"], "'big' is not WIDTHxHEIGHT"),
        (["--resolution=0x0"], "'0x0' is not WIDTHxHEIGHT"),
        (["--transform=center-crop"], "--transform=center-crop: needs --resolution"),
        (["--transform=resize", "--resolution=16"], "--transform"),
        (["--max-images=0"], "--max-images 0: must be greater than 0"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(make_source(tmp_path / "source"), tmp_path / "out", *flags)


@pytest.mark.parametrize("arguments", [[], ["make"]])
def test_the_command_must_be_known(arguments):
    with pytest.raises(InputError, match="allowed: convert, encode"):
        dataset_tools.main(arguments)


@pytest.mark.parametrize(
    ("command", "flags"),
    [("convert", ["--resolution", "--transform", "--max-images"]), ("encode", ["--model-url", "--dtype"])],
)
def test_the_help_is_complete(command, flags, capsys):
    with pytest.raises(SystemExit):
        dataset_tools.main([command, "--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--source", "--dest", *flags))


@pytest.mark.parametrize("flags", [["--model-url"], ["--model-url="]])
def test_a_codec_without_a_value_is_named(flags):
    with pytest.raises(InputError, match="--model-url: needs a value"):
        dataset_tools.main(["encode", *flags])
