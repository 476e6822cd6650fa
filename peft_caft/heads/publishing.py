"""Publishes heads on the Hub in one commit, with their card."""

import dataclasses
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..basics.checkpoints import readable
from ..basics.file_names import CARD_NAME, CONFIG_NAME, PLOT_NAME, WEIGHTS_NAME
from ..basics.files import write_text
from ..basics.reading import is_file, read_text
from .artifact import find_heads, require_record
from .card import heads_card, write_card
from .repository import Destination, Repository


def push_heads(
    folder: str | os.PathLike,
    to: Destination,
    *,
    base_model: str | None = None,
    license: str | None = None,
    force: bool = False,
) -> CommitInfo:
    """Publish the heads in a folder that `AuxiliaryHeads.save_pretrained` wrote.

    Args:
        folder: the folder.
        to: repository and commit.
        base_model: Hub id of the base model; None keeps that of the configuration.
        license: Hub identifier; None keeps that of the configuration.
        force: replace whatever the repository holds.

    Raises:
        ValueError: if ``base_model`` is no repository id.
        FileExistsError: if the repository holds something else than heads of this base model.
    """
    source = Path(folder)
    config = find_heads(str(source), "folder").read_config()
    require_record(config, source / CONFIG_NAME)
    written = heads_card(config, has_plot=(source / PLOT_NAME).exists())
    if base_model is not None:
        config = dataclasses.replace(config, base_model_name_or_path=require_hub_id("base_model", base_model))
    config = dataclasses.replace(config, license=license or config.license)
    repository = Repository.open(to)
    if not force:
        repository.require_heads_of_same_base(config)
    with tempfile.TemporaryDirectory() as scratch:
        generated = Path(scratch)
        write_text(generated / CONFIG_NAME, config.to_json())
        card = source / CARD_NAME
        if is_file(card) and read_text(card) != written:
            copy_card(card, generated / CARD_NAME, config.base_model_name_or_path, config.license)
        else:
            if (source / PLOT_NAME).exists():  # also where matplotlib is missing
                shutil.copyfile(source / PLOT_NAME, generated / PLOT_NAME)
            write_card(generated, config, repository.repo_id)
        return repository.commit(
            (generated, source), (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PLOT_NAME), "Auxiliary heads", alone=force
        )


def require_hub_id(name: str, value: str, advice: str = "Give the model's id with --base-model (base_model=).") -> str:
    """Return ``value``, which is published, if it can be a repository id and is no local folder.

    Raises:
        ValueError: otherwise.
    """
    with suppress(HFValidationError):
        validate_repo_id(value)
        if not os.path.isdir(value):
            return value
    raise ValueError(
        f"{name}: got {value!r}, expected a repository id on the Hub such as 'org/name': a path of this machine means "
        f"nothing to others. {advice}"
    )


def copy_card(source: Path, target: Path, base_model: str | None, license: str | None) -> None:
    """Copy a card that its owner wrote, and set base model and licence in its metadata."""
    with readable("folder", str(source), "a card"):
        card = ModelCard(read_text(source))
    known = {"base_model": base_model if base_model and "/" in base_model else None, "license": license}
    card.data = ModelCardData(**card.data.to_dict() | {name: value for name, value in known.items() if value})
    write_text(target, str(card))
