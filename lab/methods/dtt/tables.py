"""What the notebooks draw: losses, gates and lengths while training, gates and lengths of an evaluation."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lab.files import read_lines
from lab.methods.dtt.evaluate import said_in
from lab.running.records import read_metrics

HISTOGRAMS, BINS = "histograms.jsonl", 20
GATES = {"gate_mean_reasoning": "gate inside", "gate_mean_non_reasoning": "gate outside", "correctness_mean": "correctness"}


def loss_table(folder: Path) -> pd.DataFrame:
    """arm (warm_up, gated), step, mean: the logged losses under a warm-up step's folder."""
    rows = [
        {"arm": path.parent.name, "step": row["step"], "mean": row["loss"]}
        for path in sorted(Path(folder).glob("*/metrics.jsonl"))
        for row in read_metrics(path.parent)
        if "loss" in row
    ]
    return pd.DataFrame(rows, columns=["arm", "step", "mean"])


def gate_curves(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """arm, step, mean: gates inside and outside the span, and correctness, of every arm's progress table."""
    parts = [
        pd.DataFrame({"arm": f"{arm}: {name}", "step": table["step"], "mean": table[column]})
        for arm, table in tables.items()
        for column, name in GATES.items()
        if len(table)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["arm", "step", "mean"])


def gate_table(folder: Path, arm: str) -> pd.DataFrame:
    """span, low, high, tokens, share: the gates of an evaluated arm inside and outside the span, for `figures.gate_histogram`."""
    return _shares({name: binned(values) for name, values in gates_of(folder / arm).items()})


def length_table(folder: Path, arms: Iterable[str]) -> pd.DataFrame:
    """group (arm), iterations (reasoning tokens), answers, share, accuracy: lengths of well-formed answers, the share right at each."""
    parts = []
    for arm in arms:
        rows = pd.read_csv(folder / arm / "evaluation_results.csv").dropna(subset="latent_steps")
        found = rows.groupby("latent_steps")["is_correct"].agg(["size", "mean"]).reset_index()
        found.columns = ["iterations", "answers", "accuracy"]
        parts.append(found.assign(group=arm, share=found["answers"] / max(1, len(rows))))
    columns = ["group", "iterations", "answers", "share", "accuracy"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def rollout_tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of a training: gates in the last rollout written down (as `gate_table`), lengths in the first and the last (as `length_table`)."""
    rows = read_lines(folder / HISTOGRAMS)
    if not rows:
        return _shares({}), pd.DataFrame(columns=["group", "iterations", "answers", "share"])
    lengths = [
        {"group": f"update {row['step']}", "iterations": int(n), "answers": count, "share": count / sum(row["lengths"].values())}
        for row in {row["step"]: row for row in (rows[0], rows[-1])}.values()
        for n, count in row["lengths"].items()
    ]
    gates = {name: rows[-1][name] for name in ("inside", "outside") if sum(rows[-1][name])}
    return _shares(gates), pd.DataFrame(lengths, columns=["group", "iterations", "answers", "share"])


def binned(gates: Sequence[float]) -> list[int]:
    """How many gates lie in each of `BINS` equal parts of 0 … 1."""
    return np.histogram(gates, bins=BINS, range=(0, 1))[0].tolist()


def _shares(counts: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    rows = [
        {"span": name, "low": k / BINS, "high": (k + 1) / BINS, "tokens": n, "share": n / max(1, sum(values))}
        for name, values in counts.items()
        for k, n in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["span", "low", "high", "tokens", "share"])


def gates_of(folder: Path) -> dict[str, list[float]]:
    """{inside, outside}: all gates that an evaluation wrote down."""
    found: dict[str, list[float]] = {"inside": [], "outside": []}
    for row in said_in(folder):
        for value, inside in zip(row["gate"], row["inside"], strict=True):
            found["inside" if inside else "outside"].append(value)
    return {name: values for name, values in found.items() if values}
