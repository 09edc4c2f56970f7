"""The toy generator of latent test-time scaling: max and min of digits from left to right, stopped before it is sure (`latenttts.md` 9)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lab.data.examples import Dataset
from lab.data.worlds.maxmin import MaxMin
from lab.latent.distill import cross_entropy
from lab.latent.plan import IGNORE, Kept, Plan, Row, collate
from lab.methods.coconut.config import CoconutSettings
from lab.methods.coconut.data import question_ids
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.objective import exact, run
from lab.models.backbones import load_backbone
from lab.models.tokenizers import word_tokenizer
from lab.train import TrainSettings, fit

SEEDS = {"train": 1_000_000, "labels": 2_000_000, "held_out": 3_000_000, "test": 4_000_000}
SHAPE = {"layers": 2, "hidden": 64, "intermediate": 256, "heads": 4, "max_positions": 64, "initializer_range": 0.06}


def questions(split: str, count: int, seed: int, operators: int = 3) -> Dataset:
    """`count` problems of a split; splits and seeds share no draw."""
    made = MaxMin(operators).examples(count, SEEDS[split] + seed)
    return Dataset("maxmin", split, tuple(made), f"made here from seed {seed}")


def untrained(seed: int, operators: int = 3, **shape: int | float) -> CoconutModel:
    """A two-layer GPT-2 that makes one thought an operator; `###` stands before its answers as in GSM8K-Aug."""
    tokenizer = word_tokenizer([*MaxMin(operators).vocabulary, "###"])
    backbone = load_backbone("toy:gpt2", vocab_size=len(tokenizer), seed=seed, **{**SHAPE, **shape})
    settings = CoconutSettings.check(c_thought=1, max_latent_stage=operators, stage=operators)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoconutModel.start(backbone, tokenizer, settings)


def rows(model: CoconutModel, data: Dataset) -> list[tuple[Row, tuple[int, ...]]]:
    """Training rows of the last stage, each with the ids of its running results."""
    made, s = Kept(), model.config
    for example in data:
        answer = model.tokenizer(f"### {example.answer}").input_ids
        after = (s.end_id, *answer, s.eos_id)
        prompt = (*question_ids(example.question, model.tokenizer), s.start_id)
        labels = (IGNORE,) * (len(prompt) + 1) + after[1:]
        steps = tuple(model.tokenizer(step).input_ids[0] for step in example.steps)
        made.add(example.id, (Row(prompt, after, labels, len(steps)), steps))
    return made.checked().rows


class Aided:
    """Cross-entropy on the answer, and on the running result that each thought should spell through the vocabulary head."""

    feeds_back = True

    def __call__(self, model: CoconutModel, batch: "Stepped") -> tuple[Tensor, dict[str, Tensor]]:
        passes = run(model, batch.plan)
        answer = cross_entropy(model.decoder, *batch.plan.predictions(passes))
        steps = cross_entropy(model.decoder, passes.before_thought().flatten(0, 1), batch.steps.flatten())
        return answer + steps, {"answer": answer, "steps": steps}

    def count(self, batch: "Stepped") -> int:
        """Rows: every one has as many labels as the others."""
        return len(batch.steps)


class Stepped:
    """A plan and the running results (R, T) of its rows."""

    def __init__(self, plan: Plan, steps: Tensor):
        self.plan, self.steps = plan, steps

    def to(self, device) -> "Stepped":
        return Stepped(self.plan.to(device), self.steps.to(device))


def batch_of(made: list[tuple[Row, tuple[int, ...]]]) -> Stepped:
    """The collator."""
    return Stepped(collate([row for row, _ in made]), torch.tensor([steps for _, steps in made]))


def generator(
    seed: int, folder: Path, *, steps: int = 400, stop_at: float = 0.74, operators: int = 3, logger: Callable[..., None] | None = None
) -> tuple[CoconutModel, float]:
    """A generator trained until `stop_at` of 500 held-out answers are right (at most `steps` updates), and that share."""
    model = untrained(seed, operators)
    data = rows(model, questions("train", 128 * steps, seed, operators))
    judged = [row for row, _ in rows(model, questions("held_out", 500, seed, operators))]
    latest = {"score": 0.0}

    def validate(model: CoconutModel) -> dict[str, float]:
        latest["score"] = exact(model, judged)
        return {"score": latest["score"], "stop": latest["score"] >= stop_at}

    settings = TrainSettings.check(
        steps=steps, global_batch=128, lr=1.5e-3, schedule="constant", warmup_steps=min(50, steps // 2),
        order="as_given", eval_every=5, save_every=0, log_every=5, seed=seed, device="cpu",
    )  # fmt: skip
    loss = Aided()
    fit(model, data, batch_of, loss, settings, folder, logger, count=loss.count, validate=validate, label="generator")
    return model, latest["score"]
