"""From problems to training rows and prompts: which are kept, how they are written, where teacher and student are compared (2B.3).

A sequence is the question, the reasoning R, " The answer is", ":", " answer" and the end token, each piece tokenised by itself.
The teacher's R is the written steps, the student's START, CONTINUE · n, STOP.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lab.data.examples import Dataset, Example
from lab.errors import DataError, SettingsError
from lab.latent.plan import IGNORE, Row
from lab.methods.adaptive.config import COLON, MARKER, AdaptiveSettings, Distil

SHUFFLE_SEED = 42
_NUMBER = re.compile(r"-?(?:\d+(?:\.\d*)?|\.\d+)")


@dataclass
class Prepared:
    """Rows ready for training: pairs (teacher, student), or single rows of the text modes; `dropped` counts by reason."""

    rows: list[tuple[Row, Row]] | list[Row]
    examples: list[Example]
    counts: list[int]
    dropped: dict[str, int] = field(default_factory=dict)

    def note(self) -> str:
        """One sentence on what was dropped and why; "" when nothing was."""
        said = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return f"{sum(self.dropped.values())} examples were left out: {said}." if said else ""


def slice_of(data: Dataset, share: float, last: bool = False) -> Dataset:
    """The first `share` of the seed-42 shuffle, or the last: what SFT and RL of the paper train on, disjoint by construction."""
    if not 0 < share <= 1:
        raise SettingsError(f"A share of {share}: it must lie between 0 and 1.")
    shuffled = data.shuffled(SHUFFLE_SEED)
    cut = round((1 - share if last else share) * len(data))
    chosen = shuffled[cut:] if last else shuffled[:cut]
    if not len(chosen):
        raise DataError(f"A share of {share} of {len(data)} examples is empty.")
    return chosen


def first_number(text: str) -> float | None:
    """The first number in `text` (commas removed), or None: how answers are read (2B.6)."""
    found = _NUMBER.search(text.replace(",", ""))
    return float(found[0]) if found else None


def numeric(answer: str) -> float | None:
    """A training answer as a number; None for words, infinities and NaN."""
    try:
        value = float(answer.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Writer:
    """Tokenises the pieces of prompts and rows; BOS stands once, at the front, where the tokenizer puts one (Llama's does, GPT-2's not)."""

    def __init__(self, tokenizer: Any, s: AdaptiveSettings, distil: Distil | None = None):
        if tokenizer.eos_token_id is None:
            raise SettingsError("An adaptive model needs a tokenizer with an end token (eos).")
        self.tokenizer, self.s, self.distil = tokenizer, s, distil or Distil()
        self.bos = [i for i in tokenizer(COLON).input_ids[:1] if i == tokenizer.bos_token_id]

    def piece(self, text: str) -> list[int]:
        """Ids of a text inside a sequence."""
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def question(self, text: str, prefix: str | None = None) -> list[int]:
        """Ids of a question with BOS (where there is one) and the training prefix."""
        return self.bos + self.piece((self.s.prefix if prefix is None else prefix) + text)

    def prompt(self, text: str, *, think: bool = True, prefix: str | None = None) -> list[int]:
        """A prompt: the question, then START where the model is to think."""
        return self.question(text, prefix) + ([self.s.start] if think and self.s.latent else [])

    def answer(self, text: str) -> tuple[list[int], int, int]:
        """Ids of " The answer is: x" with the end token, the target's place in them, and where the answer begins."""
        marker, colon = self.piece(MARKER), self.piece(COLON)
        said = self.piece(" " + text)
        if not marker or not colon or not said:
            raise DataError(f"The tokenizer cannot write {MARKER + COLON + ' ' + text!r}.")
        target = len(marker) + len(colon) - 1 + (1 if self.distil.shift_target else 0)
        return [*marker, *colon, *said, self.tokenizer.eos_token_id], target, len(marker) + len(colon)

    def reasoning(self, steps: Sequence[str]) -> list[int]:
        """Ids of the teacher's reasoning."""
        return self.piece(" " + " ".join(steps) if self.distil.sentences and steps else "".join(steps))

    def teacher(self, example: Example) -> Row:
        """Question, written reasoning (none in mode `no cot`), answer; everything after the question is learned."""
        steps = list(example.steps)[: -1 if self.distil.remove_last_step and example.steps else None]
        reasoning = [] if self.distil.mode == "no cot" else self.reasoning(steps)
        question, (answer, target, _) = self.question(example.question), self.answer(example.answer)
        after = [*reasoning, *answer]
        labels = (*[IGNORE] * len(question), *after)
        return Row(tuple(question), tuple(after), labels, target=len(reasoning) + target, reasoning=(0, len(reasoning)))

    def student(self, example: Example) -> Row:
        """What follows the question: START, n thoughts, END (read in STOP's place), answer. CONTINUE and STOP are the head's labels."""
        answer, target, _ = self.answer(example.answer)
        start = IGNORE if self.distil.mask_thought_labels else self.s.start
        count = self.distil.thoughts(len(example.steps), example.id)
        return Row((self.s.start,), (self.s.end, *answer), (start, IGNORE, *answer), thoughts=count, target=1 + target)


def prepare(examples: Iterable[Example], writer: Writer) -> Prepared:
    """Rows of the examples that can be learned from; the others are dropped and counted, never silently.

    Raises SettingsError where no row has a thought in latent mode, DataError where nothing is left.
    """
    distil, out = writer.distil, Prepared([], [], [])
    for example in examples:
        if reason := unusable(example, distil):
            out.dropped[reason] = out.dropped.get(reason, 0) + 1
            continue
        teacher = writer.teacher(example)
        pair = (teacher, writer.student(example)) if distil.mode == "latent" else None
        longest = max(len(teacher), len(teacher.prompt) + len(pair[1]) if pair else 0)
        if longest + 4 > distil.longest:  # the official filter counts its four marker tokens
            reason = f"longer than {distil.longest} tokens"
            out.dropped[reason] = out.dropped.get(reason, 0) + 1
            continue
        out.rows.append(pair or teacher)
        out.examples.append(example)
        out.counts.append(pair[1].thoughts if pair else 0)
    if not out.rows:
        raise DataError(f"No example is left to train on. {out.note()}")
    if distil.mode == "latent" and not any(out.counts):
        raise SettingsError("No row has a single thought: raise factor, bias or least (or choose a latent_… option token).")
    return out


def unusable(example: Example, distil: Distil) -> str:
    """Why an example cannot be trained on, or ""."""
    if not example.question.strip():
        return "with an empty question"
    if distil.mode != "no cot" and not any(step.strip() for step in example.steps):
        return "without written steps"
    if MARKER + COLON in example.question or any(MARKER + COLON in step for step in example.steps):
        return "that contain the answer marker"
    value = numeric(example.answer)
    if value is None:
        return "without a numeric answer"
    return "with a negative answer" if distil.remove_negative and value < 0 else ""
