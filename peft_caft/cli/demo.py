"""The command ``demo``."""

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    output_dir: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-output"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, to see that it runs.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and order of data.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew instead of resuming.")] = False,
) -> None:
    """Go the whole way on a real model and real data, on a CPU in less than 10 minutes.

    Heads, LoRA, CAFT, merge, generate, and a table and plots to compare.
    """
    from ..demo.run import demo

    demo(output_dir, smoke=smoke, seed=seed, overwrite=overwrite)
