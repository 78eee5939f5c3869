"""Each switch of SR-DiT (arXiv 2512.12386), and all together, against a plain implementation with loops and einsum."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.inference import convert
from models.sit import SiT, SiT_models
from tests.test_sit import inputs, randomise, small
from training.parallelism import compile_training
from training.throughput import training_flops

DEPTH = 6
SPRINT = {"sprint": True, "sprint_keep": 0.3}
ALL = {"patch_size": 1, "norm": "rms", "qk_norm": "rms", "rope": True, "value_residual": True, **SPRINT}
SWITCHES = {
    "patch size 1": {"patch_size": 1},
    "norm": {"norm": "rms"},
    "qk_norm": {"qk_norm": "rms"},
    "qk_norm layer": {"qk_norm": "layer"},
    "rope": {"rope": True},
    "value_residual": {"value_residual": True},
    "sprint": SPRINT,
    "all": ALL,
    "all without class slot": {**ALL, "cls_token_dim": None},
}
COMPILED = ({"norm": "rms", "qk_norm": "rms"}, {"rope": True}, {"value_residual": True}, SPRINT, ALL)
OF_SR_DIT = {"norm": "rms", "qk_norm": "rms", "rope": True, "value_residual": True, "sprint": True}


def network(**options) -> SiT:
    model = randomise(small(**{"depth": DEPTH, "input_size": 4, "hidden_size": 16, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "v1_lambda")):
                parameter.normal_(0.7, 0.2, generator=generator)
    return model


def draws(model: SiT, n: int = 3) -> dict[str, torch.Tensor]:
    """Return the arguments of a step of training; the second sample drops the path."""
    if not model.config.sprint:
        return {}
    route = torch.rand(n, model.config.tokens, generator=torch.Generator().manual_seed(3))
    return {"route": route, "path_drop": torch.tensor([False, True, False])[:n]}


def plain_sit(state, config, x, t, y, cls, route=None, path_drop=None, skip=False, t_cls=None):
    """Return velocity, projected tokens and velocity of the class token, sample by sample."""
    outputs = []
    for n in range(len(x)):
        order = None if route is None else sorted(range(route.shape[1]), key=lambda i: route[n, i].item())
        kept = None if order is None else order[: int(config.sprint_keep * len(order))]
        dropped = skip or (path_drop is not None and bool(path_drop[n]))
        token, token_time = None if cls is None else cls[n], None if t_cls is None else t_cls[n]
        outputs.append(plain_sample(state, config, x[n], t[n], y[n], token, kept, dropped, token_time))
    return [None if part[0] is None else torch.stack(part) for part in zip(*outputs, strict=True)]


def plain_sample(state, config, x, t, y, cls, kept, dropped, t_cls=None):
    patch, grid, heads = config.patch_size, config.input_size // config.patch_size, config.num_heads
    head_size = config.hidden_size // heads

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(value, kind, eps, name=None):
        if kind == "layer":
            value = (value - value.mean(-1, keepdim=True)) / (value.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        else:
            value = value / (value.square().mean(-1, keepdim=True) + eps).sqrt()
        if name is None:
            return value
        value = value * state[f"{name}.weight"]
        return value + state[f"{name}.bias"] if kind == "layer" else value

    def mlp(name, value, activation):
        return linear(f"{name}.2", activation(linear(f"{name}.0", value)))

    def turn(value, position):
        """Rotate the vector of a head, pair by pair."""
        if position is None:
            return value
        channels, half = list(value), head_size // 2
        for k in range(head_size // 2):
            first_half, j = k < head_size // 4, k % (head_size // 4)
            angle = position[0 if first_half else 1] * 10000 ** (-2 * j / half)
            a, b = value[2 * k], value[2 * k + 1]
            channels[2 * k] = a * math.cos(angle) - b * math.sin(angle)
            channels[2 * k + 1] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(channels)

    def turn_all(part, positions):
        rows = zip(part, positions, strict=True)
        return torch.stack([torch.stack([turn(head, position) for head in token]) for token, position in rows])

    def block(i, tokens, positions, first_v):
        name = f"blocks.{i}"
        modulation = linear(f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6)
        qkv = linear(f"{name}.attn.qkv", norm(tokens, config.norm, 1e-6) * (1 + modulation[1]) + modulation[0])
        q, k, own_v = (part.unflatten(-1, (heads, head_size)) for part in qkv.chunk(3, -1))  # (T, heads, d)
        if config.qk_norm != "none":
            eps = 1e-5 if config.qk_norm == "layer" else torch.finfo(torch.float32).eps
            q = norm(q, config.qk_norm, eps, f"{name}.attn.q_norm")
            k = norm(k, config.qk_norm, eps, f"{name}.attn.k_norm")
        if config.rope:
            q, k = turn_all(q, positions), turn_all(k, positions)
        v = own_v
        if config.value_residual and i > 0:
            share = state[f"{name}.attn.v1_lambda"].reshape(())
            v = share * first_v + (1 - share) * v
        weights = torch.einsum("qhd,khd->hqk", q, k).div(head_size**0.5).softmax(-1)
        tokens = tokens + modulation[2] * linear(
            f"{name}.attn.proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        )
        hidden = linear(f"{name}.mlp.fc1", norm(tokens, config.norm, 1e-6) * (1 + modulation[4]) + modulation[3])
        return tokens + modulation[5] * linear(f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh")), own_v

    # Tokens, their positions and the conditioning.
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    tokens, positions = [], []
    for row in range(grid):
        for column in range(grid):
            piece = x[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(torch.einsum("dcpq,cpq->d", weight, piece) + bias)
            positions.append((row, column))
    if cls is not None:
        tokens.insert(0, norm(linear("cls_projectors2", cls), config.norm, 1e-6, "wg_norm"))
        positions.insert(0, None)
    tokens = torch.stack(tokens) + state["pos_embed"][0]
    c = state["y_embedder.embedding_table.weight"][y]
    for name, time in (("t_embedder", t), ("t_cls_embedder", t_cls)):
        if time is not None:
            angles = time * torch.exp(-math.log(10000) * torch.arange(128) / 128)
            c = c + mlp(f"{name}.mlp", torch.cat([angles.cos(), angles.sin()]), F.silu)

    # Blocks.
    first_v = projected = None
    for i in range(config.depth):
        if config.sprint and i == 2:
            everything = (tokens, positions, first_v)
            if kept is not None:
                tokens, positions = tokens[kept], [positions[place] for place in kept]
                first_v = None if first_v is None else first_v[kept]
        if config.sprint and i == config.depth - 2:
            middle, (tokens, positions, first_v) = tokens, everything
            rows = [state["mask_token"][0, 0]] * len(tokens)
            if not dropped:
                for place, row in zip(range(len(tokens)) if kept is None else kept, middle, strict=True):
                    rows[place] = row
            tokens = linear("fusion_proj", torch.cat([tokens, torch.stack(rows)], dim=-1))
        tokens, values = block(i, tokens, positions, first_v)
        if i == 0:
            first_v = values
        if i + 1 == config.encoder_depth:
            hidden = F.silu(linear("projectors.0.0", tokens))
            projected = linear("projectors.0.4", F.silu(linear("projectors.0.2", hidden)))

    # Velocities.
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2)
    tokens = norm(tokens, config.norm, 1e-6) * (1 + scale) + shift
    cls_velocity = None if cls is None else linear("final_layer.linear_cls", tokens[0])
    patches = linear("final_layer.linear", tokens if cls is None else tokens[1:])
    velocity = torch.einsum("hwpqc->chpwq", patches.reshape(grid, grid, patch, patch, -1))
    return velocity.reshape(x.shape), projected, cls_velocity


def loss_of(outputs):
    """Return a number that depends on all outputs, each value with a weight of its own."""
    generator = torch.Generator().manual_seed(9)
    return sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs if out is not None)


def gradients(model: SiT, **more) -> dict[str, torch.Tensor]:
    x, t, y, cls = inputs(model)
    model.zero_grad()
    velocity, projected, cls_velocity = model(x, t, y, cls_token=cls, **more)
    loss_of((velocity, projected[0], cls_velocity)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in SWITCHES), ("sprint", False), ("all", False)]
)
def test_a_switch_against_a_plain_implementation(name, training):
    """Without the random numbers of a step all tokens go through the middle blocks, as in evaluation."""
    options = SWITCHES[name]
    model = network(**options)
    more = draws(model) if training else {}
    x, t, y, cls = inputs(model)
    state = {
        name: value.clone().requires_grad_(value.is_floating_point()) for name, value in model.state_dict().items()
    }
    expected = plain_sit(state, model.config, x, t, y, cls, **more)
    loss_of(expected).backward()
    velocity, projected, cls_velocity = model(x, t, y, cls_token=cls, **more)
    for ours, theirs in zip((velocity, projected[0], cls_velocity), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model, **more).items():
        if name == "mask_token" and not training:
            assert gradient is None and state[name].grad is None
            continue
        assert gradient.any(), name
        torch.testing.assert_close(gradient, state[name].grad, rtol=1e-5, atol=1e-5 * max(1, gradient.abs().max()))


def test_every_switch_changes_the_velocity():
    plain = network()
    for name, options in SWITCHES.items():
        if name != "patch size 1" and "all" not in name:
            model = network(**options)
            model.load_state_dict(plain.state_dict(), strict=False)
            velocities = [one(*inputs(plain)[:3], inputs(plain)[3], project=False).velocity for one in (plain, model)]
            assert not torch.allclose(*velocities, atol=1e-3), name


@pytest.mark.parametrize(("size", "count"), [("B", 140_235_051), ("XL", 687_713_659)])
def test_parameter_counts(size, count):
    with torch.device("meta"):
        model = SiT_models[f"SiT-{size}/1"](input_size=16, in_channels=32, **OF_SR_DIT)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.encoder_depth == 2 and model.config.kept_tokens == 64


def test_skipping_the_middle_is_dropping_the_path_without_its_computation():
    model = network(**ALL).eval()
    x, t, y, cls = inputs(model)
    dropped = model(x, t, y, cls, path_drop=torch.ones(3, dtype=torch.bool))
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, *_: calls.append(block))
    skipped = model(x, t, y, cls, skip_middle=True)
    assert calls == [model.blocks[i] for i in (0, 1, DEPTH - 2, DEPTH - 1)]
    assert torch.equal(skipped.velocity, dropped.velocity) and torch.equal(skipped.projected[0], dropped.projected[0])
    assert not torch.equal(skipped.velocity, model(x, t, y, cls).velocity)


def test_a_dropped_path_gives_the_middle_blocks_zero_gradients():
    model = network(**ALL)
    found = gradients(model, **{**draws(model), "path_drop": torch.ones(3, dtype=torch.bool)})
    middle = {name: value for name, value in found.items() if name.startswith(("blocks.2.", "blocks.3."))}
    assert len(middle) > 20 and not any(value.any() for value in middle.values())
    assert found["mask_token"].any()


def test_in_training_the_class_token_is_a_token_like_any_other():
    """With all tokens kept in any order, the outputs are those without routing."""
    model = network(**{**ALL, "sprint_keep": 1.0})
    x, t, y, cls = inputs(model)
    routed, plain = model(x, t, y, cls, route=draws(model)["route"]), model(x, t, y, cls)
    torch.testing.assert_close(routed.velocity, plain.velocity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed.cls_velocity, plain.cls_velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", COMPILED, ids=lambda options: ", ".join(options))
def test_compiled_and_checkpointed_networks_give_the_same_gradients(options):
    torch._dynamo.reset()
    model, graphs = network(**options), torch._dynamo.utils.counters["stats"]
    expected, before = gradients(model, **draws(model)), graphs["unique_graphs"]
    model.activation_checkpointing = True
    again = gradients(model, **draws(model))
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())

    class Criterion:
        mix = compare = staticmethod(lambda: None)

    compile_training(model, [], Criterion(), backend="eager")
    model.activation_checkpointing = False
    compiled = gradients(model, **draws(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-5, atol=1e-5)
    # The blocks share graphs: one for the first block with value residual, one for each number of tokens.
    blocks = 1 + bool(options.get("value_residual")) + bool(options.get("sprint"))
    assert graphs["unique_graphs"] - before == blocks + 2  # projector, final layer
    torch._dynamo.reset()


def test_half_precision_keeps_the_tables_and_rotates_in_float32():
    model = network(**ALL).eval()
    x, t, y, cls = inputs(model)
    expected = model(x, t, y, cls).velocity
    tables = {name: value.clone() for name, value in model.named_buffers()}
    half = convert(model, torch.bfloat16)
    assert sorted(tables) == ["feat_rope.freqs_cos", "feat_rope.freqs_sin"]
    for name, value in half.named_buffers():
        assert value.dtype == torch.float32 and torch.equal(value, tables[name])
    found = half(x.bfloat16(), t, y, cls.bfloat16(), skip_middle=False).velocity
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).std() < 0.03 * expected.std()


def test_autocast_is_close_to_float32():
    model = network(**ALL)
    x, t, y, cls = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, t, y, cls, **draws(model))
    expected = model(x, t, y, cls, **draws(model))
    assert found.velocity.isfinite().all()
    assert (found.velocity.float() - expected.velocity).std() < 0.03 * expected.velocity.std()


def test_a_network_draws_no_numbers_and_its_shared_weights_are_those_without_switches():
    model, plain = small(depth=DEPTH, **{**ALL, "patch_size": 2}), small(depth=DEPTH)
    before = torch.get_rng_state()
    model(*inputs(model), **draws(model))
    assert torch.equal(torch.get_rng_state(), before)
    state = model.state_dict()
    shared = [name for name in state if name in plain.state_dict()]
    assert len(shared) > 60 and all(torch.equal(state[name], plain.state_dict()[name]) for name in shared)
    assert not state["mask_token"].any() and all(
        state[f"blocks.{i}.attn.v1_lambda"].item() == 0.5 for i in range(1, DEPTH)
    )
    assert "blocks.0.attn.v1_lambda" not in state and not state["fusion_proj.bias"].any()
    bound = math.sqrt(6 / (32 + 64))
    assert 0.9 * bound < state["fusion_proj.weight"].abs().max() <= bound


def test_the_middle_counts_for_the_tokens_that_go_through_it():
    """Six blocks of the width of B/1: four with 257 tokens and two with 64; the fusion and the projector with 257."""

    def flops(**switches):
        with torch.device("meta"):
            return training_flops(SiT_models["SiT-B/1"](input_size=16, in_channels=32, depth=6, **switches))

    def block(tokens):
        return 3 * 2 * (tokens * 12 * 768**2 + 2 * tokens**2 * 768)

    fusion = 3 * 2 * 257 * 2 * 768 * 768
    without, with_sprint = flops(), flops(sprint=True)
    assert without - with_sprint == pytest.approx(2 * (block(257) - block(64)) - fusion, rel=0.01)


def test_sprint_needs_an_argument_for_each_part():
    model = small()
    for more in ({"route": torch.rand(3, 17)}, {"path_drop": torch.zeros(3).bool()}, {"skip_middle": True}):
        with pytest.raises(ValueError, match="this network has no SPRINT"):
            model(*inputs(model), **more)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"norm": "batch"}, "norm batch: allowed: layer, rms"),
        ({"qk_norm": "l2"}, "qk_norm l2: allowed: none, layer, rms"),
        ({"rope": True, "num_heads": 16, "hidden_size": 32}, "rope: the width of a head, 2, is not a multiple of 4"),
        ({"sprint": True, "depth": 4}, "sprint with a depth of 4 blocks: needs 5 or more"),
        ({"sprint": True, "encoder_depth": 3}, r"encoder_depth 3 is one of the routed blocks 3 \.\. 4 .*: 1, 2, 5, 6"),
        ({"sprint": True, "encoder_depth": 4}, "encoder_depth 4 is one of the routed blocks"),
        ({"sprint": True, "sprint_keep": 0.01}, "sprint_keep 0.01 of 5 tokens keeps none"),
        ({"sprint": True, "sprint_keep": 1.5}, "sprint_keep 1.5: must be from 0 to 1"),
        ({"sprint": True, "sprint_path_drop": -0.1}, "sprint_path_drop -0.1: must be from 0 to 1"),
    ],
)
def test_impossible_switches_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        small(**{"depth": DEPTH, "input_size": 4, **options})


def test_the_depth_of_the_projectors_may_be_outside_the_routed_blocks():
    for encoder_depth in (1, 2, 5, 6):
        model = network(encoder_depth=encoder_depth, **SPRINT)
        assert model(*inputs(model), **draws(model)).projected[0].shape == (3, 5, 24)
    assert network(encoder_depth=3, z_dims=[], cls_token_dim=24, **SPRINT).encoder_depth == 3  # no projectors
