"""Checks of a plan's values; each error names the field, its value and what was expected."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from ..basics.checks import described, fits
from ..training.arguments import trainer_arguments
from ..training.defaults import STAGE_1, UNUSED_1, UNUSED_2, UNUSED_WITHOUT_EVAL_DATA

SPLITS = ("train", "dev", "test")
SET_BY_PLAN = ("model", "data", "output", "eval_data", "eval_rows", "max_rows", "task", "adapter", "seed")
SET_BY_TRAINING = ("heads_commit", "total_steps")
SET_BY_RUN = ("learning_rate", "seed", "data_seed", "output_dir")


def mapping(where: str, values: Any, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    """``values`` as a dict; its keys must be among ``known`` unless that is None."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: got {values!r}, expected a mapping (key: value).")
    for key in values:
        if known is not None and key not in known:
            raise ValueError(f"{where}: got the key {key!r}, expected some of {', '.join(known)}.")
    return dict(values)


def text(where: str, value: Any) -> str:
    """``value``, which must be a text and not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: got {value!r}, expected a text.")
    return value


def number(where: str, value: Any) -> float:
    """``value``, a number or a text of one."""
    try:
        return float(value)  # YAML reads 1e-4, without a point, as a text
    except (TypeError, ValueError):
        raise ValueError(f"{where}: got {value!r}, expected a number.") from None


def rate_values(where: str, values: Any) -> tuple[float, ...]:
    rates = tuple(number(where, value) for value in values) if isinstance(values, list) else ()
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ValueError(f"{where}: got {values!r}, expected a list of different numbers above 0, e.g. [1e-4, 3e-4].")
    return rates


def seed_values(where: str, values: Any) -> tuple[int, ...]:
    wrong = not isinstance(values, list) or not values or any(type(seed) is not int or seed < 0 for seed in values)
    if wrong or len(set(values)) < len(values):
        raise ValueError(f"{where}: got {values!r}, expected different whole numbers from 0 on, e.g. [1, 2, 3].")
    return tuple(values)


def size_values(values: Any) -> dict[str, int]:
    sizes = mapping("sizes", values, SPLITS)
    for split in SPLITS:
        if type(sizes.get(split)) is not int or sizes[split] < 1:
            raise ValueError(f"sizes.{split}: got {sizes.get(split)!r}, expected a number of rows.")
    return sizes


def settings_values(where: str, values: Any, cls: type) -> dict[str, Any]:
    """Fields of settings, checked by their types."""
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name not in (*SET_BY_PLAN, *SET_BY_TRAINING)}
    found = mapping(where, values, tuple(hints))
    for name, value in found.items():
        if hints[name] is float and isinstance(value, str):
            found[name] = value = number(f"{where}.{name}", value)
        if not fits(value, hints[name]):
            raise ValueError(f"{where}.{name}: got {value!r}, expected {described(hints[name])}.")
    return found


def training_values(
    where: str, values: Any, defaults: dict[str, Any], set_by_run: tuple[str, ...] = SET_BY_RUN
) -> dict[str, Any]:
    found = mapping(where, values)
    for name in found:
        if name in set_by_run:
            raise ValueError(f"{where}.{name}: the plan sets it by seeds and learning rates, expected other fields.")
    try:
        unused = UNUSED_1 | UNUSED_2 if defaults is STAGE_1 else UNUSED_2 | UNUSED_WITHOUT_EVAL_DATA
        set_by_command = {"eval_on_start": "dev and test are evaluated after training"}
        trainer_arguments("", defaults, None, options_of(found), set_by_command, unused)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return found


def options_of(training: dict[str, Any]) -> list[str]:
    """Fields of TrainingArguments as options on a command line, which is how they are parsed."""
    return [word for name, value in training.items() for word in (f"--{name}", str(value))]
