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
from lab.evaluate import Decoding
from lab.latent.sampling import Sampling
from lab.launch import on_main
from lab.methods.dtt.config import BOT, EOT, MARKER, GatedSettings, LoraSettings
from lab.methods.dtt.data import WrittenRow, collate, prepare
from lab.methods.dtt.evaluate import evaluate_gated, judge
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.objective import gated_warm_up, targets, warm_up
from lab.methods.dtt.plan import SHAPE
from lab.methods.dtt.reinforce import GatedThinking, GateLearning
from lab.methods.dtt.reward import RewardSettings, rewards_of
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer, word_tokenizer
from lab.rl import RLSettings, reinforce
from lab.train import TrainSettings, fit
from lab.training.optim import Group

TOY = "permutations"
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
        if backbone.startswith("toy:"):
            raise SettingsError(
                f"{backbone!r} knows no words but those of benchmark = {TOY}; name a pretrained backbone for {benchmark!r}."
            )
        return SparseGatedModel.start(load_backbone(backbone), load_tokenizer(backbone), s)
    words = [*Permutations(table_seed=seed).vocabulary, *([MARKER] if s.gate == "hrpo" else [])]
    tokenizer = word_tokenizer(words, special=(BOT, EOT))
    shape = SHAPE if backbone == "toy:gpt2" else {}
    return SparseGatedModel.start(load_backbone(backbone, vocab_size=len(tokenizer), seed=seed, **shape), tokenizer, s)


def gated_model(path: Path | str, **options: Any) -> SparseGatedModel:
    """The gated model at `path`, in any layout; SettingsError for a model without a gate."""
    model = load(path, **options)
    if not isinstance(model, SparseGatedModel):
        raise SettingsError(f"{path} is no gated model; step warm_up with backbone={str(path)!r} gives it a gate and the format.")
    return model


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
    lr_gate: float = 2e-2,
    lr_lambda: float = 1e-3,
    gated: dict[str, Any] | None = None,
    rows: int = 0,
    seed: int = 0,
    data: str = "",
    max_prompt_length: int = 512,
) -> dict[str, Any]:
    """GRPO of one arm (see `ARMS`) from the checkpoint `model` to `folder`/<arm>; plain arguments, so that processes can share it.

    Args:
        model: a checkpoint of a gated model in any layout; or, with settings `gated`, a plain backbone that gets a gate.
        rl: of `RLSettings`. rewards: of `RewardSettings`. gate: of `GateLearning`. lora: of `LoraSettings`.
        lr_gate, lr_lambda: learning rates of the gate, and of HRPO's Lambda; all else learns at the rate in `rl`.
    """
    from lab.methods.dtt.trainer import CustomGRPOTrainer

    if arm not in ARMS:
        raise SettingsError(f"There is no arm {arm!r}; choose among {', '.join(ARMS)}.")
    settings, reward, training = RLSettings.check(**rl), RewardSettings.check(**rewards), Path(folder) / f"training-{arm}"
    learner = gated_model(model, dtype="float32") if gated is None else fresh(model, benchmark, gated, seed)
    _adapt(learner, ARMS[arm].get("forced", ""), lora)
    learning = GateLearning.check(**gate, credit=ARMS[arm]["credit"], weight=reward.gate_penalty_coeff)
    thinking = GatedThinking(learner, learning)
    settings = settings.but(groups=gate_groups(learner, lr_gate, lr_lambda, settings.weight_decay))
    if settings.beta:
        thinking.hold_reference()
    prompts, answers = _asked(learner, examples(benchmark, "train2", rows, seed, data), max_prompt_length)
    rewarded = rewards_of(learner.tokenizer, learner.config, reward)
    how = {"label": f"GRPO, {arm}", "trainer_class": CustomGRPOTrainer}
    result = reinforce(learner, thinking, prompts, {"answer": answers}, rewarded, settings, training, **how)
    on_main(lambda: str(learner.save(Path(folder) / arm, overwrite=True)))
    return _told(result, training)


