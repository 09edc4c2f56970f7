"""The decoder step of any transformers architecture, through the model's own forward and cache.

Slower than `Decoder` and with the same results: masks and positions are explicit, so padding and ragged rows stay exact.
Slot depths and adapters need a look inside the layers and are refused; dropout masks go into the modules of GPT-2 and Llama shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lab.errors import SettingsError
from lab.models.cache import BLOCKED
from lab.models.step import Out, unwrap


class HFKV:
    """A growing transformers cache with the positions and validity of its slots; the interface of `GrowKV` and `SlotKV`."""

    def __init__(self, cache, valid: Tensor | None = None, pos: Tensor | None = None):
        self.cache, self.valid, self.pos = cache, valid, pos

    @property
    def columns(self) -> int:
        return 0 if self.valid is None else self.valid.shape[1]

    def add(self, pos: Tensor, valid: Tensor) -> None:
        self.pos = pos if self.pos is None else torch.cat((self.pos, pos), 1)
        self.valid = valid if self.valid is None else torch.cat((self.valid, valid), 1)

    def plain(self) -> bool:
        """Whether the columns are ordinary text, so that the model needs no mask from us."""
        return bool(self.valid.all()) and bool((self.pos[:, 1:] > self.pos[:, :-1]).all())

    def select(self, rows: Tensor) -> "HFKV":
        """The cache of the given rows, repeats allowed."""
        return self._with(lambda x: x.index_select(0, rows))

    def fork(self) -> "HFKV":
        """A second cache that continues from the same slots."""
        return self._with(lambda x: x)

    def fan_out(self, n: int, room: int, share: bool = True) -> "HFKV":
        """Each row n times; the model's own cache cannot share a prompt, so it is repeated."""
        return self.select(torch.arange(len(self.valid), device=self.valid.device).repeat_interleave(n))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "HFKV":
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(change(layer.keys), change(layer.values), index)
        return HFKV(cache, change(self.valid), change(self.pos))


class HFDecoder:
    """Steps through `model.base_model(inputs_embeds=…)` with explicit masks; see `lab.models.decoder.Decoder`."""

    def __init__(self, model: nn.Module, lora=None):
        self.model = unwrap(model)
        self.config = self.model.config
        if lora is not None:
            raise SettingsError(f"Gated adapters need one of the architectures lab steps through itself, not {self.config.model_type!r}.")
        kinds = getattr(self.config, "layer_types", None)
        if kinds and set(kinds) != {"full_attention"}:
            raise SettingsError(f"{self.config.model_type!r} mixes attention types; lab feeds thoughts back through full attention only.")
        self.window = None if kinds else getattr(self.config, "sliding_window", None)  # of every layer (Mistral)
        self.table, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self.sites = dropout_sites(self.model.base_model)

    def __call__(
        self, x: Tensor, pos: Tensor, kv: HFKV, *, valid=None, depth=0, lora_gate=None, dropout=None, taps=(), patch=None, tail=False
    ):
        deep = patch is not None or lora_gate not in (None, False) or not (isinstance(depth, int) and depth == 0)
        if deep or (dropout is not None and not self.sites):
            raise SettingsError(f"Dropout masks, slot depths, adapters and patches are not available for {self.config.model_type!r}.")
        kv.add(pos, torch.ones_like(pos, dtype=torch.bool) if valid is None else valid.bool())
        mask = None if kv.plain() else self._mask(x, pos, kv)
        with self._masked(dropout):
            out = self.model.base_model(
                inputs_embeds=x,
                position_ids=pos,
                attention_mask=mask,
                past_key_values=kv.cache,
                use_cache=True,
                output_hidden_states=bool(taps),
            )
        last = out.last_hidden_state[:, -1:] if tail else out.last_hidden_state
        return Out(last, {tap: out.hidden_states[tap] for tap in taps})

    @contextmanager
    def _masked(self, dropout: Callable | None) -> Iterator[None]:
        """Inside, the outputs of all dropout sites go through `dropout` (x, site, layer)."""
        own = {} if dropout is None else self.sites
        hooks = [module.register_forward_hook(lambda module, args, out, at=at: dropout(out, *at)) for at, module in own.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mask(self, x: Tensor, pos: Tensor, kv: HFKV) -> Tensor:
        visible = (kv.pos[:, None] <= pos[:, :, None]) & kv.valid[:, None]
        if self.window is not None:
            visible &= kv.pos[:, None] > pos[:, :, None] - self.window
        return torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill_(~visible, BLOCKED)[:, None]

    def embed(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def logits(self, h: Tensor) -> Tensor:
        return self.head(h)

    def grow(self) -> HFKV:
        from transformers import DynamicCache

        return HFKV(DynamicCache())

    def slots(self, rows: int, capacity: int) -> HFKV:
        return self.grow()


def dropout_sites(body: nn.Module) -> dict[tuple[str, int], nn.Module]:
    """The modules behind whose outputs a dropout mask belongs, by site and layer as `Decoder` names them; {} for other shapes."""
    layers, names = getattr(body, "h", ()), {"attention": "attn.resid_dropout", "mlp": "mlp.dropout"}
    if not layers:
        layers, names = getattr(body, "layers", ()), {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
    try:
        found = {(site, i): layer.get_submodule(name) for i, layer in enumerate(layers) for site, name in names.items()}
    except AttributeError:  # modules of other names
        return {}
    return found | ({("embedding", -1): body.drop} if found and hasattr(body, "drop") else {})
