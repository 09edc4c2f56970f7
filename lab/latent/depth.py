"""The loop of methods that read the same token more than once: every row is a queue of (embedding, position, depth).

A first pass never sees slots of deeper passes, so rows need not wait for each other: at each step every row submits one
item, its next token at depth 0 or the token it is still thinking about one depth further, and all share one decoder call.
A batch takes as many steps as its longest row needs, not one more whenever any row thinks twice. Axes: R rows, D width,
V vocabulary, P prompt columns, C candidates kept per pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lab.latent.draws import Draws, Stream
from lab.latent.edit import Editing
from lab.latent.sampling import Sampling, draw
from lab.models.cache import SlotKV


@dataclass
class Look:
    """A decision about n tokens: `again` (n,), `prob` (n,) of continuing, `logits` (n, V); `top` (n, k) of them with `ids`, if taken."""

    again: Tensor
    prob: Tensor
    logits: Tensor
    top: Tensor | None = None
    ids: Tensor | None = None


class Depth(Protocol):
    """What a method decides; it holds no loop. `depths` = most passes of a token; `taps` = hidden states it wants to see."""

    depths: int
    taps: tuple[int, ...]
    gated: bool

    def look(self, logits: Tensor, taps: dict[int, Tensor], depth: Tensor, rows: Tensor | None) -> Look:
        """Decides for n tokens that finished pass `depth` + 1, (n, V) logits; `rows` picks them among the live rows, None = all."""
        ...

    def update(self, look: Look, which: Tensor, h: Tensor) -> Tensor:
        """(m, D) inputs of the next pass of the tokens `which` (m,) of a look; `h` (m, D) their last hidden states."""
        ...

    def combine(self, total: Tensor, h: Tensor, deep: Tensor) -> Tensor:
        """(R, D) states whose logits count, after a pass with states `h`; `deep` (R,) bool: it was not the token's first."""
        ...

    def said(self, token: Tensor, pos: Tensor, ready: Tensor) -> None:
        """Rows `ready` (R,) bool go on with `token` (R,) at position `pos` (R,)."""
        ...

    def select(self, rows: Tensor) -> None:
        """Only these live rows stay."""
        ...


@dataclass
class Start:
    """Where the prompts end: cache, summed states (R, D) of the last prompt token, its position (R,), and records of the prompt (R, P)."""

    kv: SlotKV
    total: Tensor
    pos: Tensor
    iterations: Tensor
    prob: Tensor
    ce: Tensor
    passes: "list[PassRecord]" = field(default_factory=list)


@dataclass
class PassRecord:
    """Passes of n tokens: row (n,), position (n,), depth (n,) from 1, decision probability, and the C best tokens with probabilities."""

    row: Tensor
    pos: Tensor
    depth: Tensor
    prob: Tensor
    ids: Tensor
    share: Tensor
    entropy: Tensor


@dataclass
class DeepRollout:
    """What R rows said.

    Attributes:
        tokens: (R, A), -1 after the end (a stop token is not kept). lengths: (R,).
        finish: (R,) 0 = stopped by a stop token, 1 = cut at the budget.
        iterations: (R, P + A) passes spent on reading the token at a position, 0 = never read.
        prob: (R, P + A) probability of a second pass there, NaN = not asked. logprob: (R, A) of the tokens said, as they were drawn.
        ce: (R, P + A) cross-entropy of the token at a position under the unfiltered distribution, if passes are kept.
        logits: (R, A, V) that chose each token, if kept. passes: per pass records, if kept.
        steps: decoder calls after the prompt; row_steps: live rows summed over them.
    """

    tokens: Tensor
    lengths: Tensor
    finish: Tensor
    iterations: Tensor
    prob: Tensor
    logprob: Tensor
    ce: Tensor
    logits: Tensor | None
    passes: list[PassRecord]
    steps: int
    row_steps: int

    def answers(self) -> list[list[int]]:
        """Token ids each row said."""
        return [row[:length].tolist() for row, length in zip(self.tokens, self.lengths.tolist(), strict=True)]


