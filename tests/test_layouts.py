"""Whose weights a file holds: SiT's are converted exactly, others are named, and nothing is taken silently."""

import argparse
import math
import shlex

import pytest
import torch
import torch.nn.functional as F

import export
from common.errors import InputError
from models.checkpoint import load_checkpoint, load_model
from models.sit import PRESETS, SiT
from tests.test_sit import randomise, small

HEADS = 6  # of SiT-S


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    """Make SiT-S a small network: the number of heads is not in the weights, so the preset of their shape gives it."""
    monkeypatch.setitem(PRESETS, "S", (2, 48, HEADS))


def theirs(width_of_output: int = 2) -> dict[str, torch.Tensor]:
    """Return random weights of SiT-S/4 in the layout of SiT's authors, for latents of 8 x 8."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "patch_size": 4, "depth": 2, "hidden_size": 48, "num_heads": HEADS, "num_classes": 3}
    state = randomise(SiT(**sizes, z_dims=(), cls_token_dim=None)).state_dict()
    state["t_embedder.mlp.2.weight"] *= 20  # so that time has an effect
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        shape = state[name].shape
        state[name] = 0.1 * torch.randn(width_of_output * shape[0], *shape[1:])
    return state


def reference(state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the output (N, 2 C, H, W) of SiT (arXiv 2401.08740; DiT, arXiv 2212.09748), written plainly."""

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value):
        return F.layer_norm(value, value.shape[-1:], eps=1e-6)

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(time + state["y_embedder.embedding_table.weight"][y])[:, None]
    patch = state["x_embedder.proj.weight"].shape[-1]
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
    for block in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))):
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", c).chunk(6, -1)
        q, k, v = (
            linear(f"{name}.attn.qkv", norm(tokens) * (1 + scale1) + shift1).unflatten(-1, (3, HEADS, -1)).unbind(2)
        )
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attended = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        tokens = tokens + gate1 * linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(tokens) * (1 + scale2) + shift2), approximate="tanh")
        tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    values = linear("final_layer.linear", norm(tokens) * (1 + scale) + shift)  # (N, T, p p 2 C)
    side = x.shape[-1] // patch
    return (
        torch.einsum("nhwpqc->nchpwq", values.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side)))
        .flatten(2, 3)
        .flatten(3, 4)
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "with settings"])
@pytest.mark.parametrize("width", [1, 2], ids=["cut to C channels", "2 C channels"])
def test_weights_of_sit_are_converted_exactly(tmp_path, width, wrapped):
    state = theirs(width)
    settings = argparse.Namespace(model="SiT-S/4", path_type="Linear", prediction="velocity")
    content = {"ema": state, "model": state, "opt": {}, "args": settings} if wrapped else state
    torch.save(content, tmp_path / "SiT-S-4-256.pt")
    export.main(["--layout", "sit", "--ckpt", str(tmp_path / "SiT-S-4-256.pt"), "--dest", str(tmp_path / "sit-s")])
    converted = load_model(tmp_path / "sit-s")
    x, y = torch.randn(9, 4, 8, 8), torch.arange(9) % 4
    t = torch.tensor([0.0, 1e-3, 0.04, 0.1, 0.3, 0.5, 0.7, 0.96, 1.0])
    ours, expected = converted(x, t, y).velocity, -reference(state, x, 1 - t, y)[:, :4]
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - -reference(state, x, t, y)[:, :4]).abs().max() > 1e-2  # time matters
    settings = load_checkpoint(tmp_path / "sit-s")["args"]
    assert (settings.model, settings.path_type, settings.resolution) == ("SiT-S/4", "linear", 64)
    assert "converted from the weights of SiT's authors" in (tmp_path / "sit-s" / "README.md").read_text()


def refusal(tmp_path, content, name="weights.pt", layout="auto") -> str:
    torch.save(content, tmp_path / name)
    with pytest.raises(InputError) as error:
        load_checkpoint(tmp_path / name, layout=layout)
    return str(error.value)


def test_the_refusal_of_published_weights_has_the_command_that_converts_them(tmp_path, monkeypatch):
    text = refusal(tmp_path, theirs(), "SiT 256.pt")
    assert "twice as wide" in text and "DiT's predict noise" in text and "t = 0 is noise" in text
    monkeypatch.chdir(tmp_path)
    command = shlex.split(text.split("`")[1])
    assert command[:2] == ["python", "export.py"] and command[-1] == "SiT 256"
    export.main(command[2:])
    assert load_model("SiT 256").num_classes == 3


