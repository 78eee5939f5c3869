"""Train SiT, REPA and REG alike and compare how fast they converge (REG, arXiv 2507.01467, figure 1), at a size that
fits the machine; or the rows of one of the paper's ablations.

    python experiments/convergence.py --preset digits --out exps/convergence --parallel 2
    python experiments/convergence.py --preset digits --out exps/convergence --parallel 2 --ablation entangle
    python experiments/convergence.py --preset imagenette --out exps/nette --source imagenette.zip --vae taesd
    python experiments/convergence.py --preset imagenet --out exps/imagenet      # prints the commands for a cluster

All rows have the same seeds, order of data, times, noise, initial weights and optimiser, and differ in the flags of
their row alone. The averaged network is scored at a schedule of steps: Frechet distance to held-out images, in the
features of an independent classifier and of the encoder. Called again, it goes on where it stopped. convergence.md
says what the result shows and what not.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from common.io import InputError, check_writable, read_json, read_metrics, run_cli, write_json
from experiments.comparison import imagenet, report
from experiments.comparison.presets import ABLATIONS, METHODS, PRESETS, REG, Files, Preset, ablations, run
from experiments.comparison.scoring import Judges, Sampling, Scorer, load_images
from models.checkpoint import list_checkpoints

TIMING_ROUNDS = 2  # the methods take turns, so that a busy machine is busy for all of them


class Job(NamedTuple):
    """One training run and the scores to be had of it; all that a worker process needs."""

    folder: Path
    flags: list[str]
    steps: tuple[int, ...]
    judges: Judges
    sampling: Sampling
    threads: int


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings, checked."""
    parser = argparse.ArgumentParser(description="Compare how fast SiT, REPA and REG converge.", allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="digits", choices=[*PRESETS, "imagenet"], help="data and size (%(default)s)")
    add("--ablation", default="methods", choices=ABLATIONS, help="the rows of the table (%(default)s)")
    add("--out", type=Path, required=True, help="folder of data, runs and report; the same one goes on")
    add("--report", type=Path, help="folder of table, figure and JSON; default: --out")
    add("--parallel", type=int, default=1, help="runs at a time (%(default)s)")
    add("--seeds", help="of training, comma-separated, instead of the preset's")
    add("--steps", help="at which checkpoints are scored, comma-separated, instead of the preset's")
    add("--samples", type=int, help="images of a score, instead of the preset's")
    add("--timing-steps", type=int, help="length of the runs that measure a step's time, instead of the preset's")
    add("--unlabelled", action="store_true", help="train (all but 1 in 10,000) and sample without labels")
    add("--flags", default="", help="further flags of train.py, the same for all rows, in quotes")
    add("--source", help="imagenette: photographs, class folders in a folder or zip")
    add("--images", type=int, help="imagenette: at most so many photographs of a class in each half")
    add("--judge-steps", type=int, default=2000, help="imagenette: training steps of the judge (%(default)s)")
    add("--vae", default="taesd", help="imagenette: codec, a name or a folder (%(default)s)")
    add("--enc-type", default="dinov2-vit-b", help="imagenette: the encoder (%(default)s)")
    add("--enc-weights", help="imagenette: its weights file; default: the hub")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="imagenette: where; auto: CUDA, if any")
    add("--model", default="SiT-B/2", help="imagenet: the network (%(default)s)")
    add("--data-dir", default="data/imagenet256", help="imagenet: the data (%(default)s)")
    add("--eval-ref", default="VIRTUAL_imagenet256_labeled.npz", help="imagenet: ADM's reference (%(default)s)")
    add("--run", action="store_true", help="imagenet: also run the commands, one after the other")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps"):
        if (text := getattr(args, name)) is not None:
            if not re.fullmatch(r"\d+(,\d+)*", text):
                raise InputError(f"--{name} {text}: expected whole numbers, comma-separated")
            setattr(args, name, tuple(sorted({int(part) for part in text.split(",")})))
    for name in ("parallel", "samples", "images", "judge_steps", "timing_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be 1 or greater")
    if args.steps and args.steps[0] < 1:
        raise InputError(f"--steps {args.steps[0]}: must be 1 or greater")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.report = args.report or args.out
    for flag, folder in (("--out", args.out), ("--report", args.report)):
        check_writable(folder / "report.md", flag)
    return args


