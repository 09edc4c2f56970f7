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
