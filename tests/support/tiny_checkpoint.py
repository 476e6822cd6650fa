"""A tiny random Llama with a real tokenizer, saved as a checkpoint folder: what the commands and Trainer need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = [
    "ethanol",
    "propane",
    "butane",
    "pentane",
    "hexane",
    "benzene",
    "toluene",
    "phenol",
    "aniline",
    "glycine",
    "alanine",
    "serine",
]


@cache
def _trained(texts: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(texts: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<s>`` and ``</s>``, a chat template, and no padding token, as Llama has it."""
    tokenizer = Tokenizer.from_str(_trained(tuple(texts)))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(seed: int = 0, vocab_size: int = 300, hidden_size: int = 32, **changes) -> LlamaForCausalLM:
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.1,
    }
    config = LlamaConfig(**settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def save_checkpoint(folder: Path, **changes) -> str:
    tiny_llama(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_chats(path: Path, count: int = 40) -> str:
    """Chats whose answers repeat the question's word: `rows` differ in word and number."""
    lines = []
    for index in range(count):
        word = WORDS[index % len(WORDS)]
        messages = [
            {"role": "user", "content": f"name {index} {word}"},
            {"role": "assistant", "content": f"{word} {word} {index % 7}"},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
