"""The lead of the class token: against its formulas, a plain network, a plain loss and data of known distribution."""

from itertools import pairwise

import pytest
import torch

import samplers
from loss import REGLoss, Targets
from models.cls_lead import moving_parts, stream_times
from models.interpolant import PATHS, Interpolant
from models.sit import SiT, SiTConfig
from samplers import Guidance, GuidedVelocity, sample, sample_images
from tests.test_loss import Recorder, batch
from tests.test_samplers import SR_DIT, trained_looking_network
from tests.test_sit import inputs, randomise, small
from tests.test_srdit import ALL, draws, gradients, loss_of, network, plain_sit

LEADS = (0.1, 0.25, 0.3, 1 / 3, 1.0)
LEAD = 0.3
SOLVERS = [("sde", "euler"), ("ode", "euler"), ("ode", "heun"), ("ode", "dopri5")]


def times_of(u: float, lead: float) -> tuple[float, float]:
    """The times of the latents and of the class token, as the formulas have them."""
    return min(1.0, u * (1 + lead)), max(0.0, u * (1 + lead) - lead)


@pytest.mark.parametrize("lead", LEADS)
def test_times_against_their_formulas(lead):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    t, t_cls = stream_times(u, lead)
    expected = torch.tensor([times_of(value, lead) for value in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([t, t_cls], dim=1), expected, rtol=0, atol=2e-9)
    both = (t < 1) & (t_cls > 0)
    torch.testing.assert_close((t - t_cls)[both], torch.full((int(both.sum()),), lead, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        (t_1, cls_1), (t_0, cls_0) = (stream_times(torch.tensor(end, dtype=dtype), lead) for end in (1.0, 0.0))
        assert (t_1, cls_1, t_0, cls_0) == (1, 1, 0, 0) and t_1.dtype == cls_1.dtype == dtype


@pytest.mark.parametrize("lead", LEADS)
def test_when_the_latents_start_and_the_class_token_is_finished(lead):
    start, finish = 1 / (1 + lead), lead / (1 + lead)
    for u, moving in ((start + 1e-6, (False, True)), (finish - 1e-6, (True, False))):
        t, t_cls = stream_times(torch.tensor(u, dtype=torch.float64), lead)
        assert (t < 1, t_cls > 0) == moving
    # The grids of samplers have these values of u up to rounding.
    for near in (finish, finish * (1 + 1e-15), finish * (1 - 1e-15)):
        assert stream_times(torch.tensor(near, dtype=torch.float64), lead)[1] == 0


@pytest.mark.parametrize("lead", (0.0, *LEADS))
def test_in_each_part_the_times_are_linear(lead):
    parts = moving_parts(lead)
    assert parts[0][0] == 1 and parts[-1][1] == 0
    assert all(part[1] == following[0] and part[0] > part[1] for part, following in pairwise(parts))
    for first, last, rates in parts:
        u = torch.linspace(first, last, 4, dtype=torch.float64)
        for times, rate in zip(stream_times(u, lead), rates, strict=True):
            torch.testing.assert_close(times.diff(), rate * u.diff())


# Without a lead nothing changes.


def test_without_a_lead_the_network_and_its_description_are_those_of_reg():
    model = small(cls_lead=0.0)
    assert "cls_lead" not in model.config.to_json() and SiTConfig.from_json(model.config.to_json()) == model.config
    assert model.state_dict().keys() == small().state_dict().keys()
    u = torch.rand(4)
    assert all(time is u for time in stream_times(u, 0.0))


def test_a_new_network_is_that_without_a_lead_bit_for_bit():
    leads, plain = small(cls_lead=LEAD), small()
    added = [name for name in leads.state_dict() if name not in plain.state_dict()]
    assert added == [f"t_cls_embedder.mlp.{k}.{kind}" for k in (0, 2) for kind in ("weight", "bias")]
    assert list(leads.state_dict())[-4:] == added  # behind all others: the optimizer's state is by index
    assert all(torch.equal(value, leads.state_dict()[name]) for name, value in plain.state_dict().items())
    assert leads.t_cls_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name in added[1:]:
        assert not leads.state_dict()[name].any(), name
    randomise(plain)
    leads.load_state_dict(plain.state_dict(), strict=False)
    x, t, y, cls = inputs(plain)
    for t_cls in (t, torch.zeros(3)):
        found, expected = leads(x, t, y, cls, t_cls=t_cls), plain(x, t, y, cls)
        assert torch.equal(found.velocity, expected.velocity) and torch.equal(found.cls_velocity, expected.cls_velocity)
        assert torch.equal(found.projected[0], expected.projected[0])


@pytest.mark.parametrize("path", PATHS)
def test_without_a_lead_the_loss_is_the_same_bit_for_bit(path):
    x, y, cls_token, drawn = batch()
    model, path, targets = Recorder(), Interpolant(path), Targets(cls_token, [torch.randn(3, 17, 10)])
    terms = REGLoss(path, cls_lead=0.0)(model, x, y, targets, drawn)
    assert model.t is drawn.t and torch.equal(model.x, path.interpolate(x, drawn.noise, drawn.t))
    assert torch.equal(model.cls_token, path.interpolate(cls_token, drawn.cls_noise, drawn.t))
    for name, v, clean, noise in (
        ("denoise", model.velocity, x, drawn.noise),
        ("cls", model.cls_velocity, cls_token, drawn.cls_noise),
    ):
        error = v - path.velocity_target(clean, noise, drawn.t)
        assert torch.equal(terms[name], error.square().flatten(1).mean(dim=1))


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_without_a_lead_the_samplers_are_the_same_bit_for_bit(mode):
    interpolant = Interpolant("cosine", 2.0)
    velocity = joint_velocity(interpolant, 0.0)
    times, state = [], normals(n=5)()
    grid = samplers.sde_times(6) if mode == "sde" else samplers.ode_times(6)
    noise = normals(n=5)
    noise()
    for t, t_next in pairwise(interpolant.shift(grid)):
        times.append(t)
        v, dt = velocity(*state, t), t_next - t
        if mode == "sde":
            v = [a - 2 * t / 2 * interpolant.score_from_velocity(a, b, t) for a, b in zip(v, state, strict=True)]
            state = [a + b * dt for a, b in zip(state, v, strict=True)]
            if t_next > 0:
                state = [a + b * (2 * t * dt.abs()).sqrt() for a, b in zip(state, noise(), strict=True)]
            continue
        if t_next > 0:
            second = velocity(*(a + b * dt for a, b in zip(state, v, strict=True)), t_next)
            v = [(a + b) / 2 for a, b in zip(v, second, strict=True)]
        state = [a + b * dt for a, b in zip(state, v, strict=True)]
    solver = "euler" if mode == "sde" else "heun"
    found = sample(velocity, normals(n=5), interpolant, mode, solver, 6, cls_lead=0.0)
    assert all(torch.equal(a, b) for a, b in zip(found, state, strict=True))


# Network and loss.


@pytest.mark.parametrize("options", [{}, ALL], ids=["alone", "all switches"])
def test_the_network_against_a_plain_implementation(options):
    """Outputs, and gradients of all weights."""
    model = network(**options, cls_lead=LEAD)
    x, t, y, cls = inputs(model)
    more = {**draws(model), "t_cls": torch.tensor([0.0, 0.2, 0.9])}
    state = {
        name: value.clone().requires_grad_(value.is_floating_point()) for name, value in model.state_dict().items()
    }
    expected = plain_sit(state, model.config, x, t, y, cls, **more)
    loss_of(expected).backward()
    velocity, projected, cls_velocity = model(x, t, y, cls_token=cls, **more)
    for ours, theirs in zip((velocity, projected[0], cls_velocity), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = gradients(model, **more)
    assert sum(name.startswith("t_cls_embedder") for name in found) == 4
    for name, gradient in found.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, state[name].grad, rtol=1e-5, atol=1e-5 * max(1, gradient.abs().max()))


def test_the_time_of_the_class_token_is_needed_with_a_lead_only():
    x, t, y, cls = inputs(small())
    with pytest.raises(ValueError, match=r"leads by 0\.3, but its times t_cls are missing"):
        small(cls_lead=LEAD)(x, t, y, cls)
    with pytest.raises(ValueError, match="leads by 0, but its times t_cls are given"):
        small()(x, t, y, cls, t_cls=t)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"cls_lead": 1.5}, "cls_lead 1.5: must be from 0 to 1"),
        ({"cls_lead": float("nan")}, "cls_lead nan: must be from 0 to 1"),
        ({"cls_lead": 0.1, "cls_token_dim": None}, "cls_lead 0.1: needs a class token that is denoised"),
    ],
)
def test_impossible_leads_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        SiTConfig(**fields)


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_written_out(path):
    """One sample before the latents start, one in between, one whose class token is finished."""
    x, y, cls_token, drawn = batch()
    drawn = drawn._replace(t=torch.tensor([0.9, 0.5, 0.1]))
    model, path = Recorder(), Interpolant(path)
    network = lambda x, t, y, t_cls=None, **more: setattr(model, "t_cls", t_cls) or model(x, t, y, **more)  # noqa: E731
    terms = REGLoss(path, {"cfm": 0.0}, LEAD)(network, x, y, Targets(cls_token), drawn)
    expected = torch.tensor([times_of(u, LEAD) for u in (0.9, 0.5, 0.1)])
    assert expected[0, 0] == 1 and expected[2, 1] == 0
    torch.testing.assert_close(torch.stack([model.t, model.t_cls], dim=1), expected)
    for i, (t, t_cls) in enumerate(expected):
        of_x, of_cls = path.coefficients(t), path.coefficients(t_cls)
        torch.testing.assert_close(model.x[i], of_x.alpha_t * x[i] + of_x.sigma_t * drawn.noise[i])
        noisy = of_cls.alpha_t * cls_token[i] + of_cls.sigma_t * drawn.cls_noise[i]
        torch.testing.assert_close(model.cls_token[i], noisy)
        target = of_x.d_alpha_t * x[i] + of_x.d_sigma_t * drawn.noise[i]
        cls_target = of_cls.d_alpha_t * cls_token[i] + of_cls.d_sigma_t * drawn.cls_noise[i]
        torch.testing.assert_close(terms["denoise"][i], (model.velocity[i] - target).square().mean())
        torch.testing.assert_close(terms["cls"][i], (model.cls_velocity[i] - cls_target).square().mean())


