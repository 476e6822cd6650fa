"""Resumes CAFT training from a saved adapter, which PEFT alone loads as a plain LoRA adapter."""

import os
from typing import Any

from peft import PeftModel
from torch import nn

from ..basics.adapter_files import load_peft_model
from ..basics.checkpoints import readable
from ..basics.run_folder import first_difference
from .config import caft_field_names
from .model import CAFTConfig

SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout")


def load_adapter(
    model: nn.Module,
    adapter: str | os.PathLike,
    adapter_name: str = "default",
    is_trainable: bool = True,
    **kwargs: Any,
) -> PeftModel:
    """Load a saved CAFT adapter for further CAFT training.

    Args:
        model: base model; or a CAFT ``PeftModel``, to which an inactive adapter is added, or whose
            adapter of that name gets the saved weights.
        adapter: folder, or repository id on the Hub.
        adapter_name: name of the adapter in the model.
        is_trainable: whether it trains; False loads it for inference, without its heads.
        kwargs: arguments of ``hf_hub_download`` (``revision``, ``token``, ...).

    Returns:
        the PEFT model.

    Raises:
        FileNotFoundError: if the adapter is not a CAFT adapter.
        ValueError: if it is damaged, was made for another model, or cannot take the place of the
            adapter of that name, since they differ in rank or the like.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained("organisation/base")
        >>> model = load_adapter(base, "adapter")
        >>> Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()]).train()
    """
    source = os.fspath(adapter)
    config = CAFTConfig.from_pretrained(source, **kwargs)
    if not isinstance(model, PeftModel):
        return load_peft_model(
            model, source, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **kwargs
        )
    is_new = adapter_name not in model.peft_config
    if is_new:
        config.inference_mode = not is_trainable
        with readable("adapter", source, "an adapter of the base model"):
            model.add_adapter(adapter_name, config)
    else:
        own = model.peft_config[adapter_name]
        # What no tensor shows; loading compares their shapes.
        fields = {*caft_field_names(), *SCALING} - {"heads_commit"}
        if different := first_difference(*({name: getattr(c, name) for name in fields} for c in (config, own))):
            raise ValueError(
                f"adapter {source!r}: trained otherwise than adapter {adapter_name!r}, whose place it would take; {different}. Load it "
                "under another name."
            )
    try:
        return load_peft_model(model, source, adapter_name=adapter_name, is_trainable=is_trainable, **kwargs)
    except BaseException:
        if is_new:
            model.delete_adapter(adapter_name)
        raise
