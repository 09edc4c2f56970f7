"""What interventions on thoughts cost, one row each."""

import pandas as pd
from matplotlib.axes import Axes

from lab.figures.style import GREY, INK, bars, figure, label, legend, percent
from lab.view import palette

SIDES = {"vectors": (0.0, "vectors replaced"), "corrupted into clean": (0.16, None), "clean into corrupted": (-0.16, None)}


@figure("intervention", "kind", "layer", "accuracy")
def ablation(ax: Axes, table: pd.DataFrame, rows_an_inch: float = 6.0) -> None:
    """One row an intervention in the table's order, a dashed line at the accuracy with own thoughts (the first row).

    Dots have their intervals (low, high); a hollow diamond is the share of answers to the question the thoughts came from (`other`).
    The two directions of a layer's patch (column `layer`, -1 elsewhere) share a row.
    """
    patched = table["layer"] >= 0
    names = table["intervention"].where(~patched, "layer " + table["layer"].astype(int).astype(str))
    order = list(dict.fromkeys(names))[::-1]
    table = table.rename(columns={"accuracy": "mean"}).assign(place=names.map(order.index), side=table["kind"].where(patched, "vectors"))
    for number, (side, part) in enumerate(table.groupby("side", sort=False)):
        shift, name = SIDES[side]
        height, (colour, marker) = part["place"] + shift, palette.series(number)
        ax.plot(part["mean"], height, marker, color=colour, label=name or side, zorder=3)
        bars(ax, height, part, colour, sideways=True)
        ax.plot(part["other"], height, "D", markerfacecolor="white", markeredgecolor=colour, zorder=4)
    if table["other"].notna().any():
        ax.plot([], [], "D", markerfacecolor="white", markeredgecolor=INK, label="the other question's answer")
    ax.axvline(table["mean"].iloc[0], color=GREY, linestyle="--", zorder=1)
    ax.set_yticks(range(len(order)), [label(name) for name in order])
    ax.set(xlabel="accuracy", xlim=(-0.04, 1.04), ylim=(-0.6, len(order) - 0.4))
    percent(ax, "x")
    scale = ax.xaxis.label.get_fontsize() / 7.5
    ax.figure.set_figheight(max(ax.figure.get_figheight(), scale * (len(order) / rows_an_inch + 1.1)))
    legend(ax, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
