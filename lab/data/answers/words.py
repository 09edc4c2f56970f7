"""Yes/no and True/False answers (ANSWERS rule 8): whole words only; true = yes, false = no; in ProntoQA A = True, B = False."""

import re

from lab.data.answers import letters
from lab.data.answers import text as texts

_WORD = re.compile(r"(?<![\w-])(?<!\w['’])(yes|no|true|false)(?!\w|['’-]\w)", re.IGNORECASE)
_MEANS = {"yes": True, "true": True, "a": True, "no": False, "false": False, "b": False}


def lenient(text: str, lettered: bool = False) -> bool | None:
    """True for yes or true, False for no or false; with `lettered` also the options A and B."""
    found = texts.read(text, lambda marker: _after(marker.content, lettered), lambda whole: _anywhere(whole, lettered))
    return None if found is None else _MEANS[found.lower()]


def _words(text: str) -> list[str]:
    return _WORD.findall(re.sub(r"_", " ", letters.plain(text)))


def _after(content: str, lettered: bool) -> str | None:
    """The first such word behind a marker, else an option letter."""
    words = _words(content)
    return words[0] if words else letters._after(content, "AB") if lettered else None


def _anywhere(text: str, lettered: bool) -> str | None:
    """The last such word of an output, else an option letter."""
    words = _words(text)
    return words[-1] if words else letters._anywhere(text, "AB") if lettered else None


def value(word: str) -> bool | None:
    """What a gold answer says: yes, no, True, False, A or B in any case, with or without a final period."""
    return _MEANS.get(word.strip().rstrip(".").lower())
