"""The command ``peft-caft concepts``. Heavy imports happen inside it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .options import DType, MaxLength, settings_of

app = typer.Typer()


@app.command("concepts")
def concepts_command(
    data: Annotated[str, typer.Option(help="Data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'.")],
    model: Annotated[str, typer.Option(help="Base model: folder or Hub id. With --no-loss its tokenizer is enough.")],
    output: Annotated[str, typer.Option(help="Folder to write concepts.json, .md, .html and plots to.")],
    unit: Annotated[
        Literal["auto", "prose", "code", "chemistry"],
        typer.Option(
            help="What a term is: words; identifiers, keywords, literals and operators; or the fragments of SMILES and the words of "
            "names. auto guesses from the answers."
        ),
    ] = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER of a LoRA or CAFT adapter, or of a whole model with the same tokenizer, to score too. Give it again for "
            "more; the first is compared with the base model, and the others with the first. A name given several times is one model in "
            "several runs, such as seeds.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Pretrained heads, folder or Hub id: how much they know of these data.", show_default=False),
    ] = None,
    loss: Annotated[
        bool, typer.Option("--loss/--no-loss", help="Score the model; without, only terms are counted.")
    ] = True,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG plots, which needs matplotlib.")] = True,
    max_rows: Annotated[
        int | None, typer.Option(help="Rows to use at most, the first ones; all if unset.", show_default=False)
    ] = None,
    max_length: MaxLength = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    dtype: DType = "auto",
    examples: Annotated[int, typer.Option(help="Rows to show in concepts.html, the first ones.")] = 12,
    resamples: Annotated[int, typer.Option(help="Draws of rows for the 95 % intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of these draws.")] = 0,
) -> None:
    """How dense a data set is in terms of several tokens, where a model's loss sits inside them, and what n this suggests.

    With adapters: log-probability and accuracy of whole terms, LoRA against CAFT, paired by row, and a page that shows the
    tokens of real answers.
    """
    from ..concepts.concepts import concepts
    from ..concepts.findings import ConceptsSettings
    from ..concepts.report import report

    adapter = adapter or []
    found = concepts(settings_of(ConceptsSettings, locals()))
    typer.echo(report(found))
    typer.echo(f"\nWritten to {output}: concepts.json, concepts.md, concepts.html" + (" and plots" if plots else ""))
