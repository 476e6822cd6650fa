"""Terms of hand-made texts, and which tokens are theirs, against offsets worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peft_caft.concepts.alignment import BETWEEN, CUT, GAP, SPECIAL, LocatingTokenizer, align
from peft_caft.concepts.terms import UNITS, chemistry_terms, code_terms, guess_unit, is_smiles, prose_terms
from peft_caft.training.data import encode

from ..support.tiny_checkpoint import CHAT_TEMPLATE, WORDS, tiny_tokenizer


def found(terms, text: str) -> list[str]:
    spans = terms(text)
    assert all(start < end for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't panic: 3.14 isn't 22/7.", ["Don't", "panic", "3.14", "isn't", "22", "7"]),
        ("well-known snake_case", ["well", "known", "snake_case"]),
        ("हिन्दी and العربية", ["हिन्दी", "and", "العربية"]),  # with combining vowel signs
        ("漢字 🙂👩‍👩‍👧 naïve e\u0301te\u0301", ["漢", "字", "naïve", "e\u0301te\u0301"]),
        ("  \n\t ... !? ", []),
        ("", []),
    ],
)
def test_prose_is_cut_into_words(text, words):
    assert found(prose_terms, text) == words


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("def f(max_row: int = 0x1F) -> str: ...", ["def", "f", "max_row", "int", "=", "0x1F", "->", "str", "..."]),
        ("x = a.b[1] ** -2  # it's", ["x", "=", "a", "b", "1", "**", "-", "2", "it", "s"]),
        ('s = rb"\\nx y" b"z"', ["s", "=", "x", "y", "z"]),  # neither the prefix nor the escape
        ('"""Doc\nstring."""', ["Doc", "string"]),
        ("naïve = '字'", ["naïve", "=", "字"]),
        ("def g():\n\treturn 1_000.5e-3", ["def", "g", "return", "1_000.5e-3"]),
        (
            "function f($a) { return $a >= 0xFF ? b->c : 3.5e2; }",
            ["function", "f", "$a", "return", "$a", ">=", "0xFF", "?", "b", "->", "c", "3.5e2"],
        ),
        ("x = '", ["x", "="]),  # unfinished
        ("a\0b", ["a", "b"]),
        ("x = 1\r\ny = 2\r\n", ["x", "=", "1", "y", "=", "2"]),
    ],
)
def test_code_is_cut_into_lexemes(text, terms):
    assert found(code_terms, text) == terms


def test_parts_of_f_strings_are_terms():
    assert {"name", "total_count", "sum"} <= set(found(code_terms, 's = f"sum of {name}: {total_count}"'))


def test_text_around_fenced_code_is_prose():
    text = "It's so:\n```python\nx += don(1)\n```\nIsn't it - or?\n```\ny = 2"
    assert found(code_terms, text) == [
        "It's",
        "so",
        "python",
        "x",
        "+=",
        "don",
        "1",
        "Isn't",
        "it",
        "or",
        "y",
        "=",
        "2",
    ]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("CC(C)C[C@H]1NC(=O)c2ccc(Cl)cc21", ["CC", "C", "C", "[C@H]1", "NC", "=O", "c2ccc", "Cl", "cc21"]),
        ("[Na+].[O-]C%12", ["[Na+]", "[O-]", "C%12"]),
        (r"F/C=C\Br", [r"F/C=C\Br"]),
        ("(2R)-2-methylpropan-2-ol", ["R", "methylpropan", "ol"]),
        ("N,N-dimethyl no CCO", ["N", "N", "dimethyl", "no", "CCO"]),
        ("benzene is c1ccccc1", ["benzene", "is", "c1ccccc1"]),
    ],
)
def test_chemistry_is_cut_into_fragments_and_words(text, terms):
    assert found(chemistry_terms, text) == terms


@pytest.mark.parametrize(
    ("word", "smiles"), [("CCO", True), ("c1cc1", True), ("no", False), ("Con", False), ("12", False)]
)
def test_english_words_are_no_smiles(word, smiles):
    assert is_smiles(word) == smiles


def test_long_text_that_is_nearly_smiles_takes_no_time():
    assert not is_smiles("C" * 20000 + "!")


@pytest.mark.parametrize(
    ("texts", "unit"),
    [
        (["CC(=O)O", "c1ccccc1", "Yes."], "chemistry"),
        (["2-methylpropan-2-ol", "N-[4-(acetyl)phenyl]urea, 3,4-diol"], "chemistry"),
        (["x = f(1)\nprint(x)", "def g(): ..."], "code"),
        (["Sure:\n```\nls\n```"], "code"),
        (["int main() {\n  return 0;\n}"], "code"),
        (["Yes", "I bought 2 (two) in 2-door style; no more.", "A list:\n- one\n- two"], "prose"),
        (["def f(): ...", "A sentence."], "prose"),  # half is not more than half
    ],
)
def test_unit_is_guessed_from_most_answers(texts, unit):
    assert guess_unit(texts) == unit


def byte_tokenizer(*merged: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pre-tokenizer's splits, whose only long tokens are ``merged`` (with G-dots for spaces)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = [*alphabet], []
    for word in merged:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def aligned(tokenizer, completion: str, unit: str = "prose", max_length: int = 99):
    (row,) = align([{"prompt": "Q:", "completion": completion}], tokenizer, UNITS[unit], max_length)
    return row


def described(row) -> list[tuple[str, int, int]]:
    return [(row.text[target.start : target.end], target.term, target.place) for target in row.targets]


def test_tokens_are_counted_inside_their_terms_and_leading_spaces_belong_to_them():
    row = aligned(byte_tokenizer("Ġrib", "on", "acid"), " ribon acid.")
    assert described(row) == [
        (" rib", 0, 1),
        ("on", 0, 2),
        (" ", BETWEEN, 0),
        ("acid", 1, 1),
        (".", BETWEEN, 0),
        ("</s>", SPECIAL, 0),
    ]
    assert [(term.text, term.targets) for term in row.terms] == [("ribon", (0, 1)), ("acid", (3,))]
    assert [row.length_of(target) for target in row.targets] == [2, 2, 0, 1, 0, 0]
    assert (row.shared_tokens, row.overhanging_tokens, row.swallowed_terms) == (0, 0, 0)


def test_a_character_of_several_tokens_is_one_place_with_several_tokens():
    row = aligned(byte_tokenizer(), "字é🙂x")
    assert [(term.text, len(term.targets)) for term in row.terms] == [("字", 3), ("é", 2), ("x", 1)]
    assert [target.place for target in row.targets] == [1, 2, 3, 1, 2, 0, 0, 0, 0, 1, 0]


def test_token_of_several_terms_counts_for_the_one_with_most_of_it():
    # "a bcd" is one token: the word "a" has no token of its own.
    row = aligned(byte_tokenizer("aĠbcd"), "a bcde f")
    assert [(term.text, term.targets) for term in row.terms] == [("bcde", (0, 1)), ("f", (3,))]
    assert (row.shared_tokens, row.overhanging_tokens, row.swallowed_terms) == (1, 0, 1)


def test_token_that_also_covers_punctuation_is_counted():
    row = aligned(byte_tokenizer("O)."), "C(=O).C", unit="chemistry")
    assert [(term.text, len(term.targets)) for term in row.terms] == [("C", 1), ("=O", 2), ("C", 1)]
    assert (row.shared_tokens, row.overhanging_tokens) == (0, 1)


def test_terms_that_the_maximal_length_cuts_off_are_none():
    tokenizer = byte_tokenizer()
    prompt = 2  # tokens
    row = aligned(tokenizer, "ab cdef gh", max_length=prompt + 5)
    assert [term.text for term in row.terms] == ["ab"]
    assert described(row) == [("a", 0, 1), ("b", 0, 2), (" ", BETWEEN, 0), ("c", CUT, 0), ("d", CUT, 0)]
    assert row.text == "ab cd"
    assert len(row.input_ids) == len(row.labels) == prompt + 5


def test_first_token_of_a_row_is_no_target_and_its_term_none():
    (row,) = align([{"text": "ab cd"}], byte_tokenizer(), prose_terms, 99)
    assert described(row) == [("b", CUT, 0), (" ", BETWEEN, 0), ("c", 0, 1), ("d", 0, 2), ("</s>", SPECIAL, 0)]


def test_every_answer_of_a_chat_is_aligned_and_the_template_is_not():
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "one two"},
            {"role": "user", "content": "user words"},
            {"role": "assistant", "content": "three"},
        ]
    }
    (found_row,) = align([row], byte_tokenizer("one", "two"), prose_terms, 999)
    assert [(term.text, len(term.targets)) for term in found_row.terms] == [("one", 1), ("two", 1), ("three", 5)]
    assert found_row.text == f"one two</s>\n{GAP}three</s>\n"
    specials = [target for target in found_row.targets if target.term == SPECIAL]
    assert [found_row.text[target.start : target.end] for target in specials] == ["</s>", "</s>"]


def test_tokenizer_that_trims_its_offsets_aligns_as_well():
    """As RoBERTa's does: leading white space belongs to no token, and a token of white space has the empty range."""
    tokenizer = byte_tokenizer("Ġrib", "on")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = aligned(tokenizer, " ribon  字x")
    assert [(term.text, len(term.targets)) for term in row.terms] == [("ribon", 2), ("字", 3), ("x", 1)]
    assert [target.start for target in row.targets] == sorted(target.start for target in row.targets)
    assert [target.term for target in row.targets] == [0, 0, BETWEEN, BETWEEN, 1, 1, 1, 2, SPECIAL]


