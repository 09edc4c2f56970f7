"""CoLaR's batches: question | merged groups of reasoning tokens | answer (`colar.md` 2.1, 2.2).

The separator stands alone in the first group; a row's last group is never empty (the released padding leaves it empty in
about a fifth of the rows: `official_padding`). Axes: R rows, Q question columns, G groups of r tokens, A answer columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.errors import DataError
from lab.latent.plan import IGNORE, left, right
from lab.methods.colar.config import ColarSettings


@dataclass(frozen=True)
class ColarRow:
    """One example as ids: the question with each compression factor, `steps` and `answer` with the separator first."""

    speeds: dict[str, tuple[int, ...]]
    steps: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class ColarBatch:
    """A batch at one compression factor.

    Attributes:
        question (R, Q), answer (R, A): ids; `groups` (R, G, r) ids; each with a bool mask of the same shape.
        labels: (R, Q + G + A): what stands at each column (a random token of each group), IGNORE where nothing is to be predicted.
        factor: r.
    """

    question: Tensor
    question_mask: Tensor
    groups: Tensor
    groups_mask: Tensor
    answer: Tensor
    answer_mask: Tensor
    labels: Tensor
    factor: int

    def __len__(self) -> int:
        return len(self.question)

    @property
    def valid(self) -> Tensor:
        """(R, Q + G + A) bool."""
        return torch.cat((self.question_mask, self.groups_mask.any(-1), self.answer_mask), 1)

    @property
    def steps(self) -> slice:
        """The columns of the groups."""
        return slice(self.question.shape[1], self.question.shape[1] + self.groups.shape[1])

    def to(self, device) -> "ColarBatch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def question_text(question: str) -> str:
    """The published question layout; the speed follows it."""
    return f"Question: {question} Let's think step by step:"


def speed_text(factor: int | str) -> str:
    """How the compression factor is written in the prompt; "auto" leaves it to the model."""
    return f"(Thinking speed: {factor})"


def encode(tokenizer, s: ColarSettings, question: str, steps: Sequence[str], answer: str) -> ColarRow:
    """The ids of an example: its parts are tokenised separately, the separator is put in front by id."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    text = question_text(question)
    speeds = {str(factor): ids(text + speed_text(factor)) for factor in (*range(1, s.max_compression_factor + 1), "auto")}
    return ColarRow(speeds, (s.sep_id, *ids("\n".join(steps))), (s.sep_id, *ids(f"Answer:{answer}"), s.eos_id))


def prompt(row: ColarRow, factor: int | str) -> tuple[int, ...]:
    """The question with its speed, without the separator; DataError for a speed the model has no prompt for."""
    if str(factor) not in row.speeds:
        raise DataError(f"No prompt for a compression factor of {factor}; this model knows {', '.join(row.speeds)}.")
    return row.speeds[str(factor)]


def collate(rows: Sequence[ColarRow], factor: int, s: ColarSettings, generator: torch.Generator) -> ColarBatch:
    """The batch of `rows` at one factor; the token that stands for a group is drawn by `generator`."""
    auto = torch.rand(len(rows), generator=generator) < s.replace_r_with_auto_prob
    question = left([prompt(row, "auto" if skip else factor) for row, skip in zip(rows, auto.tolist(), strict=True)], s.pad_id)
    answer = right([row.answer for row in rows], s.pad_id)
    groups, mask = group([row.steps for row in rows], factor, s)
    batch = ColarBatch(question.ids, _mask(question), groups, mask, answer.ids, _mask(answer), question.ids, factor)
    chosen = torch.multinomial((mask.float() + 1e-5).flatten(0, 1), 1, generator=generator).view(mask.shape[:2])
    steps = groups.gather(-1, chosen[..., None])[..., 0].masked_fill(~mask.gather(-1, chosen[..., None])[..., 0], IGNORE)
    labels = torch.cat((torch.full_like(question.ids, IGNORE), steps, answer.ids.masked_fill(~batch.answer_mask, IGNORE)), 1)
    return replace(batch, labels=labels)


def group(steps: Sequence[Sequence[int]], factor: int, s: ColarSettings) -> tuple[Tensor, Tensor]:
    """Reasoning ids as (R, G, r) and their mask: rows padded on the left so that every separator ends a group of its own."""
    longest, r = max(map(len, steps)), factor
    tail = r - (longest + r - 1) % r if r > 1 else 0
    width = longest + tail + r - 1
    ids, mask = torch.full((len(steps), width), s.pad_id), torch.zeros(len(steps), width, dtype=torch.bool)
    for index, row in enumerate(steps):
        pads = longest - len(row)
        extra = r - 1 - pads % r
        right_pads = tail + (r - 1 - extra)
        if right_pads >= r and (not s.official_padding or right_pads == r):
            extra += r * (right_pads // r)
        start = pads + extra
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = True
    return ids.view(len(steps), -1, r), mask.view(len(steps), -1, r)


def _mask(side) -> Tensor:
    return torch.ones_like(side.ids, dtype=torch.bool) if side.valid is None else side.valid
