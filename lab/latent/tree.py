"""One chain of thoughts for many samples: where thoughts follow from the prompt alone, samples differ only in where they leave it.

The chain of each prompt is made once, up to the longest count any of its samples chose, and answers branch off it
(`distill.md` 8.8). Results are those of separate rows. Axes: Q prompts, N samples each, R = Q·N rows, T thoughts, A answer columns.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lab.latent.draws import Draws
from lab.latent.loop import Budget, Prompt, Rollout, _Notes, continue_from, read_prompt
from lab.latent.policy import Phase, Policy, Rows
from lab.latent.unroll import Block, Closing, closed
from lab.models.inference import inference


@inference
def rollout_tree(
    decoder, policy: Policy, prompt: Prompt, n: int, draws: Draws, *, budget: Budget, keep: tuple[str, ...] = ("thoughts",)
) -> Rollout:
    """What `rollout` returns, for a policy that decides to stop by chance but makes its thoughts without."""
    group = torch.arange(prompt.x.shape[0], device=prompt.x.device).repeat_interleave(n)
    kv, h, pos = read_prompt(decoder, prompt)
    first, notes = kv.columns, _Notes(tuple(keep))
    rows = _rows_of(h, pos, group, draws, notes)
    policy.begin(rows)
    live, counts = torch.arange(len(group), device=h.device), torch.zeros_like(group)
    capped, last, made = torch.zeros_like(group, dtype=torch.bool), h[group], []
    while True:
        here = rows.select(live)
        here.h, here.thoughts = h[group[live]], torch.full_like(live, len(made))
        stop = policy.halt(here)
        if len(made) >= budget.thoughts:
            capped[live] = ~stop
            stop = torch.ones_like(stop)
        last[live], counts[live] = here.h, len(made)
        live = live[~stop]
        if not len(live):
            break
        made.append(policy.thought(_rows_of(h, pos, torch.arange(len(h), device=h.device), None, None)))
        h = decoder(made[-1][:, None], pos[:, None], kv).last[:, 0]
        pos = pos + 1
    kv = _branches(kv, group, counts, first, len(made), n, budget)
    start = _Closing(policy)
    done = continue_from(decoder, start, kv, last, pos[group] - len(made) + counts, draws, budget=budget, keep=keep, thoughts=counts)
    told = {name: table for name in keep if name != "thoughts" and (table := notes.table(name, len(group))) is not None}
    thoughts = _chosen(made, group, counts) if "thoughts" in keep and made else None
    return replace(done, capped=capped, thoughts=thoughts, notes={**done.notes, **told}, passes=done.passes + len(made))


class _Closing:
    """A policy whose rows have stopped thinking."""

    def __init__(self, policy: Policy):
        self._policy, self.start = policy, Phase.CLOSE if policy.closing else Phase.ANSWER

    def __getattr__(self, name: str):
        return getattr(self._policy, name)


def _rows_of(h: Tensor, pos: Tensor, group: Tensor, draws: Draws | None, notes: _Notes | None) -> Rows:
    zeros = torch.zeros_like(group)
    return Rows(torch.arange(len(group), device=h.device), h[group], pos[group], zeros, zeros, zeros, zeros, draws, notes)


def _branches(kv, group: Tensor, counts: Tensor, first: int, made: int, n: int, budget: Budget):
    kv = kv.fan_out(n, min(64, budget.answer + 1), share=False)
    if made:
        kv.hide(first, torch.arange(made, device=counts.device) >= counts[:, None])
    return kv


def _chosen(made: list[Tensor], group: Tensor, counts: Tensor) -> Tensor:
    """(R, T, D) thoughts by row, zero after its count."""
    every = torch.stack(made, 1)[group]
    return every * (torch.arange(len(made), device=counts.device) < counts[:, None])[..., None]


def unroll_tree(
    decoder,
    prompt: Block,
    group: Tensor,
    counts: Tensor,
    after: Block,
    feedback: Callable[[Tensor, int], Tensor],
    closing: Closing | None = None,
) -> tuple[Tensor, Tensor]:
    """With gradient: the states (R, T + 1, D) rows decided at (the prompt's last, then each thought's), and those of `after` (R, A, D).

    Args:
        prompt: Q prompts, padded on the left. group: (R,) the prompt of each row. counts: (R,) its thoughts.
        after: what each row read after its thoughts, padded on the right. closing: as in `unroll`.
    """
    kv, pos = decoder.grow(), (prompt.mask().cumsum(1) - 1).clamp(min=0)
    h = decoder(prompt.x, pos, kv, valid=prompt.valid).last[:, -1]
    states, start, first, most = [h], pos[:, -1:] + 1, kv.columns, int(counts.max())
    for step in range(most):
        h = decoder(feedback(h, step)[:, None], start + step, kv).last[:, 0]
        states.append(h)
    kv = kv.select(group)
    if most:
        kv.hide(first, torch.arange(most, device=counts.device) >= counts[:, None])
    place = start[group] + counts[:, None] + (after.mask().cumsum(1) - 1).clamp(min=0)
    decided = torch.stack(states, 1)[group]
    return decided, decoder(closed(after, decided, counts, closing), place, kv, valid=after.valid).last
