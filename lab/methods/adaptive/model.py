"""The adaptive model: a recurrent filter between a hidden state and the next thought, and a two-way head that goes on or stops.

Ids of a sequence are `… START, CONTINUE · n, STOP …`. A CONTINUE reads `filter(h)` of the state before it, a STOP reads the
embedding of END, and the states at START and CONTINUE go to the two-way head instead of the vocabulary (distill.md 2B.1).
Axes: R rows, t columns, D width, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.errors import DataError, unknown
from lab.methods.adaptive.config import TOKENS, AdaptiveSettings
from lab.models.backbones import grow
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.peft_state import with_adapters
from lab.models.step import Out
from lab.models.tokenizers import require

FILTERS = ("MLP", "linear", "linear_ln", "linear_ECF", "SRE", "none")
_ROWS = {"tied": ("start", "end", "continue", "stop"), "untied": ("start_in", "end_in", "start_out", "continue_out", "stop_out")}


class MLPFilter(nn.Module):
    """Linear, exact GELU, Linear, LayerNorm; (…, D) -> (…, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.input_layer, self.output_layer, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        for layer in (self.input_layer, self.output_layer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.output_layer(F.gelu(self.input_layer(h))))


class LinearFilter(nn.Module):
    """Linear and a norm: RMSNorm plus a bias vector, or (`layer_norm`) a LayerNorm; (…, D) -> (…, D)."""

    def __init__(self, width: int, layer_norm: bool = False):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=layer_norm)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.RMSNorm(width, eps=1e-6)
        self.bias = None if layer_norm else nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        out = self.norm(self.layer(h))
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def from_embeddings(self, rows: Tensor) -> None:
        """The ECF start: the weight is E[w wᵀ] over the used embedding rows (n, D), the gain their mean norm / sqrt(D)."""
        self.layer.weight.copy_(rows.T @ rows / len(rows))
        self.norm.weight.fill_(float(rows.norm(dim=1).mean()) / rows.shape[1] ** 0.5)


class Parts(nn.Module):
    """The method's own weights: `recurrent_filter` (absent for SRE and none) and, where they are modules, the special vectors."""

    def __init__(self, width: int, s: AdaptiveSettings):
        super().__init__()
        if s.filter not in FILTERS:
            raise unknown("recurrent filter", s.filter, FILTERS)
        if s.latent and s.filter not in ("SRE", "none"):
            self.recurrent_filter = MLPFilter(width) if s.filter == "MLP" else LinearFilter(width, s.filter == "linear_ln")
        for name in _ROWS.get(s.special, ()):
            setattr(self, f"_{name}_embed" if s.special == "tied" else f"_{name.replace('_', '_embed_')}", nn.Linear(width, 1, bias=False))


