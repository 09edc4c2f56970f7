"""Randomness that does not depend on the batch: every draw is a function of (seed, question, sample, step, stream).

`Keyed` hashes those five numbers (a counter-based generator), so that batch size, padding, compaction and resuming change
nothing and N = 64 samples contain N = 4 as a prefix. `Recorded` replays given draws. Axes: R rows, D width.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from lab.errors import SettingsError

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_STEP, _STREAM = -3335678366873096957, -5435081209227447693


class Stream(IntEnum):
    """What a draw is for; dropout sites follow from `DROPOUT` on, one number per layer and site."""

    TOKEN = 0
    THOUGHT = 1
    GATE = 2
    STOP = 3
    DROPOUT = 1000


class Draws(Protocol):
    """Draws for the rows at hand. `step` (R,) counts within the row; results have `shape` per row, (R, *shape)."""

    def uniform(self, step: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor: ...
    def normal(self, step: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor: ...
    def select(self, rows: Tensor) -> "Draws": ...


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _wrap(x: int) -> int:
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def mix(x: Tensor) -> Tensor:
    """A bijective scramble of int64 (the finaliser of splitmix64)."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MIX1)
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MIX2)
    return _shift(x, 31).bitwise_xor_(x)


def unit(bits: Tensor) -> Tensor:
    """Numbers of 24 bits as uniform ones in the open interval (0, 1); the largest would round to 1, whose normal is infinite."""
    return bits.float().add_(0.5).mul_(2.0**-24).clamp_(max=1 - 2.0**-24)


@dataclass(frozen=True)
class Keyed:
    """Draws keyed by `key` (R,), one int64 a row; `Keyed.of(seed, question, sample)` makes the keys."""

    key: Tensor

    @classmethod
    def of(cls, seed: int, question: Tensor, sample: Tensor) -> "Keyed":
        """Keys of rows given the seed and each row's question and sample number, (R,) int64 each."""
        start = mix(torch.tensor(_wrap(seed + _GOLDEN), device=question.device))
        return cls(mix(mix(start ^ (question + 1) * _STEP) ^ (sample + 1) * _STREAM))

    def uniform(self, step: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform in the open interval (0, 1), float32, (R, *shape); 24 random bits each."""
        base = mix(self.key ^ mix((step + 1) * _STEP + _wrap((int(stream) + 1) * _STREAM)))
        count = math.prod(shape)
        counter = torch.arange(1, count + 1, device=base.device) * _GOLDEN
        bits = _shift(mix(base[:, None] + counter), 40)
        return unit(bits).view(len(base), *shape)

    def normal(self, step: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Standard normal, float32, (R, *shape)."""
        return self.uniform(step, stream, shape).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))

    def select(self, rows: Tensor) -> "Keyed":
        return Keyed(self.key[rows])


@dataclass(frozen=True)
class Recorded:
    """Replays draws: `values[stream]` (R, steps, *shape); a stream that was not recorded is an error."""

    values: dict[int, Tensor]

    def uniform(self, step: Tensor, stream: int, shape: tuple[int, ...] = ()) -> Tensor:
        if int(stream) not in self.values:
            raise SettingsError(f"No draws were recorded for stream {int(stream)}; recorded: {sorted(self.values)}.")
        values = self.values[int(stream)]
        return values[torch.arange(len(step), device=values.device), step].view(len(step), *shape)

    normal = uniform

    def select(self, rows: Tensor) -> "Recorded":
        return Recorded({stream: value[rows] for stream, value in self.values.items()})
