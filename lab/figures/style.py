"""One look for every figure: sizes of the printed column and of a slide, light background, nothing global."""

import csv
import io
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

from lab.errors import DataError, unknown
from lab.view import palette

SIZES = {"column": (3.35, 2.45), "wide": (6.9, 2.9), "slide": (10.0, 5.6)}  # inches
FONT = {"column": 8.0, "wide": 8.0, "slide": 15.0}
MOST_INSIDE = 3  # entries of a legend that find room in the axes
INK, SOFT, LINE = (palette.THEMES["light"][name] for name in ("ink", "soft", "line"))
GREY = palette.HUES["grey"]


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot; `source` says how to draw it again from `table`."""

    source: dict[str, Any] | None = None
    table: pd.DataFrame | None = None

    def _repr_png_(self) -> bytes:
        with mpl.rc_context(rules("column")):
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()


def rules(size: str) -> dict[str, Any]:
    """Matplotlib's parameters for a size; used inside a context only."""
    font, scale = FONT[size], FONT[size] / 7.5
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": font,
        "axes.titlesize": font,
        "axes.labelsize": font,
        "xtick.labelsize": font * 0.92,
        "ytick.labelsize": font * 0.92,
        "legend.fontsize": font * 0.92,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.linewidth": 0.7 * scale,
        "xtick.major.width": 0.7 * scale,
        "ytick.major.width": 0.7 * scale,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.5 * scale,
        "lines.linewidth": 1.4 * scale,
        "lines.markersize": 4.0 * scale,
        "errorbar.capsize": 0.0,
        "patch.linewidth": 1.2 * scale,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.fonttype": "none",
        "svg.hashsalt": "lab",
        "pdf.fonttype": 42,
        "figure.constrained_layout.use": True,
    }


def figure(*needed: str) -> Callable[[Callable[..., None]], Callable[..., Picture]]:
    """Turns draw(ax, table, **options) into name(table, size="column", **options) -> Picture in the house style.

    The columns `needed` are checked first: DataError names the missing ones, or an empty table.
    """

    def decorate(draw: Callable[..., None]) -> Callable[..., Picture]:
        @wraps(draw)
        def drawn(table: pd.DataFrame, size: str = "column", **options: Any) -> Picture:
            if size not in SIZES:
                raise unknown("figure size", size, SIZES)
            check(draw.__name__, table, needed)
            with mpl.rc_context(rules(size)):
                picture = Picture(figsize=SIZES[size])
                FigureCanvasAgg(picture)
                draw(picture.add_subplot(), _plain(table), **options)
            if not any(isinstance(value, pd.DataFrame) for value in options.values()):
                picture.source, picture.table = {"figure": draw.__name__, "options": options}, table
            return picture

        return drawn

    return decorate


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with rows numbered and its measures as floats; None, as a single run leaves it for an interval, becomes NaN."""
    measured = [column for column in ("mean", "low", "high", "value", "share", "reported", "threshold", "passes") if column in table]
    return table.reset_index(drop=True).astype(dict.fromkeys(measured, float))


def check(name: str, table: pd.DataFrame, needed: tuple[str, ...]) -> None:
    """Raises DataError unless `table` has rows and the columns `needed`."""
    missing = [column for column in needed if column not in table]
    if missing:
        raise DataError(
            f"figure {name} needs the columns {', '.join(missing)}; the table has {', '.join(map(str, table.columns)) or 'none'}."
        )
    if table.empty:
        raise DataError(f"figure {name} was given an empty table: there is nothing to draw.")


def save(fig: Figure, table: pd.DataFrame, folder: str | Path, name: str) -> list[Path]:
    """Writes <name>.pdf, .svg, .png and the numbers drawn as <name>.csv into `folder`; returns the paths. Same input, same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dates = {"pdf": {"CreationDate": None, "ModDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    with mpl.rc_context(rules("column")):
        for kind, metadata in dates.items():
            fig.savefig(folder / f"{name}.{kind}", dpi=220, metadata=metadata)
    table.to_csv(folder / f"{name}.csv", index=False, quoting=csv.QUOTE_MINIMAL)
    return [folder / f"{name}.{kind}" for kind in (*dates, "csv")]


def label(name: Any) -> str:
    """How a method or measure is written in a figure; dollar signs and hidden characters are harmless."""
    return palette.TITLES.get(name, str(name).replace("_", " ")).replace("$", r"\$")


def spread(ax: Axes, part: pd.DataFrame, x: str, colour: str, marker: str, name: str, band: bool = False, dash: str = "-") -> None:
    """The `mean` of a series over `x` with its interval (columns low, high where present) as a band or as bars."""
    part = part.sort_values(x)
    ax.plot(part[x], part["mean"], color=colour, marker=None if band and len(part) > 1 else marker, linestyle=dash, label=name, zorder=3)
    if not {"low", "high"} <= set(part.columns):
        return
    if band:
        ax.fill_between(part[x], part["low"], part["high"], color=colour, alpha=0.18, linewidth=0)
        return
    bars(ax, part[x], part, colour)


def bars(ax: Axes, x: Any, part: pd.DataFrame, colour: str, sideways: bool = False) -> None:
    """Error bars from columns low and high around mean; none where they are undefined."""
    reach = np.abs(np.vstack([part["mean"] - part["low"], part["high"] - part["mean"]]).astype(float))
    place = {"x": part["mean"], "y": x, "xerr": reach} if sideways else {"x": x, "y": part["mean"], "yerr": reach}
    ax.errorbar(**place, fmt="none", ecolor=colour, zorder=2)


def percent(ax: Axes, axis: str = "y") -> None:
    """Shows shares as percentages."""
    getattr(ax, f"{axis}axis").set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def legend(ax: Axes, **options: Any) -> None:
    """A legend where there is more than one entry; below the axes, of a figure so much taller, where there are too many to stand inside."""
    handles, names = ax.get_legend_handles_labels()
    if len(names) > MOST_INSIDE:
        below(ax, handles, names)
    elif len(names) > 1:
        ax.legend(**options)


def below(ax: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend under the axes in as many columns as fit; the figure grows by its lines."""
    picture, size = ax.figure, mpl.rcParams["legend.fontsize"]
    longest = max(TextPath((0, 0), name, size=size).get_extents().width for name in names)
    lines = -(-len(names) // max(1, int((72 * picture.get_figwidth() - size) / (longest + 3.7 * size))))
    picture.legend(handles, names, loc="outside lower center", ncols=-(-len(names) // lines), columnspacing=1.2)
    picture.set_figheight(picture.get_figheight() + 1.6 * size * lines / 72)
