"""Supervised training of any objective on transformers' Trainer: exact normalisation, exact resume, and a guard against divergence."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from lab import files, optim
from lab.config import Settings
from lab.errors import DataError, OutOfMemory, RunError, SettingsError
from lab.launch import check_world, launch, machines, on_main, rank, send_row, world_size
from lab.optim import Group, Schedule
from lab.progress import Progress
from lab.sharding import NOT_OFFERED, Sharding
from lab.stability import Detector, Guard, Recovery, Ring

log = logging.getLogger(__name__)

METRICS, FACTS = "metrics.jsonl", "training.json"
_FREE_TO_CHANGE = {"micro_batch", "guard", "save_every", "keep", "eval_every", "log_every", "report_to", "device", "load_best"}
_FREE_TO_CHANGE |= {"processes", "sharding"}


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
    sharding: Sharding = "ddp"  # what they keep copies of (see lab.sharding)

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


@dataclass
class TrainResult:
    """What a training came to; `row` is its last metrics row, `events` what the guard did."""

    steps: int
    seconds: float
    row: dict[str, Any]
    best: dict[str, Any]
    stopped: bool  # by the validation's own wish
    resumed_from: int | None
    micro_batch: int
    learning: int  # parameters that learn
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean loss over the last logged stretch; NaN if nothing was logged."""
        return self.row.get("loss", math.nan)

    @property
    def rollbacks(self) -> int:
        """How often the training went back to a checkpoint."""
        return sum(event["kind"] == "rollback" for event in self.events)

    @property
    def skipped(self) -> int:
        """How many updates were skipped because something was not finite."""
        return sum(event["kind"] == "skipped" for event in self.events)


def labelled(batch: Mapping[str, Any]) -> int:
    """Supervised targets of a causal batch: `labels` that are not -100, beyond the first column; rows where there are no labels."""
    if "labels" in batch:
        return int((batch["labels"][..., 1:] != -100).sum())
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def fit(
    model: nn.Module,
    dataset: Sequence[Any],
    collate: Callable[[list], Any],
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]],
    settings: TrainSettings,
    folder: Path | str,
    step_logger: Callable[..., None] | None = None,
    *,
    count: Callable[[Any], int | dict[str, int]] = labelled,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    lengths: Sequence[int] | None = None,
    resume: bool = True,
    label: str = "training",
) -> TrainResult:
    """Trains `model` in place and says how it went; continues exactly where an earlier call in `folder` was killed.

    Args:
        loss: (model, batch) -> (mean over the batch's items, {name: number}). A name with a slash is only recorded; the others
            are losses the guard watches. An objective that feeds hidden states back says so by an attribute `feeds_back = True`.
        count: items in a batch, so that the loss is a mean over the global batch whatever the micro-batches and processes.
            Or {component: items} where components have different denominators: then the loss is the sum of those components,
            each a mean over its own items, and they must be returned with their gradient.
        validate: (model) -> numbers, run without gradient every `eval_every` steps and at the end; `score` (0 to 1, higher is
            better) is judged by the guard and chooses the best weights, a true `stop` ends the training.
        step_logger: called as step_logger(step=…, loss=…, …); without one, rows go to `folder`/metrics.jsonl.
        lengths: of every example; a global batch is then sorted by them.

    Raises SettingsError, DataError or RunError before anything expensive; TrainingError when rollbacks do not help.
    """
    if settings.processes > 1:
        options = {"count": count, "validate": validate, "lengths": lengths, "resume": resume, "label": label}
        return together(fit, model, settings, step_logger, dataset=dataset, collate=collate, loss=loss, folder=folder, **options)
    from lab.stability.guarded import train_guarded
    from lab.trainer import Job, Plan, Supervised

    folder, began = Path(folder), time.monotonic()
    _check(model, dataset, loss, settings)
    plan = _plan(Plan, settings, len(dataset), lengths)
    optim.freeze(model, settings.freeze)
    write_row = row_writer(folder, step_logger)
    on_main(lambda: open_folder(folder, model, settings, len(dataset), write_row, resume))
    ring, recovery = Ring(folder, settings.keep), Recovery.read(folder, settings.guard)
    resumed = on_main(lambda: max(ring.steps(), default=None))
    with shown(label, plan.steps, resumed) as progress:
        job = Job(model, dataset, collate, loss, count, validate, write_row, settings, plan, progress.at)

        def build() -> Supervised:
            _set_precision(model, settings, recovery.float32)
            trainer = Supervised(job, str(folder))
            detector = Detector(settings.guard, settings.warmup(plan.steps))
            trainer.watch(ring, recovery, detector, settings.save_every)
            return trainer

        trainer = train_guarded(build, ring, settings.guard, recovery, lambda event, step: write_row({"event": event, "step": step}))
    return finish(trainer, resumed, time.monotonic() - began)


def together(
    train: Callable[..., TrainResult], model: nn.Module, settings: Common, logger: Callable | None, **arguments: Any
) -> TrainResult:
    """What `train(model=…, settings=…, **arguments)` comes to in `settings.processes` processes, which leaves its weights in `model`.

    Where one of them runs out of memory all are started again from the last checkpoint, with half the micro-batch.
    """
    if world_size() > 1:
        raise SettingsError(f"These are {world_size()} processes already; set processes to 1 in the training's settings.")
    arguments |= {"model": model, "step_logger": _send if logger else None}
    on_row = (lambda row: logger(**row)) if logger else None
    while True:
        arguments |= {"settings": settings.but(processes=1)}
        try:
            result, weights = launch(_trained, settings.processes, on_row=on_row, train=train, arguments=arguments)
        except OutOfMemory as error:
            settings = _with_less(settings, error, Path(arguments["folder"]), logger)
            arguments |= {"resume": True} if "resume" in arguments else {}
            continue
        _take_up(model, weights)
        return result


