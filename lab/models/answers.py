"""What a person is asked about a checkpoint that does not say it: which answers are known, which tokenizer, which end token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.errors import unknown
from lab.models.latent_model import tokenizer_of
from lab.models.tokenizers import load_tokenizer

ABOUT_BACKBONE = ("backbone", "config", "heads")


def check_answers(answers: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """SettingsError with the closest match for an answer nobody asked for."""
    for name in answers:
        if name not in known:
            raise unknown("answer", name, known)


def tokenizer_from(answers: Mapping[str, Any], folder: Path) -> Any:
    """The tokenizer given (object, name or folder), that of `backbone=`, or the one in the folder; None if there is none."""
    given = answers.get("tokenizer")
    if given is not None:
        return load_tokenizer(given) if isinstance(given, str) else given
    own, backbone = tokenizer_of(folder), str(answers.get("backbone") or "")
    if own is not None or not backbone:
        return own
    return tokenizer_of(Path(backbone)) if Path(backbone).is_dir() else load_tokenizer(backbone)


def end_id(answers: Mapping[str, Any], config: Any, tokenizer: Any) -> int:
    """The id that ends an answer."""
    found = answers.get("eos_id", None if tokenizer is None else tokenizer.eos_token_id)
    found = getattr(config, "eos_token_id", None) if found is None else found
    return -1 if found is None else found
