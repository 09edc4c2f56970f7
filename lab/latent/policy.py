"""What a method decides while it thinks and speaks; it holds no loop, no cache and no batch logic.

A policy sees `Rows`: the rows that are in the same phase now, with the last hidden state of each. The loop (loop.py) owns
phases, caps, the cache and the records. Axes: R rows, D width, V vocabulary.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from lab.latent.draws import Draws, Stream
from lab.latent.edit import Mix
from lab.latent.sampling import Sampling, draw


class Phase(IntEnum):
    """Where a row stands: thinking, reading its closing tokens, answering, or finished."""

    THINK = 0
    CLOSE = 1
    ANSWER = 2
    DONE = 3


class Notebook(Protocol):
    """Receives what policies note; `names` are the ones that are kept."""

    names: tuple[str, ...]

    def __call__(self, name: str, index: Tensor, column: Tensor, values: Tensor) -> None: ...


@dataclass
class Rows:
    """Rows at one step.

    Attributes:
        index: (R,) place of each row in the whole rollout.
        h: (R, D) hidden state after the final norm at the row's last position.
        pos: (R,) position of the next input.
        phase, thoughts, closed, said: (R,) phase, thoughts made, closing tokens read, tokens said.
        draws: the rows' randomness.
        write: receives `note`d values (set by the loop).
    """

    index: Tensor
    h: Tensor
    pos: Tensor
    phase: Tensor
    thoughts: Tensor
    closed: Tensor
    said: Tensor
    draws: Draws | None = None
    write: Notebook | None = None

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> "Rows":
        """The given rows, with their draws."""
        picked = (getattr(self, name)[rows] for name in ("index", "h", "pos", "phase", "thoughts", "closed", "said"))
        draws = None if self.draws is None else self.draws.select(rows)
        return Rows(*picked, draws, self.write)

    def wants(self, name: str) -> bool:
        """Whether a note of this name is kept, so that nothing is computed for the bin."""
        return self.write is not None and name in self.write.names

    def note(self, name: str, values: Tensor, column: Tensor | None = None) -> None:
        """Records `values` (R, …) under `name`, at each row's own count of thoughts or tokens.

        Args:
            column: (R,) where to put them; None = thoughts made so far while thinking, tokens said so far otherwise.
        """
        if self.wants(name):
            place = column if column is not None else self.thoughts if int(self.phase[0]) == Phase.THINK else self.said
            self.write(name, self.index, place, values)


class Policy:
    """A plain autoregressive model; methods override what they change.

    Args:
        decoder: gives `embed` and `logits`.
        stops: token ids that end an answer (not kept in it).
        sampling: how answer tokens are chosen.
        banned: token ids an answer never contains.
        closing: token ids read between the last thought and the answer.
        start: the phase every row begins in.
    """

    def __init__(
        self,
        decoder,
        stops: tuple[int, ...],
        sampling: Sampling | None = None,
        banned: tuple[int, ...] = (),
        closing: tuple[int, ...] = (),
        start: Phase = Phase.ANSWER,
    ):
        self.decoder, self.sampling, self.closing, self.start = decoder, sampling or Sampling(), tuple(closing), start
        self.stops = tuple(stops)
        device = decoder.table.weight.device
        self.stop_ids = torch.tensor(self.stops, dtype=torch.long, device=device)
        self.banned = torch.tensor(banned, dtype=torch.long, device=device) if banned else None

    def begin(self, rows: Rows) -> None:
        """Called once after the prompt is read, with all R rows; state a policy keeps is (R, …), looked up by `rows.index`."""

    def halt(self, rows: Rows) -> Tensor | None:
        """(R,) bool: which thinking rows stop here instead of making another thought; None = none."""
        return None

    def thought(self, rows: Rows) -> Tensor:
        """(R, D) the next input of thinking rows; the plain feedback is the hidden state itself."""
        return rows.h

    def logits(self, rows: Rows) -> Tensor:
        """(R, V) logits an answer token is chosen from."""
        logits = self.decoder.logits(rows.h)
        return logits if self.banned is None else logits.index_fill(-1, self.banned, -torch.inf)

    def say(self, rows: Rows) -> Tensor:
        """(R,) the next token of answering rows; notes `logprob` when anyone records."""
        if self.sampling.greedy and not rows.wants("logprob"):
            return self.logits(rows).argmax(-1)
        uniform = None if self.sampling.greedy else rows.draws.uniform(rows.said, Stream.TOKEN)
        token, logprob = draw(self.logits(rows), self.sampling, uniform)
        rows.note("logprob", logprob)
        return token

    def read(self, token: Tensor, rows: Rows) -> Tensor:
        """(R, D) the input embedding of tokens (R,) just said or forced."""
        return self.decoder.embed(token)

    def stopped(self, token: Tensor, rows: Rows) -> Tensor:
        """(R,) bool: which answers end with this token."""
        return token == self.stop_ids if len(self.stops) == 1 else torch.isin(token, self.stop_ids)

    def mixed(self, token: Tensor, rows: Rows) -> Mix | None:
        """Which of the inputs that `read` just made hold a thought, None = none; asked only where thoughts are edited."""
        return None

    def resumes(self, token: Tensor, rows: Rows) -> Tensor | None:
        """(R,) bool: which answering rows begin to think again after this token; None = none."""
        return None


class Counted(Policy):
    """Makes a fixed number of thoughts, then closes; `count` may be one number or (R,) by row."""

    def __init__(self, decoder, stops, *, count: int | Tensor, **rest):
        super().__init__(decoder, stops, start=Phase.THINK, **rest)
        self.count = count

    def halt(self, rows: Rows) -> Tensor:
        count = self.count if isinstance(self.count, int) else self.count[rows.index]
        return rows.thoughts >= count


class Given:
    """A policy whose first thoughts are given, (R, T, D); with `counts` (R,) a row uses only its first ones."""

    def __init__(self, policy: Policy, thoughts: Tensor, counts: Tensor | None = None):
        self._policy, self._given = policy, thoughts
        self._counts = torch.full((len(thoughts),), thoughts.shape[1], device=thoughts.device) if counts is None else counts

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def halt(self, rows: Rows) -> Tensor | None:
        halting = self._policy.halt(rows)
        return None if halting is None else halting & (rows.thoughts >= self._counts[rows.index])

    def thought(self, rows: Rows) -> Tensor:
        own, given = self._policy.thought(rows), rows.thoughts < self._counts[rows.index]
        step = rows.thoughts.clamp(max=self._given.shape[1] - 1)
        return torch.where(given[:, None], self._given[rows.index, step], own)
