"""encode.py gives the same latents for any number of processes and after interruptions."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from dataset import LatentDataset
from models.autoencoder import load_codec
from preprocessing import dataset_tools, encode
from preprocessing.destination import Destination, write_dataset_json
from tests.conftest import ROOT, contents
from tests.kills import Case, try_program

ASSETS = os.environ.get("REG_ASSETS")


def make_images(folder, count=7, resolution=16, start=0):
    """Write a data set of noise in the format of convert.py, faster than convert.py."""
    labels = []
    for index in range(start, start + count):
        path = folder / f"{index // 1000:05d}" / f"img{index:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        labels.append([f"{path.parent.name}/{path.name}", index % 3])
    write_dataset_json(folder / "dataset.json", {"labels": labels, "classes": ["a", "b", "c"]})
    return folder


@pytest.fixture(scope="module")
def kl_codec(tmp_path_factory):
    """Return the folder of a small AutoencoderKL with random weights: 4 channels, factor 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [16, 16],
        "norm_num_groups": 4,
    }
    AutoencoderKL(latent_channels=4, **blocks).save_pretrained(folder)
    return folder


def run(source, destination, vae, *flags):
    arguments = ["--source", source, "--dest", destination, "--vae", vae, "--workers", 0, *flags]
    encode.main([str(argument) for argument in arguments])


def load(folder, index, flip=""):
    return np.load(folder / f"{index // 1000:05d}/img-mean-std-{flip}{index:08d}.npy")


def test_files_and_dataset_json(tmp_path, kl_codec):
    images = make_images(tmp_path / "images")
    run(images, tmp_path / "vae-sd", kl_codec)
    dataset = json.loads((tmp_path / "vae-sd/dataset.json").read_text())
    assert dataset["labels"][4] == ["00000/img-mean-std-00000004.npy", 1] and len(dataset["labels"]) == 7
    assert dataset["classes"] == ["a", "b", "c"] and dataset["flip"] is False
    codec = load_codec(str(kl_codec))
    assert dataset["codec"] == codec.format.to_json()
    pixels = np.asarray(Image.open(images / "00000/img00000004.png")).transpose(2, 0, 1)
    expected = codec.encode(torch.tensor(pixels)[None])[0].numpy()
    moments = load(tmp_path / "vae-sd", 4)
    assert moments.dtype == np.float32 and moments.shape == (8, 8, 8) and moments[4:].min() > 0
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    assert len(LatentDataset(tmp_path)) == 7  # what training reads


def test_batch_size_changes_only_the_rounding(tmp_path, kl_codec):
    images = make_images(tmp_path / "images")
    for size in (1, 3, 7):
        run(images, tmp_path / str(size), kl_codec, "--batch-size", size)
    for index in range(7):
        for size in (3, 7):
            np.testing.assert_allclose(load(tmp_path / str(size), index), load(tmp_path / "1", index), atol=1e-5)


def test_automatic_batch_size(tmp_path, kl_codec):
    images = make_images(tmp_path / "images")
    for size in ("auto", 1):
        run(images, tmp_path / str(size), kl_codec, "--batch-size", size)
    assert contents(tmp_path / "auto") == contents(tmp_path / "1")  # on a CPU, one by one


def test_images_without_labels(tmp_path):
    images = make_images(tmp_path / "images")
    write_dataset_json(images / "dataset.json", {"labels": None})
    run(images, tmp_path / "vae-sd", "pixel")
    assert json.loads((tmp_path / "vae-sd/dataset.json").read_text())["labels"] is None
    assert LatentDataset(tmp_path).labels.tolist() == [0] * 7


def test_half_precision_files(tmp_path, kl_codec):
    images = make_images(tmp_path / "images", 2)
    run(images, tmp_path / "full", kl_codec)
    run(images, tmp_path / "half", kl_codec, "--dtype", "float16")
    half = load(tmp_path / "half", 1)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, load(tmp_path / "full", 1).astype(np.float16))


def test_flips_are_the_latents_of_mirrored_images(tmp_path, kl_codec):
    images = make_images(tmp_path / "images", 3)
    mirrored = make_images(tmp_path / "mirrored", 3)
    for path in mirrored.rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    run(images, tmp_path / "both", kl_codec, "--flip")
    run(mirrored, tmp_path / "expected", kl_codec)
    for index in range(3):
        np.testing.assert_array_equal(load(tmp_path / "both", index, "flip-"), load(tmp_path / "expected", index))
    dataset = json.loads((tmp_path / "both/dataset.json").read_text())
    assert dataset["flip"] is True and len(dataset["labels"]) == 3


