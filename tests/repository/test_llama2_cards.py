"""The cards of CAFT-Llama2, whose weights are not trained yet: true about the real models, and commands that exist."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from llama2 import ORG, SIZES, cards
from typer.main import get_command

from peft_caft.cli.app import app
from peft_caft.training.arguments import trainer_arguments

from ..support.places import ROOT

FOLDER = ROOT / "model_cards"
BASES = {size.name: size.base for size in SIZES}


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return cards()


def test_committed_cards_are_those_that_the_script_writes(written):
    assert len(written) == 4
    for name, card in written.items():
        assert (FOLDER / name / "README.md").read_text(encoding="utf-8") == card, (
            f"run python model_cards/llama2.py: {name}"
        )


def test_every_card_says_first_that_it_is_not_trained(written):
    for name, card in written.items():
        _, front, text = card.split("---\n", 2)
        assert text.strip().split("\n\n")[1].startswith("> **Not trained yet.**"), name
        metadata = yaml.safe_load(front)
        assert metadata["base_model"] == BASES[name.split("-")[2]]
        assert metadata["license"] == "llama2"
        assert "not-trained-yet" in metadata["tags"]
        assert {file.name for file in (FOLDER / name).iterdir()} == {"README.md"}


# By hand, from the model's sizes: attention 4 d^2, MLP 3 d m, two norms of d, embedding and unembedding of 32,000 tokens.
@pytest.mark.parametrize(("name", "d", "m", "layers"), [("7B", 4096, 11_008, 32), ("13B", 5120, 13_824, 40)])
def test_counts_are_those_of_llama_2(name, d, m, layers, written):
    layer = 4 * d * d + 3 * d * m + 2 * d
    model = layers * layer + d + 2 * 32_000 * d
    heads, adapter = written[f"CAFT-Llama2-{name}-heads"], written[f"CAFT-Llama2-{name}"]
    assert f"4 heads of {layer:,} parameters, {4 * layer:,} in all" in heads
    assert f"base model's {model:,}" in heads
    lora = layers * 8 * (4 * 2 * d + 3 * (d + m))
    assert f"{lora:,} parameters" in adapter
    rows = dict(re.findall(r"\| ([^|]+?) +\| ([\d.]+) GiB", heads))
    assert float(rows["base model, frozen, bf16"]) == pytest.approx(2 * model / 2**30, abs=0.01)
    assert float(rows["heads in training: fp32 weight and gradient, two AdamW moments"]) == pytest.approx(
        4 * layer * 16 / 2**30, abs=0.01
    )


def test_commands_parse_and_go_on_from_one_another(written):
    commands = [
        shlex.split(line)
        for card in written.values()
        for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("peft-caft")
    ]
    assert [command[1] for command in commands] == ["distill", "train-heads", "inspect", "push"] * 2 + [
        "train",
        "inspect",
        "push",
    ] * 2
    for _, name, *arguments in commands:
        command = get_command(app).commands[name]
        context = command.make_context(name, list(arguments))
        if context.args:  # fields of TrainingArguments
            trainer_arguments("out", {}, None, context.args)
        if name == "train":
            assert context.params["heads"] in (f"{ORG}/{size.heads}" for size in SIZES)
