"""Tells divergence from noise: what a training says about itself at each step, in; a verdict, out (distill.md 2C).

Everything here is plain numbers, so that a series can be judged without a model and a killed training continues its judgement.
The thresholds are proposals, not tuned on a real divergence.
"""

import bisect
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lab.config import Settings


class Guard(Settings):
    """When a training counts as diverged, and what is done about it."""

    enabled: bool = True
    nonfinite_limit: int = 3  # so many skipped updates …
    nonfinite_window: int = 50  # … within so many steps
    spike_z: float = 8.0  # robust z-score of a component's logarithm
    spike_count: int = 20
    spike_window: int = 40
    history: int = 200  # steps that medians look back on
    enough: int = 50  # steps before a median means anything
    level_on: list[str] = ["loss"]  # components whose running mean must not rise
    level_ratio: float = 1.5
    level_margin: float = 0.1
    level_steps: int = 200
    level_ema: int = 50
    score_floor: float = 0.1  # a best validation score below this says nothing
    score_ratio: float = 0.5
    score_drop: float = 0.1  # ten points, twice in a row
    gradient_ratio: float = 50.0
    gradient_floor: float = 1.0  # a norm below this is no burst: a loss that has reached almost zero has a tiny median
    gradient_count: int = 10
    gradient_window: int = 20
    margin: int = 50  # roll back to at least so many steps before the onset
    attempts: int = 3  # in one region, before giving up
    region: int = 500  # steps beyond a discarded stretch that still count as the same region

    def of_components(self, *names: str) -> "Guard":
        """The same with the level of these components judged, where nobody has chosen others.

        For a loss with a distance to a teacher that itself learns: while the teacher's states come apart the distance rises, and
        with it the total, though every cross-entropy falls.
        """
        return self.but(level_on=list(names)) if self.level_on == ["loss"] else self


@dataclass(frozen=True)
class Signals:
    """One step's numbers, after reduction over micro-batches and processes: losses (the total is `loss`), gradient norm before clipping."""

    step: int
    losses: Mapping[str, float]
    gradient_norm: float = 0.0
    extras: Mapping[str, float] = field(default_factory=dict)  # recorded with an alarm, judged by no rule


@dataclass(frozen=True)
class Verdict:
    """`ok`; `skip` this update; `warn`; or `diverged` since step `onset` by `rule`, with the `values` that showed it."""

    action: Literal["ok", "skip", "warn", "diverged"] = "ok"
    rule: str = ""
    onset: int = -1
    values: Mapping[str, float] = field(default_factory=dict)


OK = Verdict()


class Median:
    """The median of the last `size` values, and their median absolute deviation."""

    def __init__(self, size: int, values: list[float] | None = None):
        self.size = size
        self.recent = deque(values or [])
        self.ordered = sorted(self.recent)

    def add(self, value: float) -> None:
        """Takes in a value, and lets go of the oldest when full."""
        self.recent.append(value)
        bisect.insort(self.ordered, value)
        if len(self.recent) > self.size:
            del self.ordered[bisect.bisect_left(self.ordered, self.recent.popleft())]

    def __len__(self) -> int:
        return len(self.recent)

    @property
    def middle(self) -> float:
        """The median (mean of the middle two)."""
        return _middle(self.ordered)

    @property
    def upper(self) -> float:
        """The upper quartile."""
        return self.ordered[3 * len(self.ordered) // 4]

    @property
    def deviation(self) -> float:
        """The median of the absolute distances to the median."""
        middle = self.middle
        return _middle(sorted(abs(value - middle) for value in self.ordered))


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])


