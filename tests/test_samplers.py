import math
from itertools import pairwise

import pytest
import torch

import samplers
from models.interpolant import PATHS, Interpolant
from models.sit import SiT
from samplers import MODES, Guidance, GuidedVelocity, ImageNoise, derive_seed, image_seeds, sample, sample_images

MEAN, STD = 1.5, 0.4


def gaussian_velocity(interpolant):
    """The exact velocity where data are N(MEAN, STD^2) in every coordinate, image and class token alike."""

    def of(x, t):
        at = interpolant.coefficients(t)
        variance = at.alpha_t**2 * STD**2 + at.sigma_t**2
        slope = (at.alpha_t * at.d_alpha_t * STD**2 + at.sigma_t * at.d_sigma_t) / variance
        return at.d_alpha_t * MEAN + slope * (x - at.alpha_t * MEAN)

    return lambda x, cls, t: (of(x, t), None if cls is None else of(cls, t))


def standard_normals(seed=0, n=2000, with_cls=True):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        x = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)
        return x, torch.randn(n, 3, generator=generator, dtype=torch.float64) if with_cls else None

    return draw


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mode", "solver"), [("sde", "euler"), ("ode", "euler"), ("ode", "heun"), ("ode", "dopri5")])
def test_samplers_reach_a_known_gaussian(path, mode, solver):
    interpolant = Interpolant(path)
    x, cls = sample(gaussian_velocity(interpolant), standard_normals(), interpolant, mode, solver, num_steps=200)
    for stream in (x, cls):
        assert stream.dtype == torch.float64
        assert stream.mean().item() == pytest.approx(MEAN, abs=0.03)
        assert stream.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """Halving the step divides the error by 2^order. The exact solution keeps the standardised coordinate."""
    interpolant = Interpolant("cosine")
    noise = standard_normals(n=50, with_cls=False)
    start, _ = noise()
    errors, second_order = [], solver == "heun"
    for steps in (40, 80):
        times = pairwise(samplers.ode_times(steps))
        x, _ = samplers.fixed_step_ode(gaussian_velocity(interpolant), start, None, times, second_order)
        errors.append((x - (MEAN + STD * start)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_dopri5_keeps_its_tolerance():
    start, _ = standard_normals(n=50, with_cls=False)()
    x, _ = samplers.dopri5(gaussian_velocity(Interpolant()), start, None)
    assert (x - (MEAN + STD * start)).abs().max() < 1e-4


@pytest.mark.parametrize(("mode", "solver", "calls"), [("sde", "euler", 10), ("ode", "euler", 10), ("ode", "heun", 19)])
def test_network_calls(mode, solver, calls):
    seen = []
    velocity = gaussian_velocity(Interpolant())

    def counting(x, cls, t):
        seen.append(t.item())
        return velocity(x, cls, t)

    sample(counting, standard_normals(n=2), Interpolant(), mode, solver, num_steps=10)
    assert len(seen) == calls and seen[0] == 1.0


def test_sde_times_are_the_published_ones():
    times = samplers.sde_times(250)
    assert len(times) == 251 and times.dtype == torch.float64
    assert times[0] == 1 and times[249] == 0.04 and times[250] == 0
    assert torch.allclose(times[:250].diff(), torch.full((249,), -0.96 / 249, dtype=torch.float64))


@pytest.mark.parametrize(
    ("times", "steps"), [("ode_times", range(10, 501)), ("sde_times", [1, 2, 25, 49, 97, 193, 250])]
)
def test_a_time_equal_to_a_bound_is_that_number(times, steps):
    """A time within rounding of a decimal fraction is the number that a flag's text becomes."""
    fractions = torch.tensor([float(f"{n / 100:.2f}") for n in range(101)], dtype=torch.float64)
    for num_steps in steps:
        grid = getattr(samplers, times)(num_steps)
        assert len(grid) == num_steps + 1 and grid[0] == 1 and grid[-1] == 0
        near = fractions[(grid * 100).round().long()]
        close = (grid - near).abs() < 1e-12
        assert torch.equal(grid[close], near[close]), num_steps
    assert Guidance(2.0, high=0.3).active(samplers.ode_times(20)[14].item())


def test_euler_maruyama_written_out():
    """Two steps by hand: noise after the first, none after the last."""
    interpolant, noise = Interpolant(), standard_normals(n=2)
    velocity = gaussian_velocity(interpolant)
    x, cls = sample(velocity, standard_normals(n=2), interpolant, num_steps=2)
    (x0, c0), (n_x, n_c) = noise(), noise()
    for result, state, e in ((x, x0, n_x), (cls, c0, n_c)):
        for t, t_next, kick in ((1.0, 0.04, e), (0.04, 0.0, 0)):
            t = torch.tensor(t, dtype=torch.float64)
            v = velocity(state, None, t)[0]
            score = (-(1 - t) * v - state) / t  # linear path
            state = state + (v - t * score) * (t_next - t) + (2 * t * (t - t_next)).sqrt() * kick
        torch.testing.assert_close(result, state)


class Affine(torch.nn.Module):
    """Velocities that depend on everything in a known way."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x, t, y, cls_token=None, label_drop=None, project=True):
        assert not project
        self.batches.append(len(x))
        self.dtypes = {x.dtype, cls_token.dtype}
        assert t.shape == (1,) and t.dtype == torch.float32  # in half precision too
        shift = y.to(x.dtype)
        return x + shift.view(-1, 1, 1, 1), None, cls_token + shift.view(-1, 1)


def guided(**guidance):
    return GuidedVelocity(Affine(), torch.tensor([1, 2]), null_class=10, guidance=Guidance(**guidance))


def test_guidance_formula_for_each_stream():
    x, cls = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 3).double()
    t = torch.tensor(0.5).double()
    v, v_cls = guided(scale=3.0, cls_scale=2.0)(x, cls, t)
    assert v[:, 0, 0, 0].tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    assert v_cls[:, 0].tolist() == [10 + 2 * (1 - 10), 10 + 2 * (2 - 10)]
    _, conditional = guided(scale=3.0, cls_scale=0.0)(x, cls, t)
    assert conditional[:, 0].tolist() == [1, 2]
    assert v.dtype == torch.float64


def test_guidance_acts_in_its_interval_only_and_in_one_call():
    x, cls = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 3).double()
    velocity = guided(scale=2.0, low=0.25, high=0.75)
    for t in (0.2, 0.25, 0.5, 0.75, 0.8):
        velocity(x, cls, torch.tensor(t).double())
    assert velocity.model.batches == [2, 4, 4, 4, 2]
    assert velocity.model.dtypes == {torch.float32}


@pytest.mark.parametrize("cls_scale", [3.0, 0.0])
def test_path_drop_guidance_written_out(cls_scale):
    """The unconditional branch goes through the first two and the last two blocks only, outside the interval none."""
    model, generator = trained_looking_network(**SR_DIT), torch.Generator().manual_seed(0)
    x, cls = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 6, generator=generator)
    y, t = torch.tensor([1, 4]), torch.tensor([0.5])
    calls = [[] for _ in model.blocks]
    with torch.no_grad():
        conditional, full = model(x, t, y, cls), model(x, t, torch.tensor([5, 5]), cls)
        unconditional = model(x, t, torch.tensor([5, 5]), cls, skip_middle=True)
        for block, sizes in zip(model.blocks, calls, strict=True):
            block.register_forward_hook(lambda block, given, _, sizes=sizes: sizes.append(len(given[0])))
        velocity = GuidedVelocity(model, y, 5, Guidance(2.0, cls_scale, 0.25, 0.75, path_drop=True))
        v, v_cls = velocity(x.double(), cls.double(), t.double()[0])
        velocity(x.double(), cls.double(), torch.tensor(0.8).double())
    assert calls == [[2, 2, 2]] * 2 + [[2, 2]] * 2 + [[2, 2, 2]] * 2
    assert not torch.allclose(full.velocity, unconditional.velocity, atol=1e-3)
    torch.testing.assert_close(v.float(), 2 * conditional.velocity - unconditional.velocity)
    expected = unconditional.cls_velocity + cls_scale * (conditional.cls_velocity - unconditional.cls_velocity)
    torch.testing.assert_close(v_cls.float(), expected if cls_scale else conditional.cls_velocity)


def test_path_drop_guidance_needs_sprint():
    with pytest.raises(ValueError, match="path drop in guidance: needs a network with SPRINT"):
        sample_images(trained_looking_network(), [0], [1], Interpolant(), Guidance(2.0, path_drop=True), num_steps=1)


def test_only_the_image_scale_turns_guidance_on():
    assert not Guidance(1.0, 5.0).active(0.5)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scale": 0}, "guidance scale 0: must be 1"),
        ({"scale": 0.5, "cls_scale": 5.0}, "guidance scale 0.5: must be 1"),
        ({"scale": math.nan}, "guidance scale nan"),
        ({"scale": 2.0, "cls_scale": math.inf}, "guidance scale of the class token inf"),
        ({"scale": 2.0, "low": 0.85, "high": 0.0}, "interval 0.85 .. 0.0: must be 0 <= low <= high <= 1"),
        ({"scale": 2.0, "high": 85}, "interval 0.0 .. 85"),
    ],
)
def test_impossible_guidance_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Guidance(**fields)


def test_the_class_token_has_the_scale_of_the_image_unless_given():
    assert Guidance(3.0) == Guidance(3.0, 3.0) != Guidance(3.0, 0.0)


def test_the_second_call_of_a_heun_step_is_guided_by_its_own_time():
    x, cls = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 3).double()
    velocity = guided(scale=2.0, low=0.5, high=0.5)
    samplers.fixed_step_ode(velocity, x, cls, pairwise(samplers.ode_times(4)), second_order=True)
    assert velocity.model.batches == [2, 2, 2, 4, 4, 2, 2]  # at times 1, .75; .75, .5; .5, .25; .25


def test_grid_times_equal_to_a_bound_are_guided_in_both_calls_of_heun():
    """Of 20 equal steps, the times 0.85 and 0.3 are on the grid: 12 guided times, two of them bounds."""
    x, cls = torch.zeros(2, 1, 2, 2).double(), torch.zeros(2, 3).double()
    velocity = guided(scale=2.0, low=0.3, high=0.85)
    samplers.fixed_step_ode(velocity, x, cls, pairwise(samplers.ode_times(20)), second_order=True)
    calls = velocity.model.batches  # two of each step, at its first and its last time; the last step has one
    first, second = calls[::2], calls[1::2]
    assert [20 - i for i, size in enumerate(first) if size == 4] == list(range(17, 5, -1))
    assert [19 - i for i, size in enumerate(second) if size == 4] == list(range(17, 5, -1))


SR_DIT = {"depth": 6, "norm": "rms", "qk_norm": "rms", "rope": True, "value_residual": True, "sprint": True}


def trained_looking_network(cls_token_dim=6, **fields):
    torch.manual_seed(0)
    sizes = {
        "input_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "encoder_depth": 1,
        "z_dims": [6], "projector_dim": 8,
    }  # fmt: skip
    model = SiT(**{**sizes, "cls_token_dim": cls_token_dim, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("cls_token_dim", [6, None])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_an_image_does_not_depend_on_its_batch(mode, cls_token_dim):
    model = trained_looking_network(cls_token_dim)
    labels, seeds = [0, 3, 4, 1], image_seeds(7, range(4))

    def images(rows):
        return sample_images(
            model, [labels[i] for i in rows], [seeds[i] for i in rows], Interpolant(), Guidance(2.0, 2.0), mode,
            num_steps=5,
        )  # fmt: skip

    whole_x, whole_cls = images([0, 1, 2, 3])
    parts = [images([2, 0]), images([3]), images([1])]
    x = torch.cat([part[0] for part in parts])[[1, 3, 0, 2]]
    torch.testing.assert_close(whole_x, x, atol=1e-5, rtol=1e-5)
    if cls_token_dim:
        cls = torch.cat([part[1] for part in parts])[[1, 3, 0, 2]]
        torch.testing.assert_close(whole_cls, cls, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_progress_wraps_the_steps(mode):
    counts = []
    sample_images(
        trained_looking_network(), [0], [1], Interpolant(), mode=mode, num_steps=4,
        progress=lambda steps: counts.append(len(steps)) or steps,
    )  # fmt: skip
    assert counts == [4]


def test_guidance_of_one_equals_none():
    model = trained_looking_network()
    plain = sample_images(model, [0, 1], [1, 2], Interpolant(), num_steps=4)
    one = sample_images(model, [0, 1], [1, 2], Interpolant(), Guidance(1.0, 1.0), num_steps=4)
    almost = sample_images(model, [0, 1], [1, 2], Interpolant(), Guidance(1.0 + 1e-9, 1.0), num_steps=4)
    assert torch.equal(plain[0], one[0])
    torch.testing.assert_close(plain[0], almost[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain[1], almost[1], atol=1e-5, rtol=1e-5)


def test_projectors_are_not_computed():
    model = trained_looking_network()
    model.projectors[0].register_forward_hook(lambda *_: pytest.fail("projector called"))
    sample_images(model, [0], [1], Interpolant(), num_steps=2)


def test_noise_belongs_to_the_image():
    both, second = ImageNoise([5, 6], (1, 2, 2), 3), ImageNoise([6], (1, 2, 2), 3)
    for _ in range(2):
        (x, cls), (x_2, cls_2) = both(), second()
        assert torch.equal(x[1:], x_2) and torch.equal(cls[1:], cls_2)
    generator = torch.Generator().manual_seed(6)
    first = ImageNoise([6], (1, 2, 2), 3)()
    assert torch.equal(first[0][0], torch.empty(1, 2, 2).double().normal_(generator=generator))  # image first
    assert torch.equal(first[1][0], torch.empty(3).double().normal_(generator=generator))


def test_threads_draw_the_same_noise():
    plain, threaded = (ImageNoise([5, 6, 7], (1, 2, 2), 3, threads=threads) for threads in (0, 2))
    for _ in range(3):
        with torch.inference_mode():  # as in `sample_images`
            (x, cls), (x_2, cls_2) = plain(), threaded()
        assert torch.equal(x, x_2) and torch.equal(cls, cls_2)


def test_one_time_for_the_batch_equals_the_same_time_for_each_image():
    model = trained_looking_network()
    x, y, cls, t = torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 5]), torch.randn(3, 6), torch.tensor([0.3])
    once, each = model(x, t, y, cls), model(x, t.expand(3), y, cls)
    torch.testing.assert_close(once.velocity, each.velocity)
    torch.testing.assert_close(once.cls_velocity, each.cls_velocity)


def test_labels_of_both_halves_are_made_once():
    velocity = guided(scale=2.0)
    assert velocity._both_labels is velocity._both_labels
    assert velocity._both_labels.tolist() == [1, 2, 10, 10]


def test_seeds_differ():
    seeds = {derive_seed(seed, number) for seed in range(20) for number in range(200)}
    assert len(seeds) == 4000 and derive_seed(0, 1, 2) not in seeds
    assert derive_seed(0, 1) != derive_seed(0, 1, 0)  # of image 1 and of training's step 0


def test_no_two_images_share_their_noise():
    """Not even on the CPU, whose generator looks at the low 32 bits of a seed."""
    low = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.rand(3, generator=low[0]), torch.rand(3, generator=low[1]))
    for seed in range(12):  # seeds that are random in these bits meet in every fourth such set
        seeds = image_seeds(seed, range(50_000))
        assert len({image_seed % 2**32 for image_seed in seeds}) == 50_000
        assert image_seeds(seed, [7, 49_999]) == [seeds[7], seeds[49_999]] and max(seeds) < 2**64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "dde"}, "'dde'"),
        ({"mode": "ode", "solver": "rk4"}, "'rk4'"),
        ({"mode": "sde", "solver": "heun"}, "'heun' is a solver of the ODE"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.5}, "num_steps is 2.5"),
    ],
)
def test_unknown_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        sample(gaussian_velocity(Interpolant()), standard_normals(), Interpolant(), **options)


@pytest.mark.parametrize(
    ("labels", "text"),
    [([0, 6], "label 6: .* 0 .. 4, and 5 for no class"), ([-1, 0], "label -1"), ([0], "1 labels and")],
)
def test_labels_that_the_network_lacks_are_refused(labels, text):
    with pytest.raises(ValueError, match=text):
        sample_images(trained_looking_network(), labels, [1, 2], Interpolant(), num_steps=1)


def plain_sampler(mode, solver, velocity, noise, score, shift, num_steps):
    """The samplers for a single stream, written out with a time shift (SiT, section 2, and SD3, equation 23)."""

    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    x = noise()[0]
    if mode == "sde":
        times = [1 - 0.96 * i / (num_steps - 1) for i in range(num_steps)] + [0]
    else:
        times = [1 - i / num_steps for i in range(num_steps)] + [0]
    times = [torch.tensor(shifted(t), dtype=torch.float64) for t in times]
    for number, (t, t_next) in enumerate(pairwise(times)):
        last = number == num_steps - 1
        if mode == "sde":
            x = x + (velocity(x, t) - t * score(x, t)) * (t_next - t)
            x = x if last else x + torch.sqrt(2 * t * (t - t_next)) * noise()[0]
        else:
            slope = velocity(x, t)
            if solver == "heun" and not last:
                slope = (slope + velocity(x + slope * (t_next - t), t_next)) / 2
            x = x + slope * (t_next - t)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mode", "solver"), [("sde", "euler"), ("ode", "euler"), ("ode", "heun")])
def test_a_time_shift_moves_all_times_of_the_grid(path, mode, solver):
    interpolant = Interpolant(path, 2.5)
    exact = gaussian_velocity(interpolant)

    def score(x, t):
        at = interpolant.coefficients(t)
        return -(x - at.alpha_t * MEAN) / (at.alpha_t**2 * STD**2 + at.sigma_t**2)

    found, _ = sample(exact, standard_normals(n=9, with_cls=False), interpolant, mode, solver, num_steps=7)
    normals = standard_normals(n=9, with_cls=False)
    plain = plain_sampler(mode, solver, lambda x, t: exact(x, None, t)[0], normals, score, 2.5, 7)
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
    unshifted, _ = sample(exact, standard_normals(n=9, with_cls=False), Interpolant(path), mode, solver, num_steps=7)
    assert (found - unshifted).abs().max() > 1e-4


def test_an_adaptive_solver_has_no_grid_to_shift():
    found = [
        sample(gaussian_velocity(path), standard_normals(n=5), path, "ode", "dopri5")[0]
        for path in (Interpolant(), Interpolant("linear", 3.0))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", MODES)
def test_the_guidance_interval_is_of_shifted_times(mode):
    times = []

    def network(x, t, y, cls_token=None, project=True):
        times.append((t.item(), len(x)))
        return x, None, None

    velocity = GuidedVelocity(network, torch.zeros(1, dtype=torch.int64), 5, Guidance(2.0, low=0.5, high=0.9))
    sample(velocity, standard_normals(n=1, with_cls=False), Interpolant("linear", 4.0), mode, num_steps=20)
    assert all((size == 2) == (0.5 <= t <= 0.9) for t, size in times)
    unshifted = {t / (4 - 3 * t) for t, size in times if size == 2}
    assert min(unshifted) < 0.25 and 6 < len(unshifted) < 12
