import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_rows
from tests.processes import SECONDS
from tests.test_launch import wait_for
from tests.test_train import with_flags
from training.preemption import EXIT_RESUMABLE

# Signals itself, by a clock of its own.
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_waits_the_second_ends(number):
    """What comes within two seconds is the first one still: a launcher passes on what its processes get as well."""
    command = [sys.executable, "-c", LISTENER, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.stdout == "5.0 True\n5.1 True\n6.9 True\n" and done.returncode == EXIT_RESUMABLE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_of_the_job_leaves_the_loader_going(train_flags, number):
    flags = with_flags(train_flags, "--max-train-steps", "100000", "--num-workers", "2")
    metrics = Path(flags[flags.index("--output-dir") + 1]) / "run" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(metrics, process, lines=3)
    os.killpg(process.pid, number)
    text = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == EXIT_RESUMABLE, text
    (checkpoint,) = (metrics.parent / "checkpoints").glob("*.pt")
    assert int(checkpoint.stem) >= read_rows(metrics.parent)[-1]["step"]


def test_a_run_with_loader_workers_ends_by_itself(train_flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *with_flags(train_flags, "--num-workers", "2")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
