"""``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` of `AuxiliaryHeads`.

They use ``HfApi`` and ``hf_hub_download``, not huggingface_hub's ``ModelHubMixin``: that neither
knows the commit that it loads nor returns the one that it makes.
"""

import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn

from ..basics.tensors import shape_difference, shapes_of
from .artifact import HeadsFiles, find_heads, save_artifact
from .backbone import Backbone
from .config import HeadsConfig
from .publishing import push_heads
from .repository import Destination
from .sharding import whole

Heads = TypeVar("Heads", bound="PretrainedHeads")


class PretrainedHeads(nn.Module, ABC):
    """Base class of `AuxiliaryHeads`.

    Attributes:
        config: description of the heads.
        repo_id, commit: Hub repository and commit that the heads were loaded from, or None.
    """

    config: HeadsConfig
    repo_id: str | None = None
    commit: str | None = None

    @classmethod
    @abstractmethod
    def from_config(cls: type[Heads], config: HeadsConfig, backbone: Backbone) -> Heads:
        """Heads of the described shape, with initial weights."""

    @abstractmethod
    def plain_state_dict(self) -> dict[str, Tensor]:
        """Name -> parameter, with the names and shapes that `from_config` makes."""

    def recorded_as(self, source: str) -> str:
        """How a record names them: by repository and commit, else by the folder's name."""
        return f"{self.repo_id}@{self.commit}" if self.repo_id else os.path.basename(os.path.normpath(source))

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``config.json``, ``model.safetensors``, a model card, and a plot if evaluated.

        An interrupted save leaves the old heads or the new ones, whole.

        Raises:
            NotADirectoryError: if ``save_directory`` is a file.
        """
        save_artifact(save_directory, self.config, self.plain_state_dict())

    @classmethod
    def from_pretrained(
        cls: type[Heads],
        pretrained_model_name_or_path: str | os.PathLike,
        base_model: nn.Module,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Heads:
        """Load heads onto the base model's device and in its dtype, without drawing random numbers.

        Configuration and weights come from one commit, which the heads keep as ``commit``. A
        warning names both sizes if the base model's vocabulary was resized.

        Args:
            pretrained_model_name_or_path: folder, or repository id on the Hub.
            base_model: the model that the heads were made for, with or without PEFT adapters.
            revision: branch, tag or commit on the Hub.
            token: Hub token; True or None takes the stored one, False none.
            cache_dir: Hub cache folder.
            local_files_only: use the cache and never ask the Hub.
            force_download: download again even if the cache holds the files.

        Raises:
            FileNotFoundError: if there are no heads, or none at this revision.
            PermissionError: if the token may not read them.
            ConnectionError: if the Hub cannot be reached and the cache does not hold them.
            ValueError: if they are damaged, unknown, or were made for another base model.
            TypeError: if ``base_model`` is not a decoder-only causal language model.
        """
        source = os.fspath(pretrained_model_name_or_path)
        files = find_heads(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        config = files.read_config()
        backbone = Backbone.of(base_model)
        if note := config.require_base_model(whole(backbone.lm_head.weight), source):
            warnings.warn(note, stacklevel=2)
        heads = cls.from_config(config, backbone)
        _fill(heads, files)
        heads.repo_id, heads.commit = files.repo_id, files.commit
        return heads.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        force: bool = False,
    ) -> CommitInfo:
        """Publish the heads in one commit; the repository is made if there is none.

        Args:
            repo_id: ``"organisation/name"``.
            commit_message: message in the history.
            private: visibility of a new repository; None takes the owner's default.
            token: Hub token; True or None takes the stored one.
            revision: branch to commit to; it is made if there is none.
            create_pr: open a pull request instead of changing the branch.
            license: Hub identifier such as ``"apache-2.0"``; None keeps that of the configuration.
            force: replace whatever the repository holds.

        Returns:
            the commit; its ``oid`` is the revision that loads exactly these heads.

        Raises:
            FileExistsError: if the repository holds something else than heads of this base model.
            FileNotFoundError: if there is no such repository for this token.
            PermissionError: if the token may not write to it.
            ConnectionError: if the Hub cannot be reached, or the transfer fails.
        """
        to = Destination(repo_id, commit_message, private, token, revision, create_pr)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_heads(folder, to, license=license, force=force)


def load_weights(heads: nn.Module, folder: str | os.PathLike) -> None:
    """Copy an artifact's weights into ``heads``; a ValueError if damaged or of other shapes."""
    files = find_heads(os.fspath(folder))
    files.read_config()
    _fill(heads, files)


@torch.no_grad()
def _fill(heads: nn.Module, files: HeadsFiles) -> None:
    """Copy in place: low_cpu_mem_usage makes parameters meta tensors (huggingface/peft#1961)."""
    own, weights = heads.state_dict(), files.read_weights()
    if difference := shape_difference(shapes_of(weights), shapes_of(own)):
        raise ValueError(
            f"{files.weights}: do not fit the base model's kind of layer: {difference} Use the heads with the base model "
            "they were made for."
        )
    for name, tensor in own.items():
        tensor.copy_(weights[name])
