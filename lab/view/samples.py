"""What was answered: samples with votes and scores, the beams they grew from, and who got what wrong between two models."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lab.errors import DataError, unknown
from lab.trace import Trace
from lab.view.base import View, ansi, escape, grid, number, plain
from lab.view.tokens import verdict

_COLUMNS = ("question", "prompt", "sample", "answer", "gold", "correct", "votes", "score", "finish", "text")
_SIGNS = {True: "✓", False: "✗"}


@dataclass(frozen=True, repr=False)
class Samples(View):
    """A sortable table of samples; see `lab.view.samples`."""

    trace: Trace
    sort: str = ""
    limit: int = 200
    script = "samples.js"

    def __post_init__(self) -> None:
        if self.sort and self.sort.lstrip("-") not in self.rows:
            raise unknown("column to sort by", self.sort.lstrip("-"), self.rows.columns)

    @property
    def title(self) -> str:
        return f"{self.trace.method}: {len(self.trace.samples)} samples"

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The samples with `votes` (how many of the question's samples answer the same) and `voted` (the majority does; first on ties)."""
        samples = self.trace.samples
        votes = [Counter(part["answer"][part["answer"] != ""]) for _, part in samples.groupby("question", sort=False)]
        by_question = dict(zip(dict.fromkeys(samples["question"]), votes, strict=True))
        counts = [by_question[row["question"]][row["answer"]] for row in samples.to_dict("records")]
        winners = {question: next(iter(count.most_common(1)), ("", 0))[0] for question, count in by_question.items()}
        voted = [bool(row["answer"]) and winners[row["question"]] == row["answer"] for row in samples.to_dict("records")]
        return samples.assign(votes=counts, voted=voted)

    def table(self) -> pd.DataFrame:
        rows = self.rows
        return rows.sort_values(self.sort.lstrip("-"), ascending=not self.sort.startswith("-"), kind="stable") if self.sort else rows

    def body(self) -> str:
        if self.trace.samples.empty:
            return "<p>No samples were recorded.</p>"
        hidden = len(self.rows) - self.limit
        more = f'<p class="soft">{hidden} more samples: raise limit=.</p>' if hidden > 0 else ""
        asked = self.rows["prompt"].unique()
        prompt = f'<p class="asked" dir="auto">{escape(asked[0])}</p>' if len(asked) == 1 and asked[0] else ""
        return f'<p class="note">{escape(self.state())}</p>{prompt}{self._trees()}{self._grid()}{more}'

    @property
    def grown(self) -> bool:
        """Whether these are beams of a search: some grew from others."""
        return bool((self.trace.samples["parent"] >= 0).any())

    @property
    def several(self) -> bool:
        """Whether any question was answered more than once."""
        return bool(self.trace.samples["question"].duplicated().any())

    def state(self) -> str:
        """One sentence of totals: samples, right ones, questions right by vote, questions with any right sample."""
        rows = self.rows
        if self.grown:
            return f"{_many(len(rows), 'beam')} of {_many(rows['question'].nunique(), 'question')}; each grew from the one it hangs under."
        said = f"{_many(len(rows), 'sample')} of {_many(rows['question'].nunique(), 'question')}"
        judged = rows[rows["correct"].notna()]
        if judged.empty:
            return said + "."
        right = judged["correct"].astype(bool)
        said += f": {right.sum()} correct ({right.mean():.1%})"
        if self.several:
            by_vote, ever = (found.groupby(judged["question"]).any() for found in (right & judged["voted"], right))
            said += f"; of the questions, {_share(by_vote)} right by majority vote, {_share(ever)} with any sample right"
        return said + "."

    def text(self, width: int = 100, color: bool = True) -> str:
        lines = [plain(self.state())] if len(self.rows) else ["No samples were recorded."]
        for row in self.table().head(self.limit).to_dict("records"):
            sign = " " if pd.isna(row["correct"]) else _SIGNS[bool(row["correct"])]
            score = "" if row["score"] != row["score"] else f" score {number(row['score'])}"
            facts = f"gold {row['gold'] or '–'}, {row['votes']} votes{score}"
            line = f"{sign} {row['question']}/{row['sample']}  {row['answer'] or '–'}  ({facts})"
            lines.append(ansi(plain(line)[:width].replace("\n", "↵"), *((32,) if sign == "✓" and color else ())))
        return "\n".join(lines)

    def _grid(self) -> str:
        hidden = {"votes"} if self.grown else set() if self.several else {"sample", "votes"}
        hidden |= {"prompt"} if self.rows["prompt"].nunique() == 1 else set()
        names = [name for name in _COLUMNS if name not in hidden and (name in ("question", "sample") or _told(self.rows[name]))]
        head = "".join(f'<th scope="col" aria-sort="none"><button type="button">{name}</button></th>' for name in names)
        lines = "".join(_line(row, names) for row in self.table().head(self.limit).to_dict("records"))
        votes = " Votes: samples of the question with this answer; ★ where most have it." if "votes" in names else ""
        table = f"<caption>Press a heading to sort.{votes}</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
        return f'<div class="scroll tall" tabindex="0"><table class="sortable">{table}</table></div>'

    def _trees(self) -> str:
        grown = [part for _, part in self.rows.groupby("question", sort=False) if (part["parent"] >= 0).any()]
        return "".join(
            f"<details open><summary>beams of question {escape(part['question'].iloc[0])}</summary>{tree(part)}</details>" for part in grown
        )