# Samplers, on data whose latents x and class token c are jointly normal, one number each.

MEAN = torch.tensor([1.5, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.16, 0.12], [0.12, 0.25]], dtype=torch.float64)


def joint_velocity(interpolant, lead, calls=None):
    """The exact velocities of both streams: each depends on both states. `calls` gets time and state of each call."""

    def velocity(x, cls, u):
        if calls is not None:
            calls.append((u.item(), x.clone(), cls.clone()))
        at = interpolant.coefficients(torch.tensor(times_of(u.item(), lead), dtype=torch.float64))
        alpha, sigma = at.alpha_t.diag(), at.sigma_t.diag()
        seen = torch.stack([x.flatten(), cls.flatten()])  # (2, N)
        away = torch.linalg.solve(alpha @ COVARIANCE @ alpha + sigma @ sigma, seen - (alpha @ MEAN)[:, None])
        clean, noise = MEAN[:, None] + COVARIANCE @ alpha @ away, sigma @ away  # their means, given what is seen
        v = at.d_alpha_t[:, None] * clean + at.d_sigma_t[:, None] * noise
        return v[0].view_as(x), v[1].view_as(cls)

    return velocity


def normals(n=8000, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        shapes = (n, 1, 1, 1), (n, 1)
        return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return draw


@pytest.mark.parametrize(("path", "lead"), [("linear", LEAD), ("cosine", LEAD), ("linear", 1.0)])
@pytest.mark.parametrize(("mode", "solver"), [("sde", "euler"), ("ode", "heun"), ("ode", "dopri5")])
def test_samplers_reach_the_distribution_of_both_streams(path, lead, mode, solver):
    interpolant = Interpolant(path)
    steps = 100 if solver == "heun" else 250
    x, cls = sample(joint_velocity(interpolant, lead), normals(), interpolant, mode, solver, steps, cls_lead=lead)
    both = torch.stack([x.flatten(), cls.flatten()])
    torch.testing.assert_close(both.mean(dim=1), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(both), COVARIANCE, rtol=0, atol=0.011)


def test_solvers_agree_with_a_time_shift():
    """Heun's method converges to the solution of the adaptive solver with the square of the step size."""
    interpolant = Interpolant("cosine", 2.0)
    velocity = joint_velocity(interpolant, LEAD)
    exact = sample(velocity, normals(n=50), interpolant, "ode", "dopri5", cls_lead=LEAD)
    errors = []
    for steps in (50, 100):
        found = sample(velocity, normals(n=50), interpolant, "ode", "heun", steps, cls_lead=LEAD)
        errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True)))
    assert errors[1] < 0.35 * errors[0] < 0.35 * 0.03


