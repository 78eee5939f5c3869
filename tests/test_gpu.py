"""What a GPU must compute as a CPU does, and what only a GPU does: skipped steps in fp16, pinned copies, full memory.

Most checks are functions of a device and run on the CPU as well, which shows that they work; some of them then compare
the CPU with itself. Other files have further tests that need a GPU: test_gpu_networks.py, test_sync.py (the host does
not wait for the GPU), test_inference.py (CUDA graphs), test_inception.py, test_distributed.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from common.distributed import largest_batch
from common.errors import InputError, run_cli
from loss import Draws
from models.checkpoint import load_checkpoint
from tests.conftest import DEVICES, run_training
from tests.test_sync import start
from training.checkpoint_writer import TensorCopies
from training.optimization_settings import OPTIMIZERS

on_each_device = pytest.mark.parametrize("device", DEVICES)
needs_gpu = pytest.mark.gpu
FP16_SCALE, TOO_LARGE_SCALE = 2.0**10, 2.0**100  # of the loss; fp16 ends at 65504, float32 at 2^128


def on_gpu(*values: Any) -> Any:
    """Return a parameter set of a test that needs a GPU: "cuda", then `values`."""
    return pytest.param("cuda", *values, marks=needs_gpu)


def tensors_of(value: Any, name: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dicts and lists by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for inner, item in items for key, tensor in tensors_of(item, f"{name}/{inner}").items()}


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal to the bit."""
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------------------ training steps


def state_of(run: train.Run) -> dict[str, Tensor]:
    """Return copies of weights, averages, moments and the optimizer's counts of steps."""
    state = {"model": run.model.state_dict(), "ema": run.ema.state_dict(), "opt": run.optimizer.state_dict()["state"]}
    return {name: tensor.clone() for name, tensor in tensors_of(state).items()}


def one_step(run: train.Run, batches: Iterator, factor: float = 1.0) -> None:
    """Do one step whose loss, and therefore its gradient, is multiplied by `factor`."""
    criterion = run.criterion

    def scaled(*given: Any) -> dict[str, Tensor]:
        terms = criterion(*given)
        return {**terms, "loss": terms["loss"] * factor}

    run.criterion = scaled
    train.training_step(run, batches)
    run.criterion = criterion
    run.step += 1
    train.read_reports(run, wait_for_all=True)


def started(flags: list[str]) -> tuple[train.Run, Iterator]:
    """Return a run after its first step, and its batches; the loss scale of fp16 is so small that nothing overflows."""
    run, batches = start(flags, steps=0)
    if scaler := run.accelerator.scaler:
        scaler.load_state_dict({**scaler.state_dict(), "scale": FP16_SCALE})
    one_step(run, batches)
    return run, batches


PRECISIONS = [("cpu", "no"), ("cpu", "bf16"), on_gpu("no"), on_gpu("bf16"), on_gpu("fp16")]


@pytest.mark.parametrize(("device", "precision"), PRECISIONS)
@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("optimizer", OPTIMIZERS if hasattr(torch.optim, "Muon") else ["adamw"])
def test_a_step_without_a_finite_gradient_changes_nothing(train_flags, device, precision, factor, optimizer):
    """Except the loss scale of fp16, which is halved. The next step is an ordinary one."""
    flags = [*train_flags, "--device", device, "--mixed-precision", precision, "--optimizer", optimizer]
    run, batches = started(flags)
    scaler, before = run.accelerator.scaler, state_of(run)
    assert (scaler is not None) == (precision == "fp16")
    one_step(run, batches, factor)
    assert different(state_of(run), before) == []
    assert scaler is None or scaler.get_scale() == FP16_SCALE / 2
    assert run.log.counts == {"bad_steps": 1, "overflow_steps": 0}

    one_step(run, batches)
    after = state_of(run)
    assert all(tensor.isfinite().all() for tensor in after.values())
    changed = different(after, before)
    assert {name.split("/")[1] for name in changed} == {"model", "ema", "opt"}
    steps = [name for name in after if name.endswith("/step")]
    assert steps and all(after[name] == before[name] + 1 for name in steps)


@needs_gpu
def test_an_overflow_of_fp16_is_counted_as_one_and_halves_the_scale(train_flags):
    """The losses are finite, and the scaled gradient is too large for fp16."""
    run, batches = started([*train_flags, "--device", "cuda", "--mixed-precision", "fp16"])
    scaler, before = run.accelerator.scaler, state_of(run)
    scaler.update(TOO_LARGE_SCALE)
    one_step(run, batches)
    assert different(state_of(run), before) == []
    assert scaler.get_scale() == TOO_LARGE_SCALE / 2
    assert run.log.counts == {"bad_steps": 0, "overflow_steps": 1}
    scaler.update(FP16_SCALE)
    one_step(run, batches)
    assert different(state_of(run), before) and scaler.get_scale() == FP16_SCALE


class DrawnOnTheCPU:
    """The draws of a step from the CPU's generator: that of a GPU draws other numbers from the same seed."""

    def __init__(self, run: train.Run):
        self.source, self.device = replace(run.randomness, device="cpu"), run.accelerator.device

    def draw(self, step: int) -> Draws:
        return Draws(*(None if part is None else part.to(self.device) for part in self.source.draw(step)))


