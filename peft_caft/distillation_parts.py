"""What `peft-caft distill` has finished so far, kept so that a kill at any moment costs at most the batches in work.

Beside the output there is a hidden folder with ``settings.json`` and, for each process, ``part-RANK.jsonl`` with one line
per finished batch, flushed to the disk. A line without its end is cut off when the run is resumed, and its batch is made
again. Which process made a batch does not matter, so a run can be resumed with another number of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import write_text


@dataclass(frozen=True)
class Parts:
    """The finished batches of the run that writes ``output``."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(f".{self.output.name}.parts")

    @property
    def provenance_path(self) -> Path:
        return self.output.with_suffix(".provenance.json")

    def begin(self, settings: dict[str, Any], overwrite: bool = False) -> dict[str, Any] | None:
        """Start a run or take up an interrupted one; for one process alone, while the others wait.

        Returns:
            the provenance of the finished output if it is there with these settings, else None.

        Raises:
            FileExistsError: if there is an output, or an interrupted run, of other settings.
        """
        advice = "Choose another output, or pass --overwrite to replace it."
        settings_path = self.folder / "settings.json"
        if overwrite:
            self.discard()
            self.provenance_path.unlink(missing_ok=True)
        finished = _read_json(self.provenance_path) if self.output.exists() else None
        if finished is not None and finished.get("settings") == settings:
            self.discard()
            return finished
        recorded = _read_json(settings_path)
        if recorded is not None:
            _require_equal(
                settings, recorded, f"output: {self.output} is of an interrupted run with other settings", advice
            )
        elif self.output.exists() and not overwrite:
            was = {} if finished is None else finished.get("settings", {})
            if was:
                _require_equal(settings, was, f"output: {self.output} exists, made with other settings", advice)
            raise FileExistsError(f"output: {self.output} exists. {advice}")
        else:
            write_text(settings_path, json.dumps(settings, indent=2) + "\n")
        for part in self.folder.glob("part-*.jsonl"):
            _cut_off_half_line(part)
        return None

    def finished(self) -> Iterator[dict[str, Any]]:
        """The finished batches of all processes, in no order."""
        for part in sorted(self.folder.glob("part-*.jsonl")):
            with open(part, encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def append(self, rank: int, batch: dict[str, Any]) -> None:
        """Record a finished batch: on the disk when this returns."""
        with open(self.folder / f"part-{rank}.jsonl", "ab") as file:
            file.write((json.dumps(batch) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def discard(self) -> None:
        """Remove everything, in one step as far as another run can see."""
        trash = self.folder.with_name(f"{self.folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _require_equal(got: dict[str, Any], expected: dict[str, Any], what: str, advice: str) -> None:
    changed = [name for name in sorted({*got, *expected}) if got.get(name) != expected.get(name)]
    if changed:
        name = changed[0]
        raise FileExistsError(f"{what}; {name}: got {got.get(name)!r}, expected {expected.get(name)!r}. {advice}")


def _cut_off_half_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
