"""Figures of distributions: passes, gates, thoughts, layers, hard tokens."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.figures.style import GREY, INK, figure, label, legend, percent
from lab.view import palette
from lab.view.base import plain


@figure("iterations", "share")
def iteration_histogram(ax: Axes, table: pd.DataFrame, xlabel: str = "passes", ylabel: str = "tokens") -> None:
    """Share of tokens by passes, side by side for each `group` (split, run, span) where there is such a column; one or two with numbers."""
    groups = list(table.groupby(table["group"].astype(object).fillna(""), sort=False)) if "group" in table else [("", table)]
    width, shown = 0.8 / len(groups), palette.looks(name for name, _ in groups)
    for place, (name, part) in enumerate(groups):
        x = part["iterations"] + (place - (len(groups) - 1) / 2) * width
        drawn = ax.bar(x, part["share"], width * 0.92, color=shown[name][0], label=label(name))
        if len(groups) <= 2:
            ax.bar_label(drawn, [f"{share:.1%}" for share in part["share"]], padding=1.5, fontsize="small")
    ax.set(xlabel=xlabel, ylabel=ylabel, xticks=sorted(table["iterations"].unique()))
    ax.set_xlim(table["iterations"].min() - 0.6, table["iterations"].max() + 0.6)
    ax.grid(False, axis="x")
    ax.margins(y=0.15)
    percent(ax)
    legend(ax)


@figure("low", "high", "share", "span")
def gate_histogram(ax: Axes, table: pd.DataFrame) -> None:
    """Gate values inside and outside the thinking span, as shares of each; table: span, low, high (bin edges), share."""
    for place, (name, part) in enumerate(table.groupby("span", sort=False)):
        edges = [*part["low"], part["high"].iloc[-1]]
        colour = palette.series(place)[0]
        ax.stairs(part["share"], edges, fill=True, alpha=0.28, color=colour)
        ax.stairs(part["share"], edges, color=colour, linestyle=("-", "--", ":")[place % 3], label=label(name))
    ax.set(xlabel="gate (0 = token, 1 = thought)", ylabel="share of positions")
    percent(ax)
    legend(ax)


@figure("gold_steps", "thoughts", "share")
def thoughts_against_gold_steps(ax: Axes, table: pd.DataFrame) -> None:
    """How many thoughts a model takes for questions of each length: area = share within the length, the line joins the means."""
    colour = palette.HUES["blue"]
    ax.scatter(
        table["gold_steps"],
        table["thoughts"],
        s=160 * table["share"] * (ax.xaxis.label.get_fontsize() / 7.5) ** 2,
        color=colour,
        alpha=0.55,
        label="questions (area: share)",
    )
    weighted = table.assign(part=table["thoughts"] * table["share"]).groupby("gold_steps").agg(part=("part", "sum"), share=("share", "sum"))
    ax.plot(weighted.index, weighted["part"] / weighted["share"], color=palette.HUES["vermillion"], marker="_", label="mean thoughts")
    ax.set(xlabel="gold steps", ylabel="thoughts")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    ax.margins(0.12)
    ax.legend()


@figure("layer", "delta_ppl")
def pruning(ax: Axes, table: pd.DataFrame) -> None:
    """Perplexity change when each layer alone is removed; `dropped` layers stand out; a logarithmic axis where they differ by orders."""
    dropped = table["dropped"].astype(bool) if "dropped" in table else pd.Series(False, index=table.index)
    finite = table["delta_ppl"].where(np.isfinite(table["delta_ppl"]))
    for chosen, colour, marker, name in ((False, GREY, "o", "kept"), (True, palette.HUES["vermillion"], "s", "dropped")):
        part = table[dropped == chosen]
        if len(part):
            ax.vlines(part["layer"], 0, finite[part.index], color=colour)
            ax.plot(part["layer"], finite[part.index], marker, color=colour, label=name)
    for layer in table.loc[finite.isna(), "layer"]:
        ax.annotate("∞", (layer, 1), xycoords=("data", "axes fraction"), ha="center", va="top", color=INK)
    small = finite.abs().replace(0, np.nan).min()
    if finite.abs().max() > 100 * small:
        ax.set_yscale("symlog", linthresh=float(max(small, finite.abs().max() * 1e-4)))
    ax.set(xlabel="layer removed", ylabel="Δ perplexity")
    ax.axhline(0, color=INK, linewidth=0.7)
    ax.set_xlim(table["layer"].min() - 0.5, table["layer"].max() + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True)
    legend(ax)


@figure("text", "tokens", "hard_share")
def hard_tokens(ax: Axes, table: pd.DataFrame, top: int = 12) -> None:
    """The tokens most often hard: the share of their occurrences, how often they occur, and (`ce_1`, `ce_2`) the loss after each pass."""
    shown = table.sort_values(["hard_share", "tokens"], ascending=False).head(top)[::-1].reset_index(drop=True)
    ax.hlines(shown.index, 0, shown["hard_share"], color=palette.HUES["vermillion"])
    ax.plot(shown["hard_share"], shown.index, "o", color=palette.HUES["vermillion"])
    ax.set_yticks(shown.index, [f"“{plain(text).replace(chr(10), '↵')}”".replace("$", r"\$") for text in shown["text"]])
    for place, row in shown.iterrows():
        ax.annotate(_facts(row), (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize="small", annotation_clip=False)
    ax.set(xlabel="share of occurrences that are hard", xlim=(0, max(0.01, shown["hard_share"].max()) * 1.05))
    ax.grid(False, axis="y")
    percent(ax, "x")


def _facts(row: pd.Series) -> str:
    losses = (
        f"   CE {row['ce_1']:.2f} → {row['ce_2']:.2f}" if {"ce_1", "ce_2"} <= set(row.index) and row[["ce_1", "ce_2"]].notna().all() else ""
    )
    return f"{row['tokens']:,.0f} ×{losses}"