def test_the_direction_of_time_of_bare_weights_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (theirs(1), {"ema": theirs(1)}, {"ema": theirs(1), "args": {}}):
        text = refusal(tmp_path, content, "bare.pt")
        assert "the direction of time is unknown" in text
        as_sit, as_reg = (shlex.split(part)[2:] for part in text.split("`")[1::2])
        assert as_sit[:2] == ["--layout", "sit"] and as_reg[:2] == ["--layout", "reg"]
    export.main([*as_reg[:-1], "as-reg"])
    export.main([*as_sit[:-1], "as-sit"])
    weights = [load_model(name).final_layer.linear.weight for name in ("as-reg", "as-sit")]
    assert torch.equal(weights[0], theirs(1)["final_layer.linear.weight"]) and torch.equal(weights[0], -weights[1])
    torch.save({"ema": theirs(1), "args": argparse.Namespace(path_type="linear")}, tmp_path / "ours.pt")
    assert torch.equal(load_model("ours.pt").final_layer.linear.weight, weights[0])


def test_a_safetensors_file_without_a_configuration_is_a_bare_state_dict(tmp_path):
    from safetensors.torch import save_file

    save_file(theirs(1), tmp_path / "sit.safetensors")
    with pytest.raises(InputError, match=r"sit\.safetensors: .*the direction of time is unknown"):
        load_checkpoint(tmp_path / "sit.safetensors")


def test_what_is_not_sit_is_not_converted(tmp_path):
    for content, text in (
        (small().state_dict(), "has projectors.0.0.weight, which SiT's own weights do not have"),
        ({**theirs(1), "feat_rope.freqs_cos": torch.zeros(4, 8)}, "has feat_rope.freqs_cos, which SiT's own weights"),
        ({"ema": theirs(1), "network": {"depth": 1}}, "has the entry network"),
        (
            {"ema": theirs(), "args": argparse.Namespace(path_type="GVP")},
            "trained with path_type 'GVP'; allowed: linear",
        ),
        ({"ema": theirs(), "args": {"prediction": "noise"}}, "trained with prediction 'noise'; allowed: velocity"),
        ({"ema": {"w": torch.zeros(2)}}, "does not hold the weights of a SiT"),
        ({"ema": {**theirs(), "x_embedder.proj.weight": torch.zeros(2)}}, "does not hold the weights of a SiT"),
        ({"ema": {**theirs(), "t_embedder.mlp.0.weight": torch.zeros(4, 3)}}, "does not hold the weights of a SiT"),
    ):
        assert text in refusal(tmp_path, content, layout="sit")
    assert "DiT's by its name" in refusal(tmp_path, theirs(), "DiT-XL-2-256x256.pt", layout="sit")
    assert "twice as wide" in refusal(tmp_path, theirs(), layout="reg")


FOREIGN = {
    "LoRA weights": ["unet.up.attn.to_q.lora_A.weight"],
    "LightningDiT": ["x_embedder.proj.weight", "pos_embed", "blocks.0.mlp.w12.weight"],
    "a Transformer2DModel of diffusers": ["pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"],
    "a UNet": ["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a codec (VAE); it belongs to --vae": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a vision encoder; it belongs to --enc-weights": ["cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"],
}


@pytest.mark.parametrize("wrapper", [None, "ema", "state_dict"])
@pytest.mark.parametrize("what", FOREIGN)
def test_weights_of_other_projects_are_named(tmp_path, what, wrapper):
    state = {f"module.{name}": torch.zeros(2) for name in FOREIGN[what]}
    text = refusal(tmp_path, {wrapper: state} if wrapper else state)
    assert what in text and "allowed" in text


def test_the_state_of_an_optimizer_is_named(tmp_path):
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    assert "the state of an optimizer, without weights" in refusal(tmp_path, optimizer.state_dict())


def test_networks_of_this_project_are_not_taken_for_others(tmp_path):
    for options in (
        {},
        {"z_dims": []},
        {"cls_token_dim": None, "learnable_token": True},
        {"qk_norm": True},
        {"rope": True},
    ):
        model = SiT(small(**options).config)
        torch.save({"ema": model.state_dict(), "network": model.config.to_json()}, tmp_path / "ours.pt")
        assert load_model(tmp_path / "ours.pt").config == model.config
