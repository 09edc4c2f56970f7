"""What goes into the passes over a batch, what they leave behind, and which tokens are read again.

Axes: B rows, T columns, D width, V vocabulary, A packed columns.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lab.latent.plan import IGNORE
from lab.methods.tah.objective import Decisions
from lab.models.step import Out


@dataclass
class TahOutput:
    """`loss` or None; `iterations` (B, T) passes per token (padding 1); `logits` (B, T, V) only where asked for.

    `hidden` (B, T, D): the summed states whose logits are final; `iter_count_labels` (B, T): labels used, 0 = none;
    `again` (B, T): decision after the first pass, `decider_logit` (B, T) its logit, NaN on padding.
    """

    loss: Tensor | None
    iterations: Tensor
    hidden: Tensor
    iter_count_labels: Tensor | None = None
    logits: Tensor | None = None
    again: Tensor | None = None
    decider_logit: Tensor | None = None

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else (self.loss, self.iterations)[key]


@dataclass
class Batch:
    """Rows packed to the left: `order` (B, T) says which original column stands where, `valid` which columns are real."""

    ids: Tensor
    valid: Tensor
    targets: Tensor | None
    wanted: Tensor | None
    reference: Tensor | None
    order: Tensor | None

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, iter_labels: Tensor | None, reference: Tensor | None
    ):
        """A batch from tensors (B, T) padded on either side; `targets[i]` is `labels[i + 1]`, iteration labels stay in place."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        targets = None if labels is None else torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1)
        holes = bool((valid[:, 1:] & ~valid[:, :-1]).any())
        order = (~valid).long().argsort(dim=1, stable=True) if holes else None
        parts = (input_ids, valid, targets, iter_labels, reference)
        return cls(*(part if order is None or part is None else part.gather(1, order) for part in parts), order)

    def back(self, x: Tensor) -> Tensor:
        """`x` (B, T, …) in the original order of columns."""
        if self.order is None:
            return x
        order = self.order.view(*self.order.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return torch.zeros_like(x).scatter(1, order, x)


@dataclass
class Passes:
    """What the passes over a batch leave behind; `real` marks the columns of `out` that hold the tokens of `active`, in order."""

    total: Tensor
    iterations: Tensor
    active: Tensor
    real: Tensor
    out: Out
    decisions: list[Decisions] = field(default_factory=list)
    stages: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # ConsistencyLoss: (mask (B, T), total) of each pass
    labels: Tensor | None = None
    again: Tensor | None = None
    logit: Tensor | None = None


def pack(active: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, A) of the active tokens of each row, first ones first, and which of them are real (padding points at 0)."""
    counts = active.sum(1, keepdim=True)
    width = int(counts.max())
    index = (~active).long().argsort(dim=1, stable=True)[:, :width]
    real = torch.arange(width, device=active.device) < counts
    return index * real, real


def force_one(chosen: Tensor, targets: Tensor | None) -> Tensor:
    """Decisions (n,) in which at least one supervised token continues, drawn at random if none did (spec 2.1.4g)."""
    if targets is None or bool((chosen & (targets != IGNORE)).any()):
        return chosen
    supervised = (targets != IGNORE).nonzero().flatten()
    if not len(supervised):
        return chosen
    pick = supervised[torch.randint(len(supervised), (1,)).to(supervised.device)]
    return chosen.index_fill(0, pick, True)
