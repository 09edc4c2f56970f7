"""The released code's GRPO on TRL's trainer (`colar.md` 2.6): TRL's clipped loss, with each act's advantage weighted as published.

Thoughts and answer are two losses that are added, each a mean over its own acts of a row (or their sum over 32). The clipped loss
is proportional to a positive factor of the advantage, so TRL's mean over a row's acts, or their sum over `longest`, becomes that one.
Axes: R rows, C completion columns.
"""

from typing import Any

import torch
from torch import Tensor

from lab.launch import rank
from lab.methods.colar.objective import advantages
from lab.training.acts import PromptOrder
from lab.training.trl_trainer import LatentGRPOTrainer


class Replaced(PromptOrder):
    """Prompts drawn with replacement."""

    def rollout(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randint(self.count, (self.each,), generator=generator).tolist()


class PublishedGRPO(LatentGRPOTrainer):
    """`thinking` is a `ColarThinking` with `compat`; `loss_type` is `grpo` (means) or `dr_grpo` (sums over 32)."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.order = Replaced(self.order.count, self.order.each, self.order.seed)

    def _calculate_rewards(self, *args: Any) -> Tensor:
        found = super()._calculate_rewards(*args)
        self._rewards = found @ self.reward_weights.to(found)
        return found

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        own = advantages(self._rewards, self.s.samples)[rank() * len(inputs) :][: len(inputs)]
        if self.s.loss_type == "dr_grpo":
            return out | {"advantages": (own * self.s.longest / 32).expand(out["completion_mask"].shape)}
        return out | {"advantages": own * parts(out["completion_mask"], out["record_counts"])}


def parts(mask: Tensor, thoughts: Tensor) -> Tensor:
    """(R, C) weights under which a mean over the acts of a row, `mask` (R, C), is the sum of the means over its first `thoughts` (R,)
    acts and over the others.
    """
    acts, thoughts = mask.sum(1, keepdim=True), thoughts[:, None]
    thinking = torch.arange(mask.shape[1], device=mask.device) < thoughts
    return acts / torch.where(thinking, thoughts, (acts - thoughts).clamp(min=1))