def main() -> None:
    """Compare as the command line says."""
    args = parse_args()
    if args.preset == "imagenet":
        compare_on_a_cluster(args)
        return
    begun = time.perf_counter()
    preset = chosen_preset(args)
    check_same_comparison(args, preset)
    files = preset.prepare(args.out / "data", args)
    rows = chosen_rows(args, preset, files)
    jobs = {(row, seed): make_job(args, preset, files, row, rows[row], seed) for seed in preset.seeds for row in rows}
    try:
        measure_steps(args, preset, files, rows)
        work_off(list(jobs.values()), args.parallel)
    finally:
        spent = add_time(args.out / f"elapsed-{args.ablation}.json", time.perf_counter() - begun)
    result = {**collect(args, preset, files, rows, jobs), **spent}
    name = f"{args.preset}-{args.ablation}" + ("-unlabelled" if args.unlabelled else "")
    report.write(args.report, name, result, {key: job.folder for key, job in jobs.items()})


def compare_on_a_cluster(args: argparse.Namespace) -> None:
    """Print the commands of the paper's size, or run them one after the other; report as far as the runs have got."""
    commands = imagenet.commands(args)
    for command in commands.values():
        print(shlex.join(command))
        if args.run:
            subprocess.run(command, cwd=Path(__file__).resolve().parents[1], check=True)
    if (result := imagenet.collect(args)) is not None:
        runs = {(row, seed): args.out / imagenet.run_name(row, seed) for row, seed in commands}
        report.write(args.report, f"imagenet-{args.ablation}", result, runs)


def add_time(path: Path, seconds: float) -> dict[str, float]:
    """Return the time that all calls so far have taken, by the clock and of processors, and keep it in a file."""
    used = os.times()  # those of the children count once they have ended
    spent = {"seconds": seconds, "cpu_seconds": used.user + used.system + used.children_user + used.children_system}
    if path.exists():
        spent = {name: value + read_json(path)[name] for name, value in spent.items()}
    write_json(path, spent)
    return spent


def chosen_preset(args: argparse.Namespace) -> Preset:
    """Return the preset with what the command line changes."""
    preset = PRESETS[args.preset]
    images = args.samples or preset.sampling.images
    sampling = dataclasses.replace(preset.sampling, images=images, labelled=not args.unlabelled)
    unlabelled = "--cfg-prob 0.9999" if args.unlabelled else ""
    return dataclasses.replace(
        preset,
        flags=" ".join(f"{preset.flags} {unlabelled} {args.flags}".split()),
        steps=args.steps or preset.steps,
        seeds=args.seeds or preset.seeds,
        sampling=sampling,
        timing_steps=args.timing_steps or preset.timing_steps,
    )


def chosen_rows(args: argparse.Namespace, preset: Preset, files: Files) -> dict[str, str]:
    """Return the flags of each row by its name."""
    if args.ablation == "encoder":
        return {**files.other_encoders, REG: METHODS[REG]}
    return ablations(preset.depths, preset.coefficients, {})[args.ablation]


def check_same_comparison(args: argparse.Namespace, preset: Preset) -> None:
    """Raise InputError if the folder holds a comparison of other settings: its scores could not be compared."""
    path = args.out / "settings.json"
    settings = {
        **{name: getattr(args, name) for name in ("preset", "source", "images", "enc_type", "vae")},
        "flags": preset.flags,
        "steps": list(preset.steps),
        "sampling": dataclasses.asdict(preset.sampling),
    }
    if path.exists():
        for name, value in read_json(path).items():
            if settings.get(name) != value:
                raise InputError(f"{path.parent} holds a comparison with {name} {value}, not {settings.get(name)}")
    write_json(path, settings)


def row_flags(preset: Preset, files: Files, flags: str) -> list[str]:
    """Return train.py's flags of a row, less folder, name, seed and length; what the row itself gives comes last."""
    spec, weights = files.judges.encoder, files.judges.encoder_weights
    encoder = ["--enc-type", spec, *(["--enc-weights", weights] if weights else [])]
    common = ["--data-dir", str(files.data), "--sampling-steps", "0", "--device", files.judges.device, *encoder]
    return [*common, *preset.flags.split(), *flags.split()]


def make_job(args: argparse.Namespace, preset: Preset, files: Files, row: str, flags: str, seed: int) -> Job:
    """Return the run of a row and a seed."""
    name = imagenet.run_name(row, seed)
    length = ["--max-train-steps", str(preset.steps[-1]), "--checkpointing-steps", str(math.gcd(*preset.steps))]
    folder = (args.out / "runs" / name).resolve()
    where = ["--output-dir", str(folder.parent), "--exp-name", name, "--seed", str(seed), "--resume", "latest"]
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    every_epoch = ["--epochs", str(10**9), "--log-steps", "20", "--no-check-data"]
    whole = [*row_flags(preset, files, flags), *where, *length, *every_epoch]
    return Job(folder, whole, preset.steps, files.judges, preset.sampling, threads)


def log_file(folder: Path) -> Path:
    """Return where the output of a run goes, beside its folder."""
    return folder.with_name(f"{folder.name}.log")


