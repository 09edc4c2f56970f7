"""What N answers to a question are worth: votes, coverage, pass@k, best-of-N (`latenttts.md` 2.5, 2.9).

An answer is any hashable value; None is an output in which nothing was found. Unparseable answers have no vote while any
other answer has one (`official=True` lets them take part, as the released scripts do). Ties go to the first seen.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, isqrt

from lab.errors import SettingsError

Answer = Hashable | None


def vote(answers: Sequence[Answer], weights: Sequence[float] | None = None, official: bool = False, once: bool = False) -> Answer:
    """The answer with the most votes (or the largest summed weight); None only if no answer could be read, or `official`.

    Args:
        official: outputs in which nothing was found take part. once: they count as one together (LTA-Thinker's scripts, `lta.md` 2.13).
    """
    _nonempty(answers)
    weights = [1.0] * len(answers) if weights is None else list(weights)
    readable = [(a, w) for a, w in zip(answers, weights, strict=True) if official or a is not None]
    totals: dict[Answer, float] = {}
    for answer, weight in readable:
        totals[answer] = weight if once and answer is None else totals.get(answer, 0.0) + weight
    return max(totals, key=totals.__getitem__) if totals else None


def settled(answers: Sequence[Answer], n: int) -> bool:
    """Whether the vote over `n` answers is decided by these first ones, whatever the others will be."""
    counts = sorted(Counter(answer for answer in answers if answer is not None).values(), reverse=True)
    return bool(counts) and counts[0] - sum(counts[1:2]) > n - len(answers)


def best(answers: Sequence[Answer], scores: Sequence[float]) -> int:
    """The place of the sample with the highest score; the first of equals."""
    _nonempty(answers)
    return max(range(len(answers)), key=lambda place: (scores[place], -place))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of `k` samples is right, from `correct` of `n`.

    For k > n: 1 if any was right, else 0, as the released code has it.
    """
    if k < 1 or not 0 <= correct <= n:
        raise SettingsError(f"pass@{k} of {correct} correct among {n}: k must be at least 1 and correct between 0 and n.")
    if k > n:
        return float(correct > 0)
    return 1.0 - comb(n - correct, k) / comb(n, k)


def official_ks(n: int) -> list[int]:
    """The k the released scripts print for N samples: powers of two up to N with exponents up to the root of N."""
    return [1 << i for i in range(isqrt(n) + 1) if 1 << i <= n]


def coverage(corrects: Sequence[bool]) -> bool:
    """Whether any sample was right (pass@N)."""
    _nonempty(corrects)
    return any(corrects)


def _nonempty(values: Sequence) -> None:
    if not len(values):
        raise SettingsError("A vote needs at least one sample.")
