"""Intervals for what a few seeds or a few hundred questions can tell; no dependency beyond the standard library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from lab.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values with the limits of its confidence interval; the limits are NaN where one value tells nothing."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    def clear_of(self, value: float) -> bool:
        """Whether `value` lies outside the limits; False where they are unknown."""
        return self.low > value or self.high < value

    def named(self, name: str) -> dict[str, float]:
        """{name: mean, name_low: …, name_high: …}: how a step's results hold it."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.low) else f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t-interval of the mean of independent `values` (seeds, questions); raises DataError without values."""
    values = [float(value) for value in values]
    if not values:
        raise DataError("There are no values to take a mean of.")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t_quantile(0.5 + level / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def proportion_interval(count: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a proportion: `count` of `n` independent trials; raises DataError unless 0 <= count <= n and n > 0."""
    if not 0 <= count <= n or n == 0:
        raise DataError(f"{count} of {n} is not a proportion.")
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    share = count / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, 0.0 if count == 0 else centre - half, 1.0 if count == n else centre + half, n)


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of first − second with its t-interval, where the i-th values belong together (same seed, same question)."""
    if len(first) != len(second):
        raise DataError(f"Paired values must be equally many, not {len(first)} and {len(second)}.")
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], level)


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with `df` degrees of freedom."""
    tail = 0.5 * _beta_ratio(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """The t at which `t_cdf` reaches p, to about 1e-12 relative."""
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    while high - low > 1e-13 * max(1.0, high):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _beta_ratio(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction where that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_ratio(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    return front * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float, tiny: float = 1e-300) -> float:
    """The continued fraction 1/(1 + d1/(1 + d2/(1 + …))) of the incomplete beta function, by Lentz's method."""
    value, c, d = tiny, tiny, 0.0
    for n in range(1000):
        m = n // 2
        if n == 0:
            term = 1.0
        elif n % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if n and abs(c * d - 1) < 1e-15:
            return value
    return value
