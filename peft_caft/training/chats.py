"""A chat as the model reads it: its text, and the characters of it that the assistant says.

What TRL's SFTTrainer (1.16) does with ``assistant_only_loss=True`` is the reference. The assistant
says what the chat template puts between ``{% generation %}`` tags. Most templates have none. If TRL
is installed and knows the template, its variant for training is taken, as TRL does. TRL refuses
other templates; here the assistant says what an answer adds to the chat, from the end of the
generation prompt to the end of the turn.
"""

import json
import re
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
Span = tuple[int, int]  # first character, and the one after the last

# What some formats hold, and nothing here reads: field -> what to do.
UNSUPPORTED = {
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos"),
        "Rows are text alone: train with TRL's SFTTrainer and CAFTConfig.",
    ),
    "input_ids": "Rows of tokens are not read: give their text.",
    "functions": "Give 'tools'.",
    "documents": "Put them into 'chat_template_kwargs'.",
}
UNSUPPORTED_IN_MESSAGES = {
    "function_call": "Give 'tool_calls'.",
    "weight": 'Leave out the row, or set "last_answer_only": true.',
}
SET_HERE = (  # arguments of apply_chat_template that a row may not change
    *("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "add_generation_prompt", "continue_final_message"),
    "sanitize_control_tokens",
)
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "text-of-a-part"


def require_supported(row: Mapping[str, Any]) -> None:
    """Raise a ValueError that names a field which a row may not have, or not of that type."""
    for name, advice in UNSUPPORTED.items():
        if row.get(name):
            raise ValueError(f"{name}: rows with this field are not supported. {advice}")
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise ValueError(f"tools: got {shown(tools)}, which is not valid JSON ({error}).") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools: got {shown(tools)}, expected a list of JSON schemas, or its JSON as a string.")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs: got {shown(options)}, expected an object.")
    if taken := [name for name in options or {} if name in SET_HERE]:
        raise ValueError(
            f"chat_template_kwargs: {taken[0]} is decided by the command, expected it unset. Leave it out."
        )
    for name in ("complete", "last_answer_only"):
        if not isinstance(row.get(name, True), bool):
            raise ValueError(f"{name}: got {shown(row[name])}, expected true or false.")


def require_messages(messages: Any, field: str) -> None:
    """Raise a ValueError that names what is wrong unless ``messages`` is a chat."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{field}: got {shown(messages)}, expected a list of {{'role': ..., 'content': ...}}.")
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: got {shown(message)}, expected {{'role': ..., 'content': ...}}.")
        if not isinstance(message.get("role"), str):
            got = shown(message["role"]) if "role" in message else f"keys {sorted(message)} without it"
            raise ValueError(f"{where}.role: got {got}, expected a string.")
        for name, advice in {**UNSUPPORTED, **UNSUPPORTED_IN_MESSAGES}.items():
            if message.get(name) is not None and not (name == "weight" and message[name] == 1):
                raise ValueError(f"{where}.{name}: messages with this field are not supported. {advice}")
        _require_content(message, where)


def _require_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None:
        if not any(message.get(name) for name in INSTEAD_OF_CONTENT):
            got = "null" if "content" in message else f"keys {sorted(message)} without it"
            raise ValueError(f"{where}.content: got {got}, expected a string, or 'tool_calls' in its place.")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(
                    f"{where}.content[{number}]: got {shown(part)}, expected {{'type': 'text', 'text': ...}}; other parts, such as "
                    "images, are not supported."
                )
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: got {shown(content)}, expected a string, or a list of parts.")


def shown(value: Any) -> str:
    """A value as JSON, for a message: its first 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """``tools`` and ``chat_template_kwargs`` of a row, as arguments of the chat template."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools} | (row.get("chat_template_kwargs") or {})


def content_text(message: Message) -> str:
    """The text of a message, whose content may be null or a list of parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[str | list[Message], str | list[Message]]:
    """The prompt of a row that has one, and its last answer, each a text or messages."""
    if "completion" in row:
        return row["prompt"], row["completion"]
    last = max(index for index, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return row["messages"][:last], row["messages"][last : last + 1]


def rendered(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], **kwargs: Any
) -> str:
    """The text of a chat as the model reads it.

    Args:
        arguments: `template_arguments` of its row.
        kwargs: ``add_generation_prompt`` or ``continue_final_message``.

    Raises:
        ValueError: if there is no chat template, or it refuses the chat.
    """
    return _rendered(messages, tokenizer, arguments, **kwargs)[0]


