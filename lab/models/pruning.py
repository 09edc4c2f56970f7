"""Dropping decoder layers: which ones a model misses least, measured with every residual stream reused (tah.md 2.9, 8.2).

The loss without layer i needs layers i+1 … L-1 only, started from the stream that the whole model has before layer i. So one forward
carries the reference and all candidates along, and candidate i costs L-i-1 layers instead of L-1.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import DataError, SettingsError
from lab.models.decoder import Decoder, Pass, supported
from lab.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]
CPU_BLOCK, DEVICE_BLOCK = (1024, 1024), (4096, 16384)  # tokens and words of a block of logits; on a CPU small enough for its cache


@dataclass(frozen=True)
class PruneReport:
    """What each layer is worth.

    Attributes:
        reference_loss: mean cross-entropy of the whole model. losses: the same without layer i.
        order: layers from the least missed on. removed: those that were dropped together. loss_after: the loss without all of these.
    """

    reference_loss: float
    losses: list[float]
    order: list[int]
    removed: list[int]
    loss_after: float

    def rows(self) -> list[dict[str, Any]]:
        """A table with one row a layer: loss and perplexity without it, the change of the perplexity, its rank, whether it went."""
        base = perplexity(self.reference_loss)
        return [
            {"layer": i, "loss": loss, "ppl": perplexity(loss), "delta_ppl": perplexity(loss) - base}
            | {"rank": self.order.index(i), "removed": i in self.removed}
            for i, loss in enumerate(self.losses)
        ]


def prune(model: "PreTrainedModel", batches: Sequence[Batch], count: int = 1) -> PruneReport:
    """Drop the `count` layers whose single removal raises the perplexity least, jointly and in place, and say what was measured.

    Raises:
        SettingsError: more layers than the model can lose, float16 weights, an architecture it does not know.
        DataError: nothing to predict in `batches`.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= count < layers:
        raise SettingsError(f"Cannot drop {count} of {layers} layers: between 1 and {layers - 1} can go, and one must stay.")
    reference, losses = removal_losses(model, batches)
    order = rank(reference, losses)
    drop_layers(model, order[:count])
    after = removal_losses(model, batches, candidates=False)[0]
    log.info("Dropped layers %s: loss %.4f -> %.4f.", sorted(order[:count]), reference, after)
    return PruneReport(reference, losses, order, sorted(order[:count]), after)


@torch.no_grad()
def removal_losses(model: "PreTrainedModel", batches: Sequence[Batch], *, candidates: bool = True) -> tuple[float, list[float]]:
    """The loss of `model`, and its loss without layer i for every i: means over batches of the batch's mean over predicted tokens.

    Args:
        batches: of `input_ids` and `attention_mask` (B, T); every real token after the first of its row is predicted.
        candidates: False measures the whole model alone.
    """
    _check(model, batches)
    decoder, shown = Decoder(model), progress(batches, "Measuring layers") if candidates else batches
    table = torch.tensor([_batch_losses(decoder, batch, candidates) for batch in shown], dtype=torch.float64)
    reference, *losses = table.mean(0).tolist()
    return reference, losses


def rank(reference: float, losses: Sequence[float]) -> list[int]:
    """Layers by the change in perplexity, smallest first; one that is not finite comes last, ties go by perplexity, then by layer."""

    def key(layer: int) -> tuple[float, float, int]:
        ppl = perplexity(losses[layer])
        change = ppl - perplexity(reference)
        return (change if math.isfinite(change) else math.inf), (ppl if math.isfinite(ppl) else math.inf), layer

    return sorted(range(len(losses)), key=key)


