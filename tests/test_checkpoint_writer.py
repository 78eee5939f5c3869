import errno
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from common import temporary as files
from common.errors import InputError
from models.checkpoint import checksum_path, load_checkpoint, verify_checkpoint
from training import checkpoint_writer
from training.checkpoint_writer import CheckpointWriter, TensorCopies

CONTENT = {"ema": {"weight": torch.arange(1000.0)}, "steps": 7}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.pt"))


def write(writer: CheckpointWriter, *steps: int) -> None:
    for step in steps:
        writer.save(step, CONTENT)
    writer.finish()


@pytest.mark.parametrize(
    ("keep", "left"),
    [((0, 0), [10, 20, 30, 40, 50]), ((2, 0), [40, 50]), ((1, 20), [20, 40, 50]), ((9, 0), [10, 20, 30, 40, 50])],
)
def test_old_checkpoints_are_cleared_away(tmp_path, keep, left):
    write(CheckpointWriter(tmp_path, *keep), 10, 20, 30, 40, 50)
    assert steps_in(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == 2 * len(left)  # their checksums, and no others


def test_going_back_does_not_clear_away_what_is_written_now(tmp_path):
    write(CheckpointWriter(tmp_path), 100, 200, 300)
    write(CheckpointWriter(tmp_path, keep_last=1), 150)
    assert steps_in(tmp_path) == [150, 200, 300]


def test_a_written_checkpoint_is_announced_with_its_size(tmp_path, said):
    write(CheckpointWriter(tmp_path), 10)
    size = (tmp_path / "0000010.pt").stat().st_size / 1e6
    (line,) = said
    assert line.startswith(f"info: checkpoint {tmp_path / '0000010.pt'}: {size:.4g} MB written in ")


def save_by_minutes(folder: Path, *steps: int, **more: int) -> None:
    """Write checkpoints in a new process's writer; those of steps that are no multiple of 100 are temporary."""
    writer = CheckpointWriter(folder, **more)
    for step in steps:
        writer.save(step, CONTENT, temporary=step % 100 != 0)
    writer.finish()


@pytest.mark.parametrize(
    ("starts", "left"),
    [
        ([(10, 20, 30)], [30]),
        ([(10, 100)], [100]),
        ([(100, 110, 120), (130,)], [100, 130]),  # the process that wrote 120 was killed
        ([(100, 110), (200, 210, 220, 300)], [100, 200, 300]),
    ],
)
def test_a_checkpoint_by_minutes_is_removed_when_the_next_one_is_complete(tmp_path, starts, left):
    for steps in starts:
        save_by_minutes(tmp_path, *steps)
    assert steps_in(tmp_path) == left
    assert (tmp_path / "temporary.json").exists() == bool(left[-1] % 100)
    assert len(list(tmp_path.glob("*.sha256"))) == len(left)


def test_checkpoints_by_minutes_do_not_count_for_keep_last(tmp_path):
    save_by_minutes(tmp_path, 100, 110, 200, 210, 220, keep_last=2)
    assert steps_in(tmp_path) == [100, 200, 220]


def test_a_checkpoint_is_kept_if_its_step_is_saved_again_to_be_kept(tmp_path):
    save_by_minutes(tmp_path, 110)
    writer = CheckpointWriter(tmp_path)
    writer.save(110, CONTENT)
    writer.finish()
    save_by_minutes(tmp_path, 120, 130)
    assert steps_in(tmp_path) == [110, 130]


def test_going_back_keeps_later_checkpoints_by_minutes(tmp_path):
    save_by_minutes(tmp_path, 100, 150)
    save_by_minutes(tmp_path, 120, 130)
    assert steps_in(tmp_path) == [100, 130, 150]


@pytest.mark.parametrize("content", ["{", "3", '["../other", 5, "0000100.pt"]'])
def test_a_damaged_list_of_checkpoints_by_minutes_stops_nothing(tmp_path, content):
    (tmp_path / "temporary.json").write_text(content)
    save_by_minutes(tmp_path, 10, 20)
    assert steps_in(tmp_path) == [20]


def test_a_failed_checkpoint_that_is_made_up_for_later_is_kept(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "save_checkpoint", lambda *a: 1 / 0)
        writer.save(100, CONTENT)
        writer.finish()
    for step in (110, 120, 130):
        writer.save(step, CONTENT, temporary=True)
    writer.finish()
    assert writer.failure is None and steps_in(tmp_path) == [110, 130]


def test_a_checkpoint_is_overdue_after_some_minutes(tmp_path):
    now = 0.0
    writer = CheckpointWriter(tmp_path, background=False, every_minutes=2, now=lambda: now)
    found = []
    for now in (0.0, 119.0, 120.0):  # noqa: B007 (the writer reads it)
        found.append(writer.overdue)
    writer.save(5, CONTENT)
    now = 150.0
    writer.save(6, CONTENT, "best")
    for now in (239.0, 240.0):  # noqa: B007
        found.append(writer.overdue)
    assert found == [False, False, True, False, True]
    assert not CheckpointWriter(tmp_path, now=iter([0.0, 1e9]).__next__).overdue  # by default there are none


def test_training_goes_on_while_a_file_is_written_from_a_copy(tmp_path, monkeypatch):
    go_on = threading.Event()
    save = checkpoint_writer.save_checkpoint
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda *a: (go_on.wait(10), save(*a)))
    weight = torch.zeros(5)
    writer = CheckpointWriter(tmp_path)
    start = time.monotonic()
    writer.save(1, {"ema": {"w": weight}, "list": [weight, 3], "none": None})
    assert time.monotonic() - start < 5 and writer.busy and steps_in(tmp_path) == []
    weight.fill_(9)  # the next step
    go_on.set()
    writer.finish()
    content = load_checkpoint(tmp_path / "0000001.pt")
    assert content["ema"]["w"].tolist() == [0] * 5 == content["list"][0].tolist() and content["list"][1] == 3


