"""Reinforcement learning of models that think latently: GRPO on TRL's trainer, for any policy that can say how probable its acts were.

The rollout runs in this library's engine (each prompt read once), the update asks the method for log-probabilities of the same
acts, from the stored inputs or by thinking again with gradient; groups, advantages and the loss are TRL's. The gap between the
two log-probabilities is measured at every step: where it is not zero up to rounding, the update optimises something else.
Axes: Q prompts, N samples each, R = Q·N rows, P prompt columns, C completion columns.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lab.errors import DataError, OutOfMemory, SettingsError
from lab.launch import world_size
from lab.training.acts import Thinking
from lab.training.place import Place, TrainResult, shown
from lab.training.settings import RLSettings, check_common
from lab.training.together import together

log = logging.getLogger(__name__)

Reward = Callable[..., Sequence[float]]


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
    from lab.training.trl_trainer import LatentGRPOTrainer

    _check(model, prompts, columns, rewards, settings)
    place = Place.open(Path(folder), model, settings, len(prompts), step_logger)
    with shown(label, settings.steps, place.resumed) as progress:
        job = SimpleNamespace(model=model, validate=validate, write_row=place.write_row, on_step=progress.at)

        def build() -> LatentGRPOTrainer:
            make = trainer_class or LatentGRPOTrainer
            trainer = make(model, thinking, prompts, columns, rewards, settings, job, Path(folder), place.recovery)
            return place.watch(trainer, settings, settings.warmup_steps)

        while True:
            try:
                return place.finish(place.train(build, settings.guard))
            except torch.OutOfMemoryError as error:
                settings = _halved(settings, place, error)


def _halved(s: RLSettings, place: Place, error: torch.OutOfMemoryError) -> RLSettings:
    """Settings with about half the micro-batch, to go on with from the last checkpoint; OutOfMemory where that is no way out."""
    smaller, now, steps = s.smaller(world_size()), s.micro(world_size()), place.ring.steps()
    if world_size() > 1 or smaller is None or not steps:
        raise OutOfMemory(f"Out of memory at {now} completions at a time; set a smaller micro_batch, fewer prompts or samples.") from error
    log.warning("Out of memory: micro-batch reduced to %d completions, a step's stay; back to the last checkpoint.", smaller.micro_batch)
    place.write_row({"event": "out_of_memory", "step": max(steps), "micro_batch": smaller.micro_batch})
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
