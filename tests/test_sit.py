import dataclasses
import json
import math

import pytest
import torch

from common.errors import InputError
from models.sit import SiT, SiT_models, SiTConfig, sincos_2d
from models.sit_config import ENCODER_DEPTHS, PRESETS

COUNTS = {"SiT-S/2": 40_107_792, "SiT-B/2": 139_028_496, "SiT-L/2": 467_533_328, "SiT-XL/2": 685_017_360}


def small(**options) -> SiT:
    settings = {
        "input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 5, "encoder_depth": 2,
        "z_dims": [24], "projector_dim": 16, "cls_token_dim": 24,
    }  # fmt: skip
    torch.manual_seed(0)
    return SiT(**{**settings, **options})


def randomise(model: SiT) -> SiT:
    """Give the zero-initialised layers weights, so that the output depends on everything."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return model


def inputs(model: SiT, n: int = 3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, model.in_channels, model.input_size, model.input_size, generator=generator)
    cls = torch.randn(n, model.cls_token_dim, generator=generator) if model.cls_token_dim else None
    return x, torch.rand(n, generator=generator), torch.arange(n) % model.num_classes, cls


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = SiT_models[name]()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_projector_counts():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SiT_models[f"SiT-{s}/2"]().projectors.parameters()) for s in ("B", "L", "XL")]
    assert counts == [7_344_896, 7_869_184, 8_131_328]


def test_sixteen_presets_build():
    assert len(SiT_models) == 16
    for name, build in SiT_models.items():
        size, patch = name.removeprefix("SiT-").split("/")
        with torch.device("meta"):
            model = build()
        assert (len(model.blocks), model.pos_embed.shape[-1]) == PRESETS[size][:2]
        assert model.pos_embed.shape[1] == 1 + (32 // int(patch)) ** 2
        assert model.encoder_depth == ENCODER_DEPTHS[size]


@pytest.mark.parametrize("patch", [1, 2, 8])
@pytest.mark.parametrize("size", ["S", "B"])
def test_presets_train_and_sample_on_small_latents(size, patch):
    model = SiT_models[f"SiT-{size}/{patch}"](input_size=8, depth=2, encoder_depth=1, num_classes=4)
    x, t, y, cls = inputs(model, 2)
    velocity, projected, cls_velocity = model(x, t, y, cls_token=cls)
    assert velocity.shape == x.shape and cls_velocity.shape == cls.shape
    assert projected[0].shape == (2, 1 + (8 // patch) ** 2, 768)
    (velocity.sum() + projected[0].sum() + cls_velocity.sum()).backward()


@pytest.mark.parametrize("cls_token_dim", [24, None])
def test_fresh_network_returns_zero(cls_token_dim):
    model = small(cls_token_dim=cls_token_dim).eval()
    x, t, y, cls = inputs(model)
    velocity, _, cls_velocity = model(x, t, y, cls_token=cls)
    assert not velocity.any()
    assert cls_velocity is None if cls is None else not cls_velocity.any()


def test_registration_order_is_the_published_one():
    names = [name for name, _ in small(qk_norm=True).named_parameters()]
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert tops == [
        "pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "projectors", "final_layer",
        "cls_projectors2", "wg_norm",
    ]  # fmt: skip
    block = list(dict.fromkeys(name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")))
    assert block == [
        "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight",
        "attn.k_norm.bias", "attn.proj.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
        "mlp.fc2.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    ]  # fmt: skip
    final = [name for name in names if name.startswith("final_layer")]
    assert [name.split(".")[1] for name in final[::2]] == ["linear", "linear_cls", "adaLN_modulation"]
    projector = [name for name in names if name.startswith("projectors")]
    assert [name.split(".")[2] for name in projector[::2]] == ["0", "2", "4"]


def test_without_class_slot_there_are_no_class_parameters():
    model = small(cls_token_dim=None)
    assert not any("cls" in name or "wg_norm" in name for name in model.state_dict())
    assert model.pos_embed.shape[1] == 16


def test_position_table_against_its_formula():
    width, grid = 16, 3
    table = sincos_2d(width, grid)
    for row in range(grid):
        for column in range(grid):
            halves = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (j / (width / 4)) for j in range(width // 4)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * grid + column], torch.tensor(halves))
    model = small()
    assert not model.pos_embed[0, 0].any() and not model.pos_embed.requires_grad
    assert torch.equal(model.pos_embed[0, 1:], sincos_2d(32, 4))


def test_time_features_are_of_t_itself():
    t = torch.tensor([0.3])
    features = small().t_embedder.features(t)[0]
    frequencies = [math.exp(-math.log(10000) * j / 128) for j in range(128)]
    expected = [math.cos(0.3 * f) for f in frequencies] + [math.sin(0.3 * f) for f in frequencies]
    torch.testing.assert_close(features, torch.tensor(expected))


def test_initialisation():
    model = small()
    weight = model.blocks[0].attn.qkv.weight.detach()
    bound = math.sqrt(6 / sum(weight.shape))
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    patch = model.x_embedder.proj.weight.view(32, -1)
    assert patch.abs().max() <= math.sqrt(6 / sum(patch.shape)) and not model.x_embedder.proj.bias.any()
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_unpatchify_undoes_patches():
    model = small()
    x = torch.randn(2, 4, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, C, h, w, p, p)
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 16)
    assert torch.equal(model.unpatchify(tokens), x)


def test_fused_and_plain_attention_are_equal():
    model = randomise(small(qk_norm=True)).eval()
    plain = small(qk_norm=True, fused_attn=False).eval()
    plain.load_state_dict(model.state_dict())
    x, t, y, cls = inputs(model)
    for ours, theirs in zip(model(x, t, y, cls)[::2], plain(x, t, y, cls)[::2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_qk_norm_acts_on_each_head():
    model = small(qk_norm=True)
    assert model.blocks[0].attn.q_norm.weight.shape == (16,) and model.blocks[0].attn.q_norm.eps == 1e-5


def test_projectors_are_not_called_when_switched_off():
    model = randomise(small()).eval()
    x, t, y, cls = inputs(model)
    with_, without = model(x, t, y, cls), model(x, t, y, cls, project=False)
    calls = []
    model.projectors[0].register_forward_hook(lambda *_: calls.append(1))
    model(x, t, y, cls, project=False)
    assert without.projected is None and not calls
    assert torch.equal(with_.velocity, without.velocity)
    assert with_.projected[0].shape == (3, 17, 24)  # in eval mode as well


@pytest.mark.parametrize("training", [True, False])
def test_labels_are_dropped_where_the_mask_says(training):
    model = randomise(small()).train(training)
    x, t, y, cls = inputs(model)
    drop = torch.tensor([True, False, True])
    dropped = model(x, t, y, cls, label_drop=drop)
    expected = model(x, t, torch.tensor([model.null_class, y[1], model.null_class]), cls)
    assert torch.equal(dropped.velocity, expected.velocity)
    assert not torch.equal(dropped.velocity[0], model(x, t, y, cls).velocity[0])


def test_a_network_draws_no_random_numbers_in_forward():
    model = randomise(small()).train()
    before = torch.get_rng_state()
    first, second = model(*inputs(model)), model(*inputs(model))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.velocity, second.velocity)


def test_a_configuration_survives_json():
    config = SiTConfig(input_size=8, z_dims=[24, 16], mlp_ratio=2.5, qk_norm=True)
    assert config.qk_norm == "layer" and config.to_json()["qk_norm"] is True
    assert SiTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.to_json()["z_dims"] == [24, 16] and config.z_dims == (24, 16)
    switches = {"norm": "rms", "qk_norm": "rms", "rope": True, "value_residual": True, "sprint": True}
    switched = dataclasses.replace(config, **switches, sprint_path_drop=0.0, encoder_depth=2)
    assert SiTConfig.from_json(json.loads(json.dumps(switched.to_json()))) == switched
    assert switched.to_json() == {
        **config.to_json(), **switches, "sprint_path_drop": 0.0, "encoder_depth": 2,
    }  # fmt: skip
    without = dataclasses.replace(config, cls_token_dim=None)
    assert SiTConfig.from_json(without.to_json()) == without and without.cls_token_dim is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 768),
        ({"z_dims": [24, 16]}, 24),
        ({"z_dims": []}, None),
        ({"learnable_token": True}, None),
        ({"cls_token_dim": None}, None),
        ({"cls_token_dim": 0}, None),
        ({"z_dims": [], "cls_token_dim": 3}, 3),
        ({"z_dims": [24], "cls_token_dim": 5}, 5),
    ],
)
def test_the_class_token_has_the_width_of_the_first_encoder_unless_given(options, expected):
    assert SiTConfig(**options).cls_token_dim == expected


def test_a_network_is_built_from_a_configuration_or_from_its_fields():
    model = small()
    torch.manual_seed(0)
    again = SiT(model.config, fused_attn=False)
    assert again.config == model.config and not again.blocks[0].attn.fused_attn
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert SiT(model.config, qk_norm=True).config == dataclasses.replace(model.config, qk_norm=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda fields: fields.pop("depth"), "missing or unknown fields depth; expected input_size, patch_size"),
        (lambda fields: fields.update(width=3), "missing or unknown fields width"),
        (lambda fields: fields.update(num_heads=2.0), "its num_heads is 2.0; expected a whole number"),
        (lambda fields: fields.update(z_dims=3), "network: its z_dims is 3; expected whole numbers"),
        (lambda fields: fields.update(norm="batch"), "network: norm batch: allowed: layer, rms"),
        (lambda fields: fields.update(rope="yes"), "network: its rope is 'yes'; expected true or false"),
        (lambda fields: fields.update(qk_norm=1), "network: its qk_norm is 1; expected text, true or false"),
        (lambda fields: fields.update(sprint_keep=2), "network: its sprint_keep is 2; expected a number from 0 to 1"),
        (lambda fields: fields.update(input_size=9), "network: latents of 9 x 9 do not divide into patches of 2"),
    ],
)
def test_errors_name_invalid_fields(change, text):
    fields = SiTConfig().to_json()
    change(fields)
    with pytest.raises(InputError, match=text):
        SiTConfig.from_json(fields)


def test_class_token_reaches_every_output():
    model = randomise(small()).eval()
    x, t, y, cls = inputs(model)
    first, second = model(x, t, y, cls), model(x, t, y, cls + 1)
    assert not torch.allclose(first.velocity, second.velocity)
    assert not torch.allclose(first.cls_velocity, second.cls_velocity)


def test_networks_with_the_same_seed_have_equal_weights_in_shared_parts():
    full = small().state_dict()
    for options in ({"cls_token_dim": None}, {"z_dims": []}, {"cls_token_dim": None, "learnable_token": True}):
        state = small(**options).state_dict()
        shared = [key for key in state if key in full and state[key].shape == full[key].shape]
        assert len(shared) > 40 and all(torch.equal(state[key], full[key]) for key in shared)
    assert not torch.equal(
        SiT(input_size=8, hidden_size=32, depth=1, num_heads=2, encoder_depth=1).blocks[0].attn.qkv.weight,
        SiT(input_size=8, hidden_size=32, depth=1, num_heads=2, encoder_depth=1).blocks[0].attn.qkv.weight,
    )


def test_a_learned_token_changes_the_velocity_and_has_none_itself():
    model = randomise(small(cls_token_dim=None, learnable_token=True)).eval()
    x, t, y, _ = inputs(model)
    out = model(x, t, y)
    assert out.velocity.shape == x.shape and out.cls_velocity is None
    assert out.projected[0].shape == (3, 17, 24)  # the learned token is aligned like a class token
    out.velocity.sum().backward()
    assert model.slot_token.grad.any()
    plain = small(cls_token_dim=None)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k != "slot_token"} | {"pos_embed": model.pos_embed[:, 1:]}
    )
    assert not torch.allclose(plain.eval()(x, t, y).velocity, out.velocity)
    assert [name for name, _ in model.named_parameters() if "slot" in name or "cls" in name] == ["slot_token"]


def test_errors_name_the_wrong_argument():
    with pytest.raises(ValueError, match="cls_token_dim 24 and learnable_token: there is one slot"):
        small(learnable_token=True)
    with pytest.raises(ValueError, match="has a class slot of width 24, but cls_token is missing"):
        small()(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="has no class slot, but cls_token is given"):
        small(cls_token_dim=None)(*inputs(small())[:3], cls_token=torch.zeros(3, 24))
    with pytest.raises(ValueError, match="9 x 9 do not divide into patches of 2"):
        small(input_size=9)
    with pytest.raises(ValueError, match=r"encoder_depth 4 is outside 1 .. 3"):
        small(encoder_depth=4)
    for options in ({"num_heads": 5}, {"num_heads": 0}, {"hidden_size": 34, "num_heads": 2}):
        with pytest.raises(ValueError, match="is not a multiple of num_heads"):
            small(**options)


def test_autocast_gives_finite_velocities():
    model = randomise(small()).train()
    x, t, y, cls = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y, cls)
    torch.testing.assert_close(
        out.velocity.float(), model(x, t, y, cls, torch.zeros(3).bool()).velocity, atol=0.1, rtol=0.1
    )


def test_class_slot_overhead_in_flops():
    """The paper states +0.38 % FLOPs for XL/2 at 256 px."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(cls_token_dim):
        with torch.device("meta"):
            model = SiT_models["SiT-XL/2"](cls_token_dim=cls_token_dim).eval()
            cls = None if cls_token_dim is None else torch.zeros(1, cls_token_dim)
            x, t, y = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, y, cls_token=cls, project=False)
        return counter.get_total_flops()

    overhead = flops(768) / flops(None) - 1
    assert overhead == pytest.approx(0.0038, abs=0.0005)
