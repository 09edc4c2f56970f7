"""Option letters (ANSWERS rule 7): parentheses, points, \\text, markdown and case are dropped; articles and words are no letters."""

import re

from lab.data.answers import text as texts

_TEXT = re.compile(r"\\(?:text|textbf|textrm|textsf|textit|mathrm|mathbf|mathsf|mbox|bf|rm)\s*\{([^{}]*)\}")
_NAMED = r"(?:(?i:option|choice|letter|answer)\b[\s:*_]*(?:is\b[\s:*_]*)?)*"
_LEAD = rf"[\s:$*_`\"'“”‘’.\[{{]*(?:(?:an?|(?i:the|correct|right|final|best))\s+)*{_NAMED}"
_FIRST = re.compile(rf"{_LEAD}\(?\s*(?P<letter>[A-Za-z])(?![A-Za-z0-9]|['’][A-Za-z])(?P<rest>.*)", re.DOTALL)
_BRACKETED = re.compile(r"(?<![A-Za-z0-9])\(\s*([A-Za-z])\s*\)")
_AFTER_LETTER = re.compile(r"\s+(?:because|since|as|and|or|is|was|for|with|which|that|due|by|not|but|so|if|from|via)\b", re.IGNORECASE)


def plain(text: str) -> str:
    """`text` without \\text{} and its like, markdown marks and quotes."""
    while (shorter := _TEXT.sub(r"\1", text)) != text:
        text = shorter
    return re.sub(r"[*`]|\\[,;!]|\\ ", "", text)


def lenient(text: str, letters: str) -> str | None:
    """The option letter (upper case, one of `letters`) that a reader takes from an output, or None."""
    return texts.read(text, lambda marker: _after(marker.content, letters), lambda whole: _anywhere(whole, letters))


def _after(content: str, letters: str) -> str | None:
    """The letter a marker's content begins with, else the first one in parentheses."""
    content = plain(content)
    found = _FIRST.match(content)
    if found and found["letter"].upper() in letters and _stands_alone(found["letter"], found["rest"]):
        return found["letter"].upper()
    return next((letter.upper() for letter in _BRACKETED.findall(content) if letter.upper() in letters), None)


def _stands_alone(letter: str, rest: str) -> bool:
    """Whether a letter followed by `rest` is an option and neither an article, a pronoun, a variable nor a part of a word."""
    if re.match(r"[-+=^_/\\]\w|\s*[=+^<>]|\s*-\s*\d", rest):
        return False
    if re.match(r"\s+[A-Za-z0-9]", rest) and letter.upper() in "AI":
        return bool(_AFTER_LETTER.match(rest))
    return True


def _anywhere(text: str, letters: str) -> str | None:
    """A letter that is the whole output, else the last one in parentheses."""
    text = plain(text)
    whole = re.fullmatch(r"[\s$\"'“”_]*(?:option\s+|choice\s+)?[(\[]?\s*([A-Za-z])\s*[)\].:]*[\s$\"'“”_]*", text, re.IGNORECASE)
    found = [whole[1]] if whole else _BRACKETED.findall(text)
    return next((letter.upper() for letter in reversed(found) if letter.upper() in letters), None)


def equal(answer: str | None, gold: str, letters: str) -> bool:
    """Whether both name the same option."""
    return answer is not None and _anywhere(answer, letters) is not None and _anywhere(answer, letters) == _anywhere(gold, letters)
