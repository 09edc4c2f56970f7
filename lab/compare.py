"""Every method on one backbone, one data set and one budget: what `notebooks/compare.ipynb` calls.

All begin with the same backbone, which reasons in writing, learn from the same problems with the same optimizer, and answer the same
test problems greedily. The budget is equal optimizer steps, equal forward tokens or equal wall time; what a method really spent is
measured, and stands in the table beside what it was given.
"""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field

from lab import files, reported
from lab.backends import Latent
from lab.config import Settings
from lab.data.examples import Dataset, Example
from lab.data.source import Source
from lab.entrants import ENTRANTS, Start, Trained, entrant
from lab.errors import DataError, TrainingError
from lab.evaluate import Decoding, evaluate, read_samples
from lab.running import papers
from lab.stats import proportion_interval
from lab.train import TrainSettings
from lab.training.meter import Meter

log = logging.getLogger(__name__)

PIECES = r"#+|<[^<>\s]+>|\[\w+\]|[A-Za-z']+\d*|\d+|[^\sA-Za-z\d]"  # what is one token of a toy's text
PHRASES = "Question: Let's think step by step:(Thinking speed: auto)###Answer: The answer is: 0123456789"
SPENT = "spent.json"
MISSED, TRIES = 0.05, 3  # share of a budget that a training may miss it by; trainings to come as near


class Budget(Settings):
    """`amount` of `unit` for every method; `seconds` are wall time, `cpu_seconds` the processor's, which a busy machine does not lengthen.

    What is not steps becomes steps by what trainings of `probe` steps and of three times as many cost, and again by what was spent.
    """

    unit: Literal["steps", "tokens", "seconds", "cpu_seconds"] = "steps"
    amount: float = Field(600, gt=0)
    probe: int = Field(12, ge=6)


def problems(source: Source, split: str) -> Dataset:
    """The problems of a split as every method can write them: in the toy world states are digits, a step names its operator."""
    made = source.train() if split == "train" else source.held_out(split)
    return made.but(map(_spelled, made)) if source.made and source.benchmark == "permutations" else made


def _spelled(example: Example) -> Example:
    words = [word.removeprefix("s") for word in example.question.split()]
    steps = (f"{operator} {state.removeprefix('s')}" for operator, state in zip(words, example.steps, strict=False))
    return replace(example, question=" ".join(words), steps=tuple(steps), answer=example.answer.removeprefix("s"))


def start(backbone: str, source: Source, folder: Path, how: TrainSettings, thoughts: int, base_steps: int, **toy: Any) -> Start:
    """What all methods begin with: a hub id or folder as it is, or a toy that learns here to reason in writing, for `base_steps`."""
    train, validation = (problems(source, split) for split in ("train", "validation"))
    body, tokenizer = _backbone(backbone, train, how.seed, **toy)
    made = Start(body, tokenizer, train, validation, thoughts, how, folder)
    if base_steps:
        made.body, made.tokenizer = _taught(made, base_steps)
    return made


def _backbone(name: str, train: Dataset, seed: int, **toy: Any) -> tuple[Any, Any]:
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import load_tokenizer, word_tokenizer

    if not name.startswith("toy:"):
        return load_backbone(name, dtype="float32"), load_tokenizer(name, eos=True)
    words = _pieces([PHRASES, *(text for example in train for text in (example.question, *example.steps, example.answer))])
    tokenizer = word_tokenizer(words, pieces=PIECES)
    return load_backbone(name, seed=seed, vocab_size=len(tokenizer), **toy), tokenizer


def _pieces(texts: list[str]) -> list[str]:
    return sorted({piece for text in texts for piece in re.findall(PIECES, text)})


def _taught(begin: Start, steps: int) -> tuple[Any, Any]:
    model = ENTRANTS["cot"](replace(begin, folder=begin.folder / "base"), steps).model
    return model.backbone, model.tokenizer


def run(methods: Sequence[str], begin: Start, budget: Budget, test: Dataset, folder: Path, decoding: Decoding) -> None:
    """Trains and measures each method into `folder`/<method>; one that is there already is left as it is.

    A method that the start gives nothing to do (no hard token for TaH), or whose training diverged for good, is left out, and its folder
    says why.
    """
    for name in methods:
        entrant(name)
    for name in methods:
        own = folder / name
        if (own / SPENT).exists():
            continue
        try:
            trained, spent = learn(name, replace(begin, folder=own), budget)
        except (DataError, TrainingError) as error:
            log.warning("%s is left out: %s", name, error)
            files.write_json(own / SPENT, {"left_out": str(error)})
            continue
        evaluate(Latent(trained.model, **trained.options), test, "number", own / "test", decoding, label=name)
        files.write_json(own / SPENT, {"prompted": trained.prompted, "arm": trained.arm or name, "spent": spent})


