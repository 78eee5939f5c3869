"""loss.png, drawn from the rows of metrics.jsonl."""

import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from training import metrics
from training.curves import loss_curves, smoothed

ROW = '{"step": %d, "loss": 1.5, "proj": null, "notes": ["a\\u2028b"]}'


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that draws rows and returns the panels."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **settings: figures.append(Figure(**settings)) or figures[0])

    def draw(rows: list[str]):
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
        loss_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").stat().st_size > 5000
        return figures[0].axes

    return draw


@pytest.mark.parametrize(("count", "marker"), [(1, "o"), (2, "None"), (60, "None")])
def test_loss_curves_show_even_a_single_row(draw, count: int, marker: str) -> None:
    (axes,) = draw([ROW % step for step in range(count)])
    assert axes.lines[-1].get_marker() == marker and len(axes.lines) == (2 if count == 60 else 1)


@pytest.mark.parametrize(("first", "scale"), [(10, "log"), (100, "linear"), (0, "linear")])
def test_the_axis_of_steps_is_logarithmic_where_the_steps_span_much(draw, first, scale) -> None:
    (axes,) = draw([ROW % step for step in range(first, 301, 10)])
    assert axes.get_xscale() == scale


def test_the_fid_of_evaluations_has_a_panel(draw) -> None:
    rows = [ROW % 100, '{"step": 100, "fid": 40.5}', ROW % 200, '{"step": 200, "fid": null}', '{"step": 300, "fid": 9}']
    loss, fid = draw(rows)
    assert (loss.get_title(), fid.get_title()) == ("loss", "FID")
    assert fid.lines[0].get_xydata().tolist() == [[100, 40.5], [300, 9]]
    assert loss.lines[0].get_xydata().tolist() == [[100, 1.5], [200, 1.5]]


def test_smoothing_looks_at_earlier_rows_only() -> None:
    values = np.random.default_rng(0).normal(size=500)
    found = smoothed(values)
    assert np.allclose(found[:19], values[:19])  # windows of one
    assert np.isclose(found[499], values[450:].mean()) and np.isclose(found[99], values[90:100].mean())
    values[300:] += 100
    assert np.array_equal(smoothed(values)[:300], found[:300])


def test_the_picture_follows_the_rows_in_a_thread_and_at_most_once_a_minute(tmp_path, monkeypatch) -> None:
    drawn, go_on = [], threading.Event()
    monkeypatch.setattr(metrics, "loss_curves", lambda rows, picture: drawn.append(go_on.wait(10)))
    log = metrics.RunLog(tmp_path, 4, True, lambda row, step: None)
    log.append({"step": 1, "loss": 1.0})
    assert not drawn and log._drawing is None
    monkeypatch.setattr(metrics, "DRAW_SECONDS", 0)
    for step in (2, 3):  # the second one finds that a picture is being drawn
        log.append({"step": step, "loss": 1.0})
    assert not drawn and log._drawing.is_alive()
    go_on.set()
    log.draw()
    assert drawn == [True, True]


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, said) -> None:
    monkeypatch.setattr(metrics, "loss_curves", lambda rows, picture: 1 / 0)
    log = metrics.RunLog(tmp_path, 4, True, lambda row, step: None)
    log.append({"step": 1, "loss": 1.0})
    log.draw()
    assert said == [f"warning: {tmp_path / 'loss.png'} cannot be written, training continues: division by zero"]