def test_pixel_latents_are_exact_and_zips_work(tmp_path):
    images = make_images(tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in images.rglob("*.*"):
            archive.write(path, path.relative_to(images))
    run(images, tmp_path / "latents", "pixel")
    run(tmp_path / "images.zip", tmp_path / "latents.zip", "pixel")
    with zipfile.ZipFile(tmp_path / "latents.zip") as archive:
        for name, data in contents(tmp_path / "latents").items():
            assert name.startswith(".") or archive.read(name) == data
    latents = torch.tensor(load(tmp_path / "latents", 5)[None, :3])
    decoded = load_codec("pixel").decode(latents)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(images / "00000/img00000005.png")))


def test_indices_may_start_above_zero(tmp_path):
    make_images(tmp_path / "images", 2, start=1999)
    run(tmp_path / "images", tmp_path / "latents", "pixel")
    assert load(tmp_path / "latents", 2000).shape == (6, 16, 16)


def test_an_incomplete_batch_is_encoded_again_completely(tmp_path, kl_codec):
    images = make_images(tmp_path / "images")
    run(images, tmp_path / "latents", kl_codec, "--batch-size", 3)
    expected = contents(tmp_path / "latents")
    (tmp_path / "latents/00000/img-mean-std-00000004.npy").unlink()
    (tmp_path / "latents/00000/.img-mean-std-00000004.npy.123.tmp").write_bytes(b"half")
    (tmp_path / "latents/dataset.json").unlink()
    run(images, tmp_path / "latents", kl_codec, "--batch-size", 3)
    assert contents(tmp_path / "latents") == expected


def test_other_settings_on_the_same_destination(tmp_path):
    images = make_images(tmp_path / "images")
    run(images, tmp_path / "latents", "pixel")
    with pytest.raises(InputError, match="dtype was 'float32', is now 'float16'"):
        run(images, tmp_path / "latents", "pixel", "--dtype", "float16")
    with pytest.raises(InputError, match="contains --source"):
        run(images, tmp_path, "pixel")
    with pytest.raises(InputError, match="is inside"):
        run(images, images / "latents", "pixel")


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_other_images_under_the_same_names(suffix, tmp_path):
    """As after another run of convert.py with another --transform or other photographs."""

    def make(resolution, change=None):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        make_images(tmp_path / "images", 7, resolution)
        if change:
            Image.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(tmp_path / f"images/00000/img{change:08d}.png")
        if suffix:
            shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")

    source, latents = tmp_path / f"images{suffix}", tmp_path / f"latents{suffix}"
    make(16)
    run(source, latents, "pixel")
    make(16)
    run(source, latents, "pixel")
    make(16, change=5)
    with pytest.raises(InputError, match=r"images was '7 files, [\d,]+ bytes.* is now '7 files, [\d,]+ bytes"):
        run(source, latents, "pixel")
    make(32)
    with pytest.raises(InputError, match="resolution was 16, is now 32"):
        run(source, latents, "pixel")


def test_a_replaced_image_is_encoded_again(tmp_path, capsys):
    """Even if size and modification time stay."""
    images = make_images(tmp_path / "images", 3)
    run(images, tmp_path / "latents", "pixel")
    before, image = contents(tmp_path / "latents"), images / "00000/img00000001.png"
    status, data = image.stat(), image.read_bytes()
    pixels = np.asarray(Image.open(image))
    other = io.BytesIO()
    Image.fromarray(pixels[::-1]).save(other, "PNG")
    image.write_bytes(other.getvalue()[: len(data)].ljust(len(data), b"\0"))
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    run(images, tmp_path / "latents", "pixel")
    after = contents(tmp_path / "latents")
    assert {name for name in before if before[name] != after[name]} == {"00000/img-mean-std-00000001.npy"}
    assert "img00000001.png or others were changed after their latents were written" in capsys.readouterr().out


