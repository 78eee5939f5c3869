import argparse
import importlib
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import torch

from common.classes import ClassSet
from common.errors import InputError
from common.io import sha256_of
from export import describe, export
from models import checkpoint, ema
from models.checkpoint import (
    OLD_BLOCKS,
    build_model,
    checkpoint_classes,
    is_legacy,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_with_digest,
    network_config,
    newest_of_run,
    save_checkpoint,
    steps_done,
)
from models.sit import SiT, SiT_models
from tests.test_sit import inputs, randomise, small


def content(model: SiT, **args) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    x, t, y, cls = inputs(model)
    model(x, t, y, cls, t_cls=t if model.config.cls_lead else None).velocity.sum().backward()
    optimizer.step()
    args = argparse.Namespace(**{"num_heads": 2, "encoder_depth": 2, "exp_name": "x", "cls": 0.03, **args})
    return {
        "model": model.state_dict(), "ema": ema.averaged_copy(model).state_dict(), "opt": optimizer.state_dict(),
        "args": args, "steps": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"cls_token_dim": None}, {"z_dims": [24, 16]}, {"z_dims": []}]
)
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_network_is_rebuilt_from_its_file_alone(tmp_path, options, weights):
    model = randomise(small(**options)).eval()
    save_checkpoint(tmp_path / "0000012.pt", content(model))
    rebuilt = load_model(tmp_path / "0000012.pt", weights)
    x, t, y, cls = inputs(model)
    for ours, theirs in zip(model(x, t, y, cls), rebuilt(x, t, y, cls), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not rebuilt.training and not any(p.requires_grad for p in rebuilt.parameters())


def published(model: SiT) -> dict:
    """Return a checkpoint as the published code writes it, whose args lack our settings."""
    args = argparse.Namespace(
        model="SiT-S/2", num_classes=1000, encoder_depth=4, resolution=256, path_type="linear", qk_norm=False,
        cls=0.03, enc_type="dinov2-vit-b", output_dir="exps", mixed_precision="fp16", report_to="wandb",
    )  # fmt: skip
    return {"model": model.state_dict(), "ema": model.state_dict(), "opt": {}, "args": args, "steps": 400_000}


def test_a_published_checkpoint_loads_unchanged(tmp_path):
    model = SiT_models["SiT-S/2"](z_dims=[768], cls_token_dim=768)
    torch.save(published(model), tmp_path / "reg.pt")
    rebuilt = load_model(tmp_path / "reg.pt")
    assert rebuilt.blocks[0].attn.num_heads == 6 and rebuilt.encoder_depth == 4 and rebuilt.input_size == 32
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), model.parameters(), strict=True))


def in_old_names(state: dict, encoder_depth: int) -> dict:
    """Return a state dict with the names of the later blocks in older REPA checkpoints."""

    def old_name(key):
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= encoder_depth:
            return OLD_BLOCKS + ".".join([str(int(parts[1]) - encoder_depth), *parts[2:]])
        return key

    return {old_name(key): value for key, value in state.items()}


def test_an_older_repa_checkpoint_loads(tmp_path):
    model = randomise(small(cls_token_dim=None)).eval()
    checkpoint = content(model)
    for name in ("model", "ema"):
        checkpoint[name] = in_old_names(checkpoint[name], 2)
    assert "decoder_blocks.0.attn.qkv.weight" in checkpoint["ema"]
    torch.save(checkpoint, tmp_path / "repa.pt")
    assert is_legacy(load_checkpoint(tmp_path / "repa.pt"))
    rebuilt = load_model(tmp_path / "repa.pt")
    x, t, y, _ = inputs(model)
    assert torch.equal(rebuilt(x, t, y).velocity, model(x, t, y).velocity)


def test_encoder_depth_comes_from_the_names_of_an_older_repa_checkpoint():
    with torch.device("meta"):
        state = SiT_models["SiT-S/8"](z_dims=[6]).state_dict()  # the preset has encoder_depth 4
    assert network_config(state).encoder_depth == 4
    assert network_config(in_old_names(state, 7)).encoder_depth == 7
    assert describe({"ema": in_old_names(state, 7)}, "ema", "repa.pt")["encoder_depth"] == 7


