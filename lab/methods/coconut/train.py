"""Training through the stages: one `lab.train.fit` for every run of epochs that shares an optimizer (`coconut.md` 2.6)."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.latent.plan import collate
from lab.methods.coconut.config import Schedule, segments, stage_of
from lab.methods.coconut.data import StagedRows, Tokenized, training_row
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.objective import exact, labelled, loss
from lab.train import TrainSettings, fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """One optimizer's run: the stage it ended in, its steps, the share of held-out rows of that stage that are exact, and its loss."""

    stage: int
    steps: int
    exact: float
    loss: float
    seconds: float


def train(
    model: CoconutModel,
    examples: Sequence[Tokenized],
    held_out: Sequence[Tokenized],
    schedule: Schedule,
    how: TrainSettings,
    folder: Path | str,
    step_logger: Callable[..., None] | None = None,
) -> list[Stretch]:
    """Takes `model` through its stages in place; killed and called again it goes on where it stopped.

    Args:
        held_out: judged after every stretch, and every `how.eval_every` steps where `switch_at` ends stages early.
        how: `steps` and `epochs` are set here, from the schedule; `order` is the curriculum's own.
        step_logger: gets step (over all stretches), stage, loss, …
    """
    found: list[Stretch] = []
    done = 0
    for number, epochs in enumerate(segments(schedule, model.config)):
        stage = stage_of(epochs[-1], model.config)
        model.configure(stage=stage)
        stretch = _stretch(
            model, examples, held_out, epochs, stage, schedule, how, Path(folder) / f"{number:02d}-stage{stage}", done, step_logger
        )
        done += stretch.steps
        found.append(stretch)
        log.info("Stage %d: %d steps, loss %.3g, %.1f %% of held-out rows exact.", stage, stretch.steps, stretch.loss, 100 * stretch.exact)
    return found


def _stretch(
    model, examples, held_out, epochs: range, stage: int, schedule: Schedule, how, folder: Path, done: int, step_logger
) -> Stretch:
    rows = StagedRows(examples, model.config, epochs, how.seed)
    judged = [training_row(example, stage, model.config) for example in held_out]
    latest: dict[str, float] = {}

    def validate(model: CoconutModel) -> dict[str, float]:
        latest["exact"] = exact(model, judged)
        return {"exact": latest["exact"], "stop": bool(schedule.switch_at) and latest["exact"] >= schedule.switch_at}

    def write(**row: Any) -> None:
        if step_logger is not None:
            step_logger(**row | {"step": row["step"] + done, "stage": stage})

    steps = math.ceil(len(rows) / how.global_batch)
    every = min(how.eval_every or steps, steps) if schedule.switch_at else steps
    settings = how.but(steps=steps, epochs=0.0, order="as_given", eval_every=every, guard=_guard(how, epochs, model))
    result = fit(model, rows, collate, loss, settings, folder, write, count=labelled, validate=validate, label=f"stage {stage}")
    if "exact" not in latest:
        validate(model)
    return Stretch(stage, result.steps, latest["exact"], result.loss, result.seconds)


def _guard(how: TrainSettings, epochs: range, model: CoconutModel):
    """The guard, off where one optimizer goes through several stages: the loss jumps at each switch by design."""
    stages = {stage_of(epoch, model.config) for epoch in epochs}
    return how.guard.but(enabled=False) if len(stages) > 1 else how.guard
