"""What `lab.load` returns: a backbone, its tokenizer, the method's own weights and settings, behind the same four calls for every method.

Our format on disk is a folder: `lab.json` (format, method, settings), the backbone as transformers saves it, `parts.safetensors` and the
tokenizer. A method's package adds a subclass as `MODEL` in its `checkpoint.py`; files are written whole or not at all.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lab.config import Settings
from lab.errors import CheckpointError, RunError, SettingsError
from lab.files import write_json, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT, MANIFEST, PARTS = 1, "lab.json", "parts.safetensors"


class LatentModel(nn.Module):
    """A model that thinks; the base class is the plain backbone (method `none`).

    Attributes:
        backbone: the causal language model. tokenizer: its tokenizer, or None.
        parts: the method's own weights. settings: the method's settings, as JSON holds them.
        source: where it was loaded from ("" if made here).
        answers: names that `opened` takes.
    """

    method = "none"
    answers: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        settings: Settings | Mapping[str, Any] | None = None,
        parts: nn.Module | None = None,
        source: str = "",
    ):
        super().__init__()
        self.backbone, self.tokenizer, self.source = backbone, tokenizer, source
        self.parts = nn.Module() if parts is None else parts
        self.settings = settings.model_dump(mode="json") if isinstance(settings, Settings) else dict(settings or {})

    @classmethod
    def build(
        cls, backbone: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", settings: Mapping[str, Any], source: str = ""
    ) -> Self:
        """A model of these settings with its parts in place but not yet loaded; methods with parts override it."""
        return cls(backbone, tokenizer, settings, source=source)

    def opened(self, **answers: Any) -> None:
        """Called when the model was read from our own format, with what the caller of `lab.load` said; methods may refuse."""

    @cached_property
    def decoder(self) -> Any:
        """The decoder step over the backbone, made at first use (add tokens before, not after)."""
        from lab.models.decoder import decoder_for

        return decoder_for(self.backbone)

    def step_by_transformers(self) -> None:
        """From now on every step is the backbone's own forward (`lab.load(forward="transformers")`)."""
        from lab.models.hf_decoder import HFDecoder

        if not isinstance(type(self).decoder, cached_property):
            raise SettingsError(f"Models of method {self.method!r} need lab's own step; load with forward='own'.")
        self.__dict__["decoder"] = HFDecoder(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self.backbone.device

    def generate(self, questions: Sequence[Any], samples: int = 1, **options: Any) -> Any:
        """`samples` answers to each question, as a result that becomes a `Trace`; done by `generate` of the method's `policy` module.

        Args:
            questions: text, `Example`s, or lists of token ids (see `prompt_ids`).
            options: of the method; budgets, sampling, seed.
        """
        policy = import_module(f"lab.methods.{self.method}.policy")
        return policy.generate(self, questions, samples=samples, **options)

    def prompt_ids(self, question: Any, *, thinking: bool | None = None) -> list[int]:
        """Token ids of one prompt: ids as they are; text, or the text of an `Example`, as a user turn where there is a chat template."""
        if not isinstance(question, str) and not hasattr(question, "question"):
            return [int(i) for i in question]
        if self.tokenizer is None:
            raise SettingsError("This model has no tokenizer, so it reads token ids only; load it with tokenizer=… to read text.")
        text = question if isinstance(question, str) else question.question
        if not self.tokenizer.chat_template:
            return self.tokenizer(text).input_ids
        switch = {} if thinking is None else {"enable_thinking": thinking}
        turn = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, **switch)["input_ids"]

    def save(self, folder: Path | str, *, with_backbone: bool = True, overwrite: bool = False) -> Path:
        """Write the model as a folder that `lab.load` opens, whole or not at all.

        Args:
            with_backbone: False writes the backbone's name instead of its weights (for a frozen one that has a name).
            overwrite: replace the folder, with everything in it.

        Raises:
            RunError: the folder holds something already (and not `overwrite`), or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise RunError(f"{str(folder)!r} holds files already; choose another folder, or pass overwrite=True.")
        name = self.backbone.name_or_path
        if not with_backbone and not name:
            raise SettingsError("This backbone was made here and has no name to refer to; save it with_backbone=True.")
        with new_folder(folder) as temporary:
            self._write(temporary, "" if with_backbone else name)
        return folder

    def _write(self, folder: Path, backbone_name: str) -> None:
        from safetensors.torch import save_model

        from lab.models.backbones import quiet

        if not backbone_name:
            with quiet():
                self.backbone.save_pretrained(folder)
        if any(True for _ in self.parts.state_dict()):
            save_model(self.parts, str(folder / PARTS))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        write_json(folder / MANIFEST, {"format": FORMAT, "method": self.method, "settings": self.settings, "backbone": backbone_name})


def load_own(folder: Path, dtype: str = "auto", **answers: Any) -> LatentModel:
    """The model in a folder of our own format; `answers` as its class names them."""
    from lab.models.backbones import load_backbone
    from lab.models.loading import load_exact, read_state

    manifest = read_manifest(folder)
    backbone = load_backbone(manifest["backbone"] or str(folder), dtype=dtype)
    kind = model_class(manifest["method"])
    model = kind.build(backbone, tokenizer_of(folder), manifest["settings"], source=str(folder))
    if not (folder / PARTS).is_file() and len(model.parts.state_dict()):
        raise CheckpointError(f"{str(folder)!r} has no {PARTS}, which a model of method {manifest['method']!r} needs.")
    load_exact(model.parts, read_state(folder / PARTS) if (folder / PARTS).is_file() else {}, what=f"{folder.name}/{PARTS}")
    model.opened(**answers)
    return model.eval()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of `lab.json`; CheckpointError for a format of another version or a missing entry."""
    from lab.models.loading import read_json

    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{str(folder / MANIFEST)!r} has format {found!r}; this version of lab reads format {FORMAT}.")
    if lost := [key for key in ("method", "settings", "backbone") if key not in manifest]:
        raise CheckpointError(f"{str(folder / MANIFEST)!r} lacks {', '.join(lost)}.")
    return manifest


def model_class(method: str) -> type[LatentModel]:
    """The class of `method`'s models: `MODEL` in its `checkpoint` module."""
    try:
        return import_module(f"lab.methods.{method}.checkpoint").MODEL
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("lab.methods"):
            raise
        raise CheckpointError(f"The checkpoint is of method {method!r}, which this version of lab does not have.") from None


def tokenizer_of(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a folder, or None if it holds none."""
    from lab.models.tokenizers import load_tokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
    return load_tokenizer(str(folder)) if any((folder / name).is_file() for name in names) else None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    Raises RunError where it cannot be written, saying why (a full disk, a read-only place).
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with _safetensors_errors():
                yield temporary
            temporary.chmod(0o755)
            _replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, old: Path) -> None:
    aside = new.with_name(new.name + ".old")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _safetensors_errors() -> Iterator[None]:
    """Turns the I/O errors of safetensors, which are not OSErrors, into OSErrors with their number."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
