"""The comparison of methods: its arithmetic on curves whose factor is known, and a complete one on a toy preset."""

import dataclasses
import json
import shlex
import shutil
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from common.io import read_json
from common.sources import FileSource
from experiments import convergence, imagenet, preparation, presets, report
from experiments.judge import load_judge, train_judge
from experiments.nearest import closeness, nearest, pairs_shown
from experiments.preparation import Files
from experiments.scoring import Judges, Sampling, Scorer
from preprocessing import encode_tokens
from tests.conftest import ENCODER, reset_accelerate, run_training, write_data
from training.config import parse_args

POWERS = [100, 200, 400, 800, 1600]


def power_law(constant, exponent=1.0):
    return [(step, constant * step**-exponent) for step in POWERS]


def test_speed_up_of_power_laws_is_exact():
    """Distance c / steps: four times smaller a constant means four times fewer steps, between evaluations too."""
    assert report.speed_up(power_law(800), power_law(200)) == pytest.approx(4)
    assert report.speed_up(power_law(800), power_law(300)) == pytest.approx(8 / 3)
    assert report.speed_up(power_law(800), power_law(800)) == pytest.approx(1)
    assert report.speed_up(power_law(200), power_law(800)) is None  # never gets that near


def test_steps_to_reach_at_the_ends_and_on_the_way_back_up():
    curve = [(100, 8.0), (200, 4.0), (400, 6.0), (800, 2.0)]
    assert report.steps_to_reach(curve, 9) == 100
    assert report.steps_to_reach(curve, 4) == 200
    assert report.steps_to_reach(curve, 1) is None
    assert report.steps_to_reach(curve, 2) == pytest.approx(800)
    # A slower method that had its last distance before is charged for the first time it had it.
    assert report.speed_up([(100, 4.0), (200, 4.0)], [(100, 8.0), (200, 4.0)]) == pytest.approx(0.5)


def test_distance_at_a_step_of_a_power_law_is_exact():
    assert report.distance_at(power_law(800), 300) == pytest.approx(800 / 300)
    assert report.distance_at(power_law(800), 100) == 8 and report.distance_at(power_law(800), 1600) == 0.5
    assert report.distance_at(power_law(800), 2000) == 0.5  # its last
    assert report.distance_at(power_law(800), 99) is None


def fake_result():
    def run(constant, slot):
        rows = []
        for step, distance in power_law(constant):
            scores = {"step": step, "distance": distance, "encoder_distance": 1.0, "right": 0.5}
            if slot:
                scores |= dict.fromkeys(
                    ("coherence", "coherence_shuffled", "coherence_class_mean", "cls_tokens_right"), 0.5
                )
            rows.append(scores)
        return rows

    constants = {"SiT": 1600, "REPA": 800, "REG": 200}
    return {
        "preset": "toy",
        "metric": "distance to the truth",
        "rows": dict.fromkeys(constants, ""),
        "seeds": [0, 1],
        "seconds_per_step": {"SiT": 0.1, "REPA": 0.15, "REG": 0.2},
        "real": {"distance": 0.05, "encoder_distance": 0.1, "right": 0.99},
        "scores": {
            row: {str(seed): run(constant * (1 + 0.5 * seed), row == "REG") for seed in (0, 1)}
            for row, constant in constants.items()
        },
    }


def test_factors_by_steps_and_by_time_and_table():
    result = fake_result()
    result["speed_ups"] = report.speed_ups(result)
    factors = {(pair["slower"], pair["faster"]): pair for pair in result["speed_ups"]}
    assert set(factors) == {("SiT", "REPA"), ("SiT", "REG"), ("REPA", "REG")}
    assert factors["SiT", "REG"]["steps"] == pytest.approx(8)
    assert factors["SiT", "REG"]["time"] == pytest.approx(4)
    assert factors["REPA", "REG"]["steps_of_each_seed"] == pytest.approx([4, 4])
    by_length = factors["REPA", "REG"]["steps_by_length"]
    assert by_length == pytest.approx({100: 1, 200: 2, 400: 4, 800: 4, 1600: 4})  # at first only a lower bound
    text = report.table(result)
    assert "| after 1600 steps |" in text and "SiT (1.25): REG | 8.00 | 8.00, 8.00 | 4.00 |" in text


