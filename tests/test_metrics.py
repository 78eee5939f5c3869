"""The metrics against closed forms, brute force and one another."""

import math

import numpy as np
import pytest
import torch

from common.errors import InputError
from evaluations.metrics import (
    FeatureSums,
    GaussianStatistics,
    InceptionScoreSums,
    frechet_distance,
    precision_recall,
    squared_radii,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def statistics_of(features: torch.Tensor, batch: int = 1000) -> GaussianStatistics:
    sums = FeatureSums(features.shape[1])
    for part in features.split(batch):
        sums.update(part)
    return sums.statistics()


def random_statistics(width: int, count: int, seed: int = 0) -> GaussianStatistics:
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return statistics_of(torch.randn(count, width, generator=rng, dtype=torch.float64) @ mixing)


# ------------------------------------------------------------------------------------------------ sums


def test_sums_give_numpys_mean_and_covariance_however_they_are_batched() -> None:
    features = torch.randn(101, 7, generator=generator()) * 3 + 5
    for batch in (1, 10, 101):
        found = statistics_of(features, batch)
        np.testing.assert_allclose(found.mean, features.double().mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-11)
        assert found.count == 101


def test_sums_of_two_processes_add_up() -> None:
    features = torch.randn(50, 4, generator=generator())
    first, second, complete = FeatureSums(4), FeatureSums(4), FeatureSums(4)
    first.update(features[:20])
    second.update(features[20:])
    complete.update(features)
    first.load_state_dict({name: tensor + second.state_dict()[name] for name, tensor in first.state_dict().items()})
    torch.testing.assert_close(first.statistics().covariance, complete.statistics().covariance)
    assert first.statistics().count == 50


def test_covariance_needs_two_images_and_finite_features() -> None:
    sums = FeatureSums(3)
    sums.update(torch.ones(1, 3))
    with pytest.raises(InputError, match="at least 2 images, there are 1"):
        sums.statistics()
    sums.update(torch.tensor([[1.0, math.nan, 1.0]]))
    with pytest.raises(InputError, match="not finite"):
        sums.statistics()


# ------------------------------------------------------------------------------------------------ Frechet distance


def gaussian(mean: list[float], covariance: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(torch.tensor(mean, dtype=torch.float64), covariance.double())


def test_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    covariance = random_statistics(5, 100).covariance
    a, b = gaussian([0.0] * 5, covariance), gaussian([1.0, 2.0, 0.0, 0.0, -2.0], covariance)
    assert frechet_distance(a, b) == pytest.approx(9.0, rel=1e-10)


def test_distance_of_scaled_gaussians() -> None:
    a, b = gaussian([0.0] * 6, 4 * torch.eye(6)), gaussian([0.0] * 6, 25 * torch.eye(6))
    assert frechet_distance(a, b) == pytest.approx(6 * (5 - 2) ** 2, rel=1e-12)


def test_distance_equals_the_matrix_root_of_two_random_covariances() -> None:
    a, b = random_statistics(8, 50, 1), random_statistics(8, 60, 2)
    eigenvalues = torch.linalg.eigvals(a.covariance @ b.covariance)  # of a product of covariances: real, not negative
    root_trace = eigenvalues.real.sqrt().sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [5, 300], ids=["singular", "regular"])
def test_distance_is_symmetric_and_zero_to_itself(count: int) -> None:
    a, b = random_statistics(40, count, 1), random_statistics(40, 300, 2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-11 * float(a.covariance.trace())


def test_distance_of_singular_covariances_is_exact() -> None:
    first, second = torch.zeros(50, 50), torch.zeros(50, 50)
    first[0, 0] = first[1, 1] = 4.0
    second[1, 1] = second[2, 2] = 9.0
    turn, _ = torch.linalg.qr(torch.randn(50, 50, generator=generator(), dtype=torch.float64))
    a, b = (gaussian([0.0] * 50, turn @ part.double() @ turn.t()) for part in (first, second))
    assert frechet_distance(a, b) == pytest.approx(8 + 18 - 2 * 6, rel=1e-12)
    assert frechet_distance(gaussian([3.0] * 2, torch.zeros(2, 2)), gaussian([0.0] * 2, torch.zeros(2, 2))) == 18


def test_distance_refuses_other_widths_and_numbers_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"width 2 .* width 3"):
        frechet_distance(gaussian([0.0] * 2, torch.eye(2)), gaussian([0.0] * 3, torch.eye(3)))
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(gaussian([0.0] * 2, torch.eye(2)), gaussian([math.nan, 0.0], torch.eye(2)))


# ------------------------------------------------------------------------------------------------ Inception Score


def score_of(logits: torch.Tensor, batch: int = 1000) -> float:
    sums = InceptionScoreSums(len(logits), logits.shape[1])
    for first in range(0, len(logits), batch):
        sums.update(logits[first : first + batch], first)
    return sums.score()


def test_score_of_certain_and_even_classes_is_their_number() -> None:
    one_hot = torch.full((30, 10), -1e6)
    one_hot[torch.arange(30), torch.arange(30) % 10] = 0
    assert score_of(one_hot) == pytest.approx(10, rel=1e-12)


def test_score_of_equal_predictions_is_one() -> None:
    assert score_of(torch.zeros(30, 10)) == pytest.approx(1, rel=1e-12)
    assert score_of(torch.randn(1, 10, generator=generator()).expand(30, 10)) == pytest.approx(1, rel=1e-12)


def test_score_is_the_mean_over_splits_of_5000_the_shorter_last_one_counting_fully() -> None:
    logits = torch.randn(5600, 10, generator=generator()) * 3
    logits[5000:] *= 0.1

    def by_definition(part: torch.Tensor) -> float:
        p = part.double().softmax(1)
        return float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())

    expected = (by_definition(logits[:5000]) + by_definition(logits[5000:])) / 2
    for batch in (64, 999, 5600):  # batches that do not divide the split
        assert score_of(logits, batch) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ precision, recall


