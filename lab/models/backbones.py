"""Backbones: a hub id, a local folder, or a toy preset `toy:<arch>[-<size>]` that needs no download.

Toys are ordinary transformers models (GPT-2, Llama, Qwen2, Qwen3) of ten thousand to a few million parameters, built from a seed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from lab.config import Settings
from lab.errors import CheckpointError, DeviceError, SettingsError, unknown
from lab.hub import local_only

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHS = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}

SIZES: dict[str, dict[str, Any]] = {
    "micro": dict(layers=1, hidden=32, intermediate=64, heads=2, kv_heads=1, vocab_size=64),
    "tiny": dict(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab_size=256),
    "small": dict(layers=4, hidden=128, intermediate=256, heads=4, kv_heads=2, vocab_size=1024),
    "mid": dict(layers=6, hidden=384, intermediate=1024, heads=6, kv_heads=2, vocab_size=32000, max_positions=1024),
}
ARCH_SIZES: dict[tuple[str, str], dict[str, Any]] = {("gpt2", "mid"): dict(intermediate=1536, vocab_size=50257)}


class BackboneSettings(Settings):
    """Shape of a decoder-only model in one vocabulary for the four architectures."""

    arch: Literal["gpt2", "llama", "qwen2", "qwen3"]
    vocab_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int | None = None  # None = heads; GPT-2 has no grouped heads
    head_dim: int | None = None  # None = hidden / heads; free only for Llama and Qwen3
    tied: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)  # GPT-2: residual, embedding and attention; others: attention
    initializer_range: float = Field(0.02, gt=0)
    max_positions: int = Field(512, gt=0)
    rope_theta: float = 10_000.0
    norm_eps: float | None = None  # None = the architecture's own
    extra: dict[str, Any] = {}  # further config values under their transformers names, e.g. {"attn_pdrop": 0.0}

    @model_validator(mode="after")
    def _consistent(self) -> "BackboneSettings":
        if (self.head_dim is None or self.arch == "llama") and self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} is not a multiple of heads = {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}")
        if self.arch == "gpt2" and (self.kv_heads or self.heads) != self.heads:
            raise ValueError("GPT-2 has as many key/value heads as heads; leave kv_heads out")
        if self.arch in ("gpt2", "qwen2") and self.head_dim not in (None, self.hidden // self.heads):
            raise ValueError(f"{self.arch} has head_dim = hidden / heads; leave head_dim out")
        return self

    def config(self) -> "PreTrainedConfig":
        """The transformers config of this shape; no special token ids, since those belong to a tokenizer."""
        return _class(self.arch, "Config")(**(_gpt2_values(self) if self.arch == "gpt2" else _rope_values(self)))


def toy_settings(name: str, **overrides: Any) -> BackboneSettings:
    """Settings of `toy:<arch>[-<size>]` (size `tiny` when absent) with explicit `overrides`; SettingsError on an unknown name."""
    arch, _, size = name.removeprefix("toy:").partition("-")
    size = size or "tiny"
    if arch not in ARCHS:
        raise unknown("toy architecture", arch, ARCHS)
    if size not in SIZES:
        raise unknown("toy size", size, SIZES)
    values = {**SIZES[size], **ARCH_SIZES.get((arch, size), {}), "arch": arch}
    if arch == "gpt2":
        values.pop("kv_heads")
    if "heads" in overrides and "kv_heads" not in overrides:
        values.pop("kv_heads", None)
    return BackboneSettings.check(**{**values, **overrides})


def load_backbone(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    vocab_size: int | None = None,
    **size_overrides: Any,
) -> "PreTrainedModel":
    """A causal language model in eval mode, with sdpa attention.

    Args:
        name: hub id, local folder, or `toy:<arch>[-<size>]` with arch gpt2|llama|qwen2|qwen3 and a size of `SIZES`.
        dtype: float32, bfloat16, float16, or auto (as saved; float32 for toys).
        seed: of a toy's random weights; the global generator is left alone.
        vocab_size, size_overrides: fields of `BackboneSettings`, for toys only.

    Raises:
        SettingsError: unknown name, size or setting. DeviceError: a device that is not there.
        CheckpointError: files that cannot be read; missing, unexpected or mis-shaped weights.
    """
    if dtype not in (*DTYPES, "auto"):
        raise unknown("dtype", dtype, (*DTYPES, "auto"))
    target = check_device(device)
    overrides = size_overrides | ({} if vocab_size is None else {"vocab_size": vocab_size})
    if name.startswith("toy:"):
        model = new_backbone(toy_settings(name, **overrides).config(), seed)
        return model.to(device=target, dtype=DTYPES.get(dtype, torch.float32))
    refuse_overrides(name, overrides)
    return load_pretrained(name, dtype).to(target)


def new_backbone(config: "PreTrainedConfig", seed: int = 0) -> "PreTrainedModel":
    """A float32 model of `config` with random weights drawn from `seed`, in eval mode."""
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return causal_class(config)(config).eval()


def load_pretrained(name: str, dtype: str = "auto") -> "PreTrainedModel":
    """The model of a folder or hub id with every weight accounted for; CheckpointError otherwise."""
    from lab.models.loading import check_complete

    config = load_config(name)
    options = dict(config=config, dtype=DTYPES.get(dtype, "auto"), attn_implementation="sdpa", trust_remote_code=False)
    options["local_files_only"] = local_only(name)
    try:
        with quiet():
            model, report = causal_class(config).from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except Exception as error:  # safetensors, OSError, pickle and json errors share no base
        raise CheckpointError(f"Cannot load the weights of {name!r}: {_first_line(error)}") from error
    check_complete(name, report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return model.eval()


def load_config(name: str, *, local_files_only: bool = False, **size_overrides: Any) -> "PreTrainedConfig":
    """The config of a toy preset, folder or hub id, without weights; refuses one that needs code of its own."""
    if name.startswith("toy:"):
        return toy_settings(name, **size_overrides).config()
    refuse_overrides(name, size_overrides)
    _check_name(name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_files_only or local_only(name))
    except Exception as error:  # OSError, ValueError, KeyError and json errors share no base
        raise CheckpointError(f"Cannot read the config of {name!r}: {_first_line(error)}{_hub_hint(name)}") from error
    if getattr(config, "auto_map", None):
        raise CheckpointError(f"{name!r} brings model code of its own (auto_map in config.json), which is never executed here.")
    return config


def causal_class(config: "PreTrainedConfig") -> type["PreTrainedModel"]:
    """The causal language model class of `config`; imports that architecture alone where it is one of the four."""
    if config.model_type in ARCHS:
        return _class(config.model_type, "LMHeadModel" if config.model_type == "gpt2" else "ForCausalLM")
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise CheckpointError(f"model_type {config.model_type!r} is not a causal language model that transformers knows.") from None


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_device(name: str) -> torch.device:
    """The torch device called `name` (`auto` = CUDA where there is one, else CPU); DeviceError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("cpu", "cuda", "cuda:0", "mps", "auto"), DeviceError) from None
    there = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available()), "cpu": lambda: 1}
    if (device.index or 0) >= there.get(device.type, lambda: 0)():
        raise DeviceError(f"Device {name!r} is not there; use device='cpu' or 'auto'.")
    return device


