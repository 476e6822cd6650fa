"""The command ``plan``."""

from pathlib import Path
from typing import Annotated

import typer

from ..basics.settings import REPORT
from ..planning.settings import PlanSettings
from .options import with_settings


@with_settings(PlanSettings)
def plan_command(
    settings: PlanSettings,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write everything to, sizes in bytes.", rich_help_panel=REPORT)
    ] = None,
) -> None:
    """Say what training would take: parameters, operations, memory and communication per GPU, for
    LoRA and CAFT.

    From the model's configuration alone: a training step is simulated on tensors without data, with
    and without gradient checkpointing, for one GPU, or for DDP, ZeRO-2, FSDP and ZeRO-3, with and
    without QLoRA. Takes half a minute for 32 layers, and little memory.
    """
    from ..basics.files import write_text
    from ..planning.plan import plan
    from ..planning.report import report

    found = plan(settings)
    typer.echo(report(found))
    if json is not None:
        write_text(json, found.to_json())
        typer.echo(f"\nWritten to {json}")
