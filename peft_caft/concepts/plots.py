"""Plots of ``peft-caft concepts``: lengths of terms, loss by place, and whole terms by model."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..basics.intervals import Estimate
from ..basics.plots import CROSS_ENTROPY, RUN_COLOURS, save_figure, tidy_axes
from .density import COVERED_SHARE, Density, RecommendedN
from .findings import Concepts
from .losses import ModelComparison, ModelConcepts

LONGEST_DRAWN = 10  # tokens; longer terms share the last bar
PLACE_LABELS = {
    "single": "one-\ntoken\nterms",
    "1": "1st",
    "2": "2nd",
    "3": "3rd",
    "4": "4th",
    "5+": "5th+",
    "between": "between\nterms",
}
OTHER_COLOUR = "#A9B4BC"
MARKERS = ("o", "s", "^", "D", "v", "P")  # so that models differ in more than colour


def plot_concepts(folder: Path, found: Concepts) -> None:
    """Write ``concept_density.png``, and with models ``concept_losses.png``, into ``folder``."""
    plot_density(folder / "concept_density.png", found.density, found.recommended)
    if found.models:
        # Adapters differ much less from each other than the first does from the base model.
        comparisons = found.comparisons[1:] or found.comparisons
        plot_losses(folder / "concept_losses.png", found.models, comparisons)


def plot_density(path: Path, density: Density, recommended: RecommendedN) -> None:
    """Draw the share of tokens by the length of their term, and the share that each n covers."""
    longest = min(LONGEST_DRAWN, max([*density.terms, 1]))
    tokens = [density.tokens_in(length) for length in range(1, longest + 1)]
    tokens[-1] += sum(density.tokens_in(length) for length in density.terms if length > longest)
    labels = [str(length) for length in range(1, longest + 1)]
    if max(density.terms, default=1) > longest:
        labels[-1] += "+"
    others = {"between\nterms": density.between + density.cut, "special\ntokens": density.special}
    places = [*range(1, longest + 1), longest + 2.2, longest + 4.2]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    shares = [count / density.tokens for count in (*tokens, *others.values())]
    for drawn in (
        left.bar(places[:longest], shares[:longest], color=RUN_COLOURS[0]),
        left.bar(places[longest:], shares[longest:], color=OTHER_COLOUR, hatch="//", edgecolor="white"),
    ):
        left.bar_label(
            drawn,
            fmt=lambda share: f"{share:.0%}" if share >= 0.005 or not share else "<1%",
            fontsize=7.5,
            padding=1.5,
        )
    left.set_title("Supervised tokens by the length of their term", loc="left")
    left.set(xlabel="tokens in the term", ylabel="share of the supervised tokens")
    left.set_xticks(places, [*labels, *others], fontsize=9)
    left.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    left.margins(y=0.12)
    tidy_axes(left, grid="y")
    _draw_coverage(right, density, recommended)
    save_figure(figure, path)


def _draw_coverage(axes: Axes, density: Density, recommended: RecommendedN) -> None:
    axes.set_title("Tokens of longer terms within reach of n", loc="left")
    axes.set(
        xlabel="n (the next token and n - 1 auxiliary heads)",
        ylim=(0, 1.05),
        ylabel="share of the tokens in\nterms of several tokens",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    tidy_axes(axes)
    if recommended.length is None:
        axes.text(0.5, 0.5, "no term takes several tokens", transform=axes.transAxes, ha="center")
        return
    longest = max(recommended.length, recommended.n, min(LONGEST_DRAWN, max(density.terms)))
    reach = range(2, longest + 1)
    axes.plot(reach, [density.covered(n) for n in reach], "-o", color=RUN_COLOURS[0], markersize=4)
    axes.axhline(COVERED_SHARE, color="#555555", linewidth=1, linestyle="--")
    axes.annotate(f"{COVERED_SHARE:.0%}", (2, COVERED_SHARE), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.plot(
        [recommended.n],
        [recommended.covered],
        "o",
        markersize=11,
        markerfacecolor="none",
        color=RUN_COLOURS[1],
        markeredgewidth=2,
    )
    axes.annotate(
        f"recommended: {recommended.n}",
        (recommended.n, recommended.covered or 0),
        xytext=(10, -14),
        textcoords="offset points",
        fontsize=9,
        color=RUN_COLOURS[1],
    )
    axes.set_xticks(list(reach))


def plot_losses(path: Path, models: dict[str, ModelConcepts], comparisons: Sequence[ModelComparison]) -> None:
    """Draw losses by place, whole-term accuracy by length and, if given, paired differences."""
    panels = 3 if comparisons else 2
    figure = Figure(figsize=(1.5 + 4.6 * panels, 4.2), layout="constrained")
    axes = list(figure.subplots(1, panels, width_ratios=[1.3, 1, 1][:panels]))
    counted = next(iter(models.values()))  # all models have the same tokens and terms
    places = [line.place for line in counted.places if line.place in PLACE_LABELS and line.tokens]
    lengths = [line.length for line in counted.terms if line.terms]
    for index, (name, model) in enumerate(models.items()):
        losses = [line.cross_entropy for line in model.places if line.place in places]
        accuracies = [line.accuracy for line in model.terms if line.length in lengths]
        _draw_intervals(axes[0], losses, name, index, len(models), index)
        _draw_intervals(axes[1], accuracies, name, index, len(models), index)
    axes[0].set_title("Loss by place in the term", loc="left")
    axes[0].set(ylabel=CROSS_ENTROPY, xlabel="place of the token in its term")
    axes[0].set_xticks(range(len(places)), [PLACE_LABELS[place] for place in places])
    axes[0].set_ylim(bottom=0)
    axes[1].set_title("Whole term right", loc="left")
    axes[1].set(xlabel="tokens in the term", ylabel="share of the terms")
    axes[1].yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
    axes[1].set_ylim(bottom=0)
    if comparisons:
        for position, comparison in enumerate(comparisons):
            name = f"{comparison.model} minus {comparison.reference}"
            intervals = [comparison.log_probability[length] for length in lengths]
            look = list(models).index(comparison.model)
            _draw_intervals(axes[2], intervals, name, position, len(comparisons), look)
        axes[2].axhline(0, color="#555555", linewidth=1)
        axes[2].set_title("Difference, paired by row", loc="left")
        axes[2].set(xlabel="tokens in the term", ylabel="log-probability of the term (nats);\nup is better")
        axes[2].legend(frameon=False, fontsize=8)
    for panel in axes[1:]:
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_xlim(-0.5, len(lengths) - 0.5)
    for panel in axes:
        tidy_axes(panel, grid="y")
    if len(models) > 1:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False
        )
    save_figure(figure, path)


def _draw_intervals(
    axes: Axes, estimates: Sequence[Estimate | None], name: str, index: int, count: int, look: int
) -> None:
    """Draw series ``index`` of ``count``, side by side; ``look`` chooses colour and marker."""
    shown = [(place, estimate) for place, estimate in enumerate(estimates) if estimate is not None]
    means, lows, highs = ([getattr(e, name) for _, e in shown] for name in ("mean", "low", "high"))
    axes.errorbar(
        [place + 0.16 * (index - (count - 1) / 2) for place, _ in shown],
        means,
        yerr=[
            [0.0 if end is None else abs(mean - end) for mean, end in zip(means, ends, strict=True)]
            for ends in (lows, highs)
        ],
        fmt=MARKERS[look % len(MARKERS)],
        color=RUN_COLOURS[look % len(RUN_COLOURS)],
        label=name,
        capsize=2,
        markersize=5,
        linewidth=1.3,
    )
