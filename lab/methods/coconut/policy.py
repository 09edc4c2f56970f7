"""COCONUT at inference: read the question, think a fixed number of times, close, answer (`coconut.md` 2.7)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.loop import Budget
from lab.latent.policy import Counted, Rows
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.coconut.config import CoconutSettings
from lab.methods.coconut.model import CoconutModel

Compat = Literal["", "coconut"]


class OfficialStop(Counted):
    """As the official code: the first token is not tested for the end, and the method's own tokens may be said (`coconut.md` 7)."""

    def stopped(self, token: Tensor, rows: Rows) -> Tensor:
        return super().stopped(token, rows) & (rows.said > 0)


def policy(decoder, s: CoconutSettings, count: int | Tensor, sampling: Sampling | None = None, compat: Compat = "") -> Counted:
    """The policy of a model with settings `s` that makes `count` thoughts (one number, or (R,) by row)."""
    if compat not in ("", "coconut"):
        raise SettingsError(f"compat = {compat!r}: it is '' or 'coconut'.")
    kind = OfficialStop if compat else Counted
    own = (s.start_id, s.end_id, s.latent_id) if s.markers and not compat else ()
    closing = (s.end_id,) if s.mode == "coconut" else ()
    return kind(decoder, () if s.eos_id < 0 else (s.eos_id,), count=count, sampling=sampling, banned=own, closing=closing)


def generate(
    model: CoconutModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    thoughts: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 128,
    compat: Compat = "",
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or ids; see `lab.latent.record.Ask` for the other arguments.

    Args:
        thoughts: how many, instead of what the model's stage says; more than it was trained with are allowed.
        max_new_tokens: the official value is 64 on GSM8K and 128 elsewhere.
    """
    asked = [model.prompt(question, thoughts) for question in questions]
    counts = torch.tensor([count for _, count in asked])
    budget = Budget(thoughts=max(1, int(counts.max())) if len(counts) else 1, answer=max_new_tokens)

    def of_group(group: list[int]) -> Counted:
        return policy(model.decoder, model.config, counts[group].repeat_interleave(samples).to(model.device), sampling, compat)

    return respond(model, [ids for ids, _ in asked], of_group, Ask(samples=samples, budget=budget, **ask))
