"""The data files of stage 1: read, split, encoded, and described for the provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..basics.files import file_sha256
from ..basics.reading import json_or_none
from .data import EncodedData, encode, read_jsonl


@dataclass
class RawFile:
    """A data file as `read_jsonl` read it; ``sha256`` is that of the whole file."""

    path: Path
    rows: list[dict[str, Any]]
    sha256: str

    @classmethod
    def read(cls, path: str, limit: int | None) -> RawFile:
        return cls(Path(path), read_jsonl(path, limit), file_sha256(path))

    def encoded(self, tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool) -> DataFile:
        """The file with its rows as tokens, at most ``max_length`` each."""
        return DataFile(self.path, self.sha256, encode(self.rows, tokenizer, max_length, quiet))


@dataclass
class DataFile:
    """An encoded data file, and its description for the provenance."""

    path: Path
    sha256: str
    encoded: EncodedData

    def record(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "rows": len(self.encoded.rows),
            "tokens": self.encoded.tokens,
            "supervised_tokens": self.encoded.supervised_tokens,
            "provenance": json_or_none(self.path.with_suffix(".provenance.json")),
        }


def read_files(
    data: list[str], eval_data: list[str] | None, max_rows: int | None, eval_rows: int
) -> tuple[list[RawFile], list[RawFile]]:
    """Read the training files and the held-out files, JSONL.

    Args:
        eval_data: without any, the last tenth of each training file is held out.
        max_rows: rows to use at most of each training file, those held out included.
        eval_rows: rows to use at most of each held-out file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is no row, too few rows are left, or two held-out files share a name.
    """
    train = [RawFile.read(path, max_rows) for path in data]
    if eval_data:
        evals = [RawFile.read(path, eval_rows) for path in eval_data]
    else:
        evals = []
        for file in train:
            held_out = min(eval_rows, len(file.rows) // 10)
            if held_out < 1:
                raise ValueError(
                    f"data: got {len(file.rows)} rows in {file.path} and eval_rows={eval_rows}, expected at least 10 "
                    "rows, of which one in ten is held out. Give more rows, or held-out ones with --eval-data."
                )
            evals.append(RawFile(file.path, file.rows[-held_out:], file.sha256))
            file.rows = file.rows[:-held_out]
    stems = [file.path.stem for file in evals]
    if len(set(stems)) < len(stems):
        raise ValueError(f"eval_data: got the names {stems}, expected different ones for the figures. Rename a file.")
    return train, evals
