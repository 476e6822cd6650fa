"""Models loaded, to be trained or to be evaluated, and checked against what was asked for."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..basics.adapters import embedding_rows, whole_model, with_adapter
from ..basics.devices import chosen_device
from .engine import zero_stage
from .settings import FineTuningSettings


def load_for_inference(
    source: str,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | None = None,
    revision: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """A `PreTrainedModel` in evaluation mode; with an adapter, the `PeftModel` that holds both.

    Args:
        source, adapter: folder or Hub id.
        dtype: ``"auto"`` for the checkpoint's, or the name of a torch dtype.
        tokenizer: the one that `tokenizer_of` found for both.
        revision: that of ``source`` on the Hub.
        device: None takes the one that accelerate chooses.
    """
    model: Any = whole_model(source, dtype=dtype, revision=revision)
    if adapter is not None:
        model = with_adapter(model, adapter, tokenizer)
    return model.to(device or chosen_device()).eval()


def load_base_model(settings: FineTuningSettings) -> PreTrainedModel:
    """The base model to train, in the requested precision, which may be 4 or 8 bits.

    Raises:
        ModuleNotFoundError: if 4 or 8 bits are requested and bitsandbytes is not installed.
    """
    quantization = None
    if settings.load_in_4bit or settings.load_in_8bit:
        name = "load_in_4bit" if settings.load_in_4bit else "load_in_8bit"
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(f"{name}: needs bitsandbytes. Run: pip install bitsandbytes, or leave it out.")
        computing = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
        quantization = BitsAndBytesConfig(
            load_in_4bit=settings.load_in_4bit,
            load_in_8bit=settings.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computing,
        )
    model = whole_model(settings.model, dtype=settings.loading_dtype, quantization_config=quantization)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Linear4bit (bitsandbytes 0.50.2) would pack its weight in an evaluation on a CPU, and
            # training after it would read that wrongly.
            module.support_avx512bf16_for_cpu = False
    return model


def require_dtype(model: PreTrainedModel, dtype: str, args: TrainingArguments) -> None:
    """Raise a ValueError if ZeRO-3 loaded a model in another dtype than the requested one."""
    got = str(model.dtype).removeprefix("torch.")
    if zero_stage(args) == 3 and dtype not in ("auto", got):
        raise ValueError(
            f"dtype: got {got}, expected {dtype}: ZeRO-3 loads a model in the dtype that DeepSpeed trains in. Set mixed_precision "
            "in the accelerate configuration (bf16 for bfloat16, fp16 for float16, 'no' for float32), or leave --dtype out."
        )


def require_tokenizer_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]]
) -> None:
    """Raise a ValueError unless the model has embeddings for what the tokenizer makes of the data.

    Tokenizers may have more tokens than their models: Gemma 3's names images, also beside models
    that read none. So only added tokens may lack an embedding, and the data must not use them.

    Args:
        rows: token ids of the data.
    """
    embeddings = embedding_rows(model)
    without = {index for index in tokenizer.get_vocab().values() if index >= embeddings}
    used = sorted(without & set().union(*rows, {tokenizer.pad_token_id})) if without else []
    if without <= tokenizer.added_tokens_decoder.keys() and not used:
        return
    names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(used[:3])))
    raise ValueError(
        f"tokenizer: got {len(tokenizer):,} tokens, expected at most {embeddings:,}, the rows of the model's embedding"
        f"{f', beyond which the data use {names}' if names else ''}. If the tokenizer belongs to another model, put the model's own into its folder; if tokens "
        "were added, resize the model first: model.resize_token_embeddings(len(tokenizer)), and save both."
    )
