"""What a training batch of a feedback method looks like: prompt | thoughts | after, with its labels, made on the CPU by the collator.

Prompts are padded on the left, so that the thoughts of all rows start at one column; what follows them is padded on the right.
Labels stand at the tokens to be predicted; the collator turns them into the places of the states that predict them, so that the
vocabulary head runs where there is something to predict and nowhere else (and no step waits for a device to count).

Axes: R rows, P prompt columns, T thoughts, A columns after them, n labelled tokens, D width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from lab.errors import DataError
from lab.latent.unroll import Block, Unrolled

log = logging.getLogger(__name__)

IGNORE = -100
T = TypeVar("T")


@dataclass
class Kept(Generic[T]):
    """Training examples that can be used, with the ids they came from, and the ids of those that were dropped, by reason."""

    rows: list[T] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, name: str, row: T | None, reason: str = "") -> None:
        """Keeps `row`, or drops `name` for `reason`."""
        if reason:
            self.dropped.setdefault(reason, []).append(name)
        else:
            self.rows.append(row)
            self.ids.append(name)

    def note(self) -> str:
        """One sentence about what was dropped; "" if nothing was."""
        total = sum(map(len, self.dropped.values()))
        parts = "; ".join(f"{len(names)} ({reason}; first: {names[0]})" for reason, names in self.dropped.items())
        return f"{total} of {total + len(self)} examples were dropped: {parts}." if total else ""

    def checked(self) -> Self:
        """Itself, with the note logged; DataError if nothing is left."""
        if not self.rows:
            raise DataError(f"No example can be used. {self.note()}".strip())
        if self.dropped:
            log.warning(self.note())
        return self


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        prompt: ids read before the first thought. thoughts: how many follow. after: ids read after the last one.
        labels: one per id of `prompt` + `after`, IGNORE where nothing is to be predicted.
        target: the place in `after` whose hidden states are compared (distillation).
        reasoning: [start, stop) in `after` of the written reasoning (teachers of a mean).
    """

    prompt: tuple[int, ...]
    after: tuple[int, ...]
    labels: tuple[int, ...]
    thoughts: int = 0
    target: int = 0
    reasoning: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.prompt) + self.thoughts + len(self.after)


@dataclass
class Side:
    """A padded block of ids (R, t), with `valid` (R, t) bool or None when none is padding."""

    ids: Tensor
    valid: Tensor | None

    def block(self, decoder) -> Block:
        """The same as input embeddings."""
        return Block(decoder.embed(self.ids), self.valid)

    def to(self, device) -> "Side":
        return Side(self.ids.to(device), None if self.valid is None else self.valid.to(device))


@dataclass
class Labels:
    """Targets (n,) and the flat places of the states that predict them, in a block of states (R·t, D)."""

    at: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, states: Tensor) -> Tensor:
        """(n, D) of states (R, t, D) or (R, D)."""
        return states.flatten(0, -2).index_select(0, self.at)

    def to(self, device) -> "Labels":
        return Labels(self.at.to(device), self.ids.to(device))


