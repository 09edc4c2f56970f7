"""CoLaR's losses: the vocabulary head on groups and answer, the latent head on the next merged embedding, and GRPO on both
(`colar.md` 2.3, 2.6). Axes: R rows, T columns, G groups, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.latent.distill import cross_entropy
from lab.latent.plan import IGNORE
from lab.methods.colar.data import ColarBatch
from lab.methods.colar.model import ColarModel


def embed(model: ColarModel, batch: ColarBatch) -> Tensor:
    """Input embeddings (R, T, D): tokens as they are, each group merged into one vector."""
    s, table = model.config, model.decoder.embed
    if batch.factor == 1:
        merged = table(batch.groups)[:, :, 0]
    else:
        merged = (table(batch.groups) * batch.groups_mask[..., None]).sum(2)
        count = batch.groups_mask.sum(-1, keepdim=True).to(merged.dtype)
        merged = merged / ((count.sqrt() if s.sqrt_mean else count) + 1e-5)
    return torch.cat((table(batch.question), merged, table(batch.answer)), 1)


def loss(model: ColarModel, batch: ColarBatch, eps: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its parts `ce`, `latent`, `entropy`, `forward`.

    Args:
        eps: (R, G, D) standard normal draws of the head; None = fresh ones.
    """
    s, x = model.config, embed(model, batch)
    h = _read(model, x, batch.valid)
    mean, std = model.parts.head(h[:, batch.steps])
    eps = torch.randn_like(mean) if eps is None else eps
    gold = x[:, batch.steps.start + 1 : batch.steps.stop + 1].detach().float() / s.embeds_std
    known = batch.groups_mask.any(-1)
    sample = mean + std * eps
    by_column = (sample - gold).pow(2).mean(-1) if s.latent_loss == "mse" else -log_normal(gold, mean, std).mean(-1)
    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).mean(-1)
    parts = {
        "ce": s.ce_weight * _ce(model, h, batch),
        "latent": s.embed_modeling_weight * by_column[known].mean(),
        "entropy": s.entropy_weight * entropy[known].mean(),
    }
    if s.pred_embed_forward_weight:
        parts["forward"] = s.pred_embed_forward_weight * _second(model, batch, x, sample)
    return sum(parts.values()), parts


loss.feeds_back = False


def _read(model: ColarModel, x: Tensor, valid: Tensor) -> Tensor:
    pos = (valid.cumsum(1) - 1).clamp(min=0)
    return model.decoder(x, pos, model.decoder.grow(), valid=valid).last


def _ce(model: ColarModel, h: Tensor, batch: ColarBatch) -> Tensor:
    """Mean cross-entropy of every label from the last real column before it (officially from the column before it, pad or not)."""
    wanted, columns = batch.labels[:, 1:] != IGNORE, torch.arange(h.shape[1], device=h.device)
    real = columns.expand_as(batch.valid).masked_fill(~batch.valid, 0).cummax(1).values
    before = (columns.expand_as(real) if model.config.official_padding else real)[:, :-1]
    rows = torch.arange(len(h), device=h.device)[:, None].expand_as(before)
    return cross_entropy(model.decoder, h[rows[wanted], before[wanted]], batch.labels[:, 1:][wanted])


def _second(model: ColarModel, batch: ColarBatch, x: Tensor, sample: Tensor) -> Tensor:
    """Cross-entropy of a second pass whose groups after the first are the predictions of the one before, in standardised units.

    A row's first group is its separator; officially the batch's first column is, so that shorter rows lose theirs.
    """
    steps, known = x[:, batch.steps], batch.groups_mask.any(-1)
    first = torch.arange(known.shape[1], device=x.device) == 0 if model.config.official_padding else known & (known.cumsum(1) == 1)
    predicted = torch.cat((steps[:, :1], sample[:, :-1].to(x.dtype)), 1)
    fed = torch.cat((x[:, : batch.steps.start], torch.where(first[..., None], steps, predicted), x[:, batch.steps.stop :]), 1)
    return _ce(model, _read(model, fed, batch.valid), batch)


def log_normal(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, element by element."""
    return -0.5 * ((value - mean) / std).pow(2) - std.log() - 0.5 * math.log(2 * math.pi)


@dataclass
class Experience:
    """What an update needs of R rollouts: question (R, Q) and answer (R, A) ids (the answer begins with the separator), thoughts
    (R, T, D) as they were fed, with bool masks; question padded on the left, the others on the right.
    """

    question: Tensor
    question_mask: Tensor
    thoughts: Tensor
    thoughts_mask: Tensor
    answer: Tensor
    answer_mask: Tensor


def log_probs(model: ColarModel, seen: Experience, reduction: str = "mean", temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of thoughts (R, T) and answer tokens (R, A) with the stored thoughts as given inputs, in one pass.

    A thought's log-density is averaged over its width as published (`reduction="sum"` gives the true density).
    """
    table, s = model.decoder.embed, model.config
    x = torch.cat((table(seen.question), seen.thoughts, table(seen.answer)), 1)
    h = _read(model, x, torch.cat((seen.question_mask, seen.thoughts_mask, seen.answer_mask), 1))
    asked, thought = seen.question.shape[1], seen.thoughts.shape[1]
    mean, std = model.parts.head(h[:, asked - 1 : asked + thought - 1], temperature)
    density = log_normal(seen.thoughts.float() / s.embeds_std, mean, std)
    latent = density.mean(-1) if reduction == "mean" else density.sum(-1)
    last = h[torch.arange(len(h), device=h.device), asked + seen.thoughts_mask.sum(1) - 1]
    states = torch.cat((last[:, None], h[:, asked + thought : -1]), 1)
    logits = torch.log_softmax(model.decoder.logits(states).float() / temperature, -1)
    return latent, logits.gather(-1, seen.answer[..., None])[..., 0]


def advantages(rewards: Tensor, group: int) -> Tensor:
    """(R, 1): rewards (R,) standardised within groups of `group` consecutive rows, 0 where all are equal."""
    by_group = rewards.view(-1, group)
    return ((by_group - by_group.mean(1, keepdim=True)) / (by_group.std(1, keepdim=True) + 1e-8)).view(-1, 1)
