"""Reading parts of long files of rows, such as metrics.jsonl: a few rows are parsed, however many there are."""

from __future__ import annotations

import json
import math
import os
from array import array
from pathlib import Path
from typing import IO, Any

from common.io import LONGEST_LINE, parse_row, read_metrics

READ_COMPLETELY = 1 << 22  # bytes, about 15,000 rows: of a shorter file all rows are drawn
DRAWN_ROWS = 4000  # of a longer file; a picture has fewer pixels in a row
BLOCK = 1 << 22  # bytes read at a time


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
            row, _ = _next_row(file, middle, end)
            if row is None or row["step"] > step:
                end = middle
            else:
                found, kept = row, file.tell()
    return found, kept


def rows_to_draw(path: str | Path, score: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; of a long file, rows at equal distances and those that have a `score`.

    Of either kind there are at most `DRAWN_ROWS`.
    """
    size = os.path.getsize(path)
    if size <= READ_COMPLETELY:
        return read_metrics(path)
    rows = {}
    with open(path, "rb") as file:
        for offset in (*range(0, size, math.ceil(size / DRAWN_ROWS)), *_lines_with(file, json.dumps(score).encode())):
            row, start = _next_row(file, offset, size)
            if row is not None:
                rows[start] = row
    return [rows[start] for start in sorted(rows)]


def _next_row(file: IO[bytes], offset: int, end: int) -> tuple[dict[str, Any] | None, int]:
    """Return the first row whose line starts at `offset` or later and before `end`, and where; leave the file after it.

    (None, `end`) if there is no such row.
    """
    file.seek(max(offset - 1, 0))
    if offset:
        _skip_line(file)
    while (start := file.tell()) < end:
        line = file.readline(LONGEST_LINE)
        if not line.endswith(b"\n") and len(line) == LONGEST_LINE:
            _skip_line(file)
        elif (row := parse_row(line)) is not None:
            return row, start
    return None, end


def _skip_line(file: IO[bytes]) -> None:
    """Move a file behind the end of the present line."""
    while (part := file.readline(BLOCK)) and not part.endswith(b"\n"):
        pass


def _lines_with(file: IO[bytes], text: bytes) -> array:
    """Return where lines that contain `text` start, at most `DRAWN_ROWS` of them, at equal distances in their list."""
    found, rest = array("q"), b""
    offset = file.seek(0)  # of `rest`
    while block := file.read(BLOCK):
        block = rest + block
        complete = block.rfind(b"\n") + 1
        at = block.find(text, 0, complete)
        while at >= 0:
            found.append(offset + block.rfind(b"\n", 0, at) + 1)
            at = block.find(text, block.find(b"\n", at), complete)
        rest = block[complete:] if len(block) - complete <= LONGEST_LINE else b""
        offset += len(block) - len(rest)
    if text in rest:
        found.append(offset)
    return found[:: math.ceil(len(found) / DRAWN_ROWS) or 1]
