"""Small worlds for Think-at-Hard: a base model that really learns, and rows of tokens in the layout of labelled data (tah.md 9.1)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab.data.worlds.pointers import Pointers
from lab.errors import unknown
from lab.methods.tah.data import Row, build_example
from lab.methods.tah.model import TahModel, standard
from lab.methods.tah.training import train_model
from lab.models.backbones import load_backbone
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import bpe_tokenizer, word_tokenizer
from lab.train import TrainSettings

TASKS = {"pointers": "spelled", "arrows": "arrows"}
SHAPE = {"layers": 1, "hidden": 96, "intermediate": 2, "heads": 2, "kv_heads": 2, "head_dim": 32}
SPLITS = {"train": 20_000, "validation": 40_000, "test": 30_000}  # first seeds, far enough apart
BASE_SEED = 10_000


def world(task: str) -> Pointers:
    """The world of a toy task: `pointers` (hardness can be read off the question) or `arrows` (it must be judged)."""
    if task not in TASKS:
        raise unknown("toy task", task, TASKS)
    return Pointers(task=TASKS[task])


def world_rows(task: str, count: int, seed: int, corpus: str = "tuned") -> list[Row]:
    """`count` sequences as rows: `mask` 1 on answers, `hard` 1 on questions that need a second look-up."""
    batch = world(task).batch(count, seed, corpus)
    mask = np.zeros_like(batch.ids)
    mask[:, 1:] = batch.targets[:, :-1] >= 0
    columns = zip(batch.ids.tolist(), mask.tolist(), batch.hard.astype(int).tolist(), strict=True)
    return [{"data_id": i, "real_token": ids, "mask": own, "hard": hard} for i, (ids, own, hard) in enumerate(columns)]


def split_rows(task: str, split: str, count: int, seed: int) -> list[Row]:
    """The sequences of a split; splits and seeds never share a draw."""
    return world_rows(task, count, SPLITS[split] + seed)


def world_base(task: str, seed: int, steps: int, folder: Path) -> LatentModel:
    """A one-layer model trained on the base corpus, in which every question is one look-up, with a word tokenizer."""
    words = world(task).vocabulary
    backbone = load_backbone("toy:qwen3", vocab_size=len(words) + 1, seed=seed, **SHAPE)
    rows = world_rows(task, steps * 64, BASE_SEED + seed, "base")
    examples = [build_example(row["real_token"], row["mask"], None) for row in rows]
    settings = toy_training(steps, lr=3e-3, warmup=100, seed=seed)
    train_model(standard(backbone), examples, settings, folder, label="base model")
    return LatentModel(backbone, word_tokenizer(words, pad="<pad>", eos="<pad>"))


def toy_training(steps: int, lr: float = 2e-3, warmup: int = 50, seed: int = 0, batch: int = 64) -> TrainSettings:
    """Settings of all toy trainings: AdamW (0.9, 0.98), decay 0.01, clip 1, warm-up, then down to a tenth; data in the order given."""
    schedule = {"schedule": "cosine_with_min_lr", "min_lr_ratio": 0.1, "warmup_steps": min(warmup, steps // 2)}
    rest = {"betas": [0.9, 0.98], "weight_decay": 0.01, "clip": 1.0, "order": "as_given", "save_every": 0, "log_every": 50}
    return TrainSettings.check(steps=steps, lr=lr, global_batch=batch, seed=seed, **schedule, **rest)


def text_models(
    texts: Sequence[str], backbone: str, reference: str, vocab: int, steps: tuple[int, int], width: int, seed: int, folder: Path
):
    """A tokenizer, a small model and a reference model, trained from nothing on `texts`; the reference is None where `reference` is empty.

    Args:
        backbone, reference: toy presets. vocab: tokens of the BPE. steps: of the two models, 16 windows of `width` tokens each.
    """
    tokenizer = bpe_tokenizer(texts, vocab, chat=True)
    stream = [token for text in texts for token in tokenizer(text).input_ids]
    windows = [stream[start : start + width] for start in range(0, len(stream) - width, width)]
    examples = [build_example(window, [0] + [1] * (width - 1), None) for window in windows]
    models = []
    for name, count, part in ((backbone, steps[0], "base model"), (reference, steps[1], "reference model")):
        if not name:
            models.append(None)
            continue
        model: TahModel = standard(load_backbone(name, vocab_size=len(tokenizer), seed=seed))
        settings = toy_training(count, lr=2e-3, seed=seed, batch=16).but(order="shuffle")
        train_model(model, examples, settings, folder / part.split()[0], label=part)
        models.append(model.backbone)
    return tokenizer, models[0], models[1]


def arithmetic(steps: int, seed: int, folder: Path) -> tuple[LatentModel, list[str]]:
    """A four-layer model of running sums and products modulo 10, and texts of its language: what the pruning demo prunes."""
    words = [*map(str, range(10)), *(f"{sign}{k}" for sign in "+*" for k in range(1, 10))]
    tokenizer = word_tokenizer(words, pad="<pad>", eos="<pad>")
    rows = _running(steps * 32 + 64, np.random.default_rng(seed))
    examples = [build_example(row, [0] + [1] * (len(row) - 1), None) for row in rows[64:].tolist()]
    model = standard(
        load_backbone("toy:qwen3", vocab_size=len(tokenizer), layers=4, hidden=48, intermediate=96, heads=2, kv_heads=2, seed=seed)
    )
    train_model(model, examples, toy_training(steps, lr=2e-3, seed=seed, batch=32), folder, label="arithmetic model")
    return LatentModel(model.backbone, tokenizer), [tokenizer.decode(row) for row in rows[:64].tolist()]


def _running(count: int, rng: np.random.Generator, terms: int = 8) -> np.ndarray:
    """(count, 1 + 2 terms) token ids: a digit, then (operation, running value) pairs."""
    value = rng.integers(10, size=count)
    columns = [value]
    for _ in range(terms):
        product, operand = rng.random(count) < 0.5, rng.integers(1, 10, size=count)
        value = np.where(product, value * operand, value + operand) % 10
        columns += [9 + operand + 9 * product, value]
    return np.stack(columns, axis=1)
