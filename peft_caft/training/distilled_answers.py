"""Turns the tokens that a model answered into text, and says which answers to leave out."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .data import encode
from .generation import position_of_first, special_token_ids, text_of
from .prompts import Prompt

REPEATED_RUN = 8  # tokens: about a clause, so that lists, tables and code do not look like loops


@dataclass(frozen=True)
class AnswerReader:
    """Turns the tokens of answers into text and judges them.

    Attributes:
        max_repetition: largest share of repeated runs of tokens that `rejection` lets pass.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]
    max_repetition: float

    @cached_property
    def _ends(self) -> set[int]:
        return special_token_ids(self.tokenizer).union(self.stop_token_ids)

    def read(self, prompt: Prompt, sample: int, ids: list[int]) -> dict[str, Any]:
        """The record of one answer.

        Args:
            ids: tokens of the answer, up to and including the one that ended it, if any did.

        Returns:
            ``prompt_index``; ``sample``; ``answer``, without special tokens; ``complete``, whether
            the model ended it; ``tokens``, the number generated; ``rejected``, None or the reason
            to leave it out: that of `rejection`, or ``"untrainable"`` if it changes how the chat
            template shows the prompt; ``same_tokens``, whether training
            sees the tokens that the model made.
        """
        # Training would read a special token as another turn, so the answer ends before it.
        end = position_of_first(ids, self._ends)
        complete = end < len(ids) and ids[end] in self.stop_token_ids
        kept = ids[:end]
        answer = text_of(kept, self.tokenizer)
        while not complete and kept and answer.endswith("\ufffd"):  # cut within a character of several tokens
            kept.pop()
            answer = text_of(kept, self.tokenizer)
        rejected = rejection(answer, kept, self.max_repetition)
        trained_on = None if rejected else self._trained_on(prompt, answer, complete)
        if rejected is None and trained_on is None:
            rejected = "untrainable"
        return {
            "prompt_index": prompt.index,
            "sample": sample,
            "answer": answer,
            "complete": complete,
            "tokens": len(ids),
            "rejected": rejected,
            "same_tokens": trained_on is not None and self._same_tokens(prompt, kept, trained_on, complete),
        }

    def _trained_on(self, prompt: Prompt, answer: str, complete: bool) -> list[int] | None:
        """The row, tokenized for training; None if its answer changes how the prompt is shown."""
        row = prompt.row(answer) | {"complete": complete}
        try:
            return encode([row], self.tokenizer, max_length=2**31, quiet=True).rows[0]["input_ids"]
        except ValueError:
            return None

    def _same_tokens(self, prompt: Prompt, ids: list[int], trained_on: list[int], complete: bool) -> bool:
        expected = [*prompt.input_ids, *ids]
        return trained_on[: len(expected)] == expected and (not complete or trained_on[len(expected)] in self._ends)


def rejection(answer: str, ids: list[int], max_repetition: float = 0.5) -> str | None:
    """Why an answer itself is of no use for training, or None.

    ``"empty"``: it is nothing but white space. ``"repetitive"``: more than the share
    ``max_repetition`` of its runs of 8 tokens occurred earlier in it; 1 turns this off.
    """
    if not answer.strip():
        return "empty"
    runs = [tuple(ids[start : start + REPEATED_RUN]) for start in range(len(ids) - REPEATED_RUN + 1)]
    if runs and 1 - len(set(runs)) / len(runs) > max_repetition:
        return "repetitive"
    return None
