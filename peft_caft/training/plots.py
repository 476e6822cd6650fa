"""Training curves of fine-tuning runs: next-token loss, gamma and the losses of the heads."""

import itertools
import os
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..basics.plots import CROSS_ENTROPY, RUN_COLOURS, save_figure, tidy_axes

RUN_STYLES = ("-", "--", ":")  # one per run, where colours tell heads apart
HEAD_LOSS = "caft/loss_head_"  # key in the log of a CAFT run, before the number of tokens ahead


def plot_training(
    path: str | os.PathLike, runs: Mapping[str, Sequence[Mapping[str, float]]], aux_loss_weight: float = 0.01
) -> None:
    """Draw the training losses of several runs, and for CAFT runs gamma and the heads' losses.

    The upper panel compares next-token losses. The loss that Trainer logs for a CAFT run contains
    the auxiliary term, so ``aux_loss_weight * caft/gamma * caft/aux_loss`` is subtracted from it. A
    pale line shows the logged values, a strong line their running mean.

    Args:
        runs: name of the run -> ``trainer.state.log_history``, of which entries with ``"step"``
            (optimizer steps) and ``"loss"`` (nats/token) are drawn. Those of a CAFT run also have
            ``"caft/gamma"``, ``"caft/aux_loss"`` and ``"caft/loss_head_2"`` ... (nats/token).
        aux_loss_weight: beta that the CAFT runs were trained with.

    Raises:
        ValueError: if there is no run, or a run has no entry with a step and a loss.
    """
    logs = {name: [entry for entry in log if "step" in entry and "loss" in entry] for name, log in runs.items()}
    counts = {name: len(log) for name, log in logs.items()}
    if not counts or 0 in counts.values():
        raise ValueError(
            f"runs: got {counts} entries with 'step' and 'loss', expected at least one in each run. Pass "
            "{'LoRA': trainer.state.log_history, ...} of runs that logged their loss (TrainingArguments.logging_steps)."
        )
    keys = {key for log in logs.values() for entry in log for key in entry}
    heads = sorted(int(key.removeprefix(HEAD_LOSS)) for key in keys if key.startswith(HEAD_LOSS))
    figure = Figure(figsize=(8, 8 if heads else 4.4), layout="constrained")
    panels = list(figure.subplots(2 if heads else 1, 1, squeeze=False)[:, 0])
    _draw_next_token_losses(panels[0], logs, aux_loss_weight)
    if heads:
        _draw_head_losses(panels[1], logs, heads)
    save_figure(figure, path)


def _draw_next_token_losses(axes: Axes, logs: dict[str, list], aux_loss_weight: float) -> None:
    gamma_axes: Axes | None = None
    for (name, log), colour in zip(logs.items(), itertools.cycle(RUN_COLOURS), strict=False):
        steps = [entry["step"] for entry in log]
        auxiliary = [entry.get("caft/gamma", 0) * entry.get("caft/aux_loss", 0) for entry in log]
        losses = [entry["loss"] - aux_loss_weight * term for entry, term in zip(log, auxiliary, strict=True)]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=colour, linewidth=2, label=name)
        schedule = [(entry["step"], entry["caft/gamma"]) for entry in log if "caft/gamma" in entry]
        if schedule:
            gamma_axes = gamma_axes or axes.twinx()
            gamma_axes.plot(*zip(*schedule, strict=True), color=colour, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_title("Next token: training loss", loc="left")
    axes.set_ylabel(CROSS_ENTROPY)
    tidy_axes(axes)
    _legend_below(axes, columns=min(len(logs), 3))
    if gamma_axes is not None:
        gamma_axes.set(ylabel="gamma (dashed), weight of\nthe auxiliary losses", ylim=(0, 1.05))
        gamma_axes.spines["top"].set_visible(False)


def _draw_head_losses(axes: Axes, logs: dict[str, list], heads: list[int]) -> None:
    shades = matplotlib.colormaps["viridis"]
    with_heads = {name: log for name, log in logs.items() if any(key.startswith(HEAD_LOSS) for e in log for key in e)}
    for (name, log), style in zip(with_heads.items(), itertools.cycle(RUN_STYLES), strict=False):
        for index, head in enumerate(heads):
            points = [(entry["step"], entry[key]) for entry in log if (key := f"{HEAD_LOSS}{head}") in entry]
            if points:
                steps, losses = zip(*points, strict=True)
                label = f"{head} tokens ahead" + (f", {name}" if len(with_heads) > 1 else "")
                colour = shades(0.85 * index / max(1, len(heads) - 1))
                axes.plot(steps, _running_mean(losses), style, color=colour, linewidth=1.1, label=label)
    axes.set_title("Auxiliary heads: training loss", loc="left")
    axes.set_ylabel(CROSS_ENTROPY)
    tidy_axes(axes)
    _legend_below(axes, columns=min(len(heads), 4) if len(with_heads) == 1 else 2)


def _legend_below(axes: Axes, columns: int) -> None:
    """Put the legend below the x label, because inside the panel it would cover curves."""
    axes.set_xlabel("optimizer step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, ncols=columns)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, over a twentieth of the run."""
    reach = len(values) // 40
    parts = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(part) / len(part) for part in parts]
