"""Evaluation of gated models: accuracy over all examples, format, latent steps, gates inside and outside (`dtt.md` 2.8).

Artefacts under the seed's names: evaluation_results.csv, gate_values.pt, hidden_states.pt (loadable with `weights_only=True`).
"""

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from lab import files
from lab.backends import Latent
from lab.data.answers import RULES, Score, score
from lab.data.benchmarks import BENCHMARKS
from lab.data.examples import Example
from lab.evaluate import Decoding, Evaluation, evaluate
from lab.launch import rank
from lab.methods.dtt.config import BOT, EOT
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.reward import find_span

log = logging.getLogger(__name__)
GATES, STATES, TABLE = "gates-{}.jsonl", "states", "evaluation_results.csv"  # a file of gates for each process that answered


def judge(text: str, example: Example, benchmark: str, gate: str, bot_in_prompt: bool = False) -> Score:
    """Strict: what the method's rule finds equals the gold text; lenient: the benchmark's rules; without [bot] … [eot] both wrong."""
    rule = "hrpo-gsm8k" if gate == "hrpo" else "dtt"
    written = text if bot_in_prompt else text.partition(BOT)[2]
    if gate == "dtt" and EOT not in written:
        return Score(None, False, None, False)
    text = written if gate == "dtt" else text
    answer = RULES[rule].extract(text)
    if benchmark not in BENCHMARKS:
        same = answer == example.answer.strip()
        return Score(answer, same, answer, same)
    strict = score(text, example.answer, benchmark, rule)
    loose = score(text if gate == "hrpo" else str(answer), example.answer, benchmark)
    return Score(strict.strict_answer, strict.strict_correct, loose.lenient_answer, loose.lenient_correct)


class Recording:
    """A model whose gates (and, of the first `states` questions, hidden states) are written to `folder` as it answers."""

    def __init__(self, model: SparseGatedModel, folder: Path, states: int):
        self._model, self._folder, self._states = model, folder, states

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # a copy for another process has nothing yet
            raise AttributeError(name)
        return getattr(self._model, name)

    def generate(self, questions: Sequence[Any], samples: int = 1, *, first: int = 0, **options: Any) -> Any:
        """As the model's own."""
        kept = {"channels": ("state",)} if first < self._states else {}
        result = self._model.generate(questions, samples, first=first, **kept, **options)
        for row in result.rows:
            read = {name: row.channels.get(name, [])[: len(row.ids)] for name in ("gate", "gate_logit")}
            said = {"question": row.question, "sample": row.sample, "ids": row.ids, "text": row.text, "passes": len(row.ids)}
            files.append_line(
                self._folder / GATES.format(rank()), files.plain(said | read | {"inside": _inside(row.ids, read["gate"], self._model)})
            )
        if kept:
            (self._folder / STATES).mkdir(exist_ok=True)
            found = {
                row.question: torch.tensor(row.channels["state"][: len(row.ids)])
                for row in result.rows
                if row.sample == 0 and row.question < self._states
            }
            torch.save(found, self._folder / STATES / f"{first:06d}.pt")
        return result


