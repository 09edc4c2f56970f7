"""CoLaR's files: the training checkpoint of the official code, LatentTTS releases, and writing both back (`colar.md` 5)."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lab.errors import CheckpointError, SettingsError
from lab.files import writing
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.model import ColarModel, separator_id
from lab.models.answers import check_answers, end_id, tokenizer_from
from lab.models.backbones import load_backbone, load_config, quiet
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import State, load_exact, part, read_state
from lab.models.peft_state import merged, plain_names
from lab.models.shapes import BUFFERS, filled

log = logging.getLogger(__name__)

MODEL = ColarModel
LLM, HEAD, RELEASED = "llm.", "latent_policy.", "lt_head."
ALPHA = 32.0  # of every published recipe, with r = 128
ANSWERS = ("backbone", "tokenizer", "lora_alpha", "embeds_std", "lp_intermediate_size", "sep_id", "eos_id")
PUBLISHED_STD = {  # by the backbone's name, as the official code looks `embeds_std` up (colar.md 2.1)
    "Llama-3.2-1B-Instruct": 0.018,
    "Llama-3.2-3B-Instruct": 0.018,
    "Llama-3.1-8B-Instruct": 0.008,
    "DeepSeek-R1-Distill-Qwen-1.5B": 0.03,
    "gpt2": 0.12,
}


class OfficialCheckpoint:
    """A Lightning `.ckpt`: the trained weights only (adapters and latent head), or all of them; or the written reasoning before it."""

    name = "CoLaR checkpoint (llm.… and latent_policy.…, or llm.… alone)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The file, where it holds a latent policy or nothing but a language model."""
        file = files.file.name if files.file else next((name for name in files.names if name.endswith(".ckpt")), "")
        names = files.shapes(file) if file else {}
        known = any(key.startswith(HEAD) for key in names) or (names and all(key.startswith(LLM) for key in names))
        return Layout("colar", self.name, {"file": file}) if known else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> ColarModel:
        """The model with its adapters added.

        `backbone=` names the model it was trained from (always needed: frozen weights are not in the file). Further: `tokenizer=`,
        `lora_alpha=` (32 in every recipe), `embeds_std=` (the official code's for backbones it knows by name, else measured on the
        embeddings), `sep_id=`, `eos_id=`; `lp_intermediate_size=` of the new head of a file without one.
        """
        check_answers(answers, ANSWERS)
        path = folder if folder.is_file() else folder / layout.found["file"]
        if not answers.get("backbone"):
            raise SettingsError(f"{path.name} holds only what was trained; pass backbone='…', the model it was trained from.")
        state = read_state(path)
        base, tokenizer = load_backbone(answers["backbone"]), tokenizer_from(answers, path.parent)
        known = {"embeds_std": PUBLISHED_STD.get(Path(answers["backbone"]).name)}
        s = _settings(state, HEAD, known | answers, base, tokenizer)
        body = {key.replace(".default.", "."): value for key, value in part(state, LLM).items()}
        _add(base, body, answers.get("lora_alpha", ALPHA), path.name)
        return _built(base, tokenizer, s, state, HEAD, path)


class LatentTTSRelease:
    """A transformers folder with a latent head (`ModalityDance/latent-tts-colar`); adapters are merged, the head has no deviation."""

    name = "LatentTTS CoLaR release (config.json with latent_intermediate_size)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where the config has the head's width and the weights a head."""
        head = any(key.startswith(RELEASED) for key in files.shapes())
        return Layout("colar", self.name) if head and "latent_intermediate_size" in files.config else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> ColarModel:
        """The model; `tokenizer=`, `sep_id=` and `eos_id=` may be given."""
        check_answers(answers, ("tokenizer", "sep_id", "eos_id"))
        config, tokenizer, state = load_config(str(folder)), tokenizer_from(answers, folder), read_state(folder)
        base = filled(config, {key: value for key, value in state.items() if not key.startswith(RELEASED)}, folder.name)
        known = {"embeds_std": config.latent_embedding_std}
        if tokenizer is None:  # ids in a config may be of another tokenizer (latenttts.md 5)
            known["sep_id"] = getattr(config, "latent_end_id", None)
        s = _settings(state, RELEASED, known | answers, base, tokenizer)
        return _built(base, tokenizer, s, state, RELEASED, folder)


