"""Reinforcement learning of models that think latently: GRPO on TRL's trainer, for any policy that can say how probable its acts were.

The rollout runs in this library's engine (each prompt read once), the update asks the method for log-probabilities of the same
acts, from the stored inputs or by thinking again with gradient; groups, advantages and the loss are TRL's. The gap between the
two log-probabilities is measured at every step: where it is not zero up to rounding, the update optimises something else.
Axes: Q prompts, N samples each, R = Q·N rows, P prompt columns, C completion columns.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lab.errors import DataError, OutOfMemory, SettingsError, TrainingError
from lab.latent.draws import Keyed
from lab.launch import on_main, world_size
from lab.optim import Schedule, lr_factor
from lab.stability import Detector, Recovery, Ring
from lab.train import Common, TrainResult, check_common, finish, open_folder, row_writer, shown, together

log = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float]]


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


class RLSettings(Common):
    """How to train by GRPO. A step draws `prompts` prompts and `samples` completions of each."""

    steps: int = Field(ge=1)
    prompts: int = Field(8, ge=1)
    samples: int = Field(16, ge=2)
    micro_batch: int = Field(0, ge=0)  # completions in one forward of the update; 0 = all
    longest: int = Field(40, ge=1)  # ids of a completion, thoughts included
    temperature: float = Field(1.0, gt=0)
    iterations: int = Field(1, ge=1)  # passes over each rollout
    updates: int = Field(1, ge=1)  # optimizer steps of a pass, each on its share of the completions
    lr: float = Field(1e-5, gt=0)
    schedule: Schedule = "cosine"
    beta: float = Field(0.0, ge=0)  # weight of the divergence from the reference
    epsilon: float = Field(0.2, gt=0)
    loss_type: Literal["bnpo", "grpo", "dr_grpo", "dapo"] = "bnpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    dropout: bool = False  # in the update; the rollout has none, so the gap will show it
    largest_gap: float = Field(1e-2, ge=0)  # stop training where the log-probabilities differ by more; 0 = only log it
    log_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gradient_checkpointing:
            raise ValueError("gradient checkpointing drops the cache that thoughts need; leave it off and lower micro_batch instead")
        if self.prompts * self.samples % self.updates:
            raise ValueError(f"{self.prompts * self.samples} completions cannot be shared out to {self.updates} updates")
        if self.micro_batch and self.share(1) % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the {self.share(1)} completions of a step")
        if self.save_every % (steps := self.iterations * self.updates):
            raise ValueError(f"save_every {self.save_every} must be a multiple of the {steps} steps of a rollout, so that it is not cut")
        return self

    def share(self, world: int) -> int:
        """Completions of a step in each of `world` processes."""
        return self.prompts * self.samples // (self.updates * world)

    def micro(self, world: int) -> int:
        """Completions at a time in each of `world` processes."""
        return min(self.micro_batch or self.share(world), self.share(world))

    def smaller(self, world: int) -> Self | None:
        """The same with about half the completions at a time; None where it is one already."""
        share, now = self.share(world), self.micro(world)
        return next((self.but(micro_batch=count) for count in range(now // 2, 0, -1) if share % count == 0), None)

    def rate(self, step: int) -> float:
        """The fraction of `lr` at `step` (0-based)."""
        return lr_factor(step, self.steps, self.schedule, self.warmup_steps)


def reinforce(
    model: nn.Module,
    thinking: Thinking,
    prompts: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    rewards: Mapping[Reward, float],
    settings: RLSettings,
    folder: Path | str,
    step_logger: Callable[..., None] | None = None,
    *,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    label: str = "reinforcement",
    trainer_class: type | None = None,
) -> TrainResult:
    """Trains `model` in place by GRPO; continues exactly where an earlier call in `folder` was killed.

    Args:
        model: what learns: a `LatentModel` (with `backbone` and `tokenizer`).
        thinking: the method's side of rollout and update, over that same model.
        prompts: ids of each prompt; columns: name -> one value a prompt, which reward functions receive by name.
        rewards: function -> weight; each is called as f(prompts, completions, completion_ids, **columns, **extras) and logged by
            name; weight 0 only logs it.
        validate: as in `lab.train.fit`.
        trainer_class: a method's own subclass of `LatentGRPOTrainer`.

    Raises SettingsError or DataError before anything expensive; TrainingError where the update does not repeat the rollout.
    """
    if settings.processes > 1:
        options = {"validate": validate, "label": label, "trainer_class": trainer_class}
        given = {"thinking": thinking, "prompts": prompts, "columns": columns, "rewards": rewards, "folder": folder}
        return together(reinforce, model, settings, step_logger, **given, **options)
    from lab.stability.guarded import train_guarded
    from lab.trl_trainer import LatentGRPOTrainer

    folder, began = Path(folder), time.monotonic()
    _check(model, prompts, columns, rewards, settings)
    write_row = row_writer(folder, step_logger)
    on_main(lambda: open_folder(folder, model, settings, len(prompts), write_row))
    ring, recovery = Ring(folder, settings.keep), Recovery.read(folder, settings.guard)
    resumed = on_main(lambda: max(ring.steps(), default=None))
    with shown(label, settings.steps, resumed) as progress:
        job = SimpleNamespace(model=model, validate=validate, write_row=write_row, on_step=progress.at)

        def build() -> LatentGRPOTrainer:
            trainer = (trainer_class or LatentGRPOTrainer)(model, thinking, prompts, columns, rewards, settings, job, folder, recovery)
            trainer.watch(ring, recovery, Detector(settings.guard, settings.warmup_steps), settings.save_every)
            return trainer

        def note(event: str, step: int) -> None:
            write_row({"event": event, "step": step})

        while True:
            try:
                trainer = train_guarded(build, ring, settings.guard, recovery, note)
                break
            except torch.OutOfMemoryError as error:
                settings = _halved(settings, ring, error)
                write_row({"event": "out_of_memory", "step": max(ring.steps()), "micro_batch": settings.micro_batch})
    return finish(trainer, resumed, time.monotonic() - began)


def _halved(s: RLSettings, ring: Ring, error: torch.OutOfMemoryError) -> RLSettings:
    """Settings with about half the micro-batch, to go on with from the last checkpoint; OutOfMemory where that is no way out."""
    smaller, now = s.smaller(world_size()), s.micro(world_size())
    if world_size() > 1 or smaller is None or not ring.steps():
        raise OutOfMemory(f"Out of memory at {now} completions at a time; set a smaller micro_batch, fewer prompts or samples.") from error
    log.warning("Out of memory: micro-batch reduced to %d completions, a step's stay; back to the last checkpoint.", smaller.micro_batch)
    return smaller


def _check(model: nn.Module, prompts: Sequence, columns: Mapping[str, Sequence], rewards: Mapping, s: RLSettings) -> None:
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise DataError("There is nothing to train on: no prompts, or an empty one.")
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise DataError(f"Column {name!r} has {len(values)} values for {len(prompts)} prompts.")
    check_common(s)
    if not rewards or not any(rewards.values()):
        raise SettingsError("Give at least one reward function with a weight other than 0.")
    if getattr(model.backbone, "is_activation_checkpointing", False):
        raise SettingsError("Gradient checkpointing is on in the model: it drops the cache that thoughts need. Switch it off.")
    if s.share(1) % world_size():
        raise SettingsError(f"{s.share(1)} completions cannot be shared by {world_size()} processes.")
    if (share := s.share(world_size())) % s.micro(world_size()):
        raise SettingsError(f"micro_batch {s.micro_batch} does not divide the {share} completions of each of {world_size()} processes.")


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


def check_gap(value: float, s: RLSettings, step: int) -> None:
    """Raises TrainingError where the update does not repeat the rollout."""
    if s.largest_gap and (value > s.largest_gap or math.isnan(value)) and not (s.dropout or s.bf16):
        raise TrainingError(
            f"Step {step}: the update gives log-probabilities that differ by {value:.3g} from the rollout's (at most "
            f"{s.largest_gap:g} is rounding). The update would optimise another policy than the one that acted; compare the "
            "method's `act` and `log_probs` (masks, temperature, dropout, stored inputs)."
        )