def evaluate_gated(
    model: SparseGatedModel,
    examples: Sequence[Example],
    benchmark: str,
    folder: Path | str,
    decoding: Decoding | None = None,
    *,
    drawn: bool = False,
    states: int = 64,
    label: str = "",
    processes: int = 1,
) -> dict[str, Any]:
    """Answers and scores all `examples`, writes the artefacts, returns the headline numbers; a killed one goes on where it was.

    Args:
        drawn: gates are drawn as in training; by default each takes its likelier side. states: questions whose hidden states are kept.
        processes: share the questions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    answering = Latent(Recording(model, folder, states), drawn=drawn)
    scorer = partial(judge, benchmark=benchmark, gate=model.config.gate, bot_in_prompt=model.config.bot_in_prompt)
    found = evaluate(answering, examples, benchmark, folder, decoding, scorer=scorer, label=label or "evaluation", processes=processes)
    rows = said_in(folder)
    parts = [_parts(row, model) for row in rows]
    _write_table(folder / TABLE, rows, parts, examples, model, scorer)
    torch.save([torch.tensor(row["gate"]) for row in rows], folder / "gate_values.pt")
    kept = {k: v for path in sorted((folder / STATES).glob("*.pt")) for k, v in torch.load(path, weights_only=True).items()}
    torch.save([kept[key] for key in sorted(kept)], folder / "hidden_states.pt")
    return _numbers(found, rows, parts, model)


def said_in(folder: Path) -> list[dict[str, Any]]:
    """What an evaluation in `folder` wrote down of each answer (ids, text, gates, which of them are inside), once, in order."""
    said = {(row["question"], row["sample"]): row for path in sorted(folder.glob(GATES.format("*"))) for row in files.read_lines(path)}
    return [said[key] for key in sorted(said)]


def _parts(row: dict[str, Any], model: SparseGatedModel) -> dict[str, Any]:
    """An answer cut into reasoning and the rest: gates inside and outside the span, and its length."""
    s, pairs = model.config, list(zip(row["gate"], row["inside"], strict=True))
    own, rest = [g for g, inside in pairs if inside], [g for g, inside in pairs if not inside]
    if s.gate == "hrpo":
        return {"span": True, "steps": len(own), "in": own, "out": rest}
    span = find_span(row["ids"], s.bot_id, s.eot_id, s.bot_in_prompt)
    return {"span": span is not None, "steps": span.tokens if span else 0, "in": own, "out": rest}


def _inside(ids: Sequence[int], gates: Sequence[float], model: SparseGatedModel) -> list[bool]:
    """Which gates belong to the reasoning: after [bot] up to and with [eot]; of HRPO all that are on."""
    s = model.config
    if s.gate == "hrpo":
        return [gate > 0 for gate in gates]
    span = find_span(ids, s.bot_id, s.eot_id, s.bot_in_prompt)
    return [bool(span) and span.bot < place <= span.eot for place in range(len(gates))]


def _numbers(found: Evaluation, rows: list, parts: list, model: SparseGatedModel) -> dict[str, Any]:
    formed = [part["steps"] for part in parts if part["span"]]
    if not formed and model.config.gate == "dtt":
        log.warning("No answer is [bot] … [eot] answer, so all count as wrong: this model was not warmed up on that format.")
    numbers = {"accuracy": found.strict.mean, "accuracy_low": found.strict.low, "accuracy_high": found.strict.high}
    numbers |= {"accuracy_lenient": found.lenient.mean, "format_rate": len(formed) / max(1, len(parts))}
    numbers |= {"avg_latent_steps": _mean(formed), "avg_latent_steps_all": _mean([part["steps"] for part in parts])}
    numbers |= {"forward_passes": _mean([row["passes"] for row in rows]), "examples": len(parts)}
    for name, key in (("inside", "in"), ("outside", "out")):
        values = [g for part in parts for g in part[key]]
        spread = (
            {"std": pstdev(values), "min": min(values), "max": max(values)} if values else dict.fromkeys(("std", "min", "max"), math.nan)
        )
        numbers |= {f"avg_gate_{name}": _mean(values), **{f"gate_{kind}_{name}": value for kind, value in spread.items()}}
    return numbers


def _write_table(path: Path, rows: list, parts: list, examples: Sequence[Example], model: SparseGatedModel, scorer: Any) -> None:
    names = ("prompt", "reasoning_text", "predicted_answer", "ground_truth", "is_correct", "gate_mean_reasoning", "gate_mean_non_reasoning")
    names += ("latent_steps",)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(names)
        for row, part in zip(rows, parts, strict=True):
            example = examples[row["question"]]
            verdict = asdict(scorer(row["text"], example))
            reasoning = row["text"].partition(EOT)[0].rpartition(BOT)[2].strip() if model.config.gate == "dtt" else row["text"]
            means = (_mean(part["in"]), _mean(part["out"]), part["steps"] if part["span"] else "")
            table.writerow([example.question, reasoning, verdict["strict_answer"], example.answer, verdict["strict_correct"], *means])


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
