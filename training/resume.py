"""Which checkpoint a start of train.py resumes from, and what this does to the folder of the run.

A run's folder holds one run. A checkpoint of another run is resumed in a new folder only. An earlier checkpoint of the
same run is gone back to: what is later is set aside (training/rewind.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.io import read_json, real_path
from dataset import IMAGE_FOLDERS, LATENT_FOLDERS
from models.checkpoint import CHECKPOINT_NAME, is_legacy, list_checkpoints, resolve_checkpoint
from models.hub import local_or_hub
from training.config import TrainConfig
from training.messages import logger
from training.record import check_same_run
from training.rewind import pending_order
from training.rows import last_row
from training.state import load_resumable

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")  # numbers of restarts, by torchrun and by SLURM
PLACES = "latest, or a checkpoint, local or on the hub (owner/name/file.pt)"


@dataclass(frozen=True)
class ResumePoint:
    """From where a run starts.

    `asked`: the flag of the command line that names a checkpoint, for starts.jsonl. `goes_back`: whether what the run
    has after this checkpoint is set aside. `seen`: what the folder held when this was decided.
    """

    path: Path | None = None  # None: a new run
    asked: str | None = None
    goes_back: bool = False
    seen: tuple = ()


def find_resume_point(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> ResumePoint:
    """Return where a run starts; only the main process decides this. The checkpoint is verified.

    Raises InputError if there is no such checkpoint, or if a run in the folder would be overwritten.
    """
    folder, asked = config.folder, asked_for(config)
    check_own_checkpoints(folder)
    seen, found = contents(folder), own_checkpoints(folder)
    if asked and found and is_restart(environment) and last_start(folder).get("asked") == asked:
        logger.info("note: this is a restart after %s, so the run continues from its newest checkpoint", asked)
        path, skipped = newest_complete(found)
        return ResumePoint(path, asked, skipped, seen)
    if config.resume_step:
        return ResumePoint(checkpoint_of_step(folder, config.resume_step), asked, True, seen)
    if asked:
        path, is_own = named_checkpoint(config, found)
        load_own(path) if is_own else load_resumable(path)
        return ResumePoint(path, asked, is_own, seen)
    if config.resume == "latest" and found:
        path, skipped = newest_complete(found)
        return ResumePoint(path, None, skipped, seen)
    return ResumePoint(None, None, check_new_run(config), seen)


def asked_for(config: TrainConfig) -> str | None:
    """Return the flag that names a checkpoint, None for a new run and for the newest checkpoint."""
    if config.resume_step:
        return f"--resume-step {config.resume_step}"
    return f"--resume {config.resume}" if config.resume not in (None, "latest") else None


def last_start(folder: Path) -> dict[str, Any]:
    """Return the last row of starts.jsonl, {} if there is none."""
    return last_row(folder / "starts.jsonl") or {}


def is_restart(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun or SLURM has started the same command before."""
    return any(environment.get(name, "0").strip() not in ("", "0") for name in RESTARTS)


def contents(folder: Path) -> tuple:
    """Return the names of a run's checkpoints and the size of its metrics, to notice that another process wrote."""
    metrics = folder / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    return (*(path.name for path in list_checkpoints(folder / "checkpoints")), size, pending_order(folder))


def check_unchanged(folder: Path, seen: tuple) -> None:
    """Raise InputError if a run is not as it was when the checkpoint was chosen. The folder must be locked."""
    if contents(folder) != seen:
        raise InputError(f"{folder}: another process trained this run while this start was checked; start again")


def check_own_checkpoints(folder: Path) -> None:
    """Raise InputError if `checkpoints` in the folder is no folder, or a link to the checkpoints of another run."""
    checkpoints = folder / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise InputError(f"{checkpoints}: is not a folder; remove it, or choose another --exp-name")
    owner = real_path(checkpoints).parent
    if (owner / "args.json").exists() and not same_file(owner, folder):
        raise InputError(f"{checkpoints}: is a link to the checkpoints of the run {owner}; use that run")


def own_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, without those that a start that was killed would have set aside."""
    found, order = list_checkpoints(folder / "checkpoints"), pending_order(folder)
    return [path for path in found if order is None or int(path.stem) <= order.step]


def newest_complete(found: list[Path]) -> tuple[Path, bool]:
    """Return the newest undamaged one of some checkpoints, and whether damaged ones were skipped, with a warning.

    Raises InputError if each of them is damaged.
    """
    for path in reversed(found):
        try:
            load_own(path)
            return path, path != found[-1]
        except InputError as error:
            logger.warning("%s is skipped, the previous checkpoint is tried: %s", path.name, error)
    folder = found[0].parent
    raise InputError(f"{folder}: each checkpoint in this folder is damaged; remove them to start a new run")


def load_own(path: Path) -> None:
    """Verify a checkpoint of the run's own folder. Raises InputError if it is damaged or has another step's name."""
    steps = load_resumable(path)["steps"]
    if CHECKPOINT_NAME.fullmatch(path.name) and int(path.stem) != steps:
        raise InputError(f"{path}: its name says step {int(path.stem)}, its content step {steps}")


def checkpoint_of_step(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step of the run, verified."""
    found = own_checkpoints(folder)
    path = folder / "checkpoints" / f"{step:07d}.pt"
    if path not in found:
        steps = ", ".join(str(int(one.stem)) for one in found) or "none"
        raise InputError(f"--resume-step {step}: {path} does not exist; existing steps: {steps}")
    load_own(path)
    return path


