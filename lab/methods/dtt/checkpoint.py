"""Files of gated models: DTT's adapter, bare state dict and wrapped state dict, HRPO's adapter, and our own adapter (`dtt.md` 5)."""

import logging
import re
from pathlib import Path
from typing import Any

import torch

from lab.errors import CheckpointError, SettingsError
from lab.methods.dtt.config import BOT, EOT, GatedSettings
from lab.methods.dtt.model import SparseGatedModel
from lab.models.answers import ABOUT_BACKBONE, check_answers, end_id, tokenizer_from
from lab.models.backbones import load_backbone
from lab.models.latent_model import new_folder
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, read_json, read_state
from lab.models.peft_state import merged
from lab.models.shapes import BUFFERS, config_for, filled

log = logging.getLogger(__name__)

MODEL = SparseGatedModel
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATES = {"dtt": ("projection.", "gate_linear."), "hrpo": ("thinking_residual_",)}
ANSWERS = (*ABOUT_BACKBONE, "tokenizer", "eos_id", "noise", "hard", "lora_alpha", "temperature")
HRPO_FOLDER = re.compile(r"(?P<model>.+)-(?P<task>\w+)-group(?P<g>\d+)-lora(?P<r>\d+)-rmin(?P<rmin>[\d.]+)-temp(?P<T>[\d.]+)$")


class BareState:
    """`pytorch_model.bin` (or safetensors) of the published module: `model.…` with or without adapters, projection and gate beside it."""

    name = "DTT state dict (model.…, projection.weight, gate_linear.…)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The file, where a projection and a gate stand beside a model."""
        names = files.shapes()
        own = "projection.weight" in names and "gate_linear.weight" in names
        return Layout("dtt", self.name) if own and any(key.startswith("model.") for key in names) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> SparseGatedModel:
        """The model; `backbone=`, `config=` or `heads=` say what shapes cannot, `lora_alpha=` is twice the rank unless given.

        Further: `tokenizer=`, `eos_id=`, `noise=` (gumbel, as published), `hard=`, `temperature=`.
        """
        check_answers(answers, ANSWERS)
        state = read_state(folder)
        body = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        if any(".lora_A." in key for key in body):
            body = merged(body, answers.get("lora_alpha") or 2 * _rank(body))
        body.setdefault("lm_head.weight", body.get("transformer.wte.weight"))
        about = {key: answers[key] for key in ABOUT_BACKBONE if key in answers}
        config = config_for({key: tuple(value.shape) for key, value in body.items()}, what=folder.name, **about)
        return _built(filled(config, body, folder.name), state, "dtt", folder, answers)


class AdapterFolder:
    """A peft adapter whose file also holds the gate: ours, and HRPO's (its folder name carries the settings)."""

    name = "gated adapter (adapter_model.safetensors with a gate: DTT of ours, HRPO)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where the adapter file names a gate."""
        names = [_plain(key) for key in files.shapes(ADAPTER)]
        kind = next((kind for kind, stems in GATES.items() if any(name.startswith(stems) for name in names)), None)
        return Layout("dtt", self.name, {"gate": kind}) if kind else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> SparseGatedModel:
        """The model with adapters folded in; `backbone=` where the adapter's own base model is not at hand, the rest as above."""
        return _from_adapter(folder, layout.found["gate"], answers)


