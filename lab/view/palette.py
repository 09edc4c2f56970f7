"""The colours of every view and figure: Okabe and Ito's colour-blind-safe set, light and dark, and how they are mixed.

Hues never stand alone: views print the number beside the colour, figures add a marker. Text keeps the theme's ink on every fill:
fills are hues mixed into the background by at most `STRENGTH`, which leaves a contrast of at least 4.5 (WCAG AA; tested).
"""

from collections.abc import Iterable
from itertools import count
from typing import Any

HUES = {
    "green": "#009E73",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "sky": "#56B4E9",
    "orange": "#E69F00",
    "grey": "#8A8F98",
}
THEMES = {
    "light": {"bg": "#ffffff", "ink": "#1b1f24", "soft": "#57606a", "line": "#d5dae1", "panel": "#f5f7f9", "focus": "#0b57d0"},
    "dark": {"bg": "#0f1318", "ink": "#eceff4", "soft": "#a3adb9", "line": "#343c47", "panel": "#191f27", "focus": "#8ab4f8"},
}
STRENGTH = {"light": 0.55, "dark": 0.44}

PASS_HUES = ("green", "blue", "vermillion", "purple", "yellow", "sky")
PASS_ANSI = (32, 34, 31, 35, 33, 36)
CHANNEL_HUES = {"decider_prob": "purple", "gate": "green", "prob": "blue", "entropy": "orange", "ce": "vermillion", "score": "sky"}
SERIES = ("blue", "vermillion", "green", "orange", "purple", "sky", "grey", "ink")  # yellow lines cannot be seen on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
METHODS = ("tah", "dtt", "coconut", "codi", "adaptive", "colar", "softcot", "lta", "latenttts")
TITLES = dict(
    tah="TaH", dtt="DTT", coconut="COCONUT", codi="CODI", adaptive="Adaptive", colar="CoLaR", softcot="SoftCoT", lta="LTA-Thinker"
)
TITLES |= {"latenttts": "LatentTTS", "best_of_n": "best of N", "sft": "SFT", "cot": "CoT", "no_cot": "no-CoT"}


def pass_hue(count: float) -> str:
    """Hue name for a token read in `count` >= 2 passes: 2 green, 3 blue, 4 red, 5 magenta, 6 yellow, more cyan (TaH's playground)."""
    return PASS_HUES[min(int(count), 7) - 2]


def pass_ansi(count: float) -> int | None:
    """Terminal colour code of a pass count; None (default colour) for one pass."""
    return None if count < 2 else PASS_ANSI[min(int(count), 7) - 2]


def series(index: int) -> tuple[str, str]:
    """(colour, marker) of the `index`-th line of a figure; the pair differs for the first 72."""
    return (HUES | THEMES["light"])[SERIES[index % len(SERIES)]], MARKERS[index % len(MARKERS)]


def looks(names: Iterable[Any]) -> dict[Any, tuple[str, str]]:
    """(colour, marker) per name: a method's own, the same in every figure; the others take, in order, the places no method here has."""
    names = list(dict.fromkeys(names))
    taken = {METHODS.index(name) for name in names if name in METHODS}
    free = (place for place in count() if place not in taken)
    return {name: series(METHODS.index(name) if name in METHODS else next(free)) for name in names}


def mix(hue: str, share: float, background: str) -> str:
    """Hex colour of `share` of `hue` over `background`, as CSS color-mix in sRGB makes it."""
    pairs = zip(_channels(hue), _channels(background), strict=True)
    return "#" + "".join(f"{round(top * share + under * (1 - share)):02x}" for top, under in pairs)


def contrast(one: str, two: str) -> float:
    """WCAG contrast ratio (1 to 21) of two hex colours."""
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def css_variables(theme: str) -> str:
    """The theme as CSS custom properties: `--bg`, `--ink`, …, `--strength`, and one `--<hue>` each."""
    values = THEMES[theme] | HUES | {"strength": f"{STRENGTH[theme]:.0%}"}
    return "".join(f"--{name}:{value};" for name, value in values.items()) + f"color-scheme:{theme};"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (value / 255 for value in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
