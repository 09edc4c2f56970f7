"""How an answer is read and compared: the official (strict) rule of a paper and the lenient rules, always side by side."""

from dataclasses import dataclass

from lab.data.answers import latex, letters, numbers, sentences, words
from lab.data.answers.official import RULES, Rule
from lab.data.benchmarks import BENCHMARKS, Benchmark, benchmark
from lab.errors import unknown

KINDS = {
    "number": "codi",
    "letter": "lta-aqua",
    "latex": "tah-latex",
    "yesno": "lta-strategyqa",
    "truefalse": "coconut",
    "sentence": "coconut",
}


@dataclass(frozen=True, slots=True)
class Score:
    """One output under both rules; an answer of None means that nothing was found, and is never correct."""

    strict_answer: str | None
    strict_correct: bool
    lenient_answer: str | None
    lenient_correct: bool


def score(text: str, gold: str, benchmark: str | Benchmark, rule: str | None = None) -> Score:
    """Scores one output against the gold answer.

    Args:
        benchmark: its name, its entry, or a kind of answer (number, letter, latex, yesno, truefalse, sentence).
        rule: the strict rule by name (see `RULES`); None takes the benchmark's own.
    Raises:
        SettingsError: an unknown benchmark or rule, with the closest match.
    """
    entry = _entry(benchmark)
    answer, correct = strict(text, gold, rule or entry.strict)
    lenient_answer = lenient(text, entry)
    return Score(answer, correct, lenient_answer, same(lenient_answer, gold, entry))


def strict(text: str, gold: str, rule: str) -> tuple[str | None, bool]:
    """(answer, correct) by the official rule of that name; equal numbers are written alike, so that they vote together."""
    if rule not in RULES:
        raise unknown("strict rule", rule, RULES)
    answer = RULES[rule].extract(text)
    if answer is None:
        return None, False
    shown = answer[-1] if isinstance(answer, list) else answer
    shown = str(int(shown) if isinstance(shown, float) and shown.is_integer() else shown)
    return shown, bool(RULES[rule].same(answer, RULES[rule].gold(gold)))


def lenient(text: str, benchmark: str | Benchmark) -> str | None:
    """The answer that the lenient rules find in an output, in the spelling of gold answers; None where they find nothing."""
    entry = _entry(benchmark)
    if entry.answer == "number":
        return numbers.lenient(text)
    if entry.answer == "letter":
        return letters.lenient(text, entry.letters)
    if entry.answer == "latex":
        return latex.lenient(text)
    if entry.answer == "sentence":
        return sentences.lenient(text)
    value = words.lenient(text, lettered=entry.answer == "truefalse")
    names = ("False", "True") if entry.answer == "truefalse" else ("no", "yes")
    return None if value is None else names[value]


def same(answer: str | None, gold: str, benchmark: str | Benchmark) -> bool:
    """Whether a lenient answer equals the gold one under the benchmark's comparison; None equals nothing."""
    entry = _entry(benchmark)
    if answer is None:
        return False
    if entry.answer == "number":
        return numbers.equal(answer, gold, entry.relative)
    if entry.answer == "letter":
        return letters.equal(answer, gold, entry.letters)
    if entry.answer == "latex":
        return latex.equal(answer, gold)
    if entry.answer == "sentence":
        return sentences.equal(answer, gold)
    value = words.value(answer)
    return value is not None and value == words.value(gold)


def _entry(name: str | Benchmark) -> Benchmark:
    if isinstance(name, Benchmark):
        return name
    if name in KINDS and name not in BENCHMARKS:
        return Benchmark(name, name, KINDS[name])
    return benchmark(name)


__all__ = ["KINDS", "RULES", "Rule", "Score", "lenient", "same", "score", "strict"]
