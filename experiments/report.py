"""The results of a comparison: speed-up factors, a table, a figure like the paper's figure 1, and samples."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from common.images import open_image
from common.io import write_json
from common.temporary import atomic_write
from experiments.presets import REG

matplotlib.use("Agg")  # works without a screen
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

Curve = list[tuple[int, float]]  # steps and distance, by step
COLOURS = ("tab:gray", "tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange")
MANY = len(COLOURS)  # a table with more rows shows pairs with REG only, and samples of the last step only
GRID_COLUMNS = 4  # of the picture of samples of such a table
EQUAL_TIME = "distance in the time of REG's last step"  # heading of a column
COHERENCE = (  # metric, label and line of the token of what image it is compared with
    ("coherence", "own image", "-"),
    ("coherence_class_mean", "mean of its class", "--"),
    ("coherence_shuffled", "another image", ":"),
)
GRIDS_SHOWN = 3  # steps shown in the picture of samples


def steps_to_reach(curve: Curve, level: float) -> float | None:
    """Return the step at which a curve first is at or below a distance; None if it never is.

    Between two evaluations the distance is interpolated linearly on logarithmic axes. If the first evaluation is
    already at or below the level, its step is returned, which is an upper bound.
    """
    step, distance = curve[0]
    if distance <= level:
        return float(step)
    for next_step, next_distance in curve[1:]:
        if next_distance <= level:
            share = math.log(distance / level) / math.log(distance / next_distance)
            return step * (next_step / step) ** share
        step, distance = next_step, next_distance
    return None


def distance_at(curve: Curve, step: float) -> float | None:
    """Return the distance at a step, interpolated as in `steps_to_reach`; None before the first evaluation.

    After the last evaluation its distance is returned.
    """
    if step < curve[0][0]:
        return None
    for (before, distance), (after, next_distance) in itertools.pairwise(curve):
        if step <= after:
            share = math.log(step / before) / math.log(after / before)
            return distance * (next_distance / distance) ** share
    return curve[-1][1]


def speed_up(slower: Curve, faster: Curve) -> float | None:
    """Return the steps that `slower` needs to reach its last distance, divided by the steps that `faster` needs.

    None if `faster` never reaches that distance. The result is below 1 if `faster` needs more steps.
    """
    level = slower[-1][1]
    needed = steps_to_reach(faster, level)
    return None if needed is None else steps_to_reach(slower, level) / needed


def write(folder: Path, name: str, result: dict[str, Any], runs: dict[tuple[str, int], Path]) -> None:
    """Write NAME.json, NAME.md, NAME.png, NAME-samples.png and, if there are such pictures, NAME-nearest.png."""
    result = {**result, "speed_ups": speed_ups(result)}
    write_json(folder / f"{name}.json", result)
    with atomic_write(folder / f"{name}.md", "w") as file:
        file.write(table(result))
    draw(result, folder / f"{name}.png")
    draw_samples(result, runs, folder / f"{name}-samples.png")
    draw_nearest(result, runs, folder / f"{name}-nearest.png")
    print(table(result))
    print(f"written: {folder / name}.json and the pictures and the table next to it")


def curves(result: dict[str, Any], row: str, metric: str = "distance") -> list[Curve]:
    """Return the curve of each seed of a row; an empty list if the row does not have the metric."""
    scores = result["scores"][row].values()
    return [[(s["step"], s[metric]) for s in seed] for seed in scores if all(metric in s for s in seed)]


def mean_curve(seeds: list[Curve]) -> Curve:
    """Return the mean over seeds, step by step."""
    return [(points[0][0], statistics.mean(value for _, value in points)) for points in zip(*seeds, strict=True)]


def speed_ups(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the factors of each pair of rows, in a large table of each pair with REG.

    steps, time: of the mean curves. steps_of_each_seed: of the curves of one seed. steps_by_length: of the mean curves,
    if the slower one had ended at an earlier evaluation.
    """
    rows, found = list(result["rows"]), []
    by_end = sorted(rows, key=lambda row: mean_curve(curves(result, row))[-1][1], reverse=True)
    for number, slower in enumerate(by_end):
        for faster in by_end[number + 1 :]:
            if len(rows) > MANY and REG not in (slower, faster):
                continue
            pairs = zip(curves(result, slower), curves(result, faster), strict=True)
            slow, fast = mean_curve(curves(result, slower)), mean_curve(curves(result, faster))
            steps = speed_up(slow, fast)
            time_ratio = result["seconds_per_step"][slower] / result["seconds_per_step"][faster]
            found.append(
                {
                    "faster": faster,
                    "slower": slower,
                    "level": slow[-1][1],
                    "steps": steps,
                    "time": None if steps is None else steps * time_ratio,
                    "steps_of_each_seed": [speed_up(a, b) for a, b in pairs],
                    "steps_by_length": {slow[i][0]: speed_up(slow[: i + 1], fast) for i in range(len(slow))},
                }
            )
    return found


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the last scores of each row (mean and standard deviation over seeds), and the factors."""
    columns = {
        "distance": result["metric"],
        "encoder_distance": "encoder",
        "right": "read as its label",
        "coherence": "coherence",
        "coherence_shuffled": "shuffled",
        "coherence_class_mean": "class mean",
        "cls_tokens_right": "tokens right",
        "nearest_ratio": "nearest training image, ratio to held-out",
        "close": "close to a training image",
    }
    last = max(s["step"] for row in result["scores"].values() for seed in row.values() for s in seed)
    by_time = equal_time(result)
    seconds = {"s/step": result["seconds_per_step"]}
    if with_encoder := result.get("seconds_per_step_with_encoder"):
        seconds = {"s/step, cached tokens": result["seconds_per_step"], "s/step, encoder running": with_encoder}
    headings = [f"after {last} steps", *columns.values(), *seconds, *([EQUAL_TIME] if by_time else [])]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in result["rows"]:
        ends = [seed[-1] for seed in result["scores"][row].values()]
        cells = [row, *(_mean_and_spread([end[key] for end in ends if key in end]) for key in columns)]
        cells += [*(f"{times[row]:.3f}" for times in seconds.values()), *([by_time[row]] if by_time else [])]
        lines.append("| " + " | ".join(cells) + " |")
    if real := result["real"]:
        cells = [f"{real[key]:.3f}" if key in real else "" for key in columns]
        cells = ["real images, the half trained on", *cells, *[""] * (len(headings) - len(columns) - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| to reach the last distance of | it needs times fewer steps | each seed | times less time |"]
    lines.append("|---|---|---|---|")
    for pair in result["speed_ups"]:
        steps, time, *each = map(_factor, (pair["steps"], pair["time"], *pair["steps_of_each_seed"]))
        pair_of_rows = f"{pair['slower']} ({pair['level']:.2f}): {pair['faster']}"
        lines.append(f"| {pair_of_rows} | {steps} | {', '.join(each)} | {time} |")
    return "\n".join(lines) + "\n"


def equal_time(result: dict[str, Any]) -> dict[str, str]:
    """Return the distance of each row in the time in which REG reaches its last step; nothing without a row REG.

    A row that needs less time for all steps has its last distance, with the part of the time that it took.
    """
    if REG not in result["rows"]:
        return {}
    seconds, cells = result["seconds_per_step"], {}
    for row in result["rows"]:
        found = curves(result, row)
        last, step = found[0][-1][0], curves(result, REG)[0][-1][0] * seconds[REG] / seconds[row]
        distances = [distance_at(curve, step) for curve in found]
        if None in distances:
            cells[row] = f"step {step:.0f}, not evaluated"
        elif step > last:
            cells[row] = f"{_mean_and_spread(distances)} (in {last / step:.0%} of the time)"
        else:
            cells[row] = f"{_mean_and_spread(distances)} (step {step:.0f})"
    return cells


def _factor(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.2f}"


def _factor_sentence(pair: dict[str, Any]) -> str:
    """Return a sentence on the steps that one row needs to reach the last distance of another."""
    each = ", ".join(map(_factor, pair["steps_of_each_seed"]))
    return f"{pair['slower']} to {pair['faster']}: {_factor(pair['steps'])} times fewer steps (seeds: {each})"


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the distance over steps and over time, with each seed as a thin line, and the coherence over steps.

    Of at most three rows, the factors between the rows are stated, with those of each seed.
    """
    figure, (by_steps, by_time, coherence) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    many = len(result["rows"]) > MANY
    colours = [*plt.get_cmap("tab20").colors, *plt.get_cmap("tab20b").colors] if many else COLOURS
    for row, colour in zip(result["rows"], colours, strict=False):
        seconds = result["seconds_per_step"][row]
        _seeds(by_steps, curves(result, row), 1, colour, row)
        _seeds(by_time, curves(result, row), seconds, colour, f"{row}, {1000 * seconds:.0f} ms a step")
        for metric, label, style in COHERENCE[: 1 if many else None]:
            if found := curves(result, row, metric):
                _seeds(coherence, found, 1, colour, f"{row}: {label}", style)
    if len(result["rows"]) <= 3:
        by_steps.set_title("\n".join(map(_factor_sentence, result["speed_ups"])), fontsize="small")
    time = "seconds of training" + (", with cached tokens of the encoder" if result.get("cached_tokens") else "")
    for axes, label in ((by_steps, "training steps"), (by_time, time)):
        if result["real"]:
            axes.plot([], [], " ", label=f"(real images: {result['real']['distance']:.2f})")
        axes.set(xlabel=label, ylabel=result["metric"], xscale="log", yscale="log")
    coherence.set(xlabel="training steps", ylabel="cosine of the generated token with the encoder's", xscale="log")
    for axes in (by_steps, by_time, coherence):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="both", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="xx-small" if many else "small")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _seeds(axes: plt.Axes, seeds: list[Curve], scale: float, colour: Any, label: str, style: str = "-") -> None:
    """Draw the mean over seeds as a line, and each seed as a thin line."""
    values = np.array([[value for _, value in seed] for seed in seeds])
    x = scale * np.array([step for step, _ in seeds[0]])
    axes.plot(x, values.mean(axis=0), color=colour, label=label, linestyle=style, marker="o", markersize=3)
    if len(seeds) > 1:
        axes.plot(x, values.T, color=colour, linestyle=style, linewidth=0.6, alpha=0.6)


