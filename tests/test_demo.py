import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from common.errors import InputError
from common.images import save_png
from common.io import write_json
from experiments import demo
from experiments.judge import load_images
from experiments.solids import SOLIDS, draw_scenes, render
from models.encoders import load_encoder, untrained_encoder
from tests.conftest import ROOT


def write_pictures(folder, seed: int, per_class: int = 6):
    """Write pictures of all solids at 24 px, as convert.py makes them."""
    labels = []
    for label, solid in enumerate(SOLIDS.values()):
        for pixels in render(solid, draw_scenes(per_class, torch.Generator().manual_seed(10 * seed + label))).numpy():
            name = f"{len(labels)}.png"
            save_png(folder / name, Image.fromarray(pixels).resize((24, 24), Image.Resampling.BOX))
            labels.append([name, label])
    write_json(folder / "dataset.json", {"labels": labels})
    return folder


def test_commands(capsys, tmp_path):
    demo.main(["encoder-spec"])
    assert capsys.readouterr().out.strip() == demo.ENCODER_SPEC
    for argv in ([], ["other"], ["--dest", "x"]):
        with pytest.raises(InputError, match="allowed: images, encoder, encoder-spec, score"):
            demo.main(argv)
    with pytest.raises(InputError, match="the command images requires --dest"):
        demo.main(["images"])
    with pytest.raises(InputError, match="the command score requires --held-out"):
        demo.main(["score", "--samples", "x", "--encoder", "x", "--images", "x", "--dest", str(tmp_path / "x")])
    with pytest.raises(InputError, match=r"--dest .*: is a folder; allowed: the name of a file"):
        demo.main(["encoder", "--images", "x", "--dest", str(tmp_path)])


def test_real_pictures_get_the_score_of_real_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "JUDGE_STEPS", 2)
    monkeypatch.setattr(demo, "NOISE_IMAGES", 20)
    images, held_out = write_pictures(tmp_path / "images", 0), write_pictures(tmp_path / "held_out", 1)
    write_pictures(tmp_path / "samples" / "images", 0)
    encoder, score = str(tmp_path / "encoder.safetensors"), tmp_path / "score.json"
    demo.main(["encoder", "--images", str(images), "--dest", encoder, "--steps", "2"])
    flags = ["--images", images, "--held-out", held_out, "--samples", tmp_path / "samples", "--dest", score]
    demo.main(["score", "--encoder", encoder, *map(str, flags)])
    found = json.loads(score.read_text())
    assert found["images"] == 60 and found["cls_tokens_right"] is None
    for name in ("right", "distance", "encoder_distance"):
        assert found[name] == found[f"{name}_of_real"]
    assert found["encoder_distance"] < found["encoder_distance_of_noise"]

    # Generated class tokens are compared with the mean token of each class of the held-out pictures.
    pictures, labels = load_images(held_out)
    tokens = load_encoder(demo.ENCODER_SPEC, 24, encoder)(pictures).cls_token
    means = torch.stack([tokens[labels == label].mean(0) for label in range(10)])
    generated = means.repeat_interleave(6, 0)
    generated[:6] = means[1]  # of another class
    np.save(tmp_path / "samples" / "cls_tokens.npy", generated.numpy())
    demo.main(["score", "--encoder", encoder, *map(str, flags)])
    assert json.loads(score.read_text())["cls_tokens_right"] == pytest.approx(0.9)


def test_the_script_and_the_notebook_name_the_last_checkpoint():
    script = (ROOT / "demo.sh").read_text()
    (checkpoint,) = re.findall(r'--ckpt "\$OUT/(.+)"', script)
    (steps,) = re.findall(r"--max-train-steps (\d+)", script)
    assert checkpoint == f"exps/solids/checkpoints/{int(steps):07d}.pt"
    assert f"../demo/{checkpoint}" in (ROOT / "notebooks" / "sample.ipynb").read_text()


def test_only_own_files_are_replaced(tmp_path):
    """Weights, scores and pictures of others are kept."""
    (tmp_path / "encoder.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
    (tmp_path / "judge.pt").write_text("precious")
    (tmp_path / "thesis.json").write_text("{}")
    (tmp_path / "pictures/train/cat").mkdir(parents=True)
    (tmp_path / "pictures/train/cat/photo.png").write_text("precious")
    score = ["score", *(f"--{name}={tmp_path}/x" for name in ("samples", "encoder", "images", "held-out"))]
    for flags, dest, problem in (
        (["encoder", "--images", "x"], "encoder.safetensors", "is not an encoder of this program"),
        (score, "thesis.json", "is not a score of this program"),
        (score, "new.json", r"judge\.pt: exists and is not a judge of this program"),
        (["images"], "pictures", r"contains photo\.png, which this program did not write"),
    ):
        with pytest.raises(InputError, match=f"--dest.*{problem}"):
            demo.main([*flags, "--dest", str(tmp_path / dest)])
    encoder = untrained_encoder(f"{demo.ENCODER_SPEC}:num_classes=10", demo.RESOLUTION).network.state_dict()
    (tmp_path / "own.safetensors").write_bytes(save({name: value.contiguous() for name, value in encoder.items()}))
    demo.Demo(command="encoder", images=tmp_path / "x", dest=tmp_path / "own.safetensors")
