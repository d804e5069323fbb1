"""Intervals and tests for accuracies: of one proportion, and of two models or settings on the same samples.

Knows numbers only.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


Values = Sequence[float] | np.ndarray


def wilson_interval(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which stays within 0 and 1."""
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))  # rounding may cross the rate


def mean_score_interval(scores: Values) -> tuple[float, float]:
    """The 95 % interval of a mean score: Wilson's where all are 0 or 1, else by bootstrap (shares of a point)."""
    values = np.asarray(scores, float)
    if np.isin(values, (0, 1)).all():
        return wilson_interval(float(values.mean()), len(values))
    return paired_bootstrap(values, np.zeros(len(values)))


def rate(scores: Values) -> dict[str, Any]:
    """The mean of scores with its [`mean_score_interval`]; of 0 samples `None`."""
    values = np.asarray(scores, float)
    if not len(values):
        return {"rate": None, "low": None, "high": None, "samples": 0}
    low, high = mean_score_interval(values)
    return {"rate": float(values.mean()), "low": low, "high": high, "samples": len(values)}


def mcnemar(first: Values, second: Values) -> float:
    """
    The two-sided p-value of McNemar's exact test (1947): whether of the samples that only one of the two has right,
    each has half.

    Args:
        first, second (`Sequence[float]`): Whether each answer is right, the same samples in the same order.

    Raises:
        ValueError: the two have different lengths.
    """
    one, other = _paired(first, second)
    only_first, only_second = int((one & ~other).sum()), int((~one & other).sum())
    count, fewer = only_first + only_second, min(only_first, only_second)
    # The sum of binomial terms in logarithms: 0.5**count alone is 0 in floating point from 1,075 samples on.
    terms = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def paired_bootstrap(
    first: Values, second: Values, level: float = 0.95, draws: int = 10000, seed: int = 0
) -> tuple[float, float]:
    """
    The percentile interval of `mean(first) - mean(second)`, samples drawn again in pairs (Efron 1979).

    Args:
        first, second (`Sequence[float]`): Scores of the same samples in the same order.
        level (`float`, defaults to 0.95): Share of the drawn differences that lie in the interval.
        draws (`int`, defaults to 10000): Resampled data sets.
        seed (`int`, defaults to 0): The same seed gives the same interval.

    Raises:
        ValueError: the two have different lengths.
    """
    one, other = _paired(first, second, float)
    values, counts = np.unique(one - other, return_counts=True)  # few values: one multinomial a draw is enough
    drawn = np.random.default_rng(seed).multinomial(len(one), counts / len(one), size=draws)
    low, high = np.quantile(drawn @ values / len(one), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def mean_interval(values: Values, level: float = 0.95) -> tuple[float, float]:
    """
    The interval of the mean of independent values, as accuracies of several seeds (Student 1908). It speaks of other
    seeds; two or three leave it wide.

    Raises:
        ValueError: there are fewer than two values.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        raise ValueError(f"`values` has {len(found)} entries, expected at least two. One seed has no interval.")
    # With t = sqrt(n - 1) * tan(angle), Student's density is a power of the cosine.
    freedom = len(found) - 1
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200001)
    density = np.cos(angles).clip(min=0) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    quantile = math.sqrt(freedom) * math.tan(np.interp((1 + level) / 2, mass / mass[-1], angles))
    half = quantile * float(found.std(ddof=1)) / math.sqrt(len(found))
    return float(found.mean()) - half, float(found.mean()) + half


def _paired(first: Values, second: Values, dtype: type = bool) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"`first` has {len(first)} samples and `second` {len(second)}, expected the same samples in the same "
            "order, at least one. Score both on one data set."
        )
    return np.asarray(first, dtype=dtype), np.asarray(second, dtype=dtype)
