"""Models loaded, to be trained or to be evaluated, and checked against what was asked for."""

from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..basics.devices import chosen_device
from .engine import zero_stage
from .settings import FineTuningSettings


def load_for_inference(source: str, dtype: str, adapter: str | None = None, device: torch.device | None = None) -> Any:
    """A `PreTrainedModel` in evaluation mode; with an adapter, the `PeftModel` that holds both.

    Args:
        source, adapter: folder or Hub id.
        dtype: ``"auto"`` for the checkpoint's, or the name of a torch dtype.
        device: None takes the one that accelerate chooses.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
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
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=settings.loading_dtype, quantization_config=quantization
    )
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


def require_tokenizer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError unless the model has an embedding for every token of the tokenizer."""
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"tokenizer: got {len(tokenizer):,} tokens, expected at most {embeddings:,}, the rows of the model's embedding. "
            "It belongs to another model; put the model's own tokenizer into its folder."
        )
