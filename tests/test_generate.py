import argparse
import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import parse
from common.io import InputError
from generation.config import GenerateConfig, default_name
from models.autoencoder import PixelCodec
from models.checkpoint import load_checkpoint, save_checkpoint
from models.encoders import load_encoder
from tests.conftest import NUM_CLASSES, ROOT, run_generate, run_program, run_training
from tests.test_checkpoint import content
from tests.test_sit import randomise, small
from tests.test_train import MODES, with_flags


@pytest.fixture
def checkpoint(train_flags):
    run = run_training(with_flags(train_flags, "--max-train-steps", "2", "--qk-norm"))
    return run / "checkpoints" / "0000002.pt"


def flags(checkpoint, tmp_path, name, *more):
    line = ["--ckpt", str(checkpoint), "--sample-dir", str(tmp_path / "samples"), "--name", name, "--device", "cpu"]
    return [*line, "--num-fid-samples", "7", "--num-steps", "3", "--per-proc-batch-size", "2", *more]


def settings_of(line):
    return parse(GenerateConfig, "", line)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "images").glob("*.png")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampler", [[], ["--mode", "ode", "--heun"], ["--mode", "ode", "--solver", "dopri5"]])
def test_each_mode_generates(train_flags, tmp_path, monkeypatch, mode, sampler):
    run = run_training(with_flags(train_flags, *MODES[mode], "--max-train-steps", "1"))
    run_generate(flags(run / "checkpoints" / "0000001.pt", tmp_path, "a", "--cfg-scale", "1.5", *sampler), monkeypatch)
    assert len(hashes(tmp_path / "samples" / "a")) == 7