class Detector:
    """Judges one training step by step. No rule but the non-finite one speaks during the first `warmup` steps.

    The spike rule differs from distill.md 2C.2 in one point: a value must also exceed `level_ratio` × the upper quartile + `level_margin`,
    so that neither a loss that has reached almost zero can raise an alarm by trembling, nor one whose batches are of several kinds
    (CoLaR's speeds) by the harder of them.
    """

    def __init__(self, guard: Guard, warmup: int = 0):
        self.guard, self.warmup = guard, warmup
        self.nonfinite: list[int] = []
        self.logs: dict[str, Median] = {}
        self.spikes: dict[str, list[int]] = {}
        self.gradients = Median(guard.history)
        self.bursts: list[int] = []
        self.ema: dict[str, float] = {}
        self.best_ema: dict[str, float] = {}
        self.above_since: dict[str, int] = {}
        self.seen = 0
        self.best_score = -math.inf
        self.drops = 0
        self.last_good = 0

    def update(self, signals: Signals) -> Verdict:
        """The verdict on one step; call it before the update is applied."""
        if not all(map(math.isfinite, (*signals.losses.values(), signals.gradient_norm))):
            return self._nonfinite(signals)
        self.seen += 1
        verdicts = [self._spike(signals), self._level(signals), self._gradient(signals)]
        if signals.step <= self.warmup:
            return OK
        return next((verdict for verdict in verdicts if verdict.action == "diverged"), next(filter(_speaks, verdicts), OK))

    def validated(self, step: int, score: float) -> Verdict:
        """The verdict on a validation score (higher is better, 0 to 1)."""
        best, guard = self.best_score, self.guard
        values = {"score": score, "best": best}
        fallen = best >= guard.score_floor and score < guard.score_ratio * best
        self.drops = self.drops + 1 if score < best - guard.score_drop else 0
        self.best_score = max(best, score)
        if not (fallen or self.drops >= 2):
            self.last_good = step if self.drops == 0 else self.last_good
            return OK
        if step <= self.warmup:
            return OK
        if self._still_learning():
            return Verdict("warn", "overfit", self.last_good, values)
        return Verdict("diverged", "validation", self.last_good, values)

    def _nonfinite(self, signals: Signals) -> Verdict:
        recent = [step for step in self.nonfinite if step > signals.step - self.guard.nonfinite_window]
        self.nonfinite = [*recent, signals.step]
        action = "diverged" if len(self.nonfinite) >= self.guard.nonfinite_limit else "skip"
        return Verdict(action, "nonfinite", self.nonfinite[0], {"count": float(len(self.nonfinite))})

    def _spike(self, signals: Signals) -> Verdict:
        guard, worst = self.guard, OK
        for name, value in signals.losses.items():
            if value <= 0:
                continue
            past = self.logs.setdefault(name, Median(guard.history))
            z = _robust_z(value, past, guard)
            steps = [step for step in self.spikes.get(name, []) if step > signals.step - guard.spike_window]
            if z > guard.spike_z and signals.step > self.warmup:
                steps.append(signals.step)
            self.spikes[name] = steps
            if len(steps) >= guard.spike_count:
                worst = Verdict("diverged", f"spike of {name}", steps[0], {name: value, "z": z, "median": math.exp(past.middle)})
            past.add(math.log(value))
        return worst

    def _level(self, signals: Signals) -> Verdict:
        guard, worst = self.guard, OK
        for name in guard.level_on:
            if name not in signals.losses:
                continue
            value = signals.losses[name]
            weight = max(1.0 / self.seen, 2.0 / (guard.level_ema + 1))
            mean = self.ema[name] = self.ema.get(name, value) + weight * (value - self.ema.get(name, value))
            if self.seen >= guard.level_ema:
                self.best_ema[name] = min(self.best_ema.get(name, mean), mean)
            best = self.best_ema.get(name, math.inf)
            if mean <= _above(best, guard.level_ratio) + guard.level_margin or signals.step <= self.warmup:
                self.above_since.pop(name, None)
            elif signals.step - self.above_since.setdefault(name, signals.step) + 1 >= guard.level_steps:
                worst = Verdict("diverged", f"level of {name}", self.above_since[name], {name: mean, "best": best})
        return worst

    def _gradient(self, signals: Signals) -> Verdict:
        guard, past = self.guard, self.gradients
        self.bursts = [step for step in self.bursts if step > signals.step - guard.gradient_window]
        if len(past) >= guard.enough and signals.gradient_norm > max(guard.gradient_ratio * past.middle, guard.gradient_floor):
            self.bursts.append(signals.step)
        past.add(signals.gradient_norm)
        if len(self.bursts) < guard.gradient_count:
            return OK
        return Verdict("warn", "gradient norm", self.bursts[0], {"gradient_norm": signals.gradient_norm, "median": past.middle})

    def _still_learning(self) -> bool:
        """Whether the training loss stands at its best: then a falling score is overfitting, not divergence."""
        names = [name for name in self.guard.level_on if name in self.best_ema]
        return bool(names) and all(self.ema[name] <= _above(self.best_ema[name], 1.05) + 1e-3 for name in names)

    def state(self) -> dict[str, Any]:
        """Everything remembered, as JSON can hold it."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "logs": {name: list(past.recent) for name, past in self.logs.items()}, "gradients": list(self.gradients.recent)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.best_score = float(state["best_score"])
        self.logs = {name: Median(self.guard.history, values) for name, values in state["logs"].items()}
        self.gradients = Median(self.guard.history, state["gradients"])


_PLAIN = ("nonfinite", "spikes", "bursts", "ema", "best_ema", "above_since", "seen", "best_score", "drops", "last_good")


def _speaks(verdict: Verdict) -> bool:
    return verdict.action != "ok"


def _above(value: float, ratio: float) -> float:
    """`ratio` times `value`, away from it in the same direction where it is negative (a density's logarithm may be)."""
    return value + (ratio - 1) * abs(value)


def _robust_z(value: float, past: Median, guard: Guard) -> float:
    """The z-score of log(value) against `past`; 0 where the value is not well above most of it."""
    if len(past) < guard.enough or value <= guard.level_ratio * math.exp(past.upper) + guard.level_margin:
        return 0.0
    return (math.log(value) - past.middle) / (1.4826 * past.deviation + 1e-3)
