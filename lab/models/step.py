"""What a step of any decoder takes and returns. Axes: R rows, t query columns, D width."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

Gate = Tensor | None
Patch = Callable[[Tensor, int], Tensor]


class Dropout(Protocol):
    """Stochastic masks from outside (Monte Carlo dropout): returns `x` (R, t, D) with the masks of `site` applied."""

    def __call__(self, x: Tensor, site: str, layer: int) -> Tensor: ...


@dataclass
class Out:
    """What a step returns: `last` (R, t, D) after the final norm; `taps` {layer: (R, t, D)}, 0 = block input, k = after block k."""

    last: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper (its linears stay wrapped), or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
