"""Are the thoughts doing anything? The same questions with thoughts as they are, and with thoughts that cannot carry the answer.

A model answers once; then its own thoughts are replaced (by nothing, their mean, another question's, noise of the same size, …), their
number kept, and it answers again. What an intervention does not cost, the thoughts did not do.
Works on every model that thinks at extra positions or in its prompt. Axes: Q questions, T thoughts, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lab.data.answers import score
from lab.data.examples import Example
from lab.errors import RunError, SettingsError, unknown
from lab.latent.policy import Policy, Rows
from lab.models.latent_model import LatentModel
from lab.stats import proportion_interval

PREFIX = ("lta", "softcot")
Right = Callable[[str, str], bool]
FEEDBACK = ("coconut", "codi", "adaptive", "colar")


@dataclass(frozen=True)
class Thoughts:
    """The thoughts of all questions: `vectors` (Q, T, D), zero beyond `counts` (Q,)."""

    vectors: Tensor
    counts: Tensor

    @property
    def real(self) -> Tensor:
        """(Q, T, 1) 1 where there is a thought."""
        steps = torch.arange(self.vectors.shape[1], device=self.counts.device)
        return (steps < self.counts[:, None])[..., None].to(self.vectors.dtype)

    def mean(self) -> Tensor:
        """(T, D): the mean thought of each step."""
        return (self.vectors * self.real).sum(0) / self.real.sum(0).clamp(min=1)

    def changed(self, vectors: Tensor) -> "Thoughts":
        return Thoughts(vectors * self.real, self.counts)


def zeroed(thoughts: Thoughts, seed: int) -> Thoughts:
    """Nothing at all, at the same number of positions."""
    return thoughts.changed(torch.zeros_like(thoughts.vectors))


def averaged(thoughts: Thoughts, seed: int) -> Thoughts:
    """The mean thought of each step over all questions: what does not depend on the question."""
    return thoughts.changed(thoughts.mean().expand_as(thoughts.vectors))


def swapped(thoughts: Thoughts, seed: int) -> Thoughts:
    """Those of another question with the most similar number of thoughts (its steps, cut or filled with their mean)."""
    order = torch.argsort(thoughts.counts, stable=True)
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)
    filled = torch.where(thoughts.real.bool(), thoughts.vectors, thoughts.mean())
    return thoughts.changed(filled[donor])


def noise(thoughts: Thoughts, seed: int) -> Thoughts:
    """Gaussian noise of each thought's norm."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(thoughts.vectors.shape, generator=generator).to(thoughts.vectors)
    return thoughts.changed(eps * (thoughts.vectors.norm(dim=-1, keepdim=True) / eps.norm(dim=-1, keepdim=True)))


def shuffled(thoughts: Thoughts, seed: int) -> Thoughts:
    """A question's own thoughts in another order."""
    generator = torch.Generator().manual_seed(seed)
    out = thoughts.vectors.clone()
    for row, count in enumerate(thoughts.counts.tolist()):
        out[row, :count] = thoughts.vectors[row, torch.randperm(count, generator=generator)]
    return Thoughts(out, thoughts.counts)


