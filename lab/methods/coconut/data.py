"""Text → ids → rows of a stage (`coconut.md` 2.2, 2.3)."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lab.data.examples import Example
from lab.errors import DataError
from lab.latent.plan import IGNORE, Kept, Row
from lab.methods.coconut.config import CoconutSettings, drawn_stage, dropped_and_latents, stage_of, thoughts_at


class Tokenized(NamedTuple):
    """An example as ids: the question with its line end, each step with its own, and the answer with the end token."""

    question: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    answer: tuple[int, ...]


def question_ids(question: str, tokenizer) -> list[int]:
    """The question and a line end, with the tokenizer's own beginning if it has one."""
    return tokenizer(question + "\n").input_ids


def tokenize(examples: Sequence[Example], tokenizer) -> list[Tokenized]:
    """The pieces of examples, encoded together; DataError if the tokenizer has no end token."""
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end token, so an answer could not end; set tokenizer.eos_token.")
    questions = tokenizer([example.question + "\n" for example in examples]).input_ids
    texts = [text for example in examples for text in (*(step + "\n" for step in example.steps), "### " + example.answer)]
    pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids)
    rows = []
    for question, example in zip(questions, examples, strict=True):
        steps = tuple(tuple(next(pieces)) for _ in example.steps)
        rows.append(Tokenized(tuple(question), steps, (*next(pieces), tokenizer.eos_token_id)))
    return rows


def prepare(examples: Iterable[Example], tokenizer, max_tokens: int = 1024) -> Kept[Tokenized]:
    """The usable examples as ids; those without question or answer, with a second answer marker, or too long are dropped and counted."""
    kept: Kept[Tokenized] = Kept()
    usable = []
    for example in examples:
        if reason := _unusable(example):
            kept.add(example.id, None, reason)
        else:
            usable.append(example)
    for example, row in zip(usable, tokenize(usable, tokenizer) if usable else [], strict=True):
        length = len(row.question) + sum(map(len, row.steps)) + len(row.answer)
        kept.add(example.id, row, f"longer than {max_tokens} tokens" if length > max_tokens else "")
    return kept.checked()


def _unusable(example: Example) -> str:
    if not example.question.strip() or not example.answer.strip():
        return "no question or no answer"
    if "#" in example.answer or any("#" in step for step in example.steps):
        return "the answer marker # stands in the steps or in the answer"
    return ""


def training_row(example: Tokenized, stage: int, s: CoconutSettings) -> Row:
    """The row of a stage: the first steps dropped, thoughts in their place, the loss on all that is written after them."""
    dropped, latents = dropped_and_latents(stage, len(example.steps), s)
    written = (*(token for step in example.steps[dropped:] for token in step), *example.answer)
    if not s.markers:
        return Row(example.question, written, (IGNORE,) * len(example.question) + written)
    prompt = (*example.question, s.start_id)
    inside = (s.latent_id,) * latents if s.mode == "pause" else ()
    labels = (IGNORE,) * (len(prompt) + len(inside) + 1) + written
    return Row(prompt, (*inside, s.end_id, *written), labels, latents if s.mode == "coconut" else 0)


def prompt_of(question: Sequence[int], stage: int, steps: int | None, s: CoconutSettings) -> tuple[list[int], int]:
    """What is read before an answer, and the thoughts to make: (ids, count)."""
    count = thoughts_at(stage, steps, s)
    if not s.markers:
        return list(question), 0
    if s.mode == "pause":
        return [*question, s.start_id, *[s.latent_id] * count, s.end_id], 0
    return [*question, s.start_id], count


def flat_ids(row: Row, latent_id: int) -> list[int]:
    """The row as one list of ids with a placeholder per thought, as the official code stores it."""
    return [*row.prompt, *[latent_id] * row.thoughts, *row.after]


class StagedRows(Sequence[Row]):
    """Training rows of several epochs in order, each epoch a permutation of its own; row i is a pure function of (seed, i).

    Args:
        epochs: 0-based numbers of the epochs. stage: one stage for all of them; None = what the curriculum says.
    """

    def __init__(self, examples: Sequence[Tokenized], s: CoconutSettings, epochs: range, seed: int = 0, stage: int | None = None):
        self.examples, self.s, self.epochs, self.seed, self.stage = examples, s, epochs, seed, stage
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.examples) * len(self.epochs)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, place = self.epochs[index // len(self.examples)], index % len(self.examples)
        number = self._order(epoch)[place]
        example, stage = self.examples[number], stage_of(epoch, self.s) if self.stage is None else self.stage
        if self.s.uniform_prob:
            stage = drawn_stage(stage, len(example.steps), self.s, random.Random(f"{self.seed} {epoch} {number}"))
        return training_row(example, stage, self.s)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]
