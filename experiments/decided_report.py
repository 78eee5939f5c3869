"""The report of decided.py: times of decision as a table, the curves as a figure, and a picture of the estimates."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

from common.images import image_grid
from common.io import write_json
from common.temporary import atomic_write
from experiments.estimates import time_above

matplotlib.use("Agg")  # works without a screen
import matplotlib.pyplot as plt

LEVELS = (0.5, 0.9)
STREAMS = {"image": "-", "token": "--"}  # and the line of each in the figure
# Tables, and panels of the figure: kind of images, end of the names of the curves, title.
TABLES = (
    ("generated", "decided", "Sampling: class of the estimate is that of the final sample"),
    ("generated", "right", "Sampling: class of the estimate is the requested label"),
    ("generated", "explained", "Sampling: share of the variance explained by the estimate"),
    ("held_out", "right", "Noised held-out images, no label given: class of the estimate is right"),
)
# Further panels: kind of images, curve, title.
PANELS = (
    ("generated", "agree", "Sampling: classes of image and token are equal"),
    ("generated", "token_cosine", "Sampling: cosine of the estimate with the final token"),
)
CAPTION = (
    "Upper lines: estimate of the image, and the classes: of the image | of the token.\n"
    "Lower lines: the held-out image whose token is nearest to the estimate of the token."
)
COLUMNS = 3  # of panels


class Shown(NamedTuple):
    """Estimates in the picture: N images at T times."""

    times: list[float]
    images: Tensor  # (T, N, 3, R, R) uint8, decoded
    neighbours: Tensor  # (T, N, 3, R, R) uint8, the held-out images whose tokens are nearest to those of the estimates
    image_classes: Tensor  # (T, N)
    token_classes: Tensor  # (T, N)


def paths(dest: Path) -> list[Path]:
    """Return the table, the figure and the picture that are written with the JSON file `dest`."""
    return [dest.with_name(dest.stem + ending) for ending in (".md", ".png", "-estimates.png")]


def write(dest: Path, result: dict[str, Any], pictures: dict[str, Shown]) -> None:
    """Write all files of the report, and print the table. `pictures`: of each row."""
    result = {**result, "decided": times_of_decision(result["runs"])}
    markdown, figure, estimates = paths(dest)
    write_json(dest, result)
    with atomic_write(markdown, "w") as file:
        file.write(table(result))
    draw(result["runs"], figure)
    draw_estimates(pictures, estimates)
    print(table(result))
    print(f"written: {dest}, {markdown.name}, {figure.name}, {estimates.name}")


def times_of_decision(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each table, row, stream and level, the time of each seed from which on the curve is above the level.

    `times` has None for a seed whose curve ends below the level; `mean` and `std` are None then.
    """
    found = []
    for (kind, curve, _), row, stream, level in itertools.product(TABLES, rows_of(runs), STREAMS, LEVELS):
        name = f"{stream}_{curve}"
        seeds = [run for run in runs if run["row"] == row and name in run[kind]]
        times = [time_above(run["times"], run[kind][name], level) for run in seeds]
        if not times:
            continue
        known = None not in times
        found.append(
            {
                "images": kind, "curve": curve, "row": row, "stream": stream, "level": level, "times": times,
                "mean": statistics.mean(times) if known else None,
                "std": statistics.stdev(times) if known and len(times) > 1 else None,
            }
        )  # fmt: skip
    return found


