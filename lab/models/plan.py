"""How large a model will be, told from its configuration alone: nothing is downloaded, no weight is made (meta device).

Shapes of the published backbones of our recipes are built in, so that a dry run works on a machine that has never seen them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab.errors import CheckpointError, SettingsError, closest
from lab.models.backbones import BackboneSettings, causal_class, load_config, refuse_overrides
from lab.models.latent_model import LatentModel, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_QWEN3 = dict(arch="qwen3", vocab_size=151936, head_dim=128, kv_heads=8)
_QWEN2 = dict(arch="qwen2", vocab_size=151936)
_LLAMA3 = dict(arch="llama", vocab_size=128256, intermediate=8192, heads=32, kv_heads=8)
_GPT2 = dict(arch="gpt2", vocab_size=50257, max_positions=1024)

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3 | dict(layers=28, hidden=1024, intermediate=3072, heads=16),
    "qwen3-1.7b": _QWEN3 | dict(layers=28, hidden=2048, intermediate=6144, heads=16),
    "qwen3-4b": _QWEN3 | dict(layers=36, hidden=2560, intermediate=9728, heads=32),
    "qwen3-8b": _QWEN3 | dict(layers=36, hidden=4096, intermediate=12288, heads=32, tied=False),
    "qwen2.5-0.5b": _QWEN2 | dict(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2),
    "qwen2.5-1.5b": _QWEN2 | dict(layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2),
    "qwen2.5-3b": _QWEN2 | dict(layers=36, hidden=2048, intermediate=11008, heads=16, kv_heads=2),
    "qwen2.5-7b": _QWEN2 | dict(layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, tied=False, vocab_size=152064),
    "llama-3.2-1b": _LLAMA3 | dict(layers=16, hidden=2048),
    "llama-3.2-3b": _LLAMA3 | dict(layers=28, hidden=3072, heads=24),
    "llama-3.1-8b": _LLAMA3 | dict(layers=32, hidden=4096, intermediate=14336, tied=False),
    "gpt2": _GPT2 | dict(layers=12, hidden=768, intermediate=3072, heads=12),
    "gpt2-medium": _GPT2 | dict(layers=24, hidden=1024, intermediate=4096, heads=16),
    "gpt2-large": _GPT2 | dict(layers=36, hidden=1280, intermediate=5120, heads=20),
    "gpt2-xl": _GPT2 | dict(layers=48, hidden=1600, intermediate=6400, heads=25),
}


def planned_model(config: "PreTrainedConfig", method: str, settings: Mapping[str, Any]) -> LatentModel:
    """A model of the meta device: every shape, no numbers."""
    with torch.device("meta"):
        return model_class(method).build(causal_class(config)(config), None, settings)


def planned_config(name: str, *, pruned: int = 0, **size_overrides: Any) -> "PreTrainedConfig":
    """The configuration of a backbone with `pruned` layers fewer: a toy's, a built-in shape, a folder's, or one in the local hub cache."""
    config = _config(name, size_overrides)
    if not 0 <= pruned < config.num_hidden_layers:
        raise SettingsError(f"Cannot drop {pruned} of the {config.num_hidden_layers} layers of {name!r}.")
    config.num_hidden_layers -= pruned
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def _config(name: str, size_overrides: dict[str, Any]) -> "PreTrainedConfig":
    if name.startswith("toy:") or Path(name).is_dir():
        return load_config(name, **size_overrides)
    refuse_overrides(name, size_overrides)
    short = name.rpartition("/")[2].lower().removesuffix("-base").removesuffix("-instruct")
    if short in PUBLISHED:
        return BackboneSettings.check(**PUBLISHED[short]).config()
    try:
        return load_config(name, local_files_only=True)
    except CheckpointError:
        near = closest(short, PUBLISHED)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SettingsError(f"The shape of {name!r} is not known here.{hint} Built in: {', '.join(PUBLISHED)}; or give a folder.") from None
