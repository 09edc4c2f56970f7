"""The training loss of thoughts in a prompt: cross-entropy of the base, alignment and focus of LTA, and InfoNCE of SoftCoT++
(`lta.md` 2.9, `softcot.md` 3). Axes: R rows, n thoughts, K sets, S steps, D width.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.latent.distill import plan_cross_entropy
from lab.latent.plan import Plan, Side
from lab.latent.prefix import read_with_thoughts
from lab.methods.lta.data import ThoughtBatch
from lab.methods.lta.losses import alignment, answer_vector, focus
from lab.methods.lta.model import ThoughtModel

log = logging.getLogger(__name__)


def loss(model: ThoughtModel, batch: ThoughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum and its parts: `sft`, with a block also `con` and `kl`, with several sets also `nce`."""
    s = model.config
    if s.generator == "block" and model.training and (s.kl_loss_weight or s.contrastive_loss_weight):
        return _with_block(model, batch)
    thoughts = model.make(batch)
    sets = 1 if thoughts is None else len(thoughts) // len(batch)
    plan = batch.plan if sets == 1 else repeated(batch.plan, sets)
    parts = {"sft": plan_cross_entropy(model.decoder, plan, read_with_thoughts(model.decoder, plan, thoughts)) * sets}
    if sets > 1 and s.nce and model.training:
        parts["nce"] = info_nce(thoughts.view(len(batch), sets, -1))
    return sum(parts.values()), parts


def _with_block(model: ThoughtModel, batch: ThoughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """All three losses; the block is asked once, only at the thoughts, the question and the steps."""
    s, n = model.config, batch.slots.shape[1]
    places, share = step_places(batch, s.focus_positions)
    made = model.look(batch, torch.cat((batch.slots, batch.question[:, None], places), 1))
    thoughts, anchor, steps = made[:, :n], made[:, n], share @ made[:, n + 1 :]
    if s.focus_positions == "turn_end":
        warn_if_dead(steps.detach(), batch.has_step)
    answer = answer_vector(model.decoder.embed(batch.answer), batch.answer_valid)
    sft = plan_cross_entropy(model.decoder, batch.plan, read_with_thoughts(model.decoder, batch.plan, thoughts))
    parts = {
        "sft": s.sft_loss_weight * sft,
        "con": s.contrastive_loss_weight * focus(anchor, steps, batch.has_step, answer),
        "kl": s.kl_loss_weight * alignment(anchor, thoughts),
    }
    return sum(parts.values()), parts


loss.feeds_back = False


def counter(model: ThoughtModel) -> Callable[[ThoughtBatch], dict[str, int]]:
    """What each part of this model's loss is a mean over, as a function of the batch."""
    s = model.config
    names = ("sft", "con", "kl") if s.generator == "block" and (s.kl_loss_weight or s.contrastive_loss_weight) else ("sft",)
    names += ("nce",) if s.num_scaling_times > 1 and s.nce else ()
    return lambda batch: {name: batch.labelled if name == "sft" else len(batch) for name in names}


def step_places(batch: ThoughtBatch, where: str) -> tuple[Tensor, Tensor]:
    """Columns (R, C) to ask for the steps, and how they make up each step (R, S, C): its turn end, or the mean over its tokens."""
    steps = batch.step_spans.shape[1]
    if where == "turn_end":
        one = torch.eye(steps, device=batch.slots.device)
        return batch.step_spans[..., 1], one.expand(len(batch), -1, -1)
    columns = torch.arange(batch.assistant.shape[1], device=batch.slots.device)
    inside = (columns >= batch.step_spans[..., :1]) & (columns < batch.step_spans[..., 1:])
    used = inside.any(1)
    places = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, int(used.sum(1).max()))]
    member = inside.gather(2, places[:, None].expand(-1, steps, -1)).float()
    return places, member / member.sum(-1, keepdim=True).clamp(min=1)


def warn_if_dead(steps: Tensor, valid: Tensor) -> None:
    """Says so, once, where the steps of a row are one and the same vector: then the focus loss has no gradient (`lta.md` 7.1)."""
    if _warned or valid.shape[1] < 2:
        return
    both = valid[:, 0] & valid[:, 1]
    if bool(both.any()) and float(F.cosine_similarity(steps[both, 0], steps[both, 1], dim=-1).min()) > 0.9999:
        _warned.append(True)
        log.warning("All steps have the same vector, so the focus loss has no gradient; use focus_positions = 'step_mean'.")


_warned: list[bool] = []


def info_nce(sets: Tensor, keep: Tensor | None = None, scale: float = 20.0) -> Tensor:
    """SoftCoT++'s contrast of K flattened sets (R, K, n·D) with their dropped-out selves, mean over the sets / K, mean over rows.

    Args:
        keep: (R, K, n·D) multipliers of 0 or 2; None = fresh dropout with p = 0.5.
    """
    other = F.dropout(sets, 0.5) if keep is None else sets * keep
    scores = scale * F.cosine_similarity(sets[:, :, None], other[:, None], dim=-1)
    rows, k = scores.shape[:2]
    target = torch.arange(k, device=scores.device).expand(rows, k)
    return F.cross_entropy(scores.reshape(-1, k), target.reshape(-1)) / k


def repeated(plan: Plan, times: int) -> Plan:
    """Every row of a plan `times` times in a row, for sets of thoughts that share a question."""
    from lab.latent.plan import Labels

    def side(block: Side) -> Side:
        return Side(block.ids.repeat_interleave(times, 0), None if block.valid is None else block.valid.repeat_interleave(times, 0))

    def labels(part: Labels, width: int) -> Labels:
        row, column = part.at // width, part.at % width
        copies = torch.arange(times, device=row.device)
        at = ((row[:, None] * times + copies) * width + column[:, None]).flatten()
        return Labels(at, part.ids.repeat_interleave(times))

    wide, long = plan.prompt.ids.shape[1], plan.after.ids.shape[1]
    return Plan(
        side(plan.prompt),
        plan.counts.repeat_interleave(times),
        side(plan.after),
        labels(plan.before_labels, 1),
        labels(plan.prompt_labels, wide),
        labels(plan.lead_labels, 1),
        labels(plan.after_labels, long),
        plan.target.repeat_interleave(times),
        plan.reasoning.repeat_interleave(times, 0),
    )
