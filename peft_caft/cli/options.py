"""Options that several commands of ``peft-caft`` share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
Model = Annotated[str, typer.Option(help="Base model: folder or Hub id.")]
Data = Annotated[str, typer.Option(help="Training data, JSONL: 'messages', or 'prompt' and 'completion', or 'text'.")]
Output = Annotated[str, typer.Option(help="Folder to write. An interrupted run in it is resumed.")]
EvalData = Annotated[str | None, typer.Option(help="Held-out data, JSONL.")]
EvalRows = Annotated[int, typer.Option(help="Held-out rows to use at most.")]
MaxRows = Annotated[int | None, typer.Option(help="Training rows to use at most; all if unset.", show_default=False)]
MaxLength = Annotated[int, typer.Option(help="Longest row in tokens; longer rows lose their end.")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision to load the base model in; auto takes the checkpoint's."),
]
TrainingYaml = Annotated[str | None, typer.Option(help="YAML file with TrainingArguments.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder holds.")]


def settings_of(cls: type, arguments: dict[str, Any]) -> Any:
    """The settings whose fields are named like a command's options."""
    return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})
