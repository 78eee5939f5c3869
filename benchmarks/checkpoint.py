"""What it costs that a run cannot be lost: saving a checkpoint, and the watch over each step.

    python benchmarks/checkpoint.py --model SiT-B/2 --batch-size 1 [--json checkpoint.json]

Times, in one process and alternately, a plain training step, the same step with all that train.py adds to it (updates
left out on the device's word, reports, log), and the same again while a checkpoint is being written. Random data, no
encoder; the smaller the batch, the heavier the additions weigh.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import parse_with_json, write_result
from common.io import InputError, run_cli
from loss import REGLoss
from models import ema
from models.checkpoint import verify_checkpoint
from models.interpolant import Interpolant
from models.sit import SiT_models
from training.checkpoint_writer import CheckpointWriter
from training.guards import BadSteps
from training.metrics import RunLog, StepReports

ENCODER_WIDTH = 768


class Bench:
    """A network with its optimiser and average, and steps with and without the watch."""

    def __init__(self, model: str, batch_size: int, device: torch.device, folder: Path):
        torch.manual_seed(0)
        self.device, self.batch_size = device, batch_size
        self.model = SiT_models[model](z_dims=[ENCODER_WIDTH], cls_token_dim=ENCODER_WIDTH).to(device)
        self.average = ema.averaged_copy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0, fused=True)
        self.criterion = REGLoss(Interpolant("linear"))
        tokens = self.model.pos_embed.shape[1]
        size = self.model.input_size
        self.x = torch.randn(batch_size, 4, size, size, device=device)
        self.cls_token = torch.randn(batch_size, ENCODER_WIDTH, device=device)
        self.targets = [torch.randn(batch_size, tokens, ENCODER_WIDTH, device=device)]
        self.y = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.log = RunLog(folder, batch_size, True, lambda row, step: None)
        self.reports = StepReports(lambda values: values.clone(), device, ("stop", "save"))
        self.bad_steps = BadSteps(self.log, lambda values: values, lambda step: [], 20, "no")
        self.step = 0

    def plain(self) -> None:
        """One training step as a paper's code has it."""
        self._gradient()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema.update(self.average, self.model)

    def watched(self) -> None:
        """One training step as train.py has it."""
        terms, t = self._gradient()
        self.reports.add(terms.named(), t=t, label=self.y)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        good = grad_norm.isfinite().float()
        self.optimizer.found_inf = 1 - good
        self.optimizer.step()
        del self.optimizer.found_inf
        self.optimizer.zero_grad(set_to_none=True)
        ema.update(self.average, self.model, good=good)
        self.reports.send(self.step, grad_norm, set())
        self.log.end_step()
        for report in self.reports.receive():
            self.bad_steps.note(report)
            self.log.add(report.means)
        self.step += 1

    def content(self) -> dict:
        """Return what a checkpoint holds."""
        return {
            "model": self.model.state_dict(), "ema": self.average.state_dict(), "opt": self.optimizer.state_dict(),
            "args": argparse.Namespace(), "steps": self.step, "log": self.log.state(),
        }  # fmt: skip

    def _gradient(self) -> tuple:
        t = torch.rand(self.batch_size, device=self.device)
        terms = self.criterion(self.model, self.x, self.y, self.cls_token, self.targets, t)
        terms.total.mean().backward()
        return terms, t


def main() -> None:
    """Measure as the command line says."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Bench(args.model, args.batch_size, device, Path(folder)), Path(folder), args.rounds)
    print(f"{args.model}, batch {args.batch_size}, torch {torch.__version__}; times in seconds\n")
    print("| figure | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name.replace('_', ' ')} | {value:.4g} |")
    if args.json:
        write_result(args.json, figures, device)


def parse_args() -> argparse.Namespace:
    """Return the checked settings."""
    parser = argparse.ArgumentParser(description="What it costs that a run cannot be lost.")
    parser.add_argument("--model", default="SiT-B/2", choices=SiT_models, help="preset (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="images of a step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind (%(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to be measured (%(default)s)")
    args = parse_with_json(parser)
    if args.rounds < 1 or args.batch_size < 1:
        raise InputError(f"--rounds {args.rounds}, --batch-size {args.batch_size}: must be 1 or greater")
    if not Path(args.folder).is_dir():
        raise InputError(f"--folder {args.folder}: no such folder")
    return args


def measure(bench: Bench, folder: Path, rounds: int) -> dict[str, float]:
    """Return seconds and their ratios."""
    bench.plain()
    bench.watched()  # first times are not typical
    plain, watched = [], []
    for number in range(rounds):  # in turns, so that whatever else the machine does meets both alike
        for times, step in ((plain, bench.plain), (watched, bench.watched))[:: 1 if number % 2 else -1]:
            times.append(seconds(step))
    writer = CheckpointWriter(folder, keep_last=1)
    writer.save(0, bench.content())  # the first takes its memory from the system
    writer.finish()
    stalls, writes, beside = [], [], []
    for number in range(1, 4):
        start = time.perf_counter()
        stalls.append(seconds(lambda number=number: writer.save(number, bench.content())))
        while writer.busy:
            beside.append(seconds(bench.watched))
        writer.finish()
        writes.append(time.perf_counter() - start)
    path = folder / "0000003.pt"
    step = statistics.median(plain)
    return {
        "step": step,
        "watched_over_plain": statistics.median(watched) / step,
        "fastest_watched_over_fastest_plain": min(watched) / min(plain),
        "checkpoint_gb": path.stat().st_size / 1e9,
        "save_in_the_foreground": seconds(lambda: CheckpointWriter(folder, background=False).save(4, bench.content())),
        "stall_of_a_save": statistics.median(stalls),
        "stall_over_step": statistics.median(stalls) / step,
        "save_beside_training": statistics.median(writes),
        "step_beside_a_save_over_plain": statistics.median(beside) / step if beside else float("nan"),
        "verify": seconds(lambda: verify_checkpoint(path)),
    }


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes, the GPU's part included."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_cli(main)
