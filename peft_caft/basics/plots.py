"""The look that all plots share: colours, axes, and how a figure is written."""

import os
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart, also in grey.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CROSS_ENTROPY = "cross entropy (nats/token)"


def tidy_axes(axes: Axes, grid: Literal["both", "y"] = "both") -> None:
    """Draw a pale grid behind the data, and no frame above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#E3E6E8", linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG file, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