def samples(trace: Trace, sort: str = "", *, question: Any = None, limit: int = 200) -> Samples:
    """The samples of a trace with votes, and beam trees where parents were recorded; `sort` names a column ("-score": highest first)."""
    return Samples(trace.select(question), sort, limit)


@dataclass(frozen=True, repr=False)
class Versus(View):
    """Who got what wrong; see `lab.view.versus`."""

    first: Trace
    second: Trace
    names: tuple[str, str]
    limit: int = 50

    @property
    def title(self) -> str:
        return f"{self.names[0]} against {self.names[1]}"

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per (question, sample) both have a verdict on: gold, and answer and correct of each."""
        keep = ["question", "sample", "gold", "answer", "correct"]
        ours, theirs = (trace.samples[trace.samples["correct"].notna()][keep] for trace in (self.first, self.second))
        pairs = ours.merge(theirs.drop(columns="gold"), on=["question", "sample"], suffixes=("_a", "_b"))
        if pairs.empty:
            raise DataError("The two traces share no judged sample: nothing to compare.")
        return pairs

    def table(self) -> pd.DataFrame:
        return self.pairs

    def counts(self) -> dict[tuple[bool, bool], int]:
        """How many pairs are (first right, second right)."""
        found = Counter(zip(self.pairs["correct_a"].astype(bool), self.pairs["correct_b"].astype(bool), strict=True))
        return {(a, b): found[a, b] for a in (True, False) for b in (True, False)}

    def body(self) -> str:
        one, two = map(escape, self.names)
        count = self.counts()
        head = ["", f"{two} ✓ right", f"{two} ✗ wrong"]
        rows = [
            [f"{one} ✓ right", f"{count[True, True]}", f"{count[True, False]}"],
            [f"{one} ✗ wrong", f"{count[False, True]}", f"{count[False, False]}"],
        ]
        square = grid(head, rows, f"{len(self.pairs)} samples that both answered")
        return square + self._list(True, f"Only {one} is right") + self._list(False, f"Only {two} is right")

    def text(self, width: int = 100, color: bool = True) -> str:
        count = self.counts()
        lines = [f"both right {count[True, True]}, only {self.names[0]} {count[True, False]}, only {self.names[1]} {count[False, True]}, "]
        lines[0] += f"neither {count[False, False]}"
        for row in self.pairs[self.pairs["correct_a"] != self.pairs["correct_b"]].head(self.limit).to_dict("records"):
            lines.append(f"{row['question']}/{row['sample']}: {row['answer_a']} against {row['answer_b']} (gold {row['gold']})"[:width])
        return plain("\n".join(lines))

    def _list(self, first_right: bool, caption: str) -> str:
        part = self.pairs[(self.pairs["correct_a"] == first_right) & (self.pairs["correct_b"] != first_right)].head(self.limit)
        names = ["question", "sample", "gold", "answer_a", "answer_b"]
        rows = [[escape(row[name]) for name in names] for row in part.to_dict("records")]
        heads = ["question", "sample", "gold", *(f"answer of {escape(name)}" for name in self.names)]
        return grid(heads, rows, caption) if rows else f'<p class="soft">{caption}: none.</p>'


def versus(first: Trace, second: Trace, names: tuple[str, str] | None = None, limit: int = 50) -> Versus:
    """Which questions one trace's model got right and the other's did not, for the (question, sample) pairs both answered."""
    titles = (first.method, second.method) if first.method != second.method else (f"{first.method} A", f"{second.method} B")
    made = Versus(first, second, names or titles, limit)
    _ = made.pairs
    return made


def tree(rows: pd.DataFrame) -> str:
    """Nested lists of a question's samples, each under the one it grew from, with its score; those no answer grew from are dimmed."""
    children: dict[int, list[dict[str, Any]]] = {}
    known = set(rows["sample"])
    for row in rows.to_dict("records"):
        children.setdefault(row["parent"] if row["parent"] in known and row["parent"] != row["sample"] else -1, []).append(row)
    return _branch(children, children.get(-1, []), set(), _survived(rows))


