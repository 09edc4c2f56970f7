"""State tracking with memorised operators: apply K of m fixed permutations in turn (coconut.md 9, colar.md 9, distill.md 9, dtt.md 9.1).

The prompt is `op … op Q x`, the steps are the states after each operator, the answer is the last of them. A model must know the
operators by heart (they never stand in the prompt) and apply them one after the other.
"""

from dataclasses import dataclass

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import Chain, chain_examples, generator
from lab.errors import SettingsError


@dataclass(frozen=True)
class Permutations:
    """The world; `operators` permutations of `states` states, drawn once from `table_seed`; `hops` operators a problem."""

    states: int = 8
    operators: int = 8
    hops: int = 3
    table_seed: int = 0

    def __post_init__(self) -> None:
        if self.states < 2 or self.operators < 1 or self.hops < 1:
            raise SettingsError(f"{self}: at least 2 states, 1 operator and 1 hop are needed.")

    @property
    def vocabulary(self) -> list[str]:
        """Q (before the start state), A (before an answer), F (announces slow reasoning), operators, states."""
        return ["Q", "A", "F", *(f"op{i}" for i in range(self.operators)), *(f"s{i}" for i in range(self.states))]

    @property
    def table(self) -> np.ndarray:
        """(operators, states): the state that each operator makes of each state."""
        return generator(self.table_seed).permuted(np.tile(np.arange(self.states), (self.operators, 1)), axis=1)

    def batch(self, n: int, seed: int | np.random.Generator, hops: int | None = None) -> Chain:
        """n problems of `hops` operators (default: the world's): prompt (n, hops + 2), steps (n, hops), answer (n,)."""
        rng, hops, table = generator(seed), hops or self.hops, self.table
        chosen = rng.integers(self.operators, size=(n, hops))
        state = start = rng.integers(self.states, size=n)
        visited = []
        for hop in range(hops):
            state = table[chosen[:, hop], state]
            visited.append(state)
        first_state = 3 + self.operators
        prompt = np.concatenate([3 + chosen, np.zeros((n, 1), dtype=chosen.dtype), first_state + start[:, None]], axis=1)
        steps = first_state + np.stack(visited, axis=1)
        return Chain(prompt, steps, steps[:, -1])

    def examples(
        self, n: int, seed: int | np.random.Generator, hops: tuple[int, int] | None = None, with_operators: bool = False, slow: float = 0.0
    ) -> list[Example]:
        """n problems as text.

        Args:
            hops: draw the number of operators of each problem between these two (both included).
            with_operators: a step is "op3 s5" instead of "s5" (CoLaR's reasoning text).
            slow: share of problems that are reasoned slowly, each step said twice (`extra["slow"]`; DTT's choice of length).
        """
        rng = generator(seed)
        low, high = hops or (self.hops, self.hops)
        counts = rng.integers(low, high + 1, size=n)
        slowly = rng.random(n) < slow
        made = {k: iter(chain_examples(self.batch(int((counts == k).sum()), rng, k), self.vocabulary, "")) for k in range(low, high + 1)}
        return [self._example(next(made[count]), i, with_operators, bool(slowly[i])) for i, count in enumerate(counts.tolist())]

    def _example(self, plain: Example, index: int, with_operators: bool, slow: bool) -> Example:
        named = zip(plain.question.split(), plain.steps, strict=False)
        steps = tuple(f"{operator} {state}" for operator, state in named) if with_operators else plain.steps
        steps = tuple(step for step in steps for _ in range(1 + slow))
        return Example(f"permutations-{index:05d}", plain.question, steps, plain.answer, (), {"slow": slow})
