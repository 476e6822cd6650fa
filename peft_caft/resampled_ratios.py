"""Percentile intervals by resampling rows: what a mean over tokens or terms would be with other rows of the same kind.

Rows are what is drawn independently; tokens of one row are not. So whole rows are drawn with replacement, each with its sum
(numerator) and its count (denominator), and two models are compared on the same draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: of the rows as they are; None if they have nothing to count.
        low, high: percentiles of the resampled estimates; None with fewer than two rows that have something to count.
    """

    estimate: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Bootstrap:
    """The same draws of rows for everything that is asked of them.

    Args:
        rows: number of rows.
        resamples: number of draws.
        level: of the interval, such as .95.
        seed: of the draws.

    Raises:
        ValueError: if a number makes no sense.
    """

    def __init__(self, rows: int, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> None:
        if rows < 1 or resamples < 1 or not 0 < level < 1:
            raise ValueError(
                f"bootstrap: got rows={rows}, resamples={resamples}, level={level}, expected at least one row and one resample, "
                "and a level between 0 and 1."
            )
        self.rows, self.level = rows, level
        generator = np.random.default_rng(seed)
        # How often each row was drawn; two bytes each, since this is the largest thing here.
        self.counts = np.stack(
            [
                np.bincount(generator.integers(rows, size=rows), minlength=rows).astype(np.uint16)
                for _ in range(resamples)
            ]
        )

    def mean(self, values: ArrayLike) -> Interval:
        """Mean of one value a row."""
        return self.ratio(values, np.ones(self.rows))

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike) -> Interval:
        """Sum of the numerators over the sum of the denominators, both one a row, such as losses and tokens."""
        top, bottom = self._checked(numerators, denominators)
        return self._interval(self._estimate(top, bottom), self._resampled(top, bottom), int(np.count_nonzero(bottom)))

    def difference(
        self,
        numerators: ArrayLike,
        denominators: ArrayLike,
        other_numerators: ArrayLike,
        other_denominators: ArrayLike,
    ) -> Interval:
        """The second ratio minus the first, paired: of the same rows in each draw."""
        top, bottom = self._checked(numerators, denominators)
        other_top, other_bottom = self._checked(other_numerators, other_denominators)
        first, second = self._estimate(top, bottom), self._estimate(other_top, other_bottom)
        estimate = None if first is None or second is None else second - first
        resampled = self._resampled(other_top, other_bottom) - self._resampled(top, bottom)
        return self._interval(
            estimate, resampled, min(int(np.count_nonzero(bottom)), int(np.count_nonzero(other_bottom)))
        )

    def _checked(self, *values: ArrayLike) -> list[np.ndarray]:
        arrays = [np.asarray(value, dtype=np.float64) for value in values]
        for array in arrays:
            if array.shape != (self.rows,):
                raise ValueError(
                    f"bootstrap: got values of shape {array.shape}, expected one for each of {self.rows} rows."
                )
        return arrays

    @staticmethod
    def _estimate(top: np.ndarray, bottom: np.ndarray) -> float | None:
        return float(top.sum() / bottom.sum()) if bottom.sum() else None

    def _resampled(self, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        """One ratio a draw, nan where nothing was drawn that counts."""
        tops, bottoms = (self.counts @ np.stack([top, bottom], axis=1)).T
        return np.divide(tops, bottoms, out=np.full(len(tops), np.nan), where=bottoms != 0)

    def _interval(self, estimate: float | None, resampled: np.ndarray, rows: int) -> Interval:
        known = resampled[~np.isnan(resampled)]
        if estimate is None or rows < 2 or not len(known):
            return Interval(estimate, None, None)
        low, high = np.quantile(known, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(estimate, float(low), float(high))
