"""Scores of EMA samples while training, on the stand-in Inception network."""

import json
import weakref
from functools import partial

import numpy as np
import pytest
import torch

import train
from common.cli import changed
from common.errors import InputError
from common.locks import unlock_folder
from evaluations import in_training, reference
from evaluations.inception.layers import NUM_FEATURES
from evaluations.inception.network import SPATIAL_FEATURES, InceptionOutput
from models.checkpoint import load_checkpoint
from models.inference import compile_blocks, fast_network
from tests import adm_standin
from tests.conftest import ENCODER, read_rows, reset_accelerate, run_training
from tests.test_compiling import compile_with
from tests.test_train import with_flags
from training import sampling

# Beginnings of the evaluator's notes on 6 samples, scored with weights that are not the published ones.
NOTES = [
    "STAND-IN",
    "6 samples; published numbers are from 50,000; fewer samples give higher FID and sFID",
    "FID, sFID",
]


@pytest.fixture(scope="module")
def reference_file(shared_data, encoder_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "ref.npz"
    flags = ["--source", str(shared_data / "images"), "--dest", str(path)]
    flags += ["--inception", str(adm_standin.graph_file()), "--cpu", "--batch-size", "8"]
    flags += ["--encoder", ENCODER, "--enc-weights", str(encoder_weights)]
    reset_accelerate()
    reference.main(flags)
    return path


def evaluation_flags(reference_file):
    flags = f"--eval-steps 4 --eval-samples 6 --eval-num-steps 2 --eval-batch-size 4 --eval-ref {reference_file}"
    return [*flags.split(), "--eval-inception", str(adm_standin.graph_file())]


def test_scores_are_logged_the_best_is_kept_and_training_is_not_disturbed(train_flags, reference_file, capsys):
    plain = run_training(with_flags(train_flags, "--exp-name", "plain"))
    run = run_training(with_flags(train_flags, *evaluation_flags(reference_file)))
    scored = [row for row in read_rows(run) if "fid" in row]
    assert [row["step"] for row in scored] == [4]
    assert all(np.isfinite([row["fid"], row["sfid"], row["encoder_fd"]]).all() and row["fid"] > 0 for row in scored)
    cosines = [scored[0][name] for name in ("coherence", "coherence_shuffled", "coherence_class_mean")]
    assert all(-1 <= cosine <= 1 for cosine in cosines) and 0 <= scored[0]["cls_tokens_right"] <= 1
    assert scored[0]["num_samples"] == 6
    assert [note.split(":")[0] for note in scored[0]["notes"]] == NOTES
    printed = capsys.readouterr().out
    assert all(printed.count(f"note: evaluation while training: {note}") == 1 for note in scored[0]["notes"])
    (line,) = [line for line in printed.splitlines() if "evaluation at step" in line]
    assert f"evaluation at step 4: FID {scored[0]['fid']:.4g}, sFID" in line and line.endswith("; the best FID so far")
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["fid"] == min(row["fid"] for row in scored)
    assert load_checkpoint(run / "checkpoints" / "best.pt")["steps"] == best["step"]
    a, b = (load_checkpoint(folder / "checkpoints" / "0000004.pt")["model"] for folder in (plain, run))
    assert all(torch.equal(a[key], b[key]) for key in a)


def scored(run, samples):
    """Return the scores of a number of samples."""
    run.config, run.evaluation.count = changed(run.config, eval_samples=samples), samples
    return sampling.score_samples(run)


def pixels_as_features(images):
    """Return what the Inception network returns, made of the pixels of 16 x 16 images, without a network."""
    pixels = images.flatten(1).float().repeat(1, 3)
    return InceptionOutput(pixels[:, :NUM_FEATURES], pixels[:, :SPATIAL_FEATURES], pixels)


@pytest.fixture
def eager_compiler(monkeypatch):
    """Let --compile use a backend that needs no C++ compiler."""
    torch._dynamo.reset()
    compile_with(monkeypatch, "eager")
    monkeypatch.setattr("models.inference.compile_blocks", partial(compile_blocks, backend="eager"))
    yield
    torch._dynamo.reset()


def test_scores_of_a_compiled_run_are_those_of_a_plain_one_and_only_the_first_ones_compile(
    train_flags, reference_file, monkeypatch, eager_compiler
):
    flags = evaluation_flags(reference_file)
    torch._dynamo.utils.counters.clear()
    graphs, found, networks = torch._dynamo.utils.counters["stats"], {}, []

    def watched(model, *more, **options):
        networks.append(weakref.ref(model))
        return fast_network(model, *more, **options)

    monkeypatch.setattr(sampling, "fast_network", watched)
    monkeypatch.setattr(in_training, "frechet_distance", lambda a, b: float((a.mean - b.mean).norm()))  # takes seconds
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        reset_accelerate()
        run = train.set_up(train.parse_args(with_flags(train_flags, *flags, *more, "--exp-name", name)))
        run.evaluation.inception = pixels_as_features
        batches = train.load_batches(run, range(2))
        train.training_step(run, batches)
        found[name] = [scored(run, 5)]
        before = graphs["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            found[name] += [scored(run, samples) for samples in (6, 7)]
            train.training_step(run, batches)
        assert graphs["unique_graphs"] == before and (before > 0) == (name == "compiled")
        unlock_folder(run.folder)
    assert len(networks) == 6 and not any(network() for network in networks)  # their memory is free for training
    for plain, compiled in zip(found["plain"], found["compiled"], strict=True):
        assert compiled.keys() == plain.keys() >= {"fid", "sfid", "encoder_fd", "coherence"}
        numbers = [name for name, value in plain.items() if isinstance(value, float)]
        assert [compiled[name] for name in numbers] == pytest.approx([plain[name] for name in numbers], rel=1e-3)


def test_settings_that_cannot_work_are_named(train_flags, reference_file, tmp_path):
    with pytest.raises(InputError, match="--eval-steps 2: needs --eval-ref"):
        run_training(with_flags(train_flags, "--eval-steps", "2"))
    np.savez(tmp_path / "bare.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    flags = [*evaluation_flags(reference_file), "--eval-ref", str(tmp_path / "bare.npz")]
    with pytest.raises(InputError, match=r"bare\.npz: no statistics"):
        run_training(with_flags(train_flags, *flags))


def test_an_encoder_in_half_precision_scores_samples_with_a_note(train_flags, reference_file):
    reset_accelerate()
    flags = with_flags(train_flags, *evaluation_flags(reference_file), "--encoder-dtype", "bf16")
    run = train.set_up(train.parse_args(flags))
    assert run.evaluation.notes[-1] == "encoder_fd: the encoder computes in bfloat16; the reference: float32"
    scores = sampling.score_samples(run)
    assert np.isfinite([scores["encoder_fd"], scores["coherence"]]).all()
