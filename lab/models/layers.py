"""The layers of a model as plain calls over its own weights: nothing is copied, and what is wrapped or unusual is called itself.

Axes: R rows, t query columns, D width, H heads.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab.models.step import Gate


class Rope:
    """Rotary tables of the model's own rotary module, computed once and looked up by position."""

    def __init__(self, module: nn.Module):
        self.module, self.cos, self.sin = module, None, None

    def __call__(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (R, 1, t, head) of positions (R, t)."""
        if self.cos is None or self.cos.device != pos.device:
            self._fill(pos.device, self.module.config.max_position_embeddings if pos.is_cuda else 512)
        if not pos.is_cuda and pos.numel() and int(pos.max()) >= len(self.cos):
            self._fill(pos.device, 1 << int(pos.max()).bit_length())
        return self.cos[pos].unsqueeze(1), self.sin[pos].unsqueeze(1)

    def _fill(self, device: torch.device, length: int) -> None:
        with torch.no_grad():
            cos, sin = self.module(torch.empty(1, device=device), torch.arange(length, device=device)[None])
        self.cos, self.sin = cos[0], sin[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `x` (R, H, t, head) in the half-split convention of Llama."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


def affine(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The fastest exact call of a linear: raw weights for plain linears, the module itself for wrapped ones.

    They are looked up at each call, here and in `norm`: sharded training exchanges a module's parameters.
    """
    if type(module) is nn.Linear:
        return partial(_linear, module._parameters)
    if type(module).__name__ == "Conv1D" and not hasattr(module, "base_layer"):
        return partial(_conv1d, module._parameters)
    return module


def lookup(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The fastest exact call of an embedding: its raw weights where it is a plain table, the module itself otherwise."""
    plain = type(module) is nn.Embedding and module.max_norm is None and module.padding_idx is None
    own = module._parameters
    return (lambda ids: torch.embedding(own["weight"], ids)) if plain else module


def _linear(own: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, own["weight"], own["bias"])


def _conv1d(own: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, own["weight"].t(), own["bias"])


def norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer or RMS norm over raw weights; RMS in float32 as the models compute it."""
    if type(module) is nn.LayerNorm:
        return partial(_layer_norm, module._parameters, module.normalized_shape, module.eps)
    if type(module).__name__.endswith("RMSNorm"):
        return partial(_rms, module._parameters, module.variance_epsilon)
    return module


def _layer_norm(own: dict[str, Tensor], shape: tuple[int, ...], eps: float, x: Tensor) -> Tensor:
    return torch.layer_norm(x, shape, own["weight"], own["bias"], eps)


def _rms(own: dict[str, Tensor], eps: float, x: Tensor) -> Tensor:
    weight = own["weight"]
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def activation(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """One fused call for the usual activations, the model's own module for the rest."""
    fused = {"silu": F.silu, "gelu_new": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}
    return fused.get(name, module)


def gated(base: Callable, adapter: nn.Module) -> Callable[[Tensor, Gate], Tensor]:
    """`base(x) + gate · adapter(x)`, the adapter not computed at all while the gate is None."""
    return lambda x, gate: base(x) if gate is None else base(x) + gate * adapter(x)


def ungated(base: Callable) -> Callable[[Tensor, Gate], Tensor]:
    return lambda x, gate: base(x)
