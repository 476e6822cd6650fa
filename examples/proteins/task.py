"""Kind and length -> peptide: ``python task.py --output FOLDER``, then ``peft-caft evaluate --task task.py``. See README.md."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task, answer_of, chat
from peft_caft.evaluation.task_building import build_main

AMINO_ACIDS = frozenset("ACDEFGHIKLMNPQRSTVWY")
SHARES = {"test": 0.15, "dev": 0.22}  # upper ends; a family's number between 0 and 1 decides its split
KINDS = {"1": "antimicrobial", "0": "other"}
K = 4  # residues of a piece
ALIKE = 0.5  # share of the shorter one's pieces: relatives, as two temporins, share more
LONGEST = 64  # residues


class Proteins(Task):
    """The cross entropy of held-out families says what was learned: what sequence a family has cannot be guessed."""

    name = "proteins"
    metrics = (
        Metric("valid", "share of answers that are amino acid letters alone"),
        Metric("right_length", "share of answers with as many residues as asked for"),
        Metric("identity", "share of the reference's places with its residue", "mean"),
    )
    sizes = {"train": 3_200, "dev": 200, "test": 500}  # noqa: RUF012
    max_new_tokens = 64

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        rows: dict[str, list[Row]] = {split: [] for split in ("train", "dev", "test")}
        sequences = peptides()
        for (sequence, kind), family in zip(sequences.items(), families(list(sequences)), strict=True):
            user = f"{kind}, {len(sequence)} residues"
            row = chat("Write a peptide of this kind and length.", user, sequence) | {"kind": kind, "family": family}
            rows[_split_of(family)].append(row)
        for split in rows:
            rows[split].sort(key=lambda row: hashlib.sha256(answer_of(row).encode()).digest())
        source = f"AMPvsUniProt.csv of modlamp {version('modlamp')}, BSD-3-Clause: APD3 (2016) and UniProt"
        return Splits(rows, {"peptides": source}, {"available": {split: len(own) for split, own in rows.items()}})

    def keys(self, row: Row) -> dict[str, str]:
        return {"sequence": answer_of(row), "family": row["family"]}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        scores: Scores = {"valid": [], "right_length": [], "identity": []}
        for row, answer in zip(rows, answers, strict=True):
            reference, sequence = answer_of(row), answer.strip()
            valid = bool(sequence) and set(sequence) <= AMINO_ACIDS
            scores["valid"].append(float(valid))
            scores["right_length"].append(float(valid and len(sequence) == len(reference)))
            same = sum(a == b for a, b in zip(sequence, reference, strict=False))
            scores["identity"].append(same / len(reference) if valid else None)
        return scores

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {"kind": row["kind"]}


def peptides() -> dict[str, str]:
    """Sequences and their kinds; the file is read, not imported, since modlamp needs much that is not needed here."""
    spec = importlib.util.find_spec("modlamp")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'modlamp'", name="modlamp")
    found: dict[str, str] = {}
    with open(Path(spec.submodule_search_locations[0], "data", "AMPvsUniProt.csv"), encoding="utf-8") as file:
        for sequence, label, *_ in list(csv.reader(file))[1:]:
            if len(sequence) <= LONGEST and set(sequence) <= AMINO_ACIDS:
                found.setdefault(sequence, KINDS[label.strip()])  # antimicrobial ones come first
    return found


def families(sequences: list[str]) -> list[str]:
    """For each sequence the first of its family: those that are linked by relatives, see `ALIKE`."""
    pieces = [{s[start : start + K] for start in range(len(s) - K + 1)} for s in sequences]
    holders: dict[str, list[int]] = defaultdict(list)
    first = list(range(len(sequences)))

    def root(index: int) -> int:
        while first[index] != index:
            index = first[index]
        return index

    for index, own in enumerate(pieces):
        shared = Counter(other for piece in own for other in holders[piece])
        for other, count in shared.items():
            if count >= ALIKE * min(len(own), len(pieces[other])):
                low, high = sorted((root(index), root(other)))
                first[high] = low
        for piece in own:
            holders[piece].append(index)
    return [sequences[root(index)] for index in range(len(sequences))]


def _split_of(family: str) -> str:
    number = int.from_bytes(hashlib.sha256(family.encode()).digest()[:8], "big") / 2**64
    return next((split for split, limit in SHARES.items() if number < limit), "train")


TASK = Proteins()

if __name__ == "__main__":
    build_main(TASK)