def test_unknown_token_stands_for_characters():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2, "ab": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert described(aligned(fast, "ab new ab")) == [("ab", 0, 1), ("new", 1, 1), ("ab", 2, 1), ("</s>", SPECIAL, 0)]


@pytest.mark.parametrize("max_length", [12, 999])
def test_what_is_supervised_is_what_training_supervises(max_length):
    tokenizer = tiny_tokenizer()
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"{word} {word}"}]}
        for word in WORDS
    ]
    rows += [{"prompt": "name", "completion": " benzene 字"}, {"text": "pentane <b> \u202eهذا"}]
    rows += [rows[0] | {"complete": False}, {"prompt": "x" * 50, "completion": "y"}]
    encoded = encode(rows, tokenizer, max_length)
    found_rows = align(rows, tokenizer, prose_terms, max_length)
    assert [row.encoded for row in found_rows] == encoded.rows
    assert len(rows) - len(found_rows) == encoded.dropped
    for row in found_rows:
        positions = [t for t, label in enumerate(row.labels) if label != -100 and t > 0]
        assert [target.position for target in row.targets] == positions
        assert all(type(token) is int for token in row.input_ids + row.labels)  # no characters held for ever
        for term in row.terms:
            assert len(term.targets) == len({row.targets[index].place for index in term.targets})


def test_rows_without_anything_supervised_are_named_by_their_number():
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "x" * 50, "completion": "y"},
        {"prompt": "a", "completion": "c"},
    ]
    assert [row.number for row in align(rows, byte_tokenizer(), prose_terms, 10)] == [1, 3]
    with pytest.raises(ValueError, match="none of 1 rows has a supervised token within max_length=10"):
        align(rows[1:2], byte_tokenizer(), prose_terms, 10)


def test_row_that_cannot_be_encoded_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "assistant", "content": "x"}]}]
    with pytest.raises(ValueError, match="row 2: messages: the tokenizer has no chat template"):
        align(rows, tokenizer, prose_terms, 10)


def test_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: got Slow, expected a fast one"):
        LocatingTokenizer(Slow())