def work_off(jobs: list[Job], parallel: int) -> None:
    """Train and score what is not there yet, `parallel` runs at a time, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, context) as pool:
        missing = [job for job in jobs if missing_steps(job)]
        for _ in tqdm(pool.map(do, missing), total=len(missing), desc="comparing", unit="run"):
            pass


def missing_steps(job: Job) -> list[int]:
    """Return the steps of which there are no scores."""
    done = {scores["step"] for scores in read_scores(job.folder)}
    return [step for step in job.steps if step not in done]


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of a run so far, by step."""
    path = folder / "scores.json"
    return sorted(read_json(path), key=lambda scores: scores["step"]) if path.exists() else []


def do(job: Job) -> None:
    """Train one run and score its checkpoints; only the last one is kept."""
    main_process = multiprocessing.parent_process()
    if main_process is not None and not main_process.is_alive():
        sys.exit("the comparison has been ended; the same command goes on")
    torch.set_num_threads(job.threads)
    checkpoints = job.folder / "checkpoints"
    paths = {step: checkpoints / f"{step:07d}.pt" for step in job.steps}
    if not all(paths[step].exists() for step in missing_steps(job)):
        run(["train.py", *job.flags], log_file(job.folder), job.threads)
    scorer = cached_scorer(job.judges)
    for step in missing_steps(job):
        begun = time.perf_counter()
        scores = scorer.score(paths[step], job.sampling, job.folder / "grids" / f"{step:07d}.png")
        scores = {"step": step, **scores, "scoring_seconds": time.perf_counter() - begun}
        write_json(job.folder / "scores.json", [*read_scores(job.folder), scores])
    for path in list_checkpoints(checkpoints)[:-1]:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)


SCORERS: dict[Judges, Scorer] = {}


def cached_scorer(judges: Judges) -> Scorer:
    """Return this process's scorer."""
    if judges not in SCORERS:
        SCORERS[judges] = Scorer(judges)
    return SCORERS[judges]


def measure_steps(args: argparse.Namespace, preset: Preset, files: Files, rows: dict[str, str]) -> None:
    """Measure the seconds of a training step of each row, alone on the machine, where that has not been done yet."""
    path = args.out / "seconds_per_step.json"
    known = read_json(path) if path.exists() else {}
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    missing = {row: flags for row, flags in rows.items() if row not in known}
    found: dict[str, list[float]] = {row: [] for row in missing}
    for turn in range(TIMING_ROUNDS):
        for row, flags in tqdm(missing.items(), desc=f"timing, round {turn + 1}", unit="row"):
            folder = (args.out / "timing" / f"{row.lower().replace(' ', '-')}-{turn}").resolve()
            where = ["--output-dir", str(folder.parent), "--exp-name", folder.name, "--resume", "latest"]
            log_every = max(1, preset.timing_steps // 4)
            length = ["--max-train-steps", str(preset.timing_steps), "--log-steps", str(log_every), "--no-check-data"]
            run(["train.py", *row_flags(preset, files, flags), *where, *length], log_file(folder), threads)
            batch_size = read_json(folder / "args.json")["batch_size"]
            speeds = [logged["images_per_second"] for logged in read_metrics(folder / "metrics.jsonl")]
            found[row] += [batch_size / speed for speed in speeds[1:]]  # the first steps warm up
    write_json(path, {**known, **{row: min(times) for row, times in found.items()}})


def collect(
    args: argparse.Namespace,
    preset: Preset,
    files: Files,
    rows: dict[str, str],
    jobs: dict[tuple[str, int], Job],
) -> dict[str, Any]:
    """Return everything measured, as it goes into the JSON."""
    scorer = cached_scorer(files.judges)
    real, labels = load_images(files.data / "images")
    return {
        "preset": args.preset,
        "metric": "Frechet distance, independent judge",
        "ablation": args.ablation,
        "flags": preset.flags,
        "rows": {row: flags.replace(str(args.out), "OUT") for row, flags in rows.items()},
        "seeds": list(preset.seeds),
        "sampling": dataclasses.asdict(preset.sampling),
        "encoder": files.judges.encoder,
        "real": scorer.score_images(real, labels),
        "seconds_per_step": {row: read_json(args.out / "seconds_per_step.json")[row] for row in rows},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if files.judges.device == "cuda" else f"CPU, {os.cpu_count()} cores",
        "threads": next(iter(jobs.values())).threads,
        "parallel": args.parallel,
        "scores": {row: {str(seed): read_scores(jobs[row, seed].folder) for seed in preset.seeds} for row in rows},
    }


if __name__ == "__main__":
    run_cli(main)
