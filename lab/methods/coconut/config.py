"""Settings of COCONUT and its curriculum as pure functions (`coconut.md` 2.3, 2.6, 3)."""

from collections.abc import Iterator
from typing import Literal, Protocol

from pydantic import Field, model_validator

from lab.config import Settings

START, END, LATENT = "<|start-latent|>", "<|end-latent|>", "<|latent|>"
EVERYTHING = 10**9

Mode = Literal["coconut", "cot", "no_cot", "no_thoughts", "pause"]


class CoconutSettings(Settings):
    """What a model must know about itself: variant, curriculum, the stage it has reached, and its own tokens.

    Modes: `coconut` feeds hidden states back; `pause` reads the latent token instead ("pause as thought"); `cot` and `no_cot`
    are the written baselines; `no_thoughts` drops steps stage by stage and puts nothing in their place.
    """

    mode: Mode = "coconut"
    c_thought: int = Field(2, ge=0)  # thoughts a dropped step
    epochs_per_stage: int = Field(3, ge=1)
    max_latent_stage: int = Field(3, ge=0)
    pad_latent_to_max: bool = True
    uniform_prob: float = Field(0.0, ge=0, le=1)  # chance that a row takes a stage drawn uniformly
    stage: int = Field(0, ge=0)  # the stage the weights have reached
    thoughts: int | None = Field(None, ge=0)  # at inference, instead of what the stage says
    start_id: int = -1
    end_id: int = -1
    latent_id: int = -1
    eos_id: int = -1

    @property
    def markers(self) -> bool:
        """Whether start and end tokens stand around the thoughts."""
        return self.mode in ("coconut", "pause")

    @property
    def staged(self) -> bool:
        """Whether the mode goes through stages at all."""
        return self.mode not in ("cot", "no_cot")


class Schedule(Settings):
    """How training goes through the stages.

    `switch_at` > 0: a stage ends as soon as this share of held-out rows is exact (and at the latest after `epochs_per_stage`),
    which is sturdier than fixed lengths (`coconut.md` 9). `resume` is the epoch to begin with: `epochs_per_stage` after a
    written-reasoning warm start, a large number for "without curriculum".
    """

    epochs: int = Field(25, ge=1)
    resume: int = Field(0, ge=0)
    reset_optimizer: Literal["stage", "epoch", "never"] = "stage"
    switch_at: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        if self.resume >= self.epochs:
            raise ValueError(f"resume = {self.resume} leaves nothing of epochs = {self.epochs}")
        if self.switch_at and self.reset_optimizer != "stage":
            raise ValueError("switch_at ends stages early, so it needs reset_optimizer = stage")
        return self


class Chooser(Protocol):
    """The two calls of `random.Random` a uniform stage needs."""

    def random(self) -> float: ...
    def choice(self, options: list[int]) -> int: ...


def stage_of(epoch: int, s: CoconutSettings) -> int:
    """The stage of a 0-based epoch; the written baselines have no stages."""
    return epoch // s.epochs_per_stage if s.staged else 0


def drawn_stage(stage: int, steps: int, s: CoconutSettings, chance: Chooser) -> int:
    """`stage`, or with probability `uniform_prob` one of 0 … steps; one draw decides, a second one chooses."""
    return chance.choice(list(range(steps + 1))) if chance.random() < s.uniform_prob else stage


def dropped_and_latents(stage: int, steps: int, s: CoconutSettings) -> tuple[int, int]:
    """(written steps dropped from the front, thoughts in their place) of a training row with `steps` steps."""
    if s.mode == "no_cot":
        return EVERYTHING, 0
    if stage > s.max_latent_stage:
        dropped, latents = EVERYTHING, s.max_latent_stage if s.pad_latent_to_max else min(steps, s.max_latent_stage)
    else:
        dropped = latents = stage
    return dropped, 0 if s.mode in ("cot", "no_thoughts") else latents * s.c_thought


def thoughts_at(stage: int, steps: int | None, s: CoconutSettings) -> int:
    """Thoughts of a question when answering at `stage`; `steps` matters only without `pad_latent_to_max` (None = as many as stages)."""
    if s.thoughts is not None:
        return s.thoughts
    if not s.markers:
        return 0
    most = s.max_latent_stage if s.pad_latent_to_max or steps is None else min(s.max_latent_stage, steps)
    return s.c_thought * min(most, stage)


def segments(schedule: Schedule, s: CoconutSettings) -> Iterator[range]:
    """Runs of epochs that share one optimizer: everything, a stage, or one epoch each.

    The paper resets at stage switches, the official code at every epoch (`coconut.md` 7); both are here.
    """
    epochs = range(schedule.resume, schedule.epochs)
    if schedule.reset_optimizer == "never":
        yield epochs
        return
    key = (lambda epoch: epoch) if schedule.reset_optimizer == "epoch" else (lambda epoch: min(stage_of(epoch, s), s.max_latent_stage + 1))
    first = epochs.start
    for epoch in epochs:
        if key(epoch) != key(first):
            yield range(first, epoch)
            first = epoch
    yield range(first, epochs.stop)
