"""Reading parts of long files of rows, such as metrics.jsonl: a few rows are parsed, however many there are."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Any

from common.io import LONGEST_LINE, iterate_metrics, parse_row, read_metrics

READ_COMPLETELY = 1 << 22  # bytes, about 15,000 rows: of a shorter file all rows are drawn
DRAWN_ROWS = 4000  # of a longer file; a picture has fewer pixels in a row


def end_of_rows(path: str | Path, step: int) -> int:
    """Return how many bytes of a file to keep so that its rows end with the last one of a step up to `step`.

    Damaged lines are skipped; those after the last kept row are not kept.
    """
    return _search(path, step)[1]


def last_row(path: str | Path) -> dict[str, Any] | None:
    """Return the last row of a file; None if it has none, or if there is no such file."""
    return _search(path, math.inf)[0] if os.path.isfile(path) else None


def _search(path: str | Path, step: float) -> tuple[dict[str, Any] | None, int]:
    """Return the last row of a step up to `step`, and where it ends; (None, 0) if there is none.

    The rows are in the order of their steps, so this is a binary search.
    """
    with open(path, "rb") as file:
        found, kept, end = None, 0, file.seek(0, os.SEEK_END)  # no row starts at `end` or later
        while kept < end:
            middle = (kept + end) // 2
            row = _next_row(file, middle, end)
            if row is None or row["step"] > step:
                end = middle
            else:
                found, kept = row, file.tell()
    return found, kept


def rows_to_draw(path: str | Path, score: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; of a long file, rows at equal distances, then those that have a `score`.

    Of either kind there are at most `DRAWN_ROWS`.
    """
    size = os.path.getsize(path)
    if size <= READ_COMPLETELY:
        return read_metrics(path)
    with open(path, "rb") as file:
        offsets = range(0, size, math.ceil(size / DRAWN_ROWS))
        rows = [row for offset in offsets if (row := _next_row(file, offset, size)) is not None]
    scores = list(iterate_metrics(path, score))
    return [row for row in rows if score not in row] + scores[:: math.ceil(len(scores) / DRAWN_ROWS) or 1]


def _next_row(file: IO[bytes], offset: int, end: int) -> dict[str, Any] | None:
    """Return the first row whose line starts at `offset` or later and before `end`, and leave the file after it."""
    file.seek(max(offset - 1, 0))
    if offset:
        _skip_line(file)
    while file.tell() < end:
        line = file.readline(LONGEST_LINE)
        if not line.endswith(b"\n") and len(line) == LONGEST_LINE:
            _skip_line(file)
        elif (row := parse_row(line)) is not None:
            return row
    return None


def _skip_line(file: IO[bytes]) -> None:
    """Move a file behind the end of the present line."""
    while (part := file.readline(LONGEST_LINE)) and not part.endswith(b"\n"):
        pass