ODD = {
    "a block's name": (lambda file: file["ema"].update({"blocks.x.attn.qkv.weight": torch.zeros(1)}), "blocks.x.attn"),
    "a block's number": (lambda file: file["ema"].update({f"blocks.{10**9}.x": torch.zeros(1)}), "blocks.1000000000.x"),
    "no tensor": (lambda file: file["ema"].update({"pos_embed": "text"}), "pos_embed in its weights is a str"),
    "a scalar": (lambda file: file["ema"].update({"pos_embed": torch.tensor(1.0)}), "not a SiT's weights"),
    "empty": (lambda file: file["ema"].update({"blocks.0.attn.q_norm.weight": torch.zeros(0)}), "not a SiT's weights"),
    "heads": (lambda file: setattr(file["args"], "num_heads", "2"), "its num_heads is '2'; expected a whole number"),
    "depth": (lambda file: setattr(file["args"], "encoder_depth", 1.5), "its encoder_depth is 1.5"),
    "path": (lambda file: setattr(file["args"], "path_type", "vp"), "path_type 'vp' is unknown; allowed: linear, cosi"),
    "settings": (lambda file: file.update(args="text"), "args is a str; expected an argparse.Namespace"),
    "steps": (lambda file: file.update(steps="many"), "its steps are 'many'; expected a whole number"),
    "many steps": (lambda file: file.update(steps=10**5000), "its steps are a very long int; expected a whole number"),
    "path list": (lambda file: setattr(file["args"], "path_type", ["linear"]), r"path_type \['linear'\] is unknown"),
    "shift": (
        lambda file: setattr(file["args"], "time_shift", True),
        "its time_shift is True; expected a number",
    ),
    "latents": (lambda file: setattr(file["args"], "latents_folder", 5), "setting latents_folder of its run is 5; exp"),
    "auto shift": (lambda file: setattr(file["args"], "time_shift", "auto"), "its time_shift is 'auto'; expected a"),
    "negative shift": (lambda file: setattr(file["args"], "time_shift", -1.0), r"its time_shift is -1\.0; expected"),
    "resolution": (lambda file: setattr(file["args"], "resolution", "x"), "setting resolution of its run is 'x'"),
    "tensor": (lambda file: setattr(file["args"], "any", torch.zeros(2)), "the setting any of its run is a tensor"),
    "dtype": (lambda file: file["ema"].update(pos_embed=torch.zeros(1, 17, 32).char()), "pos_embed has dtype int8"),
    "labels": (lambda file: file.update(classes={"labels": [[0]]}), r"its classes are \{'labels': .*; expected"),
    "codec": (lambda file: setattr(file["args"], "codec", [1]), r"latent format \[1\]: must have exactly the fields"),
}


@pytest.mark.parametrize("spoil, text", ODD.values(), ids=ODD)
def test_errors_name_invalid_content(spoil, text):
    checkpoint = content(small())
    spoil(checkpoint)
    with pytest.raises(InputError, match=rf"odd\.pt: .*{text}"):
        describe(checkpoint, "ema", "odd.pt")  # reads all that export.py, generate.py and the pipeline read


def test_content_and_digest_belong_to_one_file(tmp_path, monkeypatch):
    """best.pt is replaced after it was opened: the digest is that of the file that was read."""
    for number in (1, 2):
        state = {"ema": small().state_dict(), "args": argparse.Namespace(), "steps": number}
        save_checkpoint(tmp_path / f"{number}.pt", state)
    digests = {number: sha256_of(tmp_path / f"{number}.pt") for number in (1, 2)}
    assert load_with_digest(tmp_path / "1.pt")[1] == digests[1]
    read = checkpoint.read_weights_file

    def replaced(path, file, **options):
        for name in ("2.pt", "2.pt.sha256"):
            if (tmp_path / name).exists():
                (tmp_path / name).replace(tmp_path / name.replace("2", "1", 1))
        return read(path, file, **options)

    monkeypatch.setattr(checkpoint, "read_weights_file", replaced)
    content, digest = load_with_digest(tmp_path / "1.pt")
    assert (content["steps"], digest) == (1, digests[1])
    content, digest = load_with_digest(tmp_path / "1.pt")
    assert (content["steps"], digest) == (2, digests[2])


