"""Every class that AutoModelForCausalLM and AutoModelForImageTextToText know: CAFT equals an oracle, or refuses it by name."""

from __future__ import annotations

import pytest

from ..support.every_architecture.oracle import EQUAL, IMAGES, MODEL_TYPES, REFUSED, TEXT, VISION, outcome
from ..support.every_architecture.table import HEADER, PAGE, shown, summary

CASES = [(kind, model_type) for kind, model_types in MODEL_TYPES.items() for model_type in model_types]
documented = HEADER.format("with CAFT") in PAGE.read_text(encoding="utf-8")
of_that_version = pytest.mark.skipif(not documented, reason="docs/architectures.md is of another transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@of_that_version
def test_the_page_names_every_class_once():
    assert {kind: sorted(names) for kind, names in shown().items()} == {
        kind: sorted(names) for kind, names in MODEL_TYPES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), CASES, ids=[f"{kind}-{name}" for kind, name in CASES])
def test_caft_equals_the_oracle_or_refuses_by_name(kind, model_type):
    words = summary(kind, model_type)  # an AssertionError if it does neither
    if documented:
        assert words == shown()[kind][model_type]


@pytest.mark.parametrize(
    ("kind", "model_type", "head_type"),
    [
        (TEXT, "lfm2", "decoder_layer"),  # another name of the final norm
        (TEXT, "gemma4_text", "decoder_layer"),  # the last layer reads keys and values of an earlier one
        (TEXT, "recurrent_gemma", "residual"),  # another name of the soft cap
        (TEXT, "minicpm3", "residual"),  # a factor before the lm_head
        (
            IMAGES,
            "qwen3_vl",
            "decoder_layer",
        ),  # a vision tower with as many layers, and features of images between layers
    ],
)
def test_peculiar_architectures_equal_the_oracle(kind, model_type, head_type):
    got = outcome(kind, model_type, head_type)
    assert got.kind == EQUAL, got.detail


@pytest.mark.parametrize(
    ("kind", "model_type", "reason"),
    [
        (TEXT, "bert", "its lm_head differ"),  # dense layer, activation and norm before the unembedding
        (VISION, "chameleon", "its logits differ"),  # tokens of images get the least logit
        (IMAGES, "git", "a model that adds positions by itself"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(kind, model_type, reason):
    got = outcome(kind, model_type, "residual")
    assert got.kind == REFUSED, got
    assert reason in got.detail


@pytest.mark.parametrize(
    ("model_type", "final_norm"),
    [("lfm2", "model.embedding_norm"), pytest.param("opt", "model.decoder.final_layer_norm", marks=pytest.mark.slow)],
)
def test_heads_on_the_last_hidden_state_equal_the_oracle(model_type, final_norm):
    got = outcome(TEXT, model_type, "residual", head_input="last_hidden_state", final_norm=final_norm)
    assert got.kind == EQUAL, got.detail
