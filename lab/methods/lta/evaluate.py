"""Answering a benchmark with a thinking prefix: several answers a question, their vote, and a stop where more cannot change it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lab.backends import Latent
from lab.data.examples import Dataset
from lab.evaluate import Decoding, Evaluation, evaluate, read_samples
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.tasks import BENCHMARKS
from lab.sampling.votes import settled, vote

RULES = {"gsm8k": "lta-gsm8k", "strategyqa": "lta-strategyqa", "math": "lta-math", "aqua": "lta-aqua", "du": "lta-aqua"}


def answer(model: ThoughtModel, data: Dataset, folder: Path, values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers a benchmark with every number of `thoughts`: rows of a table, and the answers of the last one.

    With `stop_early` a question gets no further answers once they cannot change the vote; accuracy is then that of the answers all
    questions got.
    """
    decoding = Decoding.check(**{name: values[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")})
    repeat, table, rows = values["num_return_sequences"] * model.config.num_scaling_times, [], []
    decoding = decoding.but(batch=values["batch_size"] * repeat)
    for n in values["thoughts"]:
        asked = {"benchmark": BENCHMARKS[values["task_name"]], "folder": folder / f"{n}", "decoding": decoding}
        asked |= {"rule": RULES[values["task_name"]], "label": f"{n} thoughts", "processes": values["processes"]}
        result, rows = _answered(Latent(model, thoughts=n), data, asked, repeat, values["stop_early"])
        found = {f"vote_{name}": value for name, value in voted(rows, values["vote"] == "official").items()}
        table.append({"thoughts": n, **result.row(), **found, "majority": majority_baseline(data), "answers": len(rows)})
    return table, rows


def _answered(generator: Latent, data: Dataset, asked: dict[str, Any], repeat: int, stop_early: bool) -> tuple[Evaluation, list[dict]]:
    if not stop_early or repeat < 3:
        result = evaluate(generator, data, repeat=repeat, **asked)
        return result, result.rows
    result = evaluate(generator, data, repeat=repeat // 2 + 1, **asked)
    if left := [name for name, rows in by_question(result.rows).items() if not _decided(rows, repeat)]:
        evaluate(generator, data, repeat=repeat, ids=left, **asked)
    return result, read_samples(asked["folder"])


def _decided(rows: list[dict[str, Any]], repeat: int) -> bool:
    return all(settled([row[name] for row in rows], repeat) for name in ("predicted_answer", "lenient_answer"))


def by_question(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The answers of an evaluation by the id of their question."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def voted(rows: list[dict[str, Any]], official: bool = False) -> dict[str, float]:
    """Accuracy of the vote over the answers to each question, strictly and leniently read."""
    found, groups = {}, by_question(rows).values()
    for name, right in (("predicted_answer", "is_correct"), ("lenient_answer", "lenient_correct")):
        hits = [_vote_is_right(group, name, right, official) for group in groups]
        found[name.replace("predicted", "strict").replace("_answer", "")] = float(np.mean(hits))
    return found


def _vote_is_right(group: list[dict[str, Any]], name: str, right: str, official: bool) -> bool:
    winner = vote([row[name] for row in group], official=official, once=True)
    return any(row[right] for row in group if row[name] == winner)


def majority_baseline(data: Dataset) -> float:
    """Accuracy of always giving the most frequent answer (date understanding ships nearly all answers as A)."""
    return max(Counter(example.answer for example in data).values()) / len(data)
