"""What a model is loaded with, and what the tokenizer and the model must have in common."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from peft_caft.training.loading import require_tokenizer_of

from ..support.commands import peft_caft
from ..support.tiny_checkpoint import save_checkpoint, tiny_llama, tiny_tokenizer, write_chats

COMMANDS = {
    "train": ("--max_steps", "1", "--method", "lora"),
    "train-heads": ("--max_steps", "1", "--num-heads", "1", "--head-type", "residual"),
    "distill": ("--max-prompts", "2", "--max-new-tokens", "2"),
}


def run(command: str, model: str, data: str, folder, expect: int) -> str:
    places = ["--prompts", data, "--output", str(folder / "o.jsonl")] if command == "distill" else ["--data", data]
    places += [] if command == "distill" else ["--output", str(folder / command), "--use_cpu", "true"]
    return peft_caft(command, "--model", model, *places, *COMMANDS[command], expect=expect)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_a_token_of_the_data_has_no_embedding(command, tmp_path):
    model, data = save_checkpoint(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 12)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["name 1"])
    tokenizer.save_pretrained(model)
    output = run(command, model, data, tmp_path, expect=1)
    assert "tokenizer: got 301 tokens, expected at most 300" in output
    assert "beyond which the data use 'name 1'" in output
    assert "resize_token_embeddings" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_that_the_data_do_not_use_need_no_embedding(command, tmp_path):
    """Gemma 3's tokenizer names images, also beside models that read none."""
    model, data = save_checkpoint(tmp_path / "model"), write_chats(tmp_path / "data.jsonl", 12)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    run(command, model, data, tmp_path, expect=0)


def test_padding_and_a_foreign_vocabulary_are_refused_whatever_the_data_use():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"got 300 tokens, expected at most 299.*belongs to another model"):
        require_tokenizer_of(tiny_llama(vocab_size=299), tokenizer, [[5]])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"got 301 tokens.*the data use '<pad>'"):
        require_tokenizer_of(tiny_llama(), tokenizer, [[5]])


@pytest.mark.parametrize("command", COMMANDS)
def test_adapter_in_place_of_a_model_is_refused(command, tmp_path):
    """Transformers would load it with its base model, and an adapter would be trained on an adapter."""
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    output = run(command, str(tmp_path / "adapter"), write_chats(tmp_path / "data.jsonl", 12), tmp_path, expect=1)
    assert "adapter', an adapter, expected a whole model. Merge it first: `peft-caft merge" in output
