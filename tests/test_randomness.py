import dataclasses
import math

import pytest
import torch

from loss import Draws
from models.interpolant import PATHS, Interpolant
from training.randomness import TIME_DISTRIBUTIONS, StepRandomness, lognormal_times, uniform_times

SHAPE, WIDTH = (4, 8, 8), 6


def source(**changes) -> StepRandomness:
    settings = {"seed": 3, "batch_size": 64, "latent_shape": SHAPE, "cls_token_dim": WIDTH, "path": Interpolant()}
    settings |= {"weighting": "uniform", "cfg_prob": 0.1}
    return StepRandomness(**settings | changes)


def test_a_step_repeats_and_steps_and_seeds_differ():
    sprint = {"sprint_tokens": 17, "sprint_path_drop": 0.5}
    first, again = source(**sprint).draw(5), source(**sprint).draw(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (source(**sprint).draw(6), source(seed=4, **sprint).draw(5)):
        assert not any(torch.equal(a, b) for a, b in zip(first[:-1], other[:-1], strict=True))


def test_draws_do_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    first = source().draw(5)
    torch.manual_seed(1)
    assert torch.equal(first.noise, source().draw(5).noise)


def test_shapes_and_independence():
    draws = source().draw(0)
    assert draws.t.shape == draws.label_drop.shape == (64,) and draws.label_drop.dtype == torch.bool
    assert draws.noise.shape == draws.latent_noise.shape == (64, *SHAPE) and draws.cls_noise.shape == (64, WIDTH)
    assert not torch.equal(draws.noise, draws.latent_noise)


def test_without_a_class_token_all_other_draws_are_the_same():
    with_slot, without = source().draw(1), source(cls_token_dim=None).draw(1)
    assert without.cls_noise is None
    assert all(torch.equal(getattr(with_slot, name), getattr(without, name)) for name in Draws._fields[:4])


def test_without_sprint_all_other_draws_are_the_same():
    with_sprint, without = source(sprint_tokens=65, sprint_path_drop=0.5).draw(1), source().draw(1)
    assert without.route is without.path_drop is None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(with_sprint[:5], without[:5], strict=True))
    route = with_sprint.route
    assert route.shape == (64, 65) and route.min() >= 0 and route.max() < 1 and len(route.unique()) > 4000
    assert route.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_the_path_is_dropped_for_all_samples_of_a_step_with_its_probability(probability):
    sprint = source(batch_size=4, latent_shape=(1, 1, 1), sprint_tokens=2, sprint_path_drop=probability)
    dropped = torch.stack([sprint.draw(step).path_drop for step in range(500)])
    assert dropped.shape == (500, 4) and dropped.dtype == torch.bool
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.06)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.7])
def test_labels_are_dropped_with_their_probability(probability):
    dropped = source(batch_size=20_000, latent_shape=(1, 1, 1), cfg_prob=probability).draw(0).label_drop
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.015)


def test_at_probability_1_each_label_is_dropped_and_all_other_draws_are_the_same():
    without, with_labels = source(cfg_prob=1.0).draw(1), source().draw(1)
    assert without.label_drop.all() and not with_labels.label_drop.all()
    same = [name for name in Draws._fields[:5] if name != "label_drop"]
    assert all(torch.equal(getattr(without, name), getattr(with_labels, name)) for name in same)


def test_uniform_times_fill_the_interval():
    t = uniform_times(20_000, Interpolant(), torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    torch.testing.assert_close(t.sort().values, torch.linspace(0, 1, 20_000), atol=0.02, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_lognormal_times_have_that_noise_to_signal_ratio(path):
    path = Interpolant(path)
    t = lognormal_times(20_000, path, torch.Generator().manual_seed(0)).double()
    at = path.coefficients(t)
    log_ratio = (at.sigma_t / at.alpha_t).log()
    assert log_ratio.mean().abs() < 0.03 and (log_ratio.std() - 1).abs() < 0.03
    assert math.isclose(t.median().item(), 0.5, abs_tol=0.02)


def test_a_distribution_is_one_entry(monkeypatch):
    monkeypatch.setitem(TIME_DISTRIBUTIONS, "late", lambda count, path, generator: torch.full((count,), 0.9))
    assert source(weighting="late").draw(0).t.unique().tolist() == pytest.approx([0.9])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (0.8, 0.5), (10, 10), (-10, 10)])
def test_logit_normal_times_are_the_sigmoid_of_normal_numbers(mean, std):
    t = lognormal_times(2000, Interpolant(), torch.Generator().manual_seed(2), mean, std)
    normals = torch.randn(2000, generator=torch.Generator().manual_seed(2)).tolist()
    plain = [1 / (1 + math.exp(-(mean + std * n))) for n in normals]
    torch.testing.assert_close(t, torch.tensor(plain), rtol=1e-5, atol=1e-6)
    assert t.isfinite().all() and t.min() >= 0 and t.max() <= 1


@pytest.mark.parametrize("path", PATHS)
def test_logit_normal_times_of_mean_0_and_width_1_are_as_before(path):
    ratio = torch.randn(2000, generator=torch.Generator().manual_seed(2)).exp()
    before = ratio / (1 + ratio) if path == "linear" else 2 / math.pi * torch.atan(ratio)
    for parameters in ({}, {"mean": 0.0, "std": 1.0}):
        t = lognormal_times(2000, Interpolant(path), torch.Generator().manual_seed(2), **parameters)
        assert torch.equal(t, before)


@pytest.mark.parametrize("weighting", TIME_DISTRIBUTIONS)
def test_a_time_shift_moves_the_times_and_no_other_draw(weighting):
    plain, moved = (
        source(weighting=weighting).draw(2),
        source(weighting=weighting, path=Interpolant("linear", 3)).draw(2),
    )
    expected = [3 * t / (1 + 2 * t) for t in plain.t.tolist()]
    torch.testing.assert_close(moved.t, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:5], moved[1:5], strict=True))


def test_the_parameters_of_the_times_reach_their_distribution():
    drawn = source(batch_size=20_000, latent_shape=(1, 1, 1), weighting="lognormal")
    drawn = dataclasses.replace(drawn, time_parameters={"mean": -0.4, "std": 0.5}).draw(0)
    logits = torch.logit(drawn.t.double())
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.02) and logits.std().item() == pytest.approx(0.5, abs=0.02)
