"""Means with 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values, and where the true one lies with 95 % confidence; NaN bounds for a single value."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval by Student's t distribution, which takes the values as independent.

    Raises:
        ValueError: if there are no values, or some that are not finite.
        ImportError: without SciPy.
    """
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"there are {len(values)} values to average, allowed: at least one, all of them finite")
    values = [float(value) for value in values]
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def _t_quantile(degrees: int) -> float:
    try:
        from scipy.stats import t
    except ImportError:
        raise ImportError('evaluation needs SciPy: pip install "modeling-encodec[eval]"') from None
    return float(t.ppf(0.975, degrees))
