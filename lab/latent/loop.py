"""The one token loop: rows of a batch think, close and answer side by side, each at its own pace.

A prompt is read once for all its samples; at every step each live row submits one input (a thought, a forced token or the
token it just said) and all of them share one decoder call; finished rows leave the batch. Results do not depend on which
rows happen to share a batch (draws are keyed, positions and masks are per row).

Axes: Q prompts, N samples each, R = Q·N rows (question-major), P prompt columns, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from lab.config import Settings
from lab.errors import DataError
from lab.latent.draws import Draws, Keyed
from lab.latent.edit import Editing
from lab.latent.policy import Phase, Policy, Rows
from lab.models.inference import inference

FINISH = {0: "stop", 1: "length"}


class Budget(Settings):
    """Most thoughts and answer tokens of a row; a row at its cap is closed or cut, and marked."""

    thoughts: int = 64
    answer: int = 256


@dataclass
class Prompt:
    """Prompts as input embeddings `x` (Q, P, D), padded on the left.

    `valid` (Q, P) bool, None when none is padded; `ids` (Q, P) where the prompt was made of token ids; `thoughts` (Q, P) bool: columns
    that hold a thought, None = none; `alike` (Q,): prompts with one number are the same before their first thought, None = unknown.
    """

    x: Tensor
    valid: Tensor | None = None
    ids: Tensor | None = None
    thoughts: Tensor | None = None
    alike: Tensor | None = None

    @classmethod
    def of_ids(cls, decoder, prompts: Sequence[Sequence[int]]) -> "Prompt":
        """Prompts from token ids of any lengths; raises DataError for an empty one."""
        if not prompts or not all(len(ids) for ids in prompts):
            raise DataError("Nothing to read: a prompt without a single token. Give each question some text.")
        width, device = max(map(len, prompts)), decoder.table.weight.device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts], device=device)
        pads = torch.tensor([width - len(row) for row in prompts], device=device)
        valid = torch.arange(width, device=device) >= pads[:, None]
        return cls(decoder.embed(ids), None if bool(valid.all()) else valid, ids)

    @property
    def pos(self) -> Tensor:
        """(Q, P) positions counted from the first real column."""
        if self.valid is None:
            return torch.arange(self.x.shape[1], device=self.x.device).expand(self.x.shape[:2])
        return (self.valid.cumsum(1) - 1).clamp(min=0)

    def repeat(self, n: int) -> "Prompt":
        """Each prompt `n` times."""
        return replace(self, **{f.name: part.repeat_interleave(n, 0) for f in fields(self) if (part := getattr(self, f.name)) is not None})

    def edited(self, editing: Editing) -> tuple["Prompt", Callable | None]:
        """The prompt with its thoughts edited (those that may not be made are closed up), and the patch for their hidden states."""
        if self.thoughts is None:
            return self, None
        kept = editing.allowed(self.thoughts)
        made, patch = editing.block(self.x[kept], kept)
        valid = torch.ones_like(kept) if self.valid is None else self.valid
        return replace(self, x=self.x.index_put((kept,), made), valid=valid & (kept | ~self.thoughts)), patch


class DropoutRegime(Protocol):
    """When Monte Carlo dropout is live: masks for reading the prompt and for a step, or None."""

    shares_prompt: bool

    def prefill(self, draws: Draws) -> Callable | None: ...
    def at(self, rows: Rows) -> Callable | None: ...


@dataclass
class Rollout:
    """What R rows did.

    Attributes:
        tokens: (R, A) answer tokens, -1 after the end (stop tokens are not kept).
        lengths: (R,) answer tokens said.
        finish: (R,) 0 = stopped by a stop token, 1 = cut at the budget.
        counts: (R,) thoughts made; `capped` (R,) bool: closed by the budget.
        thoughts: (R, T, D) the inputs fed as thoughts, zero after `counts`; None if not kept.
        notes: what the policy noted, name -> (R, columns, …), NaN where nothing was.
        passes: decoder calls after the prompt; `row_steps` live rows summed over them.
    """

    tokens: Tensor
    lengths: Tensor
    finish: Tensor
    counts: Tensor
    capped: Tensor
    thoughts: Tensor | None
    notes: dict[str, Tensor]
    passes: int
    row_steps: int

    def answers(self) -> list[list[int]]:
        """Answer token ids of each row."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths.tolist(), strict=True)]


