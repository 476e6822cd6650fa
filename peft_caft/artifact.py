"""Auxiliary heads on disk and on the Hub: ``config.json``, ``model.safetensors`` and a model card.

``config.json`` holds the hash of the weights it belongs to. A save writes the new configuration first under a pending
name, then replaces the weights, then the configuration: whenever it is cut off, one configuration on disk matches the
weights on disk, and a reader takes that one. The old card goes before the old weights, so that none describes others.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .atomic import replacing, write_text
from .backbone import Backbone
from .heads_card import CARD_NAME, PLOT_NAME, write_card
from .heads_config import HeadsConfig
from .hub_errors import explained
from .sharding import whole

if TYPE_CHECKING:
    from .heads import AuxiliaryHeads

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
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
        for describing_the_old in (CARD_NAME, PLOT_NAME):
            (folder / describing_the_old).unlink(missing_ok=True)
    write_text(folder / CONFIG_NAME, config.to_json())
    (folder / PENDING_CONFIG_NAME).unlink(missing_ok=True)
    write_card(folder, config)


def _finish_interrupted_save(folder: Path) -> None:
    """Give weights whose save was cut off the configuration that belongs to them, before the next save replaces it."""
    pending, weights = folder / PENDING_CONFIG_NAME, folder / WEIGHTS_NAME
    if not pending.is_file() or not weights.is_file():
        return
    try:
        belongs = HeadsConfig.from_file(pending).weights_sha256 == sha256(weights)
    except ValueError:  # another version of this package left it: the save that starts now replaces it anyway
        return
    if belongs:
        os.replace(pending, folder / CONFIG_NAME)


@dataclass(frozen=True)
class HeadsFiles:
    """Where an artifact's two files lie on this machine, and where they came from."""

    config: Path
    weights: Path
    repo_id: str | None = None
    commit: str | None = None

    def read_config(self) -> HeadsConfig:
        """The configuration that belongs to the weights on disk; see the module's docstring.

        Raises:
            ValueError: if it is not one of heads, or the weights are damaged.
        """
        return _config_of_weights(self.config, self.weights)


def find_heads(source: str, field: str = "heads", revision: str | None = None, **hub: Any) -> HeadsFiles:
    """The files of heads in a folder or on the Hub, both from one commit.

    Args:
        source: folder, or repository id.
        field: the argument that named the heads, for messages.
        revision: branch, tag or commit on the Hub.
        hub: further arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `hub_errors.explained`.
    """
    folder = Path(source)
    if folder.is_dir():
        files = HeadsFiles(folder / CONFIG_NAME, folder / WEIGHTS_NAME)
        interrupted = files.weights.is_file() and (folder / PENDING_CONFIG_NAME).is_file()  # the very first save
        for path in (files.config, files.weights):
            if not path.is_file() and not interrupted:
                raise FileNotFoundError(
                    f"{field}: no {path.name} in {source!r}, expected a folder written by AuxiliaryHeads.save_pretrained."
                    " Train heads with `peft-caft train-heads`, or give a Hub repository id."
                )
        return files
    with explained(field, source, revision):
        config = Path(_download(field, source, CONFIG_NAME, revision, hub))
        # The cache keeps a file under snapshots/COMMIT. Someone may push between the two downloads.
        commit = config.parent.name
        weights = Path(_download(field, source, WEIGHTS_NAME, commit, hub))
    return HeadsFiles(config, weights, source, commit)


def _download(field: str, repo_id: str, name: str, revision: str | None, hub: dict) -> str:
    try:
        return hf_hub_download(repo_id, name, revision=revision, **hub)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{field}: no {name} in the Hub repository {repo_id!r} (revision {revision or 'main'}). Expected a repository "
            "that holds auxiliary heads, not an adapter or a model."
        ) from error


def load_heads(source: str, base_model: nn.Module, revision: str | None = None, **hub: Any) -> AuxiliaryHeads:
    """Load heads; `AuxiliaryHeads.from_pretrained` describes the arguments and errors."""
    from .heads import AuxiliaryHeads

    files = find_heads(source, revision=revision, **hub)
    config = files.read_config()
    backbone = Backbone.of(base_model)
    config.require_base_model(whole(backbone.lm_head.weight), source)
    heads = AuxiliaryHeads._build(config, backbone)
    _fill(heads, _read_weights(files.weights), files.weights)
    heads.repo_id, heads.commit = files.repo_id, files.commit
    return heads.eval()


def load_weights(heads: AuxiliaryHeads, folder: Path) -> None:
    """Copy the weights of an artifact into heads of the same shape, in place.

    Raises:
        ValueError: if they are damaged or of other shapes.
    """
    files = find_heads(str(folder))
    files.read_config()
    _fill(heads, _read_weights(files.weights), files.weights)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _config_of_weights(config_path: Path, weights_path: Path) -> HeadsConfig:
    pending = config_path.with_name(PENDING_CONFIG_NAME)
    config = HeadsConfig.from_file(config_path if config_path.is_file() else pending)
    if config.weights_sha256 is None:
        return config
    digest = sha256(weights_path)
    if config.weights_sha256 != digest and pending.is_file():
        config = HeadsConfig.from_file(pending)
    if config.weights_sha256 != digest:
        raise ValueError(
            f"{weights_path}: damaged. Its sha256 is {digest}, expected {config.weights_sha256} as "
            f"recorded in {config_path.name}. Save the heads again, or download them again (force_download=True)."
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
