"""ProsQA answers (ANSWERS rule 9): "NAME is a WORD"; a and an are alike; name and word must both be right."""

import re

from lab.data.answers import text as texts

_SENTENCE = re.compile(
    r"(?<![\w-])(?<!\w['’])(?P<rule>(?:every|each|all|if|not|is|whether|no|a|an)\s+)?(?P<name>[A-Za-z]\w*)\s+is\s+an?\s+(?P<word>[A-Za-z]\w*)"
    r"(?=\s*(?:[.!;,\"'”’)}$]|$))",
    re.IGNORECASE | re.MULTILINE,
)


def lenient(text: str) -> str | None:
    """The sentence that a reader takes from an output, as "Name is a word.", or None."""
    return texts.read(
        text,
        after=lambda marker: next(iter(_sentences(marker.content)), None),
        anywhere=lambda whole: next(reversed(_sentences(whole)), None),
    )


def _sentences(text: str) -> list[str]:
    plain = re.sub(r"[*`_]|\\text\s*\{|\\(?:,|;| )", " ", text).replace("~", " ")
    found = (match for match in _SENTENCE.finditer(plain) if not match["rule"])
    return [f"{match['name'][0].upper()}{match['name'][1:].lower()} is a {match['word'].lower()}." for match in found]


def equal(answer: str | None, gold: str) -> bool:
    """Equality but for case, spaces, a/an and the final period."""
    said, wanted = (_sentences(sentence or "") for sentence in (answer, gold))
    return bool(said) and said == wanted