@inference
def rollout(
    decoder,
    policy: Policy,
    prompt: Prompt,
    n: int = 1,
    draws: Draws | None = None,
    *,
    budget: Budget | None = None,
    dropout: DropoutRegime | None = None,
    keep: tuple[str, ...] = ("thoughts",),
    share: bool | None = None,
    compact: float = 0.125,
    edit: Editing | None = None,
) -> Rollout:
    """Runs `policy` from each prompt `n` times.

    Args:
        draws: randomness of the R rows; None = keyed by seed 0, the prompt's number and the sample's.
        budget: caps on thoughts and answer tokens.
        dropout: Monte Carlo dropout; a regime that masks the prompt too makes each sample read it itself.
        keep: names to record: "thoughts", "logprob", and what the policy notes.
        share: keep one copy of a prompt's keys for its samples; None = where that is faster.
        compact: share of rows that must have finished before the batch is cut down.
        edit: changes thoughts; those of a prompt that samples share are edited once, as the first sample's.
    """
    questions, budget = prompt.x.shape[0], budget or Budget()
    if draws is None:
        row = torch.arange(questions * n, device=prompt.x.device)
        draws = Keyed.of(0, row // n, row % n)
    shared = dropout is None or dropout.shares_prompt
    own = None if edit is None else edit.of_prompts(n if shared else 1)
    kv, h, pos = read_prompt(decoder, prompt if shared else prompt.repeat(n), None if dropout is None else dropout.prefill(draws), own)
    if shared:
        kv = kv.fan_out(
            n, min(64, budget.thoughts + len(policy.closing) + budget.answer), _worth_sharing(prompt, n) if share is None else share
        )
        h, pos = h.repeat_interleave(n, 0), pos.repeat_interleave(n, 0)
    return continue_from(decoder, policy, kv, h, pos, draws, budget=budget, dropout=dropout, keep=keep, compact=compact, edit=edit)


@torch.no_grad()
def continue_from(
    decoder, policy: Policy, kv, h: Tensor, pos: Tensor, draws: Draws | None, *, budget: Budget, thoughts: Tensor | None = None, **options
) -> Rollout:
    """Runs `policy` from a cache, the last hidden state `h` (R, D) and the next position `pos` (R,).

    Args:
        thoughts: (R,) thoughts the rows have already made; None = none.
        options: `dropout`, `keep`, `compact`, `edit` as in `rollout`.
    """
    return _Loop(decoder, policy, kv, h, pos, draws, budget, thoughts, **options).run()


def read_prompt(decoder, prompt: Prompt, dropout: Callable | None = None, edit: Editing | None = None):
    """The cache after the prompts, the last hidden state (Q, D) and the next position (Q,)."""
    prompt, patch = (prompt, None) if edit is None else prompt.edited(edit)
    pos = prompt.pos
    tail = dropout is None and patch is None
    kv, begin = _read_alike(decoder, prompt, pos) if tail else (decoder.slots(*pos.shape), 0)
    valid = prompt.valid if prompt.valid is None else prompt.valid[:, begin:]
    h = decoder(prompt.x[:, begin:], pos[:, begin:], kv, valid=valid, dropout=dropout, patch=patch, tail=tail).last[:, -1]
    return kv, h, pos[:, -1] + 1


def _read_alike(decoder, prompt: Prompt, pos: Tensor):
    """The cache after what prompts have in common with others, read once for those that are `alike`, and how many columns that is."""
    begin = 0 if prompt.thoughts is None else int(prompt.thoughts.any(0).long().argmax())
    kinds, kind = (None, None) if prompt.alike is None else torch.unique(prompt.alike, return_inverse=True)
    if begin == 0 or kinds is None or len(kinds) == len(pos):
        return decoder.slots(*pos.shape), 0
    one = torch.empty_like(kinds).scatter_(0, kind, torch.arange(len(kind), device=kind.device))
    kv = decoder.slots(len(one), pos.shape[1])
    valid = None if prompt.valid is None else prompt.valid[one, :begin]
    decoder(prompt.x[one, :begin], pos[one, :begin], kv, valid=valid, tail=True)
    return kv.select(kind), begin


def _worth_sharing(prompt: Prompt, n: int) -> bool:
    return n > 1 and n * prompt.x.numel() >= 150_000


@dataclass
class _Notes:
    """Values written row by row and column by column, assembled at the end."""

    names: tuple[str, ...]
    entries: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(self, name: str, index: Tensor, column: Tensor, values: Tensor) -> None:
        if name in self.names:
            self.entries.setdefault(name, []).append((index, column, values))

    def table(self, name: str, rows: int, fill: float = torch.nan) -> Tensor | None:
        if name not in self.entries:
            return None
        index, column, values = (torch.cat(part) for part in zip(*self.entries[name], strict=True))
        out = values.new_full((rows, int(column.max()) + 1, *values.shape[1:]), fill)
        out[index, column] = values
        return out


class _Loop:
    def __init__(self, decoder, policy, kv, h, pos, draws, budget, thoughts, dropout=None, keep=("thoughts",), compact=0.125, edit=None):
        self.decoder, self.policy, self.kv, self.budget, self.dropout, self.compact = decoder, policy, kv, budget, dropout, compact
        self.edit = edit
        count, zeros = len(h), torch.zeros_like(pos)
        self.notes = _Notes((*keep, "token"))
        index = torch.arange(count, device=h.device)
        made = zeros if thoughts is None else thoughts
        self.rows = Rows(index, h, pos, zeros + int(policy.start), made, zeros, zeros, draws, self.notes)
        self.total, self.steps, self.row_steps = count, 0, 0
        self._read: tuple[Tensor | None, list[int]] = (None, [])
        self.made = 0 if thoughts is None else int(thoughts.max())
        self.counts, self.said = zeros.clone(), zeros.clone()
        self.capped = torch.zeros(count, dtype=torch.bool, device=h.device)
        policy.begin(self.rows)

    def run(self) -> Rollout:
        while True:
            x = self._leave(self._inputs())
            if x is None:
                return self._result()
            rows = self.rows
            dropout = None if self.dropout is None else self.dropout.at(rows)
            patch = None if self.edit is None else self.edit.patch(rows.index)
            rows.h = self.decoder(x[:, None], rows.pos[:, None], self.kv, dropout=dropout, patch=patch).last[:, 0]
            rows.pos = rows.pos + 1
            self.steps, self.row_steps = self.steps + 1, self.row_steps + len(rows)

    def _inputs(self) -> Tensor:
        """The next input (R, D) of every row; phases and counts move on."""
        if self.edit is not None:
            self.edit.rest()
        self._at(self._phases(), Phase.THINK, self._halt)
        phases = self._phases()
        acts = ((Phase.ANSWER, self._answer), (Phase.CLOSE, self._close), (Phase.THINK, self._think))
        fed = [(at, x) for phase, act in acts for at, x in self._at(phases, phase, act)]
        if len(fed) == 1 and isinstance(fed[0][0], slice):
            return fed[0][1]
        x = torch.zeros_like(self.rows.h)
        for at, values in fed:
            x[at] = values
        return x

    def _phases(self) -> list[int]:
        """The phase of every row; fetched once for each tensor of them, which is never changed in place."""
        if self._read[0] is not self.rows.phase:
            self._read = (self.rows.phase, self.rows.phase.tolist())
        return self._read[1]

    def _at(self, phases: list[int], phase: Phase, act: Callable) -> list[tuple[slice | Tensor, Tensor]]:
        """Runs `act` on the rows in `phase`: nothing, or one pair of their places and the inputs it returns."""
        count = phases.count(phase)
        if not count:
            return []
        if count == len(phases):
            return [(slice(None), act(self.rows, slice(None)))]
        at = self._places(other == phase for other in phases)
        return [(at, act(self.rows.select(at), at))]

    def _places(self, chosen: Iterable[bool]) -> Tensor:
        return torch.tensor([place for place, this in enumerate(chosen) if this], device=self.rows.index.device)

    def _halt(self, rows: Rows, at) -> None:
        stop = self.policy.halt(rows)
        if self.edit is not None:
            stop = self.edit.stop(stop, rows.index, rows.thoughts)
        if self.steps + self.made >= self.budget.thoughts:
            capped = rows.thoughts >= self.budget.thoughts
            self.capped[rows.index] |= capped if stop is None else capped & ~stop
            stop = capped if stop is None else capped | stop
        if stop is not None:
            after = Phase.CLOSE if self.policy.closing else Phase.ANSWER
            self._move(at, torch.where(stop, int(after), int(Phase.THINK)))

    def _think(self, rows: Rows, at) -> Tensor:
        x = self.policy.thought(rows)
        if self.edit is not None:
            x = self.edit.vectors(x, rows.index, rows.thoughts)
        rows.note("thoughts", x, rows.thoughts)
        self._count("thoughts", at)
        return x

    def _close(self, rows: Rows, at) -> Tensor:
        closing = torch.tensor(self.policy.closing, device=rows.h.device)
        x, closed = self.policy.read(closing[rows.closed % len(closing)], rows), self._count("closed", at)
        self._move(at, torch.where(closed % len(closing) == 0, int(Phase.ANSWER), int(Phase.CLOSE)))
        return x

    def _answer(self, rows: Rows, at) -> Tensor:
        token = self.policy.say(rows)
        stopped = self.policy.stopped(token, rows)
        rows.note("token", token.masked_fill(stopped, -1), rows.said)
        x = self.policy.read(token, rows)
        if self.edit is not None and (mix := self.policy.mixed(token, rows)) is not None:
            x = self.edit.mixed(x, mix, rows.index)
        again = self.policy.resumes(token, rows)
        ended = stopped | (self._count("said", at) >= self.budget.answer)
        if again is None:
            self._move(at, ended + int(Phase.ANSWER))  # DONE follows ANSWER
        else:
            after = torch.where(again, int(Phase.THINK), int(Phase.ANSWER))
            self._move(at, torch.where(ended, int(Phase.DONE), after))
        return x

    def _move(self, at, phase: Tensor) -> None:
        self.rows.phase = phase if isinstance(at, slice) else self.rows.phase.index_copy(0, at, phase)

    def _count(self, name: str, at) -> Tensor:
        """Counts one more for the rows `at`; returns their new counts."""
        counts = getattr(self.rows, name)
        more = counts[at] + 1
        setattr(self.rows, name, more if isinstance(at, slice) else counts.index_copy(0, at, more))
        return more

    def _leave(self, x: Tensor) -> Tensor | None:
        """Cuts finished rows off once enough of them have finished; None when all have."""
        phases = self._phases()
        finished = phases.count(Phase.DONE)
        if finished and (finished == len(phases) or finished >= self.compact * len(phases)):
            self.counts[self.rows.index], self.said[self.rows.index] = self.rows.thoughts, self.rows.said
            if finished == len(phases):
                return None
            live = self._places(phase != Phase.DONE for phase in phases)
            self.kv, self.rows, x = self.kv.select(live), self.rows.select(live), x[live]
        return x

    def _result(self) -> Rollout:
        tokens = self.notes.table("token", self.total, -1)
        lengths = (tokens >= 0).sum(1)
        finish = (lengths == self.said).long()  # a stop token is counted as said and not kept
        notes = {name: self.notes.table(name, self.total) for name in self.notes.names if name not in ("token", "thoughts")}
        thoughts = self.notes.table("thoughts", self.total, 0.0)
        notes = {name: value for name, value in notes.items() if value is not None}
        return Rollout(tokens, lengths, finish, self.counts, self.capped, thoughts, notes, self.steps, self.row_steps)
