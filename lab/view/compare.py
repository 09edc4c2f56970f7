"""Two traces of the same question, token under token: where they read alike, where they part, and what each number did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import pandas as pd

from lab.errors import DataError
from lab.trace import Trace
from lab.view.base import View, columns, direction, escape, number, plain
from lab.view.channels import Channel, channels
from lab.view.tokens import header, switcher, token

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Compare(View):
    """Two aligned token strips; see `lab.view.compare`."""

    first: Trace
    second: Trace
    channel: str = ""
    names: tuple[str, str] = ("A", "B")
    channels: Sequence[str] | None = None
    script = "tokens.js"

    def __post_init__(self) -> None:
        if len(self.first.samples) != 1 or len(self.second.samples) != 1:
            raise DataError("Two samples are compared at a time: choose one of each trace with question= and sample=.")
        _ = self.scales

    @property
    def title(self) -> str:
        return f"{self.names[0]} and {self.names[1]}, token by token"

    @cached_property
    def both(self) -> pd.DataFrame:
        """The tokens of both traces in one table."""
        return pd.concat([self.first.tokens, self.second.tokens], ignore_index=True)

    @cached_property
    def scales(self) -> tuple[Channel, list[Channel]]:
        """(channel shown first, channels one can switch to), on a scale common to both."""
        pair = Trace.build("pair", tokens=self.both.assign(pos=range(len(self.both))))
        return channels(pair, self.channel, self.channels, None)

    @cached_property
    def pairs(self) -> list[tuple[Row | None, Row | None]]:
        """Aligned token rows; None on the side that has no such token."""
        ours, theirs = (part.tokens.sort_values("pos").to_dict("records") for part in (self.first, self.second))
        return list(_aligned(ours, theirs))

    def table(self) -> pd.DataFrame:
        names = [scale.name for scale in self.scales[1]]
        rows = [_side(ours, "a", names) | _side(theirs, "b", names) for ours, theirs in self.pairs]
        return pd.DataFrame(rows).assign(same=[_same(ours, theirs) for ours, theirs in self.pairs])

    def body(self) -> str:
        first, scales = self.scales
        heads = "".join(
            f'<div class="who"><b>{escape(name)}</b>{header(part.samples.iloc[0].to_dict())}</div>'
            for name, part in zip(self.names, (self.first, self.second), strict=True)
        )
        cells = "".join(_pair(ours, theirs, self.scales, self.names) for ours, theirs in self.pairs)
        way = direction("".join(self.both["text"]))
        same = sum(_same(ours, theirs) for ours, theirs in self.pairs)
        summary = f'<p class="soft">{same} of {len(self.pairs)} columns agree; a framed column does not. {_means(first, self)}</p>'
        strip = f'<div class="lab-strip pairs" role="list" dir="{way}" aria-label="aligned tokens">{cells}</div>'
        return switcher(first, scales, f'<article class="sample">{heads}{strip}{summary}</article>', self.both)

    def text(self, width: int = 100, color: bool = True) -> str:
        scale = self.scales[0]
        cells = [(_plain_cell(ours, scale), _plain_cell(theirs, scale)) for ours, theirs in self.pairs]
        lines: list[list[str]] = [["", ""]]
        for top, bottom in cells:
            size = max(columns(top), columns(bottom)) + 1
            if columns(lines[-1][0]) + size > width - 4:
                lines.append(["", ""])
            lines[-1][0] += top + " " * (size - columns(top))
            lines[-1][1] += bottom + " " * (size - columns(bottom))
        names = [plain(name)[:8] for name in self.names]
        pad = max(map(len, names)) + 1
        body = [f"{name.ljust(pad)}{line}".rstrip() for pair in lines for name, line in zip([*names, ""], [*pair, ""], strict=True)]
        legend = f"{scale.label} in ‹›; " if scale.name else ""
        return "\n".join([f"{legend}_ where a run has no such token", *body]).rstrip()


def compare(
    first: Trace,
    second: Trace,
    channel: str = "",
    *,
    question: Any = None,
    sample: int | Sequence[int] | None = None,
    names: tuple[str, str] | None = None,
    channels: Sequence[str] | None = None,
) -> Compare:
    """Two traces side by side, aligned by token, on one colour scale: the first sample of each that `question` and `sample` pick.

    `channels`: those to switch between, None = all that either has.
    Raises DataError where nothing is picked, SettingsError for a channel without values in either.
    """
    parts = [_one(trace.select(question, sample)) for trace in (first, second)]
    return Compare(*parts, channel, names or _names(first, second), channels)


def _one(trace: Trace) -> Trace:
    if trace.samples.empty:
        raise DataError("One of the two traces has no such sample: look at trace.samples.")
    row = trace.samples.iloc[0]
    return trace.select(row["question"], int(row["sample"]))


def _names(first: Trace, second: Trace) -> tuple[str, str]:
    return (first.method, second.method) if first.method != second.method else (f"{first.method} A", f"{second.method} B")


def _aligned(ours: list[Row], theirs: list[Row]) -> Iterator[tuple[Row | None, Row | None]]:
    matcher = SequenceMatcher(None, [_face(row) for row in ours], [_face(row) for row in theirs], autojunk=False)
    for _, start, end, begin, stop in matcher.get_opcodes():
        left, right = ours[start:end], theirs[begin:stop]
        length = max(len(left), len(right))
        yield from zip(left + [None] * (length - len(left)), right + [None] * (length - len(right)), strict=True)


def _face(row: Row) -> tuple[str, bool]:
    return row["text"], row["role"] == "thought"


def _same(ours: Row | None, theirs: Row | None) -> bool:
    return bool(ours and theirs and _face(ours) == _face(theirs))


def _side(row: Row | None, side: str, names: list[str]) -> Row:
    return {f"{name}_{side}": row[name] if row else None for name in ["pos", "text", *names]}


def _pair(ours: Row | None, theirs: Row | None, shown: tuple[Channel, list[Channel]], names: tuple[str, str]) -> str:
    first, scales = shown
    cells = "".join(
        token(row, {}, first, scales, {(row["question"], row["sample"], row["pos"]): f"in {name}"}).removesuffix("<br>")
        if row
        else '<span class="gap" aria-hidden="true">·</span>'
        for row, name in zip((ours, theirs), names, strict=True)
    )
    return f'<span class="pair{"" if _same(ours, theirs) else " differs"}" role="presentation">{cells}</span>'


def _plain_cell(row: Row | None, scale: Channel) -> str:
    if row is None:
        return "_"
    shown = plain(row["text"]).replace("\n", "↵").strip() or "◆"
    value = row.get(scale.name, float("nan"))
    return f"{shown}‹{scale.short(value)}›" if value == value and scale.short(value) else shown


def _means(scale: Channel, view: Compare) -> str:
    parts = zip(view.names, (view.first, view.second), strict=True)
    means = [f"{escape(name)} {number(part.tokens[scale.name].mean())}" for name, part in parts if scale.name in part.tokens]
    return f"Mean {escape(scale.label)}: {', '.join(means)}."
