"""The training stages: step 1 with labels, its controls, step 2 for the decider; each is one call that a notebook makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab.errors import DataError, SettingsError, unknown
from lab.latent.plan import IGNORE
from lab.methods.tah.config import DeciderLossSettings, TahConfig
from lab.methods.tah.data import Row, collate
from lab.methods.tah.features import Features, collect, probabilities, threshold_for_rate, train_decider
from lab.methods.tah.model import TahModel, freeze, standard
from lab.methods.tah.score import Point, calibrate, score_tokens, sweep_thresholds
from lab.train import TrainResult, TrainSettings, fit

ARMS = ("tah", "sft", "always")


def train_model(
    model: TahModel,
    examples: Sequence[Row],
    settings: TrainSettings,
    folder: Path | str,
    step_logger=None,
    *,
    validation: Sequence[Row] = (),
    label: str = "training",
) -> TrainResult:
    """Trains `model` in place on examples with its own training loss; `validation` examples are scored under every policy that fits."""
    lengths = [len(example["input_ids"]) for example in examples]

    def loss(model: TahModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        device = model.table.device
        out = model(**{name: value.to(device) for name, value in batch.items()})
        supervised = batch["labels"] != IGNORE
        return out.loss, {"tah/passes": float(out.iterations.cpu()[supervised].float().mean())}

    loss.feeds_back = True

    def validate(model: TahModel) -> dict[str, float]:
        policies = ("never",) if model.tah.max_iter == 1 else ("never", "always", "oracle")
        found = {policy: score_tokens(model, validation, policy).summary() for policy in policies}
        return {f"eval_{policy}_{name}": numbers[name] for policy, numbers in found.items() for name in ("ce", "accuracy")}

    sorted_by = lengths if settings.order == "shuffle" and len(set(lengths)) > 1 else None
    return fit(
        model,
        examples,
        collate,
        loss,
        settings,
        folder,
        step_logger,
        validate=validate if validation else None,
        lengths=sorted_by,
        label=label,
    )


def build_arm(arm: str, backbone, config: TahConfig, tokenizer=None) -> TahModel:
    """A fresh model of one arm: `tah` (labels decide), `always` (every token twice), `sft` (one pass; the published "Standard")."""
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    if arm == "sft":
        model = standard(backbone)
        model.tokenizer = tokenizer
        return model
    changes = {"iter_label_generator": "MaxIterLabelGenerator"} if arm == "always" else {}
    return TahModel(backbone, config.but(**changes), tokenizer)


def with_mlp(model: TahModel, **kwargs: Any) -> TahModel:
    """The step-1 model with a fresh MLP decider and its loss, ready for step 2; the width of hidden states is the backbone's.

    An MLP decider that is there already is kept (continuing from a released checkpoint) where no setting but its threshold changes.
    """
    loss = {name: kwargs.pop(name) for name in ("pos_weight", "loss_scaling") if name in kwargs}
    own = {"hidden_states_size": model.config.hidden_size, "max_iter": model.tah.max_iter, **kwargs}
    changes = {"iter_decider": "MLPIterDecider", "iter_decider_kwargs": own, "train_loss": "IterDeciderLoss", "train_loss_kwargs": loss}
    other = model.reconfigure(**changes, iter_label_generator="FixedIterLabelGenerator")
    before = getattr(model.decider, "settings", None)
    if model.tah.iter_decider == "MLPIterDecider" and before.but(threshold=0.5) == other.decider.settings.but(threshold=0.5):
        other.decider.load_state_dict({**model.decider.state_dict(), "threshold": other.decider.threshold.data})
    return other


def train_step2(
    model: TahModel,
    examples: Sequence[Row],
    settings: TrainSettings,
    folder: Path | str,
    step_logger=None,
    *,
    max_tokens: int = 0,
    cached: bool = True,
) -> tuple[TrainResult, Features | None]:
    """Trains the decider alone. With `cached` features (two passes) a batch is `settings.global_batch` tokens, else so many sequences.

    The loss is the mean over all decisions of a global batch (spec 7.3). Under the official scaling it is the sum of the micro-batches'
    means, divided by the labelled tokens of the global batch; cached features know neither, so that is a SettingsError.
    """
    loss: DeciderLossSettings = model.tah.loss()[1]
    official = loss.loss_scaling == "official"
    if cached and official:
        raise SettingsError(
            "The official scaling is over sequences, which cached features are not: set cached: false or loss_scaling: mean."
        )
    freeze(model, ["simple_base_model"])
    if cached:
        features = collect(model.eval(), model.decider, examples, max_tokens=max_tokens)
        return train_decider(model.decider, features, loss, settings, folder, step_logger), features

    def count(batch: dict[str, torch.Tensor]) -> int:
        return int((batch["labels" if official else "iter_count_labels"] != IGNORE).sum())

    def loss_of(model: TahModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        device = model.table.device
        return model(**{name: value.to(device) for name, value in batch.items()}, num_items_in_batch=count(batch)).loss, {}

    lengths = None if official else [len(example["input_ids"]) for example in examples]
    return fit(model, examples, collate, loss_of, settings, folder, step_logger, count=count, lengths=lengths, label="decider"), None


def choose_threshold(
    model: TahModel, validation: Sequence[Row], how: str, value: float, max_passes: float = 1.15
) -> tuple[float, list[Point]]:
    """The decider's threshold from validation examples, and the sweep behind it.

    Args:
        how: "accuracy" = the highest threshold within 0.002 of the best accuracy at `max_passes`; "rate" = the one at which
            a share `value` of tokens continues; "fixed" = `value` itself, as published (0.9).
    """
    if how not in ("accuracy", "rate", "fixed"):
        raise unknown("way to calibrate", how, ("accuracy", "rate", "fixed"))
    points = sweep_thresholds(model, validation) if how != "fixed" else []
    if how == "accuracy":
        value = calibrate(points, max_passes).threshold
    elif how == "rate":
        features = collect(model.eval(), model.decider, validation)
        if not len(features):
            raise DataError("There are no validation tokens to calibrate the threshold on.")
        value = threshold_for_rate(probabilities(model.decider, features), value)
    model.set_threshold(value)
    return value, points
