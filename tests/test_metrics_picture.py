"""loss.png, drawn from the rows of metrics.jsonl."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from training.metrics import loss_curves

ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


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
