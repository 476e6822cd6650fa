"""Prompts for `peft-caft distill`, read from JSONL or a dataset and turned into tokens."""

import hashlib
import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..basics.files import file_sha256
from ..basics.reading import json_lines, require_file
from .chats import UNSUPPORTED, Message, require_messages, require_supported, shown
from .data import asked

DATASET = "hf:"
ARGUMENTS = ("tools", "chat_template_kwargs")  # fields that go to the chat template
PROMPT_FORMS = "{'prompt': '...'} or {'messages': [{'role': 'user', 'content': '...'}, ...]}"


@dataclass(frozen=True)
class Prompt:
    """One prompt: ``messages`` if the tokenizer has a chat template, else ``text``.

    Attributes:
        index: number of its row in the source, from 0; blank lines do not count.
        messages: the chat so far.
        arguments: the row's ``tools`` and ``chat_template_kwargs``, if any.
    """

    index: int
    messages: list[Message] | None
    text: str | None
    input_ids: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)

    def row(self, answer: str) -> dict[str, Any]:
        """The row of training data with this prompt and its answer."""
        if self.messages is not None:
            row = {**self.arguments, "messages": [*self.messages, {"role": "assistant", "content": answer}]}
            if any(message["role"] == "assistant" for message in self.messages):
                row["last_answer_only"] = True  # the earlier answers are not this model's own
            return row
        return {"prompt": self.text, "completion": answer}


@dataclass(frozen=True)
class PromptRows:
    """Rows of a source of prompts.

    Attributes:
        rows: ``("FILE, line N", row)`` for each row.
        name: the source without the path to it.
        sha256: hash of the file, or of the rows that were read from a dataset.
    """

    rows: list[tuple[str, Any]]
    name: str
    sha256: str


def read_prompts(
    source: str, split: str | None = None, column: str | None = None, limit: int | None = None
) -> PromptRows:
    """Read prompts from a JSONL file, or from a dataset with the library ``datasets``.

    Args:
        source: path of a JSONL file; or ``hf:NAME`` or ``hf:NAME:CONFIG``, where NAME is a dataset
            on the Hub, a folder of data files, or a folder that ``Dataset.save_to_disk`` wrote.
        split: split of a dataset; ``"train"`` if None.
        column: field with the prompt or the chat; None takes ``messages`` or ``prompt``.
        limit: largest number of rows to read; None reads all.

    Raises:
        FileNotFoundError: if there is no such file or dataset.
        ModuleNotFoundError: if ``datasets`` is needed and not installed.
        ValueError: if there is no row, or one lacks the column, naming file and line.
    """
    if source.startswith(DATASET):
        result = _read_dataset(source, split or "train", column, limit)
    elif split is not None:
        raise ValueError(f"split: got {split!r} for the file {source}, expected it unset. Datasets are named hf:NAME.")
    else:
        path = Path(source)
        require_file("prompts", path, f"JSONL with rows {PROMPT_FORMS}, or hf:NAME for a dataset")
        rows = [(where, _renamed(value, column, where)) for where, value in json_lines(path, limit)]
        result = PromptRows(rows, path.name, file_sha256(path))
    if not result.rows:
        raise ValueError(f"prompts: got no rows in {source}, expected at least one of the form {PROMPT_FORMS}.")
    return result


def _read_dataset(source: str, split: str, column: str | None, limit: int | None) -> PromptRows:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"prompts: {source} needs the library datasets. Run `pip install 'peft-caft[datasets]'`, or give a JSONL file."
        ) from error
    name = source.removeprefix(DATASET)
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(splits)}, the splits of {source}.")
        data = splits[split]
    elif (folder / "state.json").is_file():
        data = datasets.load_from_disk(name)
    elif folder.is_dir():
        data = datasets.load_dataset(name, split=split)
    else:
        name, _, config = name.partition(":")
        data = datasets.load_dataset(name, config or None, split=split)
    column = column or next((name for name in ("messages", "prompt") if name in data.column_names), None)
    if column not in data.column_names:
        raise ValueError(
            f"column: got {column!r}, expected one of {', '.join(data.column_names)}, the columns of {source}. Pass --column."
        )
    known = {*ARGUMENTS, *UNSUPPORTED, column}
    columns = [name for name in data.column_names if name in known]
    named = ((f"{source}, row {number}", row) for number, row in enumerate(data.select_columns(columns)))
    rows = [(where, _renamed(row, column, where)) for where, row in islice(named, limit)]
    digest = hashlib.sha256(json.dumps([row for _, row in rows]).encode()).hexdigest()
    return PromptRows(rows, f"{DATASET}{folder.name}" if folder.is_dir() else source, digest)


