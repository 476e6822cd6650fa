"""Plots of heads: accuracy and cross entropy, before and after training."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..basics.plots import CROSS_ENTROPY, save_figure, tidy_axes

BEFORE_COLOUR, AFTER_COLOUR = "#A9B4BC", "#0072B2"


def plot_evaluations(
    path: str | os.PathLike,
    evaluations: Mapping[str, tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]]]],
) -> None:
    """Draw top-1 and top-5 accuracy and cross entropy of each head, before and after stage 1.

    Args:
        path: PNG file to write.
        evaluations: name of the held-out set -> (before, after), drawn as a row of panels. Both
            have one entry per head: ``"tokens_ahead"`` (k = 2 ... n), ``"top1"`` and ``"top5"``
            (fractions), and ``"cross_entropy"`` (nats/token).

    Raises:
        ValueError: if before and after describe different heads, or none.
    """
    for before, after in evaluations.values():
        heads, heads_after = ([int(entry["tokens_ahead"]) for entry in metrics] for metrics in (before, after))
        if not heads or heads != heads_after:
            raise ValueError(
                f"before and after: got heads for {heads} and {heads_after} tokens ahead, expected the same heads, at "
                "least one. Evaluate the same heads before and after training."
            )
    most = max(len(before) for before, _ in evaluations.values())
    figure = Figure(figsize=(3.2 + 1.7 * max(4, most), 0.3 + 3.3 * len(evaluations)), layout="constrained")
    rows = [list(row) for row in figure.subplots(len(evaluations), 3, squeeze=False)]
    for panels, (name, (before, after)) in zip(rows, evaluations.items(), strict=True):
        _draw_accuracies(panels, before, after)
        panels[0].set_ylabel(name)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, path)


def _draw_accuracies(
    panels: Sequence[Axes], before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> None:
    heads = [int(entry["tokens_ahead"]) for entry in before]
    titles = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "cross_entropy": CROSS_ENTROPY}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        label_format = "{:.2f}" if metric == "cross_entropy" else "{:.0%}"
        for metrics, shift, colour, label in (
            (before, -0.2, BEFORE_COLOUR, "before stage 1"),
            (after, 0.2, AFTER_COLOUR, "after stage 1"),
        ):
            values = [entry[metric] for entry in metrics]
            bars = axes.bar([head + shift for head in heads], values, width=0.38, color=colour, label=label)
            axes.bar_label(bars, fmt=label_format, padding=1.5, fontsize=7.5)
        if metric != "cross_entropy":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.set(title=title, xlabel="tokens ahead", xticks=heads)
        axes.margins(y=0.1)
        tidy_axes(axes, grid="y")
