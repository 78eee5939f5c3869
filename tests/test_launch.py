"""train.sh and launch/launch.sh in real processes: torchrun, signals, restarts, exit statuses and SLURM."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.checkpoint import verify_checkpoint
from tests.conftest import ROOT, read_rows
from tests.processes import SECONDS, Training
from tests.test_resume import STEPS, assert_same_run, flags_of
from training.preemption import EXIT_RESUMABLE

# A program without torch. It writes a line into the file of its rank, then does what its second argument says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from common.errors import InputError, run_cli
from training.preemption import StopSignal, exit_status

def main():
    listener = StopSignal()
    listener.listen()
    names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    with open(Path(sys.argv[1], os.environ["RANK"]), "a") as file:
        print(os.getpid(), *(os.environ.get(name) for name in names), file=file)
    if sys.argv[2] == "bad input":
        raise InputError("--seed -1: must be at least 0")
    if sys.argv[2] == "crash":
        sys.exit(7)
    if sys.argv[2] == "crash once" and len(Path(sys.argv[1], os.environ["RANK"]).read_text().splitlines()) == 1:
        if os.environ["RANK"] == "0":
            sys.exit(7)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    if sys.argv[2] == "wait":
        while not listener.received:
            time.sleep(0.01)
    sys.exit(exit_status(finished=not listener.received))

run_cli(main)
"""

# Makes each checkpoint take long to write, and tells when that begins. Python runs it at its start.
SLOW_CHECKPOINTS = """
import os, time
rename = os.replace

def rename_later(source, target, **kwargs):
    if str(target).endswith(".pt"):
        open(os.environ["SAVING"], "w").close()
        time.sleep(0.7)
    rename(source, target, **kwargs)

os.replace = rename_later
"""


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a script: the interpreter of these tests, and one process on the CPU."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_GPUS": "0", **settings}


def start(*command: str, **settings: str) -> subprocess.Popen:
    """Start a command in a session of its own. `text_of` reads its output after its end."""
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )  # fmt: skip


