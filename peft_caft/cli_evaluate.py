"""The command ``peft-caft evaluate``. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import DType, Overwrite, settings_of

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
    from .evaluation import EvaluationSettings, evaluate

    evaluate(settings_of(EvaluationSettings, locals()), overwrite)
    typer.echo(Path(output, "evaluation.md").read_text(encoding="utf-8"))
    typer.echo(f"Written to {output}: evaluation.md, evaluation.json, rows.jsonl")
