"""Training runs in separate processes that start in milliseconds, because a server that has loaded torch forks them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

from tests.conftest import ROOT, reset_accelerate, run_training

SECONDS = 120  # after which a test fails if a process has not ended

_context = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the server with the repository on its path, and without thread pools, which a fork would lose."""
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    _context.set_forkserver_preload(["train", "timm", "matplotlib.backends.backend_agg"])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _train(
    flags: list[str], environment: dict[str, str], output: str, prepare: Callable[[], None] | None,
    earlier: Sequence[list[str]],
) -> None:  # fmt: skip
    """Run `python train.py FLAGS` in this process, after `earlier` runs."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    import train
    from common.errors import run_cli

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    for one in earlier:
        run_training(one)
    reset_accelerate()
    sys.argv = ["train.py", *flags]
    run_cli(train.main)


class Training:
    """A run that was started once, in one or several processes. They write to `output` and call `prepare` first.

    `earlier`: flags of runs that the same processes complete before it.
    """

    def __init__(
        self, flags: list[str], output: Path, processes: int = 1, prepare: Callable[[], None] | None = None,
        earlier: Sequence[list[str]] = (),
    ):  # fmt: skip
        _start_server()
        self.output = output
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(processes):
            environment = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            arguments = (flags, environment if processes > 1 else {}, str(output), prepare, earlier)
            self.processes.append(_context.Process(target=_train, args=arguments, daemon=True))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = SECONDS) -> int:
        """Wait for the end and return the exit status: the first one that is not 0, or 0."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, self.text()
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> bool:
        """Kill all with SIGKILL and return whether they were still running."""
        running = any(process.is_alive() for process in self.processes)
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join(SECONDS)
        return running

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or the processes have ended."""
        end = time.monotonic() + SECONDS
        while not condition() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < end, self.text()
            time.sleep(0.005)

    def wait_for_lines(self, path: Path, lines: int = 1) -> None:
        """Wait until a file has `lines` lines, or the processes have ended."""
        self.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= lines)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""