def _with_less(s: Any, error: OutOfMemory, folder: Path, logger: Callable | None) -> Any:
    """Settings to start again with; `error` where the micro-batch cannot be smaller."""
    smaller, step = s.smaller(s.processes * machines()), max(Ring(folder, s.keep).steps(), default=0)
    if smaller is None:
        raise error
    log.warning(
        "Out of memory: all processes go on from step %d with a micro-batch of %d, the global batch stays.", step, smaller.micro_batch
    )
    row_writer(folder, logger)({"event": "out_of_memory", "step": step, "micro_batch": smaller.micro_batch})
    return smaller


def _send(**row: Any) -> None:
    send_row(row)


def _trained(train: Callable[..., TrainResult], arguments: dict[str, Any]) -> tuple[TrainResult, dict[str, Tensor]]:
    from lab.stability.guarded import learned

    result = train(**arguments)
    return result, {name: tensor.detach().cpu() for name, tensor in learned(arguments["model"]).items()} if rank() == 0 else {}


def _take_up(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives `model` what the processes trained, in the type it was trained in; it is left as a training here leaves it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in weights)
        if name in weights:
            parameter.data = weights[name].to(parameter.device)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    model.eval()


def shown(label: str, total: int, resumed: int | None) -> Progress:
    """A training's progress, to be entered; other processes than the first show nothing."""
    progress = Progress(label, total) if rank() == 0 else _Silent()
    progress.start_at(resumed or 0)
    return progress


def _check(model: nn.Module, dataset: Sequence[Any], loss: Callable, s: TrainSettings) -> None:
    if len(dataset) == 0:
        raise DataError("There is nothing to train on: the data set is empty.")
    checkpointing = s.gradient_checkpointing or getattr(model, "is_activation_checkpointing", False)
    if checkpointing and getattr(loss, "feeds_back", False):
        raise SettingsError(
            "Gradient checkpointing cannot be used where hidden states are fed back: the recomputation drops the cache "
            "silently. Set gradient_checkpointing to false and choose a smaller micro_batch instead."
        )
    if s.gradient_checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise SettingsError(f"{type(model).__name__} has no gradient checkpointing; set gradient_checkpointing to false.")
        model.gradient_checkpointing_enable()
    check_common(s)


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


def _plan(make: Callable, s: TrainSettings, examples: int, lengths: Sequence[int] | None) -> Any:
    if s.global_batch < world_size():
        raise SettingsError(f"global_batch {s.global_batch} is smaller than the number of processes ({world_size()}).")
    return make(s.total(examples), examples, s.global_batch, s.micro(world_size()), s.seed, s.order == "shuffle", lengths)


def open_folder(folder: Path, model: nn.Module, s: Common, examples: int, write_row: Callable, resume: bool = True) -> None:
    """Makes the folder this training's own, or finds that it is (else RunError); a resumed one notes from where it goes on."""
    kept = {name: value for name, value in s.model_dump().items() if name not in _FREE_TO_CHANGE}
    shapes = [(name, list(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    facts = files.plain({"settings": kept, "examples": examples, "parameters": files.digest(shapes)})
    path = folder / FACTS
    if not path.exists():
        files.write_json(path, facts)
        return
    if not resume:
        raise RunError(f"{folder} holds a training already; choose another folder, or resume=True to continue it.")
    before = files.read_json(path)
    changed = [name for name, value in facts["settings"].items() if before["settings"].get(name) != value]
    changed += [name for name in ("examples", "parameters") if before[name] != facts[name]]
    if changed:
        raise RunError(f"{folder} holds a training with another {', '.join(changed)}; choose another folder, or put the old values back.")
    write_row({"event": "resume", "step": max(Ring(folder, s.keep).steps(), default=0)})


def row_writer(folder: Path, step_logger: Callable[..., None] | None) -> Callable[[dict[str, Any]], None]:
    """Where rank 0's metrics rows go: to `step_logger`, or to `folder`/metrics.jsonl."""
    if step_logger is not None:
        return lambda row: step_logger(**row) if rank() == 0 else None
    return lambda row: files.append_line(folder / METRICS, row) if rank() == 0 else None


def _set_precision(model: nn.Module, s: TrainSettings, force: bool) -> None:
    """Holds in float32 what learns, unless the paper's own precision is asked for and no rollback has overruled it."""
    if s.stability == "paper" and not force:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if not s.bf16 and len({p.dtype for p in model.parameters()}) > 1:
        raise SettingsError(
            "The frozen weights are in half precision, what learns is in float32: set bf16=true, or load the model in float32."
        )


def finish(trainer: Any, resumed: int | None, seconds: float) -> TrainResult:
    """Saves the end, takes up the best weights if asked for, and says how it went."""
    from lab.stability.guarded import WEIGHTS, load_learned

    s, steps, ring = trainer.s, trainer.state.global_step, trainer.ring
    if s.save_every and not on_main(lambda: steps in ring.steps()):
        trainer.save(steps)
    trainer.end()
    if s.load_best and trainer.best["step"]:
        load_learned(trainer.learner, ring.folder / "best" / WEIGHTS)
    trainer.model.zero_grad()
    trainer.learner.eval()
    events = files.read_lines(ring.folder / "divergence.jsonl")
    learning = sum(p.numel() for p in trainer.learner.parameters() if p.requires_grad)
    return TrainResult(steps, seconds, trainer.last_row, trainer.best, trainer.stopped, resumed, trainer.micro_batch, learning, events)


class _Silent:
    """Progress of a process that shows nothing."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def start_at(self, done: int) -> None:
        """Nothing is shown."""

    def at(self, done: int, note: str = "") -> None:
        """Nothing is shown."""
