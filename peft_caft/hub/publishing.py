"""Publishes heads and adapters on the Hub; an adapter names its heads by repository and commit.

One commit on top of the state that was checked: a reader finds the old files or the new ones, and
no push made meanwhile is overwritten unseen. Only files of known names are uploaded, since a run's
folder also holds checkpoints, pickled arguments and paths of this machine.
"""

import os
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, hf_hub_download
from peft import LoraConfig

from ..basics.adapter_files import require_whole_adapter
from ..basics.file_names import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CAFT_CONFIG_NAME, CARD_NAME, CONFIG_NAME
from ..basics.files import write_text
from ..basics.hub_errors import explained
from ..basics.reading import is_file, json_or_none, read_text, understood
from ..basics.run_folder import RunFolder
from ..heads.artifact import find_heads
from ..heads.config import HeadsConfig
from ..heads.publishing import copy_card, push_heads, require_hub_id
from ..heads.repository import Destination, Repository
from ..method.config import CAFTConfig
from .adapter_card import PLACEHOLDER, adapter_card

TOKENIZER_FILES = (
    *("added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json"),
    # The vocabulary, by the kind of tokenizer.
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
)


def push(
    folder: str | os.PathLike,
    to: Destination,
    *,
    heads: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    force: bool = False,
) -> CommitInfo:
    """Publish a folder of heads or of an adapter, whichever it is.

    Args:
        heads: ``"org/name"`` or ``"org/name@revision"`` of the heads, if a folder was used.
        base_model: Hub id of the base model, if the folder names a local one.
        license: Hub identifier such as ``"apache-2.0"``.
        force: replace whatever the repository holds, and accept other heads than the adapter's.

    Raises:
        FileNotFoundError: if the folder holds neither, or there is no such repository.
        FileExistsError: if the repository holds something else.
        ValueError: if the artifact is damaged or names paths of this machine.
        PermissionError: if the token may not write to the repository.
        ConnectionError: if the Hub cannot be reached.
    """
    if Path(folder, ADAPTER_CONFIG_NAME).is_file():
        return _push_adapter(Path(folder), to, heads, base_model, license, force)
    if not Path(folder, CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"folder: neither {CONFIG_NAME} (of heads) nor {ADAPTER_CONFIG_NAME} in {os.fspath(folder)!r}, expected a folder "
            "that `peft-caft train-heads`, `peft-caft train` or save_pretrained wrote."
        )
    if heads is not None:
        raise ValueError(
            f"heads: got {heads!r} for a folder of heads, expected it with an adapter alone. Leave it out."
        )
    return push_heads(folder, to, base_model=base_model, license=license, force=force)


def _push_adapter(
    source: Path, to: Destination, heads: str | None, base_model: str | None, license: str | None, force: bool
) -> CommitInfo:
    if not (source / ADAPTER_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(
            f"folder: no {ADAPTER_WEIGHTS_NAME} in {str(source)!r}, expected a saved adapter. Save it again."
        )
    is_caft = is_file(source / CAFT_CONFIG_NAME)
    require_whole_adapter(source)
    config = (CAFTConfig if is_caft else LoraConfig).from_pretrained(str(source))
    base = base_model or config.base_model_name_or_path or ""
    config.base_model_name_or_path = require_hub_id("base_model", base)
    if isinstance(config, CAFTConfig):
        _name_heads(config, heads, to.token, force)
    elif heads is not None:
        raise ValueError(
            f"heads: got {heads!r}, but the adapter has no {CAFT_CONFIG_NAME}: it was trained without heads."
        )
    repository = Repository.open(to)
    if not force:
        repository.require_adapter_of_same_base(config.base_model_name_or_path)
    with tempfile.TemporaryDirectory() as scratch:
        generated = Path(scratch)
        config.save_pretrained(scratch)
        card = source / CARD_NAME
        if is_file(card) and PLACEHOLDER not in read_text(card):
            copy_card(card, generated / CARD_NAME, config.base_model_name_or_path, license)
        else:
            run = RunFolder(source)
            settings, summary = json_or_none(run.settings_path), json_or_none(run.summary_path)
            where = f"{source}: {run.settings_path.name} or {run.summary_path.name}"
            with understood(where, "`peft-caft train`", "Remove both, or train again.", (ValueError,)):
                text = adapter_card(config, repository.repo_id, license, settings, summary)
            write_text(generated / CARD_NAME, text)
        names = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CAFT_CONFIG_NAME, CARD_NAME, *TOKENIZER_FILES)
        return repository.commit(
            (generated, source), names, "CAFT adapter" if is_caft else "LoRA adapter", alone=force
        )


def _name_heads(config: CAFTConfig, given: str | None, token: str | bool | None, force: bool) -> None:
    """Let the configuration name its heads by repository and commit."""
    trained_with = config.heads
    if trained_with is None:
        if given is not None:
            raise ValueError(f"heads: got {given!r}, but the adapter was trained with fresh heads. Leave it out.")
        return
    if given is not None:
        repo_id, _, revision = given.partition("@")
    else:
        repo_id, revision = trained_with, config.heads_commit or config.heads_revision or ""
    advice = f"Publish the heads first, `peft-caft push {trained_with} ORG/NAME`, then give --heads ORG/NAME@COMMIT (heads=)."
    require_hub_id("heads", repo_id, advice)
    path, published = _heads_config(repo_id, revision or None, token)
    if given is not None and not force:
        if Path(trained_with).is_dir():
            used = find_heads(trained_with).read_config()
        else:
            _, used = _heads_config(trained_with, config.heads_commit or config.heads_revision, token)
        if used.weights_sha256 != published.weights_sha256:
            raise ValueError(
                f"heads: {given!r} holds other weights (sha256 {published.weights_sha256}) than {trained_with!r} "
                f"({used.weights_sha256}), which the adapter was trained with. Give the revision that holds those, or "
                "--force (force=True)."
            )
    config.heads, config.heads_revision, config.heads_commit = repo_id, path.parent.name, path.parent.name


def _heads_config(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, HeadsConfig]:
    """Path, under snapshots/COMMIT of the cache, and contents of the configuration of heads."""
    with explained("heads", repo_id, revision):
        path = Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, token=token))
    return path, HeadsConfig.from_file(path)
