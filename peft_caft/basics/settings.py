"""Fields of settings, whose help, type and default make the options of the command line too."""

from dataclasses import MISSING, field, fields
from typing import Any

GROUPS = ("Model and data", "Adapter", "Objective", "Heads", "Answers", "Report", "Run")
DATA, ADAPTER, OBJECTIVE, HEADS, ANSWERS, REPORT, RUN = GROUPS


def setting(help: str, default: Any = MISSING, *, group: str = RUN, default_factory: Any = MISSING) -> Any:
    """A dataclass field with its help and the group of options that the command line shows it in.

    Args:
        help: whole sentences; None as a default is explained here.
        default: a field without default is required.
        group: one of `GROUPS`.
        default_factory: makes a default that can be changed, such as ``list``.
    """
    return field(default=default, default_factory=default_factory, metadata={"help": help, "group": group})


def same_setting(cls: type, name: str, **changes: Any) -> Any:
    """The field of other settings, with ``changes`` to its help, default or group."""
    (found,) = (f for f in fields(cls) if f.name == name)
    return setting(**{"default": found.default, **found.metadata, **changes})