def test_times_with_cached_tokens_are_named_as_such():
    result = {**fake_result(), "speed_ups": [], "cached_tokens": True}
    result["seconds_per_step_with_encoder"] = {"SiT": 0.1, "REPA": 1.15, "REG": 1.2}
    heading, line, *rows = report.table(result).splitlines()
    assert "| s/step, cached tokens | s/step, encoder running |" in heading
    assert {text.count("|") for text in (heading, line, *rows[:4])} == {heading.count("|")}
    assert "| 0.200 | 1.200 |" in rows[2]


def test_distances_in_the_time_of_reg():
    """REG takes 320 s, in which REPA does 1600 * 0.2 / 0.4 = 800 of its steps, and SiT all of its in half the time."""
    result = fake_result()
    result["seconds_per_step"]["REPA"] = 0.4
    found = report.equal_time(result)
    assert found["REG"] == "0.156 ± 0.044 (step 1600)"  # 200 / 1600 and 300 / 1600
    assert found["REPA"] == "1.250 ± 0.354 (step 800)"  # 800 / 800 and 1200 / 800
    assert found["SiT"] == "1.250 ± 0.354 (in 50% of the time)"
    result["seconds_per_step"]["REPA"] = 10
    assert report.equal_time(result)["REPA"] == "step 32, not evaluated"
    assert f"| {report.EQUAL_TIME} |" in report.table({**result, "speed_ups": []})
    del result["rows"]["REG"]
    assert report.equal_time(result) == {}


@pytest.mark.parametrize("more", [0, 4])
def test_report_is_written(tmp_path, more):
    """With many rows, pairs of rows have REG in them, and the picture has several lines of grids."""
    result = fake_result()
    for number in range(more):
        for part in ("rows", "seconds_per_step", "scores"):
            result[part][f"more {number}"] = result[part]["REPA"]
    runs = {(row, seed): tmp_path / row for row in result["rows"] for seed in result["seeds"]}
    for folder in runs.values():
        for step in POWERS:
            (folder / "grids").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 10)).save(folder / "grids" / f"{step:07d}.png")
    report.write(tmp_path, "toy", result, runs)
    assert not (tmp_path / "toy-nearest.png").exists()
    Image.new("RGB", (20, 10)).save(tmp_path / "REG" / "grids" / f"{POWERS[-1]:07d}-nearest.png")
    report.draw_nearest(result, runs, tmp_path / "toy-nearest.png")
    assert Image.open(tmp_path / "toy-nearest.png").size[0] > 1000
    assert json.loads((tmp_path / "toy.json").read_text())["speed_ups"]
    assert Image.open(tmp_path / "toy.png").size[0] > 1000 and Image.open(tmp_path / "toy-samples.png").size[0] > 1000
    pairs = [{pair["slower"], pair["faster"]} for pair in report.speed_ups(result)]
    assert len(pairs) == (6 if more else 3) and all("REG" in pair for pair in pairs if more)
    assert (tmp_path / "toy.md").read_text() == report.table({**result, "speed_ups": report.speed_ups(result)})


def test_every_row_of_every_ablation_is_a_command_line_of_train():
    for preset in presets.PRESETS.values():
        encoders = {"other": "dinov2-vit-l"}
        rows = presets.ablations(preset.depths, preset.coefficients, encoders, preset.steps[-1], preset.muon_rate)
        assert tuple(rows) == presets.ABLATIONS
        for flags in (flags for table in rows.values() for flags in table.values()):
            config = parse_args(["--exp-name", "x", "--device", "cpu", *preset.flags.split(), *flags.split()])
            assert (config.slot == "none") == ("--no-cls-token" in flags or "--entangle none" in flags)


