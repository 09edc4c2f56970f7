"""The loss: plain cross-entropy on what is written after the thoughts (`coconut.md` 2.5)."""

import torch
from torch import Tensor

from lab.latent.distill import cross_entropy
from lab.latent.plan import Plan, collate
from lab.latent.unroll import Unrolled, unroll
from lab.methods.coconut.model import CoconutModel


def run(model: CoconutModel, batch: Plan) -> Unrolled:
    """Prompt, thoughts and the rest with gradient; each column is computed once."""
    decoder = model.decoder
    return unroll(decoder, batch.prompt.block(decoder), batch.counts, batch.after.block(decoder), feedback)


def feedback(h: Tensor, step: int) -> Tensor:
    """The next input is the last hidden state (R, D) itself."""
    return h


def loss(model: CoconutModel, batch: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over the labels of the batch, for `lab.train.fit`."""
    return cross_entropy(model.decoder, *batch.predictions(run(model, batch))), {}


loss.feeds_back = True


def labelled(batch: Plan) -> int:
    """Items the loss is a mean over."""
    return batch.labelled


@torch.no_grad()
def exact(model: CoconutModel, rows: list, batch: int = 256) -> float:
    """Share of rows whose every labelled token is the most likely one, which is the share that greedy decoding reproduces."""
    right = 0
    for start in range(0, len(rows), batch):
        plan = collate(rows[start : start + batch]).to(model.device)
        states, targets = plan.predictions(run(model, plan))
        wrong = model.decoder.logits(states).argmax(-1) != targets
        right += len(plan) - len(torch.unique(plan.rows_of_predictions[wrong]))
    return right / len(rows)
