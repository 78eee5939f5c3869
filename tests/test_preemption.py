import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, read_rows
from tests.processes import SECONDS, Training
from tests.test_train import with_flags
from training.preemption import EXIT_RESUMABLE, SIGNALS, exit_status

# Sends signals to itself, with a fake clock.
LISTENER = """
import signal, sys
from types import SimpleNamespace
from training import preemption
listener = preemption.StopSignal()
listener.listen()
for now in (5.0, 5.1, 6.9, 7.1):
    preemption.time = SimpleNamespace(monotonic=lambda: now)
    signal.raise_signal(int(sys.argv[1]))
    print(now, listener.received, flush=True)
"""


def start_a_group() -> None:
    """Give this process a process group of its own, and the right to start loader workers."""
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_a_flag_and_the_second_ends_the_process(number):
    """Signals within two seconds count as one, because a launcher may pass on what its processes get as well."""
    command = [sys.executable, "-c", LISTENER, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.stdout == "5.0 True\n5.1 True\n6.9 True\n" and done.returncode == EXIT_RESUMABLE


def test_nohup_is_respected():
    """An ignored SIGHUP stays ignored."""
    listen = "import signal; from training.preemption import StopSignal; StopSignal().listen()"
    ignore = "; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    for prefix, expected in ((["nohup"], "True\n"), ([], "False\n")):
        command = [*prefix, sys.executable, "-c", listen + ignore]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
        assert done.stdout == expected, done.stderr


def test_the_exit_status_goes_to_the_launch_script_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv("REG_STATUS_FILE", raising=False)
    assert (exit_status(finished=True), exit_status(finished=False)) == (0, EXIT_RESUMABLE)
    monkeypatch.setenv("REG_STATUS_FILE", str(tmp_path / "status"))
    assert exit_status(finished=False) == 0 and (tmp_path / "status").read_text() == str(EXIT_RESUMABLE)
    assert exit_status(finished=True) == 0 and (tmp_path / "status").read_text() == "0"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_of_the_job_does_not_end_the_loader(train_flags, tmp_path, number):
    flags = with_flags(train_flags, "--max-train-steps", "100000", "--num-workers", "2")
    folder = tmp_path / "exps" / "run"
    training = Training(flags, tmp_path / "output.txt", prepare=start_a_group)
    training.wait_for_lines(folder / "metrics.jsonl", lines=3)
    assert training.processes[0].is_alive(), training.text()
    os.killpg(training.processes[0].pid, number)
    assert training.wait() == EXIT_RESUMABLE, training.text()
    (checkpoint,) = (folder / "checkpoints").glob("*.pt")
    assert int(checkpoint.stem) >= read_rows(folder)[-1]["step"]


def test_a_run_with_loader_workers_ends_by_itself(train_flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *with_flags(train_flags, "--num-workers", "2")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
