"""Work that is as wide as the vocabulary, done a few rows at a time so that no (tokens, vocabulary) buffer stands.

Cross-entropy, soft embeddings and per-token statistics straight from hidden states h (n, D) and a head W (V, D).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CPU_ELEMENTS, DEVICE_ELEMENTS, SMALL = 1 << 21, 1 << 28, 2048


def chunks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows, each holding a few million elements of `width` columns (many more on an accelerator)."""
    size = max(16, (CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // max(width, 1))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def compute_dtype(h: Tensor) -> torch.dtype:
    """The type to multiply in: autocast's where it is on, else the hidden states' own."""
    kind = h.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype


def soft_embedding(logits: Tensor, weight: Tensor, topk: int) -> Tensor:
    """Mean of embedding rows weighted by the softmax over the `topk` largest logits alone: (n, V), (V, D) -> (n, D).

    Temperature 1, no normalisation of the result; `topk` is clipped to V (Think-at-Hard, spec 2.1.4l).
    """
    values, index = logits.topk(min(topk, logits.shape[-1]), dim=-1)
    return F.embedding_bag(index, weight, per_sample_weights=values.float().softmax(-1).to(weight.dtype), mode="sum")


def soft_embedding_of(h: Tensor, head: Tensor, table: Tensor, topk: int) -> Tensor:
    """`soft_embedding(h @ head.T, table, topk)` without keeping logits, with sparse gradients to `h`, `head` and `table`.

    A small vocabulary is mixed by one dense product instead, which is faster there.
    """
    if len(head) <= SMALL:
        values, index = (h @ head.T).topk(min(topk, len(head)), dim=-1)
        share = values.float().softmax(-1).to(table.dtype)
        return share.new_zeros(len(h), len(table)).scatter(1, index, share) @ table
    return _SoftEmbedding.apply(h, head, table, topk)


class _SoftEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, head: Tensor, table: Tensor, topk: int) -> Tensor:
        top, index = top_logits(h, head, topk)
        share = top.float().softmax(-1)
        ctx.save_for_backward(h, head, table, share, index)
        return F.embedding_bag(index, table, per_sample_weights=share.to(table.dtype), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, head, table, share, index = ctx.saved_tensors
        grad, tied = grad.float(), head.data_ptr() == table.data_ptr()
        d_logit = torch.empty_like(share)
        for rows in chunks(len(h), index.shape[1] * h.shape[1], h.device):
            d_logit[rows] = torch.bmm(table[index[rows]].float(), grad[rows].unsqueeze(-1)).squeeze(-1)
        d_logit = share * (d_logit - (share * d_logit).sum(-1, keepdim=True))
        d_h = F.embedding_bag(index, head, per_sample_weights=d_logit.to(head.dtype), mode="sum").to(h.dtype)
        d_table = _scatter(table, index, share, grad) if ctx.needs_input_grad[2] else None
        d_head = None
        if ctx.needs_input_grad[1]:
            into = d_table if tied and d_table is not None else None
            d_head = _scatter(head, index, d_logit, h.float(), into)
            d_head, d_table = (None, d_head) if into is not None else (d_head, d_table)
        return d_h, d_head, d_table, None


def _scatter(like: Tensor, index: Tensor, share: Tensor, rows: Tensor, into: Tensor | None = None) -> Tensor:
    """Σ over tokens and candidates of share · row, added to the candidates' rows of a table shaped as `like`."""
    into = torch.zeros_like(like) if into is None else into
    for part in chunks(len(rows), index.shape[1] * rows.shape[1], rows.device):
        update = share[part].unsqueeze(-1) * rows[part].unsqueeze(1)
        into.index_add_(0, index[part].flatten(), update.flatten(0, 1).to(into.dtype))
    return into


def linear_cross_entropy(h: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies of h @ head.T against `targets`, and the unweighted ones per token (no gradient).

    The gradients are computed while the chunk's logits are at hand, so nothing as wide as the vocabulary is kept or
    computed twice.

    Args:
        h: (n, D) hidden states; head: (V, D); targets: (n,) token ids; weights: (n,) or None for 1.
    """
    loss, losses = _LinearCrossEntropy.apply(h, head, targets, weights, torch.is_grad_enabled())
    return loss, losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, grad: bool) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(h)
        wide, losses = head.to(dtype), torch.empty(len(h), dtype=torch.float32, device=h.device)
        d_h = torch.empty_like(h) if grad and ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if grad and ctx.needs_input_grad[1] else None
        for rows in chunks(len(h), len(head), h.device):
            part = h[rows].to(dtype)
            logits = (part @ wide.T).float()
            own = targets[rows].unsqueeze(1)
            top, at = logits.amax(1, keepdim=True), logits.gather(1, own)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses[rows] = (total.log() + top - at).squeeze(1)
            if d_h is None and d_head is None:
                continue
            scale = torch.ones_like(total) if weights is None else weights[rows].unsqueeze(1).to(total.dtype)
            d_logits = logits.mul_(scale / total).scatter_add_(1, own, -scale).to(dtype)
            if d_h is not None:
                d_h[rows] = (d_logits @ wide).to(h.dtype)
            if d_head is not None:
                d_head.addmm_(d_logits.T.float(), part.float()) if dtype == torch.float32 else d_head.add_(d_logits.T @ part)
        ctx.grads = (d_h, d_head if d_head is None else d_head.to(head.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses if weights is None else losses * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        d_h, d_head = ctx.grads
        scaled = [None if part is None else part.mul_(grad.to(part.dtype)) for part in (d_h, d_head)]
        return *scaled, None, None, None


@dataclass
class TokenStatistics:
    """What one pass of the head tells about n predictions: best token, cross-entropy, entropy (nats), rank of the target (0 = best)."""

    best: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    rank: Tensor


@torch.no_grad()
def token_statistics(h: Tensor, head: Tensor, targets: Tensor) -> TokenStatistics:
    """Statistics of the predictions h @ head.T (n, V) of `targets` (n,), a few rows at a time in two reused buffers."""
    dtype, parts = compute_dtype(h), []
    wide, (rows, *_) = head.to(dtype), [*chunks(len(h), len(head), h.device), slice(0, 0)]
    buffers = torch.empty(2, rows.stop, len(head), dtype=dtype, device=h.device)
    for rows in chunks(len(h), len(head), h.device):
        logits, spare = buffers[:, : rows.stop - rows.start]
        torch.mm(h[rows].to(dtype), wide.T, out=logits)
        parts.append(_statistics(logits, spare, targets[rows]))
    if not parts:
        return TokenStatistics(*(torch.zeros(0, dtype=kind) for kind in (torch.long, torch.float32, torch.float32, torch.long)))
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _statistics(logits: Tensor, spare: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    logits, spare = (logits, spare) if logits.dtype == torch.float32 else (logits.float(), spare.float())
    at = logits.gather(1, targets.unsqueeze(1))
    rank = torch.gt(logits, at, out=spare).sum(1).long()
    top, best = logits.max(1, keepdim=True)
    share = torch.exp(logits.sub_(top), out=spare)
    total = share.sum(1)
    entropy = total.log() - torch.linalg.vecdot(share, logits) / total
    return best.squeeze(1), total.log() + (top - at).squeeze(1), entropy, rank


@torch.no_grad()
def top_logits(h: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and token ids (n, k) of the `k` largest logits of h @ head.T, descending; k is clipped to V."""
    dtype, k = compute_dtype(h), min(k, len(head))
    wide = head.to(dtype)
    parts = [(h[rows].to(dtype) @ wide.T).topk(k, dim=-1) for rows in chunks(len(h), len(head), h.device)]
    if not parts:
        return h.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=h.device)
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


@torch.no_grad()
def best_tokens(h: Tensor, head: Tensor) -> Tensor:
    """The most likely token of each of h (n, D), a few rows at a time."""
    dtype = compute_dtype(h)
    wide = head.to(dtype)
    parts = [(h[rows].to(dtype) @ wide.T).argmax(1) for rows in chunks(len(h), len(head), h.device)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=h.device)
