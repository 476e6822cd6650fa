"""Prompts for `peft-caft distill`: from JSONL or a dataset, read with errors that name file and line, turned into tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

PROMPT_FORMS = "{'prompt': '...'} or {'messages': [{'role': 'user', 'content': '...'}, ...]}"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        index: number of its row in the source, from 0, blank lines not counted.
        messages: the chat so far, for a tokenizer with a chat template; else None.
        text: plain text, for one without; else None.
        input_ids: what the model reads.
    """

    index: int
    messages: list[dict[str, str]] | None
    text: str | None
    input_ids: list[int]

    def row(self, answer: str) -> dict[str, Any]:
        """The row of training data that this prompt and its answer make."""
        if self.messages is not None:
            return {"messages": [*self.messages, {"role": "assistant", "content": answer}]}
        return {"prompt": self.text, "completion": answer}


def read_prompt_rows(path: str | Path) -> list[tuple[str, Any]]:
    """Rows of a JSONL file with where each stands (file and line), for `prepare_prompts`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a line is not JSON, or if the file has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} is not a file, expected a JSONL file with rows {PROMPT_FORMS}.")
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    rows.append((where, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not valid JSON ({error}). Expected one JSON object a line.") from error
    if not rows:
        raise ValueError(f"{path}: got no rows, expected at least one of the form {PROMPT_FORMS}.")
    return rows


def prepare_prompts(
    rows: list[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, system: str | None = None
) -> tuple[list[Prompt], int]:
    """Turn rows into prompts as the model reads them; of equal ones, the first is kept.

    A string becomes a user message where the tokenizer has a chat template. Assistant messages at the end of a chat are cut
    off, because the model answers itself.

    Args:
        rows: as `read_prompt_rows` gives them.
        system: system message for chats that have none.

    Returns:
        the prompts and the number of duplicates left out.

    Raises:
        ValueError: naming the row, if it is of another form; or if a chat or a system message meets a tokenizer without
            chat template.
    """
    has_template = tokenizer.chat_template is not None
    if system is not None and not has_template:
        raise ValueError(
            f"system: got {system!r}, but the tokenizer has no chat template, expected one. Drop --system."
        )
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for index, (where, row) in enumerate(rows):
        chat_or_text = _chat_or_text(row, where)
        if isinstance(chat_or_text, str) and has_template:
            chat_or_text = [{"role": "user", "content": chat_or_text}]
        elif not isinstance(chat_or_text, str) and not has_template:
            raise ValueError(
                f"{where}: messages: the tokenizer has no chat template, expected one. Use rows with 'prompt', or an "
                "instruct model."
            )
        if isinstance(chat_or_text, list) and system is not None and chat_or_text[0]["role"] != "system":
            chat_or_text = [{"role": "system", "content": system}, *chat_or_text]
        key = json.dumps(chat_or_text)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(chat_or_text, str):
            prompts.append(Prompt(index, None, chat_or_text, tokenizer(chat_or_text)["input_ids"]))
        else:
            input_ids = tokenizer.apply_chat_template(
                chat_or_text, tokenize=True, return_dict=True, add_generation_prompt=True
            )["input_ids"]
            prompts.append(Prompt(index, chat_or_text, None, input_ids))
    return prompts, len(rows) - len(prompts)


def _chat_or_text(row: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise ValueError(f"{where}: messages: expected a list of {{'role': ..., 'content': ...}} with strings.")
        end = len(messages)
        while end and messages[end - 1]["role"] == "assistant":
            end -= 1
        if not end or all(m["role"] == "system" for m in messages[:end]):
            raise ValueError(f"{where}: messages: expected a message of the user for the model to answer.")
        return [{"role": m["role"], "content": m["content"]} for m in messages[:end]]
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        if not row["prompt"].strip():
            raise ValueError(f"{where}: prompt: got {row['prompt']!r}, expected text. Drop the row.")
        return row["prompt"]
    got = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise ValueError(f"{where}: got {got}, expected {PROMPT_FORMS}.")
