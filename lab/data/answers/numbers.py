"""Numbers as people and models write them, read exactly (fractions, never floats)."""

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from lab.data.answers import text as texts

_MINUS = dict.fromkeys(map(ord, "−–－﹣‒"), "-")
_SAME = {ord(a): b for a, b in zip("．，％＄／＝（）＾٫٬\u2044∕", ".,%$/=()^.,//", strict=True)}
_SPACES = dict.fromkeys(map(ord, "\u00a0\u202f\u2009\u2007\u2008\u200a\u2005\u2006\u3000"), " ")
_NOTHING = dict.fromkeys(map(ord, "\u200b\u200c\u2060\ufeff"), "")
_TABLE = _MINUS | _SAME | _SPACES | _NOTHING
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_LATEX = [
    (re.compile(r"([⁰¹²³⁴-⁹]+)[/⁄]([₀-₉]+)"), lambda m: f" {m[1].translate(_RAISED)}/{m[2].translate(_LOWERED)}"),
    (re.compile(r"[⁰¹²³⁴-⁹⁺⁻]+"), lambda m: "^{" + m[0].translate(_RAISED) + "}"),
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])"), ""),
    (re.compile(r"\{,\}|,\s*\\!\s*"), ","),
    (re.compile(r"(?<=\d)\\!\s*(?=\d)"), "_"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\times(?![a-z])|\\cdot(?![a-z])|×|·|⋅|∗"), "×"),
]

_EXPONENT = r"(?:\{\s*\(?\s*[+-]?\s*\d+\s*\)?\s*\}|\(\s*[+-]?\s*\d+\s*\)|[+-]?\d+)"
_NUMBER = re.compile(
    # \frac with an optional whole part: 1\frac{1}{2}, \frac12
    r"(?P<frac>(?:(?P<units>\d+) *)?\\frac\s*(?:\{(?P<top>[^{}]*)\}|(?P<top1>\d))\s*(?:\{(?P<low>[^{}]*)\}|(?P<low1>\d)))"
    # a mixed number: 1 1/2
    r"|(?P<mixed>(?P<whole>\d+) +(?P<over>[1-9]\d*) ?/ ?(?P<under>[1-9]\d*)(?![\d/]|\.\d))"
    # digits in groups of three or in a row, decimals, e-notation, "x 10^n", a power
    r"|(?:(?P<integer>[1-9]\d{0,2}(?P<sep>[, _])\d{3}(?:(?P=sep)\d{3})*(?!\d)|\d+)(?P<decimals>\.\d+)?|(?<![\w.])(?P<bare>\.\d+))"
    rf"(?:[eE](?P<e>[+-]?\d+)(?!\w))?(?:\s*[xX×*]\s*10\s*(?:\^|\*\*)\s*(?P<scale>{_EXPONENT}))?"
    rf"(?:(?:\s*\^\s*|\*\*(?=[+-]?\d))(?P<power>{_EXPONENT}))?"
)
_CURRENCY = re.compile(r"(?:(?:US|CA|A|C|HK|NZ|S)?[$€£¥₹₩₽฿]|(?<![A-Za-z])(?:USD|EUR|GBP|INR|CAD|AUD|Rs\.?))\s*\Z")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+\Z")
_SLASH = re.compile(r" ?/ ?(?=\.?\d)")
_EXPONENT_OF = re.compile(r"\^\s*[{(]?\s*[+-]?\s*\Z|[A-Za-z0-9)}]_\{?\Z|[A-Za-z)}]\*\*\Z")
_LARGEST = 4000


class Found(NamedTuple):
    """A number in a (tidied) text: its span with sign, and its exact value; None for a division by zero or an absurd exponent."""

    start: int
    end: int
    value: Fraction | None


