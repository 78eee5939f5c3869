"""A run that is killed, stopped or damaged at any moment and then resumed equals a run that was never disturbed.

REG_KILLS=30 runs the long form of the first test.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from models.checkpoint import checksum_path, load_checkpoint, verify_checkpoint
from tests.conftest import read_rows, run_training
from tests.option_matrix import NETWORK, TIMES, has_muon
from tests.processes import SECONDS, Training
from tests.test_checkpoint import Malicious
from training.preemption import EXIT_RESUMABLE

pytestmark = pytest.mark.cpu  # several processes, which are forked
KILLS = int(os.environ.get("REG_KILLS", "4"))
STEPS = 12
STEP_SECONDS = 0.1  # no less than one takes, with its checkpoint, on a quiet machine
LAST = f"{STEPS:07d}.pt"


def slow_to_write() -> None:
    """Make this training process take long to write each checkpoint."""
    import training.checkpoint_writer as module

    save = module.save_checkpoint

    def save_slowly(*args: object, **kwargs: object) -> None:
        time.sleep(1.5)
        save(*args, **kwargs)

    module.save_checkpoint = save_slowly


def flags_of(train_flags: list[str], name: str, *more: str) -> list[str]:
    """Flags of a run that spends most of its time writing checkpoints."""
    frequent = ["--checkpointing-steps", "1", "--keep-last", "3", "--log-steps", "3", "--resume", "latest"]
    frequent += ["--projector-dim", "768"]  # a file of 11 MB
    return [*train_flags, *frequent, "--max-train-steps", str(STEPS), "--exp-name", name, *more]


def run_folder(flags: list[str]) -> Path:
    given = dict(itertools.pairwise(flags))  # the last of several counts
    return Path(given["--output-dir"]) / given["--exp-name"]


def finish(flags: list[str], tmp_path: Path, processes: int = 1) -> Path:
    training = Training(flags, tmp_path / "output.txt", processes)
    assert training.wait() == 0, training.text()
    return run_folder(flags)


def assert_same_run(undisturbed: Path, resumed: Path) -> None:
    """Assert that weights, averages, the state of each optimizer and every logged loss are equal, bit for bit."""
    a, b = (load_checkpoint(run / "checkpoints" / LAST) for run in (undisturbed, resumed))
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for index, state in a["opt"]["state"].items():
        assert all(torch.equal(value, b["opt"]["state"][index][name]) for name, value in state.items())
    logged = ("step", "loss", "denoise", "proj", "cls", "cfm", "lr", "grad_norm", "epoch")
    ours, theirs = ([[row.get(name) for name in logged] for row in read_rows(run)] for run in (undisturbed, resumed))
    assert ours == theirs


def newest_step(folder: Path) -> int:
    return max((int(path.stem) for path in (folder / "checkpoints").glob("*.pt")), default=0)


def kill_after(flags: list[str], steps: float, output: Path) -> tuple[bool, bool]:
    """Start a run and kill it after `steps` steps; return whether it still ran, and whether it was writing a file.

    Complete steps are waited for, fractions are slept, so that the moment is the same on a busy machine.
    """
    folder = run_folder(flags)
    training = Training(flags, output)
    training.wait_for_lines(folder / "starts.jsonl")
    training.wait_until(lambda: newest_step(folder) >= int(steps))
    time.sleep(steps % 1 * STEP_SECONDS)
    return training.kill(), any((folder / "checkpoints").glob(".*.tmp"))


def test_killed_at_any_moment(train_flags, tmp_path):
    undisturbed = finish(flags_of(train_flags, "undisturbed"), tmp_path)
    chance, killed = random.Random(0), []
    for number in range(KILLS):
        flags = flags_of(train_flags, f"killed-{number}")
        folder = run_folder(flags)
        killed.append(kill_after(flags, (number + chance.random()) * STEPS / KILLS, tmp_path / "output.txt"))
        for path in (folder / "checkpoints").glob("*.pt"):
            verify_checkpoint(path)
        finish(flags, tmp_path)
        assert not list((folder / "checkpoints").glob(".*.tmp"))
        assert_same_run(undisturbed, folder)
    inside_training, inside_writing = (sum(each) for each in zip(*killed, strict=True))
    print(f"{KILLS} of {KILLS}: {inside_training} killed before their end, {inside_writing} while writing a file")
    assert inside_training >= KILLS / 2


# All options of REG's successors. The alignment stops after the signal, and the warm-up may end before or after it.
SUCCESSORS = f"""{NETWORK} {TIMES} --cfm-coeff 0.05 --projector conv --spatial-norm 0.6 --align-stop-steps 9
    --optimizer muon --warmup-steps 6 --lr-schedule cosine"""
VARIANTS = {
    "sigterm": (signal.SIGTERM, 1, ()),
    "sigusr1": (signal.SIGUSR1, 1, ()),
    "ctrl-c": (signal.SIGINT, 1, ()),
    "accumulation": (signal.SIGTERM, 1, ("--gradient-accumulation-steps", "2")),
    "bf16": (signal.SIGTERM, 1, ("--mixed-precision", "bf16")),
    "two processes": (signal.SIGTERM, 2, ()),
    "killed, two processes": (signal.SIGKILL, 2, ("--gradient-accumulation-steps", "2", "--mixed-precision", "bf16")),
    "killed, options of the successors": (signal.SIGKILL, 1, tuple(SUCCESSORS.split())),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=has_muon if "muon" in VARIANTS[name][2] else ()) for name in VARIANTS]
)
def test_stopped_by_a_signal_and_resumed(train_flags, tmp_path, variant):
    number, processes, more = VARIANTS[variant]
    rare = ("--checkpointing-steps", "100") if number != signal.SIGKILL else ()
    more = (*more, "--log-steps", "1")
    undisturbed = finish(flags_of(train_flags, "undisturbed", *more), tmp_path, processes)
    flags = flags_of(train_flags, "stopped", *more)
    training = Training([*flags, *rare], tmp_path / "output.txt", processes)
    training.wait_for_lines(run_folder(flags) / "metrics.jsonl", lines=4)
    training.signal(number)
    status = training.wait()
    if number != signal.SIGKILL:
        assert status == EXIT_RESUMABLE, training.text()
        steps = [int(path.stem) for path in (run_folder(flags) / "checkpoints").glob("*.pt")]
        assert len(steps) == 1 and steps[0] < STEPS
    finish(flags, tmp_path, processes)
    assert [row["step"] for row in read_rows(run_folder(flags))] == list(range(1, STEPS + 1))
    assert_same_run(undisturbed, run_folder(flags))


def test_nobody_leaves_before_the_last_checkpoint_is_written(train_flags, tmp_path):
    """A launcher may end the other processes when the first one has ended."""
    flags = [*flags_of(train_flags, "slow", "--log-steps", "1"), "--checkpointing-steps", "100000"]
    flags += ["--max-train-steps", "100000"]
    training = Training(flags, tmp_path / "output.txt", processes=2, prepare=slow_to_write)
    training.wait_for_lines(run_folder(flags) / "metrics.jsonl", lines=2)
    training.signal(signal.SIGTERM)
    training.processes[1].join(SECONDS)
    written = list((run_folder(flags) / "checkpoints").glob("*.pt"))
    assert training.wait() == EXIT_RESUMABLE, training.text()
    assert len(written) == 1
    verify_checkpoint(written[0])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_processes(train_flags, tmp_path, before, after):
    undisturbed = finish(flags_of(train_flags, "undisturbed", "--log-steps", "1"), tmp_path)
    flags = flags_of(train_flags, "changed", "--log-steps", "1")
    finish([*flags, "--max-train-steps", "5"], tmp_path, before)
    finish(flags, tmp_path, after)
    runs = (undisturbed, run_folder(flags))
    ours, theirs = ([[row[name] for name in ("step", "loss", "grad_norm")] for row in read_rows(run)] for run in runs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    a, b = (load_checkpoint(run / "checkpoints" / LAST)["ema"] for run in runs)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no weights", "malicious"])
def test_a_broken_newest_checkpoint_is_skipped(train_flags, tmp_path, damage, capsys):
    undisturbed = run_training(flags_of(train_flags, "undisturbed", "--keep-last", "2"))
    flags = flags_of(train_flags, "damaged")
    folder = run_training([*flags, "--max-train-steps", "8"])
    path = folder / "checkpoints" / "0000008.pt"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    else:
        torch.save(
            {"ema": {}} if damage == "no weights" else {"args": Malicious(os.system, f"touch {tmp_path}/ran")}, path
        )
        checksum_path(path).unlink()
    assert_same_run(undisturbed, run_training(flags))
    assert "warning: 0000008.pt is skipped, the previous checkpoint is tried" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_without_a_complete_checkpoint_no_new_run_is_started(train_flags):
    flags = flags_of(train_flags, "damaged", "--keep-last", "2")
    folder = run_training(flags)
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="each checkpoint in this folder is damaged"):
        run_training(flags)
    with pytest.raises(InputError, match=r"0000012\.pt: damaged; its SHA-256 is"):
        run_training([*flags[: flags.index("--resume")], *flags[flags.index("--resume") + 2 :], "--resume-step", "12"])
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_past_its_last_step_has_nothing_to_do(train_flags, tmp_path):
    flags = flags_of(train_flags, "ended")
    folder = finish(flags, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".pt", ".jsonl")}
    training = Training([*flags, "--max-train-steps", "5"], tmp_path / "again.txt")
    assert training.wait() == 0, training.text()
    assert f"nothing to do: the run is at step {STEPS}, and --max-train-steps ends it at step 5" in training.text()
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "starts.jsonl")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room_is_made", [True, False])
def test_a_full_disk(train_flags, tmp_path, small_disk, room_is_made):
    """The disk has room for two checkpoints of 7 MB, until a ballast leaves less than one."""
    undisturbed = finish(flags_of(train_flags, "undisturbed"), tmp_path)
    flags = flags_of(train_flags, "full", "--output-dir", str(small_disk), "--keep-last", "1", "--retry-steps", "1")
    folder = finish([*flags, "--max-train-steps", "3"], tmp_path)
    output = tmp_path / "second.txt"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    training = Training([*flags, "--max-train-steps", "100000" if room_is_made else str(STEPS)], output)
    if room_is_made:
        training.wait_until(lambda: "0000005.pt cannot be written" in training.text())
        assert "[Errno 28] No space left on device; earlier checkpoints are untouched" in training.text()
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0000003.pt", "0000003.pt.sha256"]
        ballast.unlink()
        training.wait_until(lambda: not (folder / "checkpoints" / "0000003.pt").exists())
        training.signal(signal.SIGTERM)
        assert training.wait() == EXIT_RESUMABLE
        rows = [row["step"] for row in read_rows(folder)]
        assert rows == list(range(3, rows[-1] + 1, 3))
    else:
        assert training.wait() == 2, training.text()
        assert "train.py: error:" in training.text() and "free some space" in training.text()
        ballast.unlink()
        assert_same_run(undisturbed, finish(flags, tmp_path))


def poison(data: Path, index: int, value: float) -> str:
    path = data / "vae-sd" / "00000" / f"img-mean-std-{index:08d}.npy"
    np.save(path, np.full_like(np.load(path), value))
    return str(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_poisoned_sample_is_skipped_and_named(train_flags, data, value, precision):
    """24 samples in batches of 8: in each epoch one step of three contains it."""
    name = poison(data, 7, value)
    flags = flags_of(train_flags, "poisoned", "--data-dir", str(data), "--mixed-precision", precision)
    folder = run_training(flags)
    checkpoint = load_checkpoint(folder / "checkpoints" / LAST)
    for part in ("model", "ema"):
        assert all(tensor.isfinite().all() for tensor in checkpoint[part].values())
    rows = read_rows(folder)
    assert [row["bad_steps"] for row in rows] == [1, 1, 1, 1] and all(np.isfinite(row["loss"]) for row in rows)
    bad = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in bad] == ["samples"] * 4
    for row in bad:
        (sample,) = row["samples"]
        assert sample["file"] == name and sample["label"] == 7 % 3 and 0 <= sample["t"] <= 1
        assert sample["loss"] is None and sample["denoise"] is None
    steps = {state["step"].item() for state in checkpoint["opt"]["state"].values()}
    assert steps == {STEPS - 4}  # AdamW's own count skips them as well


def test_too_many_bad_steps_in_a_row_end_the_run(train_flags, data, tmp_path):
    flags = flags_of(train_flags, "poisoned", "--data-dir", str(data), "--max-bad-steps", "3")
    folder = run_training([*flags, "--max-train-steps", "3"])
    for index in range(24):
        poison(data, index, float("nan"))
    training = Training([*flags, "--allow-changed-data"], tmp_path / "output.txt", processes=2)
    assert training.wait() == 2
    assert "error: the last 3 steps, up to step 5, had no finite gradient: the run stops" in training.text()
    assert "resume from an earlier checkpoint" in training.text().lower()
    bad = [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["kind"], len(row["samples"])) for row in bad] == [(s, "weights", 8) for s in (3, 4, 5)]
    verify_checkpoint(folder / "checkpoints" / "0000003.pt")


@pytest.mark.parametrize(("number", "timeouts"), [(signal.SIGSTOP, (0.05, 0.5)), (signal.SIGKILL, (10,))])
def test_who_loses_a_process_ends(train_flags, tmp_path, number, timeouts):
    """A process that hangs is waited for until the timeout, one that died is not waited for."""
    for minutes in timeouts:  # on a busy machine, processes that do not hang may exceed the short timeout
        flags = flags_of(train_flags, f"lost-{minutes}", "--max-train-steps", "100000")
        training = Training([*flags, "--timeout-minutes", str(minutes)], tmp_path / f"{minutes}.txt", processes=2)
        training.wait_for_lines(run_folder(flags) / "metrics.jsonl", lines=2)
        if all(process.is_alive() for process in training.processes):
            break
        training.kill()
    else:
        pytest.fail(training.text())
    os.kill(training.processes[1].pid, number)
    training.processes[0].join(SECONDS)
    status = training.processes[0].exitcode
    training.kill()
    lost = "train.py: error: another process of this run has ended or does not answer"
    assert status == 1 and lost in training.text() and "Traceback" not in training.text(), training.text()
