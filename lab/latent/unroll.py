"""The training pass of every feedback method: prompt, thoughts with gradient, and what follows, without recomputing.

Thoughts of all rows start at one column (prompts are padded on the left), so the number of decoder calls is 1 + the
largest count, whatever the batch (`distill.md` 8.5, `coconut.md` 2.5). Nothing is detached.
Axes: R rows, P prompt columns, T thoughts, A columns after the thoughts, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Closing = Callable[[Tensor], Tensor]  # the state (R, D) a row stopped at -> what it reads next (R, D)


@dataclass
class Block:
    """A stretch of columns: `x` (R, t, D) inputs and `valid` (R, t) bool or None when none is padding."""

    x: Tensor
    valid: Tensor | None = None

    def mask(self) -> Tensor:
        return torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device) if self.valid is None else self.valid

    def select(self, rows: Tensor) -> "Block":
        """The given rows (repeats allowed)."""
        return Block(self.x[rows], None if self.valid is None else self.valid[rows])


@dataclass
class Unrolled:
    """Hidden states after the final norm.

    Attributes:
        prompt: (R, P, D); `after` (R, A, D).
        states: (R, T, D) states at the thought positions; `inputs` (R, T, D) the thoughts fed there.
        counts: (R,) thoughts of each row; columns beyond are padding.
        taps: {layer: (prompt, thoughts, after)} of the layers asked for.
        kv: the cache after the last column.
    """

    prompt: Tensor
    states: Tensor
    inputs: Tensor
    after: Tensor
    counts: Tensor
    taps: dict[int, tuple[Tensor, Tensor, Tensor]]
    kv: object

    def before_thought(self) -> Tensor:
        """(R, T, D) the state each thought was made of: the last of the prompt, then each thought's own."""
        return torch.cat((self.prompt[:, -1:], self.states[:, :-1]), 1)

    def last_state(self) -> Tensor:
        """(R, D) the state at each row's last thought (or at the prompt's end where it has none)."""
        every = torch.cat((self.prompt[:, -1:], self.states), 1)
        return every[torch.arange(len(every), device=every.device), self.counts]


def unroll(
    decoder,
    prompt: Block,
    counts: Tensor,
    after: Block,
    feedback: Callable[[Tensor, int], Tensor],
    *,
    kv=None,
    taps: tuple[int, ...] = (),
    closing: Closing | None = None,
) -> Unrolled:
    """Runs prompt, thoughts and the rest with gradient.

    Args:
        prompt: padded on the left, so that its last column is every row's last.
        counts: (R,) thoughts of each row, on the CPU or the model's device; 0 is allowed.
        after: what is read after the thoughts, padded on the right.
        feedback: (state (R, D), number of the thought) -> its input (R, D).
        kv: a growing cache to continue from (its rows' positions go on); None = a new one.
        taps: layers whose hidden states to return (see `Decoder`).
        closing: makes the input of the first column after the thoughts; it costs one call more.
    """
    kv = decoder.grow() if kv is None else kv
    counts = counts.to(prompt.x.device)
    most = int(counts.max())
    begin = 0 if kv.columns == 0 else (kv.pos.masked_fill(~kv.valid, -1).amax(1) + 1)[:, None]
    pos = (prompt.mask().cumsum(1) - 1).clamp(min=0) + begin
    out = decoder(prompt.x, pos, kv, valid=prompt.valid, taps=taps)
    outs, inputs, h, start = [out], [], out.last[:, -1], pos[:, -1] + 1
    for step in range(most):
        x, valid = feedback(h, step)[:, None], (step < counts)[:, None]
        inputs.append(x)
        column, end = start[:, None] + step, step == most - 1 and closing is None
        if end:
            x, column, valid = _join(x, column, valid, after, start + counts)
        outs.append(decoder(x, column, kv, valid=None if bool(valid.all()) else valid, taps=taps))
        h = outs[-1].last[:, 0]
    if most == 0 or closing:
        x = closed(after, torch.stack([out.last[:, -1] for out in outs], 1), counts, closing)
        outs.append(decoder(x, (start + counts)[:, None] + _offsets(after), kv, valid=after.valid, taps=taps))
    return _assemble(outs, inputs, counts, most, taps, kv)


def closed(after: Block, states: Tensor, counts: Tensor, closing: Closing | None) -> Tensor:
    """Inputs (R, A, D) of `after`, its first column made by `closing` of the state (of R, T + 1, D) at each row's count."""
    if closing is None:
        return after.x
    last = states[torch.arange(len(states), device=states.device), counts]
    return torch.cat((closing(last)[:, None], after.x[:, 1:]), 1)


def _offsets(block: Block) -> Tensor:
    return (block.mask().cumsum(1) - 1).clamp(min=0)


def _join(x: Tensor, column: Tensor, valid: Tensor, after: Block, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last thought and everything after it as one call."""
    pos = torch.cat((column, start[:, None] + _offsets(after)), 1)
    return torch.cat((x, after.x), 1), pos, torch.cat((valid, after.mask()), 1)


def _assemble(outs: list, inputs: list[Tensor], counts: Tensor, most: int, taps: tuple[int, ...], kv) -> Unrolled:
    def split(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        prompt, rest = parts[0], torch.cat(parts[1:], 1)
        return prompt, rest[:, :most], rest[:, most:]

    prompt, states, after = split([out.last for out in outs])
    fed = torch.cat(inputs, 1) if inputs else states
    return Unrolled(prompt, states, fed, after, counts, {tap: split([out.taps[tap] for out in outs]) for tap in taps}, kv)
