"""What the notebooks call: data, a model to train, its evaluation at every speed."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.backends import Latent
from lab.data.answers import strict
from lab.data.examples import Dataset, Example
from lab.data.source import Source
from lab.evaluate import Decoding
from lab.evaluate import evaluate as answer_all
from lab.latent.record import Responses
from lab.latent.sampling import Sampling
from lab.methods.colar import toy
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.model import ColarModel
from lab.methods.colar.policy import PUBLISHED, generate
from lab.running.records import read_metrics
from lab.stats import Interval, proportion_interval

WORLD = "permutations"


def questions(benchmark: str, split: str, count: int, seed: int, data: str = "") -> Dataset:
    """`count` problems (0 = all) of the toy world `permutations`, or of a benchmark from the hub or local files."""
    if benchmark == WORLD:
        return toy.examples(split, count, seed)
    from lab.data import load_benchmark

    return load_benchmark(benchmark, split, data, limit=count or None)


def start(backbone: str, checkpoint: str, settings: ColarSettings, seed: int, dtype: str = "float32") -> ColarModel:
    """A model to train: a checkpoint to go on from, a toy in the toy world's vocabulary, or a hub id or folder dressed for CoLaR."""
    import lab

    if checkpoint:
        official = {"backbone": backbone, "lora_alpha": settings.lora_alpha, "lp_intermediate_size": settings.lp_intermediate_size}
        model = lab.load(checkpoint, method="colar", **(official if checkpoint.endswith(".ckpt") else {}))
        model.adapt(settings)
        return model
    if backbone.startswith("toy:"):
        return toy.untrained(backbone, seed, settings)
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import load_tokenizer

    return ColarModel.start(load_backbone(backbone, dtype=dtype), load_tokenizer(backbone), settings)


def decoding(greedy: bool) -> dict[str, Any]:
    """Options of `generate`: published (thoughts, end and answer are drawn), or mean thoughts, likeliest end and answer."""
    if greedy:
        return {"sampling": Sampling(), "latent_temperature": 0.0, "end_temperature": 0.0}
    return {"sampling": PUBLISHED, "latent_temperature": 1.0, "end_temperature": 1.0}


def evaluate(
    model: ColarModel, data: Sequence[Example], speed: int | str, *, rule: str = "colar", repeats: int = 1, seed: int = 0, **options: Any
) -> tuple[dict[str, float], Responses]:
    """Accuracy, thoughts (# L) over all and over right answers, answer length and the share closed by the budget; nothing is kept.

    Args:
        repeats: answers a question, with draws of their own (5 as published).
        options: of `generate`; see `decoding`.
    """
    found = generate(model, data, repeats, speed=speed, seed=seed, **options)
    gold = [example.answer for example in data for _ in range(repeats)]
    right = [strict(row.text, answer, rule)[1] for row, answer in zip(found.rows, gold, strict=True)]
    rows = [
        {"is_correct": ok, "thoughts": row.thoughts, "output_tokens": len(row.ids), "capped": row.capped}
        for row, ok in zip(found.rows, right, strict=True)
    ]
    return _numbers(rows, proportion_interval(sum(right), len(right))), found


def recorded(
    model: ColarModel,
    data: Sequence[Example],
    speeds: Sequence[int],
    folder: Path,
    benchmark: str,
    way: dict[str, Any],
    how: dict[str, Any],
    *,
    rule: str = "colar",
    thoughts: int = 64,
    repeats: int = 1,
    processes: int = 1,
) -> list[dict[str, float]]:
    """One row a speed as `evaluate` has them, from answers that are kept in `folder`: a killed evaluation goes on where it was.

    Args:
        way: see `decoding`. how: the other settings of a `lab.evaluate.Decoding` (max_new_tokens, batch, seed).
        processes: share the questions.
    """
    drawing = {name: way[name] for name in ("latent_temperature", "end_temperature")}
    said, source = Decoding.check(**way["sampling"].model_dump(), **how), Source.check(benchmark=benchmark)
    kept = {"rule": rule, "scorer": lambda text, example: source.score(text, example.answer, rule), "processes": processes}
    rows = []
    for speed in speeds:
        answering = Latent(model, speed=speed, thoughts=thoughts, **drawing)
        found = answer_all(answering, data, benchmark, folder / f"speed-{speed}", said, repeat=repeats, label=f"speed {speed}", **kept)
        rows.append({"speed": speed, **_numbers(found.rows, found.strict)})
    return rows


