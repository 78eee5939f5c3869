"""Feed damaged files to every reader, and changed command lines to every program; count how they end.

    python tests/fuzz.py --inputs 5000 --commands 1000 --seed 0 --json counts.json
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
import time
from collections import Counter
from dataclasses import dataclass

from common.checks import NON_NEGATIVE
from common.cli import Config, parse, setting
from common.errors import InputError, run_cli
from common.io import write_json
from tests.fuzzing import commands
from tests.fuzzing.checkpoints import CANARY
from tests.fuzzing.command_lines import PROGRAMS, Command, command
from tests.fuzzing.readers import READERS, digest, prepare
from tests.fuzzing.worker import CLASSES, FAILURES, Outcome, Watch, run_inputs
from tests.fuzzing.workfolder import load_programs, write_work_folder

KEPT = 3  # inputs of a failure at one place


@dataclass(frozen=True, kw_only=True)
class FuzzConfig(Config):
    """Fuzzing."""

    inputs: int = setting(100, "damaged files for each reader; slow readers get a share", check=NON_NEGATIVE)
    commands: int = setting(0, "changed command lines of all programs together", check=NON_NEGATIVE)
    seed: int = setting(0, "seed of all changes", check=NON_NEGATIVE)
    only: str | None = setting(None, "names of readers and programs, comma-separated; default: all")
    input: int | None = setting(None, "repeat this input of the one reader or program of --only", check=NON_NEGATIVE)
    keep: Path = setting(Path("fuzz-failures"), "folder for the files of failures")
    json: Path | None = setting(None, "file for the counts and failures")


def fuzz_reader(name: str, numbers: list[int], seed: int, keep: Path | None = None) -> list[Outcome]:
    """Return the outcomes of damaged files of one reader. The first files of each failure are copied to `keep`."""
    reader = READERS[name]
    seen: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, valid = prepare(reader, folder)
        expected = digest(reader.read(first))
        watch: list[Watch] = []

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
                outcome = Outcome(number, "executed", outcome.place, outcome.detail)
            return outcome._replace(detail=f"{change.kind}: {outcome.detail}")

        found = []
        for outcome in run_inputs(job, numbers):
            found.append(outcome)
            if outcome.kind in FAILURES and keep is not None:
                seen[outcome[1:3]] += 1
                if seen[outcome[1:3]] <= KEPT:
                    file, change = reader.input(random.Random(f"{seed}/{name}/{outcome.number}"), valid)
                    target = keep / name / f"{outcome.number}-{outcome.kind}" / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(change.data)
    return found


def fuzz_commands(names: list[str], numbers: list[int], seed: int, check_valid: bool) -> dict[str, list[Outcome]]:
    """Return the outcomes of changed command lines, by program. A number determines program and changes.

    With `check_valid`, the valid command lines are run as well; one that is not accepted is a failure.
    """
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    load_programs()
    with tempfile.TemporaryDirectory() as temporary:
        base, folder = Path(temporary) / "base", Path(temporary) / "work"
        write_work_folder(base)
        before = commands.contents(base)
        for number in numbers:
            rng = random.Random(f"{seed}/{number}")
            made = command(rng, names[0] if len(names) == 1 else None)
            if made.program in found:
                found[made.program].append(commands.run(base, before, number, made, folder))
        for name in check_valid * names:  # otherwise, changed command lines would fail for the wrong reason
            outcome = commands.run(base, before, -1, Command(name, PROGRAMS[name].line.split(), {}, "{}"), folder)
            if outcome.kind != "accepted":
                found[name].append(outcome._replace(kind="message", detail=f"valid command: {outcome.detail}"))
    return found


def table(counts: dict[str, Counter[str]], classes: tuple[str, ...]) -> str:
    """Return a Markdown table of the counts by class."""
    used = [kind for kind in classes if any(c[kind] for c in counts.values())]
    lines = [f"| | inputs | {' | '.join(used)} |", "|---|" + "---|" * (len(used) + 1)]
    for name, found in counts.items():
        lines.append(f"| {name} | {sum(found.values())} | " + " | ".join(str(found[kind]) for kind in used) + " |")
    return "\n".join(lines)


def failures_of(name: str, outcomes: list[Outcome], seed: int) -> list[dict]:
    """Print each kind of failure with its first input and the command that repeats it; return them for JSON."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.kind in (*FAILURES, *commands.FAILURES):
            key = (outcome.kind, outcome.place, outcome.detail.partition(":")[0] if outcome.kind == "silent" else "")
            groups.setdefault(key, []).append(outcome)
    failures = []
    for (kind, place, _), found in groups.items():
        again = f"python tests/fuzz.py --seed {seed} --only {name} --input {found[0].number}"
        print(f"  {name}: {kind} at {place or '?'}, {len(found)} times; {found[0].detail[:300]}\n    {again}")
        failures.append({"name": name, "class": kind, "place": place, "count": len(found), "again": again})
        failures[-1]["detail"] = found[0].detail
    return failures


def main() -> None:
    """Fuzz as the command line says."""
    config = parse(FuzzConfig, __doc__.splitlines()[0])
    names = config.only.split(",") if config.only else [*READERS, *PROGRAMS]
    if unknown := [name for name in names if name not in READERS and name not in PROGRAMS]:
        raise InputError(f"--only {unknown[0]}: allowed: {', '.join([*READERS, *PROGRAMS])}")
    found = {}
    for name in (name for name in names if name in READERS and (config.inputs or config.input is not None)):
        started, total = time.monotonic(), round(config.inputs * READERS[name].share)
        numbers = list(range(total)) if config.input is None else [config.input]
        found[name] = fuzz_reader(name, numbers, config.seed, config.keep)
        print(f"{name}: {len(numbers)} inputs in {time.monotonic() - started:.0f} s", flush=True)
    readers = {name: Counter(outcome.kind for outcome in outcomes) for name, outcomes in found.items()}
    programs = [name for name in names if name in PROGRAMS]
    if programs and (config.commands or config.input is not None):
        numbers = list(range(config.commands)) if config.input is None else [config.input]
        found |= fuzz_commands(programs, numbers, config.seed, config.input is None and len(numbers) > 50)
    lines = {name: Counter(outcome.kind for outcome in found[name]) for name in programs if name in found}
    failures = [failure for name, outcomes in found.items() for failure in failures_of(name, outcomes, config.seed)]
    if config.input is not None:
        print(*(outcome for outcomes in found.values() for outcome in outcomes), sep="\n")
    for counts, classes in ((readers, CLASSES), (lines, commands.CLASSES)):
        if counts:
            print(table(counts, classes))
    if config.json:
        write_json(config.json, {"seed": config.seed, "readers": readers, "programs": lines, "failures": failures})
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run_cli(main)
