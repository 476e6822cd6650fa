"""The results of a comparison as numbers and as Markdown: means and paired differences."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..basics.intervals import Values, excludes_zero, mean_over_seeds, paired_difference, shown, too_narrow_by
from ..basics.provenance import listed
from ..basics.tables import markdown_table
from .report import SMALL_GROUP, better, natural_order
from .task import Metric

Results = dict[str, list[list[dict[str, Any]]]]  # arm -> for each seed, the lines of rows.jsonl


def summarise(metrics: Sequence[Metric], results: Results) -> dict[str, Any]:
    """For each metric and arm: the mean, each seed's mean, and the difference to the first arm.

    Metrics that no row defines are left out.

    Raises:
        ValueError: if the arms do not have the same rows.
    """
    _require_same_rows(results)
    return {metric.name: found for metric in metrics if (found := _metric(metric, results))}


def summarise_groups(metrics: Sequence[Metric], results: Results) -> dict[str, Any]:
    """For each group of rows and its value: the number of rows, and `summarise` of these rows."""
    values: dict[str, dict[str, list[int]]] = {}
    (first, *_) = results.values()
    for index, row in enumerate(first[0]):
        for group, value in row["groups"].items():
            values.setdefault(group, {}).setdefault(value, []).append(index)
    found: dict[str, Any] = {}
    for group, by_value in sorted(values.items()):
        found[group] = {}
        for value, rows in sorted(by_value.items(), key=lambda item: natural_order(item[0])):
            if len(rows) >= SMALL_GROUP:
                own = {arm: [[lines[i] for i in rows] for lines in seeds] for arm, seeds in results.items()}
                found[group][value] = {"rows": len(rows), "metrics": summarise(metrics, own)}
    return found


def _metric(metric: Metric, results: Results) -> dict[str, Any] | None:
    (first, *_), found = results.values(), {}
    weights = [float(len(row["answer_losses"])) for row in first[0]] if metric.per_token else None
    tables = {arm: [[row["scores"][metric.name] for row in rows] for rows in seeds] for arm, seeds in results.items()}
    reference = next(iter(tables.values()))
    for arm, table in tables.items():
        level = mean_over_seeds(table, weights)
        if level is not None:
            difference = None if table is reference else paired_difference(reference, table, weights)
            found[arm] = {
                "mean": asdict(level),
                "by_seed": [_mean(values, weights) for values in table],
                "difference": difference and asdict(difference),
            }
    if not found:
        return None
    described = {"meaning": metric.meaning, "unit": metric.unit, "higher_is_better": metric.higher_is_better}
    return described | {"arms": found}


def _mean(values: Values, weights: Sequence[float] | None) -> float | None:
    pairs = [(v, w) for v, w in zip(values, weights or [1.0] * len(values), strict=True) if v is not None]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else None


def _require_same_rows(results: Results) -> None:
    first, rows = next(iter(results)), [row["reference"] for row in next(iter(results.values()))[0]]
    for arm, seeds in results.items():
        for number, own in enumerate(seeds, start=1):
            if [row["reference"] for row in own] != rows:
                raise ValueError(
                    f"rows: {arm!r}, run {number}, and {first!r}, run 1, have different test rows, expected the same in the same order. "
                    "Remove the evaluation that does not belong to this comparison."
                )


def markdown_report(found: dict[str, Any]) -> str:
    """The report in Markdown, made of the contents of ``summary.json``."""
    labels = {name: arm["label"] for name, arm in found["arms"].items()}
    first, seeds = next(iter(labels.values())), len(found["seeds"])
    rows = found["sizes"]
    lines = [
        f"# {', '.join(labels.values())} on {found['task']}",
        "",
        f"{found['model']}; {rows['train']:,} rows to train on, {rows['test']:,} to test on, seeds {', '.join(map(str, found['seeds']))}. All arms "
        "of a seed start from the same adapter and see the same rows in the same order. In brackets 95 % intervals by the bootstrap over "
        "seeds and rows.",
        "",
        markdown_table(*_means(found, labels)),
    ]
    if len(labels) > 1:
        table = [
            [labels[name], *(_cell(metric, name, "difference") for metric in found["metrics"].values())]
            for name in list(labels)[1:]
        ]
        lines += ["", f"## Difference to {first}", "", "Paired by seed and row; a star marks an interval without 0."]
        lines += ["", markdown_table(["", *found["metrics"]], table)]
    lines += ["", "| metric | meaning | better |", "|---|---|---|"]
    lines += [f"| {name} | {metric['meaning']} | {better(metric)} |" for name, metric in found["metrics"].items()]
    if len(labels) > 1:
        lines += _groups(found, labels)
    lines += ["", *_tuning(found, labels), "", *_caveats(found, labels, seeds), ""]
    made = f"{found['machine']}; {listed(found['versions'])}; commit {found['git_commit']}"
    if found["git_commits_of_runs"] != [str(found["git_commit"])]:
        made += f", runs of commit {', '.join(found['git_commits_of_runs'])}"
    return "\n".join([*lines, f"{made}.", ""])


def _means(found: dict[str, Any], labels: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    table = []
    for name, label in labels.items():
        arm = found["arms"][name]
        cells = [_cell(metric, name, "mean") for metric in found["metrics"].values()]
        costs = [f"{arm['steps']:,.0f}", f"{arm['epochs']:.2f}"]
        costs += [f"{arm[name]:,.0f}" for name in ("train_seconds", "tokens")]
        table.append([label, f"{arm['learning_rate']:g}", *cells, *costs])
    return ["", "learning rate", *found["metrics"], "steps", "epochs", "training (s)", "tokens"], table


def _groups(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """A table of differences for each way to group rows that makes two groups or more."""
    lines: list[str] = []
    first, *others = labels
    for group, by_value in found["groups"].items():
        if len(by_value) < 2:
            continue
        table = []
        for value, own in by_value.items():
            for name in others:
                cells = [_cell(own["metrics"].get(metric), name, "difference") for metric in found["metrics"]]
                table.append([value, f"{own['rows']:,}", labels[name], *cells])
        header = [group, "rows", "", *found["metrics"]]
        lines += ["", f"## Difference to {labels[first]} by {group}", "", markdown_table(header, table)]
    return lines


def _cell(metric: dict[str, Any] | None, arm: str, what: str) -> str:
    value = metric and metric["arms"].get(arm, {}).get(what)
    if metric is None or value is None:
        return "-"
    low, high = value["low"], value["high"]
    star = " *" if what == "difference" and excludes_zero(low, high) else ""
    if low == high:  # an interval without width only says that all rows agree
        low = high = None
    sign = "+" if what == "difference" else ""
    return shown(value["mean"], low, high, metric["unit"] == "share", sign) + star


def _tuning(found: dict[str, Any], labels: dict[str, str]) -> list[str]:
    dev = found["tuning"]["dev_cross_entropy"]
    if not dev:
        return ["Learning rates were given, one for each arm."]
    rates = sorted({rate for of_rate in dev.values() for rate, _ in of_rate})
    table = []
    for name, of_rate in dev.items():
        losses = dict(map(tuple, of_rate))
        chosen = found["tuning"]["chosen"][name]
        edge = " (edge)" if len(losses) > 1 and chosen in (min(losses), max(losses)) else ""
        cells = [("-" if rate not in losses else f"{losses[rate]:.4f}") + edge * (rate == chosen) for rate in rates]
        table.append([labels[name], *cells, f"{chosen:g}"])
    return [
        "## Learning rates",
        "",
        f"Cross entropy (nats/token) of the answers of {found['sizes']['dev']:,} dev rows, from seed {found['tuning']['seed']}, which no "
        "test uses. No test row was read before the choice. (edge): the chosen rate is the smallest or largest of those tried.",
        "",
        markdown_table(["", *(f"{rate:g}" for rate in rates), "chosen"], table),
    ]


def _caveats(found: dict[str, Any], labels: dict[str, str], seeds: int) -> list[str]:
    lines = [
        f"{labels[name]} trains {times:.3f} times as long, since CAFT computes that many times LoRA's operations (both with the "
        "logits of supervised tokens alone)."
        for name, times in found["times_the_steps"].items()
    ]
    if seeds == 1:
        lines.append("With one seed the intervals say nothing about other seeds.")
    else:
        lines.append(f"With {seeds} seeds an interval is too narrow by up to {too_narrow_by(seeds):.0%}.")
    lines.append(
        "Each interval is for one difference alone: of twenty differences that are truly 0, about one gets a star by chance."
    )
    return lines
