"""Each row gets the tokens and the mask that TRL's own SFTTrainer gives it, prepared by TRL itself."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import trl.chat_template_utils
from datasets import IterableDataset
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import GPT2Config
from trl import SFTConfig, SFTTrainer

from peft_caft.concepts.alignment import align
from peft_caft.evaluation.reference_losses import encode_answers
from peft_caft.method.targets import IGNORE_INDEX
from peft_caft.training.chats import training_template
from peft_caft.training.data import collator, encode, encode_row, read_jsonl, require_positions
from peft_caft.training.prompts import prepare_prompts, read_prompts

from ..support.tiny_checkpoint import tiny_llama, tiny_tokenizer

TRLS = Path(trl.chat_template_utils.__file__).parent / "chat_templates"
KNOWN = sorted(path.name.removesuffix("_training.jinja") for path in TRLS.glob("*_training.jinja"))


def of_trl(name: str) -> str:
    return (TRLS / f"{name}.jinja").read_text(encoding="utf-8")


def tagged(header: str, answer: str, other: str, start: str = "", end: str = "") -> tuple[str, str]:
    """A chat template without generation tags, and the same with them around the answer."""
    loop = "{%% for m in messages %%}{%% if m['role'] == 'assistant' %%}%s%s{%% else %%}%s{%% endif %%}{%% endfor %%}"
    marked = f"{{% generation %}}{answer}{{% endgeneration %}}"
    plain, with_tags = (start + loop % (header, inner, other) + end for inner in (answer, marked))
    return plain, with_tags


ASKS = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}CALL {{ c | tojson }}{% endfor %}"
NAMED = "<s>{{ m['role'] }}{% if m['name'] %} {{ m['name'] }}{% endif %}\n{{ m['content'] }}</s>\n"
TOOLS = "{% for tool in tools or [] %}<s>TOOL {{ tool | tojson }}</s>\n{% endfor %}{% if think %}THINK{% endif %}"
PARTS = "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<s>system\nYou are helpful.</s>\n{% endif %}"
TEMPLATES = {
    "chatml": tagged("<s>assistant\n", "{{ m['content'] }}</s>\n", NAMED, end=ASKS),
    "chatml, default system message": tagged("<s>assistant\n", "{{ m['content'] }}</s>\n", NAMED, DEFAULT_SYSTEM, ASKS),
    "tools": tagged("<s>assistant\n", "{{ m['content'] }}" + CALLS + "</s>\n", NAMED, TOOLS, ASKS),
    "parts": tagged(
        "<s>assistant\n", PARTS + "</s>\n", NAMED.replace("{{ m['content'] }}", PARTS), end=ASKS
    ),
    "llama": tagged(
        "<s>assistant<s>\n\n", "{{ m['content'] | trim }}</s>", "<s>{{ m['role'] }}<s>\n\n{{ m['content'] | trim }}</s>",
        "{{ bos_token }}", "{% if add_generation_prompt %}<s>assistant<s>\n\n{% endif %}",
    ),
    "gemma, without system": tagged(
        "<s>model\n", "{{ m['content'] | trim }}</s>\n",
        "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n",
        "{{ bos_token }}", "{% if add_generation_prompt %}<s>model\n{% endif %}",
    ),
    "mistral": tagged(
        "", " {{ m['content'] }}{{ eos_token }}",
        "{% if m['role'] == 'system' %}[INST] {{ m['content'] }} [/INST]{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}",
        "{{ bos_token }}",
    ),
}  # fmt: skip

SCHEMA = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"x": {}}}},
}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"x": 1}}}


def user(text, **more) -> dict:
    return {"role": "user", "content": text} | more


def said(text, **more) -> dict:
    return {"role": "assistant", "content": text} | more


CHATS = {
    "one answer": {"messages": [user("name ethanol"), said("CCO")]},
    "two answers": {"messages": [user("ethanol"), said("CCO"), user("propane"), said("CCC")]},
    "system message": {"messages": [{"role": "system", "content": "be brief"}, user("ethanol"), said("CCO")]},
    "begun by the assistant": {"messages": [said("hello"), user("ethanol"), said("CCO")]},
    "ended by the user": {"messages": [user("ethanol"), said("CCO"), user("thanks")]},
    "two answers in a row": {"messages": [user("ethanol"), said("CCO"), said("or C2H6O")]},
    "white space": {"messages": [user(" ethanol "), said("\n\n  CCO \n"), user("\t"), said(" CCC")]},
    "special tokens in the text": {"messages": [user("what is </s> and <s>assistant\n?"), said("an end: </s>, so")]},
    "no ASCII": {"messages": [user("naïve 你好 🎉"), said("🎉 ça"), user("e\u0301"), said("好🎉")]},
    "empty answer": {"messages": [user("ethanol"), said("")]},
    "name": {"messages": [user("ethanol", name="Ann"), said("CCO", name="Bot")]},
}
TOOL_CHATS = {
    "tools": {"tools": [SCHEMA], "messages": [user("ethanol"), said("CCO")]},
    "tools as a string": {"tools": '[{"name": "f"}]', "messages": [user("ethanol"), said("CCO")]},
    "tool call": {
        "tools": [SCHEMA],
        "messages": [
            user("ethanol"),
            said("", tool_calls=[CALL]),
            {"role": "tool", "name": "search", "content": "42"},
            said("CCO"),
        ],
    },
    "null content": {"messages": [user("ethanol"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    "no content": {"messages": [user("ethanol"), {"role": "assistant", "tool_calls": [CALL, CALL]}]},
    "chat_template_kwargs": {"chat_template_kwargs": {"think": True}, "messages": [user("ethanol"), said("CCO")]},
}
if "None" in tiny_tokenizer().apply_chat_template([user(None)], tokenize=False):
    del TOOL_CHATS["null content"]  # of which transformers 5.17 makes the word None
PART_CHATS = {
    "parts": {
        "messages": [
            user([{"type": "text", "text": "etha"}, {"type": "text", "text": "nol"}]),
            said([{"type": "text", "text": "CCO"}]),
        ]
    },
}
REFUSED = {  # by these templates, in TRL as here
    "gemma, without system": ["system message"],
}


def chats_of(template: str) -> dict[str, dict]:
    rows = CHATS | (TOOL_CHATS if template == "tools" else {}) | (PART_CHATS if template == "parts" else {})
    return {name: row for name, row in rows.items() if name not in REFUSED.get(template, ())}


def by_trl(rows: list[dict], tokenizer, **options) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of rows, as SFTTrainer prepares them."""
    datasets.disable_progress_bars()
    args = SFTConfig("unused", max_length=None, max_steps=1, use_cpu=True, bf16=False, report_to="none", **options)
    stream = IterableDataset.from_generator(lambda: iter(rows))  # which adds no nulls for fields of other rows
    trainer = SFTTrainer(tiny_llama(), args, train_dataset=stream, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def tokenizer_with(template: str | None = None, words=("a\n\n",) * 9):
    tokenizer = tiny_tokenizer(list(words))  # "\n\n" becomes one token, which may span prompt and answer
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_masked_as_trl_masks_them(name):
    plain, with_tags = TEMPLATES[name]
    rows = chats_of(name)
    expected = by_trl(list(rows.values()), tokenizer_with(with_tags), assistant_only_loss=True)
    assert training_template(plain) == plain, "TRL does not know it"
    for (case, row), (input_ids, labels) in zip(rows.items(), expected, strict=True):
        assert encode_row(row, tokenizer_with(with_tags)) == (input_ids, labels), case
        got = encode_row(row, tokenizer_with(plain))
        assert got[0] == input_ids, case
        # What nothing predicts is left out: Mistral's template has no header before the first answer.
        assert got[1][1:] == labels[1:], case


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_templates_that_trl_knows_are_masked_as_its_variants_for_training_say(name):
    rows = CHATS if name == "llama3" else CHATS | TOOL_CHATS
    rows = {case: row for case, row in rows.items() if name != "qwen2_5" or case not in ("null content", "no content")}
    expected = by_trl(list(rows.values()), tokenizer_with(of_trl(name)), assistant_only_loss=True)
    for (case, row), (input_ids, labels) in zip(rows.items(), expected, strict=True):
        assert encode_row(row, tokenizer_with(of_trl(name))) == (input_ids, labels), case


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tool:UserWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_every_template_that_trl_knows(name):
    """But for what TRL gets wrong: it gives text to templates that read parts alone, and cuts a last character."""
    tokenizer = tokenizer_with(of_trl(name))
    for case, row in {**CHATS, **TOOL_CHATS}.items():
        if name in ("idefics3", "smolvlm", "llava_next") or (name, case) == ("diffusion_gemma", "no ASCII"):
            continue
        try:
            expected = by_trl([row], tokenizer, assistant_only_loss=True)[0]
        except Exception:  # of the template, in it
            with pytest.raises(ValueError, match=r"messages|tools"):
                encode_row(row, tokenizer)
        else:
            assert encode_row(row, tokenizer) == expected, case


@pytest.mark.parametrize("name", ["gemma", "llama3", "qwen3_instruct_2507", "cohere", "lfm2"])
def test_without_trl_most_templates_are_masked_alike(name):
    unknown = of_trl(name) + "{# changed #}"
    refused = {
        "gemma": ("system message", "begun by the assistant", "two answers in a row"),
        "cohere": ("two answers in a row", "begun by the assistant"),
    }
    for case, row in CHATS.items():
        if case not in refused.get(name, ()):
            assert encode_row(row, tokenizer_with(unknown)) == encode_row(row, tokenizer_with(of_trl(name))), case


PLAIN = {
    "prompt and completion": {"prompt": "name: ethanol ", "completion": "CCO"},
    "a token spans the seam": {"prompt": "a\n", "completion": "\n\nCCO"},
    "completion that ends itself": {"prompt": "ethanol", "completion": "CCO</s>"},
    "empty completion": {"prompt": "ethanol", "completion": ""},
    "empty prompt": {"prompt": "", "completion": "CCO"},
    "special tokens": {"prompt": "<s>a</s>", "completion": "b<s>c"},
    "no ASCII": {"prompt": "naïve 🎉", "completion": "🎉 ça 好"},
}
TEXTS = {
    "text": {"text": "ethanol"},
    "its own end": {"text": "ethanol</s>"},
    "empty": {"text": ""},
    "🎉": {"text": "🎉\n"},
}


@pytest.mark.parametrize("begins", [False, True], ids=["no token before", "a token before"])
@pytest.mark.parametrize("rows", [PLAIN, TEXTS], ids=["prompt and completion", "text"])
def test_plain_rows_are_tokenized_as_by_trl(rows, begins):
    tokenizer = tokenizer_with()
    if begins:
        special = [("<s>", 0)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    for (case, row), expected in zip(rows.items(), by_trl(list(rows.values()), tokenizer), strict=True):
        assert encode_row(row, tokenizer) == expected, case


@pytest.mark.parametrize("name", ["chatml, default system message", "tools", "mistral", "qwen3"])
def test_prompts_and_completions_of_messages_are_masked_as_by_trl(name):
    tokenizer = tokenizer_with(TEMPLATES[name][0] if name in TEMPLATES else of_trl(name))
    rows = {
        case: {**row, "prompt": row["messages"][:1], "completion": row["messages"][1:]}
        for case, row in (CHATS | (TOOL_CHATS if name in ("tools", "qwen3") else {})).items()
        if case != "begun by the assistant"
    }
    for row in rows.values():
        row.pop("messages")
    for (case, row), expected in zip(rows.items(), by_trl(list(rows.values()), tokenizer), strict=True):
        assert encode_row(row, tokenizer) == expected, case


def test_conversations_are_chats(tmp_path):
    """TRL masks no such rows (it looks at the first before it renames the fields), so tokens alone are compared."""
    row = {"conversations": [{"from": "user", "value": "ethanol"}, {"from": "assistant", "value": "CCO"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    tokenizer = tokenizer_with(TEMPLATES["chatml"][1])
    ((input_ids, _),) = by_trl([row], tokenizer)
    (read,) = read_jsonl(tmp_path / "rows.jsonl")
    assert encode_row(read, tokenizer)[0] == input_ids


@pytest.mark.parametrize("form", [0, 1], ids=["without tags", "with tags"])
def test_white_space_that_a_tokenizer_leaves_out_of_its_ranges_is_masked_alike(form):
    """GPT-2's tokenizer does so. TRL then loses an answer that begins with a space."""
    whole, trims = tokenizer_with(TEMPLATES["chatml"][form]), tokenizer_with(TEMPLATES["chatml"][form])
    trims.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    for case, row in CHATS.items():
        assert encode_row(row, trims) == encode_row(row, whole), case


def test_a_tokenizer_that_appends_the_end_gives_one_at_the_end():
    """TRL gives two."""
    plain, appends = tokenizer_with(), tokenizer_with()
    appends.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    for row in (*PLAIN.values(), *TEXTS.values(), PLAIN["a token spans the seam"] | {"complete": False}):
        assert encode_row(row, appends) == encode_row(row, plain)
    assert prepare_prompts([("", {"prompt": "ethanol"})], appends) == prepare_prompts(
        [("", {"prompt": "ethanol"})], plain
    )


@pytest.mark.parametrize("row", [PLAIN["prompt and completion"], TEXTS["text"]])
def test_a_tokenizer_without_an_end_of_text_is_refused_where_one_is_needed(row):
    tokenizer = tokenizer_with(TEMPLATES["chatml"][0])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 1: eos_token: the tokenizer has none"):
        encode([row], tokenizer, 99)
    assert (
        encode([CHATS["one answer"], PLAIN["prompt and completion"] | {"complete": False}], tokenizer, 99).dropped == 0
    )
    with pytest.raises(ValueError, match="pad_token: the tokenizer has neither"):
        collator(tokenizer)


PARTED = PART_CHATS["parts"], {"messages": [user("ethanol"), said("CCO")]}


@pytest.mark.parametrize(
    "template", [TEMPLATES["chatml"][0], TEMPLATES["llama"][1], of_trl("qwen3"), of_trl("smolvlm")]
)
def test_content_goes_to_a_template_in_the_form_that_it_reads(template):
    parts, text = (encode_row(row, tokenizer_with(template)) for row in PARTED)
    assert parts == text
    assert "ethanol" in tiny_tokenizer(["a\n\n"] * 9).decode(parts[0])


@pytest.mark.parametrize(("row", "field"), [(TOOL_CHATS["tools"], "tools"), (TOOL_CHATS["no content"], "tool_calls")])
def test_a_template_that_does_not_show_tools_is_warned_of(row, field):
    """TRL leaves them out in silence."""
    with pytest.warns(UserWarning, match=rf"{field}: rows have some, but"):
        encode_row(row, tokenizer_with(TEMPLATES["chatml"][0]))


def test_a_template_whose_tags_enclose_no_answer_is_refused():
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"\{% generation %\} tags enclose none of the answers"):
        encode_row(CHATS["one answer"], tokenizer)


@pytest.mark.parametrize("form", [0, 1], ids=["without tags", "with tags"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_answer_alone_and_one_that_was_cut_off(name, form):
    tokenizer = tokenizer_with(TEMPLATES[name][form])
    row = {"messages": [user("ethanol"), said("CCO"), user("propane"), said("CCC")]}
    input_ids, labels = encode_row(row, tokenizer)
    start = max(index for index, label in enumerate(labels[:-1]) if label == IGNORE_INDEX) + 1
    last = encode_row(row | {"last_answer_only": True}, tokenizer)
    assert last == (input_ids, [IGNORE_INDEX] * start + labels[start:])
    cut_ids, cut_labels = encode_row(row | {"complete": False}, tokenizer)
    assert (cut_ids, cut_labels) == (input_ids[: len(cut_ids)], labels[: len(cut_labels)])
    assert tokenizer.decode(cut_ids).endswith("CCC")


CARRIED = {"tools": [SCHEMA], "chat_template_kwargs": {"think": True}}


def test_distill_asks_with_all_that_a_row_holds_and_writes_it_again():
    tokenizer = tokenizer_with(TEMPLATES["tools"][0])
    chat = TOOL_CHATS["tool call"]["messages"][:-1]
    for name in ("messages", "prompt"):
        (prompt,), _ = prepare_prompts([("line 1", CARRIED | {name: chat})], tokenizer)
        assert (
            prompt.input_ids
            == tokenizer.apply_chat_template(chat, tools=[SCHEMA], think=True, add_generation_prompt=True).input_ids
        )
        row = prompt.row("CCO")
        assert row["messages"][:-1] == chat
        assert CARRIED.items() <= row.items()
        assert encode_row(row, tokenizer)[0][: len(prompt.input_ids)] == prompt.input_ids


def test_distill_takes_tools_from_a_dataset(tmp_path):
    tokenizer, chat = tokenizer_with(TEMPLATES["tools"][0]), [user("ethanol")]
    rows = [{"tools": json.dumps([SCHEMA]), "chat_template_kwargs": {"think": True}, "messages": chat, "other": 1}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "prompts")
    (prompt,), _ = prepare_prompts(read_prompts(f"hf:{tmp_path / 'prompts'}").rows, tokenizer)
    expected = tokenizer.apply_chat_template(chat, tools=[SCHEMA], think=True, add_generation_prompt=True)
    assert prompt.input_ids == expected.input_ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "prompt: got 3, expected a list"),
        ({"prompt": "ethanol", "images": ["x.png"]}, "images: rows with this field are not supported"),
        ({"messages": "ethanol"}, 'messages: got "ethanol", expected a list'),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content: got null"),
        (
            {"messages": [user("x"), said("y", function_call={"name": "f"}), user("z")]},
            r"messages\[1\].function_call: .*Give 'tool_calls'",
        ),
        ({"messages": [user("x")], "tools": "search"}, 'tools: got "search", which is not valid JSON'),
    ],
)
def test_prompts_that_cannot_be_asked_are_named(row, message):
    with pytest.raises(ValueError, match=f"file, line 1: {message}"):
        prepare_prompts([("file, line 1", row)], tokenizer_with(TEMPLATES["tools"][0]))


def test_tools_without_a_chat_template_are_refused():
    with pytest.raises(ValueError, match="line 1: tools: the tokenizer has no chat template"):
        prepare_prompts([("line 1", {"prompt": "ethanol", "tools": [SCHEMA]})], tokenizer_with())


def test_evaluate_asks_with_all_that_a_row_holds():
    tokenizer = tokenizer_with(TEMPLATES["tools"][0])
    row = CARRIED | {"messages": [*TOOL_CHATS["tool call"]["messages"], user("thanks")]}
    (encoded,) = encode_answers([row], tokenizer, [tokenizer.eos_token_id])
    assert (
        encoded.prompt
        == tokenizer.apply_chat_template(
            row["messages"][:3], tools=[SCHEMA], think=True, add_generation_prompt=True
        ).input_ids
    )
    assert tokenizer.decode(encoded.answer) == "CCO</s>"
    assert encoded.context == encoded.prompt


def test_evaluate_asks_with_the_prompt_where_the_answer_shares_a_token_with_it():
    tokenizer = tokenizer_with()
    (encoded,) = encode_answers([PLAIN["a token spans the seam"]], tokenizer, [tokenizer.eos_token_id])
    assert [tokenizer.decode(ids) for ids in (encoded.prompt, encoded.context, encoded.answer)] == [
        "a\n",
        "a",
        "\n\n\nCCO</s>",
    ]


def test_concepts_sees_the_tokens_that_are_trained():
    tokenizer = tokenizer_with(TEMPLATES["tools"][0])
    for row in (*CHATS.values(), *TOOL_CHATS.values(), *PLAIN.values()):
        (aligned,) = align([row], tokenizer, lambda text: [], 999)
        assert (aligned.input_ids, aligned.labels) == encode_row(row, tokenizer)


def test_rows_longer_than_the_models_positions_are_refused():
    rows = encode([TEXTS["text"], {"text": "ethanol " * 9}], tokenizer_with(), 99).rows
    config = GPT2Config(n_positions=len(rows[1]["input_ids"]))
    require_positions(rows, config, 99)
    config.n_positions -= 1
    with pytest.raises(
        ValueError, match=rf"max_length: got 99 and a row of \d+ tokens, expected at most {config.n_positions},"
    ):
        require_positions(rows, config, 99)
