"""Digits joined by max and min, evaluated from left to right; steps are the running results, the last is the answer (latenttts.md 9)."""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import Chain, chain_examples, generator
from lab.errors import SettingsError


@dataclass(frozen=True)
class MaxMin:
    """The world: `operators` operators between `operators` + 1 digits."""

    operators: int = 3

    def __post_init__(self) -> None:
        if self.operators < 1:
            raise SettingsError(f"operators = {self.operators}: at least one is needed.")

    @property
    def vocabulary(self) -> list[str]:
        """The digits, max, min, `=`."""
        return [*"0123456789", "max", "min", "="]

    def batch(self, n: int, seed: int | np.random.Generator) -> Chain:
        """n problems: prompt (n, 2 · operators + 1) of digits and operators in turn, steps (n, operators), answer (n,)."""
        rng = generator(seed)
        digits, least = rng.integers(10, size=(n, self.operators + 1)), rng.integers(2, size=(n, self.operators))
        prompt = np.empty((n, 2 * self.operators + 1), dtype=digits.dtype)
        prompt[:, ::2], prompt[:, 1::2] = digits, 10 + least
        value, steps = digits[:, 0], []
        for i in range(self.operators):
            value = np.where(least[:, i], np.minimum(value, digits[:, i + 1]), np.maximum(value, digits[:, i + 1]))
            steps.append(value)
        return Chain(prompt, np.stack(steps, axis=1), value)

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """n problems as text, such as "3 max 5 min 4 max 1"."""
        return chain_examples(self.batch(n, seed), self.vocabulary, "maxmin")
