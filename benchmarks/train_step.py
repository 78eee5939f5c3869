"""How fast a training step is: written plainly, with one switch after the other, and as train.py has it.

    python benchmarks/train_step.py --model SiT-XL/2 --batch-size 256 --precision bf16 --json train_step.json

One run, synthetic images and latents of real size; encoders have random weights unless --enc-weights names a file,
which changes nothing in their speed. Forms take turns, and the median over the rounds counts, so that whatever else the
machine does meets all alike. Several models, batch sizes, resolutions and precisions make a table of their products.
FLOPs are counted by torch for network (three passes) and encoders (one), without what checkpointing computes again;
utilisation compares with a large matrix product of the same precision, measured in the same run. Memory on a CPU is
the whole process's: measure one form and size at a time to learn what that one takes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import matrix_rate, parse_with_json, peak_memory, reset_peak_memory, synchronise, write_result
from benchmarks.training_steps import SWITCHES, OurForm, PlainForm, Workload
from common.io import InputError, check_writable, run_cli
from training.config import SWITCH

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("plain", "switches", "ours", "compile", "checkpointing")
LOSSES_COMPARED = 2  # steps from the same weights, before any form is timed


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str
    batch_size: int
    resolution: int
    precision: str


@dataclass
class Row:
    """One form's figures; None where it does not fit into memory."""

    model: str
    batch_size: int
    resolution: int
    precision: str
    class_slot: bool
    form: str
    seconds: float | None = None  # of one step, median
    images_per_second: float | None = None
    ratio: float | None = None  # to the plain form in float32, or else to the plain form
    utilisation: float | None = None
    memory_gb: float | None = None  # nor where another workload lies beside it
    data_wait: float | None = None
    warm_up_seconds: float | None = None  # the first steps, compiling included
    losses: list[float] = field(default_factory=list)
    flops_per_image: dict[str, int] = field(default_factory=dict)
    gradient_bytes: int = 0


