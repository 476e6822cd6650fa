"""The commands of ``peft-caft`` in the order in which a user needs them.

Rooms are imported inside the commands, and settings import no torch: ``--help`` comes at once.
"""

import functools
import os
import sys

import typer

from ..basics.checks import is_own
from ..training.defaults import STAGE_1, STAGE_2, training_note
from . import concepts, demo, evaluation, hub, planning, training
from .options import PASS_THROUGH, Command, Commands

app = typer.Typer(
    cls=Commands,
    help="Concept-aware fine-tuning (CAFT, arXiv 2506.07833): multi-token fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)
_add = functools.partial(app.command, cls=Command)
_add("plan")(planning.plan_command)
_add("concepts")(concepts.concepts_command)
_add("distill")(training.distill_command)
_add("train-heads", context_settings=PASS_THROUGH, epilog=training_note(STAGE_1))(training.train_heads_command)
_add("train", context_settings=PASS_THROUGH, epilog=training_note(STAGE_2))(training.train_command)
_add("merge")(hub.merge_command)
_add("inspect")(hub.inspect_command)
_add("push")(hub.push_command)
_add("import-heads")(hub.import_heads_command)
_add("evaluate")(evaluation.evaluate_command)
_add("compare")(evaluation.compare_command)
_add("demo")(demo.demo_command)


def main() -> None:
    """Run the command line; expected errors are one clear message, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("PEFT_CAFT_TRACEBACK") or (isinstance(error, RuntimeError) and not is_own(error)):
            raise
        text = str(error).encode(errors="backslashreplace").decode()  # names of files may be no Unicode
        typer.secho(f"Error: {text}", fg=typer.colors.RED, err=True)
        typer.echo("(PEFT_CAFT_TRACEBACK=1 shows where.)", err=True)
        sys.exit(1)
