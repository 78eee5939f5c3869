import argparse
import json
import subprocess
import sys

import pytest
import torch

import export
from common.classes import ClassSet
from common.errors import InputError
from common.io import sha256_of
from models.autoencoder import LatentFormat, PixelCodec, load_codec
from models.checkpoint import (
    checkpoint_classes,
    load_checkpoint,
    load_model,
    load_with_digest,
    save_checkpoint,
    saved_settings,
)
from models.checksums import checksum_path
from models.conditioning import is_unconditional
from models.exported_codec import export_codec
from models.interpolant import Interpolant
from tests.conftest import ROOT
from tests.test_autoencoder import save_kl
from tests.test_checkpoint import content, published
from tests.test_sit import inputs, randomise, small


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a network of 3 classes on 8 x 8 pixels."""
    model = randomise(small(in_channels=3, num_classes=3)).eval()
    saved = content(model, path_type="cosine", codec=PixelCodec().format.to_json(), resolution=8)
    save_checkpoint(tmp_path / "0000012.pt", saved)
    return tmp_path / "0000012.pt"


@pytest.mark.parametrize("dest", ["network.safetensors", "folder"])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_exported_network_is_the_same(checkpoint, tmp_path, dest, weights):
    export.export(checkpoint, tmp_path / dest, weights)
    ours, theirs = load_model(checkpoint, weights), load_model(tmp_path / dest)
    assert ours.encoder_depth == theirs.encoder_depth
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    x, t, y, cls = inputs(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours(x, t, y, cls)[0:1], theirs(x, t, y, cls)[0:1], strict=True))


def test_a_published_checkpoint_is_exported(tmp_path):
    from models.sit import SiT_models

    saved = published(SiT_models["SiT-S/2"](z_dims=[768], cls_token_dim=768))
    saved["args"].cfg_prob = 1.0  # had no effect
    torch.save(saved, tmp_path / "reg.pt")
    export.export(tmp_path / "reg.pt", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["codec"]["codec"], config["steps"], config["path_type"]) == ("sd-vae-ft-mse", 400_000, "linear")
    assert load_model(tmp_path / "folder").num_classes == 1000 and "cfg_prob" not in config
    assert "SiT-S/2" in (tmp_path / "folder" / "README.md").read_text()


def test_an_export_carries_that_its_network_was_trained_without_labels(checkpoint, tmp_path):
    saved = load_checkpoint(checkpoint)
    for name, cfg_prob in (("with", 0.1), ("without", 1.0)):
        saved["args"].cfg_prob = cfg_prob
        save_checkpoint(tmp_path / f"{name}.pt", saved)
        export.export(tmp_path / f"{name}.pt", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        card, unconditional = (tmp_path / name / "README.md").read_text(), name == "without"
        assert config.get("cfg_prob") == (1 if unconditional else None)
        assert is_unconditional(saved_settings(load_checkpoint(tmp_path / name))) is unconditional
        assert ("\nlabels, trained for 12 steps; ema" in card) is ("(num_images=3).images" in card) is unconditional
        assert ("3\nclasses, trained for 12 steps; ema" in card) is ("([0, 1, 2], guid" in card) is not unconditional
    config = json.loads((tmp_path / "without/config.json").read_text())
    (tmp_path / "without/config.json").write_text(json.dumps({**config, "cfg_prob": 0.1}))
    (tmp_path / "without/checksums.sha256").unlink()
    with pytest.raises(InputError, match=r"has cfg_prob 0\.1, but the header of model\.safetensors has 1\.0"):
        load_checkpoint(tmp_path / "without")


def write_earlier_export(folder, model, without=()):
    """Write an export in the format used before checkpoints had the entry `network`; return its configuration."""
    from safetensors.torch import save_file

    config = {
        "_class_name": "SiT", "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 3,
        "num_heads": 4, "mlp_ratio": 4.0, "num_classes": 5, "encoder_depth": 1, "z_dims": [24], "projector_dim": 16,
        "cls_token_dim": 24, "qk_norm": False, "learnable_token": False, "path_type": "cosine", "resolution": 8,
        "codec": PixelCodec().format.to_json(), "steps": 12, "weights": "ema",
    }  # fmt: skip
    config = {name: value for name, value in config.items() if name not in without}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header = {"format": "pt", "config": json.dumps(config)}
    for path in (folder / "model.safetensors", folder / "alone.safetensors"):
        save_file(model.state_dict(), path, header)
    return config


@pytest.mark.parametrize("without", [(), ("learnable_token",)], ids=["latest", "oldest"])
def test_an_earlier_export_loads(tmp_path, without):
    model = randomise(small(num_heads=4, encoder_depth=1)).eval()
    config = write_earlier_export(tmp_path / "folder", model, without)
    x, t, y, cls = inputs(model)
    for path in (tmp_path / "folder", tmp_path / "folder" / "alone.safetensors"):
        rebuilt = load_model(path)
        assert rebuilt.config == model.config
        assert torch.equal(rebuilt(x, t, y, cls).velocity, model(x, t, y, cls).velocity)
        assert load_checkpoint(path)["args"] == argparse.Namespace(**config)


def test_the_configuration_of_an_export_keeps_its_fields(checkpoint, tmp_path):
    config = write_earlier_export(tmp_path / "before", small())
    export.main(["--ckpt", str(checkpoint), "--dest", str(tmp_path / "folder")])
    assert list(config) == [k for k in json.loads((tmp_path / "folder" / "config.json").read_text()) if k != "exp_name"]


def test_a_contradiction_in_an_export_is_refused(checkpoint, tmp_path):
    export.export(checkpoint, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "depth": 2}))
    with pytest.raises(InputError, match=r"config\.json: damaged; its SHA-256 is .*checksums\.sha256 has"):
        load_model(tmp_path / "folder")
    (tmp_path / "folder" / "checksums.sha256").unlink()
    with pytest.raises(InputError, match=r"config\.json: has depth 2, but the header of model\.safetensors has 3"):
        load_model(tmp_path / "folder")


def test_errors_name_the_flag(checkpoint, tmp_path):
    for flags, text in (
        (["--ckpt", "x.pt"], "--dest"),
        (["--ckpt", "x.pt", "--dest", "x", "--weights", "best"], "--weights.*ema"),
        (["--ckpt", "x.pt", "--dest", "x.pt"], r"--dest x\.pt: allowed: a name that ends in \.safetensors, or"),
        (["--ckpt", "x.pt", "--dest", "x", "--dst", "x"], "--dst: unknown argument; did you mean --dest"),
    ):
        with pytest.raises(InputError, match=text):
            export.main(flags)


def test_errors_name_the_damaged_file(checkpoint, tmp_path):
    export.export(checkpoint, tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    complete = path.read_bytes()
    (tmp_path / "folder" / "checksums.sha256").unlink()
    for broken in (complete[: len(complete) // 2], b"", b"\xff" * 100):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
            load_model(tmp_path / "folder")
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        load_model(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(tmp_path / "empty")


def test_folders_and_files_of_others_are_named(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(InputError, match=r"other: a diffusers pipeline \(DiTPipeline\) without config\.json"):
        load_model(folder)
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(InputError, match=r"config\.json: the configuration of another class, 'DiTTransformer2DModel'"):
        load_model(folder)
    for data, text in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
    ):
        for name in ("x.safetensors", "x.pt"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InputError, match=rf"{name}: not a .* but {text}"):
                load_model(tmp_path / name)
    (tmp_path / "y.pt").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"y\.pt: .* needs the ending \.safetensors"):
        load_model(tmp_path / "y.pt")


def test_a_run_is_not_resumed_from_an_export(checkpoint, tmp_path):
    from training.state import load_resumable

    export.export(checkpoint, tmp_path / "folder")
    with pytest.raises(InputError, match=r"folder: cannot be resumed, it lacks model, opt; .* new run by --init-from"):
        load_resumable(tmp_path / "folder")


def test_nothing_is_overwritten_and_errors_are_one_line(checkpoint, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="there is something already"):
        export.export(checkpoint, tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    checksum_path(tmp_path / "new.safetensors").write_text("mine")
    with pytest.raises(InputError, match=r"--dest .*new\.safetensors: .*new\.safetensors\.sha256 exists already"):
        export.export(checkpoint, tmp_path / "new.safetensors")
    with pytest.raises(InputError, match=r"--dest .*there\.safetensors.* is not a writable folder"):
        export.export(tmp_path / "nowhere.pt", tmp_path / "there.safetensors" / "below")
    save_checkpoint(tmp_path / "odd.pt", {"args": argparse.Namespace()})
    command = [sys.executable, "export.py", "--ckpt", str(tmp_path / "odd.pt"), "--dest", str(tmp_path / "x")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("export.py: error: ") and not (tmp_path / "x").exists()


def test_a_local_codec_is_part_of_the_export(tmp_path, capsys):
    save_kl(tmp_path / "codec")
    codec = load_codec(str(tmp_path / "codec"))
    model = randomise(small(in_channels=4, num_classes=3)).eval()
    save_checkpoint(tmp_path / "0000012.pt", content(model, codec=codec.format.to_json()))
    export.export(tmp_path / "0000012.pt", tmp_path / "folder")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "folder" / "vae" / name).read_bytes() == (tmp_path / "codec" / name).read_bytes()
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["codec"] == {**codec.format.to_json(), "codec": "vae"}
    moved = (tmp_path / "folder").rename(tmp_path / "moved")
    (tmp_path / "codec").rename(tmp_path / "gone")
    saved = load_checkpoint(moved)["args"].codec
    assert saved == {**codec.format.to_json(), "codec": str(moved / "vae")}
    export.export(moved, tmp_path / "again")  # also of an export
    assert (tmp_path / "again" / "vae" / "config.json").exists() and capsys.readouterr().err == ""

    export.export(tmp_path / "0000012.pt", tmp_path / "without")
    assert "is not exported, because it is not on this machine" in capsys.readouterr().err
    assert str(tmp_path) not in (tmp_path / "without" / "config.json").read_text()


def test_one_bit_of_an_export_is_noticed(tmp_path):
    codec = load_codec(str(save_kl(tmp_path / "codec")))
    save_checkpoint(tmp_path / "0000012.pt", content(small(in_channels=4), codec=codec.format.to_json()))
    for dest in ("folder", "network.safetensors"):
        export.export(tmp_path / "0000012.pt", tmp_path / dest)
    subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=tmp_path / "folder", check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", "network.safetensors.sha256"], cwd=tmp_path, check=True)
    network = tmp_path / "network.safetensors"
    assert load_with_digest(network)[1] == sha256_of(network)
    files = ("network.safetensors", "folder/model.safetensors", "folder/vae/config.json")
    for name in (*files, "folder/vae/diffusion_pytorch_model.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(InputError, match=rf"{name}: damaged; .*sha256 has"):
            load_checkpoint(network)
            load_codec(load_checkpoint(tmp_path / "folder")["args"].codec["codec"])
        (tmp_path / name).write_bytes(data)


def test_a_network_that_is_not_finite_is_not_exported(checkpoint, tmp_path):
    saved = load_checkpoint(checkpoint)
    saved["ema"] = {**saved["ema"], "pos_embed": saved["ema"]["pos_embed"] * torch.nan}
    save_checkpoint(checkpoint, saved)
    with pytest.raises(InputError, match=r"0000012\.pt: pos_embed contains numbers that are not finite"):
        export.export(checkpoint, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    export.export(checkpoint, tmp_path / "folder", "model")


def test_a_codec_with_a_name_stays_a_name(checkpoint, tmp_path):
    for name in ("sd-vae-ft-mse", "pixel", "owner/name"):
        saved = {**load_checkpoint(checkpoint)["args"].codec, "codec": name}
        assert export_codec(LatentFormat.from_json(saved), tmp_path) == saved


@pytest.mark.parametrize("dest", ["network.safetensors", "folder"])
def test_the_classes_are_exported(checkpoint, tmp_path, dest):
    classes = ClassSet((0, 2), ("tench", "jay"))
    save_checkpoint(checkpoint, {**load_checkpoint(checkpoint), "classes": classes.to_json()})
    export.export(checkpoint, tmp_path / dest)
    assert checkpoint_classes(load_checkpoint(tmp_path / dest), 3) == classes
    if dest == "folder":  # the command in its description has labels of the training data
        card = (tmp_path / dest / "README.md").read_text()
        assert 'REGPipeline.from_pretrained("folder")([0, 2], guidance' in card and ", 2\nclasses, " in card


def test_exports_of_a_network_are_equal_files(checkpoint, tmp_path):
    for number in range(4):
        export.export(checkpoint, tmp_path / f"{number}.safetensors")
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)}) == 1


@pytest.mark.parametrize(("shift", "kept"), [(1.5, {"time_shift": 1.5}), (1.0, {}), (None, {})])
def test_a_time_shift_is_exported_unless_there_is_none(tmp_path, shift, kept):
    model = randomise(small(in_channels=3, num_classes=3)).eval()
    saved = content(model, path_type="cosine", codec=PixelCodec().format.to_json(), resolution=8, time_shift=shift)
    save_checkpoint(tmp_path / "0000012.pt", saved)
    export.export(tmp_path / "0000012.pt", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert {name: value for name, value in config.items() if name == "time_shift"} == kept
    settings = vars(load_checkpoint(tmp_path / "folder")["args"])
    assert Interpolant.of_run(settings).time_shift == (shift or 1.0)
