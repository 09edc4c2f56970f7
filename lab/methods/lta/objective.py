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
    """The weighted sum and its parts: `sft`, where LTA's losses take part also `con` and `kl`, with several sets `nce`."""
    s = model.config
    if s.shaped and model.training:
        return _shaped(model, batch)
    thoughts = model.make(batch)
    sets = 1 if thoughts is None else len(thoughts) // len(batch)
    parts = {"sft": _cross_entropy(model, batch.plan, thoughts, sets) * sets}
    if sets > 1 and s.nce and model.training:
        parts["nce"] = info_nce(thoughts.view(len(batch), sets, -1))
    return sum(parts.values()), parts


def _shaped(model: ThoughtModel, batch: ThoughtBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """All three losses; the generator is asked once, only at the thoughts, the question and the steps."""
    s = model.config
    thoughts, anchor, steps = model.shape(batch)
    if s.focus_positions == "turn_end":
        warn_if_dead(steps.detach(), batch.has_step)
    answer = answer_vector(model.decoder.embed(batch.answer), batch.answer_valid)
    parts = {
        "sft": s.sft_loss_weight * _cross_entropy(model, batch.plan, thoughts),
        "con": s.contrastive_loss_weight * focus(anchor, steps, batch.has_step, answer),
        "kl": s.kl_loss_weight * alignment(anchor, thoughts),
    }
    return sum(parts.values()), parts


def _cross_entropy(model: ThoughtModel, plan: Plan, thoughts: Tensor | None, sets: int = 1) -> Tensor:
    """Mean over the supervised tokens; `sets` rows of thoughts read each row of the plan."""
    passes = read_with_thoughts(model.decoder, plan, thoughts, prefix_grad=model.config.tune_base_model)
    return plan_cross_entropy(model.decoder, plan if sets == 1 else repeated(plan, sets), passes)


loss.feeds_back = False


def counter(model: ThoughtModel) -> Callable[[ThoughtBatch], dict[str, int]]:
    """What each part of this model's loss is a mean over, as a function of the batch."""
    s = model.config
    names = ("sft", "con", "kl") if s.shaped else ("sft",)
    names += ("nce",) if s.num_scaling_times > 1 and s.nce else ()
    return lambda batch: {name: batch.labelled if name == "sft" and not s.mean_of_means else len(batch) for name in names}


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
