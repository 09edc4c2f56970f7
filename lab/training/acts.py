"""What a policy that thinks and its trainer say to each other: acts, completions, which prompts a rollout has, the gap between both sides.

Axes: Q prompts, N samples each, R = Q·N rows, P prompt columns, C completion columns.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lab.errors import SettingsError, TrainingError
from lab.latent.draws import Keyed


@dataclass
class Acts:
    """What R rows did (question-major).

    Attributes:
        ids: of each completion, decisions included, up to and with its end token; never empty.
        logprobs: of each id under the distribution it was drawn from.
        own: True where the policy chose the id itself; False where it was forced (a cap): no gradient, no gap.
        extras: name -> one value a row; reward functions receive them by name.
        record: name -> (R, …); what `log_probs` needs beside the ids to repeat the rollout ("stored" inputs), kept with each row.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    own: list[list[bool]]
    extras: dict[str, list[Any]] = field(default_factory=dict)
    record: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Completions:
    """A batch as the update sees it: ids and masks of prompts (R, P), padded left, and completions (R, C), padded right; the record."""

    prompt: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor
    record: dict[str, Tensor] = field(default_factory=dict)


class Thinking(Protocol):
    """What a method offers the trainer."""

    def act(self, prompts: list[list[int]], samples: int, draws: Keyed, *, temperature: float, longest: int) -> Acts:
        """Rolls out `samples` completions of at most `longest` ids for each prompt, without gradient."""
        ...

    def log_probs(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(R, C) log-probability of each completion id and entropy of its distribution, with gradient; anything where masked."""
        ...

    def reference(self) -> AbstractContextManager:
        """Inside, `log_probs` is that of the model before training."""
        ...


class WithReference:
    """A `Thinking` whose reference is a copy of its `model`; `_active` is what log-probabilities are taken from, or None: the model."""

    model: nn.Module
    _held: Any = None
    _active: Any = None

    def hold_reference(self) -> None:
        """Keeps the model as it is now as the reference."""
        self._held = copy.deepcopy(self.model).eval().requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, log-probabilities are those of `hold_reference`."""
        if self._held is None:
            raise SettingsError("No reference is held; call hold_reference() before training.")
        self._active = self._held
        try:
            yield
        finally:
            self._active = None


class PromptOrder:
    """Which prompts belong to which rollout: a pure function of the seed, so a resumed training asks for the same ones."""

    def __init__(self, count: int, each: int, seed: int):
        self.count, self.each, self.seed = count, each, seed

    def rollout(self, number: int) -> list[int]:
        """The places of the prompts of rollout `number`; passes over the data follow each other without a gap."""
        first = number * self.each
        return [self._pass(at // self.count)[at % self.count] for at in range(first, first + self.each)]

    def _pass(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(self.count, generator=generator).tolist()


def gap(update: Tensor, rollout: Tensor, mask: Tensor) -> float:
    """Largest |log-probability in the update − in the rollout| over the ids in `mask` (R, C); 0 where there are none."""
    difference = (update.detach().float() - rollout.float()).abs().masked_fill(~mask.bool(), 0.0)
    return float(difference.max()) if difference.numel() else 0.0


def check_gap(value: float, s: Any, step: int) -> None:
    """Raises TrainingError where the update does not repeat the rollout."""
    if s.largest_gap and (value > s.largest_gap or math.isnan(value)) and not (s.dropout or s.bf16):
        raise TrainingError(
            f"Step {step}: the update gives log-probabilities that differ by {value:.3g} from the rollout's (at most "
            f"{s.largest_gap:g} is rounding). The update would optimise another policy than the one that acted; compare the "
            "method's `act` and `log_probs` (masks, temperature, dropout, stored inputs)."
        )
