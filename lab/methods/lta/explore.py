"""What the notebooks look at: the thoughts of each model, how alike they are, and which tokens they are near."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.data.examples import Dataset
from lab.methods.lta import toy
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.policy import make_all, prompted
from lab.methods.lta.prompting import Prompted
from lab.methods.lta.stages import TOY, toy_model, trained
from lab.methods.lta.tasks import dataset
from lab.trace import Trace


def explored(folder: Path, values: dict[str, Any]) -> dict[str, ThoughtModel]:
    """The models to look at, by arm."""
    if values["large_model_id"] != TOY:
        return {values["method"]: trained(folder, values)}
    return {arm: toy_model(folder, arm, values["seed"]) for arm in values["arms"]}


def asked(model: ThoughtModel, values: dict[str, Any]) -> list[Prompted]:
    """Test questions for a model: fresh ones of the micro-task, or a benchmark's."""
    count = values["questions"]
    if values["large_model_id"] == TOY:
        task = toy.WORLD.task(count, np.random.default_rng((values["seed"], 2)))
        return toy.questions(task, model.config.num_thought_tokens, solution=False, distinct=model.config.distinct_slots)
    data = dataset(values["task_name"], "test", values["data"], count, values["seed"])
    return [prompted(model, example) for example in data]


def inputs(model: ThoughtModel, data: Dataset) -> list[dict[str, str]]:
    """What the base and the thought generator read for each question, as text."""
    reader, rows = model.assistant_tokenizer or model.tokenizer, [prompted(model, example) for example in data]
    base = [model.tokenizer.decode(r.row.prompt) + "[thought]" * r.row.thoughts + model.tokenizer.decode(r.row.after) for r in rows]
    return [{"base reads": text, "generator reads": reader.decode(row.assistant)} for text, row in zip(base, rows, strict=True)]


def spread_rows(models: dict[str, ThoughtModel], asked: dict[str, list[Prompted]]) -> list[dict[str, Any]]:
    """By arm: variance of the thoughts over questions, mean cosine between different places, mean norm."""
    rows = []
    for arm, model in models.items():
        found = similarity(model, asked[arm])
        n = len(found["norm"])
        between = float((found["cosine"].sum() - n) / (n * (n - 1))) if n > 1 else 1.0
        rows.append({"arm": arm, "variance": float(found["variance"].mean()), "cosine": between, "norm": float(found["norm"].mean())})
    return rows


def thought_trace(model: ThoughtModel, rows: list[Prompted], k: int) -> Trace:
    """What the base reads, with the thoughts in their places, and of each thought norm and nearest tokens."""
    name = (lambda ids: " ".join(toy.WORLD.vocabulary[i] for i in ids)) if model.tokenizer is None else model.tokenizer.decode
    samples, thoughts, tokens = [], [], []
    for number, row in enumerate(rows):
        made = make_all(model, [row])[0].detach().float()
        samples.append({"question": number, "sample": 0, "prompt": name([*row.row.prompt, *row.row.after]), "text": ""})
        tokens += [{"question": number, "pos": pos, **read} for pos, read in enumerate(_read(model, row, made, name))]
        for place, near in enumerate(nearest_tokens(model, row, k)):
            top = {"top_texts": [text for text, _ in near], "top_probs": [value for _, value in near]}
            known = {"norm": float(made[place].norm()), "vector": made[place].tolist()}
            thoughts.append({"question": number, "sample": 0, "step": place, **known, **top})
    return Trace.build(model.method, samples=samples, tokens=tokens, thoughts=thoughts)


def _read(model: ThoughtModel, row: Prompted, made: torch.Tensor, name: Callable[[list[int]], str]) -> Iterator[dict[str, Any]]:
    """What stands at each position, with the norm of the vector there: before the thoughts, the thoughts, after them."""
    table, space = model.decoder.table.weight.detach().float(), " " * (model.tokenizer is None)

    def words(ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        return ({"id": i, "text": name([i]) + space, "role": "prompt", "norm": float(table[i].norm())} for i in ids)

    yield from words(row.row.prompt)
    yield from ({"id": -1, "text": "", "role": "thought", "norm": float(vector.norm())} for vector in made)
    yield from words(row.row.after)


@torch.no_grad()
def similarity(model: ThoughtModel, rows: list[Any]) -> dict[str, np.ndarray]:
    """How thoughts relate: cosine between places (n, n) averaged over questions, variance over questions by place (n,), norms (n,)."""
    made = make_all(model, [prompted(model, row) for row in rows]).float()
    unit = torch.nn.functional.normalize(made, dim=-1)
    return {
        "cosine": (unit @ unit.transpose(1, 2)).mean(0).numpy(),
        "variance": made.var(0).mean(-1).numpy(),
        "norm": made.norm(dim=-1).mean(0).numpy(),
    }


@torch.no_grad()
def nearest_tokens(model: ThoughtModel, row: Any, k: int = 5) -> list[list[tuple[str, float]]]:
    """For each thought of a question, the tokens whose embeddings are most like it, with the cosine."""
    made = make_all(model, [prompted(model, row)])[0].float()
    table = torch.nn.functional.normalize(model.decoder.table.weight.float(), dim=-1)
    top = (torch.nn.functional.normalize(made, dim=-1) @ table.T).topk(k, -1)
    name = (lambda i: toy.WORLD.vocabulary[i]) if model.tokenizer is None else (lambda i: model.tokenizer.decode([i]))
    return [
        [(name(i), v) for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
