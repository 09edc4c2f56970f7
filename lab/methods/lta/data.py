"""Batches of examples with thoughts: the base's sequences and what the generator reads (`lta.md` 2.4–2.6).

Axes: R rows, n thoughts, L assistant columns, S steps, q places.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lab.errors import DataError
from lab.latent.plan import Plan, Side, collate, right
from lab.methods.lta.prompting import Prompted


@dataclass
class ThoughtBatch:
    """A batch.

    Attributes:
        plan: prefix | thoughts | after. assistant: (R, L) ids with `assistant_valid`; slots: (R, n) the thoughts' places in it.
        question: (R,) place of the question's turn end. step_spans: (R, S, 2) [start, stop), 0 0 = no step.
        answer: (R, t) ids with `answer_valid`. placeholders: (R, n) the base's ids in place of thoughts.
        gold: (R, L) bool, columns a test prompt would not have. states: what `ThoughtModel.assistant_states` says of a frozen assistant.
    """

    plan: Plan
    assistant: Tensor
    assistant_valid: Tensor
    slots: Tensor
    question: Tensor
    step_spans: Tensor
    answer: Tensor
    answer_valid: Tensor
    placeholders: Tensor
    gold: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def labelled(self) -> int:
        """Tokens to be predicted."""
        return self.plan.labelled

    @property
    def has_step(self) -> Tensor:
        """(R, S) bool."""
        return self.step_spans[..., 1] > 0

    def hidden_steps(self, at: Tensor) -> Tensor:
        """(R, q, L) bool, what places `at` (R, q) may see when the solution is hidden: all but gold columns; gold columns see all."""
        inside = self.gold.gather(1, at)
        return inside[..., None] | ~self.gold[:, None]

    def to(self, device) -> "ThoughtBatch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return ThoughtBatch(**{name: None if value is None else value.to(device) for name, value in moved.items()})


def one_count(examples: Sequence[tuple[Prompted, ...]]) -> list[Prompted]:
    """The rows of a batch whose examples stand prepared for several numbers of thoughts: one number, drawn from what the batch is."""
    which = random.Random(repr([rows[0].assistant for rows in examples])).randrange(len(examples[0]))
    return [rows[which] for rows in examples]


def batch_of(rows: Sequence[Prompted], pad: int = 0, placeholder: int = 0) -> ThoughtBatch:
    """The batch of `rows`, all with the same number of thoughts."""
    counts = {row.row.thoughts for row in rows}
    if len(counts) != 1:
        raise DataError(f"Rows of one batch have {sorted(counts)} thoughts; they must have the same number.")
    assistant, answer = right([row.assistant for row in rows], pad), right([row.answer or (pad,) for row in rows], pad)
    steps = max((len(row.steps) for row in rows), default=0)
    spans, gold = torch.zeros(len(rows), steps, 2, dtype=torch.long), torch.zeros(assistant.ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        if row.steps:
            spans[index, : len(row.steps)] = torch.tensor(row.steps)
        gold[index, list(row.skipped)] = True
    n = counts.pop()
    slots = torch.tensor([row.slots for row in rows], dtype=torch.long).view(len(rows), n)
    question = torch.tensor([row.question for row in rows])
    plan, stand_ins = collate([row.row for row in rows], pad), torch.full((len(rows), n), placeholder)
    return ThoughtBatch(plan, assistant.ids, _mask(assistant), slots, question, spans, answer.ids, _mask(answer), stand_ins, gold)


def step_places(batch: ThoughtBatch, where: str) -> tuple[Tensor, Tensor]:
    """Columns (R, C) to ask for the steps, and how they make up each step (R, S, C): its turn end, or the mean over its tokens."""
    steps = batch.step_spans.shape[1]
    if where == "turn_end":
        one = torch.eye(steps, device=batch.slots.device)
        return batch.step_spans[..., 1], one.expand(len(batch), -1, -1)
    columns = torch.arange(batch.assistant.shape[1], device=batch.slots.device)
    inside = (columns >= batch.step_spans[..., :1]) & (columns < batch.step_spans[..., 1:])
    used = inside.any(1)
    places = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, int(used.sum(1).max()))]
    member = inside.gather(2, places[:, None].expand(-1, steps, -1)).float()
    return places, member / member.sum(-1, keepdim=True).clamp(min=1)


def _mask(side: Side) -> Tensor:
    return torch.ones_like(side.ids, dtype=torch.bool) if side.valid is None else side.valid
