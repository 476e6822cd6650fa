"""Commands that measure: ``evaluate``, ``compare``."""

from pathlib import Path
from typing import Annotated

import typer

from ..evaluation.settings import EvaluationSettings
from .options import Overwrite, with_settings


@with_settings(EvaluationSettings)
def evaluate_command(settings: EvaluationSettings, overwrite: Overwrite = False) -> None:
    """Let a model, adapter or merged folder answer the rows of a task: answers, scores, cross
    entropy of the references.

    Writes rows.jsonl (every row's answer and scores, in the order of the data), evaluation.json and
    evaluation.md (means, 95 % confidence intervals, groups of rows).
    """
    from ..evaluation.evaluation import evaluate

    evaluate(settings, overwrite)
    typer.echo(Path(settings.output, "evaluation.md").read_text(encoding="utf-8"))
    typer.echo(f"Written to {settings.output}: evaluation.md, evaluation.json, rows.jsonl")


def compare_command(
    plan: Annotated[str, typer.Argument(help="YAML file with the plan, such as examples/molecules/compare.yaml.")],
    output: Annotated[str, typer.Option(help="Folder to write. An interrupted comparison in it is resumed.")],
    scale: Annotated[str | None, typer.Option(help="One of the plan's scales, such as smoke, cpu or gpu.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, folder or Hub id, in place of the plan's.")] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Pretrained heads, folder or Hub id, in place of those of the plan's settings; arms that name their own keep them.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder that the task's file built, in place of the plan's. [default: built into --output]"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the folder's comparison, start anew.")
    ] = False,
) -> None:
    """Compare arms (LoRA, CAFT and its variants) from the same seeds and order of data, with
    confidence intervals.

    Each arm's learning rate is chosen on dev rows, from a seed of its own; then every arm is
    trained from every seed and tested. Writes comparison.md, comparison.png, summary.json, and
    every run into runs/ARM/lr-RATE/seed-SEED.
    """
    from ..evaluation.comparison import REPORT_NAME, compare
    from ..evaluation.comparison_plan import read_plan

    compare(read_plan(plan, scale, model, heads, data), output, overwrite)
    typer.echo("\n" + Path(output, REPORT_NAME).read_text(encoding="utf-8"))
    typer.echo(f"Written to {output}: {REPORT_NAME}, comparison.png, summary.json, runs")
