"""When class token and image are decided: closed forms for known velocities, and the program on a tiny comparison."""

import argparse
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import parse
from common.errors import InputError
from experiments import decided, decided_report
from experiments.estimates import Explained, nearest, of_noised_data, time_above, while_sampling
from experiments.judge import train_judge
from experiments.scoring import SAMPLING_SEED
from models.checkpoint import load_checkpoint, save_checkpoint
from models.cls_lead import stream_times
from models.interpolant import PATHS, Interpolant
from models.sit import SiT, SiTConfig
from samplers import image_seeds, sample_images
from tests.conftest import DEVICES, ENCODER, NUM_CLASSES, run_training

TIMES = [step / 10 for step in range(10, -1, -1)]


def start(n=4):
    return lambda: (torch.randn(n, 1, 2, 2), torch.randn(n, 3))


@pytest.mark.parametrize("lead", [0.0, 0.3])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_known_time_of_decision_is_found(solver, lead):
    """The velocity to a point c is (x - c) / t. Each sample's point changes its sign at a time of its own.

    With a lead, t is the time of the stream, and the times of decision are times of the sampler.
    """
    switches, token_switches = torch.tensor([0.8, 0.6, 0.6, 0.3]), torch.tensor([1.0, 0.9, 0.7, 0.4])

    def velocity(x, cls, t):
        signs, token_signs = (torch.where(t <= switch + 1e-6, 1.0, -1.0) for switch in (switches, token_switches))
        t, t_cls = stream_times(t, lead)
        return (x - signs.view(-1, 1, 1, 1)) / t, (cls - token_signs[:, None]) / t_cls.clamp(min=1e-9)

    found = while_sampling(velocity, start(), Interpolant(), solver, 10, lead)
    assert found.times == TIMES
    image, token = ((part.flatten(2).mean(2) > 0).double().mean(1).tolist() for part in (found.x, found.cls))
    assert image == [0, 0, 0.25, 0.25, 0.75, 0.75, 0.75, 1, 1, 1, 1]
    assert token == [0.25, 0.5, 0.5, 0.75, 0.75, 0.75, 1, 1, 1, 1, 1]
    assert time_above(TIMES, image, 0.5) == pytest.approx(0.65) and time_above(TIMES, image, 0.9) == pytest.approx(0.34)
    assert time_above(TIMES, token, 0.5) == pytest.approx(0.9) and time_above(TIMES, token, 0.9) == pytest.approx(0.44)


def test_estimates_of_heuns_method_are_those_of_its_states():
    """For the velocity x the state grows by 1 + h + h^2 / 2 in a step h, and the estimate is (1 - t) x_t."""
    noise = start()
    first = noise()
    found = while_sampling(lambda x, cls, t: (x, cls), lambda: first, Interpolant(), "heun", 10)
    h = -0.1
    for number, t in enumerate(TIMES[:-1]):
        growth = (1 + h + h**2 / 2) ** number * (1 - t)
        torch.testing.assert_close(found.x[number], first[0] * growth)
        torch.testing.assert_close(found.cls[number], first[1] * growth)


