"""The numbers a token can be coloured by: their names, ranges, and what happens at the edges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lab.errors import unknown
from lab.trace import KEYS, SCHEMA, Trace
from lab.view import palette
from lab.view.base import number

ORDER = ("iterations", "gate", "decider_prob", "prob", "entropy", "ce", "score")
LABELS = {
    "iterations": "passes",
    "decider_prob": "continue probability",
    "prob": "probability",
    "ce": "cross-entropy",
}
_NOT_CHANNELS = {*KEYS["tokens"], "id"}


@dataclass(frozen=True)
class Channel:
    """A token channel and its colour scale: `discrete` counts have a hue each, the others one hue from `low` to `high`."""

    name: str
    low: float = 0.0
    high: float = 1.0
    discrete: bool = False

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name.replace("_", " "))

    def hue(self, value: float) -> str:
        """Name of the hue that `value` is drawn in."""
        if self.discrete:
            return palette.pass_hue(value) if value >= 2 else "grey"
        return palette.CHANNEL_HUES.get(self.name, "sky")

    def strength(self, value: float) -> float:
        """How much of the hue, 0 to 1; 0 for undefined values."""
        if value != value:
            return 0.0
        if self.discrete:
            return float(value >= 2)
        return float(np.clip((value - self.low) / ((self.high - self.low) or 1.0), 0, 1))

    def clipped(self, value: float) -> str:
        """ "▲" above the scale, "▼" below it, else "" (counts and undefined values are never clipped)."""
        return "" if self.discrete or value != value else "▲" * (value > self.high) + "▼" * (value < self.low)

    def short(self, value: float) -> str:
        """The number printed under a token; a clipped value carries its sign."""
        if value != value:
            return "–"
        if self.discrete:
            return f"{value:.0f}" if value >= 2 else ""
        decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return self.clipped(value) + f"{value:.{decimals}f}"

    def long(self, value: float) -> str:
        """`label value` with four digits, and a word where the value is clipped or undefined."""
        if value != value:
            return f"{self.label} undefined"
        edge = {"▲": f" (above the scale's {number(self.high)})", "▼": f" (below the scale's {number(self.low)})"}
        return f"{self.label} {number(value, 4)}{edge.get(self.clipped(value), '')}"


def names(tokens: pd.DataFrame) -> list[str]:
    """The channels with at least one value in `tokens`, usual ones first."""
    floats = [name for name in tokens if tokens[name].dtype.kind == "f" and name not in _NOT_CHANNELS and tokens[name].notna().any()]
    return [name for name in ORDER if name in floats] + [name for name in floats if name not in ORDER]


def channel(tokens: pd.DataFrame, name: str, clip: tuple[float, float] | None = None) -> Channel:
    """The scale of `name` over `tokens`: 0 to 1 for what stays there, else to the maximum, or the 99th percentile if outliers dwarf it."""
    if name == "iterations":
        return Channel(name, discrete=True)
    if clip:
        return Channel(name, *clip)
    values = tokens[name].to_numpy(float)
    values = values[np.isfinite(values)]
    if not values.size or (values.min() >= 0 and values.max() <= 1 and name not in ("entropy", "ce")):
        return Channel(name)
    top, usual = float(values.max()), float(np.quantile(values, 0.99))
    return Channel(name, min(0.0, float(values.min())), usual if top > 1.5 * usual > 0 else top)


def channels(trace: Trace, wanted: str, only: Sequence[str] | None, clip: tuple[float, float] | None) -> tuple[Channel, list[Channel]]:
    """(the one to show first, all to switch between); raises SettingsError for a name the trace has no values of."""
    there = names(trace.tokens)
    for name in [wanted, *(only or [])]:
        if name and name not in there:
            known = there or [column for column in SCHEMA["tokens"] if column in ORDER]
            raise unknown("channel with values in this trace", name, known)
    made = {name: channel(trace.tokens, name, clip if name == wanted else None) for name in (only or there)}
    first = wanted or next((name for name in made if trace.tokens[name].nunique() > 1), next(iter(made), ""))
    if first and first not in made:
        made = {first: channel(trace.tokens, first, clip)} | made
    return made.get(first, Channel(first)), list(made.values())
