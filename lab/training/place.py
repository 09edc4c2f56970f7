"""A training's folder: whose it is, what has been done there, where its rows go, and what is left at the end."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lab import files
from lab.config import Settings
from lab.errors import RunError
from lab.launch import on_main, rank
from lab.progress import Progress
from lab.training.stability import Detector, Guard, Recovery, Ring

METRICS, FACTS = "metrics.jsonl", "training.json"
_FREE_TO_CHANGE = {"micro_batch", "guard", "save_every", "keep", "eval_every", "log_every", "report_to", "device", "load_best"}
_FREE_TO_CHANGE |= {"processes", "sharding"}


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


@dataclass
class Place:
    """The folder of a training that goes on, or begins, here; the same in every process."""

    ring: Ring
    recovery: Recovery
    write_row: Callable[[dict[str, Any]], None]
    resumed: int | None
    began: float

    @classmethod
    def open(
        cls, folder: Path, model: nn.Module, s: Any, examples: int, step_logger: Callable[..., None] | None, resume: bool = True
    ) -> "Place":
        """RunError where the folder holds another training, or one that is not to be resumed."""
        began, write_row, ring = time.monotonic(), row_writer(folder, step_logger), Ring(folder, s.keep)
        on_main(lambda: _take(folder, model, s, examples, write_row, resume))
        return cls(ring, Recovery.read(folder, s.guard), write_row, on_main(lambda: max(ring.steps(), default=None)), began)

    def watch(self, trainer: Any, s: Any, warmup: int) -> Any:
        """`trainer`, judged and saved as the settings ask."""
        trainer.watch(self.ring, self.recovery, Detector(s.guard, warmup), s.save_every)
        return trainer

    def train(self, build: Callable[[], Any], guard: Guard) -> Any:
        """The trainer that `build` made and that got to the end, through rollbacks."""
        from lab.training.stability.guarded import train_guarded

        return train_guarded(build, self.ring, guard, self.recovery, lambda event, step: self.write_row({"event": event, "step": step}))

    def finish(self, trainer: Any) -> TrainResult:
        """Saves the end, takes up the best weights if asked for, and says how it went."""
        from lab.training.stability.guarded import WEIGHTS, load_learned

        s, steps, ring = trainer.s, trainer.state.global_step, self.ring
        if s.save_every and not on_main(lambda: steps in ring.steps()):
            trainer.save(steps)
        trainer.end()
        if s.load_best and trainer.best["step"]:
            load_learned(trainer.learner, ring.folder / "best" / WEIGHTS)
        trainer.model.zero_grad()
        trainer.learner.eval()
        events = files.read_lines(ring.folder / "divergence.jsonl")
        learning = sum(p.numel() for p in trainer.learner.parameters() if p.requires_grad)
        how = (time.monotonic() - self.began, trainer.last_row, trainer.best, trainer.stopped, self.resumed, trainer.micro_batch)
        return TrainResult(steps, *how, learning, events)


def _take(folder: Path, model: nn.Module, s: Settings, examples: int, write_row: Callable, resume: bool) -> None:
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


def shown(label: str, total: int, resumed: int | None) -> Progress:
    """A training's progress, to be entered; other processes than the first show nothing."""
    progress = Progress(label, total) if rank() == 0 else _Silent()
    progress.start_at(resumed or 0)
    return progress


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
