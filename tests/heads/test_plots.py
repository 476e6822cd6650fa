"""The plot of heads: bars are the metrics before and after training."""

import struct

import pytest

from peft_caft.heads import plots
from peft_caft.heads.plots import plot_evaluations

BEFORE = [{"tokens_ahead": k, "top1": 0.1 / k, "top5": 0.2 / k, "cross_entropy": 10.0 + k} for k in (2, 3)]
AFTER = [{"tokens_ahead": k, "top1": 0.5 / k, "top5": 0.8 / k, "cross_entropy": 3.0 + k} for k in (2, 3)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of the files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_writes_a_png_with_150_dots_per_inch(tmp_path):
    path = tmp_path / "new folder" / "plot.png"
    plot_evaluations(path, {"": (BEFORE, AFTER)})
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1500, 540)


def test_bars_are_the_metrics_before_and_after(drawn):
    plot_evaluations("plot.png", {"": (BEFORE, AFTER)})
    for axes, metric in zip(drawn[0].axes, ("top1", "top5", "cross_entropy"), strict=True):
        heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert heights == [[entry[metric] for entry in metrics] for metrics in (BEFORE, AFTER)]
        assert list(axes.get_xticks()) == [2, 3]
        assert axes.get_xlabel() == "tokens ahead"


@pytest.mark.parametrize(("before", "after"), [([], []), (BEFORE, AFTER[:1]), (BEFORE, AFTER[::-1])])
def test_metrics_of_different_heads_are_refused(before, after):
    with pytest.raises(ValueError, match="expected the same heads"):
        plot_evaluations("plot.png", {"": (before, after)})
