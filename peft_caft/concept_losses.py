"""Where a model's loss sits inside terms, and how well it knows whole ones: per model, and two models compared.

Intervals are percentiles over resampled rows; models are compared on the same rows (`peft_caft.resampled_ratios`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .resampled_ratios import Bootstrap, Interval
from .term_alignment import BETWEEN, SPECIAL, AlignedRow, Target
from .term_losses import TokenScores

LAST_PLACE = 5  # this one and all after it are one
PLACES = ("all", "single", "1", "2", "3", "4", "5+", "between", "special")
PLACE_NAMES = {
    "all": "all supervised tokens",
    "single": "the token of a one-token term",
    "1": "1st of several tokens",
    "2": "2nd",
    "3": "3rd",
    "4": "4th",
    "5+": "5th and later",
    "between": "between terms",
    "special": "special",
}
LENGTHS = ("2+", "2", "3", "4", "5+")


@dataclass(frozen=True)
class PlaceLoss:
    """Cross entropy of the tokens at one place.

    Attributes:
        place: one of `PLACES`.
        tokens: how many there are.
        cross_entropy: mean, nats/token.
        accuracy: share of tokens that are the most likely one.
        share_of_loss: of the sum over all supervised tokens.
    """

    place: str
    tokens: int
    cross_entropy: Interval
    accuracy: Interval
    share_of_loss: float | None


@dataclass(frozen=True)
class WholeTerms:
    """How well a model knows the terms of some length.

    Attributes:
        length: in tokens, one of `LENGTHS`.
        terms: how many there are.
        log_probability: mean over terms of the log-probability of all tokens of the term, given what stands before it, nats.
        accuracy: share of terms all of whose tokens are the most likely ones, given the right ones before.
    """

    length: str
    terms: int
    log_probability: Interval
    accuracy: Interval


@dataclass(frozen=True)
class ModelConcepts:
    """One model on one data set."""

    places: list[PlaceLoss]
    terms: list[WholeTerms]


@dataclass(frozen=True)
class Comparison:
    """``model`` minus ``reference``, as in `PlaceLoss` and `WholeTerms`, by place and by length."""

    reference: str
    model: str
    cross_entropy: dict[str, Interval]
    log_probability: dict[str, Interval]
    accuracy: dict[str, Interval]


class ConceptLosses:
    """Sums over each row, from which all figures are made.

    Args:
        rows: as `peft_caft.term_alignment.align` gives them.
        bootstrap: of as many rows.
    """

    def __init__(self, rows: list[AlignedRow], bootstrap: Bootstrap) -> None:
        self.rows, self.bootstrap = rows, bootstrap
        self.places = {place: [_targets_at(row, place) for row in rows] for place in PLACES}
        self.terms = {
            length: [[term.targets for term in row.terms if _is_of(len(term.targets), length)] for row in rows]
            for length in LENGTHS
        }

    def of(self, scores: Sequence[TokenScores]) -> ModelConcepts:
        """Figures of one model, whose ``scores`` are in the order of the rows."""
        total = sum(float(score.cross_entropy.sum()) for score in scores)
        places, terms = [], []
        for place in PLACES:
            losses, hits, tokens = self._at(place, scores)
            share = float(losses.sum()) / total if total else None
            cross_entropy, accuracy = (self.bootstrap.ratio(values, tokens) for values in (losses, hits))
            places.append(PlaceLoss(place, int(tokens.sum()), cross_entropy, accuracy, share))
        for length in LENGTHS:
            log_probabilities, whole, count = self._whole(length, scores)
            log_probability, accuracy = (self.bootstrap.ratio(values, count) for values in (log_probabilities, whole))
            terms.append(WholeTerms(length, int(count.sum()), log_probability, accuracy))
        return ModelConcepts(places, terms)

    def compare(
        self,
        reference: str,
        reference_scores: Sequence[TokenScores],
        model: str,
        scores: Sequence[TokenScores],
    ) -> Comparison:
        """Paired differences, ``model`` minus ``reference``, of the same rows in each resample."""

        def differences(keys: Sequence[str], values: Callable, index: int) -> dict[str, Interval]:
            found = {}
            for key in keys:
                first, second = values(key, reference_scores), values(key, scores)
                found[key] = self.bootstrap.difference(first[index], first[2], second[index], second[2])
            return found

        return Comparison(
            reference,
            model,
            cross_entropy=differences(PLACES, self._at, 0),
            log_probability=differences(LENGTHS, self._whole, 0),
            accuracy=differences(LENGTHS, self._whole, 1),
        )

    def _at(self, place: str, scores: Sequence[TokenScores]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per row: sum of cross entropies, hits, tokens."""
        pairs = list(zip(self.places[place], scores, strict=True))
        return (
            np.array([score.cross_entropy[indices].sum() for indices, score in pairs]),
            np.array([score.correct[indices].sum() for indices, score in pairs], dtype=np.float64),
            np.array([len(indices) for indices, _ in pairs], dtype=np.float64),
        )

    def _whole(self, length: str, scores: Sequence[TokenScores]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per row: sum of the terms' log-probabilities, terms that are right as a whole, terms."""
        pairs = list(zip(self.terms[length], scores, strict=True))
        return (
            np.array(
                [-sum(s.cross_entropy[list(term)].sum() for term in terms) for terms, s in pairs], dtype=np.float64
            ),
            np.array(
                [sum(bool(s.correct[list(term)].all()) for term in terms) for terms, s in pairs], dtype=np.float64
            ),
            np.array([len(terms) for terms, _ in pairs], dtype=np.float64),
        )


def place_of(row: AlignedRow, target: Target) -> str | None:
    """One of `PLACES` but ``"all"``; None in a term that was cut off."""
    if target.term in (BETWEEN, SPECIAL):
        return "between" if target.term == BETWEEN else "special"
    if target.term < 0:
        return None
    if row.length_of(target) == 1:
        return "single"
    return str(target.place) if target.place < LAST_PLACE else f"{LAST_PLACE}+"


def _targets_at(row: AlignedRow, place: str) -> np.ndarray:
    indices = [index for index, target in enumerate(row.targets) if place in ("all", place_of(row, target))]
    return np.array(indices, dtype=np.int64)


def _is_of(length: int, group: str) -> bool:
    return length >= int(group[:-1]) if group.endswith("+") else length == int(group)
