"""Per-row results of an evaluation as means with intervals, for all rows and for groups of them, and as Markdown."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .bootstrap import Estimate, mean_estimate
from .provenance import listed
from .tables import markdown_table
from .task import Metric, Row, Task, prompt_of

COMMON = (
    Metric("cross_entropy", "of the reference, each token given those before", "nats/token", False, per_token=True),
    Metric("answer_cross_entropy", "of the whole reference", "nats/answer", False),
    Metric("ended", "share of answers that the model ended itself"),
)
SMALL_GROUP = 2  # rows: below that a group has no interval, and is not shown
SAMPLES = 5


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """The metrics of a task and those that all tasks have."""
    return (*task.metrics, *COMMON)


def row_values(metric: Metric, result: dict[str, Any]) -> float | None:
    """The value of one metric for one line of ``rows.jsonl``."""
    losses = result["answer_losses"]
    if metric.name == "cross_entropy":
        return sum(losses) / len(losses)
    if metric.name == "answer_cross_entropy":
        return sum(losses)
    return float(result["ended"]) if metric.name == "ended" else result["scores"][metric.name]


def estimate(metric: Metric, results: list[dict[str, Any]]) -> Estimate | None:
    """Mean and 95 % interval of a metric over rows."""
    weights = [len(result["answer_losses"]) for result in results] if metric.per_token else None
    return mean_estimate([row_values(metric, result) for result in results], weights)


def summarise(task: Task, rows: list[Row], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is said of the results; metrics that no row defines are left out."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        for group, value in result["groups"].items():
            groups.setdefault(group, {}).setdefault(value, []).append(result)
    return {
        "task": task.name,
        "rows": len(rows),
        "metrics": _estimates(task, results),
        "groups": {
            group: {
                value: {"rows": len(own), "metrics": _estimates(task, own)} for value, own in sorted(by_value.items())
            }
            for group, by_value in sorted(groups.items())
        },
    }


def _estimates(task: Task, results: list[dict[str, Any]]) -> dict[str, Any]:
    found = ((metric.name, estimate(metric, results)) for metric in metrics_of(task))
    return {name: asdict(value) for name, value in found if value is not None}


def markdown_report(record: dict[str, Any], task: Task, rows: list[Row], results: list[dict[str, Any]]) -> str:
    """The report for people."""
    settings = record["settings"]
    model = settings["model"] + (f" with the adapter {settings['adapter']}" if settings["adapter"] else "")
    metrics = {metric.name: metric for metric in metrics_of(task)}
    overall = [
        [
            name,
            _shown(value, metrics[name]),
            f"{value['rows']:,}",
            metrics[name].meaning,
            "higher" if metrics[name].higher_is_better else "lower",
        ]
        for name, value in record["metrics"].items()
    ]
    lines = [
        f"# {model} on {task.name}",
        "",
        f"{record['rows']:,} rows of {settings['data']}, "
        + ("greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']}")
        + f", at most {settings['max_new_tokens']} new tokens. In brackets 95 % confidence intervals over rows.",
        "",
        markdown_table(["metric", "mean", "rows", "meaning", "better"], overall),
    ]
    for group, by_value in record["groups"].items():
        large = {value: own for value, own in by_value.items() if own["rows"] >= SMALL_GROUP}
        shown = [name for name in record["metrics"] if any(name in own["metrics"] for own in large.values())]
        table = [
            [value, f"{own['rows']:,}", *(_shown(own["metrics"].get(name), metrics[name]) for name in shown)]
            for value, own in sorted(large.items(), key=lambda item: _natural(item[0]))
        ]
        lines += ["", f"## By {group}", "", markdown_table([group, "rows", *shown], table)]
    lines += ["", "## The first rows", ""]
    for row, result in list(zip(rows, results, strict=True))[:SAMPLES]:
        lines += [
            f"- prompt: {_quoted(prompt_of(row))}",
            f"  - reference: {_quoted(result['reference'])}",
            f"  - answer: {_quoted(result['answer'])}",
        ]
    lines += [
        "",
        f"{record['seconds']:.0f} s on {record['machine']}; {listed(record['versions'])}; commit {record['git_commit']}.",
        "",
    ]
    return "\n".join(lines)


def _natural(value: str) -> tuple[int, int, str]:
    """Lengths in their order, other groups by name."""
    number = next((int(word) for word in value.split() if word.isdigit()), 0)
    return (value.startswith("over"), number, value)


def _shown(value: dict[str, Any] | None, metric: Metric) -> str:
    if value is None:
        return "-"
    if metric.unit == "share":
        mean, interval = (
            f"{value['mean']:.1%}",
            f"{value['low']:.1%} to {value['high']:.1%}" if value["low"] is not None else "",
        )
    else:
        mean, interval = (
            f"{value['mean']:.3f}",
            f"{value['low']:.3f} to {value['high']:.3f}" if value["low"] is not None else "",
        )
        mean += "" if metric.unit in ("", "mean") else f" {metric.unit}"
    return f"{mean} ({interval})" if interval else mean


def _quoted(text: str, longest: int = 200) -> str:
    """Text in one line of Markdown, its quotation marks those of no text."""
    line = text if len(text) <= longest else text[:longest] + " ..."
    return "`` " + line.replace("\n", "⏎").replace("``", "`\u200b`") + " ``"
