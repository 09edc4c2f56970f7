"""Traces counted: the tables that histograms, figures and reports draw."""

import unicodedata
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lab.errors import DataError, unknown
from lab.trace import Trace

SPLITS = ("span", "role", "type", "none")


def groups(trace: Trace, split: str) -> pd.Series:
    """A name per token (index of `trace.tokens`): inside or outside thinking spans, its role, its kind of text, or "" for all.

    Inside is every thought and the special token that closes them, not the one that opens them, as the reward of DTT counts.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    tokens = trace.tokens
    if split == "none":
        return pd.Series("", index=tokens.index, dtype=object)
    if split == "role":
        return tokens["role"].replace("", "text")
    if split == "type":
        return pd.Series([token_type(row["text"], row["role"]) for row in tokens.to_dict("records")], index=tokens.index, dtype=object)
    ordered = tokens.sort_values(["question", "sample", "pos"], key=lambda values: values.astype(str) if values.dtype == object else values)
    after_thought = ordered.groupby(["question", "sample"], sort=False)["role"].shift() == "thought"
    inside = (ordered["role"] == "thought") | ((ordered["role"] == "special") & after_thought)
    return inside.map({True: "inside", False: "outside"}).astype(object).reindex(tokens.index)


def token_type(text: str, role: str) -> str:
    """The kind of a token: special, thought, space, number, word, punctuation or mixed."""
    if role == "special":
        return "special"
    bare = text.strip()
    if not bare:
        return "thought" if role == "thought" and not text else "space"
    kinds = {unicodedata.category(one)[0] for one in bare}
    if kinds == {"N"}:
        return "number"
    return "word" if kinds <= {"L", "M"} else "punctuation" if kinds <= {"P", "S"} else "mixed"


def iteration_counts(trace: Trace, split: str = "none") -> pd.DataFrame:
    """group, iterations, tokens, share (within the group): the table of `figures.iteration_histogram`."""
    tokens = trace.tokens.assign(group=groups(trace, split)).dropna(subset=["iterations"])
    _some(tokens, "iterations")
    counts = tokens.groupby(["group", "iterations"]).size().rename("tokens").reset_index()
    return counts.assign(share=counts["tokens"] / counts.groupby("group")["tokens"].transform("sum"))


def histogram_counts(
    trace: Trace, channel: str, split: str = "span", bins: int = 20, limits: tuple[float, float] | None = None
) -> pd.DataFrame:
    """span (the group), low, high, tokens, share within the group: the table of `figures.gate_histogram`, for any channel.

    limits: ends of the bins (default: 0 and 1, or the minimum and maximum if values lie beyond); the end bins hold what is outside.
    """
    values = trace.tokens[channel].replace([np.inf, -np.inf], np.nan).dropna()
    _some(values, channel)
    low, high = limits or ((0.0, 1.0) if values.between(0, 1).all() else (values.min(), max(values.max(), values.min() + 1e-9)))
    edges = np.linspace(low, high, bins + 1)
    rows = []
    for name, part in values.groupby(groups(trace, split)[values.index], sort=True):
        tokens = np.histogram(part.clip(low, high), edges)[0]
        rows += [
            {"span": name, "low": a, "high": b, "tokens": int(n), "share": n / len(part)}
            for a, b, n in zip(edges[:-1], edges[1:], tokens, strict=True)
        ]
    return pd.DataFrame(rows)


def by_position(trace: Trace, channel: str, bins: int = 20, split: str = "none") -> pd.DataFrame:
    """span (the group), position (0 to 1 through the sample), mean, tokens: how a channel runs from the start to the end."""
    tokens = trace.tokens.assign(group=groups(trace, split)).dropna(subset=[channel])
    _some(tokens, channel)
    order = trace.tokens.groupby(["question", "sample"])["pos"].rank(method="first").sub(1)
    length = trace.tokens.groupby(["question", "sample"])["pos"].transform("size")
    place = ((order / length) * bins).astype(int).clip(upper=bins - 1)
    means = tokens.groupby(["group", place.rename("bin")])[channel].agg(["mean", "size"]).reset_index()
    return means.assign(position=(means["bin"] + 0.5) / bins).rename(columns={"group": "span", "size": "tokens"}).drop(columns="bin")


def thought_counts(trace: Trace) -> pd.DataFrame:
    """gold_steps, thoughts, samples, share (within a number of gold steps): the table of `figures.thoughts_against_gold_steps`."""
    samples = trace.samples[trace.samples["steps"].map(len) > 0]
    _some(samples, "gold steps")
    samples = samples.assign(gold_steps=samples["steps"].map(len), thoughts=_taken(trace, samples))
    counts = samples.groupby(["gold_steps", "thoughts"]).size().rename("samples").reset_index()
    return counts.assign(share=counts["samples"] / counts.groupby("gold_steps")["samples"].transform("sum"))


def hard_tokens(trace: Trace, hard: Sequence[bool] | str = "hard", least: int = 1) -> pd.DataFrame:
    """text, tokens, hard_share (and ce where recorded), per distinct token seen `least` times: the table of `figures.hard_tokens`.

    hard: a channel that is above 0.5 for hard tokens, or a truth value per token.
    """
    if isinstance(hard, str) and hard not in trace.tokens:
        raise unknown("channel", hard, trace.tokens.columns)
    flags = trace.tokens[hard].to_numpy(float) > 0.5 if isinstance(hard, str) else np.asarray(hard, bool)
    measured = [name for name in trace.tokens if name.startswith("ce") and trace.tokens[name].notna().any()]
    parts = trace.tokens.assign(hard_share=flags.astype(float)).groupby("text", sort=False)
    table = parts.agg(
        tokens=("pos", "size"), hard_share=("hard_share", "mean"), **{name: (name, "mean") for name in measured}
    ).reset_index()
    return table[table["tokens"] >= least].sort_values(["hard_share", "tokens"], ascending=False).reset_index(drop=True)


def _taken(trace: Trace, samples: pd.DataFrame) -> list[int]:
    """Thoughts per sample: its `latents` where recorded, else its rows in `thoughts`."""
    if "latents" in samples and samples["latents"].notna().all():
        return samples["latents"].astype(int).tolist()
    rows = trace.thoughts.groupby(["question", "sample"]).size().to_dict()
    return [rows.get((row["question"], row["sample"]), 0) for row in samples.to_dict("records")]


def _some(values: pd.DataFrame | pd.Series, what: str) -> None:
    if values.empty:
        raise DataError(f"Nothing to count: the trace has no {what}.")
