"""How sure a mean over test rows is, and a difference between two runs on the same rows.

All of it works on one table of values, shape (seeds, rows): a run trained from one seed is one line
of it. Undefined values (None) take no part. Where there are several seeds, seeds and rows are drawn
apart, since every seed meets the same rows (the "pigeonhole" bootstrap: Owen, Annals of Applied
Statistics 1(2), 2007). Percentile intervals; seeded, so the same values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Values = Sequence[float | None]
CHUNK = 256  # draws at a time: with 10,000 rows, 20 MB each array


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its confidence interval.

    Attributes:
        mean: over all defined values.
        low: lower end; None where nothing can be said, as of one row.
        high: upper end.
        rows: how many rows have a defined value.
        method: how the interval was made: ``"bootstrap"`` or ``"wilson"``.
    """

    mean: float
    low: float | None
    high: float | None
    rows: int
    method: str

    @property
    def excludes_zero(self) -> bool:
        return excludes_zero(self.low, self.high)


def excludes_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval leaves out 0; one that is not known does not."""
    return low is not None and high is not None and (low > 0 or high < 0)


def mean_estimate(
    values: Values, weights: Sequence[float] | None = None, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """The mean of one run's per-row values; None if none is defined.

    Shares of rows without weights, values 0 and 1 alone, get Wilson's interval: the bootstrap's has
    no width where all rows agree, as at 0 of 164.

    Args:
        values: one per row.
        weights: of the rows; the mean is sum(w v) / sum(w).
        level: of confidence.
        resamples: draws of the bootstrap.
        seed: of the draws.
    """
    table, weight = _table([values], weights)
    rows = int((weight > 0).sum())
    if not rows:
        return None
    defined = table[weight > 0]
    if weights is None and np.isin(defined, (0.0, 1.0)).all():
        low, high = wilson_interval(int(defined.sum()), rows, level)
        return Estimate(float(defined.mean()), low, high, rows, "wilson")
    return _estimate(table, weight, level, resamples, seed)


def mean_over_seeds(
    values: Sequence[Values],
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """The mean over runs from several seeds, with its interval over seeds and rows; None if no
    value is defined.

    Args:
        values: per seed, one value per row; ``[values]`` for one seed, whose interval is over rows
            alone.
        weights: of the rows, the same for all seeds.
    """
    table, weight = _table(values, weights)
    return _estimate(table, weight, level, resamples, seed) if (weight > 0).any() else None


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Journal of the American Statistical Association 22,
    1927).
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    first: Sequence[Values],
    second: Sequence[Values],
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Mean of ``second - first``, paired by seed and row; None if no pair is defined.

    A pair counts where both are defined, so that a metric which one of the runs leaves undefined
    compares the rows on which both answered usefully. With S seeds the part of the variance that
    comes from seeds is (S - 1) / S of what it should be: at three seeds an interval is too narrow
    by up to a fifth, and with one seed it says nothing about seeds at all.

    Args:
        first: per seed, one value per row; ``[values]`` for one seed.
        second: the same, of the other run.
        weights: of the rows.

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
    return _estimate(two - one, weight, level, resamples, seed) if weight.any() else None


def too_narrow_by(seeds: int) -> float:
    """Up to what share of its width an interval over so many seeds falls short, if all of the
    spread is that of seeds.
    """
    return 1 - ((seeds - 1) / seeds) ** 0.5


def sign_flip_p_value(
    differences: Values, weights: Sequence[float] | None = None, flips: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of paired differences whose signs would be chance if the runs did not
    differ.

    All 2^n signs where these are at most ``flips`` (then exact), else random ones, of which the
    observed ones count as one.

    Args:
        differences: one per row (or per seed); undefined ones and zeros take no part.
    """
    table, weight = _table([differences], weights)
    terms = (table * weight)[table * weight != 0]
    observed = abs(terms.sum()) * (1 - 1e-12)
    if 2 ** len(terms) <= flips:
        numbers = np.arange(2 ** len(terms))[:, None]
        signs = 1 - 2 * ((numbers >> np.arange(len(terms))) & 1)
        return float((np.abs(signs @ terms) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = sum(
        int((np.abs((2 * rng.integers(0, 2, (count, len(terms))) - 1) @ terms) >= observed).sum())
        for count in _chunks(flips)
    )
    return (hits + 1) / (flips + 1)


def _table(values: Sequence[Values], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Values with 0 for undefined ones, and weights with 0 for these; both fp64 ``(seeds, rows)``."""
    table = np.array([[np.nan if v is None else v for v in line] for line in values], dtype=np.float64).reshape(
        len(values), -1
    )
    weight = np.ones(table.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != (table.shape[1],) or (weight < 0).any():
        raise ValueError(
            f"weights: got {weight.shape[0]} numbers, expected {table.shape[1]}, one per row and none below 0."
        )
    undefined = np.isnan(table)
    return np.where(undefined, 0.0, table), np.where(undefined, 0.0, weight)


def _estimate(table: np.ndarray, weight: np.ndarray, level: float, resamples: int, seed: int) -> Estimate:
    mean = float((table * weight).sum() / weight.sum())
    used = int((weight > 0).any(axis=0).sum())
    if used < 2:
        return Estimate(mean, None, None, used, "bootstrap")
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([_draws(table * weight, weight, rng, count) for count in _chunks(resamples)])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), used, "bootstrap")


def _draws(weighted: np.ndarray, weight: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Means of so many draws; NaN where a draw holds no defined value."""
    seeds, rows = weighted.shape
    of_rows = _counts(rng, count, rows)
    of_seeds = _counts(rng, count, seeds) if seeds > 1 else np.ones((count, 1))
    total = ((of_seeds @ weighted) * of_rows).sum(axis=1)
    divisor = ((of_seeds @ weight) * of_rows).sum(axis=1)
    return np.divide(total, divisor, out=np.full(count, np.nan), where=divisor > 0)


def _counts(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """How often each of ``size`` is drawn, with replacement, ``count`` times over: fp64 ``(count,
    size)``.
    """
    drawn = rng.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _chunks(total: int) -> list[int]:
    return [min(CHUNK, total - start) for start in range(0, total, CHUNK)]
