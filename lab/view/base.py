"""What every view is: a picture of recorded data, as HTML, as terminal text and as a table, with no model and no network."""

import html
import os
import sys
import unicodedata
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from lab.errors import unknown
from lab.view import palette

_STANDING_IN = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_HARMLESS_FORMATS = "\u200c\u200d"


class View:
    """A picture of data. Subclasses give `title`, `body()` (escaped HTML), `text()` and `table()`; the rest follows.

    In a notebook a view shows itself; `save` writes a page that works from disk; `print` gives the terminal form.
    """

    title = "view"
    script = ""

    def body(self) -> str:
        """The picture as an HTML fragment without the frame and the style around it."""
        raise TypeError(f"{type(self).__name__} must define body().")

    def text(self, width: int = 100, color: bool = True) -> str:
        """The picture for a terminal `width` columns wide; without `color`, numbers say what colours would."""
        return self.table().to_string(index=False, line_width=width)

    def table(self) -> pd.DataFrame:
        """The numbers shown."""
        raise TypeError(f"{type(self).__name__} must define table().")

    def html(self, theme: str = "auto") -> str:
        """A self-contained HTML fragment; `theme` is auto (follows the notebook or the system), light or dark."""
        if theme not in ("auto", *palette.THEMES):
            raise unknown("theme", theme, ["auto", *palette.THEMES])
        script = f"<script>{resource(self.script)}</script>" if self.script else ""
        opening = f'<section class="lab-view" data-theme="{theme}" aria-label="{escape(self.title)}">'
        return f"<style>{_style()}</style>{opening}{self.body()}</section>{script}"

    def page(self, theme: str = "auto") -> str:
        """A whole HTML document around `html(theme)`."""
        return document(self.title, self.html(theme), theme)

    def save(self, path: str | os.PathLike[str], theme: str = "auto") -> Path:
        """The path of the page written: one file that needs no network."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.page(theme), encoding="utf-8", errors="replace")
        return path

    def __str__(self) -> str:
        return self.text(color=colour_terminal())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}


def document(title: str, content: str, theme: str = "auto") -> str:
    """A whole HTML page around `content`, whose margins follow the theme."""
    light, dark = (palette.THEMES[name]["bg"] for name in ("light", "dark"))
    margins = {"light": f"html{{background:{light}}}", "dark": f"html{{background:{dark}}}"}
    margins["auto"] = f"{margins['light']}@media (prefers-color-scheme:dark){{{margins['dark']}}}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>body{{margin:0 auto;padding:1rem;max-width:72rem}}{margins[theme]}</style></head>"
        f"<body>{content}</body></html>\n"
    )


def colour_terminal() -> bool:
    """Whether stdout is a terminal whose user has not asked for no colour (NO_COLOR)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def escape(text: Any) -> str:
    """`text` safe inside HTML content and quoted attributes; control and direction characters become visible."""
    return html.escape(plain(str(text)), quote=True)


def plain(text: str) -> str:
    """`text` with characters that a terminal or a bidi algorithm would obey replaced by visible ones; newlines stay."""
    return "".join(character if character == "\n" or not _hidden(character) else _named(character) for character in text)


def visible(text: str) -> str:
    """Escaped HTML of a token: a dot for a space, a sign for newline and tab, the code point of hidden characters."""
    return "".join(map(_visible, text)) or '<i class="cc">∅</i>'


def ansi(text: str, *codes: int) -> str:
    """`text` in the given terminal codes; unchanged without codes."""
    return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if codes else text


def columns(text: str) -> int:
    """Terminal columns of one line: wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def direction(text: str) -> str:
    """ "rtl" where more letters of `text` run right to left than left to right, else "ltr"."""
    kinds = [unicodedata.bidirectional(one) for one in text]
    return "rtl" if sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L") else "ltr"


def runs_together(texts: Sequence[str]) -> bool:
    """Whether tokens would read as one word: several, none with white space, and not in a script that is written so."""
    joined = "".join(texts)
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in joined)
    return len(texts) > 3 and not any(one.isspace() for one in joined) and 2 * wide < len(joined)


def number(value: float, digits: int = 3) -> str:
    """A number short enough to stand beside a colour: 3 significant digits, an em dash for undefined."""
    if value is None or value != value:
        return "–"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.{digits}g}"


def grid(head: list[str], rows: list[list[str]], caption: str, classes: str = "") -> str:
    """An HTML table of already escaped cells; the first column is the row's header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    title = f"<caption>{caption}</caption>" if caption else ""
    head_and_body = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{classes}">{title}{head_and_body}</table></div>'


def bar(share: float, hue: str, label: str) -> str:
    """A horizontal bar of `share` (0 to 1) with its number beside it."""
    return f'<span class="bar" style="--x:{share:.3f};--hue:var(--{hue})"><i></i><b>{escape(label)}</b></span>'


def text_bar(share: float, width: int = 20) -> str:
    """A bar of block characters, `width` columns at share 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8) if share == share else 0
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip().ljust(width)


def _visible(character: str) -> str:
    if character == " ":
        return '<i class="ws"> </i>'
    if character == "\n":
        return '<i class="nl"></i>'
    if _hidden(character) or unicodedata.category(character) == "Zs":
        return f'<i class="cc">{html.escape(_named(character))}</i>'
    return html.escape(character, quote=True)


def _hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in _HARMLESS_FORMATS


def _named(character: str) -> str:
    return _STANDING_IN.get(character) or f"U+{ord(character):04X}"


def _style() -> str:
    light, dark = palette.css_variables("light"), palette.css_variables("dark")
    automatic, ground = '.lab-view[data-theme="auto"]', "--bg:var(--jp-layout-color0)"
    return (
        f".lab-view{{{light}}}@media (prefers-color-scheme:dark){{{automatic}{{{dark}}}}}"
        f'[data-jp-theme-light="true"] {automatic}{{{light}{ground}}}[data-jp-theme-light="false"] {automatic}{{{dark}{ground}}}'
        f'.vscode-dark {automatic},.lab-view[data-theme="dark"]{{{dark}}}' + resource("view.css")
    )


def resource(name: str) -> str:
    """The text of a style or script file that lies beside the views."""
    return resources.files("lab.view").joinpath(name).read_text("utf-8")
