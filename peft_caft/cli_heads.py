"""Commands of ``peft-caft`` that make, describe and publish heads. Heavy imports happen inside them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .cli_options import (
    PASS_THROUGH,
    TRAINING_NOTE,
    DType,
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
    data: Annotated[
        list[str],
        typer.Option(
            help="Training data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'. Give it again for more files."
        ),
    ],
    output: Output,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out data, JSONL; give it again for more sets, reported one by one. [default: the last tenth of each "
            "training file]",
            show_default=False,
        ),
    ] = None,
    eval_rows: Annotated[int, typer.Option(help="Rows to use at most of each held-out set.")] = 200,
    init_heads: Annotated[
        str | None,
        typer.Option(
            help="Heads to go on from, folder or Hub id: adapts them to the data of a task. [default: fresh ones]",
            show_default=False,
        ),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="Heads, n - 1; they predict 2 ... n tokens ahead. [default: 4]", show_default=False),
    ] = None,
    head_type: Annotated[
        Literal["residual", "decoder_layer"] | None,
        typer.Option(help="x + SiLU(W x), or a copy of the last layer. [default: decoder_layer]", show_default=False),
    ] = None,
    head_input: Annotated[
        Literal["last_layer_input", "last_hidden_state"] | None,
        typer.Option(
            help="What heads read: before the last layer, or after the final norm. [default: last_layer_input]",
            show_default=False,
        ),
    ] = None,
    head_num_layers: Annotated[
        int | None, typer.Option(help="Blocks or layers per head. [default: 1]", show_default=False)
    ] = None,
    targets: Annotated[
        Literal["soft", "hard"],
        typer.Option(help="What heads learn: the base model's own distributions for the text, or its tokens."),
    ] = "soft",
    aux_loss_decay: Annotated[float, typer.Option(help="alpha: head k weighs alpha^(k-1).")] = 0.8,
    max_length: MaxLength = 512,
    max_rows: MaxRows = None,
    dtype: DType = "auto",
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder that keeps the base model's hidden states, so that later epochs and runs over the same data need "
            "no forward pass of it; tokens x hidden size x 2 bytes in bf16.",
            show_default=False,
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many evaluations (--eval_steps) without a better held-out loss, and keep the best heads.",
            show_default=False,
        ),
    ] = None,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 1: train auxiliary heads with the base model frozen, once per base model.

    Reports cross entropy, top-1 and top-5 accuracy of every head and the acceptance length on held-out rows, before, during
    and after. bfloat16 base models train in mixed precision; --bf16 true does so for float32 ones.
    """
    from .head_training import HeadTrainingSettings, train_heads
    from .trainer_arguments import trainer_arguments

    defaults = {
        "learning_rate": 1e-3,
        "num_train_epochs": 1.0,
        "warmup_steps": 20,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": 0.2,
    }
    arguments = trainer_arguments(output, defaults, training_yaml, context.args)
    settings = settings_of(HeadTrainingSettings, locals())
    summary = train_heads(settings, arguments, overwrite)
    if arguments.process_index:
        return
    from .tables import evaluation_table

    for evaluation in summary["evaluations"]:
        typer.echo(f"\n{evaluation['name']}, before -> after\n{evaluation_table(evaluation)}")
    typer.echo(f"Heads written to {output}")
