"""The losses of SFT: cross-entropies of teacher and student, and the distance of their hidden states (distill.md 2B.4).

Axes: R rows, T thoughts, A columns after them, D width, N layers compared, n labelled tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lab.latent.distill import at_column, distance, mean_over, norms, over_processes, read_teacher, run_pair, scale_of
from lab.latent.plan import Pair, Plan, Row, collate, collate_pairs
from lab.latent.unroll import Unrolled, unroll
from lab.launch import world_size
from lab.methods.adaptive.config import Distil
from lab.methods.adaptive.model import AdaptiveModel, Thinker
from lab.models.vocab import chunks

EPS = 1e-8
Kept = tuple[Tensor, Tensor, Tensor | None]


def batch_of(rows: list) -> Pair | Plan:
    """The batch of `Prepared.rows`: pairs of teacher and student, or single rows."""
    return collate(rows) if isinstance(rows[0], Row) else collate_pairs(rows)


@dataclass
class SFT:
    """The objective of `lab.train.fit`: called with the model and a batch, returns the loss and its components.

    Every component is a mean over its own items in the global batch, whatever the micro-batches: tokens for the
    cross-entropies, rows for the distances, and (after `prepare`) the teacher's scale over the whole batch too.
    """

    distil: Distil
    feeds_back: bool = True
    _scales: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, model: AdaptiveModel, batch: Pair | Plan) -> tuple[Tensor, dict[str, Any]]:
        thinker = model.thinker
        if isinstance(batch, Plan):
            run = _read_text(thinker, batch)
            loss = masked_cross_entropy(thinker, *batch.predictions(run))
            return loss, {"teacher_ce": loss}
        layers = self.distil.layers(thinker.layers)
        passes = run_pair(thinker, batch, _filtered(thinker), taps=layers, closing=thinker.closes)
        parts = {
            "teacher_ce": masked_cross_entropy(thinker, *batch.teacher.predictions(passes.teacher)),
            "student_ce": student_cross_entropy(thinker, batch.student, passes.student, passes.question, self.distil),
        }
        told: dict[str, Any] = {}
        for name, weight, (student, teacher, keep) in self._compared(batch, passes):
            parts[name] = weight * self._distance(name, student, teacher, keep)
            told |= {
                f"{name}/{side}_{key}": value for side, h in (("teacher", teacher), ("student", student)) for key, value in norms(h).items()
            }
            told[f"{name}/scale"] = float(self._scale(name, teacher, keep).mean())
        told |= _decisions(thinker, passes.student, batch.student.counts)
        return sum(parts.values()), parts | told

    def count(self, batch: Pair | Plan) -> dict[str, int]:
        """Items of each component in a batch; with `compat` rows, so that a loss is the mean of its micro-batches' means."""
        found = self._items(batch)
        return dict.fromkeys(found, len(batch)) if self.distil.compat else found

    def _items(self, batch: Pair | Plan) -> dict[str, int]:
        if isinstance(batch, Plan):
            return {"teacher_ce": batch.labelled}
        thoughts = 0 if self.distil.mask_thought_labels else int((batch.student.counts + 1).sum())
        found = {"teacher_ce": batch.teacher.labelled, "student_ce": batch.student.labelled + thoughts}
        if self.distil.weight_codi:
            found["codi"] = len(batch)
        if self.distil.weight_mean:
            found["mean_reasoning"] = int(_comparable(batch).sum())
        return found

    @torch.no_grad()
    def prepare(self, model: AdaptiveModel, batches: list[Pair | Plan]) -> None:
        """Measures the teacher's scale over all micro-batches of one global batch, so that it does not depend on their size."""
        self._scales = {}
        several = len(batches) > 1 or world_size() > 1
        if self.distil.compat or not several or not isinstance(batches[0], Pair) or not self.distil.scale:
            return
        layers, kept = self.distil.layers(model.thinker.layers), {}
        for batch in batches:
            taps = read_teacher(model.thinker, batch, layers).taps
            for name, states, keep in self._teachers(batch, taps):
                kept.setdefault(name, []).append(states if keep is None else states[:, keep])
        self._scales = {name: scale_of(over_processes(torch.cat(parts, 1)), self.distil.scale) for name, parts in kept.items()}

    def _teachers(self, batch: Pair, taps: dict) -> list[tuple[str, Tensor, Tensor | None]]:
        found: list[tuple[str, Tensor, Tensor | None]] = []
        if self.distil.weight_codi:
            found.append(("codi", at_column(taps, batch.teacher.target), None))
        if self.distil.weight_mean:
            mask = batch.teacher.reasoning
            written = torch.stack([mean_over(after, mask) for _, _, after in taps.values()])
            found.append(("mean_reasoning", written, None if self.distil.compat else _comparable(batch)))
        return found

    def _compared(self, batch: Pair, passes: Any) -> list[tuple[str, float, Kept]]:
        """(name, weight, (student, teacher (N, R, D), rows that count)) of each latent loss."""
        weights = {"codi": self.distil.weight_codi, "mean_reasoning": self.distil.weight_mean}
        found = []
        for name, teacher, keep in self._teachers(batch, passes.teacher.taps):
            if name == "codi":
                student = at_column(passes.student.taps, batch.student.target)
            else:
                columns = torch.arange(passes.student.states.shape[1], device=teacher.device)
                mask = columns < passes.student.counts[:, None]
                student = torch.stack([mean_over(thoughts, mask) for _, thoughts, _ in passes.student.taps.values()])
                if self.distil.compat:
                    student = student * batch.teacher.reasoning.any(1)[:, None].to(student.dtype)
            found.append((name, weights[name], (student, teacher.detach(), keep)))
        return found

    def _scale(self, name: str, teacher: Tensor, keep: Tensor | None) -> Tensor:
        if name in self._scales:
            return self._scales[name].to(teacher.device)
        return scale_of(teacher if keep is None else teacher[:, keep], self.distil.scale)

    def _distance(self, name: str, student: Tensor, teacher: Tensor, keep: Tensor | None) -> Tensor:
        scale = self._scale(name, teacher, keep)
        if keep is not None:
            if not bool(keep.any()):
                return student.sum() * 0
            student, teacher = student[:, keep], teacher[:, keep]
        return (distance(student, teacher, self.distil.distance) / (scale + (EPS if self.distil.scale != "none" else 0.0))).mean()