def truncated(thoughts: Thoughts, seed: int) -> Thoughts:
    """The first half of the thoughts only."""
    return Thoughts(thoughts.vectors, thoughts.counts // 2)


def without(step: int) -> Callable[[Thoughts, int], Thoughts]:
    """All thoughts but one, which is replaced by its mean over questions."""

    def change(thoughts: Thoughts, seed: int) -> Thoughts:
        out = thoughts.vectors.clone()
        out[:, step] = thoughts.mean()[step]
        return thoughts.changed(out)

    return change


INTERVENTIONS: dict[str, Callable[[Thoughts, int], Thoughts]] = {
    "zeroed": zeroed,
    "mean": averaged,
    "another question's": swapped,
    "noise": noise,
    "shuffled": shuffled,
    "first half": truncated,
}


class Fixed:
    """A policy that makes given thoughts and as many of them as given; everything else is the policy's own."""

    def __init__(self, policy: Policy, thoughts: Thoughts):
        self._policy, self._thoughts = policy, thoughts

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def halt(self, rows: Rows) -> Tensor:
        return rows.thoughts >= self._thoughts.counts[rows.index]

    def thought(self, rows: Rows) -> Tensor:
        return self._thoughts.vectors[rows.index, rows.thoughts].to(rows.h.dtype)


def ablate(
    model: LatentModel,
    examples: Sequence[Example],
    right: Right | str,
    *,
    interventions: Sequence[str] = tuple(INTERVENTIONS),
    each: bool = False,
    seed: int = 0,
    **generate: Any,
) -> list[dict[str, Any]]:
    """Rows {intervention, accuracy, low, high, changed, questions}: `as they are` first; `changed` is the share of answers that differ.

    Args:
        right: (text, gold answer) -> right or wrong; or a benchmark, whose answers are then read leniently.
        each: also leave out every thought in turn.
        generate: options of the model's `generate`, greedy by default.
    Raises SettingsError for a method without thoughts to replace or an unknown intervention.
    """
    for name in interventions:
        if name not in INTERVENTIONS:
            raise unknown("intervention", name, INTERVENTIONS)
    if model.method not in (*PREFIX, *FEEDBACK):
        raise SettingsError(f"Method {model.method!r} has no thoughts to replace; this works on {', '.join((*FEEDBACK, *PREFIX))}.")
    own, thoughts = _observe(model, examples, seed, generate)
    changes = {name: INTERVENTIONS[name] for name in interventions}
    if each:
        changes |= {f"without thought {step + 1}": without(step) for step in range(thoughts.vectors.shape[1])}
    texts = {"as they are": own} | {
        name: _again(model, examples, change(thoughts, seed), seed, generate) for name, change in changes.items()
    }
    judge = leniently(right) if isinstance(right, str) else right
    return [_row(name, found, own, examples, judge) for name, found in texts.items()]


def _observe(model: LatentModel, examples: Sequence[Example], seed: int, generate: dict[str, Any]) -> tuple[list[str], Thoughts]:
    if model.method in PREFIX:
        from lab.methods.lta.policy import make_all, prompted

        with torch.no_grad():
            vectors = make_all(model, [prompted(model, example) for example in examples])
        return _again(model, examples, None, seed, generate), Thoughts(vectors, torch.full((len(vectors),), vectors.shape[1]))
    found = model.generate(examples, vectors=True, seed=seed, **generate)
    counts = torch.tensor([len(each) for each in found.vectors], device=model.device)
    if int(counts.max()) == 0:
        raise SettingsError("The model made no thoughts on these questions, so there is nothing to replace.")
    return found.texts, Thoughts(torch.nn.utils.rnn.pad_sequence(found.vectors, batch_first=True), counts)


def _again(model: LatentModel, examples: Sequence[Example], thoughts: Thoughts | None, seed: int, generate: dict[str, Any]) -> list[str]:
    if thoughts is None:
        return model.generate(examples, seed=seed, **generate).texts
    if model.method in PREFIX:
        return model.generate(examples, seed=seed, vectors=thoughts.vectors[:, : int(thoughts.counts.max())], **generate).texts
    texts, size = [], generate.get("batch", 64)
    for start in range(0, len(examples), size):
        part = Thoughts(thoughts.vectors[start : start + size], thoughts.counts[start : start + size])
        options = {**generate, "batch": size, "sort": False, "first": start, "seed": seed}
        texts += model.generate(examples[start : start + size], wrap=partial(Fixed, thoughts=part), **options).texts
    return texts


def _row(name: str, texts: list[str], own: list[str], examples: Sequence[Example], right: Right) -> dict[str, Any]:
    hits = sum(right(text, example.answer) for text, example in zip(texts, examples, strict=True))
    interval = proportion_interval(hits, len(texts))
    changed = sum(a != b for a, b in zip(texts, own, strict=True)) / len(texts)
    spread = {"accuracy": interval.mean, "low": interval.low, "high": interval.high}
    return {"intervention": name, **spread, "changed": changed, "questions": len(texts)}


def leniently(benchmark: str) -> Right:
    """Whether an output is right by the lenient rules for a benchmark or kind of answer."""
    return lambda text, gold: bool(score(text, gold, benchmark).lenient_correct)


def toy_subject(paper: str, arm: str = "", seed: int = 0) -> tuple[LatentModel, Sequence[Example], Right]:
    """The model of the newest toy run of a paper (made where there is none), its test questions, and what judges answers to them."""
    import lab
    from lab.data.source import Source
    from lab.models.layouts import load
    from lab.runs import latest, open_run

    try:
        folder = latest(paper, "toy")
    except RunError:
        folder = lab.run(paper, "toy", {"seed": str(seed)})
    values = open_run(folder).step("evaluate").info["parameters"]
    if "hops" not in values:
        raise SettingsError(f"The toy of {paper!r} asks no questions in words; name a model and a benchmark.")
    source = Source.check(**{name: values[name] for name in Source.model_fields if name in values})
    return (
        load(folder / "train" / (arm or paper)),
        source.held_out(),
        lambda text, gold: bool(source.score(text, gold, paper).strict_correct),
    )
