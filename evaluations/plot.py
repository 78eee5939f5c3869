"""Plot FID against training steps from the metrics.jsonl of one or several runs, together with the published curves.

    python evaluations/plot.py runs/*/metrics.jsonl --out fid.png --published B/2

A metrics.jsonl has one JSON object per line; those with `step` and `fid` are evaluations. The legend gives the number
of samples, and says whether the Inception weights are not the published ones.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator

from common.cli import Config, parse, setting
from common.errors import InputError, printable, run_cli
from common.identity import own_file
from common.io import check_writable, iterate_metrics
from common.temporary import atomic_write
from evaluations.comparison import STAND_IN

FROM_INCEPTION = ("fid", "sfid")
LARGEST_DRAWN = 1e100  # axes of larger numbers overflow
CROWDED = 8  # ratio of highest to lowest value above which a linear axis' ticks are too dense on a logarithmic one
OWN_PLOT = own_file("a plot of this program", contains=b"atplotlib")  # the software that PNG, PDF and SVG name
Curve = list[tuple[int, float]]

# FID at step, 50,000 images by SDE in 250 steps without guidance, global batch 256, ImageNet 256 x 256 (arXiv
# 2507.01467). They are comparable only with a run of the same settings.
PUBLISHED: dict[str, dict[str, Curve]] = {
    "B/2": {
        "REG": [(50_000, 64.7), (100_000, 36.1), (200_000, 22.1), (400_000, 15.2)],
        "REPA": [(400_000, 24.4)],
        "SiT": [(400_000, 33.0)],
    },
    "L/2": {
        "REG": [(50_000, 30.1), (100_000, 11.4), (200_000, 6.6), (400_000, 4.6)],
        "REPA": [(400_000, 10.0)],
        "SiT": [(400_000, 18.8)],
    },
    "XL/2": {
        "REG": [(50_000, 26.7), (100_000, 8.9), (200_000, 5.0), (400_000, 3.4), (4_000_000, 1.8)],
        "REPA": [(4_000_000, 5.9)],
        "SiT": [(7_000_000, 8.3)],
    },
}


@dataclass(frozen=True, kw_only=True)
class PlotConfig(Config):
    """Settings of plot.py."""

    runs: tuple[str, ...] = setting(MISSING, "metrics.jsonl of one or several runs", flag="runs")
    out: str = setting("fid.png", "picture to write: .png, .pdf or .svg")
    names: tuple[str, ...] | None = setting(None, "names of the runs in the legend; default: their folders")
    metric: str = setting("fid", "the number to plot")
    published: str | None = setting(None, "add the published curves of this model", choices=sorted(PUBLISHED))

    @property
    def picture_format(self) -> str:
        """The ending of --out, which is matplotlib's name of the format."""
        return Path(self.out).suffix.lstrip(".").lower()

    def check_combination(self) -> None:
        if self.names and len(self.names) != len(self.runs):
            raise InputError(f"--names: {len(self.names)} names for {len(self.runs)} runs")
        if self.published and self.metric != "fid":
            raise InputError(f"--published {self.published}: there are published curves of fid only, not {self.metric}")
        if self.picture_format not in FigureCanvasAgg.get_supported_filetypes():
            raise InputError(f"--out {self.out}: the name must end in .png, .pdf or .svg")


def main(argv: Sequence[str] | None = None) -> None:
    """Plot as the command line says."""
    config = parse(PlotConfig, "Plot FID against training steps, together with the published curves.", argv)
    check_writable(config.out, "--out", config.runs, OWN_PLOT)
    names = config.names or [str(Path(run).parent) if Path(run).name == "metrics.jsonl" else run for run in config.runs]
    curves = {}
    for name, run in zip(names, config.runs, strict=True):
        rows = read_evaluations(run, config.metric)
        curves[name + remark(rows, config.metric)] = [(row["step"], float(row[config.metric])) for row in rows]
    published = PUBLISHED.get(config.published, {})
    plot(curves, {f"{name} {config.published}, published": curve for name, curve in published.items()}, config)
    print(f"written to {printable(config.out)}")


def read_evaluations(path: str | Path, metric: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl that have the metric, sorted by step. Of equal steps, the last row is used.

    Raises OSError if the file cannot be read, InputError if it has no such row.
    """
    rows = [row for row in iterate_metrics(path, metric) if is_number(row["step"]) and is_number(row.get(metric))]
    found = {row["step"]: row for row in rows}
    if not found:
        raise InputError(f"{path}: no line with an integer `step` and a number `{metric}`")
    return [found[step] for step in sorted(found)]


def is_number(value: Any) -> bool:
    """Return whether a value from a JSON file can be drawn."""
    return type(value) in (int, float) and abs(value) < LARGEST_DRAWN


def remark(rows: list[dict[str, Any]], metric: str) -> str:
    """Return the addition to a run's name in the legend: number of samples and STAND-IN, if the rows have them."""
    counts = sorted({row["num_samples"] for row in rows if isinstance(row.get("num_samples"), int)})
    parts = [f"{' or '.join(f'{count:,}' for count in counts)} samples"] if counts else []
    if metric in FROM_INCEPTION and any(STAND_IN in str(row.get("notes")) for row in rows):
        parts.append(STAND_IN)
    return f" ({', '.join(parts)})" if parts else ""


def plot(curves: dict[str, Curve], published: dict[str, Curve], config: PlotConfig) -> None:
    """Draw the runs as lines and the published curves dashed and grey, on logarithmic axes if all values allow it."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        shown = printable(name)
        label = f" {shown}" if shown.startswith("_") else shown or " "  # the legend skips names that start with _
        axes.plot(*zip(*curve, strict=True), marker="o", label=label)
    for (name, curve), grey in zip(published.items(), ("0.2", "0.5", "0.7"), strict=False):
        axes.plot(*zip(*curve, strict=True), marker="s", linestyle="--", color=grey, label=name)
    axes.set(xlabel="training steps", ylabel="FID" if config.metric == "fid" else printable(config.metric))
    set_scales(axes, [point for curve in curves.values() for point in curve])
    axes.grid(which="both", alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # names may contain $
    with atomic_write(config.out) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter of a name that the font does not have
        figure.savefig(file, format=config.picture_format, dpi=150)


def set_scales(axes: Axes, points: Curve) -> None:
    """Make each axis logarithmic if all its values are positive, with plain numbers at both axes."""
    steps, values = zip(*points, strict=True)
    set_step_axis(axes, logarithmic=min(steps) > 0)
    if min(values) > 0:
        axes.set_yscale("log")
        lowest, highest = axes.get_ylim()
        locator = AutoLocator() if highest < CROWDED * lowest else LogLocator(subs=(1, 2, 5))
        axes.yaxis.set(major_locator=locator, major_formatter="{x:g}", minor_formatter="")


def set_step_axis(axes: Axes, logarithmic: bool) -> None:
    """Make the horizontal axis one of training steps, with labels like 500, 50K and 4M."""
    if logarithmic:
        axes.set_xscale("log")
        first, last = axes.get_xlim()
        decades = math.log10(last / first)
        locator = LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,))
    else:
        locator = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True)
    axes.xaxis.set(major_locator=locator, major_formatter=lambda step, _: short_number(step), minor_formatter="")


def short_number(value: float) -> str:
    """Return a number with K for thousands and M for millions, such as 50K."""
    for size, unit in ((1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


if __name__ == "__main__":
    run_cli(main)