def test_precision_and_recall_of_constructed_sets() -> None:
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # third neighbour: the far corner
    assert squared_radii(square).tolist() == [2, 2, 2, 2]
    assert precision_recall(square, square) == (1, 1)
    assert precision_recall(square, square + 100) == (0, 0)
    tight = square / 100 + 0.5  # inside all the reference's balls; its own are too small to reach the reference
    assert precision_recall(square, tight) == (1, 0)
    assert precision_recall(tight, square) == (0, 1)
    assert precision_recall(square, torch.cat([square[:1].expand(4, 2), square + 100])) == (0.5, 0.25)


def test_the_border_of_a_ball_counts_as_inside() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # the third neighbour of 0 and of 3 is 3 away
    assert precision_recall(line, torch.tensor([[6.0], [60.0], [600.0], [6000.0]]))[0] == 0.25
    assert precision_recall(line, torch.tensor([[6.5], [60.0], [600.0], [6000.0]]))[0] == 0


@pytest.mark.parametrize("block", [3, 7, 64, 4096])
def test_precision_and_recall_equal_brute_force_for_blocks_that_do_not_divide(block: int) -> None:
    reference = torch.randn(53, 6, generator=generator())
    samples = torch.randn(64, 6, generator=generator()) * 0.8 + 0.3

    def inside(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = torch.cdist(centres.double(), centres.double()).sort(1).values[:, 3]
        return float((torch.cdist(points.double(), centres.double()) <= radii).any(1).double().mean())

    expected = inside(samples, reference), inside(reference, samples)
    assert precision_recall(reference, samples, block) == pytest.approx(expected)


def test_precision_and_recall_refuse_too_few_points_and_nan() -> None:
    four = torch.randn(4, 2, generator=generator())
    with pytest.raises(InputError, match="at least 4 images on both sides, the samples have 3"):
        precision_recall(four, four[:3])
    with pytest.raises(InputError, match="features of the reference are not finite"):
        precision_recall(torch.full((4, 2), math.nan), four)


# ------------------------------------------------------------------------------------------------ damaged numbers


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.covariance.mul_(1e308), "is not finite|cannot be decomposed|not finite"),
        (lambda s: s.mean.fill_(1e300), "the Frechet distance is not finite"),
        (lambda s: s.covariance.neg_(), "negative eigenvalue"),
        (lambda s: s.covariance[0, 0].sub_(100 * s.covariance.trace()), "negative eigenvalue"),
    ],
)
def test_a_distance_is_a_finite_number_or_an_error(change, problem: str) -> None:
    damaged = random_statistics(5, 50)
    change(damaged)
    with pytest.raises(InputError, match=problem):
        frechet_distance(random_statistics(5, 50, seed=1), damaged)


def test_scores_of_numbers_that_are_too_large_are_refused() -> None:
    points = torch.randn(10, 4, generator=generator())
    with pytest.raises(InputError, match="samples are too large for distances in float32"):
        precision_recall(points, points * 1e20)
    sums = InceptionScoreSums(4, 3)
    sums.update(torch.tensor([[torch.inf, 0, 0]] * 4), 0)
    with pytest.raises(InputError, match="the Inception Score is not finite"):
        sums.score()
