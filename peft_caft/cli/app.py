"""The command line ``peft-caft``. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys

import typer

from . import concepts, demo, evaluation, hub, planning, training

app = typer.Typer(
    help="Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
for commands in (planning, concepts, training, hub, evaluation, demo):
    app.add_typer(commands.app)


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
