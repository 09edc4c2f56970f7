"""The two gates: DTT's scalar one between a token's embedding and a projected state, HRPO's per dimension (`dtt.md` 2.1, 2.6).

A gate stands in its backbone's forward: `attach` makes the backbone take `prev_hidden`, `gate_noise` and `gate_mask`.
Axes: R rows, t columns, D width.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.methods.dtt.config import GatedSettings, Noise

C, EPS = 8.0, 1e-10


class Mixed(NamedTuple):
    """What is read (…, D), and the share of the hidden state in it: `gate` (…,), `logit` (…,), NaN where the gate has none."""

    x: Tensor
    gate: Tensor
    logit: Tensor


def noise_of(uniform: Tensor, kind: Noise) -> Tensor:
    """Gate noise made of uniform numbers in (0, 1), in float32."""
    u = uniform.float()
    if kind == "none":
        return torch.zeros_like(u)
    return -torch.log(-torch.log(u + EPS) + EPS) if kind == "gumbel" else torch.log(u) - torch.log1p(-u)


def open_probability(logit: Tensor, kind: Noise) -> Tensor:
    """The probability that a hard gate with this noise is open."""
    if kind == "none":
        return (logit > 0).float()
    return -torch.expm1(-torch.exp(logit)) if kind == "gumbel" else torch.sigmoid(logit)


def gumbel_sigmoid(logit: Tensor, noise: Tensor | float, temperature: float, hard: bool) -> Tensor:
    """sigmoid((logit + noise) / temperature); where `hard`, 0 or 1 with that sigmoid's gradient."""
    soft = torch.sigmoid((logit + noise) / temperature)
    return (soft > 0.5).to(soft) + (soft - soft.detach()) if hard else soft


class Gate(nn.Module):
    """What both gates share: their place in the backbone's forward. `seen` is the `Mixed` of the last gated forward."""

    def __init__(self):
        super().__init__()
        self.seen: Mixed | None = None

    def attach(self, stem: nn.Module) -> None:
        """Makes `stem` (the transformer under the head) mix hidden states into its inputs when it is given some."""
        stem.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, stem: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replaces ids by mixed embeddings.

        prev_hidden (R, t, D): what is mixed in at each column; gate_noise (R, t): uniform numbers; gate_mask (R, t): where.
        """
        state, uniform, mask = (kwargs.pop(name, None) for name in ("prev_hidden", "gate_noise", "gate_mask"))
        if state is None:
            return args, kwargs
        ids = args[0] if args else kwargs["input_ids"]
        embedding = stem.get_input_embeddings()(ids)
        self.seen = self(embedding, state, uniform)
        x = torch.where(mask[..., None], self.seen.x, embedding)
        return (), kwargs | {"input_ids": None, "inputs_embeds": x}


class SparseGate(Gate):
    """DTT: x = g · projection(h) + (1 − g) · embedding, with g of the state h whose logits gave the token."""

    def __init__(self, width: int, s: GatedSettings):
        super().__init__()
        self.projection = nn.Linear(width, width, bias=False)
        self.gate_linear = nn.Linear(width, 1)
        nn.init.constant_(self.gate_linear.bias, s.bias)
        self.noise, self.hard, self.temperature, self.forced = s.noise, s.hard, s.temperature, s.forced

    def forward(self, embedding: Tensor, state: Tensor, uniform: Tensor | None) -> Mixed:
        """Embeddings and states (…, D); `uniform` (…,) draws the gate, None decides it: open where that is the likelier."""
        state = state.to(self.projection.weight.dtype)
        logit = self.gate_linear(state)[..., 0].float()
        g = self.value(logit, uniform)
        mixed = torch.lerp(embedding, self.projection(state).to(embedding.dtype), g[..., None].to(embedding.dtype))
        return Mixed(mixed, g, logit)

    def without(self, embedding: Tensor, mixed: Mixed) -> Tensor:
        """The part of what is read that is the token's: (1 − g) · embedding."""
        return (1 - mixed.gate[..., None]).to(embedding.dtype) * embedding

    def value(self, logit: Tensor, uniform: Tensor | None) -> Tensor:
        """The gate (…,) of its logits."""
        if self.forced:
            return torch.full_like(logit, float(self.forced == "open"))
        if uniform is None:
            return torch.where(logit.isnan(), logit, (open_probability(logit, self.noise) > 0.5).float())
        return gumbel_sigmoid(logit, noise_of(uniform, self.noise), self.temperature, self.hard)


class Lambda(nn.Module):
    """HRPO's Λ, in float32: a fully open r gives a = sigmoid(Λ)^c, drawn between r_min and r_max."""

    def __init__(self, width: int, r_min: float, r_max: float):
        super().__init__()
        a_max = torch.empty(width).uniform_(max(r_min, 1e-6), min(r_max, 1 - 1e-6))
        self.Lambda = nn.Parameter(-torch.log(a_max.pow(-1 / C) - 1))

    def forward(self, r: Tensor) -> Tensor:
        """a = exp(−c · softplus(−Λ) · r)."""
        return torch.exp(-C * F.softplus(-self.Lambda.float()) * r)


class ResidualGate(Gate):
    """HRPO: x = a ⊙ embedding + sqrt(1 − a²) ⊙ (i ⊙ s), s the probability-weighted embedding of the step before."""

    def __init__(self, width: int, s: GatedSettings, spread: float = 0.02):
        super().__init__()
        self.thinking_residual_gate_r, self.thinking_residual_gate_i = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.thinking_residual_gate_r, self.thinking_residual_gate_i):
            nn.init.normal_(linear.weight, std=spread)
            nn.init.zeros_(linear.bias)
        self.thinking_residual_Lambda = Lambda(width, s.r_min, s.r_max)
        self.forced = s.forced

    def shares(self, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(mixed, a), both (…, D)."""
        r, i = (torch.sigmoid(gate(embedding).float()) for gate in (self.thinking_residual_gate_r, self.thinking_residual_gate_i))
        a = self.thinking_residual_Lambda(r)
        x = a * embedding + torch.sqrt(1 - a.pow(2) + 1e-8) * (i * state)
        return x.to(embedding.dtype), a

    def forward(self, embedding: Tensor, state: Tensor, uniform: Tensor | None = None) -> Mixed:
        """As `SparseGate.forward`; `gate` is the mean over D of sqrt(1 − a²). There is no noise."""
        x, a = self.shares(embedding, state)
        gate = torch.sqrt((1 - a.pow(2)).clamp(min=0)).mean(-1)
        if self.forced == "closed":
            x, gate = embedding, torch.zeros_like(gate)
        return Mixed(x, gate, torch.full_like(gate, math.nan))

    def without(self, embedding: Tensor, mixed: Mixed) -> Tensor:
        """The part of what is read that is the token's: a ⊙ embedding."""
        return (self.shares(embedding, torch.zeros_like(embedding))[1] * embedding).to(embedding.dtype)


def residual(logits: Tensor, table: Tensor, temperature: float, topk: int) -> Tensor:
    """HRPO's s (R, D): embeddings weighted by the softmax over the `topk` best of `logits` (R, V), over that softmax's 2-norm."""
    values, ids = (logits.float() / temperature).topk(min(topk, logits.shape[-1]), -1)
    p = values.softmax(-1)
    return F.embedding_bag(ids, table.detach(), per_sample_weights=(p / p.norm(dim=-1, keepdim=True)).to(table.dtype), mode="sum")