def draw_samples(result: dict[str, Any], runs: dict[tuple[str, int], Path], path: Path) -> None:
    """Draw the grids of the first seed: one column for each row of the table, one line for each step.

    For a table with many rows, only the grids of the last step are drawn, `GRID_COLUMNS` in a line.
    """
    seed, grids = result["seeds"][0], "samples" if result["preset"] == "imagenet" else "grids"
    steps = [scores["step"] for scores in next(iter(result["scores"].values()))[str(seed)]]
    many = len(result["rows"]) > MANY
    indices = {len(steps) - 1} if many else {round(k) for k in np.linspace(0, len(steps) - 1, GRIDS_SHOWN)}
    shown = [(row, steps[i]) for i in sorted(indices) for row in result["rows"]]
    columns = GRID_COLUMNS if many else len(result["rows"])
    lines = math.ceil(len(shown) / columns)
    size = (5 * columns, 2.3 * lines)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=size, layout="constrained")
    for cell in axes.flat:
        cell.axis("off")
    for cell, (row, step) in zip(axes.flat, shown, strict=False):
        cell.imshow(open_image((runs[row, seed] / grids / f"{step:07d}.png").read_bytes()), interpolation="nearest")
        cell.set_title(f"{row}, {step} steps", fontsize="small")
    _save(figure, path)


def draw_nearest(result: dict[str, Any], runs: dict[tuple[str, int], Path], path: Path) -> None:
    """Draw images of the first seed's last step (above) with their nearest training images (below), for each row.

    The left half are the first images, the right half those nearest to a training image. Nothing is written if the runs
    have no such pictures.
    """
    seed = result["seeds"][0]
    last = next(iter(result["scores"].values()))[str(seed)][-1]["step"]
    pictures = {row: runs[row, seed] / "grids" / f"{last:07d}-nearest.png" for row in result["rows"]}
    pictures = {row: picture for row, picture in pictures.items() if picture.exists()}
    if not pictures:
        return
    size = (12, 1.9 * len(pictures))
    figure, axes = plt.subplots(len(pictures), 1, squeeze=False, figsize=size, layout="constrained")
    for cell, (row, picture) in zip(axes.flat, pictures.items(), strict=True):
        cell.imshow(open_image(picture.read_bytes()), interpolation="nearest")
        cell.set_title(
            f"{row}: generated (above), nearest training image (below); right half: nearest pairs", fontsize=8
        )
        cell.axis("off")
    _save(figure, path)
