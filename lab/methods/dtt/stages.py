"""The steps of the pipeline as one call each, on folders of earlier steps; a notebook calls them and shows what they return."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import files
from lab.data import load_benchmark
from lab.data.examples import Example
from lab.data.worlds.permutations import Permutations
from lab.errors import RunError, SettingsError
from lab.launch import on_main
from lab.methods.dtt.config import BOT, EOT, GatedSettings, LoraSettings
from lab.methods.dtt.data import WrittenRow, collate, prepare
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.objective import gated_warm_up, targets, warm_up
from lab.methods.dtt.reinforce import GatedThinking, GateLearning
from lab.methods.dtt.reward import RewardSettings, rewards_of
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer, word_tokenizer
from lab.rl import RLSettings, reinforce
from lab.train import TrainSettings, fit

TOY = "permutations"
SHAPE = {"layers": 2, "hidden": 64, "intermediate": 256, "heads": 4, "max_positions": 32}
FIRST = {"train": 0, "train2": 1_000_000, "test": 2_000_000}  # seeds of the toy's splits, far apart
ARMS = {
    "pathwise": {"credit": "pathwise"},
    "policy": {"credit": "policy"},
    "none": {"credit": "none"},
    "closed": {"credit": "none", "forced": "closed"},
}


def examples(benchmark: str, split: str, count: int = 0, seed: int = 0, data: str = "") -> Sequence[Example]:
    """Examples of a benchmark, or of the toy world: half of its chains are reasoned slowly and announce it by F before [bot]."""
    if benchmark != TOY:
        return load_benchmark(benchmark, "test" if split == "test" else "train", data, limit=count or None)
    made = Permutations(table_seed=seed).examples(count, FIRST[split] + seed, slow=0.5 if split != "test" else 0.0)
    return [Example(e.id, e.question, e.steps, e.answer, (), {"before": "F"} if e.extra["slow"] else {}) for e in made]


def fresh(backbone: str, benchmark: str, gated: dict[str, Any], seed: int) -> SparseGatedModel:
    """An untrained gated model on a backbone; the toy world brings its own words."""
    s = GatedSettings.check(**gated)
    torch.manual_seed(seed)
    if benchmark != TOY:
        return SparseGatedModel.start(load_backbone(backbone), load_tokenizer(backbone), s)
    tokenizer = word_tokenizer(Permutations(table_seed=seed).vocabulary, special=(BOT, EOT))
    shape = SHAPE if backbone == "toy:gpt2" else {}
    return SparseGatedModel.start(load_backbone(backbone, vocab_size=len(tokenizer), seed=seed, **shape), tokenizer, s)


def run_warm_up(
    folder: str,
    backbone: str,
    benchmark: str,
    gated: dict[str, Any],
    training: dict[str, Any],
    gated_training: dict[str, Any],
    rows: int = 0,
    seed: int = 0,
    data: str = "",
    projection: str = "ridge",
    max_prompt_length: int = 512,
) -> dict[str, Any]:
    """Warm-up on `[bot] steps [eot] answer`, the projection's start, the gated warm-up; the model is saved in `folder`/model.

    Args:
        training, gated_training: of `TrainSettings`; the second is skipped where it is empty (HRPO starts from the model as it is).
        projection: ridge (regression to the next token's embedding), norm (same length as embeddings), default (PyTorch's).
    """
    model = fresh(backbone, benchmark, gated, seed)
    found = prepare(examples(benchmark, "train", rows, seed, data), model.tokenizer, model.config, max_prompt_length).rows
    batch, numbers = partial(collate, s=model.config), {"examples": len(found)}
    if training:
        done = fit(model, found, batch, warm_up, TrainSettings.check(**training), Path(folder) / "warm_up", count=targets, label="warm-up")
        numbers |= {"warm_up_loss": done.loss, "warm_up_seconds": done.seconds}
    if model.config.gate == "dtt":
        numbers |= _start_projection(model, found, projection)
    if gated_training:
        how = TrainSettings.check(**gated_training)
        done = fit(model, found, batch, gated_warm_up(), how, Path(folder) / "gated", count=targets, label="gated warm-up")
        numbers |= {"gated_loss": done.loss, "gated_seconds": done.seconds}
    on_main(lambda: str(model.save(Path(folder) / "model", overwrite=True)))
    return numbers


def _start_projection(model: SparseGatedModel, rows: Sequence[WrittenRow], how: str) -> dict[str, float]:
    some = [collate(rows[start : start + 64], model.config).to(model.device) for start in range(0, min(len(rows), 512), 64)]
    if how == "norm":
        model.match_norms(some)
    elif how not in ("ridge", "default"):
        raise SettingsError(f"projection = {how!r}: it is ridge, norm or default.")
    return {"projection_r2": model.fit_projection(some)} if how == "ridge" else {}


def run_arm(
    arm: str,
    model: str,
    folder: str,
    benchmark: str,
    rl: dict[str, Any],
    rewards: dict[str, Any],
    gate: dict[str, Any],
    lora: dict[str, Any] | None = None,
    rows: int = 0,
    seed: int = 0,
    data: str = "",
    max_prompt_length: int = 512,
) -> dict[str, Any]:
    """GRPO of one arm (see `ARMS`) from the checkpoint `model` to `folder`/<arm>; plain arguments, so that processes can share it."""
    from lab.methods.dtt.trainer import CustomGRPOTrainer

    if arm not in ARMS:
        raise SettingsError(f"There is no arm {arm!r}; choose among {', '.join(ARMS)}.")
    chosen, settings, reward = dict(ARMS[arm]), RLSettings.check(**rl), RewardSettings.check(**rewards)
    learner = load(model, dtype="float32", **({} if Path(model, "lab.json").is_file() else {"method": "dtt"}))
    learner.gate.forced = chosen.pop("forced", "")
    learner.settings = learner.config.but(forced=learner.gate.forced).model_dump(mode="json")
    if lora and lora.get("rank"):
        learner.add_lora(LoraSettings.check(**lora))
    thinking = GatedThinking(learner, GateLearning.check(**gate, **chosen, weight=reward.gate_penalty_coeff))
    if settings.beta:
        thinking.hold_reference()
    asked = examples(benchmark, "train2", rows, seed, data)
    kept = prepare(asked, learner.tokenizer, learner.config, max_prompt_length)
    answers = {example.id: example.answer for example in asked}
    result = reinforce(
        learner,
        thinking,
        [row.prompt for row in kept.rows],
        {"answer": [answers[name] for name in kept.ids]},
        rewards_of(learner.tokenizer, learner.config, reward),
        settings,
        Path(folder) / f"training-{arm}",
        label=f"GRPO, {arm}",
        trainer_class=CustomGRPOTrainer,
    )
    on_main(lambda: str(learner.save(Path(folder) / arm, overwrite=True)))
    row = result.row
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "reward": row.get("reward"),
        "correctness": row.get("rewards/correctness/mean"),
        "largest_gap": _largest_gap(Path(folder) / f"training-{arm}"),
    }


def _largest_gap(folder: Path) -> float:
    gaps = [row["logp_gap"] for row in files.read_lines(folder / "metrics.jsonl") if "logp_gap" in row]
    return max(gaps, default=float("nan"))


def model_of(folder: Path, arm: str) -> Path:
    """The folder of an arm's model in a train step; RunError naming those there are."""
    if not (folder / arm).is_dir():
        there = sorted(path.name for path in folder.iterdir() if (path / "lab.json").is_file())
        raise RunError(f"{folder} holds no arm {arm!r}; it has {', '.join(there) or 'none'}.")
    return folder / arm
