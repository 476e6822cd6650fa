"""JSONL rows: errors name file and line; only answers are supervised."""

from __future__ import annotations

import gzip
import json
import re
from codecs import BOM_UTF8

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from peft_caft.method.targets import IGNORE_INDEX
from peft_caft.training.data import collator, encode, read_jsonl

from ..support.commands import peft_caft
from ..support.tiny_checkpoint import tiny_tokenizer

CHAT = [
    {"role": "user", "content": "ethanol"},
    {"role": "assistant", "content": "CCO"},
    {"role": "user", "content": "propane"},
    {"role": "assistant", "content": "CCC"},
]


def supervised_text(row) -> str:
    return tiny_tokenizer().decode([label for label in row["labels"] if label != IGNORE_INDEX])


def test_only_the_assistants_words_are_supervised():
    (row,) = encode([{"messages": CHAT}], tiny_tokenizer(), 128).rows
    assert supervised_text(row) == "CCO</s>\nCCC</s>\n"
    assert tiny_tokenizer().decode(row["input_ids"]) == tiny_tokenizer().apply_chat_template(CHAT, tokenize=False)


def test_earlier_answers_of_somebody_else_are_not_learned():
    (row,) = encode([{"messages": CHAT, "last_answer_only": True}], tiny_tokenizer(), 128).rows
    assert supervised_text(row) == "CCC</s>\n"
    assert tiny_tokenizer().decode(row["input_ids"]) == tiny_tokenizer().apply_chat_template(CHAT, tokenize=False)


def test_a_token_that_spans_prompt_and_answer_is_supervised():
    """As in TRL, which tokenizes the whole chat at once."""
    tokenizer = tiny_tokenizer(["a\n\n"] * 9)  # two newlines become one token
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    messages = [*CHAT[:1], {"role": "assistant", "content": "\n\nCCO"}, *CHAT[2:]]
    (row,) = encode([{"messages": messages}], tokenizer, 128).rows
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX]) == "\n\n\nCCO</s>\nCCC</s>\n"
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]


def test_chat_that_the_template_refuses_is_named_by_its_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}"
    rows = [{"messages": [{"role": "system", "content": "be brief"}, *CHAT]}]
    with pytest.raises(
        ValueError, match=r"row 1: messages: the tokenizer's chat template refuses them: no system role"
    ):
        encode(rows, tokenizer, 128)


def test_prompt_is_context_and_completion_ends_the_text():
    (row,) = encode([{"prompt": "name: ", "completion": "CCO"}], tiny_tokenizer(), 128).rows
    assert supervised_text(row) == "CCO</s>"
    assert tiny_tokenizer().decode(row["input_ids"]) == "name: CCO</s>"


def test_no_end_is_learned_of_an_answer_that_was_cut_off():
    chat, completion = encode(
        [{"messages": CHAT, "complete": False}, {"prompt": "name: ", "completion": "CCO", "complete": False}],
        tiny_tokenizer(),
        128,
    ).rows
    assert supervised_text(chat) == "CCO</s>\nCCC"
    assert supervised_text(completion) == "CCO"


def test_all_of_a_text_is_supervised():
    (row,) = encode([{"text": "ethanol"}], tiny_tokenizer(), 128).rows
    assert row["labels"] == row["input_ids"]
    assert supervised_text(row) == "ethanol</s>"


def test_long_rows_are_cut_and_rows_without_answer_dropped_and_counted():
    rows = [{"prompt": "x" * 50, "completion": "CCO"}, {"prompt": "a", "completion": "C" * 50}, {"text": "CC"}]
    data = encode(rows, tiny_tokenizer(), 20)
    assert (len(data.rows), data.truncated, data.dropped) == (2, 2, 1)
    assert max(len(row["input_ids"]) for row in data.rows) == 20


def test_no_supervised_token_at_all_is_an_error():
    with pytest.raises(ValueError, match="max_length=5"):
        encode([{"prompt": "x" * 50, "completion": "CCO"}], tiny_tokenizer(), 5)


def test_batch_is_padded_right_and_padding_is_unsupervised():
    data = encode([{"text": "C"}, {"text": "CCCCO"}], tiny_tokenizer(), 20)
    batch = collator(tiny_tokenizer())(data.rows)
    short = len(data.rows[0]["input_ids"])
    assert batch["attention_mask"][0, short:].sum() == 0
    assert (batch["labels"][0, short:] == IGNORE_INDEX).all()
    assert batch["labels"][0, short - 1] == tiny_tokenizer().eos_token_id  # pad is eos here; the real one stays


def test_tokenizer_without_chat_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        encode([{"messages": CHAT}], tokenizer, 128)


