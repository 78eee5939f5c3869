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
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

from common.cli import NON_NEGATIVE, Config, parse, setting
from common.io import InputError, run_cli, write_json
from tests.fuzzing.checkpoints import CANARY
from tests.fuzzing.readers import READERS, digest, prepare
from tests.fuzzing.worker import CLASSES, FAILURES, Outcome, Watch, run_inputs

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
        first, second = prepare(reader, folder)
        expected = digest(reader.read(first))
        watch: list[Watch] = []

        def job(number: int) -> Outcome:
            if not watch:
                os.chdir(folder)
                watch.append(Watch())
            file, change = reader.input(random.Random(f"{seed}/{name}/{number}"), first, second)
            original = (first / file).read_bytes()
            (first / file).write_bytes(change.data)
            refuse = reader.must_be_refused(change)
            outcome = watch[0].outcome(number, lambda: digest(reader.read(first)), expected, refuse)
            (first / file).write_bytes(original)
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
                    file, change = reader.input(random.Random(f"{seed}/{name}/{outcome.number}"), first, second)
                    target = keep / name / f"{outcome.number}-{outcome.kind}" / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(change.data)
    return found


def table(counts: dict[str, Counter[str]], classes: tuple[str, ...] = CLASSES) -> str:
    """Return a Markdown table of the counts by class."""
    used = [kind for kind in classes if kind in ("same", "changed", "clear") or any(c[kind] for c in counts.values())]
    lines = [f"| | inputs | {' | '.join(used)} |", "|---|" + "---|" * (len(used) + 1)]
    for name, found in counts.items():
        lines.append(f"| {name} | {sum(found.values())} | " + " | ".join(str(found[kind]) for kind in used) + " |")
    return "\n".join(lines)


def report_failures(name: str, outcomes: list[Outcome], seed: int) -> list[dict]:
    """Print each kind of failure with its first input and the command that repeats it; return them for JSON."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.kind in FAILURES:
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
    names = config.only.split(",") if config.only else [*READERS]
    if unknown := [name for name in names if name not in READERS]:
        raise InputError(f"--only {unknown[0]}: allowed: {', '.join(READERS)}")
    counts, failures = {}, []
    for name in names:
        started = time.monotonic()
        total = max(1, round(config.inputs * READERS[name].share))
        numbers = list(range(total)) if config.input is None else [config.input]
        outcomes = fuzz_reader(name, numbers, config.seed, config.keep)
        counts[name] = Counter(outcome.kind for outcome in outcomes)
        summary = ", ".join(f"{kind} {counts[name][kind]}" for kind in CLASSES if counts[name][kind])
        print(f"{name}: {total} inputs in {time.monotonic() - started:.0f} s: {summary}", flush=True)
        if config.input is not None:
            print(*outcomes, sep="\n")
        failures += report_failures(name, outcomes, config.seed)
    print(table(counts))
    if config.json:
        write_json(config.json, {"seed": config.seed, "counts": counts, "failures": failures})
    if failures:
        sys.exit(1)
    shutil.rmtree(config.keep, ignore_errors=True)


if __name__ == "__main__":
    run_cli(main)
