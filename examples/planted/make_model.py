"""A small random Llama whose tokens are the words of ahead.py: ``python make_model.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from ahead import ADJECTIVES, AHEAD, KINDS, NOUNS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(folder: str | Path, seed: int = 0) -> None:
    """Write the checkpoint: 3 layers, hidden size 64, weights drawn from ``seed``."""
    names = [f"name{kind}" for kind in range(KINDS)]
    ahead = [f"kind{kind}-{number}" for kind in range(KINDS) for number in range(AHEAD)]
    words = ["<s>", "</s>", "<unk>", *ADJECTIVES, *NOUNS, *names, *ahead]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


if __name__ == "__main__":
    make_model(sys.argv[1])
