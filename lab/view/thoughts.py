"""Thoughts decoded: one column a thought, the candidates it decodes to, and which of them are gold intermediate results."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from lab.trace import Trace
from lab.view.base import View, ansi, bar, columns, escape, grid, number, plain, text_bar, visible
from lab.view.tokens import header

SAMPLE = ["question", "sample"]
_LABELS = {"stop_prob": "stop probability", "norm": "norm", "similarity": "cosine with the one before", "score": "score"}


@dataclass(frozen=True, repr=False)
class Thoughts(View):
    """Candidates by thoughts; see `lab.view.thoughts`."""

    trace: Trace
    candidates: int = 5
    steps: int | None = None
    limit: int = 3

    @property
    def title(self) -> str:
        return f"{self.trace.method}: thoughts decoded"

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The thoughts shown, with `similarity` (cosine with the thought before, where vectors were recorded) and `gold` per candidate."""
        shown = self.trace.thoughts.sort_values([*SAMPLE, "step"])
        if self.steps is not None:
            shown = shown.groupby(SAMPLE, sort=False).head(self.steps)
        gold = {(row["question"], row["sample"]): gold_values(row) for row in self.trace.samples.to_dict("records")}
        hits = [[is_gold(text, gold[row["question"], row["sample"]]) for text in row["top_texts"]] for row in shown.to_dict("records")]
        return shown.assign(similarity=_similarities(shown), gold=pd.Series(hits, index=shown.index, dtype=object))

    @property
    def measures(self) -> list[str]:
        """The numeric columns that hold anything, known ones first."""
        floats = [name for name in self.rows if self.rows[name].dtype.kind == "f" and self.rows[name].notna().any()]
        return [name for name in _LABELS if name in floats] + [name for name in floats if name not in _LABELS]

    def table(self) -> pd.DataFrame:
        """One row a candidate: step, rank, text, prob, gold."""
        records = [
            {**{name: row[name] for name in [*SAMPLE, "step"]}, "rank": rank, "text": text, "prob": prob, "gold": gold}
            for row in self.rows.to_dict("records")
            for rank, (text, prob, gold) in enumerate(zip(row["top_texts"], row["top_probs"], row["gold"], strict=True), 1)
        ]
        return pd.DataFrame(records, columns=[*SAMPLE, "step", "rank", "text", "prob", "gold"])

    def found(self) -> pd.DataFrame:
        """Per step: the share of samples whose thought decodes to a gold intermediate at rank 1 and within the candidates shown."""
        hits = self.rows.assign(
            top1=[any(one[:1]) for one in self.rows["gold"]], any=[any(one[: self.candidates]) for one in self.rows["gold"]]
        )
        return hits.groupby("step").agg(top1=("top1", "mean"), any=("any", "mean"), samples=("step", "size")).reset_index()

    def body(self) -> str:
        if self.rows.empty:
            return "<p>No thoughts were recorded.</p>"
        thinking = set(zip(self.rows["question"], self.rows["sample"], strict=True))
        samples = [row for row in self.trace.samples.to_dict("records") if (row["question"], row["sample"]) in thinking]
        blocks = "".join(self._block(sample) for sample in samples[: self.limit])
        hidden = len(samples) - self.limit
        more = f'<p class="soft">{hidden} more samples: pick one with question= and sample=, or raise limit=.</p>' if hidden > 0 else ""
        return f'<div class="cards">{blocks}</div>{more}{self._summary()}'

    def text(self, width: int = 100, color: bool = True) -> str:
        if self.rows.empty:
            return "No thoughts were recorded."
        lines = []
        for (question, sample), part in self.rows.groupby(SAMPLE, sort=False):
            lines.append(plain(f"— question {question} · sample {sample}   (✓ = gold intermediate)"))
            lines += [self._line(row, width, color) for row in part.to_dict("records")]
        return "\n".join(lines)

    def _block(self, sample: dict[str, Any]) -> str:
        part = self.rows[(self.rows[SAMPLE] == [sample[name] for name in SAMPLE]).all(axis=1)].to_dict("records")
        columns = [[_candidate(*one) for one in zip(row["top_texts"], row["top_probs"], row["gold"], strict=True)] for row in part]
        ranks = [[f"rank {k + 1}", *(cells[k] if k < len(cells) else "" for cells in columns)] for k in range(self._wide())]
        measures = [[_LABELS.get(name, escape(name)), *(_measure(name, row[name]) for row in part)] for name in self.measures]
        gold = "✓ gold intermediate of " + ", ".join(map(escape, sample["steps"])) if sample["steps"] else ""
        table = grid(["thought", *(str(row["step"]) for row in part)], [*ranks, *measures], gold, "thoughts")
        asked = f'<p class="asked" dir="auto">{escape(sample["prompt"])}</p>' if sample["prompt"] else ""
        return f'<article class="sample{" wide" * (len(part) > 4)}">{header(sample)}{asked}{table}</article>'

    def _line(self, row: dict[str, Any], width: int, color: bool) -> str:
        stop = "" if row["stop_prob"] != row["stop_prob"] else f" stop {row['stop_prob']:.2f} {text_bar(row['stop_prob'], 6)}"
        line = f"{row['step']:>3}{stop}"
        for text, prob, gold in zip(row["top_texts"], row["top_probs"], row["gold"], strict=True):
            cell = f"  {plain(text.strip()).replace(chr(10), '↵') or '␣'}{'✓' if gold else ''} {prob:.2f}"
            if columns(line) + columns(cell) > width:
                break
            line += ansi(cell, 1, 32) if gold and color else cell
        return line

    def _wide(self) -> int:
        return min(self.candidates, int(self.rows["top_texts"].map(len).max()))

    def _summary(self) -> str:
        if not any(map(len, self.trace.samples["steps"])) or not self._wide():
            return ""
        rows = [
            [
                str(row["step"]),
                bar(row["top1"], "green", f"{row['top1']:.0%}"),
                bar(row["any"], "sky", f"{row['any']:.0%}"),
                str(row["samples"]),
            ]
            for row in self.found().to_dict("records")
        ]
        return grid(["step", "gold at rank 1", f"gold within {self._wide()}", "samples"], rows, "Gold intermediates found, per step")