def test_what_a_set_holds(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--save-cls", "--label-sampling", "balanced"), monkeypatch)
    folder = tmp_path / "samples" / "a"
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        images = archive["arr_0"]
    assert images.shape == (7, 16, 16, 3) and images.dtype == np.uint8
    for number in range(7):
        assert np.array_equal(images[number], np.array(Image.open(folder / "images" / f"{number:06d}.png")))
    cls_tokens = np.load(folder / "cls_tokens.npy")
    assert cls_tokens.shape == (7, 32) and np.isfinite(cls_tokens).all() and cls_tokens.std() > 0
    labels = json.loads((folder / "images" / "dataset.json").read_text())["labels"]
    assert labels == [[f"{n:06d}.png", n % NUM_CLASSES] for n in range(7)]
    settings = json.loads((folder / "samples.json").read_text())
    assert settings["label_sampling"] == "balanced" and settings["steps"] == 2 and settings["vae"] == "pixel"
    assert Image.open(folder / "grid.png").size[0] > 16
    assert sorted(path.name for path in folder.iterdir()) == [
        "cls_tokens.npy", "grid.png", "images", "samples.json", "samples.npz",
    ]  # fmt: skip


def test_files_do_not_depend_on_processes_and_an_interrupted_set_is_completed(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "one", "--save-cls"), monkeypatch)
    one = tmp_path / "samples" / "one"
    result = run_program("generate.py", *flags(checkpoint, tmp_path, "two", "--save-cls"), processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    two = tmp_path / "samples" / "two"
    assert hashes(one) == hashes(two)
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()
    assert np.array_equal(np.load(one / "cls_tokens.npy"), np.load(two / "cls_tokens.npy"))

    kept = one / "images" / "000000.png"
    before, stamp = hashes(one), kept.stat().st_mtime_ns
    for number in (2, 3, 6):
        (one / "images" / f"{number:06d}.png").unlink()
    run_generate(flags(checkpoint, tmp_path, "one", "--save-cls"), monkeypatch)
    assert hashes(one) == before and kept.stat().st_mtime_ns == stamp


def test_another_batch_size_and_more_images_leave_images_as_they_are(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a"), monkeypatch)
    run_generate(flags(checkpoint, tmp_path, "b", "--per-proc-batch-size", "5", "--num-fid-samples", "9"), monkeypatch)
    for number in range(7):
        a, b = (
            np.array(Image.open(tmp_path / "samples" / name / "images" / f"{number:06d}.png")).astype(int)
            for name in "ab"
        )
        assert abs(a - b).max() <= 1  # one level, where rounding falls on the other side


def test_chosen_classes(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--classes", "2,0"), monkeypatch)
    labels = json.loads((tmp_path / "samples/a/images/dataset.json").read_text())["labels"]
    assert {label for _, label in labels} == {0, 2}


def test_known_settings_may_be_repeated(checkpoint, tmp_path, monkeypatch):
    known = "--num-classes 3 --encoder-depth 1 --resolution 16 --qk-norm --projector-embed-dims 32 --cls 32"
    known += " --path-type linear --no-legacy --vae pixel --heun --mode ode --no-npz"
    run_generate(flags(checkpoint, tmp_path, "a", *known.split()), monkeypatch)
    assert not (tmp_path / "samples" / "a" / "samples.npz").exists()


def read_images(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]).astype(int)


def test_half_precision_changes_images_little_and_is_part_of_the_settings(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "full"), monkeypatch)
    run_generate(flags(checkpoint, tmp_path, "half", "--network-dtype", "bf16"), monkeypatch)
    full, half = (read_images(tmp_path / "samples" / name) for name in ("full", "half"))
    assert 0 < abs(full - half).mean() < 2  # levels of 255
    assert json.loads((tmp_path / "samples/half/samples.json").read_text())["network_dtype"] == "bf16"
    with pytest.raises(InputError, match="made with network_dtype bf16, not float32"):
        run_generate(flags(checkpoint, tmp_path, "half"), monkeypatch)


def test_the_last_batch_is_filled_up_for_a_compiled_network(checkpoint, tmp_path, monkeypatch):
    sizes = set()
    monkeypatch.setattr(
        "generate.compile_blocks", lambda model: model.register_forward_pre_hook(lambda _, x: sizes.add(len(x[0])))
    )
    run_generate(flags(checkpoint, tmp_path, "plain", "--save-cls"), monkeypatch)
    assert not sizes
    more = ["--compile", "--save-cls", "--cfg-scale", "1.0"]
    run_generate(flags(checkpoint, tmp_path, "filled", *more), monkeypatch)  # 7 images, 2 at a time
    assert sizes == {2}
    plain, filled = (tmp_path / "samples" / name for name in ("plain", "filled"))
    assert abs(read_images(plain) - read_images(filled)).max() <= 1
    np.testing.assert_allclose(np.load(plain / "cls_tokens.npy"), np.load(filled / "cls_tokens.npy"), atol=1e-5)


def test_the_batch_size_is_found(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--per-proc-batch-size", "auto"), monkeypatch)
    assert json.loads((tmp_path / "samples/a/samples.json").read_text())["per_proc_batch_size"] == 8


BAD = {
    "model": (["--model", "SiT-XL/2"], "--model is SiT-XL/2, but .* has SiT-S/4"),
    "classes": (["--num-classes", "1000"], "--num-classes is 1000, but .* has 3"),
    "depth": (["--encoder-depth", "8"], "--encoder-depth is 8, but .* has 1"),
    "resolution": (["--resolution", "256"], "--resolution is 256, but .* has 16"),
    "qk norm": (["--no-qk-norm"], "--qk-norm is False, but .* has True"),
    "projectors": (["--projector-embed-dims", "768"], "--projector-embed-dims is 768, but .* has 32"),
    "cls": (["--cls", "768"], "--cls is 768, but .* has 32"),
    "path": (["--path-type", "cosine"], "--path-type is cosine, but .* has linear"),
    "legacy": (["--legacy"], "--legacy is True, but .* has False"),
    "class": (["--classes", "5"], r"--classes 5: the checkpoint has classes 0 \.\. 2"),
    "class names": (["--classes", "cat"], "--classes 'cat': expected whole numbers"),
    "no class": (["--classes", ""], "--classes '': expected whole numbers"),
    "sde solver": (["--heun"], "--solver heun is a solver of the ODE"),
    "steps": (["--num-steps", "0"], "--num-steps 0: must be greater than 0"),
    "interval": (["--guidance-low", "0.9", "--guidance-high", "0.5"], "--guidance-low 0.9 is above"),
    "scale": (["--cfg-scale", "0.5"], r"--cfg-scale 0\.5: must be 1 \(no guidance\) or greater"),
    "time": (["--guidance-high", "85"], r"--guidance-high 85\.0: must be from 0 to 1"),
    "batch": (["--per-proc-batch-size", "0"], "--per-proc-batch-size 0: must be 1 or greater, or auto"),
    "half": (["--network-dtype", "fp16"], "--network-dtype fp16 needs a CUDA device"),
    "graphs": (["--cuda-graphs"], "--cuda-graphs needs a CUDA device"),
    "two precisions": (
        ["--mixed-precision", "bf16", "--network-dtype", "bf16"],
        "--mixed-precision bf16 excludes --network-dtype bf16",
    ),
    "unknown": (["--cfg-scal", "2"], "--cfg-scal: unknown argument; did you mean --cfg-scale?"),
    "checkpoint": (["--ckpt", "nowhere.pt"], r"nowhere\.pt: no such file or folder"),
    "codec": (["--vae", "nowhere"], "nowhere"),
}


def test_contradictions_are_named(checkpoint, tmp_path, monkeypatch):
    for more, text in BAD.values():
        with pytest.raises(InputError, match=text):
            run_generate(flags(checkpoint, tmp_path, "bad", *more), monkeypatch)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["--cfg-scale", "--cls-cfg-scale", "--guidance-low", "--guidance-high"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "much"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}: '{value}' is no finite number"):
        settings_of(["--ckpt", "x.pt", name, value])


def test_a_scale_of_the_class_token_alone_is_warned_of(capsys):
    for flags in ([], ["--cfg-scale", "2"], ["--cfg-scale", "2", "--cls-cfg-scale", "3"], ["--cls-cfg-scale", "0"]):
        settings_of(["--ckpt", "x.pt", *flags]).warn_of_unused_scale()
    assert capsys.readouterr().err == ""
    settings_of(["--ckpt", "x.pt", "--cls-cfg-scale", "2.3"]).warn_of_unused_scale()
    assert "warning: --cls-cfg-scale 2.3 has no effect: only --cfg-scale above 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exp_name", "begins"),
    [
        ("reg", "reg-0000012-ema-sde"),
        ("../../evil", "evil-0000012"),
        ("/evil", "evil-0"),
        ("..", "..-0"),
        (7, "0012-0"),
    ],
)
def test_a_checkpoint_does_not_choose_where_to_write(exp_name, begins):
    checkpoint = {"args": argparse.Namespace(exp_name=exp_name), "steps": 12}
    name = default_name(settings_of(["--ckpt", "a/0012.pt"]), checkpoint)
    assert name.startswith(begins) and "/" not in name


