"""Training CODI: a written warm start where the backbone cannot reason yet, then the three losses; and the arms it is compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lab.errors import unknown
from lab.latent.distill import plan_cross_entropy, read_teacher
from lab.latent.plan import Pair, collate_pairs
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.data import PairOfRows
from lab.methods.codi.model import CodiModel
from lab.methods.codi.objective import Objective, counts, student_alone
from lab.train import TrainResult, TrainSettings, fit

Arm = Literal["codi", "no_distillation", "no_cot", "cot"]
ARMS: dict[str, dict] = {
    "codi": {},
    "no_distillation": {"distill_loss_factor": 0.0},
    "no_cot": {"distill_loss_factor": 0.0, "ref_loss_factor": 0.0, "num_latent": 0},
    "cot": {"distill_loss_factor": 0.0, "num_latent": 0},
}


def arm_settings(arm: Arm, s: CodiSettings) -> CodiSettings:
    """`s` with what an arm changes: thoughts without distillation, an answer without any reasoning, or written reasoning alone."""
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    return s.but(**ARMS[arm])


def train(
    model: CodiModel,
    rows: Sequence[PairOfRows],
    how: TrainSettings,
    folder: Path | str,
    step_logger: Callable[..., None] | None = None,
    *,
    arm: Arm = "codi",
    held_out: Sequence[PairOfRows] = (),
) -> TrainResult:
    """Trains in place; killed and called again it goes on where it stopped.

    Args:
        arm: what is learned; `cot` trains the written continuation alone.
        held_out: judged every `how.eval_every` steps: the share that greedy decoding gets right token by token.
    """
    objective = written if arm == "cot" else Objective()
    items = written_items if arm == "cot" else lambda batch: counts(batch, model.config)

    def validate(model: CodiModel) -> dict[str, float]:
        return {"score": exact(model, held_out, written_too=arm == "cot")}

    guard = how.guard if arm == "cot" else how.guard.of_components("ce", "ref_ce")
    return fit(
        model,
        rows,
        lambda picked: collate_pairs(picked, max(0, model.config.pad_id)),
        objective,
        how.but(guard=guard),
        folder,
        step_logger,
        count=items,
        validate=validate if held_out else None,
        label=arm,
    )


def written(model: CodiModel, batch: Pair) -> tuple[Tensor, dict]:
    """Cross-entropy of the written continuation alone."""
    return plan_cross_entropy(model.decoder, batch.teacher, read_teacher(model.decoder, batch)), {}


def written_items(batch: Pair) -> int:
    """What `written` is a mean over."""
    return batch.teacher.labelled


@torch.no_grad()
def exact(model: CodiModel, rows: Sequence[PairOfRows], written_too: bool = False, batch: int = 500) -> float:
    """Share of rows whose every answer token (and reasoning token, if `written_too`) is the most likely one."""
    right = 0
    for start in range(0, len(rows), batch):
        pairs = collate_pairs(rows[start : start + batch]).to(model.device)
        plan, done = (pairs.teacher, read_teacher(model.decoder, pairs)) if written_too else (pairs.student, student_alone(model, pairs))
        states, targets = plan.predictions(done)
        wrong = model.decoder.logits(states).argmax(-1) != targets
        right += len(plan) - len(torch.unique(plan.rows_of_predictions[wrong]))
    return right / len(rows)
