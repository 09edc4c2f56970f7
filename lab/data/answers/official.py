"""The strict rules: how each paper's own code reads an answer and calls it right.

Kept even where they misread (their traps stand in the tests), with one exception: where nothing is found the answer is None and
wrong, also where the official code then raises, falls back on an option, compares the whole text or lets inf equal inf.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from lab.data.answers import official_math


class Rule(NamedTuple):
    """`extract` gives the answer of an output (None: nothing found); `gold` brings the gold answer to the same form."""

    extract: Callable[[str], Any]
    gold: Callable[[str], Any]
    same: Callable[[Any, Any], bool] = lambda answer, gold: answer == gold


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value - value == 0 else None  # neither inf nor nan


# -- COCONUT (coconut.md 2.7): exact text after the last "#", without commas --


def coconut(text: str) -> str | None:
    """What follows the last "#"; without one the official code compares the whole text, here nothing is found."""
    return text.rpartition("#")[2].replace(",", "").strip() if "#" in text else None


def coconut_steps(text: str) -> str:
    """The reasoning of an output (prompt included): after the first line, before the first "#"."""
    return text.partition("\n")[2].partition("#")[0].strip()


# -- CODI (distill.md 2A.6): the last number; letters and booleans only where there is none --


def codi(text: str) -> float | None:
    """The last number of the output as a float."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return _float(found[-1]) if found else None


def codi_letters(text: str) -> float | str | None:
    """As `codi`; without a number the character that follows the last "The answer is:", if it is one of A to E."""
    rest = text.rpartition("The answer is:")[2].strip()
    number = codi(text)
    return number if number is not None else rest[:1] if rest[:1] and rest[0] in "ABCDE" else None


def codi_bool(text: str) -> float | bool | None:
    """As `codi`; without a number, whether "True" or "False" occurs."""
    number = codi(text)
    return number if number is not None else True if "True" in text else False if "False" in text else None


# -- Adaptive latent reasoning (distill.md 2B.6): the first number behind the last " the answer is:" --


def _first_number(text: str) -> float | None:
    found = re.search(r"-?(?:\d+(?:\.\d*)?|\.\d+)", text.replace(",", ""))
    return _float(found[0]) if found else None


def adaptive(text: str) -> float | None:
    """Without that phrase the output is of bad format: nothing is found."""
    before, phrase, after = re.sub(r"<\|[^<>|]*\|>", "", text).lower().rpartition(" the answer is:")
    return _first_number(after) if phrase else None


def _near(answer: float, gold: float | None) -> bool:
    return gold is not None and abs(answer - gold) < 1e-6


# -- CoLaR (colar.md 2.5): text after the first "Answer:", compared as floats where both are --


def colar(text: str) -> str:
    """Text after the first "Answer:", else all of it."""
    return text.partition("Answer:")[2] if "Answer:" in text else text


def _colar_same(answer: str, gold: str) -> bool:
    answer, gold = answer.strip(" \n").rstrip(".,"), gold.strip(" \n").rstrip(".,")
    try:
        return float(answer) == float(gold)
    except ValueError:
        return answer == gold


# -- LTA-Thinker and SoftCoT (lta.md 2.12) --


def lta_gsm8k(text: str) -> int | float | None:
    """The last unsigned number after `,`, `%` and `$` are deleted; two decimals."""
    found = re.findall(r"\d+(?:\.\d+)?", re.sub("[,%$]", "", text))
    value = _int_or_float(found[-1]) if found else None
    return round(value, 2) if isinstance(value, float) else value


def _int_or_float(text: str) -> int | float | None:
    try:
        return _float(text) if "." in text else int(text)
    except ValueError:
        return None


def lta_letter(text: str) -> str | None:
    """The last letter a to f that stands alone (the article too)."""
    found = re.findall(r"\b[a-f]\b", text.lower())
    return found[-1].upper() if found else None


def lta_yes_no(text: str) -> bool | None:
    """Whether the last whole word yes or no is yes."""
    found = re.findall(r"\b(yes|no)\b", text.lower())
    return found[-1] == "yes" if found else None


# -- HRPO (dtt.md 2.9) and DTT (dtt.md 2.4) --


