"""Finished batches of `distill` and `evaluate`, kept so that a kill costs only those in work.

A hidden folder beside the output holds ``settings.json`` and, for each process, ``part-RANK.jsonl``
with one line per finished batch and its hash. A resumed run may have another number of processes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import lock, write_text
from .reading import is_file, json_object, json_or_none
from .run_folder import ADVICE, first_difference, record_of, require_same_settings


@dataclass(frozen=True)
class Parts:
    """The finished batches of the run that writes ``output``.

    Attributes:
        output: file that the run writes when all batches are finished.
        record_name: name of the run's record beside it; ``STEM.provenance.json`` if None.
    """

    output: Path
    record_name: str | None = None

    @property
    def folder(self) -> Path:
        return self.output.with_name(f".{self.output.name}.parts")

    @property
    def provenance_path(self) -> Path:
        return self.output.with_name(self.record_name or f"{self.output.stem}.provenance.json")

    def begin(self, settings: dict[str, Any], overwrite: bool = False) -> dict[str, Any] | None:
        """Start a run or resume an interrupted one. One process calls it while the others wait.

        Args:
            settings: everything that decides the result; JSON values.
            overwrite: replace the output, and what an interrupted run has finished.

        Returns:
            the record of the finished run if it was made with these settings, else None.

        Raises:
            BlockingIOError: if another process writes the same output.
            FileExistsError: if the output or an interrupted run was made with other settings.
        """
        for part in self._parts():
            with open(part, "rb+") as file:
                lock(file, self.output)  # a process of a killed run may live on
        if overwrite:
            self.discard()
            self.provenance_path.unlink(missing_ok=True)
        finished = json_or_none(self.provenance_path) if self.output.exists() else None
        if finished is not None and settings == finished.get("settings"):
            self.discard()
            return finished
        settings_path = self.folder / "settings.json"
        recorded = json_or_none(settings_path)
        if recorded is not None:
            require_same_settings(settings, recorded, f"{self.output} belongs to an interrupted run")
        elif self.output.exists() and not overwrite:
            different = finished and first_difference(settings, finished.get("settings") or {})
            made = f", made with other settings; {different} to keep it" if different else ""
            raise FileExistsError(f"output: {self.output} exists{made}. {ADVICE}")
        write_text(settings_path, record_of(settings, recorded, f"{self.output}"))
        for part in self._parts():
            with open(part, "rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        return None

    def finished(self) -> Iterator[dict[str, Any]]:
        """Yield the finished batches of all processes, in no particular order."""
        seen: set[int] = set()
        for part in self._parts():
            with open(part, "rb") as file:
                for number, line in enumerate(file, start=1):
                    batch = json_object(line, f"{part}, line {number}", ADVICE)
                    if batch.pop("sha256", None) != self._sum_of(batch):
                        raise ValueError(f"{part}, line {number}: damaged, its sum does not agree. {ADVICE}")
                    if batch["batch"] in seen:
                        raise ValueError(f"{part}, line {number}: batch {batch['batch']} is there twice. {ADVICE}")
                    seen.add(batch["batch"])
                    yield batch

    @contextmanager
    def appending(self, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yield a function that writes a finished batch to the disk before it returns.

        Raises:
            BlockingIOError: if another process writes the same output.
        """
        with open(self.folder / f"part-{rank}.jsonl", "ab") as file:
            lock(file, self.output)

            def append(batch: dict[str, Any]) -> None:
                file.write((json.dumps(batch | {"sha256": self._sum_of(batch)}) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

            yield append

    def discard(self) -> None:
        """Remove all finished batches. Another run sees them vanish in one step."""
        trash = self.folder.with_name(f"{self.folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("part-*.jsonl") if is_file(path))

    def _sum_of(self, batch: dict[str, Any]) -> str:
        """Hash of a batch of this output: those of another run would pass for its own."""
        return hashlib.sha256(f"{self.output.name} {json.dumps(batch)}".encode()).hexdigest()
