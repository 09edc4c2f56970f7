"""A backbone's configuration from the shapes of its weights, for files that bring none; what shapes cannot tell is asked for."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.errors import CheckpointError, SettingsError
from lab.models.backbones import BackboneSettings, load_config, new_backbone
from lab.models.loading import State, load_exact

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shapes = Mapping[str, tuple[int, ...]]
BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.rotary_emb.inv_freq")


def architecture(shapes: Shapes) -> str:
    """gpt2, llama, qwen2 or qwen3, by the names of the weights; "" for anything else."""
    if "transformer.wte.weight" in shapes and "transformer.h.0.attn.c_attn.weight" in shapes:
        return "gpt2"
    if "model.embed_tokens.weight" not in shapes or "model.layers.0.self_attn.q_proj.weight" not in shapes:
        return ""
    if "model.layers.0.self_attn.q_norm.weight" in shapes:
        return "qwen3"
    return "qwen2" if "model.layers.0.self_attn.q_proj.bias" in shapes else "llama"


def config_for(shapes: Shapes, *, backbone: str = "", config: Any = None, heads: int = 0, what: str = "The file") -> "PreTrainedConfig":
    """The configuration of weights with these names and shapes; its vocabulary is that of the weights.

    Args:
        backbone: name or folder of the model they were trained from. config: or its configuration itself.
        heads: number of attention heads; for GPT-2 the one thing missing, and then only where the width is no multiple of 64.

    Raises:
        SettingsError: where something is needed that shapes do not say.
    """
    arch = architecture(shapes)
    table = shapes.get("transformer.wte.weight") or shapes.get("model.embed_tokens.weight")
    if table is None:
        raise CheckpointError(f"{what} holds no embedding table of a GPT-2, Llama or Qwen model.")
    if config is None and backbone:
        config = load_config(backbone)
    if config is None and arch == "gpt2":
        config = _gpt2(shapes, heads, what)
    if config is None:
        raise SettingsError(
            f"{what} does not say its rotary settings and heads; pass backbone='…', the name or folder of the model it was trained from."
        )
    config.vocab_size = table[0]
    return config


def _gpt2(shapes: Shapes, heads: int, what: str) -> "PreTrainedConfig":
    rows, width = shapes["transformer.wte.weight"]
    if not heads and width % 64:
        raise SettingsError(f"{what} has width {width}, so its number of heads cannot be guessed; pass heads=….")
    layers = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"transformer\.h\.(\d+)\.", key)))
    return BackboneSettings.check(
        arch="gpt2",
        vocab_size=rows,
        layers=layers,
        hidden=width,
        intermediate=shapes["transformer.h.0.mlp.c_fc.weight"][1],
        heads=heads or width // 64,
        max_positions=shapes["transformer.wpe.weight"][0],
        dropout=0.1,
    ).config()


def filled(config: "PreTrainedConfig", state: State, what: str) -> "PreTrainedModel":
    """A model of `config` with the weights of `state`, every one accounted for (old attention buffers may be left over)."""
    model = new_backbone(config)
    load_exact(model, state, what=what, allow_unexpected=BUFFERS)
    return model
