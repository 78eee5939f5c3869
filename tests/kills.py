"""Kill every program at random moments, run the same command again, and compare the result with an undisturbed run.

    python tests/kills.py --train 30 --generate 10 --encode 10 --convert 10 --evaluate 10 --reference 10 --seed 0

Training is killed as often with one process as with two. The moments are spread over the complete duration of a
program, from its start-up to its last file. A killed program is started again until it ends; then its files must be
those of the undisturbed run, bit for bit except times, and no temporary file may be left. With --faults N, each program
also runs N times with a disk that is full: files cannot grow beyond a random size, which is smaller than its largest
file. It must end without a traceback, and the same command must complete the work. Prints counts, and writes them to
--json. The exit status is 1 if a comparison failed. pytest does not collect this file; tests/test_kills.py tests it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for imports from the repository, which are inside functions

TIMES = {"seconds", "images_per_second", "data_wait", "waited"}  # entries of files that differ between equal runs
LOGS = ("log.txt", "starts.jsonl", ".sha256")  # of times; a checkpoint contains times, so its checksum differs as well
SECONDS = 900  # after which a program counts as hanging
LEFT_ALONE = 60  # seconds in which the processes that a killed main process has started must end
HANGS = -1000  # its exit status
STARTS_PER_KILL = 4  # a program may end before its kill
IMAGES = 240
AT_ONCE = 2  # programs that are tried


@dataclass
class Case:
    """A command that writes into `place`, which is empty when it is started for the first time."""

    name: str
    command: list[str]
    place: Path
    several: bool = False  # torchrun starts several processes, which outlive it: a kill hits all of them
    undisturbed_runs: int = 2  # the first one fills the caches of files
    expected: dict[str, Any] = field(default_factory=dict)  # snapshot of the undisturbed run
    seconds: float = 0  # duration of the undisturbed run
    largest: int = 0  # bytes of its largest file


@dataclass
class Counts:
    """What happened to one program."""

    kills: int = 0
    before_first_file: int = 0  # kills before the program wrote a file
    with_temporary_file: int = 0  # kills that left one
    full_disks: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)


def start(command: list[str], file_size: int | None = None) -> subprocess.Popen:
    """Start a program as a user does, in a session of its own; files cannot grow beyond `file_size` bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True, **pipes)
    if file_size is not None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_size, file_size))
    return process


def descendants(process: int) -> list[int]:
    """Return a process and all processes that it has started, which may be in sessions of their own."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def kill(process: subprocess.Popen, everything: bool) -> bool:
    """Kill a program with SIGKILL: all of its processes, or only the main one, as the out-of-memory killer does.

    Return whether the processes that a killed main one had started ended by themselves.
    """
    if everything:
        send(signal.SIGSTOP, descendants(process.pid))  # stopped, they start no further processes
    victims = descendants(process.pid)
    send(signal.SIGKILL, victims if everything else victims[:1])
    if ended_within(process, LEFT_ALONE) is not None:  # the error output ends when the last process has ended
        return True
    send(signal.SIGKILL, victims)
    process.communicate()
    return False


def ended_within(process: subprocess.Popen, seconds: float) -> str | None:
    """Return what a program wrote to stderr if it ends within some seconds, None if it still runs."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        return None


def run(case: Case, file_size: int | None = None) -> tuple[int, str]:
    """Run a program to its end; return its exit status and what it wrote to stderr."""
    process = start(case.command, file_size)
    errors = ended_within(process, SECONDS)
    if errors is None:
        kill(process, everything=True)
        return HANGS, f"no end after {SECONDS} s"
    return process.returncode, errors


def files_of(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file() or path.is_symlink())


def without_times(value: Any) -> Any:
    """Return JSON or a checkpoint's content without the entries of TIMES; tensors as their bytes' SHA-256."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    return value


def content(path: Path) -> Any:
    """Return what must be equal in a file of two equal runs."""
    if path.suffix == ".pt":
        from models.checkpoint import load_checkpoint

        saved = load_checkpoint(path)
        return without_times(
            {key: value for key, value in saved.items() if key != "args"} | {"args": str(saved["args"])}
        )
    if path.suffix == ".json":
        return without_times(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


def snapshot(place: Path) -> dict[str, Any]:
    """Return what must be equal in all files of a folder, hidden ones included, by name."""
    files = [path for path in files_of(place) if not path.name.endswith(LOGS)]
    return {str(path.relative_to(place)): content(path) for path in files}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Return how two snapshots differ, None if they are equal."""
    if added := found.keys() - expected.keys():
        return f"additional files: {', '.join(sorted(added))}"
    if lost := expected.keys() - found.keys():
        return f"missing files: {', '.join(sorted(lost))}"
    changed = [name for name in expected if found[name] != expected[name]]
    return f"other content: {', '.join(changed)}" if changed else None


