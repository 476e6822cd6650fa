"""The folder of a training run: what was asked for, its checkpoints, its result; so that a run can
be taken up again.

``run.json`` holds the settings, ``checkpoints/`` what the Trainer saves on the way,
``summary.json`` is written last and says that the run is finished.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import full_disk_explained, lock, write_text
from .provenance import git_commit


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; see the module's docstring."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _settings_path(self) -> Path:
        return self.path / "run.json"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @contextmanager
    def held(self, wait: bool = False) -> Iterator[None]:
        """No other process may run in this folder inside the block, and a full disk is one clear
        error.

        Args:
            wait: for another process that does.

        Raises:
            BlockingIOError: if another one does.
            OSError: if the disk is full.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        with full_disk_explained(self.path, "Checkpoints that were finished are"), open(path, "ab") as file:
            lock(file, self.path, wait)
            yield
            path.unlink(missing_ok=True)

    def require_free(self, settings: dict[str, Any]) -> None:
        """Check that a run of these settings can start here or be taken up.

        Raises:
            FileExistsError: if the folder holds a finished run, or an interrupted one of other
                settings.
        """
        advice = "Choose another output folder, or pass --overwrite to replace it."
        if self.summary_path.exists():
            raise FileExistsError(f"output: {self.path} holds a finished run. {advice}")
        recorded = (
            json.loads(self._settings_path.read_text(encoding="utf-8")) if self._settings_path.exists() else settings
        )
        changed = [k for k in sorted({*recorded, *settings}) if recorded.get(k) != settings.get(k)]
        if changed:
            name = changed[0]
            raise FileExistsError(
                f"output: {self.path} holds an interrupted run with other settings; {name}: got {settings.get(name)!r}, "
                f"expected {recorded.get(name)!r} to resume it. {advice}"
            )

    def begin(
        self, settings: dict[str, Any], overwrite: bool = False, checkpoint_files: tuple[str, ...] = ()
    ) -> Path | None:
        """Start a run or take up an interrupted one. Call it when nothing is left that a better
        command could mend.

        Args:
            settings: everything that decides the result; JSON values.
            overwrite: remove the checkpoints that the folder holds and start anew.
            checkpoint_files: files that a checkpoint must hold to be resumed from, besides the
                Trainer's.

        Returns:
            the last whole checkpoint to resume from, or None to start from the beginning.

        Raises:
            FileExistsError: see `require_free`.
        """
        git_commit()  # remembered for the provenance: a long run is of the code that it began with
        if overwrite:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.summary_path.unlink(missing_ok=True)
        else:
            self.require_free(settings)
        write_text(self._settings_path, json.dumps(settings, indent=2, default=str) + "\n")
        return last_whole_checkpoint(self.checkpoints, checkpoint_files)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished, and drop its checkpoints and what
        killed saves left.
        """
        write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for litter in self.path.glob(".*.tmp"):
            litter.unlink()


def last_whole_checkpoint(folder: Path, needed: tuple[str, ...] = ()) -> Path | None:
    """The newest ``checkpoint-N`` that was saved to its end: each process writes last its random
    state, or Trainer's state.
    """
    numbered = [(int(p.name.removeprefix("checkpoint-")), p) for p in folder.glob("checkpoint-*") if p.is_dir()]
    for _, checkpoint in sorted(numbered, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        if all(_is_whole(checkpoint / name) for name in needed):
            return checkpoint
    return None


def random_states(processes: int) -> tuple[str, ...]:
    """Files in which Trainer keeps the random state of each process; without them no checkpoint is
    whole.
    """
    return tuple(f"rng_state_{index}.pth" for index in range(processes)) if processes > 1 else ("rng_state.pth",)


def _is_whole(path: Path) -> bool:
    """Torch writes a zip file, whose directory is at its end."""
    return zipfile.is_zipfile(path) if path.suffix == ".pth" else path.is_file()
