"""The command ``concepts``."""

import typer

from ..concepts.settings import ConceptsSettings
from .options import with_settings


@with_settings(ConceptsSettings)
def concepts_command(settings: ConceptsSettings) -> None:
    """Say how dense data are in terms of several tokens, where a model's loss sits inside them, and
    what n this suggests.

    With adapters: log-probability and accuracy of whole terms, LoRA against CAFT, paired by row,
    and a page that shows the tokens of real answers.
    """
    from ..concepts.concepts import concepts
    from ..concepts.report import report

    typer.echo(report(concepts(settings)))
    plots = " and plots" if settings.plots else ""
    typer.echo(f"\nWritten to {settings.output}: concepts.json, concepts.md, concepts.html{plots}")
