"""Progress bars, and lines of progress where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines of progress


class _ProgressLines(tqdm):
    """A hidden progress bar that prints a line every minute, for logs of long runs."""

    def __init__(self, desc: str, total: int, unit: str, **_: Any) -> None:
        super().__init__(total=total, disable=True)
        self.text, self.start = (desc, unit), time.monotonic()
        self.next_line = self.start + LINE_SECONDS

    def update(self, n: float = 1) -> None:
        self.n += n
        if 0 < self.n < self.total and (now := time.monotonic()) >= self.next_line:
            self.next_line = now + LINE_SECONDS
            (desc, unit), rate = self.text, self.n / (now - self.start)
            left = timedelta(seconds=round((self.total - self.n) / rate))
            counts = f"{int(self.n):,} of {self.total:,}, {rate:.3g} {unit}s/s, {left} left"
            print(f"{desc}: {counts}", file=sys.stderr, flush=True)


def progress_bar(items: Iterable[Any] | None = None, main: bool = True, lines: bool = False, **options: Any) -> tqdm:
    """Return tqdm's progress bar over `items`, or, without them, one to be moved by `update`.

    It is shown on stderr if that is a terminal, by the `main` process only, and not if the environment has
    TQDM_DISABLE=1. `lines`: if stderr is not a terminal, print a line every minute instead; this needs `desc`, `total`
    and `unit`, and no `items`. `options` are tqdm's.
    """
    if main and sys.stderr and sys.stderr.isatty():
        return tqdm(items, **options)
    if main and sys.stderr and lines and os.environ.get("TQDM_DISABLE", "0") in ("", "0"):
        return _ProgressLines(**options)
    return tqdm(items, **options | {"disable": True})
