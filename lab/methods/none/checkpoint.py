"""Ordinary transformers checkpoints."""

from pathlib import Path
from typing import Any

from lab.errors import unknown
from lab.models.backbones import load_backbone
from lab.models.latent_model import LatentModel, tokenizer_of
from lab.models.layouts import FolderFiles, Layout
from lab.models.loading import WEIGHT_FILES

MODEL = LatentModel


class PlainRecogniser:
    """A folder with a transformers `config.json` and weights; asked only when no other method knows the folder."""

    name = "transformers checkpoint (config.json with model_type, weights)"

    def recognise(self, files: FolderFiles) -> Layout | None:
        """Method `none`, where there are a model type and weights."""
        if files.config.get("model_type") and any(name in files.names for name in WEIGHT_FILES):
            return Layout("none", self.name)
        return None

    def load(self, folder: Path, layout: Layout, **answers: Any) -> LatentModel:
        """The backbone with its tokenizer (`tokenizer=` gives another)."""
        tokenizer = answers.pop("tokenizer", None) or tokenizer_of(folder)
        if answers:
            raise unknown("answer", next(iter(answers)), ("tokenizer",))
        return LatentModel(load_backbone(str(folder), dtype="auto"), tokenizer, source=str(folder))


RECOGNISERS = [PlainRecogniser()]
