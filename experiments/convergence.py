"""Compares how fast SiT, REPA and REG converge (REG, arXiv 2507.01467, figure 1) at a size that fits the machine.

Instead of the three methods it can compare the rows of one of the paper's ablations, or REG with options of its
successors (--ablation switches).

    python experiments/convergence.py --preset digits --out exps/convergence --parallel 2
    python experiments/convergence.py --preset digits --out exps/convergence --parallel 2 --ablation entangle
    python experiments/convergence.py --preset imagenette --out exps/imagenette --source imagenette.zip
    python experiments/convergence.py --preset emoji --out exps/emoji --source emoji_128.zip --unlabelled
    python experiments/convergence.py --preset imagenet --out exps/imagenet      # prints the commands for a cluster

All rows have the same seeds, order of data, times, noise, initial weights and optimizer. They differ only in the flags
of their row. The encoder's tokens are computed once and read by all runs. The averaged network is scored at fixed steps
by the Frechet distance to held-out images, in the features of an independent classifier and of the encoder. The same
command resumes a comparison that was stopped. README.md says what the results show and what they do not show.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import cli
from common.checks import POSITIVE
from common.cli import Config, parse, setting, uses_cuda
from common.errors import InputError, LostProcess, run_cli
from common.identity import own_json
from common.io import check_writable, read_json, read_metrics, real_path, sha256_of, write_json
from common.progress import progress_bar
from common.sources import FileSource
from experiments import imagenet, report
from experiments.judge import load_images
from experiments.preparation import TOKENS, Files, run
from experiments.presets import ABLATIONS, METHODS, PRESETS, REG, Preset, ablations, row_flags, settings_of
from experiments.scoring import Judges, Sampling, Scorer
from models.checkpoint import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
TIMES = "seconds_per_step.json"
DATA_SETTINGS = "data/settings.json"
TIMING_ROUNDS = 2  # the rows take turns, so that other load affects all of them
OF_PHOTOGRAPHS = ("source", "vae", "enc_type", "enc_weights")
OF_IMAGENET = ("model", "data_dir", "eval_ref", "run")
NOT_USED = {
    "digits": (*OF_PHOTOGRAPHS, "images", *OF_IMAGENET),
    "solids": (*OF_PHOTOGRAPHS, *OF_IMAGENET),
    "imagenette": OF_IMAGENET,
    "emoji": OF_IMAGENET,
    "imagenet": (*OF_PHOTOGRAPHS, "images", "judge_steps", "device", "parallel", "steps", "timing_steps", "unlabelled"),
}
GPU_WORKERS = 4  # processes that read latents and tokens
cached_scorer = functools.cache(Scorer)  # one for each process


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return comma-separated whole numbers, sorted."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers, comma-separated")
    return tuple(sorted({int(part) for part in text.split(",")}))


def quoted_flags(text: str) -> str:
    """Return flags as they are. Raises ArgumentTypeError if a quotation mark is not closed."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).lower()}") from error
    return text


OWN_STUDY = own_json("the settings of a comparison", "preset", "flags", "steps", "sampling")
OWN_REPORT = own_json("a report of a comparison", "preset", "ablation", "scores", "seeds")


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """Data, judge and device. --source, --vae and the encoder are of the presets imagenette and emoji."""

    source: str | None = setting(
        None, "pictures in a folder or zip: photographs in class folders, or emoji with their captions.json"
    )
    images: int | None = setting(None, "maximum number of pictures of a class in each half", check=POSITIVE)
    judge_steps: int | None = setting(
        None, "training steps of the judge (default: those of the preset)", check=POSITIVE
    )
    vae: str = setting("taesd", "codec, a name or a folder")
    enc_type: str = setting("dinov2-vit-b", "encoder; it must have 64 tokens")
    enc_weights: str | None = setting(None, "weights file of the encoder; default: the hub")
    device: str = setting(
        "auto",
        "where to train and score; auto: CUDA if available, but the CPU for digits",
        choices=("auto", "cpu", "cuda"),
    )


@dataclass(frozen=True, kw_only=True)
class ImageNet(Config):
    """The paper's size (preset imagenet)."""

    model: str = setting("SiT-B/2", "network")
    data_dir: str = setting("data/imagenet256", "data")
    eval_ref: str = setting("VIRTUAL_imagenet256_labeled.npz", "ADM's reference")
    run: bool = setting(False, "also run the commands, one after the other")


