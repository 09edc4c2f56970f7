"""What a model gets right token by token under a policy, and the threshold that pays: no generation involved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.plan import IGNORE
from lab.methods.tah.config import LabelSettings
from lab.methods.tah.data import collate
from lab.methods.tah.deciders import Decider, LabelDecider
from lab.methods.tah.labels import length_groups
from lab.methods.tah.model import TahModel
from lab.methods.tah.objective import decision_quality
from lab.methods.tah.policy import decider_for_policy
from lab.models.vocab import token_statistics

TOKEN_POLICIES = ("never", "always", "oracle", "decider")


@dataclass
class Scored:
    """Numbers per supervised token (n,): right, cross-entropy, iterations, hard; and per token read (m,): iterations, decisions, labels."""

    right: Tensor
    cross_entropy: Tensor
    hard: Tensor
    iterations: Tensor
    again: Tensor
    wanted: Tensor
    prob: Tensor

    def summary(self) -> dict[str, float]:
        """Accuracy and cross-entropy overall, on hard and on easy tokens; passes per token; precision and recall of the decisions."""
        easy = ~self.hard
        mean = {
            name: float(self.right[own].float().mean()) if own.any() else math.nan for name, own in (("hard", self.hard), ("easy", easy))
        }
        entropy = {
            name: float(self.cross_entropy[own].mean()) if own.any() else math.nan for name, own in (("hard", self.hard), ("easy", easy))
        }
        quality = decision_quality(self.again, self.wanted)
        return {
            "accuracy": float(self.right.float().mean()),
            "accuracy_hard": mean["hard"],
            "accuracy_easy": mean["easy"],
            "ce": float(self.cross_entropy.mean()),
            "ce_hard": entropy["hard"],
            "perplexity": math.exp(min(float(self.cross_entropy.mean()), 700.0)),
            "passes": float(self.iterations.float().mean()),
            "precision": quality["precision"],
            "recall": quality["recall"],
        }


def token_decider(model: TahModel, policy: str) -> Decider:
    """The decider of a policy that is scored on labelled text: there the oracle is the labels themselves (which leaks them)."""
    if policy == "oracle":
        return LabelDecider(LabelSettings(max_iter=model.tah.max_iter))
    if policy not in TOKEN_POLICIES:
        raise SettingsError(f"policy = {policy!r}: it is one of {', '.join(TOKEN_POLICIES)}.")
    return decider_for_policy(model, policy)


@torch.no_grad()
def score_tokens(
    model: TahModel,
    examples: Sequence[dict[str, Any]],
    policy: str | Decider = "decider",
    hard: Sequence[Sequence[bool]] | None = None,
    batch_tokens: int = 8192,
) -> Scored:
    """Every supervised token of `examples` predicted under `policy`.

    Args:
        hard: which positions count as hard (by the position that predicts); None = those whose iteration label asks for more than one pass.
    """
    decider = policy if isinstance(policy, Decider) else token_decider(model.eval(), policy)
    parts = []
    for group in length_groups([len(example["input_ids"]) for example in examples], batch_tokens):
        own = [examples[i] if hard is None else {**examples[i], "hard": [int(x) for x in hard[i]]} for i in group]
        batch = {name: value.to(model.table.device) for name, value in collate(own, 0).items()}
        parts.append(_scored(model, decider, batch))
    return Scored(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _scored(model: TahModel, decider: Decider, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    ids, mask, counts = batch["input_ids"], batch["attention_mask"], batch["iter_count_labels"]
    out = model(ids, mask, iter_count_labels=counts, decider=decider)
    targets = torch.cat((batch["labels"][:, 1:], torch.full_like(ids[:, :1], IGNORE)), dim=1)
    where, read = targets != IGNORE, mask.bool()
    found = token_statistics(out.hidden[where], model.head, targets[where])
    hard = batch["hard"] == 1 if "hard" in batch else counts > 1
    columns = (found.best == targets[where], found.cross_entropy, hard[where])
    return *columns, out.iterations[read], out.again[read], counts[read], out.decider_logit[read].sigmoid()


@dataclass(frozen=True)
class Point:
    """A threshold with what it gives on the calibration data."""

    threshold: float
    accuracy: float
    passes: float


def sweep_thresholds(
    model: TahModel, examples: Sequence[dict[str, Any]], thresholds: Sequence[float] = (), batch_tokens: int = 8192
) -> list[Point]:
    """Accuracy and passes per token at each threshold, each measured by running the passes it asks for."""
    before, points = model.decider.effective_threshold, []
    for value in thresholds or [0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98]:
        model.decider.set_threshold(value)
        summary = score_tokens(model, examples, model.decider, batch_tokens=batch_tokens).summary()
        points.append(Point(value, summary["accuracy"], summary["passes"]))
    model.decider.set_threshold(before)
    return points


def calibrate(points: Sequence[Point], max_passes: float = 1.15, tolerance: float = 0.002) -> Point:
    """Of the thresholds with at most `max_passes` (else the cheapest), the highest within `tolerance` of the best accuracy."""
    affordable = [point for point in points if point.passes <= max_passes] or [min(points, key=lambda point: point.passes)]
    best = max(point.accuracy for point in affordable)
    return max((point for point in affordable if point.accuracy >= best - tolerance), key=lambda point: point.threshold)


def differences(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The decider's row minus the equal-step control's, where there are both: the comparison the claim is about."""
    if "tah decider" not in table or "sft" not in table:
        return {}
    names = ("accuracy", "accuracy_hard", "accuracy_easy", "ce", "ce_hard", "passes")
    return {"tah decider minus sft": {name: table["tah decider"][name] - table["sft"][name] for name in names}}


