"""The token strip: one picture for all methods, coloured by any recorded channel, with the numbers under the tokens."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from lab.trace import Trace
from lab.view import palette
from lab.view.base import View, ansi, columns, direction, escape, number, plain, runs_together, visible
from lab.view.channels import Channel, channels

NAMES = {"prompt": "prompt", "thought": "thoughts", "answer": "answer", "special": "special", "": "text"}
SAMPLE = ["question", "sample"]


@dataclass(frozen=True, repr=False)
class Tokens(View):
    """Tokens of a trace, `limit` samples at most, coloured by `channel`; see `lab.view.tokens`."""

    trace: Trace
    channel: str = ""
    channels: Sequence[str] | None = None
    limit: int = 3
    fold: int = 400
    clip: tuple[float, float] | None = None
    note: str = ""
    script = "tokens.js"

    def __post_init__(self) -> None:
        _ = self.scales

    @property
    def title(self) -> str:
        return f"{self.trace.method}: tokens" + (f" by {self.scales[0].label}" if self.scales[1] else "")

    @cached_property
    def scales(self) -> tuple[Channel, list[Channel]]:
        """(channel shown first, channels one can switch to)."""
        return channels(self.trace, self.channel, self.channels, self.clip)

    @cached_property
    def shown(self) -> Trace:
        """The part of the trace that is drawn: its first `limit` samples."""
        first = self.trace.samples.head(self.limit)
        part = self.trace.select(list(first["question"]), list(first["sample"]))
        return part if len(part.samples) == len(first) else _exactly(part, first)

    def samples(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(sample row, its token rows) for the samples shown, in the order of the trace."""
        parts = {name: part.to_dict("records") for name, part in self.shown.tokens.sort_values("pos").groupby(SAMPLE, sort=False)}
        for sample in self.shown.samples.to_dict("records"):
            yield sample, parts.get((sample["question"], sample["sample"]), [])

    def table(self) -> pd.DataFrame:
        shown = [row for _, rows in self.samples() for row in rows]
        names = ["question", "sample", "pos", "role", "id", "text", *(scale.name for scale in self.scales[1])]
        return pd.DataFrame(shown, columns=names)

    # -- HTML ------------------------------------------------------------------------------------------------------------

    def body(self) -> str:
        if self.trace.tokens.empty:
            return "<p>No tokens were recorded.</p>"
        first, scales = self.scales
        notes = _notes(self.shown)
        blocks = "".join(self._block(sample, rows, notes) for sample, rows in self.samples())
        hidden = len(self.trace.samples) - self.limit
        more = f'<p class="soft">{hidden} more samples: pick one with question= and sample=, or raise limit=.</p>' if hidden > 0 else ""
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return switcher(first, scales, f"{note}{blocks}{more}", self.trace.tokens)

    def _block(self, sample: dict[str, Any], rows: list[dict[str, Any]], notes: dict[Any, str]) -> str:
        """One sample: its header and its spans."""
        first, scales = self.scales
        texts = [row["text"] for row in rows]
        way, apart = direction("".join(texts)), " apart" * runs_together(texts)
        drawn = [(row, token(row, following, first, scales, notes)) for row, following in zip(rows, [*rows[1:], {}], strict=True)]
        spans = "".join(
            self._span(role, list(part), way) for role, part in groupby(zip(spans_of(rows), drawn, strict=True), lambda pair: pair[0])
        )
        return (
            f'<article class="sample">{header(sample)}<div class="lab-strip{apart}" role="list" aria-label="tokens">{spans}</div></article>'
        )

    def _span(self, role: tuple[int, str], part: list[Any], way: str) -> str:
        drawn = [markup for _, (_, markup) in part]
        name, count = NAMES[role[1]], len(drawn)
        rest = "".join(drawn[self.fold :])
        folded = f"<details><summary>{count - self.fold} more tokens</summary>{rest}</details>" if rest else ""
        label = f'<span class="role">{name}<small>{count}</small></span>'
        return (
            f'<div class="span {role[1] or "text"}">{label}<div class="run" dir="{way}">{"".join(drawn[: self.fold])}{folded}</div></div>'
        )

    # -- terminal --------------------------------------------------------------------------------------------------------

    def text(self, width: int = 100, color: bool = True) -> str:
        if self.trace.tokens.empty:
            return "No tokens were recorded."
        first = self.scales[0]
        legend = [terminal_legend(first, self.trace.tokens, color)] if first.name else []
        lines = [*legend, *([plain(self.note)] if self.note else [])]
        for sample, rows in self.samples():
            lines.append(plain(f"— question {sample['question']} · sample {sample['sample']}"))
            apart = " " * runs_together([row["text"] for row in rows])
            lines += _wrapped([_terminal_token(row, first, color) + apart for row in rows], width)
        return "\n".join(lines)