@dataclass(frozen=True, kw_only=True)
class Convergence(Data, ImageNet):
    """Settings of the comparison."""

    preset: str = setting("digits", "data and size", choices=(*PRESETS, "imagenet"))
    ablation: str = setting("methods", "rows of the table", choices=ABLATIONS)
    out: Path = setting(MISSING, "folder of data, runs and report; with the same folder a comparison is resumed")
    report: Path | None = setting(None, "folder of table, figure and JSON; default: --out")
    parallel: int = setting(1, "number of simultaneous runs", check=POSITIVE)
    # The default of each of these four is the preset's.
    seeds: tuple[int, ...] | None = setting(None, "seeds of training, comma-separated", parse=whole_numbers)
    steps: tuple[int, ...] | None = setting(
        None, "steps whose checkpoints are scored, comma-separated", parse=whole_numbers, check=POSITIVE
    )
    samples: int | None = setting(None, "images of a score", check=POSITIVE)
    timing_steps: int | None = setting(None, "length of the runs that measure the time of a step", check=POSITIVE)
    unlabelled: bool = setting(False, "train and sample without labels")
    flags: str = setting("", "further flags of train.py, the same for all rows, in quotes", parse=quoted_flags)
    reg_flags: str = setting("", "further flags of train.py of rows with a class token, in quotes", parse=quoted_flags)

    def check_combination(self) -> None:
        inputs = (self.source, self.enc_weights)
        for name in NOT_USED[self.preset]:
            if (value := getattr(self, name)) != cli.settings(Convergence)[name].default:
                shown = "" if value is True else f" {value}"
                raise InputError(f"{cli.flag(name)}{shown}: has no effect with --preset {self.preset}; leave it out")
        check_writable(self.out / "settings.json", "--out", inputs, OWN_STUDY)
        is_new = not (self.out / "settings.json").exists()
        found = sorted(os.listdir(self.out)) if is_new and self.preset != "imagenet" and self.out.exists() else []
        known = (TIMES, "data") if (self.out / DATA_SETTINGS).exists() else (TIMES,)
        if others := [name for name in found if not name.startswith(".") and name not in known]:
            raise InputError(f"--out {self.out}: contains {others[0]} and no comparison; choose another folder")
        flag, report = ("--report", self.report) if self.report else ("--out", self.out)
        own = (report / f"{self.name}.json").exists()  # with the pictures and the table that belong to it
        check_writable(report / f"{self.name}.json", flag, inputs, OWN_REPORT)
        for ending in () if own else (".md", ".png", "-samples.png", "-nearest.png"):
            if (path := report / f"{self.name}{ending}").exists():
                raise InputError(f"{flag} {path}: exists without {self.name}.json; choose another folder")
        uses_cuda(self.device)

    @property
    def name(self) -> str:
        """The name of the report's files."""
        return f"{self.preset}-{self.ablation}" + ("-unlabelled" if self.unlabelled else "")


class Job(NamedTuple):
    """One training run and its scores; everything that a worker process needs."""

    folder: Path
    flags: list[str]
    steps: tuple[int, ...]
    judges: Judges
    sampling: Sampling
    threads: int


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the rows of a table."""
    config = parse(Convergence, "Compare how fast SiT, REPA and REG converge.", argv)
    if config.preset == "imagenet":
        compare_on_a_cluster(config)
        return
    study = Study(config)
    jobs = {(row, seed): study.job(row, seed) for seed in study.preset.seeds for row in study.rows}
    run_jobs(list(jobs.values()), config.parallel)
    study.measure_steps()
    folders = {key: job.folder for key, job in jobs.items()}
    report.write(config.report or config.out, config.name, study.collect(folders), folders)


def compare_on_a_cluster(config: Convergence) -> None:
    """Print the commands of the paper's size, or run them one after the other; report the results so far."""
    for command in imagenet.commands(config).values():
        print(shlex.join(command))
        if config.run:
            subprocess.run(command, cwd=ROOT, check=True)
    result, runs = imagenet.collect(config)
    if result is not None:
        report.write(config.report or config.out, f"imagenet-{config.ablation}", result, runs)