def undisturbed(case: Case) -> None:
    """Run a program without kills and note its duration and its files."""
    for _ in range(case.undisturbed_runs):
        clear(case.place)
        started = time.monotonic()
        status, errors = run(case)
        case.seconds = time.monotonic() - started
        if status != 0:
            raise SystemExit(f"{case.name}: exit status {status} without a kill:\n{errors}")
        before, case.expected = case.expected, snapshot(case.place)
        if before and (different := difference(case.expected, before)):
            raise SystemExit(f"{case.name}: two undisturbed runs differ: {different}")
    case.largest = max(path.stat().st_size for path in files_of(case.place))


def clear(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


def compare(case: Case, counts: Counts, status: int, errors: str, what: str) -> None:
    """Compare a program's files with those of the undisturbed run, and empty its folder."""
    counts.compared += 1
    if status != 0:
        counts.failures.append(f"{what}: exit status {status}: {errors.strip()[-2000:]}")
    elif different := difference(snapshot(case.place), case.expected):
        counts.failures.append(f"{what}: {different}")
    clear(case.place)


def try_kills(case: Case, kills: int, counts: Counts, chance: random.Random) -> None:
    """Kill a program `kills` times; each time it ends before its kill, compare its files and let it start again."""
    moments = [(number + chance.random()) / kills for number in range(kills)]
    chance.shuffle(moments)
    clear(case.place)
    since, starts = 0, 0  # kills since the folder was empty
    while counts.kills < kills and starts < STARTS_PER_KILL * kills:
        process, starts, started = start(case.command), starts + 1, time.monotonic()
        errors = ended_within(process, moments[counts.kills] * case.seconds)
        if errors is None:
            if not kill(process, everything=case.several or chance.random() < 0.5):
                counts.failures.append(f"kill {counts.kills + 1}: processes of the killed one still run")
            names = [path.name for path in files_of(case.place)]
            counts.kills, since = counts.kills + 1, since + 1
            counts.before_first_file += not names
            counts.with_temporary_file += any(name.endswith(".tmp") for name in names)
        else:
            if since == 0:  # the machine is faster than before
                case.seconds = time.monotonic() - started
            compare(case, counts, process.returncode, errors, f"after {since} kills")
            since = 0
    if since:
        compare(case, counts, *run(case), f"after {since} kills")


def try_full_disks(case: Case, number: int, counts: Counts, chance: random.Random) -> None:
    """Run a program `number` times with a limit on the size of files, then without, and compare."""
    for _ in range(number):
        clear(case.place)
        size = chance.randrange(case.largest // 4, case.largest)
        status, errors = run(case, size)
        counts.full_disks += 1
        ours = errors.partition("torch/distributed/elastic")[0]  # torchrun reports a failed process by a traceback
        if status == HANGS or "Traceback" in ours:
            counts.failures.append(f"files of at most {size} bytes: exit status {status}: {errors.strip()[-2000:]}")
        if any(path.name.endswith(".tmp") for path in files_of(case.place)):
            counts.failures.append(f"files of at most {size} bytes: a temporary file was left")
        compare(case, counts, *run(case), f"after files of at most {size} bytes")


def prepare(folder: Path) -> dict[str, Path]:
    """Write small inputs of all programs and return their paths."""
    from PIL import Image

    from tests import adm_standin
    from tests.conftest import write_data, write_encoder

    paths = {name: folder / name for name in ("data", "encoder.safetensors", "photographs", "inception.pb")}
    write_data(paths["data"], num=IMAGES)
    write_encoder(paths["encoder.safetensors"])
    adm_standin.write_pb(paths["inception.pb"])
    random_numbers = np.random.default_rng(0)
    for number in range(2 * IMAGES):
        path = paths["photographs"] / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_numbers.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    for name, count in (("reference", 12), ("samples", 10)):
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], arr_0=random_numbers.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))
    return paths


