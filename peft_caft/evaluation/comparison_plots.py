"""Plots a comparison: results of each seed, and differences to the first arm with intervals."""

import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..basics.plots import RUN_COLOURS, save_figure, tidy_axes
from .report import better

LONGEST_IN_TITLE = 16  # characters


def plot_comparison(path: str | os.PathLike, found: dict[str, Any]) -> None:
    """Draw two panels per metric of a summary: seeds and their mean; differences with intervals."""
    labels = {name: arm["label"] for name, arm in found["arms"].items()}
    metrics = found["metrics"]
    columns = 2 if len(labels) > 1 else 1
    figure = Figure(figsize=(3.0 + 4.2 * columns, len(metrics) * (0.9 + 0.32 * len(labels))), layout="constrained")
    panels = figure.subplots(len(metrics), columns, squeeze=False)
    for row, (name, metric) in zip(panels, metrics.items(), strict=True):
        _draw_seeds(row[0], name, metric, labels)
        if columns == 2:
            _draw_differences(row[1], name, metric, labels)
    save_figure(figure, path)


def _draw_seeds(axes: Axes, name: str, metric: dict[str, Any], labels: dict[str, str]) -> None:
    for place, arm in enumerate(labels):
        if arm in metric["arms"]:
            own = metric["arms"][arm]
            values = [value for value in own["by_seed"] if value is not None]
            axes.plot(values, [place] * len(values), "o", color=_colour(place), alpha=0.6, markersize=5)
            axes.plot([own["mean"]["mean"]], [place], "|", color=_colour(place), markersize=16, markeredgewidth=2)
    _finish(axes, metric, list(labels.values()))
    axes.set_title(f"{name} ({better(metric)} is better)", loc="left", fontsize=10)


def _draw_differences(axes: Axes, name: str, metric: dict[str, Any], labels: dict[str, str]) -> None:
    axes.axvline(0, color="#5F6B73", linewidth=1)
    for place, arm in enumerate(labels):
        difference = metric["arms"].get(arm, {}).get("difference")
        if difference is not None:
            mean, low, high = (difference[key] for key in ("mean", "low", "high"))
            axes.plot([mean], [place], "o", color=_colour(place))
            if low is not None:
                axes.plot([low, high], [place, place], "-", color=_colour(place), linewidth=2)
    _finish(axes, metric, [""] * len(labels))
    first = next(iter(labels.values()))
    first = first if len(first) <= LONGEST_IN_TITLE else "the first arm"
    axes.set_title(f"{name}: difference to {first}, 95 % interval", loc="left", fontsize=10)


def _finish(axes: Axes, metric: dict[str, Any], labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if metric["unit"] == "share":
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    else:
        axes.set_xlabel(metric["unit"])
    tidy_axes(axes)


def _colour(place: int) -> str:
    return RUN_COLOURS[place % len(RUN_COLOURS)]
