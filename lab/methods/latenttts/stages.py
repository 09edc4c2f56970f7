"""What the notebooks call: a generator to sample from, annotated sets, reward models, curves of several samplers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lab.data.examples import Dataset
from lab.errors import RunError, SettingsError, unknown
from lab.files import read_lines
from lab.methods.latenttts import toy
from lab.methods.latenttts.model import RewardModel
from lab.methods.latenttts.objective import recalls
from lab.models.latent_model import LatentModel
from lab.running.records import read_metrics
from lab.sampling.curves import Scores, against_vote, curves, scored
from lab.sampling.labels import Labelling, label
from lab.sampling.pool import Pool, sample
from lab.sampling.records import Asked, dropped_in, read_folder
from lab.sampling.sampler import Sampler
from lab.sampling.search import accuracy, search, tree_trace
from lab.trace import Trace

GENERATOR, SETS = "generator", ("train", "validation")


def questions(benchmark: str, split: str, count: int, seed: int, data: str = "") -> Dataset:
    """`count` problems (0 = all): of the toy world `maxmin`, or of a benchmark from the hub or local files."""
    if benchmark == "maxmin":
        return toy.questions({"train": "labels", "validation": "held_out"}.get(split, split), count, seed)
    from lab.data import load_benchmark

    return load_benchmark(benchmark, split, data, limit=count or None)


def generator(name: str, seed: int, folder: Path, steps: int, stop_at: float, logger: Any = None) -> tuple[LatentModel, dict[str, float]]:
    """The model that thinks, with what its training said: `toy` is trained here and saved in `folder`, else a checkpoint of any layout."""
    if name != "toy":
        import lab

        return lab.load(name), {}
    model, right = toy.generator(seed, folder / "training", steps=steps, stop_at=stop_at, logger=logger)
    model.save(folder / GENERATOR, overwrite=True)
    return model.eval(), {"generator_accuracy": right}


def generator_here(name: str, step: Any) -> LatentModel:
    """The generator of a step's run, or the checkpoint named."""
    import lab

    return loaded(name, step.input("annotate")) if name == "toy" else lab.load(name)


def reward_here(name: str, model: LatentModel, step: Any) -> RewardModel:
    """The reward model of a step's run, or the checkpoint named, checked against the generator."""
    import lab

    reward = lab.load(name or step.input("train_rm") / "rm")
    if not isinstance(reward, RewardModel):
        raise SettingsError(f"{name!r} is a model of method {reward.method!r}, no reward model.")
    reward.check_for(model)
    return reward


def check_main(main: str, made: Sequence[Sampler]) -> None:
    """SettingsError with the closest match where `main` names none of the samplers."""
    if main not in (labels := [sampler.label for sampler in made]):
        raise unknown("sampler", main, labels)


def loaded(name: str, annotated: Path) -> LatentModel:
    """The generator of an annotation: the toy saved beside it, or the checkpoint it was made with."""
    import lab

    return lab.load(annotated / GENERATOR if name == "toy" else name)


def annotated(
    model: LatentModel,
    data: Dataset,
    sampler: Sampler,
    n: int,
    how: Labelling,
    folder: Path,
    name: str,
    processes: int = 1,
    **budget: Any,
) -> dict[str, Any]:
    """Samples and labels one set into `folder`/<name>-samples and `folder`/<name>; what came of it."""
    pool = sample(model, data, sampler, n, folder / f"{name}-samples", processes=processes, **budget)
    kept = label(model, pool, sampler, how, folder / name, processes=processes)
    gone = dropped_in(folder / name)
    return {
        "questions": len(pool.asked),
        "kept": len(kept),
        "dropped": len(gone),
        "all_right": sum(bool(question.corrects.all()) for question in pool.asked),
        "sample_mean": float(np.mean([float(question.corrects.float().mean()) for question in pool.asked])),
        "mean_label": float(np.mean([float(question.labels.nanmean()) for question in kept])) if kept else float("nan"),
    }


def label_table(folder: Path) -> list[dict[str, float]]:
    """Per step: the mean label, and the share of labels strictly between 0 and 1 (the ones that teach something new)."""
    asked = read_folder(folder)
    rows = []
    for step in range(max(q.thoughts.shape[1] for q in asked)):
        values = [float(v) for q in asked if step < q.labels.shape[1] for v in q.labels[q.counts > step, step]]
        rows.append({"thought": step + 1, "mean": float(np.mean(values)), "undecided": float(np.mean([0 < v < 1 for v in values]))})
    return rows


