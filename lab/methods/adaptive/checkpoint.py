"""The official layouts of adaptive-latent-reasoning, read without running code and written back (distill.md 5).

Merged releases (`Lapisbird/…`): a Llama config with the method's settings in it, weights under `_base_model.`; a text model is a
plain checkpoint. Training checkpoints: a peft adapter over the base named in `model_creation_config.json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError, SettingsError, unknown
from lab.files import write_json
from lab.methods.adaptive.config import SETTINGS_KEY, TOKENS, AdaptiveSettings, from_official, to_official
from lab.methods.adaptive.model import AdaptiveModel
from lab.models.backbones import load_backbone, new_backbone, quiet
from lab.models.latent_model import new_folder, tokenizer_of
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, read_json, read_state

MODEL = AdaptiveModel
CREATION, ADAPTER, ADAPTER_CONFIG = "model_creation_config.json", "adapter_model.safetensors", "adapter_config.json"
_BODY, _PEFT = "_base_model.", "base_model.model."


class MergedRelease:
    """`config.json` with the inserted settings, weights under `_base_model.` beside `recurrent_filter.`; no LoRA left."""

    name = "adaptive, merged (config.json with LatentThinkingModel settings)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The layout, where config.json carries the method's settings."""
        return Layout("adaptive", self.name) if SETTINGS_KEY in files.config else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> AdaptiveModel:
        """The model; `head_trained=` and `most_trained=` tell what the files do not."""
        tokenizer, known = _answers(answers)
        raw = read_json(folder / "config.json")
        s = from_official(raw[SETTINGS_KEY])
        if raw[SETTINGS_KEY].get("lora_mode"):
            raise CheckpointError(f"{str(folder)!r} was saved with its special tokens in modules; merge it first (lora_mode off).")
        state = read_state(folder)
        body = {key.removeprefix(_BODY): value for key, value in state.items() if key.startswith(_BODY)}
        backbone = _backbone(_plain_config(raw), body, f"{folder.name} (backbone)")
        model = AdaptiveModel.build(backbone, tokenizer or tokenizer_of(folder), s.but(**known), source=str(folder))
        rest = {key: value for key, value in state.items() if not key.startswith(_BODY)}
        load_exact(model.parts, rest, what=f"{folder.name} (recurrent filter)")
        model.to(next(iter(body.values())).dtype)
        return model.eval()


class TrainingCheckpoint:
    """A peft adapter with `model_creation_config.json`; the base model comes from there, or from `backbone=`."""

    name = "adaptive, training checkpoint (model_creation_config.json, adapter_model.safetensors)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The layout, where adapter and creation config are there."""
        return Layout("adaptive", self.name) if files.has(CREATION, ADAPTER) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> AdaptiveModel:
        """The model with LoRA folded in; `keep_lora=True` leaves the adapters in place, to train on."""
        keep, name = answers.pop("keep_lora", False), answers.pop("backbone", "")
        tokenizer, known = _answers(answers)
        creation, adapter = read_json(folder / CREATION), read_json(folder / ADAPTER_CONFIG)
        tokenizer = tokenizer or tokenizer_of(folder)
        backbone = load_backbone(name or creation["path_or_repo"], dtype="auto")
        model = from_adapter(backbone, tokenizer, creation, adapter, read_state(folder / ADAPTER), folder.name)
        model.source = str(folder)
        model.but(**known)
        return (model if keep else model.merge()).eval()


RECOGNISERS = [MergedRelease(), TrainingCheckpoint()]