def test_weights_that_are_not_finite_are_refused():
    state = small().state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = torch.inf
    with pytest.raises(InputError, match=r"odd\.pt: blocks\.1\.mlp\.fc1\.bias contains numbers that are not finite"):
        build_model({"ema": state, "args": argparse.Namespace(num_heads=2)}, source="odd.pt")
    state["blocks.1.mlp.fc1.bias"] = torch.full((128,), 1e300, dtype=torch.float64)  # not finite as float32
    with pytest.raises(InputError, match=r"odd\.pt: blocks\.1\.mlp\.fc1\.bias contains numbers that are not finite"):
        build_model({"ema": state, "args": argparse.Namespace(num_heads=2)}, source="odd.pt")


def test_a_bare_state_dict_loads_if_a_preset_has_its_shape(tmp_path):
    model = SiT_models["SiT-S/8"](num_classes=3)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert load_model(tmp_path / "bare.pt").num_classes == 3
    torch.save(small().state_dict(), tmp_path / "unknown.pt")
    with pytest.raises(InputError, match="fit no preset"):
        load_model(tmp_path / "unknown.pt")


def test_optimizer_state_is_by_index_without_the_position_table(tmp_path):
    state = content(small())["opt"]
    assert state["param_groups"][0]["params"][0] == 0 and 0 not in state["state"] and 1 in state["state"]


def test_a_network_is_inferred_from_shapes():
    model = small(in_channels=3, num_classes=7, z_dims=[24, 8], mlp_ratio=2.0)
    found = network_config({"ema": model.state_dict(), "args": {"num_heads": 2, "encoder_depth": 2}})
    assert found == model.config
    assert found.to_json() == {
        "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 2,
        "mlp_ratio": 2.0, "num_classes": 7, "encoder_depth": 2, "z_dims": [24, 8], "projector_dim": 16,
        "cls_token_dim": 24, "qk_norm": False, "learnable_token": False,
    }  # fmt: skip
    state = small(cls_token_dim=None, learnable_token=True).state_dict()
    learned = network_config({"ema": state, "args": {"num_heads": 2}})
    assert (learned.input_size, learned.cls_token_dim, learned.learnable_token) == (8, None, True)


@pytest.mark.parametrize(
    "options",
    [{}, {"cls_token_dim": None, "learnable_token": True}, {"z_dims": [], "projector_dim": 5}, {"mlp_ratio": 2.7}],
)
def test_a_network_is_rebuilt_from_its_entry(tmp_path, options):
    model = randomise(small(**options, num_heads=8, encoder_depth=1)).eval()
    # Without the entry, the network would have another depth of the projectors.
    saved = {"network": model.config.to_json(), "ema": model.state_dict(), "args": argparse.Namespace(encoder_depth=2)}
    save_checkpoint(tmp_path / "0000012.pt", saved)
    for path in (tmp_path / "0000012.pt", tmp_path / "folder", tmp_path / "file.safetensors"):
        if not path.exists():
            export(tmp_path / "0000012.pt", path)
        rebuilt = load_model(path)
        assert rebuilt.config == model.config
        x, t, y, cls = inputs(model)
        assert torch.equal(rebuilt(x, t, y, cls).velocity, model(x, t, y, cls).velocity)


def test_settings_of_numpy_and_paths_are_read(tmp_path):
    model = small()
    args = argparse.Namespace(num_heads=np.int64(2), encoder_depth=np.int32(2), path_type="linear", output_dir=tmp_path)
    torch.save({"ema": model.state_dict(), "args": args, "steps": np.int64(5)}, tmp_path / "numpy.pt")
    checkpoint = load_checkpoint(tmp_path / "numpy.pt")
    assert build_model(checkpoint).config.num_heads == 2 and steps_done(checkpoint) == 5
    assert checkpoint["args"].output_dir == str(tmp_path)


