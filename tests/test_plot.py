"""The plot of FID over training steps."""

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from common.errors import InputError
from evaluations import plot


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def drawn(monkeypatch: pytest.MonkeyPatch, *flags: object) -> Figure:
    """Run the program and return its figure."""
    figures = []
    monkeypatch.setattr(plot, "Figure", lambda **settings: figures.append(Figure(**settings)) or figures[0])
    plot.main(list(map(str, flags)))
    return figures[0]


def test_evaluations_are_read_by_step_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 200, "fid": 20.0}, {"step": 100, "fid": 40}, {"step": 200, "fid": 19.5}]
    path = write_rows(tmp_path / "metrics.jsonl", *rows, [1], {"step": "abc", "fid": 3}, {"step": 300, "fid": None})
    for name in ("fid.png", "fid.svg"):
        figure = drawn(monkeypatch, path, "--out", tmp_path / name, "--published", "B/2")
        assert (tmp_path / name).stat().st_size > 5000
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[100, 40], [200, 19.5]]
    assert len(figure.axes[0].lines) == 4


@pytest.mark.parametrize(
    ("about", "metric", "expected"),
    [
        ({}, "fid", "run"),
        (
            {"num_samples": 5000, "notes": ["5,000 samples; published numbers are of 50,000"]},
            "fid",
            "run (5,000 samples)",
        ),
        (
            {"num_samples": 6, "notes": ["STAND-IN: w is not a published weight file"]},
            "fid",
            "run (6 samples, STAND-IN)",
        ),
        ({"num_samples": 6, "notes": ["STAND-IN: w is not a published weight file"]}, "coherence", "run (6 samples)"),
    ],
)
def test_the_legend_says_what_the_scores_are_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, about: dict, metric: str, expected: str
) -> None:
    path = write_rows(tmp_path / "metrics.jsonl", *({"step": step, metric: 2.5, **about} for step in (1, 2)))
    flags = ["--names", "run", "--metric", metric, "--out", tmp_path / "fid.png"]
    (text,) = drawn(monkeypatch, path, *flags).axes[0].get_legend().get_texts()
    assert text.get_text() == expected


@pytest.mark.parametrize("values", [(31.0, 29.0), (70.0, 15.0), (300.0, 1.8), (0.9, -0.5), (3.0, 0.0)])
def test_numbers_at_the_axis_are_plain_and_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...]
) -> None:
    path = write_rows(tmp_path / "m.jsonl", *({"step": step, "fid": value} for step, value in enumerate(values)))
    figure = drawn(monkeypatch, path, "--out", tmp_path / "fid.png")
    axis = figure.axes[0].yaxis
    labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
    heights = [box.y0 for box in sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)]
    texts = [float(label.get_text().replace("\N{MINUS SIGN}", "-")) for label in labels]  # no powers of ten
    assert len(texts) >= 3
    assert all(above - below > 8 for below, above in itertools.pairwise(heights))
    lowest, highest = figure.axes[0].get_ylim()
    assert lowest < min(values) and max(values) < highest  # no point has vanished


@pytest.mark.parametrize(
    ("steps", "some"),
    [
        ((50_000, 100_000, 400_000), {"50K", "100K", "200K"}),
        ((400_000, 4_000_000), {"500K", "1M", "2M"}),
        ((10, 3000), {"10", "100", "1K"}),
        ((100, 100), {"100"}),
        ((0, 200_000), {"100K", "200K"}),
        ((1, 4_000_000), {"1", "1K", "1M"}),
    ],
)
def test_steps_at_the_axis_are_short_and_have_room(tmp_path, monkeypatch, steps, some) -> None:
    path = write_rows(tmp_path / "m.jsonl", *({"step": step, "fid": 20.0} for step in steps))
    figure = drawn(monkeypatch, path, "--out", tmp_path / "fid.png")
    labels = [label for label in figure.axes[0].xaxis.get_ticklabels(which="both") if label.get_text()]
    assert some <= {label.get_text() for label in labels}
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert all(right.x0 - left.x1 > 8 for left, right in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"step": 1, "loss": 2}\n', [], "no line with an integer `step` and a number `fid`"),
        ('{"step": "abc", "fid": 2}\nnot json\n[1]\n', [], "no line with an integer `step`"),
        (f'{{"step": {10**400}, "fid": 2}}\n', [], "no line with an integer `step`"),
        ('{"step": 1, "fid": 2}\n', ["--out", "fid.txt"], "--out fid.txt"),
        ('{"step": 1, "fid": 2}\n', ["--out", f"{__file__}/fid.png"], "--out .*fid.png: .* is not a writable folder"),
        ('{"step": 1, "fid": 2}\n', ["--names", "a", "b"], "2 names for 1 runs"),
        ('{"step": 1, "sfid": 2}\n', ["--metric", "sfid", "--published", "B/2"], "published curves of fid only"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, flags: list[str], message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        plot.main([str(path), *flags])


def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out"):
        plot.main([str(tmp_path / "nowhere.jsonl"), "--out", f"{__file__}/fid.png"])


def test_any_name_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture, recwarn) -> None:
    path, shown = write_rows(tmp_path / "metrics.jsonl", {"step": 1, "fid": 2.0}), []
    for name in ("", "_run", "$x$", "\u5199\u771f"):
        plot.main([str(path), "--out", str(tmp_path / "o.svg"), "--names", name])
        shown.append((tmp_path / "o.svg").read_text())
    plot.main([str(path), "--out", str(tmp_path / "caf\udce9.png"), "--names", "caf\udce9"])  # bytes that are not UTF-8
    assert (
        (tmp_path / "caf\udce9.png").exists() and "$x$" in shown[2] and not recwarn.list and not capsys.readouterr().err
    )


def test_a_plot_replaces_only_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "metrics.jsonl", {"step": 1, "fid": 2.0})
    path.with_name("link.svg").symlink_to(path)
    path.with_name("photo.png").write_bytes(b"\x89PNG\r\n\x1a\n of a cat")
    before = path.read_bytes()
    for name, problem in (("link.svg", "is read by this program"), ("photo.png", "is not a plot of this program")):
        with pytest.raises(InputError, match=f"--out .*{name}: .*{problem}"):
            plot.main([str(path), "--out", str(tmp_path / name)])
    for name in ("a.png", "a.svg", "a.pdf"):
        for _ in range(2):  # its own plots are replaced
            plot.main([str(path), "--out", str(tmp_path / name)])
    assert path.read_bytes() == before
