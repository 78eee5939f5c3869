"""Going back to an earlier step: everything later is set aside, at whatever moment the process is killed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from models.checkpoint import checksum_path, save_checkpoint
from training import rewind
from training.rewind import Order, go_back, later_files, pending_order
from training.rows import last_row


class Killed(BaseException):
    """Stands for kill -9."""


def write_rows(path: Path, steps) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 6 steps with a checkpoint and a grid for each; best.pt of step 5, temporary checkpoints 4 and 6."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # faster
    folder = tmp_path / "exps" / "run"
    for step in range(1, 7):
        save_checkpoint(folder / "checkpoints" / f"{step:07d}.pt", {"steps": step, "ema": {}, "noise": torch.rand(3)})
    save_checkpoint(folder / "checkpoints" / "best.pt", {"steps": 5, "ema": {}})
    (folder / "checkpoints" / "best.json").write_text('{"step": 5, "fid": 3.5}')
    (folder / "checkpoints" / "temporary.json").write_text('["0000001.pt", "0000004.pt", "0000006.pt"]')
    (folder / "samples").mkdir()
    for name in ("0000002", "0000004", "0000006", "reconstructions"):
        (folder / "samples" / f"{name}.png").write_text(name)
    write_rows(folder / "metrics.jsonl", range(1, 7))
    write_rows(folder / "bad_steps.jsonl", [3, 5])
    for name in ("args.json", "starts.jsonl", "log.txt", "loss.png"):
        (folder / name).write_text(name)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_later_is_set_aside_and_nothing_is_lost(run):
    before = files(run)
    assert go_back(run, 3) == Order(3, 1)
    after = files(run)
    aside = {name.removeprefix("set-aside/1/"): after[name] for name in after if name.startswith("set-aside/1/")}
    moved = {f"checkpoints/{step:07d}.pt{end}" for step in (4, 5, 6) for end in ("", ".sha256")}
    moved |= {"checkpoints/best.pt", "checkpoints/best.pt.sha256", "checkpoints/best.json"}
    moved |= {"samples/0000004.png", "samples/0000006.png"}
    copied = {"metrics.jsonl", "bad_steps.jsonl", "args.json"}
    copied |= {"checkpoints/temporary.json"}
    assert set(aside) == moved | copied | {"rewind.json"}
    assert all(aside[name] == before[name] for name in moved | copied)
    assert json.loads(after["checkpoints/temporary.json"]) == ["0000001.pt"]
    assert {name for name in after if not name.startswith("set-aside/")} == set(before) - moved
    assert all(after[name] == before[name] for name in set(before) - moved - {"checkpoints/temporary.json"})


def test_a_best_checkpoint_that_is_not_later_stays_and_the_folders_count_up(run):
    assert go_back(run, 5) == Order(5, 1)
    assert (run / "checkpoints" / "best.pt").exists() and not (run / "set-aside/1/checkpoints/best.pt").exists()
    write_rows(run / "metrics.jsonl", range(1, 6))
    assert go_back(run, 5) is None
    assert go_back(run, 2) == Order(2, 2)
    assert (run / "set-aside/2/checkpoints/best.pt").exists()


def test_rows_alone_are_set_aside(run):
    for path in list(later_files(run, 4)):
        path.unlink()
    assert go_back(run, 4) == Order(4, 1)
    assert last_row(run / "set-aside/1/metrics.jsonl")["step"] == 6


@pytest.mark.parametrize(
    ("scores", "step"), [('{"step": 2}', 5), ('{"step": 6}', 6), ("{}", float("inf")), ("{", float("inf"))]
)
def test_the_step_of_the_best_checkpoint_is_the_later_one_of_file_and_scores(run, scores, step):
    """A process may have been killed between the two files."""
    (run / "checkpoints" / "best.json").write_text(scores)
    assert rewind.best_step(run / "checkpoints") == step
    (run / "checkpoints" / "best.pt").write_bytes(b"damaged")
    assert rewind.best_step(run / "checkpoints") == float("inf")


def kill_at(monkeypatch, number: int) -> None:
    """Kill the process before its call number `number` of those that change files."""
    calls = iter(range(10_000))

    def killing(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "rename"), (os, "replace"), (Path, "mkdir"), (shutil, "copyfileobj")):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))


def test_killed_at_any_moment_the_next_start_completes_it(run, tmp_path, monkeypatch):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    go_back(undisturbed, 4)
    number, killed = 0, True
    while killed:
        folder = tmp_path / f"killed-{number}"
        shutil.copytree(run, folder)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                go_back(folder, 4)
                killed = False
            except Killed:
                pass
        go_back(folder, 4)
        found = {name: data for name, data in files(folder).items() if not name.endswith(".tmp")}
        if "set-aside/2/rewind.json" in found:  # killed after the end: rows are cut by the start itself
            assert not any(name.endswith(".pt") for name in found if name.startswith("set-aside/2/"))
            found = {name: data for name, data in found.items() if not name.startswith("set-aside/2/")}
        assert found == files(undisturbed), number
        number += 1
    assert number > 20


def test_checkpoints_on_another_file_system_are_copied(run, monkeypatch):
    def rename(source, target):
        raise OSError(18, "Invalid cross-device link")

    before = files(run)
    monkeypatch.setattr(os, "rename", rename)
    go_back(run, 3)
    after = files(run)
    assert after["set-aside/1/checkpoints/0000006.pt"] == before["checkpoints/0000006.pt"]
    assert "checkpoints/0000006.pt" not in after


def test_a_folder_that_cannot_be_written_is_an_error_that_loses_nothing(run, monkeypatch):
    def move(source, target):
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", move)
        with pytest.raises(InputError, match=r"No space left on device; what is later .*the next start continues"):
            go_back(run, 3)
    assert pending_order(run) == Order(3, 1)
    go_back(run, 3)
    assert pending_order(run) is None and not checksum_path(run / "checkpoints" / "0000006.pt").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 2, "number": "../../x"}'])
def test_a_damaged_order_is_named(run, text):
    (run / "rewind.json").write_text(text)
    with pytest.raises(InputError, match=r"rewind\.json: (expected step and number|not valid JSON)"):
        pending_order(run)
