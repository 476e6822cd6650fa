"""What the owner of a base model does, and then a user on another machine: distill, train, inspect, push, load."""

from __future__ import annotations

import json
import os
import shutil

from .support.commands import peft_caft
from .support.hub_client import Client, client_environment
from .support.hub_server import HubServer
from .support.tiny_checkpoint import WORDS, save_checkpoint

TRAIN = ["--learning_rate", "1e-2", "--num_train_epochs", "1", "--use_cpu", "true", "--disable_tqdm", "true"]

COMMANDS = "import peft; from tests.support.commands import peft_caft"
USER = """
import os
import torch
from peft import get_peft_model
from peft_caft import CAFTConfig
from tests.support.tiny_checkpoint import tiny_llama
del os.environ["HF_TOKEN"]
model = get_peft_model(tiny_llama(), CAFTConfig(heads="org/tiny-heads", num_auxiliary_heads=3, target_modules="all-linear"))
input_ids = torch.arange(20).view(2, 10)
model.set_training_progress(0, 10)
loss = model(input_ids=input_ids, labels=input_ids).loss
loss.backward()
config = model.peft_config["default"]
[config.heads, config.heads_commit, model.auxiliary_heads["default"].config.weights_sha256, loss.item()]
"""


def test_heads_go_from_prompts_to_a_users_configuration(tmp_path):
    model = save_checkpoint(tmp_path / "owner" / "tiny-llama")
    prompts, answers, heads = (str(tmp_path / "owner" / name) for name in ("prompts.jsonl", "answers.jsonl", "heads"))
    with open(prompts, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": f"name {i} {WORDS[i % len(WORDS)]}"}) + "\n" for i in range(24))
    peft_caft("distill", "--model", model, "--prompts", prompts, "--output", answers, "--max-new-tokens", "24")
    peft_caft("train-heads", "--model", model, "--data", answers, "--output", heads, "--num-heads", "3", *TRAIN)
    assert "| fits the model | tiny-llama: yes" in one_spaced(peft_caft("inspect", heads, "--model", model))
    home = tmp_path / "home"
    with (
        HubServer() as hub,
        Client(client_environment(hub.endpoint, home, HF_TOKEN="write-token"), COMMANDS) as client,
    ):

        def owner(*arguments: str) -> str:
            return one_spaced(client.run("peft_caft(*arguments)", arguments=arguments))

        owner("push", heads, "org/tiny-heads", "--base-model", "org/tiny-llama", "--license", "mit")
        inspected = owner("inspect", "org/tiny-heads", "--model", model)
        commit = hub.head("org/tiny-heads")
        assert f"org/tiny-heads at commit {commit}" in inspected
        assert "yes" in inspected
        card = hub.files("org/tiny-heads")["README.md"].decode()
        assert "self-distilled: model tiny-llama" in card
        assert 'CAFTConfig(heads="org/tiny-heads", num_auxiliary_heads=3' in card
        # The user's process is the same, since imports take seconds, but has neither a token nor the owner's files.
        shutil.rmtree(home)
        name, revision, weights, loss = client.run(USER)
    published = json.loads((tmp_path / "owner" / "heads" / "config.json").read_text(encoding="utf-8"))
    assert (name, revision, weights) == ("org/tiny-heads", commit, published["weights_sha256"])
    assert 0 < loss < 20
    assert os.listdir(home / "hub"), "the user downloaded them"


def one_spaced(text: str) -> str:
    return " ".join(text.split())
