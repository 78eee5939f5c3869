"""What a run says: lines on the console and in log.txt of its folder, by Python's logging.

Modules of training call `logger.info` and `logger.warning`. Only the main process writes; log.txt also gets one line
for an exception of any process.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from common.errors import LostProcess, first_line

ROW = logging.INFO - 1  # level of the rows of numbers: on a terminal, the progress bar shows them instead
LINES_KEPT = 1000  # written before log.txt can be opened

logger = logging.getLogger("reg.training")


class _Line(logging.Formatter):
    """Date, time and message; the level in front of the message for warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}  {level}{record.getMessage()}"


class _Console(logging.Handler):
    """Writes to stdout, and warnings to stderr, above a progress bar. `common.errors.run_cli` writes errors."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        if record.levelno < logging.ERROR:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed, or what reads stdout has ended
                tqdm.write(text, file=stream)
                stream.flush()  # a redirected stdout would keep the lines until its buffer is full


class _LogFile(logging.FileHandler):
    """Appends to log.txt. Training does not need the file: a failure, such as a full disk, loses lines only."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start_messages(main: bool) -> None:
    """Write messages to the console, if this is the main process, and keep them for `log_file`."""
    for handler in logger.handlers[:]:
        if isinstance(handler, _Console | logging.handlers.MemoryHandler):  # of an earlier run in this process
            logger.removeHandler(handler)
    logger.propagate = False
    logger.setLevel(ROW if main else logging.ERROR)
    for handler in (_Console(), logging.handlers.MemoryHandler(LINES_KEPT, flushLevel=logging.CRITICAL + 1)):
        handler.setFormatter(_Line())
        logger.addHandler(handler)


def show_rows(on_console: bool) -> None:
    """Write rows to the console, or to log.txt only."""
    for handler in logger.handlers:
        if isinstance(handler, _Console):
            handler.setLevel(ROW if on_console else logging.INFO)


@contextlib.contextmanager
def log_file(path: Path, process: int = 0) -> Iterator[None]:
    """Append all messages since `start_messages` to a file; an exception of the block becomes one line there.

    `process`: number of this process; processes other than 0 write exceptions only.
    """
    file = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
    file.setFormatter(_Line())
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            logger.removeHandler(handler)
            handler.close()  # passes its messages to the file
    logger.addHandler(file)
    try:
        yield
    except BaseException as error:
        kind = "" if isinstance(error, ValueError | OSError | LostProcess) else f"{type(error).__name__}: "
        logger.error("%s%s%s", f"process {process}: " if process else "", kind, first_line(error))
        raise
    finally:
        logger.removeHandler(file)
        file.close()


@contextlib.contextmanager
def warn_if_unwritable(what: str) -> Iterator[None]:
    """Turn a failure to write `what`, which training does not need, into a warning."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written, training continues: %s", what, error)
