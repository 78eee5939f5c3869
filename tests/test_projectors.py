"""The projectors at several depths and of each kind, against plain implementations with loops."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from loss import Draws, REGLoss, Targets, alignment_target
from models.checkpoint import build_model, network_config
from models.interpolant import Interpolant
from models.projectors import ConvProjector
from models.sit import SiTConfig
from tests.test_sit import inputs, randomise, small

A = 0.6
NETWORKS = {
    "mlp": {},
    "mlp, two depths": {"encoder_depth": (1, 3), "z_dims": [24, 8]},
    "conv": {"projector": "conv"},
    "conv, two depths": {"projector": "conv", "encoder_depth": (1, 3), "z_dims": [24, 8]},
    "conv, no class slot": {"projector": "conv", "cls_token_dim": None},
    "conv, learned token": {"projector": "conv", "cls_token_dim": None, "learnable_token": True},
    "sprint": {"projector": "conv", "depth": 6, "encoder_depth": (2, 5, 6), "sprint": True},
}


def batch_of(model, n):
    """Return latents, labels, a clean class token or None, and the draws of a step."""
    x, t, y, cls_token = inputs(model, n)
    route = torch.rand(n, model.config.tokens) if model.config.sprint else None
    drop = torch.zeros(n, dtype=torch.bool)
    return x, y, cls_token, Draws(t, x.flip(0), x, drop, cls_token, route, None if route is None else drop)


def plain_projector(state, name, tokens, kind, grid):
    """Return the projected tokens of one sample, (T, z_dim), token by token."""
    if kind == "mlp":
        for layer in (0, 2, 4):
            tokens = F.silu(tokens) if layer else tokens
            tokens = tokens @ state[f"{name}.{layer}.weight"].T + state[f"{name}.{layer}.bias"]
        return tokens
    weight, bias, out = state[f"{name}.patches.weight"], state[f"{name}.patches.bias"], []
    if len(tokens) > grid**2:
        out.append(state[f"{name}.slot.weight"] @ tokens[0] + state[f"{name}.slot.bias"])
        tokens = tokens[1:]
    for row in range(grid):
        for column in range(grid):
            value = bias
            for i in range(max(row - 1, 0), min(row + 2, grid)):
                for j in range(max(column - 1, 0), min(column + 2, grid)):
                    value = value + weight[:, :, i - row + 1, j - column + 1] @ tokens[i * grid + j]
            out.append(value)
    return torch.stack(out)


def plain_target(cls_token, patches, with_cls):
    """Return the target of one sample, (T, width), channel by channel."""
    channels = []
    for z in patches.T:
        mean = sum(z) / len(z)
        std = (sum((z - mean) ** 2) / (len(z) - 1)).sqrt()
        channels.append((z - A * mean) / (std + 1e-6))
    patches = torch.stack(channels, dim=1)
    return torch.cat([cls_token[None], patches]) if with_cls else patches


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_the_alignment_against_a_plain_implementation(options):
    model = randomise(small(**options))
    config, n = model.config, 3
    x, y, cls_token, draws = batch_of(model, n)
    generator = torch.Generator().manual_seed(4)
    grid, with_cls = config.grid_size, config.tokens > config.grid_size**2
    encoded = [
        (torch.randn(n, width, generator=generator), 2 + torch.randn(n, grid**2, width, generator=generator))
        for width in config.z_dims
    ]
    read = {}
    for number in config.encoder_depths:
        model.blocks[number - 1].register_forward_hook(lambda _, given, out, number=number: read.update({number: out}))
    targets = Targets(cls_token, [alignment_target(*output, with_cls, A) for output in encoded])
    found = REGLoss(Interpolant())(model, x, y, targets, draws)["proj"]

    state, cosines = dict(model.named_parameters()), []
    for place, number in enumerate(config.encoder_depths):
        for encoder, output in enumerate(encoded):
            name = f"projectors.{place * len(encoded) + encoder}"
            for i in range(n):
                ours = plain_projector(state, name, read[number][i], config.projector, grid)
                theirs = plain_target(output[0][i], output[1][i], with_cls)
                lengths = ours.square().sum(-1).sqrt() * theirs.square().sum(-1).sqrt()
                cosines.append(((ours * theirs).sum(-1) / lengths).mean())
    expected = -torch.stack(cosines).view(-1, n).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    pair = [
        torch.autograd.grad(value.sum(), weights, retain_graph=True, allow_unused=True) for value in (found, expected)
    ]
    names = [name for name, weight in state.items() if weight.requires_grad]
    for name, ours, theirs in zip(names, *pair, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is not None or not name.startswith("projectors."), name
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_names_and_shapes_of_the_parameters():
    two = small(encoder_depth=(1, 3), z_dims=[24, 8])
    assert [projector[4].out_features for projector in two.projectors] == [24, 8, 24, 8]
    one = small(encoder_depth=(2,))
    assert one.config == small().config and list(one.state_dict()) == list(small().state_dict())
    shapes = {name: tuple(weight.shape) for name, weight in small(projector="conv").projectors.named_parameters()}
    assert shapes == {
        "0.patches.weight": (24, 32, 3, 3), "0.patches.bias": (24,), "0.slot.weight": (24, 32), "0.slot.bias": (24,),
    }  # fmt: skip
    assert len(list(small(projector="conv", cls_token_dim=None).projectors.parameters())) == 2


def test_other_weights_do_not_depend_on_the_projectors():
    plain = small().state_dict()
    for options in ({"projector": "conv"}, {"encoder_depth": (1, 2)}):
        for name, value in small(**options).state_dict().items():
            same = name in plain and torch.equal(value, plain[name])
            assert same == (not name.startswith("projectors.") or name in plain), name


def test_the_convolution_starts_as_pytorchs_own():
    first, again = (small(projector="conv", encoder_depth=(1, 2)) for _ in range(2))
    bound = 1 / math.sqrt(9 * 32)
    for number, projector in enumerate(first.projectors):
        for name in ("weight", "bias"):
            value = getattr(projector.patches, name)
            assert 0.8 * bound < value.abs().max() <= bound
            assert torch.equal(value, getattr(again.projectors[number].patches, name))
        assert not projector.slot.bias.any()
    assert not torch.equal(first.projectors[0].patches.weight, first.projectors[1].patches.weight)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("described", [True, False])
def test_a_checkpoint_rebuilds_the_network(options, described):
    model = randomise(small(**options)).eval()
    config, depth = model.config, model.config.to_json()["encoder_depth"]
    depth = depth if isinstance(depth, int) else ",".join(map(str, depth))
    args = {"num_heads": 2, "encoder_depth": depth, "path_type": "linear", "projector": config.projector}
    checkpoint = {"ema": model.state_dict(), "args": args}
    if described:
        checkpoint["network"] = config.to_json()
    elif config.projector == "conv":  # which has no inner width
        config = dataclasses.replace(config, projector_dim=SiTConfig.projector_dim)
    assert network_config(checkpoint) == config
    rebuilt = build_model(checkpoint)
    x, t, y, cls = inputs(model)
    for ours, theirs in zip(rebuilt(x, t, y, cls).projected, model(x, t, y, cls).projected, strict=True):
        assert torch.equal(ours, theirs)


def test_descriptions():
    plain, both = small().config, small(projector="conv", encoder_depth=(1, 3)).config
    assert "projector" not in plain.to_json() and plain.to_json()["encoder_depth"] == 2
    assert both.to_json()["encoder_depth"] == [1, 3] and both.to_json()["projector"] == "conv"
    assert SiTConfig.from_json(both.to_json()) == both and both.with_depth(2).encoder_depth == (1, 2)
    for wrong in ([1, 1], [3, 1], [], [0, 1], [1, 4]):
        with pytest.raises(InputError, match="network: encoder_depth "):
            SiTConfig.from_json({**plain.to_json(), "encoder_depth": wrong})
    with pytest.raises(InputError, match=r"its encoder_depth is \[1\.5\]; expected a whole number up to .*or a list"):
        SiTConfig.from_json({**plain.to_json(), "encoder_depth": [1.5]})
    with pytest.raises(ValueError, match="projector linear: allowed: mlp, conv"):
        small(projector="linear")
    with pytest.raises(ValueError, match=r"encoder_depth 3 is one of the routed blocks 3 \.\. 4 of sprint"):
        small(depth=6, sprint=True, encoder_depth=(2, 3))
    state = small(projector="conv").state_dict()
    with pytest.raises(InputError, match="network has projector 'mlp', but the weights have conv"):
        network_config({"ema": state, "network": plain.to_json()})
    with pytest.raises(InputError, match=r"network has z_dims .*24.*, but the weights have \(24, 24\)"):
        network_config({"ema": small(encoder_depth=(1, 2)).state_dict(), "network": plain.to_json()})


def test_projectors_are_computed_for_the_alignment_only():
    model, calls = small(projector="conv", encoder_depth=(1, 2)), []
    for projector in model.projectors:
        assert isinstance(projector, ConvProjector)
        projector.register_forward_hook(lambda *_: calls.append(1))
    assert model(*inputs(model), project=False).projected is None and not calls
    assert len(model(*inputs(model)).projected) == len(calls) == 2
