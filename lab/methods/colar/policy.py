"""CoLaR at inference: think in predicted embeddings until the vocabulary head says `###`, then answer (`colar.md` 2.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.draws import Stream
from lab.latent.loop import Budget
from lab.latent.policy import Phase, Policy, Rows
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.colar.model import ColarModel

PUBLISHED = Sampling(temperature=1.0, top_p=0.9)


class ColarPolicy(Policy):
    """Thoughts from the latent head, ended by the separator.

    Args:
        latent_temperature: of the head's deviation; 0 feeds the mean.
        end_temperature: of the draw that may end the thoughts; 0 ends where the separator is the most likely token.
        min_thoughts: thoughts made before the separator counts (1 as published; LatentTTS allows 0).
    """

    def __init__(self, model: ColarModel, sampling: Sampling, latent_temperature: float, end_temperature: float, min_thoughts: int = 1):
        s = model.config
        super().__init__(model.decoder, (s.eos_id,), sampling, closing=(s.sep_id,), start=Phase.THINK)
        self.model, self.sep = model, s.sep_id
        self.latent_temperature, self.end_temperature, self.min_thoughts = latent_temperature, end_temperature, min_thoughts

    def halt(self, rows: Rows) -> Tensor:
        logits = self.decoder.logits(rows.h).float()
        ends = logits.argmax(-1) == self.sep
        if self.end_temperature > 0 or rows.wants("stop_prob"):
            chance = torch.softmax(logits / (self.end_temperature or 1.0), -1)[:, self.sep]
            rows.note("stop_prob", chance)
            if self.end_temperature > 0:
                ends = rows.draws.uniform(rows.thoughts + rows.said, Stream.STOP) < chance
        return ends & (rows.thoughts >= self.min_thoughts)

    def thought(self, rows: Rows) -> Tensor:
        eps = None
        if self.latent_temperature > 0:
            eps = rows.draws.normal(rows.thoughts, Stream.THOUGHT, (rows.h.shape[-1],))
        return self.model.thought(rows.h, eps, self.latent_temperature)


class Unforced(ColarPolicy):
    """As LatentTTS's released loop at its budget: after `most` thoughts in a row one word is said and thinking goes on, until the
    separator is said (`latenttts.md` 7.9). The separator is then one of the words.
    """

    def __init__(self, most: int, *args: Any):
        super().__init__(*args)
        self.most, self.closing = most, ()

    def begin(self, rows: Rows) -> None:
        self.since, self.ended = torch.zeros_like(rows.thoughts), torch.zeros_like(rows.thoughts, dtype=torch.bool)

    def halt(self, rows: Rows) -> Tensor:
        return super().halt(rows) | (rows.thoughts - self.since[rows.index] >= self.most)

    def resumes(self, token: Tensor, rows: Rows) -> Tensor:
        self.since[rows.index], self.ended[rows.index] = rows.thoughts, self.ended[rows.index] | (token == self.sep)
        return ~self.ended[rows.index]


def generate(
    model: ColarModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    speed: int | str = 2,
    thoughts: int = 64,
    sampling: Sampling = PUBLISHED,
    latent_temperature: float = 1.0,
    end_temperature: float = 1.0,
    min_thoughts: int = 1,
    force_end: bool = True,
    max_new_tokens: int = 16,
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or ids (ids as they are: question and speed, without the separator).

    Args:
        speed: the compression factor written into the prompt, or "auto".
        thoughts: the budget (64 on GSM8K, 128 on MATH).
        sampling: of the answer; the published default samples also at test time, `Sampling()` is greedy.
        force_end: close the thoughts at the budget; False says one word there and thinks on, as LatentTTS's released code does.
    """
    if latent_temperature < 0 or end_temperature < 0:
        raise SettingsError("Temperatures are 0 (take the mean, the most likely) or positive.")
    ids = [[*model.prompt(question, speed), model.config.sep_id] for question in questions]
    how = (model, sampling, latent_temperature, end_temperature, min_thoughts)
    policy = ColarPolicy(*how) if force_end else Unforced(thoughts, *how)
    budget = Budget(thoughts=thoughts if force_end else thoughts * max_new_tokens, answer=max_new_tokens)
    return respond(model, ids, lambda group: policy, Ask(samples=samples, budget=budget, **ask))