def test_the_row_of_srdit_has_the_switches_of_its_recipe():
    recipe = read_json(preparation.ROOT / "recipes/train/srdit.json")
    config = parse_args(["--exp-name", "x", "--device", "cpu", *presets.SR_DIT.split()])
    given = config.given - {"exp_name", "device"}
    assert {name: getattr(config, name) for name in given} == {name: recipe[name] for name in given}
    of_data_and_run = {"model", "latents_folder", "latents_codec", "enc_type", "batch_size", "max_train_steps"}
    assert given == recipe.keys() - of_data_and_run - {"mixed_precision"}


def test_only_the_table_of_switches_has_the_depth_that_sprint_needs(tmp_path):
    for ablation, depth in (("switches", 6), ("methods", 4)):
        config = convergence.Convergence(out=tmp_path, ablation=ablation)
        flags = ["--exp-name", "x", "--device", "cpu", *convergence.chosen_preset(config).flags.split()]
        assert parse_args(flags).depth == depth


def test_commands_of_the_papers_size_are_those_of_train(tmp_path, capsys):
    further = ["--flags=--lr-schedule cosine", "--reg-flags", "--cls 0.05 --cls-lead 0.1"]
    convergence.main(["--preset", "imagenet", "--out", str(tmp_path / "a b"), "--seeds", "0,1", *further])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for line, row in zip(lines, ["sit", "sit", "repa", "repa", "reg", "reg"], strict=True):
        launcher, flags = line.split(" train.py ")
        config = parse_args([*shlex.split(flags), "--device", "cpu"])
        assert launcher == "accelerate launch" and config.exp_name.startswith(row)
        assert config.output_dir == str(tmp_path / "a b") and config.lr_schedule == "cosine"
        assert config.cls_lead == (0.1 if row == "reg" else 0)
        assert (config.slot == "class", config.proj_coeff) == (row == "reg", 0 if row == "sit" else 0.5)


