"""COCONUT's files: official state dicts, LatentTTS releases, and writing the official layout back (`coconut.md` 5, `latenttts.md` 5)."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lab.errors import CheckpointError
from lab.files import writing
from lab.methods.coconut.config import END, LATENT, START, CoconutSettings
from lab.methods.coconut.model import CoconutModel
from lab.models.answers import ABOUT_BACKBONE, check_answers, end_id, tokenizer_from
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import read_state, same_tensor
from lab.models.shapes import architecture, config_for, filled

log = logging.getLogger(__name__)

MODEL = CoconutModel
PREFIX, ALIAS = "base_causallm.", "embedding.weight"
USUAL = 6  # thoughts of the published GSM8K, ProntoQA and ProsQA models
ANSWERS = (*ABOUT_BACKBONE, "tokenizer", "thoughts", "mode", "eos_id")


class OfficialState:
    """A state dict as the official code writes it: names after `base_causallm.`, or bare ones for runs without thoughts."""

    name = "COCONUT state dict (base_causallm.…, or a bare one without config.json)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The file, where there is no config and every name is a backbone's."""
        file = weights_name(files)
        names = {} if files.config or not file else inner(files.shapes(file))
        return Layout("coconut", self.name, {"file": file}) if architecture(names) and _nothing_else(names) else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> CoconutModel:
        """The model; `thoughts=` is the number it was trained to end with, which the file does not say (6 in the published runs).

        Also: `backbone=`, `config=` or `heads=` (see `lab.models.shapes`), `tokenizer=`, `eos_id=`, and `mode=` of a bare file (`cot`).
        """
        check_answers(answers, ANSWERS)
        path = folder if folder.is_file() else folder / layout.found["file"]
        raw = read_state(path)
        state, own = inner(raw), any(key.startswith(PREFIX) for key in raw)
        about = {key: answers[key] for key in ABOUT_BACKBONE if key in answers}
        config = config_for({key: tuple(value.shape) for key, value in state.items()}, what=path.name, **about)
        tokenizer = tokenizer_from(answers, path.parent)
        settings = _settings(answers, config.vocab_size, tokenizer, "coconut" if own else "cot")
        return CoconutModel(filled(config, state, path.name), tokenizer, settings, source=str(path)).eval()


class LatentTTSRelease:
    """A transformers folder whose config names the latent tokens (`ModalityDance/latent-tts-coconut`)."""

    name = "LatentTTS COCONUT release (config.json with latent_id)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """The folder, where the config has latent tokens and nothing of another method."""
        config, names = files.config, files.shapes()
        foreign = config.get("projector") or "latent_intermediate_size" in config or any(key.startswith("classifier.") for key in names)
        return Layout("coconut", self.name) if "latent_id" in config and names and not foreign else None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> CoconutModel:
        """The model; `thoughts=` (6 in the release) and `tokenizer=` may be given."""
        from lab.models.backbones import load_config

        check_answers(answers, ("tokenizer", "thoughts", "eos_id"))
        config, tokenizer = load_config(str(folder)), tokenizer_from(answers, folder)
        ids = latent_ids(config, tokenizer, folder.name)
        settings = CoconutSettings(thoughts=asked_thoughts(answers), eos_id=end_id(answers, config, tokenizer), **ids)
        return CoconutModel(filled(config, read_state(folder), folder.name), tokenizer, settings, source=str(folder)).eval()


RECOGNISERS = [OfficialState(), LatentTTSRelease()]


def export_official(model: CoconutModel, path: Path | str) -> Path:
    """`path`, written as the official code does: a torch file with its names and alias (bare names for runs without thoughts)."""
    path = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in model.backbone.state_dict().items()}
    if model.config.markers:
        table = model.backbone.get_input_embeddings().weight.detach().cpu()
        state = {**{PREFIX + key: value for key, value in state.items()}, ALIAS: table}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save(state, temporary)
        temporary.replace(path)
    return path


def asked_thoughts(answers: Mapping[str, Any]) -> int:
    """The number of thoughts given, or the published models' 6, said aloud."""
    if "thoughts" not in answers:
        log.warning("The file does not say how many thoughts it was trained with; taking %d. Pass thoughts=… to say so.", USUAL)
    return answers.get("thoughts", USUAL)


def latent_ids(config: Any, tokenizer: Any, what: str) -> dict[str, int]:
    """The three token ids, from the tokenizer by their text where it has them, else from the config; CheckpointError if one is no row."""
    names = {"start_id": (START, "latent_start_id"), "end_id": (END, "latent_end_id"), "latent_id": (LATENT, "latent_id")}
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    ids = {name: vocabulary.get(text, getattr(config, key, -1)) for name, (text, key) in names.items()}
    if bad := [name for name, value in ids.items() if not 0 <= (value if value is not None else -1) < config.vocab_size]:
        raise CheckpointError(
            f"{what}: {', '.join(bad)} is no row of the vocabulary ({config.vocab_size}); give the tokenizer it came with."
        )
    return ids


def weights_name(files: FolderFiles) -> str:
    """The state dict in a folder: the file itself, a usual name, or the newest `checkpoint_<n>`."""
    if files.file is not None:
        return files.file.name
    numbered = sorted((int(match[1]), name) for name in files.names if (match := re.fullmatch(r"checkpoint_(\d+)", name)))
    usual = [name for name in ("model.safetensors", "pytorch_model.bin") if name in files.names]
    return (usual or [name for _, name in numbered[-1:]] or [""])[0]


def inner(state: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's own names; the alias of the embedding is checked where values are at hand, and dropped."""
    names = {key.removeprefix(PREFIX): value for key, value in state.items() if key != ALIAS}
    table = names.get("transformer.wte.weight", names.get("model.embed_tokens.weight"))
    alias = state.get(ALIAS)
    if isinstance(alias, torch.Tensor) and isinstance(table, torch.Tensor) and not same_tensor(alias, table):
        raise CheckpointError(f"{ALIAS!r} differs from the embedding table it is an alias of.")
    return names


def _nothing_else(names: Mapping[str, Any]) -> bool:
    return all(key.startswith(("transformer.", "model.", "lm_head.")) for key in names)


def _settings(answers: Mapping[str, Any], rows: int, tokenizer: Any, mode: str) -> CoconutSettings:
    """Settings of an official state dict: the last three rows are the added tokens, the one before them ends GPT-2's answers."""
    mode = answers.get("mode", mode)
    eos = answers.get("eos_id", rows - 4 if mode in ("coconut", "pause") else rows - 1)
    if tokenizer is not None and "eos_id" not in answers:
        eos = tokenizer.eos_token_id
    if mode not in ("coconut", "pause"):
        return CoconutSettings.check(mode=mode, eos_id=eos)
    added = dict(start_id=rows - 3, end_id=rows - 2, latent_id=rows - 1)
    return CoconutSettings.check(mode=mode, thoughts=asked_thoughts(answers), eos_id=eos, **added)
