"""Choosing a token: greedy, or by inverse CDF over the few candidates that survive the filters.

The order is temperature, softmax, min-p, top-k (by value: ties survive), top-p (the token that crosses is kept).
`probabilities` is the definition over the whole vocabulary; `draw` reaches the same distribution without sorting it.
Axes: R rows, V vocabulary, K candidates.
"""

import torch
from pydantic import Field
from torch import Tensor

from lab.config import Settings


class Sampling(Settings):
    """How tokens are chosen; temperature 0 is greedy, top_k 0 and top_p 1 and min_p 0 are off."""

    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """The distribution (R, V) a token is drawn from; one-hot at the argmax when greedy."""
    if how.greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = torch.softmax(logits.float() / how.temperature, -1)
    if how.min_p > 0:
        p = _renormalise(p.masked_fill(p < how.min_p * p.amax(-1, keepdim=True), 0.0))
    if 0 < how.top_k < p.shape[-1]:
        p = _renormalise(p.masked_fill(p < p.topk(how.top_k, -1).values[:, -1:], 0.0))
    if how.top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        p = _renormalise(torch.zeros_like(p).scatter_(-1, order, _nucleus(ranked, how.top_p)))
    return p


def draw(logits: Tensor, how: Sampling, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (R,) and their log-probabilities (R,) under the filtered distribution (the model's own when greedy).

    Args:
        logits: (R, V).
        how: the filters.
        uniform: (R,) numbers in (0, 1), the only randomness; not needed when greedy.
    """
    if how.greedy:
        top, token = logits.max(-1)
        return token, top.float() - torch.logsumexp(logits.float(), -1)
    p, ids = _candidates(logits, how)
    cdf = p.cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None].to(p) * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    chosen = p.gather(-1, place)
    token = place if ids is None else ids.gather(-1, place)
    return token[:, 0], (chosen / cdf[:, -1:]).log()[:, 0]


def _candidates(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor | None]:
    """Surviving probabilities (R, K), zero where filtered out, and their ids (None = the whole vocabulary in order)."""
    p = torch.softmax(logits.float() / how.temperature, -1)
    if not 0 < how.top_k < p.shape[-1]:
        return (p, None) if how.top_p == 1 and how.min_p == 0 else (probabilities(logits, how), None)
    ranked, ids = p.topk(min(how.top_k + 1, p.shape[-1]), -1)
    if bool((ranked[:, -1] == ranked[:, -2]).any()):
        return probabilities(logits, how), None
    ranked, ids = ranked[:, :-1], ids[:, :-1]
    if how.min_p > 0:
        ranked = ranked.masked_fill(ranked < how.min_p * ranked[:, :1], 0.0)
    return (_nucleus(_renormalise(ranked), how.top_p) if how.top_p < 1 else ranked), ids


def _nucleus(ranked: Tensor, top_p: float) -> Tensor:
    return ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)


def _renormalise(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True)