def main() -> None:
    """Measure as the command line says."""
    args = parse_args()
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py's default has it
    rates: dict[str, float] = {}
    rows: list[Row] = []
    for settings in itertools.product(args.model, args.batch_size, args.resolution, args.precision):
        case = Case(*settings)
        found = matrix_rate(device, args.matrix_seconds, DTYPES[case.precision])
        rates[case.precision] = max(found, rates.get(case.precision, 0))  # before each case: the ceiling is the best
        rows += measure(args, case)
    for row in rows:
        if row.images_per_second:
            row.utilisation = sum(row.flops_per_image.values()) * row.images_per_second / rates[row.precision]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}, encoder {args.encoder}; matrix products:", end=" ")
    print(", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in rates.items()) + "\n")
    print(table(rows))
    if args.json:
        write_result(args.json, {"matrix_flops": rates, "rows": [asdict(row) for row in rows]}, device)


def parse_args() -> argparse.Namespace:
    """Return the checked settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", default=["SiT-B/2"], help="presets (%(default)s)")
    add("--batch-size", type=int, nargs="+", default=[8], help="images of a step (%(default)s)")
    add("--resolution", type=int, nargs="+", default=[256], help="of the images, px (%(default)s)")
    add("--precision", nargs="+", choices=DTYPES, default=["no"], help="autocast, for all forms alike (%(default)s)")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS[:-1]), help="which to measure (%(default)s)")
    add("--encoder", default="dinov2-vit-b", help="as train.py's --enc-type; none: SiT's loss alone (%(default)s)")
    add("--enc-weights", help="its file; default: random weights")
    add("--cls-token", action=SWITCH, default=True, help="with the class slot (REG) or without (REPA)")
    add("--slot-price", action="store_true", help="measure both, with and without the class slot")
    add("--depth", type=int, help="number of blocks instead of the preset's")
    add("--rounds", type=int, default=5, help="how often each form has its turn (%(default)s)")
    add("--steps", type=int, default=2, help="training steps of a turn (%(default)s)")
    add("--matrix-seconds", type=float, default=3, help="for the matrix product (%(default)s)")
    add("--largest-batch", action="store_true", help="look for the largest batch of the last form first, and take that")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA if there is one")
    add("--backend", default="inductor", help="of torch.compile (%(default)s)")
    add("--profile", type=Path, help="write a trace of the last form's steps here, and print its operations")
    args = parse_with_json(parser)
    if args.profile:
        check_writable(args.profile, "--profile")
    if min(*args.batch_size, *args.resolution, args.rounds, args.steps) < 1:
        raise InputError("--batch-size, --resolution, --rounds and --steps must be at least 1")
    if args.encoder == "none" and (args.cls_token or args.slot_price):
        raise InputError("--encoder none: the class slot needs an encoder; add --no-cls-token")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; allowed here: cpu, auto")
    if args.largest_batch and (args.device == "cpu" or not torch.cuda.is_available()):
        raise InputError("--largest-batch: needs a CUDA device, whose memory has an end that can be tried")
    return args


def measure(args: argparse.Namespace, case: Case) -> list[Row]:
    """Return the rows of one case, without their utilisation."""
    slots = [True, False] if args.slot_price else [args.cls_token]
    if args.largest_batch:
        case = largest_batch(args, case, slots[0])
    begin_anew()
    pairs = [pair for slot in slots for pair in build_rows(args, case, slot)]
    turns: list[list[tuple[float, float]]] = [[] for _ in pairs]
    bar = tqdm(total=len(pairs) * (args.rounds + 1), desc=f"{case.model}, batch {case.batch_size}", unit="turn")
    able = []
    for number, (form, row) in enumerate(pairs):
        able += [number] if fits(form, warm_up, row) else []
        bar.update()
    for _ in range(args.rounds):
        able = [number for number in able if fits(pairs[number][0], turn, pairs[number][1], args.steps, turns[number])]
        bar.update(len(able))
    bar.close()
    for number in able:
        row = pairs[number][1]
        row.seconds = statistics.median(seconds for seconds, _ in turns[number])
        row.data_wait = statistics.median(wait for _, wait in turns[number])
        row.images_per_second = case.batch_size / row.seconds
        row.ratio = pairs[able[0]][1].seconds / row.seconds
        row.memory_gb = row.memory_gb if len(slots) == 1 else None
    if args.profile and able:
        profile(pairs[able[-1]][0], args.profile)
    return [row for _, row in pairs]


def build_rows(args: argparse.Namespace, case: Case, class_slot: bool) -> list[tuple[PlainForm | OurForm, Row]]:
    """Return the forms asked for, each with the row for its figures; the forms share one workload."""
    flags = ["--model", case.model, "--batch-size", str(case.batch_size), "--mixed-precision", case.precision]
    flags += ["--device", args.device, "--enc-type", args.encoder]
    flags += [] if class_slot else ["--no-cls-token"]
    flags += ["--depth", str(args.depth), "--encoder-depth", "1"] if args.depth else []
    work = Workload(flags, case.resolution, encoder_weights=args.enc_weights)
    parameters = sum(parameter.numel() for parameter in work.network.parameters() if parameter.requires_grad)
    about = {"flops_per_image": work.flops(), "gradient_bytes": 4 * parameters}
    forms = build_forms(args, work)
    return [(form, Row(**asdict(case), class_slot=class_slot, form=form.name, **about)) for form in forms]


def build_forms(args: argparse.Namespace, work: Workload) -> list[PlainForm | OurForm]:
    """Return the forms asked for; the first is what the others are compared with."""
    forms: list[PlainForm | OurForm] = []
    if "plain" in args.forms:
        on_cpu = work.device.type == "cpu"
        forms += [PlainForm(work, precision="no")] if on_cpu and work.args.mixed_precision != "no" else []
        forms += [PlainForm(work)]
    if "switches" in args.forms:
        names = tuple(SWITCHES)
        forms += [PlainForm(work, names[:count]) for count in range(1, len(names) + 1)]
    if "ours" in args.forms:
        forms += [OurForm(work)]
    if "compile" in args.forms:
        forms += [OurForm(work, compiled=True, backend=args.backend)]
    if "checkpointing" in args.forms:
        forms += [OurForm(work, "compile" in args.forms, checkpointing=True, backend=args.backend)]
    return forms


def fits(form: PlainForm | OurForm, action: Callable[..., None], *given: Any) -> bool:
    """Call `action(form, ...)` and return whether memory sufficed."""
    try:
        action(form, *given)
        return True
    except torch.OutOfMemoryError:
        form.work.network.zero_grad()
    free_memory()  # out here: the error holds what was in use
    return False


def warm_up(form: PlainForm | OurForm, row: Row) -> None:
    """Take a form's first steps from the common start and note their losses."""
    form.work.reset()
    form.restart()
    begun = time.perf_counter()
    for _ in range(LOSSES_COMPARED):
        form.step()
    row.losses = form.finish()
    row.warm_up_seconds = time.perf_counter() - begun


def turn(form: PlainForm | OurForm, row: Row, steps: int, turns: list[tuple[float, float]]) -> None:
    """Take `steps` steps; append the seconds of one and the share of them spent waiting for data to `turns`."""
    work = form.work
    reset_peak_memory(work.device)
    synchronise(work.device)
    form.log.waited, begun = 0.0, time.perf_counter()
    for _ in range(steps):
        form.step()
    synchronise(work.device)
    elapsed = time.perf_counter() - begun
    # A form of its own would not hold the other optimiser's state.
    row.memory_gb = peak_memory(work.device) - work.optimizer_bytes(not form.fused) / 1e9
    form.finish()
    turns.append((elapsed / steps, form.log.waited / elapsed))


def largest_batch(args: argparse.Namespace, case: Case, class_slot: bool) -> Case:
    """Return the case with the largest batch, up to an eighth, with which the last form can take steps."""

    def suffices(batch_size: int) -> bool:
        begin_anew()
        form, row = build_rows(args, replace(case, batch_size=batch_size), class_slot)[-1]
        return fits(form, warm_up, row)

    good, bad = case.batch_size, 2 * case.batch_size
    if not suffices(good):
        raise InputError(f"--batch-size {good}: does not fit into memory; --largest-batch starts from one that does")
    while suffices(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if suffices(middle) else (good, middle)
    return replace(case, batch_size=good)


def free_memory() -> None:
    """Give back what forms no longer in use have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def begin_anew() -> None:
    """Forget earlier workloads: their memory, and their code, as torch.compile keeps but so many versions of it."""
    torch.compiler.reset()
    free_memory()


def profile(form: PlainForm | OurForm, path: Path) -> None:
    """Write a trace of three of a form's steps and print the operations that take longest."""
    work = form.work
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if work.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            form.step()
        synchronise(work.device)
    profiler.export_chrome_trace(str(path))
    longest = "self_device_time_total" if work.device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{form.name}:\n{profiler.key_averages().table(sort_by=longest, row_limit=25, max_name_column_width=60)}")


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | batch | px | precision | class slot | form | s/step | images/s | ratio | utilisation | memory, GB "
        "| waiting for data | loss, step 2 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        about = [row.model, row.batch_size, row.resolution, row.precision, "yes" if row.class_slot else "no", row.form]
        if row.seconds is None:
            figures = ["does not fit", *["-"] * 6]
        else:
            figures = [f"{row.seconds:.3f}", f"{row.images_per_second:.2f}", f"{row.ratio:.2f}"]
            figures += [f"{row.utilisation:.1%}", "-" if row.memory_gb is None else f"{row.memory_gb:.1f}"]
            figures += [f"{row.data_wait:.1%}", f"{row.losses[-1]:.5f}"]
        lines.append("| " + " | ".join(str(cell) for cell in about + figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
