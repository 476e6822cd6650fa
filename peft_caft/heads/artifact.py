"""Auxiliary heads on disk and on the Hub: ``config.json``, ``model.safetensors`` and a model card.

``config.json`` holds the hash of the weights it belongs to. A save writes the new configuration
under a pending name, removes the old card, and replaces the weights, then the configuration. So
one configuration on disk always matches the weights, and a reader takes that one.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..basics.file_names import CARD_NAME, CONFIG_NAME, PLOT_NAME, WEIGHTS_NAME
from ..basics.files import file_sha256, full_disk_explained, replacing, writable, write_text
from ..basics.hub_errors import file_of
from ..basics.reading import is_file, understood
from ..basics.tensors import Tensors, read_tensors
from .card import heads_card, write_card
from .config import HeadsConfig

PENDING_CONFIG_NAME = ".config.json.pending"


def save_artifact(save_directory: str | os.PathLike, config: HeadsConfig, weights: dict[str, Tensor]) -> None:
    """Write the artifact, and set the hash of its weights in ``config``.

    Args:
        save_directory: folder; it is made if there is none.
        weights: name -> tensor of any shape, dtype and device.

    Raises:
        NotADirectoryError: if ``save_directory`` is a file.
        OSError: if the disk is full, or the folder cannot be written.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise NotADirectoryError(f"save_directory: got the file {folder}, expected a folder to write heads into.")
    require_record(config, folder / CONFIG_NAME)
    with full_disk_explained(folder, "Heads that were there are kept."):
        _save(folder, config, weights)


def _save(folder: Path, config: HeadsConfig, weights: dict[str, Tensor]) -> None:
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted_save(folder)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            temporary,
            metadata={"format": "pt"},
        )
        config.weights_sha256 = file_sha256(temporary)
        write_text(folder / PENDING_CONFIG_NAME, config.to_json())
        for describing_the_old in (CARD_NAME, PLOT_NAME):
            (folder / describing_the_old).unlink(missing_ok=True)
    write_text(folder / CONFIG_NAME, config.to_json())
    (folder / PENDING_CONFIG_NAME).unlink(missing_ok=True)
    write_card(folder, config)


def _finish_interrupted_save(folder: Path) -> None:
    """Complete an interrupted save, before the next one overwrites its pending configuration."""
    pending, weights = folder / PENDING_CONFIG_NAME, folder / WEIGHTS_NAME
    if pending.is_file() and weights.is_file():
        with suppress(ValueError):  # another version of this package wrote it; the save that starts now replaces it
            if HeadsConfig.from_file(pending).weights_sha256 == file_sha256(weights):
                os.replace(pending, folder / CONFIG_NAME)


@dataclass(frozen=True)
class HeadsFiles:
    """Paths of an artifact's two files; repository and commit if they come from the Hub."""

    config: Path
    weights: Path
    repo_id: str | None = None
    commit: str | None = None

    def read_config(self) -> HeadsConfig:
        """The configuration that belongs to the weights on disk.

        Raises:
            ValueError: if it describes no heads, or the weights are damaged.
        """
        pending = self.config.with_name(PENDING_CONFIG_NAME)
        path = self.config if is_file(self.config) else pending
        config = HeadsConfig.from_file(path)
        digest = None if config.weights_sha256 is None else file_sha256(self.weights)
        if config.weights_sha256 != digest and is_file(pending):
            config = HeadsConfig.from_file(pending)
        if config.weights_sha256 != digest:
            raise ValueError(
                f"{self.weights}: damaged. Its sha256 is {digest}, expected {config.weights_sha256} as "
                f"recorded in {self.config.name}. Save the heads again, or download them again (force_download=True)."
            )
        _require_blocks(config, self.weights)
        return config

    def read_weights(self) -> dict[str, Tensor]:
        """Name -> tensor as saved, on the CPU; a ValueError if the file is damaged."""
        return read_tensors(self.weights)


def _require_blocks(config: HeadsConfig, weights: Path) -> None:
    """Raise a ValueError unless the file has the heads and layers that the configuration says.

    It is read before the heads are made, for which memory would be taken.
    """
    expected = {f"heads.{head}.{layer}" for head in range(config.num_heads) for layer in range(config.head_num_layers)}
    got = {".".join(name.split(".")[:3]) for name in Tensors.of(weights).shapes}
    if got != expected:
        odd = min(got ^ expected)
        raise ValueError(
            f"{weights}: {'holds' if odd in got else 'lacks'} {odd!r}, expected {config.num_heads} heads of {config.head_num_layers} blocks or layers "
            f"each, as {CONFIG_NAME} says. One of the two files is of other heads, or damaged: download or save the heads again."
        )


def require_record(config: HeadsConfig, path: Path) -> None:
    """Raise a ValueError if the record of training, free as it is, cannot be shown on a card."""
    advice = "Download or save the heads again."
    with understood(f"{path}: training", "`peft-caft train-heads`", advice, (ValueError,)):
        heads_card(config).encode()


def find_heads(source: str, field: str = "heads", revision: str | None = None, **hub: Any) -> HeadsFiles:
    """Find the files of heads in a folder, or download both from one commit.

    Args:
        source: folder, or repository id on the Hub.
        field: name of the argument that gave ``source``, for messages.
        revision: branch, tag or commit on the Hub.
        hub: further arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        FileNotFoundError: if there are no heads, or none at this revision.
        PermissionError: if the token may not read them.
        ConnectionError: if the Hub cannot be reached and the cache does not hold them.
    """
    folder = Path(source)
    if folder.is_dir():
        files = HeadsFiles(folder / CONFIG_NAME, folder / WEIGHTS_NAME)
        interrupted = is_file(files.weights) and is_file(folder / PENDING_CONFIG_NAME)  # the very first save
        for path in (files.config, files.weights):
            if not is_file(path) and not interrupted:
                raise FileNotFoundError(
                    f"{field}: no {path.name} in {source!r}, expected a folder written by AuxiliaryHeads.save_pretrained."
                    " Train heads with `peft-caft train-heads`, or give a Hub repository id."
                )
        return files
    found = {CONFIG_NAME: file_of(field, source, CONFIG_NAME, revision, **hub)}
    if (config := found[CONFIG_NAME]) is not None:
        # The cache keeps a file under snapshots/COMMIT; someone may push between the two downloads.
        found[WEIGHTS_NAME] = weights = file_of(field, source, WEIGHTS_NAME, config.parent.name, **hub)
        if weights is not None:
            return HeadsFiles(config, weights, source, config.parent.name)
    lacking = next(name for name, path in found.items() if path is None)
    raise FileNotFoundError(
        f"{field}: no {lacking} in the Hub repository {source!r} (revision {revision or 'main'}). Expected a repository that holds "
        "auxiliary heads, not an adapter or a model."
    )
