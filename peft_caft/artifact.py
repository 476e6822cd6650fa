"""Auxiliary heads on disk and on the Hub: ``config.json``, ``model.safetensors`` and a model card.

``config.json`` holds the hash of the weights it belongs to. A save writes the new configuration first under a pending
name, then replaces the weights, then the configuration: whenever it is cut off, one configuration on disk matches the
weights on disk, and a reader takes that one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .atomic import replacing, write_text
from .backbone import Backbone
from .heads_card import heads_card
from .heads_config import HeadsConfig

if TYPE_CHECKING:
    from .heads import AuxiliaryHeads

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
PENDING_CONFIG_NAME = ".config.json.pending"


def save_heads(heads: AuxiliaryHeads, save_directory: str | os.PathLike) -> None:
    """Write the artifact; the parameters of LoRA inside the heads are merged into what is written.

    Raises:
        NotADirectoryError: if ``save_directory`` is a file.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise NotADirectoryError(f"save_directory: got the file {folder}, expected a folder to write heads into.")
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted_save(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.plain_state_dict().items()}
    config = heads.config
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
        config.weights_sha256 = sha256(temporary)
        write_text(folder / PENDING_CONFIG_NAME, config.to_json())
    write_text(folder / CONFIG_NAME, config.to_json())
    (folder / PENDING_CONFIG_NAME).unlink(missing_ok=True)
    write_text(folder / CARD_NAME, heads_card(config))


def _finish_interrupted_save(folder: Path) -> None:
    """Give weights whose save was cut off the configuration that belongs to them, before the next save replaces it."""
    pending, weights = folder / PENDING_CONFIG_NAME, folder / WEIGHTS_NAME
    if pending.is_file() and weights.is_file() and HeadsConfig.from_file(pending).weights_sha256 == sha256(weights):
        os.replace(pending, folder / CONFIG_NAME)


def load_heads(
    pretrained_model_name_or_path: str | os.PathLike,
    base_model: nn.Module,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> AuxiliaryHeads:
    """Load heads, on the base model's device and in its dtype, without drawing a random number.

    Args:
        pretrained_model_name_or_path: folder, or repository id on the Hub.
        base_model: the model that the heads were made for, with or without PEFT adapters.
        revision: branch, tag or commit on the Hub.
        token: Hub token, or True for the stored one.
        cache_dir: Hub cache folder.
        local_files_only: take what the cache holds and never ask the Hub.

    Raises:
        FileNotFoundError: if there are no heads.
        ValueError: if they are damaged, of an unknown kind or version, or made for another base model.
        TypeError: if ``base_model`` is not a decoder-only causal language model.
    """
    from .heads import AuxiliaryHeads

    source = str(pretrained_model_name_or_path)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    config_path, weights_path = (_locate(source, name, hub) for name in (CONFIG_NAME, WEIGHTS_NAME))
    config = _config_of_weights(config_path, weights_path)
    backbone = Backbone.of(base_model)
    config.require_base_model(backbone.lm_head.weight, source)
    heads = AuxiliaryHeads._build(config, backbone)
    _fill(heads, _read_weights(weights_path), weights_path)
    return heads.eval()


def load_weights(heads: AuxiliaryHeads, folder: Path) -> None:
    """Copy the weights of an artifact into heads of the same shape, in place.

    Raises:
        ValueError: if they are damaged or of other shapes.
    """
    _config_of_weights(_locate(str(folder), CONFIG_NAME, {}), folder / WEIGHTS_NAME)
    _fill(heads, _read_weights(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _locate(source: str, name: str, hub: dict) -> Path:
    if Path(source).is_dir():
        path = Path(source, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"heads: no {name} in {source!r}, expected a folder written by AuxiliaryHeads.save_pretrained. Train "
                "heads with `peft-caft train-heads`, or give a Hub repository id."
            )
        return path
    try:
        return Path(hf_hub_download(source, name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"heads: {source!r} is neither a folder nor a Hub repository id such as 'org/Llama-2-7b-hf-caft-heads'."
        ) from error
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"heads: no {name} in the Hub repository {source!r} (revision {hub.get('revision') or 'main'}), or no such "
            "repository, or it is private and the token is missing, or it is not in the local cache. Expected a repository that holds auxiliary heads, not an adapter or a model."
        ) from error


def _config_of_weights(config_path: Path, weights_path: Path) -> HeadsConfig:
    """The configuration that belongs to the weights on disk; see the module's docstring."""
    config = HeadsConfig.from_file(config_path)
    if config.weights_sha256 is None:
        return config
    digest = sha256(weights_path)
    pending = config_path.with_name(PENDING_CONFIG_NAME)
    if config.weights_sha256 != digest and pending.is_file():
        config = HeadsConfig.from_file(pending)
    if config.weights_sha256 != digest:
        raise ValueError(
            f"{weights_path}: damaged. Its sha256 is {digest}, expected {config.weights_sha256} as "
            f"recorded in {config_path.name}. Download or save the heads again."
        )
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or truncated, not a readable safetensors file ({error}). Download or save the heads again."
        ) from error


@torch.no_grad()
def _fill(heads: AuxiliaryHeads, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy the weights in place: PEFT's low_cpu_mem_usage would turn newly registered parameters into meta tensors."""
    own = heads.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if got != expected:
        wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(
            f"{path}: {len(wrong)} tensor(s) do not fit the base model's kind of layer; first {wrong[0]!r}: got "
            f"{got.get(wrong[0], 'nothing')}, expected {expected.get(wrong[0], 'nothing')}. Use the heads with the base "
            "model they were made for."
        )
    for name, tensor in own.items():
        tensor.copy_(weights[name])