class Thinker:
    """A decoder that reads and predicts the special tokens as the method says; everything else is the decoder's."""

    def __init__(self, decoder: Any, parts: Parts, s: AdaptiveSettings):
        self.decoder, self.parts, self.s = decoder, parts, s
        self.silent = torch.tensor(s.silent, dtype=torch.long, device=decoder.table.weight.device)
        self.layers = decoder.config.num_hidden_layers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copied to another process: asked before there is a decoder
            raise AttributeError(name)
        return getattr(self.decoder, name)

    def __call__(self, *args: Any, **options: Any) -> Out:
        return self.decoder(*args, **options)

    def vector(self, name: str, side: str) -> Tensor:
        """(D,) the vector of a special token (start, end, continue, stop) as input (`in`) or in the output head (`out`)."""
        if not self.s.special:
            table = self.table.weight if side == "in" else self.model.get_output_embeddings().weight
            return table[getattr(self.s, "go_on" if name == "continue" else name)]
        return getattr(self.parts, f"_{name}_embed" if self.s.special == "tied" else f"_{name}_embed_{side}").weight[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (…, D) of ids; START and END from their modules where there are any."""
        x = self.decoder.embed(ids)
        for name in ("start", "end") if self.s.special else ():
            x = torch.where((ids == getattr(self.s, name))[..., None], self.vector(name, "in").to(x.dtype), x)
        return x

    def logits(self, h: Tensor) -> Tensor:
        """Vocabulary logits (…, V): CONTINUE, STOP and END are impossible, START comes from its module where there is one."""
        logits = self.decoder.logits(h)
        if not self.s.latent:
            return logits
        logits = logits.index_fill(-1, self.silent, -torch.inf)
        if self.s.special:
            start = (h @ self.vector("start", "out").to(h.dtype))[..., None].to(logits.dtype)
            column = torch.tensor([self.s.start], device=h.device).expand_as(start)
            logits = logits.scatter(-1, column, start)
        return logits

    def decide(self, h: Tensor) -> Tensor:
        """Logits (…, 2) of going on and of stopping."""
        h = h.detach() if self.s.detach_head else h
        weight = torch.stack((self.vector("continue", "out"), self.vector("stop", "out")))
        return F.linear(h, weight.to(h.dtype)) / (self.s.head_temperature or 1.0)

    def feedback(self, h: Tensor, step: int = 0) -> Tensor:
        """The next thought (…, D) made of the state (…, D) before it."""
        if self.s.filter == "none":
            return h
        if self.s.filter == "SRE":
            unused = torch.tensor(self.s.unused, dtype=torch.long, device=h.device)
            p = torch.softmax(self.logits(h).float().index_fill(-1, unused, -torch.inf), -1).to(h.dtype)
            return p @ self.table.weight + p[..., self.s.start, None] * (self.vector("start", "in") - self.table.weight[self.s.start])
        module = self.parts.recurrent_filter
        return module(h.to(next(module.parameters()).dtype)).to(h.dtype)

    @property
    def closes(self) -> Callable[[Tensor], Tensor] | None:
        """`closing` where what STOP reads depends on the thoughts; None where it is END alone."""
        return self.closing if self.s.add_latent_to_end else None

    def closing(self, h: Tensor) -> Tensor:
        """What STOP reads (…, D): END, plus (`add_latent_to_end`) one more thought."""
        end = self.vector("end", "in").to(h.dtype).expand_as(h)
        return end + self.feedback(h) if self.s.add_latent_to_end else end


class AdaptiveModel(LatentModel):
    """A backbone that thinks through a filter and decides itself when to stop."""

    method = "adaptive"

    @classmethod
    def build(cls, backbone, tokenizer, settings, source: str = "") -> "AdaptiveModel":
        """A model of these settings with fresh parts."""
        s = settings if isinstance(settings, AdaptiveSettings) else AdaptiveSettings.check(**settings)
        parts = Parts(backbone.config.hidden_size, s).to(next(backbone.parameters()).dtype)
        return cls(backbone, tokenizer, s, parts, source)

    @classmethod
    def start(cls, backbone, tokenizer, settings: AdaptiveSettings, *, multiple: int = 128) -> "AdaptiveModel":
        """A model to train: the four tokens are added (unless they are there), the embedding grows to a multiple of `multiple`.

        New rows are drawn around the mean of the old ones, as transformers does; rows beyond the tokenizer are never said.
        """
        require(tokenizer, eos=True)
        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
        table = backbone.get_input_embeddings().weight
        if len(tokenizer) > table.shape[0]:
            grow(backbone, len(tokenizer), multiple)
        ids = dict(zip(("start", "end", "go_on", "stop"), tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
        rows = backbone.get_input_embeddings().weight.shape[0]
        backbone.config.vocab_size = rows
        model = cls.build(backbone, tokenizer, settings.but(**ids, unused=list(range(len(tokenizer), rows))))
        if settings.filter == "linear_ECF":
            model.parts.recurrent_filter.from_embeddings(backbone.get_input_embeddings().weight[: len(tokenizer)])
        return model

    @property
    def config(self) -> AdaptiveSettings:
        """The checked settings."""
        return AdaptiveSettings.check(**self.settings)

    def but(self, **changes: Any) -> None:
        """Changes settings in place; the thinker is made anew."""
        self.settings = self.config.but(**changes).model_dump(mode="json")
        self.__dict__.pop("_thinker", None)

    @property
    def thinker(self) -> Thinker:
        """The decoder with this method's reading of the special tokens; rebuilt when weights were replaced."""
        head = self.backbone.get_input_embeddings().weight
        made = self.__dict__.get("_thinker")
        if made is None or made[0] is not head or made[1] != head.device:
            made = self.__dict__["_thinker"] = (head, head.device, Thinker(decoder_for(self.backbone), self.parts, self.config))
        return made[2]

    @property
    def decoder(self) -> Thinker:
        """The same, under the name that the engines use."""
        return self.thinker

    def add_lora(self, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
        """Freezes the backbone, puts LoRA into its linears, and gives the special tokens modules of their own (2B.1)."""
        self.__dict__["lora"] = with_adapters(self.backbone, rank, alpha, targets, dropout)
        if self.config.latent and not self.config.special:
            self._specials_to_modules()
        self.__dict__.pop("_thinker", None)

    @torch.no_grad()
    def _specials_to_modules(self) -> None:
        rows = {
            (name, side): self.thinker.vector(name, side).clone() for name in ("start", "end", "continue", "stop") for side in ("in", "out")
        }
        kind = "tied" if self.backbone.config.tie_word_embeddings else "untied"
        self.but(special=kind)
        parts = Parts(self.backbone.config.hidden_size, self.config).to(next(self.parts.parameters(), self.device_weight()))
        parts.load_state_dict({**parts.state_dict(), **self.parts.state_dict()})
        self.parts = parts
        for name, side in rows:
            if kind == "tied" or (name, side) in (("start", "in"), ("end", "in"), ("start", "out"), ("continue", "out"), ("stop", "out")):
                self.thinker.vector(name, side).copy_(rows[name, side])

    def device_weight(self) -> Tensor:
        """The input embedding, for its dtype and device."""
        return self.backbone.get_input_embeddings().weight

    @torch.no_grad()
    def merge(self) -> "AdaptiveModel":
        """Folds LoRA into the backbone and the special modules into the embedding; the model computes the same (2B.8)."""
        if "lora" in self.__dict__:
            self.backbone = self.__dict__.pop("lora").merge_and_unload()
        if self.config.special:
            thinker, s = self.thinker, self.config
            table, head = self.device_weight(), self.backbone.get_output_embeddings().weight
            ids = {"start": s.start, "end": s.end, "continue": s.go_on, "stop": s.stop}
            for name in ("start", "end") if s.special == "untied" else ids:
                table[ids[name]] = thinker.vector(name, "in").to(table.dtype)
            for name in ("start", "continue", "stop") if s.special == "untied" else ():
                head[ids[name]] = thinker.vector(name, "out").to(head.dtype)
            if hasattr(self.parts, "recurrent_filter"):
                kept = nn.Module()
                kept.recurrent_filter = self.parts.recurrent_filter
                self.parts = kept
            else:
                self.parts = nn.Module()
            self.but(special="")
        self.__dict__.pop("_thinker", None)
        return self

    def _write(self, folder: Path, backbone_name: str) -> None:
        """Our own format never holds LoRA: it is folded in first, in a copy."""
        if "lora" not in self.__dict__ and not self.config.special:
            super()._write(folder, backbone_name)
            return
        copied = copy.deepcopy(self).merge()
        LatentModel._write(copied, folder, "")

    def __deepcopy__(self, memo: dict) -> "AdaptiveModel":
        lora = self.__dict__.get("lora")
        backbone = copy.deepcopy(lora if lora is not None else self.backbone, memo)
        plain = backbone.get_base_model() if lora is not None else backbone
        made = type(self)(plain, self.tokenizer, dict(self.settings), copy.deepcopy(self.parts, memo), self.source)
        if lora is not None:
            made.__dict__["lora"] = backbone
        return made

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the backbone computes without LoRA."""
        wrapped = self.__dict__.get("lora")
        if wrapped is None:
            yield
            return
        with wrapped.disable_adapter():
            yield


def check_ids(ids: list[int], s: AdaptiveSettings) -> None:
    """Raises DataError where CONTINUE or STOP stands outside a thought, another token inside, or END anywhere."""
    inside = False
    for place, token in enumerate(ids):
        if token == s.end or inside and token not in (s.go_on, s.stop) or not inside and token in (s.go_on, s.stop):
            raise DataError(f"Token {token} at place {place} does not belong there: a thought reads START, CONTINUE …, STOP.")
        inside = token == s.start or inside and token == s.go_on


def read_ids(thinker: Thinker, ids: Tensor, mask: Tensor | None = None, taps: tuple[int, ...] = (), columns: bool = False) -> Out:
    """Hidden states (R, t, D) of any well-formed ids (R, t), with thoughts at any column and any number of them.

    One decoder call for each column where some row makes a thought. What training uses instead is `unroll`, which puts the
    thoughts of all rows at one column; this is the general case, and the official way.

    Args:
        mask: (R, t), False at padding on the left. columns: positions count padding too (official training on GPT-2).
    """
    s, wide = thinker.s, ids.shape[1]
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for row, real in zip(ids.tolist(), valid.tolist(), strict=True):
        check_ids([token for token, keep in zip(row, real, strict=True) if keep], s)
    pos = torch.arange(wide, device=ids.device).expand_as(ids) if columns else (valid.cumsum(1) - 1).clamp(min=0)
    thinking = (ids == s.go_on) | ((ids == s.stop) if s.add_latent_to_end else torch.zeros_like(valid))
    starts = [0, *(c for c in thinking.any(0).nonzero()[:, 0].tolist() if c)]
    kv, outs, h = thinker.grow(), [], None
    for begin, end in zip(starts, [*starts[1:], wide], strict=True):
        x = _inputs(thinker, ids[:, begin:end], h)
        outs.append(thinker(x, pos[:, begin:end], kv, valid=valid[:, begin:end], taps=taps))
        h = outs[-1].last[:, -1]
    return Out(torch.cat([out.last for out in outs], 1), {tap: torch.cat([out.taps[tap] for out in outs], 1) for tap in taps})


def _inputs(thinker: Thinker, ids: Tensor, h: Tensor | None) -> Tensor:
    s = thinker.s
    x = thinker.embed(torch.where(ids == s.stop, s.end, ids) if s.latent else ids)
    if h is None:
        return x
    first = torch.where((ids[:, 0] == s.go_on)[:, None], thinker.feedback(h), x[:, 0])
    if s.add_latent_to_end:
        first = torch.where((ids[:, 0] == s.stop)[:, None], thinker.closing(h), first)
    return torch.cat((first[:, None], x[:, 1:]), 1)


def scores(thinker: Thinker, ids: Tensor, states: Tensor) -> Tensor:
    """Logits (R, t, V) with each position's own head: two finite entries where the stop head speaks."""
    s = thinker.s
    logits = thinker.logits(states)
    if not s.latent:
        return logits
    two = thinker.decide(states).to(logits.dtype)
    spread = torch.full_like(logits, -torch.inf)
    spread[..., s.go_on], spread[..., s.stop] = two[..., 0], two[..., 1]
    return torch.where(deciding(ids, s)[..., None], spread, logits)


def deciding(ids: Tensor, s: AdaptiveSettings) -> Tensor:
    """Where (R, t) the state at a token goes to the stop head."""
    return (ids == s.start) | (ids == s.go_on)
