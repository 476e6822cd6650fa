"""`CAFTConfig`: configuration of LoRA and of the objective."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import PeftType, TaskType

from ..basics.adapter_files import read_lora_config
from ..basics.file_names import CAFT_CONFIG_NAME
from ..basics.files import write_text
from ..basics.hub_errors import file_of
from ..basics.reading import read_json
from .objective_config import ObjectiveConfig
from .registration import peft_type

CAFT_CONFIG_FORMAT_VERSION = 1


@dataclass
class CAFTConfig(ObjectiveConfig, LoraConfig):
    """Configuration of concept-aware fine-tuning (CAFT, arXiv 2506.07833) with LoRA adapters.

    Every field of [`~peft.LoraConfig`] keeps its meaning. The training loss is

        L = CE_1 + beta * gamma(s) * sum_{k=2..n} alpha^(k-1) * CE_k

    where CE_k is the cross entropy of the head that predicts token t+k from the hidden state at t,
    and CE_1 the model's own next-token loss. ``task_type`` is always ``CAUSAL_LM``.

    On disk a CAFT adapter is a plain LoRA adapter (``adapter_config.json`` says ``LORA``), which
    loads without this package. The fields of the objective lie beside it in ``caft_config.json``.

    Raises:
        ValueError: if a field is out of range; the message names field, value and expected range.

    Example:
        >>> config = CAFTConfig(heads="organisation/heads", r=16, target_modules="all-linear")
        >>> base = AutoModelForCausalLM.from_pretrained("organisation/base")
        >>> model = get_peft_model(base, config)
        >>> Trainer(model, args, train_dataset=data, callbacks=[CAFTCallback()]).train()
        >>> model.save_pretrained("adapter")  # a plain LoRA adapter
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(
                f"task_type: got {self.task_type!r}, expected 'CAUSAL_LM' (or None). CAFT predicts future tokens, which "
                "only a causal language model does; use LoraConfig for other tasks."
            )
        # Without a task type, PeftModel.forward calls the base model and bypasses the tuner.
        self.task_type: TaskType = TaskType.CAUSAL_LM
        self.require_valid_objective()

    @property
    def init_weights(self) -> Any:
        """The name by which PEFT sets ``init_lora_weights`` when it converts a PiSSA-like adapter.

        ``PeftModel.save_pretrained`` (peft 0.21) uses this name for every method but LORA.
        """
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value

    def to_lora_config(self) -> LoraConfig:
        """A shallow copy as a plain ``LoraConfig``, without the fields of the objective."""
        lora = object.__new__(LoraConfig)
        lora.__dict__.update({k: v for k, v in self.__dict__.items() if k not in caft_field_names()})
        lora.peft_type = PeftType.LORA
        return lora

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` of a plain LoRA adapter, and ``caft_config.json``."""
        self.to_lora_config().save_pretrained(save_directory, **kwargs)
        caft = {"format_version": CAFT_CONFIG_FORMAT_VERSION} | {n: getattr(self, n) for n in caft_field_names()}
        write_text(Path(save_directory) / CAFT_CONFIG_NAME, json.dumps(caft, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CAFTConfig:
        """Read a CAFT adapter's two configuration files from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: folder, or repository id on the Hub.
            subfolder: folder inside it.
            kwargs: arguments of ``hf_hub_download`` (``revision``, ``token``, ...).

        Raises:
            FileNotFoundError: if there is no ``caft_config.json``, as in a plain LoRA adapter.
            ValueError: if the format version or a field is unknown.
        """
        hub_kwargs, _, _ = cls._split_kwargs(kwargs)
        lora = read_lora_config(str(pretrained_model_name_or_path), subfolder, hub_kwargs)
        path, caft = _read_caft_config(str(pretrained_model_name_or_path), subfolder, hub_kwargs)
        shared = {f.name: getattr(lora, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        try:
            return cls(**{**shared, "peft_type": peft_type(), **caft})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


CAFTConfig.__module__ = "peft_caft"  # pickles load it from there, which registers it with PEFT


def target_modules(given: str) -> str | list[str]:
    """PEFT's ``target_modules`` from a text: ``"all-linear"``, or module names with commas."""
    return given if given == "all-linear" else [name.strip() for name in given.split(",")]


def caft_field_names() -> list[str]:
    """Names of the fields that `CAFTConfig` adds to ``LoraConfig``."""
    return [f.name for f in dataclasses.fields(ObjectiveConfig)]


def _read_caft_config(source: str, subfolder: str | None, hub: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    path = file_of("adapter", source, CAFT_CONFIG_NAME, subfolder=subfolder, **hub)
    if path is None:
        raise FileNotFoundError(
            f"{CAFT_CONFIG_NAME} not found in {source!r}: this is not a CAFT adapter, or a plain LoRA one. To go on "
            "training a LoRA adapter with CAFT, pass a CAFTConfig with the same r, lora_alpha and target_modules as "
            "`config` to PeftModel.from_pretrained(..., is_trainable=True)."
        )
    caft = read_json(path, "Save the adapter again.")
    version = caft.pop("format_version", None)
    if version != CAFT_CONFIG_FORMAT_VERSION:
        raise ValueError(
            f"format_version in {path}: got {version!r}, expected {CAFT_CONFIG_FORMAT_VERSION}. The adapter was "
            "written by another version of peft-caft; install that version."
        )
    if unknown := sorted(set(caft) - set(caft_field_names())):
        raise ValueError(f"{path}: unknown field(s) {', '.join(unknown)}; known: {', '.join(caft_field_names())}.")
    return path, caft
