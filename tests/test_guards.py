import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from common.errors import InputError
from models import ema
from tests.conftest import read_rows, reset_accelerate, run_training
from tests.test_sit import inputs, randomise, small
from training.guards import BadSteps, FiniteWeights, GuardedOptimizer
from training.metrics import RunLog, StepReport, StepReports


def run_log(tmp_path, **more) -> RunLog:
    return RunLog(tmp_path, 4, True, lambda row, step: None, **more)


def report(step: int, loss: float = 1.0, grad_norm: float = 1.0, samples: tuple = (1.0, 1.0)) -> StepReport:
    columns = {"loss": torch.tensor(samples), "t": torch.tensor([0.25, 0.5]), "label": torch.tensor([3, 4])}
    return StepReport(step, {"loss": loss, "grad_norm": grad_norm}, frozenset(), columns)


def test_reports_hold_means_over_parts_and_requests_of_any_process():
    def two_processes(values):  # the other one has means one higher, and asks for nothing
        return (values + torch.cat([values[:-2] + 1, torch.zeros(2)])) / 2

    reports = StepReports(two_processes, torch.device("cpu"), ("stop", "save"))
    reports.add({"loss": torch.tensor([1.0, 2.0])}, t=torch.zeros(2))
    reports.add({"loss": torch.tensor([3.0, 6.0])}, t=torch.ones(2))
    reports.send(7, torch.tensor(5.0), {"stop"})
    (found,) = reports.receive()
    assert found.step == 7 and found.means == {"loss": 3.5, "grad_norm": 5.5} and found.requests == {"stop"}
    assert found.samples["loss"].tolist() == [1, 2, 3, 6] and found.samples["t"].tolist() == [0, 0, 1, 1]
    assert found.good and reports.receive(wait_for_all=True) == []


def test_a_reduced_tensor_is_referenced_for_one_more_step():
    """Otherwise a run of several processes can hang at its end: `StepReports` says why."""
    reduced = []

    def reduce(values):
        result = values.clone()
        reduced.append(weakref.ref(result))
        return result

    reports = StepReports(reduce, torch.device("cpu"), ())
    for step in range(2):
        reports.add({"loss": torch.ones(2)})
        reports.send(step, torch.tensor(1.0), set())
        reports.receive(wait_for_all=True)
    assert reduced[0]() is None and reduced[1]() is not None


def test_reports_arrive_late_so_that_the_host_does_not_wait():
    reports = StepReports(lambda values: values, torch.device("cpu"), ("stop",))
    reports.lag = 2
    for step in range(4):
        reports.add({"loss": torch.zeros(1)})
        reports.send(step, torch.tensor(float("nan") if step == 3 else 1.0), set())
        assert [found.step for found in reports.receive()] == ([step - 2] if step >= 2 else [])
    rest = reports.receive(wait_for_all=True)
    assert [(found.step, found.good) for found in rest] == [(2, True), (3, False)]


def test_overflows_of_fp16_are_counted_separately_and_only_consecutive_ones_end_the_run(tmp_path):
    log = run_log(tmp_path)
    bad = BadSteps(log, lambda samples: samples, lambda step: ["a.npy", "b.npy"], 3, "fp16")
    for step, grad_norm in enumerate([math.inf, math.nan, 1.0, math.inf]):
        bad.record(report(step, grad_norm=grad_norm))
    assert log.counts == {"bad_steps": 0, "overflow_steps": 3} and not (tmp_path / "bad_steps.jsonl").exists()
    bad.record(report(4, math.nan, math.nan, samples=(1.0, math.nan)))
    assert log.counts == {"bad_steps": 1, "overflow_steps": 3}
    with pytest.raises(InputError, match=r"the last 3 steps, up to step 5, .*fp16 overflows.*--mixed-precision bf16"):
        bad.record(report(5, grad_norm=math.inf))
    rows = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["kind"]) for row in rows] == [(4, "samples"), (5, "overflow")]
    assert rows[0]["samples"] == [{"file": "b.npy", "loss": None, "t": 0.5, "label": 4}]


def test_a_gradient_without_a_cause_in_the_loss_is_noted_with_all_samples(tmp_path):
    bad = BadSteps(run_log(tmp_path), lambda samples: samples, lambda step: ["a.npy", "b.npy"], 3, "bf16")
    bad.record(report(9, grad_norm=math.inf))
    (row,) = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert row["kind"] == "gradient" and [sample["file"] for sample in row["samples"]] == ["a.npy", "b.npy"]


