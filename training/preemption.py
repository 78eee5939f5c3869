"""Stopping a run by a signal: SIGTERM and SIGUSR1 as schedulers send them, SIGHUP of a closed terminal, and Ctrl-C.

The first signal sets a flag. Training then finishes its step, saves a checkpoint and exits with `EXIT_RESUMABLE`. A
second signal ends the process immediately. Checkpoints are renamed to their final name only when they are complete, so
the last one is valid in both cases.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from common.errors import report_status
from common.loader import start_worker

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: "temporary failure; try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
SAME_SIGNAL_SECONDS = 2.0  # a scheduler may signal a process directly and through its launcher: that is one request


class StopSignal:
    """Records in `received` whether a signal arrived after `listen` was called."""

    def __init__(self) -> None:
        self.received = False
        self._first_at = 0.0

    def listen(self) -> None:
        """Handle the signals of this process. An ignored SIGHUP stays ignored, because nohup asks for that."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first_at = True, now
        elif now - self._first_at > SAME_SIGNAL_SECONDS:
            os._exit(EXIT_RESUMABLE)


def exit_status(finished: bool) -> int:
    """Return the exit status of a training process whose run finished, or was stopped by a signal and can be resumed.

    The status of a stopped run is `EXIT_RESUMABLE`. Under launch/launch.sh the process returns 0 and launch.sh reads
    `EXIT_RESUMABLE` from its status file, because torchrun would end the other processes on any other status.
    """
    status = 0 if finished else EXIT_RESUMABLE
    return 0 if report_status(status) else status


def shield_worker(worker_id: int) -> None:
    """Protect a worker of the data loader from signals sent to all processes of a job; training still needs batches.

    SIGTERM ends a worker only if it was sent by the training process, as the loader does with workers that do not end
    by themselves. Where the sender is unknown (macOS), any SIGTERM ends a worker.
    """
    start_worker(worker_id)
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