def hrpo(text: str) -> str:
    """Text after the last `####` (or all of it), without one trailing period."""
    return text.rpartition("####")[2].strip().removesuffix(".")


def hrpo_gsm8k(text: str) -> str | None:
    """The last number of `hrpo` as the official regular expression cuts it, as a float without trailing zeros."""
    found = re.findall(r"-?\d+/?\.?\d*", hrpo(text))
    if not found:
        return None
    over, slash, under = found[-1].partition("/")
    try:
        return f"{float(Fraction(over) / Fraction(under) if slash and under else Fraction(over.rstrip('.'))):.15g}"
    except (ZeroDivisionError, ValueError):
        return found[-1]


def hrpo_mmlu(text: str) -> str | None:
    """The last standalone letter A to J of `hrpo`."""
    found = re.findall(r"\b[A-J]\b", hrpo(text))
    return found[-1] if found else None


def hrpo_qa(text: str) -> str:
    """`hrpo` in lower case without punctuation, articles and doubled spaces."""
    bare = re.sub(r"[^\w\s]|_", "", hrpo(text).lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def dtt(text: str) -> str | None:
    """All text after the first `[eot]`; without one the output is malformed."""
    return text.partition("[eot]")[2].strip() if "[eot]" in text else None


# -- LatentTTS (latenttts.md 2.1) --


def latenttts_coconut(text: str) -> float | None:
    """The text after the last "#" as a float."""
    return _float(text.rpartition("#")[2].replace(",", "").strip())


def latenttts_colar(text: str) -> float | None:
    """The text after the last "Answer:" as a float, "#" stripped from both ends, commas kept."""
    return _float(text.strip("#").rpartition("Answer:")[2])


def _number(text: str) -> float | None:
    return _float(text.replace(",", "").strip())


def _codi_gold(text: str) -> float | bool | str | None:
    text = text.rpartition("####")[2].replace(",", "").strip()
    return {"True": True, "False": False}.get(text, text if text and text in "ABCDE" else _float(text))


def _truth(text: str) -> bool | None:
    return {"yes": True, "true": True, "no": False, "false": False}.get(text.strip().lower())


def _strip(text: str) -> str:
    return text.strip()


def _tah(mode: str) -> Rule:
    return Rule(partial(official_math.tah, mode=mode), partial(official_math.tah_gold, mode=mode), official_math.tah_same)


RULES: dict[str, Rule] = {
    "tah-expr": _tah("expr"),
    "tah-latex": _tah("latex"),
    "tah-string": _tah("string"),
    "coconut": Rule(coconut, lambda gold: gold.replace(",", "").strip()),
    "codi": Rule(codi, _codi_gold),
    "codi-letters": Rule(codi_letters, _codi_gold),
    "codi-bool": Rule(codi_bool, _codi_gold),
    "adaptive": Rule(adaptive, _number, _near),
    "adaptive-override": Rule(_first_number, _number, _near),
    "colar": Rule(colar, _strip, _colar_same),
    "colar-math": Rule(colar, _strip),
    "lta-gsm8k": Rule(lta_gsm8k, lambda gold: _int_or_float(gold.rpartition("####")[2].replace(",", "").strip())),
    "lta-aqua": Rule(lta_letter, lambda gold: gold.rpartition("####")[2].rpartition("\n")[2].strip().upper()),
    "lta-strategyqa": Rule(lta_yes_no, _truth),
    "lta-math": Rule(official_math.lta_math, official_math.lta_math_gold),
    "hrpo-gsm8k": Rule(hrpo_gsm8k, lambda gold: hrpo_gsm8k(gold.partition("####")[2] or gold)),
    "hrpo-math": Rule(lambda text: official_math.hrpo_math(hrpo(text)), official_math.hendrycks),
    "hrpo-mmlu": Rule(hrpo_mmlu, _strip),
    "hrpo-qa": Rule(hrpo_qa, hrpo_qa),
    "dtt": Rule(dtt, _strip),
    "latenttts-coconut": Rule(latenttts_coconut, _number),
    "latenttts-codi": Rule(codi, _number),
    "latenttts-colar": Rule(latenttts_colar, _number),
}