@pytest.mark.parametrize("lead", [0.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_exact_velocities_of_noised_data_give_the_data(path, lead):
    interpolant, seen = Interpolant(path), []
    data, noise = ((x.double(), cls.double()) for x, cls in (start()(), start()()))

    def velocity(x, cls, t):
        seen.append((x, cls))
        streams = zip(data, noise, stream_times(t, lead), strict=True)
        return tuple(interpolant.velocity_target(*stream) for stream in streams)

    found = of_noised_data(velocity, data, noise, interpolant, TIMES, lead)
    assert found.times == TIMES
    for x, cls in zip(found.x, found.cls, strict=True):
        torch.testing.assert_close(x, data[0].float())
        torch.testing.assert_close(cls, data[1].float())
    torch.testing.assert_close(seen[0], noise)
    for part, clean, drawn, t in zip(seen[5], data, noise, (0.5 * (1 + lead), 0.5 * (1 - lead)), strict=True):
        torch.testing.assert_close(part, interpolant.interpolate(clean, drawn, torch.tensor(t).double()))


def test_explained_variance():
    clean = torch.randn(6, 5)
    estimates = torch.stack([clean.mean(0).expand(6, 5), (clean + clean.mean(0)) / 2, clean])
    sums = Explained()
    for rows in (slice(0, 2), slice(2, 6)):
        sums.update(estimates[:, rows])
    assert sums.curve() == pytest.approx([0, 0.75, 1], abs=1e-6)


def test_time_above_counts_the_last_crossing():
    assert time_above([1.0, 0.5, 0.0], [0.9, 0.9, 1.0], 0.9) == 1
    assert time_above([1.0, 0.5, 0.25, 0.0], [0.9, 0.4, 0.6, 1.0], 0.5) == pytest.approx(0.375)
    assert time_above([1.0, 0.5, 0.0], [0.9, 0.9, 0.4], 0.5) is None


def test_the_nearest_is_that_of_the_largest_cosine():
    centres = torch.tensor([[1.0, 0], [torch.nan, 0], [0, 5.0]], dtype=torch.float64)
    assert nearest(torch.tensor([[[9.0, 1]], [[0.1, 0.2]]]), centres).tolist() == [[0], [2]]


@pytest.fixture(scope="module")
def comparison(shared_data, encoder_weights, tmp_path_factory):
    """A folder as convergence.py leaves it, with tiny runs."""
    out = tmp_path_factory.mktemp("comparison")
    shutil.copytree(shared_data, out / "data" / "train")
    shutil.copytree(shared_data / "images", out / "data" / "held_out" / "images")
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    train_judge(out / "data" / "judge.pt", images, torch.arange(12) % NUM_CLASSES, 16, [4, 4], steps=3)
    (out / "settings.json").write_text('{"sampling": {"labelled": true}}')
    flags = f"""--output-dir {out / "runs"} --exp-name reg-seed0 --data-dir {out / "data" / "train"} --device cpu
        --enc-type {ENCODER} --enc-weights {encoder_weights}
        --model SiT-S/4 --depth 1 --hidden-size 16 --num-heads 2 --encoder-depth 1 --projector-dim 8
        --batch-size 8 --num-workers 0 --log-steps 1 --sampling-steps 0 --max-train-steps 1"""
    folder = run_training(flags.split())
    shutil.copytree(folder, out / "runs" / "reg-seed1")
    checkpoint = load_checkpoint(folder)
    for name, setting, value in (("repa", "entangle", "none"), ("labels", "cfg_prob", 0.0)):
        changed = argparse.Namespace(**vars(checkpoint["args"]) | {setting: value})
        path = out / "runs" / f"{name}-seed0" / "checkpoints" / "0000001.pt"
        save_checkpoint(path, {**checkpoint, "args": changed})
    return out


FLAGS = ["--images", "5", "--num-steps", "3", "--batch-size", "3", "--device", "cpu"]


def test_the_report_of_two_seeds(comparison, tmp_path):
    runs = [str(comparison / "runs" / name) for name in ("reg-seed0", "reg-seed1")]
    decided.main([*runs, "--dest", str(tmp_path / "a.json"), *FLAGS])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(run["row"], run["seed"]) for run in result["runs"]] == [("reg", 0), ("reg", 1)]
    for run in result["runs"]:
        assert run["times"] == [1, 2 / 3, 1 / 3, 0] and run["labelled"]
        for kind in ("generated", "held_out"):
            assert all(len(curve) == 4 and np.isfinite(curve).all() for curve in run[kind].values())
        assert {"image_right", "token_right"} <= run["generated"].keys() & run["held_out"].keys()
        for name in ("image_decided", "token_decided", "image_explained", "token_explained", "token_cosine"):
            assert run["generated"][name][-2:] == pytest.approx([1, 1])  # the last estimate is the final sample
    table = (tmp_path / "a.md").read_text()
    assert table.count("| reg | ") == 4 and "5 images, heun, 3 steps" in table
    for name in ("a.png", "a-estimates.png"):
        assert Image.open(tmp_path / name).width > 1000
    parse(decided.Decided, "", [*runs, "--dest", str(tmp_path / "a.json")])  # its own files may be replaced


@pytest.fixture(scope="module")
def measure(comparison):
    """Return a measurement of the tiny run, with some settings."""

    def made(folder=comparison / "runs" / "reg-seed0", device="cpu", **settings):
        config = decided.Decided(runs=(folder,), dest=comparison / "a.json", **settings)
        (run,) = decided.find_runs(config.runs)
        return decided.Measurement(run, decided.Readout(run, torch.device(device), config.images), config)

    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("switches", [{}, {"cls_lead": 0.3}, {"standardized_cls": True, "cls_lead": 0.2}])
def test_final_and_clean_ones_are_those_of_other_programs(comparison, measure, tmp_path, switches, device):
    """Also if the class token leads, or is standardised: then it is in the encoder's units."""
    out = tmp_path / "out"
    shutil.copytree(comparison, out)
    folder = out / "runs" / "reg-seed0"
    checkpoint = load_checkpoint(folder)
    checkpoint["args"].cls_lead = switches.get("cls_lead", 0.0)
    network = SiT(replace(SiTConfig.from_json(checkpoint["network"]), **switches))
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape) * 0.1 + 0.05)
    content = {"ema": network.state_dict(), "network": network.config.to_json(), "args": checkpoint["args"]}
    save_checkpoint(folder / "checkpoints" / "0000001.pt", content)
    measured = measure(folder, device, num_steps=3)
    found = measured.generated(range(4))
    how = {"mode": "ode", "solver": "heun", "num_steps": 3}
    x, cls = sample_images(measured.model, [0, 1, 2, 0], image_seeds(SAMPLING_SEED, range(4)), Interpolant(), **how)
    torch.testing.assert_close(found.x[-1], x.float())
    torch.testing.assert_close(found.cls[-1], cls.float())
    noised = measured.noised(range(5), found.times)
    torch.testing.assert_close(noised.x[-1], measured.readout.latents[:5])
    torch.testing.assert_close(noised.cls[-1], measured.readout.tokens[:5])


