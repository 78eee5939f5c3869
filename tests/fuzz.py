"""Feed damaged files to every reader, and changed command lines to every program; count how they end.

    python tests/fuzz.py --inputs 5000 --commands 1000 --seed 0 --jobs 2 --json counts.json
    python tests/fuzz.py --table counts.json                     (the tables of an earlier call)
    python tests/fuzz.py --only npz --input 1234 --seed 0        (one input again, with what it gave)

An input is determined by the seed, the name of the reader or program, and its number. Files of failures are kept in
--keep, one folder for each place in the code. The exit status is 1 if there are failures.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported

import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from common.checks import NON_NEGATIVE, POSITIVE
from common.cli import Config, parse, setting
from common.errors import InputError, run_cli
from common.io import read_json, write_json
from tests.fuzzing import commands, worker
from tests.fuzzing.checkpoints import CANARY
from tests.fuzzing.command_lines import PROGRAMS, Command, command
from tests.fuzzing.mutations import BOMB_BYTES, HONEST_BYTES, bomb
from tests.fuzzing.readers import READERS, digest, prepare
from tests.fuzzing.worker import Outcome, Watch, run_inputs
from tests.fuzzing.workfolder import load_programs, write_work_folder

FEW = 20  # inputs; so few seldom contain a bomb, which takes a second to make
KEPT = 3  # inputs of a failure at one place
CHUNK = {"readers": 500, "programs": 25}  # inputs that one job takes at a time
Found = list[tuple[str, Outcome]]  # outcomes, each with the name of its reader or program


@dataclass(frozen=True, kw_only=True)
class FuzzConfig(Config):
    """Fuzzing."""

    inputs: int = setting(100, "damaged files for each reader; slow readers get a share", check=NON_NEGATIVE)
    commands: int = setting(0, "changed command lines of all programs together", check=NON_NEGATIVE)
    seed: int = setting(0, "seed of all changes", check=NON_NEGATIVE)
    jobs: int = setting(1, "worker processes", check=POSITIVE)
    only: str | None = setting(None, "names of readers and programs, comma-separated; default: all")
    input: int | None = setting(None, "repeat this input of the one reader or program of --only", check=NON_NEGATIVE)
    keep: Path = setting(Path("fuzz-failures"), "folder for the files of failures")
    json: Path | None = setting(None, "file for the counts and failures")
    table: Path | None = setting(None, "print the tables of a file of --json, and do nothing else")


def fuzz_reader(name: str, numbers: Sequence[int], seed: int, keep: Path) -> Found:
    """Return the outcomes of damaged files of one reader. The first files of each failure are copied to `keep`."""
    reader, found = READERS[name], []
    seen: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, valid = prepare(reader, folder)
        expected = digest(reader.read(first))
        watch: list[Watch] = []  # of the forked process

        def job(number: int) -> Outcome:
            if not watch:
                os.chdir(folder)
                watch.append(Watch())
            file, change = reader.input(random.Random(f"{seed}/{name}/{number}"), valid)
            for other, (content, _) in valid.items():  # an earlier process may have died before it restored them
                (first / other).write_bytes(change.data if other == file else content)
            refuse = reader.must_be_refused(change)
            outcome = watch[0].outcome(number, lambda: digest(reader.read(first)), expected, refuse)
            if (folder / CANARY).exists():
                (folder / CANARY).unlink()
                outcome = outcome._replace(kind="executed")
            return outcome._replace(detail=f"{change.kind}: {outcome.detail}")

        for outcome in run_inputs(job, numbers):
            found.append((name, outcome))
            seen[outcome[1:3]] += outcome.kind in worker.FAILURES
            if outcome.kind in worker.FAILURES and seen[outcome[1:3]] <= KEPT:
                file, change = reader.input(random.Random(f"{seed}/{name}/{outcome.number}"), valid)
                target = keep / name / f"{outcome.number}-{outcome.kind}" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(change.data)
    return found


def fuzz_commands(names: Sequence[str], base: Path, numbers: Sequence[int], seed: int) -> Found:
    """Return the outcomes of changed command lines of programs. A number determines program and changes."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in numbers:
            made = command(random.Random(f"{seed}/{number}"), names[0] if len(names) == 1 else None)
            if made.program in names:
                found.append((made.program, commands.run(base, number, made, Path(temporary) / "work")))
    return found


