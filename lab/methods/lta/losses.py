"""LTA-Thinker's two losses on projected vectors, beside the ordinary cross-entropy (`lta.md` 2.9).

Axes: R rows, n thoughts, S steps, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment(anchor: Tensor, thoughts: Tensor) -> Tensor:
    """Mean KL(softmax(anchor) ‖ softmax(thought)) over the features: anchor (R, D), thoughts (R, n, D). Nothing is detached."""
    p, q = F.log_softmax(anchor, -1)[:, None], F.log_softmax(thoughts, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def focus(anchor: Tensor, steps: Tensor, valid: Tensor, answer: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy that draws the anchor (R, D) to the step (R, S, D) most like the answer (R, D), mean over rows.

    Args:
        valid: (R, S) bool. A row without a step takes the value log S with no gradient (the published padding); a batch
            without any step gives 0.
    """
    if not bool(valid.any()):
        return anchor.sum() * 0.0
    with torch.no_grad():
        like = F.cosine_similarity(steps, answer[:, None], dim=-1).masked_fill(~valid, -torch.inf)
        target = torch.where(valid.any(1), like.argmax(1), 0)
    scores = F.cosine_similarity(steps, anchor[:, None], dim=-1).masked_fill(~valid, -1e9) / temperature
    return F.cross_entropy(scores, target)


def answer_vector(embeds: Tensor, valid: Tensor) -> Tensor:
    """Mean input embedding (R, D) of the answer's tokens (R, t, D)."""
    weight = valid[..., None].to(embeds.dtype)
    return (embeds * weight).sum(1) / weight.sum(1).clamp(min=1)