def answers_in(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
    complete: bool = True,
    last_only: bool = False,
) -> tuple[str, list[Span]]:
    """The text of a chat, and the characters of what the assistant says.

    Args:
        arguments: `template_arguments` of its row.
        complete: False leaves the last message open, without the end of its turn.
        last_only: whether the last answer alone counts.

    Raises:
        ValueError: if there is no chat template, it refuses the chat, or answers cannot be told
            from the rest.
    """
    template = training_template(_template(tokenizer, arguments))
    arguments = {**arguments, "chat_template": template}
    cut_off = not complete and messages[-1]["role"] == "assistant"
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if GENERATION_TAG.search(template):
        text, spans = _rendered(messages, tokenizer, arguments)
        if last_only and answers[-1] > 0:
            spans = spans[len(_rendered(messages[: answers[-1]], tokenizer, arguments)[1]) :]
        if not any(start < end for start, end in spans):
            raise ValueError(
                "messages: the chat template's {% generation %} tags enclose none of the answers. Mend it."
            )
        if cut_off:
            whole, text = text, rendered(messages, tokenizer, arguments, continue_final_message=True)
            _require_start(whole, text)
            spans = [(start, min(end, len(text))) for start, end in spans]
        return text, spans
    text = rendered(messages, tokenizer, arguments, continue_final_message=cut_off)
    spans = []
    for index in answers[-1:] if last_only else answers:
        is_last = index == len(messages) - 1
        after = text if is_last else rendered(messages[: index + 1], tokenizer, arguments)
        if index == 0:
            start = _start_of_first(messages[:1], after, tokenizer, arguments)
        else:
            before = rendered(messages[:index], tokenizer, arguments, add_generation_prompt=True)
            _require_start(after, before)
            start = len(before)
        _require_start(text, after)
        spans.append((start, len(after)))
    return text, spans


@lru_cache(maxsize=8)
def training_template(template: str) -> str:
    """The chat template to train with: TRL's variant if TRL knows the template, else itself."""
    return template if GENERATION_TAG.search(template) else _variants_of_trl().get(template, template)


@cache
def _variants_of_trl() -> dict[str, str]:
    """Chat template -> its variant for training, as TRL pairs them; empty without TRL.

    As `trl.chat_template_utils.get_training_chat_template`, whose import takes seconds.
    """
    trl = find_spec("trl")
    if trl is None or trl.origin is None:
        return {}
    variants = Path(trl.origin).parent.glob("chat_templates/*_training.jinja")
    originals = ((path.with_name(path.name.replace("_training.", ".")), path) for path in variants)
    return {a.read_text(encoding="utf-8"): b.read_text(encoding="utf-8") for a, b in originals if a.is_file()}


def _start_of_first(
    first: list[Message], after: str, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> int:
    """Where the answer begins in a chat that the assistant begins: no prompt precedes it."""
    closed = rendered(first, tokenizer, arguments)
    asked = rendered(first, tokenizer, arguments, add_generation_prompt=True)
    _require_start(asked, closed)
    header = asked[len(closed) :]
    found = after.find(header)
    if found < 0:
        raise ValueError("messages: the chat begins with an answer, which the chat template does not show as one.")
    return found + len(header)


def _require_start(text: str, start: str) -> None:
    if not text.startswith(start):
        raise ValueError(
            "messages: the chat template rewrites earlier turns when a later one is added, so the answers cannot be told "
            "from the prompts. Give one answer a row, use 'prompt' and 'completion', or put {% generation %} tags into the "
            "template. With TRL installed, its variants for training are taken."
        )


def _template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> str:
    if tokenizer.chat_template is None and arguments.get("chat_template") is None:
        raise ValueError(
            "messages: the tokenizer has no chat template, expected one. Use rows with 'prompt' and 'completion', or "
            "the tokenizer of an instruct model."
        )
    return tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))


def _rendered(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], **kwargs: Any
) -> tuple[str, list[Span]]:
    """The text of a chat, and what stands between generation tags."""
    template = _template(tokenizer, arguments)
    for field, used in (
        ("tools", arguments.get("tools")),
        ("tool_calls", any(message.get("tool_calls") for message in messages)),
    ):
        if used and field not in template:
            warnings.warn(
                f"{field}: rows have some, but the tokenizer's chat template does not show them.", stacklevel=2
            )
    try:
        chat = _readable(messages, tokenizer, template)
        named = {**tokenizer.special_tokens_map, **arguments, "chat_template": template, **kwargs}
        marked = not kwargs and GENERATION_TAG.search(template) is not None
        texts, spans = render_jinja_template([chat], return_assistant_tokens_mask=marked, **named)
    except (TemplateError, TypeError) as error:  # a TypeError is a template's own, as where it adds null to a string
        raise ValueError(
            f"messages: the tokenizer's chat template refuses them: {error}. Change their roles or content."
        ) from error
    return texts[0], spans[0] if marked else []


def _readable(messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: str) -> list[Message]:
    """The messages with contents as the template reads them, text or parts, and without nulls."""
    joins = any(isinstance(m.get("content"), list) for m in messages) and not _reads(tokenizer, template, parts=True)
    wraps = not joins and not _reads(tokenizer, template, parts=False) and _reads(tokenizer, template, parts=True)
    chat = []
    for message in messages:
        message = {name: value for name, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, list):
            parts = [{name: value for name, value in part.items() if value is not None} for part in content]
            message["content"] = content_text(message) if joins else parts
        elif wraps and isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        chat.append(message)
    return chat


@lru_cache(maxsize=32)
def _reads(tokenizer: PreTrainedTokenizerBase, template: str, parts: bool) -> bool:
    """Whether a chat template shows the text of a content, which is a string or a list of parts."""
    content: Any = [{"type": "text", "text": PROBE}] if parts else PROBE
    probe = [{"role": "user", "content": content}]
    try:
        (text,), _ = render_jinja_template([probe], chat_template=template, **tokenizer.special_tokens_map)
    except (TemplateError, TypeError):
        return False
    return PROBE in text and not (parts and (str(content) in text or json.dumps(content) in text))
