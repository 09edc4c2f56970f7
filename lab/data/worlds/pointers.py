"""In-context pointer chasing: questions that one look-up answers, and questions that need a second (tah.md 9.1).

A sequence is BOS, the pairs of one random cycle f over the nodes in random order, then (question, answer) pairs. A one-layer
model can look up once; a second pass over the same token adds the missing look-up. Two tasks differ in what makes a question hard:

* `spelled` (the published setting): a node `a` asks f(a), a capital `A` asks f(f(a)). Hardness can be read off the question
  token. In the base corpus both spellings ask for one look-up, half and half; the fine-tuning corpus redefines capitals.
* `arrows`: every question is a plain node, and each pair has an arrow, `a→b` or `a⇒b`, drawn anew in each sequence. The answer
  is b behind `→`, and f(b), one look-up further, behind `⇒`. The same symbol is hard in one context and easy in the next, and
  the first look-up is what reveals it: a decider must judge from the state after pass one, not from the token. In the base
  corpus both arrows ask for one look-up. There a share `kinds` of the questions are capitals: `A` asks for the arrow of a's
  pair (`→` or `⇒` as a token of its own), so that the base model has a reason to keep the arrow in its state; fine-tuning
  asks no capitals. A hard answer is never more than two look-ups away (the arrow of the second pair is not followed).
  Measured on the base model of 9.1 (600 steps, one seed): a linear probe of its last state tells the arrow of a node question
  with accuracy 0.62 at the true rate (guessing: 0.58) for `kinds` 0, 0.89 for 0.2; at 0.5 the look-up itself is not learnt in time.

In both tasks f has no cycle shorter than `nodes`, so a hard answer is neither the question nor its easy answer.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lab.data.examples import Example
from lab.data.worlds.common import IGNORE, generator
from lab.errors import SettingsError

ARROWS = ("→", "⇒")


class PointerBatch(NamedTuple):
    """`ids` (n, T); `targets` (n, T): the next token at question columns, else -100; `hard` (n, T): True at hard questions."""

    ids: np.ndarray
    targets: np.ndarray
    hard: np.ndarray


@dataclass(frozen=True)
class Pointers:
    """The world; `hard` is the share of hard questions in the fine-tuning corpus, `kinds` that of arrow questions in the base corpus."""

    task: str = "spelled"
    nodes: int = 8
    questions: int = 4
    hard: float = 0.3
    kinds: float = 0.2

    def __post_init__(self) -> None:
        if self.task not in ("spelled", "arrows"):
            raise SettingsError(f"task = {self.task!r}: it is 'spelled' or 'arrows'.")
        if not 3 <= self.nodes <= 26 or self.questions < 1:
            raise SettingsError(f"nodes = {self.nodes}, questions = {self.questions}: 3 to 26 nodes and at least one question are needed.")

    @property
    def vocabulary(self) -> list[str]:
        """BOS, the arrows, the nodes, their capitals, and one token per pair (and arrow, in `arrows`): 83 or 147 for 8 nodes."""
        small = [chr(ord("a") + i) for i in range(self.nodes)]
        kinds = ARROWS if self.task == "arrows" else ARROWS[:1]
        pairs = [f"{a}{arrow}{b}" for arrow in kinds for a in small for b in small]
        return ["BOS", *ARROWS, *small, *(a.upper() for a in small), *pairs]

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return 1 + self.nodes + 2 * self.questions

    def batch(self, n: int, seed: int | np.random.Generator, corpus: str = "tuned") -> PointerBatch:
        """n sequences of the `base` corpus (every node question is one look-up) or the `tuned` one (hard questions are two)."""
        if corpus not in ("base", "tuned"):
            raise SettingsError(f"corpus = {corpus!r}: it is 'base' or 'tuned'.")
        rng, m = generator(seed), self.nodes
        order = rng.permuted(np.tile(np.arange(m), (n, 1)), axis=1)
        follow = np.empty_like(order)
        np.put_along_axis(follow, order, np.roll(order, -1, axis=1), axis=1)
        arrow = rng.random((n, m)) < (self.hard if corpus == "tuned" else 0.5)
        listed = rng.permuted(np.tile(np.arange(m), (n, 1)), axis=1)
        asked = rng.integers(m, size=(n, self.questions))
        draw = rng.random((n, self.questions))
        first = np.take_along_axis(follow, asked, axis=1)
        second = np.take_along_axis(follow, first, axis=1)
        if self.task == "spelled":
            capital = draw < (self.hard if corpus == "tuned" else 0.5)
            hard, arrow = capital & (corpus == "tuned"), np.zeros_like(arrow)
            answer = self._node(np.where(hard, second, first))
        else:
            behind = np.take_along_axis(arrow, asked, axis=1)
            capital = (draw < self.kinds) & (corpus == "base")
            hard = behind & (corpus == "tuned")
            answer = np.where(capital, 1 + behind, self._node(np.where(hard, second, first)))
        pairs = 3 + 2 * m + np.take_along_axis(arrow * m * m + np.arange(m) * m + follow, listed, axis=1)
        question = self._node(asked) + m * capital
        return self._assemble(pairs, question, answer, hard)

    def examples(self, n: int, seed: int | np.random.Generator, corpus: str = "tuned") -> list[Example]:
        """n sequences as text, each with its last question open; the first look-up of a hard question is its step."""
        batch, words = self.batch(n, seed, corpus), self.vocabulary
        examples = []
        for i, (row, hard) in enumerate(zip(batch.ids.tolist(), batch.hard[:, -2].tolist(), strict=True)):
            start = words[row[-2]].lower()
            step = next(pair[2] for pair in map(words.__getitem__, row[1 : 1 + self.nodes]) if pair[0] == start)
            text = " ".join(words[token] for token in row[:-1])
            examples.append(Example(f"pointers-{i:05d}", text, (step,) if hard else (), words[row[-1]], (), {"hard": hard}))
        return examples

    def _node(self, index: np.ndarray) -> np.ndarray:
        return 3 + index

    def _assemble(self, pairs: np.ndarray, question: np.ndarray, answer: np.ndarray, hard: np.ndarray) -> PointerBatch:
        n, begin = len(pairs), 1 + self.nodes
        ids = np.zeros((n, self.length), dtype=np.int64)
        ids[:, 1:begin], ids[:, begin::2], ids[:, begin + 1 :: 2] = pairs, question, answer
        targets = np.full_like(ids, IGNORE)
        targets[:, begin::2] = answer
        marked = np.zeros(ids.shape, dtype=bool)
        marked[:, begin::2] = hard
        return PointerBatch(ids, targets, marked)
