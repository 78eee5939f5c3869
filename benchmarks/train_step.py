"""Measures a training step: plain, with one optimisation after the other, and as train.py has it.

    python benchmarks/train_step.py --model SiT-XL/2 --batch-size 256 --precision bf16 --json train_step.json

Images and latents are synthetic and of real size. Encoders have random weights unless --enc-weights names a file; their
speed is the same. The forms take turns, and the median over the rounds is reported, so that other load affects all of
them. Several models, batch sizes, resolutions and precisions are all combined. FLOPs are counted by torch for the
network (forward and backward) and the encoders (forward), without the recomputation of activation checkpointing;
utilisation is relative to a large matrix product in the same precision in the same run. Memory on a CPU is that of the
complete process: measure one form and size at a time to learn what it takes.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import timing
from benchmarks.training_steps import OPTIMISATIONS, Form, OurForm, PlainForm, TrainingBenchmark, Workload
from common import distributed
from common.cli import NON_NEGATIVE, POSITIVE, parse, setting
from common.io import InputError, check_writable, run_cli

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("plain", "switches", "ours", "compile", "checkpointing")
LOSSES_COMPARED = 2  # steps from the same weights, before any form is timed
LARGEST_FACTOR = 8  # --largest-batch tries up to this multiple of --batch-size


@dataclass(frozen=True, kw_only=True)
class TrainStep(TrainingBenchmark):
    """Settings of the benchmark."""

    model: tuple[str, ...] = setting(("SiT-B/2",), "presets")
    batch_size: tuple[int, ...] = setting((8,), "images of a step", check=POSITIVE)
    resolution: tuple[int, ...] = setting((256,), "of the images, px", check=POSITIVE)
    precision: tuple[str, ...] = setting(("no",), "autocast, the same for all forms", choices=tuple(DTYPES))
    forms: tuple[str, ...] = setting(FORMS[:-1], "forms to measure", choices=FORMS)
    encoder: str = setting("dinov2-vit-b", "--enc-type of train.py; none: train SiT without an encoder")
    cls_token: bool = setting(True, "with the class slot (REG) or without (REPA)")
    slot_price: bool = setting(False, "measure both, with and without the class slot")
    depth: int | None = setting(None, "number of blocks, instead of the preset's", check=POSITIVE)
    rounds: int = setting(5, "number of turns of each form", check=POSITIVE)
    steps: int = setting(2, "training steps of a turn", check=POSITIVE)
    matrix_seconds: float = setting(3, "time of the matrix product", check=NON_NEGATIVE)
    largest_batch: bool = setting(
        False, f"use the largest batch that fits into memory: {LARGEST_FACTOR} times --batch-size, a half of it, ..."
    )
    profile: Path | None = setting(None, "write a trace of the last form's steps to this file; print its operations")

    def check_combination(self) -> None:
        super().check_combination()
        if self.profile:
            check_writable(self.profile, "--profile")
        if self.encoder == "none" and (self.cls_token or self.slot_price):
            raise InputError("--encoder none: the class slot needs an encoder; add --no-cls-token")
        if self.largest_batch and self.torch_device.type == "cpu":
            raise InputError("--largest-batch: needs a CUDA device, whose memory limit can be found by trying")


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
    images_per_second: float | None = None
    ratio: float | None = None  # speed relative to the first form
    utilisation: float | None = None
    memory_gb: float | None = None  # also None if a second workload is in memory
    data_wait: float | None = None  # share of the time
    warm_up_seconds: float | None = None  # the first steps, including compilation
    losses: list[float] = field(default_factory=list)
    flops_per_image: dict[str, int] = field(default_factory=dict)
    gradient_bytes: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the forms of a training step and print a table."""
    config = parse(TrainStep, "Measure the forms of a training step.", argv)
    device = config.torch_device
    torch.backends.cuda.matmul.allow_tf32 = True  # train.py's default
    rates: dict[str, float] = {}
    rows: list[Row] = []
    for settings in itertools.product(config.model, config.batch_size, config.resolution, config.precision):
        case = Case(*settings)
        found = timing.matrix_rate(device, config.matrix_seconds, DTYPES[case.precision])
        rates[case.precision] = max(found, rates.get(case.precision, 0))  # measured for each case; the best is used
        rows += measure(config, case)
    for row in rows:
        if row.images_per_second:
            row.utilisation = sum(row.flops_per_image.values()) * row.images_per_second / rates[row.precision]
    products = ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items())
    print(f"\n{timing.hardware(device)}, torch {torch.__version__}, encoder {config.encoder}")
    print(f"matrix products: {products}\n")
    print(table(rows))
    timing.write_result(config.json, {"matrix_flops": rates, "rows": [asdict(row) for row in rows]}, device)


