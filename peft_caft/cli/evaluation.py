"""Commands that measure: ``evaluate``, ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DType, Overwrite, settings_of

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    task: Annotated[str, typer.Option(help="Python file with the task, such as examples/molecules/task.py.")],
    data: Annotated[str, typer.Option(help="Rows to answer, JSONL, as the task's file builds them (test.jsonl).")],
    output: Annotated[str, typer.Option(help="Folder to write. An interrupted run in it is resumed.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model, folder or Hub id; with --adapter its base. [default: the one that the adapter names]",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="LoRA or CAFT adapter, folder or Hub id; plain PEFT loads it.", show_default=False),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Take the first so many rows; all if unset.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens. [default: the task's own]", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; 1 samples from the model's distribution.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the sampling, where --temperature is above 0.")] = 0,
    dtype: DType = "auto",
    answers: Annotated[
        bool,
        typer.Option(
            "--answers/--no-answers",
            help="Let the model answer; without, only the cross entropy of the references is measured, which takes much less time.",
        ),
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """A model, adapter or merged folder on the rows of a task: answers, scores, cross entropy of the references.

    Writes rows.jsonl (every row's answer and scores, in the order of the data), evaluation.json and evaluation.md (means, 95 % confidence
    intervals, groups of rows).
    """
    from ..evaluation.evaluation import EvaluationSettings, evaluate

    evaluate(settings_of(EvaluationSettings, locals()), overwrite)
    typer.echo(Path(output, "evaluation.md").read_text(encoding="utf-8"))
    typer.echo(f"Written to {output}: evaluation.md, evaluation.json, rows.jsonl")


app = typer.Typer()


@app.command("compare")
def compare_command(
    plan: Annotated[str, typer.Argument(help="YAML file with the plan, such as examples/molecules/compare.yaml.")],
    output: Annotated[str, typer.Option(help="Folder to write. An interrupted comparison in it is resumed.")],
    scale: Annotated[
        str | None, typer.Option(help="One of the plan's scales, such as smoke, cpu or gpu.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model, folder or Hub id, in place of the plan's.", show_default=False),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Pretrained heads, folder or Hub id, in place of those of the plan's settings; arms that name their own keep them.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder that the task's file built, in place of the plan's. [default: built into --output]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the folder's comparison, start anew.")
    ] = False,
) -> None:
    """Arms (LoRA, CAFT and its variants) from the same seeds and order of data, and how sure their differences are.

    Each arm's learning rate is chosen on dev rows, from a seed of its own; then every arm is trained from every seed and tested. Writes
    comparison.md, comparison.png, summary.json, and every run into runs/ARM/lr-RATE/seed-SEED.
    """
    from ..evaluation.comparison import REPORT_NAME, compare
    from ..evaluation.comparison_plan import read_plan

    compare(read_plan(plan, scale, model, heads, data), output, overwrite)
    typer.echo("\n" + Path(output, REPORT_NAME).read_text(encoding="utf-8"))
    typer.echo(f"Written to {output}: {REPORT_NAME}, comparison.png, summary.json, runs")
