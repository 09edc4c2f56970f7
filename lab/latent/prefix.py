"""Thoughts before the answer: vectors that an assistant hands over stand in the prompt of a model, frozen or not.

A sequence is prefix | thoughts | after. Nothing before the thoughts depends on what is trained, so the prefix is read without
gradient (and its keys may be kept); gradients flow only through what follows (`lta.md` 8).
Axes: R rows, P prefix columns, n thoughts, A columns after them, D width.
"""

import torch
from torch import Tensor

from lab.latent.loop import Prompt
from lab.latent.plan import Plan
from lab.latent.unroll import Unrolled


def read_with_thoughts(decoder, plan: Plan, thoughts: Tensor | None, *, prefix_grad: bool = False) -> Unrolled:
    """Hidden states of a batch whose rows read `thoughts` (R, n, D) between prefix and rest; None = no thoughts.

    Several sets of thoughts a row, (R·K, n, D), share its prefix, which is read once; the result then has R·K rows.

    Args:
        plan: prompt = the prefix, padded on the left; after = what follows the thoughts.
        prefix_grad: keep gradients through the prefix too (where the base is trained).
    """
    kv, prefix, after = decoder.grow(), plan.prompt.block(decoder), plan.after.block(decoder)
    pos = (prefix.mask().cumsum(1) - 1).clamp(min=0)
    with torch.set_grad_enabled(prefix_grad and torch.is_grad_enabled()):
        states = decoder(prefix.x, pos, kv, valid=prefix.valid).last
    thoughts = after.x[:, :0] if thoughts is None else thoughts.to(after.x.dtype)
    if len(thoughts) > len(pos):
        row = torch.arange(len(pos), device=pos.device).repeat_interleave(len(thoughts) // len(pos))
        kv, states, pos, after = kv.select(row), states[row], pos[row], after.select(row)
    n, start = thoughts.shape[1], pos[:, -1:] + 1
    steps = torch.arange(n, device=pos.device).expand(len(pos), n)
    rest = (after.mask().cumsum(1) - 1).clamp(min=0) + n
    valid = None if after.valid is None else torch.cat((torch.ones_like(steps, dtype=torch.bool), after.valid), 1)
    out = decoder(torch.cat((thoughts, after.x), 1), start + torch.cat((steps, rest), 1), kv, valid=valid).last
    counts = torch.full((len(pos),), n, device=pos.device)
    return Unrolled(states, out[:, :n], thoughts, out[:, n:], counts, {}, kv)


def inject(decoder, before: list[list[int]], thoughts: Tensor | None, after: list[list[int]], alike: list[int] | None = None) -> Prompt:
    """A prompt for `rollout`: ids before, thought vectors (R, n, D), ids after, padded on the left as a whole.

    Args:
        alike: rows with one number have the same ids (several sets of thoughts for one question): those before are read once.
    """
    rows = []
    for index, (left, right) in enumerate(zip(before, after, strict=True)):
        device = decoder.table.weight.device
        parts = [decoder.embed(torch.tensor(ids, dtype=torch.long, device=device)) for ids in (left, right)]
        middle = parts[0][:0] if thoughts is None else thoughts[index].to(parts[0].dtype)
        rows.append(torch.cat((parts[0], middle, parts[1])))
    width = max(map(len, rows))
    x = torch.stack([torch.nn.functional.pad(row, (0, 0, width - len(row), 0)) for row in rows])
    pads = torch.tensor([width - len(row) for row in rows], device=x.device)
    column = torch.arange(width, device=x.device)
    valid = column >= pads[:, None]
    stop = torch.tensor([width - len(ids) for ids in after], device=x.device)[:, None]
    start = stop if thoughts is None else stop - thoughts.shape[1]
    same = None if alike is None else torch.tensor(alike, device=x.device)
    return Prompt(x, None if bool(valid.all()) else valid, thoughts=(start <= column) & (column < stop), alike=same)