def test_scores_of_the_papers_size_are_read_up_to_the_step_all_have_reached(tmp_path):
    config = convergence.Convergence(preset="imagenet", out=tmp_path, flags="--allow-tf32", reg_flags="--cls 0.05")
    assert imagenet.collect(config)[0] is None
    for row, fids in {"sit": [9.0], "repa": [8.0, 4.0], "reg": [4.0, 2.0]}.items():
        folder = tmp_path / f"{row}-seed0"
        folder.mkdir()
        (folder / "args.json").write_text('{"batch_size": 256}')
        lines = [{"step": 50_000 * (n + 1), "fid": fid, "encoder_fd": 1.0} for n, fid in enumerate(fids)]
        lines.append({"step": 100, "images_per_second": 512.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result, runs = imagenet.collect(config)
    assert runs["REPA", 0] == tmp_path / "repa-seed0"
    assert {row: [s["distance"] for s in seeds["0"]] for row, seeds in result["scores"].items()} == {
        "SiT": [9.0], "REPA": [8.0], "REG": [4.0],
    }  # fmt: skip
    assert result["seconds_per_step"]["REG"] == 0.5
    assert result["flags"] == "--allow-tf32" and result["rows"]["REG"] == "--cls 0.05"
    assert result["rows"]["REPA"] == presets.METHODS["REPA"]
    result["speed_ups"] = report.speed_ups(result)
    assert "| FID |" in report.table(result)


def test_judge_learns_and_loads(tmp_path):
    labels = torch.arange(60) % 3
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(60), labels] = 200
    train_judge(tmp_path / "judge.pt", images, labels, 8, [8, 8], steps=30)
    features, logits = load_judge(tmp_path / "judge.pt")(images)
    assert features.shape == (60, 8) and (logits.argmax(1) == labels).all()
    (tmp_path / "text.pt").write_text("<html>")
    torch.save({"config": {}, "weights": {}}, tmp_path / "other.pt")
    for name, problem in (("none", "no such file"), ("text", ""), ("other", "not the file of a judge")):
        with pytest.raises(InputError, match=rf"{name}\.pt: .*{problem}"):
            load_judge(tmp_path / f"{name}.pt")


def test_copies_of_training_images_are_found():
    generator = torch.Generator().manual_seed(0)
    train, held_out, new = torch.randn(3, 2000, 8, generator=generator)
    distances, index = nearest(train[:5] + 1e-4, train)
    assert index.tolist() == [0, 1, 2, 3, 4] and distances.max() < 0.01
    reference = nearest(held_out, train)[0]
    copies = closeness(nearest(train + 1e-3, train)[0], reference)
    assert copies["nearest_ratio"] < 0.01 and copies["close"] == 1
    unseen = closeness(nearest(new, train)[0], reference)
    assert unseen["nearest_ratio"] == pytest.approx(1, abs=0.05) and unseen["close"] < 0.03
    assert pairs_shown(torch.tensor([3.0, 2.0, 1.0]), 2).tolist() == [0, 1, 2, 1]


def emoji_zip(path, captions):
    with zipfile.ZipFile(path, "w") as file:
        for number in range(5):
            file.writestr(f"0/{number}.png", f"{number}".encode())
        file.writestr("captions.json", json.dumps(captions))
    return path


def test_skin_tones_of_an_emoji_are_in_the_same_half(tmp_path):
    runner = "runner emoji modifier fitzpatrick type-"
    captions = ["runner", f"{runner}1-2", f"{runner}3", "surfer", "apple"]
    captions = {f"0/{number}.png": caption for number, caption in enumerate(captions)}
    source = emoji_zip(tmp_path / "emoji.zip", {"captions": captions})
    groups = preparation.emoji_groups(FileSource(source))
    assert groups == {"person": [["0/0.png", "0/1.png", "0/2.png"], ["0/3.png"]], "object": [["0/4.png"]]}
    for half, limit, expected in ((0, None, ["0", "1", "2", "4"]), (1, None, ["3"]), (0, 2, ["0", "1", "4"])):
        dest = tmp_path / f"{half}-{limit}"
        preparation._extract_half(source, preparation.emoji_groups, dest, half, limit)
        assert sorted(path.stem for path in dest.glob("*/*.png")) == expected
    for content in ({"captions": {}}, [], {"captions": None}):
        with pytest.raises(InputError, match=r"captions\.json: expected"):
            preparation.emoji_groups(FileSource(emoji_zip(tmp_path / "bad.zip", content)))


def test_an_encoder_with_another_number_of_tokens_is_refused_before_the_work_starts(encoder_weights, tmp_path):
    source = emoji_zip(tmp_path / "emoji.zip", {})
    flags = ["--preset", "emoji", "--source", str(source), "--enc-type", ENCODER, "--enc-weights", str(encoder_weights)]
    with pytest.raises(InputError, match=r"16 tokens .* there are 64 latent tokens"):
        convergence.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "data" / "raw").exists()


def test_labels_of_generated_images():
    held_out = types.SimpleNamespace(labels=torch.tensor([0, 0, 0, 1, 1, 2]), classes=3)
    labels = Scorer.requested_labels(held_out, Sampling(images=12, num_steps=1, batch_size=1, proportional=True))
    assert labels.bincount().tolist() == [6, 4, 2]
    labels = Scorer.requested_labels(held_out, Sampling(images=4, num_steps=1, batch_size=1))
    assert labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("woman heavy black heart man", "pair"), ("man woman girl boy", "pair"), ("raised back of hand", "hand"),
        ("runner female sign", "woman"), ("man cooking", "man"), ("happy person raising one hand", "person"),
        ("grinning face", "face"), ("clock face two oclock", "symbol"), ("teapot", "object"),
    ],
)  # fmt: skip
def test_classes_of_emoji(caption, expected):
    assert preparation.emoji_class(caption) == expected


def train_here(command, log, threads):
    """Run train.py in this process, and log every step."""
    run_training([*command[1:], "--log-steps", "1"])


