"""The files of an adapter, read and loaded with errors that name file and field."""

import math
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from .checkpoints import readable
from .checks import require_fields
from .file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from .hub_errors import file_of
from .reading import read_json
from .tensors import Tensors, read_tensors, require_finite, shape_difference, shapes_of


def read_lora_config(source: str, subfolder: str | None = None, hub: dict[str, Any] | None = None) -> LoraConfig:
    """The configuration of a LoRA or CAFT adapter as plain LoRA; `file_of` explains the rest.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is damaged, or that of another PEFT method.
    """
    path = file_of("adapter", source, ADAPTER_CONFIG_NAME, subfolder=subfolder, **hub or {})
    if path is None:
        raise FileNotFoundError(
            f"adapter: no {ADAPTER_CONFIG_NAME} in {source!r}, expected a folder or repository that `peft-caft train` or "
            "save_pretrained wrote."
        )
    values = read_json(path, "Save the adapter again.")
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type: got {values.get('peft_type')!r} in {path.name} of {source!r}, expected 'LORA', as CAFT and LoRA adapters "
            "have."
        )
    require_fields(values, LoraConfig, str(path), "Save the adapter again.", ("lora_alpha",))  # 16.0 does too
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: {name}: got {value}, expected a finite number. Save the adapter again.")
    with readable("adapter", source, "a LoRA adapter"):
        return LoraConfig.from_pretrained(str(path.parent))


def require_whole_adapter(folder: Path) -> None:
    """Raise a ValueError unless the folder's weights can be read, are finite and LoRA's."""
    config = read_lora_config(str(folder))
    weights = folder / ADAPTER_WEIGHTS_NAME
    _require_rank(config, weights)
    if not any("lora_" in name for name in read_tensors(weights)):
        raise ValueError(f"{weights}: holds no tensor of LoRA, expected an adapter's. Save the adapter again.")


def load_peft_model(
    model: nn.Module,
    source: str,
    field: str = "adapter",
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: LoraConfig | None = None,
    **arguments: Any,
) -> PeftModel:
    """``model`` with a saved adapter, of which every tensor is there, fits and is finite.

    Args:
        model: base model; or a ``PeftModel`` with an adapter of this name, which gets the values.
        source: folder, or repository id on the Hub.
        field: name of the argument that gave ``source``, for messages.
        config: configuration for a base model; None takes the one in ``source``.
        arguments: further ones of ``PeftModel.from_pretrained``.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if it is damaged, or was made for another model.
    """
    subfolder = arguments.get("subfolder")
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
    recorded = read_lora_config(source, subfolder, hub)
    weights = file_of(field, source, ADAPTER_WEIGHTS_NAME, subfolder=subfolder, **hub)
    if weights is not None:
        _require_rank(recorded, weights)
    elif file_of(field, source, "adapter_model.bin", subfolder=subfolder, **hub) is None:
        raise FileNotFoundError(
            f"{field}: no {ADAPTER_WEIGHTS_NAME} in {source!r}, expected one. Save the adapter again."
        )
    with readable(field, source, "an adapter of the base model"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        if weights is not None:
            shapes = Tensors.of(weights).shapes
        else:
            shapes = shapes_of(load_peft_weights(source, "cpu", subfolder=subfolder, **hub))
        if isinstance(
            model, PeftModel
        ):  # compared first: PEFT would write what fits over the adapter, then refuse the rest
            _require_fit(shapes, model, adapter_name, field, source)
            model.load_adapter(source, adapter_name, is_trainable=is_trainable, **arguments)
        else:
            model = PeftModel.from_pretrained(model, source, adapter_name, is_trainable, config, **arguments)
            _require_fit(shapes, model, adapter_name, field, source)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name and f".{adapter_name}" in name}
    require_finite(own, f"{field}: {source}")
    return model


def misfit(shapes: dict[str, tuple[int, ...]], model: PeftModel, adapter_name: str = "default") -> str | None:
    """A sentence about the first tensor of an adapter's file that does not fit; None if all do.

    Args:
        shapes: name -> shape in the file.
        model: model with an adapter of this name and the configuration in the file.
    """
    expected, with_vocabulary = (
        shapes_of(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=whole))
        for whole in (False, True)
    )
    # PEFT saves embedding and lm_head too where they are adapted or resized.
    expected |= {name: shape for name, shape in with_vocabulary.items() if name in shapes}
    return shape_difference(
        {n: s for n, s in shapes.items() if n in expected or not n.endswith(SAVED_TWICE)}, expected
    )


def _require_fit(
    shapes: dict[str, tuple[int, ...]], model: PeftModel, adapter_name: str, field: str, source: str
) -> None:
    if difference := misfit(shapes, model, adapter_name):
        raise ValueError(
            f"{field}: {source!r} cannot be loaded as an adapter of the base model: {difference} It was made for another model or other "
            "target_modules, or is damaged: save it again."
        )


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


# PEFT (0.21) writes these too where it saves a whole embedding, since tokens were added.
SAVED_TWICE = (".modules_to_save.weight", ".original_module.weight", ".trainable_tokens_delta")


def _require_rank(config: LoraConfig, weights: Path) -> None:
    """Raise a ValueError if the rank, for which memory would be taken, is that of no tensor."""
    largest = max((side for shape in Tensors.of(weights).shapes.values() for side in shape), default=0)
    ranks = {"r": config.r} | {f"rank_pattern.{name}": rank for name, rank in (config.rank_pattern or {}).items()}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or rank > largest:
            raise ValueError(
                f"{name}: got {rank!r} in {ADAPTER_CONFIG_NAME}, expected at most {largest:,}, the largest side of a tensor in "
                f"{weights}. Save the adapter again."
            )
