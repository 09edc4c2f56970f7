"""Votes, best-of-N and pass@k against the official numbers and by hand."""

import itertools
import json
from itertools import combinations
from pathlib import Path

import pytest

from lab.errors import SettingsError
from lab.sampling.votes import best, coverage, official_ks, pass_at_k, settled, vote

NUMBERS = json.loads((Path(__file__).parents[1] / "fixtures" / "latenttts" / "metrics.json").read_text())


def test_pass_at_k_is_the_official_estimate():
    for k, want in NUMBERS["pass_at_k"].items():
        got = [pass_at_k(len(row), sum(row), int(k)) for row in NUMBERS["corrects"]]
        assert sum(got) / len(got) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_is_the_mean_over_all_subsets():
    row = [1, 0, 0, 1, 0, 0]
    subsets = list(combinations(row, 3))
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(6, 2, 6) == float(coverage(row)) == 1.0


def test_official_ks():
    assert {n: official_ks(int(n)) for n in NUMBERS["printed_ks_for_N"]} == NUMBERS["printed_ks_for_N"]


def test_what_cannot_be_read_counts_once_in_lta_thinkers_vote():
    assert vote([5, None, None], official=True, once=True) == 5
    assert vote([None, 5, 7], official=True, once=True) is None
    assert vote([None, 5, 5], official=True, once=True) == 5
    assert vote([5, None, None], official=True) is None


def test_a_vote_is_settled_when_no_further_answers_can_change_it():
    assert settled([1, 1, 1], 5) and not settled([1, 1], 5) and not settled([1, 1, 2, 1], 6) and not settled([None, None, None], 4)
    for n in (3, 4, 5):
        for first in itertools.product([None, 1, 2], repeat=n - 1):
            for taken in range(1, n):
                if settled(first[:taken], n):
                    ends = {vote([*first[:taken], *rest]) for rest in itertools.product([None, 1, 2, 3], repeat=n - taken)}
                    assert len(ends) == 1


@pytest.mark.parametrize("case", NUMBERS["votes"])
def test_official_votes(case):
    assert vote(case["answers"], official=True) == case["winner"]


def test_what_cannot_be_read_has_no_vote_while_anything_can():
    assert vote([None, None, 4]) == 4 and vote([None, None, 4], official=True) is None and vote([None, None]) is None
    assert vote([3, 5, 5, 3]) == 3, "the first seen wins a tie"
    assert vote([3, 5, 5], weights=[5.0, 1.0, 1.0]) == 3
    assert best([1, 2, 3], [0.0, 2.0, 2.0]) == 1


def test_impossible_requests_are_refused():
    for bad in (lambda: vote([]), lambda: best([], []), lambda: pass_at_k(4, 5, 1), lambda: pass_at_k(4, 1, 0)):
        with pytest.raises(SettingsError):
            bad()
