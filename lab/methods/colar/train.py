"""Supervised training of CoLaR: one compression factor a batch, drawn uniformly (`colar.md` 2.2, 2.3)."""

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.data.examples import Example
from lab.errors import SettingsError
from lab.latent.plan import IGNORE, Kept
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.data import ColarBatch, ColarRow, collate, encode
from lab.methods.colar.model import ColarModel
from lab.methods.colar.objective import loss
from lab.train import TrainResult, TrainSettings, fit


def prepare(examples: Iterable[Example], model: ColarModel, max_tokens: int = 1024) -> Kept[ColarRow]:
    """The usable examples as ids; those without question, steps or answer, or too long, are dropped and counted."""
    kept = Kept()
    for example in examples:
        reason = "" if example.question.strip() and example.answer.strip() and example.steps else "no question, no steps or no answer"
        row = None if reason else encode(model.tokenizer, model.config, example.question, example.steps, example.answer)
        if row and max(map(len, row.speeds.values())) + len(row.steps) + len(row.answer) > max_tokens:
            reason = f"longer than {max_tokens} tokens"
        kept.add(example.id, row, reason)
    return kept.checked()


class Drawn(NamedTuple):
    """A row with the factor of its batch and the number that its random choices follow from."""

    row: ColarRow
    factor: int
    key: int


class Batches(Sequence[Drawn]):
    """Rows in the order of training, whole batches at one factor; item i is a pure function of (seed, i), so a resume repeats nothing.

    Args:
        factors: the compression factors drawn from. batch: rows of a global batch.
    """

    def __init__(self, rows: Sequence[ColarRow], steps: int, batch: int, factors: Sequence[int], seed: int):
        self.rows, self.steps, self.batch, self.factors, self.seed = rows, steps, batch, list(factors), seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> Drawn:
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, place = divmod(index, len(self.rows))
        factor = random.Random(f"factor {self.seed} {index // self.batch}").choice(self.factors)
        return Drawn(self.rows[self._order(epoch)[place]], factor, self.seed * 1_000_003 + index)

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.rows)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]


def collator(s: ColarSettings) -> Callable[[list[Drawn]], ColarBatch]:
    """Makes the batch of rows that were drawn together."""

    def run(drawn: list[Drawn]) -> ColarBatch:
        generator = torch.Generator().manual_seed(drawn[0].key)
        return collate([item.row for item in drawn], drawn[0].factor, s, generator)

    return run


def count(batch: ColarBatch) -> dict[str, int]:
    """What each part of the loss is a mean over."""
    labels, groups = int((batch.labels[:, 1:] != IGNORE).sum()), int(batch.groups_mask.any(-1).sum())
    return {"ce": labels, "latent": groups, "entropy": groups, "forward": labels}


def train(
    model: ColarModel,
    rows: Sequence[ColarRow],
    settings: TrainSettings,
    folder: Path | str,
    logger: Callable[..., None] | None = None,
    *,
    factors: Sequence[int] = (),
    frozen_table: bool = True,
    validate: Callable[[Any], dict[str, float]] | None = None,
    label: str = "CoLaR",
) -> TrainResult:
    """Trains in place; with LoRA the adapters and the latent head learn, without it the whole backbone. The order of rows is our own.

    Args:
        factors: compression factors to draw from, () = 1 to the model's largest.
        frozen_table: keep the input embeddings as they are, so that the latent head's targets do not move.
    """
    s = model.config
    chosen = list(factors) or list(range(1, s.max_compression_factor + 1))
    if bad := [factor for factor in chosen if not 1 <= factor <= s.max_compression_factor]:
        raise SettingsError(f"Compression factor {bad[0]}: this model has prompts for 1 to {s.max_compression_factor}.")
    steps = settings.total(len(rows))
    if frozen_table:
        model.backbone.get_input_embeddings().weight.requires_grad_(False)
    data = Batches(rows, steps, settings.global_batch, chosen, settings.seed)
    used = {"ce", "latent", "entropy"} | ({"forward"} if s.pred_embed_forward_weight else set())
    return fit(
        model,
        data,
        collator(s),
        loss,
        settings.but(steps=steps, epochs=0.0, order="as_given"),
        folder,
        logger,
        count=lambda batch: {name: value for name, value in count(batch).items() if name in used},
        validate=validate,
        label=label,
    )


def warm_up(model: ColarModel, rows: Sequence[ColarRow], settings: TrainSettings, folder: Path | str, logger=None) -> TrainResult:
    """Teaches the written reasoning first (speed 1, no latent loss), as the published runs start; then measures the embeddings again."""
    kept = model.config
    model.settings = kept.but(embed_modeling_weight=0.0).model_dump(mode="json")
    try:
        result = train(model, rows, settings, folder, logger, factors=[1], frozen_table=False, label="written reasoning")
    finally:
        model.settings = kept.model_dump(mode="json")
    model.measure()
    return result
