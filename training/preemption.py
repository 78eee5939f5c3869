"""Being asked to stop: SIGTERM, as most schedulers send it, SIGUSR1, SLURM's warning ahead of time, and Ctrl-C.

The first signal only raises a flag; training finishes its step, saves, and ends with `EXIT_RESUMABLE`. A second one
ends the process at once. A file is never half under its name, so the last checkpoint stays good either way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: "temporary failure; try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SIGNAL_SECONDS = 2.0  # a launcher passes on what the process got directly as well: that is still the first signal


class StopSignal:
    """Tells by `received` whether a signal has come since `listen` was called."""

    def __init__(self) -> None:
        self.received = False
        self._first_at = 0.0

    def listen(self) -> None:
        """Take over the signals of this process."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first_at = True, now
        elif now - self._first_at > SAME_SIGNAL_SECONDS:
            os._exit(EXIT_RESUMABLE)


def shield_worker(worker_id: int) -> None:
    """Keep a loader's worker going when every process of a job is signalled: its trainer still needs batches.

    SIGTERM ends a worker only if its trainer sent it, as the loader does with one that lingers. Where the sender cannot
    be known (macOS), a worker falls to any.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_the_trainer_says_so, args=(os.getppid(),), daemon=True).start()


def _end_if_the_trainer_says_so(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