def _comparable(batch: Pair) -> Tensor:
    """(R,) rows that have both written reasoning and thoughts, so that their means can be compared."""
    mask = batch.teacher.reasoning.any(1)
    return mask & (batch.student.counts.to(mask.device) > 0)


def _filtered(thinker: Thinker) -> Callable[[Tensor, int], Tensor]:
    return lambda h, step: thinker.feedback(h, step)


def _read_text(thinker: Thinker, plan: Plan) -> Unrolled:
    return unroll(thinker, plan.prompt.block(thinker), plan.counts, plan.after.block(thinker), _filtered(thinker))


def student_cross_entropy(thinker: Thinker, plan: Plan, run: Unrolled, question: Tensor, distil: Distil) -> Tensor:
    """Mean over the student's labels: the vocabulary's at START and the answer, the two-way head's at CONTINUE and STOP."""
    words, targets = plan.predictions(run, question)
    if distil.mask_thought_labels:
        return masked_cross_entropy(thinker, words, targets)
    choices, stops = decision_labels(run)
    total = masked_cross_entropy(thinker, words, targets, "sum") + F.cross_entropy(thinker.decide(choices).float(), stops, reduction="sum")
    return total / (len(targets) + len(stops))


def decision_labels(run: Unrolled) -> tuple[Tensor, Tensor]:
    """States (n, D) at which rows decide, and what they did: 0 = went on, 1 = stopped."""
    every = torch.cat((run.prompt[:, -1:], run.states), 1)
    step = torch.arange(every.shape[1], device=every.device)
    made = step <= run.counts[:, None]
    return every[made], (step == run.counts[:, None])[made].long()


def masked_cross_entropy(thinker: Thinker, states: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the vocabulary head without the silent ids, at the states (n, D) that predict something.

    Where (n, V) logits would be large they are made a few rows at a time, and again in the backward pass.
    """
    pieces = [*chunks(len(states), thinker.table.weight.shape[0], states.device)]
    if len(pieces) <= 1:
        return F.cross_entropy(thinker.logits(states).float(), targets, reduction=reduction)

    def of(h: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(thinker.logits(h).float(), wanted, reduction="sum")

    total = sum(checkpoint(of, states[rows], targets[rows], use_reentrant=False) for rows in pieces)
    return total / len(targets) if reduction == "mean" else total


@torch.no_grad()
def _decisions(thinker: Thinker, run: Unrolled, counts: Tensor) -> dict[str, float]:
    """What the guard and the log want to know of the thoughts: spread over the batch (0 = collapsed) and mean probability to go on."""
    if not run.inputs.shape[1]:
        return {}
    spread = run.inputs[:, 0].float().std(0).mean() if len(run.inputs) > 1 else torch.zeros(())
    go_on = torch.softmax(thinker.decide(run.before_thought()).float(), -1)[..., 0]
    return {"thought/spread": float(spread), "thought/go_on": float(go_on.mean()), "thought/count": float(counts.float().mean())}