class PlainAdapter:
    """DTT's published `save_pretrained` of the adapter alone: gate and projection are not in it, so they start anew."""

    name = "DTT adapter without its gate (a tokenizer with [bot] and [eot] beside it)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where an adapter stands beside a tokenizer that knows [bot] and [eot]."""
        shapes = files.shapes(ADAPTER)
        if not shapes or any(_plain(key).startswith(stem) for key in shapes for stems in GATES.values() for stem in stems):
            return None
        added = [files.json(name) for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")]
        return Layout("dtt", self.name) if any(BOT in str(part) and EOT in str(part) for part in added if part) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> SparseGatedModel:
        """The model; says that its gate is untrained."""
        log.warning("%s holds no gate and no projection (the published code did not save them): they start anew, closed.", folder.name)
        return _from_adapter(folder, "", answers)


RECOGNISERS = [BareState(), AdapterFolder(), PlainAdapter()]


def _from_adapter(folder: Path, kind: str, answers: dict[str, Any]) -> SparseGatedModel:
    check_answers(answers, ANSWERS)
    about, state = read_json(folder / ADAPTER_CONFIG), read_state(folder / ADAPTER)
    base = load_backbone(_base(answers, about, folder))
    own = {_plain(key): value for key, value in state.items()}
    gate = {key: value for key, value in own.items() if kind and key.startswith(GATES[kind])}
    adapters = {key: value for key, value in own.items() if key not in gate}
    _fold(base, adapters, answers.get("lora_alpha") or about["lora_alpha"], folder.name, _tokenizer(answers, folder))
    found = HRPO_FOLDER.match(folder.name) if kind == "hrpo" else None
    known = {"temperature": float(found["T"])} if found else {}
    return _built(base, gate, kind or "dtt", folder, known | answers)


def _base(answers: dict[str, Any], about: dict[str, Any], folder: Path) -> str:
    name = answers.get("backbone") or about.get("base_model_name_or_path")
    if not name:
        raise SettingsError(f"{folder.name} holds an adapter only; pass backbone='…', the model it was trained from.")
    return str(name)


def _plain(key: str) -> str:
    """A gate's name without where it stands (`base_model.model.transformer.`, `base_model.model.model.`); others without peft's prefix."""
    name = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    bare = re.sub(r"^(transformer|model)\.", "", name)
    return bare if bare.startswith(tuple(stem for stems in GATES.values() for stem in stems)) else name


def _rank(body: State) -> int:
    return next(value.shape[0] for key, value in body.items() if ".lora_A." in key)


def _fold(base, own: State, alpha: float, what: str, tokenizer: Any = None) -> None:
    """Adds adapters, and trained token rows, to the weights of `base`, whose table grows to the tokens there are."""
    rows = [own.pop(key) for key in list(own) if key.endswith(".token_adapter.trainable_tokens_delta")]
    indices = own.pop("token_indices", None)
    _grow(base, own, indices, tokenizer)
    before = {key: value.detach().clone() for key, value in base.state_dict().items()}
    state = merged({f"base_model.model.{key}": value for key, value in {**before, **own}.items()}, alpha)
    if extra := sorted(state.keys() - before.keys()):
        raise CheckpointError(f"{what} does not belong to this backbone: it has no weight {extra[0]!r}.")
    load_exact(base, state, what=what, allow_unexpected=BUFFERS)
    for value in rows[:1]:
        if indices is None:
            raise CheckpointError(f"{what} holds trained token rows but does not say which tokens they are (token_indices).")
        base.get_input_embeddings().weight.data[indices] = value.to(base.dtype)


def _grow(base, own: State, indices: Any, tokenizer: Any) -> None:
    wanted = [0 if tokenizer is None else len(tokenizer), 0 if indices is None else int(indices.max()) + 1]
    wanted += [value.shape[0] for key, value in own.items() if key.endswith(("wte.weight", "embed_tokens.weight"))]
    if max(wanted) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(max(wanted), mean_resizing=False)


def _built(base, state: State, kind: str, folder: Path, answers: dict[str, Any]) -> SparseGatedModel:
    tokenizer = _tokenizer(answers, folder)
    s = _settings(base.config, kind, tokenizer, answers)
    model = SparseGatedModel.build(base, tokenizer, s.model_dump(mode="json"), source=str(folder))
    gate = {key: value for key, value in state.items() if key.startswith(GATES[kind])}
    if gate:
        load_exact(model.gate, gate, what=f"{folder.name} (gate)")
    return model.eval()


def _tokenizer(answers: dict[str, Any], folder: Path) -> Any:
    return tokenizer_from({key: value for key, value in answers.items() if key != "backbone"}, folder if folder.is_dir() else folder.parent)


def _settings(config, kind: str, tokenizer, answers: dict[str, Any]) -> GatedSettings:
    """Published settings: Gumbel noise, hard at evaluation; the last rows of the table are [bot] and [eot] where no tokenizer says so."""
    vocabulary, values = {} if tokenizer is None else tokenizer.get_vocab(), {"gate": kind, "eos_id": end_id(answers, config, tokenizer)}
    if kind == "dtt":
        values |= {"bot_id": vocabulary.get(BOT, config.vocab_size - 2), "eot_id": vocabulary.get(EOT, config.vocab_size - 1)}
        values |= {"noise": answers.get("noise", "gumbel"), "hard": answers.get("hard", True)}
        values |= {"temperature": answers.get("temperature", 1.0)}
    else:
        values["residual_temperature"] = answers.get("temperature", 0.5)
    return GatedSettings.check(**values)


def export_adapter(model: SparseGatedModel, folder: Path | str) -> Path:
    """`folder`, with the adapters, the trained token rows and the gate in one peft file (HRPO's layout where it is HRPO's gate).

    SettingsError for a model without adapters; `model.save` writes those whole.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not model.has_lora:
        raise SettingsError("This model has no adapters to export; model.save(folder) writes it whole.")
    where = f"base_model.model.{model.backbone.get_base_model().base_model_prefix}."
    how = model.backbone.peft_config["default"]
    state = dict(get_peft_model_state_dict(model.backbone, save_embedding_layers=False))
    state |= {where + key: value for key, value in model.gate.state_dict().items()}
    if how.trainable_token_indices:
        state["base_model.model.token_indices"] = torch.tensor(next(iter(how.trainable_token_indices.values())))
    folder = Path(folder)
    with new_folder(folder) as temporary:
        model.backbone.peft_config["default"].save_pretrained(str(temporary))
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, temporary / ADAPTER, {"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(temporary)
    return folder
