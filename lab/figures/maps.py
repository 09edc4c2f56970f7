"""Figures of thoughts in the plane."""

import pandas as pd
from matplotlib.axes import Axes

from lab.figures.style import GREY, INK, below, figure
from lab.view import palette


@figure("x", "y", "step", "sample", "correct")
def thought_map(ax: Axes, table: pd.DataFrame) -> None:
    """Thoughts of a question's samples as points, one colour a step; samples that end right are filled, the others hollow.

    table: x, y (two main directions), step, sample, correct.
    """
    for _, part in table.sort_values("step").groupby("sample"):
        ax.plot(part["x"], part["y"], color=GREY, linewidth=0.4, alpha=0.5, zorder=1)
    for place, (step, part) in enumerate(table.groupby("step")):
        colour, marker = palette.series(place)
        right = part["correct"].astype(bool)
        ax.scatter(part["x"][right], part["y"][right], 14, color=colour, marker=marker, zorder=3)
        ax.plot([], [], marker, color=colour, label=f"thought {step}")
        ax.scatter(part["x"][~right], part["y"][~right], 14, facecolor="white", edgecolor=colour, marker=marker, zorder=2)
    ax.set(xlabel="first direction", ylabel="second direction")
    for name, fill in (("right answer", INK), ("wrong answer", "white")):
        ax.plot([], [], "o", markerfacecolor=fill, markeredgecolor=INK, label=name)
    below(ax, *ax.get_legend_handles_labels())