def step_means(flags: list[str], device: str, steps: int = 4) -> list[dict[str, float]]:
    """Return the losses of the first steps of a run in float32, with the draws of the CPU's generator."""
    run, batches = start([*flags, "--device", device, "--mixed-precision", "no", "--no-allow-tf32"], steps=0)
    run.randomness = DrawnOnTheCPU(run)
    for step in range(steps):
        train.training_step(run, batches)
        run.step = step + 1
    return [report.means for report in run.reports.receive(wait_for_all=True)]


@pytest.mark.parametrize(
    ("device", "more"),
    [
        ("cpu", "--qk-norm"),
        on_gpu(""),
        on_gpu("--entangle patch-mean --qk-norm"),
        on_gpu("--entangle learnable --no-fused-attn"),
        on_gpu("--no-cls-token --path-type cosine --gradient-accumulation-steps 2"),
    ],
)
def test_losses_of_a_gpu_are_those_of_a_cpu(train_flags, device, more):
    """In the first step they differ by the order of float32 sums only, some 1e-7 per operation.

    AdamW then moves each weight by the learning rate in the direction of its gradient, however small the gradient is.
    Where it is a rounding error, the directions differ, so the losses of later steps are less equal.
    """
    expected, found = (step_means([*train_flags, *more.split()], where) for where in ("cpu", device))
    assert len(found) == 4 and len({means["loss"] for means in found}) == 4
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        relative, absolute = (1e-4, 1e-6) if number == 0 else (1e-3, 1e-4)  # a mean cosine can be near 0
        assert ours == pytest.approx(theirs, rel=relative, abs=absolute), number


def checkpoint_tensors(folder: Any, step: int = 4) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, and the loss scaler's numbers as tensors."""
    found = load_checkpoint(folder / "checkpoints" / f"{step:07d}.pt")
    scaler = {name: torch.tensor(float(value)) for name, value in (found["scaler"] or {}).items()}
    return tensors_of({**{name: found[name] for name in ("model", "ema", "opt")}, "scaler": scaler})


@pytest.mark.parametrize(
    ("device", "more"),
    [
        ("cpu", "no"),
        on_gpu("no"),
        on_gpu("bf16"),
        on_gpu("fp16"),
        on_gpu("bf16 --compile"),
        on_gpu("bf16 --gradient-accumulation-steps 2 --activation-checkpointing"),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(train_flags, device, more):
    precision, *switches = more.split()
    flags = [*train_flags, "--device", device, "--mixed-precision", precision, *switches]
    flags += ["--checkpointing-steps", "2", "--max-train-steps", "4", "--exp-name"]
    undisturbed = checkpoint_tensors(run_training([*flags, "undisturbed"]))
    run_training([*flags, "resumed", "--max-train-steps", "2"])
    resumed = checkpoint_tensors(run_training([*flags, "resumed", "--resume", "latest"]))
    if found := different(resumed, undisturbed):
        again = different(checkpoint_tensors(run_training([*flags, "again"])), undisturbed)
        reason = f"also in a second run without a stop: {again}" if again else "a second run without a stop is equal"
        pytest.fail(f"resumed, these tensors differ: {found}; {reason}")


@on_each_device
def test_a_copy_for_a_checkpoint_holds_the_values_at_the_time_of_the_call(device):
    copies, given = TensorCopies(), {"a": [torch.ones(1 << 20, device=device)], "step": 3}
    for value in (1.0, 2.0):
        taken = copies.take(given)
        given["a"][0].add_(1)  # queued after the copy
        copies.wait()
        assert taken["a"][0].device.type == "cpu" and (taken["a"][0] == value).all() and taken["step"] == 3


# ------------------------------------------------------------------------------------------------ memory


@needs_gpu
def test_the_largest_batch_of_a_gpu_is_found():
    """Each image takes 30 % of the memory: two fit, four do not."""
    share = torch.cuda.get_device_properties("cuda").total_memory * 3 // 10
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        torch.empty(count * share, dtype=torch.uint8, device="cuda")

    assert largest_batch(attempt, 8) == 2 and tried == [8, 4, 2]
    with pytest.raises(InputError, match=r"^the memory of GPU \d+ \(.* GiB\) is full, .* more were needed: it is too"):
        largest_batch(lambda count: torch.empty(4 * share, dtype=torch.uint8, device="cuda"), 2)


FULL = {
    "cpu": "the memory of this machine is full",
    "cuda": "the memory of GPU 0 (",
}


@on_each_device
def test_a_full_memory_is_one_line_with_advice(device, capsys):
    def too_much() -> None:
        torch.empty(2**50, device=device)

    with pytest.raises(SystemExit) as exit_:
        run_cli(too_much, memory_advice="give it a smaller --batch-size")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and FULL[device] in error and "Traceback" not in error
    assert "; give it a smaller --batch-size, or end other programs that use this memory" in error
    assert error.count("\n") == 1
