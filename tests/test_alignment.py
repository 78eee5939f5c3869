"""Training with several alignment depths, with iREPA's projectors and targets, and with an end of the alignment."""

import json

import pytest
import torch

import train
from common.errors import InputError
from models.autoencoder import LatentFormat
from models.checkpoint import load_checkpoint, load_model
from models.encoders import Encoder
from models.projectors import ConvProjector
from tests.conftest import read_rows, run_training
from tests.test_compiling import compile_with
from tests.test_sync import Waits, start
from tests.test_train import terms, with_flags
from training.config import find_facts, parse_args
from training.metrics import RunLog
from training.parallelism import projectors_in_ddp, zero_with_gradients

FLAGS = [
    "--depth",
    "3",
    "--encoder-depth",
    "1,3",
    "--projector",
    "conv",
    "--spatial-norm",
    "0.6",
    "--align-stop-steps",
    "3",
]
NAMES = ("loss", "denoise", "cls", "grad_norm")


def saved(run, step):
    return load_checkpoint(run / "checkpoints" / f"{step:07d}.pt")


def projectors(checkpoint, part="model"):
    return [value for name, value in checkpoint[part].items() if name.startswith("projectors.")]


def equal(a, b):
    """Whether two states, nested dicts with tensors, are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_resumed_after_the_stop_equals_one_never_stopped(train_flags):
    flags = with_flags(train_flags, *FLAGS, "--max-train-steps", "6", "--adam-weight-decay", "0.1")
    undisturbed = run_training([*flags, "--exp-name", "undisturbed", "--checkpointing-steps", "1"])
    resumed = run_training([*flags, "--resume", str(undisturbed / "checkpoints" / "0000004.pt")])
    a, b = saved(undisturbed, 6), saved(resumed, 6)
    assert all(equal(a[part], b[part]) for part in ("model", "ema", "opt"))
    before, at, after = (projectors(saved(undisturbed, step)) for step in (2, 3, 6))
    assert equal(dict(enumerate(at)), dict(enumerate(after))) and not equal(
        dict(enumerate(at)), dict(enumerate(before))
    )
    counts = {values["step"].item() for values in saved(undisturbed, 6)["opt"]["state"].values()}
    assert counts == {3.0, 6.0}

    rows = read_rows(undisturbed)
    assert [("proj" in row) for row in rows] == [True] * 3 + [False] * 3
    assert terms(undisturbed, *NAMES)[4:] == terms(resumed, *NAMES)
    for row in rows[3:]:
        assert row["loss"] == pytest.approx(row["denoise"] + 0.03 * row["cls"], abs=1e-6)

    network = load_model(resumed / "checkpoints" / "0000006.pt")
    assert network.config.encoder_depth == (1, 3) and len(network.projectors) == 2
    assert all(isinstance(projector, ConvProjector) for projector in network.projectors)
    assert json.loads((resumed / "args.json").read_text())["encoder_depth"] == "1,3"
    assert parse_args(["--exp-name", "x", "--config", str(resumed / "args.json")]).encoder_depth == "1,3"


def test_a_run_without_spatial_norm_does_not_get_it_on_resume(train_flags):
    run_training(with_flags(train_flags, "--max-train-steps", "1"))
    with pytest.raises(InputError, match=r"--spatial-norm is 0\.6, but .* was started with off"):
        run_training([*train_flags, "--exp-name", "run", "--resume", "latest", "--spatial-norm", "0.6"])


@pytest.mark.parametrize(
    ("slot", "calls"), [("", [2, 2, 1, 1]), ("--entangle patch-mean", [2, 2, 1, 1]), ("--no-cls-token", [2, 2, 0, 0])]
)
def test_after_the_stop_no_projector_and_no_needless_encoder_is_computed(train_flags, monkeypatch, slot, calls):
    forward, step, called, projected, per_step = Encoder.forward, train.training_step, [], [], []
    encoder, weights = (train_flags[train_flags.index(name) + 1] for name in ("--enc-type", "--enc-weights"))
    monkeypatch.setattr(Encoder, "forward", lambda self, images: called.append(self) or forward(self, images))

    def watched(run, batches):
        handles = [one.register_forward_hook(lambda *_: projected.append(1)) for one in run.model.projectors]
        before = len(called), len(projected)
        step(run, batches)
        per_step.append((len(called) - before[0], len(projected) - before[1]))
        assert all(one is run.encoders[0] for one in called[before[0] :]) or run.step < 2
        for handle in handles:
            handle.remove()

    monkeypatch.setattr(train, "training_step", watched)
    two = ["--enc-type", f"{encoder},{encoder}", "--enc-weights", f"{weights},{weights}"]
    run_training(with_flags(train_flags, *two, *slot.split(), "--align-stop-steps", "2", "--max-train-steps", "4"))
    assert per_step == list(zip(calls, [2, 2, 0, 0], strict=True))


def test_after_the_stop_one_step_compiles_and_no_later_one(train_flags, monkeypatch):
    compile_with(monkeypatch, "eager")
    torch._dynamo.reset()
    step, graphs, added = train.training_step, torch._dynamo.utils.counters["stats"], []

    def watched(run, batches):
        before = graphs["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=run.step not in (0, 3)):
            step(run, batches)
        added.append(graphs["unique_graphs"] - before)

    plain = run_training(with_flags(train_flags, *FLAGS, "--exp-name", "plain", "--max-train-steps", "6"))
    monkeypatch.setattr(train, "training_step", watched)
    compiled = run_training(with_flags(train_flags, *FLAGS, "--compile", "--max-train-steps", "6"))
    assert added[0] > 3 and added[1:] == [0, 0, 1, 0, 0]
    torch.testing.assert_close(terms(compiled, *NAMES), terms(plain, *NAMES), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_steps_before_and_after_the_stop_read_nothing_from_the_device(train_flags):
    run, batches = start([*train_flags, *with_flags(FLAGS, "--align-stop-steps", "2")], steps=1)
    assert run.aligns
    with Waits() as waits:
        for _ in range(2):
            train.training_step(run, batches)
            run.step += 1
    assert waits.found == [] and not run.aligns


def test_after_the_stop_the_peak_rate_is_that_of_a_step_without_projectors(train_flags, monkeypatch):
    monkeypatch.setattr(train, "peak_images_per_second", lambda config, facts, accelerator, step: 1000.0 * step)
    run = run_training(with_flags(train_flags, "--align-stop-steps", "2", "--max-train-steps", "4"))
    rows = read_rows(run)
    assert ["mfu" in row for row in rows] == [False] + [True] * 3
    assert rows[3]["mfu"] == pytest.approx(rows[3]["images_per_second"] / 2000)


def test_a_row_with_the_stop_inside_has_no_alignment(tmp_path):
    log = RunLog(tmp_path, 8, True, lambda row, step: None)
    for means in ({"loss": 1.0, "proj": -1.0}, {"loss": 3.0}):
        log.add(means)
    row = log.write_row(2)
    assert row["loss"] == 2 and "proj" not in row


def test_ddp_gets_a_gradient_of_zeros_for_each_weight():
    network = torch.nn.Module()
    network.projectors = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)])
    assert projectors_in_ddp(network) == []  # no DDP
    weights = list(network.projectors.parameters())
    zero_with_gradients(weights).backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


BAD = {
    "above": ("--encoder-depth 1,3", r"encoder_depth 3 is outside 1 \.\. 2, the number of blocks"),
    "repeated": (
        "--encoder-depth 1,1",
        "--encoder-depth 1,1: must be a block number from 1, or several different ones",
    ),
    "descending": ("--encoder-depth 2,1", "--encoder-depth 2,1: must be a block number from 1, or several"),
    "zero": ("--encoder-depth 0", "--encoder-depth 0: must be a block number from 1"),
    "no number": ("--encoder-depth 1,x", "--encoder-depth 1,x: must be a block number from 1"),
    "projector": ("--projector linear", "--projector linear: allowed: mlp, conv"),
    "norm": ("--spatial-norm 1.5", r"--spatial-norm 1\.5: must be from 0 to 1"),
    "steps": ("--align-stop-steps -1", "--align-stop-steps -1: must be from 0 to"),
}


@pytest.mark.parametrize(("more", "text"), BAD.values(), ids=BAD)
def test_impossible_flags_are_named(train_flags, more, text):
    with pytest.raises(InputError, match=text):
        run_training(with_flags(train_flags, *more.split()))


def test_spatial_norm_needs_several_patches():
    config = parse_args(["--exp-name", "x", "--model", "SiT-S/4", "--spatial-norm", "0.6"])
    find_facts(config, 8, 8, 3, LatentFormat("pixel", 3, 1, 1.0, 0.0), [32])
    with pytest.raises(InputError, match=r"--spatial-norm 0\.6: needs several patch tokens; the latents are 1 patch"):
        find_facts(config, 4, 4, 3, LatentFormat("pixel", 3, 1, 1.0, 0.0), [32])
