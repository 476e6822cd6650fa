"""From fields of settings to options, and help in groups of options."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ..basics.settings import GROUPS, RUN

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
TrainingYaml = Annotated[str | None, typer.Option(help="YAML file with TrainingArguments.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that the folder holds.")]


def with_settings(cls: type, leave_out: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make each `setting` of ``cls`` an option of a command, whose function gets ``settings``.

    Fields to ``leave_out`` keep their defaults.
    """
    fields = [field for field in dataclasses.fields(cls) if field.name not in leave_out]
    hints = get_type_hints(cls)
    options = [_option(field, hints[field.name]) for field in fields]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            for name, value in given.items():
                if value == "":
                    raise ValueError(
                        f"--{name.replace('_', '-')}: got an empty text, expected a value. Leave it out, or give one."
                    )
            function(settings=cls(**given), **values)

        own = inspect.signature(function, eval_str=True).parameters.values()
        keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "settings"]
        command.__signature__ = inspect.Signature([*options, *keywords])  # type: ignore[attr-defined]
        command.__annotations__ = {}  # typer would look the names of the types up in another module
        return command

    return decorate


def _option(field: dataclasses.Field, hint: Any) -> inspect.Parameter:
    default: Any = inspect.Parameter.empty
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    words = f"--{field.name.replace('_', '-')}"
    if default is True:
        words += f"/--no-{field.name.replace('_', '-')}"
    option = typer.Option(
        words,
        help=field.metadata["help"],
        show_default=default is not False and default != [],
        rich_help_panel=field.metadata["group"],
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )


class Command(TyperCommand):
    """A command that shows its options in their groups, and takes underscores in their names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        words = []
        for word in args:
            name, equals, value = word.partition("=")
            hyphens = name.replace("_", "-")
            words.append(hyphens + equals + value if hyphens in own else word)
        return super().parse_args(ctx, words)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *GROUPS)}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                group = getattr(parameter, "rich_help_panel", None) or RUN
                sections["Arguments" if parameter.param_type_name == "argument" else group].append(record)
        grouped = any(records for title, records in sections.items() if title not in ("Arguments", RUN))
        for title, records in sections.items():
            if records:
                with formatter.section(title if grouped or title != RUN else "Options"):
                    # typer 0.20 writes \[ for rich, which is off here.
                    formatter.write_dl([(name, text.replace("\\[", "[")) for name, text in records])


class Commands(TyperGroup):
    """The commands, each with the whole first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            helps = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
            formatter.write_dl([(name, " ".join(first.split())) for name, first in helps.items()])