def _answers(answers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    tokenizer, allowed = answers.pop("tokenizer", None), ("head_trained", "most_trained", "fixed_count", "prefix")
    for name in answers:
        if name not in allowed:
            raise unknown("answer", name, ("tokenizer", "backbone", "keep_lora", *allowed))
    return tokenizer, answers


def _plain_config(raw: Mapping[str, Any]) -> Any:
    """The transformers config inside a released one, `rope_theta` and dtype in whatever version's spelling."""
    from transformers import AutoConfig

    kept = {key: value for key, value in raw.items() if key not in (SETTINGS_KEY, "architectures", "transformers_version")}
    return AutoConfig.for_model(kept.pop("model_type"), **kept)


def _backbone(config: Any, state: State, what: str) -> Any:
    """A model of `config` with exactly `state`; an lm_head may be absent where it is tied."""
    backbone = new_backbone(config).to(next(iter(state.values())).dtype)
    load_exact(backbone, state, what=what)
    return backbone


# ---- training checkpoints ----


def from_adapter(
    backbone: Any, tokenizer: Any, creation: Mapping[str, Any], adapter: Mapping[str, Any], state: State, what: str
) -> AdaptiveModel:
    """The model of a peft adapter's `state` over its base, LoRA left in place.

    Args:
        creation: model_creation_config.json; adapter: adapter_config.json.
    Raises CheckpointError where tokens, names or shapes do not fit.
    """
    state = {key.removeprefix(_PEFT): value for key, value in state.items()}
    _resize(backbone, state, what)
    parts = {key: value for key, value in state.items() if not key.startswith(_BODY)}
    kind = "untied" if "_start_embed_in.weight" in parts else "tied" if "_start_embed.weight" in parts else ""
    s = from_official(creation.get("latent_settings_dict") or {}, kind) if creation.get("is_latent") else AdaptiveSettings(special="")
    if creation.get("is_latent"):
        s = s.but(**token_ids(tokenizer, what), unused=list(range(len(tokenizer), backbone.config.vocab_size)))
    model = AdaptiveModel.build(backbone, tokenizer, s)
    load_exact(model.parts, parts, what=f"{what} (filter and special tokens)")
    model.add_lora(adapter["r"], adapter["lora_alpha"], adapter.get("lora_dropout", 0.0), sorted(adapter["target_modules"]))
    load_lora(model, {key.removeprefix(_BODY): value for key, value in state.items() if ".lora_" in key}, what)
    return model


def token_ids(tokenizer: Any, what: str) -> dict[str, int]:
    """Ids of the four special tokens by setting; CheckpointError where the tokenizer lacks one."""
    ids = dict(zip(("start", "end", "go_on", "stop"), tokenizer.convert_tokens_to_ids(list(TOKENS)), strict=True))
    for name, token in zip(ids, TOKENS, strict=True):
        if ids[name] is None or ids[name] == tokenizer.unk_token_id:
            raise CheckpointError(f"The tokenizer of {what} has no {token} token, which an adaptive model needs.")
    return ids


def load_lora(model: AdaptiveModel, state: State, what: str) -> None:
    """Fills the LoRA matrices from `<module>.lora_A.weight` names; CheckpointError where names or shapes differ."""
    own = lora_weights(model)
    load_exact(_Weights(own), state, what=f"{what} (LoRA)")


def lora_weights(model: AdaptiveModel) -> dict[str, nn.Parameter]:
    """The LoRA matrices of a model by `<module>.lora_A.weight`."""
    found = {}
    for name, parameter in model.backbone.named_parameters():
        if ".lora_" in name:
            found[name.replace(".default.weight", ".weight")] = parameter
    return found


class _Weights(nn.Module):
    """Named tensors as a module's state."""

    def __init__(self, tensors: Mapping[str, nn.Parameter]):
        super().__init__()
        self.tensors = dict(tensors)

    def state_dict(self, *args: Any, keep_vars: bool = False, **options: Any) -> dict[str, Tensor]:
        return dict(self.tensors)


@torch.no_grad()
def _resize(backbone: Any, state: State, what: str) -> None:
    """Takes the vocabulary-wide weights out of `state` into the backbone, resized to their rows (the tokens were added in training)."""
    names = {"model.embed_tokens": backbone.get_input_embeddings, "lm_head": backbone.get_output_embeddings}
    names |= {"transformer.wte": backbone.get_input_embeddings}
    for name, module in names.items():
        value = state.pop(f"{_BODY}{name}.weight", None)
        if value is None:
            continue
        if value.shape[0] != module().weight.shape[0]:
            backbone.resize_token_embeddings(value.shape[0], mean_resizing=False)
        if value.shape != module().weight.shape:
            raise CheckpointError(f"{what}: {name} is {tuple(value.shape)}, the base has {tuple(module().weight.shape)}.")
        module().weight.copy_(value)


# ---- writing ----


def save_merged(model: AdaptiveModel, folder: Path | str) -> Path:
    """Writes the released layout; the model must be merged (`AdaptiveModel.merge`)."""
    if "lora" in model.__dict__ or model.config.special:
        raise SettingsError("Merge the model first: model.merge() folds LoRA and the special tokens into the backbone.")
    with new_folder(Path(folder)) as temporary:
        _write_merged(model, temporary)
    return Path(folder)


def _write_merged(model: AdaptiveModel, folder: Path) -> None:
    from safetensors.torch import save_file

    if not model.config.latent:
        with quiet():
            model.backbone.save_pretrained(folder)
    else:
        tied = model.backbone.config.tie_word_embeddings
        state = {f"{_BODY}{k}": v for k, v in model.backbone.state_dict().items() if not (tied and k == "lm_head.weight")}
        state |= model.parts.state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
        told = {**model.backbone.config.to_dict(), "architectures": ["LatentThinkingModel"], SETTINGS_KEY: to_official(model.config)}
        write_json(folder / "config.json", told)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def save_adapter(model: AdaptiveModel, folder: Path | str, base: str) -> Path:
    """Writes the training-checkpoint layout: the adapter over `base` (a hub id or folder), its configs and the tokenizer."""
    if "lora" not in model.__dict__:
        raise SettingsError("This model has no LoRA; write the merged layout instead (save_merged).")
    with new_folder(Path(folder)) as temporary:
        _write_adapter(model, temporary, base)
    return Path(folder)


@torch.no_grad()
def _write_adapter(model: AdaptiveModel, folder: Path, base: str) -> None:
    from safetensors.torch import save_file

    body = {f"{_PEFT}{_BODY}{key}": value for key, value in lora_weights(model).items()}
    table, head = model.device_weight().clone(), model.backbone.get_output_embeddings().weight.clone()
    if model.config.special:
        rows = [model.config.start, model.config.end, model.config.go_on, model.config.stop]
        table[rows] = head[rows] = 0
    stem = "transformer.wte" if model.backbone.config.model_type == "gpt2" else "model.embed_tokens"
    wide = {f"{_PEFT}{_BODY}{stem}.weight": table, f"{_PEFT}{_BODY}lm_head.weight": head}
    parts = {f"{_PEFT}{key}": value for key, value in model.parts.state_dict().items()}
    save_file({key: value.contiguous() for key, value in (body | wide | parts).items()}, folder / ADAPTER, {"format": "pt"})
    about = model.__dict__["lora"].peft_config["default"]
    shape = {
        "r": about.r,
        "lora_alpha": about.lora_alpha,
        "lora_dropout": about.lora_dropout,
        "target_modules": sorted(about.target_modules),
    }
    write_json(folder / ADAPTER_CONFIG, {"peft_type": "LORA", "base_model_name_or_path": base, "bias": "none", **shape})
    dtype = str(table.dtype).removeprefix("torch.")
    latent = {k: v for k, v in to_official(model.config).items() if k in _CREATION_KEYS}
    write_json(
        folder / CREATION,
        {"path_or_repo": base, "dtype": dtype, "is_latent": model.config.latent, "latent_settings_dict": latent}
        | {"is_lora": True, "lora_config_dict": shape, "lora_path_or_repo": str(folder.name)},
    )
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


_CREATION_KEYS = ("recurrent_filter_mode", "detach_binary_head_inputs", "add_latent_to_end", "binary_head_temp")
