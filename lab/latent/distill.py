"""Self-distillation: a teacher and a student that read one question once, and distances between their hidden states.

Shared by CODI and the adaptive recipes (`distill.md` 2A.3, 2B.4, 8). Axes: R rows, t columns, D width, N layers, n labelled tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.errors import unknown
from lab.latent.plan import Pair, Plan
from lab.latent.unroll import Block, Closing, Unrolled, unroll
from lab.launch import world_size
from lab.models.cache import GrowKV
from lab.models.vocab import linear_cross_entropy

SCALES = ("none", "std", "avg_l2", "layerwise_std", "layerwise_avg_l2")
DISTANCES = ("smooth_l1", "mse", "mean_l2")


@dataclass
class Passes:
    """One step of self-distillation: `teacher` (no thoughts) and `student`, both after the same question.

    Attributes:
        question: (R, D) the state at the question's last token, which predicts the first token of either continuation.
    """

    teacher: Unrolled
    student: Unrolled
    question: Tensor


def run_pair(
    decoder, batch: Pair, feedback: Callable[[Tensor, int], Tensor], taps: tuple[int, ...] = (), closing: Closing | None = None
) -> Passes:
    """Question once, then the teacher's written continuation and the student's thoughts, all with gradient.

    Args:
        feedback, closing: as in `unroll`. taps: layers whose states after the question are kept.
    """
    states, kv, start = read_question(decoder, batch)
    branch = kv.fork()
    teacher = read_on(decoder, states, batch.teacher.after.block(decoder), kv, start, taps)
    student = unroll(
        decoder,
        batch.student.prompt.block(decoder),
        batch.student.counts,
        batch.student.after.block(decoder),
        feedback,
        kv=branch,
        taps=taps,
        closing=closing,
    )
    return Passes(teacher, student, states[:, -1])


def read_question(decoder, batch: Pair) -> tuple[Tensor, GrowKV, Tensor]:
    """The question alone: its states (R, P, D), its cache, and the position (R, 1) after it."""
    kv, asked = decoder.grow(), batch.question.block(decoder)
    pos = (asked.mask().cumsum(1) - 1).clamp(min=0)
    return decoder(asked.x, pos, kv, valid=asked.valid).last, kv, pos[:, -1:] + 1


def read_teacher(decoder, batch: Pair, taps: tuple[int, ...] = ()) -> Unrolled:
    """The question and its written continuation, without a student."""
    states, kv, start = read_question(decoder, batch)
    return read_on(decoder, states, batch.teacher.after.block(decoder), kv, start, taps)


def read_on(decoder, prompt: Tensor, after: Block, kv, start: Tensor, taps: tuple[int, ...] = ()) -> Unrolled:
    """A pass without thoughts that continues what `kv` holds.

    Args:
        prompt: (R, P, D) states of what was read before. start: (R, 1) the position of the first column of `after`.
    """
    out = decoder(after.x, start + (after.mask().cumsum(1) - 1).clamp(min=0), kv, valid=after.valid, taps=taps)
    none = prompt[:, :0]
    counts = torch.zeros(len(prompt), dtype=torch.long, device=prompt.device)
    return Unrolled(prompt, none, none, out.last, counts, {tap: (none, none, out.taps[tap]) for tap in taps}, kv)


# ---- losses ----------------------------------------------------------------------------------------------------------


def cross_entropy(decoder, states: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the vocabulary head at states (n, D) against targets (n,); the logits never stand as a whole."""
    head = decoder.model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return F.cross_entropy(decoder.logits(states).float(), targets)
    return linear_cross_entropy(states, head.weight, targets)[0] / max(1, len(targets))


def plan_cross_entropy(decoder, plan: Plan, run: Unrolled, before: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over a plan's labels (zero where it has none)."""
    states, targets = plan.predictions(run, before)
    return cross_entropy(decoder, states, targets)


def at_column(taps: dict[int, tuple[Tensor, Tensor, Tensor]], column: Tensor) -> Tensor:
    """(N, R, D): of each tapped layer, the state of each row at its own column (R,) after the thoughts."""
    rows = torch.arange(len(column), device=column.device)
    return torch.stack([after[rows, column] for _, _, after in taps.values()])


def mean_over(states: Tensor, mask: Tensor) -> Tensor:
    """(…, R, D): mean of states (…, R, t, D) over the columns in `mask` (R, t); zero where a row has none."""
    weight = mask.to(states.dtype)[..., None]
    return (states * weight).sum(-2) / weight.sum(-2).clamp(min=1)


def scale_of(teacher: Tensor, how: str) -> Tensor:
    """Size of teacher states (N, R, D), (N,) by layer or (1,) for all: unbiased std over rows and width, or mean L2 norm; no gradient."""
    teacher = teacher.detach()
    if how == "none":
        return teacher.new_ones(1)
    if how in ("std", "avg_l2"):
        return (teacher.std() if how == "std" else teacher.norm(dim=-1).mean())[None]
    if how == "layerwise_std":
        return teacher.flatten(1).std(1)
    if how == "layerwise_avg_l2":
        return teacher.norm(dim=-1).mean(1)
    raise unknown("scale of hidden states", how, SCALES)


def distance(student: Tensor, teacher: Tensor, how: str) -> Tensor:
    """(N,) distance by layer of states (N, R, D): smooth L1 (beta 1) or squared error over rows and width, or mean L2 over rows."""
    if how == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, reduction="none").mean((1, 2))
    if how == "mse":
        return F.mse_loss(student, teacher, reduction="none").mean((1, 2))
    if how == "mean_l2":
        return (student - teacher).norm(dim=-1).mean(1)
    raise unknown("distance of hidden states", how, DISTANCES)


def over_processes(states: Tensor) -> Tensor:
    """(N, R', D): the rows (N, R, D) of all processes."""
    if world_size() == 1:
        return states
    parts: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(parts, states.cpu())
    return torch.cat(parts, 1).to(states.device)


def distillation(
    student: Tensor, teacher: Tensor, how: str = "smooth_l1", scale: str | Tensor = "layerwise_std", eps: float = 0.0, power: int = 1
) -> Tensor:
    """Mean over layers of the distance of states (N, R, D), divided by the teacher's scale (+ eps) to a power; the teacher is detached.

    Args:
        scale: of `scale_of` these rows; or (N,), measured over more rows than these.
    """
    teacher = teacher.detach()
    size = scale_of(teacher, scale) if isinstance(scale, str) else scale
    return (distance(student, teacher, how) / (size + eps) ** power).mean()


@torch.no_grad()
def norms(states: Tensor) -> dict[str, float]:
    """Average, largest and smallest L2 norm of state vectors (…, D), for the log."""
    sizes = states.float().norm(dim=-1)
    return {"avg_l2": float(sizes.mean()), "max_l2": float(sizes.max()), "min_l2": float(sizes.min())}
