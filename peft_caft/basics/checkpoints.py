"""Tokenizers and configurations, loaded with errors that name the option and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from .checks import is_own
from .file_names import CONFIG_NAME
from .hub_errors import file_of, first_line


@contextmanager
def readable(field: str, source: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises for files that it cannot use into one error.

    Readers raise anything for damaged files: KeyError, RecursionError, a bare Exception (tokenizers
    0.22). What this package raises itself, what says that a package is missing and what says that
    memory is, passes as it is.

    Args:
        field: name of the argument that gave ``source``.
        what: kind of files that was expected, such as ``"a tokenizer"``.

    Raises:
        OSError: if the library raised one.
        ValueError: for its other errors.
    """
    try:
        yield
    except Exception as error:
        if (
            isinstance(error, (ImportError, MemoryError))
            or type(error).__name__ == "OutOfMemoryError"
            or is_own(error)
        ):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{field}: {source!r} cannot be loaded as {what} ({type(error).__name__}: {first_line(error)}). If its files are damaged or of "
            "another kind, download or save them again."
        ) from error


def load_config(source: str, field: str = "model") -> Any:
    """The configuration of a model: folder, Hub id or a ``config.json`` itself.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: if there is none, as `file_of` says.
        OSError, ValueError: if transformers does not know it.
    """
    if not Path(source).is_file() and file_of(field, source, CONFIG_NAME) is None:
        raise FileNotFoundError(
            f"{field}: no {CONFIG_NAME} in {source!r}, expected one. Give a model folder or a Hub id of a model that is part of "
            "transformers."
        )
    with readable(field, source, "the configuration of a model"):
        return AutoConfig.from_pretrained(source)


def load_tokenizer(source: str, field: str = "model", **kwargs: Any) -> Any:
    """The tokenizer of a model, folder or Hub id; ``kwargs`` are those of ``AutoTokenizer``."""
    with readable(field, source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        tokenizer("a")  # which reads settings that loading does not
        return tokenizer


def require_fast(tokenizer: Any) -> None:
    """Raise a ValueError unless the tokenizer is fast: others do not tell where tokens lie."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, expected a fast one, which tells the characters of its tokens. Load it "
            "with AutoTokenizer, and save it once so that tokenizer.json is in the model's folder."
        )
