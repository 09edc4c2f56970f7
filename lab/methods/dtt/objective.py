"""Losses of gated models: warm-up, gated warm-up, log-probabilities with given inputs, gate error, HRPO's published update.

Axes: R rows, P prompt columns, C written columns, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lab.latent.distill import cross_entropy
from lab.methods.dtt.data import Written
from lab.methods.dtt.model import SparseGatedModel


def targets(batch: Written) -> int:
    """Tokens a batch teaches to write."""
    return int(batch.mask.sum())


def read(model: SparseGatedModel, batch: Any, **gated: Tensor) -> Tensor:
    """(R, C, D) states that predict the written columns; `gated` is about written columns only, as in `Gate.enter`."""
    wide = batch.prompt.shape[1]
    ids, mask = torch.cat((batch.prompt, batch.ids), 1)[:, :-1], torch.cat((batch.prompt_mask, batch.mask), 1)[:, :-1]
    return model(ids, mask, **{name: _after_prompt(value, wide) for name, value in gated.items()})[:, wide - 1 :]


def _after_prompt(value: Tensor, wide: int) -> Tensor:
    """(R, P + C − 1, …): zeros at the prompt, `value` without its last column after it."""
    return torch.cat((value.new_zeros(value.shape[0], wide, *value.shape[2:]), value[:, :-1]), 1)


def seen_gates(model: SparseGatedModel, wide: int) -> tuple[Tensor, Tensor]:
    """(gates, logits) of the last gated forward at the written columns, (R, C − 1) each; the gate forgets them."""
    seen, model.gate.seen = model.gate.seen, None
    return seen.gate[:, wide:], seen.logit[:, wide:]


def unrolled(model: SparseGatedModel, batch: Any, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States (R, C, D), gates and logits (R, C − 1) made again one column after another, with gradient through time (`dtt.md` 2.7).

    Args:
        noise: (R, C) uniform numbers that the gates were drawn with.
    """
    decoder, kv, wide = model.decoder, model.decoder.grow(), batch.prompt.shape[1]
    mask = torch.cat((batch.prompt_mask, batch.mask), 1).bool()
    pos = (mask.cumsum(1) - 1).clamp(min=0)
    states, seen = [decoder(decoder.embed(batch.prompt), pos[:, :wide], kv, valid=mask[:, :wide]).last[:, -1]], []
    for t in range(batch.ids.shape[1] - 1):
        seen.append(model.gate(decoder.embed(batch.ids[:, t]), states[-1], noise[:, t]))
        column = slice(wide + t, wide + t + 1)
        states.append(decoder(seen[-1].x[:, None], pos[:, column], kv, valid=mask[:, column]).last[:, 0])
    gates, logits = (torch.stack([getattr(mixed, name) for mixed in seen], 1) for name in ("gate", "logit"))
    return torch.stack(states, 1), gates, logits


def warm_up(model: SparseGatedModel, batch: Written) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the written columns, every gate closed."""
    loss = _written(model, read(model, batch), batch)
    return loss, {"ce": loss.detach()}


def gated_warm_up(passes: int = 3, outside: float = 0.05) -> Callable:
    """The warm-up that makes open gates bearable (`dtt.md` 9.1): random hard gates, each pass reads the states of the one before.

    Args:
        passes: the last one is taught, with gradient through all, so that states learn to be read.
        outside: share of gates open where they should be closed.
    """

    def loss(model: SparseGatedModel, batch: Written) -> tuple[Tensor, dict[str, Tensor]]:
        mask, h = random_gates(batch, outside), read(model, batch)
        for _ in range(passes - 1):
            h = _forced(model, batch, h, mask)
        ce = _written(model, h, batch)
        return ce, {"ce": ce.detach()}

    loss.feeds_back = True
    return loss


def random_gates(batch: Written, outside: float) -> Tensor:
    """(R, C) bool: open with a rate drawn for each row inside the span, with `outside` elsewhere."""
    rate = torch.rand(len(batch), 1, device=batch.ids.device)
    chance = torch.where(batch.inside, rate, outside)
    return torch.rand(batch.ids.shape, device=batch.ids.device) < chance


def _forced(model: SparseGatedModel, batch: Written, h: Tensor, mask: Tensor) -> Tensor:
    """A pass in which the gates in `mask` are open and all others closed."""
    gate = model.gate
    before, gate.forced = gate.forced, "open"
    try:
        return read(model, batch, prev_hidden=h, gate_mask=mask)
    finally:
        gate.forced = before


def _written(model: SparseGatedModel, h: Tensor, batch: Written) -> Tensor:
    keep = batch.mask.bool()
    return cross_entropy(model.decoder, h[keep], batch.ids[keep])


def log_probs(model: SparseGatedModel, h: Tensor, batch: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """(R, C) log-probability of each written id and entropy, from the states (R, C, D) that predict them; 0 where masked."""
    keep = batch.mask.bool()
    logs = torch.log_softmax(model.decoder.logits(h[keep]).float() / temperature, -1)
    chosen = logs.gather(-1, batch.ids[keep][:, None])[:, 0]
    entropy = -(logs.detach().exp() * logs.detach()).sum(-1)
    zeros = logs.new_zeros(batch.ids.shape)
    return zeros.masked_scatter(keep, chosen), zeros.masked_scatter(keep, entropy)


def gate_error(gates: Tensor, inside: Tensor, mask: Tensor) -> Tensor:
    """(R,) mean squared distance of gates (R, C − 1) from 1 inside and 0 outside; 0 for rows of one token."""
    errors, keep = torch.where(inside[:, :-1], (1 - gates).square(), gates.square()), mask[:, 1:].bool()
    return errors.masked_fill(~keep, 0.0).sum(1) / keep.sum(1).clamp(min=1)


def gate_log_probs(gates: Tensor, probability: Tensor) -> Tensor:
    """(R, C − 1) log-probability of hard gates that are open with `probability`."""
    p = probability.clamp(1e-7, 1 - 1e-7)
    return torch.where(gates > 0.5, p.log(), (1 - p).log())


def hrpo_loss(new: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """HRPO's published update on log-probabilities (R, C): (loss, mean divergence); one update a rollout, so nothing is clipped."""
    gain = (new - new.detach()).exp() * advantages[:, None]
    kl = (ref - new).exp() - (ref - new) - 1
    weights = mask.float() / mask.sum(1, keepdim=True)
    return -((gain - beta * kl) * weights).sum(1).mean(), (kl * weights).sum(1).mean()
