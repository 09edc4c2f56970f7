"""What a recipe will do, from its option strings alone: no weights, no data."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of
from lab.methods.adaptive import options
from lab.methods.adaptive.config import AdaptiveSettings, from_official
from lab.methods.adaptive.stages import TOY, TOY_RL, TOY_TRAINING, fitting

Values = dict[str, Any]


def describe(settings: dict[str, Values]) -> dict[str, Any]:
    """Resolved settings of SFT and RL ({step: parameters}) and their optimizer steps.

    Raises SettingsError for an unknown or contradictory option token.
    """
    found: dict[str, Any] = {}
    if "train" in settings:
        found |= _sft(settings["train"])
    if "rl" in settings:
        found |= _rl(settings["rl"])
    return found


def _sft(v: Values) -> Values:
    text = options.of_stage(v["training_config_options"], "training", TOY_TRAINING)
    resolved = options.Resolved.of(text, v["latent_settings_options"], v["lora_config_options"], v["val_config_options"])
    found = {f"SFT {row['setting']}": row["value"] for row in options.shown(resolved.training) + options.shown(resolved.latent)}
    found["SFT optimizer steps"] = v["steps"] or resolved.training["steps"] or f"{resolved.training['epochs']} epochs"
    return found


def _rl(v: Values) -> Values:
    text = options.of_stage(v["training_config_options"], "RL", TOY_RL)
    fields = options.rl_fields(v["grpo_config_options"], text)
    found = {f"RL {row['setting']}": row["value"] for row in options.shown(options.resolve_rl(text))}
    found["RL optimizer steps"] = v["steps"] or fields["steps"]
    return found | {"RL prompts a step": fields["prompts"], "RL completions a prompt": fields["samples"]}


def trainings(settings: dict[str, Values]) -> Iterator[Training]:
    """SFT of every arm and RL of every arm; RL that starts from another run's model is not estimated."""
    if "train" not in settings:
        return
    v = settings["train"]
    text = options.of_stage(v["training_config_options"], "training", TOY_TRAINING)
    resolved = options.Resolved.of(text, v["latent_settings_options"], v["lora_config_options"], v["val_config_options"])
    how, toy = fitting(resolved, steps=v["steps"], micro_batch=v["micro_batch"]), v["model_path_or_repo"].startswith(TOY)
    name = ("toy:llama-tiny" if v["model_path_or_repo"] == TOY else v["model_path_or_repo"]) if toy else v["model_path_or_repo"]
    targets = tuple(target.removesuffix("_proj") for target in resolved.lora.get("target_modules", ()))
    latent = from_official(resolved.latent) if resolved.latent else AdaptiveSettings(filter="none")
    own = {"method": "adaptive", "settings": latent.model_dump(mode="json"), "lora": (resolved.lora.get("r", 0), targets)}
    own |= {"thoughts": 6, "said": 0.5, "examples": v["train_problems"] if v["world"] else 0}
    world, arms = "" if v["world"] else "gsm8k_aug", len(v["arms"])
    both = {**v, "micro_batch": how.micro_batch, "bf16": how.bf16}
    yield of("train", both, name, how.global_batch, world, steps=arms * how.steps, epochs=arms * how.epochs, passes=1.5, **own)
    if "rl" in settings and not settings["rl"]["model_path_or_repo"]:
        r = settings["rl"]
        fields = options.rl_fields(r["grpo_config_options"], options.of_stage(r["training_config_options"], "RL", TOY_RL))
        rows, steps = fields["prompts"] * fields["samples"], len(r["arms"]) * (r["steps"] or fields["steps"])
        yield of("rl", r, name, rows, world, steps=steps, **own | {"decoded": r["longest"] or fields.get("longest", 40)})
