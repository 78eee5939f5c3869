"""Measures a training step: a plain one, and train.py's own with its options.

    python benchmarks/train_step.py --model SiT-XL/2 --batch-size 256 --precision bf16 --json train_step.json
    python benchmarks/train_step.py --losses 200 --precision bf16 --depth 4 --json losses.json

Images and latents are synthetic and of real size. Encoders have random weights unless --enc-weights names a file; their
speed is the same. The forms take turns, and the median over the rounds is reported, so that other load affects all of
them. Several models, batch sizes, resolutions and precisions are all combined. FLOPs are counted by torch for the
network (forward and backward) and the encoders (forward), without the recomputation of activation checkpointing;
utilisation is relative to a large matrix product in the same precision in the same run. Memory on a CPU is that of the
complete process: measure one form and size at a time to learn what it takes.

With --profile, kernels are divided into kinds by their names: matrix products, attention, normalisation and other
elementwise work, copies, optimizer, communication, and idle time. The table is also in the results, so that it is known
without the trace, which is a large file.

With --losses the forms are not timed. Their losses from the same start, with the same batches and noise, are compared
with those of the plain step in float32. One more run distinguishes rounding from errors: the plain step in float32 with
initial weights changed by one unit in the last place (ulp). Any change in the order of a sum may cause a deviation as
large as that of this run.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import profiling, timing
from benchmarks.training_steps import Form, OurForm, PlainForm, Workload, measure_saves
from common import distributed
from common.checks import NON_NEGATIVE, POSITIVE, between
from common.cli import parse, setting
from common.errors import InputError, run_cli
from common.identity import own_file
from common.io import check_writable
from common.progress import progress_bar

RESOLUTION = between(8, 8192)  # px; the latents have an eighth of it
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("plain", "ours", "compile", "checkpointing")
LOSSES_COMPARED = 2  # steps from the same weights, before any form is timed
LARGEST_FACTOR = 8  # --largest-batch tries up to this multiple of --batch-size
PROFILED_STEPS = 3
ONE_ULP = 1 + 2**-23  # changes a float32 to a neighbouring one
SEPARATED = 1e-3  # relative difference from which on two losses count as separated


@dataclass(frozen=True, kw_only=True)
class TrainStep(timing.TimedBenchmark):
    """Settings of the benchmark."""

    model: tuple[str, ...] = setting(("SiT-B/2",), "presets")
    batch_size: tuple[int, ...] = setting((8,), "images of a step", check=POSITIVE)
    resolution: tuple[int, ...] = setting((256,), "of the images, px", check=RESOLUTION)
    precision: tuple[str, ...] = setting(("no",), "autocast, the same for all forms", choices=tuple(DTYPES))
    forms: tuple[str, ...] = setting(FORMS[:-1], "forms to measure", choices=FORMS)
    backend: str = setting("inductor", "backend of torch.compile")
    encoder: str = setting("dinov2-vit-b", "--enc-type of train.py; none: train SiT without an encoder")
    enc_weights: str | None = setting(None, "weights of the encoder; default: random weights")
    cls_token: bool = setting(True, "with the class slot (REG) or without (REPA)")
    slot_price: bool = setting(False, "measure both, with and without the class slot")
    depth: int | None = setting(None, "number of blocks, instead of the preset's", check=POSITIVE)
    batches: int = setting(1, "number of different batches, repeated in a cycle", check=POSITIVE)
    learning_rate: float = setting(1e-4, "constant learning rate", check=POSITIVE)
    rounds: int = setting(5, "number of turns of each form", check=POSITIVE)
    steps: int = setting(2, "training steps of a turn", check=POSITIVE)
    matrix_seconds: float = setting(3, "time of the matrix product", check=NON_NEGATIVE)
    largest_batch: bool = setting(
        False, f"use the largest batch that all forms can have: {LARGEST_FACTOR} times --batch-size, a half of it, ..."
    )
    saves: Path | None = setting(None, "also measure how train.py's forms save checkpoints, on the disk of this folder")
    profile: Path | None = setting(
        None, "write a trace of the last form's steps to this file; print where their time goes"
    )
    losses: int = setting(0, "compare the losses of this many steps instead of times", check=NON_NEGATIVE)

    def check_combination(self) -> None:
        super().check_combination()
        if self.profile:
            check_writable(self.profile, "--profile", own=own_file("a trace", start=b"{", contains=b'"schemaVersion"'))
        if self.saves and not self.saves.is_dir():
            raise InputError(f"--saves {self.saves}: no such folder")
        if self.encoder == "none" and (self.cls_token or self.slot_price):
            raise InputError("--encoder none: the class slot needs an encoder; add --no-cls-token")
        if self.largest_batch and self.torch_device.type == "cpu":
            raise InputError("--largest-batch: needs a CUDA device, whose memory limit can be found by trying")
        if self.losses and max(map(len, (self.model, self.batch_size, self.resolution))) > 1:
            raise InputError("--losses: compares forms of one --model, --batch-size and --resolution")


@dataclass
class Case:
    """What is trained."""

    model: str
    batch_size: int
    resolution: int
    precision: str


@dataclass
class Row(Case):
    """The results of one form; None where it does not fit into memory."""

    class_slot: bool
    form: str
    seconds: float | None = None  # of one step, median
    seconds_quartiles: list[float] = field(default_factory=list)  # the lower and the upper one
    images_per_second: float | None = None
    ratio: float | None = None  # speed relative to the first form
    utilisation: float | None = None
    memory_gb: float | None = None  # also None if a second workload is in memory
    data_wait: float | None = None  # share of the time
    warm_up_seconds: float | None = None  # the first steps, including compilation
    losses: list[float] = field(default_factory=list)
    flops_per_image: dict[str, int] = field(default_factory=dict)
    gradient_bytes: int = 0
    saves: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Result:
    """All that was measured so far."""

    config: TrainStep
    matrix_flops: dict[str, float] = field(default_factory=dict)  # operations per second, by precision
    rows: list[Row] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Write all to --json."""
        for row in self.rows:
            if row.images_per_second:
                flops = sum(row.flops_per_image.values()) * row.images_per_second
                row.utilisation = flops / self.matrix_flops[row.precision]
        found = {"matrix_flops": self.matrix_flops, "rows": [asdict(row) for row in self.rows]}
        timing.write_result(self.config.json, {**found, "profile": self.profile}, self.config.torch_device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the forms of a training step and print a table."""
    start = time.perf_counter()
    config = parse(TrainStep, "Measure the forms of a training step.", argv)
    device = config.torch_device
    if config.losses:
        print(loss_table(train_all(config)))
        return
    torch.backends.cuda.matmul.allow_tf32 = True  # train.py's default
    result = Result(config)
    rates = result.matrix_flops
    cases = list(itertools.product(config.model, config.batch_size, config.resolution, config.precision))
    for number, settings in enumerate(cases, start=1):
        case = Case(*settings)
        found = timing.matrix_rate(device, config.matrix_seconds, DTYPES[case.precision])
        rates[case.precision] = max(found, rates.get(case.precision, 0))  # measured for each case; the best is used
        measure(case, result, config.until(start, number / len(cases)))
    products = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items())
    print(f"\n{timing.hardware(device)}, torch {torch.__version__}, encoder {config.encoder}")
    print(f"matrix products: {products}\n")
    show([asdict(row) for row in result.rows])


def measure(case: Case, result: Result, until: float | None) -> None:
    """Add the rows of one case to `result`, which is written after each form. `until`: see `timing.rounds_until`."""
    config = result.config
    slots = [True, False] if config.slot_price else [config.cls_token]
    release_workloads()
    pairs = largest_forms(config, case, slots) if config.largest_batch else build_all(config, case, slots)
    result.rows += [row for _, row in pairs]

    # First steps of each form and a first turn, then turns of those that fit into memory
    name = f"{case.model}, batch {pairs[0][1].batch_size}"
    turns: dict[int, list[tuple[float, float]]] = {id(row): [] for _, row in pairs}
    fitting: list[tuple[Form, Row]] = []
    for form, row in progress_bar(pairs, desc=f"{name}, first steps"):
        first: list[tuple[float, float]] = []
        if fits(form, warm_up, row) and fits(form, turn, row, 1, first):
            fitting.append((form, row))
            summarise(row, first, fitting[0][1])
            print(f"{name}, {form.name}: {row.seconds:.4f} s/step, {row.memory_gb:.1f} GB", flush=True)
        result.write()
    for _ in timing.rounds_until(config.rounds, until, name):
        for form, row in fitting.copy():
            if fits(form, turn, row, config.steps, turns[id(row)]):
                summarise(row, turns[id(row)], fitting[0][1])
            else:
                fitting.remove((form, row))
                row.seconds = row.images_per_second = row.ratio = row.utilisation = row.memory_gb = None
                row.seconds_quartiles = []
            result.write()

    for form, row in fitting:
        row.memory_gb = row.memory_gb if len(slots) == 1 else None
        if config.saves and isinstance(form, OurForm):
            row.saves = measure_saves(form, config.saves)
        result.write()
    if config.profile and fitting:
        form = fitting[-1][0]
        found = profiling.profile(form.step, PROFILED_STEPS, form.work.device, config.profile)
        result.profile = {"form": form.name, **found}
        result.write()
        print(f"\n{form.name}, where the time of a step goes:\n")
        profiling.show(found)


def summarise(row: Row, turns: list[tuple[float, float]], first: Row) -> None:
    """Set the results of a row from its turns. `first` is the row with which it is compared."""
    times, waits = zip(*turns, strict=True)
    low, row.seconds, high = timing.quartiles(times)
    row.seconds_quartiles, row.data_wait = [low, high], statistics.median(waits)
    row.images_per_second = row.batch_size / row.seconds
    row.ratio = first.seconds / row.seconds


def build_workload(config: TrainStep, case: Case, class_slot: bool, *more: str) -> Workload:
    """Return the workload of a case. `more`: further flags of train.py."""
    flags = ["--model", case.model, "--batch-size", str(case.batch_size), "--mixed-precision", case.precision]
    flags += ["--device", config.device, "--learning-rate", str(config.learning_rate), *more]
    flags += [] if class_slot else ["--no-cls-token"]
    return Workload(flags, config.encoder, case.resolution, config.batches, config.enc_weights, config.depth)


def build_all(config: TrainStep, case: Case, slots: list[bool]) -> list[tuple[Form, Row]]:
    """Return the requested forms and their rows, with and without the class slot as `slots` says."""
    return [pair for slot in slots for pair in build_rows(config, case, slot)]


def build_rows(config: TrainStep, case: Case, class_slot: bool) -> list[tuple[Form, Row]]:
    """Return the requested forms, each with the row for its results. The forms share one workload."""
    work = build_workload(config, case, class_slot)
    parameters = sum(parameter.numel() for parameter in work.network.parameters() if parameter.requires_grad)
    about = {"flops_per_image": work.flops(), "gradient_bytes": 4 * parameters}
    forms = build_forms(config, work)
    if "plain" in config.forms and work.device.type == "cpu" and case.precision != "no":
        forms.insert(0, PlainForm(work, precision="no"))
    return [(form, Row(**asdict(case), class_slot=class_slot, form=form.name, **about)) for form in forms]


def build_forms(config: TrainStep, work: Workload) -> list[Form]:
    """Return the requested forms. The others are compared with the first."""
    compiled = "compile" in config.forms
    forms: dict[str, Callable[[], Form]] = {
        "plain": partial(PlainForm, work),
        "ours": partial(OurForm, work),
        "compile": partial(OurForm, work, compiled=True, backend=config.backend),
        "checkpointing": partial(OurForm, work, compiled, checkpointing=True, backend=config.backend),
    }
    return [make() for name, make in forms.items() if name in config.forms]


def fits(form: Form, action: Callable[..., None], *given: Any) -> bool:
    """Call `action(form, ...)`; return False if memory is insufficient."""
    try:
        action(form, *given)
        return True
    except torch.OutOfMemoryError:
        form.work.network.zero_grad()
    free_memory()  # after the except block, because the error refers to the memory in use
    return False


def warm_up(form: Form, row: Row) -> None:
    """Take a form's first steps from the common start and store their losses."""
    form.work.reset()
    form.run.step = 0
    start = time.perf_counter()
    for _ in range(LOSSES_COMPARED):
        form.step()
    row.losses = form.finish()
    row.warm_up_seconds = time.perf_counter() - start


def turn(form: Form, row: Row, steps: int, turns: list[tuple[float, float]]) -> None:
    """Take `steps` steps; append the seconds of one step, and the share of time spent waiting for data, to `turns`."""
    work, clock = form.work, form.run.log.clock
    timing.reset_peak_memory(work.device)
    clock.end_lap()
    elapsed = timing.timed(lambda: [form.step() for _ in range(steps)], work.device)
    # Without the state of the other optimizer, which only other forms use
    row.memory_gb = timing.peak_memory(work.device) - work.optimizer_bytes(not form.fused) / 1e9
    form.finish()
    turns.append((elapsed / steps, clock.end_lap().waited / elapsed))


def largest_forms(config: TrainStep, case: Case, slots: list[bool]) -> list[tuple[Form, Row]]:
    """Return the requested forms and their rows, all with the largest batch with which each of them can take steps.

    Forms that are compiled are not tried if there are others: they need less memory, and compilation takes long.
    """
    pairs: list[tuple[Form, Row]] = []

    def attempt(batch_size: int) -> None:
        pairs.clear()
        release_workloads()
        pairs.extend(build_all(config, replace(case, batch_size=batch_size), slots))
        for form, row in [pair for pair in pairs if not pair[0].compiled] or pairs:
            warm_up(form, row)

    distributed.largest_batch(attempt, LARGEST_FACTOR * case.batch_size)
    return pairs


def free_memory() -> None:
    """Release the memory of forms that are no longer in use."""
    gc.collect()
    torch.cuda.empty_cache()  # without a GPU this does nothing


def release_workloads() -> None:
    """Release earlier workloads: their memory, and their compiled code, of which torch.compile keeps few versions."""
    torch.compiler.reset()
    free_memory()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of times, and that of saves if they were measured."""
    columns = {
        "model": "{model}", "batch": "{batch_size}", "px": "{resolution}", "precision": "{precision}",
        "class slot": "{class_slot}", "form": "{form}", "s/step": "{seconds:.3f}",
        "quartiles": "{seconds_quartiles[0]:.3f}, {seconds_quartiles[1]:.3f}",
        "images/s": "{images_per_second:.2f}", "ratio": "{ratio:.2f}", "utilisation": "{utilisation:.1%}",
        "memory, GB": "{memory_gb:.1f}", "waiting for data": "{data_wait:.1%}", "loss, step 2": "{losses[1]:.5f}",
    }  # fmt: skip
    print(timing.markdown_table(columns, rows))
    if any(row["seconds"] is None for row in rows):
        print("\nForms without a time do not fit into memory.")
    columns = {
        "form": "{form}", "checkpoint, GB": "{saves[gb]:.2f}", "stall of a save, s": "{saves[stall]:.3f}",
        "time of a save in the background, s": "{saves[write]:.2f}", "s/step during a save": "{saves[step]:.3f}",
        "s/step": "{seconds:.3f}",
    }  # fmt: skip
    if saving := [row for row in rows if row["saves"]]:
        print("\n" + timing.markdown_table(columns, saving))


def train_all(config: TrainStep) -> dict[str, list[float]]:
    """Return the losses of --losses steps of each form, by the form's name. The first is the reference.

    The result is written after each form.
    """
    losses: dict[str, list[float]] = {}
    for precision in dict.fromkeys(("no", *config.precision)):
        release_workloads()
        case = Case(config.model[0], config.batch_size[0], config.resolution[0], precision)
        work = build_workload(config, case, config.cls_token, "--no-allow-tf32")
        forms = [(form, 1.0) for form in build_forms(config, work)]
        if precision == "no" and "plain" in config.forms:
            forms.insert(1, (PlainForm(work), ONE_ULP))
        for form, factor in forms:
            work.reset()
            with torch.no_grad():
                for parameter in work.network.parameters():
                    parameter.mul_(factor)
            start_moved = ", start moved by one ulp" if factor != 1 else ""
            name = f"{form.name}{start_moved}, {'float32' if precision == 'no' else precision}"
            for _ in progress_bar(range(config.losses), desc=name):
                form.step()
            losses[name] = form.finish()
            timing.write_result(config.json, {"losses": losses}, config.torch_device)
    return losses


def loss_table(losses: dict[str, list[float]]) -> str:
    """Return the difference between each form and the first, the reference, as Markdown."""
    reference, rows = np.array(next(iter(losses.values()))), []
    tenth = max(1, len(reference) // 10)
    for name, values in losses.items():
        found = np.abs(np.array(values) - reference)
        separated = np.flatnonzero(found > SEPARATED * np.abs(reference))
        row = {"form": name, "loss": np.mean(values[-tenth:]), "largest": found[:tenth].max()}
        rows.append({**row, "mean": found[-tenth:].mean(), "separated": next(iter(separated), "never")})
    columns = {
        "form": "{form}", "loss, last tenth": "{loss:.4f}", "largest difference, first tenth": "{largest:.1e}",
        "mean difference, last tenth": "{mean:.1e}", f"separated by {SEPARATED} after step": "{separated}",
    }  # fmt: skip
    return timing.markdown_table(columns, rows)


if __name__ == "__main__":
    run_cli(main)