def matrices(model):
    """Return the parameters that Muon can train; the others are frozen: no optimizer would reset their gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.ndim == 2)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "AdamW, not fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "SGD, fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.1),
    "Muon": lambda model: torch.optim.Muon(matrices(model), lr=0.1),
}


def train_with(make, factors: list[float]) -> tuple[list[torch.Tensor], list[str]]:
    """Return weights and averages after one step per factor of the loss, and what was said at the start."""
    reset_accelerate()
    accelerator, said = Accelerator(cpu=True), []
    model = randomise(small())
    average = ema.averaged_copy(model)
    optimizer = GuardedOptimizer(accelerator.prepare(make(model)), said.append)
    for factor in factors:
        accelerator.backward(model(*inputs(model)).velocity.square().mean() * factor)
        good = optimizer.step(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.zero_grad()
        ema.update(average, model, 0.9, good)
    return [*model.parameters(), *average.parameters()], said


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_changes_nothing_with_any_optimizer(name, poison):
    """Weights and averages are those of a run without this step, bit for bit, even if it is the first one."""
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    expected, said = train_with(OPTIMIZERS[name], [1.0, 2.0])
    assert said == [] if name == "AdamW" else "does not honour found_inf: each step waits" in said[0]
    for factors in ([1.0, poison, 2.0], [poison, 1.0, 2.0]):
        found, _ = train_with(OPTIMIZERS[name], factors)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_is_skipped_on_the_device(scaled, poison):
    """With the loss scaler of fp16, and without."""
    model = randomise(small())
    average = ema.averaged_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for factor in (1.0, poison, 1.0):
        before = [p.clone() for p in [*model.parameters(), *average.parameters()]]
        scaler.scale(model(*inputs(model)).velocity.square().mean() * factor).backward()
        scaler.unscale_(optimizer)
        good = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite().float()
        optimizer.found_inf = 1 - good
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.update(average, model, 0.9, good)
        after = [*model.parameters(), *average.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (factor != 1.0) and all(p.isfinite().all() for p in after)
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    assert scaler.get_scale() == (512.0 if scaled else 1.0)


def test_the_average_is_the_same_to_the_bit_whether_steps_are_watched():
    model = randomise(small())
    averages = [ema.averaged_copy(small()), ema.averaged_copy(small())]
    averages[1].load_state_dict(averages[0].state_dict())
    ema.update(averages[0], model)
    ema.update(averages[1], model, good=torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(averages[0].parameters(), averages[1].parameters(), strict=True))


def test_rows_skip_bad_steps_and_survive_a_full_disk(tmp_path, monkeypatch):
    log = run_log(tmp_path)
    log.add({"loss": 1.0})
    log.count("bad_steps")
    log.add({"loss": 3.0})
    state = log.state()
    from training import metrics as module

    def full(text, path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", full)
        log.write_row(3)
    assert not (tmp_path / "metrics.jsonl").exists()
    log.write_row(4)
    rows = read_rows(tmp_path)
    assert [(row["step"], row.get("loss"), row.get("bad_steps")) for row in rows] == [(3, 2.0, 1), (4, None, None)]
    (tmp_path / "other").mkdir()
    again = run_log(tmp_path / "other", state=state, step=3)
    assert again.write_row(3)["loss"] == 2.0


def test_a_partial_line_is_removed(tmp_path, monkeypatch):
    from training import metrics as module

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        module._append('{"step": 2}\n', path)
    assert path.read_text() == '{"step": 1}\n'


class Weights(torch.nn.Module):
    def __init__(self, *values: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(values))


def finite_weights(tmp_path, *parts, reduce=lambda value: value) -> FiniteWeights:
    """Return the guard of a network, an average and an optimizer with these values."""
    model, average, moment = (Weights(*values) for values in parts)
    optimizer = GuardedOptimizer(SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters(), fused=True)))
    optimizer.optimizer.optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": moment.weight.detach()}
    return FiniteWeights(model, average, optimizer, reduce, tmp_path, known_at=5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3))
def test_weights_averages_and_moments_that_are_not_finite_end_the_run(tmp_path, place, poison):
    parts = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    guard = finite_weights(tmp_path, *parts)
    guard.check(10)
    assert guard.flag() == 1 and guard.known_at == 10
    parts[place][1] = poison
    broken = finite_weights(tmp_path, *parts)
    assert broken.flag() == (place == 2)  # moments are compared only where something is written
    with pytest.raises(InputError, match=r"not finite at step 20; at step 5 they were finite.* checkpoint: none"):
        broken.check(20)
    for name in ("0000004.pt", "0000015.pt", "best.pt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"0000004\.pt: resume from it by --resume-step 4\. Use a smaller --learning"):
        broken.check(20)


def test_weights_that_are_not_finite_on_one_process_end_the_run_on_all(tmp_path):
    guard = finite_weights(tmp_path, [1.0], [1.0], [1.0], reduce=lambda value: (value + 0) / 2)  # the other one has 0
    with pytest.raises(InputError, match="not finite"):
        guard.check(1)


def test_a_report_says_whether_the_weights_were_finite_on_all_processes():
    for other, expected in ((1.0, True), (0.0, False)):
        reports = StepReports(lambda values, other=other: (values + other) / 2, torch.device("cpu"), ())
        for flag in (torch.tensor(1.0), None):
            reports.add({"loss": torch.ones(2)})
            reports.send(3, torch.tensor(1.0), set(), flag)
        assert [report.finite_weights for report in reports.receive(wait_for_all=True)] == [expected] * 2


def test_a_finite_gradient_with_an_update_that_is_not_finite_ends_the_run(train_flags, tmp_path):
    """AdamW with epsilon 0 divides 0 by 0 where the gradient is 0: for labels that do not occur in the step."""
    flags = [*train_flags, "--exp-name", "run", "--adam-epsilon", "0", "--checkpointing-steps", "1"]
    with pytest.raises(InputError, match=r"not finite at step 1; at step 0 they were .*--adam-epsilon is 0"):
        run_training(flags)
    run = tmp_path / "exps" / "run"
    assert not list((run / "checkpoints").glob("*.pt")) and not (run / "metrics.jsonl").exists()
