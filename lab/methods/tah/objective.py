"""Losses of Think-at-Hard (spec 2.6), computed from hidden states and decider logits, never from (B, T, V) logits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.methods.tah.config import DeciderLossSettings, NextTokenSettings


@dataclass
class Decisions:
    """Decider output of one pass: `logit` (n,) for the valid tokens, their iteration labels `wanted` (n,), -100 = unlabelled."""

    depth: int
    logit: Tensor
    wanted: Tensor


def token_weights(iterations: Tensor, settings: NextTokenSettings) -> Tensor | None:
    """Weights of labelled tokens by their executed count: w_easy = 1/(p·r + 1 − p), w_hard = r·w_easy; None where all are 1."""
    ratio, share = settings.hard_token_relative_weight, settings.hard_token_ratio
    if ratio == 1.0:
        return None
    easy = 1.0 / (share * ratio + 1.0 - share)
    return torch.where(iterations > 1, ratio * easy, easy)


def normaliser(weights: Tensor | None, count: int, num_items: Tensor | float | None) -> Tensor | float:
    """What a summed loss is divided by: the given number of items, else the weights' sum, else the number of tokens."""
    if num_items is not None:
        return num_items
    return max(count, 1) if weights is None else weights.sum()


def decider_loss(
    decisions: list[Decisions], settings: DeciderLossSettings, max_iter: int, num_items: Tensor | float | None = None, positions: int = 0
) -> Tensor:
    """Weighted binary cross-entropy of "this token wants another pass" over the valid tokens with a label.

    `mean` (default): summed over all tokens and passes, divided by their number, or by `num_items` where the caller knows
    how many decisions the whole accumulated batch supervises. `official`: each pass's mean divided once more by
    `num_items` (labelled tokens of the accumulated batch) or by `positions` (B·T), as the released code does (spec 7.3).
    """
    total, count = None, 0
    for step in decisions:
        if settings.skip_last_iter and step.depth >= (settings.max_iter or max_iter):
            continue
        keep = step.wanted != -100
        logit, target = step.logit[keep], (step.wanted[keep] > step.depth).to(step.logit.dtype)
        weight = logit.new_tensor(settings.pos_weight)
        reduction = "mean" if settings.loss_scaling == "official" else "sum"
        value = F.binary_cross_entropy_with_logits(logit, target, pos_weight=weight, reduction=reduction)
        total, count = value if total is None else total + value, count + int(keep.sum())
    if total is None:
        return torch.zeros((), requires_grad=True)
    if settings.loss_scaling == "official":
        return total / (positions if num_items is None else num_items)
    return total / (max(count, 1) if num_items is None else num_items)


def decision_quality(again: Tensor, wanted: Tensor, depth: int = 1) -> dict[str, float]:
    """Precision, recall and accuracy of decisions (n,) bool against labels (n,) for pass `depth`; NaN where undefined."""
    keep = wanted != -100
    said, truth = again[keep], wanted[keep] > depth
    hits = int((said & truth).sum())
    return {
        "precision": hits / int(said.sum()) if said.any() else float("nan"),
        "recall": hits / int(truth.sum()) if truth.any() else float("nan"),
        "accuracy": float((said == truth).float().mean()) if len(said) else float("nan"),
    }