def _class(arch: str, suffix: str) -> type:
    kind = "configuration" if suffix == "Config" else "modeling"
    return getattr(import_module(f"transformers.models.{arch}.{kind}_{arch}"), ARCHS[arch] + suffix)


def _gpt2_values(s: BackboneSettings) -> dict[str, Any]:
    size = dict(n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, n_inner=s.intermediate, n_positions=s.max_positions)
    dropout = dict(resid_pdrop=s.dropout, embd_pdrop=s.dropout, attn_pdrop=s.dropout)
    eps = {} if s.norm_eps is None else {"layer_norm_epsilon": s.norm_eps}
    return _common_values(s) | size | dropout | eps | s.extra


def _rope_values(s: BackboneSettings) -> dict[str, Any]:
    size = dict(hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers, max_position_embeddings=s.max_positions)
    heads = dict(num_attention_heads=s.heads, num_key_value_heads=s.kv_heads or s.heads)
    if s.arch != "qwen2":
        heads["head_dim"] = s.head_dim or s.hidden // s.heads
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta}, attention_dropout=s.dropout)
    eps = {} if s.norm_eps is None else {"rms_norm_eps": s.norm_eps}
    return _common_values(s) | size | heads | rope | eps | s.extra


def _common_values(s: BackboneSettings) -> dict[str, Any]:
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return dict(vocab_size=s.vocab_size, tie_word_embeddings=s.tied, initializer_range=s.initializer_range) | ids


def grow(model: "PreTrainedModel", rows: int, multiple: int | None = None) -> None:
    """Gives the embedding table `rows` rows, or up to a `multiple`, new ones drawn around the mean of the old, as transformers does."""
    with quiet():
        model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, loading report and notices; what is wrong with the weights is our error to tell."""
    from transformers.utils import logging as theirs

    level, shown = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if shown:
            theirs.enable_progress_bar()


def refuse_overrides(name: str, overrides: dict[str, Any]) -> None:
    """Raise SettingsError if `overrides` would change the shape of a backbone that has its own."""
    if overrides:
        raise SettingsError(f"{', '.join(overrides)} can be set for toy backbones only; {name!r} has its own shape.")


def _check_name(name: str) -> None:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{name!r} has no config.json, so it is not a saved model; it holds {_listing(folder)}.")
    elif folder.exists():
        raise CheckpointError(f"{name!r} is a file; give the folder that holds config.json and the weights.")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SettingsError(f"No folder {name!r}, and it is not a hub id (owner/name) or a toy (toy:<arch>[-<size>]) either.")


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else type(error).__name__) + "."


def _hub_hint(name: str) -> str:
    return "" if Path(name).exists() else " If this machine is offline, download the model elsewhere and give its folder."
