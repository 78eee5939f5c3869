"""Runs the benchmarks and the tests that need a GPU on one GPU, in parts of less than ten minutes; see on_gpu.sh.

    bash benchmarks/on_gpu.sh part1
    SIZE=tiny bash benchmarks/on_gpu.sh part1        # on a CPU in about a minute, with tiny networks

A part is a list of jobs (on_gpu_jobs.py), the most valuable first. Each job is one program with a time limit. It may
also use the time that earlier jobs of its part did not use. A job that fails or reaches its limit does not stop the
others, and keeps the results that its program had written. It is named at the end, and the exit status is 1.

WORK/results/ contains the output (JOB.log) and the results (JOB.json) of each job. OUT/results.tar.gz is written again
after each job, without files of more than 4 MB, such as traces. Compiled code is kept in WORK/cache/.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

from benchmarks.on_gpu_jobs import PARTS, Job
from benchmarks.on_gpu_summary import tables
from benchmarks.timing import markdown_table
from common.cli import Config, parse, setting, uses_cuda
from common.errors import InputError, run_cli
from common.identity import own_file
from common.io import check_writable, write_json
from common.temporary import atomic_write
from training.throughput import describe_code

GRACE = 10  # seconds from SIGINT, after which a job may still write results, to SIGKILL
LARGEST_FILE = 4_000_000  # bytes; larger files are not archived
SHOWN_LINES = 15  # of the log of a job that failed
GPU_QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]


@dataclass(frozen=True, kw_only=True)
class OnGpu(Config):
    """Settings."""

    example = "bash benchmarks/on_gpu.sh part1"

    parts: tuple[str, ...] = setting(MISSING, "what to measure", flag="parts", choices=tuple(PARTS))
    out: Path = setting(Path("gpu"), "folder of results.tar.gz")
    work: Path = setting(Path("gpu"), "folder of the results and of compiled code")
    size: str = setting("full", "full: for one GPU; tiny: tiny networks on the CPU", choices=("full", "tiny"))

    def check_combination(self) -> None:
        check_writable(self.archive, "--out", own=own_file("an archive of results", start=b"\x1f\x8b"))
        check_writable(self.results / "jobs.json", "--work")
        if self.size == "full" and not uses_cuda("auto"):
            raise InputError("--size full: needs a CUDA device; allowed here: tiny")

    @property
    def archive(self) -> Path:
        """The archive of the results."""
        return self.out / "results.tar.gz"

    @property
    def results(self) -> Path:
        """The folder of the results."""
        return self.work / "results"


@dataclass
class Outcome:
    """How a job ended. `status`: the exit status of its program; None: it has none, see `end`."""

    job: str
    limit: float  # seconds that the job had
    seconds: float = 0.0
    status: int | None = None
    end: str = "not run"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the jobs of the parts, print a summary, and exit with status 1 if a job failed."""
    config = parse(OnGpu, "Measure training, sampling and evaluation on one GPU.", argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell may have set SIGINT to be ignored
        signal.signal(number, signal.default_int_handler)
    config.results.mkdir(parents=True, exist_ok=True)
    parts = dict.fromkeys(config.parts)  # each once
    outcomes = [Outcome(job.name, job.limit) for part in parts for job in PARTS[part]]
    try:
        show_versions(config.results / "versions.json")
        for part in parts:
            run_part(config, PARTS[part], outcomes)
    except KeyboardInterrupt:
        print("on_gpu: stopped by a signal", file=sys.stderr)
    left_out = write_archive(config, outcomes)
    summarise(config, outcomes)
    print(f"\n{config.archive}: all results" + (f", without {', '.join(left_out)}" if left_out else ""), flush=True)
    if failed := [f"{outcome.job} ({outcome.end})" for outcome in outcomes if outcome.status != 0]:
        print(f"on_gpu: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def show_versions(path: Path) -> None:
    """Write and print the versions of GPU, driver, packages and code."""
    versions = describe_code(torch.device("cpu"))  # without starting CUDA in this process, which would take memory
    with contextlib.suppress(OSError):
        versions["device"] = subprocess.run(GPU_QUERY, capture_output=True, text=True).stdout.strip()
    write_json(path, versions)
    print(", ".join(f"{name} {value}" for name, value in versions.items()), flush=True)


def run_part(config: OnGpu, jobs: Sequence[Job], outcomes: list[Outcome]) -> None:
    """Run the jobs of a part one after the other. The archive is written after each of them."""
    deadline = time.monotonic()
    for job in jobs:
        deadline += job.limit
        outcome = next(outcome for outcome in outcomes if outcome.job == job.name)
        outcome.limit = max(1.0, deadline - time.monotonic())
        for old in config.results.glob(f"{job.name}.*"):  # of an earlier call
            old.unlink()
        run_job(config, job, outcome)
        print(f"== {job.name}: {outcome.end} after {outcome.seconds:.0f} s", flush=True)
        write_archive(config, outcomes)


def run_job(config: OnGpu, job: Job, outcome: Outcome) -> None:
    """Run a job within `outcome.limit`, copy its output to its log, and set the rest of the outcome."""
    command, start = job.command(config.work, config.size), time.monotonic()
    print(f"\n== {job.name}, at most {outcome.limit:.0f} s: python {shlex.join(command[1:])}", flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env=job_environment(config), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    copier = Thread(target=copy_output, args=(process.stdout, config.results / f"{job.name}.log"), daemon=True)
    copier.start()
    try:
        outcome.status = process.wait(outcome.limit)
        outcome.end = "complete" if outcome.status == 0 else f"status {outcome.status}"
    except subprocess.TimeoutExpired:
        outcome.end = f"reached its limit of {outcome.limit:.0f} s"
    except KeyboardInterrupt:
        outcome.end = "stopped by a signal"
        raise
    finally:
        end_group(process)
        copier.join(GRACE)
        outcome.seconds = time.monotonic() - start
    if outcome.status == 0 and not (config.results / f"{job.name}{job.results}").exists():
        outcome.status, outcome.end = None, f"wrote no {job.name}{job.results}"


def job_environment(config: OnGpu) -> dict[str, str]:
    """Return the environment of the jobs: unbuffered output, and folders for compiled code that later calls use."""
    cache = config.work.absolute() / "cache"
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a job, if it is still running, and all processes that it has started."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # pytest still writes its report
            process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second signal to this process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def copy_output(source: IO[bytes], path: Path) -> None:
    """Copy lines to a file and to stdout as they come."""
    with open(path, "wb") as log:
        for line in source:
            log.write(line)
            log.flush()
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def write_archive(config: OnGpu, outcomes: list[Outcome]) -> list[str]:
    """Write how the jobs ended, and the archive of all results; return the names of files that are too large for it."""
    write_json(config.results / "jobs.json", [asdict(outcome) for outcome in outcomes])
    left_out = []
    with atomic_write(config.archive) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in sorted(path for path in config.results.rglob("*") if path.is_file()):
            if path.stat().st_size > LARGEST_FILE:
                left_out.append(path.name)
            else:
                archive.add(path, f"results/{path.relative_to(config.results)}")
    return left_out


def summarise(config: OnGpu, outcomes: list[Outcome]) -> None:
    """Print the last lines of the logs of failed jobs, the tables of results, and how each job ended."""
    for outcome in outcomes:
        log = config.results / f"{outcome.job}.log"
        if outcome.status != 0 and log.exists():
            print(f"\n== end of {log}:")
            print("\n".join(line[:200] for line in log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
    for outcome in outcomes:
        for table in tables(config.results, outcome.job):
            print(f"\n{outcome.job}:\n{table}")
    columns = {"job": "{job}", "seconds": "{seconds:.0f}", "limit": "{limit:.0f}", "end": "{end}"}
    print("\n" + markdown_table(columns, [asdict(outcome) for outcome in outcomes]), flush=True)


if __name__ == "__main__":
    run_cli(main)
