"""Where a notebook's problems come from: a world made here, or a benchmark; test problems never stand in the training part."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pydantic import Field

from lab.config import Settings
from lab.data.examples import Dataset, Example

TEST_SEED, VALIDATION_SEED, TRAIN_SEED = 10**6, 10**6 + 1, 10**6 + 2


class Source(Settings):
    """A world (`permutations`, `sums`, `prosqa`, …) or a benchmark (`gsm8k_aug`, …) with its sizes.

    `data` is a benchmark's file or folder; empty takes the hub. `hops` is the length of a world's chains. 0 problems = all there are.
    """

    benchmark: str = "permutations"
    data: str = ""
    hops: int = Field(3, ge=1)
    train_problems: int = Field(6400, ge=0)
    test_problems: int = Field(500, ge=0)
    seed: int = 0

    @property
    def made(self) -> bool:
        """Whether the problems are made here."""
        from lab.data.worlds import WORLDS

        return self.benchmark in WORLDS and not self.data

    @property
    def kind(self) -> str:
        """What `lab.data.score` should call the answers."""
        if not self.made:
            return self.benchmark
        return "number" if self.benchmark == "sums" else "sentence"

    def score(self, text: str, gold: str, rule: str) -> Any:
        """`lab.data.score` of an answer by the strict `rule`; where answers are single tokens, the lenient reading is the last word."""
        from lab.data.answers import score

        found = score(text, gold, self.kind, rule)
        if self.kind != "sentence" or self.benchmark != "permutations":
            return found
        last = (text.split() or [None])[-1]
        return replace(found, lenient_answer=last, lenient_correct=last == gold)

    def train(self) -> Dataset:
        """The training problems; of a world, drawn anew for each seed and without any of the test and validation problems."""
        if not self.made:
            return self._loaded("train", self.train_problems)
        held = {example.question for name in ("test", "validation") for example in self.held_out(name)}
        wanted, found, seed = self.train_problems or 6400, [], TRAIN_SEED + 1000 * self.seed
        for example in self._drawn(4 * wanted if wanted < 20000 else wanted * 5 // 4, seed):
            if example.question not in held and len(found) < wanted:
                found.append(example)
        return Dataset(self.benchmark, "train", tuple(found), f"made here from seed {seed}")

    def held_out(self, split: str = "test") -> Dataset:
        """The test or validation problems, the same for every seed."""
        if not self.made:
            return self._loaded(split, self.test_problems)
        seed = TEST_SEED if split == "test" else VALIDATION_SEED
        drawn = {example.question: example for example in self._drawn(self.test_problems or 500, seed)}
        return Dataset(self.benchmark, split, tuple(drawn.values()), f"made here from seed {seed}")

    def _drawn(self, count: int, seed: int) -> Iterable[Example]:
        from lab.data.worlds import world

        lengths = {"permutations": {"hops": self.hops}, "sums": {"terms": self.hops}}
        return world(self.benchmark, **lengths.get(self.benchmark, {})).examples(count, seed)

    def _loaded(self, split: str, count: int) -> Dataset:
        from lab.data import load_benchmark

        return load_benchmark(self.benchmark, split, self.data, limit=count or None)


def words_of(datasets: Iterable[Iterable[Example]], more: Iterable[str] = ()) -> list[str]:
    """The distinct words of the examples, sorted, after those of `more`: the vocabulary of a toy's word tokenizer."""
    found = {word for data in datasets for e in data for text in (e.question, e.answer, *e.steps) for word in text.split()}
    first = list(dict.fromkeys(more))
    return first + sorted(found - set(first))
