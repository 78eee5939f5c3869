import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.io import read_json
from tests.conftest import ROOT, read_rows
from tests.processes import SECONDS
from training.lost_process import EXIT_LOST_PROCESS
from training.preemption import EXIT_RESUMABLE

# A stand-in for a training program: tells its rank, then ends as its argument says or waits to be told to stop. One
# that gives up another does so when that one has begun.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from training.lost_process import EXIT_LOST_PROCESS
from training.preemption import StopSignal
listener = StopSignal()
listener.listen()
rank = int(os.environ.get("RANK", 0))
with open(Path(sys.argv[1], f"{rank}"), "w") as file:
    print(os.getpid(), os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_ADDR"), file=file)
what = sys.argv[2] if rank == 1 else sys.argv[3]
while what == str(EXIT_LOST_PROCESS) and not Path(sys.argv[1], "1").exists():
    time.sleep(0.01)
if what.isdigit():
    sys.exit(int(what))
if what == "slow":
    time.sleep(0.5)
    sys.exit(7)
if what == "port":
    with open(Path(sys.argv[1], "ports"), "a") as file:
        print(os.environ["MASTER_PORT"], file=file)
    sys.exit(0)
for _ in range(12000):
    time.sleep(0.01)
    if listener.received:
        sys.exit(75)
"""


def launch(tmp_path, *flags: str) -> subprocess.Popen:
    if not (tmp_path / "program.py").exists():
        (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "training/launch.py",
        *flags[:-2],
        str(tmp_path / "program.py"),
        str(tmp_path),
        *flags[-2:],
    ]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen, lines: int = 1) -> None:
    """Wait until a file has so many lines; fail if the process has ended before."""
    end = time.monotonic() + SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_end_well(tmp_path):
    process = launch(tmp_path, "--processes", "2", "--machines", "2", "--machine-rank", "1", "0", "0")
    assert process.wait(SECONDS) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "2", "3"}
    assert (tmp_path / "3").read_text().split()[1:] == ["4", "127.0.0.1"]


def test_a_process_that_fails_ends_all_and_is_named(tmp_path):
    process = launch(tmp_path, "--processes", "3", "7", "wait")
    assert process.wait(SECONDS) == 7
    assert "process 1 on" in (text := process.stderr.read()) and "ended with status 7; ending the others" in text


def test_a_process_that_is_killed_ends_all_and_is_named(tmp_path):
    process = launch(tmp_path, "--processes", "2", "wait", "wait")
    wait_for(tmp_path / "0", process)
    wait_for(tmp_path / "1", process)
    os.kill(int((tmp_path / "1").read_text().split()[0]), signal.SIGKILL)
    assert process.wait(SECONDS) == 128 + 9
    assert "was ended by SIGKILL" in process.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text().split()[0]), 0)


def test_not_who_lost_a_process_is_named_but_who_was_lost(tmp_path):
    """One gives up before the one to blame has ended."""
    process = launch(tmp_path, "--processes", "2", "slow", str(EXIT_LOST_PROCESS))
    assert process.wait(SECONDS) == 7
    assert "process 1 on" in (text := process.stderr.read()) and "ended with status 7; ending the others" in text


def test_a_process_that_hangs_is_named_and_ended(tmp_path):
    process = launch(tmp_path, "--processes", "2", "wait", str(EXIT_LOST_PROCESS))
    assert process.wait(SECONDS) == EXIT_LOST_PROCESS
    assert "process 1 on" in (text := process.stderr.read()) and "did not answer and still runs; ending the" in text
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "1").read_text().split()[0]), 0)


def test_a_loss_of_another_machine_is_told(tmp_path):
    process = launch(tmp_path, "--machines", "2", "--machine-rank", "1", str(EXIT_LOST_PROCESS), "0")
    assert process.wait(SECONDS) == EXIT_LOST_PROCESS
    assert "process 1 on" in (text := process.stderr.read()) and "waited in vain for another; ending the" in text


def test_a_port_in_use_is_refused_and_a_free_one_chosen(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        process = launch(tmp_path, "--processes", "2", "--head-port", taken, "0", "0")
        assert process.wait(SECONDS) == 2
        assert f"error: --head-port {taken}: not to be had on this machine" in process.stderr.read()
    both = [launch(tmp_path, "--processes", "2", "0", "port") for _ in range(2)]
    assert [process.wait(SECONDS) for process in both] == [0, 0]
    assert len(set((tmp_path / "ports").read_text().split())) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_and_the_status_comes_back(tmp_path, number):
    process = launch(tmp_path, "--processes", "2", "wait", "wait")
    wait_for(tmp_path / "0", process)
    wait_for(tmp_path / "1", process)
    process.send_signal(number)
    assert process.wait(SECONDS) == EXIT_RESUMABLE and process.stderr.read() == ""


def test_the_script_saves_on_a_signal_requeues_and_goes_on(train_flags, tmp_path):
    """train.sh on the CPU under a SLURM that only notes what it is asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"SLURM_JOB_ID": "4711", "EXP_NAME": "run", "NUM_GPUS": "0", "STEPS": "100000"}
    command = ["bash", "train.sh", *train_flags]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "exps" / "run"
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(SECONDS) == EXIT_RESUMABLE, process.stderr.read()
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    (saved,) = [int(path.stem) for path in (folder / "checkpoints").glob("*.pt")]
    environment |= {"STEPS": str(saved + 2)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=SECONDS)
    assert [row["step"] for row in read_rows(folder)] == list(range(1, saved + 3))
    assert read_json(folder / "args.json")["max_train_steps"] == saved + 2


def test_a_killed_training_process_ends_the_other_with_its_name_told(train_flags, tmp_path):
    folder = tmp_path / "exps" / "run"
    command = [sys.executable, "training/launch.py", "--processes", "2", "--cpu"]
    command += ["train.py", *train_flags, "--exp-name", "run", "--max-train-steps", "100000", "--num-workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "metrics.jsonl", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    first, second = sorted(map(int, children.split()))
    os.kill(second, signal.SIGKILL)
    assert process.wait(SECONDS) != 0
    assert "process 1 on" in (text := process.stderr.read()) and "was ended by SIGKILL; ending the others" in text
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_ctrl_c_reaches_what_the_scripts_start(tmp_path):
    """bash hides it from programs in the background; a terminal sends it to every process of the group."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = f"source launch/launch.sh; status=0; launch {tmp_path}/program.py {tmp_path} wait wait || status=$?; "
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", script + 'echo "$status $INTERRUPTED"'], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NUM_GPUS": "0"}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it, and bash
    )  # fmt: skip
    wait_for(tmp_path / "0", process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == f"{EXIT_RESUMABLE} 1\n"