def test_chat_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode([{"messages": CHAT}], tokenizer, 128)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not valid JSON"),
        ('["a"]', "got a list"),
        ('{"question": "a"}', "expected"),
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"prompt": "a", "completion": 3}', "completion: got 3, expected a string"),
        ('{"prompt": null, "completion": "a"}', "prompt: got null, expected a string"),
        ('{"prompt": [], "completion": []}', r"prompt: got \[\], expected a list of"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
            "completion.*string.*list|prompt.*as the other",
        ),
        ('{"text": null}', "text: got null, expected a string"),
        ('{"text": "a", "text": "b"}', "twice"),
        ('{"messages": "hello"}', 'messages: got "hello", expected a list'),
        ('{"messages": []}', r"messages: got \[\], expected a list"),
        ('{"messages": ["a"]}', r'messages\[0\]: got "a", expected'),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"messages: got the roles \['user'\], .*'assistant'"),
        ('{"messages": [{"content": "a"}]}', r"messages\[0\].role: got keys \['content'\] without it"),
        ('{"messages": [{"role": 3, "content": "a"}]}', r"messages\[0\].role: got 3"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\].content: got 3, expected a string"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\].content: got null, .*'tool_calls'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', r"messages\[0\].content\[0\]: got \"a\""),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "such as images, are not supported"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', r"got the roles \['human'\]"),
        ('{"text": "a", "tools": [{}]}', "tools: given in a row of plain text"),
        ('{"text": "a", "images": ["b.png"]}', "images: rows with this field are not supported"),
        ('{"input_ids": [1]}', "input_ids: .* give their text"),
        ('{"text": "a", "complete": "no"}', 'complete: got "no", expected true or false'),
        (
            '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
            r"messages\[0\].weight: .*last_answer_only",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": "{"}', "tools: .* not valid JSON"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": ["a"]}',
            "tools: .* expected a list of JSON schemas",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": {"tokenize": false}}',
            "chat_template_kwargs: tokenize is decided by the command",
        ),
    ],
)
def test_malformed_row_names_file_and_line(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'text': 'fine'})}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(path)
    assert "rows.jsonl, line 3" in str(error.value)


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": "\\ud800"}'], ids=["latin-1", "surrogate"])
def test_text_that_is_no_unicode_names_file_and_line(line, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: not valid"):
        read_jsonl(tmp_path / "data.jsonl")


ROW = b'{"text": "ethanol"}'


@pytest.mark.parametrize(
    "content",
    [
        *(BOM_UTF8 + ROW + b"\n" + ROW + b"\n", ROW + b"\r\n" + ROW + b"\r\n", ROW + b"\n \n\n" + ROW),
        ROW + b"\n" + BOM_UTF8 + ROW,
    ],
    ids=["byte order mark", "lines of Windows", "blank lines and no end of the last", "two files joined"],
)
def test_files_of_other_systems_are_read(content, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(content)
    assert read_jsonl(tmp_path / "data.jsonl") == [{"text": "ethanol"}] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got no rows"),
        (BOM_UTF8, "got no rows"),
        (ROW.decode().encode("utf-16"), "line 1: not valid UTF-8 .* UTF-16 and compressed files are not read"),
        (gzip.compress(ROW), "line 1: not valid UTF-8 .* compressed"),
        (b"[" + ROW + b"]", r"line 1: got a JSON array, expected JSONL.* jq -c '\.\[\]'"),
        (b"\n[\n" + ROW + b",\n" + ROW + b"\n]", "line 2: got a JSON array"),
        (b'{\n"text": "ethanol"\n}', "line 1: not valid JSON .* Expected one JSON object a line"),
        (ROW + b"\n" + b"3", "line 2: got a int"),
        (b'{"text": ' + b"[" * 100_000, "line 1: not valid JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    ],
    ids=[
        "empty",
        "a byte order mark alone",
        "UTF-16",
        "gzip",
        "array",
        "array over lines",
        "indented",
        "number",
        "deep",
        "long number",
    ],
)
def test_files_that_are_no_jsonl_are_named(content, message, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.jsonl[,:].*{message}|{message}") as error:
        read_jsonl(tmp_path / "data.jsonl")
    assert "data.jsonl" in str(error.value)


def test_empty_and_missing_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: got no rows"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("command", ["train", "train-heads", "concepts"])
def test_rows_beyond_the_positions_of_the_model_are_refused(command, tmp_path):
    model = str(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=2, n_head=2)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "ethanol butane " * 40}) + "\n", encoding="utf-8")
    data = str(tmp_path / "data.jsonl")
    options = ["--eval-data", data] if command == "train-heads" else ["--method", "lora"] if command == "train" else []
    output = peft_caft(
        command, "--model", model, "--data", data, "--output", str(tmp_path / "out"), *options, expect=1
    )
    assert re.search(r"max_length: got 512 and a row of \d+ tokens, expected at most 32, the model's context", output)
    assert not (tmp_path / "out").exists()
