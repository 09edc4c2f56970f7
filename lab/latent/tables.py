"""Tables that notebooks of feedback methods show: learning curves, gold results found in thoughts, answers by number of thoughts."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lab.data.examples import Example
from lab.files import read_lines
from lab.running.records import read_metrics


def curve(folder: Path | str, value: str, without: Sequence[str] = ()) -> Any:
    """A logged number of every arm of a step (but those in `without`), as a table of arm, step, mean."""
    import pandas as pd

    rows = [row for row in read_metrics(Path(folder)) if value in row and row.get("arm", "") not in without]
    return pd.DataFrame([{"arm": r.get("arm", ""), "step": r["step"], "mean": r[value]} for r in rows], columns=["arm", "step", "mean"])


def at_steps(curves: Any, name: str) -> dict[str, dict[str, float]]:
    """{arm, step n: {name: value}} of learning curves with several arms, so that a sweep folds them over seeds; {} of one arm alone."""
    if curves["arm"].nunique() < 2:
        return {}
    return {f"{arm}, step {step}": {name: float(value)} for arm, step, value in curves.itertuples(index=False)}


def parts(folder: Path | str, names: Sequence[str], arm: str = "") -> Any:
    """Logged components of one arm's loss: step, component, value, and `discarded` where a rollback made the step again."""
    import pandas as pd

    rows = [row for row in read_lines(Path(folder) / "metrics.jsonl") if row.get("arm", "") == arm and any(name in row for name in names)]
    first_later = [*accumulate((row["step"] for row in reversed(rows)), min)][::-1][1:] + [math.inf]
    found = [
        {"step": row["step"], "component": name, "value": row[name], "discarded": later <= row["step"]}
        for row, later in zip(rows, first_later, strict=True)
        for name in names
        if name in row
    ]
    return pd.DataFrame(found, columns=["step", "component", "value", "discarded"])


def found_results(trace: Any) -> list[dict[str, Any]]:
    """Share of thoughts whose first candidate, or one of the first five, is a gold intermediate result; by place, then over all."""
    from lab.view.thoughts import gold_values, is_gold

    gold = {(row["question"], row["sample"]): gold_values(row) for row in trace.samples.to_dict("records")}
    seen: dict[int, list[tuple[float, float]]] = {}
    for row in trace.thoughts.to_dict("records"):
        wanted = gold[row["question"], row["sample"]]
        hits = [is_gold(text, wanted) for text in row["top_texts"]]
        if wanted and hits:
            seen.setdefault(int(row["step"]), []).append((float(hits[0]), float(any(hits[:5]))))
    every = [pair for pairs in seen.values() for pair in pairs]
    named = [(str(place), pairs) for place, pairs in sorted(seen.items())] + ([("all", every)] if every else [])
    return [{"place": name, "top1": statistics.fmean(a for a, _ in p), "top5": statistics.fmean(b for _, b in p)} for name, p in named]


def answers_by_count(
    model: Any, problems: Sequence[Example], counts: Iterable[int], score: Callable[[str, str], Any], trained: int, **options: Any
) -> list[dict[str, Any]]:
    """What `model` says with each number of thoughts, the gold answer beside it; `beyond` marks more thoughts than were trained.

    Args:
        score: (text, gold) -> something with `strict_correct`. options: of `model.generate`.
    """
    rows = []
    for count in counts:
        for response, example in zip(model.generate(problems, thoughts=count, **options).rows, problems, strict=True):
            right = bool(score(response.text, example.answer).strict_correct)
            about = {"question": example.question, "steps": " ".join(example.steps), "gold": example.answer, "said": response.text}
            rows.append({"thoughts": count, **about, "right": right, "beyond": count > trained})
    return rows


def by_count(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy for each number of thoughts of `answers_by_count`, with Wilson's interval: thoughts, mean, low, high, beyond."""
    from lab.stats import proportion_interval

    table = []
    for count in sorted({row["thoughts"] for row in rows}):
        part = [row for row in rows if row["thoughts"] == count]
        interval = proportion_interval(sum(row["right"] for row in part), len(part))
        limits = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        table.append({"thoughts": count, **limits, "beyond": part[0]["beyond"]})
    return table