def named_checkpoint(config: TrainConfig, found: list[Path]) -> tuple[Path, bool]:
    """Return the checkpoint that --resume names, and whether it belongs to the run in the folder.

    Raises InputError if the folder holds a run to which it does not belong.
    """
    folder, place = config.folder, local_or_hub(config.resume, PLACES, "--resume")
    if isinstance(place, Path):
        if any(same_file(place, own) for own in (folder, folder / "checkpoints")):
            if not found:
                raise InputError(f"--resume {config.resume}: this run has no checkpoint")
            return found[-1], True
        path = resolve_checkpoint(place)
        if own := own_name(path, folder):
            if own.is_file() and CHECKPOINT_NAME.fullmatch(own.name) and own not in found:
                raise InputError(f"--resume {config.resume}: an unfinished --resume-step sets this checkpoint aside")
            return own, True
    same_start = not found and last_start(folder).get("asked") == asked_for(config)
    if holds_run(folder) and not same_start:
        raise InputError(
            f"--resume {config.resume}: is not a checkpoint of the run in {folder}, which would be overwritten; resume "
            "that run by --resume latest, or choose another --exp-name for a run from this checkpoint"
        )
    return resolve_checkpoint(config.resume), False


def own_name(path: Path, folder: Path) -> Path | None:
    """Return a checkpoint's path in the folder of the run, None if it is not there. Links are followed."""
    checkpoints = folder / "checkpoints"
    for one in (path, real_path(path)):
        if same_file(one.parent, checkpoints):
            return checkpoints / one.name
    return next((own for own in sorted(checkpoints.glob("*.pt")) if same_file(own, path)), None)


def same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same existing file or folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def holds_run(folder: Path) -> bool:
    """Return whether a folder has checkpoints or rows of a run."""
    return any((folder / "checkpoints").glob("*.pt")) or last_row(folder / "metrics.jsonl") is not None


def check_new_run(config: TrainConfig) -> bool:
    """Check that a run can start at step 0; return whether what the folder has of a run is set aside.

    What a start left that ended before its first row, args.json, is replaced, so that the start can be repeated with
    other settings. With --resume latest, a run that was killed before its first checkpoint repeats its rows.
    Raises InputError if the folder holds a run that must not be replaced.
    """
    folder, args = config.folder, config.folder / "args.json"
    if any((folder / name).exists() for name in (*IMAGE_FOLDERS, *LATENT_FOLDERS)):
        raise InputError(f"--exp-name {config.exp_name}: {folder} is a folder of training data; choose another name")
    if config.resume != "latest" and holds_run(folder):
        raise InputError(f"{folder} already holds a run; resume it with --resume latest, or choose another --exp-name")
    started = {"step": 0, **last_start(folder)}
    if str(started.get("asked") or "").startswith("--resume "):
        raise InputError(
            f"{folder}: its run was started with {started['asked']} and has no checkpoint yet, so --resume latest has "
            "nothing to resume; start it again with the same flag, or choose another --exp-name"
        )
    has_rows = last_row(folder / "metrics.jsonl") is not None
    if has_rows and args.exists():
        check_same_run(asdict(config), read_record(args), args)
    elif args.exists():
        logger.info(f"note: an earlier start in {folder} ended before its first row; its args.json is replaced")
    if config.legacy:
        raise InputError(
            "--legacy: the published switch, which drops labels twice in a new run (probability 0.19), does not exist "
            "here; the same distribution: --cfg-prob 0.19. Here the flag says which layout a checkpoint to resume has"
        )
    return started["step"] > 0


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of args.json. Raises InputError if it is not a JSON object."""
    if not isinstance(content := read_json(path), dict):
        raise InputError(f"{path}: expected a JSON object with the settings of the run")
    return content


def load_chosen(config: TrainConfig, point: ResumePoint) -> dict[str, Any] | None:
    """Return the checkpoint of a resume point, which the main process has verified; None for a new run."""
    if point.path is None:
        return None
    path = point.path if point.path.exists() else resolve_checkpoint(config.resume)  # the hub's cache of this machine
    checkpoint = load_resumable(path, verify=False)
    if config.legacy is not None and config.legacy != is_legacy(checkpoint):
        raise InputError(f"--legacy {config.legacy}, but {path} has legacy layout {is_legacy(checkpoint)}")
    if config.init_from:
        logger.info("note: --init-from is not used, because the run resumes from %s", path)
    return checkpoint
