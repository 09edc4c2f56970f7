"""The strict rules that understand mathematics: TaH's math-verify configurations, and the Minerva clean-up of LTA-Thinker."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

LIMIT_S = 5.0  # of work on one comparison

# -- TaH (tah.md 2.10) --


def within_limit(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What math-verify's `call` returns; None after LIMIT_S of this thread's work, where it is the main one, which alone can be told.

    Its own limit goes by the clock: on a machine that was busy for so long it would change a verdict.
    """
    from math_verify.errors import TimeoutException

    end = time.thread_time() + LIMIT_S

    def alarm(*_: Any) -> None:
        if (left := end - time.thread_time()) <= 0:
            raise TimeoutException
        signal.setitimer(signal.ITIMER_REAL, left)

    if threading.current_thread() is not threading.main_thread():
        return call(*arguments, **options)
    before, ticking = signal.signal(signal.SIGALRM, alarm), signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return call(*arguments, **options)
    except TimeoutException:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *ticking)


def tah(text: str, mode: str) -> list[Any] | None:
    """What TaH's graders take from the whole output, thinking included: sympy objects and the matched text, or None.

    Args:
        mode: `expr` and `latex` look for LaTeX (boxes first, no bare expressions), then for a plain number; `string` for a letter.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if mode == "string":
        return within_limit(parse, text, [StringExtractionConfig()], parsing_timeout=None) or None
    cleaning = NormalizationConfig(nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True)
    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=cleaning)
    return within_limit(parse, text, [latex, ExprExtractionConfig()], extraction_mode="first_match", parsing_timeout=None) or None


def tah_gold(text: str, mode: str) -> list[Any]:
    """The gold answer as the grader of `mode` parses it."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse

    kinds = {"expr": ExprExtractionConfig, "latex": LatexExtractionConfig, "string": StringExtractionConfig}
    if mode == "latex" and not text.startswith("$"):
        text = f"${text}$"
    return within_limit(parse, text, [kinds[mode]()], parsing_timeout=None) or []


def tah_same(answer: list[Any], gold: list[Any]) -> bool:
    """math-verify's verdict."""
    from math_verify import verify

    return bool(within_limit(verify, gold, answer, timeout_seconds=None))


# -- LTA-Thinker's MATH rule (lta.md 2.12): last box, Minerva clean-up, plain text --

_BOX = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
_FIRST = [("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("\\left", ""), ("\\right", ""), ("mbox", "text")]
_AND = [(",\\text{and}", ","), ("\\text{and}", ",")]
_UNITS = re.compile(
    "square|ways|integers|dollars|mph|inches|ft|hours|km|units|points|feet|minutes|digits|cents|degrees|cm|gm|pounds|meters|meals|edges"
    "|students|childrentickets|multiples"
)
_MARKS = ["\\text{s}", "\\text{.}", "\\text{}^2", "\\text{}^3", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!"]
_PLAIN = {
    "pi": "π", "theta": "θ", "alpha": "α", "beta": "β", "gamma": "γ", "lambda": "λ", "phi": "ϕ", "omega": "ω", "infty": "∞", "cup": "∪",
    "cap": "∩", "pm": "±", "mp": "∓", "cdot": "·", "times": "×", "div": "÷", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠",
    "neq": "≠", "in": "∈", "emptyset": "∅", "to": "→", "circ": "∘", "angle": "∠", "sin": "sin", "cos": "cos", "tan": "tan", "log": "log",
    "ln": "ln", "left": "", "right": "",
}  # fmt: skip


def lta_math(text: str) -> str | None:
    """The content of the last box, cleaned; without a box the last number as it stands."""
    boxes = _BOX.findall(text)
    if boxes:
        return _cleaned(boxes[-1])
    found = re.findall(r"-?\d+(?:\.\d+)?", text)
    return found[-1] if found else None


def lta_math_gold(text: str) -> str:
    """The text after `#### `, cleaned the same way."""
    return _cleaned(text.rpartition("####")[2].strip())


def _cleaned(answer: str) -> str:
    for old, new in (*_FIRST, *_AND):
        answer = answer.replace(old, new)
    answer = _UNITS.sub("", answer)
    for old in (*_MARKS, "{,}", '"'):
        answer = answer.replace(old, "")
    answer = re.sub(r"\\(?:text|textbf|overline|boxed)\{(.*?)\}", r"\1", answer).replace("$", "")
    answer = re.sub(r"(frac)([^{])(.)", r"\1{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{\[])", r"\1{\2}", answer)
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return re.sub(r"\s", "", _as_text(answer))


def _as_text(latex: str) -> str:
    """LaTeX as plain text: a/b for fractions, √(x) for roots, symbols for the common commands, no braces."""
    group = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
    while (text := re.sub(rf"\\[dt]?frac\s*{group}\s*{group}", r"{\1}/{\2}", re.sub(rf"\\sqrt\s*{group}", r"√({\1})", latex))) != latex:
        latex = text
    latex = re.sub(r"\\([{}%&_#])", lambda m: {"{": "\0", "}": "\1"}.get(m[1], m[1]), latex)
    latex = re.sub(r"\\([A-Za-z]+)", lambda m: _PLAIN.get(m[1], ""), latex)
    return re.sub(r"[{}]|\\[,;:! ]", "", latex).replace("\0", "{").replace("\1", "}")


# -- HRPO's MATH rule (dtt.md 2.9): box, else LaTeX, else the last number; then the clean-up of the MATH data set's own grader --

_UNIT = re.compile(r"\\text\{ .*", re.DOTALL)
_PLAINER = [
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
]
_PLAINER += [("^\\circ", ""), ("\\$", ""), ("\\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0.")]


def hrpo_math(text: str) -> str | None:
    """The answer of a response (what follows its last `####`), cleaned; None where nothing is found."""
    boxes, latex = _BOX.findall(text), re.findall(r"\$([^$]+)\$", text)
    found = (boxes or latex or re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?", text))[-1:]
    return hendrycks(found[0]) if found else None


def hendrycks(answer: str) -> str:
    """The usual clean-up of MATH answers: no spaces, units, degrees or "x =" in front; fractions with braces."""
    for old, new in _PLAINER:
        answer = answer.replace(old, new)
    answer = re.sub(r"^\.", "0.", _UNIT.sub("", answer).strip())
    name, equals, rest = answer.partition("=")
    answer = rest if equals and len(name.strip()) <= 2 and "=" not in rest else answer
    answer = re.sub(r"\\sqrt(?=[^{])(.)", r"\\sqrt{\1}", answer).replace(" ", "")
    answer = re.sub(r"\\frac(\w)(?:(\w)|(?=\{))", lambda m: f"\\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), answer)
    answer = "\\frac{1}{2}" if answer == "0.5" else answer
    return re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", answer)
