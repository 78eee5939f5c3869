"""Coherence of generated class tokens: against its formulas, written out pair by pair."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import InputError
from dataset import LatentDataset
from evaluations import coherence
from evaluations.coherence import CentreSums, CoherenceReport, CoherenceSums, class_mean_sums
from loss import entangled_token
from models.encoders import load_encoder
from tests.conftest import ENCODER, NUM_CLASSES, RESOLUTION

N, D, K = 20, 6, 4


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % K
    centres = torch.randn(K, D, generator=generator)
    near = centres[labels] + 0.3 * torch.randn(N, D, generator=generator)
    return near, near + 0.3 * torch.randn(N, D, generator=generator), labels, centres


def scores(generated, encoded, labels, centres, batch=N):
    sums = CoherenceSums(D)
    for rows in torch.arange(N).split(batch):
        sums.update(generated[rows], encoded[rows], labels[rows], centres)
    return sums.scores()


def test_scores_written_out():
    generated, encoded, labels, centres = tokens(0)
    found = scores(generated, encoded, labels, centres)
    cosines = F.cosine_similarity(generated[:, None], encoded[None], dim=-1)
    others = cosines[~torch.eye(N, dtype=torch.bool)]
    nearest = [min(range(K), key=lambda k: (token - centres[k]).norm().item()) for token in generated]
    assert found["coherence"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
    assert found["coherence_shuffled"] == pytest.approx(others.mean().item(), abs=1e-6)
    to_mean = F.cosine_similarity(generated, centres[labels]).mean().item()
    assert found["coherence_class_mean"] == pytest.approx(to_mean, abs=1e-6)
    assert found["cls_tokens_right"] == sum(a == b for a, b in zip(nearest, labels.tolist(), strict=True)) / N


def test_equal_tokens_agree_whatever_their_length_and_others_less():
    generated, _, labels, centres = tokens(1)
    found = scores(generated, 7 * generated, labels, centres)
    assert found["coherence"] == pytest.approx(1)
    assert found["coherence_shuffled"] < 0.9


def test_batches_and_processes_add_up():
    generated, encoded, labels, centres = tokens(2)
    complete, parts = scores(generated, encoded, labels, centres), scores(generated, encoded, labels, centres, batch=3)
    assert complete == pytest.approx(parts)
    processes = [CoherenceSums(D) for _ in range(2)]
    for sums, rows in zip(processes, torch.arange(N).split(N // 2), strict=True):
        sums.update(generated[rows], encoded[rows], labels[rows], centres)
    together = CoherenceSums(D)
    together.load_state_dict(
        {name: value + processes[1].state_dict()[name] for name, value in processes[0].state_dict().items()}
    )
    assert together.scores() == pytest.approx(complete)


def test_tokens_of_other_classes_are_not_right():
    _, _, labels, centres = tokens(3)
    wrong = centres[(labels + 1) % K]
    assert scores(wrong, wrong, labels, centres)["cls_tokens_right"] == 0
    assert scores(centres[labels], wrong, labels, centres)["cls_tokens_right"] == 1


def test_images_of_a_class_without_real_ones_are_left_out():
    generated, encoded, labels, centres = tokens(5)
    with_gap = torch.cat([centres, torch.full((1, D), torch.nan)])
    sums = CoherenceSums(D)
    sums.update(generated, encoded, labels, with_gap)
    sums.update(generated[:3], encoded[:3], torch.full((3,), K), with_gap)
    assert sums.scores() == scores(generated, encoded, labels, centres)


def test_without_labels_there_are_only_the_scores_that_need_no_class():
    generated, encoded, labels, centres = tokens(5)
    sums = CoherenceSums(D, labelled=False)
    for rows in torch.arange(N).split(7):
        sums.update(generated[rows], encoded[rows])
    expected = scores(generated, encoded, labels, centres)
    assert sums.scores() == pytest.approx({name: expected[name] for name in ("coherence", "coherence_shuffled")})


def test_with_a_single_class_each_token_is_right():
    generated, encoded, labels, centres = tokens(5)
    found = scores(generated, encoded, torch.zeros_like(labels), centres[:1])
    assert found["cls_tokens_right"] == 1 and -1 < found["coherence_class_mean"] < 1


def test_centre_images_are_equally_many_of_each_class(monkeypatch):
    monkeypatch.setattr(coherence, "CENTRE_IMAGES", 6)
    assert coherence.centre_images(np.array([0, 0, 0, 4, 4, 2, 0, 4])) == [0, 1, 3, 4, 5]


def test_centres_are_class_means():
    generated, _, labels, _ = tokens(4)
    sums = CentreSums(K, D)
    for rows in torch.arange(N).split(7):
        sums.update(generated[rows], labels[rows])
    expected = torch.stack([generated[labels == k].double().mean(0) for k in range(K)])
    torch.testing.assert_close(sums.centres(), expected)
    with pytest.raises(InputError, match="at least 2 images, there are 0"):
        CoherenceSums(D).scores()


@pytest.mark.parametrize("kind", ["class", "patch-mean"])
def test_class_means_need_images_only_and_processes_share_them(data, encoder_weights, kind):
    encoder, dataset = load_encoder(ENCODER, RESOLUTION, encoder_weights), LatentDataset(data)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    found, labels = entangled_token(kind, encoder(images), None), torch.from_numpy(dataset.labels)
    expected = torch.stack([found[labels == label].double().mean(0) for label in range(NUM_CLASSES)])
    for path in (data / "vae-sd").rglob("*.npy"):
        path.unlink()
    complete = class_mean_sums(encoder, kind, dataset, 5, "cpu")
    torch.testing.assert_close(complete.centres(), expected, rtol=1e-5, atol=1e-6)
    shares = [class_mean_sums(encoder, kind, dataset, 5, "cpu", process, 3).state_dict() for process in range(3)]
    complete.load_state_dict({name: sum(share[name] for share in shares) for name in shares[0]})
    torch.testing.assert_close(complete.centres(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "num_images", "message"),
    [
        ({"num_classes": 5}, 7, r"--coherence .*data.*: num_classes 3, but run\.pt has 5"),
        ({"resolution": 32}, 7, r"--coherence .*data.*: resolution 16, but run\.pt has 32"),
        ({}, 1, "--coherence: needs at least 2 images, not 1"),
        ({"entangle": "latent-mean"}, 7, r"run\.pt was not trained with an encoder's class token"),
    ],
)
def test_a_report_that_cannot_work_is_refused_at_once(shared_data, encoder_weights, changed, num_images, message):
    settings = {"entangle": "class", "enc_type": ENCODER, "enc_weights": str(encoder_weights)}
    settings |= {"num_classes": NUM_CLASSES, "resolution": RESOLUTION}
    good, bad = ({"args": argparse.Namespace(**settings | more)} for more in ({}, changed))
    assert CoherenceReport(good, shared_data, source="run.pt", num_images=2).encoder.width == 32
    with pytest.raises(InputError, match=message):
        CoherenceReport(bad, shared_data, source="run.pt", num_images=num_images)
