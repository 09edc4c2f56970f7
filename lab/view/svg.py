"""Small line drawings that follow the theme, as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.view.base import escape, number

WIDTH, HEIGHT, LEFT, BOTTOM, POINTS = 360, 168, 52, 22, 400
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # tell lines apart where colours do not


@dataclass(frozen=True)
class Line:
    """One line of a drawing: its name, hue, points, and whether it is drawn faint (a discarded stretch)."""

    name: str
    hue: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False


def chart(title: str, lines: Sequence[Line]) -> str:
    """A `<figure>` with the lines on common axes and the last value of each in words; non-finite points leave a gap and are counted."""
    x, y = (np.concatenate([np.asarray(getattr(line, axis), float) for line in lines] or [np.zeros(0)]) for axis in "xy")
    finite = y[np.isfinite(y)]
    if not finite.size:
        return f'<figure class="chart"><figcaption>{escape(title)}: no finite value yet</figcaption></figure>'
    span, rise = _range(x), _range(finite)
    clear = [line for line in lines if not line.faint]
    dashes = {id(line): DASHES[place % len(DASHES)] for place, line in enumerate(clear)}
    order = sorted(lines, key=lambda line: not line.faint)
    drawn = "".join(_path(line, span, rise, dashes.get(id(line), "")) for line in order)
    lost = f" · {y.size - finite.size} not finite" if y.size > finite.size else ""
    words = ", ".join(f"{line.name} {number(_last(line))}".strip() for line in clear) + lost
    keys = " ".join(_key(line, dashes[id(line)], len(clear) > 1) for line in clear) + escape(lost)
    described = escape(f"{title}, last values: {words}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{_axes(span, rise)}{drawn}</svg>'
    return f'<figure class="chart"><figcaption><b>{escape(title)}</b> {keys}</figcaption>{drawing}</figure>'


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of `values` in `width` block characters; "×" where a value is not finite."""
    picked = [values[round(place)] for place in np.linspace(0, len(values) - 1, min(width, len(values)))] if len(values) else []
    finite = [value for value in picked if np.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / ((high - low) or 1))] if np.isfinite(value) else "×" for value in picked)


def _key(line: Line, dash: str, sample: bool) -> str:
    """A line's name with its last value, behind a piece of the line where there are several."""
    piece = f'<svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4 H26" {_stroke(line, dash)}/></svg>' if sample else ""
    return f'<span class="key">{piece}{escape(f"{line.name} {number(_last(line))}".strip())}</span>'


def _stroke(line: Line, dash: str) -> str:
    if line.faint:
        return 'class="faint"'
    dashed = f";stroke-dasharray:{dash}" if dash else ""
    return f'style="stroke:color-mix(in srgb,var(--{line.hue}) 78%,var(--ink)){dashed}"'


def _last(line: Line) -> float:
    finite = [value for value in line.y if np.isfinite(value)]
    return finite[-1] if finite else float("nan")


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = abs(low) / 2 or 0.5
    return (low, high) if high > low else (low - margin, low + margin)


def _tick(value: float) -> str:
    return f"{value:.0e}" if value and not 1e-2 <= abs(value) < 1e5 else number(value)


def _path(line: Line, span: tuple[float, float], rise: tuple[float, float], dash: str) -> str:
    keep = np.unique(np.linspace(0, len(line.x) - 1, min(POINTS, len(line.x))).astype(int)) if len(line.x) else []
    steps, started = [], False
    for place in keep:
        value = float(line.y[place])
        if np.isfinite(value):
            steps.append(f"{'L' if started else 'M'}{_across(line.x[place], span):.1f} {_up(value, rise):.1f}")
        started = bool(np.isfinite(value))
    style = _stroke(line, dash)
    return f'<path d="{" ".join(steps)}" {style}/>' if len(steps) > 1 else "".join(_dot(step, style) for step in steps)


def _dot(step: str, style: str) -> str:
    across, up = step[1:].split()
    return f'<circle cx="{across}" cy="{up}" r="2.5" {style}/>'


def _across(value: float, span: tuple[float, float]) -> float:
    return LEFT + (WIDTH - LEFT - 8) * (value - span[0]) / (span[1] - span[0])


def _up(value: float, rise: tuple[float, float]) -> float:
    return 8 + (HEIGHT - BOTTOM - 14) * (1 - (value - rise[0]) / (rise[1] - rise[0]))


def _axes(span: tuple[float, float], rise: tuple[float, float]) -> str:
    levels = [rise[0], sum(rise) / 2, rise[1]]
    sides = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{_up(level, rise):.1f}" y2="{_up(level, rise):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{_up(level, rise) + 4:.1f}" text-anchor="end">{_tick(level)}</text>'
        for level in levels
    )
    right = f'<text x="{WIDTH - 8}" y="{HEIGHT - 4}" text-anchor="end">{_tick(span[1])}</text>'
    return f'<g>{sides}<text x="{LEFT}" y="{HEIGHT - 4}">{_tick(span[0])}</text>{right}</g>'
