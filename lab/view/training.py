"""A training as it stands: losses, rewards and rollbacks read from a folder that another process may still be writing."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lab import files
from lab.errors import RunError
from lab.view import palette
from lab.view.base import View, escape, grid, number, plain
from lab.view.svg import Line, chart, sparkline

METRICS, EVENTS = "metrics.jsonl", "divergence.jsonl"
_FIRST = ("loss", "reward", "accuracy", "eval", "grad_norm", "lr", "learning_rate")
_CLOCKS = ("time", "epoch", "seconds")


@dataclass(frozen=True, repr=False)
class Training(View):
    """Curves of logged metrics; see `lab.view.training`."""

    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    name: str = "training"
    limit: int = 12

    @property
    def title(self) -> str:
        return f"{self.name}: training"

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a value: line, step, label (the texts logged beside it), metric, value, discarded (logged again after a rollback).

        Steps that begin from the start again are no rollback: they are another part of the training, and its label says so.
        """
        rows = [row for place, line in enumerate(self.metrics) if "step" in line for row in _values(place, line)]
        frame = pd.DataFrame(rows, columns=["line", "step", "label", "metric", "value"]).assign(part=1, discarded=False)
        for _, steps in frame.groupby(["label", "metric"], sort=False)["step"]:
            frame.loc[steps.index, ["part", "discarded"]] = _course(steps.tolist())
        later = frame["part"] > 1
        frame.loc[later, "label"] = (frame["label"] + " part " + frame["part"].astype(str)).str.strip()[later]
        return frame.drop(columns="part").astype({"discarded": bool})

    @property
    def names(self) -> list[str]:
        """The metrics logged: losses first, then rewards, each whole before its parts, and spreads last."""
        seen = list(dict.fromkeys(self.frame["metric"]))
        ranks = {name: next((place for place, first in enumerate(_FIRST) if name.startswith(first)), len(_FIRST)) for name in seen}
        return sorted(seen, key=lambda name: (name.endswith(("/std", "_std", "/min", "/max")), ranks[name], name not in _FIRST))

    def table(self) -> pd.DataFrame:
        """The last value of every metric that still counts."""
        kept = self.frame[~self.frame["discarded"]]
        return (
            kept.groupby(["metric", "label"], sort=False)
            .agg(step=("step", "last"), value=("value", "last"), best=("value", "min"))
            .reset_index()
        )

    def body(self) -> str:
        if self.frame.empty:
            return f"<h3>{escape(self.name)}</h3><p>Nothing was logged yet.</p>"
        charts = "".join(chart(name, list(self._lines(name))) for name in self.names[: self.limit])
        rest = self.names[self.limit :]
        more = f'<p class="soft">Not drawn: {escape(", ".join(rest))}.</p>' if rest else ""
        return f'<h3>{escape(self.name)}</h3><p class="soft">{self._state()}</p><div class="charts">{charts}</div>{more}{self._events()}'

    def text(self, width: int = 100, color: bool = True) -> str:
        if self.frame.empty:
            return f"{self.name}: nothing was logged yet."
        wide = max(len(name) for name in self.names)
        lines = [f"{self.name}: {self._state()}"]
        for name in self.names:
            kept = self.frame[(self.frame["metric"] == name) & ~self.frame["discarded"]]
            for label, part in kept.groupby("label", sort=False):
                values = part["value"].tolist()
                lines.append(f"{plain(name).ljust(wide)} {sparkline(values)} {number(values[-1])} {plain(label)}".rstrip())
        return "\n".join(lines + [plain(_sentence(event)) for event in self.events])

    def _state(self) -> str:
        last = int(self.frame["step"].iloc[-1])
        lost = self.frame.loc[self.frame["discarded"], "line"].nunique()
        return f"at step {last}, {len(self.metrics)} lines logged" + (f", {lost} of them discarded by a rollback (grey)" if lost else "")

    def _lines(self, name: str) -> Iterator[Line]:
        part = self.frame[self.frame["metric"] == name]
        several = self.frame["label"].nunique() > 1
        for place, (label, series) in enumerate(part.groupby("label", sort=False)):
            label = label if several else ""
            kept, lost = series[~series["discarded"]], series[series["discarded"]]
            yield Line(label, palette.SERIES[place % len(palette.SERIES)], kept["step"].tolist(), kept["value"].tolist())
            for _, stretch in lost.groupby((lost["line"].diff() > 1).cumsum()):
                yield Line(label, "grey", stretch["step"].tolist(), stretch["value"].tolist(), faint=True)

    def _events(self) -> str:
        if not self.events:
            return ""
        rows = [[str(event.get("step", "")), escape(event.get("kind", "")), escape(_sentence(event))] for event in self.events]
        return grid(["step", "event", "what happened"], rows, "Divergence events")


def training(folder: str | os.PathLike[str]) -> Training:
    """The training whose metrics.jsonl (and divergence.jsonl) lie in `folder`; for a run's step that still runs, in its partial folder.

    Raises RunError where there is neither.
    """
    given = Path(folder)
    name = given.name.removeprefix(".").removesuffix(".partial")
    found = next((path for path in (given.with_name(f".{name}.partial"), given.with_name(name), given) if path.is_dir()), None)
    if found is None:
        raise RunError(f"No folder {given}; give the folder of a training step.")
    return Training(files.read_lines(found / METRICS), files.read_lines(found / EVENTS), name)


def _values(place: int, line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    label = " ".join(str(value) for name, value in line.items() if isinstance(value, str))
    for name, value in line.items():
        if name not in ("step", *_CLOCKS) and isinstance(value, int | float) and not isinstance(value, bool):
            yield {"line": place, "step": line["step"], "label": label, "metric": name, "value": float(value)}


def _course(steps: list[int]) -> list[tuple[int, bool]]:
    """(part of the training, discarded) of each logged step: a fall to the first step begins a part, any other one is a rollback."""
    part, begin, found = 1, 0, []
    for place, step in enumerate(steps):
        if place and step < steps[place - 1]:
            if step <= steps[begin]:
                part, begin = part + 1, place
            found[begin:] = [(part, void or earlier >= step) for (_, void), earlier in zip(found[begin:], steps[begin:], strict=False)]
        found.append((part, False))
    return found


def _sentence(event: dict[str, Any]) -> str:
    if event.get("kind") != "rollback":
        return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("kind", "step"))
    changes = [f"clip {event['clip']}"] if event.get("clip") else []
    changes += [f"learning rate × {event['lr_scale']:g}"] if event.get("lr_scale", 1.0) != 1.0 else []
    changes += ["float32"] if event.get("float32") else []
    gentler = f" with {', '.join(changes)}" if changes else " with new draws"
    found = f"step {event['step']}: {event['rule']} since step {event['onset']}"
    return f"{found}; back to step {event['resumed']}{gentler} (attempt {event['attempt']})"