class Study:
    """A comparison on one machine: its preset with the changes of the command line, its files, and its rows."""

    def __init__(self, config: Convergence):
        self.config = config
        self.preset = chosen_preset(config)
        check_same_comparison(config, self.preset)
        preset = self.preset
        tables = ablations(preset.depths, preset.coefficients, {}, preset.steps[-1], preset.muon_rate)
        rows = tables[config.ablation] or {REG: METHODS[REG]}
        self.rows = {row: row_flags(self.preset.flags, flags, config.reg_flags) for row, flags in rows.items()}
        self.files: Files = self.preset.prepare(config.out / "data", config)
        if config.ablation == "encoder":
            self.rows = {**self.files.other_encoders, **self.rows}
        self.threads = max(1, (os.cpu_count() or 1) // config.parallel)

    def reads_encoder(self, row: str) -> bool:
        """Return whether a row's training needs the output of the encoder."""
        return settings_of(f"{self.preset.flags} {self.rows[row]}").reads_encoder

    def time_name(self, row: str, cached: bool) -> str:
        """Return the name of a row's time of a step, with cached tokens or with the encoder running."""
        return row if cached or not self.reads_encoder(row) else f"{row} with encoder"

    def flags(self, row: str, folder: Path, cached: bool = True, **length: int) -> list[str]:
        """Return train.py's flags of a row. The row's own flags are last.

        cached: whether the encoder's tokens are read instead of running it. length: flags with numbers.
        """
        judges = self.files.judges
        values = {
            "--output-dir": folder.parent, "--exp-name": folder.name, "--resume": "latest", "--sampling-steps": 0,
            "--data-dir": self.files.data, "--device": judges.device, "--enc-type": judges.encoder,
            "--num-workers": GPU_WORKERS if judges.device == "cuda" else 0,
            **({"--enc-weights": judges.encoder_weights} if judges.encoder_weights else {}),
            **({"--cached-tokens": self.files.tokens.get(row, TOKENS)} if cached and self.reads_encoder(row) else {}),
            **{cli.flag(name): number for name, number in length.items()},
        }  # fmt: skip
        common = [str(part) for pair in values.items() for part in pair]
        return [*common, "--no-check-data", *shlex.split(self.preset.flags), *shlex.split(self.rows[row])]

    def job(self, row: str, seed: int) -> Job:
        """Return the run of a row and a seed."""
        folder, steps = real_path(self.config.out / "runs" / imagenet.run_name(row, seed)), self.preset.steps
        length = {"max_train_steps": steps[-1], "checkpointing_steps": math.gcd(*steps), "epochs": 10**9}
        flags = self.flags(row, folder, seed=seed, log_steps=20, **length)
        return Job(folder, flags, steps, self.files.judges, self.preset.sampling, self.threads)

    def measure_steps(self) -> None:
        """Measure the seconds of a training step of each row that has not been measured, one run at a time.

        Each row is measured as it is trained, with cached tokens, and once with the encoder running.
        """
        path, steps = self.config.out / TIMES, self.preset.timing_steps
        known = read_json(path) if path.exists() else {}
        kinds = {self.time_name(row, cached): (row, cached) for cached in (False, True) for row in self.rows}
        kinds = {name: kind for name, kind in kinds.items() if name not in known}
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(TIMING_ROUNDS):
            measured = {name: kind for name, kind in kinds.items() if kind[1] or turn == 0}
            for name, (row, cached) in progress_bar(measured.items(), desc=f"timing, round {turn + 1}", unit="run"):
                folder = real_path(self.config.out / "timing" / f"{name.lower().replace(' ', '-')}-{turn}")
                flags = self.flags(row, folder, cached, max_train_steps=steps, log_steps=max(1, steps // 4))
                run(["train.py", *flags], folder, self.threads)
                batch_size = read_json(folder / "args.json")["batch_size"]
                speeds = [logged["images_per_second"] for logged in read_metrics(folder / "metrics.jsonl")]
                found[name] += [batch_size / speed for speed in speeds[1:]]  # the first steps are slower
        write_json(path, {**known, **{name: min(times) for name, times in found.items()}})

    def collect(self, runs: dict[tuple[str, int], Path]) -> dict[str, Any]:
        """Return all results, the content of the JSON. `runs`: folder of each row and seed."""
        config, judges, seeds = self.config, self.files.judges, self.preset.seeds
        seconds = read_json(config.out / TIMES)
        return {
            "preset": config.preset,
            "metric": "Frechet distance, independent judge",
            "ablation": config.ablation,
            "flags": self.preset.flags,
            "rows": {row: flags.replace(str(config.out), "OUT") for row, flags in self.rows.items()},
            "seeds": list(seeds),
            "sampling": dataclasses.asdict(self.preset.sampling),
            "encoder": judges.encoder,
            "real": cached_scorer(judges).score_images(*load_images(self.files.data / "images")),
            "cached_tokens": True,
            "seconds_per_step": {row: seconds[row] for row in self.rows},
            "seconds_per_step_with_encoder": {row: seconds[self.time_name(row, False)] for row in self.rows},
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if judges.device == "cuda" else f"CPU, {os.cpu_count()} cores",
            "threads": self.threads,
            "parallel": config.parallel,
            "scores": {row: {str(seed): read_scores(runs[row, seed]) for seed in seeds} for row in self.rows},
        }


def chosen_preset(config: Convergence) -> Preset:
    """Return the preset with the changes of the command line."""
    preset = PRESETS[config.preset]
    images = config.samples or preset.sampling.images
    unlabelled = "--cfg-prob 1" if config.unlabelled else ""
    of_ablation = preset.switches_flags if config.ablation == "switches" else ""
    return dataclasses.replace(
        preset,
        flags=" ".join(part for part in (preset.flags, of_ablation, unlabelled, config.flags.strip()) if part),
        steps=config.steps or preset.steps,
        seeds=config.seeds or preset.seeds,
        sampling=dataclasses.replace(preset.sampling, images=images, labelled=not config.unlabelled),
        timing_steps=config.timing_steps or preset.timing_steps,
    )


def check_same_comparison(config: Convergence, preset: Preset) -> None:
    """Raise InputError if the folder holds a comparison with other settings, whose scores could not be compared.

    The settings of the data are also recorded with the data, so that other comparisons can use a link to them.
    """
    data = {
        **{name: getattr(config, name) for name in ("preset", "source", "images", "judge_steps", "enc_type", "vae")},
        "source_files": config.source and digest_of_sizes(config.source),
        "enc_weights_sha256": config.enc_weights and sha256_of(config.enc_weights),
        "cached_tokens": True,
    }
    scores = {
        "flags": preset.flags,
        "reg_flags": config.reg_flags,
        "steps": list(preset.steps),
        "sampling": dataclasses.asdict(preset.sampling),
    }
    records = {config.out / "settings.json": {**data, **scores}, config.out / DATA_SETTINGS: data}
    for path, settings in records.items():
        if path.exists():
            for name, value in {**dict.fromkeys(settings), **read_json(path)}.items():
                if settings.get(name) != value:
                    raise InputError(f"{path.parent} holds a comparison with {name} {value}, not {settings.get(name)}")
    for path, settings in records.items():
        write_json(path, settings)


def digest_of_sizes(source: str) -> str:
    """Return the SHA-256 of the names and sizes of the files in a folder or zip."""
    files = FileSource(source)
    return hashlib.sha256(json.dumps([(name, files.size(name)) for name in files.names]).encode()).hexdigest()


def run_jobs(jobs: list[Job], parallel: int) -> None:
    """Train and score what is missing, `parallel` runs at a time, each in its own process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, context) as pool:
        missing = [job for job in jobs if missing_steps(job)]
        try:
            for _ in progress_bar(pool.map(run_job, missing), total=len(missing), desc="comparing", unit="run"):
                pass
        except BrokenProcessPool as error:
            message = "a process of a run was killed, probably because memory was full; the same command continues"
            raise LostProcess(message) from error


def missing_steps(job: Job) -> list[int]:
    """Return the steps without scores."""
    done = {scores["step"] for scores in read_scores(job.folder)}
    return [step for step in job.steps if step not in done]


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of a run so far, by step."""
    path = folder / "scores.json"
    return sorted(read_json(path), key=lambda scores: scores["step"]) if path.exists() else []


def run_job(job: Job) -> None:
    """Train one run and score its checkpoints. Only the last checkpoint is kept."""
    main_process = multiprocessing.parent_process()
    if main_process is not None and not main_process.is_alive():
        sys.exit("the comparison has ended; run the same command to resume it")
    torch.set_num_threads(job.threads)
    checkpoints = job.folder / "checkpoints"
    paths = {step: checkpoints / f"{step:07d}.pt" for step in job.steps}
    if not all(paths[step].exists() for step in missing_steps(job)):
        run(["train.py", *job.flags], job.folder, job.threads)
    scorer = cached_scorer(job.judges)
    for step in missing_steps(job):
        start = time.perf_counter()
        scores = scorer.score(paths[step], job.sampling, job.folder / "grids" / f"{step:07d}.png")
        scores = {"step": step, **scores, "scoring_seconds": time.perf_counter() - start}
        write_json(job.folder / "scores.json", [*read_scores(job.folder), scores])
    for path in list_checkpoints(checkpoints)[:-1]:
        path.unlink()
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)


if __name__ == "__main__":
    run_cli(main)