def _renamed(row: Any, column: str | None, where: str) -> Any:
    """The row with the column under its usual name, ``prompt`` or ``messages``."""
    if column is None:
        return row
    if column not in row:
        raise ValueError(
            f"{where}: column {column!r}: expected one of the row's fields, {sorted(row)}. Pass --column."
        )
    if not isinstance(row[column], (str, list)):
        raise ValueError(
            f"{where}: column {column!r}: got {shown(row[column])}, expected a string or a list of messages."
        )
    others = {name: value for name, value in row.items() if name not in (column, "prompt", "messages")}
    return {**others, "prompt" if isinstance(row[column], str) else "messages": row[column]}


def prepare_prompts(
    rows: list[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> tuple[list[Prompt], int]:
    """Turn `PromptRows` into prompts as the model reads them. Of equal ones the first is kept.

    A string becomes a user message where the tokenizer has a chat template. Assistant messages at
    the end of a chat are cut off, because the model is to answer.

    Args:
        system: system message for chats that have none; None adds none.

    Returns:
        the prompts, and the number of duplicates that were left out.

    Raises:
        ValueError: if a row has another form, or there is no chat template for a chat.
    """
    has_template = tokenizer.chat_template is not None
    if system is not None and not has_template:
        raise ValueError(f"system: got {system!r}, expected none: the tokenizer has no chat template. Drop --system.")
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index, (where, row) in enumerate(rows):
        chat_or_text = _chat_or_text(row, where)
        if isinstance(chat_or_text, str) and has_template:
            chat_or_text = [{"role": "user", "content": chat_or_text}]
        elif not isinstance(chat_or_text, str) and not has_template:
            raise ValueError(
                f"{where}: messages: the tokenizer has no chat template, expected one. Use rows with 'prompt', or an instruct model."
            )
        if isinstance(chat_or_text, list) and system is not None and chat_or_text[0]["role"] != "system":
            chat_or_text = [{"role": "system", "content": system}, *chat_or_text]
        arguments = {name: row[name] for name in ARGUMENTS if row.get(name)}
        if arguments and isinstance(chat_or_text, str):
            raise ValueError(
                f"{where}: {', '.join(arguments)}: the tokenizer has no chat template, expected one. Leave it out."
            )
        key = json.dumps([chat_or_text, arguments])
        if key in seen:
            continue
        seen.add(key)
        try:
            input_ids = asked(chat_or_text, tokenizer, arguments)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if isinstance(chat_or_text, str):
            prompts.append(Prompt(index, None, chat_or_text, input_ids))
        else:
            prompts.append(Prompt(index, chat_or_text, None, input_ids, arguments))
    return prompts, len(rows) - len(prompts)


def _chat_or_text(row: dict[str, Any], where: str) -> str | list[Message]:
    name = "messages" if "messages" in row else "prompt"
    if name not in row:
        raise ValueError(f"{where}: got keys {sorted(row)}, expected {PROMPT_FORMS}.")
    try:
        require_supported(row)
        if not isinstance(row[name], str) or name == "messages":
            require_messages(row[name], name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(row[name], str):
        if not row[name].strip():
            raise ValueError(f"{where}: prompt: got {row[name]!r}, expected text. Drop the row.")
        return row[name]
    # A dataset's rows hold null where other rows have a field.
    messages = [{key: value for key, value in message.items() if value is not None} for message in row[name]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if all(message["role"] == "system" for message in messages):
        raise ValueError(f"{where}: {name}: expected a message of the user for the model to answer.")
    return messages
