"""What the notebooks draw: losses, gates while training, gates of an evaluation."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from lab.files import read_lines

GATES = {"gate_mean_reasoning": "gate inside", "gate_mean_non_reasoning": "gate outside", "correctness_mean": "correctness"}


def loss_table(folder: Path) -> pd.DataFrame:
    """arm (warm_up, gated), step, mean: the logged losses under a warm-up step's folder."""
    rows = [
        {"arm": path.parent.name, "step": row["step"], "mean": row["loss"]}
        for path in sorted(Path(folder).glob("*/metrics.jsonl"))
        for row in read_lines(path)
        if "loss" in row and "event" not in row
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


def gate_table(folder: Path, arm: str, bins: int = 20) -> pd.DataFrame:
    """span, low, high, tokens, share: the gates of an evaluated arm inside and outside the span, for `figures.gate_histogram`."""
    rows = []
    for name, values in gates_of(folder / arm).items():
        counts, edges = np.histogram(values, bins=bins, range=(0, 1))
        share = counts / max(1, counts.sum())
        rows += [
            {"span": name, "low": a, "high": b, "tokens": int(n), "share": float(part)}
            for a, b, n, part in zip(edges, edges[1:], counts, share, strict=False)
        ]
    return pd.DataFrame(rows, columns=["span", "low", "high", "tokens", "share"])


def gates_of(folder: Path) -> dict[str, list[float]]:
    """{inside, outside}: all gates that an evaluation wrote down."""
    found: dict[str, list[float]] = {"inside": [], "outside": []}
    for row in read_lines(folder / "gates.jsonl"):
        for value, inside in zip(row["gate"], row["inside"], strict=True):
            found["inside" if inside else "outside"].append(value)
    return {name: values for name, values in found.items() if values}
