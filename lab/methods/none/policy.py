"""Plain sampling from the backbone through the one loop, and the record of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lab.errors import SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import FINISH, Budget, Prompt, rollout
from lab.latent.policy import Policy
from lab.latent.sampling import Sampling
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import stop_ids
from lab.trace import Trace


@dataclass(frozen=True)
class Answer:
    """One sampled answer: question and sample number, prompt and answer ids, log-probability of each, how it ended, its text."""

    question: int
    sample: int
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    finish: str
    text: str


@dataclass(frozen=True)
class Answers:
    """The answers to a list of questions, ordered by question and sample."""

    rows: list[Answer]
    tokenizer: Any = None

    @property
    def texts(self) -> list[str]:
        """The text of each answer."""
        return [row.text for row in self.rows]

    def trace(self) -> Trace:
        """The record that views read: one row per answer and per token of prompt and answer."""
        samples = [
            {"question": a.question, "sample": a.sample, "text": a.text, "prompt": self._text(a.prompt), "finish": a.finish}
            for a in self.rows
        ]
        return Trace.build("none", samples=samples, tokens=[token for answer in self.rows for token in self._tokens(answer)])

    def _tokens(self, answer: Answer) -> Iterator[dict[str, Any]]:
        roles = ["prompt"] * len(answer.prompt) + ["answer"] * len(answer.ids)
        probs = [float("nan")] * len(answer.prompt) + [min(1.0, float(torch.tensor(value).exp())) for value in answer.logprobs]
        for pos, (token, role, prob) in enumerate(zip(answer.prompt + answer.ids, roles, probs, strict=True)):
            key = {"question": answer.question, "sample": answer.sample, "pos": pos}
            yield key | {"id": token, "text": self._text([token]), "role": role, "prob": prob, "iterations": 1}

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)


def generate(
    model: LatentModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    first: int = 0,
    batch: int = 64,
    thinking: bool | None = None,
) -> Answers:
    """Answers of the plain model; they do not depend on `batch` or on the other questions.

    Args:
        sampling: greedy where None.
        first: number of the first question (draws are keyed by seed, question and sample).
        batch: most rows at a time; prompts of like length go together.
        thinking: switch of the chat template, where it has one.
    """
    if samples < 1 or max_new_tokens < 1:
        raise SettingsError(f"samples = {samples} and max_new_tokens = {max_new_tokens}: both must be at least 1.")
    prompts = [model.prompt_ids(question, thinking=thinking) for question in questions]
    decoder, stops = decoder_for(model.backbone), () if model.tokenizer is None else tuple(stop_ids(model.tokenizer, model.backbone))
    policy, budget = Policy(decoder, stops, sampling), Budget(answer=max_new_tokens)
    rows: list[Answer] = []
    for group in _groups(prompts, max(1, batch // samples)):
        number = torch.tensor([first + i for i in group for _ in range(samples)], device=model.device)
        draws = Keyed.of(seed, number, torch.arange(samples, device=model.device).repeat(len(group)))
        done = rollout(
            decoder, policy, Prompt.of_ids(decoder, [prompts[i] for i in group]), samples, draws, budget=budget, keep=("logprob",)
        )
        rows += _rows(model, prompts, group, samples, first, done)
    return Answers(sorted(rows, key=lambda row: (row.question, row.sample)), model.tokenizer)


def _groups(prompts: list[list[int]], size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _rows(model: LatentModel, prompts: list[list[int]], group: list[int], samples: int, first: int, done: Any) -> Iterator[Answer]:
    logprobs = done.notes["logprob"].tolist()
    for place, ids in enumerate(done.answers()):
        question, finish = group[place // samples], FINISH[int(done.finish[place])]
        text = "" if model.tokenizer is None else model.tokenizer.decode(ids)
        yield Answer(first + question, place % samples, prompts[question], ids, logprobs[place][: len(ids)], finish, text)
