"""The command line. Rule: only this room knows typer, and a command calls one function below."""

from .app import app, main

__all__ = ["app", "main"]
