"""The heads of SmolLM2-135M-Instruct that lie in model_cards/: a complete artifact, a true card, and heads that predict."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from stdlib_functions import stdlib_functions
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_caft.demo.run import published_heads
from peft_caft.heads.artifact import find_heads
from peft_caft.heads.auxiliary_heads import AuxiliaryHeads
from peft_caft.heads.card import heads_card
from peft_caft.hub.embedded_model import embedded_model
from peft_caft.hub.inspection import inspect
from peft_caft.training.data import collator, encode
from peft_caft.training.head_metrics import evaluate_heads

from ..support.places import ROOT

FOLDER = ROOT / "model_cards" / "SmolLM2-135M-Instruct-caft-heads"


@pytest.fixture(scope="module")
def config():
    return find_heads(str(FOLDER)).read_config()  # also compares the weights with their recorded hash


def test_the_folder_is_what_the_hub_gets_and_small():
    assert {file.name for file in FOLDER.iterdir()} == {"README.md", "config.json", "heads.png", "model.safetensors"}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 32e6
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (not a mapping)


def test_the_demo_starts_from_them():
    assert published_heads() == FOLDER


def test_the_card_is_the_one_of_this_configuration(config):
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == heads_card(config, has_plot=True)
    assert config.license == "apache-2.0"
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_they_come_from_soft_targets_and_self_distilled_answers_and_say_so(config):
    training = config.training
    assert training["targets"] == "soft"
    provenances = {file["file"]: file["provenance"] for file in training["data"]}
    assert provenances["answers_train.jsonl"]["settings"]["temperature"] == 1.0
    assert len(training["git_commit"]) == 40
    assert training["versions"]["torch"].startswith("2.13.0")


def test_figures_are_far_above_the_pilots(config):
    """A pilot of 250 steps on code alone had these on held-out functions of the standard library."""
    functions = next(e for e in config.training["evaluations"] if e["name"] == "functions_test")
    pilot = {2: (0.199, 4.87), 3: (0.111, 5.69), 4: (0.074, 6.03), 5: (0.062, 6.17)}
    for head in functions["after"]["heads"]:
        top1, cross_entropy = pilot[head["tokens_ahead"]]
        assert head["top1"] > top1
        assert head["cross_entropy"] < cross_entropy
    assert functions["after"]["heads"][0]["top1"] >= 0.27


@pytest.mark.slow
def test_recorded_figures_are_what_the_heads_do(config):
    """On the test functions of this Python, which may be others than those of the record."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    assert inspect(str(FOLDER), str(embedded_model())).misfit is None
    heads = AuxiliaryHeads.from_pretrained(str(FOLDER), base_model=model)
    texts = [{"text": function.source} for function in stdlib_functions() if function.test]
    rows = encode(texts[::8], tokenizer, 256).rows
    measured = evaluate_heads(heads, model, rows, collator(tokenizer))
    recorded = next(e for e in config.training["evaluations"] if e["name"] == "functions_test")["after"]
    for head, expected in zip(measured.heads, recorded["heads"], strict=True):
        # A sample of a few thousand tokens out of a few dozen functions.
        assert head.top1 == pytest.approx(expected["top1"], abs=0.06)
        assert head.cross_entropy == pytest.approx(expected["cross_entropy"], abs=0.5)
    assert all(torch.isfinite(p).all() for p in heads.parameters())
    assert json.loads(config.to_json())["num_heads"] == len(measured.heads) == 4
