"""Low-rank adapters as a gate in the computation, not as modules that are switched on and off.

A row of a batch may read with the adapter and its neighbour without it, in the same call; no parameter's
`requires_grad` changes on the way (peft flips it at each toggle). Files are exchanged in peft's layout.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_PEFT_NAMES = {name: f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in LINEARS}


class Adapter(nn.Module):
    """The low-rank pair of one linear: adds `scale · B(A(dropout(x)))`; A (r, in), B (out, r)."""

    def __init__(self, in_width: int, out_width: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_width))
        self.B = nn.Parameter(torch.zeros(out_width, rank))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out) in the type of `x`; computed in the adapter's own, which may be wider than the backbone's."""
        wide = x.to(self.A.dtype)
        if self.training and self.dropout:
            wide = F.dropout(wide, self.dropout)
        return (F.linear(F.linear(wide, self.A), self.B) * self.scale).to(x.dtype)


class GatedLora(nn.Module):
    """Adapters for linears of all layers of a Llama-shaped backbone, zero at the start (B = 0).

    Args:
        config: the backbone's configuration; gives the shapes.
        rank, alpha, dropout: as in peft; the scale is alpha / rank.
        targets: the linears that get one, of q, k, v, o, gate, up and down.
    """

    def __init__(self, config, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = LINEARS):
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        shapes = linear_shapes(config)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Adapter(*shapes[name], rank, alpha / rank, dropout) for name in targets})
            for _ in range(config.num_hidden_layers)
        )

    def peft_state(self) -> dict[str, Tensor]:
        """Weights under peft's file keys."""
        return {key: parameter.detach() for key, parameter in self._peft_items()}

    def load_peft_state(self, state: dict[str, Tensor]) -> None:
        """Fills the adapters from peft's file keys; raises CheckpointError where keys or shapes differ."""
        from lab.models.loading import check_state

        own = dict(self._peft_items())
        check_state({key: value.shape for key, value in own.items()}, state, what="LoRA adapter")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def _peft_items(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, layer in enumerate(self.layers):
            for name, adapter in layer.items():
                stem = f"base_model.model.model.layers.{index}.{_PEFT_NAMES[name]}"
                yield f"{stem}.lora_A.weight", adapter.A
                yield f"{stem}.lora_B.weight", adapter.B


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """(in, out) of each of the seven linears of a Llama-shaped layer."""
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q": (width, q),
        "k": (width, kv),
        "v": (width, kv),
        "o": (q, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }
