"""CODI's files: official releases with LoRA inside, LatentTTS releases, and writing the official layout back (`distill.md` 5)."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lab.files import writing
from lab.methods.coconut.checkpoint import latent_ids
from lab.methods.codi.config import CodiSettings, inferred
from lab.methods.codi.model import CodiModel, with_lora
from lab.models.answers import ABOUT_BACKBONE, check_answers, end_id, tokenizer_from
from lab.models.backbones import load_config, new_backbone
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, part, read_state
from lab.models.peft_state import merged, plain_names
from lab.models.shapes import BUFFERS, architecture, config_for, filled

log = logging.getLogger(__name__)

MODEL = CodiModel
PREFIXES = ("codi.", "coconut.")
ALPHA = 32.0  # of every published recipe
LATENTTTS = {"projector.1": "1", "projector.3": "3", "projector.4": "ln"}
ANSWERS = (*ABOUT_BACKBONE, "tokenizer", "lora_alpha", "num_latent", "eos_id", "keep_lora", "data_name", "remove_eos", "compat")


class OfficialRelease:
    """A state dict of the training wrapper (`zen-E/CODI-gpt2`, `zen-E/CODI-llama3.2-1b-Instruct`; older files say `coconut.`)."""

    name = "CODI release (codi.base_model.model.… with lora_A/lora_B, prj.…)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The weights, where a prefix stands before a backbone's names."""
        shapes = files.shapes()
        return Layout("codi", self.name) if any(architecture(plain_names(part(shapes, prefix))) for prefix in PREFIXES) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> CodiModel:
        """The model with LoRA added to its weights, or left beside them with `keep_lora=True`.

        `lora_alpha=` is in no file (32 in every recipe). A Llama needs `backbone=` (or `config=`); further: `num_latent=`, `tokenizer=`,
        `heads=`, `eos_id=`, `data_name=`, `remove_eos=`, `compat=`.
        """
        check_answers(answers, ANSWERS)
        state = read_state(folder)
        prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state))
        body = part(state, prefix)
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        plain = {key: shape for key, shape in plain_names(part(shapes, prefix)).items()}
        about = {key: answers[key] for key in ABOUT_BACKBONE if key in answers}
        config, tokenizer = (
            config_for(plain, what=folder.name, **about),
            tokenizer_from(answers, folder if folder.is_dir() else folder.parent),
        )
        known = {key: answers[key] for key in ("num_latent", "data_name", "remove_eos", "compat") if key in answers}
        s = CodiSettings.check(
            **inferred(shapes, prefix),
            **known,
            lora_alpha=_alpha(answers, shapes),
            eos_id=_end(answers, config, tokenizer),
            train_marks=False,
        )
        if answers.get("keep_lora") and s.lora_r:
            backbone = with_lora(new_backbone(config), s)
            load_exact(backbone, body, what=folder.name, allow_unexpected=BUFFERS)
        else:
            backbone = filled(config, merged(body, s.lora_alpha), folder.name)
        model = CodiModel.build(backbone, tokenizer, s.model_dump(mode="json"), source=str(folder))
        load_exact(model.parts, {key: value for key, value in state.items() if key.startswith("prj.")}, what=f"{folder.name} (prj)")
        return model.eval()


class LatentTTSRelease:
    """A transformers folder with a projector (`ModalityDance/latent-tts-codi`); LoRA is merged already."""

    name = "LatentTTS CODI release (config.json with projector and latent_id)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where the config has both."""
        config, scored = files.config, any(key.startswith("classifier.") for key in files.shapes())
        return Layout("codi", self.name) if config.get("projector") and "latent_id" in config and files.shapes() and not scored else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> CodiModel:
        """The model; `num_latent=` (6 in the release), `tokenizer=` and `eos_id=` may be given."""
        check_answers(answers, ("tokenizer", "num_latent", "eos_id"))
        config, tokenizer = load_config(str(folder)), tokenizer_from(answers, folder)
        ids = latent_ids(config, tokenizer, folder.name)
        s = CodiSettings.check(
            num_latent=answers.get("num_latent", 6),
            prj_dim=config.projector_hidden_size,
            prj_dropout=getattr(config, "projector_dropout", 0.0),
            lora_r=0,
            raw_question=True,
            bot_id=ids["start_id"],
            eot_id=ids["end_id"],
            pad_id=ids["latent_id"],
            eos_id=end_id(answers, config, tokenizer),
        )
        state = read_state(folder)
        body = {key: value for key, value in state.items() if not key.startswith("projector.")}
        model = CodiModel.build(filled(config, body, folder.name), tokenizer, s.model_dump(mode="json"), source=str(folder))
        load_exact(model.parts.prj, _renamed_projector(state), what=f"{folder.name} (projector)")
        return model.eval()


RECOGNISERS = [OfficialRelease(), LatentTTSRelease()]


def export_official(model: CodiModel, path: Path | str) -> Path:
    """`path`, written with the official names: as `model.safetensors` content, LoRA pairs beside their base weights.

    A model without adapters gets pairs of rank 1 that add nothing only in name: its weights stand as `base_layer`, with zero B, so that
    the official script reads it.
    """
    from safetensors.torch import save_file

    model.put_marks()
    path, backbone = Path(path), model.backbone
    if not model.has_lora:
        backbone = _zero_lora(model)
    state = {f"codi.{key}": value for key, value in backbone.state_dict().items()} | dict(model.parts.state_dict())
    state = {key: value.detach().cpu().clone().contiguous() for key, value in state.items() if key != "marks"}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    return path


@torch.no_grad()
def _zero_lora(model: CodiModel) -> Any:
    import copy

    s = model.config
    return with_lora(copy.deepcopy(model.backbone), s if s.lora_r else s.but(lora_r=1))  # peft starts B at zero


def _alpha(answers: Mapping[str, Any], shapes: Mapping[str, Any]) -> float:
    if "lora_alpha" not in answers and any(".lora_A." in key for key in shapes):
        log.warning(
            "The file does not say its LoRA alpha; taking %g, the value of every published recipe. Pass lora_alpha=… to say so.", ALPHA
        )
    return answers.get("lora_alpha", ALPHA)


def _end(answers: Mapping[str, Any], config: Any, tokenizer: Any) -> int:
    found = end_id(answers, config, tokenizer)
    return config.vocab_size - 4 if found < 0 and config.model_type == "gpt2" else found


def _renamed_projector(state: State) -> State:
    """`projector.4` is the layer norm that the official files call `ln`."""
    found = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if stem.startswith("projector."):
            found[f"{LATENTTTS.get(stem, stem)}.{leaf}"] = value
    return found
