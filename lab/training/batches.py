"""Which examples a training step reads, in which pieces, with which draws: the same after a kill and in any number of processes."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lab.launch import rank, world_size


@dataclass
class Plan:
    """Which examples belong to which optimizer step: a pure function of the seed, so a resumed training asks for the same ones.

    Passes over the data follow each other without a gap, each a permutation of its own. With `lengths`, a global batch is sorted
    by length, which changes no sum over it and saves padding. Micro-batch j belongs to process j modulo the number of processes.
    """

    steps: int
    examples: int
    global_batch: int
    micro_batch: int
    seed: int = 0
    shuffle: bool = True
    lengths: Sequence[int] | None = None
    _passes: dict[int, Any] = field(default_factory=dict, repr=False)

    def batch(self, number: int) -> list[int]:
        """The example indices of global batch `number`."""
        first, last = number * self.global_batch, (number + 1) * self.global_batch
        indices: list[int] = []
        while first < last:
            index, start = divmod(first, self.examples)
            part = self._pass(index)[start : start + last - first].tolist()
            indices += part
            first += len(part)
        return sorted(indices, key=self.lengths.__getitem__) if self.lengths is not None else indices

    def micro_batches(self, rows: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
        """`rows` of a global batch as (first row, rows) pieces of at most `micro_batch`."""
        return [(first, rows[first : first + self.micro_batch]) for first in range(0, len(rows), self.micro_batch)]

    def key(self, generation: int, step: int, row: int) -> int:
        """The seed of the draws in the micro-batch that starts at `row`: the same however many processes share the batch."""
        packed = struct.pack("<4q", self.seed, generation, step, row)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=7).digest())

    def _pass(self, number: int) -> Any:
        if number not in self._passes:
            order = np.random.default_rng([self.seed, number]).permutation(self.examples) if self.shuffle else np.arange(self.examples)
            self._passes = {number - 1: self._passes.get(number - 1), number: order}
        return self._passes[number]


class Batches:
    """A batch sampler that begins where training begins; its length is that of the whole training."""

    def __init__(self, plan: Plan, start: Callable[[], int], shift: Callable[[int], int]):
        self.plan, self.start, self.shift = plan, start, shift

    def __len__(self) -> int:
        return self.plan.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start(), self.plan.steps):
            pieces = self.plan.micro_batches(self.plan.batch(step + self.shift(step)))
            yield [index for _, piece in pieces[rank() :: world_size()] for index in piece]
