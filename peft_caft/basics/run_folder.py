"""The folder of a run, from which an interrupted run is resumed.

``run.json`` holds the settings and ``checkpoints/`` what the Trainer saves. ``summary.json`` is
written last: it holds the result and marks the run as finished.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from transformers import TrainerState

from .checks import described, fits
from .files import full_disk_explained, lock, writable, write_text
from .provenance import git_commit, versions
from .reading import is_file, json_or_none, read_json, require_whole_archive
from .tensors import Tensors

RECORD_FORMAT = 2  # 1 held a dozen arguments of the Trainer, and no hashes but of the data
ADVICE = "Choose another output, or pass --overwrite to replace it."


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, laid out as the module's docstring says."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def settings_path(self) -> Path:
        return self.path / "run.json"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    @contextmanager
    def held(self, wait: bool = False) -> Iterator[None]:
        """Keep other processes out of the folder inside the block, and explain a full disk.

        Raises:
            BlockingIOError: if another process runs in the folder and this one does not ``wait``.
            OSError: if the disk is full.
        """
        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        kept = "Checkpoints that were finished are kept."
        with full_disk_explained(self.path, kept), self._locked_file(wait):
            yield
            self._lock_path.unlink(missing_ok=True)

    def _locked_file(self, wait: bool) -> IO[bytes]:
        """The lock file, locked. Who waited for one that its holder removed opens a new one."""
        while True:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(open(self._lock_path, "ab"))
                lock(file, self.path, wait)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self._lock_path.stat()):
                        stack.pop_all()
                        return file

    def is_finished(self) -> bool:
        """Whether it holds a finished run; what a kill after the last step left is removed."""
        if not self.summary_path.exists():
            return False
        if self.checkpoints.exists() or self._lock_path.exists():
            with contextlib.suppress(OSError), self.held():
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        return True

    def require_free(self, settings: dict[str, Any], to_come: tuple[str, ...] = ()) -> None:
        """Check that a run with these settings can start or resume here.

        Args:
            to_come: names of settings that are not known yet, and compared when the run begins.

        Raises:
            FileExistsError: if it holds a finished run, or an interrupted one with other settings.
        """
        if self.is_finished():
            raise FileExistsError(f"output: {self.path} holds a finished run. {ADVICE}")
        recorded = json_or_none(self.settings_path)
        known = {name: value for name, value in (recorded or {}).items() if name not in to_come} if recorded else None
        require_same_settings(settings, known, f"{self.path} holds an interrupted run")

    def result_of(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a finished run with these settings; None if the folder holds none."""
        recorded = json_or_none(self.settings_path)
        if recorded is None or first_difference(_as_json(settings), _settings_of(recorded)):
            return None
        return json_or_none(self.summary_path)

    def begin(
        self, settings: dict[str, Any], overwrite: bool = False, checkpoint_files: tuple[str, ...] = ()
    ) -> Path | None:
        """Start a run or resume an interrupted one. Call it after every check of the command.

        Args:
            settings: everything that decides the result; JSON values.
            overwrite: remove the checkpoints in the folder and start anew.
            checkpoint_files: files that a checkpoint needs besides the Trainer's.

        Returns:
            the checkpoint to resume from, or None to start from the beginning.

        Raises:
            FileExistsError: if `require_free` refuses the settings.
            OSError: if a checkpoint cannot be read for another reason than its contents.
        """
        git_commit()  # cached now, so that a long run records the code that it started with
        earlier = None if overwrite else json_or_none(self.settings_path)
        if overwrite:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.summary_path.unlink(missing_ok=True)
        else:
            self.require_free(settings)
        found = last_whole_checkpoint(self.checkpoints, checkpoint_files)
        write_text(self.settings_path, record_of(settings, earlier if found else None, f"{self.path}"))
        self._set_aside(list(takewhile(lambda checkpoint: checkpoint != found, _numbered(self.checkpoints))), found)
        return found

    def _set_aside(self, damaged: list[Path], found: Path | None) -> None:
        """Move checkpoints out of the way of later ones, in place of those moved before."""
        aside = self.checkpoints / "damaged"
        if damaged:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        for checkpoint in damaged:
            os.replace(checkpoint, aside / checkpoint.name)
            begin = "the beginning" if found is None else found.name
            print(
                f"{checkpoint}: not whole, so that the run goes on from {begin}. It lies in {aside} until the run ends."
            )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, then remove the checkpoints.

        What TensorBoard's callback wrote among the checkpoints is kept in ``runs/``.
        """
        if (self.checkpoints / "runs").is_dir():
            shutil.copytree(self.checkpoints / "runs", self.path / "runs", dirs_exist_ok=True)
        write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def first_difference(got: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first entry that differs, as ``"NAME: got ..., expected ..."``; None if all agree."""
    for name in sorted({*got, *expected}):
        if got.get(name) != expected.get(name):
            return f"{name}: got {got.get(name)!r}, expected {expected.get(name)!r}"
    return None


