"""Where a model's loss sits in terms, how well it knows whole ones, and how two models differ.

A model is one run or several, each from a seed of its own. Intervals are bootstrapped over rows,
and over runs if there are several. Models are compared on the same rows, run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..basics.intervals import Estimate, mean_over_seeds, paired_difference
from .alignment import BETWEEN, SPECIAL, AlignedRow, Target
from .token_scores import TokenScores

LAST_PLACE = 5  # the later ones are counted with it
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
PLACES = tuple(PLACE_NAMES)
LENGTHS = ("2+", "2", "3", "4", "5+")
Runs = Sequence[Sequence[TokenScores]]  # runs of one model: scores of each row, in the order of the rows


@dataclass(frozen=True)
class PlaceLoss:
    """Cross entropy of the tokens at one place.

    Attributes:
        place: one of `PLACES`.
        cross_entropy: mean, nats/token.
        accuracy: share of tokens that are the model's most likely one.
        share_of_loss: share of the cross entropy summed over all supervised tokens.
    """

    place: str
    tokens: int
    cross_entropy: Estimate | None
    accuracy: Estimate | None
    share_of_loss: float | None


@dataclass(frozen=True)
class WholeTerms:
    """How well a model knows the terms of some length.

    Attributes:
        length: number of tokens, one of `LENGTHS`.
        log_probability: mean over terms, of the whole term after the text before it, nats.
        accuracy: share of terms whose tokens are all the most likely ones after the right tokens.
    """

    length: str
    terms: int
    log_probability: Estimate | None
    accuracy: Estimate | None


@dataclass(frozen=True)
class ModelConcepts:
    """One model on one data set."""

    places: list[PlaceLoss]
    terms: list[WholeTerms]


@dataclass(frozen=True)
class ModelComparison:
    """``model`` minus ``reference``, over ``runs`` pairs of runs.

    Attributes:
        cross_entropy: place -> difference, nats/token (`PlaceLoss`).
        log_probability: length -> difference, nats (`WholeTerms`).
        accuracy: length -> difference of shares (`WholeTerms`).
    """

    reference: str
    model: str
    runs: int
    cross_entropy: dict[str, Estimate | None]
    log_probability: dict[str, Estimate | None]
    accuracy: dict[str, Estimate | None]


@dataclass(frozen=True)
class RowValues:
    """Values to average: the mean of each run and row, over the tokens or terms of the row.

    Attributes:
        means: for each run, one mean per row; meaningless where the count is 0.
        counts: tokens or terms of each row.
    """

    means: list[list[float]]
    counts: list[int]

    @classmethod
    def of(cls, groups: Sequence[Sized], runs: Runs, total: Callable[[TokenScores, Any], float]) -> RowValues:
        """Divide ``total`` of the tokens or terms of each row, for each run, by their number."""
        means = [
            [float(total(scores, group)) / max(len(group), 1) for scores, group in zip(run, groups, strict=True)]
            for run in runs
        ]
        return cls(means, [len(group) for group in groups])


class ConceptLosses:
    """Computes all figures of ``rows`` from the scores of single tokens.

    Args:
        resamples: number of bootstrap draws.
        seed: seed of the draws.
    """

    def __init__(self, rows: list[AlignedRow], resamples: int = 1000, seed: int = 0) -> None:
        self.resamples, self.seed = resamples, seed
        self.places = {place: [_targets_at(row, place) for row in rows] for place in PLACES}
        self.terms = {
            length: [[term.targets for term in row.terms if _is_of(len(term.targets), length)] for row in rows]
            for length in LENGTHS
        }

    def of(self, runs: Runs) -> ModelConcepts:
        """Figures of one model."""
        at = {place: self._at(place, runs) for place in PLACES}
        total = _sum(at["all"][0])
        places, terms = [], []
        for place, (losses, hits) in at.items():
            share = _sum(losses) / total if total else None
            places.append(PlaceLoss(place, sum(losses.counts), self._mean(losses), self._mean(hits), share))
        for length in LENGTHS:
            log_probabilities, whole = self._whole(length, runs)
            terms.append(WholeTerms(length, sum(whole.counts), self._mean(log_probabilities), self._mean(whole)))
        return ModelConcepts(places, terms)

    def compare(self, reference: str, reference_runs: Runs, model: str, runs: Runs) -> ModelComparison:
        """``model`` minus ``reference``, paired by row and run (a single run with all others)."""
        pairs = max(len(reference_runs), len(runs))
        before, after = (list(own) * pairs if len(own) == 1 else own for own in (reference_runs, runs))

        def differences(keys: Sequence[str], values: Callable, index: int) -> dict[str, Estimate | None]:
            return {key: self._difference(values(key, before)[index], values(key, after)[index]) for key in keys}

        return ModelComparison(
            reference,
            model,
            pairs,
            cross_entropy=differences(PLACES, self._at, 0),
            log_probability=differences(LENGTHS, self._whole, 0),
            accuracy=differences(LENGTHS, self._whole, 1),
        )

    def _mean(self, values: RowValues) -> Estimate | None:
        return mean_over_seeds(values.means, values.counts, resamples=self.resamples, seed=self.seed)

    def _difference(self, first: RowValues, second: RowValues) -> Estimate | None:
        return paired_difference(first.means, second.means, first.counts, resamples=self.resamples, seed=self.seed)

    def _at(self, place: str, runs: Runs) -> tuple[RowValues, RowValues]:
        """Cross entropies and hits of the tokens at a place."""
        places = self.places[place]
        return (
            RowValues.of(places, runs, lambda scores, indices: scores.cross_entropy[indices].sum()),
            RowValues.of(places, runs, lambda scores, indices: scores.correct[indices].sum()),
        )

    def _whole(self, length: str, runs: Runs) -> tuple[RowValues, RowValues]:
        """Log-probabilities of the terms of a length, and whether they are right as a whole."""
        rows = self.terms[length]
        return (
            RowValues.of(rows, runs, lambda scores, terms: -sum(scores.cross_entropy[list(t)].sum() for t in terms)),
            RowValues.of(rows, runs, lambda scores, terms: sum(float(scores.correct[list(t)].all()) for t in terms)),
        )


def _sum(values: RowValues) -> float:
    return sum(mean * count for run in values.means for mean, count in zip(run, values.counts, strict=True))


def place_of(row: AlignedRow, target: Target) -> str | None:
    """The target's entry of `PLACES` other than ``"all"``; None in a term that was cut off."""
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
