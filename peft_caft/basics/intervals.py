"""Confidence intervals of a mean over test rows, and of the difference of two runs on them.

Values form a table (seeds, rows), with a line for the run from each seed; undefined values (None)
take no part. Seeds and rows are drawn independently, since every seed meets the same rows (the
"pigeonhole" bootstrap: Owen, Annals of Applied Statistics 1(2), 2007). Intervals are those of
percentiles, and the same for the same values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Values = Sequence[float | None]
LEVEL = 0.95  # confidence level
CHUNK = 256  # draws at a time: with 10,000 rows, 20 MB each array


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its confidence interval.

    Attributes:
        mean: mean of all defined values.
        low, high: ends of the interval; None if there is none, as for one row.
        rows: number of rows that have a defined value.
        method: ``"bootstrap"`` or ``"wilson"``.
    """

    mean: float
    low: float | None
    high: float | None
    rows: int
    method: str

    @property
    def excludes_zero(self) -> bool:
        return excludes_zero(self.low, self.high)


def shown(mean: float, low: float | None, high: float | None, percent: bool = False, sign: str = "") -> str:
    """A mean and its interval, if it has one, as text; ``sign="+"`` marks positive numbers."""
    form = f"{{:{sign}.1%}}" if percent else f"{{:{sign}.3f}}"
    return form.format(mean) + ("" if low is None or high is None else f" ({form.format(low)} to {form.format(high)})")


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether the interval is known and does not contain 0."""
    return low is not None and high is not None and (low > 0 or high < 0)


def mean_estimate(
    values: Values, weights: Sequence[float] | None = None, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """The mean of one run's values with its interval; None if no value is defined.

    Values that are all 0 or 1, without weights, get Wilson's interval: the bootstrap's has no width
    where all rows agree.

    Args:
        values: one value v per row.
        weights: weight w of each row; the mean is sum(w v) / sum(w).
        resamples: number of draws of the bootstrap.
        seed: seed of the draws.
    """
    table, weight = _table([values], weights)
    rows = int((weight > 0).sum())
    if not rows:
        return None
    defined = table[weight > 0]
    if weights is None and np.isin(defined, (0.0, 1.0)).all():
        low, high = wilson_interval(int(defined.sum()), rows)
        return Estimate(float(defined.mean()), low, high, rows, "wilson")
    return _estimate(table, weight, resamples, seed)


def mean_over_seeds(
    values: Sequence[Values], weights: Sequence[float] | None = None, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """The mean over runs from several seeds, each with a value per row, by bootstrap over both.

    One run alone gets the interval of `mean_estimate`. Wilson's is not for more: their rows are the
    same, and so are no independent trials.
    """
    if len(values) == 1:
        return mean_estimate(values[0], weights, resamples, seed)
    table, weight = _table(values, weights)
    return _estimate(table, weight, resamples, seed) if (weight > 0).any() else None


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (J. American Statistical Association 22, 1927)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    first: Sequence[Values],
    second: Sequence[Values],
    weights: Sequence[float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Mean of ``second - first``, paired by seed and row; None if no pair is defined.

    A pair counts if both values are defined. With S seeds, the part of the variance that comes from
    seeds is (S - 1) / S of what it should be: with three seeds an interval is too narrow by up to a
    fifth, and with one seed it says nothing about seeds.

    Args:
        first, second: for each seed one value per row.
        weights, resamples, seed: arguments of `mean_estimate`.

    Raises:
        ValueError: if the shapes differ.
    """
    one, weight_one = _table(first, weights)
    two, weight_two = _table(second, weights)
    if one.shape != two.shape:
        raise ValueError(
            f"first and second: got {one.shape} and {two.shape} (seeds, rows), expected the same. Evaluate both on the same rows and seeds."
        )
    weight = np.where((weight_one > 0) & (weight_two > 0), weight_one, 0.0)
    return _estimate(two - one, weight, resamples, seed) if weight.any() else None


def too_narrow_by(seeds: int) -> float:
    """Share of its width that an interval lacks if all variance comes from its ``seeds``."""
    return 1 - ((seeds - 1) / seeds) ** 0.5


def _table(values: Sequence[Values], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights, both 0 where a value is undefined, and both fp64 ``(seeds, rows)``."""
    table = np.array(values, dtype=np.float64).reshape(len(values), -1)  # None becomes NaN
    weight = np.ones(table.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != (table.shape[1],) or (weight < 0).any():
        raise ValueError(
            f"weights: got {weight.shape[0]} numbers, expected {table.shape[1]}, one per row and none below 0."
        )
    undefined = np.isnan(table)
    return np.where(undefined, 0.0, table), np.where(undefined, 0.0, weight)


def _estimate(table: np.ndarray, weight: np.ndarray, resamples: int, seed: int) -> Estimate:
    mean = float((table * weight).sum() / weight.sum())
    used = int((weight > 0).any(axis=0).sum())
    if used < 2:
        return Estimate(mean, None, None, used, "bootstrap")
    rng = np.random.default_rng(seed)
    counts = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    drawn = np.concatenate([_draws(table * weight, weight, rng, count) for count in counts])
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), used, "bootstrap")


def _draws(weighted: np.ndarray, weight: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Means of ``count`` draws; NaN where a draw has no defined value."""
    seeds, rows = weighted.shape
    of_rows = _counts(rng, count, rows)
    of_seeds = _counts(rng, count, seeds) if seeds > 1 else np.ones((count, 1))
    total = ((of_seeds @ weighted) * of_rows).sum(axis=1)
    divisor = ((of_seeds @ weight) * of_rows).sum(axis=1)
    return np.divide(total, divisor, out=np.full(count, np.nan), where=divisor > 0)


def _counts(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """How often each of ``size`` items is in each of ``count`` draws: fp64 ``(count, size)``."""
    drawn = rng.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)
