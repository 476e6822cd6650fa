"""Turns results of rows into means with intervals, for all rows and groups, and a report."""

from dataclasses import asdict
from typing import Any

from ..basics.intervals import Estimate, mean_estimate, shown
from ..basics.provenance import listed
from ..basics.tables import markdown_table
from .task import Metric, Row, Task, prompt_of

COMMON = (
    Metric("cross_entropy", "loss of the reference, each token given those before", "nats/token", False, True),
    Metric("answer_cross_entropy", "loss of the whole reference", "nats/answer", False),
    Metric("ended", "share of answers that the model ended itself"),
)
SMALL_GROUP = 2  # rows that a group needs to have an interval and to be shown
SAMPLES = 5  # rows shown in a report
LONGEST_QUOTE = 200  # characters


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """The metrics of a task, and after them those that all tasks have.

    Raises:
        ValueError: if a metric of the task has the name of one that all tasks have.
    """
    for metric in task.metrics:
        if metric.name in {common.name for common in COMMON}:
            raise ValueError(f"metrics: {metric.name!r} of {task.name!r} is measured for every task. Rename it.")
    return (*task.metrics, *COMMON)


def common_scores(losses: list[float], ended: bool | None) -> dict[str, float | None]:
    """The values of `COMMON` for one row.

    Args:
        losses: cross entropy of each token of the reference, nats.
        ended: whether the model ended its answer; None if it did not answer.
    """
    return {
        "cross_entropy": sum(losses) / len(losses),
        "answer_cross_entropy": sum(losses),
        "ended": None if ended is None else float(ended),
    }


def estimate(metric: Metric, results: list[dict[str, Any]]) -> Estimate | None:
    """Mean and 95 % interval of a metric over lines of ``rows.jsonl``, None if none defines it."""
    weights = [len(result["answer_losses"]) for result in results] if metric.per_token else None
    return mean_estimate([result["scores"][metric.name] for result in results], weights)


def summarise(task: Task, rows: list[Row], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the metrics over all rows and over groups, without metrics that no row defines."""
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
    found = ((metric, estimate(metric, results)) for metric in metrics_of(task))
    fields = ("unit", "higher_is_better", "per_token")
    return {m.name: asdict(value) | {f: getattr(m, f) for f in fields} for m, value in found if value is not None}


def markdown_report(record: dict[str, Any], task: Task, rows: list[Row], results: list[dict[str, Any]]) -> str:
    """The report in Markdown, from contents of ``evaluation.json``, data and ``rows.jsonl``."""
    settings = record["settings"]
    model = settings["model"] + (f" with the adapter {settings['adapter']}" if settings["adapter"] else "")
    how = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']}"
    how += f", at most {settings['max_new_tokens']} new tokens"
    if not settings["answers"]:
        how = "without answers of the model"
    meanings = {metric.name: metric.meaning for metric in metrics_of(task)}
    overall = []
    for name, value in record["metrics"].items():
        unit = "%" if value["unit"] == "share" else value["unit"]
        overall.append([name, _shown(value), f"{value['rows']:,}", unit, meanings[name], better(value)])
    lines = [
        f"# {model} on {task.name}",
        "",
        f"{record['rows']:,} rows of {settings['data']}, {how}. In brackets 95 % confidence intervals over rows.",
        "",
        markdown_table(["metric", "mean", "rows", "unit", "meaning", "better"], overall),
    ]
    for group, by_value in record["groups"].items():
        large = {value: own for value, own in by_value.items() if own["rows"] >= SMALL_GROUP}
        if large:
            lines += ["", f"## By {group}", "", _group_table(group, large, list(record["metrics"]))]
    lines += ["", "## The first rows", ""]
    for row, result in list(zip(rows, results, strict=True))[:SAMPLES]:
        lines.append(f"- prompt: {_quoted(prompt_of(row))}")
        quoted = {what: result[what] for what in ("reference", "answer") if result[what] is not None}
        lines += [f"  - {what}: {_quoted(text)}" for what, text in quoted.items()]
    made = f"{record['seconds']:.0f} s on {record['machine']}; {listed(record['versions'])}; commit {record['git_commit']}."
    return "\n".join([*lines, "", made, ""])


def _group_table(group: str, by_value: dict[str, Any], names: list[str]) -> str:
    shown = [name for name in names if any(name in own["metrics"] for own in by_value.values())]
    table = [
        [value, f"{own['rows']:,}", *(_shown(own["metrics"].get(name)) for name in shown)]
        for value, own in sorted(by_value.items(), key=lambda item: natural_order(item[0]))
    ]
    return markdown_table([group, "rows", *shown], table)


def natural_order(value: str) -> tuple[int, int, str]:
    """Key that sorts lengths by number, and other groups by name."""
    number = next((int(word) for word in value.split() if word.isdigit()), 0)
    return (value.startswith("over"), number, value)


def _shown(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    return shown(value["mean"], value["low"], value["high"], percent=value["unit"] == "share")


def better(metric: dict[str, Any]) -> str:
    """``"higher"`` or ``"lower"``, whichever is better."""
    return "higher" if metric["higher_is_better"] else "lower"


def _quoted(text: str) -> str:
    """Text as code in one line of Markdown."""
    line = text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + " ..."
    return "`` " + line.replace("\n", "⏎").replace("``", "`\u200b`") + " ``"
