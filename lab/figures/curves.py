"""Figures over a running quantity: steps, passes, thoughts, samples."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.figures.style import GREY, INK, bars, figure, label, legend, percent, spread
from lab.view import palette

DASHES = ("-", "--", ":", "-.")


@figure("passes", "mean", "policy")
def accuracy_against_passes(ax: Axes, table: pd.DataFrame) -> None:
    """Accuracy against passes a token (TaH's trade-off): rows with a `threshold` join to a sweep, the other policies are points.

    table: policy, passes, mean, and low, high, threshold where there are any.
    """
    swept = table["threshold"].notna() if "threshold" in table else pd.Series(False, index=table.index)
    shown = palette.looks(table["policy"])
    for name, part in table.groupby("policy", sort=False):
        colour, marker = shown[name]
        line = part[swept[part.index]].sort_values("threshold")
        if len(line):
            ax.plot(line["passes"], line["mean"], color=colour, marker=".", label=f"{label(name)}, threshold swept", zorder=3)
            _ends(ax, line)
        dots = part[~swept[part.index]]
        if len(dots):
            ax.plot(dots["passes"], dots["mean"], marker, color=colour, label=label(name), zorder=4)
        if {"low", "high"} <= set(part.columns):
            bars(ax, part["passes"], part, colour)
    ax.set(xlabel="passes per token", ylabel="accuracy")
    percent(ax)
    legend(ax)


@figure("step", "mean", "arm")
def learning_curves(ax: Axes, table: pd.DataFrame, ylabel: str = "loss", log: bool = False) -> None:
    """Curves with intervals over seeds; stretches that were rolled back (`discarded`) in grey.

    table: step, arm, mean, and low, high, discarded where there are any. Arms named `arm: part` share the arm's colour, a dash a part.
    """
    lost = table["discarded"].fillna(False).astype(bool) if "discarded" in table else pd.Series(False, index=table.index)
    owners, parts = (list(dict.fromkeys(name.partition(": ")[place] for name in table["arm"])) for place in (0, 2))
    shown = palette.looks(owners)
    for name, part in table[~lost].groupby("arm", sort=False):
        owner, _, piece = name.partition(": ")
        spread(ax, part, "step", *shown[owner], label(name), band=True, dash=DASHES[parts.index(piece) % len(DASHES)])
    _discarded(ax, table[lost], "mean")
    ax.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    legend(ax)


@figure("thoughts", "mean")
def accuracy_against_thoughts(ax: Axes, table: pd.DataFrame) -> None:
    """Accuracy for a given number of thoughts; a line per `method` where there is such a column, intervals from low and high."""
    groups = list(table.groupby("method", sort=False)) if "method" in table else [("", table)]
    shown = palette.looks(name for name, _ in groups)
    for name, part in groups:
        spread(ax, part, "thoughts", *shown[name], label(name))
    ax.set(xlabel="thoughts", ylabel="accuracy")
    ax.xaxis.get_major_locator().set_params(integer=True)
    percent(ax)
    legend(ax)


@figure("n", "measure", "mean")
def scaling(ax: Axes, table: pd.DataFrame) -> None:
    """Coverage, vote, best-of-N and beam against the number of samples N, on a doubling axis; measures stand side by side at each N."""
    shown = palette.looks(table["measure"])
    for place, (name, part) in enumerate(table.groupby("measure", sort=False)):
        beside = 2 ** (0.05 * (place - (len(shown) - 1) / 2))
        spread(ax, part.assign(n=part["n"] * beside), "n", *shown[name], label(name))
    ax.set(xlabel="samples N", ylabel="accuracy")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(table["n"].unique()), [f"{n:g}" for n in sorted(table["n"].unique())])
    ax.minorticks_off()
    percent(ax)
    legend(ax)


@figure("step", "component", "value")
def loss_components(ax: Axes, table: pd.DataFrame, log: bool = True) -> None:
    """The parts of a loss against steps, discarded stretches in grey; table: step, component, value, and discarded where there is any."""
    lost = table["discarded"].fillna(False).astype(bool) if "discarded" in table else pd.Series(False, index=table.index)
    for place, (name, part) in enumerate(table[~lost].groupby("component", sort=False)):
        part = pd.concat(_parts(part))
        ax.plot(part["step"], part["value"], color=palette.series(place)[0], linestyle=DASHES[place // 8 % 4], label=label(name))
    _discarded(ax, table[lost], "value")
    ax.set(xlabel="step", ylabel="loss", yscale="log" if log and (table["value"].dropna() > 0).all() else "linear")
    legend(ax)


@figure("step", "value")
def divergence_events(ax: Axes, table: pd.DataFrame, events: pd.DataFrame, ylabel: str = "loss") -> None:
    """A loss and what the guard did: discarded stretches grey, onsets dotted, an arrow from each rollback to where it resumed.

    table: step, value, discarded. events: kind, step, onset, resumed, rule (lines of divergence.jsonl).
    """
    lost = table["discarded"].fillna(False).astype(bool) if "discarded" in table else pd.Series(False, index=table.index)
    kept = table[~lost].sort_values("step")
    ax.plot(kept["step"], kept["value"], color=palette.HUES["blue"], label="kept")
    _discarded(ax, table[lost], "value")
    top = float(np.nanmax(table["value"].replace([np.inf, -np.inf], np.nan)))
    for place, event in enumerate(events[events["kind"] == "rollback"].to_dict("records")):
        height = top * (1.05 + 0.07 * (place % 3))
        ax.axvline(event["onset"], color=INK, linewidth=0.7, linestyle=":")
        ax.annotate("", (event["resumed"], height), (event["step"], height), arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.9})
        ax.text(event["step"], height, f" {event['rule']}", va="center", ha="left")
    skipped = events.loc[~events["kind"].isin(["rollback"]), "step"]
    ax.plot(skipped, np.full(len(skipped), kept["value"].min()), "x", color=palette.HUES["vermillion"], label="skipped update")
    ax.set(xlabel="step", ylabel=ylabel, ylim=(None, top * (1.12 + 0.07 * min(len(events), 3))))
    legend(ax)


def _parts(table: pd.DataFrame) -> list[pd.DataFrame]:
    """A course cut where its steps begin anew, each part followed by an undefined row, so that no line joins them."""
    number = (table["step"].diff() < 0).cumsum()
    return [pd.concat([part, part.tail(1).assign(value=np.nan)]) for _, part in table.groupby(number)]


def _ends(ax: Axes, line: pd.DataFrame) -> None:
    """Writes the threshold at both ends of a sweep; one range where they are at the same place."""
    first, last = line.iloc[0], line.iloc[-1]
    together = abs(first["passes"] - last["passes"]) < 0.05 and abs(first["mean"] - last["mean"]) < 0.05
    texts = {f"{first['threshold']:g} … {last['threshold']:g}": first} if together else {f"{p['threshold']:g}": p for p in (first, last)}
    for text, point in texts.items():
        ax.annotate(text, (point["passes"], point["mean"]), xytext=(3, -8), textcoords="offset points", color=INK)


def _discarded(ax: Axes, lost: pd.DataFrame, value: str) -> None:
    by = [name for name in ("arm", "component") if name in lost]
    parts = [part for _, part in lost.groupby(by, sort=False)] if by and len(lost) else [lost][: len(lost)]
    for place, part in enumerate(parts):
        jumps = (part["step"].diff() < 0).cumsum()
        for jump, stretch in part.groupby(jumps):
            first = place == 0 and jump == jumps.iloc[0]
            ax.plot(stretch["step"], stretch[value], color=GREY, linestyle="--", zorder=1, label="discarded" if first else None)