@pytest.mark.parametrize(("mode", "solver"), SOLVERS)
def test_a_stream_moves_only_while_its_own_time_is_inside(mode, solver):
    """The class token is finished at u = d / (1 + d), and the latents start at u = 1 / (1 + d)."""
    calls, interpolant = [], Interpolant()
    velocity = joint_velocity(interpolant, LEAD, calls)
    _, cls = sample(velocity, normals(n=3), interpolant, mode, solver, 26, cls_lead=LEAD)
    first, _ = normals(n=3)()
    start, finish, rounding = 1 / (1 + LEAD), LEAD / (1 + LEAD), 1e-9  # the grid of the ODE has both values
    waiting = [call for call in calls if call[0] > start - rounding]
    finished = [call for call in calls if call[0] < finish - rounding]
    between = [call for call in calls if finish + rounding < call[0] < start - rounding]
    assert min(len(part) for part in (waiting, finished, between)) >= 5

    def same(state, other):
        return torch.isclose(state, other, rtol=0, atol=1e-12)

    assert all(same(state, first).all() for _, state, _ in waiting)
    assert all(same(state, cls).all() for *_, state in finished)
    assert not any(same(state, first).any() for _, state, _ in [*between, *finished])
    assert not any(same(state, cls).any() for *_, state in [*between, *waiting])


