"""The reference model behind oracle decisions: its greedy next token, for whole batches at once and step by step."""

import torch
from torch import Tensor

from lab.models.decoder import decoder_for
from lab.models.vocab import best_tokens


class Reference:
    """A model that says which token it would have chosen; it must share the tokenizer of the model it judges."""

    def __init__(self, backbone):
        self.backbone = backbone.eval()
        self.decoder = decoder_for(backbone)
        self.kv = self.wanted = None

    @property
    def head(self) -> Tensor:
        """The vocabulary head (V, D)."""
        return self.backbone.get_output_embeddings().weight

    @torch.no_grad()
    def tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) greedy next token at every position, from one pass over rows padded on either side."""
        valid = None if attention_mask is None else attention_mask.bool()
        h = self._read(self.decoder.grow(), input_ids, valid)
        return best_tokens(h.flatten(0, 1), self.head).view_as(input_ids)

    @torch.no_grad()
    def start(self, input_ids: Tensor, valid: Tensor | None, copies: int = 1, room: int = 64) -> Tensor:
        """`tokens` of the prompts (Q, P), which are kept, `copies` times each, for `step`."""
        self.kv, self.wanted = self.decoder.slots(len(input_ids), input_ids.shape[1] + room), None
        found = best_tokens(self._read(self.kv, input_ids, valid).flatten(0, 1), self.head).view_as(input_ids)
        self.kv = self.kv.fan_out(copies, room, share=False) if copies > 1 else self.kv
        return found

    @torch.no_grad()
    def step(self, token: Tensor, pos: Tensor, ready: Tensor) -> None:
        """Reads `token` (R,) at `pos` (R,) in the rows `ready` (R,); `wanted` (R,) then holds each row's present answer."""
        valid = None if bool(ready.all()) else ready[:, None]
        h = self.decoder(self.decoder.embed(token)[:, None], pos[:, None], self.kv, valid=valid).last[:, 0]
        fresh = best_tokens(h, self.head)
        self.wanted = fresh if self.wanted is None else torch.where(ready, fresh, self.wanted)

    def select(self, rows: Tensor) -> None:
        """Only these rows stay."""
        self.kv, self.wanted = self.kv.select(rows), None if self.wanted is None else self.wanted[rows]

    def _read(self, kv, ids: Tensor, valid: Tensor | None) -> Tensor:
        pos = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        return self.decoder(self.decoder.embed(ids), pos, kv, valid=None if valid is None or bool(valid.all()) else valid).last