def measure(config: TrainStep, case: Case) -> list[Row]:
    """Return the rows of one case, without their utilisation."""
    slots = [True, False] if config.slot_price else [config.cls_token]
    if config.largest_batch:
        case = largest_batch(config, case, slots[0])
    release_workloads()
    pairs = [pair for slot in slots for pair in build_rows(config, case, slot)]
    bar = tqdm(total=len(pairs) * (config.rounds + 1), desc=f"{case.model}, batch {case.batch_size}", unit="turn")

    # First steps of each form, then turns of those that fit into memory
    fitting = []
    for form, row in pairs:
        fitting += [(form, row)] if fits(form, warm_up, row) else []
        bar.update()
    turns: dict[int, list[tuple[float, float]]] = {id(row): [] for _, row in fitting}
    for _ in range(config.rounds):
        fitting = [(form, row) for form, row in fitting if fits(form, turn, row, config.steps, turns[id(row)])]
        bar.update(len(fitting))
    bar.close()

    for _, row in fitting:
        row.seconds, row.data_wait = map(statistics.median, zip(*turns[id(row)], strict=True))
        row.images_per_second = case.batch_size / row.seconds
        row.ratio = fitting[0][1].seconds / row.seconds
        row.memory_gb = row.memory_gb if len(slots) == 1 else None
    if config.profile and fitting:
        profile(fitting[-1][0], config.profile)
    return [row for _, row in pairs]


def build_rows(config: TrainStep, case: Case, class_slot: bool) -> list[tuple[Form, Row]]:
    """Return the requested forms, each with the row for its results. The forms share one workload."""
    flags = ["--model", case.model, "--batch-size", str(case.batch_size), "--mixed-precision", case.precision]
    flags += ["--device", config.device, *([] if class_slot else ["--no-cls-token"])]
    work = Workload(flags, config.encoder, case.resolution, encoder_weights=config.enc_weights, depth=config.depth)
    parameters = sum(parameter.numel() for parameter in work.network.parameters() if parameter.requires_grad)
    about = {"flops_per_image": work.flops(), "gradient_bytes": 4 * parameters}
    forms = build_forms(config, work)
    return [(form, Row(**asdict(case), class_slot=class_slot, form=form.name, **about)) for form in forms]


def build_forms(config: TrainStep, work: Workload) -> list[Form]:
    """Return the requested forms. The others are compared with the first."""
    forms: list[Form] = []
    if "plain" in config.forms:
        if work.device.type == "cpu" and work.run.config.precision != "no":
            forms.append(PlainForm(work, precision="no"))
        forms.append(PlainForm(work))
    if "switches" in config.forms:
        names = tuple(OPTIMISATIONS)
        forms += [PlainForm(work, names[:count]) for count in range(1, len(names) + 1)]
    if "ours" in config.forms:
        forms.append(OurForm(work))
    if "compile" in config.forms:
        forms.append(OurForm(work, compiled=True, backend=config.backend))
    if "checkpointing" in config.forms:
        forms.append(OurForm(work, "compile" in config.forms, checkpointing=True, backend=config.backend))
    return forms


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
    form.restart()
    start = time.perf_counter()
    for _ in range(LOSSES_COMPARED):
        form.step()
    row.losses = form.finish()
    row.warm_up_seconds = time.perf_counter() - start


def turn(form: Form, row: Row, steps: int, turns: list[tuple[float, float]]) -> None:
    """Take `steps` steps; append the seconds of one step, and the share of time spent waiting for data, to `turns`."""
    work, log = form.work, form.run.log
    timing.reset_peak_memory(work.device)
    timing.synchronise(work.device)
    log.waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        form.step()
    timing.synchronise(work.device)
    elapsed = time.perf_counter() - start
    # Without the state of the other optimizer, which only other forms use
    row.memory_gb = timing.peak_memory(work.device) - work.optimizer_bytes(not form.fused) / 1e9
    form.finish()
    turns.append((elapsed / steps, log.waited / elapsed))


def largest_batch(config: TrainStep, case: Case, class_slot: bool) -> Case:
    """Return the case with the largest batch with which the last form can take steps."""

    def attempt(batch_size: int) -> None:
        release_workloads()
        warm_up(*build_rows(config, replace(case, batch_size=batch_size), class_slot)[-1])

    return replace(case, batch_size=distributed.largest_batch(attempt, LARGEST_FACTOR * case.batch_size))


def free_memory() -> None:
    """Release the memory of forms that are no longer in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def release_workloads() -> None:
    """Release earlier workloads: their memory, and their compiled code, of which torch.compile keeps few versions."""
    torch.compiler.reset()
    free_memory()


def profile(form: Form, path: Path) -> None:
    """Write a trace of three steps of a form and print the operations that take longest."""
    work = form.work
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if work.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            form.step()
        timing.synchronise(work.device)
    profiler.export_chrome_trace(str(path))
    longest = "self_device_time_total" if work.device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{form.name}:\n{profiler.key_averages().table(sort_by=longest, row_limit=25, max_name_column_width=60)}")


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    headings = "model | batch | px | precision | class slot | form | s/step | images/s | ratio | utilisation "
    headings += "| memory, GB | waiting for data | loss, step 2"
    lines = []
    for row in rows:
        line = [row.model, row.batch_size, row.resolution, row.precision, "yes" if row.class_slot else "no", row.form]
        if row.seconds is None:
            line += ["does not fit", *["-"] * 6]
        else:
            line += [f"{row.seconds:.3f}", f"{row.images_per_second:.2f}", f"{row.ratio:.2f}", f"{row.utilisation:.1%}"]
            line += ["-" if row.memory_gb is None else f"{row.memory_gb:.1f}"]
            line += [f"{row.data_wait:.1%}", f"{row.losses[-1]:.5f}"]
        lines.append(" | ".join(map(str, line)))
    return timing.markdown_table(headings, lines)


if __name__ == "__main__":
    run_cli(main)