@pytest.fixture(scope="module")
def toy(encoder_weights, tmp_path_factory):
    """The folder of a comparison on a preset that takes seconds, and its command line."""
    data = write_data(tmp_path_factory.mktemp("data"))
    flags = {"source": data / "images", "dest": data / "tokens", "enc-type": ENCODER, "enc-weights": encoder_weights}
    reset_accelerate()
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    encode_tokens.main([*arguments, "--workers", "0"])
    held_out = write_data(tmp_path_factory.mktemp("held_out"), seed=1) / "images"

    def prepare(folder, config):
        if not (folder / "judge.pt").exists():
            images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
            train_judge(folder / "judge.pt", images, torch.arange(12) % 3, 16, [4, 4], steps=3)
        weights = str(encoder_weights)
        judges = Judges(held_out, folder / "judge.pt", ENCODER, weights, "pixel", "cpu", data / "images")
        return Files(data, judges)

    preset = dataclasses.replace(
        presets.PRESETS["digits"],
        flags="--model SiT-S/4 --depth 2 --hidden-size 32 --num-heads 2 --encoder-depth 1 --projector-dim 16 "
        "--batch-size 8 --num-workers 0 --device cpu --learning-rate 1e-3 --ema-decay 0.9",
        steps=(2, 4),
        seeds=(0,),
        sampling=Sampling(images=6, num_steps=2, batch_size=3),
        timing_steps=4,
        prepare=prepare,
    )
    out = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(convergence.PRESETS, "digits", preset)
        patch.setattr(convergence, "TIMING_ROUNDS", 1)
        # In this process, so that a complete comparison takes seconds.
        patch.setattr(convergence, "run_jobs", lambda jobs, parallel: [convergence.run_job(job) for job in jobs])
        patch.setattr(convergence, "run", train_here)
        convergence.main(["--out", str(out)])
        yield out, ["--out", str(out)]


def test_a_comparison_is_complete(toy):
    out, _ = toy
    result = json.loads((out / "digits-methods.json").read_text())
    for row, seeds in result["scores"].items():
        assert [scores["step"] for scores in seeds["0"]] == [2, 4]
        assert all(np.isfinite(list(scores.values())).all() for scores in seeds["0"])
        assert ("coherence" in seeds["0"][0]) == (row == "REG")
        assert {"nearest_ratio", "close"} <= seeds["0"][0].keys()
        assert (out / "runs" / f"{row.lower()}-seed0" / "grids" / "0000004-nearest.png").exists()
    assert all(seconds > 0 for seconds in result["seconds_per_step"].values())
    kept = sorted(path.name for path in (out / "runs" / "reg-seed0" / "checkpoints").glob("*.pt"))
    assert kept == ["0000004.pt"]


def test_the_encoder_runs_only_to_measure_its_time(toy):
    out, result = toy[0], json.loads((toy[0] / "digits-methods.json").read_text())
    cached = {path.parent.name: json.loads(path.read_text())["cached_tokens"] for path in out.glob("*/*/args.json")}
    assert cached == {
        "sit-seed0": None, "repa-seed0": "tokens", "reg-seed0": "tokens", "sit-0": None, "repa-0": "tokens",
        "reg-0": "tokens", "repa-with-encoder-0": None, "reg-with-encoder-0": None,
    }  # fmt: skip
    times, with_encoder = result["seconds_per_step"], result["seconds_per_step_with_encoder"]
    assert times["SiT"] == with_encoder["SiT"] and times["REG"] != with_encoder["REG"]


def test_flags_of_the_rows_with_a_class_token(toy, tmp_path):
    config = convergence.Convergence(out=tmp_path, reg_flags="--cls 0.1", ablation="entangle")
    rows = convergence.Study(config).rows
    assert [row for row, flags in rows.items() if "--cls 0.1" in flags] == ["REG"]
    with pytest.raises(InputError, match="--cls"):
        convergence.Study(dataclasses.replace(config, out=tmp_path / "bad", reg_flags="--cls x"))


def test_methods_share_data_noise_and_initial_weights(toy):
    """The first loss of the latents is the same number for all three: same images, times, noise, zero output."""
    first = {}
    for row in ("sit", "repa", "reg"):
        lines = (toy[0] / "runs" / f"{row}-seed0" / "metrics.jsonl").read_text().splitlines()
        first[row] = json.loads(lines[0])["denoise"]
    assert first["sit"] == first["repa"] == first["reg"]


