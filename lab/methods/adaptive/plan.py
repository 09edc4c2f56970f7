"""What a recipe will do, from its option strings alone: no weights, no data."""

from typing import Any

from lab.errors import SettingsError
from lab.methods.adaptive import options
from lab.methods.adaptive.stages import TOY, TOY_RL, TOY_TRAINING

Values = dict[str, Any]


def describe(settings: dict[str, Values]) -> dict[str, Any]:
    """Resolved settings of SFT and RL ({step: parameters}), trained parameters, optimizer steps, and the weight the distances come to.

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
    name = v["model_path_or_repo"]
    if not name.startswith(TOY):
        found |= _parameters(name, resolved.latent is not None, resolved.lora)
    return found


def _rl(v: Values) -> Values:
    text = options.of_stage(v["training_config_options"], "RL", TOY_RL)
    fields = options.rl_fields(v["grpo_config_options"], text)
    found = {f"RL {row['setting']}": row["value"] for row in options.shown(options.resolve_rl(text))}
    found["RL optimizer steps"] = v["steps"] or fields["steps"]
    return found | {"RL prompts a step": fields["prompts"], "RL completions a prompt": fields["samples"]}


def _parameters(name: str, latent: bool, lora: Values) -> Values:
    """Parameters that learn: LoRA pairs, filter and special tokens; everything without LoRA."""
    from lab.models.lora import linear_shapes
    from lab.models.plan import planned_config

    try:
        config = planned_config(name)
    except SettingsError:
        return {}
    layers, width = config.num_hidden_layers, config.hidden_size
    found: Values = {}
    if lora and config.model_type != "gpt2":
        shapes = {f"{part}_proj": shape for part, shape in linear_shapes(config).items()}
        found["LoRA parameters"] = layers * sum(lora["r"] * sum(shapes[target]) for target in lora["target_modules"])
    if latent:
        found["filter parameters"] = 2 * (width * width + width) + 2 * width
        found["special-token parameters"] = (4 if config.tie_word_embeddings else 5) * width
    return found
