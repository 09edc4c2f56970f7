"""Training a latent reward model on annotated questions (`latenttts.md` 2.7). Axes: B questions, N samples, T thoughts, D width."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lab.errors import DataError
from lab.latent.loop import Prompt
from lab.methods.latenttts.config import RewardTraining
from lab.methods.latenttts.model import RewardModel
from lab.sampling.curves import powers
from lab.sampling.records import Asked
from lab.sampling.reward import step_loss
from lab.sampling.votes import best
from lab.train import TrainResult, TrainSettings, fit


@dataclass
class Judged:
    """A batch: prompts as ids, thoughts (B·N, T, D) question-major, counts (B·N,), labels (B, N, T) with NaN where there is none."""

    prompts: list[list[int]]
    thoughts: Tensor
    counts: Tensor
    labels: Tensor
    length: int  # padded length of a whole row, which the released loss divides by

    def to(self, device) -> "Judged":
        tensors = {name: getattr(self, name).to(device) for name in ("thoughts", "counts", "labels")}
        return replace(self, **tensors)

    @property
    def labelled(self) -> int:
        """(question, step) pairs that carry any label: what the `ce` loss is a mean over."""
        return int((self.labels.nan_to_num().sum(1) > 0).sum())


def collate(asked: Sequence[Asked]) -> Judged:
    """Questions with equally many samples as one batch, shorter chains of thoughts padded on the right."""
    if len({len(q.corrects) for q in asked}) != 1:
        raise DataError("Questions of one batch must have equally many samples.")
    most = max(q.thoughts.shape[1] for q in asked)
    counts = torch.cat([q.counts for q in asked])
    thoughts = torch.cat([torch.nn.functional.pad(q.thoughts, (0, 0, 0, most - q.thoughts.shape[1])) for q in asked])
    labels = torch.stack([_labels(q, most) for q in asked])
    longest = max(q.facts.get("columns") or len(q.prompt) + most + 1 + max(map(len, q.ids), default=0) for q in asked)
    return Judged([q.prompt for q in asked], thoughts, counts, labels, longest)


def _labels(question: Asked, most: int) -> Tensor:
    labels = question.corrects[:, None].float().expand(-1, question.thoughts.shape[1]) if question.labels is None else question.labels
    labels = torch.nn.functional.pad(labels, (0, most - labels.shape[1]), value=torch.nan)
    return labels.masked_fill(torch.arange(most) >= question.counts[:, None], torch.nan)


class RewardLoss:
    """The loss of a batch for `lab.train.fit`."""

    feeds_back = False  # thoughts are data, nothing flows through them

    def __init__(self, kind: str = "ce", official: bool = False):
        self.kind, self.official = kind, official

    def __call__(self, model: RewardModel, batch: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        thoughts = batch.thoughts.to(model.backbone.dtype)
        logits = model.scorer(Prompt.of_ids(model.scorer.decoder, batch.prompts), thoughts, batch.counts)
        length = batch.length if self.official else None
        return step_loss(logits.view(batch.labels.shape), batch.labels, self.kind, length), {}

    def count(self, batch: Judged) -> int:
        """Items the loss is a mean over."""
        if self.kind == "bce":
            return int((~batch.labels.isnan()).sum())
        return len(batch.labels) * batch.length if self.official else max(1, batch.labelled)


def recalls(model: RewardModel, asked: Sequence[Asked], dropped_right: int = 0) -> dict[str, float]:
    """`test_n_{N}_recall_at_1`: best-of-N accuracy for powers of two up to N and for N, the dropped all-correct questions counted as right.

    Further `recall_at_8`, as the released code counts it: the mean number of correct samples among the eight best.
    """
    scores = [steps.nansum(-1) for steps in model.score(asked)]
    most, whole = len(asked[0].corrects), len(asked) + dropped_right
    found = {}
    for n in powers(most):
        right = sum(bool(q.corrects[best(q.corrects[:n].tolist(), s[:n].tolist())]) for q, s in zip(asked, scores, strict=True))
        found[f"test_n_{n}_recall_at_1"] = (right + dropped_right) / whole
    among = [float(q.corrects[s.topk(min(8, most)).indices].float().sum()) for q, s in zip(asked, scores, strict=True)]
    return found | {"recall_at_8": (sum(among) + 8 * dropped_right) / whole}


class Judge:
    """Validation that chooses the weights and ends training when nothing got better `patience` times."""

    def __init__(self, asked: Sequence[Asked], dropped_right: int, patience: int):
        self.asked, self.dropped_right, self.patience = list(asked), dropped_right, patience
        self.best, self.since = -math.inf, 0

    def __call__(self, model: RewardModel) -> dict[str, float]:
        found = recalls(model, self.asked, self.dropped_right)
        score = found[f"test_n_{len(self.asked[0].corrects)}_recall_at_1"]
        self.since = 0 if score > self.best else self.since + 1
        self.best = max(self.best, score)
        return {**found, "score": score, "stop": bool(self.patience) and self.since >= self.patience}


def train(
    model: RewardModel,
    asked: Sequence[Asked],
    held_out: Sequence[Asked],
    settings: TrainSettings,
    how: RewardTraining,
    folder: Path | str,
    logger: Callable[..., None] | None = None,
    dropped_right: int = 0,
) -> TrainResult:
    """Trains in place on annotated questions; a step's batch is `settings.global_batch` questions with all their samples.

    Args:
        held_out: questions that choose the weights by best-of-N, N being their number of samples; mixed ones are enough.
        dropped_right: questions left out of `held_out` because all their samples were right.
    """
    if not asked:
        raise DataError("No annotated question is left: all were dropped. Annotate more, or keep the all-right and all-wrong ones.")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = RewardLoss(model.config.loss, how.official_loss)
    if held_out:
        every = max(1, math.ceil(len(asked) / settings.global_batch / how.evals_per_epoch))
        settings = settings.but(eval_every=settings.eval_every or every, load_best=True)
    validate = Judge(held_out, dropped_right, how.patience) if held_out else None
    return fit(model, list(asked), collate, loss, settings, folder, logger, count=loss.count, validate=validate, label="reward model")