def _asked(learner: SparseGatedModel, asked: Sequence[Example], longest: int) -> tuple[list[list[int]], list[str]]:
    """Ids of the prompts that can be used, and the answers to them."""
    kept = prepare(asked, learner.tokenizer, learner.config, longest)
    answers = {example.id: example.answer for example in asked}
    return [row.prompt for row in kept.rows], [answers[name] for name in kept.ids]


def _adapt(learner: SparseGatedModel, forced: str, lora: dict[str, Any] | None) -> None:
    """Holds the gates where an arm wants them and adds adapters, if any are asked for."""
    learner.gate.forced = forced
    learner.settings = learner.config.but(forced=forced).model_dump(mode="json")
    if lora and lora.get("rank"):
        learner.add_lora(LoraSettings.check(**lora))


def _told(result: Any, training: Path) -> dict[str, Any]:
    row = result.row
    return {
        "steps": result.steps,
        "seconds": result.seconds,
        "reward": row.get("reward"),
        "correctness": row.get("rewards/correctness/mean"),
        "largest_gap": _largest_gap(training),
    }


def gate_groups(model: SparseGatedModel, gate: float, lam: float, decay: float) -> list[Group]:
    """Learning rates of the gate's own weights; HRPO's all decay, biases too (`dtt.md` 2.6)."""
    if model.config.gate == "hrpo":
        rates = {"thinking_residual_gate": gate, "thinking_residual_Lambda": lam}
        return [Group(match=name, lr=rate, weight_decay=decay) for name, rate in rates.items()]
    return [Group(match="gate_linear", lr=gate)]


def _largest_gap(folder: Path) -> float:
    gaps = [row["logp_gap"] for row in files.read_lines(folder / "metrics.jsonl") if "logp_gap" in row]
    return max(gaps, default=float("nan"))


def model_of(folder: Path, arm: str) -> Path:
    """The folder of an arm's model in a train step; RunError naming those there are."""
    if not (folder / arm).is_dir():
        there = sorted(path.name for path in folder.iterdir() if (path / "lab.json").is_file())
        raise RunError(f"{folder} holds no arm {arm!r}; it has {', '.join(there) or 'none'}.")
    return folder / arm


def evaluate_arms(
    trained: Path, start: Path, folder: Path, benchmark: str, count: int, how: dict[str, Any], seed: int = 0, data: str = "", **options: Any
) -> dict[str, dict[str, Any]]:
    """{arm: numbers} of the warmed-up model `start`/model and of every arm in `trained`, on the same test questions.

    Args:
        how: of `Decoding`. options: of `evaluate_gated`.
    """
    asked = examples(benchmark, "test", count, seed, data)
    there = {"warm_up": start / "model"} | {arm: trained / arm for arm in ARMS if (trained / arm).is_dir()}
    decoding, table = Decoding.check(**how), {}
    for arm, path in there.items():
        table[arm] = evaluate_gated(gated_model(path), asked, benchmark, folder / arm, decoding, label=arm, **options)
    return table


def differences(table: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the claim is about, of the pathwise arm and beside it: accuracy kept, gates inside and outside, shorter reasoning."""
    names = {"accuracy": "accuracy", "inside": "avg_gate_inside", "outside": "avg_gate_outside", "steps": "avg_latent_steps"}
    flat = {f"{arm}_{short}": row[name] for arm, row in table.items() for short, name in names.items()}
    if {"warm_up", "pathwise"} <= table.keys():
        flat |= {"accuracy_change": flat["pathwise_accuracy"] - flat["warm_up_accuracy"]}
        flat |= {"steps_change": flat["pathwise_steps"] - flat["warm_up_steps"]}
    return flat


def trace_of(path: Path, questions: Sequence[Example], seed: int, max_new_tokens: int, temperature: float, drawn: bool):
    """The trace of a checkpoint's answers, judged; `seed` keys the draws."""
    model = gated_model(path)
    answers = model.generate(questions, sampling=Sampling(temperature=temperature), max_new_tokens=max_new_tokens, seed=seed, drawn=drawn)
    return answers.trace(questions, lambda text, gold: judge(text, Example("", "", (), gold), "", model.config.gate))