def record_of(settings: dict[str, Any], earlier: dict[str, Any] | None, what: str) -> str:
    """The record of a run as JSON; ``earlier`` is that of the run that is resumed, ``what``.

    Other versions warn and do not refuse: an update amid a long run need not cost the run, whose
    result stays valid and is only not that of an unbroken one.
    """
    begun_with = {**versions(), "git_commit": git_commit()}
    if earlier is not None:
        recorded = earlier.get("begun_with")
        if different := first_difference(begun_with, recorded if isinstance(recorded, dict) else {}):
            warnings.warn(
                f"{what}: resumed by other code than it was begun with ({different}): its result may differ from that of an unbroken "
                "run.",
                stacklevel=3,
            )
        begun_with = recorded or begun_with
    return (
        json.dumps({"record_format": RECORD_FORMAT, **_as_json(settings), "begun_with": begun_with}, indent=2) + "\n"
    )


def _settings_of(recorded: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recorded.items() if name not in ("record_format", "begun_with")}


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def require_same_settings(settings: dict[str, Any], recorded: dict[str, Any] | None, what: str) -> None:
    """Raise a FileExistsError if ``what``, an interrupted run, has recorded other settings."""
    if recorded is None:
        return
    if not isinstance(recorded, dict) or recorded.get("record_format") != RECORD_FORMAT:
        raise FileExistsError(
            f"output: {what} of another version of peft-caft, whose record does not say all that decides a result, so that it "
            f"cannot be resumed. {ADVICE}"
        )
    if different := first_difference(_as_json(settings), _settings_of(recorded)):
        raise FileExistsError(f"output: {what} with other settings; {different} to resume it. {ADVICE}")


def last_whole_checkpoint(folder: Path, needed: tuple[str, ...] = ()) -> Path | None:
    """The newest ``checkpoint-N`` with all ``needed`` files and Trainer's state, saved last.

    Every file in it can be read. Trainer would go on without an optimizer that is not there.

    Raises:
        OSError: if the disk fails, which tells nothing about a checkpoint.
    """
    for checkpoint in _numbered(folder):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            for name in ("trainer_state.json", *needed, *(path.name for path in checkpoint.iterdir())):
                _require_whole(checkpoint / name)
            return checkpoint
    return None


def _numbered(folder: Path) -> list[Path]:
    """Folders ``checkpoint-N``, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def random_states(processes: int) -> tuple[str, ...]:
    """Names of the files in which Trainer saves the random state of each process."""
    return tuple(f"rng_state_{index}.pth" for index in range(processes)) if processes > 1 else ("rng_state.pth",)


def _require_whole(path: Path) -> None:
    """Raise an error if a file of a checkpoint cannot be read; folders are those of engines."""
    if path.is_dir() and not path.is_symlink() and not path.suffix:
        return
    if not is_file(path):
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix in (".pt", ".pth"):  # torch writes zip archives, whose directory comes last
        require_whole_archive(path, must_be=True)
    elif path.suffix == ".json":
        values = read_json(path)
        if path.name == "trainer_state.json":
            TrainerState(**values)  # which takes no other fields, and values of any type
            for name, hint in (("global_step", int), ("epoch", float), ("log_history", list[dict])):
                if name in values and not fits(values[name], hint):
                    raise ValueError(f"{path}: {name}: got {values[name]!r}, expected {described(hint)}.")
    elif path.suffix == ".safetensors":
        Tensors.of(path)