def tokens(
    trace: Trace,
    channel: str = "",
    *,
    question: Any = None,
    sample: int | Sequence[int] | None = None,
    channels: Sequence[str] | None = None,
    limit: int = 3,
    fold: int = 400,
    clip: tuple[float, float] | None = None,
) -> Tokens:
    """The tokens of a trace, coloured by `channel` ("" = the most telling one recorded), with a switch between `channels` (None = all).

    At most `limit` samples are shown, spans longer than `fold` tokens fold away; `clip` = (low, high) fixes the first channel's scale.
    Raises SettingsError for a channel the trace holds no values of.
    """
    return Tokens(trace.select(question, sample), channel, channels, limit, fold, clip)


# -- pieces shared with the side-by-side view --------------------------------------------------------------------------------


def spans_of(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(span number, role) per token: special tokens join the thoughts they open or close, else the span before them."""
    roles = [row["role"] for row in rows]
    for place, role in enumerate(roles):
        if role == "special":
            following = roles[place + 1] if place + 1 < len(roles) else ""
            before = roles[place - 1] if place else ""
            roles[place] = "thought" if "thought" in (following, before) else before or following
    numbers = pd.Series(roles, dtype=object)
    return list(zip((numbers != numbers.shift()).cumsum().tolist(), roles, strict=True))


def token(row: dict[str, Any], following: dict[str, Any], first: Channel, scales: list[Channel], notes: dict[Any, str]) -> str:
    """One token as HTML: its visible text, its number in every channel, and all it is known for as its accessible label.

    The first channel's number and light colour are written out as well: they are what viewers that drop style sheets still show.
    """
    style = "".join(_paint(place, scale, row[scale.name]) for place, scale in enumerate(scales))
    digits = "".join(f' data-c{place}="{scale.short(row[scale.name])}"' for place, scale in enumerate(scales))
    marks = "".join(f" n{place}" for place, scale in enumerate(scales) if row[scale.name] != row[scale.name])
    value = row.get(first.name, float("nan"))  # without any channel the text alone is shown
    under = first.short(value) if scales else ""
    joins = " join" if _joins(row["text"], following.get("text", "")) else ""
    ends = row["text"].endswith("\n") and not following.get("text", "").startswith("\n")  # the last of several ends the line
    shown = visible(row["text"]) if row["text"] else '<i class="cc">◆</i>' if row["role"] == "thought" else visible("")
    return (
        f'<span class="t {row["role"]}{marks}" role="listitem" tabindex="0" aria-label="{_label(row, scales, notes)}" style="{style}">'
        f'<span class="w{joins}"{_plain_fill(first, value)}>{shown}</span>'
        f'<sub{digits} aria-hidden="true">{under}</sub></span>' + "<br>" * ends
    )


def switcher(first: Channel, scales: list[Channel], content: str, tokens: pd.DataFrame) -> str:
    """`content` under a legend and a row of radio buttons that choose the channel; works without script."""
    picks = "".join(
        f'<label><input type="radio" name="channel" value="c{place}"{" checked" if scale.name == first.name else ""}>'
        f"<span>{escape(scale.label)}</span></label>"
        for place, scale in enumerate(scales)
    )
    rules = "".join(_rule(place) for place in range(len(scales)))
    legends = "".join(_legend(place, scale, tokens[scale.name], scale.name != first.name) for place, scale in enumerate(scales))
    single = " single" if len(scales) < 2 else ""
    legends = f"<p>{escape(first.label)}</p>{legends}" if single and scales else legends
    return (
        f'<style>{rules}</style><form method="dialog"><fieldset class="switch{single}"><legend>Colour by</legend>{picks}</fieldset>'
        f'<div class="legends">{legends}</div>{content}</form>'
    )


def header(sample: dict[str, Any]) -> str:
    """One line on a sample: its names, the answer given and the answer wanted, with a sign and a word for right and wrong."""
    facts = {name: sample[name] for name in ("question", "sample", "answer", "gold") if sample[name] != ""}
    if sample["score"] == sample["score"]:
        facts["score"] = number(sample["score"])
    items = " ".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts.items())
    return f"<header>{items} {verdict(sample['correct'])}</header>"


def verdict(correct: Any) -> str:
    """A sign and a word for right and wrong, nothing where it is not known."""
    if pd.isna(correct):
        return ""
    return '<span class="ok">✓ correct</span>' if correct else '<span class="wrong">✗ wrong</span>'


def terminal_legend(scale: Channel, tokens: pd.DataFrame, color: bool) -> str:
    """What the terminal colours mean, with the number of tokens behind each."""
    values = tokens[scale.name] if scale.name in tokens else pd.Series(dtype=float)
    if not scale.discrete:
        return f"{scale.label}: {number(scale.low)} to {number(scale.high)}" + (
            ", stronger colour = higher" if color else ", numbers in ‹›"
        )
    counts = values.dropna().value_counts().sort_index()
    parts = [ansi(f"{count:.0f}: {many} tokens", *_codes(scale, count, color)) for count, many in counts.items()]
    return f"{scale.label} per token  " + "  ".join(parts)


def _joins(text: str, following: str) -> bool:
    return direction(text[-1:]) == "rtl" and direction(following[:1]) == "rtl"


def _paint(place: int, scale: Channel, value: float) -> str:
    strength = scale.strength(value)
    return f"--x{place}:{strength:.2f};--h{place}:var(--{scale.hue(value)});" if strength > 0 else ""


def _plain_fill(scale: Channel, value: float) -> str:
    strength, light = scale.strength(value), palette.THEMES["light"]
    if not strength:
        return ""
    fill = palette.mix(palette.HUES[scale.hue(value)], strength * palette.STRENGTH["light"], light["bg"])
    return f' style="background-color:{fill};color:{light["ink"]}"'


def _label(row: dict[str, Any], scales: list[Channel], notes: dict[Any, str]) -> str:
    sign = (
        json.dumps(row["text"], ensure_ascii=False) if row["text"] else "continuous thought" if row["role"] == "thought" else "empty token"
    )
    facts = [f"position {row['pos']}", *([f"id {row['id']}"] if row["id"] >= 0 else []), *([row["role"]] if row["role"] else [])]
    values = " · ".join(scale.long(row[scale.name]) for scale in scales)
    note = notes.get((row["question"], row["sample"], row["pos"]), "")
    return escape("\n".join(filter(None, [f"{sign} · " + " · ".join(facts), values, note])))


def _exactly(trace: Trace, samples: pd.DataFrame) -> Trace:
    """The rows of `trace` that belong to the given (question, sample) pairs."""
    wanted = set(zip(samples["question"], samples["sample"], strict=True))
    tables = {name: getattr(trace, name) for name in ("samples", "tokens", "thoughts", "passes")}
    kept = {
        name: table[np.array([key in wanted for key in zip(table["question"], table["sample"], strict=True)], bool)]
        for name, table in tables.items()
    }
    return Trace.build(trace.method, **kept, meta=trace.meta)


def _notes(trace: Trace) -> dict[Any, str]:
    """Per token, what its passes or its thought decode to; a first step beyond the number of thoughts is the state before them."""
    notes: dict[Any, list[str]] = {}
    for row in trace.passes.to_dict("records"):
        going = "" if row["decider_prob"] != row["decider_prob"] else f", continue {number(row['decider_prob'])}"
        notes.setdefault((row["question"], row["sample"], row["pos"]), []).append(f"pass {row['depth']}{going}{_candidates(row)}")
    thoughts = {name: part.to_dict("records") for name, part in trace.thoughts.sort_values("step").groupby(SAMPLE, sort=False)}
    latent = trace.tokens[(trace.tokens["role"] == "thought") & ((trace.tokens["text"] == "") | (trace.tokens["id"] < 0))]
    for name, part in latent.sort_values("pos").groupby(SAMPLE, sort=False):
        known = thoughts.get(name, [])
        for pos, row in zip(part["pos"], known[max(0, len(known) - len(part)) :], strict=False):
            notes.setdefault((*name, pos), []).append(f"thought {row['step']}{_candidates(row)}")
    return {place: "\n".join(lines) for place, lines in notes.items()}


def _candidates(row: dict[str, Any]) -> str:
    pairs = [
        f"{json.dumps(text, ensure_ascii=False)} {number(prob)}" for text, prob in zip(row["top_texts"], row["top_probs"], strict=True)
    ]
    return f": {', '.join(pairs)}" if pairs else ""


def _rule(place: int) -> str:
    on = f'.lab-view form:has([value="c{place}"]:checked)'
    return (
        f"{on} .t{{--x:var(--x{place},0);--hue:var(--h{place},transparent)}}{on} .t sub::before{{content:attr(data-c{place})}}"
        f"{on} .t.n{place} .w{{background:var(--hatch)!important}}{on} .legends .c{place}{{display:flex}}"
    )


def _legend(place: int, scale: Channel, values: pd.Series, hidden: bool) -> str:
    undefined = int(values.isna().sum())
    clipped = 0 if scale.discrete else int(((values > scale.high) | (values < scale.low)).sum())
    edges = f'<span><i class="chip hatched"></i>undefined · {undefined}</span>' if undefined else ""
    edges += f"<span>▲▼ beyond the scale · {clipped}</span>" if clipped else ""
    inside = _swatches(scale, values) if scale.discrete else _ramp(scale, values)
    return f'<div class="c{place}" role="note" aria-label="{escape(scale.label)}"{" hidden" if hidden else ""}>{inside} {edges}</div>'


def _swatches(scale: Channel, values: pd.Series) -> str:
    counts = values.dropna().value_counts().sort_index()
    style = {value: f"--x:{scale.strength(value):.0f};--hue:var(--{scale.hue(value)})" for value in counts.index}
    plural = {1: "token"}
    return " ".join(
        f'<span><i class="chip" style="{style[value]}"></i>{value:.0f} · {many} {plural.get(many, "tokens")}</span>'
        for value, many in counts.items()
    )


def _ramp(scale: Channel, values: pd.Series) -> str:
    mean = f"<span>mean {number(values.mean())}</span>" if values.notna().any() else ""
    return f'<span>{number(scale.low)} <i class="ramp" style="--hue:var(--{scale.hue(scale.high)})"></i> {number(scale.high)}</span> {mean}'


def _codes(scale: Channel, value: float, color: bool) -> tuple[int, ...]:
    if not color or value != value:
        return ()
    if scale.discrete:
        return () if palette.pass_ansi(value) is None else (palette.pass_ansi(value),)
    shade = (235, 237, 239, 24, 25, 31, 37)[min(int(scale.strength(value) * 7), 6)]
    return (48, 5, shade, 97) if scale.strength(value) > 0.05 else ()


def _terminal_token(row: dict[str, Any], scale: Channel, color: bool) -> str:
    value = row.get(scale.name, float("nan"))
    shown = plain(row["text"]).replace("\n", "↵\n") or "◆"
    codes = _codes(scale, value, color)
    if codes:
        shown = shown.replace(" ", "·") if not shown.strip() else shown
        return "\n".join(ansi(piece, *codes) if piece else "" for piece in shown.split("\n"))
    worth = value == value and not color and (value > 1 or not scale.discrete)
    return f"{shown}‹{scale.short(value)}›" if worth else shown


def _wrapped(pieces: list[str], width: int) -> list[str]:
    lines, used = [""], 0
    for piece in pieces:
        for place, part in enumerate(piece.split("\n")):
            size = columns(_bare(part))
            if place or (used and used + size > width):
                lines.append("")
                used = 0
            lines[-1] += part
            used += size
    return lines


def _bare(text: str) -> str:
    """`text` without the terminal codes that `ansi` adds."""
    return "".join(part.split("m", 1)[-1] if place else part for place, part in enumerate(text.split("\x1b[")))
