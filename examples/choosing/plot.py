"""Draw the results of the studies against the total weight of the auxiliary losses: ``python plot.py --output total_weight.png``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from peft_caft.basics.plots import save_figure, tidy_axes
from peft_caft.training.settings import FineTuningSettings

RESULTS = Path(__file__).parent / "results"
PANELS = {
    "planted-ahead": ("kind", "Planted, looking ahead helps", "first word right"),
    "planted-blind": ("kind", "Planted, it cannot help", "first word right"),
    "molecules": ("cross_entropy", "Molecules, SmolLM2-135M", "cross entropy (nats/token), lower is better"),
}
LOOKS = {
    "the study's base": ("#24292F", "D"),
    "other beta": ("#0072B2", "o"),
    "other n": ("#D55E00", "s"),
    "other alpha": ("#009E73", "^"),
    "other gamma": ("#CC79A7", "v"),
    "other heads": ("#8C6D1F", "P"),
}
KIND_OF = {
    "heads": "other heads",
    "train_heads": "other heads",
    "num_auxiliary_heads": "other n",
    "aux_loss_decay": "other alpha",
    "aux_loss_schedule": "other gamma",
    "aux_loss_weight": "other beta",
}


def kind_of(arm: dict[str, Any], first: dict[str, Any]) -> str:
    """In what an arm differs from the base, the arm caft; where beta keeps the total weight, in what it keeps it for."""
    if arm is first:
        return "the study's base"
    names = (name for name in KIND_OF if arm["settings"].get(name) != first["settings"].get(name))
    return KIND_OF[next(names, "heads")]


def total_weight(settings: dict[str, Any]) -> float:
    """The weight beta (alpha + ... + alpha^(n-1)): what all auxiliary losses together weigh against the next-token loss, gamma apart."""
    weight, decay, heads = (
        float(settings.get(name, getattr(FineTuningSettings, name)))
        for name in ("aux_loss_weight", "aux_loss_decay", "num_auxiliary_heads")
    )
    return weight * sum(decay**k for k in range(1, int(heads) + 1))


def draw(axes: Axes, found: dict[str, Any], metric: str, title: str, label: str) -> None:
    results = found["metrics"][metric]["arms"]
    lora = results["lora"]["mean"]
    axes.axhline(lora["mean"], color="#5F6B73", linewidth=1, label="LoRA, with its interval")
    axes.axhspan(lora["low"], lora["high"], color="#5F6B73", alpha=0.12, linewidth=0)
    first, beside = found["arms"]["caft"], Counter()
    for name, arm in found["arms"].items():
        if arm["settings"].get("method") == "lora":
            continue
        mean, kind = results[name]["mean"], kind_of(arm, first)
        colour, marker = LOOKS[kind]
        weight = total_weight(arm["settings"])
        place = weight * 1.04 ** beside[f"{weight:.2g}"]  # arms of the same weight stand side by side
        beside[f"{weight:.2g}"] += 1
        axes.errorbar(
            [place],
            [mean["mean"]],
            yerr=[[mean["mean"] - mean["low"]], [mean["high"] - mean["mean"]]],
            fmt=marker,
            color=colour,
            label=kind,
            capsize=2,
            linewidth=1,
            markersize=6,
            alpha=0.85,
        )
    axes.set_xscale("log")
    axes.set_xlabel("total weight of the auxiliary losses, beta (alpha + ... + alpha^(n-1))", fontsize=8.5)
    axes.set_ylabel(label)
    if found["metrics"][metric]["unit"] == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_title(title, loc="left", fontsize=11)
    tidy_axes(axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(RESULTS / "total_weight.png"), help="PNG file to write")
    output = parser.parse_args().output
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    for axes, (folder, panel) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        draw(axes, json.loads((RESULTS / folder / "summary.json").read_text(encoding="utf-8")), *panel)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, output)


if __name__ == "__main__":
    main()
