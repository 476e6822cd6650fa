"""Whole models; of an adapter, the base model that it names, and the tokenizer beside it."""

import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from .adapter_files import load_peft_model, read_lora_config
from .checkpoints import load_tokenizer, readable
from .file_names import ADAPTER_WEIGHTS_NAME
from .hub_errors import file_of
from .tensors import Tensors

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def named_base_model(adapter: str, model: str | None = None) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision, unless ``model`` is given.

    Args:
        adapter, model: folder or Hub id.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is damaged, or no base model is known.
    """
    config = read_lora_config(adapter)
    if model is not None:
        return model, None
    if not config.base_model_name_or_path:
        raise ValueError(f"model: the adapter {adapter!r} names no base model, expected one. Pass --model.")
    return config.base_model_name_or_path, config.revision


def tokenizer_of(model: str, adapter: str | None = None, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter where there is one, else that of the base model.

    Args:
        model, adapter: folder or Hub id.
        revision: that of the base model on the Hub.

    Raises:
        ValueError: if ``model`` is an adapter itself.
    """
    require_no_adapter(model)
    if adapter is not None and _has_tokenizer(adapter):
        return load_tokenizer(adapter, "adapter")
    return load_tokenizer(model, revision=revision)


def whole_model(source: str, **arguments: Any) -> Any:
    """The causal language model in a folder or repository, in evaluation mode.

    Args:
        arguments: those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        OSError, ValueError: if it cannot be loaded, is an adapter, or lacks a tensor of the model.
    """
    require_no_adapter(source)
    with readable("model", source, "a causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model: {source!r} lacks {len(missing)} tensor(s) of {type(model).__name__}, first {missing[0]!r}, which transformers would "
            "fill with random numbers. Download or save it again."
        )
    return model


def require_no_adapter(source: str) -> None:
    """Raise a ValueError for an adapter, which transformers would load with its base model."""
    if find_adapter_config_file(source) is not None:
        raise ValueError(
            f"model: got {source!r}, an adapter, expected a whole model. Merge it first: `peft-caft merge {source} FOLDER`; or name "
            "its base model, and the adapter with --adapter where a command has it."
        )


def with_adapter(
    base: PreTrainedModel, adapter: str, tokenizer: PreTrainedTokenizerBase, field: str = "adapter"
) -> PeftModel:
    """``base`` with the adapter, whose tokens it gets embeddings for.

    Raises:
        ValueError: if the adapter does not fit the base model.
    """
    resize_embedding(base, tokenizer, adapter)
    rows = embedding_rows(base)
    try:
        return load_peft_model(base, adapter, field)
    except ValueError as error:
        raise ValueError(
            f"{error} The base model is {base.name_or_path!r} with {rows:,} embeddings: if it is another one than the adapter was "
            "trained on, name that with --model; if tokens were added, save their tokenizer beside the adapter: "
            f"tokenizer.save_pretrained({adapter!r})."
        ) from error


def resize_embedding(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None) -> None:
    """Give ``base`` the embeddings that an adapter was trained with, as AutoPeftModel does.

    Their number is that in the adapter's file, else that of the tokenizer, if it has tokens that
    the base model's own one lacks. New rows are the mean of the others, the same in each call,
    until the adapter's own replace them.
    """
    rows = embedding_rows(base)
    held = {} if adapter is None else saved_vocabulary_rows(base, adapter)
    needed = max(held.values(), default=rows)
    if len(tokenizer) > needed and len(tokenizer) > _own_tokens(base):
        needed = len(tokenizer)
    lacking = {"embedding"} if base.config.get_text_config().tie_word_embeddings else {"embedding", "lm_head"}
    if lacking := lacking - held.keys():
        trained = _trained_tokens(adapter) if adapter and "embedding" in lacking else set()
        if unknown := [index for index in range(rows, needed) if index not in trained]:
            warnings.warn(
                f"{adapter or base.name_or_path}: holds no {' and no '.join(sorted(lacking))} of "
                f"{', '.join(tokenizer.convert_ids_to_tokens(unknown[:5]))}, {len(unknown)} token(s) that were added to the base model's. "
                "They get the mean of the others.",
                stacklevel=3,
            )
    if needed != rows:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base.resize_token_embeddings(needed, mean_resizing=base.device.type != "meta")


def embedding_rows(model: Any) -> int:
    """Number of tokens that a model, with PEFT's wrappers or without, has embeddings for."""
    modules = model.get_input_embeddings().modules()
    return next(module.num_embeddings for module in modules if hasattr(module, "num_embeddings"))


def saved_vocabulary_rows(base: PreTrainedModel, adapter: str) -> dict[str, int]:
    """Rows of the whole ``"embedding"`` and ``"lm_head"``, where an adapter's file has them."""
    found: dict[str, int] = {}
    for part, tensors in of_vocabulary(base, adapter).items():
        for name, shape in tensors.items():
            if name.endswith("lora_embedding_A"):
                found.setdefault(part, shape[1])
            elif name.endswith("weight") and not name.endswith("lora_A.weight"):
                found.setdefault(part, shape[0])
    return found


def of_vocabulary(base: PreTrainedModel, adapter: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """``"embedding"`` and ``"lm_head"`` -> name and shape of the adapter's tensors for it."""
    path = file_of("adapter", adapter, ADAPTER_WEIGHTS_NAME)
    shapes = Tensors.of(path).shapes if path else {}
    modules = {"embedding": base.get_input_embeddings(), "lm_head": base.get_output_embeddings()}
    prefixes = {
        part: tuple(f"base_model.model.{name}." for name, module in base.named_modules() if module is own)
        for part, own in modules.items()
    }
    return {
        part: {n: shape for n, shape in shapes.items() if n.startswith(prefix)} for part, prefix in prefixes.items()
    }


def _trained_tokens(adapter: str) -> set[int]:
    """Tokens that the adapter has embeddings of its own for."""
    found: Any = read_lora_config(adapter).trainable_token_indices or []
    return set(found if isinstance(found, list) else (index for indices in found.values() for index in indices))


def _has_tokenizer(adapter: str) -> bool:
    if constants.HF_HUB_OFFLINE and not Path(adapter).is_dir():
        cached = try_to_load_from_cache(adapter, TOKENIZER_CONFIG_NAME)
        if cached is not None:  # a path, or that the Hub has no such file
            return cached is not _CACHED_NO_EXIST
    return file_of("adapter", adapter, TOKENIZER_CONFIG_NAME) is not None


def _own_tokens(base: PreTrainedModel) -> int:
    """Number of tokens of the base model's own tokenizer, 0 if it has none."""
    try:
        return len(load_tokenizer(base.name_or_path))
    except (OSError, ValueError):
        return 0