@dataclass
class Plan:
    """A batch of rows.

    Attributes:
        prompt, after: the two blocks. counts: (R,) thoughts of each row, kept on the CPU.
        before_labels: predicted from the state before the prompt (only where a prompt continues something read before).
        prompt_labels, lead_labels, after_labels: predicted from prompt columns, from each row's last state before `after`, and
            from the columns of `after`.
        target: (R,) column of `after` to compare. reasoning: (R, A) bool.
    """

    prompt: Side
    counts: Tensor
    after: Side
    before_labels: Labels
    prompt_labels: Labels
    lead_labels: Labels
    after_labels: Labels
    target: Tensor
    reasoning: Tensor

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def labelled(self) -> int:
        """Tokens to be predicted."""
        return sum(map(len, (self.before_labels, self.prompt_labels, self.lead_labels, self.after_labels)))

    def predictions(self, run: Unrolled, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (n, D) that predict, and what they should predict (n,).

        Args:
            before: (R, D) the state before the prompt; needed only where the first prompt token is labelled.
        """
        parts = [(self.after_labels, run.after)]
        if len(self.lead_labels):
            parts.append((self.lead_labels, run.last_state()))
        if len(self.prompt_labels):
            parts.append((self.prompt_labels, run.prompt))
        if len(self.before_labels):
            parts.append((self.before_labels, before))
        states = [labels.pick(block) for labels, block in parts]
        return (states[0], parts[0][0].ids) if len(parts) == 1 else (torch.cat(states), torch.cat([labels.ids for labels, _ in parts]))

    @property
    def rows_of_predictions(self) -> Tensor:
        """(n,) the row each prediction belongs to, in the order of `predictions`."""
        parts = [self.after_labels.at // self.after.ids.shape[1], self.lead_labels.at, self.prompt_labels.at // self.prompt.ids.shape[1]]
        return torch.cat((*parts, self.before_labels.at))

    def to(self, device) -> Self:
        """The plan on a device; the counts stay where they are."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: value if name == "counts" else value.to(device) for name, value in moved.items()})


def collate(rows: Sequence[Row], pad: int = 0) -> Plan:
    """The plan of `rows`, its padding filled with the id `pad`.

    Raises DataError for an empty batch, a row that does not line up, or one without a prompt.
    """
    if not rows:
        raise DataError("A batch without rows.")
    for row in rows:
        if not row.prompt or not row.after or len(row.labels) != len(row.prompt) + len(row.after):
            raise DataError("A row needs a prompt, something after its thoughts, and one label for each token of both.")
    prompt, after = left([row.prompt for row in rows], pad), right([row.after for row in rows], pad)
    before, prompts, lead, afters = _labels(rows, prompt.ids.shape[1], after.ids.shape[1])
    reasoning = torch.zeros(after.ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        reasoning[index, slice(*row.reasoning)] = True
    counts, target = torch.tensor([row.thoughts for row in rows]), torch.tensor([row.target for row in rows])
    return Plan(prompt, counts, after, before, prompts, lead, afters, target, reasoning)


def left(rows: Sequence[Sequence[int]], pad: int = 0) -> Side:
    """Ids padded on the left."""
    width = max(map(len, rows))
    return _side([[pad] * (width - len(row)) + list(row) for row in rows], [range(width - len(row), width) for row in rows])


def right(rows: Sequence[Sequence[int]], pad: int = 0) -> Side:
    """Ids padded on the right."""
    width = max(map(len, rows))
    return _side([list(row) + [pad] * (width - len(row)) for row in rows], [range(len(row)) for row in rows])


def _side(ids: list[list[int]], real: list[range]) -> Side:
    if all(len(columns) == len(row) for columns, row in zip(real, ids, strict=True)):
        return Side(torch.tensor(ids), None)
    valid = torch.zeros(len(ids), len(ids[0]), dtype=torch.bool)
    for index, columns in enumerate(real):
        valid[index, columns.start : columns.stop] = True
    return Side(torch.tensor(ids), valid)


def _labels(rows: Sequence[Row], wide: int, long: int) -> tuple[Labels, Labels, Labels, Labels]:
    """Labels by where their predicting state is: before the prompt, in it, at its lead, or after (see `Plan`)."""
    found: tuple[list, ...] = ([], [], [], [])
    for r, row in enumerate(rows):
        shift = wide - len(row.prompt)
        for c, label in enumerate(row.labels):
            if label == IGNORE:
                continue
            j = c - len(row.prompt)
            if j > 0:
                found[3].append((r * long + j - 1, label))
            elif j == 0:
                found[2].append((r, label))
            elif c > 0:
                found[1].append((r * wide + shift + c - 1, label))
            else:
                found[0].append((r, label))
    return tuple(
        Labels(torch.tensor([at for at, _ in part], dtype=torch.long), torch.tensor([i for _, i in part], dtype=torch.long))
        for part in found
    )


@dataclass
class Pair:
    """A teacher and a student that begin with the same question, which is read once for both.

    Attributes:
        question: (R, P) ids, padded on the left. teacher: prompt = the same question. student: its prompt is what follows the question.
    """

    question: Side
    teacher: Plan
    student: Plan

    def __len__(self) -> int:
        return len(self.student)

    def to(self, device) -> "Pair":
        return Pair(self.question.to(device), self.teacher.to(device), self.student.to(device))


def collate_pairs(pairs: Sequence[tuple[Row, Row]], pad: int = 0) -> Pair:
    """The batch of (teacher, student) rows; the teacher's prompt is the question, the student's what it reads after the question."""
    teacher, student = collate([row for row, _ in pairs], pad), collate([row for _, row in pairs], pad)
    if student.prompt.valid is not None:
        raise DataError("Students read the same number of tokens between the question and their thoughts.")
    return Pair(teacher.prompt, teacher, student)