RECOGNISERS = [OfficialCheckpoint(), LatentTTSRelease()]


def _settings(state: State, prefix: str, answers: Mapping[str, Any], base, tokenizer) -> ColarSettings:
    sep = answers.get("sep_id")
    if sep is None:
        if tokenizer is None:
            raise SettingsError("The separator's id is unknown without a tokenizer; pass tokenizer=… or sep_id=….")
        sep = separator_id(tokenizer)
    std = answers.get("embeds_std") or float(base.get_input_embeddings().weight.detach().float().std())
    head = f"{prefix}fc.0.weight" in state
    return ColarSettings.check(
        lp_intermediate_size=state[f"{prefix}fc.0.weight"].shape[0] if head else answers.get("lp_intermediate_size", 0),
        lp_deterministic=head and f"{prefix}log_std.weight" not in state,
        embeds_std=float(std),
        lora_r=0,
        sep_id=sep,
        pad_id=-1 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_id=end_id(answers, base.config, tokenizer),
    )


def _built(base, tokenizer, s: ColarSettings, state: State, prefix: str, source: Path) -> ColarModel:
    model = ColarModel.build(base, tokenizer, s.model_dump(mode="json"), source=str(source))
    if head := part(state, prefix):
        load_exact(model.parts.head, head, what=f"{source.name} ({prefix.rstrip('.')})")
    else:
        log.warning("%s holds a model of written reasoning: its latent head is new and must be trained.", source.name)
    return model.eval()


def _add(base, body: State, alpha: float, what: str) -> None:
    """Fills `base` with the weights of the file where it has them, and adds its adapters."""
    rows = next((value.shape[0] for key, value in plain_names(body).items() if key.endswith("embed_tokens.weight")), 0)
    if rows > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows)
    own = {key: value.detach().clone() for key, value in base.state_dict().items()}
    wrapped = {f"base_model.model.{key}": value for key, value in own.items()} | body
    names = {key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in wrapped if ".lora_" not in key}
    if extra := sorted(names - own.keys()):
        raise CheckpointError(f"{what} does not belong to this backbone: it has no weight {extra[0]!r}.")
    state = merged(wrapped, alpha)
    if "lm_head.weight" in own and base.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    load_exact(base, state, what=what, allow_unexpected=BUFFERS)


def export_latenttts(model: ColarModel, folder: Path | str) -> Path:
    """`folder`, written in the merged transformers layout with `lt_head` (the head's deviation has no place in it)."""
    from safetensors.torch import save_file

    if hasattr(model.backbone, "merge_and_unload"):
        raise SettingsError("Merge the adapters first: model.backbone = model.backbone.merge_and_unload().")
    folder, s, backbone = Path(folder), model.config, model.backbone
    with writing(folder):
        backbone.config.latent_intermediate_size, backbone.config.latent_embedding_std = model.parts.head.mean.in_features, s.embeds_std
        with quiet():
            backbone.save_pretrained(folder)
        head = {f"{RELEASED}{key}": value.detach().clone() for key, value in model.parts.head.state_dict().items() if "log_std" not in key}
        save_file({**read_state(folder), **head}, folder / "model.safetensors", metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    return folder


def export_official(model: ColarModel, path: Path | str) -> Path:
    """`path`, written as a checkpoint of the official code with all weights under its names."""
    path = Path(path)
    body = {f"llm.base_model.model.{key}": value.detach().cpu().clone() for key, value in model.backbone.state_dict().items()}
    head = {f"{HEAD}{key}": value.detach().cpu().clone() for key, value in model.parts.head.state_dict().items()}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save({"state_dict": body | head}, temporary)
        temporary.replace(path)
    return path