def _numbers(rows: Sequence[Mapping[str, Any]], accuracy: Interval) -> dict[str, float]:
    on_right = [row["thoughts"] for row in rows if row["is_correct"]]
    return {
        "accuracy": accuracy.mean,
        "low": accuracy.low,
        "high": accuracy.high,
        "thoughts": statistics.fmean(row["thoughts"] for row in rows),
        "thoughts_right": statistics.fmean(on_right) if on_right else float("nan"),
        "tokens": statistics.fmean(row["output_tokens"] for row in rows),
        "capped": statistics.fmean(row["capped"] for row in rows),
    }


def table(model: ColarModel, data: Sequence[Example], speeds: Sequence[int], **options: Any) -> list[dict[str, float]]:
    """One row a speed."""
    return [{"speed": speed, **evaluate(model, data, speed, **options)[0]} for speed in speeds]


def both_ways(model: ColarModel, data: Sequence[Example], speeds: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """`table` with the likeliest thoughts and words, and with all of them drawn, as training by reinforcement sees them."""
    ways = {"greedy": decoding(True), "drawn": decoding(False)}
    return [{"decoding": name, **row} for name, way in ways.items() for row in table(model, data, speeds, **way, **options)]


def learnt(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What reinforcement changed: {speed, decoding: accuracy and thoughts before and after}, and the largest log-probability gap."""
    told: dict[str, Any] = {}
    for old, new in zip(before, after, strict=True):
        found = {f"{name} {when}": row[name] for name in ("accuracy", "thoughts") for when, row in (("before", old), ("after", new))}
        found |= {"gain": new["accuracy"] - old["accuracy"], "fewer": old["thoughts"] - new["thoughts"]}
        told[f"speed {old['speed']}, {old['decoding']}"] = found
    gaps = [row["logp_gap"] for row in read_metrics(folder) if "logp_gap" in row]
    return told | {"largest_logp_gap": max(gaps)} if gaps else told


def headline(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{speed: numbers} for the run's results."""
    taken = {"accuracy": "accuracy", "accuracy_low": "low", "accuracy_high": "high", "thoughts": "thoughts", "capped": "capped"}
    return {f"speed {row['speed']}": {name: row[column] for name, column in taken.items()} for row in rows}


def deviation(model: ColarModel, data: Sequence[Example], speed: int = 1) -> float:
    """The mean standard deviation of the latent head, in units of the embeddings' own, over the last prompt position of each question."""
    import torch

    from lab.latent.loop import Prompt, read_prompt

    with torch.no_grad():
        ids = [[*model.prompt(example, speed), model.config.sep_id] for example in data]
        _, h, _ = read_prompt(model.decoder, Prompt.of_ids(model.decoder, ids))
        return float(model.parts.head(h)[1].mean())


def validator(data: Sequence[Example], speed: int, **options: Any) -> Callable[[ColarModel], dict[str, float]]:
    """A function that `fit` and `reinforce` call to validate."""

    def run(model: ColarModel) -> dict[str, float]:
        row, _ = evaluate(model, data, speed, **options)
        return {"score": row["accuracy"], "thoughts": row["thoughts"], "capped": row["capped"]}

    return run


def folder_of(run_folder: Path) -> Path:
    """The newest model of a training step: after RL where there was one, else after SFT."""
    return run_folder / "rl" if (run_folder / "rl").is_dir() else run_folder / "sft"
