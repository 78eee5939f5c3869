"""Pictures, and the rows of metrics.jsonl that they are drawn from."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from common.io import read_metrics
from training.metrics import loss_curves

ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


def test_damaged_lines_take_no_good_row_with_them(tmp_path: Path) -> None:
    lines = [ROW % 1, '{"step": 2, "lo', "", "[1]", '{"loss": 3}', '{"step": "3"}', '{"step": true}', '{"step": 4.5}']
    content = "\n".join([*lines, "[" * 100_000, ROW % 5]).encode() + b'\n\xff\xfe{"step"\n' + (ROW % 6).encode()
    (tmp_path / "metrics.jsonl").write_bytes(content + b'\n{"step": 7, "loss"')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 6]


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None"), (60, "None")])
def test_loss_curves_show_even_a_single_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, marker: str
) -> None:
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **settings: figures.append(Figure(**settings)) or figures[0])
    (tmp_path / "metrics.jsonl").write_text("\n".join(ROW % step for step in range(count)))
    loss_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert axes.lines[-1].get_marker() == marker
    assert (tmp_path / "loss.png").stat().st_size > 5000
