"""CODI at inference: read the question, think `num_latent` times through the projection, close, answer (`distill.md` 2A.5)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.loop import Budget, Prompt
from lab.latent.plan import left
from lab.latent.policy import Counted, Policy, Rows
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.codi.model import CodiModel
from lab.models.cache import SlotKV, Span

OFFICIAL_SAMPLING = Sampling(temperature=0.1, top_k=40, top_p=0.95)


class Projected(Counted):
    """Feeds the projection of the state back."""

    def __init__(self, decoder, stops, *, feedback, **rest):
        super().__init__(decoder, stops, **rest)
        self.feedback = feedback

    def thought(self, rows: Rows) -> Tensor:
        return self.feedback(rows.h, 0)


def policy(model: CodiModel, count: int, sampling: Sampling | None = None, decoder=None) -> Projected:
    """The policy of `model` with `count` thoughts; the official code bans only the closing token from answers."""
    s = model.config
    banned = (s.eot_id,) if s.compat else tuple(i for i in (s.pad_id, s.bot_id, s.eot_id) if i >= 0)
    stops = () if s.eos_id < 0 else (s.eos_id,)
    decoder = model.decoder if decoder is None else decoder
    return Projected(decoder, stops, count=count, feedback=model.feedback, sampling=sampling, closing=s.closing, banned=banned)


def teacher_policy(model: CodiModel, sampling: Sampling | None = None) -> Policy:
    """The policy of `model` reasoning in writing."""
    s = model.config
    banned = tuple(i for i in (s.pad_id, s.bot_id, s.eot_id) if i >= 0)
    return Policy(model.decoder, () if s.eos_id < 0 else (s.eos_id,), sampling, banned)


def generate(
    model: CodiModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    thoughts: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    written: bool = False,
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or ids; see `lab.latent.record.Ask` for the other arguments.

    Under compat = "codi" a row's answer depends on the padding it gets; `batch` and the order of the questions then matter, as in the
    official code.

    Args:
        thoughts: how many, instead of the number trained with; more are allowed.
        written: reason in writing, as the teacher does.
    """
    count = model.config.num_latent if thoughts is None else thoughts
    if count < 0:
        raise SettingsError(f"thoughts = {count}: it must be 0 or more.")
    model.put_marks()
    prompts = [model.prompt(question, written) for question in questions]
    asked = Ask(samples=samples, budget=Budget(thoughts=max(1, count), answer=max_new_tokens), **ask)
    if written:
        return respond(model, prompts, lambda group: teacher_policy(model, sampling), asked)
    if not model.config.compat:
        return respond(model, prompts, lambda group: policy(model, count, sampling), asked)
    runner = _Padded(model)
    return respond(runner, prompts, lambda group: policy(model, count, sampling, runner.decoder), replace(asked, sort=False), runner.read)


class _Padded:
    """The model with the official treatment of pads: they are hidden while the question is read, and attended afterwards."""

    def __init__(self, model: CodiModel):
        self.method, self.tokenizer, self.decoder = model.method, model.tokenizer, _PadDecoder(model.decoder)
        self.pad = model.config.pad_id

    def read(self, decoder, prompts: list) -> Prompt:
        """Prompts padded on the left with the pad token, whose keys will be seen."""
        side = left(prompts, self.pad).to(decoder.table.weight.device)
        return _ColumnPrompt(decoder.embed(side.ids), side.valid)


class _ColumnPrompt(Prompt):
    @property
    def pos(self) -> Tensor:
        return torch.arange(self.x.shape[1], device=self.x.device).expand(self.x.shape[:2])


class _PadDecoder:
    def __init__(self, decoder):
        self._decoder = decoder

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)

    def __call__(self, *args, **kwargs):
        return self._decoder(*args, **kwargs)

    def slots(self, rows: int, capacity: int) -> SlotKV:
        if not hasattr(self._decoder, "shape"):
            raise SettingsError("compat = 'codi' shows pads to later tokens, which only lab's own step can; load with forward='own'.")
        weight = self._decoder.table.weight
        return _AttendedPads(self._decoder.shape, rows, capacity, weight.dtype, weight.device)


class _AttendedPads(SlotKV):
    def close(self, span: Span) -> None:
        self.blocked[:, : span.stop] = 0.0
        self.plain = True
