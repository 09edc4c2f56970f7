"""Training through the stages: one `lab.train.fit` for every run of epochs that shares an optimizer (`coconut.md` 2.6)."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    course = _Course(model, examples, held_out, schedule, how, Path(folder), step_logger)
    for epochs in segments(schedule, model.config):
        course.go_through(epochs)
    return course.found


@dataclass
class _Course:
    """A training under way: what all stretches share, and the stretches done."""

    model: CoconutModel
    examples: Sequence[Tokenized]
    held_out: Sequence[Tokenized]
    schedule: Schedule
    how: TrainSettings
    folder: Path
    logger: Callable[..., None] | None
    found: list[Stretch] = field(default_factory=list)

    def go_through(self, epochs: range) -> None:
        """Trains one stretch: a new optimizer, rows of these epochs in order, and a look at the held-out rows of its last stage."""
        stage = stage_of(epochs[-1], self.model.config)
        self.model.configure(stage=stage)
        rows = StagedRows(self.examples, self.model.config, epochs, self.how.seed)
        look = _Look([training_row(example, stage, self.model.config) for example in self.held_out], self.schedule.switch_at)
        folder = self.folder / f"{len(self.found):02d}-stage{stage}"
        done = sum(part.steps for part in self.found)
        result = fit(
            self.model,
            rows,
            collate,
            loss,
            self._settings(rows, epochs),
            folder,
            lambda **row: self._log(row, done, stage),
            count=labelled,
            validate=look,
            label=f"stage {stage}",
        )
        exact_rows = look.latest if look.latest is not None else look(self.model)["exact"]
        self.found.append(Stretch(stage, result.steps, exact_rows, result.loss, result.seconds))
        log.info("Stage %d: %d steps, loss %.3g, %.1f %% of held-out rows exact.", stage, result.steps, result.loss, 100 * exact_rows)

    def _settings(self, rows: StagedRows, epochs: range) -> TrainSettings:
        """One pass over `rows`; the guard is off where an optimizer goes through several stages: the loss jumps at each by design."""
        steps = math.ceil(len(rows) / self.how.global_batch)
        every = min(self.how.eval_every or steps, steps) if self.schedule.switch_at else steps
        several = len({stage_of(epoch, self.model.config) for epoch in epochs}) > 1
        guard = self.how.guard.but(enabled=False) if several else self.how.guard
        return self.how.but(steps=steps, epochs=0.0, order="as_given", eval_every=every, guard=guard)

    def _log(self, row: dict[str, Any], done: int, stage: int) -> None:
        if self.logger is not None:
            self.logger(**row | {"step": row["step"] + done, "stage": stage})


class _Look:
    """The validation of a stretch: the share of exact rows, and whether that ends the stage."""

    def __init__(self, rows: list, switch_at: float):
        self.rows, self.switch_at, self.latest = rows, switch_at, None

    def __call__(self, model: CoconutModel) -> dict[str, Any]:
        self.latest = exact(model, self.rows)
        return {"exact": self.latest, "stop": bool(self.switch_at) and self.latest >= self.switch_at}
