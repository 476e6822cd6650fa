"""JSON, JSONL and YAML files, read with errors that name the file and what to do."""

import errno
import json
import os
import zipfile
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

MAX_BYTES = 2**28  # bytes of a JSON or YAML file; a larger one is another kind of file


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is such a file.

    Raises:
        ValueError: if the name is there, but of something else: a folder, a pipe, a broken link.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: expected a file, got a folder, a pipe or a broken link. Put the file in its place.")
    return os.path.isfile(path)


def read_json(path: str | os.PathLike, advice: str = "Write it again.") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        advice: the end of messages, which says what to do.

    Raises:
        OSError: if the file is not there or may not be read.
        ValueError: if it holds anything but one object in UTF-8, or a name twice.
    """
    return json_object(read_text(path, advice), str(path), advice)


def json_or_none(path: str | os.PathLike) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is no such file."""
    return read_json(path) if is_file(path) else None


def json_object(text: str | bytes, where: str, advice: str = "Write it again.") -> dict[str, Any]:
    """The object that a text is in JSON; errors name ``where`` the text stands.

    Raises:
        ValueError: if it is anything else, has a name twice, or holds what is no Unicode text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_names_once)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text
    except (ValueError, RecursionError) as error:  # besides JSONDecodeError: numbers of 4301 digits
        raise ValueError(f"{where}: not valid JSON ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_kind(value)}, expected a JSON object. {advice}")
    return value


def require_file(field: str, path: Path, expected: str) -> None:
    """Raise a FileNotFoundError that names the field unless there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} is not a file, expected {expected}.")


def json_lines(path: Path, limit: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("FILE, line N", object)`` for each of the first ``limit`` lines that are not blank.

    Raises:
        ValueError: if a line is not a JSON object in UTF-8 (a byte order mark is left out), naming
            file and line.
    """
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.removeprefix(BOM_UTF8).strip())
        for index, (number, line) in enumerate(islice(lines, limit)):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeError as error:
                raise ValueError(
                    f"{where}: not valid UTF-8 ({error}). Save the file as UTF-8; UTF-16 and compressed files are not read."
                ) from error
            if index == 0 and text.startswith("["):
                raise ValueError(
                    f"{where}: got a JSON array, expected JSONL: one JSON object a line. Write each element of the array on a "
                    "line of its own, for example with jq -c '.[]'."
                )
            yield where, json_object(text, where, "Expected one JSON object a line.")


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        OSError: if the file is not there or may not be read.
        ValueError: if it holds anything but one mapping in UTF-8, or a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses half characters, and keys that are there twice: YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _names_once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            value.encode()  # "\ud800" is YAML, but no text
            return value

    advice = "Mend the file."
    try:
        value = yaml.load(read_text(path, advice), Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {_kind(value)}, expected a mapping (key: value). {advice}")
    return value


@contextmanager
def understood(
    source: str | os.PathLike,
    writer: str = "this command",
    advice: str = "Remove that record, or pass --overwrite to begin anew.",
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn the errors of values of another kind, in records read from ``source``, into one.

    Args:
        writer: what writes such records.
        also: further errors that mean the same, such as the ValueError of a format.

    Raises:
        ValueError: for errors that Python raises where a value is missing or of another type.
    """
    kinds: tuple[type[Exception], ...] = (LookupError, AttributeError, TypeError, ArithmeticError, *also)
    try:
        yield
    except kinds as error:
        raise ValueError(
            f"{source}: a value has another kind than {writer} records ({type(error).__name__}: {error}). {advice}"
        ) from error


def require_whole_archive(path: str | os.PathLike, must_be: bool = False) -> None:
    """Raise a ValueError if a zip archive, as torch writes them, has a sum that does not agree.

    torch.load takes the bytes as they are. Files that are no archives pass unless they ``must_be``.
    The disk's own errors pass as they are.
    """
    if must_be or zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception as error:  # zipfile and its decompressors have a dozen kinds
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise ValueError(f"{path}: damaged ({error}). Get or write the file again.") from error
        if damaged is not None:
            raise ValueError(f"{path}: damaged, the sum of {damaged} does not agree. Get or write the file again.")


def read_text(path: str | os.PathLike, advice: str = "Write it again.") -> str:
    """The text of a file in UTF-8; ``advice`` ends the messages.

    Raises:
        OSError: if the file is not there or may not be read.
        ValueError: if it is not UTF-8, or too large for a text that is meant.
    """
    try:
        if is_file(path) and os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"{path}: got {os.path.getsize(path):,} bytes, expected at most {MAX_BYTES:,}. {advice}")
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). {advice}") from error
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error.strerror}). {advice}") from error


def _names_once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object of these pairs. JSON and YAML would take the last of two values of one name."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