def tidy(text: str) -> str:
    """`text` with one spelling for digits, minus signs, fractions, exponents, separators and LaTeX spacing."""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c for c in text)
        text = re.sub(r"(\d?)([¼½¾⅐-⅞↉])", lambda m: m[1] + " " * bool(m[1]) + unicodedata.normalize("NFKC", m[2]), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.translate(_TABLE)


def numbers(text: str, starts_list: bool = False) -> Iterator[Found]:
    """The numbers in tidied `text` from left to right; with `starts_list`, a spaced hyphen that begins a line is a bullet."""
    at = 0
    while match := _NUMBER.search(text, at):
        window = text[max(0, match.start() - 50) : match.start()]
        before = window if len(window) < 50 else f".{window}"
        value, at = _read(text, match, before)
        if not _EXPONENT_OF.search(before) and not _in_word(before):
            taken, negative = _sign(before, starts_list)
            yield Found(match.start() - taken, at, -value if negative and value is not None else value)


def _in_word(before: str) -> bool:
    """Whether a digit that follows `before` belongs to a word such as H2O (and to no LaTeX command, currency or product)."""
    return bool(_LETTERS.search(before)) and not _CURRENCY.search(before) and not re.search(r"\d ?[xX]\Z", before)


def _read(text: str, match: re.Match, before: str) -> tuple[Fraction | None, int]:
    """The value of `match`, or of a/b that begins with it, and where it ends; parts of a longer chain such as a date stand alone."""
    if match.end() - match.start() > _LARGEST:
        return None, match.end()
    if match["mixed"] and int(match["over"]) >= int(match["under"]):
        return Fraction(int(match["whole"])), match.end("whole")
    slash = _SLASH.match(text, match.end())
    under = _NUMBER.match(text, slash.end()) if slash and not re.search(r"\d ?/ ?\Z", before) else None
    if under is None or _SLASH.match(text, under.end()):
        return _value(match), match.end()
    a, b = _value(match), _value(under)
    return (None if a is None or not b else a / b), under.end()


def _value(match: re.Match) -> Fraction | None:
    if match["frac"]:
        over, under = parse(match["top"] or match["top1"] or ""), parse(match["low"] or match["low1"] or "")
        return None if over is None or not under else int(match["units"] or 0) + over / under
    if match["mixed"]:
        return int(match["whole"]) + Fraction(int(match["over"]), int(match["under"]))
    digits = re.sub(r"[, _]", "", match["integer"] or "0") + (match["decimals"] or match["bare"] or "")
    e, scale, power = (
        int(re.sub(r"[^\d+-]", "", match[name] or default)) for name, default in (("e", "0"), ("scale", "0"), ("power", "1"))
    )
    if (len(digits) + abs(e) + abs(scale)) * max(1, abs(power)) > _LARGEST:
        return None
    value = Fraction(digits) * Fraction(10) ** (e + scale)
    return None if value == 0 and power < 0 else value**power


def _integer(exponent: str) -> int:
    return int(re.sub(r"[^\d+-]", "", exponent))


def _sign(before: str, starts_list: bool) -> tuple[int, bool]:
    """How many characters of `before` are the number's sign (and currency), and whether it makes the number negative."""
    bare = before
    while (shorter := _CURRENCY.sub("", bare)) != bare:
        bare = shorter
    if word := re.search(r"\b(negative|minus)\s*\Z", bare, re.IGNORECASE):
        between = word[1].lower() == "minus" and re.search(r"[\d%)]\s*\Z", bare[: word.start()])
        return (0, False) if between else (len(before) - word.start(), True)
    sign = re.search(r"-(\s*)\Z", bare)
    left = bare[: sign.start()] if sign else ""
    if not sign or re.search(r"[\d%)}][\s$€£]*\Z", left):
        return 0, False
    if sign[1]:
        bullet = starts_list and not left.rpartition("\n")[2].strip()
        alone = not bullet and re.search(r"(?:^|[=(\[{,:$\n])\s*\Z", left)
    else:
        alone = not re.search(r"[^\W\d_]\Z", left) or re.search(r"\\[A-Za-z]+\Z", left)
    return (len(before) - sign.start(), True) if alone else (0, False)


def parse(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else (currency, percent and a final period apart), else None."""
    text = tidy(text).strip()
    found = list(numbers(text))
    if len(found) != 1:
        return None
    outside = text[: found[0].start] + text[found[0].end :]
    return found[0].value if re.fullmatch(r"[\s$€£¥%.+]*", outside) else None


def show(value: Fraction) -> str:
    """An integer, a finite decimal, or a/b."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest != 1 or places > 30:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def lenient(text: str) -> str | None:
    """The number a reader takes from an output (ANSWERS rules 1 to 5), as `show` spells it."""
    return texts.read(text, _after, _last)


def _after(marker: texts.Marker) -> str | None:
    """The first number of the marker's line; with equals signs, of the part behind the last one that has a number."""
    content = tidy(marker.content.replace("\n", " "))
    if marker.kind == "###" and not _starts_with_number(content):
        return None
    for part in reversed(content.split("=")):
        for found in numbers(part):
            return None if found.value is None else show(found.value)
    return None


def _starts_with_number(content: str) -> bool:
    """Whether a line behind `###` is an answer and no heading: no words before the number, no "2. Title"."""
    words = re.sub(r"\\[A-Za-z]+|(?:negative|minus|answer|result|USD|US)\b", "", content, flags=re.IGNORECASE)
    return not re.match(r"[^\w]*[A-Za-z]{2,}|\s*\d+\s*[.):]\s*[A-Za-z*]", words)


def _last(text: str) -> str | None:
    values = [found.value for found in numbers(tidy(text), starts_list=True) if found.value is not None]
    return show(values[-1]) if values else None


def equal(answer: str | None, gold: str, relative: float = 0.0) -> bool:
    """Exact equality of values; with `relative`, |answer - gold| <= relative * |gold| (for a gold of 0: <= relative)."""
    a, b = parse(answer) if answer is not None else None, parse(gold)
    if a is None or b is None:
        return False
    return a == b or (relative > 0 and abs(a - b) <= Fraction(relative) * (abs(b) if b else 1))
