"""Running sums: x0, a1 … aK modulo m; the steps are the partial sums but the last, which is the answer (distill.md 9)."""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import Chain, chain_examples, generator
from lab.errors import SettingsError


@dataclass(frozen=True)
class Sums:
    """The world: `terms` numbers are added to the first, modulo `modulus`."""

    terms: int = 3
    modulus: int = 5

    def __post_init__(self) -> None:
        if self.terms < 1 or self.modulus < 2:
            raise SettingsError(f"{self}: at least 1 term and a modulus of 2 are needed.")

    @property
    def vocabulary(self) -> list[str]:
        """The residues, then `=`."""
        return [*map(str, range(self.modulus)), "="]

    def batch(self, n: int, seed: int | np.random.Generator) -> Chain:
        """n problems: prompt (n, terms + 1), steps (n, terms - 1), answer (n,)."""
        numbers = generator(seed).integers(self.modulus, size=(n, self.terms + 1))
        sums = np.cumsum(numbers, axis=1) % self.modulus
        return Chain(numbers, sums[:, 1:-1], sums[:, -1])

    def examples(self, n: int, seed: int | np.random.Generator) -> list[Example]:
        """n problems as text: numbers separated by spaces."""
        return chain_examples(self.batch(n, seed), self.vocabulary, "sums")
