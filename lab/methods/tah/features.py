"""Step 2 from cached features: what the decider reads after pass 1 is stored once, then deciders are trained in minutes.

With two passes only the first is supervised, and its inputs depend neither on the decider nor on the adapter (spec 8.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.errors import DataError, SettingsError
from lab.latent.plan import IGNORE
from lab.methods.tah.config import DeciderLossSettings
from lab.methods.tah.deciders import MLPDecider, Seen
from lab.methods.tah.labels import length_groups, padded
from lab.methods.tah.model import TahModel
from lab.models.vocab import top_logits
from lab.progress import Progress
from lab.train import TrainResult, TrainSettings, fit


@dataclass
class Features:
    """Decider inputs of n tokens: `hidden` (n, m, D), `top` (n, k) logits, `wanted` (n,) 1 = another pass; and each token's sequence."""

    hidden: Tensor
    top: Tensor
    wanted: Tensor
    sequence: Tensor

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> int:
        return index

    def save(self, path: Path) -> None:
        """One safetensors file."""
        from safetensors.torch import save_file

        save_file({name: getattr(self, name) for name in ("hidden", "top", "wanted", "sequence")}, path)

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Features from `save`."""
        from safetensors.torch import load_file

        return cls(**load_file(path))


@torch.no_grad()
def collect(model: TahModel, decider: MLPDecider, examples: Sequence[dict], batch_tokens: int = 8192, max_tokens: int = 0) -> Features:
    """The features that `decider` reads after the first pass over `examples` (with iteration labels), in order of the examples.

    Args:
        max_tokens: keep this many tokens at most, whole examples from the front; 0 = all.
    """
    if model.tah.max_iter != 2:
        raise SettingsError(
            "Cached features hold the first pass only; with max_iter above 2 train the decider on the model itself (cached: false)."
        )
    lengths = [len(example["input_ids"]) for example in examples]
    if max_tokens:
        kept = torch.tensor(lengths).cumsum(0) <= max(max_tokens, lengths[0])
        examples, lengths = examples[: int(kept.sum())], lengths[: int(kept.sum())]
    parts: list[tuple | None] = [None] * len(examples)
    with Progress("first passes", len(examples)) as progress:
        for group in length_groups(lengths, batch_tokens):
            for place, part in zip(group, _first_pass(model, decider, [examples[i] for i in group]), strict=True):
                parts[place] = part
            progress.advance(len(group))
    hidden, top, wanted = (torch.cat(column) for column in zip(*parts, strict=True))
    return Features(hidden, top, wanted, torch.repeat_interleave(torch.tensor(lengths)))


def _first_pass(model: TahModel, decider: MLPDecider, examples: Sequence[dict]):
    device = model.table.device
    ids, lengths = padded([example["input_ids"] for example in examples], device)
    wanted, _ = padded([example["iter_count_labels"] for example in examples], device, IGNORE)
    pos = torch.arange(ids.shape[1], device=device).expand_as(ids)
    out = model.decoder(model.decoder.embed(ids), pos, model.decoder.grow(), taps=decider.taps)
    real = pos < lengths[:, None]
    hidden = torch.stack([out.taps[layer][real] for layer in decider.taps], dim=1).cpu()
    top = top_logits(out.last[real], model.head, decider.topk)[0].cpu()
    target = torch.where(wanted[real] == IGNORE, IGNORE, (wanted[real] > 1).long()).cpu()
    return zip(*(column.split(lengths.tolist()) for column in (hidden, top, target)), strict=True)


def train_decider(
    decider: MLPDecider, features: Features, loss: DeciderLossSettings, settings: TrainSettings, folder: Path | str, step_logger=None
) -> TrainResult:
    """Trains `decider` in place on cached features; a batch is `settings.global_batch` tokens.

    Raises DataError where not one token wants another pass.
    """
    if not bool((features.wanted == 1).any()):
        raise DataError(
            "Not one token of the features wants a second pass: the decider would learn to say no. Label with another reference model."
        )
    weight = torch.tensor(loss.pos_weight)

    def objective(model: MLPDecider, batch: Tensor):
        device = next(model.parameters()).device
        hidden, top, wanted = (x[batch].to(device) for x in (features.hidden, features.top, features.wanted))
        keep = wanted != IGNORE
        logit = model.logit(Seen(1, int(keep.sum()), top[keep], hidden[keep]))
        return F.binary_cross_entropy_with_logits(logit, wanted[keep].float(), pos_weight=weight.to(device)), {}

    def count(batch: Tensor) -> int:
        return int((features.wanted[batch] != IGNORE).sum())

    return fit(decider, features, torch.tensor, objective, settings, folder, step_logger, count=count, label="decider")


@torch.no_grad()
def probabilities(decider: MLPDecider, features: Features, batch: int = 65536) -> Tensor:
    """(n,) probabilities of another pass."""
    decider.eval()
    parts = zip(features.hidden.split(batch), features.top.split(batch), strict=True)
    return torch.cat([decider.logit(Seen(1, len(top), top, hidden)).sigmoid() for hidden, top in parts])


def threshold_for_rate(prob: Tensor, rate: float) -> float:
    """The threshold at which this share of tokens continues: published runs iterate on 6 to 7 % (spec 7.4)."""
    if not 0 < rate < 1:
        raise SettingsError(f"rate = {rate}: the share of tokens that continue lies between 0 and 1.")
    return float(prob.quantile(1 - rate)) if len(prob) < 1 << 24 else float(prob.sort().values[int((1 - rate) * (len(prob) - 1))])
