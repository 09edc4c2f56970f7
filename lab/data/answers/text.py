"""The text that counts, and the explicit markers in it: what all lenient rules start from."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_SPECIAL = re.compile(r"<\|[^<>|]*\|>|</?s>|<(?:pad|bos|eos|end_of_turn)>")
_NEXT_QUESTION = re.compile(r"\n[^\S\n]*(?:Question|Q):")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?:\{|(?P<bare>[^\s$]+))")
_HASHES = re.compile(r"#+")
_PHRASE = re.compile(
    r"\bthe\s+(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\s+is\b[*_]*:?|(?<![^\W_])answer[*_\s]*[:：]", re.IGNORECASE
)
_REACH = 2000  # characters behind a marker that are looked at: keeps outputs that repeat a marker for ever cheap
_HEADING = re.compile(
    r"[\s*_]*(?:(?:step|part|case|section|stage|phase|problem|question|example|solution|method|approach|explanation)\b"
    r"|(?:the\s+)?(?:final\s+)?(?:answer|result|conclusion|summary)[\s*_:]*$)",
    re.IGNORECASE,
)


class Marker(NamedTuple):
    """An explicit marker: where it begins, its kind (`box`, `####`, `###`, `is`, `answer`), what is in the box or on the rest of
    the line, and all the text behind it."""

    start: int
    kind: str
    content: str
    behind: str = ""


def cut(text: str) -> str:
    """The part of an output that counts: no special tokens, only what follows the last `</think>`, nothing from a next question on."""
    text = _SPECIAL.sub(" ", text).rpartition("</think>")[2]
    following = _NEXT_QUESTION.search(text)
    return text[: following.start()] if following else text


def markers(text: str) -> list[Marker]:
    """All explicit markers with content, the one that begins last first; headings (`### Step 2`) are none."""
    found = [marker for marker in (*_boxes(text), *_hashes(text), *_phrases(text)) if re.search(r"[^\W_]", marker.content)]
    return sorted(found, key=lambda marker: -marker.start)


def read(text: str, after: Callable[[Marker], str | None], anywhere: Callable[[str], str | None]) -> str | None:
    """The answer in `text`: of the last marker from which `after` reads one; by `anywhere` where there is no marker at all."""
    text = cut(text)
    marked = [marker for marker in markers(text) if marker.kind != "###" or after(marker) is not None]
    if not marked:
        return anywhere(text)
    return next((answer for marker in marked if (answer := after(marker)) is not None), None)


def _line(text: str, begin: int) -> str:
    return text[begin : begin + _REACH].partition("\n")[0]


def _boxes(text: str) -> Iterator[Marker]:
    for match in _BOX.finditer(text):
        content = match["bare"] if match["bare"] else _balanced(text, match.end())
        if content is not None:
            yield Marker(match.start(), "box", content.strip())


def _balanced(text: str, begin: int) -> str | None:
    """From just behind an opening brace to its closing one, or to the end of the text where it stays open."""
    depth, at = 1, begin
    text = text[: begin + _REACH]
    while at < len(text):
        if text[at] == "\\":
            at += 1
        else:
            depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at]
        at += 1
    return text[begin:]


def _hashes(text: str) -> Iterator[Marker]:
    for match in _HASHES.finditer(text):
        rest = _line(text, match.end())
        if len(match[0]) >= 3 and not _HEADING.match(rest):
            yield Marker(match.start(), "###" if len(match[0]) == 3 else "####", rest)


def _phrases(text: str) -> Iterator[Marker]:
    for match in _PHRASE.finditer(text):
        kind = "is" if match[0].lower().startswith("the") else "answer"
        yield Marker(match.start(), kind, _line(text, match.end()), text[match.end() : match.end() + _REACH])
