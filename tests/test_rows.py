"""Parts of long files of rows, against reading the complete file."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from common.errors import InputError
from common.io import iterate_metrics, parse_row, read_metrics
from training import rows
from training.curves import loss_curves
from training.metrics import RunLog

DAMAGE = [
    b"\n",
    b"\0" * 300 + b"\n",
    b'{"step": 12\n',
    b'{"step": "3"}\n',
    b"[1]\n",
    b"\xff\xfe\n",
    b"[" * 5000 + b"\n",
]


def row(step: int, **values) -> bytes:
    return json.dumps({"step": step, **values}).encode()


def kept_by_definition(content: bytes, step: int) -> int:
    """Return the end of the last row of a step up to `step`, from all lines."""
    end, found = 0, 0
    for line in (
        content.splitlines(keepends=True) if b"\r" not in content else content.replace(b"\r", b" ").splitlines(True)
    ):
        end += len(line)
        parsed = parse_row(line)
        if parsed is not None and parsed["step"] <= step:
            found = end
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_kept_part_ends_with_the_last_row_up_to_the_step(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lines, step = [], 0
    for _ in range(chance.randrange(40)):
        step += chance.choice((0, 1, 5))  # rows of numbers and of scores may have the same step
        lines.append(row(step, text="x" * chance.randrange(200)) + chance.choice((b"\n", b"\r\n")))
        if chance.random() < 0.3:
            lines.append(chance.choice(DAMAGE))
    if chance.random() < 0.5:
        lines.append(row(step + 1)[: chance.randrange(1, 12)])  # a crash in a line
    (path := tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    for wanted in (-1, 0, 3, step // 2, step - 1, step, step + 1, 10**30):
        assert rows.end_of_rows(path, wanted) == kept_by_definition(path.read_bytes(), wanted)


def test_a_line_longer_than_a_row_can_be_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 100)
    (path := tmp_path / "metrics.jsonl").write_bytes(row(1) + b"\n" + row(2, text="x" * 1000) + b"\n" + row(3))
    assert rows.end_of_rows(path, 2) == len(row(1)) + 1
    assert rows.end_of_rows(path, 3) == path.stat().st_size


def test_resuming_a_long_run_parses_a_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "metrics.jsonl").write_bytes(b"".join(row(step) + b"\n" for step in range(1, 20001)))
    parsed = []
    monkeypatch.setattr(rows, "parse_row", lambda line: parsed.append(line) or parse_row(line))
    RunLog(tmp_path, 4, True, lambda row, step: None, step=15000)
    assert len(parsed) < 30 and read_metrics(path)[-1] == {"step": 15000}


def test_a_new_row_does_not_continue_an_incomplete_line(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "starts.jsonl"):
        (tmp_path / name).write_bytes(row(1) + b"\n" + row(2) + b'\n{"st')
    log = RunLog(tmp_path, 4, True, lambda row, step: None, step=2)
    for name in ("metrics.jsonl", "starts.jsonl"):
        log.write_line(name, {"step": 3})
        assert [found["step"] for found in read_metrics(tmp_path / name)] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_bytes(row(1))
    log.write_line("metrics.jsonl", {"step": 2})
    assert (tmp_path / "metrics.jsonl").read_bytes() == row(1) + b"\n" + row(2) + b"\n"


def test_of_a_long_file_a_bounded_number_of_rows_and_all_scores_are_drawn(tmp_path, monkeypatch) -> None:
    lines = []
    for step in range(1, 5001):
        lines.append(row(step, loss=1.0))
        lines += [row(step, sfid=2.0), row(step, fid=step / 2)] * (step % 500 == 0)
    (path := tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))  # the last row of scores has no line end
    assert rows.rows_to_draw(path, "fid") == read_metrics(path)  # short: all
    monkeypatch.setattr(rows, "READ_COMPLETELY", 1000)
    monkeypatch.setattr(rows, "DRAWN_ROWS", 100)
    found = rows.rows_to_draw(path, "fid")
    assert [entry["step"] for entry in found if "fid" in entry] == list(range(500, 5001, 500))
    losses = [entry["step"] for entry in found if "loss" in entry]
    assert 90 <= len(losses) <= 100 and losses == sorted(losses) and losses[0] == 1 and losses[-1] > 4900
    path.write_bytes(b"\n".join(row(step, fid=1.0) for step in range(5000)))
    assert len(rows.rows_to_draw(path, "fid")) <= 200


def test_rows_are_read_one_at_a_time_and_chosen_by_a_name(tmp_path: Path) -> None:
    (path := tmp_path / "metrics.jsonl").write_bytes(b"\n".join([row(1, loss=1), row(2, fid=3), row(3, sfid=4), b"x"]))
    assert [found["step"] for found in iterate_metrics(path, "fid")] == [2]
    assert next(iterate_metrics(path)) == {"step": 1, "loss": 1}


def test_the_last_row_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rows.last_row(path) is None
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": "x"}\n[3]\n{"st')
    assert rows.last_row(path) == {"step": 2}
    path.write_bytes(b"\xff\n" * 10)
    assert rows.last_row(path) is None


def test_a_log_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    """Opening a fifo would wait forever."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: must be a file, not a folder, a fifo or a device"):
        RunLog(tmp_path, 4, True, lambda row, step: None)


def test_steps_and_values_that_cannot_be_drawn_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": -1, "loss": 1}\n{"step": 1' + "0" * 40 + ', "loss": 1}\n{"step": 1, "loss": 1e308}\n')
    assert [row["step"] for row in read_metrics(path)] == [1]
    loss_curves(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
