"""Word problems and arithmetic -> the result: ``python task.py --output FOLDER``. The shortest example of a task. See README.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task, answer_of, chat
from peft_caft.evaluation.task_building import build_main

GENERATORS = ("gsm_symbolic", "leg_counting", "simple_equations", "chain_sum", "basic_arithmetic", "products", "gcd")
PROBLEMS = 50_000  # of each generator and split, at most
FIRST_SEED = {
    "test": 950_000,
    "dev": 900_000,
    "train": 0,
}  # a generator's problem i has the seed FIRST_SEED + i, below 1,000,000
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Maths(Task):
    """The answer is the result alone, as the generators give it: no steps on the way."""

    name = "maths"
    metrics = (
        Metric("exact", "share of answers that are the result and nothing else"),
        Metric("last_number", "share of answers whose last number is the result"),
    )
    sizes = {"train": 7_000, "dev": 280, "test": 700}  # noqa: RUF012
    max_new_tokens = 48

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        """The generators in turn; a question that an earlier split has, and test comes first, is left out."""
        import reasoning_gym

        rows: dict[str, list[Row]] = {}
        seen: set[str] = set()
        for split in sorted(sizes, key=list(FIRST_SEED).index):
            rows[split] = []
            datasets = [reasoning_gym.create_dataset(g, seed=FIRST_SEED[split], size=PROBLEMS) for g in GENERATORS]
            for index in range(PROBLEMS):
                for generator, dataset in zip(GENERATORS, datasets, strict=True):
                    problem = dataset[index]
                    question = problem["question"].strip()
                    if question not in seen and len(rows[split]) < sizes[split]:
                        seen.add(question)
                        rows[split].append(_row(generator, FIRST_SEED[split] + index, question, problem["answer"]))
                if len(rows[split]) == sizes[split]:
                    break
        return Splits(rows, {"problems": f"generators of reasoning-gym {version('reasoning-gym')}, Apache-2.0"})

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        references = [answer_of(row) for row in rows]
        return {
            "exact": [float(a.strip() == r) for a, r in zip(answers, references, strict=True)],
            "last_number": [float(last_number(a) == last_number(r)) for a, r in zip(answers, references, strict=True)],
        }

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {"generator": row["generator"]}


def last_number(text: str) -> float | None:
    """The last number of a text, None if it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _row(generator: str, seed: int, question: str, answer: str) -> Row:
    return chat("Give the result alone.", question, answer.strip()) | {"generator": generator, "seed": seed}


TASK = Maths()

if __name__ == "__main__":
    build_main(TASK)
