"""A planted effect: rows in which looking ahead must help a model that learns from few of them. See README.md."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task
from peft_caft.evaluation.task_building import build_main

KINDS = 6
NOUNS = [f"noun{number}" for number in range(96)]  # noun i is of kind i % KINDS
ADJECTIVES = [f"adjective{number}" for number in range(48)]  # of which nothing follows
MISLED = 0.75  # share of answers whose first word is drawn from all kinds
AHEAD = 3  # words that follow it


class Planted(Task):
    """The first word of an answer names a kind, most often by chance; those after it say the noun's true kind."""

    name = "planted"
    metrics = (Metric("kind", "share of answers whose first word names the noun's kind"),)
    sizes = {"train": 1600, "dev": 200, "test": 400}  # noqa: RUF012
    max_new_tokens = 1
    ahead_says_kind = True

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        rng, seen = random.Random(0), set()
        rows: dict[str, list[Row]] = {split: [] for split in sizes}
        for split, own in rows.items():
            while len(own) < sizes[split]:
                row = self._row(rng)
                if row["prompt"] not in seen:
                    seen.add(row["prompt"])
                    own.append(row)
        return Splits(rows, {"rows": "this file, seed 0"})

    def _row(self, rng: random.Random) -> Row:
        noun = rng.randrange(len(NOUNS))
        kind = noun % KINDS
        first = rng.randrange(KINDS) if rng.random() < MISLED else kind
        said = kind if self.ahead_says_kind else rng.randrange(KINDS)
        completion = " ".join([f"name{first}", *(f"kind{said}-{number}" for number in range(AHEAD))])
        return {"prompt": f"{rng.choice(ADJECTIVES)} {NOUNS[noun]}", "completion": completion, "kind": kind}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        return {"kind": [float(a == f"name{row['kind']}") for row, a in zip(rows, answers, strict=True)]}


TASK = Planted()

if __name__ == "__main__":
    build_main(TASK)
