"""The evaluation end to end: against the numbers of ADM's own program, and what it says about poor input."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import parse
from common.errors import InputError
from evaluations import evaluator, features, metrics, reference
from evaluations.batches import open_images
from evaluations.inception.network import Inception, load_inception
from evaluations.metrics import FeatureSums, InceptionScoreSums, frechet_distance, precision_recall
from models.encoders import load_encoder
from tests import adm_images, adm_standin
from tests.conftest import ENCODER, ROOT, reset_accelerate, run_program

# What ADM's program (TensorFlow 2.12.1 on a CPU, scipy 1.10.1) prints for the sets of adm_images on the stand-in
# weights; precision and recall with its float32 distances.
ADM = {
    "inception_score": 2.65289306640625,
    "fid": 49.34686026195378,
    "sfid": 656.2104050744513,
    "precision": 0.515,
    "recall": 0.7933333333333333,
}


@pytest.fixture(scope="module")
def network() -> Inception:
    return load_inception(adm_standin.graph_file())


@pytest.fixture(autouse=True, scope="module")
def shared_work(network: Inception) -> Iterator[None]:
    """All tests use one stand-in network, loaded once, and decompose equal covariances, which takes seconds, once."""
    factors, compute = {}, metrics._factor

    def factor(covariance: torch.Tensor) -> torch.Tensor:
        key = hashlib.sha256(covariance.contiguous().numpy().tobytes()).digest()
        if key not in factors:
            factors[key] = compute(covariance)
        return factors[key]

    def load(path: str | None, device: torch.device) -> Inception:
        return network if path is None else load_inception(path, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_factor", factor)
        patch.setattr(features, "load_inception", load)
        yield


def run(program: ModuleType, *flags: object) -> None:
    reset_accelerate()
    program.main(["--cpu", *map(str, flags)])


def write_batch(path: Path, count: int, size: int = 16, seed: int = 0, **arrays: object) -> Path:
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, **arrays)
    return path


def test_all_five_numbers_equal_those_of_adms_program(tmp_path: Path) -> None:
    """Three processes, whose shares of the samples differ in length, compute them; without a GPU they join unasked."""
    for name, recipe in adm_images.SETS.items():
        images = adm_images.images(*recipe)
        if adm_images.digest(images) != adm_images.SHA256[name]:
            pytest.skip("this version of Pillow draws other images; the recorded numbers are not theirs")
        np.savez(tmp_path / f"{name}.npz", images)
    flags = [tmp_path / "ref256_300.npz", tmp_path / "sample64_200.npz", "--inception", adm_standin.graph_file()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*launcher, "evaluations/evaluator.py", *map(str, flags)]  # accelerate launch starts one process on a CPU
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1  # by one process only
    result = json.loads((tmp_path / "sample64_200.metrics.json").read_text())
    assert result["machine"]["processes"] == 3
    found = result["metrics"]
    for name in ("inception_score", "fid", "sfid"):
        assert found[name] == pytest.approx(ADM[name], rel=5e-6), name
    assert found["precision"] == pytest.approx(ADM["precision"], abs=1.01 / 200)
    assert found["recall"] == pytest.approx(ADM["recall"], abs=1.01 / 300)
    assert any("STAND-IN" in note for note in result["notes"])
    assert any("64 x 64" in note and "256 x 256" in note for note in result["notes"])


SETTINGS = {"step": 400000, "num_steps": 250, "cfg": 2.3, "cls_cfg": 2.3, "gh": 0.85, "cfg_cond": "1"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small evaluation of samples.npz against ref.npz: result.json, stdout, and cache."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_batch(folder / "samples.npz", 7)
    write_batch(folder / "ref.npz", 9, seed=1)
    (folder / "samples.json").write_text('{"label_sampling": "balanced", "seed": 3}')
    settings = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(evaluator, *batches(folder), "--save_path", folder / "result.json", *settings)
    (folder / "stdout").write_text(printed.getvalue())
    return folder


def batches(folder: Path) -> list[object]:
    return ["--ref_batch", folder / "ref.npz", "--sample_batch", folder / "samples.npz", "--cache", folder / "cache"]


def test_result_holds_settings_hashes_counts_versions_and_labels(evaluated: Path) -> None:
    result = json.loads((evaluated / "result.json").read_text())
    assert result["settings"] == SETTINGS
    assert result["labels"] == "balanced" and result["samples"]["sampling"]["seed"] == 3
    assert result["samples"]["count"] == 7 and result["reference"]["count"] == 9
    for side in ("samples", "ref"):
        digest = hashlib.sha256((evaluated / f"{side}.npz").read_bytes()).hexdigest()
        assert result["samples" if side == "samples" else "reference"]["sha256"] == digest
    assert len(result["inception"]["sha256"]) == 64 and result["machine"]["torch"] == torch.__version__
    lines = (evaluated / "stdout").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert float(lines[1].split(": ")[1]) == result["metrics"]["fid"]
    assert any("not a meaningful score" in line for line in lines)


def test_one_process_gives_the_metrics_of_all_features(evaluated: Path, network: Inception) -> None:
    """Computed again from the features of all images in one batch."""
    outputs = []
    for name in ("samples", "ref"):
        images = open_images(evaluated / f"{name}.npz")
        outputs += [network(batch) for _, batch in images.batches(0, images.count, images.count)]
    found, expected = outputs
    sums = InceptionScoreSums(7, 1008)
    sums.update(found.logits, 0)
    metrics = json.loads((evaluated / "result.json").read_text())["metrics"]
    assert metrics["inception_score"] == pytest.approx(sums.score(), rel=1e-6)
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        sides = [FeatureSums(getattr(output, part).shape[1]) for output in (expected, found)]
        for side, output in zip(sides, (expected, found), strict=True):
            side.update(getattr(output, part))
        assert metrics[name] == pytest.approx(frechet_distance(*(side.statistics() for side in sides)), rel=1e-4), name
    assert (metrics["precision"], metrics["recall"]) == precision_recall(expected.pool, found.pool)


def test_reference_with_statistics_gives_the_same_as_its_images(
    tmp_path: Path, evaluated: Path, encoder_weights: Path
) -> None:
    samples, images = evaluated / "samples.npz", evaluated / "ref.npz"
    encoder = ["--encoder", ENCODER, "--enc-weights", encoder_weights]
    run(reference, "--source", images, "--dest", tmp_path / "ref.npz", "--num-images", 4, *encoder)
    with np.load(tmp_path / "ref.npz") as made:
        assert made["arr_0"].shape == (4, 16, 16, 3) and made["num_images"] == 9
        kept, source = made["arr_0"], np.load(images)["arr_0"]
        assert all(any(np.array_equal(image, other) for other in source) for image in kept)
    results = []
    for folder in (evaluated, tmp_path):
        flags = ["--ref_batch", folder / "ref.npz", "--sample_batch", samples, "--cache", evaluated / "cache"]
        run(evaluator, *flags, *encoder, "--save_path", tmp_path / "result.json")
        results.append(json.loads((tmp_path / "result.json").read_text()))
    from_images, from_statistics = (result["metrics"] for result in results)
    for name in ("fid", "sfid", "encoder_fd"):
        assert from_statistics[name] == pytest.approx(from_images[name], rel=1e-9), name
    assert any("encoder and input size; computed from its 9 images" in note for note in results[0]["notes"])
    assert not any("FD: the reference" in note for note in results[1]["notes"])

    network, sums = load_encoder(ENCODER, 16, encoder_weights), [FeatureSums(32), FeatureSums(32)]
    for side, path in zip(sums, (images, samples), strict=True):
        side.update(network(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)).cls_token)
    expected = frechet_distance(*(side.statistics() for side in sums))
    assert from_images["encoder_fd"] == pytest.approx(expected, rel=1e-4)


def test_the_stored_images_of_a_reference_depend_on_the_seed_alone() -> None:
    assert np.array_equal(reference.select(100, 10, 0), reference.select(100, 10, 0))
    assert not np.array_equal(reference.select(100, 10, 0), reference.select(100, 10, 1))
    assert reference.select(5, 10, 0).tolist() == [0, 1, 2, 3, 4]


def test_cached_features_are_reused_and_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: Path
) -> None:
    assert len(list((evaluated / "cache").iterdir())) >= 2  # of samples and reference
    monkeypatch.setattr(Inception, "forward", None)  # nothing may run the network now
    run(evaluator, *batches(evaluated), "--save_path", tmp_path / "again.json")
    first, again = (json.loads(path.read_text()) for path in (evaluated / "result.json", tmp_path / "again.json"))
    assert first["metrics"] == again["metrics"]


# ------------------------------------------------------------------------------------------------ poor input


def test_too_few_images_leave_out_the_numbers_that_mean_nothing(tmp_path: Path) -> None:
    flags = ["--ref_batch", write_batch(tmp_path / "ref.npz", 3), "--save_path", tmp_path / "result.json"]
    run(evaluator, *flags, "--sample_batch", write_batch(tmp_path / "one.npz", 1))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["inception_score"] == pytest.approx(1)
    assert all(result["metrics"][name] is None for name in ("fid", "sfid", "precision", "recall"))
    notes = "\n".join(result["notes"])
    assert "fid: not computed, a covariance needs at least 2 images" in notes
    assert "precision, recall: not computed, they need more than 3 images" in notes


def test_features_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Inception.forward
    monkeypatch.setattr(
        Inception, "forward", lambda self, images: forward(self, images)._replace(pool=nan_pool(images))
    )
    flags = ["--ref_batch", write_batch(tmp_path / "ref.npz", 4), "--sample_batch", write_batch(tmp_path / "s.npz", 4)]
    with pytest.raises(InputError, match=r"s\.npz: the network gives features that are not finite"):
        run(evaluator, *flags)
    assert not (tmp_path / "s.metrics.json").exists()


def nan_pool(images: torch.Tensor) -> torch.Tensor:
    return torch.full((len(images), 2048), torch.nan)


def test_reference_of_other_weights_is_refused(tmp_path: Path) -> None:
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    path = write_batch(tmp_path / "ref.npz", 4, **arrays, inception=np.array("inception-0123456789abcdef"))
    with pytest.raises(InputError, match=r"ref\.npz: its statistics were made with inception-0123456789abcdef"):
        run(evaluator, "--ref_batch", path, "--sample_batch", write_batch(tmp_path / "s.npz", 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0"),
        (["--enc-weights", "file"], "--enc-weights file: needs --encoder"),
        (["--inception", "nowhere.pb"], "nowhere.pb: no such file"),
        (["--sample_batch", "nowhere.npz"], "nowhere.npz: no such file"),
        (
            ["--save_path", "scores.txt"],
            "--save_path scores.txt: the result is JSON; allowed: a .json file, or a folder",
        ),
        (["--save_path", __file__], f"--save_path {__file__}/batch.metrics.json: .* is not a writable folder"),
        (["--save_path", f"{__file__}/result.json"], "--save_path .*result.json: .* is not a writable folder"),
        (["--cache", __file__], f"--cache {__file__}.*: .* is not a writable folder"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, flags: list[str], message: str) -> None:
    batch = write_batch(tmp_path / "batch.npz", 4)
    with pytest.raises(InputError, match=message):
        run(evaluator, "--ref_batch", batch, "--sample_batch", batch, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "reference and samples not given; expected REFERENCE SAMPLES"),
        (["ref.npz"], "one of reference and samples not given"),
        (["--sample_batch", "s.npz"], "one of reference and samples not given"),
        (["ref.npz", "--sample_batch", "s.npz"], "ref.npz: reference and samples are also given by flags"),
        (["r.npz", "s.npz", "--ref_batch", "r.npz", "--sample_batch", "s.npz"], "r.npz s.npz: .* also given by flags"),
        (["a.npz", "b.npz", "c.npz"], "c.npz: unknown argument"),
    ],
)
def test_reference_and_samples_are_given_once(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(evaluator.EvaluatorConfig, "", flags)


def test_reference_and_samples_are_files_or_flags() -> None:
    for flags in (["r.npz", "s.npz"], ["--ref_batch", "r.npz", "--sample_batch", "s.npz"]):
        assert parse(evaluator.EvaluatorConfig, "", flags).batches == ("r.npz", "s.npz")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-images", "0"], "--num-images 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--dest", "reference"], "must end in .npz"),
        (["--enc-weights", "file"], "needs --encoder"),
        (["--dest", f"{__file__}/ref.npz"], "--dest .*ref.npz: .* is not a writable folder"),
    ],
)
def test_bad_flags_of_reference_are_named(tmp_path: Path, flags: list[str], message: str) -> None:
    batch = write_batch(tmp_path / "batch.npz", 4)
    with pytest.raises(InputError, match=message):
        run(reference, "--source", batch, "--dest", tmp_path / "ref.npz", *flags)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a reference and samples in the working directory, which are not evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "Extractor", None)
    monkeypatch.setattr(reference, "Extractor", None)
    write_batch(tmp_path / "samples.npz", 4)
    write_batch(tmp_path / "ref.npz", 4)
    (tmp_path / "samples.json").write_text('{"seed": 0}')
    (tmp_path / "thesis.json").write_text('{"chapters": 7}')
    (tmp_path / "photos").mkdir()
    (tmp_path / "link.json").symlink_to("samples.json")
    for number in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"photos/{number}.png")
    return ["ref.npz", "samples.npz"]


@pytest.mark.parametrize(
    ("save_path", "problem"),
    [
        ("samples.json", "exists and is not a result of this program"),
        ("link.json", "exists and is not a result of this program"),
        ("thesis.json", "exists and is not a result of this program"),
        ("x" * 60_000 + ".json", "a name in it has 60,005 bytes"),
    ],
)
def test_a_result_replaces_only_results(pair: list[str], save_path: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"--save_path .*{problem}"):
        run(evaluator, *pair, "--save_path", save_path)


def test_a_result_is_not_written_among_the_images(pair: list[str]) -> None:
    for flags in (["photos", "samples.npz"], ["ref.npz", "photos"]):
        with pytest.raises(InputError, match=r"--save_path photos/r\.json: is in photos, which this program reads"):
            run(evaluator, *flags, "--save_path", "photos/r.json")
        with pytest.raises(InputError, match=r"--cache photos.*is in photos, which this program reads"):
            run(evaluator, *flags, "--save_path", "r.json", "--cache", "photos")


def test_an_older_result_is_replaced(pair: list[str]) -> None:
    Path("r.json").write_text('{"metrics": {}, "notes": [], "samples": {}, "reference": {}}')
    with pytest.raises(TypeError, match="NoneType"):  # the extractor
        run(evaluator, *pair, "--save_path", "r.json")


@pytest.mark.parametrize(
    ("dest", "problem"),
    [
        ("samples.npz", "is read by this program"),
        ("photos/../samples.npz", "is read by this program"),
        ("link.npz", "is read by this program"),
        ("hard.npz", "is read by this program"),
        ("ref.npz", "exists and is not a reference of this program"),
    ],
)
def test_a_reference_replaces_only_references(pair: list[str], dest: str, problem: str) -> None:
    Path("link.npz").symlink_to("samples.npz")
    os.link("samples.npz", "hard.npz")
    with pytest.raises(InputError, match=f"--dest {dest}: {problem}"):
        run(reference, "--source", "samples.npz", "--dest", dest)
    with pytest.raises(InputError, match=r"--dest photos/ref\.npz: is in photos, which this program reads"):
        run(reference, "--source", "photos", "--dest", "photos/ref.npz")


@pytest.mark.parametrize("content", ["[1]", "no json", '{"a": NaN}', '{"a":' * 3000 + "1" + "}" * 3000])
def test_settings_of_samples_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    problem = "expected a JSON object|not valid JSON|its objects are nested too deeply"
    with pytest.raises(InputError, match=rf"s\.json: ({problem})"):
        evaluator.read_sampling(tmp_path / "s.npz")


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run_program("evaluations/evaluator.py", "--ref_batch", "nowhere.npz", "--sample_batch", "nowhere.npz")
    assert done.returncode == 2 and done.stderr.strip() == "evaluator.py: error: nowhere.npz: no such file"