@pytest.fixture
def untrained(tmp_path):
    """The checkpoint of a network of 3 classes on 8 x 8 pixels."""
    saved = content(randomise(small(in_channels=3, num_classes=3)), codec=PixelCodec().format.to_json())
    save_checkpoint(tmp_path / "0000012.pt", saved)
    return tmp_path / "0000012.pt"


def test_a_set_is_completed_with_its_own_checkpoint_only(untrained, tmp_path, monkeypatch):
    run_generate(flags(untrained, tmp_path, "a"), monkeypatch)
    moved = untrained.rename(tmp_path / "moved.pt")
    run_generate(flags(moved, tmp_path, "a", "--num-fid-samples", "8"), monkeypatch)
    saved, size = load_checkpoint(moved), moved.stat().st_size
    saved["ema"]["final_layer.linear.bias"] = saved["ema"]["final_layer.linear.bias"] + 1
    save_checkpoint(moved, saved)
    assert moved.stat().st_size == size
    with pytest.raises(InputError, match="made with checkpoint_sha256"):
        run_generate(flags(moved, tmp_path, "a"), monkeypatch)


def test_samples_that_are_not_finite_are_no_images(untrained, tmp_path, monkeypatch):
    saved = load_checkpoint(untrained)
    saved["ema"]["final_layer.linear.bias"] = torch.full_like(saved["ema"]["final_layer.linear.bias"], torch.nan)
    save_checkpoint(untrained, saved)
    with pytest.raises(InputError, match=r"0000012\.pt: its samples are not finite"):
        run_generate(flags(untrained, tmp_path, "a", "--save-cls"), monkeypatch)
    assert not (tmp_path / "samples" / "a" / "images").exists()


@pytest.mark.parametrize("missing", ["REF_BATCH", "INCEPTION"])
def test_a_missing_file_is_told_before_images_are_made(tmp_path, missing):
    (tmp_path / "there").write_text("")
    files = {name: str(tmp_path / "there") for name in ("CKPT", "REF_BATCH", "INCEPTION")}
    environment = {**os.environ, **files, missing: "nowhere.npz", "NUM_GPUS": "0"}
    result = subprocess.run(["bash", "eval.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "eval.sh: error: nowhere.npz: no such file\n")


def test_coherence_of_samples(checkpoint, shared_data, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a", "--coherence", str(shared_data)), monkeypatch)
    scores = json.loads((tmp_path / "samples/a/coherence.json").read_text())
    tokens = np.load(tmp_path / "samples/a/cls_tokens.npy")
    args = load_checkpoint(checkpoint)["args"]
    encoder = load_encoder(args.enc_type, 16, args.enc_weights)
    paths = sorted((tmp_path / "samples/a/images").glob("*.png"))
    pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    cosines = torch.cosine_similarity(torch.from_numpy(tokens), encoder(pixels).cls_token)
    assert scores["coherence"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert set(scores) == {"coherence", "coherence_shuffled", "coherence_class_mean", "cls_tokens_right"}
    with pytest.raises(InputError, match="--data-dir nowhere: no such folder"):
        run_generate(flags(checkpoint, tmp_path, "b", "--coherence", "nowhere"), monkeypatch)


def test_a_folder_of_other_settings_is_refused(checkpoint, tmp_path, monkeypatch):
    run_generate(flags(checkpoint, tmp_path, "a"), monkeypatch)
    before = hashes(tmp_path / "samples" / "a")
    with pytest.raises(InputError, match="made with num_steps 3, not 4"):
        run_generate(flags(checkpoint, tmp_path, "a", "--num-steps", "4"), monkeypatch)
    with pytest.raises(InputError, match="made with global_seed 0, not 1"):
        run_generate(flags(checkpoint, tmp_path, "a", "--global-seed", "1"), monkeypatch)
    assert hashes(tmp_path / "samples" / "a") == before
