"""Tokens as a figure for a paper: what `view.tokens` shows, in vectors and at a column's width."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from lab.figures.style import INK, SOFT, figure
from lab.view import palette
from lab.view.base import columns, number, plain
from lab.view.channels import Channel, channel, names
from lab.view.tokens import NAMES, spans_of

GLYPH = 0.602  # ems that a character of the monospaced font is wide
FONTS = ["DejaVu Sans Mono", "DejaVu Sans"]
LINE, GAP, MARGIN = 2.5, 0.7, 5.6  # ems: a line of tokens with its numbers, between samples, for the names of spans


@figure("question", "sample", "role", "text")
def token_strip(ax: Axes, table: pd.DataFrame, channel: str = "", limit: int = 3) -> None:
    """Tokens of `limit` samples filled by `channel` ("" = the first that varies), the number beneath, spans named at the left.

    table: question, sample, role, text and the channel, as `view.tokens(trace).table()` has them. Scripts that DejaVu lacks (CJK) are in
    the SVG, where the viewer's fonts draw them.
    """
    there = names(table)
    scale = _scale(table, channel or next((name for name in there if table[name].nunique() > 1), "") or next(iter(there), ""))
    em = ax.xaxis.label.get_fontsize() / 72
    ax.figure.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set_axis_off()
    wide, y = ax.figure.get_figwidth() / em, 0.4
    for _, sample in list(table.groupby(["question", "sample"], sort=False))[:limit]:
        for line in _lines(sample.to_dict("records"), scale, wide - MARGIN):
            _draw(ax, line, y, scale)
            y += LINE
        y += GAP
    _key(ax, scale, sorted(value for value in table[scale.name].dropna().unique() if value >= 2) if scale.discrete else None, y)
    ax.figure.set_figheight((y + 1.6) * em)
    ax.set(xlim=(0, wide), ylim=(y + 1.6, 0))


def _scale(table: pd.DataFrame, name: str) -> Channel:
    return channel(table, name) if name else Channel("")


def _lines(rows: list[dict[str, Any]], scale: Channel, room: float) -> Iterator[tuple[str, list[tuple[float, float, str, float]]]]:
    """(name of the span or "", [(left, width, text, value)]) a line, in ems; a span begins a line of its own."""
    rows = [row | {"role": _told(row["role"])} for row in rows]
    for (_, role), span in groupby(zip(spans_of(rows), rows, strict=True), lambda pair: pair[0]):
        name, line, x = NAMES.get(role, role), [], 0.0
        for _, row in span:
            text, value = _shown(row, int(room / GLYPH) - 1), float(row.get(scale.name, float("nan")))
            width = max(columns(text) * GLYPH + 0.3, len(scale.short(value)) * 0.5, 1.1)
            if line and x + width > room:
                yield name, line
                name, line, x = "", [], 0.0
            line.append((x, width, text, value))
            x += width + 0.12
        yield name, line


def _shown(row: dict[str, Any], longest: int) -> str:
    text = plain(_told(row["text"])).replace("\n", "↵") or ("◆" if row["role"] == "thought" else "∅")
    return text if columns(text) <= longest else text[: longest // 2] + "…"


def _told(value: Any) -> str:
    """The text of a cell that may come from a CSV file."""
    return "" if pd.isna(value) else str(value)


def _draw(ax: Axes, line: tuple[str, list[tuple[float, float, str, float]]], y: float, scale: Channel) -> None:
    name, tokens = line
    size = ax.xaxis.label.get_fontsize()
    ax.text(MARGIN - 0.6, y + 1.05, name, ha="right", color=SOFT, fontsize=0.85 * size)
    for left, width, text, value in tokens:
        ax.add_patch(Rectangle((MARGIN + left, y), width, 1.45, facecolor=_fill(scale, value), edgecolor="none"))
        written = {"ha": "center", "family": FONTS, "parse_math": False}
        ax.text(MARGIN + left + width / 2, y + 1.05, text, color=INK, fontsize=size, **written)
        ax.text(MARGIN + left + width / 2, y + 2.1, scale.short(value), color=SOFT, fontsize=0.7 * size, **written)


def _key(ax: Axes, scale: Channel, counts: list[float] | None, y: float) -> None:
    """What the fill means: swatches of the counts there are, or of a range's ends and middle."""
    if not scale.name:
        return
    x = ax.text(MARGIN, y + 0.9, scale.label, color=SOFT, fontsize=0.85 * ax.xaxis.label.get_fontsize())
    left = MARGIN + 0.48 * len(scale.label) + 0.8
    for value in counts if counts is not None else (scale.low, (scale.low + scale.high) / 2, scale.high):
        ax.add_patch(Rectangle((left, y + 0.15), 1.1, 0.9, facecolor=_fill(scale, value), edgecolor=SOFT, linewidth=0.4))
        ax.text(left + 1.3, y + 0.9, number(value), color=SOFT, fontsize=x.get_fontsize())
        left += 2.2 + 0.5 * len(number(value))


def _fill(scale: Channel, value: float) -> str:
    return palette.mix(palette.HUES[scale.hue(value)], scale.strength(value) * palette.STRENGTH["light"], "#ffffff")
