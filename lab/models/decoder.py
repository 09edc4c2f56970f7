"""One functional step over a backbone's weights: embeddings, positions and a cache in, hidden states out.

Every engine of `lab` thinks through this call. It reads the weights of a Hugging Face model where they are (nothing is
copied, adapters and training mode are respected) and leaves all knowledge of slots, masks and sharing to the cache, so
training with gradient, prefill and ragged decoding are the same few lines. GPT-2, Llama, Qwen2 and Qwen3 have their own
blocks; `decoder_for` gives any other architecture `HFDecoder` (hf_decoder.py), which calls the model's own forward.

Axes: R rows, t query columns, D width, H heads, S cache slots, V vocabulary.
"""

from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from lab.models.cache import GrowKV, Shape, SlotKV, Span
from lab.models.hf_decoder import HFDecoder
from lab.models.layers import Rope, activation, affine, gated, lookup, norm, rotate, ungated
from lab.models.lora import LINEARS, GatedLora
from lab.models.step import Dropout, Gate, Out, Patch, unwrap


@dataclass
class Pass:
    """What all blocks of one call share."""

    kv: GrowKV | SlotKV
    span: Span
    rope: tuple[Tensor, Tensor] | None
    gate: Gate
    dropout: Dropout | None
    training: bool
    tail: bool = False

    def queries(self, x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Span]:
        """What a block goes on with after its keys and values: all columns of `x` (R, t, D) and `q` (R, H, t, head), or the last one."""
        if not self.tail:
            return x, q, self.span
        bias = None if self.span.bias is None else self.span.bias[:, :, -1:]
        return x[:, -1:], q[:, :, -1:], replace(self.span, bias=bias, causal=False)

    def drop(self, x: Tensor, p: float, site: str, layer: int) -> Tensor:
        if self.dropout is not None:
            return self.dropout(x, site, layer)
        return F.dropout(x, p) if self.training and p else x