def test_only_a_lost_score_is_computed_again(toy, monkeypatch):
    out, flags = toy
    path = out / "runs" / "sit-seed0" / "scores.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before[:1]))
    trained = []
    monkeypatch.setattr(convergence, "run", lambda command, log, threads: trained.append(command))
    convergence.main(flags)
    after = json.loads(path.read_text())
    assert not trained and [s["distance"] for s in after] == [s["distance"] for s in before]


def test_a_comparison_without_labels(toy, tmp_path):
    shutil.copy(toy[0] / "seconds_per_step.json", tmp_path)  # not measured again
    convergence.main(["--out", str(tmp_path), "--unlabelled", "--seeds", "1"])
    result = json.loads((tmp_path / "digits-methods-unlabelled.json").read_text())
    assert json.loads((tmp_path / "runs/reg-seed1/args.json").read_text())["cfg_prob"] == 1
    assert "right" not in result["scores"]["REG"]["1"][0] and "cls_tokens_right" in result["scores"]["REG"]["1"][0]


def test_comparisons_are_not_mixed(toy):
    with pytest.raises(InputError, match=r"holds a comparison with steps \[2, 4\], not \[2, 6\]"):
        convergence.main([*toy[1], "--steps", "2,6"])


def test_comparisons_share_data_of_the_same_settings(toy, tmp_path):
    (tmp_path / "data").symlink_to(toy[0] / "data")
    config = convergence.Convergence(out=tmp_path, steps=(2, 6))
    assert convergence.Study(config).files.judges.judge == tmp_path / "data" / "judge.pt"
    (tmp_path / "settings.json").unlink()
    with pytest.raises(InputError, match="data holds a comparison with judge_steps None, not 7"):
        convergence.check_same_comparison(dataclasses.replace(config, judge_steps=7), convergence.chosen_preset(config))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--steps", "1,x"], "--steps: 1,x: expected whole numbers, comma-separated"),
        (["--steps", "0,2"], "--steps 0: must be greater than 0"),
        (["--parallel", "0"], "--parallel 0: must be greater than 0"),
        (["--preset", "imagenette"], "--source is missing"),
        (["--preset", "solids", "--source", "a.zip"], "--source a.zip: has no effect with --preset solids"),
        (["--images", "5"], "--images 5: has no effect with --preset digits"),
        (["--vae", "pixel"], "--vae pixel: has no effect with --preset digits"),
        (["--preset", "emoji", "--source", "a.zip", "--run"], "--run: has no effect with --preset emoji"),
        (["--preset", "imagenet", "--unlabelled"], "--unlabelled: has no effect with --preset imagenet"),
        (["--preset", "imagenet", "--reg-flags=--no-such-flag 1"], "--no-such-flag: unknown argument"),
        (["--flags", "--exp-name 'x"], "--flags: --exp-name 'x: no closing quotation"),
        (["--flags=--no-such-flag 1"], "--no-such-flag: unknown argument"),
        (["--report", "/dev/null"], "--report .*: /dev/null is not a writable folder"),
    ],
)
def test_bad_settings_are_named(flags, text, tmp_path):
    with pytest.raises(InputError, match=text):
        convergence.main(["--out", str(tmp_path), *flags])


def test_a_comparison_replaces_only_its_own_files(tmp_path):
    for name in ("notes", "study", "report", "table"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes/thesis.txt").write_text("precious")
    (tmp_path / "study/settings.json").write_text("{}")
    (tmp_path / "report/digits-methods.json").write_text("{}")
    (tmp_path / "table/digits-methods.md").write_text("precious")
    for flags, problem in (
        (
            ["--out", "notes/new", "--source", "notes", "--preset=emoji"],
            r"--out .*settings\.json: is in .*notes, which this program reads",
        ),
        (["--out", "notes"], r"--out .*notes: contains thesis\.txt and no comparison"),
        (["--out", "study"], r"--out .*settings\.json: exists and is not the settings of a comparison"),
        (["--out", "new", "--report", "report"], r"--report .*methods\.json: exists and is not a report"),
        (["--out", "new", "--report", "table"], r"--report .*methods\.md: exists without digits-methods\.json"),
    ):
        with pytest.raises(InputError, match=problem):
            convergence.main([flag if flag.startswith("--") else str(tmp_path / flag) for flag in flags])
