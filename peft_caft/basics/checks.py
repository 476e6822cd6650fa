"""Checks of values that a user gives; each error names the field, what came and what was expected."""


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}.")


def require_token_fraction(value: float, note: str = "") -> None:
    """Raise a ValueError unless ``value`` can be the share of positions that a step draws."""
    if not 0 < value <= 1:
        raise ValueError(f"aux_token_fraction (p): got {value}, expected 0 < p <= 1.{note}")
