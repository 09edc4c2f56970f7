"""Answers for every number of thoughts: what is said with each, what of it is right, and the accuracy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lab.view.base import View, bar, escape, grid, plain, text_bar

LONGEST = 60  # characters of an answer


@dataclass(frozen=True, repr=False)
class Answers(View):
    """Questions by numbers of thoughts, or the answers with `count` thoughts alone; see `lab.view.answers`."""

    rows: Sequence[Mapping[str, Any]]
    count: int | None = None

    title = "answers by number of thoughts"

    @cached_property
    def by_count(self) -> dict[int, list[Mapping[str, Any]]]:
        """{number of thoughts: rows, in the questions' order}."""
        return {count: [row for row in self.rows if row["thoughts"] == count] for count in sorted({row["thoughts"] for row in self.rows})}

    @cached_property
    def accuracy(self) -> dict[int, float]:
        """{number of thoughts: share of right answers}."""
        return {count: sum(bool(row["right"]) for row in rows) / len(rows) for count, rows in self.by_count.items()}

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows if self.count is None else self.by_count[self.count])

    def body(self) -> str:
        if not self.rows:
            return "<p>No answers were made with thoughts.</p>"
        return self._all() if self.count is None else self._one(self.count)

    def text(self, width: int = 100, color: bool = True) -> str:
        if not self.rows:
            return "No answers were made with thoughts."
        counts = self.by_count if self.count is None else [self.count]
        lines = [f"{self._name(count):>8} {text_bar(self.accuracy[count], 20)} {self.accuracy[count]:.1%}" for count in counts]
        said = [] if self.count is None else [plain(f"{_sign(row)} {row['question']} → {row['said']}") for row in self.by_count[self.count]]
        return "\n".join(["accuracy by number of thoughts", *lines, *said])

    def _all(self) -> str:
        columns = list(self.by_count.values())
        rows = [
            [escape(line[0]["question"]), escape(line[0]["gold"]), *(f"{_sign(row)} {_short(row['said'])}" for row in line)]
            for line in zip(*columns, strict=True)
        ]
        rows.append(["accuracy", "", *(bar(share, "green", f"{share:.0%}") for share in self.accuracy.values())])
        return grid(["question", "gold", *map(self._name, self.by_count)], rows, "What is said with each number of thoughts")

    def _one(self, count: int) -> str:
        share = self.accuracy[count]
        rows = [
            [escape(r["question"]), escape(r["steps"]), escape(r["gold"]), f"{_sign(r)} {_short(r['said'])}"] for r in self.by_count[count]
        ]
        table = grid(["question", "steps", "gold", "said"], rows, f"{self._name(count)} thoughts")
        return f"{bar(share, 'green', f'accuracy {share:.1%}')}{table}"

    def _name(self, count: int) -> str:
        return f"{count}{' (beyond training)' if self.by_count[count][0].get('beyond') else ''}"


def answers(rows: Sequence[Mapping[str, Any]], count: int | None = None) -> Answers:
    """What a model says with each number of thoughts (rows of `lab.latent.tables.answers_by_count`); `count`: with that many alone."""
    return Answers(rows, count)


def _sign(row: Mapping[str, Any]) -> str:
    return "✓" if row["right"] else "✗"


def _short(text: str) -> str:
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + " …") or "(nothing)"
