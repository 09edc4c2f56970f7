"""What was done about each divergence, and what that means for the training that goes on (distill.md 2C.4)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import files
from lab.errors import TrainingError
from lab.training.stability.detector import Guard, Verdict

EVENTS = "divergence.jsonl"
_REWARM = 200
_SCALE = {1: 1.0, 2: 0.7, 3: 0.5}


@dataclass
class Recovery:
    """The rollbacks of one training so far, read from `divergence.jsonl`, and the gentler settings that follow from them.

    Attempt 1 repeats the same data with new draws; 2 also clips at 1.0 and takes 0.7 of the rate after a new warm-up;
    3 also holds what learns in float32, takes half the rate and skips the data of the discarded stretch.
    """

    folder: Path
    guard: Guard
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, guard: Guard) -> "Recovery":
        """The history that lies in `folder`."""
        return cls(Path(folder), guard, [event for event in files.read_lines(Path(folder) / EVENTS) if event["kind"] == "rollback"])

    @property
    def generation(self) -> int:
        """How often the training was rolled back; part of the key of every draw."""
        return len(self.events)

    @property
    def clip(self) -> float:
        """The largest gradient norm allowed by the attempts so far."""
        return min((event["clip"] for event in self.events if event["clip"]), default=float("inf"))

    @property
    def float32(self) -> bool:
        """Whether an attempt asked for float32 weights."""
        return any(event["float32"] for event in self.events)

    def lr_scale(self, step: int) -> float:
        """The factor on the learning rate at `step`: the last attempt's scale; from the second attempt on it rises over 200 steps."""
        last = next((event for event in reversed(self.events) if event["resumed"] <= step), None)
        if last is None:
            return 1.0
        rise = min(1.0, (step - last["resumed"] + 1) / _REWARM) if last["attempt"] >= 2 else 1.0
        return last["lr_scale"] * rise

    def shift(self, step: int) -> int:
        """How many batches of data have been skipped before `step`."""
        return sum(event["skipped_batches"] for event in self.events if event["resumed"] <= step)

    def note(self, kind: str, step: int, **values: Any) -> None:
        """Records a skipped update, a warning or the end of trying."""
        files.append_line(self.folder / EVENTS, {"kind": kind, "step": step, **values})

    def roll_back(self, verdict: Verdict, step: int, resumed: int, extras: Mapping[str, float]) -> dict[str, Any]:
        """Records that the steps after `resumed` up to `step` are discarded and how it goes on; TrainingError when out of attempts."""
        attempt = self._attempt(verdict.onset)
        about = {"step": step, "onset": verdict.onset, "rule": verdict.rule, "values": dict(verdict.values), "extras": dict(extras)}
        if attempt > self.guard.attempts:
            self.note("gave up", **about)
            raise TrainingError(self._report(verdict, step))
        scale = self._earlier_scale(attempt) * _SCALE[min(attempt, 3)]
        changes = {
            "clip": 1.0 if attempt >= 2 else None,
            "lr_scale": scale,
            "float32": attempt >= 3,
            "skipped_batches": step - resumed if attempt >= 3 else 0,
        }
        event = {"kind": "rollback", "attempt": attempt, "resumed": resumed, **about, **changes}
        files.append_line(self.folder / EVENTS, event)
        self.events.append(event)
        return event

    def _attempt(self, onset: int) -> int:
        last = self.events[-1] if self.events else None
        return last["attempt"] + 1 if last and onset <= last["step"] + self.guard.region else 1

    def _earlier_scale(self, attempt: int) -> float:
        """The scale that earlier regions left behind."""
        before = self.events[: len(self.events) - (attempt - 1)]
        return before[-1]["lr_scale"] if before else 1.0

    def _report(self, verdict: Verdict, step: int) -> str:
        tried = "; ".join(f"attempt {event['attempt']} from step {event['resumed']} failed by {event['rule']}" for event in self.events)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in verdict.values.items())
        return (
            f"Training diverged at step {step} ({verdict.rule} since step {verdict.onset}: {shown}) and {self.guard.attempts} rollbacks "
            f"did not help ({tried}). Lower the learning rate or the weight of that loss; every event is in {self.folder / EVENTS}."
        )


def kept_and_discarded(rows: Iterable[Mapping[str, Any]]) -> tuple[list[dict], list[list[dict]]]:
    """Splits a metrics log into the rows that count and the discarded stretches, in order.

    A row `{"event": "rollback" | "resume", "step": k}` voids the rows after step k that stand before it: those that a
    rollback voids are a discarded stretch (drawn in grey), those that a resumed training repeats are dropped.
    """
    kept: list[dict] = []
    discarded: list[list[dict]] = []
    for row in map(dict, rows):
        if "event" not in row:
            kept.append(row)
            continue
        void = [old for old in kept if old["step"] > row["step"]]
        kept = [old for old in kept if old["step"] <= row["step"]]
        if void and row["event"] == "rollback":
            discarded.append(void)
    return kept, discarded
