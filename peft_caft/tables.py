"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned for reading in a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def head_table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Per-head metrics on held-out data, before and after training."""
    return markdown_table(
        ["head (tokens ahead)", "cross entropy (nats/token)", "top-1", "top-5"],
        [
            [
                str(a["tokens_ahead"]),
                f"{b['cross_entropy']:.3f} -> {a['cross_entropy']:.3f}",
                f"{b['top1']:.1%} -> {a['top1']:.1%}",
                f"{b['top5']:.1%} -> {a['top5']:.1%}",
            ]
            for b, a in zip(before, after, strict=True)
        ],
    )


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Per-head metrics and acceptance length on one held-out set, before and after training."""
    before, after = evaluation["before"], evaluation["after"]
    lengths = f"{before['acceptance_length']:.2f} -> {after['acceptance_length']:.2f}"
    return f"{head_table(before['heads'], after['heads'])}\n\nAcceptance length: {lengths} of {len(after['heads'])} heads."
