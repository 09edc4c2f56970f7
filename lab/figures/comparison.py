"""Methods side by side."""

import pandas as pd
from matplotlib.axes import Axes

from lab.figures.style import INK, bars, figure, label, legend, percent
from lab.view import palette


@figure("method", "mean")
def method_comparison(ax: Axes, table: pd.DataFrame, xlabel: str = "accuracy", share: bool = True) -> None:
    """One row a method, best on top: a dot with its interval (low, high), a hollow diamond for the paper's number (`reported`).

    With a column `group` (condition, data set) each method has one dot per group; with `n`, the number of runs stands beside the name.
    """
    order = table.groupby("method")["mean"].max().sort_values().index.tolist()
    groups = list(table.groupby("group", sort=False)) if "group" in table else [("ours", table)]
    for place, (name, part) in enumerate(groups):
        height = part["method"].map(order.index) + (len(groups) - 1 - 2 * place) * 0.32 / max(len(groups), 2)
        colour, marker = palette.series(place)
        ax.plot(part["mean"], height, marker, color=colour, label=label(name), zorder=3)
        if {"low", "high"} <= set(part.columns):
            bars(ax, height, part, colour, sideways=True)
        if "reported" in part:
            ax.plot(part["reported"], height, "D", markerfacecolor="white", markeredgecolor=INK, label=None if place else "paper", zorder=2)
    counts = table.groupby("method")["n"].max() if "n" in table else {}
    ax.set_yticks(range(len(order)), [label(name) + (f" (n={counts[name]:.0f})" if name in counts else "") for name in order])
    ax.set(xlabel=xlabel, ylim=(-0.6, len(order) - 0.4))
    if share:
        percent(ax, "x")
    legend(ax)


@figure("method", "mean")
def accuracy_against_cost(ax: Axes, table: pd.DataFrame, x: str = "passes", xlabel: str = "", log: bool = False) -> None:
    """A named dot a method: accuracy with its interval (low, high) against a cost in column `x` (passes, thoughts, time)."""
    looks = palette.looks(table["method"])
    for name, part in table.groupby("method", sort=False):
        colour, marker = looks[name]
        ax.plot(part[x], part["mean"], marker, color=colour, zorder=3)
        if {"low", "high"} <= set(part.columns):
            bars(ax, part[x], part, colour)
    ax.set(xlabel=xlabel or label(x), ylabel="accuracy", ylim=(-0.03, 1.08), xscale="log" if log else "linear")
    ax.margins(x=0.18)
    percent(ax)
    ax.figure.draw_without_rendering()
    _named(ax, table.sort_values("mean", ascending=False), x)


def _named(ax: Axes, table: pd.DataFrame, x: str) -> None:
    """Puts the name of each row beside its dot: the nearest place, right or left, that covers no dot and no other name."""
    scale, size = 72 / ax.figure.dpi, ax.xaxis.label.get_fontsize()
    dots = [(px * scale, py * scale) for px, py in ax.transData.transform(table[[x, "mean"]].to_numpy(float))]
    frame = ax.get_window_extent()
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in dots]
    for (px, py), row in zip(dots, table.to_dict("records"), strict=True):
        width, name = 0.58 * size * len(label(row["method"])), label(row["method"])
        for shift, left in ((part * step, left) for step in range(12) for part in (-0.6 * size, 0.6 * size) for left in (False, True)):
            begin, middle = px - 6 - width if left else px + 6, py + shift
            box = (begin, middle - 0.6 * size, begin + width, middle + 0.6 * size)
            inside = frame.x0 * scale < box[0] and box[2] < frame.x1 * scale and frame.y0 * scale < box[1]
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        place = {"xytext": (-6 if left else 6, shift), "textcoords": "offset points", "va": "center", "ha": "right" if left else "left"}
        ax.annotate(name, (row[x], row["mean"]), **place)


def _overlap(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
