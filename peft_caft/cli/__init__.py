"""The command line ``peft-caft``. Rule: the only room that knows typer; each command calls one
function of a room below.
"""

from .app import main

__all__ = ["main"]
