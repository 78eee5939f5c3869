"""Going back to an earlier step of a run: what is later is set aside by renaming it, and nothing is deleted.

The files go to RUN/set-aside/N/, under the names that they have in the run: checkpoints and their checksums, best.pt if
it is later, grids, and copies of the files in COPIED as they were. The order to go back is
written first, to RUN/rewind.json, and moved to the same folder last. A start that finds the file completes the moves,
so a process can be killed at any moment.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError, first_line
from common.io import read_json, write_json
from common.temporary import atomic_write
from models.checkpoint import load_checkpoint
from training.checkpoint_writer import TEMPORARY
from training.rows import last_row

SET_ASIDE = "set-aside"
ORDER = "rewind.json"
COPIED = ("metrics.jsonl", "bad_steps.jsonl", "args.json", f"checkpoints/{TEMPORARY}")
BEST = ("best.json", "best.pt.sha256", "best.pt")  # in the order of the moves: best.pt says whether it is later
NUMBERED = re.compile(r"(\d{7,})\.(?:pt|pt\.sha256|png)")


@dataclass(frozen=True)
class Order:
    """To go back to `step`: what is later goes to the folder `number` in set-aside."""

    step: int
    number: int

    @property
    def place(self) -> str:
        """Where the files are, in the folder of the run."""
        return f"{SET_ASIDE}/{self.number}"


def pending_order(folder: Path) -> Order | None:
    """Return the order that an earlier start did not complete. Raises InputError if its file is damaged."""
    path = folder / ORDER
    if not path.exists():
        return None
    content = read_json(path)
    values = [content.get(name) for name in ("step", "number")] if isinstance(content, dict) else []
    if len(values) != 2 or any(type(value) is not int or value < 0 for value in values):
        raise InputError(f"{path}: expected step and number of an unfinished --resume-step; remove it to resume")
    return Order(*values)


def go_back(folder: Path, step: int) -> Order | None:
    """Set aside everything of a run that is later than `step`; return None if there is nothing.

    Raises InputError if files cannot be moved. The next start then continues the moves.
    """
    finish_order(folder)
    if not any(later_files(folder, step)) and (last_row(folder / "metrics.jsonl") or {"step": 0})["step"] <= step:
        return None
    order = Order(step, next_number(folder))
    try:
        write_json(folder / ORDER, {"step": order.step, "number": order.number})
    except OSError as error:
        raise _cannot(folder, error) from error
    return finish_order(folder)


def next_number(folder: Path) -> int:
    """Return the number of the next folder in set-aside."""
    return 1 + max((int(path.name) for path in (folder / SET_ASIDE).glob("*") if path.name.isdecimal()), default=0)


def set_best_aside(folder: Path) -> Path:
    """Move best.pt, its checksum and its scores to the next folder in set-aside, and return the folder."""
    target = folder / SET_ASIDE / str(next_number(folder))
    for name in BEST:
        if (folder / "checkpoints" / name).exists():
            _move(folder / "checkpoints" / name, target / "checkpoints" / name)
    return target


def finish_order(folder: Path) -> Order | None:
    """Complete the order of an earlier start, if there is one, and return it."""
    if (order := pending_order(folder)) is None:
        return None
    target = folder / order.place
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in COPIED:  # before any of them is changed
            if (folder / name).exists() and not (target / name).exists():
                with open(folder / name, "rb") as read, atomic_write(target / name) as written:
                    shutil.copyfileobj(read, written)
        _shorten_temporary(folder / "checkpoints" / TEMPORARY, order.step)
        for path in later_files(folder, order.step):
            _move(path, target / path.relative_to(folder))
        os.replace(folder / ORDER, target / ORDER)
    except OSError as error:
        raise _cannot(folder, error) from error
    return order


def later_files(folder: Path, step: int) -> Iterator[Path]:
    """Yield checkpoints, checksums and grids of steps later than `step`."""
    checkpoints = folder / "checkpoints"
    if best_step(checkpoints) > step:
        yield from (checkpoints / name for name in BEST if (checkpoints / name).exists())
    for path in sorted([*checkpoints.glob("*"), *(folder / "samples").glob("*.png")]):
        if (match := NUMBERED.fullmatch(path.name)) and int(match[1]) > step:
            yield path


def best_step(checkpoints: Path) -> float:
    """Return the step of best.pt, or of its scores if that is later; -1 without both, infinity if it is unreadable."""
    step = -1.0
    try:
        if (checkpoints / "best.json").exists():
            found = read_json(checkpoints / "best.json")
            step = found["step"] if isinstance(found, dict) and type(found.get("step")) is int else float("inf")
        if (checkpoints / "best.pt").exists():
            step = max(step, load_checkpoint(checkpoints / "best.pt", verify=False)["steps"])
    except (InputError, KeyError, TypeError):
        return float("inf")
    return step


def _shorten_temporary(path: Path, step: int) -> None:
    """Remove the names of later checkpoints from the list of temporary ones: a new checkpoint may get such a name."""
    try:
        names = read_json(path)
    except InputError:  # missing, or damaged: the writer of checkpoints ignores it
        return
    matches = [NUMBERED.fullmatch(name) for name in names if isinstance(name, str)]
    write_json(path, [match[0] for match in matches if match and int(match[1]) <= step])


def _move(source: Path, target: Path) -> None:
    """Rename a file; on another file system, to which a link may lead, copy it before it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


def _cannot(folder: Path, error: OSError) -> InputError:
    where, why = error.filename or folder, error.strerror or first_line(error)
    return InputError(
        f"{where}: {why}; what is later than the step to resume from cannot be moved to {folder / SET_ASIDE}. Nothing "
        "is lost: the next start continues"
    )