def train_command(paths: dict[str, Path], place: Path, processes: int) -> list[str]:
    from tests.conftest import ENCODER

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    flags = f"""train.py --output-dir {place} --exp-name run --data-dir {paths["data"]} --device cpu --resume latest
        --enc-type {ENCODER} --enc-weights {paths["encoder.safetensors"]} --encoder-depth 1 --projector-dim 16
        --model SiT-S/4 --depth 2 --hidden-size 64 --num-heads 2 --batch-size 8 --num-workers 1 --ema-decay 0.9
        --learning-rate 0.001 --max-train-steps 120 --log-steps 2 --checkpointing-steps 10 --keep-last 3
        --sampling-steps 50 --grid-num-steps 2"""
    return [*launcher, *flags.split()]


def make_cases(folder: Path) -> dict[str, Case]:
    """Return a small case for each program."""
    from tests.conftest import ENCODER

    paths = prepare(folder / "inputs")
    names = ("train", "train, 2 processes", "generate", "encode", "encode_tokens", "convert", "evaluate", "reference")
    place = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in names}
    trained = Case("train", train_command(paths, folder / "trained", 1), folder / "trained")
    status, errors = run(trained)
    if status != 0:
        raise SystemExit(f"train: exit status {status} without a kill:\n{errors}")
    network = folder / "trained" / "run"
    commands = {
        "train": train_command(paths, place["train"], 1),
        "train, 2 processes": train_command(paths, place["train, 2 processes"], 2),
        "generate": f"""generate.py --ckpt {network} --sample-dir {place["generate"]} --num-fid-samples 96 --save-cls
            --num-steps 20 --cfg-scale 2 --per-proc-batch-size 8 --device cpu""".split(),
        "encode": f"""preprocessing/encode.py --source {paths["data"] / "images"} --dest {place["encode"] / "latents"}
            --vae pixel --batch-size 2 --workers 1""".split(),
        "encode_tokens": f"""preprocessing/encode_tokens.py --source {paths["data"] / "images"} --workers 1 --flip
            --dest {place["encode_tokens"] / "tokens"} --enc-type {ENCODER} --batch-size 2
            --enc-weights {paths["encoder.safetensors"]}""".split(),
        "convert": f"""preprocessing/convert.py --source {paths["photographs"]} --dest {place["convert"] / "images.zip"}
            --resolution 32 --workers 2""".split(),
        "evaluate": f"""evaluations/evaluator.py {paths["reference"]} {paths["samples"]} --cpu
            --inception {paths["inception.pb"]} --cache {place["evaluate"] / "cache"}
            --save_path {place["evaluate"] / "result.json"}""".split(),
        "reference": f"""evaluations/reference.py --source {paths["samples"]} --cpu --inception {paths["inception.pb"]}
            --dest {place["reference"] / "reference.npz"}""".split(),
    }  # fmt: skip
    return {name: Case(name, commands[name], place[name], several=name.endswith("processes")) for name in names}


def try_program(case: Case, kills: int, faults: int = 0, seed: int = 0) -> Counts:
    """Try one program: run it undisturbed, kill it `kills` times, and run it on a full disk `faults` times."""
    counts, chance = Counts(), random.Random(f"{seed} {case.name}")
    undisturbed(case)
    try_kills(case, kills, counts, chance)
    try_full_disks(case, faults, counts, chance)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for program in ("train", "generate", "encode", "encode_tokens", "convert", "evaluate", "reference"):
        parser.add_argument(f"--{program}", type=int, default=0, metavar="N", help="number of kills")
    parser.add_argument("--faults", type=int, default=0, metavar="N", help="runs of each program on a full disk")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = vars(parser.parse_args())
    faults, seed, output = (options.pop(name) for name in ("faults", "seed", "json"))
    kills = {"train": options.pop("train")}
    kills |= {"train, 2 processes": kills["train"]} | options

    results, started = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(Path(folder))
        wanted = [name for name, number in kills.items() if number]
        pool = ThreadPoolExecutor(AT_ONCE)
        tries = pool.map(lambda name: try_program(cases[name], kills[name], faults, seed), wanted)
        for name, counts in zip(wanted, tries, strict=True):
            results[name] = vars(counts)
            print(
                f"{name}: {counts.kills} kills ({counts.before_first_file} before the first file, "
                f"{counts.with_temporary_file} while writing a file), {counts.full_disks} full disks; "
                f"{counts.compared} comparisons, {len(counts.failures)} failures",
                flush=True,
            )
            for failure in counts.failures:
                print(f"  {failure}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")
    if output:
        from common.io import write_json

        write_json(output, results)
    sys.exit(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    main()
