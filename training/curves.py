"""loss.png: the loss, its terms and the FID over the steps of a metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.temporary import atomic_write
from loss import TERMS
from training.rows import rows_to_draw

SMOOTHED_SHARE = 10  # each point of a smoothed curve is the mean of the last tenth of the rows up to it
SMOOTHED_FROM = 50  # rows; shorter curves are not smoothed
LOGARITHMIC_FROM = 10  # ratio of last to first step
LOSSES = {"loss": "loss"} | {term.name: term.title for term in TERMS}
SCORES = {"fid": "FID"}


def loss_curves(metrics: str | Path, picture: str | Path) -> None:
    """Plot what a metrics.jsonl has of LOSSES and SCORES, and write a PNG. Losses are shown raw and smoothed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from evaluations.plot import is_number, set_step_axis

    rows = rows_to_draw(metrics, *SCORES)
    curves = {}
    for name, title in {**LOSSES, **SCORES}.items():
        if points := [(row["step"], row[name]) for row in rows if is_number(row.get(name))]:
            curves[name] = title, *np.array(points, dtype=float).T
    if not curves:
        return
    figure = Figure(figsize=(4 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(curves)))
    for axes, (name, (title, steps, values)) in zip(panels, curves.items(), strict=True):
        if name in LOSSES and len(steps) >= SMOOTHED_FROM:
            axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            values = smoothed(values)
        marker = "o" if name in SCORES or len(steps) == 1 else None  # a line of one point is invisible
        axes.plot(steps, values, color="tab:blue", linewidth=1.5, marker=marker)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        set_step_axis(axes, logarithmic=0 < LOGARITHMIC_FROM * steps[0] <= steps[-1])
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the mean of the last tenth of the values up to each value, (N,). Later values do not change it."""
    counts = np.arange(1, len(values) + 1)
    windows = np.maximum(1, counts // SMOOTHED_SHARE)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[counts] - sums[counts - windows]) / windows
