"""Methods side by side."""

from typing import Any

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
    for row in apart(table.sort_values("mean", ascending=False), x):
        ax.annotate(label(row["method"]), (row[x], row["mean"]), xytext=(6, row["shift"]), textcoords="offset points", va="center")
    ax.set(xlabel=xlabel or label(x), ylabel="accuracy", ylim=(-0.03, 1.08), xscale="log" if log else "linear")
    ax.margins(x=0.18)
    percent(ax)


def apart(table: pd.DataFrame, x: str, near: float = 0.09, gap: float = 9.0) -> list[dict[str, Any]]:
    """The rows with `shift`, how many points a name moves down so that names of dots close to one another can be read."""
    width = (table[x].max() - table[x].min()) or 1.0
    rows: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        crowd = [other for other in rows if abs(other[x] - row[x]) < 0.2 * width and abs(other["mean"] - row["mean"]) < near]
        rows.append(row | {"shift": -gap * len(crowd)})
    return rows