def test_the_weights_that_do_not_fit_are_counted():
    state = small(depth=2).state_dict() | {f"blocks.1.extra.{k}": torch.zeros(1) for k in range(9)}
    del state["t_embedder.mlp.2.bias"]
    text = r"describes; missing: 1 \(t_embedder\.mlp\.2\.bias\); unexpected: 9 \(blocks\.1\.extra\.0, .* and 5 more\)$"
    with pytest.raises(InputError, match=rf"odd\.pt: the weights do not fit the network that it {text}"):
        build_model({"ema": state, "args": argparse.Namespace(num_heads=2)}, source="odd.pt")


CONTRADICTIONS = {
    "depth": ({"depth": 4}, "network has depth 4, but the weights have 3"),
    "huge depth": ({"depth": 10**12}, f"its depth is {10**12}; expected a whole number up to 2147483647"),
    "classes": ({"num_classes": 6}, "network has num_classes 6, but the weights have 5"),
    "encoders": ({"z_dims": [24, 24]}, r"network has z_dims \(24, 24\), but the weights have \(24,\)"),
    "slot": ({"cls_token_dim": None}, "network has cls_token_dim None, but the weights have 24"),
    "norm": ({"qk_norm": True}, "network has qk_norm 'layer', but the weights have none"),
    "heads": ({"num_heads": 3}, "network: hidden_size 32 is not a multiple of num_heads 3"),
    "mlp": ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight.*\[128, 32\].*\[64, 32\]"),
    "infinite mlp": ({"mlp_ratio": float("inf")}, "its mlp_ratio is inf; expected a number above 0"),
    "huge mlp": ({"mlp_ratio": 1e9}, r"blocks\.0\.mlp\.fc1|sizes that are not possible"),
    "huge projectors": ({"projector_dim": 10**9}, "network has projector_dim 1000000000, but the weights have 16"),
    "widths": ({"z_dims": ["24"]}, r"its z_dims is \['24'\]; expected whole numbers"),
    "unknown": ({"width": 3}, "unknown fields width"),
}


