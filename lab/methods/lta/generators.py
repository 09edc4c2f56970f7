"""Modules that make thoughts from what an assistant reads: a trainable block, a frozen assistant, a static prompt.

Each takes the assistant's ids and returns projected vectors only where they are asked for (`lta.md` 2.7, 8).
Axes: R rows, L assistant columns, q places asked for, n thoughts, K sets, D width of the base, d width of the assistant, F inner width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ThoughtBlock(nn.Module):
    """One post-norm transformer block without positions and without causal mask; weights under the official names, in float32."""

    def __init__(self, width: int, inner: int, eps: float = 1e-6):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 1, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, valid: Tensor, at: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Outputs (R, q, D) at columns `at` (R, q) of inputs (R, L, D); all columns where `at` is None.

        Args:
            valid: (R, L) bool, padding is never seen.
            seen: (R, q, L) bool, what each place may see beside that; None = everything.
        """
        x = x.float()
        query = x if at is None else x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
        mask = valid[:, None] if seen is None else valid[:, None] & seen
        h = self.norm1(query + self._attend(query, x, mask))
        return self.norm2(h + self.linear2(F.relu(self.linear1(h))))

    def _attend(self, query: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        weight, bias, width = self.self_attn.in_proj_weight, self.self_attn.in_proj_bias, x.shape[-1]
        q = F.linear(query, weight[:width], bias[:width])
        k, v = F.linear(x, weight[width:], bias[width:]).split(width, -1)
        return self.self_attn.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, q.shape[1], -1)))


class BlockGenerator(nn.Module):
    """LTA's default: the block on the base's own token embeddings, then a linear projection."""

    def __init__(self, width: int, inner: int, eps: float = 1e-6):
        super().__init__()
        self.block, self.projection = ThoughtBlock(width, inner, eps), nn.Linear(width, width)

    def forward(self, embeds: Tensor, valid: Tensor, at: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Projected vectors (R, q, D) at columns `at` of what the assistant reads, given as frozen embeddings (R, L, D)."""
        return self.projection(self.block(embeds.detach(), valid, at, seen))


class AssistantGenerator(nn.Module):
    """SoftCoT: a linear projection of a frozen assistant's last hidden states (which are computed outside and may be cached)."""

    def __init__(self, assistant_width: int, width: int):
        super().__init__()
        self.projection = nn.Linear(assistant_width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(…, d) -> (…, D)."""
        return self.projection(states.float())


class StaticGenerator(nn.Module):
    """A learned soft prompt, the same for every question: the control that has no information about it."""

    def __init__(self, thoughts: int, width: int, std: float):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(thoughts, width) * std)

    def forward(self, rows: int) -> Tensor:
        """(R, n, D)."""
        return self.prompt.expand(rows, -1, -1)