@torch.no_grad()
def deep_rollout(
    decoder,
    policy: Depth,
    start: Start,
    draws: Draws | None,
    *,
    budget: int,
    stops: Sequence[int] = (),
    sampling: Sampling | None = None,
    forced: Tensor | None = None,
    keep_logits: bool = False,
    candidates: int = 0,
    compact: float = 0.125,
    edit: Editing | None = None,
) -> DeepRollout:
    """Speaks from each prompt until a stop token or `budget` tokens.

    Args:
        draws: randomness of the R rows; not needed when greedy.
        forced: (R, n) tokens to read instead of drawn ones; the logits after the last of them are kept too.
        keep_logits: keep (R, A, V). candidates: best tokens to record at every pass, 0 = no record.
        compact: share of rows that must have finished before the batch is cut down.
        edit: changes what further passes read and what comes of it; a row's thoughts are its further passes, those of the prompt first.
    """
    if forced is not None:
        budget = forced.shape[1] + 1
    loop = _Loop(decoder, policy, start, draws, budget, stops, sampling or Sampling(), forced, keep_logits, candidates, compact, edit)
    return loop.run()


class _Loop:
    def __init__(self, decoder, policy, start, draws, budget, stops, sampling, forced, keep_logits, candidates, compact, edit):
        self.decoder, self.policy, self.kv, self.draws, self.sampling = decoder, policy, start.kv, draws, sampling
        self.budget, self.forced, self.candidates, self.compact, self.edit = budget, forced, candidates, compact, edit
        rows, device = len(start.pos), start.pos.device
        self.stops = torch.tensor(list(stops), dtype=torch.long, device=device)
        self.index, self.pos, self.total = torch.arange(rows, device=device), start.pos.clone(), start.total
        self.depth, self.said = torch.zeros_like(self.pos), torch.zeros_like(self.pos)
        self.done, self.taps, self.h = torch.zeros(rows, dtype=torch.bool, device=device), {}, start.total
        self.tokens = torch.full((rows, budget), -1, dtype=torch.long, device=device)
        self.lengths, self.finish = torch.zeros_like(self.pos), torch.zeros_like(self.pos)
        self.logprob = torch.full((rows, budget), torch.nan, device=device)
        self.iterations = torch.nn.functional.pad(start.iterations, (0, budget))
        self.prob = torch.nn.functional.pad(start.prob, (0, budget), value=torch.nan)
        self.ce = torch.nn.functional.pad(start.ce, (0, budget), value=torch.nan)
        self.logits = torch.zeros(rows, budget, len(decoder.table.weight), device=device) if keep_logits else None
        self.passes, self.steps, self.row_steps = list(start.passes), 0, 0

    def run(self) -> DeepRollout:
        x = self._next(self.decoder.logits(self.total), None, None)
        while (x := self._leave(x)) is not None:
            logits = self._read(x)
            look, able = self._look(logits)
            again = None if look is None else self._again(look, able)
            if self.candidates:
                self._record(logits, look, able)
            x = self._next(logits, look, again)
        said = (self.tokens, self.lengths, self.finish, self.iterations, self.prob, self.logprob, self.ce, self.logits, self.passes)
        return DeepRollout(*said, self.steps, self.row_steps)

    def _read(self, x: Tensor) -> Tensor:
        """One decoder call for all live rows; (R, V) logits of the summed states."""
        deep = self.depth > 0
        mixed = bool(deep.any())
        gate = deep.to(x.dtype)[:, None, None] if mixed and self.policy.gated else None
        depth = self.depth[:, None] if mixed else 0
        patch = None if self.edit is None else self.edit.patch(self.index)
        out = self.decoder(x[:, None], self.pos[:, None], self.kv, depth=depth, lora_gate=gate, taps=self.policy.taps, patch=patch)
        self.h, self.taps = out.last[:, 0], out.taps
        self.total = self.policy.combine(self.total, self.h, deep) if mixed else self.h
        self.iterations[self.index, self.pos] = torch.where(self.done, self.iterations[self.index, self.pos], self.depth + 1)
        self.steps, self.row_steps = self.steps + 1, self.row_steps + len(x)
        return self.decoder.logits(self.total)

    def _look(self, logits: Tensor) -> tuple[Look | None, Tensor | None]:
        """Decisions about the rows that may go deeper, and which rows those are (None = all)."""
        able = (self.depth + 1 < self.policy.depths) & ~self.done
        if not bool(able.any()):
            return None, None
        rows = None if bool(able.all()) else able.nonzero()[:, 0]
        taps = {layer: value[:, 0] if rows is None else value[rows, 0] for layer, value in self.taps.items()}
        depth = self.depth if rows is None else self.depth[rows]
        look = self.policy.look(logits if rows is None else logits[rows], taps, depth, rows)
        first = depth == 0
        where = self.index if rows is None else self.index[rows]
        if self.edit is not None and (stop := self.edit.stop(None, where, self.edit.made[where])) is not None:
            look.again = look.again & ~stop
        pos = self.pos if rows is None else self.pos[rows]
        self.prob[where[first], pos[first]] = look.prob[first].to(self.prob.dtype)
        return look, rows

    def _again(self, look: Look, able: Tensor | None) -> Tensor | None:
        """(R,) bool: rows whose token is read once more; None = no row."""
        if not bool(look.again.any()):
            return None
        return look.again if able is None else torch.zeros_like(self.done).index_put((able,), look.again)

    def _next(self, logits: Tensor, look: Look | None, again: Tensor | None) -> Tensor:
        """(R, D) the next input of every row; depths, positions and counts move on."""
        if self.edit is not None:
            self.edit.rest()
        if again is None:
            token = self._speak(logits, slice(None))
            self.depth = torch.zeros_like(self.depth)
            self.policy.said(token, self.pos, ~self.done)
            return self.decoder.embed(token)
        x, token = torch.empty_like(self.total), torch.zeros_like(self.pos)
        deep = self.policy.update(look, look.again.nonzero()[:, 0], self.h[again])
        x[again] = (deep if self.edit is None else self.edit.vectors(deep, self.index[again])).to(x.dtype)
        ready = (~again).nonzero()[:, 0]
        if len(ready):
            token[ready] = self._speak(logits[ready], ready)
            x[ready] = self.decoder.embed(token[ready])
        self.depth = torch.where(again, self.depth + 1, 0)
        self.policy.said(token, self.pos, ~again & ~self.done)
        return x

    def _speak(self, logits: Tensor, rows) -> Tensor:
        """Next tokens (n,) of the live rows `rows` (n,) with logits (n, V); finished rows say something that is not kept."""
        index, said, live = self.index[rows], self.said[rows], ~self.done[rows]
        token, logprob = self._draw(logits, rows, index, said)
        stopped = torch.isin(token, self.stops) & live
        at, full = said.clamp(max=self.budget - 1), said + 1 >= self.budget
        if self.logits is not None:
            self.logits[index[live], said[live]] = logits[live].float()
        if self.candidates:
            wide = logits[live].float()
            self.ce[index[live], self.pos[rows][live] + 1] = wide.logsumexp(-1) - wide.gather(1, token[live, None])[:, 0]
        self.tokens[index, at] = torch.where(live & ~stopped, token, self.tokens[index, at])
        self.logprob[index, at] = torch.where(live, logprob.float(), self.logprob[index, at])
        self.lengths[index] += live & ~stopped
        self.finish[index] += live & full & ~stopped
        self.done[rows] |= stopped | full
        self.said[rows] += live
        self.pos[rows] += live
        return token

    def _draw(self, logits: Tensor, rows, index: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        if self.forced is not None:
            column = said.clamp(max=self.forced.shape[1] - 1)
            token = self.forced[index, column]
            return token, logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        if self.sampling.greedy:
            return draw(logits, self.sampling)
        draws = self.draws if isinstance(rows, slice) else self.draws.select(rows)
        return draw(logits, self.sampling, draws.uniform(said, Stream.TOKEN))

    def _record(self, logits: Tensor, look: Look | None, able: Tensor | None) -> None:
        prob = torch.full(self.pos.shape, torch.nan, device=logits.device)
        if look is not None:
            prob[slice(None) if able is None else able] = look.prob.float()
        live = ~self.done
        self.passes.append(record(self.index[live], self.pos[live], self.depth[live] + 1, prob[live], logits[live], self.candidates))

    def _leave(self, x: Tensor) -> Tensor | None:
        """Cuts finished rows off once enough of them have finished; None when all have."""
        finished = int(self.done.sum())
        if finished == len(self.done):
            return None
        if finished and finished >= self.compact * len(self.done):
            live = (~self.done).nonzero()[:, 0]
            self.kv, x = self.kv.select(live), x[live]
            for name in ("index", "pos", "depth", "said", "done", "total"):
                setattr(self, name, getattr(self, name)[live])
            self.draws = None if self.draws is None else self.draws.select(live)
            self.policy.select(live)
        return x


def record(row: Tensor, pos: Tensor, depth: Tensor, prob: Tensor, logits: Tensor, count: int) -> PassRecord:
    """A record of passes with logits (n, V): their `count` best tokens, probabilities and the entropy in nats."""
    logs = logits.float().log_softmax(-1)
    top = logs.topk(min(count, logs.shape[-1]), dim=-1)
    entropy = -(logs.exp() * logs).nansum(-1)
    return PassRecord(row, pos, depth, prob, top.indices, top.values.exp(), entropy)
