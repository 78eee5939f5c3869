import math

import pytest
import torch

from models.interpolant import PATHS, Interpolant, shift_of_latents

SHAPES = [(5, 4, 8, 8), (5, 7)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_the_derivative_of_the_path(path, shape):
    interpolant = Interpolant(path)
    x, noise = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    t = torch.rand(shape[0], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: interpolant.interpolate(x, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(interpolant.velocity_target(x, noise, t), derivative)


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path):
    interpolant = Interpolant(path)
    x, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(interpolant.interpolate(x, noise, torch.zeros(2).double()), x)
    torch.testing.assert_close(interpolant.interpolate(x, noise, torch.ones(2).double()), noise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scalar", [False, True])
def test_score_of_a_gaussian(path, shape, scalar):
    """Data N(0, s^2): x_t is N(0, alpha^2 s^2 + sigma^2), so score and expected velocity are known."""
    interpolant, s = Interpolant(path), 1.7
    x_t = torch.randn(shape, dtype=torch.float64)
    t = torch.tensor(0.37, dtype=torch.float64) if scalar else torch.linspace(0.04, 1, shape[0], dtype=torch.float64)
    expand = t if scalar else t.view(-1, *[1] * (len(shape) - 1))
    at = interpolant.coefficients(expand)
    variance = at.alpha_t**2 * s**2 + at.sigma_t**2
    velocity = (at.alpha_t * at.d_alpha_t * s**2 + at.sigma_t * at.d_sigma_t) / variance * x_t
    torch.testing.assert_close(interpolant.score_from_velocity(velocity, x_t, t), -x_t / variance)


@pytest.mark.parametrize("path", PATHS)
def test_score_equals_the_published_fraction(path):
    interpolant = Interpolant(path)
    v, x_t, t = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.rand(4).double() * 0.9 + 0.05
    at = interpolant.coefficients(t[:, None])
    r = at.alpha_t / at.d_alpha_t
    expected = (r * v - x_t) / (at.sigma_t**2 - r * at.d_sigma_t * at.sigma_t)
    torch.testing.assert_close(interpolant.score_from_velocity(v, x_t, t), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [torch.rand(5).double(), torch.tensor([0.0, 0, 1, 1, 0.5]), torch.tensor(0.3)])
def test_data_are_found_from_their_velocity(path, t):
    interpolant = Interpolant(path)
    x, noise = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    x_t, velocity = interpolant.interpolate(x, noise, t.double()), interpolant.velocity_target(x, noise, t.double())
    torch.testing.assert_close(interpolant.data_from_velocity(velocity, x_t, t.double()), x)
    if path == "linear":
        torch.testing.assert_close(x_t - t.double().view(-1, 1) * velocity, x)


def test_cosine_keeps_the_variance():
    at = Interpolant("cosine").coefficients(torch.linspace(0, 1, 11, dtype=torch.float64))
    torch.testing.assert_close(at.alpha_t**2 + at.sigma_t**2, torch.ones(11, dtype=torch.float64))
    assert at.d_sigma_t[0] == pytest.approx(math.pi / 2)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"'vp' is unknown; allowed: linear, cosine"):
        Interpolant("vp")


@pytest.mark.parametrize("shift", [0.03, 0.5, 1.4142135623730951, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_time_shift_is_that_of_stable_diffusion_3(shift, dtype):
    t = torch.linspace(0, 1, 1001, dtype=dtype)
    shifted = Interpolant("linear", shift).shift(t)
    plain = [shift * one / (1 + (shift - 1) * one) for one in t.tolist()]
    torch.testing.assert_close(shifted, torch.tensor(plain, dtype=dtype), rtol=1e-5, atol=1e-6)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all() and shifted.dtype == dtype


def test_without_a_time_shift_times_stay_as_they_are():
    t = torch.rand(5)
    assert Interpolant("cosine").shift(t) is t and Interpolant("linear", 1).shift(t) is t


def test_the_time_shift_of_latents_follows_their_size():
    assert shift_of_latents(4, 32) == 1  # Stable Diffusion's at 256 px
    assert shift_of_latents(32, 16) == pytest.approx(math.sqrt(2)) and shift_of_latents(4, 64) == 2


def test_the_path_of_a_run_is_that_of_its_settings():
    def of(settings):
        path = Interpolant.of_run(settings)
        return path.path_type, path.time_shift

    assert of({}) == of({"time_shift": None}) == ("linear", 1.0)
    assert of({"path_type": "cosine", "time_shift": 2.5}) == ("cosine", 2.5)


@pytest.mark.parametrize("shift", [0, -1, 1e9, math.inf, math.nan, "2", None, True])
def test_an_impossible_time_shift_is_refused(shift):
    with pytest.raises(ValueError, match=f"time_shift {shift!r}: must be a number above 0, at most 1000"):
        Interpolant("linear", shift)
