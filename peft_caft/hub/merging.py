"""Merges an adapter into its base model: a plain folder that needs neither peft nor peft_caft."""

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..basics.file_names import ADAPTER_CONFIG_NAME
from ..basics.files import new_folder
from ..basics.reading import read_json


def merge(adapter: str, output: str, model: str | None = None, dtype: str = "auto") -> None:
    """Merge an adapter into its base model, and save it with the tokenizer, whole or not at all.

    Args:
        adapter: folder of a LoRA or CAFT adapter.
        output: folder to make.
        model: base model, folder or Hub id; None takes the one that the adapter names.
        dtype: ``"auto"`` takes the base model's.

    Raises:
        FileNotFoundError: if ``adapter`` holds no adapter.
        FileExistsError: if ``output`` exists.
        ValueError: if no base model is known.
    """
    if Path(output).exists():
        raise FileExistsError(f"output: {output} exists, expected a new folder. Remove it or choose another one.")
    model = named_base_model(adapter, model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    with new_folder(output) as folder:
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def named_base_model(adapter: str, model: str | None = None) -> str:
    """The base model that the adapter in a folder names, unless ``model`` is given.

    Raises:
        FileNotFoundError: if the folder holds no adapter.
        ValueError: if no base model is known.
    """
    config = Path(adapter, ADAPTER_CONFIG_NAME)
    if not config.is_file():
        raise FileNotFoundError(
            f"adapter: no {ADAPTER_CONFIG_NAME} in {adapter!r}, expected a folder that `peft-caft train` or save_pretrained "
            "wrote. For an adapter on the Hub, name its base model with --model, which `peft-caft evaluate` takes."
        )
    named = model or read_json(config).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"model: {config} names no base model, expected one. Pass --model.")
    return named
