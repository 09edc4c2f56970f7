"""What the notebooks call: models to start from, SFT, RL, and the two ways of counting how long a model thinks."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset, Example
from lab.errors import SettingsError
from lab.latent.record import Responses
from lab.latent.sampling import Sampling
from lab.methods.adaptive import toy
from lab.methods.adaptive.config import COLON, MARKER, AdaptiveSettings, Distil, from_official
from lab.methods.adaptive.data import Prepared, Writer, prepare, slice_of, unusable
from lab.methods.adaptive.model import AdaptiveModel
from lab.methods.adaptive.objective import SFT, batch_of
from lab.methods.adaptive.options import Resolved
from lab.methods.adaptive.policy import generate
from lab.methods.adaptive.reinforce import TOLERANCE, AdaptiveThinking, LengthReward, answer_of, first_number, rewards_of
from lab.rl import RLSettings, reinforce
from lab.train import TrainResult, TrainSettings, fit

log = logging.getLogger(__name__)

TOY = "toy"
_BENCHMARKS = {"gsm8k-aug": "gsm8k_aug", "gsm8k-aug-nl": "gsm8k_aug"}


# ---- data and models ----


@dataclass(frozen=True)
class Source:
    """Where problems come from: the toy world (`world` is not empty), or a benchmark named by the option strings in `data`."""

    world: str = TOY
    data: str = ""
    train_problems: int = 20000
    test_problems: int = 1000
    seed: int = 0

    def train(self, name: str, share: float | None, last: bool = False) -> Dataset:
        """The training problems; `share` of the seed-42 shuffle (the last part for RL)."""
        if self.world:
            made = toy.examples(self.train_problems, 1_000_003 * (self.seed + 1))
            return made if share is None else slice_of(made, share, last)
        from lab.data import load_benchmark

        loaded = load_benchmark(_BENCHMARKS[name], "train", self.data)
        return loaded if share is None else slice_of(loaded, share, last)

    def held_out(self, name: str, split: str, limit: int | None = None) -> Dataset:
        """The problems of a validation or test split."""
        if self.world:
            return toy.examples(limit or self.test_problems, 77 if split == "validation" else 78)
        from lab.data import load_benchmark

        return load_benchmark(_BENCHMARKS[name], split, self.data, limit=limit)


def start_model(name: str, latent: Mapping[str, Any] | None, lora: Mapping[str, Any], seed: int, dtype: str = "float32") -> AdaptiveModel:
    """A model to train: `toy` or `toy:…` for a random one, else a hub id or folder; LoRA around it where asked for."""
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import load_tokenizer

    settings = from_official(latent) if latent else AdaptiveSettings(filter="none")
    if name == TOY or name.startswith("toy:"):
        tokenizer = toy.tokenizer()
        backbone = load_backbone("toy:llama-tiny" if name == TOY else name, vocab_size=len(tokenizer), seed=seed, max_positions=64)
        dressed = 1
    else:
        tokenizer, backbone, dressed = load_tokenizer(name), load_backbone(name, dtype=dtype), 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dress = partial(AdaptiveModel.start, multiple=dressed) if latent else AdaptiveModel
        model = dress(backbone, tokenizer, settings)
        if lora:
            model.add_lora(lora["r"], lora["lora_alpha"], lora.get("lora_dropout", 0.0), lora["target_modules"])
    return model


def warm_up(
    model: AdaptiveModel, data: Sequence[Example], steps: int, folder: Path, seed: int, logger: Callable | None = None
) -> TrainResult:
    """Teaches a random toy the written reasoning, so that it plays the part of a pretrained base."""
    settings = TrainSettings(
        steps=steps, global_batch=64, lr=2e-3, warmup_steps=20, schedule="linear", save_every=0, seed=seed, device="cpu"
    )
    return train_sft(model, data, Distil(mode="cot"), settings.but(betas=[0.9, 0.98], weight_decay=0.01), folder, logger)[0]


# ---- SFT ----


def train_sft(
    model: AdaptiveModel,
    data: Sequence[Example],
    distil: Distil,
    settings: TrainSettings,
    folder: Path,
    logger: Callable | None = None,
    validate: Callable[[Any], Mapping[str, float]] | None = None,
) -> tuple[TrainResult, Prepared]:
    """Trains in place and notes in the model what its head and its number of thoughts were trained on."""
    rows = prepare(data, Writer(model.tokenizer, model.config, distil))
    if rows.dropped:
        log.warning(rows.note())
    loss = SFT(distil)
    result = fit(model, rows.rows, batch_of, loss, settings, folder, logger, count=loss.count, validate=validate, label=distil.mode)
    if distil.mode == "latent":
        counts = set(rows.counts)
        fixed = counts.pop() if len(counts) == 1 else None
        model.but(head_trained=not distil.mask_thought_labels, most_trained=max(rows.counts), fixed_count=fixed)
    return result, rows


def fitting(resolved: Resolved, **changes: Any) -> TrainSettings:
    """The optimisation of resolved option strings; `changes` that are not 0, "" or None overrule them."""
    kept = {name: value for name, value in changes.items() if value not in (0, "", None)}
    values = {**resolved.fitting, **kept}
    if "steps" in kept:
        values["epochs"] = 0.0
    return TrainSettings.check(**values)


# ---- evaluation ----


def evaluate(
    model: AdaptiveModel, data: Sequence[Example], thoughts: int | None = None, *, sampling: Sampling | None = None, **options: Any
) -> tuple[dict[str, float], Responses]:
    """Accuracy by the paper's rule and both ways of counting thoughts, with the answers (2B.6).

    `thoughts` is the mean number of latent steps, `length` the paper's count (START and STOP included, or the text's tokens),
    over answers of the right form; `capped` the share that had to be stopped.
    """
    found = generate(model, data, thoughts=thoughts, sampling=sampling, **options)
    every = [
        _scored(row, example, model)
        for row, example in zip(found.rows, [e for e in data for _ in range(options.get("samples", 1))], strict=True)
    ]
    formed = [row for row in every if row["formed"]]
    lengths = [row["length"] for row in formed]
    return {
        "score": statistics.fmean(row["correct"] for row in every),
        "thoughts": statistics.fmean(row["thoughts"] for row in formed) if formed else float("nan"),
        "length": statistics.fmean(lengths) if lengths else float("nan"),
        "length_std": statistics.pstdev(lengths) if lengths else float("nan"),
        "length_min": min(lengths, default=float("nan")),
        "length_max": max(lengths, default=float("nan")),
        "bad_format": 1 - len(formed) / len(every),
        "cut_off": statistics.fmean(row["cut"] for row in every),
        "capped": statistics.fmean(row["capped"] for row in every),
        "questions": float(len(data)),
    }, found


def _scored(row: Any, example: Example, model: AdaptiveModel) -> dict[str, float]:
    value, gold = answer_of(row.text), first_number(example.answer)
    before, mark, _ = row.text.lower().rpartition((MARKER + COLON).lower())
    written = 0 if model.config.latent or not mark else len(Writer(model.tokenizer, model.config).piece(before))
    return {
        "correct": value is not None and gold is not None and abs(value - gold) < TOLERANCE,
        "formed": bool(mark),
        "thoughts": row.thoughts,
        "length": row.thoughts + 2 if model.config.latent else written,
        "cut": row.finish == "length",
        "capped": row.capped,
    }


def validator(data: Sequence[Example], thoughts: int | None = None, **options: Any) -> Callable[[AdaptiveModel], dict[str, float]]:
    """A function that `fit` calls to validate: the score and how long the model thinks."""
    kept = ("score", "thoughts", "length", "bad_format", "cut_off")

    def run(model: AdaptiveModel) -> dict[str, float]:
        table, _ = evaluate(model, data, thoughts, **options)
        return {name: table[name] for name in kept if table[name] == table[name]}

    return run


def by_count(model: AdaptiveModel, data: Sequence[Example], counts: Sequence[int], **options: Any) -> list[dict[str, float]]:
    """Accuracy with each given number of thoughts; `beyond` marks more than training showed."""
    most = model.config.most_trained
    return [
        {"thoughts": count, "score": evaluate(model, data, count, **options)[0]["score"], "beyond": bool(most and count > most)}
        for count in counts
    ]


# ---- RL ----


def reinforce_length(
    model: AdaptiveModel,
    data: Sequence[Example],
    settings: RLSettings,
    folder: Path,
    *,
    how: LengthReward | None = None,
    most: int = 0,
    longest_prompt: int = 100,
    keep_negative: bool = False,
    logger: Callable | None = None,
    validate: Callable[[Any], Mapping[str, float]] | None = None,
) -> TrainResult:
    """RL on the number of thoughts, in place (2B.7).

    Args:
        most: thoughts at which a row is stopped; 0 = twice the largest count in training, as far as a completion has room.
        longest_prompt: longer prompts are left out. keep_negative: also problems with negative answers, which SFT leaves out.
    """
    writer = Writer(model.tokenizer, model.config)
    kept = [example for example in data if not unusable(example, Distil(mode="no cot", remove_negative=not keep_negative))]
    asked = [(writer.prompt(example.question), example.answer) for example in kept]
    asked = [(ids, answer) for ids, answer in asked if len(ids) <= longest_prompt]
    if not asked:
        raise SettingsError(f"No prompt has at most {longest_prompt} tokens and a numeric answer.")
    thinking = AdaptiveThinking(model, most or min(model.config.cap, max(1, settings.longest // 2)))
    thinking.hold_reference()
    columns = {"label": [answer for _, answer in asked], "prompt_id": list(range(len(asked)))}
    prompts = [ids for ids, _ in asked]
    rewards = rewards_of(how or LengthReward())
    return reinforce(model, thinking, prompts, columns, rewards, settings, folder, logger, validate=validate)
