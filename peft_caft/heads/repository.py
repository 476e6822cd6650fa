"""A repository on the Hub that is read first, and then changed in one commit on top of that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..basics.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CAFT_CONFIG_NAME,
    CONFIG_NAME,
    PLOT_NAME,
    WEIGHTS_NAME,
)
from ..basics.hub_errors import explained
from ..basics.reading import read_json
from .config import SHARE_THAT_AGREES, HeadsConfig, agree

# What heads and adapters are made of; a repository holds one or the other.
PUBLISHED_NAMES = (CONFIG_NAME, WEIGHTS_NAME, PLOT_NAME, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CAFT_CONFIG_NAME)


@dataclass(frozen=True)
class Destination:
    """Where to publish, and how; `AuxiliaryHeads.push_to_hub` describes the fields."""

    repo_id: str
    commit_message: str | None = None
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False


@dataclass
class Repository:
    """A model repository on the Hub, at the commit at which it was read.

    Attributes:
        to: destination of the commit.
        repo_id: full name, with the owner.
        head: commit at which it was read.
        files: names of its files at that commit.
    """

    to: Destination
    api: HfApi
    repo_id: str
    head: str | None
    files: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, to: Destination) -> Repository:
        """Read the repository; it and the branch are made if there are none.

        Raises:
            ValueError: if a pull request and a branch are asked for.
            FileExistsError: if it is public and should be private.
        """
        api = HfApi(token=to.token)
        if to.create_pr and to.revision not in (None, "main"):
            raise ValueError(
                f"revision: got {to.revision!r} together with create_pr, expected one of the two: a pull request starts from "
                "main. Leave one out."
            )
        with explained("repo_id", to.repo_id, to.revision, "write to"):
            repo_id = api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
            if to.revision not in (None, "main"):
                api.create_branch(repo_id, branch=str(to.revision), exist_ok=True)
            info = api.model_info(repo_id, revision=to.revision)
        if to.private and not info.private:
            raise FileExistsError(
                f"private: {repo_id!r} exists and is public, expected a private repository. Make it private on its settings "
                "page, or choose another one."
            )
        return cls(to, api, repo_id, info.sha, {sibling.rfilename for sibling in info.siblings or []})

    def require_heads_of_same_base(self, ours: HeadsConfig) -> None:
        """Raise a FileExistsError if it holds a model, an adapter or heads of another base."""
        if ADAPTER_CONFIG_NAME in self.files:
            raise self._holds("an adapter", "heads")
        if CONFIG_NAME not in self.files:
            return
        try:
            theirs = HeadsConfig.from_file(self._download(CONFIG_NAME))
        except ValueError as error:
            raise self._holds(f"something else ({error})", "heads") from error
        if difference := _difference_of_bases(ours, theirs):
            there, here = (f"heads for {c.base_model_name_or_path or 'an unnamed model'}" for c in (theirs, ours))
            raise self._holds(f"{there} ({difference})", here)

    def require_adapter_of_same_base(self, base_model: str) -> None:
        """Raise a FileExistsError if it holds a model, heads or an adapter of another base."""
        if ADAPTER_CONFIG_NAME in self.files:
            try:
                theirs = read_json(self._download(ADAPTER_CONFIG_NAME)).get("base_model_name_or_path")
            except ValueError as error:
                raise self._holds(
                    f"a damaged {ADAPTER_CONFIG_NAME} ({error})", f"an adapter of {base_model}"
                ) from error
            if theirs != base_model:
                raise self._holds(f"an adapter of {theirs}", f"an adapter of {base_model}")
        elif CONFIG_NAME in self.files:
            raise self._holds("heads or a model", "an adapter")

    def _holds(self, there: str, here: str) -> FileExistsError:
        return FileExistsError(
            f"repo_id: {self.repo_id!r} holds {there}, expected an empty repository or one of {here}. Choose another one, or "
            "replace its files with --force (force=True)."
        )

    def _download(self, name: str) -> Path:
        with explained("repo_id", self.repo_id, self.head):
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=self.head))

    def commit(self, folders: tuple[Path, ...], names: tuple[str, ...], what: str, alone: bool) -> CommitInfo:
        """Publish files in one commit, and remove those that would no longer describe the weights.

        Args:
            folders: places of the files; each is taken from the first folder that has it.
            names: names of the files.
            what: kind of artifact, for the message of the commit.
            alone: remove files of another kind of artifact too.
        """
        places = {name: [folder / name for folder in folders if (folder / name).is_file()] for name in names}
        found = {name: paths[0] for name, paths in places.items() if paths}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in found.items()
        ]
        # What an earlier push left would describe the wrong weights, or be taken for them.
        stale = set(PUBLISHED_NAMES if alone else (PLOT_NAME, CAFT_CONFIG_NAME)) & self.files - found.keys()
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]
        with explained("repo_id", self.repo_id, self.to.revision, "write to"):
            # Additions and deletions become one commit. upload_folder makes several of many files
            # (huggingface/huggingface_hub#4331, in 1.20), and someone may read between them.
            return self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=self.to.commit_message or f"{what}, pushed by peft-caft",
                revision=self.to.revision,
                create_pr=self.to.create_pr,
                parent_commit=self.head,
            )


def _difference_of_bases(ours: HeadsConfig, theirs: HeadsConfig) -> str | None:
    """How the base models of two artifacts differ; None if they do not."""
    for name in ("hidden_size", "vocab_size"):
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            return f"{name} {there} instead of {here}"
    equal = list(map(agree, ours.unembedding_fingerprint, theirs.unembedding_fingerprint))
    if sum(equal) < SHARE_THAT_AGREES * len(equal):
        return "another unembedding"
    here, there = ours.base_model_name_or_path, theirs.base_model_name_or_path
    if here is None or there is None:
        return None
    # A local folder was recorded by its name alone, so it says less than a Hub id.
    both_ids = "/" in here and "/" in there
    same = here == there if both_ids else here.split("/")[-1] == there.split("/")[-1]
    return None if same else "another name, though sizes and unembedding agree"