def learn(name: str, begin: Start, budget: Budget) -> tuple[Trained, dict[str, Any]]:
    """A method trained within the budget, and what that took: steps, forward tokens, seconds, CPU seconds.

    A training that missed its budget by more than `MISSED` is planned again from what it spent; the nearest of `TRIES` is kept.
    """
    train = entrant(name)
    if budget.unit == "steps":
        return _trained(train, begin, int(budget.amount))
    with tempfile.TemporaryDirectory() as scratch:
        probes = (1, budget.probe, 3 * budget.probe)  # the first one warms up
        costs = {steps: _trained(train, replace(begin, folder=Path(scratch)), steps)[1][budget.unit] for steps in probes}
    del costs[1]
    tried: dict[int, tuple[Trained, dict[str, Any]]] = {}
    missed: dict[int, float] = {}
    while len(tried) < TRIES and min(missed.values(), default=1.0) > MISSED:
        steps = planned(costs, budget.amount)
        if steps in tried:
            break
        tried[steps] = _trained(train, begin, steps)
        costs[steps] = tried[steps][1][budget.unit]
        missed[steps] = abs(costs[steps] / budget.amount - 1)
    return tried[min(missed, key=missed.__getitem__)]


def planned(costs: Mapping[int, float], amount: float) -> int:
    """The steps that should cost `amount`, by the line through two of the `costs` {steps: cost}: those around it, else the nearest.

    Where more steps cost less (a disturbed measurement), by what a step costs at least; 0 where nothing costs anything.
    """
    near = sorted(costs.items(), key=lambda one: abs(one[1] - amount))
    around = [next((one for one in near if (one[1] > amount) == above), None) for above in (False, True)]
    (steps, cost), (other, its) = around if all(around) else near[:2]
    each = (its - cost) / (other - steps)
    if each <= 0:
        each = min(cost / steps, its / other)
    return max(1, round(steps + (amount - cost) / each)) if each else 0


def _trained(train: Any, begin: Start, steps: int) -> tuple[Trained, dict[str, Any]]:
    """What a training of so many steps made, and took; its folder is named by them, its new weights do not depend on earlier trainings."""
    torch.manual_seed(begin.how.seed)
    own = replace(begin, meter=Meter(), folder=begin.folder / f"{steps}-steps")
    trained, meter = train(own, steps), own.meter
    took = {"tokens": meter.tokens, "seconds": round(meter.seconds, 2), "cpu_seconds": round(meter.cpu_seconds, 2)}
    return trained, {"steps": steps if meter.tokens else 0, **took}


def table(folder: Path) -> list[dict[str, Any]]:
    """One row a method, read back from what `run` wrote: accuracy with its interval, thoughts, written tokens, passes, time, cost.

    `passes` are those after the prompt; `thoughts` the passes that wrote nothing, and what was read with the prompt in the prefix
    methods; `milliseconds` an answer in a batch; steps, tokens and seconds are the training's.
    """
    done = {name: record for name, record in _records(folder).items() if "spent" in record}
    return [
        {"method": name, **_measured(read_samples(folder / name / "test"), record["prompted"]), **record["spent"]}
        for name, record in done.items()
    ]


def left_out(folder: Path) -> dict[str, str]:
    """{method: why} of those that could not take part."""
    return {name: record["left_out"] for name, record in _records(folder).items() if "left_out" in record}


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: files.read_json(folder / name / SPENT) for name in ENTRANTS if (folder / name / SPENT).exists()}


def _measured(answers: list[dict[str, Any]], prompted: int) -> dict[str, Any]:
    accuracy = proportion_interval(sum(answer["is_correct"] for answer in answers), len(answers))
    passes, written, seconds = (fmean(answer[name] for answer in answers) for name in ("passes", "output_tokens", "processing_time"))
    spread = accuracy.named("accuracy") | {"questions": accuracy.n}
    return spread | {"thoughts": passes - written + prompted, "written": written, "passes": passes, "milliseconds": 1000 * seconds}


def against_papers(folder: Path, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The papers' numbers for the methods in `folder` beside ours, with the settings that differ (see `reported.compared`)."""
    ours, rows = reported.of_parameters(parameters), {row["method"]: row for row in table(folder)}
    written = {name: rows[name] for name in ("cot", "no_cot") if name in rows}
    found = []
    for name in (name for name in rows if name in papers.papers()):
        arms = written | {_records(folder)[name]["arm"]: rows[name]}
        found += [{"method": name, **row} for row in reported.compared(name, ours, arms, only=arms)]
    return found