def rows_of(runs: list[dict[str, Any]]) -> list[str]:
    """Return the rows of some runs, in their order."""
    return list(dict.fromkeys(run["row"] for run in runs))


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the times from which on each curve is above the levels, mean and deviation over seeds."""
    cells = {tuple(e[k] for k in ("images", "curve", "row", "stream", "level")): e for e in result["decided"]}
    columns = [(stream, level) for stream in STREAMS for level in LEVELS]
    lines = [
        f"Time t (1: noise, 0: data) from which on a curve stays above 50 % and 90 %; {result['images']} images, "
        f"{result['solver']}, {result['num_steps']} steps.",
    ]
    if leads := {run["row"]: run["cls_lead"] for run in result["runs"] if run["cls_lead"]}:
        lines[0] += " With a lead d, the image is at the time min(1, t (1 + d)), the token at max(0, t (1 + d) - d): "
        lines[0] += ", ".join(f"{row} ({lead:g})" for row, lead in leads.items()) + "."
    for kind, curve, title in TABLES:
        if rows := [row for row in rows_of(result["runs"]) if (kind, curve, row, *columns[0]) in cells]:
            lines += ["", "| " + " | ".join([title, *(f"{stream}, {level:.0%}" for stream, level in columns)]) + " |"]
            lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            texts = [_mean_and_spread(cells[kind, curve, row, stream, level]) for stream, level in columns]
            lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return "not reached"
    return f"{entry['mean']:.2f}" + (f" ± {entry['std']:.2f}" if entry["std"] is not None else "")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves over the time: the mean over seeds as a line, the range over seeds as a band."""
    panels = [(kind, [f"{stream}_{name}" for stream in STREAMS], title) for kind, name, title in TABLES]
    panels += [(kind, [name], title) for kind, name, title in PANELS]
    panels = [panel for panel in panels if any(panel[1][0] in run[panel[0]] for run in runs)]
    lines = math.ceil(len(panels) / COLUMNS)
    figure = plt.figure(figsize=(16, 4.6 * lines), layout="constrained")
    for number, (kind, names, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, COLUMNS, number)
        for (row, colour), (name, style) in itertools.product(
            _colours(runs).items(), zip(names, STREAMS.values(), strict=False)
        ):
            if seeds := [run for run in runs if run["row"] == row and name in run[kind]]:
                times, values = seeds[0]["times"], np.array([run[kind][name] for run in seeds])
                axes.plot(times, values.mean(0), style, color=colour)
                axes.fill_between(times, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="time t of the sampler (1: noise, 0: data)", xlim=(1, 0), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color=colour, label=row) for row, colour in _colours(runs).items()]
    handles += [plt.Line2D([], [], color="black", linestyle=style, label=name) for name, style in STREAMS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8)
    _save(figure, path)


def _colours(runs: list[dict[str, Any]]) -> dict[str, str]:
    return {row: f"C{number % 10}" for number, row in enumerate(rows_of(runs))}


def draw_estimates(pictures: dict[str, Shown], path: Path) -> None:
    """Draw the estimates of each row of the table: two lines for each image, and a column for each time."""
    grids = {row: _grid(shown) for row, shown in pictures.items()}
    heights = [11 * len(grid) / grid.shape[1] for grid in grids.values()]
    size = (11, sum(heights) + 0.9 * len(heights))
    figure, cells = plt.subplots(
        len(grids), 1, squeeze=False, figsize=size, layout="constrained", height_ratios=heights
    )
    for axes, (row, grid) in zip(cells.flat, grids.items(), strict=True):
        times, width = pictures[row].times, grid.shape[1]
        axes.imshow(grid, interpolation="nearest")
        axes.set_title(row)
        axes.set_xticks([(i + 0.5) * width / len(times) for i in range(len(times))], [f"t = {t:.2f}" for t in times])
        axes.set_yticks([])
    figure.suptitle(CAPTION, fontsize="medium")
    _save(figure, path)


def _grid(shown: Shown) -> np.ndarray:
    """Return one picture (H, W, 3) uint8."""
    lines = torch.stack([shown.images, shown.neighbours]).permute(2, 0, 1, 4, 5, 3)  # (N, 2, T, R, R, 3)
    captions: list[str | None] = []
    for image, token in zip(shown.image_classes.T.tolist(), shown.token_classes.T.tolist(), strict=True):
        captions += [f"{of_image} | {of_token}" for of_image, of_token in zip(image, token, strict=True)]
        captions += [None] * len(shown.times)
    return np.asarray(image_grid(lines.flatten(0, 2).numpy(), columns=len(shown.times), captions=captions))


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
