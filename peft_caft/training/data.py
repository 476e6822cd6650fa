"""Reads rows of JSONL training data, and turns them into supervised tokens.

A row has one of three forms:

- ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``:
  the tokenizer's chat template is applied, and the loss is on what the assistant says;
- ``{"prompt": "...", "completion": "..."}``: plain text, the loss is on the completion and its end;
- ``{"text": "..."}``: the loss is on every token.

``"complete": false`` says that the row's last answer was cut off when it was generated, so that its
end is not learned (`peft-caft distill` writes it). ``"last_answer_only": true`` leaves earlier
answers of a chat unsupervised, because the model did not give them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ..method.targets import IGNORE_INDEX

FORMS = "{'messages': [...]}, {'prompt': ..., 'completion': ...} or {'text': ...}"


@dataclass(frozen=True)
class EncodedData:
    """Rows ready for a trainer.

    Attributes:
        rows: ``{"input_ids": list[int], "labels": list[int]}``; unshifted, -100 if unsupervised.
        truncated: number of rows that were cut to the maximal length.
        dropped: number of rows that were left out, without a supervised token.
    """

    rows: list[dict[str, list[int]]]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for row in self.rows for label in row["labels"])

    def describe(self) -> str:
        text = f"{len(self.rows):,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised"
        if self.truncated or self.dropped:
            text += f" ({self.truncated:,} rows truncated, {self.dropped:,} dropped)"
        return text


def read_jsonl(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a JSONL file, all if None; blank lines do not count.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no row, or a line is no row of a known form, naming file and line.
    """
    path = Path(path)
    require_file("data", path, f"a JSONL file with rows of the form {FORMS}")
    rows = [_row(value, where) for where, value in json_lines(path, limit)]
    if not rows:
        raise ValueError(f"{path}: got no rows, expected at least one of the form {FORMS}.")
    return rows


def require_file(field: str, path: Path, expected: str) -> None:
    """Raise a FileNotFoundError that names the field unless there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} is not a file, expected {expected}.")


def json_lines(path: Path, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``("FILE, line N", value)`` for each of the first ``limit`` lines that are not blank.

    Raises:
        ValueError: if a line is not JSON in UTF-8, naming file and line.
    """
    with open(path, "rb") as file:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(file, start=1) if line.strip())
        for where, line in islice(lines, limit):
            try:
                value = json.loads(line.decode("utf-8"))
                json.dumps(value, ensure_ascii=False).encode("utf-8")  # "\\ud800" is JSON, but not text
            except UnicodeError as error:
                raise ValueError(f"{where}: not valid UTF-8 ({error}). Save the file as UTF-8.") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error}). Expected one JSON object a line.") from error
            yield where, value


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a {type(row).__name__}, expected an object of the form {FORMS}.")
    if "messages" in row:
        if not is_chat(row["messages"]) or not any(m["role"] == "assistant" for m in row["messages"]):
            raise ValueError(
                f"{where}: messages: expected a list of {{'role': ..., 'content': ...}} with string values, at least "
                "one of role 'assistant'."
            )
        return row
    needed = ("prompt", "completion") if {"prompt", "completion"} & row.keys() else ("text",)
    wrong = [name for name in needed if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"{where}: got keys {sorted(row)}, expected {FORMS} with strings; {wrong[0]!r} is missing.")
    return row


def is_chat(value: Any) -> bool:
    """Whether ``value`` is a list of ``{"role": ..., "content": ...}`` with string values."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def encode(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool = False
) -> EncodedData:
    """Tokenize the rows that `read_jsonl` returned, and mark what is supervised.

    Args:
        tokenizer: needs an end-of-text token, and a chat template if rows have ``messages``.
        max_length: longest row in tokens; longer rows lose their end.

    Raises:
        ValueError: if the chat template is missing, refuses or rewrites the messages of a row,
            naming the row; or if no row has a supervised token left.
    """
    encoded, truncated, dropped = [], 0, 0
    bar = tqdm(rows, desc="Tokenizing", unit=" rows", leave=False, mininterval=1, disable=quiet)
    for number, row in enumerate(bar, start=1):
        try:
            input_ids, labels = encode_row(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        truncated += len(input_ids) > max_length
        input_ids, labels = input_ids[:max_length], labels[:max_length]
        if any(label != IGNORE_INDEX for label in labels[1:]):
            encoded.append({"input_ids": input_ids, "labels": labels})
        else:
            dropped += 1
    require_supervised(encoded, rows, max_length)
    return EncodedData(encoded, truncated, dropped)


def require_supervised(kept: Sequence[Any], rows: Sequence[Any], max_length: int) -> None:
    """Raise a ValueError if no row was kept, because none has a supervised token."""
    if not kept:
        raise ValueError(
            f"data: none of {len(rows)} rows has a supervised token within max_length={max_length} tokens, expected at "
            "least one. Raise max_length or check that the answers are not empty."
        )


def encode_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of one whole row, and its labels: unshifted, -100 where unsupervised."""
    complete = row.get("complete", True)
    if "messages" in row:
        return _encode_chat(row["messages"], tokenizer, complete, row.get("last_answer_only", False))
    if "text" in row:
        input_ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        return input_ids, list(input_ids)
    # Prompt and answer are tokenized apart, since at inference the prompt's tokens are fixed first.
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    if complete:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer


def _encode_chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, complete: bool, last_only: bool
) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "messages: the tokenizer has no chat template, expected one. Use rows with 'prompt' and 'completion', or "
            "the tokenizer of an instruct model."
        )
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    text = ""
    input_ids: list[int] = []
    labels: list[int] = []
    for index in answers[-1:] if last_only else answers:
        cut_off = not complete and index == len(messages) - 1
        before = rendered(messages[:index], tokenizer, add_generation_prompt=True)
        after = rendered(messages[: index + 1], tokenizer, continue_final_message=cut_off)
        if not before.startswith(text) or not after.startswith(before):
            raise ValueError(
                "messages: the chat template rewrites earlier turns when a later one is added, so the answers cannot "
                "be told from the prompts. Give one answer a row, or use 'prompt' and 'completion'."
            )
        for longer, supervised in ((before, False), (after, True)):
            added = _tokens_after(input_ids, text, longer, tokenizer)
            labels += added if supervised else [IGNORE_INDEX] * len(added)
            input_ids, text = input_ids + added, longer
    return input_ids, labels


def _tokens_after(input_ids: list[int], text: str, longer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that ``longer`` adds to ``text``, whose tokens are ``input_ids``."""
    whole = tokenizer(longer, add_special_tokens=False)["input_ids"]
    if whole[: len(input_ids)] == input_ids:
        return whole[len(input_ids) :]
    # A token spans both, for example white space at the end of the prompt and the start of the
    # answer. At inference the prompt's tokens are fixed before the first token of the answer.
    return tokenizer(longer[len(text) :], add_special_tokens=False)["input_ids"]


def rendered(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """The text of a chat as the model reads it, or a ValueError if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        raise ValueError(
            f"messages: the tokenizer's chat template refuses them: {error}. Change their roles."
        ) from error


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Collator that pads rows on the right to int64 ``(batch, tokens)``; padded labels are -100."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)