def policy_points(model: TahModel | None, examples: Sequence[dict[str, Any]], table: dict[str, dict[str, float]]):
    """Points of accuracy against passes for the figure: every row of `table`, and the decider swept over thresholds."""
    import pandas as pd

    rows = [
        {"policy": arm, "passes": numbers["passes"], "mean": numbers["accuracy"]} for arm, numbers in table.items() if arm != "tah decider"
    ]
    if model is not None and model.decider.topk:
        swept = sweep_thresholds(model, examples)
        rows += [{"policy": "tah decider", "passes": point.passes, "mean": point.accuracy, "threshold": point.threshold} for point in swept]
    return pd.DataFrame(rows)


def missed_table(labelled, name: str, top: int = 12) -> list[dict[str, Any]]:
    """The tokens of a split that the labelling model missed most often: text, occurrences, share missed, mean cross-entropy."""
    counts: dict[int, list[float]] = {}
    for row in labelled.rows(name):
        for token, wrong, loss in zip(row["real_token"][1:], row["mismatch"], row["cross_entropy"], strict=False):
            entry = counts.setdefault(token, [0, 0, 0.0])
            entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + wrong, entry[2] + loss
    tokenizer, ranked = labelled.tokenizer(), sorted(counts.items(), key=lambda item: -item[1][1])[:top]
    return [{"text": tokenizer.decode([token]), "tokens": n, "missed": wrong / n, "ce": loss / n} for token, (n, wrong, loss) in ranked]


def hard_table(model: TahModel, examples: Sequence[dict[str, Any]], least: int = 5):
    """Per input token at supervised places: how often it is read twice, and the loss after one pass and under the decider."""
    import pandas as pd

    once, chosen = (score_tokens(model, examples, policy) for policy in ("never", "decider"))
    order = [i for group in length_groups([len(e["input_ids"]) for e in examples], 8192) for i in group]
    tokens = [t for i in order for t, label in zip(examples[i]["input_ids"], examples[i]["labels"][1:], strict=False) if label != IGNORE]
    again = torch.cat([_supervised(examples[i], count) for i, count in zip(order, _per_row(chosen, examples, order), strict=True)])
    frame = pd.DataFrame({"id": tokens, "hard_share": again > 1, "ce_1": once.cross_entropy, "ce_2": chosen.cross_entropy})
    table = frame.groupby("id").agg(tokens=("id", "size"), hard_share=("hard_share", "mean"), ce_1=("ce_1", "mean"), ce_2=("ce_2", "mean"))
    table = table[table["tokens"] >= least].reset_index()
    return table.assign(text=[model.tokenizer.decode([i]) if model.tokenizer else str(i) for i in table["id"]])


def _per_row(scored: Scored, examples: Sequence[dict[str, Any]], order: Sequence[int]) -> Sequence[Tensor]:
    return scored.iterations.split([len(examples[i]["input_ids"]) for i in order])


def _supervised(example: dict[str, Any], counts: Tensor) -> Tensor:
    return counts[:-1][torch.tensor(example["labels"][1:]) != IGNORE]


def prompts_of(rows: Sequence[dict[str, Any]], count: int, whole: bool = True) -> list[list[int]]:
    """Token ids of the first rows: all of them, or up to the first supervised token."""
    return [row["real_token"] if whole else row["real_token"][: row["mask"].index(1)] for row in rows[:count]]
