"""Digits to be sorted, reversed, copied or raised by one, as an instruction token says; or as the digits themselves say (lta.md 9).

Base corpus: `BOS s_1 … s_m x_1 … x_5 SEP y_1 … y_5 EOS`, one of the m slots holds an instruction, the others filler tokens (which
later stand for thoughts). Task: the instruction is missing and depends on the instance: sort if the digits contain a 7, else reverse.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import IGNORE, generator
from lab.errors import SettingsError

SLOTS = (1, 2, 3, 4, 6, 8)
INSTRUCTIONS = ("sort", "reverse", "copy", "raise")


class InstructTask(NamedTuple):
    """n instances as token ids: `x` and `y` (n, digits); `seven` (n,): whether x contains a 7, so that y is x sorted."""

    x: np.ndarray
    y: np.ndarray
    seven: np.ndarray


@dataclass(frozen=True)
class Instruct:
    """The world: `digits` digits and `filler` filler tokens."""

    digits: int = 5
    filler: int = 16

    def __post_init__(self) -> None:
        if self.digits < 2 or self.filler < 1:
            raise SettingsError(f"{self}: at least 2 digits and 1 filler token are needed.")

    @property
    def vocabulary(self) -> list[str]:
        """BOS, SEP, EOS, the digits, the instructions, what a step can say of a 7, the filler tokens: 35 for 16 of them."""
        return ["BOS", "SEP", "EOS", *"0123456789", *INSTRUCTIONS, "seven", "none", *(f"t{i}" for i in range(self.filler))]

    def batch(self, n: int, seed: int | np.random.Generator, slots: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Base corpus: (ids, targets), both (n, slots + 2 · digits + 3); targets are the next token at the columns that predict y."""
        rng = generator(seed)
        m = slots or int(rng.choice(SLOTS))
        which, x = rng.integers(4, size=n), rng.integers(10, size=(n, self.digits))
        head = 19 + rng.integers(self.filler, size=(n, m))
        head[np.arange(n), rng.integers(m, size=n)] = 13 + which
        all_y = np.stack([np.sort(x, axis=1), x[:, ::-1], x, (x + 1) % 10])
        y = 3 + all_y[which, np.arange(n)]
        column = np.ones((n, 1), dtype=x.dtype)
        ids = np.concatenate([0 * column, head, 3 + x, column, y, 2 * column], axis=1)
        targets = np.full_like(ids, IGNORE)
        sep = 1 + m + self.digits
        targets[:, sep : sep + self.digits] = y
        return ids, targets

    def task(self, n: int, seed: int | np.random.Generator) -> InstructTask:
        """n instances of the task without an instruction."""
        x = generator(seed).integers(10, size=(n, self.digits))
        seven = (x == 7).any(axis=1)
        return InstructTask(3 + x, 3 + np.where(seven[:, None], np.sort(x, axis=1), x[:, ::-1]), seven)

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """The task as text: the digits; what decides, and the operation, as steps; the digits in their new order."""
        made, words = self.task(n, seed), self.vocabulary
        steps = {True: ("seven", "sort"), False: ("none", "reverse")}
        return [
            Example(f"instruct-{i:05d}", " ".join(words[t] for t in x), steps[bool(seven)], " ".join(words[t] for t in y))
            for i, (x, y, seven) in enumerate(zip(*made, strict=True))
        ]
