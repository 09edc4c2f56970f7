"""Intervals against tables and against a coverage count."""

import math
import random

import pytest

from lab.errors import DataError
from lab.stats import mean_interval, paired_difference, proportion_interval, t_cdf, t_quantile


@pytest.mark.parametrize(
    "p, df, value",  # printed tables; the first two are closed forms
    [
        (0.975, 1, math.tan(math.pi * 0.475)),
        (0.975, 2, 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        (0.975, 4, 2.7764451),
        (0.995, 9, 3.2498355),
        (0.975, 30, 2.0422725),
        (0.95, 120, 1.6576509),
        (0.975, 1e6, 1.9599664),
        (0.025, 4, -2.7764451),
    ],
)
def test_t_quantiles(p, df, value):
    assert t_quantile(p, df) == pytest.approx(value, abs=2e-6)
    assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, abs=1e-12)


def test_mean_interval_by_hand():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.n) == (3.0, 5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-6)
    assert found.clear_of(0.9) and not found.clear_of(1.1)


def test_one_value_tells_no_interval():
    found = mean_interval([0.7])
    assert math.isnan(found.low) and not found.clear_of(0.0) and str(found) == "0.7"
    with pytest.raises(DataError, match="no values"):
        mean_interval([])


def test_wilson():
    found = proportion_interval(45, 50)  # Wilson's score interval, a textbook example
    assert (found.low, found.high) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert proportion_interval(0, 10).low == 0.0 and proportion_interval(10, 10).high == 1.0
    assert proportion_interval(0, 10).high == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)
    for wrong in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError):
            proportion_interval(*wrong)


def test_pairing_removes_what_is_common():
    seeds = [10.0, 20.0, 30.0, 40.0]
    found = paired_difference([s + d for s, d in zip(seeds, (1.0, 1.1, 0.9, 1.0), strict=True)], seeds)
    assert found.mean == pytest.approx(1.0) and found.clear_of(0.0) and found.half < 0.2
    with pytest.raises(DataError, match="4 and 3"):
        paired_difference(seeds, seeds[:3])


def test_the_intervals_cover():
    draw = random.Random(0)
    hits = sum(not mean_interval([draw.gauss(2.0, 3.0) for _ in range(5)]).clear_of(2.0) for _ in range(800))
    assert 0.93 < hits / 800 < 0.97