def check_valid_command(name: str, base: Path) -> Found:
    """Return a failure if the valid command of a program is not accepted: its changes would test nothing."""
    made = Command(name, PROGRAMS[name].line.split(), {}, "{}")
    with tempfile.TemporaryDirectory() as temporary:
        outcome = commands.run(base, -1, made, Path(temporary) / "work")
    accepted = outcome.kind == "accepted"
    return [] if accepted else [(name, outcome._replace(kind="message", detail=f"valid command: {outcome.detail}"))]


def tasks_of(config: FuzzConfig, names: Sequence[str], base: Path) -> Iterator[partial[Found]]:
    """Yield calls that together do what the command line asks for."""
    one = [] if config.input is None else [config.input]
    for name in (name for name in names if name in READERS):
        numbers = one or range(round(config.inputs * READERS[name].share))
        for start in range(0, len(numbers), CHUNK["readers"]):
            yield partial(fuzz_reader, name, numbers[start : start + CHUNK["readers"]], config.seed, config.keep)
    programs = [name for name in names if name in PROGRAMS]
    numbers = one or range(config.commands)
    for start in range(0, len(numbers) if programs else 0, CHUNK["programs"]):
        yield partial(fuzz_commands, programs, base, numbers[start : start + CHUNK["programs"]], config.seed)
    if len(numbers) > 50:
        yield from (partial(check_valid_command, name, base) for name in programs)


def call(task: partial[Found]) -> Found:
    """Call a task; a worker process does it."""
    return task()


def run_tasks(config: FuzzConfig, names: Sequence[str]) -> Found:
    """Return all outcomes, and print the progress."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        tasks = list(tasks_of(config, names, base))
        for size in (BOMB_BYTES, HONEST_BYTES) if config.inputs > FEW else ():
            bomb(size)  # made once, before processes are forked
        if any(task.func is not fuzz_reader for task in tasks):
            load_programs()
            write_work_folder(base)
        found: Found = []
        with ProcessPoolExecutor(config.jobs, get_context("fork")) as pool:
            for number, outcomes in enumerate(pool.map(call, tasks), start=1):
                found += outcomes
                if number % 20 == 0:
                    print(f"{number} of {len(tasks)} parts done", flush=True)
    return found


def print_tables(counts: dict[str, dict[str, dict[str, int]]]) -> None:
    """Print Markdown tables of the counts by class, of readers and of programs."""
    for group, classes in (("readers", worker.CLASSES), ("programs", commands.CLASSES)):
        used = [kind for kind in classes if any(kind in found for found in counts[group].values())]
        if used:
            print(f"\n| {group} | inputs | {' | '.join(used)} |", "|---|" + "---|" * (len(used) + 1), sep="\n")
        for name, found in counts[group].items():
            print(f"| {name} | {sum(found.values())} |", " | ".join(str(found.get(kind, 0)) for kind in used), "|")


def failures_of(found: Found, seed: int) -> list[dict]:
    """Print each kind of failure with its first input and the command that repeats it; return them for JSON."""
    groups: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for name, outcome in found:
        if outcome.kind in (*worker.FAILURES, *commands.FAILURES):
            change = outcome.detail.partition(":")[0] if outcome.kind == "silent" else ""
            groups.setdefault((name, outcome.kind, outcome.place, change), []).append(outcome)
    failures = []
    for (name, kind, place, _), outcomes in groups.items():
        again = f"python tests/fuzz.py --seed {seed} --only {name} --input {outcomes[0].number}"
        print(f"  {name}: {kind} at {place or '?'}, {len(outcomes)} times; {outcomes[0].detail[:300]}\n    {again}")
        failures.append({"name": name, "class": kind, "place": place, "count": len(outcomes), "again": again})
        failures[-1]["detail"] = outcomes[0].detail
    return failures


def main() -> None:
    """Fuzz as the command line says."""
    config = parse(FuzzConfig, __doc__.splitlines()[0])
    if config.table:
        print_tables(read_json(config.table))
        return
    names = config.only.split(",") if config.only else [*READERS, *PROGRAMS]
    if unknown := [name for name in names if name not in READERS and name not in PROGRAMS]:
        raise InputError(f"--only {unknown[0]}: allowed: {', '.join([*READERS, *PROGRAMS])}")
    found = run_tasks(config, names)
    counts: dict[str, dict[str, Counter[str]]] = {"readers": {}, "programs": {}}
    for name in names:
        if kinds := Counter(outcome.kind for of, outcome in found if of == name):
            counts["readers" if name in READERS else "programs"][name] = kinds
    if config.input is not None:
        print(*(outcome for _, outcome in found), sep="\n")
    failures = failures_of(found, config.seed)
    print_tables(counts)
    if config.json:
        write_json(config.json, {"seed": config.seed, **counts, "failures": failures})
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run_cli(main)