def drop_layers(model: "PreTrainedModel", layers: Iterable[int]) -> None:
    """Remove `layers` in place; the rest are renumbered, in the modules (caches count on it) and in the configuration."""
    gone, config = set(layers), model.config
    home, name = _home(model)
    stack = getattr(home, name)
    kept = [i for i in range(len(stack)) if i not in gone]
    if not kept or not gone <= set(range(len(stack))):
        raise SettingsError(f"Cannot drop layers {sorted(gone)} of 0 to {len(stack) - 1}: they must exist, and one must stay.")
    setattr(home, name, nn.ModuleList(stack[i] for i in kept))
    for index, layer in enumerate(getattr(home, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def calibration_batches(
    tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], *, batch_size: int = 4, max_samples: int = 16, max_length: int = 4096
) -> list[dict[str, Tensor]]:
    """Batches of the first `max_samples` texts that are not empty, stripped, cut to `max_length` tokens and padded.

    Raises:
        DataError: no text at all. SettingsError: the tokenizer has no padding token.
    """
    from lab.models.tokenizers import require

    require(tokenizer, pad=True)
    chosen = [text.strip() for text in texts if isinstance(text, str) and text.strip()][:max_samples]
    if not chosen:
        raise DataError("No text to measure layers with: give at least one that is not empty.")
    groups = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    options = dict(padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return [
        {name: encoded[name] for name in ("input_ids", "attention_mask")} for encoded in (tokenizer(group, **options) for group in groups)
    ]


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _batch_losses(decoder: Decoder, batch: Batch, candidates: bool) -> list[float]:
    ids, mask = (batch[name].to(decoder.model.device) for name in ("input_ids", "attention_mask"))
    targets, wanted = ids[:, 1:], (mask[:, 1:] * mask[:, :-1]).bool()
    whole, streams = _streams(decoder, ids, mask.bool(), candidates)
    head = decoder.model.get_output_embeddings().weight
    states = (decoder.final_norm(x)[:, :-1][wanted] for x in [whole, *streams])
    return [_mean_cross_entropy(head, h, targets[wanted]) for h in states]


def _streams(decoder: Decoder, ids: Tensor, valid: Tensor, candidates: bool) -> tuple[Tensor, list[Tensor]]:
    """The residual stream (B, T, D) after the last layer, and the same without layer i for every i."""
    pos, kv = (valid.cumsum(1) - 1).clamp(min=0), decoder.grow()
    span = kv.open(pos, None if bool(valid.all()) else valid, 0)
    call = Pass(kv, span, decoder.rope and decoder.rope(pos), None, None, training=False)
    x, streams = decoder.enter(decoder.embed(ids), pos, call), []
    for block in decoder.blocks:
        streams = [block(stream, call) for stream in streams] + ([x] if candidates else [])
        x = block(x, call)
    return x, streams


def _mean_cross_entropy(head: Tensor, h: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy of h (n, D) @ head.T, a block of tokens and vocabulary at a time: no wide buffer is written and read again."""
    (count, width), total = CPU_BLOCK if h.device.type == "cpu" else DEVICE_BLOCK, 0.0
    for rows, wanted in zip(h.split(count), targets.split(count), strict=True):
        blocks = torch.stack([F.linear(rows, words).float().logsumexp(1) for words in head.split(width)])
        own = torch.linalg.vecdot(rows.float(), head[wanted].float())
        total += (blocks.logsumexp(0) - own).sum(dtype=torch.float64).item()
    return total / len(targets)


def _check(model: "PreTrainedModel", batches: Sequence[Batch]) -> None:
    if not supported(model):
        raise SettingsError(f"Pruning knows GPT-2, Llama, Qwen2 and Qwen3 with full attention, not this {model.config.model_type}.")
    if model.dtype == torch.float16:
        raise SettingsError("float16 overflows without some layers and hides them; measure in bfloat16 or float32.")
    if not batches or not all(bool((batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).any()) for batch in batches):
        raise DataError("A batch has nothing to predict: its texts need at least two tokens.")


def _home(model: "PreTrainedModel") -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name."""
    return (model.transformer, "h") if model.config.model_type == "gpt2" else (model.model, "layers")
