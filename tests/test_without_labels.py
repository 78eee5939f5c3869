"""Data without labels, and of one class: training, grids, scores and generation work."""

import json

import numpy as np
import pytest
from PIL import Image

import train
from common.errors import InputError
from models.autoencoder import PixelCodec
from models.checkpoint import load_checkpoint, load_model, save_checkpoint
from models.interpolant import Interpolant
from samplers import image_seeds, sample_images
from tests.conftest import DEVICE, reset_accelerate, run_generate
from tests.test_checkpoint import content
from tests.test_sit import randomise, small
from training import sampling


def set_labels(data, change):
    """Change the dataset.json of images and latents."""
    for name in ("images", "vae-sd"):
        path = data / name / "dataset.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


DATA = {
    "null": lambda content: content.update(labels=None),
    "missing": lambda content: content.pop("labels"),
    "one class": lambda content: content.update(labels=[[name, 0] for name, _ in content["labels"]]),
}


@pytest.mark.parametrize(
    ("kind", "flags", "start"),
    [
        ("null", "--grid-cfg-scale 2", "24 images of 16 px, no labels (one class, label 0), latents"),
        ("null", "--cfg-prob 1", "24 images of 16 px, no labels (trained without labels, --cfg-prob 1), latents"),
        ("missing", "--cfg-prob 1", "24 images of 16 px, no labels (trained without labels, --cfg-prob 1), latents"),
        ("one class", "--grid-cfg-scale 2", "24 images of 16 px, 1 class, latents"),
    ],
    ids=["null", "null-without", "missing", "one-class"],
)
def test_each_program_works_on_a_single_class(data, train_flags, tmp_path, monkeypatch, said, kind, flags, start):
    set_labels(data, DATA[kind])
    more = f"--data-dir {data} --exp-name run --max-train-steps 1 --sampling-steps 1 --grid-samples 4 {flags}"
    reset_accelerate()
    run = train.set_up(train.parse_args([*train_flags, *more.split(), "--grid-num-steps", "1"]))
    train.train(run)
    assert any(f"{data}: {start}" in line for line in said) and run.facts.network.num_classes == 1
    assert np.array(Image.open(run.folder / "samples/0000001.png")).shape == (2 * 66 - 2, 2 * 66 - 2, 3)  # no captions
    run.evaluation = lambda draw: draw(range(4)) is not None and {"fid": 3.0, "num_samples": 4, "notes": []}
    with_labels = "--cfg-prob" not in flags
    assert ("cls_tokens_right" in (scores := sampling.score_samples(run))) is with_labels
    assert all(np.isfinite(value) for name, value in scores.items() if name.startswith("co"))

    checkpoint = run.folder / "checkpoints/0000001.pt"
    assert load_checkpoint(checkpoint)["classes"] == {"labels": [0]}
    guidance = ["--cfg-scale", "2"] if with_labels else []
    line = f"--ckpt {checkpoint} --sample-dir {tmp_path} --name set --num-fid-samples 3 --num-steps 1 --device {DEVICE}"
    run_generate([*line.split(), "--coherence", str(data), *guidance], monkeypatch)
    listed = json.loads((tmp_path / "set/images/dataset.json").read_text())["labels"]
    assert listed == ([[f"{number:06d}.png", 0] for number in range(3)] if with_labels else None)
    scores = json.loads((tmp_path / "set/coherence.json").read_text())
    assert scores.get("cls_tokens_right") == (1 if with_labels else None)
    assert ("coherence_class_mean" in scores) is with_labels and np.isfinite(scores["coherence"])


def test_a_network_trained_without_labels_generates_images_of_its_null_class(tmp_path, monkeypatch):
    network = randomise(small(in_channels=3, num_classes=3)).eval()
    file, saved = tmp_path / "0000012.pt", content(network, codec=PixelCodec().format.to_json(), cfg_prob=0.1)
    save_checkpoint(file, saved)
    line = f"--ckpt {file} --sample-dir {tmp_path} --num-fid-samples 7 --num-steps 3 --device {DEVICE} --name"
    run_generate([*line.split(), "none", "--label-sampling", "none"], monkeypatch)  # of a network with labels
    saved["args"].cfg_prob = 1.0
    save_checkpoint(file, saved)
    run_generate([*line.split(), "default"], monkeypatch)
    settings = json.loads((tmp_path / "default/samples.json").read_text())
    assert (settings["label_sampling"], settings["drawn_labels"]) == ("none", None)
    assert json.loads((tmp_path / "default/images/dataset.json").read_text()) == {"labels": None}
    latents, _ = sample_images(load_model(file), [3] * 7, image_seeds(0, range(7)), Interpolant(), num_steps=3)
    expected = PixelCodec().decode(latents.float()).permute(0, 2, 3, 1).numpy()
    found, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("default", "none"))
    assert abs(found.astype(int) - expected.astype(int)).max() <= 1 and np.array_equal(found, other)
    run_generate([*line.split(), "default", "--label-sampling", "none"], monkeypatch)  # completes the set
    with pytest.raises(InputError, match=r"--cfg-scale 2: .* was trained without labels"):
        run_generate([*line.split(), "guided", "--cfg-scale", "2"], monkeypatch)
    assert not (tmp_path / "guided").exists()