def test_another_codec_of_the_same_name(tmp_path, kl_codec):
    images = make_images(tmp_path / "images", 2)
    run(images, tmp_path / "latents", kl_codec)
    record = tmp_path / "latents/.encode.json"
    recorded = json.loads(record.read_text())
    record.write_text(json.dumps(recorded | {"codec weights": "0"}))
    with pytest.raises(InputError, match="codec weights was '0', is now '"):
        run(images, tmp_path / "latents", kl_codec)
    del recorded["codec weights"]  # as by earlier versions
    record.write_text(json.dumps(recorded))
    run(images, tmp_path / "latents", kl_codec)


def test_bad_sources(tmp_path, kl_codec):
    images = make_images(tmp_path / "images")
    with pytest.raises(InputError, match="--batch-size 0: must be from 1 to 100,000, or auto"):
        run(images, tmp_path / "out", "pixel", "--batch-size", 0)
    with pytest.raises(InputError, match=r"images of 15 px; codec .* needs a multiple of 2"):
        run(make_images(tmp_path / "odd", resolution=15), tmp_path / "out", kl_codec)
    with pytest.raises(InputError, match=r"contains no images .*; its files: 1 \.json, 1 \.safetensors"):
        run(kl_codec, tmp_path / "out", "pixel")
    assert not (tmp_path / "out").exists()


def replace_image(images, pixels):
    Image.fromarray(pixels).save(images / "00000/img00000003.png")


def cut_image(images, _):
    path = images / "00000/img00000003.png"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "pixels", "message"),
    [
        (replace_image, np.zeros((16, 16), np.uint8), "16 x 16 pixels of mode L, not RGB 16 x 16"),
        (replace_image, np.zeros((8, 8, 3), np.uint8), "8 x 8 pixels of mode RGB, not RGB 16 x 16"),
        (cut_image, None, "not an image that can be read"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_images_are_named(spoil, pixels, message, workers, tmp_path):
    images = make_images(tmp_path / "images")
    spoil(images, pixels)
    with pytest.raises(InputError, match=f"img00000003.png: {message}") as caught:
        run(images, tmp_path / "latents", "pixel", "--workers", workers)
    assert "Traceback" not in str(caught.value) and f"convert.py --source {images} --dest" in str(caught.value)
    assert not (tmp_path / "latents/dataset.json").exists()


def test_two_images_of_one_index(tmp_path):
    images = make_images(tmp_path / "images", 2)
    (images / "00001").mkdir()
    (images / "00001/img00000001.png").write_bytes((images / "00000/img00000001.png").read_bytes())
    names = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000001.png"]
    write_dataset_json(images / "dataset.json", {"labels": [[name, 0] for name in names]})
    with pytest.raises(InputError, match=r"img00000001.png and .*img00000001.png have the same index"):
        run(images, tmp_path / "latents", "pixel")


def test_latents_must_be_finite(tmp_path):
    destination = Destination(tmp_path / "out", "encode")
    batch = encode.Batch(("a.png",), ("00000/a.npy",), False)
    with pytest.raises(InputError, match=r"a.png: its latents are not finite as float16"):
        encode.save(destination, batch, torch.full((1, 2, 1, 1), 1e6), "float16")
    assert not list(tmp_path.rglob("*.npy"))


def test_the_published_command_line(tmp_path):
    images = make_images(tmp_path / "images", 2)
    dataset_tools.main(["encode", f"--source={images}", f"--dest={tmp_path / 'vae-sd'}", "--model-url=pixel"])
    assert load(tmp_path / "vae-sd", 1).shape == (6, 16, 16)


def test_two_processes_give_the_same_files(tmp_path, kl_codec):
    images = make_images(tmp_path / "images", 20)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [
        ROOT / "preprocessing/encode.py",
        "--source",
        images,
        "--vae",
        kl_codec,
        "--batch-size",
        3,
        "--store",
        "draw",
        "--statistics-images",
        7,
        "--dest",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command, name in (([*launch, *program], "two"), ([sys.executable, *program], "one")):
        done = subprocess.run([*map(str, command), tmp_path / name], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_killed_and_restarted(tmp_path, kl_codec):
    images = make_images(tmp_path / "images", 20, 128)
    command = f"preprocessing/encode.py --source {images} --vae {kl_codec} --batch-size 4 --flip --workers 1"
    command += " --statistics-images 9"
    work = tmp_path / "work"
    case = Case("encode", [*command.split(), "--dest", str(work / "latents")], work, undisturbed_runs=1)
    counts = try_program(case, kills=1)
    assert (counts.kills, counts.failures, len(case.expected)) == (1, [], 42)
