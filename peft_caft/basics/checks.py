"""Checks of values that a user gives: errors name the field, what came and what was expected."""

import json
import re
import traceback
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}.")


def require_choices(settings: object, cls: type | None = None) -> None:
    """Raise a ValueError that names the first field with a value that its ``Literal`` lacks.

    Args:
        settings: a dataclass.
        cls: its base class, if only that one's fields are checked.
    """
    for name, hint in get_type_hints(cls or type(settings)).items():
        choices = [
            choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
        ]
        if choices and not fits(getattr(settings, name), hint):
            require_choice(name, getattr(settings, name), tuple(choices))


def require_at_least_one(name: str, value: object, note: str = "") -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1{note}.")


def require_counts(settings: object, *names: str) -> None:
    """Raise a ValueError unless each of these fields is None or a whole number of at least 1."""
    for name in names:
        if (value := getattr(settings, name)) is not None:
            require_at_least_one(name, value)


def require_types(settings: object, cls: type | None = None) -> None:
    """Raise a ValueError that names the first field whose value has not the annotated type.

    Args:
        settings: a dataclass.
        cls: its base class, if only that one's fields are checked.
    """
    for name, hint in get_type_hints(cls or type(settings)).items():
        if not fits(value := getattr(settings, name), hint):
            raise ValueError(f"{name}: got {value!r}, expected {described(hint)}.")


def require_pattern(name: str, value: object) -> None:
    """Raise a ValueError unless ``value`` can be read as a regular expression."""
    try:
        re.compile(str(value))
    except re.error as error:
        raise ValueError(f"{name}: got {value!r}, expected a regular expression ({error}).") from error


def require_fields(values: dict[str, Any], cls: type, where: str, advice: str, numbers: tuple[str, ...] = ()) -> None:
    """Raise a ValueError that names the first value which a field of ``cls`` cannot hold.

    Fields of types that no text can give are left out. None passes where it stands for false.

    Args:
        values: of some fields, as JSON or YAML has them.
        where: place of the values, such as a path.
        numbers: fields that take any number, whatever their annotation says.
    """
    for name, hint in get_type_hints(cls).items():
        value = values.get(name)
        if name not in values or not is_plain(hint) or (value is None and hint not in (int, float)):
            continue
        if not fits(value, float if name in numbers else hint):
            raise ValueError(f"{where}: {name}: got {value!r}, expected {described(hint)}. {advice}")


def require_decay(value: float) -> None:
    """Raise a ValueError unless ``value`` can be alpha."""
    if not 0 < value <= 1:
        raise ValueError(f"aux_loss_decay (alpha): got {value}, expected 0 < alpha <= 1.")


def require_token_fraction(value: float, note: str = "") -> None:
    """Raise a ValueError unless ``value`` can be the share of positions that a step draws."""
    if not 0 < value <= 1:
        raise ValueError(f"aux_token_fraction (p): got {value}, expected 0 < p <= 1.{note}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON or YAML has the annotated type.

    A whole number counts as a float, true as no number. A choice of a ``Literal`` such as
    ``"pissa_niter_[number of iters]"`` stands for any text in the brackets.
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return any(_is_choice(value, choice) for choice in parts)
    if kind is list:
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if kind is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(fits, value, parts))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind in (bool, str, dict, NoneType) and isinstance(value, kind)


def parsed(name: str, text: str, hint: Any) -> Any:
    """The value that a text means; lists are JSON or items with commas, dicts are JSON.

    Raises:
        ValueError: if the text means no such value.
    """
    # One word is a list where both would do: PEFT takes a text for a regular expression.
    words = [word.strip() for word in text.split(",")]
    is_list = len(words) > 1 or re.fullmatch(r"\w+", text)
    for value in (*_json(text), *_json(f"[{text}]"), *([words] if is_list else []), text, words):
        if fits(value, hint):
            return value
    raise ValueError(f"{name}: got {text!r}, expected {described(hint)}.")


def _json(text: str) -> list[Any]:
    """The value of a JSON text, alone in a list that is empty for other texts."""
    try:
        return [json.loads(text.lower() if text in ("True", "False") else text)]
    except json.JSONDecodeError:
        return []


def is_plain(hint: Any) -> bool:
    """Whether text can give values of the annotated type."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType, list, tuple, dict):
        return all(is_plain(part) for part in parts)
    return kind in (Literal, bool, int, float, str, NoneType)


def described(hint: Any) -> str:
    """An annotated type in words, such as ``"a number"`` or ``"list[int] with commas ..."``."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(described(part) for part in parts if part is not NoneType)
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (list, dict):
        return f"{hint} with commas or as JSON" if kind is list else "a JSON object"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, str(hint))


def _is_choice(value: Any, choice: Any) -> bool:
    if not isinstance(choice, str) or "[" not in choice:
        return type(value) is type(choice) and value == choice
    pattern = ".+".join(map(re.escape, re.split(r"\[.*?\]", choice)))
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_own(error: BaseException) -> bool:
    """Whether code of this package raised the error, so that its message is for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == "peft_caft"
