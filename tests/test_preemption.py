import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_rows
from tests.test_train import with_flags
from training.preemption import EXIT_RESUMABLE

LISTENER = """
import time
from training.preemption import StopSignal
listener = StopSignal()
listener.listen()
print("listening", flush=True)
for _ in range(1000):
    time.sleep(0.01)
print("received" if listener.received else "nothing", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_waits_the_second_ends(number):
    process = subprocess.Popen([sys.executable, "-c", LISTENER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)  # a launcher passing on the same one
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(5) == EXIT_RESUMABLE and process.stdout.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_every_process_of_the_job_leaves_the_loader_going(train_flags, number):
    flags = with_flags(train_flags, "--max-train-steps", "5000", "--num-workers", "2")
    metrics = Path(flags[flags.index("--output-dir") + 1]) / "run" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_RESUMABLE, text
    (checkpoint,) = (metrics.parent / "checkpoints").glob("*.pt")
    assert int(checkpoint.stem) >= read_rows(metrics.parent)[-1]["step"]


def test_a_run_with_loader_workers_ends_by_itself(train_flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *with_flags(train_flags, "--num-workers", "2")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
