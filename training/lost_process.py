"""Losing another process of the run: it died, or hangs.

Those that wait for it learn of it from the connection, at once or after `--timeout-minutes`, as an error from the
depths of gloo or NCCL. Here it becomes one clear line and an exit status of its own, by which training/launch.py tells
them from the one that is to blame. (NCCL's watchdog may end a process before, with a report of its own.)
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

EXIT_LOST_PROCESS = 69  # EX_UNAVAILABLE of sysexits.h: "a service is unavailable"
# In what gloo, NCCL and PyTorch's store say then. Their other errors, as of shapes that do not match, are not meant.
SIGNS = ("timed out", "timeout", "closed by peer", "likely closed", "reset by peer", "broken pipe", "remote process")


@contextlib.contextmanager
def lost_process_named(timeout_minutes: float) -> Iterator[None]:
    """End the process with `EXIT_LOST_PROCESS` and one line on stderr if it loses another one inside the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        print(
            f"\n{Path(sys.argv[0]).name}: error: another process of this run ended, or did not answer for "
            f"--timeout-minutes {timeout_minutes:g}: see what it printed. --resume latest goes on from the last "
            f"checkpoint. ({error})",
            file=sys.stderr,
        )
        sys.exit(EXIT_LOST_PROCESS)


def is_loss(error: RuntimeError) -> bool:
    """Return whether an error says that another process of this run cannot be reached."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "CUDA error" in str(error):  # a kernel may time out as well
        return False
    return any(sign in str(error).lower() for sign in SIGNS)
