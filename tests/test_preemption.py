import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
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
