"""LaTeX answers (ANSWERS rule 10): read from a box or from "the answer is $..$", compared by mathematical meaning.

Structure is compared here: lists and sets without order, tuples and intervals with it and with their brackets, unions, matrices,
words without case, numbers exactly. Only a single expression goes to math-verify (its `verify` takes the tuple (1,2) for the set
{1,2}, converts degrees, and its time limit works in the main thread only).
"""

import logging
import re
from functools import lru_cache

from lab.data.answers import numbers
from lab.data.answers import text as texts
from lab.data.answers.official_math import within_limit

_DOLLARS = re.compile(r"[\s:*_]*(?:\$\$?(?P<a>(?:\\.|[^$\\])+)\$|\\\((?P<b>.+?)\\\)|\\\[(?P<c>.+?)\\\])", re.DOTALL)
_WORDS = r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
_ALL_WORDS = re.compile(rf"(?:{_WORDS}|[\s.,:;]|\\[ ,;:!])+")
_SIMPLE = [
    (re.compile(r"\\mathrm\s*\{([edi])\}"), r"\1"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"(?<!\\)\\(?:!\s*|,|;|:| |quad\b|qquad\b)|~|\{,\}(?=\d)"), lambda m: "," if m[0] == "{,}" else ""),
    (re.compile(r"\\[$%&#]|[$%€£]"), ""),
    (re.compile(r"\^\s*\{?\s*(?:\\circ(?![A-Za-z])|\\degree|°)\s*\}?|\\degree(?![A-Za-z])|\\textdegree|°"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:varnothing|emptyset)|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\(?:lbrace|\{)"), r"\\{"),
    (re.compile(r"\\rbrace"), r"\\}"),
    (re.compile(r"\\(?:leq|le)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|ge)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\(?:displaystyle|mathrm|mathbf|boldsymbol)(?![A-Za-z])"), ""),
]
_AND = re.compile(r",?\s*\\(?:text|mbox)\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|(?<=[\s\d}])(?:and|or)(?=[\s\d\\])", re.IGNORECASE)
_UNITS = re.compile(rf"\s*{_WORDS}\s*(?:\^\s*(?:\{{[^{{}}]*\}}|\d))?")
_FUNCTIONS = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|mod|gcd|lcm|min|max|arc|inf)"
_UNIT = rf"(?!{_FUNCTIONS})[A-Za-z]"
_PLAIN_UNITS = re.compile(rf"(?<=[\d}}])\s*(?:(?:square|cubic|per)\s+)?{_UNIT}[A-Za-z]+\.?(?:[\s/]+{_UNIT}+)*(?:\^\{{?\d\}}?)?\.?$")
_FRAME = re.compile(r"(?<!\\)\$|\\left(?![a-z])|\\right(?![a-z])|\A\s*\\[(\[]|\\[)\]]\s*\Z")
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]+(?:\s+[A-Za-z'’-]+)*\.?")
_EXPENSIVE = re.compile(r"\d{5,}\s*!|\^\s*\{?\s*\d{4,}|\^\s*(?:\{[^{}]*|\w\s*)\^")
_NAME = re.compile(r"^[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in(?![a-z]))\s*")
_MATRIX = re.compile(r"\\begin\{([pbBvV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}


def lenient(text: str) -> str | None:
    """The last box, or the math behind "the answer is", whichever begins last; no other marker counts, and no bare number."""
    for marker in texts.markers(texts.cut(text)):
        if marker.kind == "box":
            return marker.content
        if marker.kind == "is" and (found := _DOLLARS.match(marker.behind)):
            return (found["a"] or found["b"] or found["c"]).strip()
    return None


@lru_cache(maxsize=4096)
def equal(answer: str | None, gold: str) -> bool:
    """Whether two LaTeX answers mean the same."""
    if answer is None:
        return False
    if _is_words(answer) or _is_words(gold) or (_PLAIN_WORDS.fullmatch(answer) and _PLAIN_WORDS.fullmatch(gold)):
        if _letters(answer) == _letters(gold) or not (re.search(r"\d", answer) and re.search(r"\d", gold)):
            return bool(_letters(gold)) and _letters(answer) == _letters(gold)
        answer, gold = (re.sub(_WORDS, r"\1", side) for side in (answer, gold))
    return _same(_math(answer), _math(gold))


def _bare(latex: str) -> str:
    """Without the marks of math mode around it and a final period."""
    return _FRAME.sub("", latex.strip().rstrip(".")).strip().rstrip(".")


def _is_words(latex: str) -> bool:
    return "\\" in latex and bool(_ALL_WORDS.fullmatch(_bare(latex)))


def _letters(latex: str) -> str:
    """The words of an answer, lower case, without marks and brackets."""
    text = re.sub(r"\\[ ,;:!]", " ", re.sub(_WORDS, r"\1", latex))
    return " ".join(re.sub(r"[^\w'/.-]", " ", text).lower().split()).strip(". ")


def _math(latex: str) -> str:
    latex = _AND.sub(",", _bare(latex))
    for pattern, replacement in _SIMPLE:
        latex = pattern.sub(replacement, latex)
    latex = _UNITS.sub("", latex).strip()
    latex = numbers.tidy(latex).replace("×", r"\times ").replace("π", r"\pi ").replace("∞", r"\infty ").replace("√", r"\sqrt")
    latex = _PLAIN_UNITS.sub("", latex).strip().rstrip(".").strip()
    shorter = _NAME.sub("", latex)
    return shorter if "=" not in shorter else latex


def _same(a: str, b: str) -> bool:
    if re.sub(r"\s", "", a) == re.sub(r"\s", "", b):
        return bool(a)
    x, y = numbers.parse(a), numbers.parse(b)
    if x is not None and y is not None:
        return x == y
    for parts in (_collection, _union, _bracketed, _rows):
        left, right = parts(a), parts(b)
        if left or right:
            return bool(left and right) and left[0] == right[0] and _match(left[1], right[1], ordered=parts in (_bracketed, _rows))
    return _same_expression(_unwrapped(a), _unwrapped(b))


def _match(left: list[str], right: list[str], ordered: bool) -> bool:
    if ordered:
        return len(left) == len(right) and all(map(_same, left, right))
    left, right = _distinct(left), _distinct(right)
    return len(left) == len(right) and all(any(_same(a, b) for b in right) for a in left)


def _distinct(items: list[str]) -> list[str]:
    kept: list[str] = []
    for item in items:
        if not any(_same(item, other) for other in kept):
            kept.append(item)
    return kept


def _collection(latex: str) -> tuple[str, list[str]] | None:
    """The elements of a set or of a list; ± stands for two of them. One number with separators is no list."""
    inner = latex
    if latex.startswith(r"\{") and latex.endswith(r"\}") and len(_split(latex[2:-2], r"\}")) == 1:
        inner = latex[2:-2]
    items = [_NAME.sub("", item.strip()) for item in _split(inner, ",")] if numbers.parse(inner) is None else [inner]
    items = [signed for item in items for signed in _plus_minus(item)]
    return ("", items) if len(items) > 1 or inner != latex else None


def _plus_minus(item: str) -> list[str]:
    if r"\pm" not in item and r"\mp" not in item:
        return [item]
    plus, minus = re.sub(r"\\pm", "+", item), re.sub(r"\\pm", "-", item)
    return [re.sub(r"\\mp", "-", plus).lstrip("+ "), re.sub(r"\\mp", "+", minus).lstrip("+ ")]


def _union(latex: str) -> tuple[str, list[str]] | None:
    parts = _split(latex, r"\cup")
    return ("", [part.strip() for part in parts]) if len(parts) > 1 else None


def _bracketed(latex: str) -> tuple[str, list[str]] | None:
    """The brackets and elements of a tuple, point or interval."""
    if latex[:1] not in ("(", "[") or latex[-1:] not in (")", "]") or _closing(latex) != len(latex) - 1:
        return None
    items = _split(latex[1:-1], ",")
    return (latex[0] + latex[-1], [item.strip() for item in items]) if len(items) > 1 else None


def _rows(latex: str) -> tuple[str, list[str]] | None:
    """The kind and entries of a matrix (round and square brackets are one kind)."""
    found = _MATRIX.fullmatch(latex.strip())
    if not found:
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", found[2].strip().removesuffix(r"\\"))]
    shape = "x".join(str(len(row)) for row in rows)
    return ("" if found[1] in "pbB" else found[1]) + shape, [entry.strip() for row in rows for entry in row]


def _closing(latex: str) -> int:
    """Where the bracket that opens `latex` closes; half-open intervals may close with the other kind. -1 if nowhere."""
    depth = 0
    for at, c in enumerate(latex):
        depth += (c in _OPEN) - (c in _CLOSE)
        if depth == 0:
            return at
    return -1


def _split(latex: str, separator: str) -> list[str]:
    """`latex` cut at the separators that stand outside all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(latex):
        c = latex[at]
        if depth == 0 and latex.startswith(separator, at):
            parts.append(latex[start:at])
            at = start = at + len(separator)
            continue
        depth += (c in _OPEN) - (c in _CLOSE)
        at += 1
    return [*parts, latex[start:]]


def _unwrapped(latex: str) -> str:
    while latex[:1] == "(" and latex[-1:] == ")" and _closing(latex) == len(latex) - 1:
        latex = latex[1:-1].strip()
    return latex


def _same_expression(a: str, b: str) -> bool:
    """Symbolic equality of two expressions or equations by math-verify, to 12 digits where floats are in play."""
    if max(len(a), len(b)) > 300 or _EXPENSIVE.search(a) or _EXPENSIVE.search(b):
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    configuration = [LatexExtractionConfig()]
    left, right = (within_limit(parse, f"${side}$", configuration, parsing_timeout=None) for side in (a, b))
    if not left or not right:
        return False
    return bool(within_limit(verify, right, left, float_rounding=12, numeric_precision=30, timeout_seconds=None))
