"""Supervised training of any objective on transformers' Trainer: exact normalisation, exact resume, and a guard against divergence."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lab.errors import DataError, SettingsError
from lab.launch import world_size
from lab.training import optim
from lab.training.batches import Plan
from lab.training.place import Place, TrainResult, shown
from lab.training.settings import TrainSettings, check_common
from lab.training.together import together


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
    from lab.training.trainer import Job, Supervised

    _check(model, dataset, loss, settings)
    plan = _plan(settings, len(dataset), lengths)
    optim.freeze(model, settings.freeze)
    place = Place.open(Path(folder), model, settings, len(dataset), step_logger, resume)
    with shown(label, plan.steps, place.resumed) as progress:
        job = Job(model, dataset, collate, loss, count, validate, place.write_row, settings, plan, progress.at)

        def build() -> Supervised:
            _set_precision(model, settings, place.recovery.float32)
            return place.watch(Supervised(job, str(folder)), settings, settings.warmup(plan.steps))

        trainer = place.train(build, settings.guard)
    return place.finish(trainer)


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


def _plan(s: TrainSettings, examples: int, lengths: Sequence[int] | None) -> Plan:
    if s.global_batch < world_size():
        raise SettingsError(f"global_batch {s.global_batch} is smaller than the number of processes ({world_size()}).")
    return Plan(s.total(examples), examples, s.global_batch, s.micro(world_size()), s.seed, s.order == "shuffle", lengths)


def _set_precision(model: nn.Module, s: TrainSettings, force: bool) -> None:
    """Holds in float32 what learns, unless the paper's own precision is asked for and no rollback has overruled it."""
    if s.stability == "paper" and not force:
        return
    optim.learn_in_float32(model)
    if not s.bf16 and len({p.dtype for p in model.parameters()}) > 1:
        raise SettingsError(
            "The frozen weights are in half precision, what learns is in float32: set bf16=true, or load the model in float32."
        )