def _survived(rows: pd.DataFrame) -> set[int]:
    """The samples with an answer, and what these grew from."""
    parents = dict(zip(rows["sample"], rows["parent"], strict=True))
    kept: set[int] = set()
    for sample in rows["sample"][rows["answer"] != ""]:
        while sample in parents and sample not in kept:
            kept.add(sample)
            sample = parents[sample]
    return kept


def _branch(children: dict[int, list[dict[str, Any]]], rows: Sequence[dict[str, Any]], seen: set[int], kept: set[int]) -> str:
    items = []
    for row in rows:
        if row["sample"] not in seen:
            seen.add(row["sample"])
            score = "" if row["score"] != row["score"] else f" <small>score {number(row['score'])}</small>"
            answer = f" <b>{escape(row['answer'])}</b> {verdict(row['correct'])}" if row["answer"] else ""
            mark = "kept" if row["sample"] in kept else "soft"
            below = _branch(children, children.get(row["sample"], []), seen, kept)
            name = escape(row["text"][:60]) or f"sample {row['sample']}"
            items.append(f'<li class="{mark}">{name}{score}{answer}{below}</li>')
    return f'<ul class="tree">{"".join(items)}</ul>' if items else ""


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _share(found: pd.Series) -> str:
    return f"{found.sum()} of {len(found)} ({found.mean():.1%})"


def _told(values: pd.Series) -> bool:
    return bool(values.notna().any()) if values.dtype.kind in "fb" or str(values.dtype) == "boolean" else bool((values != "").any())


def _line(row: dict[str, Any], names: list[str]) -> str:
    return "<tr>" + "".join(_cell(name, row[name], row) for name in names) + "</tr>"


def _cell(name: str, value: Any, row: dict[str, Any]) -> str:
    if name == "correct":
        known = not pd.isna(value)
        return f'<td data-v="{int(value) if known else -1}">{verdict(value)}</td>'
    if name in ("text", "prompt"):
        return (
            f"<td><details><summary>{escape(value[:40])}…</summary><pre>{escape(value)}</pre></details></td>"
            if len(value) > 60
            else f"<td>{escape(value)}</td>"
        )
    if isinstance(value, int | float):
        return f'<td class="num" data-v="{value}">{number(value)}{" ★" if name == "votes" and row["voted"] else ""}</td>'
    return f"<td>{escape(value)}</td>"
