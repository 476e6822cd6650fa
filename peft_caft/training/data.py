"""Reads rows of JSONL training data, and turns them into supervised tokens.

A row has one of three forms:

- ``{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}``:
  the tokenizer's chat template is applied, and the loss is on what the assistant says;
- ``{"prompt": "...", "completion": "..."}``: text, or lists of messages; the loss is on the
  completion, up to its end;
- ``{"text": "..."}``: the loss is on every token.

In chats, ``"tools"`` (a list, or its JSON) and ``"chat_template_kwargs"`` go to the chat template,
and so does all that a message holds, such as ``tool_calls`` and ``name``. A content may be a list
of ``{"type": "text", "text": "..."}``, and null in a message with ``tool_calls``.

Tokens and mask of a row are those of TRL's SFTTrainer (1.16), with ``assistant_only_loss`` for
``messages``. It departs from TRL where that would train on what nobody meant:

- a tokenizer that appends the end of text by itself gives one at the end, and not two;
- a content goes to the chat template in the form that it reads, a string or a list of text parts,
  where the other would be printed as a list or left out;
- an answer is supervised as a whole, also where it begins with white space that the tokenizer
  leaves out of its ranges, or ends with a character of several tokens;
- a row whose only supervised token is its first is left out, since nothing predicts that token.

Two fields are this package's own. ``"complete": false`` says that the row's last answer was cut off
when it was generated, so that its end is not learned (`peft-caft distill` writes it).
``"last_answer_only": true`` leaves earlier answers of a chat unsupervised, because the model did
not give them.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, PreTrainedConfig, PreTrainedTokenizerBase

from ..basics.checkpoints import require_fast
from ..basics.reading import json_lines, require_file
from ..method.targets import IGNORE_INDEX
from .chats import Message, Span, answers_in, rendered, require_messages, require_supported, shown, template_arguments
from .generation import context_length

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
        ValueError: if there is no row, or a line is no row of a known form, naming file, line and
            field.
    """
    path = Path(path)
    require_file("data", path, f"a JSONL file with rows of the form {FORMS}")
    rows = [_row(value, where) for where, value in json_lines(path, limit)]
    if not rows:
        raise ValueError(f"{path}: got no rows, expected at least one of the form {FORMS}.")
    return rows


def _row(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        if "conversations" in row and "messages" not in row:
            row = {**row, "messages": _renamed(row["conversations"])}
        require_supported(row)
        if "completion" in row or ("prompt" in row and "messages" not in row):
            _require_prompt_and_completion(row)
        elif "messages" in row:
            require_messages(row["messages"], "messages")
            roles = [message["role"] for message in row["messages"]]
            if "assistant" not in roles:
                raise ValueError(
                    f"messages: got the roles {roles}, expected at least one message of role 'assistant'."
                )
        else:
            _require_text(row, "text")
        if not any(isinstance(row.get(name), list) for name in ("messages", "prompt")):
            for name in ("tools", "chat_template_kwargs"):
                if row.get(name):
                    raise ValueError(
                        f"{name}: given in a row of plain text, which has no chat template. Give 'messages'."
                    )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def _renamed(conversation: Any) -> Any:
    """A chat whose messages have ``from`` and ``value``, with the usual names, as TRL reads it."""
    names = {"from": "role", "value": "content"}
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        return conversation
    return [{names.get(name, name): value for name, value in message.items()} for message in conversation]


def _require_prompt_and_completion(row: dict[str, Any]) -> None:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        for name in ("prompt", "completion"):
            require_messages(row[name], name)
    else:
        for name in ("prompt", "completion"):
            _require_text(row, name, " as the other field is" if isinstance(row.get(name), list) else "")


def _require_text(row: dict[str, Any], name: str, why: str = "") -> None:
    if name not in row:
        raise ValueError(f"{name!r} is missing: got keys {sorted(row)}, expected {FORMS}.")
    if not isinstance(row[name], str):
        raise ValueError(f"{name}: got {shown(row[name])}, expected a string{why}.")


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


def require_positions(rows: Sequence[dict[str, list[int]]], config: PreTrainedConfig, max_length: int) -> None:
    """Raise a ValueError if a row of `encode` is longer than the model's context."""
    context, longest = context_length(config), max((len(row["input_ids"]) for row in rows), default=0)
    if longest > context:
        raise ValueError(
            f"max_length: got {max_length:,} and a row of {longest:,} tokens, expected at most {context:,}, the model's context. "
            f"Pass --max-length {context}, which cuts longer rows, or shorten them."
        )


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
    if "completion" in row:
        prompt = asked(row["prompt"], tokenizer, row)
        if isinstance(row["prompt"], str):
            completion = _ended(row["completion"], tokenizer) if complete else row["completion"]
            input_ids = _tokens(row["prompt"] + completion, tokenizer)
        else:
            chat = row["prompt"] + row["completion"]
            text = rendered(chat, tokenizer, template_arguments(row), continue_final_message=not complete)
            input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # Perhaps less than the prompt: a token may span the seam, or the template show it anew.
        pairs = enumerate(zip(prompt, input_ids, strict=False))
        common = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(input_ids)))
        return input_ids, [IGNORE_INDEX] * common + input_ids[common:]
    if "messages" in row:
        last_only = row.get("last_answer_only", False)
        text, answers = answers_in(row["messages"], tokenizer, template_arguments(row), complete, last_only)
        return _tokens_with_labels(text, answers, tokenizer)
    input_ids = _tokens(_ended(row["text"], tokenizer), tokenizer)
    return input_ids, list(input_ids)


def asked(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt, text or a chat, after which the model answers.

    Args:
        row: holds ``tools`` and ``chat_template_kwargs`` if there are any.
    """
    if isinstance(prompt, str):
        return _tokens(prompt, tokenizer)
    text = rendered(prompt, tokenizer, template_arguments(row), add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text as the tokenizer makes them, without an end of text that it appends."""
    input_ids = tokenizer(text)["input_ids"]
    with_specials, without = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    appends = with_specials[-1:] == [tokenizer.eos_token_id] != without[-1:]
    return input_ids[:-1] if appends else input_ids


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the tokenizer's end of text, once."""
    if tokenizer.eos_token is None:
        raise ValueError(
            'eos_token: the tokenizer has none, expected an end of text to learn. Set "eos_token" in tokenizer_config.json of the '
            "model's folder, or use rows of 'messages', whose ends the chat template writes."
        )
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def _tokens_with_labels(
    text: str, supervised: list[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens of a rendered chat; a token of which one character is supervised is supervised."""
    require_fast(tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels, begun = [], 0
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        # Some tokenizers leave white space at the start of a token out of its range.
        start, begun = min(start, begun), end
        labels.append(token if any(start < b and a < end for a, b in supervised) else IGNORE_INDEX)
    return found["input_ids"], labels


def tokens_sha256(rows: Iterable[dict[str, list[int]]]) -> str:
    """Hex digest of the tokens and labels of encoded rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([row["input_ids"], row["labels"]], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Collator that pads rows on the right to int64 ``(batch, tokens)``; padded labels are -100.

    Raises:
        ValueError: if the tokenizer has neither a token for padding nor an end of text.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "pad_token: the tokenizer has neither pad_token nor eos_token, expected one to pad rows with. Set "
                '"pad_token" in tokenizer_config.json of the model\'s folder to any of its tokens.'
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)