def test_no_image_has_a_right_class_without_labels_except_held_out_ones(measure):
    result = measure(num_steps=2, images=3, unlabelled=True).result()
    assert not result["labelled"] and "image_right" not in result["generated"] and "image_right" in result["held_out"]


def test_seeds_of_different_lengths_are_not_averaged(comparison, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(comparison, out)
    checkpoint = out / "runs" / "reg-seed1" / "checkpoints" / "0000001.pt"
    checkpoint.rename(checkpoint.with_name("0000002.pt"))
    text = r"reg has checkpoints of different steps, 0000001\.pt of seed 0, 0000002\.pt of seed 1"
    with pytest.raises(InputError, match=text):
        decided.find_runs([out / "runs" / "reg-seed0", out / "runs" / "reg-seed1"])


def test_rows_of_several_comparisons_have_their_names(comparison, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(comparison, other)
    runs = decided.find_runs([comparison / "runs/reg-seed0", other / "runs/reg-seed0", comparison / "runs/reg-seed1"])
    assert [(run.row, run.seed) for run in runs] == [
        (f"{comparison.name}/reg", 0), (f"{comparison.name}/reg", 1), ("other/reg", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "flags", "text"),
    [
        ("runs/repa-seed0", "", r"repa-seed0: its network has no class token of an encoder \(--entangle none\)"),
        ("runs/labels-seed0", "", r"labels-seed0: trained with a label for each image \(--cfg-prob 0\)"),
        ("runs/none-seed0", "", "none-seed0: not a run of convergence.py; allowed: OUT/runs/ROW-seedN"),
        ("data", "", "data: not a run of convergence.py"),
        ("runs/reg-seed0 runs/reg-seed0", "", "two are reg, seed 0"),
        ("runs/reg-seed0", "--images 1", "--images 1: must be 2 or greater"),
        ("runs/reg-seed0", "--num-steps 0", "--num-steps 0: must be from 1 to 1,000"),
        ("runs/reg-seed0", "--solver dopri5", "--solver dopri5: allowed: euler, heun"),
        ("runs/reg-seed0", "--dest DIR/a.txt", "--dest .*a.txt: the name must end in .json"),
        ("runs/reg-seed0", "--dest DIR/notes.json", "--dest .*notes.json: exists and is not a result of decided.py"),
        ("runs/reg-seed0", "--dest DIR/table.json", "table.md exists without it"),
        ("runs/reg-seed0", "--dest OUT/runs/reg-seed0/a.json", "--dest .*a.json: is in .*reg-seed0, which this"),
    ],
)
def test_what_cannot_work_is_refused_at_once(comparison, tmp_path, runs, flags, text):
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "table.md").write_text("precious")
    words = [str(comparison / run) for run in runs.split()] + ["--dest", str(tmp_path / "a.json")]
    words += flags.replace("DIR", str(tmp_path)).replace("OUT", str(comparison)).split()
    with pytest.raises(InputError, match=text):
        decided.main(words)


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        ("data/judge.pt", r"data/judge\.pt: missing; convergence\.py makes it"),
        ("data/held_out/images", "data/held_out/images: missing"),
        ("settings.json", "reg-seed0: not a run of convergence.py"),
        ("runs/reg-seed0/checkpoints", "reg-seed0: a training run without a checkpoint"),
    ],
)
def test_missing_parts_are_named(comparison, tmp_path, lost, text):
    out = tmp_path / "out"
    shutil.copytree(comparison, out)
    shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()
    with pytest.raises(InputError, match=text):
        decided.main([str(out / "runs" / "reg-seed0"), "--dest", str(tmp_path / "a.json"), *FLAGS])


def test_times_of_decision_over_seeds():
    curves = [[0.0, 0.6, 1.0], [0.0, 0.8, 1.0]]
    names = ("image_decided", "token_decided", "image_explained", "token_explained", "image_right", "token_right")
    runs = [
        {
            "row": "reg",
            "seed": seed,
            "times": [1.0, 0.5, 0.0],
            "cls_lead": 0.2,
            "generated": dict.fromkeys(names, curve),
            "held_out": {name: [0.0, 0.6, 0.6] for name in names},
        }
        for seed, curve in enumerate(curves)
    ]
    result = {"runs": runs, "images": 9, "solver": "heun", "num_steps": 2}
    result["decided"] = decided_report.times_of_decision(runs)
    text = decided_report.table(result)
    ninety = [0.5 - 0.5 * 0.3 / 0.4, 0.5 - 0.5 * 0.1 / 0.2]
    first = result["decided"][1]
    assert (first["stream"], first["level"]) == ("image", 0.9) and first["times"] == pytest.approx(ninety)
    assert first["mean"] == pytest.approx(np.mean(ninety)) and first["std"] == pytest.approx(np.std(ninety, ddof=1))
    assert "the token at max(0, t (1 + d) - d): reg (0.2)." in text
    assert "| reg | 0.64 ± 0.07 | 0.19 ± 0.09 | 0.64 ± 0.07 | 0.19 ± 0.09 |" in text
    assert "| reg | 0.58 ± 0.00 | not reached | 0.58 ± 0.00 | not reached |" in text
