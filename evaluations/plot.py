"""Plot FID against training steps from the metrics.jsonl of one or several runs, beside the published curves.

    python evaluations/plot.py runs/*/metrics.jsonl --out fid.png --published B/2

A metrics.jsonl has one JSON object a line; those with `step` and `fid` are evaluations. The legend says of how many
samples they are, and whether by other Inception weights than the published ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from common.io import InputError, atomic_write, check_writable, read_metrics, run_cli
from evaluations.notes import STAND_IN

FROM_INCEPTION = ("fid", "sfid")
CROWDED = 8  # times the lowest of the values drawn: so much further up, not every tick has room for its number
Curve = list[tuple[int, float]]

# FID at step, 50,000 images by SDE in 250 steps without guidance, global batch 256, ImageNet 256 x 256 (arXiv
# 2507.01467). They compare with a run of the same setting only.
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


def main() -> None:
    args = parse_args()
    check_args(args)
    names = args.names or [str(Path(run).parent) if Path(run).name == "metrics.jsonl" else run for run in args.runs]
    curves = {}
    for name, run in zip(names, args.runs, strict=True):
        rows = read_evaluations(run, args.metric)
        curves[name + remark(rows, args.metric)] = [(row["step"], float(row[args.metric])) for row in rows]
    published = PUBLISHED[args.published] if args.published else {}
    plot(curves, {f"{name} {args.published}, published": curve for name, curve in published.items()}, args)
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="metrics.jsonl of one or several runs")
    parser.add_argument("--out", default="fid.png", help="picture to write, .png, .pdf or .svg (default: fid.png)")
    parser.add_argument("--names", nargs="+", help="names of the runs in the legend (default: their folders)")
    parser.add_argument("--metric", default="fid", help="which number of the evaluations is plotted (default: fid)")
    parser.add_argument("--published", choices=sorted(PUBLISHED), help="also the published curves of this model")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for flags that do not fit together, and for a picture that could not be written."""
    if args.names and len(args.names) != len(args.runs):
        raise InputError(f"--names: {len(args.names)} names for {len(args.runs)} runs")
    if args.published and args.metric != "fid":
        raise InputError(f"--published {args.published}: there are published curves of fid only, not of {args.metric}")
    if picture_format(args.out) not in FigureCanvasAgg.get_supported_filetypes():
        raise InputError(f"--out {args.out}: the name has to end in .png, .pdf or .svg")
    check_writable(args.out, "--out")


def picture_format(path: str | Path) -> str:
    """Return the ending of a file's name, by which matplotlib knows the format."""
    return Path(path).suffix.lstrip(".").lower()


def read_evaluations(path: str | Path, metric: str) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl that have the metric, by step; the last one counts if a step comes twice.

    Raises InputError for a file that is missing or has none.
    """
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    found = {row["step"]: row for row in rows if is_number(row["step"]) and is_number(row.get(metric))}
    if not found:
        raise InputError(f"{path}: no line with a whole number `step` and a number `{metric}`")
    return [found[step] for step in sorted(found)]


def is_number(value: Any) -> bool:
    """Return whether a value from a JSON file can be drawn."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def remark(rows: list[dict[str, Any]], metric: str) -> str:
    """Return what the legend adds to a run's name; nothing about rows that do not say how they came about."""
    counts = sorted({row["num_samples"] for row in rows if isinstance(row.get("num_samples"), int)})
    parts = [f"{' or '.join(f'{count:,}' for count in counts)} samples"] if counts else []
    if metric in FROM_INCEPTION and any(STAND_IN in str(row.get("notes")) for row in rows):
        parts.append(STAND_IN)
    return f" ({', '.join(parts)})" if parts else ""


def plot(curves: dict[str, Curve], published: dict[str, Curve], args: argparse.Namespace) -> None:
    """Draw the runs as lines, the published curves dashed and grey; axes are logarithmic where all numbers allow it."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    for (name, curve), grey in zip(published.items(), ("0.2", "0.5", "0.7"), strict=False):
        axes.plot(*zip(*curve, strict=True), marker="s", linestyle="--", color=grey, label=name)
    axes.set(xlabel="training steps", ylabel=args.metric.upper() if args.metric == "fid" else args.metric)
    set_scales(axes, [point for curve in curves.values() for point in curve])
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    with atomic_write(args.out) as file:
        figure.savefig(file, format=picture_format(args.out), dpi=150)


def set_scales(axes: Axes, points: Curve) -> None:
    """Make the axes logarithmic, except one on which a point would vanish; write plain numbers beside the second."""
    steps, values = zip(*points, strict=True)
    if min(steps) > 0:
        axes.set_xscale("log")
    if min(values) > 0:
        axes.set_yscale("log")
        lowest, highest = axes.get_ylim()
        if highest < CROWDED * lowest:
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(lambda *tick: "")
        axes.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    run_cli(main)
