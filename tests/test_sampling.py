"""Grids and samples of a run are of the classes of its data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from common.classes import ClassSet
from common.locks import unlock_folder
from models.checkpoint import load_checkpoint
from samplers import Guidance
from tests.conftest import NUM_CLASSES, reset_accelerate
from training import sampling
from training.sampling import count_broken, draw_latents, grid_captions, grid_columns, image_labels

LABELS = {0: 5, 1: 17, 2: 40}  # in place of 0, 1, 2


@pytest.fixture
def run(train_flags, data):
    """A run that was trained on three of 50 classes, which have names."""
    names = [f"name {label}" for label in range(50)]
    for folder in ("images", "vae-sd"):
        path = data / folder / "dataset.json"
        content = json.loads(path.read_text())
        content["labels"] = [[name, LABELS[label]] for name, label in content["labels"]]
        path.write_text(json.dumps({**content, "classes": names}))
    flags = f"""--data-dir {data} --exp-name run --max-train-steps 2 --sampling-steps 2 --grid-samples 7
        --grid-num-steps 1"""
    reset_accelerate()
    run = train.set_up(train.parse_args([*train_flags, *flags.split()]))
    train.train(run)
    return run


def test_only_classes_of_the_data_are_drawn_and_recorded(run, monkeypatch):
    assert run.facts.network.num_classes == 50
    assert image_labels(run, range(2, 8)) == [40, 5, 17, 40, 5, 17]
    checkpoint = load_checkpoint(run.folder / "checkpoints" / "0000002.pt")
    assert ClassSet.from_json(checkpoint["classes"]) == ClassSet((5, 17, 40), ("name 5", "name 17", "name 40"))
    grid = np.array(Image.open(run.folder / "samples" / "0000002.png"))
    assert grid.shape[1] == 3 * 66 - 2 and 10 < grid.shape[0] - (2 * 66 - 2) < 20  # 3 columns, 2 rows, 1 line
    asked = []
    monkeypatch.setattr(sampling, "image_grid", lambda *given, **more: asked.append(more) or Image.new("L", (1, 1)))
    sampling.write_samples(run)
    assert asked == [{"captions": ["name 5", "name 17", "name 40", None, None, None]}]


def test_the_network_for_sampling_has_the_tensors_of_the_average(run):
    network = sampling.averaged_network(run)
    assert network is not run.ema and not network.training
    pairs = zip(network.named_parameters(), run.ema.named_parameters(), strict=True)
    for (name, own), (also, average) in pairs:
        assert name == also and own.data_ptr() == average.data_ptr() and not own.requires_grad
    given = (run, range(3), 2, Guidance())
    found, expected = (draw_latents(given[0], one, *given[1:]) for one in (network, run.ema))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_without_labels_samples_are_of_the_null_class(train_flags, monkeypatch, said):
    """A grid has no captions and no columns of classes, and scores have no part that needs a class."""
    reset_accelerate()
    flags = "--exp-name run --cfg-prob 1 --max-train-steps 3 --sampling-steps 3 --grid-samples 7 --grid-num-steps 1"
    run = train.set_up(train.parse_args([*train_flags, *flags.split(), "--eval-samples", "4", "--eval-num-steps", "1"]))
    before = run.ema.y_embedder.embedding_table.weight.clone()
    asked = []
    monkeypatch.setattr(
        sampling, "image_grid", lambda *given, **more: asked.append((given, more)) or Image.new("L", (1, 1))
    )
    train.train(run)
    assert [given[1:] for given, _ in asked] == [(None,)] * 2 and asked[1][1] == {"captions": None}
    assert image_labels(run, range(2)) == [NUM_CLASSES] * 2
    changed_rows = (run.ema.y_embedder.embedding_table.weight != before).any(1)
    assert changed_rows.tolist() == [False] * NUM_CLASSES + [True]
    assert any("3 classes (trained without labels, --cfg-prob 1)" in line for line in said)
    monkeypatch.setattr(sampling, "class_centres", None)
    run.evaluation = lambda draw: draw(range(4)) is not None and {"fid": 3.0, "num_samples": 4, "notes": []}
    scores = sampling.score_samples(run)
    assert set(scores) == {"fid", "num_samples", "notes", "num_steps", "coherence", "coherence_shuffled"}


def test_samples_are_drawn_in_the_precision_of_the_run(train_flags):
    reset_accelerate()
    run = train.set_up(train.parse_args([*train_flags, "--exp-name", "half", "--mixed-precision", "bf16"]))
    dtypes = []
    run.ema.blocks[0].attn.qkv.register_forward_hook(lambda _, given, output: dtypes.append(output.dtype))
    draw_latents(run, run.ema, range(2), 2, Guidance())
    assert dtypes == [torch.bfloat16] * 2
    assert run.ema.dtype == torch.float32
    unlock_folder(run.folder)


@pytest.mark.parametrize(
    ("classes", "samples", "columns"),
    [(1, 36, None), (2, 36, 6), (3, 36, 6), (4, 36, 4), (5, 36, 5), (10, 36, 10), (12, 36, 12), (13, 36, None),
     (1000, 36, None), (10, 9, None), (3, 4, 3), (2, 1, None)],
)  # fmt: skip
def test_a_column_is_of_one_class_where_the_number_of_samples_allows_it(classes, samples, columns):
    found = grid_columns(classes, samples)
    assert found == columns
    if found:
        labels = [number % classes for number in range(samples)]
        assert all(len(set(labels[column::found])) == 1 for column in range(found))


def test_captions_name_columns_or_images_and_a_single_class_not_at_all():
    classes = ClassSet((3, 8), ("cat", "日本"))
    assert grid_captions(classes, [3, 8, 3, 8], 2) == ["cat", "8", None, None]
    assert grid_captions(classes, [8, 3, 3], None) == ["8", "cat", "cat"]
    assert grid_captions(ClassSet((0,)), [0, 0], None) is None


def test_samples_that_are_not_finite_get_no_scores_and_a_warning(run, monkeypatch, said):
    latents = torch.zeros(4, 3, 16, 16)
    latents[1, 0, 0, 0] = float("nan")
    latents[2] = float("inf")
    assert int(count_broken(latents)) == 2 and int(count_broken(latents, torch.full((4, 2), float("nan")))) == 4
    monkeypatch.setattr(sampling, "draw_latents", lambda *parts: (latents, torch.zeros(4, 32)))
    sampling.write_samples(run)
    assert said[0] == "warning: step 2: 2 of 4 samples of the grid are not finite"
    run.evaluation = lambda draw: draw(range(4)) is not None and {"fid": 3.0, "num_samples": 4, "notes": []}
    scores = sampling.score_samples(run)
    assert np.isnan(scores["fid"]) and np.isnan(scores["coherence"]) and scores["num_samples"] == 4
    assert said[-1] == "warning: step 2: no scores, 2 of the samples are not finite"
