"""What trainings are told: what every kind needs, supervised learning, GRPO."""

import math
import os
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lab.config import Settings
from lab.errors import SettingsError
from lab.launch import check_world
from lab.training import optim
from lab.training.optim import Group, Schedule
from lab.training.sharding import NOT_OFFERED, Sharding
from lab.training.stability import Guard


class Common(Settings):
    """What every kind of training is told."""

    lr: float = Field(1e-3, gt=0)
    schedule: Schedule = "linear"
    warmup_steps: int = Field(0, ge=0)
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_all: bool = False  # also biases and normalisation layers
    groups: list[Group] = []  # parameters with a rate or decay of their own
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0 = never
    bf16: bool = False  # autocast
    stability: Literal["safe", "paper"] = "safe"  # safe: all that learns, and its moments, in float32
    gradient_checkpointing: bool = False
    seed: int = 0
    guard: Guard = Guard()
    save_every: int = Field(200, ge=0)  # steps; 0 = no checkpoints but the guard's first
    keep: int = Field(3, ge=1)
    eval_every: int = Field(0, ge=0)
    load_best: bool = False  # end with the weights of the best validation score
    log_every: int = Field(10, ge=0)
    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    device: Literal["auto", "cpu"] = "auto"
    processes: int = Field(1, ge=1)  # of each machine; they share the global batch
    sharding: Sharding = "ddp"  # what they keep copies of (see lab.training.sharding)

    @field_validator("sharding", mode="before")
    @classmethod
    def _no_zero3(cls, value: Any) -> Any:
        if value in ("zero", "zero3", "deepspeed"):
            raise ValueError(f"{value}: {NOT_OFFERED}")
        return value

    @model_validator(mode="after")
    def _best_needs_scores(self) -> Self:
        if self.load_best and not self.eval_every:
            raise ValueError("load_best needs eval_every")
        return self

    @property
    def keep_best(self) -> bool:
        """Whether the best weights are kept beside the ring."""
        return self.load_best


class TrainSettings(Common):
    """How to train. Give `steps` or `epochs`, not both; `micro_batch` 0 means the whole global batch at once."""

    steps: int = Field(0, ge=0)
    epochs: float = Field(0.0, ge=0)
    global_batch: int = Field(8, ge=1)
    micro_batch: int = Field(0, ge=0)
    order: Literal["shuffle", "as_given"] = "shuffle"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    freeze: list[str] = []  # dotted paths

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"give either steps or epochs (now steps={self.steps}, epochs={self.epochs:g})")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give either warmup_steps or warmup_ratio")
        if self.min_lr_ratio and self.schedule != "cosine_with_min_lr":
            raise ValueError("min_lr_ratio belongs to schedule cosine_with_min_lr")
        return self

    def total(self, examples: int) -> int:
        """Optimizer steps over `examples`; batches run across passes: every example is seen `epochs` times, the last batch is filled up."""
        return self.steps or math.ceil(self.epochs * examples / self.global_batch)

    def warmup(self, total: int) -> int:
        """Warm-up steps of a training of `total` steps."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total)

    def micro(self, world: int) -> int:
        """Rows at a time in each of `world` processes."""
        return min(self.micro_batch or self.global_batch, self.global_batch // world)

    def smaller(self, world: int) -> Self | None:
        """The same with half the rows at a time; None where it is one already."""
        return self.but(micro_batch=math.ceil(self.micro(world) / 2)) if self.micro(world) > 1 else None

    def rate(self, step: int, total: int) -> float:
        """The fraction of `lr` at `step` (0-based)."""
        return optim.lr_factor(step, total, self.schedule, self.warmup(total), self.min_lr_ratio)


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
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo"] = "dapo"  # mean over a step's acts; bnpo: over a micro-batch's
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
        return optim.lr_factor(step, self.steps, self.schedule, self.warmup_steps)


def check_common(s: Common) -> None:
    """SettingsError for a tracker that is not installed; DeviceError where other processes came than were asked for."""
    from importlib.util import find_spec

    if s.report_to != "none" and find_spec(s.report_to) is None:
        raise SettingsError(
            f"report_to={s.report_to!r} needs a package that is not there; run: pip install {s.report_to} (or set report_to to none)."
        )
    if s.sharding.startswith("zero") and find_spec("deepspeed") is None:
        raise SettingsError(f"sharding={s.sharding!r} needs DeepSpeed: pip install -e '.[deepspeed]' (or set sharding to fsdp).")
    check_world(int(os.environ.get("WORLD_SIZE", 1)))
