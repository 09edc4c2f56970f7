"""Keys and values of what a model has read, as slots that know their position, depth and validity.

`GrowKV` concatenates and keeps gradients (training). `SlotKV` is preallocated and may share one prompt among many rows
(inference). Both decide visibility the same way: a slot is visible to a query iff it is valid, its position is not after
the query's and its depth not above the query's (duo-causal attention; with all depths 0 the ordinary causal rule).

Axes: R rows, G groups of rows that share a prompt, t query columns, H heads, S slots, P prompt slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCKED = -1e30
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What a cache must know of a backbone."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config) -> "Shape":
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


@dataclass
class Span:
    """The columns a call adds, and what its queries see: `bias` (R or 1, 1, t, S) additive, or `causal`, or all slots."""

    start: int
    stop: int
    bias: Tensor | None = None
    causal: bool = False


def duo_causal(pos: Tensor, depth: Tensor, slot_pos: Tensor, slot_depth: Tensor) -> Tensor:
    """Visibility of slots to queries, broadcast over (R, t, S)."""
    return (slot_pos <= pos) & (slot_depth <= depth)


def bias_of(visible: Tensor) -> Tensor:
    """Additive float mask of a bool one; a query that sees nothing gets a uniform average instead of NaN."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, BLOCKED)


def attention(q: Tensor, k: Tensor, v: Tensor, span: Span, p: float = 0.0) -> Tensor:
    """Scaled dot-product attention with grouped heads: q (R, H, t, head), k and v (R, H_kv, S, head) -> (R, t, H·head).

    The query heads that share a key head are folded into the query axis where that is exact, so keys are never repeated.
    """
    rows, heads, columns, width = q.shape
    share = heads // k.shape[1]
    bias = None if span.bias is None else span.bias.to(q.dtype)
    if share > 1 and span.causal:
        k, v, share = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), 1
    if share > 1:
        q = q.reshape(rows, heads // share, share * columns, width)
        bias = bias if bias is None or columns == 1 else bias.repeat(1, 1, share, 1)
    if bias is None and columns == 1 and not p and _cheaper_by_hand(q, k):
        out = ((q * width**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=span.causal, dropout_p=p)
    return by_column(out, rows, columns, width)


def _cheaper_by_hand(q: Tensor, k: Tensor) -> bool:
    """Whether many narrow heads that read many slots on a CPU are attended faster by two products (by up to a third), and as exactly."""
    rows, heads, slots, width = k.shape
    exact = q.device.type == "cpu" and q.dtype == torch.float32  # a narrower type would round the weights
    return exact and not torch.is_grad_enabled() and width <= 32 and slots >= 64 and rows * heads >= 64


def by_column(out: Tensor, rows: int, columns: int, width: int) -> Tensor:
    """(R, t, H·head) of attention values whose queries stand in the order (R, H, t, head)."""
    if columns == 1:
        return out.reshape(rows, 1, -1)
    return out.reshape(rows, -1, columns, width).transpose(1, 2).reshape(rows, columns, -1)


class GrowKV:
    """A cache that grows by concatenation, so that gradients flow through everything read before."""

    def __init__(self, shape: Shape, rule: Rule = duo_causal):
        self.shape, self.rule = shape, rule
        self.keys: list[Tensor | None] = [None] * shape.layers
        self.values: list[Tensor | None] = [None] * shape.layers
        self.pos = self.depth = self.valid = None
        self.plain = True

    @property
    def columns(self) -> int:
        """Slots a row holds."""
        return 0 if self.pos is None else self.pos.shape[1]

    def open(self, pos: Tensor, valid: Tensor | None, depth: Tensor | int) -> Span:
        """Announces new columns; all later `attend` calls of this step use the span returned."""
        start, plain = self.columns, self.plain and valid is None and isinstance(depth, int) and depth == 0
        new_valid = torch.ones_like(pos, dtype=torch.bool) if valid is None else valid.bool()
        new_depth = torch.full_like(pos, depth) if isinstance(depth, int) else depth
        self.pos, self.depth, self.valid = (
            new if old is None else torch.cat((old, new), 1)
            for old, new in ((self.pos, pos), (self.depth, new_depth), (self.valid, new_valid))
        )
        self.plain = plain
        span = Span(start, self.columns)
        if plain and pos.shape[1] == 1:
            return span
        if plain and start == 0:
            return replace(span, causal=True)
        visible = self.rule(pos[:, :, None], new_depth[:, :, None], self.pos[:, None], self.depth[:, None]) & self.valid[:, None]
        return replace(span, bias=bias_of(visible)[:, None])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: Span, p: float = 0.0) -> Tensor:
        """Adds `k`, `v` (R, H_kv, t, head) of one layer and attends from `q` (R, H, t, head); (R, t, H·head)."""
        if span.start:
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        self.keys[layer], self.values[layer] = k, v
        return attention(q, k, v, span, p)

    def close(self, span: Span) -> None:
        """Ends a step."""

    def fork(self) -> "GrowKV":
        """A second cache that continues from the same slots; nothing is copied."""
        return self._with(lambda x: x)

    def select(self, rows: Tensor) -> "GrowKV":
        """A cache of the given rows (repeats allowed), differentiable."""
        return self._with(lambda x: x.index_select(0, rows))

    def hide(self, first: int, hidden: Tensor) -> None:
        """Makes slots of rows invisible: `hidden` (R, t) bool for the columns from `first` on."""
        valid = self.valid.clone()
        valid[:, first : first + hidden.shape[1]] &= ~hidden
        self.valid, self.plain = valid, False

    def _with(self, change: Callable[[Tensor], Tensor]) -> "GrowKV":
        other = GrowKV(self.shape, self.rule)
        other.keys, other.values = ([change(x) for x in side] for side in (self.keys, self.values))
        other.pos, other.depth, other.valid = (change(x) for x in (self.pos, self.depth, self.valid))
        other.plain = self.plain
        return other


@dataclass
class SharedPrompt:
    """A prompt read once for several rows: keys and values (G, H_kv, P, head) per layer, `bias` (G, 1, 1, P) or None.

    `table` (G, N) holds the rows of each group, padded by repeating a row; `home` (R,) is each row's place in the flat
    table; both are None while the groups are equally large and contiguous.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor | None
    group: Tensor
    table: Tensor | None = None
    home: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.keys[0].shape[0]

    def regroup(self, group: Tensor) -> "SharedPrompt":
        """The same prompts for other rows, `group` (R,) the prompt of each; prompts without rows are dropped."""
        used, group = torch.unique(group, return_inverse=True)
        keys, values, bias = self.keys, self.values, self.bias
        if len(used) < self.groups:
            keys, values = ([x.index_select(0, used) for x in side] for side in (keys, values))
            bias = None if bias is None else bias.index_select(0, used)
        counts = torch.bincount(group, minlength=len(used))
        if bool((counts == counts[0]).all()) and bool((group[1:] >= group[:-1]).all()):
            return SharedPrompt(keys, values, bias, group)
        order = torch.argsort(group, stable=True)
        place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
        widest = int(counts.max())
        table = order[(counts.cumsum(0) - counts)][:, None].repeat(1, widest)
        table[group[order], place] = order
        home = torch.empty_like(group)
        home[order] = group[order] * widest + place
        return SharedPrompt(keys, values, bias, group, table, home)

    def scores(self, layer: int, q: Tensor) -> Tensor:
        """(R, H_kv, m, P) scores of queries (R, H_kv, m, head) over the prompts."""
        scores = self._by_group(q) @ self.keys[layer].transpose(2, 3)
        return self._by_row(scores if self.bias is None else scores + self.bias.to(q.dtype), *q.shape[1:3])

    def read(self, layer: int, weights: Tensor) -> Tensor:
        """(R, H_kv, m, head) values of the prompts under attention weights (R, H_kv, m, P)."""
        return self._by_row(self._by_group(weights) @ self.values[layer], *weights.shape[1:3])

    def _by_group(self, x: Tensor) -> Tensor:
        """(G, H_kv, N·m, ·) of (R, H_kv, m, ·)."""
        heads, m, width = x.shape[1:]
        x = x.reshape(self.groups, -1, heads, m, width) if self.table is None else x[self.table]
        return x.transpose(1, 2).reshape(self.groups, heads, -1, width)

    def _by_row(self, x: Tensor, heads: int, m: int) -> Tensor:
        x = x.view(self.groups, heads, -1, m, x.shape[-1]).transpose(1, 2).reshape(-1, heads, m, x.shape[-1])
        return x if self.home is None else x.index_select(0, self.home)


class SlotKV:
    """A preallocated cache for inference; every call writes one common stretch of columns for all rows.

    Args:
        shape: the backbone's.
        rows: R.
        capacity: columns to allocate at first; doubled when full.
        dtype, device: of keys and values.
        rule: visibility; the default is duo-causal.
        shared: what the rows read before their own slots.
    """

    def __init__(
        self,
        shape: Shape,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        rule: Rule = duo_causal,
        shared: SharedPrompt | None = None,
    ):
        self.shape, self.rule, self.rows, self.columns, self.shared = shape, rule, rows, 0, shared
        capacity = max(1, capacity)
        size, turned = (rows, shape.kv_heads, capacity, shape.head_dim), (rows, shape.kv_heads, shape.head_dim, capacity)
        self.keys = [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.empty(size, dtype=dtype, device=device) for _ in range(shape.layers)]
        if shared is not None:  # few slots of its own: their products are cheaper with the slots side by side in memory
            self.values = [torch.empty(turned, dtype=dtype, device=device).transpose(2, 3) for _ in range(shape.layers)]
        self.pos, self.depth = (torch.zeros(rows, capacity, dtype=torch.long, device=device) for _ in range(2))
        self.blocked = torch.zeros(rows, capacity, device=device)
        self.plain = self.flat = True

    @property
    def capacity(self) -> int:
        return self.pos.shape[1]

    def open(self, pos: Tensor, valid: Tensor | None, depth: Tensor | int) -> Span:
        """Announces new columns; `plain` = no padding so far, `flat` = no depth so far."""
        start, stop = self.columns, self.columns + pos.shape[1]
        if stop > self.capacity:
            self._reserve(max(stop, 2 * self.capacity))
        shallow = isinstance(depth, int) and depth == 0
        self.plain, self.flat = self.plain and valid is None, self.flat and shallow
        self.pos.narrow(1, start, stop - start).copy_(pos)
        if not shallow:
            self.depth[:, start:stop] = depth
        if valid is not None:
            self.blocked[:, start:stop] = bias_of(valid.bool())
        self.columns = stop
        span = Span(start, stop)
        if self.flat and pos.shape[1] == 1:
            return span if self.plain else replace(span, bias=self.blocked[:, None, None, :stop])
        if self.flat and self.plain and start == 0 and self.shared is None:
            return replace(span, causal=True)
        slots = (self.pos[:, None, :stop], self.depth[:, None, :stop])
        visible = self.rule(pos[:, :, None], self.depth[:, start:stop, None], *slots)
        return replace(span, bias=torch.minimum(bias_of(visible), self.blocked[:, None, :stop])[:, None])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: Span, p: float = 0.0) -> Tensor:
        """Writes `k`, `v` (R, H_kv, t, head) of one layer and attends from `q` (R, H, t, head); (R, t, H·head)."""
        keys, values = self.keys[layer].narrow(2, 0, span.stop), self.values[layer].narrow(2, 0, span.stop)
        new = span.stop - span.start
        keys.narrow(2, span.start, new).copy_(k)
        values.narrow(2, span.start, new).copy_(v)
        if self.shared is None:
            return attention(q, keys, values, span, p)
        return self._attend_both(layer, q, keys, values, span)

    def close(self, span: Span) -> None:
        """Ends a step."""

    def fan_out(self, n: int, room: int, share: bool = True) -> "SlotKV":
        """The cache of R·n rows, each prompt followed by n samples that start from it.

        Args:
            n: samples a row.
            room: columns to allocate for what the samples will add.
            share: keep one copy of the prompt for its n samples; otherwise each gets its own.
        """
        group = torch.arange(self.rows, device=self.pos.device).repeat_interleave(n)
        if not share or n == 1 or self.shared is not None:
            return self._selected(group, self.columns + room)
        stop = self.columns
        bias = None if self.plain else self.blocked[:, None, None, :stop].clone()
        keys, values = ([x[:, :, :stop].contiguous() for x in side] for side in (self.keys, self.values))
        return self._empty(self.rows * n, room, SharedPrompt(keys, values, bias, group))

    def select(self, rows: Tensor) -> "SlotKV":
        """The cache of the given rows: compaction, reordering and repeating (beams) are the same call."""
        return self._selected(rows, self.capacity)

    def hide(self, first: int, hidden: Tensor) -> None:
        """Makes slots of rows invisible: `hidden` (R, t) bool for the columns from `first` on."""
        self.blocked[:, first : first + hidden.shape[1]].masked_fill_(hidden, BLOCKED)
        self.plain = False

    def _selected(self, rows: Tensor, capacity: int) -> "SlotKV":
        return self._taking(rows, capacity, None if self.shared is None else self.shared.regroup(self.shared.group[rows]))

    def _attend_both(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        rows, heads, columns, width = q.shape
        share = heads // keys.shape[1]
        q = q.reshape(rows, heads // share, share * columns, width)
        bias = span.bias if span.bias is None or columns == 1 else span.bias.repeat(1, 1, share, 1)
        q = q * width**-0.5
        mine = q @ keys.transpose(2, 3)
        scores = (self.shared.scores(layer, q), mine if bias is None else mine + bias.to(q.dtype))
        weights = torch.cat(scores, -1).softmax(-1, torch.float32).to(q.dtype)
        prompt = scores[0].shape[-1]
        out = self.shared.read(layer, weights[..., :prompt]) + weights[..., prompt:] @ values
        return by_column(out, rows, columns, width)

    def _empty(self, rows: int, capacity: int, shared: SharedPrompt | None) -> "SlotKV":
        return SlotKV(self.shape, rows, capacity, self.keys[0].dtype, self.pos.device, self.rule, shared)

    def _taking(self, rows: Tensor, capacity: int, shared: SharedPrompt | None) -> "SlotKV":
        stop = self.columns
        other = self._empty(len(rows), max(capacity, stop), shared)
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            theirs[:, :, :stop] = mine[:, :, :stop].index_select(0, rows)
        for mine, theirs in ((self.pos, other.pos), (self.depth, other.depth), (self.blocked, other.blocked)):
            theirs[:, :stop] = mine[:, :stop].index_select(0, rows)
        other.columns, other.plain, other.flat = stop, self.plain, self.flat
        return other

    def _reserve(self, capacity: int) -> None:
        grown = self._taking(torch.arange(self.rows, device=self.pos.device), capacity, self.shared)
        self.keys, self.values, self.pos, self.depth, self.blocked = grown.keys, grown.values, grown.pos, grown.depth, grown.blocked