def test_euler_maruyama_written_out():
    """Steps in which a stream starts or is finished, at a time of the grid or between two."""
    interpolant, lead = Interpolant(), 0.25
    velocity, grid = joint_velocity(interpolant, lead), torch.tensor([1, 0.9, 0.5, 0.2, 0.04, 0], dtype=torch.float64)
    noise, state = normals(n=4), normals(n=4, seed=1)()
    found = samplers.euler_maruyama(velocity, *state, noise, interpolant, list(pairwise(grid)), lead)
    noise = normals(n=4)
    for u, u_next in pairwise(grid):
        drawn, v, moved = noise(), velocity(*state, u), []
        for stream in (0, 1):
            t, t_next = times_of(u.item(), lead)[stream], times_of(u_next.item(), lead)[stream]
            t_next = 0 if abs(t_next) < 1e-12 else t_next
            value = state[stream]
            if t != t_next:
                score = (-(1 - t) * v[stream] - value) / t  # linear path
                kick = drawn[stream] if t_next > 0 else 0
                value = value + (v[stream] - t * score) * (t_next - t) + (2 * t * (t - t_next)) ** 0.5 * kick
            moved.append(value)
        state = moved
    for ours, theirs in zip(found, state, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_last_step_of_the_latents_starts_where_it_does_without_a_lead():
    times = samplers.sde_times(250, 0.04 / (1 + LEAD))
    assert stream_times(times[-2], LEAD)[0].item() == pytest.approx(0.04)
    assert torch.equal(samplers.sde_times(250, 0.04 / (1 + 0.0)), samplers.sde_times(250))


def test_the_network_is_told_both_times_and_guidance_follows_that_of_the_latents():
    calls = []

    def model(x, t, y, cls_token=None, project=True, t_cls=None):
        assert t.shape == t_cls.shape == (1,) and t.dtype == t_cls.dtype == torch.float32
        calls.append((t.item(), t_cls.item(), len(x)))
        return x, None, cls_token

    labels = torch.zeros(1, dtype=torch.int64)
    velocity = GuidedVelocity(model, labels, 5, Guidance(2.0, low=0.5, high=0.9), cls_lead=LEAD)
    sample(velocity, normals(n=1), Interpolant(), "ode", num_steps=20, cls_lead=LEAD)
    expected = [times_of(1 - i / 20, LEAD) for i in range(20)]
    assert [call[:2] for call in calls] == [pytest.approx(times, abs=1e-6) for times in expected]
    assert [size for *_, size in calls] == [2 if 0.5 <= t <= 0.9 else 1 for t, _ in expected]


@pytest.mark.parametrize("path_drop", [False, True])
def test_images_of_a_network_with_a_lead_do_not_depend_on_the_batch(path_drop):
    model = trained_looking_network(**SR_DIT, cls_lead=LEAD)
    arguments = (Interpolant(), Guidance(2.0, path_drop=path_drop))
    both = sample_images(model, [0, 1], [5, 6], *arguments, num_steps=6)
    one = sample_images(model, [1], [6], *arguments, num_steps=6)
    for several, single in zip(both, one, strict=True):
        torch.testing.assert_close(several[1:], single, rtol=1e-4, atol=1e-4)
    calm = SiT(model.config)
    calm.load_state_dict({**model.state_dict(), "t_cls_embedder.mlp.2.weight": torch.zeros(32, 32)})
    assert not torch.allclose(sample_images(calm.eval(), [1], [6], *arguments, num_steps=6)[0], one[0], atol=1e-3)