def thoughts(
    trace: Trace,
    *,
    question: Any = None,
    sample: int | Sequence[int] | None = None,
    candidates: int = 5,
    steps: int | None = None,
    limit: int = 3,
) -> Thoughts:
    """The decoded thoughts of a trace with gold intermediates marked, as CODI's probe shows them (its section on interpretability).

    candidates: how many a step at most; steps: only the first so many (None: all); limit: how many samples to draw.
    """
    return Thoughts(trace.select(question, sample), candidates, steps, limit)


def gold_values(sample: dict[str, Any]) -> set[str]:
    """The intermediate results of a sample's gold steps: what stands after each step's last "=", else the step and its last word."""
    results = [re.sub(r"[<>]", "", step).rsplit("=", 1)[-1] for step in sample["steps"]]
    last = [re.findall(r"[\w.-]*\w", text)[-1:] for text in results]
    return {_normal(text) for text in (*results, *(word for words in last for word in words))} - {""}


def is_gold(text: str, gold: set[str]) -> bool:
    """Whether a decoded candidate is one of the gold results, ignoring spaces, thousands separators and trailing zeros."""
    return _normal(re.sub(r"[<>]", "", text)) in gold


def _normal(text: str) -> str:
    bare = text.strip().replace(",", "").strip("$%.").lower()
    return re.sub(r"(\.\d*?)0+$", r"\1", bare).rstrip(".") if re.fullmatch(r"-?\d+\.\d+", bare) else bare


def _similarities(rows: pd.DataFrame) -> np.ndarray:
    """Cosine of each thought's `vector` with the one before it in the same sample; the recorded `similarity` column where there is one."""
    if "similarity" in rows or "vector" not in rows:
        return rows["similarity"].to_numpy(float) if "similarity" in rows else np.full(len(rows), np.nan)
    similar, before, owner = [], None, None
    for row in rows.to_dict("records"):
        vector, name = np.array(row["vector"]), (row["question"], row["sample"])
        fits = owner == name and before is not None and before.size == vector.size > 0
        scale = np.linalg.norm(vector) * np.linalg.norm(before) if fits else 0.0
        similar.append(float(vector @ before / scale) if scale else np.nan)
        before, owner = vector, name
    return np.array(similar, float)


def _measure(name: str, value: float) -> str:
    return bar(value, "purple", _share(value)) if name == "stop_prob" and value == value else number(value)


def _share(value: float) -> str:
    """A probability or a cosine in two decimals; what rounds to nothing is said to be less than the least they show."""
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _candidate(text: str, prob: float, gold: bool) -> str:
    sign = '<em aria-label="gold intermediate">✓</em>' if gold else ""
    shown = f'{sign}<bdi class="w">{visible(text)}</bdi><small>{escape(_share(prob))}</small>'
    return f'<span class="cand{" gold" if gold else ""}" style="--x:{min(max(prob, 0), 1):.3f}">{shown}</span>'
