"""The command line ``peft-caft``. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import cli_compare, cli_concepts, cli_evaluate, cli_heads, cli_plan
from .cli_options import (
    PASS_THROUGH,
    Data,
    DType,
    EvalData,
    EvalRows,
    MaxLength,
    MaxRows,
    Model,
    Output,
    Overwrite,
    TrainingYaml,
    settings_of,
)
from .training_defaults import STAGE_2, training_note

app = typer.Typer(
    help="Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(cli_evaluate.app)
app.add_typer(cli_compare.app)
app.add_typer(cli_heads.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_concepts.app)


@app.command("train", context_settings=PASS_THROUGH, epilog=training_note(STAGE_2))
def train_command(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    method: Annotated[
        Literal["caft", "lora", "caft_full", "full"],
        typer.Option(help="LoRA with the auxiliary loss or without it; or all parameters, with it or without it."),
    ] = "caft",
    heads: Annotated[
        str | None,
        typer.Option(help="Pretrained heads: folder or Hub id; unset makes fresh ones.", show_default=False),
    ] = None,
    heads_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the heads on the Hub.", show_default=False)
    ] = None,
    eval_data: EvalData = None,
    eval_rows: EvalRows = 200,
    max_rows: MaxRows = None,
    max_length: MaxLength = 512,
    dtype: DType = "auto",
    freeze_unembedding: Annotated[
        bool,
        typer.Option("--freeze-unembedding", help="With caft_full and full: leave the lm_head as it is."),
    ] = False,
    r: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="LoRA scale; updates weigh lora_alpha / r.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="LoRA dropout probability.")] = 0.0,
    target_modules: Annotated[str, typer.Option(help="'all-linear', or module names with commas.")] = "all-linear",
    num_auxiliary_heads: Annotated[int, typer.Option(help="n - 1; at most what the heads hold.")] = 4,
    aux_loss_weight: Annotated[float, typer.Option(help="beta: weight of all auxiliary losses together.")] = 0.01,
    aux_loss_decay: Annotated[float, typer.Option(help="alpha: head k weighs alpha^(k-1).")] = 0.8,
    aux_loss_schedule: Annotated[
        Literal["reflected_sine", "sine", "linear", "linear_decay", "constant"],
        typer.Option(help="gamma: course of the auxiliary weight over the run."),
    ] = "reflected_sine",
    train_heads: Annotated[
        Literal["frozen", "lora", "full"], typer.Option(help="Whether the heads are trained along.")
    ] = "frozen",
    aux_token_fraction: Annotated[
        float, typer.Option(help="p: share of positions that the heads see, for less compute.")
    ] = 1.0,
    training_yaml: TrainingYaml = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 2: fine-tune with CAFT, or without it from the same seed and order of data.

    Writes a plain LoRA adapter, or with caft_full and full a plain model, which loads anywhere without this package. Where all
    parameters are trained, --dtype auto is float32 (add --bf16 true for autocast), and a smaller learning rate is usual.
    """
    from .fine_tuning import FineTuningSettings, fine_tune
    from .trainer_arguments import trainer_arguments

    arguments = trainer_arguments(output, STAGE_2, training_yaml, context.args)
    settings = settings_of(FineTuningSettings, locals())
    summary = fine_tune(settings, arguments, overwrite)
    if arguments.process_index > 0:
        return
    if summary["eval_loss_after"] is not None:
        typer.echo(
            f"Held-out next-token loss: {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f} nats/token"
        )
    typer.echo(f"{'Model' if settings.trains_all else 'Adapter'} written to {output}")


@app.command("merge")
def merge_command(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or CAFT adapter.")],
    output: Annotated[str, typer.Argument(help="Folder to make.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; unset takes the one that the adapter names.", show_default=False)
    ] = None,
    dtype: DType = "auto",
) -> None:
    """Merge an adapter into its base model: a plain model folder that serves without peft or peft-caft."""
    from .merging import merge

    merge(adapter, output, model, dtype)
    typer.echo(f"Merged model written to {output}")


@app.command("demo")
def demo_command(
    output_dir: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-output"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Of initialisation and order of data.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew instead of resuming.")] = False,
) -> None:
    """The whole way on a real model and real data, on a CPU in less than 10 minutes.

    Heads, LoRA, CAFT, merge, generate, and a table and plots to compare.
    """
    from .demo import demo

    demo(output_dir, smoke=smoke, seed=seed, overwrite=overwrite)


def main() -> None:
    """Run the command line; expected errors are one clear message, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("PEFT_CAFT_TRACEBACK"):
            raise
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        typer.echo("(PEFT_CAFT_TRACEBACK=1 shows where.)", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
