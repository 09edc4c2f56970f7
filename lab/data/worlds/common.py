"""What the worlds share: generators made from seeds, and the token layout of a chain of states."""

from typing import NamedTuple

import numpy as np

from lab.data.examples import Example

IGNORE = -100


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """A numpy generator: `seed` itself if it is one (its state moves on), else a fresh one of that seed."""
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)


class Chain(NamedTuple):
    """n problems as token ids: `prompt` (n, P), the intermediate `steps` (n, K), and `answer` (n,)."""

    prompt: np.ndarray
    steps: np.ndarray
    answer: np.ndarray


def chain_examples(chain: Chain, vocabulary: list[str], name: str) -> list[Example]:
    """The problems of `chain` as text, tokens separated by spaces, one step a state."""
    return [
        Example(f"{name}-{i:05d}", " ".join(vocabulary[t] for t in prompt), tuple(vocabulary[t] for t in steps), vocabulary[answer])
        for i, (prompt, steps, answer) in enumerate(zip(*(array.tolist() for array in chain), strict=True))
    ]