class Decoder:
    """Steps over the weights of a GPT-2, Llama, Qwen2 or Qwen3 model (peft-wrapped or not).

    Args:
        model: the causal language model; its `training` flag decides on dropout.
        lora: adapters that a call's `lora_gate` opens row by row (Llama-shaped backbones).
    """

    def __init__(self, model: nn.Module, lora: GatedLora | None = None):
        self.model, self.lora = unwrap(model), lora
        self.config = self.model.config
        family = FAMILIES[self.config.model_type]
        self.stem = family.stem(self.model)
        self.blocks = family.blocks(self.stem, self.config, lora)
        self.final_norm = norm(family.final_norm(self.stem))
        self.head = affine(self.model.get_output_embeddings())
        self.table = self.model.get_input_embeddings()
        self.look_up = lookup(self.table)
        self.enter, self.rope = family.enter(self.stem), Rope(self.stem.rotary_emb) if hasattr(self.stem, "rotary_emb") else None
        self.shape = Shape.of(self.config)

    def __call__(
        self,
        x: Tensor,
        pos: Tensor,
        kv: GrowKV | SlotKV,
        *,
        valid: Tensor | None = None,
        depth: Tensor | int = 0,
        lora_gate: Gate | bool = None,
        dropout: Dropout | None = None,
        taps: tuple[int, ...] = (),
        patch: Patch | None = None,
        tail: bool = False,
    ) -> Out:
        """Hidden states of `x` read after what `kv` holds; the new keys and values are written to it.

        Args:
            x: (R, t, D) input embeddings, without position embeddings.
            pos: (R, t) positions of the columns; pads may carry any value in range.
            valid: (R, t) bool, False where a column is padding (never attended); None = all real.
            depth: (R, t) or one number, the slot depth of duo-causal attention: a slot is visible iff it is valid,
                its position is not after the query's and its depth not above the query's.
            lora_gate: None or False = adapters off, True = on, (R, t, 1) = on per row and column.
            dropout: masks for Monte Carlo dropout; None = the model's own dropout, active in training mode only.
            taps: indices of hidden states to return beside the last (see `Out`).
            patch: makes of a hidden state (R, t, D) and its index the one to go on with; taps show what it made.
            tail: only the last column is asked for: the last block computes no other, and `last` is (R, 1, D). Not with `taps`,
                `patch`, `dropout` or a gate per column.
        """
        gate = None if lora_gate is None or lora_gate is False else x.new_ones(1) if lora_gate is True else lora_gate
        span = kv.open(pos, valid, depth)
        rope = self.rope(pos) if self.rope is not None else None
        call = Pass(kv, span, rope, gate, dropout, self.model.training)
        kept, depth = {}, len(self.blocks)
        for index in range(depth + 1):
            call.tail = tail and index == depth
            x = self.blocks[index - 1](x, call) if index else self.enter(x, pos, call)
            x = self.final_norm(x) if index == depth else x
            x = x if patch is None else patch(x, index)
            if index in taps:
                kept[index] = x
        kv.close(span)
        return Out(x, kept)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of `ids`, (…,) -> (…, D)."""
        return self.look_up(ids)

    def logits(self, h: Tensor) -> Tensor:
        """Vocabulary logits of hidden states after the final norm, (…, D) -> (…, V)."""
        return self.head(h)

    def grow(self) -> GrowKV:
        """An empty cache that keeps gradients."""
        return GrowKV(self.shape)

    def slots(self, rows: int, capacity: int) -> SlotKV:
        """An empty preallocated cache for inference, `capacity` columns a row to begin with."""
        weight = self.table.weight
        return SlotKV(self.shape, rows, capacity, weight.dtype, weight.device)


class GPT2Block:
    """A GPT-2 layer: layer norms before, fused query-key-value, residual dropout after both halves."""

    def __init__(self, layer: nn.Module, config, index: int, lora: GatedLora | None):
        attention, mlp = layer.attn, layer.mlp
        self.index, self.heads, self.head_dim = index, config.n_head, config.n_embd // config.n_head
        self.norm1, self.norm2 = norm(layer.ln_1), norm(layer.ln_2)
        self.qkv, self.out = affine(attention.c_attn), affine(attention.c_proj)
        self.up, self.down, self.act = affine(mlp.c_fc), affine(mlp.c_proj), activation(config.activation_function, mlp.act)
        self.p_attention, self.p_mlp, self.p_probs = attention.resid_dropout.p, mlp.dropout.p, config.attn_pdrop

    def __call__(self, x: Tensor, call: Pass) -> Tensor:
        rows, columns, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, columns, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        p = self.p_probs if call.training else 0.0
        x, q, span = call.queries(x, q)
        attended = call.kv.attend(self.index, q, k, v, span, p)
        x = x + call.drop(self.out(attended), self.p_attention, "attention", self.index)
        return x + call.drop(self.down(self.act(self.up(self.norm2(x)))), self.p_mlp, "mlp", self.index)


class LlamaBlock:
    """A Llama, Qwen2 or Qwen3 layer: RMS norms before, rotary positions, grouped keys and values, gated MLP."""

    def __init__(self, layer: nn.Module, config, index: int, lora: GatedLora | None):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head_dim = index, attention.head_dim
        self.norm1, self.norm2 = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        self.q_norm = norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        adapters = lora.layers[index] if lora is not None else {}
        for name in LINEARS:
            module = affine(getattr(attention if name in "qkvo" else mlp, f"{name}_proj"))
            setattr(self, name, gated(module, adapters[name]) if name in adapters else ungated(module))
        self.act = activation(config.hidden_act, mlp.act_fn)
        self.p_probs = config.attention_dropout

    def __call__(self, x: Tensor, call: Pass) -> Tensor:
        h, gate = self.norm1(x), call.gate
        q, k, v = (self._split(linear(h, gate)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), *call.rope), rotate(k.transpose(1, 2), *call.rope)
        p = self.p_probs if call.training else 0.0
        x, q, span = call.queries(x, q)
        attended = call.kv.attend(self.index, q, k, v.transpose(1, 2), span, p)
        x = x + call.drop(self.o(attended, gate), 0.0, "attention", self.index)
        h = self.norm2(x)
        inner = self.act(self.gate(h, gate)) * self.up(h, gate)
        return x + call.drop(self.down(inner, gate), 0.0, "mlp", self.index)

    def _split(self, y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], -1, self.head_dim)


class GPT2Family:
    @staticmethod
    def stem(model):
        return model.transformer

    @staticmethod
    def blocks(stem, config, lora):
        return [GPT2Block(layer, config, index, lora) for index, layer in enumerate(stem.h)]

    @staticmethod
    def final_norm(stem):
        return stem.ln_f

    @staticmethod
    def enter(stem):
        place = lookup(stem.wpe)
        return lambda x, pos, call: call.drop(x + place(pos), stem.drop.p, "embedding", -1)


class LlamaFamily:
    @staticmethod
    def stem(model):
        return model.model

    @staticmethod
    def blocks(stem, config, lora):
        return [LlamaBlock(layer, config, index, lora) for index, layer in enumerate(stem.layers)]

    @staticmethod
    def final_norm(stem):
        return stem.norm

    @staticmethod
    def enter(stem):
        return lambda x, pos, call: x


FAMILIES = {"gpt2": GPT2Family, "llama": LlamaFamily, "qwen2": LlamaFamily, "qwen3": LlamaFamily}


def supported(model: nn.Module) -> bool:
    """Whether `Decoder` computes this model exactly: known family, full attention, static rotary scaling, plain GPT-2 options."""
    config = unwrap(model).config
    if config.model_type not in FAMILIES:
        return False
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    plain = not (getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "add_cross_attention", False))
    return full and plain and getattr(config, "scale_attn_weights", True) and rope in ("default", "linear", "llama3", "yarn")


def decoder_for(model: nn.Module, lora: GatedLora | None = None):
    """The step to use for `model`: `Decoder` where it is exact, else `HFDecoder` over the model's own forward."""
    return Decoder(model, lora) if supported(model) else HFDecoder(model, lora)
