"""What the notebooks call: a model to start from (a toy learns to reason in writing first), and the arms."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset
from lab.data.source import Source, words_of
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.data import PREFIX, prepare
from lab.methods.codi.model import CodiModel
from lab.methods.codi.train import arm_settings, train
from lab.train import TrainSettings


def base(backbone: str, source: Source, seed: int, **toy: Any) -> tuple[Any, Any]:
    """(backbone, tokenizer): a toy with a tokenizer of the source's words, or a pretrained one with its own."""
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import load_tokenizer, word_tokenizer

    if not backbone.startswith("toy:"):
        return load_backbone(backbone), load_tokenizer(backbone, eos=True)
    tokenizer = word_tokenizer(words_of((source.train(), source.held_out()), PREFIX.split()))
    return load_backbone(backbone, seed=seed, vocab_size=len(tokenizer), **toy), tokenizer


def warm_up(body: Any, tokenizer: Any, problems: Dataset, s: CodiSettings, how: TrainSettings, folder: Path, logger: Callable) -> float:
    """Teaches a toy backbone (in place) to reason in writing, so that it plays a pretrained one; the last training loss.

    A target that cannot reason gives a perfect distillation loss and nothing to learn (`distill.md` 9).
    """
    model = dressed(copy.deepcopy(body), tokenizer, arm_settings("cot", s.but(lora_r=0)), how.seed)
    rows = prepare(problems, model.tokenizer, model.config, body.config.model_type).rows
    found = train(model, rows, how, folder, lambda **row: logger(arm="warm-up", **row), arm="cot")
    size = body.get_input_embeddings().weight.shape[0]
    state = {key: value[:size] if value.shape[:1] == (size + 3,) else value for key, value in model.backbone.state_dict().items()}
    body.load_state_dict(state)
    return found.loss


def dressed(body: Any, tokenizer: Any, s: CodiSettings, seed: int) -> CodiModel:
    """A CODI model around `body` (used, not copied), its new weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CodiModel.start(body, copy.deepcopy(tokenizer), s)


def run_arm(
    arm: str,
    body: Any,
    tokenizer: Any,
    problems: Dataset,
    held_out: Dataset,
    s: CodiSettings,
    how: TrainSettings,
    folder: Path,
    logger: Callable,
) -> dict[str, Any]:
    """Trains one arm from a copy of `body`, saves it as `folder`/<arm>, and returns its numbers."""
    model = dressed(copy.deepcopy(body), tokenizer, arm_settings(arm, s), how.seed)
    family = body.config.model_type
    kept = prepare(problems, model.tokenizer, model.config, family)
    judged = prepare(held_out, model.tokenizer, model.config, family).rows
    log = lambda **row: logger(arm=arm, **row)  # noqa: E731 - one line that names the arm
    found = train(model, kept.rows, how, folder / f"training-{arm}", log, arm=arm, held_out=judged)
    model.save(folder / arm, overwrite=True)
    return {"loss": found.loss, "steps": found.steps, "learning": found.learning, "seconds": found.seconds, "dropped": kept.note()}