def test_copies_use_their_memory_again_and_follow_a_new_shape():
    copies = TensorCopies()
    first = copies.take({"a": torch.ones(3)})["a"]
    assert copies.take({"a": torch.zeros(3)})["a"] is first and first.tolist() == [0, 0, 0]
    assert copies.take({"a": torch.ones(4)})["a"].tolist() == [1, 1, 1, 1]


def test_without_memory_for_a_copy_the_file_is_written_at_once(tmp_path, monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    writer = CheckpointWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", no_memory)
        writer.save(1, CONTENT)
    assert not writer.busy and steps_in(tmp_path) == [1]


class FullDisk:
    """A file on a disk that has no room beyond some bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(memoryview(data).cast("B")) if not isinstance(data, str) else len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 3000])
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_reported_and_touches_nothing(tmp_path, monkeypatch, said, room, background):
    writer = CheckpointWriter(tmp_path, keep_last=1, background=background)
    write(writer, 10)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda *args, **more: FullDisk(open(*args, **more), room), raising=False)  # noqa: SIM115
        write(writer, 20)
    assert "0000020.pt cannot be written" in writer.failure and "No space left on device" in writer.failure
    assert said[1:] == [f"warning: {writer.failure}; earlier checkpoints are untouched"]
    assert steps_in(tmp_path) == [10] and not list(tmp_path.glob(".*"))
    verify_checkpoint(tmp_path / "0000010.pt")
    write(writer, 30)
    assert writer.failure is None and steps_in(tmp_path) == [30]


@pytest.mark.parametrize("background", [True, False])
def test_any_failure_of_a_write_is_known_to_the_run(tmp_path, said, background):
    writer = CheckpointWriter(tmp_path, background=background)
    writer.save(10, {"model": lambda: None})  # cannot be pickled
    writer.finish()
    assert "0000010.pt cannot be written" in writer.failure and len(said) == 1 and steps_in(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".0000020.pt.4711.tmp", ".0000020.pt.sha256.4711.tmp", "0000010.pt", "best.pt", ".hidden"):
        (tmp_path / name).touch()
    CheckpointWriter(tmp_path).clear_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "0000010.pt", "best.pt"]


def test_the_checksum_is_what_sha256sum_reads(tmp_path):
    import hashlib

    write(CheckpointWriter(tmp_path), 10)
    path = tmp_path / "0000010.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checksum_path(path).read_text() == f"{digest}  0000010.pt\n"


@pytest.mark.parametrize("with_checksum", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_at_50_places_is_found(tmp_path, damage, with_checksum):
    path = tmp_path / "0000010.pt"
    write(CheckpointWriter(tmp_path), 10)
    if not with_checksum:
        checksum_path(path).unlink()
    content, source = path.read_bytes(), random.Random(0)
    for _ in range(50):
        place = source.randrange(len(content))
        if damage == "flipped" and not with_checksum:  # what the zip itself protects: the values
            place = source.randrange(content.index(torch.arange(1000.0).numpy().tobytes()), len(content) // 2)
        data = content[:place]
        if damage == "flipped":
            data += bytes([content[place] ^ (1 << source.randrange(8))]) + content[place + 1 :]
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"0000010\.pt"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert torch.equal(load_checkpoint(path)["ema"]["weight"], CONTENT["ema"]["weight"])


def test_without_the_list_of_checkpoints_by_minutes_they_are_written(tmp_path, monkeypatch, said):
    """The list cannot be written, old files cannot be removed: warnings, and the checkpoint counts as written."""
    writer = CheckpointWriter(tmp_path, keep_last=1)

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_json", full)
    writer.save(5, CONTENT, temporary=True)
    writer.finish()
    monkeypatch.setattr(checkpoint_writer, "_remove", lambda path: full(path, None))
    write(writer, 6)
    assert steps_in(tmp_path) == [5, 6] and writer.failure is None
    assert any("temporary.json cannot be written" in line for line in said)
    assert any("old checkpoints cannot be removed" in line for line in said)


def test_without_a_thread_the_file_is_written_at_once(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    writer = CheckpointWriter(tmp_path)
    writer.save(5, CONTENT)
    assert steps_in(tmp_path) == [5] and writer.failure is None and not writer.busy
