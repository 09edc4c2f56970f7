"""What the notebooks call: a model to start from, the arms that are compared, evaluation."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset
from lab.data.source import Source, words_of
from lab.errors import unknown
from lab.methods.coconut.config import CoconutSettings, Schedule
from lab.methods.coconut.data import prepare
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.train import Stretch, train
from lab.train import TrainSettings

ARMS = ("coconut", "no_cot", "cot", "no_thoughts", "pause", "no_curriculum")


def start(backbone: str, source: Source, s: CoconutSettings, seed: int, weights: str = "", **toy: Any) -> CoconutModel:
    """A model to train: a toy with a tokenizer of the source's words, or a pretrained one with its own.

    Args:
        weights: a written-reasoning checkpoint to begin with (a bare state dict, loaded before tokens are added; `coconut.md` 2.6).
        toy: shape of a toy backbone.
    """
    from lab.models.backbones import load_backbone
    from lab.models.loading import load_exact, read_state
    from lab.models.tokenizers import load_tokenizer, word_tokenizer

    if backbone.startswith("toy:"):
        tokenizer = word_tokenizer(words_of((source.train(), source.held_out()), ["###"]))
        body = load_backbone(backbone, seed=seed, vocab_size=len(tokenizer), **toy)
    else:
        tokenizer, body = load_tokenizer(backbone, eos=True), load_backbone(backbone)
    if weights:
        load_exact(body, read_state(weights), what=weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoconutModel.start(body, tokenizer, s)


def arm_of(arm: str, s: CoconutSettings, schedule: Schedule, budget: int = 0) -> tuple[CoconutSettings, Schedule]:
    """Settings and schedule of an arm of the paper's table 1, beside the given ones.

    Args:
        budget: epochs for the arms without stages (what the staged arm took), 0 = as the schedule says.
    """
    if arm not in ARMS:
        raise unknown("arm", arm, ARMS)
    if arm in ("coconut", "pause", "no_thoughts"):
        return s.but(mode=arm), schedule
    epochs = budget or schedule.epochs - schedule.resume
    if arm == "no_curriculum":
        first = s.epochs_per_stage * s.max_latent_stage
        return s.but(mode="coconut"), schedule.but(resume=first, epochs=first + epochs, switch_at=0.0, reset_optimizer="never")
    return s.but(mode=arm), schedule.but(resume=0, epochs=epochs, switch_at=0.0, reset_optimizer="never")


def run_arm(
    arm: str,
    source: Source,
    problems: Dataset,
    s: CoconutSettings,
    schedule: Schedule,
    how: TrainSettings,
    folder: Path,
    logger: Callable[..., None],
    *,
    backbone: str,
    budget: int = 0,
    max_tokens: int = 1024,
    weights: str = "",
    **toy: Any,
) -> dict[str, Any]:
    """Trains one arm, saves it as `folder`/<arm>, and returns its numbers."""
    settings, own = arm_of(arm, s, schedule, budget)
    model = start(backbone, source, settings, how.seed, weights, **toy)
    kept = prepare(problems, model.tokenizer, max_tokens)
    judged = prepare(source.held_out("validation"), model.tokenizer, max_tokens).rows
    found = train(model, kept.rows, judged, own, how, folder / f"training-{arm}", lambda **row: logger(arm=arm, **row))
    model.save(folder / arm, overwrite=True)
    steps = sum(part.steps for part in found)
    last = {"exact": found[-1].exact, "loss": found[-1].loss}
    return {"steps": steps, **last, "stages": stages_text(found), "seconds": sum(part.seconds for part in found), "dropped": kept.note()}


def stages_text(found: Sequence[Stretch]) -> str:
    """ "stage: steps (exact)" of each stretch."""
    return ", ".join(f"{part.stage}: {part.steps} ({part.exact:.2f})" for part in found)


def epochs_of(steps: int, problems: int, batch: int) -> int:
    """Epochs that come to about `steps`, at least one."""
    return max(1, math.ceil(steps * batch / problems))