def launch(tmp_path: Path, action: str, **settings: str) -> subprocess.Popen:
    """Start PROGRAM as train.sh starts train.py; print its exit status and whether Ctrl-C was pressed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = 'source launch/launch.sh; status=0; launch "$@" || status=$?; echo "status $status $INTERRUPTED"'
    program = (str(tmp_path / "program.py"), str(tmp_path), action)
    return start("bash", "-euo", "pipefail", "-c", script, "launch", *program, **settings)


def text_of(process: subprocess.Popen) -> str:
    return process.communicate(timeout=SECONDS)[0]


def wait_for(path: Path, process: subprocess.Popen, lines: int = 1) -> None:
    """Wait until a file has `lines` lines; fail if the process has ended before."""
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines, process)


def wait_until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, text_of(process)
        assert time.monotonic() < end
        time.sleep(0.01)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_two_machines_restart_together(tmp_path):
    settings = {"NUM_MACHINES": "2", "HEAD_ADDRESS": "127.0.0.1", "HEAD_PORT": free_port(), "NUM_PROCESSES": "2"}
    machines = [launch(tmp_path, "crash once", **settings, MACHINE_RANK=rank) for rank in ("0", "1")]
    assert all(text_of(machine).endswith("status 0 0\n") for machine in machines)
    starts = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(4)]
    for attempt in zip(*starts, strict=True):
        ((world_size, _, _, threads),) = {tuple(line.split()[1:]) for line in attempt}  # all meet at the same address
        assert (world_size, threads) == ("4", "1")
    assert len(starts[0]) == 2 and not (tmp_path / "4").exists()


def test_a_program_that_fails_is_restarted(tmp_path):
    process = launch(tmp_path, "crash", NUM_PROCESSES="2", MAX_RESTARTS="1")
    assert text_of(process).endswith("status 1 0\n")
    assert len({line.split()[0] for line in (tmp_path / "0").read_text().splitlines()}) == 2


def test_bad_input_is_not_restarted(tmp_path):
    text = text_of(launch(tmp_path, "bad input", NUM_PROCESSES="2"))
    assert text.endswith("status 2 0\n")
    assert "program.py: error: --seed -1: must be at least 0\n" in text and "Traceback" not in text
    assert all((tmp_path / rank).read_text().count("\n") == 1 for rank in "01" if (tmp_path / rank).exists())


def test_a_used_port_is_refused_and_a_free_one_is_chosen(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        process = launch(tmp_path, "end", NUM_PROCESSES="2", HEAD_PORT=taken)
        text = text_of(process)
    assert text.endswith("status 1 0\n") and "EADDRINUSE" in text and taken in text
    assert not (tmp_path / "0").exists()
    both = [launch(tmp_path, "end", NUM_PROCESSES="2") for _ in range(2)]
    assert [text_of(process) for process in both] == ["status 0 0\n"] * 2
    assert len({line.split()[3] for line in (tmp_path / "0").read_text().splitlines()}) == 2


def test_a_signal_reaches_all_processes(tmp_path):
    """bash sends SIGHUP and Ctrl-C to its group, as a terminal does."""
    for number, interrupted in ((signal.SIGHUP, 0), (signal.SIGINT, 1)):
        folder = tmp_path / number.name
        folder.mkdir()
        process = launch(folder, "wait", NUM_PROCESSES="2")
        wait_for(folder / "0", process)
        wait_for(folder / "1", process)
        os.killpg(process.pid, number)
        assert text_of(process) == f"status {EXIT_RESUMABLE} {interrupted}\n"


def test_a_signal_before_the_program_starts(tmp_path):
    process = launch(tmp_path, "end")
    wait_until(lambda: any("torch.distributed.run" in command_of(child) for child in children(process.pid)), process)
    process.send_signal(signal.SIGTERM)
    assert text_of(process) == f"status {EXIT_RESUMABLE} 0\n"
    assert not (tmp_path / "0").exists()


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, "--ntasks-per-node 1"),
        ({"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, "--ntasks-per-node 1"),
        (
            {"NUM_MACHINES": "2", "MACHINE_RANK": "2", "HEAD_ADDRESS": "head"},
            "MACHINE_RANK 2 with NUM_MACHINES 2: allowed are 0 to 1",
        ),
        ({"NUM_MACHINES": "2"}, "NUM_MACHINES 2: HEAD_ADDRESS is required"),
        ({"NUM_PROCESSES": "two"}, "NUM_PROCESSES two: must be a whole number"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS -1: must be a whole number"),
        ({"NUM_PROCESSES": "0"}, "must be 1 or greater"),
    ],
)
def test_settings_that_are_refused(settings, message):
    process = start("bash", "train.sh", **settings)
    assert message in text_of(process) and process.returncode == 2


@pytest.mark.cpu
def test_a_run_that_is_stopped_while_saving_and_loses_a_process(train_flags, tmp_path):
    """train.sh with two processes on the CPU, under a fake SLURM: the result is that of a run without interruptions."""
    flags = flags_of(train_flags, "quiet", "--log-steps", "1")
    quiet = Training(flags, tmp_path / "quiet.txt", processes=2)
    assert quiet.wait() == 0, quiet.text()
    flags[flags.index("quiet")] = "run"
    folder, saving = tmp_path / "exps" / "run", tmp_path / "saving"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sitecustomize.py").write_text(SLOW_CHECKPOINTS)
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    settings = {"PYTHONPATH": f"{tmp_path / 'bin'}:{ROOT}", "SAVING": str(saving), "NUM_PROCESSES": "2"}
    settings |= {"PATH": f"{tmp_path / 'bin'}:{environment()['PATH']}", "SLURM_JOB_ID": "4711"}

    def stop_while_saving(process: subprocess.Popen, number: signal.Signals) -> str:
        """Send a signal while a checkpoint is being written; return the output after checking what the run left."""
        wait_until(saving.exists, process)
        process.send_signal(number)
        text = text_of(process)
        assert process.returncode == EXIT_RESUMABLE, text
        checkpoints = sorted((folder / "checkpoints").glob("*.pt"))
        for path in checkpoints:
            verify_checkpoint(path)
        assert int(checkpoints[-1].stem) == read_rows(folder)[-1]["step"] < STEPS
        return text

    assert "Traceback" not in stop_while_saving(start("bash", "train.sh", *flags, **settings), signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"

    # One process is killed: torchrun restarts both, and they resume. Then the run is stopped again.
    saving.unlink()
    process = start("bash", "train.sh", *flags, **settings)
    wait_until(saving.exists, process)
    (torchrun,) = children(process.pid)
    os.kill(children(torchrun)[-1], signal.SIGKILL)
    wait_for(folder / "starts.jsonl", process, lines=3)
    saving.unlink()
    assert re.search(r"exitcode: -9\b", stop_while_saving(process, signal.SIGTERM))
    assert (tmp_path / "asked").read_text() == "requeue 4711\n" * 2

    assert (last := Training(flags, tmp_path / "last.txt", processes=2)).wait() == 0, last.text()
    assert_same_run(tmp_path / "exps" / "quiet", folder)
