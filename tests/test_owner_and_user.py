"""What the owner of a base model does, and then a user on another machine: distill, train, inspect, push, load."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .support.hub_client import Client, client_environment
from .support.hub_server import HubServer
from .support.tiny_checkpoint import WORDS, save_checkpoint

TRAIN = ["--learning_rate", "1e-2", "--num_train_epochs", "2", "--use_cpu", "true", "--disable_tqdm", "true"]

USER = """
import torch
from peft import get_peft_model
from peft_caft import CAFTConfig
from tests.support.tiny_checkpoint import tiny_llama
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
    prompts, answers, heads = (tmp_path / "owner" / name for name in ("prompts.jsonl", "answers.jsonl", "heads"))
    rows = [{"prompt": f"name {index} {WORDS[index % len(WORDS)]}"} for index in range(48)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with HubServer() as hub:
        environment = client_environment(hub.endpoint, tmp_path / "owner-home", HF_TOKEN="write-token")
        with Client(environment, "from tests.support.commands import peft_caft") as owner_process:

            def owner(*arguments: object) -> str:
                return owner_process.run("peft_caft(*arguments)", arguments=[*map(str, arguments)])

            owner("distill", "--model", model, "--prompts", prompts, "--output", answers, "--max-new-tokens", 24)
            owner("train-heads", "--model", model, "--data", answers, "--output", heads, "--num-heads", 3, *TRAIN)
            assert "| fits the model | tiny-llama: yes" in one_spaced(owner("inspect", heads, "--model", model))
            owner("push", heads, "org/tiny-heads", "--base-model", "org/tiny-llama", "--license", "mit")
            inspected = one_spaced(owner("inspect", "org/tiny-heads", "--model", model))
        commit = hub.head("org/tiny-heads")
        assert f"org/tiny-heads at commit {commit}" in inspected
        assert "yes" in inspected
        card = hub.files("org/tiny-heads")["README.md"].decode()
        assert "self-distilled: model tiny-llama" in card
        assert 'CAFTConfig(heads="org/tiny-heads", num_auxiliary_heads=3' in card
        with Client(client_environment(hub.endpoint, tmp_path / "user-home")) as user:
            name, revision, weights, loss = user.run(USER)
    published = json.loads((heads / "config.json").read_text(encoding="utf-8"))
    assert (name, revision, weights) == ("org/tiny-heads", commit, published["weights_sha256"])
    assert 0 < loss < 20
    assert os.listdir(Path(tmp_path, "user-home", "hub")), "the user downloaded them"


def one_spaced(text: str) -> str:
    return " ".join(text.split())
