"""What the notebooks call to train: data and models to start from, SFT and its arms, RL."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset, Example
from lab.errors import SettingsError, unknown
from lab.methods.adaptive import toy
from lab.methods.adaptive.config import AdaptiveSettings, Distil, from_official
from lab.methods.adaptive.data import Prepared, Writer, prepare, slice_of, unusable
from lab.methods.adaptive.model import AdaptiveModel
from lab.methods.adaptive.objective import SFT, batch_of
from lab.methods.adaptive.options import Resolved
from lab.methods.adaptive.reinforce import AdaptiveThinking, LengthReward, rewards_of
from lab.rl import RLSettings, reinforce
from lab.train import TrainResult, TrainSettings, fit
from lab.training.optim import Group

log = logging.getLogger(__name__)

TOY = "toy"
TOY_TRAINING = (
    "gsm8k-aug/latent_plus_1_by_1_max_6/codi_loss_5/calc_smooth_l1/norm_layerwise_std/batch_size_64/steps_500/lr_2e-3/max_grad_norm_2"
)
TOY_RL = "batch_size_128/rel_len_penalty_1e-4/rel_len_acc_req_ALL/rel_len_reward_1e-1"
_SPARED = Group(match=r"^parts\._\w+_embed", weight_decay=0.0)
_BENCHMARKS = {"gsm8k-aug": "gsm8k_aug", "gsm8k-aug-nl": "gsm8k_aug"}


# ---- data and models ----


@dataclass(frozen=True)
class Source:
    """Where problems come from: the toy world (`world` is not empty), or a benchmark named by the option strings in `data`."""

    world: str = toy.PERMUTATIONS
    data: str = ""
    train_problems: int = 20000
    test_problems: int = 1000
    seed: int = 0

    def train(self, name: str, share: float | None, last: bool = False) -> Dataset:
        """The training problems; `share` of the seed-42 shuffle (the last part for RL)."""
        if self.world:
            made = toy.examples(self.train_problems, 1_000_003 * (self.seed + 1), self.world)
            return made if share is None else slice_of(made, share, last)
        from lab.data import load_benchmark

        loaded = load_benchmark(_BENCHMARKS[name], "train", self.data)
        return loaded if share is None else slice_of(loaded, share, last)

    def held_out(self, name: str, split: str, limit: int | None = None) -> Dataset:
        """The problems of a validation or test split."""
        if self.world:
            return toy.examples(limit or self.test_problems, 77 if split == "validation" else 78, self.world)
        from lab.data import load_benchmark

        return load_benchmark(_BENCHMARKS[name], split, self.data, limit=limit)


def start_model(name: str, latent: Mapping[str, Any] | None, lora: Mapping[str, Any], seed: int, dtype: str = "float32") -> AdaptiveModel:
    """A model to train: `toy` or `toy:…` for a random one, else a hub id or folder; LoRA around it where asked for."""
    from lab.models.backbones import load_backbone
    from lab.models.tokenizers import load_tokenizer

    settings = from_official(latent) if latent else AdaptiveSettings(filter="none")
    if name == TOY or name.startswith("toy:"):
        tokenizer, dressed = toy.tokenizer(), 1
        backbone = toy.backbone("toy:llama-tiny" if name == TOY else name, len(tokenizer), seed)
    else:
        tokenizer, backbone, dressed = load_tokenizer(name), load_backbone(name, dtype=dtype), 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dress = partial(AdaptiveModel.start, multiple=dressed) if latent else AdaptiveModel
        model = dress(backbone, tokenizer, settings)
        add_lora(model, lora)
    return model


def warm_up(
    model: AdaptiveModel, data: Sequence[Example], steps: int, folder: Path, seed: int, logger: Callable | None = None
) -> TrainResult:
    """Teaches a random toy the written reasoning, so that it plays the part of a pretrained base."""
    settings = TrainSettings(
        steps=steps, global_batch=64, lr=2e-3, warmup_steps=20, schedule="linear", save_every=0, seed=seed, device="cpu"
    )
    return train_sft(model, data, Distil(mode="cot"), settings.but(betas=[0.9, 0.98], weight_decay=0.01), folder, logger)[0]


def add_lora(model: AdaptiveModel, lora: Mapping[str, Any]) -> None:
    """LoRA as resolved option strings say; nothing for an empty one."""
    if lora:
        model.add_lora(lora["r"], lora["lora_alpha"], lora.get("lora_dropout", 0.0), lora["target_modules"])


def copy_for(base: AdaptiveModel, distil: Distil, lora: Mapping[str, Any]) -> AdaptiveModel:
    """A copy of `base` for one arm: one that answers in text for the text modes; LoRA where asked for."""
    model = copy.deepcopy(base)
    if distil.mode != "latent" and model.config.latent:
        model.parts = torch.nn.Module()
        model.but(start=-1, end=-1, go_on=-1, stop=-1, filter="none")
    add_lora(model, lora)
    return model


def half(device: str) -> bool | None:
    """False where half precision does not pay (a CPU); None leaves it to the options."""
    return False if device == "cpu" or not torch.cuda.is_available() else None


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
    loss, settings = SFT(distil), spare_specials(model, settings)
    settings = settings.but(guard=settings.guard.of_components("teacher_ce", "student_ce"))
    result = fit(model, rows.rows, batch_of, loss, settings, folder, logger, count=loss.count, validate=validate, label=distil.mode)
    if distil.mode == "latent":
        counts = set(rows.counts)
        fixed = counts.pop() if len(counts) == 1 else None
        model.but(head_trained=not distil.mask_thought_labels, most_trained=max(rows.counts), fixed_count=fixed)
    return result, rows


def spare_specials(model: AdaptiveModel, settings: TrainSettings) -> TrainSettings:
    """SFT's settings without weight decay on the special-token modules, where biases and norms are spared too (2B.5).

    RL's trainer, there as here, spares biases and norms alone.
    """
    if not model.config.special or settings.decay_all:
        return settings
    return settings.but(groups=[*settings.groups, _SPARED])


def fitting(resolved: Resolved, **changes: Any) -> TrainSettings:
    """The optimisation of resolved option strings; `changes` that are not 0, "" or None overrule them (a seed of 0 does, too)."""
    kept = {name: value for name, value in changes.items() if value is False or name == "seed" or value not in (0, "", None)}
    values = {**resolved.fitting, **kept}
    if "steps" in kept:
        values["epochs"] = 0.0
    return TrainSettings.check(**values)


def arm(distil: Distil, name: str) -> Distil:
    """`distil` with other losses: `given` as it is, `codi`, `meaned`, `none` (thoughts without distillation), `cot`, `no cot`.

    The weight is that of the given losses; everything else stays equal, so that arms differ in one thing.
    """
    weight = max(distil.weight_codi, distil.weight_mean)
    changes: dict[str, dict[str, Any]] = {
        "given": {},
        "codi": {"weight_codi": weight, "weight_mean": 0.0},
        "meaned": {"weight_codi": 0.0, "weight_mean": weight},
        "none": {"weight_codi": 0.0, "weight_mean": 0.0, "distance": "", "scale": "", "blocks": None},
    }
    changes |= {mode: {**changes["none"], "mode": mode} for mode in ("cot", "no cot")}
    if name not in changes:
        raise unknown("arm", name, changes)
    return distil.but(**changes[name])


# ---- RL ----


def rl_settings(fields: Mapping[str, Any], **changes: Any) -> RLSettings:
    """Settings of resolved option strings; `changes` that are not 0, "" or None overrule them (a seed of 0 does, too)."""
    kept = {name: value for name, value in changes.items() if value is False or name == "seed" or value not in (0, "", None)}
    return RLSettings.check(**{**fields, **kept})


def rl_arm(how: LengthReward, name: str) -> LengthReward:
    """`given`, or the control: `no length reward`."""
    arms = {"given": how, "no length reward": LengthReward(penalty=0.0, requirement=None, reward=None)}
    if name not in arms:
        raise unknown("arm", name, arms)
    return arms[name]


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
    compat: bool = False,
    logger: Callable | None = None,
    validate: Callable[[Any], Mapping[str, float]] | None = None,
) -> TrainResult:
    """RL on the number of thoughts, in place (2B.7).

    Args:
        most: thoughts at which a row is stopped; 0 = twice the largest count in training, as far as a completion has room.
        longest_prompt: longer prompts are left out. keep_negative: also problems with negative answers, which SFT leaves out.
        compat: the official prompts, without "Question: ", and completions (see `AdaptiveThinking`).
    """
    writer = Writer(model.tokenizer, model.config)
    kept = [example for example in data if not unusable(example, Distil(mode="no cot", remove_negative=not keep_negative))]
    asked = [(writer.prompt(example.question, prefix="" if compat else None), example.answer) for example in kept]
    asked = [(ids, answer) for ids, answer in asked if len(ids) <= longest_prompt]
    if not asked:
        raise SettingsError(f"No prompt has at most {longest_prompt} tokens and a numeric answer.")
    thinking = AdaptiveThinking(model, most or min(model.config.cap, max(1, settings.longest // 2)), compat=compat)
    thinking.hold_reference()
    columns = {"label": [answer for _, answer in asked], "prompt_id": list(range(len(asked)))}
    prompts = [ids for ids, _ in asked]
    rewards = rewards_of(how or LengthReward())
    return reinforce(model, thinking, prompts, columns, rewards, settings, folder, logger, validate=validate)
