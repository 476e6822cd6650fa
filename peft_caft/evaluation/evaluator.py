"""`Evaluator`: answers and scores rows, and makes of each a line of ``rows.jsonl``."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..training.generation import TransformersBackend, position_of_first, special_token_ids, text_of
from .reference_losses import PromptAndAnswer, answer_losses
from .report import common_scores
from .task import Row, Scores, Task, answer_of

LENGTHS = (1, 4, 8, 16, 32, 64, 128)  # longest reference of each group, in tokens


@dataclass(frozen=True)
class Evaluator:
    """Answers and scores batches of rows; scores the references alone unless it ``generates``."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    backend: TransformersBackend
    rows: list[Row]
    encoded: list[PromptAndAnswer]
    generates: bool = True

    @cached_property
    def _special(self) -> set[int]:
        return special_token_ids(self.tokenizer)

    def results(self, batch: list[int], seed: int) -> tuple[list[dict[str, Any]], int]:
        """Answer and score the rows of one batch of indices.

        Returns:
            one result per row, and the number of generated tokens. A result holds ``row``, its
            index; ``reference``; ``answer``, None without one; ``generated_tokens``; ``scores`` by
            metric, None where undefined; ``groups`` that the row belongs to; ``answer_losses``, the
            cross entropy of each token of the reference, nats.
        """
        rows, encoded = [self.rows[index] for index in batch], [self.encoded[index] for index in batch]
        losses = answer_losses(self.backend.model, encoded, self.backend.pad_token_id)
        if self.generates:
            answers = self.backend.answers([row.prompt for row in encoded], seed)
            texts: list[str | None] = [self._text(ids) for ids in answers]
            scores = self._scores(rows, [str(text) for text in texts])
            ended: list[bool | None] = [ids[-1] in self.backend.sampling.stop_token_ids for ids in answers]
        else:
            answers, texts, ended = [[] for _ in rows], [None] * len(rows), [None] * len(rows)
            scores = {metric.name: [None] * len(rows) for metric in self.task.metrics}
        results = [
            {
                "row": index,
                "reference": answer_of(row),
                "answer": text,
                "generated_tokens": len(answers[position]),
                "scores": {name: values[position] for name, values in scores.items()}
                | common_scores(own, ended[position]),
                "groups": self.task.groups(row, self.tokenizer) | {"tokens of the reference": length_group(len(own))},
                "answer_losses": [round(loss, 6) for loss in own],
            }
            for position, (index, row, text, own) in enumerate(zip(batch, rows, texts, losses, strict=True))
        ]
        return results, sum(map(len, answers))

    def _scores(self, rows: list[Row], answers: list[str]) -> Scores:
        """`Task.score`, checked: the error names the task, since a user wrote it."""
        try:
            scores = self.task.score(rows, answers)
        except KeyError as error:
            raise ValueError(
                f"task: {self.task.name!r} asked for {error}, which a row does not have. Build the data with the task's own file."
            ) from error
        names = sorted(metric.name for metric in self.task.metrics)
        if sorted(scores) != names or any(len(values) != len(rows) for values in scores.values()):
            got = {name: len(values) for name, values in scores.items()}
            raise ValueError(
                f"task: score of {self.task.name!r} gave {got}, expected {len(rows)} values for each of {names}. Mend the task's file."
            )
        return {
            name: [None if v is None or math.isnan(v) else float(v) for v in values] for name, values in scores.items()
        }

    def _text(self, ids: list[int]) -> str:
        """The answer up to its first special token, after which another turn begins."""
        return text_of(ids[: position_of_first(ids, self._special)], self.tokenizer)


def length_group(tokens: int) -> str:
    """``"1"``, ``"2 to 4"``, ``"5 to 8"`` ... or ``"over 128"``."""
    lower = 0
    for upper in LENGTHS:
        if tokens <= upper:
            return f"{lower + 1} to {upper}" if upper > lower + 1 else f"{upper}"
        lower = upper
    return f"over {lower}"
