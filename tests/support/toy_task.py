"""A small task without any package: repeat the word. For the tests of the builder and of ``peft-caft evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task, answer_of, chat, share_of_cut_words
from peft_caft.evaluation.task_building import build_main

WORDS = ("ethanol", "propane", "butane", "pentane", "hexane", "benzene")


class Repeat(Task):
    name = "repeat"
    metrics = (
        Metric("exact", "share of answers that are the word"),
        Metric("length", "of answers", "characters", False),
    )
    sizes = {"train": 12, "dev": 4, "test": 6}  # noqa: RUF012
    max_new_tokens = 6

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        numbers = {"train": range(12), "dev": range(100, 104), "test": range(200, 230)}
        rows = {
            split: [
                chat("Repeat.", f"{WORDS[n % 6]} {n}", f"{WORDS[n % 6]} " * (1 + n % 3)) | {"number": n} for n in own
            ]
            for split, own in numbers.items()
        }
        return Splits(rows, {"words": "this file"})

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        return {
            "exact": [float(a == answer_of(row)) for row, a in zip(rows, answers, strict=True)],
            "length": [len(a) if row["number"] % 2 else None for row, a in zip(rows, answers, strict=True)],
        }

    def groups(self, row: Row, tokenizer) -> dict[str, str]:
        return {"words": share_of_cut_words(answer_of(row), tokenizer)}


TASK = Repeat()

if __name__ == "__main__":
    build_main(TASK)