def learning_table(folder: Path) -> pd.DataFrame:
    """The losses a step logged, for `figures.learning_curves`."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return pd.DataFrame([{"step": row["step"], "arm": "reward model", "mean": row["loss"]} for row in rows])


def dropped_right(folder: Path, name: str) -> int:
    """How many questions a set lost because all their samples were right."""
    gone = set(dropped_in(folder / name))
    return sum(bool(q.corrects.all()) for q in read_folder(folder / f"{name}-samples") if q.number in gone)


def validation_table(model: RewardModel, asked: Sequence[Asked], dropped: int) -> list[dict[str, Any]]:
    """Best-of-N accuracy on a validation set for every N it holds."""
    found = recalls(model, asked, dropped)
    return [{"metric": name, "value": value} for name, value in found.items()]


def samplers(noises: Sequence[float], dropouts: Sequence[float], regime: str, temperature: float, seed: int) -> list[Sampler]:
    """One sampler per strength."""
    shared = {"temperature": temperature, "seed": seed}
    made = [Sampler.check(by="dropout", strength=p, regime=regime, **shared) for p in dropouts]
    return made + [Sampler.check(by="noise", strength=sigma, **shared) for sigma in noises]


def pools(folder: Path) -> dict[str, Pool]:
    """The recorded runs in a step's folder, by the sampler's label; RunError if there is none."""
    found = [Pool(path.parent) for path in sorted(folder.glob("samples-*/sampling.json"))]
    if not found:
        raise RunError(f"{folder} holds no recorded samples; run the sample step first.")
    return {Sampler.check(**pool.facts["sampler"]).label: pool for pool in found}


def curve_rows(
    found: dict[str, Pool], reward: RewardModel | None, ns: Sequence[int] = (), processes: int = 1
) -> tuple[list[dict], dict[str, Scores]]:
    """Rows of all samplers' curves, with a column `sampler`, and every sample's score where there is a reward model."""
    rows, scores = [], {}
    for name, pool in found.items():
        scores[name] = None if reward is None else scored(pool, reward, processes)
        rows += [{"sampler": name, **row} for row in curves(pool, ns, scores[name])]
    return rows, scores


def recorded_curves(folder: Path, sampler: str) -> pd.DataFrame:
    """The rows of a sample step's curves that belong to one sampler, its searches included."""
    table = pd.read_csv(folder / "tables" / "curves.csv")
    return table[table["sampler"] == sampler]


def beam_rows(
    model: LatentModel, reward: RewardModel | None, pool: Pool, beams: Sequence[int], budget: int, folder: Path, most: int = 0, **how: Any
) -> list[dict[str, Any]]:
    """Accuracy of beam search on the pool's first `most` questions, over all and over the mixed ones.

    Args:
        beams: how many are kept; each draws `budget` // beams candidates a step. budget: 0 searches nothing.
        how: `answer`, `batch` and `processes` of `search`.
    """
    if reward is None or not budget:
        return []
    asked, sampler = pool.asked[: most or None], Sampler.check(**pool.facts["sampler"])
    told, rows = {name: pool.facts[name] for name in ("rule", "thoughts")}, []
    for kept in beams:
        lines = search(model, reward, asked, sampler, kept, max(1, budget // kept), folder, **told, **how)
        subsets = [None, {question.number for question in asked if question.mixed}]
        rows += [
            {"sampler": sampler.label, **accuracy(lines, kept, max(1, budget // kept), numbers)} for numbers in subsets if numbers != set()
        ]
    return rows


def headline(rows: Sequence[dict], found: dict[str, Pool], scores: dict[str, Scores]) -> dict[str, dict[str, float]]:
    """{sampler: {measure and N: number}} of the curves' ends, and best-of-N minus vote on the mixed questions."""
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        name = row["measure"].replace(" ", "_").replace(",", "")
        ends = {1, 4, 16, found[row["sampler"]].n}
        if row["subset"] == "all" and row["n"] in ends:
            result.setdefault(row["sampler"], {})[f"{name}_{row['n']}"] = row["mean"]
        elif row["subset"] == "mixed" and row["n"] == found[row["sampler"]].n and name in ("vote", "best_of_N", "weighted_vote", "mean"):
            result.setdefault(row["sampler"], {})[f"mixed_{name}"] = row["mean"]
    for name, pool in found.items():
        mixed = sum(question.mixed for question in pool.asked)
        result[name]["mixed_questions"] = mixed
        if scores.get(name) is not None and mixed > 1:
            result[name]["mixed_best_minus_vote"] = against_vote(pool, scores[name]).mean
    return result


def shown(pool: Pool, count: int) -> list[int]:
    """Numbers of the most mixed questions, those of which nearest to half of the samples are right."""
    order = sorted(pool.asked, key=lambda question: (abs(float(question.corrects.float().mean()) - 0.5), question.number))
    return [question.number for question in order[:count]]


def place(pool: Pool, number: int) -> int:
    """Where a question stands in its pool."""
    return next(i for i, question in enumerate(pool.asked) if question.number == number)


def traces(found: dict[str, Pool], numbers: Sequence[int], reward: RewardModel | None, n: int) -> dict[str, Trace]:
    """The same questions as every sampler answered them."""
    score = None if reward is None else lambda question: reward.score([question])[0]
    return {name: pool.trace(numbers, score, min(n, pool.n)) for name, pool in found.items()}


def tree(folder: Path, pool: Pool, numbers: Sequence[int]) -> Trace | None:
    """The widest recorded search that kept more than one beam, of one question; None if there is none."""
    found = sorted(folder.glob("beams-*.jsonl"), key=lambda path: abs(int(path.stem.split("-")[1].split("x")[0]) - 4))
    lines = {line["number"]: line for line in read_lines(found[0])} if found else {}
    number = next((number for number in numbers if number in lines), next(iter(lines), None))
    return None if number is None else tree_trace(lines[number], pool.asked[place(pool, number)])


def cloud(question: Asked) -> list[dict[str, Any]]:
    """All thoughts of a question's samples on the plane of their two main directions: x, y, step, sample, correct."""
    live = [(sample, step) for sample, count in enumerate(question.counts.tolist()) for step in range(count)]
    points = np.stack([question.thoughts[at].float().numpy() for at in live])
    points = points - points.mean(0)
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    flat = points @ axes[:2].T
    right = question.corrects.tolist()
    return [
        {"x": float(x), "y": float(y), "step": step + 1, "sample": sample, "correct": right[sample]}
        for (sample, step), (x, y) in zip(live, flat, strict=True)
    ]
