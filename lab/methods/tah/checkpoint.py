"""The official directory of Think-at-Hard, read without running code and written back in the same layout (spec section 5)."""

from pathlib import Path
from typing import Any

import torch

from lab.errors import CheckpointError, unknown
from lab.files import write_json
from lab.methods.tah.config import ALIASES, TahConfig, read_config
from lab.methods.tah.deciders import DTYPES, MLPDecider
from lab.methods.tah.model import TahModel
from lab.models.backbones import load_backbone, quiet
from lab.models.latent_model import new_folder, tokenizer_of
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import load_exact, read_json, read_state, read_torch
from lab.models.tokenizers import stop_ids

CONFIG, DECIDER, ADAPTER = "tah_config.json", "iter_decider.bin", "lora"


class OfficialTah:
    """`tah_config.json` beside an ordinary checkpoint, `lora/` and `iter_decider.bin`; both generations of the config."""

    name = "TaH (tah_config.json, model weights, lora/, iter_decider.bin)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The layout, where there is a tah_config.json and no manifest of ours."""
        return Layout("tah", self.name) if files.has(CONFIG) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> TahModel:
        """The model; `answers` override fields of the config (threshold=… is short for the decider's), as the official loader allows."""
        tokenizer, threshold = answers.pop("tokenizer", None), answers.pop("threshold", None)
        for name in answers:
            if name not in TahConfig.model_fields:
                raise unknown("answer", name, ("tokenizer", "threshold", *TahConfig.model_fields))
        raw = read_json(folder / CONFIG)
        config = read_config({**raw, **{name: value for name, value in answers.items() if value not in (None, {})}})
        model = load_official(folder, config)
        model.tokenizer = tokenizer or tokenizer_of(folder)
        if threshold is not None:
            model.set_threshold(threshold)
        return model.eval()


def load_official(folder: Path, config: TahConfig) -> TahModel:
    """The model in an official directory under checked settings.

    Raises CheckpointError where the adapter's rank or scale is not the config's, or weights do not fit.
    """
    adapter = folder / ADAPTER
    if config.adapter == "lora" and config.max_iter > 1:
        config = _with_adapter(config, adapter)
    model = TahModel(load_backbone(str(folder), dtype="auto"), config, source=str(folder))
    if model.lora is not None:
        model.lora.load_peft_state(read_state(adapter / "adapter_model.safetensors"))
        model.lora.to(model.head.dtype)
    load_decider(model, folder)
    return model


def _with_adapter(config: TahConfig, folder: Path) -> TahConfig:
    """The settings with rank and scale of `adapter_config.json`, which must not contradict them."""
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{str(folder.parent)!r} says adapter 'lora' but has no {ADAPTER}/adapter_config.json; copy the whole directory."
        )
    saved = read_json(folder / "adapter_config.json")
    odd = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if saved.get(name)]
    if odd or saved.get("bias", "none") != "none":
        raise CheckpointError(f"The adapter in {str(folder)!r} uses {', '.join(odd) or 'bias'}, which Think-at-Hard never had.")
    wanted = {"r": saved["r"], "lora_alpha": saved["lora_alpha"]}
    clash = [name for name, value in wanted.items() if config.adapter_kwargs.get(name, value) != value]
    if clash:
        raise CheckpointError(
            f"{CONFIG} and {ADAPTER}/adapter_config.json disagree on {', '.join(clash)}; one of them belongs to another model."
        )
    return config.but(adapter_kwargs={"lora_dropout": saved.get("lora_dropout", 0.0), **config.adapter_kwargs, **wanted})


def load_decider(model: TahModel, folder: Path) -> None:
    """Fill the MLP deciders from `iter_decider.bin` (or that of their `load_path`); other deciders have nothing to load.

    The configured threshold wins over the stored one; a file of another class is not loaded into this one (spec 7.2.2).
    """
    trained, other = model.tah.iter_decider_kwargs, model.tah.eval_iter_decider_kwargs
    own = {**trained, **other} if model.tah.eval_iter_decider == "iter_decider" else other
    for decider, kwargs in ((model.decider, trained), (model.eval_decider, own)):
        if isinstance(decider, MLPDecider):
            _fill_decider(decider, Path(decider.settings.load_path or folder) / DECIDER, keep_threshold="threshold" in kwargs)


def _fill_decider(decider: MLPDecider, path: Path, keep_threshold: bool) -> None:
    saved = read_torch(path)
    name = ALIASES.get(saved["class"], saved["class"])
    if name != "MLPIterDecider":
        raise CheckpointError(
            f"{str(path)!r} holds a {name}, the settings ask for an MLPIterDecider: train step 2, or set iter_decider to {name!r}."
        )
    threshold = float(decider.threshold) if keep_threshold else float(saved["state_dict"]["threshold"])
    load_exact(decider, saved["state_dict"], what=str(path))
    decider.set_threshold(threshold)


def save_official(model: TahModel, folder: Path | str, generation: str = "new") -> Path:
    """Write `model` as the released code does: plain backbone, `lora/`, `iter_decider.bin`, `tah_config.json`, tokenizer.

    `generation` "old" also writes the keys that the first code generation reads. Every token that ends an answer stands in
    generation_config.json (spec 7.2.8). Raises RunError where the folder cannot be written.
    """
    with new_folder(Path(folder)) as temporary:
        if model.tokenizer is not None:
            model.backbone.generation_config.eos_token_id = list(stop_ids(model.tokenizer, model.backbone))
            model.tokenizer.save_pretrained(temporary)
        with quiet():
            model.backbone.save_pretrained(temporary)
        if model.lora is not None:
            _save_adapter(model, temporary / ADAPTER)
        torch.save(_decider_record(model), temporary / DECIDER)
        write_json(temporary / CONFIG, model.tah.to_json(generation))
    return Path(folder)


def _decider_record(model: TahModel) -> dict[str, Any]:
    name, settings = model.tah.decider()
    values = settings.model_dump(exclude={"load_path", "label_type"})
    if "dtype" in values:
        values["dtype"] = DTYPES[values["dtype"]]
    state = {key: value.detach().cpu() for key, value in model.decider.state_dict().items()}
    return {"class": name, "state_dict": state, "init_args": values}


def _save_adapter(model: TahModel, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({key: value.contiguous() for key, value in model.lora.peft_state().items()}, folder / "adapter_model.safetensors")
    settings = model.tah.lora()
    content = {"peft_type": "LORA", "r": settings.r, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    rest = {"target_modules": names, "bias": "none", "task_type": None, "inference_mode": True, "fan_in_fan_out": False}
    write_json(folder / "adapter_config.json", content | rest | {"base_model_name_or_path": "", "modules_to_save": None})


MODEL = TahModel
RECOGNISERS = (OfficialTah(),)
