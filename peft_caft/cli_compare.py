"""The command ``peft-caft compare``. Heavy imports happen inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    from .comparison import REPORT_NAME, compare
    from .comparison_plan import read_plan

    compare(read_plan(plan, scale, model, heads, data), output, overwrite)
    typer.echo("\n" + Path(output, REPORT_NAME).read_text(encoding="utf-8"))
    typer.echo(f"Written to {output}: {REPORT_NAME}, comparison.png, summary.json, runs")