@pytest.mark.parametrize("change, text", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_an_entry_that_contradicts_the_weights_is_refused(change, text):
    model = small()
    checkpoint = {"network": {**model.config.to_json(), **change}, "ema": model.state_dict()}
    with pytest.raises(InputError, match=rf"(?s)odd\.pt: .*{text}"):
        build_model(checkpoint, source="odd.pt")


def test_an_entry_that_contradicts_the_run_is_refused():
    """Weights do not show the number of heads."""
    checkpoint = {"network": small().config.to_json(), "ema": small().state_dict(), "args": {"num_heads": 4}}
    with pytest.raises(InputError, match=r"odd\.pt: network has num_heads 2, but its run had 4"):
        network_config(checkpoint, source="odd.pt")


@pytest.mark.parametrize("entry", ["text", 3, ["depth"], {}])
def test_an_entry_of_another_type_is_refused(entry):
    with pytest.raises(InputError, match=r"odd\.pt: network: missing or unknown fields .*cls_token_dim, depth"):
        build_model({"network": entry, "ema": small().state_dict()}, source="odd.pt")


def test_errors_name_missing_weights():
    with pytest.raises(InputError, match="no ema weights of a SiT in it; it holds model; --weights model takes"):
        build_model({"model": small().state_dict()}, "ema")
    state = small().state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.fc2\.bias"):
        build_model({"ema": state, "args": argparse.Namespace(num_heads=2)})


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "0000012.pt"
    save_checkpoint(path, content(small()))
    complete = path.read_bytes()
    path.write_bytes(complete[: int(len(complete) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(InputError, match=r"0000012\.pt"):
        load_checkpoint(path)


@pytest.mark.parametrize("data", [b"hello", b"\x89PNG\r\n", b"PK\x03\x04rest", pickle.dumps({"a": 1})])
def test_another_kind_of_file_is_refused(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")


class Malicious:
    def __init__(self, target, *arguments):
        self.target, self.arguments = target, arguments

    def __reduce__(self):
        return self.target, self.arguments


@pytest.mark.parametrize(
    "trap",
    [
        lambda flag: Malicious(os.system, f"touch {flag}"),
        lambda flag: Malicious(exec, f"open({str(flag)!r}, 'w')"),
        lambda flag: Malicious(eval, f"open({str(flag)!r}, 'w')"),
        lambda flag: Malicious(open, str(flag), "w"),
        lambda flag: Malicious(getattr, argparse.Namespace(a=1), "a"),
        lambda flag: Malicious(subprocess.Popen, ["touch", str(flag)]),
        lambda flag: Malicious(importlib.import_module, "antigravity"),
        lambda flag: Malicious(shutil.copy, __file__, str(flag)),
        lambda flag: Malicious(pickle.loads, pickle.dumps(Malicious(os.system, f"touch {flag}"))),
        lambda flag: Malicious(os.mkdir, str(flag)),
    ],
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_checkpoint_is_refused_not_run(tmp_path, trap, as_zip):
    flag, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"ema": {}, "args": trap(flag)}
    if as_zip:
        torch.save(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"evil\.pt: refused"):
        load_checkpoint(path)
    assert not flag.exists()


def test_missing_file_and_latest(tmp_path):
    with pytest.raises(
        InputError, match=r"none\.pt: no such file or folder; allowed: a checkpoint file, a run's folder"
    ):
        load_checkpoint(tmp_path / "none.pt")
    assert list_checkpoints(tmp_path) == []
    for name in ("0000010.pt", "0000200.pt", "best.pt", ".0000300.pt.12.tmp"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path)[-1].name == "0000200.pt"


def test_a_run_is_named_by_its_folder(tmp_path):
    """The newest checkpoint is meant, for the folder of the run and for that of its checkpoints."""
    models = [randomise(small(depth=depth)) for depth in (2, 3)]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text("{}")
    with pytest.raises(InputError, match=r"run: a training run without a checkpoint; allowed: one with .*NNNNNNN\.pt"):
        load_checkpoint(tmp_path / "run")
    for model, step in zip(models, (10, 200), strict=True):
        save_checkpoint(tmp_path / "run" / "checkpoints" / f"{step:07d}.pt", content(model))
    newest = tmp_path / "run" / "checkpoints" / "0000200.pt"
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest):
        assert load_model(path).config.depth == models[1].config.depth
        assert load_with_digest(path)[1] == sha256_of(newest)
        expected = [] if path == newest else [f"{path}: a training run; its newest checkpoint is {newest}"]
        assert newest_of_run(path) == expected
    with pytest.raises(InputError, match=r"contains training runs \(run\); give the folder of one"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_networks_are_removed(tmp_path, prefix):
    model = randomise(small()).eval()
    saved = content(model)
    for part in ("model", "ema"):
        saved[part] = {prefix + name: value for name, value in saved[part].items()}
    save_checkpoint(tmp_path / "wrapped.pt", saved)
    x, t, y, cls = inputs(model)
    assert torch.equal(load_model(tmp_path / "wrapped.pt")(x, t, y, cls).velocity, model(x, t, y, cls).velocity)


def test_classes_of_a_checkpoint():
    classes = ClassSet((0, 2), ("a", "b"))
    assert checkpoint_classes({"classes": classes.to_json()}, 3) == classes
    assert checkpoint_classes({}, 3) == ClassSet.of_network(3)
    with pytest.raises(InputError, match=r"a\.pt: its classes contain label 2, but the network has labels 0 \.\. 1"):
        checkpoint_classes({"classes": classes.to_json()}, 2, "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: its classes are \[1\]"):
        checkpoint_classes({"classes": [1]}, 2, "a.pt")
