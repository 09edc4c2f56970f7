"""Gates, passes or any channel as distributions: inside and outside thinking spans, by role or kind of token, across runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from lab.errors import unknown
from lab.trace import Trace
from lab.view import palette
from lab.view.base import View, ansi, bar, escape, grid, number, plain, text_bar
from lab.view.channels import Channel, names
from lab.view.summaries import by_position, groups, histogram_counts, iteration_counts
from lab.view.svg import Line, chart


@dataclass(frozen=True, repr=False)
class Histogram(View):
    """Distributions of one channel; see `lab.view.histogram`."""

    runs: dict[str, Trace]
    channel: str
    split: str = "span"
    bins: int = 10

    def __post_init__(self) -> None:
        for trace in self.runs.values():
            if self.channel not in names(trace.tokens):
                raise unknown("channel with values in this trace", self.channel, names(trace.tokens))
        _ = self.counts

    @property
    def title(self) -> str:
        return f"{Channel(self.channel).label} of {', '.join(self.runs)}"

    @cached_property
    def counts(self) -> pd.DataFrame:
        """series (run and group), value (a bin's text), tokens, share within the series."""
        parts = [_counted(trace, self.channel, self.split, self.bins, self._limits()).assign(run=name) for name, trace in self.runs.items()]
        table = pd.concat(parts, ignore_index=True)
        series = [self._name(run, group) for run, group in zip(table["run"], table["group"], strict=True)]
        return table.assign(series=series)[["series", "value", "tokens", "share"]]

    def table(self) -> pd.DataFrame:
        return self.counts

    @cached_property
    def summary(self) -> pd.DataFrame:
        """run, group, tokens, mean, std, min, max of the channel."""
        rows = []
        for run, trace in self.runs.items():
            values = trace.tokens[self.channel]
            measured = values.groupby(groups(trace, self.split)).agg(["count", "mean", "std", "min", "max"]).reset_index(names="group")
            rows.append(measured.assign(run=run))
        return pd.concat(rows, ignore_index=True)

    def body(self) -> str:
        series = list(dict.fromkeys(self.counts["series"]))
        wide = self.counts.pivot(index="value", columns="series", values="share").reindex(dict.fromkeys(self.counts["value"]))
        top = float(self.counts["share"].max()) or 1.0
        rows = [
            [escape(value), *(self._cell(line[name], top, place) for place, name in enumerate(series))] for value, line in wide.iterrows()
        ]
        label = Channel(self.channel).label
        table = grid([escape(label), *map(escape, series)], rows, f"Share of tokens by {escape(label)}", "bars")
        return f"{table}{self._facts()}{self._course()}"

    def text(self, width: int = 100, color: bool = True) -> str:
        room = max(8, min(40, width - 40))
        lines = [plain(self.title)]
        for place, (name, part) in enumerate(self.counts.groupby("series", sort=False)):
            lines.append(plain(f"{name} ({part['tokens'].sum()} tokens)"))
            code = (palette.PASS_ANSI[place % 6],) if color else ()
            top = part["share"].max() or 1.0
            lines += [
                f"  {row.value:>13} {ansi(text_bar(row.share / top, room), *code)} {row.share:6.1%} {row.tokens}"
                for row in part.itertuples()
            ]
        return "\n".join(lines)

    def _name(self, run: str, group: str) -> str:
        return " ".join(filter(None, [run if len(self.runs) > 1 else "", group])) or "all"

    def _limits(self) -> tuple[float, float] | None:
        values = pd.concat([trace.tokens[self.channel] for trace in self.runs.values()]).dropna()
        return None if values.between(0, 1).all() else (float(values.min()), float(values.quantile(0.995)) + 1e-9)

    def _cell(self, share: float, top: float, place: int) -> str:
        return bar(share / top, palette.SERIES[place % len(palette.SERIES)], f"{share:.1%}") if share == share else ""

    def _facts(self) -> str:
        rows = [
            [
                escape(self._name(row["run"], row["group"])),
                f"{row['count']}",
                *(number(row[name]) for name in ("mean", "std", "min", "max")),
            ]
            for row in self.summary.to_dict("records")
        ]
        return grid(["tokens of", "count", "mean", "std", "min", "max"], rows, f"{escape(Channel(self.channel).label)} in numbers")

    def _course(self) -> str:
        lines = []
        for run, trace in self.runs.items():
            for group, part in by_position(trace, self.channel, split=self.split).groupby("span", sort=False):
                lines.append(
                    Line(
                        self._name(run, group),
                        palette.SERIES[len(lines) % len(palette.SERIES)],
                        part["position"].tolist(),
                        part["mean"].tolist(),
                    )
                )
        return chart(f"mean {Channel(self.channel).label} by position (0 = start, 1 = end)", lines)


def histogram(runs: Trace | Mapping[str, Trace], channel: str = "", split: str = "", bins: int = 10) -> Histogram:
    """The distribution of a channel ("" = gates if recorded, else passes), of one trace or of several runs given by name.

    split: "span" (inside and outside thinking spans), "role", "type" (number, word, …) or "none"; "" = by span where there are thoughts.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {runs.method: runs}
    there = names(next(iter(named.values())).tokens) if named else []
    chosen = channel or ("gate" if "gate" in there else "iterations" if "iterations" in there else next(iter(there), ""))
    thinks = any((trace.tokens["role"] == "thought").any() for trace in named.values())
    return Histogram(named, chosen, split or ("span" if thinks else "none"), bins)


def _counted(trace: Trace, channel: str, split: str, bins: int, limits: tuple[float, float] | None) -> pd.DataFrame:
    if channel == "iterations":
        counts = iteration_counts(trace, split)
        return counts.assign(value=[f"{value:.0f}" for value in counts["iterations"]])
    counts = histogram_counts(trace, channel, split, bins, limits)
    edges = [f"{number(low, 2)}–{number(high, 2)}" for low, high in zip(counts["low"], counts["high"], strict=True)]
    return counts.rename(columns={"span": "group"}).assign(value=edges)
