"""Commands of ``peft-caft`` that make, describe and publish heads. Heavy imports happen inside them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .cli_options import (
    PASS_THROUGH,
    TRAINING_NOTE,
    Data,
    DType,
    EvalRows,
    MaxLength,
    MaxRows,
    Model,
    Output,
    Overwrite,
    TrainingYaml,
    settings_of,
)

app = typer.Typer()


@app.command("train-heads", context_settings=PASS_THROUGH, epilog=TRAINING_NOTE)
def train_heads_command(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out data, JSONL; else the end of the training file.", show_default=False)
    ] = None,
    eval_rows: EvalRows = 200,
    max_rows: MaxRows = None,
    num_heads: Annotated[int, typer.Option(help="Heads, n - 1; they predict 2 ... n tokens ahead.")] = 4,
    head_type: Annotated[
        Literal["residual", "decoder_layer"], typer.Option(help="x + SiLU(W x), or a copy of the last layer.")
    ] = "decoder_layer",
    head_input: Annotated[
        Literal["last_layer_input", "last_hidden_state"],
        typer.Option(help="What heads read: before the last layer, or after the final norm."),
    ] = "last_layer_input",
    head_num_layers: Annotated[int, typer.Option(help="Blocks or layers per head.")] = 1,
    aux_loss_decay: Annotated[float, typer.Option(help="alpha: head k weighs alpha^(k-1).")] = 0.8,
    max_length: MaxLength = 512,
    dtype: DType = "auto",
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 1: train auxiliary heads on a text or chat file with the base model frozen, once per base model.

    Reports cross entropy and top-1 / top-5 accuracy of every head on held-out rows, before and after.
    """
    from .head_training import HeadTrainingSettings, train_heads
    from .trainer_arguments import trainer_arguments

    defaults = {"learning_rate": 5e-4, "num_train_epochs": 1.0, "warmup_steps": 20}
    arguments = trainer_arguments(output, defaults, training_yaml, context.args)
    settings = settings_of(HeadTrainingSettings, locals())
    summary = train_heads(settings, arguments, overwrite)
    from .tables import head_table

    typer.echo(head_table(summary["metrics_before"], summary["metrics_after"]))
    typer.echo(f"Heads written to {output}")
