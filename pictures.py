"""The pictures that the programs leave for people who would rather look than read."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from files import atomic_write

MIN_TILE = 64  # px: smaller images are shown enlarged
SMOOTHED_SHARE = 20  # a drawn curve is averaged over one part in so many
SMOOTHED_FROM = 50  # points; fewer are shown as they are


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Return images (N, H, W, 3), uint8, as one picture, row by row; small ones are enlarged in whole steps."""
    images = np.asarray(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    zoom = max(1, MIN_TILE // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    canvas = np.full((rows * height - gap, columns * width - gap, 3), 255, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height, number % columns * width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(canvas)


def save_png(path: str | Path, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl: objects with a whole number as `step`.

    Lines that a crash cut short or a disk damaged are left out, wherever they stand.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def loss_curves(metrics: str | Path, picture: str | Path) -> None:
    """Draw the terms of the loss over the steps of a metrics.jsonl, raw and averaged, and write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    panels = {
        "loss": "loss",
        "denoise": "latents: mean (v - target)²",
        "proj": "alignment: mean -cos",
        "cls": "class token: mean (v - target)²",
    }
    panels = {key: title for key, title in panels.items() if any(row.get(key) is not None for row in rows)}
    if not panels:
        return
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        steps, values = np.array([(row["step"], row[key]) for row in rows if row.get(key) is not None]).T
        if len(steps) >= SMOOTHED_FROM:
            axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
            values = _smooth(values)
        marker = "o" if len(steps) == 1 else None  # a line of one point is not seen
        axis.plot(steps, values, color="tab:blue", linewidth=1.5, marker=marker)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    with atomic_write(picture) as file:
        figure.savefig(file, format="png", dpi=120)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean over a window centred on each value, cut at the ends."""
    window = np.ones(len(values) // SMOOTHED_SHARE | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
